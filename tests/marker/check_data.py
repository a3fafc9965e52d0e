"""Questions 1 and 2: batches, and the masked loss."""

from collections.abc import Callable

import torch
from torch import nn

from .cells import takes
from .check_embedding import called, calls_in
from .generation import Symbols
from .loader import Solution
from .report import MISSING, NOT_JUDGED, RIGHT, Verdict, wrong
from .sandbox import TookTooLong, attempt

TEXT = "C'est. Un. Test."  # the handout's example
SAMPLES = [[12, 13, 14], [15], [16, 17]]


def sentences(solution: Solution, text: str) -> list:
    """The items of the folder's TextDataset; none if it fails, for it is the handout's own."""

    def items():
        dataset = solution.find("dataset")(text)
        return [dataset[i] for i in range(len(dataset))]

    return attempt(items)[0] or []


def dataset_mistake(solution: Solution) -> str:
    """Sentences that TextDataset loses, in words, or ""."""
    for text, times, count in ((TEXT, 1, 3), ("Un. Un. Deux. Trois. Quatre.", 1, 5), ("Un. ", 1500, 1500)):
        found = len(sentences(solution, text * times))
        if 0 < found < count:
            shown = repr(text) + f" * {times}" * (times > 1)
            return f"sentences are lost: len(TextDataset({shown})): expected {count}, got {found}"
    return ""


# What a collate function may be given for each sentence.
FORMS: list[Callable] = [
    lambda s: torch.tensor(s), lambda s: list(s), lambda s: (torch.tensor(s), len(s)),
    lambda s: (torch.tensor(s), torch.tensor(len(s))), lambda s: (torch.tensor(s), torch.tensor(s)),
]  # fmt: skip


def matrices_in(result) -> list[torch.Tensor]:
    """What may be meant as the batch: a matrix, the first of several, or two that are one without its last row and
    one without its first, joined."""
    parts = list(result) if isinstance(result, (tuple, list)) else [result]
    found = [part for part in parts if isinstance(part, torch.Tensor) and part.dim() == 2]
    if len(found) >= 2 and torch.equal(found[0][1:], found[1][:-1]):
        return [torch.cat([found[0], found[1][-1:]])]
    return found[:1]


def columns_of(batch: torch.Tensor) -> list[list[int]]:
    """The sentences of a (T, B) batch, sorted: their order is free."""
    return sorted(column.long().tolist() for column in batch.T)


def layout_mistake(batch, expected, eos: int) -> str:
    """In words, what is wrong with a batch; "" if nothing."""
    got, right = columns_of(batch), columns_of(expected)
    ends = [column[1:] for column in got] if len({column[0] for column in got}) == 1 else got  # a symbol opens each
    if right in (got, ends):
        return ""
    if columns_of(batch.T) == right:
        return "the batch is B × T, not T × B"
    if len(got) != len(SAMPLES):
        return "sentences are lost" if len(got) < len(SAMPLES) else "there are more columns than sentences"
    if columns_of(batch[: len(expected)]) == right:
        return "a row too many: all padding"
    if all(eos not in column for column in ends):
        return "no EOS ends the sentences, so EOS is never learnt"
    if any(eos not in column for column in ends):
        return "EOS is missing after the longest sentence"
    if all(column[-1] == eos for column in ends):
        return "EOS comes after the padding"
    return "the layout is not: sentence, EOS, padding"


def check_batches(solution: Solution, cells: dict) -> Verdict:
    """Question 1: pad_collate_fn, and the sentences of TextDataset."""
    function, symbols = solution.find("batches"), Symbols.of(solution)
    pad, eos = symbols.pad, symbols.eos
    items = sentences(solution, TEXT)
    first = items[0][0] if items and isinstance(items[0], tuple) else items[0] if items else None
    ended = isinstance(first, torch.Tensor) and first.dim() == 1 and int(first[-1]) == eos
    samples = [[*s, eos] if ended else s for s in SAMPLES]  # pad_collate_fn shall not add it then
    forms = FORMS[2:] + FORMS[:2] if items and isinstance(items[0], tuple) else FORMS  # as the dataset gives them
    expected = nn.utils.rnn.pad_sequence([torch.tensor([*s, eos]) for s in SAMPLES], padding_value=pad)
    answers = [attempt(function, [form(sample) for sample in samples]) for form in forms]
    batches = [(not layout_mistake(b, expected, eos), n, b) for n, (r, _) in enumerate(answers) for b in matrices_in(r)]
    if not batches:
        returned = {type(result).__name__ for result, error in answers if error is None}
        if returned == {"NoneType"}:
            return Verdict(MISSING, "it returns None")
        if returned:
            return Verdict(NOT_JUDGED, f"it returns {', '.join(sorted(returned))}, no matrix")
        return solution.failure([answers[0][1]])
    right, number, batch = max(batches, key=lambda found: (found[0], -found[1]))
    if number and not right:
        return Verdict(NOT_JUDGED, "what it takes for a sentence is not understood")
    mistakes, warnings = [mistake] if (mistake := dataset_mistake(solution)) else [], []
    if not right:
        shown = f"pad_collate_fn([torch.tensor(s) for s in {samples}])"
        got = f"expected {expected.tolist()}, got {batch.long().tolist()}"
        mistakes.append(f"{layout_mistake(batch, expected, eos)}: {shown}: {got}")
    if batch.dtype != torch.int64:
        integer = batch.dtype == torch.int32
        wants = "cross_entropy takes int64 targets" if integer else "nn.Embedding takes integers only"
        warnings.append(f"the batch is {str(batch.dtype)[6:]}, not int64: {wants}")
    return wrong(*mistakes, warnings=warnings) if mistakes else Verdict(RIGHT, warnings=warnings)


PAD = 0


def flat(output, target):
    return output.reshape(-1, output.shape[-1]), target.reshape(-1)


# Layouts of the arguments: from (T, B, V) and (T, B) to what the function may want.
LAYOUTS: dict[str, Callable] = {
    "(T, B, V)": lambda o, y: (o, y),
    "(T·B, V)": flat,
    "(T, V, B)": lambda o, y: (o.transpose(1, 2), y),
    "(B, T, V)": lambda o, y: (o.transpose(0, 1), y.T),
    "(B, V, T)": lambda o, y: (o.permute(1, 2, 0), y.T),
    "(T, B, V) and (B, T)": lambda o, y: (o, y.T),
    "(B, T, V) and (T, B)": lambda o, y: (o.transpose(0, 1), y),
    "(T + 1, B, V)": lambda o, y: (torch.cat([o, o[:1].roll(1, -1)]), y),
    "(1 + T, B, V)": lambda o, y: (torch.cat([o[:1].roll(1, -1), o]), y),
    "(T, B, V), probabilities": lambda o, y: (o.exp(), y),
    "(T·B, V), probabilities": lambda o, y: flat(o.exp(), y),
}
# What may be meant where the handout's shapes run, too.
MEANT = ("(T, B, V)", "(T, B, V) and (B, T)", "(B, T, V) and (T, B)", "(T, B, V), probabilities")


def symbol_losses(output, target):
    """Cross-entropy of every symbol: (T, B)."""
    return -output.log_softmax(-1).gather(-1, target[..., None])[..., 0]


def loss_example(seed: int, lengths=(4, 2, 1), v: int = 7):
    """Log-probabilities (T, B, V) and targets (T, B) with padding: right for losses of either."""
    g = torch.Generator().manual_seed(seed)
    t, b = max(lengths), len(lengths)
    target = torch.randint(1, v, (t, b), generator=g)
    for column, length in enumerate(lengths):
        target[length:, column] = PAD
    return (torch.randn(t, b, v, generator=g) * 2).log_softmax(-1), target


def right_losses(output, target) -> list[float]:
    """Mean and sum over the real symbols; also where the function itself shifts the target by one."""
    found = []
    for o, y in ((output, target), (output[:-1], target[1:])):
        real = y != PAD
        losses = symbol_losses(o, y)[real]
        found += [losses.mean().item(), losses.sum().item()]
    return found


def wrong_losses(o, y) -> list[tuple[str, float]]:
    real, losses = y != PAD, symbol_losses(o, y)
    integer, flat_losses = real.long(), losses.reshape(-1)
    masked = symbol_losses(o * real[..., None], y)
    sure = symbol_losses(o * (o.argmax(-1) != PAD)[..., None], y)
    indexed = flat_losses[integer.reshape(-1)]
    values = {
        "padding is counted": [losses.mean(), losses.sum(), losses.sum() / real.sum(), losses.sum(0).mean()],
        "the mean is over the padded length, not over the real symbols": [(losses * real).mean()],
        "the mean is over the sentences, not over the real symbols": [(losses * real).sum() / y.shape[1]],
        "the mean is over the steps, not over the real symbols": [(losses * real).sum() / y.shape[0]],
        "it is a mean of the sentences' means": [((losses * real).sum(0) / real.sum(0).clamp(min=1)).mean()],
        "it is a mean of the steps' means": [((losses * real).sum(1) / real.sum(1).clamp(min=1)).mean()],
        "the mask is on the logits: padding still counts": [masked.mean(), masked.sum(), masked.sum() / real.sum()],
        "the mask comes from the predictions, not from the target": [losses[o.argmax(-1) != PAD].mean(), sure.mean()],
        "a 0/1 mask of integers is used as an index": [
            indexed.mean(), indexed.sum(), indexed.sum() / real.sum(), losses[integer].mean(),
            losses[integer].sum() / real.sum(),
        ],
        "the mask is the wrong way round: only padding counts": [losses[~real].mean()],
    }  # fmt: skip
    return [(mistake, value.item()) for mistake, found in values.items() for value in found]


def third_arguments(target) -> list[tuple]:
    """What may follow output and target: the code of padding, a mask, or nothing."""
    mask = target != PAD
    return [(PAD,), (mask.float(),), (mask,), ()]


Way = tuple[str, int]  # a layout, and which third argument


def call_loss(function, way: Way, output, target):
    o, y = LAYOUTS[way[0]](output.clone(), target.clone())
    return attempt(function, o.contiguous(), y.contiguous(), *third_arguments(y)[way[1]])


def number(result) -> float | None:
    if isinstance(result, torch.Tensor) and result.numel() == 1:
        return result.item()
    return float(result) if isinstance(result, (int, float)) else None


def close(a: float, b: float) -> bool:
    return abs(a - b) < 1e-4 * max(1.0, abs(b))


def loss_results(function) -> tuple[dict[Way, object], list]:
    """The result of every way to call it that runs, and the errors of the others."""
    output, target = loss_example(0)
    results, errors = {}, []
    for third, more in enumerate(third_arguments(target)):
        for layout in LAYOUTS if takes(function, output, target, *more) else ():
            result, error = call_loss(function, (layout, third), output, target)
            if isinstance(error, TookTooLong):
                return {}, [error]
            if error is None:
                results[layout, third] = result
            else:
                errors.append(error)
        if results:
            break
    return results, errors


def loss_fails(solution: Solution, errors: list) -> Verdict:
    if not errors:
        return Verdict(NOT_JUDGED, "its parameters are not understood")
    calls = calls_in(solution.definition("loss")[1])
    if any(called(call) == "CrossEntropyLoss" and len(call.args) > 1 for call in calls):
        builds = "CrossEntropyLoss(output, target, …) builds a loss, it does not compute one"
        return wrong(f"{builds}; it raises in every layout: {solution.where(errors[0])}")
    return solution.failure(errors, "in no layout of output and target: ")


def check_loss(solution: Solution, cells: dict) -> Verdict:
    """Question 2: maskedCrossEntropy."""
    function = solution.find("loss")
    if isinstance(function, type) or not callable(function):
        return Verdict(NOT_JUDGED, "it is no function")
    results, errors = loss_results(function)
    if not results:
        return loss_fails(solution, errors)
    if all(result is None for result in results.values()):
        return Verdict(MISSING, "it returns None")
    handout = {way: result for way, result in results.items() if way[0] == "(T, B, V)"}
    meant = [way for way in results if way[0] in MEANT or not handout]
    if any(holds(function, way) for way in meant):
        return Verdict(RIGHT)
    return name_loss(function, handout or results)


def holds(function, way: Way) -> bool:
    """True if a layout gives the mean or the sum on several examples."""
    for seed, lengths in ((0, (4, 2, 1)), (1, (5, 1, 3)), (2, (3, 3, 3)), (3, (6, 1, 2))):
        output, target = loss_example(seed, lengths)
        got = number(call_loss(function, way, output, target)[0])
        if got is None or not any(close(got, right) for right in right_losses(output, target)):
            return False
    return True


def smallest(function, way: Way) -> str:
    """The smallest example that shows a wrong loss, to be pasted: arguments, expected, got."""
    for target in ([[1, 2], [1, 0]], [[1, 2, 1], [2, 1, 0], [1, 0, 0]]):
        target = torch.tensor(target)
        output = torch.arange(3.0 * target.numel()).sin().reshape(*target.shape, 3).log_softmax(-1)
        got, (mean, total) = number(call_loss(function, way, output, target)[0]), right_losses(output, target)[:2]
        if got is None or not (close(got, mean) or close(got, total)):
            break
    shape = ", ".join(map(str, output.shape))
    given = f"output = torch.arange({output.numel()}.).sin().reshape({shape}).log_softmax(-1)"
    layout = "" if way[0] == "(T, B, V)" else f", in the layout {way[0]}"
    seen = "more than one number" if got is None else f"{got:.4f}"
    expected = f"expected {mean:.4f} (mean) or {total:.4f} (sum), got {seen}"
    return f"{given}, target = torch.tensor({target.tolist()}) (T × B, 0 is padding){layout}: {expected}"


def name_loss(function, results: dict[Way, object]) -> Verdict:
    """The verdict on a loss that runs and is wrong."""
    if all(isinstance(result, nn.Module) for result in results.values()):
        kind = type(next(iter(results.values()))).__name__
        return wrong(f"it returns an object, {kind}: it builds a loss, it does not compute one")
    for way, result in results.items():
        if isinstance(result, torch.Tensor) and result.numel() > 1:
            return wrong(f"it is not reduced to one number: {smallest(function, way)}")
    found = {way: number(result) for way, result in results.items() if number(result) is not None}
    for way, got in found.items():
        for mistake, value in wrong_losses(*loss_example(0)):
            if close(got, value):
                return wrong(f"{mistake}: {smallest(function, way)}")
    way = next(iter(found), ("", 0))
    if way[0] != "(T, B, V)":
        return Verdict(NOT_JUDGED, "it gives what is not understood")
    return wrong(f"it is neither the mean nor the sum over the real symbols: {smallest(function, way)}")
