"""Question 7: p_nucleus."""

import inspect
from dataclasses import dataclass

import torch
from torch import nn

from .generation import Unclear, is_code
from .loader import Solution
from .report import MISSING, NOT_JUDGED, RIGHT, Verdict, wrong
from .sandbox import attempt

P = (0.05, 0.5, 0.15, 0.3)


def nucleus(p: torch.Tensor, alpha: float, extra: int = 0) -> torch.Tensor:
    """The nucleus of a distribution; `extra` symbols more (or fewer, if negative)."""
    ranked, order = p.sort(descending=True)
    count = int((ranked.cumsum(0) - ranked < alpha - 1e-6).sum()) + extra
    kept = torch.zeros_like(p)
    kept[order[: max(count, 1)]] = ranked[: max(count, 1)]
    return kept / kept.sum()


def distribution(result, symbols: int) -> tuple[torch.Tensor | None, bool]:
    """Probabilities (V,) from a distribution, its logarithm, masked logits, or probabilities with indices; None if
    it is none of these. And whether it is to be a distribution: in pairs, only their proportions count."""
    whole = True
    if isinstance(result, (tuple, list)) and len(result) == 2:
        parts = [torch.as_tensor(part).squeeze().reshape(-1) for part in result]
        values = next((part for part in parts if part.is_floating_point()), None)
        codes = next((part for part in parts if not part.is_floating_point() and part.dtype != torch.bool), None)
        if values is None or codes is None or len(values) != len(codes):
            return None, False
        result = torch.full((symbols,), float("-inf") if (values < 0).any() else 0.0)
        result[codes.long()] = values.float()
        whole = False
    if not isinstance(result, torch.Tensor) or not result.is_floating_point() or result.numel() != symbols:
        return None, False
    p = result.detach().reshape(-1)
    if not p.isnan().any() and (p < 0).any():
        p = p.exp() if abs(p.exp().sum() - 1) < 1e-3 else p.softmax(0)
    return p, whole


def drawn(function, h, symbols: int) -> torch.Tensor:
    """Frequencies (V,) of what a `compute` draws, if it draws codes."""
    counts = torch.zeros(symbols)
    for seed in range(300):
        torch.manual_seed(seed)
        counts[int(torch.as_tensor(function(h.clone())).reshape(-1)[0])] += 1
    return counts / counts.sum()


@dataclass
class Asked:
    """What `compute` gave for one distribution: probabilities, perhaps by counting draws."""

    p: torch.Tensor
    counted: bool = False
    whole: bool = True  # they are to sum to 1

    def equals(self, other: torch.Tensor) -> bool:
        """True for the same distribution, up to a factor."""
        scaled = self.p / self.p.sum() if self.p.sum() > 0 else self.p
        if self.counted:
            return torch.allclose(scaled, other, atol=0.13) and torch.equal(scaled > 0, other > 0.001)
        return torch.allclose(scaled, other, atol=2e-4)


def ask(make, p: torch.Tensor, alpha) -> tuple[Asked | None, BaseException | None]:
    """(`p_nucleus(decoder, alpha)(h)` where the decoder gives the logits of p, None), or (None, what it raised)."""

    def run(h):
        compute = make(nn.Identity(), alpha)
        torch.manual_seed(0)
        result = compute(h.clone())
        found, whole = distribution(result, len(p))
        if found is not None:
            return Asked(found, whole=whole)
        if is_code(result):
            return Asked(drawn(compute, h, len(p)), counted=True)
        if result is not None:
            raise Unclear(f"compute returns {type(result).__name__} of an unknown form")

    answers = [attempt(run, p.log().reshape(shape)) for shape in ((1, -1), (-1,), (1, 1, -1))]
    return next((answer for answer in answers if answer[1] is None), answers[0])


def mistaken_nuclei(p: torch.Tensor, alpha: float) -> list[tuple[str, torch.Tensor]]:
    """What known mistakes give."""
    right = nucleus(p, alpha)
    masked = torch.where(right > 0, p, torch.zeros(()))
    ascending, order = p.sort()
    mass = ascending.cumsum(0)
    counts = [(mass < alpha).sum() + 1, (mass <= alpha).sum(), (mass - ascending < alpha).sum()]
    unlikely = [torch.zeros_like(p).scatter(0, order[:count], ascending[:count]) for count in counts]
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
        *[("the order is ascending: unlikely symbols are kept", q / q.sum().clamp(min=1e-9)) for q in unlikely],
    ]  # fmt: skip


def nucleus_mistake(p: torch.Tensor, answers: dict) -> str:
    """The name of the mistake that gives the answers for every α."""
    if any(got is None or got.p.isnan().any() or got.p.sum() == 0 for got in answers.values()):
        return "the symbol that crosses α is dropped: nothing is left where α is below the largest probability"
    known = {alpha: mistaken_nuclei(p, alpha) for alpha in answers}
    bad = next(alpha for alpha, got in answers.items() if not got.equals(nucleus(p, alpha)))
    for alphas in (answers, [bad]):
        for k, (name, _) in enumerate(known[bad]):
            if all(answers[alpha].equals(known[alpha][k][1]) for alpha in alphas):
                return name
    return "it is not the nucleus"


def check_nucleus(solution: Solution, cells: dict) -> Verdict:
    """Question 7: p_nucleus, of a decoder that gives logits, or else probabilities."""
    make = solution.find("nucleus")
    parameters = inspect.signature(make).parameters
    if len([q for q in parameters.values() if q.default is q.empty]) > 2:
        return Verdict(NOT_JUDGED, f"its parameters are {', '.join(parameters)}")
    verdict = judge(solution, make)
    if verdict.status in (RIGHT, MISSING):
        return verdict
    other = judge(solution, lambda decoder, alpha: make(nn.Sequential(decoder, nn.Softmax(-1)), alpha))
    return other if other.status == RIGHT else verdict


def judge(solution: Solution, make) -> Verdict:
    """The verdict on `make(decoder, alpha)`, whose decoder gives logits."""
    p, answers = torch.tensor(P), {}
    for alpha in (0.75, 0.4, 0.9):
        answers[alpha], error = ask(make, p, alpha)
        if error is not None and alpha == 0.75:
            got, _ = ask(make, p, 2)
            if got is not None and got.equals(nucleus(p, 0.75)):
                return wrong("it keeps k symbols (top-k) in place of a mass α: α = 0.75 raises; 2 keeps two symbols")
            return solution.failure([error], "for states of every shape: ")
        if error is None and answers[alpha] is None:
            return Verdict(MISSING, "compute returns None")
    mistakes = [*small_mistakes(p, answers), *at_one(make)]
    if not mistakes:
        return Verdict(RIGHT)
    return wrong(*mistakes, "p_nucleus(torch.nn.Identity(), α)(h), where h = torch.tensor([p]).log()")


def small_mistakes(p: torch.Tensor, answers: dict) -> list[str]:
    """What is wrong with the nuclei of one small distribution."""
    for alpha, got in answers.items():
        expected = nucleus(p, alpha)
        right = got is not None and got.equals(expected)
        if not right or (got.whole and abs(got.p.sum() - 1) > 1e-3):
            mistake = "the nucleus is not renormalised" if right else nucleus_mistake(p, answers)
            seen = "an error" if got is None else rounded(got.p)
            return [f"{mistake}: p = {list(P)}, α = {alpha}: expected {rounded(expected)}, got {seen}"]
    return []


def at_one(make) -> list[str]:
    """What is wrong at α = 1, which must leave the whole distribution, although float sums stay below 1."""
    for seed in range(30):
        p = torch.randn(97, generator=torch.Generator().manual_seed(seed)).softmax(0)
        got, error = ask(make, p, 1.0)
        shown = f"torch.manual_seed({seed}); p = torch.randn(97).softmax(0), α = 1"
        if error is not None:
            return [f"α = 1 fails: {type(error).__name__}: {str(error)[:100]}: {shown}"]
        if got.counted:
            return [] if (got.p > 0).sum() > 20 else [f"α = 1 becomes greedy: {shown}: one symbol is drawn always"]
        if not got.equals(p):
            kept = int((got.p > 0).sum())
            mistake = "α = 1 becomes greedy" if kept <= 2 else "α = 1 loses symbols"
            return [f"{mistake}: {shown}: expected all of it, {kept} symbols are left"]
    return []


def rounded(p: torch.Tensor) -> list[float]:
    return [round(value, 3) for value in p.tolist()[: len(P)]]
