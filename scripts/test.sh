#!/usr/bin/env bash
# Run the tests in .venv, which is created first if it is missing:   bash scripts/test.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python3 scripts/environment.py .venv
bash scripts/prebuild_deepspeed.sh >/dev/null 2>&1 & # tests that need it wait for it
# Two processes, each test file in one of them: a file's fixtures (tiny models) are built once.
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
