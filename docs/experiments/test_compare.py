"""The comparison's harness: rates, the plan, the command line, workers; on a tiny random encoder.

    python -m pytest docs/experiments/test_compare.py
"""

import argparse
import collections
import importlib.util
import json

import numpy as np
import pytest

import compare

NO_PEFT = not importlib.util.find_spec("peft")


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


def test_a_rate_without_finite_numbers_is_not_chosen_and_chance_does_not_choose():
    scores = {1e-3: 1.0, 2.5e-3: 3.0, 6e-3: 2.0}
    key = compare.key_of({"stage": "train", "method": "LoRA", "task": "toy", "budget": 600, "seed": 100,
                          "source": None, "lr": 6e-3})
    plan = plan_of({lr: s for lr, s in scores.items() if lr != 6e-3})
    plan.take({"stage": "train", "key": key, "error": "OutOfMemoryError: no room"})
    assert plan.rate("LoRA", 600)[0] is None and plan.next()["lr"] == 6e-3                  # it is tried again
    plan.running.clear()
    plan.take({"stage": "train", "key": key, "error": "UsageError: the loss is not finite"})
    assert plan.judge("LoRA", 600, 6e-3) is None                                          # the other seed's is missing
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
    (["--prepare", "--model", "nowhere"], "--prepare needs --model"),
    (["--small", "--family", "t6"], "give bert or t5"),
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
