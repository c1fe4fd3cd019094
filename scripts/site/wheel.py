"""Whether a wheel holds what its users need: `python scripts/site/wheel.py FILE.whl`.

Every experiment file, template and type marker of the checkout is in it, and nothing else than the
package.
"""

import pathlib
import sys
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[2]


def missing(wheel):
    """Files of the checkout that an installed library would lack, and strangers among its files."""
    held = set(zipfile.ZipFile(wheel).namelist())
    needed = {
        f"tf_lyapunov/configs/{path.relative_to(ROOT / 'configs').as_posix()}"
        for path in (ROOT / "configs").rglob("*.yaml")
    }
    for pattern in ("**/*.py", "py.typed", "evaluation/templates/*"):
        found = (ROOT / "tf_lyapunov").glob(pattern)
        needed |= {path.relative_to(ROOT).as_posix() for path in found if path.is_file()}
    strangers = {n for n in held if not n.startswith("tf_lyapunov") or n.endswith(".pyc")}
    return sorted(needed - held), sorted(strangers)


if __name__ == "__main__":
    lost, strange = missing(sys.argv[1])
    if lost or strange:
        sys.exit(f"The wheel lacks {lost} and should not hold {strange}.")
    print("The wheel holds every module, template and experiment file.")
