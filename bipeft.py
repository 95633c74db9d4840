"""BIPEFT in one file: search which PEFT modules to keep, where, and at which rank.

    Chang et al., "BIPEFT: Budget-Guided Iterative Search for Parameter Efficient Fine-Tuning of
    Large Pretrained Language Models", Findings of EMNLP 2024, arXiv 2410.09079.

    python bipeft.py --task toy                            a generated task, offline, on a laptop
    python bipeft.py --task rte                            google-t5/t5-large and GLUE's RTE, from the hub
    python bipeft.py --task rte --model DIR --data-dir DIR the same from local folders
    python bipeft.py --task mrpc --structure runs/rte-s2-0/structure.json      transfer (Table 4)

Given a frozen T5, a task and a budget of B parameters, one short differentiable search decides
which of N candidate modules are kept and at which of K ranks; the structure is then trained anew.
Read it beside the paper: section 1 is Eq. (1)-(10), sections 2 and 3 are the search spaces,
section 4 is Algorithm 1. "Reading n" in a comment is point n of docs/decisions.md, which lists
every place where the paper leaves a choice. Ratios are in parts per ten thousand (the paper's %%).

    paper         in the code                     shape    meaning
    N, K          len(space), len(ranks)                   candidate modules; candidate ranks (Dim)
    R                                                      max(Dim), the rank at which weights are held
    Theta         theta                           [N, 2]   binary architecture weights: remove, keep
    Phi           phi                             [N, K]   rank architecture weights
    Delta W       space.weights, P numbers        [P]      weights of the PEFT modules, end to end
    W_0           model                                    the pretrained backbone, frozen
    G             train_gradient, val_gradient    [P]      gradients of Delta W
    f, alpha, s   magnitude, alignment, sensitivity  [N]   Eq. 2, 3, 1
    s-bar         smoothed                        [N]      Eq. 4
    I_t           indicators[-1]                  [N]      importance indicator, 0 or 1
    beta_t        beta                                     stability; tau its threshold, H its window
    z, Z          triggers_done, triggers                  triggers so far, and at most
    E_t, R_z      expected, reduction                      expected parameters; portion to take off
    b, d, k*      kept, fixed, choice             [N]      module kept; rank fixed; index of that rank
    p_n           keep                            [N]      probability that a module is kept
    q_n           space.costs                     [N, K]   parameters of module n at each rank
    C_n           cost                            [N]      Eq. 8, expected parameters of a module
    lambda        instability                     [N]      Eq. 9, low for a settled rank
    v             potential                       [N]      the rank a module would have now
    Y_z           quota                                    Eq. 10, ranks to fix at this trigger
    B             budget                                   in parameters
"""

import argparse
import contextlib
import dataclasses
import functools
import io
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


# ==================================================================================================
# 1. The equations (3.2 - 3.5). Tensors in, tensors out: no model, no state, no host reads. The last
#    function fills up the budget, once, on the host.
# ==================================================================================================


def sensitivity(train_magnitude, val_magnitude, alignment):
    """Eq. (1):  s_n = f_n(D_tra) + alpha_n · f_n(D_val).   All [N]; returns s, [N]."""
    return train_magnitude + alignment * val_magnitude


def magnitude(weights, gradients, lengths, counts):
    """Eq. (2):  f_n(D) = 1/|M_n| · sum over w in M_n of |w · G(w, D)|

    weights, gradients: w and G of all modules end to end, [P], of the same moment.
    lengths: how many of the P numbers each module holds, [N], or levels of them (`segment_sum`).
    counts: |M_n|, [N]: all of them while the rank is open, those of the slice once it is fixed,
        outside of which G is zero (reading 1).
    Returns f, [N]. Raises ValueError where weights and gradients differ in shape.
    """
    if weights.shape != gradients.shape:
        raise ValueError(f"weights {tuple(weights.shape)} and gradients {tuple(gradients.shape)} differ")
    return segment_sum((weights * gradients).abs(), lengths) / counts


def alignment(train_gradients, val_gradients, lengths):
    """Eq. (3):  alpha_n = cos(G_n(D_tra), G_n(D_val)), over the module's whole flattened gradients

    train_gradients, val_gradients: [P].   lengths: as in Eq. (2).
    Returns alpha, [N], in -1 .. 1, and 0 where either gradient is zero (reading 1).
    """
    dot = segment_sum(train_gradients * val_gradients, lengths)
    # Two roots, not the root of a product: squares of small gradients multiply to an underflow.
    norms = (segment_sum(train_gradients.square(), lengths).sqrt()
             * segment_sum(val_gradients.square(), lengths).sqrt())
    return torch.where(norms > 0, dot / norms.clamp(min=torch.finfo(norms.dtype).tiny), 0.0).clamp(-1, 1)


def segment_sum(values, lengths):
    """Sums of consecutive runs of a vector.   values: [P].   Returns [N].

    lengths: [N], summing to P; or several such, the sums of one being the values of the next: a GPU
    gives each run to one thread, so that a few long runs take it longer than many short ones.
    """
    for level in lengths if isinstance(lengths, tuple) else (lengths,):
        values = torch.segment_reduce(values, "sum", lengths=level, unsafe=True)
    return values


def smooth(previous, current, gamma):
    """Eq. (4):  s-bar_t = gamma · s-bar_{t-1} + (1 - gamma) · s_t.   All [N]; gamma in 0 .. 1."""
    return gamma * previous + (1 - gamma) * current


def running_sum(values):
    """The sum up to and with each value.   values: [N].   Returns [N].

    A product with a triangle of ones: on a GPU the rounding of cumsum differs from run to run.
    """
    return torch.ones(len(values), len(values), dtype=values.dtype, device=values.device).tril() @ values


def importance_indicator(smoothed, cost, kept, budget):
    """3.2.2:  I_t marks the most sensitive modules that fit the budget together

    Walks the kept modules in descending s-bar, adding up C_n, and stops at the first that would
    pass B (reading 2).   smoothed: s-bar, [N].   cost: C_n in parameters, [N].   kept: b, [N] bool.
    budget: B, in parameters.   Returns I_t, [N] bool.
    """
    order = smoothed.masked_fill(~kept, -math.inf).argsort(descending=True, stable=True)
    fits = running_sum((cost * kept)[order]) <= budget
    return torch.zeros_like(kept).scatter(0, order, fits & kept[order])


def stability(indicators, window):
    """Eq. (5):  beta_t = 1/H · sum for j = t-H+1 .. t of cos(I_j, I_{j-1})

    The sum as printed has H + 1 terms over H, so that it could reach 1.2; here it has H (reading 3).
    indicators: the latest I, oldest first, [at least 1, N]; the last H + 1 are read.   window: H.
    Returns beta_t, a scalar in 0 .. 1; 0 with fewer than H + 1 indicators (not stable yet).
    Two empty indicators count as equal (1), an empty and a non-empty one as different (0).
    """
    if len(indicators) < window + 1:
        return torch.zeros((), dtype=torch.float64, device=indicators.device)
    ones = indicators[-(window + 1):].double()
    before, after = ones[:-1], ones[1:]
    sizes = before.sum(1) * after.sum(1)
    cosines = (before * after).sum(1) / sizes.sqrt().clamp(min=1)
    return torch.where(before.sum(1) + after.sum(1) == 0, 1.0, cosines).mean()


def expected_reduction(expected, budget, triggers, triggers_done):
    """Eq. (6):  R_z = (E_t - B) / (Z - z), in parameters

    triggers_done: z counts the triggers already done, 0 .. Z-1, so that Z - z is never 0
    (reading 5).   Raises ValueError outside of that.
    """
    if not 0 <= triggers_done < triggers:
        raise ValueError(f"z = {triggers_done} is outside 0..{triggers - 1}: no trigger is left")
    return (expected - budget) / (triggers - triggers_done)


def expected_parameters(keep, cost):
    """Eq. (7):  E_t = sum_n p_n · C_n, in parameters

    The inner sum over k, as printed, would add up what Eq. (8) has already summed (reading 4).
    keep: p_n, [N].   cost: C_n in parameters, [N].   Returns a scalar.
    """
    return (keep * cost).sum()


def keep_probability(theta, kept, certain):
    """3.3.1:  p_n = b_n · softmax(Theta_n)[1], or b_n itself once `certain` (reading 7)

    theta: [N, 2].   kept: b, [N] bool.   certain: bool.   Returns p, [N].
    """
    keep = torch.ones_like(theta[:, 1]) if certain else theta.softmax(1)[:, 1]
    return keep * kept


def expected_cost(phi, costs, fixed, choice):
    """Eq. (8):  C_n = q_n[k*_n] where the rank is fixed, else q_n · softmax(Phi_n)

    phi: [N, K].   costs: q_n in parameters, [N, K].   fixed: d, [N] bool.   choice: k*, [N] int.
    Returns C, [N] float64, so that sums of parameters are exact.
    """
    costs = costs.double()
    at_choice = costs.gather(1, choice[:, None]).squeeze(1)
    return torch.where(fixed, at_choice, (costs * phi.double().softmax(1)).sum(1))


def select_modules(smoothed, expected, kept, reduction):
    """3.3.2:  the modules to remove at a trigger

    Removes from the lowest s-bar up while the removed p_n · C_n add up to at most R_z, and stops at
    the first that does not fit (reading 6): what was not removed stays in the next E_t.
    smoothed: s-bar, [N].   expected: p_n · C_n in parameters, [N].   kept: b, [N] bool.
    reduction: R_z, scalar; if it is not positive nothing goes.   Returns the removed, [N] bool.
    """
    order = smoothed.masked_fill(~kept, math.inf).argsort(stable=True)
    fits = running_sum((expected * kept)[order]) <= reduction
    return torch.zeros_like(kept).scatter(0, order, fits & kept[order])


def rank_instability(history):
    """Eq. (9):  lambda_n = 1/K · sum_k sigma_{n,k} · KL(Phi_j,n ‖ Phi_t,n)

    history: softmax(Phi) of every step from the last trigger, j, to this one, t, both included,
        [S, N, K].   sigma is the population deviation over these steps; the divergence is that of
    the first from the last, in nats (reading 8).   Returns lambda, [N]; lower is more stable.
    """
    first, last = history[0], history[-1]
    divergence = torch.where(first > 0, first * (first.log() - last.log()), 0.0).sum(1)      # 0 · log 0 is 0
    return history.std(0, unbiased=False).mean(1) * divergence


def potential_ranks(phi, ranks, kept, fixed, choice, ranked):
    """3.4.2:  v_n = Dim[argmax Phi_n], Dim[k*_n] if fixed, 0 if removed

    phi: [N, K].   ranks: Dim, rank values, [K].   kept, fixed: b, d, [N] bool.   choice: k*, [N].
    ranked: [N] bool, False for kinds without a rank, which count as 0 (reading 9).
    Returns v, [N] float64.
    """
    index = torch.where(fixed, choice, phi.argmax(1))
    return ranks.double()[index] * (kept & ranked)


def rank_quota(potential_before, potential_now, fixed, remaining):
    """Eq. (10):  Y_z = floor( sum(1 - d_{z-1}) · cos(v_{z-1}, v_z) / (Z - z) )

    potential_before, potential_now: v at the last trigger and now, [N].   fixed: d, [N] bool, True
    for modules that this trigger has just removed.   remaining: Z - z >= 1; at 1, the last trigger,
    every open rank is to be fixed (reading 9).   Returns Y_z, an integer scalar.
    """
    still_open = (~fixed).sum()
    if remaining == 1:
        return still_open
    norms = (potential_before.square().sum() * potential_now.square().sum()).sqrt()
    cosine = (potential_before * potential_now).sum() / norms.clamp(min=1)
    return (still_open * cosine / remaining).floor().long()


def select_ranks(instability, fixed, quota):
    """3.4.2:  the open modules with the Y_z lowest lambda, whose ranks get fixed

    instability: lambda, [N].   fixed: d, [N] bool.   quota: Y_z.   Returns [N] bool.
    """
    order = instability.masked_fill(fixed, math.inf).argsort(stable=True)
    first = torch.arange(len(order), device=order.device) < quota
    return torch.zeros_like(fixed).scatter(0, order, first) & ~fixed


def gumbel_noise(shape, generator):
    """-log(-log(u)), u uniform in (0, 1).   Returns a float32 tensor of `shape` on the CPU."""
    u = torch.rand(shape, generator=generator).clamp(min=torch.finfo(torch.float32).tiny)
    return -torch.log(-torch.log(u))


def gumbel_softmax(logits, noise, temperature, hard=True):
    """3.5, after Jang et al. 2017:  softmax((logits + noise) / temperature) along the last axis

    logits, noise: [..., C].   temperature: > 0.   hard: the value is the one-hot arg-max, while the
    gradient is still that of the softmax (straight-through).   Returns [..., C].
    """
    soft = ((logits + noise) / temperature).softmax(-1)
    if not hard:
        return soft
    one_hot = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return one_hot + (soft - soft.detach())      # the bracket is exactly 0, so that shut is exactly 0


def slice_mask(rank_weights, leading):
    """3.5, weight entanglement:  of R rank components the first Dim[k] are in use

    rank_weights: how much each candidate rank is chosen, [N, K], rows summing to 1 (one-hot when
    hard).   leading: row k holds Dim[k] ones, then zeros, [K, R].   Returns [N, R].
    """
    return rank_weights @ leading


def fill_budget(smoothed, costs, kept, choice, budget):
    """Reading 10, once after the last trigger:  the budget is a promise, and is used up

    Drops the least sensitive kept module while the total is above B; then offers what is free to
    the modules left out, in descending s-bar, each at the largest candidate rank that fits.
    smoothed: s-bar, N numbers.   costs: q, N lists of K integers, ascending.   kept: N bools.
    choice: k*, N indices.   budget: B.   Returns (kept, choice), new lists.
    """
    kept, choice = list(kept), list(choice)
    by_sensitivity = sorted(range(len(kept)), key=lambda n: (-smoothed[n], n))
    free = budget - sum(costs[n][choice[n]] for n in range(len(kept)) if kept[n])
    for n in reversed(by_sensitivity):
        if free < 0 and kept[n]:
            kept[n] = False
            free += costs[n][choice[n]]
    for n in by_sensitivity:
        fitting = [k for k, cost in enumerate(costs[n]) if cost <= free]
        if not kept[n] and fitting:
            kept[n], choice[n] = True, fitting[-1]
            free -= costs[n][fitting[-1]]
    return kept, choice


# ==================================================================================================
# 2. The searchable modules (4.1). Each holds its weights once, at the largest rank.
# ==================================================================================================


class Searchable(nn.Module):
    """A PEFT module at one place of the backbone, written as in its paper: without gate and ranks.

    A search acts on its weights. Before a pass, `Space.enter` multiplies the rows of the tensors
    named in `scaled` by the module's gate, by its rank mask, [R], or by its state = gate · mask, [R],
    of which each component multiplies the row of one rank component. So a shut gate adds exactly
    zero, and yet has a gradient; and thousands of products are one, over all weights end to end.
    (A prefix alone is otherwise: its state weighs its pairs in the softmax.)

    place: the backbone's module that it attaches to.   rank: r, what it is built with.
    generator: the source of its random initial weights.
    """

    roles = ()            # the kinds of place, named in `places`, that take this module
    ranked = True         # False: there is nothing to choose a rank of
    scaled = {}           # tensor's name: "gate", "mask" or "state"; the others stay as they are
    active = True         # False skips it: what a shut gate adds is zero, so why compute it

    def tensor(self, *shape, init=None, generator=None):
        """A float32 parameter: zeros, Kaiming-uniform (init='kaiming') or N(0, init^2)."""
        value = torch.zeros(*shape)
        if init == "kaiming":
            nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
        elif init is not None:
            value.normal_(0, init, generator=generator)
        return nn.Parameter(value)

    def attach(self, place):
        """Hooks the module to its place; returns the handle whose remove() undoes that."""
        return place.register_forward_hook(self._after)

    def _after(self, place, args, output):
        if not self.active:
            return None                                         # leaves the output as it is
        first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        changed = self(args[0], first)
        return changed if rest is None else (changed, *rest)


class LoRA(Searchable):
    """Hu et al. 2022:  y + B A x, on a linear layer. No extra scaling (alpha/r = 1)."""

    roles = ("linear",)
    scaled = {"B": "state"}

    def __init__(self, place, rank, generator=None):
        super().__init__()
        self.A = self.tensor(rank, place.in_features, init="kaiming", generator=generator)   # R^(r×in)
        self.B = self.tensor(rank, place.out_features)                    # R^(r×out), a row a component

    def forward(self, x, y):
        """x: [..., in], the layer's input.   y: [..., out], its output.   Returns the new y."""
        return y + F.linear(x, self.A.to(x.dtype)) @ self.B.to(x.dtype)


class LowRankAdapter(Searchable):
    """Adapter-LR of S3Delta (Hu et al. 2022b):  y + U gelu(D y), D and U products of rank-r factors.

    d -> m = d/32 -> d after a self-attention or feed-forward block. U's second factor starts at
    zero and its first does not: the module starts as the zero function, and every factor can learn.
    """

    roles = ("attention", "ffn")
    # The gate acts once, at the end: at down_in, too, a shut gate would have no gradient.
    scaled = {"down_in": "mask", "up_out": "state", "up_bias": "gate"}

    def __init__(self, place, rank, generator=None):
        super().__init__()
        d = width(place)
        m = max(1, d // 32)
        self.down_in = self.tensor(rank, d, init="kaiming", generator=generator)      # R^(r×d)
        self.down_out = self.tensor(m, rank, init="kaiming", generator=generator)     # R^(m×r)
        self.down_bias = self.tensor(m)                                               # R^m
        self.up_in = self.tensor(rank, m, init="kaiming", generator=generator)        # R^(r×m)
        self.up_out = self.tensor(rank, d)                                            # R^(r×d)
        self.up_bias = self.tensor(d)                                                 # R^d

    def forward(self, x, y):
        """y: [..., d], the block's output, which is also the adapter's input.   Returns the new y."""
        dtype = y.dtype
        h = F.linear(y, self.down_in.to(dtype))                                       # [..., r]
        h = F.gelu(F.linear(h, self.down_out.to(dtype), self.down_bias.to(dtype)))    # [..., m]
        h = F.linear(h, self.up_in.to(dtype))                                         # [..., r]
        return y + F.linear(h, self.up_out.to(dtype).T, self.up_bias.to(dtype))


class SerialAdapter(Searchable):
    """Houlsby et al. 2019:  y + U gelu(D y), bottleneck r, on a feed-forward block's output y."""

    roles = ("ffn",)
    scaled = {"up": "state", "up_bias": "gate"}

    def __init__(self, place, rank, generator=None):
        super().__init__()
        d = width(place)
        self.down = self.tensor(rank, d, init="kaiming", generator=generator)         # R^(r×d)
        self.down_bias = self.tensor(rank)                                            # R^r
        self.up = self.tensor(rank, d)                                                # R^(r×d)
        self.up_bias = self.tensor(d)                                                 # R^d

    def bottleneck(self, h):
        """h: [..., d].   Returns U gelu(D h), [..., d]."""
        dtype = h.dtype
        h = F.gelu(F.linear(h, self.down.to(dtype), self.down_bias.to(dtype)))
        return F.linear(h, self.up.to(dtype).T, self.up_bias.to(dtype))

    def forward(self, x, y):
        """y: [..., d], the block's output.   Returns the new y."""
        return y + self.bottleneck(y)


class ParallelAdapter(SerialAdapter):
    """He et al. 2022:  y + U gelu(D x), bottleneck r, beside a feed-forward block with input x."""

    def forward(self, x, y):
        """x, y: [..., d], the block's input and output.   Returns the new y."""
        return y + self.bottleneck(x).to(y.dtype)


class BitFit(Searchable):
    """Ben Zaken et al. 2022:  y + b, a bias on a linear layer or a layer norm (T5 has none)."""

    roles = ("linear", "norm")
    ranked = False
    scaled = {"bias": "gate"}

    def __init__(self, place, rank, generator=None):
        super().__init__()
        self.bias = self.tensor(place.out_features if isinstance(place, nn.Linear) else place.weight.numel())

    def forward(self, x, y):
        """y: [..., out], the place's output.   Returns the new y."""
        return y + self.bias.to(y.dtype)


class LNFit(Searchable):
    """A trainable delta on a layer norm's weight:  (w + delta) · x/rms(x) = y + delta · x/rms(x)."""

    roles = ("norm",)
    ranked = False
    scaled = {"delta": "gate"}

    def __init__(self, place, rank, generator=None):
        super().__init__()
        self.delta = self.tensor(place.weight.numel())
        self.epsilon = place.variance_epsilon

    def forward(self, x, y):
        """x, y: [..., d], the norm's input and output.   Returns the new y."""
        return y + F.rms_norm(x, self.delta.shape, self.delta.to(x.dtype), self.epsilon).to(y.dtype)


class Prefix(Searchable):
    """Li & Liang 2021:  r key/value pairs of its own before those of a self-attention.

    Scaling a key or a value would not take a pair out of the softmax; so `state`, [R], goes with
    the pairs into `prefix_attention`. None, outside of a search: every pair counts fully.
    """

    roles = ("attention",)
    state = None

    def __init__(self, place, rank, generator=None):
        super().__init__()
        self.heads, self.width = place.n_heads, place.key_value_proj_dim
        self.keys = self.tensor(rank, self.heads * self.width, init=0.02, generator=generator)
        self.values = self.tensor(rank, self.heads * self.width, init=0.02, generator=generator)

    def forward(self, dtype):
        """Returns keys and values, [heads, r, d_kv] each, and the weight of each pair, [r]."""
        keys, values = (pairs.to(dtype).unflatten(1, (self.heads, self.width)).transpose(0, 1)
                        for pairs in (self.keys, self.values))
        return keys, values, keys.new_ones(keys.shape[1]) if self.state is None else self.state

    def attach(self, place):
        """The pairs travel to `prefix_attention` as a keyword that T5's attention hands on."""
        def before(place, args, kwargs):
            return (args, {**kwargs, "prefix": self(args[0].dtype)}) if self.active else None
        return place.register_forward_pre_hook(before, with_kwargs=True)


def prefix_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=1.0,
                     position_bias=None, prefix=None, **kwargs):
    """Attention over prefix and sequence, with the exponentials of the prefix weighed by its gates.

    A shut pair has weight exactly zero and a finite gradient towards its gate, which the logarithm
    of a gate, added to the scores, could not give.   query: [batch, heads, q, d_kv].   key, value:
    [batch, heads, s, d_kv].   attention_mask, position_bias: added to the scores.   prefix: what
    `Prefix.forward` returns, or None: plain attention.   Returns ([batch, q, heads, d_kv], None).
    """
    if prefix is None:
        plain = transformers.AttentionInterface()["sdpa"]
        return plain(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                     position_bias=position_bias, **kwargs)
    keys, values, weight = prefix
    scores = torch.matmul(query, key.transpose(2, 3)).float() * scaling               # [b, h, q, s]
    for bias in (position_bias, attention_mask):
        scores = scores if bias is None else scores + bias
    own = torch.matmul(query, keys.transpose(1, 2)).float() * scaling                 # [b, h, q, r]
    top = torch.cat([scores, own.masked_fill(weight == 0, -math.inf)], -1).amax(-1, keepdim=True).detach()
    # Only a shut pair can lie above `top`; the clamp keeps its exponential, a gradient, finite.
    raised = torch.cat([weight * (own - top).clamp(max=30).exp(), (scores - top).exp()], -1)
    share = (raised / raised.sum(-1, keepdim=True)).to(value.dtype)
    share = F.dropout(share, dropout, module.training)
    values = torch.cat([values.expand(len(value), -1, -1, -1), value], 2)             # [b, h, r+s, d_kv]
    return torch.matmul(share, values).transpose(1, 2).contiguous(), None


def width(place):
    """d_model of a self-attention or feed-forward block."""
    return place.o.out_features if hasattr(place, "o") else place.wo.out_features


KINDS = {        # a new kind of module is one class and one line here
    "lora": LoRA,
    "adapter_lr": LowRankAdapter,
    "bitfit": BitFit,
    "lnfit": LNFit,
    "serial": SerialAdapter,
    "parallel": ParallelAdapter,
    "prefix": Prefix,
}
SPACES = {
    "s1": ("serial", "parallel", "prefix"),                 # AutoPEFT's (Zhou et al. 2024)
    "s2": ("lora", "adapter_lr", "bitfit", "lnfit"),        # S3Delta's (Hu et al. 2022b)
    "all": tuple(KINDS),
}


# ==================================================================================================
# 3. The search spaces: where in the backbone each module attaches (4.1, S1 and S2)
# ==================================================================================================


NO_T5 = "{} is no T5: give a model of the T5, v1.1, Flan-T5 or mT5 family"


def t5_of(model):
    """The T5 in a model: v1.0, v1.1, Flan or mT5; encoder, decoder or both.

    model: any nn.Module.   Raises UsageError if it holds none, or two.
    """
    found = [m for m in model.modules()
             if isinstance(m, transformers.PreTrainedModel) and m.config.model_type in ("t5", "mt5")]
    if not found:
        raise UsageError(NO_T5.format(type(model).__name__))
    if not set(found) <= set(found[0].modules()):
        raise UsageError("the model holds more than one T5: pass the one that is to be adapted")
    return found[0]


def places(model):
    """Every place of a T5 that can take a module, in the order of computation.

    No cross-attention projection is among them, as in S3Delta; its layer norm is.   model: as for `t5_of`.
    Yields (name, role, place); name starts at the T5's own "encoder" or "decoder".
    """
    for path, stack in t5_of(model).named_modules():
        if not type(stack).__name__.endswith("T5Stack"):
            continue
        stack_name = path.rpartition(".")[2]
        for i, block in enumerate(stack.block):
            for j, layer in enumerate(block.layer):
                at = f"{stack_name}.block.{i}.layer.{j}"
                yield f"{at}.layer_norm", "norm", layer.layer_norm
                for name, role in (("SelfAttention", "attention"), ("DenseReluDense", "ffn")):
                    if hasattr(layer, name):
                        inner = getattr(layer, name)
                        yield f"{at}.{name}", role, inner
                        for child, linear in inner.named_children():
                            if isinstance(linear, nn.Linear):
                                yield f"{at}.{name}.{child}", "linear", linear
        yield f"{stack_name}.final_layer_norm", "norm", stack.final_layer_norm


def kinds_of(space):
    """The kinds in "s1", "s2", "all" or a comma list such as "lora,prefix", as a tuple."""
    if space in SPACES:
        return SPACES[space]
    kinds = tuple(kind.strip() for kind in space.split(","))
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"unknown space or kind of module '{kind}': choose {', '.join(SPACES)}, "
                             f"or a comma list of {', '.join(KINDS)}")
    return tuple(dict.fromkeys(kinds))


def check_ranks(ranks):
    """Candidate ranks as a tuple.   Raises UsageError if they do not ascend from 1 or more, to 4096 at most."""
    ranks = tuple(ranks)
    if not ranks or ranks[0] < 1 or ranks[-1] > 4096 or any(a >= b for a, b in zip(ranks, ranks[1:])):
        raise UsageError(f"ranks {ranks} must be whole numbers from 1 to 4096, each larger than the one before")
    return ranks


class Peft(nn.Module):
    """PEFT modules attached to a frozen backbone by hooks: its own tensors stay as they are.

    model: holds a T5.   chosen: the modules, (place name, kind, rank) each.   seed: decides their
    initial weights.   Raises UsageError for a place or kind that does not exist.
    All weights live end to end in one vector, `weights`; the modules' tensors are views of it, or while
    training of `working`, a copy of it in the backbone's dtype.
    """

    def __init__(self, model, chosen, seed=0):
        super().__init__()
        found = {name: (role, place) for name, role, place in places(model)}
        generator = torch.Generator().manual_seed(derive(seed, 1))
        self.names, self.kinds, targets = [], [], []
        self.modules_ = nn.ModuleList()
        for name, kind, rank in chosen:
            role, place = found.get(name, (None, None))
            if kind not in KINDS or role not in KINDS[kind].roles:
                raise UsageError(f"the model has no place '{name}' for a module of kind '{kind}'")
            if f"{name}.{kind}" in self.names:
                raise UsageError(f"two modules of kind '{kind}' are asked for at {name}")
            self.names.append(f"{name}.{kind}")
            self.kinds.append(kind)
            self.modules_.append(KINDS[kind](place, rank, generator))
            targets.append(place)
        example = next(model.parameters())
        self.dtype = example.dtype                                  # that the modules compute in
        self.modules_.to(example.device)
        self._flatten()
        self._frozen = [p for p in model.parameters() if p.requires_grad]
        for p in self._frozen:
            p.requires_grad_(False)
        self._backbones = []                    # in a list, so that it doesn't become a part of this module
        if "prefix" in self.kinds:
            self._use_prefix_attention(model)
        self.handles = [m.attach(place) for m, place in zip(self.modules_, targets)]

    def __len__(self):
        return len(self.names)

    def _flatten(self):
        """Lays every tensor end to end in one vector, so that a step over all of them is one operation."""
        named = [(f"{name}.{key}", p) for name, m in zip(self.names, self.modules_) for key, p in m.named_parameters()]
        self.tensor_names, self.tensors = [name for name, _ in named], [p for _, p in named]
        self.sizes = [p.numel() for p in self.tensors]
        self.weights, self.working = torch.cat([p.detach().flatten() for p in self.tensors]), None
        self.lengths = torch.tensor([sum(p.numel() for p in m.parameters()) for m in self.modules_],
                                    device=self.weights.device)
        self.use(self.weights)

    def use(self, flat):
        """Has the modules compute with the numbers of another vector.   flat: [P], of any dtype."""
        self.in_use = flat
        for p, part in zip(self.tensors, flat.split(self.sizes)):
            p.data = part.view(p.shape)

    def refresh(self, factors=None):
        """Has the modules compute with a copy of the present weights in the backbone's dtype.

        factors: [P], what they are multiplied with.   `use(weights)` ends it.
        """
        if self.working is None:                    # once, since CUDA graphs go by its address
            self.working = torch.empty_like(self.weights, dtype=self.dtype)
        if self.in_use is not self.working:
            self.use(self.working)
        self.working.copy_(self.weights if factors is None else self.weights * factors)

    def _use_prefix_attention(self, model):
        """transformers' public registry of attention functions is where a prefix comes in."""
        transformers.AttentionInterface.register("bipeft_prefix", prefix_attention)
        transformers.AttentionMaskInterface.register(
            "bipeft_prefix", transformers.masking_utils.eager_mask)
        self._backbones = [t5_of(model)]
        self._attention = self._backbones[0].config._attn_implementation
        self._backbones[0].set_attn_implementation("bipeft_prefix")

    def detach(self):
        """Takes everything off: the backbone computes bit for bit what it did before."""
        for handle in self.handles:
            handle.remove()
        for p in self._frozen:
            p.requires_grad_(True)
        for backbone in self._backbones:
            backbone.set_attn_implementation(self._attention)
        self._frozen, self._backbones = [], []

    def named_weights(self):
        """{module's name.tensor's name: tensor}, parts of `weights`."""
        return {name: part.view(p.shape)
                for name, p, part in zip(self.tensor_names, self.tensors, self.weights.split(self.sizes))}

    def save(self, path):
        """Writes the trained weights alone, atomically, as safetensors."""
        tensors = {name: t.cpu().clone() for name, t in self.named_weights().items()}
        write_atomically(path, safetensors.torch.save(tensors))

    def load(self, path):
        """Reads what `save` wrote. Raises UsageError if the file is not of this structure."""
        try:
            stored = safetensors.torch.load_file(path)
        except Exception as error:
            raise UsageError(f"{path} can't be read as safetensors ({one_line(error)})") from None
        own = self.named_weights()
        for key in sorted(own.keys() ^ stored.keys()):
            raise UsageError(f"{path} is of another structure: {key} is only in one of the two")
        for key, t in own.items():
            if stored[key].shape != t.shape:
                raise UsageError(f"{path}: {key} has shape {tuple(stored[key].shape)}, expected {tuple(t.shape)}")
            t.copy_(stored[key])


class Space(Peft):
    """All candidate modules of a search space, attached at the largest rank.

    model: holds a T5.   space: "s1", "s2", "all" or a comma list of kinds.   ranks: Dim, ascending.
    seed: decides the initial weights.   `costs`, [N, K], counts real tensors: those of the module
    as it would be built at each rank.
    """

    def __init__(self, model, space="s2", ranks=(1, 4, 8), seed=0):
        ranks = check_ranks(ranks)
        kinds = kinds_of(space)
        spots = [(name, kind, place) for name, role, place in places(model)
                 for kind in kinds if role in KINDS[kind].roles]
        super().__init__(model, [(name, kind, ranks[-1]) for name, kind, _ in spots], seed)
        self.space, self.ranks = space, ranks
        self.geometry = geometry(model)
        device = self.weights.device
        self.register_buffer("dim", torch.tensor(ranks, device=device))
        self.register_buffer("leading", (torch.arange(ranks[-1], device=device) < self.dim[:, None]).float())
        self.register_buffer("ranked", torch.tensor([KINDS[k].ranked for k in self.kinds], device=device))
        with torch.device("meta"):
            costs = [[sum(p.numel() for p in KINDS[kind](place, rank).parameters()) for rank in ranks]
                     for _, kind, place in spots]
        self.register_buffer("costs", torch.tensor(costs, device=device))
        self._number_rows()

    def _number_rows(self):
        """Cuts the weights into rows; gives each the index of its factor among 1, gate, [N], mask and state, [N·R].

        So all of a LoRA's A has factor 1, and row r of its B the state of the module's component r (see
        `Searchable.scaled`). A row is cut once more after 512 numbers, for `segment_sum` alone.
        """
        count, top, longest = len(self), self.ranks[-1], 512
        factors, lengths, rows_of, self.carries_rank = [], [], [], []
        for n, m in enumerate(self.modules_):
            before = len(lengths)
            for key, p in m.named_parameters():
                how = m.scaled.get(key)
                self.carries_rank.append(how in ("mask", "state"))
                start = {None: 0, "gate": 1 + n, "mask": 1 + count + n * top, "state": 1 + count * (1 + top) + n * top}
                components = top if self.carries_rank[-1] else 1
                whole, rest = divmod(p.numel() // components, longest)
                for factor in range(start[how], start[how] + components):
                    lengths += [longest] * whole + [rest] * (rest > 0)
                    factors += [factor] * (whole + (rest > 0))
            rows_of.append(len(lengths) - before)
        device = self.weights.device
        self.factor_of_row = torch.tensor(factors, device=device)                          # [rows]
        self.row_lengths = torch.tensor(lengths, device=device)                            # [rows]
        self.levels = self.row_lengths, torch.tensor(rows_of, device=device)               # of `segment_sum`
        self.row_of = torch.arange(len(lengths), dtype=torch.int32, device=device).repeat_interleave(
            self.row_lengths, output_size=sum(lengths))                                    # [P]

    def enter(self, gate, rank_weights, skip_shut=False):
        """Puts an architecture into the modules: scales their weights for the pass that follows.

        gate: [N], 0 or 1 (or soft).   rank_weights: [N, K], rows summing to 1.   Both may carry
        gradients.   skip_shut: a module whose gate is 0 computes nothing.
        Returns the factor of every row of the weights, [rows], and state, [N, R], functions of both. (A prefix has
        no factors: it reads its state from `prefix_state`, a leaf of its own.)
        """
        mask = slice_mask(rank_weights, self.leading)                          # [N, R]
        state = gate[:, None] * mask                                           # [N, R]
        factors = torch.cat([gate.new_ones(1), gate, mask.flatten(), state.flatten()])[self.factor_of_row]
        self.refresh(self.per_number(factors))
        self.prefix_state = state.detach().requires_grad_()
        active = gate.tolist() if skip_shut else [1.0] * len(self)
        for m, m_state, on in zip(self.modules_, self.prefix_state.unbind(), active):
            vars(m).update(state=m_state, active=on != 0)                      # setattr of a Module is slow
        return factors, state

    def per_number(self, factors):
        """The factor of every single weight.   factors: [rows].   Returns [P], without gradient."""
        return factors.detach().index_select(0, self.row_of)

    def leave(self):
        """Ends the last architecture: every attached module is whole, at the largest rank."""
        self.use(self.weights)
        for m in self.modules_:
            m.state, m.active = None, True

    def remove(self, gone):
        """Takes modules off the backbone for good.   gone: N bools."""
        for n, handle in enumerate(self.handles):
            if gone[n]:
                handle.remove()

    def structure(self, kept, choice, budget, backbone=""):
        """The Structure of the kept modules.   kept: N bools.   choice: k*, N indices."""
        modules = [{"name": name.rpartition(".")[0], "kind": kind,
                    "rank": self.ranks[k] if KINDS[kind].ranked else None, "parameters": costs[k]}
                   for name, kind, on, k, costs in zip(self.names, self.kinds, kept, choice, self.costs.tolist()) if on]
        return Structure(backbone, self.geometry, self.space, list(self.ranks), budget, modules)


@dataclass
class Structure:
    """What a search found: enough to rebuild it without the search."""

    backbone: str            # the model's name, for people
    geometry: dict           # the sizes that must match
    space: str
    ranks: list
    budget: int              # B
    modules: list            # {"name": place, "kind", "rank" (None without one), "parameters"} each

    @property
    def parameters(self):
        """Parameters in all kept modules together."""
        return sum(m["parameters"] for m in self.modules)

    def save(self, path):
        """Writes it as JSON, atomically."""
        totals = {"modules": len(self.modules), "parameters": self.parameters,
                  "backbone_parameters": self.geometry["parameters"],
                  "per_ten_thousand": round(1e4 * self.parameters / self.geometry["parameters"], 4)}
        write_atomically(path, json.dumps({**dataclasses.asdict(self), "totals": totals}, indent=1) + "\n")

    @classmethod
    def load(cls, path):
        """Reads what `save` wrote. Raises UsageError for a file that is missing or not a structure."""
        try:
            stored = json.loads(Path(path).read_text())
            stored = cls(**{f.name: stored[f.name] for f in dataclasses.fields(cls)})
            stored.check()
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        except FileNotFoundError:
            raise UsageError(f"there is no structure file {path}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(f"{path} is no structure.json of this program ({one_line(error)})") from None
        return stored

    def check(self):
        """Raises UsageError for what no search writes; whatever else a file may hold raises something else."""
        kinds, ranks = kinds_of(self.space), check_ranks(self.ranks)
        if not self.modules:
            raise UsageError("it holds no modules")
        if not isinstance(self.geometry, dict):
            raise TypeError("geometry is no object")
        for m in self.modules:
            if m["kind"] not in kinds or not isinstance(m["name"], str):
                raise UsageError(f"the kind {m['kind']} of {m['name']} is not of the space {self.space}")
            ranked = KINDS[m["kind"]].ranked
            if not (type(m["rank"]) is int and m["rank"] in ranks if ranked else m["rank"] is None):
                raise UsageError(f"{m['name']}.{m['kind']} has rank {m['rank']}, "
                                 f"not {f'one of {self.ranks}' if ranked else None}")
            if m["parameters"] < (m["rank"] or 1):
                raise UsageError(f"{m['name']}.{m['kind']} of rank {m['rank']} has {m['parameters']} parameters; "
                                 "no module has none, or a rank larger than its parameters")
        if not self.parameters <= self.budget < math.inf:                       # a budget of nan, too
            raise UsageError(f"it holds {self.parameters:,} parameters, more than its budget of {self.budget:,}")


def apply(model, structure, seed=0):
    """A structure's modules, with fresh weights, on a model.   Returns the attached Peft.

    Raises UsageError if the model is of other sizes, or the file's counts are not those of the
    tensors that were built.
    """
    for key, value in geometry(model).items():
        if structure.geometry.get(key) != value:
            raise UsageError(f"the structure is of another backbone: its {key} is "
                             f"{structure.geometry.get(key)}, this model's is {value}")
    peft = Peft(model, [(m["name"], m["kind"], m["rank"] or 1) for m in structure.modules], seed)
    for m, built in zip(structure.modules, peft.lengths.tolist()):
        if m["parameters"] != built:
            peft.detach()
            raise UsageError(f"the structure says {m['parameters']} parameters for {m['name']}.{m['kind']}, "
                             f"whose tensors hold {built}")
    return peft


def geometry(model):
    """The sizes of the T5 in a model that a structure depends on, and its number of parameters."""
    t5 = t5_of(model)
    keys = ("d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers", "is_gated_act")
    return {**{key: getattr(t5.config, key) for key in keys},
            "parameters": sum(p.numel() for p in t5.parameters())}


# ==================================================================================================
# 4. Algorithm 1
# ==================================================================================================


class Search:
    """The state of Algorithm 1, its step, its trigger and its loop.

    model: its forward takes a batch's entries as keywords and returns a loss.   space: attached to
    it.   budget: B, parameters.   steps: T.   warmup: steps before the first trigger may come.
    triggers, tau, gamma, window: Z, tau, gamma, H.   lr: of Delta W, falling linearly to 0 over T.
    arch_lr: of Theta and Phi.   weight_decay: of all three.   seed: decides every random draw.
    graphs: on a GPU, run the three passes as CUDA graphs, which the model's forward must allow: it
    asks the device for no value, and its batches are tensors on the device, of few shapes.
    accumulate: parts that each batch goes through the model in, to save memory.
    Raises UsageError for a budget that no search can meet.
    """

    def __init__(self, model, space, budget, steps, warmup=0, triggers=100, tau=0.85, gamma=0.85,
                 window=5, lr=3e-4, arch_lr=0.01, weight_decay=1e-4, seed=0, graphs=False, accumulate=1):
        self.model, self.space, self.budget, self.steps, self.warmup = model, space, int(budget), steps, warmup
        self.triggers, self.tau, self.gamma, self.window = triggers, tau, gamma, window
        self.lr, self.seed, self.accumulate = lr, seed, accumulate
        self.replay = Replay(self.gradients, graphs and space.weights.is_cuda)
        smallest, whole = int(space.costs.min()), int(space.costs[:, -1].sum())
        if not smallest <= self.budget < whole:
            raise UsageError(f"a budget of {self.budget:,} parameters can't be searched for: the smallest module "
                             f"has {smallest:,}, the whole space {whole:,}; choose one in between")
        n, k, device = len(space), len(space.ranks), space.weights.device
        generator = torch.Generator().manual_seed(derive(seed, 2))
        self.theta = (1e-3 * torch.randn(n, 2, generator=generator)).to(device).requires_grad_()
        self.phi = (1e-3 * torch.randn(n, k, generator=generator)).to(device).requires_grad_()
        self.weight_optimizer = torch.optim.AdamW([space.weights], lr=lr, weight_decay=weight_decay, fused=True)
        self.theta_optimizer, self.phi_optimizer = (
            torch.optim.Adam([p], lr=arch_lr, betas=(0.5, 0.999), weight_decay=weight_decay, fused=True)
            for p in (self.theta, self.phi))
        self.optimizers = self.weight_optimizer, self.theta_optimizer, self.phi_optimizer
        self.kept = torch.ones(n, dtype=torch.bool, device=device)                    # b
        self.fixed = ~space.ranked                                                    # d
        self.kept_count, self.fixed_count = n, n - sum(space.ranked.tolist())         # of b, of b and d
        self.choice = torch.full((n,), k - 1, device=device)                          # k*
        self.smoothed = torch.zeros(n, device=device)                                 # s-bar
        self.indicators = torch.zeros(0, n, dtype=torch.bool, device=device)          # I, the last H + 1
        self.history = [self.phi.detach().double().softmax(1)]                        # since the last trigger
        self.potential = potential_ranks(self.phi.detach(), space.dim, self.kept, self.fixed,
                                         self.choice, space.ranked)                   # v
        self.triggers_done = 0                                                        # z
        self.step_number = 0                                                          # t
        self.ended_early = 0                     # triggers carried out because the steps had run out

    def architecture(self, noise, hard=True):
        """The sample of 3.5:  gate, [N], and rank weights, [N, K], with gradients to Theta and Phi.

        Removed modules are shut, and fixed ranks are what they are.   noise: of Theta's and Phi's shape.
        """
        temperature = 5 - 4 * self.step_number / max(1, self.steps - 1)
        gate = gumbel_softmax(self.theta, noise[0], temperature, hard)[:, 1] * self.kept
        sampled = gumbel_softmax(self.phi, noise[1], temperature, hard)
        settled = F.one_hot(self.choice, sampled.shape[1]).to(sampled.dtype)
        return gate, torch.where(self.fixed[:, None], settled, sampled)

    def model_pass(self, wanted, gate, rank_weights, batch):
        """`gradients` of the whole batch, of all its parts and processes; as CUDA graphs where they run."""
        return mean_over_parts(lambda part: self.replay(wanted, gate=gate, rank_weights=rank_weights, **part),
                               batch, self.accumulate)

    def gradients(self, wanted, gate, rank_weights, **batch):
        """Loss of a batch under an architecture, and its gradients for what is wanted.

        wanted: some of "gate", [N], "ranks", [N, K], and "weights", [P]; a tensor comes back for each.
        """
        space = self.space
        gate, rank_weights = gate.detach().requires_grad_(), rank_weights.detach().requires_grad_()
        # A shut module is computed for the sake of its gate alone, and by graphs, which can't skip it.
        factors, state = space.enter(gate, rank_weights, "gate" not in wanted and not self.replay.enabled)
        loss = loss_of(self.model(**batch))
        asked = [p if carries or wanted != ("ranks",) else p.detach()        # the pass for Phi needs few of them
                 for p, carries in zip(space.tensors, space.carries_rank)]
        scaled, of_state = flat_gradients(loss, asked, [space.prefix_state])
        # The network has seen w · factor, and g is its gradient for that. So by the chain rule the gradient for w
        # is factor · g, and that for the factor of a row is the sum of w · g over the row.
        scaled = scaled.to(space.weights.dtype)
        by_row = segment_sum(scaled * space.weights, space.row_lengths)
        through = torch.autograd.grad((factors, state), (gate, rank_weights), (by_row, of_state.view_as(state)))
        found = {"weights": scaled * space.per_number(factors), "gate": through[0], "ranks": through[1]}
        return loss.detach(), *(found[name] for name in wanted)

    def step(self, train_batch, theta_batch, phi_batch):
        """One step t: the three passes, then Eq. 1-5, then the trigger if stable.   Returns a log line."""
        space, started = self.space, time.perf_counter()
        generator = torch.Generator().manual_seed(derive(self.seed, 3, self.step_number))
        noise = to_device(gumbel_noise((len(space), 2 + len(space.ranks)), generator), self.theta.device).split(
            [2, len(space.ranks)], 1)
        torch.manual_seed(derive(self.seed, 4, self.step_number, rank()))     # dropout

        # Update Delta W by gradient descent: the sampled architecture, as constants.
        gate, rank_weights = self.architecture(noise)
        train_loss, train_gradient = self.model_pass(("weights",), gate, rank_weights, train_batch)
        train_magnitude = self.magnitude(train_gradient)              # w and G of one moment
        for group in self.weight_optimizer.param_groups:
            group["lr"] = self.lr * (1 - self.step_number / self.steps)
        space.weights.grad = train_gradient
        self.weight_optimizer.step()

        # Optimise Theta with Phi held; the same backward pass gives G(D_val).
        theta_loss, gate_gradient, val_gradient = self.model_pass(("gate", "weights"), gate, rank_weights, theta_batch)
        val_magnitude = self.magnitude(val_gradient)
        descend(self.theta_optimizer, self.theta, gate, gate_gradient, self.kept)

        # Then Phi with the updated Theta held: the same noise, so that only Theta has moved.
        losses = [train_loss, theta_loss]
        if self.fixed_count < self.kept_count:                        # a kept module's rank is still open
            gate, rank_weights = self.architecture(noise)
            phi_loss, rank_gradient = self.model_pass(("ranks",), gate, rank_weights, phi_batch)
            descend(self.phi_optimizer, self.phi, rank_weights, rank_gradient, ~self.fixed)
            losses.append(phi_loss)
        self.history.append(self.phi.detach().double().softmax(1))

        # Accumulate the sensitivity s-bar; the indicator I_t; the stability beta_t.
        similarity = alignment(train_gradient, val_gradient, space.levels)
        current = sensitivity(train_magnitude, val_magnitude, similarity)
        self.smoothed = torch.where(self.kept, smooth(self.smoothed, current, self.gamma), self.smoothed)
        keep, cost = self.expectation()                               # p_n, C_n
        now = importance_indicator(self.smoothed, cost, self.kept, self.budget)
        self.indicators = torch.cat([self.indicators, now[None]])[-(self.window + 1):]
        beta = stability(self.indicators, self.window)

        # If beta_t >= tau, select. The host reads the device once a step; so what a trigger would now select is
        # worked out in every step after the warm-up, read with beta, and dropped unless beta_t >= tau.
        expected = expected_parameters(keep, cost)
        self.step_number += 1
        warm = self.step_number > max(self.warmup, self.window)       # H + 1 indicators exist
        chosen = self.selection(keep, cost) if warm and self.triggers_done < self.triggers else {}
        whole = sum(t.detach().sum() for t in (space.weights, self.theta, self.phi, self.smoothed))
        read = to_host({"losses": torch.stack(losses), "beta": beta, "expected": expected, "whole": whole, **chosen})
        losses, (beta,), (expected,), (whole,) = (read[key] for key in ("losses", "beta", "expected", "whole"))
        check_losses(losses, whole, f"search step {self.step_number}")
        stable = bool(chosen) and beta >= self.tau
        if stable:
            self.select(chosen, read)
        return {"step": self.step_number, "loss_train": losses[0], "loss_theta": losses[1],
                "loss_phi": losses[2] if losses[2:] else None, "beta": beta, "expected": expected,
                "reduction": read["reduction"][0] if stable else None, "kept": self.kept_count,
                "fixed": self.fixed_count, "triggers": self.triggers_done, "seconds": time.perf_counter() - started}

    def magnitude(self, gradient):
        """Eq. (2) for the present weights, over the fixed slice where the rank is fixed."""
        at_choice = self.space.costs.gather(1, self.choice[:, None]).squeeze(1)
        counts = torch.where(self.fixed, at_choice, self.space.lengths)
        return magnitude(self.space.weights, gradient, self.space.levels, counts)

    def expectation(self):
        """p_n and C_n now. In the last tenth of the triggers p_n is certain (reading 7)."""
        certain = self.triggers_done >= self.triggers - math.ceil(self.triggers / 10)
        return (keep_probability(self.theta.detach(), self.kept, certain),
                expected_cost(self.phi.detach(), self.space.costs, self.fixed, self.choice))

    def selection(self, keep, cost):
        """The body of Algorithm 1's `if beta_t >= tau`: what a trigger would make of b, d, k* and v, and R_z.

        keep, cost: p_n and C_n now, [N].
        """
        phi, remaining = self.phi.detach(), self.triggers - self.triggers_done
        # Estimate E_t; calculate R_z; remove from the least sensitive up; update b.
        expected = expected_parameters(keep, cost)
        reduction = expected_reduction(expected, self.budget, self.triggers, self.triggers_done)
        gone = select_modules(self.smoothed, keep * cost, self.kept, reduction)
        kept, fixed = self.kept & ~gone, self.fixed | gone
        # Evaluate lambda; estimate Y_z; fix the ranks of the Y_z most stable; update d.
        instability = rank_instability(torch.stack(self.history))
        potential = potential_ranks(phi, self.space.dim, kept, fixed, self.choice, self.space.ranked)
        quota = rank_quota(self.potential, potential, fixed, remaining)
        settled = select_ranks(instability, fixed, quota)
        choice = torch.where(settled, phi.argmax(1), self.choice)
        return {"kept": kept, "fixed": fixed | settled, "choice": choice, "potential": potential,
                "reduction": reduction}

    def select(self, chosen, read):
        """Carries a selection out.   chosen: what `selection` returned.   read: the same, on the host.

        What is removed or fixed is frozen: `descend` passes over it, and the hooks of what is removed go.
        """
        self.kept, self.fixed, self.choice, self.potential = (
            chosen[key] for key in ("kept", "fixed", "choice", "potential"))
        self.leave_out([not on for on in read["kept"]])
        self.kept_count = int(sum(read["kept"]))
        self.fixed_count = sum(on and settled for on, settled in zip(map(bool, read["kept"]), map(bool, read["fixed"])))
        self.history = self.history[-1:]
        self.triggers_done += 1

    def leave_out(self, gone):
        """Takes modules off the backbone. Graphs hold them all, and go on multiplying them by zero: so does a
        resumed search, to draw the same dropout.   gone: N bools.
        """
        if not self.replay.enabled:
            self.space.remove(gone)

    def trigger(self):
        """One selection now."""
        chosen = self.selection(*self.expectation())
        self.select(chosen, to_host(chosen))

    def run(self, train_batches, val_batches, backbone="", after_step=None):
        """The loop of Algorithm 1, from where the state is to the end.

        backbone: a name to write into the structure.   after_step: called with the Search and the
        step's log line.   Returns a Structure.
        """
        was_training = self.model.training
        self.model.train()
        try:
            with own_randomness(self.space.weights.device):
                train = stream(train_batches, self.step_number)
                val = stream(val_batches, 2 * self.step_number)
                while self.step_number < self.steps and self.triggers_done < self.triggers:    # exit once Z - z is 0
                    line = self.step(next(train), next(val), next(val))
                    if after_step is not None:
                        after_step(self, line)
        finally:
            self.model.train(was_training)
            self.replay.forget()
            self.space.leave()
        return self.finish(backbone)

    def finish(self, backbone=""):
        """Carries out the triggers that the steps left no room for, and returns the Structure."""
        self.ended_early = self.triggers - self.triggers_done
        while self.triggers_done < self.triggers:
            self.trigger()
        kept, choice = fill_budget(self.smoothed.tolist(), self.space.costs.tolist(), self.kept.tolist(),
                                   self.choice.tolist(), self.budget)
        return self.space.structure(kept, choice, self.budget, backbone)

    STATE = ("theta", "phi", "kept", "fixed", "choice", "smoothed", "indicators", "potential", "kept_count",
             "fixed_count", "triggers_done", "step_number")

    def state_dict(self):
        """Everything that a search killed now needs to go on to the same end: live tensors, to be saved at once."""
        return {**{key: getattr(self, key) for key in self.STATE}, "history": torch.stack(self.history),
                "weights": self.space.weights, "optimizers": [o.state_dict() for o in self.optimizers]}

    def load_state_dict(self, state):
        """Continues from what `state_dict` returned."""
        with torch.no_grad():
            self.theta.copy_(state["theta"])
            self.phi.copy_(state["phi"])
            self.space.weights.copy_(state["weights"])
        for key in self.STATE[2:]:
            value = state[key]
            setattr(self, key, value.to(self.theta.device) if torch.is_tensor(value) else value)
        self.history = list(state["history"].to(self.theta.device))
        for optimizer, stored in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(stored)
        self.leave_out((~self.kept).tolist())


def flat_gradients(loss, *groups):
    """The gradient of a loss for each group of tensors, laid end to end: zeros where there is none, or
    where the tensor requires none.

    Nothing is accumulated anywhere, so no gradient can leak from one pass into the next.
    """
    wanted = [p for group in groups for p in group if p.requires_grad]
    found = iter(torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad    # else all gates are shut
                 else [None] * len(wanted))
    flat = []
    for group in groups:
        zero = torch.zeros((), device=loss.device, dtype=group[0].dtype)
        parts = [(p, next(found) if p.requires_grad else None) for p in group]
        flat.append(torch.cat([zero.expand(p.numel()) if g is None else g.flatten() for p, g in parts]))
    return flat


def descend(optimizer, parameter, sample, gradient, open_rows):
    """A step of an architecture parameter, of its open rows alone: frozen ones feel neither decay
    nor momentum (reading 12).   gradient: the loss's for `sample`, which depends on the parameter.
    """
    before = parameter.detach().clone()
    (parameter.grad,) = torch.autograd.grad(sample, parameter, gradient.view_as(sample))
    parameter.grad *= open_rows[:, None]
    optimizer.step()
    with torch.no_grad():
        parameter.copy_(torch.where(open_rows[:, None], parameter, before))


def search(model, space, train_batches, val_batches, budget, steps, backbone="", after_step=None, **settings):
    """Algorithm 1 in one call: the structure of at most `budget` parameters that the search finds.

    model: any module whose forward takes a batch's entries as keywords and returns a loss.
    space: a Space attached to it; it stays attached, and `space.detach()` takes it off.
    train_batches, val_batches: iterables of dicts of tensors, gone through again and again; the
    first trains Delta W, the second Theta and Phi.   budget: B, parameters.   steps: T.
    settings: those of Search.   after_step: as for `Search.run`.   Returns a Structure.
    """
    return Search(model, space, budget, steps, **settings).run(train_batches, val_batches, backbone, after_step)


def loss_of(output):
    """The loss in what a model's forward returned: an attribute, an entry, or the value itself."""
    if torch.is_tensor(output):
        return output
    return output["loss"] if isinstance(output, dict) else output[0] if isinstance(output, tuple) else output.loss


def stream(batches, start=0):
    """Endless batches from number `start` on. Each epoch is told to the iterable, if it asks."""
    number = epoch = 0
    while True:
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(epoch)
        before = number
        for batch in batches:
            if number >= start:
                yield batch
            number += 1
        if number == before:
            raise UsageError("there are no batches: the data is empty")
        epoch += 1


# ==================================================================================================
# 5. The tasks as text to text (4.1, appendices A and B)
# ==================================================================================================


@dataclass(frozen=True)
class Example:
    """An input text, the text to be produced, and every text that counts as right."""

    source: str
    target: str
    answers: tuple


@dataclass(frozen=True)
class Task:
    """How a data set becomes text, how it is scored, and how long the paper trains on it."""

    fields: tuple                   # columns, in the order of the prompt
    labels: tuple                   # valid targets; empty: any text is
    metric: str                     # a key of METRICS
    epochs: int
    warmup_epochs: int
    suite: str = "glue"
    answer: str = "label"           # the column that holds the target
    carve: bool = False             # validation comes out of train, and the original one is the test
    defaults: dict = field(default_factory=dict)      # of flags, where they are not the paper's


BINARY, THREE = ("0", "1"), ("0", "1", "2")
FIFTHS = tuple(f"{n / 5:.1f}" for n in range(26))     # 0.0, 0.2, .. 5.0
PAIR = ("sentence1", "sentence2")
LONGER = {"max_length": 256}                          # SuperGLUE's inputs
TASKS = {
    "cola": Task(("sentence",), BINARY, "Matthews", 15, 2),
    "sst2": Task(("sentence",), BINARY, "accuracy", 5, 1, carve=True),
    "mrpc": Task(PAIR, BINARY, "F1", 20, 2),
    "qqp": Task(("question1", "question2"), BINARY, "F1", 3, 1, carve=True),
    "stsb": Task(PAIR, FIFTHS, "Pearson", 15, 2),
    "mnli": Task(("premise", "hypothesis"), THREE, "accuracy", 3, 1, carve=True),
    "qnli": Task(("question", "sentence"), BINARY, "accuracy", 4, 1, carve=True),
    "rte": Task(PAIR, BINARY, "accuracy", 20, 3, defaults=LONGER),       # the same examples in GLUE
    "boolq": Task(("question", "passage"), BINARY, "accuracy", 15, 2, "super_glue", defaults=LONGER),
    "cb": Task(("premise", "hypothesis"), THREE, "accuracy", 40, 4, "super_glue", defaults=LONGER),
    "multirc": Task(("question", "answer", "paragraph"), BINARY, "F1", 40, 4, "super_glue", defaults=LONGER),
    "record": Task(("query", "entities", "passage"), (), "token F1", 1, 1, "super_glue", "answers", True,
                   {"max_length": 512, "batch_size": 16}),
    "wic": Task(("word", *PAIR), BINARY, "accuracy", 15, 2, "super_glue", defaults=LONGER),
    "custom": Task(("source",), (), "accuracy", 10, 1, "none", "target"),
    "toy": Task((), ("good", "bad"), "accuracy", 7, 4, "none",
                defaults={"model": "toy", "lr": 3e-3, "budget": 0.03, "triggers": 30, "search_epochs": 5}),
}


def to_examples(name, row, training):
    """A row of task `name`, in the hub's columns, as Examples: one, or for ReCoRD one an answer.

    Raises UsageError for a label outside the task.
    """
    task, row = TASKS[name], dict(row)
    for key in (*task.fields, task.answer):
        if row[key] is None or row[key] == []:
            raise UsageError(f"a row of {name} has no {key}: fill it in, or leave the row out")
    if name == "custom":
        target = str(row["target"]).strip()
        return [Example(str(row["source"]), target, (target,))]
    if name == "multirc":
        row["paragraph"] = " ".join(re.sub(r"</?[a-zA-Z][^<>]*>", " ", str(row["paragraph"])).split())
    if name == "record":
        for key in ("entities", "answers"):
            if not isinstance(row[key], list) or not all(isinstance(text, str) for text in row[key]):
                raise UsageError(f"a row of record has {key} that are no list of texts, which a .csv can't "
                                 "hold: give a .jsonl or .parquet")
        row["entities"] = ", ".join(row["entities"])
        mark = re.compile(r"([.?!\"'])?\n@highlight\n")
        row["passage"] = mark.sub(lambda found: f"{found[1] or '.'} ", str(row["passage"]))
    source = " ".join([name, *(f"{key}: {row[key]}" for key in task.fields)])
    if name == "record":
        answers = tuple(dict.fromkeys(row["answers"]))
        return [Example(source, answer, answers) for answer in (answers if training else answers[:1])]
    try:
        number = float(row["label"])
        target = f"{round(number * 5) / 5:.1f}" if task.labels is FIFTHS else f"{number:g}"
    except (TypeError, ValueError, OverflowError):
        target = str(row["label"])
    if target not in task.labels:
        raise UsageError(f"the label {row['label']!r} is none of {name}'s ({task.labels[0]} .. "
                         f"{task.labels[-1]}): is this split without labels?")
    return [Example(source, target, (target,))]


def load_splits(name, data_dir, seed):
    """Train, validation and test Examples of a task, as S3Delta splits them; the seed decides.

    Large tasks: 2,000 training rows (at most half) become validation, and the original validation
    set the test. Others: the original validation set is halved, unless a custom test split exists.
    Returns {"train": [...], "validation": [...], "test": [...]}.   Raises UsageError.
    """
    if name == "toy":
        return toy_splits(seed)
    task, original = TASKS[name], "validation_matched" if name == "mnli" else "validation"
    train, other = read_split(name, "train", data_dir), read_split(name, original, data_dir)
    whole, size = (train, min(2000, len(train) // 2)) if task.carve else (other, len(other) // 2)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(derive(seed, 5))).tolist()
    first, rest = [whole[i] for i in order[:size]], [whole[i] for i in order[size:]]
    parts = (rest, first, other) if task.carve else (train, first, rest)
    if name == "custom" and find_file(name, "test", data_dir):
        parts = train, other, read_split(name, "test", data_dir)
    splits = {key: [example for row in rows for example in to_examples(name, row, key == "train")]
              for key, rows in zip(("train", "validation", "test"), parts)}
    for key, examples in splits.items():
        if len(examples) < 2:
            raise UsageError(f"{name} has too few rows for its {key} part: give at least 4 in each file")
    return splits


READERS = {".parquet": "parquet", ".jsonl": "json", ".csv": "csv"}       # of datasets, by a file's ending


def find_file(name, split, data_dir):
    """The file of a split in a person's folder, DIR/<task>/<split>.parquet, .jsonl or .csv, or None."""
    folders = [Path(data_dir) / name] + ([Path(data_dir)] if name == "custom" else [])
    candidates = [folder / f"{split}{ending}" for folder in folders for ending in READERS]
    return next((path for path in candidates if path.is_file()), None)


def read_split(name, split, data_dir):
    """The rows of a split, from a folder or the hub, with the columns checked.   Raises UsageError.

    SuperGLUE's own repository holds a loading script, which `datasets` 4 and later do not run; its
    automatic conversion to parquet is a branch of the same repository.
    """
    import datasets        # only where data is read: the rest of the file works without it

    datasets.disable_progress_bars()
    task, where, source, more = TASKS[name], f"{name} on the hub", ("nyu-mll/glue", name), {}
    if data_dir is not None:
        where = find_file(name, split, data_dir)
        if where is None:
            raise UsageError(f"there is no {Path(data_dir) / name / split}.parquet, .jsonl or .csv: "
                             "--data-dir names the folder that holds it")
        source, more = (READERS[where.suffix],), {"data_files": {split: str(where)}}
    elif task.suite == "super_glue":
        source, more = ("aps/super_glue",), {"revision": "refs/convert/parquet",
                                             "data_files": {split: f"{name}/{split}/*.parquet"}}
    try:
        rows = datasets.load_dataset(*source, split=split, **more)
    except Exception as error:
        raise UsageError(f"{where} can't be read ({one_line(error.__cause__ or error)}): mend the file or "
                         "the network, or give other files with --data-dir") from None
    if name == "rte" and "premise" in rows.column_names:       # SuperGLUE's copy of the same examples
        rows = rows.rename_columns({"premise": "sentence1", "hypothesis": "sentence2"})
    for column in (*task.fields, task.answer):
        if column not in rows.column_names:
            raise UsageError(f"{where} has no column '{column}'; it has {', '.join(rows.column_names)}")
    if len(rows) == 0:
        raise UsageError(f"{where}: the {split} split of {name} is empty")
    return rows.to_list()


# The metrics: predicted texts and, for each, the texts that count as right. All return per cent.


def accuracy(predictions, answers):
    """Share of predictions that are among their answers, in per cent."""
    return 100 * sum(p in right for p, right in zip(predictions, answers)) / len(answers)


def numbers(predictions, answers, pattern, top):
    """(said, gold), numbers in 0 .. top. A prediction that does not match the pattern of a valid one counts
    as the end of the scale farther from the answer: in 0 .. 1, as the other label.
    """
    gold = [float(right[0]) for right in answers]
    said = [float(p) if re.fullmatch(pattern, p) else top * (g <= top / 2) for p, g in zip(predictions, gold)]
    return np.array(said), np.array(gold)


def correlation(said, gold):
    """Pearson's, in per cent, 0 if either side is constant; rounded, since it is to compare epochs."""
    constant = len(set(said)) == 1 or len(set(gold)) == 1
    return 0.0 if constant else round(100 * float(np.corrcoef(said, gold)[0, 1]), 10)


def f1(predictions, answers):
    """F1 of the class "1", in per cent: 2·TP / (2·TP + FP + FN), 0 without any positive."""
    said, gold = numbers(predictions, answers, "[01]", 1)
    return 200 * float((said * gold).sum() / max(1, (said + gold).sum()))


def matthews(predictions, answers):
    """Matthews correlation, in per cent: that of labels 0 and 1; 0 where either side is constant."""
    return correlation(*numbers(predictions, answers, "[01]", 1))


def pearson(predictions, answers):
    """Pearson correlation of numbers in 0 .. 5, in per cent; 0 if either side is constant."""
    return correlation(*numbers(predictions, answers, r"[0-4](\.\d*)?|5(\.0*)?", 5))


def token_f1(predictions, answers):
    """SQuAD's F1 over the bag of words, best over the answers, mean over examples, in per cent."""
    def words(text):
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return Counter(w for w in text.split() if w not in ("a", "an", "the"))

    def overlap(said, right):
        common = (said & right).total()
        return 2 * common / (said.total() + right.total()) if common else float(said == right)

    return 100 * sum(max(overlap(words(p), words(r)) for r in right)
                     for p, right in zip(predictions, answers)) / len(answers)


METRICS = {"accuracy": accuracy, "F1": f1, "Matthews": matthews, "Pearson": pearson, "token F1": token_f1}


# The toy: was the thing found good or bad? The adjective and a "not" decide together, so that
# neither word alone tells anything; a clause about something else stands before or behind.

TOY_WORDS = {
    "name": "anna ben carla david emma felix gina hugo",
    "thing": "soup film book song cake room train boat garden coat",
    "how": "very quite really rather",
    "good": "tasty lovely great bright charming clever",
    "bad": "awful dull bitter broken ugly boring",
    "glad": "smiled laughed cheered",
    "sad": "sighed frowned cried",
    "doing": "sold took drew lost bought cleaned",
}


def toy_sentence(rng):
    """A random sentence and whether the thing in it was found "good" or "bad"."""
    def any_of(key):
        return rng.choice(TOY_WORDS[key].split())

    word = {key: any_of(key) for key in TOY_WORDS}
    is_good, negated = rng.random() < 0.5, rng.random() < 0.5
    found = [word["name"], "found", "the", word["thing"], *(["not"] if negated else []),
             *([word["how"]] if rng.random() < 0.7 else []), word["good" if is_good else "bad"]]
    other = [any_of("name"), word["doing"], "the", any_of("thing")]
    clauses = [found, other] if rng.random() < 0.5 else [other, found]
    return " ".join([*clauses[0], "and", *clauses[1]]), "good" if is_good != negated else "bad"


def toy_splits(seed):
    """4,000 training, 500 validation and 500 test Examples; no sentence is in two of them."""
    rng, seen = random.Random(derive(seed, 6)), {}
    while len(seen) < 5000:
        seen.setdefault(*toy_sentence(rng))
    examples = [Example(f"toy sentence: {text}", verdict, (verdict,)) for text, verdict in seen.items()]
    return {"train": examples[:4000], "validation": examples[4000:4500], "test": examples[4500:]}


def toy_backbone(seed, steps=500, batch_size=64):
    """A tiny T5 and its tokenizer, pretrained for some seconds to fill in a masked word.

    Its sentences go on with "so smiled" or "so sighed": it comes to know what a finding means, as a
    large model would. It has also seen the task's prompt, with verdicts drawn at random: untouched,
    it answers in the right form and at chance.   Returns (model, tokenizer).
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    first = "<pad> </s> <unk> <mask> good bad toy sentence: found the not and so"
    words = " ".join([first, *TOY_WORDS.values()]).split()
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>",
                                                     eos_token="</s>", unk_token="<unk>", mask_token="<mask>")
    rng = random.Random(derive(seed, 7))

    def masked():
        text, verdict = toy_sentence(rng)
        if rng.random() < 0.3:
            return Example(f"toy sentence: {text}", rng.choice(("good", "bad")), ())
        pieces = [*text.split(), "so", rng.choice(TOY_WORDS["glad" if verdict == "good" else "sad"].split())]
        hole = len(pieces) - 1 if rng.random() < 0.7 else rng.randrange(len(pieces))
        return Example(" ".join([*pieces[:hole], "<mask>", *pieces[hole + 1:]]), pieces[hole], ())

    with own_randomness("cpu"):
        torch.manual_seed(derive(seed, 8))
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(
            vocab_size=len(vocabulary), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
            dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        tokens = tokenize(tokenizer, [masked() for _ in range(steps * batch_size)], 32)
        for start in range(0, len(tokens), batch_size):        # not Batches: all processes need the same
            loss_of(model(**collate(tokens[start:start + batch_size], "cpu"))).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, tokenizer


# ==================================================================================================
# 6. Training and evaluation
# ==================================================================================================


def tokenize(tokenizer, examples, max_length):
    """[(input ids, label ids)] of Examples, the input cut to max_length tokens, done once."""
    cut = {"max_length": max_length, "truncation": True}
    return list(zip(tokenizer([e.source for e in examples], **cut).input_ids,
                    tokenizer(text_target=[e.target for e in examples], **cut).input_ids))


class Batches:
    """Padded batches of tokenised examples, in an order that the seed and the epoch decide.

    tokens: what `tokenize` returns.   seed: None keeps the order; else examples are shuffled, and of
    every 16 batches' worth those of like length share a batch, which halves the padding.
    Yields input_ids and attention_mask, [batch, longest input], and labels, [batch, longest target],
    padded with -100. On a GPU lengths are rounded up to powers of two and the last batch is filled
    with rows without a label, so that a few CUDA graphs serve all batches; neither changes the loss.
    Of many processes each yields its own rows of every batch.
    """

    def __init__(self, tokens, batch_size, device, seed=None):
        self.tokens, self.batch_size, self.device, self.seed, self.epoch = tokens, batch_size, device, seed, 0

    def set_epoch(self, epoch):
        """Chooses the order of the next pass."""
        self.epoch = epoch

    def __len__(self):
        return math.ceil(len(self.tokens) / self.batch_size)

    def order(self):
        """The indices of each batch of this epoch."""
        def cut(indices, size):
            return [indices[i:i + size] for i in range(0, len(indices), size)]
        if self.seed is None:
            return cut(range(len(self.tokens)), self.batch_size)
        generator = torch.Generator().manual_seed(derive(self.seed, 9, self.epoch))
        shuffled = torch.randperm(len(self.tokens), generator=generator).tolist()
        batches = [batch for window in cut(shuffled, 16 * self.batch_size)
                   for batch in cut(sorted(window, key=lambda i: len(self.tokens[i][0])), self.batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def __iter__(self):
        on_gpu = torch.device(self.device).type == "cuda"
        least = math.ceil(min(self.batch_size, len(self.tokens)) / world()) if on_gpu else 1
        for indices in self.order():
            rows = [self.tokens[i] for i in indices[rank()::world()]]
            yield collate(rows + [([1], [-100])] * (least - len(rows)), self.device, on_gpu)


def collate(rows, device, rounded=False):
    """A batch of tokenised examples, as `Batches` describes it."""
    def pad(rows, filler, least):
        longest = max(map(len, rows))
        longest = max(least, 1 << (longest - 1).bit_length()) if rounded else longest
        return to_device(torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows]), device)

    sources, targets = zip(*rows)
    ones = [[1] * len(row) for row in sources]
    return {"input_ids": pad(sources, 0, 32), "attention_mask": pad(ones, 0, 32),
            "labels": pad(targets, -100, 4)}


@torch.no_grad()
def predict(model, tokenizer, tokens, batch_size, device):
    """The texts a model generates, greedily, for tokenised inputs, in their order.

    Sorted by length, so that little is padding; each batch stops when its last answer is complete,
    or has become longer than any target. Of many processes each generates its share.
    """
    was_training, texts = model.training, {}
    model.eval()
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i][0]))[rank()::world()]
    longest = max(len(target) for _, target in tokens)
    for start in range(0, len(order), batch_size):
        rows = order[start:start + batch_size]
        batch = collate([tokens[i] for i in rows], device)
        del batch["labels"]
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())     # generate's is of the encoder's depth
        made = model.generate(**batch, past_key_values=cache, use_cache=True, max_new_tokens=longest,
                              num_beams=1, do_sample=False)
        for i, text in zip(rows, tokenizer.batch_decode(made, skip_special_tokens=True)):
            texts[i] = text.strip()
    model.train(was_training)
    for part in gather(texts):
        texts.update(part)
    return [texts[i] for i in range(len(tokens))]


def train(model, peft, batches, evaluate, epochs, lr, *, weight_decay=1e-4, seed=0, graphs=False,
          accumulate=1, state=None, after_step=lambda state, line: None):
    """Trains the attached modules anew; leaves them as after their best epoch, whose score it returns.

    batches: a Batches or any iterable with a length.   evaluate: called after each epoch, returns the
    score.   lr: falls linearly to 0.   graphs, accumulate: as in Search.   after_step: called after every
    step with a state, from which `state` goes on, and a line: its step, loss and, at an epoch's end, score.
    """
    def gradient(_, **batch):
        loss = loss_of(model(**batch))
        return loss.detach(), flat_gradients(loss, peft.tensors)[0].to(weights.dtype)

    weights, total = peft.weights, epochs * len(batches)
    replay = Replay(gradient, graphs and weights.is_cuda)
    optimizer = torch.optim.AdamW([weights], lr=lr, weight_decay=weight_decay, fused=True)
    done, best, best_weights = 0, -math.inf, weights.clone()
    if state is not None:
        done, best, best_weights = state["step"], state["best"], state["best_weights"].to(weights.device)
        weights.copy_(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
    try:
        model.train()
        peft.refresh()
        with own_randomness(weights.device):
            for step, batch in zip(range(done, total), stream(batches, done)):
                torch.manual_seed(derive(seed, 10, step, rank()))       # dropout
                loss, weights.grad = mean_over_parts(lambda part: replay("train", **part), batch, accumulate)
                optimizer.param_groups[0]["lr"] = lr * (1 - step / total)
                optimizer.step()
                peft.refresh()
                (loss,), (whole,) = to_host({"loss": loss, "whole": weights.sum()}).values()
                check_losses([loss], whole, f"training step {step + 1}")
                line = {"step": step + 1, "steps": total, "loss": loss}
                if line["step"] % len(batches) == 0:
                    line["score"] = evaluate()
                    model.train()
                    if line["score"] > best:
                        best, best_weights = line["score"], weights.clone()
                after_step({"step": step + 1, "best": best, "best_weights": best_weights, "weights": weights,
                            "optimizer": optimizer.state_dict()}, line)
        weights.copy_(best_weights)
    finally:
        peft.use(weights)
        model.eval()
    return best


# ==================================================================================================
# 7. Machinery, none of it the method's: randomness, copies and files, speed, many processes
# ==================================================================================================


def derive(seed, *keys):
    """A seed of its own for each use, from the run's seed: no two draws depend on each other."""
    return int(np.random.SeedSequence((seed, *keys)).generate_state(1)[0])


def own_randomness(device):
    """A context in which the global random state may be set; the caller's comes back at its end."""
    device = torch.device(device)
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@contextlib.contextmanager
def deterministic():
    """A context in which torch takes only algorithms that give the same twice; cuBLAS is told in advance."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = True


def to_device(tensor, device):
    """A tensor of the CPU on a device, for which the host does not wait."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_host(tensors):
    """{name: list of numbers} of {name: tensor}, in one copy, since the host waits for each."""
    flat = torch.cat([t.detach().double().flatten() for t in tensors.values()]).tolist()
    ends = np.cumsum([t.numel() for t in tensors.values()]).tolist()
    return {name: flat[end - t.numel():end] for (name, t), end in zip(tensors.items(), ends)}


def check_losses(losses, weights, where):
    """Raises UsageError if a loss is NaN or infinite, or what a gradient of that kind makes of the weights.

    weights: the sum of all of them.   where: the step, in words. Called before a checkpoint could keep them.
    """
    for what, value in (*(("loss", loss) for loss in losses), ("sum of the weights", weights)):
        if not math.isfinite(value):
            raise UsageError(f"the {what} is {value} at {where}: use --dtype bfloat16 or float32 rather than "
                             "float16, or a smaller --lr")


def write_atomically(path, content):
    """Writes text or bytes so that a reader, or a crash, finds the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UsageError(f"{path} can't be written ({error.strerror}): what was there before is whole; make room and "
                         "give the same command again, or name another folder with --out") from None


def one_line(error):
    """An exception's message on one line, cut to what a person reads."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


class Replay:
    """Runs a function of tensors; on a GPU as a CUDA graph for each shape: one launch, not thousands.

    function: called as function(key, **tensors), returns tensors, asks the device for no value.
    A shape runs as it is when it comes first, and is recorded when it comes again: what libraries set up
    when first asked, on the stream that is recorded later, must not happen during a recording. All graphs
    share the memory of their insides, so that what one returns is copied at once. Dropout in a replayed
    graph follows torch.manual_seed as ever.
    """

    def __init__(self, function, enabled):
        self.function, self.enabled = function, enabled
        self.forget()
        self.stream = torch.cuda.Stream() if enabled else None     # recording needs one other than the usual

    def __call__(self, key, **tensors):
        if not self.enabled:
            return self.function(key, **tensors)
        shape = (key, *((name, t.shape, t.dtype) for name, t in tensors.items()))
        if shape not in self.graphs:
            self.graphs[shape] = None
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(key, **tensors)
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            self.graphs[shape] = self.graphs[shape] or self._record(key, tensors)
            graph, inputs, outputs = self.graphs[shape]
            with torch.no_grad():
                for name, t in tensors.items():
                    inputs[name].copy_(t, non_blocking=True)
            graph.replay()
        return [t.clone() for t in outputs]

    def forget(self):
        """Drops all graphs and their memory."""
        self.graphs, self.pool = {}, None

    def _record(self, key, tensors):
        """A graph of the function, its inputs and its outputs."""
        inputs, state = {name: t.detach().clone() for name, t in tensors.items()}, torch.cuda.get_rng_state()
        torch.cuda.empty_cache()                     # of what the same work took outside of graphs
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            outputs = self.function(key, **inputs)
        self.pool = self.pool or graph.pool()
        torch.cuda.set_rng_state(state)              # the step draws what it would have drawn anyway
        return graph, inputs, outputs


def fuse_norms(model):
    """Has T5's layer norms computed by one kernel, not eight: the same within rounding."""
    def forward(norm, x):
        if x.dtype != norm.weight.dtype:
            return type(norm).forward(norm, x)
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
    for m in model.modules():
        if type(m).__name__ in ("T5LayerNorm", "MT5LayerNorm"):
            m.forward = functools.partial(forward, m)


def recompute_activations(model):
    """Gradient checkpointing: keeps a layer's input alone for the backward pass, and computes it again."""
    # transformers up to 5.17 has only the second name, and later ones warn of it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


# Many processes, as torchrun starts them: each computes a part of every batch, and all hold the same
# state. Without a process group these functions do nothing.


def rank():
    """This process's number; 0 is the one that prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_over_parts(function, batch, parts=1):
    """What a function returns for a whole batch, a mean over its labels, from what it returns for parts.

    batch: this process's part, tensors of the same first dimension, which goes through the function in
    `parts` pieces; those of other processes come in by one all-reduce.   Returns a list of tensors, each
    the mean weighed by numbers of labels (of rows, if the batch has none): a batch in parts gives what
    it gives as a whole, but for rounding and the draws of dropout.
    """
    if parts == world() == 1:
        return function(batch)
    total = 0
    for piece in zip(*(t.chunk(parts) for t in batch.values())):
        piece = dict(zip(batch, piece))
        rows = next(iter(piece.values()))
        count = (piece["labels"] != -100).sum() if "labels" in piece else torch.tensor(len(rows), device=rows.device)
        found = function(piece)
        flat = torch.cat([t.flatten() for t in found])
        total = total + torch.cat([torch.where(count > 0, flat * count, 0), count[None]])
    all_reduce(total)
    mean = total[:-1] / total[-1].clamp(min=1)
    return [part.view(t.shape).to(t.dtype) for part, t in zip(mean.split([t.numel() for t in found]), found)]


@contextlib.contextmanager
def peers():
    """Says in one line that another process is gone, where torch says it in a hundred."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UsageError(f"process {rank()} lost another one of this run ({one_line(error)}): start the same "
                         "command again, it goes on from the last checkpoint") from None


@peers()
def all_reduce(tensor, operation=dist.ReduceOp.SUM):
    """Adds a tensor up over all processes, in place.   Raises UsageError if one of them is gone."""
    if world() > 1:
        dist.all_reduce(tensor, operation)


@peers()
def gather(value):
    """The value that each process gives, in a list, on all of them.   Raises as `all_reduce`."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


# ==================================================================================================
# 8. The command line
# ==================================================================================================


def within(kind, low, high):
    """An argparse type: a number of a kind, int or float, in low .. high."""
    def read(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} must lie in {low:g} .. {high:g}")
        return kind(text)
    read.__name__ = kind.__name__                           # argparse speaks of an "invalid int value"
    return read


COUNT, FROM_0, SHARE = within(int, 1, 10**12), within(int, 0, 10**12), within(float, 0, 1)
POSITIVE = within(float, 1e-12, 1e12)


def flags():
    """The parser of the command line. The defaults are the paper's; None: as the task has it."""
    parser = argparse.ArgumentParser(
        prog="bipeft.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
        epilog="Ratios are in parts per ten thousand. Example: python bipeft.py --task toy")
    add = parser.add_argument_group("task").add_argument
    add("--task", default="rte", choices=TASKS, help="which data set (%(default)s)")
    add("--model", help="a T5 on the hub or in a folder (google-t5/t5-large)")
    add("--data-dir", help="folder with <task>/<split>.parquet, .jsonl or .csv; default: the hub")
    add("--max-length", type=COUNT, help="input tokens (GLUE 128, SuperGLUE 256, ReCoRD 512)")
    add = parser.add_argument_group("search").add_argument
    add("--space", default="s2", help=f"s1, s2, all, or a comma list of {', '.join(KINDS)} (%(default)s)")
    add("--ranks", default=(1, 4, 8), type=FROM_0, nargs="+", help="Dim, the candidate ranks (1 4 8)")
    add("--budget", type=POSITIVE, help="B: below 1 a fraction of the backbone, else a count (1.39e-4)")
    add("--triggers", type=COUNT, help="Z, how many times modules and ranks are selected (100; toy 30)")
    add("--tau", default=0.85, type=SHARE, help="tau, the stability that triggers (%(default)s)")
    add("--gamma", default=0.85, type=SHARE, help="gamma, how much of the past s-bar keeps (%(default)s)")
    add("--window", default=5, type=COUNT, help="H, the steps over which stability is measured (%(default)s)")
    add("--search-epochs", type=COUNT, help="passes over half of train, at most (as --epochs)")
    add("--warmup-epochs", type=FROM_0, help="of these before the first trigger (the task's)")
    add("--arch-lr", default=0.01, type=POSITIVE, help="learning rate of Theta and Phi (%(default)s)")
    add("--structure", help="a structure.json to train: no search")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=COUNT, help="passes over train (the task's: 1 to 40)")
    add("--lr", type=POSITIVE, help="learning rate of Delta W, falling linearly (3e-4)")
    add("--weight-decay", default=1e-4, type=within(float, 0, 1e12), help="of all three (%(default)s)")
    add("--batch-size", type=COUNT, help="examples a step, of all processes together (32, ReCoRD 16)")
    add("--accumulate", default=1, type=COUNT, help="parts that a batch is computed in, to save memory (1)")
    add("--checkpointing", action="store_true", help="recompute activations, to save memory; no CUDA graphs")
    add = parser.add_argument_group("run").add_argument
    add("--seed", default=(0,), type=FROM_0, nargs="+", help="one or more: of splits, weights, draws (0)")
    add("--out", help="folder to write (runs/<task>-<space>-<seed>)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the backbone")
    add("--eager", action="store_true", help="on a GPU: no CUDA graphs; shut modules are skipped")
    add("--save-every", default=0, type=FROM_0, help="steps between checkpoints; 0: about a minute")
    add("--fresh", action="store_true", help="start over instead of resuming")
    return parser


def parse(arguments):
    """The settings in a command line, completed by what the task decides.   Raises UsageError."""
    def fail(message):
        raise UsageError(f"{message} (--help lists the flags)")

    parser = flags()
    parser.error = fail
    settings = parser.parse_args(arguments)
    task, given = TASKS[settings.task], {k: v for k, v in vars(settings).items() if v is not None}
    vars(settings).update({"model": "google-t5/t5-large", "max_length": 128, "budget": 1.39e-4, "lr": 3e-4,
                           "batch_size": 32, "triggers": 100, "epochs": task.epochs,
                           "warmup_epochs": task.warmup_epochs, **task.defaults, **given})
    settings.search_epochs = settings.search_epochs or settings.epochs
    kinds_of(settings.space)
    check_ranks(settings.ranks)
    if settings.accumulate > settings.batch_size:
        fail(f"--accumulate {settings.accumulate} parts of --batch-size {settings.batch_size} would be empty")
    if len(set(settings.seed)) < len(settings.seed):
        fail(f"--seed {' '.join(map(str, settings.seed))} must be different numbers")
    if settings.task == "custom" and settings.data_dir is None:
        fail("--task custom needs --data-dir, a folder with train and validation files of source and target")
    return settings


def load_backbone(name, dtype, device, seed):
    """(model, tokenizer) from the hub or a folder, or the toy's.   Raises UsageError if it is no T5."""
    if name == "toy":
        model, tokenizer = toy_backbone(seed)
        return model.to(device, getattr(torch, dtype)), tokenizer
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if config.model_type not in ("t5", "mt5"):
            raise ValueError(NO_T5.format(f"a {config.model_type}"))
        model, told = transformers.AutoModelForSeq2SeqLM.from_pretrained(
            name, dtype=getattr(torch, dtype), output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        files = [Path(name) / file for file in ("tokenizer.json", "spiece.model")]
        if told["missing_keys"]:                                        # they would be made up at random
            raise ValueError(f"it has no {', '.join(sorted(told['missing_keys'])[:2])} ..")
        if None in (config.pad_token_id, config.decoder_start_token_id):
            raise ValueError("its config has no pad_token_id or no decoder_start_token_id")
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            raise ValueError(f"its tokenizer has {len(tokenizer):,} words, more than its weights")
        if Path(name).is_dir() and not any(file.is_file() for file in files):       # it would be an empty one
            raise ValueError("there is no tokenizer.json or spiece.model")
    except Exception as error:
        raise UsageError(f"the model {name} can't be loaded ({one_line(error)}): give a folder with config, "
                         "weights and tokenizer, or a hub name and a network") from None
    model.config.use_cache = False                      # of no use in training; generation asks for its own
    return model.to(device), tokenizer


def choose_device(name):
    """A torch.device that works.   Raises UsageError."""
    if name.startswith("cuda:") and world() > 1:
        raise UsageError(f"--device {name} would put {world()} processes on one GPU: leave --device out")
    if name == "cuda" or name == "auto" and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"                                     # of torchrun
    try:
        device = torch.device("cpu" if name == "auto" else name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)          # graphs and random states are those of the current device
        return device
    except Exception as error:
        raise UsageError(f"--device {name} can't be used ({one_line(error)}): try cpu; each process needs "
                         f"a GPU of its own, and there are {torch.cuda.device_count()}") from None


def load_checkpoint(path):
    """What `Run.save` wrote, every byte checked first, which torch.load does not do."""
    with zipfile.ZipFile(path) as file:
        if file.testzip() is not None:
            raise ValueError("it is damaged")
    return torch.load(path, weights_only=True, map_location="cpu")


class Run:
    """One seed from data to test score, in a folder of its own: `with Run(..) as run: run.work()`.

    settings: complete.   seed: one of theirs.   path: the folder, made if it is missing.
    Refuses another run's folder, goes on from a checkpoint, ends on a signal after the step under way.
    Raises UsageError for what is a person's to mend, and OSError.
    """

    FILES = ("checkpoint.pt", "metrics.json", "structure.json", "search.jsonl", "peft.safetensors")

    def __init__(self, settings, seed, path):
        self.settings, self.seed, self.path, self.task = settings, seed, Path(path), TASKS[settings.task]
        self.given = Structure.load(settings.structure) if settings.structure else None
        # What a run must share with the one that it goes on from.
        free = ("out", "fresh", "save_every", "device", "eager", "accumulate", "checkpointing")
        self.identity = {k: v for k, v in vars(settings).items() if k not in free} | {
            "ranks": list(settings.ranks), "seed": seed}
        if self.given:
            content = json.dumps(dataclasses.asdict(self.given), sort_keys=True)
            self.identity["structure"] += f" ({zlib.crc32(content.encode()):08x})"
        self.common = {"weight_decay": settings.weight_decay, "seed": seed, "accumulate": settings.accumulate,
                       "graphs": not (settings.eager or settings.checkpointing)}     # of Search and train
        self.signal, self.stale = None, []
        self.stored, self.metrics = {}, None        # what checkpoint.pt, what metrics.json holds
        self.path.mkdir(parents=True, exist_ok=True)
        self.open()

    def open(self):
        """Reads what an earlier run has left; every process does.   Raises UsageError if it was another."""
        there = [name for name in self.FILES if (self.path / name).exists()]
        if self.settings.fresh:
            self.stale = there
        elif there:                                 # a checkpoint beside metrics was killed as it tidied up
            with self.reading(there[0]) as path:
                if there[0] not in ("checkpoint.pt", "metrics.json"):
                    raise ValueError("it is of a run that can't be resumed")
                found = load_checkpoint(path) if path.suffix == ".pt" else json.loads(path.read_text())
                before = dict(found["settings"])
            for key in sorted(before.keys() | self.identity.keys()):
                flag, was, now = "--" + key.replace("_", "-"), before.get(key), self.identity.get(key)
                if was != now:
                    raise UsageError(f"{self.path} holds another run: its {flag} is {was}, now it is {now}; "
                                     "name another --out, or start over with --fresh")
            self.stored, self.metrics = (found, None) if path.suffix == ".pt" else ({}, found)
        seen = gather((there, self.stored.get("phase"), self.stored.get("elapsed")))
        if any(other != seen[0] for other in seen):
            raise UsageError(f"the processes find different files in {self.path}: all must share one folder")

    @contextlib.contextmanager
    def reading(self, name):
        """Says in one line that a file of the folder, whose path it gives, does not hold what it should."""
        try:
            yield self.path / name
        except Exception as error:
            raise UsageError(f"{self.path / name} can't be read ({one_line(error)}): start over with "
                             "--fresh, or name another --out") from None

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
        if self.metrics is not None:
            with self.reading("metrics.json"):
                table = results(self.metrics)
            print(f"{self.path} holds this run, finished: nothing to do (--fresh starts over)\n{table}")
            return self.metrics
        self.load()
        if self.stored.get("phase") == "train":
            with self.reading("checkpoint.pt"):
                structure, seconds = Structure(**self.stored["structure"]), self.stored["search_seconds"]
        elif self.given:
            apply(self.model, self.given).detach()                  # refuses it before a file is touched
            structure, seconds = self.given, 0.0
        else:
            structure, seconds = self.search(), self.elapsed()
        self.begin("train", structure=dataclasses.asdict(structure), search_seconds=seconds)
        if rank() == 0:
            structure.save(self.path / "structure.json")
        print(picture(structure, self.model), flush=True)
        peft, best = self.retrain(structure)
        took = self.elapsed()
        if rank() == 0:
            peft.save(self.path / "peft.safetensors")
        metrics = self.measure(peft, structure) | {
            "validation": best, "search_seconds": seconds, "train_seconds": took,
            "ratio": seconds / took if seconds else None, "settings": self.identity}
        if rank() == 0:
            write_atomically(self.path / "metrics.json", json.dumps(metrics, indent=1) + "\n")
            for name in ("checkpoint.pt", *(f".{name}.new" for name in self.FILES)):        # a killed run's
                (self.path / name).unlink(missing_ok=True)
        print(f"{results(metrics)}\nwritten to {self.path}", flush=True)
        return metrics

    def load(self):
        """The device, the data, the backbone and its size, and the tokens."""
        settings, self.device = self.settings, choose_device(self.settings.device)
        if settings.task == "toy":
            torch.set_num_threads(1)                # so small a model only waits for further threads
        self.splits = load_splits(settings.task, settings.data_dir, self.seed)
        self.model, self.tokenizer = load_backbone(settings.model, settings.dtype, self.device, self.seed)
        if self.device.type == "cuda":
            fuse_norms(self.model)
        if settings.checkpointing:
            recompute_activations(self.model)
        self.size = geometry(self.model)["parameters"]
        self.tokens = {key: tokenize(self.tokenizer, examples, settings.max_length)
                       for key, examples in self.splits.items()}
        counts = ", ".join(f"{len(examples):,} {key}" for key, examples in self.splits.items())
        print(f"{settings.task}, seed {self.seed}: {counts}; {settings.model}, {self.size:,} parameters, "
              f"{settings.dtype} on {self.device}", flush=True)
        if self.stored:
            print(f"going on from {self.path / 'checkpoint.pt'}", flush=True)

    def begin(self, phase, **found):
        """Starts a phase and its clock, or goes on with them.   found: what the phases before came to."""
        if self.stored.get("phase") != phase:
            self.stored = {"settings": self.identity, "phase": phase, "log": self.stored.get("log", []),
                           "elapsed": 0.0, **found}
        self.started, self.shown_at = time.monotonic() - self.stored["elapsed"], -math.inf
        self.save()

    def elapsed(self):
        """Seconds that this phase has taken, those before a kill included."""
        return time.monotonic() - self.started

    def save(self, **state):
        """Writes checkpoint.pt and the log so far. Only here does --fresh take older files away."""
        self.saved_at = time.monotonic()
        self.stored |= {**state, "elapsed": self.elapsed()}
        if rank() == 0:
            for name in self.stale:
                (self.path / name).unlink(missing_ok=True)
            self.stale, stream = [], io.BytesIO()
            torch.save(self.stored, stream)
            write_atomically(self.path / "checkpoint.pt", stream.getvalue())
            write_atomically(self.path / "search.jsonl",
                             "".join(json.dumps(line) + "\n" for line in self.stored["log"]))

    def after_step(self, step, left, text, state, more="", keep=False):
        """After every step: shows how it goes; saves if it is time; ends the run if a signal came.

        left: steps to go.   text, more: what to show before and behind the time left.   state: a function,
        that of the phase.   keep: the line stays on the screen. On a terminal it renews itself.
        """
        now, terminal, every = time.monotonic(), sys.stdout.isatty(), self.settings.save_every
        if keep or now - self.shown_at > (0.2 if terminal else 10):
            self.shown_at = now
            text = f"{text}  left {clock(left * self.elapsed() / step)}{more}"
            if terminal:
                text = "\r\033[K" + text[:shutil.get_terminal_size().columns - 1]
            print(text, end="" if terminal and not keep else "\n", flush=True)
        told = torch.tensor(self.signal or 0)
        all_reduce(told, dist.ReduceOp.MAX)         # all processes end after the same step
        if told or (step % every == 0 if every else now - self.saved_at > 60):
            self.save(**{self.stored["phase"]: state()})
        if told:
            print(f"\nstopped by signal {int(told)} after step {step}: the same command, without --fresh, "
                  "goes on from here", flush=True)
            raise SystemExit(128 + int(told))

    def search(self):
        """The search, or what is left of it.   Returns a Structure."""
        settings, tokens, size = self.settings, self.tokens["train"], self.size
        shuffle = torch.Generator().manual_seed(derive(self.seed, 11))
        order = [tokens[i] for i in torch.randperm(len(tokens), generator=shuffle).tolist()]
        batches = [Batches(order[half::2], settings.batch_size, self.device, derive(self.seed, 12 + half))
                   for half in (0, 1)]
        space = Space(self.model, settings.space, settings.ranks, self.seed)
        steps, warmup = (n * len(batches[0]) for n in (settings.search_epochs, settings.warmup_epochs))
        budget = int(settings.budget if settings.budget >= 1 else settings.budget * size)
        most = max(steps, 2 * len(space), 100)      # one a step, and each module can be fixed and removed
        if settings.triggers > most:
            raise UsageError(f"--triggers {settings.triggers} are more than {steps} steps and {len(space)} "
                             f"modules could use: give {most} or fewer")
        print(f"search: {len(space)} modules of {', '.join(kinds_of(settings.space))}, "
              f"{space.costs[:, -1].sum():,} parameters at rank {settings.ranks[-1]}\n"
              f"budget {budget:,} ({1e4 * budget / size:.2f} of 10,000), at most {steps} steps, triggers "
              f"from step {max(warmup, settings.window) + 1} on", flush=True)
        search = Search(self.model, space, budget, steps, warmup, settings.triggers, settings.tau,
                        settings.gamma, settings.window, settings.lr, settings.arch_lr, **self.common)
        if "search" in self.stored:
            with self.reading("checkpoint.pt"):
                search.load_state_dict(self.stored["search"])
        self.begin("search")

        def after_step(search, line):
            self.stored["log"].append({**line, "time": round(self.elapsed(), 3)})
            step, done = line["step"], line["triggers"]
            pace = done / max(1, step - warmup)                                  # triggers a step
            left = min(steps - step, (settings.triggers - done) / pace if pace > 0 else math.inf)
            self.after_step(step, left, f"search {step}/{steps}  loss {line['loss_train']:.3f}  beta "
                            f"{line['beta']:.2f}  E {line['expected']:,.0f}/{budget:,}  kept {line['kept']}  "
                            f"triggers {done}/{settings.triggers}", search.state_dict, keep=left == 0)

        structure = search.run(*batches, settings.model, after_step)
        if search.ended_early:
            print(f"the steps ended before trigger {settings.triggers}: the last {search.ended_early} "
                  "selections were made at once; more --search-epochs or fewer --triggers would spread them")
        space.detach()
        return structure

    def retrain(self, structure):
        """Trains a found structure anew on all of train.   Returns (Peft, best validation score)."""
        epochs, metric = self.settings.epochs, self.task.metric
        peft = apply(self.model, structure, derive(self.seed, 14))
        batches = Batches(self.tokens["train"], self.settings.batch_size, self.device, derive(self.seed, 15))

        def after_step(state, line):
            step, steps, score = line["step"], line["steps"], line.get("score")
            more = "" if score is None else (f"  epoch {step // len(batches)}/{epochs}: validation {metric} "
                                             f"{score:.2f}, best {state['best']:.2f}")
            self.after_step(step, steps - step, f"train {step}/{steps}  loss {line['loss']:.3f}",
                            lambda: state, more, keep=score is not None)

        best = train(self.model, peft, batches, lambda: self.score("validation"), epochs, self.settings.lr,
                     state=self.stored.get("train"), after_step=after_step, **self.common)
        return peft, best

    def score(self, split):
        """The task's score, in per cent, of what the model generates for a split."""
        size = max(1, 8 * self.settings.batch_size // self.settings.accumulate)
        predictions = predict(self.model, self.tokenizer, self.tokens[split], size, self.device)
        return METRICS[self.task.metric](predictions, [e.answers for e in self.splits[split]])

    def measure(self, peft, structure):
        """The one look at the test split: with the modules, without them, and the most frequent answer."""
        score = self.score("test")
        peft.detach()
        untouched, metric, test = self.score("test"), self.task.metric, self.splits["test"]
        common = Counter(e.target for e in self.splits["train"]).most_common(1)[0][0]
        count = peft.weights.numel()                                # counted from the tensors themselves
        cuda = self.device.type == "cuda"
        return {"task": self.settings.task, "metric": metric, "seed": self.seed, "space": structure.space,
                "test": score, "test_untouched": untouched,
                "test_most_frequent": METRICS[metric]([common] * len(test), [e.answers for e in test]),
                "modules": len(structure.modules), "parameters": count, "budget": structure.budget,
                "backbone_parameters": self.size, "per_ten_thousand": 1e4 * count / self.size,
                "device": torch.cuda.get_device_name(self.device) if cuda else self.device.type,
                "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                             "transformers": transformers.__version__, "numpy": np.__version__}}


def clock(seconds):
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def results(m):
    """The table at a run's end, from what metrics.json holds."""
    head = f"{m['task']}, seed {m['seed']}, {m['metric']} in per cent"
    times = "" if m["ratio"] is None else (f"\nsearch {clock(m['search_seconds'])}, re-training "
                                           f"{clock(m['train_seconds'])} (ratio {m['ratio']:.2f})")
    return "\n".join([
        head.ljust(44) + "validation    test    parameters",
        "  most frequent answer".ljust(54) + f"{m['test_most_frequent']:8.2f}",
        "  the backbone, untouched".ljust(54) + f"{m['test_untouched']:8.2f}{0:14,}",
        "  with the found structure, re-trained".ljust(44) + f"{m['validation']:10.2f}{m['test']:8.2f}"
        f"{m['parameters']:14,}  ({m['per_ten_thousand']:.2f} of 10,000)"]) + times


def picture(structure, model):
    """A structure as text: a row a layer, a column a place, its rank, x without one, . if left out.

    n0, n1, n2 are the layer norms before a layer's first, second and third block.
    """
    kept = {(m["name"], m["kind"]): str(m["rank"] or "x") for m in structure.modules}
    cells, rows = {kind: {} for kind in kinds_of(structure.space)}, []          # kind: {column: {row: text}}
    columns = {"SelfAttention": "attn", "DenseReluDense": "ffn", "final_layer_norm": "n0"}
    for name, role, _ in places(model):
        stack, *middle, last = name.split(".")
        row = f"{stack} {middle[1] if middle else 'end':>3}"
        label = "n" + middle[3] if last == "layer_norm" else columns.get(last, last.replace("wi_", "wi"))
        for kind in cells:
            if role in KINDS[kind].roles:
                cells[kind].setdefault(f"{label:>2}", {})[row] = kept.get((name, kind), ".")
                rows += [row] if row not in rows else []
    blocks = [[" " * 11] * 2 + rows]                                      # side by side, a block a kind
    for kind, found in cells.items():
        lines = [kind, "".join(f" {label}" for label in found)]
        for row in rows:
            lines.append("".join(f" {column.get(row, ''):>{len(label)}}" for label, column in found.items()))
        blocks.append([f"{line:>{max(len(lines[1]), len(kind) + 1)}}" for line in lines])
    lines = [" ".join(parts) for parts in zip(*blocks)]
    lines.append("  a number: the rank kept there; x: kept, without a rank; .: left out; n: a layer norm")
    for kind in (*cells, "together"):
        counts = [m["parameters"] for m in structure.modules if kind in (m["kind"], "together")]
        lines.append(f"  {kind:<11}{len(counts):>5} modules {sum(counts):>10,} parameters "
                     f"{1e4 * sum(counts) / structure.geometry['parameters']:9.2f} of 10,000")
    return "\n".join(lines) + f"  (budget {structure.budget:,})"


def join():
    """Joins torchrun's other processes, if any; all but the first fall silent.   Returns whether."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return False
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")
    return True


def is_first_to_tell(message):
    """Whether no other process has told a person the same: torchrun's store counts, so that none waits."""
    if not dist.is_torchelastic_launched():
        return True
    with contextlib.suppress(Exception):             # a store that is gone
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(host, port, timeout=timedelta(seconds=9)).add(message, 1) == 1
    return True


def main(arguments=None):
    """The program. Returns the exit code: 0, or 2 after a person's mistake."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        settings = parse(arguments)
        joined, finished = join(), []
        kind = settings.space.replace(",", "+")
        if settings.structure:                       # named after the folder that the structure is from
            kind = f"from-{Path(settings.structure).resolve().parent.name}"
        for seed in settings.seed:
            out = Path(settings.out or f"runs/{settings.task}-{kind}-{seed}")
            if settings.out and len(settings.seed) > 1:
                out /= f"seed-{seed}"
            with deterministic(), Run(settings, seed, out) as run:
                finished.append(run.work())
        if len(finished) > 1:
            tests, metric = [m["test"] for m in finished], TASKS[settings.task].metric
            print(f"{settings.task}: test {metric} {np.mean(tests):.2f} ± {np.std(tests, ddof=1):.2f} "
                  f"over {len(tests)} seeds")
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
    if is_first_to_tell(message):
        print(f"bipeft.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
