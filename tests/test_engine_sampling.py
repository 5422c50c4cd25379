"""How tokens are chosen: distributions, seeds, cuts, penalties and biases, each against another way to compute it."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from llm_code.module_interface import sampler
from llm_code.module_interface.interface import InvalidRequest, RequestFailed, SamplingParams
from llm_code.module_interface.sampler import Needs, sample, uniform
from llm_code.module_interface.slots import Slots, mix
from tests.engines import CONTEXT, VOCABULARY, engine, greedy, model, prompts, token_ids

NO_ENDS = torch.tensor([], dtype=torch.int64)


def slots_for(all_params: list[SamplingParams], vocabulary: int, prompt=(), answers=None) -> Slots:
    """One slot for each; `answers[i]` are the tokens that slot i has said."""
    slots = Slots(len(all_params), vocabulary, 0, torch.device("cpu"))
    for i, params in enumerate(all_params):
        slots.join(i, 0, list(prompt), params, params.seed or 0)
        for token in (answers or {}).get(i, ()):
            slots.advance(torch.tensor([i]), torch.tensor([token]), count=slots.counts is not None)
    return slots


def choose(logits: torch.Tensor, all_params: list[SamplingParams], ends=NO_ENDS, **others) -> list[int]:
    slots = slots_for(all_params, logits.shape[-1], **others)
    return sample(logits, torch.arange(len(all_params)), Needs.of(all_params), slots, ends).tokens.tolist()


def reference_distribution(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """transformers' warpers, in the order its generate applies them."""
    scores = logits[None] / params.temperature
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0, top_k=7),
        SamplingParams(top_p=0.6),
        SamplingParams(temperature=0.8, top_k=9, top_p=0.7),
    ],
)
def test_tokens_follow_the_distribution(params):
    """20,000 seeds in one batch: a chi-square test at one in a million, and nothing beyond the cut."""
    count, logits = 20000, torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2
    slots = slots_for([params], 40)
    rows = torch.zeros(count, dtype=torch.int64)
    slots.seed = torch.tensor([mix(seed) for seed in range(count)])
    for name in ("temperature", "top_p", "top_k", "generated"):
        setattr(slots, name, getattr(slots, name)[:1].expand(count))
    slots.num_slots = count
    tokens = sample(logits.expand(count, -1), torch.arange(count), Needs.of([params]), slots, NO_ENDS).tokens
    found, expected = torch.bincount(tokens, minlength=40).double(), reference_distribution(logits, params) * count
    assert found[expected == 0].sum() == 0
    likely = expected > 5
    statistic = ((found - expected)[likely] ** 2 / expected[likely]).sum().item()
    degrees = int(likely.sum()) - 1
    assert statistic < degrees + 5 * math.sqrt(2 * degrees) + 12, (found, expected)
    assert rows.sum() == 0


def test_random_numbers_are_those_of_splitmix64():
    """The generator's public definition: state += 2^64 / golden ratio, then its output function."""
    mask, expected = (1 << 64) - 1, []
    for seed in (0, 1, 123456789, -5):
        state = mix(seed) & mask
        for _ in range(5):
            state = (state + 0x9E3779B97F4A7C15) & mask
            bits = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
            bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & mask
            expected.append(((bits ^ (bits >> 31)) >> 11) / 2**53)
    seeds = torch.tensor([mix(seed) for seed in (0, 1, 123456789, -5)]).repeat_interleave(5)
    assert uniform(seeds, torch.arange(5).repeat(4)).tolist() == expected
    numbers = uniform(torch.tensor([mix(seed) for seed in range(10000)]), torch.zeros(10000, dtype=torch.int64))
    assert abs(numbers.mean() - 0.5) < 0.02 and 0 <= numbers.min() and numbers.max() < 1


def test_three_ways_to_the_same_cut():
    """Among the likeliest candidates, by a whole sort, by bisection as on a GPU; and transformers' warpers."""
    generator = torch.Generator().manual_seed(2)
    size, rows = 700, 60
    logits = torch.randn(rows, size, generator=generator) * torch.linspace(0.05, 6, rows)[:, None]
    top_k = torch.randint(0, 400, (rows,), generator=generator) * (torch.rand(rows, generator=generator) < 0.6)
    top_p = torch.where(torch.rand(rows, generator=generator) < 0.3, 1.0, torch.rand(rows, generator=generator))
    probs = logits.softmax(-1)
    whole = sampler._thresholds_among(probs, top_k, top_p, size)[0]
    torch.testing.assert_close(sampler.cut_thresholds(probs, top_k, top_p), whole, rtol=0, atol=0)
    kept = {"sorted": probs >= whole[:, None]}
    no_limits = (torch.zeros_like(top_k), torch.ones_like(top_p))
    for cuts, same in (((top_k, None), (top_k, no_limits[1])), ((None, top_p), (no_limits[0], top_p))):
        expected = sampler._thresholds_among(probs, *same, size)[0]
        torch.testing.assert_close(sampler.cut_thresholds(probs, *cuts), expected, rtol=0, atol=0)
        found = sampler._thresholds_by_bisection(probs, *cuts)
        assert ((probs >= found[:, None]) != (probs >= expected[:, None])).sum() <= 2
    kept["bisected"] = probs >= sampler._thresholds_by_bisection(probs, top_k, top_p)[:, None]
    for row in range(rows):
        params = SamplingParams(top_k=int(top_k[row]), top_p=float(top_p[row]))
        expected = reference_distribution(logits[row], params) > 0
        for name, found in kept.items():
            # where the mass is reached to the last bit of a float, one token more or less is as right
            assert (found[row] != expected).sum() <= 1, (name, params)
    assert (kept["sorted"] != kept["bisected"]).sum() <= 2


def test_penalties():
    """Each by its own formula; the repetition penalty by transformers' processor."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 30, generator=generator)
    prompt, answer = [3, 4, 4, 5], [7, 7, 7, 8]
    ids = torch.tensor([prompt + answer])

    def scores(params: SamplingParams) -> torch.Tensor:
        slots = slots_for([params], 30, prompt, {0: answer})
        return sampler._adjust(logits, torch.tensor([0]), Needs.of([params]), slots, NO_ENDS)

    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    torch.testing.assert_close(scores(SamplingParams(repetition_penalty=1.7)), expected)
    frequency = logits.clone()
    frequency[0, 7] -= 3 * 0.5
    frequency[0, 8] -= 0.5
    torch.testing.assert_close(scores(SamplingParams(frequency_penalty=0.5)), frequency)
    presence = logits.clone()
    presence[0, [7, 8]] -= 0.9
    torch.testing.assert_close(scores(SamplingParams(presence_penalty=0.9)), presence)
    bias = logits.clone()
    bias[0, 2] += 5
    bias[0, 29] -= 100
    torch.testing.assert_close(scores(SamplingParams(logit_bias={2: 5, 29: -100})), bias)


def test_a_slot_keeps_nothing_of_the_request_before():
    """Penalties and biases of one request, then a plain one and one with other penalties in the same slot."""
    running = engine(max_batch=1)
    prompt = prompts(10)[0]
    plain = token_ids(running.submit(prompt, greedy(20)).result(30))
    strict = SamplingParams(temperature=0, max_tokens=20, frequency_penalty=2, logit_bias={plain[0]: -100})
    first = token_ids(running.submit(prompt, strict).result(30))
    assert first != plain and plain[0] not in first
    assert token_ids(running.submit(prompt, greedy(20)).result(30)) == plain
    assert token_ids(running.submit(prompt, strict).result(30)) == first
    with_neighbour = engine(max_batch=2)
    neighbours = [with_neighbour.submit(prompt, params) for params in (strict, greedy(20))]
    assert [token_ids(request.result(30)) for request in neighbours] == [first, plain]
    running.close(), with_neighbour.close()


def test_penalties_of_running_requests_equal_those_of_a_plain_loop():
    """Token by token against a loop over the model's forward with the formulas written out."""
    lm, prompt = model(), prompts(12)[0]
    params = greedy(25, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.3)
    said: list[int] = []
    for _ in range(25):
        with torch.no_grad():
            logits = lm(torch.tensor([prompt + said])).logits[0, -1]
        scores = logits.clone()
        for token in set(prompt + said):
            scores[token] = scores[token] / 1.3 if scores[token] > 0 else scores[token] * 1.3
        for token in set(said):
            scores[token] -= 0.4 * said.count(token) + 0.3
        said.append(int(scores.argmax()))
    running = engine(lookahead=True)
    others = [running.submit(p, SamplingParams(max_tokens=30, seed=1)) for p in prompts(5, 30)]
    assert token_ids(running.submit(prompt, params).result(30)) == said
    assert len({len(request.result(30).tokens) for request in others}) == 1
    running.close()


def test_a_seed_gives_the_same_answer_in_any_company():
    asked = prompts(15, 40, 6, 3)
    sampled = [SamplingParams(temperature=0.9, top_p=0.95, seed=seed, max_tokens=25) for seed in (5, 6, 7, 5)]
    alone = []
    for prompt, params in zip(asked, sampled, strict=True):
        running = engine()
        alone.append(token_ids(running.submit(prompt, params).result(30)))
        running.close()
    running = engine(lookahead=True)
    together = [running.submit(prompt, params) for prompt, params in zip(asked, sampled, strict=True)]
    company = running.submit(asked[0], SamplingParams(temperature=2.0, max_tokens=40))
    assert [token_ids(request.result(30)) for request in together] == alone
    assert len(company.result(30).tokens) == 40
    different = {tuple(token_ids(running.submit(asked[0], SamplingParams(max_tokens=20)).result(30))) for _ in range(3)}
    assert len(different) == 3  # without a seed every answer is another one
    running.close()


def test_every_row_has_its_own_parameters():
    """Greedy, cold, hot and biased rows in one call."""
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(4)).expand(5, -1)
    best = int(logits[0].argmax())
    tokens = choose(
        logits,
        [
            SamplingParams(temperature=0),
            SamplingParams(temperature=0.01, seed=1),
            SamplingParams(temperature=2.0, top_k=1, seed=2),
            SamplingParams(temperature=2.0, top_p=1e-6, seed=3),
            SamplingParams(temperature=0, logit_bias={17: 100}),
        ],
    )
    assert tokens == [best, best, best, best, 17]


def test_min_tokens_forbids_the_end_until_then():
    lm, prompt = model(), prompts(10)[0]
    lm.generation_config.eos_token_id = 5
    always_ends = {5: 100.0}
    running = engine(lm=lm)
    for fewest in (0, 1, 4):
        completion = running.submit(prompt, greedy(9, min_tokens=fewest, logit_bias=always_ends)).result(30)
        assert (completion.finish_reason, completion.stop_reason) == ("stop", 5)
        assert (completion.num_tokens, len(completion.tokens)) == (fewest + 1, fewest)
    ignoring = running.submit(prompt, greedy(9, ignore_eos=True, logit_bias=always_ends)).result(30)
    assert token_ids(ignoring) == [5] * 9 and ignoring.finish_reason == "length"
    running.close()


def test_scores_that_are_no_numbers_end_their_request_alone():
    logits = torch.zeros(3, 8)
    logits[1, 4] = float("nan")
    logits[2] = -torch.inf
    assert choose(logits, [SamplingParams(seed=1), SamplingParams(seed=2), greedy()])[1:] == [-1, -1]
    lm = model()
    running = engine(lm=lm)
    with torch.no_grad():
        lm.get_input_embeddings().weight[96] = float("nan")
    bad, good = running.submit([1, 96, 2], greedy(4)), running.submit([1, 2, 3], greedy(4, logit_bias={96: -100}))
    assert len(good.result(30).tokens) == 4
    with pytest.raises(RequestFailed, match="not finite"):
        bad.result(30)
    running.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", 3),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("seed", 2**70),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("repetition_penalty", 0),
        ("frequency_penalty", 9),
        ("presence_penalty", float("inf")),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("min_tokens", 13),
        ("stop", ("",)),
        ("logit_bias", {VOCABULARY: 1.0}),
        ("logit_bias", {1: 1e9}),
    ],
)
def test_impossible_parameters_name_their_field(shared_engine, field, value):
    params = SamplingParams(**({"max_tokens": 12} | {field: value}))
    with pytest.raises(InvalidRequest, match=field) as caught:
        shared_engine.submit([1, 2, 3], params)
    assert caught.value.param == field


@pytest.mark.parametrize("prompt", [[], [-1], [1, VOCABULARY]])
def test_impossible_prompts_are_refused(shared_engine, prompt):
    with pytest.raises(InvalidRequest) as caught:
        shared_engine.submit(prompt, greedy())
    assert caught.value.param == "prompt"


def test_a_temperature_next_to_nothing_is_greedy(shared_engine):
    """Scores divided by it would be infinite, or no numbers; beside a row that is sampled too."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 20
    for temperature in (1e-45, 1e-40, 1e-30, 1e-7):
        tiny = SamplingParams(temperature=temperature, top_p=0.9, top_k=5, seed=1)
        assert not Needs.of([tiny]).sampling
        assert choose(logits, [tiny] * 3 + [SamplingParams(seed=1)])[:3] == logits[:3].argmax(-1).tolist()
        answer = shared_engine.submit([1, 2, 3], replace(tiny, max_tokens=6)).result(30)
        assert token_ids(answer) == token_ids(shared_engine.submit([1, 2, 3], greedy(6)).result(30))
    least = [SamplingParams(temperature=1e-6, seed=1)] * 4
    assert Needs.of(least).sampling and choose(logits, least) == logits.argmax(-1).tolist()


def test_extreme_but_possible_parameters(shared_engine):
    params = SamplingParams(temperature=1e-30, top_k=10**12, seed=-(2**63), max_tokens=3)
    assert len(shared_engine.submit([1, 2, 3], params).result(30).tokens) == 3
    longest = SimpleNamespace(prompt=prompts(CONTEXT - 1)[0])
    completion = shared_engine.submit(longest.prompt, SamplingParams(temperature=0)).result(30)
    assert (completion.finish_reason, completion.num_tokens) == ("length", 1)


@pytest.fixture(scope="module")
def shared_engine():
    running = engine()
    yield running
    running.close()


def test_the_tables_of_a_slot_are_those_of_its_own_request():
    slots = Slots(1, 5, 0, torch.device("cpu"))
    for prompt, bias in ([1], {3: 50}), ([2], {4: 10}):
        slots.join(0, 0, prompt, SamplingParams(repetition_penalty=2.0, logit_bias=bias), 0)
    assert slots.bias[0].tolist() == [0, 0, 0, 0, 10]
    assert slots.in_prompt[0].tolist() == [False, False, True, False, False]


def test_a_plain_request_beside_a_biased_one_has_nothing_of_the_bias_before_it():
    slots = Slots(2, 5, 0, torch.device("cpu"))
    before, plain, biased = greedy(logit_bias={3: 50}), greedy(), greedy(logit_bias={4: 50})
    for slot, params in ((0, before), (0, plain), (1, biased)):
        slots.join(slot, 0, [1], params, 0)
    logits = torch.tensor([[1.0, 0, 0, 0, 0]] * 2)
    assert sample(logits, torch.arange(2), Needs.of([plain, biased]), slots, NO_ENDS).tokens.tolist() == [0, 4]


def test_an_end_that_min_tokens_forbids_keeps_its_log_probability():
    """The model's own scores are told, whatever forbids a token."""
    params = greedy(min_tokens=5, logprobs=2)
    logits, ends = torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([1])
    found = sample(logits, torch.arange(1), Needs.of([params]), slots_for([params], 3), ends)
    total = math.log(math.exp(1) + math.exp(3) + math.exp(0))
    assert (found.tokens.tolist(), found.alternatives.tolist()) == ([0], [[1, 0]])
    assert found.logprobs.tolist() == pytest.approx([1 - total], abs=1e-6)
    assert found.alternative_logprobs[0].tolist() == pytest.approx([3 - total, 1 - total], abs=1e-6)
