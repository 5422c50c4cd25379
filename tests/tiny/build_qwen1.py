"""A tiny random checkpoint in the layout Qwen-14B-Chat was published in: names, config keys, files, shards.

    python -m tests.tiny.build_qwen1 FOLDER [--seed 0]

Writes config.json, generation_config.json, tokenizer_config.json, qwen.tiktoken, LICENSE, NOTICE and the weights
with their index; the same seed gives the same bytes.
"""

import argparse
import json
import shutil
from pathlib import Path

VOCABULARY = Path(__file__).with_name("qwen.tiktoken")
NUM_SPECIAL = 3 + 205  # <|endoftext|>, <|im_start|>, <|im_end|>, <|extra_0..204|>
NUM_UNUSED_ROWS = 21  # embedding rows behind the last token, as in the published models


def build_qwen1(
    folder: str | Path,
    seed: int = 0,
    *,
    vocabulary: Path = VOCABULARY,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    ff_size: int = 128,
    seq_length: int = 2048,
    num_shards: int = 3,
    std: float = 0.02,
    dtype: str = "bfloat16",
    weight_format: str = "safetensors",
) -> Path:
    """Write the checkpoint, return its folder; `weight_format` is safetensors or bin, `std` the spread of matrices."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(vocabulary, folder / "qwen.tiktoken")
    num_ranks = len(vocabulary.read_bytes().split()) // 2
    vocab_size = num_ranks + NUM_SPECIAL + NUM_UNUSED_ROWS
    config = qwen1_config(vocab_size, hidden_size, num_layers, num_heads, ff_size, seq_length)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", qwen1_generation_config(num_ranks))
    write_json(folder / "tokenizer_config.json", {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"})
    (folder / "LICENSE").write_text("Tiny random weights made for tests. Apache-2.0.\n", encoding="utf-8")
    (folder / "NOTICE").write_text("Tiny random weights made for tests.\n", encoding="utf-8")
    write_weights(folder, qwen1_tensors(config, seed, std, dtype), num_shards, weight_format)
    return folder


def qwen1_config(vocab_size, hidden_size, num_layers, num_heads, ff_size, seq_length) -> dict:
    """The keys of Qwen-14B-Chat's config.json; intermediate_size is twice the real one there."""
    return {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "attn_dropout_prob": 0.0,
        "bf16": False,
        "emb_dropout_prob": 0.0,
        "fp16": False,
        "fp32": False,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * ff_size,
        "initializer_range": 0.02,
        "kv_channels": hidden_size // num_heads,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 4 * seq_length,
        "model_type": "qwen",
        "no_bias": True,
        "num_attention_heads": num_heads,
        "num_hidden_layers": num_layers,
        "onnx_safe": None,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": seq_length,
        "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer",
        "transformers_version": "4.32.0",
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_flash_attn": "auto",
        "use_logn_attn": True,
        "vocab_size": vocab_size,
    }


def qwen1_generation_config(num_ranks: int) -> dict:
    """The keys of Qwen-14B-Chat's generation_config.json; <|endoftext|> is the first id behind the ranks."""
    return {
        "chat_format": "chatml",
        "eos_token_id": num_ranks,
        "pad_token_id": num_ranks,
        "max_window_size": 6144,
        "max_new_tokens": 512,
        "do_sample": True,
        "top_k": 0,
        "top_p": 0.8,
        "repetition_penalty": 1.1,
        "transformers_version": "4.31.0",
    }


def qwen1_tensors(config: dict, seed: int, std: float, dtype: str) -> dict:
    """Name -> random tensor; norms spread around 1, biases and matrices around 0."""
    import torch

    hidden, ff, vocab = config["hidden_size"], config["intermediate_size"] // 2, config["vocab_size"]
    shapes = {"transformer.wte.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"transformer.h.{layer}."
        shapes |= {
            prefix + "ln_1.weight": (hidden,),
            prefix + "attn.c_attn.weight": (3 * hidden, hidden),
            prefix + "attn.c_attn.bias": (3 * hidden,),
            prefix + "attn.c_proj.weight": (hidden, hidden),
            prefix + "ln_2.weight": (hidden,),
            prefix + "mlp.w1.weight": (ff, hidden),
            prefix + "mlp.w2.weight": (ff, hidden),
            prefix + "mlp.c_proj.weight": (hidden, ff),
        }
    shapes |= {"transformer.ln_f.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    return random_tensors(shapes, seed, std, getattr(torch, dtype))


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int, std: float, dtype) -> dict:
    """Draw every tensor from one seeded generator; one-dimensional weights are norms and centre on 1."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        is_norm = len(shape) == 1 and name.endswith("weight")
        drawn = torch.randn(shape, generator=generator) * (0.1 if is_norm else std)
        tensors[name] = (drawn + 1 if is_norm else drawn).to(dtype)
    return tensors


def write_weights(folder: Path, tensors: dict, num_shards: int, weight_format: str) -> None:
    """Write consecutive slices of the tensors as num_shards files with an index, or one file without."""
    import torch
    from safetensors.torch import save_file

    stem, suffix = ("model", "safetensors") if weight_format == "safetensors" else ("pytorch_model", "bin")
    names = list(tensors)
    weight_map = {}
    for shard in range(num_shards):
        file = f"{stem}-{shard + 1:05d}-of-{num_shards:05d}.{suffix}" if num_shards > 1 else f"{stem}.{suffix}"
        part = {n: tensors[n] for n in names[shard * len(names) // num_shards : (shard + 1) * len(names) // num_shards]}
        if weight_format == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if num_shards > 1:
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{stem}.{suffix}.index.json", index)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(build_qwen1(args.folder, args.seed))


if __name__ == "__main__":
    main()
