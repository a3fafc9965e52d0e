"""A run that is killed and resumed is the run that was never interrupted, to the bit."""

import random
import signal
import sys
import time

import pytest
import torch
from conftest import command, ended, here, same, start
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from tp5 import load

MODEL = ("--hidden", "8", "--embedding", "4", "--batch-size", "8", "--scalars-every", "7", "--model", "gru")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")


def content(path) -> dict:
    """A checkpoint without its wall-clock figures, and how its command was called."""
    checkpoint, options = torch.load(path, weights_only=True), vars(load(path).options)
    del checkpoint["progress"]["seconds"], checkpoint["arguments"], options["run"], options["save_every"]
    return checkpoint | {"options": options}


def curves(folder) -> dict:
    """Every point that TensorBoard shows of a run, but for its speed: tag → [(step, value)]."""
    sizes = dict.fromkeys(("scalars", "histograms", "text", "images"), 0)
    events = EventAccumulator(str(folder), tensor_size_guidance=sizes).Reload()
    tags = [tag for tag in events.Tags()["tensors"] if "characters_per_second" not in tag]
    return {tag: [(point.step, point.tensor_proto) for point in events.Tensors(tag)] for tag in tags}


def wait_until(true, process) -> None:
    """Poll as fast as can be until `true()` or the process has ended."""
    while process.poll() is None and not true():
        time.sleep(0)


def killed(folder, options, kills: int, seed: int) -> tuple[int, int]:
    """Kill a run `kills` times, every third time while it saves: how many met it, how many while saving."""
    dice, met, saving = random.Random(seed), 0, 0
    last, half = folder / "last.pt", folder / "last.pt.half"
    for kill in range(1, kills + 1):
        before = last.stat().st_mtime_ns if last.exists() else 0
        which = ("--resume", folder) if before else ("--run", folder, *options, "--save-every", "0.02")
        process = start("tp5.py", *which)
        if kill % 4:  # once it has saved, within an epoch
            wait_until(lambda: last.exists() and last.stat().st_mtime_ns != before, process)  # noqa: B023
            time.sleep(dice.uniform(0, 0.25))
        else:  # while it starts, resumes and opens its files
            time.sleep(dice.uniform(1, 4))
        if kill % 3 == 0:
            wait_until(half.exists, process)
        process.send_signal(signal.SIGKILL)
        found = ended(process)
        met += found.returncode == -signal.SIGKILL
        saving += half.exists()
        assert found.returncode in (0, -signal.SIGKILL), found.stderr
    return met, saving


def interrupted(folder) -> None:
    """Let a run go on and stop it by Ctrl-C after it has saved within an epoch: it says how to go on."""
    last, process = folder / "last.pt", start("tp5.py", "--resume", folder)
    for _ in range(2):  # the first may be that of a run that begins anew
        before = last.stat().st_mtime_ns
        wait_until(lambda: last.stat().st_mtime_ns != before, process)  # noqa: B023
    process.send_signal(signal.SIGINT)
    found = ended(process)
    assert found.returncode == 130 and found.stderr == "", found.stderr
    assert f"--resume {folder}\n" in found.stdout


@pytest.mark.parametrize(
    ("kills", "epochs"), [(1, 3), pytest.param(20, 12, marks=pytest.mark.slow)], ids=["1 kill", "20 kills"]
)
def test_killed_and_resumed_is_the_same_run(small, tmp_path, kills, epochs):
    """Killed, then stopped by Ctrl-C, then let to its end."""
    options = (*small, *MODEL, "--epochs", epochs)
    assert here("tp5.py", "--run", tmp_path / "whole", *options, "--save-every", 0).returncode == 0
    met, saving = killed(tmp_path / "killed", options, kills, seed=kills)
    assert met >= kills * 2 / 3 and saving >= kills // 8
    step = load(tmp_path / "killed" / "last.pt").progress.step
    interrupted(tmp_path / "killed")
    stopped = load(tmp_path / "killed" / "last.pt").progress
    assert step < stopped.step < load(tmp_path / "whole" / "last.pt").progress.step
    found = here("tp5.py", "--resume", tmp_path / "killed")
    assert found.returncode == 0 and "going on" in found.stdout, found.stderr
    for name in ("last.pt", "best.pt"):
        assert same(content(tmp_path / "whole" / name), content(tmp_path / "killed" / name)), name
    one, other = curves(tmp_path / "whole"), curves(tmp_path / "killed")
    assert one.keys() == other.keys() and any(len(points) > 10 for points in one.values())
    for tag, points in one.items():
        assert points == other[tag], tag


@pytest.mark.slow
def test_a_run_without_a_checkpoint_yet_starts_anew(small, tmp_path):
    process = start("tp5.py", "--run", tmp_path / "run", *small, *MODEL)
    wait_until((tmp_path / "run").exists, process)
    process.send_signal(signal.SIGKILL)
    assert ended(process).returncode == -signal.SIGKILL
    found = command("tp5.py", "--run", tmp_path / "run", *small, *MODEL)
    assert found.returncode == 0 or "--resume" in found.stderr
