"""Questions 2, 4 and 5: recurrent cells by hand, and a character model trained with them.

    python tp5.py --model lstm
    tensorboard --logdir runs

Shapes: T length, B batch, E embedding, H hidden, V symbols (97), G gates. Time comes first.
Losses and log-probabilities are in nats.
"""

import ctypes
import hashlib
import math
import os
import signal
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.data import DataLoader, random_split
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from generate import RUNS, generate, generate_beam
from textloader import (
    BATCH_SIZE,
    CORPUS,
    EOS_IX,
    LETTRES,
    PAD_IX,
    SYMBOLS,
    BucketSampler,
    LabError,
    Parser,
    TextDataset,
    number,
    pad_collate_fn,
    read_text,
    run_main,
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

    A cell calls like `torch.nn`'s: `output, state = rnn(x, state)`, with x (T, B, E), output
    (T, B, H), and a state whose tensors are (B, H); without `state` it starts from zeros.

    W·[h, x] + b is W_h h + (W_x x + b). The second half needs no history: `project` computes it
    for all time steps at once. `equations` is one time step as the paper writes it, with a column
    for a sentence: there, states are (H, B). A CPU multiplies W·h a third faster than h·Wᵀ, too.

    A cell of your own needs `gates` and `equations`; autograd does the rest. Ours have `slopes` and
    `back` as well, the backward pass by hand: see `ThroughTime`.
    """

    gates: tuple[str, ...]  # in the order of their rows in the parameters
    states: tuple[str, ...] = ("h",)
    has_bias = True

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

    def weight_gradient(self, d_a, h_before, *_):
        """Σ_t ∂L/∂a_t·h_{t-1}ᵀ: d_a (G·H, T·B) and what was fed back (T, H, B) → (G·H, H)."""
        return d_a @ side_by_side(h_before, d_a.dtype).t()

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
        run = ThroughTime.apply if hasattr(self, "back") else through_time
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

    A list `record` gets each step's states before, gates, and memory after.
    """
    outputs = []
    for px in projected.unbind(0):
        before = state
        state, gates = cell.equations(W, px.mT, *before)
        outputs.append(state[0])
        if record is not None:
            record.append((*before, *gates, *state[1:]))
        if cell.watched is not None:
            shown = dict(zip(cell.gates + cell.states, gates + state, strict=True))
            for name, values in shown.items():
                cell.watched.setdefault(name, []).append(values.detach().mT)
    return torch.stack(outputs), *state


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
        ctx.cell, ctx.record = cell, []
        ctx.save_for_backward(W)
        output, *state = through_time(cell, projected, W, *state, record=ctx.record)
        return output, *(part.clone() for part in state)  # an output that ctx holds would never be freed

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output, *d_state):
        cell, (W,) = ctx.cell, ctx.saved_tensors
        record = [torch.stack(values) for values in zip(*ctx.record, strict=True)]  # (T, H, B) each
        slopes, *others = cell.slopes(*record)  # (T, G, H, B), others (T, H, B)
        W_T = W.t().contiguous()
        for d_h, slope, *other in reversed([*zip(d_output, slopes, *others, strict=True)]):
            d_state = cell.back(W_T, slope, *other, d_state[0] + d_h, *d_state[1:])
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

    def slopes(self, h_before, h):
        return (torch.stack([1 - h**2], dim=1),)

    def back(self, W_T, slope, d_h):
        d_a = slope[0].mul_(d_h)
        return (times(W_T, d_a),)


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

    def slopes(self, h_before, C_before, f, i, candidate, o, C):
        """Of f, i and the candidate on C, of o on h; the forget gate; the slope of C on h."""
        tanh_C = torch.tanh(C)
        on_C = sigmoid_slope(C_before, f), sigmoid_slope(candidate, i), tanh_slope(i, candidate)
        return torch.stack([*on_C, sigmoid_slope(tanh_C, o)], dim=1), f, tanh_slope(o, tanh_C)

    def back(self, W_T, slope, f, C_on_h, d_h, d_C):
        d_C = torch.addcmul(d_C, d_h, C_on_h)
        slope[:3].mul_(d_C)
        slope[3].mul_(d_h)
        return times(W_T, slope.flatten(0, 1)), d_C * f


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

    def slopes(self, h_before, z, r, candidate):
        """Of z on h, of r on r ⊗ h, of the candidate on h; what h keeps of itself; the reset gate."""
        of_z, of_r = sigmoid_slope(candidate - h_before, z), sigmoid_slope(h_before, r)
        return torch.stack([of_z, of_r, tanh_slope(z, candidate)], dim=1), 1 - z, r

    def back(self, W_T, slope, kept, r, d_h):
        W_zr_T, W_T = W_T.split([2 * self.hidden_size, self.hidden_size], dim=1)
        slope[::2].mul_(d_h)  # z and the candidate
        d_reset = times(W_T, slope[2])  # of r ⊗ h
        slope[1].mul_(d_reset)
        return (times(W_zr_T, slope[:2].flatten(0, 1), d_h * kept + d_reset * r),)

    def weight_gradient(self, d_a, h_before, z, r, candidate):
        d_zr, d_candidate = d_a.split([2 * self.hidden_size, self.hidden_size])
        fed = side_by_side(r * h_before, d_a.dtype)  # the candidate's matrix multiplied r ⊗ h
        return torch.cat([super().weight_gradient(d_zr, h_before), d_candidate @ fed.t()])


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

    def forward(self, targets):
        """Targets (T, B), each sentence closed by EOS → logits (T, B, V) that predict exactly those."""
        inputs = torch.cat([torch.full_like(targets[:1], EOS_IX), targets[:-1]])  # EOS opens too
        if isinstance(self.rnn, Cell):
            # Only V symbols exist: project each once, then look up instead of multiplying T·B times.
            table = self.rnn.project(self.emb.weight).t()  # (G·H, V), a column for each symbol
            projected = table.index_select(1, inputs.flatten()).view(-1, *inputs.shape)
            output, _ = self.rnn.unroll(projected.permute(1, 2, 0))  # (T, B, H)
        else:
            output, _ = self.rnn(self.emb(inputs))
        return self.decoder(output)


@torch.no_grad()
def evaluate(model, loader, device) -> float:
    """Nats per symbol (EOS included, BLANK excluded) over all batches of `loader`."""
    nats, symbols = 0.0, 0
    for batch in loader:
        count = int((batch != PAD_IX).sum())
        batch = batch.to(device)
        nats += maskedCrossEntropy(model(batch), batch, PAD_IX).item() * count
        symbols += count
    return nats / symbols


# ------------------------------------------------------------------------------------- monitoring


class Monitor:
    """Question 5: what TensorBoard shows of a run.

    `scalars_every` and `histograms_every` count training steps; 0 turns either off.
    """

    def __init__(self, folder, options, step: int):
        self.writer = SummaryWriter(folder, purge_step=step)
        self.scalars_every, self.histograms_every = options.scalars_every, options.histograms_every
        self.restart()

    def restart(self) -> None:
        """Begin a new interval of running means."""
        self.steps = self.symbols = self.clipped = 0
        self.nats, self.since = 0.0, time.perf_counter()

    def wants_histograms(self, step: int) -> bool:
        """Whether gates and gradients of this step are recorded."""
        return self.histograms_every > 0 and step % self.histograms_every == 0

    def histograms(self, model, states, real, step: int) -> None:
        """Every parameter, its gradient, and every gate and state where `real` (T, B) is true."""
        for name, parameter in model.named_parameters():
            self.writer.add_histogram(f"parameters/{name}", parameter.detach().cpu(), step, bins=64)
            self.writer.add_histogram(f"gradients/{name}", parameter.grad.cpu(), step, bins=64)
        for name, values in states.items():
            values = torch.stack(values)[real].cpu()  # (real symbols, H)
            self.writer.add_histogram(f"gates/{model.cell}/{name}", values, step, bins=64)

    def step(self, step: int, nats: float, symbols: int, norm: float, clipped: bool, rate: float) -> None:
        """Account for one training step; every `scalars_every` steps, write the interval's means."""
        self.steps, self.symbols, self.clipped = (
            self.steps + 1,
            self.symbols + symbols,
            self.clipped + clipped,
        )
        self.nats += nats * symbols
        if self.scalars_every and step % self.scalars_every == 0:
            self.writer.add_scalar("loss/train", self.nats / self.symbols, step)
            self.writer.add_scalar("gradient/norm_before_clipping", norm, step)
            self.writer.add_scalar("gradient/clipped_share", self.clipped / self.steps, step)
            self.writer.add_scalar("training/learning_rate", rate, step)
            seconds = time.perf_counter() - self.since
            self.writer.add_scalar("training/characters_per_second", self.symbols / seconds, step)
            self.restart()

    def epoch(self, step: int, valid: float, samples: dict[str, str]) -> None:
        """The validation loss and the sentences of an epoch."""
        self.writer.add_scalar("loss/validation", valid, step)
        self.writer.add_scalar("loss/validation_bits_per_character", valid / math.log(2), step)
        for decoder, text in samples.items():
            self.writer.add_text(f"samples/{decoder}", text.replace("<", "&lt;"), step)
        self.writer.flush()
        self.restart()  # evaluation is not training time


def samples(model, seed: int) -> dict[str, str]:
    """One sentence of each decoder, with its log-probability."""
    parts = (model.rnn, model.emb, model.decoder, EOS_IX)
    generator = torch.Generator().manual_seed(seed)
    found = {
        "greedy": generate(*parts),
        "sampled": generate(*parts, temperature=1.0, generator=generator),
        "beam": generate_beam(*parts, 5)[0],
    }
    return {name: f"{h.text}{'' if h.ended else ' …'}   ({h.log_prob:.1f} nats)" for name, h in found.items()}


# ------------------------------------------------------------------------------------ checkpoints

FORMAT = 1
FIELDS = {
    "format": int,
    "alphabet": str,
    "model": dict,
    "weights": dict,
    "corpus": dict,
    "options": dict,
    "optimizer": dict,
    "scheduler": dict,
    "random": torch.Tensor,
    "progress": dict,
}


def save(path: Path, checkpoint: dict) -> None:
    """Write beside, flush to disk, rename: the file is the old one or the new one, never a half."""
    beside = path.with_suffix(".tmp")
    try:
        with open(beside, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise LabError(f"cannot write {path}: {error.strerror}; the last good one is kept") from None


def load_checkpoint(path) -> dict:
    """Read a checkpoint without running anything in it; LabError if it is not one of ours."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise LabError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # whatever a foreign or damaged file makes the reader raise
        reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        raise LabError(f"{path} is not a checkpoint of this lab, or is damaged: {reason}") from None
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise LabError(f"{path} is not a checkpoint of this lab")
    if checkpoint["format"] != FORMAT:
        raise LabError(f"{path} has format {checkpoint['format']}, this program reads {FORMAT}: train again")
    for field, kind in FIELDS.items():
        if not isinstance(checkpoint.get(field), kind):
            raise LabError(f"{path} is damaged: its field {field!r} is missing or of a wrong kind")
    if checkpoint["alphabet"] != LETTRES:
        raise LabError(f"{path} was trained on another alphabet: its symbols would not be ours")
    return checkpoint


def restore_model(checkpoint: dict, path) -> CharModel:
    """The checkpoint's model, on the CPU; LabError if sizes and weights do not fit."""
    try:
        cell, *sizes = (checkpoint["model"][name] for name in ("cell", "embedding_size", "hidden_size"))
        weights = checkpoint["weights"]
        if list(weights["emb.weight"].shape) != [SYMBOLS, sizes[0]] or weights["decoder.weight"].shape[1] != sizes[1]:
            raise ValueError
        model = CharModel(cell, *sizes)
        model.load_state_dict(weights)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError):
        raise LabError(f"{path} is damaged: its weights do not fit its model") from None
    return model


def load_model(path) -> CharModel:
    """A trained model, ready to write; LabError if `path` is not a checkpoint of this lab."""
    return restore_model(load_checkpoint(path), path).eval()


# --------------------------------------------------------------------------------------- training


def load_corpus(options):
    """Training and validation sentences (a tenth, drawn by seed), and the corpus's name and SHA-256."""
    text = read_text(options.data)
    dataset = TextDataset(text, maxsent=options.maxsent, maxlen=options.maxlen)
    if len(dataset) < 2:
        raise LabError(
            f"{options.data} has {len(dataset)} sentence(s), training needs 2: a sentence ends with . ! or ? "
            f"({dataset.left_out() or 'nothing'} left out)"
        )
    held_out = max(1, len(dataset) // 10)
    split = torch.Generator().manual_seed(options.seed)
    train, valid = random_split(dataset, [len(dataset) - held_out, held_out], split)
    print(f"{options.data}: {len(dataset):,} sentences, {len(train):,} to train on and {len(valid):,} to validate")
    if dataset.left_out():
        print(f"left out: {dataset.left_out()}")
    return (
        train,
        valid,
        {"name": Path(options.data).name, "sha256": hashlib.sha256(text.encode()).hexdigest()},
    )


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


def cosine(step: int, steps: int) -> float:
    """Factor on the learning rate: linear warm-up over 5 % of the steps, then half a cosine to 0."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


class Training:
    """A run: model, optimiser, schedule and progress; all that a checkpoint holds."""

    def __init__(self, options, folder: Path, train, valid, corpus: dict):
        self.options, self.folder, self.corpus = options, folder, corpus
        torch.manual_seed(options.seed)
        self.model = CharModel(options.model, options.embedding, options.hidden).to(options.device)
        self.train, self.valid = batches(train, options, True), batches(valid, options, False)
        self.steps = options.epochs * len(self.train)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr, fused=True)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: cosine(step, self.steps))
        # `batch` of `epoch` comes next; nats and symbols are the epoch's sums so far.
        self.progress = dict(epoch=0, batch=0, step=0, nats=0.0, symbols=0, best=math.inf, seconds=0.0)

    def checkpoint(self) -> dict:
        """Everything needed to go on, as tensors and plain values."""
        options = self.options
        return {
            "format": FORMAT,
            "alphabet": LETTRES,
            "model": dict(cell=options.model, embedding_size=options.embedding, hidden_size=options.hidden),
            "weights": self.model.state_dict(),
            "corpus": self.corpus,
            "options": {name: value for name, value in vars(options).items() if name not in NOT_SAVED},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": torch.get_rng_state(),
            "progress": dict(self.progress),
        }

    def restore(self, checkpoint: dict, path) -> None:
        """Take up the run where the checkpoint left it."""
        if checkpoint["corpus"] != self.corpus:
            raise LabError(f"{self.options.data} is not the corpus that {path} was trained on")
        restore_model(checkpoint, path)  # says what is wrong before anything is changed
        try:
            self.model.load_state_dict(checkpoint["weights"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.scheduler.load_state_dict(checkpoint["scheduler"])
            torch.set_rng_state(checkpoint["random"])
            self.progress = {name: checkpoint["progress"][name] for name in self.progress}
        except (KeyError, ValueError, TypeError, RuntimeError):
            raise LabError(f"{path} is damaged: its training state does not fit its model") from None

    def train_step(self, batch, monitor: Monitor) -> float:
        """One batch (T, B): forward, backward, clip, step. Returns its loss in nats per symbol."""
        step, symbols = self.progress["step"], int((batch != PAD_IX).sum())
        batch = batch.to(self.options.device)
        record = monitor.wants_histograms(step)
        self.optimizer.zero_grad()
        with watch(self.model.rnn) if record else nullcontext() as states:
            loss = maskedCrossEntropy(self.model(batch), batch, PAD_IX)
        loss.backward()
        if record:
            monitor.histograms(self.model, states, batch != PAD_IX, step)
        limit = self.options.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit).item()
        nats = loss.item()
        if not math.isfinite(nats) or not math.isfinite(norm):
            raise LabError(
                f"the loss or its gradient is not finite at step {step}: try a smaller --lr or --clip; "
                f"the last good checkpoint in {self.folder} is kept"
            )
        self.optimizer.step()
        rate = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        monitor.step(step, nats, symbols, norm, norm > limit, rate)
        done = self.progress
        done["step"], done["batch"] = step + 1, done["batch"] + 1
        done["nats"], done["symbols"] = done["nats"] + nats * symbols, done["symbols"] + symbols
        return nats

    def train_epoch(self, monitor: Monitor, stop: threading.Event) -> bool:
        """Train on the epoch's batches that are left; False if it was stopped before the last."""
        self.model.train()
        self.train.batch_sampler.set_epoch(self.progress["epoch"])
        done, start = self.progress["batch"], time.perf_counter()
        symbols_before = self.progress["symbols"]
        with tqdm(total=len(self.train), initial=done, unit="batch", leave=False, disable=None) as bar:
            for batch in self.remaining(done):
                nats = self.train_step(batch, monitor)
                speed = (self.progress["symbols"] - symbols_before) / (time.perf_counter() - start)
                bar.set_postfix_str(f"{nats:.3f} nats, {speed:,.0f} characters/s", refresh=False)
                bar.update()
                if stop.is_set():
                    break
        self.progress["seconds"] += time.perf_counter() - start
        return self.progress["batch"] == len(self.train)

    def remaining(self, done: int):
        """The epoch's batches from number `done` on; those before are not even loaded."""
        indices = list(self.train.batch_sampler)[done:]
        return DataLoader(self.train.dataset, batch_sampler=indices, collate_fn=pad_collate_fn)

    def end_epoch(self, monitor: Monitor) -> None:
        """Validate, show samples, and save: always `last.pt`, `best.pt` where it is the best so far."""
        done = self.progress
        self.model.eval()
        valid = evaluate(self.model, self.valid, self.options.device)
        sentences = samples(self.model, self.options.seed + done["epoch"])
        train = done["nats"] / done["symbols"]
        best = valid < done["best"]
        speed = done["step"] / len(self.train) * done["symbols"] / done["seconds"]
        monitor.epoch(done["step"], valid, sentences)
        done.update(epoch=done["epoch"] + 1, batch=0, nats=0.0, symbols=0, best=min(valid, done["best"]))
        print(
            f"epoch {done['epoch']}/{self.options.epochs}: training {train:.3f} nats, validation {valid:.3f} nats "
            f"= {valid / math.log(2):.3f} bits per character, {speed:,.0f} characters/s"
        )
        for decoder, sentence in sentences.items():
            print(f"  {decoder:8s} {sentence}")
        checkpoint = self.checkpoint()
        save(self.folder / "last.pt", checkpoint)
        if best:
            save(self.folder / "best.pt", checkpoint)

    def run(self, monitor: Monitor, stop: threading.Event) -> bool:
        """Train epoch after epoch; False if it was stopped, with `last.pt` saved."""
        while self.progress["epoch"] < self.options.epochs:
            if not self.train_epoch(monitor, stop):
                save(self.folder / "last.pt", self.checkpoint())
                return False
            self.end_epoch(monitor)
            if stop.is_set() and self.progress["epoch"] < self.options.epochs:
                return False
        return True


# ----------------------------------------------------------------------------------- command line

NOT_SAVED = ("run", "resume", "device")  # they belong to a command, not to a run


def parse_options(arguments=None):
    parser = Parser(prog="tp5.py", description="Train a character model with a recurrent cell written by hand.")
    add = parser.add_argument
    add("--model", choices=CELLS, default="lstm", help="the recurrent cell")
    add("--data", default=str(CORPUS), metavar="PATH", help="a UTF-8 text file")
    add("--epochs", type=number(int, 1), default=5, metavar="N", help="passes over the training sentences")
    add("--batch-size", type=number(int, 1), default=BATCH_SIZE, metavar="B", help="sentences in a batch")
    add("--embedding", type=number(int, 1), default=128, metavar="E", help="size of a symbol's embedding")
    add("--hidden", type=number(int, 1), default=HIDDEN, metavar="H", help="size of the hidden state")
    add("--lr", type=number(float, 0, above=True), default=5e-3, metavar="RATE", help="peak learning rate")
    add(
        "--clip",
        type=number(float, 0),
        default=1.0,
        metavar="NORM",
        help="clip gradients to this norm; 0: off",
    )
    add(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        default=0,
        help="of the split, the weights and the shuffling",
    )
    add("--maxlen", type=number(int, 1), metavar="N", help="leave out sentences longer than N characters")
    add("--maxsent", type=number(int, 2), metavar="N", help="use the first N sentences only")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")
    add("--scalars-every", type=number(int, 0), default=20, metavar="N", help="steps between scalars; 0: off")
    add("--histograms-every", type=number(int, 0), default=400, metavar="N",
        help="steps between histograms of gates, gradients and parameters; 0: off")  # fmt: skip
    add("--run", type=Path, metavar="FOLDER", help="where the run goes (default: runs/MODEL-DATE_TIME)")
    add("--resume", nargs="?", const="newest", metavar="RUN",
        help="go on with a run's last.pt (alone: the newest run), with that run's options")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no CUDA device; leave it out to train on the CPU")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.data = str(Path(options.data).resolve())
    return options


def new_folder(options) -> Path:
    """Make the run's folder; LabError if it holds a run already."""
    folder = options.run or RUNS / f"{options.model}-{time.strftime('%Y-%m-%d_%H%M%S')}"
    try:
        if options.run is None:
            while folder.exists():  # two runs in one second
                folder = folder.with_name(folder.name + "+")
        elif (folder / "last.pt").exists():
            raise LabError(f"{folder} holds a run already: go on with --resume, or choose another --run")
        folder.mkdir(parents=True, exist_ok=options.run is not None)
    except OSError as error:
        raise LabError(f"cannot make the folder {folder}: {error.strerror}") from None
    return folder


def resumed(options):
    """The folder and checkpoint to resume; `options` become that run's, and what that overrides is said."""
    if options.resume == "newest":
        found = sorted(RUNS.glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise LabError(f"no run in {RUNS} to resume: train one with `python tp5.py --model lstm`")
        folder = found[-1].parent
    else:
        folder = Path(options.resume)
    checkpoint = load_checkpoint(folder / "last.pt")
    defaults, saved = vars(parse_options([])), checkpoint["options"]
    if set(saved) != set(defaults) - set(NOT_SAVED):
        raise LabError(f"{folder / 'last.pt'} is damaged: its options are not this program's")
    for name, value in saved.items():
        given = getattr(options, name)
        if given not in (value, defaults[name]):
            print(f"ignored: --{name.replace('_', '-')} {given}; the run has {value}")
        setattr(options, name, value)
    return folder, checkpoint


@contextmanager
def stop_on_interrupt():
    """An event that the first Ctrl-C sets, so that the step under way is finished; a second one kills."""
    stop = threading.Event()

    def interrupted(*_):
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def main() -> None:
    options = parse_options()
    folder, checkpoint = resumed(options) if options.resume else (None, None)
    corpus = load_corpus(options)
    folder = folder or new_folder(options)
    training = Training(options, folder, *corpus)
    if checkpoint:
        training.restore(checkpoint, folder / "last.pt")
    parameters = sum(p.numel() for p in training.model.parameters())
    print(f"{options.model} with {parameters:,} parameters on {options.device}, {training.steps:,} steps: {folder}")
    monitor = Monitor(folder, options, training.progress["step"])
    with stop_on_interrupt() as stop:
        finished = training.run(monitor, stop)
    monitor.writer.close()
    if finished:
        chosen = "" if folder.parent == RUNS else f" --checkpoint {folder / 'best.pt'}"
        print(f"Run saved in {folder}. Next: python generate.py --beam 5{chosen}; tensorboard --logdir {folder.parent}")
    else:
        print(f"Stopped and saved in {folder}. Go on with: python tp5.py --resume {folder}")


if __name__ == "__main__":
    run_main(main)
