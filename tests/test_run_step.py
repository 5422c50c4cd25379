"""The runner of steps: environments, signals and statuses in front; start, status, logs and stop in the background."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from scripts import run_step as run_step_module
from tests.steps import RUN, SAVES, exists, record, run_step, wait_for


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An environment whose `python` tells its name and its arguments."""
    program = tmp_path / "envs" / "qwen_env" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/bash\necho "qwen_env python: $*; VIRTUAL_ENV=$VIRTUAL_ENV"\n')
    program.chmod(0o755)
    return program.parent.parent


def test_the_programs_of_the_environment_come_first(checkout, environment):
    done = run_step(checkout, "run", "qwen-data", "--env", str(environment), "--", "python", "-m", "x", "a b")
    assert done.stdout == f"qwen_env python: -m x a b; VIRTUAL_ENV={environment}\n"
    assert done.stderr == "-----> qwen-data: python -m x 'a b'\n"


@pytest.mark.parametrize(("folder", "target"), [("qwen_env", "qwen-env"), ("llm_env", "baichuan-env")])
def test_a_missing_environment_is_refused_with_the_target_to_run(checkout, tmp_path, folder, target):
    done = run_step(checkout, "run", "qwen-train", "--env", str(tmp_path / folder), "--", "python", "-c", "print(1)")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: qwen-train: no environment at {tmp_path / folder}. Create it first: make {target}\n"


def test_an_unfinished_environment_is_refused(checkout, environment):
    (environment.parent / "qwen_env.unfinished").touch()
    done = run_step(checkout, "run", "qwen-train", "--env", str(environment), "--", "python")
    assert done.returncode == 2 and "is not complete. Continue it: make qwen-env" in done.stderr


def test_in_front_the_status_is_passed_on_and_a_training_step_gets_advice(checkout):
    failed = run_step(checkout, "run", "qwen-train", "--", "bash", "-c", "exit 7")
    assert failed.returncode == 7
    assert (
        "qwen-train ended with status 7. The same command continues where it stopped: make qwen-train" in failed.stderr
    )
    explained = run_step(checkout, "run", "qwen-train", "--", "bash", "-c", "exit 2")
    assert explained.returncode == 2 and "continues" not in explained.stderr
    killed = run_step(checkout, "run", "lint", "--", "bash", "-c", "kill -9 $$")
    assert killed.returncode == 137 and "continues" not in killed.stderr
    missing = run_step(checkout, "run", "lint", "--", "no-such-program")
    assert missing.returncode == 2 and "lint: cannot run no-such-program" in missing.stderr


def test_a_reader_who_has_seen_enough_is_no_error(checkout):
    run_step(checkout, "run", "lint", "--", "true", BG="1")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*RUN, "status"], cwd=checkout, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_advice_repeats_what_was_typed(checkout):
    flags = " --no-print-directory -- BG= OUT=/data\\ disk/中 ARGS=--warmup_steps\\ 1\\ --seed\\ 7"
    failed = run_step(checkout, "run", "qwen-train", "--", "bash", "-c", "exit 7", MAKEFLAGS=flags)
    assert failed.stderr.endswith(": make qwen-train ARGS='--warmup_steps 1 --seed 7' OUT='/data disk/中'\n")


def test_the_advice_leaves_out_what_the_step_does_not_read(checkout):
    flags = " -- LIMIT=5 ARGS=--x\\ 1"
    failed = run_step(checkout, "run", "qwen-train", "--", "bash", "-c", "exit 7", MAKEFLAGS=flags)
    assert failed.stderr.endswith(": make qwen-train ARGS='--x 1'\n")
    failed = run_step(checkout, "run", "qwen-eval-mmcu", "--", "bash", "-c", "exit 7", MAKEFLAGS=flags)
    assert failed.stderr.endswith(": make qwen-eval-mmcu ARGS='--x 1' LIMIT=5\n")


def test_the_advice_shows_no_secret_and_a_dollar_as_it_was_typed(checkout, tmp_path):
    """Through make, which doubles dollars."""
    makefile = tmp_path / "Makefile"
    runner = f"python3 {checkout / 'scripts' / 'run_step.py'}"
    makefile.write_text(f"qwen-download:\n\t@{runner} run qwen-download -- bash -c 'exit 7'\n")
    words = ["qwen-download", "HF_TOKEN=hf_secret", "ARGS=--x a$$b"]
    failed = subprocess.run(["make", "-f", makefile, *words], cwd=checkout, capture_output=True, text=True)
    assert "hf_secret" not in failed.stderr
    typed = failed.stderr.partition(": make qwen-download ")[2].splitlines()[0]
    assert typed == "HF_TOKEN=... ARGS='--x a$$b'"


def test_a_background_step_that_could_not_begin_keeps_no_other_from_being_shown(checkout):
    for program in ("no-such-program", "true"):
        run_step(checkout, "run", program[:4], "--", program, BG="1")
    shown = run_step(checkout, "status")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^no-s +\w+ +pid - +since", shown.stdout, re.MULTILINE) and "\ntrue " in f"\n{shown.stdout}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_front_a_signal_reaches_the_whole_step_once(checkout, number):
    """A child of the step's shell counts its signals; the runner must neither die first nor send them twice."""
    count = f"n=0; trap 'n=$((n+1))' {number.value}; echo ready; for i in 1 2 3 4 5 6 7 8; do sleep 0.1; done; echo $n"
    shell = f"trap : {number.value}; ({count}) & wait; wait; exit 5"
    process = subprocess.Popen(
        [*RUN, "run", "x", "--", "bash", "-c", shell], cwd=checkout, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.read() == "1\n"
    assert process.wait() == 5


def test_values_that_are_empty_do_not_reach_the_step(checkout):
    show = 'echo "${CUDA_VISIBLE_DEVICES-unset} ${HF_ENDPOINT-unset} ${SOURCE-unset} ${BG-unset}"'
    done = run_step(
        checkout, "run", "x", "--", "bash", "-c", show, CUDA_VISIBLE_DEVICES="", HF_ENDPOINT="", SOURCE="hub", BG="0"
    )
    assert done.stdout == "unset unset hub unset\n"


def test_a_background_step_is_started_watched_and_stopped_through_make(checkout, make, environment):
    """make qwen-merge BG=1, status, logs, a second start, stop; the step outlives the make that started it."""
    (environment / "bin" / "python").write_text(f"#!/bin/bash\n{SAVES}\n")
    settings = {"ENVS_DIR": str(environment.parent), "QWEN_MODEL_DIR": "/m", "QWEN_ADAPTER_DIR": "/a"}
    settings |= {"QWEN_MERGED_DIR": "/merged", "PRICE_PER_HOUR": "3600"}
    started = make("qwen-merge", "BG=1", environment=settings)
    assert started.returncode == 0, started.stderr
    assert "qwen-merge runs in the background" in started.stdout
    pid = record(checkout, "qwen-merge")["pid"]
    assert os.getsid(pid) != os.getsid(0)
    assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"

    line = make("status").stdout.splitlines()
    assert re.match(rf"qwen-merge +running +pid {pid} +since .+  0:00:\d\d, \d+\.\d\d yuan", line[0])
    assert line[1] == "  ready"
    again = make("qwen-merge", "BG=1", environment=settings)
    assert again.returncode == 2 and "qwen-merge is already running" in again.stderr
    assert "already running" in make("qwen-merge", environment=settings).stderr
    assert make("logs", "STEP=qwen-merge").stdout == "ready\n"

    stopped = make("stop", "STEP=qwen-merge")
    assert stopped.returncode == 0
    assert re.search(r"qwen-merge stopped after 0:00:\d\d, \d+\.\d\d yuan, exit status 143\.", stopped.stdout)
    assert not exists(pid)
    assert make("logs").stdout.endswith("saving\nsaved\n")
    assert "Not running: qwen-merge stopped" in make("stop", "STEP=qwen-merge").stdout
    assert "Nothing is running" in make("stop").stdout


@pytest.fixture
def patient(checkout):
    """A checkout that waits for a step that fails at once however busy this machine is."""
    program = checkout / "scripts" / "run_step.py"
    text = program.read_text(encoding="utf-8")
    assert "GRACE_SECONDS = 2\n" in text
    program.write_text(text.replace("GRACE_SECONDS = 2\n", "GRACE_SECONDS = 30\n"), encoding="utf-8")
    return checkout


def test_a_background_step_that_fails_at_once_is_shown_as_failed(patient):
    done = run_step(patient, "run", "qwen-train", "--", "bash", "-c", "echo no such model; exit 3", BG="1")
    assert done.returncode == 3
    assert "no such model" in done.stdout and "qwen-train failed after 0:00:00, exit status 3." in done.stdout
    missing = run_step(patient, "run", "qwen-train", "--", "no-such-program", BG="1")
    assert missing.returncode == 2 and "cannot run no-such-program" in missing.stdout
    assert record(patient, "qwen-train")["status"] == "failed"


def test_the_status_of_a_killed_step_says_how_it_ended(patient):
    done = run_step(patient, "run", "qwen-train", "--", "bash", "-c", "kill -9 $$", BG="1")
    ended = "qwen-train failed after 0:00:00, exit status 137. It was killed, perhaps for lack of main memory"
    assert done.returncode == 137 and ended in done.stdout
    assert ended in run_step(patient, "status").stdout


def test_the_log_of_the_run_before_is_kept(checkout):
    for word in ("first", "second"):
        assert run_step(checkout, "run", "x", "--", "echo", word, BG="1").returncode == 0
    assert (checkout / "logs" / "x.log").read_text() == "second\n"
    assert (checkout / "logs" / "x.log.1").read_text() == "first\n"
    assert record(checkout, "x")["status"] == "finished"


def test_stop_kills_only_after_the_timeout_it_was_given_and_takes_those_that_left_the_session(checkout):
    stubborn = (
        "trap '' TERM; setsid bash -c 'trap \"\" TERM; echo $$; exec -a rank sleep 100' & while :; do sleep 0.1; done"
    )
    run_step(checkout, "run", "x", "--", "bash", "-c", stubborn, BG="1")
    wait_for(lambda: (checkout / "logs" / "x.log").read_text().strip())
    left = int((checkout / "logs" / "x.log").read_text())
    done = run_step(checkout, "stop", "x", "--timeout", "0.5")
    assert "it is killed after 0.5 s" in done.stdout and "did not end in 0.5 s: SIGKILL" in done.stdout
    assert "x stopped after" in done.stdout and "exit status 137" in done.stdout
    assert not exists(left) and not exists(record(checkout, "x")["pid"])


def test_a_step_whose_supervisor_was_killed_is_lost_and_can_still_be_stopped(checkout):
    run_step(checkout, "run", "x", "--", "bash", "-c", SAVES, BG="1")
    os.kill(record(checkout, "x")["supervisor"], signal.SIGKILL)
    pid = record(checkout, "x")["pid"]
    wait_for(lambda: " lost " in run_step(checkout, "status").stdout)
    assert exists(pid)
    assert "already running" in run_step(checkout, "run", "x", "--", "true").stderr
    assert "x was lost" in run_step(checkout, "stop").stdout
    assert not exists(pid)
    assert run_step(checkout, "run", "x", "--", "true").returncode == 0


def test_a_lost_step_of_which_nothing_is_left_is_not_running(checkout):
    run_step(checkout, "run", "x", "--", "bash", "-c", SAVES, BG="1")
    os.kill(record(checkout, "x")["supervisor"], signal.SIGKILL)
    os.killpg(record(checkout, "x")["pid"], signal.SIGKILL)
    wait_for(lambda: not exists(record(checkout, "x")["pid"]))
    assert "Nothing is running" in run_step(checkout, "stop").stdout
    assert "Not running: x was lost: its supervisor was killed" in run_step(checkout, "stop", "x").stdout


def test_a_dry_run_of_stop_stops_nothing(make, checkout):
    run_step(checkout, "run", "x", "--", "bash", "-c", SAVES, BG="1")
    pid = record(checkout, "x")["pid"]
    done = make("stop", "STEP=x", "DRY_RUN=1")
    assert (done.returncode, done.stdout) == (0, f"Would send SIGTERM to x (pid {pid}) and wait for its end.\n")
    assert exists(pid) and record(checkout, "x")["status"] == "running"
    assert "x stopped after" in make("stop", "STEP=x").stdout


def test_a_step_may_run_other_steps(checkout):
    inner = ["python3", "scripts/run_step.py", "run", "qwen-eval", "--", "echo", "inner"]
    assert run_step(checkout, "run", "quickstart", "--", *inner).stdout == "inner\n"
    assert run_step(checkout, "run", "qwen-train", "--", *inner).stdout == "inner\n"


@pytest.mark.parametrize("broken", ["", "{", "[]", "{}", '"running"'])
def test_a_broken_record_is_skipped_with_a_remark(checkout, broken):
    run_step(checkout, "run", "y", "--", "echo", BG="1")
    (checkout / "logs" / "x.json").write_text(broken)
    for action in ("status", "stop", "logs"):
        done = run_step(checkout, action)
        assert done.returncode == 0
        assert "Skipped: logs/x.json is no record of a step. Remove it: rm logs/x.json\n" in done.stderr
    assert run_step(checkout, "status").stdout.startswith("y ")
    assert run_step(checkout, "run", "x", "--", "echo", BG="1").returncode == 0
    assert record(checkout, "x")["status"] == "finished"


@pytest.mark.parametrize("name", ["x", "qwen-train"])
def test_logs_that_cannot_be_written_are_named(checkout, name):
    (checkout / "logs").write_text("a file in the way")
    done = run_step(checkout, "run", name, "--", "echo", BG="1")
    assert (done.returncode, done.stderr) == (2, f"error: {name}: logs/ cannot be written (File exists)\n")


def test_an_environment_nobody_may_look_into_is_named(monkeypatch, capsys):
    """As a user of a box whose .env still has root's folders; simulated, since root may look everywhere."""

    def forbidden(*_):
        raise PermissionError(13, "Permission denied", "/root/envs/qwen_env/bin/python")

    monkeypatch.setenv("ENVS_DIR", "/root/envs")
    monkeypatch.setattr(run_step_module, "step_variables", forbidden)
    monkeypatch.setattr("sys.argv", ["run_step.py", "run", "x", "--env", "/root/envs/qwen_env", "--", "true"])
    assert run_step_module.main() == 2
    told = "/root/envs/qwen_env/bin/python: Permission denied. Set ENVS_DIR in .env to a folder you may use"
    assert capsys.readouterr().err == f"error: {told}\n"


def test_logs_follow_until_the_step_ends(checkout):
    run_step(checkout, "run", "x", "--", "bash", "-c", "echo one; sleep 2.5; echo two; exit 4", BG="1")
    command = "import sys; sys.path.insert(0, '.'); from scripts.step_watch import follow_log; follow_log('x', True)"
    done = subprocess.run(["python3", "-c", command], cwd=checkout, capture_output=True, text=True, timeout=60)
    assert done.stdout == "one\ntwo\n"
    assert "x failed after 0:00:02, exit status 4." in done.stderr


def test_steps_that_are_not_known_and_switches_that_are_neither_on_nor_off(checkout):
    assert (
        "no step qwen-trian was started in the background. Known: none yet"
        in run_step(checkout, "logs", "qwen-trian").stderr
    )
    assert "BG must be 1 (on) or 0 (off), got: yes" in run_step(checkout, "run", "x", "--", "true", BG="yes").stderr
    for name in ("x", "y"):
        run_step(checkout, "run", name, "--", "bash", "-c", SAVES, BG="1")
    assert re.search(
        r"several steps are running; say which: make stop STEP=(x\|y|y\|x)", run_step(checkout, "stop").stderr
    )
    for name in ("x", "y"):
        run_step(checkout, "stop", name)
