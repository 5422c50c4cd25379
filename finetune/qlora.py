"""A 4-bit base model with LoRA adapters, ready for training: loading, attaching, fused kernels, recomputation.

model = load_quantized(model_dir, device=0, compute_dtype=torch.bfloat16)
enable_chunked_loss(model)
model = attach_lora(model, lora_rank=64, lora_alpha=16, lora_dropout=0.05)
fuse_projections(model)
checkpoint_layers(model, num_layers=12)
"""

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from finetune.attention import PADDING_FREE, enable_padding_free_attention
from finetune.errors import UserError
from finetune.nf4 import keep_layout, nf4_config
from finetune.projection import fuse_projections

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["apply_liger", "attach_lora", "checkpoint_layers", "fuse_projections", "load_quantized"]

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_quantized(
    model_dir: str | Path, device: str | int | torch.device, compute_dtype: torch.dtype
) -> "PreTrainedModel":
    """The checkpoint on `device` with its projections in NF4, double-quantised; frozen, with padding-free attention.

    Embeddings, head and norms stay in `compute_dtype`: peft's prepare_model_for_kbit_training, which makes them fp32
    (2.9 GiB on a 14B), is not called. On CUDA, Liger's kernels are used where installed.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_dir,
        quantization_config=nf4_config(compute_dtype),
        dtype=compute_dtype,
        device_map={"": torch.device(device)},
        attn_implementation=PADDING_FREE,
    )
    model.requires_grad_(False)
    keep_layout(model)
    apply_liger(model)
    return enable_padding_free_attention(model)


def attach_lora(model: "PreTrainedModel", lora_rank: int, lora_alpha: float, lora_dropout: float) -> "PeftModel":
    """`model` with a LoRA adapter named "default" on all seven projections.

    Adapter weights are fp32: in bf16 a step of 2e-4 is lost on most of them. The fused projection computes in the
    base's dtype all the same. Raises UserError when the model has none of the projections.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=LORA_TARGETS,
        bias="none",
    )
    if not any(name.rpartition(".")[2] in LORA_TARGETS for name, _ in model.named_modules()):
        raise UserError(f"{type(model).__name__} has none of the layers {', '.join(LORA_TARGETS)}.")
    return get_peft_model(model, config, autocast_adapter_dtype=True)


def checkpoint_layers(model: nn.Module, num_layers: int) -> int:
    """Recompute the first `num_layers` decoder layers in the backward pass, keep the activations of the rest.

    The first ones, because by the time they are recomputed the activations of all later ones are gone. Works with
    frozen embeddings and may be called again with another number (0 = none). Returns how many are recomputed.
    """
    layers = model.get_decoder().layers
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < num_layers
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    return min(max(num_layers, 0), len(layers))


def apply_liger(model: "PreTrainedModel") -> bool:
    """Use Liger's RMSNorm, SwiGLU and RoPE when the model is on CUDA and liger_kernel is installed; says whether.

    Its loss is left out: finetune.loss calls that kernel itself, on supervised positions only.
    """
    if model.device.type != "cuda":
        return False
    # It warns of each backend that is not installed (CuTe DSL, Ascend); the default is all that is wanted.
    logging.getLogger("liger_kernel.backends").setLevel(logging.ERROR)
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError:
        return False
    _apply_liger_kernel_to_instance(
        model=model, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
    )
    return True
