"""Weight gradients added inside the product equal autograd's."""

import copy

import pytest
import torch

from finetune.accumulate import accumulate_in_products
from finetune.batching import collate
from finetune.loss import enable_chunked_loss
from finetune.qlora import checkpoint_layers
from tests.tiny.native import random_samples, tiny_native

LENGTHS = [9, 4, 14]


@pytest.mark.parametrize("recomputed", [0, 2])
def test_gradients_of_several_micro_batches_equal_autograds(recomputed):
    plain = enable_chunked_loss(tiny_native()).train()
    direct = copy.deepcopy(plain)
    projections = sum(name.endswith("_proj.weight") for name, _ in plain.named_parameters())
    biased = sum(name.endswith("_proj.bias") for name, _ in plain.named_parameters())
    assert accumulate_in_products(direct) == projections - biased > 0
    checkpoint_layers(direct, recomputed)
    for seed in range(3):
        batch = collate(random_samples(LENGTHS, seed))
        for model in (plain, direct):
            model(**batch).loss.backward()
    for (name, want), found in zip(plain.named_parameters(), direct.parameters(), strict=True):
        torch.testing.assert_close(found.grad, want.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_frozen_layers_and_passes_without_gradients_stay_as_they_were():
    model = tiny_native()
    ids = torch.tensor([[5, 6, 7]])
    expected = model(input_ids=ids).logits
    model.requires_grad_(False)
    assert accumulate_in_products(model) == 0
    model.requires_grad_(True)
    assert accumulate_in_products(model) > 0
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
