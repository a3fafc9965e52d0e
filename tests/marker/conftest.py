"""`python -m pytest tests/marker --solution FOLDER`: each question is a test."""


def pytest_addoption(parser):
    parser.addoption("--solution", metavar="FOLDER", help="the folder to mark, question by question")
