#!/usr/bin/env bash
# MMCU on the fine-tuned model, the base model, or what the service runs.
#
# usage: bash llm_code/llm_evaluation/mmcu.sh [--limit 500 ...]
#
# Flags go to llm_code/llm_evaluation/mmcu.py. From the environment, else from .env:
#   ENVS_DIR              llm_env lies there
#   BAICHUAN_EVAL_MODEL   final (LLM_MODULE_MODEL_PATH), base (BAICHUAN_MODEL_DIR), service (BAICHUAN_HOST and _PORT)
#   MMCU_DATA_DIR, MMCU_NTRAIN, EVAL_ANSWER   the workbooks, worked examples, the way to answer
#   EVAL_RESULT_DIR       results go to mmcu/, mmcu_base/ or mmcu_service/ in it, or into a folder in that
#                         where a run with other settings stands
#   BG=1 detaches the run, DRY_RUN=1 prints the command
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=llm_code/llm_evaluation/model_flags.sh
source llm_code/llm_evaluation/model_flags.sh

exec python3 scripts/run_step.py run baichuan-eval-mmcu --env "${ENVS_DIR:?set it in .env}/llm_env" -- \
  python -m llm_code.llm_evaluation.mmcu --data_dir "${MMCU_DATA_DIR:?set it in .env}" --ntrain "${MMCU_NTRAIN:-0}" \
  --save_dir "$EVAL_RESULT_DIR/mmcu$suffix" "${model[@]}" "${way[@]}" "$@"
