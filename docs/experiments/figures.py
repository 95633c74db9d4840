"""The eight pictures of docs/walkthrough.md, from one search of the toy, and the numbers that the page quotes.

    python docs/experiments/figures.py                        docs/figures: 7 PNGs, 1 GIF, walkthrough.json
    python docs/experiments/figures.py --out DIR --seed 0     another seed, or bipeft.py's other flags for S2

Needs matplotlib. Takes 49 s on one thread of an AMD EPYC with little else to do: the search of `python bipeft.py --task
toy --seed 1`, by the program's own classes, which note what is drawn after each step and in each pass (test_figures.py
compares the structures), then the drawing. Another CPU or torch rounds otherwise, and finds another structure.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
matplotlib.use("Agg")
from matplotlib import pyplot as plt                                               # noqa: E402
from matplotlib.colors import ListedColormap                                       # noqa: E402
from matplotlib.patches import Patch, Rectangle                                    # noqa: E402

import bipeft                                                                      # noqa: E402

BLUE, ORANGE, GREEN, PURPLE, GREY, PALE = "#0072b2", "#d55e00", "#009e73", "#a6468c", "#666666", "#e4e4e4"
COLOUR = {"lora": BLUE, "adapter_lr": ORANGE, "bitfit": GREEN, "lnfit": PURPLE}
WIDTH = 8.3                                   # inches: at 100 dots an inch the width of a page on GitHub
STYLE = {"font.size": 9, "figure.titlesize": 9, "axes.titlesize": 9, "legend.fontsize": 8, "xtick.labelsize": 8,
         "ytick.labelsize": 8, "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "white"}


class NotedBatches(bipeft.Batches):
    """The program's batches, which note which of them were taken: (epoch, number)."""

    def __iter__(self):
        self.taken = getattr(self, "taken", [])
        for number, batch in enumerate(super().__iter__()):
            self.taken.append((self.epoch, number))
            yield batch


class NotedSearch(bipeft.Search):
    """The program's search, which notes what each pass had and felt, and what it holds after each step."""

    def __init__(self, model, space, settings, steps, warmup, run_pass):
        self.lora = space.modules[space.kinds.index("lora")]
        self.compute, self.passes, self.seen = run_pass, [], {}
        super().__init__(model, space, settings, steps, warmup, self.noted_pass)
        self.note(kept=self.kept, phi=self.rank_weights())

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
                  theta=self.theta.softmax(1)[:, 1], phi=self.rank_weights(),
                  after=bipeft.expected_parameters(self.keep_probabilities(), self.expected_sizes()))
        self.passes = []
        return line


class Record:
    """A search, and what it held after each of its T steps.

    names, kinds, sizes, ..: of the N modules.   By step, [T] or [T, N]: beta; loss, of pass 1; expected (E); reduction
    (R, NaN without a trigger); after (E once the step's trigger has selected); smoothed (s̄); indicator (I); fixed (d);
    choice (k*); theta (softmax(Θ), of keep).   With t = 0 in front, [T + 1, ..]: kept (b), phi (softmax(Φ)).
    passes, taken: of each step, what its passes had and felt, and the (epoch, number) of their batches.
    """

    def __init__(self, settings, structure, picture, space, budget, most, batches, history):
        self.settings, self.structure, self.picture = settings, structure, picture
        self.names, self.kinds, self.ranks = space.names, space.kinds, space.ranks
        self.sizes = space.param_counts.numpy()
        self.ranked, self.budget, self.most, self.batches = space.ranked.numpy(), budget, most, batches
        vars(self).update({k: v if k in ("passes", "taken") else np.array(v) for k, v in history.items()})
        self.T, self.N = self.smoothed.shape
        self.fired = np.flatnonzero(~np.isnan(self.reduction)) + 1              # the steps with a trigger
        if not len(self.fired):
            raise SystemExit("no trigger within the steps: nothing to draw; give more --search-epochs")
        self.first = int(self.fired[0])
        self.gone = np.where(self.kept[-1], self.T + 1, (~self.kept).argmax(0))               # [N], the step
        self.settled = np.where(self.fixed.any(0), self.fixed.argmax(0) + 1, self.T + 1)      # [N], likewise
        stay = np.flatnonzero(self.ranked & self.kept[-1])
        stay = stay if len(stay) else np.flatnonzero(self.ranked)
        self.pair = min(stay, key=lambda n: self.settled[n]), max(stay, key=lambda n: self.settled[n])
        self.cells = [place_of(name) for name in self.names]
        self.found = {f"{m['name']}.{m['kind']}": m["rank"] or "x" for m in structure.modules}
        flips = [t for t in range(self.first - 1) if len(self.passes[t]) == 3
                 and (self.passes[t][0]["gate"] != self.passes[t][2]["gate"]).any()]
        self.told = 1 + min(flips or range(self.first - 1), key=lambda t: abs(t - self.first / 2))   # a step, 1 .. T
        self.changed = [n for n in range(self.N) if self.names[n] in self.found and not (       # by the repair
            self.kept[-1, n] and self.found[self.names[n]] in ("x", self.ranks[self.choice[-1, n]]))]
        z = settings.triggers - -(-settings.triggers // 10)                     # triggers before p = 1 [D4]
        self.certain = int(self.fired[z]) if len(self.fired) > z else self.T + 1

    def before(self, t):
        """d, k* and C of Eq. 8 in step t, before its trigger, [N] each."""
        fixed, choice = (self.fixed[t - 2], self.choice[t - 2]) if t > 1 else (~self.ranked, self.choice[0])
        return fixed, choice, bipeft.expected_size(*map(torch.tensor, (
            np.log(self.phi[t]), self.sizes, fixed, choice))).numpy()

    def open_ranks(self):
        """At each trigger: how many ranks are open once its modules have gone, and Y, how many of them it fixes."""
        counts = []
        for t in self.fired:
            was_open = ~self.before(t)[0] & self.kept[t]
            counts.append((int(was_open.sum()), int((was_open & self.fixed[t - 1]).sum())))
        return counts

    def instability(self):
        """λ of Eq. 9 at each trigger, [triggers, N], from the recorded steps since the one before."""
        rows = []
        for j, t in zip([0, *self.fired], self.fired):
            rows.append(bipeft.rank_instability(torch.tensor(self.phi[j:t + 1])))
        return torch.stack(rows).numpy()


def place_of(name):
    """(stack and layer, column, kind) of a module's name within a T5; n0, n1, n2: the norms before a layer's blocks."""
    *place, kind = name.split(".")
    layer = place[2] if place[1] == "block" else "end"
    column = {"SelfAttention": "attn", "DenseReluDense": "ffn"}.get(place[-1], place[-1])
    if column.endswith("layer_norm"):
        column = "n" + (place[4] if layer != "end" else "0")
    return f"{place[0]} {layer}", column, kind


def record(settings):
    """Runs the program's own search with these settings, noting what it does.   Returns a Record."""
    made = []

    def noted(kind):
        return lambda *arguments: made.append(kind(*arguments)) or made[-1]

    torch.set_num_threads(1)                                            # as the program has it for the toy
    device = bipeft.choose_device(settings.device)
    with (mock.patch.multiple(bipeft, Batches=noted(NotedBatches), Search=noted(NotedSearch)),
          tempfile.TemporaryDirectory() as folder):
        files = bipeft.Record(dataclasses.replace(settings, out=folder), device)
        work = bipeft.Work(settings, device)
        structure = bipeft.run_search(work, files, bipeft.forward_backward)
    training, other, search = made
    taken = [(training.taken[t], *other.taken[2 * t:2 * t + 2]) for t in range(search.steps_done)]
    return Record(settings, structure, bipeft.picture(structure, work.model), search.space, search.budget, search.steps,
                  len(training), {**search.seen, "taken": taken})


# The figures: each takes a Record and returns a matplotlib Figure.


def short(r, n):
    """A module's name in a few letters, such as "enc 0 q lora"."""
    row, column, kind = r.cells[n]
    return f"{row.replace('oder', '')} {column} {kind}"


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
    """a) The first LoRA's A and B as they are stored, and in use under architectures that were drawn."""
    n, drawn, R = r.kinds.index("lora"), {}, r.ranks[-1]
    for t, (one, *_) in enumerate(r.passes[:r.first], 1):                       # the last step to draw each of these
        drawn[r.ranks[one["rank"][n]] if one["gate"][n] else 0] = t, one
    latest, one = max(drawn.values(), key=lambda found: found[0])
    shown = [(f"stored,\nstep {latest}", one["stored"], None)] + [
        (f"step {t}:\n" + (f"gate 1, rank {key}" if key else "gate 0"), one["used"], key)
        for key, (t, one) in sorted(drawn.items(), reverse=True)]
    figure, axes = plt.subplots(len(shown), 3, figsize=(WIDTH, 0.95 * len(shown) + 0.5), width_ratios=[1, 0.06, 1],
                                layout="constrained")
    for (text, pair, key), (left, middle, right) in zip(shown, axes):
        for ax, half, stored in zip((left, right), pair, shown[0][1]):
            ax.imshow(half, cmap="PuOr", vmin=-abs(stored).max(), vmax=abs(stored).max(), aspect="auto",
                      interpolation="nearest")
            ax.set(xticks=[], yticks=[k - 1 for k in r.ranks], yticklabels=r.ranks)
        middle.set(xlim=(-0.5, 0.5), ylim=(R - 0.5, -0.5))
        middle.axis("off")
        if key is not None:
            middle.barh(range(R), 1, 1, -0.5, color=[BLUE if i < key else "white" for i in range(R)], edgecolor=GREY)
        left.set_ylabel(text)
    axes[0][0].set_title(f"A: {R} rows of {pair.shape[-1]}, factor 1 in all of them")
    axes[0][2].set_title(f"B: {R} rows of {pair.shape[-1]}")
    figure.suptitle(f"{r.names[n]}: its weights, and its own last draws up to step {r.first}\n"
                    "below, a row of B in use is the stored one times its g · mask (blue: 1, white: 0)")
    return figure


def three_passes(r):
    """b) A step in which a gate opened or shut between the passes: which batch each pass saw, what it moved."""
    t = r.told - 1
    figure, axes = plt.subplots(3, 1, figsize=(WIDTH, 4.9), layout="constrained")
    for i, (ax, one, (epoch, number), what) in enumerate(zip(axes, r.passes[t], r.taken[t], "ΔW Θ Φ".split())):
        half, colour = ("the other half", ORANGE) if i else ("ΔW's half", BLUE)
        ax.bar(np.arange(r.batches) * r.N / r.batches, 0.7, 0.8, 2.3, align="edge",
               color=[colour if j == number else "#cccccc" for j in range(r.batches)])
        for bottom, flags, fill in ((1.15, one["gate"], GREY), (0, one["felt"], colour)):
            ax.bar(range(r.N), 0.7, 0.8, bottom, align="edge", edgecolor=GREY, lw=0.5,
                   color=[fill if flag else "white" for flag in flags])
        changed = np.flatnonzero(one["gate"] != r.passes[t][0]["gate"])
        ax.bar(changed - 0.15, 0.9, 1.1, 1.05, align="edge", edgecolor=ORANGE, color="none", lw=1.8)
        ax.set(xlim=(-0.2, r.N), ylim=(-0.1, 3.1), xticks=[], yticks=[0.35, 1.5, 2.65],
               yticklabels=[f"{what} gets a gradient", "gate open", f"batches of {half}"])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set_title(f"pass {i + 1}, for {what}: batch {number + 1} of {r.batches} in epoch {epoch + 1}, "
                     f"{one['gate'].sum()} gates open, {one['felt'].sum()} modules with a gradient", loc="left")
    figure.suptitle(f"step {r.told}: a box a batch, below it a box a module, in the same order in all rows")
    figure.legend(handles=[Patch(facecolor=GREY, edgecolor=GREY, label="gate open"),
                           Patch(facecolor=BLUE, edgecolor=GREY, label="the batch; with a gradient, pass 1"),
                           Patch(facecolor=ORANGE, edgecolor=GREY, label="passes 2, 3"),
                           Patch(facecolor="white", edgecolor=GREY, label="shut, or no gradient"),
                           Patch(facecolor="none", edgecolor=ORANGE, lw=1.8, label="Θ's step moved this gate")],
                  loc="outside lower center", ncols=5, frameon=False, handlelength=1.2, columnspacing=1.4)
    return figure


def sensitivities(r):
    """c) s̄ of six modules: three that go early, one that the repair takes back, two that stay."""
    order = sorted(range(r.N), key=lambda n: (r.gone[n], r.smoothed[-1, n]))
    leave, stay = ([n for n in order if (r.gone[n] > r.T) == kept] for kept in (False, True))
    back = [n for n in leave if n in r.changed] or leave[-1:]
    chosen = dict.fromkeys([*stay[-1:], *stay[len(stay) // 2:][:1], back[0], leave[2 * len(leave) // 3],
                            leave[len(leave) // 3], leave[0]])
    figure, axes = two_spans(r, [1], 4.4)
    steps, ax, labels = np.arange(1, r.T + 1), axes[0][1], []
    for n, colour in zip(chosen, (BLUE, GREEN, ORANGE, PURPLE, "#8a6d00", "#333333")):
        gone = min(r.gone[n], r.T)
        for one in axes[0]:
            one.plot(steps[:gone], r.smoothed[:gone, n], color=colour, lw=1.1)
            one.plot(steps[gone - 1:], r.smoothed[gone - 1:, n], color=colour, lw=1, ls=":")
            one.set_yscale("symlog", linthresh=1e-7, linscale=0.5)
        if r.gone[n] <= r.T:
            ax.plot(gone, r.smoothed[gone - 1, n], "X", color=colour, ms=7, mec="white", clip_on=False, zorder=4)
        if r.gone[n] <= r.T and n in r.changed:
            ax.plot(r.T + 1.3, r.smoothed[-1, n], "D", color=colour, ms=5, clip_on=False, zorder=4)
        labels.append((n, colour))
    axes[0][0].set_ylabel("s̄, logarithmic but for −1e-7 … 1e-7")
    figure.legend(handles=[plt.Line2D([], [], color=GREY, label="s̄ of a kept module"),
                           plt.Line2D([], [], color=GREY, ls="", marker="X", label="removed here"),
                           plt.Line2D([], [], color=GREY, ls=":", label="the s̄ it had then"),
                           plt.Line2D([], [], color=GREY, ls="", marker="D", label="taken back by the repair")],
                  loc="outside upper center", ncols=4, frameon=False)
    figure.canvas.draw()
    top = np.inf
    for n, colour in sorted(labels, key=lambda label: -r.smoothed[-1, label[0]]):   # a name beside its line's end
        y = (ax.transData + ax.transAxes.inverted()).transform((r.T, r.smoothed[-1, n]))[1]
        top = min(y, top - 0.05)
        ax.text(1.04, top, short(r, n), transform=ax.transAxes, va="center", fontsize=8, color=colour)
    return figure


def indicators(r):
    """d) I_t, modules by steps; below it beta against tau, with the triggers."""
    figure, axes = two_spans(r, [3, 1.1], 6.6)
    order = sorted(range(r.N), key=lambda n: (-r.gone[n], -r.smoothed[-1, n]))
    shade = np.where(r.kept[1:], r.indicator, 2)[:, order].T                    # [N, T]
    steps = np.arange(1, r.T + 1)
    for raster, beta in axes.T:
        raster.axhline((r.gone > r.T).sum(), color="black", lw=1.2, ls=":")
        raster.imshow(shade, cmap=ListedColormap(["white", BLUE, "#c8c8c8"]), vmin=0, vmax=2, aspect="auto",
                      interpolation="nearest", extent=(0.5, r.T + 0.5, r.N, 0))
        beta.plot(steps, r.beta, color=BLUE, lw=1)
        beta.axhline(r.settings.tau, color=ORANGE, ls="--", lw=1)
        beta.plot(r.fired, r.beta[r.fired - 1], "o", color=ORANGE, ms=3.5)
        beta.set_ylim(0, 1.05)
    axes[0][0].set_ylabel("module: the last kept on top, the first to go below")
    axes[1][0].set_ylabel("β")
    figure.legend(handles=[Patch(color=BLUE, label="I = 1: among the best that fit B together"),
                           Patch(facecolor="white", edgecolor=GREY, label="I = 0"),
                           Patch(color="#c8c8c8", label="removed")],
                  loc="outside upper center", ncols=3, frameon=False)
    axes[0][1].text(1.01, 1 - (r.gone > r.T).sum() / r.N, "above:\nkept after\nthe last\ntrigger", va="center",
                    transform=axes[0][1].transAxes)
    axes[1][0].text(r.first * 0.98, r.settings.tau - 0.03, f"τ = {r.settings.tau}", ha="right", va="top", color=ORANGE)
    axes[1][1].text(r.first, 0.3, f"dots: the {len(r.fired)} triggers", color=ORANGE)
    return figure


def staircase(r):
    """e) E_t down to B, and R_z at each trigger."""
    figure, axes = two_spans(r, [2.4, 1], 5.4)
    steps, final = np.arange(1, r.T + 1), r.structure.parameters
    for size, portion in axes.T:
        path = np.stack([r.expected, r.after], 1).flatten()                     # before and after a trigger of a step
        size.plot(np.repeat(steps, 2), path, color=BLUE, lw=1.2,
                  label="E, before and after each trigger\n(after: with the next trigger's p)")
        size.axhline(r.budget, color=ORANGE, ls="--", lw=1, label=f"B = {r.budget:,}")
        size.plot(r.T, final, "D", color=PURPLE, ms=6, zorder=5, label=f"the structure found: {final:,}")
        portion.bar(r.fired, r.reduction[r.fired - 1], 0.6, color=GREY)
        for ax in (size, portion):
            ax.axvspan(r.certain - 0.5, r.T + 0.5, color=PALE, lw=0, zorder=0)
    size.set_ylim(0)
    axes[0][1].legend(loc="lower left", frameon=False)
    axes[0][0].set_ylabel("parameters")
    axes[1][0].set_ylabel("R at a trigger")
    axes[0][1].text(r.certain - 1.5, axes[0][1].get_ylim()[1] * 0.97, "p = 1 from here on", ha="right", va="top")
    axes[1][0].text(r.first / 2, r.reduction[r.fired - 1].max() / 2, "no trigger yet", ha="center", color=GREY)
    for ax in axes[:, 0]:
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return figure


def ranks(r):
    """f) softmax(Phi) of two kept modules, the first and the last to be fixed, and their lambda at the triggers."""
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 5), sharey="row", height_ratios=[1.5, 1], layout="constrained")
    unstable = r.instability()
    for n, (above, below) in zip(r.pair, axes.T):
        fixed = min(r.settled[n], r.T)
        for k, (rank, colour, style) in enumerate(zip(r.ranks, (BLUE, ORANGE, PURPLE), ("-", "--", "-."))):
            above.plot(range(r.T + 1), r.phi[:, n, k], color=colour, ls=style, lw=1.2, label=f"rank {rank}")
        for ax in (above, below):
            ax.axvline(fixed, color=GREY, lw=1, ls=":")
        held = f" ({r.found.get(r.names[n], 'left out')} after the repair)" if n in r.changed else ""
        above.set(title=f"{short(r, n)}: rank {r.ranks[r.choice[-1, n]]} fixed at step {fixed}{held}", xlabel="step",
                  xlim=(0, 1.05 * r.T))
        for m in np.flatnonzero(r.ranked):
            until = r.fired <= min(r.settled[m], r.T)
            below.plot(r.fired[until], unstable[until, m], ".", color="#cccccc", ms=3)
        until = r.fired <= fixed
        below.plot(r.fired[until], unstable[until, n], "o-", color=BLUE, ms=4, lw=1)
        below.set(yscale="log", xlabel="step, from the first trigger on", xlim=(r.first - 1, r.T + 3))
    axes[0][0].set_ylabel("softmax(Φ)")
    axes[1][0].set_ylabel("λ, grey: other modules")
    axes[0][1].legend(frameon=False, loc="lower left")
    return figure


def draw_grid(ax, r, t):
    """All modules as boxes at step t, or, at T + 1, the structure found: layers by places, a block a kind."""
    rows, x, last = list(dict.fromkeys(row for row, *_ in r.cells)), 0, t > r.T
    for kind, colour in COLOUR.items():
        columns = list(dict.fromkeys(column for _, column, one in r.cells if one == kind))
        for n in [n for n in range(r.N) if r.kinds[n] == kind]:
            kept = r.names[n] in r.found if last else r.kept[t, n]
            going, fixed = not kept and r.gone[n] == t < r.T + 1, last or r.fixed[t - 1, n]
            rank = r.found.get(r.names[n]) if last else r.ranks[r.choice[t - 1, n]] if fixed else "?"
            left, top = x + columns.index(r.cells[n][1]), rows.index(r.cells[n][0])
            fill = (colour, 1 if fixed else 0.5) if kept else "#555555" if going else "white"
            mended = last and n in r.changed
            ax.add_patch(Rectangle((left + 0.06, top + 0.06), 0.88, 0.88, facecolor=fill, lw=2.5 if mended else 1,
                                   edgecolor="black" if mended else colour if kept else "#cccccc"))
            ax.text(left + 0.5, top + 0.54, "×" if going else rank if kept and r.ranked[n] else "", ha="center",
                    va="center", color="white", weight="bold", fontsize=8)
        for i, column in enumerate(columns):
            ax.text(x + i + 0.5, -0.15, column, ha="center", va="bottom", fontsize=8)
        ax.text(x + len(columns) / 2, -0.85, kind, ha="center", va="bottom", color=colour, weight="bold")
        x += len(columns) + 0.7
    ax.set(xlim=(0, x - 0.7), ylim=(len(rows), -1.6), xticks=[], yticks=np.arange(len(rows)) + 0.5, yticklabels=rows)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def structure(r):
    """g) The structure found."""
    figure, ax = plt.subplots(figsize=(WIDTH, 3.1), layout="constrained")
    draw_grid(ax, r, r.T + 1)
    parts = [f"{kind} {sum(m['kind'] == kind for m in r.structure.modules)} of {r.kinds.count(kind)}"
             for kind in COLOUR]
    ax.set_xlabel(f"kept: {', '.join(parts)}; {r.structure.parameters:,} parameters of {r.budget:,}\n"
                  "white: left out; no box: no such module; black frame: taken back or made smaller by the repair")
    return figure


def animation(r, path):
    """h) Modules leaving the grid, a frame a trigger: a GIF."""
    figure, (grid, bar) = plt.subplots(2, 1, figsize=(WIDTH, 3.3), height_ratios=[5, 0.55], layout="constrained")
    frames, many = [], lambda value, _=None: f"{value:,.0f}"
    for t in [*np.linspace(1, r.first - 1, 4).astype(int), *r.fired, r.T + 1]:
        grid.clear(), bar.clear()
        draw_grid(grid, r, t)
        size, count, z = r.after[min(t, r.T) - 1], r.kept[min(t, r.T)].sum(), (r.fired <= t).sum()
        title = (f"step {t}, " + (f"after trigger {z} of {r.settings.triggers}" if z else "no trigger yet")
                 + f": {count} modules, E = {many(size)}{' with the p of the next' if t in r.fired[:-1] else ''}")
        if t > r.T:
            size = r.structure.parameters
            title = f"after the repair (black frames: what it changed): {len(r.found)} modules, {many(size)} parameters"
        grid.set_title(title, loc="left")
        bar.barh(0, size, color=GREY)
        bar.axvline(r.budget, color=ORANGE, lw=2)
        bar.set(xlim=(0, max(r.after.max(), r.expected.max())), yticks=[], xlabel="E, parameters expected; the line: B")
        bar.xaxis.set_major_formatter(many)
        figure.savefig(drawn := io.BytesIO(), dpi=100)
        frames.append(Image.open(drawn).convert("RGB"))
    palette = frames[len(frames) // 2].quantize(32)
    first, *rest = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    first.save(path, save_all=True, append_images=rest, duration=[500] * 4 + [350] * len(r.fired) + [4000], loop=0,
               optimize=True)
    plt.close(figure)


def facts_of_size(r):
    """Those of E, of Y and of what the last trigger leaves above B."""
    later = r.pair[1]                                           # of the two that are drawn, the one fixed later
    open_ranks, last = r.open_ranks(), int(r.fired[-1])
    before = {t: r.before(t) for t in (1, r.first, last)}
    grown = [b / a for a, b in zip(*[(r.expected[t - 1], r.theta[t - 1].mean(), before[t][2].sum())
                                     for t in (1, r.first)])]
    grown.append(grown[0] / grown[1] / grown[2])                # as p was larger where C is
    calm = int(r.instability()[r.fired <= r.settled[later], later].argmin())
    certain, real = before[last][2], r.sizes[np.arange(r.N), r.choice[-1]]
    late = r.kept[last] & ~before[last][0]
    return [
        "E grows {:.2f}-fold: {:.2f}-fold by the mean of p, {:.2f}-fold by ΣC, since Φ leans to larger ranks, and "
        "{:.2f}-fold because p rose more for large modules than for small ones".format(*grown),
        f"{open_ranks[0][0]} ranks are open at the first trigger",
        f"Y is 0 at {sum(y == 0 for _, y in open_ranks)} of the {len(r.fired)} triggers and at most "
        f"{max([y for _, y in open_ranks[:-1]], default=0)} before the last, which fixes {open_ranks[-1][1]}",
        f"its lowest λ at step {r.fired[calm]}: {open_ranks[calm][0]} ranks are open, "
        f"{r.settings.triggers - calm} triggers left, and Y is {open_ranks[calm][1]}",
        f"the last trigger leaves {r.kept[-1].sum()} modules with {real[r.kept[-1]].sum():,} parameters, "
        f"{real[r.kept[-1]].sum() - r.budget:,} more than B",
        f"{r.reduction[last - 1] - certain[r.gone == last].sum():,.0f} of R were left over",
        f"made {real[late].sum():,} real parameters out of {certain[late].sum():,.0f} expected ones, "
        f"{real[late].sum() - certain[late].sum():,.0f} more"]


def facts(r):
    """What the page says of this run, in the words in which it says it."""
    def named(modules):
        return ", ".join(short(r, n) for n in modules) or "none"

    told, pair, t = r.passes[r.told - 1], r.pair, r.certain
    gone = [list(np.flatnonzero(r.gone == t)) for t in r.fired]
    ends = {n: r.found.get(r.names[n]) for n in range(r.N)}
    lower = [f"{short(r, n)} from rank {r.ranks[r.choice[-1, n]]} to {ends[n] or 'none'}" for n in range(r.N)
             if r.kept[-1, n] and r.ranked[n] and ends[n] != r.ranks[r.choice[-1, n]]]
    back = [n for n in range(r.N) if not r.kept[-1, n] and ends[n]]
    negative = np.flatnonzero((r.smoothed < 0).any(1)) + 1
    crossed = int(np.flatnonzero(r.beta >= r.settings.tau)[0]) + 1
    low = crossed + int(r.beta[crossed - 1:r.first].argmin())
    return [
        f"CPU, Python {platform.python_version()}, torch {torch.__version__}, seed {r.settings.seed}",
        f"{r.N} modules", f"B = {r.budget:,}", f"T = {r.most}", f"{r.batches} batches in each half",
        f"In step {r.told} of this run {told[0]['gate'].sum()} of {r.N} gates are open",
        f"{told[0]['felt'].sum()} modules get a gradient for ΔW, {told[1]['felt'].sum()} for Θ and "
        f"{told[-1]['felt'].sum()} for Φ",
        f"the new Θ has shut {(told[0]['gate'] & ~told[-1]['gate']).sum()} and opened "
        f"{(~told[0]['gate'] & told[-1]['gate']).sum()} gates",
        f"{r.indicator[r.first - 1].sum()} modules have I = 1 at step {r.first}",
        f"β is at least τ for the first time at step {crossed}",
        f"lowest at step {low}, {r.beta[low - 1]:.3f}", f"temperature {5 - 4 * (r.T - 1) / (r.most - 1):.2f}",
        f"from step {r.first} on β is never below {np.floor(1000 * r.beta[r.first - 1:].min()) / 1000:.3f}",
        f"the {len(r.fired)} triggers are the steps {r.first} to {r.fired[-1]}",
        f"E is {r.expected[0]:,.0f} after step 1 and {r.expected[r.first - 1]:,.0f} at step {r.first}",
        "R is {:,.0f} at the first trigger and {:,.0f} at the last".format(*r.reduction[r.fired[[0, -1]] - 1]),
        f"The first trigger removes {named(gone[0])}; the next three remove {named(sum(gone[1:4], []))}",
        f"{sum(not one for one in gone)} of the {len(gone)} triggers remove nothing",
        f"from {r.expected[min(t, r.T) - 2]:,.0f} before the trigger of step {t - 1} to "
        f"{r.expected[min(t, r.T) - 1]:,.0f} before that of step {t}",
        f"{r.after[min(t, r.T) - 2]:,.0f} after the trigger of step {t - 1}",
        f"the last {(r.fired >= t).sum()} triggers remove {sum(map(len, gone[-(r.fired >= t).sum():]))} of the "
        f"{(~r.kept[-1]).sum()} modules that go",
        f"some s̄ is negative after {len(negative)} of the {r.T} steps, the last time after step {negative[-1]}",
        f"softmax(Θ) lies between {r.theta[-1].min():.2f} and {r.theta[-1].max():.2f} at the end",
        f"the mean training loss of the {min(25, r.first)} steps up to {r.first} is "
        f"{r.loss[max(0, r.first - 25):r.first].mean():.3f}",
        f"the mean of softmax(Θ) is {r.theta[0].mean():.2f} after step 1 and {r.theta[r.first - 1].mean():.2f} at step "
        f"{r.first}",
        f"The entries of softmax(Φ) range from {r.phi[:, r.ranked].min():.2f} to {r.phi[:, r.ranked].max():.2f}",
        f"{short(r, pair[0])} is fixed at step {r.settled[pair[0]]}, {short(r, pair[1])} at step {r.settled[pair[1]]}",
        f"lowers {', '.join(lower) or 'none'}",
        f"takes back {named(back)}: {sum(n in gone[-1] for n in back)} of the {len(gone[-1])} that the last trigger "
        "removed",
        f"{len(r.found)} modules with {r.structure.parameters:,} parameters",
        *facts_of_size(r)]


FIGURES = {"weights": weights, "passes": three_passes, "sensitivity": sensitivities, "indicator": indicators,
           "budget": staircase, "ranks": ranks, "structure": structure}


def main(arguments=None):
    """Searches, draws, prints and writes the numbers.   Returns the Record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="further flags: bipeft.py's")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "figures")
    args, rest = parser.parse_known_args(arguments)
    try:
        args.out.mkdir(parents=True, exist_ok=True)                     # before the work, not after it
    except OSError as error:
        parser.error(f"--out {args.out} can't be made: {error.strerror}")
    plt.rcParams.update(STYLE)
    with bipeft.deterministic():
        (settings,) = bipeft.parse(["--task", "toy", "--seed", "1", "--device", "cpu", *rest])
        r = record(settings)
    numbers = {"facts": facts(r), "picture": r.picture.splitlines()}
    bipeft.write_atomically(args.out / "walkthrough.json", json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
    print("\n".join((*numbers["facts"], r.picture)))
    for name, draw in FIGURES.items():
        figure = draw(r)
        figure.savefig(drawn := io.BytesIO(), dpi=160)
        Image.open(drawn).convert("RGB").quantize(96).save(args.out / f"{name}.png", optimize=True)
        plt.close(figure)
    animation(r, args.out / "search.gif")
    return r


if __name__ == "__main__":
    main()
