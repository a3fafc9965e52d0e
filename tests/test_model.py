"""Questions 2 and 4: the loss, the cells and the model, against torch.nn, ONNX and finite differences."""

import math

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from conftest import TORCH_CELLS
from onnx.reference import ReferenceEvaluator
from torch import nn

from generate import generate
from textloader import EOS_IX, PAD_IX, id2lettre
from tp5 import CELLS, Cell, CharModel, maskedCrossEntropy

T, B, E, H, V = 5, 3, 4, 6, len(id2lettre)
every_cell = pytest.mark.parametrize("name", CELLS)


# ------------------------------------------------------------------------------------------- loss


def test_loss_is_cross_entropy_that_ignores_blank():
    """Divided by the real symbols of the whole batch: neither the mean of columns nor of all positions."""
    torch.manual_seed(0)
    output = torch.randn(T, B, 7, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[2, 3, 4], [5, 6, 1], [2, 1, 0], [3, 0, 0], [1, 0, 0]])
    ours = maskedCrossEntropy(output, target, PAD_IX)
    theirs = F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=PAD_IX)
    log_probs = output.log_softmax(-1)
    by_hand = -sum(log_probs[t, b, target[t, b]] for t, b in target.nonzero().tolist()) / 10
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours, by_hand)
    torch.testing.assert_close(*(torch.autograd.grad(loss, output)[0] for loss in (ours, theirs)))
    other = target.masked_fill(target == 0, 9)  # any code may be the padding
    torch.testing.assert_close(maskedCrossEntropy(output, other, 9), ours)


@pytest.mark.parametrize(
    ("value", "where", "real", "expected"),
    [
        (-math.inf, (-1, ...), T - 1, math.log(7)),
        (math.nan, (-1, ...), T - 1, math.log(7)),
        (-math.inf, (..., PAD_IX), T - 1, math.log(6)),  # BLANK's logit, as the decoders have it
        (math.nan, ..., 0, 0.0),  # all padding
    ],
)
def test_loss_gives_no_nan(value, where, real, expected):
    output, target = torch.zeros(T, B, 7), torch.ones(T, B, dtype=torch.int64)
    output[where], target[real:] = value, PAD_IX
    loss = maskedCrossEntropy(output.requires_grad_(), target, PAD_IX)
    loss.backward()
    assert loss.item() == pytest.approx(expected) and output.grad.isfinite().all()


# ------------------------------------------------------------------------------------------ cells


@pytest.mark.parametrize("name", ["rnn", "lstm"])
def test_cell_equals_torchs_with_gradients(name):
    torch.manual_seed(1)
    ours, theirs = CELLS[name](E, H).double(), TORCH_CELLS[name](E, H).double()
    nn.init.normal_(ours.bias)
    order = {"rnn": [0], "lstm": [1, 0, 2, 3]}[name]  # torch: i, f, g, o; ours: f, i, C, o

    mine = ours.input_weight, ours.hidden_weight, ours.bias
    pairs = list(zip(mine, (theirs.weight_ih_l0, theirs.weight_hh_l0, theirs.bias_ih_l0), strict=True))

    def reordered(parameter):
        return torch.cat([parameter.chunk(len(order))[gate] for gate in order])

    with torch.no_grad():
        theirs.bias_hh_l0.zero_()
        for mine, other in pairs:
            other.copy_(reordered(mine))
    x = torch.randn(T, B, E, dtype=torch.float64)
    (output, states), (expected, expected_states) = ours(x), theirs(x)
    torch.testing.assert_close(output, expected)
    expected_states = expected_states if name == "lstm" else (expected_states,)
    for state, other in zip(states, expected_states, strict=True):
        torch.testing.assert_close(state, other[0])
    weight = torch.randn_like(output)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    for mine, other in pairs:
        torch.testing.assert_close(reordered(mine.grad), other.grad)


def test_gru_equals_onnx():
    """ONNX's resets before the product with linear_before_reset=0; its z keeps the old state."""
    torch.manual_seed(2)
    gru = CELLS["gru"](E, H).double()
    x, h = torch.randn(T, B, E, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64)
    sign = torch.ones(3 * H, 1, dtype=torch.float64)
    sign[:H] = -1  # 1 − σ(a) = σ(−a)
    W, R = (sign * gru.input_weight).detach().numpy(), (sign * gru.hidden_weight).detach().numpy()
    feeds = {"X": x.numpy(), "W": W[None], "R": R[None], "B": np.zeros((1, 6 * H)), "h": h.numpy()[None]}
    inputs = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.DOUBLE, None) for n in feeds]
    outputs = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.DOUBLE, None) for n in ("Y", "Y_h")]
    names = ["X", "W", "R", "B", "", "h"], ["Y", "Y_h"]
    node = onnx.helper.make_node("GRU", *names, hidden_size=H, linear_before_reset=0)
    graph = onnx.helper.make_graph([node], "gru", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)])
    expected, _ = ReferenceEvaluator(model).run(None, feeds)
    output, (last,) = gru(x, (h,))
    torch.testing.assert_close(output, torch.from_numpy(expected[:, 0]))
    torch.testing.assert_close(last, output[-1])


@every_cell
def test_gradients_by_finite_differences(name):
    torch.manual_seed(3)
    cell = CELLS[name](2, 3).double()
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: cell(x)[0], (x, *cell.parameters()))


@every_cell
def test_one_step_after_another_is_the_whole(name):
    """And a state given back goes on, the batch second to last in each of its tensors."""
    torch.manual_seed(4)
    cell, x = CELLS[name](E, H).double(), torch.randn(T, B, E, dtype=torch.float64)
    output, states = cell(x)
    halves, halfway = cell(x[:2])
    rest, end = cell(x[2:], halfway)
    torch.testing.assert_close(torch.cat([halves, rest]), output)
    step = {state: torch.zeros(B, H, dtype=torch.float64) for state in cell.states}
    for projected in cell.project(x):
        step = cell.one_step(projected, *(step[state] for state in cell.states))
    for state, one, two in zip(cell.states, states, end, strict=True):
        assert one.shape == (B, H)
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one, step[state])


@every_cell
def test_initialisation(name):
    """Orthogonal recurrent matrices; the LSTM's forget gate open at first; the handout's GRU has no bias."""
    cell = CELLS[name](E, H)
    for gate in cell.hidden_weight.chunk(len(cell.gates)):
        torch.testing.assert_close(gate @ gate.T, torch.eye(H), atol=1e-5, rtol=0)
    expected = {"rnn": [0.0] * H, "lstm": [1.0] * H + [0.0] * 3 * H, "gru": None}[name]
    assert (cell.bias if cell.bias is None else cell.bias.tolist()) == expected
    assert cell.input_weight.shape == (len(cell.gates) * H, E)


@every_cell
def test_steps_have_every_gate_and_state(name):
    """By name: they satisfy the docstring's equations, and gradients reach them."""
    torch.manual_seed(5)
    cell, steps = CELLS[name](E, H).double(), []
    output, _ = cell.unroll(cell.project(torch.randn(T, B, E, dtype=torch.float64)), trace=steps)
    assert len(steps) == T and all(set(step) == {*cell.gates, *cell.states} for step in steps)
    values = {key: torch.stack([step[key] for step in steps]) for key in steps[0]}
    assert all(value.shape == (T, B, H) for value in values.values())
    before = {key: torch.cat([torch.zeros_like(value[:1]), value[:-1]]) for key, value in values.items()}
    expected = {
        "rnn": lambda h, **_: h,
        "gru": lambda z, candidate, **_: (1 - z) * before["h"] + z * candidate,
        "lstm": lambda f, i, candidate, o, **_: o * torch.tanh(f * before["C"] + i * candidate),
    }[name](**values)
    torch.testing.assert_close(output, expected)
    for state in cell.states:
        assert torch.autograd.grad(output[-1].sum(), steps[0][state], retain_graph=True)[0].all()


def test_a_students_cell_needs_only_gates_and_one_step():
    class Minimal(Cell):
        """With one gate (Zhou et al. 2016)."""

        gates = ("f", "candidate")

        def one_step(self, projected, h):
            (x_f, x), (W_f, W) = projected.chunk(2, -1), self.hidden_weight.chunk(2)
            f = torch.sigmoid(x_f + h @ W_f.T)
            return {"h": (1 - f) * h + f * torch.tanh(x + (f * h) @ W.T), "f": f}

    torch.manual_seed(6)
    model = CharModel("rnn", E, H).double()
    model.rnn = Minimal(E, H).double()
    targets = torch.randint(2, V, (T, B))
    maskedCrossEntropy(model(targets), targets, PAD_IX).backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    assert generate(model.rnn, model.emb, model.decoder, EOS_IX, "ab", 5).text


# ------------------------------------------------------------------------------------------ model


@every_cell
def test_model_predicts_each_symbol_from_those_before(name):
    """The look-up of projections gives what embedding and cell give; no logits see their own target."""
    torch.manual_seed(7)
    model, targets = CharModel(name, E, H).double(), torch.randint(2, V, (T, B))
    inputs = torch.cat([torch.full((1, B), EOS_IX), targets[:-1]])
    logits = model(targets)
    assert logits.shape == (T, B, V)
    torch.testing.assert_close(logits, model.decoder(model.rnn(model.emb(inputs))[0]))
    changed = targets.clone()
    changed[2] = (changed[2] - 1) % (V - 2) + 2  # another symbol in each column
    assert torch.equal(model(changed)[:3], logits[:3])
    assert not torch.isclose(model(changed)[3], logits[3]).all(-1).any()
