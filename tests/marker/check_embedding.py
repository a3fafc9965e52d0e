"""Question 4: the embedding is trained, and EOS too. Read from the source, so a doubt is only a warning."""

import ast

from .loader import Solution
from .report import MISSING, NOT_JUDGED, RIGHT, Verdict, wrong
from .source import Source, is_unanswered, outside_generators

OPTIMISERS = ("Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "Adadelta", "NAdam", "RAdam", "add_param_group")
LOSSES = ("maskedCrossEntropy", "CrossEntropyLoss", "cross_entropy")
STEPS = ("forward", "one_step", "decode", "generate", "generate_beam")
# What these return holds the weights that they were given.
HANDED_ON = ("list", "tuple", "set", "dict", "chain", "filter", "parameters", "to", "cuda")


def called(node) -> str:
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", None) or getattr(function, "id", "") or ""


def name_of(node) -> str:
    """The last name of a variable or attribute, or ""."""
    return getattr(node, "id", None) or getattr(node, "attr", "")


def arguments(call: ast.Call) -> list:
    return [*call.args, *[keyword.value for keyword in call.keywords]]


def calls_in(node) -> list[ast.Call]:
    return [part for part in ast.walk(node) if isinstance(part, ast.Call)]


def is_embedding(node) -> bool:
    return any(called(call) == "Embedding" for call in calls_in(node))


def is_optimiser(call: ast.Call) -> bool:
    """Adam(…), optim.SGD(…), optimizer.add_param_group(…), or any call handed `….parameters()`."""
    hands_parameters = any(called(inner) == "parameters" for a in arguments(call) for inner in calls_in(a))
    rest = ("clip_grad_norm_", "clip_grad_value_", "list", "chain")
    return called(call) in OPTIMISERS or (hands_parameters and called(call) not in rest)


def carried_names(node, functions) -> set[str]:
    """The names whose weights an expression may hold: not those of the modules that it applies to something."""
    if isinstance(node, ast.Call) and not is_optimiser(node):
        name = called(node)
        if name not in HANDED_ON and name not in functions and not name[:1].isupper():
            return set()
    own = {name_of(node)} if isinstance(node, (ast.Name, ast.Attribute)) else set()
    return own.union(*(carried_names(part, functions) for part in ast.iter_child_nodes(node)))


def pairs_of(node: ast.Assign) -> list[tuple]:
    """(target, value) of an assignment; of `a, b = c, d` both pairs."""
    target, value = node.targets[0], node.value
    both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts)
    return list(zip(target.elts, value.elts, strict=True)) if both else [(t, value) for t in node.targets]


def handed_over(trees, functions):
    """(names, value) of every assignment and of every argument handed to a function of the folder."""
    for node in [node for tree in trees for node in ast.walk(tree)]:
        for target, value in pairs_of(node) if isinstance(node, ast.Assign) else ():
            yield {name_of(part) for part in ast.walk(target)} - {"self", ""}, value
        if called(node) in functions:
            for parameter, value in zip(functions[called(node)].args.args, node.args, strict=False):
                yield {parameter.arg}, value
            for keyword in node.keywords:
                yield {keyword.arg}, keyword.value


def optimised(trees, embedding: str) -> bool:
    """True if an optimiser may know a module of that name: by itself, or inside what it is given."""
    functions = {n.name: n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    functions = {name: f for name, f in functions.items() if name not in STEPS}  # what those return holds no weights
    carriers = {embedding}
    for names, value in [*handed_over(trees, functions)] * 4:
        if carried_names(value, functions) & carriers:
            carriers |= names
    optimisers = [call for tree in trees for call in calls_in(tree) if is_optimiser(call)]
    return any(carried_names(a, functions) & carriers for call in optimisers for a in arguments(call))


def redrawn(source: Source) -> str:
    """The mistake of an embedding that is made anew at every call, or ""."""
    for place in ast.walk(source.tree):
        if isinstance(place, (ast.FunctionDef, ast.For, ast.While)):
            for call in calls_in(place):
                applied = isinstance(call.func, ast.Call) and called(call.func) == "Embedding"
                if applied or (called(call) == "Embedding" and getattr(place, "name", "") in STEPS):
                    return f"a new random embedding at every call ({source.name}, line {call.lineno})"
    return ""


def ignored_eos(source: Source) -> str:
    """The mistake that the loss is told to leave EOS out, or ""."""
    for call in calls_in(source.tree):
        if called(call) in LOSSES:
            padding = [k.value for k in call.keywords if k.arg in ("padcar", "ignore_index")]
            padding += call.args[2:3] if called(call) == "maskedCrossEntropy" else []
            if any(name_of(part) == "EOS_IX" for part in padding):
                where = f"{source.name}, line {call.lineno}"
                return f"EOS is never learnt: the loss leaves it out as if it were padding ({where})"
    return ""


def detached(source: Source, names: set[str]) -> list[str]:
    """Warnings where what an embedding gives is cut off from its gradient."""
    cuts = [n for n in outside_generators(source.tree) if isinstance(n, ast.Attribute) and n.attr in ("detach", "data")]
    return [
        f"`{ast.unparse(node)}` ({source.name}, line {node.lineno}) cuts the gradient: the embedding is never trained"
        for node in cuts
        if isinstance(node.value, ast.Call) and name_of(node.value.func) in names
    ]


def in_one_class_alone(trees) -> list[str]:
    """A warning where RNN alone has an embedding, and the other cells have none."""
    classes = {n.name: n for tree in trees for n in tree.body if isinstance(n, ast.ClassDef)}
    if not {"RNN", "LSTM", "GRU"} <= set(classes) or not is_embedding(classes["RNN"]):
        return []
    outside = [part for tree in trees for part in tree.body if part is not classes["RNN"]]
    made = [n for n in ast.walk(classes["RNN"]) if isinstance(n, ast.Assign) and is_embedding(n.value)]
    used = {name_of(target) for node in made for target in node.targets} | {"Embedding"}
    elsewhere = {name_of(node) for part in outside for node in ast.walk(part) if isinstance(node, ast.Attribute)}
    bases = {name_of(base) for name in ("LSTM", "GRU") for base in classes[name].bases}
    inherited = used & elsewhere or "RNN" in bases
    return [] if inherited else ["RNN alone has an embedding: LSTM and GRU have none"]


def check_embedding(solution: Solution, cells: dict) -> Verdict:
    """Question 4: an embedding, known to an optimiser, and EOS in the loss."""
    sources = [source for source in solution.sources if source.stem in solution.modules]
    trees = [source.tree for source in sources]
    models = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and is_embedding(n)]
    if any(is_unanswered(part) for model in models for part in model.body):
        return Verdict(MISSING)
    if not any(map(is_embedding, trees)):
        return Verdict(MISSING, "no nn.Embedding")
    mistakes = [text for source in sources for text in (redrawn(source), ignored_eos(source)) if text]
    if mistakes:
        return wrong(*mistakes)
    made = {
        target: f"{source.name}, line {target.lineno}" for source in sources for node in ast.walk(source.tree)
        if isinstance(node, ast.Assign) for target, value in pairs_of(node) if is_embedding(value)
    }  # fmt: skip
    if made and not any(is_optimiser(call) for tree in trees for call in calls_in(tree)):
        return Verdict(NOT_JUDGED, "no optimiser was found")
    names = {name_of(target) for target in made}
    warnings = [warning for source in sources for warning in detached(source, names)]
    for target, place in made.items():
        if isinstance(target, ast.Name) and not optimised(trees, target.id):
            warnings.append(f"`{target.id}` ({place}) is in no optimiser: the embedding stays random")
    return Verdict(RIGHT, warnings=warnings + in_one_class_alone(trees))
