"""Rounding at random: to one of the two neighbours, right in expectation, deterministic with a generator."""

import pytest
import torch

from finetune.rounding import copy_stochastic_

LAST_PLACE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}  # of numbers between 1 and 2


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", [0.2, 0.7])
@pytest.mark.parametrize("dtype", LAST_PLACE)
def test_it_is_right_in_expectation_and_goes_to_a_neighbour(dtype, share, sign):
    step = LAST_PLACE[dtype]
    source = torch.full((200_000,), sign * (1 + share * step))
    rounded, again = (
        copy_stochastic_(torch.empty(200_000, dtype=dtype), source, torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(rounded, again)
    assert set((sign * rounded.float()).unique().tolist()) == {1.0, 1 + step}
    # A draw has a standard deviation of at most step / 2, the mean of 200,000 one that is 447 times smaller.
    assert sign * rounded.double().mean().item() == pytest.approx(1 + share * step, abs=5 * step / 2 / 447)


@pytest.mark.parametrize("dtype", LAST_PLACE)
@pytest.mark.parametrize("value", [0.0, -1.5, 3.0, float("inf"), -float("inf")])
def test_what_16_bits_hold_exactly_stays(value, dtype):
    assert (copy_stochastic_(torch.empty(1000, dtype=dtype), torch.full((1000,), value)) == value).all()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001], ids=hex)  # the usual, the largest, the smallest
@pytest.mark.parametrize("dtype", LAST_PLACE)
def test_not_a_number_stays_one(dtype, bits):
    source = torch.full((100,), bits, dtype=torch.int32).view(torch.float32)
    assert copy_stochastic_(torch.empty(100, dtype=dtype), source).isnan().all()


def test_wider_targets_are_copied():
    source = torch.rand(100)
    assert torch.equal(copy_stochastic_(torch.empty(100), source), source)
