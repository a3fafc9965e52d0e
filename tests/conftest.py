"""What the tests share: the project on the import path, small runs, and the real command line."""

import hashlib
import io
import os
import random
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, settings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import generate  # noqa: E402
import textloader  # noqa: E402
import tp5  # noqa: E402

# The same examples on every machine, however slow it is.
settings.register_profile("lab", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lab")
torch.set_num_threads(1)  # the fastest for models this small, on a machine that others use too
os.environ["COLUMNS"] = "80"
SAMPLES = ("greedy", "sampled", "cooler", "nucleus", "beam", "nucleus beam")  # of training and comparison
TORCH_CELLS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


def start(script: str, *arguments, cwd=None, **environment: str) -> subprocess.Popen:
    """Start a script as a user would, with these variables in its environment."""
    # The scripts choose UTF-8 themselves.
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=environment,
        cwd=cwd,
    )


def ended(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait for a process that was started; what it printed, and its exit code."""
    output, errors = process.communicate(timeout=600)  # one that hangs
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def command(script: str, *arguments, cwd=None, **environment: str) -> subprocess.CompletedProcess:
    """Run a script to its end."""
    return ended(start(script, *arguments, cwd=cwd, **environment))


def here(script: str, *arguments) -> subprocess.CompletedProcess:
    """`command` without the seconds that a new process takes: the script's main and guard in this one."""
    main = {"tp5.py": tp5, "generate.py": generate, "textloader.py": textloader}[script].main
    output, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    arguments, code = [script, *map(str, arguments)], 0
    with patch.object(sys, "argv", arguments), redirect_stdout(output), redirect_stderr(errors):
        try:
            textloader.guard(main)
        except SystemExit as end:  # as the interpreter ends: a text goes to standard error
            code = end.code
            if isinstance(code, str):
                print(code, file=errors)
                code = 1
    for stream in (output, errors):
        stream.flush()
    printed = (stream.buffer.getvalue().decode() for stream in (output, errors))
    return subprocess.CompletedProcess(arguments, code, *printed)


def refused(result: subprocess.CompletedProcess, *words: str, code: int = 1) -> None:
    """Assert that a command ended in one line with these words; code 2 is argparse's usage and error."""
    assert result.returncode == code, result.stderr
    lines = result.stderr.splitlines()
    assert lines[0].startswith("usage: ") if code == 2 else len(lines) == 1, result.stderr
    assert all(word in lines[-1] for word in words) and lines[-1].isprintable(), result.stderr


def checkpoint_file(content, path: Path) -> None:
    """Write a checkpoint with this content, as `save` does: followed by its SHA-256."""
    stream = io.BytesIO()
    torch.save(content, stream)
    path.write_bytes(stream.getvalue() + hashlib.sha256(stream.getvalue()).digest())


def same(left, right) -> bool:
    """Equal to the bit and in type, through dicts, lists, tuples, models, optimisers and records."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, nn.Module | torch.optim.Optimizer):
        return same(left.state_dict(), right.state_dict())
    if hasattr(left, "__dict__"):
        return same(vars(left), vars(right))
    return left == right


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> tuple[str, ...]:
    """Options of a small model on a text of 1,000 sentences that it soon learns to end."""
    dice, file = random.Random(0), tmp_path_factory.mktemp("corpus") / "small.txt"
    parts = (
        ("We", "They"),
        ("saw", "met"),
        ("2", "37"),
        ("men", "dogs"),
        ("", ' who said "no" to us', " (so far as I know)"),
    )
    file.write_text("\n".join(" ".join(map(dice.choice, parts)) + "." for _ in range(1000)), encoding="utf-8")
    return "--data", str(file), "--hidden", "24", "--embedding", "8", "--epochs", "2", "--batch-size", "32"


def events_of(folder) -> EventAccumulator:
    """All that TensorBoard reads of a run."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "images": 0}).Reload()


def valid_split(small):
    """The validation sentences of the small text, drawn as the README says."""
    dataset = textloader.TextDataset(textloader.read_text(small[1]))
    return torch.utils.data.random_split(dataset, [900, 100], torch.Generator().manual_seed(0))[1]


@pytest.fixture(scope="session")
def runs(tmp_path_factory, small) -> Path:
    """A folder with one short run of each cell and their comparison, trained by the real command line."""
    folder = tmp_path_factory.mktemp("runs é")
    result = command("tp5.py", "--model", "all", "--run", folder, *small)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    (folder / "output.txt").write_text(result.stdout, encoding="utf-8")
    return folder
