"""Reads a student's folder as text: which files, and syntax trees of what parses in them."""

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

NAMES = (
    "maskedCrossEntropy", "pad_collate_fn", "TextDataset", "RNN", "LSTM", "GRU",
    "generate", "generate_beam", "p_nucleus",
)  # fmt: skip
MAIN_FILES = ("tp5", "tp4", "textloader", "generate")
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "node_modules", "venv", "env", "tests", "test"}
STUB = "pass  # (the marker)"
MOST_REPAIRS = 40


@dataclass
class Source:
    """One file: its text as repaired, its syntax tree, and what was repaired."""

    name: str  # "tp5.py"
    text: str
    tree: ast.Module
    repairs: list[str] = field(default_factory=list)

    @property
    def stem(self) -> str:
        return Path(self.name).stem


def without_conflicts(lines: list[str]) -> list[str]:
    """Of each merge conflict keep the first side; line numbers stay."""
    kept, side = [], 0
    for line in lines:
        if line.startswith("<<<<<<< "):
            side, line = 1, ""
        elif side and line.startswith(("=======", "|||||||")):
            side, line = 2, ""
        elif side and line.startswith(">>>>>>> "):
            side, line = 0, ""
        kept.append("" if side == 2 else line)
    return kept


def block_around(lines: list[str], number: int) -> tuple[int, int]:
    """First and last line (from 0) of the top-level block that holds line `number` (from 0)."""

    def starts(i: int) -> bool:
        return bool(re.match(r"[^\s#)\]}'\"]", lines[i])) and not re.match(r"(else|elif|except|finally)\b", lines[i])

    number = min(number, len(lines) - 1)
    first = number
    while first > 0 and not starts(first):
        first -= 1
    while first > 0 and lines[first - 1].startswith("@"):
        first -= 1
    last = number + 1
    while last < len(lines) and not starts(last):
        last += 1
    return first, last - 1


def fill_empty_body(lines: list[str], error: SyntaxError) -> bool:
    """Give the empty body that an IndentationError names a stub; False if it is another error."""
    found = re.search(r"expected an indented block after .* on line (\d+)", error.msg or "")
    if not found:
        return False
    header = int(found[1]) - 1
    indent = re.match(r"\s*", lines[header])[0] + "    "
    for i in range(header + 1, len(lines)):  # in place of a comment or an empty line, so that numbers stay
        text = lines[i].strip()
        if not text or text.startswith("#"):
            lines[i] = indent + STUB
            return True
        if i + 1 >= (error.lineno or 0):
            break
    if lines[header].rstrip().endswith(":"):
        lines[header] = lines[header].rstrip() + " " + STUB
        return True
    return False


def parse(name: str, text: str) -> Source:
    """Parse a file; fill empty bodies and leave out blocks that do not parse."""
    lines, repairs = text.split("\n"), []
    if any(line.startswith("<<<<<<< ") for line in lines):
        lines = without_conflicts(lines)
        repairs.append(f"{name}: merge conflicts; the first side was taken")
    for _ in range(MOST_REPAIRS):
        try:
            return Source(name, "\n".join(lines), ast.parse("\n".join(lines)), repairs)
        except (SyntaxError, ValueError) as error:
            number = min(getattr(error, "lineno", None) or 1, len(lines))
            if isinstance(error, SyntaxError) and fill_empty_body(lines, error):
                continue
            first, last = block_around(lines, number - 1)
            repairs.append(
                f"{name}:{number}: {getattr(error, 'msg', error)}; lines {first + 1}-{last + 1} were left out"
            )
            lines[first : last + 1] = [""] * (last + 1 - first)
        except (RecursionError, MemoryError):
            break
    return Source(name, "", ast.parse(""), [*repairs, f"{name}: does not parse; left out"])


def read(path: Path) -> str:
    """The text of a file, whatever its encoding."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")


def defined(tree: ast.Module) -> set[str]:
    """The handout's names that a file defines at its top level."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in tree.body if isinstance(node, kinds)} & set(NAMES)


def read_folder(folder) -> list[Source]:
    """The files of the solution, the handout's first: those beside the file with most of its names."""
    folder = Path(folder)
    paths = [path for path in sorted(folder.rglob("*.py")) if path.is_file() and path.stat().st_size < 10**6]
    paths = [
        path for path in paths
        if not any(part in SKIPPED_FOLDERS or part.startswith(".") for part in path.relative_to(folder).parts[:-1])
    ][:200]  # fmt: skip
    sources = {path: parse(path.name, read(path)) for path in paths}
    if not sources:
        return []
    by_parent: dict[Path, set[str]] = {}
    for path, source in sources.items():
        by_parent.setdefault(path.parent, set()).update(defined(source.tree))
    home = max(by_parent, key=lambda parent: (len(by_parent[parent]), -len(parent.parts)))

    def rank(path: Path):
        main = MAIN_FILES.index(path.stem) if path.stem in MAIN_FILES else len(MAIN_FILES)
        return path.parent != home, main, -len(defined(sources[path].tree)), path.name

    chosen: dict[str, Source] = {}
    for path in sorted(sources, key=rank):
        chosen.setdefault(path.stem, sources[path])
    mains = home == folder or [source for source in chosen.values() if defined(source.tree)]
    return list(chosen.values()) if mains else []


def is_empty(node: ast.AST) -> bool:
    """True if a definition does nothing: its body is only text, `pass`, `...` and empty definitions."""
    if isinstance(node, ast.ClassDef):
        return all(is_filler(part) or (isinstance(part, ast.FunctionDef) and is_empty(part)) for part in node.body)
    inner = {part.name for part in node.body if isinstance(part, ast.FunctionDef) and is_empty(part)}
    return all(
        is_filler(part)
        or (isinstance(part, ast.FunctionDef) and part.name in inner)
        or (isinstance(part, ast.Return) and (part.value is None or is_filler(part.value)))
        or (isinstance(part, ast.Return) and isinstance(part.value, ast.Name) and part.value.id in inner)
        or (isinstance(part, ast.Assign) and isinstance(part.value, ast.Constant) and part.value.value is None)
        for part in node.body
    )


def is_filler(node: ast.AST) -> bool:
    """`pass`, a text, `...`, `None` or `raise NotImplementedError`."""
    if isinstance(node, ast.Raise):
        return "NotImplemented" in ast.dump(node)
    value = node.value if isinstance(node, ast.Expr) else node
    return isinstance(node, ast.Pass) or (
        isinstance(value, ast.Constant) and (value.value in (None, ...) or isinstance(node, ast.Expr))
    )
