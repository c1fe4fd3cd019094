function [sn, sn_script, sn_theorem_4] = spectral_bound(nu_vec, delta_vec, k1, k2)
%SPECTRAL_BOUND  Largest norm(W_l) that makes layer l satisfy given indices (delta_l, nu_l).
%
%   sn = spectral_bound(nu_vec, delta_vec, k1, k2)
%   [sn, sn_script, sn_theorem_4] = spectral_bound(nu_vec, delta_vec, k1, k2)
%
%   sn             sound, rule (2.1), rounded down:
%                  (sqrt(1-4*delta*nu) - 1)/(2*delta*max(|k1|,|k2|)),  delta > 0 > nu.
%                  Necessary and sufficient when only the norm is known: W = -t*I with t
%                  beyond it breaks the supply rate of a layer that can be linear at k2.
%   sn_script      the released get_indexes.m, D/(m*D+|delta|+1/2). UNSOUND; for comparison only.
%   sn_theorem_4   Theorem 4 of the paper with s = 0 (nothing known of the smallest singular
%                  value): (1 - (delta+1/2)/(delta-nu))/m. Sound where its assumptions hold
%                  (delta > 0, delta > nu, 0 <= k1, m > 0), NaN elsewhere; conservative, and
%                  no weight is allowed where it is negative.
%
%   nu_vec, delta_vec, k1, k2   one entry per layer (scalars are repeated).
%
%   Example: spectral_bound(-.476, .525, .1, 1)    % .394, where the released script allows 1.454

    if nargin ~= 4
        error('tf_lyapunov:input', 'Usage: sn = spectral_bound(nu_vec, delta_vec, k1, k2)');
    end
    [k1, k2] = check_sectors(k1, k2);
    nu_vec = double(nu_vec(:)');
    delta_vec = double(delta_vec(:)');
    n = max([numel(nu_vec), numel(delta_vec), numel(k1)]);
    [nu_vec, delta_vec] = deal(expand(nu_vec, n), expand(delta_vec, n));
    [k1, k2] = deal(expand(k1, n), expand(k2, n));
    if any(~isfinite(nu_vec) | ~isfinite(delta_vec) | delta_vec <= 0 | nu_vec >= 0)
        error('tf_lyapunov:infeasible', ...
              ['A norm bound proves a layer''s indices only for delta > 0 > nu: W = -t*I breaks ' ...
               'nu >= 0 for every t > 0. Received: nu = %s, delta = %s.'], ...
              mat2str(nu_vec), mat2str(delta_vec));
    end
    magnitude = max(abs(k1), abs(k2));
    sn = -2 * nu_vec ./ (1 + sqrt(1 - 4 * delta_vec .* nu_vec)) ./ magnitude;
    % Seven roundings at most; then proved by the rule itself. The rule adds a reserve of its own,
    % and bounds next to overflow end at zero rather than at a wrong number.
    sn = sn * (1 - 16 * eps);
    proved = gain_rule_holds(sn .* magnitude * (1 + eps), delta_vec, nu_vec);
    sn(~proved) = 0;
    m = (k1 + k2) / 2;
    p = k1 .* k2;
    d = abs(delta_vec);
    v = abs(nu_vec);
    D = (1 ./ m) .* ((1 - p) .* (d .* v) ./ (d - v) - 0.5);
    sn_script = D ./ (m .* D + d + 0.5);
    sn_theorem_4 = (1 - (delta_vec + 0.5) ./ (delta_vec - nu_vec)) ./ m;
    sn_theorem_4(k1 < 0 | m <= 0) = NaN;
end

function x = expand(x, n)
    if numel(x) == 1
        x = repmat(x, 1, n);
    elseif numel(x) ~= n
        error('tf_lyapunov:input', ...
              'Give one entry per layer. Received: %d entries beside %d.', numel(x), n);
    end
end
