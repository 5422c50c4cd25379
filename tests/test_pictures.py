"""Pictures: a Chinese font is found however late it was installed, and rows are named as far as a font allows."""

import pytest
from matplotlib import font_manager

from finetune.pictures import CJK_FONTS, find_cjk_font, name_rows, picture
from llm_code.llm_evaluation.bleu_files import draw_scores


def test_a_font_that_is_newer_than_matplotlibs_list_is_found(monkeypatch):
    path = next((f for f in font_manager.findSystemFonts() if font_name(f) in CJK_FONTS), None)
    if not path:
        pytest.skip("no Chinese font is installed")
    manager = font_manager.fontManager
    files = {path} | {font.fname for font in manager.ttflist if font.name in CJK_FONTS}  # one file has many faces
    monkeypatch.setattr(manager, "ttflist", [font for font in manager.ttflist if font.fname not in files])
    assert find_cjk_font() in CJK_FONTS


def font_name(path):
    try:
        return font_manager.get_font(path).family_name
    except (OSError, RuntimeError):
        return None


@pytest.mark.parametrize(("font", "labels"), [("any", ["心理", "BLEU"]), (None, ["2", "BLEU"])])
def test_without_a_chinese_font_only_chinese_names_become_numbers(tmp_path, font, labels):
    with picture(tmp_path / "a.png", (2, 2)) as figure:
        axes = figure.add_subplot()
        name_rows(axes, ["心理", "BLEU"], font)
        assert [label.get_text() for label in axes.get_yticklabels()] == labels
        assert ("line of the tables" in axes.get_ylabel()) == (font is None)
        axes.set_yticks([])  # drawn with the font at hand


def test_scores_that_mean_nothing_are_drawn_at_zero(tmp_path, monkeypatch):
    limits = []
    from matplotlib.axes import Axes

    monkeypatch.setattr(Axes, "legend", lambda axes: limits.append((axes.get_xlim()[0], *axes.get_ylim())))
    draw_scores([{"predict": "", "target": "好"}, {"predict": "坏", "target": "好"}], [0.0, 1e-78], tmp_path / "a.png")
    assert limits == [(0, 0, 0.01)]
