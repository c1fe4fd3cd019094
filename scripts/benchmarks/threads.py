"""Bounds with one, two and sixteen threads of BLAS: more must not take longer.

What is allowed is at most what the machine has: OpenBLAS takes no more threads than there are
cores. Every number comes from a process of its own, the best of several.
"""

TITLE = "Wall seconds of bounds by the number of BLAS threads allowed"
SCALE = True
THREADS, ROUNDS = (1, 2, 16), 3
NAMES = ("DepthwiseConv2D", "MobileNetV2", "VGG16", "ResNet50")


def measure(quick):
    """One row per network at 32×32."""
    from benchmarks.bounds import ROOT, ran

    rows = []
    for name in NAMES[: 2 if quick else None]:
        row = {"lipschitz_upper_bound": name}
        times = {
            threads: [
                ran(ROOT, "lipschitz_upper_bound", name, 32, threads=threads)
                for _ in range(1 if quick else ROUNDS)
            ]
            for threads in THREADS
        }
        for threads, found in times.items():
            row[f"wall s, {threads} allowed"] = min(wall for _, wall, _ in found)
            row[f"CPU s, {threads} allowed"] = min(cpu for cpu, _, _ in found)
        values = [value for found in times.values() for *_, value in found]
        rows.append(row | {"bounds apart": max(values) / min(values) - 1})
    return {"rows": rows}
