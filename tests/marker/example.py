"""The model that a test was made with, for a Python shell: python -i -m tests.marker.example FOLDER beam [RNN [0]].

It gives `rnn`, `emb`, `decoder`, `eos`, `start`, and the folder's `generate` or `generate_beam`. Letters that the
report does not speak of are decoys: the model writes them after prefixes that only a known mistake reads.
"""

import argparse

from . import check_beam, check_generate
from .check_cells import understand
from .generation import Symbols, library_cells
from .loader import load_solution
from .source import read_folder


def example(folder: str, question: str, which: str, number: int) -> dict:
    """The names to have in a shell."""
    solution = load_solution(read_folder(folder)[0])
    symbols, kind = Symbols.of(solution), solution.find(which.lower())
    recognised = kind and understand(kind, which.lower()).found
    recognised = recognised or next(cell for cell in library_cells() if cell.kind.__name__ == which)
    if question == "beam":
        test = check_beam.BEAM_TESTS[number]
        model, start = check_beam.rigged(recognised, symbols, test), test.prompt
        print(f"{test.words}; k = {test.k}, maxlen = {test.maxlen}, expected {test.expected!r}")
    else:
        start = check_generate.PROMPTS[number]
        model = check_generate.rigged(recognised, symbols, start)
        print(f"after {start!r} surely {check_generate.SENTENCE!r} and EOS")
    names = dict(zip(("rnn", "emb", "decoder"), model.parts(), strict=True))
    function = solution.find(question)
    print(f"try: {function.__name__}(rnn, emb, decoder, eos, {'k, ' * (question == 'beam')}start)")
    return names | {"eos": symbols.eos, "start": start, function.__name__: function}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -i -m tests.marker.example", description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("question", choices=["generate", "beam"])
    parser.add_argument("cell", nargs="?", default="RNN", choices=["RNN", "LSTM", "GRU"])
    parser.add_argument("number", nargs="?", default=0, type=int, help="which test")
    options = parser.parse_args()
    globals().update(example(options.folder, options.question, options.cell, options.number))
