"""A tokenizer's chat template taken apart: which ids and labels stand around the messages of a conversation.

The template is rendered once per sequence of roles, with a marker in the place of every message, and cut at the
markers. So a message's text is never rendered and never encoded together with the template's control tokens. Which
tokens of the template are supervised depends on the family, told by the template and the vocabulary:

- ChatML (Qwen, SmolLM2): as Qwen's finetune.py, <|im_start|>, <|im_end|> and the newline after it in every turn.
- Baichuan2: as its fine-tune.py, nothing ends an answer inside a conversation; the end, </s>, is the label at the next
  user token, and one </s> closes the conversation.
- any other: what the template itself marks with {% generation %}, else what rendering one more answer adds.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from finetune.batching import IGNORE_INDEX
from finetune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use characters occur in no template; the tabs show whether the template strips a message.
MARKER = re.compile("(\t?)\ue000(\\d+)\ue001(\t?)")
IM_START, IM_END, HEADER = "<|im_start|>", "<|im_end|>", "<|im_start|>assistant\n"
USER_TOKEN, ASSISTANT_TOKEN = "<reserved_106>", "<reserved_107>"


@dataclass(frozen=True)
class Fixed:
    """Tokens that the template writes, with their labels."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """The place of message number `message`, and whether the template strips its left and right white space."""

    message: int
    supervised: bool
    strips: tuple[bool, bool]

    def strip(self, text: str) -> str:
        """The message as the template would print it."""
        text = text.lstrip() if self.strips[0] else text
        return text.rstrip() if self.strips[1] else text


@dataclass(frozen=True)
class Skeleton:
    """A rendered conversation without its messages; `num_fixed` counts the template's own tokens."""

    pieces: tuple[Fixed | Slot, ...]
    slots: tuple[Slot, ...]
    num_fixed: int


def skeleton(tokenizer: "PreTrainedTokenizerBase", roles: tuple[str, ...], add_generation_prompt: bool) -> Skeleton:
    """The skeleton of a conversation with these roles.

    Raises UserError when there is no template, or it refuses the roles, drops or moves a message, or does not tell
    which part of the text is an answer.
    """
    return _skeleton(tokenizer, str(tokenizer.chat_template), roles, add_generation_prompt)


@lru_cache(maxsize=1024)
def _skeleton(
    tokenizer: "PreTrainedTokenizerBase", template: str, roles: tuple[str, ...], add_generation_prompt: bool
) -> Skeleton:
    text = _render(tokenizer, roles, add_generation_prompt)
    vocabulary = tokenizer.get_vocab()
    if IM_START in text and IM_START in vocabulary and IM_END in vocabulary:
        pieces = [_chatml(tokenizer, part) for part in _parts(text, roles)]
    elif USER_TOKEN in text and USER_TOKEN in vocabulary and ASSISTANT_TOKEN in vocabulary:
        pieces = _baichuan2(tokenizer, _parts(text, roles), roles, add_generation_prompt)
    else:
        pieces = _marked(tokenizer, text, roles)
    slots = tuple(piece for piece in pieces if isinstance(piece, Slot))
    return Skeleton(tuple(pieces), slots, sum(len(piece.ids) for piece in pieces if isinstance(piece, Fixed)))


def _messages(roles: tuple[str, ...]) -> list[dict[str, str]]:
    return [{"role": role, "content": f"\t\ue000{index}\ue001\t"} for index, role in enumerate(roles)]


def _render(tokenizer: "PreTrainedTokenizerBase", roles: tuple[str, ...], add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template: expected a chat model's tokenizer, "
            "with `chat_template` in tokenizer_config.json or a chat_template.jinja beside it."
        )
    try:
        text = tokenizer.apply_chat_template(
            _messages(roles), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise UserError(f"the chat template refuses the roles {', '.join(roles)}: {error}") from None
    found = [int(match[2]) for match in MARKER.finditer(text)]
    if found != list(range(len(roles))):
        raise UserError(f"the chat template must print each of the messages {', '.join(roles)} once, in their order.")
    return text


def _parts(text: str, roles: tuple[str, ...]) -> list[str | Slot]:
    """The rendered text cut at its markers; pieces of text before, between and after slots, empty ones included."""
    parts: list[str | Slot] = []
    end = 0
    for match in MARKER.finditer(text):
        index = int(match[2])
        parts += [text[end : match.start()], Slot(index, roles[index] == "assistant", (not match[1], not match[3]))]
        end = match.end()
    return [*parts, text[end:]]


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[int, ...]:
    """Ids of a piece of template: here control tokens are meant."""
    return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]) if text else ()


def _chatml(tokenizer: "PreTrainedTokenizerBase", part: str | Slot) -> Fixed | Slot:
    if isinstance(part, Slot):
        return part
    ids = _encode(tokenizer, part)
    start, end = tokenizer.convert_tokens_to_ids([IM_START, IM_END])
    newline = _encode(tokenizer, "\n")
    # What the template itself writes between an answer's header and its text (Qwen3: <think>) is an answer too.
    last = part.rfind(HEADER)
    answer_from = len(_encode(tokenizer, part[: last + len(HEADER)])) if last >= 0 else len(ids)
    labels = [IGNORE_INDEX] * len(ids)
    for i, token in enumerate(ids):
        if token in (start, end) or (i and (ids[i - 1], token) == (end, *newline)) or i >= answer_from:
            labels[i] = token
    return Fixed(ids, tuple(labels))


def _baichuan2(
    tokenizer: "PreTrainedTokenizerBase", parts: list[str | Slot], roles: tuple[str, ...], add_generation_prompt: bool
) -> list[Fixed | Slot]:
    user, end = tokenizer.convert_tokens_to_ids(USER_TOKEN), tokenizer.eos_token_id
    pieces: list[Fixed | Slot] = []
    answered = False
    for part in parts:
        if isinstance(part, Slot):
            pieces.append(part)
            answered = answered or part.supervised
        else:
            ids = _encode(tokenizer, part)
            labels = [end if token == end or (token == user and answered) else IGNORE_INDEX for token in ids]
            pieces.append(Fixed(ids, tuple(labels)))
    if roles[-1] == "assistant" and not add_generation_prompt and pieces[-1] != Fixed((end,), (end,)):
        pieces.append(Fixed((end,), (end,)))
    return pieces


def _marked(tokenizer: "PreTrainedTokenizerBase", text: str, roles: tuple[str, ...]) -> list[Fixed | Slot]:
    """Pieces of any other template; its text is also cut where an answer begins and ends."""
    spans = _answer_spans(tokenizer, text, roles)
    borders = sorted({border for span in spans for border in span})
    pieces: list[Fixed | Slot] = []
    position = 0
    for match in [*MARKER.finditer(text), None]:
        stop = match.start() if match else len(text)
        edges = [position, *(border for border in borders if position < border < stop), stop]
        for left, right in zip(edges, edges[1:], strict=False):
            ids = _encode(tokenizer, text[left:right])
            supervised = any(first <= left and right <= last for first, last in spans)
            pieces.append(Fixed(ids, ids if supervised else (IGNORE_INDEX,) * len(ids)))
        if match:
            index = int(match[2])
            pieces.append(Slot(index, roles[index] == "assistant", (not match[1], not match[3])))
            position = match.end()
    return [piece for piece in pieces if isinstance(piece, Slot) or piece.ids]


def _answer_spans(tokenizer: "PreTrainedTokenizerBase", text: str, roles: tuple[str, ...]) -> list[tuple[int, int]]:
    """Character ranges of `text` that the model should learn to write."""
    if re.search(r"{%-?\s*generation\s*-?%}", tokenizer.get_chat_template()):
        return _generation_spans(tokenizer, roles)
    spans = []
    for index in (index for index, role in enumerate(roles) if role == "assistant"):
        before = _render(tokenizer, roles[:index], True)
        through = _render(tokenizer, roles[: index + 1], False)
        if not (text.startswith(through) and through.startswith(before)):
            raise UserError(
                "the chat template prints a conversation differently once it goes on, so the answers in it cannot be "
                "told apart. Mark them in the template with {% generation %} ... {% endgeneration %}."
            )
        spans.append((len(before), len(through)))
    return spans


def _generation_spans(tokenizer: "PreTrainedTokenizerBase", roles: tuple[str, ...]) -> list[tuple[int, int]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    _, spans = render_jinja_template(
        [_messages(roles)],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        add_generation_prompt=False,
        **tokenizer.special_tokens_map,
    )
    return [tuple(span) for span in spans[0]]
