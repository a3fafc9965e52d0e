"""Runs that meet a full disk, a lost folder, a signal, one another; and runs of many processes."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, SMALL, command, ended, refused, start

import tp5
from textloader import LabError

LONG = (*SMALL[:2], "--hidden", "8", "--embedding", "4", "--batch-size", "8", "--epochs", "500")
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")


def wait_for(true, process, seconds: float = 60) -> None:
    """Until `true()`; the process must not end before."""
    limit = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.01)


def saved_again(folder, process) -> None:
    """Wait for the next whole last.pt."""
    last = folder / "last.pt"
    before = last.stat().st_mtime_ns if last.exists() else 0
    wait_for(lambda: last.exists() and last.stat().st_mtime_ns != before, process)


@posix
def test_second_process_is_refused_and_sigterm_saves(tmp_path):
    folder = tmp_path / "run"
    process = start("tp5.py", "--run", folder, *LONG, "--save-every", "0")
    saved_again(folder, process)
    refused(command("tp5.py", "--resume", folder), str(folder), "another process")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    result = ended(process)
    assert result.returncode == 0 and "Stopped and saved" in result.stdout and result.stderr == ""
    assert tp5.load_checkpoint(folder / "last.pt")["progress"]["step"] > 0
    with tp5.locked(folder):  # nobody holds it any more
        pass


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_second_signal_stops_at_once(tmp_path, number):
    folder = tmp_path / "run"
    process = start("tp5.py", "--run", folder, "--hidden", "512", "--batch-size", "128")  # steps of a second
    saved_again(folder, process)
    while process.poll() is None:  # signals that meet one call into torch's C++ count as one
        process.send_signal(number)
        time.sleep(0.005)
    result = ended(process)
    assert result.returncode == -number and "Stopped" not in result.stdout and "Traceback" not in result.stderr
    assert tp5.load_checkpoint(folder / "last.pt")["progress"]["step"] == 0


def test_runs_in_one_second_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tp5, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(tp5.time, "strftime", lambda form: "2008-11-04_230000")
    folders = []
    options = Namespace(run=None, model="lstm")
    threads = [threading.Thread(target=lambda: folders.append(tp5.new_folder(options))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 8 and all(folder.is_dir() for folder in folders)


def test_one_lock_at_a_time(tmp_path):
    with tp5.locked(tmp_path), pytest.raises(LabError, match="another process"), tp5.locked(tmp_path):
        pass
    with tp5.locked(tmp_path):
        pass


def test_failed_write_keeps_the_last_good_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    tp5.save(path, {"good": 1})
    good = path.read_bytes()
    for fails in ("fsync", "replace"):
        with monkeypatch.context() as patched, pytest.raises(LabError, match="No space left"):
            patched.setattr(os, fails, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            tp5.save(path, {"good": 2})
        assert path.read_bytes() == good and list(tmp_path.iterdir()) == [path]


def limited(size: int, *arguments) -> subprocess.CompletedProcess:
    """Train where no file may grow beyond `size` bytes."""
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (int(sys.argv[1]),));"
        "sys.argv = sys.argv[2:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]);"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = [sys.executable, "-c", code, str(size), str(ROOT / "tp5.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, capture_output=True, encoding="utf-8", env=environment, timeout=100)


@posix
def test_no_room_at_all(tmp_path):
    refused(limited(10_000, "--run", tmp_path / "run", *LONG), "cannot write", "last.pt", "File too large")


@pytest.mark.slow
@posix
def test_no_room_for_the_curves(tmp_path):
    """The events stop with one warning, the run does not."""
    result = limited(100_000, "--run", tmp_path / "run", *LONG, "--epochs", "2", "--histograms-every", "1")
    assert result.returncode == 0, result.stderr
    assert len(result.stderr.splitlines()) == 1 and "warning: cannot write TensorBoard's events" in result.stderr
    assert tp5.load_checkpoint(tmp_path / "run" / "last.pt")["progress"]["epoch"] == 2


@pytest.mark.slow
@posix
def test_folder_removed(tmp_path):
    folder = tmp_path / "run"
    process = start("tp5.py", "--run", folder, *LONG, "--save-every", "0.1")
    saved_again(folder, process)
    folder.rename(tmp_path / "removed")  # at once: rmtree would race with a save
    first = process.stderr.readline()  # it warns, and goes on in the hope that somebody puts it back
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    result = ended(process)
    *warnings, last = result.stderr.splitlines()
    assert result.returncode == 2 and "cannot write" in last
    assert all(line.startswith("warning: cannot write") for line in (first, *warnings))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(path) -> None:
    """A file that takes all the room that is left."""
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError:
            pass


@pytest.mark.slow
def test_full_disk_and_room_again(small_disk):
    folder, filler = small_disk / "run", small_disk / "filler"
    process = start("tp5.py", "--run", folder, *LONG, "--save-every", "0.05", "--histograms-every", "0")
    saved_again(folder, process)
    fill(filler)
    assert "No space left on device" in process.stderr.readline()
    before = tp5.load_checkpoint(folder / "last.pt")["progress"]["step"]  # the last good one
    filler.unlink()
    saved_again(folder, process)
    process.send_signal(signal.SIGTERM)
    result = ended(process)
    assert result.returncode == 0 and "Stopped and saved" in result.stdout, result
    after = tp5.load_checkpoint(folder / "last.pt")["progress"]["step"]
    assert after > before

    fill(filler)  # full from the start to the end of this command
    process = start("tp5.py", "--resume", folder)
    assert "warning" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    result = ended(process)
    assert result.returncode == 2 and "cannot write" in result.stderr and "Traceback" not in result.stderr
    assert tp5.load_checkpoint(folder / "last.pt")["progress"]["step"] == after

    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused(command("tp5.py", "--resume", folder), "cannot write in", "Read-only")


def torchrun(*arguments, processes: int = 2) -> subprocess.Popen:
    """Start tp5.py in many processes."""
    code = "import sys; from torch.distributed.run import main; sys.argv[0] = 'torchrun'; main()"
    arguments = [f"--nproc-per-node={processes}", "--", str(ROOT / "tp5.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=pipe, stderr=pipe, encoding="utf-8", env=environment
    )


def test_two_processes_train_the_model_of_one(tmp_path):
    """The same batches, each split in two: equal but for rounding, and everything written and printed once."""
    sizes = (*SMALL, "--model", "gru", "--batch-size")
    together = ended(torchrun("--run", tmp_path / "two", *sizes, 7))
    alone = command("tp5.py", "--run", tmp_path / "one", *sizes, 14)  # 360 = 25 · 14 + 10, 40 = 2 · 14 + 12
    assert together.returncode == alone.returncode == 0, together.stderr
    two, one = (tp5.load_checkpoint(tmp_path / name / "last.pt") for name in ("two", "one"))
    assert (two["processes"], one["processes"]) == (2, 1)
    assert two["options"] == one["options"]
    for name in ("epoch", "step", "symbols"):
        assert two["progress"][name] == one["progress"][name]
    assert two["progress"]["best"] == pytest.approx(one["progress"]["best"], rel=1e-5)
    for name, weight in one["weights"].items():
        assert torch.allclose(two["weights"][name], weight, rtol=1e-3, atol=1e-4), name
    lines = together.stdout.splitlines()
    assert len(lines) == len(alone.stdout.splitlines()) == len(set(lines))
    assert sorted(path.suffix for path in (tmp_path / "two").iterdir() if path.suffix in (".pt", ".tmp")) == [".pt"] * 2
    assert len(list((tmp_path / "two").glob("events*"))) == 2  # the curves, and the inside of the finished run


@pytest.mark.slow
def test_a_last_batch_smaller_than_the_processes(tmp_path):
    (tmp_path / "small.txt").write_text("A b c. D! E?", encoding="utf-8")  # two to train on, one to validate
    sizes = ("--data", tmp_path / "small.txt", "--hidden", "2", "--epochs", "2", "--batch-size")
    together = ended(torchrun("--run", tmp_path / "three", *sizes, 1, processes=3))
    alone = command("tp5.py", "--run", tmp_path / "one", *sizes, 3)
    assert together.returncode == alone.returncode == 0, together.stderr
    three, one = (tp5.load_checkpoint(tmp_path / name / "last.pt") for name in ("three", "one"))
    assert three["progress"]["best"] == pytest.approx(one["progress"]["best"], rel=1e-5)


def children(process: subprocess.Popen) -> dict[int, int]:
    """torchrun's processes: rank → process id."""
    found = {}
    with open(f"/proc/{process.pid}/task/{process.pid}/children", encoding="ascii") as file:
        for child in file.read().split():
            with open(f"/proc/{child}/environ", "rb") as environment:
                ranks = [entry[5:] for entry in environment.read().split(b"\0") if entry.startswith(b"RANK=")]
            found |= {int(rank): int(child) for rank in ranks}
    return found


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_process_ends_the_job_and_any_number_resumes(tmp_path, rank):
    folder = tmp_path / "run"
    process = torchrun("--run", folder, *LONG, "--save-every", "0.2")
    saved_again(folder, process)
    saved_again(folder, process)
    os.kill(children(process)[rank], signal.SIGKILL)
    start_ = time.monotonic()
    result = ended(process)
    assert result.returncode != 0 and time.monotonic() - start_ < 60
    assert "tp5.py: another process of this run is lost" in result.stderr and "--resume" in result.stderr
    assert "Stopped and saved" not in result.stdout

    alone = start("tp5.py", "--resume", folder, "--save-every", "0.2")
    saved_again(folder, alone)
    alone.send_signal(signal.SIGTERM)
    result = ended(alone)
    assert result.returncode == 0 and "1 process(es) instead of 2" in result.stdout

    together = torchrun("--resume", folder, "--save-every", "0.2")
    saved_again(folder, together)
    together.send_signal(signal.SIGTERM)  # torchrun hands it on
    result = ended(together)
    assert "2 process(es) instead of 1" in result.stdout and "Stopped and saved" in result.stdout
    assert tp5.load_checkpoint(folder / "last.pt")["processes"] == 2


def test_without_torchrun_torch_distributed_is_not_touched(tmp_path, monkeypatch):
    def touched(*_, **__):
        raise AssertionError

    for name in ("init_process_group", "all_reduce", "get_backend"):
        monkeypatch.setattr(torch.distributed, name, touched)
    monkeypatch.setattr(torch.nn.parallel.DistributedDataParallel, "__init__", touched)
    monkeypatch.setattr(sys, "argv", ["tp5.py", "--run", str(tmp_path / "run"), *LONG[:-1], "1"])
    tp5.main()
