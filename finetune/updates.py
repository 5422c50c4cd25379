"""The updates of an epoch as a rank sees them, in a form that transformers' loop and accelerate can walk through."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader

from finetune.batching import IGNORE_INDEX, Update, plan_epoch

if TYPE_CHECKING:
    from finetune.conversation import Sample


def count_supervised(sample: "Sample") -> int:
    """Labels that the model predicts: the first token of a row is predicted by nothing."""
    return sum(label != IGNORE_INDEX for label in sample.labels[1:])


def cut_in_pieces(rows: Sequence[int], lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Rows in order, in pieces of at most token_budget tokens; a longer row is a piece by itself."""
    pieces: list[list[int]] = [[]]
    for row in rows:
        if pieces[-1] and sum(lengths[r] for r in pieces[-1]) + lengths[row] > token_budget:
            pieces.append([])
        pieces[-1].append(row)
    return pieces


@dataclass
class RankUpdate:
    """What one rank does in one update. Rows and token counts are those of the whole update, over all ranks.

    `next_rows` is the first micro-batch of this rank in the epoch's next update, None in the last one.
    """

    micro_batches: list[list[int]]
    rows: list[int]
    num_tokens: int
    num_supervised: int
    next_rows: list[int] | None = None


class UpdateDataset:
    """Item i is the i-th update of the current `epoch`.

    `token_budget` is the one that rows are dealt out by, the same on every rank for the whole run.
    """

    def __init__(
        self,
        samples: "Sequence[Sample]",
        rows_per_update: int,
        token_budget: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.samples = samples
        self.lengths = [len(sample.input_ids) for sample in samples]
        self.supervised = [count_supervised(sample) for sample in samples]
        self.rows_per_update, self.token_budget, self.seed = rows_per_update, token_budget, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self._planned_epoch: int | None = None
        self._updates: list[Update] = []

    def __len__(self) -> int:
        return math.ceil(len(self.samples) / self.rows_per_update)

    def _plan(self) -> list[Update]:
        if self._planned_epoch != self.epoch:
            self._updates, self._planned_epoch = self._plan_of(self.epoch), self.epoch
        return self._updates

    def _plan_of(self, epoch: int) -> list[Update]:
        return plan_epoch(self.lengths, self.rows_per_update, self.world_size, self.token_budget, self.seed, epoch)

    def largest_micro_batches(self, num_updates: int) -> dict[int, int]:
        """By the number of micro-batches of an update on a rank: tokens of the largest, often below the budget.

        Looks at the first `num_updates` of the training.
        """
        largest: dict[int, int] = {}
        epochs = range(math.ceil(num_updates / len(self)))
        for update in islice(chain.from_iterable(map(self._plan_of, epochs)), num_updates):
            count = len(update.micro_batches[0])
            tokens = (sum(self.lengths[row] for row in rows) for steps in update.micro_batches for rows in steps)
            largest[count] = max(largest.get(count, 0), *tokens)
        return largest

    def __getitem__(self, index: int) -> RankUpdate:
        update, *following = self._plan()[index : index + 2]
        rows = update.rows
        return RankUpdate(
            micro_batches=update.micro_batches[self.rank],
            rows=rows,
            num_tokens=sum(self.lengths[row] for row in rows),
            num_supervised=sum(self.supervised[row] for row in rows),
            next_rows=following[0].micro_batches[self.rank][0] if following else None,
        )


class _Indices:
    """Batches of one index, in order: which rows an index stands for is the plan's business."""

    batch_size, drop_last = 1, False

    def __init__(self, dataset: UpdateDataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[list[int]]:
        return iter([index] for index in range(len(self.dataset)))

    def __len__(self) -> int:
        return len(self.dataset)


def update_loader(dataset: UpdateDataset) -> DataLoader:
    """A DataLoader over whole updates, so that accelerate can skip those already done."""
    # Its own generator: a DataLoader draws a number an epoch, which must not move the dropout's generator.
    generator = torch.Generator().manual_seed(0)
    return DataLoader(dataset, batch_sampler=_Indices(dataset), collate_fn=_only_item, generator=generator)


def _only_item(items: list[RankUpdate]) -> RankUpdate:
    return items[0]
