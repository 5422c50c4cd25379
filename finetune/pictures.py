"""Pictures written as PNG, with Chinese labels where a font has them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# in order of preference; matplotlib names a .ttc collection after its first face, so "JP" stands for all of Noto's
CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Droid Sans Fallback",
)


def find_cjk_font() -> str | None:
    """Name of an installed font with Chinese characters."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in CJK_FONTS if name in installed), None)


@contextmanager
def picture(path: str | Path, size: tuple[float, float], font: str | None = None) -> Iterator[Any]:
    """A matplotlib figure of `size` inches to draw on; at the end it is written, whole or not at all.

    The picture carries neither a date nor a version, so the same numbers give the same bytes.
    """
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    path = Path(path)
    with matplotlib.rc_context({"font.family": [font] if font else ["DejaVu Sans"]}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        aside = path.with_name(path.name + ".tmp")
        figure.savefig(aside, format="png", dpi=150, metadata={"Software": None})
    aside.replace(path)
