"""Convert a Qwen-1 or Baichuan2-7B checkpoint to its native class, once.

    python -m finetune.checkpoint SOURCE TARGET [--keep_original 0|1]

Reads SOURCE shard by shard, writes TARGET (by way of TARGET.partial), verifies it and marks it with conversion.json.
Started again after an interruption it goes on; a finished conversion is left alone. A native checkpoint is not copied.
"""

import argparse

from finetune.errors import run_main


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="folder of the downloaded checkpoint")
    parser.add_argument("target", help="folder to write")
    parser.add_argument(
        "--keep_original",
        type=int,
        choices=(0, 1),
        default=1,
        help="0 removes each source file once its tensors are verified in the target (default 1)",
    )
    args = parser.parse_args()

    from finetune.checkpoint.convert import convert_checkpoint

    print(convert_checkpoint(args.source, args.target, keep_original=bool(args.keep_original)))


if __name__ == "__main__":
    run_main(main)
