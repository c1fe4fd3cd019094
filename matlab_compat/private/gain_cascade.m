function [nu_vec, delta_vec, p_vec] = gain_cascade(nu, delta, gains)
%GAIN_CASCADE  Layer indices and cascade weights that prove (delta, nu) from layer gains alone.
%
%   In signals scaled to unit gains the optimum is delta_l -> inf with p_l*delta_l fixed at
%   (delta - nu)/2; it is stopped at a finite point with interior rows dominant by a little:
%   p_l = p_(l+1)*(1 + 4/delta_l). The result is a candidate: cascade_matrix and an eigenvalue
%   decide. Twin of tf_lyapunov.theory.cascade.gain_cascade.

    n = numel(gains);
    total = prod(gains);
    level = max((delta * total - nu / total) / 2, 0.5);
    % The cones [-r, r + r/2^30] then differ from the discs [-r, r] by a relative 1e-9.
    sharpness = 2^30 * max(1, level);
    delta_vec = sharpness ./ gains;
    % Rounded away from zero (see gain_rule_holds), so that rule (2.1) holds for these gains.
    nu_vec = -((delta_vec .* gains) .* gains + gains) * (1 + 8 * eps) - 8 * realmin;
    scaled = (level / sharpness) * (1 + 4 / sharpness) .^ (n - 1:-1:0);
    logs = [0, cumsum(log(gains))];
    p_vec = exp(log(scaled) + logs(end) - logs(1:n) - logs(2:n + 1));
end
