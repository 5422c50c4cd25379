"""One answer, piece by piece as it is generated: for the terminal chat."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from finetune.generate import GREEDY, UNFINISHED, Sampling, causal_model, stop_token_ids

# Tokens held back at most, else every further one would decode all before it again. A character has at most 4 bytes,
# so honest text holds 3; one half of the places is for them, the other for tokens without a text before them.
MOST_HELD = 8


class TextAssembler:
    """Turns token ids into text as they come, holding back bytes of a character that is not complete yet.

    Bytes that become no character are given out as U+FFFD.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self.tokenizer, self.skip_special_tokens = tokenizer, skip_special_tokens
        self.ids: list[int] = []
        self.context_start = 0  # decoding starts a little earlier: some tokenizers drop a leading space
        self.read = 0  # ids[:read] have been given out

    def _decode(self, end: int | None = None) -> str:
        return self.tokenizer.decode(self.ids[self.context_start : end], skip_special_tokens=self.skip_special_tokens)

    def add(self, token_id: int) -> str:
        """The text that became certain with this token, often empty."""
        self.ids.append(token_id)
        given, text = self._decode(self.read), self._decode()
        num_held = len(self.ids) - self.read
        if text == given and num_held > MOST_HELD // 2:
            self.ids.pop()  # no text, as a control token that is skipped: nothing to remember it for
        if (text.endswith(UNFINISHED) and num_held < MOST_HELD) or len(text) <= len(given):
            return ""
        self.context_start, self.read = self.read, len(self.ids)
        return text[len(given) :]

    def rest(self) -> str:
        """What is still held back at the end, without the unfinished character."""
        return self._decode()[len(self._decode(self.read)) :].rstrip(UNFINISHED)


def _processors(sampling: Sampling) -> Any:
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chosen = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        chosen.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0:
        chosen.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k > 0:
            chosen.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            chosen.append(TopPLogitsWarper(sampling.top_p))
    return chosen


def _generator(device: torch.device, seed: int | None) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def stream_tokens(
    model: Any, prompt_ids: Sequence[int], max_new_tokens: int, sampling: Sampling = GREEDY, seed: int | None = None
) -> Iterator[int]:
    """Token ids one by one, the caller stops at an end token by leaving the loop."""
    lm, cache = causal_model(model), None
    processors, generator = _processors(sampling), _generator(lm.device, seed)
    all_ids = torch.tensor([list(prompt_ids)], device=lm.device)
    new_ids = all_ids
    for _ in range(max_new_tokens):
        # not one block around the loop: it would leave inference mode switched on in the caller between two tokens
        with torch.inference_mode():
            output = lm(input_ids=new_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, scores = output.past_key_values, processors(all_ids, output.logits[:, -1].float())
            if sampling.temperature > 0:
                new_ids = torch.multinomial(scores.softmax(-1), 1, generator=generator)
            else:
                new_ids = scores.argmax(-1, keepdim=True)
            all_ids = torch.cat([all_ids, new_ids], dim=1)
        yield int(new_ids)


def stream_text(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    max_new_tokens: int = 512,
    sampling: Sampling = GREEDY,
    seed: int | None = None,
) -> Iterator[str]:
    """Pieces of the answer to a prompt (token ids); joined they are the answer. A piece never ends in half a character.

    Closing the iterator, or KeyboardInterrupt inside it, stops the computation at once: there is no second thread.
    """
    stop_ids, text = stop_token_ids(model, tokenizer), TextAssembler(tokenizer)
    for token_id in stream_tokens(model, prompt_ids, max_new_tokens, sampling, seed):
        if token_id in stop_ids:
            break
        if piece := text.add(token_id):
            yield piece
    if piece := text.rest():
        yield piece
