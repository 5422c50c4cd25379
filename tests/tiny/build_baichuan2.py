"""A tiny random checkpoint in the layout Baichuan2-7B-Chat was published in: one .bin, W_pack, a sentencepiece model.

    python -m tests.tiny.build_baichuan2 FOLDER [--seed 0]

Writes config.json, generation_config.json, tokenizer_config.json, tokenizer.model, LICENSE and pytorch_model.bin; the
same seed gives the same tensors. The tokenizer is trained on a few sentences with the published model's options.
"""

import argparse
import io
from pathlib import Path

from tests.tiny.build_qwen1 import random_tensors, write_json, write_weights

# Ids 3..100 of the published tokenizer are markup, digits and punctuation, 101.. are <reserved_12..>; this keeps
# <reserved_106> at 195 and <reserved_107> at 196.
MARKUP = ["<html>", "</html>", "\n", "\t", "<p>", "</p>", "```", "---", "...", "+", "-", "=", ".", "!", "?", "，", "。"]
MARKUP += [chr(code) for code in range(ord("０"), ord("９") + 1)]
MARKUP += [f"<h{i}>" for i in range(98 - len(MARKUP))]
RESERVED = [f"<reserved_{i}>" for i in range(12, 131)]
SENTENCES = (
    "今天天气很好，我们一起去公园散步吧。",
    "我最近总是睡不着，心里很焦虑，不知道该怎么办。",
    "谢谢你愿意告诉我这些，我在这里陪着你，慢慢说。",
    "请判断下面两个句子的意思是否相同，只回答相同或不相同。",
    "从这段文字中提取关键词：机器学习、深度学习、自然语言处理。",
    "工作压力太大了，每天加班到很晚，感觉身体撑不住。",
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "Feeling anxious before an exam is common; breathing slowly can help.",
    "def main():\n    return {'a': 1, 'b': [2, 3]}\n",
    "In 2023 the price rose from 12.50 to 18.75 yuan per kilogram.",
    "他说：“你好！”然后笑了笑，走进了教室。",
    "孩子们在操场上跑来跑去，笑声传得很远。",
)


def build_baichuan2(
    folder: str | Path,
    seed: int = 0,
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    ff_size: int = 128,
    num_shards: int = 1,
    std: float = 0.02,
    dtype: str = "bfloat16",
) -> Path:
    """Write the checkpoint and return its folder; `std` is the spread of the matrices."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = train_tokenizer(folder / "tokenizer.model")
    config = baichuan2_config(vocab_size, hidden_size, num_layers, num_heads, ff_size)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", GENERATION_CONFIG)
    write_json(folder / "tokenizer_config.json", {"model_max_length": 4096, "tokenizer_class": "BaichuanTokenizer"})
    (folder / "LICENSE").write_text("Tiny random weights made for tests. Apache-2.0.\n", encoding="utf-8")
    write_weights(folder, baichuan2_tensors(config, seed, std, dtype), num_shards, "bin")
    return folder


def train_tokenizer(path: Path) -> int:
    """Train a byte-fallback BPE of about 1,000 pieces with Baichuan2's options; returns the number of pieces."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(s for s in SENTENCES for _ in range(3)),
        model_writer=model,
        model_type="bpe",
        vocab_size=820,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=MARKUP + RESERVED,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()


GENERATION_CONFIG = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "user_token_id": 195,
    "assistant_token_id": 196,
    "max_new_tokens": 2048,
    "temperature": 0.3,
    "top_k": 5,
    "top_p": 0.85,
    "repetition_penalty": 1.05,
    "do_sample": True,
    "transformers_version": "4.29.2",
}


def baichuan2_config(vocab_size, hidden_size, num_layers, num_heads, ff_size) -> dict:
    """The keys of Baichuan2-7B-Chat's config.json."""
    return {
        "architectures": ["BaichuanForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_baichuan.BaichuanConfig",
            "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
        },
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": ff_size,
        "max_position_embeddings": 4096,
        "model_max_length": 4096,
        "model_type": "baichuan",
        "num_attention_heads": num_heads,
        "num_hidden_layers": num_layers,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "tokenizer_class": "BaichuanTokenizer",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.29.2",
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def baichuan2_tensors(config: dict, seed: int, std: float, dtype: str) -> dict:
    """Name -> random tensor."""
    import torch

    hidden, ff, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "self_attn.W_pack.weight": (3 * hidden, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "mlp.gate_proj.weight": (ff, hidden),
            prefix + "mlp.down_proj.weight": (hidden, ff),
            prefix + "mlp.up_proj.weight": (ff, hidden),
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    return random_tensors(shapes, seed, std, getattr(torch, dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(build_baichuan2(args.folder, args.seed))


if __name__ == "__main__":
    main()
