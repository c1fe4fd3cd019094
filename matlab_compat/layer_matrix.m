function W = layer_matrix(map)
%LAYER_MATRIX  Matrix (outputs, inputs) of a linear map of an exported network.
%
%   W = layer_matrix(map)          % map = network.maps{k} of a file written by export-mat
%
%   Signals are flattened row-major with channels last, as in Python: entry
%   ((row*width) + column)*channels + channel, counted from 0. Dense maps are full, convolutions
%   sparse. A batch normalization that was folded into the map (map.scale) is included.
%
%   map.kind        'dense', 'conv', 'depthwise' or 'conv_transpose'
%   map.kernel      as Keras holds it: dense (in, out), conv (k.., in/groups, out),
%                   depthwise (k.., in, multiplier), conv_transpose (k.., out, in)
%   map.shape       its size (MATLAB drops trailing ones)
%   map.axes        one row per spatial axis: taps, stride, dilation, size, output, left padding,
%                   y(i) = sum_t K(t)*x(i*stride + t*dilation - left); for conv_transpose those of
%                   its adjoint
%   map.groups      channel groups
%   map.scale       [] or one factor per output channel
%
%   See also NORM_UPPER_BOUND, LAYER_LMI.

    [blocks, dense] = kernel_blocks(map);
    if dense
        W = blocks{1}';
        return
    end
    geometry = double(map.axes);
    row = 0;
    column = 0;
    tap = 0;
    taps_before = 1;
    for k = 1:size(geometry, 1)
        [i, j, t] = axis_entries(geometry(k, :));
        row = combine(row * geometry(k, 5), i);
        column = combine(column * geometry(k, 4), j);
        % Column-major, as the kernel is stored here.
        tap = combine(tap, t * taps_before);
        taps_before = taps_before * geometry(k, 1);
    end
    groups = numel(blocks);
    [~, inputs, outputs] = size(blocks{1});
    size_of = [prod(geometry(:, 5)) * groups * outputs, prod(geometry(:, 4)) * groups * inputs];
    W = sparse(size_of(1), size_of(2));
    entries = numel(tap);
    for g = 1:groups
        % One entry per (position and tap, input channel, output channel).
        rows = bsxfun(@plus, row * (groups * outputs) + (g - 1) * outputs, ...
                      reshape(1:outputs, [1, 1, outputs]));
        columns = bsxfun(@plus, column * (groups * inputs) + (g - 1) * inputs, 1:inputs);
        rows = repmat(rows, [1, inputs, 1]);
        columns = repmat(columns, [1, 1, outputs]);
        values = reshape(blocks{g}(tap + 1, :, :), [entries, inputs, outputs]);
        W = W + sparse(rows(:), columns(:), values(:), size_of(1), size_of(2));
    end
    if strcmp(map.kind, 'conv_transpose')
        W = W';
    end
end

function [i, j, t] = axis_entries(axis)
% Rows, columns and taps (counted from 0) that fall inside the input.
    [i, t] = ndgrid(0:axis(5) - 1, 0:axis(1) - 1);
    j = i * axis(2) + t * axis(3) - axis(6);
    inside = j >= 0 & j < axis(4);
    i = i(inside);
    j = j(inside);
    t = t(inside);
end

function sums = combine(first, second)
% All sums of an entry of each, as a column.
    sums = bsxfun(@plus, first(:), second(:)');
    sums = sums(:);
end
