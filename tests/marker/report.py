"""What the marker says of a folder: one verdict a question; of a class, a table."""

import csv
import textwrap
from dataclasses import dataclass, field

RIGHT, WRONG, MISSING, CANNOT_RUN, NOT_JUDGED = "right", "wrong", "missing", "cannot run", "not judged"
SIGNS = {RIGHT: "+", WRONG: "WRONG", MISSING: "-", CANNOT_RUN: "cannot", NOT_JUDGED: "?"}

# In the handout's order; the name is the one that the handout gives.
QUESTIONS = {
    "batches": "1 pad_collate_fn",
    "loss": "2 maskedCrossEntropy",
    "generate": "3 generate",
    "embedding": "4 embedding, training",
    "rnn": "4 RNN",
    "lstm": "5 LSTM",
    "gru": "5 GRU",
    "beam": "6 generate_beam",
    "nucleus": "7 p_nucleus",
}


@dataclass
class Verdict:
    """The answer to one question."""

    status: str
    detail: str = ""  # what is wrong and where, with the smallest input, expected and got; or why it cannot run
    warnings: list[str] = field(default_factory=list)  # what does not make it wrong
    cell: dict | None = None  # how a class is built and called (`cells.Recognised`)

    @classmethod
    def checked(cls, answer: dict) -> "Verdict":
        """A verdict from what a child sent, which may be anything; ValueError if it is none."""
        verdict = cls(**{name: answer.get(name) for name in ("status", "detail", "warnings", "cell")})
        texts = [verdict.detail, *verdict.warnings] if isinstance(verdict.warnings, list) else [None]
        if verdict.status not in [*SIGNS] or not all(isinstance(text, str) for text in texts):
            raise ValueError("its process answered nonsense")
        verdict.detail, *verdict.warnings = [printable(text) for text in texts]
        return verdict


def printable(text: str) -> str:
    """A text that is safe on a terminal, its lines kept."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text[:4000])


def wrong(*mistakes: str, warnings=()) -> Verdict:
    """A wrong answer: each mistake in words, with what shows it, on lines of its own."""
    return Verdict(WRONG, "\n".join(mistakes), list(warnings))


def wrapped(text: str, first: str, rest: str = " " * 4) -> list[str]:
    """A text in lines of 79 columns; its own line breaks stay."""
    lines = []
    for line in text.split("\n"):
        indent = first if not lines else rest
        lines += textwrap.wrap(line, 79, initial_indent=indent, subsequent_indent=rest) or [indent.rstrip()]
    return lines


@dataclass
class Report:
    """All verdicts on a folder, and what had to be repaired in order to look."""

    folder: str
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    repairs: list[str] = field(default_factory=list)
    empty: bool = False  # no file of Python in it

    @property
    def passed(self) -> bool:
        """True if nothing is wrong; what is missing or not judged is not wrong."""
        return all(verdict.status not in (WRONG, CANNOT_RUN) for verdict in self.verdicts.values())

    def __str__(self):
        lines = [printable(self.folder)]
        for question, verdict in self.verdicts.items():
            lines += wrapped(verdict.detail, f"  {QUESTIONS[question]:22} {verdict.status:11}")
            for warning in verdict.warnings:
                lines += wrapped(warning, "    warning: ")
        for repair in self.repairs:
            lines += wrapped(repair, "  repaired to look: ")
        return "\n".join(lines)


def table(reports: list[Report]) -> str:
    """A class at a glance: a line a folder, a column a question."""
    rows = [["", "1", "2", "3", "4 emb", "4 RNN", "5 LSTM", "5 GRU", "6", "7"]]
    rows += [[r.folder[-15:], *[SIGNS[r.verdicts[q].status] for q in QUESTIONS]] for r in reports]
    lines = [f"{folder:16}" + "".join(f"{sign:>7}" for sign in signs) for folder, *signs in rows]
    return "\n".join([*lines, "+ right, - missing, ? not judged, cannot: it cannot run"])


def write_csv(path: str, reports: list[Report]) -> None:
    """One row a folder and question."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["folder", "question", "verdict", "detail", "warnings"])
        for report in reports:
            for question, verdict in report.verdicts.items():
                name = QUESTIONS[question]
                rows.writerow([report.folder, name, verdict.status, verdict.detail, "\n".join(verdict.warnings)])
