"""The local engine against transformers' own ways to generate, on a CPU with one thread or on a GPU.

    python -m benchmarks.bench_serve [--model_name_or_path DIR] [--rounds 5]     # CPU; default model: SmolLM2-135M
    python -m benchmarks.bench_serve --gpu                                       # a random 7.5 B model, see serve_gpu

All contestants run in this process on copies of one float32 checkpoint, greedy, the same prompts, in rounds of
alternating order. Processor seconds per 1,000 tokens are compared, since wall time on shared cores says little; a
ratio is the median of the rounds' ratios. --plot draws the engine's requests.
"""

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.load import EngineTarget, Job, closed_loop
from benchmarks.load_report import Record, draw, percentile
from finetune.errors import run_main

ENGINE, BATCHING, ENGINE_ONE, LOOP = (
    "engine, 8 at once",
    "generate_batch, 8 at once",
    "engine, alone",
    "generate, alone",
)
BARS = {  # (contestant, peer): processor seconds at most so many times the peer's
    (ENGINE, BATCHING): 1.0,
    (ENGINE_ONE, LOOP): 1.1,
}
FIRST_TOKEN_BAR = 4.0  # a sequential server's median time to the first token, 8 clients, over the engine's


@dataclass(frozen=True)
class Contest:
    """The models (one with the engine's layout, one untouched), and what is asked."""

    engine: Any
    plain: Any
    prompts: list[list[int]]
    new_tokens: int

    def contestants(self) -> dict[str, Callable[[int], int]]:
        """Functions of the round that return the number of tokens they generated."""
        return {
            ENGINE: lambda number: self._ask_engine(self.prompts, number),
            BATCHING: lambda number: self._batching(number),
            ENGINE_ONE: lambda number: self._ask_engine(self.prompts[:1], number),
            LOOP: lambda number: self._loop(number),
        }

    def _fresh(self, prompts: list[list[int]], number: int) -> list[list[int]]:
        """Prompts that no earlier round has asked, so that no cached beginning helps anyone."""
        return [[100 + number, *prompt[1:]] for prompt in prompts]

    def _ask_engine(self, prompts: list[list[int]], number: int) -> int:
        from llm_code.module_interface.interface import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=self.new_tokens, ignore_eos=True)
        requests = [self.engine.submit(prompt, params) for prompt in self._fresh(prompts, number)]
        return sum(len(request.result(600).tokens) for request in requests)

    def _batching(self, number: int) -> int:
        from benchmarks.peers import generate_batch

        return sum(map(len, generate_batch(self.plain, self._fresh(self.prompts, number), self.new_tokens)))

    def _loop(self, number: int) -> int:
        from benchmarks.peers import bare_loop

        return len(bare_loop(self.plain, self._fresh(self.prompts, number)[0], self.new_tokens))


class SequentialTarget:
    """What a server without batching does: one request after another through model.generate."""

    def __init__(self, model: Any, prompts: list[list[int]]) -> None:
        self.model, self.prompts, self.lock = model, prompts, asyncio.Lock()

    async def ask(self, job: Job, note: Callable[[], None]) -> int:
        """Generate in a thread, with a streamer that notes every token."""
        from benchmarks.peers import bare_loop

        async with self.lock:
            prompt = self.prompts[job.number % len(self.prompts)]
            return len(await asyncio.to_thread(bare_loop, self.model, prompt, job.max_tokens, note))


def measure(function: Callable[[int], int], number: int) -> float:
    """Processor seconds of this process per 1,000 tokens."""
    begin = time.process_time()
    tokens = function(number)
    return 1000 * (time.process_time() - begin) / tokens


def contest(subject: Contest, rounds: int) -> dict[str, list[float]]:
    """Processor seconds of every contestant and round; every other round runs in reverse order."""
    contestants = subject.contestants()
    for function in contestants.values():
        function(rounds)
    costs: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        order = list(contestants)[:: -1 if number % 2 else 1]
        for name in order:
            costs[name].append(measure(contestants[name], number))
        print(f"round {number + 1}: " + ", ".join(f"{name} {costs[name][-1]:.1f}" for name in contestants), flush=True)
    return costs


def first_tokens(subject: Contest) -> tuple[float, float, list[Record]]:
    """Median seconds to the first token with 8 clients: the engine, a sequential server; and the engine's records."""
    jobs = [Job(i, 0, subject.new_tokens) for i in range(16)]
    ours = asyncio.run(closed_loop(EngineTarget(subject.engine, subject.prompts), jobs, 8))
    theirs = asyncio.run(closed_loop(SequentialTarget(subject.plain, subject.prompts), jobs, 8))
    medians = [percentile([record.first_token for record in records], 50) for records in (ours, theirs)]
    return medians[0], medians[1], ours


def report(costs: dict[str, list[float]], engine_first: float, sequential_first: float) -> bool:
    """Print the table; whether every bar holds."""
    print(f"\n{'processor seconds per 1,000 tokens':38} {'median':>8} {'least':>8} {'most':>8}")
    for name, values in costs.items():
        print(f"{name:38} {statistics.median(values):8.1f} {min(values):8.1f} {max(values):8.1f}")
    print(f"\n{'comparison':58} {'ratio':>8} {'bar':>8}")
    held = True
    for (name, peer), bar in BARS.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(costs[name], costs[peer], strict=True))
        held &= ratio <= bar
        print(f"{f'cost: {name} / {peer}':58} {ratio:8.2f} {f'<= {bar:.2f}':>8}")
    ratio = sequential_first / engine_first
    title = f"first token, 8 clients: sequential {sequential_first:.2f} s / engine {engine_first:.2f} s"
    print(f"{title:58} {ratio:8.2f} {f'>= {FIRST_TOKEN_BAR:.2f}':>8}")
    return held and ratio >= FIRST_TOKEN_BAR


def load(args: argparse.Namespace) -> Contest:
    import torch

    from benchmarks.smollm2 import DEFAULT, prepare
    from finetune.models import load_for_inference
    from llm_code.module_interface.local_engine import LocalEngine, LocalOptions

    torch.set_num_threads(1)
    folder = args.model_name_or_path or prepare(DEFAULT)
    model, tokenizer = load_for_inference(folder, dtype="float32")
    engine = LocalEngine(model, tokenizer, options=LocalOptions(max_batch=8, cache_bytes=1 << 29))
    plain, _ = load_for_inference(folder, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    lengths = [48, 16, 96, 24, 128, 32, 64, 20]
    prompts = [torch.randint(200, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return Contest(engine, plain, prompts, args.new_tokens)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="folder of a small model (default: SmolLM2-135M, fetched once)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--plot", type=Path, help="write a picture of the engine's requests to this file")
    parser.add_argument("--gpu", action="store_true", help="the GPU's benchmark, as python -m benchmarks.serve_gpu")
    args = parser.parse_args()
    if args.gpu:
        from benchmarks import serve_gpu

        return serve_gpu.main([])
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    subject = load(args)
    costs = contest(subject, args.rounds)
    engine_first, sequential_first, records = first_tokens(subject)
    held = report(costs, engine_first, sequential_first)
    if args.plot:
        draw(records, args.plot)
        print(f"wrote {args.plot}")
    subject.engine.close()
    return 0 if held else 1


if __name__ == "__main__":
    run_main(main)
