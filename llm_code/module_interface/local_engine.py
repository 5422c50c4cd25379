"""The local engine: continuous batching in this process, on the CPU or one GPU, over a loaded transformers model."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune.errors import UserError
from finetune.generate import causal_model, stop_token_ids
from llm_code.module_interface.cache import BLOCK, KeyValuePool, bytes_per_token, round_up
from llm_code.module_interface.checks import check_request
from llm_code.module_interface.decoder import Decoder
from llm_code.module_interface.engine_base import EngineBase, recommended_params
from llm_code.module_interface.interface import EngineDead, EngineLimits, EngineStats, Event, QueueFull, SamplingParams
from llm_code.module_interface.operations import Operations
from llm_code.module_interface.requests import LiveRequest
from llm_code.module_interface.runner import Runner
from llm_code.module_interface.scheduler import PrefillBudget, Scheduler
from llm_code.module_interface.self_check import check_decoder
from llm_code.module_interface.sequence import Sequence as Running
from llm_code.module_interface.slots import Slots
from llm_code.module_interface.worker import Worker

STALLED_SECONDS = 120.0  # without a step while there is work: the engine counts as not alive


@dataclass(frozen=True)
class LocalOptions:
    """How much the local engine takes on; None means what the device suggests."""

    max_batch: int | None = None  # 8 on a CPU, 64 on a GPU
    max_queue: int = 64
    context: int | None = None  # tokens; the model's own limit
    cache_bytes: int | None = None  # memory for keys and values
    queue_timeout: float | None = None  # seconds
    prefill_tokens: int | None = None  # prompt tokens of one step while others are answering
    lookahead: bool | None = None  # start a step before the tokens of the last are read; on a GPU


class LocalEngine(EngineBase):
    """Implements interface.Engine. `on_death` is called once, in the engine's thread, when that ends with an error.

    Raises UserError for a model that the decoder does not cover, and for a cache budget of nothing.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        model_name: str = "local",
        options: LocalOptions = LocalOptions(),
        on_death: Callable[[EngineDead], None] = lambda error: None,
    ) -> None:
        lm = causal_model(model)
        super().__init__(tokenizer, model_name, recommended_params(lm.generation_config))
        context = min(options.context or lm.config.max_position_embeddings, lm.config.max_position_embeddings)
        decoder = Decoder(model, context)
        on_gpu = decoder.device.type == "cuda"
        max_batch = options.max_batch or (64 if on_gpu else 8)
        pool = make_pool(decoder, len(decoder.layers), max_batch, context, options.cache_bytes)
        context = min(context, pool.scratch)
        slots = Slots(max_batch, decoder.vocabulary, pool.scratch, decoder.device)
        shared = options.prefill_tokens or (1024 if on_gpu else 64)
        budget = PrefillBudget(shared, options.prefill_tokens or 4 * shared)
        scheduler = Scheduler(pool, slots, budget, options.queue_timeout)
        end_ids = stop_token_ids(model, tokenizer)
        runner = make_runner(decoder, pool, slots, end_ids)
        check_decoder(model, runner)
        lookahead = on_gpu if options.lookahead is None else options.lookahead
        self.limits = EngineLimits(
            context, decoder.vocabulary, max_batch, options.max_queue, queue_timeout=options.queue_timeout
        )
        self._worker = Worker(scheduler, runner, frozenset(end_ids), lookahead, on_death, self.texts.pieces)

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, on_event: Callable[[Event], None] | None = None
    ) -> LiveRequest:
        """See interface.Engine."""
        max_tokens = check_request(prompt_ids, params, self.limits)
        request = LiveRequest(on_event)
        sequence = Running(prompt_ids, params, max_tokens, request, self.tokenizer)
        sequence.seed = random.getrandbits(63) if params.seed is None else params.seed
        request.on_cancel = lambda: self._worker.cancel(sequence)
        limit = self.limits.max_batch + self.limits.max_queue
        if not self._worker.submit(sequence, limit):
            raise QueueFull(f"{limit} requests run or wait already; try again later.")
        return request

    def stats(self) -> EngineStats:
        """See interface.Engine."""
        worker, scheduler = self._worker, self._worker.scheduler
        idle, running = worker.seconds_since_step, len(scheduler.running)
        total, kept = scheduler.allocator.num_tokens, scheduler.prefixes.num_tokens
        return EngineStats(
            alive=worker.error is None and worker.thread.is_alive() and idle < STALLED_SECONDS,
            running=running,
            waiting=max(worker.num_accepted - running, 0),
            cache_blocks_total=total // BLOCK,
            cache_blocks_used=max(total - scheduler.allocator.num_free - kept, 0) // BLOCK,
            cache_blocks_cached=kept // BLOCK,
            block_tokens=BLOCK,
            seconds_since_step=idle,
            requests=dict(scheduler.ended),
            prompt_tokens=scheduler.num_prompt_tokens,
            cached_tokens=scheduler.num_cached_tokens,
            generated_tokens=scheduler.num_generated,
            steps=worker.steps,
        )

    def close(self, drain_seconds: float = 0.0) -> None:
        """See interface.Engine."""
        self._worker.stop(drain_seconds)


def make_pool(decoder: Decoder, num_layers: int, max_batch: int, context: int, cache_bytes: int | None) -> KeyValuePool:
    """Keys and values within the memory budget, but no more than max_batch whole contexts. Raises UserError if tiny."""
    one = bytes_per_token(num_layers, decoder.num_kv_heads, decoder.head_size, decoder.dtype)
    budget = default_cache_bytes(decoder.device) if cache_bytes is None else cache_bytes
    tokens = min(budget // one // BLOCK * BLOCK, max_batch * round_up(context))
    if tokens < BLOCK:
        raise UserError(f"the cache needs at least {BLOCK * one} bytes for {BLOCK} tokens, its budget is {budget}.")
    return KeyValuePool(num_layers, tokens, decoder.num_kv_heads, decoder.head_size, decoder.dtype, decoder.device)


def default_cache_bytes(device: torch.device) -> int:
    """On a GPU what is free now but for a tenth of the card; on a CPU at most 2 GiB."""
    if device.type != "cuda":
        return 2 << 30
    free, total = torch.cuda.mem_get_info(device)
    return max(free - total // 10, 0)


def make_runner(decoder: Decoder, pool: KeyValuePool, slots: Slots, end_ids: Sequence[int]) -> Runner:
    """The plain runner on a CPU, the one with captured graphs on a GPU."""
    if decoder.device.type != "cuda":
        return Runner(decoder, Operations(), pool, slots, end_ids)
    from llm_code.module_interface.gpu_operations import choose_operations
    from llm_code.module_interface.graphs import GraphRunner

    return GraphRunner(decoder, choose_operations(decoder), pool, slots, end_ids)
