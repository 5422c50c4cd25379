#!/usr/bin/env bash
# Sourced by mmcu.sh and bleu.sh in the repository: reads the settings and, from BAICHUAN_EVAL_MODEL, sets the flags
# that name the model (array `model`), the way it answers (array `way`) and the end of its results' names (`suffix`).
# shellcheck disable=SC2034 # used where it is sourced
set -euo pipefail
settings="$(python3 scripts/settings.py shell)" # .env and the defaults, where the environment does not say it already
eval "$settings"

way=(--answer "${EVAL_ANSWER:-generate}")
case "${BAICHUAN_EVAL_MODEL:-final}" in
  final) model=(--model_name_or_path "${LLM_MODULE_MODEL_PATH:?set it in .env}") suffix="" ;;
  base) model=(--model_name_or_path "${BAICHUAN_MODEL_DIR:?set it in .env}") suffix="_base" ;;
  service)
    model=(--service_url "http://${BAICHUAN_HOST:-127.0.0.1}:${BAICHUAN_PORT:-10820}") suffix="_service"
    way=(--answer service)
    ;;
  *)
    echo "error: BAICHUAN_EVAL_MODEL must be base, final or service, got: $BAICHUAN_EVAL_MODEL" >&2
    exit 2
    ;;
esac
