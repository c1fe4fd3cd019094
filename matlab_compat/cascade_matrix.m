function [A, M, bound] = cascade_matrix(nu, delta, nu_vec, delta_vec, p_vec)
%CASCADE_MATRIX  The papers' matrix A, and the sharper, scaled one M(p).
%
%   A = cascade_matrix(nu, delta, nu_vec, delta_vec)
%   [A, M, bound] = cascade_matrix(nu, delta, nu_vec, delta_vec, p_vec)
%
%   Layers l = 1..n with indices (delta_l, nu_l) make a network with (delta, nu) if
%
%       A <= 0 (as published),   or   M(p) >= 0 for some weights p > 0;   M(1) = -A.
%
%       A(1,1) = nu - nu_1,      A(l+1,l+1) = -delta_l - nu_(l+1),     A(n+1,n+1) = delta - delta_n,
%       A(l,l+1) = 1/2,          A(1,n+1) = A(1,n+1) - 1/2;
%       M(1,1) = p_1*nu_1 - nu,  M(l+1,l+1) = p_l*delta_l + p_(l+1)*nu_(l+1),
%       M(n+1,n+1) = p_n*delta_n - delta,  M(l,l+1) = -p_l/2,  M(1,n+1) = M(1,n+1) + 1/2.
%
%   Both symmetric, of order n+1. The paper prints -nu_2+delta_1 inside A: a sign error, for which
%   no supply rate would be used at all.
%
%   nu, delta           of the network (scalars).
%   nu_vec, delta_vec   of the layers, from the input on.
%   p_vec               positive weights; ones if left out.
%   bound               bounds on the rounding errors of M, entry by entry.
%
%   Example: A = cascade_matrix(0, 1, [.1 .1], [1 2])    % A(2,2) is -1.1
%
%   Reference: Aquino et al., Theorem 3; M(p) is the sound form (2.3) of this library.

    if nargin < 4 || nargin > 5
        error('tf_lyapunov:input', ...
              'Usage: [A, M, bound] = cascade_matrix(nu, delta, nu_vec, delta_vec, p_vec)');
    end
    nu_vec = double(nu_vec(:)');
    delta_vec = double(delta_vec(:)');
    n = numel(nu_vec);
    if nargin < 5
        p_vec = ones(1, n);
    end
    p_vec = double(p_vec(:)');
    if n == 0 || numel(delta_vec) ~= n || numel(p_vec) ~= n || numel(nu) ~= 1 || numel(delta) ~= 1
        error('tf_lyapunov:input', ...
              ['nu and delta must be scalars, and nu_vec, delta_vec and p_vec must have one entry ' ...
               'per layer. Received: %d, %d, %d, %d and %d entries.'], ...
              numel(nu), numel(delta), n, numel(delta_vec), numel(p_vec));
    end
    if ~all(isfinite([nu, delta, nu_vec, delta_vec, p_vec])) || any(p_vec <= 0)
        error('tf_lyapunov:input', 'All indices must be finite, and p_vec positive and finite.');
    end
    A = -weighted_cascade(double(nu), double(delta), nu_vec, delta_vec, ones(1, n));
    [M, bound] = weighted_cascade(double(nu), double(delta), nu_vec, delta_vec, p_vec);
end

function [M, bound] = weighted_cascade(nu, delta, nu_vec, delta_vec, p)
    n = numel(p);
    % Row 1 is the network's input, row l+1 the output of layer l; the claim has weight -1.
    [d, e] = weighted_sum([1, p], [-nu, delta_vec], [p, 1], [nu_vec, -delta]);
    M = diag(d) - diag(p / 2, 1) - diag(p / 2, -1);
    bound = diag(e);
    M(1, n + 1) = M(1, n + 1) + 0.5;
    M(n + 1, 1) = M(1, n + 1);
    if n == 1
        % Only here does the corner take part in a sum.
        bound(1, 2) = eps * abs(M(1, 2));
        bound(2, 1) = bound(1, 2);
    end
end
