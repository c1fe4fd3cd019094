"""Runs the README's first example where one backend alone is installed, and the command beside it.

python scripts/site/example.py README.md BACKEND
"""

import importlib.util
import pathlib
import re
import subprocess
import sys


def main(readme, backend):
    for other in {"tensorflow", "jax", "torch"} - {backend}:
        assert importlib.util.find_spec(other) is None, f"{other} is installed too"
    block = re.search(
        r"^```python\n(.*?)^```$", pathlib.Path(readme).read_text("utf-8"), re.M | re.S
    )
    names = {}
    exec(compile(block[1], readme, "exec"), names)
    assert names["proof"].certified_accuracy(0.3) <= names["attack"].robust_accuracy
    assert "site-packages" in names["tfl"].__file__, names["tfl"].__file__
    command = pathlib.Path(sys.executable).with_name("tf-lyapunov")
    shown = subprocess.run([command, "configs", "list"], check=True, capture_output=True, text=True)
    assert "lyapunov/digits" in shown.stdout
    print(f"The README's example runs from the wheel with {backend} alone.")


if __name__ == "__main__":
    main(*sys.argv[1:])
