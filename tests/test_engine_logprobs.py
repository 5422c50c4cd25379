"""Log-probabilities of answers and prompts against a plain forward pass of the model."""

import pytest
import torch

from llm_code.module_interface.interface import SamplingParams
from tests.engines import engine, greedy, model, prompts, token_ids


def expected_logprobs(lm, ids: list[int]) -> torch.Tensor:
    """Row i: log-probabilities of what follows the first i + 1 tokens."""
    with torch.no_grad():
        return lm(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("lookahead", [False, True])
def test_an_answers_logprobs_are_the_models_own(lookahead):
    """Before temperature, penalties and bias; each request as many alternatives as it asked for, in one batch."""
    lm, asked = model(), prompts(9, 30, 5)
    settings = [
        greedy(10, logprobs=3),
        SamplingParams(temperature=1.5, top_k=20, seed=1, max_tokens=10, logprobs=0, frequency_penalty=0.5),
        SamplingParams(temperature=0, max_tokens=10, logprobs=5, logit_bias={3: 50}),
    ]
    running = engine(lookahead=lookahead)
    requests = [running.submit(p, s) for p, s in zip(asked, settings, strict=True)]
    plain = running.submit(asked[0], greedy(10))
    for prompt, setting, request in zip(asked, settings, requests, strict=True):
        completion = request.result(30)
        ids = token_ids(completion)
        rows = expected_logprobs(lm, prompt + ids)[len(prompt) - 1 :]
        for token, row in zip(completion.tokens, rows, strict=False):
            assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4)
            likeliest = row.topk(setting.logprobs)
            assert [i for i, _ in token.alternatives] == likeliest.indices.tolist()
            assert [score for _, score in token.alternatives] == pytest.approx(likeliest.values.tolist(), abs=1e-4)
    assert all(token.logprob is None and not token.alternatives for token in plain.result(30).tokens)
    running.close()


@pytest.mark.parametrize("chunk", [7, 64])
def test_a_prompts_logprobs(chunk):
    """In chunks, beside running requests, and also where the prompt is in the cache already."""
    lm, prompt = model(), prompts(50)[0]
    rows = expected_logprobs(lm, prompt)
    running = engine(prefill_tokens=chunk)
    other = running.submit(prompt, greedy(30))
    for params in (greedy(1, prompt_logprobs=2), SamplingParams(max_tokens=0, prompt_logprobs=2)):
        completion = running.submit(prompt, params).result(30)
        tokens = completion.prompt_tokens
        assert [token.id for token in tokens] == prompt
        assert (tokens[0].logprob, tokens[0].alternatives) == (None, ())
        for place, token in enumerate(tokens[1:]):
            assert token.logprob == pytest.approx(rows[place, token.id].item(), abs=1e-4)
            assert [i for i, _ in token.alternatives] == rows[place].topk(2).indices.tolist()
        assert "".join(token.text for token in tokens) == "".join(chr(33 + i) for i in prompt)
        assert (len(completion.tokens), completion.finish_reason) == (params.max_tokens, "length")
        assert completion.num_cached_tokens == 0
    assert len(other.result(30).tokens) == 30
    running.close()


def test_tokens_of_a_cut_answer_join_to_its_text():
    lm, prompt = model(), prompts(20)[0]
    running = engine(lm=lm)
    whole = running.submit(prompt, greedy(20, logprobs=1)).result(30)
    assert "".join(token.text for token in whole.tokens) == whole.text and len(whole.text) == 20
    stop = whole.text[9:12]
    cut = running.submit(prompt, greedy(20, logprobs=1, stop=(stop,))).result(30)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert token_ids(cut) == token_ids(whole)[: len(cut.text)]
    assert "".join(token.text for token in cut.tokens) == cut.text
    assert cut.num_tokens == whole.text.index(stop) + 3
    running.close()
