"""Questions 4 and 5: RNN, LSTM and GRU."""

import ast
import copy
import inspect
import re

import torch
from torch import nn

from .cells import SEARCH_SECONDS, B, H, Inputs, Recognised, Search, Sizes, example, readings, recognise
from .cells import whole_sequences
from .equations import same, weights_of
from .loader import Solution
from .report import NOT_JUDGED, RIGHT, Verdict, wrong
from .sandbox import attempt
from .source import outside_generators


def understand(kind: type, which: str) -> Search:
    """How a class is called and what it computes; E = H only if nothing is understood otherwise."""
    search = recognise(kind, which, Sizes())
    if search.found is None and not search.late:
        search.found = recognise(kind, which, Sizes(e=H)).found
    return search


def given_state(recognised: Recognised, sizes: Sizes) -> str:
    """The mistake that a first state given to the cell changes nothing."""
    cell = recognised.build()
    names = list(inspect.signature(cell.forward).parameters)
    if not any(re.match(r"[hc][_\d]?\w?\d?$|hid|stat|prev|init|mem|cell|last", name, re.IGNORECASE) for name in names):
        return ""  # what else it takes is no state
    inputs = example(cell, sizes, state=1.0)
    zeros = inputs._replace(h=inputs.h * 0, c=inputs.c * 0)
    reference, ignored = recognised.states(copy.deepcopy(cell), zeros), False

    def states(way, given: Inputs):
        return [states for _, states in readings(way.call(copy.deepcopy(cell), given), given, cell)]

    for way in [way for way in whole_sequences(cell) if way.takes_state]:
        (with_state, failed), (without, also) = (attempt(states, way, given) for given in (inputs, zeros))
        for a, b in zip(with_state, without, strict=False) if not (failed or also) else ():
            if same(b, reference):
                if not same(a, b):
                    return ""
                ignored = True
    return "the given first state is forgotten" if ignored else ""


def leaks(recognised: Recognised, sizes: Sizes) -> str:
    """The mistake that a second call with the same sentences gives other states."""
    cell = recognised.build()
    first, again = (recognised.states(cell, example(cell, sizes)).clone() for _ in range(2))
    leak = "its state leaks from one call into the next: the same sentences twice give other states"
    return "" if same(first, again) else leak


def own_decoder(cell):
    found = [(name, getattr(cell, name, None)) for name in ("decode", "decoder")]
    return next((pair for pair in found if callable(pair[1])), None)


def decode_mistake(cell, sizes: Sizes, solution: Solution) -> str:
    """A decoder whose largest probability cannot reach 1: tanh, sigmoid or softmax on its logits."""
    sharp = copy.deepcopy(cell)
    if own_decoder(sharp) is None:
        return ""
    name, decode = own_decoder(sharp)
    parts = [part for source in solution.sources for part in outside_generators(source.tree)]
    if not any(isinstance(part, ast.Attribute) and part.attr == name for part in parts):
        return ""  # nobody trains with it
    with torch.no_grad():
        for weight in weights_of(sharp).values():
            weight *= 200
    logits, error = attempt(decode, torch.randn(B, sizes.h, generator=torch.Generator().manual_seed(0)))
    if error is not None or not isinstance(logits, torch.Tensor) or logits.shape != (B, sizes.v):
        return ""
    if not logits.isfinite().all() or logits.softmax(-1).amax(-1).min() > 0.99 or logits.abs().max() > 1.001:
        return ""
    if logits.min() >= 0 and torch.allclose(logits.sum(-1), torch.ones(()), atol=1e-3):
        takes_log = re.compile(r"\bnll_loss|NLLLoss|\.log\(|torch\.log\b|log_prob")
        logs = any(takes_log.search(source.text) for source in solution.sources)
        return "" if logs else f"{name} applies softmax, and the loss applies it again"
    return f"{name} applies tanh or sigmoid to the logits: no probability can reach 1"


# What the source shows of a cell that cannot run.
IN_SOURCE = {
    r"torch\.(cat|concat)\(\s*[\[(][^\])]*[\])]\s*(,\s*(dim|axis)?\s*=?\s*0\s*)?\)":
        "x and h are concatenated along the batch (dim 0)",
    r"\*\s*self\.\w+\.weight|self\.\w+\.weight\s*\*": "a matrix is multiplied element by element",
}  # fmt: skip


def why_not(solution: Solution, which: str, search: Search) -> Verdict:
    """The verdict on a class that never gave something to match: cannot run, or not judged."""
    if search.late:
        return Verdict(NOT_JUDGED, f"its equations were not found in {SEARCH_SECONDS} seconds")
    if search.compared or not search.errors:
        return Verdict(NOT_JUDGED, "its states match no known equations")
    text, verdict = solution.text(which), solution.failure(search.errors)
    mistake = next((words for pattern, words in IN_SOURCE.items() if re.search(pattern, text)), "")
    if mistake and verdict.status == NOT_JUDGED and not any(map(solution.waits_for, search.errors)):
        return wrong(f"{mistake}: {solution.where(search.errors[-1])}")
    return verdict


def check_cell(solution: Solution, which: str) -> Verdict:
    kind = solution.find(which)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        return Verdict(NOT_JUDGED, "there is no nn.Module of that name, or the class could not be defined")
    search = understand(kind, which)
    if search.found is None:
        return why_not(solution, which, search)
    found, sizes = search.found, Sizes(e=search.found.e)
    mistakes = [found.mistake or given_state(found, sizes), leaks(found, sizes)]
    mistakes = list(filter(None, [*mistakes, decode_mistake(found.build(), sizes, solution)]))
    found.mistake = "; ".join(mistakes)
    if mistakes:
        x = f"x = torch.randn(4, 3, {found.e})"
        given = ", ".join(f"{name}={value}" for name, value in found.arguments().items())
        verdict = wrong(*mistakes, f"seen with {found.name}({given}), {x} and states of zeros")
    else:
        verdict = Verdict(RIGHT, f"({found.library} inside)" if found.library else "")
    verdict.cell = found.plain()
    return verdict
