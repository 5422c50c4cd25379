"""Norms and SwiGLU's product computed again in the backward pass: the same numbers, less kept."""

import copy

import pytest
import torch

from finetune.accumulate import accumulate_in_products
from finetune.batching import collate
from finetune.loss import enable_chunked_loss
from finetune.qlora import attach_lora, checkpoint_layers, fuse_projections
from finetune.recipes import attach_recipes, split_recipe
from tests.tiny.native import gradients, random_samples, tiny_native

LENGTHS = [9, 4, 14]


def trained_by_lora(model):
    model = attach_lora(enable_chunked_loss(model), 4, 8, 0.2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    fuse_projections(model)
    return model.train()


def trained_in_full(model):
    model = enable_chunked_loss(model)
    accumulate_in_products(model)
    return model.train()


@pytest.mark.parametrize("recomputed", [0, 1])
@pytest.mark.parametrize("prepare", [trained_by_lora, trained_in_full])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_loss_is_the_same_to_the_bit_and_gradients_within_rounding(family, prepare, recomputed):
    results = []
    for attached in (False, True):
        torch.manual_seed(1)
        model = prepare(tiny_native(family))
        assert not attached or attach_recipes(model) == 6  # two layers of two norms and a SwiGLU block
        checkpoint_layers(model, recomputed)
        torch.manual_seed(2)
        loss = model(**collate(random_samples(LENGTHS))).loss
        results.append((loss, gradients(model, loss)))
    (expected, wanted), (loss, grads) = results
    assert torch.equal(loss, expected) and grads.keys() == wanted.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-6, atol=1e-6, msg=name)


def kept_bytes(model) -> int:
    """Bytes of distinct tensors kept for the backward pass, parameters left out."""
    kept = {}
    own = {parameter.data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**collate(random_samples(LENGTHS))).loss
    size = sum(tensor.nbytes for tensor in kept.values())
    del loss
    return size


def test_inputs_of_projections_are_not_kept():
    model = trained_in_full(tiny_native("llama"))
    plain = copy.deepcopy(model)
    attach_recipes(model)
    tokens, layers, feed_forward = sum(LENGTHS), 2, 96
    # PyTorch's own norm keeps its result (the weight multiplies it), so here only SwiGLU's product is saved.
    assert kept_bytes(plain) - kept_bytes(model) >= 4 * tokens * layers * feed_forward


def test_a_tensor_without_a_recipe_is_kept_itself():
    x = torch.ones(2)
    compute, sources = split_recipe(x)
    assert compute(*sources) is x


def test_other_activations_and_passes_without_gradients_are_left_alone():
    model = tiny_native("llama", hidden_act="gelu")
    expected = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert attach_recipes(model) == 4
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=torch.tensor([[5, 6, 7]])).logits, expected)
