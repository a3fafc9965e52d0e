"""Questions 2, 4 and 5: recurrent cells by hand, and a character model trained with them.

    python tp5.py --model lstm                   # or all: the three cells, then a comparison
    tensorboard --logdir runs

First the lab: loss, cells, model, optimiser, corpus, training. Then, each for itself, what is around it.
Shapes: T length, B batch, E embedding, H hidden, V symbols, G gates; time comes first. Losses in nats.
"""

import argparse
import ctypes
import hashlib
import io
import math
import os
import pickletools
import re
import sys
import textwrap
import time
import zipfile
from collections import namedtuple
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import distributed, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from generate import DECODERS, codes_of, decode
from generate import command_parser as decoder_parser
from textloader import CORPUS, EOS_IX, LETTRES, PAD_IX, RUNS, ArgumentParser, BucketSampler, LabError
from textloader import TextDataset, checkpoints, code2string, describe, encode, find_checkpoint, guard
from textloader import in_range, lettres_of, pad_collate_fn, printable, read_text, say_next


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
            nn.init.orthogonal_(gate)  # W_h·h is as long as h

    def project(self, x):
        """W_x·x + b of every gate: (…, E) → (…, G·H)."""
        return F.linear(x, self.input_weight, self.bias)

    def one_step(self, projected, *states) -> dict[str, torch.Tensor]:
        """From `projected` (B, G·H) and the states (B, H): the new states, and gates to look at, by name."""
        raise NotImplementedError(f"this cell: {type(self).__name__}.one_step")

    def unroll(self, projected, states=None, trace: list | None = None):
        """All time steps: projected (T, B, G·H) → every h (T, B, H), and the states after the last step.

        `states` is a tuple of (B, H), None: zeros; the list `trace` gets what each `one_step` returns.
        """
        if states is None:
            states = (projected.new_zeros(projected.shape[1], self.hidden_size),) * len(self.states)
        output = []
        for projected_t in projected.unbind():
            values = self.one_step(projected_t, *states)
            states = tuple(values[name] for name in self.states)
            output.append(values["h"])
            if trace is not None:
                trace.append(values)
        return torch.stack(output), states

    def forward(self, x, states=None):
        """Called like `torch.nn.LSTM`: x (T, B, E) → output (T, B, H), and the states after it."""
        return self.unroll(self.project(x), states)


class RNN(Cell):
    """h_t = tanh(W·[h_{t-1}, x_t] + b)    (Elman 1990)"""

    gates = ("h",)

    def one_step(self, projected, h):
        return {"h": torch.tanh(projected + h @ self.hidden_weight.T)}


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
        nn.init.ones_(self.bias[:hidden_size])  # the forget gate's: at first f is 0.7, not 0.5

    def one_step(self, projected, h, C):
        f, i, candidate, o = (projected + h @ self.hidden_weight.T).chunk(4, dim=-1)
        f = torch.sigmoid(f)
        i = torch.sigmoid(i)
        candidate = torch.tanh(candidate)
        C = f * C + i * candidate
        o = torch.sigmoid(o)
        h = o * torch.tanh(C)
        return {"f": f, "i": i, "candidate": candidate, "o": o, "C": C, "h": h}


class GRU(Cell):
    """Gated recurrent unit (Cho et al. 2014; z of Chung et al. 2014), without biases as in the handout.

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
        return {"z": z, "r": r, "candidate": candidate, "h": h}


CELLS = {"rnn": RNN, "gru": GRU, "lstm": LSTM}


# ------------------------------------------------------------------------------------------ model
class CharModel(nn.Module):
    """Question 4: embedding, cell, and a linear decoder from hidden state to logits."""

    def __init__(self, cell: str, embedding_size: int, hidden_size: int, lettres: str = LETTRES):
        super().__init__()
        self.emb = nn.Embedding(len(lettres) + 2, embedding_size)  # BLANK and EOS, too
        self.emb.lettres = lettres  # for the decoders
        self.rnn = CELLS[cell](embedding_size, hidden_size)
        self.decoder = nn.Linear(hidden_size, len(lettres) + 2)

    def forward(self, targets, trace: list | None = None):
        """Targets (T, B), each sentence closed by EOS → logits (T, B, V) of each, given those before it."""
        inputs = F.pad(targets[:-1], (0, 0, 1, 0), value=EOS_IX)  # EOS opens
        table = self.rnn.project(self.emb.weight)  # (V, G·H): a look-up in it is project(emb(inputs))
        output, _ = self.rnn.unroll(F.embedding(inputs, table), trace=trace)  # (T, B, H)
        return self.decoder(output)


# -------------------------------------------------------------------------------------- optimiser
# Three aσ + bσ³ + cσ⁵ in turn bring any σ in [0.01, 1] to 1 ± 0.27 (cf. Polar Express, Amsel et al. 2025)
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
                M = self.state[W].setdefault("momentum", torch.zeros_like(W))
                M.lerp_(W.grad, 0.05)
                update = orthogonal(W.grad.lerp(M, 0.95))
                W.mul_(1 - 0.1 * group["lr"])
                W.sub_(update, alpha=group["lr"] * max(1, W.shape[0] / W.shape[1]) ** 0.5)


def make_optimizers(model: CharModel, options) -> list[torch.optim.Optimizer]:
    """Muon for the cell's two matrices and AdamW for all else; or AdamW for everything."""
    betas = (0.9, 0.95)  # a short memory of squared gradients: over few epochs, ahead of Adam's usual 0.999
    if options.optimizer == "adamw":
        return [torch.optim.AdamW(model.parameters(), options.lr, betas)]
    matrices = [model.rnn.input_weight, model.rnn.hidden_weight]
    names = ("rnn.input_weight", "rnn.hidden_weight")
    others = [parameter for name, parameter in model.named_parameters() if name not in names]
    return [Muon(matrices, options.lr), torch.optim.AdamW(others, options.lr, betas)]


def schedule(step: int, total_steps: int) -> float:
    """Factor on the learning rate: linear warm-up over 5 % of the steps, then half a cosine to 0."""
    warmup = max(1, total_steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup))) / 2


# ----------------------------------------------------------------------------------------- corpus
# torchrun starts WORLD processes, each for its shard of every batch; number 0 alone shows and saves.
WORLD = int(os.environ.get("WORLD_SIZE") or 1)
RANK = int(os.environ.get("RANK") or 0) if WORLD > 1 else 0


def sum_over_processes(*numbers: float) -> list[float]:
    """Each number's sum over all processes."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    if WORLD > 1:
        distributed.all_reduce(sums)
    return sums.tolist()


def load_corpus(options, lettres: str | None = None, sha256: str | None = None):
    """Two TextDatasets, to train on and to validate (a tenth, drawn by seed); LabError if not of `sha256`."""
    file = Path(options.data or CORPUS)
    text = read_text(file)
    unit = "line" if options.lines else "block" if options.blocks else "sentence"
    lettres = lettres or lettres_of(text)
    dataset = TextDataset(text, maxsent=options.maxsent, maxlen=options.maxlen, unit=unit, lettres=lettres)
    if sha256 not in (None, dataset.sha256):
        raise LabError(f"{file} is another text than this run was trained on: name that with --data")
    if sha256 is None:  # a new run's
        describe(dataset, text, file.name)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(options.seed)).numpy()
    held_out = len(dataset) // 10
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
        if math.isfinite(nats + norm):
            self.nats += nats
            self.symbols += symbols
            self.recent_nats += nats
            self.recent_symbols += symbols
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == 3:
            raise LabError("three steps in a row were not finite: train anew with a smaller --lr or --clip 1")


@dataclass
class Run:
    """A model and its training, at whatever step: what a checkpoint holds, and all that going on needs."""

    options: argparse.Namespace  # of the command line
    global_batch_size: int  # sentences, of all processes together
    sha256: str  # of the corpus
    model: CharModel
    optimizers: list[torch.optim.Optimizer]
    progress: Progress = field(default_factory=Progress)


def new_run(options, corpus: TextDataset) -> Run:
    """A run before its first step; the seed makes its weights, or they are those of the run `--init`."""
    torch.manual_seed(options.seed)
    model = CharModel(options.model, options.embedding, options.hidden, corpus.lettres)
    if options.init:
        model.load_state_dict(load(Path(options.init), device="cpu").model.state_dict())
    model.to(options.device)
    return Run(options, options.batch_size * WORLD, corpus.sha256, model, make_optimizers(model, options))


def nats_of(model, batch, trace: list | None = None):
    """The loss of a batch (T, B) in nats, summed over its symbols, and how many these are."""
    symbols = (batch != PAD_IX).sum()
    return maskedCrossEntropy(model(batch, trace), batch, PAD_IX) * symbols, symbols


def train_step(run: Run, batch, lr: float, mean_symbols: float, trace: list | None = None):
    """One batch: forward, backward, clip, step. Returns its nats, its symbols, its gradient's norm.

    The loss is divided by the `mean_symbols` of a batch: each symbol counts alike, in any batch.
    """
    nats, symbols = nats_of(run.model, batch, trace)
    run.model.zero_grad()
    (nats / mean_symbols).backward()
    if WORLD > 1:
        for parameter in run.model.parameters():
            distributed.all_reduce(parameter.grad)  # the sum over all processes
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.options.clip or math.inf).item()
    nats, symbols = sum_over_processes(nats.item(), symbols.item())
    if math.isfinite(nats + norm):  # else nothing is learned
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
    return nats, symbols, norm


@torch.no_grad()
def evaluate(model, loader, device) -> float:
    """Nats per symbol (EOS included, BLANK excluded) over all batches of `loader`, in every process."""
    model.eval()
    nats = 0.0
    symbols = 0
    for batch in loader:
        of_batch = nats_of(model, batch.to(device))
        nats += of_batch[0].item()
        symbols += of_batch[1].item()
    model.train()
    nats, symbols = sum_over_processes(nats, symbols)
    return nats / symbols


def train(run: Run, folder: Path, train_set: TextDataset, valid_set: TextDataset) -> None:
    """Go on with a run, from wherever it stands to the last step of its last epoch; save it in `folder`."""
    options = run.options
    progress = run.progress
    epoch_steps = math.ceil(len(train_set) / run.global_batch_size)
    total_steps = options.epochs * epoch_steps
    mean_symbols = (train_set.lengths + 1).sum().item() / epoch_steps  # EOS included
    monitor = Monitor(run, folder, epoch_steps, total_steps)
    saved_at = progress.seconds
    while progress.step < total_steps:
        epoch, first = divmod(progress.step, epoch_steps)
        for batch in batches(train_set, run.global_batch_size, seed=options.seed, epoch=epoch, first=first):
            since = time.perf_counter()
            batch = batch.to(options.device)
            lr = options.lr * schedule(progress.step, total_steps)
            trace = [] if monitor.due(options.histograms_every) else None
            nats, symbols, norm = train_step(run, batch, lr, mean_symbols, trace)
            progress.count(nats, symbols, norm)
            progress.seconds += time.perf_counter() - since
            monitor.after_step(batch, lr, norm, trace)
            progress.step += 1
            due = progress.seconds - saved_at >= (options.save_every or math.inf)
            if due and progress.step % epoch_steps:  # not between an epoch and its validation
                save(run, folder / "last.pt")
                saved_at = progress.seconds
        valid_loss = evaluate(run.model, batches(valid_set, run.global_batch_size), options.device)
        if not math.isfinite(valid_loss):  # the last good checkpoint stays
            raise LabError("the validation loss is not finite: train anew with a smaller --lr")
        progress.train_loss = progress.nats / max(progress.symbols, 1)
        progress.nats = 0.0
        progress.symbols = 0.0
        monitor.after_epoch(epoch, valid_loss)
        if valid_loss < progress.best_loss:
            progress.best_loss = valid_loss
            save(run, folder / "best.pt")
        save(run, folder / "last.pt")
    monitor.close()


# ------------------------------------------------------------------------------------ checkpoints
FORMAT = 10  # the version of what `save` writes
# All that the pickle in a checkpoint may name: code and large objects need others.
PICKLED = {"torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict"}


def save(run: Run, file: Path) -> None:
    """Write beside, flush to disk, rename: the file is the old one or the new one, never a half.

    What torch writes is followed by its SHA-256, 32 bytes.
    """
    if RANK:
        return
    checkpoint = {
        "format": FORMAT,
        "alphabet": run.model.emb.lettres,
        "options": vars(run.options),
        "global_batch_size": run.global_batch_size,
        "sha256": run.sha256,
        "weights": run.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "progress": asdict(run.progress),
    }
    content = io.BytesIO()  # a full disk or Ctrl-C within torch.save would be a RuntimeError
    torch.save(checkpoint, content)
    half = file.with_name(f"{file.name}.half")
    with open(half, "wb") as stream:
        stream.write(content.getbuffer())
        stream.write(hashlib.sha256(content.getbuffer()).digest())
        stream.flush()
        os.fsync(stream.fileno())
    for _ in range(20):
        with suppress(PermissionError):  # on Windows, while another process reads it
            return os.replace(half, file)
        time.sleep(0.1)
    os.replace(half, file)


def read_checkpoint(file: Path) -> dict:
    """What `save` wrote; LabError if it is damaged, edited, code, or of another version."""
    if not file.is_file():  # a pipe would be waited for
        raise LabError(f"cannot read {file}: there is no such file")
    content = file.read_bytes()
    content, digest = content[:-32], content[-32:]
    if hashlib.sha256(content).digest() == digest:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            pickled = archive.read("archive/data.pkl")
        names = {name for opcode, name, _ in pickletools.genops(pickled) if "GLOBAL" in opcode.name}
        checkpoint = torch.load(io.BytesIO(content), "cpu", weights_only=True) if names <= PICKLED else {}
        if checkpoint.get("format") == FORMAT:
            return checkpoint
    raise LabError(f"{file} is damaged, or no checkpoint of this version: train anew")


def load(file: Path, **changes) -> Run:
    """The run in a checkpoint, some of its options changed. LabError as `read_checkpoint`."""
    checkpoint = read_checkpoint(file)
    options = argparse.Namespace(**checkpoint["options"] | changes)
    if options.model not in CELLS:
        raise LabError(f"cannot read {file}: its cell {options.model!r} is that of another script")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise LabError(f"{file} was trained on a GPU, and there is none: give --device cpu")
    with torch.device("meta"):  # shapes alone: the values come from the file
        model = CharModel(options.model, options.embedding, options.hidden, checkpoint["alphabet"])
    model.load_state_dict(checkpoint["weights"], assign=True)
    model.to(options.device)
    optimizers = make_optimizers(model, options)
    for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    progress = Progress(**checkpoint["progress"])
    return Run(options, checkpoint["global_batch_size"], checkpoint["sha256"], model, optimizers, progress)


# ------------------------------------------------------------------------------------- monitoring
class Monitor:
    """What a run shows while it trains, in TensorBoard and on the terminal; silent but in process 0."""

    def __init__(self, run: Run, folder: Path, epoch_steps: int, total_steps: int):
        self.run = run
        self.epoch_steps = epoch_steps
        self.total_steps = total_steps
        parameters = f"{parameter_count(run.model):,} parameters"
        print(f"{run.options.model}, {parameters}, {total_steps:,} steps, in {printable(folder)}")
        self.writer = None if RANK else event_writer(folder, purge_step=run.progress.step)
        hidden = True if RANK else None  # None: unless on a terminal
        self.bar = tqdm(total=total_steps, initial=run.progress.step, leave=False, disable=hidden)

    def due(self, every: int) -> bool:
        """Whether this step is one to write: each `every`-th, and the last; 0 is never."""
        step = self.run.progress.step
        return self.writer is not None and every > 0 and (step % every == 0 or step == self.total_steps - 1)

    def after_step(self, batch, lr: float, norm: float, trace: list | None) -> None:
        """Show a training step: its batch (T, B), learning rate, gradient's norm, states and gates."""
        progress = self.run.progress
        if trace and progress.skipped_in_a_row == 0:
            self.histograms(batch != PAD_IX, trace)
        if self.due(self.run.options.scalars_every) and progress.recent_symbols:
            loss = progress.recent_nats / progress.recent_symbols
            self.writer.add_scalar("1_loss/train", loss, progress.step)
            self.writer.add_scalar("2_gradient/5_norm_before_clipping", norm, progress.step)
            self.writer.add_scalar("7_training/learning_rate", lr, progress.step)
            self.writer.flush()  # so that a run that is killed has all points before its last save
            progress.recent_nats = 0.0
            progress.recent_symbols = 0.0
        loss = progress.nats / max(progress.symbols, 1)
        epoch = progress.step // self.epoch_steps + 1
        self.bar.set_postfix_str(f"epoch {epoch}, {loss:.3f} nats", refresh=False)
        self.bar.update()

    def histograms(self, real, trace: list) -> None:
        """Every gate and state where `real` (T, B) is true, every gradient's magnitude, every parameter."""
        add = partial(self.writer.add_histogram, global_step=self.run.progress.step, bins=64)
        for number, name in enumerate(trace[0], start=1):
            gate = torch.stack([at_t[name] for at_t in trace])  # (T, B, H)
            add(f"4_gates/{self.run.options.model}_{number}_{name}", gate[real])
        for number, (name, parameter) in enumerate(self.run.model.named_parameters(), start=1):
            add(f"5_gradients/log10_{number}_{name}", parameter.grad.abs().clamp(min=1e-12).log10())
            add(f"6_parameters/{number}_{name}", parameter)

    def after_epoch(self, epoch: int, valid_loss: float) -> None:
        """Show losses and samples at an epoch's end."""
        if self.writer is None:
            return
        progress = self.run.progress
        model = self.run.model
        step = progress.step - 1
        bits = valid_loss / math.log(2)
        self.writer.add_scalar("1_loss/validation", valid_loss, step)
        self.bar.clear()
        losses = f"training {progress.train_loss:.3f} nats, validation {valid_loss:.3f} nats"
        print(f"epoch {epoch + 1}/{self.run.options.epochs}: {losses}")
        print(f"  {bits:.3f} bits per character, {progress.seconds:.1f} s of training")
        if progress.skipped:
            print(f"  {progress.skipped:,} steps skipped so far: their loss or gradient was not finite")
        for name, h in samples(model, "", self.run.options.seed + epoch).items():
            text = h.text + ("" if h.ended else " [cut]")
            self.writer.add_text(f"samples/{name}", textwrap.indent(text, "    "), step)  # a code block
            first = f"  {name:12s}  "
            print(textwrap.fill(printable(text), 79, initial_indent=first, subsequent_indent=" " * 16))
        self.writer.flush()

    def close(self) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()


def parameter_count(model) -> int:
    """The number of its parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def samples(model, start: str, seed: int) -> dict:
    """What each decoder but exact search makes of `start`: its name → Hypothesis."""
    written = {}
    for name, command in DECODERS.items():
        if name != "exact":  # which may take long
            options = decoder_parser().parse_args([*command.split(), f"--start={start}", f"--seed={seed}"])
            with suppress(NotImplementedError):  # in a handout, a question that is not answered yet
                written[name] = decode(model, options)[0]
    return written


def event_writer(folder: Path, **options):
    """A SummaryWriter in a second of its own, since TensorBoard reads a folder's files in that order."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import; only training needs it

    while any(f"tfevents.{int(time.time())}." in file.name for file in folder.glob("events*")):
        time.sleep(0.05)
    return SummaryWriter(folder, **options)


def rewrite_events(folder: Path, part: str):
    """A SummaryWriter whose file, marked by `part`, takes the place of the one that it wrote before."""
    for old in folder.glob(f"events*.{part}"):
        old.unlink()
    return event_writer(folder, filename_suffix=f".{part}")


# ------------------------------------------------------------------------- a trained model, inside
LAGS = 40  # characters that a loss is followed back
Unit = namedtuple("Unit", "feature gate row r")  # a unit that follows a feature with correlation r
# What a person can say of the character just read: the stretches of text where it holds, then counts.
STRETCHES = {
    "inside a quotation": r'"[^"]*"?|「[^」]*」?',
    "inside brackets": r"[(\[（][^)\]）]*",
    "in a capitalised word": r"\w[\w']*",
    "in a number": r"\d[\d.,]*",
    "a vowel": r"[aeiouAEIOU]",
    "a space": r" ",
}
FEATURES = (*STRETCHES, "position in the sentence", "position in the word")
# Fonts with many scripts, by the file names that Linux, macOS and Windows give them.
FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "wqy-zenhei.ttc", "Arial Unicode.ttf", "msgothic.ttc")


def table(rows: list[dict]) -> str:
    """Rows of like keys as a Markdown table."""
    lines = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip([*rows[0]], *lines, strict=True)]
    lines = [[*rows[0]], ["-" * width for width in widths], *lines]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def gradient_flow(model, batch, lags: int = LAGS) -> dict[str, torch.Tensor]:
    """How far back a loss reaches: ‖∂loss_t/∂s_{t−k}‖ for each state s and k = 0 … lags, mean over sentences.

    Of each sentence in batch (T, B) longer than `lags`, one symbol t is drawn and only its loss counts: one
    backward pass then gives all gradients. Returns state → (lags + 1,), less if the median sentence is short.
    """
    lengths = (batch != PAD_IX).sum(0)
    lags = min(lags, int(lengths.median()) - 1)
    batch = batch[:, lengths > lags]
    lengths = lengths[lengths > lags]
    draw = torch.rand(len(lengths), generator=torch.Generator().manual_seed(0))
    t = lags + (draw * (lengths - lags)).long()
    b = torch.arange(len(lengths))
    trace = []
    logits = model(batch, trace)
    loss = F.cross_entropy(logits[t, b], batch[t, b], reduction="sum")
    flow = {}
    for name in model.rnn.states:
        states = [values[name] for values in trace]
        slopes = torch.autograd.grad(loss, states, retain_graph=True, materialize_grads=True)
        norms = torch.stack(slopes).norm(dim=-1)  # (T, B)
        flow[name] = norms.gather(0, t - torch.arange(lags + 1)[:, None]).mean(1)
    return flow


def both_flows(run: Run, valid_set) -> dict[str, dict]:
    """Gradient flow over 64 sentences, long ones first: "at_start", of the seed's weights, and "trained"."""
    order = np.argsort(-np.minimum(valid_set.lengths, LAGS), kind="stable")
    batch = pad_collate_fn([valid_set[i] for i in order[:64]])
    start = new_run(argparse.Namespace(**vars(run.options) | {"init": None}), valid_set).model
    return {"at_start": gradient_flow(start, batch), "trained": gradient_flow(run.model, batch)}


def features(text: str) -> torch.Tensor:
    """FEATURES after 0, 1, … n characters of `text`, a stretch as 1 or 0: (features, n + 1)."""
    values = torch.zeros(len(FEATURES), len(text) + 1)
    for row, (name, pattern) in zip(values, STRETCHES.items(), strict=False):
        for match in re.finditer(pattern, text):
            if name != "in a capitalised word" or match[0][0].isupper():
                row[match.start() + 1 : match.end() + 1] = 1
    values[-2] = torch.arange(len(text) + 1)
    values[-1] = torch.tensor([n - 1 - text.rfind(" ", 0, n) for n in range(len(text) + 1)])
    return values


@torch.no_grad()
def named_units(model, loader, least: float = 0.5) -> list[Unit]:
    """Of all gates' and states' units the one that follows each feature best, of |r| `least` or more."""
    known = []
    seen = {}
    for batch in loader:
        trace = []
        model(batch, trace)
        known += [features(code2string(codes, model.emb.lettres)) for codes in batch.T.tolist()]
        for gate in trace[0]:
            values = torch.stack([at_t[gate] for at_t in trace], 1)  # (B, T, H)
            seen.setdefault(gate, []).append(values[(batch != PAD_IX).T])  # (real symbols, H), by sentence
    known = torch.cat(known, 1)  # (features, symbols)
    units = []
    for gate, parts in seen.items():
        both = torch.cat([known, torch.cat(parts).T])  # (features + H, symbols)
        correlations = both.corrcoef()[: len(known), len(known) :].nan_to_num()
        for feature, follows in zip(FEATURES, correlations, strict=True):
            row = int(follows.abs().argmax())
            units.append(Unit(feature, gate, row, follows[row].item()))
    closest = {}
    for unit in sorted(units, key=lambda unit: -abs(unit.r)):
        closest.setdefault(unit.feature, unit)
    return [unit for unit in closest.values() if abs(unit.r) >= least]


def font_for(text: str, size: int):
    """A font that has the symbols of `text`: Pillow's own or one of FONTS; else Pillow's, and says so."""
    fonts = [ImageFont.load_default(size)]
    for name in FONTS:
        with suppress(OSError):
            fonts.append(ImageFont.truetype(name, size))
    for font in fonts:
        missing = bytes(font.getmask("\uffff"))
        if all(bytes(font.getmask(char)) != missing for char in set(text) - {" "}):
            return font
    print("no font of this machine has all symbols of the text: the picture shows boxes for them")
    return fonts[0]


@torch.no_grad()
def picture(model, units: list[Unit], text: str):
    """Units on `text` as an image, uint8 (height, width, 3): of each its name, then the text, coloured.

    A character's colour is the unit's value after it was read: blue is negative, white 0, red positive.
    """
    trace = []
    model(pad_collate_fn([torch.tensor(encode(text, model.emb.lettres))]), trace)
    names = [f"{unit.gate} {unit.row}: {unit.feature}, r {unit.r:.2f}" for unit in units]
    text = printable(text)
    columns = 28
    width = 22  # of a character's box, pixels
    height = 34
    lines = textwrap.wrap(text, columns, drop_whitespace=False)
    places = [(column, row) for row, line in enumerate(lines, start=1) for column in range(len(line))]
    rows = len(lines) + 1  # of a unit
    image = Image.new("RGB", (width * columns, max(1, height * rows * len(units))), "white")
    draw = ImageDraw.Draw(image)
    draw.font = font_for(text + "".join(names), width)
    for i, unit in enumerate(units):
        top = height * rows * i
        draw.text((0, top + height / 2), names[i], "black", anchor="lm")
        values = torch.cat([at_t[unit.gate][:, unit.row] for at_t in trace[1:]])
        values = values / values.abs().max().clamp(min=1)
        for char, (column, row), value in zip(text, places, values.tolist(), strict=True):
            x = width * column
            y = top + height * row
            pale = round(255 - 160 * abs(value))
            colour = (255, pale, pale) if value > 0 else (pale, pale, 255)
            draw.rectangle((x, y, x + width - 1, y + height - 3), colour)
            draw.text((x + width / 2, y + height / 2), char, "black", anchor="mm")
    return np.asarray(image)


def show_units(run: Run, valid_set, writer, tag: str, texts: list[str]) -> str:
    """Print the named units of a run's model as a table, and their pictures on `texts`. Returns the table."""
    drawn = np.random.default_rng(0).permutation(len(valid_set))
    drawn = drawn[valid_set.lengths[drawn].cumsum() < 50_000]  # all gates of 50,000 characters take 300 MB
    some = valid_set.subset(drawn)
    sampler = BucketSampler(some.lengths, 16, shuffle=False)
    units = named_units(run.model, DataLoader(some, batch_sampler=sampler, collate_fn=pad_collate_fn))
    rows = [{"unit": f"{u.gate} {u.row}", "follows": u.feature, "correlation": u.r} for u in units]
    named = table(rows) if rows else "none"
    print(f"Units of this {run.options.model} that follow the text:\n{named}")
    for i, text in enumerate(texts):
        writer.add_image(tag, picture(run.model, units, text), i, dataformats="HWC")
    return named


def look_inside(folder: Path, valid_set) -> None:
    """Show what the best model of a run does: its units on three sentences, its gradient flow."""
    run = load(folder / "best.pt", device="cpu")
    flows = both_flows(run, valid_set)
    near_40 = sorted(valid_set.sentences, key=lambda sentence: abs(len(sentence) - 40))[:3]
    with rewrite_events(folder, "on_text") as writer:
        writer.add_text("units", show_units(run, valid_set, writer, "3_units/on_text", near_40))
        kinds = [(state, when) for state in run.model.rnn.states for when in ("trained", "at_start")]
        for number, (state, when) in enumerate(kinds, start=1):
            for lag, norm in enumerate(flows[when][state].clamp(min=1e-30).log10().tolist()):
                writer.add_scalar(f"2_gradient/{number}_log10_{state}_{when}", norm, lag)
    before = flows["at_start"]["h"]
    after = flows["trained"]["h"]
    print(f"Gradient {len(after) - 1} characters back: {before[-1]:.1e} at start, {after[-1]:.1e} trained.")


def look(text: str, resume: str | None = None, **changes) -> None:
    """Show the units of a trained run (None: the newest) on a text; `changes` say where its corpus is."""
    file = find_checkpoint(resume, "best.pt")
    run = load(file, device="cpu", **changes)
    lettres = run.model.emb.lettres
    text = code2string(codes_of(text, lettres), lettres)
    if not text.strip() or len(text) > 1000:
        raise LabError("--look: give a text of 1 to 1,000 characters")
    _, valid_set = load_corpus(run.options, lettres, run.sha256)
    with rewrite_events(file.parent, "look") as writer:
        show_units(run, valid_set, writer, "3_units/look", [text])
    print(f"Their picture is 3_units/look of {printable(file.parent)}.")


# -------------------------------------------------------------------------------------- comparing
def load_runs(folders: list, file_name: str, **changes) -> dict[Path, Run]:
    """Each run in some folders, by its own folder; LabError if they are not on the same sentences."""
    files = {file.absolute() for folder in folders for file in checkpoints(folder, file_name)}
    runs = {file.parent: load(file, **changes) for file in sorted(files)}
    groups = {}
    for folder, run in runs.items():
        o = run.options
        sentences = run.sha256, run.model.emb.lettres, o.seed, o.maxlen, o.maxsent, o.lines, o.blocks
        groups.setdefault(sentences, []).append(folder.name)
    if len(groups) > 1:
        raise LabError(f"these runs are not on the same sentences: name one group, {[*groups.values()]}")
    return dict(sorted(runs.items(), key=lambda item: [*CELLS].index(item[1].options.model)))


def loss_table(runs: dict[str, Run]) -> str:
    """Of each run its parameters, the seconds to its best epoch, and the losses there."""
    rows = []
    for name, run in runs.items():
        best = run.progress.best_loss
        row = {"run": name, "parameters": f"{parameter_count(run.model):,}"}
        row |= {"seconds": round(run.progress.seconds), "training": f"{run.progress.train_loss:.3f}"}
        rows.append(row | {"validation": f"{best:.3f}", "bits": f"{best / math.log(2):.3f}"})
    return table(rows)


def flow_table(runs: dict[str, Run], valid_set: TextDataset) -> str:
    """Each state's gradient flow, at every tenth character."""
    rows = []
    for name, run in runs.items():
        for when, flow in both_flows(run, valid_set).items():
            for state, norms in flow.items():
                by_lag = {str(lag): norms[lag].item() for lag in range(0, len(norms), 10)}
                rows.append({"run": name, "of": state, "when": when.replace("_", " "), **by_lag})
    return table(rows)


def compare(names: list, **changes) -> None:
    """The runs side by side: their losses and gradient flow, printed and in comparison/ of their folder."""
    by_folder = load_runs(names, "best.pt", device="cpu", **changes)
    runs = {folder.name: run for folder, run in by_folder.items()}
    if len(runs) < len(by_folder):
        runs = {str(folder): run for folder, run in by_folder.items()}
    run = next(iter(runs.values()))
    _, valid_set = load_corpus(run.options, run.model.emb.lettres, run.sha256)
    losses = f"## Loss, in nats per symbol, and validation loss in bits\n\n{loss_table(runs)}"
    flows = flow_table(runs, valid_set)
    text = f"{losses}\n\n## Norm of the gradient, by how many characters it goes back\n\n{flows}"
    print(f"\n{text}")
    top = Path(names[0]).absolute()
    folder = (top if len(names) == 1 else top.parent) / "comparison"
    with rewrite_events(folder, "comparison") as writer:
        writer.add_text("comparison", text)
    (folder / "comparison.md").write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------------- command line
LR = {"muon": 0.05, "adamw": 0.008}
BATCH_SIZE = {"muon": 64, "adamw": 32}


def command_parser() -> argparse.ArgumentParser:
    """All options of the command line, with their ranges and defaults."""
    about = "Train a character model with a recurrent cell written by hand. (Defaults in parentheses.)"
    parser = ArgumentParser(description=about, allow_abbrev=False)
    width = in_range(int, 1, 8192)
    many = in_range(int, 1, 10_000)
    whole = in_range(int, 0, 10**9)
    amount = in_range(float, 0, 1e9)
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    batch_size = "sentences in a process's batch (muon {muon}, adamw {adamw})".format(**BATCH_SIZE)
    add = parser.add_argument
    # fmt: off
    add("--model", nargs="+", choices=[*CELLS, "all"], default="lstm", help="several are compared (lstm)")
    add("--init", metavar="RUN", help="begin with the weights of a trained run, at a fifth of the peak rate; "
        "too good a loss if that run has seen the sentences that validate this one")
    add("--data", type=os.path.abspath, metavar="PATH", help=f"a UTF-8 text file (data/{CORPUS.name})")
    unit = parser.add_mutually_exclusive_group()
    unit.add_argument("--lines", action="store_true", help="each line is an example")
    unit.add_argument("--blocks", action="store_true", help="what stands between blank lines is an example")
    add("--epochs", type=in_range(int, 1, 10**6), default=5, metavar="N", help="passes (%(default)s)")
    add("--batch-size", type=width, metavar="B", help=batch_size)
    add("--embedding", type=width, default=128, metavar="E", help="size of an embedding (%(default)s)")
    add("--hidden", type=width, default=256, metavar="H", help="size of the hidden state (%(default)s)")
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="of the cell's matrices (%(default)s)")
    add("--lr", type=amount, metavar="RATE", help=f"peak rate (muon {LR['muon']}, adamw {LR['adamw']})")
    add("--clip", type=amount, default=1.0, metavar="NORM", help="clip gradients (%(default)s; 0: never)")
    add("--seed", type=whole, default=0, help="of the split, the weights, the shuffling (%(default)s)")
    add("--maxlen", type=many, default=2000, metavar="N", help="longest sentence; costs memory (%(default)s)")
    add("--maxsent", type=in_range(int, 2, 10**9), metavar="N", help="use the first N sentences only")
    add("--device", choices=devices, default=devices[0], help="cuda where there is one (%(default)s)")
    add("--scalars-every", type=whole, default=20, metavar="N", help="steps (%(default)s; 0: never)")
    add("--histograms-every", type=whole, default=50, metavar="N", help="steps (%(default)s; 0: never)")
    add("--save-every", type=amount, default=30.0, metavar="S", help="seconds (%(default)s; 0: epochs only)")
    add("--run", metavar="FOLDER", help="where the run goes (runs/MODEL-DATE_TIME)")
    add("--resume", nargs="?", const="", metavar="RUN", help="go on (alone: the newest), further: --epochs N")
    add("--compare", nargs="+", metavar="RUN", help="compare trained runs, or all in a folder")
    add("--look", metavar="TEXT", help="a trained run's units on a text (of --resume RUN, else the newest)")
    # fmt: on
    return parser


def run_options(given: dict) -> argparse.Namespace:
    """All options of a run: `given`, and defaults."""
    options = vars(command_parser().parse_args([])) | given
    if options["lr"] is None:
        options["lr"] = LR[options["optimizer"]] / (5 if options["init"] else 1)
    if options["batch_size"] is None:
        options["batch_size"] = BATCH_SIZE[options["optimizer"]]
    return argparse.Namespace(**options)


def new_folder(name: str | None, models: list[str]) -> Path:
    """A folder for new runs, made for them alone; LabError where there is a run already."""
    folder = Path(name or RUNS / f"{'-'.join(models)}-{time.strftime('%Y-%m-%d_%H%M%S')}")
    while not name and not RANK and folder.exists():  # of a run that starts in the same second
        folder = folder.with_name(f"{folder.name}-2")
    if not RANK and any(folder.glob("**/*.pt")):
        raise LabError(f"{folder} holds a run already: go on with --resume, or choose another --run")
    if name or not RANK:  # number 0 alone knows the name that its clock gives
        folder.mkdir(parents=True, exist_ok=bool(name))
    return folder


def train_new(given: dict) -> None:
    """Train a new run of each model that is asked for, on the same batches; then compare them."""
    lettres = None
    if "init" in given:
        file = find_checkpoint(given["init"], "best.pt").absolute()
        begun = load(file, device="cpu")
        lettres = begun.model.emb.lettres
        sizes = {"embedding": begun.options.embedding, "hidden": begun.options.hidden}
        given = {**given, **sizes, "model": [begun.options.model], "init": str(file)}
    options = run_options(given)
    models = given.get("model", [options.model])
    models = [*CELLS] if "all" in models else models
    if options.blocks and lettres and "\n" not in lettres:
        raise LabError("--blocks --init: the run to begin with must know line ends, as those of --blocks do")
    train_set, valid_set = load_corpus(options, lettres)
    top = new_folder(options.run, models)
    runs = {}
    for model in models:
        folder = top / model if len(models) > 1 else top
        runs[folder] = new_run(run_options(given | {"model": model}), train_set)
        if not RANK:
            folder.mkdir(exist_ok=True)
        save(runs[folder], folder / "last.pt")  # killed before its next save, it can be resumed as well
    finish(runs, top, train_set, valid_set)


def resume(name: str, **changes) -> None:
    """Go on with a run, or all in a folder; what has finished is looked inside anew, or trained further."""
    newest = Path(name or find_checkpoint(None, "last.pt"))
    top = newest.parent if newest.is_file() else newest
    if not name and top.parent != RUNS:
        top = top.parent  # one of many models
    runs = load_runs([top], "last.pt", **changes)
    run = next(iter(runs.values()))
    train_set, valid_set = load_corpus(run.options, run.model.emb.lettres, run.sha256)
    for folder, run in runs.items():
        print(f"{run.options.model}: going on after step {run.progress.step:,}")
        if changes:
            save(run, folder / "last.pt")  # so that they hold when it is resumed again
    finish(runs, top, train_set, valid_set)


def finish(runs: dict[Path, Run], top: Path, train_set, valid_set) -> None:
    """Train the runs in a folder to their ends, look inside, compare several, and say what comes next."""
    script = Path(sys.argv[0]).name
    last = [*runs][-1]
    try:
        for folder, run in runs.items():
            train(run, folder, train_set, valid_set)
            if not RANK:
                look_inside(folder, valid_set)
        if len(runs) > 1 and not RANK:
            compare([top], data=runs[last].options.data)  # best.pt may name where it was before
    except KeyboardInterrupt:
        say_next(["python", script, "--resume", top])
        raise
    # generate.py knows no cells of other scripts
    write = [["python", "generate.py", "--beam", "5", "--checkpoint", last]] if script == "tp5.py" else []
    say_next(*write, ["tensorboard", "--logdir", last.parent])


def keep_freed_memory() -> None:
    """Let glibc keep a step's memory for the next: a default step with T 100 took 121 ms, and 168 without."""
    with suppress(OSError, AttributeError, TypeError):  # other systems' libraries have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def given_beside(parser, given: dict, mode: str, *allowed: str) -> dict:
    """The options given beside `mode`; argparse's error where one is not `allowed` with it."""
    options = {name: value for name, value in given.items() if name != mode}
    for name in options:
        if name not in allowed:
            parser.error(f"--{name.replace('_', '-')} does not go with --{mode}")
    return options


def main() -> None:
    parser = command_parser()
    unset = dict.fromkeys(vars(parser.parse_args([])))
    options = vars(parser.parse_args(namespace=argparse.Namespace(**unset)))  # None where a default holds
    given = {name: value for name, value in options.items() if value is not None}
    for name in ("model", "embedding", "hidden"):
        if "init" in given and name in given:
            parser.error(f"--{name} does not go with --init, whose run has its own")
    keep_freed_memory()
    if WORLD > 1:
        try:
            distributed.init_process_group()  # gloo on the CPU, nccl on CUDA
        except ValueError as error:
            raise LabError(f"WORLD_SIZE is set, as torchrun does: {error}") from None
        if torch.cuda.is_available() and given.get("device") != "cpu":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with redirect_stdout(None if RANK else sys.stdout):
        if "compare" in given:
            compare(given["compare"], **given_beside(parser, given, "compare", "data"))
        elif "look" in given:
            look(given["look"], **given_beside(parser, given, "look", "resume", "data"))
        elif "resume" in given:
            resume(given["resume"], **given_beside(parser, given, "resume", "data", "epochs", "device"))
        else:
            train_new(given)
    if WORLD > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    guard(main)
