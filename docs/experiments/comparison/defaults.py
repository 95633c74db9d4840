"""The defaults of `--task custom`, and what stands before a causal model's answer: what was tried.

    python docs/experiments/comparison/defaults.py --data-dir DIR --llama DIR --t5 DIR --workers 12      on a GPU
    python docs/experiments/comparison/defaults.py --show                                                the tables

A person's own data: rows of GLUE with words for labels, cut to 200, 1,000 and 2,490, in .jsonl with source and target.
Each is run by the command line in full, search and re-training, at every rate, batch size and number of epochs; every
separator, at the end of three of the paper's prompts, trains a structure that needed no search, biases on even norms.
Without --llama or --t5 that model's runs are left out. A line a run goes to --out; what has a line there is not run
again, unless it tells of an error. Needs no more than bipeft.py does; of --data-dir it reads <task>/<split>.
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
TRIED = {  # batch size, epochs, triggers, epochs of warm-up: rates; the last is the paper's way
    (16, 20, 30, 2): ("1e-3", "3e-3", "3e-4"), (32, 20, 30, 2): ("1e-3", "3e-3", "3e-4", "1e-2"),
    (32, 10, 100, 1): ("3e-4",)}


def write_custom(data_dir, folder):
    """FOLDER/<task>/{train,validation}.jsonl: the task's fields as one text, its label as a word."""
    for task, words in WORDS.items():
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split in ("train", "validation"):
            rows = bipeft.read_split(task, split, data_dir)
            count = ROWS[task] if split == "train" else min(len(rows), 400)
            lines = []
            for row in bipeft.drawn(rows, count, 0)[0]:
                source = " ".join(str(row[field]) for field in bipeft.TASKS[task].fields)
                lines.append(json.dumps({"source": source, "target": words[int(row["label"])]}) + "\n")
            (folder / task / f"{split}.jsonl").write_text("".join(lines))


def write_prompts(task, separator, args, folder):
    """A folder of {train,validation}.jsonl with a paper's task's prompts, each with a separator at its end."""
    place = folder / f"{task}-{'-'.join(map(str, separator.encode()))}"
    place.mkdir(exist_ok=True)
    for split in ("train", "validation"):
        examples = [bipeft.to_examples(task, row, True)[0] for row in bipeft.read_split(task, split, args.data_dir)]
        lines = [json.dumps({"source": e.source + separator, "target": e.target}) + "\n" for e in examples]
        (place / f"{split}.jsonl").write_text("".join(lines))
    return place


def even_norms(model, budget, path):
    """Writes a structure of biases on evenly spaced norms of a model, as many as fit."""
    norms = [name for name, role, _ in bipeft.places_of(model) if role == "norm"]
    count = budget // model.config.hidden_size
    chosen = [norms[(2 * i + 1) * len(norms) // (2 * count)] for i in range(count)]
    modules = [{"name": name, "kind": "bitfit", "rank": None, "parameters": model.config.hidden_size}
               for name in chosen]
    bipeft.save_structure(bipeft.Structure("", bipeft.geometry(model), "bitfit", [1], budget, modules), path)


def jobs_of(args, folder):
    """[(what a line tells of a run, arguments of bipeft.py)], in the order of their importance."""
    separators = []
    for seed in args.seeds:
        for task, epochs in {"cola": 3, "rte": 8, "mrpc": 6}.items():
            for name, separator in SEPARATORS.items():
                told = {"part": "separator", "model": "llama", "task": task, "separator": name, "seed": seed,
                        "lr": "1e-3"}
                separators.append((told, [
                    "--task", "custom", "--data-dir", str(write_prompts(task, separator, args, folder)), "--metric",
                    bipeft.TASKS[task].metric, "--model", args.llama, "--structure", str(folder / "even.json"),
                    "--epochs", str(epochs), "--batch-size", "32", "--lr", "1e-3", "--seed", str(seed)]))
    custom = []
    models = [name for name in ("llama", "t5") if getattr(args, name)]
    for (batch, epochs, triggers, warmup), rates in TRIED.items():
        for seed in args.seeds if batch == 16 else [0]:
            for task, rate, model in itertools.product(ROWS, rates, models):
                told = {"part": "custom", "model": model, "task": task, "rows": ROWS[task], "lr": rate, "batch": batch,
                        "epochs": epochs, "triggers": triggers, "warmup": warmup, "seed": seed}
                custom.append((told, [
                    "--task", "custom", "--data-dir", str(folder / task), "--model", getattr(args, model), "--lr", rate,
                    "--batch-size", str(batch), "--epochs", str(epochs), "--triggers", str(triggers), "--warmup-epochs",
                    str(warmup), "--seed", str(seed), "--budget", {"llama": "1.39e-4", "t5": "1e-3"}[model]]))
    first = [job for job in custom if job[0]["batch"] == 16 and job[0]["seed"] == 0]
    rest = [job for job in custom if job not in first]
    return first + separators * bool(args.llama) + rest


def run(number, told, arguments, args, folder):
    """One run of the command line; its line, of its scores or of what went wrong."""
    out = folder / f"run-{number}"
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{number % torch.cuda.device_count()}"
    started = time.monotonic()
    done = subprocess.run([sys.executable, str(ROOT / "bipeft.py"), *arguments, "--dtype", args.dtype,
                           "--device", device, "--out", str(out)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    line = {**told, "seconds": round(time.monotonic() - started, 1)}
    if done.returncode:
        return {**line, "error": (done.stderr.splitlines() or ["killed"])[-1]}
    metrics = json.loads((out / "metrics.json").read_text())
    keys = ("metric", "modules", "parameters", "validation", "test", "test_untouched", "test_most_frequent",
            "search_seconds", "train_seconds")
    return {**line, **{key: metrics[key] for key in keys}}


def untouched_losses(args, folder):
    """{task: {separator: the mean loss of the validation split's answers without any module}}"""
    device = bipeft.choose_device("auto")
    losses = {}
    for task in ("cola", "rte", "mrpc"):
        losses[task] = {}
        for name, separator in SEPARATORS.items():
            place = write_prompts(task, separator, args, folder)
            (settings,) = bipeft.parse(["--task", "custom", "--data-dir", str(place), "--model", args.llama, "--dtype",
                                        args.dtype])
            losses[task][name] = bipeft.Work(settings, device).validate()[1]
    return losses


def show(lines):
    """The tables: rows of settings, columns of models and data sets."""
    for part, row, column in (("separator", ("separator", "lr"), ("task", "seed")),
                              ("custom", ("batch", "epochs", "triggers", "lr"), ("model", "rows", "seed"))):
        chosen = [line for line in lines if line["part"] == part]
        columns = sorted({tuple(str(line[key]) for key in column) for line in chosen})
        print(f"| {', '.join(row)} | " + " | ".join(" ".join(key) for key in columns) + " |")
        print("| --- |" + " ---: |" * len(columns))
        rows = dict.fromkeys(tuple(str(line[key]) for key in row) for line in chosen)
        for key in rows:
            cells = []
            for other in columns:
                found = [line.get("test") for line in chosen if tuple(str(line[k]) for k in row) == key
                         and tuple(str(line[k]) for k in column) == other]
                cells.append(f"{found[0]:.1f}" if found and found[0] is not None else "–")
            print(f"| {', '.join(key).replace(chr(10), '')} | " + " | ".join(cells) + " |")
        print()
    for line in lines:
        if line["part"] == "loss":
            print(f"| {line['task']} | " + " | ".join(f"{loss:.2f}" for loss in line["losses"].values()) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="the folder that holds <task>/<split>")
    parser.add_argument("--llama", help="a causal model's folder")
    parser.add_argument("--t5", help="a T5's folder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1],
                        help="of the separators, and in batches of 16 (0 1)")
    parser.add_argument("--workers", type=int, default=12, help="runs side by side (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "defaults.jsonl")
    parser.add_argument("--show", action="store_true", help="print the tables of --out")
    args = parser.parse_args()
    lines = [json.loads(text) for text in args.out.read_text().splitlines()] if args.out.exists() else []
    if args.show:
        show(lines)
        return
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, args.out.open("a") as file:
        folder = Path(folder)
        write_custom(args.data_dir, folder)
        if args.llama:
            model, _ = bipeft.load_backbone(args.llama, args.dtype, torch.device("cpu"), 0)
            even_norms(model, 18_697, folder / "even.json")

        def keep(line):
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(f"{time.monotonic() - started:6.0f} s  {json.dumps(line)}", flush=True)

        def work(job):
            number, (told, arguments) = job
            keep(run(number, told, arguments, args, folder))

        def measure_losses(_):
            if args.llama and not any(line["part"] == "loss" for line in lines):
                for task, losses in untouched_losses(args, folder).items():
                    keep({"part": "loss", "task": task, "losses": losses})

        due = [(told, arguments) for told, arguments in jobs_of(args, folder)
               if not any(told.items() <= line.items() and "error" not in line for line in lines)]
        with ThreadPoolExecutor(args.workers) as pool:
            measured = pool.submit(measure_losses, None)
            list(pool.map(work, enumerate(due)))
            measured.result()


if __name__ == "__main__":
    main()
