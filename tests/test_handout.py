"""The handout: no answer is in it, each comes back by itself, and a student's own ones train, write and are right."""

import ast
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT, refused
from marker.questions import ANSWERS, QUESTIONS, mark

from tests.handout import SCRIPTS, definitions, make, scripts
from textloader import LabError

# The marker's question of each answer.
JUDGED = dict(zip(ANSWERS, ("batches", "loss", "generate", "embedding", "rnn", "lstm", "gru", "beam", "nucleus"),
                  strict=True))  # fmt: skip
# Answers of a student's own, in another style than the lab's.
OWN = {
    "pad_collate_fn": """
        closed = [torch.cat([sample, torch.tensor([EOS_IX])]) for sample in samples]
        return torch.nn.utils.rnn.pad_sequence(closed, padding_value=PAD_IX)
    """,
    "maskedCrossEntropy": """
        losses = F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none")
        mask = (target != padcar).flatten()
        return (losses * mask).sum() / mask.sum()
    """,
    "CharModel.forward": """
        opened = torch.cat([torch.full_like(targets[:1], EOS_IX), targets[:-1]])
        return self.decoder(self.rnn.unroll(self.rnn.project(self.emb(opened)), trace=trace)[0])
    """,
    "RNN.one_step": """
        return {"h": (projected + F.linear(h, self.hidden_weight)).tanh()}
    """,
    "generate": """
        codes, log_prob, score, states = [], 0.0, 0.0, None
        symbols = [eos, *codes_of(start, alphabet_of(emb))]
        for _ in range(maxlen):
            output, states = rnn(emb(torch.tensor(symbols)).unsqueeze(1), states)
            log_probs = without_blank(decoder(output[-1, 0]))
            drawn = warp(log_probs, temperature or 1.0, **warping)
            code = int(torch.multinomial(drawn.exp(), 1, generator=generator)) if temperature else int(drawn.argmax())
            codes, symbols = [*codes, code], [code]
            log_prob, score = log_prob + float(log_probs[code]), score + float(drawn[code])
            if code == eos:
                break
        text = code2string(codes, alphabet_of(emb))
        return Hypothesis(text=text, log_prob=log_prob, ended=eos in codes, score=score)
    """,
    "LSTM.one_step": """
        H, a = self.hidden_size, projected + F.linear(h, self.hidden_weight)
        forget, write, show = (a[:, n * H : (n + 1) * H].sigmoid() for n in (0, 1, 3))
        C = torch.addcmul(write * a[:, 2 * H : 3 * H].tanh(), forget, C)
        return {"h": show * C.tanh(), "C": C, "forget": forget, "write": write, "show": show}
    """,
    "GRU.one_step": """
        H, W = self.hidden_size, self.hidden_weight
        z, r = (projected[:, : 2 * H] + h.matmul(W[: 2 * H].t())).sigmoid().split(H, dim=1)
        new = (projected[:, 2 * H :] + (r * h).matmul(W[2 * H :].t())).tanh()
        return dict(h=h + z * (new - h), z=z, r=r)
    """,
    "generate_beam": """
        alpha, shortest = search.get("alpha", 1.0), search.get("min_length", 0)
        read, symbols, states = reader(rnn, emb, decoder, eos, start)
        live, ended = [(0.0, 0.0, ())], []  # score, log-probability, codes
        for length in range(maxlen):
            log_probs, states = read(symbols, states)
            warped, children = warp(log_probs, alpha=alpha), [(*sentence, None) for sentence in ended]
            for row, (score, log_prob, codes) in enumerate(live):
                for code in warped[row].topk(min(k + 1, warped.shape[1])).indices.tolist():
                    step = warped[row, code].item()
                    if step > NEVER and (code != eos or length >= shortest):
                        log_prob_after = log_prob + log_probs[row, code].item()
                        children.append((score + step, log_prob_after, (*codes, code), row))
            best = sorted(children, key=lambda child: -child[0])[:k]
            ended = [child[:3] for child in best if child[2][-1] == eos]
            going_on = [child for child in best if child[2][-1] != eos]
            live = [child[:3] for child in going_on]
            if not live:
                break
            symbols = torch.tensor([child[2][-1] for child in going_on])
            states = select_rows(states, torch.tensor([child[3] for child in going_on]))
        found = []
        for score, log_prob, codes in (ended + live)[: n or k]:
            text = code2string(codes, alphabet_of(emb))
            found.append(Hypothesis(text=text, score=score, log_prob=log_prob, ended=codes[-1] == eos))
        return found
    """,
    "p_nucleus": """
        def compute(h):
            p = decoder(h).softmax(-1)
            values, order = p.sort(dim=-1, descending=True)
            values = values.where(values.cumsum(-1) - values < alpha, 0)
            return torch.zeros_like(p).scatter(-1, order, values / values.sum(-1, keepdim=True))

        return compute
    """,
}


def solve(folder: Path, *names: str) -> None:
    """Write a student's own answers into a handout, each in the place of the line that raises."""
    for name in names:
        hole = re.compile(rf'^ *raise NotImplementedError\("question \d: {re.escape(name)}"\)\n', re.M)
        [file] = [file for file in folder.glob("*.py") if hole.search(file.read_text(encoding="utf-8"))]
        text = file.read_text(encoding="utf-8")
        found = hole.search(text)
        indent = found[0][: -len(found[0].lstrip())]
        body = textwrap.indent(textwrap.dedent(OWN[name]).strip("\n") + "\n", indent)
        file.write_text(text[: found.start()] + body + text[found.end() :], encoding="utf-8")


def run(folder: Path, script: str, *arguments) -> subprocess.CompletedProcess:
    """A command in a handout."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8")


def unanswered(result: subprocess.CompletedProcess, number: str, name: str) -> None:
    """Assert that a command ended in one line that says which question is not answered."""
    refused(result, f"not answered yet: question {number}: {name}")


# -------------------------------------------------------------------------- what is in the folder


def test_no_answer_is_in_the_folder(tmp_path):
    make(tmp_path / "new" / "handout", marker=True)
    folder = tmp_path / "new" / "handout"
    assert {path.name for path in folder.iterdir()} == {*SCRIPTS, "data", "requirements.txt", "questions.md", "tests"}
    assert not [path for path in folder.rglob("*") if path.name in ("solutions", "mutations.py", "__pycache__")]
    rest = {line.strip() for text in scripts().values() for line in text.split("\n")}
    whole = "\n".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.*") if path.suffix in (".py", ".md"))
    for name in SCRIPTS:
        for line in (ROOT / name).read_text(encoding="utf-8").split("\n"):
            assert line.strip() in rest or len(line.strip()) < 30 or line.strip() not in whole, line


def test_signatures_and_docstrings_stay_and_helpers_go():
    for name, text in scripts().items():
        lab, handout = definitions((ROOT / name).read_text(encoding="utf-8")), definitions(text)
        for function, node in handout.items():
            assert ast.unparse(node.args) == ast.unparse(lab[function].args)
            assert ast.get_docstring(node) == ast.get_docstring(lab[function])
            body = [part for part in node.body if not isinstance(part, ast.Expr)]
            if function in ANSWERS:
                assert ast.unparse(body) == f"raise NotImplementedError('question {ANSWERS[function]}: {function}')"
            elif function != "beam_steps":
                assert ast.unparse(node) == ast.unparse(lab[function])
        assert set(lab) - set(handout) <= {"likeliest_children"}  # what only beam search uses


def test_answers_come_back_one_by_one_and_all_together_to_the_byte(tmp_path):
    make(tmp_path, kept=list(ANSWERS))
    for name in (*SCRIPTS, "requirements.txt", "data/speeches.txt"):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()
    assert "Answered already: `pad_collate_fn`, `" in (tmp_path / "questions.md").read_text(encoding="utf-8")
    lab = {name: node for file in SCRIPTS for name, node in definitions((ROOT / file).read_text("utf-8")).items()}
    for kept in ("GRU.one_step", "generate_beam"):
        found = {name: node for text in scripts([kept]).values() for name, node in definitions(text).items()}
        back = {name for name in ANSWERS if ast.unparse(found[name]) == ast.unparse(lab[name])}
        assert back == {kept}
        assert ("likeliest_children" in found) == (kept == "generate_beam") or "likeliest_children" not in lab


def test_a_folder_that_has_something_in_it_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    for path in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(LabError, match="has something in it"):
            make(path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_the_command_says_what_it_wrote(tmp_path):
    command = [sys.executable, "-m", "tests.handout", "--marker", str(tmp_path), "--keep", "GRU.one_step"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and "equations" in done.stdout and "questions.md" in done.stdout, done.stderr
    marked = run(tmp_path, "-m", "tests.marker", ".")  # by the marker of the handout, in its own folder
    assert marked.returncode == 0 and marked.stdout.count(" missing") == len(QUESTIONS) - 1, marked.stdout
    assert re.search("5 GRU +right", marked.stdout)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    refused(again, "has something in it")


# -------------------------------------------------------------------------------------- answering


def test_the_marker_says_that_all_is_missing(tmp_path):
    make(tmp_path)
    report = mark(tmp_path)
    assert {verdict.status for verdict in report.verdicts.values()} == {"missing"} and not report.repairs, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("kept", ANSWERS)
def test_each_answer_put_back_is_right_and_the_rest_missing(kept, tmp_path):
    make(tmp_path, kept=[kept])
    report = mark(tmp_path)
    assert report.verdicts.pop(JUDGED[kept]).status == "right", str(report)
    assert {verdict.status for verdict in report.verdicts.values()} == {"missing"} and not report.repairs, str(report)


@pytest.mark.slow
def test_a_handout_trains_without_the_samples_that_are_not_there_yet(tmp_path, small):
    make(tmp_path)
    solve(tmp_path, "pad_collate_fn", "maskedCrossEntropy", "CharModel.forward", "RNN.one_step")
    done = run(tmp_path, "tp5.py", "--model", "rnn", "--run", "run", *small)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    losses = [float(loss) for loss in re.findall(r"validation ([\d.]+) nats", done.stdout)]
    assert losses[1] < losses[0] < 4.5 and "Gradient " in done.stdout
    assert "\n  greedy" not in done.stdout


@pytest.mark.slow
def test_a_student_goes_question_by_question(tmp_path, small):
    """Each answer shows something, what is not answered ends in one line, and the marker calls each right."""
    make(tmp_path)
    train = ("tp5.py", *small, "--model")
    right = set()

    def solved(*names):
        solve(tmp_path, *names)
        right.update(JUDGED[name] for name in names)
        verdicts = mark(tmp_path).verdicts
        assert {question for question, verdict in verdicts.items() if verdict.status == "right"} == right
        assert {verdict.status for verdict in verdicts.values()} <= {"right", "missing"}

    def shows(*command) -> str:
        done = run(tmp_path, *command)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout

    unanswered(run(tmp_path, "textloader.py"), "1", "pad_collate_fn")
    unanswered(run(tmp_path, *train, "rnn"), "1", "pad_collate_fn")
    solved("pad_collate_fn")
    assert "7 × 3 batch" in shows("textloader.py")
    solved("CharModel.forward")
    unanswered(run(tmp_path, *train, "rnn"), "4", "RNN.one_step")
    solved("RNN.one_step")
    unanswered(run(tmp_path, *train, "rnn"), "2", "maskedCrossEntropy")
    solved("maskedCrossEntropy")
    assert "  greedy  " not in shows(*train, "rnn")
    unanswered(run(tmp_path, "generate.py"), "3", "generate")
    solved("generate")
    shows("generate.py", "--greedy", "--start", "They ")
    shows("generate.py", "--sample", "-n", "3")
    unanswered(run(tmp_path, "generate.py", "--sample", "--nucleus", "0.9"), "7", "p_nucleus")
    unanswered(run(tmp_path, *train, "all"), "5", "GRU.one_step")
    unanswered(run(tmp_path, *train, "lstm"), "5", "LSTM.one_step")
    solved("LSTM.one_step", "GRU.one_step")
    output = shows(*train, "all", "--run", "all")
    assert "  cooler  " in output and "  beam  " not in output
    assert "| lstm " in output
    assert b"4_gates/lstm_3_forget" in b"".join(file.read_bytes() for file in tmp_path.glob("all/lstm/events*"))
    for decoder in ("--beam", "5"), ("--exact",):
        unanswered(run(tmp_path, "generate.py", *decoder), "6", "generate_beam")
    solved("generate_beam")
    greedy, beam = (shows("generate.py", "--plain", *decoder) for decoder in (["--greedy"], ["--beam", 1]))
    assert greedy == beam
    assert "proved" in shows("generate.py", "--exact")
    unanswered(run(tmp_path, "generate.py", "--beam", 5, "--tree"), "6 (optional)", "beam_steps")
    unanswered(run(tmp_path, "generate.py", "--beam", 5, "--nucleus", 0.9), "7", "p_nucleus")
    solved("p_nucleus")
    assert all(f"\n{decoder}" in shows("generate.py") for decoder in ("--greedy", "--sample", "--beam 5", "--exact"))
    assert "  beam  " in shows(*train, "rnn", "--run", "again")
