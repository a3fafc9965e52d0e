"""What the lab costs, each part beside its peer, in alternation in one process.

    python tests/benchmark.py                       # everything
    python tests/benchmark.py --only decode         # one point

Each point prints one table: ours, the peer, their ratio, the target, met or not. Times are medians
over alternated rounds, so that a machine that slows down slows both; only the ratios are worth quoting.
"""

import argparse
import contextlib
import itertools
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from generate import generate, generate_beam, generate_exact  # noqa: E402
from textloader import (  # noqa: E402
    BATCH_SIZE,
    CORPUS,
    EOS_IX,
    PAD_IX,
    SYMBOLS,
    BucketSampler,
    TextDataset,
    pad_collate_fn,
    padding_share,
    read_text,
)
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
    calls = {"products": products, "torch": lstm_alone()}
    ms = {name: 1000 * seconds for name, seconds in alternate(calls).items()}
    what = "products of an LSTM by hand, all of torch.nn.LSTM (default; the most that the cell could gain)"
    rows.append(row(what, ms["products"], ms["torch"], ms["torch"] / ms["products"]))
    table(f"Training step, T {T}, E {E}, float32: ours against torch.nn", rows, "ms")


def products() -> None:
    """The matrix products that no LSTM by hand can do without, forward and back over T symbols, and nothing else."""
    W, h, d_a = torch.ones(4 * HIDDEN, HIDDEN), torch.ones(HIDDEN, BATCH_SIZE), torch.ones(4 * HIDDEN, BATCH_SIZE)
    for _ in range(T):
        W @ h
    for _ in range(T):
        W.t() @ d_a
    torch.ones(4 * HIDDEN, T * BATCH_SIZE) @ torch.ones(T * BATCH_SIZE, HIDDEN)


def lstm_alone():
    """torch.nn.LSTM at default sizes, forward and back, without the rest of the model."""
    rnn, x = nn.LSTM(E, HIDDEN), torch.ones(T, BATCH_SIZE, E, requires_grad=True)
    return lambda: rnn(x)[0].sum().backward()


def threads() -> None:
    """A default training step with each number of threads, for the default of --threads: a core each."""
    rows, cores = [], torch.get_num_threads()
    counts = range(1, cores + 1)

    def with_threads(number: int, run) -> None:
        torch.set_num_threads(number)
        run()

    for cell in TORCH_CELLS:
        run = training_step(cell, BATCH_SIZE, HIDDEN)
        ms = {n: 1000 * s for n, s in alternate({n: partial(with_threads, n, run) for n in counts}).items()}
        torch.set_num_threads(cores)
        for n in counts[1:]:
            rows.append(row(f"{cell}: {n} threads, 1 thread", ms[n], ms[1], ms[1] / ms[n], at_least=1))
    table(f"Training step by threads, B {BATCH_SIZE}, T {T}, E {E}, H {HIDDEN}", rows, "ms")


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
    options = ["--run", folder / "run", "--maxsent", 3000, "--epochs", 2]
    subprocess.run([sys.executable, ROOT / "tp5.py", *map(str, options)], check=True, capture_output=True)
    checkpoint = folder / "run" / "best.pt"
    model, budget = load_model(checkpoint), 50_000
    start = time.perf_counter()
    generate_exact(model.rnn, model.emb, model.decoder, EOS_IX, budget=budget, min_length=20)
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


# --------------------------------------------------------------------------- resume, processes


def record() -> None:
    """What recording costs a default run: scalars and histograms of its steps, and the look inside at its end."""
    import tp5

    options = tp5.command_parser().parse_args(["--device", "cpu"])
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(None):
        folder = Path(name)
        training = tp5.Training(options, folder, *tp5.load_corpus(options))
        training.stop, training.clock = threading.Event(), time.perf_counter()
        training.monitor = tp5.Monitor(folder, options, 0)
        batches = list(itertools.islice(tp5.share(training.train), 20))

        def steps(every: int) -> None:
            training.monitor.histograms_every = every
            for batch in batches:
                training.train_step(batch)

        training.monitor.scalars_every = 0
        rounds = alternate({"off": partial(steps, 0), "histograms": partial(steps, 1)}, 3)
        seconds = {name: of_20 / len(batches) for name, of_20 in rounds.items()}
        training.monitor.scalars_every = 1  # timed alone: beside a step, they are lost in its noise
        scalars = dict(steps=1, clipped=0, nats=1.0, symbols=1, seconds=1.0)
        seconds |= alternate({"scalars": lambda: training.monitor.step(0, 1e-3, 1.0, **scalars)}, 101)
        training.save("best.pt", final=True)
        start = time.perf_counter()
        tp5.look_inside(options, folder, training.valid)
        inside = time.perf_counter() - start
        training.monitor.close()
    run = training.steps * seconds["off"]
    scalars = training.steps / options.scalars_every * seconds["scalars"]
    histograms = training.steps / options.histograms_every * (seconds["histograms"] - seconds["off"])
    rows = [row(what, cost, run, cost / run) for what, cost in
            (("scalars", scalars), ("histograms", histograms), ("the inside, at the end", inside))]  # fmt: skip
    total = scalars + histograms + inside
    rows.append(row("together", total, run, total / run, at_most=0.05))
    table("Recording at the default intervals, of a default run's training", rows, "seconds")


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
            sizes = ["--maxsent", "3000", "--epochs", "1", "--histograms-every", "0", "--batch-size", str(batch_size)]
            command = [sys.executable, *many, str(ROOT / "tp5.py"), "--run", str(Path(folder) / "run"), *sizes]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            output = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=True).stdout
        loss, speed = re.search(r"validation ([\d.]+) nats.* ([\d,]+) characters/s", output).groups()
        return float(speed.replace(",", "")), float(loss)

    runs = {"two": [], "one": []}
    for _ in range(2):
        runs["two"].append(train(2, 32))
        runs["one"].append(train(1, 32))
    two, one = (statistics.median(speed for speed, _ in runs[name]) for name in ("two", "one"))
    table(
        "ddp: two processes of one thread",
        [row("32 sentences each", two, one, two / one, at_least=1.6)],
        "characters/s",
    )
    print(f"\nValidation: {runs['two'][0][1]} nats; one process with the same batches of 64: {train(1, 64)[1]} nats")


# ------------------------------------------------------------------------------- padding, loading


class Published(nn.Module):
    """The peer: what solutions of this lab look like. A linear layer for each gate, on [h, x], one-hot-free."""

    def __init__(self):
        super().__init__()
        self.emb, self.decoder = nn.Embedding(SYMBOLS, E), nn.Linear(HIDDEN, SYMBOLS)
        self.f, self.i, self.C, self.o = (nn.Linear(HIDDEN + E, HIDDEN) for _ in range(4))

    def forward(self, targets):
        inputs = torch.cat([torch.full_like(targets[:1], EOS_IX), targets[:-1]])
        h = C = torch.zeros(targets.shape[1], HIDDEN)
        outputs = []
        for x in self.emb(inputs):
            hx = torch.cat([h, x], 1)
            C = self.f(hx).sigmoid() * C + self.i(hx).sigmoid() * self.C(hx).tanh()
            h = self.o(hx).sigmoid() * C.tanh()
            outputs.append(self.decoder(h))
        return torch.stack(outputs)


def characters_per_second(model: nn.Module, dataset, batches: list[list[int]]) -> float:
    """Real characters that training on these batches of indices takes in a second."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    symbols, start = 0, time.perf_counter()
    for batch in DataLoader(dataset, batch_sampler=batches, collate_fn=pad_collate_fn):
        optimizer.zero_grad()
        maskedCrossEntropy(model(batch), batch, PAD_IX).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        symbols += int((batch != PAD_IX).sum())
    return symbols / (time.perf_counter() - start)


def validation_nats(path: Path, bucketed: bool) -> float:
    """The default LSTM's best validation loss after its epochs; with random batches, that takes minutes."""
    import tp5

    options = tp5.command_parser().parse_args(["--data", str(path), "--histograms-every", "0", "--device", "cpu"])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        training = tp5.Training(options, Path(folder), *tp5.load_corpus(options))
        if not bucketed:
            subset = training.train.dataset
            sampler = BucketSampler(np.ones(len(subset), dtype=np.int64), BATCH_SIZE, seed=options.seed)
            training.train = DataLoader(subset, batch_sampler=sampler, collate_fn=pad_collate_fn)
        training.run(threading.Event())
    return training.progress["best"]


def padding(corpora: list[Path]) -> None:
    """Length-bucketed batches against random ones, and against a published solution on random ones."""
    rows = []
    for path in corpora:
        dataset = TextDataset(read_text(path))
        bucketed = list(BucketSampler(dataset.lengths, BATCH_SIZE))
        random = list(BucketSampler(np.ones_like(dataset.lengths), BATCH_SIZE))
        shares = [100 * padding_share(dataset.lengths, batches) for batches in (bucketed, random)]
        rows.append(row(f"{path.name}: padding, % of symbols (ratio: ours)", *shares, shares[0], at_most=3))
        speeds = {"ours": [], "random": [], "published": []}
        for part in range(15):
            each = slice(4 * part, 4 * part + 4)
            speeds["ours"].append(characters_per_second(CharModel("lstm", E, HIDDEN), dataset, bucketed[each]))
            speeds["random"].append(characters_per_second(CharModel("lstm", E, HIDDEN), dataset, random[each]))
            speeds["published"].append(characters_per_second(Published(), dataset, random[each]))
        ours, peer, published = (statistics.median(values) for values in speeds.values())
        rows.append(
            row(f"{path.name}: characters/s, same model on random batches", ours, peer, ours / peer, at_least=4)
        )
        rows.append(
            row(f"{path.name}: characters/s, published solution", ours, published, ours / published, at_least=6)
        )
        nats = [validation_nats(path, bucketed) for bucketed in (True, False)]
        what = f"{path.name}: validation nats after a default run, random batches (ratio: ours more)"
        rows.append(row(what, *nats, nats[0] - nats[1], at_most=0.01))
    table(f"Padding, LSTM, B {BATCH_SIZE}, E {E}, H {HIDDEN}", rows, "as named")


LOADING = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
import tp5
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
options = tp5.command_parser().parse_args(["--data", sys.argv[2], "--device", "cpu"])
before, start = peak(), time.perf_counter()
dataset = tp5.TextDataset(tp5.read_text(options.data))
loaded, size = time.perf_counter() - start, peak() - before
del dataset
training = tp5.Training(options, None, *tp5.load_corpus(options))
batch = next(iter(tp5.share(training.train)))
tp5.maskedCrossEntropy(training.model(batch), batch, tp5.PAD_IX).backward()
print(loaded, size, time.perf_counter() - start - loaded, peak() - before)
"""


def load(corpora: list[Path], megabytes: int = 500) -> None:
    """A corpus of 500 MB made by repetition: seconds and bytes to load it, seconds to the first step."""
    rows = []
    for path in corpora:
        content = path.read_bytes()
        with tempfile.TemporaryDirectory() as folder:
            big = Path(folder) / "big.txt"
            with big.open("wb") as file:
                for _ in range(megabytes * 10**6 // len(content)):
                    file.write(content)
            characters = sum(map(len, read_text(big)))
            command = [sys.executable, "-c", LOADING, str(ROOT), str(big)]
            output = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
            seconds, size, first, trained = map(float, output.split()[-4:])
        rows += [
            row(f"{path.name} repeated: MB/s", megabytes / seconds, 40, megabytes / seconds, at_least=40),
            row("peak bytes a character, loading", size / characters, 2, size / characters, at_most=2),
            row("peak bytes a character, at the first step", trained / characters, 2, trained / characters, at_most=2),
            row("seconds to the first step", first, 60, first, at_most=60),
        ]
    table(f"Loading {megabytes} MB (peer and ratio: the target, ours)", rows, "as named")


def stopped_after(seconds: float, path: Path) -> tuple[float, float]:
    """A default LSTM stopped that long after it was started: seconds of training and validation loss in nats."""
    import tp5

    options = tp5.command_parser().parse_args(["--data", str(path), "--device", "cpu"])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        training, stop = tp5.Training(options, Path(folder), *tp5.load_corpus(options)), threading.Event()
        threading.Timer(seconds, stop.set).start()
        training.run(stop)
    done = training.progress
    return done["trained"] + done["seconds"], tp5.evaluate(training.model.eval(), training.valid, options.device)


def quality(corpora: list[Path]) -> None:
    """The default LSTM after 15 s of training and after its last epoch; the peer is nanoGPT on the same text.

    Its CPU configuration on the campaign speeches: 1.50 nats after 102 s of training. Other texts have no target.
    """
    rows = []
    for path in corpora:
        early, late, within = (None, None, None) if path == CORPUS else (1.5, 1.15, 100)
        seconds, nats = stopped_after(15.0, path)
        rows.append(
            row(f"{path.name}: validation nats after {seconds:.1f} s of training", nats, 1.5, nats, at_most=early)
        )
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, ROOT / "tp5.py", "--data", path, "--run", Path(folder) / "run"]
            output = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
        print(output.splitlines()[0])
        epochs = re.findall(r"epoch (\d+)/.*validation ([\d.]+) nats.* ([\d.]+) s of training", output)
        number, nats, seconds = epochs[-1]
        name = f"{path.name}, epoch {number}"
        rows.append(row(f"{name}: validation nats", float(nats), 1.5, float(nats), at_most=late))
        rows.append(row(f"{name}: seconds of training", float(seconds), 102, float(seconds), at_most=within))
    table("Quality of the default LSTM (ratio: ours)", rows, "as named")


ON_CORPORA = {"padding": padding, "load": load, "quality": quality}
POINTS = {
    "step": step,
    "threads": threads,
    "bf16": bf16,
    "decode": decode,
    "record": record,
    "resume": resume,
    "ddp": ddp,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", choices=[*POINTS, *ON_CORPORA], action="append", help="measure this point (may be repeated)"
    )
    parser.add_argument("--data", type=Path, action="append", default=[CORPUS], metavar="PATH",
                        help="a corpus more for padding, load and quality")  # fmt: skip
    options = parser.parse_args()
    keep_freed_memory()
    print(machine())
    for name in options.only or [*POINTS, *ON_CORPORA]:
        if name in POINTS:
            POINTS[name]()
        else:
            ON_CORPORA[name](options.data)


if __name__ == "__main__":
    main()
