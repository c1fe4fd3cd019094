"""Bounds on operator norms against the materialised float64 truth."""

TITLE = "Norm bounds / truth"


def _layers(quick):
    """Keras convolutions of every kind, with their input shapes."""
    import keras

    k = keras.layers
    cases = [(k.Dense(20), (30,)), (k.Dense(64), (17,))]
    for stride in (1, 2, 3):
        for padding in ("same", "valid"):
            common = {"strides": stride, "padding": padding}
            cases += [
                (k.Conv1D(6, 5, **common), (17, 3)),
                (k.Conv2D(6, 3, **common), (9, 10, 4)),
                (k.Conv2D(8, 4, groups=2, **common), (8, 8, 4)),
                (k.DepthwiseConv2D(3, depth_multiplier=2, **common), (9, 9, 5)),
                (k.SeparableConv2D(6, 3, **common), (9, 8, 3)),
                (k.Conv2DTranspose(4, 3, **common), (6, 5, 3)),
                (k.Conv1DTranspose(4, 4, **common), (11, 3)),
            ]
            if not quick:
                cases.append((k.Conv3D(3, 3, **common), (5, 6, 5, 2)))
    for padding in ("same", "valid", "causal"):
        cases.append((k.Conv1D(5, 3, dilation_rate=2, padding=padding), (15, 3)))
    cases += [
        (k.Conv2D(4, 3, dilation_rate=2, padding="same"), (9, 9, 3)),
        (k.Conv2D(4, 5, padding="same"), (6, 6, 3)),
        (k.Conv2D(16, 3, padding="same"), (14, 14, 8)),
    ]
    return cases


def measure(quick):
    """Ratio bound / float64 truth over all kinds: never below 1, equal to 1 where exact."""
    import dataclasses

    import keras
    import numpy as np

    from tf_lyapunov.spectral.norms import kernel_norm_upper_bound
    from tf_lyapunov.spectral.reading import linear_maps
    from tf_lyapunov.theory.norms import norm_upper_bound
    from tf_lyapunov.theory.operators import convolution_matrix

    ratios = {}

    def note(name, ratio):
        ratios.setdefault(name, []).append(float(ratio))

    for layer, shape in _layers(quick):
        layer.build((None, *shape))
        for variable, linear_map in linear_maps(layer):
            kernel = keras.ops.convert_to_numpy(variable)
            truth = np.linalg.norm(convolution_matrix(kernel, linear_map).toarray(), 2)
            exact = norm_upper_bound(kernel, linear_map)
            kind = "exact" if exact.exact else "larger maps"
            note(f"certificate, {kind} (float64)", exact.value / truth)
            training = kernel_norm_upper_bound(variable, linear_map)
            note("constraint, known size (float32)", float(training) / truth)
            if linear_map.kind == "dense":
                continue
            frequency = norm_upper_bound(kernel, linear_map, method="frequency")
            note("certificate, by frequency (float64)", frequency.value / truth)
            free = dataclasses.replace(linear_map, input_shape=None)
            supremum = _supremum(kernel, linear_map)
            note(
                "certificate, any size (float64) / supremum",
                norm_upper_bound(kernel, free).value / supremum,
            )
            note(
                "constraint, any size (float32) / supremum",
                float(kernel_norm_upper_bound(variable, free)) / supremum,
            )
    rows = [
        {"what": name, "cases": len(r), "smallest ratio": min(r), "largest ratio": max(r)}
        for name, r in ratios.items()
    ]
    return {"rows": rows}


def _supremum(kernel, linear_map):
    """Supremum of the norm over image sizes: a dense grid of frequencies, from below."""
    import numpy as np

    from tf_lyapunov.theory import norms as bounds
    from tf_lyapunov.theory.operators import as_convolution

    blocks, axes = as_convolution(kernel.astype(float), linear_map)
    points = {1: 2048, 2: 96, 3: 24}[len(axes)]
    periods = [a.stride * points for a in axes]
    return max(bounds._frequency_norm(np.asarray(b), axes, periods)[0] for b in blocks)
