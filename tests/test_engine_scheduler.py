"""Which requests run and what a step computes, by hand: small caches and no model."""

import pytest
import torch

from llm_code.module_interface import scheduler as scheduling
from llm_code.module_interface.cache import KeyValuePool
from llm_code.module_interface.interface import CANCELLED, ERROR, LENGTH, RequestFailed, SamplingParams
from llm_code.module_interface.requests import LiveRequest
from llm_code.module_interface.scheduler import PrefillBudget, Scheduler
from llm_code.module_interface.sequence import Sequence
from llm_code.module_interface.slots import Slots
from tests.engines import Letters


def scheduler(tokens: int = 64, shared: int = 32, alone: int = 64, queue_timeout: float | None = None) -> Scheduler:
    """Four slots and a cache of so many tokens."""
    device = torch.device("cpu")
    pool = KeyValuePool(1, tokens, 1, 2, torch.float32, device)
    return Scheduler(pool, Slots(4, 50, tokens, device), PrefillBudget(shared, alone), queue_timeout)


def sequence(length: int, token: int, max_tokens: int = 10) -> Sequence:
    """A request whose prompt is one token, repeated: different tokens share nothing."""
    return Sequence([token] * length, SamplingParams(), max_tokens, LiveRequest(), Letters())


def compute(running: Sequence, num_answered: int) -> None:
    """What the engine notes when the prompt is computed and so many tokens are chosen."""
    running.tokens, running.num_chosen = [5] * num_answered, num_answered
    running.num_in_cache = len(running.prompt) + max(num_answered - 1, 0)


@pytest.fixture
def crowded(monkeypatch) -> tuple[Scheduler, Sequence, Sequence, Sequence]:
    """(scheduler, old, new, third): two requests fill the cache and both want more room, a third waits."""
    monkeypatch.setattr(scheduling, "ROOM", 6)
    crowd = scheduler(tokens=32, queue_timeout=1)
    old, new, third = (sequence(10, token, max_tokens=20) for token in (1, 2, 3))
    crowd.waiting.extend([old, new, third])
    crowd.plan()
    assert crowd.running == [old, new]
    for running in (old, new):
        compute(running, 7)  # 16 tokens each, all of their room
    crowd.plan()
    return crowd, old, new, third


def test_the_newest_is_set_back_and_is_the_first_to_join_again(crowded):
    crowd, old, new, third = crowded
    assert crowd.running == [old] and list(crowd.waiting) == [new, third]


def test_a_request_that_was_set_back_waits_as_long_as_it_must(crowded):
    crowd, _, new, third = crowded
    for waiting in (new, third):
        waiting.request.submitted -= 100
    crowd.plan()
    assert not new.finished and third.finish_reason == ERROR  # the third has not begun


def test_a_prompt_counts_once_however_often_it_is_computed(crowded):
    crowd, old, new, third = crowded
    crowd.end(third, CANCELLED)
    crowd.leave(old, LENGTH)
    crowd.plan()
    assert crowd.running == [new] and new.times_set_back == 1
    assert crowd.num_prompt_tokens == 10 + 10


def test_nothing_of_a_request_that_failed_stays_in_the_cache():
    """What it left there may be wrong."""
    crowd, failed, finished = scheduler(), sequence(40, 1), sequence(40, 1)
    for leaving, reason, error in ((failed, ERROR, RequestFailed("x")), (finished, LENGTH, None)):
        crowd.waiting.append(leaving)
        crowd.plan()
        compute(leaving, 1)
        crowd.end(leaving, reason, error)
        assert crowd.prefixes.num_tokens == (0 if error else 48)  # 40, in blocks of 16
        assert crowd.allocator.num_free + crowd.prefixes.num_tokens == 64


def test_a_source_given_up_for_the_prompts_own_room_is_none_any_more():
    crowd, before = scheduler(tokens=64), sequence(40, 1, max_tokens=1)
    crowd.waiting.append(before)
    crowd.plan()
    compute(before, 1)
    crowd.leave(before, LENGTH)
    longer = sequence(60, 1, max_tokens=4)  # the whole cache
    assert crowd.prefixes.find(longer.prompt, [])[0].length == 40
    crowd.waiting.append(longer)
    crowd.plan()
    assert crowd.running == [longer] and longer.num_in_cache == 0


def test_half_of_a_steps_budget_is_for_the_oldest_prompt_and_the_rest_for_the_shortest():
    crowd = scheduler(tokens=512, alone=32)
    oldest, longer, shortest = sequence(100, 1), sequence(95, 2), sequence(90, 3)
    crowd.waiting.extend([oldest, longer, shortest])
    chunks = crowd.plan().chunks
    assert [(chunk.sequence, chunk.begin, chunk.end) for chunk in chunks] == [(oldest, 0, 16), (shortest, 0, 16)]


def test_after_memory_ran_out_prompts_are_computed_in_halves_of_a_block_at_least():
    crowd, budgets = scheduler(shared=64, alone=128), []
    for _ in range(4):
        crowd.make_room()
        budgets.append((crowd.budget.shared, crowd.budget.alone))
    assert budgets == [(32, 64), (16, 32), (16, 16), (16, 16)]
