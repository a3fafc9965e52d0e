"""What the marker says of a folder: one verdict a question."""

from dataclasses import dataclass, field

RIGHT, WRONG, MISSING, CANNOT_RUN, NOT_JUDGED = "right", "wrong", "missing", "cannot run", "not judged"

# In the handout's order; the name is the one that the handout gives.
QUESTIONS = {
    "batches": "1 pad_collate_fn",
    "loss": "2 maskedCrossEntropy",
    "generate": "3 generate",
    "embedding": "4 embedding, training",
    "rnn": "4 RNN",
    "lstm": "5 LSTM",
    "gru": "5 GRU",
    "beam": "6 generate_beam",
    "nucleus": "7 p_nucleus",
}


@dataclass
class Verdict:
    """The answer to one question.

    detail    what is wrong and where, with the smallest input, expected and got; or why it cannot run
    mistakes  short names of the mistakes found
    warnings  what does not make it wrong
    """

    status: str
    detail: str = ""
    mistakes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def wrong(mistake: str, detail: str = "", *warnings: str) -> Verdict:
    """A wrong answer: the mistake in words, then what shows it."""
    return Verdict(WRONG, f"{mistake}: {detail}" if detail else mistake, [mistake], list(warnings))


@dataclass
class Report:
    """All verdicts on a folder, and what had to be repaired in order to look."""

    folder: str
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    repairs: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """True if nothing is wrong; what is missing or not judged is not wrong."""
        return all(verdict.status not in (WRONG, CANNOT_RUN) for verdict in self.verdicts.values())

    def __str__(self):
        lines = [self.folder]
        for question, verdict in self.verdicts.items():
            detail = verdict.detail.replace("\n", "\n" + " " * 38)
            lines.append(f"  {QUESTIONS[question]:22}  {verdict.status:10}  {detail}".rstrip())
            lines += [f"  {'':22}  {'warning':10}  {warning}" for warning in verdict.warnings]
        lines += [f"  repaired to look: {repair}" for repair in self.repairs]
        return "\n".join(lines)
