# Sourced by quickstart.sh and test.sh: creates the virtual environment once and installs the extras.
# Usage: source scripts/setup.sh EXTRAS
extras="$1"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${TFL_VENV:-.venv}"
python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; then
  echo "Python 3.11, 3.12 or 3.13 is needed. Received: $("$python" --version). Set PYTHON to one of them." >&2
  exit 2
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
stamp="$venv/.installed-$extras"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  echo "Installing tf_lyapunov[$extras] into $venv (once) ..."
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
  touch "$stamp"
fi
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}"
