function save_design(file, nu, delta, k1, k2)
%SAVE_DESIGN  Design spectral bounds and write them for Python.
%
%   save_design('design.mat', nu, delta, k1, k2)
%
%   Runs get_indexes and writes its answer as `tf-lyapunov import-mat` and
%   tf_lyapunov.matlab.import_mat read it; Python proves it again before it is used.
%
%   Arguments: those of GET_INDEXES after the file's name.

    if nargin ~= 5
        error('tf_lyapunov:input', 'Usage: save_design(file, nu, delta, k1, k2)');
    end
    [nu_vec, delta_vec, sn_vec, kc, p_vec] = get_indexes(nu, delta, k1, k2);
    [k1, k2] = check_sectors(k1, k2);
    design = struct('rule', 'sound', 'variant', '', 'delta', delta, 'nu', nu, 'k1', k1, 'k2', k2, ...
                    'nu_vec', nu_vec, 'delta_vec', delta_vec, 'sn_vec', sn_vec, 'p_vec', p_vec, ...
                    'kc', kc, 'centers', [], 'radii', [], 'smallest_singular_values', [], ...
                    'target_gain', [], 'verdict', 'PROVED'); %#ok<NASGU>
    tf_lyapunov = struct('format', 'tf_lyapunov.mat', 'version', 1, ...
                         'writer', 'matlab_compat'); %#ok<NASGU>
    save(file, 'tf_lyapunov', 'design', '-v7');
end
