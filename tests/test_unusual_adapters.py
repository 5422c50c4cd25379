"""Adapters and calls that are not the usual ones: fused projections compute what peft does, or leave it to peft."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from finetune.projection import fuse_projections
from finetune.qlora import attach_lora
from tests.tiny.native import tiny_native

IDS = torch.tensor([[5, 6, 7]])


def moved(model):
    """The model with a B that is not 0, and its logits by peft."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model, model(input_ids=IDS).logits


def projection_of(model):
    return model.base_model.model.model.layers[0].self_attn.o_proj


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"], r=2, lora_bias=True),
        LoraConfig(
            target_modules=["q_proj", "k_proj", "v_proj"],
            r=4,
            lora_alpha=8,
            rank_pattern={"k_proj": 20},
            alpha_pattern={"k_proj": 40},
        ),
    ],
    ids=["a bias in B", "a wider rank among them"],
)
def test_logits_are_pefts(config):
    model, expected = moved(get_peft_model(tiny_native(), config).eval())
    assert bool(fuse_projections(model)) is not config.lora_bias
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_merged_adapter_is_not_added_again():
    model, expected = moved(attach_lora(tiny_native(), 4, 8, 0.0).eval())
    fuse_projections(model)
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_base_weight_that_is_trained_has_its_gradient():
    model = attach_lora(tiny_native(), 4, 8, 0.0)
    weight = projection_of(model).base_layer.weight
    weight.requires_grad_(True)
    fuse_projections(model)
    model(input_ids=IDS).logits.sum().backward()
    assert weight.grad is not None and weight.grad.abs().max() > 0


def test_no_tokens_at_all():
    model = attach_lora(tiny_native(), 4, 8, 0.0)
    fuse_projections(model)
    layer = projection_of(model)
    assert layer(torch.zeros(1, 0, layer.in_features)).shape == (1, 0, layer.out_features)
