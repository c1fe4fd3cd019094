function [value, bound, vector] = smallest_eigenvalue(M)
%SMALLEST_EIGENVALUE  Smallest eigenvalue of a symmetric matrix and a bound on its error.
%
%   [value, bound, vector] = smallest_eigenvalue(M)
%
%   The computed eigenpairs are checked afterwards: with M*V ~ V*D, E = M*V - V*D and
%   F = V'*V - I, every eigenvalue is within norm(E) + (norm(M) + norm(D))*norm(F) of the
%   computed one, whatever LAPACK did. Twin of tf_lyapunov.theory.spectra.smallest_eigenvalue.

    if ~isequal(M, M')
        error('tf_lyapunov:input', 'The matrix must be symmetric and hold no NaN.');
    end
    if ~all(isfinite(M(:)))
        error('tf_lyapunov:input', 'The matrix must be finite.');
    end
    n = size(M, 1);
    scale = max(abs(M(:)));
    if scale == 0
        value = 0;
        bound = 0;
        vector = eye(n, 1);
        return
    end
    % A power of two: exact, and keeps the squares below from over- and underflowing.
    power = 1;
    if scale > 1e-300 && scale < 1e300
        power = 2 ^ floor(log2(scale));
    end
    A = full(M) / power;
    [V, D] = eig(A);
    [value, k] = min(diag(D));
    vector = V(:, k);
    u = eps / 2;
    gamma = (n + 4) * u / (1 - (n + 4) * u);
    % norm(A, 'fro') is at least norm(A, 2); the eigenvalues are not above it by much.
    magnitude = norm(A, 'fro') + max(abs(diag(D)));
    residual = norm(A * V - V * D, 'fro') + gamma * sqrt(n) * 2 * magnitude;
    overlap = norm(V' * V - eye(n), 'fro') + gamma * 2 * n;
    % The factor covers the rounding of this line and of the Frobenius norms.
    bound = (residual + magnitude * overlap) * (1 + 2 * n^2 * u + 2^-20);
    value = value * power;
    bound = bound * power + n * realmin;
end
