"""A training program of ours or a peer's in float32, on a card too.

    python -m benchmarks.train_exact qwen_qlora.train_qlora --train_args_file JSON ...
    python -m benchmarks.train_exact benchmarks.train_peer padded --train_args_file JSON ...

In 16 bits every way rounds elsewhere, and the losses of two that compute the same differ in the third decimal. In
float32 they do not, so here a difference is a difference of what is computed.
"""

import runpy
import sys

from finetune import prepare
from finetune.errors import UserError, run_main


def main() -> None:
    """Run the module that the first word names with the other words. Raises UserError without a module."""
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        raise UserError("the first word names the program, as in `python -m benchmarks.train_exact MODULE flags`.")
    prepare.compute_dtype = lambda wants_bf16: "float32"
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run_main(main)
