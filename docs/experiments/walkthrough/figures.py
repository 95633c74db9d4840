"""Pictures and numbers of docs/walkthrough.md, of a search of the toy and of comparison/results/smollm2_search.

    python docs/experiments/walkthrough/figures.py                        docs/figures: PNGs, a GIF, walkthrough.json
    python docs/experiments/walkthrough/figures.py --out DIR --seed 2     another seed, or flags of bipeft.py

Needs matplotlib, and a minute: the search of `python bipeft.py --task toy --seed 1`, by the program's own classes,
which note what is drawn, then the drawing. Another CPU or torch may find another structure.
"""

import argparse
import dataclasses
import io
import json
import platform
import sys
import tempfile
from pathlib import Path
from unittest import mock

import matplotlib
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "comparison"))
matplotlib.use("Agg")
from matplotlib import pyplot as plt                                               # noqa: E402
from matplotlib.colors import ListedColormap                                       # noqa: E402
from matplotlib.patches import Patch, Rectangle                                    # noqa: E402

import bipeft                                                                      # noqa: E402
from palette import BLUE, COLOUR, INK, KINDS, ORANGE, PALE, SOFT, STYLE, WIDTH, save, where    # noqa: E402

RESULTS = Path(__file__).resolve().parents[1] / "comparison" / "results"
S2 = "lora", "adapter_lr", "bitfit", "lnfit"


class NotedSearch(bipeft.Search):
    """The program's search, which notes what each pass had and felt, and what it holds after each step."""

    def __init__(self, model, space, settings, steps, warmup, run_pass):
        self.lora = space.modules[space.kinds.index("lora")]
        self.compute, self.passes, self.seen = run_pass, [], {}
        super().__init__(model, space, settings, steps, warmup, self.noted_pass)
        self.note(kept=self.kept)

    def noted_pass(self, model, space, gate, ranks, batch, inputs):
        stored = torch.stack([self.lora.A, self.lora.B]).detach().numpy().copy()                  # of d -> d
        loss = self.compute(model, space, gate, ranks, batch, inputs)
        with torch.no_grad():
            space.enter(gate, ranks)
            used = torch.stack([self.lora.weight(name, self.lora.A) for name in "AB"]).numpy()
        space.leave()
        if gate.requires_grad or ranks.requires_grad:                   # of Θ or Φ a row is a module
            felt = inputs[0].grad.any(1).numpy()
        else:
            felt = np.array([any(p.grad.any() for p in module.parameters()) for module in space.modules])
        self.passes.append({"gate": gate.detach().numpy() > 0, "rank": ranks.detach().argmax(1).numpy(), "felt": felt,
                            "stored": stored, "used": used})
        return loss

    def note(self, **values):
        for key, value in values.items():
            value = value.detach().numpy().copy() if torch.is_tensor(value) else value
            self.seen.setdefault(key, []).append(value)

    def step(self, *batches):
        line = super().step(*batches)
        self.note(beta=line["beta"], loss=line["loss_train"], expected=line["expected"], passes=self.passes,
                  reduction=np.nan if line["reduction"] is None else line["reduction"], smoothed=self.smoothed,
                  kept=self.kept, fixed=self.fixed, indicator=self.indicators[-1], choice=self.choice,
                  after=bipeft.expected_parameters(self.keep_probabilities(), self.expected_sizes()))
        self.passes = []
        return line


class Record:
    """A search, and what it held after each of its T steps.

    names, kinds, sizes, ..: of the N modules.   By step, [T] or [T, N]: beta; loss, of pass 1; expected (E); reduction
    (R, NaN without a trigger); after (E once the step's trigger has selected); smoothed (s̄); indicator (I); fixed (d);
    choice (k*).   With t = 0 in front, [T + 1, N]: kept (b).   passes: of each step, what its passes had and felt.
    """

    def __init__(self, settings, structure, space, budget, most, history):
        self.settings, self.structure = settings, structure
        self.names, self.kinds, self.ranks = space.names, space.kinds, space.ranks
        self.sizes = space.param_counts.numpy()
        self.ranked, self.budget, self.most = space.ranked.numpy(), budget, most
        vars(self).update({k: v if k == "passes" else np.array(v) for k, v in history.items()})
        self.T, self.N = self.smoothed.shape
        self.fired = np.flatnonzero(~np.isnan(self.reduction)) + 1              # the steps with a trigger
        if not len(self.fired):
            raise SystemExit("no trigger within the steps: nothing to draw; give more --search-epochs")
        self.first = int(self.fired[0])
        self.gone = np.where(self.kept[-1], self.T + 1, (~self.kept).argmax(0))               # [N], the step
        self.cells = [where(name) for name in self.names]
        self.found = {f"{m['name']}.{m['kind']}": m["rank"] or "x" for m in structure.modules}
        self.flips = [t for t in range(self.first - 1) if len(self.passes[t]) == 3
                      and (self.passes[t][0]["gate"] != self.passes[t][2]["gate"]).any()]
        self.told = 1 + min(self.flips or range(self.first - 1), key=lambda t: abs(t - self.first / 2))    # 1 .. T
        self.changed = [n for n in range(self.N) if self.names[n] in self.found and not (       # by the repair
            self.kept[-1, n] and self.found[self.names[n]] in ("x", self.ranks[self.choice[-1, n]]))]
        z = settings.triggers - -(-settings.triggers // 10)                     # triggers before p = 1 [D4]
        self.certain = int(self.fired[z]) if len(self.fired) > z else self.T + 1


def record(settings):
    """Runs the program's own search with these settings, noting what it does.   Returns a Record."""
    made = []
    torch.set_num_threads(1)                                            # as the program has it for the toy
    device = bipeft.choose_device(settings.device)
    with (mock.patch.object(bipeft, "Search", lambda *given: made.append(NotedSearch(*given)) or made[0]),
          tempfile.TemporaryDirectory() as folder):
        files = bipeft.Record(dataclasses.replace(settings, out=folder), device)
        structure = bipeft.run_search(bipeft.Work(settings, device), files, bipeft.forward_backward)
    (search,) = made
    return Record(settings, structure, search.space, search.budget, search.steps, search.seen)


def short(r, n):
    """A module's name in a few letters, such as "enc 0 q lora"."""
    return " ".join(r.cells[n])


def two_spans(r, heights, height):
    """Axes [rows, 2]: the steps before the first trigger at the left, those with triggers, wider, at the right."""
    figure, axes = plt.subplots(len(heights), 2, figsize=(WIDTH, height), squeeze=False, sharex="col", sharey="row",
                                height_ratios=heights, width_ratios=[1, 1.5], layout="constrained")
    for left, right in axes:
        left.set_xlim(0.5, r.first - 2.5)
        right.set_xlim(r.first - 2.5, r.T + 1)
    for ax, text in zip(axes[-1], ("step, before the triggers", "step, with the triggers")):
        ax.set_xlabel(text)
    return figure, axes


def weights(r):
    """The first LoRA's A, and its B as it is stored and in use under architectures that were drawn."""
    n, drawn, R = r.kinds.index("lora"), {}, r.ranks[-1]
    for t, (one, *_) in enumerate(r.passes[:r.first], 1):                       # the last step to draw each of these
        drawn[r.ranks[one["rank"][n]] if one["gate"][n] else 0] = t, one
    latest, one = max(drawn.values(), key=lambda found: found[0])
    (A, B), most = one["stored"], abs(one["stored"][1]).max()
    shown = [(f"B as stored, step {latest}", B, R)] + [
        (f"B in use, step {t}:\n" + (f"gate 1, rank {key}" if key else "gate 0"), one["used"][1], key)
        for key, (t, one) in sorted(drawn.items(), reverse=True)]
    figure, axes = plt.subplots(len(shown) + 1, 2, figsize=(WIDTH, 0.72 * len(shown) + 1), width_ratios=[0.05, 1],
                                layout="constrained")
    for i, ((text, half, key), (left, ax)) in enumerate(zip([("A, in every use", A, R), *shown], axes)):
        ax.imshow(half, cmap="PuOr", vmin=-(abs(A).max() if not i else most), vmax=abs(A).max() if not i else most,
                  aspect="auto", interpolation="nearest")
        ax.set(xticks=[], yticks=[k - 1 for k in r.ranks], yticklabels=r.ranks)
        ax.yaxis.tick_right()
        left.set(xlim=(-0.5, 0.5), ylim=(R - 0.5, -0.5), xticks=[], yticks=[])
        left.spines[:].set_visible(False)
        left.set_ylabel(text, rotation=0, ha="right", va="center")
        if i > 1:
            left.barh(range(R), 1, 1, -0.5, color=[BLUE if j < key else "white" for j in range(R)], edgecolor=SOFT)
    axes[0][1].set_title(f"{short(r, n)}: {R} rows of {A.shape[-1]} numbers each; orange < 0 < purple; at the left "
                         "g · m, blue 1, white 0", loc="left")
    return figure


def three_passes(r):
    """A step in which a gate opened or shut between the passes: what was open, and what had a gradient."""
    t = r.told - 1
    order = sorted(range(r.N), key=lambda n: S2.index(r.kinds[n]))
    at = np.array([i + 2.5 * S2.index(r.kinds[n]) for i, n in enumerate(order)])
    colours = [COLOUR[r.kinds[n]] for n in order]
    figure, axes = plt.subplots(3, 1, figsize=(WIDTH, 4), layout="constrained")
    for i, (ax, one, what) in enumerate(zip(axes, r.passes[t], "ΔW Θ Φ".split())):
        for bottom, flags in ((1.15, one["gate"][order]), (0, one["felt"][order])):
            ax.bar(at, 0.7, 0.8, bottom, align="edge", lw=0.6, edgecolor=colours,
                   color=[colour if flag else "white" for colour, flag in zip(colours, flags)])
        changed = np.flatnonzero(one["gate"][order] != r.passes[t][0]["gate"][order])
        ax.bar(at[changed] - 0.25, 0.96, 1.3, 1.02, align="edge", edgecolor=INK, color="none", lw=2)
        ax.set(xlim=(-0.4, at[-1] + 1.2), ylim=(-0.1, 2), yticks=[0.35, 1.5],
               yticklabels=[f"{what} gets a gradient", "gate open"],
               xticks=[at[[r.kinds[n] == kind for n in order]].mean() for kind in S2],
               xticklabels=[KINDS[kind] for kind in S2])
        for tick, kind in zip(ax.get_xticklabels(), S2):
            tick.set(color=COLOUR[kind], weight="bold")
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set_title(f"pass {i + 1}, for {what}, on {'D_val' if i else 'D_tra'}: {one['gate'].sum()} gates open, "
                     f"{one['felt'].sum()} modules with a gradient", loc="left")
    figure.suptitle(f"step {r.told}: filled: open, or with a gradient; black frame: a gate that Θ's step has changed")
    return figure


def sensitivities(r):
    """s̄ of six modules: four that go, two that stay."""
    order = sorted(range(r.N), key=lambda n: (r.gone[n], r.smoothed[-1, n]))
    leave, stay = ([n for n in order if (r.gone[n] > r.T) == kept] for kept in (False, True))
    chosen = dict.fromkeys([*stay[-1:], *stay[len(stay) // 2:][:1], leave[-1], leave[2 * len(leave) // 3],
                            leave[len(leave) // 3], leave[0]])
    figure, axes = two_spans(r, [1], 4)
    steps, ax = np.arange(1, r.T + 1), axes[0][1]
    for n, width in zip(chosen, (2.2, 1.4, 1.4, 1.4, 0.8, 0.8)):
        gone, colour = min(r.gone[n], r.T), COLOUR[r.kinds[n]]
        for one in axes[0]:
            one.plot(steps[:gone], r.smoothed[:gone, n], color=colour, lw=width)
            one.plot(steps[gone - 1:], r.smoothed[gone - 1:, n], color=colour, lw=1, ls=":")
            one.set_yscale("symlog", linthresh=1e-7, linscale=0.5)
        if r.gone[n] <= r.T:
            ax.plot(gone, r.smoothed[gone - 1, n], "X", color=colour, ms=7, mec="white", clip_on=False, zorder=4)
    axes[0][0].set_ylabel("s̄, linear within ±1e-7, else logarithmic")
    figure.legend(handles=[plt.Line2D([], [], color=SOFT, label="s̄ of a kept module"),
                           plt.Line2D([], [], color=SOFT, ls="", marker="X", label="removed here"),
                           plt.Line2D([], [], color=SOFT, ls=":", label="the s̄ it had then")],
                  loc="outside upper center", ncols=4)
    figure.canvas.draw()
    top = np.inf
    for n in sorted(chosen, key=lambda n: -r.smoothed[-1, n]):                  # a name beside its line's end
        y = (ax.transData + ax.transAxes.inverted()).transform((r.T, r.smoothed[-1, n]))[1]
        top = min(y, top - 0.06)
        ax.text(1.04, top, short(r, n), transform=ax.transAxes, va="center", fontsize=8, color=COLOUR[r.kinds[n]])
    return figure


def indicators(r):
    """I_t, modules by steps; below it beta against tau, with the triggers."""
    figure, axes = two_spans(r, [3, 1.1], 5.6)
    order = sorted(range(r.N), key=lambda n: (-r.gone[n], -r.smoothed[-1, n]))
    shade = np.where(r.kept[1:], r.indicator, 2)[:, order].T                    # [N, T]
    steps, kept = np.arange(1, r.T + 1), (r.gone > r.T).sum()
    for raster, beta in axes.T:
        raster.axhline(kept, color="black", lw=1.2, ls=":")
        raster.imshow(shade, cmap=ListedColormap(["white", BLUE, "#c8c8c8"]), vmin=0, vmax=2, aspect="auto",
                      interpolation="nearest", extent=(0.5, r.T + 0.5, r.N, 0))
        beta.plot(steps, r.beta, color=BLUE, lw=1)
        beta.axhline(r.settings.tau, color=INK, ls="--", lw=1)
        beta.plot(r.fired, r.beta[r.fired - 1], "o", color=ORANGE, ms=3.5, mec=INK, mew=0.5)
        beta.set_ylim(0, 1.05)
    axes[0][0].set_ylabel("module: the last kept on top, the first to go below")
    axes[1][0].set_ylabel("β")
    figure.legend(handles=[Patch(color=BLUE, label="I = 1: among the best that fit B together"),
                           Patch(facecolor="white", edgecolor=SOFT, label="I = 0"),
                           Patch(color="#c8c8c8", label="removed"),
                           plt.Line2D([], [], color="black", ls=":", label="above: kept after the last trigger")],
                  loc="outside upper center", ncols=4)
    axes[1][0].text(r.first * 0.98, 0.08, f"dashed: τ = {r.settings.tau}", ha="right")
    axes[1][1].text(r.first, 0.08, f"dots: the {len(r.fired)} triggers")
    return figure


def staircase(r):
    """E_t down to B, and R_z at each trigger."""
    figure, axes = two_spans(r, [2.4, 1], 4.8)
    steps, final = np.arange(1, r.T + 1), r.structure.parameters
    for size, portion in axes.T:
        path = np.stack([r.expected, r.after], 1).flatten()                     # before and after a trigger of a step
        size.plot(np.repeat(steps, 2), path, color=BLUE, lw=1.2, label="E, before and after each trigger")
        size.axhline(r.budget, color=INK, ls="--", lw=1, label=f"B = {r.budget:,}")
        size.plot(r.T, final, "D", color=ORANGE, mec=INK, ms=6, zorder=5, label=f"the structure found: {final:,}")
        portion.bar(r.fired, r.reduction[r.fired - 1], 0.6, color=SOFT)
        for ax in (size, portion):
            ax.axvspan(r.certain - 1, r.T + 0.5, color=PALE, lw=0, zorder=0, label="p = 1")
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    size.set_ylim(0)
    figure.legend(*axes[0][1].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    axes[0][0].set_ylabel("parameters")
    axes[1][0].set_ylabel("R at a trigger")
    axes[1][0].text(r.first / 2, r.reduction[r.fired - 1].max() / 2, "no trigger yet", ha="center")
    return figure


def draw_grid(ax, r, t):
    """All modules as boxes at step t, or, at T + 1, the structure found: layers by places, a block a kind."""
    rows, x, last = list(dict.fromkeys(row for row, *_ in r.cells)), 0, t > r.T
    for kind in S2:
        colour, columns = COLOUR[kind], list(dict.fromkeys(column for _, column, one in r.cells if one == kind))
        for n in [n for n in range(r.N) if r.kinds[n] == kind]:
            kept = r.names[n] in r.found if last else r.kept[t, n]
            going = not kept and (r.kept[-1, n] if last else r.gone[n] == t)
            fixed = last or r.fixed[t - 1, n]
            rank = r.found.get(r.names[n]) if last else r.ranks[r.choice[t - 1, n]] if fixed else "?"
            left, top = x + columns.index(r.cells[n][1]), rows.index(r.cells[n][0])
            changed = last and n in r.changed
            ax.add_patch(Rectangle(
                (left + 0.06, top + 0.06), 0.88, 0.88, facecolor=(colour, 1 if fixed else 0.25) if kept else "white",
                edgecolor="black" if changed else colour if kept else "#cccccc", lw=2.5 if changed else 0.8))
            ax.text(left + 0.5, top + 0.54, "×" if going else rank if kept and r.ranked[n] else "", ha="center",
                    va="center", color="white" if kept and fixed else INK, weight="bold", fontsize=10 if going else 8)
        for i, column in enumerate(columns):
            ax.text(x + i + 0.5, -0.15, column, ha="center", va="bottom", fontsize=8)
        ax.text(x + len(columns) / 2, -0.85, KINDS[kind], ha="center", va="bottom", color=colour, weight="bold")
        x += len(columns) + 0.7
    ax.set(xlim=(0, x - 0.7), ylim=(len(rows), -1.6), xticks=[], yticks=np.arange(len(rows)) + 0.5, yticklabels=rows)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def animation(r, path):
    """Modules leaving the grid, a frame a trigger: a GIF."""
    figure, (grid, bar) = plt.subplots(2, 1, figsize=(WIDTH, 3.3), height_ratios=[5, 0.55], layout="constrained")
    frames, many = [], lambda value, _=None: f"{value:,.0f}"
    for t in [r.first - 1, *r.fired, r.T + 1]:
        grid.clear(), bar.clear()
        draw_grid(grid, r, t)
        size, count, z = r.after[min(t, r.T) - 1], r.kept[min(t, r.T)].sum(), (r.fired <= t).sum()
        title = (f"step {t}, " + (f"after trigger {z} of {r.settings.triggers}" if z else "no trigger yet")
                 + f": {count} modules, {many(size)} parameters expected")
        if t > r.T:
            size = r.structure.parameters
            added = ", black frame: what it changed" * bool(r.changed)
            title = f"after the repair (×: what it drops{added}): {len(r.found)} modules, {many(size)} parameters"
        grid.set_title(title, loc="left")
        bar.barh(0, size, color=SOFT)
        bar.axvline(r.budget, color=INK, lw=2)
        bar.set(xlim=(0, max(r.after.max(), r.expected.max())), yticks=[], xlabel="parameters; the line: the budget B")
        bar.xaxis.set_major_formatter(many)
        figure.savefig(drawn := io.BytesIO(), dpi=100)
        frames.append(Image.open(drawn).convert("RGB"))
    palette = frames[len(frames) // 2].quantize(64)
    palette.putpalette([255 if value > 250 else value for value in palette.getpalette()])        # white is white
    first, *rest = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    first.save(path, save_all=True, append_images=rest, duration=[800] * (len(frames) - 1) + [5000], loop=0,
               optimize=True)
    plt.close(figure)


def recorded(folder):
    """What a run of bipeft.py leaves.   Returns (lines of search.jsonl, structure.json, metrics.json)."""
    lines = [json.loads(line) for line in (folder / "search.jsonl").read_text().splitlines()]
    return lines, *(json.loads((folder / f"{name}.json").read_text()) for name in ("structure", "metrics"))


def real_search(lines, structure, metrics):
    """beta against tau, and E down to B."""
    figure, (beta, size) = plt.subplots(2, 1, figsize=(WIDTH, 4.2), sharex=True, layout="constrained")
    steps, tau = [x["step"] for x in lines], metrics["settings"]["tau"]
    fired = [x for x in lines if x["reduction"] is not None]
    beta.plot(steps, [x["beta"] for x in lines], color=BLUE, lw=0.9)
    beta.axhline(tau, color=INK, ls=":", lw=1.2, label=f"τ = {tau}")
    beta.plot([x["step"] for x in fired], [x["beta"] for x in fired], "o", color=ORANGE, mec=INK, mew=0.4, ms=3.5,
              label=f"a trigger, {len(fired)} in all")
    beta.set(ylabel="β, from 0.5 on", ylim=(0.5, 1.02))
    size.plot([*steps, steps[-1]], [*(x["expected"] for x in lines), metrics["parameters"]], color=BLUE, lw=1.2,
              drawstyle="steps-post", label="E, before a step's trigger")
    size.axhline(structure["budget"], color=INK, ls="--", lw=1, label=f"B = {structure['budget']:,}")
    size.plot(fired[-1]["step"], metrics["parameters"], "D", color=ORANGE, mec=INK, ms=5, clip_on=False,
              label="found: after the last trigger and the repair")
    size.axvline(fired[-len(fired) // 10]["step"], color=INK, ls="-.", lw=0.8, label="p = 1 from here on")
    size.set(xlabel="step", ylabel="parameters", xlim=(0, steps[-1] + 3), yscale="log")
    size.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for ax in (size, beta):
        ax.axvspan(0, fired[0]["step"] - 0.5, color=PALE, lw=0, zorder=0, label="before the first trigger")
    handles, labels = (a + b[:4] for a, b in zip(beta.get_legend_handles_labels(), size.get_legend_handles_labels()))
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


# What the page says of both, in the words in which it says it.

def facts(r):
    """Of the toy's search."""
    def named(modules):
        return ", ".join(short(r, n) for n in modules) or "none"

    told, t = r.passes[r.told - 1], r.certain
    gone = [list(np.flatnonzero(r.gone == t)) for t in r.fired]
    ends = {n: r.found.get(r.names[n]) for n in range(r.N)}
    dropped = [n for n in range(r.N) if r.kept[-1, n] and not ends[n]]
    real = r.sizes[np.arange(r.N), r.choice[-1]][r.kept[-1]].sum()
    was_open = [~r.fixed[t - 2] & r.kept[t] for t in r.fired]               # once the trigger's modules have gone
    settled = [int((was & r.fixed[t - 1]).sum()) for was, t in zip(was_open, r.fired)]      # Y
    return [
        f"CPU, Python {platform.python_version()}, torch {torch.__version__}, seed {r.settings.seed}",
        f"{r.N} modules", f"B = {r.budget:,}", f"T = {r.most}",
        f"In step {r.told} of this run {told[0]['gate'].sum()} of {r.N} gates are open",
        f"{told[0]['felt'].sum()} modules get a gradient for ΔW, {told[1]['felt'].sum()} for Θ and "
        f"{told[-1]['felt'].sum()} for Φ",
        f"In {len(r.flips)} of the {r.first - 1} steps before the first trigger Θ's step changes a gate",
        f"the new Θ shuts {(told[0]['gate'] & ~told[-1]['gate']).sum()} and opens "
        f"{(~told[0]['gate'] & told[-1]['gate']).sum()} of the gates",
        f"the {len(r.fired)} triggers come within the steps {r.first} to {r.fired[-1]}",
        f"β is below τ in {(r.beta[r.first - 1:] < r.settings.tau).sum()} of these {r.T - r.first + 1} steps",
        f"The first triggers remove {named(sum(gone[:4], []))}",
        f"{sum(not one for one in gone)} of the {len(gone)} triggers remove nothing",
        f"from {r.expected[min(t, r.T) - 2]:,.0f} before the trigger of step {t - 1} to "
        f"{r.expected[min(t, r.T) - 1]:,.0f} before that of step {t}",
        f"the last {(r.fired >= t).sum()} triggers remove {sum(map(len, gone[-(r.fired >= t).sum():]))} of the "
        f"{(~r.kept[-1]).sum()} modules that go",
        f"the mean training loss of the {min(25, r.first)} steps up to {r.first} is "
        f"{r.loss[max(0, r.first - 25):r.first].mean():.3f}",
        f"{was_open[0].sum()} ranks are open at the first trigger",
        f"Y is 0 at {settled.count(0)} of the {len(r.fired)} triggers and at most {max(settled[:-1], default=0)} "
        f"before the last, which fixes {settled[-1]}",
        f"the last trigger leaves {r.kept[-1].sum()} modules with {real:,} parameters, {real - r.budget:,} more than B",
        f"the repair drops {len(dropped)} modules, {named(dropped)}, and changes or adds {len(r.changed)} others",
        f"{len(r.found)} modules with {r.structure.parameters:,} parameters"]


def real_facts(lines, structure, metrics):
    """Of the recorded search."""
    fired, tau = [x["step"] for x in lines if x["reduction"] is not None], metrics["settings"]["tau"]
    late = [x["beta"] for x in lines if fired[0] <= x["step"] <= fired[-1]]
    certain = fired[len(fired) - -(-len(fired) // 10)]                      # the first trigger with p = 1 [D4]
    before, at = lines[certain - 2], lines[certain - 1]
    kinds = [m["kind"] for m in structure["modules"]]
    return [
        f"B = {structure['budget']:,} and Z = {metrics['settings']['triggers']}",
        f"the {len(fired)} triggers come within the steps {fired[0]} to {fired[-1]}",
        f"in {sum(beta < tau for beta in late)} of these {len(late)} steps β is below τ",
        f"a mean loss of {np.mean([x['loss_train'] for x in lines[fired[0] - 1:]]):.3f} nats a token",
        f"E is {lines[fired[0] - 1]['expected']:,.0f} at the first trigger",
        f"from {before['expected']:,.0f} to {at['expected']:,.0f}",
        f"the last {len(fired) - fired.index(certain)} triggers take {before['kept']} modules down to {lines[-1]['kept']}",
        f"Of {lines[0]['kept']} modules {len(kinds)} stay",
        f"{metrics['test']:.1f} % of the test, where the most frequent answer has {metrics['test_most_frequent']:.1f}",
        ", ".join(f"{kinds.count(kind)} {KINDS[kind]}" for kind in KINDS if kind in kinds)
        + f", with {sum(m['parameters'] for m in structure['modules']):,} parameters"]


# Of the toy: each takes a Record and returns a matplotlib Figure.
FIGURES = {"weights": weights, "passes": three_passes, "sensitivity": sensitivities, "indicator": indicators,
           "budget": staircase}


def main(arguments=None):
    """Searches, draws, prints and writes the numbers.   Returns the Record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="further flags: bipeft.py's")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "figures")
    args, rest = parser.parse_known_args(arguments)
    (settings,) = bipeft.parse(["--task", "toy", "--seed", "1", "--device", "cpu", *rest])
    args.out.mkdir(parents=True, exist_ok=True)                         # before the work, not after it
    plt.rcParams.update(STYLE)
    real = recorded(RESULTS / "smollm2_search")
    save(real_search(*real), args.out / "smollm2-search.png")
    with bipeft.deterministic():
        r = record(settings)
    numbers = {"facts": facts(r), "recorded": real_facts(*real)}
    bipeft.write_atomically(args.out / "walkthrough.json", json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
    print("\n".join(sum(numbers.values(), [])))
    for name, draw in FIGURES.items():
        save(draw(r), args.out / f"{name}.png")
    animation(r, args.out / "search.gif")
    return r


if __name__ == "__main__":
    main()
