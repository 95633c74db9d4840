"""Each method of the comparison, and what they stand on, on a tiny random encoder.

    python -m pytest docs/experiments/test_methods.py
"""

import importlib.util
import itertools

import pytest
import torch

import bayes
import methods
from bench import SMALL, Bench, Settings, Supernet, bipeft


@pytest.fixture(scope="module")
def bench():
    made = Bench(Settings(**{**SMALL, "surrogate": "own"}))
    made.open("toy", 0)
    return made


def test_splits_share_no_row_and_searches_see_two_halves(bench):
    bench.open("toy", 0)
    parts = [[tuple(ids) for ids, _ in rows] for rows in bench.splits.values()]
    assert all(not set(a) & set(b) for a, b in itertools.combinations(parts, 2))
    assert sum(map(len, parts)) == 400
    with Supernet(bench, "s2") as net:
        seen = [{tuple(row[mask.bool()].tolist()) for batch in half for row, mask in zip(
            batch["input_ids"], batch["attention_mask"])} for half in net.batches]
    assert not seen[0] & seen[1] and seen[0] | seen[1] == set(parts[list(bench.splits).index("train")])


@pytest.mark.parametrize("finder", methods.FINDERS)
def test_a_method_keeps_the_budget_and_leaves_the_encoder_as_it_was(bench, finder):
    bench.open("toy", 0)
    batch = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.long)
    with torch.no_grad():
        before = bench.model(*batch).logits
    for name, (structure, _) in methods.find(bench, finder, 600).items():
        method = methods.METHODS[name]
        assert method.finder == finder
        assert method.free or 0 < structure.parameters <= 600
        assert bench.decode(bench.encode(structure), 600).modules == structure.modules
        assert finder == "whole" or bench.passes or method.cheap
    bench.open("toy", 0)                                               # a fresh head of the same seed
    with torch.no_grad():
        assert torch.equal(bench.model(*batch).logits, before)


@pytest.mark.parametrize("finder", ["bipeft", "lora", "chance", "whole", "full", "s3delta", "prunepeft"])
def test_a_t5_that_answers_with_a_token(finder):
    t5 = Bench(Settings(**{**SMALL, "family": "t5"}))
    t5.open("toy", 0)
    for name, (structure, _) in methods.find(t5, finder, 600).items():
        method = methods.METHODS[name]
        assert method.free or 0 < structure.parameters <= 600
        peft, best, _ = t5.train(structure, 1e-3, method.whole)
        assert 0 <= best <= 100 and (peft.size == structure.parameters or method.free)
        peft.detach()


def test_matched_structures_have_the_same_kinds_ranks_and_sizes(bench):
    bench.open("toy", 3)
    found = methods.find(bench, "bipeft", 600)
    alike = [sorted((m["kind"], m["rank"] or 0, m["parameters"]) for m in found[name][0].modules)
             for name in ("BIPEFT", "matched random")]
    assert alike[0] == alike[1]


def test_pruning_takes_a_later_slice_only_after_the_earlier():
    sizes = torch.tensor([[2, 6, 8], [2, 6, 8], [4, 0, 0]])
    scores = torch.tensor([[1.0, 60.0, 8.0], [6.0, 6.0, 0.0], [2.0, 0.0, 0.0]])
    # Densities .5 10 1, 3 1, .5: module 1's first two slices (8), then module 0's first (10), its second does
    # not fit 14 and closes it, module 2 (14).
    assert methods.prune(scores, sizes, torch.tensor([3, 3, 3]), 14).tolist() == [1, 2, 1]


def test_shifted_gates_expect_the_budget_and_have_the_stated_gradient():
    alpha = torch.randn(5, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([3.0, 5, 8, 2, 9], dtype=torch.float64)
    p = methods.shifted(alpha, sizes, 11)
    assert float((p.detach() * sizes).sum()) == pytest.approx(11)
    g = (p * (1 - p)).detach()
    stated = torch.diag(g) - p.detach()[:, None] * g / p.sum().detach()
    jacobian = torch.stack([torch.autograd.grad(p[i], alpha, retain_graph=True)[0] for i in range(5)])
    torch.testing.assert_close(jacobian, stated)


def test_the_gradient_through_a_step_by_hand():
    # L_tra = a w^2 / 2 and L_val = w^2 / 2, at w = 3, a = 0.5, lr = 0.2: w' = 3 - 0.2 · 1.5 = 2.7 = d, and
    # dL_val(w')/da = w' · dw'/da = 2.7 · (-0.2 · 3) = -1.62. dL_tra/da is w^2 / 2.
    w, d, lr, eps = 3.0, 2.7, 0.2, 1e-3
    plus, minus = (w + eps * d) ** 2 / 2, (w - eps * d) ** 2 / 2
    assert methods.through_the_step(0.0, plus, minus, lr, eps) == pytest.approx(-1.62)


def test_autopeft_trains_its_finalists_at_the_rate_of_s1_and_takes_the_best(bench, monkeypatch):
    bench.open("toy", 0)
    short, full, train = [], [], bench.train

    def note(structure, lr):
        full.append((lr, structure.modules))
        return train(structure, lr)[0], float(len(full) == 2), None                       # the second is the best
    monkeypatch.setattr(bench.settings, "bo_full", 3)
    monkeypatch.setattr(bench, "train", note)
    descend = Supernet.descend
    monkeypatch.setattr(Supernet, "descend", lambda net, *args: (short.append(net.lr), descend(net, *args)))
    found, told = methods.find(bench, "autopeft", 600)["AutoPEFT"]
    assert [lr for lr, _ in full] == [methods.S1_RATE] * 3 and set(short) == {methods.INNER_RATE}
    assert found.modules == full[1][1] and told["evaluations"] == 5


@pytest.mark.parametrize("surrogate", ["own"] + ["botorch"] * bool(importlib.util.find_spec("botorch")))
def test_the_surrogate_climbs(surrogate):
    every = [(a, b) for a in range(6) for b in range(6)]
    score = {c: -(c[0] - 4) ** 2 - 0.1 * (c[1] - 1) ** 2 for c in every}
    tried = every[::5]
    for _ in range(2):
        left = [c for c in every if c not in tried]
        tried = tried + bayes.propose(tried, [score[c] for c in tried], left, 4, surrogate)
    assert len(set(tried)) == len(tried) and max(map(score.get, tried)) >= -0.1


def test_each_variant_of_the_search(bench):
    for name in methods.VARIANTS:
        bench.open("toy", 0)
        ((structure, _),) = methods.find(bench, f"variant:{name}", 600).values()
        assert 0 < structure.parameters <= 600


def test_sensitivity_with_open_gates_leaves_the_descent_as_it_was(bench):
    """After one step Delta W is that of a plain search: only s comes from other passes."""
    weights, nothing = [], []
    for cls in (bipeft.Search, methods.OpenSensitivity):
        bench.open("toy", 0)
        with Supernet(bench, "s2") as net:
            settings = bipeft.Settings(budget=600, lr=1e-2)
            run = cls(bench.model, net.space, settings, 9, 9, net.run_pass)
            for _ in range(2):                                             # before the first all act as zero
                before = run.smoothed
                run.step(next(net.train), next(net.val), next(net.val))
                weights.append(net.weights())
            nothing.append(int(torch.isclose(run.smoothed, 0.85 * before).sum()))       # s = 0: shut, in a plain one
    torch.testing.assert_close(weights[0], weights[2])
    assert nothing[0] > nothing[1]


def test_lora_at_scale_16_adds_sixteen_times_as_much():
    module = bipeft.LoRA(torch.nn.Linear(4, 3), 2)
    torch.nn.init.ones_(module.B)
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    plain = module(x, y) - y
    with methods.scaled_lora(methods.SCALES["variant:LoRA scale 16"]):
        torch.testing.assert_close(module(x, y) - y, 16 * plain)
    torch.testing.assert_close(module(x, y) - y, plain)
