"""The equations of the three cells, right ones and ones that students write, matched against what a cell computes."""

import itertools
import time
from dataclasses import dataclass

import torch
from torch import nn

ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softmax": lambda a: a.softmax(-1),
    "relu": torch.relu,
    "none": lambda a: a,
}
# Of gates, of the candidate, and of C in h; the right one first.
GATES, CANDIDATES = ("sigmoid", "softmax", "tanh"), ("tanh", "none", "sigmoid", "relu")
OUTPUTS = ("tanh", "none", "sigmoid")
STATE_FORGOTTEN = "the state is forgotten: every step starts from zeros"
MOST_CANDIDATES = 200  # assignments of maps to roles that are followed beyond the first step


class Late(Exception):
    """The search has used up its time."""


@dataclass
class Map:
    """One gate's affine map of x and h: W_x x + W_h h + b; `layer` names the weights, so that sharing shows."""

    layer: str
    wx: torch.Tensor  # (K, E)
    wh: torch.Tensor  # (K, H)
    bx: torch.Tensor
    bh: torch.Tensor

    def of_x(self, x):
        return x @ self.wx.T + self.bx

    def of_h(self, h):
        return h @ self.wh.T + self.bh

    def __call__(self, x, h):
        return self.of_x(x) + self.of_h(h)


def weights_of(cell) -> dict[str, torch.Tensor]:
    """All weights by name: parameters, and tensors that are plain attributes."""
    found = dict(cell.named_parameters())
    for name, module in cell.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.requires_grad and value.dim() in (1, 2):
                found.setdefault(f"{name}.{attribute}".strip("."), value)
    return found


Layer = tuple[str, torch.Tensor, torch.Tensor | None]  # its name, weight (K, N) and bias


def allotments(cell, e: int, h: int):
    """The layers of a cell: nn.Linear, and plain matrices with the plain biases allotted in each plausible way."""
    linear = [(n, m.weight, m.bias) for n, m in cell.named_modules() if isinstance(m, nn.Linear)]
    in_modules = {id(w) for m in cell.modules() if isinstance(m, (nn.Linear, nn.Embedding)) for w in m.parameters()}
    raw = {name: w for name, w in weights_of(cell).items() if id(w) not in in_modules}
    matrices = []
    for name, w in raw.items():
        for matrix in (w, w.T) if w.dim() == 2 else ():
            if matrix.shape[1] in (e, h, e + h) and matrix.shape[0] % h == 0:
                matrices.append((name, matrix))
    biases = [w.reshape(-1) for w in raw.values() if w.numel() % h == 0 and (w.dim() == 1 or 1 in w.shape)]
    of_x, of_h, of_both = ([m for m in matrices if m[1].shape[1] == n] for n in (e, h, e + h))
    in_turn = [m for pair in zip(of_x, of_h, strict=False) for m in pair]
    for owners in [[], of_both, of_x, of_h, of_x + of_h, in_turn] if biases else [[]]:
        given = {id(m[1]): b for m, b in zip(owners, biases, strict=False) if len(b) == len(m[1])}
        yield linear + [(name, w, given.get(id(w))) for name, w in matrices]


def maps_of(layers: list[Layer], e: int, h: int, vectors=(), in_order: bool = False) -> list[Map]:
    """Every map of x and h to gates that the layers allow; `in_order`: the k-th of x goes with the k-th of h."""
    found, xs, hs = [], [], []
    for name, weight, bias in layers:
        if len(weight) % h and len(weight) != e + h:
            continue
        parts = weight.split(len(weight) if len(weight) % h else h)  # a fused matrix holds several gates
        biases = torch.zeros(len(weight)).split(len(parts[0])) if bias is None else bias.split(len(parts[0]))
        for k, (w, b) in enumerate(zip(parts, biases, strict=True)):
            label = f"{name}[{k}]" if len(parts) > 1 else name
            if weight.shape[1] == e + h:
                nothing = torch.zeros(len(w))
                found += [Map(label, w[:, h:], w[:, :h], b, nothing), Map(label, w[:, :e], w[:, e:], b, nothing)]
            if weight.shape[1] == e and len(w) == h:
                xs.append((label, w, b))
            if weight.shape[1] == h and len(w) == h:
                hs.append((label, w, b))
    hs += [(name, torch.diag(w), torch.zeros(h)) for name, w in vectors]
    pairs = list(zip(xs, hs, strict=True)) if len(xs) == len(hs) else []
    if not in_order and len(xs) * len(hs) <= 64:
        ordered = {(id(x), id(h_)) for x, h_ in pairs}
        pairs += [(x, h_) for x, h_ in itertools.product(xs, hs) if (id(x), id(h_)) not in ordered]
    return found + [Map(f"{x[0]} and {h_[0]}", x[1], h_[1], x[2], h_[2]) for x, h_ in pairs]


def all_maps(cell, e: int, h: int):
    """Sets of maps to try, one for each way to allot biases."""
    layers = list(allotments(cell, e, h))
    for in_order, allotment in itertools.product((True, False), layers):
        yield maps_of(allotment, e, h, in_order=in_order)
    vectors = [(n, w) for n, w in weights_of(cell).items() if w.shape == (h,) and "bias" not in n]
    for allotment in layers if vectors else ():
        yield maps_of(allotment, e, h, vectors)


def same(a, b) -> bool:
    return torch.allclose(a, b, atol=2e-4, rtol=1e-3)


def hits(candidates: torch.Tensor, seen: torch.Tensor, deadline: float) -> list[list[int]]:
    """Indices of the candidates that equal `seen`."""
    if time.process_time() > deadline:
        raise Late
    close = (candidates - seen).abs() < 2e-4 + 1e-3 * seen.abs()
    return close.flatten(-seen.dim()).all(-1).nonzero().tolist()[:MOST_CANDIDATES]


def library_cell(cell, x, states) -> str | None:
    """The name of a cell of torch.nn inside, if it computes the states."""
    for module in cell.modules():
        if isinstance(module, (nn.RNN, nn.GRU, nn.LSTM)) and module.input_size == x.shape[-1]:
            output = module(x.transpose(0, 1))[0].transpose(0, 1) if module.batch_first else module(x)[0]
            if output.shape == states.shape and same(output, states):
                return f"torch.nn.{type(module).__name__}"
    return None


def shared_input(m: Map) -> str:
    """The mistake that one matrix multiplies both x and h."""
    left, _, right = m.layer.partition(" and ")
    return "one matrix for x and h" if left == right else ""


def account(gates: str, candidate: str, output: str, roles: dict[str, Map], *problems: str) -> str:
    """All that is wrong with a cell of those activations and maps; "" if nothing."""
    names = {}
    for role, m in roles.items():
        names.setdefault(m.layer, []).append(role)
    shared = ", ".join(" = ".join(group) for group in names.values() if len(group) > 1)
    problems = [
        f"the gates use {gates}, not sigmoid" if gates != "sigmoid" else "",
        f"the candidate uses {candidate}, not tanh" if candidate != "tanh" else "",
        f"h is o ⊗ {output}(C), not o ⊗ tanh(C)" if output != "tanh" else "",
        f"gates share their weights: {shared}" if shared else "",
        next(filter(None, map(shared_input, roles.values())), ""),
        *problems,
    ]
    return "; ".join(filter(None, problems))


def plainest(guesses) -> str | None:
    """The shortest mistake of the (activations, mistake) that fit, of the first activations with any; None if none."""
    best, of = None, None
    for activations, mistake in guesses:
        if best is not None and (best == "" or activations != of):
            break
        if best is None or len(mistake) < len(best):
            best, of = mistake, activations
    return best


def rnns(maps: list[Map], wide: list[Map], x, before, states, deadline: float):
    """(None, mistake) of every plain RNN that gives the states (T, B, H) from x and the states before each step."""
    inputs = {"": before, STATE_FORGOTTEN: torch.zeros_like(states)}
    for (mistake, h), m, name in itertools.product(inputs.items(), maps, ACTIVATIONS):
        if same(ACTIVATIONS[name](m(x, h)), states):
            mistake = mistake or shared_input(m)
            if torch.equal(m.wh, m.wh.diag().diag()):
                mistake = "h is multiplied element by element, not by a matrix"
            if name not in ("tanh", "relu"):
                mistake = f"the activation is {name}, not tanh"
            yield None, mistake


MEMORIES = {
    "kept": "",
    "lost": "the memory C is forgotten: every step starts from zeros",
    "h lost": "the state h is forgotten: every step starts from zeros",
    "h for C": "h is taken for the memory C",
}


def lstms(maps: list[Map], wide: list[Map], x, before, states, deadline: float):
    """(activations, mistake) of every LSTM that does."""
    a, a_lost = (torch.stack([m(x, h) for m in maps]) for h in (before, before * 0))  # (n, T, B, H)
    forms = list(itertools.product(GATES, CANDIDATES, OUTPUTS))
    for form in forms if len(maps) <= 20 else forms[:1]:
        gate, candidate, out = (ACTIVATIONS[name] for name in form)
        s = gate(a[:, 0])
        c1 = s[:, None] * candidate(a[:, 0])[None]  # (i, candidate), after one step
        first = hits(s[:, None, None] * out(c1)[None], states[0], deadline)
        for memory, (o, i, c) in itertools.product(MEMORIES, first):
            seen = a_lost if memory == "h lost" else a
            gates, new = gate(seen), candidate(seen[c])
            f = torch.cat([torch.ones_like(gates[:1]), gates])[: 1 if memory == "lost" else None]
            memories, kept = [], before[0] * 0
            for t in range(len(x)):
                previous = {"lost": kept * 0, "h for C": before[t]}.get(memory, kept)
                kept = f[:, t] * previous + gates[i, t] * new[t]
                memories.append(kept)
            for (k,) in hits(gates[o] * out(torch.stack(memories, 1)), states, deadline):
                roles = {"o": maps[o], "i": maps[i], "C": maps[c]} | ({"f": maps[k - 1]} if k else {})
                forgotten = MEMORIES[memory] if k or memory == "lost" else "there is no forget gate"
                yield form, account(*form, roles, forgotten)


RESETS = {
    "before": "",
    "after": "",  # torch.nn.GRU's: r ⊗ (W_h h + b)
    "none": "the reset gate is not used",
    "x too": "the reset gate multiplies x, too",  # r ⊗ [h, x]
    "x first": "the reset gate multiplies x, too",  # r ⊗ [x, h]
}


def candidate_of(m: Map, r, x, h, reset: str):
    """The argument of a GRU's candidate."""
    if reset == "none":
        return m(x, h)
    if reset == "before":
        return m(x, r * h)
    if reset == "after":
        return m.of_x(x) + r * m.of_h(h)
    if r.shape == x.shape:
        return m(r * x, r * h)
    if reset == "x first":
        return m(r[..., : x.shape[-1]] * x, r[..., x.shape[-1] :] * h)
    return m(r[..., h.shape[-1] :] * x, r[..., : h.shape[-1]] * h)


def grus(maps: list[Map], wide: list[Map], x, before, states, deadline: float):
    """(activations, mistake) of every GRU that does; `wide` are maps to the size of [h, x]."""
    inputs = {"": before, STATE_FORGOTTEN: torch.zeros_like(states)}
    forms = itertools.product(itertools.product(GATES, CANDIDATES), (True, False), RESETS, inputs.items())
    for activations, update, reset, (forgotten, h) in forms:
        gate, new = (ACTIVATIONS[name] for name in activations)
        z = gate(torch.stack([m(x, h) for m in maps]))  # (n, T, B, H)
        z = z if update else 1 - z
        resetting = [None] if reset == "none" else maps
        if reset.startswith("x"):  # r has the size of [h, x], or x has that of h
            resetting = wide + (maps if x.shape == h.shape else [])
        for r in resetting:
            reset_gate = r and gate(r(x, h))
            c = new(torch.stack([candidate_of(m, reset_gate, x, h, reset) for m in maps]))
            for k, j in hits(z[:, None, 0] * c[None, :, 0], states[0], deadline):
                if same(torch.lerp(h, c[j], z[k]), states):
                    roles = {"z": maps[k], "candidate": maps[j]} | ({"r": r} if r else {})
                    yield activations, account(*activations, "tanh", roles, RESETS[reset], forgotten)


CELLS = {"rnn": rnns, "lstm": lstms, "gru": grus}


@torch.no_grad()
def match(which: str, cell, inputs, states, deadline: float) -> tuple[str, str] | None:
    """(library, mistake): the cell of torch.nn inside that gave those states, or "", and what is wrong; or None."""
    if library := library_cell(cell, inputs.x, states):
        return library, ""
    size, before = inputs.h.shape[-1], torch.cat([inputs.h[None], states[:-1]])
    for every in all_maps(cell, inputs.x.shape[-1], size):
        maps, wide = [m for m in every if len(m.wx) == size], [m for m in every if len(m.wx) != size]
        mistake = plainest(CELLS[which](maps, wide, inputs.x, before, states, deadline)) if maps else None
        if mistake is not None:  # the plainest allotment of the weights that explains the states
            return "", mistake
    return None
