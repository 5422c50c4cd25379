"""Padding-free attention: equal to padded rows in loss and every gradient, and blind to other rows."""

import copy
from types import SimpleNamespace

import pytest
import torch

from finetune import attention
from finetune.attention import PADDING_FREE, attend_rows, enable_padding_free_attention
from finetune.batching import collate
from finetune.errors import UserError
from finetune.loss import enable_chunked_loss
from tests.tiny.native import gradients, padded_loss, random_samples, tiny_native

LENGTHS = [7, 1, 12, 3, 30]


def padding_free(model):
    return enable_chunked_loss(enable_padding_free_attention(copy.deepcopy(model)), chunk_rows=5)


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_loss_and_all_gradients_equal_the_padded_ones(family, heads):
    model = tiny_native(family, num_key_value_heads=heads)
    samples = random_samples(LENGTHS)
    packed = padding_free(model)
    expected, loss = padded_loss(model, samples), packed(**collate(samples)).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    expected_grads, grads = gradients(model, expected), gradients(packed, loss)
    assert grads.keys() == expected_grads.keys() and len(grads) > 20
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-4, msg=name)


def test_no_token_sees_another_row():
    model = enable_padding_free_attention(tiny_native())
    samples = random_samples(LENGTHS)
    changed = copy.deepcopy(samples)
    changed[2].input_ids = [(token + 1) % 97 for token in changed[2].input_ids]
    before, after = (logits_by_row(model, rows) for rows in (samples, changed))
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False, True, True]


def logits_by_row(model, samples):
    batch = collate(samples)
    with torch.no_grad():
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return logits[0].split(batch["cu_seq_lens_q"].diff().tolist())


def test_gradients_of_one_row_reach_no_other_row():
    model = padding_free(tiny_native())
    samples = random_samples(LENGTHS)
    for sample in samples[:2] + samples[3:]:
        sample.labels = [-100] * len(sample.labels)
    batch = collate(samples)
    embeddings = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    model(inputs_embeds=embeddings, **batch).loss.backward()
    touched = [bool(part.abs().sum()) for part in embeddings.grad[0].split(LENGTHS)]
    assert touched == [False, False, True, False, False]


def test_training_call_never_fills_a_cache_and_wants_no_mask(monkeypatch):
    from transformers import AttentionMaskInterface

    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "sdpa", lambda *args, **kwargs: pytest.fail("a mask"))
    batch = collate(random_samples(LENGTHS))
    del batch["labels"]
    output = enable_padding_free_attention(tiny_native())(**batch, use_cache=True)
    assert output.past_key_values is None


def test_without_the_hooks_a_packed_call_is_still_exact():
    batch = collate(random_samples(LENGTHS))
    del batch["labels"]
    model = tiny_native()
    expected = enable_padding_free_attention(copy.deepcopy(model))(**batch).logits
    model.set_attn_implementation(PADDING_FREE)
    torch.testing.assert_close(model(**batch, use_cache=False).logits, expected, rtol=0, atol=0)
    plain = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    torch.testing.assert_close(model(**plain).logits, expected, rtol=1e-5, atol=1e-5)


def test_generation_with_left_padding_is_unchanged():
    model = tiny_native()
    ids = torch.tensor([[0, 0, 0, 5, 6], [9, 8, 7, 6, 5]])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 0, 1, 1], [1] * 5])}
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**inputs, **settings)
    assert torch.equal(enable_padding_free_attention(model).generate(**inputs, **settings), expected)
    alone = model.generate(input_ids=ids[:1, 3:], attention_mask=torch.ones(1, 2, dtype=torch.long), **settings)
    assert torch.equal(alone[0, 2:], expected[0, 5:])


def test_enabling_twice_adds_no_second_hook():
    model = enable_padding_free_attention(enable_padding_free_attention(tiny_native()))
    assert len(model.model._forward_pre_hooks) == len(model.model._forward_hooks) == 1


def test_sliding_window_by_hand():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 9, 16).unbind()
    borders, window = torch.tensor([0, 6, 9], dtype=torch.int32), 3
    output = attend_rows(query, key, value, borders, window=window)
    for start, end in ((0, 6), (6, 9)):
        for position in range(start, end):
            first = max(start, position - window + 1)
            for head in range(2):
                keys, values = key[0, head, first : position + 1], value[0, head, first : position + 1]
                weights = torch.softmax(keys @ query[0, head, position] / 4, dim=0)
                torch.testing.assert_close(output[0, position, head], weights @ values, rtol=1e-5, atol=1e-5)


def test_what_the_path_lacks_is_refused():
    model = enable_padding_free_attention(tiny_native())
    batch = collate(random_samples([4, 4]))
    ids = batch["input_ids"].repeat(2, 1)
    with pytest.raises(UserError, match="found 2 batch rows"):
        model(input_ids=ids, cu_seq_lens_q=batch["cu_seq_lens_q"], max_length_q=4)


@pytest.mark.parametrize(("capability", "has_kernel"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_cards_before_ampere_attend_row_by_row(monkeypatch, capability, has_kernel):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    attention._computes_bfloat16.cache_clear()
    query = SimpleNamespace(is_cuda=True, dtype=torch.float16, shape=(1, 4, 9, 128), device=SimpleNamespace(index=0))
    assert attention._has_varlen_kernel(query) == has_kernel
    attention._computes_bfloat16.cache_clear()
    assert not attention._has_varlen_kernel(SimpleNamespace(**{**vars(query), "shape": (1, 4, 9, 512)}))
