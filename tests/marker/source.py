"""Reads a student's folder as text: which files, and syntax trees of what parses in them."""

import ast
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

MAIN_FILES = ("tp5", "tp4", "textloader", "generate")
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "node_modules", "venv", "env", "tests", "test"}
MOST_REPAIRS = 40
MOST_BYTES = 2_000_000  # of a file, and of all files: a syntax tree takes 300 times as much
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)

CONFLICT = re.compile(r"^<<<<<<< .*\n((?:.*\n)*?)((?:=======|\|{7})(?:.*\n)*?>>>>>>> .*(?:\n|$))", re.MULTILINE)

# The handout's name for each answer, and what students call it otherwise.
NAMES = {
    "batches": ("pad_collate_fn", r"collate"),
    "dataset": ("TextDataset", r"^TextDataset$"),
    "loss": ("maskedCrossEntropy", r"mask\w*cross"),
    "generate": ("generate", r"^generate_?(text|greedy|sentence|n|1|one)?$"),
    "rnn": ("RNN", r"^_?(my|custom|vanilla|simple|char)?_?rnn"),
    "lstm": ("LSTM", r"^_?(my|custom|char)?_?lstm"),
    "gru": ("GRU", r"^_?(my|custom|char)?_?gru"),
    "beam": ("generate_beam", r"beam"),
    "nucleus": ("p_nucleus", r"nucleus"),
}


@dataclass
class Source:
    """One file: its text as repaired, its syntax tree, what was repaired, and what does not parse (name → why)."""

    name: str  # "tp5.py"
    text: str
    tree: ast.Module
    repairs: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        return Path(self.name).stem


def starts_block(line: str) -> bool:
    """True for a line that begins a statement at the top level."""
    return bool(re.match(r"[^\s#)\]}'\"]", line)) and not re.match(r"(else|elif|except|finally)\b", line)


def block_around(lines: list[str], number: int) -> tuple[int, int]:
    """Where the top-level block that holds line `number` begins and ends, from 0."""
    first = next((n for n in range(number, 0, -1) if starts_block(lines[n])), 0)
    while first > 0 and lines[first - 1].startswith("@"):
        first -= 1
    return first, next((n for n in range(number + 1, len(lines)) if starts_block(lines[n])), len(lines))


def fill_empty_body(lines: list[str], error: SyntaxError) -> bool:
    """Give the empty body that an IndentationError names a `pass`; False if it is another error."""
    found = re.search(r"expected an indented block after .* on line (\d+)", error.msg or "")
    for number in range(int(found[1]) - 1, error.lineno or 0) if found else ():
        code = lines[number].split("#")[0].rstrip() if number < len(lines) else ""
        if code.endswith(":"):  # the last line of the header
            lines[number] = f"{code} pass"
            return True
    return False


def parse(name: str, text: str) -> Source:
    """Parse a file; fill empty bodies and leave out blocks that do not parse."""
    source = Source(name, "", ast.Module([], []))
    if CONFLICT.search(text):
        text = CONFLICT.sub(lambda found: "\n" + found[1] + "\n" * found[2].count("\n"), text)
        source.repairs.append(f"{name}: merge conflicts; the first side was taken")
    lines = text.split("\n")
    for _ in range(MOST_REPAIRS):
        try:
            source.tree, source.text = ast.parse("\n".join(lines)), "\n".join(lines)
            return source
        except SyntaxError as error:
            if fill_empty_body(lines, error):
                continue
            number = min(error.lineno or 1, len(lines))
            first, end = block_around(lines, number - 1)
            why = f"{name}, line {number}: {error.msg}"
            source.repairs.append(f"{why}; lines {first + 1} to {end} were left out")
            names = re.findall(r"^(?:async )?(?:def|class)\s+(\w+)", "\n".join(lines[first:end]), re.MULTILINE)
            source.broken |= dict.fromkeys(names, why)
            lines[first:end] = [""] * (end - first)
        except (RecursionError, MemoryError):
            break
    source.repairs.append(f"{name}: does not parse; left out")
    return source


def read(path: Path) -> str:
    """The text of a file, whatever its encoding; of a notebook, its cells of code."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        text = "\n".join("".join(cell["source"]) for cell in cells)
        text = re.sub(r"^\s*[%!?].*", "", text, flags=re.MULTILINE)  # %magic and !commands
    text = re.sub(r"""(["'])(cuda(:\d+)?|mps)\1""", '"cpu"', text)
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")


def defined(source: Source) -> set[str]:
    """The handout's names that a file defines at its top level, parsed or not."""
    names = {node.name for node in source.tree.body if isinstance(node, DEFINITIONS)} | set(source.broken)
    return names & {name for name, _ in NAMES.values()}


def files_of(folder: Path, pattern: str) -> list[Path]:
    """The folder's files to be read, the handout's and the small ones first."""
    found = []
    for path in folder.rglob(pattern):
        inner = path.relative_to(folder).parts[:-1]
        if path.is_file() and not any(part in SKIPPED_FOLDERS or part.startswith(".") for part in inner):
            found.append(path)
    return sorted(found, key=lambda path: (path.stem not in MAIN_FILES, path.stat().st_size, path))


def read_folder(folder: str) -> tuple[list[Source], list[str]]:
    """The files of the solution, those beside most of the handout's names first, and in words what was not read."""
    folder, left_out, size, sources, names = Path(folder), [], 0, {}, {}
    for path in files_of(folder, "*.py") or files_of(folder, "*.ipynb")[:1]:
        size += path.stat().st_size
        if size > MOST_BYTES:
            left_out.append(f"{path.name}: not read, with it the files have more than 2 MB")
            size -= path.stat().st_size
            continue
        if path.suffix == ".ipynb":
            left_out.append(f"{path.name}: a notebook; its cells of code were read")
        try:
            source = sources[path] = parse(path.stem + ".py", read(path))
        except (OSError, ValueError, KeyError, TypeError) as error:  # a notebook may be any JSON
            left_out.append(f"{path.name}: not read: {type(error).__name__}")
        else:
            names[path.parent] = names.get(path.parent, set()) | defined(source)

    def rank(path: Path):
        home = (-len(names[path.parent]), len(path.parts), path.parent)
        main = (*MAIN_FILES, path.stem).index(path.stem)
        return home, main, -len(defined(sources[path])), path.name

    chosen: dict[str, Source] = {}
    for path in sorted(sources, key=rank):
        chosen.setdefault(path.stem, sources[path])
    return list(chosen.values()), left_out


def outside_generators(tree: ast.Module) -> list[ast.AST]:
    """What is not in a function that generates: there, nobody trains."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {id(part) for function in functions if "generate" in function.name for part in ast.walk(function)}
    return [node for node in ast.walk(tree) if id(node) not in inside]


def is_empty(node: ast.AST) -> bool:
    """True if a definition, or a class's `forward` or `one_step`, does nothing yet."""
    if isinstance(node, ast.ClassDef):
        steps = [part for part in node.body if getattr(part, "name", "") in ("forward", "one_step")]
        return any(map(is_unanswered, steps)) or all(
            is_empty(part) if isinstance(part, ast.FunctionDef) else is_filler(part) for part in node.body
        )
    inner = {part.name for part in node.body if isinstance(part, ast.FunctionDef) and is_empty(part)}
    return all(is_filler(part, inner) for part in node.body)


def is_filler(node: ast.AST, empty=()) -> bool:
    """`pass`, a text, `...`, `None`, `x = None`, `raise NotImplementedError`; an empty function, or its return."""
    if isinstance(node, ast.Raise):
        return "NotImplemented" in ast.dump(node)
    if isinstance(node, ast.FunctionDef):
        return node.name in empty
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Name):
        return node.value.id in empty
    nothing = isinstance(node, (ast.Assign, ast.Expr, ast.Return)) and (
        node.value is None or (isinstance(node.value, ast.Constant) and node.value.value in (None, ...))
    )
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return nothing or text or isinstance(node, ast.Pass)


def is_unanswered(node: ast.AST) -> bool:
    """True for a function that does nothing but raise NotImplementedError."""
    function = isinstance(node, ast.FunctionDef) and isinstance(node.body[-1], ast.Raise)
    return function and all(map(is_filler, node.body))
