"""The figures of report.py, each for a light and a dark page. Needs matplotlib.

A figure is a function of the data (report.Data), a page of PAGES and pyplot. It returns None where the lines
that it needs are not there.
"""

import re
from collections import Counter, defaultdict

import numpy as np

from bench import bipeft
from methods import ABLATIONS, CORE, METHODS, MORE, SENSITIVITY
from stats import half_width, signed

RIVALS = {**CORE, **MORE}
KINDS = {"bitfit": "BitFit", "lnfit": "LNFit", "lora": "LoRA", "adapter_lr": "Adapter-LR",
         "serial": "serial", "parallel": "parallel", "prefix": "prefix"}
BERT = {"attention.output.dense": "o", "intermediate.dense": "wi", "output.dense": "wo", "embeddings": "n0",
        "attention.self.query": "q", "attention.self.key": "k", "attention.self.value": "v",
        "attention.output.LayerNorm": "n1", "output.LayerNorm": "n2", "attention.self": "attn"}
LLAMA = {"input_layernorm": "n1", "post_attention_layernorm": "n2", "self_attn.q_proj": "q",
         "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o", "mlp.gate_proj": "gate",
         "mlp.up_proj": "up", "mlp.down_proj": "down", "self_attn": "attn", "mlp": "ffn"}
BLOCKS = {"attention.output.dense": "attn", "output.dense": "ffn"}        # of kinds that stand after a block

# Any two of a page's colours lie 28 or more apart in CIELAB, also as protanopes and deuteranopes see them,
# and have a contrast of 2.9 : 1 or more with the page (test_report.py). Markers differ, too.
PAGES = {
    "light": {"page": "#ffffff", "ink": "#1f2328", "soft": "#6e7781", "deep": "#0050a0", "colours": (
        "#e97214", "#540181", "#616b75", "#0d7bfc", "#001acd", "#753c00", "#00ad6c", "#ae87d3")},
    "dark": {"page": "#0d1117", "ink": "#e6edf3", "soft": "#8b949e", "deep": "#79b8ff", "colours": (
        "#ff8c2e", "#9b95e9", "#848e9a", "#ace5ff", "#636bf9", "#c5ee87", "#589f61", "#d2efcd")}}
MARKERS = "osDv^PX*"
FAR = "head alone", "gamma = 1"                        # rows that would stretch a forest plot's axis
FEWEST = 6          # pairs that a row of the forest plot has: with fewer its interval is all that is seen


def size(data, parameters):
    """A number of parameters and, where the backbone's is known, how many of 10,000 these are."""
    share = f" ({1e4 * parameters / data.backbone:.2f})" if data.backbone else ""
    return f"{parameters:,.0f}{share}"


def in_order(pair):
    """A key to sort (kind, rank) by."""
    return list(KINDS).index(pair[0]), pair[1]


def curves(series, tasks, page, plt, labels, tick):
    """A panel a task, a line a method: mean scores, with 95 % t intervals over seeds, of three or more, which the
    panel may cut off.

    series: {method: {x: {(task, seed): score}}}, of at most len(MARKERS) methods.   labels: of the axes.   tick: the
    text below an x.
    """
    fig, axes = plt.subplots(1, len(tasks), figsize=(8.3, 4.6), squeeze=False, layout="constrained")
    for ax, task in zip(axes[0], tasks):
        means = []
        for i, (name, points) in enumerate(series.items()):
            tests = {x: [s for (of, _), s in cells.items() if of == task] for x, cells in sorted(points.items())}
            tests = {x: values for x, values in tests.items() if values}
            means += [np.mean(values) for values in tests.values()]
            ax.errorbar([x * (1 + 0.022 * (i - (len(series) - 1) / 2)) for x in tests],
                        [np.mean(values) for values in tests.values()],
                        [half_width(values) if len(values) > 2 else 0 for values in tests.values()],
                        label=name, color=page["colours"][i], marker=MARKERS[i], ms=4.5, elinewidth=0.8,
                        lw=2.4 if name == "BIPEFT" else 1.2, zorder=3 if name == "BIPEFT" else 2)
        low, high = min(means), max(means)
        ax.set_ylim(low - 0.3 * (high - low), high + 0.3 * (high - low))
        ticks = sorted(set().union(*series.values()))
        ax.set_xscale("log")
        ax.set_xticks(ticks, [tick(x) for x in ticks])
        ax.minorticks_off()
        ax.set(title=task, xlabel=labels[0], ylabel=labels[1] if ax is axes[0][0] else "")
        ax.grid(axis="y", color=page["soft"], alpha=0.25, lw=0.6)
    return fig, axes[0]


def legend_below(fig, ax, last=()):
    """One legend for all panels.   last: labels that come at its end."""
    handles, labels = ax.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] in last)
    fig.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside lower center",
               ncols=6 if len(labels) == 6 else 5, columnspacing=1.2)
    return fig


def draw_budgets(data, page, plt):
    """Figure 3: score against budget, on the seeds that BIPEFT has at all; as lines across what is outside of the
    budget.
    """
    series = {name: {b: data.scores([name], b)[name] for b in sorted(
        {x["budget"] for x in data.reported if x["method"] == name and x["source"] is None})}
        for name in RIVALS if not METHODS[name].free}
    series = dict([(name, points) for name, points in series.items() if len(points) > 1][:len(MARKERS)])
    if "BIPEFT" not in series:
        return None
    common = set.intersection(*map(set, series["BIPEFT"].values()))
    series = {name: {b: {cell: s for cell, s in cells.items() if cell in common} for b, cells in points.items()}
              for name, points in series.items()}
    share = {b: f"\n({1e4 * b / data.backbone:.1f})" if data.backbone else "" for b in series["BIPEFT"]}
    label = "budget, 1,000 parameters" + (" (of 10,000)" if data.backbone else "")
    fig, axes = curves(series, data.tasks, page, plt, (label, "test score"), lambda b: f"{b / 1000:g}{share[b]}")
    for ax, task in zip(axes, data.tasks):
        for name, style in (("full", ":"), ("all of S2", "--")):
            if tests := [x["test"] for x in data.of(name) if x["task"] == task and (task, x["seed"]) in common]:
                ax.axhline(np.mean(tests), color=page["soft"], lw=1.2, ls=style, label=name)
                ax.set_ylim(top=max(ax.get_ylim()[1], np.mean(tests) + 0.05 * np.ptp(ax.get_ylim())))
    return legend_below(fig, axes[0], ("full", "all of S2"))


def draw_rates(data, page, plt):
    """Score against the rate of re-training, of the cells that all have; ringed: the rate that validation on other
    seeds chose. Without trainings of --table rates it is the validation on those other seeds.
    """
    series, common, score = defaultdict(dict), data.cells_at_rates(), "test score"
    for lr, scores in data.at_rates().items():
        for name in CORE.keys() & scores.keys():
            series[name][lr] = {cell: scores[name][cell] for cell in common & scores[name].keys()}
    series = {name: series[name] for name in CORE if name in series}
    if not series:
        score, series = "validation score", dict(list(data.tuned().items())[:len(MARKERS)])
    if not series:
        return None
    tasks = [task for task in data.tasks if any(task == of for points in series.values() for cells in points.values()
                                                for of, _ in cells)]
    fig, axes = curves(series, tasks, page, plt, ("re-training rate, 1e-3", score), lambda lr: f"{1000 * lr:g}")
    for ax, task in zip(axes, tasks):
        for i, (name, points) in enumerate(series.items()):
            own = data.rates.get((name, data.budget))
            if tests := [s for (of, _), s in points.get(own, {}).items() if of == task]:
                ax.plot(own * (1 + 0.022 * (i - (len(series) - 1) / 2)), np.mean(tests), "o", ms=10, mfc="none",
                        color=page["ink"], label="its chosen rate" if i == 0 else None)
    return legend_below(fig, axes[0], ("its chosen rate",))


def forest_rows(groups, fewest=0):
    """(label, Contrast) each, top down, and (heading, None) before each group.

    groups: {heading: {label: Contrast}}.   fewest: pairs that a row needs.
    """
    rows = []
    for heading, group in groups.items():
        group = {name: c for name, c in group.items() if len(c.pairs) >= fewest}
        rows += [(heading, None), *group.items()] * bool(group)
    return rows


def forest(rows, tasks, page, plt, sides):
    """A row a Contrast: mean and 95 % t interval over pairs (thick) and over seeds (thin, of three or more), a dot
    a pair. What is FAR has an arrow at the axis' end.   sides: what lies to the left and to the right of zero.
    """
    reach = max([1.04 * max(abs(c.mean) + c.half, *map(abs, c.pairs.values()))
                 for name, c in rows if c and name not in FAR], default=0)
    if not reach:
        return None
    fig, (ax, told) = plt.subplots(1, 2, figsize=(8.3, 1 + 0.31 * len(rows)), width_ratios=[3, 1.5],
                                   sharey=True, layout="constrained")
    told.axis("off")
    told.set_xlim(0, 1)
    for i, task in enumerate(tasks):
        dots = [(d, y + 0.3) for y, (_, c) in enumerate(rows) if c
                for (of, _), d in c.pairs.items() if of == task]
        if dots:
            ax.plot(*zip(*dots), ls="", marker="ovs^P"[i % 5], ms=3.6, mew=0,
                    color=page["colours"][(3, 5, 1, 0, 4)[i % 5]], alpha=0.8, label=f"a pair on {task}")
    for fill, label in (("ink", "mean, Holm's p < 0.05"), ("page", "mean, not so")):
        ax.plot([], [], ls="", marker="D", color=page["ink"], mfc=page[fill], label=label)
    for y, (label, c) in enumerate(rows):
        if c is None:
            ax.text(-0.02, y + 0.1, label, transform=ax.get_yaxis_transform(), ha="right", va="center",
                    color=page["soft"], style="italic")
            continue
        out = abs(c.mean) + c.half > reach
        at = np.sign(c.mean) * reach * 0.98 if out else c.mean
        ax.errorbar(at, y, xerr=0 if out else c.half, marker="><"[c.mean < 0] if out else "D", ms=6, zorder=4,
                    elinewidth=1.5, color=page["ink"], mfc=page["ink" if c.holm < 0.05 else "page"])
        half = c.half_of_seeds if len({seed for _, seed in c.pairs}) > 2 else float("nan")
        if not out and half == half:
            ax.errorbar(at, y, xerr=half, elinewidth=0.6, capsize=2, color=page["ink"])
        span = f" [{signed(c.mean - half)}, {signed(c.mean + half)}]" if half == half else ""
        told.text(0, y, signed(c.mean) + span, va="center")
        told.text(1, y, f"{c.above} of {len(c.pairs)}", va="center", ha="right")
    told.text(0, -0.9, "mean, 95 % over seeds", color=page["soft"])
    told.text(1, -0.9, "above", color=page["soft"], ha="right")
    ax.axvline(0, color=page["soft"], lw=1)
    ax.set_yticks([y for y, (_, c) in enumerate(rows) if c], [label for label, c in rows if c])
    ax.set(xlim=(-reach, reach), ylim=(len(rows) - 0.4, -0.6),
           xlabel=f"← {sides[0]} better     points of test score     {sides[1]} better →")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5, columnspacing=1.2)
    return fig


def draw_pairs(data, page, plt):
    """BIPEFT − method at the main budget; Holm's as in the tables."""
    found = data.contrasts(RIVALS)
    groups = {"within the budget": {name: c for name, c in found.items() if not METHODS[name].free},
              "outside of the budget": {name: c for name, c in found.items() if METHODS[name].free},
              "ablations of BIPEFT": data.contrasts(ABLATIONS)}
    groups = {heading: dict(sorted(group.items(), key=lambda row: row[1].mean)) for heading, group in groups.items()}
    return forest(forest_rows(groups, FEWEST), data.tasks, page, plt, ("method", "BIPEFT"))


def draw_readings(data, page, plt):
    """BIPEFT − variant: Tables 6-9 of the paper, then decisions that are ours."""
    found, groups = data.contrasts(SENSITIVITY), {}
    for name, c in found.items():
        of_paper = {"Z =": "Table 6", "gam": "Table 7", "H =": "Table 8", "tau": "Table 9"}
        heading = of_paper.get(name[:3], "own decisions")
        groups.setdefault(heading, {})[name] = c
    return forest(forest_rows(groups), data.tasks, page, plt, ("variant", "BIPEFT as it is"))


def where(place):
    """(layer, short name, kind) of a place, "encoder.layer.3.output.dense.lora": ("3", "wo", "lora")."""
    name, _, kind = place.rpartition(".")
    if name == "norm":                                              # a Llama's, after its layers
        return "last", "n1", kind
    found = re.fullmatch(r"(?:.*\.)?layers?\.(\d+)\.(.*)", name)
    layer, path = found.groups() if found else ("emb", name.removesuffix(".LayerNorm"))
    block = BLOCKS.get(path) if kind in ("adapter_lr", "serial", "parallel") else None
    return layer, block or {**BERT, **LLAMA}.get(path, path.rpartition(".")[2]), kind


def draw_places(data, page, plt):
    """How often BIPEFT keeps each place at the main budget: layers by places, a panel a kind."""
    searches, panels = data.found("BIPEFT"), defaultdict(dict)
    often = Counter(int(item.split(":")[0]) for x in searches for item in x["structure"].split())
    for i, place in enumerate(data.places):
        layer, short, kind = where(place)
        if kind in bipeft.SPACES["s2"]:
            panels[kind][layer, short] = often[i] / max(1, len(searches))
    if not searches or not panels:
        return None
    layers = list(dict.fromkeys(layer for panel in panels.values() for layer, _ in panel))
    columns = {kind: list(dict.fromkeys(short for _, short in panel)) for kind, panel in panels.items()}
    order = sorted(panels, key=list(KINDS).index)
    height = min(0.3, 6 / len(layers))                              # of a row, inches
    fig, axes = plt.subplots(1, len(order), figsize=(8.3, 0.9 + height * len(layers)), squeeze=False,
                             sharey=True, width_ratios=[len(columns[kind]) for kind in order],
                             layout="constrained")
    shade = plt.matplotlib.colors.LinearSegmentedColormap.from_list("", [page["page"], page["deep"]])
    for ax, kind in zip(axes[0], order):
        grid = np.array([[panels[kind].get((layer, short), np.nan) for short in columns[kind]]
                         for layer in layers])
        ax.imshow(grid, vmin=0, vmax=1, cmap=shade, aspect="auto")
        for (y, x), share in np.ndenumerate(grid):
            if share == share:
                ax.text(x, y, f"{100 * share:.0f}" if share else "·", ha="center", va="center",
                        fontsize=8 if height == 0.3 else 6.5, color=page["page" if share > 0.6 else "ink"])
        ax.set_xticks(range(len(columns[kind])), columns[kind])
        ax.set_yticks(range(len(layers)), layers)
        ax.set_title(KINDS[kind])
        ax.tick_params(length=0)
        ax.spines[:].set(visible=True, alpha=0.5)
    axes[0][0].set_ylabel("layer")
    return fig


def draw_kinds(data, page, plt):
    """Modules of each kind and rank, stacked: means over searches, of all that search at the main budget, and
    of BIPEFT and one look at the others.
    """
    bars = {(name, budget): data.kinds(name, budget)
            for budget in sorted({x["budget"] for x in data.searches}, key=data.order)
            for name in RIVALS if data.places and data.found(name, budget)
            and (name in ("BIPEFT", "one look") or budget == data.budget and name != "matched random")}
    if not bars:
        return None
    fig, ax = plt.subplots(figsize=(8.3, 1.3 + 0.33 * len(bars)), layout="constrained")
    left = np.zeros(len(bars))
    for kind, rank in sorted({pair for bar in bars.values() for pair in bar}, key=in_order):
        widths = np.array([bar.get((kind, rank), 0) for bar in bars.values()])
        colour = page["colours"][dict(zip(KINDS, (5, 1, 4, 0, 6, 7, 3)))[kind]]
        ax.barh(range(len(bars)), widths, left=left, color=(colour, {1: 0.4, 4: 0.7}.get(rank, 1)),
                label=f"{KINDS[kind]} {rank or ''}".strip())              # the larger the rank, the stronger
        left += widths
    ax.set_yticks(range(len(bars)), [f"{size(data, budget)}: {name}" for name, budget in bars])
    ax.invert_yaxis()
    ax.margins(x=0.02)
    of = " (of 10,000)" if data.backbone else ""
    ax.set_xlabel(f"modules kept at a budget{of}, mean over searches; a number after a kind is the rank")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=8, columnspacing=1.2,
               handlelength=1)
    return fig


FIGURES = {"budgets": draw_budgets, "rates": draw_rates, "pairs": draw_pairs, "readings": draw_readings,
           "places": draw_places, "kinds": draw_kinds}


def draw(data, folder, prefix):
    """Every figure on every page, as folder/PREFIX-NAME-PAGE.png; transparent."""
    try:
        import matplotlib
        matplotlib.use("agg")
        from matplotlib import pyplot as plt
    except ImportError:
        return ["no figures: matplotlib is not installed"]
    folder.mkdir(parents=True, exist_ok=True)
    told = []
    for name, make in FIGURES.items():
        for key, page in PAGES.items():
            ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), page["ink"])
            with plt.rc_context({**ink, "axes.edgecolor": page["soft"], "axes.spines.top": False,
                                 "axes.spines.right": False, "legend.frameon": False, "font.size": 9,
                                 "axes.titlesize": 10}):
                fig = make(data, page, plt)
                if fig is not None:
                    path = folder / f"{prefix}-{name}-{key}.png"
                    fig.savefig(path, dpi=200, transparent=True, metadata={"Software": None})
                    plt.close(fig)
                told.append(str(path) if fig is not None else f"{name}: no data yet")
    return list(dict.fromkeys(told))
