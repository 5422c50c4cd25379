"""The cache's allocator and the store of prompts to reuse, against plain models of what they should hold."""

import random

import pytest

from llm_code.module_interface.cache import BLOCK, Extent, ExtentAllocator
from llm_code.module_interface.prefixes import MAX_KEPT, MIN_SHARED, PrefixStore, shared_length


def test_extents_never_overlap_and_nothing_is_lost():
    rng, allocator, held = random.Random(0), ExtentAllocator(64 * BLOCK), []
    for _ in range(3000):
        if held and rng.random() < 0.5:
            extent = held.pop(rng.randrange(len(held)))
            if rng.random() < 0.3:
                allocator.shrink(extent, rng.randrange(1, extent.size + 1))
            allocator.release(extent)
        elif held and rng.random() < 0.2:
            extent = rng.choice(held)
            before = extent.size
            behind = {t for e in held for t in range(e.start, e.start + e.size)}
            wanted = before + rng.randrange(1, 3 * BLOCK)
            rounded = -(-wanted // BLOCK) * BLOCK
            new = range(extent.start + before, extent.start + rounded)
            fits = new.stop <= 64 * BLOCK and behind.isdisjoint(new)
            assert allocator.extend(extent, wanted) == fits
            assert extent.size == (rounded if fits else before)
        elif extent := allocator.allocate(rng.randrange(1, 8 * BLOCK)):
            held.append(extent)
        taken = [token for e in held for token in range(e.start, e.start + e.size)]
        assert len(set(taken)) == len(taken) and all(0 <= token < 64 * BLOCK for token in taken)
        assert allocator.num_free == 64 * BLOCK - len(taken)
    for extent in held:
        allocator.release(extent)
    assert allocator.allocate(64 * BLOCK) == Extent(0, 64 * BLOCK)  # all free ranges have joined


def test_no_room_and_double_release():
    allocator = ExtentAllocator(4 * BLOCK)
    first, second = allocator.allocate(BLOCK + 1), allocator.allocate(BLOCK)
    assert (first.size, second.size) == (2 * BLOCK, BLOCK)
    assert allocator.allocate(BLOCK + 1) is None
    allocator.release(first)
    with pytest.raises(RuntimeError, match="released twice"):
        allocator.release(first)


def test_shared_length_is_the_number_of_equal_tokens():
    rng = random.Random(1)
    for _ in range(300):
        first = [1] * 15 + [rng.randrange(3) for _ in range(rng.randrange(60))]
        second = first[: rng.randrange(61)] + [rng.randrange(3) for _ in range(rng.randrange(20))]
        counted = 0
        while counted < min(len(first), len(second)) and first[counted] == second[counted]:
            counted += 1
        assert shared_length(first, second) == (counted if counted >= MIN_SHARED else 0)


def make_store(blocks: int) -> PrefixStore:
    return PrefixStore(ExtentAllocator(blocks * BLOCK))


def test_the_longest_shared_beginning_is_found_and_the_oldest_given_up():
    store, tokens = make_store(8), list(range(100))
    for length in (20, 40):
        extent = store.allocate(3 * BLOCK)
        store.keep(tokens[:length] + [999] * 5, extent)
    found, promised = store.find(tokens, [])
    assert (found.length, promised) == (40, 40)
    assert store.find(tokens[:41], [])[0].length == 40
    assert store.find(tokens[:40], [])[0].length == 39  # the last token is computed: its scores are needed
    assert store.find([999] + tokens, []) == (None, 0)
    assert store.allocate(3 * BLOCK) and store.allocate(2 * BLOCK)  # one has to go: the one not asked for lately
    assert store.find(tokens, [])[0].length == 40
    assert store.allocate(3 * BLOCK)
    assert store.find(tokens, []) == (None, 0)


def test_a_running_prompt_promises_what_it_has_not_computed():
    tokens = list(range(100))
    found, promised = make_store(4).find(tokens, [(tokens[:60], 0, 20), (tokens[:30], 64, 30)])
    assert (found.start, found.length, promised) == (64, 30, 60)


def test_a_longer_prompt_replaces_its_own_beginning():
    store, tokens = make_store(40), list(range(100))
    for length in (20, 50, 100):
        store.keep(tokens[:length], store.allocate(length))
    assert store.num_tokens == 7 * BLOCK
    store.keep([1] * (MIN_SHARED - 1), store.allocate(BLOCK))  # too short to be worth keeping
    assert store.num_tokens == 7 * BLOCK


def test_the_number_of_kept_prompts_is_bounded():
    store = make_store(3 * MAX_KEPT)
    for first in range(MAX_KEPT + 5):
        store.keep([first] * 20, store.allocate(20))
    assert store.num_tokens == MAX_KEPT * 2 * BLOCK
    store.clear()
    assert store.num_tokens == 0 and store.allocator.num_free == 3 * MAX_KEPT * BLOCK
