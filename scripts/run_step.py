"""Run a step: print its command, put its environment first on PATH, detach it, watch it, stop it.

    python3 scripts/run_step.py run qwen-train --env /envs/qwen_env -- torchrun ...
    python3 scripts/run_step.py status [STEP]
    python3 scripts/run_step.py logs [STEP]
    python3 scripts/run_step.py stop [STEP]

BG=1 detaches the step (it survives the SSH session), DRY_RUN=1 prints its command and does nothing.
A detached step writes logs/STEP.log and logs/STEP.json; the log of the run before is kept as logs/STEP.log.1.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.environment import target_of, unfinished_mark  # noqa: E402
from scripts.settings import advice_on, read_example  # noqa: E402
from scripts.step_process import run_and_wait, supervise  # noqa: E402
from scripts.step_state import StepError, StepState, last_lines  # noqa: E402
from scripts.step_watch import EXCLUSIVE, advice, follow_log, outcome, show_status, stop, typed_settings  # noqa: E402

GRACE_SECONDS = 2


def run(name: str, environment: str | None, command: list[str]) -> int:
    """Run the step in front or, with BG=1, detached. Returns the status to exit with."""
    announcement = f"-----> {name}: {' '.join(map(shlex.quote, command))}"
    if _is_on("DRY_RUN"):
        print(announcement, flush=True)
        return 0
    state = StepState(name)
    if state.has_processes():
        raise _already_running(state)
    variables = step_variables(name, environment)
    background = _is_on("BG")
    lock = _hold(state, background) if background or name.endswith(EXCLUSIVE) else None
    print(announcement, file=sys.stderr, flush=True)
    if background:
        return _detach(state, lock, command, variables)
    # In front this process holds the lock until it ends.
    status, _ = run_and_wait(name, command, variables)
    typed = typed_settings(os.environ.get("MAKEFLAGS", ""), name)
    print(advice(name, status, typed), file=sys.stderr, end="")
    return status


def step_variables(name: str, environment: str | None) -> dict[str, str]:
    """The variables of the step: DIR/bin first on PATH; refused without DIR, since PATH would fall through it."""
    variables = dict(os.environ)
    for switch in ("BG", "DRY_RUN"):  # a step that calls make itself must not detach its own steps
        variables.pop(switch, None)
    for key in read_example():  # empty means not set; an empty HF_ENDPOINT or CUDA_VISIBLE_DEVICES means something else
        if not variables.get(key):
            variables.pop(key, None)
    # Threads of a library that wait must sleep: spinning ones take the cores from whatever else runs on the machine.
    variables.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if environment is None:
        return variables
    folder = Path(environment).absolute()
    target = target_of(folder.name)
    if not (folder / "bin" / "python").exists():
        raise StepError(f"{name}: no environment at {folder}. Create it first: make {target}")
    if unfinished_mark(folder).exists():
        raise StepError(f"{name}: the environment at {folder} is not complete. Continue it: make {target}")
    variables.pop("PYTHONHOME", None)
    variables.update(VIRTUAL_ENV=str(folder), PATH=f"{folder / 'bin'}{os.pathsep}{variables.get('PATH', '')}")
    return variables


def _is_on(switch: str) -> bool:
    value = os.environ.get(switch, "")
    if value not in ("", "0", "1"):
        raise StepError(f"{switch} must be 1 (on) or 0 (off), got: {value}")
    return value == "1"


def _hold(state: StepState, background: bool) -> int:
    """The descriptor of the step's lock. Raises StepError while another run has it, or when logs/ takes no file."""
    try:
        lock = state.acquire(in_front=not background)
    except OSError as error:
        raise StepError(f"{state.name}: logs/ cannot be written ({error.strerror})") from error
    if lock is None:
        raise _already_running(state)
    return lock


def _already_running(state: StepState) -> StepError:
    pid = state.pid_in_front()
    if pid:
        return StepError(f"{state.name} is already running in front (pid {pid}). End it with Ctrl-C in its terminal")
    return StepError(f"{state.name} is already running. Look: make status. End it: make stop STEP={state.name}")


def _detach(state: StepState, lock: int, command: list[str], variables: dict[str, str]) -> int:
    """Start a supervisor in a session of its own and stay long enough to show a step that fails at once."""
    try:
        log = state.new_log()
    except OSError as error:
        raise StepError(f"{state.name}: logs/ cannot be written ({error.strerror})") from error
    supervisor = subprocess.Popen(
        [sys.executable, __file__, "supervise", state.name, "--", *command],
        env={**variables, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        pass_fds=[lock],
    )
    os.close(lock)
    try:
        supervisor.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"{state.name} runs in the background, log: logs/{state.log.name}")
        print(f"  look: make status    read: make logs STEP={state.name}    end: make stop STEP={state.name}")
        return 0
    print("\n".join(last_lines(state.log, 20)))
    print(outcome(state.read()))
    return supervisor.returncode


def _obey(arguments: argparse.Namespace) -> int:
    if arguments.action == "run":
        return run(arguments.name, arguments.env, arguments.command)
    if arguments.action == "supervise":
        return supervise(StepState(arguments.name), arguments.command)
    if arguments.action == "status":
        return show_status(arguments.name)
    if arguments.action == "logs":
        return follow_log(arguments.name, follow=sys.stdout.isatty() and not arguments.print)
    return stop(arguments.name, arguments.timeout, dry_run=_is_on("DRY_RUN"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True, metavar="run|status|logs|stop")
    for action in ("run", "supervise"):
        step = actions.add_parser(action, help="run a command as the step NAME")
        step.add_argument("name")
        step.add_argument("--env", metavar="DIR", help="environment whose bin/ comes first on PATH")
        step.add_argument("command", nargs="+")
    actions.add_parser("status", help="what runs, since when, at what cost").add_argument("name", nargs="?")
    logs = actions.add_parser("logs", help="print a log; on a terminal, follow it")
    logs.add_argument("name", nargs="?")
    logs.add_argument("--print", action="store_true", help="print what is there and return")
    stopping = actions.add_parser("stop", help="send SIGTERM and wait for the end")
    stopping.add_argument("name", nargs="?")
    stopping.add_argument("--timeout", type=float, help="seconds after which it is killed (default: wait on)")
    arguments = parser.parse_args()
    try:
        status = _obey(arguments)
        print(end="", flush=True)  # a descriptor that was closed (>&-) is no stdout to flush
        return status
    except StepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough; what is still in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"error: {advice_on(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
