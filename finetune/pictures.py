"""Pictures written as PNG, with Chinese labels where a font has them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
    from matplotlib.font_manager import fontManager

    for look_again in (False, True):
        if look_again:
            _add_new_fonts()
        installed = {font.name for font in fontManager.ttflist}
        if found := next((name for name in CJK_FONTS if name in installed), None):
            return found
    return None


def _add_new_fonts() -> None:
    """Tell matplotlib of fonts installed after it wrote its list, which it otherwise keeps for ever."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    known = {font.fname for font in fontManager.ttflist}
    for path in sorted(set(findSystemFonts()) - known):
        with suppress(OSError, RuntimeError):  # a file that is no font
            fontManager.addfont(path)


def name_rows(axes: Any, names: Sequence[str], font: str | None) -> None:
    """Write the names at rows 0, 1, ... from the bottom; a Chinese one without a Chinese font as its line, from 1."""
    labels = [name if font or name.isascii() else str(len(names) - i) for i, name in enumerate(names)]
    axes.set_yticks(range(len(names)), labels)
    if labels != list(names):
        axes.set_ylabel("line of the tables (no Chinese font)")


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
