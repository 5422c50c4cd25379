#!/usr/bin/env bash
# The service over the fine-tuned model: OpenAI's protocol at /v1, the walkthrough's question at /internal/ask.
#
# usage: bash llm_code/service/server.sh [--max_batch 16 ...]
#
# Flags go to llm_code/service/server.py. From the environment, else from .env:
#   ENVS_DIR                       llm_env lies there
#   LLM_MODULE_MODEL_PATH          the model
#   BAICHUAN_HOST, BAICHUAN_PORT   where it listens; any address but loopback needs API_KEY
#   API_KEY                        keys that clients must send
#   ENGINE, UPSTREAM_URL           local, or vllm: the server at UPSTREAM_URL, else `vllm serve` started here
#   BG=1 detaches the service, DRY_RUN=1 prints the command
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
settings="$(python3 scripts/settings.py shell)" # .env and the defaults, where the environment does not say it already
eval "$settings"

flags=(--engine "${ENGINE:-local}" --host "${BAICHUAN_HOST:-127.0.0.1}" --port "${BAICHUAN_PORT:-10820}")
[[ -z "${UPSTREAM_URL:-}" ]] || flags+=(--upstream_url "$UPSTREAM_URL")
exec python3 scripts/run_step.py run baichuan-serve --env "${ENVS_DIR:?set it in .env}/llm_env" -- \
  python -m llm_code.service.server --model_name_or_path "${LLM_MODULE_MODEL_PATH:?set it in .env}" "${flags[@]}" "$@"
