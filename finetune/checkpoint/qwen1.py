"""Qwen-1 (QWenLMHeadModel, config names of September 2023 and later) as Qwen2ForCausalLM.

The mapping and the config follow modeling_qwen.py and configuration_qwen.py of Qwen/Qwen-7B, which the 14B shares:
fused c_attn, w1 without and w2 with the activation, RoPE in the half-split form that Qwen2 uses too. The originals
switch to NTK-scaled RoPE and log-n attention beyond seq_length at inference, which Qwen2 has not: the native
max_position_embeddings is therefore seq_length, and within it the two are the same function.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

from finetune.checkpoint.pieces import Piece, split_in_three
from finetune.errors import UserError

NAME = "qwen1"
TITLE = "Qwen-1"
ARCHITECTURE = "Qwen2ForCausalLM"
NORM_HEAD = False
IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.logn_tensor")
ATTRIBUTION = (
    "Tongyi Qianwen is licensed under the Tongyi Qianwen {kind}, Copyright (c) Alibaba Cloud. All Rights Reserved."
)

REQUIRED = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size layer_norm_epsilon "
    "seq_length kv_channels rotary_emb_base"
).split()
OLD_NAMES = ("n_embd", "n_layer", "n_head", "ffn_hidden_size", "padded_vocab_size", "n_inner")


def check_config(config: dict[str, Any]) -> None:
    """Raise UserError unless Qwen2ForCausalLM computes the same function as this configuration."""
    old = [name for name in OLD_NAMES if name in config and "hidden_size" not in config]
    if old:
        raise UserError(
            f"config.json uses the names of the August 2023 upload ({', '.join(old)}), whose tokenizer and code "
            "differ. Download a later revision, for example QWEN_MODEL_REVISION=v1.0.8."
        )
    missing = [name for name in REQUIRED if name not in config]
    if missing:
        raise UserError(f"config.json of a Qwen-1 checkpoint must have {', '.join(missing)}. Is the file complete?")
    facts = {
        "no_bias": (True, "Qwen2 has no bias outside query, key and value"),
        "rotary_pct": (1.0, "Qwen2 rotates whole heads"),
        "scale_attn_weights": (True, "Qwen2 scales attention by 1/sqrt(head_dim)"),
        "tie_word_embeddings": (False, "a tied Qwen-1 was never published, so its head cannot be checked"),
        "emb_dropout_prob": (0.0, "Qwen2 has no embedding dropout"),
    }
    for key, (expected, reason) in facts.items():
        if config.get(key, expected) != expected:
            raise UserError(f"cannot convert exactly: {key} is {config[key]}, expected {expected} ({reason}).")
    if (
        config["kv_channels"] * config["num_attention_heads"] != config["hidden_size"]
        or config["intermediate_size"] % 2
    ):
        raise UserError(
            "cannot convert exactly: expected kv_channels x num_attention_heads = hidden_size and an even "
            f"intermediate_size, got {config['kv_channels']} x {config['num_attention_heads']}, "
            f"{config['hidden_size']} and {config['intermediate_size']}."
        )


def source_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor the source must have."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    ff = config["intermediate_size"] // 2  # the config counts w1 and w2 together
    layer_shapes = {
        "ln_1.weight": (hidden,),
        "attn.c_attn.weight": (3 * hidden, hidden),
        "attn.c_attn.bias": (3 * hidden,),
        "attn.c_proj.weight": (hidden, hidden),
        "ln_2.weight": (hidden,),
        "mlp.w1.weight": (ff, hidden),
        "mlp.w2.weight": (ff, hidden),
        "mlp.c_proj.weight": (hidden, ff),
    }
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in layer_shapes.items()}
    return shapes | {"transformer.ln_f.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def pieces(config: dict[str, Any]) -> list[Piece]:
    """Every target tensor and where it comes from."""
    renamed = {
        "ln_1.weight": "input_layernorm.weight",
        "attn.c_proj.weight": "self_attn.o_proj.weight",
        "ln_2.weight": "post_attention_layernorm.weight",
        "mlp.w1.weight": "mlp.up_proj.weight",
        "mlp.w2.weight": "mlp.gate_proj.weight",
        "mlp.c_proj.weight": "mlp.down_proj.weight",
    }
    result = [
        Piece("model.embed_tokens.weight", "transformer.wte.weight"),
        Piece("model.norm.weight", "transformer.ln_f.weight"),
        Piece("lm_head.weight", "lm_head.weight"),
    ]
    for layer in range(config["num_hidden_layers"]):
        old, new = f"transformer.h.{layer}.", f"model.layers.{layer}."
        result += [Piece(new + target, old + source) for source, target in renamed.items()]
        for kind in ("weight", "bias"):
            targets = tuple(f"{new}self_attn.{letter}_proj.{kind}" for letter in "qkv")
            result += split_in_three(f"{old}attn.c_attn.{kind}", targets, config["hidden_size"])
    return result


def native_config(config: dict[str, Any], dtype: str, token_ids: dict[str, int]) -> dict[str, Any]:
    """config.json of the target. pad_token_id stays null: as nn.Embedding's padding_idx it would freeze a used row."""
    base = config["rotary_emb_base"]
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen2",
        "attention_dropout": config.get("attn_dropout_prob", 0.0),
        "bos_token_id": None,
        "dtype": dtype,
        "eos_token_id": token_ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": config["hidden_size"],
        "initializer_range": config.get("initializer_range", 0.02),
        "intermediate_size": config["intermediate_size"] // 2,
        "max_position_embeddings": config["seq_length"],
        "max_window_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_key_value_heads": config["num_attention_heads"],
        "pad_token_id": None,
        "rms_norm_eps": config["layer_norm_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": float(base)},
        "rope_theta": float(base),  # this and torch_dtype are what transformers 4 reads
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config["vocab_size"],
    }


def generation_config(source: dict[str, Any], token_ids: dict[str, int]) -> dict[str, Any]:
    """The source's own sampling settings; stops are those of its chat(): <|im_end|>, <|endoftext|>, <|im_start|>."""
    for key in ("eos_token_id", "pad_token_id"):
        value = source.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not set(ids).issubset(token_ids.values()):
            raise UserError(
                f"generation_config.json has {key} {source[key]}, but in qwen.tiktoken the special tokens are "
                f"{min(token_ids.values())}..{max(token_ids.values())}: one of the two is damaged. Download both again."
            )
    stops = [token_ids[token] for token in ("<|im_end|>", "<|endoftext|>", "<|im_start|>")]
    kept = {key: value for key, value in source.items() if key != "transformers_version"}
    return kept | {"eos_token_id": stops, "pad_token_id": token_ids["<|endoftext|>"]}


def tokenizer() -> ModuleType:
    """The module that converts its tokenizer."""
    from finetune.checkpoint import tokenizer_qwen1

    return tokenizer_qwen1


def attribution(folder: Path) -> str:
    """The sentence the licence wants in a Notice file beside every copy; the 1.8B has a research licence."""
    is_research = any("RESEARCH" in path.read_text("utf-8", "replace") for path in folder.glob("LICENSE*"))
    return ATTRIBUTION.format(kind="RESEARCH LICENSE AGREEMENT" if is_research else "LICENSE AGREEMENT")
