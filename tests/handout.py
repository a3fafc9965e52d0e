"""The handout: a folder for students, the lab with its answers taken out.

    python -m tests.handout FOLDER [--marker] [--keep NAME …]

What is an answer stands in `tests/marker/questions.py`. Its body becomes one line that raises NotImplementedError;
signature and docstring stay. Helpers that nothing uses any more go with it.
"""

import argparse
import ast
import shutil
from pathlib import Path

from tests.marker.questions import ANSWERS
from textloader import LabError, guard

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("textloader.py", "tp5.py", "generate.py")
# Helpers that give an answer away, though what is given calls them too: emptied with it, and optional.
GOES_WITH = {"beam_steps": "generate_beam"}
NOT_FOR_STUDENTS = ("solutions", "mutations.py", "__pycache__")  # of the marker: right and wrong answers


def definitions(text: str) -> dict[str, ast.FunctionDef]:
    """The functions of a script, by name, and the methods of its classes, as Class.method."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}": part for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def emptied(text: str, holes: dict[str, str]) -> str:
    """A script in which the body of each function in `holes` raises what stands there."""
    lines, found = text.split("\n"), definitions(text)
    for name in sorted(holes.keys() & found, key=lambda name: -found[name].lineno):  # the last one first
        body, end = found[name].body, found[name].end_lineno
        first = body[0].end_lineno if ast.get_docstring(found[name]) else body[0].lineno - 1
        raised = f'raise NotImplementedError("{holes[name]}")'
        lines[first:end] = [" " * body[0].col_offset + raised]
    return "\n".join(lines)


def used(texts) -> set[str]:
    """Every name that the scripts read, call or import."""
    names = {ast.Name: "id", ast.Attribute: "attr", ast.alias: "name"}
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    return {getattr(node, names[type(node)]) for node in nodes if type(node) in names}


def without(text: str, names: set[str]) -> str:
    """A script without some of its functions."""
    lines, found = text.split("\n"), definitions(text)
    for name in sorted(names & found.keys(), key=lambda name: -found[name].lineno):
        first = min([found[name].lineno, *(d.lineno for d in found[name].decorator_list)]) - 1
        end = found[name].end_lineno
        while end < len(lines) and not lines[end].strip():
            end += 1
        del lines[first:end]
    return "\n".join(lines)


def scripts(kept=()) -> dict[str, str]:
    """The three scripts without their answers, but those `kept`: file name → text."""
    texts = {name: (ROOT / name).read_bytes().decode() for name in SCRIPTS}
    holes = {name: f"question {number}: {name}" for name, number in ANSWERS.items() if name not in kept}
    for helper, answer in GOES_WITH.items():
        if answer in holes:
            holes[helper] = f"question {ANSWERS[answer]} (optional): {helper}"
    were_used = used(texts.values())
    texts = {name: emptied(text, holes) for name, text in texts.items()}
    while gone := (were_used - used(texts.values())) & {name for text in texts.values() for name in definitions(text)}:
        texts = {name: without(text, gone) for name, text in texts.items()}
    return texts


def make(folder: Path, marker: bool = False, kept=()) -> None:
    """Write the handout into a new or empty folder; LabError if something is in it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LabError(f"{folder} has something in it: name a new folder, or an empty one")
    texts = scripts(kept)
    page = Path(__file__).with_suffix(".md").read_bytes().decode()
    given = f"Answered already: {', '.join(f'`{name}`' for name in kept)}.\n\n" if kept else ""
    texts["questions.md"] = page.replace("## ", f"{given}## ", 1)
    texts["requirements.txt"] = (ROOT / "requirements.txt").read_bytes().decode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    ignore = shutil.ignore_patterns(*NOT_FOR_STUDENTS)
    shutil.copytree(ROOT / "data", folder / "data", ignore=ignore)
    if marker:
        shutil.copytree(ROOT / "tests" / "marker", folder / "tests" / "marker", ignore=ignore)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.handout", description="Write the lab without its answers.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--marker", action="store_true", help="put the marker in, without its solutions")
    parser.add_argument("--keep", nargs="+", default=[], choices=ANSWERS, metavar="NAME",
                        help=f"leave these answers in: {', '.join(ANSWERS)}")  # fmt: skip
    options = parser.parse_args()
    make(options.folder, options.marker, options.keep)
    print(f"{options.folder}: {', '.join(SCRIPTS)}, data, requirements.txt; the questions are in questions.md")
    if options.marker:
        print("The marker is in tests/marker. Its equations and tests show what a cell or a decoder computes.")


if __name__ == "__main__":
    guard(main)
