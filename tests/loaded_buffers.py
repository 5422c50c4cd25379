"""Load a model as training does and print its buffers as JSON: name -> dtype, values (for tests/test_zero.py).

python -m deepspeed.launcher.runner --num_gpus 1 --no_local_rank --module tests.loaded_buffers FLAGS OF TRAINING
"""

import json
import sys

import torch

from finetune.arguments import parse_arguments
from finetune.full import full_method
from finetune.prepare import training_arguments


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    device = training_arguments(arguments, "bfloat16").device
    model = full_method(arguments).load(arguments, torch.bfloat16, device)
    print(json.dumps({name: [str(value.dtype), value.tolist()] for name, value in model.named_buffers()}))


if __name__ == "__main__":
    main()
