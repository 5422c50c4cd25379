"""A ZeRO checkpoint made universal by reference: loaded, each file says what the one of DeepSpeed's own tool says."""

import os
import shutil
import socket
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finetune import saving, universal, zero
from finetune.damaged import check_undamaged
from finetune.errors import UserError

WORLD_SIZE = 2
STAGES = (1, 2, 3)
NUMBERS = 5 * 7 + 7 + 7 * 5 + 5 * 3  # of the model below; odd parameters, so that ranks get unequal parts
COMMON = "zero/optimizer_state.pt"


def build() -> tuple[nn.Module, list[dict[str, Any]]]:
    """A model of odd sizes and its two groups: matrices decay, vectors do not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 5, bias=False), nn.Linear(5, 3, bias=False))
    matrices = [one for one in model.parameters() if one.ndim > 1]
    vectors = [one for one in model.parameters() if one.ndim == 1]
    return model, [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def run_rank(rank: int, folder: str, port: int, path: str) -> None:
    """Two updates with each stage, saved; those of SGD too, for stages 2 and 3."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PATH": path}
    torch.set_num_threads(1)
    zero.join_group()
    import deepspeed

    for stage, has_moments in [*((stage, True) for stage in STAGES), (2, False), (3, False)]:
        config = {
            "train_batch_size": WORLD_SIZE,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        }
        model, groups = build()
        optimizer = (torch.optim.AdamW if has_moments else torch.optim.SGD)(groups, lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for update in range(2):
            rows = torch.full((1, 5), float(rank + update), dtype=torch.bfloat16)
            engine.backward(engine(rows).float().square().sum())
            engine.step()
        engine.save_checkpoint(f"{folder}/{stage}" if has_moments else f"{folder}/sgd-{stage}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, deepspeed_kernels: dict[str, str]) -> Path:
    """A folder with the checkpoint of two ranks for each stage."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, (str(folder), port, deepspeed_kernels["PATH"]), WORLD_SIZE)
    for checkpoint in folder.iterdir():
        for name in ("trainer_state.json", "scheduler.pt"):  # transformers' own
            (checkpoint / name).write_text("{}")
    return folder


def by_deepspeed(checkpoint: Path, target: Path) -> Path:
    """What DeepSpeed's tool makes of it."""
    from deepspeed.checkpoint import ds_to_universal

    step = next(checkpoint.glob("global_step*"))
    one = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    ds_to_universal.main(
        Namespace(input_folder=str(step), output_folder=str(target / step.name), inject_missing_state=True, **one)
    )
    return target / step.name


def files_of(folder: Path) -> dict[str, Any]:
    return {str(path.relative_to(folder)): torch.load(path, weights_only=False) for path in folder.rglob("*.pt")}


def same(one: Any, other: Any) -> bool:
    """Whether two loaded files hold the same, tensors by dtype, shape and every bit."""
    if torch.is_tensor(one):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or str(one) == str(other)  # DeepSpeed's loss scaler knows no equality


@pytest.mark.parametrize("stage", STAGES)
def test_each_file_says_what_deepspeeds_own_says(checkpoints: Path, tmp_path: Path, stage: int) -> None:
    checkpoint = checkpoints / str(stage)
    nbytes = universal.make_universal(checkpoint, tmp_path / "ours")
    assert nbytes == 12 * NUMBERS  # 32-bit weights and two moments
    step = (tmp_path / "ours" / "latest_universal").read_text()
    ours, theirs = files_of(tmp_path / "ours" / step), files_of(by_deepspeed(checkpoint, tmp_path / "theirs"))
    assert len(ours) >= 4 * 3 + 2 and set(ours) == set(theirs)
    common, whole = ours.pop(COMMON), theirs.pop(COMMON)
    assert not [name for name in ours if not same(ours[name], theirs[name])]
    if stage == 3:  # the tool has all ranks load the first one's numbers, of which nothing but the counter is used
        states = whole["optimizer_state_dict"]["state"]
        whole["optimizer_state_dict"]["state"] = {group: {"step": state["step"]} for group, state in states.items()}
        del whole["fp32_flat_groups"]
    assert same(common, whole)
    assert {path.name for path in (tmp_path / "ours").iterdir()} > {"trainer_state.json", "scheduler.pt", step}


def test_no_numbers_are_written_and_reading_them_is_shown(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(universal, "MB", 100)
    nbytes = universal.make_universal(checkpoints / "3", tmp_path)
    assert universal._loaded.cache_info().currsize == 0
    universal.show_reading(nbytes)
    found = files_of(next(tmp_path.glob("global_step*")))
    assert universal._loaded.cache_info().currsize == 2 * WORLD_SIZE
    assert capsys.readouterr().err == ""
    universal.end_reading()
    assert capsys.readouterr().err.startswith("11/11 MB")
    assert universal._loaded.cache_info().currsize == 0  # the files take disk as long as they are open
    assert found["zero/0.bias/fp32.pt"].shape == (7,)
    universal.end_reading()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stage", STAGES)
def test_states_of_a_rank_that_are_missing_or_torn_are_refused(checkpoints: Path, tmp_path: Path, stage: int) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(checkpoints / str(stage), checkpoint)
    (file,) = checkpoint.rglob("*pp_rank_1_*optim_states.pt")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="was written by another number of ranks and cannot be dealt out anew"):
        universal.make_universal(checkpoint, tmp_path / "torn")
    file.unlink()
    with pytest.raises(UserError, match="expected [0-9]+ numbers, found [0-9]+"):
        universal.make_universal(checkpoint, tmp_path / "missing")
    for file in checkpoint.rglob("*optim_states.pt"):
        file.unlink()
    with pytest.raises(UserError, match="no optimizer states"):
        universal.make_universal(checkpoint, tmp_path / "none")
    assert not list(tmp_path.glob("*/latest_universal"))


def test_each_group_counts_its_own_updates_again() -> None:
    """And has its own decay; the fused form finds the counter beside its parameter."""
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW([{"params": [one]} for one in parameters], fused=True)
    shared = torch.tensor(5.0)
    for parameter in parameters:
        optimizer.state[parameter]["step"] = shared
    universal.repair_universal(optimizer, (0.1, 0.0))
    first, second = (optimizer.state[parameter]["step"] for parameter in parameters)
    assert first is not second and first == second == 5 and first.device == parameters[0].device
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    universal.repair_universal(optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("name", ["sgd-2", "sgd-3"])
def test_an_optimiser_without_moments_is_refused(checkpoints: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"cannot be dealt out anew \(its optimiser is no AdamW in 32 bits\)"):
        universal.make_universal(checkpoints / name, tmp_path / "target")


def of_deepspeed(checkpoints: Path, output: Path, stage: int) -> Path:
    """A checkpoint as a training leaves it in `output`; returns the folder of DeepSpeed's states."""
    shutil.copytree(checkpoints / str(stage), output / "checkpoint-2")
    torch.save({}, output / "checkpoint-2" / "scheduler.pt")
    (output / "checkpoint-2" / saving.MARKER).write_text(f'{{"step": 2, "ranks": {WORLD_SIZE}}}')
    return zero.step_folder(output / "checkpoint-2")


@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_checkpoint_of_deepspeed_is_refused(checkpoints: Path, tmp_path: Path, stage: int) -> None:
    step = of_deepspeed(checkpoints, tmp_path, stage)
    check_undamaged(tmp_path, str(stage))
    torn, model = next(step.glob("*rank_1*optim_states.pt")), next(step.glob("*_model_states.pt"))
    whole = torn.read_bytes()
    torn.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"{torn.name} is cut short: .*checkpoint-2 is damaged\. Copy it again"):
        check_undamaged(tmp_path, str(stage))
    torn.unlink()
    with pytest.raises(UserError, match=r"pp_rank_1_\*_optim_states.pt is missing"):
        check_undamaged(tmp_path, str(stage))
    torn.write_bytes(whole)
    check_undamaged(tmp_path, str(stage))
    model.write_bytes(b"")
    with pytest.raises(UserError, match=f"{model.name} is cut short"):
        check_undamaged(tmp_path, str(stage))
    shutil.rmtree(step)
    with pytest.raises(UserError, match="expected DeepSpeed's states"):
        check_undamaged(tmp_path, str(stage))
