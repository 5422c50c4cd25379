"""What a DeepSpeed file says, and how a run of several ranks uses DeepSpeed (ZeRO stages 1, 2, 3, with offloading).

A stage is called as in the plan: none, 1, 2, 3, 2-offload, 3-offload. DeepSpeed is imported only where a file is used.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.memory import STAGES

if TYPE_CHECKING:
    from torch import nn

# The training JSON decides these; a block of DeepSpeed's would silently win over it.
DECIDED_ELSEWHERE = ("optimizer", "scheduler")


def read_zero_config(path: str | Path) -> dict[str, Any]:
    """A DeepSpeed file. Raises UserError when it is missing, no JSON, or decides what the training JSON decides."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"DeepSpeed file {path}: {error.strerror}. Look in llm_code/deepspeed_config/.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}.") from None
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
    offloads = any(zero.get(f"offload_{what}", {}).get("device") == "cpu" for what in ("optimizer", "param"))
    name = f"{zero.get('stage')}-offload" if offloads else str(zero.get("stage"))
    if name not in STAGES[1:]:
        raise UserError(f"{path}: expected zero_optimization with a stage of {', '.join(STAGES[1:])}, found {name}.")
    return name


def join_group() -> None:
    """Make DeepSpeed know the process group before a model is loaded.

    transformers starts torch's group alone on a CPU; ZeRO-3 would then partition the weights over a single rank.
    """
    import logging

    import deepspeed
    import torch

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")


def parameter_count(parameter: "nn.Parameter") -> int:
    """Numbers in a parameter; ZeRO-3 leaves an empty tensor of it and notes the size."""
    return getattr(parameter, "ds_numel", parameter.numel())


def local_ranks() -> int:
    """Ranks on this machine; torchrun and DeepSpeed's launcher say it by different names."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
