"""Finds out how a student's cell is built and called, and which equations it computes.

Nothing is assumed of its interface: every plausible assignment of sizes to the constructor's
parameters is tried, then every plausible call; what comes out is compared with the equations over all
assignments of the layers found to their roles. Only what matches an equation, a right one or a
wrong one, is judged.
"""

import contextlib
import copy
import inspect
import itertools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .sandbox import time_limit

T, B, E, H, V = 4, 3, 6, 7, 11  # all differ, and so do their sums; no pair (h, c) is a batch of two
MOST_CONSTRUCTIONS, MOST_CALLS = 100, 60
SEARCH_SECONDS = 4  # of CPU, for one class


@dataclass
class Sizes:
    """How many of what a cell is built for."""

    e: int = E
    h: int = H
    v: int = V


@dataclass
class Inputs:
    """The same sentences as codes (T, B) and as embeddings (T, B, E), and the first state (B, H)."""

    codes: torch.Tensor
    x: torch.Tensor
    h: torch.Tensor
    c: torch.Tensor


@dataclass
class Recognised:
    """A cell whose calls are understood.

    construction  its number among `constructions(kind, …)`, whatever the sizes
    call       (cell, Inputs) → what the cell returns
    reading    (result, T, B, H) → states (T, B, H)
    mistake    what is wrong with its equations; "" if nothing
    """

    kind: type
    construction: int
    build: Callable
    call: Callable
    reading: Callable
    equations: str
    mistake: str = ""
    takes_state: bool = False

    def states(self, cell, inputs: Inputs) -> torch.Tensor:
        """The states after each symbol, (T, B, H)."""
        t, b = inputs.codes.shape
        prepare(cell, b)
        return self.reading(self.call(cell, inputs), t, b, inputs.h.shape[-1], cell)


# ------------------------------------------------------------------------------------- constructors


def options_for(name: str, parameter: inspect.Parameter, sizes: Sizes) -> list:
    """Values to try for one constructor parameter, the likeliest first."""
    e, h, v = sizes.e, sizes.h, sizes.v
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
    """Functions that build a cell with its sizes, the likeliest assignment first."""
    try:
        parameters = inspect.signature(kind).parameters.items()
    except (TypeError, ValueError):
        return
    parameters = [(n, p) for n, p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not parameters:  # torch.nn's cells say (*args, **kwargs)
        yield lambda: randomized(kind(sizes.e, sizes.h))
    choices = [options_for(name, parameter, sizes) for name, parameter in parameters]
    for values in itertools.islice(itertools.product(*choices), MOST_CONSTRUCTIONS):
        keywords = {
            name: value for (name, p), value in zip(parameters, values, strict=True) if p.kind != p.POSITIONAL_ONLY
        }
        yield lambda keywords=keywords: randomized(kind(**keywords))


def weights_of(cell) -> dict[str, torch.Tensor]:
    """All weights by name: parameters, and tensors that are plain attributes."""
    found = dict(cell.named_parameters())
    for name, module in cell.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.requires_grad and value.dim() in (1, 2):
                found.setdefault(f"{name}.{attribute}".strip("."), value)
    return found


def randomized(cell):
    """The cell with random weights (zeros would hide mistakes), for evaluation, in float32."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in weights_of(cell).values():
            if weight.is_floating_point():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.6)
    return cell.float().eval()


# ---------------------------------------------------------------------------------------------- calls


def prepare(cell, batch: int) -> None:
    """Call a cell's own `init_hidden` or `reset_state`, where its state is an attribute."""
    for name in dir(type(cell)):
        if re.search(r"^(init|reset)_?(hid|state|h0|cell|mem)", name, re.IGNORECASE):
            for arguments in ((), (batch,)):
                with contextlib.suppress(Exception):
                    getattr(cell, name)(*arguments)


def embeddings_of(cell) -> list[nn.Embedding]:
    """The embeddings that a cell holds."""
    return [module for module in cell.modules() if isinstance(module, nn.Embedding)]


def example(cell, sizes: Sizes, seed: int = 0, t: int = T, b: int = B, state: float = 0.0) -> Inputs:
    """Random sentences for a cell, embedded by its own embedding if it has one."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2, sizes.v, (t, b), generator=generator)
    inner = next(
        (emb for emb in embeddings_of(cell) if emb.embedding_dim == sizes.e and emb.num_embeddings >= sizes.v), None
    )
    x = inner.weight.detach()[codes] if inner is not None else torch.randn(t, b, sizes.e, generator=generator)
    h, c = (torch.randn(2, b, sizes.h, generator=generator) * state).unbind()
    return Inputs(codes, x, h, c)


def state_forms(one: bool) -> list[Callable]:
    """Ways to pass the first state; `one`: (B, H), else (1, B, H) too."""
    forms = [
        lambda i: (i.h,), lambda i: (i.h, i.c), lambda i: (i.c, i.h), lambda i: ((i.h, i.c),), lambda i: ((i.c, i.h),),
    ]  # fmt: skip
    if one:
        return forms
    layers = [lambda i: (i.h[None],), lambda i: (i.h[None], i.c[None]), lambda i: ((i.h[None], i.c[None]),)]
    return [lambda i: (), *forms, *layers, lambda i: (None,), lambda i: (None, None)]


def input_forms(cell) -> list[Callable]:
    """Ways to pass the sentences: embedded or as codes, time first or batch first."""
    embedded = [lambda i: i.x, lambda i: i.x.transpose(0, 1)]
    codes = [lambda i: i.codes, lambda i: i.codes.T]
    return [*codes, *embedded] if embeddings_of(cell) else embedded


def binds(function, arguments: tuple) -> bool:
    """True if a function takes that many arguments."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def sequence_calls(cell):
    """(call, takes_state, "sequence"): ways to give a cell whole sentences at once."""
    for x_form in input_forms(cell):
        for s_form in state_forms(one=False):

            def call(cell, i, x_form=x_form, s_form=s_form):
                return cell(x_form(i).clone(), *s_form(i))

            def swapped(cell, i, x_form=x_form, s_form=s_form):
                return cell(*s_form(i), x_form(i).clone())

            dummy = Inputs(*[torch.zeros(1, 1)] * 4)
            states = s_form(dummy)
            if binds(cell.forward, (None, *states)):
                given = bool(states) and not all(s is None for s in states)
                yield call, given, "sequence"
                first = next(iter(inspect.signature(cell.forward).parameters), "x").lower()
                if given and re.match(r"h|c|state|hidden", first):
                    yield swapped, given, "sequence"


def method_names(cell) -> list[str]:
    """The methods that may be one step: `one_step` and its like, else `forward`."""
    alike = [n for n in dir(type(cell)) if re.search(r"one_?step|^step|onestep|oneStep|^cell$", n) and n != "zero_grad"]
    return [*alike, "forward"]


def step_calls(cell):
    """(call, takes_state, method): loops over time around a method that makes one step."""
    inputs = [lambda i, t: i.x[t], lambda i, t: i.x[t][None], lambda i, t: i.x[t][:, None]]
    if embeddings_of(cell):
        inputs = [lambda i, t: i.codes[t], lambda i, t: i.codes[t][:, None], lambda i, t: i.codes[t][None], *inputs]
    for method, x_form, s_form in itertools.product(method_names(cell), inputs, state_forms(one=True)):
        function = getattr(cell, method, None)
        dummy = s_form(Inputs(*[torch.zeros(1, 1)] * 4))
        if not callable(function) or not binds(function, (None, *dummy)):
            continue
        first = next(iter(inspect.signature(function).parameters), "x").lower()
        orders = (True, False) if re.match(r"h|c$|state|hidden|prev", first) else (False,)
        for state_first, returned in itertools.product(orders, range(4)):

            def call(cell, i, method=method, x_form=x_form, s_form=s_form, state_first=state_first, returned=returned):
                return step_by_step(getattr(cell, method), i, x_form, s_form, state_first, returned)

            yield call, True, method


def step_by_step(step, i: Inputs, x_form, s_form, state_first: bool, returned: int):
    """The states (T, B, H) from a loop over one step.

    returned  0: what comes back is the state, or (h, c); 1: (output, state); 2: (c, h), whose second is
              h; 3: the state is kept in the cell, which gets its h back only
    """
    h, c, seen = i.h, i.c, []
    for t in range(len(i.codes)):
        now = Inputs(i.codes, i.x, h, c)
        arguments = (*s_form(now), x_form(i, t)) if state_first else (x_form(i, t), *s_form(now))
        result = step(*arguments)
        if isinstance(result, (tuple, list)) and len(result) == 1:
            result = result[0]
        if returned == 1:
            result = result[1]
        if isinstance(result, (tuple, list)):
            h, c = (result[1], result[0]) if returned == 2 else (result[0], result[1])
        elif returned == 2:
            raise TypeError("one tensor")
        else:
            h = result
        h, c = h.reshape(i.h.shape), c.reshape(i.c.shape)
        seen.append(h)
    return torch.stack(seen)


# ----------------------------------------------------------------------------------------- readings


def tensors_in(result) -> list[torch.Tensor]:
    """All tensors of a nested result; a list of one tensor a step is stacked."""
    if isinstance(result, torch.Tensor):
        return [result]
    if not isinstance(result, (tuple, list)):
        return []
    parts = list(result)
    found = [tensor for part in parts for tensor in tensors_in(part)]
    if len(parts) > 1 and all(isinstance(p, torch.Tensor) for p in parts) and len({p.shape for p in parts}) == 1:
        found.insert(0, torch.stack(parts))
    elif len(parts) > 1 and all(isinstance(p, (tuple, list)) and p for p in parts):  # a list of (h, c)
        heads = [p[0] for p in parts]
        if all(isinstance(p, torch.Tensor) for p in heads) and len({p.shape for p in heads}) == 1:
            found.insert(0, torch.stack(heads))
    return found


def arranged(tensor: torch.Tensor, t: int, b: int, h: int) -> torch.Tensor | None:
    """A tensor as states (T, B, H), whatever its order and if it begins with h₀; None if it is something else."""
    if tensor.dim() == 4 and 1 in tensor.shape[:3]:
        tensor = tensor.squeeze(list(tensor.shape[:3]).index(1))
    if tensor.dim() == 2 and tensor.shape == (t * b, h):
        tensor = tensor.reshape(t, b, h)
    if tensor.dim() != 3 or tensor.shape[-1] != h:
        return None
    if tensor.shape[0] == b and tensor.shape[1] in (t, t + 1):
        tensor = tensor.transpose(0, 1)
    if tensor.shape[:2] == (t + 1, b):
        tensor = tensor[1:]
    return tensor.detach() if tensor.shape[:2] == (t, b) else None


def decoder_weights(cell, h: int):
    """(weight (V, H), bias or None) of a linear layer from states to more symbols than states, or None."""
    for module in cell.modules():
        if isinstance(module, nn.Linear) and module.in_features == h and module.out_features > h:
            return module.weight.detach(), None if module.bias is None else module.bias.detach()
    return None


def undecoded(tensor: torch.Tensor, cell, t: int, b: int, h: int) -> torch.Tensor | None:
    """States (T, B, H) from logits or log-probabilities (T, B, V), by the decoder's pseudo-inverse."""
    decoder = decoder_weights(cell, h)
    if decoder is None:
        return None
    weight, bias = decoder
    logits = arranged(tensor, t, b, len(weight))
    if logits is None or len(weight) % h == 0:
        return None
    logits = (logits if bias is None else logits - bias).double()
    columns = torch.cat([weight.double(), torch.ones(len(weight), 1, dtype=torch.float64)], 1)  # a shift is free
    solution = logits @ torch.linalg.pinv(columns).T
    exact = torch.allclose(solution @ columns.T, logits, atol=1e-3)
    return solution[..., :h].float() if exact else None


def readings(result, t: int, b: int, h: int, cell):
    """(index, states): every way to see states (T, B, H) in what a cell returned."""
    for k, tensor in enumerate(tensors_in(result)):
        for kind, states in enumerate((arranged(tensor, t, b, h), undecoded(tensor, cell, t, b, h))):
            if states is not None and states.isfinite().all():
                yield (k, kind), states


def reader(index) -> Callable:
    """The reading with that index, as a function."""

    def read(result, t, b, h, cell):
        tensor = tensors_in(result)[index[0]]
        return undecoded(tensor, cell, t, b, h) if index[1] else arranged(tensor, t, b, h)

    return read


def sentence_calls(cell):
    """(call, takes_state, "sequence"): ways to give a cell one sentence (T, E) after another."""
    for s_form in (lambda h, c: (), lambda h, c: (h[None],), lambda h, c: (h[None], c[None])):

        def call(cell, i, s_form=s_form):
            columns = []
            for b in range(i.x.shape[1]):
                result = tensors_in(cell(i.x[:, b].clone(), *s_form(i.h[b], i.c[b])))[0]
                columns.append(result.reshape(-1, i.h.shape[-1])[-len(i.x) :])
            return torch.stack(columns, 1)

        if binds(cell.forward, (None, *s_form(torch.zeros(1), torch.zeros(1)))):
            yield call, bool(s_form(torch.zeros(1), torch.zeros(1))), "sequence"


def attempts(cell):
    """All ways to call a cell, the simplest first."""
    yield from itertools.islice(sequence_calls(cell), MOST_CALLS)
    yield from itertools.islice(step_calls(cell), 2 * MOST_CALLS)
    yield from sentence_calls(cell)


class Errors(list):
    """What was raised on the way, and how many states were compared with equations."""

    compared = 0


def recognise(kind: type, match: Callable, sizes: Sizes, errors: Errors) -> Recognised | None:
    """How a class is built and called, if what it computes matches equations; a right match wins over a wrong one.

    match   (cell, Inputs, states) → (equations, mistake) or None
    errors  collects what was raised
    """
    wrong, deadline = None, time.process_time() + SEARCH_SECONDS
    for construction, build in enumerate(constructions(kind, sizes)):
        try:
            with time_limit():
                cell = build()
        except BaseException as error:
            errors.append(error)
            continue
        inputs = example(cell, sizes)
        tried = set()
        for call, takes_state, method in attempts(cell):
            if time.process_time() > deadline:
                return wrong
            try:
                with time_limit(), torch.no_grad():
                    fresh = copy.deepcopy(cell)
                    prepare(fresh, B)
                    result = call(fresh, inputs)
            except BaseException as error:
                errors.append(error)
                continue
            for index, states in readings(result, T, B, sizes.h, cell):
                errors.compared += 1
                key = (states * 1000).round().to(torch.int64).numpy().tobytes()
                found = None if key in tried else match(cell, inputs, states)
                tried.add(key)
                if found:
                    recognised = Recognised(kind, construction, build, call, reader(index), *found, takes_state)
                    if not recognised.mistake:  # one_step may be right where forward is wrong
                        return recognised if wrong is None or method in ("sequence", "forward") else wrong
                    wrong = wrong or recognised
        if wrong:
            return wrong
    return wrong
