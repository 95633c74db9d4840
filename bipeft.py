"""BIPEFT in one file: search which PEFT modules to keep, where, and at which rank.

    Chang et al., "BIPEFT: Budget-Guided Iterative Search for Parameter Efficient Fine-Tuning of
    Large Pretrained Language Models", Findings of EMNLP 2024, arXiv 2410.09079.

    python bipeft.py --task toy                            a generated task, offline, on a laptop
    python bipeft.py --task rte                            google-t5/t5-large and GLUE's RTE, from the hub
    python bipeft.py --task rte --model DIR --data-dir DIR the same from local folders
    python bipeft.py --task mrpc --structure runs/rte-s2-0/structure.json      transfer (Table 4)

Given a frozen backbone, a task and a budget of B parameters, one short differentiable search decides which
of N candidate modules are kept and at which of K ranks; the structure is then trained anew. Section 1 is
Eq. (1)-(10), 2 and 3 are the search spaces, 4 is Algorithm 1; 5-8 are a program around them, of which 1-4
need nothing. "Reading n", or (n), is point n of docs/decisions.md. Ratios are per ten thousand (its %%).

    paper         in the code                     shape    meaning
    N, K          len(space), len(space.ranks)             candidate modules; candidate ranks
    Dim, R        space.dim, space.ranks[-1]      [K]      candidate ranks; the largest, that of the weights
    Theta         theta                           [N, 2]   binary architecture weights: remove, keep
    Phi           phi                             [N, K]   rank architecture weights
    Delta W       space.weights                   [P]      weights of the PEFT modules, end to end
    W_0           model                                    the pretrained backbone, frozen
    G(D)          train_gradient, val_gradient    [P]      gradients of Delta W on D_tra and on D_val
    f, alpha, s   magnitude, alignment, sensitivity  [N]   Eq. 2, 3, 1
    s-bar         smoothed                        [N]      Eq. 4
    I_t           indicators[-1]                  [N]      importance indicator, 0 or 1
    beta_t        beta                                     Eq. 5, stability; tau: its threshold; window: H
    t, T, z, Z    steps_done, steps, triggers_done, triggers   steps, and triggers, so far and at most
    p_n           probability                     [N]      that a module is kept
    q_n           space.sizes                     [N, K]   parameters of module n at each rank
    C_n           size                            [N]      Eq. 8, expected parameters of a module
    E_t, R_z      expected, reduction                      Eq. 7, expected parameters; Eq. 6, what is to go
    b             kept                            [N]      1: the module is kept
    d             fixed                           [N]      1: its rank is fixed, it has none, or it is removed
    k*            choice                          [N]      index of the fixed rank; the largest until then
    lambda        instability                     [N]      Eq. 9, low for a settled rank
    v             potential                       [N]      the rank that a module would have now
    Y_z           quota                                    Eq. 10, how many ranks to fix at this trigger
    B             budget                                   in parameters
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import string
import sys
import time
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache


class UsageError(ValueError):
    """A person's mistake. The message is one line: what is wrong, and what to do about it."""


def derive(seed, *keys):
    """A seed of its own for each use, from a run's seed: no two draws depend on each other (reading 57)."""
    return int(np.random.SeedSequence((seed, *keys)).generate_state(1)[0])


# ==================================================================================================
# 1. The equations (3.2 - 3.5), in the paper's order. Tensors in, tensors out: no model, no state
# ==================================================================================================


def sensitivity(train_magnitude, val_magnitude, alignment):
    """Eq. (1):  s_n = f_n(D_tra) + alpha_n · f_n(D_val).   All [N]; returns s, [N]."""
    return train_magnitude + alignment * val_magnitude


def magnitude(weights, gradients, segments, counts):
    """Eq. (2):  f_n(D) = 1/|M_n| · sum over w in M_n of |w · G(w, D)|

    weights, gradients: w and G of all modules end to end, [P], of one moment (reading 1); ValueError if their
    shapes differ.   segments: which of the P numbers are whose, as `segment_sum` takes it.   counts: |M_n|,
    [N], all of a module while its rank is open, then the slice, outside of which G is 0.   Returns f, [N].
    """
    if weights.shape != gradients.shape:
        raise ValueError(f"weights {tuple(weights.shape)} and gradients {tuple(gradients.shape)} differ")
    return segment_sum((weights * gradients).abs(), segments) / counts


def alignment(train_gradients, val_gradients, segments):
    """Eq. (3):  alpha_n = cos(G_n(D_tra), G_n(D_val)), over the module's whole flattened gradients

    train_gradients, val_gradients: [P].   segments: as in Eq. (2).
    Returns alpha, [N], in -1 .. 1, and 0 where either gradient is zero (reading 13).
    """
    dot = segment_sum(train_gradients * val_gradients, segments)                                       # [N]
    # Two roots, not the root of a product: squares of small gradients multiply to an underflow.
    norms = (segment_sum(train_gradients.square(), segments).sqrt()
             * segment_sum(val_gradients.square(), segments).sqrt())
    return torch.where(norms > 0, dot / norms.clamp(min=torch.finfo(norms.dtype).tiny), 0.0).clamp(-1, 1)


def segment_sum(values, segments):
    """The sums of consecutive runs of a vector, [N] of [P].   segments: the length of each run, [N]; or a
    tuple of such, the sums of one being the values of the next, since many short runs suit a GPU.
    """
    for lengths in segments if isinstance(segments, tuple) else (segments,):
        values = torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)
    return values


def smooth(previous, current, gamma):
    """Eq. (4):  s-bar_t = gamma · s-bar_{t-1} + (1 - gamma) · s_t.   All [N]; gamma in 0 .. 1."""
    return gamma * previous + (1 - gamma) * current


def importance_indicator(smoothed, size, kept, budget):
    """3.2.2:  I_t marks the most sensitive modules that fit the budget together

    Walks the kept modules in descending s-bar, adding up C_n, and stops at the first that would pass B
    (reading 2).   smoothed: s-bar, [N].   size: C_n, [N].   kept: b, [N] bool.   budget: B.   Returns I.
    """
    order = smoothed.masked_fill(~kept, -math.inf).argsort(descending=True, stable=True)   # removed: last
    fits = running_sum(size[order]) <= budget
    return torch.zeros_like(kept).scatter(0, order, fits & kept[order])


def running_sum(values):
    """The sum up to and with each value, [N] of [N]."""
    # A product with a triangle of ones: on a GPU the rounding of cumsum differs from run to run.
    return torch.ones(len(values), len(values), dtype=values.dtype, device=values.device).tril() @ values


def stability(indicators, window):
    """Eq. (5):  beta_t = 1/H · sum for j = t-H+1 .. t of cos(I_j, I_{j-1})

    The sum as printed has H + 1 terms over H, and could reach 1.2; here it has H (reading 3). Two empty
    indicators count as equal (1), an empty and a non-empty one as different (0).
    indicators: the latest I, oldest first, [at least 1, N]; the last H + 1 are read.   window: H.
    Returns beta_t, a scalar in 0 .. 1; 0 with fewer than H + 1 indicators (not stable yet).
    """
    if len(indicators) < max(1, window) + 1:
        return torch.zeros((), dtype=torch.float64, device=indicators.device)
    ones = indicators[-(window + 1):].double()
    before, now = ones[:-1], ones[1:]                                                  # [H, N] each
    norms = (before.sum(1) * now.sum(1)).sqrt()                  # |v|^2 of zeros and ones is their sum
    cosines = (before * now).sum(1) / norms.clamp(min=1)                               # [H]
    return torch.where(before.sum(1) + now.sum(1) == 0, 1.0, cosines).mean()


def expected_reduction(expected, budget, triggers, triggers_done):
    """Eq. (6):  R_z = (E_t - B) / (Z - z), in parameters

    triggers_done: z, those already done, 0 .. Z-1, so that Z - z is never 0 (reading 16); else ValueError.
    """
    if not 0 <= triggers_done < triggers:
        raise ValueError(f"z = {triggers_done} is outside 0..{triggers - 1}: no trigger is left")
    return (expected - budget) / (triggers - triggers_done)


def expected_parameters(probability, size):
    """Eq. (7):  E_t = sum_n p_n · C_n, in parameters.   probability: p, [N].   size: C in parameters, [N]."""
    return (probability * size).sum()       # Eq. (8) holds the printed inner sum over k already (reading 15)


def keep_probability(theta, kept, certain):
    """3.3.1:  p_n = b_n · softmax(Theta_n)[1], or b_n itself once `certain` (reading 4).   Returns p, [N]."""
    probability = torch.ones_like(theta[:, 1]) if certain else theta.softmax(1)[:, 1]              # [N]
    return probability * kept


def expected_size(phi, sizes, fixed, choice):
    """Eq. (8):  C_n = q_n[k*_n] where the rank is fixed, else q_n · softmax(Phi_n)

    phi: [N, K].   sizes: q_n in parameters, [N, K].   fixed: d, [N] bool.   choice: k*, [N] int.
    Returns C, [N] float64, so that sums of parameters are exact.
    """
    sizes = sizes.double()                                                             # [N, K]
    at_choice = sizes.gather(1, choice[:, None]).squeeze(1)                            # [N]
    return torch.where(fixed, at_choice, (sizes * phi.double().softmax(1)).sum(1))


def modules_to_remove(smoothed, probability, size, kept, reduction):
    """3.3.2:  the least sensitive modules whose expected parameters are R_z together

    Removes from the lowest s-bar up, of equals the earlier first, while the removed p_n · C_n add up to
    at most R_z, and stops at the first that does not fit (reading 2): it stays in the next E_t.   smoothed:
    s-bar.   probability: p.   size: C.   kept: b.   All [N].   reduction: R_z.   Returns [N] bool.
    """
    order = smoothed.masked_fill(~kept, math.inf).argsort(stable=True)                 # removed ones last
    fits = running_sum((probability * size)[order]) <= reduction
    return torch.zeros_like(kept).scatter(0, order, fits & kept[order])


def rank_instability(first, last, total, squares, count):
    """Eq. (9):  lambda_n = 1/K · sum_k sigma_{n,k} · KL(Phi_j,n ‖ Phi_t,n)

    first, last: softmax(Phi) at the last trigger's step j and now, at t, [N, K] float64.   total, squares:
    sums over the `count` steps j .. t of (softmax(Phi) - first) and of its square, [N, K], which give sigma,
    the population deviation, without holding the steps (reading 5).   Returns lambda, [N]; low is stable.
    """
    sigma = (squares / count - (total / count).square()).clamp(min=0).sqrt()           # [N, K]
    divergence = torch.where(first > 0, first * (first.log() - last.log()), 0.0).sum(1)    # 0 · log 0 is 0
    return sigma.mean(1) * divergence


def potential_ranks(phi, dim, kept, fixed, choice, ranked):
    """3.4.2:  v_n = Dim[argmax Phi_n], Dim[k*_n] if fixed, 0 if removed

    phi: [N, K].   dim: Dim, rank values, not indices, [K].   kept, fixed: b, d, [N] bool.   choice: k*, [N].
    ranked: [N] bool, False for kinds without a rank, which count as 0 (reading 5).   Returns [N] float64.
    """
    index = torch.where(fixed, choice, phi.argmax(1))                                  # [N]
    return dim.double()[index] * (kept & ranked)


def rank_quota(potential_before, potential_now, fixed, remaining):
    """Eq. (10):  Y_z = floor( sum(1 - d_{z-1}) · cos(v_{z-1}, v_z) / (Z - z) )

    potential_before, potential_now: v at the last trigger and now, [N].   fixed: d_{z-1} with this trigger's
    removals, [N] bool (reading 5).   remaining: Z - z >= 1.   Returns Y_z, an integer scalar.
    """
    still_open = (~fixed).sum()                 # sum(1 - d); at the last trigger every one is due (reading 5)
    if remaining == 1:
        return still_open
    norms = (potential_before.square().sum() * potential_now.square().sum()).sqrt()
    cosine = (potential_before * potential_now).sum() / norms.clamp(min=1)
    return (still_open * cosine / remaining).floor().long()


def ranks_to_fix(instability, fixed, quota):
    """3.4.2:  the open modules with the Y_z lowest lambda, whose ranks get fixed

    instability: lambda, [N].   fixed: d, [N] bool.   quota: Y_z.   Returns [N] bool.
    """
    order = instability.masked_fill(fixed, math.inf).argsort(stable=True)              # open ones first
    first = torch.arange(len(order), device=order.device) < quota                      # [N], the Y_z of them
    return torch.zeros_like(fixed).scatter(0, order, first) & ~fixed


def gumbel_noise(shape, generator):
    """-log(-log(u)), u uniform in (0, 1).   Returns a float32 tensor of `shape` on the CPU."""
    u = torch.rand(shape, generator=generator).clamp(min=torch.finfo(torch.float32).tiny)
    return -torch.log(-torch.log(u))


def gumbel_softmax(logits, noise, temperature, hard=True):
    """3.5, after Jang et al. 2017:  softmax((logits + noise) / temperature) along the last axis

    logits, noise: [..., C].   hard: the value is the one-hot arg-max, the gradient still the softmax's.
    """
    soft = ((logits + noise) / temperature).softmax(-1)
    if not hard:
        return soft
    one_hot = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return one_hot + (soft - soft.detach())      # the bracket is exactly 0, so that shut is exactly 0


def fill_budget(smoothed, sizes, kept, choice, budget):
    """Reading 6, once after the last trigger:  the budget is a promise, and is used up

    Drops the least sensitive kept module while the total is above B; then offers what is free to the modules
    left out, in descending s-bar, each at the largest candidate rank that fits.   smoothed: s-bar, N numbers.
    sizes: q, N lists of K.   kept: b, N bools.   choice: k*, N indices.   Returns (kept, choice), new lists.
    """
    kept, choice = list(kept), list(choice)
    by_sensitivity = sorted(range(len(kept)), key=lambda n: (-smoothed[n], n))
    free = budget - sum(sizes[n][choice[n]] for n in range(len(kept)) if kept[n])
    for n in reversed(by_sensitivity):
        if free < 0 and kept[n]:
            kept[n] = False
            free += sizes[n][choice[n]]
    for n in by_sensitivity:
        fitting = [k for k, parameters in enumerate(sizes[n]) if parameters <= free]
        if not kept[n] and fitting:
            kept[n], choice[n] = True, fitting[-1]
            free -= sizes[n][fitting[-1]]
    return kept, choice


# ==================================================================================================
# 2. The searchable modules (4.1), written as in their own papers, without gate and ranks: those act on
#    their weights from outside (section 3, Space). "Parameters" is a module's q_n at rank r.
# ==================================================================================================


class Searchable(nn.Module):
    """A PEFT module at one place of the backbone.

    `factors` says what multiplies the rows of a tensor in a search: the module's "gate", one number; its rank
    "mask", [R], a number a row; or "gate·mask". The gate multiplies what comes last: so a shut gate adds zero
    and has a gradient, what the module would add, by which it can open again. Were an inner factor gated,
    too, that would be 0 · 0, and shut would stay shut (10).   place: the module of the backbone it is for.
    rank: r, what it is built with.   generator: the source of its random initial weights.
    """

    roles = ()            # the roles of the places that take this module, as `places_of` names them
    ranked = True         # False: there is nothing to choose a rank of, and q_n is the same for all k
    factors = {}          # tensor's name: "gate", "mask" or "gate·mask"; the others stay as they are
    active = True         # False skips it: what a shut gate adds is zero, so why compute it
    seen = None           # the input of another module than the place, where that is meant

    def tensor(self, *shape, init=None, generator=None):
        """A float32 parameter: zeros, Kaiming-uniform (init='kaiming') or N(0, init^2)."""
        value = torch.zeros(*shape)
        if init == "kaiming":
            nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
        elif init is not None:
            value.normal_(0, init, generator=generator)
        return nn.Parameter(value)

    def attach(self, place, source=None):
        """Hooks it to its place; returns handles to undo that.   source: whose input is x, if another's."""
        def before(source, args, kwargs):
            self.seen = input_of(args, kwargs) if self.active else None
        handles = [] if source is None else [source.register_forward_pre_hook(before, with_kwargs=True)]
        return handles + [place.register_forward_hook(self._after, with_kwargs=True)]

    def _after(self, place, args, kwargs, output):
        if not self.active:
            return None                                         # leaves the output as it is
        first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        changed = self(input_of(args, kwargs) if self.seen is None else self.seen, first)
        self.seen = None
        return changed if rest is None else (changed, *rest)


class LoRA(Searchable):
    """Hu et al. 2022:  y + B A x, on a linear layer.   Parameters: r · (in + out).

    No extra scaling (alpha/r = 1, reading 11). A is random, B zero: at first it is the zero function. Gate
    and ranks scale B's rows: row i is what component i writes into y.
    """

    roles = ("linear",)
    factors = {"B": "gate·mask"}

    def __init__(self, place, rank, generator=None):
        super().__init__()
        self.A = self.tensor(rank, place.in_features, init="kaiming", generator=generator)   # R^(r×in)
        self.B = self.tensor(rank, place.out_features)       # R^(r×out), the paper's B^T: a row a component

    def forward(self, x, y):
        """x: [..., in], the layer's input.   y: [..., out], its output.   Returns the new y."""
        return y + F.linear(x, self.A.to(x.dtype)) @ self.B.to(x.dtype)


class LowRankAdapter(Searchable):
    """Adapter-LR of S3Delta (Hu et al. 2022b):  y + U gelu(D y + b) + c, D = D2 D1 and U = U2 U1.

    d -> m -> d with m = d/32, after a self-attention or feed-forward block; each map is a product of
    factors of rank r.   Parameters: r · (d + m) + m + r · (m + d) + d.   U2, b and c start at zero, D1, D2
    and U1 do not: it starts as the zero function, and every factor can learn (reading 28). The mask takes
    components from D by D1's rows and from U by U2's; the gate acts once, at the end, on U2 and c.
    """

    roles = ("attention", "ffn")
    factors = {"down_in": "mask", "up_out": "gate·mask", "up_bias": "gate"}

    def __init__(self, place, rank, generator=None):
        super().__init__()
        d = width(place)
        m = max(1, d // 32)
        self.down_in = self.tensor(rank, d, init="kaiming", generator=generator)      # D1 in R^(r×d)
        self.down_out = self.tensor(m, rank, init="kaiming", generator=generator)     # D2 in R^(m×r)
        self.down_bias = self.tensor(m)                                               # b  in R^m
        self.up_in = self.tensor(rank, m, init="kaiming", generator=generator)        # U1 in R^(r×m)
        self.up_out = self.tensor(rank, d)                                            # U2^T in R^(r×d)
        self.up_bias = self.tensor(d)                                                 # c  in R^d

    def forward(self, x, y):
        """y: [..., d], the block's output, which is also the adapter's input.   Returns the new y."""
        dtype = y.dtype
        h = F.linear(y, self.down_in.to(dtype))                                       # [..., r]
        h = F.gelu(F.linear(h, self.down_out.to(dtype), self.down_bias.to(dtype)))    # [..., m]
        h = F.linear(h, self.up_in.to(dtype))                                         # [..., r]
        return y + F.linear(h, self.up_out.to(dtype).T, self.up_bias.to(dtype))       # [..., d]


class SerialAdapter(Searchable):
    """Houlsby et al. 2019:  y + U gelu(D y + b) + c, on a feed-forward block's output y.

    The rank r is the bottleneck: d -> r -> d.   Parameters: r · d + r + r · d + d. D is random; U, b and c
    start at zero (reading 27). Gate and ranks scale U's rows, the gate c as well.
    """

    roles = ("ffn",)
    factors = {"up": "gate·mask", "up_bias": "gate"}
    parallel = False

    def __init__(self, place, rank, generator=None):
        super().__init__()
        d = width(place)
        self.down = self.tensor(rank, d, init="kaiming", generator=generator)         # D in R^(r×d)
        self.down_bias = self.tensor(rank)                                            # b in R^r
        self.up = self.tensor(rank, d)                                                # U^T in R^(r×d)
        self.up_bias = self.tensor(d)                                                 # c in R^d

    def forward(self, x, y):
        """x, y: [..., d], the block's input and output.   Returns the new y."""
        h = x if self.parallel else y
        dtype = h.dtype
        h = F.gelu(F.linear(h, self.down.to(dtype), self.down_bias.to(dtype)))        # [..., r]
        return y + F.linear(h, self.up.to(dtype).T, self.up_bias.to(dtype)).to(y.dtype)


class ParallelAdapter(SerialAdapter):
    """He et al. 2022:  y + U gelu(D x + b) + c, beside a feed-forward block with input x; else the serial."""

    parallel = True


class BitFit(Searchable):
    """Ben Zaken et al. 2022:  y + b, a bias on a linear layer or a layer norm.   Parameters: d_out.

    It stands beside the backbone's own, if there is one, starts at zero, and the gate scales it (reading 31).
    """

    roles = ("linear", "norm")
    ranked = False
    factors = {"bias": "gate"}

    def __init__(self, place, rank, generator=None):
        super().__init__()
        self.bias = self.tensor(place.weight.shape[0])                                # b in R^out

    def forward(self, x, y):
        """y: [..., out], the place's output.   Returns the new y."""
        return y + self.bias.to(y.dtype)


class LNFit(Searchable):
    """A trainable delta on a layer norm's weight w.   Parameters: d.

    (w + delta) · x/rms(x) = y + delta · x/rms(x), so that w, in Gemma 1 + w, stays untouched; an nn.LayerNorm
    has its own for x/rms(x). delta starts at zero; the gate scales it (reading 31).
    """

    roles = ("norm",)
    ranked = False
    factors = {"delta": "gate"}

    def __init__(self, place, rank, generator=None):
        super().__init__()
        self.delta = self.tensor(place.weight.numel())                                # in R^d
        self.normalise = F.layer_norm if isinstance(place, nn.LayerNorm) else F.rms_norm
        self.epsilon = place.eps if hasattr(place, "eps") else place.variance_epsilon

    def forward(self, x, y):
        """x, y: [..., d], the norm's input and output.   Returns the new y."""
        return y + self.normalise(x, self.delta.shape, self.delta.to(x.dtype), eps=self.epsilon).to(y.dtype)


class Prefix(Searchable):
    """Li & Liang 2021:  r key/value pairs of its own before those of a self-attention.

    Parameters: 2 · r · heads · d_kv, without the paper's reparameterisation (reading 29); no zero function
    at first. Scaling a key or a value would leave the pair in the softmax's denominator: so no factor scales
    its tensors, and gate·mask goes into `prefix_attention`, as `openness`, [R]; None: every pair counts.
    """

    roles = ("prefix",)
    openness = None

    def __init__(self, place, rank, generator=None):
        super().__init__()
        config = place.config
        self.heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        inner = self.heads * self.width                                                 # h · d_kv
        self.keys = self.tensor(rank, inner, init=0.02, generator=generator)            # R^(r×h·d_kv)
        self.values = self.tensor(rank, inner, init=0.02, generator=generator)          # R^(r×h·d_kv)

    def forward(self, dtype):
        """Returns keys and values, [heads, r, d_kv] each, and the weight of each pair, [r]."""
        keys, values = (pairs.to(dtype).unflatten(1, (self.heads, self.width)).transpose(0, 1)
                        for pairs in (self.keys, self.values))
        return keys, values, keys.new_ones(keys.shape[1]) if self.openness is None else self.openness

    def attach(self, place, source=None):
        """The pairs travel to `prefix_attention` as a keyword that the backbone's attention hands on."""
        def before(place, args, kwargs):
            if self.active:
                return args, {**kwargs, "prefix": self(input_of(args, kwargs).dtype)}
        return [place.register_forward_pre_hook(before, with_kwargs=True)]


def prefix_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=1.0,
                     position_bias=None, prefix=None, **kwargs):
    """Attention over a prefix i and a sequence j:  (sum_i g_i e^{q·k_i} v_i + sum_j e^{q·k_j} v_j) / (no v)

    g is gate·mask. So a shut pair (g = 0) weighs exactly zero and has a finite gradient to its gate. To add
    log g to the scores is the same for g > 0, and not at 0 (reading 30).   query: [batch, heads, q,
    d_kv].   key, value: [batch, heads, s, d_kv].   attention_mask, position_bias: added to the scores.
    prefix: of `Prefix.forward`, or None: plain attention.   Returns ([batch, q, heads, d_kv], None).
    """
    if prefix is None:
        plain = transformers.AttentionInterface()["sdpa"]
        return plain(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                     position_bias=position_bias, **kwargs)
    keys, values, openness = prefix
    groups = query.shape[1] // key.shape[1]                   # query heads to a key/value head: 1 in T5
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value)) if groups > 1 else (key, value)
    keys, values = (t.repeat_interleave(groups, 0) for t in (keys, values)) if groups > 1 else (keys, values)
    scores = torch.matmul(query, key.transpose(2, 3)).float() * scaling               # [b, h, q, s]
    for bias in (position_bias, attention_mask):
        scores = scores if bias is None else scores + bias
    own = torch.matmul(query, keys.transpose(1, 2)).float() * scaling                 # [b, h, q, r]
    top = torch.cat([scores, own.masked_fill(openness == 0, -math.inf)], -1).amax(-1, keepdim=True).detach()
    # A shut pair, not in `top`, may lie above it; its exponential, its gate's gradient, is clamped.
    raised = torch.cat([openness * (own - top).clamp(max=30).exp(), (scores - top).exp()], -1)
    share = (raised / raised.sum(-1, keepdim=True)).to(value.dtype)
    share = F.dropout(share, dropout, module.training)
    values = torch.cat([values.expand(len(value), -1, -1, -1), value], 2)             # [b, h, r+s, d_kv]
    return torch.matmul(share, values).transpose(1, 2).contiguous(), None


def additive_mask(*args, dtype=torch.float32, **more):
    """The mask that `prefix_attention` adds to the scores; transformers' own reads the host."""
    mask = transformers.masking_utils.sdpa_mask(*args, **{**more, "allow_is_causal_skip": False})
    return None if mask is None else (~mask).to(dtype) * torch.finfo(dtype).min


def width(place):
    """d_model, what the last linear layer of a self-attention or feed-forward block gives."""
    return [m for m in place.modules() if isinstance(m, nn.Linear)][-1].out_features


def input_of(args, kwargs):
    """What a backbone gives a module as its input, by position or by name."""
    return args[0] if args else kwargs["hidden_states"]


KINDS = {"lora": LoRA, "adapter_lr": LowRankAdapter, "bitfit": BitFit, "lnfit": LNFit,    # new: an entry
         "serial": SerialAdapter, "parallel": ParallelAdapter, "prefix": Prefix}
SPACES = {"s1": ("serial", "parallel", "prefix"),                 # AutoPEFT's (Zhou et al. 2024)
          "s2": ("lora", "adapter_lr", "bitfit", "lnfit"),        # S3Delta's (Hu et al. 2022b)
          "all": tuple(KINDS)}


# ==================================================================================================
# 3. The search spaces: where each module attaches (4.1, S1 and S2), all of them at once, a structure
# ==================================================================================================


def places_in(model, layer, outside, rows):
    """The places in each module whose path matches `layer`, in the order of rows, "path role" or "path role
    path-of-input" each, as far as the module has them; and the norms whose path matches `outside`.
    """
    for at, m in model.named_modules():
        if re.search(outside, at):
            yield at, "norm", m
        for path, role, *source in map(str.split, rows.split(",") if re.search(layer, at) else ()):
            stem, names = re.fullmatch(r"(.*\.)?(.*)", path).groups("")              # "block.a/b": two places
            for path in (stem + name for name in names.split("/")):
                with contextlib.suppress(AttributeError):
                    yield f"{at}.{path}", role, *(m.get_submodule(p) for p in (path, *source))


def t5_places(model):
    """T5's, as in S3Delta (25, 26): no cross-attention projection, but its layer norm. T5-large has 122
    norms, 48 self-attentions, 48 feed-forward blocks and 288 linear layers: N = 916 in S2, 144 in S1.
    """
    return places_in(model, r"\.layer\.\d+$", "final_layer_norm$", """
        layer_norm norm, SelfAttention attention, SelfAttention prefix, SelfAttention.q/k/v/o linear,
        DenseReluDense ffn, DenseReluDense.wi/wi_0/wi_1/wo linear""")


def bert_places(model):
    """BERT's: a block's output is that of its last linear layer, its feed-forward begins a module before."""
    return places_in(model, r"\.layer\.\d+$", "^embeddings.LayerNorm$", """
        attention.self prefix, attention.self.query/key/value linear, attention.output.dense linear,
        attention.output.dense attention, attention.output.LayerNorm norm, intermediate.dense linear,
        output.dense linear, output.dense ffn intermediate, output.LayerNorm norm""")


def llama_places(model):
    """Llama's, and those of its many relatives, some of whom have further norms."""
    return places_in(model, r"layers\.\d+$", "^norm$", """
        input_layernorm norm, self_attn attention, self_attn prefix, self_attn.q_proj/k_proj/v_proj linear,
        self_attn.o_proj linear, self_attn.q_norm/k_norm norm, post_attention_layernorm norm,
        pre_feedforward_layernorm norm, mlp ffn, mlp.gate_proj/up_proj/down_proj linear,
        post_feedforward_layernorm norm""")


FAMILIES = {t5_places: "t5 mt5", bert_places: "bert roberta electra xlm-roberta camembert ernie",
            llama_places: "llama mistral qwen2 qwen3 gemma gemma3_text olmo2 smollm3 granite"}
PLACES = {model_type: function for function, names in FAMILIES.items() for model_type in names.split()}


def backbone_of(model):
    """The pretrained model of a known family in a model.   Raises UsageError if it holds none, or two."""
    known = [m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)
             and m.config.model_type in PLACES]
    if not known or not set(known) <= set(known[0].modules()):
        raise UsageError(f"{type(model).__name__} holds {'two' if known else 'no'} known backbones: give one "
                         f"of {', '.join(PLACES)}, or its own function of places (docs/copying.md)")
    return known[0]


def places_of(model):
    """Every place of a known backbone in the order of computation: (name in the base model, role, module),
    and a fourth, the module whose input is meant, if another.   role: "linear", "norm", "attention" or "ffn",
    a block, or "prefix", an attention that hands keywords on to transformers' attention functions.
    """
    backbone = backbone_of(model)
    return PLACES[backbone.config.model_type](backbone.base_model)


def geometry(model, also_train=()):
    """What a structure depends on: the backbone's type and its number of parameters, without also_train's."""
    own = {id(p) for p in named_within(model, also_train).values()}
    with contextlib.suppress(UsageError):
        model = backbone_of(model)                              # else a person's own architecture
    return {"model_type": getattr(getattr(model, "config", None), "model_type", type(model).__name__),
            "parameters": sum(p.numel() for p in model.parameters() if id(p) not in own)}


def named_within(model, paths):
    """{name: parameter} at or below some paths of a model, such as "classifier".   UsageError for none."""
    found = {}
    for path in paths:
        inside = {name: p for name, p in model.named_parameters() if f"{name}.".startswith(f"{path}.")}
        if not inside:
            raise UsageError(f"the model has no parameters '{path}' to be trained beside the modules")
        found |= inside
    return found


def kinds_of(space, ranks=(1,)):
    """The kinds in "s1", "s2", "all" or a comma list such as "lora,prefix".   Raises UsageError for an
    unknown one, and for ranks that do not ascend within 1 .. 4096.
    """
    kinds = SPACES.get(space) or tuple(dict.fromkeys(kind.strip() for kind in space.split(",")))
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"unknown space or kind of module '{kind}': choose {', '.join(SPACES)}, "
                             f"or a comma list of {', '.join(KINDS)}")
    if not ranks or ranks[0] < 1 or ranks[-1] > 4096 or any(a >= b for a, b in zip(ranks, ranks[1:])):
        raise UsageError(f"ranks {tuple(ranks)} must be whole numbers from 1 to 4096, in ascending order")
    return kinds


class Peft(nn.Module):
    """PEFT modules attached to a frozen backbone by hooks: all its tensors but also_train's stay.

    model: of a known family, or any with `places`, a function as `places_of`.   chosen: the modules, (place
    name, kind, rank) each.   seed: decides their initial weights.   also_train: paths of the network's own
    parameters that learn beside the modules, outside of gates, budget and N, such as a fresh "classifier";
    `detach` puts them back.   Raises UsageError for a place, kind or path that does not exist.

    All weights, Delta W, lie end to end in one float32 vector, `weights`, [P], also_train's behind, as in
    every [P] here: a step is one operation. The tensors are views of it; or, in a search and in training, of
    `working`, `refresh`'s copy in the backbone's dtype, times an architecture's factors if there is one.
    """

    def __init__(self, model, chosen, seed=0, places=None, also_train=()):
        super().__init__()
        found = {(name, kind): where for name, role, *where in (places or places_of)(model)
                 for kind in KINDS if role in KINDS[kind].roles}
        self.names, self.kinds = [f"{name}.{kind}" for name, kind, _ in chosen], [c[1] for c in chosen]
        for (name, kind, _), full in zip(chosen, self.names):
            if (name, kind) not in found:
                raise UsageError(f"the model has no place '{name}' for a module of kind '{kind}'")
            if self.names.count(full) > 1:
                raise UsageError(f"two modules of kind '{kind}' are asked for at {name}")
        generator = torch.Generator().manual_seed(derive(seed, 1))
        self.modules_ = nn.ModuleList(KINDS[kind](found[name, kind][0], rank, generator)
                                      for name, kind, rank in chosen)
        example = next(model.parameters())
        self.dtype = example.dtype                                  # that the modules compute in
        self.modules_.to(example.device)
        self.own = named_within(model, also_train)                  # {name: parameter}
        self._before = [(p, p.data, p.requires_grad) for p in model.parameters()]
        for p in model.parameters():
            p.requires_grad_(False)
        self.lay_end_to_end()
        self._attention = []
        if "prefix" in self.kinds:              # transformers' public registry is where a prefix comes in
            transformers.AttentionInterface.register("bipeft_prefix", prefix_attention)
            transformers.AttentionMaskInterface.register("bipeft_prefix", additive_mask)
            first = found[chosen[self.kinds.index("prefix")][0], "prefix"][0]
            around = [m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)
                      and first in m.modules()][0]
            self._attention = [(m, m.config._attn_implementation) for m in around.modules()
                               if isinstance(m, transformers.PreTrainedModel)]
            for m, _ in self._attention:        # each by itself: not every release hands it on to T5's stacks
                m.set_attn_implementation("bipeft_prefix")
        self.handles = [handle for m, (name, kind, _) in zip(self.modules_, chosen)
                        for handle in m.attach(*found[name, kind])]

    def __len__(self):
        return len(self.names)

    def lay_end_to_end(self):
        """Makes `weights` of the modules' tensors, and these views of it."""
        named = [(f"{n}.{k}", p) for n, m in zip(self.names, self.modules_) for k, p in m.named_parameters()]
        self.size = sum(p.numel() for _, p in named)                                             # P
        named += [(name, p.requires_grad_()) for name, p in self.own.items()]
        self.tensor_names, self.tensors = [name for name, _ in named], [p for _, p in named]
        self.numels = [p.numel() for p in self.tensors]
        self.weights = torch.cat([p.detach().flatten().to(named[0][1].dtype) for p in self.tensors])
        self.working = torch.empty_like(self.weights, dtype=self.dtype)
        self.use(self.weights)

    def use(self, flat):
        """Has the modules compute with the numbers of another vector.   flat: [P], of any dtype."""
        self.in_use = flat
        first_own = len(self.tensors) - len(self.own)                  # from there on in the network's format
        for i, (p, part) in enumerate(zip(self.tensors, flat.split(self.numels))):
            p.data = (part if i < first_own else part.to(self.dtype)).view(p.shape)

    def refresh(self, factors=None):
        """Has the modules compute with weights · factors, [P], in the backbone's dtype. `use` ends it."""
        if self.in_use is not self.working:
            self.use(self.working)
        self.working.copy_(self.weights if factors is None else self.weights * factors)

    def detach(self):
        """Takes everything off: the backbone computes bit for bit what it did before."""
        for handle in self.handles:
            handle.remove()
        for p, data, learns in self._before:
            p.data = data
            p.requires_grad_(learns)
        for backbone, implementation in self._attention:
            backbone.set_attn_implementation(implementation)
        self._before, self._attention = [], []                          # a second call changes nothing

    def named_weights(self):
        """{module's name.tensor's name: tensor}, parts of `weights`."""
        parts = self.weights.split(self.numels)
        return {name: part.view(p.shape) for name, p, part in zip(self.tensor_names, self.tensors, parts)}


class Space(Peft):
    """All candidate modules of a search space, attached at the largest rank, under an architecture.

    space: "s1", "s2", "all" or a comma list of kinds.   ranks: Dim, ascending.   The others: as for `Peft`.
    `sizes`, q, [N, K], counts real tensors: of the module as built at each rank (reading 24).

    Weight entanglement (3.5, after AutoFormer): a module holds its weights once, at the largest rank R;
    a smaller rank is their leading slice. So an architecture is not N modules built anew in each step:
    it multiplies every row of every tensor by one number, of which there are four sorts. With R = 8,
    the gate open (g = 1) and rank 4 chosen (mask = 1 1 1 1 0 0 0 0):

        row of Delta W                 its factor      here
        LoRA        A, whole           1               1
                    B, row 1           g · mask_1      1
                    B, row 5           g · mask_5      0     component 5 adds nothing, whatever A does
        Adapter-LR  down_in, row 5     mask_5          0     it must not reach the gelu, either
                    up_out, row 5      g · mask_5      0
                    up_bias, whole     g               1     a bias has no rank; a shut gate drops it

    Factors multiply weights rather than activations: once a pass instead of once a token, all N modules
    in one product of two vectors, and the modules stay as their papers write them. The network computes
    with u = w · factor. With du, its gradient for u, the chain rule gives the gradient for w as factor ·
    du, and for a row's factor as the sum of w · du over the row; autograd takes it on to gate and ranks
    (`gradients`). So a shut module, whose last factor is 0, has none for w (9) but one for its gate. A prefix
    alone has no factors: its g · mask goes into the attention, and back from there.
    """

    removed = None                  # [N] bool: what a search has removed is not computed again
    skips_shut = True               # False: computes every module in every pass, whatever its gate

    def __init__(self, model, space="s2", ranks=(1, 4, 8), seed=0, places=None, also_train=()):
        ranks, kinds = tuple(ranks), kinds_of(space, ranks)                 # Dim; what the space holds
        spots = [(name, kind, place) for name, role, place, *_ in (places or places_of)(model)
                 for kind in kinds if role in KINDS[kind].roles]
        if not spots:
            raise UsageError(f"the model has no place for a module of kind {' or '.join(kinds)}")
        super().__init__(model, [(name, kind, ranks[-1]) for name, kind, _ in spots], seed, places,
                         also_train)
        self.space, self.ranks, self.geometry = space, ranks, geometry(model, also_train)
        device = self.weights.device                                        # the backbone's
        self.dim = torch.tensor(ranks, device=device)                                            # [K]
        self.leading = (torch.arange(ranks[-1], device=device) < self.dim[:, None]).float()      # [K, R]
        self.ranked = torch.tensor([KINDS[kind].ranked for kind in self.kinds], device=device)   # [N]
        with torch.device("meta"):                                 # tensors of a shape, without numbers
            sizes = [[sum(p.numel() for p in KINDS[kind](place, rank).parameters()) for rank in ranks]
                     for _, kind, place in spots]
        self.sizes = torch.tensor(sizes, device=device)                                          # [N, K]
        self.cut_into_rows()

    def cut_into_rows(self, longest=512):
        """Gives each row the index of its factor among 1, gate, [N], mask, [N·R], and gate·mask, [N·R]."""
        N, R, rows, self.carries_rank = len(self), self.ranks[-1], [], []
        for n, module in enumerate(self.modules_):
            first = {None: 0, "gate": 1 + n, "mask": 1 + N + n * R, "gate·mask": 1 + N + N * R + n * R}
            for key, p in module.named_parameters():
                factor = module.factors.get(key)
                self.carries_rank.append(factor in ("mask", "gate·mask"))
                count = R if self.carries_rank[-1] else 1
                # A row of more than `longest` numbers counts as several, for `segment_sum`'s speed alone.
                rows += [(n, first[factor] + i, min(longest, p.numel() // count - at))
                         for i in range(count) for at in range(0, p.numel() // count, longest)]
        inside = len(rows)                                                  # what follows has factor 1
        rows += [(N, 0, p.numel()) for p in self.own.values()]
        self.carries_rank += [False] * len(self.own)
        module_of, factor_of, lengths = torch.tensor(rows).T.contiguous()
        device, index = self.weights.device, torch.arange(len(rows), dtype=torch.int32)
        self.row_of = index.repeat_interleave(lengths).to(device)                                # [P]
        self.factor_of, self.lengths = factor_of.to(device), lengths.to(device)                  # [rows] each
        self.segments = self.lengths[:inside], module_of[:inside].bincount(minlength=N).to(device)

    def enter(self, gate, ranks, for_gates=False):
        """Puts an architecture into the modules, for the pass that follows.   for_gates: into shut ones, too.

        gate: [N], 0 or 1.   ranks: [N, K], rows summing to 1.   For `gradients` both require gradients.
        """
        mask = ranks @ self.leading                                            # [N, R]
        both = gate[:, None] * mask                                            # [N, R]
        factors = torch.cat([gate.new_ones(1), gate, mask.flatten(), both.flatten()])[self.factor_of]
        per_weight = factors.detach().index_select(0, self.row_of)             # [P]
        self.refresh(per_weight)
        of_pairs = both.detach().requires_grad_()                              # [N, R], a leaf for prefixes
        for m, openness in zip(self.modules_, of_pairs if "prefix" in self.kinds else ()):
            vars(m)["openness"] = openness                                     # setattr of a Module is slow
        if self.skips_shut:
            idle = self.removed if for_gates else gate == 0
            for m, off in zip(self.modules_, [False] * len(self) if idle is None else idle.tolist()):
                vars(m)["active"] = not off
        self.architecture = gate, ranks, factors, both, per_weight, of_pairs

    def gradients(self, loss, wanted):
        """The gradients of a loss that was computed under the present architecture.

        wanted: some of "gate", [N], "ranks", [N, K], "weights", [P]. None is accumulated anywhere: nothing
        leaks into the next pass (reading 1).
        """
        gate, ranks, factors, both, per_weight, of_pairs = self.architecture
        asked = [carries or wanted != ("ranks",) for carries in self.carries_rank]     # ranks need few
        leaves = [p for p, on in zip(self.tensors, asked) if on] + [of_pairs]
        # The addition of 0: where every module is shut, the loss would depend on nothing.
        found = iter(torch.autograd.grad(loss + 0 * of_pairs.sum(), leaves, materialize_grads=True))
        zero = torch.zeros((), dtype=self.dtype, device=loss.device)
        du = torch.cat([next(found).flatten() if on else zero.expand(count)
                        for on, count in zip(asked, self.numels)]).to(self.weights.dtype)        # [P]
        of_factors = segment_sum(du * self.weights, self.lengths)                                # [rows]
        through = torch.autograd.grad((factors, both), (gate, ranks), (of_factors, next(found)))
        results = {"weights": du * per_weight, "gate": through[0], "ranks": through[1]}
        return [results[name] for name in wanted]

    def leave(self):
        """Ends the last architecture: every attached module is whole, at the largest rank."""
        self.use(self.weights)
        self.architecture = None
        for m in self.modules_:
            m.openness, m.active = None, True

    def structure(self, kept, choice, budget, backbone=""):
        """The Structure of the kept modules.   kept: b, N bools.   choice: k*, N indices."""
        modules = [{"name": name.rpartition(".")[0], "kind": kind,
                    "rank": self.ranks[k] if KINDS[kind].ranked else None, "parameters": sizes[k]}
                   for name, kind, b, k, sizes in zip(self.names, self.kinds, kept, choice,
                                                      self.sizes.tolist()) if b]
        return Structure(backbone, self.geometry, self.space, list(self.ranks), budget, modules,
                         sum(p.numel() for p in self.own.values()))


@dataclass
class Structure:
    """What a search found, b and k* of Algorithm 1's A: enough to rebuild it without the search."""

    backbone: str            # the model's name, for people
    geometry: dict           # the sizes that must match
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
    """A structure's modules, with fresh weights, on a model (12): a Peft, whose arguments the others are.
    Raises UsageError if the model is of other sizes, or a count is not that of the built tensors.
    """
    for key, value in geometry(model, also_train).items():
        if structure.geometry.get(key) != value:
            raise UsageError(f"the structure is of another backbone: its {key} is "
                             f"{structure.geometry.get(key)}, this model's is {value}")
    peft = Peft(model, [(m["name"], m["kind"], m["rank"] or 1) for m in structure.modules], seed, places,
                also_train)
    for m, module in zip(structure.modules, peft.modules_):
        if m["parameters"] != (built := sum(p.numel() for p in module.parameters())):
            peft.detach()
            raise UsageError(f"the structure says {m['parameters']} parameters for {m['name']}.{m['kind']}, "
                             f"whose tensors hold {built}")
    return peft


# ==================================================================================================
# 4. Algorithm 1, whose lines stand in quotation marks
# ==================================================================================================


class Search:
    """The state of Algorithm 1, and what it does in a step, at a trigger, and in all.

    model: its forward takes a batch's entries as keywords and returns a loss.   space: attached to it.
    budget: B, parameters.   steps: T.   warmup: steps before the first trigger may come (reading 7).
    triggers, tau, gamma, window: Z, tau, gamma, H.   lr: of Delta W, falling linearly to 0 over T.   arch_lr:
    of Theta and Phi.   weight_decay: of all three.   seed: decides every draw.   dropout_seed: those of
    dropout, where they are to differ.   run_pass: how to get a loss and its gradients, if not by the function
    of this name on model and space.   Raises UsageError for a budget that leaves nothing to search.
    """

    STATE = ("kept", "fixed", "choice", "smoothed", "indicators", "history", "since", "potential",
             "triggers_done", "steps_done")

    def __init__(self, model, space, budget, steps, warmup=0, triggers=100, tau=0.85, gamma=0.85, window=5,
                 lr=3e-4, arch_lr=0.01, weight_decay=1e-4, seed=0, dropout_seed=None, run_pass=None):
        self.model, self.space, self.budget, self.steps = model, space, int(budget), steps
        self.warmup, self.triggers, self.tau, self.gamma, self.window = warmup, triggers, tau, gamma, window
        self.lr, self.seed, self.dropout_seed = lr, seed, seed if dropout_seed is None else dropout_seed
        self.run_pass = run_pass or functools.partial(globals()["run_pass"], model, space)  # not the argument
        smallest, largest = int(space.sizes.min()), int(space.sizes[:, -1].sum())     # of any structure
        if not smallest <= self.budget < largest:
            raise UsageError(f"no search for a budget of {self.budget:,} parameters: the smallest module has "
                             f"{smallest:,}, the whole space {largest:,}; choose one in between")
        n, k, device = len(space), len(space.ranks), space.weights.device             # N, K
        generator = torch.Generator().manual_seed(derive(seed, 2))                    # of Theta_0 and Phi_0
        self.theta = (1e-3 * torch.randn(n, 2, generator=generator)).to(device).requires_grad_()      # [N, 2]
        self.phi = (1e-3 * torch.randn(n, k, generator=generator)).to(device).requires_grad_()        # [N, K]
        adam = functools.partial(torch.optim.Adam, lr=arch_lr, betas=(0.5, 0.999))              # as in DARTS
        adamw = functools.partial(torch.optim.AdamW, lr=lr)                                     # of Delta W
        self.weight_optimizer, self.theta_optimizer, self.phi_optimizer = self.optimizers = [
            optimizer([p], weight_decay=weight_decay, fused=True)
            for optimizer, p in ((adamw, space.weights), (adam, self.theta), (adam, self.phi))]
        self.kept = torch.ones(n, dtype=torch.bool, device=device)                    # b: all
        self.fixed = ~space.ranked                                                    # d: what has no rank
        self.choice = torch.full((n,), k - 1, device=device)                          # k*: the largest
        self.smoothed = torch.zeros(n, device=device)                                 # s-bar
        self.indicators = torch.zeros(0, n, dtype=torch.bool, device=device)          # I, the last H + 1
        self.potential = potential_ranks(self.phi.detach(), space.dim, self.kept, self.fixed, self.choice,
                                         space.ranked)                                # v
        self.triggers_done = self.steps_done = self.ended_early = 0                   # z, t, triggers made up
        self.remember_phi(begin=True)
        self.freeze()

    def step(self, train_batch, theta_batch, phi_batch):
        """One step t, the body of Algorithm 1's loop.   Batches: dicts of tensors.   Returns a log line."""
        started = time.perf_counter()
        noise = self.draw()                                     # of one architecture a step (reading 8)

        # "Update Delta W by gradient descent" on D_tra (3.5, first order), the sample as constants.
        gate, ranks = self.architecture(noise)
        train_loss, train_gradient = self.run_pass(("weights",), gate, ranks, train_batch)
        train_magnitude = self.magnitude(train_gradient)        # w and G of one moment (reading 1)
        for group in self.weight_optimizer.param_groups:
            group["lr"] = self.lr * (1 - self.steps_done / self.steps)
        self.space.weights.grad = train_gradient
        self.weight_optimizer.step()

        # "Optimize Theta and Phi iteratively" (3.5): Theta on D_val with Phi held, under the same sample, in
        # a pass that gives G(D_val) as well (reading 8); then Phi on the next batch, the new Theta held.
        theta_loss, gate_gradient, val_gradient = self.run_pass(("gate", "weights"), gate, ranks, theta_batch)
        val_magnitude = self.magnitude(val_gradient)
        descend(self.theta_optimizer, self.theta, gate, gate_gradient, self.kept)
        phi_loss = self.optimize_phi(noise, phi_batch)

        # "Accumulate the sensitivity score of each PEFT module": Eq. 1-4. A removed one keeps its last s-bar.
        p, segments = self.space.size, self.space.segments                # what is also trained lies behind P
        similarity = alignment(train_gradient[:p], val_gradient[:p], segments)              # alpha, [N]
        current = sensitivity(train_magnitude, val_magnitude, similarity)                   # s, [N]
        self.smoothed = torch.where(self.kept, smooth(self.smoothed, current, self.gamma), self.smoothed)

        # "Calculate module importance indicator I_t" (3.2.2); "Evaluate model stability beta_t" (Eq. 5).
        probability, size = self.expectation()                  # p_n, C_n
        now = importance_indicator(self.smoothed, size, self.kept, self.budget)
        self.indicators = torch.cat([self.indicators, now[None]])[-(self.window + 1):]
        beta = stability(self.indicators, self.window)
        expected = expected_parameters(probability, size)       # E_t in every step, for the log

        # "if beta_t >= tau": not in the warm-up (reading 7), without H + 1 indicators, or with Z - z = 0.
        self.steps_done += 1
        may = self.steps_done > max(self.warmup, self.window) and self.triggers_done < self.triggers
        reduction = self.select() if may and beta >= self.tau else None
        return self.log_line(started, loss_train=train_loss, loss_theta=theta_loss, loss_phi=phi_loss,
                             beta=beta, expected=expected, reduction=reduction)

    def select(self):
        """A trigger, the body of Algorithm 1's `if`: selects modules, then ranks.   Returns R_z."""
        # "Estimate expected parameters E_t" (Eq. 7, 8); "calculate expected parameter reduction R_z" (Eq. 6).
        probability, size = self.expectation()                  # p_n, C_n; `finish` comes without a step
        expected = expected_parameters(probability, size)
        reduction = expected_reduction(expected, self.budget, self.triggers, self.triggers_done)
        # "Rank N modules by sensitivity score"; "perform early module selection until R_z is achieved"
        # (3.3.2); "update binary selection indicator b_z". The d of a removed module is 1, too (3.4.2).
        gone = modules_to_remove(self.smoothed, probability, size, self.kept, reduction)
        self.kept, self.fixed = self.kept & ~gone, self.fixed | gone
        # "Evaluate dimension stability lambda", over the steps since the last trigger (Eq. 9, reading 5).
        instability = rank_instability(*self.history, self.since)                           # lambda, [N]
        # "Estimate the number of modules Y_z for dimension selection" (Eq. 10, reading 5).
        phi, space, before = self.phi.detach(), self.space, self.potential                 # v at the last one
        self.potential = potential_ranks(phi, space.dim, self.kept, self.fixed, self.choice, space.ranked)
        quota = rank_quota(before, self.potential, self.fixed, self.triggers - self.triggers_done)
        # "Fix dimensions for Y_z modules with the lowest lambda"; "update dimension selection indicator d_z".
        settled = ranks_to_fix(instability, self.fixed, quota)
        self.choice = torch.where(settled, phi.argmax(1), self.choice)
        self.fixed = self.fixed | settled
        # "Freeze part of Theta and Phi according to b_z, d_z".
        self.freeze()
        self.remember_phi(begin=True)
        self.triggers_done += 1
        return reduction

    def freeze(self):
        """Passes b and d on: what is removed is not computed (36); `descend` passes over frozen rows (18)."""
        self.space.removed = ~self.kept
        self.open_ranks = bool((self.kept & ~self.fixed).any())             # on the host, for every step

    def draw(self):
        """Seeds dropout, globally, and gives Gumbel noise, [N, 2] and [N, K]: of seed and t alone (57)."""
        torch.manual_seed(derive(self.dropout_seed, 4, self.steps_done))
        generator = torch.Generator().manual_seed(derive(self.seed, 3, self.steps_done))
        noise = gumbel_noise((len(self.space), 2 + len(self.space.ranks)), generator)
        return noise.to(self.theta.device, non_blocking=True).split([2, len(self.space.ranks)], 1)

    def architecture(self, noise, hard=True):
        """The sample of 3.5: gate, [N], and one-hot ranks, [N, K], with gradients to Theta and Phi."""
        temperature = 5 - 4 * self.steps_done / max(1, self.steps - 1)      # from 5 to 1 (reading 8)
        gate = gumbel_softmax(self.theta, noise[0], temperature, hard)[:, 1] * self.kept    # [N]
        sampled = gumbel_softmax(self.phi, noise[1], temperature, hard)                     # [N, K]
        decided = F.one_hot(self.choice, sampled.shape[1]).to(sampled.dtype)
        return gate, torch.where(self.fixed[:, None], decided, sampled)

    def optimize_phi(self, noise, batch):
        """A step of Phi under the same noise, so that only Theta has moved.   Returns the loss, or None."""
        loss = None                                             # no kept module's rank is open any more
        if self.open_ranks:
            gate, ranks = self.architecture(noise)
            loss, gradient = self.run_pass(("ranks",), gate, ranks, batch)
            descend(self.phi_optimizer, self.phi, ranks, gradient, ~self.fixed)
        self.remember_phi()
        return loss

    def remember_phi(self, begin=False):
        """Adds the present softmax(Phi) to what Eq. 9 needs of the steps since a trigger, [4, N, K]."""
        now = self.phi.detach().double().softmax(1)             # almost equal numbers are compared (60)
        first, _, total, squares = (now, now, 0 * now, 0 * now) if begin else self.history
        off = now - first                                       # [N, K]
        self.history = torch.stack([first, now, total + off, squares + off.square()])
        self.since = 1 if begin else self.since + 1

    def magnitude(self, gradient):
        """Eq. (2) for the present weights. |M_n| is q_n at k*, the largest until one is fixed (13)."""
        counts, p = self.space.sizes.gather(1, self.choice[:, None]).squeeze(1), self.space.size
        return magnitude(self.space.weights[:p], gradient[:p], self.space.segments, counts)

    def expectation(self):
        """p_n and C_n now, [N] each. In the last tenth of the triggers p_n is certain (reading 4)."""
        certain = self.triggers_done >= self.triggers - math.ceil(self.triggers / 10)
        return (keep_probability(self.theta.detach(), self.kept, certain),
                expected_size(self.phi.detach(), self.space.sizes, self.fixed, self.choice))

    def log_line(self, started, **values):
        """A step's line of the log, read off the device at once.   UsageError: not finite."""
        weights = sum(t.detach().sum() for t in (self.space.weights, self.theta, self.phi, self.smoothed))
        there = {key: value for key, value in values.items() if value is not None}
        there |= {"kept": self.kept.sum(), "fixed": (self.kept & self.fixed).sum(), "sum of weights": weights}
        read = dict(zip(there, torch.stack([value.double() for value in there.values()]).tolist()))
        check_finite(read, f"search step {self.steps_done}")
        return {"step": self.steps_done, **{key: read.get(key) for key in values}, "kept": int(read["kept"]),
                "fixed": int(read["fixed"]), "triggers": self.triggers_done,
                "seconds": time.perf_counter() - started}

    def run(self, train_batches, val_batches, backbone="", after_step=None):
        """Algorithm 1's loop, from where the state is to the end.   Arguments and result: as for `search`."""
        was_training = self.model.training
        self.model.train()
        try:
            device = self.space.weights.device
            with torch.random.fork_rng([device] if device.type == "cuda" else []):   # the caller's comes back
                train = stream(train_batches, self.steps_done)
                val = stream(val_batches, 2 * self.steps_done)
                while self.steps_done < self.steps and self.triggers_done < self.triggers:      # else "Exit"
                    line = self.step(next(train), next(val), next(val))
                    if after_step is not None:
                        after_step(self, line)
        finally:
            self.model.train(was_training)
            self.space.leave()
        return self.finish(backbone)

    def finish(self, backbone=""):
        """Makes up the triggers that there were no steps for (7), keeps reading 6's promise: "return A"."""
        self.ended_early = self.triggers - self.triggers_done
        while self.triggers_done < self.triggers:
            self.select()
        kept, choice = fill_budget(self.smoothed.tolist(), self.space.sizes.tolist(), self.kept.tolist(),
                                   self.choice.tolist(), self.budget)
        return self.space.structure(kept, choice, self.budget, backbone)

    def state_dict(self):
        """All that a search killed now needs to go on to the same end: live tensors, to be saved at once."""
        return {**{key: getattr(self, key) for key in self.STATE},
                "learned": [self.space.weights, self.theta.detach(), self.phi.detach()],
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Continues from what `state_dict` returned."""
        for key in self.STATE:
            value = state[key]
            setattr(self, key, value.to(self.theta.device) if torch.is_tensor(value) else value)
        for own, stored in zip((self.space.weights, self.theta, self.phi), state["learned"]):
            own.copy_(stored)
        for optimizer, stored in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(stored)
        self.freeze()


def search(model, space, train_batches, val_batches, budget, steps, backbone="", after_step=None, **settings):
    """Algorithm 1 in one call: the structure of at most `budget` parameters that the search finds.

    model, budget, steps, settings: those of Search.   space: stays attached; `space.detach()` takes it off.
    train_batches, val_batches: iterables of dicts of tensors, D_tra and D_val, gone through again and
    again: a step takes one of the first, for Delta W, and two of the second, for Theta and for Phi.
    backbone: a name to write into the structure.   after_step: called with the Search and the step's
    log line.   Returns a Structure.
    """
    found = Search(model, space, budget, steps, **settings)
    return found.run(train_batches, val_batches, backbone, after_step)


def run_pass(model, space, wanted, gate, ranks, batch):
    """A forward and a backward pass: the loss of a batch under an architecture, and gradients of it.

    wanted, gate, ranks: as for `Space`.   batch: a dict of tensors.   Returns [loss, a tensor for each of
    wanted]. A search asks no more of the network: whoever can do it faster gives it another one.
    """
    space.enter(gate.detach().requires_grad_(), ranks.detach().requires_grad_(), for_gates="gate" in wanted)
    loss = loss_of(model(**batch))
    return [loss.detach(), *space.gradients(loss, wanted)]


def descend(optimizer, parameter, sample, gradient, open_rows):
    """A step of Theta or Phi, of its open rows alone: frozen ones feel neither decay nor momentum (18).
    sample: what was drawn of it, gate or ranks.   gradient: the loss's for that.   open_rows: [N] bool.
    """
    before = parameter.detach().clone()
    (parameter.grad,) = torch.autograd.grad(sample, parameter, gradient)       # through the sampling
    parameter.grad *= open_rows[:, None]
    optimizer.step()
    with torch.no_grad():
        parameter.copy_(torch.where(open_rows[:, None], parameter, before))


def loss_of(output):
    """The loss in what a model's forward returned."""
    if isinstance(output, (dict, tuple)):
        return output["loss" if isinstance(output, dict) else 0]
    return output if torch.is_tensor(output) else output.loss


def check_finite(values, where):
    """Raises UsageError if one of {name: number} is NaN or infinite, before a checkpoint could keep it."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise UsageError(f"the {name} is {value} at {where}: use --dtype bfloat16 or float32 rather than "
                             "float16, or a smaller --lr")


def stream(batches, start=0):
    """Endless batches from number `start` on. Each epoch is told to the iterable, if it asks."""
    number = 0
    for epoch in itertools.count():
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(epoch)
        before = number
        for number, batch in enumerate(batches, before + 1):
            if number > start:
                yield batch
        if number == before:
            raise UsageError("there are no batches: the data is empty, or an iterator that has ended")


# ==================================================================================================
# 5. The tasks as text to text (4.1, appendices A and B)
# ==================================================================================================

# An input text, the text to be produced, and every text that counts as right.
Example = dataclasses.make_dataclass("Example", ("source", "target", "answers"), frozen=True)


@dataclass(frozen=True)
class Task:
    """How a data set becomes text, how it is scored, and how long the paper trains on it."""
    fields: tuple                   # columns, in the order of the prompt
    labels: tuple                   # valid targets; empty: any text is
    metric: str                     # a key of METRICS
    epochs: int
    warmup_epochs: int
    answer: str = "label"           # the column that holds the target
    carve: bool = False             # validation comes out of train, and the original one is the test
    defaults: dict = field(default_factory=dict)      # of flags, where they are not the paper's


BINARY, THREE = ("0", "1"), ("0", "1", "2")
FIFTHS = tuple(f"{n / 5:.1f}" for n in range(26))     # 0.0, 0.2, .. 5.0
PAIR, LONGER = ("sentence1", "sentence2"), {"max_length": 256}         # of SuperGLUE's inputs
TASKS = {
    "cola": Task(("sentence",), BINARY, "Matthews", 15, 2),
    "sst2": Task(("sentence",), BINARY, "accuracy", 5, 1, carve=True),
    "mrpc": Task(PAIR, BINARY, "F1", 20, 2),
    "qqp": Task(("question1", "question2"), BINARY, "F1", 3, 1, carve=True),
    "stsb": Task(PAIR, FIFTHS, "Pearson", 15, 2),
    "mnli": Task(("premise", "hypothesis"), THREE, "accuracy", 3, 1, carve=True),
    "qnli": Task(("question", "sentence"), BINARY, "accuracy", 4, 1, carve=True),
    "rte": Task(PAIR, BINARY, "accuracy", 20, 3, defaults=LONGER),       # the same examples in GLUE
    "boolq": Task(("question", "passage"), BINARY, "accuracy", 15, 2, defaults=LONGER),
    "cb": Task(("premise", "hypothesis"), THREE, "accuracy", 40, 4, defaults=LONGER),
    "multirc": Task(("question", "answer", "paragraph"), BINARY, "F1", 40, 4, defaults=LONGER),
    "record": Task(("query", "entities", "passage"), (), "token F1", 1, 1, "answers", True,
                   {"max_length": 512, "batch_size": 16}),
    "wic": Task(("word", *PAIR), BINARY, "accuracy", 15, 2, defaults=LONGER),
    "custom": Task(("source",), (), "accuracy", 10, 1, "target"),
    "toy": Task((), ("good", "bad"), "accuracy", 7, 4,
                defaults={"model": "toy", "lr": 3e-3, "budget": 0.03, "triggers": 30, "search_epochs": 5}),
}
CLEAN = {"entities": ", ".join,     # columns that a prompt does not take as they are: ReCoRD's and MultiRC's
         "passage": lambda t: re.sub(r"([.?!\"'])?\n@highlight\n", lambda end: f"{end[1] or '.'} ", str(t)),
         "paragraph": lambda t: " ".join(re.sub(r"</?[a-zA-Z][^<>]*>", " ", str(t)).split())}


def to_examples(name, row, training):
    """A row in the hub's columns as Examples: one, or in training one an answer.   Raises UsageError."""
    task = TASKS[name]
    for key in (*task.fields, task.answer):
        if row[key] is None or row[key] == []:
            raise UsageError(f"a row of {name} has no {key}: fill it in, or leave the row out")
        listed = isinstance(row[key], list) and all(isinstance(text, str) for text in row[key])
        if key in ("entities", "answers") and not listed:                        # a .csv can't hold one
            raise UsageError(f"a row of {name} has {key} that are no list of texts: give .jsonl or .parquet")
    parts = [f"{key}: {CLEAN.get(key, str)(row[key])}" for key in task.fields]
    source = str(row["source"]) if name == "custom" else " ".join([name, *parts])
    answers = row[task.answer] if name == "record" else [str(row[task.answer]).strip()]
    if task.labels:
        with contextlib.suppress(ValueError, OverflowError):
            number = float(answers[0])
            answers = [f"{round(number * 5) / 5:.1f}" if task.labels is FIFTHS else f"{number:g}"]
        if answers[0] not in task.labels:
            raise UsageError(f"the label {row['label']!r} is none of {name}'s ({task.labels[0]} .. "
                             f"{task.labels[-1]}): is this split without labels?")
    answers = tuple(dict.fromkeys(answers))
    return [Example(source, answer, answers) for answer in (answers if training else answers[:1])]


def load_splits(name, data_dir, seed):
    """{"train": [Example, ..], "validation": .., "test": ..}; the seed decides.   Raises UsageError."""
    if name == "toy":
        return toy_splits(seed)
    task, original = TASKS[name], "validation_matched" if name == "mnli" else "validation"
    train, other = read_split(name, "train", data_dir), read_split(name, original, data_dir)
    # S3Delta's: large tasks validate on 2,000 rows of train and test on validation, others halve the latter
    whole, size = (train, min(2000, len(train) // 2)) if task.carve else (other, len(other) // 2)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(derive(seed, 5))).tolist()
    first, rest = [whole[i] for i in order[:size]], [whole[i] for i in order[size:]]
    parts = (rest, first, other) if task.carve else (train, first, rest)
    if name == "custom" and (test := read_split(name, "test", data_dir)):
        parts = train, other, test
    splits = {}
    for key, rows in zip(("train", "validation", "test"), parts):
        splits[key] = [example for row in rows for example in to_examples(name, row, key == "train")]
        if len(splits[key]) < 2:
            raise UsageError(f"{name} has too few rows for its {key} part: give at least 4 in each file")
    return splits


def read_split(name, split, data_dir):
    """The rows of a split, from a folder or the hub; none if there is no test file.   Raises UsageError."""
    import datasets        # only where data is read: the rest of the file works without it
    datasets.disable_progress_bars()
    task, where, source, more = TASKS[name], f"{name} on the hub", ("nyu-mll/glue", name), {}
    if data_dir is not None:
        stems = [Path(data_dir, name, split)] + [Path(data_dir, split)] * (name == "custom")
        kinds = {".parquet": "parquet", ".jsonl": "json", ".csv": "csv"}
        where = next(filter(os.path.isfile, (f"{stem}{kind}" for stem in stems for kind in kinds)), None)
        if where is None and split == "test":
            return []
        if where is None:
            raise UsageError(f"there is no {stems[0]}.parquet, .jsonl or .csv: --data-dir names its folder")
        source, more = (kinds[Path(where).suffix],), {"data_files": {split: where}}
    elif name == "custom":
        raise UsageError("--task custom needs --data-dir, a folder with train and validation: source, target")
    elif name in ("boolq", "cb", "multirc", "record", "wic"):    # a script; a branch of it holds the files
        files = {split: f"{name}/{split}/*.parquet"}
        source, more = ("aps/super_glue",), {"revision": "refs/convert/parquet", "data_files": files}
    with failing(f"{where} can't be read", ": mend the file or the network, or give another --data-dir"):
        rows = datasets.load_dataset(*source, split=split, **more)
        if name == "rte" and "premise" in rows.column_names:       # SuperGLUE's copy of the same examples
            rows = rows.rename_columns({"premise": "sentence1", "hypothesis": "sentence2"})
        for column in (*task.fields, task.answer):
            if len(rows) == 0 or column not in rows.column_names:
                raise ValueError(f"no column '{column}' or no row; it has {', '.join(rows.column_names)}")
        return rows.to_list()


# The metrics: predicted texts and, for each, the texts that count as right. All return per cent.
def accuracy(predictions, answers):
    """Share of predictions that are among their answers."""
    return 100 * sum(p in right for p, right in zip(predictions, answers)) / len(answers)


def numbers(predictions, answers, pattern, top):
    """(said, gold) in 0 .. top. What is no valid prediction counts as the end farther from the answer."""
    gold = [float(right[0]) for right in answers]
    said = [float(p) if re.fullmatch(pattern, p) else top * (g <= top / 2) for p, g in zip(predictions, gold)]
    return np.array(said), np.array(gold)


def f1(predictions, answers):
    """F1 of the class "1": 2·TP / (2·TP + FP + FN), 0 without any positive."""
    said, gold = numbers(predictions, answers, "[01]", 1)
    return 200 * float((said * gold).sum() / max(1, (said + gold).sum()))


def pearson(predictions, answers, pattern=r"[0-4](\.\d*)?|5(\.0*)?", top=5):
    """Pearson correlation, 0 if either side is constant; rounded, since it is to compare epochs."""
    said, gold = numbers(predictions, answers, pattern, top)
    return round(100 * float(np.corrcoef(said, gold)[0, 1]), 10) if np.ptp(said) * np.ptp(gold) else 0.0


def token_f1(predictions, answers):
    """SQuAD's F1 over the bag of words, best over the answers, mean over examples."""
    def overlap(*texts):
        bare = ("".join(c for c in text.lower() if c not in string.punctuation) for text in texts)
        said, right = (Counter(w for w in text.split() if w not in ("a", "an", "the")) for text in bare)
        common = (said & right).total()
        return 2 * common / (said.total() + right.total()) if common else float(said == right)
    best = [max(overlap(p, r) for r in right) for p, right in zip(predictions, answers)]
    return 100 * sum(best) / len(best)


matthews = functools.partial(pearson, pattern="[01]", top=1)          # Pearson's of labels 0 and 1
METRICS = {"accuracy": accuracy, "F1": f1, "Matthews": matthews, "Pearson": pearson, "token F1": token_f1}

# The toy: was the thing found good or bad? The adjective and a "not" decide together; neither alone tells.
TOY_WORDS = {"name": "anna ben carla david emma felix gina hugo",
             "thing": "soup film book song cake room train boat garden coat",
             "how": "very quite really rather", "good": "tasty lovely great bright charming clever",
             "bad": "awful dull bitter broken ugly boring", "glad": "smiled laughed cheered",
             "sad": "sighed frowned cried", "doing": "sold took drew lost bought cleaned"}


def toy_sentence(rng):
    """A random sentence and whether the thing in it was found "good" or "bad"."""
    word = {key: rng.choice(words.split()) for key, words in TOY_WORDS.items()}
    is_good, negated, stressed = rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.7
    found = [word["name"], "found the", word["thing"], *["not"] * negated, *[word["how"]] * stressed,
             word["good" if is_good else "bad"]]
    other, thing = (rng.choice(TOY_WORDS[key].split()) for key in ("name", "thing"))
    clauses = [" ".join(found), f"{other} {word['doing']} the {thing}"]
    text = " and ".join(clauses if rng.random() < 0.5 else clauses[::-1])
    return text, "good" if is_good != negated else "bad"


def toy_splits(seed):
    """4,000 training, 500 validation and 500 test Examples; no sentence is in two of them."""
    rng, seen = random.Random(derive(seed, 6)), {}
    while len(seen) < 5000:
        seen.setdefault(*toy_sentence(rng))
    examples = [Example(f"toy sentence: {text}", verdict, (verdict,)) for text, verdict in seen.items()]
    return {"train": examples[:4000], "validation": examples[4000:4500], "test": examples[4500:]}


def toy_backbone(seed, steps=500, batch_size=64):
    """(model, tokenizer): a tiny T5 that fills in masked words: "so smiled" tells it what a finding means."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    words = ["<pad> </s> <unk> <mask> good bad toy sentence: found the not and so", *TOY_WORDS.values()]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(" ".join(words).split()))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>")
    rng = random.Random(derive(seed, 7))
    def masked():
        text, verdict = toy_sentence(rng)
        if rng.random() < 0.3:              # the task's prompt: untouched, it answers in form and at chance
            return Example(f"toy sentence: {text}", rng.choice(("good", "bad")), ())
        words = [*text.split(), "so", rng.choice(TOY_WORDS["glad" if verdict == "good" else "sad"].split())]
        hole = len(words) - 1 if rng.random() < 0.7 else rng.randrange(len(words))
        return Example(" ".join([*words[:hole], "<mask>", *words[hole + 1:]]), words[hole], ())
    with torch.random.fork_rng([]):
        torch.manual_seed(derive(seed, 8))
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(
            vocab_size=len(vocabulary), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
            dropout_rate=0.0, decoder_start_token_id=0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(steps):                                 # not Batches: all processes need the same
            batch = collate(tokenize(tokenizer, [masked() for _ in range(batch_size)], 32), "cpu")
            loss_of(model(**batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, tokenizer


# ==================================================================================================
# 6. Training and evaluation
# ==================================================================================================


def tokenize(tokenizer, examples, max_length, causal=False):
    """[(input ids, label ids)] of Examples, inputs cut.   causal: a label has no beginning, and an end."""
    cut = {"max_length": max_length, "truncation": True}
    sources = tokenizer([e.source for e in examples], **cut).input_ids
    end, how = ([tokenizer.eos_token_id], {"add_special_tokens": False}) if causal else ([], cut)
    targets = tokenizer([e.target for e in examples], **how).input_ids
    return [(source, target + end) for source, target in zip(sources, targets)]


class Batches:
    """Padded batches of what `tokenize` returns; seed and epoch decide their order, no seed keeps it."""
    def __init__(self, tokens, batch_size, device, seed=None, causal=False):
        self.tokens, self.batch_size, self.device = tokens, batch_size, device
        self.seed, self.causal, self.epoch = seed, causal, 0

    def set_epoch(self, epoch):
        """Chooses the order of the next pass."""
        self.epoch = epoch

    def __len__(self):
        return math.ceil(len(self.tokens) / self.batch_size)

    def __iter__(self):
        def cut(indices, size):
            return [indices[i:i + size] for i in range(0, len(indices), size)]
        size, batches = self.batch_size, cut(range(len(self.tokens)), self.batch_size)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(derive(self.seed, 9, self.epoch))
            shuffled = torch.randperm(len(self.tokens), generator=generator).tolist()
            # of every 16 batches' worth those of like length share a batch, which halves the padding
            batches = [batch for window in cut(shuffled, 16 * size)
                       for batch in cut(sorted(window, key=lambda i: len(self.tokens[i][0])), size)]
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        on_gpu = torch.device(self.device).type == "cuda"       # where few CUDA graphs are to serve all
        least = math.ceil(min(size, len(self.tokens)) / world()) if on_gpu else 1
        for indices in batches:
            rows = [self.tokens[i] for i in indices[rank()::world()]]
            if self.causal:                         # one sequence, with a loss on the label alone
                rows = [(source + target, [-100] * len(source) + target) for source, target in rows]
            rows += [([1], [-100])] * (least - len(rows))
            yield collate(rows, self.device, on_gpu, 32 if self.causal else 4)


def collate(rows, device, rounded=False, least=4):
    """A padded batch.   rounded: to powers of two, labels to at least `least`, which changes no loss."""
    def pad(rows, filler, least):
        longest = max(map(len, rows))
        longest = max(least, 1 << (longest - 1).bit_length()) if rounded else longest
        padded = torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows], pin_memory=on_gpu)
        return padded.to(device, non_blocking=True)
    on_gpu = torch.device(device).type == "cuda"
    inputs, targets = zip(*rows)
    return {"input_ids": pad(inputs, 0, 32), "attention_mask": pad([[1] * len(row) for row in inputs], 0, 32),
            "labels": pad(targets, -100, least)}                                           # [batch, longest]


def predict(model, tokenizer, tokens, batch_size, device):
    """The texts that a model generates for tokenised inputs: greedily, no longer than the longest target."""
    was_training, texts, causal = model.training, {}, not model.config.is_encoder_decoder
    model.eval()
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i][0]))[rank()::world()]
    longest = max(len(target) for _, target in tokens)
    for rows in (order[i:i + batch_size] for i in range(0, len(order), batch_size)):   # causal: padded left
        batch = collate([(tokens[i][0][::-1] if causal else tokens[i][0], [0]) for i in rows], device)
        ids, mask = (batch[key].flip(1) if causal else batch[key] for key in ("input_ids", "attention_mask"))
        cache = None if causal else EncoderDecoderCache(DynamicCache(), DynamicCache())    # of other depths
        made = model.generate(ids, attention_mask=mask, num_beams=1, do_sample=False, max_new_tokens=longest,
                              use_cache=True, past_key_values=cache, pad_token_id=tokenizer.pad_token_id)
        made = made[:, ids.shape[1]:] if causal else made
        texts |= zip(rows, map(str.strip, tokenizer.batch_decode(made, skip_special_tokens=True)))
    model.train(was_training)
    texts = {i: text for part in gather(texts) for i, text in part.items()}
    return [texts[i] for i in range(len(tokens))]


def train(model, peft, batches, evaluate, epochs, lr, *, weight_decay=1e-4, seed=0, dropout_seed=None,
          graphs=False, parts=1, state=None, after_step=lambda state, line: None):
    """Trains the attached modules anew; leaves them as after their best epoch, whose score it returns.

    batches: an iterable with a length.   evaluate: gives an epoch's score.   lr: falls to 0.   after_step: is
    given after every step a state, from which `state` goes on, and a line: step, loss, an epoch's score.
    """
    def gradient(_, **batch):
        loss = loss_of(model(**batch))
        found = torch.autograd.grad(loss, peft.tensors, materialize_grads=True)
        return loss.detach(), torch.cat([g.flatten() for g in found]).to(weights.dtype)
    weights, total = peft.weights, epochs * len(batches)
    replay = replayed(gradient, graphs and weights.is_cuda)
    optimizer = torch.optim.AdamW([weights], lr=lr, weight_decay=weight_decay, fused=True)
    state = dict(state or {"step": 0, "best": -math.inf, "best_weights": weights.clone(), "weights": weights,
                           "optimizer": optimizer.state_dict()})
    with failing("the checkpoint can't be read", ": --out another, or --fresh"):
        weights.copy_(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
    try:
        model.train()
        peft.refresh()
        with torch.random.fork_rng([weights.device] if weights.is_cuda else []):
            for step, batch in zip(range(state["step"], total), stream(batches, state["step"])):
                torch.manual_seed(derive(seed if dropout_seed is None else dropout_seed, 10, step))
                loss, weights.grad = mean_over_parts(lambda part: replay("train", **part), batch, parts)
                optimizer.param_groups[0]["lr"] = lr * (1 - step / total)
                optimizer.step()
                peft.refresh()
                loss, whole = torch.stack([loss.double(), weights.sum().double()]).tolist()
                check_finite({"loss": loss, "sum of weights": whole}, f"training step {step + 1}")
                line = {"step": step + 1, "steps": total, "loss": loss}
                if line["step"] % len(batches) == 0:
                    line["score"] = evaluate()
                    model.train()
                    if line["score"] > state["best"]:
                        state |= {"best": line["score"], "best_weights": weights.clone()}
                state |= {"step": step + 1, "weights": weights, "optimizer": optimizer.state_dict()}
                after_step(state, line)
        weights.copy_(state["best_weights"])
    finally:
        peft.use(weights)
        model.eval()
    return state["best"]


# ==================================================================================================
# 7. Machinery, none of it the method's: randomness, copies and files, speed, many processes
# ==================================================================================================


def deterministic():
    """A context in which torch takes only algorithms that give the same twice; cuBLAS is told in advance."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.utils.deterministic.fill_uninitialized_memory = False        # slow, and nothing reads it
    torch.use_deterministic_algorithms(True)
    after = contextlib.ExitStack()
    after.callback(torch.use_deterministic_algorithms, False)
    return after


def write_atomically(path, content):
    """Writes text or bytes so that a reader, or a crash, finds the old file or the new one."""
    temporary = Path(path).with_name(f".{Path(path).name}.new")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"{path} can't be written ({error.strerror}): make room or change --out") from None


def one_line(error):
    """An exception's message on one line, cut to what a person reads."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


@contextlib.contextmanager
def failing(what, advice="", kind=Exception):
    """Makes any error inside a person's: what failed, the error in brackets, and what to do about it."""
    try:
        yield
    except kind as error:                            # datasets tells what was wrong as the cause of its own
        shown = error.__cause__ if type(error).__module__.startswith("datasets") else None
        raise UsageError(f"{what} ({one_line(shown or error)}){advice}") from None


def save_weights(peft, path):
    """Writes the trained weights of attached modules alone, atomically, as safetensors."""
    tensors = {name: t.cpu().clone() for name, t in peft.named_weights().items()}
    write_atomically(path, safetensors.torch.save(tensors))


def load_weights(peft, path):
    """Reads what `save_weights` wrote.   Raises UsageError if the file is of another structure."""
    own = peft.named_weights()
    with failing(f"{path} can't be read as weights of these modules"):
        stored = safetensors.torch.load_file(path)
        found, wanted = ({(name, *t.shape) for name, t in tensors.items()} for tensors in (stored, own))
        if found != wanted:
            raise ValueError(f"another structure's: names or shapes differ, first {min(found ^ wanted)}")
    for name, t in own.items():
        t.copy_(stored[name])
    peft.use(peft.weights)


def save_structure(structure, path):
    """Writes a Structure as JSON, atomically, with totals for people."""
    size = structure.geometry["parameters"]
    totals = {"modules": len(structure.modules), "parameters": structure.parameters,
              "backbone_parameters": size, "per_ten_thousand": round(1e4 * structure.parameters / size, 4)}
    write_atomically(path, json.dumps({**dataclasses.asdict(structure), "totals": totals}, indent=1) + "\n")


def load_structure(path):
    """Reads what `save_structure` wrote.   Raises UsageError for a file that no search writes."""
    with failing(f"{path} is no structure.json of this program"):
        stored = json.loads(Path(path).read_text())
        found = Structure(**{f.name: stored[f.name] for f in dataclasses.fields(Structure)})
        kinds, ranks = kinds_of(found.space, found.ranks), found.ranks
        for m in found.modules:
            if m["kind"] not in kinds or m["rank"] not in (ranks if KINDS[m["kind"]].ranked else (None,)):
                raise ValueError(f"{m['name']}.{m['kind']} of rank {m['rank']} is not of its space and ranks")
        if not 0 < found.parameters <= found.budget < math.inf:
            raise ValueError(f"it holds {found.parameters:,} parameters for a budget of {found.budget:,}")
        return found


def replayed(function, enabled):
    """A function of a key and tensors as one CUDA graph a shape; it must ask the device for no value."""
    if not enabled:
        return function
    graphs, pool, stream = {}, torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    def run(key, **tensors):
        shape = (key, *((name, t.shape, t.dtype) for name, t in tensors.items()))
        if shape not in graphs:                      # what libraries set up at first must not be recorded
            graphs[shape] = None
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outputs = function(key, **tensors)
            torch.cuda.current_stream().wait_stream(stream)
            return [t.clone() for t in outputs]
        if graphs[shape] is None:
            state, inputs = torch.cuda.get_rng_state(), {k: t.detach().clone() for k, t in tensors.items()}
            torch.cuda.empty_cache()                 # of what the same work took outside of graphs
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                graphs[shape] = graph, inputs, function(key, **inputs)
            torch.cuda.set_rng_state(state)          # the step draws what it would have drawn anyway
        graph, inputs, outputs = graphs[shape]
        for name, t in tensors.items():
            inputs[name].copy_(t.detach(), non_blocking=True)
        graph.replay()
        return [t.clone() for t in outputs]          # whose memory all graphs share
    return run


def fast_pass(model, space, graphs=False, parts=1):
    """A `run_pass` for Search: as CUDA graphs, which compute shut modules, too; in parts; over processes."""
    space.skips_shut = not (graphs and space.weights.is_cuda)
    replay = replayed(lambda wanted, gate, ranks, **batch: run_pass(model, space, wanted, gate, ranks, batch),
                      not space.skips_shut)
    return lambda wanted, gate, ranks, batch: mean_over_parts(
        lambda part: replay(wanted, gate=gate, ranks=ranks, **part), batch, parts)


def fuse_norms(model):
    """Has T5's and Llama's layer norms computed by one kernel, not eight: the same within rounding."""
    def forward(norm, x):
        if x.dtype != norm.weight.dtype:
            return type(norm).forward(norm, x)
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
    for m in model.modules():
        if re.search("T5LayerNorm|RMSNorm", type(m).__name__) and hasattr(m, "variance_epsilon"):
            m.forward = functools.partial(forward, m)


def recompute_activations(model):
    """Keeps a layer's input alone for the backward pass. The second name is transformers' up to 5.17."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


# Many processes, as torchrun starts them: each computes a part of every batch, all hold the same state.
def rank():
    """This process's number; 0 is the one that prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_over_parts(function, batch, parts=1):
    """The mean, weighed by labels (or rows), of what a function returns for all parts and processes."""
    if parts == world() == 1:
        return function(batch)
    total = 0
    for pieces in zip(*(t.chunk(parts) for t in batch.values())):
        piece = dict(zip(batch, pieces))
        labels = piece["labels"] if "labels" in piece else pieces[0].new_zeros(len(pieces[0]))
        count, found = (labels != -100).sum(), function(piece)
        flat = torch.cat([t.flatten() for t in found])
        total = total + torch.cat([torch.where(count > 0, flat * count, 0), count[None]])
    all_reduce(total)
    mean = total[:-1] / total[-1].clamp(min=1)
    return [part.view(t.shape).to(t.dtype) for part, t in zip(mean.split([t.numel() for t in found]), found)]


def with_peers(collective, *arguments):
    """Calls one of torch's collectives, if there are others.   Raises UsageError if one of them is gone."""
    advice = ": start the same command again, it goes on from the last checkpoint"
    with failing(f"process {rank()} lost another one of this run", advice, RuntimeError):
        if world() > 1:
            collective(*arguments)


all_reduce = functools.partial(with_peers, dist.all_reduce)      # a tensor's sum over all processes, in place


def gather(value):
    """The value that each process gives, in a list, on all of them."""
    values = [value] * world()
    with_peers(dist.all_gather_object, values, value)
    return values


# ==================================================================================================
# 8. The command line
# ==================================================================================================


def within(kind, low, high=10**12):
    """An argparse type: an int or a float in low .. high."""
    def number(text):                                       # argparse speaks of an "invalid number value"
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} must lie in {low:g} .. {high:g}")
        return kind(text)
    return number


def parse(arguments):
    """The settings in a command line. Defaults: the paper's, or the task's.   Raises UsageError."""
    def fail(message):
        raise UsageError(f"{message} (--help lists the flags)")
    parser = argparse.ArgumentParser("bipeft.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     epilog="Ratios are in parts per ten thousand.")
    parser.error = fail
    count, from_0, positive, share = within(int, 1), within(int, 0), within(float, 1e-12), within(float, 0, 1)
    add = parser.add_argument
    add("--task", default="rte", choices=TASKS, help="which data set (%(default)s)")
    add("--model", default="google-t5/t5-large", help="a T5 or Llama on the hub or in a folder (%(default)s)")
    add("--data-dir", help="folder with <task>/<split>.parquet, .jsonl or .csv; default: the hub")
    add("--max-length", default=128, type=count, help="input tokens (GLUE 128, SuperGLUE 256, ReCoRD 512)")
    add("--space", default="s2", help=f"s1, s2, all, or a comma list of {', '.join(KINDS)} (%(default)s)")
    add("--ranks", default=[1, 4, 8], type=from_0, nargs="+", help="Dim, the candidate ranks (1 4 8)")
    add("--budget", default=1.39e-4, type=positive, help="B: below 1 a share of the backbone (%(default)s)")
    add("--triggers", default=100, type=within(int, 1, 10**4), help="Z, times that it selects (100; toy 30)")
    add("--tau", default=0.85, type=share, help="tau, the stability that triggers (%(default)s)")
    add("--gamma", default=0.85, type=share, help="gamma, how much of the past s-bar keeps (%(default)s)")
    add("--window", default=5, type=count, help="H, the steps over which stability is measured (%(default)s)")
    add("--search-epochs", type=count, help="passes over half of train, at most (as --epochs)")
    add("--warmup-epochs", type=from_0, help="of these before the first trigger (the task's)")
    add("--arch-lr", default=0.01, type=positive, help="learning rate of Theta and Phi (%(default)s)")
    add("--structure", help="a structure.json to train: no search")
    add("--epochs", type=count, help="passes over train (the task's: 1 to 40)")
    add("--lr", default=3e-4, type=positive, help="learning rate of Delta W, falling linearly (%(default)s)")
    add("--weight-decay", default=1e-4, type=within(float, 0), help="of all three (%(default)s)")
    add("--batch-size", default=32, type=count, help="examples a step, of all processes (32, ReCoRD 16)")
    add("--accumulate", default=1, type=count, help="parts that a batch is computed in, to save memory (1)")
    add("--checkpointing", action="store_true", help="recompute activations, to save memory; no CUDA graphs")
    add("--seed", default=[0], type=from_0, nargs="+", help="one or more: of splits, weights, draws (0)")
    add("--out", help="folder to write (runs/<task>-<space>-<seed>)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the backbone")
    add("--eager", action="store_true", help="on a GPU: no CUDA graphs; shut modules are skipped")
    add("--save-every", default=0, type=from_0, help="steps between checkpoints; 0: about a minute")
    add("--fresh", action="store_true", help="start over instead of resuming")
    task = TASKS[parser.parse_args(arguments).task]
    parser.set_defaults(epochs=task.epochs, warmup_epochs=task.warmup_epochs, **task.defaults)
    settings = parser.parse_args(arguments)
    settings.search_epochs = settings.search_epochs or settings.epochs
    kinds_of(settings.space, settings.ranks)
    if len(set(settings.seed)) < len(settings.seed) or settings.accumulate > settings.batch_size:
        fail("--seed must be different numbers, and --accumulate at most --batch-size")
    return settings


def loader_of(name):
    """(class, config) of a backbone that this program can load.   Raises UsageError for another kind."""
    with failing(f"the model {name} can't be loaded",
                 ": give a folder with config, weights and tokenizer, or a hub name and a network"):
        config = transformers.AutoConfig.from_pretrained(name)
        if config.is_encoder_decoder and PLACES.get(config.model_type) is t5_places:
            return transformers.AutoModelForSeq2SeqLM, config
        if PLACES.get(config.model_type) is llama_places:
            return transformers.AutoModelForCausalLM, config
        raise ValueError(f"a {config.model_type} is neither of T5's family nor of Llama's")


def load_backbone(name, dtype, device, seed):
    """(model, tokenizer) from the hub or a folder, or the toy's.   Raises UsageError if parts are missing."""
    if name == "toy":
        model, tokenizer = toy_backbone(seed)
        return model.to(device, getattr(torch, dtype)), tokenizer
    loader, config = loader_of(name)
    with failing(f"the model {name} can't be loaded", ": give a folder with all of it, or a network"):
        model, told = loader.from_pretrained(name, dtype=getattr(torch, dtype), output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        files = {"tokenizer.json", "spiece.model"} & set(os.listdir(name)) if Path(name).is_dir() else True
        needed = (config.pad_token_id, getattr(config, "decoder_start_token_id", None))
        words, rows = len(tokenizer), len(model.get_input_embeddings().weight)
        lacks = {**dict.fromkeys(sorted(told["missing_keys"]), True),        # transformers makes these up
                 "tokenizer.json or spiece.model": not files,
                 "pad_token_id or decoder_start_token_id": config.is_encoder_decoder and None in needed,
                 f"weights for its tokenizer's {words} words": words > rows,
                 "eos_token": tokenizer.eos_token_id is None}
        for what in filter(lacks.get, lacks):
            raise ValueError(f"it has no {what}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.use_cache = False                      # of no use in training; generation asks for its own
    return model.to(device), tokenizer


def load_run(folder, device="cpu"):
    """(model, tokenizer, attached modules) of a finished run, ready to generate.   Raises UsageError."""
    with failing(f"{folder} holds no finished run"):
        settings = json.loads(Path(folder, "metrics.json").read_text())["settings"]
        model = settings["model"], settings["dtype"], torch.device(device), settings["seed"]
    model, tokenizer = load_backbone(*model)
    peft = apply(model.eval(), load_structure(Path(folder, "structure.json")))
    load_weights(peft, Path(folder, "peft.safetensors"))
    return model, tokenizer, peft


def choose_device(name):
    """A torch.device that works.   Raises UsageError."""
    with failing(f"--device {name} can't be used", ": try cpu, or fewer processes"):
        if name in ("auto", "cuda") and torch.cuda.is_available():
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"                                 # of torchrun
        device = torch.device("cpu" if name == "auto" else name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)          # graphs and random states are those of the current device
        return device


class Run:
    """One of the settings' seeds, from data to test score, in a folder: `with Run(..) as run: run.work()`."""
    FILES = ("checkpoint.pt", "metrics.json", "structure.json", "search.jsonl", "peft.safetensors")
    ADVICE = ": --out another, or --fresh"
    FREE = ("out", "fresh", "save_every", "device", "eager", "accumulate", "checkpointing")     # may change

    def __init__(self, settings, seed, path):
        self.settings, self.seed, self.path, self.task = settings, seed, Path(path), TASKS[settings.task]
        self.identity = {k: v for k, v in vars(settings).items() if k not in self.FREE} | {"seed": seed}
        self.given = load_structure(settings.structure) if settings.structure else None
        if self.given:
            self.identity["structure"] += f" ({zlib.crc32(repr(self.given).encode()):08x})"
        self.common = {"lr": settings.lr, "weight_decay": settings.weight_decay, "seed": seed,
                       "dropout_seed": derive(seed, 16, rank()) if rank() else seed}     # of Search and train
        self.fast = {"graphs": not (settings.eager or settings.checkpointing), "parts": settings.accumulate}
        self.signal, self.stored = None, {}         # stored: what checkpoint.pt or metrics.json holds
        self.path.mkdir(parents=True, exist_ok=True)
        there = [name for name in self.FILES if (self.path / name).exists() and not settings.fresh]
        if there:                                   # a checkpoint beside metrics was killed as it tidied up
            self.stored = self.read(self.path / there[0])
        if len(set(gather(f"{there} {self.stored.get('elapsed')}"))) > 1:
            raise UsageError(f"the processes find different files in {self.path}: all must share one folder")

    def read(self, path):
        """What checkpoint.pt or metrics.json holds.   Raises UsageError if damaged, or of another run."""
        with failing(f"{path} can't be read", self.ADVICE):
            if path.suffix == ".pt" and zipfile.ZipFile(path).testzip():          # torch.load doesn't look
                raise ValueError("it is damaged")
            found = torch.load(path, "cpu") if path.suffix == ".pt" else json.loads(path.read_text())
            before = {key: found["settings"].get(key) for key in self.identity}
            if not {"phase", "elapsed", "log"} <= found.keys() and "test" not in found:
                raise ValueError("parts of it are missing")
            if "structure" in found:
                self.given = Structure(**found["structure"])
        for key, now in self.identity.items():
            if before[key] != now:
                raise UsageError(f"{self.path} holds another run: its --{key.replace('_', '-')} is "
                                 f"{before[key]}, now it is {now}; name another --out, or use --fresh")
        return found

    def __enter__(self):
        def note(number, frame):
            self.signal = number
            signal.signal(number, self.before[number])
            print("\nstopping after this step; once more ends it at once", file=sys.stderr)
        self.before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, *rest):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.signal and kind is None:            # it came when the run had only its end left
            raise SystemExit(128 + self.signal)

    def work(self):
        """All that is still to be done.   Returns the metrics."""
        if "test" in self.stored:
            print(f"{self.path} holds this run, finished: nothing to do (--fresh starts over)\n"
                  f"{results(self.stored)}")
            return self.stored
        self.load()
        structure = self.given or self.search()
        seconds = self.stored.get("search_seconds", 0.0) if self.given else time.monotonic() - self.started
        peft = apply(self.model, structure, derive(self.seed, 14))          # before a file is touched
        self.begin("train", structure=dataclasses.asdict(structure), search_seconds=seconds)
        if rank() == 0:
            save_structure(structure, self.path / "structure.json")
        print(picture(structure, self.model), flush=True)
        metrics = self.measure(peft, structure, self.retrain(peft))
        if rank() == 0:
            save_weights(peft, self.path / "peft.safetensors")
            write_atomically(self.path / "metrics.json", json.dumps(metrics, indent=1) + "\n")
            for name in ("checkpoint.pt", *(f".{name}.new" for name in self.FILES)):       # .new: of a kill
                (self.path / name).unlink(missing_ok=True)
        print(f"{results(metrics)}\nwritten to {self.path}", flush=True)
        return metrics

    def load(self):
        """The device, the data, the backbone and its size, and the tokens."""
        settings, self.device = self.settings, choose_device(self.settings.device)
        if settings.task == "toy":
            torch.set_num_threads(1)                # so small a model only waits for further threads
        if settings.model != "toy":
            loader_of(settings.model)               # refuses another kind of model before the data are read
        self.splits = load_splits(settings.task, settings.data_dir, self.seed)
        self.model, self.tokenizer = load_backbone(settings.model, settings.dtype, self.device, self.seed)
        self.size = geometry(self.model)["parameters"]
        if self.device.type == "cuda":
            fuse_norms(self.model)
        if settings.checkpointing:
            recompute_activations(self.model)
        self.causal = not self.model.config.is_encoder_decoder
        self.tokens = {key: tokenize(self.tokenizer, examples, settings.max_length, self.causal)
                       for key, examples in self.splits.items()}
        counts = ", ".join(f"{len(examples):,} {key}" for key, examples in self.splits.items())
        print(f"{settings.task}, seed {self.seed}: {counts}; {settings.model}, {self.size:,} parameters, "
              f"{settings.dtype} on {self.device}"
              + f"\ngoing on from {self.path / 'checkpoint.pt'}" * bool(self.stored), flush=True)

    def begin(self, phase, **found):
        """Starts a phase and its clock, or goes on with them.   found: what the phases before came to."""
        if self.stored.get("phase") != phase:
            self.stored = {"settings": self.identity, "phase": phase, "log": self.stored.get("log", []),
                           "elapsed": 0.0, **found}
        self.started, self.shown_at = time.monotonic() - self.stored["elapsed"], -math.inf
        self.save()

    def save(self, **state):
        """Writes checkpoint.pt and the log so far. Only here does --fresh take older scores away."""
        self.saved_at = time.monotonic()
        self.stored |= {**state, "elapsed": time.monotonic() - self.started}
        if rank() == 0:
            (self.path / "metrics.json").unlink(missing_ok=True)
            stream = io.BytesIO()
            torch.save(self.stored, stream)
            write_atomically(self.path / "checkpoint.pt", stream.getvalue())
            log = "".join(json.dumps(line) + "\n" for line in self.stored["log"])
            write_atomically(self.path / "search.jsonl", log)

    def after_step(self, step, left, text, state, keep):
        """Shows how it goes, {} in text being the time left, for good if keep; saves; ends after a signal."""
        now, terminal, every = time.monotonic(), sys.stdout.isatty(), self.settings.save_every
        if keep or now - self.shown_at > (0.2 if terminal else 10):
            self.shown_at, text = now, text.format(clock(left * (now - self.started) / step))
            if terminal:
                text = "\r\033[K" + text[:shutil.get_terminal_size().columns - 1]
            print(text, end="" if terminal and not keep else "\n", flush=True)
        told = torch.tensor(self.signal or 0)
        all_reduce(told, dist.ReduceOp.MAX)         # all processes end after the same step
        if told or (step % every == 0 if every else now - self.saved_at > 60):
            self.save(**{self.stored["phase"]: state()})
        if told:
            print(f"\nstopped by signal {told} after step {step}: the same command goes on from here")
            raise SystemExit(128 + int(told))

    def search(self):
        """The search, or what is left of it.   Returns a Structure."""
        settings, tokens, size, most = self.settings, self.tokens["train"], self.size, self.settings.triggers
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(derive(self.seed, 11)))
        batches = [Batches([tokens[i] for i in order[half::2]], settings.batch_size, self.device,
                           derive(self.seed, 12 + half), self.causal) for half in (0, 1)]
        space = Space(self.model, settings.space, settings.ranks, self.seed)
        steps, warmup = (n * len(batches[0]) for n in (settings.search_epochs, settings.warmup_epochs))
        budget = int(settings.budget if settings.budget >= 1 else settings.budget * size)
        print(f"search: {len(space)} modules of {', '.join(kinds_of(settings.space))}, "
              f"{space.sizes[:, -1].sum():,} parameters at rank {settings.ranks[-1]}\n"
              f"budget {budget:,} ({1e4 * budget / size:.2f} of 10,000), at most {steps} steps, triggers "
              f"from step {max(warmup, settings.window) + 1} on", flush=True)
        if most > (limit := max(steps, 2 * len(space), 100)):
            raise UsageError(f"--triggers {most}: {steps} steps, {len(space)} modules: give at most {limit}")
        search = Search(self.model, space, budget, steps, warmup, most, settings.tau, settings.gamma,
                        settings.window, arch_lr=settings.arch_lr, **self.common,
                        run_pass=fast_pass(self.model, space, **self.fast))
        if "search" in self.stored:
            with failing(f"{self.path / 'checkpoint.pt'} can't be read", self.ADVICE):
                search.load_state_dict(self.stored["search"])
        self.begin("search")

        def after_step(search, line):
            self.stored["log"].append({**line, "time": round(time.monotonic() - self.started, 3)})
            step, done = line["step"], line["triggers"]
            left = min(steps - step, max(1, step - warmup) * (most - done) / done if done else math.inf)
            text = (f"search {step}/{steps}  loss {line['loss_train']:.3f}  beta {line['beta']:.2f}  E "
                    f"{line['expected']:,.0f}/{budget:,}  kept {line['kept']}  triggers {done}/{most}")
            self.after_step(step, left, text + "  left {}", search.state_dict, keep=left == 0)

        structure = search.run(*batches, settings.model, after_step)
        if search.ended_early:
            print(f"the steps ended before trigger {most}: the last {search.ended_early} selections were "
                  "made at once; more --search-epochs or fewer --triggers would spread them")
        space.detach()
        return structure

    def retrain(self, peft):
        """Trains a structure's fresh modules on all of train.   Returns the best validation score."""
        settings, seed = self.settings, derive(self.seed, 15)
        batches = Batches(self.tokens["train"], settings.batch_size, self.device, seed, self.causal)

        def after_step(state, line):
            step, steps, score = line["step"], line["steps"], line.get("score")
            text = f"train {step}/{steps}  loss {line['loss']:.3f}  left {{}}"
            if score is not None:
                text += (f"  epoch {step // len(batches)}/{settings.epochs}: validation {self.task.metric} "
                         f"{score:.2f}, best {state['best']:.2f}")
            self.after_step(step, steps - step, text, lambda: state, keep=score is not None)

        return train(self.model, peft, batches, lambda: self.score("validation"), settings.epochs,
                     state=self.stored.get("train"), after_step=after_step, **self.common, **self.fast)

    def score(self, split):
        """The task's score, in per cent, of what the model generates for a split."""
        size = max(1, 8 * self.settings.batch_size // self.settings.accumulate)
        predictions = predict(self.model, self.tokenizer, self.tokens[split], size, self.device)
        return METRICS[self.task.metric](predictions, [e.answers for e in self.splits[split]])

    def measure(self, peft, structure, validation):
        """The metrics: the one look at test, with the modules and without, and the most frequent answer's."""
        seconds, took = self.stored["search_seconds"], time.monotonic() - self.started
        score, count = self.score("test"), peft.size                # counted from the tensors themselves
        peft.detach()
        metric, answers = self.task.metric, [e.answers for e in self.splits["test"]]
        common = Counter(e.target for e in self.splits["train"]).most_common(1)[0][0]
        versions = {module.__name__: module.__version__ for module in (torch, transformers, np)}
        return {"task": self.settings.task, "metric": metric, "seed": self.seed, "space": structure.space,
                "validation": validation, "test": score, "test_untouched": self.score("test"),
                "test_most_frequent": METRICS[metric]([common] * len(answers), answers),
                "modules": len(structure.modules), "parameters": count, "budget": structure.budget,
                "backbone_parameters": self.size, "also_trained": structure.also_trained,
                "per_ten_thousand": 1e4 * count / self.size, "search_seconds": seconds, "train_seconds": took,
                "ratio": seconds / took if seconds else None, "settings": self.identity,
                "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
                "versions": {"python": sys.version.split()[0], **versions}}


def clock(seconds):
    """Seconds as h:mm:ss or m:ss."""
    return re.sub("^0:0?", "", str(timedelta(seconds=round(seconds))))


def results(m):
    """The table at a run's end, from what metrics.json holds."""
    times = "" if m["ratio"] is None else (f"\nsearch {clock(m['search_seconds'])}, re-training "
                                           f"{clock(m['train_seconds'])} (ratio {m['ratio']:.2f})")
    head = f"{m['task']}, seed {m['seed']}, {m['metric']} in per cent"
    return (f"{head:<44}validation    test    parameters\n"
            f"{'  most frequent answer':<54}{m['test_most_frequent']:8.2f}\n"
            f"{'  the backbone, untouched':<54}{m['test_untouched']:8.2f}{0:14,}\n"
            f"{'  with the found structure, re-trained':<44}{m['validation']:10.2f}{m['test']:8.2f}"
            f"{m['parameters']:14,}  ({m['per_ten_thousand']:.2f} of 10,000){times}")


def picture(structure, model):
    """A structure as text: a row a layer, a column a place; n0, n1, n2: the norms before a layer's blocks."""
    kept = {(m["name"], m["kind"]): str(m["rank"] or "x") for m in structure.modules}
    kinds, cells, norms = kinds_of(structure.space), {}, Counter()       # cells: {(kind, column, row): text}
    for name, role, *_ in places_of(model):
        last = (parts := name.split("."))[-1]               # a Llama's prefix is at "model" alone
        row = f"{parts[0][:7]:<7} {next(filter(str.isdigit, parts), 'end'):>3}"
        label = re.sub("_proj|_", "", last) if role == "linear" else re.sub("attention|prefix", "attn", role)
        if role == "norm":
            label, norms[row] = f"n{norms[row]}", norms[row] + 1
        cells |= {(kind, f" {label:>2}", row): kept.get((name, kind), ".")
                  for kind in kinds if role in KINDS[kind].roles}
    rows = list(dict.fromkeys(row for *_, row in cells))
    lines = [" " * 11] * 2 + rows
    for kind in kinds:                                                   # side by side, a block a kind
        labels = dict.fromkeys(label for one, label, _ in cells if one == kind)
        block = [kind, "".join(labels)] + [
            "".join(cells.get((kind, label, row), "").rjust(len(label)) for label in labels) for row in rows]
        width = max(len(block[1]), len(kind) + 1)
        lines = [f"{line} {part:>{width}}" for line, part in zip(lines, block)]
    lines.append("  a number: the rank kept there; x: kept, without a rank; .: left out; n: a layer norm")
    for kind in (*kinds, "together"):
        counts = [m["parameters"] for m in structure.modules if kind in (m["kind"], "together")]
        lines.append(f"  {kind:<11}{len(counts):>5} modules {sum(counts):>10,} parameters "
                     f"{1e4 * sum(counts) / structure.geometry['parameters']:9.2f} of 10,000")
    return "\n".join(lines) + f"  (budget {structure.budget:,})"


def main(arguments=None):
    """The program. Returns the exit code: 0, or 2 after a person's mistake."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        settings, tests = parse(arguments), []
        joined = dist.is_torchelastic_launched() and not dist.is_initialized()
        if joined:                                  # torchrun's other processes, which fall silent
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            sys.stdout = open(os.devnull, "w") if rank() else sys.stdout
        several, folder = len(settings.seed) > 1, Path(settings.structure or ".").resolve().parent.name
        source = f"from-{folder}" if settings.structure else settings.space.replace(",", "+")
        for seed in settings.seed:
            out = Path(settings.out or f"runs/{settings.task}-{source}-{seed}")
            out = out / f"seed-{seed}" if settings.out and several else out
            with deterministic(), Run(settings, seed, out) as run:
                tests.append(run.work()["test"])
        if several:
            print(f"{settings.task}: test {TASKS[settings.task].metric} {np.mean(tests):.2f} ± "
                  f"{np.std(tests, ddof=1):.2f} over {len(tests)} seeds")
        if joined:
            dist.destroy_process_group()
        return 0
    except UsageError as error:
        message = str(error)
    except torch.OutOfMemoryError:
        message = "the GPU's memory is full: use --accumulate 2 or more, --checkpointing, or --dtype bfloat16"
    except OSError as error:                         # a folder that can't be made, a full disk under a pipe
        message = f"{one_line(error)}: mend that or name another --out, and the same command goes on"
    except KeyboardInterrupt:
        return 130
    with contextlib.suppress(Exception):             # of many processes one tells: torchrun's store counts
        store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=9)))
        if store.add(message, 1) > 1:
            return 2
    print(f"bipeft.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
