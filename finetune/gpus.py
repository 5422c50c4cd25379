"""Graphics cards by name: memory, bf16 rate, links. For plans about any card and for the share of the peak.

Rates are the makers' dense figures with 32-bit accumulation; where a card has no bf16 (V100, T4) it is the fp16 one.
"""

import math
import os
import re
from dataclasses import dataclass, replace

from finetune.errors import UserError

GIB = 2**30
# An H100 SXM measured 784-794 TFLOP/s in an 8192-cubed bf16 product, 0.79 of the datasheet's 989; taken for all cards.
REACHABLE_SHARE = 0.79
# Share of the free memory that is planned with: the rest is for fragments, which grow as a run goes on.
USED_SHARE = 0.94
# nvidia-smi counts what the driver keeps to itself (H100 0.45, A40 0.55, A100 0.8 GiB); programs and the table don't.
DRIVER_GIB = 0.6


@dataclass(frozen=True)
class Gpu:
    """One card: memory in GiB as the driver reports it, peak in TFLOP/s, link to the next card in GB/s each way."""

    name: str
    memory_gib: float
    peak_tflops: float
    link_gb_per_second: float
    has_bf16: bool = True

    @property
    def reachable_flops(self) -> float:
        """FLOP/s of a large bf16 product on this card."""
        return self.peak_tflops * 1e12 * REACHABLE_SHARE


# Sources: NVIDIA datasheets of each card (BF16 tensor core, dense); links: NVLink per direction, else PCIe 3/4/5 x16.
# GeForce and workstation Ada: appendix tables of NVIDIA's Ada and Ampere GA102 whitepapers (FP16 with FP32 accumulate).
GPUS = (
    Gpu("H200", 139.8, 989.0, 450),
    Gpu("H100-80G", 79.2, 989.0, 450),
    Gpu("H100-PCIE-80G", 79.2, 756.0, 64),
    Gpu("H800-80G", 79.2, 989.0, 200),
    Gpu("H20-96G", 95.1, 148.0, 450),
    Gpu("A100-80G", 79.2, 312.0, 300),
    Gpu("A100-40G", 39.4, 312.0, 300),
    Gpu("A800-80G", 79.2, 312.0, 200),
    Gpu("L40S", 44.4, 362.0, 32),
    Gpu("L40", 44.4, 181.0, 32),
    Gpu("L20", 44.5, 119.5, 32),
    Gpu("A40", 44.4, 149.7, 56),
    Gpu("A6000", 47.4, 154.8, 56),
    Gpu("A10", 22.0, 125.0, 32),
    Gpu("A10G", 22.0, 70.0, 32),
    Gpu("RTX-5090", 31.4, 209.5, 64),
    Gpu("RTX-4090", 23.5, 165.2, 32),
    Gpu("RTX-3090", 23.6, 71.0, 56),
    Gpu("V100-32G", 31.7, 125.0, 150, has_bf16=False),
    Gpu("V100-16G", 15.8, 125.0, 150, has_bf16=False),
    Gpu("V100S", 31.7, 130.0, 16, has_bf16=False),
    Gpu("T4", 14.6, 65.0, 16, has_bf16=False),
)


def _letters(name: str) -> str:
    return "".join(character for character in name.upper() if character.isalnum())


def named_gpu(name: str) -> Gpu | None:
    """The card of a short name as people write it: A100-80G, a100 80gb, 4090, H100."""
    wanted = _letters(name).replace("NVIDIA", "").replace("GEFORCE", "").replace("GB", "G").replace("RTX", "")
    names = {gpu: (_letters(gpu.name).replace("RTX", ""), _model(gpu)) for gpu in GPUS}
    exact = [gpu for gpu, (name, _) in names.items() if name == wanted]
    # The model whole: H20 is no H200.
    started = [gpu for gpu, (name, model) in names.items() if name.startswith(wanted) and wanted.startswith(model)]
    return next(iter(exact + started), None)


def _model(gpu: Gpu) -> str:
    """A100 of A100-80G, 4090 of RTX-4090."""
    return _letters(gpu.name.removeprefix("RTX-").partition("-")[0])


def found_gpu(device_name: str, memory_gib: float) -> Gpu | None:
    """The card a driver calls `device_name` ("NVIDIA A100-SXM4-80GB"); of several the one with the nearest memory."""
    words = re.findall(r"[A-Z0-9]+", device_name.upper())  # whole ones: GH200 is no H200, L40S no L40
    models = [gpu for gpu in GPUS if _model(gpu) in words]
    if "PCIE" in words and any("PCIE" in gpu.name for gpu in models):
        models = [gpu for gpu in models if "PCIE" in gpu.name]
    else:
        models = [gpu for gpu in models if "PCIE" not in gpu.name]
    return min(models, key=lambda gpu: abs(gpu.memory_gib - memory_gib), default=None)


def with_memory(gpu: Gpu, smi_gib: float) -> Gpu:
    """The card with the memory nvidia-smi tells, where it is not the table's: an RTX-4090 of 48 GB, an H20 of 141."""
    memory_gib = smi_gib - DRIVER_GIB
    if abs(memory_gib - gpu.memory_gib) < 0.5:
        return gpu
    return replace(gpu, name=f"{re.sub(r'-[0-9]+G$', '', gpu.name)}-{smi_gib:.0f}G", memory_gib=memory_gib)


def price_per_hour() -> float:
    """PRICE_PER_HOUR of .env, 0 where it is not set. Raises UserError for anything but an amount of money."""
    text = os.environ.get("PRICE_PER_HOUR") or "0"
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not 0 <= price < math.inf:
        raise UserError(f"PRICE_PER_HOUR: expected an amount such as 2.82, found {text}. Correct it in .env.")
    return price
