"""What the lab costs, each part beside its peer, in alternation in one process.

    python tests/benchmark.py                       # everything
    python tests/benchmark.py --only decode         # one point

Each point prints one table: ours, the peer, their ratio, the target, met or not. Times are medians
over alternated rounds, so that a machine that slows down slows both; only the ratios are worth quoting.
"""

import argparse
import os
import platform
import statistics
import sys
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


POINTS = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=POINTS, action="append", help="measure this point (may be repeated)")
    only = parser.parse_args().only
    print(machine())
    for name in only or POINTS:
        POINTS[name]()


if __name__ == "__main__":
    main()
