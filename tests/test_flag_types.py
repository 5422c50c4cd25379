"""Numbers on command lines: which are taken, and which are refused."""

import argparse

import pytest

from finetune.flag_types import amount, natural, positive


@pytest.mark.parametrize(
    "kind, taken, refused",
    [
        (natural, {"0": 0, "500": 500}, ["-3", "1.5", "all", ""]),  # a slice up to -3 would be all rows but three
        (positive, {"1": 1}, ["0", "-1", "1e3", ""]),
        (amount, {"0": 0.0, "0.7": 0.7, "1e-3": 0.001}, ["-0.1", "nan", "inf", "warm", ""]),
    ],
)
def test_numbers(kind, taken, refused):
    assert {text: kind(text) for text in taken} == taken
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match="or more, got "):
            kind(text)
