"""Run DeepSpeed's launcher on every machine of a hostfile, over ssh, as if it were one program.

    python -m finetune.hosts --hostfile hosts --master_port 65224 -- --no_local_rank --module llm_code.train ...
    python -m finetune.hosts --count hosts      # how many cards its machines have

A line of the file is `NAME slots=CARDS`; the first machine is where the ranks meet. What stands behind `--` goes to
`deepspeed`. The machines must let each other in by ssh without a password, and have this repository, the environment
and the output folder at the same places (a shared file system). DeepSpeed's own way, by pdsh, ends ranks with pkill:
none could save. Here each machine runs finetune.launch, which listens to its input: SIGTERM and SIGINT reach every
rank, and a connection that breaks off stops them too, saved. Exit status as in finetune.launch. Standard library only.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from finetune.errors import UserError, run_main
from finetune.launch import KILLED, OTHER_RANKS_SECONDS, STOPPED, die_with_parent

HOST_LINE = re.compile(r"(\S+)\s+slots=(\d+)")
# Of this machine's environment the others get what matters to the ranks; tokens and keys are not among it.
HANDED_ON = re.compile(
    r"PATH|PYTHONPATH|PRICE_PER_HOUR|CUDA_HOME|LD_LIBRARY_PATH"
    r"|(NCCL|GLOO|OMP|HF_HUB|TRANSFORMERS|DS|TORCH|PYTORCH|TOKENIZERS)_\w+"
)


def read_hostfile(path: str | Path) -> dict[str, int]:
    """{machine: cards} in the file's order. Raises UserError for a line of another form, a repeated or no machine."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"HOSTFILE {path}: {error.strerror}. Name a file of lines like: worker-1 slots=8") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = HOST_LINE.fullmatch(line.strip())
        if match is None or match[1] in hosts or not int(match[2]):
            raise UserError(f"{path}:{number}: expected a new machine as NAME slots=CARDS, found: {line}")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"{path} names no machine. A line is: worker-1 slots=8")
    return hosts


def remote_command(rank: int, first_host: str, flags: argparse.Namespace) -> str:
    """The line that a machine's shell runs."""
    handed_on = [f"{key}={value}" for key, value in sorted(os.environ.items()) if HANDED_ON.fullmatch(key)]
    launch = ["python", "-m", "finetune.launch", "--until_eof", "deepspeed", "--quiet", "--no_ssh"]
    launch += [f"--node_rank={rank}", f"--hostfile={Path(flags.hostfile).absolute()}"]
    launch += [f"--master_addr={first_host}", f"--master_port={flags.master_port}", *flags.command]
    return f"cd {shlex.quote(os.getcwd())} && exec env {shlex.join([*handed_on, *launch])}"


def tell(machines: dict[str, subprocess.Popen], word: str) -> None:
    """Send a word to the machines that still run; one whose connection is gone has stopped by itself."""
    for machine in machines.values():
        try:
            machine.stdin.write(f"{word}\n")
            machine.stdin.flush()
        except (BrokenPipeError, ValueError):
            continue


def wait_for_all(machines: dict[str, subprocess.Popen]) -> int:
    """Status of the whole run. Once a machine has failed, the others are not waited for much longer."""
    deadline = None
    while any(machine.poll() is None for machine in machines.values()):
        time.sleep(0.2)
        failed = {name: m.poll() for name, m in machines.items() if m.poll() not in (None, 0, *STOPPED)}
        if failed and deadline is None:
            name, status = next(iter(failed.items()))
            print(f"{name} ended with status {status}: the other machines are ended", file=sys.stderr, flush=True)
            deadline = time.monotonic() + (0 if status == KILLED else OTHER_RANKS_SECONDS)
        if deadline is not None and time.monotonic() > deadline:
            tell(machines, "KILL")
            deadline = float("inf")
    statuses = [machine.returncode for machine in machines.values()]
    worst = [status for status in statuses if status not in (0, *STOPPED)] or [s for s in statuses if s]
    return worst[0] if worst else 0


def run_on_hosts(flags: argparse.Namespace) -> int:
    """Start every machine, pass signals on, wait."""
    hosts = read_hostfile(flags.hostfile)
    first = next(iter(hosts))
    machines = {
        name: subprocess.Popen(
            ["ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", name, remote_command(rank, first, flags)],
            stdin=subprocess.PIPE,
            text=True,
            # A signal to this program's group must not cut the connection: the machines are told in words.
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        for rank, name in enumerate(hosts)
    }

    def pass_on(number: int, frame: FrameType | None) -> None:
        tell(machines, "INT" if number == signal.SIGINT else "TERM")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    return wait_for_all(machines)


def main() -> int:
    """Command line."""
    if sys.argv[1:2] == ["--count"]:
        print(sum(read_hostfile(" ".join(sys.argv[2:])).values()))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hostfile", required=True, help="file of the machines")
    parser.add_argument("--master_port", type=int, default=65224, help="port on the first machine (%(default)s)")
    parser.add_argument("command", nargs="+", help="what deepspeed gets")
    return run_on_hosts(parser.parse_args())


if __name__ == "__main__":
    run_main(main)
