"""Self-check of the training kernels on this machine: each against a float32 reference on random inputs.

    python -m benchmarks.check_cuda [--device cuda|cpu]

Prints one line per comparison: the relative error of outputs and of every gradient (norm of the difference over norm of
the reference), the bound, the time of a forward and backward pass. Exit 1 when a bound is exceeded. On a CPU the sizes
are small and only the paths that a CPU has are run.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.attention import attend_rows, enable_padding_free_attention, padding_free_attention
from finetune.batching import collate
from finetune.dropout import draw_seed, dropout
from finetune.loss import UnitRows, enable_chunked_loss, summed_cross_entropy
from finetune.nf4 import dense_weight
from finetune.projection import fuse_projections
from finetune.qlora import apply_liger

DEEP_BOUND = 0.04  # a whole model: the roundings of all its layers
BOUND = 0.01  # bf16 keeps 8 bits: 0.4 % a rounding, and errors of a few roundings add up as a random walk


@dataclass(frozen=True)
class Sizes:
    tokens: int
    heads: int
    head_size: int
    hidden: int
    wide: int
    rank: int
    supervised: int
    vocabulary: int


QWEN_14B = Sizes(4096, 40, 128, 5120, 13696, 64, 1024, 152064)
SMALL = Sizes(192, 4, 16, 128, 192, 8, 24, 500)
Case = tuple[str, Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    sizes = QWEN_14B if device.type == "cuda" else SMALL
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, small sizes"
    print(f"torch {torch.__version__} on {name}, bfloat16 against float32")
    print(f"{'what':52} {'worst of':>10} {'error':>9} {'bound':>7} {'ms':>8}")
    exceeded = 0
    for title, kernel, reference, inputs in cases(device, sizes):
        bound = DEEP_BOUND if "model" in title else BOUND
        errors, milliseconds = compare(kernel, reference, inputs)
        worst = max(errors, key=errors.__getitem__)
        # Not a number is larger than no bound, so the question is asked the other way round.
        wrong = not errors[worst] <= bound or any(error != error for error in errors.values())
        exceeded += wrong
        mark = "  EXCEEDED" if wrong else ""
        print(f"{title:52} {worst:>10} {errors[worst]:9.2e} {bound:7.2g} {milliseconds:8.2f}{mark}", flush=True)
    print(f"{exceeded} bounds exceeded")
    return int(exceeded > 0)


def cases(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """Title, kernel, reference and the inputs that get gradients; the reference is called with float32 copies."""
    torch.manual_seed(0)
    yield from attention_cases(device, sizes)
    yield from projection_cases(device, sizes)
    yield from loss_cases(device, sizes)
    yield from model_cases(device, sizes)


def compare(kernel: Callable, reference: Callable, inputs: list[Tensor]) -> tuple[dict[str, float], float]:
    """Relative error of the output and of the gradient of each input, and milliseconds of the kernel's second run."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    torch.manual_seed(1)
    expected = reference(*wide)
    weights = torch.randn_like(expected)
    for _ in range(2):
        torch.manual_seed(1)
        start = now(inputs[0].device)
        output = kernel(*leaves)
        grads = torch.autograd.grad((output.float() * weights).sum(), leaves)
        milliseconds = (now(inputs[0].device) - start) * 1e3
    expected_grads = torch.autograd.grad((expected * weights).sum(), wide)
    pairs = {"output": (output, expected)}
    pairs |= {f"grad {i}": pair for i, pair in enumerate(zip(grads, expected_grads, strict=True))}
    return {name: ((a.float() - b).norm() / b.norm()).item() for name, (a, b) in pairs.items()}, milliseconds


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def attention_cases(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """Rows of uneven lengths with as many, and with fewer, key/value heads; a sliding window; one row alone."""
    cuts = sorted(torch.randperm(sizes.tokens - 1)[:23].add(1).tolist())
    many = torch.tensor([0, *cuts, sizes.tokens], dtype=torch.int32, device=device)
    one = torch.tensor([0, sizes.tokens], dtype=torch.int32, device=device)
    for title, borders, groups, window in (
        ("24 rows", many, 1, None),
        ("24 rows, grouped-query heads", many, 4, None),
        ("24 rows, window of 16", many, 1, 16),
        ("one row", one, 1, None),
    ):
        longest = int(borders.diff().max())
        query, key, value = (
            torch.randn(1, heads, sizes.tokens, sizes.head_size, device=device, dtype=torch.bfloat16)
            for heads in (sizes.heads, sizes.heads // groups, sizes.heads // groups)
        )

        def kernel(q, k, v, borders=borders, longest=longest, window=window):
            module = nn.Module()
            return padding_free_attention(
                module, q, k, v, None, cu_seq_lens_q=borders, max_length_q=longest, sliding_window=window
            )[0]

        def reference(q, k, v, borders=borders, window=window):
            return attend_rows(q, k, v, borders, window=window)

        yield f"padding-free attention, {title}", kernel, reference, [query, key, value]


def projection_cases(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """The fused projection and peft's path, each against the formula on the dequantised weight."""
    x = torch.randn(sizes.tokens, sizes.hidden, device=device, dtype=torch.bfloat16)
    a = torch.randn(sizes.rank, sizes.hidden, device=device) / sizes.hidden**0.5
    b = torch.randn(sizes.wide, sizes.rank, device=device) / sizes.rank**0.5
    for rate in (0.0, 0.1):
        # peft draws its mask from the device's generator, the fused projection from a seed.
        for fused in (True, False) if not rate else (True,):
            layer = lora_layer(device, sizes, rate, fused)

            def kernel(x, a, b, layer=layer):
                with torch.autocast(x.device.type, dtype=torch.bfloat16):
                    return functional_call(layer, x, a, b)

            def reference(x, a, b, layer=layer, rate=rate):
                base = layer.get_base_layer()
                mask = dropout(torch.ones_like(x), rate, draw_seed()) if rate else 1.0
                return x @ dense_weight(base, torch.float32).T + base.bias.float() + 0.5 * (x * mask) @ a.T @ b.T

            title = "fused NF4 projection" if fused else "peft's NF4 projection"
            yield f"{title}, dropout {rate}", kernel, reference, [x, a, b]


def functional_call(layer: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The layer with a and b as its adapter's weights."""
    names = {"lora_A.default.weight": a, "lora_B.default.weight": b}
    return torch.func.functional_call(layer, names, (x,))


def lora_layer(device: torch.device, sizes: Sizes, rate: float, fused: bool) -> nn.Module:
    """peft's LoRA layer (alpha / r = 0.5) over a random NF4 linear layer, in training mode."""
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, get_peft_model

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = Linear4bit(sizes.hidden, sizes.wide, True, torch.bfloat16, True, "nf4")

        def forward(self, x: Tensor) -> Tensor:
            return self.up_proj(x)

    torch.manual_seed(2)
    model = Model().to(torch.bfloat16).to(device)
    config = LoraConfig(target_modules=["up_proj"], r=sizes.rank, lora_alpha=sizes.rank / 2, lora_dropout=rate)
    model = get_peft_model(model, config).train()
    if fused and fuse_projections(model) != 1:
        raise RuntimeError("the projection was not fused")
    return model.base_model.model.up_proj


def loss_cases(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """The chunked loss with a trained, a frozen and a normalised head, against full logits."""
    hidden = torch.randn(sizes.supervised, sizes.hidden, device=device, dtype=torch.bfloat16)
    weight = torch.randn(sizes.vocabulary, sizes.hidden, device=device, dtype=torch.bfloat16) / sizes.hidden**0.5
    targets = torch.randint(0, sizes.vocabulary, (sizes.supervised,), device=device)

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")

    def chunked(hidden: Tensor, weight: Tensor) -> Tensor:
        return summed_cross_entropy(hidden, weight, targets, sizes.supervised // 3)

    def frozen(kernel: Callable) -> Callable:
        return lambda hidden: kernel(hidden, weight if hidden.dtype == weight.dtype else weight.float())

    yield "chunked loss", chunked, plain, [hidden, weight]
    yield "chunked loss, frozen head", frozen(chunked), frozen(plain), [hidden]

    def normalized(hidden: Tensor, weight: Tensor) -> Tensor:
        if device.type == "cuda" and hidden.dtype == torch.bfloat16:
            return chunked(hidden, UnitRows.apply(weight))
        return summed_cross_entropy(hidden, weight, targets, sizes.supervised // 3, normalize=True)

    def plain_normalized(hidden: Tensor, weight: Tensor) -> Tensor:
        return plain(hidden, functional.normalize(weight))

    yield "chunked loss, normalised head", normalized, plain_normalized, [hidden, weight]


def model_cases(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """Two layers in bf16 with every kernel switched on, three rows packed, against the same in float32 row by row."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=8 * sizes.head_size,
        intermediate_size=16 * sizes.head_size,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=1000,
        pad_token_id=None,
    )
    plain = Qwen2ForCausalLM(config).to(device)
    model = copy.deepcopy(plain).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    apply_liger(model)
    enable_chunked_loss(enable_padding_free_attention(model), chunk_rows=50)
    lengths = [70, 7, 33]
    samples = [SimpleNamespace(input_ids=ids, labels=ids) for ids in (list(range(length)) for length in lengths)]
    batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in collate(samples).items()}
    ids = batch.pop("input_ids")

    def packed(embeddings: Tensor) -> Tensor:
        return model(inputs_embeds=embeddings, **batch).loss

    def row_by_row(embeddings: Tensor) -> Tensor:
        losses = [
            functional.cross_entropy(plain(inputs_embeds=rows).logits[0, :-1], targets[0, 1:], reduction="sum")
            for rows, targets in zip(embeddings.split(lengths, 1), ids.split(lengths, 1), strict=True)
        ]
        return torch.stack(losses).sum()

    yield "whole model of 2 layers, packed", packed, row_by_row, [model.get_input_embeddings()(ids)]


if __name__ == "__main__":
    raise SystemExit(main())
