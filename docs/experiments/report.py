"""What compare.py's lines say: tables as markdown on stdout, and four figures, each for a light and a dark page.

    python docs/experiments/report.py [--lines docs/experiments/results/compare.jsonl] [--figures docs/figures]

Needs the project's packages; the figures matplotlib. The comparison's rules are in compare.py. Reported are
trainings on seeds that no rate was chosen on, each at its method's chosen rate. A cell is a task and a seed; a
pair is BIPEFT and another method in one cell. A part whose lines are not there says so in a line.
"""

import argparse
import itertools
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import compare
from compare import ABLATIONS, CORE, METHODS, MORE, SENSITIVITY
from stats import contrasts, half_width, jaccard, jaccard_by_chance, mean_rank

HERE = Path(__file__).resolve().parent
TIMED = 900                                               # the seed of compare.py --table cost
RIVALS = {**CORE, **MORE}
KINDS = {"bitfit": "BitFit", "lnfit": "LNFit", "lora": "LoRA", "adapter_lr": "Adapter-LR",
         "serial": "serial", "parallel": "parallel", "prefix": "prefix"}
BERT = {"attention.output.dense": "o", "intermediate.dense": "wi", "output.dense": "wo", "embeddings": "n0",
        "attention.self.query": "q", "attention.self.key": "k", "attention.self.value": "v",
        "attention.output.LayerNorm": "n1", "output.LayerNorm": "n2", "attention.self": "attn"}
BLOCKS = {"attention.output.dense": "attn", "output.dense": "ffn"}        # of kinds that stand after a block


# ==================================================================================================
# 1. What there is: the lines, sorted out
# ==================================================================================================


class Data:
    """The lines of a results file, what is reported of them, and the rate of each method."""

    def __init__(self, lines):
        trained = [x for x in lines if x["stage"] == "train" and x["method"] in METHODS]
        self.budget = Counter(x["budget"] for x in trained).most_common(1)[0][0] if trained else 0
        self.tuning = [x for x in trained if x["tuning"] and x["budget"] == self.budget]
        self.tasks = list(dict.fromkeys(x["task"] for x in trained))
        self.places = next((x["places"] for x in lines if x["stage"] == "places"), [])
        seeds = sorted({x["seed"] for x in self.tuning})
        args = SimpleNamespace(tasks=self.tasks, tune_tasks=list(dict.fromkeys(x["task"] for x in self.tuning)),
                               tune_seeds=seeds, budget=self.budget, lr=None)
        plan = compare.Plan([], lines, None, args)
        self.rates = {name: plan.rate(name) if self.tuning else None for name in METHODS}
        found = [x for x in lines if x["stage"] == "find" and x["method"] in METHODS]
        self.searches = [x for x in found if x["seed"] not in (*seeds, TIMED)]
        self.timed = [x for x in trained + found if x["seed"] == TIMED and x["workers"] == 1]
        scored = [x for x in trained if not x["tuning"] and x["seed"] not in (*seeds, TIMED)]
        self.reported = [x for x in scored if self.rates[x["method"]] in (None, x["lr"])]
        self.left_out = len(scored) - len(self.reported)

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

    def contrasts(self, names, budget=None, sign=1):
        """Of BIPEFT against each of a family."""
        scores = self.scores(["BIPEFT", *names], budget)
        return contrasts(scores.pop("BIPEFT", {}), scores, sign)

    def kind(self, item):
        """The kind of module of "place:rank", as `encode` of compare.py wrote it."""
        return self.places[int(item.split(":")[0])].rpartition(".")[2]


def shown(values, digits=1):
    """mean ± standard deviation."""
    values = [v for v in values if v is not None]
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}" if values else "–"


def signed(value, digits=2):
    return f"{value:+.{digits}f}".replace("-", "−")


def table(head, rows):
    """Markdown."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) if rows else "no data yet"


# ==================================================================================================
# 2. Tables
# ==================================================================================================


def rates(data):
    """Mean validation score at each rate tried, the chosen one bold."""
    rows = []
    for name in METHODS:
        tried = defaultdict(list)
        for x in data.tuning:
            if x["method"] == name:
                tried[x["lr"]].append(x["validation"])
        if tried:
            chosen, most = data.rates[name], max(map(len, tried.values()))
            cells = [f"{lr:g}: {np.mean(s):.1f}" + (f" ({len(s)} of {most})" if len(s) < most else "")
                     for lr, s in sorted(tried.items())]
            cells = [f"**{cell}**" if lr == chosen else cell for lr, cell in zip(sorted(tried), cells)]
            edge = {min(tried): "lowest", max(tried): "highest"}.get(chosen, "")
            rows.append([name, ", ".join(cells), "–" if chosen is None else f"{chosen:g}", edge])
    return table(["method", "rate: mean validation score", "chosen", "edge"], rows)


def score_table(data, names, budget=None, extra=()):
    """A row a method: scores, sizes, cost.   extra: (heading, function of the method's searches) each."""
    rows = []
    for name in names:
        own, looked = data.of(name, budget), data.found(name, budget)
        if own:
            tests = [[x["test"] for x in own if x["task"] == task] for task in data.tasks]
            mean = f"{np.mean([np.mean(t) for t in tests]):.1f}" if all(tests) else "–"
            fte = f"{np.mean([x['passes'] for x in looked]) / np.mean([x['passes'] for x in own]):.2f}" if looked else (
                "0" if METHODS[name].cheap else "–")
            rows.append([name, *map(shown, tests), mean, f"{np.mean([x['parameters'] for x in own]):,.0f}",
                         shown([x["modules"] for x in own]), fte, len(own), *(of(looked) for _, of in extra)])
    head = ["method", *data.tasks, "mean", "parameters", "modules", "search, FTE", "trainings"]
    return table(head + [heading for heading, _ in extra], rows)


def contrast_table(found, tasks, head="BIPEFT −"):
    """A row a Contrast: means by task, over all pairs, its interval, and tests."""
    rows = []
    for name, c in found.items():
        by_task = [[d for (of, _), d in c.pairs.items() if of == task] for task in tasks]
        rows.append([name, *(signed(np.mean(d)) if d else "–" for d in by_task), signed(c.mean),
                     f"{signed(c.mean - c.half)} to {signed(c.mean + c.half)}", f"{c.above} of {len(c.pairs)}",
                     f"{c.p:.2g}", f"{c.holm:.2g}"])
    return table([head, *tasks, "mean", "95 %", "above", "p", "Holm"], rows)


def ranks(data, budget):
    """Mean ranks of those within the budget that have all of BIPEFT's cells."""
    scores = data.scores([name for name in RIVALS if not METHODS[name].free], budget)
    within = {name: found for name, found in scores.items() if set(scores.get("BIPEFT", {})) <= set(found)}
    if "BIPEFT" not in within or len(within) < 2:
        return "Mean ranks: no data yet"
    found, cells = mean_rank(within)
    order = ", ".join(f"{name} {rank:.2f}" for name, rank in sorted(found.items(), key=lambda item: item[1]))
    less = [name for name in scores if name not in within]
    return f"Mean rank over {cells} cells: {order}" + (f" (cells missing: {', '.join(less)})" if less else "")


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
        if own and (stage == "train" or name not in ("matched random", "s-bar at T")):          # another's search
            seconds = [[x["seconds"] for x in own], [ratio(x, name) for x in own], [ratio(x, "LoRA") for x in own]]
            memory = [x["memory"] for x in own if x.get("memory")]
            rows.append([name, "search" if stage == "find" else "training", *(shown(s, 2) for s in seconds),
                         f"{np.mean([x['passes'] for x in own]):,.0f}", max(memory, default="–")])
    return table(["method", "of", "seconds", "÷ its re-training", "÷ LoRA's training", "passes", "peak MiB"], rows)


def transfer(data):
    """Table 4: structures found on one task, trained on another, and paired with the task's own."""
    own = data.scores(["BIPEFT"]).get("BIPEFT", {})
    moved = {s: {(x["task"], x["seed"]): x["test"] for x in data.of("BIPEFT", source=s)} for s in data.tasks}
    if not own or not any(moved.values()):
        return "no data yet"
    rows = []
    for source in data.tasks:
        cells = {**{cell: score for cell, score in own.items() if cell[0] == source}, **moved[source]}
        rows.append([source, *(shown([s for (on, _), s in cells.items() if on == task]) for task in data.tasks)])
    differences = contrasts(own, moved, -1)
    every = {(task, (source, seed)): score for source in data.tasks for (task, seed), score in moved[source].items()}
    whole = contrasts({cell: own[cell[0], cell[1][1]] for cell in every if (cell[0], cell[1][1]) in own},
                      {"any other": every}, -1)
    return (table(["found on", *data.tasks], rows) + "\n\n"
            + contrast_table({**differences, **whole}, data.tasks, "found on, − the task's own"))


def agreement(data):
    """Jaccard of structures' sets of places: between seeds of a task, between tasks, and by chance."""
    rows, kinds = [], []
    for budget, name in itertools.product(sorted({x["budget"] for x in data.searches}), RIVALS):
        own, sets = data.found(name, budget), defaultdict(list)
        items = [x["structure"].split() for x in own]
        for x, found in zip(own, items):
            sets[x["task"]].append({int(item.split(":")[0]) for item in found})
        if not data.places or not any(items):
            continue
        seen = {data.kind(item) for found in items for item in found}
        space = next(kinds for kinds in compare.bipeft.SPACES.values() if seen <= set(kinds))
        pool = sum(place.rpartition(".")[2] in space for place in data.places)
        pairs = [pair for group in sets.values() for pair in itertools.combinations(group, 2)]
        across = [pair for one, other in itertools.combinations(sets.values(), 2)
                  for pair in itertools.product(one, other)]
        rows.append([f"{budget:,}", name, len(own), shown([jaccard(a, b) for a, b in pairs], 2),
                     shown([jaccard(a, b) for a, b in across], 2),
                     shown([np.mean([jaccard_by_chance(a, b, pool) for a, b in pairs + across] or [np.nan])], 2)])
        count = by_kind_and_rank(data, own)
        kinds.append([f"{budget:,}", name, ", ".join(f"{named(*pair)}: {n:.1f}" for pair, n in count.items())])
    return (table(["budget", "method", "searches", "between seeds", "between tasks", "by chance"], rows)
            + "\n\n" + table(["budget", "method", "modules of each kind and rank, mean over searches"], kinds))


def by_kind_and_rank(data, searches):
    """{(kind, rank): mean number of modules}, the kind by its name, the rank 0 where there is none."""
    count = Counter()
    for item in (item for x in searches for item in x["structure"].split()):
        kind = data.kind(item)
        count[kind, int(item.split(":")[1]) if compare.bipeft.KINDS[kind].ranked else 0] += 1
    order = sorted(count, key=lambda pair: (list(KINDS).index(pair[0]), pair[1]))
    return {pair: count[pair] / len(searches) for pair in order}


def named(kind, rank):
    return f"{KINDS[kind]} {rank}" if rank else KINDS[kind]


# ==================================================================================================
# 3. Figures. Each is a function of the data, a page and pyplot, and returns a figure, or None without data.
# ==================================================================================================

# Colours differ in lightness as well as in hue, none is told from another by red against green alone (after Wong
# 2011, Nature Methods 8), and markers differ, too.
PAGES = {
    "light": {"page": "#ffffff", "ink": "#1f2328", "soft": "#6e7781", "deep": "#0050a0", "colours": (
        "#d55e00", "#8e3a80", "#6e7781", "#2e9fd4", "#0050a0", "#9a7400", "#00856a", "#c0508f")},
    "dark": {"page": "#0d1117", "ink": "#e6edf3", "soft": "#8b949e", "deep": "#79b8ff", "colours": (
        "#ff8c42", "#d99be0", "#9da7b3", "#7fd4ff", "#3d8bff", "#e3c34b", "#3cc9a3", "#ff9ecb")}}
MARKERS = "osDv^PX*"


def draw_budgets(data, page, plt):
    """Figure 3: score against budget, a panel a task, 95 % t intervals of the mean over three seeds or more."""
    seen = {name: {x["budget"] for x in data.reported if x["method"] == name and x["source"] is None}
            for name in RIVALS if not METHODS[name].free}
    first = [name for name in ("BIPEFT", "one look", "random", "matched random", "LoRA") if seen[name]]
    names = (first + [name for name in seen if name not in first and len(seen[name]) > 1])[:len(MARKERS)]
    if not names:
        return None
    fig, axes = plt.subplots(1, len(data.tasks), figsize=(8.3, 3.9), squeeze=False, layout="constrained")
    for ax, task in zip(axes[0], data.tasks):
        for i, name in enumerate(names):
            cells = {b: [x["test"] for x in data.of(name, b) if x["task"] == task] for b in sorted(seen[name])}
            cells = {budget: tests for budget, tests in cells.items() if tests}
            ax.errorbar([b * (1 + 0.022 * (i - (len(names) - 1) / 2)) for b in cells],
                        [np.mean(tests) for tests in cells.values()],
                        [half_width(tests) if len(tests) > 2 else 0 for tests in cells.values()],
                        label=name, color=page["colours"][i], marker=MARKERS[i], ms=4.5, elinewidth=0.8,
                        lw=2.4 if name == "BIPEFT" else 1.2, zorder=3 if name == "BIPEFT" else 2)
        for name, style in (("full", ":"), ("all of S2", "--")):
            if tests := [x["test"] for x in data.of(name) if x["task"] == task]:
                ax.axhline(np.mean(tests), color=page["soft"], lw=1.2, ls=style, label=name)
        budgets = sorted(set().union(*seen.values()))
        ax.set_xscale("log")
        ax.set_xticks(budgets, [f"{b / 1000:g}k" for b in budgets])
        ax.minorticks_off()
        ax.set(title=task, xlabel="budget, parameters", ylabel="test score" if ax is axes[0][0] else "")
        ax.grid(axis="y", color=page["soft"], alpha=0.25, lw=0.6)
    handles, labels = axes[0][0].get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] in ("full", "all of S2"))         # these last
    fig.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside lower center", ncols=5)
    return fig


def forest_rows(data):
    """(label, Contrast) each, top down, and (heading, None) before each group; Holm's as in the tables."""
    of_rivals, rows = data.contrasts(RIVALS), []
    for heading, group in (
            ("within the budget", {name: c for name, c in of_rivals.items() if not METHODS[name].free}),
            ("without a budget", {name: c for name, c in of_rivals.items() if METHODS[name].free}),
            ("ablations of BIPEFT", data.contrasts(ABLATIONS))):
        rows += [(heading, None), *sorted(group.items(), key=lambda row: -row[1].mean)] * bool(group)
    return rows


def draw_pairs(data, page, plt):
    """The forest plot: BIPEFT − method at the main budget, mean and 95 % t interval over pairs, a dot a pair.
    The axis is cut at what the head alone would need.
    """
    rows = forest_rows(data)
    reach = max([1.04 * max(abs(c.mean) + c.half, *map(abs, c.pairs.values()))
                 for name, c in rows if c and name != "head alone"], default=0)
    if not reach:
        return None
    fig, (ax, told) = plt.subplots(1, 2, figsize=(8.3, 1 + 0.31 * len(rows)), width_ratios=[3, 1.15], sharey=True,
                                   layout="constrained")
    told.axis("off")
    told.set_xlim(0, 1)
    for i, task in enumerate(data.tasks):
        dots = [(d, y + 0.3) for y, (_, c) in enumerate(rows) if c for (of, _), d in c.pairs.items() if of == task]
        ax.plot(*zip(*dots), ls="", marker="ovs^P"[i % 5], ms=3.6, mew=0, alpha=0.8, label=f"a pair on {task}",
                color=page["colours"][(3, 5, 1, 0, 4)[i % 5]])
    for sure, label in ((True, "mean, Holm's p < 0.05"), (False, "mean, not so")):
        ax.plot([], [], ls="", marker="D", color=page["ink"], mfc=page["ink" if sure else "page"], label=label)
    for y, (label, c) in enumerate(rows):
        if c is None:
            ax.text(-0.02, y + 0.1, label, transform=ax.get_yaxis_transform(), ha="right", va="center",
                    color=page["soft"], style="italic")
            continue
        at, out = (c.mean, False) if abs(c.mean) < reach else (np.sign(c.mean) * reach * 0.98, True)
        ax.errorbar(at, y, xerr=0 if out else c.half, marker=("><"[c.mean < 0] if out else "D"), ms=6, elinewidth=1.5,
                    color=page["ink"], mfc=page["ink" if c.holm < 0.05 else "page"], zorder=4)
        told.text(0, y, f"{signed(c.mean)}  [{signed(c.mean - c.half, 1)}, {signed(c.mean + c.half, 1)}]", va="center")
        told.text(1, y, f"{c.above} of {len(c.pairs)}", va="center", ha="right")
    told.text(0, -0.9, "mean, 95 % interval", color=page["soft"])
    told.text(1, -0.9, "above", color=page["soft"], ha="right")
    ax.axvline(0, color=page["soft"], lw=1)
    ax.set_yticks([y for y, (_, c) in enumerate(rows) if c], [label for label, c in rows if c])
    ax.set(xlim=(-reach, reach), ylim=(len(rows) - 0.4, -0.6),
           xlabel="← method better     points of test score     BIPEFT better →")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5, columnspacing=1.2)
    return fig


def where(place):
    """(layer, short name, kind) of a place, "encoder.layer.3.output.dense.lora": ("3", "wo", "lora")."""
    name, _, kind = place.rpartition(".")
    layer, _, path = name.partition("layer.")[2].partition(".")
    path = path or name.removesuffix(".LayerNorm")
    block = BLOCKS.get(path) if kind in ("adapter_lr", "serial", "parallel") else None
    return layer or "emb", block or BERT.get(path, path.rpartition(".")[2]), kind


def draw_places(data, page, plt):
    """How often BIPEFT keeps each place at the main budget: layers by places, a panel a kind."""
    searches, panels = data.found("BIPEFT"), defaultdict(dict)
    often = Counter(int(item.split(":")[0]) for x in searches for item in x["structure"].split())
    for i, place in enumerate(data.places):
        layer, short, kind = where(place)
        if kind in compare.bipeft.SPACES["s2"]:
            panels[kind][layer, short] = often[i] / max(1, len(searches))
    if not searches or not panels:
        return None
    layers = list(dict.fromkeys(layer for panel in panels.values() for layer, _ in panel))
    columns = {kind: list(dict.fromkeys(short for _, short in panel)) for kind, panel in panels.items()}
    order = sorted(panels, key=list(KINDS).index)
    fig, axes = plt.subplots(1, len(order), figsize=(8.3, 0.9 + 0.3 * len(layers)), squeeze=False, sharey=True,
                             width_ratios=[len(columns[kind]) for kind in order], layout="constrained")
    shade = plt.matplotlib.colors.LinearSegmentedColormap.from_list("", [page["page"], page["deep"]])
    for ax, kind in zip(axes[0], order):
        grid = np.array([[panels[kind].get((layer, short), np.nan) for short in columns[kind]] for layer in layers])
        ax.imshow(grid, vmin=0, vmax=1, cmap=shade, aspect="auto")
        for (y, x), share in np.ndenumerate(grid):
            if share == share:
                ax.text(x, y, f"{100 * share:.0f}" if share else "·", ha="center", va="center", fontsize=8,
                        color=page["page" if share > 0.6 else "ink"])
        ax.set_xticks(range(len(columns[kind])), columns[kind])
        ax.set_yticks(range(len(layers)), layers)
        ax.set_title(KINDS[kind])
        ax.tick_params(length=0)
        ax.spines[:].set(visible=True, alpha=0.5)
    axes[0][0].set_ylabel("layer")
    return fig


def draw_kinds(data, page, plt):
    """Modules of each kind and rank by budget, stacked: means over searches of BIPEFT and of one look."""
    bars = {(name, budget): by_kind_and_rank(data, data.found(name, budget))
            for budget in sorted({x["budget"] for x in data.searches}) for name in ("BIPEFT", "one look")
            if data.places and data.found(name, budget)}
    if not bars:
        return None
    fig, ax = plt.subplots(figsize=(8.3, 1.3 + 0.33 * len(bars)), layout="constrained")
    left = np.zeros(len(bars))
    for kind, rank in by_kind_and_rank(data, [x for name, budget in bars for x in data.found(name, budget)]):
        widths = np.array([bar.get((kind, rank), 0) for bar in bars.values()])
        colour = page["colours"][dict(zip(KINDS, (5, 1, 4, 0, 6, 7, 3)))[kind]]
        ax.barh(range(len(bars)), widths, left=left, color=(colour, {1: 0.4, 4: 0.7}.get(rank, 1)), label=named(kind, rank))
        left += widths
    ax.set_yticks(range(len(bars)), [f"{name}, {budget:,}" for name, budget in bars])
    ax.invert_yaxis()
    ax.set_xlabel("modules kept, mean over searches; a number after a kind is the rank")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=8, columnspacing=1.2, handlelength=1)
    return fig


def draw(data, folder):
    """Every figure on every page, as folder/compare-NAME-PAGE.png; transparent."""
    try:
        import matplotlib
        matplotlib.use("agg")
        from matplotlib import pyplot as plt
    except ImportError:
        return ["no figures: matplotlib is not installed"]
    folder.mkdir(parents=True, exist_ok=True)
    told = []
    for name, make in {"budgets": draw_budgets, "pairs": draw_pairs, "places": draw_places, "kinds": draw_kinds}.items():
        for key, page in PAGES.items():
            ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), page["ink"])
            with plt.rc_context({**ink, "axes.edgecolor": page["soft"], "axes.spines.top": False, "font.size": 9,
                                 "axes.spines.right": False, "legend.frameon": False, "axes.titlesize": 10}):
                fig = make(data, page, plt)
                if fig is not None:
                    path = folder / f"compare-{name}-{key}.png"
                    fig.savefig(path, dpi=200, transparent=True, metadata={"Software": None})
                    plt.close(fig)
                told.append(f"{path}" if fig is not None else f"figure {name}: no data yet")
    return told


def report(lines, folder):
    """All of it, as one text."""
    data = Data(lines)
    left = f"\n\n{data.left_out} trainings at another rate than the one now chosen are left out." if data.left_out else ""
    parts = ["## Rates, chosen on seeds that are not reported\n\n" + rates(data) + left]
    for budget in sorted({x["budget"] for x in data.reported}) or [data.budget]:
        parts += [f"## Table 1: test scores at {budget:,} parameters\n\n" + score_table(data, RIVALS, budget),
                  "### Pairs\n\nMean of pairs with a 95 % t interval, exact sign-flip test, Holm over the methods here.\n\n"
                  + contrast_table(data.contrasts(RIVALS, budget), data.tasks), ranks(data, budget)]
    uncut = ("uncut", lambda looked: shown([x.get("uncut") for x in looked], 0))
    steps = [("steps", lambda looked: shown([x.get("steps") for x in looked], 0)),
             ("made up", lambda looked: shown([x.get("made_up") for x in looked]))]
    for head, family, extra, sign in (("Table 2: ablations", ABLATIONS, [uncut], 1),
                                      ("Tables 6–10 and own readings", SENSITIVITY, steps, -1)):
        there = data.scores(family)
        parts += [f"## {head}\n\n" + (score_table(data, ["BIPEFT", *family], extra=extra) if there else "no data yet")]
        parts += [contrast_table(data.contrasts(family, sign=sign), data.tasks,
                                 "BIPEFT −" if sign > 0 else "− BIPEFT")] * bool(there)
    parts += ["## Table 3: cost, alone on the device\n\n" + cost(data),
              "## Table 4: transfer\n\n" + transfer(data), "## What is kept\n\n" + agreement(data),
              "## Figures\n\n" + "\n".join(draw(data, folder))]
    return "\n\n".join(parts)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=Path, default=HERE / "results" / "compare.jsonl")
    parser.add_argument("--figures", type=Path, default=HERE.parent / "figures", help="the figures' folder")
    args = parser.parse_args(arguments)
    if not args.lines.exists():
        parser.error(f"{args.lines} does not exist: run compare.py first, or name its --out with --lines")
    print(report(compare.read(args.lines), args.figures))


if __name__ == "__main__":
    main()
