"""Question 6: generate_beam."""

from dataclasses import dataclass

import torch

from .cells import Recognised
from .generation import EOS_SIGN, Symbols, Unclear, call, continuation, failed, is_code, knows_lstm
from .generation import length_mistake, not_run, readable, text_of, try_cells
from .loader import Solution
from .report import NOT_JUDGED, RIGHT, Verdict, wrong
from .rigging import Rigged, rig


@dataclass
class BeamTest:
    """A tree of probabilities, and the sentence that beam search must find in it."""

    words: str
    prompt: str
    k: int
    maxlen: int
    expected: str
    branches: dict


def branch(prompt: str, **following) -> dict:
    """The tree below a prompt: `_` is the root, "E" is EOS; the probabilities follow each prefix."""
    return {
        (prompt + prefix.lstrip("_")).replace("E", EOS_SIGN): {s.replace("E", EOS_SIGN): p for s, p in odds.items()}
        for prefix, odds in following.items()
    }


BEAM_TESTS = [
    BeamTest("after c, EOS .6 or b .4; after EOS, y .5 or z .5", "q", 2, 6, "c", branch(
        "q", _={"c": 1}, c={"E": 0.6, "b": 0.4}, cb={"d": 1}, cbd={"e": 1}, cbde={"f": 1}, cbdef={"g": 1},
        cE={"y": 0.52, "z": 0.48})),
    BeamTest("b .6, then one of ten with .1 each; c .4, then surely n", "q", 3, 8, "cn", branch(
        "q", _={"b": 0.6, "c": 0.4}, b={x: 0.145 - 0.01 * n for n, x in enumerate("defghijklm")}, c={"n": 1},
        cn={"E": 0.95, "a": 0.05},
        **{prefix: {"E": 0.9, "a": 0.1} for prefix in ("bd", "be", "bf", "bg")})),
    BeamTest("b .55 then x .5 then s; c .45 then z .62 then u", "q", 2, 8, "czu", branch(
        "q", _={"b": 0.55, "c": 0.45}, b={"x": 0.5, "t": 0.3, "w": 0.2}, c={"z": 0.62, "v": 0.38}, bx={"s": 1},
        cz={"u": 1}, bxs={"E": 0.8, "a": 0.2}, czu={"E": 0.9, "a": 0.1}, bz={"s": 1}, cx={"u": 1}, bt={"o": 1},
        cv={"r": 1})),
    BeamTest("b .9 then x .4, t .35 or w .25; c .1 then surely z", "q", 3, 8, "bx", branch(
        "q", _={"b": 0.9, "c": 0.1}, b={"x": 0.4, "t": 0.35, "w": 0.25}, c={"z": 1},
        bx={"E": 0.8, "a": 0.2}, bt={"E": 0.8, "a": 0.2}, bw={"E": 0.8, "a": 0.2}, cz={"E": 0.95, "a": 0.05})),
    BeamTest("c .45 and then surely EOS; b .55 then x .6; after c and EOS, y .52 or z .48", "q", 2, 8, "c", branch(
        "q", _={"b": 0.55, "c": 0.45}, b={"x": 0.6, "t": 0.4}, c={"E": 1}, cE={"y": 0.52, "z": 0.48}, bx={"E": 1},
        bt={"E": 1})),
    BeamTest("c .4 and then surely EOS; b .6 then surely x and EOS", "q", 2, 8, "bx", branch(
        "q", _={"b": 0.6, "c": 0.4}, c={"E": 1}, cE={"y": 1}, b={"x": 1}, bx={"E": 1})),
    BeamTest("after the prompt 'bac' surely d", "bac", 2, 8, "d", branch("bac", _={"d": 1}, d={"E": 1})),
]  # fmt: skip

LONG = BeamTest("surely 'defghi'", "q", 2, 2, "de", branch(
    "q", _={"d": 1}, d={"e": 1}, de={"f": 1}, **{"def": {"g": 1}}, defg={"h": 1}, defgh={"i": 1},
    defghi={"E": 1}))  # fmt: skip

ENDED_MISTAKE = "ended hypotheses are not kept: they go on growing, or are dropped"

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
    "first": "it stops at the first hypothesis that ends, likely or not",
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
        if mistake == "first" and any(eos in child[1] for child in children):
            return [next(child[1] for child in children if eos in child[1])]
        reads, beams = [beam[2] for beam in beams], []
        for row, (score, written, read, _) in enumerate(children):
            if mistake == "order":
                read = (*reads[min(row, len(reads) - 1)], written[-1])
            beams.append((written, score, written[-1:] if mistake == "lost" else read))
    found = [written for written, _, _ in beams]
    return found[::-1] if mistake == "worst" else found


def best_texts(result, symbols: Symbols) -> list[str]:
    """What may be meant as the best sentence of a result: one, or a list's first, last or best scored."""
    if isinstance(result, tuple) and len(result) == 2 and are_scores(result[1], result[0]):
        result = [(text, float(score)) for text, score in zip(*result, strict=True)]
    best = [result]
    sentence = isinstance(result, (list, tuple)) and all(
        is_code(part) or (isinstance(part, str) and len(part) == 1) for part in result
    )
    if isinstance(result, (list, tuple)) and not sentence:
        scored = [(score_in(part), part) for part in result]
        best = [result[0], result[-1]]
        if all(score is not None for score, _ in scored):
            ranked = sorted(scored, key=lambda pair: -pair[0])
            best = [ranked[0][1]]
            if ranked[-1][0] >= 0 and scored[0][0] < ranked[0][0]:  # negative log-likelihoods, perhaps
                best.append(ranked[-1][1])
            best = [next((part for part in pair if not is_score(part)), pair) for pair in best]
    texts = [text_of(part, symbols) for part in best]
    return [text for text in texts if text is not None]


def are_scores(scores, texts) -> bool:
    numbers = isinstance(scores, (list, tuple)) and all(is_score(s) or is_code(s) for s in scores)
    numbers = numbers or (isinstance(scores, torch.Tensor) and scores.dim() == 1)
    return numbers and hasattr(texts, "__len__") and len(scores) == len(texts)


def is_score(part) -> bool:
    return isinstance(part, float) or (
        isinstance(part, torch.Tensor) and part.is_floating_point() and part.numel() == 1
    )


def score_in(part) -> float | None:
    """The score in a pair or triple of sentence, score and perhaps state."""
    scores = [float(p) for p in part if is_score(p)] if isinstance(part, (list, tuple)) and len(part) <= 4 else []
    return scores[0] if len(scores) == 1 else None


def rigged(recognised: Recognised, symbols: Symbols, test: BeamTest) -> Rigged:
    """A model with the probabilities of a test's tree; after a symbol alone comes `p`, so that a lost state shows."""
    tree = symbols.tree(test.branches)
    letters = {symbol for odds in tree.values() for symbol in odds} - {symbols.eos}
    alone = {(letter,): {symbols.codes("p")[0]: 1.0} for letter in sorted(letters)[:20]}
    return rig(recognised, symbols.count, alone | tree)


@dataclass
class Outcome:
    """What may be meant as the best sentence of a beam search in one test's tree."""

    test: BeamTest
    model: Rigged
    texts: list[str]

    @property
    def right(self) -> bool:
        return any(text.split(EOS_SIGN)[0] == self.test.expected for text in self.texts)


def search_in(test: BeamTest, function, cell: Recognised, symbols: Symbols) -> Outcome:
    model = rigged(cell, symbols, test)
    result = call(function, model, symbols, 0, start=test.prompt, maxlen=test.maxlen, k=test.k)
    texts = [continuation(text, test.prompt) for text in best_texts(result, symbols)]
    if not texts:
        raise Unclear(f"it returns {type(result).__name__}")
    return Outcome(test, model, texts)


def try_beam(function, cell: Recognised, symbols: Symbols) -> list[Outcome]:
    """The outcomes of all tests; raises what one of them raises."""
    outcomes = []
    for test in BEAM_TESTS:
        try:
            outcomes.append(search_in(test, function, cell, symbols))
        except BaseException:  # whatever a student's function raises
            if len(test.prompt) == 1:  # some take one letter only
                raise
    return outcomes


def known_mistake(outcomes: list[Outcome], symbols: Symbols) -> str:
    """The known mistake that explains most tests' outcomes; "" if none explains a failing one."""
    best, most = "", 0
    for mistake in BEAM_MISTAKES:
        explained, failing = 0, 0
        for outcome in outcomes:
            test, ends = outcome.test, set()
            for lead in symbols.leads:
                prefix = lead + symbols.codes(test.prompt)
                beams = search(outcome.model, prefix, symbols.eos, test.k, test.maxlen, mistake)
                ends.add(symbols.text(beams[0]).split(EOS_SIGN)[0][:6] if beams else "")
            here = any(text.split(EOS_SIGN)[0][:6] in ends for text in outcome.texts)
            explained += here
            failing += here and not outcome.right
        only_ended = failing == 1 and mistake == "grow"  # then it is nothing but that
        if failing and (explained > most or (only_ended and explained == most)):
            best, most = mistake, explained
    return best


def judge(outcomes: list[Outcome], symbols: Symbols) -> Verdict:
    """The verdict on a beam search that failed with one cell."""
    failing = next(outcome for outcome in outcomes if not outcome.right)
    test, cell, known = failing.test, failing.model.recognised, known_mistake(outcomes, symbols)
    if known == "length":
        return Verdict(NOT_JUDGED, "its scores seem to be divided by the length")
    if not known and cell.in_library:
        return Verdict(NOT_JUDGED, "it was tried with torch.nn's cells only, and does not find the likeliest sentence")
    named = BEAM_MISTAKES[known] if known else "it does not find the likeliest sentence"
    words = f"with {cell.name}, k = {test.k}, prompt {test.prompt!r}, {test.words}"
    got = readable(failing.texts[0])
    name, number = cell.name.removeprefix("torch.nn."), BEAM_TESTS.index(test)
    how = f"to get that model: python -i -m tests.marker.example FOLDER beam {name} {number}"
    return wrong(f"{named}: {words}: expected {test.expected!r}, got {got!r}", how)


def check_beam(solution: Solution, cells: dict) -> Verdict:
    """Question 6: generate_beam; it must be right with every cell of the folder that it takes."""
    function, symbols = solution.find("beam"), Symbols.of(solution)
    found, errors, at_fault = try_cells(solution, cells, lambda cell: try_beam(function, cell, symbols))
    passed, failures, warnings = [], {}, []
    for outcomes in found:
        cell = outcomes[0].model.recognised
        if all(outcome.right for outcome in outcomes):
            passed.append(cell)
        else:
            failures[cell.name] = outcomes
    if passed and not knows_lstm(solution, "beam"):  # it was written for the others
        warnings = [f"with {name} it is wrong" for name in failures if "LSTM" in name]
        failures = {name: outcomes for name, outcomes in failures.items() if "LSTM" not in name}
    if failures:
        return judge(next(iter(failures.values())), symbols)
    if not passed:
        return failed(solution, errors, at_fault)
    mistake = length_mistake(function, lambda: search_in(LONG, function, passed[0], symbols).texts[0])
    return wrong(mistake, warnings=warnings) if mistake else Verdict(RIGHT, not_run(errors), warnings)
