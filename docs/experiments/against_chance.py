"""BIPEFT's structure against structures that no search was needed for, on real tasks.

    python docs/experiments/against_chance.py --model DIR --data-dir DIR --stage rates      which rates learn
    python docs/experiments/against_chance.py --model DIR --data-dir DIR --stage search     at which a search does
    python docs/experiments/against_chance.py --model DIR --data-dir DIR --stage compare    the comparison

Needs only the project's own packages. Every structure gets the same re-training on the same
examples; one budget for all but LoRA and the whole space. One line of JSON a training goes to --out;
a training whose line is there is not run again. --workers share the GPUs. `--stage table` prints the means.
"""

import argparse
import json
import random
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bipeft

DATA = ("sst2-2000", "sst2-16000", "mrpc", "cola", "rte", "qnli", "mnli")
SEARCHED, FIXED = ("bipeft", "one-look"), ("random-0", "random-1", "random-2", "lora", "all")
MOST = {"validation": 500, "test": 1500}          # examples judged, at most


def examples_of(name, data_dir, seed):
    """(task, splits) of one of DATA; qnli and mnli are cut from their validation files."""
    task, _, size = name.partition("-")
    if task in ("qnli", "mnli"):
        rows = bipeft.read_split(task, "validation_matched" if task == "mnli" else "validation", data_dir)
        random.Random(seed).shuffle(rows)
        examples = [e for row in rows for e in bipeft.to_examples(task, row, True)]
        splits = {"validation": examples[:500], "test": examples[500:2000], "train": examples[2000:]}
    else:
        splits = bipeft.load_splits(task, data_dir, seed)
    if size:
        splits["train"] = splits["train"][:int(size)]
    return task, {key: part[:MOST.get(key, len(part))] for key, part in splits.items()}


def random_structure(space, budget, seed):
    """Modules in random order, each at a random rank, or the largest smaller one that fits."""
    rng, costs, free = random.Random(seed), space.sizes.tolist(), budget
    kept, choice = [False] * len(space), [0] * len(space)
    for n in rng.sample(range(len(space)), len(space)):
        fitting = [k for k in range(rng.randrange(len(space.ranks)) + 1) if costs[n][k] <= free]
        if fitting:
            kept[n], choice[n] = True, fitting[-1]
            free -= costs[n][fitting[-1]]
    return space.structure(kept, choice, budget)


def fixed_structures(space, budget, seed):
    """Those that need no search."""
    whole = [len(space.ranks) - 1] * len(space)
    lora = [kind == "lora" and name.split(".")[-2] in "qv" for name, kind in zip(space.names, space.kinds)]
    found = {f"random-{i}": random_structure(space, budget, 1000 * seed + i) for i in range(3)}
    return {**found, "lora": space.structure(lora, whole, 10**9), "all": space.structure([True] * len(space), whole, 10**9)}


class Bench:
    """A backbone, a task's tokens and the trainings on them."""

    def __init__(self, args, data, seed):
        torch.set_num_threads(1)
        self.args, self.data, self.seed, self.device = args, data, seed, bipeft.choose_device(args.device)
        self.task, self.splits = examples_of(data, args.data_dir, seed)
        self.model, self.tokenizer = bipeft.load_backbone(args.model, args.dtype, self.device, seed)
        self.graphs = self.device.type == "cuda"
        if self.graphs:
            bipeft.fuse_norms(self.model)
        self.tokens = {key: bipeft.tokenize(self.tokenizer, part, 128) for key, part in self.splits.items()}
        self.budget = int(args.budget * bipeft.geometry(self.model)["parameters"])

    def batches(self, part, seed=None):
        return bipeft.Batches(part, self.args.batch_size, self.device, seed)

    def score(self, split):
        texts = bipeft.predict(self.model, self.tokenizer, self.tokens[split], 128, self.device)
        return bipeft.METRICS[bipeft.TASKS[self.task].metric](texts, [e.answers for e in self.splits[split]])

    @torch.no_grad()
    def loss(self, split):
        """Mean cross-entropy of a target token, in nats."""
        self.model.eval()
        total = count = 0
        for batch in self.batches(self.tokens[split]):
            tokens = int((batch["labels"] != -100).sum())
            total, count = total + tokens * float(bipeft.loss_of(self.model(**batch))), count + tokens
        return total / count

    def search(self, lr):
        """BIPEFT's structure, and the one picked by a look at s-bar when the warm-up ends."""
        space = bipeft.Space(self.model, "s2", seed=self.seed)
        half = self.tokens["train"][::2], self.tokens["train"][1::2]
        looks, losses, started = {}, [], time.time()

        def after_step(run, line):
            losses.append(line["loss_train"])
            if line["step"] == self.args.search_warmup:
                looks["s"] = run.smoothed.tolist()
        structure = bipeft.search(
            self.model, space, *(self.batches(part, self.seed) for part in half), self.budget, self.args.search_steps,
            after_step=after_step, warmup=self.args.search_warmup, lr=lr, seed=self.seed,
            run_pass=bipeft.fast_pass(self.model, space, self.graphs))
        n = len(space)
        kept, choice = bipeft.fill_budget(looks["s"], space.sizes.tolist(), [False] * n, [0] * n, self.budget)
        found = {"bipeft": structure, "one-look": space.structure(kept, choice, self.budget)}
        space.detach()
        learnt = np.mean(losses[self.args.search_warmup - 25:self.args.search_warmup])
        return found, {"search_seconds": time.time() - started, "search_loss": learnt, "search_steps": len(losses),
                       "search_lr": lr, "search_curve": [np.mean(losses[i:i + 50]) for i in range(0, len(losses), 50)]}

    def train(self, method, structure, lr):
        """Re-trains a structure and returns its line."""
        started, curve = time.time(), []
        peft = bipeft.apply(self.model, structure, self.seed)
        batches = self.batches(self.tokens["train"], self.seed)
        epochs = max(1, round(self.args.steps / len(batches)))
        best = bipeft.train(self.model, peft, batches, lambda: self.score("validation"), epochs, lr, seed=self.seed,
                            graphs=self.graphs,
                            after_step=lambda _, line: curve.append(line["score"]) if "score" in line else None)
        line = {"data": self.data, "seed": self.seed, "method": method, "lr": lr, "epochs": epochs,
                "steps": epochs * len(batches), "parameters": structure.parameters, "modules": len(structure.modules),
                "kinds": {k: sum(m["kind"] == k for m in structure.modules) for k in bipeft.KINDS},
                "validation": best, "curve": curve, "test": self.score("test"), "loss": self.loss("test")}
        peft.detach()
        common = max({e.target for e in self.splits["train"]}, key=[e.target for e in self.splits["train"]].count)
        line["majority"] = bipeft.METRICS[bipeft.TASKS[self.task].metric](
            [common] * len(self.splits["test"]), [e.answers for e in self.splits["test"]])
        return {**line, "seconds": time.time() - started}


def work(args, number, queue, results):
    """A worker: jobs until the queue is empty."""
    if args.device == "auto" and torch.cuda.is_available():
        args.device = f"cuda:{number % torch.cuda.device_count()}"
    while (job := queue.get()) is not None:
        stage, data, seed, methods, rates = job
        try:
            bench = Bench(args, data, seed)
            if stage == "search":
                results.put({"stage": stage, "data": data, "seed": seed, "method": "bipeft", "lr": rates[0],
                             **bench.search(rates[0])[1]})
                continue
            if stage == "compare" and set(methods) <= set(SEARCHED):
                found, told = bench.search(args.search_lr)
            else:
                space = bipeft.Space(bench.model, "s2", seed=seed)
                found, told = fixed_structures(space, bench.budget, seed), {}
                space.detach()
            for method in methods:
                for lr in rates:
                    line = bench.train(method, found[method], lr)
                    results.put({"stage": stage, **line, **told})
        except Exception as error:
            results.put({"stage": stage, "data": data, "seed": seed, "error": repr(error)})
    results.put(None)


def jobs_of(args, done):
    """The trainings that are not done yet, as (stage, data, seed, methods, rates)."""
    wanted = ("lora", "random-0", "all")
    for data in args.data:
        for seed in args.seeds if args.stage == "compare" else args.seeds[:1]:
            rates = [args.lr] if args.stage == "compare" else args.rates
            if args.stage == "search":
                yield from (("search", data, seed, ["bipeft"], [r]) for r in args.rates
                            if ("search", data, seed, "bipeft", r) not in done)
            elif args.stage == "rates":
                yield from (("rates", data, seed, [m], [r]) for m in wanted for r in rates
                            if ("rates", data, seed, m, r) not in done)
            else:                                   # the two of one search go together
                for methods in (SEARCHED, *((m,) for m in FIXED)):
                    if missing := [m for m in methods if ("compare", data, seed, m, args.lr) not in done]:
                        yield "compare", data, seed, missing, rates


def table(lines, stage):
    """The means over seeds, as markdown."""
    cells = defaultdict(list)
    for line in lines:
        if line.get("stage") == stage and "error" not in line:
            method = line["method"].partition("-")[0] if line["method"].startswith("random") else line["method"]
            cells[line["data"], method, line["lr"]].append(line)
    print("| data | structure | lr | parameters | test score | test loss | majority | trainings |\n" + "| --- " * 8 + "|")
    for (data, method, lr), found in sorted(cells.items(), key=lambda item: (DATA.index(item[0][0]), item[0][1:])):
        show = lambda key, digits: (f"{np.mean([x[key] for x in found]):.{digits}f} ± "
                                    f"{np.std([x[key] for x in found], ddof=len(found) > 1):.{digits}f}")
        print(f"| {data} | {method} | {lr:g} | {np.mean([x['parameters'] for x in found]):,.0f} | {show('test', 1)} | "
              f"{show('loss', 4)} | {np.mean([x['majority'] for x in found]):.1f} | {len(found)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("rates", "search", "compare", "table"), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", default="docs/experiments/results/against_chance.jsonl")
    parser.add_argument("--data", nargs="+", default=DATA, choices=DATA)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--search-lr", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--search-steps", type=int, default=800)
    parser.add_argument("--search-warmup", type=int, default=400)
    parser.add_argument("--budget", type=float, default=0.005)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    if args.stage != "table":
        done = {(x["stage"], x["data"], x["seed"], x["method"], x["lr"]) for x in lines if "error" not in x}
        context = mp.get_context("spawn")
        queue, results = context.Queue(), context.Queue()
        jobs = sorted(jobs_of(args, done), key=lambda job: len(job[3]), reverse=True)      # the longest first
        for job in jobs + [None] * args.workers:
            queue.put(job)
        workers = [context.Process(target=work, args=(args, i, queue, results)) for i in range(args.workers)]
        for worker in workers:
            worker.start()
        running, started = args.workers, time.time()
        while running:
            line = results.get()
            running -= line is None
            if line is not None:
                lines.append(line)
                with out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                short = {key: line[key] for key in line if key not in ("curve", "kinds", "search_curve")}
                print(f"{time.time() - started:.0f} s", short, flush=True)
    if args.stage != "search":
        table(lines, "compare" if args.stage == "table" else args.stage)


if __name__ == "__main__":
    main()
