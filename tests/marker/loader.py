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

from .report import CANNOT_RUN, NOT_JUDGED, Verdict
from .sandbox import TookTooLong, attempt
from .source import DEFINITIONS, MAIN_FILES, NAMES, Source, defined, is_empty, is_unanswered

STATEMENT_SECONDS = 1.5  # of CPU
CHEAP_METHODS = {"append", "update", "extend", "insert", "setdefault", "add"}
# Calls that are work, not a constant: they are left out at import.
WORK = re.compile(
    r"train|fit|optim|main|generate|beam|run|test|eval|load|open|read|input|exit|sleep|plot|show|save|write|print|"
    r"DataLoader|Writer|Thread|Process|Popen|system|remove|rmtree|unlink|mkdir|download|get_dataset|prepare|backward|step",
    re.IGNORECASE,
)


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

    def __enter__(self):
        return self

    def __iter__(self):
        return iter(())

    def __exit__(self, *_):
        return False

    def __mro_entries__(self, bases):
        return (nn.Module,)


@dataclass
class Solution:
    """What could be loaded of a folder."""

    sources: list[Source]
    modules: dict[str, ModuleType] = field(default_factory=dict)
    repairs: list[str] = field(default_factory=list)
    unset: set[str] = field(default_factory=set)  # names that statements set which were not run, or do not parse
    lost: bool = False  # everything was to be imported from a file that is not there
    endless: set[str] = field(default_factory=set)  # places of statements that used up their time

    def find(self, question: str):
        found = self.definition(question)
        return vars(self.modules[found[0].stem]).get(found[1].name) if found else None

    def definition(self, question: str):
        """(source, node) of what answers a question, or None; an empty definition only if there is no other."""
        name, like = NAMES[question]
        sources = [source for source in self.sources if source.stem in self.modules]
        nodes = [(s, node) for s in sources for node in reversed(s.tree.body) if isinstance(node, DEFINITIONS)]
        exact = [pair for pair in nodes if pair[1].name == name]
        if exact and is_unanswered(exact[0][1]):  # a handout's hole: nobody else's name fills it
            return exact[0]
        alike = [pair for pair in nodes if re.search(like, pair[1].name, re.IGNORECASE)]
        return next(iter([pair for pair in [*exact, *alike] if not is_empty(pair[1])] + exact), None)

    def text(self, question: str) -> str:
        """The source text of the answer to a question, without comments."""
        return ast.unparse(self.definition(question)[1])

    def broken(self, question: str) -> str:
        """Why the answer to a question does not parse, with its line; "" if it does, or is not there."""
        name, like = NAMES[question]
        pairs = [pair for source in self.sources for pair in source.broken.items()]
        return next((why for n, why in pairs if n == name or re.search(like, n, re.IGNORECASE)), "")

    def code(self, names: str, default: int) -> int:
        """The folder's code of a symbol, such as EOS_IX; `names` is a pattern of what it may be called."""
        for module in self.modules.values():
            for name, value in vars(module).items():
                if isinstance(value, int) and re.fullmatch(rf"({names})(_?(IX|IDX?|INDEX|CODE))?", name, re.IGNORECASE):
                    return value
        return default

    def where(self, error: BaseException) -> str:
        """`error` in one line, with the student's statement that raised it."""
        what = "it does not end" if isinstance(error, TookTooLong) else f"{type(error).__name__}: {error}"
        what, files = what.split("\n")[0][:160], {source.name: source for source in self.sources}
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if frame.filename in files:
                line = files[frame.filename].text.split("\n")[frame.lineno - 1].strip()
                return f"{what} ({frame.filename}, line {frame.lineno}: {line[:80]})"
        return what

    def at_fault(self, error: BaseException) -> bool:
        """True for an error in the student's own statement that no arguments could have prevented."""
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        certain = isinstance(error, (NameError, ImportError)) or str(error).startswith("module 'torch")
        return certain and last in {source.name for source in self.sources}

    def waits_for(self, error: BaseException) -> str:
        """What else an answer needs that is not there, in words; "" if an error is of another kind."""
        if isinstance(error, NotImplementedError):
            return f"it needs what is not written yet: {error}"
        if isinstance(error, NameError) and (self.lost or error.name in self.unset):
            return f"it needs `{error.name}`, which could not be read, or the marker did not run what sets it"
        return ""

    def failure(self, errors: list[BaseException], where: str = "") -> Verdict:
        """The verdict on what raises whatever it is given: it cannot run if no input could have prevented that."""
        if waits := next(filter(None, map(self.waits_for, errors)), ""):
            return Verdict(NOT_JUDGED, waits)
        certain = [error for error in errors if self.at_fault(error)]
        return Verdict(CANNOT_RUN if certain else NOT_JUDGED, where + self.where((certain or errors)[0]))


def calls_work(node: ast.AST, work: set[str]) -> bool:
    """True if a statement calls what looks like work rather than a constant."""
    for call in ast.walk(node):
        if isinstance(call, (ast.Await, ast.Yield)):
            return True
        if isinstance(call, ast.Call):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if name in work or WORK.search(name):
                return True
    return False


def runnable(node: ast.stmt, work: set[str]) -> bool:
    """True for the statements that are run: definitions, constants, and blocks of such."""
    if isinstance(node, (*DEFINITIONS, ast.Import, ast.ImportFrom, ast.AsyncFunctionDef, ast.Pass)):
        return True
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        return not calls_work(node, work)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute):
        return node.value.func.attr in CHEAP_METHODS and not calls_work(node, work)
    if isinstance(node, (ast.If, ast.For)):
        test = node.test if isinstance(node, ast.If) else node.iter
        return not calls_work(test, work) and all(runnable(part, work) for part in [*node.body, *node.orelse])
    return False


class Loader:
    """Runs the files of a folder statement by statement; a sibling's import loads that sibling."""

    def __init__(self, sources: list[Source], endless: set[str]):
        repairs = [repair for source in sources for repair in source.repairs]
        broken = {name for source in sources for name in source.broken}
        self.solution = Solution(sources, repairs=repairs, unset=broken, endless=endless)
        self.by_stem = {source.stem: source for source in sources if source.stem not in sys.stdlib_module_names}
        own = {n.name for s in sources for n in s.tree.body if isinstance(n, DEFINITIONS)}
        self.work = own - {"normalize", "string2code", "code2string"}  # calls of those may train

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
        place = f"{source.name}, line {node.lineno}"

        def execute():
            exec(compile(ast.Module([node], []), source.name, "exec"), vars(module))

        if place not in self.solution.endless and runnable(node, self.work):
            error = attempt(execute, seconds=STATEMENT_SECONDS)[1]
            if error is None:
                return
            if isinstance(error, TookTooLong):
                self.solution.endless.add(place)
            if isinstance(node, DEFINITIONS):
                self.solution.repairs.append(f"{place}: {node.name}: {self.solution.where(error)}")
        self.solution.unset.update(targets(node))

    def import_one(self, node, alias: ast.alias, source: Source, module: ModuleType) -> None:
        """One imported name: of a sibling, of an installed package, or a stub."""
        whole, star, space = isinstance(node, ast.Import), alias.name == "*", vars(module)
        name = alias.name if whole else node.module or ""
        sibling = name.split(".")[-1]
        bound = alias.asname or (alias.name if not whole or sibling in self.by_stem else name.split(".")[0])
        if not whole and sibling not in self.by_stem and alias.name in self.by_stem:  # from folder import textloader
            whole, sibling = True, alias.name
        if sibling in self.by_stem and sibling != source.stem:
            found, error = self.load(sibling), None
        else:
            found, error = attempt(package, name, seconds=5)
        if error is None and not whole and not star and not hasattr(found, alias.name):
            attempt(package, f"{name}.{alias.name}", seconds=5)  # a submodule is no attribute before its import
        if error is None and whole:
            space[bound.split(".")[0]] = found if alias.asname or sibling in self.by_stem else sys.modules[bound]
        elif error is None and star:
            names = getattr(found, "__all__", None) or [key for key in vars(found) if not key.startswith("_")]
            space.update({key: getattr(found, key) for key in names})
        elif error is None and hasattr(found, alias.name):
            space[bound] = getattr(found, alias.name)
        else:
            if star:
                self.solution.lost = True
            else:
                space[bound.split(".")[0]] = Stub()
            if sibling != source.stem and "tensorboard" not in name:
                what = name if star or whole else f"{name}.{alias.name}"
                place = f"{source.name}, line {node.lineno}"
                self.solution.repairs.append(f"{place}: {what} is not there; a stand-in was given")

    def complete_imports(self) -> None:
        """After a circular import, names that a sibling did not have yet."""
        modules = self.solution.modules
        for stem, module in modules.items():
            for node in [n for n in ast.walk(self.by_stem[stem].tree) if isinstance(n, ast.ImportFrom)]:
                there, here = vars(modules.get((node.module or "").split(".")[-1], module)), vars(module)
                for name in there if node.names[0].name == "*" else [alias.name for alias in node.names]:
                    if name in there and name[0] != "_" and (name not in here or isinstance(here[name], Stub)):
                        here[name] = there[name]


def package(name: str) -> ModuleType:
    """An installed package; TensorBoard is never needed, and the marker's own lab is none."""
    if name.split(".")[0] in ("", *MAIN_FILES) or "tensorboard" in name:
        raise ImportError(name)
    return importlib.import_module(name)


def targets(node: ast.stmt) -> list[str]:
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def load_solution(sources: list[Source], endless=()) -> Solution:
    """Load all files that hold something of the handout, and what they import, but for the endless statements."""
    torch.cuda.is_available = lambda: False
    torch.Tensor.cuda = nn.Module.cuda = lambda self, *args, **kwargs: self
    builtins.input = lambda *args: (_ for _ in ()).throw(EOFError("the marker types nothing"))
    loader = Loader(sources, set(endless))
    for stem in loader.by_stem:
        sys.modules.pop(stem, None)
    for stem, source in loader.by_stem.items():
        if stem in MAIN_FILES or defined(source):
            loader.load(stem)
    loader.complete_imports()
    return loader.solution
