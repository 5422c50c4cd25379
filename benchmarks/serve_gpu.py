"""The local engine on a GPU against the bandwidth limit and transformers' continuous batching, in one run.

    python -m benchmarks.serve_gpu [--requests 128] [--concurrency 64] [--new_tokens 128] [--skip_peers]

Builds a random Llama of Baichuan2-7B's shape (7.5 B parameters, bf16) on the card, so nothing is downloaded. Prints
which kernels were chosen, checks of the captured steps, then tables: tokens per second, share of the limit, ratio to
the peer. The limit is the bytes a step must read (weights, keys and values) over the rate of a device-to-device copy.
On a CPU the same code runs on a tiny shape, to try the program.
"""

import argparse
import copy
import gc
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.peers import continuous_batching
from finetune.errors import run_main
from llm_code.module_interface.interface import SamplingParams
from llm_code.module_interface.local_engine import LocalEngine, LocalOptions

SEVEN_B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 125696,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


class NumberTokenizer:
    """Token ids as text, for models without words."""

    eos_token_id = None
    pad_token_id = None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(f" {i}" for i in ids)


def build_model(shape: dict[str, int], device: torch.device, dtype: torch.dtype) -> Any:
    """A random Llama on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = LlamaConfig(**shape, max_position_embeddings=4096, tie_word_embeddings=False, **ends)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def copy_rate(device: torch.device) -> float:
    """Bytes read plus bytes written per second of a large copy on the device."""
    source = torch.empty((1 << 30) if device.type == "cuda" else (1 << 24), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), 20)
    return 2 * source.numel() / seconds


def median_seconds(function: Callable[[], Any], times: int) -> float:
    """Median time of a call, the device's work included."""
    function()
    spans = []
    for _ in range(times):
        synchronize()
        begin = time.perf_counter()
        function()
        synchronize()
        spans.append(time.perf_counter() - begin)
    return statistics.median(spans)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_prompts(count: int, vocabulary: int, low: int, high: int) -> list[list[int]]:
    """Prompts of random ids with lengths spread evenly over low .. high."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(low, high, count).round().int()[torch.randperm(count, generator=generator)]
    return [torch.randint(0, vocabulary, (int(n),), generator=generator).tolist() for n in lengths]


def run_all(
    engine: LocalEngine, prompts: list[list[int]], params: list[SamplingParams]
) -> tuple[float, list[list[int]]]:
    """Seconds for all requests submitted at once, and their tokens."""
    begin = time.perf_counter()
    requests = [engine.submit(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
    tokens = [[token.id for token in request.result(timeout=600).tokens] for request in requests]
    return time.perf_counter() - begin, tokens


def read_bytes(model: Any, contexts: Sequence[float]) -> float:
    """Bytes one decoding step must read for rows with so many tokens each."""
    config = model.config
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    size = config.hidden_size // config.num_attention_heads
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * size * model.dtype.itemsize
    return weights + each * sum(contexts)


def decode_rate(engine: LocalEngine, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
    """(tokens per second while all requests answer, mean number of their tokens meanwhile).

    Counted between the moment the last request has its first token and the moment the first one ends.
    """
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    times: list[list[float]] = [[] for _ in prompts]
    requests = [
        engine.submit(prompt, params, lambda event, mine=mine: mine.append(time.perf_counter()))
        for prompt, mine in zip(prompts, times, strict=True)
    ]
    while not all(request.finished for request in requests):
        time.sleep(0.005)
    begin, end = max(mine[0] for mine in times), min(mine[-1] for mine in times)
    count = sum(begin < moment <= end for mine in times for moment in mine)
    middle = [len(p) + sum(t <= (begin + end) / 2 for t in mine) for p, mine in zip(prompts, times, strict=True)]
    return count / (end - begin), statistics.mean(middle)


def check_captured(engine: LocalEngine, prompts: list[list[int]]) -> None:
    """Log-probabilities with captured steps and without, while both answers are the same.

    The two run products of other sizes, so 16-bit numbers round differently, and a random model's likeliest tokens lie
    close together: answers part after a few tokens. check_small is the exact comparison.
    """
    runner = engine._worker.runner
    params = SamplingParams(temperature=0.0, max_tokens=24, logprobs=1, ignore_eos=True)
    graphs, answers = getattr(runner, "graphs", {}), []
    for used in (graphs, {}):
        runner.graphs = used
        requests = [engine.submit(prompt, params) for prompt in prompts]
        answers.append([request.result(timeout=600).tokens for request in requests])
    runner.graphs = graphs
    differences = []
    for one, other in zip(*answers, strict=True):
        same = itertools.takewhile(lambda pair: pair[0].id == pair[1].id, zip(one, other, strict=True))
        differences.extend(abs(a.logprob - b.logprob) for a, b in same)
    print(
        f"captured against uncaptured steps: {len(differences)} tokens equal before answers part, their "
        f"log-probabilities differ by {max(differences):.1e} at most, {statistics.mean(differences):.1e} on average"
    )


@torch.inference_mode()
def exact_scores(model: Any, prompt: list[int]) -> dict[torch.dtype, torch.Tensor]:
    """(V,) log-probabilities behind a prompt by the model's own forward, in 32 bits and in the model's dtype."""
    ids = torch.tensor([prompt], device=model.device)
    wide = copy.deepcopy(model).float()
    scores = {torch.float32: wide(ids, logits_to_keep=1).logits[0, -1].log_softmax(-1)}
    del wide
    return scores | {model.dtype: model(ids, logits_to_keep=1).logits[0, -1].float().log_softmax(-1)}


def check_logits(engine: LocalEngine, prompt: list[int], scores: dict[torch.dtype, torch.Tensor]) -> None:
    """How far the engine, computing the prompt in chunks, and the model itself are from 32-bit arithmetic."""
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=20, ignore_eos=True)
    found = dict(engine.submit(prompt, params).result(timeout=600).tokens[0].alternatives)
    exact, own = scores[torch.float32], list(scores.values())[-1]
    ours = statistics.mean(abs(exact[i].item() - value) for i, value in found.items())
    its = statistics.mean(abs(exact[i].item() - own[i].item()) for i in found)
    print(
        f"log-probabilities of 20 tokens, mean distance from 32 bits: engine {ours:.1e}, the model's forward {its:.1e}"
    )


def check_small(device: torch.device) -> None:
    """A small float32 model: the engine's greedy answers equal model.generate's, alone and together."""
    shape = TINY | {"num_key_value_heads": 2, "initializer_range": 0.25}
    torch.manual_seed(0)
    model = build_model(shape, device, torch.float32)
    prompts = random_prompts(12, TINY["vocab_size"], 3, 200)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        expected.append(answer[0, len(prompt) :].tolist())
    engine = LocalEngine(model, NumberTokenizer(), options=LocalOptions(max_batch=8, prefill_tokens=32))
    params = [SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)] * len(prompts)
    together = run_all(engine, prompts, params)[1]
    alone = [run_all(engine, [prompt], params[:1])[1][0] for prompt in prompts]
    engine.close()
    equal = sum(one == other == want for one, other, want in zip(together, alone, expected, strict=True))
    print(f"small float32 model, engine against model.generate: {equal} of {len(prompts)} answers of 24 tokens equal")


def print_kernels(engine: LocalEngine) -> None:
    """Where the time of captured steps goes, by kernel."""
    runner = engine._worker.runner
    graphs = getattr(runner, "graphs", {})
    for size in sorted({min(graphs), max(graphs)} if graphs else ()):
        seconds = median_seconds(graphs[size][0].replay, 20)
        print(f"captured step of {size} rows, caches empty: {1e3 * seconds:.2f} ms")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            graphs[size][0].replay()
            synchronize()
        events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)[:8]
        for event in events:
            print(f"    {event.device_time_total / 1e3:7.3f} ms  {event.count:5d} x  {event.key[:90]}")


def measure_engine(args: argparse.Namespace, model: Any, prompts: list[list[int]], rate: float) -> float:
    """Print the engine's rows; returns its tokens per second with many requests."""
    scores = exact_scores(model, prompts[0])
    begin = time.perf_counter()
    engine = LocalEngine(model, NumberTokenizer(), options=LocalOptions(max_batch=args.concurrency, max_queue=4096))
    greedy = SamplingParams(temperature=0.0, max_tokens=args.new_tokens, ignore_eos=True)
    run_all(engine, prompts[:2], [greedy] * 2)
    operations = getattr(engine._worker.runner.operations, "chosen", "plain PyTorch")
    print(f"engine ready in {time.perf_counter() - begin:.1f} s; operations: {operations}")
    print(f"cache: {engine.stats().cache_blocks_total * engine.stats().block_tokens} tokens")
    check_captured(engine, prompts[:8])
    check_logits(engine, prompts[0], scores)
    print(f"\n{'engine':44} {'tokens/s':>9} {'limit':>9} {'share':>7}")
    for rows in sorted({1, min(8, len(prompts)), min(args.concurrency, len(prompts))}):
        speed, context = decode_rate(engine, prompts[:rows], args.new_tokens)
        limit = rows * rate / read_bytes(model, [context] * rows)
        print(f"{f'{rows} together, while answering':44} {speed:9.0f} {limit:9.0f} {speed / limit:7.0%}", flush=True)
    many = _print_many(engine, prompts, [greedy] * len(prompts), f"{len(prompts)} requests, prompts included, greedy")
    varied = [
        SamplingParams(temperature=0.8, top_p=0.9, seed=i, max_tokens=args.new_tokens, ignore_eos=True)
        for i in range(len(prompts))
    ]
    _print_many(engine, prompts, varied, "the same, each its own seed, top_p 0.9")
    try:
        print_kernels(engine)
    except Exception as error:  # a machine whose profiler does not run still has figures
        print(f"no profile of the kernels: {error}")
    engine.close()
    return many


def _print_many(engine: LocalEngine, prompts: list[list[int]], params: list[SamplingParams], title: str) -> float:
    seconds, tokens = run_all(engine, prompts, params)
    speed = sum(map(len, tokens)) / seconds
    print(f"{title:44} {speed:9.0f}", flush=True)
    return speed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--skip_peers", action="store_true")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "CPU, tiny shape"
    rate = copy_rate(device)
    print(f"torch {torch.__version__} on {name}; copy: {rate / 1e12:.2f} TB/s read and written")
    check_small(device)
    model = build_model(SEVEN_B if on_gpu else TINY, device, torch.bfloat16 if on_gpu else torch.float32)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters, {model.dtype}", flush=True)
    prompts = random_prompts(args.requests, model.config.vocab_size, 64, 512)
    many = measure_engine(args, model, prompts, rate)
    if args.skip_peers:
        return 0
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    speed = continuous_batching(model, prompts, args.new_tokens)
    print(f"{'transformers, generate_batch, the same requests':44} {speed:9.0f}   the engine: {many / speed:.1f} x")
    return 0


if __name__ == "__main__":
    run_main(main)
