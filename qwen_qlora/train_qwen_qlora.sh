#!/usr/bin/env bash
# QLoRA fine-tuning on this machine's GPUs, on the CPU where there is none.
#
# usage: bash qwen_qlora/train_qwen_qlora.sh [--learning_rate 1e-4 ...]
#
# Flags go to qwen_qlora/train_qlora.py and beat the JSON file. From the environment, else from .env:
#   ENVS_DIR               qwen_env lies there
#   QWEN_TRAIN_CONFIG      the JSON file; QWEN_MODEL_DIR, QWEN_TRAIN_FILE, QWEN_OUTPUT_DIR beat the paths in it
#   CUDA_VISIBLE_DEVICES   one process for each card listed; unset or empty: each card found
#   BG=1 detaches the run, DRY_RUN=1 prints the command
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
settings="$(python3 scripts/settings.py shell)" # .env and the defaults, where the environment does not say it already
eval "$settings"
[[ -n "${CUDA_VISIBLE_DEVICES:-}" ]] || unset CUDA_VISIBLE_DEVICES # set and empty would hide every card

num_processes() {
  if ! command -v nvidia-smi >/dev/null; then
    echo 1
  elif [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .
  else
    local cards
    cards="$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)" # it is there, but may list no card
    echo "$((cards > 0 ? cards : 1))"
  fi
}

main() {
  local processes
  processes="$(num_processes)"
  # Threads that wait must sleep: spinning ones take the cores from the other processes.
  export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(nproc) + processes - 1) / processes))}"
  local flags=(--train_args_file "${QWEN_TRAIN_CONFIG:-qwen_qlora/config/qwen-14b-qlora.json}")
  [[ -z "${QWEN_MODEL_DIR:-}" ]] || flags+=(--model_name_or_path "$QWEN_MODEL_DIR")
  [[ -z "${QWEN_TRAIN_FILE:-}" ]] || flags+=(--train_file "$QWEN_TRAIN_FILE")
  [[ -z "${QWEN_OUTPUT_DIR:-}" ]] || flags+=(--output_dir "$QWEN_OUTPUT_DIR")
  exec python3 scripts/run_step.py run qwen-train --env "${ENVS_DIR:?set it in .env}/qwen_env" -- \
    python -m finetune.launch torchrun --standalone --nproc_per_node "$processes" \
    -m qwen_qlora.train_qlora "${flags[@]}" "$@"
}

main "$@"
