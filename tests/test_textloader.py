"""Question 1: symbols, sentences and batches, against the handout, cases by hand, any text."""

import io
import os
import re
import signal
import string
import sys
from contextlib import suppress
from pathlib import Path
from unicodedata import normalize as unicode_form

import pytest
import torch
from conftest import here, refused
from hypothesis import given
from hypothesis import strategies as st

import textloader
from textloader import CORPUS, EOS_IX, LETTRES, NOT_DECOMPOSED, PAD_IX, TYPOGRAPHY, BucketSampler, LabError
from textloader import TextDataset, clean, code2string, describe, lettres_of, normalize, pad_collate_fn
from textloader import find_checkpoint, guard, read_text, say_next, string2code

MIXED = "aAé.!?\"') \t\n\r\u0301\u0323…—«»œßﬁ\u0387\u00a0\u202e\x1bЯя。」中한\u1112\u1161\u11ab\u2028"
texts = st.text() | st.text(alphabet=MIXED, max_size=80)
alphabets = st.just(LETTRES) | texts.map(lambda text: lettres_of(text * 5))
WHITE = re.compile(r"\s+")
UNFINISHED = "characters after the last sentence end"


def test_handouts_example():
    assert string.ascii_letters + string.punctuation + string.digits + " " == LETTRES
    assert string2code("a ~").tolist() == [2, 96, 85] and (PAD_IX, EOS_IX) == (0, 1)
    dataset = TextDataset("C'est. Un. Test.")
    batch = pad_collate_fn([dataset[i] for i in range(3)])
    assert batch.shape == (7, 3) and batch.dtype == torch.int64
    assert batch[:, 1].tolist() == [*string2code("Un.").tolist(), EOS_IX, PAD_IX, PAD_IX, PAD_IX]
    assert [code2string(column) for column in batch.T] == ["C'est.", "Un.", "Test."]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is 3.5 km. Yes!", ["It is 3.5 km.", "Yes!"]),
        ("The U.S.A is (e.g.this) big? No", ["The U.S.A is (e.g.this) big?"]),
        ('He said "no." Then?! (Really.) End', ['He said "no."', "Then?!", "(Really.)"]),
        ("One\nline.\r\nTwo\u00a0words.", ["One line.", "Two words."]),
        ("“Élan” — it’s… fine.", ['"Elan" -- it\'s... fine.']),
        ("Il dit : « Tu viens ? » Elle sourit.", ['Il dit : "Tu viens ?"', "Elle sourit."]),
        ("«\u202fNon.\u00a0» Et «\u00a0oui\u00a0», dit-il. «Là»", ['"Non."', 'Et "oui", dit-il.']),
        ("L’« ami » (« oui »). »Wort!« dann.", ['L\'"ami" ("oui").', '"Wort!" dann.']),
        ("L'œuvre d'Œdipe. Cæsar.", ["L'oeuvre d'OEdipe.", "Caesar."]),
        ("Mr. King saw Mme. Roy. M. Durand left.", ["Mr. King saw Mme. Roy.", "M. Durand left."]),
        ("J. S. Bach and I. He ran.", ["J. S. Bach and I.", "He ran."]),
        ('"No?" he said. Why! no.', ['"No?" he said.', "Why! no."]),
        ("Die Straße ist groß. Der ﬁnale Preis.", ["Die Strasse ist gross.", "Der finale Preis."]),
        ("ØRSTED Łódź þorn. Ａ！", ["ORSTED Lodz thorn.", "A!"]),
        ("no end", []),
        ("", []),
        ("... . !", ["...", ".", "!"]),
    ],
)
def test_sentence_rules(text, expected):
    assert TextDataset(text).sentences == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "他说：「好！」然后走了。apt 是程序？（是。）对",
            ["他说：「好！」", "然后走了。", "apt 是程序？", "（是。）"],
        ),
        ("Он сказал «нет». Да! г. и т. д.", ['Он сказал "нет".', "Да! г. и т. д."]),
        ("هل هذا كتاب؟ نعم۔ لا.", ["هل هذا كتاب؟", "نعم۔", "لا."]),
        ("यह किताब है। हाँ।", ["यह किताब है।", "हाँ।"]),
        ("Τι είναι; Αυτό· ναι.", ["Τι είναι;", "Αυτό· ναι."]),
        ("Τι είναι\u037e Αυτό.", ["Τι είναι;", "Αυτό."]),
        ("გამარჯობა. როგორ ხარ?", ["გამარჯობა.", "როგორ ხარ?"]),
        (unicode_form("NFD", "안녕하세요. 네."), ["안녕하세요.", "네."]),
    ],
    ids=["Chinese", "Russian", "Arabic", "Hindi", "Greek", "Greek, its own sign", "Georgian", "Korean"],
)
def test_sentences_of_other_scripts(text, expected):
    assert TextDataset(text, lettres=lettres_of(text * 5)).sentences == expected


# ------------------------------------------------------------------------------ alphabets, cleaning


def test_alphabet_of_a_text():
    """What it has five times, frequent ones first, then by code point; no typography, control or space."""
    text = "яяяяяяя" + "щбёéñ" * 5 + "e\u0301" + "ж" * 4 + "’…«\u00a0\u3000\x1b\u202e\u200d" * 9 + "abc" * 9
    assert lettres_of(text) == LETTRES + "яéñбщё"
    assert lettres_of("ж" * 4 + "plain") == LETTRES == lettres_of("")
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 5000)))
    assert lettres_of(many * 5) == LETTRES + many[:4000]
    assert lettres_of(many * 5 + many[-1])[len(LETTRES)] == many[-1]


def test_shipped_corpus_has_the_handouts_alphabet():
    assert lettres_of(read_text(CORPUS)) == LETTRES


@given(texts, alphabets)
def test_every_text_round_trips_or_its_losses_are_counted(text, lettres):
    """By the character: kept, or typography, or white space, or folded, or dropped, the last two counted."""
    cleaned, folded, dropped = clean(text, lettres)
    assert set(cleaned) <= set(lettres) and not (set(folded) | set(dropped)) & set(lettres)
    assert clean(cleaned, lettres)[1:] == ({}, {})
    normal = normalize(text, lettres)
    assert normal == re.sub(" +", " ", cleaned) == code2string(string2code(text, lettres), lettres)
    if "«" in text or "»" in text:  # which lose the spaces inside
        return
    whole = unicode_form("NFC", text)
    for char in set(whole):
        alone = clean(char, lettres)
        lost = not (char in lettres or char in TYPOGRAPHY or char.isspace())
        counts = folded if alone[0] else dropped
        assert counts[char] == (whole.count(char) if lost else 0)
    assert cleaned == "".join(clean(char, lettres)[0] for char in whole)
    assert folded.total() + dropped.total() <= len(whole)


@given(texts)
def test_an_alphabet_and_cleaning_agree(text):
    """No character of a text's own alphabet is folded or dropped; at five times, only what nobody sees is."""
    lettres = lettres_of(text)
    assert lettres.startswith(LETTRES) and len(set(lettres)) == len(lettres)
    assert all(char.isprintable() for char in lettres) and not set(lettres) & set(TYPOGRAPHY)
    _, folded, dropped = clean(text, lettres)
    assert not (set(folded) | set(dropped)) & set(lettres)
    five = clean(text, lettres_of(" ".join([text] * 5)))
    assert not five[1] and not any(char.isprintable() for char in five[2])


@given(texts, alphabets)
def test_composed_or_not_is_the_same(text, lettres):
    forms = unicode_form("NFC", text), unicode_form("NFD", text)
    assert lettres_of(forms[0] * 5) == lettres_of(forms[1] * 5)
    assert clean(forms[0], lettres) == clean(forms[1], lettres) == clean(text, lettres)


HANDOUTS = st.characters(exclude_characters=[*TYPOGRAPHY, *filter(lambda x: len(x) == 1, NOT_DECOMPOSED)])


@given(st.text(HANDOUTS))
def test_handouts_normalize(text):
    """Where no compatible form and no table steps in: the handout's formula, but for white space."""
    text = "".join(char for char in text if unicode_form("NFKD", char) == unicode_form("NFD", char))
    handouts = "".join(c for c in unicode_form("NFD", re.sub(r"\s", " ", text)) if c in LETTRES)
    assert normalize(text) == re.sub(" +", " ", handouts)


@given(texts, alphabets, st.integers(1, 8), st.integers(1, 4), st.sampled_from(["sentence", "line", "block"]))
def test_every_example_is_kept_or_counted(text, lettres, maxlen, maxsent, unit):
    whole = TextDataset(text, unit=unit, lettres=lettres)
    if unit == "sentence":
        cleaned, joined = normalize(text, lettres).strip(), " ".join(whole.sentences)
        assert WHITE.sub("", cleaned).startswith(WHITE.sub("", joined))
        assert len(WHITE.sub("", cleaned)) - len(WHITE.sub("", joined)) <= whole.losses[UNFINISHED]
        assert not any("  " in sentence or sentence != sentence.strip() for sentence in whole.sentences)
        assert (whole.folded, whole.dropped) == clean(text, lettres)[1:]
    else:
        assert whole.losses[UNFINISHED] == 0 and all(sentence.strip() for sentence in whole.sentences)
    for dataset in (whole, TextDataset(text, unit=unit, lettres=lettres, maxlen=maxlen, maxsent=maxsent)):
        codes = [dataset[i] for i in range(len(dataset))]
        assert [code2string(code, dataset.lettres) for code in codes] == dataset.sentences
        assert dataset.lengths.tolist() == [len(sentence) for sentence in dataset.sentences]
    assert dataset.sentences == [s for s in whole.sentences if len(s) <= maxlen][:maxsent]
    left_out = {kind: count for kind, count in dataset.losses.items() if kind.startswith(unit)}
    assert len(left_out) == 2 and len(dataset) + sum(left_out.values()) == len(whole)
    left_out = re.split("; (?:folded|dropped): ", dataset.left_out())[0]
    assert left_out.startswith("left out: ")
    assert [*map(int, re.findall(r"\b\d+", left_out))] == [count for count in dataset.losses.values() if count]


def test_what_was_left_out_is_said_in_words():
    text = "Été à Noël. Oß ☺☺. Un.\nÉéé"
    assert TextDataset("Un.").left_out() == "left out: nothing"
    said = TextDataset(text, maxlen=5, maxsent=1).left_out()
    for words in ("2 characters outside the alphabet", "1 sentences longer", "1 sentences beyond maxsent"):
        assert words in said
    assert ", 3 characters after the last sentence end; folded: 3 é, 2 É, 1 à, 1 ë, 1 ß; dropped: 2 ☺" in said
    assert "1 lines beyond maxsent" in TextDataset(text, unit="line", maxsent=1).left_out()
    assert "1 blocks longer than maxlen" in TextDataset(text, unit="block", maxlen=5).left_out()
    many = TextDataset("ñàáâãäåèéêëíìõ" + "ñ" * 9 + ".").left_out()  # the most frequent only
    assert "folded: 10 ñ, 1 à" in many and many.count("1 ") == 9


# -------------------------------------------------------------------------------- lines and blocks


def test_each_line_is_an_example():
    text = "Léa\n\n  Jean. Luc \r\nZoé ☺\n\ta  b\n"
    dataset = TextDataset(text, unit="line")
    assert dataset.sentences == ["Lea", "  Jean. Luc", "Zoe", "    a  b"] and dataset.losses[UNFINISHED] == 0
    assert dataset.dropped == {"☺": 1} and dataset.folded == {"é": 2} and dataset.lettres == LETTRES


def test_each_block_is_an_example():
    """Line ends are symbols, indentation stays, spaces before a line's end go; Windows' line ends, too."""
    text = "\n\nA:\n  x  y \n\n \t \n\tB\r\nc\r\n\r\nD\n\n\n"
    dataset = TextDataset(text, unit="block")
    assert dataset.sentences == ["A:\n  x  y", "    B\nc", "D"]
    assert dataset.lettres == LETTRES + "\n" and dataset.left_out() == "left out: nothing"
    assert dataset[1].tolist()[-2:] == [len(LETTRES) + 2, 2 + LETTRES.index("c")]
    assert TextDataset("a\n\nb", unit="block", lettres=LETTRES + "\né").lettres == LETTRES + "\né"
    assert TextDataset("no blank line\nat all", unit="block").sentences == ["no blank line\nat all"]


LINES = st.text(alphabet=LETTRES + "éя", min_size=1).map(str.rstrip).filter(bool)
BLOCKS = st.lists(LINES, min_size=1).map("\n".join)


@given(st.lists(BLOCKS), st.integers(1, 4), st.sampled_from(["\n", "\r\n"]))
def test_blocks_round_trip_through_codes(blocks, blanks, line_end):
    text = ("\n" + " \n" * blanks).join(blocks).replace("\n", line_end)
    dataset = TextDataset(text, unit="block", lettres=LETTRES + "éя")
    assert [code2string(dataset[i], dataset.lettres) for i in range(len(dataset))] == blocks
    assert (
        TextDataset(text, unit="line", lettres=LETTRES + "éя").sentences
        == "\n".join(blocks).split("\n")[: None if blocks else 0]
    )


# Each takes this process a second or less; a square of the length would take minutes.
MONOTONOUS = {
    "no space": "x" * 10**6,
    "marks on letters": ("a" + "\u0301\u0323" * 60) * 10**4,
    "full stops": "." * 10**6,
    "quotes": '."' * 10**5,
    "blanks": "«a" + " " * 10**5,
    "guillemets": " »" * 10**5,
    "Chinese stops": "。" * 10**5,
    "blank lines": "\n" * 10**6,
    "blank lines of spaces": " \n" * 10**6,
    "indentation": "\t" * 10**6 + "a",
}


@pytest.fixture
def a_minute():
    """The test fails after a minute of this process's own work, whatever else the machine does."""

    def stop(*_):
        raise TimeoutError("a minute of work")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 60)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="POSIX timers")
@pytest.mark.parametrize("name", MONOTONOUS)
def test_long_monotonous_texts(name, a_minute):
    """Time grows with the length, not with its square."""
    text = MONOTONOUS[name]
    lettres = lettres_of(text)
    for unit in ("sentence", "line", "block"):
        TextDataset(text, unit=unit, lettres=lettres)
    with suppress(LabError):  # too little text
        describe(TextDataset(text, lettres=lettres), text, name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"ab\xffcd.", ["position 2"]),
        ("Un.".encode("utf-16"), ["0xff"]),
        (b"\xef\xbb\xbfa\xff", ["0xff"]),
        (None, ["corpus.txt"]),
    ],
)
def test_bad_files(tmp_path, content, words):
    path = tmp_path / "corpus.txt"
    path.write_bytes("\ufeffHé.\r\n".encode())  # a byte order mark is no text
    assert read_text(path) == "Hé.\n"
    path.unlink() if content is None else path.write_bytes(content)
    refused(here("textloader.py", path), *words)


# ---------------------------------------------------------------------------------------- batches


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(1, 9), st.integers(0, 5), st.booleans())
def test_sampler_takes_every_sentence_once(lengths, batch_size, epoch, shuffle):
    sampler = BucketSampler(lengths, batch_size, shuffle=shuffle, seed=3)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == len(sampler) and max(map(len, batches)) <= batch_size
    assert batches == list(sampler)  # the same epoch again


def test_a_batch_of_no_sentence():
    """Of three processes, one may get nothing of a last batch of two."""
    assert pad_collate_fn([]).shape == (1, 0) and pad_collate_fn([]).dtype == torch.int64


def test_sampler_shuffles_by_epoch_and_seed():
    def epoch(number, seed, shuffle=True):
        sampler = BucketSampler([5, 500] * 100, 10, seed=seed, shuffle=shuffle)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(0, 0) != epoch(1, 0) != epoch(1, 1)
    assert {frozenset(batch) for batch in epoch(0, 0)} != {frozenset(batch) for batch in epoch(1, 0)}
    assert [batch[0] % 2 for batch in epoch(0, 0)] != sorted(batch[0] % 2 for batch in epoch(0, 0))
    assert epoch(0, 0, shuffle=False) == epoch(3, 1, shuffle=False)


def test_buckets_waste_little_on_the_corpus():
    """Counted in the batches themselves."""
    dataset = TextDataset(read_text(CORPUS))
    blank = total = 0
    for batch in BucketSampler(dataset.lengths, 32):
        codes = pad_collate_fn([dataset[i] for i in batch])
        blank, total = blank + int((codes == PAD_IX).sum()), total + codes.numel()
    assert blank / total <= 0.03


# ----------------------------------------------------------------------------------- command line


def test_command_describes_a_corpus_in_printable_text(tmp_path):
    """Nothing that a terminal would obey: not from the text, not from its name."""
    path = tmp_path / "c\x1b[31m\u202e\r.txt"
    text = "Un ☺ \x1b]0;title\x07\u202e\x9b31m\x7f\ue000 né. " + "Deux щ. " * 9 + "Reste"
    path.write_text(text, encoding="utf-8")
    result = here("textloader.py", path)
    assert result.returncode == 0, result.stderr
    said = "7 × 3 batch", "10 sentences, 9 to train on, 1 to validate", "1 symbols beyond ASCII", "1 ☺, 1 ?"
    for words in (
        *said,
        "5 characters after the last sentence end",
        "7 characters outside the alphabet",
        "folded: 1 é",
    ):
        assert words in result.stdout
    assert "little to learn from: 10 sentences" in result.stderr
    assert all(c.isprintable() or c == "\n" for c in result.stdout)


def test_what_a_user_can_mend_is_one_line(monkeypatch, capsys, tmp_path):
    """A hole in a handout's folder; streams of any kind."""

    def hole():
        raise NotImplementedError("question 5: LSTM.one_step")

    words = "^not answered yet: question 5: LSTM.one_step$"
    for stream in (None, io.StringIO()):  # closed by the shell; a notebook's
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit, match=words):
            guard(hole)


def test_the_newest_checkpoint_of_a_run_a_folder_of_runs_or_all(tmp_path, monkeypatch):
    """Runs behind links are seen; a folder or a pipe that is called best.pt is no file."""
    runs = tmp_path / "runs"
    for age, name in enumerate(("elsewhere", "runs/all/rnn", "runs/a", "runs/reference/lstm", "runs/reference/gru")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "best.pt").touch()
        os.utime(tmp_path / name / "best.pt", (age, age))
    (runs / "c" / "best.pt").mkdir(parents=True)
    (runs / "b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    monkeypatch.setattr(textloader, "RUNS", runs)

    def found(run):
        return str(find_checkpoint(run and str(runs / run), "best.pt").parent.relative_to(runs))

    assert [found(run) for run in ("a", "all", "b/best.pt", "reference/gru")] == ["a", "all/rnn", "b", "reference/gru"]
    assert found(None) == "a"  # the reference is newer
    os.utime(tmp_path / "elsewhere" / "best.pt", (9, 9))
    assert found(None) == "b"
    os.mkfifo(runs / "c" / "last.pt")
    for run, name in (("c", "best.pt"), ("c/best.pt", "best.pt"), ("c", "last.pt"), (None, "last.pt")):
        with pytest.raises(LabError, match=f"^no {name} in {(run and runs / run) or runs}: "):
            find_checkpoint(run and str(runs / run), name)
    for folder in ("all", "a", "b"):
        (runs / folder).rename(tmp_path / folder)
    assert found(None) == "reference/lstm"


def test_next_commands_can_be_pasted(capsys):
    say_next(["tensorboard", "--logdir", Path("a run")], ["python", "tp5.py", "--run", Path("/x/y\x1b")])
    assert capsys.readouterr().out == "Next:\n    tensorboard --logdir 'a run'\n    python tp5.py --run '/x/y?'\n"
