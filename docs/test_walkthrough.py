"""docs/walkthrough.md against bipeft.py, its tests, its figures and the run that made them.

    python -m pytest -q docs/test_walkthrough.py
"""

import functools
import json
import re
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))
import bipeft                                                                      # noqa: E402

PAGE = (DOCS / "walkthrough.md").read_text()
NUMBERS = json.loads((DOCS / "figures" / "walkthrough.json").read_text())
BY_HAND = PAGE.partition("## One trigger by hand\n")[2].partition("\n## ")[0]            # these numbers are no run's
PROSE = " ".join(re.sub(r"^```.*?^```$", "", PAGE.replace(BY_HAND, ""), flags=re.DOTALL | re.MULTILINE).split())


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
    decisions = set(re.findall(r'<a id="d(\d+)"></a>', (DOCS / "decisions.md").read_text()))
    linked = re.findall(r"\[decision (\d+)\]\(decisions\.md#d(\d+)\)", PAGE)
    assert len(linked) > 15 and all(number == anchor and number in decisions for number, anchor in linked)
    assert len(linked) == PAGE.count("](decisions.md")


def test_the_trigger_by_hand_is_what_the_equations_give():
    rows = [[cell.strip() for cell in line.split("|")[1:6]] for line in BY_HAND.splitlines() if line.startswith("| $")]
    rows = {name.strip("$"): [[Fraction(x) for x in cell.split(", ")] for cell in cells if cell]
            for name, *cells in rows}
    assert list(rows) == ["q_n", r"\mathrm{softmax}(\Phi_j)", r"\mathrm{softmax}(\Phi_t)", "C_n", "p_n", "p_n C_n",
                          r"\bar s_n", r"\sigma_n", r"\mathrm{KL}_n", r"\lambda_n", "v_{z-1}", "v_z"]
    q, then, now, sizes, p, pc, smoothed, *_ = tables = [
        torch.tensor([[float(x) for x in cell] for cell in row], dtype=torch.float64) for row in rows.values()]
    size, p, smoothed, none = sizes[:, 0], p[:, 0], smoothed[:, 0], torch.full((1, 2), 0.5)      # D has no rank
    then, now, kept, choice = torch.cat([then, none]), torch.cat([now, none]), torch.ones(4).bool(), torch.ones(4).long()
    fixed, ranked, dim = torch.tensor([0, 0, 0, 1]).bool(), torch.tensor([1, 1, 1, 0]).bool(), torch.tensor([1, 2])

    assert torch.allclose(bipeft.expected_size(now.log(), q, fixed, choice), size)
    expected = bipeft.expected_parameters(p, size)
    reduction = bipeft.expected_reduction(expected, 36, 2, 0)
    assert torch.equal(p * size, pc[:, 0]) and f"= {expected:.0f}." in BY_HAND and f"= {reduction:.0f}." in BY_HAND
    removed = bipeft.modules_to_remove(smoothed, p, size, kept, reduction)
    assert removed.tolist() == [False, False, False, True]

    instability = bipeft.rank_instability(torch.stack([then, now]))
    sigma, divergence = (then - now).abs()[:3, 0] / 2, (then * (then / now).log()).sum(1)[:3]
    assert torch.allclose(tables[7][:, 0], sigma) and torch.allclose(sigma * divergence, instability[:3])
    for name, exact in ((r"\mathrm{KL}_n", divergence), (r"\lambda_n", instability)):
        cells = next(line for line in BY_HAND.splitlines() if line.startswith(f"| ${name}$")).split("|")[2:5]
        assert [f"{x:.{len(cell.strip()) - 2}f}" for x, cell in zip(exact, cells)] == [cell.strip() for cell in cells]
    v_before, v = (bipeft.potential_ranks(phi.log(), dim, kept & ranked & ~removed, fixed, choice) for phi in (then, now))
    assert [v_before.tolist(), v.tolist()] == [tables[10][:, 0].tolist(), tables[11][:, 0].tolist()]
    cosine = float(torch.nn.functional.cosine_similarity(v_before, v, 0))
    assert f"= {cosine:.3f}." in BY_HAND and f"⌊{3 * cosine / 2:.2f}⌋" in BY_HAND
    quota = bipeft.rank_quota(v_before, v, fixed | removed, 2)
    assert quota == 1 and bipeft.ranks_to_fix(instability, fixed | removed, quota).tolist() == [False, True, False, False]


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
    lines = [line.rstrip() for line in NUMBERS["picture"]]
    rows = lines[:next(i for i, line in enumerate(lines) if "a number:" in line)]
    kept = [line for line in rows if re.search(r"  (\d|x)\b", line)]                  # others are left out
    algorithm, picture = re.findall(r"^```text\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(kept) > 5 and picture.splitlines() == kept
    equations = re.findall(r"(\d+)(?:-(\d+))?$", "\n".join(re.findall(r"Eq\. ([\d-]+)", algorithm)), re.MULTILINE)
    assert [n for a, b in equations for n in range(int(a), int(b or a) + 1)] == list(range(1, 11))


def test_a_reader_can_check_himself():
    questions = re.findall(r"<details><summary>(\d+)\. .+?\?</summary>\n\n(.+?)\n</details>", PAGE, re.DOTALL)
    assert [int(number) for number, _ in questions] == list(range(1, 11))
