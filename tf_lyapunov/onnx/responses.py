"""Local response normalizations that are written as means of squares over windows.

As `export_onnx` writes them along the last axis, and as PyTorch does along the channels.
"""


def response(finder, node):
    """x·(k + α·Σ x²)^-β over windows of the last axis."""
    for x, factor in (node.inputs, node.inputs[::-1]) if len(node.inputs) == 2 else ():
        power = finder.giver(factor, "Pow")
        exponent = power and finder.number(power.inputs[1])
        total = exponent and finder.giver(power.inputs[0], "Add")
        parts = total and finder.operands(total)
        scaled = parts and finder.giver(parts[0], "Mul")
        inner = scaled and finder.operands(scaled)
        if not inner or exponent >= 0:
            continue
        energy, flat = inner[0], False
        held = finder.giver(energy, "Reshape")
        if held is not None:
            energy, flat = held.inputs[0], True
        pool = finder.giver(energy, "AveragePool")
        width = pool and _last_window(pool)
        if not width:
            continue
        squares = pool.inputs[0]
        if flat:
            before = finder.giver(squares, "Reshape")
            shapes = [n and finder.integers(n.inputs[1]) for n in (before, held)]
            if not all(shapes) or shapes[0] != (shapes[1][0], 1, *shapes[1][1:]):
                continue
            squares = before.inputs[0]
        square = finder.giver(squares, "Mul", "Pow")
        if square is None or finder.squared(square) != x:
            continue
        settings = {"reach": width // 2, "bias": parts[1], "alpha": inner[1] / width}
        rank = 2 if flat else len(pool.get("kernel_shape")) + 2
        return "Response", x, {**settings, "beta": -exponent, "rank": rank}
    return None


def channel_response(finder, node):
    """x/(k + α·m)^β, m the mean of x² over odd windows of the channels, as PyTorch writes it."""
    x, below = node.inputs
    power = finder.giver(below, "Pow")
    exponent = power and finder.number(power.inputs[1])
    total = exponent and finder.giver(power.inputs[0], "Add")
    parts = total and finder.operands(total)
    scaled = parts and finder.giver(parts[0], "Mul")
    inner = scaled and finder.operands(scaled)
    if not inner or exponent <= 0:
        return None
    after = finder.giver(inner[0], "Reshape")
    back = after and finder.integers(after.inputs[1])
    squeezed = finder.giver(after.inputs[0] if after else inner[0], "Squeeze")
    pool = (
        squeezed
        and finder.axes(squeezed) == (1,)
        and finder.giver(squeezed.inputs[0], "AveragePool")
    )
    width = pool and _first_window(pool)
    before = width and _padded_channels(finder, pool.inputs[0], width)
    if not before or (after and not back):
        return None
    sizes, rank = None, 3
    if before.kind == "Reshape":
        sizes = finder.integers(before.inputs[1]) or ()
        rank = len(back) if after else 4
        fits = len(sizes) == 5 and sizes[1] == 1 and min(sizes[:4]) > 0 and rank >= 4
        sizes = (sizes[0], *sizes[2:4]) if fits else None
        if not fits or (after and tuple(back[:3]) != sizes):
            return None
    elif after or finder.axes(before) != (1,):
        return None
    square = finder.giver(before.inputs[0], "Mul", "Pow")
    if square is None or finder.squared(square) != x:
        return None
    settings = {"reach": width // 2, "bias": parts[1], "alpha": inner[1] / width, "beta": exponent}
    return "Response", x, {**settings, "rank": rank, "axis": 1, "sizes": sizes}


def _first_window(pool):
    """Odd size of a mean over windows of the first axis of a pool without padding, or None."""
    kernel = pool.get("kernel_shape") or [0]
    plain = list(kernel[1:]) == [1] * (len(kernel) - 1) and not any(pool.get("pads") or ())
    plain = plain and all(set(pool.get(n) or [1]) == {1} for n in ("strides", "dilations"))
    plain = plain and not pool.get("ceil_mode", 0)
    plain = plain and pool.get("auto_pad", "NOTSET") in ("NOTSET", "")
    return kernel[0] if plain and kernel[0] % 2 else None


def _padded_channels(finder, name, width):
    """What gives the value that is padded with zeros, on both sides of axis 2 alone; or None."""
    pad = finder.giver(name, "Pad")
    if pad is None or pad.get("mode", "constant") != "constant":
        return None
    pads = pad.get("pads")
    if len(pad.inputs) > 1:
        pads = finder.integers(pad.inputs[1])
        filled = len(pad.inputs) > 2 and pad.inputs[2]
        if (filled and finder.number(pad.inputs[2]) != 0) or any(pad.inputs[3:]):
            return None
    elif pad.get("value", 0.0) != 0:
        return None
    rank = len(pads or ()) // 2
    wanted = [width // 2 if i % rank == 2 else 0 for i in range(2 * rank)] if rank > 2 else None
    if not wanted or list(pads) != wanted:
        return None
    return finder.giver(pad.inputs[0], "Reshape", "Unsqueeze")


def _last_window(pool):
    """Odd size of a mean over windows of the last axis that counts its zeros, or None."""
    kernel = pool.get("kernel_shape") or [0]
    width, rank = kernel[-1], len(kernel)
    ends = [*[0] * (rank - 1), width // 2]
    plain = list(kernel[:-1]) == [1] * (rank - 1) and list(pool.get("pads") or []) == 2 * ends
    plain = plain and all(set(pool.get(n) or [1]) == {1} for n in ("strides", "dilations"))
    plain = plain and pool.get("count_include_pad", 0) and not pool.get("ceil_mode", 0)
    plain = plain and pool.get("auto_pad", "NOTSET") in ("NOTSET", "")
    return width if plain and width % 2 else None
