"""Load a model for inference: a base or merged checkpoint, an adapter on its base, in 16 bit, 32 bit or NF4."""

import os
import subprocess
import warnings
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.identity import check_adapter
from finetune.json_files import read_json_object
from finetune.tensor_files import INDEX, SINGLE, tensor_places

LEGACY_TYPES = ("qwen", "baichuan")
# Steps that make the folders which .env names; every other model folder is a download's.
MADE_BY = {
    "QWEN_MODEL_DIR": "`make qwen-download`",
    "BAICHUAN_MODEL_DIR": "`make baichuan-download`",
    "LLM_MODULE_MODEL_PATH": "`make baichuan-train` and `make baichuan-finalize`",
    "QWEN_MERGED_DIR": "`make qwen-merge`",
}
NO_TOKENIZER = "expected a tokenizer (tokenizer.json, tokenizer.model or vocab.json), found none that can be read."
DOWNLOADS = "`make qwen-download` (or `make baichuan-download`)"


def _run_first(folder: Path) -> str:
    """What makes this folder."""
    made = (step for key, step in MADE_BY.items() if os.environ.get(key) and Path(os.environ[key]) == folder)
    return f"Run {next(made, DOWNLOADS)} first, or name another folder in .env."


def check_model_dir(model_dir: str | Path) -> Path:
    """The folder as a Path. Raises UserError unless it holds a checkpoint that current transformers has a class for."""
    folder = Path(model_dir)
    config_path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a model folder, found nothing there. {_run_first(folder)}")
    if not config_path.exists():
        raise UserError(f"{folder}: expected a model folder, found no config.json. {_run_first(folder)}")
    kind = read_json_object(config_path, "model configuration", _run_first(folder)).get("model_type")
    if kind in LEGACY_TYPES:
        raise UserError(
            f"{folder} is in the original {kind} layout, which current transformers no longer runs. "
            f"Convert it: python -m finetune.checkpoint {folder} {folder}-native"
        )
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise UserError(f"{folder}: expected weights (*.safetensors), found none. {_run_first(folder)}")
    return folder


def refuse_unseen_card() -> None:
    """Raises UserError where nvidia-smi lists a card that torch does not see: hours on the processor are not meant.

    So it is with an old driver, or with an environment that was made for the processor. CUDA_VISIBLE_DEVICES=-1 says
    that the processor is meant.
    """
    import torch

    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.SubprocessError):
        return
    cards = [line.partition(" (")[0] for line in done.stdout.splitlines() if line.startswith("GPU ")]
    if cards and not done.returncode:
        raise UserError(
            f"this machine has a card ({cards[0]}), but torch {torch.__version__} does not see it, and all would run "
            "on the processor. make doctor tells whether the driver is too old or the environment is to be made again. "
            "To use the processor all the same: CUDA_VISIBLE_DEVICES=-1"
        )


def default_dtype() -> str:
    """bfloat16 on a card that computes in it, float16 on an older one, float32 on a CPU.

    On a CPU float32 is the exact choice and no slower: without AMX, PyTorch emulates bfloat16 products.
    """
    import torch

    if not torch.cuda.is_available():
        return "float32"
    # torch says that it supports bfloat16 on a V100 too: it emulates it.
    return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"


def load_tokenizer(model_name_or_path: str | Path) -> Any:
    """The checkpoint's tokenizer. Raises UserError like check_model_dir."""
    folder = check_model_dir(model_name_or_path)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {NO_TOKENIZER} {_run_first(folder)}") from error
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # transformers makes an empty one where no file is
        raise UserError(f"{folder}: {NO_TOKENIZER} {_run_first(folder)}")
    return tokenizer


def load_for_inference(
    model_name_or_path: str | Path,
    adapter_name_or_path: str | Path | None = None,
    load_in_4bit: bool = False,
    dtype: str | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer), in evaluation mode, on the first visible GPU or the CPU.

    `dtype` (bfloat16, float16, float32) defaults to default_dtype(). An adapter stays beside its base and is not
    merged into it; in 16 bits its terms are added as in training, before an output is rounded. Raises UserError on
    a missing folder, an unconverted checkpoint, or an adapter of another base model.
    """
    folder = check_model_dir(model_name_or_path)
    if adapter_name_or_path is not None:
        check_adapter(adapter_name_or_path, folder)
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.nf4 import keep_layout, nf4_config

    refuse_unseen_card()
    if (folder / INDEX).exists() or (folder / SINGLE).exists():
        tensor_places(folder)  # a missing or a torn file is told in a line
    dtype = dtype or default_dtype()
    options = {"quantization_config": nf4_config(getattr(torch, dtype))} if load_in_4bit else {}
    if torch.cuda.is_available():  # a device map that names the CPU makes peft offload the model
        options["device_map"] = {"": 0}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True, **options)
    keep_layout(model)
    if adapter_name_or_path is not None:
        from peft import PeftModel

        with warnings.catch_warnings():  # of peft's own use of a name that transformers renamed
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            model = PeftModel.from_pretrained(model, str(adapter_name_or_path))
        if dtype != "float32":
            from finetune.projection import fuse_for_inference

            fuse_for_inference(model)
    return model.eval(), load_tokenizer(folder)
