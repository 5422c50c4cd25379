"""Conversations to ids and labels, in the tokenizer's own chat format (see finetune.chat_format).

Every message is encoded by itself with its control tokens as plain text, so `<|im_end|>` typed into a message can never
end a turn. The prompt of a conversation is exactly what training saw before the answer.

A row longer than the limit loses its oldest turns; if the last turn alone is too long, its question loses its beginning
(down to a quarter of the room), then its answer loses its end. A row in which no answer token is left is dropped.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.batching import IGNORE_INDEX
from finetune.chat_format import Skeleton, Slot, skeleton
from finetune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.rows import Row

ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Sample:
    """A row as tokens: `labels` stand beside `input_ids`, -100 where unsupervised; `row` is its line in the file."""

    input_ids: list[int]
    labels: list[int]
    row: int


@dataclass(frozen=True)
class EncodeReport:
    """What the length limit did: rows that lost something, rows that were left out, and the lines of the latter."""

    num_cut: int
    num_dropped: int
    dropped_lines: tuple[int, ...] = ()


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[dict[str, str]]) -> list[int]:
    """Ids of role/content messages, ending with the assistant's header. Raises UserError as `skeleton` does."""
    return encode_prompts(tokenizer, [messages])[0]


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Sequence[dict[str, str]]]
) -> list[list[int]]:
    """The same for many conversations; one call of the tokenizer, which uses all cores for it."""
    forms, texts = [], []
    for messages in conversations:
        if not messages:
            raise UserError("expected at least one message, found none.")
        form = skeleton(tokenizer, tuple(message["role"] for message in messages), True)
        texts += [slot.strip(messages[slot.message]["content"]) for slot in form.slots]
        forms.append(form)
    encoded = iter(_encode_contents(tokenizer, texts))
    return [_fill(form, [next(encoded) for _ in form.slots])[0] for form in forms]


def encode_row(tokenizer: "PreTrainedTokenizerBase", row: "Row", max_seq_length: int) -> Sample | None:
    """One row as at most `max_seq_length` tokens, or None when no answer token fits."""
    samples, _ = encode_rows(tokenizer, [row], max_seq_length)
    return samples[0] if samples else None


def encode_rows(
    tokenizer: "PreTrainedTokenizerBase", rows: Iterable["Row"], max_seq_length: int
) -> tuple[list[Sample], EncodeReport]:
    """Rows as samples, in their order, and what the limit did to them."""
    rows = list(rows)
    samples: list[Sample] = []
    dropped: list[int] = []
    num_cut = 0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        block = rows[start : start + ROWS_AT_ONCE]
        for row, contents in zip(block, _contents_of_rows(tokenizer, block), strict=True):
            sample, was_cut = _fit(tokenizer, row, contents, max_seq_length)
            if sample is None:
                dropped.append(row.line)
            else:
                samples.append(sample)
                num_cut += was_cut
    return samples, EncodeReport(num_cut, len(dropped), tuple(dropped))


def _contents_of_rows(tokenizer: "PreTrainedTokenizerBase", rows: Sequence["Row"]) -> list[list[list[int]]]:
    """Ids of every message of every row; one call of the tokenizer, which uses all cores for it."""
    texts, counts = [], []
    for row in rows:
        messages = row.messages()
        slots = skeleton(tokenizer, tuple(message["role"] for message in messages), False).slots
        texts += [slot.strip(messages[slot.message]["content"]) for slot in slots]
        counts.append(len(slots))
    encoded = iter(_encode_contents(tokenizer, texts))
    return [[next(encoded) for _ in range(count)] for count in counts]


def _encode_contents(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Ids of messages, control tokens as text. Raises UserError for a tokenizer that reads them as control tokens."""
    if not texts:
        return []
    encoded = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )["input_ids"]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special -= {tokenizer.unk_token_id}
    for text, ids in zip(texts, encoded, strict=True):
        if not special.isdisjoint(ids):
            raise UserError(f"the tokenizer turns text into control tokens, in the message {text[:60]!r}.")
    return encoded


def _fit(
    tokenizer: "PreTrainedTokenizerBase", row: "Row", contents: list[list[int]], limit: int
) -> tuple[Sample | None, bool]:
    """The row within the limit, and whether anything was cut."""
    roles = tuple(message["role"] for message in row.messages())
    head = 1 if row.system is not None else 0
    for first in range(head, len(roles), 2):
        form = skeleton(tokenizer, roles[:head] + roles[first:], False)
        kept = contents[:head] + contents[first:]
        if form.num_fixed + sum(map(len, kept)) <= limit:
            break
    else:
        kept = _shorten(kept, limit - form.num_fixed)
    ids, labels, answer_start = _fill(form, kept)
    if answer_start >= min(limit, len(ids)):
        return None, True
    # Nothing predicts the first token. An answer that lost its end loses its end token with it.
    return Sample(ids[:limit], [IGNORE_INDEX, *labels[1:limit]], row.line), kept != contents or len(ids) > limit


def _shorten(contents: list[list[int]], room: int) -> list[list[int]]:
    """The messages of one turn, its question cut so that the whole fits, or a quarter of the room is left to it."""
    *system, question, answer = contents
    room -= sum(map(len, system))
    keep = min(len(question), max(room - len(answer), room // 4, 0))
    return [*system, question[len(question) - keep :], answer]


def _fill(form: Skeleton, contents: list[list[int]]) -> tuple[list[int], list[int], int]:
    """Ids, labels, and where the first token of an answer stands (the length when there is none)."""
    ids: list[int] = []
    labels: list[int] = []
    answer_starts = []
    for piece in form.pieces:
        if not isinstance(piece, Slot):
            ids += piece.ids
            labels += piece.labels
            continue
        content = contents[piece.message]
        if piece.supervised and content:
            answer_starts.append(len(ids))
        ids += content
        labels += content if piece.supervised else [IGNORE_INDEX] * len(content)
    return ids, labels, min(answer_starts, default=len(ids))
