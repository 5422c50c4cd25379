"""How fast rows become micro-batches, on the CPU alone: what training does before and beside the card.

Read, encode and plan once a run, collate once a micro-batch. The tokenizer's words are short and known, so a real
tokenizer is slower at encoding; the other stages see numbers only.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.random_model import config_of, write_tokenizer
from benchmarks.train_rows import Workload, write_rows

TOKENS_AT_ONCE = 8192


def measure_rows(folder: Path, model: str, workload: Workload, count: int) -> dict[str, Any]:
    """Seconds by stage, rows and tokens per second over all stages."""
    from transformers import AutoTokenizer

    from finetune.batching import collate, plan_epoch
    from finetune.conversation import encode_rows
    from finetune.rows import read_rows

    path = write_rows(folder / "rows", model, workload, count)
    tokenizer = AutoTokenizer.from_pretrained(_tokenizer_dir(folder, model))
    seconds: dict[str, float] = {}

    def timed(stage: str, function: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = function()
        seconds[stage] = round(time.perf_counter() - started, 4)
        return result

    rows = timed("read", lambda: read_rows(path))
    samples, _ = timed("encode", lambda: encode_rows(tokenizer, rows, workload.longest))
    lengths = [len(sample.input_ids) for sample in samples]
    updates = timed("plan", lambda: plan_epoch(lengths, workload.per_update, 1, TOKENS_AT_ONCE, 42, 0))
    parts = [part for update in updates for part in update.micro_batches[0]]
    timed("collate", lambda: [collate([samples[row] for row in part]) and None for part in parts])
    whole = sum(seconds.values())
    speeds = {"tokens_per_second": round(sum(lengths) / whole), "rows_per_second": round(count / whole)}
    return {"rows": count, "tokens": sum(lengths), "stage_seconds": seconds, **speeds}


def _tokenizer_dir(folder: Path, model: str) -> Path:
    """A folder with the tokenizer of a random model, without its weights."""
    target = folder / "tokenizers" / model
    if not (target / "config.json").exists():
        target.mkdir(parents=True, exist_ok=True)
        write_tokenizer(target, model)
        (target / "config.json").write_text(json.dumps(config_of(model)))
    return target
