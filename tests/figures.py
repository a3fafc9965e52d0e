"""The figures of the findings, drawn from trained runs of the three cells alone, and two tables for the text.

    python tests/figures.py [RUNS]             # default: runs/reference
    python tests/figures.py [RUNS] --words     # known words and copied substrings, as RUNS/words.md
    python tests/figures.py [RUNS] --memory    # trains an LSTM without forget bias, writes RUNS/memory.md

They go where the runs are. A title says a finding only where the numbers drawn do.
"""

import argparse
import contextlib
import re
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.lines import Line2D
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tp5  # noqa: E402
from textloader import pad_collate_fn, string2code  # noqa: E402

COLOURS = {"rnn": "#CF9A1B", "gru": "#004488", "lstm": "#BB5566"}  # apart in grey, too (after Paul Tol)
STYLE = {
    "font.size": 18,  # readable at half size
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "lines.linewidth": 3,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 130,
    "savefig.bbox": "tight",
}


def scalars(events: EventAccumulator, tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one curve."""
    found = events.Scalars(tag)
    return np.array([event.step for event in found]), np.array([event.value for event in found])


def legend_of(axes, cells, **styles: dict) -> None:
    """A colour for each cell, in grey what each line style means."""
    lines = [Line2D([], [], color=COLOURS[cell], label=cell.upper()) for cell in cells]
    lines += [Line2D([], [], **{"color": "grey", "label": label.replace("_", " "), **style})
              for label, style in styles.items()]  # fmt: skip
    where = dict(loc="outside lower center", ncols=len(lines)) if isinstance(axes, plt.Figure) else {}
    axes.legend(handles=lines, frameon=False, **where)


def loss_curves(runs: dict[str, EventAccumulator]):
    """Training and validation loss, nats against step."""
    figure, axes = plt.subplots(figsize=(12, 6.5))
    last = {}
    for cell, events in runs.items():
        axes.plot(*scalars(events, "1_loss/train"), color=COLOURS[cell], linewidth=1.5)
        steps, nats = scalars(events, "1_loss/validation")
        axes.plot(steps, nats, "o--", color=COLOURS[cell], markersize=9)
        last[cell] = nats[-1]
    lowest, highest = min(last.values()), scalars(runs["rnn"], "1_loss/train")[1].max()
    axes.set(xlabel="step", ylabel="loss, nats a symbol", ylim=(lowest - 0.1, min(highest, 2 * lowest)))
    legend_of(axes, runs, training=dict(linewidth=1.5), validation=dict(linestyle="--", marker="o"))
    ranked = ", ".join(f"{cell.upper()} {last[cell]:.3f}" for cell in sorted(last, key=last.get))
    axes.set_title(f"Validation loss after training: {ranked} nats")
    return figure


def gradient_flow(runs: dict[str, EventAccumulator]):
    """Norm of a loss's gradient against characters back; at start dashed, trained solid."""
    figure, panels = plt.subplots(1, 2, figsize=(14, 7), sharey=True, width_ratios=(3, 2))
    ends = {}
    for axes, state in zip(panels, ("h", "C"), strict=True):
        for cell in runs if state == "h" else ("lstm",):
            for when, dashes in (("at_start", "--"), ("trained", "-")):
                tags = runs[cell].Tags()["scalars"]
                [tag] = [tag for tag in tags if tag.endswith(f"log10_{state}_{when}")]
                lags, logs = scalars(runs[cell], tag)
                axes.plot(lags, 10.0**logs, dashes, color=COLOURS[cell])
                ends[cell, state, when] = 10.0 ** logs[-1]
        axes.set(yscale="log", xlabel="characters back")
    panels[0].set(ylabel="norm of the gradient of one loss", title="hidden state h")
    panels[1].set(title="the LSTM's memory C")
    legend_of(panels[0], runs, at_start=dict(linestyle="--"), trained={})
    times = {cell: ends[cell, "h", "trained"] / ends["rnn", "h", "trained"] for cell in ("lstm", "gru")}
    if all(factor > 10 for factor in times.values()):
        two_digits = {cell.upper(): f"{float(f'{factor:.2g}'):,.0f}" for cell, factor in times.items()}
        said = " and ".join(f"{factor} times ({cell})" for cell, factor in two_digits.items())
        figure.suptitle(f"{lags[-1]} characters back, the trained gated cells' gradient is\n{said} the RNN's")
    return figure


def rows_of(table: str) -> list[dict[str, str]]:
    """The rows of a Markdown table."""
    lines = [line.strip("|") for line in table.splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.split("|")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def named_units(folder: Path, events: EventAccumulator):
    """The LSTM's units that follow the text, on a validation sentence of about 40 characters."""
    run = tp5.load(folder / "best.pt")
    with contextlib.redirect_stdout(None):
        _, valid_set = tp5.load_corpus(run.options)
    text = min(valid_set.sentences, key=lambda sentence: abs(len(sentence) - 40))
    steps = []
    with torch.no_grad():
        run.model(pad_collate_fn([string2code(text)]), steps)
    written, units = events.Tensors("units/text_summary")[0].tensor_proto.string_val[0].decode(), {}
    for row in rows_of(written):
        gate, unit = row["unit"].split()
        units[f"{row['unit']}: {row['follows']}, r {float(row['correlation']):.2f}"] = gate, int(unit)
    read = steps[1:]  # after each character
    shades = np.array([[step[gate][0, unit].item() for step in read] for gate, unit in units.values()])
    shades /= np.abs(shades).max(1, keepdims=True).clip(min=1)

    figure, axes = plt.subplots(figsize=(16, 1.5 + 0.55 * len(units)))
    image = axes.imshow(shades, cmap="RdBu_r", vmin=-1.6, vmax=1.6, aspect="auto")  # pale: text is on it
    for y, x in np.ndindex(shades.shape):
        axes.text(x, y, text[x], ha="center", va="center", family="monospace")
    axes.set(xticks=[], xlabel="a validation sentence, character by character")
    axes.set_yticks(range(len(units)), units)
    axes.set_yticks(np.arange(len(units) - 1) + 0.5, minor=True)  # lines between the rows
    axes.grid(False)
    axes.grid(which="minor", axis="y", color="white", linewidth=5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, boundaries=np.linspace(-1, 1, 101), ticks=(-1, 0, 1), pad=0.01)
    bar.set_label("value (C: by its largest)")
    return figure


def words_of(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


def substrings(length: int):
    """A function from a text to its substrings of so many characters."""
    return lambda text: [text[i : i + length] for i in range(len(text) - length + 1)]


PARTS = {"known": words_of, "copied 16": substrings(16), "copied 32": substrings(32)}


def originality(groups: list[list[str]], corpus: list[str]) -> list[dict[str, float]]:
    """Learned or copied: the median length of each group's texts, the shares of their parts that the corpus has."""
    rows = [{"length": int(statistics.median(map(len, texts)))} for texts in groups]
    for name, parts_of in PARTS.items():
        known = {part for sentence in corpus for part in parts_of(sentence)}
        for row, texts in zip(rows, groups, strict=True):
            parts = [part for text in texts for part in parts_of(text)]
            row[name] = sum(part in known for part in parts) / max(len(parts), 1)
    return rows


def words(folder: Path) -> str:
    """What the decoders make of the same 20 starts, how much of it is copied; a table."""
    runs = {cell: tp5.load(folder / cell / "best.pt", device="cpu") for cell in COLOURS}
    with contextlib.redirect_stdout(None):
        train_set, valid_set = tp5.load_corpus(runs["rnn"].options)
    starts = ["", *dict.fromkeys(text.split()[0] + " " for text in valid_set.sentences)][:20]
    rows, groups = [{"run": "corpus", "decoder": "", "ended": 1.0}], [valid_set.sentences[:200]]
    for cell, run in runs.items():
        by_start = [tp5.samples(run.model, start, seed) for seed, start in enumerate(starts)]
        for decoder in by_start[0]:
            written = [by_decoder[decoder] for by_decoder in by_start]
            groups.append([hypothesis.text for hypothesis in written])
            share = sum(hypothesis.ended for hypothesis in written) / len(starts)
            rows.append({"run": cell, "decoder": decoder, "ended": share})
    shares = originality(groups, train_set.sentences)
    return tp5.table([row | more for row, more in zip(rows, shares, strict=True)]) + "\n"


def quality(words: Path):
    """Known words, ended sentences and length of what each decoder writes, beside held-out sentences."""
    people, *rows = rows_of(words.read_text(encoding="utf-8"))
    decoders, cells = list(dict.fromkeys(row["decoder"] for row in rows)), list(COLOURS)
    figure, panels = plt.subplots(1, 3, figsize=(16, 7.5), sharey=True)
    measures = {"known": "known words, share", "ended": "sentences ended, share",
                "length": "length, characters, median"}  # fmt: skip
    for axes, (measure, label) in zip(panels, measures.items(), strict=True):
        for row in rows:
            y = decoders.index(row["decoder"]) + 0.26 * (cells.index(row["run"]) - 1)
            axes.barh(y, float(row[measure]), 0.24, color=COLOURS[row["run"]])
        axes.axvline(float(people[measure]), color="black", linestyle="--")
        axes.set(xlabel=label)
        axes.grid(False, axis="y")
    panels[0].set_yticks(range(len(decoders)), decoders)
    panels[0].invert_yaxis()
    legend_of(figure, cells, held_out_sentences=dict(linestyle="--", color="black"))
    lengths = {decoder: statistics.median(float(row["length"]) for row in rows if row["decoder"] == decoder)
               for decoder in ("beam", "sampled")}  # fmt: skip
    if lengths["beam"] < min(float(people["length"]), lengths["sampled"]) / 2:
        figure.suptitle(f"Beam search writes short: {lengths['beam']:.0f} characters (median of the cells), "
                        f"{lengths['sampled']:.0f} drawn, {people['length']} by people")  # fmt: skip
    return figure


class NoForgetBias(tp5.LSTM):
    """An LSTM whose forget gate is half open at the start, not nearly three quarters."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__(input_size, hidden_size)
        torch.nn.init.zeros_(self.bias)


def memory_of(model, batch, characters: int = 40) -> dict[str, float]:
    """What carries an LSTM's memory over so many characters of a batch (T, B) without padding."""
    steps = []
    logits = model(batch, steps)
    first = len(batch) - 1 - characters
    loss = torch.nn.functional.cross_entropy(logits[-1], batch[-1], reduction="sum")
    gradient = torch.autograd.grad(loss, steps[first]["C"])[0].square().mean(0)  # (H,) of ‖∂loss/∂C‖²
    f = torch.stack([step["f"] for step in steps]).detach()
    product = f[first + 1 :].log().sum(0).exp().mean(0)  # (H,) what f leaves of C over the characters
    unit = int(gradient.argmax())
    others = torch.cat([product[:unit], product[unit + 1 :]])
    return {
        "mean f": f.mean().item(),
        "units with mean f above 0.9": int((f.mean((0, 1)) > 0.9).sum()),
        "unit": unit,
        "its mean f": f[..., unit].mean().item(),
        "product of its f": product[unit].item(),
        "largest of the others": others.max().item(),
        "its share of the squared gradient": (gradient[unit] / gradient.sum()).item(),
    }


def memory(folder: Path) -> str:
    """Of the LSTM at the start and trained, with its forget bias of 1 and without: see `memory_of`."""
    run = tp5.load(folder / "lstm" / "best.pt", device="cpu")
    train_set, valid_set = tp5.load_corpus(run.options)
    tp5.CELLS["lstm"] = NoForgetBias
    plain = tp5.new_run(run.options, train_set)
    models = {"bias 0, at start": tp5.new_run(run.options, train_set).model}
    with tempfile.TemporaryDirectory() as temporary:
        tp5.train(plain, Path(temporary), train_set, valid_set)
    tp5.CELLS["lstm"] = tp5.LSTM
    models |= {"bias 0, trained": plain.model, "bias 1, at start": tp5.new_run(run.options, train_set).model}
    models["bias 1, trained"] = run.model
    long = [valid_set[i][:60] for i in range(len(valid_set)) if valid_set.lengths[i] >= 60][:200]
    batch, rows = pad_collate_fn(long)[:60], []
    for name, model in models.items():
        flow = tp5.both_flows(replace(run, model=model), valid_set)["trained"]  # of this model
        back = {f"{state} 40 back": flow[state][40].item() for state in ("h", "C")}
        rows.append({"LSTM": name, **back, **memory_of(model, batch)})
    return f"{tp5.table(rows)}\n\nValidation loss with bias 0: {plain.progress.best_loss:.3f} nats.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="?", type=Path, default=ROOT / "runs" / "reference", metavar="RUNS")
    parser.add_argument("--words", action="store_true", help="known words and copied substrings, as RUNS/words.md")
    parser.add_argument("--memory", action="store_true", help="what carries the LSTM's memory, as RUNS/memory.md")
    options = parser.parse_args()
    folder = options.runs
    if options.words:
        (folder / "words.md").write_text(words(folder), encoding="utf-8")
        return
    if options.memory:
        (folder / "memory.md").write_text(memory(folder), encoding="utf-8")
        return
    matplotlib.use("Agg")
    plt.rcParams.update(STYLE)
    runs = {cell: EventAccumulator(str(folder / cell), {"scalars": 0}).Reload() for cell in COLOURS}
    for name, figure in {
        "loss_curves": loss_curves(runs),
        "gradient_flow": gradient_flow(runs),
        "named_units": named_units(folder / "lstm", runs["lstm"]),
        "likelihood_is_not_quality": quality(folder / "words.md"),
    }.items():
        figure.savefig(folder / f"{name}.png")


if __name__ == "__main__":
    main()
