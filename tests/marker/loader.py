"""Loads a student's files without running them: imports, definitions and constants, one at a time."""

import ast
import builtins
import importlib
import re
import sys
import traceback
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import nn

from .sandbox import TookTooLong, time_limit
from .source import MAIN_FILES, Source, defined, is_empty

STATEMENT_SECONDS = 1.5  # of CPU
CHEAP_METHODS = {"append", "update", "extend", "insert", "setdefault", "add"}
# Calls that are work, not a constant: they are left out at import.
WORK = re.compile(
    r"train|fit|optim|main|generate|beam|run|test|eval|load|open|read|input|exit|sleep|plot|show|save|write|print|"
    r"DataLoader|Writer|Thread|Process|Popen|system|remove|rmtree|unlink|mkdir|download|get_dataset|prepare|backward|step",
    re.IGNORECASE,
)


# The handout's name for each answer, and what students call it otherwise.
DEFINITIONS = {
    "batches": ("pad_collate_fn", r"collate"),
    "dataset": ("TextDataset", ""),
    "loss": ("maskedCrossEntropy", r"mask\w*cross"),
    "generate": ("generate", r"^generate_?(text|greedy|sentence|n|1|one)?$"),
    "rnn": ("RNN", r"^_?(my|custom|vanilla|simple|char)?_?rnn"),
    "lstm": ("LSTM", r"^_?(my|custom|char)?_?lstm"),
    "gru": ("GRU", r"^_?(my|custom|char)?_?gru"),
    "beam": ("generate_beam", r"beam"),
    "nucleus": ("p_nucleus", r"nucleus"),
}


class Stub:
    """Stands for whatever a missing package would give: can be called, indexed, iterated, derived from."""

    def __call__(self, *args, **kwargs):
        return args[0] if args else self  # ic(x), tqdm(x), a decorator

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key):
        return self

    def __iter__(self):
        return iter(())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def __mro_entries__(self, bases):
        return (nn.Module,)


class NoCuda(ast.NodeTransformer):
    """Maps the device names 'cuda', 'cuda:0' and 'mps' to 'cpu'."""

    def visit_Constant(self, node):
        if isinstance(node.value, str) and re.fullmatch(r"cuda(:\d+)?|mps", node.value):
            return ast.copy_location(ast.Constant("cpu"), node)
        return node


@dataclass
class Solution:
    """What could be loaded of a folder."""

    sources: list[Source]
    modules: dict[str, ModuleType] = field(default_factory=dict)
    repairs: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # name -> file:line of the statement that was not run
    endless: set[str] = field(default_factory=set)  # file:line of statements that used up their time

    def find(self, question: str):
        """The object that answers a question, or None."""
        found = self.definition(question)
        return vars(self.modules[found[0].stem]).get(found[1].name) if found else None

    def definition(self, question: str):
        """(source, node) of what answers a question, or None; an empty definition only if there is no other."""
        name, like = DEFINITIONS[question]
        kinds = (ast.FunctionDef, ast.ClassDef)
        sources = [source for source in self.sources if source.stem in self.modules]
        nodes = [(s, node) for s in sources for node in reversed(s.tree.body) if isinstance(node, kinds)]
        exact = [pair for pair in nodes if pair[1].name == name]
        alike = [pair for pair in nodes if like and re.search(like, pair[1].name, re.IGNORECASE)]
        filled = [pair for pair in [*exact, *alike] if not is_empty(pair[1])]
        return next(iter([*filled, *exact]), None)

    def value(self, name: str, default):
        """A constant of the folder, such as EOS_IX."""
        return next((vars(m)[name] for m in self.modules.values() if isinstance(vars(m).get(name), int)), default)

    def where(self, error: BaseException) -> str:
        """`error` in one line, with file, line and text of the student's statement that raised it."""
        files = {source.name: source for source in self.sources}
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
        what = (
            "it does not end" if isinstance(error, TookTooLong) else f"{type(error).__name__}: {error}".split("\n")[0]
        )
        if not frames:
            return what[:160]
        line = files[frames[-1].filename].text.split("\n")[frames[-1].lineno - 1].strip()
        return f"{what[:160]} ({frames[-1].filename}:{frames[-1].lineno}: {line[:80]})"


def in_source(solution: Solution, error: BaseException) -> bool:
    """True if the innermost frame of an error is the student's own."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename in {s.name for s in solution.sources}


def empty(solution: Solution, question: str) -> bool:
    """True if the answer to a question is missing or does nothing."""
    definition = solution.definition(question)
    return definition is None or is_empty(definition[1])


def calls_work(node: ast.AST, solution: Solution, classes: set[str]) -> bool:
    """True if a statement calls what looks like work rather than a constant."""
    functions = {n.name for s in solution.sources for n in s.tree.body if isinstance(n, ast.FunctionDef)}
    for call in ast.walk(node):
        if isinstance(call, (ast.Await, ast.Yield)):
            return True
        if isinstance(call, ast.Call):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if name in functions - {"normalize", "string2code", "code2string"} or WORK.search(name) or name in classes:
                return True
    return False


def runnable(node: ast.stmt, solution: Solution, classes: set[str]) -> bool:
    """True for the statements that are run: definitions, constants, and blocks of such."""
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Pass)):
        return True
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        return not calls_work(node, solution, classes)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute):
        return node.value.func.attr in CHEAP_METHODS and not calls_work(node, solution, classes)
    if isinstance(node, (ast.If, ast.For)):
        test = node.test if isinstance(node, ast.If) else node.iter
        parts = [*node.body, *node.orelse]
        return not calls_work(test, solution, classes) and all(runnable(p, solution, classes) for p in parts)
    return False


class Loader:
    """Runs the files of a folder statement by statement; a sibling's import loads that sibling."""

    def __init__(self, sources: list[Source], endless: set[str]):
        self.solution = Solution(sources, repairs=[repair for source in sources for repair in source.repairs])
        self.solution.endless |= endless
        self.by_stem = {source.stem: source for source in sources if source.stem not in sys.stdlib_module_names}
        self.classes = {n.name for s in sources for n in s.tree.body if isinstance(n, ast.ClassDef)}

    def load(self, stem: str) -> ModuleType:
        """The module of a file; one that is being loaded already comes as it stands (a circular import)."""
        if stem in self.solution.modules:
            return self.solution.modules[stem]
        source = self.by_stem[stem]
        module = self.solution.modules[stem] = sys.modules[stem] = ModuleType(stem)
        module.__file__ = source.name
        for node in source.tree.body:
            self.run(node, source, module)
        for node in source.tree.body:  # constants that functions use as globals although only the script sets them
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Assign) and not set(targets(inner)) & set(vars(module)):
                        self.run(inner, source, module)
        return module

    def run(self, node: ast.stmt, source: Source, module: ModuleType) -> None:
        """Run one statement, if it is of those that are run; remember what a skipped one would have set."""
        if isinstance(node, ast.Try):
            for part in [*node.body, *node.orelse, *node.finalbody]:
                self.run(part, source, module)
            return
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                self.import_one(node, alias, source, module)
            return
        place = f"{source.name}:{node.lineno}"
        if runnable(node, self.solution, self.classes) and place not in self.solution.endless:
            try:
                code = compile(ast.Module([NoCuda().visit(node)], []), source.name, "exec")
                with time_limit(STATEMENT_SECONDS):
                    exec(code, vars(module))
                return
            except BaseException as error:
                if isinstance(error, TookTooLong):
                    self.solution.endless.add(place)
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                    self.solution.repairs.append(f"{place}: {node.name}: {self.solution.where(error)}")
                    self.run_without_calls(node, source, module)
        for name in targets(node):
            self.solution.skipped[name] = place

    def run_without_calls(self, node, source: Source, module: ModuleType) -> None:
        """A class whose body fails, with its methods alone."""
        if not isinstance(node, ast.ClassDef):
            return
        node.body = [part for part in node.body if isinstance(part, ast.FunctionDef)] or [ast.Pass()]
        node.decorator_list = []
        try:
            code = compile(ast.fix_missing_locations(ast.Module([node], [])), source.name, "exec")
            with time_limit(STATEMENT_SECONDS):
                exec(code, vars(module))
        except BaseException as error:
            self.solution.repairs.append(f"{source.name}:{node.lineno}: {node.name}: {self.solution.where(error)}")

    def import_one(self, node, alias: ast.alias, source: Source, module: ModuleType) -> None:
        """One imported name: of a sibling, of an installed package, or a stub."""
        whole = isinstance(node, ast.Import)
        name, space = alias.name if whole else node.module or "", vars(module)
        sibling, bound = name.split(".")[-1], alias.asname or alias.name
        if not whole and sibling not in self.by_stem and alias.name in self.by_stem:
            space[bound] = self.load(alias.name)  # from folder import textloader
            return
        local = sibling in self.by_stem and sibling != source.stem
        try:
            with time_limit(5):
                found = self.load(sibling) if local else self.package(name)
                if whole:
                    top = found if alias.asname or local else sys.modules[name.split(".")[0]]
                    space[alias.asname or name.split(".")[0]] = top
                elif alias.name == "*":
                    names = getattr(found, "__all__", None) or [key for key in vars(found) if not key.startswith("_")]
                    space.update({key: getattr(found, key) for key in names})
                else:
                    space[bound] = getattr(found, alias.name)
        except BaseException as error:
            if alias.name != "*":
                space[bound.split(".")[0]] = Stub()
            if sibling != source.stem and "tensorboard" not in name:
                what = name if alias.name == "*" or whole else f"{name}.{alias.name}"
                self.solution.repairs.append(
                    f"{source.name}:{node.lineno}: {what} is not there ({type(error).__name__}); a stand-in was given"
                )

    def complete_imports(self) -> None:
        """After a circular import, names that a sibling did not have yet."""
        for module in list(self.solution.modules.values()):
            for node in ast.walk(self.by_stem[module.__name__].tree):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[-1] in self.solution.modules:
                    sibling = self.solution.modules[node.module.split(".")[-1]]
                    names = vars(sibling) if node.names[0].name == "*" else [alias.name for alias in node.names]
                    for name in names:
                        if (
                            name in vars(sibling)
                            and isinstance(vars(module).get(name, Stub()), Stub)
                            and name[0] != "_"
                        ):
                            vars(module)[name] = vars(sibling)[name]

    def package(self, name: str) -> ModuleType:
        """An installed package; TensorBoard is never needed."""
        if not name or name.split(".")[0] == "tensorboard" or name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return importlib.import_module(name)


def targets(node: ast.stmt) -> list[str]:
    """The names that a statement would set."""
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def only_cpu() -> None:
    """Nothing of this process runs on a GPU: what asks for one gets the CPU."""
    torch.cuda.is_available = lambda: False
    torch.Tensor.cuda = nn.Module.cuda = lambda self, *args, **kwargs: self


def load_solution(sources: list[Source], endless: set[str] = frozenset()) -> Solution:
    """Load all files of a folder that hold something of the handout, and what they import.

    endless  file:line of statements that an earlier loading found to take too long
    """
    only_cpu()
    builtins.input = lambda *args: (_ for _ in ()).throw(EOFError("the marker types nothing"))
    loader = Loader(sources, endless)
    for stem in loader.by_stem:
        sys.modules.pop(stem, None)
    for stem, source in loader.by_stem.items():
        if stem in MAIN_FILES or defined(source.tree):
            loader.load(stem)
    loader.complete_imports()
    return loader.solution
