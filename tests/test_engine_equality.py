"""The engine's greedy answers are model.generate's: alone, in a full batch, joining and leaving, in chunks."""

import threading

import pytest
import torch

from finetune.errors import UserError
from finetune.generate import generate_texts
from finetune.models import load_for_inference
from llm_code.module_interface.cache import BLOCK
from llm_code.module_interface.interface import SamplingParams
from llm_code.module_interface.local_engine import LocalEngine, LocalOptions
from tests.adapters import make_adapter
from tests.engines import answer, engine, greedy, model, prompts, token_ids

LENGTHS = (3, 17, 40, 1, 9, 100, 64, 16)


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
@pytest.mark.parametrize("lookahead", [False, True])
def test_greedy_answers_are_those_of_generate(family, lookahead):
    """More requests than slots, prompts longer and shorter than a chunk: they join, leave and are cut in pieces."""
    reference, asked = model(family), prompts(*LENGTHS)
    expected = [answer(reference, prompt, 8 + i) for i, prompt in enumerate(asked)]
    running = engine(family, lookahead=lookahead)
    together = [running.submit(prompt, greedy(8 + i)) for i, prompt in enumerate(asked)]
    assert [token_ids(request.result(30)) for request in together] == expected
    alone = [token_ids(running.submit(p, greedy(8 + i)).result(30)) for i, p in enumerate(asked)]
    assert alone == expected
    running.close()


def test_requests_join_a_running_batch():
    reference, asked = model(), prompts(*LENGTHS, seed=1)
    running, results = engine(max_batch=3), {}

    def ask(i: int) -> None:
        events = iter(running.submit(asked[i], greedy(10 + i)))
        first = next(events)  # the next client starts once this one is answering
        if i + 1 < len(asked):
            threads.append(threading.Thread(target=ask, args=(i + 1,)))
            threads[-1].start()
        results[i] = [t.id for event in [first, *events] for t in event.tokens]

    threads = [threading.Thread(target=ask, args=(0,))]
    threads[0].start()
    for thread in threads:  # grows while it is read
        thread.join(30)
    assert results == {i: answer(reference, prompt, 10 + i) for i, prompt in enumerate(asked)}
    running.close()


@pytest.mark.parametrize("chunk", [1, 7, 16, 200])
def test_prompts_in_chunks_give_the_same_answer(chunk):
    prompt = prompts(150)[0]
    running = engine(prefill_tokens=chunk)
    assert token_ids(running.submit(prompt, greedy()).result(30)) == answer(model(), prompt)
    running.close()


def test_a_shared_beginning_is_taken_over_exactly():
    """From a finished request, from one that runs, and by several that start at the same moment."""
    shared, *tails = prompts(70, 5, 9, 1, 30, seed=2)
    asked = [shared + tail for tail in tails]
    expected = [answer(model(), prompt) for prompt in asked]
    running = engine()
    first = running.submit(asked[0], greedy()).result(30)
    later = [request.result(30) for request in [running.submit(prompt, greedy()) for prompt in asked[1:]]]
    assert [token_ids(one) for one in [first, *later]] == expected
    assert first.num_cached_tokens == 0
    assert all(one.num_cached_tokens >= 70 for one in later)
    running.close()

    running = engine()
    together = [request.result(30) for request in [running.submit(prompt, greedy()) for prompt in asked]]
    assert [token_ids(one) for one in together] == expected
    # they wait until what they share with the first is computed, but for less than a block
    assert [one.num_cached_tokens > 70 - BLOCK for one in together] == [False, True, True, True]
    running.close()


def test_a_conversation_goes_on_from_its_own_answer():
    prompt, question = prompts(20, 6, seed=3)
    running = engine()
    first = token_ids(running.submit(prompt, greedy(20)).result(30))
    longer = prompt + first + question
    second = running.submit(longer, greedy()).result(30)
    assert second.num_cached_tokens >= 39  # the prompt and all but the last token of the answer
    assert token_ids(second) == answer(model(), longer)
    again = running.submit(longer, greedy()).result(30)
    assert (again.num_cached_tokens, token_ids(again)) == (len(longer) - 1, token_ids(second))
    running.close()


def test_the_model_itself_is_left_as_it_was():
    """Its weights become views of joined ones; its own forward gives the same scores."""
    lm, ids = model(), torch.tensor(prompts(12))
    with torch.inference_mode():
        before = lm(ids).logits
        running = engine(lm=lm)
        torch.testing.assert_close(lm(ids).logits, before, rtol=1e-5, atol=1e-5)
    running.close()


def test_tied_embeddings():
    lm, prompt = model(tie_word_embeddings=True), prompts(20)[0]
    expected = answer(model(tie_word_embeddings=True), prompt)
    running = engine(lm=lm)
    assert token_ids(running.submit(prompt, greedy()).result(30)) == expected
    running.close()


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_an_adapter_on_its_base(tiny_qwen, tmp_path, load_in_4bit):
    adapter = make_adapter(tiny_qwen, tmp_path / "adapter", spread=0.2)
    lm, tokenizer = load_for_inference(tiny_qwen, adapter, load_in_4bit, dtype="float32")
    conversations = [[{"role": "user", "content": text}] for text in ("你好", "今天天气怎么样？", "1+1=")]
    running = LocalEngine(lm, tokenizer, options=LocalOptions(max_batch=2))
    asked = [running.encode_chat(messages) for messages in conversations]
    expected = [text for _, text in sorted(generate_texts(lm, tokenizer, asked, 16, max_rows=1))]
    found = [request.result(30).text for request in [running.submit(prompt, greedy(16)) for prompt in asked]]
    assert found == expected
    assert running.generate(conversations[0], greedy(16)).text == expected[0]
    assert "".join(event.text for event in running.stream(conversations[0], greedy(16))) == expected[0]
    running.close()


def test_what_the_decoder_does_not_cover_is_refused():
    lm = model()
    lm.config.model_type = "gpt2"
    lm.config.layer_types = ["sliding_attention"] * 2
    with pytest.raises(UserError, match="gpt2 model.*and sliding-window attention.*ENGINE=vllm"):
        engine(lm=lm)


def test_defaults_follow_the_generation_config():
    lm = model()
    lm.generation_config.update(do_sample=True, temperature=0.3, top_p=0.85, top_k=5, repetition_penalty=1.05)
    lm.generation_config.max_new_tokens = 7
    running = engine(lm=lm)
    expected = SamplingParams(temperature=0.3, top_p=0.85, top_k=5, repetition_penalty=1.05, max_tokens=7)
    assert running.defaults == expected
    running.close()


def test_a_decoder_that_computes_something_else_is_refused():
    lm = model()
    forward = lm.model.layers[1].mlp.forward
    lm.model.layers[1].mlp.forward = lambda x: 0.5 * forward(x)
    with pytest.raises(UserError, match="computes something else than this qwen2 model"):
        engine(lm=lm)
