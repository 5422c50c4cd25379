"""llm_code.train with torch's own AdamW on 16-bit weights: weights and moments are rounded to the nearest number.

    python -m benchmarks.train_nearest --train_args_file JSON ...      # the flags of llm_code.train

What full fine-tuning without fp32 masters loses when nothing is done about it (benchmarks.masters).
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

from finetune.arguments import parse_arguments
from finetune.errors import run_main


def main(flags: Sequence[str] | None = None) -> int:
    """Train; the exit status of llm_code.train."""
    import torch

    from finetune.adamw import ADAM_NUMBERS
    from finetune.full import full_method
    from finetune.training import run_training

    arguments = parse_arguments(flags, description=__doc__)
    numbers = {"lr": arguments.train.learning_rate, **ADAM_NUMBERS}
    method = full_method(arguments)
    return run_training(arguments, replace(method, optimizer=lambda arguments, dtype: (torch.optim.AdamW, numbers)))


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
