"""Ways of training a model, as finetune.training runs them: what is loaded, what it costs. QLoRA is here."""

from typing import TYPE_CHECKING, Any

from finetune.adamw import ADAMW, PAGED_ADAMW, fused_adamw
from finetune.arguments import Arguments
from finetune.memory import qlora_memory
from finetune.room import Method, Room
from finetune.saving import checkpoint_bytes
from finetune.speed import (
    Budget,
    choose_qlora_budget,
    filled,
    layers_allowed,
    qlora_flops_per_token,
    qlora_tokens_per_second,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def _load(arguments: Arguments, dtype: "torch.dtype", device: "torch.device") -> "PreTrainedModel":
    from finetune.frozen import check_fp8
    from finetune.loss import enable_chunked_loss
    from finetune.qlora import attach_lora, fuse_projections, load_quantized
    from finetune.recipes import attach_recipes

    lora = arguments.lora
    if lora.fp8_backward:
        check_fp8(device)
    model = load_quantized(arguments.model.model_name_or_path, device, dtype)
    enable_chunked_loss(model)
    model = attach_lora(model, lora.lora_rank, lora.lora_alpha, lora.lora_dropout)
    fuse_projections(model, lora.fp8_backward)
    attach_recipes(model)
    return model


def _choose_budget(room: Room) -> Budget | None:
    return choose_qlora_budget(
        room.shape,
        room.arguments.lora.lora_rank,
        room.gpu,
        room.memory_bytes,
        room.longest_row,
        room.tokens_per_update,
        gpus=room.world_size,
        lora_bytes=room.trained_bytes,
        optimizer_bytes=room.state_bytes,
        layers_kept=layers_allowed(room.arguments.train, room.shape.layers),
        tokens=room.arguments.train.tokens_per_micro_batch or None,
    )


def _predict_memory(room: Room, budget: Budget, micro_batches: int) -> dict[str, float]:
    return qlora_memory(
        room.shape,
        room.arguments.lora.lora_rank,
        budget.tokens,
        budget.layers_kept,
        room.trained_bytes,
        room.state_bytes,
        room.world_size,
        room.width,
    )


def _flops_per_token(room: Room) -> float:
    return qlora_flops_per_token(room.shape, room.arguments.lora.lora_rank)


def _tokens_per_second(room: Room, budget: Budget) -> float:
    budget = filled(budget, room.tokens_per_update / room.world_size)
    lora = room.arguments.lora
    return qlora_tokens_per_second(room.shape, lora.lora_rank, room.gpu, budget, lora.fp8_backward)


def _saved_bytes(room: Room) -> tuple[int, int, int]:
    one = checkpoint_bytes(room.trainable, room.trained_bytes, room.state_bytes)
    return one, checkpoint_bytes(room.trainable, room.trained_bytes, 0), one


def _optimizer(arguments: Arguments, dtype: "torch.dtype") -> tuple[type, dict[str, Any]] | None:
    """AdamW with 32-bit state in its fused form; any other `optim` is transformers' business."""
    return fused_adamw(arguments) if arguments.train.optim in (*ADAMW, PAGED_ADAMW) else None


QLORA = Method(
    name="QLoRA, 4-bit NF4 base",
    load=_load,
    choose_budget=_choose_budget,
    predict_memory=_predict_memory,
    flops_per_token=_flops_per_token,
    tokens_per_second=_tokens_per_second,
    saved_bytes=_saved_bytes,
    optimizer=_optimizer,
)
