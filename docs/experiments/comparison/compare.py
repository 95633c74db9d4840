"""BIPEFT and its rivals side by side: one backbone, one budget, one re-training, many ways of choosing.

    python docs/experiments/comparison/compare.py --small                               all of it, tiny, on a CPU
    python docs/experiments/comparison/compare.py --prepare --model DIR --data-dir DIR  once: runs/compare, 48 MB
    python docs/experiments/comparison/compare.py --table main --workers 14             or another of TABLES, on a GPU
    python docs/experiments/comparison/compare.py --table cost --workers 1              Table 3: nothing beside it
    python docs/experiments/comparison/report.py                                        tables and figures

With --family llama, in --prepare too, it is of a causal language model. Methods are in baselines.py, training in
harness.py. A line of JSON a search and a training goes to --out; what has one there, or packed, is not run again.

The rules. Every method gives a structure of at most B parameters, counted from tensors. Each is re-trained from fresh
weights for the same steps, batches, optimiser (AdamW, linear decay) and seed: the seed decides splits, order, head and
weights. The re-training rate is a method's own, at each budget: of a ladder the one with the best mean validation score
over tasks on --tune-seeds, which are never reported and whose test sets are not read. The epoch is the best on
validation, the test is read once. A BERT's head is outside of B, and learns at the method's rate; a Llama has none: it
answers with the token of a label's digit, chosen among these alone. Searches see two halves of the training set, and
learn Delta W at one rate, --search-lr; AutoPEFT and the best of three train on all of it, at rates of their own. What a
search costs is told, not equal. FTE: its passes (forward and backward, no validations) over those of a re-training.
"""

import argparse
import contextlib
import dataclasses
import gc
import gzip
import importlib.util
import itertools
import json
import multiprocessing
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch

from harness import FILES, SMALL, Bench, Settings, bipeft, prepare
from baselines import (ABLATIONS, ACROSS, CORE, LLAMA_CORE, METHODS, MORE, RETRAINING, SCALES, SENSITIVITY,
                       find, ladder, scaled_lora, train_adalora)

HERE = Path(__file__).resolve().parent
FAMILIES = {"ablations": ABLATIONS, "sensitivity": SENSITIVITY, "retraining": RETRAINING}
TABLES = ("main", "budgets", "transfer", *FAMILIES, "cost")


# 1. A job: a search or a training

def carry_out(bench, job):
    """A job's lines: of a search one for each structure, of a training one."""
    started = time.perf_counter()
    bench.open(job["task"], job["seed"])
    if bench.graphs:
        torch.cuda.reset_peak_memory_stats(bench.device)
    if job["stage"] == "find":
        lines = []
        with scaled_lora(SCALES.get(job["finder"])):
            found = find(bench, job["finder"], job["budget"])
        for method, (structure, told) in found.items():
            lines.append({**job, "method": method, "structure": bench.encode(structure), "passes": bench.passes,
                          "parameters": structure.parameters, **told})
    else:
        found = train(bench, job)                           # takes the structure out of the job
        lines = [{**job, **found}]
    if bench.graphs:
        if bench.settings.workers < 2:                      # alone, as --table cost is: MiB
            memory = torch.cuda.max_memory_allocated(bench.device) / 2**20
            lines = [{**line, "memory": round(memory)} for line in lines]
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()              # 32 MiB for each stream that a job had
        torch.cuda.empty_cache()
    told = {"seconds": round(time.perf_counter() - started, 2), "workers": max(1, bench.settings.workers)}
    return [{**told, **line} for line in lines]                     # a look knows its own seconds


def train(bench, job):
    """Re-trains a job's structure and reads the test, unless the seed is for choosing the rate."""
    method = METHODS[job["method"]]
    if method.finder == "adalora":
        best, curve, parameters, test = train_adalora(bench, job["budget"], job["lr"])
        modules = None
    else:
        structure = (find(bench, method.finder, job["budget"])[method.like or job["method"]][0] if method.cheap
                     else bench.decode(job.pop("structure"), job["budget"]))
        if not structure.modules and not method.free:
            raise bipeft.UsageError(f"no module of {job['method']} fits into a budget of {job['budget']}")
        with scaled_lora(SCALES.get(method.finder)):
            bench.passes = 0
            peft, best, curve = bench.train(structure, job["lr"], method.whole, method.clip, method.lr_warmup)
            parameters, modules = peft.size, len(peft)
            held = bench.score("test") if not job["tuning"] else None
            test = lambda: held
            peft.detach()
    assert method.free or parameters <= job["budget"], f"{parameters} parameters, budget {job['budget']}"
    if job["method"] == "full":
        parameters = sum(p.numel() for p in bench.encoder.parameters())
    return {"parameters": parameters, "modules": modules, "validation": best, "curve": curve, "passes": bench.passes,
            "test": None if job["tuning"] else test()}


# 2. What is run: tables, the plan

class Plan:
    """The trainings wanted, in the order of their importance, and what they wait for: a structure, a rate.
    wanted: dicts of method, task, budget, seed, tuning, perhaps lr and source (whose structure).   lines: of the file.
    """

    def __init__(self, wanted, lines, args):
        self.args, self.structures, self.trained, self.tuned = args, {}, {}, {}
        # Names of jobs: under way, without finite numbers, and with another error, which the next run tries again.
        self.running, self.failed, self.given_up = set(), set(), set()
        self.wanted = list({json.dumps(wish, sort_keys=True): wish for wish in wanted}.values())
        for line in lines:
            self.take(line)

    def take(self, line):
        """A line of results."""
        self.tuned = {}
        if "error" in line:
            usage = line["error"].startswith("UsageError")
            (self.failed if usage else self.given_up).add(line["key"])
        elif line["stage"] == "find":
            self.structures[line["method"], line["task"], line["budget"], line["seed"]] = line["structure"]
        elif line["stage"] == "train":
            self.trained.setdefault(cell_of(line), {})[line["lr"]] = line["validation"]

    def tuning(self, name, budget, lr):
        """The trainings that a rate is judged by, as wishes."""
        for task, seed in itertools.product(self.args.tune_tasks, self.args.tune_seeds):
            yield {"method": name, "task": task, "budget": budget, "seed": seed, "source": None, "tuning": True,
                   "lr": lr}

    def judge(self, name, budget, lr):
        """A rate's mean validation score; None while a training is missing. One without finite numbers: -100."""
        found = []
        for wish in self.tuning(name, budget, lr):
            if key_of({"stage": "train", **wish}) in self.failed or self.hopeless(wish):
                found.append(-100.0)
            else:
                found.append(self.trained.get(cell_of(wish), {}).get(lr))
        return None if None in found else sum(found) / len(found)

    def rate(self, name, budget):
        """(chosen rate, {rate: score}) of a method; the rate is None while trainings for it are missing."""
        name = METHODS[name].rate_of or name
        if (name, budget) not in self.tuned:
            rates, first, last = ladder(name, self.args.family), 1, 4
            while True:
                scores = {lr: self.judge(name, budget, lr) for lr in rates[first:last]}
                best = None if None in scores.values() else max(scores, key=scores.get)
                if best == rates[first] and first > 0:
                    first -= 1
                elif best == rates[last - 1] and last < len(rates):
                    last += 1
                else:
                    break
            self.tuned[name, budget] = best, scores
        return self.tuned[name, budget]

    def hopeless(self, wish):
        """Whether the search that a training stands on failed."""
        return key_of({"stage": "find", "finder": METHODS[wish["method"]].finder, "budget": wish["budget"],
                       "task": wish["source"] or wish["task"], "seed": wish["seed"]}) in self.failed

    def next(self):
        """A job that can be done now; None if all that is left waits for others, False if nothing is left."""
        for wish in self.wanted:
            for job in self.jobs_of(wish):
                self.running.add(key_of(job))
                return job
        return None if self.running else False

    def missing(self):
        """How many trainings have no line."""
        count = 0
        for wish in self.wanted:
            lr = wish.get("lr") or self.args.lr or self.rate(wish["method"], wish["budget"])[0]
            count += lr not in self.trained.get(cell_of(wish), {})
        return count

    def jobs_of(self, wish):
        """What can be done now for a wish: first what its rate is chosen by, then its search, then its training."""
        method, budget, jobs = METHODS[wish["method"]], wish["budget"], []
        lr, tried = wish.get("lr") or self.args.lr, ()
        if lr is None:
            lr, tried = self.rate(wish["method"], budget)
        if lr is None:
            for other in tried:
                for tuning in self.tuning(method.rate_of or wish["method"], budget, other):
                    jobs += self.jobs_of(tuning)
        origin = wish["source"] or wish["task"]
        structure = self.structures.get((method.like or wish["method"], origin, budget, wish["seed"]))
        if structure is None and not method.cheap:
            jobs.append({"stage": "find", "finder": method.finder, "task": origin, "budget": budget,
                         "seed": wish["seed"]})
        elif lr is not None and lr not in self.trained.get(cell_of(wish), {}):
            job = {"stage": "train", **{key: wish[key] for key in CELL}, "tuning": wish["tuning"], "lr": lr}
            jobs.append(job if method.cheap else {**job, "structure": structure})
        closed = self.running | self.failed | self.given_up
        return [job for job in jobs if key_of(job) not in closed]


CELL = "method", "task", "budget", "seed", "source"


def cell_of(wish):
    return tuple(wish[key] for key in CELL)


def key_of(job):
    """A job's name."""
    return json.dumps([job.get(key) for key in ("stage", "method", "finder", "task", "budget", "seed", "source", "lr")])


def wanted_of(args):
    """The trainings of the tables asked for, important ones first; those for rates follow. A Llama has no head."""
    names = [name for name in args.methods or METHODS if name != "head alone" or args.family != "llama"]
    for name, package in {"AdaLoRA": "peft", "AutoPEFT": "botorch"}.items():
        if name in names and not importlib.util.find_spec(package):
            print(f"{name} is left out: {package} is not installed")
            names.remove(name)

    def of(some, seeds, budget=args.budget, tasks=args.tasks, **more):
        for seed, name, task in itertools.product(seeds, [n for n in some if n in names], tasks):
            yield {"method": name, "task": task, "budget": budget, "seed": seed, "source": None, "tuning": False,
                   **more}
    for table in args.table:
        if table == "main":
            core = LLAMA_CORE if args.family == "llama" else CORE
            every = [*core, *(name for name in {**CORE, **MORE} if name not in core)]
            if args.methods:                                        # their order is that of importance
                yield from of([name for name in args.methods if name in every], args.seeds)
            else:
                yield from of(core, args.seeds)
                yield from of(every[len(core):], args.seeds)
        elif table in FAMILIES:
            yield from of(["BIPEFT", *FAMILIES[table]], args.seeds)
        elif table == "budgets":
            for seed, budget in itertools.product(args.seeds, args.budgets):
                yield from of([name for name in ACROSS if name in names], [seed], budget=budget)
        elif table == "transfer":
            for seed, source in itertools.product(args.seeds, args.tasks):
                yield from of(["BIPEFT"], [seed], tasks=[t for t in args.tasks if t != source], **{"source": source})
        elif table == "cost":
            searches = [n for n, m in {**CORE, **MORE}.items() if not m.cheap] + ["entangled", "without selection"]
            timed = ["random", "LoRA", "AdaLoRA", *searches]                    # the first warms the device up
            yield from of(timed, [900], tasks=args.tasks[:1], lr=2.5e-3)


# 3. Many workers on one device

def begin(settings, numbers=None):
    """Makes the bench of this process. Of several GPUs a worker's is that of its number."""
    global BENCH
    if numbers is not None and settings.device == "auto" and torch.cuda.is_available():
        settings = dataclasses.replace(settings, device=f"cuda:{numbers.get() % torch.cuda.device_count()}")
    BENCH = Bench(settings)


def first_line():
    """What a file's lines share: the places that a structure's numbers stand for, sizes, settings."""
    own = "device", "workers", "folder"                             # they may differ between two calls
    settings = {key: value for key, value in dataclasses.asdict(BENCH.settings).items() if key not in own}
    return [{"stage": "places", "places": [f"{name}.{kind}" for name, kind in BENCH.keys],
             "backbone_parameters": sum(p.numel() for p in BENCH.encoder.parameters()), "settings": settings}]


def attempt(job):
    """A job's lines, or that of its error."""
    global BENCH
    try:
        return carry_out(BENCH, dict(job))
    except torch.AcceleratorError:
        raise                                                       # no job is safe on this device any more
    except Exception as error:
        told = f"{type(error).__name__}: {bipeft.one_line(error)[:300]}"
    settings, BENCH = BENCH.settings, None                          # here nothing holds the job's tensors any more
    gc.collect()
    begin(settings)                                                 # a model on which nothing of the job is left
    return [{**{k: v for k, v in job.items() if k != "structure"}, "key": key_of(job), "error": told}]


class Run:
    """The plan, and the lines of its jobs, taken into --out and the plan."""

    def __init__(self, args):
        self.out, self.lines, self.started = args.out, read(args.out), time.time()
        self.plan = Plan(wanted_of(args), self.lines, args)
        if not self.plan.wanted:
            raise bipeft.UsageError("no training is asked for: --table has none of --methods that can be run here")
        if self.out.exists() and not self.out.read_bytes().endswith(b"\n"):
            with self.out.open("a") as file:
                file.write("\n")                                    # of a run that was killed in a line
        print(f"{len(self.plan.wanted)} trainings asked for, "
              f"{sum(line.get('stage') == 'train' for line in self.lines)} lines there")

    def take(self, job, lines):
        """The lines of a job, which is over; of no job, None, a worker's first."""
        for line in lines:
            if line["stage"] == "places":
                self.take_first(line)
            else:
                self.write(line)
                self.plan.take(line)
                show(line, time.time() - self.started)
        if job is not None:
            self.plan.running.discard(key_of(job))

    def take_first(self, line):
        """Takes a worker's first line; raises if the file's is of other settings."""
        there = next((x for x in self.lines if x["stage"] == "places"), None)
        if there is None:
            self.write(line)
        elif there.get("settings", line["settings"]) != line["settings"] or there["places"] != line["places"]:
            raise bipeft.UsageError(f"{self.out} is of other settings or another model: give another --out")

    def write(self, line):
        self.lines.append(line)
        with self.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


def carry_out_all(args, settings):
    """Does the plan's jobs, here or on workers."""
    run = Run(args)
    if args.workers == 0:
        begin(settings)
        run.take(None, first_line())
        while job := run.plan.next():
            run.take(job, attempt(job))
    else:
        context = multiprocessing.get_context("spawn")
        numbers = context.SimpleQueue()
        for number in range(args.workers):
            numbers.put(number)
        with ProcessPoolExecutor(args.workers, context, begin, (settings, numbers)) as pool:
            running = {pool.submit(first_line): None}
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run.take(running.pop(future), future.result())
                while len(running) < args.workers and (job := run.plan.next()):
                    running[pool.submit(attempt, job)] = job
    print(f"{time.time() - run.started:.0f} s; not done: {run.plan.missing()} trainings")


def show(line, seconds):
    """A line for people."""
    keys = ("error",) if "error" in line else ("lr", "parameters", "validation", "test", "passes", "seconds")
    told = "  ".join(f"{key} {line[key]:.6g}" if isinstance(line[key], (int, float)) else f"{key} {line[key]}"
                     for key in keys if line.get(key) is not None)
    print(f"{seconds:6.0f} s  {line['stage']:5}  {line.get('method') or line.get('finder'):20} {line['task']:5} "
          f"B {line['budget']}  seed {line['seed']}  {told}", flush=True)


def read(out):
    """The lines of a results file, after those of the same file packed, "out.gz", if there is one. A broken one, of a
    run that was killed, is dropped, and so is an error that chance may have had a part in: the job is tried again.
    """
    packed, texts = out.with_name(f"{out.name}.gz"), []
    with bipeft.failing(f"{out} can't be read", ": name a file of compare.py's lines"):
        if packed.exists():
            texts += gzip.decompress(packed.read_bytes()).splitlines()
        if out.exists():
            texts += out.read_bytes().splitlines()
    lines = []
    for text in texts:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    if texts and not lines or not all(isinstance(line, dict) and "stage" in line for line in lines):
        raise bipeft.UsageError(f"{out} does not hold compare.py's lines: name another file")
    return [line for line in lines if line.get("error", "UsageError").startswith("UsageError")]


# 4. The command line

def mistake_in(args, settings):
    """What is wrong with the arguments, in a line, or None."""
    if settings.family not in ("bert", "llama"):
        return f"--family is bert or llama, not {settings.family}"
    if set(args.seeds) & set(args.tune_seeds):
        return "--seeds and --tune-seeds must differ: rates are chosen on seeds that are not reported"
    if args.prepare:
        for flag, folder in (("--model", args.model), ("--data-dir", args.data_dir)):
            if not folder or not Path(folder).is_dir():
                return f"--prepare needs {flag} and a folder that exists, not {folder}"
        return None
    if not args.table:
        return "nothing to do: give --table, --prepare or --small"
    if settings.small:
        return None
    tasks = Path(settings.folder) / "tasks.npz"
    if not tasks.exists():
        return f"{tasks} does not exist: run --prepare first, or name its --folder"
    stored = set(np.load(tasks).files)
    if missing := [task for task in (*args.tasks, *args.tune_tasks) if f"{task}.0.ids" not in stored]:
        return f"{tasks} holds no task {missing[0]}"


# What --family llama is of, and --small, unless a flag says otherwise.
LLAMA_ARGS = {"folder": "runs/compare-smollm2", "out": HERE / "results" / "compare_smollm2.jsonl",
              "dtype": "bfloat16", "budget": 18_697, "budgets": [5_000, 59_000, 74_790], "warmup": 150,
              "max_length": 256, "tasks": ["cola", "qnli", "mnli", "sst2"], "tune_tasks": ["cola", "qnli"],
              "tune_seeds": [100]}
SMALL_ARGS = {**SMALL, "table": list(TABLES), "tasks": ["toy"], "budget": 600, "budgets": [300], "seeds": [0, 1],
              "out": Path("runs") / "compare-small" / "compare.jsonl"}


def parser_of():
    """The command line's: its own flags, and one for each of the Settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.print_usage = lambda _: None                             # a mistake is one line
    add = parser.add_argument
    add("--table", nargs="+", choices=TABLES, default=[])
    add("--prepare", action="store_true")
    add("--model", help="for --prepare: the backbone's folder")
    add("--data-dir", help="for --prepare: the folder that holds <task>/<split>.parquet")
    add("--out", type=Path, default=HERE / "results" / "compare.jsonl")
    add("--tasks", nargs="+", choices=[*FILES, "toy"], default=["qnli", "mnli", "sst2"], help="for --prepare, too")
    add("--methods", nargs="+", choices=list(METHODS), help="of --table's, these alone, the first first")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    add("--tune-seeds", nargs="+", type=int, default=[100, 101])
    add("--tune-tasks", nargs="+", help="default: all of --tasks")
    add("--lr", type=float, help="one re-training rate for all, instead of choosing")
    add("--budget", type=int, default=10_000)
    add("--budgets", nargs="+", type=int, default=[3_000, 25_000, 45_000], help="of --table budgets")
    add("--workers", type=int, default=0)
    for field in dataclasses.fields(Settings):
        if field.name != "workers":
            kind = {"action": "store_true"} if field.type is bool else {"default": field.default, "type": field.type}
            add(f"--{field.name.replace('_', '-')}", **kind)
    return parser


def main(arguments=None):
    parser = parser_of()
    args = parser.parse_args(arguments)
    if args.family == "llama":
        parser.set_defaults(**LLAMA_ARGS)
    if args.small:
        parser.set_defaults(**SMALL_ARGS, tune_tasks=None)
    args = parser.parse_args(arguments)
    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    args.tune_tasks = args.tune_tasks or args.tasks
    try:
        if mistake := mistake_in(args, settings):
            parser.error(mistake)
        if args.prepare:
            prepare(args.model, args.data_dir, settings, args.tasks)
        if args.table:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            carry_out_all(args, settings)
    except bipeft.UsageError as mistake:
        parser.error(str(mistake))
    except (KeyboardInterrupt, BrokenProcessPool, torch.AcceleratorError):
        sys.exit(f"stopped, or a worker died; the same command goes on from {args.out}")


if __name__ == "__main__":
    main()
