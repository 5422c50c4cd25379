"""Where the project's steps find the fine-tuned model."""

import os

from scripts.settings import resolve


def model_path() -> str | None:
    """LLM_MODULE_MODEL_PATH of the environment or .env, else final/ in BAICHUAN_OUTPUT_DIR, None without either."""
    values = {key: value for key, value in resolve().items() if value}
    output_dir = values.get("BAICHUAN_OUTPUT_DIR")
    return values.get("LLM_MODULE_MODEL_PATH") or (os.path.join(output_dir, "final") if output_dir else None)


LLM_MODULE_MODEL_PATH = model_path()
