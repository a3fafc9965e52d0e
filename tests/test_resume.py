"""A run that is killed or stopped and resumed is the run that was never interrupted, to the bit; full disks."""

import errno
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT, ended, here, refused, same, start
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

import tp5
from tp5 import load

SIZES = ("--hidden", "8", "--embedding", "4", "--scalars-every", "7", "--histograms-every", "25", "--model", "gru")
CODES = {"KILL": {-9, 9}, "INT": {130}}  # 9 on Windows
STEPS = 29  # of an epoch of the small text


def content(path) -> dict:
    """A checkpoint without its wall-clock figures, and how its command was called."""
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["progress"]["seconds"], checkpoint["options"]["run"], checkpoint["options"]["save_every"]
    return checkpoint


def curves(folder) -> dict:
    """Every point that TensorBoard shows of a run: tag → [(step, value)]."""
    sizes = dict.fromkeys(("scalars", "histograms", "text", "images"), 0)
    events = EventAccumulator(str(folder), tensor_size_guidance=sizes).Reload()
    tags = events.Tags()["tensors"]
    return {tag: [(point.step, point.tensor_proto) for point in events.Tensors(tag)] for tag in tags}


def assert_same_run(one, other) -> None:
    for name in ("last.pt", "best.pt"):
        assert same(content(one / name), content(other / name)), name
    ours, theirs = curves(one), curves(other)
    assert ours.keys() == theirs.keys() and any(len(points) > STEPS for points in ours.values())
    for tag, points in ours.items():
        assert points == theirs[tag], tag


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    found = here("tp5.py", "--run", folder, *small, *SIZES, "--save-every", 0)
    assert found.returncode == 0 and load(folder / "last.pt").progress.step == 2 * STEPS, found.stderr
    return folder


def stopped(where: str, how: str, *arguments) -> subprocess.CompletedProcess:
    """Run tp5.py until it stops itself, see stopped.py."""
    found = ended(start("tests/stopped.py", *where.split(), how, *arguments))
    assert found.returncode in CODES[how] and found.stderr == "", found.stderr
    return found


# What it stops within, and the step of the last.pt that is left. An epoch ends by saving best.pt, then last.pt:
# its saves are, in this order, those of steps 0, 10, 20, 29 (two), 30, 40, 50, 58 (two).
WITHIN = {
    "before its first save": ("os.replace 1 before", None),
    "a step": ("tp5.orthogonal 74 before", 30),  # one of two matrices has moved
    "a save, not yet on the disk": ("os.fsync 7 before", 30),
    "a save, not yet renamed": ("os.replace 7 before", 30),
    "a save, just renamed": ("os.replace 7 after", 40),
    "a save of last.pt after best.pt": ("os.replace 9 after", 50),
    "validation": ("tp5.evaluate 2 before", 50),
    "the look inside": ("tp5.picture 2 before", 58),
}
CTRL_C = ("a step", "a save, not yet on the disk", "validation", "the look inside")
CASES = [(within, "KILL") for within in WITHIN] + [(within, "INT") for within in CTRL_C]
FAST = [("a step", "KILL"), ("the look inside", "INT")]
CASES = [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize(("within", "how"), CASES, ids=lambda value: value)
def test_stopped_and_resumed_is_the_same_run(small, whole, tmp_path, within, how):
    folder, (where, step) = tmp_path / "run", WITHIN[within]
    command = ("tp5.py", "--run", folder, *small, *SIZES)
    found = stopped(where, how, *command[1:])
    assert (folder / "last.pt").exists() == (step is not None)
    if step is not None:
        assert load(folder / "last.pt").progress.step == step
        command = ("tp5.py", "--resume", folder)
    if how == "INT":
        assert f"\n    python {shlex.join(map(str, command))}\n" in found.stdout  # says how to go on
    found = here(*command)
    assert found.returncode == 0 and (step is None or f"going on after step {step}\n" in found.stdout), found.stderr
    assert_same_run(whole, folder)


@pytest.mark.slow
def test_stopped_again_and_again_is_the_same_run(small, whole, tmp_path):
    """While it resumes, too: before it has read its text, and as it opens its file of events."""
    folder = tmp_path / "run"
    stopped("tp5.train_step 25 before", "KILL", "--run", folder, *small, *SIZES)
    for where, how, step in (
        ("tp5.load_corpus 1 before", "KILL", 20),
        ("tp5.event_writer 1 after", "KILL", 20),
        ("tp5.train_step 25 after", "INT", 40),
    ):
        stopped(where, how, "--resume", folder)
        assert load(folder / "last.pt").progress.step == step
    assert here("tp5.py", "--resume", folder).returncode == 0
    assert_same_run(whole, folder)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["KILL", "INT"])
def test_stopped_in_a_comparison_it_is_made_again(runs, tmp_path, how):
    shutil.copytree(runs, tmp_path / "runs")
    made = tmp_path / "runs" / "comparison"
    (made / "comparison.md").unlink()
    stopped("tp5.rewrite_events 1 after", how, "--compare", tmp_path / "runs")
    assert here("tp5.py", "--compare", tmp_path / "runs").returncode == 0
    assert (made / "comparison.md").read_bytes() == (runs / "comparison" / "comparison.md").read_bytes()
    assert curves(made) == curves(runs / "comparison")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_killed_at_random_moments_is_the_same_run(small, whole, tmp_path):
    """Twenty times, whenever that is: before it has begun, within anything, or after its end."""
    dice, folder = random.Random(0), tmp_path / "run"
    command = ("--run", folder, *small, *SIZES, "--save-every", "0.02")
    for _ in range(20):
        process = start("tp5.py", *(("--resume", folder) if (folder / "last.pt").exists() else command))
        try:
            process.wait(dice.uniform(1, 6))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        found = ended(process)
        assert found.returncode in (0, -signal.SIGKILL), found.stderr
    found = here("tp5.py", *(("--resume", folder) if (folder / "last.pt").exists() else command))
    assert found.returncode == 0, found.stderr
    assert_same_run(whole, folder)


# ------------------------------------------------------------------------- what is said to come next


def followed(found) -> None:
    """Give the commands of tp5.py that are said to come next, until none is."""
    while commands := [line.split(maxsplit=1)[1] for line in found.stdout.splitlines() if "    python tp5.py" in line]:
        for command in commands:
            found = here(*shlex.split(command))
            assert found.returncode == 0, (command, found.stderr)


def ctrl_c(function: str, *arguments):
    """Run tp5.py, interrupted as it calls a function for the first time."""
    with patch(function, side_effect=KeyboardInterrupt):
        found = here("tp5.py", *arguments)
    assert found.returncode == 130 and found.stderr == "" and "Next:" in found.stdout
    return found


def test_a_run_stopped_before_its_first_step_goes_on(small, whole, tmp_path):
    followed(ctrl_c("tp5.train_step", "--run", tmp_path / "run", *small, *SIZES))
    assert_same_run(whole, tmp_path / "run")


def test_training_on_stopped_before_its_first_save_says_what_trains_on(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    followed(ctrl_c("tp5.train_step", "--resume", tmp_path / "run", "--epochs", 3))
    assert load(tmp_path / "run" / "last.pt").progress.step == 3 * STEPS


def test_many_models_stopped_in_the_first_go_on_with_all_and_are_compared(small, tmp_path):
    followed(ctrl_c("tp5.train_step", "--run", tmp_path, *small, *SIZES, "--model", "rnn", "gru", "--epochs", 1))
    assert {path.parent.name for path in tmp_path.glob("*/best.pt")} == {"rnn", "gru"}
    assert (tmp_path / "comparison" / "comparison.md").exists()


@pytest.mark.slow
def test_resume_alone_goes_on_with_the_newest_run_and_those_beside_it(small, tmp_path, monkeypatch):
    for module in ("tp5", "textloader"):
        monkeypatch.setattr(f"{module}.RUNS", tmp_path)
    options = (*small, *SIZES, "--epochs", 1)
    assert here("tp5.py", "--run", tmp_path / "older", *options).returncode == 0
    ctrl_c("tp5.train_step", "--run", tmp_path / "newer", *options, "--model", "rnn", "gru")
    found = here("tp5.py", "--resume")
    assert found.returncode == 0 and found.stdout.count("going on after step 0\n") == 2, found.stderr
    assert (tmp_path / "newer" / "comparison" / "comparison.md").exists()


def test_many_models_go_on_with_a_renamed_corpus(small, tmp_path):
    text, renamed = tmp_path / "text.txt", tmp_path / "renamed.txt"
    shutil.copy(small[1], text)
    options = ("--run", tmp_path / "runs", *small[2:], *SIZES, "--epochs", 1, "--model", "rnn", "gru")
    assert here("tp5.py", "--data", text, *options).returncode == 0
    text.rename(renamed)
    found = here("tp5.py", "--resume", tmp_path / "runs", "--data", renamed)
    assert found.returncode == 0 and "| gru " in found.stdout, found.stderr


# ------------------------------------------------------------------------------------ folders of runs


def two_at_once(*arguments) -> tuple:
    """Run tp5.py, and again while the first is about to train: what the first and the second printed."""
    train, found = tp5.train, []

    def second(*of_the_first):
        with patch("tp5.train", train):
            found.append(here("tp5.py", *arguments))
        train(*of_the_first)

    with patch("tp5.train", second):
        return here("tp5.py", *arguments), *found


def test_runs_that_start_in_one_second_have_folders_of_their_own(small, tmp_path, monkeypatch):
    monkeypatch.setattr(tp5, "RUNS", tmp_path)
    monkeypatch.setattr("time.strftime", lambda *_: "2026-01-01_000000")
    first, second = two_at_once(*small, *SIZES, "--epochs", 1)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert len([*tmp_path.glob("*/last.pt")]) == 2


def test_a_folder_that_another_process_writes_is_refused(small, tmp_path):
    first, second = two_at_once("--run", tmp_path / "run", *small, *SIZES, "--epochs", 1)
    assert first.returncode == 0
    refused(second, "another --run")


def test_no_two_files_of_events_begin_in_one_second(tmp_path, monkeypatch):
    """By a clock that moves only while one sleeps: TensorBoard reads them in the order of their seconds."""
    now = 1_000_000_000.0

    def sleep(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr("time.time", lambda: now)
    monkeypatch.setattr("time.sleep", sleep)
    for _ in range(3):
        tp5.event_writer(tmp_path).close()
    with tp5.rewrite_events(tmp_path, "look"), tp5.rewrite_events(tmp_path, "on_text"):
        pass
    seconds = [path.name.split(".")[3] for path in tmp_path.glob("events*")]
    assert len({*seconds}) == len(seconds) == 5


# ----------------------------------------------------------------------------------------- full disks


def test_a_failed_save_keeps_the_last_good_file(small, tmp_path):
    """The fourth, of best.pt after the second epoch, finds no space; it is told in one line."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with patch("os.fsync", side_effect=[None, None, None, full]):
        found = here("tp5.py", "--run", tmp_path, *small, *SIZES, "--save-every", 0)
    refused(found, "No space left")
    assert [load(tmp_path / name).progress.step for name in ("best.pt", "last.pt")] == [STEPS, STEPS]


def test_a_file_that_another_process_reads_is_replaced_a_moment_later(small, tmp_path):
    """As on Windows, where it cannot be replaced until then."""
    replace, refusals = os.replace, iter([PermissionError(), PermissionError()])

    def replacing(source, target):
        for refusal in refusals:
            raise refusal
        replace(source, target)

    with patch("os.replace", replacing):
        found = here("tp5.py", "--run", tmp_path, *small, *SIZES, "--epochs", 1)
    assert found.returncode == 0 and load(tmp_path / "last.pt").progress.step == STEPS


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_limit_on_files_keeps_the_last_good_file(small, tmp_path):
    """No file may grow beyond what the first, smaller last.pt takes: the second, with moments, fails."""
    off = ("--histograms-every", "0", "--scalars-every", "0")
    assert here("tp5.py", "--run", tmp_path / "whole", *small, "--epochs", 1).returncode == 0
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (int(sys.argv[1]),));"
        "sys.argv = sys.argv[2:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]);"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    size = (tmp_path / "whole" / "last.pt").stat().st_size - 1000
    command = [sys.executable, "-c", code, str(size), str(ROOT / "tp5.py"), "--run", str(tmp_path / "run")]
    refused(subprocess.run([*command, *small, *off], capture_output=True, encoding="utf-8"), "File too large")
    assert load(tmp_path / "run" / "last.pt").progress.step == 0


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_good_file(small, tmp_path):
    """A file system of 300 kB, where this user may mount one: its events alone fill it."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    try:
        often = ("--scalars-every", 1, "--histograms-every", 1, "--save-every", 1e-9)
        refused(here("tp5.py", "--run", tmp_path / "run", *small, *SIZES, *often, "--epochs", 500), "No space left")
        assert load(tmp_path / "run" / "last.pt").progress.step > 0
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
