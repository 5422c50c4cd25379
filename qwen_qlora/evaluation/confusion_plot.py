"""The confusion matrix as a picture, with Chinese labels where a font has them."""

from pathlib import Path
from typing import Any

from qwen_qlora.evaluation.metrics import CLASSES, Confusion

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
CHINESE = {"same": "相同", "different": "不同", "invalid": "无效", "gold": "标准答案", "predicted": "模型回答"}
ENGLISH = {name: name for name in CHINESE}


def find_cjk_font() -> str | None:
    """Name of an installed font with Chinese characters."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in CJK_FONTS if name in installed), None)


def plot_confusion(matrix: Confusion, title: str, path: Path) -> None:
    """Write the PNG: gold classes down, predicted classes across, counts and row shares in the cells."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    font = find_cjk_font()
    words = CHINESE if font else ENGLISH
    columns = list(matrix[CLASSES[0]])
    with matplotlib.rc_context({"font.family": [font] if font else ["DejaVu Sans"]}):
        figure = Figure(figsize=(5.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
        shares = [[_share(matrix[gold], column) for column in columns] for gold in CLASSES]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(columns)), [words[column] for column in columns])
        axes.set_yticks(range(len(CLASSES)), [words[name] for name in CLASSES])
        axes.set(xlabel=words["predicted"], ylabel=words["gold"], title=title)
        for i, gold in enumerate(CLASSES):
            for j, column in enumerate(columns):
                _write_cell(axes, j, i, matrix[gold][column], shares[i][j])
        aside = path.with_name(path.name + ".tmp")
        figure.savefig(aside, format="png", dpi=150)
    aside.replace(path)


def _share(row: dict[str, int], column: str) -> float:
    return row[column] / max(1, sum(row.values()))


def _write_cell(axes: Any, x: int, y: int, count: int, share: float) -> None:
    colour = "white" if share > 0.6 else "black"
    axes.text(x, y, f"{count}\n{100 * share:.1f} %", ha="center", va="center", color=colour)
