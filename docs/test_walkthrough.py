"""docs/walkthrough.md against bipeft.py, its figures and the runs that made them."""

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent
PAGE = (DOCS / "walkthrough.md").read_text()
NUMBERS = json.loads((DOCS / "figures" / "walkthrough.json").read_text())
PROSE = " ".join(re.sub(r"^```.*?^```$", "", PAGE, flags=re.DOTALL | re.MULTILINE).split())
REAL = PROSE.partition("## 8. ")[2]


def test_every_figure_is_shown_and_small():
    shown = re.findall(r"!\[.+?\]\((figures/.+?)\)", PAGE)
    there = [path for path in (DOCS / "figures").iterdir() if path.suffix in (".png", ".gif")
             and not path.name.startswith("compare-")]                  # those are of another page
    assert sorted(shown) == sorted(f"figures/{path.name}" for path in there)
    assert sum(path.stat().st_size for path in there) < 1.2 * 2**20


def test_the_algorithm_has_every_equation_and_a_decision_for_every_line_of_our_own():
    rows = re.findall(r"^\| ([●○]?) ?\| (.+?) \| (.*?) ?\|$", PAGE, re.MULTILINE)
    rows = [row for row in rows if not row[1].startswith(("line of", "---"))]
    assert all(label == anchor for label, anchor in re.findall(r"\[D(\d+)\]\(decisions\.md#d(\d+)\)", PAGE))
    assert len(rows) > 20 and [line for mark, line, ours in rows if bool(mark) != ("decisions.md#d" in ours)] == []
    assert [line for mark, line, _ in rows if (mark == "●") != bool(re.search(r"\*\*[^*]{12,}\*\*", line))] == []
    found = [n for _, line, _ in rows for span in re.findall(r"\(Eq\. ([\d–, ]+)\)", line) for n in span.split(", ")]
    numbers = [i for n in found for a, _, b in [n.partition("–")] for i in range(int(a), int(b or a) + 1)]
    assert sorted(numbers) == list(range(1, 11))


@pytest.mark.parametrize("which", ["facts", "recorded"])
def test_the_page_says_what_the_runs_gave(which):
    text = {"facts": PROSE.replace(REAL, ""), "recorded": REAL}[which]
    assert [fact for fact in NUMBERS[which] if fact not in text] == []


def test_no_number_of_the_page_is_from_elsewhere():
    # three digits or more, outside of code, links and formulas; besides the runs': settings, and even odds' loss in
    # nats a token (half of log 2)
    prose = re.sub(r"`.+?`|\]\(.+?\)|[\w.]+\.\w+\)|SmolLM2-135M", " ", PROSE)
    numbers = {n.rstrip(",") for n in re.findall(r"\d[\d,]*(?:\.\d+)?", prose) if len(re.sub(r"\D", "", n)) >= 3}
    ours = {n.rstrip(",") for n in re.findall(r"\d[\d,]*(?:\.\d+)?", " ".join(sum(NUMBERS.values(), [])))}
    assert numbers - ours <= {"0.85", "0.347", "139", "780", "117"}


def test_the_page_is_short():
    count = len([word for word in PAGE.split() if re.search(r"\w", word)])
    assert count <= 2500, f"{count} words, and 2,500 may be there"
