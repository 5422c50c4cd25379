"""What a DeepSpeed file says, and how a run of several ranks uses DeepSpeed (ZeRO stages 1, 2, 3, with offloading).

A stage is called as in the plan: none, 1, 2, 3, 2-offload, 3-offload. DeepSpeed is imported only where a file is used.
"""

import contextlib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.json_files import read_json_object
from finetune.memory import STAGES

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

# The training JSON decides these; a block of DeepSpeed's would silently win over it.
DECIDED_ELSEWHERE = ("optimizer", "scheduler")


def read_zero_config(path: str | Path) -> dict[str, Any]:
    """A DeepSpeed file. Raises UserError when it is missing, no JSON, or decides what the training JSON decides."""
    config = read_json_object(path, "DeepSpeed file", "Look in llm_code/deepspeed_config/.")
    if not isinstance(config.get("zero_optimization", {}), dict):
        raise UserError(f"{path}: `zero_optimization` must be an object {{...}}. Look in llm_code/deepspeed_config/.")
    found = [name for name in DECIDED_ELSEWHERE if name in config]
    if found:
        raise UserError(
            f"{path} has the block `{found[0]}`, which would win over the training JSON (optim, learning_rate, "
            "lr_scheduler_type, warmup_steps). Remove it."
        )
    return config


def stage_of(path: str | Path | None) -> str:
    """Name of the stage that a DeepSpeed file sets; `none` without a file. Raises UserError like read_zero_config."""
    if not path:
        return "none"
    zero = read_zero_config(path).get("zero_optimization", {})
    offloads = any((zero.get(f"offload_{what}") or {}).get("device") == "cpu" for what in ("optimizer", "param"))
    name = f"{zero.get('stage')}-offload" if offloads else str(zero.get("stage"))
    if name not in STAGES[1:]:
        raise UserError(f"{path}: expected zero_optimization with a stage of {', '.join(STAGES[1:])}, found {name}.")
    return name


def check_final_weights(path: str | Path | None, save_strategy: str) -> None:
    """Raises UserError where stage 3 would end without weights: neither gathered nor in a checkpoint."""
    zero = read_zero_config(path).get("zero_optimization", {}) if path else {}
    key = "stage3_gather_16bit_weights_on_model_save"
    if zero.get("stage") == 3 and not zero.get(key) and save_strategy == "no":
        raise UserError(
            f"{path}: without {key} final/ is put together from a checkpoint, and save_strategy is no. "
            "Set one of them to another value."
        )


def join_group() -> None:
    """Make DeepSpeed know the process group before a model is loaded.

    transformers starts torch's group alone on a CPU; ZeRO-3 would then partition the weights over a single rank.
    """
    import logging

    import deepspeed
    import torch

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")


def gather_whole_layers(model: "PreTrainedModel") -> None:
    """Have stage 3 gather a decoder layer as a whole: one transfer and one set of hooks, not one for each matrix.

    The hooks are Python, and a card waits for them where its kernels are short. `model` has its layers in
    `.model.layers`; to be called before DeepSpeed wraps it.
    """
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, [type(model.model.layers[0])])


def parameter_count(parameter: "nn.Parameter") -> int:
    """Numbers in a parameter; ZeRO-3 leaves an empty tensor of it and notes the size."""
    return getattr(parameter, "ds_numel", parameter.numel())


def local_ranks() -> int:
    """Ranks on this machine; torchrun and DeepSpeed's launcher say it by different names."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def weights_from_zero(checkpoint: Path, target: Path, dtype: "torch.dtype") -> None:
    """Put together the weights of a checkpoint whose ranks saved their parts alone, as safetensors files of `dtype`."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict

    from finetune.checkpoint.manifest import MAX_SHARD_BYTES

    step = step_folder(checkpoint)
    with contextlib.redirect_stdout(io.StringIO()):
        convert_zero_checkpoint_to_state_dict(
            str(checkpoint), str(target), dtype, MAX_SHARD_BYTES, safe_serialization=True, tag=step.name
        )


def step_folder(checkpoint: Path) -> Path:
    """The folder of DeepSpeed's states in a checkpoint. Raises UserError where there is none."""
    found = sorted(checkpoint.glob("global_step*"))
    if not found:
        raise UserError(
            f"{checkpoint}: expected DeepSpeed's states (global_step...), found none. Copy it again, or remove the "
            "folder to go on from an earlier one."
        )
    return found[-1]
