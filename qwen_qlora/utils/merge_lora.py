"""Merge the trained adapter into the 16-bit base model: `make qwen-merge`.

    python -m qwen_qlora.utils.merge_lora --model_name_or_path BASE --adapter_name_or_path ADAPTER --save_path MERGED

Reads a native checkpoint and a LoRA adapter trained on it, writes a checkpoint that needs no adapter.
"""

import argparse

from finetune.errors import run_main
from finetune.merge import merge_adapter


def main() -> None:
    """Parse the command line and merge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model_name_or_path", required=True, help="folder of the base model the adapter was trained on"
    )
    parser.add_argument("--adapter_name_or_path", required=True, help="folder of the LoRA adapter")
    parser.add_argument("--save_path", required=True, help="folder to write the merged model to")
    args = parser.parse_args()
    merge_adapter(args.model_name_or_path, args.adapter_name_or_path, args.save_path)


if __name__ == "__main__":
    run_main(main)
