"""Two real processes over gloo: an update planned for both gives the gradients of one process that sees all rows."""

from contextlib import nullcontext
from datetime import timedelta

import torch

from finetune.attention import enable_padding_free_attention
from finetune.batching import collate, plan_epoch
from finetune.loss import enable_chunked_loss
from tests.tiny.native import gradients, random_samples, tiny_native

WORLD_SIZE = 2
PATIENCE = timedelta(minutes=2)
# A single row leaves the second rank an empty micro-batch: it must neither hang nor add anything.
UPDATES = ([9, 4, 14, 3, 7, 12], [9])


def build():
    return enable_chunked_loss(enable_padding_free_attention(tiny_native("llama")), chunk_rows=4)


def run_rank(rank, folder, port):
    """One rank's share of each update, all its micro-batches; the averaged gradients go to files."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    store = distributed.TCPStore("127.0.0.1", port, is_master=False, timeout=PATIENCE)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=PATIENCE)
    model = DistributedDataParallel(build())
    for number, lengths in enumerate(UPDATES):
        model.zero_grad(set_to_none=True)
        samples = random_samples(lengths)
        (update,) = plan_epoch(lengths, len(lengths), WORLD_SIZE, 16, seed=0, epoch=0)
        steps = update.micro_batches[rank]
        for index, rows in enumerate(steps):
            with nullcontext() if index == len(steps) - 1 else model.no_sync():
                model(**collate([samples[row] for row in rows])).loss.backward()
        grads = {name: parameter.grad for name, parameter in model.module.named_parameters()}
        torch.save(grads, f"{folder}/{rank}_{number}.pt")
    # The wrapper goes while its group is there, and the ranks part together: otherwise one in ten runs hung at the end.
    del model
    distributed.barrier()
    distributed.destroy_process_group()


def test_gradients_equal_one_process(tmp_path):
    # The store lives here: a rank that ends first cannot take it away from the other.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(run_rank, (str(tmp_path), store.port), WORLD_SIZE)
    model = build()
    for number, lengths in enumerate(UPDATES):
        expected = gradients(model, model(**collate(random_samples(lengths))).loss)
        for rank in range(WORLD_SIZE):
            found = torch.load(tmp_path / f"{rank}_{number}.pt")
            for name, grad in expected.items():
                torch.testing.assert_close(found[name] * WORLD_SIZE, grad, rtol=1e-4, atol=1e-4, msg=name)
