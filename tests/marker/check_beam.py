"""Question 6: generate_beam."""

from dataclasses import dataclass

import torch

from .cells import Recognised
from .generation import EOS_SIGN, Symbols, Trial, Unclear, call, cells_of, continuation, failed, text_of
from .loader import Solution, empty
from .report import MISSING, NOT_JUDGED, RIGHT, Verdict, wrong
from .rigging import Rigged, rig


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
        "q", _={"b": 0.6, "c": 0.4}, b={x: 0.145 - 0.01 * n for n, x in enumerate("defghijklm")}, c={"n": 1},
        cn={"E": 0.95, "?": 0.05},
        **{prefix: {"E": 0.9, "?": 0.1} for prefix in ("bd", "be", "bf", "bg")})),
    BeamTest("b .55 then x .5 then s; c .45 then z .62 then u", "q", 2, 8, "czu", branch(
        "q", _={"b": 0.55, "c": 0.45}, b={"x": 0.5, "t": 0.3, "w": 0.2}, c={"z": 0.62, "v": 0.38}, bx={"s": 1},
        cz={"u": 1}, bxs={"E": 0.8, "?": 0.2}, czu={"E": 0.9, "?": 0.1}, bz={"s": 1}, cx={"u": 1}, bt={"o": 1}, 
        cv={"r": 1})),
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
        only_ended = failing == 1 and mistake == "grow"  # then it is nothing but that
        if failing and (explained > most or (only_ended and explained == most)):
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
    if empty(solution, "beam"):
        return Verdict(MISSING)
    function, symbols = solution.find("beam"), Symbols.of(solution)
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
