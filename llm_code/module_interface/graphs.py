"""The runner of a GPU: decoding steps are captured CUDA graphs, one for each of a few batch sizes.

A captured step reads which slots take part from one small tensor and everything else from the slots themselves. Empty
rows of a graph belong to the spare slot, which writes to the cache's scratch block. Steps with prompts run uncaptured.
"""

import logging

import torch
from torch import Tensor

from llm_code.module_interface.runner import Runner, StepAttention
from llm_code.module_interface.scheduler import Step

log = logging.getLogger(__name__)


def batch_sizes(max_batch: int) -> list[int]:
    """Sizes of graphs: 1, 2, 4, then multiples of 8, so that few rows are computed for nothing."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, 1025, 32)]
    return [*(size for size in sizes if size < max_batch), max_batch]


class GraphRunner(Runner):
    """A Runner that replays captured decoding steps."""

    def prepare(self) -> None:
        """Capture all graphs, the largest first: the others share its memory. Runs in the engine's thread."""
        torch.cuda.set_device(self.device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        sizes = batch_sizes(self.slots.num_slots)
        self.rows = torch.full((sizes[-1],), self.slots.num_slots, dtype=torch.int64, device=self.device)
        if not self.operations.can_capture:
            log.warning("decoding steps are not captured: no attention kernel that could be")
            return
        pool = torch.cuda.graph_pool_handle()
        try:
            for size in reversed(sizes):
                self.graphs[size] = self._capture(size, pool)
        except Exception as error:
            log.warning("decoding steps are not captured: %s", error)
            self.graphs.clear()

    @torch.inference_mode()
    def _capture(self, size: int, pool: tuple[int, int]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # what is set up on first use must not be captured
                self._decode(size)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            logits_RV = self._decode(size)
        return graph, logits_RV

    def _decode(self, size: int) -> Tensor:
        """(size, V) scores of the slots in `rows`."""
        rows = self.rows[:size]
        lengths = self.slots.length[rows]
        attention = StepAttention(self, lengths, self.slots.start[rows] + lengths, size)
        hidden_TC = self.decoder.hidden(self.slots.last_token[rows], self.operations, attention)
        return self.decoder.logits(hidden_TC)

    def decode_logits(self, step: Step) -> Tensor | None:
        """Scores of a captured step; None where the step has prompts or there is no graph of its size."""
        count = len(step.decode)
        size = next((size for size in sorted(self.graphs) if size >= count), None)
        if step.chunks or size is None:
            return None
        rows = [sequence.slot for sequence in step.decode] + [self.slots.num_slots] * (size - count)
        self.rows[:size].copy_(self.to_device(rows), non_blocking=True)
        graph, logits_RV = self.graphs[size]
        graph.replay()
        return logits_RV[:count]
