"""Question 1: from a text to batches of sentences of unequal length.

text ─ clean ─▶ sentences ─ TextDataset ─▶ codes ─ BucketSampler, pad_collate_fn ─▶ (T, B) batches

python textloader.py [PATH]     # the handout's example, then what a corpus holds
"""

import argparse
import copy
import hashlib
import io
import re
import shlex
import string
import subprocess
import sys
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

CORPUS = Path(__file__).parent / "data" / "speeches.txt"
RUNS = Path(__file__).parent / "runs"

# ---------------------------------------------------------------------------------------- symbols
PAD_IX = 0  # BLANK: fills a batch up, is never learned nor predicted
EOS_IX = 1  # opens and closes every sentence
LETTRES = string.ascii_letters + string.punctuation + string.digits + " "  # their codes: 2, 3, …
id2lettre = {PAD_IX: "<PAD>", EOS_IX: "<EOS>", **dict(enumerate(LETTRES, start=2))}
lettre2id = {lettre: code for code, lettre in id2lettre.items()}

SIGNS = {"'": "‘’‚‛′´", '"': "“”„‟″«»", "-": "‐‑‒–−", "--": "—―", "...": "…"}
TYPOGRAPHY = {sign: plain for plain, signs in SIGNS.items() for sign in signs}
LETTERS = {"æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ß": "ss", "ı": "i"}
NOT_DECOMPOSED = LETTERS | {x.upper(): plain.upper() for x, plain in LETTERS.items()}  # by Unicode
FRENCH_QUOTES = re.compile(r"(?<![^\s('’])«\s+|(?<!\s)\s+»(?!\w)")  # with the spaces inside them: « non »
CLOSING = "[\"')\\]}」』）】]*"
SENTENCE_END = re.compile(f"(?:[.!?؟۔।]|(?<=[Ͱ-Ͽἀ-῾]);){CLOSING}(?= |$)|[。！？]{CLOSING}")  # ; is Greek's ?
TITLES = {"Mr", "Mrs", "Ms", "Dr", "Prof", "St", "Mme", "Mlle", "MM", "Gen", "Sen", "Rep", "Gov", "Lt", "Col"}


class LabError(ValueError):
    """A mistake that the user can mend; its message is one line that says how."""


def lettres_of(text: str) -> str:
    """The alphabet of a text: `LETTRES`, then what else it has at least five times, frequent ones first."""
    counts = Counter(unicodedata.normalize("NFC", text))  # a letter and its accents are one character
    new = [char for char in counts if char not in LETTRES and char not in TYPOGRAPHY and char.isprintable()]
    often = sorted((char for char in new if counts[char] >= 5), key=lambda char: (-counts[char], char))
    return LETTRES + "".join(often[:4000])  # each makes every step of training slower


def folded(char: str, lettres: str) -> str:
    """What stands for `char` in `lettres`: its compatible form, that without accents (ß: ss), or ""."""
    base = [c for c in unicodedata.normalize("NFKD", char) if not unicodedata.combining(c)]
    plain = "".join(c if c in lettres else NOT_DECOMPOSED.get(c, c) for c in base)
    forms = [TYPOGRAPHY.get(char, char), unicodedata.normalize("NFKC", char), plain]
    return next((form for form in forms if all(c in lettres for c in form)), " " if char.isspace() else "")


def clean(text: str, lettres: str = LETTRES) -> tuple[str, Counter, Counter]:
    """`text` in the symbols of `lettres`: what is none is `folded`, or dropped where nothing stands for it.

    Returned with it are counts of the characters folded, but for typography and white space, and dropped.
    """
    text = unicodedata.normalize("NFC", FRENCH_QUOTES.sub(lambda quote: quote[0].strip(), text))
    counts = Counter(text)
    table = {char: folded(char, lettres) for char in counts if char not in lettres}
    lost = [char for char in table if not char.isspace() and char not in TYPOGRAPHY]
    changed = Counter({char: counts[char] for char in lost if table[char]})
    dropped = Counter({char: counts[char] for char in lost if not table[char]})
    return text.translate(str.maketrans(table)), changed, dropped


def normalize(s: str, lettres: str = LETTRES) -> str:
    """`s` as the model sees it: only symbols of `lettres` (see `clean`), white space as one space."""
    return re.sub("  +", " ", clean(s, lettres)[0])


def encode(text: str, lettres: str = LETTRES) -> list[int]:
    """The codes of a text that has only symbols of `lettres`."""
    return [lettres.index(char) + 2 for char in text]


def string2code(s: str, lettres: str = LETTRES) -> torch.Tensor:
    """Codes of `normalize(s)`: (length,) int64."""
    return torch.tensor(encode(normalize(s, lettres), lettres), dtype=torch.int64)


def code2string(codes, lettres: str = LETTRES) -> str:
    """The text of a tensor or list of codes; BLANK and EOS have no text."""
    return "".join(lettres[code - 2] for code in codes if code > EOS_IX)


# -------------------------------------------------------------------------- sentences and batches
def read_text(path) -> str:
    """The text of a UTF-8 file, without a byte-order mark; LabError if it is in another encoding."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise LabError(f"cannot read {path} as UTF-8 text: {error}") from None


def sentences_of(text: str) -> list[str]:
    """A text's sentences, then the rest; none ends after an initial or a title, nor before a small letter."""
    ends = [0]
    for end in SENTENCE_END.finditer(text):
        sign = end[0][0]
        word = re.search(r"\w*$", text[max(0, end.start() - 5) : end.start()])[0]
        initial = len(word) == 1 and word.isupper() and word != "I"
        abbreviated = sign == "." and (initial or word in TITLES)
        following = text[end.end() : end.end() + 2].lstrip()[:1]
        small = following != following.title()  # Georgian's small letters begin a sentence
        if sign in "。！？" or not (abbreviated or small):
            ends.append(end.end())
    return [text[start:end].strip() for start, end in pairwise([*ends, len(text)])]


class TextDataset(Dataset):
    """The examples of a text; item `i` is `sentences[i]` as int64 codes (length,), without EOS.

    maxsent  keep the first `maxsent` examples (None: all)
    maxlen   leave out longer ones (None: none): a cut sentence would teach a false ending
    unit     what an example is: "sentence"; "line"; or "block", what stands between blank lines
    lettres  the alphabet; for blocks, the line end is added
    """

    def __init__(self, text, *, maxsent=None, maxlen=None, unit="sentence", lettres=LETTRES):
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.unit = unit
        self.lettres = lettres + "\n" if unit == "block" and "\n" not in lettres else lettres
        rest = ""
        if unit == "sentence":
            text, self.folded, self.dropped = clean(text, lettres.replace("\n", ""))
            *examples, rest = sentences_of(re.sub("  +", " ", text))
        else:  # spaces stay as they are, but those at a line's end
            text, self.folded, self.dropped = clean(text.replace("\t", " " * 4), lettres + "\n")
            text = "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")
            examples = re.split("\n\n+", text) if unit == "block" else text.split("\n")
        examples = [example for example in examples if example]
        short = [example for example in examples if maxlen is None or len(example) <= maxlen]
        self.sentences = short[:maxsent]
        self.lengths = np.array([len(sentence) for sentence in self.sentences], dtype=np.int64)
        self.losses = {
            "characters outside the alphabet": self.dropped.total(),
            f"{unit}s longer than maxlen": len(examples) - len(short),
            f"{unit}s beyond maxsent": len(short) - len(self.sentences),
            "characters after the last sentence end": len(rest),
        }

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor(encode(self.sentences[i], self.lettres))

    def subset(self, indices) -> "TextDataset":
        """The sentences at `indices` as a dataset of their own."""
        chosen = copy.copy(self)
        chosen.sentences = [self.sentences[i] for i in indices]
        chosen.lengths = self.lengths[indices]
        return chosen

    def left_out(self) -> str:
        """In words, what of the text is not in the sentences as it stood."""
        words = ", ".join(f"{count:,} {kind}" for kind, count in self.losses.items() if count) or "nothing"
        for what, counts in (("folded", self.folded), ("dropped", self.dropped)):
            most = [f"{count:,} {printable(char)}" for char, count in counts.most_common(10)]
            words += f"; {what}: {', '.join(most)}" if most else ""
        return f"left out: {words}"


def describe(dataset: TextDataset, text: str, name: str) -> None:
    """Print what a corpus holds and what of it is left out; LabError where it is too little to learn from."""
    examples = f"{len(dataset):,} {dataset.unit}s"
    held_out = len(dataset) // 10
    if held_out == 0:
        ways = "--lines and --blocks make other examples"
        raise LabError(f"{name}: too little text, {examples} of 10; {ways}; {dataset.left_out()}")
    print(f"{printable(name)}: {examples}, {len(dataset) - held_out:,} to train on, {held_out:,} to validate")
    print(dataset.left_out())
    if beyond := dataset.lettres[len(LETTRES) :]:
        print(f"{len(beyond):,} symbols beyond ASCII: {printable(beyond[:50])}")
    dropped = dataset.dropped.total() / len(text)
    if len(dataset) < 1000 or dropped > 0.1:
        little = f"little to learn from: {examples}, {dropped:.0%} of the text dropped"
        print(f"warning: {little}; --init begins with a trained run", file=sys.stderr)
    lengths = [len(line) for line in text.splitlines() if line.strip()]
    ended = re.findall(rf"(?:{SENTENCE_END.pattern})\s*$", text, re.MULTILINE)
    if dataset.unit == "sentence" and len(ended) < len(lengths) / 3 and np.median(lengths) <= 50:
        print("warning: few lines end a sentence: are these --lines or --blocks?", file=sys.stderr)


def pad_collate_fn(samples: list[torch.Tensor]) -> torch.Tensor:
    """One (T, B) int64 batch of B sentences: EOS after each, then BLANK up to the longest."""
    batch = torch.full((max(map(len, samples), default=0) + 1, len(samples)), PAD_IX)
    for b, sample in enumerate(samples):
        batch[: len(sample), b] = sample
        batch[len(sample), b] = EOS_IX
    return batch


class BucketSampler(Sampler):
    """Batches of indices for `DataLoader(batch_sampler=…)`: like lengths together, shuffled each epoch."""

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
        lengths = self.lengths
        starts = np.arange(0, len(lengths), self.batch_size)
        if self.shuffle:  # lengths up to 2 % longer, so that other sentences meet in each epoch
            lengths = lengths * (1 + 0.02 * random.random(len(lengths), dtype=np.float32))
            random.shuffle(starts)
        order = np.argsort(lengths, kind="stable")
        for start in starts:
            yield order[start : start + self.batch_size].tolist()


# ------------------------------------------------------------------- what all command lines share
class ArgumentParser(argparse.ArgumentParser):
    """Python's own, whose errors show nothing that a terminal would obey."""

    def error(self, message):
        super().error(printable(message))

    def parse_args(self, args=None, namespace=None):
        options = super().parse_args(args, namespace)
        if [] in vars(options).values():  # of --hidden=-- older Pythons make no value
            self.error("-- is no value")
        return options


def in_range(kind, low, high):
    """An argparse type: an int or float from `low` to `high`."""

    def number(text: str):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not from {low:,} to {high:,}")
        return kind(text)

    return number


def printable(text) -> str:
    """`text` as one line that is safe on a terminal; a line end is shown as ⏎."""
    return "".join(char if char.isprintable() else "?" for char in str(text).replace("\n", "⏎"))


def checkpoints(folder, name: str) -> list[Path]:
    """The file `name` of a run, or of all runs in a folder; or `folder` itself, if it is a file.

    Raises LabError if there is none.
    """
    folder = Path(folder)
    found = [folder, *(file for place in ("", "*/", "*/*/") for file in folder.glob(place + name))]
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise LabError(f"no {name} in {folder}: name a run, or train one with `python tp5.py --model lstm`")
    return files


def find_checkpoint(run: str | None, name: str) -> Path:
    """The newest of `checkpoints`. Without `run`: of RUNS, the reference LSTM only if there is no other."""
    files = checkpoints(run or RUNS, name)
    own = [file for file in files if run or RUNS / "reference" not in file.parents]
    return max(own, key=lambda file: file.stat().st_mtime, default=RUNS / "reference" / "lstm" / name)


def say_next(*commands: list) -> None:
    """Print the next commands, each a list of words and paths, ready to be pasted."""
    join = subprocess.list2cmdline if sys.platform == "win32" else shlex.join
    print("Next:", *(join([printable(word) for word in words]) for words in commands), sep="\n    ")


def guard(main) -> None:
    """Call `main`; what a user can mend ends in one line on standard error and exit code 1."""
    sys.stderr = sys.stderr or io.StringIO()  # where the shell has closed it
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except NotImplementedError as error:  # in a handout: "question 6: generate_beam"
        sys.exit(f"not answered yet: {printable(error)}")
    except (LabError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            sys.stdout = None  # nobody reads on: else Python's exit fails again
        sys.exit(f"{Path(sys.argv[0]).name}: {printable(error)}")


def main() -> None:
    parser = ArgumentParser(description="Show the handout's example, then what a corpus holds.")
    parser.add_argument("data", nargs="?", default=CORPUS, metavar="PATH", help="a UTF-8 text file")
    options = parser.parse_args()
    batch = pad_collate_fn([*TextDataset("C'est. Un. Test.")])
    print(f"The handout's example as a {batch.shape[0]} × {batch.shape[1]} batch:\n{batch}")
    print(f"and back: {[code2string(column) for column in batch.T]}\n")
    text = read_text(options.data)
    describe(TextDataset(text, lettres=lettres_of(text)), text, options.data)


if __name__ == "__main__":
    guard(main)
