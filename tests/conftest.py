"""What the tests share: the project on the import path, toy models, and the real command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tp5 import CELLS  # noqa: E402

torch.set_num_threads(1)  # the fastest for models this small, on a machine that others use too
TORCH_CELLS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
SMALL = ("--maxsent", "400", "--hidden", "24", "--embedding", "8", "--epochs", "2")


def start(script: str, *arguments, **options) -> subprocess.Popen:
    """Start one of the three scripts as a user would."""
    # The scripts choose UTF-8 themselves; one thread is the fastest for models this small.
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=environment,
        **options,
    )


def ended(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait for a process that was started; what it printed, and its exit code."""
    output, errors = process.communicate(timeout=200)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def command(script: str, *arguments, **options) -> subprocess.CompletedProcess:
    """Run one of the three scripts to its end."""
    return ended(start(script, *arguments, **options))


def refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """Assert that a command ended with exit code 2 and one line that has these words."""
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A folder with one short run of each cell, trained by the real command line."""
    folder = tmp_path_factory.mktemp("runs é")
    for model in CELLS:
        result = command("tp5.py", "--model", model, "--run", folder / model, *SMALL)
        assert result.returncode == 0, result.stderr
        (folder / f"{model}.txt").write_text(result.stdout, encoding="utf-8")
    return folder


def toy(cell: str, library: str, symbols: int = 5, seed: int = 0):
    """A random (rnn, emb, decoder) in float64 over few symbols: BLANK, EOS, a, b, c."""
    torch.manual_seed(seed)
    kind = CELLS[cell] if library == "ours" else TORCH_CELLS[cell]
    rnn, emb, decoder = kind(3, 4), nn.Embedding(symbols, 3), nn.Linear(4, symbols)
    with torch.no_grad():
        decoder.weight *= 4  # far from uniform
    return rnn.double(), emb.double(), decoder.double()
