"""How much of an adapter's first, small terms comes through a projection in 16 bits.

    python -m benchmarks.small_terms [--model qwen-14b] [--tokens 4096]      # on the card where there is one

B is 0 at first and moves by the learning rate, so what the adapter adds to an output of size 1 begins with 1e-5 to
1e-3, less than half of a bfloat16's last place (0.002 to 0.004). Added to an output that is already rounded, it is lost
entirely; added before the output is rounded, it is kept on the average over tokens. Kept is the slope of (output with
the term, minus output without) over the term: 1 is all of it, 0 nothing. The base weight has the spread 0.02 of a
model's initialisation, the bias a size of its own: Qwen's q and k have large ones.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.random_model import NAMES, SHAPES
from finetune.errors import run_main
from finetune.frozen import Frozen, widened
from finetune.tables import markdown_table

RANK = 64
STEPS = (2.5e-5, 5e-4, 1e-2)  # how far B has moved: one update of warm-up, ten, hundreds
BIAS = 1.0
Product = Callable[[nn.Linear, Tensor, Tensor, Tensor], Tensor]


def ours(base: nn.Linear, x_TI: Tensor, low_TR: Tensor, b_OR: Tensor) -> Tensor:
    """As finetune.projection computes it."""
    return Frozen(base).forward(widened(x_TI, low_TR, RANK), b_OR)


def added_to(base: nn.Linear, x_TI: Tensor, low_TR: Tensor, b_OR: Tensor) -> Tensor:
    """The adapter's output first; the base's product is added to it by the library, then the bias."""
    output_TO = (low_TR @ b_OR.T).addmm_(x_TI, base.weight.T)
    return output_TO if base.bias is None else output_TO.add_(base.bias)


def base_first(base: nn.Linear, x_TI: Tensor, low_TR: Tensor, b_OR: Tensor) -> Tensor:
    """As peft does: the base's output, rounded, then the adapter's."""
    return base(x_TI) + low_TR @ b_OR.T


WAYS = {"ours": ours, "adapter first": added_to, "base first": base_first}


def kept(product: Product, base: nn.Linear, tokens: int, step: float) -> float:
    """The slope of what the adapter changes over what it adds, by least squares."""
    options = {"device": base.weight.device, "dtype": torch.bfloat16}
    outputs = base.out_features
    x_TI = torch.randn(tokens, base.in_features, **options)
    low_TR = 0.15 * torch.randn(tokens, RANK, **options)  # x A^T of a fresh A, lora_alpha / lora_rank of it
    b_OR = step * torch.randn(outputs, RANK, **options).sign()
    term = low_TR.float() @ b_OR.float().T
    change = product(base, x_TI, low_TR, b_OR).float() - product(base, x_TI, low_TR, torch.zeros_like(b_OR)).float()
    return ((change * term).sum() / (term * term).sum()).item()


def rows_of(model: str, tokens: int, device: torch.device) -> list[list[str]]:
    """A line a projection and way: what is kept after each of STEPS."""
    rows, seen = [], set()
    for name, (inputs, outputs) in zip(NAMES, SHAPES[model].projections, strict=True):
        has_bias = SHAPES[model].has_qkv_bias and name[0] in "qkv"
        if (inputs, outputs, has_bias) in seen:
            continue
        seen.add((inputs, outputs, has_bias))
        torch.manual_seed(0)
        base = nn.Linear(inputs, outputs, bias=has_bias, device=device, dtype=torch.bfloat16).requires_grad_(False)
        base.weight.normal_(0, 0.02)
        if has_bias:
            base.bias.normal_(0, BIAS)
        for way, product in WAYS.items():
            rows.append([name, way, *(f"{kept(product, base, tokens, step):.2f}" for step in STEPS)])
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="qwen-14b")
    parser.add_argument("--tokens", type=int, default=4096)
    flags = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{flags.model}, {flags.tokens:,} tokens, {name}, torch {torch.__version__}\n")
    header = ("projection", "way", *(f"B moved by {step:g}" for step in STEPS))
    print("\n".join(markdown_table(header, rows_of(flags.model, flags.tokens, device))))


if __name__ == "__main__":
    run_main(main)
