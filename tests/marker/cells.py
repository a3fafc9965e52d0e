"""Finds out how a student's cell is built and called: every plausible size and call, until equations match."""

import copy
import dataclasses
import functools
import inspect
import itertools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from .equations import Late, match, same, weights_of
from .sandbox import attempt

T, B, E, H, V = 4, 3, 6, 7, 11  # all differ, and so do their sums; no pair (h, c) is a batch of two
MOST_CONSTRUCTIONS, MOST_STEPS = 100, 240
SEARCH_SECONDS = 30  # of CPU, for one class; a slow machine's
NOT_HANDED_ON = "forward makes the first step right and does not hand its state on (a loop of one_step does)"


class Sizes(NamedTuple):
    e: int = E
    h: int = H
    v: int = V


class Inputs(NamedTuple):
    """The same sentences as codes (T, B) and as embeddings (T, B, E), and the first state (B, H)."""

    codes: torch.Tensor
    x: torch.Tensor
    h: torch.Tensor
    c: torch.Tensor


@dataclass
class Recognised:
    """How a class is built and called, and what it computes."""

    kind: type
    construction: int = 0  # its number among `constructions(kind, …)`, whatever the sizes
    way: int = 0  # its number among `ways_to_call(cell)`
    reading: tuple[int, int] = (0, 0)  # where the states are in what it returns
    library: str = ""  # the cell of torch.nn inside, if it is one
    mistake: str = ""  # what is wrong with its equations
    e: int = E  # the size of its input where it runs

    @property
    def name(self) -> str:
        return "torch.nn." * self.kind.__module__.startswith("torch.nn") + self.kind.__name__

    @property
    def in_library(self) -> bool:
        return self.name.startswith("torch.nn.")

    def plain(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "kind"}

    def arguments(self, sizes: Sizes | None = None) -> dict:
        every = constructions(self.kind, sizes or Sizes(e=self.e))
        return next(itertools.islice(every, self.construction, None))

    def build(self, sizes: Sizes | None = None):
        """A cell with random weights."""
        return randomized(self.kind(**self.arguments(sizes)))

    def states(self, cell, inputs: Inputs) -> torch.Tensor:
        """The states after each symbol, (T, B, H)."""
        way = next(itertools.islice(ways_to_call(cell), self.way, None))
        return dict(readings(call(way, cell, inputs), inputs, cell))[tuple(self.reading)]


class Way(NamedTuple):
    """One way to call a cell: (cell, Inputs) → what it returns."""

    call: Callable
    takes_state: bool
    method: str = "sequence"  # or "forward" for a loop over it, given x (B, E); or "step" for other loops


def options_for(name: str, parameter: inspect.Parameter, sizes: Sizes) -> list:
    """Values to try for one constructor parameter, the likeliest first."""
    e, h, v = sizes
    name = name.lower()
    hints = [
        (r"device", ["cpu"]), (r"batch_first", [False]), (r"batch|^bs$", [B]), (r"layers", [1]), (r"drop", [0.0]),
        (r"activ|func|nonlin", [torch.tanh]), (r"bias", [True]), (r"maxlen|len$|length|^seq", [T]),
        (r"hid|latent|state|dim_?h|^d?h|units|rnn_size|mem|nh$|_h$", [h, e, v]),
        (r"vocab|num_emb|tok|dict|char|symb|class|voc|n_?letter", [v, e, h]),
        (r"^(out|o)|_out|output|dim_?o|dimout|n_?out|_o$|^y|sortie|target", [v, h, e]),
        (r"emb", [e, v, h, nn.Embedding(v, e)]), (r"in|feat|dim|^d$|x", [e, v, h]),
    ]  # fmt: skip
    found = next((values for pattern, values in hints if re.search(pattern, name)), [e, h, v])
    if parameter.default is inspect.Parameter.empty:
        return found
    sized = isinstance(parameter.default, int) and not isinstance(parameter.default, bool) and found[0] in (e, h, v)
    return [found[0], parameter.default] if sized else [parameter.default]


def constructions(kind: type, sizes: Sizes):
    """Keyword arguments that may build a cell with its sizes, the likeliest first."""
    parameters = {n: p for n, p in inspect.signature(kind).parameters.items() if "VAR" not in p.kind.name}
    if not parameters:  # torch.nn's cells say (*args, **kwargs)
        yield {"input_size": sizes.e, "hidden_size": sizes.h}
    choices = [options_for(name, parameter, sizes) for name, parameter in parameters.items()]
    for values in itertools.islice(itertools.product(*choices), MOST_CONSTRUCTIONS):
        yield dict(zip(parameters, values, strict=True))


def randomized(cell):
    """The cell with random weights (zeros would hide mistakes), for evaluation, in float32."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in weights_of(cell).values():
            if weight.is_floating_point():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.6)
    return cell.float().eval()


def call(way: Way, cell, inputs: Inputs):
    """What a cell returns, after its `init_hidden`, `reset_state` and the like, where its state is an attribute."""
    for name in dir(type(cell)):
        if re.match(r"(init|reset)_?(hid|state|h0|cell|mem)", name, re.IGNORECASE):
            method = getattr(cell, name)
            method(len(inputs.h)) if takes(method, None) else method()
    return way.call(cell, inputs)


def embeddings_of(cell) -> list[nn.Embedding]:
    return [module for module in cell.modules() if isinstance(module, nn.Embedding)]


def example(cell, sizes: Sizes, state: float = 0.0) -> Inputs:
    """Random sentences for a cell, embedded by its own embedding if it has one; a first state of that size."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2, sizes.v, (T, B), generator=generator)
    x = torch.randn(T, B, sizes.e, generator=generator)
    for emb in embeddings_of(cell):
        if emb.embedding_dim == sizes.e and emb.num_embeddings >= sizes.v:
            x = emb.weight.detach()[codes]
    h, c = (torch.randn(2, B, sizes.h, generator=generator) * state).unbind()
    return Inputs(codes, x, h, c)


# Ways to pass a state (B, H), and what else may be said of the first one.
STATES = [
    lambda h, c: (h,), lambda h, c: (h, c), lambda h, c: (c, h), lambda h, c: ((h, c),), lambda h, c: ((c, h),),
    lambda h, c: ((h,),),
]  # fmt: skip
FIRST_STATES = [
    lambda h, c: (), *STATES, lambda h, c: (h[None],), lambda h, c: (h[None], c[None]),
    lambda h, c: ((h[None], c[None]),), lambda h, c: (None,), lambda h, c: (None, None),
]  # fmt: skip
ZERO = torch.zeros(1)


def takes(function, *arguments) -> bool:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    return True


def ordered(function, x, states: tuple) -> tuple:
    """Arguments with the state first, if the first parameter is named like one."""
    first = next(iter(inspect.signature(function).parameters), "x")
    return (*states, x) if re.match(r"h|c$|state|hidden|prev", first.lower()) else (x, *states)


def whole_sequences(cell):
    """Ways to give a cell whole sentences at once, embedded or as codes, time first or batch first."""
    embedded, codes = [lambda i: i.x, lambda i: i.x.transpose(0, 1)], [lambda i: i.codes, lambda i: i.codes.T]
    for x, s in itertools.product(codes * bool(embeddings_of(cell)) + embedded, FIRST_STATES):
        states = s(ZERO, ZERO)
        if takes(cell.forward, None, *states):
            given = any(state is not None for state in states)
            yield Way(lambda cell, i, x=x, s=s: cell(*ordered(cell.forward, x(i).clone(), s(i.h, i.c))), given)


def single_steps(cell):
    """Ways to call a method that makes one step, `forward` or `one_step` and its like, in a loop over time."""
    inputs = [lambda i, t: i.x[t], lambda i, t: i.x[t][None], lambda i, t: i.x[t][:, None]]
    if embeddings_of(cell):
        inputs = [lambda i, t: i.codes[t], lambda i, t: i.codes[t][:, None], lambda i, t: i.codes[t][None], *inputs]
    names = [n for n in dir(type(cell)) if re.search(r"one_?step|^step|^cell$", n, re.IGNORECASE)]
    for method, x, s, returned in itertools.product(["forward", *names], inputs, STATES, range(3)):
        if takes(getattr(cell, method), None, *s(ZERO, ZERO)):
            plain = method == "forward" and x in (inputs[0], inputs[-3])
            loop = functools.partial(step_by_step, method, x, s, returned)
            yield Way(loop, True, "forward" if plain else "step")


def step_by_step(method: str, x_form, s_form, returned: int, cell, i: Inputs):
    """The states (T, B, H) from a loop over one step, which returns 0: h or (h, c); 1: (output, state); 2: (c, h)."""
    step, h, c, seen = getattr(cell, method), i.h, i.c, []
    for t in range(len(i.codes)):
        result = step(*ordered(step, x_form(i, t), s_form(h, c)))
        if returned == 1:
            result = result[1]
        if isinstance(result, (tuple, list)):
            h, *rest = result[::-1] if returned == 2 else result
            c = rest[0] if rest else c
        elif returned == 2:
            raise TypeError("one tensor")
        else:
            h = result
        h, c = h.reshape(i.h.shape), c.reshape(i.c.shape)
        seen.append(h)
    return torch.stack(seen)


def ways_to_call(cell):
    return itertools.chain(whole_sequences(cell), itertools.islice(single_steps(cell), MOST_STEPS))


def tensors_in(result) -> list[torch.Tensor]:
    """All tensors of a nested result; first, where there is one a step, or one (h, c) a step, these stacked."""
    if isinstance(result, torch.Tensor):
        return [result]
    if not isinstance(result, (tuple, list)):
        return []
    found = [tensor for part in result for tensor in tensors_in(part)]
    heads = [part[0] if isinstance(part, (tuple, list)) and part else part for part in result]
    if len(heads) > 1 and all(isinstance(p, torch.Tensor) for p in heads) and len({p.shape for p in heads}) == 1:
        found.insert(0, torch.stack(heads))
    return found


def arranged(tensor: torch.Tensor, inputs: Inputs, h: int) -> torch.Tensor | None:
    """A tensor as states (T, B, H), whatever its order and if it begins with h₀; None if it is something else."""
    t, b = inputs.codes.shape
    if tensor.dim() == 4 and 1 in tensor.shape[:3]:
        tensor = tensor.squeeze(list(tensor.shape[:3]).index(1))
    if tensor.shape == (t * b, h):
        tensor = tensor.reshape(t, b, h)
    if tensor.dim() != 3 or tensor.shape[-1] != h:
        return None
    if tensor.shape[0] == b and tensor.shape[1] in (t, t + 1):
        tensor = tensor.transpose(0, 1)
    if tensor.shape[:2] == (t + 1, b):
        tensor = tensor[1:]
    return tensor.detach() if tensor.shape[:2] == (t, b) else None


@torch.no_grad()
def undecoded(tensor: torch.Tensor, inputs: Inputs, cell) -> torch.Tensor | None:
    """States (T, B, H) from logits or log-probabilities (T, B, V), by the pseudo-inverse of the cell's decoder."""
    h = inputs.h.shape[-1]
    layers = [m for m in cell.modules() if isinstance(m, nn.Linear) and m.in_features == h and m.out_features > h]
    if not layers:
        return None
    weight, bias = layers[0].weight.double(), layers[0].bias
    logits = arranged(tensor, inputs, len(weight))
    if logits is None or len(weight) % h == 0:
        return None
    logits = logits.double() - (0 if bias is None else bias)
    columns = torch.cat([weight, torch.ones_like(weight[:, :1])], 1)  # a shift is free
    solution = logits @ torch.linalg.pinv(columns).T
    exact = torch.allclose(solution @ columns.T, logits, atol=1e-3)
    return solution[..., :h].float() if exact else None


def readings(result, inputs: Inputs, cell):
    """(reading, states): every way to see states (T, B, H) in what a cell returned, as they are or in its logits."""
    for k, tensor in enumerate(tensors_in(result)):
        for kind, states in enumerate((arranged(tensor, inputs, inputs.h.shape[-1]), undecoded(tensor, inputs, cell))):
            if states is not None and states.isfinite().all():
                yield (k, kind), states


@dataclass
class Search:
    """What the search for a cell's interface found, and what it met on the way."""

    found: Recognised | None = None
    errors: list[BaseException] = field(default_factory=list)
    compared: bool = False  # states were compared with equations
    late: bool = False  # it was given up


def results(cell, inputs: Inputs, search: Search):
    """(number, way, reading, states) of every way that gives something like states."""
    for number, way in enumerate(ways_to_call(cell)):
        fresh = copy.deepcopy(cell)  # a call may leave its state there
        result, error = attempt(call, way, fresh, inputs)
        if error is not None:
            search.errors.append(error)
            continue
        for reading, states in readings(result, inputs, cell):
            yield number, way, reading, states


def recognise(kind: type, which: str, sizes: Sizes) -> Search:
    """How a class is built and called, if what it computes matches equations; a right match wins over a wrong one."""
    search, deadline = Search(), time.process_time() + SEARCH_SECONDS
    for construction, arguments in enumerate(constructions(kind, sizes)):
        cell, error = attempt(lambda arguments=arguments: randomized(kind(**arguments)))
        if error is not None:
            search.errors.append(error)
            continue
        try:
            search_calls(Recognised(kind, construction, e=sizes.e), which, cell, example(cell, sizes), search, deadline)
        except Late:  # what was found so far may be a wrong guess
            search.found, search.late = None, True
        if search.found or search.late:
            break
    return search


def search_calls(built: Recognised, which: str, cell, inputs: Inputs, search: Search, deadline: float) -> None:
    """Find the call whose states match equations."""
    tried, sequences = set(), []
    for number, way, reading, states in results(cell, inputs, search):
        if time.process_time() > deadline:
            raise Late
        if way.method == "sequence":
            sequences.append(states)
        key = (states * 1000).round().to(torch.int64).numpy().tobytes()
        matched = None if key in tried else match(which, cell, inputs, states, deadline)
        tried.add(key)
        search.compared = True
        if not matched:
            continue
        found = dataclasses.replace(built, way=number, reading=reading, library=matched[0], mistake=matched[1])
        if found.mistake:
            search.found = search.found or found
        elif way.method != "step":
            search.found = found
            return
        else:  # one step is right; is the loop over it?
            if any(same(states[0], s[0]) and not same(states, s) for s in sequences):
                found.mistake = NOT_HANDED_ON
            search.found = search.found or found
            return
