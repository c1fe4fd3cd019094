function report = check_memory(file)
%CHECK_MEMORY  Proves the exported inequalities of a system with memory again.
%
%   report = check_memory('memory.mat')
%
%   The file is written by tf_lyapunov.matlab.export_memory. For a recurrent layer with
%   x+ = step*z, v = neurons*z, y = output*z, z = [x; w; u], all slopes w_i/v_i in [alpha, beta],
%   V = x'*P*x, P >= 0 and multipliers l >= 0,
%
%       V(x+) - rate^2*V(x) <= y'*Q*y + 2*y'*S'*u + u'*(R + theta*I)*u
%
%   if the matrix M of tf_lyapunov.verification.dissipation is >= 0; without Q, S, R it is the one
%   of contraction, for equal inputs. Both are decided by eigenvalues with every rounding accounted
%   for (private/is_psd.m). With Q = -I, S = 0, R = 0, sqrt(theta) is a gain over sequences; gains
%   of a chain multiply, those of layers without memory are taken from the file. That the matrices
%   are those of the weights is checked by tf_lyapunov.verification.verify.
%
%   report.verdict  'PROVED' or 'NOT_PROVED'.
%   report.each     verdicts on the inequalities, a cell.
%   report.gain     of the chain, over sequences from equal initial states; Inf if not proved.
%
%   Reference: Revay, Wang and Manchester (2024).

    if nargin ~= 1 || ~ischar(file)
        error('tf_lyapunov:input', 'Usage: report = check_memory(''memory.mat'')');
    end
    content = load(file);
    if ~isfield(content, 'memory') || ~isstruct(content.memory) ...
            || ~all(isfield(content.memory, {'inequalities', 'other_gains'}))
        error('tf_lyapunov:input', '%s holds no system with memory of tf_lyapunov.', file);
    end
    parts = content.memory.inequalities;
    if ~iscell(parts)
        parts = {parts};
    end
    report.each = cell(1, numel(parts));
    report.verdict = 'PROVED';
    report.gain = prod(double(content.memory.other_gains(:)));
    for k = 1:numel(parts)
        part = numbers(parts{k});
        report.each{k} = inequality(part);
        if ~strcmp(report.each{k}, 'PROVED')
            report.verdict = 'NOT_PROVED';
        end
        if part.is_gain
            report.gain = report.gain * sqrt(part.theta) * (1 + 4 * eps);
        end
    end
    if strcmp(report.verdict, 'NOT_PROVED')
        report.gain = Inf;
    end
end

function part = numbers(part)
% The fields as real matrices of double, whose sizes fit.
    names = {'step', 'neurons', 'output', 'alpha', 'beta', 'P', 'multipliers', 'Q', 'S', 'R', ...
             'theta', 'rate', 'is_gain'};
    if ~isstruct(part) || ~all(isfield(part, names))
        error('tf_lyapunov:input', 'An inequality lacks one of its parts.');
    end
    for name = names
        X = part.(name{1});
        if ~(isnumeric(X) || islogical(X)) || ~isreal(X) || any(isnan(X(:)))
            error('tf_lyapunov:input', 'inequality.%s must hold real numbers.', name{1});
        end
        part.(name{1}) = full(double(X));
    end
    part.multipliers = part.multipliers(:);
    n = size(part.P, 1);
    total = size(part.step, 2);
    p = size(part.output, 1);
    q = numel(part.multipliers);
    m = total - n - q;
    part.neurons = reshape(part.neurons, q, total);
    fits = isequal(part.P, part.P') && size(part.step, 1) == n && m > 0 ...
        && size(part.output, 2) == total && part.rate > 0 && part.rate <= 1;
    if fits && ~isempty(part.Q)
        fits = isequal(size(part.Q), [p, p]) && isequal(size(part.S), [m, p]) ...
            && isequal(size(part.R), [m, m]) && isequal(part.Q, part.Q') ...
            && isequal(part.R, part.R');
    end
    if fits && part.is_gain
        fits = isequal(part.Q, -eye(p)) && ~any(part.S(:)) && ~any(part.R(:)) && part.rate == 1;
    end
    if ~fits
        error('tf_lyapunov:input', 'The parts of an inequality do not fit each other.');
    end
end

function verdict = inequality(r)
% 'PROVED' if M >= 0, P >= 0 and all multipliers are >= 0.
    n = size(r.P, 1);
    q = numel(r.multipliers);
    total = size(r.step, 2);
    verdict = 'NOT_PROVED';
    if any(r.multipliers < 0) || ~strcmp(is_psd(r.P, zeros(n)), 'PROVED')
        return
    end
    pick = eye(total);
    W = pick(n + 1:n + q, :);
    U = pick(n + q + 1:end, :);
    l = r.multipliers;
    both = (r.alpha + r.beta) * (W' * bsxfun(@times, l, r.neurons));
    square = 2 * r.alpha * r.beta * (r.neurons' * bsxfun(@times, l, r.neurons));
    M = -r.step' * r.P * r.step - both - both' + 2 * W' * diag(l) * W + square;
    M(1:n, 1:n) = M(1:n, 1:n) + r.rate^2 * r.P;
    side = abs(both);
    sizes = abs(r.step)' * abs(r.P) * abs(r.step) + side + side' + 2 * W' * diag(l) * W ...
        + 2 * abs(r.alpha * r.beta) * (abs(r.neurons)' * bsxfun(@times, l, abs(r.neurons)));
    sizes(1:n, 1:n) = sizes(1:n, 1:n) + r.rate^2 * abs(r.P);
    if isempty(r.Q)
        M = M(1:n + q, 1:n + q);
        sizes = sizes(1:n + q, 1:n + q);
    else
        cross = U' * r.S * r.output;
        reach = U' * abs(r.S) * abs(r.output);
        M = M + r.output' * r.Q * r.output + cross + cross' + U' * r.R * U + r.theta * (U' * U);
        sizes = sizes + abs(r.output)' * abs(r.Q) * abs(r.output) + reach + reach' ...
            + U' * abs(r.R) * U + abs(r.theta) * (U' * U);
    end
    M = (M + M') / 2;
    bound = eps * (2 * total + 2 * size(r.output, 1) + 32) * sizes + total * realmin;
    if strcmp(is_psd(M, bound), 'PROVED')
        verdict = 'PROVED';
    end
end
