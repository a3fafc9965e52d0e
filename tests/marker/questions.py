"""One check a question, each in a process of its own; together the report on a folder."""

import time
from pathlib import Path

from . import check_beam, check_cells, check_data, check_generate, check_nucleus
from .loader import DEFINITIONS, load_solution
from .report import NOT_JUDGED, QUESTIONS, WRONG, Report, Verdict
from .sandbox import run
from .source import Source, read_folder

SECONDS = 30  # of one folder; what comes later is not judged

CHECKS = {
    "batches": check_data.check_batches,
    "loss": check_data.check_loss,
    "generate": check_generate.check_generate,
    "embedding": check_data.check_embedding,
    "rnn": lambda solution: check_cells.check_cell(solution, "rnn"),
    "lstm": lambda solution: check_cells.check_cell(solution, "lstm"),
    "gru": lambda solution: check_cells.check_cell(solution, "gru"),
    "beam": check_beam.check_beam,
    "nucleus": check_nucleus.check_nucleus,
}


def answer(question: str, sources: list[Source], endless: set[str] = frozenset()) -> Verdict:
    """Load a folder and answer one question; for a process of its own."""
    solution = load_solution(sources, endless)
    verdict = CHECKS[question](solution)
    if verdict.status == WRONG and question in DEFINITIONS:
        source, node = solution.definition(question)
        verdict.detail = f"{source.name}:{node.lineno}: {verdict.detail}"
    return verdict


def survey(sources: list[Source]) -> tuple[list[str], set[str]]:
    """What has to be repaired to load a folder, and what takes too long; for a process of its own."""
    solution = load_solution(sources)
    return solution.repairs, solution.endless


def mark(folder) -> Report:
    """The report on a student's folder. Its files are only read."""
    sources = read_folder(Path(folder))
    report, start = Report(str(folder)), time.monotonic()
    found = run(survey, sources)
    repairs, endless = found if isinstance(found, tuple) else ([f"loading it: {found.detail}"], set())
    report.repairs = list(dict.fromkeys(repairs))
    for question in QUESTIONS:
        if time.monotonic() - start > SECONDS:
            report.verdicts[question] = Verdict(NOT_JUDGED, "the folder's time was up")
        else:
            report.verdicts[question] = run(answer, question, sources, endless)
    return report
