"""Other ways to train the same: the flags of our command, the rows of its updates, its loss, its report.

    python -m benchmarks.train_peer padded --rows_at_once 4 --train_args_file JSON ...
    python -m benchmarks.train_peer unsloth --tokens_at_once 8192 --recompute unsloth --train_args_file JSON ...
    python -m benchmarks.train_peer float32 --train_args_file JSON ...

`padded` is what QLoRA programs do that are built of transformers, peft and bitsandbytes alone: batches padded to their
longest row, every layer recomputed, all logits. `unsloth` is Unsloth's model on rows packed without padding
(benchmarks.peer_unsloth). `float32` is nobody's way to train, but what all of them would compute without rounding.
Writes OUTPUT_DIR/train_report.json.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finetune import prepare
from finetune.arguments import Arguments, parse_arguments
from finetune.batching import IGNORE_INDEX, plan_epoch
from finetune.errors import UserError, run_main
from finetune.report import versions, write_json
from finetune.updates import count_supervised

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from finetune.conversation import Sample


class Peer(Protocol):
    """A model and how it takes the rows of an update."""

    model: "nn.Module"

    def batches(self, samples: "Sequence[Sample]") -> "list[dict[str, Any]]":
        """The update's rows as keyword arguments of the model, on its device."""

    def loss(self, batch: "dict[str, Any]", num_supervised: int) -> "Tensor":
        """A batch's share of the update's loss: the sum over its supervised tokens, divided by `num_supervised`."""


class Padded:
    """transformers, peft, bitsandbytes."""

    def __init__(self, arguments: Arguments, dtype: "torch.dtype", device: "torch.device", rows_at_once: int) -> None:
        model = _quantized(arguments, dtype, device)
        # In the peer's favour peft's prepare_model_for_kbit_training is left out: it makes the embedding and the head
        # fp32 (2.9 GiB more on a 14B).
        model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = _with_adapter(model, arguments)
        self.device, self.dtype, self.rows_at_once = device, dtype, rows_at_once

    def batches(self, samples: "Sequence[Sample]") -> "list[dict[str, Any]]":
        """Padded on the right to the longest of the batch."""
        return [self._batch(samples[i : i + self.rows_at_once]) for i in range(0, len(samples), self.rows_at_once)]

    def _batch(self, samples: "Sequence[Sample]") -> "dict[str, Any]":
        import torch
        from torch.nn.utils.rnn import pad_sequence

        ids, labels, ones = (
            pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding).to(self.device)
            for rows, padding in (
                ([sample.input_ids for sample in samples], 0),
                ([sample.labels for sample in samples], IGNORE_INDEX),
                ([[1] * len(sample.input_ids) for sample in samples], 0),
            )
        )
        return {"input_ids": ids, "labels": labels, "attention_mask": ones}

    def loss(self, batch: "dict[str, Any]", num_supervised: int) -> "Tensor":
        """transformers' own, as its trainer asks for it; under autocast, as its trainer runs the model."""
        import torch

        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(**batch, num_items_in_batch=num_supervised, use_cache=False).loss


class Float32(Padded):
    """In float32; only the 4-bit weights are what 16-bit ways read, rounded to bfloat16."""

    def __init__(self, arguments: Arguments, dtype: "torch.dtype", device: "torch.device", rows_at_once: int) -> None:
        import torch

        model = _quantized(arguments, dtype, device)
        for module in model.modules():
            if hasattr(module, "compute_dtype"):
                module.compute_dtype = torch.float32
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
        self.model = _with_adapter(model, arguments)
        self.device, self.dtype, self.rows_at_once = device, torch.float32, rows_at_once


def _quantized(arguments: Arguments, dtype: "torch.dtype", device: "torch.device") -> Any:
    """transformers' model with a frozen base in NF4."""
    from transformers import AutoModelForCausalLM

    from finetune.nf4 import nf4_config

    model = AutoModelForCausalLM.from_pretrained(
        arguments.model.model_name_or_path,
        quantization_config=nf4_config(dtype),
        dtype=dtype,
        device_map={"": device},
        attn_implementation="sdpa",
    )
    return model.requires_grad_(False)


def _with_adapter(model: Any, arguments: Arguments) -> Any:
    from finetune.qlora import attach_lora

    lora = arguments.lora
    return attach_lora(model, lora.lora_rank, lora.lora_alpha, lora.lora_dropout)


def updates_of(samples: "Sequence[Sample]", arguments: Arguments) -> "Iterator[list[Sample]]":
    """The rows of our updates, in the order of the file: which rows they are hangs on no budget."""
    lengths = [len(sample.input_ids) for sample in samples]
    per_update = prepare.rows_per_update(arguments, 1)
    for epoch in count():
        for update in plan_epoch(lengths, per_update, 1, max(lengths), arguments.train.seed, epoch):
            yield [samples[row] for row in update.rows]


def train(peer: Peer, samples: "Sequence[Sample]", arguments: Arguments, args: Any) -> list[dict[str, float]]:
    """max_steps updates; loss, gradient norm and tokens per second of each, tokens without padding."""
    import torch
    from transformers import Trainer, get_scheduler

    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, peer.model)
    trained = [parameter for parameter in peer.model.parameters() if parameter.requires_grad]
    optimizer = kind(trained, **{"weight_decay": args.weight_decay, **options})
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, args.max_steps)
    history = []
    peer.model.train()
    for step, rows in enumerate(islice(updates_of(samples, arguments), args.max_steps), 1):
        started = time.monotonic()
        supervised, loss = sum(map(count_supervised, rows)), torch.zeros((), device=args.device)
        for batch in peer.batches(rows):
            part = peer.loss(batch, supervised)
            part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm or float("inf"))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        speed = sum(len(row.input_ids) for row in rows) / (time.monotonic() - started)
        entry = {"step": step, "loss": loss.item(), "grad_norm": norm.item(), "tokens_per_second": speed}
        prepare.say(f"{step}/{args.max_steps}  loss {entry['loss']:.4f}  {speed:,.0f} tokens/s")
        history.append(entry)
    return history


def run(make: Any, arguments: Arguments) -> None:
    """Load, train, write the report. Raises UserError where memory does not suffice."""
    import torch
    from transformers import set_seed

    from finetune.models import load_tokenizer

    prepare.quieten()
    dtype = prepare.compute_dtype(arguments.train.bf16)
    args = prepare.training_arguments(arguments, dtype)
    set_seed(args.seed)
    samples, _ = prepare.load_samples(arguments, load_tokenizer(arguments.model.model_name_or_path))
    prepare.say(f"loading {arguments.model.model_name_or_path}")
    try:
        peer = make(arguments, getattr(torch, dtype), torch.device(args.device))
        prepare.say(f"plan: {args.max_steps} updates")
        history = train(peer, samples, arguments, args)
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of GPU memory: {str(error).splitlines()[0]}") from None
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    content = {"history": history, "peak_memory_gib": peak and round(peak, 2), "versions": versions()}
    folder = Path(arguments.train.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "train_report.json", content)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["padded", "unsloth", "float32"])
    parser.add_argument("--rows_at_once", type=int, default=4, help="padded, float32: rows of a batch")
    parser.add_argument("--tokens_at_once", type=int, default=4096, help="unsloth: tokens of a packed row, at most")
    parser.add_argument("--recompute", choices=["none", "unsloth"], default="unsloth", help="unsloth: checkpointing")
    flags, rest = parser.parse_known_args()
    padded = {"padded": Padded, "float32": Float32}
    if flags.peer in padded:
        make = partial(padded[flags.peer], rows_at_once=flags.rows_at_once)
    else:
        from benchmarks.peer_unsloth import Unsloth

        make = partial(Unsloth, tokens_at_once=flags.tokens_at_once, recompute=flags.recompute == "unsloth")
    run(make, parse_arguments(rest))


if __name__ == "__main__":
    run_main(main)
