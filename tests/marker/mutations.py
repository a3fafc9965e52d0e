"""Folders for the marker's own tests: right solutions in several styles, and each with one mistake.

`solutions/` holds six plain solutions that differ in every interface the marker has to find out. A
right variant (right.txt) or a mistake (mistakes.txt) is one of them with some text replaced.
"""

from dataclasses import dataclass, field
from pathlib import Path

SOLUTIONS = Path(__file__).parent / "solutions"
STYLES = ("steps", "inside", "lists", "fused", "attribute", "library")


@dataclass
class Change:
    """A solution of one style with replaced text."""

    name: str
    style: str
    question: str = ""  # the one that the mistake belongs to; "" if the variant is right
    words: str = ""  # what the report must say of it
    edits: list[tuple[str, str, str]] = field(default_factory=list)  # (file, old text, new text), …

    def __str__(self):
        return f"{self.name} [{self.style}]"

    def write(self, folder: Path) -> Path:
        return write(self.style, folder, *self.edits)


def write(style: str, folder: Path, *edits: tuple[str, str, str]) -> Path:
    """Write a solution of a style, with some text replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [SOLUTIONS / "textloader.py", *(SOLUTIONS / style).glob("*.*")]
    texts = {path.name.removesuffix(".txt"): path.read_text(encoding="utf-8") for path in paths}
    for file, old, new in edits:
        assert old in texts[file], f"{style}/{file} has no {old!r}"
        texts[file] = texts[file].replace(old, new)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def read_changes(path: Path) -> list[Change]:
    """The changes of a text file, whose first lines say how it is written."""
    changes, question, file, lines = [], "", "", []
    for line in [*path.read_text(encoding="utf-8").split("\n"), "=== the end |"]:
        # A new text begins with the - after a +, and whatever else is no - or +.
        if lines and not (line[:1] == "+" or (line[:1] == "-" and lines[-1][0] == "-")):
            old, new = ("\n".join(text[2:] for text in lines if text[0] == sign) for sign in "-+")
            changes[-1].edits.append((file, old, new))
            lines = []
        if line[:1] in ("-", "+") and line:
            lines.append(line)
        elif line.startswith("## "):
            question = line[3:]
        elif line.startswith("@ "):
            file = line[2:]
        elif line.startswith("=== "):
            name, style, *rest = [part.strip() for part in line[4:].split("|")]
            file, words = rest or ("", "")
            changes.append(Change(name, style, question, words))
    return changes[:-1]


MISTAKES = read_changes(SOLUTIONS / "mistakes.txt")
RIGHT_VARIANTS = [*[Change("as it is", style) for style in STYLES], *read_changes(SOLUTIONS / "right.txt")]
