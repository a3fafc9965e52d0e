"""Questions 1, 2 and 4: batches, the masked loss, and whether the embedding is trained."""

import ast
import inspect
from collections.abc import Callable

import torch

from .loader import Solution, empty, in_source
from .report import CANNOT_RUN, MISSING, NOT_JUDGED, RIGHT, Verdict, wrong
from .sandbox import time_limit

# ------------------------------------------------------------------------------------------ batches

TEXT = "C'est. Un. Test."  # the handout's example


def sentences(solution: Solution, text: str) -> list | None:
    """The items of the folder's TextDataset, or None if it gives none."""
    kind = solution.find("dataset")
    try:
        with time_limit():
            dataset = kind(text)
            return [dataset[i] for i in range(len(dataset))]
    except BaseException:
        return None  # the dataset is the handout's own, not asked for


def dataset_mistake(solution: Solution) -> Verdict | None:
    """Sentences that TextDataset loses, or None."""
    for text, count in ((TEXT, 3), ("Un. Un. Deux. Trois. Quatre.", 5)):
        found = sentences(solution, text)
        if found is not None and len(found) < count:
            return wrong("sentences are lost", f"len(TextDataset({text!r})): expected {count}, got {len(found)}")
    return None


def ends_with(samples, eos: int) -> bool:
    """True if a dataset's sentences end with EOS already."""
    return bool(samples) and torch.is_tensor(samples[0]) and samples[0].dim() == 1 and int(samples[0][-1]) == eos


def collated(solution: Solution, function, samples):
    """What pad_collate_fn gives for samples: its first tensor, or the error of the first try."""
    first_error = None
    for form in (lambda s: s.clone(), lambda s: s.tolist(), lambda s: (s.clone(), s.clone())):
        try:
            with time_limit():
                result = function([form(sample) for sample in samples])
        except BaseException as error:
            first_error = first_error or error
            continue
        if isinstance(result, (tuple, list)) and result and isinstance(result[0], torch.Tensor):
            result = result[0]
        return result
    return first_error


def columns_of(batch: torch.Tensor) -> list[list[int]]:
    """The sentences of a (T, B) batch, sorted: their order is free."""
    return sorted(column.long().tolist() for column in batch.T)


def layout_mistake(batch, samples, pad: int, eos: int) -> str:
    """In words, what is wrong with a batch; "" if nothing."""
    longest = max(map(len, samples)) + 1
    right = sorted([*s, eos, *[pad] * (longest - len(s) - 1)] for s in samples)
    got = columns_of(batch)
    if got == right:
        return ""
    if columns_of(batch.T) == right:
        return "the batch is B × T, not T × B"
    if len(got) != len(samples):
        return "sentences are lost" if len(got) < len(samples) else "there are more columns than sentences"
    if len(batch) > longest and columns_of(batch[:longest]) == right:
        return "a row too many: all padding"
    if [column[1:] for column in got] == [c[: len(got[0]) - 1] for c in right] and len({c[0] for c in got}) == 1:
        return ""  # a symbol opens each sentence
    bodies = [[code for code in column if code not in (pad, eos)] for column in got]
    if sorted(bodies) != sorted(list(s) for s in samples):
        return "characters of the sentences are lost or changed"
    if all(eos not in column for column in got):
        return "no EOS ends the sentences, so EOS is never learnt"
    if any(eos not in column for column in got):
        return "EOS is missing after the longest sentence"
    if any(pad in column[: column.index(eos)] for column in got):
        return (
            "EOS comes after the padding" if all(column[-1] == eos for column in got) else "padding stands before EOS"
        )
    return "the layout is not: sentence, EOS, padding"


def check_batches(solution: Solution) -> Verdict:
    """Question 1: pad_collate_fn, and the sentences of TextDataset."""
    if empty(solution, "batches"):
        return Verdict(MISSING)
    function = solution.find("batches")
    pad, eos = solution.value("PAD_IX", 0), solution.value("EOS_IX", 1)
    lost = dataset_mistake(solution)
    if lost:
        return lost
    samples = [[12, 13, 14], [15], [16, 17]]
    ended = ends_with(sentences(solution, TEXT), eos)  # then pad_collate_fn shall not add it
    tensors = [torch.tensor([*s, eos] if ended else s) for s in samples]
    result = collated(solution, function, tensors)
    if isinstance(result, BaseException):
        return Verdict(CANNOT_RUN if in_source(solution, result) else NOT_JUDGED, solution.where(result))
    if result is None:
        return Verdict(MISSING, "it returns None")
    if not isinstance(result, torch.Tensor) or result.dim() != 2:
        return Verdict(NOT_JUDGED, f"it returns {type(result).__name__}, not one matrix")
    mistake = layout_mistake(result, samples, pad, eos)
    if mistake:
        expected = [[*s, eos, *[pad] * (3 - len(s))] for s in samples]
        return wrong(
            mistake, f"sentences {samples}, T × B: expected {transposed(expected)}, got {result.long().tolist()}"
        )
    verdict = Verdict(RIGHT)
    if result.dtype not in (torch.int64, torch.int32):
        verdict.warnings.append(f"the batch is {str(result.dtype)[6:]}, not int64: nn.Embedding takes integers only")
        verdict.mistakes.append("not int64")
    return verdict


def transposed(rows: list[list[int]]) -> list[list[int]]:
    return [list(row) for row in zip(*rows, strict=True)]


# --------------------------------------------------------------------------------------------- loss

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
}


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
    """What known mistakes give."""
    real, losses = y != PAD, symbol_losses(o, y)
    some = real.sum(0) > 0
    integer, flat_losses = real.long(), losses.reshape(-1)
    masked = symbol_losses(o * real[..., None], y)
    sure = symbol_losses(o * (o.argmax(-1) != PAD)[..., None], y)
    indexed = flat_losses[integer.reshape(-1)]
    return [
        ("padding is counted", losses.mean()), ("padding is counted", losses.sum()),
        ("padding is counted", losses.sum() / real.sum()), ("padding is counted", losses.sum(0).mean()),
        ("the mean is over the padded length, not over the real symbols", (losses * real).mean()),
        ("the mean is over the sentences, not over the real symbols", (losses * real).sum() / y.shape[1]),
        ("the mean is over the steps, not over the real symbols", (losses * real).sum() / y.shape[0]),
        ("it is a mean of the sentences' means", ((losses * real).sum(0) / real.sum(0).clamp(min=1))[some].mean()),
        ("it is a mean of the steps' means", ((losses * real).sum(1) / real.sum(1).clamp(min=1)).mean()),
        ("the mask is on the logits: padding still counts", masked.mean()),
        ("the mask is on the logits: padding still counts", masked.sum()),
        ("the mask is on the logits: padding still counts", masked.sum() / real.sum()),
        ("the mask comes from the predictions, not from the target", losses[o.argmax(-1) != PAD].mean()),
        ("the mask comes from the predictions, not from the target", sure.mean()),
        ("a 0/1 mask of integers is used as an index", indexed.mean()),
        ("a 0/1 mask of integers is used as an index", indexed.sum()),
        ("a 0/1 mask of integers is used as an index", indexed.sum() / real.sum()),
        ("a 0/1 mask of integers is used as an index", losses[integer].mean()),
        ("a 0/1 mask of integers is used as an index", losses[integer].sum() / real.sum()),
        ("the mask is the wrong way round: only padding counts", losses[~real].mean()),
    ]  # fmt: skip


def third_arguments(target) -> list[tuple]:
    """What may follow output and target: the code of padding, a mask, or nothing."""
    mask = target != PAD
    return [(PAD,), (mask.float(),), (mask,), ()]


def call_loss(function, layout: str, third: int, output, target):
    """The loss in one layout."""
    o, y = LAYOUTS[layout](output.clone(), target.clone())
    with time_limit():
        return function(o.contiguous(), y.contiguous(), *third_arguments(y)[third])


def number(result) -> float | None:
    """A loss as a number, or None if it is none."""
    if isinstance(result, torch.Tensor) and result.numel() == 1:
        return result.item()
    return float(result) if isinstance(result, (int, float)) else None


def close(a: float, b: float) -> bool:
    return abs(a - b) < 1e-4 * max(1.0, abs(b))


def loss_results(solution: Solution, function):
    """((layout, third), result) of every way that runs, and the errors of the others."""
    output, target = loss_example(0)
    results, errors = {}, []
    for third in range(4):
        for layout in LAYOUTS:
            try:
                inspect.signature(function).bind(*[None] * (2 + len(third_arguments(target)[third])))
                results[layout, third] = call_loss(function, layout, third, output, target)
            except BaseException as error:
                errors.append(error)
        if results:
            break
    return results, errors


def loss_fails(solution: Solution, errors: list) -> Verdict:
    """The verdict on a loss that raises in every layout."""
    definition = solution.definition("loss")
    own = [error for error in errors if in_source(solution, error) or "(" in solution.where(error)]
    called = [
        call for call in ast.walk(definition[1]) if isinstance(call, ast.Call) and len(call.args) >= 2
        and (getattr(call.func, "id", "") or getattr(call.func, "attr", "")) == "CrossEntropyLoss"
    ]  # fmt: skip
    if called:
        where = f"{definition[0].name}:{called[0].lineno}"
        return wrong("CrossEntropyLoss(output, target, …) builds a loss, it does not compute one",
                     f"it raises in every layout; {where}: {solution.where((own or errors)[0])}")  # fmt: skip
    if own:
        return Verdict(CANNOT_RUN, f"in no layout of output and target: {solution.where(own[0])}")
    return Verdict(NOT_JUDGED, solution.where(errors[0]) if errors else "")


def check_loss(solution: Solution) -> Verdict:
    """Question 2: maskedCrossEntropy."""
    if empty(solution, "loss"):
        return Verdict(MISSING)
    function = solution.find("loss")
    if isinstance(function, type) or not callable(function):
        return Verdict(NOT_JUDGED, "it is no function")
    results, errors = loss_results(solution, function)
    if not results:
        return loss_fails(solution, errors)
    if all(result is None for result in results.values()):
        return Verdict(MISSING, "it returns None")
    handout = {way: result for way, result in results.items() if way[0] == "(T, B, V)"}
    results = handout or results  # what runs on the handout's shapes is judged on those
    for (layout, third), result in results.items():
        if number(result) is not None and holds(function, layout, third):
            return Verdict(RIGHT)
    return name_loss(function, results)


def holds(function, layout: str, third: int) -> bool:
    """True if a layout gives the mean or the sum on several examples."""
    for seed, lengths in ((0, (4, 2, 1)), (1, (5, 1, 3)), (2, (3, 3, 3)), (3, (6, 1, 2))):
        output, target = loss_example(seed, lengths)
        try:
            got = number(call_loss(function, layout, third, output, target))
        except BaseException:
            return False
        if got is None or not any(close(got, right) for right in right_losses(output, target)):
            return False
    return True


def smallest(function, way) -> str:
    """The smallest example that shows a wrong loss: targets, expected, got."""
    for lengths in ((2, 1), (4, 2, 1)):
        output, target = loss_example(0, lengths)
        got, (mean, total) = (number(call_loss(function, *way, output, target)), right_losses(output, target)[:2])
        if got is None or not (close(got, mean) or close(got, total)):
            break
    seen = "more than one number" if got is None else f"{got:.4f}"
    expected = f"expected {mean:.4f} (mean) or {total:.4f} (sum)"
    return f"targets {target.T.tolist()} (B × T, 0 is padding): {expected}, got {seen}"


def name_loss(function, results) -> Verdict:
    """The verdict on a loss that runs and is wrong."""
    output, target = loss_example(0)
    for way, result in results.items():
        if isinstance(result, torch.Tensor) and result.numel() > 1:
            return wrong("it is not reduced to one number", smallest(function, way))
    found = {way: number(result) for way, result in results.items() if number(result) is not None}
    if not found:
        return Verdict(NOT_JUDGED, f"it returns {type(next(iter(results.values()))).__name__}")
    for way, got in found.items():
        for mistake, value in wrong_losses(output, target):
            if close(got, value.item()):
                return wrong(mistake, smallest(function, way))
    way = next(iter(found))
    return wrong(depends_on_padding(function, *way), smallest(function, way))


def depends_on_padding(function, layout: str, third: int) -> str:
    """Words for a wrong loss of unknown kind."""
    output, target = loss_example(0)
    other = torch.where((target == PAD)[..., None], torch.randn_like(output).log_softmax(-1), output)
    longer = torch.cat([output, torch.randn(2, *output.shape[1:]).log_softmax(-1)])
    rows = torch.cat([target, torch.full((2, target.shape[1]), PAD)])
    try:
        before = number(call_loss(function, layout, third, output, target))
        if not close(number(call_loss(function, layout, third, other, target)), before):
            return "logits at padding change the loss: padding is counted"
        if not close(number(call_loss(function, layout, third, longer, rows)), before):
            return "rows of padding change the loss: the mean is over the padded length"
    except BaseException:
        pass
    return "it is neither the mean nor the sum over the real symbols"


# ---------------------------------------------------------------------------- embedding and training


def called(node) -> str:
    """The last name of what a call calls."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", None) or getattr(function, "id", "") or ""


def names_in(node) -> set[str]:
    """The names and attributes that an expression mentions."""
    return {
        getattr(n, "id", None) or getattr(n, "attr", None)
        for n in ast.walk(node)
        if isinstance(n, (ast.Name, ast.Attribute))
    }


def is_embedding(node) -> bool:
    return any(isinstance(n, ast.Call) and called(n) == "Embedding" for n in ast.walk(node))


def pairs_of(node: ast.Assign) -> list[tuple]:
    """(target, value) of an assignment; of `a, b = c, d` both pairs."""
    target, value = node.targets[0], node.value
    both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts)
    return list(zip(target.elts, value.elts, strict=True)) if both else [(t, value) for t in node.targets]


def assignments(trees):
    """(names, value) of every assignment and of every argument handed to a function of the folder."""
    functions = {n.name: n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target, value in pairs_of(node):
                    names = [t for t in ast.walk(target) if isinstance(t, (ast.Name, ast.Attribute))]
                    yield {getattr(t, "id", None) or getattr(t, "attr", "") for t in names} - {"self"}, value
            if isinstance(node, ast.Call) and called(node) in functions:
                parameters = functions[called(node)].args.args
                for parameter, value in zip(parameters, node.args, strict=False):
                    yield {parameter.arg}, value
                for keyword in node.keywords:
                    yield {keyword.arg}, keyword.value


def optimised(trees, embedding: str) -> bool:
    """True if an optimiser may know a module of that name: by itself, or inside what it is given."""
    carriers = {embedding}
    pairs = list(assignments(trees))
    for _ in range(4):
        for names, value in pairs:
            applied = isinstance(value, ast.Call) and called(value) in carriers  # emb(x) carries no weights
            if not applied and names_in(value) & carriers:
                carriers |= names
    for tree in trees:
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and is_optimiser(node)
                and any(names_in(a) & carriers for a in arguments(node))
            ):
                return True
    return False


def arguments(call: ast.Call) -> list:
    return [*call.args, *[keyword.value for keyword in call.keywords]]


def is_optimiser(call: ast.Call) -> bool:
    """Adam(…), optim.SGD(…), optimizer.add_param_group(…), or any call handed `….parameters()`."""
    hands_parameters = any(
        isinstance(n, ast.Call) and called(n) == "parameters" for a in arguments(call) for n in ast.walk(a)
    )
    name = called(call)
    return name in ("Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "Adadelta", "NAdam", "RAdam", "add_param_group") or (
        hands_parameters and name not in ("clip_grad_norm_", "list", "chain", "clip_grad_value_")
    )


def check_embedding(solution: Solution) -> Verdict:
    """Questions 3 and 4: the embedding is trained, and EOS too. Read from the source; doubts are warnings."""
    sources = [s for s in solution.sources if s.stem in solution.modules]
    trees = [s.tree for s in sources]
    embeddings, fresh = [], None
    for source in sources:
        for function in [n for n in ast.walk(source.tree) if isinstance(n, ast.FunctionDef)]:
            if function.name in ("forward", "one_step", "decode", "generate", "generate_beam"):
                fresh = fresh or next(
                    ((source, n) for n in ast.walk(function) if isinstance(n, ast.Call) and called(n) == "Embedding"),
                    None,
                )
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Assign):
                embeddings += [(source, target) for target, value in pairs_of(node) if is_embedding(value)]
    if fresh:
        return wrong("a new random embedding at every call", f"{fresh[0].name}:{fresh[1].lineno}")
    if not embeddings:
        return Verdict(MISSING, "no nn.Embedding") if not any(is_embedding(t) for t in trees) else Verdict(RIGHT)
    verdict = Verdict(RIGHT)
    if eos_ignored := ignores_eos(solution):
        return wrong("EOS is never learnt: the loss leaves it out as if it were padding", eos_ignored)
    if not any(isinstance(n, ast.Call) and is_optimiser(n) for tree in trees for n in ast.walk(tree)):
        return Verdict(NOT_JUDGED, "no optimiser was found")
    for source, target in embeddings:
        name = getattr(target, "id", None) or getattr(target, "attr", "")
        if isinstance(target, ast.Name) and not optimised(trees, name):
            verdict.warnings.append(
                f"`{name}` ({source.name}:{target.lineno}) is in no optimiser: the embedding stays random"
            )
            verdict.mistakes.append("embedding outside the optimiser")
    return verdict


def ignores_eos(solution: Solution) -> str:
    """Where the loss is told to leave EOS out, or ""."""
    for source in solution.sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and called(node) in (
                "maskedCrossEntropy",
                "CrossEntropyLoss",
                "cross_entropy",
            ):
                padding = [k.value for k in node.keywords if k.arg in ("padcar", "ignore_index")]
                padding += node.args[2:3] if called(node) == "maskedCrossEntropy" else []
                if any(getattr(p, "id", None) == "EOS_IX" for p in padding):
                    return f"{source.name}:{node.lineno}"
    return ""
