function points = best_multipliers(W, alpha, beta, constant, direction, start, scale)
%BEST_MULTIPLIERS  Candidates for  minimise t  s.t.  constant + t*direction + L(lambda) >= 0.
%
%   L(lambda) = [D, -m*D*W; -m*W'*D, p*W'*D*W] with D = diag(lambda) >= 0 and alpha < beta.
%   Newton's method along the central path of the logarithmic barrier; every multiplier's matrix
%   has rank two, so that a step costs one inverse and a few products. Twin of
%   tf_lyapunov.bounds.programs.interior.minimise. Nothing here is a proof: is_psd decides.
%
%   start    struct with t and lambda (column, positive): strictly feasible.
%   scale    size of t below which accuracy is absolute.
%   points   struct array (t, lambda), one per barrier parameter, the best last; empty if the
%            start is not strictly feasible in floating point.

    points = struct('t', {}, 'lambda', {});
    [outputs, inputs] = size(W);
    % A small cost keeps multipliers finite that could grow for ever: those of zero rows of W.
    % The matrix of multiplier i is [e_i, w_i]*core*[e_i, w_i]'.
    problem = struct('constant', constant, 'direction', direction, 'W', W, ...
                     'core', [1, -(alpha + beta) / 2; -(alpha + beta) / 2, alpha * beta], ...
                     'cost', 1e-12 * abs(start.t) / mean(start.lambda(:)), ...
                     'E', eye(outputs + inputs, outputs), 'V', [zeros(outputs); W']);
    t = start.t;
    lambda = start.lambda(:);
    if ~isfinite(barrier(problem, 0, t, lambda))
        return
    end
    gap = max(abs(t), scale);
    for level = 1:40
        sharpness = (2 * outputs + inputs) / gap;
        [t, lambda, stuck] = centred(problem, sharpness, t, lambda);
        points(end + 1) = struct('t', t, 'lambda', lambda); %#ok<AGROW>
        if stuck || gap <= 1e-8 * max(abs(t), scale)
            return
        end
        gap = gap / 10;
    end
end

function [t, lambda, stuck] = centred(problem, sharpness, t, lambda)
% Newton steps at one barrier parameter.
    stuck = false;
    [value, factor] = barrier(problem, sharpness, t, lambda);
    for k = 1:60
        [gradient, hessian] = derivatives(problem, factor, sharpness, lambda);
        unit = 1 ./ sqrt(max(diag(hessian), realmin));
        scaled = bsxfun(@times, unit, bsxfun(@times, hessian, unit'));
        [R, failed] = chol((scaled + scaled') / 2);
        if failed
            stuck = true;
            return
        end
        step = -unit .* (R \ (R' \ (unit .* gradient)));
        decrement = -gradient' * step;
        if ~isfinite(decrement) || decrement <= 1e-10
            return
        end
        moves = step(2:end);
        shrinking = moves < 0;
        reach = min([1; 0.99 * min(-lambda(shrinking) ./ moves(shrinking))]);
        while true
            [trial, trial_factor] = barrier(problem, sharpness, t + reach * step(1), ...
                                            lambda + reach * moves);
            if trial <= value - 0.05 * reach * decrement
                break
            end
            reach = reach / 2;
            if reach <= 1e-10
                stuck = true;
                return
            end
        end
        t = t + reach * step(1);
        lambda = lambda + reach * moves;
        value = trial;
        factor = trial_factor;
        if decrement < 0.1
            return
        end
    end
end

function [value, factor] = barrier(problem, sharpness, t, lambda)
    value = Inf;
    factor = [];
    scaled = bsxfun(@times, lambda, problem.W);
    corner = problem.core(1, 2) * scaled;
    M = problem.constant + t * problem.direction ...
        + [diag(lambda), corner; corner', problem.core(2, 2) * (problem.W' * scaled)];
    if any(lambda <= 0) || ~all(isfinite(M(:)))
        return
    end
    [factor, failed] = chol((M + M') / 2);
    if ~failed
        value = sharpness * (t + problem.cost * sum(lambda)) ...
            - 2 * sum(log(diag(factor))) - sum(log(lambda));
    end
end

function [gradient, hessian] = derivatives(problem, factor, sharpness, lambda)
    half = factor' \ [problem.E, problem.V];
    n = numel(lambda);
    A = half(:, 1:n)' * half(:, 1:n);
    B = half(:, 1:n)' * half(:, n + 1:end);
    D = half(:, n + 1:end)' * half(:, n + 1:end);
    c = problem.core;
    a = c(1, 1) * A + c(1, 2) * B';
    b = c(1, 1) * B + c(1, 2) * D;
    d = c(2, 1) * B + c(2, 2) * D;
    g = c(2, 1) * A + c(2, 2) * B';
    units = a .* a' + b .* g' + g .* b' + d .* d' + diag(1 ./ lambda .^ 2);
    inverse = factor \ (factor' \ eye(size(factor)));
    through = inverse * problem.direction;
    Q = through * inverse;
    QV = Q * problem.V;
    edge = c(1, 1) * diag(Q(1:n, 1:n)) + 2 * c(1, 2) * diag(QV(1:n, :)) ...
        + c(2, 2) * sum(problem.V .* QV, 1)';
    hessian = [sum(sum(through .* through')), edge'; edge, units];
    gradient = [sharpness - trace(through); ...
                sharpness * problem.cost - 1 ./ lambda ...
                - (c(1, 1) * diag(A) + 2 * c(1, 2) * diag(B) + c(2, 2) * diag(D))];
end
