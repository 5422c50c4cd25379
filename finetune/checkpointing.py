"""transformers' Trainer with checkpoints that are written aside and published whole (finetune.saving)."""

import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer

from finetune import saving
from finetune.checkpoint.manifest import MAX_SHARD_BYTES
from finetune.errors import UserError
from finetune.universal import UNIVERSAL, end_reading, make_universal, repair_universal, show_reading
from finetune.zero import weights_from_zero

if TYPE_CHECKING:
    from finetune.conversation import Sample


@dataclass
class Progress:
    """What a run has done so far, over all its starts; kept in every checkpoint."""

    seconds: float = 0.0
    tokens: int = 0
    supervised_tokens: int = 0
    starts: int = 0
    peak_memory_bytes: int = 0


@dataclass
class RunPlan:
    """What the trainer needs to know beyond transformers' arguments.

    `identity`, `names` and `record` go into every marker; `finish_folder` adds files before a folder is published,
    `finish_final` changes final/ after that.
    """

    rows_per_update: int
    token_budget: int
    identity: dict[str, Any]
    names: dict[str, str] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    save_total_limit: int = 1
    finish_folder: Callable[[Path], None] | None = None
    finish_final: Callable[[Path], None] | None = None
    eval_samples: "list[Sample]" = field(default_factory=list)


def wait_for_ranks() -> None:
    """A barrier. NCCL is told the card: it would guess it, and warn on every rank."""
    dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


class CheckpointingTrainer(Trainer, ABC):
    """The part of the trainer that writes and reads checkpoints; `plan` and `progress` are set by the subclass."""

    plan: RunPlan
    progress: Progress
    _saved: tuple[int, int | None] | None = None  # update of the checkpoint written last, and of the best one

    def _get_output_dir(self, trial: Any) -> str:
        # transformers writes, rotates and looks for the best checkpoint below this folder. It gets the one where
        # things are written aside: only publish() decides what stands in output_dir.
        return str(saving.aside_dir(self.args.output_dir))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write aside on all ranks, then rank 0 publishes and removes what save_total_limit no longer allows."""
        self._refuse_ruined_weights()
        step = self.state.global_step
        if self._saved == (step, self.state.best_global_step):
            return  # an update that was the best one, or due, and is the epoch's last
        written = saving.aside_dir(self.args.output_dir) / f"checkpoint-{step}"
        target = saving.checkpoint_dir(self.args.output_dir, step)
        super()._save_checkpoint(model, trial)
        # By its number: the path that a checkpoint remembers is another one after the folder has been moved.
        number = self.state.best_global_step
        best = str(saving.checkpoint_dir(self.args.output_dir, number)) if number else None
        self.state.best_model_checkpoint = best
        self._barrier()
        if self.args.should_save:
            self.state.save_to_json(str(written / "trainer_state.json"))
            self._publish(written, target)
            saving.rotate(self.args.output_dir, self.plan.save_total_limit, best)
        self._saved = (step, self.state.best_global_step)
        self._barrier()

    def _refuse_ruined_weights(self) -> None:
        """Raise UserError rather than let NaN take the place of an earlier, sound checkpoint.

        All ranks find the same: they have the same weights. Stage 3's parts of them (0 elements here) are not read.
        """
        weights = [one.detach() for one in self.model.parameters() if one.requires_grad and one.numel()]
        # The largest magnitude: unlike a sum of squares it does not overflow, and it copies nothing.
        largest = [torch.linalg.vector_norm(one, math.inf).float().to(self.args.device) for one in weights]
        if largest and not torch.stack(largest).isfinite().all():
            raise UserError(
                f"after update {self.state.global_step} trained weights are NaN or infinite: they are not saved, "
                "earlier checkpoints stay. Lower the learning rate, or look at the rows of the bad updates named above."
            )

    def _publish(self, written: Path, target: Path) -> None:
        if self.plan.finish_folder:
            self.plan.finish_folder(written)
        if self.plan.finish_final and target.name == "final":
            self.plan.finish_final(written)
        marker = {"identity": self.plan.identity, "names": self.plan.names, **self.plan.record}
        marker.update(step=self.state.global_step, progress=asdict(self.progress))
        saving.publish(written, target, marker)

    @property
    def _zero_stage(self) -> int:
        """DeepSpeed's stage, 0 without DeepSpeed."""
        return self.accelerator.state.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else 0

    def _gathers_weights(self) -> bool:
        return self._zero_stage < 3 or self.deepspeed.zero_gather_16bit_weights_on_model_save()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter or model. With stage 3 all ranks gather it, unless DeepSpeed's file forbids that."""
        if not self._gathers_weights():
            Path(output_dir).mkdir(parents=True, exist_ok=True)
        elif self._zero_stage in (1, 2):
            # Every rank has all weights: transformers would copy them into main memory on each of them.
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if hasattr(self.model, "peft_config"):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            self.model.save_pretrained(output_dir, state_dict=state_dict, max_shard_size=MAX_SHARD_BYTES)

    def save_final(self) -> Path:
        """Write output_dir/final, the adapter or model. Called on all ranks."""
        self._refuse_ruined_weights()
        written = saving.aside_dir(self.args.output_dir) / "final"
        target = Path(self.args.output_dir) / "final"
        self.save_model(str(written), _internal_call=True)
        self._barrier()
        if self.args.should_save and not self._gathers_weights():
            weights_from_zero(saving.newest_checkpoint(self.args.output_dir)[0], written, self.model.dtype)
        if self.args.should_save:
            (written / "training_args.bin").unlink(missing_ok=True)
            self._publish(written, target)
            saving.clear_aside(self.args.output_dir)
        self._barrier()
        return target

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Weights of a checkpoint into the model as it stands; peft's own way may change their dtype."""
        model = self.model if model is None else model
        adapter = Path(resume_from_checkpoint) / "adapter_model.safetensors"
        if not adapter.exists():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        found = set_peft_model_state_dict(model, load_file(adapter))
        if found.unexpected_keys:
            raise UserError(f"{adapter} does not fit the model: unexpected {found.unexpected_keys[:3]}.")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """State by way of main memory: a GPU may be full, and transformers 5.17 fails on a CPU with several ranks."""
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint and (Path(checkpoint) / UNIVERSAL).exists():
                self._after_universal(Path(checkpoint))
            if checkpoint:
                self._follow_schedule()
            return
        for name, target in (("optimizer.pt", self.optimizer), ("scheduler.pt", self.lr_scheduler)):
            target.load_state_dict(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))
        self._follow_schedule()

    def _follow_schedule(self) -> None:
        """The next update's rate by this run's schedule: the one loaded is that of the run as it was planned before."""
        scheduler = self.lr_scheduler  # a LambdaLR, as all of finetune.arguments.SCHEDULES
        groups = scheduler.optimizer.param_groups
        for group, peak, share in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = peak * share(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in groups]

    def _after_universal(self, checkpoint: Path) -> None:
        """What DeepSpeed leaves out; then that index is removed."""
        end_reading()
        decays = (self.args.weight_decay, 0.0) if self._zero_stage == 3 else ()
        repair_universal(self.deepspeed.optimizer.optimizer, decays)
        self._barrier()
        if self.args.should_save:
            shutil.rmtree(checkpoint / (checkpoint / UNIVERSAL).read_text())

    def find_checkpoint(self) -> str | None:
        """Newest complete checkpoint, its progress taken over; what a training left half-written is removed."""
        checkpoint, remarks = saving.newest_checkpoint(self.args.output_dir)
        if self.args.should_save:
            saving.clear_aside(self.args.output_dir)
            for remark in remarks:
                self._say(remark)
        self._barrier()
        if checkpoint is None:
            return None
        self._say(f"going on from {checkpoint}")
        marker = saving.read_marker(checkpoint)
        before, now = marker.get("updates_planned"), self.plan.record.get("updates_planned")
        if before != now and before and now:
            self._say(f"note: it was written when {before} updates were planned, now {now} are: the rate follows these")
        self.progress = Progress(**marker.get("progress", {}))
        if self.is_deepspeed_enabled and marker.get("ranks", self.args.world_size) != self.args.world_size:
            return str(self._for_these_ranks(checkpoint, marker["ranks"]))
        return str(checkpoint)

    def _for_these_ranks(self, checkpoint: Path, ranks: int) -> Path:
        """DeepSpeed cuts its states by ranks: a checkpoint of another number gets an index in the universal form.

        That form refers to the checkpoint's files, which the ranks read when the training starts.
        """
        target = saving.aside_dir(self.args.output_dir) / f"universal-{checkpoint.name}"
        if self.args.should_save:
            nbytes = make_universal(checkpoint, target)
            size = f"its states, {nbytes / 1e9:.1f} GB, are dealt out anew"
            self._say(f"it was written by {ranks} ranks, these are {self.args.world_size}: {size}")
            # A rank of stage 3 reads all of them, one of the others its own part.
            show_reading(nbytes / (1 if self._zero_stage == 3 else self.args.world_size))
        self._barrier()
        self.accelerator.state.deepspeed_plugin.deepspeed_config["checkpoint"] = {"load_universal": True}
        return target

    def _barrier(self) -> None:
        if self.args.world_size > 1:
            wait_for_ranks()

    @abstractmethod
    def _say(self, text: str) -> None:
        """Print a line on the first rank."""
