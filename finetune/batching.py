"""Which rows an optimiser update sees, and how they are cut into micro-batches: the same arithmetic on every rank.

An update holds exactly `rows_per_update` rows. Its rows are packed into `world_size * n` micro-batches of at most
`token_budget` tokens, `n` being the smallest number that fits, so that every rank runs the same number of micro-batches
(ZeRO-3 gathers parameters inside each of them and would wait for a rank that runs fewer) and carries about the same
number of tokens. A micro-batch is empty when an update has fewer rows than places; `collate` makes it one unsupervised
token, whose loss is an exact 0 that still reaches every parameter.
"""

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.conversation import Sample

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Update:
    """One optimiser update: `micro_batches[rank][step]` is a list of row indices, maybe empty."""

    micro_batches: list[list[list[int]]]

    @property
    def rows(self) -> list[int]:
        """All row indices of the update, sorted."""
        return sorted(row for steps in self.micro_batches for rows in steps for row in rows)


def plan_epoch(
    lengths: Sequence[int], rows_per_update: int, world_size: int, token_budget: int, seed: int, epoch: int
) -> list[Update]:
    """Updates of one epoch over rows of the given token lengths, every row exactly once.

    The order is a permutation drawn from (seed, epoch). Only the last update may hold fewer than `rows_per_update`
    rows. A row longer than `token_budget` has a micro-batch of its own. Raises UserError when a count is below 1 or a
    row is empty.
    """
    for name, value in (
        ("rows_per_update", rows_per_update),
        ("world_size", world_size),
        ("token_budget", token_budget),
        ("the shortest row's length", min(lengths, default=1)),
    ):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}.")
    order = list(range(len(lengths)))
    # A string seed is hashed with SHA-512: neighbouring (seed, epoch) pairs share no order, on any machine.
    random.Random(f"{seed},{epoch}").shuffle(order)
    starts = range(0, len(order), rows_per_update)
    return [_plan_update(lengths, order[i : i + rows_per_update], world_size, token_budget) for i in starts]


def _plan_update(lengths: Sequence[int], rows: list[int], world_size: int, token_budget: int) -> Update:
    rows = sorted(rows, key=lengths.__getitem__, reverse=True)
    total = sum(min(lengths[row], token_budget) for row in rows)
    large = sum(2 * lengths[row] > token_budget for row in rows)  # no two of them share a micro-batch
    steps = max(1, -(-total // (token_budget * world_size)), -(-large // world_size))
    while (bins := _pack(lengths, rows, steps * world_size, token_budget)) is None:
        steps += 1
    bins.sort(key=lambda rows: sum(lengths[row] for row in rows), reverse=True)
    # Neighbours in size run at the same step, and the direction alternates, so no rank always has the largest.
    table = [bins[i : i + world_size] for i in range(0, len(bins), world_size)]
    table = [step if i % 2 == 0 else step[::-1] for i, step in enumerate(table)]
    return Update([[step[rank] for step in table] for rank in range(world_size)])


def _pack(lengths: Sequence[int], rows: list[int], num_bins: int, token_budget: int) -> list[list[int]] | None:
    """Rows, longest first, each into the emptiest bin; None when one does not fit."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, index) for index in range(num_bins)]
    for row in rows:
        if not heap:
            return None
        load, index = heap[0]
        if load and load + lengths[row] > token_budget:
            return None
        bins[index].append(row)
        if lengths[row] >= token_budget:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (load + lengths[row], index))
    return bins


def collate(samples: "Sequence[Sample]") -> dict[str, Any]:
    """One padding-free micro-batch of `samples`, as tensors.

    `input_ids`, `labels` and `position_ids` are (1, T) int64; positions restart with every row. `labels` are aligned
    with `input_ids` (the model shifts them); each row's first label is -100, so no row predicts the next one's
    beginning. `target_positions` and `targets` (N,) say for each of the N supervised tokens which position predicts it,
    so that the loss need not ask the device. `cu_seq_lens_q`/`_k` are int32 (rows + 1) and `max_length_q`/`_k` ints,
    the names that transformers hands on to attention. No samples give one token without a label.
    """
    import torch

    ids = [list(sample.input_ids) for sample in samples] or [[0]]
    labels = [[IGNORE_INDEX, *sample.labels[1:]] for sample in samples] or [[IGNORE_INDEX]]
    borders = [0]
    for row in ids:
        borders.append(borders[-1] + len(row))
    flat = list(chain.from_iterable(labels))
    positions = [index for index, label in enumerate(flat[1:]) if label != IGNORE_INDEX]
    cu_seq_lens = torch.tensor(borders, dtype=torch.int32)
    max_length = max(map(len, ids))
    return {
        "input_ids": torch.tensor([list(chain.from_iterable(ids))]),
        "labels": torch.tensor([flat]),
        "target_positions": torch.tensor(positions, dtype=torch.int64),
        "targets": torch.tensor([flat[index + 1] for index in positions], dtype=torch.int64),
        "position_ids": torch.cat([torch.arange(len(row)) for row in ids])[None],
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": max_length,
        "max_length_k": max_length,
    }
