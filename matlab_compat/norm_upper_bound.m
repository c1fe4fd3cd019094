function [upper, estimate, method] = norm_upper_bound(map)
%NORM_UPPER_BOUND  Upper bound on the operator norm of a matrix or of an exported linear map.
%
%   [upper, estimate, method] = norm_upper_bound(W)              % a matrix
%   [upper, estimate, method] = norm_upper_bound(network.maps{k})
%
%   upper      at least the norm, rounding included.
%   estimate   the same without the allowance for rounding.
%   method     'svd'; 'materialised' (eigenvalues of the Gram matrix of the whole convolution, up
%              to order 1500); or 'frequency', for larger ones: the zero-padded map is a part of a
%              circulant of period N >= size + padding, whose norm is the largest over frequencies
%              f of the aliased blocks [K(f), K(f + N/s), ...]/sqrt(s).
%
%   Twin of tf_lyapunov.theory.norms.norm_upper_bound, which takes the whole convolution for some
%   larger maps too, and samples the frequencies of long axes: a little below or above this one.

    if isnumeric(map)
        map = struct('name', 'the matrix', 'kind', 'dense', 'kernel', full(map), ...
                     'shape', size(map), 'axes', [], 'groups', 1, 'scale', []);
    end
    [blocks, dense] = kernel_blocks(map);
    largest = 0;
    for g = 1:numel(blocks)
        largest = max([largest; abs(blocks{g}(:))]);
    end
    method = 'svd';
    if largest == 0
        upper = 0;
        estimate = 0;
        return
    end
    % A power of two keeps the squares below from over- and underflowing.
    unit = 2 ^ floor(log2(largest));
    u = eps / 2;
    if dense
        estimate = norm(blocks{1} / unit);
        upper = estimate * (1 + 8 * max(size(blocks{1})) * u);
        frobenius = norm(blocks{1} / unit, 'fro');
    else
        [upper, estimate, method, frobenius] = convolution_norm(map, blocks, unit);
    end
    if ~isempty(map.scale)
        % Folding rounds every entry, and scale itself was rounded a few times:
        % |error| <= 4u|K|, whose operator norm is at most sqrt(taps)*norm(K, 'fro').
        upper = upper + 4 * u * frobenius;
    end
    upper = upper * unit * (1 + 2 * eps);
    estimate = estimate * unit;
end

function [upper, estimate, method, frobenius] = convolution_norm(map, blocks, unit)
    geometry = double(map.axes);
    if any(geometry(:) ~= round(geometry(:))) || any(any(geometry(:, 1:5) < 1))
        error('tf_lyapunov:refused', 'The geometry of %s is not made of positive integers.', map.name);
    end
    [taps, inputs, outputs] = size(blocks{1});
    side = min(prod(geometry(:, 5)) * outputs, prod(geometry(:, 4)) * inputs);
    upper = 0;
    estimate = 0;
    frobenius = 0;
    for g = 1:numel(blocks)
        block = blocks{g} / unit;
        if side <= 1500
            method = 'materialised';
            single_group = struct('name', map.name, 'kind', 'conv', 'kernel', block, 'groups', 1, ...
                                  'shape', [geometry(:, 1)', inputs, outputs], ...
                                  'axes', geometry, 'scale', []);
            W = layer_matrix(single_group);
            if size(W, 1) <= size(W, 2)
                gram = full(W * W');
            else
                gram = full(W' * W);
            end
            top = max(eig((gram + gram') / 2));
            value = root_up(top, trace(gram), size(gram, 1), numel(block));
            plain = sqrt(max(top, 0));
        else
            method = 'frequency';
            [value, plain] = frequency_norm(block, geometry);
        end
        upper = max(upper, value);
        estimate = max(estimate, plain);
        frobenius = max(frobenius, sqrt(taps) * norm(block(:)));
    end
end

function root = root_up(eigenvalue, total, side, terms)
% sqrt(eigenvalue) rounded up: forming a Gram matrix errs by terms*u*trace, LAPACK by side*u.
    u = eps / 2;
    forming = (terms + 2) * u * 1.01 * total;
    solving = 8 * side * u * abs(eigenvalue);
    root = sqrt(max(eigenvalue, 0) + forming + solving) * (1 + 4 * u);
end

function [upper, estimate] = frequency_norm(block, geometry)
    [taps, inputs, outputs] = size(block);
    rank = size(geometry, 1);
    stride = geometry(:, 2)';
    extent = (geometry(:, 1)' - 1) .* geometry(:, 3)' + 1;
    reach = max([geometry(:, 4)' + max(geometry(:, 6)', 0); ...
                 (geometry(:, 5)' - 1) .* stride + extent - geometry(:, 6)'; ...
                 geometry(:, 5)' .* stride], [], 1);
    grid = ceil(reach ./ stride);
    symbol = block;
    for k = 1:rank
        % Transform the first axis and move it behind the other spatial ones.
        N = grid(k) * stride(k);
        angle = mod((0:N - 1)' * ((0:geometry(k, 1) - 1) * geometry(k, 3)), N);
        rest = numel(symbol) / geometry(k, 1);
        symbol = exp(-2i * pi * angle / N) * reshape(symbol, geometry(k, 1), rest);
        % Spatial axes not yet transformed, and the transformed ones, are all ahead of channels.
        spatial = rest / (inputs * outputs);
        symbol = permute(reshape(symbol, [N, spatial, inputs * outputs]), [2, 1, 3]);
    end
    % Axis k is now (grid, stride): frequency f = g + j*grid. Gather the aliases j.
    factors = reshape([grid; stride], 1, []);
    symbol = reshape(symbol, [factors, inputs, outputs]);
    symbol = permute(symbol, [2 * (1:rank), 2 * rank + 1, 2 * rank + 2, 2 * (1:rank) - 1]);
    aliases = prod(stride);
    symbol = reshape(symbol, [aliases * inputs, outputs, prod(grid)]) / sqrt(aliases);
    % A real kernel's symbol is conjugate at -f: half of the first axis is enough.
    first = mod(0:prod(grid) - 1, grid(1));
    chosen = find(first <= floor(grid(1) / 2));
    upper = 0;
    estimate = 0;
    for f = chosen
        part = symbol(:, :, f);
        if size(part, 1) < size(part, 2)
            part = part';
        end
        gram = part' * part;
        gram = (gram + gram') / 2;
        top = max(eig(gram));
        upper = max(upper, root_up(top, real(trace(gram)), size(gram, 1), 4 * size(part, 1)));
        estimate = max(estimate, sqrt(max(top, 0)));
    end
    % Each entry of the symbol errs by about taps*u*sum|K| at most, hence the symbol:
    upper = upper + 8 * (taps + 4) * sqrt(taps) * (eps / 2) * norm(block(:));
end
