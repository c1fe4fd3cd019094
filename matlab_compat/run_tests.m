function failures = run_tests(results_file, golden_folder)
%RUN_TESTS  Tests of this folder, in MATLAB or GNU Octave.
%
%   run_tests                          % prints one line per test
%   failures = run_tests(results_file)           % also writes results for Python to compare
%   failures = run_tests(results_file, golden_folder)
%
%   Golden files come from make_golden.py. In a shell:
%       octave-cli --no-history --eval "addpath('matlab_compat'); exit(run_tests > 0)"

    here = fileparts(mfilename('fullpath'));
    if nargin < 2
        golden_folder = fullfile(here, 'golden');
    end
    theory = load(fullfile(golden_folder, 'theory.mat'));
    theory.maps = getfield(load(fullfile(golden_folder, 'maps.mat')), 'maps'); %#ok<GFLD>
    theory.folder = golden_folder;
    tests = {
        'get_indexes finds the same budgets as Python', @designs_agree
        'a network within the budgets never breaks its claim', @budgets_are_sound
        'a network two percent beyond the budgets breaks its claim', @budgets_are_tight
        'two scalars mean one layer, and a scalar beside a vector is repeated', @scalars_mean_one_layer
        'the cone of (nu, delta) = (-2, .4) is (-1.31, 3.81)', @quoted_cone
        'the cone (-.215, .465) belongs to (nu, delta) = (-.4, 4)', @printed_cone
        'the released bound 1.454 breaks its claim and ours does not', @counterexample
        'the released bound is negative for linear layers', @negative_for_linear
        'infeasible claims are refused with feasible ones nearby', @infeasible_claims
        'wrong arguments are refused', @wrong_arguments
        'spectral bounds agree with Python', @bounds_agree
        'cascade matrices and their eigenvalues agree with Python', @cascades_agree
        'a cascade without weights is the published one', @published_cascade
        'matrices of Theorem 1 agree with Python', @lmis_agree
        'Theorem 1 proves a layer at its norm bound and refutes one beyond', @lmi_at_the_bound
        'Theorem 1 takes general Q, S and R', @general_supply
        'the largest nu of a layer agrees with Python', @largest_indices
        'a larger nu than the largest is not proved', @indices_are_tight
        'a multiplier per output proves what one for all cannot', @diagonal_beats_scalar
        'a singular matrix is not called feasible', @singular_is_undecided
        'matrices of convolutions agree with Python', @matrices_agree
        'norm bounds agree with Python and lie above the norms', @norms_agree
        'the exported network is proved', @network_is_proved
        'residual sums, pooling and folded layers are composed', @branches_are_proved
        'a claim with nu > 0 is proved through the cascade', @conic_is_proved
        'a larger weight voids the proof', @larger_weight
        'a smaller claimed gain is not proved', @smaller_gain
        'a steeper activation voids the proof', @steeper_activation
        'changed multipliers or indices void the cascade', @changed_multipliers
        'a certificate of another model is not proved', @other_model
        'NaN, missing parts and other files are refused', @refusals
        };
    results = struct();
    failures = 0;
    for k = 1:size(tests, 1)
        try
            found = tests{k, 2}(theory);
            if isstruct(found)
                for name = fieldnames(found)'
                    results.(name{1}) = found.(name{1});
                end
            end
            fprintf('ok %d - %s\n', k, tests{k, 1});
        catch problem
            failures = failures + 1;
            fprintf('not ok %d - %s: %s\n', k, tests{k, 1}, problem.message);
        end
    end
    fprintf('%d tests, %d failures\n', size(tests, 1), failures);
    if nargin > 0 && ~isempty(results_file)
        save(results_file, '-struct', 'results', '-v7');
    end
    if nargout == 0
        if failures > 0
            error('tf_lyapunov:tests', '%d tests failed.', failures);
        end
        clear failures
    end
end

% Tools -------------------------------------------------------------------------------------------

function expect(condition, varargin)
    if ~(islogical(condition) && isscalar(condition) && condition)
        error('tf_lyapunov:tests', varargin{:});
    end
end

function expect_error(identifier, f)
    try
        f();
    catch problem
        expect(strcmp(problem.identifier, identifier), 'expected %s, but: %s (%s)', identifier, ...
               problem.identifier, problem.message);
        return
    end
    error('tf_lyapunov:tests', 'nothing was refused where %s was expected', identifier);
end

function w = supply(dx, dy, delta, nu)
    n = min(numel(dx), numel(dy));
    w = dx(1:n)' * dy(1:n) - delta * (dy' * dy) - nu * (dx' * dx);
end

function dy = run(weights, k1, k2, x, z)
% Difference of two runs of a network of two-slope activations without biases.
    for l = 1:numel(weights)
        x = weights{l} * x;
        z = weights{l} * z;
        x = max(k1(l) * x, k2(l) * x);
        z = max(k1(l) * z, k2(l) * z);
    end
    dy = x - z;
end

function changed = changed_file(theory, name, change)
% A copy of a golden network with one thing changed.
    changed = [tempname(), '.mat'];
    content = change(load(fullfile(theory.folder, name))); %#ok<NASGU>
    save(changed, '-struct', 'content', '-v7');
end

function [proved, report] = check_and_delete(file)
    cleaner = onCleanup(@() delete(file));
    [proved, report] = check_certificate(file);
end

% Designs -----------------------------------------------------------------------------------------

function results = designs_agree(theory)
    results.designs = cell(1, numel(theory.designs));
    for k = 1:numel(theory.designs)
        g = theory.designs{k};
        [nu_vec, delta_vec, sn_vec, kc, p_vec] = get_indexes(g.nu, g.delta, g.k1, g.k2);
        n = numel(g.k1);
        magnitude = max(abs(g.k1), abs(g.k2));
        reserve = 1 - prod(sn_vec .* magnitude) / g.allowed;
        % The product rounds 3n times; the reserves are the only other difference allowed.
        rounding = 8 * n * eps;
        expect(reserve > -rounding && reserve < 1e-6, 'reserve %g of design %d', reserve, k);
        expect(max(abs(sn_vec ./ g.sn_vec - 1)) <= (abs(reserve) + g.reserve) / n + rounding, ...
               'budgets of design %d', k);
        expect(kc(1) <= g.kc(1) && kc(2) >= g.gain, 'kc of design %d is not rounded outwards', k);
        expect(max(abs(kc ./ g.kc - 1)) <= 32 * eps, 'kc of design %d', k);
        expect(all(spectral_bound(nu_vec, delta_vec, g.k1, g.k2) >= sn_vec * (1 - 32 * eps)), ...
               'indices of design %d do not give its budgets back', k);
        [~, M] = cascade_matrix(g.nu, g.delta, nu_vec, delta_vec, p_vec);
        % Scaled to a unit diagonal, by another route than the function's own test.
        d = sqrt(diag(M));
        expect(min(eig(M ./ (d * d'))) > 0, 'cascade of design %d', k);
        results.designs{k} = struct('nu', g.nu, 'delta', g.delta, 'k1', g.k1, 'k2', g.k2, ...
                                    'nu_vec', nu_vec, 'delta_vec', delta_vec, 'sn_vec', sn_vec, ...
                                    'kc', kc, 'p_vec', p_vec);
    end
end

function none = budgets_are_sound(~)
    none = [];
    nu = -2;
    delta = 0.4;
    k1 = [0.1, 0.1, 1];
    k2 = [1, 1, 1];
    [~, ~, sn] = get_indexes(nu, delta, k1, k2);
    sizes = [4, 4, 3, 2];
    for trial = 1:200
        weights = cell(1, 3);
        for l = 1:3
            V = deterministic(sizes(l + 1), sizes(l), 7 * trial + l);
            weights{l} = V * (sn(l) / norm(V));
        end
        x = deterministic(4, 1, trial);
        z = deterministic(4, 1, -trial);
        dy = run(weights, k1, k2, x, z);
        % Fewer than a thousand operations, each within eps of signals no larger than about one.
        scale = x' * x + z' * z;
        expect(supply(x - z, dy, delta, nu) >= -1e3 * eps * scale, 'trial %d', trial);
    end
    % The worst case: every layer -t or t, at full slope.
    dy = run({-sn(1), sn(2), sn(3)}, k1, k2, -1, 0);
    expect(supply(-1, dy, delta, nu) >= 0, 'scalar worst case');
end

function V = deterministic(rows, columns, seed)
% Entries spread over [-1, 1], the same in MATLAB and Octave.
    k = reshape(1:rows * columns, rows, columns) + 101 * seed;
    V = 2 * mod(sin(k) * 1e4, 1) - 1;
end

function none = budgets_are_tight(~)
    none = [];
    [~, ~, sn] = get_indexes(-2, 0.4, [0.1, 0.1, 1], [1, 1, 1]);
    sn(3) = 1.02 * sn(3);
    % All slopes are 1 on positive signals; the last weight turns the sign.
    dy = run({sn(1), sn(2), -sn(3)}, [0.1, 0.1, 1], [1, 1, 1], 1, 0);
    expect(supply(1, dy, 0.4, -2) < 0, 'the claim still holds');
end

function none = scalars_mean_one_layer(~)
    none = [];
    [nu_vec, delta_vec, sn_vec] = get_indexes(-0.476, 0.525, 0.1, 1);
    expect(isscalar(nu_vec) && isscalar(delta_vec) && isscalar(sn_vec), 'not one layer');
    % One layer has the claim's own bound.
    expect(abs(sn_vec / spectral_bound(-0.476, 0.525, 0.1, 1) - 1) < 1e-6, 'another bound');
    [~, ~, four] = get_indexes(-0.476, 0.525, 0.1, [1, 1, 1, 1]);
    expect(numel(four) == 4, 'a scalar beside a vector was not repeated');
end

function none = quoted_cone(~)
    none = [];
    [~, ~, ~, kc] = get_indexes(-2, 0.4, [0.1, 0.1, 1], [1, 1, 1]);
    expect(isequal(round(100 * kc) / 100, [-1.31, 3.81]), 'kc = %s', mat2str(kc));
end

function none = printed_cone(~)
    none = [];
    [~, ~, ~, kc] = get_indexes(-0.4, 4, [0.1, 0.1, 1], [1, 1, 1]);
    expect(max(abs(kc - [-0.215, 0.465])) < 5e-4, 'kc = %s', mat2str(kc));
end

function none = counterexample(~)
    none = [];
    nu = -0.476;
    delta = 0.525;
    [sn, script] = spectral_bound(nu, delta, 0.1, 1);
    expect(round(1000 * script) == 1454, 'the released bound is %g', script);
    expect(supply(-1, run({-script}, 0.1, 1, -1, 0), delta, nu) < 0, 'W = -1.454 keeps the claim');
    expect(supply(-1, run({-sn}, 0.1, 1, -1, 0), delta, nu) >= 0, 'W = -%g breaks the claim', sn);
    expect(supply(-1, run({-1.001 * sn}, 0.1, 1, -1, 0), delta, nu) < 0, 'the bound is loose');
    [~, ~, feasible, ~, info] = layer_lmi(-script * eye(2), 0.1, 1, struct('delta', delta, 'nu', nu));
    expect(~feasible && strcmp(info.verdict, 'REFUTED'), 'Theorem 1 accepts the released bound');
end

function none = negative_for_linear(~)
    none = [];
    [sn, script] = spectral_bound(-2, 0.4, 1, 1);
    expect(script < 0, 'the released bound is %g', script);
    expect(sn > 1.31 && sn < 1.32, 'the sound bound is %g', sn);
end

function none = infeasible_claims(theory)
    none = [];
    for k = 1:numel(theory.infeasible)
        g = theory.infeasible{k};
        claims = claims_offered(g.nu, g.delta);
        expect(size(claims, 1) == size(g.nearest, 1) ...
               && max(max(abs(claims ./ g.nearest - 1))) < 16 * eps, 'other claims than Python');
    end
    for bad = {[0.3, 0.9], [-1, 0], [0.1, -1], [-1, -1]}
        claims = claims_offered(bad{1}(1), bad{1}(2));
        for k = 1:size(claims, 1)
            [~, ~, sn_vec] = get_indexes(claims(k, 1), claims(k, 2), [0, 0], [1, 1]);
            expect(all(sn_vec > 0), 'the offered claim is infeasible too');
        end
    end
end

function claims = claims_offered(nu, delta)
% Pairs in parentheses after "Nearest" in the message of the refusal.
    try
        get_indexes(nu, delta, [0, 0, 0], [1, 1, 1]);
    catch problem
        expect(strcmp(problem.identifier, 'tf_lyapunov:infeasible'), '%s', problem.message);
        text = problem.message(strfind(problem.message, 'Nearest'):end);
        tokens = regexp(text, '\(([-+.e0-9]+), ([-+.e0-9]+)\)', 'tokens');
        claims = zeros(numel(tokens), 2);
        for k = 1:numel(tokens)
            claims(k, :) = [str2double(tokens{k}{1}), str2double(tokens{k}{2})];
        end
        expect(~isempty(claims), 'no claim is offered in: %s', problem.message);
        return
    end
    error('tf_lyapunov:tests', '(%g, %g) was accepted', nu, delta);
end

function none = wrong_arguments(~)
    none = [];
    wrong = 'tf_lyapunov:input';
    expect_error(wrong, @() get_indexes(-2, 0.4, [0, 0], [1, 1, 1]));
    expect_error(wrong, @() get_indexes(-2, 0.4, [1, 1], [0, 1]));
    expect_error(wrong, @() get_indexes(-2, 0.4, [0, 0], [0, 1]));
    expect_error(wrong, @() get_indexes(NaN, 0.4, 0, 1));
    expect_error(wrong, @() get_indexes(-2, Inf, 0, 1));
    expect_error(wrong, @() get_indexes(-2, '0.4', 0, 1));
    expect_error(wrong, @() get_indexes(-2, 0.4, [], []));
    expect_error(wrong, @() get_indexes(-2, 0.4, 0));
    expect_error(wrong, @() cascade_matrix(-2, 0.4, [1, 1], 1));
    expect_error(wrong, @() cascade_matrix(-2, 0.4, [1, 1], [1, 1], [1, 0]));
    expect_error('tf_lyapunov:infeasible', @() spectral_bound(0.1, 1, 0, 1));
    % Overflow gives no bound rather than a wrong one; underflow gives the right one.
    expect(spectral_bound(-1e200, 1e200, 0, 1) == 0, 'a bound out of range');
    expect(abs(spectral_bound(-1e-290, 1e290, 0, 1) / 6.180339887498949e-291 - 1) < 1e-12, 'tiny');
    expect_error(wrong, @() layer_lmi([1, NaN], 0, 1, struct('delta', 1, 'nu', -1)));
    expect_error(wrong, @() layer_lmi(1, 1, 0, struct('delta', 1, 'nu', -1)));
    expect_error(wrong, @() layer_lmi(1, 0, 1, struct('nu', 1)));
    expect_error(wrong, @() layer_lmi(1, 0, 1, struct('delta', NaN)));
    expect_error(wrong, @() layer_lmi(1, 0, 1, struct('delta', 1), 2));
    expect_error(wrong, @() layer_lmi(1, 0, 1, struct('delta', 1, 'nu', -1), -1));
    expect_error(wrong, @() layer_lmi(eye(2), 0, 1, struct('delta', 1, 'nu', -1), [1, 1; 0, 1]));
    expect_error(wrong, @() layer_lmi(1, 0, 1, struct('Q', 1, 'S', [1, 2], 'R', 1)));
end

% Matrices ----------------------------------------------------------------------------------------

function none = bounds_agree(theory)
    none = [];
    for k = 1:numel(theory.bounds)
        g = theory.bounds{k};
        [sn, script, theorem_4] = spectral_bound(g.nu, g.delta, g.k1, g.k2);
        expect(sn <= g.sn && sn >= g.sn * (1 - 32 * eps), 'sound bound %d', k);
        expect(abs(script - g.sn_script) <= 64 * eps * abs(script), 'released bound %d', k);
        expect(isequal(isnan(theorem_4), isnan(g.sn_theorem_4)), 'assumptions of bound %d', k);
        % Theorem 4 is a difference of numbers up to one over the mean slope.
        expect(isnan(theorem_4) || abs(theorem_4 - g.sn_theorem_4) <= 16 * eps / mean([g.k1, g.k2]), ...
               'bound %d of Theorem 4', k);
    end
end

function results = cascades_agree(theory)
    results.cascades = cell(1, numel(theory.cascades));
    for k = 1:numel(theory.cascades)
        g = theory.cascades{k};
        [A, M, bound] = cascade_matrix(g.nu, g.delta, g.nu_vec, g.delta_vec, g.p_vec);
        % Python's entries are correctly rounded, ours within the stated bound.
        expect(all(all(abs(M - g.M) <= bound + eps / 2 * abs(g.M))), 'M of cascade %d', k);
        expect(all(all(abs(A - g.A) <= eps * abs(g.A))), 'A of cascade %d', k);
        expect(max(bound(:)) <= 2 * eps * max(1, max(abs(M(:)))), 'the bound of M %d is loose', k);
        [value, error_bound] = smallest_eigenvalue(M);
        expect(abs(value - g.value) <= error_bound + g.bound + norm(bound, 'fro'), ...
               'eigenvalue of cascade %d', k);
        expect(error_bound < 1e-12, 'the eigenvalue bound of cascade %d is loose', k);
        results.cascades{k} = struct('A', A, 'M', M, 'value', value, 'bound', error_bound);
    end
end

function none = published_cascade(theory)
    none = [];
    g = theory.cascades{4};
    [A, M] = cascade_matrix(g.nu, g.delta, g.nu_vec, g.delta_vec);
    expect(isequal(M, -A), 'M(1) is not -A');
    expect(A(2, 2) == -(g.delta_vec(1) + g.nu_vec(2)), 'the sign error of the paper is back');
    expect(A(1, 6) == -0.5 && A(1, 2) == 0.5 && A(1, 3) == 0, 'off-diagonal entries');
    % The released design of the first paper fails its own test.
    expect(min(eig(-A)) < -0.5, 'the released design passes');
end

function results = largest_indices(theory)
    results.indices = cell(1, numel(theory.indices));
    for k = 1:numel(theory.indices)
        g = theory.indices{k};
        [M, lambda_min, feasible, Lambda, info] = layer_lmi(g.W, g.alpha, g.beta, ...
                                                            struct('delta', g.delta));
        % Both stop at a relative gap of 1e-8; without a finite optimum, where rounding takes over.
        tolerance = 1e-6;
        if g.alpha == g.beta
            tolerance = 1e-5;
        end
        expect(abs(info.nu - g.nu) <= tolerance * (abs(g.nu) + g.gain), 'nu of layer %d: %.15g', ...
               k, info.nu);
        expect(feasible && all(Lambda >= 0) && strcmp(info.verdict, 'PROVED'), 'layer %d', k);
        outputs = size(g.W, 1);
        expect(isequal(M(outputs + 1:end, 1:outputs)', M(1:outputs, outputs + 1:end)) ...
               && lambda_min > -1e-9 * norm(M), 'matrix of layer %d', k);
        results.indices{k} = struct('nu', info.nu, 'Lambda', Lambda);
    end
    % Indices scale with the layer: sizes near the ends of the doubles are no exception.
    for power = [-500, 500]
        g = theory.indices{1};
        [~, ~, feasible, ~, info] = layer_lmi(g.W * 2^power, g.alpha, g.beta, ...
                                              struct('delta', g.delta / 2^power));
        expect(feasible && abs(info.nu / 2^power - g.nu) <= 1e-6 * g.gain, 'power %d', power);
    end
end

function results = indices_are_tight(theory)
    for k = 1:numel(theory.indices)
        g = theory.indices{k};
        supply = struct('delta', g.delta, 'nu', g.nu + 1e-3 * g.gain);
        [~, ~, feasible] = layer_lmi(g.W, g.alpha, g.beta, supply);
        expect(~feasible, 'layer %d', k);
    end
    results = [];
end

function results = diagonal_beats_scalar(theory) %#ok<INUSD>
    W = [2, 0.1; 0, 0.2];
    [~, ~, ~, Lambda, info] = layer_lmi(W, 0, 1, struct('delta', 0.5));
    expect(max(Lambda) > 1.2 * min(Lambda), 'the multipliers do not differ');
    supply = struct('Q', -0.5 * eye(2), 'S', eye(2) / 2, 'R', -(info.nu - 1e-6) * eye(2));
    [~, ~, feasible] = layer_lmi(W, 0, 1, supply);
    expect(feasible, 'not found for a given supply rate');
    for lambda = 10 .^ (-3:0.01:4)
        [~, ~, feasible] = layer_lmi(W, 0, 1, supply, lambda);
        expect(~feasible, 'lambda = %g is enough', lambda);
    end
    results = [];
end

function results = lmis_agree(theory)
    results.lmis = cell(1, numel(theory.lmis));
    for k = 1:numel(theory.lmis)
        g = theory.lmis{k};
        rates = struct('delta', g.delta, 'nu', g.nu);
        [M, value] = layer_lmi(g.W, g.alpha, g.beta, rates, g.Lambda);
        scale = max(abs(g.M(:)));
        expect(max(max(abs(M - g.M))) <= 16 * eps * scale, 'matrix %d', k);
        expect(abs(value - g.value) <= g.bound + 64 * eps * scale, 'eigenvalue %d', k);
        full_supply = struct('Q', -g.delta * eye(size(g.W, 1)), 'S', eye(size(g.W)) / 2, ...
                             'R', -g.nu * eye(size(g.W, 2)));
        expect(isequal(M, layer_lmi(g.W, g.alpha, g.beta, full_supply, diag(g.Lambda))), ...
               'Q, S, R give another matrix %d', k);
        [M, best, feasible, Lambda] = layer_lmi(g.W, g.alpha, g.beta, rates);
        % The best one for signals of like size; a linear layer has none, more is always better.
        unit = 2 ^ round(log2(max(abs([g.alpha, g.beta])) * norm(g.W)));
        D = diag([unit * ones(1, size(g.W, 1)), ones(1, size(g.W, 2))]);
        for factor = [0.5, 0.9, 1.1, 2]
            other = layer_lmi(g.W, g.alpha, g.beta, rates, factor * Lambda);
            expect(g.alpha == g.beta || min(eig(D * other * D)) < min(eig(D * M * D)), ...
                   'Lambda of matrix %d is not the best', k);
        end
        results.lmis{k} = struct('Lambda', Lambda, 'value', best, 'feasible', double(feasible));
    end
end

function none = lmi_at_the_bound(~)
    none = [];
    for k1 = [0, 0.1, 1, -0.13]
        rates = struct('delta', 0.525, 'nu', -0.476);
        sn = spectral_bound(rates.nu, rates.delta, k1, 1);
        % A linear layer has room only in the limit of large multipliers, which round more.
        distance = 1e-9;
        if k1 == 1
            distance = 1e-6;
        end
        [~, ~, inside] = layer_lmi(-sn * (1 - distance) * eye(3), k1, 1, rates);
        [~, ~, outside] = layer_lmi(-sn * (1 + distance) * eye(3), k1, 1, rates);
        expect(inside, 'slopes [%g, 1]: not proved at its bound', k1);
        expect(~outside, 'slopes [%g, 1]: proved beyond its bound', k1);
    end
    % Indices as get_indexes returns them, of order 1e9.
    [nu_vec, delta_vec, sn_vec] = get_indexes(-2, 0.4, [0.1, 0.1], [1, 1]);
    rates = struct('delta', delta_vec(1), 'nu', nu_vec(1));
    V = deterministic(4, 3, 5);
    [~, ~, inside] = layer_lmi(V * (sn_vec(1) * (1 - 1e-6) / norm(V)), 0.1, 1, rates);
    [~, ~, outside] = layer_lmi(V * (sn_vec(1) * (1 + 1e-6) / norm(V)), 0.1, 1, rates);
    expect(inside && ~outside, 'indices of get_indexes');
end

function none = general_supply(~)
    none = [];
    W = [3, 0; 0, 4] / 5;
    gain = @(g) struct('Q', -eye(2), 'S', zeros(2), 'R', g^2 * eye(2));
    [~, ~, above] = layer_lmi(W, 0, 1, gain(0.801));
    [~, ~, below] = layer_lmi(W, 0, 1, gain(0.799));
    expect(above && ~below, 'the gain of the layer is 0.8');
    % Different weights per output: only the second output is limited.
    rates = struct('Q', diag([-0.1, -1]), 'S', zeros(2), 'R', diag([1, 0.7]));
    [~, ~, feasible] = layer_lmi(W, 0, 1, rates, [1; 2]);
    expect(feasible, 'a weighted supply rate');
end

function none = singular_is_undecided(~)
    none = [];
    rates = struct('Q', -1, 'S', 0, 'R', 1);
    [M, value, feasible, ~, info] = layer_lmi(1, 0, 1, rates, 2);
    expect(isequal(M, [1, -1; -1, 1]), 'M = %s', mat2str(M));
    expect(~feasible && strcmp(info.verdict, 'UNDECIDED') && abs(value) < 4 * eps, ...
           'a singular matrix is %s', info.verdict);
end

% Linear maps -------------------------------------------------------------------------------------

function none = matrices_agree(theory)
    none = [];
    compared = 0;
    for k = 1:numel(theory.maps)
        g = theory.maps{k};
        if ~isempty(g.matrix)
            expect(isequal(full(layer_matrix(g.map)), g.matrix), 'matrix of %s', g.map.name);
            compared = compared + 1;
        end
    end
    expect(compared == 9, '%d matrices compared', compared);
end

function results = norms_agree(theory)
    results.norms = zeros(1, numel(theory.maps));
    for k = 1:numel(theory.maps)
        g = theory.maps{k};
        [upper, estimate, method] = norm_upper_bound(g.map);
        % Python's factors of a Gram matrix of side n <= 1800 leave n^2*eps open.
        slack = 2 * (upper / estimate - 1) + 1800^2 * eps;
        expect(strcmp(method, g.method), 'method of %s: %s', g.map.name, method);
        expect(upper / estimate - 1 < 1e-11, 'the bound of %s is loose', g.map.name);
        % Python samples long axes by 50 points per degree: at most 0.05% above, an axis.
        sampled = 1e-3 * strcmp(method, 'frequency');
        expect(upper / g.upper - 1 <= slack && upper / g.upper - 1 >= -slack - sampled, ...
               'norm of %s: %g from %g', g.map.name, upper, g.upper);
        if ~isempty(g.matrix)
            expect(upper >= norm(g.matrix), 'the bound of %s is below its norm', g.map.name);
        end
        scaled = g.map;
        if ~strcmp(g.map.kind, 'depthwise')
            channels = size(layer_matrix_of_one_position(g.map), 1);
        else
            channels = prod(g.map.shape(end - 1:end));
        end
        scaled.scale = -3 * ones(1, channels);
        expect(abs(norm_upper_bound(scaled) / (3 * upper) - 1) <= slack + 1e-12, ...
               'a scaled %s', g.map.name);
        results.norms(k) = upper;
    end
    map = theory.maps{1}.map;
    map.scale = [2, 0, 0];
    expect(abs(norm_upper_bound(map) / (2 * norm(map.kernel(:, 1))) - 1) < 32 * eps, ...
           'scale acts on the outputs of a dense map');
    map = theory.maps{9}.map;
    map.scale = [0, 1];
    W = full(layer_matrix(theory.maps{9}.map));
    expect(isequal(full(layer_matrix(map)), W .* repmat([0; 1], size(W, 1) / 2, 1)), ...
           'scale acts on the output channels of a transposed convolution');
end

function rows = layer_matrix_of_one_position(map)
% As many rows as the map has output channels.
    if strcmp(map.kind, 'conv_transpose')
        rows = zeros(map.shape(end - 1), 1);
    else
        rows = zeros(map.shape(end), 1);
    end
end

% Certificates ------------------------------------------------------------------------------------

function results = network_is_proved(theory)
    [proved, report] = check_certificate(fullfile(theory.folder, 'dense_network.mat'));
    expect(proved && strcmp(report.gain_verdict, 'PROVED') ...
           && strcmp(report.claim_verdict, 'PROVED'), '%s', report.text);
    content = load(fullfile(theory.folder, 'dense_network.mat'));
    expect(abs(report.gain / content.certificate.gain_upper_bound - 1) < 1e-12, 'gain');
    expect(all(report.norms <= content.design.sn_vec), 'a layer is beyond its budget');
    results.dense_gain = report.gain;
end

function results = branches_are_proved(theory)
    [proved, report] = check_certificate(fullfile(theory.folder, 'branched_network.mat'));
    expect(proved && strcmp(report.claim_verdict, 'NO_CLAIM'), '%s', report.text);
    expect(any(~cellfun(@isempty, strfind(report.assumptions, 'pool has gain 2'))), ...
           'pooling is not listed as taken from the file');
    results.branched_gain = report.gain;
end

function none = conic_is_proved(theory)
    none = [];
    [proved, report] = check_certificate(fullfile(theory.folder, 'conic_network.mat'));
    expect(proved && ~isempty(strfind(report.text, 'scaled cascade')), '%s', report.text); %#ok<STREMP>
    expect(report.gain < 2, 'the gain of the claim');
    % One weight turned around: same norms, but outside its ball.
    [proved, report] = check_and_delete(changed_file(theory, 'conic_network.mat', @turn));
    expect(~proved && ~isempty(strfind(report.text, 'layer 2')), '%s', report.text); %#ok<STREMP>
end

function content = turn(content)
    content.network.maps{2}.kernel = -content.network.maps{2}.kernel;
end

function none = larger_weight(theory)
    none = [];
    [proved, report] = check_and_delete(changed_file(theory, 'dense_network.mat', @grow));
    expect(~proved && strcmp(report.gain_verdict, 'NOT_PROVED') ...
           && strcmp(report.claim_verdict, 'NOT_PROVED'), '%s', report.text);
    [proved, report] = check_and_delete(changed_file(theory, 'branched_network.mat', @grow));
    expect(~proved, '%s', report.text);
end

function content = grow(content)
    content.network.maps{1}.kernel = content.network.maps{1}.kernel * (1 + 1e-5);
end

function none = smaller_gain(theory)
    none = [];
    [proved, report] = check_and_delete(changed_file(theory, 'dense_network.mat', @shrink_gain));
    expect(~proved && strcmp(report.gain_verdict, 'NOT_PROVED') ...
           && strcmp(report.claim_verdict, 'PROVED'), '%s', report.text);
end

function content = shrink_gain(content)
    content.certificate.gain_upper_bound = content.certificate.gain_upper_bound * (1 - 1e-9);
end

function none = steeper_activation(theory)
    none = [];
    [proved, report] = check_and_delete(changed_file(theory, 'dense_network.mat', @steepen));
    expect(~proved, '%s', report.text);
end

function content = steepen(content)
    content.network.nodes{3}.sector = [-1.01, 1];
end

function none = changed_multipliers(theory)
    none = [];
    changes = {'p_vec', 1.5; 'nu_vec', 0.9; 'delta_vec', 1.3; 'nu', 0.9999; 'delta', 0.9};
    for k = 1:size(changes, 1)
        change = @(content) scale_first(content, changes{k, 1}, changes{k, 2});
        [proved, report] = check_and_delete(changed_file(theory, 'conic_network.mat', change));
        % A smaller delta or nu is a weaker claim: what was proved still holds then.
        weaker = any(strcmp(changes{k, 1}, {'nu', 'delta'}));
        expect(proved == weaker, '%s: %s', changes{k, 1}, report.text);
    end
    change = @(content) scale_first(content, 'nu', 1.01);
    proved = check_and_delete(changed_file(theory, 'conic_network.mat', change));
    expect(~proved, 'a stronger claim is called proved');
end

function content = scale_first(content, name, factor)
    content.design.(name)(1) = factor * content.design.(name)(1);
end

function none = other_model(theory)
    none = [];
    [proved, report] = check_and_delete(changed_file(theory, 'dense_network.mat', @rename));
    expect(~proved, '%s', report.text);
end

function content = rename(content)
    content.certificate.model_digest(end) = 'x';
end

function none = refusals(theory)
    none = [];
    refused = 'tf_lyapunov:refused';
    changes = {@spoil_kernel, @(c) rmfield(c, 'network'), @(c) rmfield(c, 'tf_lyapunov'), ...
               @spoil_shape, @spoil_wiring, @spoil_gain, @spoil_rule};
    for k = 1:numel(changes)
        file = changed_file(theory, 'branched_network.mat', changes{k});
        expect_error(refused, @() check_and_delete(file));
    end
    expect_error(refused, @() check_certificate(fullfile(theory.folder, 'theory.mat')));
    expect_error(refused, @() check_certificate(fullfile(theory.folder, 'absent.mat')));
end

function content = spoil_kernel(content)
    content.network.maps{1}.kernel(1) = NaN;
end

function content = spoil_shape(content)
    content.network.maps{1}.shape(1) = 2;
end

function content = spoil_wiring(content)
    content.network.nodes{3}.inputs = 3;
end

function content = spoil_gain(content)
    content.network.nodes{2}.gain = NaN;
end

function content = spoil_rule(content)
    content.network.nodes{2}.rule = 'mean';
end
