"""What the lab costs, each part beside its peer, in alternation in one process.

    python tests/benchmark.py                       # everything
    python tests/benchmark.py --only decode         # one point

Each point prints one table: ours, the peer, their ratio, the target, met or not. Times are medians
over alternated rounds, so that a machine that slows down slows both; only the ratios are worth quoting.
"""

import argparse
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from generate import generate, generate_beam, generate_exact  # noqa: E402
from textloader import BATCH_SIZE, EOS_IX, PAD_IX, SYMBOLS  # noqa: E402
from tp5 import HIDDEN, CharModel, keep_freed_memory, load_model, maskedCrossEntropy  # noqa: E402


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
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return (
        f"{(names or [platform.processor()])[0]}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


# ------------------------------------------------------------------------------------------- step

TORCH_CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
T, E = 60, 128


def training_step(cell: str, batch_size: int, hidden: int, *, library: str = "ours", precision=torch.float32):
    """A training step of `CharModel` on one batch of T symbols: forward, backward, clip, optimiser."""
    torch.manual_seed(0)
    model = CharModel(cell, E, hidden)
    if library == "torch":
        model.rnn = TORCH_CELLS[cell](E, hidden)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batch = torch.randint(EOS_IX + 1, SYMBOLS, (T, batch_size))

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            output = model(batch)
        maskedCrossEntropy(output, batch, PAD_IX).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def step() -> None:
    """Training steps with our cells against the same model with torch.nn's, float32."""
    rows = []
    for cell, hidden, size in itertools.product(TORCH_CELLS, (128, 256, 512), (32, 64, 128)):
        calls = {library: training_step(cell, size, hidden, library=library) for library in ("ours", "torch")}
        ms = {name: 1000 * seconds for name, seconds in alternate(calls, 7 if hidden == 512 else 15).items()}
        default = (size, hidden) == (BATCH_SIZE, HIDDEN) and cell != "rnn"
        what = f"{cell} B {size}, H {hidden}{' (default)' if default else ''}"
        rows.append(row(what, ms["ours"], ms["torch"], ms["torch"] / ms["ours"], at_least=1.3 if default else 0.9))
    table(f"Training step, T {T}, E {E}, float32: ours against torch.nn", rows, "ms")


def bf16() -> None:
    """Training steps with bfloat16 products against torch.nn's in float32."""
    rows = []
    for cell, hidden, size in itertools.product(("lstm", "gru"), (256, 512), (32, 128)):
        calls = {
            "ours": training_step(cell, size, hidden, precision=torch.bfloat16),
            "torch": training_step(cell, size, hidden, library="torch"),
        }
        ms = {name: 1000 * seconds for name, seconds in alternate(calls, 9).items()}
        rows.append(
            row(f"{cell} B {size}, H {hidden}", ms["ours"], ms["torch"], ms["torch"] / ms["ours"], at_least=1.8)
        )
    table(f"Training step, T {T}, E {E}: ours in bfloat16 against torch.nn in float32", rows, "ms")


# ----------------------------------------------------------------------------------------- decode


def never_ending(cell: str, library: str):
    """`(rnn, emb, decoder, eos)` of an untrained model at default sizes that never ends a sentence."""
    model = CharModel(cell, E, HIDDEN).eval()
    if library == "torch":
        model.rnn = TORCH_CELLS[cell](E, HIDDEN)
    with torch.no_grad():
        model.decoder.bias[EOS_IX] = -1e9
    return model.rnn, model.emb, model.decoder, EOS_IX


def with_a_trained_model(folder: Path) -> list[tuple]:
    """Exact search's rate, and the wall time of `generate.py --beam 5` against that of importing torch."""
    options = ["--run", folder / "run", "--epochs", 1]
    subprocess.run([sys.executable, ROOT / "tp5.py", *map(str, options)], check=True, capture_output=True)
    checkpoint = folder / "run" / "best.pt"
    model, budget = load_model(checkpoint), 50_000
    start = time.perf_counter()
    generate_exact(model.rnn, model.emb, model.decoder, EOS_IX, budget=budget, min_length=30)
    rate = budget / (time.perf_counter() - start)
    beam = [sys.executable, ROOT / "generate.py", "--beam", "5", "--checkpoint", checkpoint]
    commands = {"ours": beam, "torch": [sys.executable, "-c", "import torch"]}
    seconds = alternate(
        {n: partial(subprocess.run, c, check=True, capture_output=True) for n, c in commands.items()}, 5
    )
    ours, torch_alone = seconds["ours"], seconds["torch"]
    what = "generate.py --beam 5, import torch (s); ratio without 1 s"
    return [
        row("exact search, its prototype (prefixes a second)", rate, 2500, rate / 2500, at_least=10),
        row(what, ours, torch_alone, (ours - 1) / torch_alone, at_most=1.3),
    ]


def decode() -> None:
    """Greedy, beam and exact search, and the command's start."""
    characters, rows = 100, []
    for cell in TORCH_CELLS:
        ours, theirs = never_ending(cell, "ours"), never_ending(cell, "torch")
        calls = {
            "ours": partial(generate, *ours, maxlen=characters),
            "theirs": partial(generate, *theirs, maxlen=characters),
            "one": partial(generate_beam, *ours, 1, maxlen=characters),
            "fifty": partial(generate_beam, *ours, 50, maxlen=characters, n=1),
        }
        us = {name: seconds / (characters + 1) * 1e6 for name, seconds in alternate(calls).items()}
        speed, target = us["theirs"] / us["ours"], 3 if cell == "lstm" else None
        rows += [
            row(f"greedy {cell}, torch.nn's (µs a character); speed", us["ours"], us["theirs"], speed, at_least=target),
            row(f"beam of 50 {cell}, of 1 (µs a step)", us["fifty"], us["one"], us["fifty"] / us["one"], at_most=3),
        ]
    with tempfile.TemporaryDirectory() as folder:
        rows += with_a_trained_model(Path(folder))
    table(f"Decoding, E {E}, H {HIDDEN}", rows, "as named")


POINTS = {"step": step, "bf16": bf16, "decode": decode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=POINTS, action="append", help="measure this point (may be repeated)")
    only = parser.parse_args().only
    keep_freed_memory()
    print(machine())
    for name in only or POINTS:
        POINTS[name]()


if __name__ == "__main__":
    main()
