"""The comparison's harness: rates, the plan, the command line, workers; on a tiny random encoder.

    python -m pytest docs/experiments/test_compare.py
"""

import argparse
import collections
import gzip
import importlib.util
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

import bench
import compare
import report
from bench import SMALL, Settings

NO_PEFT = not importlib.util.find_spec("peft")


def plan_of(scores, name="LoRA"):
    """A plan whose trainings for a method's rate have these validation scores, {lr: score}."""
    args = argparse.Namespace(tune_seeds=[100, 101], tune_tasks=["toy"], lr=None, family="bert")
    lines = [{"stage": "train", "method": name, "task": "toy", "budget": 600, "seed": seed, "source": None, "lr": lr,
              "validation": score + seed} for lr, score in scores.items() for seed in (100, 101)]
    wish = {"method": name, "task": "toy", "budget": 600, "seed": 0, "source": None, "tuning": False}
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


def test_a_variant_takes_the_rate_of_bipeft():
    plan = plan_of({1e-3: 1.0, 2.5e-3: 3.0, 6e-3: 2.0}, "BIPEFT")
    assert plan.rate("Z = 10", 600) == plan.rate("BIPEFT", 600) and plan.rate("Z = 10", 600)[0] == 2.5e-3
    assert plan.rate("LoRA scale 16", 600)[0] is None                                     # this one has its own


def test_table_rates_trains_every_method_at_every_rate(tmp_path):
    lines = run(tmp_path, "--table", "rates", "--methods", "LoRA", "random", "--rates", "1e-3", "2e-3")
    trained = {(x["method"], x["lr"], x["seed"]) for x in lines if x["stage"] == "train"}
    assert trained == {(name, lr, seed) for name in ("LoRA", "random") for lr in (1e-3, 2e-3) for seed in (0, 1)}
    args = argparse.Namespace(table=["rates"], methods=None, tasks=["toy"], seeds=[0], first_seeds=1, budget=600,
                              rates=[1e-3], family="bert")
    assert [wish["method"] for wish in compare.wanted_of(args)] == [
        "BIPEFT", "one look", "random", "matched random", "LoRA"]


def test_a_file_of_other_settings_is_refused(tmp_path, capsys):
    run(tmp_path, "--table", "main", "--methods", "LoRA", "--lr", "1e-3")
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "--table", "main", "--methods", "LoRA", "--lr", "1e-3", "--family", "t5")
    assert stopped.value.code == 2 and "is of other settings" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("arguments, told", [
    ("", "nothing to do"), ("--table main --folder nowhere", "run --prepare first"),
    ("--prepare --model nowhere", "--prepare needs --model"),
    ("--prepare --model HERE --data-dir HERE", "can't be loaded"),
    ("--small --family t6", "--family: invalid choice"), ("--small --dtype float8", "--dtype: invalid choice"),
    ("--small --surrogate other", "--surrogate: invalid choice"), ("--small --table none", "--table: invalid choice"),
    ("--small --workers -1", "must lie in 0 .."), ("--small --minutes 0", "must lie in 1e-12 .."),
    ("--small --budget 0", "must lie in 1 .."), ("--small --budgets 300 0", "must lie in 1 .."),
    ("--small --rates 1e-3 0", "must lie in"), ("--small --rates nan", "must lie in"), ("--small --lr -1", "must lie in"),
    ("--small --lr inf", "must lie in"), ("--small --search-lr nan", "must lie in"), ("--small --seeds -1", "must lie in"),
    ("--small --steps 0", "must lie in"), ("--small --evaluations 13", "at most --steps, 12"),
    ("--small --warmup 13", "at most --search-steps, 12"), ("--small --warmup -1", "must lie in 0 .."),
    ("--small --batch-size 0", "must lie in"), ("--small --bo-full 0", "must lie in"),
    ("--small --bo-share 2", "must lie in 1e-12 .. 1"), ("--small --seeds 100", "must differ"),
    ("--small --tune-tasks none", "the task toy alone, not none"), ("--small --device tpu", "--device tpu can't be used"),
    ("--small --table cost --methods full", "no training is asked for"),
    ("--small --family t5 --table main --methods AdaLoRA", "no training is asked for"),
    ("--small --out HERE/rte.jsonl/x", "can't be written"), ("--small --out HERE/.gz/", "is a folder"),
    ("--table main --folder HERE --tasks wic", "holds no task wic"),
    ("--table main --folder HERE/half", "can't be read"),
    ("--table main --folder HERE --tasks rte --family t5", "not prepared with --family t5")])
def test_a_mistake_is_one_line(arguments, told, tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "half"):
        (folder / "model").mkdir(parents=True)
        np.savez(folder / "tasks.npz", **{"rte.0.ids": np.zeros(3)})
    (tmp_path / "half" / "tasks.npz").write_bytes(b"not")
    (tmp_path / ".gz").mkdir()
    (tmp_path / "rte.jsonl").write_text("")
    with pytest.raises(SystemExit) as stopped:
        compare.main([word.replace("HERE", str(tmp_path)) for word in arguments.split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and told in line and "error: " in line


def test_flags_of_a_small_run_count(tmp_path):
    lines = run(tmp_path, "--table", "main", "--methods", "LoRA", "--lr", "1e-3", "--seeds", "7", "--budget", "500",
                "--steps", "6")
    assert [(x["seed"], x["budget"], x["passes"]) for x in lines[1:]] == [(7, 500, 6)]


def test_nothing_that_fits_is_told(tmp_path, capsys):
    (_, line) = run(tmp_path, "--table", "main", "--methods", "LoRA", "--lr", "1e-3", "--seeds", "0", "--budget", "1")
    assert line["error"] == "UsageError: no module of LoRA fits into a budget of 1"


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


TWO_TRAININGS = "--table", "main", "--methods", "LoRA", "--lr", "0.001"                 # seeds 0 and 1


@pytest.fixture
def fake_workers(monkeypatch):
    """Workers that run a function instead, (number, job) -> what to tell; forked, so that it may be a local one."""
    forking = multiprocessing.get_context("fork")
    monkeypatch.setattr(compare.mp, "get_context", lambda _: forking)

    def use(function, ready=lambda number: None):
        def work(settings, number, pipe):
            ready(number)
            pipe.send([{"stage": "places", "places": [], "settings": {}}])
            while (job := pipe.recv()) is not None:
                pipe.send([{**job, "validation": 1.0, **function(number, job)}])
        monkeypatch.setattr(compare, "work", work)
        return forking
    return use


def test_a_worker_that_dies_is_told_and_its_job_is_tried_again_by_another(tmp_path, fake_workers, capsys):
    def dies(number, job):
        if number == 0:
            has_a_job.set()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"by": number}
    has_a_job = fake_workers(dies, lambda number: number == 0 or has_a_job.wait(20)).Event()
    _, *lines = run(tmp_path, *TWO_TRAININGS, "--workers", "2")
    said = capsys.readouterr().out
    assert said.count("a worker died at {'stage': 'train'") == 1 and "not done: 0 trainings" in said
    lost, = [x for x in lines if "error" in x]
    assert lost["error"] == "its worker died" and lost["key"] == compare.key_of(lost)
    assert sorted((x["seed"], x["by"]) for x in lines if "error" not in x) == [(0, 1), (1, 1)]


def test_a_job_that_no_worker_outlives_is_given_up_and_the_run_ends(tmp_path, fake_workers, capsys):
    fake_workers(lambda number, job: os.kill(os.getpid(), signal.SIGKILL) if job["seed"] == 0 else {})
    lines = run(tmp_path, *TWO_TRAININGS, "--workers", "3")
    assert [x["seed"] for x in lines[1:] if "error" in x] == [0, 0]
    assert [x["seed"] for x in lines[1:] if "error" not in x] == [1]
    assert "not done: 1 trainings" in capsys.readouterr().out
    fake_workers(lambda number, job: {})                                   # the next run tries it once more
    assert [x["seed"] for x in run(tmp_path, *TWO_TRAININGS, "--workers", "1")[len(lines):]] == [0]


def test_without_any_worker_left_a_run_says_so(tmp_path, fake_workers, capsys):
    fake_workers(lambda number, job: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, *TWO_TRAININGS, "--workers", "1")
    assert "no worker is left; the same command goes on" in ended.value.code
    assert "not done: 2 trainings" in capsys.readouterr().out


def test_a_worker_leaves_quietly_when_the_one_that_hands_out_is_gone(capfd):
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    worker = compare.mp.get_context("spawn").Process(target=compare.work, args=(
        Settings(**SMALL), 0, theirs))
    worker.start()
    theirs.close()
    assert ours.recv()[0]["stage"] == "places"
    ours.close()
    worker.join(20)
    assert worker.exitcode == 0 and "Traceback" not in capfd.readouterr().err


def test_workers_are_stopped_in_time(tmp_path, fake_workers, capsys):
    fake_workers(lambda number, job: time.sleep(60))
    started = time.time()
    assert len(run(tmp_path, *TWO_TRAININGS, "--workers", "1", "--minutes", "0.01")) == 1
    said = capsys.readouterr().out
    assert "stopped after 0.01 minutes; 1 jobs were under way" in said and "not done: 2 trainings" in said
    for worker in multiprocessing.active_children():
        worker.join(20)
    assert time.time() - started < 20


def known(tmp_path, seconds, **more):
    """A results file that knows how long a training takes, {method: seconds}."""
    lines = [{"stage": "train", "method": name, "task": "toy", "budget": 600, "seed": 7, "source": None, "lr": 1e-3,
              "validation": 1.0, "workers": 1, "seconds": s, **more} for name, s in seconds.items()]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "lines.jsonl"


@pytest.mark.parametrize("workers", [0, 1])
def test_no_job_is_handed_out_that_would_not_be_done_in_time(workers, tmp_path, fake_workers, capsys):
    fake_workers(lambda number, job: {})
    known(tmp_path, {"LoRA": 100.0, "random": 1.0})
    asked = "--table", "main", "--methods", "LoRA", "random", "--lr", "0.001", "--workers", str(workers)
    lines = run(tmp_path, *asked, "--minutes", "1")
    assert [(x["method"], x["seed"]) for x in lines[3:]] == [("random", 0), ("random", 1)]
    assert "not done: 2 trainings" in capsys.readouterr().out
    lines = run(tmp_path, *asked)[len(lines):]                             # there is time
    assert [(x["method"], x["seed"]) for x in lines] == [("LoRA", 0), ("LoRA", 1)]


def test_a_job_put_off_for_want_of_time_chooses_no_rate(tmp_path):
    args = argparse.Namespace(table=["main"], methods=["LoRA"], tasks=["toy"], seeds=[0], first_seeds=1,
                              tune_seeds=[100], tune_tasks=["toy"], budget=600, lr=None, workers=1,
                              family="bert")
    work = compare.Run(args, None, known(tmp_path, {"LoRA": 100.0}), minutes=1)
    assert not work.next() and len(work.plan.late) == 3
    assert work.plan.rate("LoRA", 600)[0] is None and work.plan.missing() == 1


def test_a_run_goes_on_from_packed_lines(tmp_path):
    lines = run(tmp_path, *TWO_TRAININGS)
    out, packed = tmp_path / "lines.jsonl", tmp_path / "lines.jsonl.gz"
    texts = out.read_text().splitlines(keepends=True)
    packed.write_bytes(gzip.compress("".join(texts[:2]).encode()) + gzip.compress(texts[2].encode()))   # as by gzip >>
    out.unlink()
    assert compare.read(out) == lines
    compare.main(["--small", "--out", str(out), *TWO_TRAININGS])
    assert not out.exists()                                                               # nothing was left to do
    report.main(["--lines", str(out), "--figures", str(tmp_path)])


def test_what_is_no_results_file_is_told_in_one_line(tmp_path, capsys):
    kept = {"other.json": b"[1]\n", "few.jsonl": b'{"stage": "train"}\n', "code.py": b"a = 1\nb = 2\n",
            "half.gz": gzip.compress(b"{}\n" * 99)[:-9], "text.gz": gzip.compress(b"a = 1\n"), "no.gz": b"text"}
    for name, held in kept.items():
        (tmp_path / name).write_bytes(held)
    for path, told in ((tmp_path, "is a folder"), (tmp_path / "other.json", "does not hold compare.py's lines"),
                       (tmp_path / "few.jsonl", "does not hold"), (tmp_path / "code.py", "does not hold"),
                       (tmp_path / "half", "can't be unpacked"), (tmp_path / "no.gz", "can't be unpacked"),
                       (tmp_path / "text", "does not hold"), ("", "name a file")):
        for program, arguments in (compare, ["--small", "--table", "main", "--out"]), (report, ["--lines"]):
            with pytest.raises(SystemExit) as ended:
                program.main([*arguments, str(path)])
            (line,) = capsys.readouterr().err.splitlines()
            assert ended.value.code == 2 and told in line
    assert all((tmp_path / name).read_bytes() == held for name, held in kept.items())


def test_a_line_that_was_broken_in_a_letter_is_dropped(tmp_path):
    lines = run(tmp_path, *TWO_TRAININGS)
    out = tmp_path / "lines.jsonl"
    out.write_bytes(out.read_bytes()[:-5] + "é".encode()[:1])
    compare.main(["--small", "--out", str(out), *TWO_TRAININGS])
    assert [{**x, "seconds": 0} for x in compare.read(out)] == [{**x, "seconds": 0} for x in lines]


def test_a_file_of_another_models_places_is_refused(tmp_path, capsys):
    run(tmp_path, *TWO_TRAININGS)
    out = tmp_path / "lines.jsonl"
    out.write_text(out.read_text().replace(".layer.1.", ".layer.7."))
    with pytest.raises(SystemExit):
        run(tmp_path, *TWO_TRAININGS)
    assert "of a model with other places" in capsys.readouterr().err


def test_figures_that_cant_be_written_are_told_after_the_tables(tmp_path, capsys):
    run(tmp_path, *TWO_TRAININGS)
    capsys.readouterr()
    if not importlib.util.find_spec("matplotlib"):
        pytest.skip("needs matplotlib")
    with pytest.raises(SystemExit) as ended:
        report.main(["--lines", str(tmp_path / "lines.jsonl.gz"), "--figures", str(tmp_path / "lines.jsonl")])
    told = capsys.readouterr()
    assert ended.value.code == 2 and "can't be written" in told.err and "| LoRA |" in told.out



def test_a_run_says_what_it_is_on(monkeypatch):
    for seen, told in (False, "on the CPU: no GPU is seen"), (True, "on 2 GPUs"):
        monkeypatch.setattr(compare.torch.cuda, "is_available", lambda: seen)
        monkeypatch.setattr(compare.torch.cuda, "device_count", lambda: 2)
        assert compare.where(compare.Settings()) == told
    assert compare.where(compare.Settings(device="cpu")) == "on cpu"


def test_how_long_a_job_is_expected_to_take(tmp_path):
    results = compare.Results(known(tmp_path, {"LoRA": 10.0, "random": 30.0}), workers=0)
    search = {"stage": "find", "finder": "bipeft"}
    assert results.expected({"stage": "train", "method": "LoRA"}) == 10
    assert results.expected({"stage": "train", "method": "BitFit"}) == 20               # the others' mean
    assert results.expected(search) == 3 * 20 and results.expected({**search, "finder": "autopeft"}) == 9 * 20
    results.clock({**search, "method": "BIPEFT", "seconds": 45.0})
    results.clock({**search, "method": "one look", "seconds": 20.0})                    # in the same job
    assert results.expected(search) == 45
    beside_others = compare.Results(known(tmp_path, {"LoRA": 10.0}, workers=8), workers=0)
    assert beside_others.expected(search) == 0                                          # other durations: unknown


def test_a_llamas_tasks_are_prepared_with_a_line_break_before_the_answer(tmp_path):
    pandas = pytest.importorskip("pandas")
    bench.small_backbone("llama").save_pretrained(tmp_path / "model")
    tokenizer = bench.bipeft.toy_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    for task, files in {**bench.FILES, **bench.MORE_FILES}.items():
        (tmp_path / task).mkdir()
        rows = {**{field: ["anna " * 300, "anna walks", "ben", "it rains", "good"]
                   for field in bench.bipeft.TASKS[task].fields}, "label": [0, 1, 1, 0, 1]}
        for file in files:
            pandas.DataFrame(rows).to_parquet(tmp_path / task / f"{file}.parquet")
    settings = Settings(folder=str(tmp_path / "made"), family="llama", train_rows=-3996, max_length=256)
    bench.prepare(tmp_path / "model", tmp_path, settings)
    line_break = tokenizer("\n").input_ids
    lengths = {}
    for task in ("cola", "boolq"):
        rows = bench.pools_of(task, settings)[0]
        assert all(ids[-len(line_break):] == line_break for ids, _ in rows)
        assert [y for _, (y,) in rows] == [0, 1, 1, 0, 1]
        (example,) = bench.bipeft.to_examples(task, dict(
            zip((*bench.bipeft.TASKS[task].fields, "label"), ["ben"] * (1 + (task == "boolq")) + [1])), False)
        assert rows[2][0] == tokenizer(example.source).input_ids + line_break
        lengths[task] = max(len(ids) for ids, _ in rows)
    assert lengths == {"cola": 127 + len(line_break), "boolq": 255 + len(line_break)}
    assert (tmp_path / "made" / "model").resolve() == tmp_path / "model"


def test_methods_are_run_in_the_order_they_are_named_in(tmp_path):
    args = argparse.Namespace(table=["main"], methods=["LoRA, r = 8", "BIPEFT", "LNFit"], seeds=[0, 1],
                              tasks=["qnli", "cola"], first_seeds=1, budget=600, family="llama")
    order = [(wish["seed"], wish["method"], wish["task"]) for wish in compare.wanted_of(args)]
    assert order == [(seed, name, task) for seed in (0, 1) for name in args.methods for task in args.tasks]
    args.methods = None
    assert "head alone" not in {wish["method"] for wish in compare.wanted_of(args)}            # it has none


def test_a_small_comparison_on_a_llama(tmp_path):
    lines = run(tmp_path, "--family", "llama", "--table", "main", "--seeds", "0", "--methods", "BIPEFT",
                "LoRA", "biases on even norms", "full")
    assert not any("error" in x for x in lines) and lines[0]["settings"]["dtype"] == "bfloat16"
    trained = [x for x in lines if x["stage"] == "train"]
    assert {x["lr"] for x in trained if x["tuning"] and x["method"] != "full"} >= {1e-3, 3e-3, 1e-2}
    assert sorted(x["method"] for x in trained if not x["tuning"]) == [
        "BIPEFT", "LoRA", "biases on even norms", "full"]
