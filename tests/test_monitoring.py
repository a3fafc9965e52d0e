"""Question 5, what is seen of a run: curves, histograms, gradient flow, units, the comparison of runs."""

import itertools
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import SAMPLES, checkpoint_file, events_of, here, refused, valid_split
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

import tp5
from textloader import EOS_IX, PAD_IX, TextDataset, pad_collate_fn, read_text, string2code
from tp5 import CELLS, CharModel, Unit, features, gradient_flow, load, named_units, picture

TEXTS = ["The end of it all.", "It is.", 'So I said "no, never" to Bob.', "A b c d e f g h."]
GATES = {"rnn": ["h"], "gru": ["z", "r", "candidate", "h"], "lstm": ["f", "i", "candidate", "o", "C", "h"]}


def batch_of(texts):
    return pad_collate_fn([string2code(text) for text in texts])


def small_model(cell: str) -> CharModel:
    torch.manual_seed(0)
    return CharModel(cell, 4, 6).double()


def one_tag(tags, *words: str) -> str:
    """The tag that has these words, whatever its number."""
    (found,) = (tag for tag in tags if all(word in tag for word in words))
    return found


def states_after(model, text: str) -> list[tuple]:
    """The cell's states after EOS and after each character of `text`, one step at a time."""
    states, after = None, []
    for code in [EOS_IX, *string2code(text).tolist()]:
        _, states = model.rnn(model.emb.weight[code][None, None], states)
        after.append(states)
    return after


def one_lag_at_a_time(model, text: str, t: int, lags: int):
    """‖∂loss_t/∂s_{t−k}‖ of one sentence by torch.autograd.grad, (lags + 1, states)."""
    states, wanted = states_after(model, text), [*string2code(text).tolist(), EOS_IX]
    loss = -model.decoder(states[t][0]).log_softmax(-1)[0, wanted[t]]
    slopes = (
        torch.autograd.grad(loss, states[t - k], retain_graph=True, materialize_grads=True) for k in range(lags + 1)
    )
    return torch.stack([torch.stack([slope.norm() for slope in of_lag]) for of_lag in slopes])


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_flow_is_autograds_one_sentence_and_lag_at_a_time(cell):
    """The symbol is drawn; exactly one choice of a symbol per sentence gives these norms."""
    model, lags = small_model(cell), 12
    flow = gradient_flow(model, batch_of(TEXTS), lags)
    found = torch.stack([flow[name] for name in model.rnn.states], 1)  # (lags + 1, states)
    long = [text for text in TEXTS if len(text) + 1 > lags]
    drawn = [[one_lag_at_a_time(model, text, t, lags) for t in range(lags, len(text) + 1)] for text in long]
    differences = sorted((sum(choice) / 3 - found).abs().max() for choice in itertools.product(*drawn))
    assert differences[0] < 1e-12 and differences[1] > 1e-6


@pytest.mark.parametrize("cell", CELLS)
def test_padding_does_not_enter_gradient_flow(cell):
    model, batch = small_model(cell), batch_of([TEXTS[0], TEXTS[2]])
    flow = gradient_flow(model, batch, 10)
    model.emb.weight.data[PAD_IX] = 100
    for name, norms in gradient_flow(model, torch.cat([batch, torch.full((9, 2), PAD_IX)]), 10).items():
        assert (norms > 0).all() and torch.equal(norms, flow[name])


def test_features_of_a_sentence():
    text = 'I "am" (A) 3.5 Up'
    shown = dict(zip(tp5.FEATURES, features(text).int().tolist(), strict=True))
    assert all(row[0] == 0 for row in shown.values())  # nothing read yet

    def where(name):
        return "".join(char if now else "." for char, now in zip(text, shown[name][1:], strict=True))

    assert where("inside a quotation") == '.."am"...........'
    assert where("inside brackets") == ".......(A........"
    assert where("in a capitalised word") == "I.......A......Up"
    assert where("in a number") == "...........3.5..."
    assert where("a vowel") == "I..a....A......U."
    assert where("a space") == ". .... ... ... .."
    assert shown["position in the sentence"] == list(range(len(text) + 1))
    assert shown["position in the word"] == [0, 1, 0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]


@torch.no_grad()
@pytest.mark.parametrize("cell", CELLS)
def test_named_units_are_those_of_numpys_correlation(cell):
    """Over states only, computed one sentence and step at a time; gates may follow a feature more closely."""
    model = small_model(cell).float()
    units = named_units(model, [batch_of(TEXTS[:2]), batch_of(TEXTS[2:])], 0.3)
    known = np.concatenate([features(text).numpy() for text in TEXTS], axis=1)
    steps = [state for text in TEXTS for state in states_after(model, text)]
    strongest = [0.0] * len(known)
    for place, name in enumerate(model.rnn.states):
        values = torch.cat([state[place] for state in steps]).numpy().T
        for i, row in itertools.product(range(len(known)), range(6)):
            r = np.corrcoef(known[i], values[row])[0, 1] if known[i].std() else 0
            strongest[i] = max(strongest[i], abs(r))
            for unit in units:
                if (unit.feature, unit.gate, unit.row) == (tp5.FEATURES[i], name, row):
                    assert unit.r == pytest.approx(r, abs=1e-4)
    assert any(unit.gate in model.rnn.states for unit in units)
    for unit in units:
        assert abs(unit.r) >= strongest[tp5.FEATURES.index(unit.feature)] - 1e-4
    assert [abs(unit.r) for unit in units] == sorted((abs(unit.r) for unit in units), reverse=True)


def test_no_unit_follows_anything_in_a_model_that_does_not_move():
    model = small_model("lstm").float()
    for parameter in model.rnn.parameters():
        parameter.data.zero_()
    assert not [unit for unit in named_units(model, [batch_of(TEXTS)]) if unit.gate in ("h", "C")]


@torch.no_grad()
def test_picture_shows_each_unit_after_each_character():
    """The background of a character: red above 0, blue below, the paler the closer to 0."""
    model, text = small_model("rnn").float(), 'So I "said".'
    units = [Unit("a space", "h", 4, 0.5), Unit("in a number", "h", 1, -0.25)]
    image = picture(model, units, text).astype(int)
    values = torch.cat([state for (state,) in states_after(model, text)[1:]])[:, [4, 1]].T  # (units, characters)
    height, width = image.shape[0] // 4, image.shape[1] // 28  # of each unit its name, then the text
    tops = [image[height * row + 1] for row in (1, 3)]  # above the letters
    shown = np.array([[top[round(width * (i + 0.5))] for i in range(len(text))] for top in tops])
    assert np.array_equal(shown[..., 0] == 255, values.numpy() > 0)
    assert np.array_equal(shown[..., 2] == 255, values.numpy() <= 0)
    pale = shown[..., 1].flatten()
    assert np.corrcoef(pale, values.abs().flatten())[0, 1] < -0.999


@pytest.mark.parametrize("cell", CELLS)
def test_tensorboard_reads_every_tag(runs, cell):
    events = events_of(runs / cell)
    tags = events.Tags()
    for words in (["loss/train"], ["loss/validation"], ["norm_before"], ["learning_rate"]):
        points = events.Scalars(one_tag([t for t in tags["scalars"] if "bits" not in t], *words))
        steps = [point.step for point in points]
        assert steps == sorted(set(steps)) and len(steps) >= 2, words
    assert sorted(tags["scalars"])[0].startswith("1_loss/")  # what opens first
    names = [name for name, _ in load(runs / cell / "best.pt").model.named_parameters()]
    parameters = [f"{number}_{name}" for number, name in enumerate(names, start=1)]
    shown = [f"6_parameters/{name}" for name in parameters] + [f"5_gradients/log10_{name}" for name in parameters]
    shown += [f"4_gates/{cell}_{number}_{gate}" for number, gate in enumerate(GATES[cell], start=1)]
    assert sorted(tags["histograms"]) == sorted(shown)
    validation = events.Scalars(one_tag([t for t in tags["scalars"] if "bits" not in t], "loss/validation"))
    best = load(runs / cell / "best.pt").progress.best_loss
    assert min(point.value for point in validation) == pytest.approx(best)
    for decoder in SAMPLES:
        tag = next(tag for tag in tags["tensors"] if tag.endswith(f"samples/{decoder}/text_summary"))
        samples = [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]
        assert len(samples) == 2  # a code block: nothing in it is Markdown
        assert all(line.startswith("    ") for sample in samples for line in sample.splitlines())
    pictures = events.Images(one_tag(tags["images"], "units"))
    assert len({image.step for image in pictures}) == 3


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_flow_curves_are_log10_over_lags(runs, small, cell):
    events, valid = events_of(runs / cell), list(valid_split(small))
    model = load(runs / cell / "best.pt").model
    curves = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"] if "2_gradient/" in tag and "log10" in tag}
    assert len(curves) == 2 * len(model.rnn.states)
    longest = sorted(valid, key=lambda sentence: -len(sentence))[:64]
    flow = gradient_flow(model, pad_collate_fn(longest), len(curves[min(curves)]) - 1)
    for name, norms in flow.items():
        curve = curves[one_tag(curves, "log10", f"_{name}_", "trained")]
        assert [point.step for point in curve] == list(range(len(norms))) and len(curve) > 20
        assert [point.value for point in curve] == pytest.approx(norms.log10().tolist(), abs=0.01)


def test_300_steps_have_seven_histograms_and_blank_is_in_none(small, tmp_path):
    options = (*small, "--hidden", 4, "--embedding", 2, "--epochs", 1)
    assert here("tp5.py", "--run", tmp_path / "300", *options, "--batch-size", 3).returncode == 0
    events = events_of(tmp_path / "300")
    for tag in events.Tags()["histograms"]:
        assert [event.step for event in events.Histograms(tag)] == [0, 50, 100, 150, 200, 250, 299], tag
    assert here("tp5.py", "--run", tmp_path / "1", *options, "--batch-size", 900).returncode == 0
    events, dataset = events_of(tmp_path / "1"), TextDataset(read_text(small[1]))
    held_out = sum(len(sentence) + 1 for sentence in valid_split(small))
    for tag in events.Tags()["histograms"]:
        if "gates" in tag:
            (event,) = events.Histograms(tag)  # of the only batch, which has all sentences to train on
            assert event.histogram_value.num == (int(dataset.lengths.sum()) + len(dataset) - held_out) * 4
            lowest = -1 if tag.endswith(("_h", "_candidate")) else -math.inf if tag.endswith("_C") else 0
            highest = math.inf if tag.endswith("_C") else 1
            assert lowest <= event.histogram_value.min < event.histogram_value.max <= highest


def test_turned_off_nothing_is_recorded(small, tmp_path):
    off = ("--scalars-every", 0, "--histograms-every", 0)
    assert here("tp5.py", "--run", tmp_path, *small, "--epochs", 1, *off).returncode == 0
    tags = events_of(tmp_path).Tags()
    assert tags["histograms"] == [] and not any("loss/train" in tag for tag in tags["scalars"])


def test_tensorboard_lists_runs_without_empty_parents(runs):
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(runs))
    multiplexer.Reload()
    assert set(multiplexer.Runs()) == {"rnn", "gru", "lstm", "comparison"}


def rows_of(markdown: str) -> list[list[str]]:
    """The cells of all tables in a Markdown text."""
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in markdown.splitlines() if line[:1] == "|"]


def test_comparison_says_what_the_checkpoints_say(runs):
    text = (runs / "comparison" / "comparison.md").read_text(encoding="utf-8")
    assert text in (runs / "output.txt").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 80
    events = events_of(runs / "comparison")
    (tag,) = events.Tags()["tensors"]
    assert events.Tensors(tag)[0].tensor_proto.string_val[0].decode() == text
    rows = rows_of(text)
    assert [row[0] for row in rows[2:5]] == ["rnn", "gru", "lstm"]
    for row in rows[2:5]:
        figures, checkpoint = dict(zip(rows[0], row, strict=True)), load(runs / row[0] / "best.pt")
        best = checkpoint.progress.best_loss
        assert float(figures["validation"]) == pytest.approx(best, abs=1e-3)
        assert float(figures["bits"]) == pytest.approx(best / math.log(2), abs=1e-3)
        sizes = (weight.numel() for weight in checkpoint.model.state_dict().values())
        assert int(figures["parameters"].replace(",", "")) == sum(sizes)
    flows = {tuple(row[:3]): row[3:] for row in rows if row[1] in ("h", "C")}
    assert len(flows) == 8
    for (cell, state, when), shown in flows.items():
        events = events_of(runs / cell)
        tag = one_tag(events.Tags()["scalars"], f"_{state}_", when.replace(" ", "_"))
        for lag, norm in enumerate(map(float, shown)):
            assert norm == pytest.approx(10 ** events.Scalars(tag)[10 * lag].value, rel=0.06, abs=6e-4)


def test_runs_are_compared_again_without_training(runs, tmp_path, monkeypatch):
    before = (runs / "comparison" / "comparison.md").read_text(encoding="utf-8")
    for cell in ("rnn", "lstm"):
        shutil.copytree(runs / cell, tmp_path / "some" / cell)
    found = here("tp5.py", "--compare", runs)
    assert found.returncode == 0 and before in found.stdout
    assert len([*(runs / "comparison").glob("events*")]) == 1
    monkeypatch.chdir(tmp_path)
    found = here("tp5.py", "--compare", tmp_path / "some" / "rnn", "some/lstm")  # one absolute, one relative
    assert found.returncode == 0, found.stderr
    assert [row[0] for row in rows_of(found.stdout)[2:4]] == ["rnn", "lstm"]
    assert (tmp_path / "some" / "comparison" / "comparison.md").exists()


def test_of_runs_that_do_not_fit_those_that_do_are_named(runs, tmp_path):
    for name, seed in (("a", 0), ("b", 1), ("c", 0)):
        checkpoint = torch.load(runs / "rnn" / "best.pt", weights_only=True)
        checkpoint["options"]["seed"] = seed
        (tmp_path / name).mkdir()
        checkpoint_file(checkpoint, tmp_path / name / "best.pt")
    found = here("tp5.py", "--compare", tmp_path / "a", tmp_path / "b", tmp_path / "c")
    refused(found, "same sentences")
    assert "['a', 'c'], ['b']" in found.stderr
    (tmp_path / "corpus.txt").write_text("It is. Or not. Who knows? " * 4, encoding="utf-8")
    found = here("tp5.py", "--compare", runs, "--data", tmp_path / "corpus.txt")
    assert found.returncode == 1 and "--data" in found.stderr


def test_look_at_a_trained_run(runs, tmp_path):
    """From best.pt alone; what it shows of the training and of another text stays or is replaced."""
    folder = tmp_path / "rnn"
    folder.mkdir()
    shutil.copy(runs / "rnn" / "best.pt", folder)
    sizes = []
    for text in ("Ask “what” you can do — now …", "We  met."):
        found = here("tp5.py", "--resume", folder, "--look", text)
        assert found.returncode == 0 and found.stderr == "", found.stderr
        events = events_of(folder)
        (image,) = events.Images(one_tag(events.Tags()["images"], "units"))
        sizes.append((image.width, image.height))
    assert min(min(sizes)) > 20
    (tmp_path / "other.txt").write_text("Yes. We. Can. " * 20, encoding="utf-8")
    found = here("tp5.py", "--resume", folder, "--look", "We met.", "--data", tmp_path / "other.txt")
    assert found.returncode == 1 and "another text" in found.stderr
    assert [path.name for path in folder.glob("*.pt")] == ["best.pt"]
