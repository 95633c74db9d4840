"""The figures of report.py, each one picture on white. Needs matplotlib.

A figure is a function of the data (report.Data), and None where the lines that it needs are not there. Colours and
places' names are palette.py's.
"""

from collections import Counter

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import LinearSegmentedColormap

from baselines import ABLATIONS, CORE, METHODS, MORE
from palette import BLUE, INK, PALE, SOFT, STYLE, WIDTH, save, where
from stats import interval

RIVALS = {**CORE, **MORE}
CLIPPED = "BIPEFT, clipped"
OTHERS = [name for name in RIVALS if name not in ("one look, clipped", "matched random, clipped")]   # BIPEFT's pairs
TASKS = {"cola": ("o", INK), "qnli": ("v", SOFT), "mnli": ("s", "white"), "sst2": ("^", PALE), "toy": ("P", INK)}
FEWEST = 6          # pairs that a row of the forest plot has: with fewer its interval is all that is seen
GROUPS = {"BitFit: norms": ("bitfit", "n0 n1 n2"), "BitFit: attention": ("bitfit", "q k v o"),
          "BitFit: feed-forward": ("bitfit", "wi wo gate up down"), "LNFit": ("lnfit", "n0 n1 n2"),
          "LoRA": ("lora", "q k v o wi wo gate up down"), "Adapter-LR": ("adapter_lr", "attn ffn")}


def size(data, parameters):
    """A number of parameters and, where the backbone's is known, how many of 10,000 these are."""
    share = f" ({1e4 * parameters / data.backbone:.2f})" if data.backbone else ""
    return f"{parameters:,.0f}{share}"


def rows_of_pairs(data):
    """(method, Contrast) each at the main budget, by the mean, and (heading, None) before each group."""
    found = data.contrasts([name for name in OTHERS if name != "head alone"])       # which would stretch the axis
    groups = {"within the budget": {name: c for name, c in found.items() if not METHODS[name].free},
              "outside of the budget": {name: c for name, c in found.items() if METHODS[name].free},
              "ablations of BIPEFT": data.contrasts(ABLATIONS)}
    rows = []
    for heading, group in groups.items():
        group = [(name, c) for name, c in group.items() if len(c.pairs) >= FEWEST]
        if group:
            rows.append((heading, None))
            rows += sorted(group, key=lambda row: row[1].mean)
    return rows


def draw_pairs(data):
    """BIPEFT − method, a row each: mean and 95 % t interval over pairs (thick) and over seeds (thin); a dot is a pair.
    Holm's p as in the tables. A square is of the clipped search, if there is one.
    """
    rows = rows_of_pairs(data)
    if not rows:
        return None
    clipped = data.contrasts([name for name in RIVALS if name != CLIPPED], of=CLIPPED)
    reach = max(1.04 * max(abs(c.mean) + c.half, *map(abs, c.pairs.values())) for _, c in rows if c)
    fig, (ax, told) = plt.subplots(1, 2, figsize=(WIDTH, 1 + 0.31 * len(rows)), width_ratios=[3, 1.5],
                                   sharey=True, layout="constrained")
    told.axis("off")
    told.set_xlim(0, 1)
    for task in data.tasks:
        dots = [(d, y + 0.3) for y, (_, c) in enumerate(rows) if c for (of, _), d in c.pairs.items() if of == task]
        if dots:
            marker, inside = TASKS[task]
            ax.plot(*zip(*dots), ls="", marker=marker, ms=4, mew=0.5, color=INK, mfc=inside, label=f"a pair on {task}")
    for fill, label in ((INK, "mean, Holm's p < 0.05"), ("white", "mean, not so: p ≥ 0.05")):
        ax.plot([], [], ls="", marker="D", color=INK, mfc=fill, label=label)
    if clipped:
        ax.plot([], [], ls="", marker="s", ms=4, color=BLUE, label="clipped search, over seeds")
    for y, (label, c) in enumerate(rows):
        if c is None:
            ax.text(-0.02, y + 0.1, label, transform=ax.get_yaxis_transform(), ha="right", va="center",
                    color=SOFT, style="italic")
            continue
        ax.errorbar(c.mean, y, xerr=c.half, marker="D", ms=6, zorder=4, elinewidth=1.5, color=INK,
                    mfc=INK if c.holm < 0.05 else "white")
        if c.half_of_seeds == c.half_of_seeds:
            ax.errorbar(c.mean_of_seeds, y, xerr=c.half_of_seeds, elinewidth=0.6, capsize=2, color=INK)
        if other := clipped.get(label):
            ax.errorbar(other.mean_of_seeds, y - 0.25, xerr=other.half_of_seeds, marker="s", ms=4, elinewidth=1,
                        capsize=2, color=BLUE, zorder=3)
        told.text(0, y, interval(c), va="center")
        told.text(1, y, f"{c.above} of {len(c.pairs)}", va="center", ha="right")
    told.text(0, -0.9, "mean, 95 % over seeds", color=SOFT)
    told.text(1, -0.9, "BIPEFT\nabove", color=SOFT, ha="right")
    ax.axvline(0, color=SOFT, lw=1)
    ax.set_yticks([y for y, (_, c) in enumerate(rows) if c], [label for label, c in rows if c])
    ax.set(xlim=(-reach, reach), ylim=(len(rows) - 0.4, -0.6),
           xlabel="← method better     points of test score (thick: 95 % over pairs)     BIPEFT better →")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


def draw_places(data):
    """What BIPEFT keeps at the main budget: kinds by layers, modules per search, shaded by the share of the places."""
    searches, there, kept = data.found("BIPEFT"), Counter(), Counter()
    often = Counter(int(item.split(":")[0]) for x in searches for item in x["structure"].split())
    for i, place in enumerate(data.places):
        layer, short, kind = where(place)
        for row, (of, shorts) in GROUPS.items():
            if kind == of and short in shorts.split():
                there[row, layer] += 1
                kept[row, layer] += often[i] / max(1, len(searches))
    if not searches or not there:
        return None
    layers = list(dict.fromkeys(where(place)[0] for place in data.places))
    fig, ax = plt.subplots(figsize=(WIDTH, 2.2), layout="constrained")
    grid = np.array([[kept[row, x] / there[row, x] if there[row, x] else np.nan for x in layers] for row in GROUPS])
    ax.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap=LinearSegmentedColormap.from_list("", ["white", BLUE]))
    for (y, x), share in np.ndenumerate(grid):
        count = kept[list(GROUPS)[y], layers[x]]
        if share == share:
            text = f"{count:.1f}".removeprefix("0") if count >= 0.1 else "·"
            ax.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if share > 0.5 else INK)
    ax.set_xticks(range(len(layers)), layers)
    ax.set_yticks(range(len(GROUPS)), GROUPS)
    ax.set_xlabel("layer; a number: modules kept per search (·: below 0.1); shade: the share kept of the places there")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(True)
    return fig


def draw_ratios(every):
    """BIPEFT less five methods against the budget's share, but for failed trainings: means and intervals over seeds."""
    methods = "LoRA", "biases on even norms", "random", "matched random", "one look"
    fig, axes = plt.subplots(1, len(methods), figsize=(WIDTH, 2.8), sharey=True, layout="constrained")
    rows = [(data, "BIPEFT", backbone) for backbone, data in every.items()]
    rows += [(data, CLIPPED, f"{backbone}, clipped, less its own") for backbone, data in every.items()
             if data.scores([CLIPPED])]
    for (data, of, label), marker, colour, apart in zip(rows, "osD", (INK, BLUE, SOFT), (0.93, 1, 1.12)):
        budgets = sorted({x["budget"] for x in data.reported})
        for ax, method in zip(axes, methods):
            own = of.replace("BIPEFT", method)
            rival = own if own in METHODS else method
            found = [(1e4 * budget / data.backbone, data.contrasts(
                [rival], budget, of=of, without=data.failed([of, rival], budget)).get(rival)) for budget in budgets]
            points = [(share, c) for share, c in found if c and len(c.pairs) >= FEWEST]
            ax.errorbar([apart * share for share, _ in points], [c.mean_of_seeds for _, c in points],
                        [c.half_of_seeds for _, c in points], marker=marker, ms=4, color=colour, label=label)
    for ax, method in zip(axes, methods):
        ax.axhline(0, color=SOFT, lw=1)
        ax.set(title=f"BIPEFT −\n{method}", xscale="log", xlabel="budget, of 10,000", xlim=(0.28, 26), ylim=(-9, 9))
        ax.set_xticks([0.5, 1, 2, 5, 10, 20], ["½", "1", "2", "5", "10", "20"])
        ax.minorticks_off()
    axes[0].set_ylabel("points, cut at ±9; above 0\nBIPEFT is better")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


FIGURES = {"pairs": draw_pairs, "places": draw_places}


def draw(folder, prefix, figures, *of):
    """Every one of some figures for which there are lines, as folder/PREFIX-NAME.png.   of: what they are drawn of."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in figures.items():
        with plt.rc_context(STYLE):
            fig = make(*of)
            if fig is not None:
                save(fig, folder / f"{prefix}-{name}.png")
                plt.close(fig)
