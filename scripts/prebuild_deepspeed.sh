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

# Whether a kernel is there and made of this environment's sources: DeepSpeed would build another one's again.
packages="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
built() {
  local folder
  for folder in "$extensions"/{,*/}"$1"; do
    if [[ -f "$folder/$1.so" ]] && grep -qF "$packages/" "$folder/build.ninja"; then return 0; fi
  done
  return 1
}
if built deepspeed_shm_comm && built cpu_adam; then exit 0; fi
# What a killed build left would make torch wait for it for ever.
rm -f "$extensions"/{,*/}{deepspeed_shm_comm,cpu_adam}/lock
PATH="$(dirname "$python"):$PATH" DS_ACCELERATOR=cpu MAX_JOBS="${MAX_JOBS:-1}" nice "$python" - <<'PY'
from deepspeed.accelerator import get_accelerator

for name in ("ShareMemCommBuilder", "CPUAdamBuilder"):
    get_accelerator().create_op_builder(name).load()
PY
