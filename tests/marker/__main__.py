"""python -m tests.marker FOLDER [FOLDER …]: a line a question; exit code 0 if nothing is wrong."""

import argparse
import sys
from pathlib import Path

from .questions import mark


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.marker", description="Mark a student's folder, question by question."
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a folder with the handout's files")
    folders = parser.parse_args().folders
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    passed = True
    for folder in folders:
        if not Path(folder).is_dir():
            parser.error(f"{folder} is not a folder")
        report = mark(folder)
        print(report, flush=True)
        passed = passed and report.passed
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
