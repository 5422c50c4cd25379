"""Batched generation, label scores and streaming against plain loops of full forward passes: no cache, no padding."""

import copy
import random

import pytest
import torch

from finetune import stream
from finetune.errors import UserError
from finetune.generate import (
    OutOfMemoryGuard,
    Sampling,
    decode_answer,
    generate_batches,
    generate_texts,
    plan_batches,
    stop_token_ids,
)
from finetune.label_scores import end_of_answer_id, label_log_likelihoods
from finetune.models import load_for_inference, load_tokenizer
from finetune.stream import UNFINISHED, TextAssembler, stream_text

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def loaded(tiny_qwen):
    """The tiny model with larger weights, so that its greedy answers differ from prompt to prompt."""
    model, tokenizer = load_for_inference(tiny_qwen)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model, tokenizer


@pytest.fixture(scope="module")
def prompts(loaded):
    """16 random prompts of 3 to 40 tokens."""
    rng = random.Random(7)
    return [[rng.randrange(2000) for _ in range(rng.randint(3, 40))] for _ in range(16)]


@torch.inference_mode()
def plain_greedy(model, prompt, stop_ids, count=NEW_TOKENS):
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def plain_ids(loaded, prompts):
    model, tokenizer = loaded
    return [plain_greedy(model, prompt, stop_token_ids(model, tokenizer)) for prompt in prompts]


@pytest.fixture(scope="module")
def plain_texts(loaded, plain_ids):
    texts = [loaded[1].decode(ids, skip_special_tokens=True).rstrip(UNFINISHED) for ids in plain_ids]
    assert len(set(texts)) > 10, "the prompts should have different answers"
    return texts


@pytest.mark.parametrize(("max_rows", "budget"), [(1, None), (16, None), (5, 150)])
def test_batches_give_what_a_plain_loop_gives(loaded, prompts, plain_texts, max_rows, budget):
    found = dict(generate_texts(*loaded, prompts, NEW_TOKENS, token_budget=budget, max_rows=max_rows))
    assert [found[i] for i in range(16)] == plain_texts


def test_the_checkpoint_settings_stay_out_and_stay_there(loaded, prompts, plain_texts):
    model, tokenizer = loaded
    before = model.generation_config.to_dict()
    assert before["repetition_penalty"] == 1.1 and before["do_sample"], "the checkpoint should ask for sampling"
    list(generate_texts(model, tokenizer, prompts[:1], NEW_TOKENS))
    assert model.generation_config.to_dict() == before
    # the check itself: with the checkpoint's penalty the answers are others
    penalised = dict(generate_texts(*loaded, prompts, NEW_TOKENS, sampling=Sampling(repetition_penalty=1.3)))
    assert [penalised[i] for i in range(16)] != plain_texts


def test_an_answer_ends_before_the_checkpoint_end_token(loaded, prompts, plain_ids, monkeypatch):
    model, tokenizer = loaded
    row, place = next((i, k) for i, ids in enumerate(plain_ids) for k in range(2, len(ids)) if ids[k] not in ids[:k])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [plain_ids[row][place]])
    expected = tokenizer.decode(plain_ids[row][:place], skip_special_tokens=True).rstrip(UNFINISHED)
    assert list(generate_texts(model, tokenizer, [prompts[row]], NEW_TOKENS)) == [(0, expected)]
    assert "".join(stream_text(model, tokenizer, prompts[row], NEW_TOKENS)) == expected


def test_sampling_goes_on_with_the_same_draws(loaded, prompts):
    batches = plan_batches([len(p) for p in prompts], 120)
    sampling = Sampling(temperature=1.0, top_p=0.9, top_k=50)
    whole = list(generate_batches(*loaded, prompts, batches, 6, sampling, seed=3))
    rest = list(generate_batches(*loaded, prompts, batches[2:], 6, sampling, seed=3))
    other = list(generate_batches(*loaded, prompts, batches, 6, sampling, seed=4))
    assert len(whole) > 3 and whole[2:] == rest
    assert whole != other


@pytest.mark.parametrize("seed", range(20))
def test_plan_batches_keeps_every_index_within_the_budget(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 60) for _ in range(rng.randint(1, 50))]
    batches = plan_batches(lengths, 100, max_rows=7)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) <= 7 and (len(batch) * longest <= 100 or len(batch) == 1)
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(lengths, reverse=True)


def test_plan_batches_by_hand():
    assert plan_batches([5, 10, 5, 200, 3], token_budget=20) == [[3], [1, 0], [2, 4]]


def test_out_of_memory_halves_the_batch_and_remembers():
    sizes = []

    def function(items):
        sizes.append(len(items))
        if len(items) > 3:
            raise torch.OutOfMemoryError("full")
        return [-item for item in items]

    guard = OutOfMemoryGuard()
    assert guard.run(function, list(range(10))) == [-i for i in range(10)]
    assert guard.run(function, list(range(8))) == [-i for i in range(8)]
    assert sizes == [10, 5, 3, 3, 3, 1, 2, 2, 2, 2]


def test_out_of_memory_with_one_row_speaks_to_the_person():
    def function(items):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(UserError, match="one row"):
        OutOfMemoryGuard().run(function, [1, 2, 3])


@torch.inference_mode()
def plain_score(model, prompt, candidate):
    logits = model(input_ids=torch.tensor([[*prompt, *candidate]]), use_cache=False).logits[0].double()
    scores = logits.log_softmax(-1)
    return sum(float(scores[len(prompt) + k - 1, token]) for k, token in enumerate(candidate))


@pytest.mark.parametrize("budget", [None, 60])
def test_label_scores_equal_a_plain_loop(loaded, prompts, budget):
    model, tokenizer = loaded
    rng = random.Random(1)
    texts = ["相同", "不相同", "答案：相似", "答案：不相似", "是", "否", "A", "ABCD"]
    candidates = [rng.sample(texts, rng.randint(1, 5)) for _ in prompts]
    found = label_log_likelihoods(model, tokenizer, prompts, candidates, token_budget=budget)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for prompt, options, scores in zip(prompts, candidates, found, strict=True):
        ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in options]
        assert scores == pytest.approx([plain_score(model, prompt, c) for c in ids], abs=2e-4)


def test_end_of_answer(loaded):
    model, tokenizer = loaded[0], copy.deepcopy(loaded[1])
    assert end_of_answer_id(model, tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    # a template like Baichuan2's that writes no end token
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.eos_token = "<|endoftext|>"
    assert end_of_answer_id(model, tokenizer) == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_streamed_pieces_join_to_the_answer(loaded, prompts, plain_texts):
    for prompt, text in zip(prompts, plain_texts, strict=True):
        assert "".join(stream_text(*loaded, prompt, NEW_TOKENS)) == text


@pytest.mark.parametrize("text", ["你好，世界", "罕见字𠮷与😀👩‍👩‍👧 end", "plain words, and more", "  两 格 \n\n行"])
def test_no_piece_ends_in_half_a_character(loaded, text):
    tokenizer = loaded[1]
    assembler, ids = TextAssembler(tokenizer), tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [assembler.add(token) for token in ids] + [assembler.rest()]
    assert "".join(pieces) == text
    assert not any(UNFINISHED in piece for piece in pieces)


def test_an_unfinished_character_at_the_end_is_not_shown(loaded):
    tokenizer = loaded[1]
    ids = tokenizer("好😀", add_special_tokens=False)["input_ids"]
    assembler = TextAssembler(tokenizer)
    assert "".join(assembler.add(token) for token in ids[:-1]) + assembler.rest() == "好"


@pytest.mark.parametrize("model", ["tiny_qwen", "tiny_baichuan"])
def test_tokens_that_never_become_a_character_cost_no_more_than_others(model, request, monkeypatch):
    """However many: nothing is decoded again and again. What comes after them is read as ever."""
    tokenizer, decoded = load_tokenizer(request.getfixturevalue(model)), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: decoded.append(len(ids)) or decode(ids, **options))
    after = tokenizer("。", add_special_tokens=False)["input_ids"]
    half = tokenizer("😀", add_special_tokens=False)["input_ids"][-2]
    kinds = {"half": half, "control": tokenizer.eos_token_id, "unknown to the tokenizer": len(tokenizer) + 5}
    for kind, token in kinds.items():
        assembler = TextAssembler(tokenizer)
        text = "".join([assembler.add(one) for one in [*[token] * 300, *after]]) + assembler.rest()
        assert max(decoded) <= 3 * stream.MOST_HELD, kind
        assert text.lstrip(UNFINISHED) == "。", kind
        assert (UNFINISHED in text) == (kind == "half")


@pytest.mark.parametrize("model", ["tiny_qwen", "tiny_baichuan"])
def test_honest_text_is_never_given_up(model, request, monkeypatch):
    """Characters in as many pieces as there are, control tokens anywhere between them: nothing is held so long."""
    tokenizer, rng = load_tokenizer(request.getfixturevalue(model)), random.Random(0)
    for _ in range(50):
        ids = []
        for _ in range(rng.randrange(1, 30)):
            text = "".join(rng.choice("你好龘𠮷😀👩\u200d👧é a，\u2028\ufe0f") for _ in range(rng.randrange(1, 9)))
            ids += tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += [tokenizer.eos_token_id] * rng.choice([0, 0, 1, 20])
        pieces = []
        for most in (stream.MOST_HELD, 10**9):
            monkeypatch.setattr(stream, "MOST_HELD", most)
            assembler = TextAssembler(tokenizer)
            pieces.append([*(assembler.add(token) for token in ids), assembler.rest()])
        monkeypatch.undo()
        assert pieces[0] == pieces[1] and "".join(pieces[0]) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_half_character_leaves_the_whole_ones_before_it(tiny_baichuan):
    """Characters that a sentencepiece vocabulary lacks are bytes; decoded at once, one bad byte spoils all of them."""
    tokenizer = load_tokenizer(tiny_baichuan)
    ids = tokenizer("𠮷龘", add_special_tokens=False)["input_ids"]
    assert len(ids) == 7 and tokenizer.decode(ids[:-1]) == UNFINISHED * 6
    assert decode_answer(tokenizer, ids[:-1], []) == "𠮷" and decode_answer(tokenizer, ids, []) == "𠮷龘"


def test_a_closed_stream_stops_computing(loaded, prompts, monkeypatch):
    model, tokenizer = loaded
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    stream = stream_text(model, tokenizer, prompts[0], 200)
    next(stream)
    assert not torch.is_inference_mode_enabled()
    seen = len(calls)
    stream.close()
    handle.remove()
    assert seen == len(calls) < 20


def test_streamed_sampling_is_seeded_and_obeys_top_k(loaded, prompts, plain_texts):
    def draw(seed, **settings):
        return "".join(stream_text(*loaded, prompts[0], NEW_TOKENS, Sampling(temperature=1.5, **settings), seed))

    assert draw(1) == draw(1) != draw(2)
    assert draw(1, top_k=1) == draw(2, top_k=1) == plain_texts[0].rstrip(UNFINISHED)
    assert draw(1, top_p=1e-6) == plain_texts[0].rstrip(UNFINISHED)


def test_an_answer_ends_where_the_template_ends_it(tiny_qwen):
    """Whatever the tokenizer calls its eos token."""
    model, tokenizer = load_for_inference(tiny_qwen)
    tokenizer.eos_token = "<|endoftext|>"
    assert end_of_answer_id(model, tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
