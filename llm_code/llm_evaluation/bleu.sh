#!/usr/bin/env bash
# Answers to the psychology questions and their BLEU, of the fine-tuned model, the base model, or what the service runs.
#
# usage: bash llm_code/llm_evaluation/bleu.sh [--limit 50 ...]
#
# Flags go to llm_code/llm_evaluation/bleu.py. From the environment, else from .env:
#   ENVS_DIR              llm_env lies there
#   BAICHUAN_EVAL_MODEL   final (LLM_MODULE_MODEL_PATH), base (BAICHUAN_MODEL_DIR), service (BAICHUAN_HOST and _PORT)
#   BAICHUAN_BLEU_FILE, EVAL_ANSWER           the questions, the way to answer (generate or engine)
#   EVAL_RESULT_DIR       results go to psychology_result.txt and bleu/psychology_result_bleu.txt in it,
#                         into a folder beside each where a run with other settings stands
#   BG=1 detaches the run, DRY_RUN=1 prints the command
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=llm_code/llm_evaluation/model_flags.sh
source llm_code/llm_evaluation/model_flags.sh

[[ "${way[1]}" != likelihood ]] || way=(--answer generate) # a text has no list of labels
exec python3 scripts/run_step.py run baichuan-eval-bleu --env "${ENVS_DIR:?set it in .env}/llm_env" -- \
  python -m llm_code.llm_evaluation.bleu --test_file "$BAICHUAN_BLEU_FILE" \
  --input_file "$EVAL_RESULT_DIR/psychology_result$suffix.txt" \
  --save_file "$EVAL_RESULT_DIR/bleu/psychology_result_bleu$suffix.txt" "${model[@]}" "${way[@]}" "$@"
