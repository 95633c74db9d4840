"""BIPEFT in one file: search which PEFT modules to keep, where, and at which rank.

    Chang et al., "BIPEFT: Budget-Guided Iterative Search for Parameter Efficient Fine-Tuning of
    Large Pretrained Language Models", Findings of EMNLP 2024, arXiv 2410.09079.

    python bipeft.py --task toy                            a generated task, offline, on a laptop
    python bipeft.py --task rte                            google-t5/t5-large and GLUE's RTE, from the hub
    python bipeft.py --task rte --model DIR --data-dir DIR the same from local folders
    python bipeft.py --task mrpc --structure runs/rte-s2-0/structure.json      transfer (Table 4)

Given a frozen backbone, a task and a budget of B parameters, one short differentiable search decides
which of N candidate modules are kept and at which of K ranks; the structure is then trained anew.
Section 1 is Eq. (1)-(10), 2 and 3 are the search spaces, 4 is Algorithm 1; 5-8 are a program around
them, of which 1-4 need nothing; what stands before them serves both. [D7] is decision 7 of
docs/decisions.md, taken where the paper is open. Ratios are parts per ten thousand, the paper's %%.

    paper        in the code                        shape    meaning
    N, K         len(space), len(space.ranks)                candidate modules; candidate ranks
    Dim, R       space.dim, space.ranks[-1]         [K]      candidate ranks; the largest of them
    Θ            theta                              [N, 2]   binary architecture weights: remove, keep
    Φ            phi                                [N, K]   rank architecture weights
    ΔW           space.tensors                               weights of the PEFT modules, then of also_train
    P            space.size                                  numbers of the modules in ΔW
    W_0          model                                       the pretrained backbone, frozen
    G(D)         train_gradients, val_gradients     [P]      gradients of ΔW on D_tra and on D_val
    f            train_magnitude, val_magnitude     [N]      Eq. 2
    α            gradient_cosine                    [N]      Eq. 3
    s, s̄         current, smoothed                  [N]      Eq. 1, Eq. 4
    I_t          indicators[-1]                     [N]      importance indicator, 0 or 1
    β_t, τ, H    beta, tau, window                           Eq. 5, stability; its threshold; its steps
    t, T, z, Z   steps_done, steps, triggers_done, triggers  steps, and triggers, so far and at most
    p_n          probability                        [N]      that a module is kept
    q_n          space.param_counts                 [N, K]   parameters of module n at each rank
    C_n          expected_sizes                     [N]      Eq. 8, expected parameters of a module
    E_t, R_z     expected, reduction                         Eq. 7, expected parameters; Eq. 6, what goes
    b            kept                               [N]      1: the module is kept
    d            fixed                              [N]      1: its rank is fixed; it has none; it is gone
    k*           choice                             [N]      index of the fixed rank; the largest until then
    λ            instability                        [N]      Eq. 9, low for a settled rank
    v            potential                          [N]      the rank that a module would have now
    Y_z          quota                                       Eq. 10, how many ranks to fix at a trigger
    B            budget                                      in parameters
"""

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import reprlib
import statistics
import string
import sys
import time
import types
import warnings
import zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

try:
    import filelock
    import huggingface_hub
    import numpy as np
    import safetensors.torch
    import torch
    import torch.nn.functional as F
    import transformers
    from torch import nn
    from transformers import AttentionInterface, AttentionMaskInterface     # loads most of transformers
except (ImportError, OSError, KeyboardInterrupt) as error:
    if __name__ != "__main__":
        raise
    message = "stopped before it began"
    if str(error):
        message = " ".join(str(error).split()) + ": run pip install -r requirements.txt"
    print(f"bipeft.py: {message}", file=sys.stderr)
    sys.exit(2)


@dataclass
class Settings:
    """All that a run is told; the flags of the command line. None: the task's own number, or nothing given.

    The parser takes the fields' comments as help texts; the search, the training and metrics.json read the
    fields. `search` of section 4 takes any of them by name.
    """

    task: str = "rte"                   # GLUE's or SuperGLUE's by name, custom (a person's own), or toy
    model: str = "google-t5/t5-large"   # T5 or Llama (whose answer follows its input), hub or folder
    data_dir: str = None  # folder with <task>/<split> (custom: <split>), .csv, .jsonl, .parquet; default: hub
    max_length: int = None  # tokens of inputs and T5's targets (custom, GLUE 128, SuperGLUE 256, ReCoRD 512)
    metric: str = None           # of custom: accuracy, F1, Matthews, Pearson or token-F1 (accuracy)
    space: str = "s2"                   # s1, s2, all, or a comma list of kinds of module
    ranks: tuple = (1, 4, 8)            # Dim, the candidate ranks
    budget: float = 1.39e-4   # B: below 1 a share of the backbone, else a number of parameters (toy: 0.03)
    triggers: int = 100                 # Z, how many times modules and ranks are selected (custom, toy: 30)
    tau: float = 0.85                   # τ, the stability that triggers
    gamma: float = 0.85                 # γ, how much of the past s̄ keeps
    window: int = 5                     # H, the steps over which stability is measured
    epochs: int = None                  # passes over train in re-training (the task's: 1 to 40)
    search_epochs: int = None           # passes over half of train, at most (as --epochs; toy: 5)
    warmup_epochs: int = None           # of these before the first trigger (the task's)
    arch_lr: float = 0.01               # learning rate of Θ and Φ
    structure: str = None               # a structure.json to train: no search
    lr: float = 3e-4                    # learning rate of ΔW, falling linearly to 0 (custom 1e-3, toy 5e-3)
    lr_warmup: float = 0.0              # share of the steps, at most 0.5, in which lr first rises (try 0.1)
    clip: float = None                  # cap on the norm of ΔW's gradient in a search (custom: 1); 0: none
    weight_decay: float = 1e-4          # of ΔW, Θ and Φ
    batch_size: int = None              # examples a step (32, ReCoRD and custom 16)
    seed: int = 0                       # one or more numbers: of splits, weights, draws
    out: str = None                     # folder to write (runs/<task>-<space>-<seed>)
    device: str = "auto"                # cpu, cuda, cuda:1, ...; auto takes a GPU if there is one
    dtype: str = "float32"              # of the backbone: float32, bfloat16 or float16
    eager: bool = False                 # on a GPU: no CUDA graphs; shut modules are skipped
    save_every: int = 100               # steps between checkpoints, or fewer, if they take over a minute
    fresh: bool = False                 # start over instead of going on with what --out holds


class UsageError(ValueError):
    """A person's mistake. The message is one line: what is wrong, and what to do about it."""


SHORT = reprlib.Repr()                          # how a person's text, or row, is shown in such a line
SHORT.maxlevel = 1
SHORT.maxstring = 80
SHORT.maxother = 80


def derive(seed, *keys):
    """A seed of its own for each use, from a run's seed: no two draws depend on each other [D57]."""
    return int(np.random.SeedSequence((seed, *keys)).generate_state(1)[0])


# ==================================================================================================
# 1. The equations (3.2 - 3.5), in the paper's order: functions of numbers alone, without a model or state
# ==================================================================================================


def sensitivity(train_magnitude, val_magnitude, gradient_cosine):
    """Eq. (1):  s_n = f_n(D_tra) + α_n · f_n(D_val).   All [N]; returns s, [N]."""
    return train_magnitude + gradient_cosine * val_magnitude


def magnitude(weights, gradients, lengths, counts):
    """Eq. (2):  f_n(D) = 1/|M_n| · Σ over w in M_n of |w · G(w, D)|

    weights, gradients: w and G of all modules end to end, [P], of one moment [D1].   lengths: how many of
    the P numbers are whose, [N].   counts: |M_n|, [N]: all of a module while its rank is open, then the
    slice, outside of which G is 0.   Returns f, [N].
    """
    return segment_sum((weights * gradients).abs(), lengths) / counts


def alignment(train_gradients, val_gradients, lengths):
    """Eq. (3):  α_n = cos(G_n(D_tra), G_n(D_val)), over the module's whole flattened gradients

    train_gradients, val_gradients: [P].   lengths: as in Eq. (2).
    Returns α, [N], in -1 .. 1, and 0 where either gradient is zero [D13].
    """
    dot = segment_sum(train_gradients * val_gradients, lengths)                        # [N]
    # Two roots, not the root of a product: squares of small gradients multiply to an underflow.
    norms = (segment_sum(train_gradients.square(), lengths).sqrt()
             * segment_sum(val_gradients.square(), lengths).sqrt())
    cosine = dot / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    return torch.where(norms > 0, cosine, 0.0).clamp(-1, 1)


def segment_sum(values, lengths):
    """The sums of consecutive runs of a vector, [N] of [P].   lengths: of each run, [N]."""
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


def smooth(previous, current, gamma):
    """Eq. (4):  s̄_t = γ · s̄_{t-1} + (1 - γ) · s_t.   All [N]; γ in 0 .. 1; s̄_0 = 0 [D35]."""
    return gamma * previous + (1 - gamma) * current


def importance_indicator(smoothed, expected_sizes, kept, budget):
    """3.2.2:  I_t marks the most sensitive modules that fit the budget together

    Walks the kept modules in descending s̄, adding up C_n, and stops at the first that would pass B [D2].
    smoothed: s̄, [N].   expected_sizes: C_n, [N].   kept: b, [N] bool.   budget: B.   Returns I.
    """
    order = smoothed.argsort(descending=True, stable=True)
    return first_that_fit(order, expected_sizes, kept, budget)


def first_that_fit(order, sizes, kept, limit):
    """Those kept modules that come first in an order, as long as their sizes add up to a limit at most [D14].

    order: [N] int.   sizes, kept: [N].   Returns [N] bool.
    """
    sizes = (sizes * kept)[order]
    # A product with a triangle of ones: on a GPU the rounding of cumsum differs from run to run.
    running_sum = torch.ones(len(sizes), len(sizes), dtype=sizes.dtype, device=sizes.device).tril() @ sizes
    return torch.zeros_like(kept).scatter(0, order, running_sum <= limit) & kept


def stability(indicators, window):
    """Eq. (5):  β_t = 1/H · Σ for j = t-H+1 .. t of cos(I_j, I_{j-1})

    The sum as printed has H + 1 terms over H, and could reach 1.2; here it has H [D3]. Two empty
    indicators count as equal (1), an empty and a non-empty one as different (0).
    indicators: the latest I, oldest first, [at least 1, N]; the last H + 1 are read.   window: H.
    Returns β_t, a scalar in 0 .. 1; 0 with fewer than H + 1 indicators (not stable yet).
    """
    if len(indicators) < window + 1:
        return torch.zeros(())
    before = indicators[-(window + 1):-1].double()                                     # [H, N]
    now = indicators[-window:].double()                                                # [H, N]
    cosines = F.cosine_similarity(before, now)                                     # [H]; of zeros 0
    return torch.where((before == now).all(1), 1.0, cosines).mean()


def expected_reduction(expected, budget, triggers, triggers_done):
    """Eq. (6):  R_z = (E_t - B) / (Z - z), in parameters

    triggers_done: z, those already done, 0 .. Z-1, so that Z - z is never 0 [D16]; else ValueError.
    """
    if not 0 <= triggers_done < triggers:
        raise ValueError(f"z = {triggers_done} is outside 0..{triggers - 1}: no trigger is left")
    return (expected - budget) / (triggers - triggers_done)


def expected_parameters(probability, expected_sizes):
    """Eq. (7):  E_t = Σ_n p_n · C_n, in parameters.   probability: p, [N].   expected_sizes: C, [N]."""
    return (probability * expected_sizes).sum()  # Eq. (8) holds the printed inner sum already [D15]


def keep_probability(theta, kept):
    """3.3.1:  p_n = b_n · softmax(Θ_n)[1].   theta: Θ, [N, 2].   kept: b, [N] bool.   Returns p, [N]."""
    return theta.softmax(1)[:, 1] * kept


def expected_size(phi, param_counts, fixed, choice):
    """Eq. (8):  C_n = q_n[k*_n] where the rank is fixed, else q_n · softmax(Φ_n)

    phi: Φ, [N, K].   param_counts: q_n, in parameters, [N, K].   fixed: d, [N] bool.   choice: k*, [N] int.
    Returns C, [N] float64, so that sums of parameters are exact.
    """
    param_counts = param_counts.double()                                               # [N, K]
    at_choice = param_counts.gather(1, choice[:, None]).squeeze(1)                     # [N]
    return torch.where(fixed, at_choice, (param_counts * phi.double().softmax(1)).sum(1))


def modules_to_remove(smoothed, probability, expected_sizes, kept, reduction):
    """3.3.2:  the least sensitive modules whose expected parameters are R_z together

    Removes from the lowest s̄ up, of equals the earlier first, while the removed p_n · C_n add up to at
    most R_z, and stops at the first that does not fit [D2]: it stays in the next E_t.   smoothed: s̄.
    probability: p.   expected_sizes: C.   kept: b.   All [N].   reduction: R_z.   Returns [N] bool.
    """
    return first_that_fit(smoothed.argsort(stable=True), probability * expected_sizes, kept, reduction)


def rank_instability(history):
    """Eq. (9):  λ_n = 1/K · Σ_k σ_{n,k} · KL(Φ_j,n ‖ Φ_t,n)

    history: softmax(Φ) at the steps j .. t, the last trigger's and now, both included, [steps, N, K].
    σ is the population deviation over these steps [D5].   Returns λ, [N]; low is stable.
    """
    sigma = history.std(0, correction=0)                                               # [N, K]
    first, last = history[0], history[-1]
    divergence = (torch.xlogy(first, first) - torch.xlogy(first, last)).sum(1)      # 0 · log 0 is 0
    return sigma.mean(1) * divergence


def potential_ranks(phi, dim, kept, fixed, choice):
    """3.4.2:  v_n = Dim[argmax Φ_n], Dim[k*_n] if fixed, 0 if removed

    phi: Φ, [N, K].   dim: Dim, rank values, not indices, [K].   kept, fixed: b, d, [N] bool.   choice: k*,
    [N] int.   Returns v, [N] float64.
    """
    index = torch.where(fixed, choice, phi.argmax(1))                                  # [N]
    return dim.double()[index] * kept


def rank_quota(potential_before, potential_now, fixed, remaining):
    """Eq. (10):  Y_z = floor( sum(1 - d_{z-1}) · cos(v_{z-1}, v_z) / (Z - z) )

    potential_before, potential_now: v at the last trigger and now, [N].   fixed: d_{z-1}, with those that
    this trigger has removed [D5], [N] bool.
    remaining: Z - z >= 1.   Returns Y_z, an integer scalar; 0 if either v is zero [D17].
    """
    norms = (potential_before.square().sum() * potential_now.square().sum()).sqrt()
    cosine = (potential_before * potential_now).sum() / norms.clamp(min=1)
    return ((~fixed).sum() * cosine / remaining).floor().long()


def ranks_to_fix(instability, fixed, quota):
    """3.4.2:  the open modules with the Y_z lowest λ, whose ranks get fixed

    instability: λ, [N].   fixed: d, [N] bool.   quota: Y_z.   Returns [N] bool.
    """
    order = instability.masked_fill(fixed, math.inf).argsort(stable=True)          # open ones first
    first = torch.arange(len(order), device=order.device) < quota             # [N], the Y_z of them
    return torch.zeros_like(fixed).scatter(0, order, first) & ~fixed


def gumbel_noise(shape, generator):
    """-log(-log(u)), u uniform in (0, 1).   Returns a float32 tensor of `shape` on the CPU."""
    u = torch.rand(shape, generator=generator).clamp(min=torch.finfo(torch.float32).tiny)
    return -torch.log(-torch.log(u))


def gumbel_softmax(logits, noise, temperature):
    """3.5, after Jang et al. 2017:  the one-hot arg-max of softmax((logits + noise) / temperature)

    logits, noise: [..., C].   Returns [..., C]; its gradient is the softmax's (straight-through).
    """
    soft = ((logits + noise) / temperature).softmax(-1)
    one_hot = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return one_hot + (soft - soft.detach())    # the bracket is exactly 0, so that shut is exactly 0


def fill_budget(smoothed, param_counts, kept, choice, budget):
    """[D6], once after the last trigger:  the budget is a promise, and is used up

    Drops the least sensitive kept module while the total is above B; then offers what is free to the
    modules left out, in descending s̄, each at the largest candidate rank that fits.   smoothed: s̄, N
    numbers.   param_counts: q, N lists of K.   kept: b, N bools.   choice: k*, N indices.   Returns
    (kept, choice), new lists.
    """
    kept = list(kept)
    choice = list(choice)
    by_sensitivity = sorted(range(len(kept)), key=smoothed.__getitem__, reverse=True)
    free = budget - sum(param_counts[n][choice[n]] for n in range(len(kept)) if kept[n])
    for n in reversed(by_sensitivity):
        if free < 0 and kept[n]:
            kept[n] = False
            free += param_counts[n][choice[n]]
    for n in by_sensitivity:
        fitting = [k for k, count in enumerate(param_counts[n]) if count <= free]
        if not kept[n] and fitting:
            kept[n] = True
            choice[n] = fitting[-1]
            free -= param_counts[n][choice[n]]
    return kept, choice


# ==================================================================================================
# 2. The searchable modules (4.1), each the formula of its own paper. "Parameters" is q_n at rank r
# ==================================================================================================


def zeros(*shape):
    """A float32 parameter of zeros."""
    return nn.Parameter(torch.zeros(shape))


def kaiming(rows, columns, generator):
    """A float32 parameter, Kaiming-uniform, [rows, columns]."""
    value = torch.empty(rows, columns)
    return nn.Parameter(nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator))


def normal(rows, columns, generator):
    """A float32 parameter from N(0, 0.02²), [rows, columns]."""
    return nn.Parameter(torch.empty(rows, columns).normal_(0, 0.02, generator=generator))


class Searchable(nn.Module):
    """A PEFT module at one place of the backbone: a child of that place, with float32 weights of its own.

    In a search a gate (0 or 1) and a rank mask ([R]: ones, then zeros) multiply some of its weights, where
    `weight` takes them. `factors` says which: the rank mask the rows that belong to one rank component, the
    gate what is applied last. So a shut gate adds exactly zero, and has a gradient, what the module would
    add, by which it can open again. Were an inner factor gated, too, that would be 0 · 0, and shut would
    stay shut [D10].

    Weight entanglement (3.5, after AutoFormer): a module holds its weights once, at the largest rank R; a
    smaller rank is their leading slice. With R = 8, the gate open (g = 1) and rank 4 chosen (mask = 1 1 1 1
    0 0 0 0):

        weight                         its factor      here
        LoRA        A, whole           1               1
                    B, row 1           g · mask_1      1
                    B, row 5           g · mask_5      0     component 5 adds nothing, whatever A does
        Adapter-LR  down_in, row 5     mask_5          0     it must not reach the gelu, either
                    up_out, row 5      g · mask_5      0
                    up_bias, whole     g               1     a bias has no rank; a shut gate drops it

    A module is built by (place, rank, generator): the module of the backbone it is for, r, and the source of
    its random initial weights.
    """

    roles = ()           # the roles of the places that take this module, as in section 3
    ranked = True        # False: there is no rank to choose, and q_n is the same for all k
    factors = {}         # tensor's name: "gate", "mask" or "gate·mask"; the others stay as they are
    computed = True      # False in a pass that skips the module: what a shut gate adds is zero
    architecture = None  # in a search, what `Space.enter` gives it for a pass: its factors, and copies
                         # of its tensors in the backbone's format

    def weight(self, name, x):
        """One of the module's tensors in the dtype of x; in a search, under the present architecture."""
        if self.architecture is None:
            return getattr(self, name).to(x.dtype)
        w = self.architecture[name]
        if name in self.factors:
            w = w * self.architecture[self.factors[name]]
        return w.to(x.dtype)

    def attach(self, place, role):
        """Hooks it to the place, whose output it changes.   Returns a handle, which undoes that."""
        return place.register_forward_hook(self.after, with_kwargs=True)

    def after(self, place, args, kwargs, output):
        """The hook.   output: the place's; a tuple has it first."""
        if not self.computed:
            return output
        x = first_input(args, kwargs)
        if isinstance(output, tuple):
            return (self(x, output[0]), *output[1:])
        return self(x, output)


class LoRA(Searchable):
    """Hu et al. 2022:  y + B A x, on a linear layer.   Parameters: r · (in + out).

    No extra scaling (α/r = 1) [D11]. A is random, B zero: at first it is the zero function. Gate and mask
    multiply B's rows: row i is what component i writes into y.
    """

    roles = ("linear",)
    factors = {"B": "gate·mask"}

    def __init__(self, place, rank, generator=None):
        super().__init__()
        self.A = kaiming(rank, place.in_features, generator)    # R^(r×in)
        self.B = zeros(rank, place.out_features)       # R^(r×out), the paper's B^T

    def forward(self, x, y):
        """x: [..., in], the layer's input.   y: [..., out], its output.   Returns the new y."""
        return y + F.linear(x, self.weight("A", x)) @ self.weight("B", x)


class LowRankAdapter(Searchable):
    """Adapter-LR of S3Delta (Hu et al. 2022b):  y + U gelu(D y + b) + c, D = D2 D1 and U = U2 U1.

    d -> m -> d with m = d/32, after a self-attention or feed-forward block; each map is a product of
    factors of rank r.   Parameters: r · (d + m) + m + r · (m + d) + d.   U2, b and c start at zero, D1, D2
    and U1 do not: it starts as the zero function, and every factor can learn [D28]. The mask takes
    components from D by D1's rows and from U by U2's; the gate acts once, at the end, on U2 and c.
    """

    roles = ("attention", "ffn", "ffn_end")
    factors = {"down_in": "mask", "up_out": "gate·mask", "up_bias": "gate"}

    def __init__(self, place, rank, generator=None):
        super().__init__()
        d = width(place)
        m = max(1, d // 32)
        self.down_in = kaiming(rank, d, generator)      # D1 in R^(r×d)
        self.down_out = kaiming(m, rank, generator)     # D2 in R^(m×r)
        self.down_bias = zeros(m)                                               # b  in R^m
        self.up_in = kaiming(rank, m, generator)        # U1 in R^(r×m)
        self.up_out = zeros(rank, d)                                            # U2^T in R^(r×d)
        self.up_bias = zeros(d)                                                 # c  in R^d

    def forward(self, x, y):
        """y: [..., d], the block's output, which is also the adapter's input.   Returns the new y."""
        h = F.linear(y, self.weight("down_in", y))                                    # [..., r]
        h = F.linear(h, self.weight("down_out", y), self.weight("down_bias", y))      # [..., m]
        h = F.linear(F.gelu(h), self.weight("up_in", y))                              # [..., r]
        return y + F.linear(h, self.weight("up_out", y).T, self.weight("up_bias", y))


class SerialAdapter(Searchable):
    """Houlsby et al. 2019:  y + U gelu(D y + b) + c, on a feed-forward block's output y.

    The rank r is the bottleneck: d -> r -> d.   Parameters: r · d + r + r · d + d. D is random; U, b and c
    start at zero [D27]. Gate and mask multiply U's rows, the gate c as well.
    """

    roles = ("ffn", "ffn_end")
    factors = {"up": "gate·mask", "up_bias": "gate"}

    def __init__(self, place, rank, generator=None):
        super().__init__()
        d = width(place)
        self.down = kaiming(rank, d, generator)         # D in R^(r×d)
        self.down_bias = zeros(rank)                                            # b in R^r
        self.up = zeros(rank, d)                                                # U^T in R^(r×d)
        self.up_bias = zeros(d)                                                 # c in R^d

    def bottleneck(self, x):
        """U gelu(D x + b) + c.   x: [..., d].   Returns [..., d]."""
        h = F.linear(x, self.weight("down", x), self.weight("down_bias", x))      # [..., r]
        return F.linear(F.gelu(h), self.weight("up", x).T, self.weight("up_bias", x))

    def forward(self, x, y):
        """x, y: [..., d], the block's input and output.   Returns the new y."""
        return y + self.bottleneck(y)


class ParallelAdapter(SerialAdapter):
    """He et al. 2022:  y + U gelu(D x + b) + c: the serial adapter, but it reads the block's input x."""

    roles = ("ffn", "residual")

    def forward(self, x, y):
        """x, y: [..., d], the block's input and output.   Returns the new y."""
        return y + self.bottleneck(x)

    def attach(self, place, role):
        """BERT's block is no module of its own. Its end is handed x, as the residual, to which it adds."""
        if role == "residual":
            return place.register_forward_pre_hook(self.before)
        return super().attach(place, role)

    def before(self, place, args):
        """The hook.   args: what the block computed, and x."""
        if not self.computed:
            return args
        hidden, x = args
        return hidden, self(x, x)


class BitFit(Searchable):
    """Ben Zaken et al. 2022:  y + b, a bias on a linear layer or a layer norm.   Parameters: d_out.

    It stands beside the backbone's own, if there is one, starts at zero, and the gate scales it [D31].
    """

    roles = ("linear", "norm")
    ranked = False
    factors = {"bias": "gate"}

    def __init__(self, place, rank, generator=None):
        super().__init__()
        size = getattr(place, "out_features", None) or place.weight.numel()
        self.bias = zeros(size)                                                       # b in R^out

    def forward(self, x, y):
        """y: [..., out], the place's output.   Returns the new y."""
        return y + self.weight("bias", y)


class LNFit(Searchable):
    """A trainable delta on a layer norm's weight w.   Parameters: d.

    (w + delta) · x/rms(x) = y + delta · x/rms(x): so w stays untouched, also where it is 1 + w, as in Gemma,
    and where x is centred before, as in nn.LayerNorm. delta starts at zero; the gate scales it [D31].
    """

    roles = ("norm",)
    ranked = False
    factors = {"delta": "gate"}

    def __init__(self, place, rank, generator=None):
        super().__init__()
        self.delta = zeros(place.weight.numel())                                # in R^d
        self.normalise = F.rms_norm
        if isinstance(place, nn.LayerNorm):
            self.normalise = F.layer_norm
        self.epsilon = getattr(place, "eps", None) or place.variance_epsilon

    def forward(self, x, y):
        """x, y: [..., d], the norm's input and output.   Returns the new y."""
        delta = self.weight("delta", x)
        return y + self.normalise(x, delta.shape, delta, eps=self.epsilon).to(y.dtype)


class Prefix(Searchable):
    """Li & Liang 2021:  r key/value pairs of its own before those of a self-attention.

    Parameters: 2 · r · heads · d_kv, without the paper's reparameterisation [D29]; no zero function at
    first. Scaling a key or a value would leave the pair in the softmax's denominator: so no factor scales
    its tensors, and gate · mask goes into `prefix_attention`.
    """

    roles = ("prefix",)

    def __init__(self, place, rank, generator=None):
        super().__init__()
        config = place.config
        self.heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.keys = normal(rank, self.heads * self.width, generator)                  # R^(r×h·d_kv)
        self.values = normal(rank, self.heads * self.width, generator)                # R^(r×h·d_kv)

    def forward(self, x):
        """Returns keys and values, [heads, r, d_kv] each, and gate · mask, the weight of each pair, [r]."""
        keys = self.weight("keys", x).unflatten(1, (self.heads, self.width))
        values = self.weight("values", x).unflatten(1, (self.heads, self.width))
        openness = keys.new_ones(len(keys))
        if self.architecture is not None:
            openness = self.architecture["gate·mask"].squeeze(1)
        return keys.transpose(0, 1), values.transpose(0, 1), openness

    def attach(self, place, role):
        """The pairs travel to `prefix_attention` as a keyword that the backbone's attention hands on."""
        return place.register_forward_pre_hook(self.before, with_kwargs=True)

    def before(self, place, args, kwargs):
        """The hook."""
        if self.computed:
            kwargs["prefix"] = self(first_input(args, kwargs))
        return args, kwargs


def prefix_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=1.0,
                     position_bias=None, prefix=None, **kwargs):
    """Attention over a prefix i and a sequence j:  (Σ_i g_i e^{q·k_i} v_i + Σ_j e^{q·k_j} v_j) / (no v)

    g is gate · mask. So a shut pair (g = 0) weighs exactly zero and has a finite gradient to its gate. To
    add log g to the scores is the same for g > 0, and not at 0 [D30].   query: [batch, heads, q, d_kv].
    key, value: [batch, heads, s, d_kv].   attention_mask, position_bias: added to the scores.
    prefix: of `Prefix.forward`, or None: plain attention.   Returns ([batch, q, heads, d_kv], None).
    """
    if prefix is None:
        plain = AttentionInterface()["sdpa"]
        return plain(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                     position_bias=position_bias, **kwargs)
    keys, values, openness = prefix
    r = len(openness)
    key = torch.cat([keys.expand(len(key), -1, -1, -1), key], 2)                    # [b, h, r+s, d_kv]
    value = torch.cat([values.expand(len(value), -1, -1, -1), value], 2)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:                              # query heads that share a key/value head, in Llamas
        key = key.repeat_interleave(groups, 1)
        value = value.repeat_interleave(groups, 1)
    scores = torch.matmul(query, key.transpose(2, 3)).float() * scaling             # [b, h, q, r+s]
    for bias in (position_bias, attention_mask):
        if bias is not None:
            scores = scores + F.pad(bias, (r, 0))
    openness = F.pad(openness, (0, key.shape[2] - r), value=1.0)                    # [r+s]
    top = scores.masked_fill(openness == 0, -math.inf).amax(-1, keepdim=True).detach()
    # A shut pair may lie above the top; its exponential, which is its gate's gradient, is clamped.
    raised = openness * (scores - top).clamp(max=30).exp()
    share = (raised / raised.sum(-1, keepdim=True)).to(value.dtype)
    share = F.dropout(share, dropout, module.training)
    return torch.matmul(share, value).transpose(1, 2).contiguous(), None


def additive_mask(*args, dtype=torch.float32, **more):
    """The mask that `prefix_attention` adds to the scores. transformers' own looks at values on a GPU."""
    more["allow_is_causal_skip"] = False
    mask = transformers.masking_utils.sdpa_mask(*args, **more)
    if mask is not None:
        return (~mask).to(dtype) * torch.finfo(dtype).min


# transformers' public registries are where a prefix comes in.
AttentionInterface.register("bipeft_prefix", prefix_attention)
AttentionMaskInterface.register("bipeft_prefix", additive_mask)


def width(place):
    """d_model, what the last linear layer of a self-attention or feed-forward block gives."""
    return [m for m in place.modules() if isinstance(m, nn.Linear)][-1].out_features


def first_input(args, kwargs):
    """What a backbone gives a module as its input, by position or by name."""
    if args:
        return args[0]
    return kwargs["hidden_states"]


# The registry of kinds and the paper's two search spaces. A new kind is a class above, and an entry here.
KINDS = {"lora": LoRA, "adapter_lr": LowRankAdapter, "bitfit": BitFit, "lnfit": LNFit,
         "serial": SerialAdapter, "parallel": ParallelAdapter, "prefix": Prefix}
SPACES = {"s1": ("serial", "parallel", "prefix"),                 # AutoPEFT's (Zhou et al. 2024)
          "s2": ("lora", "adapter_lr", "bitfit", "lnfit"),        # S3Delta's (Hu et al. 2022b)
          "all": tuple(KINDS)}


# ==================================================================================================
# 3. The search spaces: where each module attaches (4.1, S1 and S2), all of them at once, a structure
# ==================================================================================================

# A layer's parts in the order of computation, and the roles that they have as places. What stands in them is
# a place, too: a linear layer as "linear", a norm as "norm".
T5_SUBLAYER = {"layer_norm": ["norm"], "SelfAttention": ["attention", "prefix"], "DenseReluDense": ["ffn"]}
LLAMA_LAYER = {"input_layernorm": ["norm"], "self_attn": ["attention", "prefix"],
               "post_attention_layernorm": ["norm"], "pre_feedforward_layernorm": ["norm"], "mlp": ["ffn"],
               "post_feedforward_layernorm": ["norm"]}
BERT_LAYER = {"attention.self": ["prefix"], "attention.output.dense": ["linear", "attention"],
              "attention.output.LayerNorm": ["norm"], "intermediate": [],
              "output.dense": ["linear", "ffn_end", "residual"], "output.LayerNorm": ["norm"]}


def places_in(model, known_by, parts, norms):
    """[(name, role, module)] of the parts of all layers, known by an attribute, and of some norms."""
    places = []
    for name, layer in model.named_modules():
        if name in norms:
            places.append((name, "norm", layer))
        if not hasattr(layer, known_by):
            continue
        for path, roles in parts.items():
            try:
                part = layer.get_submodule(path)
            except AttributeError:                              # not every layer has every part
                continue
            for role in roles:
                at = layer.output if role == "residual" else part
                places.append((f"{name}.{path}", role, at))
            for child, module in part.named_children():
                if isinstance(module, nn.Linear):
                    places.append((f"{name}.{path}.{child}", "linear", module))
                elif child.endswith("norm"):
                    places.append((f"{name}.{path}.{child}", "norm", module))
    return places


def t5_places(model):
    """T5's, as in S3Delta [D25, D26]: no cross-attention projection, but its layer norm. T5-large has 122
    norms, 48 self-attentions, 48 feed-forward blocks and 288 linear layers: N = 916 in S2, 144 in S1.
    """
    final = ("encoder.final_layer_norm", "decoder.final_layer_norm")
    return places_in(model, "layer_norm", T5_SUBLAYER, final)


def bert_places(model):
    """BERT's: a block's output is that of its last linear layer, a module before the block's norm [D62]."""
    return places_in(model, "intermediate", BERT_LAYER, ("embeddings.LayerNorm",))


def llama_places(model):
    """Llama's, and those of its many relatives, some of whom have further norms [D63]."""
    return places_in(model, "self_attn", LLAMA_LAYER, ("norm",))


# A backbone's model type, as its config.json has it, and the function that finds its places. A family with
# the parts of one of these needs an entry alone; another one needs a function, too.
PLACES = {"t5": t5_places, "mt5": t5_places}
PLACES.update(dict.fromkeys(("bert", "roberta", "electra", "xlm-roberta", "camembert", "ernie"), bert_places))
PLACES.update(dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "olmo2", "smollm3",
                             "granite"), llama_places))


def networks_in(model):
    """{name: network} of transformers' networks in a model, itself and those inside of others included."""
    return {name: m for name, m in model.named_modules()
            if isinstance(m, transformers.PreTrainedModel)}


def places_of(model):
    """Every place of the known backbone in a model, [(name in the base model, role, module)].

    Roles: "linear"; "norm"; "attention" or "ffn", a block with an input and an output; "prefix", an
    attention that hands keywords on to transformers' attention functions. Where a block is no module of its
    own: "ffn_end", its last layer, and "residual", the module that is handed its output and its input.
    Raises UsageError if the model holds no known backbone, or two.
    """
    known = [m for m in networks_in(model).values() if m.config.model_type in PLACES]
    if not known or not set(known) <= set(known[0].modules()):
        raise UsageError(f"{type(model).__name__} holds no known backbone, or two: give one of "
                         f"{', '.join(PLACES)}, or a function of places of your own (docs/copying.md)")
    return PLACES[known[0].config.model_type](known[0].base_model)


def kinds_of(space, ranks=(1,)):
    """The kinds in "s1", "s2", "all" or a comma list such as "lora,prefix".   Raises UsageError for an
    unknown one, and for ranks that do not ascend within 1 .. 4096.
    """
    kinds = SPACES.get(space) or [kind.strip() for kind in space.split(",")]
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"unknown space or kind of module '{kind}': choose {', '.join(SPACES)}, "
                             f"or a comma list of {', '.join(KINDS)}")
    if list(ranks) != sorted(set(ranks)) or not ranks or ranks[0] < 1 or ranks[-1] > 4096:
        raise UsageError(f"ranks {tuple(ranks)} must be whole numbers from 1 to 4096, in ascending order")
    return kinds


def geometry(model):
    """A backbone's type and number of parameters, without attached modules: what a share of it is of."""
    config = getattr(model, "config", None)
    size = 0
    for name, p in model.named_parameters():
        if "bipeft_" not in name:
            packed = getattr(p, "quant_state", p)               # of 4 bits each, two to a byte
            size += math.prod(packed.shape)
    return {"model_type": getattr(config, "model_type", type(model).__name__), "parameters": size}


def places_by_kind(model, kinds, places=None):
    """{(name, kind): (module, role)} of every place that takes one of the kinds."""
    found = {}
    for name, role, place in (places or places_of)(model):
        for kind in kinds:
            if role in KINDS[kind].roles:
                found[name, kind] = place, role
    return found


class Bare:
    """What a backbone was before the first modules were attached; all that are attached share it."""

    def __init__(self, model):
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.attention = []                            # (backbone, its implementation of attention)
        self.heads = []                                 # [Head]
        for p in self.trained:
            p.requires_grad_(False)

    def use_prefix_attention(self, model):
        """Has the networks that hold prefixes compute their attention with `prefix_attention`."""
        for m in networks_in(model).values():
            prefixes = [part for part in m.modules() if isinstance(part, Prefix)]
            if prefixes and m.config._attn_implementation != "bipeft_prefix":
                self.attention.append((m, m.config._attn_implementation))
        for m, _ in self.attention:             # each by itself: not every release hands it on to T5's stacks
            m.set_attn_implementation("bipeft_prefix")

    def restore(self):
        """Once the last modules have been taken off; a second call changes nothing."""
        for p in self.trained:
            p.requires_grad_(True)
        self.trained = []
        for m, implementation in self.attention:
            if m.config._attn_implementation == "bipeft_prefix":
                m.set_attn_implementation(implementation)
        self.attention = []


class Peft:
    """PEFT modules attached to a frozen backbone, each a child of its place, with ordinary parameters.

    model: of a known family, or any with `places`, a function as `places_of`.   chosen: the modules, (place
    name, kind, rank) each.   seed: decides their initial weights.   also_train: paths of the network's own
    parameters that learn beside the modules, outside of gates, budget and N, such as a fresh "classifier";
    `detach` puts their numbers back.   Raises UsageError, before anything is attached, for a place, kind or
    path that does not exist, and for a place that has a module of the kind already.
    """

    def __init__(self, model, chosen, seed=0, places=None, also_train=()):
        found = places_by_kind(model, KINDS, places)
        for name, kind, _ in chosen:
            if (name, kind) not in found:
                raise UsageError(f"the model has no place '{name}' for a module of kind '{kind}': a "
                                 "structure fits models of the same parts and depth")
            if hasattr(holder_of(found[name, kind][0]), f"bipeft_{kind}"):
                raise UsageError(f"{name} has a module of kind '{kind}' already: take it off by its "
                                 "detach(), or all that the model has by bipeft.detach(model)")
        self.model = model
        self.places = places
        self.kinds = [kind for _, kind, _ in chosen]
        self.names = [f"{name}.{kind}" for name, kind, _ in chosen]
        if len(set(self.names)) < len(chosen):
            raise UsageError("two modules of one kind are asked for at one place")
        self.head = Head(model, also_train)
        generator = torch.Generator().manual_seed(derive(seed, 1))
        self.modules = [KINDS[kind](found[name, kind][0], rank, generator) for name, kind, rank in chosen]
        self.size = sum(count_of(module) for module in self.modules)                             # P
        already = attached_to(model)
        self.bare = already[0].bare if already else Bare(model)
        for (name, kind, _), module in zip(chosen, self.modules):
            place, role = found[name, kind]
            module.to(next(place.parameters()).device)
            module.bare = self.bare
            module.handle = module.attach(place, role)
            holder_of(place).add_module(f"bipeft_{kind}", module)
        self.bare.heads.append(self.head)
        if "prefix" in self.kinds:
            self.bare.use_prefix_attention(model)
        self.head.begin()

    def __len__(self):
        return len(self.names)

    @property
    def tensors(self):
        """[parameter]: those of the modules, ΔW, then those of also_train."""
        return list(self.named_weights().values())

    def named_weights(self):
        """{module's name.tensor's name: parameter}, then those of also_train by their own names."""
        named = {}
        for name, module in zip(self.names, self.modules):
            for key, p in module.named_parameters():
                named[f"{name}.{key}"] = p
        named.update(self.head.parameters)
        return named

    def detach(self):
        """Takes off what it attached: without other modules the backbone computes bit for bit as before."""
        self.head.end()
        take_off(self.model, self.modules, self.bare)


class Head:
    """The network's own parameters that learn beside the modules [D73]. In a 16-bit network small steps of it
    would be lost: it computes in float32 as long as it learns.

    paths: of modules or parameters, such as "classifier".   Raises UsageError for one that is not there.
    """

    def __init__(self, model, paths):
        networks = list(networks_in(model))
        within = f"{networks[0]}." if networks else ""          # names are without a wrapper's
        named = {name: p for name, p in model.named_parameters() if "bipeft_" not in name}
        self.parameters = {}                                    # {name: parameter}
        for path in paths:
            inside = {name: p for name, p in named.items() if f"{name}.".startswith(f"{path}.")}
            if not inside:
                raise UsageError(f"the model has no parameters '{path}' to be trained beside the modules")
            self.parameters.update({name.removeprefix(within): p for name, p in inside.items()})
        own = set(self.parameters.values())
        self.layers = [m for m in model.modules() if own & set(m.parameters(recurse=False))]
        self.rest = [p for p in named.values() if p not in own]  # the first tells the network's format
        self.before = copies(self.parameters.values())
        self.hooks = []                                         # (layer, its hook)

    def begin(self):
        """Has it learn."""
        narrow = (torch.bfloat16, torch.float16)
        layers = [m for m in self.layers if next(m.parameters(recurse=False)).dtype in narrow]
        for layer in layers:
            convert(layer, torch.float32)
            self.hooks.append((layer, layer.register_forward_pre_hook(self.enter)))
            self.hooks.append((layer, layer.register_forward_hook(self.leave)))
        for p in self.parameters.values():
            p.requires_grad_(True)

    def enter(self, layer, args):
        """A hook: a layer's inputs in the format of its parameters."""
        dtype = next(layer.parameters(recurse=False)).dtype
        return tuple(x.to(dtype) if torch.is_floating_point(x) else x for x in args)

    def leave(self, layer, args, output):
        """A hook: its output in the format of the network."""
        return output.to(self.rest[0].dtype)

    def end(self):
        """Puts its numbers back, in the format that the network has now."""
        for layer, hook in self.hooks:
            hook.remove()
            convert(layer, self.rest[0].dtype)
        put_back(self.parameters.values(), self.before)
        for p in self.parameters.values():
            p.requires_grad_(False)
        self.parameters = {}                                    # a second call changes nothing
        self.hooks = []


def convert(layer, dtype):
    """Another format for a layer's own parameters, but not for those of its children."""
    for p in layer.parameters(recurse=False):
        p.data = p.data.to(dtype)


# Modules on a model: who holds them, and how they come off.
def holder_of(place):
    """The module that a place's modules are children of: itself, but an nn.Sequential would run them."""
    if isinstance(place, nn.Sequential):
        return place[-1]
    return place


def attached_to(model):
    """[module] of all that is attached to a model."""
    return [m for m in model.modules() if isinstance(m, Searchable)]


def take_off(model, modules, bare):
    """Takes attached modules off, and puts back what attaching had changed once none is left.

    It looks for them in the whole model: a module does not know its holder, of which it is a child.
    """
    for holder in list(model.modules()):
        for name, module in list(holder.named_children()):
            if module in modules:
                module.handle.remove()
                delattr(holder, name)
    if not attached_to(model):
        bare.restore()


def detach(model):
    """Takes every attached module off a model, whoever attached it, and puts its head's numbers back."""
    modules = attached_to(model)
    if modules:
        bare = modules[0].bare
        for head in bare.heads:
            head.end()
        take_off(model, modules, bare)


def count_of(module):
    """The number of a module's parameters, counted from its tensors: q_n is made of these."""
    return sum(p.numel() for p in module.parameters())


class Space(Peft):
    """All candidate modules of a search space, attached at the largest rank.

    space: "s1", "s2", "all" or a comma list of kinds.   ranks: Dim, ascending.   The others: as for `Peft`.
    `param_counts`, q, [N, K], counts real tensors: of the module as built at each rank [D24].
    """

    def __init__(self, model, space="s2", ranks=(1, 4, 8), seed=0, places=None, also_train=()):
        kinds = kinds_of(space, ranks)
        found = places_by_kind(model, kinds, places)
        if not found:
            raise UsageError(f"the model has no place for a module of kind {' or '.join(kinds)}")
        self.space = space
        self.ranks = tuple(ranks)
        self.geometry = geometry(model)
        super().__init__(model, [(name, kind, ranks[-1]) for name, kind in found], seed, places, also_train)
        counts = []
        with torch.device("meta"):                             # tensors of a shape, without numbers
            for (_, kind), (place, _) in found.items():
                counts.append([count_of(KINDS[kind](place, rank)) for rank in ranks])
        self.param_counts = torch.tensor(counts)                                            # [N, K]
        self.lengths = self.param_counts[:, -1].contiguous()             # [N], as they are attached
        self.ranked = torch.tensor([KINDS[kind].ranked for kind in self.kinds])                # [N]
        self.dim = torch.tensor(ranks)                                                         # [K]
        self.leading = (torch.arange(ranks[-1]) < self.dim[:, None]).float()                # [K, R]
        self.kept = torch.ones(len(self), dtype=torch.bool)    # [N], False once a search removed it
        self.entries = [(m, name, p) for m in self.modules for name, p in m.named_parameters()]
        self.to(self.tensors[0].device)

    def to(self, device):
        """Moves the tables above, where the model has moved."""
        for name in ("param_counts", "lengths", "ranked", "dim", "leading", "kept"):
            setattr(self, name, getattr(self, name).to(device))

    def enter(self, gate, ranks, computed=None):
        """Puts an architecture into the modules, for the pass that follows.

        gate: [N], 0 or 1.   ranks: [N, K], rows summing to 1; with gradients where they are wanted.
        computed: [N] bool, False for what is to be skipped; None: all modules are computed, shut ones, too.
        Returns {parameter: its copy in the backbone's format}, for modules that are computed. They are cast
        together, and gates and masks multiplied for all modules at once: kernels for each would cost more.
        """
        dtype = next(self.model.parameters()).dtype
        mask = (ranks @ self.leading).to(dtype)                                # [N, R]
        gate = gate.to(dtype)
        both = gate[:, None] * mask                                            # [N, R]
        if computed is None:
            computed = torch.ones(len(self), dtype=torch.bool)
        factors = zip(gate.unbind(), mask[:, :, None].unbind(), both[:, :, None].unbind(), computed.tolist())
        for module, (g, m, gm, on) in zip(self.modules, factors):
            module.architecture = {"gate": g, "mask": m, "gate·mask": gm}
            module.computed = on
        cast = {}
        weights = [p for _, _, p in self.entries]
        parts = flatten(weights).to(dtype).split([p.numel() for p in weights])
        for (module, name, p), part in zip(self.entries, parts):
            if module.computed:
                cast[p] = part.view(p.shape).requires_grad_()
                module.architecture[name] = cast[p]
        return cast

    def leave(self):
        """Ends the last architecture: every attached module is whole, at the largest rank."""
        for module in self.modules:
            module.architecture = None
            module.computed = True

    def structure(self, kept, choice, budget, backbone=""):
        """The Structure of the kept modules.   kept: b, N bools.   choice: k*, N indices."""
        modules = []
        counts = self.param_counts.tolist()
        for n, name in enumerate(self.names):
            if kept[n]:
                place, _, kind = name.rpartition(".")
                rank = self.ranks[choice[n]] if KINDS[kind].ranked else None
                modules.append({"name": place, "kind": kind, "rank": rank,
                                "parameters": counts[n][choice[n]]})
        also_trained = sum(p.numel() for p in self.head.parameters.values())
        return Structure(backbone, self.geometry, self.space, list(self.ranks), budget, modules, also_trained)


@dataclass
class Structure:
    """What a search found, b and k* of Algorithm 1's A: enough to rebuild it without the search."""

    backbone: str            # the model's name, for people
    geometry: dict           # its type and number of parameters, for people and ratios
    space: str
    ranks: list
    budget: int              # B
    modules: list            # {"name": place, "kind", "rank" (None without one), "parameters"} each
    also_trained: int = 0    # parameters of the network's own, outside of the budget

    @property
    def parameters(self):
        """Parameters in all kept modules together."""
        return sum(m["parameters"] for m in self.modules)


def apply(model, structure, seed=0, places=None, also_train=()):
    """A structure's modules, with fresh weights, on a model: a Peft, whose arguments the others are.
    Raises UsageError if the model lacks one of its places, or a count is not that of the tensors [D68].
    """
    chosen = [(m["name"], m["kind"], m["rank"] or 1) for m in structure.modules]
    peft = Peft(model, chosen, seed, places, also_train)
    for m, module in zip(structure.modules, peft.modules):
        if m["parameters"] != count_of(module):
            peft.detach()
            raise UsageError(f"the structure is of a backbone of other sizes: it says {m['parameters']} "
                             f"parameters for {m['name']}.{m['kind']}, whose tensors hold {count_of(module)}")
    return peft


# ==================================================================================================
# 4. Algorithm 1, whose lines stand in quotation marks
# ==================================================================================================

# A trigger by hand. A, B, C: LoRA on linear layers of 4 + 4, 16 + 16 and 8 + 8. D: LNFit on a norm of 16, no
# rank. Dim = (1, 2), B = 36, Z = 2, and it is the first trigger: z = 0.
#              A         B         C         D
# q_n          8, 16     32, 64    16, 32    16, 16
# softmax(Φ)   1/4, 3/4  2/3, 1/3  3/8, 5/8            at j, the step of the last trigger
#              3/4, 1/4  3/4, 1/4  1/4, 3/4            at t, now
# C_n          10        40        28        16        Eq. 8: A, 8 · 3/4 + 16 · 1/4
# p_n          1/2       3/4       3/4       1/2       of softmax(Θ)
# p_n · C_n    5         30        21        8         Eq. 7: E_t = 5 + 30 + 21 + 8 = 64
# s̄_n          3         2         4         1         Eq. 6: R_z = (64 - 36) / (2 - 0) = 14
# From the lowest s̄ up: D goes (8); B does not fit (8 + 30 > 14), and that is the end, although A (8 + 5)
# would fit: it is more sensitive than B.
# σ_n          1/4       1/24      1/16                of either rank: half of its weight's move
# KL_n         .549      .0174     .0381               A: 1/4 ln 1/3 + 3/4 ln 3 = 1/2 ln 3
# λ_n          .137      .0007     .0024               Eq. 9: σ_n · KL_n
# v_{z-1}      2         1         2         0         the rank of the larger weight at j
# v_z          1         1         2         0         at t: cos = (2 + 1 + 4) / √(9 · 6) = .953
# Eq. 10: Y_z = floor(3 · .953 / (2 - 0)) = 1. The lowest λ is B's: its rank gets fixed, at 1.


# What a person reads who trains or searches with modules that the loss does not depend on [D79].
NOT_REACHED = ("no gradient reaches the attached modules: the model must compute its loss with them, and "
               "gradient checkpointing needs use_reentrant=False")


def forward_backward(model, peft, gate, ranks, batch, inputs, skip=True):
    """A forward and a backward pass, after which the gradients of some tensors stand in their `grad`.

    gate, ranks: the architecture, [N] and [N, K], detached where it is held; None in re-training, where
    modules are whole.   batch: what the model takes, a dict of tensors.   inputs: the tensors, of ΔW, Θ or
    Φ; where the loss does not depend on one, its gradient is zero.   skip: shut modules are not computed,
    unless the gates' gradients are wanted [D9], nor are removed ones [D36]; False: all are, times zero.
    Returns the loss. A search asks no more of the network: `CudaGraphs` is another such function.
    Raises UsageError for a module that was to be computed and got no gradient [D79].
    """
    cast = {}
    if gate is not None:
        wants_gates = gate.requires_grad                        # what a shut module would add
        computed = peft.kept if wants_gates else gate > 0
        cast = peft.enter(gate, ranks, computed if skip else None)
    for p in inputs:
        p.grad = None                                    # nothing leaks from one pass into the next
    loss = loss_of(model(**batch))
    if loss.requires_grad:
        try:
            loss.backward(inputs=[cast.get(p, p) for p in inputs])
        except RuntimeError as error:
            if "use_reentrant" in str(error):                   # torch tells of it in many lines
                raise UsageError(NOT_REACHED) from None
            raise
    if gate is not None:
        peft.leave()
    weights = [p for p in inputs if p in cast]
    gradients = [cast[p].grad for p in weights]
    missing = [p for p in inputs if p not in cast and p.grad is None]
    if any(gradient is None for gradient in gradients) or (missing and gate is None):
        raise UsageError(NOT_REACHED)
    if weights:
        give_gradients(weights, flatten(gradients).to(weights[0].dtype))
    if missing:                                                 # of skipped modules
        give_gradients(missing, torch.zeros_like(flatten(missing)))
    return loss.detach()


class Search:
    """The state of Algorithm 1, and what it does in a step, at a trigger, and in all.

    model: its forward takes a batch's entries as keywords and returns a loss.   space: attached to it.
    settings: a Settings, of which it reads budget, triggers, tau, gamma, window, lr, lr_warmup, clip,
    arch_lr, weight_decay and seed.   steps: T.   warmup: steps before the first trigger may come [D7].
    run_pass: who computes losses and gradients, a function as `forward_backward`.   Raises UsageError for a
    budget that leaves nothing to search, and for modules that are not on the model.
    """

    STATE = ("kept", "fixed", "choice", "smoothed", "indicators", "rank_history", "steps_done",
             "triggers_done")

    def __init__(self, model, space, settings, steps, warmup=0, run_pass=forward_backward):
        require_attached(model, space)
        self.model = model
        self.space = space
        self.settings = settings
        self.steps = steps                                                            # T
        self.first_trigger = max(warmup, settings.window) + 1      # the first step at which one may come [D7]
        self.run_pass = run_pass
        self.budget = budget_of(settings.budget, space)                               # B
        self.weights = space.tensors                                                  # ΔW
        device = self.weights[0].device
        space.to(device)
        n, k = space.param_counts.shape                                               # N, K

        # Architecture weights, Θ_0 and Φ_0, and the optimizers of all that learns, as in DARTS [D34].
        generator = torch.Generator().manual_seed(derive(settings.seed, 2))
        self.theta = (1e-3 * torch.randn(n, 2, generator=generator)).to(device).requires_grad_()
        self.phi = (1e-3 * torch.randn(n, k, generator=generator)).to(device).requires_grad_()
        decay = settings.weight_decay
        adam = {"lr": settings.arch_lr, "betas": (0.5, 0.999), "weight_decay": decay, "fused": True}
        self.weight_optimizer = torch.optim.AdamW(self.weights, weight_decay=decay, fused=True)
        self.theta_optimizer = torch.optim.Adam([self.theta], **adam)
        self.phi_optimizer = torch.optim.Adam([self.phi], **adam)
        self.optimizers = [self.weight_optimizer, self.theta_optimizer, self.phi_optimizer]

        # Decisions: b, all kept; d, fixed where there is no rank; k*, the largest.
        self.kept = torch.ones(n, dtype=torch.bool, device=device)
        self.fixed = ~space.ranked
        self.choice = torch.full((n,), k - 1, device=device)

        # History: s̄; the last H + 1 indicators I; softmax(Φ) since the last trigger; t and z.
        self.smoothed = torch.zeros(n, device=device)
        self.indicators = []
        self.rank_history = [self.rank_weights()]
        self.steps_done = 0
        self.triggers_done = 0

    def step(self, train_batch, theta_batch, phi_batch):
        """One step t, the body of Algorithm 1's loop.   Batches: dicts of tensors.   Returns a log line."""
        settings, space = self.settings, self.space
        space.kept = self.kept                                  # what is removed costs nothing
        open_ranks = not self.fixed.all()                       # asked while a GPU is idle
        noise = self.draw()                                     # of one architecture a step [D8]
        # "Update ΔW by gradient descent" on D_tra (3.5, first order), the sample as constants.
        gate, ranks = self.sample(noise)
        train_loss = self.run_pass(
            self.model, space, gate.detach(), ranks.detach(), train_batch, self.weights)
        train_gradients = self.gradients()                      # w and G of one moment [D1]
        train_magnitude = self.magnitude(train_gradients)
        self.update_weights()
        # "Optimize Θ and Φ iteratively" (3.5): Θ on D_val, the same Φ held; it gives G(D_val), too [D8]
        theta_loss = self.run_pass(
            self.model, space, gate, ranks.detach(), theta_batch, [self.theta, *self.weights])
        val_gradients = self.gradients()
        val_magnitude = self.magnitude(val_gradients)
        descend(self.theta_optimizer, self.theta, self.kept)
        # - and Φ on the next batch, with the new Θ held, under the same noise.
        phi_loss = 0
        if open_ranks:
            gate, ranks = self.sample(noise)
            phi_loss = self.run_pass(self.model, space, gate.detach(), ranks, phi_batch, [self.phi])
            descend(self.phi_optimizer, self.phi, ~self.fixed)
        self.rank_history.append(self.rank_weights())

        # "Accumulate the sensitivity score of each PEFT module": Eq. 1-4. A removed one keeps its last s̄.
        gradient_cosine = alignment(train_gradients, val_gradients, space.lengths)
        current = sensitivity(train_magnitude, val_magnitude, gradient_cosine)
        self.smoothed = torch.where(self.kept, smooth(self.smoothed, current, settings.gamma), self.smoothed)

        # "Calculate module importance indicator I_t" (3.2.2) [D38]; "evaluate model stability β_t" (Eq. 5).
        indicator = importance_indicator(self.smoothed, self.expected_sizes(), self.kept, self.budget)
        self.indicators = self.indicators[-settings.window:] + [indicator]
        beta = stability(torch.stack(self.indicators), settings.window)
        expected = expected_parameters(self.keep_probabilities(), self.expected_sizes())    # E_t, for the log
        self.steps_done += 1

        # "If β_t ≥ τ": not in the warm-up [D7], nor before there are H + 1 indicators, even if τ is 0.
        reduction = None                                        # R_z
        if beta >= settings.tau and self.steps_done >= self.first_trigger:
            reduction = float(self.select())
        return self.log_line([train_loss, theta_loss, phi_loss], beta, expected, reduction)

    def select(self):
        """A trigger, the body of Algorithm 1's `if`: selects modules, then ranks.   Returns R_z."""
        # v_{z-1}: Φ as it was at the last trigger, with the b and d that this left.
        potential_before = self.potential_ranks(self.rank_history[0])

        # "Estimate expected parameters E_t" (Eq. 7, 8); "calculate expected parameter reduction R_z" (Eq. 6).
        sizes = self.expected_sizes()                                                 # C_n
        probability = self.keep_probabilities()                                       # p_n
        expected = expected_parameters(probability, sizes)
        reduction = expected_reduction(expected, self.budget, self.settings.triggers, self.triggers_done)

        # "Rank N modules by sensitivity score"; "perform early module selection until R_z is achieved"
        # (3.3.2); "update binary selection indicator b_z". The d of a removed module is 1, too (3.4.2).
        removed = modules_to_remove(self.smoothed, probability, sizes, self.kept, reduction)
        self.kept = self.kept & ~removed
        self.fixed = self.fixed | removed

        # "Evaluate dimension stability λ", over the steps since the last trigger (Eq. 9).
        instability = rank_instability(torch.stack(self.rank_history))

        # "Estimate the number of modules Y_z for dimension selection" (Eq. 10); at last all are due [D5].
        remaining = self.settings.triggers - self.triggers_done                       # Z - z
        potential = self.potential_ranks(self.rank_history[-1])                       # v_z
        quota = rank_quota(potential_before, potential, self.fixed, remaining)
        if remaining == 1:
            quota = len(self.fixed)

        # "Fix dimensions for Y_z modules with the lowest λ"; "update dimension selection indicator d_z".
        settled = ranks_to_fix(instability, self.fixed, quota)
        self.choice = torch.where(settled, self.phi.detach().argmax(1), self.choice)
        self.fixed = self.fixed | settled

        # "Freeze part of Θ and Φ according to b_z, d_z": `descend` passes over their rows [D18].
        self.rank_history = self.rank_history[-1:]
        self.triggers_done += 1
        return reduction

    def draw(self):
        """Seeds dropout, globally, and gives Gumbel noise, [N, 2] and [N, K]: of seed and t alone [D57]."""
        torch.manual_seed(derive(self.settings.seed, 4, self.steps_done))
        generator = torch.Generator().manual_seed(derive(self.settings.seed, 3, self.steps_done))
        k = len(self.space.ranks)
        noise = gumbel_noise((len(self.space), 2 + k), generator).to(self.theta.device)
        return noise.split([2, k], 1)

    def temperature(self):
        """Gumbel-Softmax's, from 5 at the first step to 1 at step T [D8]."""
        return 5 - 4 * self.steps_done / max(1, self.steps - 1)

    def sample(self, noise):
        """The sample of 3.5: gate, [N], and one-hot ranks, [N, K], with gradients to Θ and Φ."""
        temperature = self.temperature()
        gate = gumbel_softmax(self.theta, noise[0], temperature)[:, 1] * self.kept
        sampled = gumbel_softmax(self.phi, noise[1], temperature)
        decided = F.one_hot(self.choice, sampled.shape[1]).to(sampled.dtype)
        return gate, torch.where(self.fixed[:, None], decided, sampled)

    def update_weights(self):
        """A step of ΔW on the last pass's gradients, which it may clip in place [D12]."""
        settings = self.settings
        if settings.clip:
            nn.utils.clip_grad_norm_(self.weights, settings.clip)
        factor = schedule(self.steps_done, self.steps, settings.lr_warmup)
        self.weight_optimizer.param_groups[0]["lr"] = settings.lr * factor
        self.weight_optimizer.step()

    def gradients(self):
        """G of the last pass, [P]."""
        return flatten([p.grad for p in self.weights])[:self.space.size]

    def magnitude(self, gradients):
        """Eq. (2) for the present weights. |M_n| is q_n at k*, the largest until one is fixed [D13]."""
        weights = flatten(self.weights)[:self.space.size]
        counts = self.space.param_counts.gather(1, self.choice[:, None]).squeeze(1)
        return magnitude(weights, gradients, self.space.lengths, counts)

    def rank_weights(self):
        """softmax(Φ), [N, K], float64, since Eq. 9 compares almost equal numbers [D60]."""
        return self.phi.detach().double().softmax(1)

    def potential_ranks(self, rank_weights):
        """v, [N], at a step, of its softmax(Φ), [N, K]; kinds without a rank count as 0 [D5]."""
        ranked = self.kept & self.space.ranked
        return potential_ranks(rank_weights, self.space.dim, ranked, self.fixed, self.choice)

    def expected_sizes(self):
        """C_n, [N]."""
        return expected_size(self.phi.detach(), self.space.param_counts, self.fixed, self.choice)

    def keep_probabilities(self):
        """p_n, [N]. In the last tenth of the triggers it is 1 for kept modules [D4]."""
        if self.triggers_done >= self.settings.triggers - math.ceil(self.settings.triggers / 10):
            return self.kept.double()
        return keep_probability(self.theta.detach(), self.kept)

    def log_line(self, losses, beta, expected, reduction):
        """A step's line of the log, in Python's numbers.   UsageError if a loss or s̄ is not finite."""
        require_finite(float(sum(losses) + self.smoothed.sum()), f"the loss at search step {self.steps_done}")
        return {"step": self.steps_done, "loss_train": float(losses[0]), "loss_theta": float(losses[1]),
                "beta": float(beta), "expected": float(expected), "reduction": reduction,
                "kept": int(self.kept.sum()), "fixed": int((self.kept & self.fixed).sum()),
                "triggers": self.triggers_done}

    def run(self, train_batches, val_batches, backbone="", after_step=None):
        """Algorithm 1's loop, from where the state is to the end.   Returns the Structure that is found.

        train_batches, val_batches: iterables of dicts of tensors, D_tra and D_val, gone through again and
        again: a step takes one of the first, for ΔW, and two of the second, for Θ and for Φ.   backbone: a
        name to write into the structure.   after_step: called with the Search and the step's log line.
        """
        was_training = self.model.training
        self.model.train()
        train = stream(train_batches, self.steps_done)
        val = stream(val_batches, 2 * self.steps_done)
        try:
            with kept_random_state(self.theta.device):
                # "For t = 1 .. T", until "Z ≤ 0: exit" [D16]
                while self.steps_done < self.steps and self.triggers_done < self.settings.triggers:
                    line = self.step(next(train), next(val), next(val))
                    if after_step is not None:
                        after_step(self, line)
        finally:
            self.model.train(was_training)
            self.space.leave()
        return self.finish(backbone)

    def finish(self, backbone=""):
        """Makes up the triggers that there were no steps for [D7], and keeps [D6]'s promise: "return A"."""
        while self.triggers_done < self.settings.triggers:
            self.select()
        kept, choice = fill_budget(self.smoothed.tolist(), self.space.param_counts.tolist(),
                                   self.kept.tolist(), self.choice.tolist(), self.budget)
        return self.space.structure(kept, choice, self.budget, backbone)

    def state_dict(self):
        """All that a search killed now needs to go on to the same end: live tensors, to be saved at once."""
        state = {key: getattr(self, key) for key in self.STATE}
        state["learned"] = [*self.weights, self.theta, self.phi]
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        return state

    def load_state_dict(self, state):
        """Continues from what `state_dict` returned, its tensors on this search's device."""
        for key in self.STATE:
            setattr(self, key, state[key])
        put_back([*self.weights, self.theta, self.phi], state["learned"])
        for optimizer, stored in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(stored)


def search(model, space, train_batches, val_batches, budget, steps, warmup=0, backbone="", after_step=None,
           run_pass=forward_backward, **settings):
    """Algorithm 1 in one call: the structure of at most `budget` parameters that the search finds.

    model, steps, warmup, run_pass: those of Search.   space: stays attached; `space.detach()` takes it off.
    budget: B, in parameters, or below 1 a share of the backbone.   train_batches, val_batches, backbone,
    after_step: those of `Search.run`.   settings: further fields of Settings.   Returns a Structure.
    """
    state = Search(model, space, Settings(budget=budget, **settings), steps, warmup, run_pass)
    return state.run(train_batches, val_batches, backbone, after_step)


def require_attached(model, peft):
    """Raises UsageError unless a model holds all of the modules."""
    inside = set(model.parameters())
    for name, p in peft.named_weights().items():
        if p not in inside:
            raise UsageError(f"{name} is not on this model: attach the modules to the model that is to "
                             "learn, and detach them afterwards")


@torch.no_grad()
def flatten(tensors):
    """Tensors' numbers end to end, [P]. Of a module's tensors they are w, and of their gradients G."""
    return torch.cat([t.flatten() for t in tensors])


def give_gradients(tensors, flat):
    """Makes parts of a vector the gradients of tensors, in their order."""
    for p, part in zip(tensors, flat.split([p.numel() for p in tensors])):
        p.grad = part.view(p.shape)


def schedule(step, steps, lr_warmup=0.0):
    """What ΔW's learning rate is multiplied by at a step, the first of which is 0 [D12].

    It falls linearly, to 0 after the last step.   lr_warmup: a share of the steps, over which it is also
    multiplied by a line that rises to 1; so with 0.1 it is never above 0.9.   UsageError: not in 0 .. 0.5.
    """
    if not 0 <= lr_warmup <= 0.5:
        raise UsageError(f"lr_warmup is a share of the steps, 0 to 0.5, not {lr_warmup}")
    factor = 1 - step / steps
    if lr_warmup:
        factor *= min(1, (step + 1) / (lr_warmup * steps))
    return factor


@torch.no_grad()
def descend(optimizer, parameter, open_rows):
    """A step of Θ or Φ, of its open rows, [N] bool, alone: others feel neither decay nor momentum [D18]."""
    before = parameter.clone()
    optimizer.step()
    parameter.copy_(torch.where(open_rows[:, None], parameter, before))


def budget_of(budget, space):
    """B in parameters, of a number or a share of the backbone.   UsageError: it leaves nothing to search."""
    if budget < 1:
        budget = budget * space.geometry["parameters"]
    budget = int(budget)
    smallest = int(space.param_counts.min())
    largest = int(space.param_counts[:, -1].sum())
    if not smallest <= budget < largest:
        raise UsageError(f"no search for a budget of {budget:,} parameters: the smallest module has "
                         f"{smallest:,}, the whole space {largest:,}; choose one in between")
    return budget


def loss_of(output):
    """The loss in what a model's forward returned."""
    if isinstance(output, tuple):
        return output[0]
    if isinstance(output, dict):
        return output["loss"]
    return output


def require_finite(value, what):
    """Raises UsageError if a number is NaN or infinite, before a checkpoint could keep it."""
    if not math.isfinite(value):
        raise UsageError(f"{what} is {value}: use a smaller --lr, or --dtype bfloat16 or float32 rather "
                         "than float16")


@torch.no_grad()
def put_back(tensors, values):
    """Gives tensors other numbers, and leaves everything else of them, such as who trains them, as it is."""
    for t, value in zip(tensors, values):
        t.copy_(value)


def copies(tensors):
    """Tensors' numbers as they are now."""
    return [t.detach().clone() for t in tensors]


def kept_random_state(device):
    """A context after which the caller's random numbers go on as before it: a search draws from seeds of its
    own, and nobody else's dropout should depend on whether one has been there.
    """
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def stream(batches, start=0):
    """Endless batches from number `start` on. Each epoch is told to the iterable, if it asks."""
    number = 0
    for epoch in itertools.count():
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(epoch)
        before = number
        for batch in batches:
            number += 1
            if number > start:
                yield batch
        if number == before:
            raise UsageError("there are no batches: the data is empty, or an iterator that has ended")


# ==================================================================================================
# 5. The tasks as text to text (4.1, appendices A and B)
# ==================================================================================================

# A row of a data set becomes an Example: the task's name and its fields as one text, the label as another.
# A T5 reads the first and writes the second; a Llama goes on from the first. So one program serves thirteen
# tasks, and a person's own. What stands in a file is taken as it stands: a label is a text, not a number.


@dataclass(frozen=True)
class Example:
    """An input text, the text to be produced, and every text that counts as right."""

    source: str
    target: str
    answers: tuple


@dataclass(frozen=True)
class Task:
    """How a data set becomes text, how it is scored, and how long it is trained here."""

    fields: tuple                   # columns, in the order of the prompt
    labels: tuple                   # valid targets; empty: any text is
    metric: str                     # a key of METRICS
    epochs: int
    warmup_epochs: int
    max_length: int = 128           # GLUE's
    batch_size: int = 32
    answer: str = "label"           # the column that holds the target
    carve: bool = False            # validation comes out of train, and the original one is the test
    defaults: dict = field(default_factory=dict)  # of further settings


BINARY = ("0", "1")
THREE = ("0", "1", "2")
FIFTHS = tuple(f"{n / 5:.1f}" for n in range(26))     # 0.0, 0.2, .. 5.0
PAIR = ("sentence1", "sentence2")
NLI = ("premise", "hypothesis")
# Columns, labels, metric, epochs and epochs of warm-up, input length; see Task. GLUE's tasks, first:
TASKS = {
    "cola": Task(("sentence",), BINARY, "Matthews", 15, 2),
    "sst2": Task(("sentence",), BINARY, "accuracy", 5, 1, carve=True),
    "mrpc": Task(PAIR, BINARY, "F1", 20, 2),
    "qqp": Task(("question1", "question2"), BINARY, "F1", 3, 1, carve=True),
    "stsb": Task(PAIR, FIFTHS, "Pearson", 15, 2),
    "mnli": Task(NLI, THREE, "accuracy", 3, 1, carve=True),
    "qnli": Task(("question", "sentence"), BINARY, "accuracy", 4, 1, carve=True),
    # SuperGLUE's; the examples of rte are the same in GLUE
    "rte": Task(PAIR, BINARY, "accuracy", 20, 3, 256),
    "boolq": Task(("question", "passage"), BINARY, "accuracy", 15, 2, 256),
    "cb": Task(NLI, THREE, "accuracy", 40, 4, 256),
    "multirc": Task(("question", "answer", "paragraph"), BINARY, "F1", 40, 4, 256),
    "record": Task(("query", "entities", "passage"), (), "token-F1", 1, 1, 512, 16, "answers", carve=True),
    "wic": Task(("word", "sentence1", "sentence2"), BINARY, "accuracy", 15, 2, 256),
    # a person's own, and one that is made here
    "custom": Task(("source",), (), "accuracy", 20, 2, batch_size=16, answer="target",
                   defaults={"lr": 1e-3, "clip": 1.0, "triggers": 30}),             # measured [D83]
    "toy": Task((), ("good", "bad"), "accuracy", 7, 4, defaults={
        "model": "toy", "lr": 5e-3, "budget": 0.03, "triggers": 30, "search_epochs": 5}),
}
# Those of SuperGLUE that the hub does not hold under GLUE's name. RTE is in both.
SUPERGLUE = ("boolq", "cb", "multirc", "record", "wic")


def to_examples(name, row):
    """A row in the hub's columns as Examples: one, or of ReCoRD one an answer.   Raises UsageError."""
    task = TASKS[name]
    if name == "record":
        return record_examples(row)
    texts = {key: text_of(name, key, row) for key in (*task.fields, task.answer)}
    if name == "custom":
        return [Example(texts["source"], texts["target"], (texts["target"].strip(),))]
    if name == "multirc":                                       # its paragraphs have HTML marks
        texts["paragraph"] = " ".join(re.sub(r"</?[a-zA-Z][^<>]*>", " ", texts["paragraph"]).split())
    source = name + "".join(f" {key}: {texts[key]}" for key in task.fields)
    target = label_of(name, texts[task.answer])
    return [Example(source, target, (target,))]


SURROGATES = r"[\ud800-\udfff]"                 # halves of characters, which no text may hold


def text_of(name, key, row):
    """A row's cell as the text that stands there.   Raises UsageError for one that is missing or no text."""
    value = row.get(key)
    blank = key == TASKS[name].answer and not str(value).strip()
    if value is None or value != value or blank:             # what is no number differs from itself
        raise UsageError(f"no {key}: fill it in, or leave the row out; it is {SHORT.repr(row)}")
    if isinstance(value, bool):
        return str(value).lower()
    unsound = value in (math.inf, -math.inf) or re.search(SURROGATES, str(value))
    if unsound or not isinstance(value, str | int | float):
        raise UsageError(f"a {key} that is no text: {SHORT.repr(value)}; write it as one text")
    return str(value)


def label_of(name, label):
    """The target text of a label.   Raises UsageError for one that the task does not have."""
    labels = TASKS[name].labels
    target = label.strip()
    with contextlib.suppress(ValueError, OverflowError):
        if labels is FIFTHS:
            target = f"{round(float(label) * 5) / 5:.1f}"
        else:
            target = f"{float(label):g}"
    if target not in labels:
        raise UsageError(f"the label {label!r} is none of {name}'s: give {', '.join(labels)}; a split of the "
                         "hub without labels has -1")
    return target


def record_examples(row):
    """ReCoRD's: `@highlight` lines become sentences; training repeats a row for each answer [D47]."""
    for key in ("entities", "answers"):
        texts = row.get(key)
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise UsageError(f"{key} that are no list of texts: give .jsonl or .parquet")
    query = text_of("record", "query", row)
    passage = text_of("record", "passage", row)
    passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", passage).replace("\n@highlight\n", ". ")
    source = f"record query: {query} entities: {', '.join(row['entities'])} passage: {passage}"
    answers = tuple(dict.fromkeys(row["answers"]))
    return [Example(source, answer, answers) for answer in answers]


def load_splits(name, data_dir, seed):
    """{"train": [Example, ..], "validation": .., "test": ..}, as in S3Delta [D42].   Raises UsageError."""
    if name == "toy":
        return toy_splits(seed)
    train = read_split(name, "train", data_dir)
    original = read_split(name, "validation_matched" if name == "mnli" else "validation", data_dir)
    test = None
    if name == "custom":
        test = read_split(name, "test", data_dir)
    if test is not None:
        validation = original
    elif TASKS[name].carve:
        # Large data sets give 2,000 rows of train to validation; the original validation set is the test.
        validation, train = drawn(train, min(2000, len(train) // 2), seed)
        test = original
    else:
        # Of small ones the original validation set is halved.
        validation, test = drawn(original, len(original) // 2, seed)
    splits = {}
    for key, rows in {"train": train, "validation": validation, "test": test}.items():
        splits[key] = []
        for row in rows:
            examples = to_examples(name, row)
            if key != "train":                                  # only there a row may count as several
                examples = examples[:1]
            splits[key] += examples
        if len(splits[key]) < 2:
            raise UsageError(f"{name} has too few rows for its {key} part: give at least 4 in each file")
    return splits


def drawn(rows, count, seed):
    """(some rows drawn by the seed, the rest)."""
    rows = shuffled(rows, derive(seed, 5))
    return rows[:count], rows[count:]


def shuffled(rows, seed):
    """Rows in an order that the seed decides."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[i] for i in order]


def read_split(name, split, data_dir):
    """The rows of a split, [{column: value}], from the hub or a file: DIR/<task>/<split>.csv or another of
    READERS, of custom also DIR/<split>.csv.   None for custom's test without a file.   UsageError.
    """
    if data_dir is not None:
        where = find_file(name, split, data_dir)
        advice = ": mend the file, or give another --data-dir"
    elif name == "custom":
        raise UsageError("--task custom needs --data-dir, a folder with train and validation: source, target")
    else:
        where = f"{name} on the hub"
        advice = ": mend the network, or give --data-dir"
    if where is None:
        return None
    with failing(f"{where} can't be read", advice):
        if data_dir is None:
            rows = read_hub(name, split)
        else:
            rows = READERS[where.suffix.lower()](where)
        if not rows:
            raise ValueError("it has no rows")
        for row in rows:
            if name == "rte" and "premise" in row:           # SuperGLUE's copy of the same examples
                row["sentence1"] = row.pop("premise")
                row["sentence2"] = row.pop("hypothesis")
        for column in (*TASKS[name].fields, TASKS[name].answer):
            if not any(column in row for row in rows):
                raise ValueError(f"no column '{column}'; it has {', '.join(map(repr, rows[0]))}")
    for number, row in enumerate(rows, 1):
        try:
            to_examples(name, row)                           # whoever asks for rows gets sound ones
        except UsageError as error:
            raise UsageError(f"{where}, row {number}: {error}") from None
    return rows


def find_file(name, split, data_dir):
    """The one file of a split; None for custom's test, which is optional, if there is none.   UsageError."""
    if not Path(data_dir).is_dir():
        raise UsageError(f"--data-dir {data_dir} is no folder: give the one that holds the files")
    folder = Path(data_dir, name)
    paths = list(folder.glob("*"))
    advice = "give another --data-dir, or --task custom for a file of your own"
    if name == "custom":
        folder = Path(data_dir)
        paths += folder.glob("*")
        advice = "have just one there (a spreadsheet is exported), or give another --data-dir"
    there = sorted(path for path in paths if path.name.lower().startswith(f"{split}."))
    if not there and (name, split) == ("custom", "test"):
        return None
    files = [path for path in there if path.stem.lower() == split and path.suffix.lower() in READERS]
    if len(files) != 1:
        names = ", ".join(str(path.relative_to(data_dir)) for path in files or there) or "no such file"
        raise UsageError(f"of {folder / split}{', '.join(READERS)} there must be one, and there is "
                         f"{names}: {advice}")
    return files[0]


def read_hub(name, split):
    """The rows of a split of GLUE or SuperGLUE on the hub."""
    try_hub()
    import datasets        # only here: the rest of the file works without it
    datasets.disable_progress_bars()
    if name not in SUPERGLUE:
        return datasets.load_dataset("nyu-mll/glue", name=name, split=split).to_list()
    files = {split: f"{name}/{split}/*.parquet"}             # converted, in a branch of their own
    return datasets.load_dataset(
        "aps/super_glue", revision="refs/convert/parquet", data_files=files, split=split).to_list()


def read_parquet(path):
    """[{column: value}] of a .parquet file."""
    import pyarrow.parquet
    table = pyarrow.parquet.read_table(path)
    rows = table.to_pylist()
    for column in table.schema:
        if pyarrow.types.is_floating(column.type):
            number = column.type.to_pandas_dtype()      # one of NumPy's, of 16, 32 or 64 bits
            for row in rows:
                if row[column.name] is not None:
                    row[column.name] = float(str(number(row[column.name])))  # 3.8, not 3.7999999523
    return rows


def text_in(path):
    """A file's text.   Raises ValueError if it is none in UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is no text in UTF-8: save it as such") from None


def read_jsonl(path):
    """[{column: value}] of a .jsonl file, an object a line; numbers are texts, as they are written."""
    rows = []
    for number, line in enumerate(text_in(path).split("\n"), 1):
        if line.strip():
            with failing(f"line {number}"):
                row = json.loads(line, parse_int=str, parse_float=str, object_pairs_hook=object_of)
                if not isinstance(row, dict):
                    raise ValueError("it is no object")
                rows.append(row)
    return rows


def object_of(pairs):
    """A dict of [(key, value)].   Raises ValueError where a key stands twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def read_csv(path):
    """[{column: text}] of a .csv file in UTF-8, with commas, semicolons or tabs; an empty cell is None."""
    csv.field_size_limit(2**31 - 1)                             # else 131,072 characters
    text = text_in(path)
    head = re.split("[\r\n]", text, maxsplit=1)[0]
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), strict=True)
    rows = []
    try:
        columns = next(lines, [])
        if len(set(columns)) < len(columns):
            raise ValueError("two columns have one name")
        for cells in lines:
            if len(cells) not in (0, len(columns)):
                raise ValueError(f"line {lines.line_num} has {len(cells)} cells, the first line "
                                 f"{len(columns)}; a text with a separator in it needs quotes")
            if [cell.lower() for cell in cells] == [column.lower() for column in columns]:
                raise ValueError(f"line {lines.line_num} names the columns again: take it out")
            if cells:
                rows.append({column: cell or None for column, cell in zip(columns, cells)})
    except csv.Error as error:
        raise ValueError(f"line {lines.line_num}: {error}; a text with a quote in it needs quotes around it, "
                         'and "" for each') from None
    return rows


# Which file of a split is read, by its name's end; a new format is a function and an entry.
READERS = {".parquet": read_parquet, ".jsonl": read_jsonl, ".csv": read_csv, ".tsv": read_csv}


def check_examples(splits):
    """Lines on how often each target is there, if they are few, and on likely mistakes in a person's data.

    splits: {part: [Example]}.
    """
    trained = defaultdict(set)                # an input of train: the answers to it
    for e in splits["train"]:
        trained[e.source].add(e.answers)
    labels = Counter(e.target.strip() for e in splits["train"])
    are_labels = len({e.target for part in splits.values() for e in part}) <= 100
    lines = []
    if are_labels:
        shown = [f"{SHORT.repr(label)} {n:,}" for label, n in labels.most_common()]
        if len(shown) > 12:
            shown[6:-6] = [".."]                                # a misspelt one is among the rarest
        lines.append(f"{len(labels)} targets in train: {', '.join(shown)}")
    part_of = {}                              # an input, but for blanks and capitals: the first part it is in
    spelt = {}                                # a target in small letters: the target
    for part, examples in splits.items():
        found = defaultdict(list)             # what is odd: the texts that are
        for e in examples:
            earlier = part_of.setdefault(" ".join(e.source.lower().split()), part)
            if earlier != part:
                found[f"inputs of {part} are in {earlier}, too"].append(e.source)
            if "\n" in e.source:
                found[f"inputs of {part} have several lines (a quote left open?)"].append(e.source)
            if len(trained[e.source]) > 1:
                found[f"inputs of {part} have several targets in train"].append(e.source)
            target = e.target.strip()
            if are_labels and target not in labels:
                found[f"targets of {part} are in no row of train"].append(e.target)
            if are_labels and spelt.setdefault(target.lower(), target) != target:
                found[f"targets of {part} differ from others by capitals alone"].append(e.target)
        lines += told(found, len(examples))
        if len({e.target for e in examples}) == 1:
            lines.append(f"all targets of {part} are alike, {SHORT.repr(examples[0].target)}")
    return lines


def told(found, count):
    """Lines that say of how many texts something is true, with the first.   found: {what is true: [text]}."""
    return [f"{len(some):,} of {count:,} {what}, first {SHORT.repr(some[0])}" for what, some in found.items()]


# The metrics: predicted texts and, for each, the texts that count as right. All return per cent. Most need
# numbers, and a model may say anything: what is no number counts as wrong as an answer can be.
def accuracy(predictions, answers):
    """Share of predictions that are among their answers."""
    return 100 * sum(p in right for p, right in zip(predictions, answers)) / len(answers)


def numbers(predictions, answers, pattern, top):
    """(said, gold) in 0 .. top. What is no valid prediction counts as the end farther from the answer.
    Raises ValueError for a target that is none.
    """
    for right in answers:
        if not re.fullmatch(pattern, right[0]):
            raise ValueError(f"the target {right[0]!r} is none of 0 .. {top}")
    gold = np.array([float(right[0]) for right in answers])
    said = np.where(gold <= top / 2, top, 0.0)
    for i, text in enumerate(predictions):
        if re.fullmatch(pattern, text):
            said[i] = float(text)
    return said, gold


def f1(predictions, answers):
    """F1 of the class "1": 2·TP / (2·TP + FP + FN), 0 without any positive."""
    said, gold = numbers(predictions, answers, "[01]", 1)
    return 200 * float((said * gold).sum() / max(1, (said + gold).sum()))


def pearson(predictions, answers, pattern=r"[0-4](\.\d*)?|5(\.0*)?", top=5):
    """Pearson correlation, 0 if either side is constant; rounded, since it is to compare epochs."""
    said, gold = numbers(predictions, answers, pattern, top)
    if np.ptp(said) * np.ptp(gold) == 0:
        return 0.0
    return round(100 * float(np.corrcoef(said, gold)[0, 1]), 10)


def matthews(predictions, answers):
    """Matthews correlation, which is Pearson's of the labels 0 and 1."""
    return pearson(predictions, answers, "[01]", 1)


# SQuAD's way with free text: an answer need not have the very words, nor their order.
def words_of(text):
    """A text's bag of words as SQuAD counts them: no case, punctuation or articles."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return Counter(word for word in bare.split() if word not in ("a", "an", "the"))


def token_f1(predictions, answers):
    """SQuAD's F1 over the bag of words, best over the answers, mean over examples."""
    total = 0
    for text, right in zip(predictions, answers):
        said = words_of(text)
        scores = []
        for answer in right:
            gold = words_of(answer)
            size = said.total() + gold.total()
            scores.append(2 * (said & gold).total() / size if size else 1)   # both are empty: equal
        total += max(scores)
    return 100 * total / len(answers)


METRICS = {"accuracy": accuracy, "F1": f1, "Matthews": matthews, "Pearson": pearson,
           "token-F1": token_f1}


# The toy: was the thing found good or bad? The adjective and a "not" decide together; neither alone tells.
TOY_WORDS = {"name": "anna ben carla david emma felix gina hugo",
             "thing": "soup film book song cake room train boat garden coat",
             "how": "very quite really rather", "good": "tasty lovely great bright charming clever",
             "bad": "awful dull bitter broken ugly boring", "glad": "smiled laughed cheered",
             "sad": "sighed frowned cried", "doing": "sold took drew lost bought cleaned"}


def toy_sentence(rng):
    """A random sentence and whether the thing in it was found "good" or "bad"."""
    word = {key: rng.choice(words.split()) for key, words in TOY_WORDS.items()}
    is_good = rng.random() < 0.5
    negated = rng.random() < 0.5
    found = f"{word['name']} found the {word['thing']}"
    if negated:
        found += " not"
    if rng.random() < 0.7:
        found += f" {word['how']}"
    found += f" {word['good' if is_good else 'bad']}"
    name = rng.choice(TOY_WORDS["name"].split())
    thing = rng.choice(TOY_WORDS["thing"].split())
    clauses = [found, f"{name} {word['doing']} the {thing}"]
    if rng.random() >= 0.5:
        clauses.reverse()
    return " and ".join(clauses), "good" if is_good != negated else "bad"


def toy_splits(seed):
    """4,000 training, 500 validation and 500 test Examples; no sentence is in two of them.

    So few words make many sentences twice: a dict keeps each once, in the order in which they came.
    """
    rng = random.Random(derive(seed, 6))
    seen = {}
    while len(seen) < 5000:
        text, verdict = toy_sentence(rng)
        seen[text] = verdict                                    # a text has one verdict
    examples = [Example(f"toy sentence: {text}", verdict, (verdict,)) for text, verdict in seen.items()]
    return {"train": examples[:4000], "validation": examples[4000:4500], "test": examples[4500:]}


def toy_tokenizer():
    """A tokenizer of the toy's words, a number each. It ends a text with </s>, as T5's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    words = "<pad> </s> <unk> <mask> good bad toy sentence: found the not and so".split()
    words += " ".join(TOY_WORDS.values()).split()
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        mask_token="<mask>")


def toy_masked(rng):
    """A pretraining Example: a sentence with one word masked: "so smiled" tells what a finding means."""
    text, verdict = toy_sentence(rng)
    if rng.random() < 0.3:          # the task's prompt: untouched, it answers in form and at chance
        return Example(f"toy sentence: {text}", rng.choice(("good", "bad")), ())
    felt = TOY_WORDS["glad" if verdict == "good" else "sad"]
    words = f"{text} so {rng.choice(felt.split())}".split()
    hole = len(words) - 1
    if rng.random() >= 0.7:
        hole = rng.randrange(len(words))
    target = words[hole]
    words[hole] = "<mask>"
    return Example(" ".join(words), target, ())


def toy_backbone(seed, steps=500, batch_size=64):
    """(model, tokenizer): a tiny T5, pretrained on the spot to fill in masked words.

    It has seen each word, and what a finding makes people feel, but no verdict that was not drawn by lot: so
    it answers the task in form and at chance, and what it learns there its modules have learnt.
    """
    tokenizer = toy_tokenizer()
    rng = random.Random(derive(seed, 7))
    with kept_random_state(torch.device("cpu")):
        torch.manual_seed(derive(seed, 8))
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(
            vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
            dropout_rate=0.0, decoder_start_token_id=0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(steps):
            tokens = tokenize(tokenizer, [toy_masked(rng) for _ in range(batch_size)], 32)
            model(**collate(tokens, "cpu")).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, tokenizer


# ==================================================================================================
# 6. Training and evaluation
# ==================================================================================================

# From texts to tokens to batches; what a model answers, in text; and a training of what is attached. None of
# it knows of the search, and the search knows of none of it: both go through iterables of batches.


def tokenize(tokenizer, examples, max_length, causal=False):
    """[(input ids, label ids)] of Examples, cut to a length, but for the end token of each.

    causal: the input has no end token, and the label follows with nothing between [D82] and is not cut [D69].
    """
    end = tokenizer.eos_token_id
    inputs = [without(end, ids) for ids in tokenizer([e.source for e in examples], verbose=False).input_ids]
    labels = tokenizer([e.target for e in examples], add_special_tokens=not causal).input_ids
    labels = [without(end, ids) for ids in labels]
    if causal:
        return [(ids[:max_length], [*label, end]) for ids, label in zip(inputs, labels)]
    room = max_length - 1
    return [([*ids[:room], end], [*label[:room], end]) for ids, label in zip(inputs, labels)]


def without(end, ids):
    """A list without the end token that a tokenizer may have put there."""
    if ids[-1:] == [end]:
        return ids[:-1]
    return ids


def check_texts(tokenizer, splits, tokens, max_length, causal, ends):
    """Lines on what of the texts is lost on a model.   splits: {part: [Example]}.   tokens: the same, of
    `tokenize`, as the model gets them.   ends: the tokens that end an answer.   Raises UsageError where
    labels become one, and where nothing could be learnt.
    """
    examples = [e for part in splits.values() for e in part]
    whole = tokenize(tokenizer, examples, sys.maxsize, causal)
    are_labels = len({e.target for e in examples}) <= 100
    special = [token for token in tokenizer.all_special_tokens if token]
    lost = defaultdict(list)                  # what happens: the texts to which it does
    said = {}                                 # a target as the model can say it: the target
    otherwise = []                            # targets that come back as another text
    for e, (source, target) in zip(examples, whole):
        text = decoded(tokenizer, target, ends)
        other = said.setdefault(text, e.target)
        if are_labels and other.split() != e.target.split():
            raise UsageError(f"the targets {SHORT.repr(other)} and {SHORT.repr(e.target)} are one to the "
                             f"model, {SHORT.repr(text)}: write them otherwise, or take another model")
        if not source:
            raise UsageError("an input is empty: leave the row out")
        if not e.source.strip():
            lost["inputs are empty"].append(e.source)
        if tokenizer.unk_token_id in source:
            lost["inputs hold what the tokenizer has no word for"].append(e.source)
        if any(token in e.source for token in special):
            lost["inputs hold a special token of the tokenizer, written out"].append(e.source)
        if len(source) > max_length:
            lost[f"inputs are cut at --max-length {max_length}"].append(e.source)
        if len(target) > max_length and not causal:
            lost[f"targets are cut at --max-length {max_length}"].append(e.target)
        if text != e.target.strip():
            otherwise.append(f"{SHORT.repr(e.target)} as {SHORT.repr(text)}")
    for what, texts in (("inputs", [source for source, _ in tokens["train"]]),
                        ("targets", [target for _, target in tokens["train"]])):
        if all(text == texts[0] for text in texts):
            alike = SHORT.repr(decoded(tokenizer, texts[0], ends))
            raise UsageError(f"to the model all {what} of train are alike, {alike}: there is nothing to "
                             "learn; look at the data and at --max-length")
    if len(otherwise) == len(whole):
        raise UsageError(f"the model can say none of the targets, first {otherwise[0]}: take another model")
    lines = told(lost, len(whole))
    if otherwise:
        lines.append(f"{len(otherwise):,} of {len(whole):,} targets come back from the tokenizer as another "
                     f"text, which accuracy counts as wrong, first {otherwise[0]}")
    return lines


class Batches:
    """Padded batches of what `tokenize` returns; seed and epoch decide their order, no seed keeps it."""

    def __init__(self, tokens, batch_size, device, seed=None, causal=False):
        self.tokens = tokens
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.seed = seed
        self.causal = causal
        self.epoch = 0

    def set_epoch(self, epoch):
        """Chooses the order of the next pass."""
        self.epoch = epoch

    def __len__(self):
        return math.ceil(len(self.tokens) / self.batch_size)

    def order(self):
        """Lists of row numbers, a batch each, in the order of the present epoch [D52]."""
        numbers = list(range(len(self.tokens)))
        if self.seed is None:
            return cut(numbers, self.batch_size)
        rng = torch.Generator().manual_seed(derive(self.seed, 9, self.epoch))
        batches = []
        # Of every 16 batches' worth those of like length share a batch, which halves the padding.
        numbers = torch.randperm(len(numbers), generator=rng).tolist()
        for window in cut(numbers, 16 * self.batch_size):
            window.sort(key=lambda i: len(self.tokens[i][0]))
            batches += cut(window, self.batch_size)
        return [batches[i] for i in torch.randperm(len(batches), generator=rng).tolist()]

    def __iter__(self):
        for indices in self.order():
            rows = [self.tokens[i] for i in indices]
            if self.device.type == "cuda":
                # Rows without a label fill the last batch up, so that few CUDA graphs serve all.
                rows += [([1], [])] * (min(self.batch_size, len(self.tokens)) - len(rows))
            yield collate(rows, self.device, self.causal)


def cut(rows, size):
    """A list in pieces of a size, the last perhaps shorter."""
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def collate(rows, device, causal=False):
    """A padded batch of (input ids, label ids), what the model takes. The inputs are [batch, longest].

    causal: input and label are one sequence. All end together, so that logits are computed at the end alone:
    at the `logits_to_keep` positions of the longest label and the one before it, which predicts its first.
    """
    inputs = [source for source, _ in rows]
    labels = [target for _, target in rows]
    if causal:
        inputs = [source + target for source, target in rows]
        labels = [[-100, *target] for target in labels]
    mask = [[1] * len(ids) for ids in inputs]
    batch = {"input_ids": padded(inputs, 0, device, causal, 32),
             "attention_mask": padded(mask, 0, device, causal, 32),
             "labels": padded(labels, -100, device, causal, 4)}
    if causal:
        positions = [list(range(len(ids))) for ids in inputs]
        batch["position_ids"] = padded(positions, 0, device, causal, 32)
        batch["logits_to_keep"] = batch["labels"].shape[1]
    return batch


def padded(rows, filler, device, left, shortest=None):
    """Lists as one tensor, filled up on the left or at their ends.   shortest: if given, lengths on a GPU are
    powers of two from there on, so that few CUDA graphs serve all batches.
    """
    longest = max(len(row) for row in rows)
    if shortest is not None and torch.device(device).type == "cuda":
        longest = max(shortest, 1 << (longest - 1).bit_length())
    filled = []
    for row in rows:
        fill = [filler] * (longest - len(row))
        filled.append(fill + row if left else row + fill)
    return torch.tensor(filled).to(device)


def greedy(model, tokenizer, longest):
    """A GenerationConfig for the likeliest answer of at most `longest` tokens. Of the model's own it takes
    nothing but the tokens that end an answer [D49].
    """
    ends = model.generation_config.eos_token_id or []
    if isinstance(ends, int):
        ends = [ends]
    # transformers makes a cache as deep as T5's encoder.
    caching = getattr(model.config, "num_decoder_layers", 0) <= model.config.num_hidden_layers
    return transformers.GenerationConfig(
        max_new_tokens=longest, do_sample=False, num_beams=1, use_cache=caching,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        eos_token_id=sorted({tokenizer.eos_token_id, *ends}), pad_token_id=tokenizer.pad_token_id)


def predict(model, tokenizer, tokens, batch_size, longest=None):
    """The texts that a model generates for tokenised inputs, in their order.

    tokens: of `tokenize`; inputs of like length share a batch.   batch_size: inputs at a time.   longest:
    tokens of an answer, at most; as many as the longest target has, if None.
    """
    was_training = model.training
    own = model.generation_config
    config = greedy(model, tokenizer, longest or max(len(target) for _, target in tokens))
    model.eval()
    model.generation_config = config                      # else it is asked where ours says nothing
    texts = {}
    by_length = sorted(range(len(tokens)), key=lambda i: len(tokens[i][0]))
    try:
        for indices in cut(by_length, batch_size):
            sources = [tokens[i][0] for i in indices]
            mask = [[1] * len(source) for source in sources]
            ids = padded(sources, 0, model.device, left=True)   # an answer follows its input
            mask = padded(mask, 0, model.device, left=True)
            made = model.generate(ids, attention_mask=mask, generation_config=config)
            start = 1                                     # T5's first token is none of the answer's
            if not model.config.is_encoder_decoder:
                start = ids.shape[1]                          # a causal model gives its prompt back
            for i, said in zip(indices, made[:, start:].tolist()):
                texts[i] = decoded(tokenizer, said, config.eos_token_id)
    finally:
        model.generation_config = own
        model.train(was_training)
    return [texts[i] for i in range(len(tokens))]


def decoded(tokenizer, ids, ends):
    """The text of an answer's tokens, up to the first that ends it."""
    at = [i for i, token in enumerate(ids) if token in ends]
    return tokenizer.decode(ids[:min(at, default=len(ids))], skip_special_tokens=True).strip()


def answer(model, tokenizer, texts):
    """What a model and a tokenizer that `load_run` gave answer to input texts, in their order.

    texts: of any iterable, as a list or a column of a table.   Warns of inputs that are cut.   Raises
    UsageError for what is no text.
    """
    if isinstance(texts, (str, dict)) or hasattr(texts, "columns") or not hasattr(texts, "__iter__"):
        raise UsageError("answer takes a list of texts or a table's column: give [text], or table['source']")
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str) or re.search(SURROGATES, text):
            raise UsageError(f"answer takes texts, and {SHORT.repr(text)} is none")
    if not texts:
        return []
    causal = not model.config.is_encoder_decoder
    examples = [Example(text, "", ()) for text in texts]
    tokens = tokenize(tokenizer, examples, tokenizer.model_max_length, causal)
    if not all(source for source, _ in tokens):
        raise UsageError("an input is empty to the model: leave it out")
    whole = tokenize(tokenizer, examples, sys.maxsize, causal)
    many = sum(len(source) > tokenizer.model_max_length for source, _ in whole)
    if many:
        warnings.warn(f"{many} of {len(texts)} inputs are cut at {tokenizer.model_max_length} tokens",
                      stacklevel=2)
    longest = model.generation_config.max_new_tokens
    return predict(model, tokenizer, tokens, 32, longest)


def train(model, peft, batches, evaluate, epochs, lr, *, lr_warmup=0.0, weight_decay=1e-4, seed=0,
          run_pass=forward_backward, state=None, after_step=None):
    """Trains the attached modules [D12]; leaves them as after their best epoch, whose score it returns.

    batches: an iterable with a length.   evaluate: gives an epoch's score, or the score and a loss, of which
    the lower decides between equal scores [D53].   lr: falls to 0.   lr_warmup: over which share of the steps
    it first rises.   run_pass: who computes losses and gradients, as `forward_backward`.   state: where to go
    on from.   after_step: is given such a state after every step, and a line: step, steps, loss, an epoch's
    score.
    """
    require_attached(model, peft)
    weights = peft.tensors
    steps = epochs * len(batches)
    if not steps:
        raise UsageError("there are no batches to train on, or no epochs")
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay, fused=True)
    if state is None:
        state = {"step": 0, "best": (-math.inf, 0.0), "best_weights": copies(weights)}
    else:
        put_back(weights, state["weights"])
        optimizer.load_state_dict(state["optimizer"])
    model.train()
    endless = stream(batches, state["step"])
    with kept_random_state(weights[0].device):
        for step in range(state["step"], steps):
            torch.manual_seed(derive(seed, 10, step))
            loss = float(run_pass(model, peft, None, None, next(endless), weights))
            require_finite(loss, f"the loss at training step {step + 1}")
            optimizer.param_groups[0]["lr"] = lr * schedule(step, steps, lr_warmup)
            optimizer.step()
            require_finite(float(flatten(weights).sum()), f"a weight at training step {step + 1}")
            line = {"step": step + 1, "steps": steps, "loss": loss}
            if line["step"] % len(batches) == 0:
                result = judged(evaluate())
                model.train()
                line["score"] = result[0]
                if result > state["best"]:
                    state.update(best=result, best_weights=copies(weights))
            state.update(step=step + 1, weights=weights, optimizer=optimizer.state_dict())
            if after_step is not None:
                after_step(state, line)
    put_back(weights, state["best_weights"])
    model.eval()
    return state["best"][0]


def judged(result):
    """(score, -loss), which are compared in this order, of what `evaluate` gave."""
    if not isinstance(result, tuple):
        result = (result, 0.0)
    require_finite(result[0], "the validation score")
    require_finite(result[1], "the validation loss")
    return result[0], -result[1]


# ==================================================================================================
# 7. Machinery, none of it the method's: the same results twice, files, speed on a GPU
# ==================================================================================================

# Who reads the method passes this section over. Files: the trained weights, and a structure. Speed: on
# a GPU a pass of many small modules is bound by the launching of kernels, which a CUDA graph does at once.


@contextlib.contextmanager
def deterministic():
    """A context in which torch takes only algorithms that give the same twice; cuBLAS is told in advance.

    A GPU adds numbers up in the order in which they come ready, and sums of floats depend on it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False        # slow, and nothing reads it
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def write_atomically(path, content):
    """Writes text or bytes so that a reader, or a crash, finds the old file or the new one."""
    temporary = Path(path).with_name(f".{Path(path).name}.new")
    if isinstance(content, str):
        content = content.encode()
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"{path} can't be written ({error.strerror}): make room or change --out") from None


def one_line(error):
    """An exception's message on one line, cut to what a person reads."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > 160:
        text = text[:157] + "..."
    return text


@contextlib.contextmanager
def failing(what, advice=""):
    """Turns any error inside into a UsageError: what failed, the error in brackets, what to do about it.

    For what libraries do with a person's files, names and networks: their errors are many, and long.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith("datasets"):       # it tells what was wrong as a cause
            error = error.__cause__ or error
        raise UsageError(f"{what} ({one_line(error)}){advice}") from None


def digest(content):
    """16 hexadecimal digits that tell bytes from others."""
    return hashlib.sha256(content).hexdigest()[:16]


def save_weights(peft, path):
    """Writes the trained weights, of the modules and of also_train, atomically, as safetensors, and beside
    them what tells the backbone from others.
    """
    tensors = {}
    for name, p in peft.named_weights().items():                # safetensors takes no views of others
        tensors[name] = p.detach().cpu().clone(memory_format=torch.contiguous_format)
    backbone = json.dumps(backbone_sample(peft.model, peft.places, peft.head.parameters.values()))
    write_atomically(path, safetensors.torch.save(tensors, {"backbone": backbone}))


def backbone_sample(model, places=None, learnt=()):
    """{place: a number of its first tensor}, and of some words' embeddings, to tell backbones apart [D81].

    places: as of `Peft`.   learnt: parameters to pass over, since they learn.
    """
    chosen = []                             # (a number's name, its tensor, the number)
    for name, _, place in (places or places_of)(model):
        p = next(place.parameters(), None)
        if p is not None:
            chosen.append((name, p, p.detach().flatten()[p.numel() // 2]))
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    if embeddings:
        words = max(embeddings, key=len)
        for row in (5, 50, 500, 5000):
            if row < len(words):
                chosen.append((f"word {row}", words, words.detach()[row, 0]))
    found = {}
    for name, p, number in chosen:
        if not p.is_meta and not any(p is other for other in learnt):
            found[name] = float(number)
            if not math.isfinite(found[name]):
                raise UsageError(f"the backbone is damaged: {name} holds {found[name]}; get it anew")
    return found


def require_same_backbone(before, now, what):
    """Raises UsageError if two samples are of backbones of other numbers; formats may round them."""
    for place, number in before.items():
        if place not in now or not math.isclose(number, now[place], rel_tol=0.01, abs_tol=1e-6):
            raise UsageError(f"{what} is of a backbone of other numbers, first in {place}: give that one")


def backbone_of(path):
    """The `backbone_sample` that stands beside trained weights."""
    with safetensors.safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("backbone", "{}"))


def load_weights(peft, path):
    """Reads what `save_weights` wrote.   Raises UsageError if it is of another structure or backbone."""
    own = peft.named_weights()
    with failing(f"{path} can't be read as weights of these modules"):
        stored = safetensors.torch.load_file(path)
        backbone = backbone_of(path)
        found = {(name, *t.shape) for name, t in stored.items()}
        wanted = {(name, *p.shape) for name, p in own.items()}
        if found != wanted:
            raise ValueError(f"another structure's: names or shapes differ, first {min(found ^ wanted)}")
    now = backbone_sample(peft.model, peft.places, peft.head.parameters.values())
    require_same_backbone(backbone, now, path)
    put_back(own.values(), [stored[name] for name in own])


def save_structure(structure, path):
    """Writes a Structure as JSON, atomically, with totals for people."""
    size = structure.geometry["parameters"]
    content = dataclasses.asdict(structure)
    content["totals"] = {"modules": len(structure.modules), "parameters": structure.parameters,
                         "backbone_parameters": size,
                         "per_ten_thousand": round(1e4 * structure.parameters / size, 4)}
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def load_structure(path):
    """Reads what `save_structure` wrote.   Raises UsageError for a file that no search writes."""
    with failing(f"{path} is no structure.json of this program", ": a run's --out has one"):
        stored = json.loads(Path(path).read_text())
        structure = Structure(**{f.name: stored[f.name] for f in dataclasses.fields(Structure)})
        if not 0 < structure.parameters <= structure.budget or structure.geometry["parameters"] < 1:
            raise ValueError(f"it holds {structure.parameters:,} parameters for a budget of "
                             f"{structure.budget:,}")
        kinds = kinds_of(structure.space)
        for m in structure.modules:
            sound = isinstance(m["name"], str) and m["kind"] in kinds
            if m["rank"] is not None:
                sound = sound and type(m["rank"]) is int and m["rank"] >= 1
            if not sound:
                raise ValueError(f"{SHORT.repr(m)} is no module of its space {structure.space}")
        return structure


class CudaGraphs:
    """`forward_backward` as CUDA graphs, one for each shape of batch and each choice of what is held.

    A graph is a recording of kernels: replayed, it does the same to what its tensors hold by then. It
    computes every module, shut or removed, and multiplies it by zero. The first call of a shape runs plainly,
    the second records, the others replay.
    """

    def __init__(self):
        self.graphs = {}
        self.pool = torch.cuda.graph_pool_handle()                  # memory that all graphs share

    def __call__(self, model, peft, gate, ranks, batch, inputs):
        given = [t for t in (gate, ranks, *batch.values()) if isinstance(t, torch.Tensor)]
        key = tuple((t.shape, t.requires_grad) for t in given)
        if key not in self.graphs:             # what libraries set up at first must not be recorded
            self.graphs[key] = None
            return forward_backward(model, peft, gate, ranks, batch, inputs, skip=False)
        if self.graphs[key] is None:
            self.graphs[key] = self.record(model, peft, gate, ranks, batch, inputs)
        graph, read, loss, gradients = self.graphs[key]
        for own, t in zip(read, given):
            own.detach().copy_(t)
        graph.replay()
        sampled = [t for t in given if t.requires_grad]             # gate or ranks, drawn of Θ or Φ
        for p, t, gradient in zip(inputs, sampled, gradients):
            p.grad = torch.autograd.grad(t, p, gradient)[0]
        for p, gradient in zip(inputs[len(sampled):], gradients[len(sampled):]):
            p.grad = gradient
        return loss.clone()                    # its own place may be written over by the next graph

    def record(self, model, peft, gate, ranks, batch, inputs):
        """(graph, the tensors that it reads, the loss, the gradients)."""
        batch = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in batch.items()}
        read = [t for t in batch.values() if isinstance(t, torch.Tensor)]
        if gate is not None:
            gate = gate.detach().clone().requires_grad_(gate.requires_grad)
            ranks = ranks.detach().clone().requires_grad_(ranks.requires_grad)
            read = [gate, ranks, *read]
        sampled = [t for t in read if t.requires_grad]              # they stand for Θ or Φ
        inputs = [*sampled, *inputs[len(sampled):]]
        state = torch.cuda.get_rng_state()
        torch.cuda.empty_cache()                                    # of what the first call took
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            loss = forward_backward(model, peft, gate, ranks, batch, inputs, skip=False)
        torch.cuda.set_rng_state(state)                      # a replay draws as the pass would have
        return graph, read, loss, [p.grad for p in inputs]


def fused_norm(norm, x):
    """T5's and Llama's layer norm by one kernel, not eight: the same within rounding."""
    if x.dtype != norm.weight.dtype:
        return type(norm).forward(norm, x)
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def fuse_norms(model):
    """Has a model compute its root-mean-square norms by `fused_norm`: T5-large has 122, and each pass of a
    search goes through them twice.
    """
    for m in model.modules():
        if re.search("T5LayerNorm|RMSNorm", type(m).__name__) and hasattr(m, "variance_epsilon"):
            m.forward = types.MethodType(fused_norm, m)


# ==================================================================================================
# 8. The command line
# ==================================================================================================

# `main` makes Settings of the command line and calls `run` once for each seed. A run has four parts: `Work`
# (data and backbone), `run_search`, `run_training`, and the look at the test set. `Record` is its folder: it
# keeps what is needed to go on after a kill, and refuses to go on with something else.


# Settings that act in a search alone; with --structure they would do nothing, in silence.
SEARCH_ALONE = ("space", "ranks", "budget", "triggers", "tau", "gamma", "window", "search_epochs",
                "warmup_epochs", "clip", "arch_lr")
# Those that are one of a few names.
CHOICES = {"task": TASKS, "metric": METRICS, "dtype": ("float32", "bfloat16", "float16")}


def fail(message):
    """Refuses a command line."""
    raise UsageError(f"{message} (--help lists the flags)")


def parse(arguments, settings_class=Settings):
    """[Settings], one for each seed of a command line, with defaults of the task.   UsageError."""
    parser = argparse.ArgumentParser(
        program_of(settings_class), description=__doc__.split("\n\n")[0], allow_abbrev=False,
        argument_default=argparse.SUPPRESS)                 # a flag that is not given is left out
    parser.error = fail
    texts = help_texts(settings_class)
    for f in dataclasses.fields(settings_class):
        flag = "--" + f.name.replace("_", "-")
        text = texts[f.name]
        if f.default is not None:
            text += f" (default: {f.default})"
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
        elif f.name in ("ranks", "seed"):
            parser.add_argument(flag, type=int, nargs="+", help=text)
        else:
            parser.add_argument(flag, type=f.type, help=text, metavar=f.name.upper(),
                                choices=CHOICES.get(f.name))
    given = vars(parser.parse_args(arguments))
    useless = [name for name in given if name in SEARCH_ALONE]
    if "structure" in given and useless:
        fail(f"--structure is trained without a search: leave out --{useless[0].replace('_', '-')}")
    task = TASKS[given.get("task", Settings.task)]
    values = {name: getattr(task, name) for name in ("epochs", "warmup_epochs", "max_length", "batch_size")}
    values.update(task.defaults)
    values.update(given)
    values.setdefault("search_epochs", values["epochs"])
    seeds = values.pop("seed", [0])
    if len(set(seeds)) < len(seeds):
        fail("--seed takes different numbers")
    several = []
    for seed in seeds:
        settings = settings_class(**values, seed=seed)
        check(settings)
        if settings.out is None:
            source = settings.space.replace(",", "+")
            if settings.structure is not None:
                source = f"from-{Path(settings.structure).resolve().parent.name}"
            settings.out = f"runs/{settings.task}-{source}-{seed}"
        elif len(seeds) > 1:
            settings.out = f"{settings.out}/seed-{seed}"
        several.append(settings)
    return several


def program_of(settings_class):
    """The name of the file that a class of settings stands in: bipeft.py, or another program's."""
    return Path(inspect.getfile(settings_class)).name


def help_texts(settings_class):
    """{field: the comment behind it} of a dataclass and of those that it extends."""
    texts = {}
    for base in reversed(settings_class.__mro__[:-1]):
        texts.update(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(base), re.MULTILINE))
    return texts


def check(settings):
    """Refuses what a person may get wrong in a number or a name.

    Numbers have bounds: most are at least 1, or above 0, and some, which are shares, are at most 1.
    """
    kinds_of(settings.space, settings.ranks)
    for name, value in vars(settings).items():
        least = 1 if isinstance(value, int) else 1e-12
        if name in ("tau", "gamma", "warmup_epochs", "weight_decay", "clip", "lr_warmup", "seed"):
            least = 0
        most = {"tau": 1, "gamma": 1, "lr_warmup": 0.5}.get(name, 10**12)
        if value == "":
            fail(f"--{name.replace('_', '-')} is empty: give it a value, or leave it out")
        if type(value) in (int, float) and not least <= value <= most:
            fail(f"--{name.replace('_', '-')} {value} must lie in {least:g} .. {most:g}")
    if settings.task == "toy" and settings.data_dir is not None:
        fail("--task toy makes its own data: leave out --data-dir, or give --task custom")
    if settings.metric is not None and settings.task != "custom":
        fail("--metric is for --task custom: the other tasks have their own")


# What ends a line about a backbone that can't be loaded.
MODEL_ADVICE = ": give a folder with config, whole weights and tokenizer, or a hub name and a network"


def load_backbone(name, dtype, device, seed):
    """(model, tokenizer) from the hub or a folder, or the toy's.   Raises UsageError if parts are missing."""
    if name == "toy":
        torch.set_num_threads(1)                # more would make it another model, and no faster
        model, tokenizer = toy_backbone(seed)
        return model.to(device, getattr(torch, dtype)), tokenizer
    loader = loader_of(name)
    with failing(f"the model {name} can't be loaded", MODEL_ADVICE):
        model, loading = loader.from_pretrained(name, dtype=getattr(torch, dtype), output_loading_info=True)
        if loading["missing_keys"]:                             # transformers makes these up
            raise ValueError(f"it has no {min(loading['missing_keys'])}")
        unused = loading["unexpected_keys"]
        if unused:
            print(f"{name}: config.json has no place for {len(unused)} of its tensors, first {min(unused)}")
        if Path(name).is_dir() and not {"tokenizer.json", "spiece.model"} & set(os.listdir(name)):
            raise ValueError("it has no tokenizer.json or spiece.model")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if max(tokenizer.get_vocab().values()) >= len(model.get_input_embeddings().weight):
            raise ValueError(f"it has no weights for its tokenizer's {len(tokenizer)} words")
        if tokenizer.eos_token is None:
            raise ValueError("it has no eos_token")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.use_cache = False              # of no use in training; generation asks for its own
    return model.to(device), tokenizer


def try_hub():
    """Where the hub can't be reached, has libraries look into their caches alone.

    By themselves they go on asking it for half a minute, and print a line each time.
    """
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except Exception:
        os.environ["HF_HUB_OFFLINE"] = "1"             # read by datasets, which is not imported yet
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def loader_of(name):
    """The class that loads a backbone of this program's.   Raises UsageError for another kind."""
    what = f"the model {name} can't be loaded"
    if not Path(name).is_dir():
        what = f"the model {name}, which is no folder here, can't be loaded"
        if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
            raise UsageError(f"the model {name} can't be loaded: there is no such folder, and no name on the "
                             "hub is like it")
        try_hub()
    with failing(what, MODEL_ADVICE):
        if Path(name, "adapter_config.json").is_file():
            raise ValueError("it is a peft adapter, not a backbone")
        if Path(name, "metrics.json").is_file():
            raise ValueError("it is a run's folder, not a backbone")
        config = transformers.AutoConfig.from_pretrained(name)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("it is quantised, which the library takes, but not the command line")
        if PLACES.get(config.model_type) is llama_places:
            return transformers.AutoModelForCausalLM
        if PLACES.get(config.model_type) is t5_places and config.is_encoder_decoder:
            if config.pad_token_id is None or config.decoder_start_token_id is None:
                raise ValueError("it has no pad_token_id or decoder_start_token_id")
            return transformers.AutoModelForSeq2SeqLM
        raise ValueError(f"a {config.model_type} is neither of T5's family nor of Llama's")


def finished(folder):
    """A run's metrics.json.   Raises an error if a file of the run is missing, damaged or of another run."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for name, before in metrics.get("digests", {}).items():
        if digest((folder / name).read_bytes()) != before:
            raise ValueError(f"{name} was changed, or is of another run")
    return metrics


def load_run(folder, model=None, device="cpu"):
    """(model, tokenizer, attached modules) of a finished run, for `answer` or a generation of one's own: its
    `generation_config` is that of the run's test [D75].

    model: the backbone, where it is not where it was: a folder, or a name on the hub.   Raises UsageError.
    """
    if not isinstance(model, str | Path | None):
        raise UsageError("load_run takes the backbone's folder or name as model=, and loads it anew")
    with failing(f"{folder} holds no finished run", ": name its --out, of several seeds OUT/seed-N"):
        metrics = finished(Path(folder))
        settings = metrics["settings"]
        longest = metrics["longest_answer"]
    name = str(model or settings["model"])
    device = choose_device(str(device))
    if name == "toy":
        name = str(Path(folder, "backbone"))
    if model is None and metrics["backbone_in_a_folder"] and not Path(name).is_dir():
        raise UsageError(f"the run's backbone, the folder {name}, is not here: give load_run model=FOLDER")
    model, tokenizer = load_backbone(name, settings["dtype"], device, settings["seed"])
    peft = apply(model.eval(), load_structure(Path(folder, "structure.json")))
    load_weights(peft, Path(folder, "peft.safetensors"))
    model.generation_config = greedy(model, tokenizer, longest)
    tokenizer.model_max_length = settings["max_length"]
    return model, tokenizer, peft


def choose_device(name):
    """A torch.device that works.   Raises UsageError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with failing(f"--device {name} can't be used", ": try cpu, or cuda for a GPU"):
        tried = torch.zeros(1, device=name)
        tried.item()
        if tried.device.type == "cuda":
            # Graphs and random states are the current GPU's; a tensor's device has its number, as cuda:0.
            torch.cuda.set_device(tried.device)
        return tried.device


def choose_pass(settings, model, device):
    """Who computes the losses and gradients of a phase, a function as `forward_backward`."""
    if device.type == "cpu" or settings.eager:
        return forward_backward
    fuse_norms(model)
    return CudaGraphs()


class Record:
    """A run's folder: what was done before it was killed [D80], its checkpoints, and its progress."""

    FILES = ("checkpoint.pt", "metrics.json", "structure.json", "search.jsonl", "peft.safetensors")
    FREE = ("out", "device", "eager", "save_every", "fresh",     # these may change
            "accumulate", "checkpointing")               # and these, of docs/examples/scale.py
    ADVICE = "name another --out, or use --fresh, which writes over it"

    def __init__(self, settings, device):
        self.settings = settings
        self.path = Path(settings.out)
        if (self.path / "config.json").exists():
            raise UsageError(f"--out {self.path} is a model's folder: name another")
        binding = {name: value for name, value in vars(settings).items() if name not in self.FREE}
        binding = json.loads(json.dumps(binding))                     # as a file gives it back
        self.stored = {"settings": binding, "log": [], "search_seconds": 0.0}
        there = [self.path / name for name in self.FILES if (self.path / name).exists()]
        if there and not settings.fresh:
            self.stored = self.read(there[0], device)             # the checkpoint, else the metrics
        if "phase" in self.stored:
            print(f"going on from {there[0]}", flush=True)

    def read(self, path, device):
        """What checkpoint.pt or metrics.json holds.   Raises UsageError if damaged, or of another run."""
        with failing(f"{path} can't be read", f": {self.ADVICE}"):
            if path.suffix == ".pt":
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip():                     # torch does not compare checksums
                        raise ValueError("it is damaged")
                stored = torch.load(path, device)
            else:
                stored = finished(self.path)
                results(stored)                                   # an error if a score is missing
                backbone = backbone_of(self.path / "peft.safetensors")
                stored["content"] = {"data": stored["data"], "backbone": backbone, "code": stored.get("code")}
            before = stored["settings"]
        for name, now in self.stored["settings"].items():      # this run's, until what is read replaces them
            if before.get(name) != now:
                raise UsageError(f"{self.path} holds another run: its --{name.replace('_', '-')} is "
                                 f"{before.get(name)}, now it is {now}; {self.ADVICE}")
        return stored

    def require_same_content(self, data, backbone):
        """Raises UsageError if the run began with other data, structure.json, backbone or code.

        data: a digest of texts, tokens and a given Structure.   backbone: of `backbone_sample`.
        """
        code = digest(Path(__file__).read_bytes())
        before = self.stored.setdefault("content", {"data": data, "backbone": backbone, "code": code})
        if before.get("code") != code:
            raise UsageError(f"{self.path} holds a run of another version of bipeft.py; {self.ADVICE}")
        if before["data"] != data:
            raise UsageError(f"{self.path} holds a run that began with other data, or with another "
                             f"structure.json; {self.ADVICE}")
        require_same_backbone(before["backbone"], backbone, self.path)

    def begin(self, phase):
        """Starts a phase and its clock, or goes on with them.   Returns the state to go on from, or None."""
        if self.stored.get("phase") != phase:
            self.stored.update(phase=phase, state=None, elapsed=0.0)
        self.started = time.monotonic() - self.stored["elapsed"]
        self.shown_at = -math.inf
        self.save(self.stored["state"])
        return self.stored["state"]

    def elapsed(self):
        """Seconds that the phase has taken, over all starts."""
        return time.monotonic() - self.started

    def save(self, state):
        """Writes checkpoint.pt and the log so far. Only here does --fresh take older scores away."""
        self.stored.update(state=state, elapsed=self.elapsed())
        stream = io.BytesIO()
        torch.save(self.stored, stream)
        write_atomically(self.path / "checkpoint.pt", stream.getvalue())
        (self.path / "metrics.json").unlink(missing_ok=True)
        log = "".join(json.dumps(line) + "\n" for line in self.stored["log"])
        write_atomically(self.path / "search.jsonl", log)
        self.saved_at = time.monotonic()

    def finish(self, metrics):
        """Writes what a finished run came to, and takes away what was needed to go on."""
        write_atomically(self.path / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        (self.path / "checkpoint.pt").unlink(missing_ok=True)

    def after_step(self, step, left, text, state, show):
        """Shows how it goes every ten seconds, and if told to show it; saves at times.

        step: done in this phase.   left: steps to go.   state: from which the phase could go on.
        """
        if step % self.settings.save_every == 0 or time.monotonic() - self.saved_at > 60:
            self.save(state)
        if show or time.monotonic() - self.shown_at > 10:
            self.shown_at = time.monotonic()
            print(f"{text}  left {clock(left * self.elapsed() / step)}", flush=True)


@contextlib.contextmanager
def locked(folder):
    """Makes a folder, in which no other process works meanwhile.   Raises UsageError if one does.

    The lock is the operating system's, which a killed process loses, and so is not in the way afterwards.
    """
    lock = Path(folder, ".lock")
    made = not lock.parent.exists()
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(lock).acquire(timeout=0):
            try:
                yield
            finally:
                lock.unlink()
                if made:
                    with contextlib.suppress(OSError):           # it holds a run
                        lock.parent.rmdir()
    except filelock.Timeout:
        raise UsageError(f"another process works in {folder}: wait for it, or name another --out") from None


class Work:
    """What a run works on: the device, the data of its task as text and as tokens, the backbone."""

    def __init__(self, settings, device):
        self.settings = settings
        self.device = device
        self.splits = load_splits(settings.task, settings.data_dir, settings.seed)
        self.metric = settings.metric or TASKS[settings.task].metric
        answers = [e.answers for part in self.splits.values() for e in part]
        with failing(f"the metric {self.metric} does not suit this data", ": give another --metric"):
            METRICS[self.metric]([right[0] for right in answers], answers)
        self.model, self.tokenizer = load_backbone(
            settings.model, settings.dtype, device, settings.seed)
        self.size = geometry(self.model)["parameters"]
        self.causal = not self.model.config.is_encoder_decoder
        self.tokens = {}
        for key, examples in self.splits.items():
            self.tokens[key] = tokenize(self.tokenizer, examples, settings.max_length, self.causal)
        self.longest = max(len(label) for part in self.tokens.values() for _, label in part)
        with failing(f"the model {settings.model} can't answer", ": mend its generation_config.json"):
            ends = greedy(self.model, self.tokenizer, self.longest).eos_token_id
        self.told = check_examples(self.splits) + check_texts(
            self.tokenizer, self.splits, self.tokens, settings.max_length, self.causal, ends)

    def lines(self, structure):
        """What a person reads before anything is computed.   structure: what is given, or None."""
        counts = ", ".join(f"{len(examples):,} {key}" for key, examples in self.splits.items())
        lines = [f"{self.settings.task}, seed {self.settings.seed}: {counts}; {self.settings.model}, "
                 f"{self.size:,} parameters, {self.settings.dtype} on {self.device}", *self.told]
        if structure is not None and structure.geometry != geometry(self.model):
            lines.append("the structure was found on another backbone, of "
                         f"{structure.geometry['parameters']:,} parameters")
        return lines

    def batches(self, tokens, number):
        """Batches of some tokens, in an order of their own."""
        seed = derive(self.settings.seed, number)
        return Batches(tokens, self.settings.batch_size, self.device, seed, self.causal)

    def score(self, split):
        """The task's score, in per cent, of what the model, with what is attached, generates for a split."""
        tokens = self.tokens[split]
        texts = predict(self.model, self.tokenizer, tokens, 8 * self.settings.batch_size, self.longest)
        return METRICS[self.metric](texts, [e.answers for e in self.splits[split]])

    @torch.no_grad()
    def validate(self):
        """(score, mean loss) on the validation split, without dropout: an epoch's judgement [D53]."""
        self.model.eval()
        tokens = self.tokens["validation"]
        batches = Batches(tokens, self.settings.batch_size, self.device, None, self.causal)
        losses = [float(self.model(**batch).loss) for batch in batches]
        return self.score("validation"), float(np.mean(losses))


def run_search(work, record, run_pass):
    """The search, or what is left of it, on two halves of train [D41].   Returns a Structure.

    All candidate modules are attached for it, and taken off when it has ended. A line a step goes to the
    record; a person sees one every ten seconds, with the time that is left if triggers go on coming as fast.
    """
    settings = work.settings
    # "We equally split the original training set into two parts" (appendix B): for ΔW, and for Θ and Φ.
    tokens = shuffled(work.tokens["train"], derive(settings.seed, 11))
    weight_half = work.batches(tokens[0::2], 12)
    architecture_half = work.batches(tokens[1::2], 13)
    steps = settings.search_epochs * len(weight_half)
    warmup = settings.warmup_epochs * len(weight_half)

    space = Space(work.model, settings.space, settings.ranks, settings.seed)
    search = Search(work.model, space, settings, steps, warmup, run_pass)
    print(f"search: {len(space)} modules of {', '.join(kinds_of(settings.space))}, "
          f"{space.param_counts[:, -1].sum():,} parameters at rank {settings.ranks[-1]}\n"
          f"budget {search.budget:,} ({1e4 * search.budget / work.size:.2f} of 10,000), at most {steps} "
          f"steps, triggers from step {search.first_trigger} on", flush=True)
    state = record.begin("search")
    if state is not None:
        search.load_state_dict(state)

    def after_step(search, line):
        record.stored["log"].append({**line, "time": round(record.elapsed(), 3)})
        left = steps - line["step"]
        if line["triggers"]:
            to_come = settings.triggers - line["triggers"]
            left = min(left, (line["step"] - warmup) * to_come / line["triggers"])
        text = (f"search {line['step']}/{steps}  loss {line['loss_train']:.3f}  beta {line['beta']:.2f}  "
                f"E {line['expected']:,.0f}/{search.budget:,}  kept {line['kept']}  "
                f"triggers {line['triggers']}/{settings.triggers}")
        record.after_step(line["step"], left, text, search.state_dict(), show=left == 0)

    structure = search.run(weight_half, architecture_half, settings.model, after_step)
    missing = settings.triggers - record.stored["log"][-1]["triggers"]
    if missing:
        print(f"the steps ended before trigger {settings.triggers}: the last {missing} selections were "
              "made at once; more --search-epochs or fewer --triggers would spread them")
    space.detach()
    return structure


def signs_of_guessing(log, tokens):
    """A line, in a list, if modules were chosen while ΔW only guessed, else an empty list [D12].

    log: the search's lines.   tokens: those of train. What counts is the mean training loss from the first
    trigger on or, if there was none, of the last ten steps.
    """
    fired = [line["step"] for line in log if line["reduction"] is not None]
    first = fired[0] if fired else max(1, len(log) - 9)
    losses = [line["loss_train"] for line in log[first - 1:]]
    mean = sum(losses) / max(1, len(losses))
    guessing = loss_of_guessing([target for _, target in tokens])
    if mean <= 0.95 * guessing:
        return []
    return [f"modules were chosen before they had learnt: from step {first} on the training loss is "
            f"{mean:.3f}, that of guessing {guessing:.3f}; try another --lr, --lr-warmup or --clip, or more "
            "--warmup-epochs or --search-epochs"]


def loss_of_guessing(targets):
    """What a network that doesn't read its input can come to, a token:  H(target) / mean length, in nats.

    targets: lists of tokens; in batches of different lengths it is about that.   Infinite if there are fewer
    than five to each that differs: then they are texts, not labels.
    """
    counts = Counter(map(tuple, targets))
    if len(targets) < 5 * len(counts):
        return math.inf
    entropy = sum(n / len(targets) * math.log(len(targets) / n) for n in counts.values())
    return entropy * len(targets) / sum(map(len, targets))


def run_training(work, record, peft, state, run_pass):
    """Trains a structure's fresh modules on all of train.   Returns the best validation score.

    state: of the run that was killed, or None.   After each epoch a line shows the validation score.
    """
    settings = work.settings
    batches = work.batches(work.tokens["train"], 15)

    def after_step(state, line):
        text = f"train {line['step']}/{line['steps']}  loss {line['loss']:.3f}"
        if "score" in line:
            text += (f"  epoch {line['step'] // len(batches)}/{settings.epochs}: validation "
                     f"{work.metric} {line['score']:.2f}, best {state['best'][0]:.2f}")
        record.after_step(line["step"], line["steps"] - line["step"], text, state, show="score" in line)

    return train(work.model, peft, batches, work.validate, settings.epochs, settings.lr,
                 lr_warmup=settings.lr_warmup, weight_decay=settings.weight_decay, seed=settings.seed,
                 run_pass=run_pass, state=state, after_step=after_step)


# A run that was killed comes by here again: what it had found is in the record, and what it had not is done
# now. So nothing here may depend on when it happens, but for the clocks.
def run(settings, choose_pass):
    """One seed, from data to test score.   Returns the metrics.   choose_pass: a function as that above."""
    device = choose_device(settings.device)
    record = Record(settings, device)
    given = load_structure(settings.structure) if settings.structure else None

    # The data as text, and the backbone.
    work = Work(settings, device)
    content = json.dumps([work.splits, work.tokens, given], default=dataclasses.asdict)
    record.require_same_content(digest(content.encode()), backbone_sample(work.model))
    if "test" in record.stored:
        print(f"{record.path} holds this run, finished: nothing to do (--fresh starts over)\n"
              f"{results(record.stored)}")
        return record.stored
    print(*work.lines(given), sep="\n", flush=True)

    # The search, unless a structure is there: found before the run was killed, or given.
    if "structure" in record.stored:
        structure = Structure(**record.stored["structure"])
    elif given is not None:
        structure = given
    else:
        structure = run_search(work, record, choose_pass(settings, work.model, device))
        record.stored["search_seconds"] = record.elapsed()

    # Fresh modules of that structure, trained on all of train.
    peft = apply(work.model, structure, derive(settings.seed, 14))
    record.stored["structure"] = dataclasses.asdict(structure)
    state = record.begin("train")
    save_structure(structure, record.path / "structure.json")
    signs = signs_of_guessing(record.stored["log"], work.tokens["train"])
    print(picture(structure, work.model), *signs, sep="\n", flush=True)
    validation = run_training(work, record, peft, state, choose_pass(settings, work.model, device))
    save_weights(peft, record.path / "peft.safetensors")

    # The one look at the test set.
    metrics = facts(work, record, structure)
    metrics.update(test_scores(work, peft), validation=validation)
    if settings.model == "toy":                                 # its backbone is nowhere else
        with failing(f"{record.path}/backbone can't be written", ": make room, or change --out"):
            work.model.save_pretrained(record.path / "backbone")
            work.tokenizer.save_pretrained(record.path / "backbone")
    record.finish(metrics)
    print(f"{results(metrics)}\nwritten to {record.path}", flush=True)
    return metrics


def facts(work, record, structure):
    """What metrics.json says of a run besides its scores."""
    settings = work.settings
    search_seconds = record.stored["search_seconds"]
    train_seconds = record.elapsed()
    return {"task": settings.task, "seed": settings.seed, "space": structure.space,
            "modules": len(structure.modules), "parameters": structure.parameters,
            "budget": structure.budget, "backbone_parameters": work.size,
            "per_ten_thousand": 1e4 * structure.parameters / work.size,
            "search_seconds": search_seconds, "train_seconds": train_seconds,
            "ratio": search_seconds / train_seconds, "longest_answer": work.longest,
            "backbone_in_a_folder": Path(settings.model).is_dir(), "data": record.stored["content"]["data"],
            "code": record.stored["content"]["code"],
            "digests": {name: digest((record.path / name).read_bytes())
                        for name in ("structure.json", "peft.safetensors")},
            "settings": record.stored["settings"], "versions": versions(work.device)}


def test_scores(work, peft):
    """Test scores with the modules, which it takes off, and without them; and what train's most frequent
    answer scores on validation and test.
    """
    scores = {"metric": work.metric, "test": work.score("test")}
    peft.detach()
    scores["test_untouched"] = work.score("test")
    frequent = statistics.mode(e.target.strip() for e in work.splits["train"])
    for split in ("validation", "test"):
        answers = [e.answers for e in work.splits[split]]
        scores[f"{split}_most_frequent"] = METRICS[work.metric]([frequent] * len(answers), answers)
    return scores


def versions(device):
    """What a run's numbers depend on besides its settings."""
    found = {"python": sys.version.split()[0], "device": str(device)}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    for module in (torch, transformers, np):
        found[module.__name__] = module.__version__
    return found


def clock(seconds):
    """Seconds as h:mm:ss or m:ss."""
    return re.sub("^0:0?", "", str(timedelta(seconds=round(seconds))))


def results(m):
    """The table at a run's end, from what metrics.json holds, and a line if nothing was learnt."""
    head = f"{m['task']}, seed {m['seed']}, {m['metric']} in per cent"
    table = (f"{head:<44}validation    test    parameters\n"
             f"{'  most frequent answer':<44}{m['validation_most_frequent']:10.2f}"
             f"{m['test_most_frequent']:8.2f}\n"
             f"{'  the backbone, untouched':<54}{m['test_untouched']:8.2f}{0:14,}\n"
             f"{'  with the found structure, re-trained':<44}{m['validation']:10.2f}{m['test']:8.2f}"
             f"{m['parameters']:14,}  ({m['per_ten_thousand']:.2f} of 10,000)\n"
             f"search {clock(m['search_seconds'])}, re-training {clock(m['train_seconds'])} "
             f"(ratio {m['ratio']:.2f})")
    if m["validation"] <= m["validation_most_frequent"] and m["validation"] < 100:
        table += ("\nno epoch was better on validation than always the most frequent answer: "
                  "try another --lr or --lr-warmup, or more --epochs")
    return table


def picture(structure, model):
    """A structure as text: a row a kind and place of which something is kept, a column a layer.

    Below it, for each kind, how many modules and parameters, and what share of the backbone they are.
    """
    kept = {(m["name"], m["kind"]): str(m["rank"] or "x") for m in structure.modules}
    rows = {}
    for name, kind in places_by_kind(model, kinds_of(structure.space)):
        row = f"  {kind:<11}{re.sub(r'[.][0-9]+', '', name, count=1):<40}"       # without the layer
        rows.setdefault(row, []).append(kept.get((name, kind), "."))
    lines = []
    for row in sorted(rows, key=lambda row: row.split()[0]):
        if set(rows[row]) != {"."}:
            lines.append(row + "".join(f"{cell:>3}" for cell in rows[row]))
    lines.append("  a number: the rank kept in a layer; x: kept, without a rank; .: left out")
    for kind in (*kinds_of(structure.space), "together"):
        counts = [m["parameters"] for m in structure.modules if kind in (m["kind"], "together")]
        lines.append(f"  {kind:<11}{len(counts):>5} modules {sum(counts):>10,} parameters "
                     f"{1e4 * sum(counts) / geometry(model)['parameters']:9.2f} of 10,000")
    return "\n".join(lines) + f"  (budget {structure.budget:,})"


def main(arguments=None, settings_class=Settings, choose_pass=choose_pass):
    """The program. Returns the exit code: 0, or 2 after a line on what stopped it.

    settings_class, choose_pass: another program's flags, and how it computes (docs/examples/scale.py).
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for stream in (sys.stdout, sys.stderr):             # a console may lack a text's characters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        tests = []
        for settings in parse(arguments, settings_class):
            with deterministic(), locked(settings.out):
                metrics = run(settings, choose_pass)
                tests.append(metrics["test"])
        if len(tests) > 1:
            print(f"{settings.task}: test {metrics['metric']} {np.mean(tests):.2f} ± "
                  f"{np.std(tests, ddof=1):.2f} over {len(tests)} seeds")
        return 0
    except UsageError as error:
        message = str(error)
    except torch.OutOfMemoryError:
        message = ("the GPU's memory is full: use --dtype bfloat16, or docs/examples/scale.py with "
                   "--accumulate 2 or --checkpointing")
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        message = "the memory is full: use a smaller --batch-size or --max-length, or shorter answers"
    except OSError as error:                 # a folder that can't be made, a full disk under a pipe
        what = error.filename or "the output"
        message = (f"{what} can't be written ({error.strerror or one_line(error)}): mend that or name "
                   "another --out; then the same command goes on")
    except KeyboardInterrupt:
        message = "stopped: the same command, without --fresh, goes on from the last checkpoint"
    print(f"{program_of(settings_class)}: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
