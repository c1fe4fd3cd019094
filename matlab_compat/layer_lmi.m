function [M, lambda_min, feasible, Lambda, info] = layer_lmi(W, alpha, beta, supply, Lambda)
%LAYER_LMI  Theorem 1: is the layer y = phi(W*x + b) incrementally (Q,S,R)-dissipative?
%
%   [M, lambda_min, feasible, Lambda, info] = layer_lmi(W, alpha, beta, supply)
%   [M, lambda_min, feasible, Lambda, info] = layer_lmi(W, alpha, beta, supply, Lambda)
%
%   With m = (alpha+beta)/2 and p = alpha*beta it is if, for some diagonal Lambda >= 0,
%
%       M = [Q  S; S' R] + [Lambda, -m*Lambda*W; -m*W'*Lambda, p*W'*Lambda*W]  >=  0.
%
%   Sufficient. Rows of M: the output y, then the input x.
%
%   W             real matrix (outputs, inputs), full or sparse. For a convolution: layer_matrix.
%   alpha, beta   smallest and largest slope of phi (scalars).
%   supply        struct with fields delta and nu: Q = -delta*I, S = I/2 (rectangular), R = -nu*I;
%                 or with fields Q (outputs, outputs), S (outputs, inputs), R (inputs, inputs).
%   Lambda        non-negative scalar, vector (one per output) or diagonal matrix. If it is left
%                 out, Lambda = lambda*I is searched that makes the smallest eigenvalue largest
%                 once x and y are scaled to like sizes (a concave problem in one number).
%
%   M             the matrix (full, symmetric).
%   lambda_min    its smallest eigenvalue.
%   feasible      true only if M >= 0 is proved, with all rounding accounted for. False means "not
%                 proved for this Lambda"; the layer may still be dissipative.
%   Lambda        the diagonal used, as a column.
%   info.verdict  'PROVED', 'REFUTED' (M has a negative eigenvalue) or 'UNDECIDED' (M is singular
%                 up to rounding). info.margin and info.bound: smallest eigenvalue of M after
%                 scaling to a unit diagonal and a bound on its error, on which the verdict rests.
%
%   Example: [~, ~, feasible] = layer_lmi(0.3*eye(4), .1, 1, struct('delta', .525, 'nu', -.476))
%
%   Reference: Aquino et al., Theorem 1, as published.

    if nargin < 4 || nargin > 5
        error('tf_lyapunov:input', ...
              'Usage: [M, lambda_min, feasible] = layer_lmi(W, alpha, beta, supply, Lambda)');
    end
    [W, supply] = checked(W, alpha, beta, supply);
    searched = nargin < 5;
    if searched
        Lambda = best_multiplier(W, alpha, beta, supply);
    end
    Lambda = diagonal_of(Lambda, size(W, 1));
    [M, entry_bound] = theorem_1_matrix(W, alpha, beta, supply, Lambda);
    lambda_min = smallest_eigenvalue(M);
    [info.verdict, info.margin, info.bound] = is_psd(M, entry_bound);
    info.searched = searched;
    feasible = strcmp(info.verdict, 'PROVED');
end

function [W, supply] = checked(W, alpha, beta, supply)
    if ~isnumeric(W) || ~isreal(W) || isempty(W) || ndims(W) > 2 || ~all(isfinite(W(:)))
        error('tf_lyapunov:input', 'W must be a finite real matrix (outputs, inputs).');
    end
    W = double(full(W));
    if ~isscalar(alpha) || ~isscalar(beta) || ~isfinite(alpha) || ~isfinite(beta) || alpha > beta
        error('tf_lyapunov:input', ...
              'alpha and beta must be finite scalars, alpha <= beta. Received: %s and %s.', ...
              mat2str(alpha), mat2str(beta));
    end
    [outputs, inputs] = size(W);
    if ~isstruct(supply) || ~isscalar(supply)
        error('tf_lyapunov:input', 'supply must be a struct with fields delta, nu or Q, S, R.');
    end
    if all(isfield(supply, {'delta', 'nu'}))
        if ~isscalar(supply.delta) || ~isscalar(supply.nu)
            error('tf_lyapunov:input', 'supply.delta and supply.nu must be scalars.');
        end
        supply = struct('Q', -double(supply.delta) * eye(outputs), ...
                        'S', eye(outputs, inputs) / 2, 'R', -double(supply.nu) * eye(inputs));
    elseif ~all(isfield(supply, {'Q', 'S', 'R'}))
        error('tf_lyapunov:input', 'supply must have the fields delta and nu, or Q, S and R.');
    end
    expected = struct('Q', [outputs, outputs], 'S', [outputs, inputs], 'R', [inputs, inputs]);
    for name = {'Q', 'S', 'R'}
        X = supply.(name{1});
        if ~isnumeric(X) || ~isreal(X) || ~isequal(size(X), expected.(name{1})) ...
                || ~all(isfinite(X(:)))
            error('tf_lyapunov:input', ...
                  'supply.%s must be a finite real matrix of size %s. Received: size %s.', ...
                  name{1}, mat2str(expected.(name{1})), mat2str(size(X)));
        end
        supply.(name{1}) = double(full(X));
    end
    if ~isequal(supply.Q, supply.Q') || ~isequal(supply.R, supply.R')
        error('tf_lyapunov:input', 'supply.Q and supply.R must be symmetric.');
    end
end

function lambda = diagonal_of(Lambda, n)
    if ~isnumeric(Lambda) || ~isreal(Lambda)
        error('tf_lyapunov:input', 'Lambda must be real numbers.');
    end
    lambda = full(double(Lambda));
    if isscalar(lambda)
        lambda = repmat(lambda, n, 1);
    elseif isequal(size(lambda), [n, n])
        if ~isequal(lambda, diag(diag(lambda)))
            error('tf_lyapunov:input', 'Lambda must be diagonal.');
        end
        lambda = diag(lambda);
    end
    lambda = lambda(:);
    if numel(lambda) ~= n || any(lambda < 0) || ~all(isfinite(lambda))
        error('tf_lyapunov:input', ...
              ['Lambda must be finite and non-negative: one number, one per output (%d), or a ' ...
               'diagonal matrix.'], n);
    end
end

function [M, bound] = theorem_1_matrix(W, alpha, beta, supply, lambda)
% The matrix, and bounds on the rounding of its entries.
    m = (alpha + beta) / 2;
    p = alpha * beta;
    scaled = bsxfun(@times, lambda, W);
    top = supply.Q + diag(lambda);
    corner = supply.S - m * scaled;
    bottom = supply.R + p * (W' * scaled);
    bottom = (bottom + bottom') / 2;
    M = [top, corner; corner', bottom];
    terms = size(W, 1) + 6;
    gram = abs(p) * (abs(W)' * abs(scaled));
    errors = [abs(supply.Q) + diag(lambda), 4 * (abs(supply.S) + abs(m) * abs(scaled)); ...
              zeros(size(corner')), terms * (abs(supply.R) + (gram + gram') / 2)];
    corner_errors = errors(1:size(W, 1), size(W, 1) + 1:end);
    errors(size(W, 1) + 1:end, 1:size(W, 1)) = corner_errors';
    % One eps (two roundoffs) per operation covers the second-order terms; realmin, underflow.
    bound = eps * errors + terms * realmin;
end

function lambda = best_multiplier(W, alpha, beta, supply)
% Maximise the smallest eigenvalue of M over Lambda = lambda*I: concave, so its supergradient's
% sign is bisected. Signals are scaled first, so that output and input have like sizes.
    [outputs, inputs] = size(W);
    gain = max(abs(alpha), abs(beta)) * norm(W);
    if gain == 0
        gain = 1;
    end
    unit = 2 ^ round(log2(gain));
    V = W / unit;
    scaled = struct('Q', supply.Q * unit^2, 'S', supply.S * unit, 'R', supply.R);
    sizes = max([max(abs(scaled.Q(:))), max(abs(scaled.S(:))), max(abs(scaled.R(:)))]);
    if sizes == 0 || ~isfinite(sizes)
        lambda = 0;
        return
    end
    for name = {'Q', 'S', 'R'}
        scaled.(name{1}) = scaled.(name{1}) / sizes;
    end
    ones_vector = ones(outputs, 1);
    constant = theorem_1_matrix(V, alpha, beta, scaled, 0 * ones_vector);
    none = struct('Q', zeros(outputs), 'S', zeros(outputs, inputs), 'R', zeros(inputs));
    direction = theorem_1_matrix(V, alpha, beta, none, ones_vector);
    low = 0;
    high = 1;
    while rising(constant, direction, high) && high < 2^40
        low = high;
        high = 4 * high;
    end
    for k = 1:60
        middle = (low + high) / 2;
        if rising(constant, direction, middle)
            low = middle;
        else
            high = middle;
        end
        if high - low <= 2 * eps * high
            break
        end
    end
    % At a kink either end may be the better one.
    candidates = [0, low, high];
    if alpha == beta
        % y = m*W*x exactly: larger is better until rounding takes over.
        candidates = [0, high ./ 4 .^ (0:20)];
    end
    values = zeros(size(candidates));
    for k = 1:numel(candidates)
        [value, bound] = smallest_eigenvalue(constant + candidates(k) * direction);
        values(k) = value - 4 * bound;
    end
    [~, k] = max(values);
    lambda = candidates(k) * sizes / unit^2;
end

function answer = rising(constant, direction, lambda)
    [~, ~, vector] = smallest_eigenvalue(constant + lambda * direction);
    answer = vector' * direction * vector > 0;
end
