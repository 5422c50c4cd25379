"""Unsloth's model on rows packed without padding, as benchmarks.train_peer runs it (written for 2026.10).

Import this before transformers: Unsloth replaces parts of it.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

# Before the import: it would fetch a file to count its users, and write what it compiles into the current folder.
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", os.path.join(os.path.expanduser("~"), ".cache", "unsloth_compiled"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from unsloth import FastLanguageModel

from finetune.arguments import Arguments
from finetune.batching import collate, plan_epoch
from finetune.qlora import LORA_TARGETS

if TYPE_CHECKING:
    from finetune.conversation import Sample


class Unsloth:
    """FastLanguageModel in 4 bits with LoRA; `recompute` is its own checkpointing, else none."""

    def __init__(
        self, arguments: Arguments, dtype: torch.dtype, device: torch.device, tokens_at_once: int, recompute: bool
    ) -> None:
        checkpointing = "unsloth" if recompute else False
        model, _ = FastLanguageModel.from_pretrained(
            model_name=arguments.model.model_name_or_path,
            max_seq_length=max(tokens_at_once, arguments.data.max_seq_length),
            dtype=dtype,
            load_in_4bit=True,
            use_gradient_checkpointing=checkpointing,
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=arguments.lora.lora_rank,
            target_modules=LORA_TARGETS,
            lora_alpha=arguments.lora.lora_alpha,
            lora_dropout=arguments.lora.lora_dropout,
            bias="none",
            use_gradient_checkpointing=checkpointing,
            random_state=arguments.train.seed,
        )
        self.model = FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)
        self.device, self.dtype, self.tokens_at_once = device, dtype, tokens_at_once

    def batches(self, samples: "Sequence[Sample]") -> list[dict[str, Any]]:
        """The update packed as our trainer packs it, with the names that Unsloth looks for."""
        lengths = [len(sample.input_ids) for sample in samples]
        (update,) = plan_epoch(lengths, len(samples), 1, self.tokens_at_once, 0, 0)
        return [self._batch([samples[row] for row in rows]) for rows in update.micro_batches[0]]

    def _batch(self, samples: "Sequence[Sample]") -> dict[str, Any]:
        batch = collate(samples)
        kept = {name: batch[name].to(self.device) for name in ("input_ids", "labels", "position_ids")}
        # Left in main memory: Unsloth copies it without waiting for the card.
        return {**kept, "packed_seq_lengths": batch["cu_seq_lens_q"].diff()}

    def loss(self, batch: dict[str, Any], num_supervised: int) -> torch.Tensor:
        """Its fused head and cross-entropy; under autocast, as its trainer runs the model."""
        items = torch.tensor(num_supervised, device=self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(**batch, num_items_in_batch=items, use_cache=False).loss
