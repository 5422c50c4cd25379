"""Two real processes over gloo: an update planned for both gives the gradients of one process that sees all rows."""

import os
from datetime import timedelta
from pathlib import Path

import torch

from finetune import gradients as of_an_update
from finetune.attention import enable_padding_free_attention
from finetune.batching import collate, plan_epoch
from finetune.errors import UserError
from finetune.loss import enable_chunked_loss
from finetune.prepare import on_first_rank
from tests.tiny.native import gradients, random_samples, tiny_native

WORLD_SIZE = 2
PATIENCE = timedelta(minutes=2)
# A single row leaves the second rank an empty micro-batch: it must neither hang nor add anything.
UPDATES = ([9, 4, 14, 3, 7, 12], [9])


def build():
    return enable_chunked_loss(enable_padding_free_attention(tiny_native("llama")), chunk_rows=4)


def run_rank(rank, folder, port):
    """One rank's share of each update, all its micro-batches; the gradients of both go to files."""
    from torch import distributed

    torch.set_num_threads(1)
    store = distributed.TCPStore("127.0.0.1", port, is_master=False, timeout=PATIENCE)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=PATIENCE)
    model = build()
    of_an_update.LARGE = 2000  # matrices are sent where they lie, norms in a block
    ours = of_an_update.Gradients(model, WORLD_SIZE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += rank  # the first rank's count
    assert ours.ranks_differ()
    ours.share_parameters()
    assert not ours.ranks_differ()
    for number, lengths in enumerate(UPDATES):
        ours.forget()
        samples = random_samples(lengths)
        (update,) = plan_epoch(lengths, len(lengths), WORLD_SIZE, 16, seed=0, epoch=0)
        for rows in update.micro_batches[rank]:
            model(**collate([samples[row] for row in rows])).loss.backward()
        ours.add_up()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert len({of_an_update._is_large(grad) for grad in grads.values()}) == 2
        torch.save(grads, f"{folder}/{rank}_{number}.pt")
    distributed.barrier()  # the ranks part together: a last collective of one that is gone fails
    distributed.destroy_process_group()


def refuse_on_first(rank, folder, port):
    from torch import distributed

    store = distributed.TCPStore("127.0.0.1", port, is_master=False, timeout=PATIENCE)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=PATIENCE)
    os.environ["RANK"] = str(rank)

    def check():
        assert rank == 0
        raise UserError("no room")

    on_first_rank(lambda: None)
    try:
        on_first_rank(check)
    except UserError as error:
        Path(folder, f"refused-{rank}").write_text(str(error))
    distributed.destroy_process_group()


def test_what_the_first_rank_refuses_is_refused_by_all(tmp_path):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(refuse_on_first, (str(tmp_path), store.port), WORLD_SIZE)
    assert [(tmp_path / f"refused-{rank}").read_text() for rank in range(WORLD_SIZE)] == ["no room", "no room"]


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
                torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-4, msg=name)
