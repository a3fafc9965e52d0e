"""Questions 2, 4 and 5: recurrent cells by hand, and a character model trained with them.

    python tp5.py --model lstm                   # or all: the three cells, then a comparison
    tensorboard --logdir runs

First the lab: loss, cells, model, optimiser, corpus, training. Then what stands around it: checkpoints,
monitoring, a trained model inside, comparing, command line.

Shapes: T length, B batch, E embedding, H hidden, V symbols, G gates; time comes first. Losses in nats.
"""

import argparse
import ctypes
import math
import os
import re
import shutil
import sys
import textwrap
import time
import zipfile
from collections import namedtuple
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from generate import DECODERS, codes_of, decode
from generate import command_parser as decoder_parser
from textloader import CORPUS, EOS_IX, LETTRES, PAD_IX, RUNS, BucketSampler, LabError, TextDataset
from textloader import code2string, find_checkpoint, guard, id2lettre, in_range, pad_collate_fn
from textloader import printable, read_text, say_next, string2code


# ------------------------------------------------------------------------------------------- loss
def maskedCrossEntropy(output, target, padcar):
    """Question 2: mean negative log-likelihood (nats) of the symbols that are not padding.

    output (T, B, V) logits, target (T, B) codes, padcar the code of BLANK. Nothing but padding gives 0.
    """
    real = target != padcar  # (T, B); logits elsewhere do not matter, −inf and NaN included
    return F.cross_entropy(output[real], target[real], reduction="sum") / real.sum().clamp(min=1)


# ------------------------------------------------------------------------------------------ cells
class Cell(nn.Module):
    """What the cells share: parameters, the input's half of every gate, and the loop over time.

    A cell names its `gates` and `states` and writes `one_step`, its equations. W·[h, x] + b is
    (W_x·x + b) + W_h·h: the first half needs no history, so `project` computes it for all steps at once.
    """

    gates: tuple[str, ...]  # in the order of their rows in the parameters
    states: tuple[str, ...] = ("h",)
    has_bias = True

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        rows = len(self.gates) * hidden_size
        self.hidden_size = hidden_size
        self.input_weight = nn.Parameter(torch.empty(rows, input_size))  # W_x, gate below gate
        self.hidden_weight = nn.Parameter(torch.empty(rows, hidden_size))  # W_h
        self.bias = nn.Parameter(torch.zeros(rows)) if self.has_bias else None
        for gate in self.input_weight.chunk(len(self.gates)):
            nn.init.xavier_uniform_(gate)
        for gate in self.hidden_weight.chunk(len(self.gates)):
            nn.init.orthogonal_(gate)  # keeps the norm of h, and of gradients

    def project(self, x):
        """W_x·x + b of every gate: (…, E) → (…, G·H)."""
        return F.linear(x, self.input_weight, self.bias)

    def one_step(self, projected, *states) -> dict[str, torch.Tensor]:
        """From `projected` (B, G·H) and the states (B, H): the new states, and gates to look at, by name."""
        raise NotImplementedError(f"{type(self).__name__}.one_step")

    def unroll(self, projected, states=None, steps: list | None = None):
        """All time steps: projected (T, B, G·H) → every h (T, B, H), and the states after the last step.

        states  a tuple of (B, H); None: zeros
        steps   a list that gets what each `one_step` returns
        """
        if states is None:
            states = (projected.new_zeros(projected.shape[1], self.hidden_size),) * len(self.states)
        output = []
        for projected_t in projected.unbind():
            step = self.one_step(projected_t, *states)
            states = tuple(step[name] for name in self.states)
            output.append(step["h"])
            if steps is not None:
                steps.append(step)
        return torch.stack(output), states

    def forward(self, x, states=None):
        """Called like `torch.nn`'s cells: x (T, B, E) → output (T, B, H), and the states after it."""
        return self.unroll(self.project(x), states)


class RNN(Cell):
    """h_t = tanh(W·[h_{t-1}, x_t] + b)    (Elman 1990)"""

    gates = ("h",)

    def one_step(self, projected, h):
        h = torch.tanh(projected + h @ self.hidden_weight.T)
        return {"h": h}


class LSTM(Cell):
    """Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000).

    f_t = σ(W_f·[h_{t-1}, x_t] + b_f)                                forget gate
    i_t = σ(W_i·[h_{t-1}, x_t] + b_i)                                input gate
    C_t = f_t ⊗ C_{t-1} + i_t ⊗ tanh(W_C·[h_{t-1}, x_t] + b_C)       memory
    o_t = σ(W_o·[h_{t-1}, x_t] + b_o)                                output gate
    h_t = o_t ⊗ tanh(C_t)
    """

    gates = ("f", "i", "candidate", "o")
    states = ("h", "C")

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__(input_size, hidden_size)
        nn.init.ones_(self.bias[:hidden_size])  # the forget gate's: at first the memory is kept

    def one_step(self, projected, h, C):
        f, i, candidate, o = (projected + h @ self.hidden_weight.T).chunk(4, dim=-1)
        f = torch.sigmoid(f)
        i = torch.sigmoid(i)
        candidate = torch.tanh(candidate)
        C = f * C + i * candidate
        o = torch.sigmoid(o)
        h = o * torch.tanh(C)
        return {"h": h, "C": C, "f": f, "i": i, "candidate": candidate, "o": o}


class GRU(Cell):
    """Gated recurrent unit (Cho et al. 2014), without biases as in the handout.

    z_t = σ(W_z·[h_{t-1}, x_t])
    r_t = σ(W_r·[h_{t-1}, x_t])
    h_t = (1 − z_t) ⊗ h_{t-1} + z_t ⊗ tanh(W·[r_t ⊗ h_{t-1}, x_t])

    `torch.nn.GRU` differs: it resets after the product, and its z keeps the old state.
    """

    gates = ("z", "r", "candidate")
    has_bias = False

    def one_step(self, projected, h):
        W_z, W_r, W_candidate = self.hidden_weight.chunk(3)
        x_z, x_r, x_candidate = projected.chunk(3, dim=-1)
        z = torch.sigmoid(x_z + h @ W_z.T)
        r = torch.sigmoid(x_r + h @ W_r.T)
        candidate = torch.tanh(x_candidate + (r * h) @ W_candidate.T)
        h = (1 - z) * h + z * candidate
        return {"h": h, "z": z, "r": r, "candidate": candidate}


CELLS = {"rnn": RNN, "gru": GRU, "lstm": LSTM}


# ------------------------------------------------------------------------------------------ model
class CharModel(nn.Module):
    """Question 4: embedding, cell, and a linear decoder from hidden state to logits."""

    def __init__(self, cell: str, embedding_size: int, hidden_size: int):
        super().__init__()
        self.cell = cell  # its name
        self.emb = nn.Embedding(len(id2lettre), embedding_size)
        self.rnn = CELLS[cell](embedding_size, hidden_size)
        self.decoder = nn.Linear(hidden_size, len(id2lettre))

    def forward(self, targets, steps: list | None = None):
        """Targets (T, B), each sentence closed by EOS → logits (T, B, V) that predict exactly those.

        steps  a list that gets the cell's states and gates at each time step, see `Cell.unroll`
        """
        inputs = F.pad(targets[:-1], (0, 0, 1, 0), value=EOS_IX)  # EOS opens
        table = self.rnn.project(self.emb.weight)  # (V, G·H): a look-up in it is project(emb(inputs))
        output, _ = self.rnn.unroll(F.embedding(inputs, table), steps=steps)  # (T, B, H)
        return self.decoder(output)


# -------------------------------------------------------------------------------------- optimiser

# Each aσ + bσ³ + cσ⁵ after the other: σ in [0.01, 1] comes to 1 ± 0.27 (cf. Polar Express, Amsel et al. 2025)
QUINTICS = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))


def orthogonal(M):
    """U·Vᵀ of a matrix M = U·S·Vᵀ, nearly: its singular values S become about 1 (Newton-Schulz steps).

    X ← X·(aI + bA + cA²) with A = XᵀX does to each singular value what the polynomial does to a number.
    """
    X = M / (M.norm() + 1e-15)  # no singular value is above 1
    identity = torch.eye(M.shape[1], device=M.device)
    for a, b, c in QUINTICS:
        A = X.T @ X
        X = X @ (a * identity + b * A + c * A @ A)
    return X


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for matrices (Jordan et al. 2024).

        M ← 0.95·M + 0.05·G
        W ← (1 − 0.1·lr)·W − lr·√max(1, rows/columns)·U·Vᵀ    where 0.95·M + 0.05·G = U·S·Vᵀ

    W moves alike in all directions, and as far for a large gradient G as for a small one.
    """

    def __init__(self, matrices, lr: float):
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for W in group["params"]:
                if W not in self.state:
                    self.state[W] = {"momentum": torch.zeros_like(W)}
                M = self.state[W]["momentum"].lerp_(W.grad, 0.05)
                update = orthogonal(W.grad.lerp(M, 0.95))
                W.mul_(1 - 0.1 * group["lr"])
                W.sub_(update, alpha=group["lr"] * max(1, W.shape[0] / W.shape[1]) ** 0.5)


def make_optimizers(model: CharModel, options) -> list[torch.optim.Optimizer]:
    """Muon for the cell's two matrices and AdamW for all else; or AdamW for everything."""
    matrices = [model.rnn.input_weight, model.rnn.hidden_weight] if options.optimizer == "muon" else []
    others = [parameter for parameter in model.parameters() if parameter not in {*matrices}]
    # A short memory of squared gradients, 0.95: over few epochs, ahead of Adam's usual 0.999.
    adamw = torch.optim.AdamW(others, options.lr, betas=(0.9, 0.95))
    return [Muon(matrices, options.lr), adamw] if matrices else [adamw]


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: linear warm-up over 5 % of the steps, then half a cosine to 0."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


# ----------------------------------------------------------------------------------------- corpus

# torchrun starts WORLD processes, each for its shard of every batch; number 0 alone prints and writes.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def all_reduce(*numbers: float) -> list[float]:
    """Each number's sum over all processes."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    if WORLD > 1:
        distributed.all_reduce(sums)
    return sums.tolist()


def load_corpus(options) -> tuple[TextDataset, TextDataset]:
    """The sentences to train on and to validate (a tenth, drawn by seed); says what was left out."""
    text = read_text(CORPUS if options.data is None else options.data)
    name = printable(options.data or CORPUS.name)
    dataset = TextDataset(text, maxsent=options.maxsent, maxlen=options.maxlen, lines=options.lines)
    count, left_out = len(dataset), f"left out: {dataset.left_out()}"
    if count < 2:
        rule = "a sentence ends with . ! or ?; with --lines, each line is an example"
        raise LabError(f"{name} has {count} sentence(s), training needs 2: {rule} ({left_out})")
    held_out = max(1, count // 10)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(options.seed)).numpy()
    print(f"{name}: {count:,} sentences, {count - held_out:,} to train on, {held_out:,} to validate")
    print(textwrap.fill(left_out, 79, subsequent_indent="  "))
    lost = dataset.dropped.total() / len(text)
    if count < 1000 or lost > 0.1:
        little = f"{count:,} sentences, {lost:.0%} of the characters left out"
        print(f"warning: little to learn from: {little}", file=sys.stderr)
    return dataset.subset(order[:-held_out]), dataset.subset(order[-held_out:])


def batches(dataset, batch_size: int, *, seed=0, epoch: int | None = None, first=0) -> DataLoader:
    """This process's shard of all batches (T, B) from number `first` on; shuffled given an `epoch`."""
    sampler = BucketSampler(dataset.lengths, batch_size, shuffle=epoch is not None, seed=seed)
    sampler.set_epoch(epoch or 0)
    # A batch is sorted by length (nearly), so that every WORLD-th sentence makes shards of equal work.
    shards = [batch[RANK::WORLD] for batch in sampler][first:]
    return DataLoader(dataset, batch_sampler=shards, collate_fn=pad_collate_fn)


# --------------------------------------------------------------------------------------- training
@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # the next one
    seconds: float = 0.0  # of training steps
    nats: float = 0.0  # sums over this epoch so far
    symbols: float = 0.0
    recent_nats: float = 0.0  # sums since the training loss was last written
    recent_symbols: float = 0.0
    train_loss: float = math.inf  # of the last whole epoch, nats
    best_loss: float = math.inf  # on the validation sentences, nats
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0

    def count(self, nats: float, symbols: float, norm: float) -> None:
        """Count what a step returned; LabError at the third in a row that was not finite."""
        finite = math.isfinite(nats + norm)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == 3:
            problem = "at three steps in a row, the loss or its gradient was not finite"
            raise LabError(f"{problem}: train anew with a smaller --lr, or with --clip 1")
        if finite:
            self.nats += nats
            self.symbols += symbols
            self.recent_nats += nats
            self.recent_symbols += symbols
        else:
            self.skipped += 1


@dataclass
class Run:
    """A model and its training, at whatever step: what a checkpoint holds, and all that going on needs."""

    arguments: list[str]  # of the command line
    options: argparse.Namespace  # made of them by `run_options`
    batch_size: int  # sentences in a batch, of all processes together
    sha256: str  # of the corpus
    model: CharModel
    optimizers: list[torch.optim.Optimizer]
    progress: Progress = field(default_factory=Progress)


def new_run(arguments: list[str], sha256: str) -> Run:
    """A run before its first step, on the corpus with this SHA-256; the seed makes its weights."""
    options = run_options(arguments)
    torch.manual_seed(options.seed)
    model = CharModel(options.model, options.embedding, options.hidden)
    model.rnn.hidden_weight.data *= options.recurrent_scale
    model.to(options.device)
    batch_size = options.batch_size * WORLD
    return Run(arguments, options, batch_size, sha256, model, make_optimizers(model, options))


def train_step(run: Run, model, batch, lr: float, mean_symbols: float, steps: list | None = None):
    """One batch (T, B): forward, backward, clip, step. Returns its nats, its symbols, its gradient's norm.

    model         `run.model`, or that in DistributedDataParallel, which averages gradients over processes
    mean_symbols  of a batch: the loss is over these, so that each symbol counts alike, in any batch
    steps         a list that gets the cell's states and gates

    Nothing is learned where loss or gradient are not finite.
    """
    symbols = (batch != PAD_IX).sum()
    nats = maskedCrossEntropy(model(batch, steps), batch, PAD_IX) * symbols
    run.model.zero_grad()
    (nats * WORLD / mean_symbols).backward()
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.options.clip or math.inf).item()
    nats, symbols = all_reduce(nats.item(), symbols.item())
    if math.isfinite(nats + norm):
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
    return nats, symbols, norm


@torch.no_grad()
def evaluate(model, loader, device) -> float:
    """Nats per symbol (EOS included, BLANK excluded) over all batches of `loader`, in every process."""
    model.eval()
    nats, symbols = 0.0, 0
    for batch in loader:
        count = int((batch != PAD_IX).sum())
        batch = batch.to(device)
        nats += maskedCrossEntropy(model(batch), batch, PAD_IX).item() * count
        symbols += count
    model.train()
    nats, symbols = all_reduce(nats, symbols)
    return nats / symbols


def train(run: Run, folder: Path, train_set: TextDataset, valid_set: TextDataset) -> None:
    """Go on with a run, from wherever it stands to the last step of its last epoch; save it in `folder`."""
    options, progress = run.options, run.progress
    model = nn.parallel.DistributedDataParallel(run.model) if WORLD > 1 else run.model
    epoch_steps = math.ceil(len(train_set) / run.batch_size)
    total_steps = options.epochs * epoch_steps
    mean_symbols = (train_set.lengths + 1).sum().item() / epoch_steps  # EOS included
    monitor = Monitor(run, folder, epoch_steps, total_steps, mean_symbols)
    if progress.step == 0:
        save(run, folder / "last.pt")  # a run killed before its next save can be resumed as well
    while progress.step < total_steps:
        epoch, first = divmod(progress.step, epoch_steps)
        for batch in batches(train_set, run.batch_size, seed=options.seed, epoch=epoch, first=first):
            since = time.perf_counter()
            batch = batch.to(options.device)
            lr = options.lr * schedule(progress.step, total_steps)
            steps = [] if monitor.due(options.histograms_every) else None
            nats, symbols, norm = train_step(run, model, batch, lr, mean_symbols, steps)
            progress.count(nats, symbols, norm)
            progress.seconds += time.perf_counter() - since
            monitor.step(batch, lr, norm, steps)
            progress.step += 1
            if monitor.save_is_due() and progress.step % epoch_steps:  # at its end, an epoch saves anyway
                save(run, folder / "last.pt")

        valid_loss = evaluate(run.model, batches(valid_set, run.batch_size), options.device)
        if not math.isfinite(valid_loss):  # the last good checkpoint stays
            raise LabError("the validation loss is not finite: train anew with a smaller --lr")
        progress.train_loss = progress.nats / max(progress.symbols, 1)
        progress.nats, progress.symbols = 0.0, 0
        monitor.epoch(epoch, valid_loss)
        if valid_loss < progress.best_loss:
            progress.best_loss = valid_loss
            save(run, folder / "best.pt")
        save(run, folder / "last.pt")
    monitor.close()


# ------------------------------------------------------------------------------------ checkpoints
FORMAT = 8  # the version of what `save` writes


def save(run: Run, file: Path) -> None:
    """Write beside, flush to disk, rename: the file is the old one or the new one, never a half."""
    if RANK:
        return
    checkpoint = {
        "format": FORMAT,
        "alphabet": LETTRES,
        "arguments": run.arguments,
        "batch_size": run.batch_size,
        "sha256": run.sha256,
        "weights": dict(run.model.state_dict()),
        "moments": [optimizer.state_dict()["state"] for optimizer in run.optimizers],
        "progress": asdict(run.progress),
    }
    half = file.with_name(f"{file.name}.half")
    with open(half, "wb") as stream:
        torch.save(checkpoint, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(half, file)


def load(file: Path, *more: str) -> Run:
    """The run in a checkpoint, `more` arguments added to those of its command line.

    Runs nothing that is in it; LabError if it is not a whole one of ours.
    """
    try:
        with zipfile.ZipFile(file) as archive:  # compressed, a small file could fill the memory
            if any(entry.compress_type for entry in archive.infolist()) or archive.testzip():
                raise ValueError("its records are compressed, or a checksum is wrong")
        content = torch.load(file, map_location="cpu", weights_only=True)
        if (content["format"], content["alphabet"]) != (FORMAT, LETTRES):
            raise ValueError("it is of another format or alphabet of this program: train again")
        kinds = {"arguments": list, "batch_size": int, "sha256": str, "weights": dict, "moments": list}
        if any(type(content[name]) is not kind for name, kind in kinds.items()):
            raise ValueError("its entries are of other types")
        if not all(isinstance(argument, str) for argument in content["arguments"]):
            raise ValueError("its arguments are no text")
        arguments, weights = [*content["arguments"], *more], content["weights"]
        options = run_options(arguments)
        with torch.device("meta"):  # shapes without memory
            model = CharModel(options.model, options.embedding, options.hidden)
        model.load_state_dict(weights, assign=True)
        plain = (
            w.dtype == torch.float32 and w.is_contiguous() and w.isfinite().all() for w in weights.values()
        )
        if not all(plain):
            raise ValueError("its weights are not finite numbers")
        model.to(options.device)  # before the optimisers, whose state goes where the parameters are
        optimizers = make_optimizers(model, options)
        for optimizer, moments in zip(optimizers, content["moments"], strict=True):
            restore(optimizer, moments)
        types = {name: type(default) for name, default in asdict(Progress()).items()}
        progress = Progress(**{name: types[name](value) for name, value in content["progress"].items()})
        if progress.step < 0 or not 0 < content["batch_size"] < 10**9:
            raise ValueError("its step or batch size is out of range")
        return Run(arguments, options, content["batch_size"], content["sha256"], model, optimizers, progress)
    except LabError:
        raise
    except Exception as error:  # whatever zipfile, torch or our own lines meet
        raise LabError(f"cannot read {file} as a checkpoint of this lab: {error!r:.150}") from None


def restore(optimizer, moments: dict) -> None:
    """Give an optimiser its state back; ValueError unless it has the shapes of the parameters."""
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    names = {"momentum"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
    for parameter, state in optimizer.state.items():
        shapes = dict.fromkeys(names, parameter.shape) | {"step": torch.Size()}
        fit = (
            moment.shape == shapes[name] and moment.dtype == torch.float32 and moment.is_contiguous()
            for name, moment in state.items()
        )
        if state.keys() != names or not all(fit) or not state.get("step", 0) >= 0:
            raise ValueError("the optimiser's moments do not fit its parameters")


def corpus_of(run: Run) -> tuple[TextDataset, TextDataset]:
    """The sentences that a run was trained and validated on; LabError if it is another text now."""
    train_set, valid_set = load_corpus(run.options)
    if train_set.sha256 != run.sha256:
        raise LabError("this run was trained on another text: name it with --data")
    return train_set, valid_set


# ------------------------------------------------------------------------------------- monitoring
class Monitor:
    """What a run shows while it trains, in TensorBoard and on the terminal; silent but in process 0."""

    def __init__(self, run: Run, folder: Path, epoch_steps: int, total_steps: int, mean_symbols: float):
        from torch.utils.tensorboard import SummaryWriter  # slow to import; only training needs it

        self.run = run
        self.epoch_steps = epoch_steps
        self.total_steps = total_steps
        self.mean_symbols = mean_symbols
        print(f"{run.model.cell} with {size(run.model):,} parameters", end=", ")
        print(f"{total_steps:,} steps, in {printable(folder)}")
        self.writer = None if RANK else SummaryWriter(folder, purge_step=run.progress.step)
        hidden = True if RANK else None  # None: unless on a terminal
        self.bar = tqdm(total=total_steps, initial=run.progress.step, leave=False, disable=hidden)
        self.last_save = time.monotonic()

    def due(self, every: int) -> bool:
        """Whether this step is one to write: each `every`-th, and the last; 0 is never."""
        step = self.run.progress.step
        return self.writer is not None and every > 0 and (step % every == 0 or step == self.total_steps - 1)

    def save_is_due(self) -> bool:
        """Whether `save_every` seconds (0: never) have gone by since the last time it was."""
        every, now = self.run.options.save_every, time.monotonic()
        due = every > 0 and now - self.last_save >= every
        self.last_save = now if due else self.last_save
        return due

    def step(self, batch, lr: float, norm: float, steps: list | None) -> None:
        """Show a training step: its batch (T, B), learning rate, gradient's norm, states and gates."""
        progress, options = self.run.progress, self.run.options
        if steps and progress.skipped_in_a_row == 0:
            self.histograms(batch != PAD_IX, steps)
        if self.due(options.scalars_every) and progress.recent_symbols:
            speed = (progress.step + 1) * self.mean_symbols / progress.seconds
            loss = progress.recent_nats / progress.recent_symbols
            self.writer.add_scalar("1_loss/train", loss, progress.step)
            self.writer.add_scalar("4_gradient/norm_before_clipping", norm, progress.step)
            self.writer.add_scalar("8_training/learning_rate", lr, progress.step)
            self.writer.add_scalar("8_training/characters_per_second", speed, progress.step)
            self.writer.flush()  # so that a run that is killed has all points before its last save
            progress.recent_nats, progress.recent_symbols = 0.0, 0.0
        epoch, done = divmod(progress.step, self.epoch_steps)
        now = "validating" if done == self.epoch_steps - 1 else f"epoch {epoch + 1}/{options.epochs}"
        self.bar.set_description(now, refresh=False)
        self.bar.set_postfix_str(f"{progress.nats / max(progress.symbols, 1):.3f} nats", refresh=False)
        self.bar.update()

    def histograms(self, real, steps: list) -> None:
        """Every parameter, its gradient, and every state and gate where `real` (T, B) is true."""
        model, step = self.run.model, self.run.progress.step
        values = {f"6_gradients/{name}": p.grad for name, p in model.named_parameters()}
        values |= {f"7_parameters/{name}": p.detach() for name, p in model.named_parameters()}
        for name in steps[0]:
            gate = torch.stack([states[name] for states in steps]).detach()[real]  # (real symbols, H)
            values[f"5_gates/{model.cell}_{name}"] = gate
        for tag, value in values.items():
            self.writer.add_histogram(tag, value.cpu(), step, bins=64)

    def epoch(self, epoch: int, valid_loss: float) -> None:
        """Show losses and samples at an epoch's end."""
        if self.writer is None:
            return
        progress, options, step = self.run.progress, self.run.options, self.run.progress.step - 1
        bits, guess = valid_loss / math.log(2), math.log(len(id2lettre))
        speed = f"{progress.step * self.mean_symbols / progress.seconds:,.0f} characters/s"
        losses = f"training {progress.train_loss:.3f} nats, validation {valid_loss:.3f} nats"
        self.writer.add_scalar("1_loss/validation", valid_loss, step)
        self.writer.add_scalar("8_training/validation_bits_per_character", bits, step)
        self.bar.clear()
        print(f"epoch {epoch + 1}/{options.epochs}: {losses}")
        print(f"  {bits:.3f} bits per character, {speed}, {progress.seconds:.1f} s of training")
        if progress.skipped:
            print(f"  {progress.skipped:,} steps skipped so far: their loss or gradient was not finite")
        if valid_loss > guess:
            print(f"  worse than a guess ({guess:.2f} nats): choose a smaller --lr")
        width = max(20, shutil.get_terminal_size().columns - 16)
        for name, h in samples(self.run.model, "", options.seed + epoch).items():
            text = h.text + ("" if h.ended else " …")
            self.writer.add_text(f"samples/{name}", f"    {text}", step)  # indented: a code block
            print(f"  {name:12s}  {textwrap.shorten(text, width, placeholder='…')}")
        self.writer.flush()

    def close(self) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()


def size(model) -> int:
    """The number of its parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def samples(model, start: str, seed: int) -> dict:
    """What each decoder but exact search makes of `start`: its name → Hypothesis."""
    written = {}
    for name, command in DECODERS.items():
        if name != "exact":  # which may take long
            options = decoder_parser().parse_args([*command.split(), f"--start={start}", f"--seed={seed}"])
            written[name] = decode(model, options)[0]
    return written


def rewrite_events(folder: Path, part: str):
    """A SummaryWriter whose file, marked by `part`, takes the place of the one that it wrote before."""
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.glob(f"events*.{part}"):
        old.unlink()
    return SummaryWriter(folder, filename_suffix=f".{part}")


# ------------------------------------------------------------------------- a trained model, inside
def table(rows: list[dict]) -> str:
    """Rows of like keys as a Markdown table."""
    lines = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip([*rows[0]], *lines, strict=True)]
    lines = [[*rows[0]], ["-" * width for width in widths], *lines]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


LAGS = 40  # characters that a loss is followed back


def gradient_flow(model, batch, lags: int = LAGS) -> dict[str, torch.Tensor]:
    """How far back a loss reaches: ‖∂loss_t/∂s_{t−k}‖ for each state s and k = 0 … lags, mean over sentences.

    Of each sentence in batch (T, B) longer than `lags`, one symbol t is drawn and only its loss counts: one
    backward pass then gives all gradients. Returns state → (lags + 1,), less where half of them are short.
    """
    lengths = (batch != PAD_IX).sum(0)
    lags = min(lags, int(lengths.median()) - 1)
    batch, lengths = batch[:, lengths > lags], lengths[lengths > lags]
    draw = torch.rand(len(lengths), generator=torch.Generator().manual_seed(0))
    t, b = lags + (draw * (lengths - lags)).long(), torch.arange(len(lengths))
    steps = []
    logits = model(batch, steps)
    loss = F.cross_entropy(logits[t, b], batch[t, b], reduction="sum")
    flow = {}
    for name in model.rnn.states:
        states = [step[name] for step in steps]
        slopes = torch.autograd.grad(loss, states, retain_graph=True, materialize_grads=True)
        norms = torch.stack(slopes).norm(dim=-1)  # (T, B)
        flow[name] = norms.gather(0, t - torch.arange(lags + 1)[:, None]).mean(1)
    return flow


def both_flows(run: Run, valid_set) -> dict[str, dict]:
    """A model's gradient flow over 64 validation sentences, long ones first, "at_start" and "trained"."""
    order = np.argsort(-np.minimum(valid_set.lengths, LAGS), kind="stable")
    batch = pad_collate_fn([valid_set[i] for i in order[:64]])
    start = new_run([*run.arguments, "--device=cpu"], run.sha256).model
    return {"at_start": gradient_flow(start, batch), "trained": gradient_flow(run.model, batch)}


# What a person can say of the character just read: the stretches of text where it holds, then counts.
STRETCHES = {
    "inside a quotation": r'"[^"]*"?',
    "inside brackets": r"[(\[][^)\]]*",
    "in a capitalised word": r"[A-Z][\w']*",
    "in a number": r"\d[\d.,]*",
    "after a vowel": r"[aeiouAEIOU]",
    "after a space": r" ",
}
FEATURES = (*STRETCHES, "position in the sentence", "position in the word")


def features(text: str) -> torch.Tensor:
    """FEATURES after 0, 1, … n characters of `text`, a stretch as 1 or 0: (features, n + 1)."""
    values = torch.zeros(len(FEATURES), len(text) + 1)
    for row, pattern in zip(values, STRETCHES.values(), strict=False):
        for match in re.finditer(pattern, text):
            row[match.start() + 1 : match.end() + 1] = 1
    values[-2] = torch.arange(len(text) + 1)
    values[-1] = torch.tensor([n - 1 - text.rfind(" ", 0, n) for n in range(len(text) + 1)])
    return values


Unit = namedtuple("Unit", "feature gate row r")  # a unit that follows a feature with correlation r


@torch.no_grad()
def named_units(model, loader) -> list[Unit]:
    """For each of FEATURES, the unit of all gates and states that follows it most closely, if one does."""
    known, seen = [], {}
    for batch in loader:
        steps = []
        model(batch, steps)
        known += [features(code2string(codes)) for codes in batch.T.tolist()]
        for gate in steps[0]:
            values = torch.stack([step[gate] for step in steps], 1)  # (B, T, H)
            seen.setdefault(gate, []).append(values[(batch != PAD_IX).T])  # (real symbols, H), by sentence
    known = torch.cat(known, 1)  # (features, symbols)
    units = []
    for gate, parts in seen.items():
        both = torch.cat([known, torch.cat(parts).T])  # (features + H, symbols)
        correlations = both.corrcoef()[: len(known), len(known) :].nan_to_num()
        for feature, follows in zip(FEATURES, correlations, strict=True):
            row = int(follows.abs().argmax())
            units.append(Unit(feature, gate, row, follows[row].item()))
    closest = {unit.feature: unit for unit in sorted(units, key=lambda unit: abs(unit.r))}
    named = [unit for unit in closest.values() if abs(unit.r) >= 0.3]  # else not worth a name
    return sorted(named, key=lambda unit: -abs(unit.r))


@torch.no_grad()
def picture(model, units: list[Unit], text: str, columns: int = 20):
    """Units on `text` as an image, uint8 (height, width, 3), a row a unit; it goes on below after `columns`.

    Blue is negative, white 0, red positive. Below the first memory unit that follows a position: its f, i, o.
    """
    from PIL import Image, ImageDraw, ImageFont  # comes with TensorBoard

    steps = []
    model(pad_collate_fn([string2code(text)]), steps)
    values = {
        gate: torch.cat([step[gate] for step in steps[1:]]) for gate in steps[0]
    }  # after each character
    rows = {}
    for unit in units:
        rows[f"{unit.gate} {unit.row} · {unit.feature} · r {unit.r:.2f}"] = values[unit.gate][:, unit.row]
        if unit.gate == "C" and unit.feature.startswith("position") and "its f" not in rows:
            rows |= {f"its {gate}": values[gate][:, unit.row] for gate in "fio" if gate in values}
    width, height, margin = 22, 36, 500  # of a character, of a row, of the labels; pixels
    block = height * (len(rows) + 1)
    image = Image.new("RGB", (margin + width * columns, block * math.ceil(len(text) / columns)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(22)
    for y, (label, row) in enumerate(rows.items()):
        for i, value in enumerate((row / row.abs().max().clamp(min=1)).tolist()):
            left, top = margin + width * (i % columns), height * y + block * (i // columns)
            pale = round(255 - 160 * abs(value))
            colour = (255, pale, pale) if value > 0 else (pale, pale, 255)
            draw.rectangle((left, top, left + width - 1, top + height - 3), colour)
            draw.text((left + width / 2, top + height / 2), text[i], "black", font, anchor="mm")
            if i % columns == 0:
                draw.text((margin - 8, top + height / 2), label, "black", font, anchor="rm")
    return np.asarray(image)


def find_units(run: Run, valid_set) -> tuple[list[Unit], str]:
    """The named units of a run's model over some validation sentences, and a table of them, printed."""
    loader = batches(valid_set, run.batch_size)
    units = named_units(run.model, [*loader][:: math.ceil(len(loader) / 8)])  # at most eight, of all lengths
    rows = [{"unit": f"{u.gate} {u.row}", "follows": u.feature, "correlation": u.r} for u in units]
    text = table(rows) if rows else "none"
    print(f"Units of this {run.model.cell} that follow the text:\n{text}")
    return units, text


def look_inside(folder: Path, valid_set) -> None:
    """Show what the best model of a run does: its units on three sentences, its gradient flow."""
    run = load(folder / "best.pt", "--device=cpu")
    (units, text), flows = find_units(run, valid_set), both_flows(run, valid_set)
    near_40 = sorted(valid_set.sentences, key=lambda sentence: abs(len(sentence) - 40))
    with rewrite_events(folder, "on_text") as writer:
        writer.add_text("units", text)
        for i, sentence in enumerate(near_40[:3]):
            writer.add_image("3_units/on_text", picture(run.model, units, sentence), i, dataformats="HWC")
        for when, flow in flows.items():
            for state, norms in flow.items():
                for lag, norm in enumerate(norms.clamp(min=1e-30).log10().tolist()):
                    writer.add_scalar(f"2_gradient_flow/log10_{state}_{when}", norm, lag)
    before, after = flows["at_start"]["h"], flows["trained"]["h"]
    print(f"Gradient {len(after) - 1} characters back: {before[-1]:.1e} at start, {after[-1]:.1e} trained.")


def look(options) -> None:
    """Show the units of a trained run on a text."""
    text = code2string(codes_of(options.look))
    if not text.strip() or len(text) > 1000:
        raise LabError("--look: give a text of at most 1,000 characters")
    file = find_checkpoint(options.resume, "best.pt")
    run = load(file, "--device=cpu", *given(options, "data"))
    _, valid_set = corpus_of(run)
    units, _ = find_units(run, valid_set)
    with rewrite_events(file.parent, "look") as writer:
        writer.add_image("3_units/look", picture(run.model, units, text), 0, dataformats="HWC")
    print(f"Their picture is 3_units/look of {printable(file.parent)}.")
    say_next(("tensorboard --logdir", file.parent.parent))


# -------------------------------------------------------------------------------------- comparing
def originality(texts: list[str], corpus: str) -> dict[str, float]:
    """Learned or copied: the shares of the texts' words and substrings of 16 and 32 that `corpus` has."""
    words = [word for text in texts for word in re.findall(r"[\w']+", text.lower())]
    known = set(re.findall(r"[\w']+", corpus.lower()))
    shares = {"known": sum(word in known for word in words) / max(len(words), 1)}
    for n in (16, 32):
        spans = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
        shares[f"copied {n}"] = sum(span in corpus for span in spans) / max(len(spans), 1)
    return shares | {"length": int(np.median([len(text) for text in texts]))}


def compare_sentences(runs: dict[str, Run], train: list, valid: list) -> tuple[list[dict], str]:
    """What decoders make of the same 20 starts: a table of how much was copied, and the first sentences."""
    corpus = "\n".join(train)
    starts = ["", *dict.fromkeys(text.split()[0] + " " for text in valid)][:20]
    rows = [{"run": "corpus", "decoder": "", **originality(valid[:200], corpus), "ended": 1.0}]
    firsts = ""
    for name, run in runs.items():
        by_start = [samples(run.model, start, seed) for seed, start in enumerate(starts)]
        for decoder in by_start[0]:
            hypotheses = [written[decoder] for written in by_start]
            texts = [h.text for h in hypotheses]
            ended = sum(h.ended for h in hypotheses) / len(hypotheses)
            rows.append({"run": name, "decoder": decoder, **originality(texts, corpus), "ended": ended})
            firsts += f"    {name}, {decoder}:\n{textwrap.indent(textwrap.fill(texts[0], 72), ' ' * 8)}\n"
    return rows, firsts


def comparable(folders: list[Path], data: list[str]) -> dict[str, Run]:
    """The best checkpoint of each run in the folders, by name; LabError unless all have one corpus."""
    files = sorted({file for folder in folders for file in folder.glob("**/best.pt")})
    if not files:
        raise LabError(f"no run in {', '.join(map(str, folders))}: train some with tp5.py --model all")
    top = Path(os.path.commonpath([file.parent.parent for file in files]))
    runs, groups = {}, {}
    for file in files:
        name, run = file.parent.relative_to(top).as_posix(), load(file, "--device=cpu", *data)
        runs[name], o = run, run.options
        groups.setdefault((run.sha256, o.seed, o.maxlen, o.maxsent, o.lines), []).append(name)
    if len(groups) > 1:
        raise LabError(f"compare runs on the same sentences, one of these groups: {[*groups.values()]}")
    return dict(sorted(runs.items(), key=lambda item: [*CELLS].index(item[1].model.cell)))


def compare(names: list, data: list[str]) -> None:
    """The runs side by side: loss, gradient flow, what their decoders write, how much of that is copied."""
    folders = [Path(name).absolute() for name in names]
    folder = folders[0] if len(folders) == 1 else folders[0].parent
    runs = comparable(folders, data)
    train_set, valid_set = corpus_of(next(iter(runs.values())))
    losses, lags = [], []
    for name, run in runs.items():
        best = run.progress.best_loss
        row = {"run": name, "parameters": f"{size(run.model):,}", "seconds": round(run.progress.seconds)}
        row |= {"training": f"{run.progress.train_loss:.3f}", "validation": f"{best:.3f}"}
        losses.append(row | {"bits": f"{best / math.log(2):.3f}"})
        for when, flow in both_flows(run, valid_set).items():
            for state, norms in flow.items():
                by_lag = {str(lag): norms[lag].item() for lag in range(0, len(norms), 10)}
                lags.append({"run": name, "of": state, "when": when.replace("_", " "), **by_lag})
    shares, firsts = compare_sentences(runs, train_set.sentences, valid_set.sentences)
    text = f"""## Loss, in nats per symbol, and validation loss in bits\n\n{table(losses)}

## Norm of the gradient, by how many characters it goes back\n\n{table(lags)}

## Shares of known words and copied substrings, median length, share that ended\n\n{table(shares)}

## What they write without a start\n\n{firsts}"""
    print(f"\n{text}")
    with rewrite_events(folder / "comparison", "comparison") as writer:
        writer.add_text("comparison", text)
    (folder / "comparison" / "comparison.md").write_text(text, encoding="utf-8")
    say_next(("tensorboard --logdir", folder))


# ----------------------------------------------------------------------------------- command line
EPOCHS = 5
LR = {"muon": 0.05, "adamw": 0.008}
BATCH_SIZE = {"muon": 64, "adamw": 32}


def command_parser(**options) -> argparse.ArgumentParser:
    """All options of the command line, with their ranges and defaults."""
    about = "Train a character model with a recurrent cell written by hand. (Defaults in parentheses.)"
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False, **options)
    width, many = in_range(int, 1, 8192), in_range(int, 1, 10_000)
    whole, positive = in_range(int, 0, 10**9), in_range(float, 0, 1e9)
    lr, batch = (", ".join(f"{name} {value}" for name, value in by.items()) for by in (LR, BATCH_SIZE))
    add = parser.add_argument
    # fmt: off
    add("--model", nargs="+", choices=[*CELLS, "all"], default=["lstm"], help="several are compared (lstm)")
    add("--data", metavar="PATH", help=f"a UTF-8 text file (data/{CORPUS.name})")
    add("--lines", action="store_true", help="each line is an example, with or without full stops")
    add("--epochs", type=in_range(int, 1, 10**6), metavar="N", help=f"passes over the text ({EPOCHS})")
    add("--batch-size", type=width, metavar="B", help=f"sentences in a process's batch ({batch})")
    add("--embedding", type=width, default=128, metavar="E", help="size of an embedding (%(default)s)")
    add("--hidden", type=width, default=256, metavar="H", help="size of the hidden state (%(default)s)")
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="of the cell's matrices (%(default)s)")
    add("--lr", type=positive, metavar="RATE", help=f"peak learning rate ({lr})")
    add("--clip", type=positive, default=1.0, metavar="NORM",
        help="clip gradients to it (%(default)s; 0: never)")
    add("--recurrent-scale", type=positive, default=1.0, metavar="FACTOR",
        help="on the initial recurrent matrices (%(default)s); 3 makes an rnn's gradients explode")
    add("--seed", type=whole, default=0, help="of the split, the weights, the shuffling (%(default)s)")
    add("--maxlen", type=many, default=2000, metavar="N", help="leave out longer sentences (%(default)s)")
    add("--maxsent", type=in_range(int, 2, 10**9), metavar="N", help="use the first N sentences only")
    add("--device", choices=("cpu", "cuda"), help="where to compute (cuda where there is one)")
    add("--scalars-every", type=whole, default=20, metavar="N", help="steps (%(default)s; 0: never)")
    add("--histograms-every", type=whole, default=50, metavar="N", help="steps (%(default)s; 0: never)")
    add("--save-every", type=positive, default=30.0, metavar="S",
        help="save after S seconds (%(default)s; 0: no)")
    add("--run", metavar="FOLDER", help="where the run goes (runs/MODEL-DATE_TIME)")
    add("--resume", nargs="?", const="", metavar="RUN",
        help="go on with a run (alone: the newest); with --epochs N, train a finished one on")
    add("--compare", nargs="+", metavar="RUN", help="compare trained runs, or all in a folder")
    add("--look", metavar="TEXT", help="a trained run's units on a text (of --resume RUN, else the newest)")
    # fmt: on
    return parser


def refuse_all_but(parser, options, mode: str, *allowed: str) -> None:
    """End with argparse's error if an option was given that does not go with --MODE."""
    for name, value in vars(options).items():
        if name not in (mode, *allowed) and value != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} does not go with --{mode}")


def run_options(arguments: list[str]) -> argparse.Namespace:
    """The options of one run, defaults filled in; ValueError where one is out of range."""
    parser = command_parser(add_help=False)

    def refuse(message: str):
        raise ValueError(message)

    parser.error = refuse
    options = parser.parse_args(arguments)
    filled_in = {
        "model": options.model[0],
        "epochs": options.epochs or EPOCHS,
        "lr": LR[options.optimizer] if options.lr is None else options.lr,
        "batch_size": options.batch_size or BATCH_SIZE[options.optimizer],
        "device": options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    }
    return argparse.Namespace(**vars(options) | filled_in)


def given(options, *names: str) -> list[str]:
    """Those of the named options that were given, as arguments."""
    values = {name: getattr(options, name) for name in names}
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def train_new(options, arguments: list[str]) -> None:
    """Train a new run of each model that is asked for, on the same batches; then compare them."""
    models = list(CELLS) if "all" in options.model else options.model
    folder = Path(options.run or RUNS / f"{'-'.join(models)}-{time.strftime('%Y-%m-%d_%H%M%S')}")
    folders = {model: folder / model if len(models) > 1 else folder for model in models}
    train_set, valid_set = load_corpus(options)
    for run_folder in folders.values():
        if not RANK and any(run_folder.glob("*.pt")):
            raise LabError(f"{run_folder} holds a run already: go on with --resume, or choose another --run")
    for model, run_folder in folders.items():
        finish(new_run([*arguments, f"--model={model}"], train_set.sha256), run_folder, train_set, valid_set)
    if len(models) > 1 and not RANK:
        compare([*folders.values()], given(options, "data"))


def resume(options) -> None:
    """Go on with a run; one that has finished is looked inside anew, or trained further given --epochs."""
    file = find_checkpoint(options.resume, "last.pt")
    run = load(file, *given(options, "data", "epochs", "device"))
    train_set, valid_set = corpus_of(run)
    print(f"going on after step {run.progress.step:,}")
    finish(run, file.parent, train_set, valid_set)


def finish(run: Run, folder: Path, train_set, valid_set) -> None:
    """Train to the end, look inside, and say what comes next."""
    try:
        train(run, folder, train_set, valid_set)
    except KeyboardInterrupt:
        say_next((f"python {Path(sys.argv[0]).name} --resume", folder))
        raise
    if not RANK:
        look_inside(folder, valid_set)
    write = "python generate.py --beam 5 --checkpoint", folder
    say_next(write, ("tensorboard --logdir", folder.parent))


def keep_freed_memory() -> None:
    """Let glibc keep the memory of a step for the next, which else fetches it page by page: a default step
    with T 100 took 121 ms with this and 168 without."""
    with suppress(OSError, AttributeError, TypeError):  # other systems' libraries have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def main() -> None:
    parser = command_parser()
    options = parser.parse_args()
    if options.compare is not None:
        refuse_all_but(parser, options, "compare", "data")
    elif options.look is not None:
        refuse_all_but(parser, options, "look", "data", "resume")
    elif options.resume is not None:
        refuse_all_but(parser, options, "resume", "data", "epochs", "device")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise LabError("--device cuda: this PyTorch sees no CUDA device; leave it out to train on the CPU")
    keep_freed_memory()
    if WORLD > 1:
        if torch.cuda.is_available() and options.device != "cpu":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group()  # gloo on the CPU, nccl on CUDA
    with redirect_stdout(None if RANK else sys.stdout):
        if options.compare is not None:
            compare(options.compare, given(options, "data"))
        elif options.look is not None:
            look(options)
        elif options.resume is not None:
            resume(options)
        else:
            train_new(options, sys.argv[1:])
    if WORLD > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    guard(main)
