"""The report's statistics by hand, and the report of lines made up here."""

import itertools
import re

import numpy as np
import pytest

import compare
import harness
import report_figures as figures
import report
import stats
from baselines import METHODS, RATES, RETRAINING

PLACES = ["embeddings.LayerNorm.bitfit", "embeddings.LayerNorm.lnfit"] + [
    f"encoder.layer.{i}.attention.self.query.{kind}" for i in range(2) for kind in ("lora", "bitfit")]


def line(method, task, seed, lr, test, budget=10_000, source=None, **more):
    """A training's."""
    return {"stage": "train", "method": method, "task": task, "budget": budget, "seed": seed,
            "source": source, "lr": lr, "tuning": test is None, "test": test, "validation": 70.0,
            "passes": 600, "parameters": 22_565_376 if method == "full" else budget - 9, "modules": 12, "seconds": 10.0,
            "workers": 13, **more}


def find(method, task, seed, budget=10_000, structure="0:1 3:1", **more):
    """A search's."""
    return {"stage": "find", "finder": METHODS[method].finder, "method": method, "task": task,
            "budget": budget, "seed": seed, "structure": structure, "passes": 1200, "parameters": budget - 9,
            "seconds": 20.0, "workers": 13, **more}


def test_sign_flip_and_holm_by_hand():
    # Of the 8 sign vectors only +++ and --- reach |1 + 2 + 3|.
    assert stats.sign_flip([1, 2, 3]) == 2 / 8
    # Sums of (1, 1, -1): +-3 twice, +-1 six times, and all reach |1|.
    assert stats.sign_flip([1, 1, -1]) == 1
    # 3 · 0.01, then 2 · 0.03, then 0.04 is not below the one before.
    adjusted = stats.holm({"a": 0.04, "b": 0.01, "c": 0.03})
    assert adjusted == pytest.approx({"b": 0.03, "c": 0.06, "a": 0.06})


def test_sign_flip_against_all_sign_vectors():
    # Of 30 equal differences the sum of the signs reaches 30 in 2 of 2^30; 0 is reached by all.
    assert stats.sign_flip([1.0] * 30) == 2 / 2**30 and stats.sign_flip([1.0, -1.0] * 4) == 1
    rng = np.random.default_rng(0)
    tenths = rng.integers(-9, 10, 12)                                   # ties are ties, too, where tenths round
    for differences in (tenths, tenths / 10, rng.normal(0.3, 1, 11)):
        sums = [np.dot(signs, differences) for signs in itertools.product((1, -1), repeat=len(differences))]
        assert stats.sign_flip(differences) == np.mean(np.abs(sums) >= abs(differences.sum()) - 1e-9)


def test_contrasts_by_hand():
    x, y, z, w = ("qnli", 0), ("mnli", 0), ("qnli", 1), ("mnli", 1)
    base = {x: 5.0, y: 7.0, z: 9.0}
    found = stats.contrasts(base, {"a": {x: 4.0, y: 5.0, z: 6.0, w: 0.0}, "b": {x: 6.0, y: 6.0}, "c": {x: 1.0}})
    # a: 1, 2, 3; b: -1, 1, whose 4 sign vectors all reach |0|; c has one pair: none.
    assert list(found) == ["a", "b"] and found["a"].pairs == {x: 1, y: 2, z: 3}
    # The seeds' means are 1.5 and 3, of standard deviation 1.06, over the root of 2: 0.75, times 12.706.
    assert found["a"].mean_of_seeds == 2.25 and found["a"].half_of_seeds == pytest.approx(12.706 * 0.75, rel=1e-4)
    assert np.isnan(found["b"].half_of_seeds)                                               # one seed
    assert (found["a"].mean, found["a"].p, found["a"].holm, found["a"].above) == (2, 0.25, 0.5, 3)
    assert (found["b"].mean, found["b"].p, found["b"].holm, found["b"].above) == (0, 1, 1, 1)
    # A seed with two of a task is one seed: means 2 and 4, as far from 3 as 12.706 · 1.414 / 1.414.
    two = {("qnli", 0, "mnli"): 1.0, ("qnli", 0, "sst2"): 3.0, ("qnli", 1, "mnli"): 4.0}
    found = stats.contrasts(two, {"a": dict.fromkeys(two, 0.0)})["a"]
    assert found.half_of_seeds == pytest.approx(12.706, rel=1e-4)


def test_jaccard_by_hand():
    assert stats.jaccard({1, 2, 3}, {2, 3, 4, 5}) == 2 / 5 and stats.jaccard(set(), set()) == 1
    # 4 of 20 and 5 of 20: one shared is expected, 1 / (4 + 5 - 1).
    assert stats.jaccard_by_chance({1, 2, 3, 4}, {1, 2, 3, 4, 5}, 20) == 1 / 8


def test_reported_are_the_trainings_at_the_chosen_rate():
    tuned = [line("LoRA", "qnli", 100, lr, None, validation=v) for lr, v in zip(RATES[1:], (70, 75, 71))]
    scores = (0, RATES[1], 60.0), (0, RATES[2], 62.0), (900, RATES[2], 99.0)
    lines = tuned + [line("LoRA", "qnli", *score) for score in scores]
    data = report.Data(lines)
    assert data.scores(["LoRA"]) == {"LoRA": {("qnli", 0): 62.0}} and len(data.scored) == 2
    assert "**0.0025: 75.0**" in report.rates(data) and "highest" not in report.rates(data)
    tuned[2]["validation"] = 80                                          # at the edge: a further one is needed
    assert "| – |" in report.rates(report.Data(tuned))
    more = [line("LoRA", "qnli", 100, lr, None, validation=v) for lr, v in zip(RATES[4:], (81, 82))]
    assert "| 0.04 | highest |" in report.rates(report.Data(tuned + more))               # the ladder's end


def test_tables_by_hand():
    lines = [{"stage": "places", "places": PLACES}]
    for seed, ours, theirs, moved in ((0, 80.0, 79.0, 78.0), (1, 84.0, 81.0, 82.0)):
        lines += [line("BIPEFT", "qnli", seed, 1e-3, ours), line("LoRA", "qnli", seed, 1e-3, theirs),
                  line("BIPEFT", "qnli", seed, 1e-3, moved, source="sst2"), find("BIPEFT", "qnli", seed)]
    lines += [line("BIPEFT", "sst2", seed, 1e-3, 90.0) for seed in (0, 1)]
    lines += [line("random", *cell, 1e-3, 70.0) for cell in (("qnli", 0), ("qnli", 1), ("sst2", 0))]
    data = report.Data(lines)
    # sd of 80 and 84 is 2.83; 1,200 passes of a search over 600.
    told = report.score_table(data, ["BIPEFT"])
    assert "| BIPEFT | 82.0 ± 2.8 | 90.0 ± 0.0 | 86.0 | 9,991 | 12.0 | 2.00 | 4 |" in told
    # LoRA has no training on sst2, and so no mean.
    told = report.score_table(data, ["BIPEFT", "LoRA", "random"])
    assert "| BIPEFT | 82.0 ± 2.8 | 90.0 ± 0.0 | 86.0 |" in told and "| LoRA | 80.0 ± 1.4 | – | – |" in told
    # 1 and 3: mean 2, 12.706 · 1.414 / 1.414 to each side; 2 of 4 sign vectors.
    told = report.contrast_table(data.contrasts(["LoRA"]), data.tasks)
    assert "| LoRA | +2.00 | +2.00 | −10.71 to +14.71 | +2.00 [−10.71, +14.71] | 2 of 2 | 0.5 | 0.5 |" in told
    # Seed 1 of random lacks sst2: 80 - 70 and 90 - 70 alone are pairs.
    assert data.contrasts(["random"])["random"].pairs == {("qnli", 0): 10.0, ("sst2", 0): 20.0}
    # 80 - 78 and 84 - 82: what was found on qnli itself is better.
    assert "| sst2 | +2.00 | +2.00 | +2.00 to +2.00 | +2.00 [+2.00, +2.00] | 2 of 2 | 0.5 | 0.5 |" in report.transfer(data)


def test_failed_trainings_are_named_and_left_out_of_pairs_of_their_own():
    # LoRA's 55 on qnli is 5 above chance, 50: it failed; 55.1 has not. BIPEFT has 72 three times.
    lines = [line("BIPEFT", "qnli", seed, 1e-3, 72.0) for seed in range(3)]
    lines += [line("LoRA", "qnli", *cell) for cell in ((0, 1e-3, 70.0), (1, 1e-3, 71.0), (2, 1e-3, 55.0))]
    lines += [line("random", "qnli", *cell) for cell in ((0, 1e-3, 70.0), (1, 1e-3, 70.0), (2, 1e-3, 55.1))]
    data = report.Data(lines)
    assert data.failed(METHODS) == {"LoRA": {("qnli", 2): 55.0}}
    before, _, whole = "\n".join(report.table_1(data, 10_000)).partition("### Pairs without failed trainings")
    assert "end: LoRA on qnli, seed 2 (55.0)." in whole
    assert "| LoRA | +6.67 | +6.67 |" in before and "| LoRA | +1.50 | +1.50 |" in whole      # 2, 1, 17; 2 and 1
    assert "| random | +6.97 |" in before and "| random | +6.97 |" in whole


def test_the_clipped_search_has_pairs_of_its_own_also_without_bad_cells():
    better, lines = {("mnli", 3): 20, ("mnli", 6): 1, ("qnli", 2): 3}, []
    for cell in itertools.product(("mnli", "qnli"), (2, 3, 6)):
        lines += [line("BIPEFT, clipped", *cell, 1e-3, 70), line("BIPEFT", *cell, 1e-3, 70 - better.get(cell, 2))]
    told = "\n".join(report.table_1(report.Data(lines), 10_000))
    _, every, fewer = re.split("### Pairs of the clipped search.*", told)
    assert "| BIPEFT | +7.67 | +2.33 | +5.00 |" in every and "| BIPEFT | +2.00 | +2.00 | +2.00 |" in fewer


def test_clipped_trainings_are_beside_their_own_and_boolq_is_beside_no_other_task():
    lines = []
    for seed, plain, clipped in ((0, 52.0, 80.0), (1, 81.0, 81.5), (2, 80.0, 54.5), (3, 80.0, 81.5)):
        lines += [line("LoRA", "qnli", seed, 1e-3, plain), line("LoRA, training clipped", "qnli", seed, 1e-3, clipped),
                  line("LoRA", "boolq", seed, 1e-3, 64)]
    lines += [line("LoRA", "qnli", seed, 3e-3, 60.0) for seed in range(2)]              # a rate that is not chosen
    lines += [line("LoRA", "qnli", 0, 3e-3, 1.0, source="cola")]                        # another structure
    lines += [line("LoRA, rising rate", "qnli", seed, 3e-3, 62.0 + seed) for seed in range(2)]
    told = " ".join(report.report(lines).partition("## Other ways of re-training")[2].split())
    # 28, −25.5, 0.5 and 1.5, of which the last two have no failed one; 2 and 3.
    assert re.search(r"LoRA, training clipped \| 10,000 \| 0.001 \| 1 \| 1 \| \+1.12 .* \| \+1.00 \[[^|]*\| 2 \|", told)
    assert "| LoRA, rising rate | 10,000 | 0.003 | 0 | 0 | +2.50 [−3.85, +8.85] | 2 of 2 |" in told
    assert "| LoRA | 64.0 ± 0.0 | 64.0 |" in told
    assert report.Data(lines).scores(["LoRA"])["LoRA"].keys() == {("qnli", seed) for seed in range(4)}


def test_larger_budgets_and_more_seeds_have_tables_of_their_own():
    lines = [line(name, "qnli", seed, 1e-3, 70.0 + seed) for name, seeds in (
        ("BIPEFT", 3), ("LoRA", 3), ("random", 2), ("BitFit", 2), ("LNFit", 2)) for seed in range(seeds)]
    lines += [line(name, "qnli", seed, 1e-3, 60.0, 20_000) for name in ("BIPEFT", "random") for seed in range(2)]
    told = report.report(lines)
    first, more = told.partition("### Pairs")[0].split("### Scores of the methods with the most seeds")
    assert "| BIPEFT | 70.5 ± 0.7 |" in first and "| BIPEFT | 71.0 ± 1.0 |" in more and "| BitFit |" not in more
    assert "| random, 20,000 | +10.50 |" in told and "most seeds" not in told.partition("at 20,000 parameters")[2]
    assert "no data yet" in told and "nan" not in told


def test_cost_is_of_what_ran_alone():
    timed = [find("BIPEFT", "qnli", 900, workers=1, seconds=30.0), find("BIPEFT", "qnli", 900, seconds=99.0),
             line("BIPEFT", "qnli", 900, 1e-3, 70.0, workers=1, seconds=20.0, memory=650),
             line("LoRA", "qnli", 900, 1e-3, 70.0, workers=1, seconds=12.0)]
    timed.insert(0, find("BIPEFT", "qnli", 900, workers=1, seconds=60.0))                  # was run again since
    told = report.cost(report.Data(timed))
    assert "| BIPEFT | search | 30.00 | 1.50 | 2.50 | 1,200 | – |" in told
    assert "| BIPEFT | training | 20.00 | 1.00 | 1.67 | 600 | 650 |" in told


def test_clipped_trainings_run_on_their_own_structures_and_are_reported(tmp_path, capsys, monkeypatch):
    ways, shares, train, inner = [], [], harness.Bench.train, harness.bipeft.train
    monkeypatch.setattr(harness.Bench, "train", lambda *given: ways.append(given[4]) or train(*given))
    monkeypatch.setattr(harness.bipeft, "train", lambda *a, **k: shares.append(k["lr_warmup"]) or inner(*a, **k))
    out, asked = tmp_path / "lines.jsonl", ["BIPEFT", "LoRA", "BIPEFT, clipped", *RETRAINING]
    compare.main(["--small", "--out", str(out), "--table", "main", "retraining", "--lr", "1e-3", "--methods", *asked])
    trained = [x for x in compare.read(out) if x["stage"] == "train" and "error" not in x]
    assert len(trained) == 2 * len(asked) and ways.count(1.0) == shares.count(0.1) == len(RETRAINING)
    capsys.readouterr()
    report.main(["--lines", str(out), "--beside", str(out), "--figures", str(tmp_path)])
    told = capsys.readouterr().out
    assert "## Table 1: test scores at 600 parameters" in told and "no data yet" in told and "nan" not in told
    assert "| LoRA, training clipped | " in told and (tmp_path / "compare-ratios.png").exists()


def test_what_is_not_under_the_budget_is_a_family_of_its_own():
    lines = [line(name, "qnli", seed, 1e-3, score + seed * add) for name, score, add in (
        ("BIPEFT", 80.0, 1.0), ("LoRA", 79.0, 0.9), ("random", 78.0, 0.8), ("full", 70.0, 0.7)) for seed in range(6)]
    found = report.Data(lines).contrasts(["LoRA", "random", "full"])
    # Each has p = 2/64. Two are corrected for each other, the third for nothing.
    assert {name: c.holm for name, c in found.items()} == {"LoRA": 4 / 64, "random": 4 / 64, "full": 2 / 64}


TABLES = {"compare_tables.md": "compare.jsonl", "compare_smollm2_tables.md": "compare_smollm2.jsonl"}


@pytest.mark.parametrize("page, lines", TABLES.items())
def test_the_pages_of_all_tables_are_what_the_report_prints(page, lines, tmp_path, capsys):
    report.main(["--lines", str(report.HERE / "results" / lines), "--figures", str(tmp_path)])
    told = capsys.readouterr().out
    head, _, rest = (report.HERE / page).read_text().partition("\n## ")
    assert "report.py" in head and f"## {rest}".strip() == told.strip()
    if page == "compare_tables.md":
        assert {path.name for path in tmp_path.iterdir()} == {f"compare-{name}.png" for name in figures.FIGURES}


def rows_of(text):
    """The tables' rows of a page, as lists of cells."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def unknown_numbers(text):
    """What a page says that stands in no row of TABLES: deviations, intervals, and numbers beside a method's name."""
    known = [row for page in TABLES for row in rows_of((report.HERE / page).read_text())]
    of = {name: set(re.findall(NUMBER, str([row for row in known if name in row[:2]]))) for name in METHODS}
    cells = {cell for row in known for cell in row}
    unknown = [found for found in re.findall(r"\d+\.\d ± \d+\.\d", text) if found not in cells]
    for mean, low, high in re.findall(r"([+−][\d.]+)\s\[([+−][\d.]+),\s([+−][\d.]+)\]", text):
        turned = f"{mean} [{high}, {low}]".translate(str.maketrans("+−", "−+"))         # the other less it
        unknown += [f"{mean} [{low}, {high}]"] if not {f"{mean} [{low}, {high}]", turned} & cells else []
    for name, *rest in rows_of(text):
        if name in of:
            unknown += [f"{name}: {number}" for number in re.findall(NUMBER, str(rest)) if number not in of[name]]
    return unknown


NUMBER = r"[+−]?\d+\.\d+"


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_what_the_pages_say_stands_in_the_tables(page):
    assert unknown_numbers((report.HERE.parents[2] / page).read_text()) == []
