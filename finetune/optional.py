"""Packages that need a card's machine: used where they are installed."""

from functools import lru_cache
from types import ModuleType


@lru_cache(maxsize=1)
def kernels() -> ModuleType | None:
    """finetune.kernels, or None where triton is not installed."""
    try:
        from finetune import kernels
    except ImportError:
        return None
    return kernels
