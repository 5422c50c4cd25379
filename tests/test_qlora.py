"""The 4-bit base with fused LoRA projections against peft's own path, and recomputation of single layers."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from benchmarks.small_terms import base_first, kept, ours
from finetune.batching import collate
from finetune.dropout import draw_seed, dropout
from finetune.errors import UserError
from finetune.frozen import Frozen
from finetune.loss import enable_chunked_loss
from finetune.projection import Group, Projections, SharedInput
from finetune.qlora import attach_lora, checkpoint_layers, fuse_projections, load_quantized
from tests.tiny.native import gradients, padded_loss, random_samples, tiny_native

LENGTHS = [9, 4, 14]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    tiny_native().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantised(checkpoint):
    """The checkpoint in NF4, float32 elsewhere; tests take copies."""
    return load_quantized(checkpoint, "cpu", torch.float32)


def adapted(quantised, dropout=0.0):
    """A copy of the quantised model with the chunked loss and an adapter whose B is not zero, in training mode."""
    torch.manual_seed(1)
    model = attach_lora(enable_chunked_loss(copy.deepcopy(quantised)), 8, 16, dropout)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def test_what_is_quantised_and_what_is_not(checkpoint):
    model = load_quantized(checkpoint, "cpu", torch.bfloat16)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    projections = [name for name in kinds if name.endswith("_proj.weight")]
    assert len(projections) == 14 and {kinds[name] for name in projections} == {torch.uint8}
    assert {kind for name, kind in kinds.items() if name not in projections} == {torch.bfloat16}
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    assert state.quant_type == "nf4" and state.nested
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_trainable_parameters_are_the_adapters_in_float32(checkpoint):
    model = attach_lora(load_quantized(checkpoint, "cpu", torch.bfloat16), 8, 16, 0.05)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 28 and all("lora_" in name for name in trainable)
    assert {parameter.dtype for parameter in trainable.values()} == {torch.float32}


def assert_same(expected, found):
    """Two (loss, {name: gradient}) but for rounding."""
    (expected_loss, expected_grads), (loss, grads) = expected, found
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-4, msg=name)


def projected(x, a, b, base, scaling, rate):
    """One projection with its LoRA, by the fused function."""
    (output,) = Projections.apply(x, Group([Frozen(base)], scaling, rate), a, b)
    return output


@pytest.mark.parametrize("recomputed", [0, 2])
def test_fused_equals_peft_in_loss_and_gradients(quantised, recomputed):
    batch = collate(random_samples(LENGTHS))
    results = []
    for fuse in (False, True):
        model = adapted(quantised)
        assert not fuse or fuse_projections(model) == 14
        checkpoint_layers(model, recomputed)
        loss = model(**batch).loss
        results.append((loss, gradients(model, loss)))
    assert_same(*results)
    assert len(results[0][1]) == 28


@pytest.mark.parametrize("rescaled_after", [False, True])
def test_adapters_that_are_scaled_differently_equal_peft(quantised, rescaled_after):
    batch = collate(random_samples(LENGTHS))
    results = []
    for fuse in (False, True):
        model = adapted(quantised)
        layer = model.get_decoder().layers[0]
        if fuse and rescaled_after:
            fuse_projections(model)
        for module, factor in ((layer.self_attn.k_proj, 3.0), (layer.mlp.gate_proj, 0.3)):
            module.scale_layer(factor)
        assert not fuse or rescaled_after or fuse_projections(model) == 14
        loss = model(**batch).loss
        results.append((loss, gradients(model, loss)))
    assert_same(*results)


class Masked(torch.nn.Module):
    """peft's dropout replaced by the fused path's mask, of which the group's first layer draws the seed."""

    def __init__(self, rate, masks, first):
        super().__init__()
        self.rate, self.masks, self.first = rate, masks, first

    def forward(self, x):
        if self.first:
            self.masks["seed"] = draw_seed()
        return dropout(x.flatten(0, -2), self.rate, self.masks["seed"]).view(x.shape)


def give_masks_to_peft(model, rate):
    """Dropout of peft's own path with one mask for q, k, v and one for gate, up, drawn in the order of the calls."""
    for layer in model.get_decoder().layers:
        for block, names in ((layer.self_attn, ("q", "k", "v")), (layer.self_attn, "o"), (layer.mlp, ("gate", "up"))):
            masks = {}
            for name in names:
                module = getattr(block, f"{name}_proj")
                module.lora_dropout["default"] = Masked(rate, masks, name == names[0])
        layer.mlp.down_proj.lora_dropout["default"] = Masked(rate, {}, True)


@pytest.mark.parametrize("recomputed", [0, 2])
def test_with_dropout_it_equals_peft_with_the_same_masks(quantised, recomputed):
    batch = collate(random_samples(LENGTHS))
    results = []
    for fuse in (False, True):
        model = adapted(quantised, dropout=0.3)
        if fuse:
            fuse_projections(model)
            checkpoint_layers(model, recomputed)
        else:
            give_masks_to_peft(model, 0.3)
        torch.manual_seed(5)
        loss = model(**batch).loss
        results.append((loss, gradients(model, loss)))
    assert_same(*results)


def test_dropout_drops_its_share_and_keeps_the_mean():
    ones = torch.ones(400, 500)
    dropped = dropout(ones, 0.1, 7)
    # 200,000 draws: the standard deviation of the share is 0.00067.
    assert (dropped == 0).float().mean().item() == pytest.approx(0.1, abs=5 * 0.00067)
    assert dropped.max().item() == pytest.approx(1 / 0.9, rel=1e-4) and set(dropped.unique().tolist()) > {0.0}
    assert torch.equal(dropped, dropout(ones, 0.1, 7)) and not torch.equal(dropped, dropout(ones, 0.1, 8))
    assert dropout(ones, 0.0, 7) is ones


def test_one_projection_equals_the_formula():
    torch.manual_seed(0)
    base = torch.nn.Linear(16, 24).requires_grad_(False)
    x, a, b = (torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 16), (4, 16), (24, 4)))
    weights = torch.randn(2, 5, 24)
    torch.manual_seed(3)
    mask = dropout(torch.ones(10, 16), 0.4, draw_seed()).view(2, 5, 16)
    expected = x @ base.weight.T + base.bias + 0.7 * (x * mask) @ a.T @ b.T
    torch.manual_seed(3)
    output = projected(x, a, b, base, 0.7, 0.4)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad((expected * weights).sum(), [x, a, b])
    for grad, want in zip(torch.autograd.grad((output * weights).sum(), [x, a, b]), wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_bias", [False, True])
def test_terms_below_the_last_place_are_kept(has_bias):
    """The adapter's first terms are hundreds of times smaller than the last place of an output near 1."""
    torch.manual_seed(0)
    base = torch.nn.Linear(1024, 256, has_bias, dtype=torch.bfloat16).requires_grad_(False)
    base.weight.normal_(0, 0.03)
    share, lost = (kept(product, base, 1024, 2.5e-5) for product in (ours, base_first))
    assert share == pytest.approx(1, abs=0.15) and lost < 0.1


def test_evaluation_computes_what_training_does(quantised):
    """Without gradients too: with peft's sum an evaluation would lose the terms that training had."""
    model = adapted(quantised).train()
    fuse_projections(model)
    batch = collate(random_samples(LENGTHS))
    loss = model(**batch).loss.item()
    with torch.no_grad():
        assert model(**batch).loss.item() == loss


def test_projections_of_one_input_equal_the_formula_each():
    """Different widths, ranks, scalings and biases; one output's gradient is missing."""
    torch.manual_seed(0)
    bases = [torch.nn.Linear(16, 24), torch.nn.Linear(16, 8, bias=False), torch.nn.Linear(16, 8)]
    x = torch.randn(5, 16, requires_grad=True)
    a = [torch.randn(rank, 16, requires_grad=True) for rank in (4, 2, 3)]
    b = [torch.randn(base.out_features, len(one), requires_grad=True) for base, one in zip(bases, a, strict=True)]
    expected = [base(x) + 0.3 * x @ p.T @ q.T for base, p, q in zip(bases, a, b, strict=True)]
    group = Group([Frozen(base) for base in bases], 0.3, 0.0)
    outputs = Projections.apply(x, group, *a, *b)
    for output, want in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, want, rtol=1e-5, atol=1e-5)
    leaves = [x, a[0], b[0], a[2], b[2]]
    wanted = torch.autograd.grad((expected[0].square().sum() + expected[2].sum()), leaves)
    grads = torch.autograd.grad((outputs[0].square().sum() + outputs[2].sum()), leaves)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-4)


def test_shared_inputs_are_projected_once_and_nothing_is_held(quantised, monkeypatch):
    calls = []
    original = SharedInput._outputs
    monkeypatch.setattr(
        SharedInput, "_outputs", lambda self, members, x: calls.append(len(members)) or original(self, members, x)
    )
    model = adapted(quantised)
    fuse_projections(model)
    model(**collate(random_samples(LENGTHS))).loss.backward()
    assert calls == [3, 1, 2, 1] * 2
    shared = {module.forward.func for module in model.modules() if hasattr(module, "_peft_forward")}
    assert len(shared) == 8 and not any(one._waiting or one._input is not None for one in shared)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_recomputed_layers_hold_nothing_after_the_backward_pass(quantised, num_layers):
    """torch ends a recomputation by raising inside the last projection."""
    model = adapted(quantised)
    fuse_projections(model)
    checkpoint_layers(model, num_layers)
    model(**collate(random_samples(LENGTHS))).loss.backward()
    shared = {module.forward.func for module in model.modules() if hasattr(module, "_peft_forward")}
    assert not any(one._waiting or one._input is not None for one in shared)


def test_a_pass_out_of_memory_holds_nothing(quantised, monkeypatch):
    model = adapted(quantised)
    fuse_projections(model)
    last = model.get_decoder().layers[1].mlp.down_proj

    def no_memory(*words):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(last.forward.func, "_outputs", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        model(**collate(random_samples(LENGTHS)))
    assert last.forward.func._input is None


def test_a_member_called_with_another_input_computes_alone(quantised):
    model, plain = adapted(quantised), adapted(quantised)
    fuse_projections(model)
    inputs = torch.randn(2, 3, model.config.hidden_size)
    fused, own = (one.get_decoder().layers[0].self_attn for one in (model, plain))
    for name, x in (("q_proj", inputs), ("k_proj", inputs * 2), ("q_proj", inputs), ("q_proj", inputs)):
        torch.testing.assert_close(getattr(fused, name)(x), getattr(own, name)(x), rtol=1e-5, atol=1e-5)


def test_only_input_and_low_rank_product_are_saved():
    base = torch.nn.Linear(16, 24).requires_grad_(False)
    x, a, b = torch.randn(5, 16, requires_grad=True), torch.randn(4, 16), torch.randn(24, 4)
    a.requires_grad_(), b.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda t: t):
        projected(x, a, b, base, 1.0, 0.1)
    assert sorted(saved) == sorted([x.shape, (5, 4), a.shape, b.shape])


def test_bfloat16_projection_is_as_exact_as_its_format():
    torch.manual_seed(0)
    base = torch.nn.Linear(256, 192).requires_grad_(False)
    x, a, b = (torch.randn(*shape) for shape in ((64, 256), (8, 256), (192, 8)))
    weights = torch.randn(64, 192)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.to(dtype).requires_grad_(), a.clone().requires_grad_(), b.clone().requires_grad_()]
        output = projected(*leaves, base.to(dtype), 0.1, 0.0)
        results.append([output, *torch.autograd.grad((output * weights.to(dtype)).sum(), leaves)])
    assert [tensor.dtype for tensor in results[1]] == [torch.bfloat16] * 2 + [torch.float32] * 2
    for exact, rounded in zip(*results, strict=True):
        assert (rounded - exact).norm() < 0.01 * exact.norm()


def test_whole_update_equals_a_padded_one(quantised):
    samples = random_samples(LENGTHS)
    fused, plain = adapted(quantised), adapted(quantised)
    fuse_projections(fused)
    loss, expected = fused(**collate(samples)).loss, padded_loss(plain, samples)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    wanted = gradients(plain, expected)
    for name, grad in gradients(fused, loss).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-3, atol=1e-3, msg=name)


def test_empty_micro_batch_gives_zero_gradients(quantised):
    model = adapted(quantised)
    fuse_projections(model)
    grads = gradients(model, model(**collate([])).loss)
    assert len(grads) == 28 and not any(grad.count_nonzero() for grad in grads.values())


def test_adapter_on_disk_is_pefts_own(quantised, tmp_path):
    model = adapted(quantised)
    names = list(model.state_dict())
    fuse_projections(model)
    assert list(model.state_dict()) == names
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(quantised), tmp_path / "adapter").eval()
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_disabled_adapter_and_evaluation_follow_peft(quantised):
    ids = torch.tensor([[5, 6, 7]])
    model = adapted(quantised, dropout=0.5).eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with model.disable_adapter():
            expected_base = model(input_ids=ids).logits
    fuse_projections(model)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, expected_base)


def test_generation_works_with_everything_switched_on(quantised):
    model = adapted(quantised)
    fuse_projections(model)
    checkpoint_layers(model, 2)
    ids = torch.tensor([[5, 6, 7]])
    output = model.eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
    )
    assert output.shape == (1, 7)


def test_uncovered_layers_keep_pefts_path_and_say_so(caplog):
    model = get_peft_model(tiny_native(), LoraConfig(target_modules=["q_proj", "v_proj"], r=2, use_dora=True))
    with caplog.at_level(logging.WARNING):
        assert fuse_projections(model) == 0
    assert caplog.text.count("keep peft's slower path") == 1 and "4 LoRA layers" in caplog.text


def test_a_16_bit_base_is_fused_too():
    samples = random_samples(LENGTHS)
    model = attach_lora(enable_chunked_loss(tiny_native()), 4, 8, 0.0)
    plain = copy.deepcopy(model)
    assert fuse_projections(model) == 14
    loss, expected = model(**collate(samples[:1])).loss, plain(**collate(samples[:1])).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_fp8_that_cannot_be_had_is_said(quantised, caplog):
    with caplog.at_level(logging.WARNING):
        assert fuse_projections(adapted(quantised), fp8_backward=True) == 14
    assert "14 projections keep 16-bit products" in caplog.text


@pytest.mark.parametrize("num_layers", [0, 1, 2, 9])
def test_exactly_the_named_layers_are_recomputed(quantised, num_layers):
    model = adapted(quantised)
    calls = [0, 0]
    for index, layer in enumerate(model.get_decoder().layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    assert checkpoint_layers(model, num_layers) == min(num_layers, 2)
    model(**collate(random_samples(LENGTHS))).loss.backward()
    assert calls == [1 + (index < num_layers) for index in range(2)]


def test_a_model_without_the_projections_is_refused():
    with pytest.raises(UserError, match="has none of the layers"):
        attach_lora(torch.nn.Sequential(torch.nn.Linear(2, 2)), 2, 2, 0.0)


@pytest.mark.parametrize("which", ["backward", "both"])
def test_emulated_fp8_is_off_by_what_the_format_rounds(which):
    from benchmarks.train_emulated_fp8 import KINDS

    torch.manual_seed(0)
    base = torch.nn.Linear(256, 192).requires_grad_(False)
    x, a, b = torch.randn(64, 256, requires_grad=True), torch.randn(8, 256), torch.zeros(192, 8)
    results = []
    for kind in (Frozen, KINDS[which]):
        (output,) = Projections.apply(x, Group([kind(base)], 1.0, 0.0), a, b)
        results.append([output, *torch.autograd.grad(output, [x], output.detach().square())])
    errors = [((rounded - exact).norm() / exact.norm()).item() for exact, rounded in zip(*results, strict=True)]
    # Three bits behind the point: 2^-4 at most and about 2.6 % in norm for each factor.
    assert 0.01 < errors[1] < 0.1
    assert errors[0] == 0 if which == "backward" else 0.01 < errors[0] < 0.06
