"""Pretrain the tiny base model and write it in the original Qwen-1 layout.

    python -m tests.tiny.pretrain tests/tiny/pretrained --num_steps 8000      # minutes on a GPU

The base is what `make quickstart` fine-tunes: it knows the word lists and what a paraphrase is (tests/tiny/corpus.py),
not the task. The weights in tests/tiny/pretrained come from two runs on one H100 or H200, 6 minutes in all: 5,500 steps
with fewer ways to show a pair and to ask about it, then --start_from them --num_steps 2300 --num_documents 1500000
--learning_rate 1e-3 with those of corpus.py.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import time
from pathlib import Path

from tests.tiny.build_qwen1 import build_qwen1, write_weights
from tests.tiny.corpus import documents
from tests.tiny.vocabulary import encoding

NUM_SHARDS = 2
HIDDEN, LAYERS, HEADS, FEED_FORWARD, MAX_TOKENS = 192, 4, 4, 512, 112
TEXT_WEIGHT = 0.3  # of the loss on the text beside that on its ending; chosen here


def encode_documents(job: tuple[int, int]):
    """(ids, kinds) arrays of shape (count, MAX_TOKENS) for job = (seed, count); kinds: 1 text, 2 ending, 0 padding."""
    import numpy as np

    seed, count = job
    codec = encoding()
    end = codec.encode_single_token("<|endoftext|>")
    ids = np.full((count, MAX_TOKENS), end, dtype=np.uint16)
    kinds = np.zeros((count, MAX_TOKENS), dtype=np.uint8)
    for row, (text, ending) in enumerate(itertools.islice(documents(seed), count)):
        head = codec.encode(text, allowed_special="all")
        tail = codec.encode(ending, allowed_special="all") + [end]
        line = (head + tail)[:MAX_TOKENS]
        ids[row, : len(line)] = line
        kinds[row, : len(line)] = 2
        kinds[row, : len(head)] = 1
    return ids, kinds


def build_corpus(num_documents: int, num_processes: int):
    """All documents as two tensors (N, T): ids and kinds."""
    import numpy as np
    import torch

    share = math.ceil(num_documents / num_processes)
    with multiprocessing.Pool(num_processes) as pool:
        parts = pool.map(encode_documents, [(1000 + i, share) for i in range(num_processes)])
    ids, kinds = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return torch.from_numpy(ids.astype("int32")), torch.from_numpy(kinds)


def build_model(config: dict):
    """The random model in the native classes, for a config.json in Qwen-1's keys."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    heads = config["num_attention_heads"]
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=config["intermediate_size"] // 2,
            max_position_embeddings=config["seq_length"],
            rms_norm_eps=config["layer_norm_epsilon"],
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


def load_model(folder: Path):
    """The model of a native checkpoint in float32, to go on from."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def weighted_loss(model, ids_BT, kinds_BT):
    """Mean loss over the endings plus TEXT_WEIGHT times that over the texts; the share of endings that start right."""
    import torch

    logits_BTV = model(input_ids=ids_BT).logits[:, :-1].float()
    target_BT, kinds_BT = ids_BT[:, 1:], kinds_BT[:, 1:]
    loss_BT = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten(), reduction="none")
    loss_BT = loss_BT.view_as(target_BT)
    text, ending = kinds_BT == 1, kinds_BT == 2
    first = ending & (torch.nn.functional.pad(kinds_BT, (1, 0), value=1)[:, :-1] == 1)
    hits = (logits_BTV.argmax(-1) == target_BT)[first].float().mean()
    return loss_BT[ending].mean() + TEXT_WEIGHT * loss_BT[text].mean(), hits


def train(model, ids, kinds, num_steps: int, batch_size: int, learning_rate: float, device: str) -> None:
    """AdamW with a warm-up and a cosine to a tenth; prints every 250 steps."""
    import torch

    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    warm, started = min(200, num_steps // 10 + 1), time.monotonic()
    decay = lambda step: min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * step / num_steps))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    ids, kinds = ids.to(device), kinds.to(device)
    for step in range(num_steps):
        rows = torch.randint(len(ids), (batch_size,), device=device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss, hits = weighted_loss(model, ids[rows].long(), kinds[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 250 == 0 or step == num_steps - 1:
            seconds = time.monotonic() - started
            print(f"step {step} loss {loss.item():.4f} endings {hits.item():.3f} {seconds:.0f} s", flush=True)


def qwen1_state_dict(model) -> dict:
    """The native weights under Qwen-1's names, bf16: the inverse of finetune.checkpoint."""
    import torch

    native = {name: tensor.detach().cpu().to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    state = {"transformer.wte.weight": native["model.embed_tokens.weight"], "lm_head.weight": native["lm_head.weight"]}
    state["transformer.ln_f.weight"] = native["model.norm.weight"]
    for i in range(model.config.num_hidden_layers):
        old, new = f"transformer.h.{i}.", f"model.layers.{i}."
        for kind in ("weight", "bias"):
            parts = [native[f"{new}self_attn.{p}_proj.{kind}"] for p in "qkv"]
            state[f"{old}attn.c_attn.{kind}"] = torch.cat(parts)
        renamed = {
            "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj",
            "mlp.w1": "mlp.up_proj", "mlp.w2": "mlp.gate_proj", "mlp.c_proj": "mlp.down_proj",
        }  # fmt: skip
        state |= {f"{old}{a}.weight": native[f"{new}{b}.weight"] for a, b in renamed.items()}
    return state


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num_steps", type=int, default=8000)
    parser.add_argument("--num_documents", type=int, default=3_000_000)
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--start_from", type=Path, help="native checkpoint of this shape (default: random weights)")
    args = parser.parse_args()

    import torch

    started = time.monotonic()
    ids, kinds = build_corpus(args.num_documents, multiprocessing.cpu_count())
    print(f"{len(ids)} documents in {time.monotonic() - started:.0f} s", flush=True)
    build_qwen1(
        args.folder, hidden_size=HIDDEN, num_layers=LAYERS, num_heads=HEADS, ff_size=FEED_FORWARD, num_shards=NUM_SHARDS
    )
    config = json.loads((args.folder / "config.json").read_text(encoding="utf-8"))
    model = load_model(args.start_from) if args.start_from else build_model(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train(model, ids, kinds, args.num_steps, args.batch_size, args.learning_rate, device)
    write_weights(args.folder, qwen1_state_dict(model), NUM_SHARDS, "safetensors")
    print(json.dumps({"parameters": sum(p.numel() for p in model.parameters())}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
