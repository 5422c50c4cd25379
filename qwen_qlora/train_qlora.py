"""QLoRA fine-tuning of Qwen-14B-Chat, or of any native checkpoint, on conversation rows.

    python -m qwen_qlora.train_qlora --train_args_file qwen_qlora/config/qwen-14b-qlora.json
    torchrun --standalone --nproc_per_node 2 -m qwen_qlora.train_qlora \
        --train_args_file qwen_qlora/config/qwen-14b-qlora.json --learning_rate 1e-4 --output_dir outputs/lr1e-4

A flag beats the JSON file. Run again, it goes on from the newest complete checkpoint. Writes the adapter to
OUTPUT_DIR/final, loss.png and train_report.json. Exit status: 0 done, 2 something to mend, 143 or 130 stopped by a
signal and saved.
"""

from finetune.arguments import parse_arguments
from finetune.launch import run_rank


def main() -> int:
    """Command line."""
    arguments = parse_arguments(description=__doc__)
    from finetune.methods import QLORA
    from finetune.training import run_training

    return run_training(arguments, QLORA)


if __name__ == "__main__":
    run_rank(main)
