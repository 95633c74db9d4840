"""What compare.py's lines say: tables as markdown on stdout, and figures.

    python docs/experiments/comparison/report.py [--lines docs/experiments/comparison/results/compare.jsonl]
        [--beside docs/experiments/comparison/results/compare_smollm2.jsonl] [--figures docs/figures]

Reported are trainings at their method's chosen rate, on seeds that no rate was chosen on. A cell is a task and a seed;
a pair is BIPEFT and another method in one: plus means that BIPEFT is better, unless a table says otherwise.
"""

import argparse
import itertools
import textwrap
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import compare
from harness import bipeft
from baselines import ABLATIONS, METHODS, PLAIN, SENSITIVITY
from palette import KINDS
from report_figures import CLIPPED, FIGURES, OTHERS, RIVALS, draw, draw_ratios, size
from stats import contrasts, interval, jaccard, jaccard_by_chance, shown, signed

HERE = Path(__file__).resolve().parent
TIMED = 900                                               # the seed of compare.py --table cost
LATER = set(range(5, 10))                                 # seeds that were added when 0 to 4 had been read
NOTES = ["boolq", "multirc"]
CHANCE = {"cola": 0, "qnli": 50, "mnli": 36, "sst2": 51, "toy": 50}                   # always the most frequent
BAD = {("mnli", 3), ("mnli", 6), ("qnli", 2)}             # SmolLM2's cells where BIPEFT without clipping went wrong
FAILED = 5                                                # points above that, at most: a training that failed


# 1. What there is: the lines, sorted out

class Data:
    """The lines of a results file, what is reported of them, and the rate of each method.
    Where a rate is not chosen yet, the trainings at the most frequent one are reported.
    note: of the NOTES, tasks with a table of their own, the one that it is of, instead of all others.
    """

    def __init__(self, lines, note=None):
        others = {x.get("task") for x in lines} - {*NOTES}
        lines = [x for x in lines if x.get("tuning") or x.get("task") in ({None, note} if note else others)]
        trained = [x for x in lines if x["stage"] == "train" and x["method"] in METHODS and "error" not in x]
        counts = Counter(x["budget"] for x in trained if not x["tuning"]) or Counter(x["budget"] for x in trained)
        self.budget = max(counts, key=counts.get, default=0)
        self.tuning = once(x for x in trained if x["tuning"])
        self.tasks = list(dict.fromkeys(x["task"] for x in trained))
        first = next((x for x in lines if x["stage"] == "places"), {})
        self.places, self.backbone = first.get("places", []), first.get("backbone_parameters")
        seeds = sorted({x["seed"] for x in self.tuning})
        tuned = list(dict.fromkeys(x["task"] for x in self.tuning))
        family = first.get("settings", {}).get("family", "bert")
        args = SimpleNamespace(tune_tasks=tuned, tune_seeds=seeds, family=family)
        plan = compare.Plan([], lines, args)
        budgets = {x["budget"] for x in trained} if seeds else set()
        self.rates = {(name, budget): plan.rate(name, budget)[0] for name in METHODS for budget in budgets}
        found = [x for x in lines if x["stage"] == "find" and x.get("method") in METHODS]
        self.searches = once(x for x in found if x["seed"] not in (*seeds, TIMED))
        self.timed = once(x for x in trained + found if x["seed"] == TIMED and x["workers"] == 1)
        self.scored = once(x for x in trained if not x["tuning"] and x["seed"] not in (*seeds, TIMED))
        at = defaultdict(Counter)
        for x in self.scored:
            at[x["method"], x["budget"]][x["lr"]] += 1
        at = {of: self.rates.get(of) or max(count, key=count.get) for of, count in at.items()}
        self.reported = [x for x in self.scored if x["lr"] == at[x["method"], x["budget"]]]

    def order(self, budget):
        """A key that sorts budgets, the main one first."""
        return budget != self.budget, budget

    def of(self, name, budget=None, source=None):
        """A method's reported trainings.   source: the task whose structure it is, if another's."""
        return [x for x in self.reported if (x["method"], x["budget"], x["source"]) == (
            name, budget or self.budget, source)]

    def scores(self, names, budget=None):
        """{name: {(task, seed): test score}} of those that have any."""
        found = {name: {(x["task"], x["seed"]): x["test"] for x in self.of(name, budget)} for name in names}
        return {name: cells for name, cells in found.items() if cells}

    def found(self, name, budget=None):
        """A method's searches."""
        return [x for x in self.searches if x["method"] == name and x["budget"] == (budget or self.budget)]

    def kinds(self, name, budget=None):
        """{kind: mean number of modules in a method's structures}, the most frequent first."""
        found = self.found(name, budget) if self.places else []
        count = Counter(self.places[i].rpartition(".")[2] for x in found for i in places(x))
        return {kind: n / len(found) for kind, n in count.most_common()}

    def failed(self, names, budget=None):
        """{name: {(task, seed): test score}} of trainings that end at CHANCE, or within FAILED points of it."""
        found = {name: failing(cells) for name, cells in self.scores(names, budget).items()}
        return {name: cells for name, cells in found.items() if cells}

    def contrasts(self, names, budget=None, seeds=None, without=None, of="BIPEFT"):
        """Of a method against each of a family; what is not under the budget is a family of its own for Holm. Of a
        run that was cut off a seed that lacks a task doesn't count: its mean would be of other tasks.
        seeds: which alone count, if not all.   without: {name: cells} that don't count.
        """
        scores = {}
        for name, cells in self.scores([of, *names], budget).items():
            left_out = (without or {}).get(name, ())
            scores[name] = {cell: score for cell, score in whole_seeds(cells).items()
                            if (seeds is None or cell[1] in seeds) and cell not in left_out}
        base = scores.pop(of, {})
        free = {name: scores.pop(name) for name in list(scores) if METHODS[name].free}
        return {**contrasts(base, scores), **contrasts(base, free)}


def whole_seeds(cells):
    """Those cells, {(task, seed): score}, whose seed has all tasks."""
    tasks, held = {task for task, _ in cells}, Counter(seed for _, seed in cells)
    return {cell: score for cell, score in cells.items() if held[cell[1]] == len(tasks)}


def failing(cells):
    """Those cells, {(task, seed): score}, that end at CHANCE, or within FAILED points of it."""
    return {cell: score for cell, score in cells.items() if score <= CHANCE[cell[0]] + FAILED}


def once(lines):
    """Of lines of the same job the last."""
    keys = ("method", "task", "budget", "seed", "source", "lr")
    return list({tuple(x.get(key) for key in keys): x for x in lines}.values())


def mean(values, digits=1):
    """As text, without what is None."""
    return shown(values, digits).partition(" ")[0]


def table(head, rows):
    """Markdown."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) if rows else "no data yet"


# 2. Tables

def rates(data):
    """Mean validation score at each rate tried, the chosen one bold, at each budget."""
    rows = []
    for budget, name in itertools.product(sorted({x["budget"] for x in data.tuning}, key=data.order), METHODS):
        tried = defaultdict(list)
        for x in data.tuning:
            if (x["method"], x["budget"]) == (name, budget):
                tried[x["lr"]].append(x["validation"])
        if tried:
            chosen, most = data.rates[name, budget], max(map(len, tried.values()))
            cells = [f"{lr:g}: {np.mean(s):.1f}" + (f" ({len(s)} of {most})" if len(s) < most else "")
                     for lr, s in sorted(tried.items())]
            cells = [f"**{cell}**" if lr == chosen else cell for lr, cell in zip(sorted(tried), cells)]
            edge = {min(tried): "lowest", max(tried): "highest"}.get(chosen, "")
            told = "–" if chosen is None else f"{chosen:g}"
            rows.append([size(data, budget), name, ", ".join(cells), told, edge])
    return table(["budget (of 10,000)", "method", "rate: mean validation score", "chosen", "edge"], rows)


def score_table(data, names, budget=None, extra=()):
    """A row a method: scores, sizes, cost.   extra: (heading, function of the method's searches) each.
    Numbers are of those of BIPEFT's cells that most methods share; a method that lacks some is shown by all it has.
    """
    scores, rows = data.scores(names, budget), []
    every = set(scores.get("BIPEFT") or itertools.chain(*scores.values()))
    held = Counter(frozenset(every & set(cells)) for cells in scores.values())
    common = max(held, key=held.get, default=frozenset())
    tasks = [task for task in data.tasks if task in {of for of, _ in common}]
    for name in scores:
        whole = common <= set(scores[name])
        cells = common if whole else set(scores[name])
        own, looked = ([x for x in of(name, budget) if (x["task"], x["seed"]) in cells] for of in (data.of, data.found))
        if own:
            tests = [[x["test"] for x in own if x["task"] == task] for task in tasks]
            together = f"{np.mean([np.mean(t) for t in tests]):.1f}" if all(tests) and whole else "–"
            passes, parameters = (np.mean([x[key] for x in own]) for key in ("passes", "parameters"))
            fte = f"{np.mean([x['passes'] for x in looked]) / passes:.2f}" if looked else "–"
            rows.append([name, *map(shown, tests), together, size(data, parameters),
                         mean([x["modules"] for x in own]), "0" if METHODS[name].cheap else fte, len(own),
                         *(of(looked) for _, of in extra)])
    head = ["method", *tasks, "mean", "parameters (of 10,000)", "modules", "FTE", "trainings"]
    return table(head + [heading for heading, _ in extra], rows)


def contrast_table(found, tasks, head="BIPEFT −"):
    """A row a Contrast: means by task, over all pairs, its interval, and tests."""
    tasks, rows = [task for task in tasks if any(task == of for c in found.values() for of, *_ in c.pairs)], []
    for name, c in found.items():
        by_task = [[d for (of, *_), d in c.pairs.items() if of == task] for task in tasks]
        rows.append([name, *(signed(np.mean(d)) if d else "–" for d in by_task), signed(c.mean),
                     f"{signed(c.mean - c.half)} to {signed(c.mean + c.half)}", interval(c),
                     f"{c.above} of {len(c.pairs)}", f"{c.p:.2g}", f"{c.holm:.2g}"])
    return table([head, *tasks, "mean", "95 %", "mean over seeds", "above", "p", "Holm"], rows)


def cost(data):
    """Table 3: seconds and memory of what ran alone on the device."""
    training, rows = defaultdict(list), []
    for x in data.timed:
        if x["stage"] == "train":
            training[x["method"], x["task"]].append(x["seconds"])

    def ratio(x, name):
        base = training.get((name, x["task"]))
        return x["seconds"] / np.mean(base) if base else None
    for stage, name in itertools.product(("find", "train"), METHODS):
        own = [x for x in data.timed if (x["stage"], x["method"]) == (stage, name)]
        if own and (stage == "train" or not name.startswith(("matched random", "s-bar at T"))):     # another's search
            seconds = [x["seconds"] for x in own], *([ratio(x, of) for x in own] for of in (name, "LoRA"))
            memory = [x["memory"] for x in own if x.get("memory")]
            rows.append([name, "search" if stage == "find" else "training", *(shown(s, 2) for s in seconds),
                         f"{np.mean([x['passes'] for x in own]):,.0f}", max(memory, default="–")])
    head = ["method", "of", "seconds", "÷ its re-training", "÷ LoRA's training", "passes", "peak MiB"]
    return table(head, rows)


def transfer(data):
    """Table 4: structures found on one task, trained on another, paired with its own; last the mean over others."""
    own = data.scores(["BIPEFT"]).get("BIPEFT", {})
    moved = {source: {(x["task"], x["seed"]): x["test"] for x in data.of("BIPEFT", source=source)}
             for source in data.tasks}
    seeds = {seed for cells in moved.values() for _, seed in cells}
    own = {cell: score for cell, score in own.items() if cell[1] in seeds}
    if not own or not any(moved.values()):
        return "no data yet"
    rows = []
    for source in data.tasks:
        cells = {**{cell: score for cell, score in own.items() if cell[0] == source}, **moved[source]}
        by_task = [[s for (on, _), s in cells.items() if on == task] for task in data.tasks]
        rows.append([source, *map(shown, by_task)])
    together = {cell: np.mean([cells[cell] for cells in moved.values() if cell in cells])
                for cell in set().union(*moved.values())}
    found = {**contrasts(own, moved), **contrasts(own, {"any other": together})}
    return (table(["found on", *data.tasks], rows) + "\n\n"
            + contrast_table(found, data.tasks, "the task's own − found on"))


def places(search):
    """The numbers of the places that a search keeps."""
    return {int(item.split(":")[0]) for item in search["structure"].split()}


def agreement(data):
    """Jaccard of two structures' places, mean ± sd over pairs: of two seeds, of two tasks, by chance; and the kinds."""
    rows = []
    for budget, name in itertools.product(sorted({x["budget"] for x in data.searches}), RIVALS):
        own, sets = data.found(name, budget), defaultdict(list)
        for x in own:
            sets[x["task"]].append(places(x))
        kinds = data.kinds(name, budget)
        if not kinds or len(own) < 2:
            continue
        space = next(space for space in bipeft.SPACES.values() if kinds.keys() <= set(space))
        pool = sum(place.rpartition(".")[2] in space for place in data.places)
        within = [pair for group in sets.values() for pair in itertools.combinations(group, 2)]
        across = [pair for one, other in itertools.combinations(sets.values(), 2)
                  for pair in itertools.product(one, other)]
        by_chance = [jaccard_by_chance(a, b, pool) for a, b in within + across]
        shares = [shown([jaccard(a, b) for a, b in pairs], 2) for pairs in (within, across)]
        shares.append(f"{np.mean(by_chance):.2f}" if by_chance else "–")
        kept = ", ".join(f"{n:.1f} {KINDS[kind]}" for kind, n in kinds.items() if n >= 0.05)
        rows.append([size(data, budget), name, len(own), *shares, kept])
    head = ["budget (of 10,000)", "method", "searches", "between seeds", "between tasks", "by chance", "modules"]
    return table(head, rows)


def shared(data, searches):
    """Jaccard of the places that each search and BIPEFT's of the same task and seed keep."""
    own = {(x["task"], x["seed"]): places(x) for x in data.found("BIPEFT")}
    return [jaccard(places(x), own[x["task"], x["seed"]]) for x in searches if (x["task"], x["seed"]) in own]


def table_1(data, budget):
    """Scores at a budget, pairs; pairs of the seeds that were added later."""
    seeds = {x["seed"] for x in data.of("BIPEFT", budget)}
    failed = data.failed(RIVALS, budget)
    whole = ["### Pairs without failed trainings", ended(failed),
             contrast_table(data.contrasts(OTHERS, budget, without=failed), data.tasks)] if failed else []
    later = [f"### Pairs on seeds {min(LATER)} to {max(LATER)} alone",
             contrast_table(data.contrasts(OTHERS, budget, seeds=LATER), data.tasks)] if seeds >= LATER else []
    counts = {name: len(cells) for name, cells in data.scores(RIVALS, budget).items()}
    longest = [name for name, count in counts.items() if count == max(counts.values())]
    more = ["### Scores of the methods with the most seeds",
            score_table(data, longest, budget)] if 2 * len(longest) < len(counts) else []
    share = f", {1e4 * budget / data.backbone:.2f} of 10,000" if data.backbone else ""
    return [f"## Table 1: test scores at {budget:,} parameters{share}",
            "Of the cells (task, seed) that all rows with a mean have.", score_table(data, RIVALS, budget), *more,
            f"### Pairs at {budget:,} parameters",
            "Plus: BIPEFT is better. 95 %: t interval of the mean over pairs; over seeds: of seeds' means, in brackets.\n"
            "p: exact sign-flip test over pairs (of seeds with all tasks). Holm: over the methods within the budget.",
            contrast_table(data.contrasts(OTHERS, budget), data.tasks), *whole, *later,
            *clipped_pairs(data, budget)]


def ended(failed):
    """Failed trainings, {name: {(task, seed): score}}, in a sentence."""
    told = "; ".join(f"{name} on {task}, seed {seed} ({score:.1f})" for name, cells in failed.items()
                     for (task, seed), score in cells.items()) or "none"
    return textwrap.fill(f"Within {FAILED} points of always the most frequent answer end: {told}.", 110)


def clipped_pairs(data, budget):
    """Pairs of the clipped search, where it was run."""
    cells, head = data.scores([CLIPPED], budget).get(CLIPPED, ()), "### Pairs of the clipped search"

    def pairs(without):
        others = [name for name in RIVALS if name != CLIPPED]
        return contrast_table(data.contrasts(others, budget, without=without, of=CLIPPED), data.tasks, f"{CLIPPED} −")
    parts = [head, pairs({})] if cells else []
    if cells and (failed := data.failed(RIVALS, budget)):
        parts += [f"{head} without failed trainings", pairs(failed)]
    if budget == data.budget and BAD <= set(cells):
        parts += [f"{head} but for three cells",
                  "Without mnli's seeds 3 and 6, by whose tests clipping was chosen, since BIPEFT's searches learnt\n"
                  "nothing there, and without qnli's seed 2, where BIPEFT's training went wrong.",
                  pairs({CLIPPED: BAD})]
    return parts


def retrainings(data):
    """Re-trainings in another way less the plain ones, each row a family of its own, also at rates not chosen."""
    every, rows = defaultdict(dict), []
    for x in data.scored:
        if x["source"] is None:
            every[x["method"], x["budget"], x["lr"]][x["task"], x["seed"]] = x["test"]
    for (name, budget, lr), cells in every.items():
        plain = every.get((PLAIN.get(name), budget, lr), {})
        cells = {cell: score for cell, score in cells.items() if cell in plain}
        plain = {cell: plain[cell] for cell in cells}
        sound = {cell: plain[cell] for cell in cells.keys() - failing(cells).keys() - failing(plain).keys()}
        for c in contrasts(cells, {name: plain}).values():
            rest = contrasts(cells, {name: sound}).get(name)
            rows.append([name, size(data, budget), f"{lr:g}", len(failing(plain)), len(failing(cells)), interval(c),
                         f"{c.above} of {len(c.pairs)}", f"{c.p:.2g}", interval(rest) if rest else "–", len(sound)])
    head = ["re-trained", "budget (of 10,000)", "rate", "failed, plain", "failed", "less plain", "above", "p",
            "where neither failed", "of pairs"]
    told = ("Pairs of one structure and rate, of seeds that lack a task, too; plus: better so. Failed: within "
            f"{FAILED} points of\nalways the most frequent answer; an error has no pair.")
    return ["## Other ways of re-training", told, table(head, sorted(rows))]


def family(data, heading, names, extra):
    """Scores of ablations or variants beside BIPEFT's, and pairs."""
    if not data.scores(names):
        return [f"## {heading}", "no data yet"]
    return [f"## {heading}", score_table(data, ["BIPEFT", *names], extra=extra),
            contrast_table(data.contrasts(names), data.tasks)]


def report(lines):
    """All tables, as one text."""
    data = Data(lines)
    parts = ["## Rates, chosen on seeds that are not reported", rates(data)]
    budgets = {x["budget"] for x in data.reported if x["method"] in ("BIPEFT", CLIPPED)}
    for budget in sorted(budgets, key=data.order) or [data.budget]:
        parts += table_1(data, budget)
    own = {size(data, of): cells for of in sorted(budgets) for cells in data.scores(["BIPEFT"], of).values()}
    own |= {f"random, {size(data, of)}": data.scores(["random"], of)["random"]             # Table 10
            for of in sorted(budgets) if of > data.budget and data.of("random", of)}
    base, head = own.pop(size(data, data.budget), {}), f"BIPEFT at {size(data, data.budget)} − at"
    parts += ["## Tables 5 and 10: other budgets", contrast_table(contrasts(base, own), data.tasks, head)]
    for name in (CLIPPED, f"{CLIPPED}, rising rate"):
        own = {size(data, of): data.scores([name], of).get(name, {}) for of in sorted(budgets)}
        if base := own.pop(size(data, data.budget), {}):
            parts.append(contrast_table(contrasts(base, own), data.tasks, head.replace("BIPEFT", name)))
    if data.scores(PLAIN):
        parts += retrainings(data)
    for note in NOTES:
        if (alone := Data(lines, note)).reported:
            parts += [f"## {note}, apart from the rest", score_table(alone, RIVALS),
                      contrast_table(alone.contrasts(RIVALS, of=CLIPPED), alone.tasks, f"{CLIPPED} −")]
    uncut = [("uncut", lambda of: shown([x.get("uncut") for x in of], 0))]
    parts += family(data, "Table 2: ablations", ABLATIONS, uncut)
    parts += ["## Table 3: cost, alone on the device", cost(data), "## Table 4: transfer", transfer(data)]
    used = [("steps", lambda of: mean([x.get("steps") for x in of], 0)),
            ("made up", lambda of: mean([x.get("made_up") for x in of], 0)),
            ("shared", lambda of: mean(shared(data, of), 2))]
    parts += family(data, "Tables 6–9, and own decisions", SENSITIVITY, used)
    parts += ["steps: when a search ends; made up: triggers carried out then; shared: places, by Jaccard, with "
              "BIPEFT's.",
              "## What is kept",
              "Jaccard: places that two structures share, over the places of either; modules: means over searches.",
              agreement(data)]
    return "\n\n".join(parts)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.print_usage = lambda _: None                                         # a mistake is one line
    parser.add_argument("--lines", type=Path, default=HERE / "results" / "compare.jsonl")
    parser.add_argument("--figures", type=Path, default=HERE.parents[1] / "figures", help="the figures' folder")
    parser.add_argument("--beside", type=Path, help="another file of lines: a figure of both over their budgets")
    args = parser.parse_args(arguments)
    if not args.lines.exists() and not args.lines.with_name(f"{args.lines.name}.gz").exists():
        parser.error(f"{args.lines} does not exist: run compare.py first, or name its --out with --lines")
    try:
        lines = compare.read(args.lines)
    except bipeft.UsageError as mistake:
        parser.error(str(mistake))
    data = Data(lines)
    print(report(lines))
    draw(args.figures, args.lines.name.partition(".")[0].replace("_", "-"), FIGURES, data)
    if args.beside:
        both = {"MiniLM": data, "SmolLM2": Data(compare.read(args.beside))}
        draw(args.figures, "compare", {"ratios": draw_ratios}, both)


if __name__ == "__main__":
    main()
