"""The chunked loss against torch's cross-entropy on full logits: value and every gradient."""

import copy
import math

import pytest
import torch
from torch.nn import functional

from finetune import loss as losses
from finetune.attention import enable_padding_free_attention
from finetune.batching import collate
from finetune.errors import UserError
from finetune.loss import enable_chunked_loss, summed_cross_entropy
from tests.tiny.native import VOCABULARY, gradients, padded_loss, random_samples, tiny_native


def random_head(rows: int, dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(rows, 16, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, 16, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(0, VOCABULARY, (rows,))


def plain(hidden, weight, targets, normalize):
    weight = functional.normalize(weight) if normalize else weight
    return functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1024])
def test_value_and_gradients_equal_the_plain_formula(normalize, chunk_rows):
    hidden, weight, targets = random_head(23)
    expected = plain(hidden, weight, targets, normalize)
    expected_grads = torch.autograd.grad(expected * 0.37, [hidden, weight])
    loss = summed_cross_entropy(hidden, weight, targets, chunk_rows, normalize)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    for grad, wanted in zip(torch.autograd.grad(loss * 0.37, [hidden, weight]), expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factor", [0, 1e-14])
def test_normalized_rows_of_next_to_nothing_follow_torch(factor):
    """They are divided by a constant, not by their norm, which then has no gradient."""
    hidden, weight, targets = random_head(9)
    with torch.no_grad():
        weight[targets[0]] *= factor
    wanted = torch.autograd.grad(plain(hidden, weight, targets, True), weight)[0]
    grad = torch.autograd.grad(summed_cross_entropy(hidden, weight, targets, 4, True), weight)[0]
    torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5)


def test_chunks_are_of_equal_size(monkeypatch):
    """Not 4, 4 and 1: the whole head would be read for one row."""
    sizes, cross_entropy = [], losses._cross_entropy_
    monkeypatch.setattr(
        losses, "_cross_entropy_", lambda logits, targets: sizes.append(len(targets)) or cross_entropy(logits, targets)
    )
    hidden, weight, targets = random_head(9)
    summed_cross_entropy(hidden, weight, targets, chunk_rows=4)
    assert sizes == [3, 3, 3]


def test_huge_logits_do_not_overflow():
    hidden, weight, targets = random_head(5)
    hidden, weight = (hidden * 1000).detach().requires_grad_(), weight.detach()
    loss = summed_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, plain(hidden, weight, targets, False))
    assert torch.autograd.grad(loss, hidden)[0].isfinite().all()


def test_bfloat16_head_has_a_float32_loss():
    hidden, weight, targets = random_head(64, torch.bfloat16)
    loss = summed_cross_entropy(hidden, weight, targets, 16)
    exact = plain(hidden.float(), weight.float(), targets, False)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=5e-3, atol=0)
    grads = torch.autograd.grad(loss, [hidden, weight])
    for grad, wanted in zip(grads, torch.autograd.grad(exact, [hidden, weight]), strict=True):
        assert grad.dtype == torch.bfloat16
        assert (grad - wanted).norm() < 0.02 * wanted.norm()


def test_norms_of_a_bfloat16_head_are_float32():
    weight = torch.tensor([[1.0, 1, 1], [1, 0, 0]], dtype=torch.bfloat16)
    loss = summed_cross_entropy(
        torch.tensor([[4.0, 4, 4]], dtype=torch.bfloat16), weight, torch.tensor([1]), normalize=True
    )
    # Logits 12 / sqrt(3) and 4. In bfloat16 1 / sqrt(3) is off by 0.04 %.
    assert loss.item() == pytest.approx(math.log(math.exp(12 / math.sqrt(3)) + math.exp(4)) - 4, abs=1e-4)


def test_autocast_computes_in_its_dtype_and_returns_the_parameters_dtype():
    hidden, weight, targets = random_head(64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = summed_cross_entropy(hidden, weight, targets, 16)
    expected = plain(hidden.bfloat16().float(), weight.bfloat16().float(), targets, False)
    torch.testing.assert_close(loss, expected, rtol=5e-3, atol=0)
    assert {grad.dtype for grad in torch.autograd.grad(loss, [hidden, weight])} == {torch.float32}


def test_only_supervised_positions_reach_the_head_and_no_logits_return(monkeypatch):
    model = enable_chunked_loss(tiny_native())
    rows = []
    model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape))
    samples = random_samples([5, 9])
    output = model(**collate(samples))
    supervised = sum(label != -100 for sample in samples for label in sample.labels[1:])
    assert rows == [(supervised, 64)] and output.num_tokens == supervised and output.logits is None


def test_whole_model_with_trainable_normalized_head():
    model = tiny_native("llama")
    samples = random_samples([8, 5, 13])
    chunked = enable_chunked_loss(enable_padding_free_attention(copy.deepcopy(model)), 4, normalize_head=True)
    torch.nn.utils.parametrize.register_parametrization(model.lm_head, "weight", RowNorm())
    expected = padded_loss(model, samples)
    wanted = gradients(model, expected)
    wanted["lm_head.weight"] = wanted.pop("lm_head.parametrizations.weight.original")
    loss = chunked(**collate(samples)).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    grads = gradients(chunked, loss)
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-4, msg=name)


class RowNorm(torch.nn.Module):
    def forward(self, weight):
        return functional.normalize(weight)


def test_tied_embeddings_collect_both_gradients():
    model = tiny_native(tie_word_embeddings=True)
    samples = random_samples([8, 5])
    chunked = enable_chunked_loss(enable_padding_free_attention(copy.deepcopy(model)))
    wanted = gradients(model, padded_loss(model, samples))
    grads = gradients(chunked, chunked(**collate(samples)).loss)
    torch.testing.assert_close(
        grads["model.embed_tokens.weight"], wanted["model.embed_tokens.weight"], rtol=1e-4, atol=1e-4
    )


def test_nothing_supervised_is_an_exact_zero_that_reaches_every_parameter():
    model = enable_chunked_loss(enable_padding_free_attention(tiny_native()))
    output = model(**collate([]))
    assert output.loss.item() == 0.0 and output.num_tokens == 0
    for name, grad in gradients(model, output.loss).items():
        assert grad.count_nonzero() == 0, name


def test_evaluation_without_gradients_gives_the_same_loss():
    model = enable_chunked_loss(tiny_native())
    batch = collate(random_samples([9]))
    with torch.no_grad():
        loss = model(**batch).loss
    assert loss == model(**batch).loss and not loss.requires_grad


def test_without_labels_the_model_answers_as_before():
    model = tiny_native()
    ids = torch.tensor([[1, 2, 3]])
    expected = model(input_ids=ids).logits
    assert torch.equal(enable_chunked_loss(model)(input_ids=ids).logits, expected)
    assert torch.equal(enable_chunked_loss(model)(input_ids=ids).logits, expected)
    assert list(model.state_dict()) == list(tiny_native().state_dict())


def test_works_under_peft():
    from peft import LoraConfig, get_peft_model

    model = tiny_native()
    samples = random_samples([6, 7])
    expected = padded_loss(model, samples)
    adapted = get_peft_model(
        enable_chunked_loss(enable_padding_free_attention(model)), LoraConfig(target_modules=["q_proj"], r=2)
    )
    output = adapted(**collate(samples))
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-5)
    assert all("lora_" in name for name in gradients(adapted, output.loss))


def test_a_head_with_a_bias_is_refused():
    model = tiny_native()
    model.lm_head = torch.nn.Linear(64, VOCABULARY)
    with pytest.raises(UserError, match="bias-free"):
        enable_chunked_loss(model)
