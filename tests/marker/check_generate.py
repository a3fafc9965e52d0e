"""Question 3: generate."""

from dataclasses import dataclass

from .cells import Recognised
from .generation import EOS_SIGN, Symbols, Unclear, call, continuation, failed, knows_lstm
from .generation import length_mistake, not_run, readable, text_of, try_cells
from .loader import Solution
from .report import NOT_JUDGED, RIGHT, Verdict, wrong
from .rigging import Rigged, rig
from .sandbox import TookTooLong

PROMPTS, SENTENCE = ("bac", "c"), "dadcab"  # the same letters are followed by others: only the state tells
DECOYS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789efghijklmnopqrstuvwxy"
LSTM_MISTAKE = "with an LSTM it is wrong: C is taken for h, or one of them is lost"
TRY = """to get that model: python -i -m tests.marker.example FOLDER generate
(letters that are not in the sentence are decoys, each after what one known mistake reads)"""


@dataclass
class Trial:
    """What a generator wrote with one cell, and again with other random numbers."""

    model: Rigged
    prompt: str
    got: str
    again: str

    @property
    def right(self) -> bool:
        return self.got.rstrip(EOS_SIGN) == SENTENCE


def mistaken_ways(prompt: str, symbols: Symbols) -> list:
    """(known mistake, what it reads before each next symbol: written so far → prefix)."""
    p = symbols.codes(prompt)

    def again(written):  # all of it, every time, on top of the state
        return sum((p + written[:n] for n in range(len(written) + 1)), ())

    def all_again(written):
        return sum(((symbols.eos, *p, *written[:n]) for n in range(len(written) + 1)), ())

    ways = [
        ("the state is lost after each step", lambda w: (p + w)[-1:]),
        ("only the prompt's last character is read", lambda w: p[-1:] + w),
        ("only the prompt's last character is read", lambda w: (symbols.eos, *p[-1:], *w)),
        ("only the prompt's first character is read", lambda w: p[:1] + w),
        ("what was read is read again with the state", again),
        ("what was read is read again with the state", all_again),
        ("the state of the prompt is lost", lambda w: w or p),
    ]
    after_first = "the first prediction is the one after the prompt's first character"
    for lead in symbols.leads:
        q = lead + p
        ways += [
            ("the prompt is read twice", lambda w, q=q: q + p + w),
            ("the prompt's last character is not read", lambda w, q=q: q[:-1] + w),
            ("the prompt's last character is not read", lambda w, q=q: q + p[:-1] + w),
            ("the prompt's last character is read twice", lambda w, q=q: q + q[-1:] + w),
            (after_first, lambda w, q=q, lead=lead: q + w if w else lead + p[:1]),
            ("the written symbol is not fed back", lambda w, q=q: q + q[-1:] * len(w)),
            ("the written symbol is not fed back, nothing new is read", lambda w, q=q: q),
            ("the state is lost after each step", lambda w, lead=lead, q=q: (lead + w)[-2:] if w else q),
        ]
    names = [name for name, _ in ways]
    return sorted(ways, key=lambda way: names.index(way[0]))  # the likelier first: they get the decoys


def with_decoys(tree: dict, prompt: str, symbols: Symbols) -> dict:
    """The tree, and after what known mistakes read, a symbol of its own each: so that they show."""
    letters = "".join(letter for letter in DECOYS if letter in symbols.id2lettre.values())
    decoys, tree = iter(symbols.codes(letters)), dict(tree)
    for _, read in mistaken_ways(prompt, symbols):
        written = ()
        for _ in range(2):
            if read(written) not in tree:
                decoy = next(decoys, None)
                if decoy is None:  # a small alphabet
                    return tree
                tree[read(written)] = {decoy: 1.0}
            odds = tree[read(written)]
            written += (max(odds, key=odds.get),)
    return tree


def rigged(recognised: Recognised, symbols: Symbols, prompt: str) -> Rigged:
    """A model that surely continues a prompt by the sentence and EOS."""
    text = prompt + SENTENCE + EOS_SIGN
    tree = symbols.tree({text[:n]: {text[n]: 1.0} for n in range(len(prompt), len(text))} | {text: {"z": 1.0}})
    try:
        return rig(recognised, symbols.count, with_decoys(tree, prompt, symbols))
    except Unclear:
        return rig(recognised, symbols.count, tree)


def begins_as(got: str, trial: Trial, read, symbols: Symbols) -> bool:
    """True if a generator that reads `read(written)` before its next symbol writes the first two of `got`."""
    written = ()
    while len(written) < 2 and symbols.eos not in written:
        written += (trial.model.log_probs([read(written)])[0].argmax().item(),)
    return got[:2] == symbols.text(written)


def mistake_of(trial: Trial, symbols: Symbols, right: bool, for_lstm: bool) -> str:
    """Words for a wrong sentence; "" where it may be the marker's guess at a cell that is wrong."""
    got, cell, drawn = trial.got, trial.model.recognised, trial.got[:1] != trial.again[:1]
    if got.replace(EOS_SIGN, "").startswith(SENTENCE):
        return "EOS does not stop it"
    known = mistaken_ways(trial.prompt, symbols) if len(got) > 1 and not drawn else ()  # drawn: it met no decoy
    if mistake := next((mistake for mistake, read in known if begins_as(got, trial, read, symbols)), ""):
        return mistake
    if right or cell.in_library:
        return LSTM_MISTAKE if right and for_lstm and "LSTM" in cell.name else ""
    if drawn:
        return "it begins with a random state"
    return LSTM_MISTAKE if "LSTM" in cell.name else "the continuation is another than the model's"


def try_generate(function, cell: Recognised, symbols: Symbols, prompt: str) -> Trial:
    """Let a generator write with a cell, twice with other random numbers; raises what it raises."""
    model, texts = rigged(cell, symbols, prompt), []
    for seed in (0, 1):
        result = call(function, model, symbols, seed, start=prompt, maxlen=20)
        text = text_of(result, symbols)
        if text is None:
            raise Unclear(f"it returns {type(result).__name__}")
        texts.append(continuation(text, prompt))
    return Trial(model, prompt, *texts)


def check_generate(solution: Solution, cells: dict) -> Verdict:
    """Question 3: generate, with a prompt of three letters, or of one if it takes no more."""
    function, symbols = solution.find("generate"), Symbols.of(solution)

    def write(cell):
        try:
            return try_generate(function, cell, symbols, PROMPTS[0])
        except (Unclear, TookTooLong):
            raise
        except BaseException:  # whatever a student's function raises
            return try_generate(function, cell, symbols, PROMPTS[1])

    trials, errors, at_fault = try_cells(solution, cells, write)
    if not trials:
        return failed(solution, errors, at_fault)
    verdict = judge(function, trials, symbols, knows_lstm(solution, "generate"))
    if verdict.status == RIGHT:
        verdict.detail = not_run(errors)
    return verdict


def judge(function, trials: list[Trial], symbols: Symbols, for_lstm: bool) -> Verdict:
    """The verdict on what a generator, which may be written for an LSTM, too, wrote with the cells it can use."""
    right, found, warnings = [trial for trial in trials if trial.right], {}, []
    for trial in [trial for trial in trials if not trial.right]:
        if mistake := mistake_of(trial, symbols, bool(right), for_lstm):
            found.setdefault(mistake, trial)
        else:
            warnings.append(f"with {trial.model.recognised.name} it writes {trial.got[:12]!r}")
    mistakes = [f"{mistake}: with {trial.model.recognised.name}, {shown(trial)}" for mistake, trial in found.items()]

    def write():
        result = call(function, right[0].model, symbols, 0, start=right[0].prompt, maxlen=2)
        return continuation(text_of(result, symbols), right[0].prompt)

    if right and (too_long := length_mistake(function, write)):
        mistakes.append(too_long)
    if mistakes:
        return wrong(*mistakes, TRY, warnings=warnings)
    if not right:
        return Verdict(NOT_JUDGED, f"it was tried with torch.nn's cells only; {warnings[0]}")
    return Verdict(RIGHT, warnings=warnings)


def shown(trial: Trial) -> str:
    got, again = (readable(text) for text in (trial.got, trial.again))
    seen = repr(got) if got[:1] == again[:1] else f"{got!r} and then {again!r}"
    return f"a model that surely continues {trial.prompt!r} by {SENTENCE!r} and EOS: expected {SENTENCE!r}, got {seen}"
