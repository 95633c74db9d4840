"""The walk's figures at a small size: all come out, and what is drawn is the program's own search."""

import copy
import json

import numpy as np
import pytest

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
        assert bipeft.main(["--task", "toy", "--out", str(run), *LINE]) == 0
        patch.setattr(figures, "RESULTS", run.rename(run.parent / "smollm2_search").parent)   # as the recorded run
        record = figures.main(["--out", str(out), *LINE])
    return record, out, run.parent / "smollm2_search"


def test_the_pictures_and_the_numbers_come_out(drawn):
    record, out, _ = drawn
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [f"{name}.png" for name in (*figures.FIGURES, "smollm2-search")] + ["search.gif", "walkthrough.json"])
    with figures.Image.open(out / "search.gif") as gif:
        assert gif.n_frames == 1 + len(record.fired) + 1
    for name in figures.FIGURES:
        with figures.Image.open(out / f"{name}.png") as image:
            assert image.width == round(160 * figures.WIDTH) and len(image.convert("L").getcolors()) > 5
    numbers = json.loads((out / "walkthrough.json").read_text())
    assert numbers["facts"] == figures.facts(record) and "seed 3" in numbers["facts"][0]
    assert numbers["recorded"][-1].split(", with ")[1] in numbers["facts"][-1]            # of one and the same search


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
    T, N = record.T, record.N
    assert record.smoothed.shape == record.indicator.shape == record.fixed.shape == (T, N)
    assert record.kept.shape == (T + 1, N) and len(record.passes) == T and len(record.fired) == 5
    # After the last trigger p is 1 and every rank is fixed: E is the real size, which is then mended to fit B.
    real = record.sizes[np.arange(N), record.choice[-1]][record.kept[-1]].sum()
    assert record.after[-1] == real
    assert sum(m["parameters"] for m in record.structure.modules) <= record.budget
    # A pass 1 gives a gradient to open modules alone, a pass 2 to shut ones, too.
    for passes in record.passes[5:]:
        assert not (passes[0]["felt"] & ~passes[0]["gate"]).any() and (passes[1]["felt"] & ~passes[1]["gate"]).any()
