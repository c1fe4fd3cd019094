function holds = gain_rule_holds(gain, delta, nu)
%GAIN_RULE_HOLDS  Whether every map with this l2 gain is IIFOFP(delta, nu): rule (2.1).
%
%   delta*r^2 + r + nu <= 0 with delta >= 0. All terms but nu are positive, so that four
%   roundings change their sum by a relative 4u at most, u = 2^-53; 8u are added, and realmin for
%   underflow.

    left = (delta .* gain) .* gain + gain;
    holds = delta >= 0 & gain >= 0 & left * (1 + 4 * eps) + 4 * realmin <= -nu;
end
