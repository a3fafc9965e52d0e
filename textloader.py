"""Question 1: from a text to batches of sentences of unequal length.

text ─ normalize ─▶ sentences ─ TextDataset ─▶ codes ─ BucketSampler, pad_collate_fn ─▶ (T, B) batches

python textloader.py [PATH]     # the handout's example, then what a corpus holds

At the end stands what every command line of the lab shares.
"""

import argparse
import copy
import hashlib
import os
import re
import shlex
import string
import sys
import unicodedata
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

CORPUS = Path(__file__).parent / "data" / "speeches.txt"
RUNS = Path(__file__).parent / "runs"

# ---------------------------------------------------------------------------------------- symbols

PAD_IX = 0  # BLANK: fills a batch, never read nor predicted
EOS_IX = 1  # opens and closes every sentence
LETTRES = string.ascii_letters + string.punctuation + string.digits + " "
id2lettre = {PAD_IX: "<PAD>", EOS_IX: "<EOS>", **dict(enumerate(LETTRES, start=2))}
lettre2id = {lettre: code for code, lettre in id2lettre.items()}

TYPOGRAPHY = str.maketrans({
    **dict.fromkeys("‘’‚‛′´", "'"),
    **dict.fromkeys("“”„‟″«»", '"'),
    **dict.fromkeys("‐‑‒–−", "-"),
    **dict.fromkeys("—―", "--"),
    **{"…": "...", "œ": "oe", "Œ": "OE", "æ": "ae", "Æ": "AE"},
})  # fmt: skip
FRENCH_QUOTES = re.compile(r"(?<![^\s('’])«\s+|(?<!\s)\s+»(?!\w)")  # with the spaces inside them: « non »
ACCENTS = re.compile("[\u0300-\u036f]")
OTHER = re.compile(f"[^{re.escape(LETTRES)}]")
SENTENCE_END = re.compile(r"""([.!?]["')\]}]*) """)  # before a space only: "3.5" ends nothing


class LabError(ValueError):
    """A mistake that the user can mend; its message is one line that says how."""


def clean(text: str) -> tuple[str, Counter]:
    """`text` in the symbols of `LETTRES`, and the characters dropped, counted.

    Typographic signs become ASCII, letters lose their accents, a run of white space becomes one space.
    """
    if "«" in text:
        text = FRENCH_QUOTES.sub(lambda quote: quote[0].strip(), text)
    text = unicodedata.normalize("NFD", text.translate(TYPOGRAPHY))
    text = unicodedata.normalize("NFC", ACCENTS.sub("", text))
    text = re.sub(r"[^\S ]", " ", text)
    return re.sub("  +", " ", OTHER.sub("", text)), Counter(OTHER.findall(text))


def normalize(s: str) -> str:
    """`s` as the model sees it: only symbols of `LETTRES` (see `clean`)."""
    return clean(s)[0]


def string2code(s: str) -> torch.Tensor:
    """Codes of `normalize(s)`: (length,) int64."""
    return torch.tensor([lettre2id[char] for char in normalize(s)], dtype=torch.int64)


def code2string(codes) -> str:
    """The text of a tensor or list of codes; BLANK and EOS have no text."""
    return "".join(id2lettre[int(code)] for code in codes if code not in (PAD_IX, EOS_IX))


# -------------------------------------------------------------------------- sentences and batches
def read_text(path) -> str:
    """The text of a UTF-8 file; LabError where it is missing, empty, binary or not UTF-8."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")  # without a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"cannot read {path} as UTF-8 text: {error}") from None
    if "\0" in text or not text.strip():
        raise LabError(f"{path} is empty or binary: give a text file")
    return text


class TextDataset(Dataset):
    """The sentences of a text; item `i` is sentence `i` as int64 codes (length,), without EOS.

    A sentence ends with a run of . ! or ?, closing quotes included, before white space or the end.

    maxsent  keep the first `maxsent` sentences (None: all)
    maxlen   leave out longer sentences (None: none): a cut sentence would teach a false ending
    lines    each line is an example, with or without a full stop
    """

    def __init__(self, text: str, *, maxsent: int | None = None, maxlen: int | None = None, lines=False):
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        cleaned, self.dropped = clean(text)
        if lines:
            sentences, rest = map(normalize, text.splitlines()), ""
        else:
            *sentences, rest = SENTENCE_END.sub(r"\1\n", cleaned + " ").split("\n")
        sentences = [sentence for sentence in map(str.strip, sentences) if sentence]
        short = [sentence for sentence in sentences if maxlen is None or len(sentence) <= maxlen]
        self.sentences = short[:maxsent]
        self.lengths = np.array([len(sentence) for sentence in self.sentences], dtype=np.int64)
        self.unfinished = len(rest.strip())
        self.too_long = len(sentences) - len(short)
        self.beyond_maxsent = len(short) - len(self.sentences)

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor([lettre2id[char] for char in self.sentences[i]])

    def subset(self, indices) -> "TextDataset":
        """The sentences at `indices` as a dataset of their own."""
        chosen = copy.copy(self)
        chosen.sentences = [self.sentences[i] for i in indices]
        chosen.lengths = self.lengths[indices]
        return chosen

    def left_out(self) -> str:
        """In words, what of the text is not in the sentences."""
        counts = {
            "characters outside the alphabet": self.dropped.total(),
            "sentences longer than maxlen": self.too_long,
            "sentences beyond maxsent": self.beyond_maxsent,
            "characters after the last sentence end": self.unfinished,
        }
        return ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count) or "nothing"


def pad_collate_fn(samples: list[torch.Tensor]) -> torch.Tensor:
    """One (T, B) int64 batch of B sentences: EOS after each, then BLANK up to the longest."""
    batch = torch.full((max(map(len, samples), default=0) + 1, len(samples)), PAD_IX)
    for b, sample in enumerate(samples):
        batch[: len(sample), b] = sample
        batch[len(sample), b] = EOS_IX
    return batch


class BucketSampler(Sampler):
    """Batches of indices for `DataLoader(batch_sampler=…)`: sentences of like length together.

    shuffle  batches in random order, and lengths jittered by 2 %, so that sentences of like length meet
             in other batches each epoch (`set_epoch`), as `seed` says; otherwise all by length
    """

    def __init__(self, lengths, batch_size: int, *, shuffle: bool = True, seed: int = 0):
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(range(0, len(self.lengths), self.batch_size))

    def __iter__(self):
        random = np.random.default_rng([self.seed, self.epoch])
        sort_key = self.lengths
        starts = np.arange(0, len(self.lengths), self.batch_size)
        if self.shuffle:
            sort_key = sort_key * (1 + 0.02 * random.random(len(sort_key), dtype=np.float32))
            random.shuffle(starts)
        order = np.argsort(sort_key, kind="stable")
        for start in starts:
            yield order[start : start + self.batch_size].tolist()


# ------------------------------------------------------------------- what all command lines share
def in_range(kind, low, high):
    """An argparse type: an int or float from `low` to `high`."""

    def parse(text: str):
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} from {low:,} to {high:,}")

    return parse


def printable(text) -> str:
    """`text` as one line that is safe on a terminal."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def find_checkpoint(run: str | None, name: str) -> Path:
    """The checkpoint `name` of a run; without `run` of the one saved last, else of the reference LSTM."""
    if run:
        return Path(run) / name if Path(run).is_dir() else Path(run)
    reference = RUNS / "reference"
    own = [file for file in RUNS.glob(f"**/{name}") if reference not in file.parents]
    newest = max(own, key=lambda file: file.stat().st_mtime, default=reference / "lstm" / name)
    if not newest.exists():
        raise LabError(f"no run in {RUNS} yet: train one first with `python tp5.py --model lstm`")
    return newest


def say_next(*commands: tuple[str, Path]) -> None:
    """Print the next commands, each with the folder that it ends in, ready to be pasted."""
    print("Next:")
    for command, folder in commands:
        print(f"    {command} {shlex.quote(printable(folder))}")


def guard(main) -> None:
    """Call `main`; what a user can mend ends in one line on standard error and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (LabError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # nobody reads on: else Python's exit fails again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"{Path(sys.argv[0]).name}: {printable(error)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the handout's example, then what a corpus holds.")
    parser.add_argument("data", nargs="?", default=CORPUS, metavar="PATH", help="a UTF-8 text file")
    options = parser.parse_args()
    batch = pad_collate_fn([*TextDataset("C'est. Un. Test.")])
    print(f"The handout's example as a {batch.shape[0]} × {batch.shape[1]} batch:\n{batch}")
    print(f"and back: {[code2string(column) for column in batch.T]}\n")
    dataset = TextDataset(read_text(options.data))
    print(f"{printable(options.data)}: {len(dataset):,} sentences, left out: {dataset.left_out()}")
    for char, count in dataset.dropped.most_common(10):
        print(f"    {count:,} × {printable(char)} {unicodedata.name(char, f'U+{ord(char):04X}')}")


if __name__ == "__main__":
    guard(main)
