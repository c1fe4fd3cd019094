"""An environment that holds a wheel, what it requires, and no more, without a download.

    python scripts/site/environment.py FOLDER FILE.whl [REQUIREMENT ...]

Makes a virtual environment in FOLDER. The requirements of the wheel and those given, with theirs,
are links to what is installed beside this interpreter; the wheel itself is installed by pip. What
is not required, directly or not, cannot be imported there, as on a machine that has nothing else.
"""

import importlib.metadata
import pathlib
import subprocess
import sys
import sysconfig
import venv

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def required(requirements):
    """Installed distributions that the requirements need: dict by canonical name."""
    found, waiting, seen = {}, [Requirement(r) for r in requirements], set()
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        held = importlib.metadata.distribution(wanted.name)
        if held.version not in wanted.specifier:
            sys.exit(f"{wanted} is required, and {held.version} is installed.")
        found[name] = held
        for extra in ("", *wanted.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for line in held.requires or ():
                further = Requirement(line)
                if further.marker is None or further.marker.evaluate({"extra": extra}):
                    waiting.append(further)
    return found


def link(distributions, packages):
    """Links the files of installed distributions into a folder of packages."""
    for name, held in distributions.items():
        for top in sorted({file.parts[0] for file in held.files or ()}):
            if top in ("..", "__pycache__"):
                continue
            place = packages / top
            if place.exists():
                sys.exit(f"{name} shares {top} with another distribution.")
            place.symlink_to(pathlib.Path(held.locate_file(top)).resolve())


def main(folder, wheel, *requirements):
    folder = pathlib.Path(folder).resolve()
    venv.create(folder, symlinks=True)
    base = {"base": str(folder), "platbase": str(folder)}
    packages = pathlib.Path(sysconfig.get_path("purelib", "venv", base))
    (metadata,) = importlib.metadata.distributions(path=[wheel])
    needed = [r for r in metadata.requires if "extra ==" not in r]
    link(required([*needed, *requirements]), packages)
    interpreter = folder / sysconfig.get_path("scripts", "venv", base) / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter)]
    quiet = ["--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", *quiet, "--no-index", "--no-deps", wheel], check=True)
    subprocess.run([*pip, "check", "--disable-pip-version-check"], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
