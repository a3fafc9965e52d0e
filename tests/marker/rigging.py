"""Models that predict what a test wants: a student's own cell with a decoder solved for it.

A cell with random weights turns every prefix into a state of its own. The decoder's weights that give
each prefix of a tree the wanted next symbols are the solution of linear equations. So a test can say
"after `ba`, c; after `bac`, d" of any cell, and only reading exactly those prefixes finds the way.
"""

import copy
import itertools
from dataclasses import dataclass, field

import torch
from torch import nn

from .cells import Inputs, Recognised, Sizes, constructions, embeddings_of, weights_of

EMBEDDING, HIDDEN = 24, 88
NEVER = -30.0  # the log-probability of what a tree does not name
Prefix = tuple[int, ...]


@dataclass
class Rigged:
    """A cell, an embedding and a decoder whose predictions after certain prefixes are known."""

    found: Recognised
    cell: nn.Module
    emb: nn.Module
    linear: nn.Linear
    symbols: int
    known: dict[Prefix, torch.Tensor] = field(default_factory=dict)
    inner: bool = False  # the cell's own decoder has the weights, too, and gives its logits

    def states(self, prefixes: list[Prefix]) -> torch.Tensor:
        """The state after each prefix, (prefixes, H)."""
        t = max(9, *map(len, prefixes))
        rows = [(*p, *[2] * (t - len(p))) for p in prefixes]
        while len(rows) in (1, 2, t - 1, t, t + 1, HIDDEN, EMBEDDING):
            rows.append(rows[0])
        codes = torch.tensor(rows).T  # (T, B)
        zeros = torch.zeros(len(rows), HIDDEN)
        with torch.no_grad():
            inputs = Inputs(codes, self.emb.weight[codes], zeros, zeros)
            states = self.found.states(copy.deepcopy(self.cell), inputs)
        return torch.stack([states[len(p) - 1, b] for b, p in enumerate(prefixes)])

    def log_probs(self, prefixes: list[Prefix]) -> list[torch.Tensor]:
        """Log-probabilities of the next symbol after each prefix."""
        unknown = list(dict.fromkeys(p for p in prefixes if p not in self.known))
        if unknown:
            with torch.no_grad():
                rows = self.linear(self.states(unknown)).log_softmax(-1)
            self.known.update(zip(unknown, rows, strict=True))
        return [self.known[p] for p in prefixes]

    def decoder(self, cell):
        """What to hand over as decoder, with that copy of the cell."""
        own = next((getattr(cell, n) for n in ("decode", "decoder") if callable(getattr(cell, n, None))), None)
        return own if self.inner and own is not None else self.linear


def set_decoders(cell, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Give every layer of a cell that could be its decoder those weights."""
    for tensor in weights_of(cell).values():
        for value in (weight, weight.T, bias):
            if tensor.shape == value.shape:
                tensor.copy_(value)


def rig(found: Recognised, symbols: int, tree: dict[Prefix, dict[int, float]]) -> Rigged | None:
    """A model that gives, after each prefix, those probabilities; None if the cell does not allow it."""
    sizes = Sizes(EMBEDDING, HIDDEN, symbols)
    build = next(itertools.islice(constructions(found.kind, sizes), found.construction, None))
    cell, torch_seed = build(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in weights_of(cell).values():
            weight *= 0.5  # states of a wide cell shall not saturate
    emb = next((e for e in embeddings_of(cell) if e.embedding_dim == EMBEDDING), None)
    if emb is None:
        emb = nn.Embedding(symbols, EMBEDDING)
        with torch.no_grad():
            emb.weight.copy_(torch.randn(emb.weight.shape, generator=torch_seed))
    else:
        with torch.no_grad():
            emb.weight *= 2
    model = Rigged(found, cell, emb, nn.Linear(HIDDEN, symbols), symbols)
    prefixes = list(tree)
    wanted = torch.full((len(tree), symbols), NEVER, dtype=torch.float64)
    for row, prefix in enumerate(prefixes):
        for symbol, probability in tree[prefix].items():
            wanted[row, symbol] = torch.tensor(probability, dtype=torch.float64).log()
    states = model.states(prefixes).double()
    columns = torch.cat([states, torch.ones(len(states), 1)], 1)
    solution = torch.linalg.pinv(columns) @ wanted  # (H + 1, V)
    weight, bias = solution[:-1].T.float(), solution[-1].float()
    with torch.no_grad():
        model.linear.weight.copy_(weight)
        model.linear.bias.copy_(bias)
        if not close(model.linear(states.float()), wanted):
            return None
        set_decoders(cell, weight, bias)
        model.inner = decodes(model, states.float(), wanted)
        if not close(model.linear(model.states(prefixes)), wanted):
            return None  # the decoder's layer was one of the cell's own
    return model


def close(logits: torch.Tensor, wanted: torch.Tensor) -> bool:
    return logits.shape == wanted.shape and torch.allclose(logits.softmax(-1), wanted.softmax(-1).float(), atol=2e-3)


def decodes(model: Rigged, states: torch.Tensor, wanted: torch.Tensor) -> bool:
    """True if the cell's own decoder gives the wanted logits."""
    own = next((getattr(model.cell, n) for n in ("decode", "decoder") if callable(getattr(model.cell, n, None))), None)
    try:
        return own is not None and close(own(states), wanted)
    except Exception:
        return False
