"""The comparison's harness: rates, the plan, the command line, workers; on a tiny random encoder."""

import argparse
import gzip
import json
import multiprocessing
import os
import signal

import numpy as np
import pytest

import harness
import compare
from harness import Settings

forking = multiprocessing.get_context("fork")
TWO_TRAININGS = "--table", "main", "--methods", "LoRA", "--lr", "0.001"                 # seeds 0 and 1


def plan_of(scores, name="LoRA"):
    """A plan whose trainings for a method's rate have these validation scores, {lr: score}."""
    args = argparse.Namespace(tune_seeds=[100, 101], tune_tasks=["toy"], lr=None, family="bert")
    lines = [{"stage": "train", "method": name, "task": "toy", "budget": 600, "seed": seed, "source": None, "lr": lr,
              "validation": score + seed} for lr, score in scores.items() for seed in (100, 101)]
    wish = {"method": name, "task": "toy", "budget": 600, "seed": 0, "source": None, "tuning": False}
    return compare.Plan([wish], lines, args)


def run(tmp_path, *more):
    out = tmp_path / "lines.jsonl"
    compare.main(["--small", "--out", str(out), *more])
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_a_ladder_of_rates_goes_on_while_the_best_is_at_an_edge():
    inner = {1e-3: 1.0, 2.5e-3: 3.0, 6e-3: 2.0}
    assert plan_of(inner).rate("LoRA", 600) == (2.5e-3, {lr: s + 100.5 for lr, s in inner.items()})
    upwards = {1e-3: 1.0, 2.5e-3: 2.0, 6e-3: 3.0}
    plan = plan_of(upwards)
    assert plan.rate("LoRA", 600)[0] is None                               # 1.5e-2 is not tried yet
    jobs = [plan.next(), plan.next()]
    assert [(job["seed"], job["lr"]) for job in jobs] == [(100, 1.5e-2), (101, 1.5e-2)]
    assert plan.next() is None                                             # both seeds run: the training waits
    assert plan_of({**upwards, 1.5e-2: 2.5}).rate("LoRA", 600)[0] == 6e-3
    downwards = plan_of({4e-4: 9.0, 1e-3: 3.0, 2.5e-3: 2.0, 6e-3: 1.0})
    job = downwards.next()                                                 # at the ladder's end
    assert (job["lr"], job["seed"], job["tuning"]) == (4e-4, 0, False) and downwards.next() is None
    plan = plan_of(inner, "BIPEFT")
    assert plan.rate("Z = 10", 600) == plan.rate("BIPEFT", 600)            # a variant takes the rate of BIPEFT


def test_a_rate_without_finite_numbers_is_not_chosen_and_chance_does_not_choose():
    plan = plan_of({1e-3: 1.0, 2.5e-3: 3.0})
    keys = [compare.key_of({"stage": "train", "method": "LoRA", "task": "toy", "budget": 600, "seed": seed,
                            "source": None, "lr": 6e-3}) for seed in (100, 101)]
    plan.take({"stage": "train", "key": keys[0], "error": "OutOfMemoryError: no room"})
    assert plan.rate("LoRA", 600)[0] is None
    for key in keys:
        plan.take({"stage": "train", "key": key, "error": "UsageError: the loss is not finite"})
    assert plan.rate("LoRA", 600)[0] == 2.5e-3 and plan.judge("LoRA", 600, 6e-3) == -100


@pytest.mark.parametrize("arguments, told", [
    ("", "nothing to do"), ("--table main --folder nowhere", "run --prepare first"),
    ("--prepare --model nowhere", "--prepare needs --model"),
    ("--prepare --model HERE --data-dir HERE", "can't be loaded"),
    ("--small --table none", "--table: invalid choice"), ("--small --seeds 100", "must differ"),
    ("--small --family llama --table main --methods entangled", "no training is asked for"),
    ("--small --family t5", "--family is bert or llama, not t5"),
    ("--small --out HERE/code.py", "does not hold compare.py's lines"), ("--small --out HERE", "can't be read"),
    ("--table main --folder HERE --tasks boolq", "holds no task boolq")])
def test_a_mistake_is_one_line(arguments, told, tmp_path, capsys):
    np.savez(tmp_path / "tasks.npz", **{"rte.0.ids": np.zeros(3)})
    (tmp_path / "code.py").write_text("a = 1\n")
    with pytest.raises(SystemExit) as stopped:
        compare.main([word.replace("HERE", str(tmp_path)) for word in arguments.split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and told in line and "error: " in line
    assert (tmp_path / "code.py").read_text() == "a = 1\n"


def test_what_belongs_to_another_file_or_fits_nowhere_is_told(tmp_path, capsys):
    lines = run(tmp_path, "--table", "main", "--methods", "LoRA", "--lr", "1e-3", "--seeds", "0", "--budget", "1")
    assert lines[1]["error"] == "UsageError: no module of LoRA fits into a budget of 1"
    assert "not done: 1 trainings" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(tmp_path, *TWO_TRAININGS, "--family", "llama")
    assert "is of other settings or another model" in capsys.readouterr().err


def test_a_run_goes_on_where_it_was_and_reads_no_test_on_seeds_for_rates(tmp_path):
    pytest.importorskip("peft")
    asked = "--table", "main", "--methods", "BIPEFT", "LoRA", "full", "AdaLoRA"
    lines = run(tmp_path, *asked)
    trained = [x for x in lines if x["stage"] == "train"]
    assert not any("error" in x for x in lines) and sum(not x["tuning"] for x in trained) == 2 * 4
    assert all((x["test"] is None) == x["tuning"] == (x["seed"] >= 100) for x in trained)
    assert all(x["parameters"] <= 600 for x in trained if x["method"] != "full")
    assert run(tmp_path, *asked) == lines


def test_a_killed_run_goes_on_from_a_broken_line_and_from_packed_ones(tmp_path):
    lines = run(tmp_path, *TWO_TRAININGS)
    out, packed = tmp_path / "lines.jsonl", tmp_path / "lines.jsonl.gz"
    out.write_bytes(out.read_bytes()[:-5] + "é".encode()[:1])
    compare.main(["--small", "--out", str(out), *TWO_TRAININGS])
    assert [{**x, "seconds": 0} for x in compare.read(out)] == [{**x, "seconds": 0} for x in lines]
    held = compare.read(out)
    packed.write_bytes(gzip.compress(out.read_bytes()))
    out.unlink()
    assert compare.read(out) == held
    compare.main(["--small", "--out", str(out), *TWO_TRAININGS])
    assert not out.exists()                                                # nothing was left to do


def test_workers_do_what_one_process_does(tmp_path):
    asked = "--table", "ablations", "--methods", "BIPEFT", "d → b", "--lr", "0.001", "--seeds", "0"
    (tmp_path / "one").mkdir()
    found = [{(x["stage"], x["method"]): (x["parameters"], x.get("test")) for x in lines[1:]}
             for lines in (run(tmp_path, *asked, "--workers", "2"), run(tmp_path / "one", *asked))]
    assert found[0] == found[1] and sum(stage == "train" for stage, _ in found[0]) == 2


def test_a_worker_that_dies_is_told_and_the_next_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: forking)
    monkeypatch.setattr(compare, "carry_out", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(SystemExit, match="a worker died; the same command goes on"):
        run(tmp_path, *TWO_TRAININGS, "--workers", "2")
    monkeypatch.undo()
    assert [x["seed"] for x in run(tmp_path, *TWO_TRAININGS)[1:]] == [0, 1]


def test_methods_are_run_in_the_order_they_are_named_in():
    args = argparse.Namespace(table=["main"], methods=["LoRA, r = 8", "BIPEFT", "LNFit"], seeds=[0, 1],
                              tasks=["qnli", "cola"], budget=600, family="llama")
    order = [(wish["seed"], wish["method"], wish["task"]) for wish in compare.wanted_of(args)]
    assert order == [(seed, name, task) for seed in (0, 1) for name in args.methods for task in args.tasks]
    args.methods = None
    assert "head alone" not in {wish["method"] for wish in compare.wanted_of(args)}            # it has none


def test_a_llamas_tasks_are_prepared_with_a_line_break_before_the_answer(tmp_path):
    pandas = pytest.importorskip("pandas")
    harness.small_backbone("llama").save_pretrained(tmp_path / "model")
    tokenizer = harness.bipeft.toy_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    for task, files in harness.FILES.items():
        (tmp_path / task).mkdir()
        rows = {**{field: ["anna " * 300, "anna walks", "ben", "it rains", "good"]
                   for field in harness.bipeft.TASKS[task].fields}, "label": [0, 1, 1, 0, 1]}
        for file in files:
            pandas.DataFrame(rows).to_parquet(tmp_path / task / f"{file}.parquet")
    settings = Settings(folder=str(tmp_path / "made"), family="llama", train_rows=-3996, max_length=256)
    harness.prepare(tmp_path / "model", tmp_path, settings, harness.FILES)
    line_break = tokenizer("\n").input_ids
    rows = harness.pools_of("cola", settings)[0]
    assert all(ids[-len(line_break):] == line_break for ids, _ in rows)
    assert [y for _, (y,) in rows] == [0, 1, 1, 0, 1]
    (example,) = harness.bipeft.to_examples("cola", {"sentence": "ben", "label": 1})
    assert rows[2][0] == tokenizer(example.source).input_ids + line_break
    assert max(len(ids) for ids, _ in rows) == 127 + len(line_break)
    assert (tmp_path / "made" / "model").resolve() == tmp_path / "model"


def test_a_small_comparison_on_a_llama(tmp_path):
    lines = run(tmp_path, *"--family llama --table main --seeds 0 --methods BIPEFT full".split(), "random, best of 3")
    assert not any("error" in x for x in lines) and lines[0]["settings"]["dtype"] == "bfloat16"
    trained = [x for x in lines if x["stage"] == "train"]
    assert {x["lr"] for x in trained if x["tuning"] and x["method"] != "full"} >= {1e-3, 3e-3, 1e-2}
    assert sorted(x["method"] for x in trained if not x["tuning"]) == ["BIPEFT", "full", "random, best of 3"]
