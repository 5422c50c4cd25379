"""transformers' Trainer where one training step is one optimiser update over padding-free micro-batches.

What is added: the rows of an update come from finetune.batching.plan_epoch on every rank alike; the loss is the mean
over the supervised tokens of the whole update over all ranks, as a padded batch of the same rows would give; a
micro-batch that does not fit is cut and repeated; gradients of an update whose loss or gradient norm is no number are
dropped, and several such updates in a row end the run with the rows that caused them; checkpoints are published whole;
a stop signal is obeyed at the end of an update, on all ranks at the same one.

Gradients are added up here, once an update, and not by DistributedDataParallel's hooks: so a rank that runs out of
memory may cut its own micro-batches without the others waiting inside a collective for it. DeepSpeed reduces by
itself and needs equal counts: there a lack of memory ends the run with the budget to try.
"""

import gc
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from finetune.batching import collate, plan_epoch
from finetune.callbacks import ObeyArguments, ObeyStop
from finetune.checkpointing import CheckpointingTrainer, Progress, RunPlan
from finetune.errors import UserError
from finetune.gradients import Gradients
from finetune.progress import Meter
from finetune.signals import StopRequest
from finetune.updates import RankUpdate, UpdateDataset, count_supervised, cut_in_pieces, update_loader

if TYPE_CHECKING:
    from finetune.conversation import Sample

MAX_BAD_UPDATES = 3
SMALLEST_BUDGET = 16
MAX_ROWS_NAMED = 20
ROWS_DEALT_OUT = 512  # of an evaluation at a time: dealing out takes more than twice as long for twice as many


class UpdateTrainer(CheckpointingTrainer):
    """Trains `model`, whose forward returns the SUM of token losses (finetune.loss), on encoded rows.

    `args.gradient_accumulation_steps` must be 1: micro-batches are an update's inner matter.
    Raises UserError when losses stay NaN, infinite or exactly zero, or gradients NaN or infinite, naming the rows.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        samples: "Sequence[Sample]",
        plan: RunPlan,
        meter: Meter | None = None,
        **kwargs: Any,
    ) -> None:
        if args.gradient_accumulation_steps != 1:
            raise ValueError("UpdateTrainer counts whole updates: gradient_accumulation_steps must be 1")
        self.plan = plan
        self.meter = meter or Meter(flops_per_token=0.0)
        self.progress = Progress()
        self._seconds_before, self._started = 0.0, time.monotonic()
        self.stop = StopRequest()
        self.stop_signal = 0
        self.token_budget = plan.token_budget
        self.update_losses: list[tuple[int, float]] = []
        self._bad_updates = 0
        self._logged_sums = [0.0, 0]
        self._ahead: tuple[Sequence[int] | None, dict[str, Any] | None] = (None, None)
        dataset = UpdateDataset(
            samples, plan.rows_per_update, plan.token_budget, args.seed, args.process_index, args.world_size
        )
        super().__init__(
            model=model, args=args, train_dataset=dataset, eval_dataset=plan.eval_samples or None, **kwargs
        )
        self.add_callback(ObeyArguments())
        self.add_callback(ObeyStop(self))
        self.gradients = Gradients(self.model, args.world_size)
        if not self.is_deepspeed_enabled:
            self.model.zero_grad = self.gradients.forget
            self.gradients.share_parameters()
            # Not wrapped: DistributedDataParallel would hold a second copy of all gradients.
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """Updates of this rank. accelerate does not prepare it: the plan has dealt the rows to the ranks already."""
        return update_loader(self.train_dataset)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Rows of an epoch."""
        return len(self.train_dataset.samples)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Rows of an update over all ranks."""
        return self.plan.rows_per_update

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """The next update; its supervised tokens are counted in the plan, not here."""
        update = next(epoch_iterator, None)
        return ([] if update is None else [update]), None

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted here: finetune.progress counts by tokens."""
        return 0

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.train_dataset.epoch = kwargs["epoch"]
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:  # resumed behind the last update: transformers would look at max_steps after one more
            self.control.should_training_stop = True

    # ---- one update ----

    def training_step(self, model: nn.Module, inputs: RankUpdate, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one whole update. Returns this rank's share of its mean loss, times the ranks."""
        if not model.training:
            model.train()
        update = inputs
        scale, ranks = 1 / max(1, update.num_supervised), self.args.world_size
        if self.is_deepspeed_enabled:
            loss_sum = self._run_with_deepspeed(model, update, scale * ranks)  # it averages over them
        else:
            loss_sum = self._run_micro_batches(model, update, scale)
            self.gradients.add_up()
            self.gradients.clip(self.accelerator, self.args.max_grad_norm)
        # Until here nothing has waited for the device. What can be done while it computes is done before that.
        self._collate_ahead(update.next_rows)
        loss, norm = self._agree(loss_sum, update)
        if not self.is_deepspeed_enabled and not (math.isfinite(loss) and math.isfinite(norm)):
            self.gradients.drop()
        self._account(update, loss, norm)
        return loss_sum.detach() * scale * ranks

    def _loss_of(self, model: nn.Module, rows: Sequence[int]) -> Tensor:
        """Sum of the token losses of rows run side by side, no padding. No rows: a zero with a graph."""
        ahead_rows, batch = self._ahead
        if ahead_rows != rows:
            batch = self._collated(rows)
        self._ahead = (None, None)
        return model(**self._prepare_input(batch)).loss

    def _collated(self, rows: Sequence[int]) -> dict[str, Any]:
        return collate([self.train_dataset.samples[row] for row in rows])

    def _collate_ahead(self, rows: Sequence[int] | None) -> None:
        """The first micro-batch of the next update, where the epoch has one."""
        self._ahead = (None, None) if rows is None else (rows, self._collated(rows))

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(model) if self.is_deepspeed_enabled else self.gradients.norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(model, grad_norm) if self.is_deepspeed_enabled else self.gradients.norm

    def _run_micro_batches(self, model: nn.Module, update: RankUpdate, scale: float) -> Tensor:
        """All micro-batches of this rank. What does not fit is cut to half the budget and repeated."""
        lengths = self.train_dataset.lengths
        pieces = [part for rows in update.micro_batches for part in cut_in_pieces(rows, lengths, self.token_budget)]
        loss_sum, done = torch.zeros((), device=self.args.device), 0
        while done < len(pieces):
            try:
                loss_sum = loss_sum + self._forward_backward(model, pieces[done], scale)
                done += 1
                continue
            except torch.OutOfMemoryError:
                in_backward = self._in_backward
            # Outside the handler: the exception would keep the failed pass's tensors alive.
            self._lower_budget(pieces[done])
            if in_backward and done:
                self._say("its gradients are incomplete: this update starts again", on_every_rank=True)
            if in_backward:
                # A backward pass cut short has added to some gradients and not to others.
                model.zero_grad()
                loss_sum, done, rest = torch.zeros_like(loss_sum), 0, [row for piece in pieces for row in piece]
                pieces = cut_in_pieces(rest, lengths, self.token_budget)
            else:
                rest = [row for piece in pieces[done:] for row in piece]
                pieces[done:] = cut_in_pieces(rest, lengths, self.token_budget)
        return loss_sum

    def _forward_backward(self, model: nn.Module, rows: Sequence[int], scale: float) -> Tensor:
        self._in_backward = False
        loss = self._loss_of(model, rows)
        self._in_backward = True
        self.accelerator.backward(loss * scale)
        return loss.detach()

    def _lower_budget(self, rows: Sequence[int]) -> None:
        """Halve the token budget of this and all later updates. Raises UserError when a single row does not fit."""
        lengths = self.train_dataset.lengths
        tokens = sum(lengths[row] for row in rows)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(rows) <= 1:
            line = self.train_dataset.samples[rows[0]].row if rows else 0
            raise UserError(
                f"out of GPU memory with a single row of {tokens} tokens (line {line}). Lower max_seq_length or "
                "lora_rank, set gradient_checkpointing to true, or take a larger card."
            )
        self.token_budget = max(SMALLEST_BUDGET, min(self.token_budget, tokens) // 2)
        cut = f"cut to at most {self.token_budget} from here on, nothing is lost"
        self._say(f"out of GPU memory with {tokens} tokens: {cut}", on_every_rank=True)

    def _run_with_deepspeed(self, model: nn.Module, update: RankUpdate, scale: float) -> Tensor:
        """All micro-batches; DeepSpeed reduces and steps at the last one, which is the boundary."""
        loss_sum = torch.zeros((), device=self.args.device)
        try:
            for index, rows in enumerate(update.micro_batches):
                loss = self._loss_of(model, rows)
                loss_sum = loss_sum + loss.detach()
                is_last = index == len(update.micro_batches) - 1
                if is_last:
                    self._refuse_bad_loss_before_step(loss_sum, update)
                self.accelerator.gradient_state._set_sync_gradients(is_last)
                # An update's loss is normalised already: DeepSpeed must not divide it by accumulation steps.
                self.accelerator.backward(loss * scale, scale_wrt_gas=False)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of GPU memory with a budget of {self.token_budget} tokens. Start again with "
                f"--tokens_per_micro_batch {max(SMALLEST_BUDGET, self.token_budget // 2)}: training goes on from the "
                "newest checkpoint."
            ) from error
        return loss_sum

    def _refuse_bad_loss_before_step(self, loss_sum: Tensor, update: RankUpdate) -> None:
        """DeepSpeed steps inside backward, so a loss that is no number must be found before it ruins the weights."""
        total = self._sum_over_ranks(loss_sum.double().reshape(1))[0].item()
        if not math.isfinite(total):
            raise UserError(self._bad_update_message(update, total, 1))

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.args.world_size > 1:
            dist.all_reduce(values)
        return values

    def _agree(self, loss_sum: Tensor, update: RankUpdate) -> tuple[float, float]:
        """Mean loss of the update over all ranks, their gradients' norm, and the stop signal that any of them got."""
        stops = [float(self.stop.signal == number) for number in (15, 2)]
        values = torch.tensor([0.0, 0.0, *stops], dtype=torch.float64, device=self.args.device)
        values[0] = loss_sum.detach()
        if self._judges_gradients:
            values[1] = self.gradients.norm
        total, norms, terminated, interrupted = self._sum_over_ranks(values).tolist()
        if terminated or interrupted:
            self.stop_signal = 15 if terminated else 2
        self._logged_sums[0] += total
        self._logged_sums[1] += update.num_supervised
        return total / max(1, update.num_supervised), norms / self.args.world_size

    @property
    def _judges_gradients(self) -> bool:
        """DeepSpeed has its own ways; for a GradScaler infinite gradients are how it finds its scale: it skips them.

        Until the scale is below 1: then it is not the scale.
        """
        scaler = self.accelerator.scaler
        return not self.is_deepspeed_enabled and (scaler is None or scaler.get_scale() < 1)

    def _account(self, update: RankUpdate, loss: float, norm: float) -> None:
        self.update_losses.append((self.state.global_step + 1, loss))
        self.progress.tokens += update.num_tokens
        self.progress.supervised_tokens += update.num_supervised
        is_bad = not (math.isfinite(loss) and math.isfinite(norm)) or loss == 0.0
        self._bad_updates = self._bad_updates + 1 if is_bad else 0
        if is_bad:
            message = self._bad_update_message(update, loss, self._bad_updates, norm)
            if self._bad_updates >= MAX_BAD_UPDATES:
                raise UserError(message)
            self._say(message)

    def _bad_update_message(self, update: RankUpdate, loss: float, count: int, norm: float = 0.0) -> str:
        lines = sorted(self.train_dataset.samples[row].row for row in update.rows)
        shown = ", ".join(map(str, lines[:MAX_ROWS_NAMED])) + (", ..." if len(lines) > MAX_ROWS_NAMED else "")
        is_gradient = math.isfinite(loss) and not math.isfinite(norm)
        why = f"gradient norm {norm}" if is_gradient else f"loss {loss}"
        why = why if update.num_supervised else "no supervised token"
        return (
            f"{count} update{'s' if count > 1 else ''} in a row with {why}; the last one, update "
            f"{self.state.global_step + 1}, had the training rows of lines {shown}. Look at these rows "
            "(`make qwen-data`), or lower the learning rate."
        )

    def _say(self, text: str, on_every_rank: bool = False) -> None:
        if self.args.should_save or on_every_rank:
            try:
                print(text, file=sys.stderr, flush=True)
            except BrokenPipeError:  # whoever read is gone
                self.stop.note(signal.SIGHUP)

    def _refuse_ruined_weights(self) -> None:
        super()._refuse_ruined_weights()
        if not self.is_deepspeed_enabled and self.gradients.ranks_differ():
            text = "its ranks had different weights, which one card that computes wrongly would explain"
            self._say(f"note: update {self.state.global_step}: {text}. All go on with the first one's")
            self.gradients.share_parameters()

    # ---- logs and evaluation ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs with the loss replaced by the exact mean over the supervised tokens since the last log."""
        if "loss" in logs and self._logged_sums[1]:
            logs["loss"] = self._logged_sums[0] / self._logged_sums[1]
            self._logged_sums = [0.0, 0]
            self.mark_time()
            logs.update(self.meter.read())
            if torch.cuda.is_available():
                logs["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if self.meter.price_per_hour:
                logs["cost"] = self.meter.cost(self.progress.seconds)
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Mean loss over the supervised tokens of the evaluation rows, padding-free, shared among the ranks."""
        samples = eval_dataset or self.eval_dataset
        loss_sum, num_supervised = self._evaluation_sums(samples)
        metrics = {f"{metric_key_prefix}_loss": loss_sum / max(1, num_supervised)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _evaluation_sums(self, samples: "Sequence[Sample]") -> tuple[float, int]:
        lengths = [len(sample.input_ids) for sample in samples]
        # Dealt out by the budget that all ranks share, cut by this rank's own.
        plan = plan_epoch(lengths, ROWS_DEALT_OUT, self.args.world_size, self.plan.token_budget, 0, 0)
        parts = [rows for update in plan for rows in update.micro_batches[self.args.process_index]]
        pieces = [piece for rows in parts for piece in cut_in_pieces(rows, lengths, self.token_budget)]
        total = torch.zeros(1, dtype=torch.float64, device=self.args.device)
        self.model.eval()
        model = self.model_wrapped if self.is_deepspeed_enabled else self.model
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            for rows in pieces:
                batch = self._prepare_input(collate([samples[row] for row in rows]))
                total += model(**batch).loss.double()
        self.model.train()
        return self._sum_over_ranks(total).item(), sum(map(count_supervised, samples))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.save_strategy != "no":
            self.control.should_save = True
        return is_best

    # ---- the whole run ----

    def run(self) -> int:
        """Train from the newest complete checkpoint, or from the start. Returns the stop signal obeyed, 0 if none."""
        checkpoint = self.find_checkpoint()
        self.progress.starts += 1
        self._seconds_before, self._started = self.progress.seconds, time.monotonic()
        with self.stop.listening():
            self.train(resume_from_checkpoint=checkpoint)
        self._share_peak()
        return self.stop_signal

    def _share_peak(self) -> None:
        """The peak of GPU memory of that rank which took most."""
        self.mark_time()
        if self.args.world_size > 1:
            peak = torch.tensor(self.progress.peak_memory_bytes, device=self.args.device)
            dist.all_reduce(peak, dist.ReduceOp.MAX)
            self.progress.peak_memory_bytes = int(peak)

    def mark_time(self) -> None:
        """Bring progress.seconds and the peak of GPU memory up to date."""
        self.progress.seconds = self._seconds_before + time.monotonic() - self._started
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
            self.progress.peak_memory_bytes = max(self.progress.peak_memory_bytes, peak)
