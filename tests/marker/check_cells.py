"""Questions 4 and 5: RNN, LSTM and GRU."""

import copy
import dataclasses
import re

import torch
from torch import nn

from . import equations
from .cells import B, Errors, H, Recognised, Sizes, example, readings, recognise, sequence_calls, weights_of
from .loader import Solution, empty, in_source
from .report import CANNOT_RUN, MISSING, NOT_JUDGED, RIGHT, Verdict, wrong
from .sandbox import TookTooLong, time_limit

MATCHERS = {"rnn": equations.match_rnn, "gru": equations.match_gru, "lstm": equations.match_lstm}


def matcher(which: str):
    """(cell, inputs, states) → (equations, mistake) or None, for a kind of cell."""

    def match(cell, inputs, states):
        library = equations.library_cell(cell, inputs.x, states)
        if library:
            return library, ""
        for maps in equations.all_maps(cell, weights_of(cell), inputs.x.shape[-1], inputs.h.shape[-1]):
            if which == "lstm":
                found = equations.match_lstm(maps, inputs.x, inputs.h, inputs.c, states)
            else:
                found = MATCHERS[which](maps, inputs.x, inputs.h, states)
            if found:  # the plainest allotment of the weights that explains the states
                return found
        return None

    return match


def understand(kind: type, which: str, errors: Errors) -> Recognised | None:
    """How a class is called and what it computes; E = H only if nothing runs otherwise."""
    found = recognise(kind, matcher(which), Sizes(), errors)
    if found is None or found.mistake:
        square = recognise(kind, matcher(which), Sizes(e=H), Errors()) if found is None else None
        found = found or square
        if square:
            found.sizes = Sizes(e=H)
    return found


def given_state(found: Recognised, which: str, sizes: Sizes) -> str:
    """The mistake that a first state given to the cell changes nothing."""
    cell = found.build()
    inputs = example(cell, sizes, state=1.0)
    zeros = dataclasses.replace(inputs, h=inputs.h * 0, c=inputs.c * 0)
    ignored = False
    for call, takes_state, _ in sequence_calls(cell):
        if not takes_state:
            continue
        try:
            with time_limit(), torch.no_grad():
                with_state = [
                    s for _, s in readings(call(copy.deepcopy(cell), inputs), *inputs.codes.shape, sizes.h, cell)
                ]
                without = [s for _, s in readings(call(copy.deepcopy(cell), zeros), *inputs.codes.shape, sizes.h, cell)]
        except BaseException:
            continue
        reference = found.states(copy.deepcopy(cell), zeros)
        for a, b in zip(with_state, without, strict=False):
            if equations.same(b, reference):
                if not equations.same(a, b):
                    return ""
                ignored = True
    return "the given first state is forgotten" if ignored else ""


def leaks(found: Recognised, sizes: Sizes) -> bool:
    """True if a second call with the same sentences gives other states."""
    cell = found.build()
    inputs = example(cell, sizes)
    with torch.no_grad():
        first = found.states(cell, inputs).clone()
        return not equations.same(first, found.states(cell, inputs))


def decode_mistake(cell, sizes: Sizes, solution: Solution) -> str:
    """A decoder whose largest probability cannot reach 1: tanh, sigmoid or softmax on its logits."""
    decode = next((getattr(cell, n) for n in ("decode", "decoder") if callable(getattr(cell, n, None))), None)
    if decode is None:
        return ""
    sharp = copy.deepcopy(cell)
    with torch.no_grad():
        for weight in weights_of(sharp).values():
            weight *= 200
    name = "decode" if hasattr(cell, "decode") else "decoder"
    for shape in ((B, sizes.h), (1, B, sizes.h), (4, B, sizes.h)):
        h = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        try:
            with time_limit(), torch.no_grad():
                logits = getattr(sharp, name)(h)
        except BaseException:
            continue
        if not isinstance(logits, torch.Tensor) or not logits.is_floating_point() or logits.shape[-1] != sizes.v:
            continue
        if not logits.isfinite().all() or logits.softmax(-1).amax(-1).min() > 0.99:
            return ""
        if logits.min() >= 0 and torch.allclose(logits.sum(-1), torch.ones(()), atol=1e-3):
            takes_log = any(
                re.search(r"\bnll_loss|NLLLoss|\.log\(|torch\.log\b|log_prob", s.text) for s in solution.sources
            )
            return "" if takes_log else "decode applies softmax, and the loss applies it again"
        bounded = "tanh or sigmoid" if logits.abs().max() <= 1.001 else "some function"
        if logits.abs().max() > 1.001:
            return ""
        return f"decode applies {bounded} to the logits: no probability can reach 1"
    return ""


def source_mistake(solution: Solution, which: str) -> str:
    """What the source shows of a cell that cannot run: x and h put one above the other."""
    definition = solution.definition(which)
    text = "" if definition is None else "\n".join(
        definition[0].text.split("\n")[definition[1].lineno - 1 : definition[1].end_lineno])  # fmt: skip
    if re.search(r"torch\.(cat|concat)\(\s*[\[(][^\])]*[\])]\s*(,\s*(dim|axis)?\s*=?\s*0\s*)?\)", text):
        return "x and h are concatenated along the batch (dim 0)"
    if re.search(r"\*\s*self\.\w+\.weight|self\.\w+\.weight\s*\*", text):
        return "a matrix is multiplied element by element"
    return ""


def why_not(solution: Solution, which: str, errors: Errors) -> Verdict:
    """The verdict on a class that never gave something to match: cannot run, or not judged."""
    own = [error for error in errors if own_fault(solution, error)]
    if own:
        first = own[0]
        if isinstance(first, NameError) and getattr(first, "name", None) in solution.skipped:
            where = solution.skipped[first.name]
            return Verdict(NOT_JUDGED, f"it needs `{first.name}`, which {where} sets and the marker did not run")
        return Verdict(CANNOT_RUN, solution.where(first))
    if errors and (mistake := source_mistake(solution, which)):
        return wrong(mistake, solution.where(errors[-1]))
    if errors.compared or not errors:
        return Verdict(NOT_JUDGED, "its states match no known equations")
    return Verdict(NOT_JUDGED, f"no call was understood; the first: {solution.where(errors[0])}")


def own_fault(solution: Solution, error: BaseException) -> bool:
    """True for an error that no caller could have prevented: an unknown name, attribute or signature inside."""
    if "(" not in solution.where(error):
        return False
    if isinstance(error, TypeError):
        return bool(
            re.search(r"__init__\(\) missing|takes \d+ positional|unexpected keyword", str(error))
        ) and in_source(solution, error)
    attribute = re.search(r"no attribute '(\w+)'", str(error))
    if attribute and any(re.search(rf"self\.{attribute[1]}\b[^=\n]*=[^=]", s.text) for s in solution.sources):
        return False  # another method sets it: perhaps one that the marker did not call
    return isinstance(error, (NameError, AttributeError, TookTooLong)) and in_source(solution, error)


def check_cell(solution: Solution, which: str) -> Verdict:
    """The verdict on a class."""
    if empty(solution, which):
        return Verdict(MISSING)
    definition, kind = solution.definition(which), solution.find(which)
    if not isinstance(kind, type):
        return Verdict(CANNOT_RUN, f"the class could not be defined ({definition[0].name}:{definition[1].lineno})")
    if not issubclass(kind, nn.Module):
        return Verdict(NOT_JUDGED, "it is no nn.Module")
    errors = Errors()
    found = understand(kind, which, errors)
    if found is None:
        return why_not(solution, which, errors)
    sizes = getattr(found, "sizes", Sizes())
    mistakes = [found.mistake]
    if not found.mistake:
        mistakes += [given_state(found, which, sizes)]
    if leaks(found, sizes):
        mistakes.append("its state leaks from one call into the next: the same sentences twice give other states")
    mistakes.append(decode_mistake(found.build(), sizes, solution))
    mistakes = [mistake for mistake in mistakes if mistake]
    if mistakes:
        return wrong("; ".join(mistakes), f"seen on {sizes.e} inputs, {sizes.h} states, 4 steps from zeros")
    return Verdict(RIGHT, "" if found.equations.lower().startswith((which, "h =")) else f"({found.equations} inside)")
