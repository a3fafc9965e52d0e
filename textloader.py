"""Question 1: from a text to batches of sentences of unequal length.

text ─ clean ─▶ sentences ─ TextDataset ─▶ codes ─ BucketSampler, pad_collate_fn ─▶ (T, B) batches

python textloader.py [PATH]     # the handout's example, then what a corpus holds

An alphabet is a string: its symbols, in the order of their codes from 2 on. What the command lines of all
three scripts share stands at the end.
"""

import argparse
import copy
import hashlib
import io
import os
import re
import shlex
import string
import subprocess
import sys
import traceback
import unicodedata
from collections import Counter
from contextlib import suppress
from functools import lru_cache
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
LETTRES = string.ascii_letters + string.punctuation + string.digits + " "
id2lettre = {PAD_IX: "<PAD>", EOS_IX: "<EOS>", **dict(enumerate(LETTRES, start=2))}
lettre2id = {lettre: code for code, lettre in id2lettre.items()}

SIGNS = {"'": "‘’‚‛′´", '"': "“”„‟″«»", "-": "‐‑‒–−", "--": "—―", "...": "…"}
TYPOGRAPHY = {sign: plain for plain, signs in SIGNS.items() for sign in signs}
LETTERS = {"ae": "æ", "oe": "œ", "o": "ø", "l": "ł", "d": "đð", "th": "þ", "ss": "ß", "i": "ı"}
CAPITALS = {"AE": "Æ", "OE": "Œ", "O": "Ø", "L": "Ł", "D": "ĐÐ", "Th": "Þ", "SS": "ẞ"}
NOT_DECOMPOSED = {x: plain for plain, forms in (LETTERS | CAPITALS).items() for x in forms}  # by Unicode
ASCII = re.compile("[ -~]+")  # all in LETTRES
FRENCH_QUOTES = re.compile(r"(?<![^\s('’])«\s+|(?<!\s)\s+»(?!\w)")  # with the spaces inside them: « non »
CLOSING = "[\"')\\]}」』）】]*"
SENTENCE_END = re.compile(f"(?:[.!?؟۔।]|(?<=[Ͱ-Ͽἀ-῾]);){CLOSING}(?= |$)|[。！？]{CLOSING}")  # ; is Greek's ?
TITLES = {"Mr", "Mrs", "Ms", "Dr", "Prof", "St", "Mme", "Mlle", "MM", "Gen", "Sen", "Rep", "Gov", "Lt", "Col"}


class LabError(ValueError):
    """A mistake that the user can mend; its message is one line that says how."""


@lru_cache
def codes_by_lettre(lettres: str) -> dict[str, int]:
    """The code of each symbol of an alphabet."""
    return {lettre: code for code, lettre in enumerate(lettres, start=2)}


def composed(text: str) -> str:
    """`text` with each letter and its accents as one character where there is one (NFC)."""
    # In pieces where a letter may have many marks, since normalising those takes quadratic time.
    pieces = re.findall(r"\w*\W{0,100}", text) if re.search(r"[^\w\s]{100}", text) else [text]
    return "".join(unicodedata.normalize("NFC", piece) for piece in pieces)


def lettres_of(text: str) -> str:
    """The alphabet of a text: `LETTRES`, then what else it has at least five times, frequent ones first."""
    counts = Counter(ASCII.sub("", composed(text)))
    others = [char for char in counts if counts[char] >= 5 and char.isprintable() and char not in TYPOGRAPHY]
    others.sort(key=lambda char: (-counts[char], char))
    return LETTRES + "".join(others[:4000])  # each makes every step of training slower


def folded(char: str, lettres: str) -> str:
    """What stands for `char` in `lettres`: its compatible form, that without accents (ß: ss), or ""."""
    if char.isspace():
        return " "
    base = [c for c in unicodedata.normalize("NFKD", char) if not unicodedata.combining(c)]
    plain = "".join(c if c in lettres else NOT_DECOMPOSED.get(c, c) for c in base)
    forms = [TYPOGRAPHY.get(char, char), unicodedata.normalize("NFKC", char), plain]
    return next((form for form in forms if all(c in lettres for c in form)), "")


def clean(text: str, lettres: str = LETTRES) -> tuple[str, Counter, Counter]:
    """`text` in the symbols of `lettres`: what is none is `folded`, or dropped where nothing stands for it.

    Returned with it are counts of the characters folded, but for typography and white space, and dropped.
    """
    if "«" in text:
        text = FRENCH_QUOTES.sub(lambda quote: quote[0].strip(), text)
    text = composed(text)
    counts = Counter(ASCII.sub("", text))
    table = {char: folded(char, lettres) for char in counts if char not in codes_by_lettre(lettres)}
    lost = [char for char in table if not char.isspace() and char not in TYPOGRAPHY]
    changed = Counter({char: counts[char] for char in lost if table[char]})
    dropped = Counter({char: counts[char] for char in lost if not table[char]})
    replaced = f"[\0{re.escape(''.join(table))}]"  # ten times as fast as str.translate
    return re.sub(replaced, lambda char: table[char[0]], text), changed, dropped


def normalize(s: str, lettres: str = LETTRES) -> str:
    """`s` as the model sees it: only symbols of `lettres` (see `clean`), white space as one space."""
    return re.sub("  +", " ", clean(s, lettres)[0])


def string2code(s: str, lettres: str = LETTRES) -> torch.Tensor:
    """Codes of `normalize(s)`: (length,) int64."""
    codes = codes_by_lettre(lettres)
    return torch.tensor([codes[char] for char in normalize(s, lettres)], dtype=torch.int64)


def code2string(codes, lettres: str = LETTRES) -> str:
    """The text of a tensor or list of codes; BLANK and EOS have no text."""
    codes = codes.tolist() if isinstance(codes, torch.Tensor) else codes  # reading a tensor is slow
    return "".join(lettres[code - 2] for code in codes if code > EOS_IX)


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


def sentences_of(text: str) -> list[str]:
    """The sentences of a clean text, and at last what stands after them.

    None ends after an initial or a title, nor before a small letter.
    """
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
            text, self.folded, self.dropped = clean(text, lettres)
            *examples, rest = sentences_of(re.sub("  +", " ", text))
        else:  # spaces stay as they are, but those at a line's end
            text = "\n".join(text.replace("\t", " " * 4).splitlines())
            text, self.folded, self.dropped = clean(text, lettres + "\n")
            examples = [line.rstrip() for line in text.split("\n")]
        if unit == "block":
            examples = [block.strip("\n") for block in re.split("\n\n+", "\n".join(examples))]
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
        codes = codes_by_lettre(self.lettres)
        return torch.tensor([codes[char] for char in self.sentences[i]])

    def subset(self, indices) -> "TextDataset":
        """The sentences at `indices` as a dataset of their own."""
        chosen = copy.copy(self)
        chosen.sentences = [self.sentences[i] for i in indices]
        chosen.lengths = self.lengths[indices]
        return chosen

    def left_out(self) -> str:
        """In words, what of the text is not in the sentences as it stood."""
        words = ", ".join(f"{count:,} {kind}" for kind, count in self.losses.items() if count) or "nothing"
        return f"left out: {words}" + (f"; folded: {frequent(self.folded)}" if self.folded else "")


def frequent(counts: Counter) -> str:
    """The five most frequent characters of a count, in words."""
    words = [f"{count:,} {printable(char)}" for char, count in counts.most_common(5)]
    return ", ".join(words + ["…"] * (len(counts) > 5))


def likely_unit(text: str) -> str:
    """What a text seems to be made of: "line" or "block" where its lines are short and few end a sentence."""
    lines = [line.strip() for line in text.strip()[:1_000_000].splitlines()]
    full = [line for line in lines if line]
    ended = sum(bool(re.search(f"[.!?؟۔।。！？]{CLOSING}$", line)) for line in full)
    if np.median([len(line) for line in full]) > 50 or 3 * ended > len(full):
        return "sentence"  # prose, wrapped or not
    return "block" if len(lines) - len(full) > len(full) / 10 else "line"


def pad_collate_fn(samples: list[torch.Tensor]) -> torch.Tensor:
    """One (T, B) int64 batch of B sentences: EOS after each, then BLANK up to the longest."""
    batch = torch.full((max(map(len, samples), default=0) + 1, len(samples)), PAD_IX)
    for b, sample in enumerate(samples):
        batch[: len(sample), b] = sample
        batch[len(sample), b] = EOS_IX
    return batch


class BucketSampler(Sampler):
    """Batches of indices for `DataLoader(batch_sampler=…)`: sentences of like length together.

    With `shuffle`, batches come in random order, other ones in each epoch (`set_epoch`), as `seed` says.
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


def in_range(kind, low, high):
    """An argparse type: an int or float from `low` to `high`."""

    def parse(text: str):
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} from {low:,} to {high:,}")

    return parse


def printable(text) -> str:
    """`text` as one line that is safe on a terminal; a line end is shown as ⏎."""
    return "".join(char if char.isprintable() else "?" for char in str(text).replace("\n", "⏎"))


def columns(text: str) -> int:
    """How many columns of a terminal each character of `text` takes at most: Chinese ones take two."""
    return max((1 + (unicodedata.east_asian_width(char) in "WF") for char in text), default=1)


def shortened(text: str, width: int) -> str:
    """`text` as one line of at most `width` columns of a terminal; … stands for what does not fit."""
    fits = width // columns(text)
    return printable(text if len(text) <= fits else text[: fits - 1] + "…")


def checkpoints(run, name: str) -> list[Path]:
    """The file `name` of a run, or of all runs in a folder; or that file itself."""
    found = [Path(run), Path(run, name), *Path(run).glob(f"*/{name}"), *Path(run).glob(f"*/*/{name}")]
    return sorted(file for file in found if file.is_file())


def find_checkpoint(run: str | None, name: str) -> Path:
    """The checkpoint `name` of a run; without `run` of the one saved last, else of the reference LSTM."""
    folder = Path(run or RUNS)
    found = [*folder.glob(f"*/{name}"), *folder.glob(f"*/*/{name}")]
    files = sorted(file for file in found if file.is_file())
    if run and (not files or Path(run, name).exists()):
        return folder / name if folder.is_dir() else folder
    if run:
        raise LabError(f"{run} is a folder of runs: name {' or '.join(str(file.parent) for file in files)}")
    reference = RUNS / "reference"
    own = [file for file in files if reference not in file.parents]
    newest = max(own, key=lambda file: file.stat().st_mtime, default=reference / "lstm" / name)
    if not newest.exists():
        raise LabError(f"no run in {RUNS} yet: train one first with `python tp5.py --model lstm`")
    return newest


def say_next(*commands: list) -> None:
    """Print the next commands, each a list of words and paths, ready to be pasted."""
    print("Next:")
    for words in commands:
        words = [word.absolute() if isinstance(word, Path) else word for word in words]
        words = [printable(word).removeprefix(f"{Path.cwd()}{os.sep}") for word in words]
        print("   ", subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words))


def guard(main) -> None:
    """Call `main`; what a user can mend ends in one line on standard error and exit code 1."""
    sys.stdout = sys.stdout or io.StringIO()  # where the shell has closed it
    sys.stderr = sys.stderr or io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except NotImplementedError as error:  # in a handout: "question 6: generate_beam"
        frame = traceback.extract_tb(error.__traceback__)[-1]
        words = printable(error).replace(": ", " is not answered yet: ")
        sys.exit(f"{words} in {Path(frame.filename).name}, line {frame.lineno}")
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
    dataset = TextDataset(text, lettres=lettres_of(text))
    print(f"{printable(options.data)}: {len(dataset):,} sentences, {dataset.left_out()}")
    print(f"alphabet: {printable(dataset.lettres)}")
    for char, count in (dataset.folded + dataset.dropped).most_common(20):
        form = folded(char, dataset.lettres)
        name = unicodedata.name(char, f"U+{ord(char):04X}")
        print(f"    {count:,} × {printable(char)} {name}: {f'folded to {form}' if form else 'dropped'}")


if __name__ == "__main__":
    guard(main)
