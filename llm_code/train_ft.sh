#!/usr/bin/env bash
# Full-parameter fine-tuning on the cards of BAICHUAN_GPUS, or on the machines of HOSTFILE.
#
# usage: bash llm_code/train_ft.sh [--learning_rate 2e-5 ...]      flags go to llm_code/train.py and beat the JSON file
#
# From the environment, else from .env: ENVS_DIR, MASTER_PORT, BAICHUAN_{GPUS,TRAIN_CONFIG,MODEL_DIR,TRAIN_FILE,OUTPUT_DIR},
# DEEPSPEED_STAGE=none|1|2|3|2-offload|3-offload|auto, HOSTFILE; BG=1 detaches the run, DRY_RUN=1 prints the command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
settings="$(python3 scripts/settings.py shell)"
eval "$settings"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

refuse() { echo "error: $1" >&2 && exit 2; }

# Every number in BAICHUAN_GPUS is that of a card of this machine, where it has any that nvidia-smi sees.
check_cards() {
  local cards number
  cards="$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)"
  ((cards)) || return 0
  for number in ${gpus//,/ }; do
    ((number < cards)) && continue
    refuse "BAICHUAN_GPUS=$gpus names card $number, this machine has $cards, counted from 0: set BAICHUAN_GPUS=$(seq -s , 0 $((cards - 1)))"
  done
}

python="${ENVS_DIR:?set it in .env}/llm_env/bin/python"
[[ -x "$python" ]] || python=python3
gpus="${BAICHUAN_GPUS:-0,1}" port="${MASTER_PORT:-65224}" stage="${DEEPSPEED_STAGE:-auto}"
count="$(tr ',' '\n' <<<"$gpus" | grep -c .)"
[[ " auto none 1 2 3 2-offload 3-offload " == *" $stage "* ]] ||
  refuse "DEEPSPEED_STAGE must be auto, none, 1, 2, 3, 2-offload or 3-offload, got: $stage"
[[ -n "${HOSTFILE:-}" ]] || check_cards
[[ -z "${HOSTFILE:-}" ]] || count="$("$python" -m finetune.hosts --count "$HOSTFILE")"
flags=(--train_args_file "${BAICHUAN_TRAIN_CONFIG:-llm_code/training_config/baichuan2_config.json}")
[[ -z "${BAICHUAN_MODEL_DIR:-}" ]] || flags+=(--model_name_or_path "$BAICHUAN_MODEL_DIR")
[[ -z "${BAICHUAN_TRAIN_FILE:-}" ]] || flags+=(--train_file "$BAICHUAN_TRAIN_FILE")
[[ -z "${BAICHUAN_OUTPUT_DIR:-}" ]] || flags+=(--output_dir "$BAICHUAN_OUTPUT_DIR")
asked=(--num_gpus "$count" ${HOSTFILE:+--several_machines})
[[ "$stage" != auto ]] || stage="$(CUDA_VISIBLE_DEVICES="$gpus" "$python" -m llm_code.choose_stage "${asked[@]}" "${flags[@]}" "$@")"

if [[ "$stage" == none ]]; then
  [[ -z "${HOSTFILE:-}" ]] || refuse "DEEPSPEED_STAGE=none is for the cards of one machine, unset HOSTFILE or set a stage"
  export CUDA_VISIBLE_DEVICES="$gpus"
  launcher=(python -m llm_code.train)
  ((count == 1)) || launcher=(python -m finetune.launch torchrun --standalone --nproc_per_node "$count" -m llm_code.train)
else
  unset CUDA_VISIBLE_DEVICES # deepspeed sets it for each process
  cards=(--num_gpus "$count")
  ! command -v nvidia-smi >/dev/null || cards=(--include "localhost:$gpus")
  launcher=(python -m finetune.launch deepspeed --quiet "${cards[@]}" --master_port "$port")
  [[ -z "${HOSTFILE:-}" ]] || launcher=(python -m finetune.hosts --hostfile "$HOSTFILE" --master_port "$port" --)
  launcher+=(--no_local_rank --module llm_code.train)
  stage="llm_code/deepspeed_config/deepspeed_stage_${stage/-/_}_config.json"
fi
exec python3 scripts/run_step.py run baichuan-train --env "$ENVS_DIR/llm_env" -- "${launcher[@]}" "${flags[@]}" --deepspeed "$stage" "$@"
