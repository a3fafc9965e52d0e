"""What the checks of generate and generate_beam share: cells to try, arguments by name, results in any form."""

import copy
import inspect
import re
import string
from dataclasses import dataclass

import torch
from torch import nn

from .cells import Errors, Recognised, reader
from .check_cells import understand
from .loader import Solution, in_source
from .report import CANNOT_RUN, MISSING, NOT_JUDGED, Verdict
from .rigging import HIDDEN, Rigged
from .sandbox import captured, time_limit

EOS_SIGN = "\x01"
CALL_SECONDS = 5


class Unclear(Exception):
    """The marker does not understand a function's parameters or its result."""


class Nothing(Unclear):
    """A function returns nothing and prints nothing."""


# ------------------------------------------------------------------------------------------- cells


def library_cells() -> list[tuple[str, Recognised]]:
    """torch.nn's cells, for generators that were written for those."""

    def call(cell, i):
        return cell(i.x)

    return [
        (f"torch.nn.{kind.__name__}", Recognised(kind, 0, None, call, reader((0, 0)), kind.__name__))
        for kind in (nn.RNN, nn.GRU, nn.LSTM)
    ]


def cells_of(solution: Solution) -> list[tuple[str, Recognised]]:
    """The student's cells that are understood, right or wrong, then torch.nn's."""
    found = []
    for which in ("rnn", "gru", "lstm"):
        kind = solution.find(which)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            recognised = understand(kind, which, Errors())
            if recognised is not None:
                found.append((kind.__name__, recognised))
    return found + library_cells()


# -------------------------------------------------------------------------------------------- symbols


@dataclass
class Symbols:
    """The folder's own codes."""

    pad: int
    eos: int
    id2lettre: dict

    @classmethod
    def of(cls, solution: Solution):
        tables = [vars(m).get("id2lettre") for m in solution.modules.values()]
        tables = [dict(enumerate(t)) if isinstance(t, list) else t for t in tables]
        table = next((t for t in tables if isinstance(t, dict) and len(t) > 50), None)
        if table is None:
            letters = string.ascii_letters + string.punctuation + string.digits + " "
            table = dict(enumerate(letters, start=2)) | {0: "<PAD>", 1: "<EOS>"}
        rare = next((code for code, letter in table.items() if letter == "|"), 1)  # where no EOS is named
        return cls(solution.value("PAD_IX", 0), solution.value("EOS_IX", rare), table)

    @property
    def count(self) -> int:
        return max(self.id2lettre) + 1

    def codes(self, text: str) -> tuple[int, ...]:
        back = {letter: code for code, letter in self.id2lettre.items()} | {EOS_SIGN: self.eos}
        return tuple(back[char] for char in text)

    def text(self, codes) -> str:
        shown = {**self.id2lettre, self.eos: EOS_SIGN, self.pad: ""}
        return "".join(str(shown.get(int(code), "?")) for code in codes)

    @property
    def leads(self) -> tuple:
        """What right solutions read before a prompt: nothing, EOS or BLANK."""
        return (), (self.eos,), (self.pad,)

    def tree(self, branches: dict[str, dict[str, float]]) -> dict:
        """A tree by codes; each prefix as it stands, after EOS and after BLANK."""
        wanted = {}
        for prefix, following in branches.items():
            for lead in self.leads:
                wanted[lead + self.codes(prefix)] = {self.codes(c)[0]: p for c, p in following.items()}
        return wanted


def text_of(result, symbols: Symbols) -> str | None:
    """A sentence in any form, as text with EOS_SIGN; None if it is none."""
    if hasattr(result, "text") and isinstance(result.text, str):
        return result.text + (EOS_SIGN if getattr(result, "ended", False) else "")
    if isinstance(result, str):
        eos, pad = symbols.id2lettre.get(symbols.eos, ""), symbols.id2lettre.get(symbols.pad, "")
        for sign, into in ((eos, EOS_SIGN), (pad, ""), ("<EOS>", EOS_SIGN), ("<PAD>", "")):
            result = result.replace(sign, into) if len(sign) > 0 else result
        return result.split("-->")[-1].strip(" \n") if "-->" in result else result
    if isinstance(result, torch.Tensor):
        return (
            symbols.text(result.reshape(-1).tolist()) if not result.is_floating_point() or result.numel() > 1 else None
        )
    if isinstance(result, (list, tuple)) and result:
        if all(isinstance(part, str) for part in result):
            return (
                text_of("".join(result), symbols) if all(len(p) <= 5 for p in result) else text_of(result[0], symbols)
            )
        if all(isinstance(p, int) or (isinstance(p, torch.Tensor) and p.numel() == 1) for p in result):
            return symbols.text([int(p) for p in result])
        return text_of(result[0], symbols)
    return None


def continuation(text: str, prompt: str) -> str:
    """A text without its prompt."""
    text = text.lstrip(EOS_SIGN)
    return text[len(prompt) :] if text.startswith(prompt) else text


# ---------------------------------------------------------------------------------------------- calls


def argument(name: str, parameter, values: dict):
    """The value for one parameter, by its name; `parameter.empty` if unknown."""
    patterns = [
        (r"^(rnn|model|net|cell|lstm|gru|reseau|modele)", "rnn"), (r"soft", "softmax"), (r"device", "device"),
        (r"lstm|^c$|has_c|is_c", "lstm"), (r"nuc", "nucleus"), (r"^alpha|^p$|top_?p", "alpha"),
        (r"emb|^enc", "emb"), (r"dec|^lin|^out", "decoder"), (r"eos|^end", "eos"),
        (r"^k$|beam|width|top_?k|n_best", "k"), (r"start|prompt|seed|prefix|begin|debut|text|^s$|phrase", "start"),
        (r"latent|hidden_?(size|dim)|dim_?h|h_?dim|^h_?size", "hidden"), (r"hid|^h0?$", "h"),
        (r"max|len|^n$|long|num|steps", "maxlen"), (r"dict|voc|n_?sym", "symbols"),
    ]  # fmt: skip
    meaning = next((value for pattern, value in patterns if re.search(pattern, name.lower())), None)
    optional = parameter.default is not parameter.empty
    if optional and parameter.kind == parameter.KEYWORD_ONLY:
        return parameter.default
    if meaning in ("nucleus", "lstm", "softmax", "h", "hidden", "symbols", "device") and optional:
        if meaning == "lstm" and isinstance(parameter.default, bool):
            return values["lstm"]
        return False if meaning == "nucleus" and isinstance(parameter.default, bool) else parameter.default
    if meaning in values:
        return values[meaning]
    return parameter.default if optional else parameter.empty


def arguments_for(function, values: dict) -> dict | None:
    """Keywords for a function of the handout, by its parameters' names; None if one is not understood."""
    parameters = inspect.signature(function).parameters
    plain = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    found = {name: argument(name, parameter, values) for name, parameter in plain.items()}
    return None if any(value is inspect.Parameter.empty for value in found.values()) else found


def call(function, name: str, model: Rigged, symbols: Symbols, seed: int, **more):
    """What a generator returns (or prints) for a rigged model; raises what the last way raised."""
    error = None
    text, codes = more["start"], torch.tensor(symbols.codes(more["start"]))
    sign = symbols.id2lettre.get(symbols.eos, symbols.eos)
    for start, eos in ((text, symbols.eos), (text, sign), (codes, symbols.eos)):
        cell = copy.deepcopy(model.cell)
        inner = next((m for m in cell.modules() if isinstance(m, nn.Embedding)), None)
        values = {
            "rnn": cell, "emb": inner or model.emb, "decoder": model.decoder(cell), "eos": eos,
            "softmax": nn.LogSoftmax(-1), "device": "cpu",
            "lstm": "lstm" in name.lower(), "nucleus": False, "alpha": 0.999, "hidden": HIDDEN,
            "h": torch.zeros(1, HIDDEN), "symbols": symbols.count, **more, "start": start,
        }  # fmt: skip
        keywords = arguments_for(function, values)
        if keywords is None:
            raise Unclear("its parameters are not understood")
        torch.manual_seed(seed)
        try:
            with captured() as printed, time_limit(CALL_SECONDS), torch.no_grad():
                result = function(**keywords)
            if result is None and not printed.getvalue().strip():
                raise Nothing("it returns nothing")
            return printed.getvalue().strip().split("\n") if result is None else result
        except BaseException as caught:
            error = error or caught
    raise error


# ------------------------------------------------------------------------------------------- trials


@dataclass
class Trial:
    """A generator with one cell: what it wrote, or what it raised."""

    cell: str
    model: Rigged | None
    prompt: str = ""
    got: str = ""
    again: str = ""
    error: BaseException | None = None


def failed(solution: Solution, trials: list[Trial]) -> Verdict:
    """The verdict if a generator raised with every cell."""
    errors = [trial.error for trial in trials if trial.error is not None]
    if errors and all(isinstance(error, Nothing) for error in errors):
        return Verdict(MISSING, str(errors[0]))
    understood = [e for e in errors if not isinstance(e, Unclear)]
    if not understood:
        return Verdict(NOT_JUDGED, str(errors[0]) if errors else "no cell to try it with")
    first = understood[0]
    skipped = solution.skipped.get(getattr(first, "name", None) or "")
    if isinstance(first, NameError) and skipped:
        return Verdict(NOT_JUDGED, f"it needs `{first.name}`, which {skipped} sets and the marker did not run")
    own_cells = [t for t in trials if not t.cell.startswith("torch.nn")]
    certain = isinstance(first, (NameError, AttributeError, ImportError)) and in_source(solution, first)
    return Verdict(CANNOT_RUN if certain and own_cells else NOT_JUDGED, solution.where(first))
