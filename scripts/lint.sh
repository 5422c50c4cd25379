#!/usr/bin/env bash
# Check the style of every Python and shell file:   bash scripts/lint.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python3 scripts/environment.py .venv
.venv/bin/ruff check
.venv/bin/ruff format --check
mapfile -t shells < <(git ls-files -co --exclude-standard '*.sh' '.ci/run')
shellcheck "${shells[@]}"
