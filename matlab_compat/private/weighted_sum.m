function [value, bound] = weighted_sum(a, b, c, d)
%WEIGHTED_SUM  a.*b + c.*d, with almost no cancellation error and a bound on what is left.
%
%   Dekker's exact products and Knuth's exact sum: |value - exact| <= bound, entry by entry.
%   The entries of a cascade matrix are small differences of large numbers.

    [h, e] = two_product(a, b);
    [k, f] = two_product(c, d);
    s = h + k;
    t = s - h;
    rest = (h - (s - t)) + (k - t);
    value = s + (rest + (e + f));
    u = eps / 2;
    bound = 1.01 * u * abs(value) + 8 * u^2 * (abs(h) + abs(k)) + 8 * realmin;
    if ~all(isfinite(value(:)))
        error('tf_lyapunov:input', ...
              'Indices, weights and claim must be of a size that doubles can multiply.');
    end
end

function [p, e] = two_product(a, b)
% p + e = a.*b exactly, short of over- and underflow.
    p = a .* b;
    [ah, al] = halves(a);
    [bh, bl] = halves(b);
    e = al .* bl - (((p - ah .* bh) - al .* bh) - ah .* bl);
end

function [high, low] = halves(x)
    c = (2^27 + 1) * x;
    high = c - (c - x);
    low = x - high;
end
