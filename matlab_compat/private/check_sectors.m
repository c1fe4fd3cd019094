function [k1, k2] = check_sectors(k1, k2)
%CHECK_SECTORS  Row vectors of smallest and largest slopes, one per layer.

    for k = {k1, k2}
        if ~isnumeric(k{1}) || ~isreal(k{1}) || isempty(k{1}) || ~isvector(k{1}) ...
                || ~all(isfinite(k{1}))
            error('tf_lyapunov:input', ...
                  'k1 and k2 must be non-empty real vectors of finite slopes, one per layer.');
        end
    end
    k1 = double(k1(:)');
    k2 = double(k2(:)');
    if isscalar(k1)
        k1 = repmat(k1, size(k2));
    elseif isscalar(k2)
        k2 = repmat(k2, size(k1));
    end
    if numel(k1) ~= numel(k2)
        error('tf_lyapunov:input', ...
              'k1 and k2 must have one entry per layer. Received: %d and %d entries.', ...
              numel(k1), numel(k2));
    end
    if any(k1 > k2)
        error('tf_lyapunov:input', ...
              'k1 must hold the smallest slopes and k2 the largest. Received: %s and %s.', ...
              mat2str(k1), mat2str(k2));
    end
    if any(k1 == 0 & k2 == 0)
        error('tf_lyapunov:input', ...
              'Slopes [0, 0] make a layer constant for every weight: it needs no bound.');
    end
end
