"""Does the search search?  Ten teachers with known modules, and what a student makes of half the size.

    python docs/experiments/teacher_student.py               10 seeds, 2 processes
    python docs/experiments/teacher_student.py --short       2 seeds, fewer steps, nothing written

Needs no more than bipeft.py itself. Prints a table and writes results/teacher_student.json.

A teacher is a tiny random T5 with a dozen modules of S2, at random places and ranks, with random
weights. It labels random inputs with its distribution over the vocabulary. The student is the bare
T5; its loss is KL(teacher ‖ student) per position, so that 0 can be reached with the teacher's own
modules. The budget is 45 % of the teacher's parameters. Every structure below is re-trained in the
same way, from fresh weights, and judged on fresh inputs:

    bipeft    found by the search
    greedy    one look at s-bar after the search's warm-up: the most sensitive modules that fit
    random    five structures drawn at random, places and ranks, until the budget is full (APET)
    cut       the teacher's own places and ranks, without those it would miss least
    whole     all of the teacher's places: more than twice the budget
    bare      no modules

Losses are compared, not places: other modules can stand in. Settings were chosen on seeds 100-102.
"""

import argparse
import functools
import json
import math
import random
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bipeft                                                                      # noqa: E402

FULL = {"warmup": 300, "triggers": 50, "search_steps": 600, "train_steps": 400}
SEARCH_LR, ARCH_LR, TRAIN_LR = 1e-2, 1e-2, 3e-2
RANKS, PLACES, SHARE = (1, 4, 8), 12, 0.45
BATCH, LENGTH, VOCABULARY, TRAIN_BATCHES, TEST_BATCHES = 32, 8, 32, 32, 16


class Student(nn.Module):
    """A T5 whose forward returns KL(target ‖ its own distribution), in nats per position."""

    def __init__(self, t5):
        super().__init__()
        self.t5 = t5

    def log_probabilities(self, input_ids, decoder_input_ids):               # [batch, length] each
        return self.t5(input_ids=input_ids, decoder_input_ids=decoder_input_ids).logits.log_softmax(-1)

    def forward(self, input_ids, decoder_input_ids, target):
        own = self.log_probabilities(input_ids, decoder_input_ids)
        return (target.exp() * (target - own)).sum(-1).mean()


def tiny_t5(seed, width=32):
    """A random T5 of 2 + 2 layers whose blocks matter: small embeddings, sharp attention, clear output."""
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(seed)
        t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(
            vocab_size=VOCABULARY, d_model=width, d_kv=width // 4, d_ff=2 * width, num_layers=2, num_heads=4,
            dropout_rate=0.0, decoder_start_token_id=0, tie_word_embeddings=False))
        t5.shared.weight.normal_(0, 0.3)                           # against blocks whose outputs are near 1
        t5.lm_head.weight.normal_(0, 2 / math.sqrt(width))
        for p in (p for name, p in t5.named_parameters() if name.endswith(".q.weight")):
            p.mul_(2)
    return t5


def teach(student, space, seed):
    """Draws a teacher and labels random inputs with it.

    Returns (train batches, test batches, its structure, the same cut to the budget).
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    chosen = sorted(rng.sample(range(len(space)), PLACES))
    kept = [n in chosen for n in range(len(space))]
    choice = [rng.randrange(len(RANKS)) if ranked else 0 for ranked in space.ranked.tolist()]
    whole = space.structure(kept, choice, int(space.sizes[:, -1].sum()))
    teacher = bipeft.apply(student, whole, seed)

    def batches(count):
        for _ in range(count):
            source, given = torch.randint(VOCABULARY, (2, BATCH, LENGTH), generator=generator)
            yield {"input_ids": source, "decoder_input_ids": given, "target": student.log_probabilities(source, given)}

    with torch.no_grad():
        for p in teacher.modules_.parameters():                    # each map about as large as its input
            p.normal_(0, p.shape[-1] ** -0.5 if p.ndim == 2 else 1, generator=generator)
        train, test = list(batches(TRAIN_BATCHES)), list(batches(TEST_BATCHES))
    missed = [-math.inf] * len(space)                              # the loss without a teacher's module
    for n, module in zip(chosen, teacher.modules_):
        module.active = False
        missed[n] = loss_on(student, train[:4])
        module.active = True
    teacher.detach()
    budget = int(SHARE * whole.parameters)
    kept, choice = bipeft.fill_budget(missed, space.sizes.tolist(), kept, choice, budget)
    return train, test, whole, space.structure(kept, choice, budget)


@torch.no_grad()
def loss_on(student, batches):
    return sum(student(**batch).item() for batch in batches) / len(batches)


def retrain(student, structure, train, test, steps, seed):
    """The test loss of a structure after training fresh weights."""
    peft = bipeft.apply(student, structure, seed)
    tensors = list(peft.modules_.parameters())
    optimizer = torch.optim.AdamW([peft.weights], lr=TRAIN_LR, weight_decay=1e-4)
    for step in range(steps):
        found = torch.autograd.grad(student(**train[step % len(train)]), tensors, materialize_grads=True)
        peft.weights.grad = torch.cat([g.flatten() for g in found])
        optimizer.param_groups[0]["lr"] = TRAIN_LR * (1 - step / steps)
        optimizer.step()
    loss = loss_on(student, test)
    peft.detach()
    return loss


def fill(space, score, choice, budget):
    """The structure of the highest-scored modules that fit, at the ranks given while they do."""
    costs = space.sizes.tolist()
    given, nothing = [[row[k]] for row, k in zip(costs, choice)], [0] * len(space)
    kept, _ = bipeft.fill_budget(score, given, nothing, nothing, budget)
    return space.structure(*bipeft.fill_budget(score, costs, kept, choice, budget), budget)


def compare(seed, warmup=100, triggers=30, search_steps=200, train_steps=150, randoms=5, references=False):
    """One seed; the defaults are the short form.   references: also judge greedy, cut and whole.

    Returns {"bipeft": test loss, "bare": .., "random": [test losses], "modules": {name: {kind: count}}, ..}.
    """
    student = Student(tiny_t5(seed)).eval()
    space = bipeft.Space(student, "s2", RANKS, seed)               # until it is trained it adds exactly 0
    train, test, whole, cut = teach(student, space, seed)
    found = {"whole": whole, "cut": cut}

    def look(run, line):
        if line["step"] == warmup:
            choice = torch.where(run.fixed, run.choice, run.phi.argmax(1))
            found["greedy"] = fill(run.space, run.smoothed.tolist(), choice.tolist(), cut.budget)

    found["bipeft"] = bipeft.search(student, space, train[::2], train[1::2], cut.budget, search_steps, after_step=look,
                                    warmup=warmup, triggers=triggers, lr=SEARCH_LR, arch_lr=ARCH_LR, seed=seed)
    space.detach()
    rng = random.Random(seed)
    for i in range(randoms):
        scores, choice = [rng.random() for _ in space.names], [rng.randrange(len(RANKS)) for _ in space.names]
        found[f"random {i}"] = fill(space, scores, choice, cut.budget)
    losses = {name: retrain(student, structure, train, test, train_steps, seed) for name, structure in found.items()
              if references or name == "bipeft" or name.startswith("random")}
    drawn = [losses.pop(f"random {i}") for i in range(randoms)]
    return {"seed": seed, "budget": cut.budget, "bare": loss_on(student, test), **losses, "random": drawn,
            "modules": {name: dict(Counter(m["kind"] for m in structure.modules)) for name, structure in found.items()}}


def table(rows):
    """The results as markdown: a row a seed, then mean, deviation, and in how many seeds bipeft is lower."""
    flat = [{**row, **{f"random {name}": np.quantile(row["random"], q) for name, q in
                       (("best", 0), ("median", 0.5), ("worst", 1))}} for row in rows]
    columns = ("bipeft", "greedy", "random best", "random median", "random worst", "cut", "whole", "bare")
    lines = [("seed", *columns, "randoms beaten"), ("---",) * (len(columns) + 2)]
    lines += [(str(row["seed"]), *(f"{row[c]:.3f}" for c in columns),
               f"{sum(row['bipeft'] < x for x in row['random'])} of {len(row['random'])}") for row in flat]
    lines += [(name, *(f"{of([row[c] for row in flat]):.3f}" for c in columns), "")
              for name, of in (("mean", np.mean), ("deviation", functools.partial(np.std, ddof=1)))]
    lines += [("bipeft lower", "", *(f"{sum(row['bipeft'] < row[c] for row in flat)} of {len(flat)}" for c in columns[1:]), "")]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", help="default 0 .. 9")
    parser.add_argument("--short", action="store_true", help="about a third of the steps, 2 seeds, nothing written")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    for key, value in FULL.items():
        parser.add_argument("--" + key.replace("_", "-"), type=int, help=f"default {value}")
    args = parser.parse_args()
    lengths = {key: getattr(args, key) or FULL[key] for key in FULL if getattr(args, key) or not args.short}
    one_seed = functools.partial(compare, **lengths, references=True)
    with ProcessPoolExecutor(args.jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        rows = list(pool.map(one_seed, args.seeds or range(2 if args.short else 10)))
    print(table(rows))
    if not args.short:
        lengths |= {"search_lr": SEARCH_LR, "arch_lr": ARCH_LR, "train_lr": TRAIN_LR}
        out = Path(__file__).parent / "results" / "teacher_student.json"
        out.write_text(json.dumps({"settings": lengths, "seeds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
