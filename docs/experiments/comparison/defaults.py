"""The defaults of `--task custom`, and what stands before a causal model's answer: what was tried.

    python docs/experiments/comparison/defaults.py --data-dir DIR --llama DIR --t5 DIR --workers 12      on a GPU

A person's own data: rows of GLUE with words for labels, cut to 200, 1,000 and 2,490, in .jsonl with source and target.
Each is run by the command line in full, search and re-training, at every rate, batch size and number of epochs; every
separator, at the end of three of the paper's prompts, trains a structure that needed no search, biases on even norms.
A line a run goes to --out; what has a line there is not run again, unless it tells of an error. Needs no more than
bipeft.py does; of --data-dir it reads <task>/<split>.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
import bipeft

WORDS = {"sst2": ("negative", "positive"), "cola": ("wrong", "right"), "rte": ("follows", "open")}
ROWS = {"sst2": 200, "cola": 1000, "rte": 2490}
SEPARATORS = {"nothing": "", "a line break": "\n", "a blank": " "}
SEPARATOR_EPOCHS = {"cola": 3, "rte": 8, "mrpc": 6}
BUDGETS = {"llama": "1.39e-4", "t5": "1e-3"}
TRIED = {  # batch size, epochs, triggers, epochs of warm-up: rates; the last is the paper's way
    (16, 20, 30, 2): ("1e-3", "3e-3", "3e-4"), (32, 20, 30, 2): ("1e-3", "3e-3", "3e-4", "1e-2"),
    (32, 10, 100, 1): ("3e-4",)}


def write(place, split, pairs):
    """PLACE/<split>.jsonl of pairs of source and target."""
    place.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"source": source, "target": target}) + "\n" for source, target in pairs]
    (place / f"{split}.jsonl").write_text("".join(lines))


def write_custom(task, args, place):
    """The task's rows, its fields as one text, its label as a word."""
    for split, count in (("train", ROWS[task]), ("validation", 400)):
        rows = bipeft.read_split(task, split, args.data_dir)
        pairs = []
        for row in bipeft.drawn(rows, min(len(rows), count), 0)[0]:
            source = " ".join(str(row[field]) for field in bipeft.TASKS[task].fields)
            pairs.append((source, WORDS[task][int(row["label"])]))
        write(place, split, pairs)


def write_prompts(task, separator, args, place):
    """The paper's prompts of a task, each with a separator at its end."""
    for split in ("train", "validation"):
        examples = [bipeft.to_examples(task, row, True)[0] for row in bipeft.read_split(task, split, args.data_dir)]
        write(place, split, [(e.source + separator, e.target) for e in examples])


def write_even_norms(args, path):
    """A structure of biases on 32 evenly spaced norms of the Llama, of all norms if there are fewer."""
    model, _ = bipeft.load_backbone(args.llama, "bfloat16", torch.device("cpu"), 0)
    norms = [name for name, role, _ in bipeft.places_of(model) if role == "norm"]
    count, width = min(32, len(norms)), model.config.hidden_size
    modules = []
    for i in range(count):
        name = norms[(2 * i + 1) * len(norms) // (2 * count)]
        modules.append({"name": name, "kind": "bitfit", "rank": None, "parameters": width})
    bipeft.save_structure(bipeft.Structure("", bipeft.geometry(model), "bitfit", [1], count * width, modules), path)


def jobs_of(args, folder):
    """Writes the data, and yields what a line tells of a run and the run's arguments of bipeft.py."""
    write_even_norms(args, folder / "even.json")
    for task in ROWS:
        write_custom(task, args, folder / task)
    for (batch, epochs, triggers, warmup), rates in TRIED.items():
        for seed in (0, 1) if batch == 16 else (0,):
            for task, rate, model in itertools.product(ROWS, rates, BUDGETS):
                told = {"part": "custom", "model": model, "task": task, "rows": ROWS[task], "lr": rate, "batch": batch,
                        "epochs": epochs, "triggers": triggers, "warmup": warmup, "seed": seed}
                yield told, ["--data-dir", folder / task, "--model", getattr(args, model), "--lr", rate,
                             "--batch-size", batch, "--epochs", epochs, "--triggers", triggers,
                             "--warmup-epochs", warmup, "--seed", seed, "--budget", BUDGETS[model]]
    for task, epochs in SEPARATOR_EPOCHS.items():
        for number, (name, separator) in enumerate(SEPARATORS.items()):
            place = folder / f"{task}-{number}"
            write_prompts(task, separator, args, place)
            for seed in (0, 1):
                told = {"part": "separator", "model": "llama", "task": task, "separator": name, "seed": seed,
                        "lr": "1e-3"}
                yield told, ["--data-dir", place, "--metric", bipeft.TASKS[task].metric, "--model", args.llama,
                             "--structure", folder / "even.json", "--epochs", epochs, "--batch-size", "32",
                             "--lr", "1e-3", "--seed", seed]


def run(number, told, arguments, folder):
    """One run of the command line; its line, of its scores or of what went wrong."""
    out = folder / f"run-{number}"
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{number % torch.cuda.device_count()}"
    command = [sys.executable, ROOT / "bipeft.py", "--task", "custom", "--dtype", "bfloat16", "--device", device,
               "--out", out, *arguments]
    started = time.monotonic()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    line = {**told, "seconds": round(time.monotonic() - started, 1)}
    if done.returncode:
        return {**line, "error": (done.stderr.splitlines() or ["killed"])[-1]}
    metrics = json.loads((out / "metrics.json").read_text())
    keys = ("metric", "modules", "parameters", "validation", "test", "test_untouched", "test_most_frequent",
            "search_seconds", "train_seconds")
    return {**line, **{key: metrics[key] for key in keys}}


def untouched_losses(task, args, folder):
    """{separator: the mean loss of the validation split's answers without any module}, of the prompts in FOLDER."""
    losses = {}
    for number, name in enumerate(SEPARATORS):
        (settings,) = bipeft.parse(["--task", "custom", "--data-dir", str(folder / f"{task}-{number}"),
                                    "--model", args.llama, "--dtype", "bfloat16"])
        losses[name] = bipeft.Work(settings, bipeft.choose_device("auto")).validate()[1]
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True, help="the folder that holds <task>/<split>")
    parser.add_argument("--llama", required=True, help="a causal model's folder")
    parser.add_argument("--t5", required=True, help="a T5's folder")
    parser.add_argument("--workers", type=int, default=12, help="runs side by side (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "defaults.jsonl")
    args = parser.parse_args()
    lines = []
    if args.out.exists():
        lines = [json.loads(text) for text in args.out.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder, args.out.open("a") as file:
        folder = Path(folder)

        def keep(line):
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(json.dumps(line), flush=True)

        def work(number, told, arguments):
            if not any(told.items() <= line.items() and "error" not in line for line in lines):
                keep(run(number, told, arguments, folder))

        with ThreadPoolExecutor(args.workers) as pool:
            jobs = [pool.submit(work, number, *job) for number, job in enumerate(jobs_of(args, folder))]
        for job in jobs:
            job.result()                                            # raises what went wrong in it
        for task in SEPARATOR_EPOCHS:
            if not any(line["part"] == "loss" and line["task"] == task for line in lines):
                keep({"part": "loss", "task": task, "losses": untouched_losses(task, args, folder)})


if __name__ == "__main__":
    main()
