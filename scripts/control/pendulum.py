"""The pendulum of docs/howto/closed_loops.md: its figure, and attacks by many trajectories.

    python scripts/control/pendulum.py --trajectories 100000 --figure FILE.svg

Runs the Python blocks of the page up to the regions, as the tests do. Each region stands beside the
ellipse that the settings of Yin, Seiler and Arcak's program give for the same controller, solved
again here: |W₁x| ≤ 0.5 in every unit, |x₁| ≤ 2.5 and the least trace of P, by sectors alone.
"""

import argparse
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the folders of scripts

import keras
import numpy as np

import tf_lyapunov as tfl
from control.regions import picture
from tf_lyapunov.control import search
from tf_lyapunov.verification import loops
from tf_lyapunov.verification.reading import read_with_calls
from tf_lyapunov.writing import write_bytes

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "howto" / "closed_loops.md"
# Blocks of the page that make the regions, and points of a drawn trajectory.
BLOCKS, POINTS = 2, 60
# Bound on the first layer's signals in the published program, and a rate of almost 1.
PUBLISHED, ALMOST = 0.5, 1 - 1e-6


def regions():
    """Dict of the page's regions by name."""
    held = {"keras": keras, "np": np, "tfl": tfl}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    for text in blocks[:BLOCKS]:
        exec(text, held)
    return held["regions"]


def fixed(region):
    """Area of the ellipse for the published settings; 0 where the solver finds none."""
    network = read_with_calls(region.controller)[1]
    chain, arrays = loops.controller_of(network), region.plant.arrays()
    first = np.full(len(chain.weights[0]), PUBLISHED)
    found = search.solve(
        arrays, chain, region.box, first, region.box[:1], ALMOST, "clarabel",
        start=np.eye(2), rounds=1,
    )  # fmt: skip
    return 0.0 if found is None else float(np.pi * np.exp(-found.size))


def figure(found):
    """Both ellipses in the box, as SVG bytes."""
    return picture(found, (0, 1), POINTS, ("angle, rad", "speed, rad/s"), "area")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", help="SVG file to write")
    parser.add_argument(
        "--trajectories",
        type=int,
        default=10_000,
        help="inside; a tenth on the boundary",
    )
    options = parser.parse_args()
    found = regions()
    for name, region in found.items():
        print(name, region)
        print(f"   area {region.volume:.4g}, of the published settings {fixed(region):.4g}")
        print("   boundary:", region.attack(options.trajectories // 10))
        print("   from inside:", region.attack(options.trajectories, inside=True))
        print("  ", region.compare(20_000))
    if options.figure:
        write_bytes(options.figure, figure(found))


if __name__ == "__main__":
    main()
