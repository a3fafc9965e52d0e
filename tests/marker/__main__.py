"""python -m tests.marker FOLDER [FOLDER …]: a line a question; exit code 0 if nothing is wrong, 1 if something is."""

import argparse
import sys
from pathlib import Path

from .questions import mark
from .report import NOT_JUDGED, QUESTIONS, Report, Verdict, table, write_csv
from .sandbox import unprotected


def report_on(folder: str) -> Report:
    """The report on a folder; whatever goes wrong in one costs no other."""
    try:
        return mark(folder)
    except Exception as error:
        failure = Verdict(NOT_JUDGED, f"the marker failed: {type(error).__name__}: {str(error)[:200]}")
        return Report(folder, dict.fromkeys(QUESTIONS, failure))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.marker", description="Mark students' folders, question by question."
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a folder with the handout's files")
    parser.add_argument("--csv", metavar="FILE", help="write all verdicts there, too")
    options = parser.parse_args()
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    folders = [path for path in options.folders if Path(path).is_dir()]
    if not folders:
        parser.error("no folder among them: give the folders that hold the students' files")
    if unprotected():
        print(f"students' code runs with your rights ({unprotected()}); see README.md", file=sys.stderr)
    reports = []
    for folder in folders:
        reports.append(report_on(folder))
        print(f"{folder}: error: no Python file in it" if reports[-1].empty else reports[-1], flush=True)
    if len(folders) > 1:
        print(f"\n{table(reports)}")
    for path in [path for path in options.folders if path not in folders]:
        print(f"skipped: {path} is no folder")
    if options.csv:
        try:
            write_csv(options.csv, reports)
        except OSError as error:
            sys.exit(f"the table was not written: {error}")
    sys.exit(any(report.empty or not report.passed for report in reports))


if __name__ == "__main__":
    main()
