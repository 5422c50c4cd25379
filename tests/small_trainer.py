"""The trainer on a random two-layer Qwen2 in float32, in this process.

Rows are random ids, every second half supervised.
"""

import os
import random
import signal
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from finetune.attention import enable_padding_free_attention
from finetune.checkpointing import RunPlan
from finetune.conversation import Sample
from finetune.loss import enable_chunked_loss
from finetune.trainer import UpdateTrainer

VOCABULARY = 97
ROWS_PER_UPDATE = 4
IDENTITY = {"base_model": "abc", "train_data": "def", "rows_per_update": ROWS_PER_UPDATE}


def make_samples(count: int = 21, seed: int = 1) -> list[Sample]:
    """Rows of 4 to 20 tokens; the second half of each is supervised."""
    draw = random.Random(seed)
    samples = []
    for line in range(1, count + 1):
        ids = [draw.randrange(VOCABULARY) for _ in range(draw.randint(4, 20))]
        half = len(ids) // 2
        samples.append(Sample(ids, [-100] * half + ids[half:], line))
    return samples


def make_model(dropout: float = 0.0) -> torch.nn.Module:
    set_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    if dropout:
        from peft import LoraConfig, get_peft_model

        enable_chunked_loss(model)
        enable_padding_free_attention(model)
        lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "v_proj", "down_proj"])
        return get_peft_model(model, lora)
    return enable_padding_free_attention(enable_chunked_loss(model))


def make_trainer(
    folder: Path, samples: list[Sample] | None = None, model=None, budget: int = 40, **changes
) -> UpdateTrainer:
    evaluation = changes.pop("evaluation", [])
    limit = changes.pop("save_total_limit", 1)
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "optim": "adamw_torch",
        "max_grad_norm": 0.5,
        "report_to": "none",
        "disable_tqdm": True,
        **changes,
    }
    plan = RunPlan(ROWS_PER_UPDATE, budget, IDENTITY, save_total_limit=limit, eval_samples=evaluation)
    trainer = UpdateTrainer(
        model=model or make_model(), args=TrainingArguments(**settings), samples=samples or make_samples(), plan=plan
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def losses(trainer: UpdateTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def updates_of(trainer: UpdateTrainer) -> list[list[int]]:
    return [trainer.train_dataset[index].rows for index in range(len(trainer.train_dataset))]


class Kill(TrainerCallback):
    """Sends this process a signal while an update is being computed."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)
