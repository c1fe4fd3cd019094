"""Accuracy under clipped and under scaled kernels."""

from benchmarks.data import mnist_or_digits

TITLE = "Clipped and scaled kernels"


def measure(quick):
    """Accuracy of one network of gain 1.31 whose kernels are clipped softly, or scaled."""
    import keras

    import tf_lyapunov as tfl
    from tf_lyapunov import datasets
    from tf_lyapunov import models as zoo

    x, y, source = mnist_or_digits()
    train, test = (slice(0, n) for n in ((4000, 500) if quick else (20_000, 5000)))
    test = slice(train.stop, train.stop + test.stop)
    leaky = tfl.Sector.of("leaky_relu", negative_slope=0.1)
    design = tfl.spectral_design(tfl.Indices(0.4, -2.0), [leaky, leaky, tfl.Sector.linear()])
    rows = []
    for shrink in ("clip", "scale"):
        keras.utils.set_random_seed(0)
        model = zoo.mlp(x.shape[1:], 10, widths=[50, 20], negative_slope=0.1)
        tfl.constrain(model, design)
        for layer in model.layers:
            if hasattr(layer, "kernel"):
                layer.kernel.constraint.shrink = shrink
        loss = tfl.losses.TemperatureCrossEntropy(temperature=0.05, margin=0.5)
        model.compile(keras.optimizers.Adam(1e-3), loss)
        batches = datasets.Batches(x[train], y[train], 128, seed=0)
        callbacks = [batches.epoch_callback(), tfl.callbacks.LyapunovMonitor(design, verbose=0)]
        model.fit(batches, epochs=2 if quick else 10, verbose=0, callbacks=callbacks)
        proof = tfl.certify(model, x[test], y[test])
        row = {"data": source, "kernels": shrink, "clean": proof.accuracy}
        row |= {f"certified at {r}": proof.certified_accuracy(r) for r in (0.1, 0.3, 0.5)}
        rows.append({**row, "proved gain": proof.gain_upper_bound})
    return {"rows": rows}
