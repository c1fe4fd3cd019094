function [blocks, dense] = kernel_blocks(map)
%KERNEL_BLOCKS  The convolution with the same operator norm: one (taps, in, out) block per group.
%
%   A transposed convolution is the adjoint of the convolution from its output to its input, whose
%   kernel blocks are the same; a depthwise convolution has one group per channel.

    kernel = double(map.kernel);
    shape = double(map.shape(:)');
    if numel(kernel) ~= prod(shape) || ~isreal(kernel) || ~all(isfinite(kernel(:)))
        error('tf_lyapunov:refused', ...
              'The kernel of %s must be %s finite real numbers.', map.name, mat2str(shape));
    end
    dense = strcmp(map.kind, 'dense');
    scale = double(map.scale(:));
    if dense
        kernel = reshape(kernel, shape);
        if ~isempty(scale)
            kernel = bsxfun(@times, kernel, scale');
        end
        blocks = {kernel};
        return
    end
    rank = numel(shape) - 2;
    if ~isequal(size(map.axes), [rank, 6]) || ~isequal(double(map.axes(:, 1))', shape(1:rank))
        error('tf_lyapunov:refused', 'The geometry of %s does not fit its kernel.', map.name);
    end
    kernel = reshape(kernel, [prod(shape(1:rank)), shape(rank + 1:end)]);
    [taps, inputs, outputs] = size(kernel);
    switch map.kind
        case 'depthwise'
            blocks = cell(1, inputs);
            for g = 1:inputs
                blocks{g} = kernel(:, g, :);
            end
            channels = outputs;
        case 'conv'
            groups = double(map.groups);
            channels = outputs / groups;
            if groups < 1 || channels ~= round(channels)
                error('tf_lyapunov:refused', 'The groups of %s do not divide its outputs.', map.name);
            end
            blocks = cell(1, groups);
            for g = 1:groups
                blocks{g} = kernel(:, :, (g - 1) * channels + (1:channels));
            end
        case 'conv_transpose'
            blocks = {kernel};
        otherwise
            error('tf_lyapunov:refused', 'The kind %s of %s is unknown.', map.kind, map.name);
    end
    if isempty(scale)
        return
    end
    if strcmp(map.kind, 'conv_transpose')
        % The layer's output channels are the inputs of the adjoint.
        blocks{1} = bsxfun(@times, kernel, reshape(scale, [1, inputs, 1]));
        return
    end
    for g = 1:numel(blocks)
        part = scale((g - 1) * channels + (1:channels));
        blocks{g} = bsxfun(@times, blocks{g}, reshape(part, [1, 1, channels]));
    end
end
