"""Full-parameter training as finetune.training runs it: in 16 bits, a copy on each card, or with DeepSpeed's stages."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adamw import ADAM_NUMBERS, ADAMW, fused_adamw
from finetune.arguments import Arguments
from finetune.errors import UserError
from finetune.final_model import complete
from finetune.memory import full_memory, full_saved_bytes, host_memory, shape_of_config
from finetune.norm_head import has_norm_head
from finetune.prepare import say
from finetune.room import Method, Room
from finetune.saving import check_host_memory
from finetune.speed import (
    Budget,
    choose_full_budget,
    full_flops_per_token,
    full_update_seconds,
    layers_allowed,
)
from finetune.zero import check_final_weights, gather_whole_layers, join_group, stage_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def full_method(arguments: Arguments) -> Method:
    """The method for the DeepSpeed file (or none) that the arguments name. Raises UserError for an unusable file."""
    stage = stage_of(arguments.train.deepspeed)
    check_final_weights(arguments.train.deepspeed, arguments.train.save_strategy)
    model_dir = arguments.model.model_name_or_path
    norm_head = bool(model_dir) and has_norm_head(model_dir)
    return Method(
        name="all parameters, " + ("without DeepSpeed" if stage == "none" else f"DeepSpeed ZeRO stage {stage}"),
        load=lambda arguments, dtype, device: _load(arguments, dtype, device, stage, norm_head),
        choose_budget=lambda room: _choose_budget(room, stage),
        predict_memory=lambda room, budget, micro_batches: full_memory(
            room.shape, stage, room.world_size, budget.tokens, budget.layers_kept, micro_batches
        ),
        flops_per_token=lambda room: full_flops_per_token(room.shape),
        tokens_per_second=lambda room, budget: _tokens_per_second(room, budget, stage),
        saved_bytes=lambda room: full_saved_bytes(room.trainable, stage, room.trained_bytes),
        optimizer=lambda arguments, dtype: _optimizer(arguments, dtype, stage),
        stage=stage,
        finish_final=lambda folder: complete(folder, model_dir, norm_head),
        record={"norm_head": norm_head},
    )


def _load(
    arguments: Arguments, dtype: "torch.dtype", device: "torch.device", stage: str, norm_head: bool
) -> "PreTrainedModel":
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.accumulate import accumulate_in_products
    from finetune.attention import PADDING_FREE, enable_padding_free_attention
    from finetune.loss import enable_chunked_loss
    from finetune.qlora import apply_liger
    from finetune.recipes import attach_recipes

    model_dir = arguments.model.model_name_or_path
    if stage != "none":
        join_group()
        _check_offloading(model_dir, stage)
    elif dtype == torch.float16:
        raise UserError("without DeepSpeed, weights are trained in bfloat16, which this card has not. Set a stage.")
    if norm_head:
        say("the head is a NormHead: its rows are normalised in every pass, and in final/")
    # ZeRO-3 places the weights itself, a part on each card, while they are loaded.
    place = {} if stage.startswith("3") else {"device_map": {"": torch.device(device)}}
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation=PADDING_FREE, **place)
    enable_chunked_loss(model, normalize_head=norm_head)
    apply_liger(model)
    if stage.startswith("3"):
        gather_whole_layers(model)
    if stage == "none":
        accumulate_in_products(model)
        attach_recipes(model)
    return enable_padding_free_attention(model)


def _check_offloading(model_dir: str, stage: str) -> None:
    """Raises UserError where main memory cannot take what the stage puts there."""
    needed = host_memory(shape_of_config(json.loads((Path(model_dir) / "config.json").read_text("utf-8"))), stage)
    if needed:
        check_host_memory(int(needed), f"DeepSpeed stage {stage}")


def _choose_budget(room: Room, stage: str) -> Budget | None:
    return choose_full_budget(
        room.shape,
        stage,
        room.gpu,
        room.world_size,
        room.memory_bytes,
        room.longest_row,
        room.tokens_per_update,
        layers_kept=layers_allowed(room.arguments.train, room.shape.layers),
        tokens=room.arguments.train.tokens_per_micro_batch or None,
    )


def _tokens_per_second(room: Room, budget: Budget, stage: str) -> float:
    seconds = full_update_seconds(room.shape, room.gpu, budget, stage, room.world_size, room.tokens_per_update)
    return room.tokens_per_update / seconds / room.world_size


def _optimizer(arguments: Arguments, dtype: "torch.dtype", stage: str) -> tuple[type, dict[str, Any]] | None:
    """AdamW in the form that suits the weights; any other `optim` is transformers' business."""
    import torch

    train = arguments.train
    if stage == "none" and dtype.itemsize == 2:
        if train.optim not in ADAMW:
            say(
                f"note: {train.optim} rounds to the nearest 16-bit number and loses small updates, adamw_torch does not"
            )
            return None
        from finetune.optimizers import StochasticAdamW

        say(f"note: weights and moments are 16-bit: {train.optim} rounds stochastically, so small updates count")
        return StochasticAdamW, {"lr": train.learning_rate, **ADAM_NUMBERS, "seed": train.seed}
    if train.optim in ADAMW and torch.cuda.is_available() and not stage.endswith("offload"):
        # The unfused form holds another copy of the second moments while it steps.
        return fused_adamw(arguments)
    return None
