"""Full-parameter fine-tuning of Baichuan2-7B, or of any native checkpoint, on conversation rows.

    python -m llm_code.train --train_args_file llm_code/training_config/baichuan2_config.json --deepspeed none
    deepspeed --num_gpus 2 --master_port 65224 --no_local_rank --module llm_code.train \
        --train_args_file llm_code/training_config/baichuan2_config.json

A flag beats the JSON file. `deepspeed` names a file of llm_code/deepspeed_config/, or is `none`. Run
again, it goes on from the newest complete checkpoint. Writes the model to OUTPUT_DIR/final, loss.png and
train_report.json. Exit status: 0 done, 2 something to mend, 143 or 130 stopped by a signal and saved.
"""

from finetune.arguments import parse_arguments
from finetune.launch import run_rank


def main() -> int:
    """Command line."""
    arguments = parse_arguments(description=__doc__)
    from finetune.full import full_method
    from finetune.training import run_training

    return run_training(arguments, full_method(arguments))


if __name__ == "__main__":
    run_rank(main)
