#!/usr/bin/env bash
# Build the two kernels that DeepSpeed compiles at its first start on a CPU, some minutes once per machine.
#
# usage: bash scripts/prebuild_deepspeed.sh [PYTHON]      default: .venv/bin/python
#
# They land in TORCH_EXTENSIONS_DIR (~/.cache/torch_extensions). A second call waits for the first and returns.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="$(realpath -s "${1:-.venv/bin/python}")"
extensions="${TORCH_EXTENSIONS_DIR:-$HOME/.cache/torch_extensions}"
mkdir -p "$extensions"
exec 9>"$extensions/prebuild.lock"
flock 9

built() { compgen -G "$extensions/*/$1/$1.so" >/dev/null || compgen -G "$extensions/$1/$1.so" >/dev/null; }
if built deepspeed_shm_comm && built cpu_adam; then exit 0; fi
# What a killed build left would make torch wait for it for ever.
rm -f "$extensions"/{,*/}{deepspeed_shm_comm,cpu_adam}/lock
PATH="$(dirname "$python"):$PATH" DS_ACCELERATOR=cpu MAX_JOBS="${MAX_JOBS:-1}" nice "$python" - <<'PY'
from deepspeed.accelerator import get_accelerator

for name in ("ShareMemCommBuilder", "CPUAdamBuilder"):
    get_accelerator().create_op_builder(name).load()
PY
