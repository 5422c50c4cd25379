"""Baichuan2-7B (BaichuanForCausalLM with RoPE and NormHead) as LlamaForCausalLM.

The mapping follows modeling_baichuan.py of Baichuan2-7B-Chat: fused W_pack, Llama's names elsewhere, and a head whose
rows are L2-normalised in every forward pass. The normalised head is what is stored; whoever trains the head has to
keep normalising it (`norm_head` in conversion.json).
"""

from pathlib import Path
from types import ModuleType
from typing import Any

from finetune.checkpoint.pieces import Piece, split_in_three
from finetune.errors import UserError

NAME = "baichuan2"
TITLE = "Baichuan2-7B"
ARCHITECTURE = "LlamaForCausalLM"
NORM_HEAD = True
IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "future_mask")
ROPE_BASE = 10000.0  # a constant in the published code, not in its config

REQUIRED = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size rms_norm_eps "
    "bos_token_id eos_token_id pad_token_id"
).split()


def check_config(config: dict[str, Any]) -> None:
    """Raise UserError unless LlamaForCausalLM computes the same function as this configuration.

    model_type "baichuan" covers two generations and two sizes. Baichuan-1 has 64,000 tokens and a plain head; the 13B
    models have ALiBi and no max_position_embeddings. That the tokenizer is Baichuan2's is checked when it is read.
    """
    if config.get("vocab_size") == 64000 or "BaiChuanForCausalLM" in (config.get("architectures") or []):
        raise UserError(
            "this is a Baichuan-1 checkpoint (64,000 tokens, plain head), expected Baichuan2-7B. "
            "Set BAICHUAN_MODEL_ID=baichuan-inc/Baichuan2-7B-Chat."
        )
    if "max_position_embeddings" not in config:
        raise UserError(
            "this is a Baichuan 13B checkpoint: its ALiBi positions cannot be expressed by LlamaForCausalLM. "
            "Set BAICHUAN_MODEL_ID=baichuan-inc/Baichuan2-7B-Chat."
        )
    missing = [name for name in REQUIRED if name not in config]
    if missing:
        raise UserError(f"config.json of a Baichuan2 checkpoint must have {', '.join(missing)}. Is the file complete?")
    if config.get("tie_word_embeddings", False) or config.get("hidden_act", "silu") != "silu":
        raise UserError(
            "cannot convert exactly: expected tie_word_embeddings false and hidden_act silu, got "
            f"{config.get('tie_word_embeddings')} and {config.get('hidden_act')}."
        )
    if config["hidden_size"] % config["num_attention_heads"]:
        raise UserError(
            f"hidden_size {config['hidden_size']} is not a multiple of {config['num_attention_heads']} heads."
        )


def source_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor the source must have."""
    hidden, vocab, ff = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    layer_shapes = {
        "self_attn.W_pack.weight": (3 * hidden, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (ff, hidden),
        "mlp.down_proj.weight": (hidden, ff),
        "mlp.up_proj.weight": (ff, hidden),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def pieces(config: dict[str, Any]) -> list[Piece]:
    """Every target tensor and where it comes from."""
    result = []
    for name in source_shapes(config):
        if "W_pack" in name:
            targets = tuple(name.replace("W_pack", f"{letter}_proj") for letter in "qkv")
            result += split_in_three(name, targets, config["hidden_size"])
        else:
            result.append(Piece(name, name, normalize_rows=name == "lm_head.weight"))
    return result


def native_config(config: dict[str, Any], dtype: str, token_ids: dict[str, int]) -> dict[str, Any]:
    """config.json of the target."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": config["bos_token_id"],
        "dtype": dtype,
        "eos_token_id": config["eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": config["hidden_size"],
        "initializer_range": config.get("initializer_range", 0.02),
        "intermediate_size": config["intermediate_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "mlp_bias": False,
        "num_attention_heads": config["num_attention_heads"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_key_value_heads": config["num_attention_heads"],
        "pad_token_id": config["pad_token_id"],
        "rms_norm_eps": config["rms_norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE},
        "rope_theta": ROPE_BASE,  # this and torch_dtype are what transformers 4 reads
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config["vocab_size"],
    }


def generation_config(source: dict[str, Any], token_ids: dict[str, int]) -> dict[str, Any]:
    """The source's own settings; its chat() stops at </s> and pads with <unk>, as its config says."""
    kept = {key: value for key, value in source.items() if key != "transformers_version"}
    defaults = {f"{name}_token_id": token_ids[name] for name in ("bos", "eos", "pad")}
    return defaults | kept


def tokenizer() -> ModuleType:
    """The module that converts its tokenizer."""
    from finetune.checkpoint import tokenizer_baichuan2

    return tokenizer_baichuan2


def attribution(folder: Path) -> str:
    """The licence asks that the source be named and the modification stated."""
    return (
        "The weights and the tokenizer are derived from a Baichuan2 model by Baichuan Inc. and stay under the licence "
        "that came with it (see the licence files in this folder)."
    )
