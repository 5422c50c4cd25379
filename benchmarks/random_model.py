"""Native checkpoints of random bfloat16 weights in the shapes of real models, so that a benchmark downloads nothing.

    python -m benchmarks.random_model FOLDER qwen-14b      # 28 GB; drawn on the card where there is one

Its tokenizer makes one token of each word of three letters and has the family's chat template, so that the shipped
commands run on it as on the real model. A complete folder is left as it is; a size that a disk cannot take is refused.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError, run_main
from finetune.memory import HALF_BYTES, KNOWN_SHAPES, Shape
from finetune.tensor_files import Place, write_shard

if TYPE_CHECKING:
    import torch

SHAPES = {
    **KNOWN_SHAPES,
    # config.json of Qwen/Qwen2.5-32B
    "qwen2.5-32b": Shape(5120, 64, 40, 8, 128, 27648, 152064, has_qkv_bias=True),
    "qwen-14b-layers": Shape(5120, 4, 40, 40, 128, 13696, 1024, has_qkv_bias=True),  # of 40, and hardly a head
    "baichuan2-7b-layers": Shape(4096, 4, 32, 32, 128, 11008, 1024),  # of 32: fp32 masters fit a card beside it
    "tiny-qwen": Shape(64, 2, 4, 4, 16, 128, 1024, has_qkv_bias=True),
    "tiny-baichuan2": Shape(64, 2, 4, 4, 16, 128, 1024),
}
SHARD_BYTES = 2 << 30
WRITERS = 4  # files written side by side: a disk of that kind is faster so, and drawing goes on meanwhile
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The ids of Baichuan2's first three, and of no use else; what the template writes is as many tokens as in Qwen's own.
BAICHUAN2_SPECIAL = ("<unk>", "<s>", "</s>", "<reserved_106>", "<reserved_107>")
BAICHUAN2_ENDS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_ENDS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
TEMPLATE_WORDS = ("system", "user", "assistant", "You", " are", " a ", "helpful", " assistant")


def is_qwen(name: str) -> bool:
    """Whether the named shape has Qwen's layout; the others have Baichuan2's."""
    return "qwen" in name


def config_of(name: str) -> dict[str, Any]:
    """config.json as the conversion of the family's models writes it, for transformers 4 and 5."""
    from finetune.checkpoint.baichuan2 import native_config

    shape = SHAPES[name]
    source = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        **{f"{kind}_token_id": number for kind, number in (("bos", 1), ("eos", 2), ("pad", 0))},
    }
    config = {**native_config(source, "bfloat16", {}), "num_key_value_heads": shape.kv_heads}
    if is_qwen(name):
        config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
        del config["attention_bias"], config["mlp_bias"]
    return config


def sizes_of(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, the embedding and the head first."""
    sizes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocabulary, shape.hidden),
        "lm_head.weight": (shape.vocabulary, shape.hidden),
        "model.norm.weight": (shape.hidden,),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for name, (inputs, outputs) in zip(NAMES, shape.projections, strict=True):
            block = "self_attn" if name[0] in "qkvo" else "mlp"
            sizes[f"{prefix}{block}.{name}.weight"] = (outputs, inputs)
            if shape.has_qkv_bias and name[0] in "qkv":
                sizes[f"{prefix}{block}.{name}.bias"] = (outputs,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            sizes[f"{prefix}{name}.weight"] = (shape.hidden,)
    return sizes


def shards_of(shape: Shape) -> Iterator[dict[str, Place]]:
    """Tensors in files of about SHARD_BYTES, as finetune.tensor_files lays them out."""
    places: dict[str, Place] = {}
    offset = 0
    for name, size in sizes_of(shape).items():
        length = HALF_BYTES * (size[0] * size[1] if len(size) == 2 else size[0])
        if places and offset + length > SHARD_BYTES:
            yield places
            places, offset = {}, 0
        places[name] = Place(Path(), "BF16", size, offset, offset + length)
        offset += length
    yield places


def write_weights(folder: Path, shape: Shape) -> None:
    """Random weights of deviation 0.02, norms of 1; the same on the same kind of device."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    files: dict[str, str] = {}
    # One file in the making for each writer: so main memory holds a few tensors, not a model.
    with ThreadPoolExecutor(WRITERS) as pool:
        written = []
        for number, places in enumerate(shards_of(shape)):
            file = f"model-{number:05d}.safetensors"
            files |= dict.fromkeys(places, file)
            written.append(pool.submit(write_shard, folder / file, places, _drawn(places, number, device)))
        for job in written:
            job.result()
    index = {"metadata": {"total_size": HALF_BYTES * shape.parameters}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _drawn(places: dict[str, Place], seed: int, device: str) -> "Iterator[tuple[str, memoryview]]":
    """Each tensor's bytes, drawn when it is asked for."""
    import torch

    generator = torch.Generator(device=device).manual_seed(seed)
    for name, place in places.items():
        if "norm" in name:
            values = torch.ones(place.shape, dtype=torch.bfloat16)
        else:
            values = torch.empty(place.shape, dtype=torch.bfloat16, device=device)
            values = values.normal_(0, 0.02, generator=generator).cpu()
        yield name, _bytes_of(values)


def _bytes_of(tensor: "torch.Tensor") -> memoryview:
    import torch

    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def words_of(name: str) -> list[str]:
    """Words of three letters that are one token each, a blank before them included."""
    letters = ascii_lowercase[: 8 if SHAPES[name].vocabulary < 20_000 else 26]
    return ["".join(word) for word in product(letters, repeat=3)]


def write_tokenizer(folder: Path, name: str) -> None:
    """Byte-level BPE as in Qwen, whose class transformers takes for every qwen2 whatever the files say."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from finetune.checkpoint.chat_templates import BAICHUAN2_TEMPLATE, QWEN_TEMPLATE

    special, ends = (QWEN_SPECIAL, QWEN_ENDS) if is_qwen(name) else (BAICHUAN2_SPECIAL, BAICHUAN2_ENDS)
    words = words_of(name)
    merges = dict.fromkeys(pair for word in words for pair in _merges(word))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*special, *TEMPLATE_WORDS, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, list(merges)))
    split = pre_tokenizers.Split(Regex(r" ?[a-z]+|\s|[^a-z\s]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in TEMPLATE_WORDS])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)
    wrapped.chat_template = QWEN_TEMPLATE if is_qwen(name) else BAICHUAN2_TEMPLATE
    wrapped.save_pretrained(folder)


def _merges(word: str) -> Iterator[tuple[str, str]]:
    """The merges that make one token of a word and the blank before it, which byte-level BPE writes as \u0120."""
    for end in range(len(word)):
        yield "\u0120" + word[:end], word[end]


def build(folder: Path, name: str) -> Path:
    """The checkpoint in `folder`, made unless it is there and complete: conversion.json is written last.

    That file also says that Baichuan2's head is a NormHead. Raises UserError for an unknown name or too small a disk.
    """
    if name not in SHAPES:
        raise UserError(f"unknown shape {name}. There are {', '.join(SHAPES)}.")
    marker, shape = folder / "conversion.json", SHAPES[name]
    if marker.exists() and json.loads(marker.read_text())["source"] == name:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    needed, free = HALF_BYTES * shape.parameters, shutil.disk_usage(folder).free
    if needed > free:
        need = f"{folder}: {name} needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free."
        raise UserError(f"{need} Name a folder on a larger disk, or one in memory (/dev/shm).")
    started = time.monotonic()
    (folder / "config.json").write_text(json.dumps(config_of(name), indent=2))
    write_tokenizer(folder, name)
    write_weights(folder, shape)
    marker.write_text(json.dumps({"source": name, "norm_head": not is_qwen(name)}))
    seconds = time.monotonic() - started
    print(f"{folder}: {shape.parameters:,} random weights in {seconds:.0f} s", file=sys.stderr, flush=True)
    return folder


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", help=", ".join(SHAPES))
    flags = parser.parse_args()
    build(flags.folder, flags.name)


if __name__ == "__main__":
    run_main(main)
