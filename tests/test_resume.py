"""A run that is killed and resumed is the run that was never interrupted, to the bit."""

import random
import signal
import sys
import time

import pytest
import torch
from conftest import command, ended, start
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from tp5 import load_checkpoint

TINY = ("--hidden", "8", "--embedding", "4", "--batch-size", "8",
        "--scalars-every", "7", "--histograms-every", "100", "--model", "gru")  # fmt: skip
SHORT, LONG = (*TINY, "--maxsent", "600", "--epochs", "2"), (*TINY, "--maxsent", "1500", "--epochs", "6")
needs_sigkill = pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")


def finish(*arguments) -> None:
    result = command("tp5.py", *arguments)
    assert result.returncode == 0, result.stderr


def same(left, right) -> bool:
    """Equal to the bit, through dicts."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def content(path) -> dict:
    """A checkpoint without its wall-clock figures."""
    checkpoint = load_checkpoint(path)
    del checkpoint["progress"]["seconds"], checkpoint["progress"]["trained"], checkpoint["interval"]["seconds"]
    return checkpoint


def curves(folder) -> dict:
    """Every point that TensorBoard shows of a run, but for seconds and speed: tag → [(step, value)]."""
    events = EventAccumulator(str(folder), tensor_size_guidance=dict.fromkeys(("scalars", "histograms", "text"), 0))
    events.Reload()
    found = {tag: [(e.step, e.tensor_proto) for e in events.Tensors(tag)] for tag in events.Tags()["tensors"]}
    for tag in ("training/characters_per_second", "summary/characters/s", "summary/seconds"):
        del found[tag]
    return {tag: points for tag, points in found.items() if not tag.startswith("_hparams_")}


def assert_same_run(left, right):
    for name in ("last.pt", "best.pt"):
        assert same(content(left / name), content(right / name)), name
    one, other = curves(left), curves(right)
    assert one.keys() == other.keys() and len(one["loss/train"]) > 10
    for tag in one:
        assert one[tag] == other[tag], tag


def wait_until(true, process) -> None:
    """Poll as fast as can be until `true()` or the process has ended."""
    while process.poll() is None and not true():
        time.sleep(0)


def killed_and_resumed(folder, options, kills: int, seed: int) -> tuple[int, int]:
    """Kill a run `kills` times, every third time while it saves; let it end. How many met it, how many while saving."""
    dice, met, saving = random.Random(seed), 0, 0
    last, beside = folder / "last.pt", folder / "last.tmp"
    for kill in range(kills):
        before = last.stat().st_mtime_ns if last.exists() else 0
        which = ("--resume", folder) if before else ("--run", folder, *options)
        process = start("tp5.py", *which, "--save-every", "0.02")
        if kill % 4:  # after it has trained, or else (every fourth time) while it starts, resumes and opens its files
            wait_until(lambda: last.exists() and last.stat().st_mtime_ns != before, process)  # noqa: B023
            time.sleep(dice.uniform(0, 0.25))
        else:
            time.sleep(dice.uniform(1, 4))
        if kill % 3 == 0:
            wait_until(beside.exists, process)
        process.send_signal(signal.SIGKILL)
        result = ended(process)
        met += result.returncode == -signal.SIGKILL
        saving += beside.exists()
        assert result.returncode in (0, -signal.SIGKILL), result.stderr
    if last.exists():
        before = last.stat().st_mtime_ns
        interrupted = start("tp5.py", "--resume", folder, "--save-every", "0.02")
        wait_until(lambda: last.stat().st_mtime_ns != before, interrupted)
        interrupted.send_signal(signal.SIGINT)  # which saves once more, and stops
        assert ended(interrupted).returncode == 0
        finish("--resume", folder)
    else:
        finish("--run", folder, *options)
    return met, saving


@needs_sigkill
@pytest.mark.parametrize(
    ("options", "kills"), [(SHORT, 3), pytest.param(LONG, 20, marks=pytest.mark.slow)], ids=["3 kills", "20 kills"]
)
def test_killed_and_resumed_is_the_same_run(tmp_path, options, kills):
    finish("--run", tmp_path / "whole", *options, "--save-every", 0)
    met, saving = killed_and_resumed(tmp_path / "killed", options, kills, seed=kills)
    print(f"\n{met} of {kills} kills met the run, {saving} of them while it saved")
    assert met >= kills * 2 / 3 and saving >= kills // 8
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
