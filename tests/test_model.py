"""Questions 2, 4 and 5: the loss and the cells, against oracles from elsewhere."""

import gc
import weakref

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from conftest import TORCH_CELLS
from onnx.reference import ReferenceEvaluator
from torch import nn

from textloader import EOS_IX, PAD_IX, SYMBOLS
from tp5 import CELLS, Cell, CharModel, ThroughTime, maskedCrossEntropy, through_time, watch

T, B, E, H = 5, 3, 4, 6


def test_loss_is_cross_entropy_that_ignores_blank():
    torch.manual_seed(0)
    output = torch.randn(T, B, 7, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 7, (T, B))
    ours = maskedCrossEntropy(output, target, PAD_IX)
    theirs = F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=PAD_IX)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, output)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("case", ["all padding", "minus infinity", "blank column", "nan at padding"])
def test_loss_gives_no_nan(case):
    output = torch.zeros(T, B, 7)
    target = torch.zeros(T, B, dtype=torch.int64) if case == "all padding" else torch.ones(T, B, dtype=torch.int64)
    target[-1] = PAD_IX
    if case == "minus infinity":
        output[-1] = float("-inf")
    if case == "blank column":
        output[..., PAD_IX] = float("-inf")
    if case == "nan at padding":
        output[-1] = float("nan")
    output.requires_grad_()
    loss = maskedCrossEntropy(output, target, PAD_IX)
    loss.backward()
    expected = {"all padding": 0.0, "blank column": np.log(6)}.get(case, np.log(7))
    assert loss.item() == pytest.approx(expected)
    assert output.grad.isfinite().all()


def with_the_same_weights(name):
    """Our cell and torch's with the same weights, in float64."""
    torch.manual_seed(1)
    ours, theirs = CELLS[name](E, H).double(), TORCH_CELLS[name](E, H).double()
    nn.init.normal_(ours.bias)
    order = {"rnn": [0], "lstm": [1, 0, 2, 3]}[name]  # torch: i, f, g, o; ours: f, i, C, o

    def reordered(parameter):
        return torch.cat([parameter.chunk(len(order))[gate] for gate in order])

    with torch.no_grad():
        theirs.weight_ih_l0.copy_(reordered(ours.input_weight))
        theirs.weight_hh_l0.copy_(reordered(ours.hidden_weight))
        theirs.bias_ih_l0.copy_(reordered(ours.bias))
        theirs.bias_hh_l0.zero_()
    return ours, theirs, reordered


@pytest.mark.parametrize("name", ["rnn", "lstm"])
def test_cell_equals_torchs_with_gradients(name):
    ours, theirs, reordered = with_the_same_weights(name)
    x = torch.randn(T, B, E, dtype=torch.float64)
    output, state = ours(x)
    expected, expected_state = theirs(x)
    torch.testing.assert_close(output, expected)
    for tensor, other in zip(*(s if isinstance(s, tuple) else (s,) for s in (state, expected_state)), strict=True):
        torch.testing.assert_close(tensor, other[0])
    weight = torch.randn_like(output)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(reordered(ours.input_weight.grad), theirs.weight_ih_l0.grad)
    torch.testing.assert_close(reordered(ours.hidden_weight.grad), theirs.weight_hh_l0.grad)
    torch.testing.assert_close(reordered(ours.bias.grad), theirs.bias_ih_l0.grad)


def test_gru_equals_onnx():
    """ONNX resets before the product with linear_before_reset=0; its z keeps the old state, ours admits the new."""
    torch.manual_seed(2)
    gru = CELLS["gru"](E, H).double()
    x, h = torch.randn(T, B, E, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64)
    sign = torch.ones(3 * H, 1, dtype=torch.float64)
    sign[:H] = -1  # 1 − σ(a) = σ(−a)
    W, R = (sign * gru.input_weight).detach().numpy(), (sign * gru.hidden_weight).detach().numpy()
    feeds = {"X": x.numpy(), "W": W[None], "R": R[None], "B": np.zeros((1, 6 * H)), "h": h.numpy()[None]}
    inputs = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.DOUBLE, None) for n in feeds]
    outputs = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.DOUBLE, None) for n in ("Y", "Y_h")]
    node = onnx.helper.make_node(
        "GRU", ["X", "W", "R", "B", "", "h"], ["Y", "Y_h"], hidden_size=H, linear_before_reset=0
    )
    graph = onnx.helper.make_graph([node], "gru", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)])
    expected, _ = ReferenceEvaluator(model).run(None, feeds)
    output, state = gru(x, h)
    torch.testing.assert_close(output, torch.from_numpy(expected[:, 0]))
    torch.testing.assert_close(state, output[-1])


@pytest.mark.parametrize("name", CELLS)
def test_gradients_by_finite_differences(name):
    torch.manual_seed(3)
    cell = CELLS[name](2, 3).double()
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    parameters = tuple(cell.parameters())

    def outputs(x, *_):
        return cell(x)[0]

    assert torch.autograd.gradcheck(outputs, (x, *parameters))


@pytest.mark.parametrize("name", CELLS)
def test_backward_by_hand_equals_autograds(name):
    """The plain loop under autograd is the oracle of `ThroughTime`, for every input's gradient."""
    torch.manual_seed(5)
    cell = CELLS[name](E, H).double()
    state = tuple(torch.randn(H, B, dtype=torch.float64, requires_grad=True) for _ in cell.states)
    projected = torch.randn(T, B, len(cell.gates) * H, dtype=torch.float64, requires_grad=True)
    inputs = (projected, cell.hidden_weight, *state)
    found = []
    for run in (through_time, ThroughTime.apply):
        outputs = run(cell, *inputs)
        loss = sum((output * torch.arange(output.numel()).view_as(output).sin()).sum() for output in outputs)
        found.append((loss, *torch.autograd.grad(loss, inputs)))
    for plain, by_hand in zip(*found, strict=True):
        torch.testing.assert_close(plain, by_hand)


@pytest.mark.parametrize("name", CELLS)
def test_bfloat16_products_stay_close(name):
    """Products in bfloat16 (8 bits), everything else in float32: outputs, states and gradients follow."""
    torch.manual_seed(6)
    model = CharModel(name, E, 4 * H)
    targets = torch.randint(2, SYMBOLS, (T, B))
    losses, gradients = [], []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), watch(model.rnn) as states:
            loss = maskedCrossEntropy(model(targets), targets, PAD_IX)
        assert loss.dtype == torch.float32 and all(steps[0].dtype == torch.float32 for steps in states.values())
        losses.append(loss.item())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])]))
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


@pytest.mark.parametrize("name", CELLS)
def test_other_equations_get_their_own_gradients(name):
    """The backward pass of a cell of ours is not that of a subclass with other equations."""

    class Halved(CELLS[name]):
        def equations(self, W, px, *state):
            return super().equations(W, px / 2, *state)

    class Mixin:
        equations = Halved.equations

    class Mixed(Mixin, CELLS[name]):
        """Has equations from elsewhere."""

    class Renamed(CELLS[name]):
        """Still has it."""

    assert Halved.back is Mixed.back is None and Renamed.back is CELLS[name].back is not None
    torch.manual_seed(8)
    cell, x = Halved(2, 3).double(), torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: cell(x)[0], x)


@pytest.mark.parametrize("name", CELLS)
def test_a_students_cell_needs_only_its_equations(name):
    """Without `slopes` and `back`, autograd goes through the loop; the gradients are the same."""

    class Students(Cell):
        gates, states, has_bias = CELLS[name].gates, CELLS[name].states, CELLS[name].has_bias
        equations = CELLS[name].equations

    torch.manual_seed(7)
    ours, theirs = CharModel(name, E, H).double(), CharModel(name, E, H).double()
    theirs.rnn = Students(E, H).double()
    theirs.load_state_dict(ours.state_dict())
    targets = torch.randint(2, SYMBOLS, (T, B))
    for model in (ours, theirs):
        maskedCrossEntropy(model(targets), targets, PAD_IX).backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("name", CELLS)
def test_memory_is_freed_with_the_graph(name):
    """No cycle keeps a training step's tensors alive until the collector runs."""
    gc.disable()
    try:
        output, state = CELLS[name](E, H)(torch.randn(T, B, E))
        node = weakref.ref(output.grad_fn.next_functions[0][0])  # `ThroughTime`'s, with all that it saved
        output.sum().backward()
        assert node() is not None
        del output, state
        assert node() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", CELLS)
def test_initialisation(name):
    cell = CELLS[name](E, H)
    for gate in cell.hidden_weight.chunk(len(cell.gates)):
        torch.testing.assert_close(gate @ gate.T, torch.eye(H), atol=1e-5, rtol=0)
    if name == "lstm":
        assert cell.bias.tolist() == [1.0] * H + [0.0] * 3 * H
    if name == "gru":
        assert cell.bias is None


@pytest.mark.parametrize("name", CELLS)
def test_model_looks_up_what_it_would_multiply(name):
    """The projection table gives what embedding and cell give, and logits never see their own target."""
    torch.manual_seed(4)
    model = CharModel(name, E, H).double()
    targets = torch.randint(2, SYMBOLS, (T, B))
    inputs = torch.cat([torch.full((1, B), EOS_IX), targets[:-1]])
    logits = model(targets)
    assert logits.shape == (T, B, SYMBOLS)
    torch.testing.assert_close(logits, model.decoder(model.rnn(model.emb(inputs))[0]))
    changed = targets.clone()
    changed[2] = 5
    assert torch.equal(model(changed)[:3], logits[:3]) and not torch.equal(model(changed)[3], logits[3])


@pytest.mark.parametrize("name", TORCH_CELLS)
def test_model_takes_another_cell(name):
    model = CharModel(name, E, H)
    model.rnn = TORCH_CELLS[name](E, H)
    assert model(torch.randint(2, SYMBOLS, (T, B))).shape == (T, B, SYMBOLS)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("rnn", {"h"}),
        ("gru", {"z", "r", "candidate", "h"}),
        ("lstm", {"f", "i", "candidate", "o", "C", "h"}),
    ],
)
def test_watching_shows_the_steps_that_ran(name, shown):
    cell = CELLS[name](E, H)
    with watch(cell) as states:
        output, _ = cell(torch.randn(T, B, E))
    assert set(states) == shown
    assert torch.equal(torch.stack(states["h"]), output)
    if name == "lstm":
        torch.testing.assert_close(torch.stack(states["o"]) * torch.stack(states["C"]).tanh(), output)
    cell(torch.randn(T, B, E))
    assert len(states["h"]) == T  # nothing more once the watch is over
