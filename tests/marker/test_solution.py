"""The handout's questions as tests of the folder that `--solution` names; skipped without one."""

import pytest

from .questions import mark
from .report import MISSING, NOT_JUDGED, QUESTIONS, RIGHT


@pytest.fixture(scope="session")
def report(request):
    folder = request.config.getoption("--solution", default=None)
    if folder is None:
        pytest.skip("no --solution FOLDER")
    return mark(folder)


@pytest.mark.parametrize("question", QUESTIONS)
def test_question(question, report):
    verdict = report.verdicts[question]
    if verdict.status in (MISSING, NOT_JUDGED):
        pytest.skip(f"{verdict.status} {verdict.detail}")
    assert verdict.status == RIGHT, f"{verdict.status}: {verdict.detail}"
