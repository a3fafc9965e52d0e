"""Runs that meet a second signal, a full disk, a lost folder; and runs of many processes."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, ended, here, refused, start

from tp5 import load

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")
LONG = ("--hidden", "8", "--embedding", "4", "--batch-size", "8", "--epochs", "500", "--save-every", "0.05")


def saved_again(folder, process) -> None:
    """Wait for the next whole last.pt; the process must not end before."""
    last, limit = folder / "last.pt", time.monotonic() + 200
    before = last.stat().st_mtime_ns if last.exists() else 0
    while not last.exists() or last.stat().st_mtime_ns == before:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.01)


@posix
def test_a_failed_save_keeps_the_last_good_file(small, tmp_path):
    """No file may grow beyond what the first, smaller last.pt takes: the second, with moments, fails."""
    whole = here("tp5.py", "--run", tmp_path / "whole", *small, "--epochs", 1)
    assert whole.returncode == 0, whole.stderr
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (int(sys.argv[1]),));"
        "sys.argv = sys.argv[2:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]);"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    size = (tmp_path / "whole" / "last.pt").stat().st_size - 1000
    arguments = [sys.executable, "-c", code, str(size), str(ROOT / "tp5.py"), "--run", str(tmp_path / "run"), *small]
    arguments += ["--histograms-every", "0", "--scalars-every", "0"]
    found = subprocess.run(arguments, capture_output=True, encoding="utf-8", timeout=200)
    refused(found, "File too large")
    assert load(tmp_path / "run" / "last.pt").progress.step == 0


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_good_file(small, tmp_path):
    """A file system of 300 kB, where this user may mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    try:
        process = start("tp5.py", "--run", tmp_path / "run", *small[:2], *LONG)
        found = ended(process)  # its events alone fill it
        assert found.returncode == 1 and "Traceback" not in found.stderr and "No space left" in found.stderr
        assert load(tmp_path / "run" / "last.pt").progress.step > 0
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def torchrun(*arguments, processes: int = 2) -> subprocess.Popen:
    """Start tp5.py in many processes."""
    code = "import sys; from torch.distributed.run import main; sys.argv[0] = 'torchrun'; main()"
    arguments = [f"--nproc-per-node={processes}", "--", str(ROOT / "tp5.py"), *map(str, arguments)]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


def test_two_processes_train_the_model_of_one(small, tmp_path):
    """The same batches, each split in two: equal but for rounding; everything is written and printed once."""
    together = ended(torchrun("--run", tmp_path / "two", *small, "--batch-size", 7))
    alone = here("tp5.py", "--run", tmp_path / "one", *small, "--batch-size", 14)  # 900 = 64 · 14 + 4
    assert together.returncode == alone.returncode == 0, together.stderr
    two, one = (load(tmp_path / name / "last.pt") for name in ("two", "one"))
    assert vars(two.options) | {"run": None, "batch_size": 14} == vars(one.options) | {"run": None}
    assert two.batch_size == one.batch_size == 14  # of all processes
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
    (tmp_path / "small.txt").write_text("A b c. D! E?", encoding="utf-8")  # two to train on, one to validate
    sizes = ("--data", tmp_path / "small.txt", "--hidden", "2", "--epochs", "2", "--batch-size")
    together = ended(torchrun("--run", tmp_path / "three", *sizes, 1, processes=3))
    alone = here("tp5.py", "--run", tmp_path / "one", *sizes, 3)
    assert together.returncode == alone.returncode == 0, together.stderr
    three, one = (load(tmp_path / name / "last.pt") for name in ("three", "one"))
    assert three.progress.best_loss == pytest.approx(one.progress.best_loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_lost_process_ends_the_job_and_one_resumes(small, tmp_path):
    folder = tmp_path / "run"
    job = torchrun("--run", folder, *small[:2], *LONG)
    saved_again(folder, job)
    saved_again(folder, job)
    with open(f"/proc/{job.pid}/task/{job.pid}/children", encoding="ascii") as file:
        os.kill(int(file.read().split()[0]), signal.SIGKILL)
    found = ended(job)
    assert found.returncode != 0
    before = load(folder / "last.pt").progress.step
    alone = start("tp5.py", "--resume", folder)
    saved_again(folder, alone)
    alone.send_signal(signal.SIGINT)
    assert ended(alone).returncode == 130
    assert load(folder / "last.pt").progress.step > before


def test_without_torchrun_torch_distributed_is_not_touched(small, tmp_path, monkeypatch):
    for name in ("init_process_group", "all_reduce"):
        monkeypatch.delattr(torch.distributed, name)
    assert here("tp5.py", "--run", tmp_path, *small, "--epochs", 1).returncode == 0
