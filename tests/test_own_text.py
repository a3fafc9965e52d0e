"""A text of one's own: any script, lines, blocks, and a run that begins with the weights of another."""

import random
import re
import shutil

import pytest
from conftest import events_of, here, refused, same

from textloader import LETTRES, TextDataset, lettres_of
from tp5 import load, load_corpus, new_run, run_options

SMALL = ("--hidden", "16", "--embedding", "8", "--batch-size", "16", "--histograms-every", "0")
RUSSIAN = (("Мы", "Эти"), ("ждём", "видим"), ("12", "7"), ("ёлок", "щук"))  # a word of each
ENGLISH = (("To", "Or"), ("be", "not"), ("no", "el"))


def sentences(grammar, count: int, ends=".!", seed: int = 0) -> list[str]:
    """Random sentences that a small model soon learns to end."""
    dice = random.Random(seed)
    return [" ".join(map(dice.choice, grammar)) + dice.choice(ends) for _ in range(count)]


def written(path, text: str):
    path.write_bytes(text.encode())
    return path


def printed(script: str, *arguments, errors="") -> str:
    """What a command prints: nothing that a terminal would obey, and no errors but this warning."""
    result = here(script, *arguments)
    assert result.returncode == 0 and re.fullmatch(f"(warning: .*{errors}.*\n)?", result.stderr), result.stderr
    assert all(char.isprintable() or char == "\n" for char in result.stdout)
    return result.stdout


def train(folder, text, *options) -> str:
    """Train a run in `folder` by the command line: what it printed."""
    return printed("tp5.py", "--data", text, "--run", folder, *SMALL, "--epochs", "2", *options, errors="little")


def told(capsys, text, **options) -> tuple[list[str], str, str]:
    """All examples of a text with these options of the command line, what is said and warned of them."""
    train_set, valid_set = load_corpus(run_options({"data": text, **options}))
    return [*train_set.sentences, *valid_set.sentences], *capsys.readouterr()


@pytest.fixture(scope="module")
def russian(tmp_path_factory):
    """A folder with a Russian text, a trained run of two cells, and what training said."""
    folder = tmp_path_factory.mktemp("russian")
    text = written(folder / "text.txt", "\n".join(sentences(RUSSIAN, 300)) + "\n№ Ц ц☺☺ Ц.")
    said = [train(folder / "runs" / model, text, "--model", model) for model in ("lstm", "gru")]
    written(folder / "said.txt", said[0])
    return folder


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    """A folder with a play, with Windows' line ends, and a run of it whose examples are blocks."""
    folder, lines = tmp_path_factory.mktemp("play"), sentences(ENGLISH, 200, ends=",;")
    blocks = [f"{('KING', 'FOOL')[i % 3 == 0]}:\r\n{line}\r\n  {line}" for i, line in enumerate(lines)]
    train(folder / "run", written(folder / "play.txt", "\r\n\r\n".join(blocks)), "--blocks")
    return folder


# ------------------------------------------------------------------------------------- any script


def test_training_takes_the_alphabet_of_its_text_and_says_so(russian):
    said, text = (russian / "said.txt").read_text("utf-8"), (russian / "text.txt").read_text("utf-8")
    model, lettres = load(russian / "runs" / "lstm" / "best.pt").model, lettres_of(text)
    assert model.emb.lettres == lettres and set("МыЭтиёщ") <= set(lettres) and not set("Цц№☺") & set(lettres)
    assert model.emb.num_embeddings == model.decoder.out_features == len(lettres) + 2
    assert f"{len(lettres) - len(LETTRES)} symbols beyond ASCII: {lettres[len(LETTRES) :]}\n" in said
    assert "301 sentences, 271 to train on, 30 to validate" in said
    assert "left out: 5 characters outside the alphabet; folded: 1 №" in said


def test_ascii_text_has_the_handouts_alphabet(tmp_path, capsys):
    text = written(tmp_path / "a.txt", " ".join(sentences(ENGLISH, 60)))
    assert load_corpus(run_options({"data": text}))[0].lettres == LETTRES
    assert "beyond ASCII" not in capsys.readouterr().out


def test_every_decoder_writes_russian(russian):
    """Side by side, and exact search proves its sentence; a start is folded, one that is lost is refused."""
    run = russian / "runs" / "lstm"
    said = printed("generate.py", "--checkpoint", run, "--start", "Мы ", "--maxlen", "40")
    lines = re.findall(r"^  (Мы .*?)$", said, re.M)
    assert len(lines) == 7 and set("".join(lines)) <= set(load(run / "best.pt").model.emb.lettres)
    said = printed("generate.py", "--checkpoint", run, "--exact", "--start", "É Мы «")
    assert re.search(r'^  E Мы ".*\n.*\n    proved', said, re.M)
    refused(here("generate.py", "--checkpoint", run, "--start", "名"), "outside the alphabet", "名")


def test_looking_and_comparing_use_the_runs_alphabet(russian):
    runs = russian / "runs"
    assert "| lstm " in printed("tp5.py", "--compare", runs)
    printed("tp5.py", "--resume", runs / "lstm", "--look", "Мы ждём «щук» 12.")
    assert "3_units/look" in events_of(runs / "lstm").Tags()["images"]
    refused(here("tp5.py", "--resume", runs / "lstm", "--look", "名"), "outside the alphabet", "名")


def test_resuming_uses_the_runs_alphabet(russian, tmp_path):
    shutil.copytree(russian / "runs" / "gru", tmp_path / "run")
    before = load(tmp_path / "run" / "last.pt").progress.step
    said = printed("tp5.py", "--resume", tmp_path / "run", "--epochs", "3")
    after = load(tmp_path / "run" / "last.pt")
    assert f"going on after step {before}\n" in said and after.progress.step == before * 3 // 2
    assert after.model.emb.lettres == lettres_of((russian / "text.txt").read_text("utf-8"))
    other = written(tmp_path / "b.txt", "\n".join(sentences(RUSSIAN, 300, seed=1)))
    result = here("tp5.py", "--resume", tmp_path / "run", "--data", other)
    assert result.returncode == 1 and "another text" in result.stderr.splitlines()[-1]


def test_a_text_without_spaces_is_trained_and_compared(tmp_path):
    """A full stop alone ends its sentences."""
    text = "".join(sentence.replace(" ", "") for sentence in sentences(("我他", "来去看", "山水田"), 150, "。！"))
    said = train(tmp_path / "runs" / "rnn", written(tmp_path / "c.txt", text), "--model=rnn")
    assert "150 sentences" in said and "10 symbols beyond ASCII" in said
    assert "| rnn " in printed("tp5.py", "--compare", tmp_path / "runs")
    assert "我" in printed("generate.py", "--checkpoint", tmp_path / "runs" / "rnn", "--start", "我")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Una. " * 9, ["too little text", "9 sentences", "10"]),
        ("".join(map(chr, range(0x4E00, 0x5200))) + "。", ["too little text", "dropped: 1 一"]),
        ("no end, nor a second line", ["too little text", "0 sentences", "25 characters after the last"]),
    ],
    ids=["nine sentences", "each character once", "no end"],
)
def test_too_little_is_refused_in_one_line(tmp_path, text, words):
    refused(here("tp5.py", "--data", written(tmp_path / "a.txt", text), "--run", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


def test_what_was_folded_is_said(tmp_path, capsys):
    """Three é are fewer than the five that make a symbol."""
    text = written(tmp_path / "a.txt", " ".join(sentences(ENGLISH, 30)) + " Été né, né. Straße ☺☺.")
    _, said, warned = told(capsys, text)
    assert "left out: 2 characters outside the alphabet; folded: 3 é, 1 É, 1 ß" in said
    assert "little to learn from: 32 sentences" in warned and "--init" in warned


# -------------------------------------------------------------------------------- lines and blocks


def test_a_play_stands_as_it_is(play, capsys):
    """Line ends are symbols; decoders print them as lines, indented by two spaces like all they write."""
    run, text = load(play / "run" / "best.pt"), (play / "play.txt").read_bytes().decode()
    assert run.model.emb.lettres == LETTRES + "\n" and run.options.blocks
    examples, _, _ = told(capsys, play / "play.txt", blocks=True)
    assert sorted(examples) == sorted(text.replace("\r\n", "\n").split("\n\n"))
    said = printed("generate.py", "--checkpoint", play / "run", "--greedy", "--start", "KING:\nTo")
    assert "\n  KING:\n  To" in said
    assert "| run " in printed("tp5.py", "--compare", play / "run")
    said = printed("tp5.py", "--resume", play / "run", "--look", "KING:\nTo be")
    assert "3_units/look" in said


def test_one_line_samples_show_a_line_end_by_a_sign(play):
    said = printed("tp5.py", "--resume", play / "run", "--epochs", "3")
    samples = re.findall(r"^  (?:greedy|sampled|cooler|nucleus|beam|nucleus beam)  +(.*)", said, re.M)
    assert len(samples) == 6 and any("⏎" in sample for sample in samples)


def test_lines_and_blocks_exclude_one_another(play):
    refused(here("tp5.py", "--data", play / "play.txt", "--lines", "--blocks"), "not allowed", code=2)


def test_long_blocks_are_left_out_and_counted(tmp_path, capsys):
    text = written(tmp_path / "a.txt", ("\n" * 500).join(["A short\nblock"] * 20 + ["long\n" * 50, "x" * 101]))
    examples, said, _ = told(capsys, text, blocks=True, maxlen=100, maxsent=15)
    assert examples == ["A short\nblock"] * 15 and "15 blocks, 14 to train on, 1 to validate" in said
    assert "2 blocks longer than maxlen" in said and "5 blocks beyond maxsent" in said


def test_ten_thousand_blank_lines_or_none(tmp_path, capsys):
    lines = sentences(ENGLISH, 60, ends=("",))
    text = written(tmp_path / "a.txt", "\n".join(lines[:20]) + "\r\n" * 10_000 + "\n \n".join(lines[20:]) + "\n")
    blocks, said, _ = told(capsys, text, blocks=True)
    assert sorted(blocks) == sorted(["\n".join(lines[:20]), *lines[20:]]) and "left out: nothing" in said
    assert sorted(told(capsys, text, lines=True)[0]) == sorted(lines)
    text = written(tmp_path / "b.txt", "\n".join(lines))
    refused(here("tp5.py", "--data", text, "--blocks"), "too little text, 1 block")


VERSES = sentences(ENGLISH, 99, ends=("", "", "", "?"))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("\n".join(VERSES), "--lines"),
        ("\n\n".join(f"{verse}\n{verse}" for verse in VERSES), "--blocks"),
        ("\n".join(sentences(ENGLISH, 60)), None),
        (" ".join(sentences(ENGLISH, 60)), None),
        ("\n\n".join(" ".join(sentences(ENGLISH, 6)) for _ in range(9)), None),
    ],
    ids=["titles", "verses", "short sentences", "one line", "paragraphs"],
)
def test_a_hint_where_lines_or_blocks_are_meant(tmp_path, capsys, text, hint):
    path = written(tmp_path / "a.txt", text)
    assert told(capsys, path)[2].count("few lines end a sentence: are these --lines or --blocks?") == bool(hint)
    if hint:  # and no more once it is taken
        assert "few lines end" not in told(capsys, path, **{hint[2:]: True})[2]


def test_code_keeps_its_indentation(tmp_path, capsys):
    text = written(tmp_path / "a.py", "def f(x):\n\treturn x  \n" * 30)
    examples, said, _ = told(capsys, text, lines=True)
    assert {*examples} == {"def f(x):", "    return x"} and "60 lines" in said


# ------------------------------------------------------------------------------------------- --init


@pytest.fixture(scope="module")
def begun(russian, tmp_path_factory):
    """A run of one epoch on a page of another Russian text that begins with the Russian run; its text."""
    folder = tmp_path_factory.mktemp("begun")
    text = written(folder / "page.txt", " ".join(sentences((*RUSSIAN, ("там", "часто")), 60, seed=2)) + " Né ☺☺.")
    options = ("--data", text, "--init", russian / "runs" / "gru", "--epochs", "1", "--batch-size", "16")
    result = here("tp5.py", *options, "--run", folder / "run")
    assert result.returncode == 0, result.stderr
    return folder, result


def test_init_takes_cell_sizes_and_alphabet_of_its_run(russian, begun):
    folder, result = begun
    first, run = load(russian / "runs" / "gru" / "best.pt"), load(folder / "run" / "last.pt")
    assert (run.options.model, run.options.hidden, run.options.embedding) == ("gru", 16, 8)
    assert run.model.emb.lettres == first.model.emb.lettres and "ч" not in run.model.emb.lettres
    text = (folder / "page.txt").read_text("utf-8")
    lost = sum(char not in run.model.emb.lettres for char in text) - 1
    assert f"{lost} characters outside the alphabet" in result.stdout and "folded: 1 é" in result.stdout
    assert run.options.init == str(russian / "runs" / "gru" / "best.pt")  # the checkpoint says where it began
    assert run.progress.step == 4 and not same(first.model, run.model)
    assert "--init" in result.stderr  # little to learn from


def test_init_begins_with_that_runs_weights(russian, begun):
    folder, _ = begun
    first, run = load(russian / "runs" / "gru" / "best.pt"), load(folder / "run" / "last.pt")
    corpus = TextDataset("Да.", lettres=first.model.emb.lettres)
    start = new_run(run.options, corpus)
    assert same(first.model, start.model) and not any(optimizer.state for optimizer in start.optimizers)


def test_init_of_no_step_writes_what_that_run_writes(russian, tmp_path):
    """At a rate of 0, nothing is learned: greedy sentences and validation loss are the first run's."""
    again = ("--data", russian / "text.txt", "--init", russian / "runs" / "gru", "--lr", "0", "--epochs", "1")
    result = here("tp5.py", *again, "--run", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    first, run = load(russian / "runs" / "gru" / "best.pt"), load(tmp_path / "run" / "best.pt")
    assert same(first.model, run.model) and run.progress.best_loss == pytest.approx(first.progress.best_loss)


def test_init_of_another_kind_of_example(russian, play, tmp_path):
    """A run on sentences knows no line ends; one on blocks does, and sentences have none all the same."""
    sentences_run, blocks_run = russian / "runs" / "gru", play / "run"
    begin = ("--data", play / "play.txt", "--epochs", "1", "--run", tmp_path / "run", "--init")
    refused(here("tp5.py", *begin, sentences_run, "--blocks"), "--blocks", "line ends")
    assert not (tmp_path / "run").exists()
    dataset = TextDataset("We\nmet.\nYes.", lettres=load(blocks_run / "best.pt").model.emb.lettres)
    assert dataset.sentences == ["We met.", "Yes."]


@pytest.mark.parametrize(
    "options",
    [("--hidden", "9"), ("--embedding", "9"), ("--model", "lstm"), ("--model", "all"), ("--model", "gru", "rnn")],
    ids=" ".join,
)
def test_init_refuses_what_contradicts_its_run(russian, tmp_path, options):
    run = "--init", russian / "runs" / "gru", "--run", tmp_path / "run"
    refused(here("tp5.py", "--data", russian / "text.txt", *run, *options), options[0], "--init", code=2)
    assert not (tmp_path / "run").exists()


def test_a_run_outlives_the_run_that_it_began_with(russian, tmp_path):
    shutil.copytree(russian / "runs" / "gru", tmp_path / "first")
    options = ("--data", russian / "text.txt", "--init", tmp_path / "first", "--epochs", "1")
    assert here("tp5.py", *options, "--run", tmp_path / "run").returncode == 0
    shutil.rmtree(tmp_path / "first")
    found = here("tp5.py", "--resume", tmp_path / "run", "--epochs", "2")
    assert found.returncode == 0 and "Units of this gru" in found.stdout, found.stderr


def test_init_needs_a_run(tmp_path):
    refused(here("tp5.py", "--init", tmp_path / "none"), "none")
    refused(here("tp5.py", "--init", written(tmp_path / "text.pt", "no checkpoint")), "damaged")


def test_a_run_that_began_with_another_goes_on(russian, begun, tmp_path):
    """Resumed, trained further, written with; compared beside the run it began with, on one text."""
    folder, _ = begun
    result = here("tp5.py", "--resume", folder / "run", "--epochs", "2")
    assert result.returncode == 0 and "going on after step 4" in result.stdout, result.stderr
    assert load(folder / "run" / "last.pt").progress.step == 8
    printed("generate.py", "--checkpoint", folder / "run", "--maxlen", "9")
    on_same = tmp_path / "begun"
    train_again = ("--data", russian / "text.txt", "--init", russian / "runs" / "gru", "--epochs", "1")
    assert here("tp5.py", *train_again, "--run", on_same).returncode == 0
    said = printed("tp5.py", "--compare", russian / "runs" / "gru", on_same)
    assert re.search(r"begun +\| gru|\| \S*begun", said)
    refused(here("tp5.py", "--compare", russian / "runs" / "gru", folder / "run"), "same sentences")
