function [proved, report] = check_certificate(file)
%CHECK_CERTIFICATE  Check an exported network's claims again, from its weights.
%
%   check_certificate('net.mat')                     % prints the report
%   [proved, report] = check_certificate('net.mat')
%
%   The file is written by `tf-lyapunov export-mat` (tf_lyapunov.matlab.export_mat). Nothing that it
%   says about norms is used: the norm of every linear map is computed from its weights, rounded up,
%   the gains are composed over the network's graph, and then
%
%   - a certificate's gain bound is proved if the gain found here does not exceed it;
%   - a design's claim (delta, nu) is proved by the gain of the whole network, rule (2.1), or else by
%     the scaled cascade with the file's multipliers, each layer's indices being proved from its
%     weights by rule (2.1), the conic rule (2.2) or Theorem 1 with Lambda = lambda*I.
%
%   proved               true if the file holds a claim and every claim in it is proved.
%   report.gain          the gain proved here, from the input to the logits.
%   report.norms         of the linear maps, in order; report.norm_methods: how.
%   report.gain_verdict, report.claim_verdict    'PROVED', 'NOT_PROVED' or 'NO_CLAIM'.
%   report.assumptions   what was taken from the file: sectors of activations, gains of
%                        weight-free layers, the structure of the graph.
%   report.text          the printed report.
%
%   The radii of a certificate rest on its gain and on the logits; those need the inputs and are not
%   computed here. A file that is incomplete or holds NaN is refused (tf_lyapunov:refused).

    content = read_file(file);
    network = content.network;
    [gains, norms, allowance, report] = node_gains(network);
    [report.gain, composed_allowance] = network_gain(network, gains);
    report.norms = norms;
    % Relative difference that rounding alone may make between this bound and the same bound
    % computed elsewhere: what was added to the norms, once more for the other side, and the sums.
    slack = (allowance * composed_allowance)^2;
    lines = {sprintf('network: %d nodes, %d linear maps, %s', numel(network.nodes), ...
                     numel(network.maps), network.digest)};
    for k = 1:numel(network.maps)
        lines{end + 1} = sprintf('  %-24s norm <= %.17g  (%s)', network.maps{k}.name, norms(k), ...
                                 report.norm_methods{k}); %#ok<AGROW>
    end
    lines{end + 1} = sprintf('gain from the input to the logits: at most %.17g', report.gain);
    report.gain_verdict = 'NO_CLAIM';
    if isfield(content, 'certificate')
        claimed = content.certificate.gain_upper_bound;
        [report.gain_verdict, line] = check_gain(report.gain, claimed, slack);
        lines{end + 1} = line;
        method = text_of(content.certificate.method);
        if strcmp(report.gain_verdict, 'NOT_PROVED') && ~strcmp(method, 'composition')
            lines{end + 1} = sprintf('  (its method, %s, is not repeated here)', method);
        end
        if ~strcmp(text_of(content.certificate.model_digest), text_of(network.digest))
            report.gain_verdict = 'NOT_PROVED';
            lines{end + 1} = 'the certificate names another model (digests differ): NOT_PROVED';
        end
        lines{end + 1} = sprintf(['  its %d radii rest on this gain and on the logits, which are ' ...
                                  'not computed here'], numel(content.certificate.radius));
    end
    report.claim_verdict = 'NO_CLAIM';
    if isfield(content, 'design')
        [report.claim_verdict, line] = check_claim_of(content.design, network, gains, report.gain);
        lines{end + 1} = line;
    end
    verdicts = {report.gain_verdict, report.claim_verdict};
    proved = any(strcmp(verdicts, 'PROVED')) && ~any(strcmp(verdicts, 'NOT_PROVED'));
    lines{end + 1} = 'taken from the file, not computed here:';
    for k = 1:numel(report.assumptions)
        lines{end + 1} = ['  ', report.assumptions{k}]; %#ok<AGROW>
    end
    if proved
        lines{end + 1} = 'verdict: PROVED';
    elseif all(strcmp(verdicts, 'NO_CLAIM'))
        lines{end + 1} = 'verdict: the file holds no claim, only the gain above is proved';
    else
        lines{end + 1} = 'verdict: NOT PROVED';
    end
    report.text = sprintf('%s\n', lines{:});
    if nargout == 0
        fprintf('%s', report.text);
        clear proved
    end
end

function content = read_file(file)
    try
        content = load(file);
    catch problem
        error('tf_lyapunov:refused', 'The file %s cannot be read: %s', file, problem.message);
    end
    known = isstruct(content) && isfield(content, 'tf_lyapunov') ...
        && isfield(content.tf_lyapunov, 'version') && isequal(content.tf_lyapunov.version, 1);
    if ~known
        error('tf_lyapunov:refused', ...
              '%s is not a file of tf-lyapunov export-mat in version 1 of its format.', file);
    end
    need(content, {'network'}, file);
    need(content.network, {'nodes', 'maps', 'logits', 'digest'}, 'network');
    nodes = content.network.nodes;
    maps = content.network.maps;
    if ~iscell(nodes) || ~iscell(maps) || isempty(nodes)
        error('tf_lyapunov:refused', 'network.nodes and network.maps must be cell arrays.');
    end
    for k = 1:numel(maps)
        need(maps{k}, {'name', 'kind', 'kernel', 'shape', 'axes', 'groups', 'scale'}, 'a linear map');
    end
    for k = 1:numel(nodes)
        node = nodes{k};
        need(node, {'name', 'kind', 'call', 'inputs', 'rule', 'weights', 'gain', 'map', 'sector', ...
                    'assumption', 'method'}, 'a node');
        valid = all(node.inputs >= 1 & node.inputs < k & node.inputs == round(node.inputs)) ...
            && numel(node.weights) == max(numel(node.inputs), 1) ...
            && all(isfinite(node.weights)) && all(node.weights >= 0) && isscalar(node.gain) ...
            && ~isnan(node.gain) && node.gain >= 0 && isscalar(node.map) && node.map >= 0 ...
            && node.map <= numel(maps) && (isempty(node.sector) || numel(node.sector) == 2) ...
            && all(isfinite(node.sector)) && xor(isempty(node.inputs), ~strcmp(node.kind, 'input'));
        if ~valid || (strcmp(node.kind, 'linear') && node.map == 0)
            error('tf_lyapunov:refused', 'Node %d (%s) of the network is malformed.', k, node.name);
        end
    end
    if ~isscalar(content.network.logits) || ~any(content.network.logits == 1:numel(nodes))
        error('tf_lyapunov:refused', 'network.logits must be the number of a node.');
    end
    if isfield(content, 'certificate')
        need(content.certificate, {'gain_upper_bound', 'model_digest', 'radius', 'method'}, ...
             'certificate');
    end
    if isfield(content, 'design')
        need(content.design, {'delta', 'nu', 'nu_vec', 'delta_vec', 'p_vec', 'target_gain'}, 'design');
    end
end

function need(s, names, where)
    if ~isstruct(s) || ~isscalar(s) || ~all(isfield(s, names))
        error('tf_lyapunov:refused', 'The file is incomplete: %s must have the fields %s.', where, ...
              strjoin(names, ', '));
    end
end

function text = text_of(value)
    text = reshape(char(value), 1, []);
end

function [gains, norms, allowance, report] = node_gains(network)
% Gain of every node: linear maps from their weights, activations from their sectors.
    maps = network.maps;
    norms = zeros(1, numel(maps));
    allowance = 1;
    report.norm_methods = cell(1, numel(maps));
    for k = 1:numel(maps)
        [norms(k), estimate, report.norm_methods{k}] = norm_upper_bound(maps{k});
        if estimate > 0
            allowance = allowance * (norms(k) / estimate);
        end
    end
    gains = zeros(1, numel(network.nodes));
    assumptions = {};
    for k = 1:network.logits
        node = network.nodes{k};
        if node.map > 0
            gains(k) = norms(node.map);
        elseif ~isempty(node.sector)
            gains(k) = max(abs(node.sector));
            assumptions{end + 1} = sprintf('%s has slopes in [%.17g, %.17g]', node.name, ...
                                           node.sector(1), node.sector(2)); %#ok<AGROW>
        else
            gains(k) = node.gain;
            if node.gain ~= 1 || ~isempty(node.assumption)
                assumptions{end + 1} = sprintf('%s has gain %.17g (%s)', node.name, node.gain, ...
                                               text_of(node.method)); %#ok<AGROW>
            end
        end
    end
    assumptions{end + 1} = 'the graph of the network, and that its other nodes have gain 1';
    report.assumptions = assumptions;
end

function [gain, allowance] = network_gain(network, gains)
% L(input) = 1; L = g*sum(w.*L) or g*sqrt(sum((w.*L).^2)) over the nodes that a node reads.
    L = ones(size(gains));
    operations = 0;
    for k = 1:network.logits
        node = network.nodes{k};
        if isempty(node.inputs)
            continue
        end
        read = node.weights .* L(node.inputs);
        switch node.rule
            case {'single', 'sum'}
                combined = sum(read);
            case 'root_sum_squares'
                combined = norm(read);
            otherwise
                error('tf_lyapunov:refused', 'Node %s has an unknown rule %s.', node.name, node.rule);
        end
        % A product, a sum and a factor: at most this many roundings, each half an eps.
        steps = numel(read) + 4;
        L(k) = gains(k) * combined * (1 + steps * eps);
        operations = operations + steps;
    end
    gain = L(network.logits);
    allowance = 1 + operations * eps;
end

function [verdict, line] = check_gain(gain, claimed, slack)
    verdict = 'NOT_PROVED';
    if isscalar(claimed) && claimed >= gain
        verdict = 'PROVED';
        line = sprintf('claimed gain %.17g: PROVED', claimed);
    elseif isscalar(claimed) && claimed * slack >= gain
        verdict = 'PROVED';
        line = sprintf('claimed gain %.17g: PROVED up to the rounding of this computation (%.2g)', ...
                       claimed, slack - 1);
    else
        line = sprintf('claimed gain %.17g: NOT_PROVED, the norms of the weights give %.17g', ...
                       claimed(1), gain);
    end
end

function [verdict, line] = check_claim_of(design, network, gains, gain)
    verdict = 'NOT_PROVED';
    nu = design.nu;
    delta = design.delta;
    if ~isempty(design.target_gain)
        line = sprintf('design for gain %.17g', design.target_gain);
        if gain <= design.target_gain
            verdict = 'PROVED';
            line = [line, ': PROVED'];
        else
            line = sprintf('%s: NOT_PROVED, the norms of the weights give %.17g', line, gain);
        end
        return
    end
    line = sprintf('claim (delta, nu) = (%.17g, %.17g)', delta, nu);
    if ~isscalar(nu) || ~isscalar(delta) || ~isfinite(nu) || ~isfinite(delta) || delta <= 0
        line = [line, ': NOT_PROVED, it is not a pair with delta > 0'];
        return
    end
    if gain_rule_holds(gain, delta, nu)
        verdict = 'PROVED';
        line = [line, ': PROVED by the gain of the whole network'];
        return
    end
    [holds, reason] = cascade_holds(design, network, gains);
    if holds
        verdict = 'PROVED';
    end
    line = sprintf('%s: %s, %s', line, verdict, reason);
end

function [holds, reason] = cascade_holds(design, network, gains)
% Every layer's indices from its weights, then M(p) >= 0 with the file's multipliers.
    holds = false;
    [stages, chain] = stages_of(network);
    n = numel(stages);
    if ~chain
        reason = 'the network is not a chain, and its gain is too large';
        return
    end
    if numel(design.nu_vec) ~= n || numel(design.delta_vec) ~= n || numel(design.p_vec) ~= n
        reason = sprintf('the design has %d layers and the network %d', numel(design.nu_vec), n);
        return
    end
    for l = 1:n
        rule = layer_rule(network, stages{l}, gains, design.delta_vec(l), design.nu_vec(l));
        if isempty(rule)
            reason = sprintf('layer %d (%s) is not proved to have its indices', l, ...
                             network.nodes{stages{l}(1)}.name);
            return
        end
    end
    [~, M, bound] = cascade_matrix(design.nu, design.delta, design.nu_vec, design.delta_vec, ...
                                   design.p_vec);
    [verdict, value] = is_psd(M, bound);
    holds = strcmp(verdict, 'PROVED');
    reason = sprintf('scaled cascade, smallest eigenvalue %.3g', value);
end

function [stages, chain] = stages_of(network)
% Nodes of every linear layer with what follows it; what comes before the first belongs to it.
    nodes = network.nodes;
    last = network.logits;
    chain = true;
    starts = [];
    for k = 2:last
        chain = chain && isequal(nodes{k}.inputs, k - 1);
        new_call = strcmp(nodes{k}.kind, 'linear') && ~strcmp(nodes{k}.call, nodes{k - 1}.call);
        if new_call
            starts(end + 1) = k; %#ok<AGROW>
        end
    end
    chain = chain && ~isempty(starts);
    stages = {};
    if ~chain
        return
    end
    ends = [starts(2:end) - 1, last];
    starts(1) = 2;
    stages = cell(1, numel(starts));
    for l = 1:numel(starts)
        stages{l} = starts(l):ends(l);
    end
end

function rule = layer_rule(network, stage, gains, delta, nu)
% Name of the rule that proves the stage IIFOFP(delta, nu), or ''.
    rule = '';
    stage_gain = prod(gains(stage)) * (1 + numel(stage) * eps);
    if gain_rule_holds(stage_gain, delta, nu)
        rule = 'gain';
        return
    end
    % The other rules need y = phi(W*x + b) itself: a dense map, an activation, reshapes.
    map = [];
    sector = [1, 1];
    for k = stage
        node = network.nodes{k};
        if strcmp(node.kind, 'linear') && isempty(map)
            map = network.maps{node.map};
        elseif ~isempty(node.sector) && ~isempty(map) && isequal(sector, [1, 1])
            sector = node.sector(:)';
        elseif ~any(strcmp(node.kind, {'identity', 'reshape'}))
            return
        end
    end
    if isempty(map) || ~strcmp(map.kind, 'dense') || ~isempty(map.scale) || delta <= 0 ...
            || sum(map.shape) > 1000
        return
    end
    W = layer_matrix(map);
    if conic_rule_holds(W, sector, delta, nu)
        rule = 'conic';
        return
    end
    [~, ~, feasible] = layer_lmi(W, sector(1), sector(2), struct('delta', delta, 'nu', nu));
    if feasible
        rule = 'Theorem 1';
    end
end

function holds = conic_rule_holds(W, sector, delta, nu)
% (2.2): norm(m*W - c*I) + (beta-alpha)/2*norm(W) <= r, c = 1/(2*delta), r = sqrt(c^2 - nu/delta).
    [outputs, inputs] = size(W);
    padded = zeros(max(outputs, inputs), inputs);
    padded(1:outputs, :) = W;
    m = sum(sector) / 2;
    c = 1 / (2 * delta);
    distance = norm_upper_bound(m * padded - c * eye(size(padded)));
    rounding = 2 * eps * (abs(m) * norm(W, 'fro') + c * sqrt(inputs));
    reach = (distance + rounding + diff(sector) / 2 * norm_upper_bound(W)) * (1 + 8 * eps);
    [difference, error_bound] = weighted_sum(c, c, -nu, 2 * c);
    holds = reach^2 * (1 + 2 * eps) <= difference - error_bound - 4 * eps * (c^2 + abs(nu) * 2 * c);
end
