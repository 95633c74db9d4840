"""The comparison's harness with each method on a tiny random encoder.

    python -m pytest docs/experiments/test_compare.py
"""

import argparse
import collections
import importlib.util
import itertools
import json

import numpy as np
import pytest
import torch

import bayes
import compare

NO_PEFT = not importlib.util.find_spec("peft")


@pytest.fixture(scope="module")
def bench():
    made = compare.Bench(compare.Settings(**{**compare.SMALL, "surrogate": "own"}))
    made.open("toy", 0)
    return made


@pytest.mark.parametrize("finder", compare.FINDERS)
def test_a_method_keeps_the_budget_and_leaves_the_encoder_as_it_was(bench, finder):
    bench.open("toy", 0)
    batch = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.long)
    with torch.no_grad():
        before = bench.model(*batch).logits
    for name, (structure, _) in compare.find(bench, finder, 600).items():
        method = compare.METHODS[name]
        assert method.finder == finder
        assert method.free or 0 < structure.parameters <= 600
        assert bench.decode(bench.encode(structure), 600).modules == structure.modules
        assert finder == "whole" or bench.passes or method.cheap
    bench.open("toy", 0)                                               # a fresh head of the same seed
    with torch.no_grad():
        assert torch.equal(bench.model(*batch).logits, before)


def test_each_variant_of_the_search(bench):
    for name in compare.VARIANTS:
        bench.open("toy", 0)
        ((structure, _),) = compare.find(bench, f"variant:{name}", 600).values()
        assert 0 < structure.parameters <= 600


@pytest.mark.parametrize("finder", ["bipeft", "lora", "chance", "whole", "full", "s3delta", "prunepeft"])
def test_a_t5_that_answers_with_a_token(finder):
    t5 = compare.Bench(compare.Settings(**{**compare.SMALL, "family": "t5"}))
    t5.open("toy", 0)
    for name, (structure, _) in compare.find(t5, finder, 600).items():
        method = compare.METHODS[name]
        assert method.free or 0 < structure.parameters <= 600
        peft, best, _ = t5.train(structure, 1e-3, method.whole)
        assert 0 <= best <= 100 and (peft.size == structure.parameters or method.free)
        peft.detach()


def test_sensitivity_with_open_gates_leaves_the_descent_as_it_was(bench):
    """After one step Delta W is that of a plain search: only s comes from other passes."""
    weights, nothing = [], []
    for cls in (compare.bipeft.Search, compare.OpenSensitivity):
        bench.open("toy", 0)
        with compare.Supernet(bench, "s2") as net:
            run = cls(bench.model, net.space, 600, 9, warmup=9, lr=1e-2, run_pass=net.run)
            for _ in range(2):                                             # before the first all act as zero
                before = run.smoothed
                run.step(next(net.train), next(net.val), next(net.val))
                weights.append(net.space.weights.clone())
            nothing.append(int(torch.isclose(run.smoothed, 0.85 * before).sum()))       # s = 0: shut, in a plain one
    torch.testing.assert_close(weights[0], weights[2])
    assert nothing[0] > nothing[1]


def plan_of(scores, **more):
    """A plan whose trainings for rates have these validation scores, {lr: score}."""
    args = argparse.Namespace(tune_seeds=[100, 101], tune_tasks=["toy"], tune_budgets=[600], lr=None)
    lines = [{"stage": "train", "method": "LoRA", "task": "toy", "budget": 600, "seed": seed, "source": None, "lr": lr,
              "validation": score + seed} for lr, score in scores.items() for seed in (100, 101)]
    wish = {"method": "LoRA", "task": "toy", "budget": 600, "seed": 0, "source": None, "tuning": False}
    return compare.Plan([wish], lines, None, args)


def test_a_ladder_of_rates_goes_on_while_the_best_is_at_an_edge():
    inner = {1e-3: 1.0, 2.5e-3: 3.0, 6e-3: 2.0}
    assert plan_of(inner).rate("LoRA", 600) == (2.5e-3, {lr: s + 100.5 for lr, s in inner.items()})
    upwards = {1e-3: 1.0, 2.5e-3: 2.0, 6e-3: 3.0}
    plan = plan_of(upwards)
    assert plan.rate("LoRA", 600)[0] is None                               # 1.5e-2 is not tried yet
    assert [(plan.next()["seed"], plan.running) for _ in range(1)][0][0] == 100
    assert {plan.next()["lr"]} == {1.5e-2} and plan.next() is None         # both seeds run: the training waits
    assert plan_of({**upwards, 1.5e-2: 2.5}).rate("LoRA", 600)[0] == 6e-3
    downwards = plan_of({4e-4: 9.0, 1e-3: 3.0, 2.5e-3: 2.0, 6e-3: 1.0})
    assert downwards.rate("LoRA", 600)[0] == 4e-4                          # the ladder's end
    job = downwards.next()
    assert (job["lr"], job["seed"], job["tuning"]) == (4e-4, 0, False) and downwards.next() is None


def test_at_another_budget_the_first_seed_chooses_the_rate_or_all():
    plan = plan_of({})
    assert [wish["seed"] for wish in plan.tuning("LoRA", 600, 1e-3)] == [100, 101]
    assert [wish["seed"] for wish in plan.tuning("LoRA", 300, 1e-3)] == [100]
    plan.args.tune_budgets.append(300)
    assert [wish["seed"] for wish in plan.tuning("LoRA", 300, 1e-3)] == [100, 101]


def test_splits_share_no_row_and_searches_see_two_halves(bench):
    bench.open("toy", 0)
    parts = [[tuple(ids) for ids, _ in rows] for rows in bench.splits.values()]
    assert all(not set(a) & set(b) for a, b in itertools.combinations(parts, 2))
    assert sum(map(len, parts)) == 400
    with compare.Supernet(bench, "s2") as net:
        seen = [{tuple(row[mask.bool()].tolist()) for batch in half for row, mask in zip(
            batch["input_ids"], batch["attention_mask"])} for half in net.batches]
    assert not seen[0] & seen[1] and seen[0] | seen[1] == set(parts[list(bench.splits).index("train")])


def test_lora_at_scale_16_adds_sixteen_times_as_much():
    module = compare.bipeft.LoRA(torch.nn.Linear(4, 3), 2)
    torch.nn.init.ones_(module.B)
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    plain = module(x, y) - y
    with compare.scaled_lora(compare.SCALES["variant:LoRA scale 16"]):
        torch.testing.assert_close(module(x, y) - y, 16 * plain)
    torch.testing.assert_close(module(x, y) - y, plain)


def test_a_rate_without_finite_numbers_is_not_chosen_and_chance_does_not_choose():
    scores = {1e-3: 1.0, 2.5e-3: 3.0, 6e-3: 2.0}
    key = compare.key_of({"stage": "train", "method": "LoRA", "task": "toy", "budget": 600, "seed": 100,
                          "source": None, "lr": 6e-3})
    plan = plan_of({lr: s for lr, s in scores.items() if lr != 6e-3})
    plan.take({"stage": "train", "key": key, "error": "OutOfMemoryError: no room"})
    assert plan.rate("LoRA", 600)[0] is None and plan.next()["lr"] == 6e-3                  # it is tried again
    plan.running.clear()
    plan.take({"stage": "train", "key": key, "error": "UsageError: the loss is not finite"})
    assert plan.judge("LoRA", 600, 6e-3) is None                                            # the other seed's is missing
    for seed in (101,):
        plan.take({"stage": "train", "key": key.replace("100", str(seed)), "error": "UsageError: not finite"})
    assert plan.rate("LoRA", 600)[0] == 2.5e-3 and plan.judge("LoRA", 600, 6e-3) == -100
    assert plan.rate("random, best of 3", 600) == plan.rate("random", 600)


def test_a_file_of_other_settings_is_refused(tmp_path, capsys):
    run(tmp_path, "--table", "main", "--methods", "LoRA", "--lr", "1e-3")
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "--table", "main", "--methods", "LoRA", "--lr", "1e-3", "--family", "t5")
    assert stopped.value.code == 2 and "is of other settings" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("arguments, told", [
    ([], "nothing to do"), (["--table", "main", "--folder", "nowhere"], "run --prepare first"),
    (["--prepare", "--model", "nowhere"], "--prepare needs --model"), (["--small", "--family", "t6"], "give bert or t5"),
    (["--table", "main", "--folder", "HERE", "--tasks", "wic"], "holds no task wic"),
    (["--table", "main", "--folder", "HERE", "--tasks", "rte", "--family", "t5"], "not prepared with --family t5")])
def test_a_mistake_is_one_line(arguments, told, tmp_path, capsys):
    np.savez(tmp_path / "tasks.npz", **{"rte.0.ids": np.zeros(3)})
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(tmp_path) if word == "HERE" else word for word in arguments])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and told in last and last.startswith("usage") is False


def run(tmp_path, *more):
    out = tmp_path / "lines.jsonl"
    compare.main(["--small", "--out", str(out), *more])
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_a_run_goes_on_where_it_was_and_reads_no_test_on_seeds_for_rates(tmp_path):
    asked = "--table", "main", "--methods", "BIPEFT", "LoRA", "full", *([] if NO_PEFT else ["AdaLoRA"])
    lines = run(tmp_path, *asked)
    trained = [x for x in lines if x["stage"] == "train"]
    assert not any("error" in x for x in lines)
    assert sum(not x["tuning"] for x in trained) == 2 * (3 if NO_PEFT else 4)
    assert all((x["test"] is None) == x["tuning"] == (x["seed"] >= 100) for x in trained)
    assert all(x["parameters"] <= 600 for x in trained if x["method"] != "full")
    for method in {x["method"] for x in trained}:
        rates = collections.defaultdict(list)
        for x in trained:
            if x["method"] == method and x["tuning"]:
                rates[x["lr"]].append(x["validation"])
        (lr,) = {x["lr"] for x in trained if x["method"] == method and not x["tuning"]}
        assert len(rates) >= 3 and {len(scores) for scores in rates.values()} == {2}
        assert sum(rates[lr]) == max(map(sum, rates.values()))
    assert run(tmp_path, *asked)[:len(lines)] == lines and len(run(tmp_path, *asked)) == len(lines)


def test_workers(tmp_path):
    lines = run(tmp_path, "--table", "ablations", "--methods", "BIPEFT", "d → b", "--lr", "0.001", "--workers", "2")
    assert sum(x["stage"] == "train" for x in lines) == 4 and not any("error" in x for x in lines)


def test_pruning_takes_a_later_slice_only_after_the_earlier():
    sizes = torch.tensor([[2, 6, 8], [2, 6, 8], [4, 0, 0]])
    scores = torch.tensor([[1.0, 60.0, 8.0], [6.0, 6.0, 0.0], [2.0, 0.0, 0.0]])
    # Densities .5 10 1, 3 1, .5: module 1's first two slices (8), then module 0's first (10), its second does
    # not fit 14 and closes it, module 2 (14).
    assert compare.prune(scores, sizes, torch.tensor([3, 3, 3]), 14).tolist() == [1, 2, 1]


def test_shifted_gates_expect_the_budget_and_have_the_stated_gradient():
    alpha = torch.randn(5, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([3.0, 5, 8, 2, 9], dtype=torch.float64)
    p = compare.shifted(alpha, sizes, 11)
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
    assert compare.through_the_step(0.0, plus, minus, lr, eps) == pytest.approx(-1.62)


def test_matched_structures_have_the_same_kinds_ranks_and_sizes(bench):
    bench.open("toy", 3)
    found = compare.find(bench, "bipeft", 600)
    alike = [sorted((m["kind"], m["rank"] or 0, m["parameters"]) for m in found[name][0].modules)
             for name in ("BIPEFT", "matched random")]
    assert alike[0] == alike[1]


@pytest.mark.parametrize("surrogate", ["own"] + ["botorch"] * bool(importlib.util.find_spec("botorch")))
def test_the_surrogate_climbs(surrogate):
    every = [(a, b) for a in range(6) for b in range(6)]
    score = {c: -(c[0] - 4) ** 2 - 0.1 * (c[1] - 1) ** 2 for c in every}
    tried = every[::5]
    for _ in range(2):
        left = [c for c in every if c not in tried]
        tried = tried + bayes.propose(tried, [score[c] for c in tried], left, 4, surrogate)
    assert len(set(tried)) == len(tried) and max(map(score.get, tried)) >= -0.1
