"""Batched generation with any causal model: prompts sorted by length, padded on the left, cut by a token budget.

Shapes: B prompts of one batch, T tokens of the longest of them. Nothing of the checkpoint's generation config but its
end tokens takes part: a repetition penalty or a temperature hidden there would change a measurement.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from finetune.errors import UserError
from finetune.shared_prefix import NOTHING_SHARED, SharedPrefix

MAX_ROWS = 256
UNFINISHED = "\ufffd"  # what a tokenizer decodes half a character to
Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy, top_k 0 and top_p 1 mean no cut."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


GREEDY = Sampling()


def causal_model(model: Any) -> Any:
    """The transformers model inside a PeftModel (its layers already carry the adapter), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def default_token_budget(device: torch.device) -> int:
    """Tokens of one batch: enough to fill a card; on a CPU small batches lose nothing and show progress."""
    return 16384 if device.type == "cuda" else 4096


def stop_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: those of the checkpoint's generation config and the tokenizer's own, in this order."""
    named = causal_model(model).generation_config.eos_token_id
    ids = list(named) if isinstance(named, (list, tuple)) else [named]
    return [i for i in dict.fromkeys([*ids, tokenizer.eos_token_id]) if i is not None]


def pad_token_id(tokenizer: Any, stop_ids: Sequence[int]) -> int:
    """The tokenizer's padding id, or an end token: padded positions are masked, so any id would do."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (list(stop_ids) or [0])[-1]


def plan_batches(lengths: Sequence[int], token_budget: int, max_rows: int = MAX_ROWS) -> list[list[int]]:
    """Indices of `lengths` in batches, longest first, rows x longest row <= token_budget; a longer row is alone.

    Longest first, so that memory runs out in the first batch or never.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        batch = batches[-1] if batches else []
        if batch and len(batch) < max_rows and (len(batch) + 1) * lengths[batch[0]] <= token_budget:
            batch.append(index)
        else:
            batches.append([index])
    return batches


def left_pad(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device, num_shared: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids_BT, attention_mask_BT), every prompt ending in the last column.

    The first `num_shared` tokens, which have a cache already, stay in the first columns: the padding is behind them.
    """
    longest = max(map(len, prompts))
    gaps = [longest - len(p) for p in prompts]
    rows = [[*p[:num_shared], *[pad_id] * gap, *p[num_shared:]] for p, gap in zip(prompts, gaps, strict=True)]
    mask = [[1] * num_shared + [0] * gap + [1] * (longest - num_shared - gap) for gap in gaps]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


class OutOfMemoryGuard:
    """Runs a batch in as many parts as the card's memory asks for; a number found once holds for the later batches."""

    def __init__(self) -> None:
        self.parts = 1

    def run(self, function: Callable[[list[Item]], list[Result]], items: list[Item]) -> list[Result]:
        """Results of all items in order. Raises UserError when a single item does not fit."""
        while True:
            size = -(-len(items) // self.parts)
            try:
                return [result for i in range(0, len(items), size) for result in function(items[i : i + size])]
            except torch.OutOfMemoryError:
                if size == 1:
                    raise UserError(
                        "the GPU's memory does not hold one row: shorten it, load the model in 4 bit, "
                        "or free the card (`make gpu` shows who uses it)."
                    ) from None
            # behind the except block: the failed call's tensors live as long as its traceback
            self.parts *= 2
            torch.cuda.empty_cache()


@contextmanager
def _generation_config(model: Any, config: Any) -> Iterator[None]:
    """`model.generate` fills what a config leaves open from the model's own, so that is replaced meanwhile."""
    saved, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = saved


def _settings(sampling: Sampling, max_new_tokens: int, stop_ids: list[int], pad_id: int) -> Any:
    from transformers import GenerationConfig

    chosen: dict[str, Any] = {"do_sample": sampling.temperature > 0, "repetition_penalty": sampling.repetition_penalty}
    if sampling.temperature > 0:
        chosen |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stop_ids or None, pad_token_id=pad_id, **chosen)


def decode_answer(tokenizer: Any, token_ids: Sequence[int], stop_ids: Sequence[int]) -> str:
    """The text before the first end token."""
    end = next((i for i, token in enumerate(token_ids) if token in stop_ids), len(token_ids))
    text = tokenizer.decode(list(token_ids[:end]), skip_special_tokens=True)
    if UNFINISHED not in text:
        return text
    from finetune.stream import TextAssembler  # which imports this file

    # decoded at once, a half character makes sentencepiece's decoder give up the whole characters before it too
    assembler = TextAssembler(tokenizer)
    return "".join([*(assembler.add(token_id) for token_id in token_ids[:end]), assembler.rest()])


@torch.inference_mode()
def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    shared: SharedPrefix = NOTHING_SHARED,
) -> list[str]:
    """One answer for each prompt (lists of token ids), all in one padded batch. All of them begin with `shared`."""
    lm, stop_ids = causal_model(model), stop_token_ids(model, tokenizer)
    pad_id = pad_token_id(tokenizer, stop_ids)
    input_ids_BT, attention_mask_BT = left_pad(prompts, pad_id, lm.device, shared.num_tokens)
    cache = shared.copies(len(prompts))
    with _generation_config(lm, _settings(sampling, max_new_tokens, stop_ids, pad_id)):
        output_BT = lm.generate(
            input_ids=input_ids_BT, attention_mask=attention_mask_BT, **({"past_key_values": cache} if cache else {})
        )
    answers = output_BT[:, input_ids_BT.shape[1] :].tolist()
    return [decode_answer(tokenizer, answer, stop_ids) for answer in answers]


def generate_batches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    batches: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    num_shared: int = 0,
) -> Iterator[list[tuple[int, str]]]:
    """(index, answer) pairs, one list for each of `batches` (indices of `prompts`, as plan_batches makes them).

    With sampling every batch has its own seed, so that a run which was cut and goes on draws the same. The first
    `num_shared` tokens, the same in all prompts of these batches, are computed once.
    Raises UserError when a single prompt does not fit the card.
    """
    if not batches:
        return
    guard, shared = OutOfMemoryGuard(), SharedPrefix(causal_model(model), prompts[batches[0][0]][:num_shared])
    for batch in batches:
        if sampling.temperature > 0:
            torch.manual_seed(seed + batch[0])
        texts = guard.run(
            lambda part: generate_batch(model, tokenizer, [prompts[i] for i in part], max_new_tokens, sampling, shared),
            list(batch),
        )
        yield list(zip(batch, texts, strict=True))


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    token_budget: int | None = None,
    max_rows: int = MAX_ROWS,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> Iterator[tuple[int, str]]:
    """(index, answer) of every prompt (lists of token ids), longest prompts first."""
    budget = token_budget or default_token_budget(causal_model(model).device)
    batches = plan_batches([len(p) + max_new_tokens for p in prompts], budget, max_rows)
    for pairs in generate_batches(model, tokenizer, prompts, batches, max_new_tokens, sampling, seed):
        yield from pairs
