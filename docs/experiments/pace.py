"""A figure of a search's pace: what it kept, when it was stable enough to trigger, and its losses.

    python docs/experiments/pace.py runs/toy-s2-0/search.jsonl
    python docs/experiments/pace.py runs/*/search.jsonl --out pace.png

Needs matplotlib. Reads one or more search.jsonl, each with the structure.json of its run beside it,
and writes one PNG, a column a run. Where the last tenth of the triggers begins, E jumps up: from
there on a kept module counts whole (reading 4 in docs/decisions.md).
"""

import argparse
import io
import json
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt                                               # noqa: E402

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#666666"


def smooth(values, width):
    """The mean of the last `width` values, fewer at the start; None stays a gap."""
    return [np.mean(np.array(values[max(0, i + 1 - width):i + 1], float)) for i in range(len(values))]


def draw(size, stability, loss, path, tau):
    """One run, into three axes one above the other."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    structure = json.loads(path.with_name("structure.json").read_text())
    log = {key: [line[key] for line in lines] for key in lines[0]}
    steps, done, found = log["step"], log["triggers"], sum(m["parameters"] for m in structure["modules"])
    fired = [step for step, before, now in zip(steps, [0, *done], done) if now > before]
    count, width = size.twinx(), max(1, len(steps) // 40)
    handles = size.plot(steps, log["expected"], color=BLUE, label="E, expected parameters")
    handles += [size.axhline(structure["budget"], color=BLUE, ls=":", label=f"budget, {structure['budget']:,}")]
    handles += size.plot(steps[-1], found, "o", color=BLUE, clip_on=False, label=f"structure found, {found:,}")
    handles += count.plot(steps, log["kept"], color=ORANGE, label="modules kept")
    handles += count.plot(steps, log["fixed"], color=ORANGE, ls="--", lw=1, label="of these, rank fixed")
    stability.plot(steps, log["beta"], color=GREEN, lw=1, label="β")
    stability.axhline(tau, color=GREY, ls=":", label=f"τ = {tau}")
    stability.vlines(fired, 0, 0.06, color=GREY, lw=0.6, label=f"{len(fired)} triggers")
    for key, label, colour in (("loss_train", "ΔW, its half of train", BLUE), ("loss_theta", "Θ, the other", ORANGE),
                               ("loss_phi", "Φ, the other", GREEN)):
        loss.plot(steps, smooth(log[key], width), color=colour, lw=1.1, label=label)
    stability.legend(loc="center right")
    loss.legend(title=f"mean of {width} steps")
    loss.set_xlabel("search step")
    for ax in (size, stability, loss):
        ax.set_xlim(steps[0], steps[-1])
        if fired:
            shade = ax.axvspan(fired[0] - 0.5, fired[-1] + 0.5, color="0.92", lw=0, label="first to last trigger")
            handles += [shade] if ax is size else []
    for ax, colour in ((size, BLUE), (count, ORANGE)):
        ax.set_ylim(0)
        ax.tick_params(axis="y", colors=colour)
    size.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    size.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    size.set_title(path.resolve().parent.name, fontweight="bold", pad=48)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("logs", nargs="+", type=Path, help="search.jsonl files")
parser.add_argument("--out", type=Path, default=Path("pace.png"))
parser.add_argument("--tau", type=float, default=0.85, help="the threshold of the runs")
args = parser.parse_args()
plt.rcParams.update({"font.size": 9, "legend.fontsize": 8, "legend.title_fontsize": 8, "axes.spines.top": False})
figure, axes = plt.subplots(3, len(args.logs), figsize=(6.4 * len(args.logs), 7.6), sharex="col", squeeze=False,
                            height_ratios=[3, 2, 2.2], layout="constrained")
for column, log_file in zip(axes.T, args.logs):
    draw(*column, log_file, args.tau)
for row, name in zip(axes, ("parameters", "stability", "loss")):
    row[0].set_ylabel(name)
figure.savefig(drawn := io.BytesIO(), dpi=110)
Image.open(drawn).convert("RGB").quantize(64).save(args.out, optimize=True)              # a third of the size
