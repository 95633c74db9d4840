"""docs/walkthrough.md against bipeft.py, its tests, its figures and the run that made them.

    python -m pytest -q docs/test_walkthrough.py
"""

import functools
import json
import re
import sys
import textwrap
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))
import bipeft                                                                      # noqa: E402

PAGE = (DOCS / "walkthrough.md").read_text()
NUMBERS = json.loads((DOCS / "figures" / "walkthrough.json").read_text())
PROSE = " ".join(re.sub(r"^```.*?^```$", "", PAGE, flags=re.DOTALL | re.MULTILINE).split())


def test_quoted_code_is_the_files():
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    lines = (DOCS.parent / "bipeft.py").read_text().splitlines()
    assert len(blocks) >= 8
    for block in blocks:
        count = block.count("\n")
        assert any(textwrap.dedent("\n".join(lines[i:i + count])) == block.rstrip("\n")
                   for i in range(len(lines))), f"not in bipeft.py:\n{block}"


def test_every_function_and_test_named_is_there():
    tests = (DOCS.parent / "test_bipeft.py").read_text()
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 20
    assert [name for name in sorted(named) if f"\ndef {name}(" not in tests] == []
    items = re.findall(r"^- In the file: (.*?)(?=\n- |\n\n)", PAGE, re.DOTALL | re.MULTILINE)
    names = [name for item in items for name in re.findall(r"`([\w.]+)`", item)]
    assert len(items) == 9 and len(names) > 25
    for name in names:
        functools.reduce(getattr, name.split("."), bipeft)              # AttributeError: a name to be mended


def test_every_figure_is_shown_and_small():
    shown = re.findall(r"!\[.+?\]\((figures/.+?)\)", PAGE)
    there = [path for path in (DOCS / "figures").iterdir() if path.suffix in (".png", ".gif")
             and not path.name.startswith("compare-")]                  # those are of another page
    assert sorted(shown) == sorted(f"figures/{path.name}" for path in there) and len(shown) == 8
    assert sum(path.stat().st_size for path in there) < 1.2 * 2**20


def test_every_decision_that_is_linked_exists():
    points = set(re.findall(r"^(\d+)\. ", (DOCS / "decisions.md").read_text(), re.MULTILINE))
    linked = re.findall(r"\[decision (\d+)\]\(decisions\.md\)", PAGE)
    assert len(linked) > 15 and set(linked) <= points
    assert len(linked) == PAGE.count("](decisions.md")


@pytest.mark.parametrize("fact", NUMBERS["facts"])
def test_the_page_says_what_the_run_gave(fact):
    assert fact in PROSE


def test_no_number_of_the_page_is_from_elsewhere():
    # three digits or more, outside of code, links and formulas; besides the run's: settings, a year, and
    # even odds' loss in nats a token (half of log 2)
    prose = re.sub(r"`.+?`|\]\(.+?\)|[\w.]+\.\w+\)", " ", PROSE)
    numbers = {n for n in re.findall(r"\d[\d,]*(?:\.\d+)?", prose) if len(re.sub(r"\D", "", n)) >= 3}
    settings = {"0.85", "252", "2017", "0.347"}
    ours = set(re.findall(r"\d[\d,]*(?:\.\d+)?", " ".join(NUMBERS["facts"])))
    assert {n.rstrip(",") for n in numbers} <= {n.rstrip(",") for n in ours} | settings


def test_the_pages_blocks_of_text_are_the_runs_picture_and_all_of_algorithm_1():
    grid = [line.rstrip() for line in NUMBERS["picture"] if not line.startswith("  ") or line.startswith("    ")]
    algorithm, picture = re.findall(r"^```text\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(grid) > 5 and picture.splitlines() == grid
    equations = re.findall(r"(\d+)(?:-(\d+))?$", "\n".join(re.findall(r"Eq\. ([\d-]+)", algorithm)), re.MULTILINE)
    assert [n for a, b in equations for n in range(int(a), int(b or a) + 1)] == list(range(1, 11))


def test_a_reader_can_check_himself():
    questions = re.findall(r"<details><summary>(\d+)\. .+?\?</summary>\n\n(.+?)\n</details>", PAGE, re.DOTALL)
    assert [int(number) for number, _ in questions] == list(range(1, 11))
