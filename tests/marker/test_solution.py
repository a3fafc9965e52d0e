"""The handout's questions as tests of the folder that `--solution` names; skipped without one."""

import pytest

from .questions import QUESTIONS, answer
from .report import MISSING, NOT_JUDGED, RIGHT
from .sandbox import run
from .source import read_folder


@pytest.mark.parametrize("question", QUESTIONS)
def test_question(question, request):
    folder = request.config.getoption("--solution", default=None)
    if folder is None:
        pytest.skip("no --solution FOLDER")
    verdict = run(answer, question, read_folder(folder))
    if verdict.status in (MISSING, NOT_JUDGED):
        pytest.skip(f"{verdict.status} {verdict.detail}")
    assert verdict.status == RIGHT, f"{verdict.status}: {verdict.detail}"
