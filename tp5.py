"""Questions 2, 4 and 5: recurrent cells by hand, and a character model trained with them.

    python tp5.py --model lstm                   # or all: the three cells, then a comparison
    tensorboard --logdir runs

Shapes: T length, B batch, E embedding, H hidden, V symbols (97), G gates. Time comes first.
Losses and log-probabilities are in nats.
"""

import argparse
import ctypes
import functools
import hashlib
import io
import math
import os
import pickletools
import signal
import sys
import threading
import time
import zipfile
from bisect import bisect_left
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from datetime import timedelta
from itertools import islice, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from generate import BEAM, NUCLEUS, RUNS, copied, generate, generate_beam, newest_checkpoint
from textloader import (
    BATCH_SIZE,
    CORPUS,
    EOS_IX,
    FEATURES,
    HERE,
    LETTRES,
    PAD_IX,
    SYMBOLS,
    BucketSampler,
    LabError,
    Parser,
    TextDataset,
    class_of,
    clean,
    code2string,
    features,
    id2lettre,
    normalize,
    number,
    one_line,
    pad_collate_fn,
    read_text,
    run_main,
    string2code,
)

HIDDEN = 256

# ------------------------------------------------------------------------------------------- loss


def maskedCrossEntropy(output, target, padcar):
    """Question 2: mean negative log-likelihood (nats) of the symbols that are not padding.

    output (T, B, V) logits, target (T, B) codes, padcar the code of BLANK. A target without any
    real symbol gives 0; logits at padding positions do not matter, −inf or NaN included.
    """
    real = (target != padcar).flatten().nonzero().squeeze(1)
    logits = output.flatten(0, -2).index_select(0, real)  # (real symbols, V)
    log_probs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    wanted = target.flatten().index_select(0, real).unsqueeze(1)
    return -log_probs.gather(1, wanted).sum() / max(len(real), 1)


# ------------------------------------------------------------------------------------------ cells


class Cell(nn.Module):
    """What the three cells share: the input's half of every gate, and the loop over time.

    A cell calls like `torch.nn`'s: `output, state = rnn(x, state)`, with x (T, B, E), always a
    batch, output (T, B, H), and a state of tensors (B, H); without `state` it starts from zeros.

    W·[h, x] + b is W_h h + (W_x x + b). The second half needs no history: `project` computes it
    for all time steps at once. `equations` is one time step as the paper writes it, with a column
    for a sentence: there, states are (H, B). A CPU multiplies W·h a third faster than h·Wᵀ, too.

    A cell of your own needs `gates` and `equations`; autograd does the rest. Ours have `slopes` and
    `back` as well, the backward pass by hand: see `ThroughTime`.
    """

    back = None  # by hand, or else autograd's
    gates: tuple[str, ...]  # in the order of their rows in the parameters
    states: tuple[str, ...] = ("h",)  # the output first
    has_bias = True

    def __init_subclass__(cls):
        """An inherited backward pass is not that of new equations."""
        source = next(kind for kind in cls.__mro__ if {"equations", "back"} & vars(kind).keys())
        if "back" not in vars(source):
            cls.back = None

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        rows = len(self.gates) * hidden_size
        self.hidden_size = hidden_size
        self.input_weight = nn.Parameter(torch.empty(rows, input_size))
        self.hidden_weight = nn.Parameter(torch.empty(rows, hidden_size))
        self.register_parameter("bias", nn.Parameter(torch.empty(rows)) if self.has_bias else None)
        self.watched = None  # see `watch`
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each gate's input weights Glorot uniform, its recurrent matrix orthogonal, biases 0."""
        for gate in self.input_weight.chunk(len(self.gates)):
            nn.init.xavier_uniform_(gate)
        for gate in self.hidden_weight.chunk(len(self.gates)):  # keeps the norm of h, and of gradients
            nn.init.orthogonal_(gate)
        if self.has_bias:
            nn.init.zeros_(self.bias)

    def project(self, x):
        """W_x x + b of every gate: (…, E) → (…, G·H)."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, self.input_weight, self.bias)

    def zero_state(self, like):
        """The state before the first symbol; `like` (B, …) gives batch size, dtype and device."""
        zeros = like.new_zeros(like.shape[0], self.hidden_size)
        return zeros if len(self.states) == 1 else (zeros,) * len(self.states)

    def equations(self, W, px, *state):
        """One time step: W (G·H, H), px (G·H, B), states (H, B) → the states after, the gates."""
        raise NotImplementedError

    def weight_gradient(self, d_a, h, *_):
        """Σ_t ∂L/∂a_t·h_{t-1}ᵀ: d_a (G·H, T·B) and what was fed back (T, H, B) → (G·H, H)."""
        return d_a @ side_by_side(h[:-1], d_a.dtype).t()

    def one_step(self, projected, state):
        """One time step: projected (B, G·H) and the state before → the state after."""
        after, _ = self.equations(self.hidden_weight, projected.mT, *columns(state))
        return rows(after)

    def forward(self, x, state=None):
        return self.unroll(self.project(x), state)

    def unroll(self, projected, state=None):
        """All time steps: projected (T, B, G·H) → output (T, B, H), state after the last step."""
        state = self.zero_state(projected[0]) if state is None else state
        W, device = self.hidden_weight, projected.device.type
        if torch.is_autocast_enabled(device):
            W = W.to(torch.get_autocast_dtype(device))
        by_hand = self.back is not None and torch.is_grad_enabled()
        run = ThroughTime.apply if by_hand else through_time
        with torch.autocast(device, enabled=False):  # only the products with W leave float32
            output, *state = run(self, projected, W, *columns(state))
        return output.mT, rows(state)


sigmoid_slope = torch.ops.aten.sigmoid_backward  # (g, s) ↦ g ⊗ s ⊗ (1 − s)
tanh_slope = torch.ops.aten.tanh_backward  # (g, t) ↦ g ⊗ (1 − t²)


def columns(state) -> tuple:
    """A state as a tuple of (H, B): a column for each sentence."""
    return tuple(part.mT for part in (state if isinstance(state, tuple) else (state,)))


def rows(state):
    """A state as `torch.nn` has it: (B, H), or a tuple of them."""
    state = tuple(part.mT for part in state)
    return state if len(state) > 1 else state[0]


def side_by_side(steps, dtype):
    """(T, …, B) → (…, T·B): the columns of all time steps in one matrix."""
    return steps.movedim(0, -2).flatten(-2).to(dtype)


def times(W, h, plus=None):
    """W·h + plus. A W in bfloat16 makes the product bfloat16; `plus` and the sum stay float32."""
    if plus is None:
        return (W @ h.to(W.dtype)).to(h.dtype)
    return torch.addmm(plus, W, h) if W.dtype == h.dtype else plus + W @ h.to(W.dtype)


def through_time(cell, projected, W, *state, record=None):
    """The loop over time: projected (T, B, G·H), states (H, B) → output (T, H, B), last states.

    A list `record` gets the states (T + 1, H, B), the first ones included, then the gates (T, H, B).
    """
    states, all_gates = [state], []
    for px in projected.unbind(0):
        state, gates = cell.equations(W, px.mT, *state)
        states.append(state)
        if record is not None:
            all_gates.append(gates)
        if cell.watched is not None:
            shown = dict(zip(cell.gates + cell.states, gates + state, strict=True))
            for name, values in shown.items():
                cell.watched.setdefault(name, []).append(values.detach().mT)
    if record is None:
        return torch.stack([h for h, *_ in states[1:]]), *state
    record += map(torch.stack, (*zip(*states, strict=True), *zip(*all_gates, strict=True)))
    return record[0][1:], *state


class ThroughTime(torch.autograd.Function):
    """The loop over time with its backward pass by hand: back-propagation through time (Werbos 1990).

    Autograd would replay every operation of every step. The chain rule needs less. Write a_t for a
    step's pre-activations W·h_{t-1} + px_t. Going from the last step to the first,

        ∂L/∂a_t     = slope_t ⊗ ∂L/∂state_t          the slopes need no gradient: `cell.slopes`
                                                     computes those of all steps at once
        ∂L/∂h_{t-1} = Wᵀ·∂L/∂a_t + what h_{t-1} did elsewhere                  `cell.back`

    and at the end, since W is the same at all steps, ∂L/∂W = Σ_t ∂L/∂a_t·h_{t-1}ᵀ is one product of
    all steps side by side. The plain loop under autograd, `through_time`, gives the same gradients.
    """

    @staticmethod
    def forward(ctx, cell, projected, W, *state):
        ctx.cell, record = cell, []
        outputs = through_time(cell, projected, W, *state, record=record)
        ctx.save_for_backward(W, *record)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output, *d_state):
        cell, (W, *record) = ctx.cell, ctx.saved_tensors
        slopes, *others = cell.slopes(*record)  # (T, G, H, B), others (T, H, B)
        W_T = W.t().contiguous()
        *elsewhere, d_h = torch.cat([torch.zeros_like(d_output[:1]), d_output])  # h_0 did nothing elsewhere
        d_state = d_state[0] + d_h, *d_state[1:]
        for slope, *other in reversed([*zip(slopes, *others, elsewhere, strict=True)]):
            d_state = cell.back(W_T, slope, *other, *d_state)
        d_a = side_by_side(slopes, W.dtype).flatten(0, 1)  # (G·H, T·B): the slopes became gradients
        d_W = cell.weight_gradient(d_a, *record)
        d_projected = d_a.to(slopes.dtype).view(len(W), len(d_output), -1).permute(1, 2, 0)
        return None, d_projected, d_W, *d_state


class RNN(Cell):
    """h_t = tanh(W·[h_{t-1}, x_t] + b)    (Elman 1990)"""

    gates = ("h",)

    def equations(self, W, px, h):
        h = torch.tanh(times(W, h, px))
        return (h,), (h,)

    def slopes(self, h, *_):
        return (1 - h[1:, None] ** 2,)

    def back(self, W_T, slope, elsewhere, d_h):
        d_a = slope[0].mul_(d_h)
        return (times(W_T, d_a, elsewhere),)


class LSTM(Cell):
    """Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000).

    f_t = σ(W_f·[h_{t-1}, x_t] + b_f)                                forget gate
    i_t = σ(W_i·[h_{t-1}, x_t] + b_i)                                input gate
    C_t = f_t ⊗ C_{t-1} + i_t ⊗ tanh(W_C·[h_{t-1}, x_t] + b_C)       memory
    o_t = σ(W_o·[h_{t-1}, x_t] + b_o)                                output gate
    h_t = o_t ⊗ tanh(C_t)

    The state is the pair (h, C).
    """

    gates = ("f", "i", "candidate", "o")
    states = ("h", "C")

    def reset_parameters(self) -> None:
        """As the others, but the forget gate's bias is 1: at first the memory is kept."""
        super().reset_parameters()
        nn.init.ones_(self.bias[: self.hidden_size])

    def equations(self, W, px, h, C):
        f, i, candidate, o = times(W, h, px).chunk(4)
        f = torch.sigmoid(f)
        i = torch.sigmoid(i)
        candidate = torch.tanh(candidate)
        C = f * C + i * candidate
        o = torch.sigmoid(o)
        h = o * torch.tanh(C)
        return (h, C), (f, i, candidate, o)

    def slopes(self, h, C, f, i, candidate, o):
        """Of f, i and the candidate on C, of o on h; the forget gate; the slope of C on h."""
        tanh_C = torch.tanh(C[1:])
        on_C = sigmoid_slope(C[:-1], f), sigmoid_slope(candidate, i), tanh_slope(i, candidate)
        return torch.stack([*on_C, sigmoid_slope(tanh_C, o)], dim=1), f, tanh_slope(o, tanh_C)

    def back(self, W_T, slope, f, C_on_h, elsewhere, d_h, d_C):
        d_C = torch.addcmul(d_C, d_h, C_on_h)
        slope[:3].mul_(d_C)
        slope[3].mul_(d_h)
        return times(W_T, slope.flatten(0, 1), elsewhere), d_C * f


class GRU(Cell):
    """Gated recurrent unit (Cho et al. 2014), without biases as in the handout.

    z_t = σ(W_z·[h_{t-1}, x_t])
    r_t = σ(W_r·[h_{t-1}, x_t])
    h_t = (1 − z_t) ⊗ h_{t-1} + z_t ⊗ tanh(W·[r_t ⊗ h_{t-1}, x_t])

    It resets before the product, and z admits the new state: `torch.nn.GRU` does neither.
    """

    gates = ("z", "r", "candidate")
    has_bias = False

    def equations(self, W, px, h):
        size = [2 * self.hidden_size, self.hidden_size]
        (W_zr, W), (px_zr, px) = W.split(size), px.split(size)
        z, r = torch.sigmoid(times(W_zr, h, px_zr)).chunk(2)
        candidate = torch.tanh(times(W, r * h, px))
        h = (1 - z) * h + z * candidate
        return (h,), (z, r, candidate)

    def slopes(self, h, z, r, candidate):
        """Of z on h, of r on r ⊗ h, of the candidate on h; what h keeps of itself; the reset gate."""
        of_z, of_r = sigmoid_slope(candidate - h[:-1], z), sigmoid_slope(h[:-1], r)
        return torch.stack([of_z, of_r, tanh_slope(z, candidate)], dim=1), 1 - z, r

    def back(self, W_T, slope, kept, r, elsewhere, d_h):
        W_zr_T, W_T = W_T.split([2 * self.hidden_size, self.hidden_size], dim=1)
        slope[::2].mul_(d_h)  # z and the candidate
        d_reset = times(W_T, slope[2])  # of r ⊗ h
        slope[1].mul_(d_reset)
        return (times(W_zr_T, slope[:2].flatten(0, 1), elsewhere + d_h * kept + d_reset * r),)

    def weight_gradient(self, d_a, h, z, r, candidate):
        d_zr, d_candidate = d_a.split([2 * self.hidden_size, self.hidden_size])
        fed = side_by_side(r * h[:-1], d_a.dtype)  # the candidate's matrix multiplied r ⊗ h
        return torch.cat([super().weight_gradient(d_zr, h), d_candidate @ fed.t()])


CELLS = {"rnn": RNN, "gru": GRU, "lstm": LSTM}


@contextmanager
def watch(cell):
    """Collect what `cell` shows while it runs: a dict from gate or state to a list of T (B, H)."""
    cell.watched = {}
    try:
        yield cell.watched
    finally:
        cell.watched = None


# ------------------------------------------------------------------------------------------ model


class CharModel(nn.Module):
    """Question 4: embedding, cell, and a linear decoder from hidden state to logits.

    cell is "rnn", "gru" or "lstm". `model.rnn` may be replaced by any module that calls like
    `torch.nn`'s cells, a student's for one.
    """

    def __init__(self, cell: str, embedding_size: int, hidden_size: int):
        super().__init__()
        self.cell = cell
        self.emb = nn.Embedding(SYMBOLS, embedding_size)  # normal, as torch draws it
        self.rnn = CELLS[cell](embedding_size, hidden_size)
        self.decoder = nn.Linear(hidden_size, SYMBOLS)  # uniform, as torch draws it

    @staticmethod
    def inputs(targets):
        """What is read to predict targets (T, B): EOS opens, then comes each symbol but the last."""
        return torch.cat([torch.full_like(targets[:1], EOS_IX), targets[:-1]])

    def forward(self, targets):
        """Targets (T, B), each sentence closed by EOS → logits (T, B, V) that predict exactly those."""
        inputs = self.inputs(targets)
        if isinstance(self.rnn, Cell):
            # Only V symbols exist: project each once, then look up instead of multiplying T·B times.
            table = self.rnn.project(self.emb.weight).t()  # (G·H, V), a column for each symbol
            projected = table.index_select(1, inputs.flatten()).view(-1, *inputs.shape)
            output, _ = self.rnn.unroll(projected.permute(1, 2, 0))  # (T, B, H)
        else:
            output, _ = self.rnn(self.emb(inputs))
        return self.decoder(output)


class Outline(TorchFunctionMode):
    """`with Outline():` a model has its shapes, but no memory, no values, and draws no random numbers.

    As `torch.device("meta")`, but for random values: what torch does in their place takes it a second to import.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        with torch.device("meta"):
            return function(*args, **(kwargs or {}))


@torch.no_grad()
def evaluate(model, loader, device) -> float:
    """Nats per symbol (EOS included, BLANK excluded) over all batches of `loader`, in every process."""
    nats, symbols = 0.0, 0
    for batch in loader:
        count = int((batch != PAD_IX).sum())
        batch = batch.to(device)
        nats += maskedCrossEntropy(model(batch), batch, PAD_IX).item() * count
        symbols += count
    nats, symbols = everywhere(nats, symbols)
    return nats / symbols


# --------------------------------------------------------------------------------- looking inside

LAGS = 40  # characters that a loss is followed back
LONGEST = 1000  # characters of a validation sentence that are looked at, its first


def gradient_flow(model, batch, lags: int = LAGS) -> dict:
    """How far back a loss is felt: ‖∂loss_t/∂s_{t−k}‖ for each state s and k = 0 … lags, mean over sentences.

    Of each sentence in batch (T, B) that is long enough, one symbol t is drawn, and only its loss
    counts. So no two losses meet in a column, and one backward pass gives the gradients of all.
    They are total derivatives: what C does by way of its own h is C's. Returns name → (lags + 1,),
    fewer if the longest sentence has not as many.
    """
    cell, steps = model.rnn, []
    lengths = (batch != PAD_IX).sum(0)
    lags = min(lags, int(lengths.max()) - 1)
    batch, lengths = batch[:, lengths > lags], lengths[lengths > lags]
    draw = torch.rand(len(lengths), generator=torch.Generator().manual_seed(0)).to(batch.device)
    t, b = lags + (draw * (lengths - lags)).long(), torch.arange(len(lengths), device=batch.device)
    projected = cell.project(model.emb(model.inputs(batch[: t.max() + 1])))
    state = columns(cell.zero_state(projected[0]))
    for px in projected.unbind(0):  # not `through_time`: gradients are asked of each step's own states
        state, _ = cell.equations(cell.hidden_weight, px.mT, *state)
        steps.append(state)
    output = torch.stack([h for h, *_ in steps])  # (T, H, B)
    loss = F.cross_entropy(model.decoder(output[t, :, b]), batch[t, b], reduction="sum")
    flow = {}
    for name, parts in zip(cell.states, zip(*steps, strict=True), strict=True):
        slopes = torch.autograd.grad(loss, parts, retain_graph=True, materialize_grads=True)
        norms = torch.stack(slopes).norm(dim=1)  # (T, B)
        flow[name] = norms.gather(0, t - torch.arange(lags + 1, device=t.device)[:, None]).mean(1)
    return flow


@torch.no_grad()
def recurrence(cell) -> dict:
    """Largest singular value and spectral radius of each gate's recurrent matrix."""
    found = {}
    for gate, W in zip(cell.gates, cell.hidden_weight.chunk(len(cell.gates)), strict=True):
        found[f"{gate}_singular_value"] = torch.linalg.matrix_norm(W, 2).item()
        found[f"{gate}_spectral_radius"] = torch.linalg.eigvals(W).abs().max().item()
    return found


@torch.no_grad()
def units(model, batch) -> dict:
    """What the cell shows while it reads batch (T, B): gate or state → (real symbols, H), sentence by sentence."""
    with watch(model.rnn) as seen:
        model(batch.to(model.emb.weight.device))
    real = (batch != PAD_IX).t()
    return {name: torch.stack(steps, 1).cpu()[real] for name, steps in seen.items()}


def tracking(model, batches) -> dict:
    """Correlation of every unit with each of FEATURES over the real symbols of (T, B) batches.

    Returns gate or state → (features, H); 0 where the unit or the feature never changes.
    """
    known = [features(code2string(sentence)) for batch in batches for sentence in batch.t().tolist()]
    known, seen, found = torch.cat(known).t(), [units(model, batch) for batch in batches], {}
    for name in seen[0]:
        values = torch.cat([part[name] for part in seen]).t()  # (H, symbols)
        found[name] = torch.cat([known, values]).corrcoef()[: len(known), len(known) :].nan_to_num()
    return found


def followers(correlations: dict) -> list[dict]:
    """For each feature that occurred, the unit that follows it most closely, of all gates and states."""
    rows = []
    for i, feature in enumerate(FEATURES):
        gate = max(correlations, key=lambda name: correlations[name][i].abs().max())
        unit = correlations[gate][i].abs().argmax().item()
        r = correlations[gate][i, unit].item()
        rows.append({"what it follows": feature, "gate or state": gate, "unit": unit, "correlation": r})
    return [row for row in rows if row["correlation"]]


def picture(values, text: str, gate: bool):
    """Values (n + 1, H) while `text` was read as an image, (height, width, 3): units down, characters across.

    Blue is a closed `gate` or a negative state, white half open or 0, red open or positive. Units
    that rise and fall together stand together: they are sorted along the first principal component.
    """
    from PIL import Image, ImageDraw  # comes with TensorBoard

    signed = 2 * values - 1 if gate else values / values.abs().max().clamp(min=1)
    order = torch.linalg.svd(signed - signed.mean(0), full_matrices=False).Vh[0].argsort()
    signed = signed[:, order].t()  # (H, n + 1)
    colours = torch.stack([1 + signed.clamp(max=0), 1 - signed.abs(), 1 - signed.clamp(min=0)], -1)
    pixels = (255 * colours).byte().numpy().repeat(max(2, 400 // len(order)), 0).repeat(8, 1)
    image = Image.new("RGB", (pixels.shape[1], pixels.shape[0] + 14), "white")
    image.paste(Image.fromarray(pixels), (0, 14))
    draw = ImageDraw.Draw(image)
    for i, char in enumerate(text, start=1):  # column 0 is that of EOS
        draw.text((8 * i + 1, 1), char, "black")
    return np.asarray(image)


# ------------------------------------------------------------------------------------- monitoring


def while_writable(method):
    """A method of Monitor that does nothing once events cannot be written."""

    @functools.wraps(method)
    def call(self, *arguments, **named):
        try:
            return method(self, *arguments, **named) if self.writer else None
        except OSError as error:
            self.give_up(error)

    return call


INTERVAL = dict(steps=0, symbols=0, clipped=0, nats=0.0, seconds=0.0)  # sums since scalars were last written


class Monitor:
    """Question 5: what TensorBoard shows of a run.

    `scalars_every` and `histograms_every` count training steps; 0 turns either off, the latter with
    all that is shown of the cells' inside. What an interrupted run wrote at `step` or later is struck
    out; `interval` is its interval under way.
    """

    def __init__(self, folder, options, step: int | None, interval: dict | None = None, name: str = ""):
        self.writer, self.interval = None, dict(interval or INTERVAL)
        self.scalars_every, self.histograms_every = options.scalars_every, options.histograms_every
        if not RANK:
            self.open(folder, step, name)

    def open(self, folder, step: int | None, name: str) -> None:
        """Begin an events file; with a `name`, in place of the older one of that name."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import; only training needs it

        before = threading.excepthook  # the writer's thread also hands an OSError to our next call
        threading.excepthook = lambda failed: isinstance(failed.exc_value, OSError) or before(failed)
        try:
            for old in folder.glob(f"events*.{name}") if name else ():
                old.unlink()
            self.writer = SummaryWriter(folder, purge_step=step, filename_suffix=name and f".{name}")
        except OSError as error:
            self.give_up(error)

    def give_up(self, error: OSError) -> None:
        """Say that events cannot be written; all else goes on without."""
        self.writer = None
        warn(f"cannot write TensorBoard's events: {error.strerror}; nothing more is recorded, all else goes on")

    def wants_histograms(self, step: int) -> bool:
        """Whether gates and gradients of this step are recorded."""
        return bool(self.writer) and self.histograms_every > 0 and step % self.histograms_every == 0

    @while_writable
    def histograms(self, model, states, real, step: int) -> None:
        """Every parameter, its gradient, and every gate and state where `real` (T, B) is true."""
        for name, parameter in model.named_parameters():
            self.writer.add_histogram(f"parameters/{name}", parameter.detach().cpu(), step, bins=64)
            self.writer.add_histogram(f"gradients/{name}", parameter.grad.cpu(), step, bins=64)
        for name, values in states.items():
            values = torch.stack(values)[real].cpu()  # (real symbols, H)
            self.writer.add_histogram(f"gates/{model.cell}/{name}", values, step, bins=64)

    @while_writable
    def step(self, step: int, rate: float, norm: float, **sums) -> None:
        """Account for one training step; every `scalars_every` steps, write the interval's means."""
        total = self.interval = {name: self.interval[name] + sums[name] for name in self.interval}
        if self.scalars_every and step % self.scalars_every == 0:
            self.writer.add_scalar("loss/train", total["nats"] / total["symbols"], step)
            self.writer.add_scalar("gradient/norm_before_clipping", norm, step)
            self.writer.add_scalar("gradient/clipped_share", total["clipped"] / total["steps"], step)
            self.writer.add_scalar("training/learning_rate", rate, step)
            self.writer.add_scalar("training/characters_per_second", total["symbols"] / total["seconds"], step)
            self.interval = dict(INTERVAL)

    @while_writable
    def epoch(self, step: int, valid: float, samples: dict[str, str]) -> None:
        """The validation loss and the sentences of an epoch."""
        self.writer.add_scalar("loss/validation", valid, step)
        self.writer.add_scalar("loss/validation_bits_per_character", valid / math.log(2), step)
        for decoder, text in samples.items():
            self.text(f"samples/{decoder}", text, step)

    @while_writable
    def flow(self, flows: dict) -> None:
        """Gradient flow, a curve for each state; its step is the lag, in characters."""
        for (state, when), norms in flows.items():
            for lag, norm in enumerate(norms.tolist()):
                self.writer.add_scalar(f"gradient_flow/{state}_{when}", norm, lag)

    @while_writable
    def recurrence(self, cell, step: int) -> None:
        """The size of the recurrent matrices."""
        for what, size in recurrence(cell).items():
            self.writer.add_scalar(f"recurrence/{what}", size, step)

    @while_writable
    def look(self, model, text: str, number: int) -> None:
        """An image of every gate and state while `text` is read."""
        for name, values in units(model, pad_collate_fn([string2code(text)])).items():
            image = picture(values, normalize(text), gate=name not in (*model.rnn.states, "candidate"))
            self.writer.add_image(f"look/{model.cell}/{name}", image, number, dataformats="HWC")

    @while_writable
    def symbols(self, emb, folder) -> None:
        """The embedding for the projector, labelled by symbol and class."""
        labels = [[symbol.replace(" ", "space"), class_of(symbol)] for symbol in id2lettre.values()]
        (folder / "projector_config.pbtxt").unlink(missing_ok=True)  # the writer would add to it
        with redirect_stdout(None):  # and warn of labels that are there already
            self.writer.add_embedding(emb.weight, labels, tag="symbols", metadata_header=["symbol", "class"])

    @while_writable
    def summary(self, options: dict, figures: dict, step: int) -> None:
        """A row for the hparams view: the run's options and its figures."""
        from torch.utils.tensorboard.summary import hparams

        figures = {f"summary/{name.replace(' ', '_')}": value for name, value in figures.items()}
        options = {name: value for name, value in options.items() if value is not None}
        for part in hparams(options, figures):  # the writer's own add_hparams would make a run of its own
            self.writer.file_writer.add_summary(part)
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    @while_writable
    def text(self, tag: str, text: str, step: int = 0) -> None:
        """A text in Markdown."""
        self.writer.add_text(tag, text.replace("<", "&lt;"), step)

    @while_writable
    def flush(self) -> None:
        """Have everything on disk."""
        self.writer.flush()

    @while_writable
    def close(self) -> None:
        self.writer.close()


def samples(model, start: str, seed: int) -> dict:
    """What each decoder makes of `start`: name → Hypothesis. Each draws from the seed anew."""
    parts = (model.rnn, model.emb, model.decoder, EOS_IX)

    def drawn(**space):
        return generate(*parts, start, temperature=1.0, generator=torch.Generator().manual_seed(seed), **space)

    beam, nucleus_beam = (generate_beam(*parts, BEAM, start, n=1, alpha=alpha)[0] for alpha in (1.0, NUCLEUS))
    return {
        "greedy": generate(*parts, start),
        "sampled": drawn(),
        "nucleus": drawn(alpha=NUCLEUS),
        "beam": beam,
        "nucleus beam": nucleus_beam,
    }


def shown(hypothesis, start: str = "") -> str:
    """A sentence with its log-probability."""
    cut = "" if hypothesis.ended else " …"
    return f"{start}{hypothesis.text}{cut}   ({hypothesis.log_prob:.1f} nats)"


# ------------------------------------------------------------------------------------ checkpoints

FORMAT = 3
FIELDS = {
    "format": int,
    "alphabet": str,
    "model": dict,
    "weights": dict,
    "corpus": dict,
    "processes": int,
    "options": dict,
    "optimizer": dict,
    "random": dict,
    "progress": dict,
    "interval": dict,
    "norms": torch.Tensor,
}
# All that the pickle in a checkpoint may name.
GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage", "torch ByteStorage"}


def save(path: Path, checkpoint: dict) -> None:
    """Write beside, flush to disk, rename: the file is the old one or the new one, never a half."""
    beside, content = path.with_suffix(".tmp"), io.BytesIO()
    torch.save(checkpoint, content)
    try:
        with open(beside, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        if os.name == "posix":  # the new name is in the folder, which has to reach the disk too
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()  # a half takes room and is of no use
        raise LabError(f"cannot write {path}: {error.strerror}; the last good one is kept") from None


@contextmanager
def locked(folder: Path):
    """Keep `folder` to this run; however its process ends, the system gives the lock back."""
    if RANK:
        yield
        return
    try:
        file = open(folder / "lock", "a")  # noqa: SIM115
    except OSError as error:
        raise LabError(f"cannot write in {folder}: {error.strerror}") from None
    with file:
        try:
            if os.name == "posix":
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise LabError(f"{folder} is locked, another process trains this run ({error.strerror})") from None
        yield


def warn(message: str) -> None:
    """One line on standard error."""
    print(f"warning: {one_line(message)}", file=sys.stderr)


def configuration(options) -> dict:
    """The model that a command line asks for, as CharModel's arguments."""
    return dict(cell=options.model, embedding_size=options.embedding, hidden_size=options.hidden)


def records(file) -> io.BytesIO:
    """The archive in `file` made anew from its records, each checked: torch reads this copy and nothing else.

    Raises LabError or whatever zipfile and pickletools raise on a damaged or foreign file. A record
    cannot inflate, so that a small file stays small; its pickle names nothing but tensors' parts.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(copy, "w") as clean:
        found = archive.infolist()
        stored = all(record.compress_type == zipfile.ZIP_STORED for record in found)
        if not stored or sum(record.file_size for record in found) > os.fstat(file.fileno()).st_size:
            raise LabError("its records claim more than the file holds")
        for record in found:
            content = archive.read(record)  # raises BadZipFile unless its CRC is right
            if record.filename.endswith(".pkl"):
                named = {what for opcode, what, _ in pickletools.genops(content) if "GLOBAL" in opcode.name}
                if not named <= GLOBALS:
                    raise LabError(f"it names {min(named - GLOBALS, key=str)}, which no checkpoint needs")
            clean.writestr(record.filename, content)
    copy.seek(0)
    return copy


def load_checkpoint(path) -> dict:
    """Read a checkpoint without running anything in it; LabError if it is not a sound one of ours."""
    try:
        with open(path, "rb") as file:
            checkpoint = torch.load(records(file), map_location="cpu", weights_only=True)
            check(checkpoint, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise LabError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # whatever a foreign or damaged file makes zipfile, pickletools, torch or `check` raise
        reason = (str(error) or type(error).__name__).splitlines()[0][:150]
        raise LabError(f"{path} is not a checkpoint of this lab, or is damaged: {reason}") from None
    return checkpoint


def kinds(values: dict) -> dict:
    """The type of each value; True is no 1 and 1 is no 1.0."""
    return {name: type(value) for name, value in values.items()}


def check(checkpoint, size: int) -> None:
    """Raise unless every field is as a run of this program saves it, in a file of `size` bytes."""
    if type(checkpoint) is not dict or type(checkpoint.get("format")) is not int:
        raise LabError("it holds something else")
    if checkpoint["format"] != FORMAT:
        raise LabError(f"format {checkpoint['format']}, this program reads {FORMAT}: train again")
    if kinds(checkpoint) != FIELDS:
        raise LabError("a field is missing, unknown or of a wrong kind")
    if checkpoint["alphabet"] != LETTRES:
        raise LabError("it was trained on another alphabet, its symbols are not ours")
    for field in ("model", "corpus", "options", "progress", "interval"):
        if not {str, int, float, bool, type(None)}.issuperset(kinds(checkpoint[field]).values()):
            raise LabError(f"its {field} has more than text and numbers")
    options = checked_options(checkpoint["options"])
    model = configuration(options)
    if checkpoint["model"] != model or kinds(checkpoint["model"]) != kinds(model):
        raise LabError("its model is not the one of its options")
    if kinds(checkpoint["corpus"]) != {"name": str, "sha256": str}:
        raise LabError("its corpus is not described")
    if checkpoint["processes"] < 1:
        raise LabError("it was trained by no process")
    check_numbers(checkpoint, options)
    check_tensors(checkpoint, size)


def checked_options(saved: dict) -> argparse.Namespace:
    """A checkpoint's options, through the command line's own checks."""
    arguments = []
    for name, value in saved.items():
        option = f"--{name.replace('_', '-')}"
        if value is not None and value is not False:
            arguments.append(option if value is True else f"{option}={value}")
    options = command_parser().parse_args(arguments)
    parsed = to_save(options)
    if parsed != saved or kinds(parsed) != kinds(saved):
        raise LabError("its options are not those of this program")
    return options


def check_numbers(checkpoint: dict, options) -> None:
    """Raise unless progress and interval are as START and INTERVAL, not below 0, and within the run."""
    for name, like in (("progress", START), ("interval", INTERVAL)):
        numbers = checkpoint[name]
        if kinds(numbers) != kinds(like):
            raise LabError(f"its {name} is not that of this program")
        if not all(number >= 0 for number in numbers.values()):  # NaN is not either
            raise LabError(f"its {name} has a number below 0 or none at all")
    progress = checkpoint["progress"]
    if progress["epoch"] > options.epochs or progress["batch"] > progress["step"]:
        raise LabError("its progress is beyond its end")
    if progress["in_row"] > min(progress["skipped"], 2):  # the third would have ended the run
        raise LabError("its skipped steps do not add up")


def check_tensors(checkpoint: dict, size: int) -> None:
    """Raise unless weights, moments and random states have the model's shapes and the file's `size`."""
    weights, moments, random = checkpoint["weights"], checkpoint["optimizer"], checkpoint["random"]
    tensors = [*weights.values(), *random.values(), *(t for parts in moments.values() for t in parts.values())]
    tensors.append(checkpoint["norms"])
    if any(type(t) is not torch.Tensor or t.device.type != "cpu" for t in tensors):
        raise LabError("something stands in place of a tensor")
    if sum(t.numel() * t.element_size() for t in tensors) > size:
        raise LabError("its tensors claim more than the file holds")
    with Outline():  # shapes without memory: the sizes may be lies
        model = CharModel(**checkpoint["model"])
    check_shapes(weights, {name: value.shape for name, value in model.state_dict().items()}, "weights")
    steps = checkpoint["progress"]["step"] - checkpoint["progress"]["skipped"]  # that the optimiser made
    check_shapes({"norms": checkpoint["norms"]}, {"norms": (steps,)}, "gradient norms")
    if steps and checkpoint["norms"].min() < 0:
        raise LabError("its gradient norms are below 0")
    parameters = dict(enumerate(model.parameters())) if moments else {}  # a best.pt has no moments
    if moments.keys() != parameters.keys() or (moments and not steps):
        raise LabError("its optimiser is not that of its model")
    for i, parameter in parameters.items():
        shapes = dict(step=torch.Size(), exp_avg=parameter.shape, exp_avg_sq=parameter.shape)
        check_shapes(moments[i], shapes, "optimiser's moments")
        if moments[i]["step"] != steps or moments[i]["exp_avg_sq"].min() < 0:
            raise LabError("its optimiser's moments are out of range")
    if not {"cpu"} <= random.keys() <= {"cpu", "cuda"}:
        raise LabError("its random states are not those of this program")
    torch.Generator().set_state(random["cpu"])  # raises if it is none


def check_shapes(tensors: dict, shapes: dict, what: str) -> None:
    """Raise unless `tensors` are finite float32 of these shapes, by name."""
    if {name: t.shape for name, t in tensors.items()} != shapes:
        raise LabError(f"its {what} do not fit its model")
    if not all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors.values()):
        raise LabError(f"its {what} are not finite numbers of 32 bits")


def model_of(checkpoint: dict) -> CharModel:
    """The model of a checkpoint, ready to write."""
    with Outline():  # its weights are replaced at once
        model = CharModel(**checkpoint["model"])
    model.load_state_dict(checkpoint["weights"], assign=True)
    return model.eval()


def load_model(path) -> CharModel:
    """A trained model, ready to write; LabError if `path` is not a checkpoint of this lab."""
    return model_of(load_checkpoint(path))


# -------------------------------------------------------------------------------------- processes

# torchrun starts `WORLD` processes that train one model, each on its share of every batch; number 0
# alone prints and writes. Without torchrun there is one, and torch.distributed is not touched.
TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANK, WORLD = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if TORCHRUN else (0, 1)


@contextmanager
def joined(device: str):
    """Meet torchrun's other processes; LabError if one of them is lost on the way."""
    if WORLD == 1:
        yield
        return
    from torch import distributed

    if device == "cuda":
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise LabError(f"--nproc-per-node is more than the {torch.cuda.device_count()} CUDA devices here")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=60))
    try:
        with redirect_stdout(None) if RANK else nullcontext():
            yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise  # our own mistake
        raise LabError(
            "another process of this run is lost: go on from the last checkpoint with "
            f"torchrun --nproc-per-node N tp5.py --resume ({str(error).splitlines()[0]})"
        ) from None
    distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads outlive that call, and now and then abort the interpreter's own end


def everywhere(*numbers: float) -> tuple[float, ...]:
    """Each number's sum over all processes."""
    if WORLD == 1:
        return numbers
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(sums)
    return tuple(sums.tolist())


def share(loader, start: int = 0) -> DataLoader:
    """This process's part of the loader's batches from number `start` on; those before are not even loaded.

    A batch is sorted by length (nearly), so that every `WORLD`-th sentence makes parts of equal work. A part
    without a sentence, of a last batch of few, is a BLANK: nothing to learn from, nothing to count.
    """
    parts = (batch[RANK::WORLD] for batch in islice(loader.batch_sampler, start, None))
    own = torch.Generator()  # DataLoader draws from it, and not from the state that checkpoints hold

    def collate(samples):
        return pad_collate_fn(samples) if samples else torch.full((1, 1), PAD_IX)

    return DataLoader(loader.dataset, batch_sampler=parts, collate_fn=collate, generator=own)


# --------------------------------------------------------------------------------------- training


def load_corpus(options):
    """Training and validation sentences (a tenth, drawn by seed), and the corpus's name and SHA-256."""
    digest = hashlib.sha256()
    dataset = TextDataset(read_text(HERE / options.data, digest), maxsent=options.maxsent, maxlen=options.maxlen)
    if len(dataset) < 2:
        raise LabError(
            f"{options.data} has {len(dataset)} sentence(s), training needs 2: a sentence ends with . ! or ? "
            f"({dataset.left_out() or 'nothing'} left out)"
        )
    held_out = max(1, len(dataset) // 10)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(options.seed))
    order = order.numpy().astype(np.int32)  # `random_split` makes lists, ten times as big
    train, valid = Subset(dataset, order[:-held_out]), Subset(dataset, order[-held_out:])
    sizes = f"{len(dataset):,} sentences, {len(train):,} to train on and {len(valid):,} to validate"
    print(f"{one_line(options.data)}: {sizes}")
    if dataset.left_out():
        print(f"left out: {dataset.left_out()}")
    return train, valid, {"name": one_line(Path(options.data).name), "sha256": digest.hexdigest()}


def batches(subset, options, shuffle: bool) -> DataLoader:
    """Bucketed batches of a split; shuffled by `options.seed` and the epoch."""
    lengths = subset.dataset.lengths[subset.indices]
    sampler = BucketSampler(lengths, options.batch_size, shuffle=shuffle, seed=options.seed)
    return DataLoader(subset, batch_sampler=sampler, collate_fn=pad_collate_fn)


def keep_freed_memory() -> None:
    """Ask glibc to keep what is freed: to give it back and fetch it again costs a tenth of each step."""
    with suppress(OSError, AttributeError, TypeError):  # no glibc here
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD, bytes


def has_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(there for name, there in torch.cpu.get_capabilities().items() if "bf16" in name)


def cosine(step: int, steps: int) -> float:
    """Factor on the learning rate: linear warm-up over 5 % of the steps, then half a cosine to 0."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


# `batch` of `epoch` comes next; nats, symbols and seconds are the epoch's sums so far; steps skipped
# since the start, and the last ones in a row; seconds trained and symbols read since the start; the
# training loss of the last whole epoch.
START = dict(
    **dict(epoch=0, batch=0, step=0, nats=0.0, symbols=0, seconds=0.0, best=math.inf, skipped=0, in_row=0),
    **dict(trained=0.0, read=0, train=math.inf),
)


def initial_model(options) -> CharModel:
    """The model that the seed makes, its recurrent matrices multiplied by `recurrent_scale`."""
    torch.manual_seed(options.seed)
    model = CharModel(**configuration(options)).to(options.device)
    with torch.no_grad():
        model.rnn.hidden_weight *= options.recurrent_scale
    return model


class Training:
    """A run: model, optimiser, schedule and progress; all that a checkpoint holds."""

    def __init__(self, options, folder: Path, train, valid, corpus: dict):
        self.options, self.folder, self.corpus = options, folder, corpus
        keep_freed_memory()
        if options.threads:
            torch.set_num_threads(options.threads)
        self.bf16 = options.precision == "bf16" and has_bfloat16(options.device)
        if self.bf16 != (options.precision == "bf16"):
            print("--precision bf16: this machine has no fast bfloat16, training goes on in float32")
        self.model = initial_model(options)
        self.train, self.valid = batches(train, options, True), batches(valid, options, False)
        self.steps = options.epochs * len(self.train)
        symbols = int(self.train.batch_sampler.lengths.sum()) + len(train)  # each sentence's end included
        self.mean_symbols = symbols / len(self.train)  # of a batch
        self.parallel = self.model if WORLD == 1 else nn.parallel.DistributedDataParallel(self.model)
        # A short memory of squared gradients: over few epochs, ahead of Adam's usual 0.999.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr, betas=(0.9, 0.95), fused=True)
        self.progress, self.interval, self.norms = dict(START), None, []

    def checkpoint(self) -> dict:
        """Everything needed to go on to the bit, as tensors and plain values."""
        random = {"cpu": torch.get_rng_state()}
        if self.options.device == "cuda":
            random["cuda"] = torch.cuda.get_rng_state()
        return {
            "format": FORMAT,
            "alphabet": LETTRES,
            "model": configuration(self.options),
            "weights": dict(self.model.state_dict()),
            "corpus": self.corpus,
            "processes": WORLD,
            "options": to_save(self.options),
            "optimizer": self.optimizer.state_dict()["state"],
            "random": random,
            "progress": dict(self.progress),
            "interval": dict(self.monitor.interval),
            "norms": torch.tensor(self.norms),
        }

    def restore(self, checkpoint: dict, path) -> None:
        """Take up the run where the checkpoint left it."""
        if checkpoint["corpus"] != self.corpus:
            raise LabError(f"{self.options.data} is not the corpus that {path} was trained on")
        done = checkpoint["progress"]
        if done["batch"] >= len(self.train) or done["step"] != done["epoch"] * len(self.train) + done["batch"]:
            raise LabError(f"{path} is damaged: its progress does not fit its corpus")
        if len(checkpoint["norms"]) and not checkpoint["optimizer"]:
            raise LabError(f"{path} has weights to write with, but no optimiser to go on with: train a new run")
        self.progress, self.interval, self.norms = dict(done), checkpoint["interval"], checkpoint["norms"].tolist()
        self.model.load_state_dict(checkpoint["weights"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": checkpoint["optimizer"]})
        torch.set_rng_state(checkpoint["random"]["cpu"])
        if self.options.device == "cuda" and "cuda" in checkpoint["random"]:
            torch.cuda.set_rng_state(checkpoint["random"]["cuda"])

    def loss(self, batch):
        """Mean loss of a batch (T, B) on its device, in nats per symbol."""
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.parallel(batch)
        return maskedCrossEntropy(output, batch, PAD_IX)

    def train_step(self, batch) -> float:
        """One batch (T, B): forward, backward, clip, step. Returns its loss in nats per symbol."""
        done, step, symbols = self.progress, self.progress["step"], int((batch != PAD_IX).sum())
        batch = batch.to(self.options.device)
        record = self.monitor.wants_histograms(step)
        self.optimizer.zero_grad()
        with watch(self.model.rnn) if record else nullcontext() as states:
            loss = self.loss(batch)
        # In every process alike: the whole batch's loss and symbols, and whether anybody was asked to stop.
        nats, total, stops = everywhere(loss.item() * symbols, symbols, self.stop.is_set())
        self.stopping = stops > 0
        # Nats over the symbols of a mean batch, not of this one: in long batches and short, each symbol counts
        # the same. (DDP averages over the processes, so times their number.)
        (loss * (symbols * WORLD / self.mean_symbols)).backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), math.inf).item()  # before clipping
        finite = math.isfinite(nats) and math.isfinite(norm)
        if record and finite:
            self.monitor.histograms(self.model, states, batch != PAD_IX, step)
        self.clock, before = time.perf_counter(), self.clock
        sums = dict(nats=nats, symbols=int(total), seconds=self.clock - before)
        if finite:
            rate, limit = self.options.lr * cosine(step, self.steps), self.options.clip or math.inf
            self.update(rate, norm, limit)
            self.norms.append(norm)
            self.monitor.step(step, rate, norm, steps=1, clipped=norm > limit, **sums)
            done.update({name: done[name] + more for name, more in sums.items()}, in_row=0)
        else:
            self.skip()
        done.update(step=step + 1, batch=done["batch"] + 1)
        return nats / total

    def update(self, rate: float, norm: float, limit: float) -> None:
        """One step of the optimiser, with the gradient of this norm clipped to `limit`."""
        if norm > limit:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, torch.tensor(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def skip(self) -> None:
        """Count a step whose loss or gradient is not finite; LabError after three in a row."""
        done = self.progress
        done.update(skipped=done["skipped"] + 1, in_row=done["in_row"] + 1)
        if done["in_row"] == 3:
            raise self.diverged("at three steps in a row, the loss or its gradient was")

    def diverged(self, what: str) -> LabError:
        """The error that ends a run whose numbers `what` says are not finite."""
        advice = f"a smaller --lr, or --clip 1; the last good checkpoint in {self.folder} is kept"
        if not self.progress["step"]:  # as the seed made it
            advice = "a smaller --recurrent-scale"
        return LabError(f"{what} not finite after step {self.progress['step']:,}: train anew with {advice}")

    def train_epoch(self) -> bool:
        """Train on the epoch's batches that are left; False if it was stopped before the last."""
        done, batches = self.progress, len(self.train)
        self.model.train()
        self.train.batch_sampler.set_epoch(done["epoch"])
        self.clock = saved = time.perf_counter()
        with tqdm(total=batches, initial=done["batch"], unit="batch", leave=False, disable=RANK > 0 or None) as bar:
            for batch in share(self.train, done["batch"]):
                nats = self.train_step(batch)
                speed = done["symbols"] / max(done["seconds"], 1e-9)
                bar.set_postfix_str(f"{nats:.3f} nats, {speed:,.0f} characters/s", refresh=False)
                bar.update()
                due = self.options.save_every and self.clock - saved >= self.options.save_every
                if done["batch"] < batches and (due or self.stopping):  # after the last one, end_epoch saves
                    self.save("last.pt", final=self.stopping)
                    saved = self.clock
                if self.stopping:
                    break
        return done["batch"] == batches

    def end_epoch(self) -> None:
        """Validate, show samples, and save: `best.pt` where it is the best so far, always `last.pt`."""
        done = self.progress
        self.model.eval()
        valid = evaluate(self.model, share(self.valid), self.options.device)
        if not math.isfinite(valid):
            raise self.diverged("the validation loss is")
        found = {} if RANK else samples(self.model, "", self.options.seed + done["epoch"])
        sentences = {decoder: shown(hypothesis) for decoder, hypothesis in found.items()}
        self.monitor.epoch(done["step"] - 1, valid, sentences)  # with the step just done: a resumed run keeps it
        train = done["nats"] / done["symbols"] if done["symbols"] else math.inf  # all steps skipped
        done.update(trained=done["trained"] + done["seconds"], read=done["read"] + done["symbols"], train=train)
        speed = done["symbols"] / max(done["seconds"], 1e-9)
        print(
            f"epoch {done['epoch'] + 1}/{self.options.epochs}: training {train:.3f} nats, validation {valid:.3f} nats "
            f"= {valid / math.log(2):.3f} bits per character, {speed:,.0f} characters/s, "
            f"{done['trained']:.1f} s of training"
        )
        if done["skipped"]:
            print(f"  {done['skipped']:,} steps skipped so far: their loss or gradient was not finite")
        for decoder, sentence in sentences.items():
            print(f"  {decoder:12s} {sentence}")
        best_before = done["best"]
        done.update(epoch=done["epoch"] + 1, batch=0, nats=0.0, symbols=0, seconds=0.0, best=min(valid, best_before))
        final = self.stopping or done["epoch"] == self.options.epochs
        # The best first: a run killed in between goes on from the older last.pt and comes here again.
        if valid < best_before and not self.save("best.pt", final):
            done["best"] = best_before
        self.save("last.pt", final)

    def save(self, name: str, final: bool) -> bool:
        """Save as `name`, after the curves; whether it went well. Only the `final` save of a command has to.

        `last.pt` is for going on with, `best.pt` for writing: it has no moments, and is a third as big.
        """
        if RANK:
            return True
        self.monitor.flush()
        checkpoint = self.checkpoint()
        learned = (checkpoint["weights"], *checkpoint["optimizer"].values())
        if not all(tensor.isfinite().all() for tensors in learned for tensor in tensors.values()):
            raise self.diverged("a weight or a moment is")
        try:
            save(self.folder / name, checkpoint if name == "last.pt" else {**checkpoint, "optimizer": {}})
        except LabError as error:
            if final:
                raise
            warn(f"{error}; training goes on")
            return False
        return True

    def run(self, stop: threading.Event) -> bool:
        """Train epoch after epoch; False if `stop` was set before the end. `last.pt` is saved."""
        self.stop, self.stopping = stop, False
        self.monitor = Monitor(self.folder, self.options, self.progress["step"], self.interval)
        if self.progress["step"] == 0:
            self.save("last.pt", final=True)  # a run killed before its first save can be resumed as well
        while self.progress["epoch"] < self.options.epochs and not self.stopping:
            if self.train_epoch():
                self.end_epoch()
        self.monitor.close()
        return self.progress["epoch"] == self.options.epochs


# -------------------------------------------------------------------------------------- comparing


def table(rows: list[dict]) -> str:
    """Rows of like keys as a Markdown table; "none" without rows."""
    if not rows:
        return "none"

    def text_of(value) -> str:
        if isinstance(value, float):
            return f"{value:.2g}" if abs(value) < 0.01 else f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.0f}"
        return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")

    lines = [[*rows[0]], *([text_of(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def figures(checkpoint: dict) -> dict:
    """What a run came to when it saved its best model. Training loss: the mean over the last epoch's steps."""
    done, norms = checkpoint["progress"], checkpoint["norms"]
    train, valid, limit = done["train"], done["best"], checkpoint["options"]["clip"]
    return {
        "parameters": sum(weight.numel() for weight in checkpoint["weights"].values()),
        "epochs": done["epoch"],
        "seconds": done["trained"],
        "characters/s": done["read"] / max(done["trained"], 1e-9),
        "training nats": train,
        "validation nats": valid,
        "training bits": train / math.log(2),
        "validation bits": valid / math.log(2),
        "perplexity": math.exp(min(valid, 700)),  # beyond, no float holds it
        "median gradient norm": norms.median().item() if len(norms) else math.nan,
        "99th percentile": norms.quantile(0.99).item() if len(norms) else math.nan,
        "clipped": (norms > limit).float().mean().item() if limit else math.nan,
        "skipped steps": done["skipped"],
    }


def beginnings(sentences):
    """A batch (T, B) of sentences; one of more than LONGEST characters ends after so many."""
    return pad_collate_fn([string2code(code2string(sentence)[:LONGEST]) for sentence in sentences])


def some(subset, count: int, length: int):
    """A batch (T, count) of the first sentences that have `length` characters; of the longest if they are few."""
    lengths = subset.dataset.lengths[subset.indices]
    order = np.argsort(-np.minimum(lengths, length).astype(int), kind="stable")[:count]
    return beginnings([subset[i] for i in order])


def before_and_after(checkpoint: dict) -> dict:
    """The run's model "at_start", as its seed made it, and "trained"."""
    start = initial_model(argparse.Namespace(**checkpoint["options"], device="cpu"))
    return {"at_start": start, "trained": model_of(checkpoint)}


def flows(models: dict, valid) -> dict:
    """Gradient flow over validation sentences: (state, "at_start" or "trained") → norms by lag."""
    batch = some(valid, 64, LAGS + 1)
    found = {when: gradient_flow(model, batch) for when, model in models.items()}
    return {(state, when): norms for when, states in found.items() for state, norms in states.items()}


def look_inside(options, folder: Path, valid: DataLoader) -> None:
    """Write what a finished run's best model shows: figures, gradient flow, units, symbols' map, gates on text."""
    checkpoint = load_checkpoint(folder / "best.pt")
    step, models = checkpoint["progress"]["step"], before_and_after(checkpoint)
    # A file of its own, made anew: its curves' steps are lags, which a resumed run must not strike out.
    monitor = Monitor(folder, options, None, name="inside")
    monitor.summary(checkpoint["options"] | {"data": checkpoint["corpus"]["name"]}, figures(checkpoint), step)
    if options.histograms_every or options.look:
        model = models["trained"]
        monitor.flow(flows(models, valid.dataset))
        monitor.recurrence(models["at_start"].rnn, 0)
        monitor.recurrence(model.rnn, step)
        monitor.symbols(model.emb, folder)
        order = list(valid.batch_sampler)
        chosen = order[:: -(-len(order) // 8)]  # eight batches, of all lengths
        batches = DataLoader(valid.dataset, batch_sampler=chosen, collate_fn=beginnings)
        found = table(followers(tracking(model, batches)))
        monitor.text("units/that_follow_the_text", found)
        print(f"Units of the {model.cell} that follow the text:\n{found}")
        if long := int((valid.batch_sampler.lengths > LONGEST).sum()):
            print(f"{long:,} long validation sentences: only their first {LONGEST:,} characters are looked at")
        texts = [code2string(sentence) for sentence in some(valid.dataset, 3, 60).t().tolist()]
        for i, text in enumerate([options.look] if options.look else texts):
            monitor.look(model, text, i)
        print(f"Its gates on text: look/{model.cell}/… among TensorBoard's images")
    monitor.close()


def comparable(folder: Path) -> dict:
    """The best checkpoint of each run in `folder`, by name; LabError if they were not trained on the same sentences."""
    runs = {path.parent.relative_to(folder).as_posix(): load_checkpoint(path) for path in folder.glob("**/best.pt")}
    if not runs:
        raise LabError(f"no run in {folder} to compare: train some with `python tp5.py --model all`")
    options = {name: {**run["options"], "data": run["corpus"]["sha256"]} for name, run in runs.items()}
    first = min(options)
    for other, option in product(options, ("data", "seed", "maxlen", "maxsent")):
        if options[other][option] != options[first][option]:
            which = f"in {folder}, {first} and {other}"
            raise LabError(f"{which} cannot be compared: they differ in --{option}, so in their sentences")
    cells = list(CELLS)
    return dict(sorted(runs.items(), key=lambda item: (cells.index(item[1]["model"]["cell"]), item[0])))


def their_corpus(folder: Path, runs: dict, options):
    """The runs' training and validation sentences, from where they had them, or from --data."""
    run = next(iter(runs.values()))
    moved = {} if HERE / options.data == CORPUS else {"data": options.data}
    train, valid, corpus = load_corpus(argparse.Namespace(**run["options"] | moved))
    if corpus["sha256"] != run["corpus"]["sha256"]:
        raise LabError(f"the runs in {folder} were trained on another corpus: name it with --data")
    return train, valid


def felt(runs: dict, valid) -> list[dict]:
    """Gradient flow of each run at some lags, at the start and trained."""
    rows = []
    for name, run in runs.items():
        for (state, when), norms in flows(before_and_after(run), valid).items():
            lags = {f"{lag} back": norms[lag].item() for lag in range(0, len(norms), 10)}
            rows.append({"run": name, "gradient of": state, "when": when.replace("_", " "), **lags})
    return rows


def quartiles(texts: list[str]) -> str:
    """Of the texts' lengths, in characters."""
    return " ".join(f"{length:.0f}" for length in np.quantile([*map(len, texts)], (0.25, 0.5, 0.75)))


def written(runs: dict, train, valid) -> tuple[list[str], list[dict]]:
    """What the decoders make of the same starts: some sentences, and how much of all of them was copied."""
    corpus, held_out = ([code2string(sentence) for sentence in part] for part in (train, valid))
    starts = ["", *dict.fromkeys(sentence.split()[0] + " " for sentence in held_out)][:20]
    groups, facts, sentences = {}, {}, []

    def add(run: str, decoder: str, texts: list[str], ended: float, whole: list[str]) -> None:
        groups[run, decoder] = texts
        facts[run, decoder] = {"ended": ended, "length, quartiles": quartiles(whole)}

    add("held-out sentences", "", held_out[:200], 1.0, held_out[:200])
    for name, run in runs.items():
        model = model_of(run)
        found = [samples(model, start, seed) for seed, start in enumerate(starts, run["options"]["seed"])]
        for decoder in found[0]:
            made = [of_start[decoder] for of_start in found]
            whole = [start + h.text for start, h in zip(starts, made, strict=True)]
            # The start is ours, not the model's: it counts in lengths only.
            add(name, decoder, [h.text for h in made], sum(h.ended for h in made) / len(made), whole)
            for start, h in zip(starts[:2], made, strict=False):
                sentences.append(f"    {name}, {decoder}, start {start!r}: {shown(h, start)}")
    shares = copied(groups, "\n".join(corpus))
    return sentences, [{"run": key[0], "decoder": key[1], **shares[key], **facts[key]} for key in groups]


def compare(folder: Path, runs: dict, train, valid, options) -> None:
    """The runs side by side: figures, gradient flow, what their decoders write and how much of that is copied."""
    rows = table([{"run": name, **figures(run)} for name, run in runs.items()])
    sentences, shares = written(runs, train, valid)
    text = "\n\n".join([rows, table(felt(runs, valid)), "\n".join(sentences), table(shares)]) + "\n"
    print(f"\n{text}")
    try:
        (folder / "comparison.md").write_text(text, encoding="utf-8")
    except OSError as error:
        raise LabError(f"cannot write in {folder}: {error.strerror}") from None
    monitor = Monitor(folder, options, None, name="comparison")
    monitor.text("comparison", text)
    monitor.close()
    print(f"Saved in {folder / 'comparison.md'}. Next: tensorboard --logdir {folder}")


# ----------------------------------------------------------------------------------- command line

# They belong to a command, not to a run.
NOT_SAVED = ("run", "resume", "compare", "device", "save_every", "minutes", "match_parameters", "look")


def to_save(options) -> dict:
    """The options that belong to a run."""
    return {name: value for name, value in vars(options).items() if name not in NOT_SAVED}


class Models(argparse.Action):
    """One model as its name; several, or "all", as a list."""

    def __call__(self, parser, options, values, option=None):
        names = list(CELLS) if "all" in values else list(dict.fromkeys(values))
        options.model = names if len(names) > 1 else names[0]


def command_parser() -> Parser:
    """All options of the command line, with their ranges and defaults."""
    parser = Parser(prog="tp5.py", description="Train a character model with a recurrent cell written by hand.")
    add, size = parser.add_argument, number(int, 1, 2**27)  # beyond, torch overflows
    add("--model", nargs="+", action=Models, choices=[*CELLS, "all"], default="lstm", metavar="CELL",
        help="rnn, gru or lstm; several, or all: train one after another, then compare")  # fmt: skip
    add("--data", default=str(CORPUS), metavar="PATH", help="a UTF-8 text file")
    add("--epochs", type=number(int, 1), default=5, metavar="N", help="passes over the training sentences")
    add("--minutes", type=number(float, 0, above=True), metavar="M",
        help="as many epochs as take about M minutes, by a short trial; instead of --epochs")  # fmt: skip
    add("--batch-size", type=size, default=BATCH_SIZE, metavar="B", help="sentences in a process's batch")
    add("--embedding", type=size, default=128, metavar="E", help="size of a symbol's embedding")
    add("--hidden", type=size, default=HIDDEN, metavar="H", help="size of the hidden state")
    add("--match-parameters", action="store_true",
        help="choose each hidden size: the least with as many parameters as an LSTM of --hidden")  # fmt: skip
    add("--recurrent-scale", type=number(float, 0), default=1.0, metavar="FACTOR",
        help="on the initial recurrent matrices; 3 makes gradients explode: try --clip 0")  # fmt: skip
    add("--lr", type=number(float, 0, above=True), default=8e-3, metavar="RATE", help="peak learning rate")
    add("--clip", type=number(float, 0), default=1.0, metavar="NORM", help="clip gradients to this norm; 0: off")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of the split, the weights and the shuffling")
    add("--maxlen", type=number(int, 1), metavar="N", help="leave out sentences longer than N characters")
    add("--maxsent", type=number(int, 2), metavar="N", help="use the first N sentences only")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")
    add("--precision", choices=("float32", "bf16"), default="float32",
        help="of the recurrent products; bf16 only where the processor has it in hardware")  # fmt: skip
    add("--threads", type=number(int, 1, 999), metavar="N",
        help="threads of a process (default: PyTorch's, a core each)")  # fmt: skip
    add("--scalars-every", type=number(int, 0), default=20, metavar="N", help="steps between scalars; 0: off")
    add("--histograms-every", type=number(int, 0), default=400, metavar="N",
        help="steps between histograms; 0: off, with all that is shown of the cells' inside")  # fmt: skip
    add("--look", metavar="TEXT", help="show the gates on this text at the end (default: on validation sentences)")
    add("--save-every", type=number(float, 0), default=30, metavar="SECONDS",
        help="save within an epoch too; 0: only after each")  # fmt: skip
    add("--run", type=Path, metavar="FOLDER", help="where the run goes (default: runs/MODEL-DATE_TIME)")
    add("--resume", nargs="?", const="newest", metavar="RUN",
        help="go on with a run's last.pt (alone: the newest run), with that run's options")  # fmt: skip
    add("--compare", type=Path, metavar="FOLDER", help="compare the runs in a folder, train nothing")
    return parser


def given() -> dict:
    """What the command line names, by option; None where it says nothing."""
    parser = command_parser()
    blank = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([]))))  # defaults do not overwrite its None
    return vars(parser.parse_args(namespace=blank))


def parse_options():
    """The command line's options; LabError for those that do not go together or that this machine cannot do."""
    options = command_parser().parse_args()
    if sum(bool(mode) for mode in (options.run, options.resume, options.compare)) > 1:
        raise LabError("--run, --resume and --compare do not go together: each names a folder")
    if options.resume and (options.minutes or options.match_parameters):
        raise LabError("--minutes and --match-parameters are for new runs: --resume goes on with the run's own sizes")
    named = {name for name, value in given().items() if value is not None}
    if options.compare and (others := sorted(named - {"compare", "data", "device"})):
        advice = "look at a run with --resume RUN --look TEXT" if others[0] == "look" else "it trains nothing"
        raise LabError(f"--{others[0].replace('_', '-')} does not go with --compare: {advice}")
    if {"minutes", "epochs"} <= named:
        raise LabError("--minutes is instead of --epochs: leave one of them out")
    if options.look is not None and (not options.look.strip() or clean(options.look)[1]):
        raise LabError("--look: give a text, and only characters of the alphabet (ASCII)")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise LabError("--device cuda: this PyTorch sees no CUDA device; leave it out to train on the CPU")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    path = Path(options.data).resolve()  # in the lab's own folder, from there: the folder may move
    options.data = path.relative_to(HERE).as_posix() if path.is_relative_to(HERE) else str(path)
    return options


def new_folder(options) -> Path:
    """Make the run's folder. One that is named may be there already; of two runs in one second, each has its own."""
    name = options.model if isinstance(options.model, str) else "compare"
    folder = options.run or RUNS / f"{name}-{time.strftime('%Y-%m-%d_%H%M%S')}"
    try:
        str(folder).encode()  # TensorBoard needs it
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=options.run is not None)
                return folder
            except FileExistsError:
                if options.run:  # a file of that name
                    raise
                folder = folder.with_name(folder.name + "+")
    except OSError as error:
        raise LabError(f"cannot make the folder {folder}: {error.strerror}") from None
    except UnicodeEncodeError:
        raise LabError(f"--run {folder}: its name is not UTF-8, choose another") from None


def take_over(options, saved: dict) -> None:
    """Replace `options` by those of the run that is resumed; say which of the command line that overrides."""
    asked = given()
    for name, value in saved.items():
        if name == "data" and asked[name]:  # the corpus may have moved: `restore` compares its content
            continue
        if asked[name] not in (None, value):
            print(f"ignored: --{name.replace('_', '-')} {asked[name]}; the run has {value}")
        setattr(options, name, value)


@contextmanager
def stop_on_signal():
    """An event that the first SIGINT (Ctrl-C) or SIGTERM sets, so that a run saves and stops; a second one kills."""
    stop, numbers = threading.Event(), (signal.SIGINT, signal.SIGTERM)

    def asked(*_):
        stop.set()
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)  # the system's: it does not wait for a step to end

    before = {number: signal.signal(number, asked) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(training: Training) -> bool:
    """Run to the end or to a signal, and say what comes next; False if it was stopped."""
    options, folder = training.options, training.folder
    print(
        f"{options.model} with {parameters(training.model):,} parameters on {options.device}, "
        f"{training.steps:,} steps: {folder}"
    )
    with stop_on_signal() as stop:
        finished = training.run(stop)
    if not finished:
        print(f"Stopped and saved in {folder}. Go on with: python tp5.py --resume {folder}")
        return False
    if training.monitor.writer:  # process 0, unless events cannot be written: that was said once
        look_inside(options, folder, training.valid)
    chosen = "" if folder.parent == RUNS else f" --checkpoint {folder / 'best.pt'}"
    print(f"Run saved in {folder}. Next: python generate.py --beam 5{chosen}; tensorboard --logdir {folder.parent}")
    return True


def parameters(model) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in model.parameters())


def matched(options) -> int:
    """The least hidden size with which the model has as many parameters as an LSTM of `options.hidden`."""

    def count(cell, hidden):
        with Outline():
            return parameters(CharModel(cell, options.embedding, hidden))

    sizes = range(1, 8 * options.hidden)
    return sizes[bisect_left(sizes, count("lstm", options.hidden), key=lambda hidden: count(options.model, hidden))]


def epochs_in(minutes: float, options, corpus) -> int:
    """The epochs that take `minutes` of training, at least 1: by a trial of 50 batches, thrown away."""
    trial, since = Training(options, Path(), *corpus), time.perf_counter()
    for batch in islice(share(trial.train), 50):
        trial.loss(batch.to(options.device)).backward()
        trial.update(rate=0.0, norm=0.0, limit=math.inf)
    (seconds,) = everywhere((time.perf_counter() - since) / WORLD)  # alike in each process
    epoch = seconds / min(50, len(trial.train)) * len(trial.train)
    epochs = max(1, round(60 * minutes / epoch))
    print(f"--minutes {minutes:g}: {epochs} epochs of about {epoch:.1f} s")
    return epochs


def check_memory(options) -> None:
    """LabError if a model of these sizes, its gradient and Adam's two moments find no room."""
    with Outline():
        size = 4 * 4 * parameters(CharModel(**configuration(options)))  # bytes
    try:
        torch.empty(size, dtype=torch.uint8)  # asked for, not touched
    except RuntimeError:
        raise LabError(f"this model needs {size / 1e9:,.0f} GB to train: choose a smaller --hidden") from None


def begin(options) -> None:
    """Train a new run of each model that is asked for, on the same batches; compare them if there are several."""
    options.batch_size *= WORLD
    models = [options.model] if isinstance(options.model, str) else options.model
    plans = [argparse.Namespace(**vars(options) | {"model": model}) for model in models]
    for plan in plans:
        plan.hidden = matched(plan) if options.match_parameters else plan.hidden
        check_memory(plan)
    train, valid, described = load_corpus(options)
    folder, failed = Path() if RANK else new_folder(options), []
    for plan in plans:
        plan.run = folder / plan.model if len(plans) > 1 else folder
        refuse_used(plan.run)
    for plan in plans:
        try:
            if not begin_one(plan, (train, valid, described)):
                say_what_is_left(folder, plans[plans.index(plan) + 1 :])
                return
        except LabError as error:
            if len(plans) == 1 or WORLD > 1:  # other processes would not know of it
                raise
            warn(error)  # a cell that diverges is a result, too
            failed.append(plan.model)
    if len(plans) > 1 and not RANK:
        compare(folder, comparable(folder), train, valid, options)
    if failed:
        raise LabError(f"{', '.join(failed)} did not come to an end, see above")


def refuse_used(folder: Path) -> None:
    """LabError if the folder of a new run holds one already."""
    if not RANK and (folder / "last.pt").exists():
        raise LabError(f"{folder} holds a run already: go on with --resume, or choose another --run")


def say_what_is_left(folder: Path, plans: list) -> None:
    """How to go on with a comparison that was stopped."""
    for plan in plans:
        print(f"Then: python tp5.py --model {plan.model} --run {plan.run}, with the same options")
    if plans:
        print(f"At the end: python tp5.py --compare {folder}")


def begin_one(options, corpus) -> bool:
    """Train a new run in `options.run`; False if it was stopped."""
    folder = Path() if RANK else new_folder(options)
    with locked(folder):
        refuse_used(folder)  # again: another process may have trained it in the meantime
        if options.minutes:
            options.epochs = epochs_in(options.minutes, options, corpus)
        return train(Training(options, folder, *corpus))


def resume(options) -> None:
    """Go on with a run; look inside again if it has finished."""
    folder = newest_checkpoint(name="last.pt").parent if options.resume == "newest" else Path(options.resume)
    folder = folder.parent if folder.name == "last.pt" else folder
    last = folder / "last.pt"
    if not last.exists():
        raise LabError(f"cannot read {last}: there is no run to resume")
    with locked(folder):
        checkpoint = load_checkpoint(last)
        take_over(options, checkpoint["options"])
        training = Training(options, folder, *load_corpus(options))
        training.restore(checkpoint, last)
        if checkpoint["progress"]["epoch"] == options.epochs:
            print(f"{folder} has finished its {options.epochs} epochs, nothing is left to resume; a new look inside:")
            if not RANK:
                look_inside(options, folder, training.valid)
            return
        print(f"going on after step {training.progress['step']:,}")
        if checkpoint["processes"] != WORLD:
            print(f"{WORLD} process(es) instead of {checkpoint['processes']}: the same batches, equal but for rounding")
        train(training)


def main() -> None:
    options = parse_options()
    with joined(options.device):
        if options.compare:
            if not RANK:
                runs = comparable(options.compare)
                compare(options.compare, runs, *their_corpus(options.compare, runs, options), options)
            return
        try:
            resume(options) if options.resume else begin(options)
        except BrokenPipeError:
            raise LabError("nobody reads the output any more: go on with python tp5.py --resume RUN") from None


if __name__ == "__main__":
    run_main(main)
