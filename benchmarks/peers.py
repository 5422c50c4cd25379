"""What the engine is compared with: transformers' own ways to generate, on the same model and prompts."""

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch


def continuous_batching(model: Any, prompts: list[list[int]], new_tokens: int, warm_up: bool = True) -> float:
    """Tokens per second of model.generate_batch over all prompts, warm."""
    if warm_up:
        generate_batch(model, prompts[:4], 8)
    begin = time.perf_counter()
    count = sum(map(len, generate_batch(model, prompts, new_tokens)))
    return count / (time.perf_counter() - begin)


def generate_batch(model: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy answers of exactly `new_tokens` tokens by transformers' continuous batching."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = {}
    if model.device.type == "cpu":  # its default takes all memory there
        known = inspect.signature(ContinuousBatchingConfig).parameters
        sizes = {"page_size" if "page_size" in known else "block_size": 32, "num_blocks": 256, "max_batch_tokens": 256}
    outputs = model.generate_batch(
        inputs=prompts,
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(**sizes),
        progress_bar=False,
    )
    order = sorted(outputs.values(), key=lambda output: int(str(output.request_id).rsplit("_", 1)[-1]))
    return [list(output.generated_tokens) for output in order]


class _Streamer:
    """What generate calls with the prompt, then with every token."""

    def __init__(self, note: Callable[[], None]) -> None:
        self.note, self.seen_prompt = note, False

    def put(self, tokens: torch.Tensor) -> None:
        if self.seen_prompt:
            self.note()
        self.seen_prompt = True

    def end(self) -> None:
        pass


@torch.inference_mode()
def bare_loop(model: Any, prompt: list[int], new_tokens: int, note: Callable[[], None] | None = None) -> list[int]:
    """Greedy tokens of model.generate for one prompt, end tokens or not; `note` is called at every token."""
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        streamer=_Streamer(note) if note else None,
    )
    return output[0, len(prompt) :].tolist()
