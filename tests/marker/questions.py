"""The questions: what answers them, one check each in a process of its own, together the report on a folder."""

from pathlib import Path

from . import check_beam, check_cells, check_data, check_embedding, check_generate, check_nucleus
from .loader import Solution, load_solution
from .report import CANNOT_RUN, MISSING, NOT_JUDGED, QUESTIONS, WRONG, Report, Verdict, printable
from .sandbox import NoAnswer, run
from .source import is_empty, read_folder

# The functions that are asked for, and the number of their question; all else is given.
ANSWERS = {
    "pad_collate_fn": 1,
    "maskedCrossEntropy": 2,
    "generate": 3,
    "CharModel.forward": 4,
    "RNN.one_step": 4,
    "LSTM.one_step": 5,
    "GRU.one_step": 5,
    "generate_beam": 6,
    "p_nucleus": 7,
}

CELLS = ("rnn", "lstm", "gru")
CHECKS = {
    "batches": check_data.check_batches,
    "loss": check_data.check_loss,
    "embedding": check_embedding.check_embedding,
    "rnn": lambda solution, cells: check_cells.check_cell(solution, "rnn"),
    "lstm": lambda solution, cells: check_cells.check_cell(solution, "lstm"),
    "gru": lambda solution, cells: check_cells.check_cell(solution, "gru"),
    "generate": check_generate.check_generate,
    "beam": check_beam.check_beam,
    "nucleus": check_nucleus.check_nucleus,
}  # in the order in which they are asked: what is generated needs cells that are understood


def unanswered(solution: Solution, question: str) -> Verdict | None:
    """The verdict on an answer that is not there, is empty or does not parse; None if there is something to check."""
    if question == "embedding":
        return None
    definition = solution.definition(question)
    if definition and not is_empty(definition[1]):
        return None
    broken = solution.broken(question)
    return Verdict(CANNOT_RUN, f"a syntax error: {broken}") if broken else Verdict(MISSING)


def answer(question: str, folder: str, endless: list[str], cells: dict) -> dict:
    """Load a folder and answer one question; for a process of its own."""
    sources, _ = read_folder(folder)
    solution = load_solution(sources, endless)
    verdict = unanswered(solution, question) or CHECKS[question](solution, cells)
    if verdict.status in (WRONG, CANNOT_RUN) and question != "embedding" and solution.definition(question):
        source, node = solution.definition(question)
        verdict.detail = f"in {node.name} ({source.name}, line {node.lineno}):\n{verdict.detail}"
    return vars(verdict)


def survey(folder: str) -> dict:
    """What has to be repaired to load a folder, and what takes too long; for a process of its own."""
    sources, left_out = read_folder(folder)
    solution = load_solution(sources)
    return {"files": len(sources), "repairs": left_out + solution.repairs, "endless": sorted(solution.endless)}


def texts(values) -> list[str]:
    """What a child sent as a list of texts, if it is one."""
    return [printable(text) for text in values if isinstance(text, str)] if isinstance(values, list) else []


def ask(question: str, folder: str, endless: list[str], cells: dict) -> Verdict:
    """The verdict on one question; whatever fails on the way accuses nobody."""
    try:
        return Verdict.checked(run(answer, question, folder, endless, cells))
    except (NoAnswer, ValueError) as error:
        return Verdict(NOT_JUDGED, printable(str(error)))


def mark(folder) -> Report:
    """The report on a student's folder. Its files are only read."""
    report, cells, verdicts, endless = Report(str(folder)), {}, {}, []
    folder = str(Path(folder).resolve())  # checks run elsewhere
    try:
        found = run(survey, folder)
        endless = texts(found.get("endless"))
        report.repairs = list(dict.fromkeys(texts(found.get("repairs"))))
        report.empty = found.get("files") == 0
    except NoAnswer as error:
        report.repairs = [printable(f"loading it: {error}")]
    for question in CHECKS:
        verdicts[question] = ask(question, folder, endless, cells)
        if question in CELLS:
            cells[question] = verdicts[question].cell
    report.verdicts = {question: verdicts[question] for question in QUESTIONS}
    return report
