function [verdict, value, bound] = is_psd(M, entry_bound)
%IS_PSD  Decide M >= 0 by eigenvalue, with every rounding error accounted for.
%
%   [verdict, value, bound] = is_psd(M, entry_bound)
%
%   entry_bound: matrix of bounds on |M - the matrix that is meant|, entry by entry.
%   verdict: 'PROVED', 'REFUTED' or 'UNDECIDED' (too close to singular to call).
%   value, bound: smallest eigenvalue of the congruent matrix with a diagonal of about one
%   (scaled by powers of two, hence exactly), and a bound on its distance to the true one.

    d = diag(M);
    exponents = zeros(size(d));
    exponents(d > 0) = -round(log2(d(d > 0)) / 2);
    powers = bsxfun(@plus, exponents, exponents');
    [value, bound] = smallest_eigenvalue(pow2(full(M), powers));
    bound = bound + 1.001 * norm(pow2(full(entry_bound), powers), 'fro');
    verdict = 'UNDECIDED';
    if value - bound >= 0
        verdict = 'PROVED';
    elseif value + bound < 0
        verdict = 'REFUTED';
    end
end
