"""What the checks of generate and generate_beam share: cells to try, arguments by name, results in any form."""

import inspect
import re
import string
from dataclasses import dataclass

import torch
from torch import nn

from .cells import Recognised
from .loader import Solution
from .report import MISSING, NOT_JUDGED, Verdict
from .rigging import HIDDEN, Rigged, Unclear
from .sandbox import TookTooLong, attempt, captured

EOS_SIGN = "\x01"
CALL_SECONDS = 5


class Nothing(Unclear):
    """A function returns nothing and prints nothing."""


def library_cells() -> list[Recognised]:
    """torch.nn's cells, for generators that were written for those."""
    return [Recognised(kind) for kind in (nn.RNN, nn.GRU, nn.LSTM)]


@dataclass
class Symbols:
    """The folder's own codes."""

    pad: int
    eos: int
    id2lettre: dict

    @classmethod
    def of(cls, solution: Solution):
        tables = [vars(m).get("id2lettre") for m in solution.modules.values()]
        tables = [dict(enumerate(t)) if isinstance(t, (list, str)) else t for t in tables]
        letters = string.ascii_letters + string.punctuation + string.digits + " "
        handout = {0: "<PAD>", 1: "<EOS>"} | dict(enumerate(letters, start=2))
        table = next((t for t in tables if isinstance(t, dict) and len(t) > 20), handout)
        rare = next((code for code, letter in table.items() if letter == "|"), 1)  # where no EOS is named
        return cls(solution.code("PAD|BLANK", 0), solution.code("EOS", rare), table)

    @property
    def count(self) -> int:
        return max(self.id2lettre) + 1

    def codes(self, text: str) -> tuple[int, ...]:
        """The codes of a text; Unclear if the alphabet has not all its letters."""
        back = {letter: code for code, letter in self.id2lettre.items()} | {EOS_SIGN: self.eos}
        if not all(letter in back for letter in text):
            raise Unclear(f"its alphabet has not all the letters of {text!r}")
        return tuple(back[letter] for letter in text)

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


def is_code(part) -> bool:
    return isinstance(part, int) or (
        isinstance(part, torch.Tensor) and part.numel() == 1 and not part.is_floating_point()
    )


def text_of(result, symbols: Symbols) -> str | None:
    """A sentence in any form, as text with EOS_SIGN; None if it is none."""
    if hasattr(result, "text") and isinstance(result.text, str):
        return result.text + (EOS_SIGN if getattr(result, "ended", False) else "")
    if isinstance(result, str):
        eos, pad = symbols.id2lettre.get(symbols.eos), symbols.id2lettre.get(symbols.pad)
        for sign, into in ((eos, EOS_SIGN), (pad, ""), ("<EOS>", EOS_SIGN), ("<PAD>", "")):
            result = result.replace(sign, into) if sign else result
        return result.split("-->")[-1].strip(" \n") if "-->" in result else result
    if isinstance(result, torch.Tensor) and (not result.is_floating_point() or result.numel() > 1):
        return symbols.text(result.reshape(-1).tolist())
    if isinstance(result, (list, tuple)) and result:
        if all(isinstance(part, str) and len(part) <= 5 for part in result):
            return text_of("".join(result), symbols)
        return symbols.text(result) if all(map(is_code, result)) else text_of(result[0], symbols)
    return None


def continuation(text: str, prompt: str) -> str:
    text = text.lstrip(EOS_SIGN)
    return text[len(prompt) :] if text.startswith(prompt) else text


# What a parameter's name says that it is; the first that fits.
PARAMETERS = [
    (r"^(rnn|model|net|cell|lstm|gru|reseau|modele)", "rnn"), (r"soft", "softmax"), (r"device", "device"),
    (r"lstm|^c$|has_c|is_c", "lstm"), (r"nuc", "nucleus"), (r"^alpha|^p$|top_?p", "alpha"),
    (r"emb|^enc", "emb"), (r"dec|^lin|^out", "decoder"), (r"eos|^end", "eos"),
    (r"^k$|beam|width|top_?k|n_best", "k"), (r"start|prompt|seed|prefix|begin|debut|text|^s$|phrase", "start"),
    (r"latent|hidden_?(size|dim)|dim_?h|h_?dim|^h_?size", "hidden"), (r"hid|^h0?$", "h"),
    (r"max|len|^n$|long|num|steps", "maxlen"), (r"dict|voc|n_?sym", "symbols"),
]  # fmt: skip
DEFAULTS = ("nucleus", "softmax", "h", "hidden", "symbols", "device")  # where there is a default, it is as good


def arguments_for(function, values: dict) -> dict:
    """Keywords for a function of the handout, by its parameters' names; Unclear if one is not understood."""
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        meaning = next((value for pattern, value in PARAMETERS if re.search(pattern, name.lower())), None)
        optional = parameter.default is not parameter.empty or parameter.kind.name.startswith("VAR")
        if optional and (parameter.kind == parameter.KEYWORD_ONLY or meaning not in values or meaning in DEFAULTS):
            continue
        if meaning not in values:
            raise Unclear("its parameters are not understood")
        if not parameter.kind.name.startswith("VAR"):
            found[name] = values[meaning]
    return found


def call(function, model: Rigged, symbols: Symbols, seed: int, **more):
    """What a generator returns, or the lines that it prints, for a rigged model; raises what the first way raised."""
    first, text = None, more["start"]
    sign = symbols.id2lettre.get(symbols.eos, symbols.eos)
    for start, eos in ((text, symbols.eos), (text, sign), (torch.tensor(symbols.codes(text)), symbols.eos)):
        rnn, emb, decoder = model.parts()
        values = {
            "rnn": rnn, "emb": emb, "decoder": decoder, "eos": eos, "softmax": nn.LogSoftmax(-1), "device": "cpu",
            "lstm": "lstm" in model.recognised.name.lower(), "nucleus": False, "alpha": 0.999, "hidden": HIDDEN,
            "h": torch.zeros(1, HIDDEN), "symbols": symbols.count, **more, "start": start,
        }  # fmt: skip
        keywords = arguments_for(function, values)

        def run(keywords=keywords):
            with captured() as printed:
                result = function(**keywords)
            return printed.getvalue().strip().split("\n") if result is None else result

        torch.manual_seed(seed)
        result, error = attempt(run, seconds=CALL_SECONDS)
        if isinstance(error, TookTooLong):
            raise error
        if error is None:
            if isinstance(result, list) and result == [""]:
                raise Nothing("it returns nothing")
            return result
        first = first or error
    raise first


def length_mistake(function, write) -> str:
    """The mistake that `maxlen` is ignored, or ""; `write()` gives the text that it writes with maxlen = 2."""
    parameters = inspect.signature(function).parameters.values()
    if not any(re.search(r"max|^len", p.name.lower()) and p.kind != p.KEYWORD_ONLY for p in parameters):
        return ""
    try:
        text = write()
    except BaseException:  # a length of 2 may be less than it takes
        return ""
    if len(text.split(EOS_SIGN)[0]) <= 3:  # however the prompt and EOS are counted
        return ""
    return f"maxlen is ignored: with maxlen = 2 it writes {readable(text)!r}"


def readable(text: str) -> str:
    return text.replace(EOS_SIGN, "<EOS>")[:14]


def try_cells(solution: Solution, cells: dict, write) -> tuple[list, list[tuple[Recognised, BaseException]], list]:
    """What `write(cell)` gives, the cells with which it raises, and the names of cells that are wrong."""
    found = [Recognised(solution.find(which), **plain) for which, plain in cells.items() if plain]
    own, at_fault = [cell for cell in found if not cell.mistake], [cell.name for cell in found if cell.mistake]
    outcomes, errors = [], []
    for cell in own + ([] if at_fault else library_cells()):
        if cell.in_library and outcomes:  # torch.nn's are tried where the student's own give nothing
            break
        try:
            outcomes.append(write(cell))
        except BaseException as error:  # whatever a student's function raises
            errors.append((cell, error))
            if isinstance(error, TookTooLong):
                break
    return outcomes, errors, at_fault


def failed(solution: Solution, errors: list[tuple[Recognised, BaseException]], at_fault: list[str]) -> Verdict:
    """The verdict if a generator raised with every cell."""
    if at_fault:
        return Verdict(NOT_JUDGED, f"it waits for {' and '.join(at_fault)}, which must be right first")
    if all(isinstance(error, Nothing) for _, error in errors):
        return Verdict(MISSING, "it returns nothing")
    cell, error = next((pair for pair in errors if not isinstance(pair[1], Unclear)), errors[0])
    if isinstance(error, Unclear):
        return Verdict(NOT_JUDGED, str(error))
    verdict = solution.failure([error])
    if cell.in_library:  # it may be written for another cell
        verdict.status = NOT_JUDGED
    return verdict


def not_run(errors: list[tuple[Recognised, BaseException]]) -> str:
    """With which cells a right generator did not run, in words; it need not have been written for them."""
    cells = [f"{cell.name}: {type(error).__name__}" for cell, error in errors]
    return f"(not with {', '.join(cells)})" if cells else ""


def knows_lstm(solution: Solution, question: str) -> bool:
    """True if a generator seems to be written for an LSTM, too."""
    return bool(re.search(r"lstm|tuple|\bc\b|cell", solution.text(question), re.IGNORECASE))
