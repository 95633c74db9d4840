"""Whether the search has learnt the task, and whether it then beats chance: the toy, eight seeds.

    python docs/experiments/toy_against_chance.py

Needs no more than bipeft.py. The toy's own search (`--task toy`) at 1 % of the backbone; its structure, one
look at s-bar when the warm-up ends, and three random structures of the same size are re-trained alike.
Prints a line a seed: the search's mean training loss over the last 25 steps of its warm-up (0.347: even
odds), and each structure's test accuracy and test loss in nats a target token.
"""

import argparse
import functools
import itertools
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bipeft                                                                      # noqa: E402
from against_chance import random_structure                                        # noqa: E402

WARMUP, STEPS, TRIGGERS, LR = 252, 315, 30, 3e-3                 # what `--task toy` comes to


@torch.no_grad()
def judge(model, tokenizer, tokens, examples):
    """(accuracy in per cent, mean loss of a target token) on the test split."""
    texts = bipeft.predict(model, tokenizer, tokens, 250, "cpu")
    total = sum(bipeft.loss_of(model(**batch)).item() * int((batch["labels"] != -100).sum())
                for batch in bipeft.Batches(tokens, 250, "cpu"))
    return bipeft.accuracy(texts, [e.answers for e in examples]), total / sum(len(target) for _, target in tokens)


def one_seed(seed, budget, epochs):
    """(search loss, {structure: (accuracy, loss)})."""
    model, tokenizer = bipeft.toy_backbone(seed)
    splits = bipeft.toy_splits(seed)
    tokens = {key: bipeft.tokenize(tokenizer, part, 32) for key, part in splits.items()}
    space, losses, look = bipeft.Space(model, "s2", seed=seed), [], {}
    budget = int(budget * bipeft.geometry(model)["parameters"])

    def after_step(run, line):
        losses.append(line["loss_train"])
        if line["step"] == WARMUP:
            look["s"] = run.smoothed.tolist()

    halves = [bipeft.Batches(tokens["train"][i::2], 32, "cpu", seed + i) for i in (0, 1)]
    found = {"bipeft": bipeft.search(model, space, *halves, budget, STEPS, after_step=after_step, warmup=WARMUP,
                                     triggers=TRIGGERS, lr=LR, seed=seed)}
    nothing = [0] * len(space)
    found["one look"] = space.structure(
        *bipeft.fill_budget(look["s"], space.sizes.tolist(), nothing, nothing, budget), budget)
    found |= {f"random {i}": random_structure(space, budget, 1000 * seed + i) for i in range(3)}
    space.detach()
    results = {}
    for name, structure in found.items():
        peft = bipeft.apply(model, structure, seed)
        bipeft.train(model, peft, bipeft.Batches(tokens["train"], 32, "cpu", seed), itertools.count().__next__, epochs,
                     LR, seed=seed)                              # a count: the last epoch is the best
        results[name] = judge(model, tokenizer, tokens["test"], splits["test"])
        peft.detach()
    return sum(losses[WARMUP - 25:WARMUP]) / 25, results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--budget", type=float, default=0.01)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    work = functools.partial(one_seed, budget=args.budget, epochs=args.epochs)
    with ProcessPoolExecutor(args.jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for seed, (loss, results) in zip(args.seeds, pool.map(work, args.seeds)):
            if seed == args.seeds[0]:
                print("| seed | search loss | " + " | ".join(results) + " |\n" + "| --- " * (len(results) + 2) + "|")
            print(f"| {seed} | {loss:.3f} | " + " | ".join(f"{a:.1f} ({x:.3f})" for a, x in results.values()) + " |",
                  flush=True)


if __name__ == "__main__":
    main()
