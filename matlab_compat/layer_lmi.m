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
%                 with the field delta alone: the largest nu is searched with Lambda;
%                 or with fields Q (outputs, outputs), S (outputs, inputs), R (inputs, inputs).
%   Lambda        non-negative scalar, vector (one per output) or diagonal matrix. If it is left
%                 out it is searched: first Lambda = lambda*I (a concave problem in one number),
%                 then, if that proves nothing, one multiplier per output by a barrier method,
%                 such that the smallest eigenvalue is largest once x and y are scaled to like
%                 sizes. Each step of it costs about (2*outputs + inputs)^3 operations; beyond a
%                 sum of 600 (minutes) only lambda*I is tried for a given nu or Q, S, R.
%
%   M             the matrix (full, symmetric).
%   lambda_min    its smallest eigenvalue.
%   feasible      true only if M >= 0 is proved, with all rounding accounted for. False means "not
%                 proved for this Lambda"; the layer may still be dissipative.
%   Lambda        the diagonal used, as a column.
%   info.verdict  'PROVED', 'REFUTED' (M has a negative eigenvalue) or 'UNDECIDED' (M is singular
%                 up to rounding). info.margin and info.bound: smallest eigenvalue of M after
%                 scaling to a unit diagonal and a bound on its error, on which the verdict rests.
%   info.nu       the nu of M (NaN for general Q, S, R): the largest that was proved if it was
%                 searched, optimal to about 1e-7 relative (1e-5 where alpha == beta: there no
%                 finite multiplier is optimal).
%
%   Examples: [~, ~, feasible] = layer_lmi(0.3*eye(4), .1, 1, struct('delta', .525, 'nu', -.476))
%             [~, ~, ~, Lambda, info] = layer_lmi(randn(4), .1, 1, struct('delta', .5)); info.nu
%
%   Reference: Aquino et al., Theorem 1, as published.

    if nargin < 4 || nargin > 5
        error('tf_lyapunov:input', ...
              'Usage: [M, lambda_min, feasible] = layer_lmi(W, alpha, beta, supply, Lambda)');
    end
    searched = nargin < 5;
    asks_for_nu = isstruct(supply) && isscalar(supply) && isfield(supply, 'delta') ...
        && ~any(isfield(supply, {'nu', 'Q', 'S', 'R'}));
    if asks_for_nu
        if ~searched
            error('tf_lyapunov:input', 'supply.nu must be given where Lambda is given.');
        end
        supply.nu = 0;
    end
    [W, matrices] = checked(W, alpha, beta, supply);
    info = struct('verdict', '', 'margin', NaN, 'bound', NaN, 'searched', searched, 'nu', NaN);
    if isfield(supply, 'nu')
        info.nu = double(supply.nu);
    end
    if ~searched
        Lambda = diagonal_of(Lambda, size(W, 1));
    elseif ~asks_for_nu
        Lambda = any_multiplier(W, alpha, beta, matrices);
    end
    if asks_for_nu
        [info.nu, Lambda] = largest_nu(W, alpha, beta, matrices, double(supply.delta));
        matrices.R = -info.nu * eye(size(W, 2));
    end
    [M, entry_bound] = theorem_1_matrix(W, alpha, beta, matrices, Lambda);
    lambda_min = smallest_eigenvalue(M);
    [info.verdict, info.margin, info.bound] = is_psd(M, entry_bound);
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
        error('tf_lyapunov:input', 'supply must be a struct with fields delta (and nu), or Q, S, R.');
    end
    if all(isfield(supply, {'delta', 'nu'}))
        if ~isscalar(supply.delta) || ~isscalar(supply.nu) ...
                || ~isreal([supply.delta, supply.nu]) || ~all(isfinite([supply.delta, supply.nu]))
            error('tf_lyapunov:input', 'supply.delta and supply.nu must be finite real scalars.');
        end
        supply = struct('Q', -double(supply.delta) * eye(outputs), ...
                        'S', eye(outputs, inputs) / 2, 'R', -double(supply.nu) * eye(inputs));
    elseif ~all(isfield(supply, {'Q', 'S', 'R'}))
        error('tf_lyapunov:input', 'supply must have the fields delta (and nu), or Q, S and R.');
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

function [nu, lambda] = largest_nu(W, alpha, beta, supply, delta)
% Largest nu for which some diagonal Lambda proves the layer, and that Lambda.
    [outputs, inputs] = size(W);
    gain = max(abs(alpha), abs(beta)) * norm(W);
    is_linear = alpha == beta || gain == 0;
    unit = 1;
    if gain > 0
        unit = 2 ^ round(log2(gain));
    end
    % In units of the output in which the gain is about one; powers of two are exact.
    W = W / unit;
    delta = delta * unit;
    gain = max(gain / unit, 0.5);
    supply.Q = -delta * eye(outputs);
    constant = [supply.Q, supply.S; supply.S', zeros(inputs)];
    direction = blkdiag(zeros(outputs), eye(inputs));
    lambda = max(2 * delta, 0) + 1 / gain;
    start = struct('t', 0.1 * gain - 1.1 * schur_nu(W, alpha, beta, supply, delta, lambda), ...
                   'lambda', repmat(lambda, outputs, 1));
    if ~is_linear
        points = best_multipliers(W, alpha, beta, constant, direction, start, 1e-2 * gain);
    else
        % y = m*W*x exactly: larger multipliers are better until rounding takes over.
        points = struct('t', {}, 'lambda', {});
        for lambda = (max(delta, 0) + 1 / gain) * 4 .^ (0:26)
            t = -schur_nu(W, alpha, beta, supply, delta, lambda) + 64 * eps * lambda * gain^2;
            points(end + 1) = struct('t', t, 'lambda', repmat(lambda, outputs, 1)); %#ok<AGROW>
        end
        [~, order] = sort([points.t], 'descend');
        points = points(order);
    end
    [nu, lambda] = proved_nu(W, alpha, beta, supply, delta, [start, points]);
    nu = nu * unit;
    lambda = lambda / unit;
end

function nu = schur_nu(W, alpha, beta, supply, delta, lambda)
% Largest nu for Lambda = lambda*I, lambda > delta, by the Schur complement; not a proof.
    corner = supply.S - (alpha + beta) / 2 * lambda * W;
    form = alpha * beta * lambda * (W' * W) - corner' * corner / (lambda - delta);
    nu = min(eig((form + form') / 2));
end

function [nu, lambda] = proved_nu(W, alpha, beta, supply, delta, points)
% The largest nu = -t that is_psd proves on the way from the last point back to earlier ones.
    inputs = size(W, 2);
    best = points(end);
    nu = -realmax;
    lambda = best.lambda;
    for anchor = points([end - 1:-1:max(end - 3, 2), 1])
        for share = [0, 10 .^ (-13:0.5:0)]
            t = (1 - share) * best.t + share * anchor.t;
            if delta > 0  % beyond it the cone is empty, so that only rounding leads there
                t = max(t, -(1 - eps) / (4 * delta));
            end
            if -t <= nu
                break
            end
            mixed = (1 - share) * best.lambda + share * anchor.lambda;
            supply.R = -(-t) * eye(inputs);
            [M, bound] = theorem_1_matrix(W, alpha, beta, supply, mixed);
            if strcmp(is_psd(M, bound), 'PROVED')
                nu = -t;
                lambda = mixed;
                break
            end
        end
        if nu >= -best.t - 1e-7 * abs(best.t)
            return
        end
    end
end

function lambda = any_multiplier(W, alpha, beta, supply)
% A Lambda that proves the supply rate: lambda*I if it does, else one multiplier per output.
    outputs = size(W, 1);
    [V, scaled, unit, sizes] = like_sizes(W, alpha, beta, supply);
    if sizes == 0
        lambda = zeros(outputs, 1);
        return
    end
    back = sizes / unit^2;
    lambda = repmat(back * best_scalar(V, alpha, beta, scaled), outputs, 1);
    [M, bound] = theorem_1_matrix(W, alpha, beta, supply, lambda);
    if alpha == beta || outputs == 1 || 2 * outputs + size(W, 2) > 600 ...
            || strcmp(is_psd(M, bound), 'PROVED')
        return
    end
    constant = theorem_1_matrix(V, alpha, beta, scaled, zeros(outputs, 1));
    start = struct('t', 0, 'lambda', ones(outputs, 1));
    start.t = 2 * norm(theorem_1_matrix(V, alpha, beta, scaled, start.lambda));
    points = best_multipliers(V, alpha, beta, constant, eye(size(constant)), start, 1e-2 * start.t);
    for point = points(end:-1:1)
        candidate = back * point.lambda;
        [M, bound] = theorem_1_matrix(W, alpha, beta, supply, candidate);
        if strcmp(is_psd(M, bound), 'PROVED')
            lambda = candidate;
            return
        end
    end
    if ~isempty(points)
        lambda = back * points(end).lambda;
    end
end

function [V, scaled, unit, sizes] = like_sizes(W, alpha, beta, supply)
% Signals in units in which output and input have like sizes; sizes is 0 if that is impossible.
    gain = max(abs(alpha), abs(beta)) * norm(W);
    if gain == 0
        gain = 1;
    end
    unit = 2 ^ round(log2(gain));
    V = W / unit;
    scaled = struct('Q', supply.Q * unit^2, 'S', supply.S * unit, 'R', supply.R);
    sizes = max([max(abs(scaled.Q(:))), max(abs(scaled.S(:))), max(abs(scaled.R(:)))]);
    if ~isfinite(sizes)
        sizes = 0;
    end
    for name = {'Q', 'S', 'R'}
        scaled.(name{1}) = scaled.(name{1}) / max(sizes, realmin);
    end
end

function lambda = best_scalar(V, alpha, beta, scaled)
% Maximise the smallest eigenvalue of M over Lambda = lambda*I: concave, so its supergradient's
% sign is bisected.
    [outputs, inputs] = size(V);
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
    lambda = candidates(k);
end

function answer = rising(constant, direction, lambda)
    [~, ~, vector] = smallest_eigenvalue(constant + lambda * direction);
    answer = vector' * direction * vector > 0;
end
