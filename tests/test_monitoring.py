"""Question 5, what is seen of a cell: gradient flow, units, pictures, the comparison of runs."""

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch
from conftest import CELLS, SMALL, command, refused
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Subset

import textloader
import tp5
from generate import copied
from textloader import EOS_IX, PAD_IX, features, pad_collate_fn, string2code
from tp5 import CharModel, followers, gradient_flow, load_checkpoint, picture, recurrence, tracking, watch

TEXTS = ["The end of it all.", "It is.", 'So I said "no, never" to Bob.', "A b c d e f g h."]


def batch_of(texts):
    return pad_collate_fn([string2code(text) for text in texts])


def small_model(cell: str) -> CharModel:
    torch.manual_seed(0)
    return CharModel(cell, 4, 6).double()


def one_lag_at_a_time(model, text: str, t: int, lags: int):
    """‖∂loss_t/∂s_{t−k}‖ of one sentence by torch.autograd.grad, (lags + 1, states)."""
    codes = [EOS_IX, *string2code(text).tolist(), EOS_IX]
    state, states = [torch.zeros(6, 1, dtype=torch.float64) for _ in model.rnn.states], []
    for code in codes[: t + 1]:
        projected = model.rnn.project(model.emb.weight[code][None]).T
        state, _ = model.rnn.equations(model.rnn.hidden_weight, projected, *state)
        states.append(state)
    loss = -model.decoder(states[t][0].T).log_softmax(-1)[0, codes[t + 1]]
    return torch.stack(
        [
            torch.stack([torch.autograd.grad(loss, part, retain_graph=True)[0].norm() for part in states[t - k]])
            for k in range(lags + 1)
        ]
    )


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_flow_is_autograds_one_sentence_and_lag_at_a_time(cell):
    """The symbol is drawn; exactly one choice of a symbol per sentence gives these norms."""
    model, lags = small_model(cell), 12
    flow = gradient_flow(model, batch_of(TEXTS), lags)
    assert set(flow) == set(model.rnn.states)
    found = torch.stack([flow[name] for name in model.rnn.states], 1)  # (lags + 1, states)
    long = [text for text in TEXTS if len(text) + 1 > lags]
    assert len(long) == 3
    drawn = [[one_lag_at_a_time(model, text, t, lags) for t in range(lags, len(text) + 1)] for text in long]
    differences = sorted((sum(choice) / 3 - found).abs().max() for choice in itertools.product(*drawn))
    assert differences[0] < 1e-12 and differences[1] > 1e-6


@pytest.mark.parametrize("cell", CELLS)
def test_padding_does_not_enter_gradient_flow(cell):
    model = small_model(cell)
    batch = batch_of([TEXTS[0], TEXTS[2]])
    flow = gradient_flow(model, batch, 10)
    model.emb.weight.data[PAD_IX] = 100
    for name, norms in gradient_flow(model, torch.cat([batch, torch.full((9, 2), PAD_IX)]), 10).items():
        assert (norms > 0).all() and torch.equal(norms, flow[name])


def test_recurrence_of_matrices_known_by_hand():
    cell = CELLS["gru"](2, 2)
    with torch.no_grad():
        cell.hidden_weight[:2] = torch.tensor([[0.0, 2.0], [-2.0, 0.0]])  # a turn, times 2
        cell.hidden_weight[2:4] = torch.tensor([[1.0, 3.0], [0.0, 1.0]])  # a shear: (3 + √13) / 2
        cell.hidden_weight[4:] = 0
    found = list(recurrence(cell).values())  # singular value and spectral radius of z, r, candidate
    assert found == pytest.approx([2, 2, (3 + math.sqrt(13)) / 2, 1, 0, 0], abs=1e-3)


def test_features_of_a_sentence():
    text = 'I "am" (A) 3.5 Up'
    shown = dict(zip(textloader.FEATURES, features(text).t().int().tolist(), strict=True))
    assert all(row[0] == 0 for row in shown.values())  # nothing read yet

    def where(name):
        return "".join(char if now else "." for char, now in zip(text, shown[name][1:], strict=True))

    assert where("inside a quotation") == '.."am"...........'
    assert where("inside brackets") == ".......(A........"
    assert where("in a capitalised word") == "I.......A......Up"
    assert where("in a number") == "...........3.5..."
    assert where("after a vowel") == "I..a....A......U."
    assert where("after a space") == ". .... ... ... .."
    assert shown["position in the sentence"] == list(range(len(text) + 1))
    assert shown["position in the word"] == [0, 1, 0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]


@pytest.mark.parametrize("cell", CELLS)
def test_tracking_is_numpys_correlation_of_each_unit(cell):
    model = small_model(cell).float()
    found = tracking(model, [batch_of(TEXTS[:2]), batch_of(TEXTS[2:])])
    units = {name: [] for name in found}
    for text in TEXTS:
        with torch.no_grad(), watch(model.rnn) as seen:
            model(batch_of([text]))
        for name, steps in seen.items():
            units[name] += [step[0].numpy() for step in steps]
    known = np.concatenate([features(text).numpy() for text in TEXTS])
    for name, correlations in found.items():
        for (i, feature), (unit, values) in itertools.product(enumerate(known.T), enumerate(np.array(units[name]).T)):
            expected = np.corrcoef(feature, values)[0, 1] if feature.std() else 0
            assert correlations[i, unit].item() == pytest.approx(expected, abs=1e-4)


def test_no_unit_follows_anything_in_a_model_that_does_not_move():
    model = small_model("lstm").float()
    with torch.no_grad():
        for parameter in model.rnn.parameters():
            parameter.zero_()
    found = tracking(model, [batch_of(TEXTS)])
    assert all((correlations == 0).all() for correlations in found.values())
    assert followers(found) == [] and tp5.table(followers(found)) == "none"


def test_picture_shows_each_value_once_and_the_text():
    torch.manual_seed(0)
    values = torch.rand(6, 500)  # a gate, while 5 characters are read
    image = picture(values, "Hello", gate=True)
    assert image.shape == (14 + 2 * 500, 8 * 6, 3) and image.dtype == np.uint8
    shown = image[14::2, ::8].astype(int)  # (units, characters, colours)
    white = values.mul(2).sub(1).abs().mul(-255).add(255).numpy().T  # green: the less, the further from half open
    order = [np.abs(shown[..., 1] - row).sum(1).argmin() for row in white]
    assert sorted(order) == list(range(500)) and np.abs(shown[order, :, 1] - white).max() <= 1
    assert np.array_equal(shown[order, :, 0] < 254, values.numpy().T < 254 / 510)  # blue: closed
    signed = picture(values.clamp(min=0.1), "Hello", gate=False)[14::2, ::8]
    assert (signed[..., 0] >= 254).all()  # a state above 0 is red, however small
    letters = np.asarray(Image.fromarray(image[:14]).convert("L"))
    assert letters[:, :8].min() == 255 and letters[:, 8:16].min() < 100  # EOS has no letter


def test_copied_shares_are_those_of_plain_search():
    corpus = "We the people of the United States.\nThe people hold the power here today."
    groups = {"a": ["the people of the world", "We the xyz"], "b": ["", "it"], "c": [corpus[:35]]}
    found = copied(groups, corpus)
    for group, texts in groups.items():
        for n in (8, 16, 32):
            pieces = [text[i : i + n] for text in texts for i in range(len(text)) if len(text[i : i + n]) == n]
            expected = sum(piece in corpus for piece in pieces) / len(pieces) if pieces else math.nan
            assert found[group][f"{n} characters copied"] == pytest.approx(expected, nan_ok=True)
    assert found["a"]["words known"] == 6 / 8  # all but "world" and "xyz"
    assert found["b"]["words known"] == 0 and found["c"]["32 characters copied"] == 1


def test_symbols_have_classes():
    of = [textloader.class_of(symbol) for symbol in ("e", "x", "E", "7", " ", "?", "<EOS>")]
    assert of == ["vowel", "consonant", "capital", "digit", "space", "punctuation", "code"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "two"
    result = command("tp5.py", "--model", "rnn", "lstm", "--match-parameters", "--run", folder, *SMALL[:-1], 1)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def rows_of(markdown: str) -> list[list[str]]:
    """The cells of all tables in a Markdown text."""
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in markdown.splitlines() if line[:1] == "|"]


def test_comparison_says_what_the_checkpoints_say(compared):
    folder, output = compared
    text = (folder / "comparison.md").read_text(encoding="utf-8")
    assert text in output
    rows = rows_of(text)
    assert [row[0] for row in rows[2:4]] == ["rnn", "lstm"]
    for row in rows[2:4]:
        figures = dict(zip(rows[0], row, strict=True))
        checkpoint = load_checkpoint(folder / figures["run"] / "best.pt")
        best, norms = checkpoint["progress"]["best"], checkpoint["norms"].numpy()
        assert float(figures["validation nats"]) == pytest.approx(best, abs=1e-3)
        assert float(figures["validation bits"]) == pytest.approx(best / math.log(2), abs=1e-3)
        assert float(figures["perplexity"]) == pytest.approx(math.exp(best), rel=1e-3)
        assert len(norms) == checkpoint["progress"]["step"] > 10
        assert float(figures["median gradient norm"]) == pytest.approx(np.sort(norms)[(len(norms) - 1) // 2], abs=1e-3)
        assert float(figures["99th percentile"]) == pytest.approx(np.quantile(norms, 0.99), abs=1e-3)
        assert float(figures["clipped"]) == pytest.approx((norms > 1).mean(), abs=1e-3)
    sizes = [int(row[1].replace(",", "")) for row in rows[2:4]]
    assert abs(sizes[0] / sizes[1] - 1) < 0.03  # --match-parameters
    for model, decoder in itertools.product(("rnn", "lstm"), ("greedy", "sampled", "nucleus", "beam", "nucleus beam")):
        assert text.count(f"    {model}, {decoder}, start ") == 2
        assert [row[:2] for row in rows].count([model, decoder]) == 1
    assert "comparison/text_summary" in EventAccumulator(str(folder)).Reload().Tags()["tensors"]
    flows = {tuple(row[:3]): row[3:] for row in rows if row[1] in ("h", "C")}
    for (run, state, when), shown in flows.items():
        tag = f"gradient_flow/{state}_{'trained' if when == 'trained' else 'at_start'}"
        curve = EventAccumulator(str(folder / run), size_guidance={"scalars": 0}).Reload().Scalars(tag)
        assert [float(norm) for norm in shown] == pytest.approx([p.value for p in curve[::10]], rel=0.1, abs=1e-12)
    assert len(flows) == 6


def test_norms_are_those_that_tensorboard_has(compared):
    folder = compared[0] / "lstm"
    norms = load_checkpoint(folder / "best.pt")["norms"]
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    points = events.Scalars("gradient/norm_before_clipping")
    assert points and all(norms[point.step].item() == pytest.approx(point.value) for point in points)


def test_runs_are_compared_again_without_training(compared):
    folder, before = compared[0], (compared[0] / "comparison.md").read_text(encoding="utf-8")
    result = command("tp5.py", "--compare", folder)
    assert result.returncode == 0 and before in result.stdout
    assert (folder / "comparison.md").read_text(encoding="utf-8") == before
    assert len([*folder.glob("events*")]) == 1


def test_a_single_run_is_that_of_a_comparison(compared, tmp_path):
    """Same split, batches and seed: a comparison's second run is bit for bit the run of its own command."""
    result = command("tp5.py", "--model", "lstm", "--run", tmp_path, *SMALL[:-1], 1, "--histograms-every", 0)
    assert result.returncode == 0, result.stderr
    alone, among = (load_checkpoint(folder / "last.pt")["weights"] for folder in (tmp_path, compared[0] / "lstm"))
    assert all(torch.equal(weight, among[name]) for name, weight in alone.items())


def test_runs_of_other_sentences_are_not_compared(compared, tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        checkpoint = load_checkpoint(compared[0] / "rnn" / "best.pt")
        checkpoint["options"]["seed"] = seed
        (tmp_path / name).mkdir()
        torch.save(checkpoint, tmp_path / name / "best.pt")
    refused(command("tp5.py", "--compare", tmp_path), "a and b cannot be compared", "--seed")
    (tmp_path / "corpus.txt").write_text("It is. Or not. Who knows?", encoding="utf-8")
    refused(command("tp5.py", "--compare", compared[0], "--data", tmp_path / "corpus.txt"), "--data")


def test_followers_name_the_closest_unit():
    r = torch.zeros(len(textloader.FEATURES), 4)
    r[0, 2], r[1, 3] = -0.9, 0.2
    rows = followers({"h": r / 2, "C": r})
    assert [tuple(row.values())[1:3] for row in rows[:2]] == [("C", 2), ("C", 3)]
    assert rows[0]["correlation"] == pytest.approx(-0.9)
    assert len(rows) == 2  # the others never changed


def test_of_a_very_long_sentence_its_beginning_is_shown():
    dataset = textloader.TextDataset("It is. " + "a" * (tp5.LONGEST + 5) + ".")
    batch = tp5.some(Subset(dataset, np.arange(2)), 2, 60)
    assert batch.shape == (tp5.LONGEST + 1, 2) and batch[-1, 0] == EOS_IX
    assert batch[:6, 1].tolist() == dataset[0].tolist()


@pytest.mark.parametrize("cell", ("rnn", "lstm"))
def test_tensorboard_shows_the_inside(compared, cell):
    folder, kind = compared[0] / cell, CELLS[cell]
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    tags = events.Tags()
    for state, when in itertools.product(kind.states, ("at_start", "trained")):
        curve = events.Scalars(f"gradient_flow/{state}_{when}")
        assert [point.step for point in curve] == list(range(tp5.LAGS + 1))
        assert all(0 <= point.value < math.inf for point in curve)
    sizes = itertools.product(kind.gates, ("singular_value", "spectral_radius"))
    assert {f"recurrence/{gate}_{size}" for gate, size in sizes} | {"summary/perplexity"} <= set(tags["scalars"])
    assert {f"look/{cell}/{name}" for name in kind.gates + kind.states} == set(tags["images"])
    assert len(events.Images(f"look/{cell}/h")) == 3
    assert "units/that_follow_the_text/text_summary" in tags["tensors"]
    hparams = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"hidden" in hparams and b"recurrent_scale" in hparams
    labels, vectors = (
        next(folder.glob(f"*/symbols/{name}.tsv")).read_text(encoding="utf-8").splitlines()
        for name in ("metadata", "tensors")
    )
    assert labels[0] == "symbol\tclass" and {"e\tvowel", "space\tspace"} <= set(labels)
    assert len(vectors) == len(labels) - 1 == 97


def test_turned_off_nothing_of_the_inside_is_recorded(tmp_path):
    result = command("tp5.py", "--run", tmp_path, "--histograms-every", 0, *SMALL[:-1], 1)
    assert result.returncode == 0 and "that follow the text" not in result.stdout
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert tags["images"] == tags["histograms"] == []
    assert not any(tag.startswith(("gradient_flow", "recurrence")) for tag in tags["scalars"])


def test_look_at_a_finished_run(compared, tmp_path):
    folder = shutil.copytree(compared[0] / "rnn", tmp_path / "rnn")
    before = (folder / "last.pt").read_bytes()
    result = command("tp5.py", "--resume", folder, "--look", "Ask “what” you can do.")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()
    (image,) = events.Images("look/rnn/h")  # what was shown before is replaced
    assert image.width == 8 * len(' Ask "what" you can do.')
    assert len(events.Scalars("gradient_flow/h_trained")) == tp5.LAGS + 1
    assert (folder / "last.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--look", " "], ["--look", "text"]),
        (["--look", "→"], ["--look", "ASCII"]),
        (["--resume", "--minutes", 1], ["--minutes", "--resume"]),
        (["--model", "rnn", "cnn"], ["--model", "cnn"]),
        (["--compare", "runs", "--run", "x"], ["--compare", "--run"]),
        (["--compare", "tests"], ["no run in tests"]),
        (["--compare", "runs", "--look", "x"], ["--look", "--resume"]),
        (["--compare", "runs", "--lr", 1], ["--compare", "--lr"]),
        (["--minutes", 1, "--epochs", 3], ["--minutes", "--epochs"]),
    ],
)
def test_refused_options(options, words):
    refused(command("tp5.py", *options), *words)


def test_minutes_are_turned_into_epochs(tmp_path, monkeypatch):
    options = tp5.command_parser().parse_args(["--model", "rnn", "--device", "cpu", *SMALL])
    corpus = tp5.load_corpus(options)
    clock = itertools.count(step=3.0)  # the trial's batches, fewer than 50 and so an epoch, take three seconds
    monkeypatch.setattr(tp5.time, "perf_counter", lambda: next(clock))
    assert [tp5.epochs_in(minutes, options, corpus) for minutes in (1.0, 0.5, 0.001)] == [20, 10, 1]
    monkeypatch.undo()
    result = command("tp5.py", "--model", "rnn", "--run", tmp_path, "--minutes", 0.001, *SMALL[:-2])
    assert result.returncode == 0 and "epoch 1/1:" in result.stdout, result.stderr


def test_a_cell_that_diverges_does_not_end_the_comparison(tmp_path):
    """The exploding case: each is tried, and what became of it is said."""
    options = ("--recurrent-scale", 30, "--clip", 0, "--run", tmp_path / "all", *SMALL[:2], "--hidden", 64)
    result = command("tp5.py", "--model", "rnn", "gru", *options)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    for line, cell in zip(lines[:2], ("rnn", "gru"), strict=True):
        assert "not finite" in line and f"{tmp_path / 'all' / cell} is kept" in line
    assert "no run" in lines[-1]


def test_a_comparison_is_refused_before_any_training(compared):
    result = command("tp5.py", "--model", "gru", "lstm", "--run", compared[0], *SMALL)
    refused(result, "lstm holds a run already")
    assert not (compared[0] / "gru").exists()


def test_recurrent_scale():
    options = tp5.command_parser().parse_args(["--model", "rnn", "--recurrent-scale", "3", "--device", "cpu"])
    matrix = tp5.initial_model(options).rnn.hidden_weight
    torch.testing.assert_close(matrix @ matrix.T, 9 * torch.eye(len(matrix)), atol=1e-4, rtol=0)


def test_tensorboards_own_server_has_it_all(compared):
    """What the browser asks for: every view's data, of each run under the comparison's folder."""
    arguments = ["--logdir", str(compared[0]), "--port", "0", "--load_fast", "false"]
    server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *arguments], stderr=subprocess.PIPE, text=True)
    try:
        url = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+/", line)))

        def ask(route: str, body: bytes | None = None):
            request = urllib.request.Request(f"{url}data/plugin/{route}", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)

        for _ in range(100):  # it reads the events files in the background
            if {".", "rnn", "lstm"} <= ask("text/tags").keys() and "lstm" in ask("images/tags"):
                break
            time.sleep(0.2)
        scalars, images = ask("scalars/tags"), ask("images/tags")
        for run in ("rnn", "lstm"):
            assert {"loss/train", "loss/validation", "gradient_flow/h_trained"} <= scalars[run].keys()
            assert f"look/{run}/h" in images[run] and f"gates/{run}/h" in ask("histograms/tags")[run]
        curve = ask("scalars/scalars?run=lstm&tag=gradient_flow/C_at_start")
        assert [lag for _, lag, _ in curve] == list(range(tp5.LAGS + 1))
        assert len(ask("images/images?run=lstm&tag=look/lstm/C&sample=0")) == 3
        assert "comparison/text_summary" in ask("text/tags")["."]
        columns = {info["name"] for info in ask("hparams/experiment", b"{}")["hparamInfos"]}
        assert {"model", "hidden", "recurrent_scale"} <= columns
        assert {"rnn", "lstm"} <= set(ask("projector/runs"))
        (labels,) = {info["metadataPath"] for info in ask("projector/info?run=lstm")["embeddings"]}
        assert labels.endswith("metadata.tsv")
    finally:
        server.terminate()
        server.wait()
        server.stderr.close()
