"""The walk's figures at a small size: all come out, and what is drawn is the program's own search.

    python -m pytest docs/experiments/test_figures.py         skipped without matplotlib
"""

import copy
import json

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
import figures                                                                     # noqa: E402
from figures import bipeft                                                         # noqa: E402

LINE = "--seed 3 --search-epochs 2 --warmup-epochs 1 --epochs 1 --triggers 5 --tau 0.3".split()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(Record, folder of the figures, folder of the program's run), of one toy, smaller than the real one."""
    toy = bipeft.toy_backbone(3, steps=25)
    splits = {key: rows[:count] for (key, rows), count in zip(bipeft.toy_splits(3).items(), (512, 20, 20))}
    out, run = tmp_path_factory.mktemp("figures"), tmp_path_factory.mktemp("run") / "toy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bipeft, "toy_splits", lambda seed: splits)
        patch.setattr(bipeft, "toy_backbone", lambda seed: copy.deepcopy(toy))
        record = figures.main(["--out", str(out), *LINE])
        assert bipeft.main(["--task", "toy", "--out", str(run), *LINE]) == 0
    return record, out, run


def test_the_eight_pictures_and_the_numbers_come_out(drawn):
    record, out, _ = drawn
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [f"{name}.png" for name in figures.FIGURES] + ["search.gif", "walkthrough.json"])
    with figures.Image.open(out / "search.gif") as gif:
        assert gif.n_frames == 4 + len(record.fired) + 1
    for name in figures.FIGURES:
        with figures.Image.open(out / f"{name}.png") as image:
            assert image.width == round(160 * figures.WIDTH) and len(image.convert("L").getcolors()) > 5
    numbers = json.loads((out / "walkthrough.json").read_text())
    assert numbers["facts"] == figures.facts(record) and "seed 3" in numbers["facts"][0]


def test_the_search_is_the_programs(drawn):
    record, _, run = drawn
    assert bipeft.load_structure(run / "structure.json") == record.structure
    lines = [json.loads(line) for line in (run / "search.jsonl").read_text().splitlines()]
    assert len(lines) == record.T
    for key in ("beta", "expected"):
        assert [line[key] for line in lines] == getattr(record, key).tolist()
    assert [line["kept"] for line in lines] == record.kept[1:].sum(1).tolist()
    assert [line["step"] for line in lines if line["reduction"] is not None] == record.fired.tolist()


def test_what_is_drawn_is_what_the_search_held(drawn):
    record, _, _ = drawn
    T, N, K = record.T, record.N, len(record.ranks)
    assert record.smoothed.shape == record.indicator.shape == record.fixed.shape == (T, N)
    assert record.kept.shape == (T + 1, N) and record.phi.shape == (T + 1, N, K)
    assert len(record.passes) == len(record.taken) == T and 1 < len(record.fired) <= 5
    # After the last trigger p is 1 and every rank is fixed: E is the real size, which is then mended to fit B.
    real = record.sizes[np.arange(N), record.choice[-1]][record.kept[-1]].sum()
    assert len(record.fired) == 5 and record.after[-1] == real
    assert sum(m["parameters"] for m in record.structure.modules) <= record.budget
    # A pass 1 gives a gradient to open modules alone, a pass 2 to shut ones, too; a pass reads its own batch.
    for passes, taken in zip(record.passes[5:], record.taken[5:]):
        assert not (passes[0]["felt"] & ~passes[0]["gate"]).any() and (passes[1]["felt"] & ~passes[1]["gate"]).any()
        assert len(set(taken[1:])) == 2
    first = [taken[0] for taken in record.taken]
    assert first == [divmod(t, record.batches) for t in range(T)]
    assert [two for taken in record.taken for two in taken[1:]] == [divmod(t, record.batches) for t in range(2 * T)]


def test_weights_in_use_are_the_leading_rows(drawn):
    record, _, _ = drawn
    n = record.kinds.index("lora")
    for first, *_ in record.passes:
        rows = record.ranks[first["rank"][n]] if first["gate"][n] else 0
        assert np.array_equal(first["used"][0], first["stored"][0])
        assert np.array_equal(first["used"][1][:rows], first["stored"][1][:rows]) and not first["used"][1][rows:].any()


def test_lambda_as_drawn_is_what_the_triggers_went_by(drawn):
    record, _, _ = drawn
    fixed_some = 0
    for unstable, t in zip(record.instability(), record.fired - 1):
        open_before = (~record.fixed[t - 1] if t else record.ranked) & record.kept[t + 1]
        settled = open_before & record.fixed[t]
        fixed_some += settled.sum()
        if settled.any() and (open_before & ~settled).any():
            assert unstable[settled].max() <= unstable[open_before & ~settled].min()
    assert fixed_some


def test_the_sizes_and_the_quota_of_the_numbers_are_those_of_the_search(drawn):
    record, _, _ = drawn
    for t in range(1, int(record.fired[-1])):                           # the last one counts p as 1
        kept = record.kept[t - 1] * record.theta[t - 1]
        assert (kept * record.before(t)[2]).sum() == pytest.approx(record.expected[t - 1], rel=1e-6)
    last, late = record.before(record.fired[-1])[2], record.kept[-2]
    assert last[late].sum() == pytest.approx(record.expected[-1])
    v, quotas = None, []
    for z, t in enumerate([0, *record.fired]):
        fixed, choice = record.before(t)[:2] if t else record.before(1)[:2]
        fixed = torch.tensor(fixed | ~record.kept[t])
        phi, dim, kept, choice = map(torch.tensor, (record.phi[t], record.ranks, record.kept[t] & record.ranked, choice))
        before, v = v, bipeft.potential_ranks(phi, dim, kept, fixed, choice)
        quotas += [int(bipeft.rank_quota(before, v, fixed, 5 - z + 1))] if t else []
    *counts, last = record.open_ranks()
    assert [fixed for _, fixed in counts] == quotas[:-1] and last[0] == last[1]       # at last all that are open


def test_what_the_repair_changed_is_marked(drawn):
    record, _, _ = drawn
    held = {name: record.ranks[k] if ranked else "x" for name, k, ranked, kept in zip(
        record.names, record.choice[-1], record.ranked, record.kept[-1]) if kept}
    assert {record.names[n] for n in record.changed} == {
        name for name, rank in record.found.items() if held.get(name) != rank}
