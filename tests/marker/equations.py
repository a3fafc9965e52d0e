"""The equations of the three cells, right ones and ones that students write, matched against what a cell computes."""

import itertools
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
MOST_CANDIDATES = 200  # assignments followed beyond the first step


@dataclass
class Map:
    """One gate's affine map of x and h: W_x x + W_h h + b; `layer` names the weights, so that sharing shows."""

    layer: str
    wx: torch.Tensor  # (K, E)
    wh: torch.Tensor  # (K, H), or (H,) where h is multiplied element by element
    bx: torch.Tensor
    bh: torch.Tensor

    def of_h(self, h):
        return (h * self.wh if self.wh.dim() == 1 else h @ self.wh.T) + self.bh

    def __call__(self, x, h):
        return x @ self.wx.T + self.bx + self.of_h(h)


def chunks(weight: torch.Tensor, h: int) -> list[torch.Tensor]:
    """A fused matrix or bias as gates of H rows."""
    return list(weight.split(h)) if len(weight) % h == 0 else []


def linear_layers(cell) -> list[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """(name, weight (K, N), bias) of every nn.Linear."""
    layers = [(n, m) for n, m in cell.named_modules() if isinstance(m, nn.Linear)]
    return [(n, m.weight.detach(), None if m.bias is None else m.bias.detach()) for n, m in layers]


def raw_layers(cell, weights: dict, e: int, h: int) -> list[list[tuple[str, torch.Tensor, torch.Tensor | None]]]:
    """The weights that are plain parameters, with their biases allotted in each plausible way."""
    linear = {
        f"{n}.{p}"
        for n, m in cell.named_modules()
        if isinstance(m, (nn.Linear, nn.Embedding))
        for p in ("weight", "bias")
    }
    raw = {name: w.detach() for name, w in weights.items() if name not in linear}
    matrices, sizes = [], (e, h, e + h)
    for name, w in raw.items():
        if w.dim() == 2 and w.shape[1] in sizes and w.shape[0] % h == 0:
            matrices.append((name, w))
        if w.dim() == 2 and w.shape[0] in sizes and w.shape[1] % h == 0:
            matrices.append((name, w.T))
    biases = [w.reshape(-1) for w in raw.values() if w.numel() % h == 0 and (w.dim() == 1 or 1 in w.shape)]
    by_input = {n: [m for m in matrices if m[1].shape[1] == n] for n in sizes}
    owners = [[], by_input[e + h], by_input[e], by_input[h], by_input[e] + by_input[h]]
    mixed = [m for pair in zip(by_input[e], by_input[h], strict=False) for m in pair]
    allotments = []
    for owner in [*owners, mixed]:
        given = {id(m[1]): b for m, b in zip(owner, biases, strict=False) if len(b) == m[1].shape[0]}
        allotments.append([(n, w, given.get(id(w))) for n, w in matrices])
    return allotments[: 1 if not biases else None]


def vectors(weights: dict, h: int) -> list[tuple[str, torch.Tensor]]:
    """Weights of H numbers, which may multiply h element by element."""
    return [(n, w.detach()) for n, w in weights.items() if w.dim() == 1 and len(w) == h and "bias" not in n]


def maps_of(layers, e: int, h: int, extra=(), in_order: bool = False) -> list[Map]:
    """Every map of x and h to gates that the layers allow; `in_order`: the k-th of x goes with the k-th of h."""
    zero, found = torch.zeros(h), []
    xs, hs = [], []
    for name, weight, bias in layers:
        parts = chunks(weight, h) or ([weight] if weight.shape[0] == e + h else [])
        biases = (
            [torch.zeros(len(parts[0]))] * len(parts) if bias is None else bias.split(len(parts[0])) if parts else []
        )
        for k, (w, b) in enumerate(zip(parts, biases, strict=False)):
            label = f"{name}[{k}]" if len(parts) > 1 else name
            nothing = torch.zeros(len(w))
            if weight.shape[1] == e + h:
                found.append(Map(label, w[:, h:], w[:, :h], b, nothing))
                found.append(Map(label, w[:, :e], w[:, e:], b, nothing))
            if weight.shape[1] == e and len(w) == h:
                xs.append((label, w, b))
            if weight.shape[1] == h and len(w) == h:
                hs.append((label, w, b))
    hs += [(name, w, zero) for name, w in extra]
    pairs = list(zip(xs, hs, strict=False)) if len(xs) == len(hs) else []
    if not in_order and len(xs) * len(hs) <= 64:
        pairs += [
            pair for pair in itertools.product(xs, hs) if not any(pair[0] is p and pair[1] is q for p, q in pairs)
        ]
    found += [Map(f"{x[0]} and {h_[0]}", x[1], h_[1], x[2], h_[2]) for x, h_ in pairs]
    return found


def all_maps(cell, weights: dict, e: int, h: int):
    """Sets of maps to try, one for each way to allot biases."""
    allotments = [[*linear_layers(cell), *raw] for raw in raw_layers(cell, weights, e, h)]
    for in_order in (True, False):
        for layers in allotments:
            yield maps_of(layers, e, h, in_order=in_order)
    for layers in allotments if vectors(weights, h) else ():
        yield maps_of(layers, e, h, vectors(weights, h))


def same(a, b) -> bool:
    return torch.allclose(a, b, atol=2e-4, rtol=1e-3)


def hits(candidates: torch.Tensor, seen: torch.Tensor) -> list[tuple[int, ...]]:
    """Indices of the candidates (…, B, H) that equal `seen` (B, H)."""
    close = ((candidates - seen).abs() < 2e-4 + 1e-3 * seen.abs()).all(-1).all(-1)
    return [tuple(index) for index in close.nonzero().tolist()][:MOST_CANDIDATES]


def library_cell(cell, x, states) -> str | None:
    """The name of a cell of torch.nn inside, if it computes the states."""
    for module in cell.modules():
        if isinstance(module, (nn.RNN, nn.GRU, nn.LSTM)):
            try:
                first = x.transpose(0, 1) if module.batch_first else x
                output = module(first)[0].detach()
                output = output.transpose(0, 1) if module.batch_first else output
            except RuntimeError:
                continue
            if output.shape == states.shape and same(output, states):
                return f"torch.nn.{type(module).__name__}"
    return None


# ---------------------------------------------------------------------------------------------- RNN


def shared_input(m: Map) -> str:
    """The mistake that one matrix multiplies both x and h."""
    left, _, right = m.layer.partition(" and ")
    return "one matrix for x and h" if right and left == right else ""


def match_rnn(maps: list[Map], x, h0, states) -> tuple[str, str] | None:
    """The equation of a plain RNN that gives the states (T, B, H), and what is wrong with it."""
    zeros = torch.zeros_like(h0)
    before = torch.cat([h0[None], states[:-1]])
    ways = [("", before), ("the state is forgotten: every step starts from zeros", torch.stack([zeros] * len(states)))]
    for mistake, h in ways:
        for m in maps:
            if len(m.wx) != h0.shape[-1]:
                continue
            a = m(x, h)
            for name, activation in ACTIVATIONS.items():
                if same(activation(a), states):
                    wrong = mistake or shared_input(m)
                    if m.wh.dim() == 1:
                        wrong = "h is multiplied element by element, not by a matrix"
                    if name not in ("tanh", "relu"):
                        wrong = f"the activation is {name}, not tanh"
                    return f"h = {name}(W·[h, x] + b)", wrong
    return None


# ---------------------------------------------------------------------------------------------- LSTM

# (gates, candidate, what multiplies the output gate), the right one first
LSTM_FORMS = list(
    itertools.product(("sigmoid", "softmax", "tanh"), ("tanh", "none", "sigmoid", "relu"), ("tanh", "none", "sigmoid"))
)


def lstm_mistake(form, layers: dict[str, Map], forgotten: str) -> str:
    """What is wrong with an LSTM of that form whose roles those layers play."""
    gates, candidate, output = form
    names = {}
    for role, m in layers.items():
        names.setdefault(m.layer, []).append(role)
    shared = [" = ".join(roles) for roles in names.values() if len(roles) > 1]
    problems = [
        f"the gates use {gates}, not sigmoid" if gates != "sigmoid" else "",
        f"the candidate uses {candidate}, not tanh" if candidate != "tanh" else "",
        f"h is o ⊗ {output}(C), not o ⊗ tanh(C)" if output != "tanh" else "",
        f"gates share their weights: {', '.join(shared)}" if shared else "",
        next((problem for m in layers.values() if (problem := shared_input(m))), ""),
        forgotten,
    ]
    return "; ".join(problem for problem in problems if problem)


def lstm_rest(maps, form, chosen, f: int, x, h0, c0, states, memory: str):
    """True if an LSTM with those roles gives all states."""
    gate, candidate, out = (ACTIVATIONS[name] for name in form)
    o, i, c_ = chosen
    h, c = h0, c0
    for t in range(len(states)):
        previous = {"lost": torch.zeros_like(c), "h for C": h}.get(memory, c)
        h_in = torch.zeros_like(h) if memory == "h lost" else h
        forget = torch.ones_like(c) if f < 0 else gate(maps[f](x[t], h_in))
        c = forget * previous + gate(maps[i](x[t], h_in)) * candidate(maps[c_](x[t], h_in))
        h = gate(maps[o](x[t], h_in)) * out(c)
        if not same(h, states[t]):
            return False
    return True


MEMORIES = {
    "kept": "",
    "lost": "the memory C is forgotten: every step starts from zeros",
    "h lost": "the state h is forgotten: every step starts from zeros",
    "h for C": "h is taken for the memory C",
}


def match_lstm(maps: list[Map], x, h0, c0, states) -> tuple[str, str] | None:
    """The equations of an LSTM that give the states (T, B, H), and what is wrong with them."""
    maps = [m for m in maps if len(m.wx) == h0.shape[-1]]
    if not maps:
        return None
    a = torch.stack([m(x[0], h0) for m in maps])  # (n, B, H), first step: C was c0
    best = None
    for form in LSTM_FORMS if len(maps) <= 20 else LSTM_FORMS[:1]:
        gate, candidate, out = (ACTIVATIONS[name] for name in form)
        s = gate(a)
        c1 = s[:, None] * candidate(a)[None]  # (i, c)
        first = hits(s[:, None, None] * out(c1)[None], states[0])
        for memory in MEMORIES:
            for chosen, f in itertools.product(first, range(-1, 0 if memory == "lost" else len(maps))):
                if lstm_rest(maps, form, chosen, f, x, h0, c0, states, memory):
                    roles = dict(zip("oiC", (maps[k] for k in chosen), strict=True))
                    forgotten = MEMORIES[memory]
                    if f >= 0:
                        roles["f"] = maps[f]
                    elif memory != "lost":
                        forgotten = "there is no forget gate"
                    mistake = lstm_mistake(form, roles, forgotten)
                    if not mistake:
                        return "LSTM", ""
                    if best is None or len(mistake) < len(best):
                        best = mistake
            if best is not None:
                return "LSTM", best
    return None


# ----------------------------------------------------------------------------------------------- GRU

RESETS = {
    "before": "",
    "after": "",  # torch.nn.GRU's: r ⊗ (W_h h + b)
    "none": "the reset gate is not used",
    "x too": "the reset gate multiplies x, too",
    "x too, first": "the reset gate multiplies x, too",  # r ⊗ [x, h]
}


def candidate_of(m: Map, r, x, h, reset: str):
    """The argument of a GRU's candidate."""
    if reset == "before":
        return m(x, r * h)
    if reset == "after":
        return x @ m.wx.T + m.bx + r * m.of_h(h)
    if reset.startswith("x too"):
        size = x.shape[-1] if reset.endswith("first") else h.shape[-1]
        first, second = (r, r) if r.shape == x.shape else (r[..., :size], r[..., size:])
        return m(first * x, second * h) if reset.endswith("first") else m(second * x, first * h)
    return m(x, h)


def gru_steps(gate, candidate, z, r, w, reset, update, forget, x, h0, states) -> bool:
    """True if a GRU with those maps gives all states."""
    h = h0
    for t in range(len(states)):
        before = torch.zeros_like(h) if forget else h
        reset_gate = None if reset == "none" else gate(r(x[t], before))
        new = candidate(candidate_of(w, reset_gate, x[t], before, reset))
        update_gate = gate(z(x[t], before))
        h = update_gate * new + (1 - update_gate) * before if update else (1 - update_gate) * new + update_gate * before
        if not same(h, states[t]):
            return False
    return True


def gru_mistake(gates: str, candidate: str, roles: dict[str, Map], reset: str, forget: bool) -> str:
    """What is wrong with a GRU of that form whose roles those layers play."""
    names = {}
    for role, m in roles.items():
        names.setdefault(m.layer, []).append(role)
    shared = [" = ".join(group) for group in names.values() if len(group) > 1]
    problems = [
        f"the gates use {gates}, not sigmoid" if gates != "sigmoid" else "",
        f"the candidate uses {candidate}, not tanh" if candidate != "tanh" else "",
        f"gates share their weights: {', '.join(shared)}" if shared else "",
        RESETS[reset],
        next((problem for m in roles.values() if (problem := shared_input(m))), ""),
        "the state is forgotten: every step starts from zeros" if forget else "",
    ]
    return "; ".join(problem for problem in problems if problem)


def match_gru(maps: list[Map], x, h0, states) -> tuple[str, str] | None:
    """The equations of a GRU that give the states (T, B, H), and what is wrong with them."""
    size = h0.shape[-1]
    wide, maps = [m for m in maps if len(m.wx) != size], [m for m in maps if len(m.wx) == size]
    if not maps:
        return None
    best = None
    for gates, candidate in itertools.product(("sigmoid", "softmax", "tanh"), ("tanh", "sigmoid", "none", "relu")):
        gate, new = ACTIVATIONS[gates], ACTIVATIONS[candidate]
        a = torch.stack([m(x[0], h0) for m in maps])
        for update, (reset, forget) in itertools.product((True, False), itertools.product(RESETS, (False, True))):
            u = gate(a) if update else 1 - gate(a)
            resetting = [None] if reset == "none" else maps
            if reset.startswith("x too"):  # r has the size of [h, x], or x has that of h
                resetting = wide + (maps if x.shape[-1] == size else [])
            for r in resetting:
                r0 = None if r is None else gate(r(x[0], h0))
                c = torch.stack([new(candidate_of(m, r0, x[0], h0, reset)) for m in maps])
                for z, w in hits(u[:, None] * c[None], states[0]):
                    if gru_steps(gate, new, maps[z], r, maps[w], reset, update, forget, x, h0, states):
                        roles = {"z": maps[z], "candidate": maps[w]} | ({} if r is None else {"r": r})
                        mistake = gru_mistake(gates, candidate, roles, reset, forget)
                        if not mistake:
                            return "GRU", ""
                        best = mistake if best is None or len(mistake) < len(best) else best
        if best is not None:
            return "GRU", best
    return None
