"""Questions 3, 6 and 7: generate, generate_beam and p_nucleus."""

import copy
import inspect
import re
from dataclasses import dataclass

import torch
from torch import nn

from .cells import Errors, Recognised, reader
from .check_cells import LIKE, in_source, understand
from .check_data import empty
from .loader import Solution
from .report import CANNOT_RUN, MISSING, NOT_JUDGED, RIGHT, Verdict, wrong
from .rigging import HIDDEN, Rigged, rig
from .sandbox import captured, time_limit

EOS_SIGN = "\x01"


class Unclear(Exception):
    """The marker does not understand a function's parameters or its result."""


class Nothing(Unclear):
    """A function returns nothing and prints nothing."""


CALL_SECONDS = 5

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
        kind = solution.find(which.upper(), LIKE[which])
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
        table = next((t for t in tables if isinstance(t, dict) and len(t) > 50), None)
        if table is None:
            import string

            table = dict(enumerate(string.ascii_letters + string.punctuation + string.digits + " ", start=2))
            table |= {0: "<PAD>", 1: "<EOS>"}
        return cls(solution.value("PAD_IX", 0), solution.value("EOS_IX", 1), table)

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
    starts = [more["start"], torch.tensor(symbols.codes(more["start"]))]
    for start, eos in ((starts[0], symbols.eos), (starts[0], symbols.id2lettre[symbols.eos]), (starts[1], symbols.eos)):
        cell = copy.deepcopy(model.cell)
        inner = next((m for m in cell.modules() if isinstance(m, nn.Embedding)), None)
        values = {
            "rnn": cell, "emb": inner or model.emb, "decoder": model.decoder(cell), "eos": eos, "softmax": nn.LogSoftmax(-1),
            "device": "cpu", "lstm": "lstm" in name.lower(), "nucleus": False, "alpha": 0.999, "hidden": HIDDEN,
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


# ------------------------------------------------------------------------------------------- generate

PROMPTS, SENTENCE = ("bac", "c"), "dadcab"  # the same letters are followed by others: only the state tells


def chain(prompt: str) -> dict[str, dict[str, float]]:
    """After every prefix of the sentence its next letter, with certainty."""
    text = prompt + SENTENCE + EOS_SIGN
    branches = {text[:n]: {text[n]: 1.0} for n in range(len(prompt), len(text))}
    return branches | {text: {"z": 1.0}}


def mistaken_ways(prompt: str, symbols: Symbols) -> dict:
    """What known mistakes read before each next symbol: written so far → prefix."""
    p = symbols.codes(prompt)

    def again(written):  # all of it, every time, on top of the state
        return sum((p + written[:n] for n in range(len(written) + 1)), ())

    def all_again(written):
        return (symbols.eos, *p) + sum(((symbols.eos, *p, *written[: n + 1]) for n in range(len(written))), ())

    ways = {
        "the state is lost after each step": [lambda w: (p + w)[-1:]],
        "only the prompt's last character is read": [lambda w: p[-1:] + w, lambda w: (symbols.eos, *p[-1:], *w)],
        "only the prompt's first character is read": [lambda w: p[:1] + w],
        "what was read is read again with the state": [again, all_again],
        "the state of the prompt is lost": [lambda w: w or p],
    }
    for lead in symbols.leads:
        q = lead + p
        for mistake, read in {
            "the prompt's last character is read twice": lambda w, q=q: q + q[-1:] + w,
            "the first prediction is the one after the prompt's first character": lambda w, q=q, lead=lead: (
                q + w if w else lead + p[:1]
            ),
            "the written symbol is not fed back": lambda w, q=q: q + q[-1:] * len(w),
            "the written symbol is not fed back, nothing new is read": lambda w, q=q: q,
            "the state is lost after each step": lambda w, lead=lead, q=q: (lead + w)[-2:] if w else q,
        }.items():
            ways.setdefault(mistake, []).append(read)
    return ways


def with_decoys(tree: dict, prompt: str, symbols: Symbols) -> dict:
    """The tree, and after what known mistakes read, a symbol of its own each: so that they show."""
    decoys, tree = iter(symbols.codes("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789efghijklmnopqrstuvwxyz")), dict(tree)
    for reads in mistaken_ways(prompt, symbols).values():
        for read in reads:
            written = ()
            for _ in range(2):
                odds = tree.setdefault(read(written), {}) or tree[read(written)]
                if not odds:
                    odds[next(decoys)] = 1.0
                written += (max(odds, key=odds.get),)
    return tree


def greedy(model: Rigged, read, symbols: Symbols, count: int) -> str:
    """What a generator writes that reads `read(written)` before its next symbol."""
    written = ()
    while len(written) < count and symbols.eos not in written:
        written += (model.log_probs([read(written)])[0].argmax().item(),)
    return symbols.text(written)


@dataclass
class Trial:
    """A generator with one cell: what it wrote, or what it raised."""

    cell: str
    model: Rigged | None
    prompt: str = ""
    got: str = ""
    again: str = ""
    error: BaseException | None = None


def generation_mistake(trial: Trial, symbols: Symbols) -> str:
    """The name of the mistake that gives `got`; "" if none is known."""
    got, model = trial.got, trial.model
    if got.replace(EOS_SIGN, "").startswith(SENTENCE):
        return "EOS does not stop it"
    for mistake, reads in mistaken_ways(trial.prompt, symbols).items():
        if any(len(got) > 1 and got[:2] == greedy(model, read, symbols, 2) for read in reads):
            return mistake
    return ""


def try_generate(function, name: str, found: Recognised, symbols: Symbols, prompt: str) -> Trial:
    """Let a generator write with a cell, twice with other random numbers."""
    trial = Trial(name, None, prompt)
    try:
        tree = symbols.tree(chain(prompt))
        trial.model = rig(found, symbols.count, with_decoys(tree, prompt, symbols)) or rig(found, symbols.count, tree)
        if trial.model is None:
            raise Unclear("the cell could not be rigged")
        texts = []
        for seed in (0, 1):
            result = call(function, name, trial.model, symbols, seed, start=prompt, maxlen=20)
            text = text_of(result, symbols)
            if text is None:
                raise Unclear(f"it returns {type(result).__name__}")
            texts.append(continuation(text, prompt))
        trial.got, trial.again = texts
    except BaseException as error:
        trial.error = error
    return trial


def fits(got: str) -> bool:
    """True for the sentence, with or without EOS, or cut where the prompt counts into the length."""
    head, _, rest = got.partition(EOS_SIGN)
    return head == SENTENCE and not rest.strip(EOS_SIGN)


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


def check_generate(solution: Solution) -> Verdict:
    """Question 3: generate."""
    like = r"^generate_?(text|greedy|sentence|n|1|one)?$"
    if empty(solution, "generate", like):
        return Verdict(MISSING)
    function, symbols, trials = solution.find("generate", like), Symbols.of(solution), []
    for name, found in cells_of(solution):
        if name.startswith("torch.nn") and any(t.error is None for t in trials):
            break
        trials.append(try_generate(function, name, found, symbols, PROMPTS[0]))
        if trials[-1].error is not None and not isinstance(
            trials[-1].error, Unclear
        ):  # perhaps it takes one letter only
            shorter = try_generate(function, name, found, symbols, PROMPTS[1])
            trials[-1] = shorter if shorter.error is None else trials[-1]
    ran = [trial for trial in trials if trial.error is None]
    if not ran:
        return failed(solution, trials)
    return judge_generate(ran, symbols)


LSTM_MISTAKE = "with an LSTM it is wrong: C is taken for h, or one of them is lost"


def judge_generate(ran: list[Trial], symbols: Symbols) -> Verdict:
    """The verdict on what a generator wrote with the cells it can use."""
    right, bad = [t for t in ran if fits(t.got)], [t for t in ran if not fits(t.got)]
    for trial in bad:
        mistake = generation_mistake(trial, symbols)
        if mistake:
            return wrong(mistake, f"with {trial.cell}, {shown(trial, trial.got)}")
    if not bad:
        return Verdict(RIGHT)
    trial = bad[0]
    if right:
        if all("LSTM" in t.cell for t in bad):
            return wrong(LSTM_MISTAKE, shown(trial, trial.got))
        return Verdict(RIGHT, warnings=[f"with {t.cell} it writes {t.got[:12]!r}" for t in bad])
    if trial.got[:1] != trial.again[:1]:
        return wrong("it begins with a random state", shown(trial, trial.got, trial.again))
    if not trial.got.strip(EOS_SIGN):
        return wrong("it writes nothing", shown(trial, trial.got))
    words = LSTM_MISTAKE if "LSTM" in trial.cell else "the continuation is another than the model's"
    return wrong(words, f"with {trial.cell}, {shown(trial, trial.got)}")


def shown(trial: Trial, *got: str) -> str:
    """The test in words."""
    seen = " and then ".join(repr(text.replace(EOS_SIGN, "<EOS>")[:14]) for text in got)
    return f"a model that surely continues {trial.prompt!r} by {SENTENCE!r} and EOS: expected {SENTENCE!r}, got {seen}"


# ---------------------------------------------------------------------------------------- beam search


@dataclass(frozen=True)
class BeamTest:
    """A tree of probabilities, and the sentence that beam search must find in it."""

    words: str
    prompt: str
    k: int
    maxlen: int
    expected: str
    branches: tuple


def branch(prompt: str, **following) -> tuple:
    """The tree below a prompt: `_` is the root, "E" is EOS; the probabilities follow each prefix."""
    tree = []
    for prefix, odds in following.items():
        where = prompt + (prefix[1:] if prefix.startswith("_") else prefix).replace("E", EOS_SIGN)
        tree.append((where, {symbol.replace("E", EOS_SIGN): p for symbol, p in odds.items()}))
    return tuple(tree)


BEAM_TESTS = [
    BeamTest("after c, EOS .6 or b .4; after EOS, y .5 or z .5", "q", 2, 6, "c", branch(
        "q", _={"c": 1}, c={"E": 0.6, "b": 0.4}, cb={"d": 1}, cbd={"e": 1}, cbde={"f": 1}, cbdef={"g": 1},
        cE={"y": 0.52, "z": 0.48})),
    BeamTest("b .6, then one of ten with .1 each; c .4, then surely n", "q", 3, 8, "cn", branch(
        "q", _={"b": 0.6, "c": 0.4}, b=dict(zip("defghijklm", (0.145, 0.135, 0.125, 0.115, 0.105, 0.095, 0.085, 0.075, 0.065, 0.055), strict=True)), c={"n": 1}, cn={"E": 0.95, "?": 0.05},
        **{prefix: {"E": 0.9, "?": 0.1} for prefix in ("bd", "be", "bf", "bg")})),
    BeamTest("b .55 then x .5 then s; c .45 then z .62 then u", "q", 2, 8, "czu", branch(
        "q", _={"b": 0.55, "c": 0.45}, b={"x": 0.5, "t": 0.3, "w": 0.2}, c={"z": 0.62, "v": 0.38}, bx={"s": 1},
        cz={"u": 1}, bxs={"E": 0.8, "?": 0.2}, czu={"E": 0.9, "?": 0.1}, bz={"s": 1}, cx={"u": 1}, bt={"o": 1}, cv={"r": 1})),
    BeamTest("b .9 then x .4, t .35 or w .25; c .1 then surely z", "q", 3, 8, "bx", branch(
        "q", _={"b": 0.9, "c": 0.1}, b={"x": 0.4, "t": 0.35, "w": 0.25}, c={"z": 1},
        bx={"E": 0.8, "?": 0.2}, bt={"E": 0.8, "?": 0.2}, bw={"E": 0.8, "?": 0.2}, cz={"E": 0.95, "?": 0.05})),
    BeamTest("after the prompt 'bac' surely d", "bac", 2, 8, "d", branch("bac", _={"d": 1}, d={"E": 1})),
]  # fmt: skip

ENDED_MISTAKE = "ended hypotheses are not kept: they go on growing, or are dropped"
MIXED = "the states of the hypotheses are lost or mixed up"

BEAM_MISTAKES = {
    "greedy": "it is greedy: k is ignored",
    "double": "a parent's probability is counted twice",
    "last": "the scores are not accumulated: only the last symbol counts",
    "order": "the states are not reordered with the hypotheses they belong to",
    "shared": "all hypotheses share one state",
    "lost": "the state is lost after each step",
    "worst": "the worst of the k hypotheses is returned",
    "grow": ENDED_MISTAKE,
    "drop": ENDED_MISTAKE,
    "length": "",  # scores by length are a choice, not a mistake
}


def search(model: Rigged, prefix, eos: int, k: int, maxlen: int, mistake: str) -> list[tuple[int, ...]]:
    """Beam search with a mistake in it: its hypotheses, the best first."""
    beams, everything = [((), 0.0, prefix)], prefix  # written, score, read; all that was read by anyone
    for _ in range(maxlen):
        children, live = [], []
        for row, (written, score, read) in enumerate(beams):
            if eos in written and mistake != "grow":
                children += [] if mistake == "drop" else [(score, written, read, row)]
                continue
            if mistake == "shared":
                everything = read = everything + written[-1:]
            live.append((row, written, score, read))
        for (row, written, score, read), odds in zip(live, model.log_probs([beam[3] for beam in live]), strict=True):
            for value, code in zip(*(part.tolist() for part in odds.topk(k)), strict=True):
                total = {"double": 2 * score + value, "last": value}.get(mistake, score + value)
                children.append((total, (*written, code), (*read, code), row))
        rank = (lambda child: child[0] / len(child[1])) if mistake == "length" else (lambda child: child[0])
        children = sorted(children, key=rank, reverse=True)[: 1 if mistake == "greedy" else k]
        if not children:
            break
        reads, beams = [beam[2] for beam in beams], []
        for row, (score, written, read, _) in enumerate(children):
            if mistake == "order":
                read = (*reads[min(row, len(reads) - 1)], written[-1])
            beams.append((written, score, written[-1:] if mistake == "lost" else read))
    found = [written for written, _, _ in beams]
    return found[::-1] if mistake == "worst" else found


def best_texts(result, symbols: Symbols) -> list[str]:
    """What may be meant as the best sentence of a result: one, or a list's first, last or best scored."""
    if isinstance(result, dict):
        result = list(result.items())
    if isinstance(result, tuple) and len(result) == 2 and is_scores(result[1], result[0]):
        result = list(zip(result[0], result[1], strict=True))
    if isinstance(result, (list, tuple)) and result and isinstance(result[0], (list, tuple)) and result[0]:
        scored = [(score_in(part), part) for part in result]
        if all(score is not None for score, _ in scored):
            best = max(scored, key=lambda pair: pair[0])[1]
            return [t for t in [text_of(pick_text(best), symbols)] if t is not None]
        texts = [text_of(part, symbols) for part in (result[0], result[-1])]
        return [t for t in texts if t is not None]
    if isinstance(result, (list, tuple)) and len(result) and not is_one_sentence(result):
        return [t for t in (text_of(part, symbols) for part in (result[0], result[-1])) if t is not None]
    text = text_of(result, symbols)
    return [] if text is None else [text]


def is_scores(scores, texts) -> bool:
    """True for k numbers beside k sentences."""
    try:
        return len(scores) == len(texts) and not isinstance(scores, str) and all(float(s) == float(s) for s in scores)
    except (TypeError, ValueError, RuntimeError):
        return False


def score_in(part) -> float | None:
    """The score in a pair or triple of sentence, score and perhaps state."""
    numbers = [
        p
        for p in part
        if isinstance(p, float) or (isinstance(p, torch.Tensor) and p.is_floating_point() and p.numel() == 1)
    ]
    return float(numbers[0]) if len(numbers) == 1 and len(part) <= 4 else None


def pick_text(part):
    """The sentence in a pair or triple."""
    return next(
        (
            p
            for p in part
            if isinstance(p, (str, list, tuple)) or (isinstance(p, torch.Tensor) and not p.is_floating_point())
        ),
        part,
    )


def is_one_sentence(result) -> bool:
    """True for a list of codes or of single characters."""
    return all(
        (isinstance(p, str) and len(p) == 1) or isinstance(p, int) or (isinstance(p, torch.Tensor) and p.numel() == 1)
        for p in result
    )


def beam_tree(test: BeamTest, symbols: Symbols) -> dict:
    """The test's tree by codes; after a symbol alone comes `@`, so that a lost state shows."""
    tree = symbols.tree(dict(test.branches))
    letters = {symbol for odds in tree.values() for symbol in odds} - {symbols.eos}
    alone = {(letter,): {symbols.codes("@")[0]: 1.0} for letter in sorted(letters)[:20]}
    return alone | tree


def try_beam(function, name: str, found: Recognised, symbols: Symbols) -> list[tuple[BeamTest, Rigged, list[str]]]:
    """What a beam search finds in every test's tree; raises if it finds nothing in any."""
    outcomes, errors = [], []
    for test in BEAM_TESTS:
        model = rig(found, symbols.count, beam_tree(test, symbols))
        if model is None:
            raise Unclear("the cell could not be rigged")
        try:
            result = call(function, name, model, symbols, 0, start=test.prompt, maxlen=test.maxlen, k=test.k)
            texts = [continuation(text, test.prompt) for text in best_texts(result, symbols)]
            if not texts:
                raise Unclear(f"it returns {type(result).__name__}")
            outcomes.append((test, model, texts))
        except BaseException as error:
            errors += [error] if len(test.prompt) == 1 else []  # some take one letter only
    if errors and all(finds(test, texts) for test, _, texts in outcomes):
        raise errors[0]
    return outcomes


def finds(test: BeamTest, texts: list[str]) -> bool:
    return any(text.split(EOS_SIGN)[0] == test.expected for text in texts)


def beam_mistake(outcomes, symbols: Symbols) -> str:
    """The known mistake that explains most tests' outcomes; "" if none explains a failing one."""
    best, most = "", 0
    for mistake in BEAM_MISTAKES:
        explained, failing = 0, 0
        for test, model, texts in outcomes:
            ends = set()
            for lead in symbols.leads:
                beams = search(model, lead + symbols.codes(test.prompt), symbols.eos, test.k, test.maxlen, mistake)
                ends.add(symbols.text(beams[0]).split(EOS_SIGN)[0][:6] if beams else "")
            here = any(text.split(EOS_SIGN)[0][:6] in ends for text in texts)
            explained += here
            failing += here and not finds(test, texts)
        if failing and explained > most:
            best, most = mistake, explained
    return best


def judge_beam(outcomes, cell: str, symbols: Symbols) -> Verdict:
    """The verdict on a beam search that failed with one cell."""
    failing = [(test, texts) for test, _, texts in outcomes if not finds(test, texts)]
    known = beam_mistake(outcomes, symbols)
    if known == "length":
        return Verdict(NOT_JUDGED, "its scores seem to be divided by the length")
    test, texts = failing[0]
    got = texts[0].replace(EOS_SIGN, "<EOS>")[:12]
    if len(failing) == 1 and len(test.prompt) > 1:
        known, named = "", "the prompt is not read as it stands"
    else:
        named = BEAM_MISTAKES.get(known) or (
            MIXED if any(off_tree(*f) for f in failing) else "it does not find the likeliest sentence"
        )
    return wrong(named, f"with {cell}, k = {test.k}, {test.words}: expected {test.expected!r}, got {got!r}")


def off_tree(test: BeamTest, texts: list[str]) -> bool:
    """True for a sentence that no path of the tree gives."""
    tree = dict(test.branches)
    for text in texts:
        for n in range(len(text.split(EOS_SIGN)[0])):
            if text[n] not in tree.get(test.prompt + text[:n], {text[n]: 1}):
                return True
    return False


def check_beam(solution: Solution) -> Verdict:
    """Question 6: generate_beam."""
    like = r"beam"
    if empty(solution, "generate_beam", like):
        return Verdict(MISSING)
    function, symbols = solution.find("generate_beam", like), Symbols.of(solution)
    trials, failures = [], []
    for name, found in cells_of(solution):
        if name.startswith("torch.nn") and failures:
            break
        try:
            outcomes = try_beam(function, name, found, symbols)
        except BaseException as error:
            trials.append(Trial(name, None, error=error))
            continue
        if all(finds(test, texts) for test, _, texts in outcomes):
            return Verdict(RIGHT)
        failures.append((outcomes, name))
    return judge_beam(*failures[0], symbols) if failures else failed(solution, trials)


# -------------------------------------------------------------------------------------------- nucleus

P = (0.05, 0.5, 0.15, 0.3)


def nucleus(p: torch.Tensor, alpha: float, extra: int = 0) -> torch.Tensor:
    """The nucleus of a distribution; `extra` symbols more (or fewer, if negative)."""
    ranked, order = p.sort(descending=True)
    count = int((ranked.cumsum(0) - ranked < alpha - 1e-6).sum()) + extra
    kept = torch.zeros_like(p)
    kept[order[: max(count, 1)]] = ranked[: max(count, 1)]
    return kept / kept.sum()


def distribution(result, symbols: int) -> torch.Tensor | None:
    """Probabilities (V,) from a distribution, its logarithm, masked logits, or probabilities with indices."""
    if isinstance(result, (tuple, list)) and len(result) == 2:
        parts = [torch.as_tensor(part).squeeze() for part in result]
        parts = [part.reshape(-1) for part in parts]
        values = next((part for part in parts if part.is_floating_point()), None)
        codes = next((part for part in parts if not part.is_floating_point() and part.dtype != torch.bool), None)
        if values is None or codes is None or len(values) != len(codes):
            return None
        spread = torch.full((symbols,), float("-inf") if (values < 0).any() else 0.0)
        spread[codes.long()] = values.float()
        result = spread
    if not isinstance(result, torch.Tensor) or not result.is_floating_point() or result.numel() != symbols:
        return None
    p = result.detach().reshape(-1)
    if p.isnan().any():
        return p
    if (p < 0).any():
        p = p.exp() if abs(p.exp().sum() - 1) < 1e-3 else p.softmax(0)
    return p


def drawn(function, h, symbols: int) -> torch.Tensor | None:
    """Frequencies (V,) of what a `compute` draws, if it draws codes."""
    counts = torch.zeros(symbols)
    for seed in range(300):
        torch.manual_seed(seed)
        result = function(h.clone())
        code = int(result.reshape(-1)[0]) if isinstance(result, torch.Tensor) else int(result)
        counts[code] += 1
    return counts / counts.sum()


@dataclass
class Asked:
    """What `compute` gave for one distribution: probabilities, perhaps by counting draws."""

    p: torch.Tensor
    counted: bool = False

    def equals(self, other: torch.Tensor) -> bool:
        scaled = self.p / self.p.sum() if self.p.sum() > 0 else self.p
        return torch.allclose(scaled, other, atol=0.13 if self.counted else 2e-4) and (
            not self.counted or torch.equal(scaled > 0, other > 0.001)
        )


def ask(make, p: torch.Tensor, alpha) -> Asked | None:
    """`p_nucleus(decoder, alpha)(h)` where the decoder gives the logits of p; raises what the last shape raised."""
    error = None
    for shape in ((1, -1), (-1,), (1, 1, -1)):
        h = p.log().reshape(shape)
        try:
            with captured(), time_limit(), torch.no_grad():
                compute = make(Logits(), alpha)
                torch.manual_seed(0)
                result = compute(h.clone())
                if result is None:
                    return None
                found = distribution(result, len(p))
                if found is None and is_code(result):
                    return Asked(drawn(compute, h, len(p)), counted=True)
                if found is not None:
                    return Asked(found)
                error = error or Unclear(f"compute returns {type(result).__name__} of an unknown form")
        except BaseException as caught:
            error = error or caught
    raise error


def is_code(result) -> bool:
    return isinstance(result, int) or (
        isinstance(result, torch.Tensor) and result.numel() == 1 and not result.is_floating_point()
    )


class Logits(nn.Module):
    """A decoder whose states are logits already."""

    def forward(self, h, *args, **kwargs):
        return h


def mistaken_nuclei(p: torch.Tensor, alpha: float) -> list[tuple[str, torch.Tensor]]:
    """What known mistakes give."""
    right = nucleus(p, alpha)
    masked = torch.where(right > 0, p, torch.zeros(()))
    ascending, order = p.sort()
    unlikely, fewer, before = (torch.zeros_like(p) for _ in range(3))
    unlikely[order[: int((ascending.cumsum(0) < alpha).sum()) + 1]] = 1
    fewer[order[: int((ascending.cumsum(0) <= alpha).sum())]] = 1
    before[order[: int((ascending.cumsum(0) - ascending < alpha).sum())]] = 1
    best = torch.zeros_like(p).scatter(0, p.argmax(), 1.0)
    among = right[right > 0].exp()
    return [
        ("the filter is computed and not used", p), ("softmax is applied twice", p.softmax(0)),
        ("softmax is applied twice", masked.softmax(0)), ("softmax is applied twice", right.softmax(0)),
        ("softmax is applied twice", torch.where(right > 0, right.exp(), torch.zeros(())) / among.sum()),
        ("only the likeliest symbol is left", best),
        ("the symbol that crosses α is dropped", nucleus(p, alpha, -1) if right.gt(0).sum() > 1 else p * 0),
        ("the symbol that crosses α is dropped", nucleus(p, alpha, -1)),
        ("one symbol too many is kept", nucleus(p, alpha, 1)),
        *[("the order is ascending: unlikely symbols are kept", kept * p / (kept * p).sum().clamp(min=1e-9))
          for kept in (unlikely, fewer, before)],
    ]  # fmt: skip


def nucleus_mistake(p: torch.Tensor, answers: dict) -> str:
    """The name of the mistake that gives the answers for every α."""
    if any(got is None or got.p.isnan().any() or got.p.sum() == 0 for got in answers.values()):
        return "the symbol that crosses α is dropped: nothing is left where α is below the largest probability"
    candidates = {alpha: mistaken_nuclei(p, alpha) for alpha in answers}
    for k, (name, _) in enumerate(next(iter(candidates.values()))):
        if all(got.equals(candidates[alpha][k][1]) for alpha, got in answers.items()):
            return name
    for alpha, got in answers.items():
        if not got.equals(nucleus(p, alpha)):
            name = next((name for name, value in candidates[alpha] if got.equals(value)), "")
            if name:
                return name
    return "it is not the nucleus"


def runs(make, p: torch.Tensor) -> bool:
    """True if `p_nucleus` gives something for that many symbols."""
    try:
        ask(make, p, 0.75)
    except BaseException:
        return False
    return True


def check_nucleus(solution: Solution) -> Verdict:
    """Question 7: p_nucleus."""
    like = r"nucleus"
    if empty(solution, "p_nucleus", like):
        return Verdict(MISSING)
    make, p, answers = solution.find("p_nucleus", like), torch.tensor(P), {}
    if not runs(make, p):  # perhaps it takes the whole alphabet only
        whole = torch.cat([p, torch.full((93,), 1e-9)])
        p = whole if runs(make, whole) else p
    parameters = inspect.signature(make).parameters
    if len([q for q in parameters.values() if q.default is q.empty]) > 2:
        return Verdict(NOT_JUDGED, f"its parameters are {', '.join(parameters)}")
    for alpha in (0.75, 0.4, 0.9):
        try:
            answers[alpha] = ask(make, p, alpha)
        except BaseException as error:
            if 0.75 not in answers:
                return nucleus_fails(solution, make, p, alpha, error)
            answers[alpha] = None
            continue
        if answers[alpha] is None:
            return Verdict(MISSING, "compute returns None")
    for alpha, got in answers.items():
        expected = nucleus(p, alpha)
        if got is None or not got.equals(expected):
            seen = "an error" if got is None else rounded(got.p)
            return wrong(
                nucleus_mistake(p, answers), f"p = {list(P)}, α = {alpha}: expected {rounded(expected)}, got {seen}"
            )
    return at_one(make)


def at_one(make) -> Verdict:
    """The nucleus at α = 1 must be the whole distribution, although float sums stay below 1."""
    for seed in range(30):
        p = torch.randn(97, generator=torch.Generator().manual_seed(seed)).softmax(0)
        try:
            got = ask(make, p, 1.0)
        except BaseException as error:
            return wrong("α = 1 fails", f"{type(error).__name__}: {error}"[:120])
        if got.counted:
            return (
                Verdict(RIGHT)
                if (got.p > 0).sum() > 20
                else wrong("α = 1 becomes greedy", "one of 97 symbols is drawn always")
            )
        if not got.equals(p):
            kept = int((got.p > 0).sum())
            mistake = "α = 1 becomes greedy" if kept <= 2 else "α = 1 loses symbols"
            return wrong(
                mistake, f"a distribution of 97 symbols (random seed {seed}): expected all of it, {kept} are left"
            )
    return Verdict(RIGHT)


def nucleus_fails(solution: Solution, make, p, alpha: float, error: BaseException) -> Verdict:
    """The verdict if compute raises: perhaps it wants a number of symbols."""
    try:
        got = ask(make, p, 2)
        if got is not None and got.equals(nucleus(p, 0.75)):
            return wrong("it keeps k symbols (top-k) in place of a mass α", f"α = {alpha} raises; 2 keeps two symbols")
    except BaseException:
        pass
    own = not isinstance(error, Unclear) and "(" in solution.where(error)
    return Verdict(
        CANNOT_RUN if own else NOT_JUDGED, f"for states of every shape: {solution.where(error)}" if own else str(error)
    )


def rounded(p: torch.Tensor) -> list[float]:
    return [round(value, 3) for value in p.tolist()[: len(P)]]
