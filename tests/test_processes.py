"""Runs of many processes, by torchrun."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, command, ended, here, refused

from tp5 import load


def torchrun(*arguments, script: str = "tp5.py", processes: int = 2) -> subprocess.Popen:
    """Start a script in many processes."""
    code = "import sys; from torch.distributed.run import main; sys.argv[0] = 'torchrun'; main()"
    arguments = [f"--nproc-per-node={processes}", "--", str(ROOT / script), *map(str, arguments)]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(small, tmp_path):
    """The same batches, each split in two: equal but for rounding; everything is written and printed once."""
    together = ended(torchrun("--run", tmp_path / "two", *small, "--batch-size", 7))
    alone = here("tp5.py", "--run", tmp_path / "one", *small, "--batch-size", 14)  # 900 = 64 · 14 + 4
    assert together.returncode == alone.returncode == 0, together.stderr
    two, one = (load(tmp_path / name / "last.pt") for name in ("two", "one"))
    assert vars(two.options) | {"run": None, "batch_size": 14} == vars(one.options) | {"run": None}
    assert two.global_batch_size == one.global_batch_size == 14  # of all processes
    for name in ("step", "symbols"):
        assert getattr(two.progress, name) == getattr(one.progress, name)
    assert two.progress.best_loss == pytest.approx(one.progress.best_loss, rel=1e-4)
    torch.testing.assert_close(two.model.state_dict(), one.model.state_dict(), rtol=1e-2, atol=1e-3)
    lines = together.stdout.splitlines()
    assert len(lines) == len(alone.stdout.splitlines())
    assert sum(line.startswith("epoch ") for line in lines) == 2
    assert len(list((tmp_path / "two").glob("*.pt"))) == 2
    assert len(list((tmp_path / "two").glob("events*"))) == 2  # the curves, and the inside of the finished run


@pytest.mark.slow
def test_a_last_batch_smaller_than_the_processes(tmp_path):
    (tmp_path / "small.txt").write_text("Ab. Cd! Ef? " * 4, encoding="utf-8")
    sizes = ("--data", tmp_path / "small.txt", "--hidden", "2", "--epochs", "2", "--batch-size")
    together = ended(torchrun("--run", tmp_path / "three", *sizes, 1, processes=3))
    alone = here("tp5.py", "--run", tmp_path / "one", *sizes, 3)
    assert together.returncode == alone.returncode == 0, together.stderr
    assert "11 to train on, 1 to validate" in together.stdout
    three, one = (load(tmp_path / name / "last.pt") for name in ("three", "one"))
    assert three.progress.best_loss == pytest.approx(one.progress.best_loss, rel=1e-5)


@pytest.mark.slow
def test_a_lost_process_ends_the_job_and_one_resumes(small, tmp_path):
    """Number 1 is killed within its step 36; number 0 has then saved step 30, and cannot go on without it."""
    within = ("tp5.orthogonal", 74, "before", "KILL")
    job = ended(torchrun(*within, "--run", tmp_path, *small, "--batch-size", 16, script="tests/stopped.py"))
    assert job.returncode != 0 and load(tmp_path / "last.pt").progress.step == 30, job.stderr
    found = here("tp5.py", "--resume", tmp_path)
    assert found.returncode == 0 and "going on after step 30\n" in found.stdout, found.stderr
    run = load(tmp_path / "last.pt")
    assert run.progress.step == 58 and run.global_batch_size == 32  # that of both


def test_without_torchrun_torch_distributed_is_not_touched(small, tmp_path, monkeypatch):
    for name in ("init_process_group", "all_reduce"):
        monkeypatch.delattr(torch.distributed, name)
    assert here("tp5.py", "--run", tmp_path, *small, "--epochs", 1).returncode == 0


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_is_told_in_one_line_by_each_process(small, tmp_path):
    (tmp_path / "file").write_text("")
    job = ended(torchrun("--run", tmp_path / "file" / "run", *small))
    ours = [line for line in job.stderr.splitlines() if "file/run" in line and "tp5.py: " in line]
    assert job.returncode != 0 and ours and f'File "{ROOT}' not in job.stderr, job.stderr


@pytest.mark.slow
def test_empty_variables_are_none(tmp_path):
    """As some schedulers set them."""
    found = command("tp5.py", "--compare", tmp_path, RANK="", WORLD_SIZE="", LOCAL_RANK="")
    refused(found, "no best.pt")


@pytest.mark.slow
def test_variables_of_torchrun_without_the_rest_are_refused_in_one_line(tmp_path):
    refused(command("tp5.py", "--compare", tmp_path, WORLD_SIZE="2"), "torchrun")
