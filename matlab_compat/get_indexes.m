function [nu_vec, delta_vec, sn_vec, kc, p_vec] = get_indexes(nu, delta, k1, k2)
%GET_INDEXES  Passivity indices and spectral bounds for every layer, from a claim on the network.
%
%   [nu_vec delta_vec sn_vec kc] = get_indexes(nu, delta, k1, k2)
%   [nu_vec delta_vec sn_vec kc p_vec] = get_indexes(nu, delta, k1, k2)
%
%   The published signature. Every network whose layer l has norm(W_l) <= sn_vec(l) and an
%   activation with slopes in [k1(l), k2(l)] satisfies, for all pairs of inputs,
%
%       dx'*dy - delta*norm(dy)^2 - nu*norm(dx)^2 >= 0,                       delta > 0 > nu,
%
%   and the answer is returned only after this was verified by eigenvalue, with rounding.
%
%   nu, delta   the claim, in the published order (nu first).
%   k1, k2      smallest and largest slopes of the activations, one entry per layer: as published,
%               length(k1) is the number of layers. A scalar beside a vector is repeated; two
%               scalars mean one layer.
%   nu_vec, delta_vec   indices of the layers: each layer within its spectral bound satisfies
%               them, by rule (2.1).
%   sn_vec      bounds on the operator norms of the layers' linear maps: equal gains r with
%               r^n = (sqrt(1-4*delta*nu)-1)/(2*delta), lowered by about 1e-8 relative.
%   kc          as published, the slopes [a b] of the network's cone, a*|dx| .. b*|dx|; here
%               rounded outwards. b bounds the gain.
%   p_vec       (ours) weights of the scaled cascade; cascade_matrix(nu, delta, nu_vec,
%               delta_vec, p_vec) shows the matrix whose smallest eigenvalue is the proof.
%
%   Differences from the published script: see README.md beside this file. In short: no YALMIP and
%   no MOSEK; a unique answer (there, only the sums delta_l + nu_(l+1) were determined, and the
%   trace that was minimised has no bounded solution); and spectral bounds that imply the indices
%   (there, D/(m*D+delta+1/2) did not: (delta, nu) = (.525, -.476) gave 1.454, and W = -1.454*I
%   breaks the claim).
%
%   Errors: tf_lyapunov:infeasible, with the reason and the nearest claims that are feasible, and
%   tf_lyapunov:input for arguments that make no sense.
%
%   Example: [nu_vec delta_vec sn_vec kc] = get_indexes(-2, 0.4, [.1 .1 1], [1 1 1])
%
%   See also CASCADE_MATRIX, SPECTRAL_BOUND, LAYER_LMI, SAVE_DESIGN.

    if nargin ~= 4
        error('tf_lyapunov:input', ...
              'Usage: [nu_vec delta_vec sn_vec kc] = get_indexes(nu, delta, k1, k2)');
    end
    check_claim(nu, delta);
    nu = double(nu);
    delta = double(delta);
    [k1, k2] = check_sectors(k1, k2);
    kc = cone_slopes(nu, delta);
    if nu >= 0
        nearest = nearest_claims(nu, delta);
        error('tf_lyapunov:infeasible', ...
              ['Spectral bounds alone prove no claim with nu >= 0: W = -t*I is within every ' ...
               'bound and breaks it. Received: nu = %g, delta = %g. Nearest feasible claims ' ...
               '(nu, delta): (%.17g, %.17g) and (%.17g, %.17g). Square layers with increasing ' ...
               'activations can use the conic rule: tf_lyapunov.spectral_design in Python.'], ...
              nu, delta, nearest(1, 1), nearest(1, 2), nearest(2, 1), nearest(2, 2));
    end
    n = numel(k1);
    magnitude = max(abs(k1), abs(k2));
    % -a without the cancellation of sqrt(1-4*delta*nu) - 1.
    allowed = -2 * nu / (1 + sqrt(1 - 4 * delta * nu));
    level = log(allowed) / n;
    verified_before = false;
    % Smallest reserve first. The accepted one is doubled, so that measured norms a few roundings
    % above the bounds still verify.
    for reserve = 2 .^ (-45:-4)
        sn_vec = exp(level + log1p(-reserve) / n) ./ magnitude;
        gains = sn_vec .* magnitude * (1 + 2 * eps);
        [nu_vec, delta_vec, p_vec] = gain_cascade(nu, delta, gains);
        verified = isfinite(sum([nu_vec, delta_vec, p_vec])) && all(p_vec > 0) ...
            && all(gain_rule_holds(gains, delta_vec, nu_vec));
        if verified
            [~, M, bound] = cascade_matrix(nu, delta, nu_vec, delta_vec, p_vec);
            verified = strcmp(is_psd(M, bound), 'PROVED');
        end
        if verified && verified_before
            return
        end
        verified_before = verified;
    end
    error('tf_lyapunov:infeasible', ...
          ['The claim is too close to nu = 0 (or too large) to be verified in double precision. ' ...
           'Received: nu = %g, delta = %g, %d layers. Nearest feasible claim (nu, delta): ' ...
           '(%.17g, %.17g).'], nu, delta, n, -2^-6 / delta, delta);
end

function kc = cone_slopes(nu, delta)
% a and b = (1 -+ sqrt(1-4*delta*nu))/(2*delta), rounded outwards.
    root = sqrt(max(1 - 4 * delta * nu, 0));
    kc = [2 * nu / (1 + root), (1 + root) / (2 * delta)];
    % 1 - 4*delta*nu cancels for nu > 0: its error is at most 4u, and sqrt shares it out.
    spread = 8 * eps + 2 * eps / max(root, sqrt(eps));
    kc = kc + spread * [-1, 1] .* abs(kc);
end

function claims = nearest_claims(nu, delta)
% The same delta with a slightly negative nu, and the same gain b with the lower slope -b/2.
    b = (1 + sqrt(max(1 - 4 * delta * nu, 0))) / (2 * delta);
    a = -b / 2;
    claims = [-2^-6 / delta, delta; a * b / (a + b), 1 / (a + b)];
end
