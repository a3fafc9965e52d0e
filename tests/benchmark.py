"""What the lab costs, each thing beside its peer, in turns in one process.

    python tests/benchmark.py                                 # everything, about 40 minutes
    python tests/benchmark.py --only decode --only step       # these points
    python tests/benchmark.py --data other.txt                # a second corpus, where one matters

Each point prints tables of medians. A machine that slows down slows both sides of a row, so its last
column, how many times as fast as the peer ours is, is what is worth quoting.
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
import time
import unicodedata
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tp5  # noqa: E402
from generate import generate, generate_beam, generate_exact  # noqa: E402
from textloader import CORPUS, EOS_IX, LETTRES, PAD_IX, id2lettre  # noqa: E402
from textloader import BucketSampler, TextDataset, pad_collate_fn, read_text  # noqa: E402
from tp5 import CharModel, maskedCrossEntropy  # noqa: E402

TORCH_CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
T, E, H, V = 60, 128, 256, len(id2lettre)  # T as of an average batch; E and H are the defaults
B = tp5.BATCH_SIZE["muon"]


def alternate(calls: dict, rounds: int = 15) -> dict:
    """Median milliseconds of each call, which take turns; the first round does not count."""
    times = {name: [] for name in calls}
    for _, (name, call) in itertools.product(range(rounds + 1), calls.items()):
        since = time.perf_counter()
        call()
        times[name].append(1000 * (time.perf_counter() - since))
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def beside(what: str, unit: str, ours: float, peer: float) -> dict:
    """A row of a table; `unit` is one of time, or a rate if it ends in "/s"."""
    faster = ours / peer if unit.endswith("/s") else peer / ours
    ours, peer = (round(n) if n >= 100 else n for n in (ours, peer))
    return {"what": what, f"ours, {unit}": ours, f"peer, {unit}": peer, "times as fast": faster}


def show(title: str, rows: list[dict]) -> None:
    """Print a Markdown table."""
    print(f"\n### {title}\n\n{tp5.table(rows)}", flush=True)


def machine() -> str:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    return f"{found[1] if found else platform.processor()}, {cores}, {versions}"


def python(*command, **environment: str) -> str:
    """What a command of Python prints."""
    return subprocess.run([sys.executable, *map(str, command)], check=True, encoding="utf-8",
                          stdout=subprocess.PIPE, env={**os.environ, **environment}).stdout  # fmt: skip


@contextlib.contextmanager
def default_run(**given):
    """A default run of the LSTM before its first step, its sentences, a folder that goes away; says nothing."""
    options = tp5.run_options({"device": "cpu", **given})
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        train_set, valid_set = tp5.load_corpus(options)
        yield tp5.new_run(options, train_set), Path(folder), train_set, valid_set


# ------------------------------------------------------------------------------------------- step


class TorchModel(CharModel):
    """The same model around one of torch.nn's cells."""

    def __init__(self, cell: str, embedding_size: int, hidden_size: int):
        super().__init__(cell, embedding_size, hidden_size)
        self.rnn = TORCH_CELLS[cell](embedding_size, hidden_size)

    def forward(self, targets, trace=None):
        inputs = torch.cat([torch.full_like(targets[:1], EOS_IX), targets[:-1]])
        return self.decoder(self.rnn(self.emb(inputs))[0])


MODELS = {"ours": CharModel, "torch": TorchModel}


def training_step(cell: str, size: int, hidden: int = H, *, library="ours", optimizer="adamw"):
    """Two functions: `train_step` on a batch of T × size symbols, and the optimisers' part of it."""
    options = tp5.run_options({"model": cell, "hidden": hidden, "optimizer": optimizer, "device": "cpu"})
    run = tp5.new_run(options, TextDataset(""))
    if library == "torch":
        model = TorchModel(cell, E, hidden)
        run = replace(run, model=model, optimizers=tp5.make_optimizers(model, run.options))
    batch = torch.randint(EOS_IX + 1, V, (T, size))
    step = partial(tp5.train_step, run, batch, lr=1e-3, mean_symbols=batch.numel())
    step()  # which leaves gradients for `update`

    def update() -> None:
        for optimizer in run.optimizers:
            optimizer.step()

    return step, update


def step(corpora: list[Path]) -> None:
    """Training steps with our cells and with torch.nn's; what of a step the optimiser takes."""
    rows = []
    for cell, hidden in itertools.product(TORCH_CELLS, (128, 256, 512)):
        steps = {library: training_step(cell, B, hidden, library=library)[0] for library in MODELS}
        ms = alternate(steps, 7 if hidden == 512 else 15)
        default = " (default)" if hidden == H else ""
        rows.append(beside(f"{cell}, H {hidden}{default}", "ms", ms["ours"], ms["torch"]))
    show(f"step: our cells beside torch.nn's, both with AdamW, T {T}, B {B}, E {E}", rows)

    shares, rows = [], []
    for cell in TORCH_CELLS:
        pairs = {name: training_step(cell, size, optimizer=name) for name, size in tp5.BATCH_SIZE.items()}
        steps, updates = (alternate({name: pair[i] for name, pair in pairs.items()}) for i in (0, 1))
        for name, ms in steps.items():
            share = {"step, ms": ms, "optimiser, ms": updates[name], "share": updates[name] / ms}
            shares.append({"what": f"{cell}, {name}, B {tp5.BATCH_SIZE[name]}", **share})
        rows.append(beside(cell, "ms", updates["muon"], updates["adamw"]))
    show(f"step: the optimiser's share, H {H}", shares)
    show(f"step: our Muon beside torch.optim.AdamW, H {H}", rows)


def threads(corpora: list[Path]) -> None:
    """A default training step by threads; PyTorch's default is one a core."""
    rows, cores = [], torch.get_num_threads()

    def with_threads(n: int, train) -> None:
        torch.set_num_threads(n)
        train()

    for cell in TORCH_CELLS:
        train = training_step(cell, B, optimizer="muon")[0]
        ms = alternate({n: partial(with_threads, n, train) for n in range(1, cores + 1)})
        rows += [beside(f"{cell}: {n} threads, one", "ms", ms[n], ms[1]) for n in range(2, cores + 1)]
    torch.set_num_threads(cores)
    show(f"threads: a default training step, T {T}, B {B}, E {E}, H {H}", rows)


# ----------------------------------------------------------------------------------------- decode


def never_ending(cell: str, library: str):
    """`(rnn, emb, decoder, eos)` of an untrained model of default size that never ends a sentence."""
    torch.manual_seed(0)
    model = MODELS[library](cell, E, H)
    with torch.no_grad():
        model.decoder.bias[EOS_IX] = -1e9
    return model.rnn, model.emb, model.decoder, EOS_IX


def decode(corpora: list[Path]) -> None:
    """Greedy and beams, exact search, and the start of the command."""
    length, rows = 100, []
    for cell in TORCH_CELLS:
        calls = {}
        for library in MODELS:
            parts = never_ending(cell, library)
            calls[library, "greedy"] = partial(generate, *parts, maxlen=length)
            for k in (1, 5, 50):
                calls[library, f"beam of {k}"] = partial(generate_beam, *parts, k, maxlen=length, n=1)
        us = {name: 1000 * ms / length for name, ms in alternate(calls, 9).items()}
        for what in ("greedy", "beam of 5", "beam of 50"):
            rows.append(beside(f"{cell}, {what}", "µs a symbol", us["ours", what], us["torch", what]))
        one, fifty = us["ours", "beam of 1"], us["ours", "beam of 50"]
        rows.append(beside(f"{cell}, ours: beam of 50, of 1", "µs a symbol", fifty, one))
    show(f"decode: our cells beside torch.nn's, E {E}, H {H}", rows)

    with tempfile.TemporaryDirectory() as folder:
        python(ROOT / "tp5.py", "--run", folder, "--maxsent", 3000, "--epochs", 2)
        model = tp5.load(Path(folder) / "best.pt").model
        parts, limits = (model.rnn, model.emb, model.decoder, EOS_IX), dict(budget=50_000, min_length=20)
        exact = partial(generate_exact, *parts, **limits)
        write = partial(python, ROOT / "generate.py", "--beam", 5, "--checkpoint", folder)
        calls = {"exact": exact, "write": write, "import": partial(python, "-c", "import torch")}
        ms = alternate(calls, 5)
    show("decode: start", [beside("generate.py --beam 5, import torch", "ms", ms["write"], ms["import"])])
    print(f"\nExact search that reads 50,000 prefixes at most: {ms['exact'] / 1000:.2f} s.")


# ------------------------------------------------------------------------------- padding, loading


class Published(nn.Module):
    """What solutions of this lab look like: a linear layer on [h, x] for each gate, a decoder call a step."""

    def __init__(self):
        super().__init__()
        self.emb, self.decoder = nn.Embedding(V, E), nn.Linear(H, V)
        self.f, self.i, self.C, self.o = (nn.Linear(H + E, H) for _ in range(4))

    def forward(self, targets):
        inputs = torch.cat([torch.full_like(targets[:1], EOS_IX), targets[:-1]])
        h = C = torch.zeros(targets.shape[1], H)
        logits = []
        for x in self.emb(inputs):
            hx = torch.cat([h, x], 1)
            C = self.f(hx).sigmoid() * C + self.i(hx).sigmoid() * self.C(hx).tanh()
            h = self.o(hx).sigmoid() * C.tanh()
            logits.append(self.decoder(h))
        return torch.stack(logits)


def characters_per_second(model: nn.Module, dataset, batches: list[list[int]]) -> float:
    """Real characters a second in training on these batches of indices, with AdamW."""
    optimizer, symbols, since = torch.optim.AdamW(model.parameters()), 0, time.perf_counter()
    for batch in DataLoader(dataset, batch_sampler=batches, collate_fn=pad_collate_fn):
        optimizer.zero_grad()
        maskedCrossEntropy(model(batch), batch, PAD_IX).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        symbols += int((batch != PAD_IX).sum())
    return symbols / (time.perf_counter() - since)


def padding(corpora: list[Path]) -> None:
    """The LSTM on bucketed batches beside random ones, and beside a published solution on random ones."""
    shares, rows = [], []
    for path in corpora:
        dataset = TextDataset(read_text(path))
        lengths = {"bucketed": dataset.lengths, "random": np.ones_like(dataset.lengths)}
        batches = {kind: list(BucketSampler(like, B)) for kind, like in lengths.items()}
        real = dataset.lengths.sum() + len(dataset)  # EOS included
        symbols = {kind: sum(len(batch) * (dataset.lengths[batch].max() + 1) for batch in found)
                   for kind, found in batches.items()}  # fmt: skip
        shares.append({"corpus": path.name} | {kind: float(1 - real / n) for kind, n in symbols.items()})
        ours, published = CharModel("lstm", E, H), Published()
        sides, speeds = [(ours, "bucketed"), (ours, "random"), (published, "random")], [[], [], []]
        for first in range(0, min(60, len(batches["random"])), 4):
            for found, (model, kind) in zip(speeds, sides, strict=True):
                found.append(characters_per_second(model, dataset, batches[kind][first : first + 4]))
        bucketed, *peers = map(statistics.median, speeds)
        for what, peer in zip(("the same on random ones", "a published solution"), peers, strict=True):
            rows.append(beside(f"{path.name}, {what}", "characters/s", bucketed, peer))
    show(f"padding: share of the symbols that are BLANK, B {B}", shares)
    show(f"padding: training the LSTM on bucketed batches, B {B}, E {E}, H {H}", rows)


def handouts_loader(text: str) -> list[list[int]]:
    """Codes of the sentences by the handout's own lines: the peer of TextDataset."""
    text = "".join(char for char in unicodedata.normalize("NFD", text) if char in LETTRES)
    codes = {char: code for code, char in id2lettre.items()}
    return [[codes[char] for char in sentence.strip()] for sentence in text.split(".") if sentence.strip()]


def seconds_and_bytes(loader, path: Path) -> tuple[float, float]:
    """Seconds and peak bytes a character of loading a text, in a process of its own (Linux only)."""

    def peak() -> int:  # ru_maxrss would count the parent's memory
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    before, since = peak(), time.perf_counter()
    text = read_text(path)
    loader(text)
    return time.perf_counter() - since, (peak() - before) / len(text)


def load(corpora: list[Path], megabytes: int = 40) -> None:
    """A large corpus, made by repetition: time and memory to load it, beside the handout's loader."""
    rows = []
    for path in corpora:
        found = {TextDataset: [], handouts_loader: []}
        with tempfile.TemporaryDirectory() as folder:
            big = Path(folder) / "big.txt"
            big.write_text(read_text(path) * (megabytes * 10**6 // path.stat().st_size), encoding="utf-8")
            for _, loader in itertools.product(range(3), found):
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    found[loader].append(pool.submit(seconds_and_bytes, loader, big).result())
        ours, peer = ([statistics.median(n) for n in zip(*runs, strict=True)] for runs in found.values())
        memory = {"ours, bytes a character": ours[1], "peer, bytes a character": peer[1]}
        rows.append({**beside(path.name, "s", ours[0], peer[0]), **memory})
    show(f"load: {megabytes} MB, beside the handout's loader", rows)


# ------------------------------------------------------------------------------- quality, recording


def trained_loss(cell: str, seed: int) -> float:
    """Validation nats of the default command on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--model", cell, "--seed", seed, "--histograms-every", 0, "--run", Path(folder) / "run"]
        python(ROOT / "tp5.py", *arguments, OMP_NUM_THREADS="1")
        return tp5.load(Path(folder) / "run" / "best.pt", device="cpu").progress.best_loss


def quality(corpora: list[Path]) -> None:
    """Validation loss of the default command on the shipped corpus, by seed (`runs/reference/seeds.md`)."""
    runs = [*itertools.product(tp5.CELLS, (0, 1, 2))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        losses = [*pool.map(trained_loss, *zip(*runs, strict=True))]
    rows = []
    for cell in tp5.CELLS:
        of_cell = [loss for (name, _), loss in zip(runs, losses, strict=True) if name == cell]
        row = {"tp5.py --model": cell, "validation nats, seeds 0, 1, 2": ", ".join(f"{loss:.3f}" for loss in of_cell)}
        mean = f"{statistics.mean(of_cell):.3f}"
        rows.append(row | {"mean": mean, "range": f"{max(of_cell) - min(of_cell):.3f}"})
    show("quality: validation loss, nats a symbol", rows)


def shakespeare(corpora: list[Path]) -> None:
    """Tiny Shakespeare with nanoGPT's split: nats a character of the text, beside its README's figures."""
    text = read_text(ROOT / "data" / "shakespeare.txt")
    train_text, valid_text = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    valid_set = TextDataset(valid_text, unit="block")
    symbols = int((valid_set.lengths + 1).sum())  # EOS included
    rows = [
        {"model": "nanoGPT, a laptop's CPU", "parameters": "0.8 M", "seconds": 180, "nats a character": "1.88"},
        {"model": "nanoGPT, one A100", "parameters": "10.7 M", "seconds": 180, "nats a character": "1.4697"},
    ]
    for epochs in (5, 10):
        given = {"device": "cpu", "blocks": True, "epochs": epochs, "histograms_every": 0}
        options = tp5.run_options(given)
        train_set = TextDataset(train_text, unit="block", maxlen=options.maxlen)
        run = tp5.new_run(options, train_set)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
            tp5.train(run, Path(folder), train_set, valid_set)
        nats = run.progress.best_loss * symbols / len(valid_text)  # over blank lines, too
        row = {"model": f"default LSTM, {epochs} epochs", "parameters": f"{tp5.parameter_count(run.model) / 1e6:.2f} M"}
        rows.append(row | {"seconds": round(run.progress.seconds), "nats a character": f"{nats:.3f}"})
    show("shakespeare: the last tenth, learned from the first nine", rows)
    print("\nnanoGPT reads 256 characters back, across speeches, and averages over random windows of the tenth;")
    print("the lab begins each speech from nothing, and counts every character once.")


def record(corpora: list[Path]) -> None:
    """What a default run pays for its scalars and histograms, and for the look inside at its end."""
    with default_run() as (run, folder, train_set, valid_set):
        loader = tp5.batches(train_set, run.global_batch_size, epoch=0)
        steps = run.options.epochs * len(loader)
        mean_symbols = (train_set.lengths + 1).sum() / len(loader)
        batches = list(itertools.islice(loader, 20))

        def training(**every: int):
            """A function that trains and writes as often as these options say."""
            options = argparse.Namespace(**vars(run.options) | every)
            watched = replace(run, options=options)  # with the same model and progress
            monitor = tp5.Monitor(watched, folder, steps, steps)

            def train() -> None:
                for batch in batches:
                    gates = [] if monitor.due(options.histograms_every) else None
                    found = tp5.train_step(watched, batch, options.lr, mean_symbols, gates)
                    run.progress.count(*found)
                    monitor.after_step(batch, options.lr, found[-1], gates)
                    run.progress.step += 1

            return train

        ms = alternate({
            "off": training(scalars_every=0, histograms_every=0),
            "scalars": training(scalars_every=1, histograms_every=0),
            "histograms": training(scalars_every=0, histograms_every=1),
        }, 3)  # fmt: skip
        off, scalars, histograms = (each / len(batches) for each in ms.values())
        tp5.save(run, folder / "best.pt")
        look = alternate({"look": partial(tp5.look_inside, folder, valid_set)}, 1)["look"]
    costs = {
        "scalars": steps / run.options.scalars_every * (scalars - off),
        "histograms": steps / run.options.histograms_every * (histograms - off),
        "look inside": look,
    }
    costs["together"] = sum(costs.values())
    rows = [{"what": what, "s": ms / 1000, "share": ms / (steps * off)} for what, ms in costs.items()]
    show(f"record: beside a default run of the LSTM, {steps * off / 1000:.0f} s without", rows)


def resume(corpora: list[Path]) -> None:
    """What a save of the default model costs, flushed to disk, and a checked load."""
    with default_run(maxsent=1000) as (run, folder, train_set, _):
        batch = next(iter(tp5.batches(train_set, run.global_batch_size, epoch=0)))
        tp5.train_step(run, batch, run.options.lr, mean_symbols=batch.numel())
        last, plain = folder / "last.pt", folder / "plain.pt"
        tp5.save(run, last)
        checkpoint = torch.load(last, weights_only=True)
        ms = alternate({
            "save": partial(tp5.save, run, last),
            "torch.save": partial(torch.save, checkpoint, plain),
            "load": partial(tp5.load, last),
            "torch.load": partial(torch.load, last, weights_only=True),
        })  # fmt: skip
        size, every = last.stat().st_size / 1e6, run.options.save_every
    rows = [beside(f"{what}, torch.{what}", "ms", ms[what], ms[f"torch.{what}"]) for what in ("save", "load")]
    show(f"resume: a checkpoint of {size:.1f} MB", rows)
    print(f"\nA save in every {every:g} s of training takes {ms['save'] / 1000 / every:.2%} of the time.")


def ddp(corpora: list[Path]) -> None:
    """Two processes of one thread beside one process of one thread, the real command."""

    def train(processes: int, size: int = B) -> tp5.Progress:
        torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--"] * (processes > 1)
        with tempfile.TemporaryDirectory() as folder:
            short = ["--maxsent", 3000, "--epochs", 1, "--histograms-every", 0, "--batch-size", size]
            python(*torchrun, ROOT / "tp5.py", "--run", folder, *short, OMP_NUM_THREADS="1")
            return tp5.load(Path(folder) / "best.pt").progress

    found = {2: [], 1: []}
    for _, processes in itertools.product(range(2), found):
        found[processes].append(train(processes))
    two, one = (statistics.median(run.seconds for run in runs) for runs in found.values())
    show("ddp: two processes of one thread", [beside(f"an epoch, {B} sentences each, one", "s", two, one)])
    losses = found[2][0].best_loss, train(1, 2 * B).best_loss
    print("\nValidation: {:.3f} nats; one process with the same batches: {:.3f} nats.".format(*losses))


POINTS = {point.__name__: point for point in
          (step, threads, decode, padding, load, record, resume, ddp, quality, shakespeare)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", choices=POINTS, action="append", metavar="NAME", help=f"{', '.join(POINTS)}; repeatable")
    add("--data", type=Path, action="append", default=[], metavar="PATH", help="a second corpus")
    options = parser.parse_args()
    print(machine(), flush=True)
    for name in options.only or POINTS:
        POINTS[name]([CORPUS, *options.data])


if __name__ == "__main__":
    main()
