"""Measure full-parameter training: random weights of Baichuan2-7B's shape through llm_code.train with a shipped config.

    python -m benchmarks.bench_full FOLDER                       # one card: 15 GB of weights are made, 20 updates run
    python -m benchmarks.bench_full FOLDER --shape tiny          # the same on a CPU, in seconds
    python -m benchmarks.bench_full FOLDER --per_device_train_batch_size 16    # further flags go to llm_code.train

Writes FOLDER/{model,rows.jsonl,output,bench.json}. Rows have log-normal lengths, 64 to 1024 tokens, 330 on average. The
first updates are left out of the speed: they warm kernels and allocator up. Prints a table: tokens per second, the
share of this device's measured bfloat16 product rate (6 FLOP a parameter a token), peak memory against the plan.
"""

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from finetune.memory import KNOWN_SHAPES, Shape
from finetune.speed import full_flops_per_token

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = "llm_code/training_config/baichuan2_config.json"
SHAPES = {"baichuan2-7b": KNOWN_SHAPES["baichuan2-7b"], "tiny": Shape(64, 2, 4, 4, 16, 128, 1024)}
MEAN_TOKENS, SHORTEST, LONGEST, SPREAD = 330, 64, 1024, 0.6
USER, ASSISTANT = 195, 196  # Baichuan2's ids of <reserved_106> and <reserved_107>
SHARD_LAYERS = 8
WARM_UP_UPDATES = 4


# ---- a model and rows of the right size ----


def config_of(shape: Shape) -> dict[str, Any]:
    """config.json as the conversion of Baichuan2-7B-Chat writes it."""
    from finetune.checkpoint.baichuan2 import native_config

    source = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return native_config(source, "bfloat16", {})


def write_weights(folder: Path, shape: Shape) -> None:
    """Random weights in shards, made on the card where there is one."""
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(0)

    def drawn(*size: int) -> torch.Tensor:
        values = torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16) * 0.02
        return values.cpu()

    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ends = {
        "model.embed_tokens.weight": drawn(shape.vocabulary, shape.hidden),
        "lm_head.weight": drawn(shape.vocabulary, shape.hidden),
        "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
    }
    files, starts = {"model-ends.safetensors": sorted(ends)}, range(0, shape.layers, SHARD_LAYERS)
    save_file(ends, folder / "model-ends.safetensors", metadata={"format": "pt"})
    del ends
    for start in starts:
        part = {}
        for layer in range(start, min(start + SHARD_LAYERS, shape.layers)):
            prefix = f"model.layers.{layer}."
            for name, (inputs, outputs) in zip(names, shape.projections, strict=True):
                block = "self_attn" if name[0] in "qkvo" else "mlp"
                part[f"{prefix}{block}.{name}.weight"] = drawn(outputs, inputs)
            for name in ("input_layernorm", "post_attention_layernorm"):
                part[f"{prefix}{name}.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
        file = f"model-{start:02d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        files[file] = sorted(part)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_tokenizer(folder: Path, shape: Shape) -> None:
    """One token a word, w1000 being id 1000; Baichuan2's control tokens and chat template."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from finetune.checkpoint.chat_templates import BAICHUAN2_TEMPLATE

    special = {0: "<unk>", 1: "<s>", 2: "</s>", USER: "<reserved_106>", ASSISTANT: "<reserved_107>"}
    vocabulary = {special.get(i, f"w{i}"): i for i in range(shape.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special.values()])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<unk>", unk_token="<unk>"
    )
    wrapped.chat_template = BAICHUAN2_TEMPLATE
    wrapped.save_pretrained(folder)


def build_model(folder: Path, name: str) -> None:
    """FOLDER/model, unless it is there and complete: its marker, which says that the head is a NormHead, comes last."""
    marker, shape = folder / "conversion.json", SHAPES[name]
    if marker.exists() and json.loads(marker.read_text())["source"] == name:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.monotonic()
    (folder / "config.json").write_text(json.dumps(config_of(shape), indent=2))
    write_tokenizer(folder, shape)
    write_weights(folder, shape)
    marker.write_text(json.dumps({"source": name, "norm_head": True}))
    print(f"{folder}: {shape.parameters:,} random weights in {time.monotonic() - started:.0f} s", file=sys.stderr)


def draw_lengths(count: int, seed: int = 0) -> list[int]:
    """Log-normal lengths between SHORTEST and LONGEST whose mean is about MEAN_TOKENS."""
    draw = random.Random(seed)
    middle = math.log(MEAN_TOKENS) - SPREAD**2 / 2 + 0.02  # cutting at LONGEST takes a little off the mean
    return [round(min(LONGEST, max(SHORTEST, draw.lognormvariate(middle, SPREAD)))) for _ in range(count)]


def write_rows(path: Path, count: int, shape: Shape) -> None:
    """Rows of one exchange; a fifth of each is the question. Two control tokens and the end belong to the length."""
    draw = random.Random(1)
    with open(path, "w", encoding="utf-8") as file:
        for length in draw_lengths(count):
            words = [f"w{draw.randrange(ASSISTANT + 1, shape.vocabulary)}" for _ in range(length - 3)]
            cut = max(1, len(words) // 5)
            turn = {"human": " ".join(words[:cut]), "assistant": " ".join(words[cut:])}
            file.write(json.dumps({"conversation": [turn]}) + "\n")


# ---- what is measured ----


def product_rate() -> float:
    """FLOP/s of the best of some large products, bfloat16 on a card, float32 on a CPU."""
    import torch

    on_card = torch.cuda.is_available()
    size, repeats = (8192, 20) if on_card else (512, 5)
    left, right = (
        torch.randn(size, size, device="cuda" if on_card else "cpu", dtype=torch.bfloat16 if on_card else torch.float32)
        for _ in range(2)
    )
    seconds = []
    for _ in range(repeats):
        if on_card:
            torch.cuda.synchronize()
        started = time.perf_counter()
        torch.mm(left, right)
        if on_card:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / sorted(seconds)[len(seconds) // 2]


def train(folder: Path, updates: int, more: list[str]) -> dict[str, Any]:
    """Run llm_code.train in a process of its own and return its report."""
    output_dir = folder / "output"
    shutil.rmtree(output_dir, ignore_errors=True)
    flags = ["--train_args_file", CONFIG, "--model_name_or_path", str(folder / "model"), "--output_dir", output_dir]
    flags += ["--train_file", str(folder / "rows.jsonl"), "--deepspeed", "none", "--max_seq_length", str(LONGEST)]
    flags += ["--max_steps", str(updates), "--num_train_epochs", "100", "--logging_steps", "1", "--warmup_steps", "2"]
    flags += ["--save_strategy", "no", "--report_to", "none", *more]
    done = subprocess.run([sys.executable, "-m", "llm_code.train", *map(str, flags)], cwd=REPOSITORY)
    path = output_dir / "train_report.json"
    if not path.exists():
        sys.exit(done.returncode or 1)
    return json.loads(path.read_text(encoding="utf-8"))


def speed_of(history: list[dict[str, float]]) -> float:
    """Tokens per second after the warm-up, the mean over updates of about equal size."""
    speeds = [entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry][WARM_UP_UPDATES:]
    return len(speeds) / sum(1 / speed for speed in speeds)


def result_of(report: dict[str, Any], shape: Shape, rate: float) -> dict[str, Any]:
    """The measured numbers beside the predicted ones."""
    speed = speed_of(report["history"])
    flops = speed * full_flops_per_token(shape)
    return {
        "devices": report["devices"],
        "parameters": shape.parameters,
        "token_budget": report["token_budget"],
        "layers_not_recomputed": report["layers_not_recomputed"],
        "tokens_per_second": round(speed),
        "tflops": round(flops / 1e12, 3),
        "product_rate_tflops": round(rate / 1e12, 3),
        "share_of_product_rate": round(flops / rate, 4),
        "peak_memory_gib": report["peak_memory_gib"],
        "predicted": report["predicted"],
        "first_loss": report["history"][0]["loss"],
        "last_loss": report["history"][-1]["loss"],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="scratch folder; 35 GB for the real shape")
    parser.add_argument("--shape", choices=SHAPES, default="baichuan2-7b")
    parser.add_argument("--updates", type=int, default=20)
    flags, more = parser.parse_known_args()
    flags.folder.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[flags.shape]
    build_model(flags.folder / "model", flags.shape)
    write_rows(flags.folder / "rows.jsonl", 2000, shape)
    rate = product_rate()
    result = result_of(train(flags.folder, flags.updates, more), shape, rate)
    (flags.folder / "bench.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, value in result.items():
        print(f"{name:<24} {value}")


if __name__ == "__main__":
    main()
