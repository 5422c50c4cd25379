"""Ways of training a model, as finetune.training runs them: what is loaded, what it costs. QLoRA is here."""

from typing import TYPE_CHECKING

from finetune.arguments import Arguments
from finetune.memory import Shape, qlora_memory
from finetune.speed import Budget, choose_qlora_budget, qlora_flops_per_token, qlora_tokens_per_second
from finetune.training import Method, Room

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def _load(arguments: Arguments, dtype: str, device: "torch.device") -> "PreTrainedModel":
    import torch

    from finetune.loss import enable_chunked_loss
    from finetune.qlora import attach_lora, fuse_projections, load_quantized

    model = load_quantized(arguments.model.model_name_or_path, device, getattr(torch, dtype))
    enable_chunked_loss(model)
    lora = arguments.lora
    model = attach_lora(model, lora.lora_rank, lora.lora_alpha, lora.lora_dropout)
    fuse_projections(model)
    return model


def _choose_budget(room: Room) -> Budget | None:
    train, layers = room.arguments.train, room.shape.layers
    if not train.gradient_checkpointing:
        kept = (layers, layers)
    elif train.recompute_layers >= 0:
        kept = (max(0, layers - train.recompute_layers),) * 2
    else:
        kept = None
    return choose_qlora_budget(
        room.shape,
        room.arguments.lora.lora_rank,
        room.gpu,
        room.memory_bytes,
        room.longest_row,
        room.tokens_per_update,
        gpus=room.world_size,
        lora_bytes=room.lora_bytes,
        optimizer_bytes=room.optimizer_bytes,
        layers_kept=kept,
        tokens=room.arguments.train.tokens_per_micro_batch or None,
    )


def _predict_memory(room: Room, budget: Budget) -> dict[str, float]:
    return qlora_memory(
        room.shape,
        room.arguments.lora.lora_rank,
        budget.tokens,
        budget.layers_kept,
        room.lora_bytes,
        room.optimizer_bytes,
        room.world_size,
        room.width,
    )


def _flops_per_token(arguments: Arguments, shape: Shape) -> float:
    return qlora_flops_per_token(shape, arguments.lora.lora_rank)


def _tokens_per_second(room: Room, budget: Budget) -> float:
    return qlora_tokens_per_second(room.shape, room.arguments.lora.lora_rank, room.gpu, budget)


QLORA = Method(
    name="QLoRA, 4-bit NF4 base",
    load=_load,
    choose_budget=_choose_budget,
    predict_memory=_predict_memory,
    flops_per_token=_flops_per_token,
    weight_bytes=4,
    tokens_per_second=_tokens_per_second,
)
