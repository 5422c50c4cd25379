"""A tiny training of all parameters through make, and the processes it consists of."""

import re
import socket
import subprocess
import time
from pathlib import Path

UPDATES, WARMUP, RATE = 12, 2, 1e-3
# 44 rows, 16 an update: the last update of an epoch has 12.
FLAGS = (
    f"--max_steps {UPDATES} --num_train_epochs 4 --learning_rate {RATE} --warmup_steps {WARMUP} --logging_steps 1"
    " --save_steps 3 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --tokens_per_micro_batch 700"
    " --report_to none --weight_decay 0.1"
)


class Step:
    """make baichuan-train in its own process group, its log in a file."""

    def __init__(self, output_dir: Path, settings: dict[str, str], stage: str, flags: str = FLAGS, **more) -> None:
        prefix = more.pop("prefix", [])
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        variables = {
            **settings,
            "BAICHUAN_OUTPUT_DIR": str(output_dir),
            "DEEPSPEED_STAGE": stage,
            "MASTER_PORT": str(self.port),
            **more,
        }
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        number = len(list(output_dir.parent.glob("log-*")))
        self.log = output_dir.parent / f"log-{number}.txt"
        with open(self.log, "w") as log:
            command = [*prefix, "make", "baichuan-train", f"ARGS={flags}"]
            options = {"stdin": subprocess.DEVNULL, "start_new_session": True}
            self.process = subprocess.Popen(
                command, cwd=settings["CHECKOUT"], env=variables, stdout=log, stderr=log, **options
            )

    def text(self) -> str:
        return self.log.read_text()

    def wait_for_update(self, number: int) -> None:
        self._wait(lambda: f"\n{number}/{UPDATES}  loss" in self.text())

    def _wait(self, condition) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.01)

    def ranks(self) -> list[int]:
        """Processes that train here, found by the port they meet at."""
        return [process for process in processes_with(f"MASTER_PORT={self.port}") if is_training(process)]

    def status(self) -> int:
        """make's own status is 2 for any failure: the step's is what it prints."""
        code = self.process.wait(timeout=240)
        found = re.findall(r"make: \*\*\* \[.*\] Error (\d+)", self.text())
        return int(found[-1]) if found else code


def processes_with(variable: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if variable.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def is_training(process: int) -> bool:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        return b"LOCAL_RANK=" in Path(f"/proc/{process}/environ").read_bytes() and b"llm_code.train" in words
    except OSError:
        return False
