"""Question 7: p_nucleus."""

import inspect
from dataclasses import dataclass

import torch
from torch import nn

from .generation import Unclear
from .loader import Solution, empty
from .report import CANNOT_RUN, MISSING, NOT_JUDGED, RIGHT, Verdict, wrong
from .sandbox import captured, time_limit

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
    if empty(solution, "nucleus"):
        return Verdict(MISSING)
    make, p, answers = solution.find("nucleus"), torch.tensor(P), {}
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
