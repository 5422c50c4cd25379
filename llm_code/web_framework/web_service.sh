#!/usr/bin/env bash
# The chat page in the browser, on 127.0.0.1; the service (make baichuan-serve) answers it.
#
# usage: bash llm_code/web_framework/web_service.sh [--feedback_file FILE]
#
# Flags go to llm_code/web_framework/web_app.py. From the environment, else from .env:
#   ENVS_DIR            llm_env lies there
#   BAICHUAN_WEB_PORT   where the page listens
#   BAICHUAN_PORT       where the service listens
#   API_KEY             what the service asks for
#   BG=1 detaches the page, DRY_RUN=1 prints the command
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
settings="$(python3 scripts/settings.py shell)" # .env and the defaults, where the environment does not say it already
eval "$settings"

exec python3 scripts/run_step.py run baichuan-web --env "${ENVS_DIR:?set it in .env}/llm_env" -- \
  python -m llm_code.web_framework.web_app --port "${BAICHUAN_WEB_PORT:-17860}" \
  --service_url "http://127.0.0.1:${BAICHUAN_PORT:-10820}/v1" "$@"
