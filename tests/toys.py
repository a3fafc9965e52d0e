"""Toy models whose sentences can all be enumerated, for the tests of the decoders."""

import itertools
import math
from unittest.mock import patch

import pytest
import torch
from conftest import TORCH_CELLS
from hypothesis import strategies as st
from torch import nn

import generate
from textloader import EOS_IX
from tp5 import CELLS

LETTERS = "abc"
MAXLEN = 5  # symbols: up to four letters and EOS
EVERY_CELL = list(itertools.product(CELLS, ("ours", "torch")))
every_cell = pytest.mark.parametrize(("cell", "library"), EVERY_CELL)


def toy(cell: str, library: str, symbols: int = 5, seed: int = 0):
    """A random (rnn, emb, decoder) in float64 over few symbols: BLANK, EOS, a, b, c."""
    torch.manual_seed(seed)
    kind = CELLS[cell] if library == "ours" else TORCH_CELLS[cell]
    rnn, emb, decoder = kind(3, 4), nn.Embedding(symbols, 3), nn.Linear(4, symbols)
    with torch.no_grad():
        decoder.weight *= 4  # far from uniform
        decoder.bias[0] += 5  # BLANK, which nobody may write
    return rnn.double(), emb.double(), decoder.double()


toys = st.builds(lambda kind, seed: toy(*kind, seed=seed), st.sampled_from(EVERY_CELL), st.integers(0, 999))


def letters(codes) -> str:
    """The text of codes of a, b, c."""
    return "".join(LETTERS[code - 2] for code in codes)


def enumerated(model, start="", alpha=1.0, min_length=0):
    """(log-probability, text) of every possible sentence of at most MAXLEN symbols, best first.

    By the chain rule, symbol by symbol, from full forward passes over all sentences of a length.
    """
    rnn, emb, decoder = model
    prompt, found = [EOS_IX, *(LETTERS.index(c) + 2 for c in start)], []
    for length in range(min_length, MAXLEN):
        texts = list(itertools.product(range(2, 5), repeat=length))
        output, _ = rnn(emb(torch.tensor([[*prompt, *text] for text in texts]).T))
        probs = decoder(output[len(prompt) - 1 :])[..., 1:].softmax(-1).tolist()  # BLANK is never predicted
        for column, text in enumerate(texts):
            log_prob = 0.0
            for step, code in enumerate([*text, EOS_IX]):
                p, mass, kept = probs[step][column], 0.0, []
                for symbol in sorted(range(4), key=lambda s: -p[s]):
                    if mass < alpha:
                        kept.append(symbol)
                        mass += p[symbol]
                log_prob += math.log(p[code - 1] / mass) if code - 1 in kept else -math.inf
            found.append((log_prob, letters(text)))
    return sorted((pair for pair in found if pair[0] > -math.inf), reverse=True)


class LastSymbol(nn.Module):
    """A cell without memory, called like `torch.nn`'s: the next symbol depends on the last one only."""

    def forward(self, x, state=None):
        return x, x[-1:]


def table_model(*rows):
    """P(next | last) by hand: rows after EOS, a, b …, over EOS, a, b …"""
    size = 1 + len(rows[0])
    table = torch.zeros(size, size)
    table[1 : 1 + len(rows), 1:] = torch.tensor(rows)
    emb, decoder = nn.Embedding(size, size), nn.Linear(size, size, bias=False)
    with torch.no_grad():
        emb.weight.copy_(torch.eye(size))
        decoder.weight.copy_(table.T.clamp_min(1e-30).log())
    return LastSymbol(), emb, decoder


def small_search(batch: int = 512):
    """Exact search that begins with a beam of one, which does not find all by itself in so small a world."""
    return patch.multiple(generate, FIRST_BEAM=1, BATCH=batch)
