"""What a person sees while a model trains: a bar on a terminal, plain lines in a log, both on stderr.

10/1547  loss 1.2345  lr 5.00e-05  grad 0.312  7,646 tokens/s  42.4 % of peak  35.4 GiB  eta 2:10:11  cost 0.31
"""

import signal
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.conversation import Sample
    from finetune.trainer import UpdateTrainer

SUPERVISED_MARKS = ("[[", "]]")
GIB = 2**30


@dataclass
class Meter:
    """Speed since it was last read. `peak_flops` is the datasheet rate of all cards together, None on a CPU."""

    flops_per_token: float
    peak_flops: float | None = None
    price_per_hour: float = 0.0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Count an update: its tokens without padding and the seconds from its start to its end."""
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds

    def read(self) -> dict[str, float]:
        """tokens_per_second and, where the card's peak is known, peak_share of the window; then a new window begins."""
        if not self.tokens or not self.seconds:
            return {}
        values = {"tokens_per_second": self.tokens / self.seconds}
        if self.peak_flops:
            values["peak_share"] = values["tokens_per_second"] * self.flops_per_token / self.peak_flops
        self.tokens, self.seconds = 0, 0.0
        return values

    def cost(self, seconds: float) -> float:
        """Price of that many seconds."""
        return seconds / 3600 * self.price_per_hour


def size_text(size: float) -> str:
    """1.5 GiB, or 12 MiB below a tenth of one."""
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.0f} MiB"


def clock(seconds: float) -> str:
    """1:02:03 for 3723 seconds."""
    whole = int(seconds + 0.5)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def progress_line(logs: dict[str, float], step: int, last_step: int, seconds_left: float) -> str:
    """One line of the log; parts that are not known are left out."""
    parts = [f"{step}/{last_step}"]
    for name, form in (
        ("loss", "loss {:.4f}"),
        ("eval_loss", "evaluation loss {:.4f}"),
        ("learning_rate", "lr {:.2e}"),
        ("grad_norm", "grad {:.3f}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
    ):
        if name in logs:
            parts.append(form.format(logs[name]))
    if "peak_share" in logs:
        parts.append(f"{logs['peak_share']:.1%} of peak".replace("%", " %"))
    if "memory_gib" in logs:
        parts.append(f"{logs['memory_gib']:.1f} GiB")
    parts.append(f"eta {clock(seconds_left)}")
    if "cost" in logs:
        parts.append(f"cost {logs['cost']:.2f}")
    return "  ".join(parts)


class ProgressCallback(TrainerCallback):
    """Times updates and prints; it prints on the first rank only."""

    def __init__(self, trainer: "UpdateTrainer", meter: Meter, stream: Any = sys.stderr) -> None:
        self.trainer, self.meter, self.stream = trainer, meter, stream
        self.bar: Any = None
        self._first_step = self._tokens_before = 0
        self._begun = self._update_begun = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar where there is a terminal."""
        self._first_step, self._begun = state.global_step, time.monotonic()
        if state.is_world_process_zero and self.stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=state.max_steps, initial=state.global_step, file=self.stream, dynamic_ncols=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of an update."""
        self._update_begun, self._tokens_before = time.monotonic(), self.trainer.progress.tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock of an update."""
        self.meter.add(self.trainer.progress.tokens - self._tokens_before, time.monotonic() - self._update_begun)
        if self.bar is not None:
            self.bar.update(1)

    def seconds_left(self, state: Any) -> float:
        """Estimated from the mean time of this start's updates, saving and measuring included."""
        done = state.global_step - self._first_step
        return (time.monotonic() - self._begun) / done * (state.max_steps - state.global_step) if done else 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Print the line of a log."""
        if not state.is_world_process_zero or not logs or not ("loss" in logs or "eval_loss" in logs):
            return
        line = progress_line(logs, state.global_step, state.max_steps, self.seconds_left(state))
        try:
            if self.bar is not None:
                self.bar.write(line, file=self.stream)
            else:
                print(line, file=self.stream, flush=True)
        except BrokenPipeError:
            # Whoever read is gone (`| head`, q in less): as after a hang-up, the next update is the last, and saved.
            self.trainer.stop.note(signal.SIGHUP)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


def decoded_sample(tokenizer: "PreTrainedTokenizerBase", sample: "Sample") -> str:
    """The row as the model sees it, control tokens included, with [[ ]] around what is supervised."""
    opening, closing = SUPERVISED_MARKS
    text, run, is_supervised = "", [], False
    for token, label in [*zip(sample.input_ids, sample.labels, strict=True), (None, None)]:
        if token is None or (label != -100) != is_supervised:
            piece = tokenizer.decode(run) if run else ""
            text += f"{opening}{piece}{closing}" if is_supervised and run else piece
            run, is_supervised = [], token is not None and label != -100
        run.append(token)
    return text
