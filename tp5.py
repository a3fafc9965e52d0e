"""Questions 2, 4 and 5: recurrent cells by hand, and a character model trained with them.

    python tp5.py --model lstm                   # or all: the three cells, then a comparison
    tensorboard --logdir runs

Shapes: T length, B batch, E embedding, H hidden, V symbols (97), G gates; time comes first. Losses in nats.
"""

import argparse
import ctypes
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
import unicodedata
import zipfile
from collections import namedtuple
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from generate import RUNS, checkpoint_of, codes_of, generate, generate_beam, number
from textloader import CORPUS, EOS_IX, LETTRES, PAD_IX, BucketSampler, LabError, TextDataset
from textloader import code2string, guard, id2lettre, pad_collate_fn, printable, read_text, string2code


# ------------------------------------------------------------------------- loss, cells and model
def maskedCrossEntropy(output, target, padcar):
    """Question 2: mean negative log-likelihood (nats) of the symbols that are not padding.

    output (T, B, V) logits, target (T, B) codes, padcar the code of BLANK. Nothing but padding gives 0.
    """
    real = target != padcar  # logits elsewhere do not matter, −inf and NaN included
    return F.cross_entropy(output[real], target[real], reduction="sum") / real.sum().clamp(min=1)


class Cell(nn.Module):
    """What the three cells share: the input's half of every gate, and the loop over time.

    A cell calls like `torch.nn`'s: `output, state = rnn(x, state)`, with x (T, B, E), output (T, B, H), and
    a state of tensors (B, H), zeros where none is given. W·[h, x] + b is (W_x·x + b) + W_h·h: the first half
    needs no history, so `project` computes it for all time steps at once. A cell of your own needs `gates`
    and `one_step`, from projected (B, G·H) and a state to the next, and `states` if it has more than h.
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
        self.record = None  # a dict gets what `keep` is given, as lists over time

    def keep(self, **values) -> None:
        """Add this step's gates to `record`, if somebody wants to see them; `unroll` adds the states."""
        if self.record is not None:
            for name, value in values.items():
                self.record.setdefault(name, []).append(value)

    def project(self, x):
        """W_x·x + b of every gate: (…, E) → (…, G·H)."""
        return F.linear(x, self.input_weight, self.bias)

    def unroll(self, projected, state=None):
        """All time steps: projected (T, B, G·H) → output (T, B, H), the state after the last step."""
        if state is None:
            zeros = projected.new_zeros(projected.shape[1], self.hidden_size)
            state = (zeros,) * len(self.states) if len(self.states) > 1 else zeros
        outputs = []
        for projected_t in projected.unbind():
            state = self.one_step(projected_t, state)
            parts = state if isinstance(state, tuple) else (state,)
            self.keep(**dict(zip(self.states, parts, strict=True)))
            outputs.append(parts[0])  # h
        return torch.stack(outputs), state

    def forward(self, x, state=None):
        return self.unroll(self.project(x), state)


class RNN(Cell):
    """h_t = tanh(W·[h_{t-1}, x_t] + b)    (Elman 1990)"""

    gates = ("h",)

    def one_step(self, projected, h):
        return torch.tanh(projected + h @ self.hidden_weight.T)


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

    def one_step(self, projected, state):
        h, C = state
        f, i, candidate, o = (projected + h @ self.hidden_weight.T).chunk(4, dim=-1)
        f = torch.sigmoid(f)
        i = torch.sigmoid(i)
        candidate = torch.tanh(candidate)
        C = f * C + i * candidate
        o = torch.sigmoid(o)
        h = o * torch.tanh(C)
        self.keep(f=f, i=i, candidate=candidate, o=o)
        return h, C


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
        sizes = [2 * self.hidden_size, self.hidden_size]
        W_zr, W_candidate = self.hidden_weight.split(sizes)
        x_zr, x_candidate = projected.split(sizes, dim=-1)
        z, r = torch.sigmoid(x_zr + h @ W_zr.T).chunk(2, dim=-1)
        candidate = torch.tanh(x_candidate + (r * h) @ W_candidate.T)
        self.keep(z=z, r=r, candidate=candidate)
        return (1 - z) * h + z * candidate


CELLS = {"rnn": RNN, "gru": GRU, "lstm": LSTM}


class CharModel(nn.Module):
    """Question 4: embedding, cell, and a linear decoder from hidden state to logits."""

    def __init__(self, cell: str, embedding_size: int, hidden_size: int):
        super().__init__()
        self.cell = cell
        self.emb = nn.Embedding(len(id2lettre), embedding_size)
        self.rnn = CELLS[cell](embedding_size, hidden_size)
        self.decoder = nn.Linear(hidden_size, len(id2lettre))

    def forward(self, targets, record=None):
        """Targets (T, B), each sentence closed by EOS → logits (T, B, V) that predict exactly those."""
        self.rnn.record = record  # a dict gets every gate and state by name, as a list of T tensors (B, H)
        inputs = F.pad(targets[:-1], (0, 0, 1, 0), value=EOS_IX)  # EOS opens
        symbols = self.rnn.project(self.emb.weight)  # (V, G·H): each of the V symbols once, then looked up
        output, _ = self.rnn.unroll(F.embedding(inputs, symbols))  # (T, B, H)
        self.rnn.record = None  # what is recorded is this pass alone
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


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for `matrices`, which may be none; AdamW for the `others`.

        M ← 0.95·M + 0.05·G
        W ← (1 − 0.1·lr)·W − lr·√max(1, rows/columns)·U·Vᵀ    where 0.95·M + 0.05·G = U·S·Vᵀ

    W moves alike in all directions, and as far for a large gradient G as for a small one.
    """

    def __init__(self, matrices, others, lr: float):
        # A short memory of squared gradients, 0.95: over few epochs, ahead of Adam's usual 0.999.
        super().__init__([{"params": others}, {"params": matrices}], lr=lr, betas=(0.9, 0.95), fused=True)

    @torch.no_grad()
    def step(self):
        group = self.param_groups[1]
        for W in group["params"]:
            state = self.state[W]
            if not state:  # AdamW asks every state that it loads for a "step"
                state["step"], state["momentum"] = torch.zeros(()), torch.zeros_like(W)
            M = state["momentum"].lerp_(W.grad, 0.05)
            update = orthogonal(W.grad.lerp(M, 0.95))
            W.mul_(1 - 0.1 * group["lr"])
            W.sub_(update, alpha=group["lr"] * max(1, W.shape[0] / W.shape[1]) ** 0.5)
            W.grad = None  # so that AdamW, which comes next, leaves it alone
        super().step()


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rates: linear warm-up over 5 % of the steps, then half a cosine to 0."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


# ---------------------------------------------------------------------------- processes, corpus

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
        what = "a sentence ends with . ! or ?; with --lines, each line is an example"
        raise LabError(f"{name} has {count} sentence(s), training needs 2: {what} ({left_out})")
    held_out = max(1, count // 10)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(options.seed)).numpy()
    print(f"{name}: {count:,} sentences, {count - held_out:,} to train on, {held_out:,} to validate")
    print(textwrap.fill(left_out, 79, subsequent_indent="  "))
    lost = dataset.dropped.total() / len(text)
    if count < 1000 or lost > 0.1:
        little = f"{count:,} sentences, {lost:.0%} of the characters left out"
        print(f"warning: little to learn from: {little}", file=sys.stderr)
    return dataset.select(order[:-held_out]), dataset.select(order[-held_out:])


def batches(dataset, options, *, epoch: int | None = None, start: int = 0) -> DataLoader:
    """This process's shard of all batches (T, B) from number `start` on; shuffled given an `epoch`."""
    sampler = BucketSampler(dataset.lengths, options.batch_size, shuffle=epoch is not None, seed=options.seed)
    sampler.set_epoch(epoch or 0)
    # A batch is sorted by length (nearly), so that every WORLD-th sentence makes shards of equal work.
    shards = [batch[RANK::WORLD] for batch in sampler][start:]
    return DataLoader(dataset, batch_sampler=shards, collate_fn=pad_collate_fn)


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
    nats, symbols = all_reduce(nats, symbols)
    return nats / symbols


# ------------------------------------------------------------------------------------- monitoring
def event_writer(folder: Path, part: str = "", step: int | None = None):
    """A run's SummaryWriter. `step`: drop what was written from there on. A `part` is a file written anew."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import; only training needs it

    for old in folder.glob(f"events*.{part}"):
        old.unlink()
    return SummaryWriter(folder, purge_step=step, filename_suffix=part and f".{part}")


def write_histograms(writer, model, record: dict, real, step: int) -> None:
    """Every parameter, its gradient, and every gate and state where `real` (T, B) is true."""
    for name, parameter in model.named_parameters():
        writer.add_histogram(f"6_gradients/{name}", parameter.grad.cpu(), step, bins=64)
        writer.add_histogram(f"7_parameters/{name}", parameter.detach().cpu(), step, bins=64)
    for name, values in record.items():
        values = torch.stack(values).detach()[real].cpu()  # (real symbols, H)
        writer.add_histogram(f"5_gates/{model.cell}_{name}", values, step, bins=64)


def samples(model, start: str, seed: int) -> dict:
    """What each decoder makes of `start`: name → Hypothesis."""
    parts = (model.rnn, model.emb, model.decoder, EOS_IX)
    draw = {"temperature": 1.0, "generator": torch.Generator().manual_seed(seed)}
    return {
        "greedy": generate(*parts, start),
        "sampled": generate(*parts, start, **draw),
        "nucleus": generate(*parts, start, alpha=0.9, **draw),
        "beam": generate_beam(*parts, 5, start, n=1)[0],
        "nucleus beam": generate_beam(*parts, 5, start, n=1, alpha=0.9)[0],
    }


# ------------------------------------------------------------------------------------- checkpoints
@dataclass
class Progress:
    """Where a run stands; with weights and moments, all that it needs to go on to the bit."""

    step: int = 0  # the next one
    seconds: float = 0.0  # of training steps
    nats: float = 0.0  # sums over this epoch so far
    symbols: int = 0
    recent_nats: float = 0.0  # sums since scalars were last written
    recent_symbols: int = 0
    train_loss: float = math.inf  # of the last epoch, nats
    best_loss: float = math.inf  # on the validation sentences, nats
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0


def initial_model(options) -> CharModel:
    """The model that the seed makes, its recurrent matrices multiplied by `recurrent_scale`."""
    torch.manual_seed(options.seed)
    model = CharModel(options.model, options.embedding, options.hidden)
    model.rnn.hidden_weight.data *= options.recurrent_scale
    return model


FORMAT = 7  # of checkpoints


@dataclass
class Checkpoint:
    """What `Training.save` wrote, read and checked."""

    options: argparse.Namespace  # of the training
    sha256: str  # of the corpus
    model: CharModel
    moments: list[dict] | None  # of the optimiser
    progress: Progress


@contextmanager
def reading(file: Path):
    """Whatever a missing, foreign, damaged or edited checkpoint raises becomes one line."""
    try:
        yield
    except LabError:
        raise
    except Exception as error:  # whatever zipfile, torch or our own lines meet
        raise LabError(f"cannot read {file} as a checkpoint of this lab: {error!r:.150}") from None


def load_checkpoint(file: Path) -> Checkpoint:
    """Read a checkpoint without running anything in it; LabError if it is not one of ours."""
    with reading(file):
        with zipfile.ZipFile(file) as archive:  # compressed, a small file could fill the memory
            if any(entry.compress_type for entry in archive.infolist()) or archive.testzip():
                raise ValueError("its records are compressed, or a checksum is wrong")
        content = torch.load(file, map_location="cpu", weights_only=True)
        if (content["format"], content["alphabet"]) != (FORMAT, LETTRES):
            raise ValueError("it is of another format or alphabet of this program: train again")
        options, weights = argparse.Namespace(**content["options"]), content["weights"]
        if options.model not in CELLS:
            raise LabError(f"{file}: no cell {options.model!r} in CELLS; use the script that adds it")
        if not all(weight.is_contiguous() and weight.isfinite().all() for weight in weights.values()):
            raise ValueError("its weights are not finite numbers")
        options.embedding = weights["emb.weight"].shape[1]  # sizes are those of the weights
        options.hidden = weights["decoder.weight"].shape[1]
        model = CharModel(options.model, options.embedding, options.hidden)
        model.load_state_dict(weights)
        types = {name: type(default) for name, default in asdict(Progress()).items()}
        progress = Progress(**{name: types[name](value) for name, value in content["progress"].items()})
        if progress.step < 0:
            raise ValueError("its step is negative")
        return Checkpoint(options, content["sha256"], model.eval(), content["moments"], progress)


MAY_CHANGE = ("data", "epochs", "device")  # of a run's options, by --resume


def trained_on(checkpoint: Checkpoint, options) -> tuple[argparse.Namespace, TextDataset, TextDataset]:
    """A run's options, MAY_CHANGE as they are given now, and its sentences to train on and to validate."""
    anew = {name: getattr(options, name) for name in MAY_CHANGE if getattr(options, name) is not None}
    options = argparse.Namespace(**vars(checkpoint.options) | anew)
    train, valid = load_corpus(options)
    if train.sha256 != checkpoint.sha256:
        raise LabError("this run was trained on another text: name it with --data")
    return options, train, valid


# ----------------------------------------------------------------------------- a trained model, inside
def table(rows: list[dict]) -> str:
    """Rows of like keys as a Markdown table."""
    lines = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip([*rows[0]], *lines, strict=True)]
    lines = [[*rows[0]], ["-" * width for width in widths], *lines]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


LAGS = 40  # characters that a loss is followed back

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
    found = torch.zeros(len(FEATURES), len(text) + 1)
    for row, pattern in zip(found, STRETCHES.values(), strict=False):
        for match in re.finditer(pattern, text):
            row[match.start() + 1 : match.end() + 1] = 1
    found[-2] = torch.arange(len(text) + 1)
    found[-1] = torch.tensor([n - 1 - text.rfind(" ", 0, n) for n in range(len(text) + 1)])
    return found


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
    record, flow = {}, {}
    logits = model(batch, record)
    loss = F.cross_entropy(logits[t, b], batch[t, b], reduction="sum")
    for name in model.rnn.states:
        slopes = torch.autograd.grad(loss, record[name], retain_graph=True, materialize_grads=True)
        norms = torch.stack(slopes).norm(dim=-1)  # (T, B)
        flow[name] = norms.gather(0, t - torch.arange(lags + 1)[:, None]).mean(1)
    return flow


def both_flows(checkpoint, valid) -> dict[str, dict]:
    """A model's gradient flow over 64 validation sentences, long ones first, "at_start" and "trained"."""
    order = np.argsort(-np.minimum(valid.lengths, LAGS), kind="stable")
    batch = pad_collate_fn([valid[i] for i in order[:64]])
    models = {"at_start": initial_model(checkpoint.options), "trained": checkpoint.model}
    return {when: gradient_flow(model, batch) for when, model in models.items()}


Unit = namedtuple("Unit", "feature gate number r")  # which follows the feature with correlation r


@torch.no_grad()
def named_units(model, loader) -> list[Unit]:
    """For each of FEATURES, the unit of all gates and states that follows it most closely, if one does."""
    known, seen, strongest = [], {}, {}
    for batch in loader:
        record, real = {}, (batch != PAD_IX).T
        model(batch, record)
        known += [features(code2string(codes)) for codes in batch.T.tolist()]
        for gate, steps in record.items():
            seen.setdefault(gate, []).append(torch.stack(steps, 1)[real])  # (real symbols, H), by sentence
    known = torch.cat(known, dim=1)
    for gate, parts in seen.items():
        both = torch.cat([known, torch.cat(parts).T])  # (features + H, symbols)
        correlations = both.corrcoef()[: len(known), len(known) :].nan_to_num()
        for feature, row in zip(FEATURES, correlations, strict=True):
            number = int(row.abs().argmax())
            unit = Unit(feature, gate, number, row[number].item())
            strongest[feature] = max(strongest.get(feature, unit), unit, key=lambda unit: abs(unit.r))
    units = [unit for unit in strongest.values() if abs(unit.r) >= 0.3]  # else not worth a name
    return sorted(units, key=lambda unit: -abs(unit.r))


@torch.no_grad()
def picture(model, units: list[Unit], text: str, columns: int = 20):
    """Units on `text` as an image, uint8 (height, width, 3), a row a unit; it goes on below after `columns`.

    Blue is negative, white 0, red positive. Below the first memory unit that follows a position: its f, i, o.
    """
    from PIL import Image, ImageDraw, ImageFont  # comes with TensorBoard

    record, rows = {}, {}
    model(pad_collate_fn([string2code(text)]), record)
    for unit in units:
        label = f"{unit.gate} {unit.number} · {unit.feature} · r {unit.r:.2f}"
        rows[label] = torch.cat(record[unit.gate])[1:, unit.number]  # from the first character on
        if unit.gate == "C" and unit.feature.startswith("position") and "its f" not in rows:
            gates = [gate for gate in "fio" if gate in record]
            rows |= {f"its {gate}": torch.cat(record[gate])[1:, unit.number] for gate in gates}
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


def look_inside(folder: Path, checkpoint: Checkpoint, valid: TextDataset, text: str = "") -> None:
    """Write and print what a trained model does: named units and gradient flow; or its units on `text`."""
    model, loader = checkpoint.model, batches(valid, checkpoint.options)
    units = named_units(model, [*loader][:: math.ceil(len(loader) / 8)])  # at most eight, of all lengths
    rows = [{"unit": f"{u.gate} {u.number}", "follows": u.feature, "correlation": u.r} for u in units]
    found = table(rows) if rows else "none"
    print(f"Units of this {model.cell} that follow the text:\n{found}")
    part = "look" if text else "on_text"
    near_40 = sorted(valid.sentences, key=lambda sentence: abs(len(sentence) - 40))
    with event_writer(folder, part) as writer:
        for i, sentence in enumerate([text] if text else near_40[:3]):
            writer.add_image(f"3_units/{part}", picture(model, units, sentence), i, dataformats="HWC")
        if text:
            return
        writer.add_text("units", found)
        labels = [[symbol, unicodedata.category(symbol[-1])] for symbol in id2lettre.values()]
        step, header = checkpoint.progress.step, ["symbol", "category"]
        writer.add_embedding(model.emb.weight, labels, None, step, "symbols", header)
        flows = both_flows(checkpoint, valid)
        for when, flow in flows.items():
            for state, norms in flow.items():
                for lag, norm in enumerate(norms.clamp(min=1e-30).log10().tolist()):
                    writer.add_scalar(f"2_gradient_flow/log10_{state}_{when}", norm, lag)
    before, after = flows["at_start"]["h"], flows["trained"]["h"]
    print(f"Gradient {len(after) - 1} characters back: {before[-1]:.1e} at start, {after[-1]:.1e} trained.")


# --------------------------------------------------------------------------------------- training
def say_next(*commands: tuple[str, Path]) -> None:
    """The next commands, each with the folder that it ends in, ready to be pasted."""
    print("Next:")
    for command, folder in commands:
        print(f"    {command} {shlex.quote(printable(folder))}")


class Training:
    """A run: model, optimiser and progress, from its first step to its last."""

    def __init__(self, options, folder: Path, train: TextDataset, valid: TextDataset):
        self.options, self.folder, self.train, self.valid = options, folder, train, valid
        self.model = initial_model(options).to(options.device)
        self.ddp_model = self.model if WORLD == 1 else nn.parallel.DistributedDataParallel(self.model)
        muon = options.optimizer == "muon"
        matrices = [self.model.rnn.input_weight, self.model.rnn.hidden_weight] if muon else []
        others = [p for p in self.model.parameters() if p not in {*matrices}]
        self.optimizer = Muon(matrices, others, options.lr)
        self.epoch_steps = math.ceil(len(train) / options.batch_size)
        self.steps = options.epochs * self.epoch_steps
        self.mean_symbols = (train.lengths + 1).sum().item() / self.epoch_steps  # of a batch, EOS included
        self.progress = Progress()
        self.writer = None  # in process 0, while it runs

    def due(self, every: int) -> bool:
        """Whether this step is one to write: each `every`-th, and the last; 0 is never."""
        step = self.progress.step
        return self.writer is not None and every > 0 and (step % every == 0 or step == self.steps - 1)

    def train_step(self, batch) -> None:
        """One batch (T, B): forward, backward, clip, step."""
        options, progress, since = self.options, self.progress, time.perf_counter()
        batch = batch.to(options.device)
        real = batch != PAD_IX
        record = {} if self.due(options.histograms_every) else None  # of gates and states
        nats = maskedCrossEntropy(self.ddp_model(batch, record), batch, PAD_IX) * real.sum()
        self.optimizer.zero_grad()
        # Over the symbols of a mean batch, not of this one: in long batches and short, each symbol counts
        # the same. (DDP averages over the processes, so times their number.)
        (nats * WORLD / self.mean_symbols).backward()
        norm = nn.utils.get_total_norm([parameter.grad for parameter in self.model.parameters()])
        all_nats, all_symbols = all_reduce(nats.item(), real.sum().item())
        if math.isfinite(all_nats + norm.item()):
            if record is not None:
                write_histograms(self.writer, self.model, record, real, progress.step)
            nn.utils.clip_grads_with_norm_(self.model.parameters(), options.clip or math.inf, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = options.lr * schedule(progress.step, self.steps)
            self.optimizer.step()
            progress.nats += all_nats
            progress.symbols += int(all_symbols)
            progress.recent_nats += all_nats
            progress.recent_symbols += int(all_symbols)
            progress.skipped_in_a_row = 0
        else:
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            if progress.skipped_in_a_row == 3:
                what = "at three steps in a row, the loss or its gradient was not finite: train anew with"
                raise LabError(f"{what} {'a smaller --lr' if options.clip else '--clip 1'}")
        progress.seconds += time.perf_counter() - since
        if self.due(options.scalars_every) and progress.recent_symbols:
            write, step = self.writer.add_scalar, progress.step
            write("1_loss/train", progress.recent_nats / progress.recent_symbols, step)
            write("4_gradient/norm_before_clipping", norm, step)
            write("8_training/learning_rate", self.optimizer.param_groups[0]["lr"], step)
            write("8_training/characters_per_second", (step + 1) * self.mean_symbols / progress.seconds, step)
            progress.recent_nats, progress.recent_symbols = 0.0, 0
        progress.step += 1

    def train_epoch(self) -> None:
        """The batches of this epoch that are left."""
        options, progress, saved = self.options, self.progress, time.monotonic()
        epoch, start = divmod(progress.step, self.epoch_steps)
        self.model.train()
        hidden = True if RANK else None  # None: unless on a terminal
        with tqdm(total=self.steps, initial=progress.step, leave=False, disable=hidden) as bar:
            bar.set_description(f"epoch {epoch + 1}/{options.epochs}", refresh=False)
            for batch in batches(self.train, options, epoch=epoch, start=start):
                self.train_step(batch)
                bar.set_postfix_str(f"{progress.nats / max(progress.symbols, 1):.3f} nats", refresh=False)
                bar.update()
                long_ago = options.save_every and time.monotonic() - saved > options.save_every
                if long_ago and progress.step % self.epoch_steps:  # at its end, end_epoch saves
                    self.save("last.pt")
                    saved = time.monotonic()

    def end_epoch(self) -> None:
        """Validate, show losses and samples, here and in TensorBoard; save `last.pt`, a better `best.pt`."""
        progress, step = self.progress, self.progress.step - 1
        valid = evaluate(self.model, batches(self.valid, self.options), self.options.device)
        if not math.isfinite(valid):  # the last good checkpoint stays
            raise LabError("the validation loss is not finite: train anew with a smaller --lr")
        progress.train_loss = progress.nats / max(progress.symbols, 1)
        progress.nats, progress.symbols = 0.0, 0
        if not RANK:
            epoch, bits, guess = step // self.epoch_steps, valid / math.log(2), math.log(len(id2lettre))
            speed = f"{progress.step * self.mean_symbols / progress.seconds:,.0f} characters/s"
            self.writer.add_scalar("1_loss/validation", valid, step)
            self.writer.add_scalar("8_training/validation_bits_per_character", bits, step)
            losses = f"training {progress.train_loss:.3f} nats, validation {valid:.3f} nats"
            print(f"epoch {epoch + 1}/{self.options.epochs}: {losses}")
            print(f"  {bits:.3f} bits per character, {speed}, {progress.seconds:.1f} s of training")
            if progress.skipped:
                print(f"  {progress.skipped:,} steps skipped so far: their loss or gradient was not finite")
            if valid > guess:
                print(f"  worse than a guess ({guess:.2f} nats): choose a smaller --lr")
            width = max(20, shutil.get_terminal_size().columns - 16)
            for decoder, h in samples(self.model, "", self.options.seed + epoch).items():
                text = h.text + ("" if h.ended else " …")
                self.writer.add_text(f"samples/{decoder}", f"    {text}", step)  # indented: a code block
                print(f"  {decoder:12s}  {textwrap.shorten(text, width, placeholder='…')}")
        if valid < progress.best_loss:
            progress.best_loss = valid
            self.save("best.pt")
        self.save("last.pt")

    def run(self) -> None:
        """Train to the end, look inside, and say what comes next."""
        progress, folder = self.progress, self.folder
        size = sum(p.numel() for p in self.model.parameters())
        print(f"{self.model.cell} with {size:,} parameters, {self.steps:,} steps, in {printable(folder)}")
        if not RANK:
            self.writer = event_writer(folder, step=progress.step)
        if progress.step == 0:
            self.save("last.pt")  # a run killed before its first save can be resumed as well
        try:
            while progress.step < self.steps:
                self.train_epoch()
                self.end_epoch()
        except KeyboardInterrupt:
            say_next((f"python {Path(sys.argv[0]).name} --resume", folder))
            raise
        if not RANK:
            self.writer.close()
            look_inside(folder, load_checkpoint(folder / "best.pt"), self.valid)
        decode = "python generate.py --beam 5 --checkpoint", folder
        say_next(decode, ("tensorboard --logdir", folder.parent))

    def save(self, name: str) -> None:
        """Write beside, flush to disk, rename: the file is the old one or the new one, never a half.

        `last.pt` is for going on with; `best.pt`, for writing, has no moments and is about half as big.
        """
        if RANK:
            return
        checkpoint = {
            "format": FORMAT,
            "alphabet": LETTRES,
            "sha256": self.train.sha256,
            "options": vars(self.options),
            "weights": dict(self.model.state_dict()),
            "moments": [*self.optimizer.state.values()] if name == "last.pt" else None,
            "progress": asdict(self.progress),
        }
        self.writer.flush()
        half = self.folder / f"{name}.half"
        with open(half, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(half, self.folder / name)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up the run where the checkpoint left it."""
        if checkpoint.moments is None:
            raise LabError("best.pt is for writing, it has no optimiser state: go on with last.pt")
        if checkpoint.moments:  # none before the first step
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()  # makes the moments, in the shapes of their parameters
            for moments, saved in zip(self.optimizer.state.values(), checkpoint.moments, strict=True):
                for name, moment in moments.items():
                    moment.copy_(saved[name].reshape_as(moment))
        self.model.load_state_dict(checkpoint.model.state_dict())
        self.progress = checkpoint.progress


# -------------------------------------------------------------------------------------- comparing
def measures(texts: list[str], corpus: str) -> dict[str, float]:
    """Learned or copied: the shares of the texts' words and substrings of 16 and 32 that `corpus` has."""
    words = [word for text in texts for word in re.findall(r"[\w']+", text.lower())]
    known = set(re.findall(r"[\w']+", corpus.lower()))
    shares = {"known": sum(word in known for word in words) / max(len(words), 1)}
    for n in (16, 32):
        spans = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
        shares[f"copied {n}"] = sum(span in corpus for span in spans) / max(len(spans), 1)
    return shares | {"length": int(np.median([len(text) for text in texts]))}


def compare_sentences(checkpoints: dict[str, Checkpoint], train: list, valid: list) -> tuple[list[dict], str]:
    """What decoders make of the same 20 starts: a table of how much was copied, and the first sentences."""
    corpus, starts = "\n".join(train), ["", *dict.fromkeys(text.split()[0] + " " for text in valid)][:20]
    rows, firsts = [{"run": "corpus", "decoder": "", **measures(valid[:200], corpus), "ended": 1.0}], ""
    for name, checkpoint in checkpoints.items():
        written = [samples(checkpoint.model, start, seed) for seed, start in enumerate(starts)]
        for decoder in written[0]:
            texts = [found[decoder].text for found in written]
            ended = sum(found[decoder].ended for found in written) / len(written)
            rows.append({"run": name, "decoder": decoder, **measures(texts, corpus), "ended": ended})
            firsts += f"    {name}, {decoder}:\n{textwrap.indent(textwrap.fill(texts[0], 72), ' ' * 8)}\n"
    return rows, firsts


def comparable(folders: list[Path]) -> dict[str, Checkpoint]:
    """The best checkpoint of each run in the folders, by name; LabError unless all have one corpus."""
    files = sorted({file for folder in folders for file in folder.glob("**/best.pt")})
    if not files:
        raise LabError(f"no run in {', '.join(map(str, folders))}: train some with tp5.py --model all")
    top = Path(os.path.commonpath([file.parent.parent for file in files]))
    checkpoints, groups = {}, {}
    for file in files:
        name, checkpoint = file.parent.relative_to(top).as_posix(), load_checkpoint(file)
        checkpoints[name], o = checkpoint, checkpoint.options
        groups.setdefault((checkpoint.sha256, o.seed, o.maxlen, o.maxsent, o.lines), []).append(name)
    if len(groups) > 1:
        raise LabError(f"compare runs on the same sentences, one of these groups: {[*groups.values()]}")
    return dict(sorted(checkpoints.items(), key=lambda item: [*CELLS].index(item[1].options.model)))


def compare(options) -> None:
    """The runs side by side: loss, gradient flow, what their decoders write, how much of that is copied."""
    folders = [Path(folder).absolute() for folder in options.compare]
    folder = folders[0] if len(folders) == 1 else folders[0].parent
    checkpoints = comparable(folders)
    _, train, valid = trained_on(next(iter(checkpoints.values())), options)
    losses, lags = [], []
    for name, checkpoint in checkpoints.items():
        progress, size = checkpoint.progress, sum(p.numel() for p in checkpoint.model.parameters())
        row = {"run": name, "parameters": f"{size:,}", "seconds": round(progress.seconds)}
        row |= {"training": f"{progress.train_loss:.3f}", "validation": f"{progress.best_loss:.3f}"}
        losses.append(row | {"bits": f"{progress.best_loss / math.log(2):.3f}"})
        for when, flow in both_flows(checkpoint, valid).items():
            for state, norms in flow.items():
                by_lag = {str(lag): norms[lag].item() for lag in range(0, len(norms), 10)}
                lags.append({"run": name, "of": state, "when": when.replace("_", " "), **by_lag})
    shares, firsts = compare_sentences(checkpoints, train.sentences, valid.sentences)
    text = f"""## Loss, in nats per symbol, and validation loss in bits\n\n{table(losses)}

## Norm of the gradient, by how many characters it goes back\n\n{table(lags)}

## Shares of known words and copied substrings, median length, share that ended\n\n{table(shares)}

## What they write without a start\n\n{firsts}"""
    print(f"\n{text}")
    with event_writer(folder / "comparison", "comparison") as writer:
        writer.add_text("comparison", text)
    (folder / "comparison" / "comparison.md").write_text(text, encoding="utf-8")
    say_next(("tensorboard --logdir", folder))


# ----------------------------------------------------------------------------------- command line

EPOCHS = 5
LR = {"muon": 0.05, "adamw": 0.008}
BATCH_SIZE = {"muon": 64, "adamw": 32}
GO_WITH = {  # the options that each way to call the script takes; training anew takes the others
    "compare": {"compare", "data"},
    "look": {"look", "data", "resume"},
    "resume": {"resume", *MAY_CHANGE},
}


def command_parser() -> argparse.ArgumentParser:
    """All options of the command line, with their ranges and defaults."""
    about = "Train a character model with a recurrent cell written by hand. (Defaults in parentheses.)"
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    add, folder = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    size, many = number(int, 1, 8192), number(int, 1, 10_000)
    whole, real = number(int, 0, 10**9), number(float, 0, 1e9)
    lr, batch = (", ".join(f"{name} {value}" for name, value in each.items()) for each in (LR, BATCH_SIZE))
    # fmt: off
    add("--model", nargs="+", choices=[*CELLS, "all"], default=["lstm"], help="several are compared (lstm)")
    add("--data", metavar="PATH", help=f"a UTF-8 text file (data/{CORPUS.name})")
    add("--lines", action="store_true", help="each line is an example, with or without full stops")
    add("--epochs", type=number(int, 1, 10**6), metavar="N", help=f"passes over the text ({EPOCHS})")
    add("--batch-size", type=size, metavar="B", help=f"sentences in a process's batch ({batch})")
    add("--embedding", type=size, default=128, metavar="E", help="size of a symbol's embedding (%(default)s)")
    add("--hidden", type=size, default=256, metavar="H", help="size of the hidden state (%(default)s)")
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="of the cell's matrices (%(default)s)")
    add("--lr", type=real, metavar="RATE", help=f"peak learning rate ({lr})")
    add("--clip", type=real, default=1.0, metavar="NORM", help="clip gradients to it (%(default)s; 0: never)")
    add("--recurrent-scale", type=real, default=1.0, metavar="FACTOR",
        help="on the initial recurrent matrices (%(default)s); 3 makes an rnn's gradients explode")
    add("--seed", type=whole, default=0, help="of the split, the weights, the shuffling (%(default)s)")
    add("--maxlen", type=many, default=2000, metavar="N", help="leave out longer sentences (%(default)s)")
    add("--maxsent", type=number(int, 2, 10**9), metavar="N", help="use the first N sentences only")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute (%(default)s here)")
    add("--scalars-every", type=whole, default=20, metavar="N", help="steps (%(default)s; 0: never)")
    add("--histograms-every", type=whole, default=50, metavar="N", help="steps (%(default)s; 0: never)")
    add("--save-every", type=real, default=30, metavar="S", help="save after S seconds (%(default)s; 0: no)")
    folder("--run", metavar="FOLDER", help="where the run goes (runs/MODEL-DATE_TIME)")
    folder("--resume", nargs="?", const="", metavar="RUN",
           help="go on with a run (alone: the newest); with --epochs N, train a finished one further")
    folder("--compare", nargs="+", metavar="RUN", help="compare trained runs, or all in a folder")
    add("--look", metavar="TEXT", help="a trained run's units on a text (of --resume RUN, else the newest)")
    # fmt: on
    return parser


def train_new(options) -> None:
    """Train a new run of each model that is asked for, on the same batches; then compare them."""
    models = list(CELLS) if "all" in options.model else options.model
    folder = Path(options.run or RUNS / f"{'-'.join(models)}-{time.strftime('%Y-%m-%d_%H%M%S')}")
    folders = {model: folder / model if len(models) > 1 else folder for model in models}
    options.epochs = options.epochs or EPOCHS
    options.lr = LR[options.optimizer] if options.lr is None else options.lr
    options.batch_size = (options.batch_size or BATCH_SIZE[options.optimizer]) * WORLD
    corpus = load_corpus(options)
    for each in folders.values():
        if not RANK and any(each.glob("*.pt")):
            raise LabError(f"{each} holds a run already: go on with --resume, or choose another --run")
    for model, each in folders.items():
        Training(argparse.Namespace(**vars(options) | {"model": model}), each, *corpus).run()
    if len(models) > 1 and not RANK:
        options.compare = folders.values()
        compare(options)


def resume(options) -> None:
    """Go on with a run; one that has finished is looked inside anew, or trained further given --epochs."""
    file = checkpoint_of(options.resume, "last.pt")
    checkpoint = load_checkpoint(file)
    with reading(file):
        options, train, valid = trained_on(checkpoint, options)
        training = Training(options, file.parent, train, valid)
        training.restore(checkpoint)
    print(f"going on after step {training.progress.step:,}")
    training.run()


def look(options) -> None:
    """Show the units of a trained run on a text."""
    text = code2string(codes_of(options.look))
    if not text.strip() or len(text) > 1000:
        raise LabError("--look: give a text of at most 1,000 characters")
    file = checkpoint_of(options.resume, "best.pt")
    checkpoint = load_checkpoint(file)
    _, _, valid = trained_on(checkpoint, options)
    look_inside(file.parent, checkpoint, valid, text)
    print(f"Their picture is 3_units/look of {printable(file.parent)}.")
    say_next(("tensorboard --logdir", file.parent.parent))


def main() -> None:
    parser = command_parser()
    options = parser.parse_args()
    mode = next((mode for mode in GO_WITH if getattr(options, mode) is not None), None)
    for name, value in vars(options).items():
        if mode and name not in GO_WITH[mode] and value != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} does not go with --{mode}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise LabError("--device cuda: this PyTorch sees no CUDA device; leave it out to train on the CPU")
    with suppress(OSError, AttributeError, TypeError):  # glibc alone: keep freed memory for the next step,
        libc = ctypes.CDLL(None)  # which else fetches it anew from the system, page by page
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
    if WORLD > 1:
        if options.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo")
    commands = {"compare": compare, "look": look, "resume": resume, None: train_new}
    with redirect_stdout(None if RANK else sys.stdout):
        commands[mode](options)
    if WORLD > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    guard(main)
