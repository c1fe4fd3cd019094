#!/usr/bin/env bash
# Builds the documentation site into site/, strictly; with --check a browser opens it afterwards:
#   bash scripts/site.sh [--check]
# While writing: `.venv/bin/mkdocs serve` shows pages as they change.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "${TFL_EXTRAS:-all}"
export NO_MKDOCS_2_WARNING=1
version="$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' tf_lyapunov/__init__.py)"
folder="site/$(cut -d. -f1,2 <<< "$version")"
"$venv/bin/python" -m mkdocs build --quiet --strict --clean --site-dir "$folder"
"$venv/bin/python" scripts/site/versions.py site "$version"
echo "Built $folder: open site/index.html"
if [ "${1:-}" = "--check" ]; then
  shift
  "$venv/bin/python" scripts/site/check.py "$folder" "$@"
fi
