"""Question 3: generate."""

import re

from .cells import Recognised
from .generation import EOS_SIGN, Symbols, Trial, Unclear, call, cells_of, continuation, failed, text_of
from .loader import Solution, empty
from .report import MISSING, RIGHT, Verdict, wrong
from .rigging import Rigged, rig

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
        return sum(((symbols.eos, *p, *written[:n]) for n in range(len(written) + 1)), ())

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
    decoys, tree = (iter(symbols.codes("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789efghijklmnopqrstuvwxyz")), dict(tree))
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


def check_generate(solution: Solution) -> Verdict:
    """Question 3: generate."""
    if empty(solution, "generate"):
        return Verdict(MISSING)
    function, symbols, trials = solution.find("generate"), Symbols.of(solution), []
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
    source, node = solution.definition("generate")
    text = "\n".join(source.text.split("\n")[node.lineno - 1 : node.end_lineno])
    knows_lstm = bool(re.search(r"lstm|tuple|\bc\b|cell", text, re.IGNORECASE))
    return judge_generate(ran, symbols, knows_lstm)


LSTM_MISTAKE = "with an LSTM it is wrong: C is taken for h, or one of them is lost"


def judge_generate(ran: list[Trial], symbols: Symbols, knows_lstm: bool) -> Verdict:
    """The verdict on what a generator wrote with the cells it can use; was it written for an LSTM, too?"""
    right, bad = [t for t in ran if fits(t.got)], [t for t in ran if not fits(t.got)]
    for trial in bad:
        mistake = generation_mistake(trial, symbols)
        if mistake:
            return wrong(mistake, f"with {trial.cell}, {shown(trial, trial.got)}")
    if not bad:
        return Verdict(RIGHT)
    trial = bad[0]
    if right:
        if knows_lstm and all("LSTM" in t.cell for t in bad):
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
