"""What the lab costs, each part beside its peer, in alternation in one process.

    python tests/benchmark.py                       # everything
    python tests/benchmark.py --only decode         # one point

Each point prints one table: ours, the peer, their ratio, the target, met or not. Times are medians
over alternated rounds, so that a machine that slows down slows both; only the ratios are worth quoting.
"""

import argparse
import contextlib
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def alternate(calls: dict, rounds: int = 15) -> dict[str, float]:
    """Median seconds of each call, after one round that is not counted, taking turns."""
    seconds = {name: [] for name in calls}
    for counted in range(-1, rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if counted >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def row(what: str, ours: float, peer: float, ratio: float, at_least: float | None = None, at_most: float | None = None):
    """One line of a table; `ratio` is what the target speaks of."""
    target, met = "", ""
    if at_least is not None:
        target, met = f"≥ {at_least:g}", "met" if ratio >= at_least else "MISSED"
    if at_most is not None:
        target, met = f"≤ {at_most:g}", "met" if ratio <= at_most else "MISSED"
    return what, f"{ours:.4g}", f"{peer:.4g}", f"{ratio:.3g}", target, met


def table(title: str, rows: list[tuple], units: str) -> None:
    """Print a Markdown table of `row`s; `units` says what ours and the peer are counted in."""
    print(f"\n### {title}\n\n| what | ours ({units}) | peer ({units}) | ratio | target | |\n|---|---|---|---|---|---|")
    for columns in rows:
        print("| " + " | ".join(columns) + " |")
    sys.stdout.flush()


def machine() -> str:
    """What the figures were measured on."""
    cpu = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo", encoding="utf-8") if "model name" in line)
        if Path("/proc/cpuinfo").exists()
        else iter([platform.processor()]),
        "unknown processor",
    )
    return (
        f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def resume() -> None:
    """What saving within an epoch costs at the default model and interval, and what checking a file costs."""
    import tp5

    options = tp5.command_parser().parse_args(["--maxsent", "1000", "--device", "cpu"])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        training = tp5.Training(options, Path(folder), *tp5.load_corpus(options))
        training.stop, training.clock = threading.Event(), time.perf_counter()
        training.monitor = tp5.Monitor(folder, options, 0)
        training.train_step(next(iter(training.train)))  # the optimiser has its moments from here on
        path = Path(folder) / "last.pt"
        calls = {
            "save": lambda: training.save("last.pt", final=True),
            "torch.save": lambda: torch.save(training.checkpoint(), Path(folder) / "plain.pt"),
            "load": lambda: tp5.load_checkpoint(path),
            "torch.load": lambda: torch.load(path, weights_only=True),
        }
        seconds = alternate(calls)
        size = path.stat().st_size / 1e6
        training.monitor.close()
    every = options.save_every
    rows = [
        row(
            f"a save of {size:.1f} MB in every {every} s", seconds["save"], every, seconds["save"] / every, at_most=0.02
        ),
        row("save / torch.save", seconds["save"], seconds["torch.save"], seconds["save"] / seconds["torch.save"]),
        row("load / torch.load", seconds["load"], seconds["torch.load"], seconds["load"] / seconds["torch.load"]),
    ]
    table("resume: checkpoints", rows, "seconds")


def ddp() -> None:
    """Two processes of one thread beside one process of one thread, the real commands in turns."""

    def train(processes: int, batch_size: int) -> tuple[float, float]:
        """Characters per second and validation loss."""
        many = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--"] if processes > 1 else []
        with tempfile.TemporaryDirectory() as folder:
            sizes = ["--maxsent", "1500", "--epochs", "1", "--batch-size", str(batch_size)]
            command = [sys.executable, *many, str(ROOT / "tp5.py"), "--run", str(Path(folder) / "run"), *sizes]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            output = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=True).stdout
        loss, speed = re.search(r"validation ([\d.]+) nats.* ([\d,]+) characters/s", output).groups()
        return float(speed.replace(",", "")), float(loss)

    runs = {"two": [], "one": []}
    for _ in range(3):
        runs["two"].append(train(2, 32))
        runs["one"].append(train(1, 32))
    two, one = (statistics.median(speed for speed, _ in runs[name]) for name in ("two", "one"))
    table(
        "ddp: two processes of one thread",
        [row("32 sentences each", two, one, two / one, at_least=1.6)],
        "characters/s",
    )
    print(f"\nValidation: {runs['two'][0][1]} nats; one process with the same batches of 64: {train(1, 64)[1]} nats")


POINTS = {"resume": resume, "ddp": ddp}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=POINTS, action="append", help="measure this point (may be repeated)")
    only = parser.parse_args().only
    print(machine())
    for name in only or POINTS:
        POINTS[name]()


if __name__ == "__main__":
    main()
