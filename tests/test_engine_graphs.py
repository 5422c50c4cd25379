"""The runner of captured steps without a GPU: a graph that computes again what it would have captured."""

import pytest
import torch

from llm_code.module_interface import local_engine
from llm_code.module_interface.graphs import GraphRunner, batch_sizes
from llm_code.module_interface.interface import SamplingParams
from llm_code.module_interface.operations import Operations
from tests.engines import answer, engine, greedy, model, prompts, token_ids


class DeviceOperations(Operations):
    """Decoding attention that reads starts and lengths from tensors alone, as a kernel does."""

    can_capture = True

    def attend_decode(self, q_BHD, keys_values, starts_B, lengths_B, places, scaling):
        places = list(zip(starts_B.tolist(), lengths_B.tolist(), strict=True))
        return super().attend_decode(q_BHD, keys_values, starts_B, lengths_B, places, scaling)


class Replay:
    """Stands for a CUDA graph: fixed tensors in, fixed tensors out."""

    def __init__(self, runner, size: int, output: torch.Tensor) -> None:
        self.runner, self.size, self.output, self.count = runner, size, output, 0

    def replay(self) -> None:
        self.count += 1
        self.output.copy_(self.runner._decode(self.size))


class ReplayRunner(GraphRunner):
    @torch.inference_mode()
    def _capture(self, size, pool):
        output = self._decode(size)
        return Replay(self, size, output), output


@pytest.fixture
def captured(monkeypatch):
    def make_runner(decoder, pool, slots, end_ids):
        return ReplayRunner(decoder, DeviceOperations(), pool, slots, end_ids)

    monkeypatch.setattr(local_engine, "make_runner", make_runner)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    running = engine(max_batch=6, lookahead=True)
    yield running
    running.close()


def test_replayed_steps_give_the_answers_of_generate(captured):
    """Batches of every size, most of them with empty rows in the graph."""
    asked = prompts(3, 17, 40, 1, 9, 100, 64, 16)
    requests = [captured.submit(prompt, greedy(6 + 3 * i)) for i, prompt in enumerate(asked)]
    found = [token_ids(request.result(30)) for request in requests]
    assert found == [answer(model(), prompt, 6 + 3 * i) for i, prompt in enumerate(asked)]
    graphs = captured._worker.runner.graphs
    assert set(graphs) == {1, 2, 4, 6}
    assert all(graph.count for graph, _ in graphs.values())


def test_empty_rows_change_nothing_but_the_scratch_block(captured):
    slots, pool = captured._worker.runner.slots, captured._worker.scheduler.pool
    captured.submit([5, 6, 7], SamplingParams(max_tokens=9, seed=1)).result(30)
    requests = [captured.submit(prompt, SamplingParams(max_tokens=9, seed=2)) for prompt in prompts(4, 5, 6)]
    for request in requests:
        request.result(30)
    spare = slots.num_slots
    assert (slots.length[spare], slots.start[spare], slots.generated[spare]) == (0, pool.scratch, 0)
    assert pool.layers[0][:, pool.scratch].abs().sum() > 0  # where the empty rows wrote
    assert pool.layers[0][:, pool.scratch + 1 :].abs().sum() == 0


@pytest.mark.parametrize("largest", [1, 3, 8, 64, 100, 300])
def test_batch_sizes_reach_the_largest_and_waste_little(largest):
    sizes = batch_sizes(largest)
    assert sizes == sorted(set(sizes)) and sizes[-1] == largest
    for rows in range(1, largest + 1):
        size = next(size for size in sizes if size >= rows)
        assert size - rows <= max(7, rows // 4)
