"""Models that predict what a test wants: a student's own cell with a decoder solved for it.

A cell with random weights turns every prefix into a state of its own. The decoder's weights that give
each prefix of a tree the wanted next symbols are the solution of linear equations. So a test can say
"after `ba`, c; after `bac`, d" of any cell, and only reading exactly those prefixes finds the way.
"""

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

from .cells import Inputs, Recognised, Sizes, embeddings_of
from .check_cells import own_decoder
from .equations import weights_of
from .sandbox import attempt

EMBEDDING, HIDDEN = 24, 88
NEVER = -30.0  # the log-probability of what a tree does not name, less 0.01 by code: topk meets no ties
Prefix = tuple[int, ...]


class Unclear(Exception):
    """The marker does not understand a function's parameters or its result, or cannot make a model for it."""


@dataclass
class Rigged:
    """A cell, an embedding and a decoder whose predictions after certain prefixes are known."""

    recognised: Recognised
    cell: nn.Module
    emb: nn.Module
    linear: nn.Linear
    known: dict[Prefix, torch.Tensor] = field(default_factory=dict)
    inner: bool = False  # the cell's own decoder has the weights, too, and gives its logits

    def states(self, prefixes: list[Prefix]) -> torch.Tensor:
        t = max(9, *map(len, prefixes))
        rows = [(*p, *[2] * (t - len(p))) for p in prefixes]
        while len(rows) in (1, 2, t - 1, t, t + 1, HIDDEN, EMBEDDING):
            rows.append(rows[0])
        codes = torch.tensor(rows).T  # (T, B)
        zeros = torch.zeros(len(rows), HIDDEN)
        with torch.no_grad():
            inputs = Inputs(codes, self.emb.weight[codes], zeros, zeros)
            states = self.recognised.states(copy.deepcopy(self.cell), inputs)
        return torch.stack([states[len(p) - 1, b] for b, p in enumerate(prefixes)])

    def log_probs(self, prefixes: list[Prefix]) -> list[torch.Tensor]:
        unknown = list(dict.fromkeys(p for p in prefixes if p not in self.known))
        if unknown:
            with torch.no_grad():
                rows = self.linear(self.states(unknown)).log_softmax(-1)
            self.known.update(zip(unknown, rows, strict=True))
        return [self.known[p] for p in prefixes]

    def parts(self) -> tuple:
        """(rnn, emb, decoder) to hand over: a copy, so that no call changes the next."""
        cell = copy.deepcopy(self.cell)
        emb = next(iter(embeddings_of(cell)), self.emb)
        return cell, emb, own_decoder(cell)[1] if self.inner else self.linear


def rig(recognised: Recognised, symbols: int, tree: dict[Prefix, dict[int, float]]) -> Rigged:
    """A model that gives, after each prefix, those probabilities; Unclear if the cell does not allow it."""
    cell, generator = recognised.build(Sizes(EMBEDDING, HIDDEN, symbols)), torch.Generator().manual_seed(5)
    emb = next((e for e in embeddings_of(cell) if e.embedding_dim == EMBEDDING), None)
    with torch.no_grad():
        for weight in weights_of(cell).values():
            weight *= 0.5  # states of a wide cell shall not saturate
        if emb is None:
            emb = nn.Embedding(symbols, EMBEDDING)
            emb.weight.copy_(torch.randn(emb.weight.shape, generator=generator))
        else:
            emb.weight *= 2
    model = Rigged(recognised, cell, emb, nn.Linear(HIDDEN, symbols))
    prefixes = list(tree)
    wanted = (NEVER - 0.01 * torch.arange(symbols, dtype=torch.float64)).repeat(len(tree), 1)
    for row, prefix in enumerate(prefixes):
        for symbol, probability in tree[prefix].items():
            wanted[row, symbol] = torch.tensor(probability, dtype=torch.float64).log()
    states = model.states(prefixes).double()
    shapes = {tuple(tensor.shape) for tensor in weights_of(cell).values()}
    without_bias = {(symbols, HIDDEN), (HIDDEN, symbols)} & shapes and (symbols,) not in shapes
    columns = torch.cat([states, torch.full((len(states), 1), 0.0 if without_bias else 1.0)], 1)
    solution = torch.linalg.pinv(columns) @ wanted  # (H + 1, V)
    weight, bias = solution[:-1].T.float(), solution[-1].float()
    with torch.no_grad():
        model.linear.weight.copy_(weight)
        model.linear.bias.copy_(bias)
        if not close(model.linear(states.float()), wanted):
            raise Unclear("the cell could not be rigged")
        for tensor in weights_of(cell).values():  # every layer that could be its decoder
            for value in (weight, weight.T, bias):
                if tensor.shape == value.shape:
                    tensor.copy_(value)
        model.inner = decodes(model, states.float(), wanted)
        if not close(model.linear(model.states(prefixes)), wanted):
            raise Unclear("the cell could not be rigged")  # the decoder's layer was one of the cell's own
    return model


def close(logits: torch.Tensor, wanted: torch.Tensor) -> bool:
    return logits.shape == wanted.shape and torch.allclose(logits.softmax(-1), wanted.softmax(-1).float(), atol=2e-3)


def decodes(model: Rigged, states: torch.Tensor, wanted: torch.Tensor) -> bool:
    """True if the cell's own decoder gives the wanted logits, or their probabilities."""
    own = own_decoder(model.cell)
    given, error = attempt(own[1], states) if own else (None, None)
    if error is not None or not isinstance(given, torch.Tensor):
        return False
    return close(given, wanted) or close(given.log(), wanted)
