"""The pendulum of docs/howto/closed_loops.md: its figure, and attacks by many trajectories.

    python scripts/control/pendulum.py --trajectories 100000 --figure FILE.svg

Runs the Python blocks of the page up to the regions, as the tests do.
"""

import argparse
import pathlib
import re

import keras
import numpy as np

import tf_lyapunov as tfl
from tf_lyapunov.writing import write_bytes

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "howto" / "closed_loops.md"
# Blocks of the page that make the regions, and points of a drawn trajectory.
BLOCKS, POINTS = 2, 60


def regions():
    """Dict of the page's regions by name."""
    held = {"keras": keras, "np": np, "tfl": tfl}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    for text in blocks[:BLOCKS]:
        exec(text, held)
    return held["regions"]


def figure(found):
    """Both ellipses in the box, with trajectories from their boundaries, as SVG bytes."""
    import io

    from tf_lyapunov.evaluation.drawing import new_figure, style

    with style("light") as colours:
        page, (axes,) = new_figure(6.0, 4.0)
        for (name, region), colour in zip(
            found.items(), (colours["others"][0], colours["clean"]), strict=True
        ):
            paths = region.attack(10, steps=POINTS).trajectories.round(3)
            axes.plot(paths[..., 0], paths[..., 1], color=colour, linewidth=0.6, alpha=0.6)
            angle = np.linspace(0, 2 * np.pi, 120)
            edge = np.linalg.cholesky(np.linalg.inv(region.matrix)) @ [np.cos(angle), np.sin(angle)]
            axes.plot(*edge, color=colour, linewidth=2, label=f"{name}: area {region.volume:.3g}")
        h = region.box
        axes.plot([-h[0], h[0], h[0], -h[0], -h[0]], [-h[1], -h[1], h[1], h[1], -h[1]],
                  linestyle="--", color=colours["text"], linewidth=1, label="box")  # fmt: skip
        axes.set(xlabel="angle, rad", ylabel="speed, rad/s")
        axes.legend(loc="upper right")
        buffer = io.BytesIO()
        page.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white")
    return buffer.getvalue()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", help="SVG file to write")
    parser.add_argument("--trajectories", type=int, default=10_000, help="starts on each boundary")
    options = parser.parse_args()
    found = regions()
    for name, region in found.items():
        print(name, region)
        print("  ", region.attack(options.trajectories, steps=300))
        print("  ", region.compare(20_000))
    if options.figure:
        write_bytes(options.figure, figure(found))


if __name__ == "__main__":
    main()
