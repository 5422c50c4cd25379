"""What UpdateTrainer hangs into transformers' loop: the arguments' word on when to log and save, and a stop's end."""

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl

from finetune.signals import silence_lost_output

if TYPE_CHECKING:
    from finetune.trainer import UpdateTrainer


class ObeyArguments(TrainerCallback):
    """How often to log, evaluate and save is what the arguments say now, not what a checkpoint remembers."""

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Called when the checkpoint's state has been read."""
        state.compute_steps(args, state.max_steps)


class ObeyStop(TrainerCallback):
    """After an update in which some rank received a stop signal: log, save and stop, on all ranks."""

    def __init__(self, trainer: "UpdateTrainer") -> None:
        self.trainer = trainer

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """transformers ends the epoch after a stop too: what there is to save was saved at the update's end."""
        if self.trainer.stop_signal:
            control.should_evaluate = control.should_save = False
        return control

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Called when the update is done, after transformers has decided what to do at this step."""
        self.trainer.mark_time()
        control.should_log |= state.global_step >= state.max_steps  # what came after the last full interval
        if self.trainer.stop_signal:
            silence_lost_output()  # again: the reader of a pipe may have got the same signal, and left since
            control.should_log = control.should_training_stop = True
            control.should_evaluate = False
            control.should_save = args.save_strategy != "no"
        return control
