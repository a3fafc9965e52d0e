# ruff: noqa: E501  (a table of texts)
"""Folders for the marker's own tests: right solutions in several styles, and each with one mistake.

`solutions/` holds six plain solutions that differ in every interface the marker has to find out. A
right variant or a mistake is one of them with some text replaced.
"""

from dataclasses import dataclass
from pathlib import Path

SOLUTIONS = Path(__file__).parent / "solutions"
STYLES = ("steps", "inside", "lists", "fused", "attribute", "library")


@dataclass(frozen=True)
class Change:
    """A solution of one style with replaced text.

    name      of the test
    style     which solution
    question  the one that the mistake belongs to; "" if the variant is right
    words     what the report must say of it
    edits     (file, old, new, old, new, …), …
    """

    name: str
    style: str
    question: str
    words: str
    edits: tuple

    def write(self, folder: Path) -> Path:
        """Write the folder."""
        return write(self.style, folder, *self.edits)


def write(style: str, folder: Path, *edits: tuple) -> Path:
    """Write a solution of a style, with some text replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {path.name.removesuffix(".txt"): path for path in (SOLUTIONS / style).iterdir() if path.is_file()}
    texts = {
        name: path.read_text(encoding="utf-8")
        for name, path in {"textloader.py": SOLUTIONS / "textloader.py", **own}.items()
    }
    for file, *pairs in edits:
        for old, new in zip(pairs[::2], pairs[1::2], strict=True):
            assert old in texts[file], f"{style}/{file} has no {old!r}"
            texts[file] = texts[file].replace(old, new)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def changes(file: str, style: str, question: str, *rows) -> list[Change]:
    """Several changes of one file of one style: rows of (name, words, old, new, …)."""
    return [Change(f"{name} [{style}]", style, question, words, ((file, *edits),)) for name, words, *edits in rows]


LOADER = changes("textloader.py", "steps", "batches",
    ("1 float", "not int64", "torch.tensor(columns).t()", "torch.tensor(columns).t().float()"),
    ("2 sentence lost", "sentences are lost", "self.phrases = [p + \".\" for p in parts if p]",
     "self.phrases = [p + \".\" for p in parts[:-2] if p]"),
    ("2 short samples dropped", "sentences are lost", "for s in samples]\n    return", "for s in samples if len(s) > 1]\n    return"),
    ("3 EOS last", "EOS comes after the padding", "[EOS_IX] + [PAD_IX] * (longest - len(s))",
     "[PAD_IX] * (longest - len(s)) + [EOS_IX]"),
    ("3 a row too many", "a row too many", "longest - len(s))", "longest - len(s) + 1)"),
    ("3 batch first", "B × T", "torch.tensor(columns).t()", "torch.tensor(columns)"),
    ("EOS never learnt", "no EOS", "[EOS_IX] + [PAD_IX]", "[PAD_IX]"),
    ("EOS cut", "EOS is missing", "return torch.tensor(columns).t()", "return torch.tensor(columns).t()[:longest]"),
)  # fmt: skip

LOSS = [
    *changes("tp5.py", "steps", "loss",
        ("4 padding counted", "padding is counted", "(loss * mask).sum() / mask.sum()", "loss.mean()"),
        ("4 mask on logits", "mask is on the logits", "loss = nn.functional.cross_entropy(output, target,",
         "loss = nn.functional.cross_entropy(output * mask[:, None], target,",
         "(loss * mask).sum() / mask.sum()", "loss.mean()"),
        ("4 mask of predictions", "predictions", "mask = target != padcar", "mask = output.argmax(-1) != padcar"),
        ("5 padded length", "padded length", "(loss * mask).sum() / mask.sum()", "(loss * mask).mean()"),
        ("6 integer index", "index", "mask = target != padcar", "mask = torch.where(target == padcar, 0, 1)",
         "(loss * mask).sum()", "loss[mask].sum()"),
        ("7 constructor", "builds a loss", "loss = nn.functional.cross_entropy(output, target, reduction=\"none\")",
         "loss = nn.CrossEntropyLoss(output, target, reduce=False)"),
        ("8 not reduced", "not reduced", "(loss * mask).sum() / mask.sum()", "loss * mask")),
    *changes("tp5.py", "inside", "loss",
        ("4 padding counted", "padding is counted", "(loss * mask).sum() / mask.sum()", "loss.mean()"),
        ("5 sentences' means", "sentences' means", "return (loss * mask).sum() / mask.sum()",
         "loss, mask = (loss * mask).view(target.shape), mask.view(target.shape)\n"
         "    return (loss.sum(0) / mask.sum(0)).mean()"),
        ("6 integer index", "index", "(loss * mask).sum() / mask.sum()", "loss[mask.long()].sum() / mask.sum()"),
        ("8 not reduced", "not reduced", "(loss * mask).sum() / mask.sum()", "loss * mask")),
    *changes("tp5.py", "lists", "loss",
        ("4 padding counted", "padding is counted", "CrossEntropyLoss(ignore_index=padcar)", "CrossEntropyLoss()"),
        ("7 constructor", "builds a loss", "loss = CrossEntropyLoss(ignore_index=padcar)\n    return loss(output.permute(0, 2, 1), target)",
         "return CrossEntropyLoss(output, target, reduce=True)"),
        ("8 not reduced", "not reduced", "ignore_index=padcar", "ignore_index=padcar, reduction=\"none\"")),
    *changes("tp4.py", "fused", "loss",
        ("4 padding counted", "padding is counted", "-logp[target != padcar].sum()", "-logp.mean()"),
        ("5 padded length", "padded length", "-logp[target != padcar].sum()", "-(logp * (target != padcar)).mean()"),
        ("6 integer index", "index", "-logp[target != padcar].sum()", "-logp[(target != padcar).long()].mean()")),
]  # fmt: skip

STEP = "h = rnn.one_step(emb(code), h)"
GENERATE = [
    *changes("generate.py", "steps", "generate",
        ("9 state lost", "state is lost after each step", STEP, "h = rnn(emb(code)[None])[-1]"),
        ("10 last only", "last character", "h = rnn(emb(codes).unsqueeze(1))[-1]\n    written", "h = rnn(emb(codes[-1:]).unsqueeze(1))[-1]\n    written"),
        ("10 read twice", "read twice", "    written = []\n", "    h = rnn.one_step(emb(codes[-1:]), h)\n    written = []\n"),
        ("10 after the first", "first", "h = rnn(emb(codes).unsqueeze(1))[-1]\n    written", "h = rnn(emb(codes).unsqueeze(1))[0]\n    written"),
        ("11 random state", "random state", "h = rnn(emb(codes).unsqueeze(1))[-1]\n    written",
         "h = rnn(emb(codes).unsqueeze(1), 3 * torch.randn(1, rnn.dim_hidden))[-1]\n    written"),
        ("11 no stop", "EOS does not stop", "if code.item() == eos:", "if code.item() == -1:"),
        ("13 not fed back", "not fed back", STEP, "h = rnn.one_step(emb(codes[-1:]), h)")),
    *changes("generate.py", "fused", "generate",
        ("9 state lost", "state is lost after each step", "output, state = rnn(emb(symbol)[:, None], state)", "output, _ = rnn(emb(symbol)[:, None])"),
        ("11 read again", "read again", "        written.append(symbol)\n        if symbol",
         "        written.append(symbol)\n        symbol = torch.cat([torch.tensor([eos] + string2code(start).tolist()), *written])\n        if written[-1]"),
        ("11 no stop", "EOS does not stop", "if symbol.item() == eos:", "if len(written) > maxlen:"),
        ("12 C for h", "C is taken for h", "        p = (decoder(output[-1, 0])", "        h = state[1][0] if isinstance(state, tuple) else output[-1, 0]\n        p = (decoder(h)")),
    *changes("generate.py", "inside", "generate",
        ("10 last only", "last character", "code = read(rnn, codes)", "code = read(rnn, codes[:1] + codes[len(start) :])"),
        ("9 state lost", "state is lost after each step", "code = read(rnn, codes)", "code = read(rnn, codes[-1:])"),
        ("11 no stop", "EOS does not stop", "if code == eos:", "if code < 0:")),
    *changes("generate.py", "lists", "generate",
        ("9 state lost", "state is lost after each step", "h = rnn.one_step(emb(code), h)", "h = rnn.one_step(emb(code), torch.zeros_like(h))"),
        ("10 last only", "last character", "for letter in start:", "for letter in start[-1:]:"),
        ("13 not fed back", "not fed back", "h = rnn.one_step(emb(code), h)", "h = rnn.one_step(emb(string2code(start[-1])), h)")),
    *changes("generate.py", "attribute", "generate",
        ("9 state lost", "state is lost after each step", "h = rnn(emb(torch.tensor(codes[-1:])), h)\n    print", "h = rnn(emb(torch.tensor(codes[-1:])), 0 * h)\n    print")),
]  # fmt: skip

EMBEDDING = [
    *changes("tp5.py", "steps", "embedding",
        ("14 outside", "no optimiser", "[*rnn.parameters(), *emb.parameters()]", "rnn.parameters()"),
        ("14 at every call", "at every call", "    def forward(self, x, h=None):\n        if h is None:\n            h = torch.zeros(x.shape[1], self.dim_hidden)\n        states = []\n        for xt in x:\n            h = self.one_step",
         "    def forward(self, x, h=None):\n        x = nn.Embedding(97, 64)(x)\n        if h is None:\n            h = torch.zeros(x.shape[1], self.dim_hidden)\n        states = []\n        for xt in x:\n            h = self.one_step"),
        ("EOS ignored", "EOS is never learnt", "x[1:].flatten(), PAD_IX)", "x[1:].flatten(), EOS_IX)")),
    *changes("tp5.py", "lists", "embedding",
        ("14 outside", "no optimiser", "SGD(model.parameters()", "SGD(model.rnn.parameters()", "RNN(50, 20, 97), emb)", "RNN(50, 20, 97), None)")),
    *changes("tp4.py", "fused", "embedding", ("14 outside", "no optimiser", " + list(emb.parameters())", "")),
    *changes("tp5.py", "attribute", "embedding",
        ("14 outside", "no optimiser", "list(model.parameters()) + list(embedding.parameters())", "model.parameters()")),
]  # fmt: skip

RNNS = [
    *changes("tp5.py", "steps", "rnn",
        ("19 given state", "given first state", "    def forward(self, x, h=None):\n        if h is None:\n            h = torch.zeros(x.shape[1], self.dim_hidden)\n        states = []\n        for xt in x:\n            h = self.one_step(xt, h)\n            states.append(h)\n        return torch.stack(states)\n\n    def decode",
         "    def forward(self, x, h=None):\n        h = torch.zeros(x.shape[1], self.dim_hidden)\n        states = []\n        for xt in x:\n            h = self.one_step(xt, h)\n            states.append(h)\n        return torch.stack(states)\n\n    def decode"),
        ("logits tanh", "tanh or sigmoid", "return self.v(h)", "return torch.tanh(self.v(h))"),
        ("logits sigmoid", "tanh or sigmoid", "return self.v(h)", "return torch.sigmoid(self.v(h))"),
        ("logits softmax", "softmax", "return self.v(h)", "return torch.softmax(self.v(h), dim=-1)"),
        ("batch concatenation", "along the batch", "torch.cat([x, h], dim=1)))", "torch.cat([x, h], dim=0)))")),
    *changes("tp5.py", "inside", "rnn",
        ("logits softmax", "softmax", "return self.decoder(h)", "return F.softmax(self.decoder(h), dim=-1)"),
        ("state forgotten", "forgotten", "            h = self.one_step(x[:, t], h)\n            outputs.append(self.decode(h))", "            outputs.append(self.decode(self.one_step(x[:, t], h)))"),
        ("16 one matrix", "one matrix", "self.wx(x) + self.wh(h))\n\n    def forward(self, x, h)", "self.wh(x) + self.wh(h))\n\n    def forward(self, x, h)")),
    *changes("tp5.py", "lists", "rnn",
        ("elementwise", "element by element", "h @ self.U.T", "h * self.U", "self.U = nn.Parameter(torch.zeros(hidden, hidden))", "self.U = nn.Parameter(torch.zeros(hidden))"),
        ("logits sigmoid", "tanh or sigmoid", "return nn.functional.linear(h, self.D, self.bd)", "return nn.functional.linear(h, self.D, self.bd).sigmoid()")),
    *changes("tp4.py", "fused", "rnn",
        ("19 given state", "given first state", 'h = torch.zeros(x.shape[1], self.hidden_size, device="cuda") if h is None else h', "h = torch.zeros(x.shape[1], self.hidden_size)")),
    *changes("tp5.py", "attribute", "rnn",
        ("elementwise matrix", "", "self.h2h(h)", "self.h2h.weight * h")),
]  # fmt: skip

LSTMS = [
    *changes("tp5.py", "steps", "lstm",
        ("15 softmax gates", "softmax", "f = torch.sigmoid(self.wf(xh))", "f = torch.softmax(self.wf(xh), 1)", "i = torch.sigmoid(self.wi(xh))",
         "i = torch.softmax(self.wi(xh), 1)", "o = torch.sigmoid(self.wo(xh))", "o = torch.softmax(self.wo(xh), 1)"),
        ("16 i = f", "share", "self.wi(xh)", "self.wf(xh)"),
        ("no tanh of C", "not o ⊗ tanh", "return o * torch.tanh(c), c", "return o * c, c"),
        ("18 leak", "leaks", "        if c is None:\n            c = torch.zeros(x.shape[1], self.dim_hidden)\n        states = []\n        for xt in x:\n            h, c = self.one_step(xt, h, c)\n",
         "        c = getattr(self, 'c', h * 0)\n        states = []\n        for xt in x:\n            h, c = self.one_step(xt, h, c)\n            self.c = c\n"),
        ("C forgotten", "memory C is forgotten", "            h, c = self.one_step(xt, h, c)\n            states", "            h, _ = self.one_step(xt, h, c)\n            states")),
    *changes("tp5.py", "inside", "lstm",
        ("16 i = f", "share", "torch.sigmoid(self.input_x(x) + self.input_h(h))", "torch.sigmoid(self.forget_x(x) + self.forget_h(h))"),
        ("15 softmax gates", "softmax", "f = torch.sigmoid(self.forget_x(x) + self.forget_h(h))", "f = torch.softmax(self.forget_x(x) + self.forget_h(h), -1)",
         "i = torch.sigmoid(self.input_x(x) + self.input_h(h))", "i = torch.softmax(self.input_x(x) + self.input_h(h), -1)",
         "o = torch.sigmoid(self.output_x(x) + self.output_h(h))", "o = torch.softmax(self.output_x(x) + self.output_h(h), -1)"),
        ("16 one matrix", "one matrix", "self.forget_x(x) + self.forget_h(h)", "self.forget_h(x) + self.forget_h(h)")),
    *changes("tp5.py", "lists", "lstm",
        ("16 o = f", "share", "self.o(hx).sigmoid()", "self.f(hx).sigmoid()"),
        ("candidate", "candidate", "self.c(hx).tanh()", "self.c(hx)")),
    *changes("tp4.py", "fused", "lstm",
        ("16 i = f", "share", "c = f.sigmoid() * c + i.sigmoid()", "c = f.sigmoid() * c + f.sigmoid()"),
        ("19 given state", "given first state", "h, c = (zeros, zeros) if state is None else state", "h, c = zeros, zeros")),
    *changes("tp5.py", "attribute", "lstm",
        ("18 leak", "leaks", "        self.C = torch.zeros(x.shape[0], self.hidden_size)\n        res", "        self.C = getattr(self, 'C', torch.zeros(x.shape[0], self.hidden_size))\n        res"),
        ("15 softmax gates", "softmax", "torch.sigmoid(gate(hx))", "torch.softmax(gate(hx), dim=1)")),
]  # fmt: skip

GRUS = [
    *changes("tp5.py", "steps", "gru",
        ("15 softmax gates", "softmax", "z = torch.sigmoid(self.wz(xh))", "z = torch.softmax(self.wz(xh), 1)", "r = torch.sigmoid(self.wr(xh))", "r = torch.softmax(self.wr(xh), 1)"),
        ("16 r = z", "share", "self.wr(xh)", "self.wz(xh)"),
        ("17 x reset", "multiplies x", "self.wr = nn.Linear(dim_in + dim_hidden, dim_hidden, bias=False)", "self.wr = nn.Linear(dim_in + dim_hidden, dim_in + dim_hidden, bias=False)",
         "self.w(torch.cat([x, r * h], dim=1))", "self.w(r * xh)"),
        ("no reset", "reset gate is not used", "r * h], dim=1)", "h], dim=1)")),
    *changes("tp5.py", "inside", "gru",
        ("16 r = z", "share", "self.reset(hx)", "self.update(hx)"),
        ("17 x reset", "multiplies x", "r * h, x[:, t]", "r * h, r * x[:, t]"),
        ("logits softmax", "softmax", "        return self.decoder(h)\n\n\ndef train", "        return self.decoder(h).softmax(-1)\n\n\ndef train")),
    *changes("tp5.py", "lists", "gru", ("16 r = z", "share", "self.r(hx).sigmoid()", "self.z(hx).sigmoid()")),
    *changes("tp4.py", "fused", "gru", ("17 x reset", "multiplies x", "torch.cat([r * h, xt], 1)", "torch.cat([r * h, r * xt], 1)")),
    *changes("tp5.py", "attribute", "gru",
        ("15 softmax gates", "softmax", "torch.sigmoid(x @ self.Wz + h @ self.Uz)", "torch.softmax(x @ self.Wz + h @ self.Uz, 1)", "torch.sigmoid(x @ self.Wr + h @ self.Ur)", "torch.softmax(x @ self.Wr + h @ self.Ur, 1)"),
        ("state forgotten", "", "h @ self.Uz", "0", "h @ self.Ur", "0", "(r * h) @ self.Uh", "0")),
]  # fmt: skip

ENDED = "            if written and written[-1] == eos:\n                children.append((written, score, h))\n                continue\n"
BEAMS = [
    *changes("generate.py", "steps", "beam",
        ("20 grow", "not kept", ENDED, ""),
        ("20 dropped", "not kept", ENDED, ENDED.replace("children.append((written, score, h))", "pass")),
        ("21 one state", "state", "        for written, score, h in beams:", "        for written, score, _ in beams:"),
        ("22 counted twice", "twice", "score + value, h", "score + score + value, h"),
        ("23 worst", "worst", "beams[0][0]", "beams[-1][0]"),
        ("24 not accumulated", "accumulated", "score + value, h", "value, h"),
        ("25 greedy", "greedy", "beams = children[:k]", "beams = children[:1]"),
        ("state lost", "state is lost", "h = rnn.one_step(emb(torch.tensor([written[-1]])), h)", "h = rnn(emb(torch.tensor([written[-1]]))[None])[-1]")),
    *changes("generate.py", "inside", "beam",
        ("20 grow", "not kept", "            if codes[-1] == eos:\n                children", "            if codes[-1] < 0:\n                children"),
        ("22 counted twice", "twice", "score + logp[i].item()", "2 * score + logp[i].item()"),
        ("23 worst", "worst", "return [(code2string(codes), score) for codes, score in beams]", "return code2string(beams[0][0])"),
        ("24 not accumulated", "accumulated", "score + logp[i].item()", "logp[i].item()"),
        ("25 greedy", "greedy", "[-k:]", "[-1:]")),
    *changes("generate.py", "lists", "beam",
        ("21 not re-indexed", "reordered", "h[rows]", "h[torch.arange(len(rows)) % len(h)]"),
        ("20 dropped", "not kept", "return [start + code2string(w) for s, w in sorted(ended, reverse=True)]",
         "return [start + code2string(w) for s, w in sorted(zip(scores.tolist(), written), reverse=True)] or ['']"),
        ("23 worst", "worst", "for s, w in sorted(ended, reverse=True)]", "for s, w in sorted(ended)][0]"),
        ("24 not accumulated", "accumulated", " + scores[:, None]", "")),
    *changes("generate.py", "fused", "beam",
        ("21 not re-indexed", "reordered", "state = pick(state, rows)", "state = pick(state, torch.arange(len(rows)) % len(rows.unique()))"),
        ("23 worst", "worst", "code2string(max(done)[1])", "code2string(sorted(done)[-k:][0][1])"),
        ("25 greedy", "greedy", "topk(min(k, total.numel()))", "topk(1)")),
    *changes("generate.py", "attribute", "beam",
        ("22 counted twice", "twice", "new.append((p * q[c].item()", "new.append((p * p * q[c].item()"),
        ("20 grow", "not kept", "if eos in s:", "if not s and eos in s:")),
]  # fmt: skip

NUCLEI = [
    *changes("generate.py", "steps", "nucleus",
        ("26 dropped", "dropped", "remove = total - sorted_p >= alpha", "remove = total > alpha"),
        ("27 greedy at 1", "α = 1", "remove = total - sorted_p >= alpha", "n = int((total >= alpha).float().argmax()) + 1\n        remove = torch.arange(p.shape[-1]) >= n"),
        ("28 ascending", "ascending", "descending=True", "descending=False"),
        ("29 unused", "not used", "return q / q.sum(-1, keepdim=True)", "return p"),
        ("29 softmax twice", "softmax", "return q / q.sum(-1, keepdim=True)", "return torch.softmax(q, -1)"),
        ("29 one symbol", "likeliest", "remove = total - sorted_p >= alpha", "remove = torch.arange(p.shape[-1]) > 0"),
        ("30 top-k", "top-k", "remove = total - sorted_p >= alpha", "remove = torch.arange(p.shape[-1]) >= alpha", "sorted_p = sorted_p.masked", "assert alpha >= 1\n        sorted_p = sorted_p.masked")),
    *changes("generate.py", "inside", "nucleus",
        ("26 dropped", "dropped", "values, indices = values[:kept], indices[:kept]", "values, indices = values[: kept - 1], indices[: kept - 1]"),
        ("29 unused", "not used", "values, indices = values[:kept], indices[:kept]", "pass"),
        ("28 ascending", "ascending", "descending=True", "descending=False")),
    *changes("generate.py", "lists", "nucleus",
        ("26 dropped", "dropped", "remove[..., 1:] = remove[..., :-1].clone()\n        remove[..., 0] = False", "pass"),
        ("29 unused", "not used", "return torch.log_softmax(logits, -1)", "return torch.log_softmax(decoder(h), -1)"),
        ("28 ascending", "", "descending=True", "descending=False")),
    *changes("generate.py", "fused", "nucleus",
        ("29 one symbol", "likeliest", "order[torch.multinomial(p[order[:count]], 1)]", "order[:1]"),
        ("30 top-k", "top-k", "count = min(int((total < alpha).sum()) + 1, len(p))", "count = range(len(p) + 1)[alpha]"),
        ("26 dropped", "", "(total < alpha).sum()) + 1", "(total < alpha).sum())")),
]  # fmt: skip

MISTAKES = [*LOADER, *LOSS, *GENERATE, *EMBEDDING, *RNNS, *LSTMS, *GRUS, *BEAMS, *NUCLEI]


# ------------------------------------------------------------------------------------ right variants


def right(style: str, name: str = "as it is", *edits) -> Change:
    """A right solution: a style, or one with text replaced by something as right."""
    return Change(f"{style} {name}", style, "", "", edits)


RIGHT_VARIANTS = [
    *[right(style) for style in STYLES],
    right("steps", "pad_sequence", ("textloader.py", "    longest = max(len(s) for s in samples)\n", "    from torch.nn.utils.rnn import pad_sequence\n",
          "    columns = [s.tolist() + [EOS_IX] + [PAD_IX] * (longest - len(s)) for s in samples]\n    return torch.tensor(columns).t()",
          "    return pad_sequence([torch.cat([s, torch.tensor([EOS_IX])]) for s in samples])")),
    right("steps", "sorted by length", ("textloader.py", "for s in samples]\n    return", "for s in sorted(samples, key=len)]\n    return")),
    right("steps", "greedy, stops before EOS", ("generate.py", "Categorical(logits=decoder(h)).sample()", "decoder(h).argmax(-1)")),
    right("steps", "nucleus keeps sorted pairs", ("generate.py", "        return q / q.sum(-1, keepdim=True)",
          "        return sorted_p / sorted_p.sum(-1, keepdim=True), order")),
    right("attribute", "one_step only", ("tp5.py", "def forward(self, x, h)", "def one_step(self, x, h)"),
          ("generate.py", "rnn(emb", "rnn.one_step(emb")),
    right("steps", "training under main", ("tp5.py", "\ndata = DataLoader", "\nif __name__ == '__main__':\n  data = DataLoader",
          "\nemb = ", "\n  emb = ", "\nrnn = ", "\n  rnn = ", "\noptim = ", "\n  optim = ", "\nfor epoch in range(100):\n    for x", "\n  for epoch in range(100):\n    for x")),
    right("inside", "time first", ("tp5.py", "x.size(1)", "x.size(0)", "x[:, t]", "x[t]", "dim=1), h", "dim=0), h",
          "dim=1), state", "dim=0), state"), ("generate.py", "torch.tensor([codes])", "torch.tensor([codes]).T",
          "logits[0, -1]", "logits[-1, 0]")),
    right("lists", "new weights", ("tp5.py", "torch.zeros(hidden, inp)", "torch.randn(hidden, inp) * 0.1")),
    right("lists", "tanh", ("tp5.py", "torch.relu(", "torch.tanh(")),
    right("fused", "mean", ("tp4.py", "].sum()", "].mean()")),
    right("fused", "z admits the old state", ("tp4.py", "h = (1 - z) * h + z * new", "h = z * h + (1 - z) * new")),
    right("attribute", "memory named c", ("tp5.py", "self.C", "self.c")),
]  # fmt: skip
