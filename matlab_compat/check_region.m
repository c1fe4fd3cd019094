function report = check_region(file)
%CHECK_REGION  Proves an exported region of attraction again.
%
%   report = check_region('loop.mat')
%
%   The file is written by tf_lyapunov.matlab.export_region. With x+ = M*xi, v = N*xi and
%   xi = [x; w; q], all slopes w_i/v_i in [low_i, high_i], V = x'*P*x and multipliers l >= 0,
%   V(x+) <= rate*V(x) on the set of all |c'*x| <= d if
%
%       L = rate*E*P*E' - M'*P*M - K >= 0,
%       xi'*K*xi = sum_i l_i*(w_i - low_i*v_i)*(high_i*v_i - w_i),
%
%   and {V <= 1} lies in that set if [d^2, c'; c, P] >= 0 for each of its bounds. Both are decided
%   by eigenvalues with every rounding accounted for (private/is_psd.m). What the file says of the
%   sectors is taken from it: that they follow from the weights is checked by
%   tf_lyapunov.verification.verify.
%
%   report.verdict     'PROVED' or 'NOT_PROVED'.
%   report.decrease    verdict on L: 'PROVED', 'REFUTED' or 'UNDECIDED'.
%   report.contained   verdicts on the bounds, a cell.
%   report.half_widths of the ellipsoid, one per state.
%
%   Reference: Yin, Seiler and Arcak, arXiv 2006.07579.

    if nargin ~= 1 || ~ischar(file)
        error('tf_lyapunov:input', 'Usage: report = check_region(''loop.mat'')');
    end
    content = load(file);
    names = {'motion', 'motion_error', 'signal', 'signal_error', 'low', 'high', 'multipliers', ...
             'bounds', 'bounds_error', 'widths', 'P', 'rate'};
    if ~isfield(content, 'region') || ~isstruct(content.region) ...
            || ~all(isfield(content.region, names))
        error('tf_lyapunov:input', '%s holds no region of tf_lyapunov.', file);
    end
    r = content.region;
    for name = names
        X = r.(name{1});
        if ~isnumeric(X) || ~isreal(X) || any(isnan(X(:)))
            error('tf_lyapunov:input', 'region.%s must hold real numbers.', name{1});
        end
        r.(name{1}) = full(double(X));
    end
    n = size(r.P, 1);
    total = size(r.motion, 2);
    if ~isequal(r.P, r.P') || any(r.multipliers(:) < 0) || ~isscalar(r.rate) ...
            || r.rate <= 0 || r.rate >= 1 || numel(r.multipliers) ~= total - n ...
            || size(r.signal, 1) ~= total - n
        error('tf_lyapunov:input', 'The parts of the region do not fit each other.');
    end
    [L, bound] = decrease(r, n, total);
    report.decrease = is_psd(L, bound);
    report.contained = cell(1, numel(r.widths));
    inside = true;
    for k = 1:numel(r.widths)
        c = r.bounds(k, :)';
        d = r.widths(k);
        entry = blkdiag(4 * eps * d^2, zeros(n));
        entry(1, 2:end) = r.bounds_error(k, :);
        entry(2:end, 1) = r.bounds_error(k, :)';
        report.contained{k} = is_psd([d^2, c'; c, r.P], entry);
        inside = inside && (strcmp(report.contained{k}, 'PROVED') || ~any(c));
    end
    report.half_widths = sqrt(diag(inv(r.P)));
    report.verdict = 'NOT_PROVED';
    if strcmp(report.decrease, 'PROVED') && inside
        report.verdict = 'PROVED';
    end
end

function [L, bound] = decrease(r, n, total)
% The matrix L, and bounds on the distance of its entries to those that are meant.
    picks = eye(total);
    picks = picks(n + 1:end, :);
    l = r.multipliers(:);
    mean = l .* (r.low(:) + r.high(:)) / 2;
    product = l .* r.low(:) .* r.high(:);
    pulled = r.motion' * r.P * r.motion;
    cross = picks' * bsxfun(@times, mean, r.signal);
    square = r.signal' * bsxfun(@times, product, r.signal);
    L = -pulled + square - cross - cross' + picks' * diag(l) * picks;
    L(1:n, 1:n) = L(1:n, 1:n) + r.rate * r.P;
    L = (L + L') / 2;
    % Sizes of all that is added up, and what the doubt about M and N adds.
    size_motion = abs(r.motion) + r.motion_error;
    size_signal = abs(r.signal) + r.signal_error;
    sizes = size_motion' * abs(r.P) * size_motion ...
        + size_signal' * bsxfun(@times, abs(product), size_signal);
    side = picks' * bsxfun(@times, abs(mean), size_signal);
    sizes = sizes + side + side' + picks' * diag(l) * picks;
    sizes(1:n, 1:n) = sizes(1:n, 1:n) + r.rate * abs(r.P);
    moved = r.motion_error' * abs(r.P) * size_motion;
    drift = r.signal_error' * bsxfun(@times, abs(product), size_signal);
    corner = picks' * bsxfun(@times, abs(mean), r.signal_error);
    doubt = moved + moved' + drift + drift' + corner + corner';
    bound = eps * (2 * total + 32) * sizes + 1.01 * doubt + total * realmin;
end
