"""Muon, against torch.linalg.svd and torch.optim.Muon; which optimiser moves what."""

import copy
import itertools
from argparse import Namespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tp5
from tp5 import CharModel, Muon, make_optimizers, orthogonal

JORDAN = ((3.4445, -4.7750, 2.0315),) * 5  # the coefficients of torch.optim.Muon


def matrix(rows: int, columns: int, condition: float = 100.0, seed: int = 0):
    """A random matrix and its U·Vᵀ; its singular values fall from 1 to 1 / `condition`."""
    generator = torch.Generator().manual_seed(seed)
    U, _, V = torch.linalg.svd(torch.randn(rows, columns, generator=generator), full_matrices=False)
    return U * torch.logspace(0, -torch.tensor(condition).log10(), len(V)) @ V, U @ V


@settings(max_examples=60)
@given(st.sampled_from([(8, 8), (64, 16), (16, 64), (256, 128)]), st.floats(1, 30), st.integers(0, 99),
       st.floats(1e-6, 1e6))  # fmt: skip
def test_singular_values_come_near_one_and_directions_stay(shape, condition, seed, scale):
    M, UV = matrix(*shape, condition, seed)
    update = orthogonal(M * scale)
    size = M.norm()
    U, S, V = torch.linalg.svd(M, full_matrices=False)
    promised = S / size >= 0.01  # what the polynomials were fitted on
    after = (U.T @ update @ V.T).diagonal()  # the singular values of the update, each in its old direction
    assert (after[promised] > 0.7).all() and (after < 1.3).all()
    torch.testing.assert_close(U * after @ V, update, atol=2e-2, rtol=0)
    assert torch.nn.functional.cosine_similarity(update.flatten(), UV.flatten(), dim=0) > 0.9


def test_gradients_of_nothing_and_of_other_sizes():
    assert (orthogonal(torch.zeros(4, 3)) == 0).all()
    M, _ = matrix(6, 4, 10.0)
    torch.testing.assert_close(orthogonal(M), orthogonal(1000 * M), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (48, 48)])
def test_equals_torch_muon_to_bfloat16(shape, monkeypatch):
    """The same gradients, with torch's coefficients: torch's works in bfloat16, so to its precision."""
    ours, theirs = (torch.nn.Parameter(matrix(*shape)[0].clone()) for _ in range(2))
    monkeypatch.setattr(tp5, "QUINTICS", JORDAN)
    optimizer = Muon([ours], lr=0.05)
    peer = torch.optim.Muon([theirs], lr=0.05, weight_decay=0.1, momentum=0.95, nesterov=True, eps=1e-7)
    for seed in range(4):
        gradient = matrix(*shape, 5.0, seed)[0]
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        peer.step()
        # A step is as long as lr·√max(1, rows/columns) in each direction: compare to 5 % of that.
        close = 0.05 * 0.05 * max(1, shape[0] / shape[1]) ** 0.5 * (seed + 1)
        assert torch.linalg.matrix_norm(ours - theirs, 2) < close


@pytest.mark.parametrize(("name", "kinds"), [("muon", [Muon, torch.optim.AdamW]), ("adamw", [torch.optim.AdamW])])
def test_every_parameter_has_one_optimizer(name, kinds):
    """Muon the cell's two matrices, AdamW all else."""
    model, options = CharModel("lstm", 3, 4), Namespace(optimizer=name, lr=0.01)
    optimizers = make_optimizers(model, options)
    assert [type(optimizer) for optimizer in optimizers] == kinds
    moved = [[id(p) for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    assert sorted(itertools.chain(*moved)) == sorted(map(id, model.parameters()))
    if name == "muon":
        assert moved[0] == [id(model.rnn.input_weight), id(model.rnn.hidden_weight)]


def test_state_goes_on_where_it_was():
    """Five steps are three steps, a state dict loaded into a new optimiser, and two more: to the bit."""

    def train(optimizer, W, steps):
        for step in steps:
            W.grad = torch.cos(torch.arange(12.0) * (step + 1)).view(4, 3)
            optimizer.step()

    straight, stopped = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    train(Muon([straight], lr=0.05), straight, range(5))
    first = Muon([stopped], lr=0.05)
    train(first, stopped, range(3))
    second = Muon([stopped], lr=0.01)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, stopped, range(3, 5))
    assert torch.equal(straight, stopped)
