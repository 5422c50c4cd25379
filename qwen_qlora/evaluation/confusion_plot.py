"""The confusion matrix as a picture, with Chinese labels where a font has them."""

from pathlib import Path
from typing import Any

from finetune.pictures import find_cjk_font, picture
from qwen_qlora.evaluation.metrics import CLASSES, Confusion

CHINESE = {"same": "相同", "different": "不同", "invalid": "无效", "gold": "标准答案", "predicted": "模型回答"}
ENGLISH = {name: name for name in CHINESE}


def plot_confusion(matrix: Confusion, title: str, path: Path) -> None:
    """Write the PNG: gold classes down, predicted classes across, counts and row shares in the cells."""
    font = find_cjk_font()
    words = CHINESE if font else ENGLISH
    columns = list(matrix[CLASSES[0]])
    with picture(path, (5.2, 3.6), font) as figure:
        axes = figure.add_subplot()
        shares = [[_share(matrix[gold], column) for column in columns] for gold in CLASSES]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(columns)), [words[column] for column in columns])
        axes.set_yticks(range(len(CLASSES)), [words[name] for name in CLASSES])
        axes.set(xlabel=words["predicted"], ylabel=words["gold"], title=title)
        for i, gold in enumerate(CLASSES):
            for j, column in enumerate(columns):
                _write_cell(axes, j, i, matrix[gold][column], shares[i][j])


def _share(row: dict[str, int], column: str) -> float:
    return row[column] / max(1, sum(row.values()))


def _write_cell(axes: Any, x: int, y: int, count: int, share: float) -> None:
    colour = "white" if share > 0.6 else "black"
    axes.text(x, y, f"{count}\n{100 * share:.1f} %", ha="center", va="center", color=colour)
