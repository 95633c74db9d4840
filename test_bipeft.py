"""Tests of bipeft.py, in its order: equations, modules, spaces, Algorithm 1, tasks, command line.

    python -m pytest -q test_bipeft.py            all, on a CPU
    python -m pytest -q -k eq_                    the equations alone

An equation has a test against numbers worked out by hand, with the arithmetic in a comment, and one
against an oracle: a loop over modules in the paper's notation, on random inputs.
"""

import copy
import dataclasses
import datetime
import errno
import functools
import inspect
import io
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"                # the hub is out of reach, and is known to be at once

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import bipeft
from bipeft import UsageError

SEEDS = range(12)
RANKS = (1, 4, 8)
KINDS = ("lora", "adapter_lr", "bitfit", "lnfit", "serial", "parallel", "prefix")
RANKED = ("lora", "adapter_lr", "serial", "parallel", "prefix")
ADDING = tuple(kind for kind in KINDS if kind != "prefix")          # these start as the zero function


# ==================================================================================================
# What several tests share
# ==================================================================================================


@pytest.fixture(scope="session", autouse=True)
def quick_and_tidy(tmp_path_factory):
    """One thread, since on tensors this small a second one only waits; the data cache goes to a temporary folder."""
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


UNEVEN = {"num_layers": 1, "num_decoder_layers": 3, "d_ff": 40, "d_kv": 6, "num_heads": 3}


def tiny_t5(family="t5", seed=0, **changes):
    """A random T5 of 2 + 2 layers in evaluation mode, with weights large enough to matter."""
    sizes = dict(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
                 decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    config, model = {"t5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
                     "mt5": (transformers.MT5Config, transformers.MT5ForConditionalGeneration)}[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model(config(**{**sizes, **changes})).eval()


def some_batch(seed=0, size=3, length=7, answer=4):
    """A batch whose last row is one token shorter than the others."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(size, length, dtype=torch.long)
    mask[-1, -1] = 0
    return {"input_ids": torch.randint(2, 40, (size, length), generator=generator) * mask, "attention_mask": mask,
            "labels": torch.randint(2, 40, (size, answer), generator=generator)}


def tiny(kind, task, **changes):
    """A random model of a family in evaluation mode; its norms' weights and all biases are random, too."""
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=32, initializer_range=0.2, pad_token_id=0, bos_token_id=2, eos_token_id=1,
                 hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, use_cache=False)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(transformers, f"AutoModelFor{task}").from_config(config).eval()
        for p in model.parameters():
            if p.dim() == 1:
                p += 0.3 * torch.randn(p.shape)
    return model


CAUSAL = {
    "llama": lambda: tiny("Llama", "CausalLM", num_key_value_heads=2),                # grouped queries
    "qwen3": lambda: tiny("Qwen3", "CausalLM", num_key_value_heads=2, head_dim=6),    # norms of queries and keys
    "gemma": lambda: tiny("Gemma", "CausalLM", num_key_value_heads=1, head_dim=10),   # norms of 1 + w
}
FAMILIES = {"t5": lambda: tiny_t5(seed=3, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
            "bert": lambda: tiny("Bert", "SequenceClassification"),
            "roberta": lambda: tiny("Roberta", "SequenceClassification"), **CAUSAL}


@functools.cache
def built_once(name):
    return FAMILIES[name]()


def family(name):
    """A tiny model of a family of its own for each test."""
    return copy.deepcopy(built_once(name))


def batch_for(name, seed=0):
    """A batch with labels: an answer for T5, classes for BERT's, the next tokens for Llama's."""
    batch = some_batch(seed)                                                # its last row ends in padding
    if name in CAUSAL:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    elif name != "t5":
        batch["labels"] = torch.tensor([0, 1, 1])
    return batch


def every(kind, model, rank=4):
    """(place, kind, rank) of all places of a model that take the kind."""
    return [(name, kind, rank) for name, kind in bipeft.places_by_kind(model, [kind])]


def ranks_at(k, n):
    """[n, 3]: the k-th of three ranks for all n modules."""
    return F.one_hot(torch.full((n,), k), 3).float()


@torch.no_grad()
def logits_of(model, batch=None):
    return model(**(batch or some_batch())).logits


@torch.no_grad()
def cut_from(large, small):
    """Gives modules the leading slices of larger ones' weights."""
    for m_large, m in zip(large, small):
        for q, p in zip(m_large.parameters(), m.parameters()):
            p.copy_(q[tuple(slice(n) for n in p.shape)])


@torch.no_grad()
def randomise(peft, scale=0.3, seed=0):
    """Random weights in place of the initial ones, so that every module does something."""
    generator = torch.Generator().manual_seed(seed)
    for p in peft.tensors:
        p.copy_(scale * torch.randn(p.shape, generator=generator))
    return peft


over = functools.partial(pytest.mark.parametrize, "seed")           # makes a test of one random case a test of many


def close(found, expected, tolerance=1e-5):
    return torch.allclose(torch.as_tensor(found).double(), torch.as_tensor(expected).double(),
                          rtol=tolerance, atol=tolerance)


def snapshot(model):
    """All that attaching might touch: tensors by name, what may learn, attention functions, hooks."""
    return {"values": {name: p.clone() for name, p in model.state_dict().items()},
            "learn": {name: p.requires_grad for name, p in model.named_parameters()},
            "attention": {name: m.config._attn_implementation for name, m in model.named_modules()
                          if hasattr(m, "config")},
            "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs),
                             len(m._forward_pre_hooks_with_kwargs)) for name, m in model.named_modules()}}


def same(a, b):
    """Whether two snapshots are one, bit for bit."""
    return (all(a[key] == b[key] for key in ("learn", "attention", "hooks"))
            and a["values"].keys() == b["values"].keys()
            and all(p.dtype == b["values"][name].dtype and torch.equal(p, b["values"][name])
                    for name, p in a["values"].items()))


class Wrapped(nn.Module):
    """Somebody's model: a T5 inside, and a forward that returns its loss in a form of their choice."""

    def __init__(self, t5, form=lambda loss: loss):
        super().__init__()
        self.inner, self.form = t5, form

    def forward(self, **batch):
        return self.form(self.inner(**batch).loss)


def tensor(*values, **more):
    return torch.tensor(values, **more)


def flags(*values):
    return torch.tensor(values).bool()

# ==================================================================================================
# 1. The equations
# ==================================================================================================


def random_case(seed):
    """A random moment of a search: up to 12 modules at up to 4 ranks, some removed, some fixed."""
    rng = random.Random(seed)
    n, k = rng.randint(1, 12), rng.randint(1, 4)
    kept = [rng.random() < 0.7 for _ in range(n)]
    generator = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        n=n, k=k, rng=rng, kept=kept, fixed=[not on or rng.random() < 0.3 for on in kept],
        counts=[sorted(rng.sample(range(1, 90), k)) for _ in range(n)], choice=[rng.randrange(k) for _ in range(n)],
        smoothed=[s / 7 for s in rng.sample(range(-40, 60), n)],              # no two alike
        dim=sorted(rng.sample(range(1, 17), k)), ranked=[rng.random() < 0.8 for _ in range(n)],
        theta=torch.randn(n, 2, generator=generator), phi=torch.randn(n, k, generator=generator),
        budget=rng.randint(0, 90 * n), generator=generator)


def random_modules(seed):
    """Weights and two gradients of up to 9 modules of 1 to 6 numbers each, as lists of lists."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, 6) for _ in range(rng.randint(1, 9))]
    return [[[rng.gauss(0, 1) for _ in range(length)] for length in lengths] for _ in range(3)]


def softmax(row):
    powers = [math.exp(x) for x in row]
    return [p / sum(powers) for p in powers]


def cosine(a, b):
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b)) / norms if norms else 0.0


def test_eq_1_sensitivity_by_hand():
    # 1 + 0.5·4 = 3 and 2 + (-1)·3 = -1
    assert bipeft.sensitivity(tensor(1.0, 2.0), tensor(4.0, 3.0), tensor(0.5, -1.0)).tolist() == [3, -1]


@over(SEEDS)
def test_eq_1_to_3_against_a_loop(seed):
    w, g_tra, g_val = random_modules(seed)
    f_tra, f_val, alpha, s = [], [], [], []
    for n in range(len(w)):
        f_tra.append(sum(abs(x * g) for x, g in zip(w[n], g_tra[n])) / len(w[n]))
        f_val.append(sum(abs(x * g) for x, g in zip(w[n], g_val[n])) / len(w[n]))
        alpha.append(cosine(g_tra[n], g_val[n]))
        s.append(f_tra[n] + alpha[n] * f_val[n])
    lengths = tensor(*map(len, w))
    w, g_tra, g_val = (tensor(*sum(rows, [])) for rows in (w, g_tra, g_val))                # end to end
    found_tra, found_val = (bipeft.magnitude(w, g, lengths, lengths) for g in (g_tra, g_val))
    found_alpha = bipeft.alignment(g_tra, g_val, lengths)
    assert close(found_tra, f_tra) and close(found_val, f_val) and close(found_alpha, alpha)
    assert close(bipeft.sensitivity(found_tra, found_val, found_alpha), s)
    assert all(bipeft.alignment(g_tra, sign * g_tra, lengths).abs().max() <= 1 for sign in (1, -1))      # rounded, too


def test_eq_2_magnitude_by_hand():
    # M_1 = (1, -2) with G = (3, 0.5): (|3| + |-1|) / 2 = 2.      M_2 = (4) with G = (-0.25): 1 / 1 = 1
    found = bipeft.magnitude(tensor(1.0, -2.0, 4.0), tensor(3.0, 0.5, -0.25), tensor(2, 1), tensor(2, 1))
    assert found.tolist() == [2, 1]
    # once the rank is fixed, (2, 1, 5) with G = (1, -4, 0), of which two are in use: (2 + 4 + 0) / 2 = 3, and not 6 / 3
    assert bipeft.magnitude(tensor(2.0, 1.0, 5.0), tensor(1.0, -4.0, 0.0), tensor(3), tensor(2)).tolist() == [3]


def test_eq_3_alignment_by_hand():
    # (3, 4)·(4, 3) = 24 over 5·5: 0.96.   (1)·(-2) over 1·2: -1.   (0, 0) against anything: 0, never NaN
    g_tra, g_val = tensor(3.0, 4.0, 1.0, 0.0, 0.0, 7.0), tensor(4.0, 3.0, -2.0, 1.0, 2.0, 0.0)
    assert close(bipeft.alignment(g_tra, g_val, tensor(2, 1, 2, 1)), [0.96, -1, 0, 0], 1e-6)
    # as the first, times 1e-18: the product of the two squared norms, 25e-36 · 25e-36, is below float32
    assert close(bipeft.alignment(1e-18 * tensor(3.0, 4.0), 1e-18 * tensor(4.0, 3.0), tensor(2)), [0.96], 1e-5)
    # 1e-30 squared is 0 in float32: as a gradient of zero
    assert bipeft.alignment(tensor(1e-30), tensor(1e-30), tensor(1)).tolist() == [0]


def test_eq_4_smooth_by_hand():
    # 0.85·2 + 0.15·4 = 1.7 + 0.6 = 2.3;  gamma = 1 keeps the past, gamma = 0 forgets it
    assert close(bipeft.smooth(tensor(2.0), tensor(4.0), 0.85), [2.3])
    assert [bipeft.smooth(tensor(2.0), tensor(4.0), gamma).item() for gamma in (1, 0)] == [2, 4]


@over(SEEDS)
def test_eq_4_smooth_against_its_closed_form(seed):
    # unrolled from s̄_0 = 0:  s̄_t = (1 - γ) · Σ_j γ^(t-j) · s_j
    rng, smoothed = random.Random(seed), torch.zeros(1)
    gamma, s = rng.random(), [rng.uniform(-2, 2) for _ in range(9)]
    for value in s:
        smoothed = bipeft.smooth(smoothed, tensor(value), gamma)
    assert close(smoothed, [(1 - gamma) * sum(gamma ** (8 - j) * s[j] for j in range(9))])


def test_eq_3_2_2_importance_indicator_by_hand_stops_at_the_first_that_would_pass_the_budget():
    # by s̄: 0 (40), 2 (40 + 30 = 70), 3 (90 > 80, stop); 1 with its 10 would fit but comes later
    s, sizes, everything = tensor(5.0, 1.0, 4.0, 3.0), tensor(40.0, 10.0, 30.0, 20.0), flags(1, 1, 1, 1)
    assert bipeft.importance_indicator(s, sizes, everything, 80).tolist() == [True, False, True, False]
    assert bipeft.importance_indicator(s, sizes, everything, 90).tolist() == [True, False, True, True]   # exactly B
    # without module 0: 30, 50, 60
    assert bipeft.importance_indicator(s, sizes, flags(0, 1, 1, 1), 80).tolist() == [False, True, True, True]
    assert not bipeft.importance_indicator(s, sizes, everything, 39).any()
    # of equals the earlier first: 0 (40), 1 (50), 2 (80), 3 (100 > 80)
    assert bipeft.importance_indicator(torch.ones(4), sizes, everything, 80).tolist() == [True, True, True, False]


@over(SEEDS)
def test_eq_3_2_2_importance_indicator_against_a_loop(seed):
    c = random_case(seed)
    sizes = [row[k] for row, k in zip(c.counts, c.choice)]
    indicator, total = [False] * c.n, 0
    for n in sorted(range(c.n), key=lambda n: -c.smoothed[n]):
        if c.kept[n]:
            if total + sizes[n] > c.budget:
                break
            indicator[n], total = True, total + sizes[n]
    found = bipeft.importance_indicator(tensor(*c.smoothed), tensor(*sizes).double(), flags(*c.kept), c.budget)
    assert found.tolist() == indicator and total <= c.budget


def test_eq_5_stability_by_hand():
    # cos((1,1,0), (1,0,0)) = 1/√2, cos((1,0,0), (1,0,1)) = 1/√2, mean 0.7071; the oldest row is not read
    rows = flags([0, 0, 1], [1, 1, 0], [1, 0, 0], [1, 0, 1])
    assert close(bipeft.stability(rows, 2), 0.5 ** 0.5)
    # cos((0,0,1), (1,1,0)) = 0 comes in with H = 3: 2/√2 / 3
    assert close(bipeft.stability(rows, 3), 2 * 0.5 ** 0.5 / 3)
    # H = 5 terms of 1 over 5; the sum as printed has 6 terms, and would give 1.2. Before there are six indicators: 0
    assert [bipeft.stability(flags(*[[1, 0, 1]] * t), 5) for t in (1, 5, 6, 9)] == [0, 0, 1, 1]
    # empty and empty count as equal, empty and not empty as different: (1 + 0 + 0) / 3
    assert close(bipeft.stability(flags([0, 0], [0, 0], [0, 1], [0, 0]), 3), 1 / 3)
    assert bipeft.stability(flags([0, 0], [0, 0]), 1) == 1


@over(SEEDS)
def test_eq_5_against_a_loop(seed):
    rng = random.Random(seed)
    n, h = rng.randint(2, 6), rng.randint(1, 5)
    t = h + rng.randint(0, 4)                                            # t = h: not yet H pairs
    rows = [[rng.random() < 0.5 for _ in range(n)] for _ in range(t)]
    beta = 0.0
    if t >= h + 1:
        for j in range(t - h, t):
            beta += 1.0 if not any(rows[j]) and not any(rows[j - 1]) else cosine(rows[j], rows[j - 1])
        beta /= h
    found = bipeft.stability(flags(*rows), h)
    assert close(found, beta) and 0 <= found <= 1


def test_eq_6_reduction_by_hand():
    assert bipeft.expected_reduction(1000.0, 400, 10, 4) == 100          # (1000 - 400) / (10 - 4)
    assert bipeft.expected_reduction(1000.0, 400, 10, 9) == 600          # the last trigger takes all that is left
    assert bipeft.expected_reduction(300.0, 400, 10, 0) == -10           # below the budget already
    for done in (10, 11, -1):
        with pytest.raises(ValueError, match="no trigger is left"):
            bipeft.expected_reduction(1000.0, 400, 10, done)


@over(SEEDS)
def test_eq_6_spread_over_all_triggers_ends_at_the_budget(seed):
    rng = random.Random(seed)
    expected, budget, triggers = rng.uniform(100, 999), rng.randint(1, 99), rng.randint(1, 30)
    for done in range(triggers):
        expected -= bipeft.expected_reduction(expected, budget, triggers, done)
    assert math.isclose(expected, budget)


def test_eq_7_expected_parameters_by_hand():
    # 0.5·10 + 0·99 + 1·4 = 9
    assert bipeft.expected_parameters(tensor(0.5, 0.0, 1.0), tensor(10.0, 99.0, 4.0)) == 9


def test_eq_3_3_1_keep_probability_by_hand():
    # softmax(0, 0)[1] = 1/2, softmax(0, ln 3)[1] = 3/4, and 0 for a removed one
    theta = tensor([0.0, 0.0], [0.0, math.log(3)], [5.0, 5.0])
    assert close(bipeft.keep_probability(theta, flags(1, 1, 0)), [0.5, 0.75, 0])


def test_eq_8_expected_size_by_hand():
    # softmax(0, ln 2, 0) = (1/4, 1/2, 1/4): 10/4 + 40/2 + 80/4 = 42.5 while open; q[k* = 1] = 40 once fixed
    phi = tensor([0.0, math.log(2), 0.0]).expand(2, 3)
    found = bipeft.expected_size(phi, tensor([10, 40, 80], [10, 40, 80]), flags(0, 1), tensor(2, 1))
    assert close(found, [42.5, 40])
    # float32 has no 2^24 + 1. Fixed: itself.  Open, softmax(0, 0) = (1/2, 1/2): (2^24 + 1 + 2^24 + 3) / 2 = 2^24 + 2,
    # of which the first half alone, 2^23 + 1/2, would lose its half
    counts = tensor([2 ** 24 + 1, 2 ** 24 + 3], [2 ** 24 + 1, 2 ** 24 + 3], [2 ** 24 + 1, 2 ** 24 + 2])
    found = bipeft.expected_size(torch.zeros(3, 2), counts, flags(1, 0, 0), tensor(0, 0, 0))
    assert found.tolist() == [2 ** 24 + 1, 2 ** 24 + 2, 2 ** 24 + 1.5]


@over(SEEDS)
def test_eq_7_and_8_against_a_loop(seed):
    c = random_case(seed)
    expected, sizes = 0.0, []
    for n in range(c.n):
        weights = softmax(c.phi[n].tolist())
        sizes.append(c.counts[n][c.choice[n]] if c.fixed[n] else sum(q * w for q, w in zip(c.counts[n], weights)))
        expected += c.kept[n] * softmax(c.theta[n].tolist())[1] * sizes[n]
    found = bipeft.expected_size(c.phi, tensor(*c.counts), flags(*c.fixed), tensor(*c.choice))
    assert close(found, sizes)
    assert close(bipeft.expected_parameters(bipeft.keep_probability(c.theta, flags(*c.kept)), found), expected)


def test_eq_3_3_2_modules_to_remove_by_hand_stops_at_the_first_that_does_not_fit():
    # p · C = 5, 20, 30, 25. From the lowest s̄: 1 (20), 3 (20 + 25 = 45), 2 (75 > 50, stop); 0 with its 5 would fit,
    # but is the best
    s, kept = tensor(5.0, 1.0, 4.0, 3.0), flags(1, 1, 1, 1)
    p, sizes = tensor(0.5, 0.5, 1.0, 0.25), tensor(10, 40, 30, 100)
    assert bipeft.modules_to_remove(s, p, sizes, kept, 50).tolist() == [False, True, False, True]
    assert bipeft.modules_to_remove(s, p, sizes, kept, 45).tolist() == [False, True, False, True]         # exactly R_z
    assert bipeft.modules_to_remove(s, p, sizes, kept, 44).tolist() == [False, True, False, False]
    for reduction in (19, 0, -0.5, -1e9):                                # skips nothing to remove 0; below the budget
        assert not bipeft.modules_to_remove(s, p, sizes, kept, reduction).any()
    # module 1 is gone already: 3 (25), 2 (55 > 50)
    assert bipeft.modules_to_remove(s, p, sizes, flags(1, 0, 1, 1), 50).tolist() == [False, False, False, True]
    # of equals the earlier first: 0 (5), 1 (25), 2 (55 > 50)
    assert bipeft.modules_to_remove(torch.ones(4), p, sizes, kept, 50).tolist() == [True, True, False, False]


@over(SEEDS)
def test_eq_3_3_2_modules_to_remove_against_a_loop(seed):
    c = random_case(seed)
    p, sizes = torch.rand(2, c.n, generator=c.generator, dtype=torch.float64)
    reduction, total, gone = c.rng.uniform(-1, 3), 0.0, [False] * c.n
    for n in sorted(range(c.n), key=lambda n: c.smoothed[n]):
        if c.kept[n]:
            if total + (p[n] * sizes[n]).item() > reduction:
                break
            gone[n], total = True, total + (p[n] * sizes[n]).item()
    found = bipeft.modules_to_remove(tensor(*c.smoothed), p, sizes, flags(*c.kept), reduction)
    assert found.tolist() == gone and total <= max(0, reduction)


def test_eq_9_instability_by_hand():
    # (1/2, 1/2) -> (1/4, 3/4): population σ 1/8 of each; KL(first ‖ last) = 1/2 ln 2 + 1/2 ln(2/3) = 1/2 ln(4/3);
    # 1/2 · (1/8 + 1/8) · 1/2 ln(4/3) = 0.01798. (A sample σ gives 0.02543, the other KL 0.01635.)
    assert close(bipeft.rank_instability(tensor([[0.5, 0.5]], [[0.25, 0.75]])), [math.log(4 / 3) / 16], 1e-6)
    # steps in the middle count in σ alone: there and back, KL is 0
    assert bipeft.rank_instability(tensor([[0.5, 0.5]], [[0.9, 0.1]], [[0.5, 0.5]])).tolist() == [0]
    # a weight of zero is no NaN. (0, 1) -> (1/4, 3/4): KL = 0 · log 0 + 1 · ln(4/3), σ 1/8 of each; to (1, 0) it is
    # infinite, the least stable
    assert close(bipeft.rank_instability(tensor([[0.0, 1.0]], [[0.25, 0.75]])), [math.log(4 / 3) / 8], 1e-6)
    assert bipeft.rank_instability(tensor([[0.0, 1.0]], [[1.0, 0.0]])).tolist() == [math.inf]


@over(SEEDS)
def test_eq_9_against_a_loop(seed):
    # σ as numpy.std and KL as scipy.stats.entropy(first, last) define them, a module and a rank at a time
    generator = torch.Generator().manual_seed(seed)
    steps, n, k = 1 + seed % 5, 1 + seed % 4, 1 + seed % 3
    history = torch.randn(steps, n, k, generator=generator, dtype=torch.float64).softmax(-1)
    expected = []
    for rows in history.transpose(0, 1).tolist():                       # a module's [steps][K]
        sigma, divergence = 0.0, 0.0
        for weights in zip(*rows):                                      # a rank's, over the steps
            mean = sum(weights) / steps
            sigma += math.sqrt(sum((x - mean) ** 2 for x in weights) / steps)
            divergence += weights[0] * math.log(weights[0] / weights[-1])
        expected.append(sigma / k * divergence)
    found = bipeft.rank_instability(history)
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert found.min() >= -1e-15                                        # nothing is more stable than standing still


def test_eq_3_4_2_potential_ranks_by_hand():
    # open: Dim[argmax] = 4; fixed at k* = 0: 1; removed, fixed at 2: 0; fixed at 2: 8
    phi = tensor([0.0, 2.0, 1.0]).expand(4, 3)
    found = bipeft.potential_ranks(phi, tensor(1, 4, 8), flags(1, 1, 0, 1), flags(0, 1, 1, 1), tensor(2, 0, 2, 2))
    assert found.tolist() == [4, 1, 0, 8]


def test_eq_10_quota_by_hand():
    # v = (3, 4, 0, 0, 0) and (4, 3, 0, 0, 0): cos 24/25; three open: floor(3 · 0.96 / 2) = floor(1.44) = 1
    before, now = tensor(3.0, 4.0, 0.0, 0.0, 0.0), tensor(4.0, 3.0, 0.0, 0.0, 0.0)
    assert bipeft.rank_quota(before, now, flags(0, 0, 0, 1, 1), 2) == 1
    # unchanged, cos exactly 1: floor(4 / 2) = 2, not the 1 that 0.9999999 would give
    assert bipeft.rank_quota(before, before, flags(0, 0, 0, 0, 1), 2) == 2
    # floor(2 · 0.96 / 2) = 0; all zero: 0, and one module alone: 1
    assert bipeft.rank_quota(before, now, flags(0, 0, 1, 1, 1), 2) == 0
    assert [bipeft.rank_quota(v, v, flags(0), 1).item() for v in (tensor(0.0), tensor(1.0))] == [0, 1]


def test_eq_3_4_2_ranks_to_fix_by_hand():
    # of the open ones 0, 1, 2 with λ 0.3, 0.1, 0.2 the two lowest; 3 is the lowest but fixed
    instability, fixed = tensor(0.3, 0.1, 0.2, 0.0), flags(0, 0, 0, 1)
    assert bipeft.ranks_to_fix(instability, fixed, tensor(2)).tolist() == [False, True, True, False]
    assert bipeft.ranks_to_fix(instability, fixed, tensor(0)).tolist() == [False] * 4
    assert bipeft.ranks_to_fix(instability, fixed, 9).tolist() == [True, True, True, False]
    assert bipeft.ranks_to_fix(torch.zeros(4), fixed, 1).tolist() == [True, False, False, False]     # ties: the first


@over(SEEDS)
def test_eq_10_potential_ranks_and_ranks_to_fix_against_a_loop(seed):
    c = random_case(seed)
    phi_before = torch.randn(c.n, c.k, generator=c.generator)

    def v_of(phi):
        best = [max(range(c.k), key=lambda k: phi[n, k].item()) for n in range(c.n)]
        index = [c.choice[n] if c.fixed[n] else best[n] for n in range(c.n)]
        return [c.dim[index[n]] * (c.kept[n] and c.ranked[n]) for n in range(c.n)]

    before, now, remaining = v_of(phi_before), v_of(c.phi), c.rng.randint(1, 4)
    shows, fixed, dim, choice = flags(*c.kept) & flags(*c.ranked), flags(*c.fixed), tensor(*c.dim), tensor(*c.choice)
    found = [bipeft.potential_ranks(phi, dim, shows, fixed, choice) for phi in (phi_before, c.phi)]
    assert [v.tolist() for v in found] == [before, now]
    y = math.floor(c.fixed.count(False) * cosine(before, now) / remaining + 1e-9)
    quota = bipeft.rank_quota(*found, fixed, remaining)
    assert quota == y

    instability = torch.rand(c.n, generator=c.generator)
    lowest = sorted((n for n in range(c.n) if not c.fixed[n]), key=lambda n: instability[n].item())[:y]
    assert bipeft.ranks_to_fix(instability, fixed, quota).nonzero().flatten().tolist() == sorted(lowest)


@over(SEEDS)
def test_eq_3_5_gumbel_softmax_is_one_hot_forwards_and_soft_backwards(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 3, generator=generator).requires_grad_()
    noise, towards = bipeft.gumbel_noise((5, 3), generator), torch.randn(5, 3, generator=generator)
    temperature = 1 + seed / 3
    hard = bipeft.gumbel_softmax(logits, noise, temperature)
    assert set(hard.flatten().tolist()) <= {0.0, 1.0} and hard.sum(1).tolist() == [1] * 5      # exactly
    assert torch.equal(hard.argmax(1), (logits + noise).argmax(1))
    (through,) = torch.autograd.grad((hard * towards).sum(), logits)
    soft = torch.exp((logits + noise) / temperature)
    (expected,) = torch.autograd.grad((soft / soft.sum(1, keepdim=True) * towards).sum(), logits)
    assert close(through, expected, 1e-6)


def test_eq_3_5_gumbel_softmax_samples_are_as_frequent_as_softmax_says():
    # 20,000 draws: five deviations of a share p are at most 5·√(1/4 / 20000) = 0.018
    logits = tensor(0.0, 1.0, -1.0)
    noise = bipeft.gumbel_noise((20_000, 3), torch.Generator().manual_seed(0))
    share = bipeft.gumbel_softmax(logits.expand(20_000, 3), noise, 5.0).mean(0)
    assert (share - logits.softmax(0)).abs().max() < 0.018


def test_eq_3_5_gumbel_noise_is_finite_and_of_its_generator_alone(monkeypatch):
    before = torch.get_rng_state()
    a, b = (bipeft.gumbel_noise((1000,), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(before, torch.get_rng_state())
    # the distribution's mean is Euler's constant, 0.577, its deviation π/√6 = 1.28: 5 · 1.28/√1000 = 0.2
    assert abs(a.mean() - 0.577) < 0.2
    monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.zeros(shape))        # what it may draw
    assert bipeft.gumbel_noise((3,), None).isfinite().all()


@over(SEEDS)
def test_section_1_permuting_the_modules_permutes_the_answers(seed):
    c = random_case(seed)
    s, kept, fixed, choice, counts = (torch.tensor(x) for x in (c.smoothed, c.kept, c.fixed, c.choice, c.counts))
    instability, p = torch.rand(2, c.n, generator=c.generator)
    history = torch.randn(4, c.n, c.k, generator=c.generator).softmax(-1)
    rows = torch.rand(4, c.n, generator=c.generator) < 0.5

    def answers(at):
        sizes = bipeft.expected_size(c.phi[at], counts[at], fixed[at], choice[at])
        return (sizes, bipeft.importance_indicator(s[at], sizes, kept[at], c.budget),
                bipeft.modules_to_remove(s[at], p[at], sizes, kept[at], c.budget),
                bipeft.rank_instability(history[:, at]), bipeft.ranks_to_fix(instability[at], fixed[at], 2),
                bipeft.potential_ranks(c.phi[at], tensor(*c.dim), kept[at], fixed[at], choice[at]))

    order = torch.randperm(c.n, generator=c.generator)
    for straight, permuted in zip(answers(torch.arange(c.n)), answers(order)):
        assert close(straight[order], permuted)
    assert close(bipeft.stability(rows, 3), bipeft.stability(rows[:, order], 3))


@over(SEEDS)
def test_section_1_removal_only_grows_and_ends_at_the_budget(seed):
    # p = 1 throughout: after Z triggers what is kept costs at most B plus the one module that did not fit R_z
    c = random_case(seed)
    s, sizes, kept = tensor(*c.smoothed), tensor(*[row[-1] for row in c.counts]).double(), torch.ones(c.n).bool()
    for done in range(5):
        reduction = bipeft.expected_reduction((sizes * kept).sum(), c.budget, 5, done)
        gone = bipeft.modules_to_remove(s, kept.double(), sizes, kept, reduction)
        assert not (gone & ~kept).any()
        kept &= ~gone
    assert (sizes * kept).sum() < c.budget + sizes.max()


def test_section_1_fill_budget_by_hand():
    # kept: 0 (rank 1: 10), 1 (40), 2 (30) = 80 > 60: the least sensitive kept, 2 (s̄ 1), goes: 50, so 10 are free.
    # These are offered by s̄: 3 (s̄ 5) takes its largest rank that fits, 8 and not 20; the last 2 fit nothing.
    kept, choice = bipeft.fill_budget([9, 7, 1, 5], [[10, 20], [20, 40], [15, 30], [8, 20]],
                                      [True, True, True, False], [0, 1, 1, 1], 60)
    assert (kept, choice) == ([True, True, False, True], [0, 1, 1, 0])
    # 90 are free, but module 0 was fixed at rank index 0 by Eq. 9-10, and stays there; what fits exactly stays, too
    assert bipeft.fill_budget([1.0], [[10, 20]], [True], [0], 100) == ([True], [0])
    assert bipeft.fill_budget([2, 1, 3], [[10]] * 3, [True, True, False], [0] * 3, 20) == ([True, True, False], [0] * 3)
    # one parameter less: the less sensitive one goes, and the 9 that are then free are too few for the third
    found = bipeft.fill_budget([2, 1, 3], [[10]] * 3, [True, True, False], [0] * 3, 19)
    assert found == ([True, False, False], [0] * 3)


@over(range(40))
def test_section_1_fill_budget_against_a_loop(seed):
    c = random_case(seed)
    kept, choice = list(c.kept), list(c.choice)

    def total():
        return sum(c.counts[n][choice[n]] for n in range(c.n) if kept[n])

    while total() > c.budget:
        kept[min((n for n in range(c.n) if kept[n]), key=lambda n: c.smoothed[n])] = False
    for n in sorted((n for n in range(c.n) if not kept[n]), key=lambda n: -c.smoothed[n]):
        for k in reversed(range(c.k)):
            if not kept[n] and total() + c.counts[n][k] <= c.budget:
                kept[n], choice[n] = True, k
    given = list(c.kept), list(c.choice)
    found = bipeft.fill_budget(c.smoothed, c.counts, c.kept, c.choice, c.budget)
    assert found == (kept, choice) and (c.kept, c.choice) == given           # the arguments are left alone
    assert total() <= c.budget and all(c.budget - total() < c.counts[n][0] for n in range(c.n) if not kept[n])


# ==================================================================================================
# 2. The searchable modules
# ==================================================================================================

at_every_place = pytest.mark.parametrize("kind, role", [(kind, role) for kind in ADDING
                                                        for role in bipeft.KINDS[kind].roles])


@functools.cache
def uneven_places():
    """{role: a place}: of a T5 with 3 heads of width 6 and d_ff = 40, or of BERT, whose block is no module."""
    models = tiny("Bert", "SequenceClassification"), tiny_t5(**UNEVEN)
    return {role: place for model in models for _, role, place in reversed(bipeft.places_of(model))}


def a_module(kind, rank=8, role=None, scale=None):
    """(module, x, y): a module for an uneven place, and an input and output of that. scale: of random weights."""
    place = uneven_places()[role or bipeft.KINDS[kind].roles[0]]
    module = bipeft.KINDS[kind](place, rank, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    if scale is not None:
        for p in module.parameters():
            p.data = scale * torch.randn(p.shape, generator=generator)
    ins, outs = (place.in_features, place.out_features) if isinstance(place, nn.Linear) else (32, 32)
    return module, torch.randn(2, 5, ins, generator=generator), torch.randn(2, 5, outs, generator=generator)


def leading(rank, most=8):
    """A rank mask, [most]."""
    return (torch.arange(most) < rank).float()


def under(module, gate, mask):
    """The module as a search would have it: under a gate, a scalar, and a rank mask, [R]."""
    module.architecture = {"gate": gate, "mask": mask[:, None], "gate·mask": gate * mask[:, None],
                           **dict(module.named_parameters())}
    return module


@at_every_place
def test_section_2_a_new_module_is_the_zero_function_and_every_tensor_of_it_learns(kind, role):
    """It gives exactly y. One step of descent moves what started at zero, and then no gradient is dead."""
    module, x, y = a_module(kind, role=role)
    assert torch.equal(module(x, y), y)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    (module(x, y) * y.flip(1)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    (module(x, y) * y.flip(1)).sum().backward()
    for name, p in module.named_parameters():
        assert (p.grad != 0).float().mean() > 0.9, f"{name} can't learn"


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("kind", sorted(set(RANKED) & set(ADDING)))
def test_section_2_a_smaller_rank_is_the_leading_slice(kind, rank):
    """A mask gives what a module that holds the slice gives; the slice's gradient is that one's, outside of it zero."""
    big, x, y = a_module(kind, 8, scale=0.5)
    small, _, _ = a_module(kind, rank)
    cut_from([big], [small])
    assert rank == 8 or bipeft.count_of(small) < bipeft.count_of(big)
    expected, found = small(x, y), under(big, torch.ones(()), leading(rank))(x, y)
    assert close(found, expected) and not torch.allclose(expected, y)
    for out in (found, expected):
        (out * y.flip(1)).sum().backward()
    for q, p in zip(big.parameters(), small.parameters()):
        inside = tuple(slice(n) for n in p.shape)
        assert close(q.grad[inside], p.grad, 1e-4) and p.grad.any()
        q.grad[inside] = 0
        assert not q.grad.any()


@at_every_place
def test_section_2_a_shut_gate_adds_exactly_zero_and_has_a_gradient_to_open(kind, role):
    """y + gate · f: at 0 it is y, bit for bit, its derivative by the gate is f, and by the weights 0."""
    module, x, y = a_module(kind, role=role, scale=0.5)
    added = under(module, torch.ones(()), leading(4))(x, y).detach() - y
    gate = torch.zeros((), requires_grad=True)
    found = under(module, gate, leading(4))(x, y)
    (found * y.flip(1)).sum().backward()
    assert torch.equal(found, y) and added.abs().max() > 0.1
    assert close(gate.grad, (added * y.flip(1)).sum(), 1e-4) and gate.grad != 0
    assert not any(p.grad.any() for p in module.parameters())


FORMULAS = {      # of a module m, x and y; with d = 32, Adapter-LR's m is d/32 = 1
    "lora": lambda m, x, y: y + x @ m.A.T @ m.B,                                      # no extra scaling
    "adapter_lr": lambda m, x, y: y + F.gelu(y @ m.down_in.T @ m.down_out.T + m.down_bias) @ m.up_in.T @ m.up_out
    + m.up_bias,
    "serial": lambda m, x, y: y + F.gelu(y @ m.down.T + m.down_bias) @ m.up + m.up_bias,
    "parallel": lambda m, x, y: y + F.gelu(x @ m.down.T + m.down_bias) @ m.up + m.up_bias,
    "bitfit": lambda m, x, y: y + m.bias,
}


@pytest.mark.parametrize("kind", FORMULAS)
def test_section_2_each_module_computes_its_formula_in_the_format_of_its_input(kind):
    """In a bfloat16 backbone it gives bfloat16; its weights and their gradients are float32."""
    module, x, y = a_module(kind, 2, scale=0.5)
    expected = FORMULAS[kind](module, x, y)
    assert close(module(x, y), expected) and not close(expected, y, 0.1)
    out = module(x.bfloat16(), y.bfloat16())
    assert out.dtype == torch.bfloat16 and close(out, expected, 0.1)
    out.sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in module.parameters())


def test_section_2_parameters_of_each_kind_by_hand():
    """At d = 32, on a projection q of 32 -> 3 · 6, and an adapter of rank 1 on T5-large's width, 1024."""
    by_hand = {
        ("lora", "linear"): lambda r: r * (32 + 18),
        ("adapter_lr", "attention"): lambda r: r * (32 + 1) + 1 + r * (1 + 32) + 32,
        ("serial", "ffn"): lambda r: r * 32 + r + r * 32 + 32,
        ("parallel", "ffn"): lambda r: r * 32 + r + r * 32 + 32,
        ("bitfit", "linear"): lambda r: 18, ("bitfit", "norm"): lambda r: 32, ("lnfit", "norm"): lambda r: 32,
        ("prefix", "prefix"): lambda r: 2 * r * 3 * 6}
    for (kind, role), count in by_hand.items():
        for rank in RANKS:
            assert bipeft.count_of(a_module(kind, rank, role)[0]) == count(rank)
    # d = 1024, m = 32: 1024 + 32 + 32 (bias) + 32 + 1024 + 1024 (bias) = 3168
    assert bipeft.count_of(bipeft.LowRankAdapter(nn.Linear(1, 1024), 1)) == 3168


def test_section_2_initial_weights_are_kaiming_uniform_zero_or_for_a_prefix_of_deviation_002():
    """Uniform within 1/sqrt(fan in), of which the largest of many comes near."""
    generator = torch.Generator().manual_seed(0)
    lora = bipeft.LoRA(nn.Linear(400, 30), 8, generator)
    adapter = bipeft.SerialAdapter(nn.Sequential(nn.Linear(1, 400), nn.ReLU()), 8, generator)
    factors = bipeft.LowRankAdapter(nn.Linear(1, 6400), 8, generator)
    drawn = {lora.A: 400, adapter.down: 400, factors.down_in: 6400, factors.down_out: 8, factors.up_in: 200}
    for p, fan_in in drawn.items():
        assert 0.95 < p.abs().max() * fan_in ** 0.5 <= 1 and abs(p.mean()) < 0.1 * p.abs().max()
    assert not any(p.any() for m in (lora, adapter, factors) for p in m.parameters() if p not in drawn)
    attention = SimpleNamespace(config=SimpleNamespace(num_attention_heads=8, hidden_size=512))
    for p in bipeft.Prefix(attention, 8, generator).parameters():
        assert 0.018 < p.std() < 0.022 and abs(p.mean()) < 0.002


def layer_norm(x, w, b, eps):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt() * w + b


def rms_norm(x, w):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w


@torch.no_grad()
@pytest.mark.parametrize("name, at, formula", [
    ("t5", "encoder.block.0.layer.0.layer_norm", lambda x, m, delta: rms_norm(x, m.weight + delta)),
    ("bert", "encoder.layer.0.output.LayerNorm", lambda x, m, delta: layer_norm(x, m.weight + delta, m.bias, 1e-12)),
    ("llama", "layers.0.input_layernorm", lambda x, m, delta: rms_norm(x, m.weight + delta)),
    ("qwen3", "layers.0.self_attn.k_norm", lambda x, m, delta: rms_norm(x, m.weight + delta)),
    ("gemma", "norm", lambda x, m, delta: rms_norm(x, 1 + m.weight + delta))])
def test_section_2_lnfit_is_a_delta_on_the_weight_of_every_familys_norm(name, at, formula):
    """Of inputs of size 1, 1e-3 and 30, since the norms' epsilons matter to small ones."""
    model = family(name)
    norm = model.base_model.get_submodule(at)
    x = torch.randn(3, norm.weight.numel(), generator=torch.Generator().manual_seed(0)) * tensor([1.0], [1e-3], [30.0])
    peft = randomise(bipeft.Peft(model, [(at, "lnfit", 1)]))
    assert close(norm(x), formula(x, norm, peft.modules[0].delta)) and not close(norm(x), formula(x, norm, 0), 1e-2)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["serial", "parallel", "adapter_lr"])
def test_section_2_adapters_in_a_layer_of_bert_by_hand(kind):
    """Its block is `intermediate`, then `output.dense`: a parallel adapter reads what the first of them is given."""
    model, h = family("bert"), torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    layer = model.base_model.encoder.layer[1]
    module = randomise(bipeft.Peft(model, [("encoder.layer.1.output.dense", kind, 2)]), 0.5).modules[0]
    a = layer.attention(h)[0]
    z = F.gelu(a @ layer.intermediate.dense.weight.T + layer.intermediate.dense.bias)                 # 48 wide
    z = FORMULAS[kind](module, a, z @ layer.output.dense.weight.T + layer.output.dense.bias)
    norm = layer.output.LayerNorm
    assert close(layer(h), layer_norm(z + a, norm.weight, norm.bias, 1e-12), 1e-4)


# Prefix: against a softmax over the concatenated keys


def attention_case():
    """query, key, value, mask, bias of 2 rows, 4 heads, 5 queries, 6 keys, width 8; keys and values of 3 pairs."""
    normal = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 1, 5, 6)
    mask[1, :, :, 4:] = torch.finfo(torch.float32).min
    query, key, value = normal(2, 4, 5, 8), normal(2, 4, 6, 8), normal(2, 4, 6, 8)
    return query, key, value, mask, normal(1, 4, 5, 6), normal(4, 3, 8), normal(4, 3, 8)


def attend(q, k, v, mask, bias, prefix, training=False, **more):
    module = SimpleNamespace(training=training, is_causal=False)
    return bipeft.prefix_attention(module, q, k, v, mask, position_bias=bias, prefix=prefix, **more)[0]


def softmax_over_all(q, k, v, mask, bias, keys, values):
    """One query at a time: softmax over r prefix scores and s own scores, then the mean of the values."""
    out = torch.zeros(2, 5, 4, 8)
    for b, h, i in np.ndindex(2, 4, 5):
        own = keys[h] @ q[b, h, i]
        rest = k[b, h] @ q[b, h, i] + bias[0, h, i] + mask[b, 0, i]
        out[b, i, h] = torch.cat([own, rest]).softmax(0) @ torch.cat([values[h], v[b, h]])
    return out


def test_section_2_prefix_attention_is_a_softmax_over_the_concatenation():
    """All 3 pairs open, the leading one, or none; a shut pair changes nothing, however large its score. Dropout, here
    of all, is for training alone.
    """
    *given, keys, values = attention_case()
    prefix = keys, values, torch.ones(3)
    assert torch.equal(attend(*given, prefix, dropout=1.0), attend(*given, prefix))
    assert not attend(*given, prefix, training=True, dropout=1.0).any()
    for pairs in (3, 1, 0):
        expected = softmax_over_all(*given, keys[:, :pairs], values[:, :pairs])
        assert close(attend(*given, (keys, values, leading(pairs, 3))), expected)
    for size in (1, 1e4):
        assert close(attend(*given, (size * keys, values, torch.zeros(3))), expected)
    assert close(attend(*given, None), expected)


def test_section_2_the_gradient_to_a_prefix_gate_is_finite():
    """Shut or open, however large the scores are."""
    *given, keys, values = attention_case()
    for gate, size in [(g, s) for g in (0.0, 1.0) for s in (1.0, 30.0, 1e4, 1e18)]:
        weight, larger = torch.full((3,), gate, requires_grad=True), (size * keys).requires_grad_()
        out = attend(*given, (larger, values, weight))
        grads = torch.autograd.grad(out.square().sum(), (weight, larger))
        assert all(g.isfinite().all() for g in grads), size
        assert size > 1 or grads[0].abs().min() > 0


@torch.no_grad()
def test_section_2_prefix_with_grouped_queries_in_a_self_attention_of_llama():
    """Of 4 heads of queries two read each head of keys and values. Keys of a prefix are not rotated."""
    model, h = family("llama"), torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    attention = model.model.layers[0].self_attn
    cos, sin = (t.expand(2, 5, 8) for t in model.model.rotary_emb(h, torch.arange(5)[None]))
    mask = torch.full((5, 5), -1e30).triu(1).expand(2, 1, 5, 5)
    prefix = randomise(bipeft.Peft(model, [("layers.0.self_attn", "prefix", 3)]), 1.0).modules[0]

    def heads(layer, rotate):
        x = layer(h).view(2, 5, -1, 8).transpose(1, 2)
        turned = torch.cat([-x[..., 4:], x[..., :4]], -1)
        return x * cos[:, None] + turned * sin[:, None] if rotate else x

    q, k, v = heads(attention.q_proj, True), heads(attention.k_proj, True), heads(attention.v_proj, False)
    of_head = [0, 0, 1, 1]
    keys, values = (pairs.view(3, 2, 8).transpose(0, 1)[of_head] for pairs in (prefix.keys, prefix.values))
    expected = softmax_over_all(q / 8 ** 0.5, k[:, of_head], v[:, of_head], mask, torch.zeros(1, 4, 5, 5), keys, values)
    found = attention(hidden_states=h, position_embeddings=(cos, sin), attention_mask=mask)[0]
    assert close(found, attention.o_proj(expected.flatten(2)), 1e-4)
# ==================================================================================================
# 3. The search spaces
# ==================================================================================================

HEAD = ("classifier",)


def test_section_3_t5_large_has_916_modules_in_s2_and_144_in_s1():
    """On the meta device, without numbers: the counts of the papers of both spaces."""
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(
            d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16))
    assert bipeft.geometry(model)["parameters"] == 737_668_096
    space = bipeft.Space(model, "s2")
    assert len(space) == 916
    # 48 blocks · (q, k, v, o, wi, wo); 48 · 2; 288 linear layers + 122 norms; 24 · 2 + 24 · 3 + 2 norms
    assert Counter(space.kinds) == {"lora": 288, "adapter_lr": 96, "bitfit": 410, "lnfit": 122}
    assert bipeft.geometry(model) == space.geometry                         # modules don't count
    space.detach()
    space = bipeft.Space(model, "s1")
    assert len(space) == 144 and Counter(space.kinds) == {"serial": 48, "parallel": 48, "prefix": 48}
    # mT5 is one, too, and its stacks may be of different depth: the 1 + 3 layers here have 4 · 7 linear ones
    small = bipeft.Space(tiny_t5("mt5", num_layers=1, num_decoder_layers=3), "lora")
    assert len(small) == 28 and not any("EncDecAttention" in name for name in small.names)


def test_section_3_the_seed_decides_the_initial_weights():
    """And nothing else does, nor does drawing them take from the caller's random numbers."""
    state = torch.get_rng_state()
    a, b, c = (bipeft.flatten(bipeft.Space(family("bert"), "all", seed=seed).tensors) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(state, torch.get_rng_state())


def gpt2():
    """Of a family that has no function of places."""
    return transformers.GPT2Model(transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, bos_token_id=1,
                                                          eos_token_id=1))


# Every kind on every family: `pytest -q -k family` shows the matrix in the tests' names.

COUNTS = {     # by hand, of 2 layers (T5: 2 + 2): linear layers, blocks (two a layer), norms
    "t5": (4 * 7, 8, 12), "bert": (2 * 6, 4, 5), "roberta": (2 * 6, 4, 5),
    "llama": (2 * 7, 4, 5), "qwen3": (2 * 7, 4, 9), "gemma": (2 * 7, 4, 5)}
KEYS = ("SelfAttention.k.bitfit", "self.key.bitfit")         # a bias on all keys alike drops out of the softmax


def matrix(families, kinds=KINDS):
    pairs = [(name, kind) for name in families for kind in kinds]
    return pytest.mark.parametrize("name, kind", pairs, ids=map("-".join, pairs))


@matrix(FAMILIES)
def test_section_3_family_shut_gates_are_the_backbone_and_detaching_leaves_every_bit(name, kind):
    """Computed or not, shut ones add zero (a prefix, within rounding). What may learn comes back, and the attention."""
    model, batch = family(name), batch_for(name)
    model.set_attn_implementation("eager" if name in ("t5", "llama") else "sdpa")
    next(model.parameters()).requires_grad_(False)
    before, logits = snapshot(model), logits_of(model, batch)
    space = bipeft.Space(model, kind)
    assert kind == "prefix" or torch.equal(logits_of(model, batch), logits)
    randomise(space, 1.0)
    shut, ranks = torch.zeros(len(space)), ranks_at(1, len(space))
    for computed in (shut.bool(), None):
        space.enter(shut, ranks, computed)
        off = (logits_of(model, batch) - logits).abs().max() / logits.abs().max()
        space.leave()
        assert off <= (1e-6 if kind == "prefix" else 0)
    assert not close(logits_of(model, batch), logits, 1e-2)
    bipeft.forward_backward(model, space, shut + 1, ranks, batch, space.tensors)
    space.detach()
    assert same(snapshot(model), before) and torch.equal(logits_of(model, batch), logits)


@matrix(FAMILIES)
def test_section_3_family_a_structure_built_alone_computes_what_the_search_computed(name, kind):
    """The whole chain: gates and masks of the space against modules that were built small, of the promised sizes."""
    model, batch = family(name), batch_for(name)
    space = randomise(bipeft.Space(model, kind))
    n, (linear, blocks, norms) = len(space), COUNTS[name]
    assert n == {"lora": linear, "adapter_lr": blocks, "bitfit": linear + norms, "lnfit": norms}.get(kind, blocks // 2)
    gate, choice = (torch.arange(n) % 4 != 1).float(), torch.arange(n) % 3
    space.enter(gate, torch.eye(3)[choice])
    found = logits_of(model, batch)
    structure = space.structure(gate.bool().tolist(), choice.tolist(), 10**6)
    space.detach()
    peft = bipeft.apply(model, structure, seed=5)
    assert [f"{m['name']}.{kind}" for m in structure.modules] == [at for at, on in zip(space.names, gate) if on]
    assert [m["rank"] for m in structure.modules] == [RANKS[k] if kind in RANKED else None for k in choice[gate > 0]]
    assert peft.size == structure.parameters == sum(p.numel() for p in peft.tensors)
    assert structure.geometry == {"model_type": name, "parameters": sum(p.numel() for p in family(name).parameters())}
    assert not close(logits_of(model, batch), found, 1e-2)
    cut_from([m for m, on in zip(space.modules, gate) if on], peft.modules)
    assert close(logits_of(model, batch), found, 1e-4)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@matrix(FAMILIES)
def test_section_3_family_gradients_are_those_of_finite_differences(name, kind):
    """In float64, along random directions; every second gate is shut. Norms, losses and the softmax beside a prefix
    compute in float32, so that the steps are wide; a prefix that opens is steep."""
    model, batch = family(name).double(), batch_for(name)
    space = randomise(bipeft.Space(model, kind), 0.2)
    model.double()                                                          # the modules, too
    space.leading = space.leading.double()
    generator = torch.Generator().manual_seed(1)
    gate = (torch.arange(len(space)) % 2).double().requires_grad_()
    ranks = torch.randn(len(space), 3, generator=generator).double().softmax(1).requires_grad_()
    bipeft.forward_backward(model, space, gate, ranks, batch, [gate, ranks, *space.tensors])
    found = gate.grad, ranks.grad, bipeft.flatten([p.grad for p in space.tensors])
    at = gate.detach(), ranks.detach(), bipeft.flatten(space.tensors).detach()

    @torch.no_grad()
    def loss_at(gate, ranks, weights):
        nn.utils.vector_to_parameters(weights, space.tensors)
        space.enter(gate, ranks)
        return model(**batch).loss

    for i, (gradient, step) in enumerate(zip(found, (5e-4 if kind == "prefix" else 0.003, 0.01, 0.002))):
        size = gradient.norm()
        direction = torch.randn(gradient.shape, generator=generator).double() + gradient / size.clamp(min=1e-9)
        up, down = (loss_at(*(p + signed * direction if i == j else p for j, p in enumerate(at)))
                    for signed in (step, -step))
        assert abs((up - down) / (2 * step) - (gradient * direction).sum()) <= 1e-2 * size
        assert size > 0 or i == 1 and kind not in RANKED
    assert not [full for full, g in zip(space.names, found[0].abs()) if g < 1e-6 and not full.endswith(KEYS)]


def checkpoint(model, reentrant):
    """Recomputed activations, by the name that a release of transformers has for them."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


@pytest.mark.parametrize("name", ["t5", "bert", "llama"])
def test_section_3_family_gradient_checkpointing_gives_the_same_gradients(name, monkeypatch):
    """Of all kinds together, some of them shut. The reentrant one, by which nothing would learn, is refused; another
    error of a backward pass stays what it is.
    """
    model, batch, found = family(name).train(), batch_for(name), []
    model.config.use_cache = False
    space = randomise(bipeft.Space(model, "all"), 0.2)
    gate = (torch.arange(len(space)) % 4 != 3).float()
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint(model, False)
        bipeft.forward_backward(model, space, gate, ranks_at(1, len(space)), batch, space.tensors)
        found.append(bipeft.flatten([p.grad for p in space.tensors]))
    assert close(*found) and found[0].any()
    checkpoint(model, True)
    for inputs_learn in (False, True):
        if inputs_learn:
            model.enable_input_require_grads()
        with pytest.raises(UsageError, match="use_reentrant=False"):
            bipeft.forward_backward(model, space, gate, ranks_at(1, len(space)), batch, space.tensors)
    monkeypatch.setattr(torch.Tensor, "backward", raiser(RuntimeError("no room")))
    with pytest.raises(RuntimeError, match="^no room$"):
        bipeft.forward_backward(model, space, gate, ranks_at(1, len(space)), batch, space.tensors)


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("name", ["t5", "bert", "llama"])
def test_section_3_modules_come_off_in_any_order_and_leave_what_their_owner_did(name, changed):
    """The rest is the bare model, bit for bit. What the owner does afterwards is not undone by a second detach()."""
    bare, batch = family(name), batch_for(name)
    next(bare.parameters()).requires_grad_(False)
    given = copy.deepcopy(bare)
    if changed:
        bare.double().requires_grad_().set_attn_implementation("eager")
    expected, logits = snapshot(bare), logits_of(bare, batch)
    for order in ((0, 1, 2), (1, 2, 0), (2, 1, 0), ()):
        model = copy.deepcopy(given)
        pefts = [randomise(bipeft.Peft(model, every(kind, model))) for kind in ("lora", "prefix", "parallel")]
        if changed:
            model.double().requires_grad_().set_attn_implementation("eager")
        for i in order:
            assert not torch.equal(logits_of(model, batch), logits)
            pefts[i].detach()
        bipeft.detach(model)                        # what is left: nothing, but for the last order
        assert same(snapshot(model), expected) and torch.equal(logits_of(model, batch), logits)
    model.requires_grad_(False).set_attn_implementation("eager")
    left = snapshot(model)
    for peft in pefts:
        peft.detach()
    assert same(snapshot(model), left)


AT = "encoder.layer.0.attention.self.query"
MISTAKES = {
    r"'lora' already: .*detach\(\), or .* bipeft.detach\(model\)": [
        lambda model: bipeft.Space(model), lambda model: bipeft.Peft(model, every("lora", model), also_train=HEAD)],
    "no known backbone, or two: give one of t5, .* a function of": [
        lambda model: bipeft.Space(gpt2()), lambda model: bipeft.Space(nn.Linear(2, 2)),
        *(lambda model, b=b: bipeft.Space(nn.ModuleList([model, b])) for b in (tiny_t5(), family("bert")))],
    "unknown space or kind": [lambda model, s=s: bipeft.Space(model, s) for s in ("s3", "", "lora,lroa", "S1")],
    "ranks": [lambda model, r=r: bipeft.Space(model, "lora", r) for r in ((), (0, 1), (8, 4), (4, 4), (-1,))],
    "no place": [*(lambda model, at=at: bipeft.Peft(model, [(AT, "lora", 1), at])
                   for at in ((AT.replace("0", "7"), "lora", 1), (AT, "prefix", 1), (AT, "lroa", 1))),
                 lambda model: bipeft.apply(model, a_structure(name="encoder.block.0.q")),
                 lambda model: bipeft.Space(model, "prefix", places=lambda m: [("c", "linear", m.classifier)])],
    "two modules of one kind": [lambda model: bipeft.Peft(model, [(AT, "lora", 1), (AT, "lora", 4)])],
    "of other sizes": [lambda model: bipeft.apply(model, a_structure(parameters=99), also_train=HEAD)],
    "no parameters '(clasifier|class|classifier.weights|)'": [
        lambda model, path=path: bipeft.Space(model, "prefix", also_train=("classifier", path))
        for path in ("clasifier", "class", "classifier.weights", "")]}


def a_structure(**changes):
    """Two modules for BERT, 4 · (32 + 32) and 32 parameters."""
    modules = [{"name": AT, "kind": "bitfit", "rank": None, "parameters": 32},
               {"name": AT, "kind": "lora", "rank": 4, "parameters": 256, **changes}]
    return bipeft.Structure("", {"model_type": "bert", "parameters": 1}, "all", [4], 1000, modules)


@pytest.mark.parametrize("message", MISTAKES)
def test_section_3_a_mistake_is_told_in_one_line_and_leaves_nothing_on_the_model(message):
    """The model, which has a module already, is as it was, to the bit."""
    model = family("bert").bfloat16()
    randomise(bipeft.Peft(model, [(AT.replace("0", "1"), "lora", 4)]))
    before = snapshot(model)
    for mistake in MISTAKES[message]:
        with pytest.raises(UsageError, match=message) as told:
            mistake(model)
        assert "\n" not in str(told.value) and same(snapshot(model), before)


# What a person does with modules in a loop of their own: they are ordinary torch


def own_loop(model, batches, lr=0.02):
    """As anybody writes it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=0)
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def all_kinds(model):
    """(place, kind, rank) of every module that a model takes, but for those without a gradient."""
    return [at for kind in KINDS for at in every(kind, model) if not f"{at[0]}.{kind}".endswith(KEYS)]


def arrives(peft, model, again, other, batch, path):
    """Saves what was trained, and loads it on another model, which then computes the same, bit for bit."""
    bipeft.save_weights(peft, path)
    stored = safetensors.torch.load_file(path)
    assert all(torch.equal(stored[name], p) for name, p in peft.named_weights().items())
    assert not torch.equal(logits_of(other, batch), logits_of(model, batch))
    bipeft.load_weights(again, path)
    return torch.equal(logits_of(other, batch), logits_of(model, batch))


@pytest.mark.parametrize("name", FAMILIES)
def test_section_3_a_loop_of_ones_own_trains_all_modules_and_they_alone(name, tmp_path):
    """AdamW, clipping and zero_grad over the model's parameters; what was trained is saved and loaded."""
    model, other, batches = family(name), family(name), [batch_for(name, seed) for seed in range(3)]
    peft, again = (bipeft.Peft(m, all_kinds(m), seed) for m, seed in ((model, 0), (other, 1)))
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in peft.tensors}
    before = bipeft.copies(peft.tensors)
    own_loop(model, batches)
    assert not any(torch.equal(p, q) for p, q in zip(peft.tensors, before))
    clipped = torch.linalg.vector_norm(bipeft.flatten([p.grad for p in peft.tensors]))
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3) == pytest.approx(clipped.item(), rel=1e-4)
    assert arrives(peft, model, again, other, batches[0], tmp_path / "w")
    peft.detach()
    assert same(snapshot(model), snapshot(family(name)))


@pytest.mark.parametrize("move", [
    lambda model: model, lambda model: model.double(), lambda model: model.bfloat16(),
    lambda model: nn.ModuleList([model]).double()], ids=["as it is", "float64", "bfloat16", "within"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_section_3_what_was_trained_is_what_is_saved_however_the_model_was_moved(dtype, move, tmp_path):
    """With a fresh head, on a float32 and on a bfloat16 backbone."""
    batches, kinds = [batch_for("bert", seed) for seed in range(3)], ("lora", "lnfit", "prefix", "parallel")
    models = [family("bert").to(dtype), family("bert").to(dtype)]
    pefts = [bipeft.Peft(model, [at for kind in kinds for at in every(kind, model)], seed, also_train=HEAD)
             for seed, model in enumerate(models)]
    for model in models:
        move(model)
    before = bipeft.copies(pefts[0].tensors)
    own_loop(models[0], batches)
    assert not any(torch.equal(p, q) for p, q in zip(pefts[0].tensors, before))
    assert arrives(pefts[0], models[0], pefts[1], models[1], batches[0], tmp_path / "w")


def test_section_3_a_compiled_model_trains_its_modules(tmp_path):
    """By Dynamo alone: what comes after it does not know of modules and hooks. A compiled pass is the plain one."""
    models, batch = [tiny("Llama", "CausalLM", num_hidden_layers=1) for _ in range(2)], batch_for("llama")
    chosen = [every(kind, models[0])[0] for kind in ("lora", "lnfit", "prefix", "parallel")]
    pefts = [randomise(bipeft.Peft(model, chosen, seed)) for seed, model in enumerate(models)]
    before, compiled = bipeft.copies(pefts[0].tensors), torch.compile(models[0], backend="eager")
    assert close(compiled(**batch).logits, logits_of(models[0], batch))
    own_loop(compiled, [batch, batch])
    assert not any(torch.equal(p, q) for p, q in zip(pefts[0].tensors, before))
    assert arrives(pefts[0], models[0], pefts[1], models[1], batch, tmp_path / "w")


@pytest.mark.parametrize("name, paths", [
    ("bert", HEAD), ("bert", ("bert.embeddings.LayerNorm", "bert.encoder.layer.1", "classifier.bias")),
    ("llama", ("model.norm", "model.layers.1")), ("t5", ("shared", "encoder.final_layer_norm"))])
def test_section_3_parts_of_a_bfloat16_network_learn_by_steps_too_small_for_their_format(name, paths):
    """By steps of 1e-4, where bfloat16's numbers from 1/8 to 1/4 stand 1e-3 apart. Then they are what they were."""
    model, batch = (tiny_t5() if name == "t5" else family(name)).bfloat16(), batch_for(name)
    before = snapshot(model)
    peft = bipeft.Peft(model, every("lora", model), also_train=paths)
    given = bipeft.copies(peft.head.parameters.values())
    own_loop(model, [batch] * 3, 1e-4)
    for p, q in zip(peft.head.parameters.values(), given, strict=True):
        assert ((p - q).abs() > 1e-5).float().mean() > 0.5 and (p - q).abs().max() < 4e-4
    peft.detach()
    assert same(snapshot(model), before)


@pytest.mark.parametrize("name", ["t5", "bert", "llama"])
def test_section_3_a_copy_of_a_model_with_modules_is_whole_and_its_own(name):
    """Modules of every kind, and a head. It computes the same, learns alone, and is the bare model once detached."""
    model, batch, head = family(name).bfloat16(), batch_for(name), HEAD if name == "bert" else ()
    before, bare = snapshot(model), logits_of(model, batch)
    peft = randomise(bipeft.Peft(model, all_kinds(model), also_train=head))
    logits = logits_of(model, batch)
    file = io.BytesIO()
    torch.save(model, file)
    copies = [copy.deepcopy(model), torch.load(io.BytesIO(file.getvalue()), weights_only=False)]
    for other in copies:
        assert torch.equal(logits_of(other, batch), logits)
        own_loop(other, [batch])
        assert not close(logits_of(other, batch), logits, 1e-2) and torch.equal(logits_of(model, batch), logits)
    own_loop(model, [batch])                                                # the same step from the same numbers
    after = logits_of(model, batch)
    for other in copies:
        assert torch.equal(logits_of(other, batch), after)
        bipeft.detach(other)
        assert same(snapshot(other), before) and torch.equal(logits_of(other, batch), bare)
    assert torch.equal(logits_of(model, batch), after)
    peft.detach()
    assert same(snapshot(model), before)


def test_section_3_a_head_is_trained_beside_the_modules_and_counts_nowhere_else(tmp_path):
    """Neither N nor q nor what the search measures knows of its 32 · 2 + 2 numbers; training and files do."""
    model, other = family("bert").bfloat16(), family("bert").bfloat16()
    batches, before = [batch_for("bert", seed) for seed in range(3)], snapshot(model)
    space = bipeft.Space(model, "all", also_train=HEAD)
    assert space.size == space.lengths.sum() and sum(p.numel() for p in space.tensors) == space.size + 66
    head = bipeft.copies(space.head.parameters.values())
    search = bipeft.Search(model, space, bipeft.Settings(budget=900, triggers=3, window=1, tau=0.0, lr=0.01), 6)
    structure = search.run(batches, batches)
    assert not any(torch.equal(p, q) for p, q in zip(model.classifier.parameters(), head))
    assert len(search.theta) == len(search.smoothed) == len(space)
    assert structure.also_trained == 66 and 400 < structure.parameters <= 900
    space.detach()
    assert same(snapshot(model), before)
    peft, again = (bipeft.apply(m, structure, seed, also_train=HEAD) for m, seed in ((model, 0), (other, 7)))
    bipeft.train(model, peft, batches, lambda: 0.0, 2, 0.01)
    assert not any(torch.equal(p, q) for p, q in zip(model.classifier.parameters(), head))
    assert arrives(peft, model, again, other, batches[0], tmp_path / "w")
    for m in (model, other):
        bipeft.detach(m)
        assert same(snapshot(m), before)
    alone = bipeft.Peft(model, [], also_train=HEAD)                          # without modules, too
    alone.detach()
    assert same(snapshot(model), before)
    model.classifier.weight.data.zero_()                                    # what its owner does afterwards stays
    alone.detach()
    assert not model.classifier.weight.any() and model.classifier.weight.requires_grad


def test_section_3_a_structure_fits_a_head_of_another_size_and_names_within_a_wrapper(tmp_path):
    """A structure is of places; what a head inside a wrapper learnt is read by the model itself."""
    structure = a_structure()
    wider = tiny("Bert", "SequenceClassification", num_labels=5)
    peft = bipeft.apply(wider, structure, also_train=HEAD)
    assert sum(p.numel() for p in peft.tensors) == structure.parameters + 33 * 5
    assert logits_of(wider, batch_for("bert")).shape == (3, 5)
    inside, plain, batch = family("bert"), family("bert"), batch_for("bert")
    wrapped = Wrapped(inside)
    peft = bipeft.apply(wrapped, structure, also_train=("inner.classifier",))
    bipeft.train(wrapped, peft, [batch], lambda: 0.0, 1, 0.1)
    assert arrives(peft, inside, bipeft.apply(plain, structure, 1, also_train=HEAD), plain, batch, tmp_path / "w")


class Own(nn.Module):
    """As somebody writes it: no class of transformers, no config."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.norm = nn.Embedding(40, 32), nn.Linear(32, 32), nn.LayerNorm(32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 2)

    def forward(self, ids, labels):
        x = self.embed(ids)
        x = x + self.mix(x)
        return F.cross_entropy(self.head((x + self.mlp(self.norm(x))).mean(1)), labels)


def own_places(model):
    return [("mix", "linear", model.mix), ("mix", "attention", model.mix), ("norm", "norm", model.norm),
            ("mlp", "ffn", model.mlp), ("mlp.0", "linear", model.mlp[0]), ("mlp.2", "linear", model.mlp[2])]


def test_section_3_an_architecture_of_ones_own_is_searched_by_a_function_of_places():
    """And trained, from a loss above to half of it; a block of it is an nn.Sequential, which runs its children."""
    torch.manual_seed(0)
    model = Own()
    batches = [{"ids": torch.randint(0, 40, (8, 6)), "labels": torch.randint(0, 2, (8,))} for _ in range(3)]
    before, loss = snapshot(model), model(**batches[0]).item()
    more = {"places": own_places, "also_train": ("head",)}
    space = bipeft.Space(model, "lora, adapter_lr,bitfit,lnfit,serial,parallel,lora", **more)       # lora counts once
    assert Counter(space.kinds) == {"lora": 3, "adapter_lr": 2, "bitfit": 4, "lnfit": 1, "serial": 1, "parallel": 1}
    assert model(**batches[0]).item() == loss
    structure = bipeft.search(model, space, batches, batches, 1500, 6, triggers=3, window=1, tau=0.0)
    space.detach()
    assert same(snapshot(model), before) and 700 < structure.parameters <= 1500 and structure.also_trained == 66
    assert structure.geometry["parameters"] == sum(p.numel() for p in model.parameters())
    peft = bipeft.apply(model, structure, **more)
    bipeft.train(model, peft, batches[:1], lambda: -model(**batches[0]).item(), 30, 0.02)
    assert model(**batches[0]).item() < 0.5 * loss
    peft.detach()
    assert same(snapshot(model), before)
# ==================================================================================================
# 4. Algorithm 1
# ==================================================================================================


small_t5 = functools.partial(tiny_t5, num_layers=1, num_decoder_layers=1)


def small_search(space="lora,lnfit", model=None, steps=12, warmup=0, **settings):
    """A Search over a T5 of 1 + 1 layers whose modules already do something, and four batches."""
    model = model or small_t5()
    space = randomise(bipeft.Space(model, space), 0.1)
    budget = int(space.param_counts[:, -1].sum()) // 10
    settings = bipeft.Settings(**{"budget": budget, "triggers": 4, "window": 2, "tau": 0.0, "lr": 1e-2, **settings})
    return bipeft.Search(model, space, settings, steps, warmup), [some_batch(seed) for seed in range(4)]


def moment(search):
    """Copies of what a step and a trigger read and write."""
    keys = ("theta", "phi", "kept", "fixed", "choice", "smoothed")
    return SimpleNamespace(weights=bipeft.copies(search.weights), triggers_done=search.triggers_done,
                           **{key: getattr(search, key).detach().clone() for key in keys})


def watched(search):
    """A list to which every pass of the search adds what it is given, what it finds there, and its loss."""
    passes, run_pass = [], search.run_pass

    def run(model, space, gate, ranks, batch, inputs):
        passes.append(SimpleNamespace(
            gate=gate.detach().clone(), ranks=ranks.detach().clone(), batch=batch, seed=torch.initial_seed(),
            held=(not gate.requires_grad, not ranks.requires_grad), **vars(moment(search))))
        passes[-1].loss = run_pass(model, space, gate, ranks, batch, inputs)
        return passes[-1].loss

    search.run_pass = run
    return passes


def followed(search, batches):
    """Runs a search; returns the structure and (line, moment) after each step."""
    states = []
    structure = search.run(batches, batches[:0:-1], after_step=lambda s, line: states.append((line, moment(s))))
    return structure, states


def equal(ones, others):
    """Whether two lists of tensors are one, bit for bit."""
    return len(ones) == len(others) and all(map(torch.equal, ones, others))


def test_section_4_a_trigger_worked_by_hand():
    """The trigger of the table at the head of section 4 of bipeft.py."""
    model = nn.ModuleDict({"A": nn.Linear(4, 4), "B": nn.Linear(16, 16), "C": nn.Linear(8, 8), "D": nn.LayerNorm(16)})
    space = bipeft.Space(model, "lora,lnfit", (1, 2), places=lambda model: [
        (name, "norm" if name == "D" else "linear", place) for name, place in model.items()])
    search = bipeft.Search(model, space, bipeft.Settings(budget=36, triggers=2), steps=9)
    assert space.param_counts.tolist() == [[8, 16], [32, 64], [16, 32], [16, 16]]
    then = torch.tensor([[1 / 4, 3 / 4], [2 / 3, 1 / 3], [3 / 8, 5 / 8], [1 / 2, 1 / 2]], dtype=torch.float64)
    now = torch.tensor([[3 / 4, 1 / 4], [3 / 4, 1 / 4], [1 / 4, 3 / 4], [1 / 2, 1 / 2]], dtype=torch.float64)
    keep = torch.tensor([[1 / 2, 1 / 2], [1 / 4, 3 / 4], [1 / 4, 3 / 4], [1 / 2, 1 / 2]])
    bipeft.put_back([search.theta, search.phi], [keep.log(), now.log()])
    search.smoothed, search.rank_history = tensor(3.0, 2, 4, 1), [then, now]
    assert search.potential_ranks(then).tolist() == [2, 1, 2, 0]
    assert close(search.expected_sizes(), [10, 40, 28, 16]) and close(search.keep_probabilities(), [.5, .75, .75, .5])
    assert close(bipeft.rank_instability(torch.stack(search.rank_history))[:3], [.137326, .000724, .002381], 1e-6)
    assert float(search.select()) == pytest.approx(14)
    assert search.kept.tolist() == [True, True, True, False] and search.fixed.tolist() == [False, True, False, True]
    assert search.choice[1] == 0 and search.potential_ranks(now).tolist() == [1, 1, 2, 0]
    assert equal(search.rank_history, [now])
    # No step follows; the second trigger is the last: p = 1, E = 10 + 32 + 28 = 70, R = (70 - 36) / 1 = 34. B goes (32),
    # A does not fit (42). All ranks get fixed, A's at 1 and C's at 2: 8 + 32 > 36, and A, the less sensitive, is dropped.
    structure = search.finish()
    assert [(m["name"], m["rank"]) for m in structure.modules] == [("C", 2)] and structure.parameters == 32


def test_section_4_no_gradient_leaks_from_one_pass_into_the_next():
    (search, batches), (other, _) = small_search(warmup=9), small_search(warmup=9)
    learned, run_pass = [*other.weights, other.theta, other.phi], other.run_pass

    def on_rubbish(model, space, gate, ranks, batch, inputs):
        for p in learned:
            p.grad = torch.full_like(p, 7)
        loss, asked = run_pass(model, space, gate, ranks, batch, inputs), set(map(id, inputs))
        assert all((p.grad == 7).all() for p in learned if id(p) not in asked)
        return loss

    other.run_pass = on_rubbish
    for _ in range(2):
        search.step(*batches[:3])
        other.step(*batches[:3])
    assert equal([*search.weights, search.theta, search.phi, search.smoothed], [*learned, other.smoothed])


def plain_pass(search, weights, gate, ranks, batch):
    """By plain autograd: the loss of modules whose weights are scaled copies, its gradients to the unscaled, [N]."""
    masks = ranks @ torch.tensor([[float(i < r) for i in range(8)] for r in RANKS])                     # [N, R]
    path, weights = {id(p): name for name, p in search.model.named_parameters()}, iter(weights)
    leaves, copies = [], {}
    search.space.leave()
    for n, module in enumerate(search.space.modules):
        factors = {None: 1, "gate": gate[n], "mask": masks[n][:, None], "gate·mask": gate[n] * masks[n][:, None]}
        own = {name: next(weights).clone().requires_grad_() for name, _ in module.named_parameters()}
        leaves.append(list(own.values()))
        if search.space.kinds[n] == "prefix":                                # which multiplies no weights
            module.architecture = {**own, "gate·mask": factors["gate·mask"]}
        for name, p in module.named_parameters():
            copies[path[id(p)]] = own[name] * factors[module.factors.get(name)]
    loss = torch.func.functional_call(search.model, copies, kwargs=batch).loss
    (loss + 0 * sum(p.sum() for own in leaves for p in own)).backward()                # zero where there is no gradient
    return loss.item(), [bipeft.flatten([p.grad for p in own]) for own in leaves]


@pytest.mark.parametrize("space, t, temperature, clip", [
    ("s1", 0, 5, None), ("s2", 4, 3, 1e-7), ("s1", 8, 1, 99.0), ("s1", 4, 3, 0)])
def test_section_4_a_step_is_algorithm_1_done_by_hand(space, t, temperature, clip):
    # Of nine steps t = 0 .. 8. Steps of Θ as wide as 1, so that the third pass has other gates than the second.
    search, batches = small_search(space, steps=9, warmup=9, lr=9e-3, arch_lr=1.0, clip=clip, lr_warmup=0.5)
    search.fixed[::3], search.choice[::3], search.steps_done = True, 0, t    # some ranks were fixed before
    old, passes, noise = moment(search), watched(search), search.draw()
    line, new = search.step(*batches[:3]), moment(search)
    gate, ranks, gate_3, fixed = passes[0].gate, passes[0].ranks, passes[2].gate, old.fixed

    # One sample in the passes of ΔW and Θ; in that of Φ the one of the same noise under the new Θ. What is held:
    assert [p.held for p in passes] == [(True, True), (False, True), (True, False)]          # (gate, ranks)
    assert equal([gate, ranks, ranks], [passes[1].gate, passes[1].ranks, passes[2].ranks])
    assert torch.equal(gate, ((old.theta + noise[0]).argmax(1) == 1).float())
    assert torch.equal(gate_3, ((new.theta + noise[0]).argmax(1) == 1).float()) and not torch.equal(gate_3, gate)
    assert torch.equal(ranks.argmax(1), torch.where(fixed, old.choice, (old.phi + noise[1]).argmax(1)))

    # ΔW: AdamW on the training gradient, which is scaled down to a norm of `clip`, if it is longer
    loss_1, g_tra = plain_pass(search, old.weights, gate, ranks, batches[0])
    moved = bipeft.flatten(old.weights)
    moved.grad = torch.cat(g_tra) * min(1, (clip or 1e9) / float(torch.cat(g_tra).norm()))
    averages = bipeft.flatten([search.weight_optimizer.state[p]["exp_avg"] for p in search.weights])
    assert close(averages, 0.1 * moved.grad)                                  # AdamW's, of which it makes a step
    rate = {0: 9e-3 / 4.5, 4: 5e-3, 8: 1e-3}[t]                               # it rises in the first half, 4.5 steps
    torch.optim.AdamW([moved], lr=rate, weight_decay=1e-4).step()
    assert close(bipeft.flatten(new.weights), moved, 1e-5)

    # Θ, through the softmax at this temperature, and Φ, on the next validation batch: Adam
    theta, phi = old.theta.clone().requires_grad_(), old.phi.clone().requires_grad_()
    soft = ((theta + noise[0]) / temperature).softmax(1)[:, 1]
    loss_2, g_val = plain_pass(search, new.weights, gate + soft - soft.detach(), ranks, batches[1])
    soft = torch.where(fixed[:, None], 0, ((phi + noise[1]) / temperature).softmax(1))
    loss_3, _ = plain_pass(search, new.weights, gate_3, ranks + soft - soft.detach(), batches[2])
    assert [line["loss_train"], line["loss_theta"], passes[2].loss] == pytest.approx([loss_1, loss_2, loss_3], rel=1e-5)
    torch.optim.Adam([theta, phi], lr=1.0, betas=(0.5, 0.999), weight_decay=1e-4).step()
    for p, found in ((theta, search.theta), (phi, search.phi)):
        clear = p.grad.abs() > 1e-5                          # Adam makes a step of 1 of the last bit of a zero, too
        assert close(found.grad, p.grad) and close(found[clear], p[clear], 1e-2) and clear.sum() > 4
    assert torch.equal(new.phi[fixed], old.phi[fixed]) and not phi.grad[fixed].any()

    # Eq. 1-4: weights and gradients of one moment each, s̄_0 = 0
    w_tra, w_val = (bipeft.flatten(m.weights).split(search.space.lengths.tolist()) for m in (old, new))
    for n, counts in enumerate(search.space.param_counts.tolist()):
        count = counts[0] if fixed[n] else counts[-1]
        f_tra, f_val = (float((w * g).abs().sum()) / count for w, g in ((w_tra[n], g_tra[n]), (w_val[n], g_val[n])))
        s = f_tra + float(F.cosine_similarity(g_tra[n], g_val[n], 0)) * f_val
        assert math.isclose(new.smoothed[n], 0.15 * s, rel_tol=1e-3, abs_tol=1e-9)


def test_section_4_a_search_begins_with_the_papers_settings():
    search = bipeft.Search(model := tiny_t5(), bipeft.Space(model, "s2"), bipeft.Settings(budget=2000), 10)
    groups = [(type(o), o.param_groups[0]["betas"], o.param_groups[0]["weight_decay"]) for o in search.optimizers]
    assert groups == [(torch.optim.AdamW, (0.9, 0.999), 1e-4)] + 2 * [(torch.optim.Adam, (0.5, 0.999), 1e-4)]
    assert [o.param_groups[0]["lr"] for o in search.optimizers[1:]] == [0.01, 0.01]          # of Θ and Φ
    for p in (search.theta, search.phi):                  # 1e-3 · N(0, 1): five deviations of the deviation
        assert abs(p.std() / 1e-3 - 1) < 5 / math.sqrt(2 * p.numel()) and abs(p.mean()) < 5e-3 / math.sqrt(p.numel())
    assert search.kept.all() and torch.equal(search.fixed, ~search.space.ranked)
    assert {kind for kind, fixed in zip(search.space.kinds, search.fixed) if fixed} == {"bitfit", "lnfit"}


def test_section_4_weights_learn_on_one_half_architecture_on_the_other_and_the_learning_rate_falls():
    class Told(list):
        def set_epoch(self, epoch):
            self.epochs = [*vars(self).get("epochs", []), epoch]

    batches, (search, _) = [some_batch(n) for n in range(5)], small_search("lora", steps=4, warmup=9, lr=0.4)
    train, val, passes, rates = Told(batches[:2]), Told(batches[2:]), watched(search), []
    search.run(train, val, after_step=lambda s, _: rates.append(s.weight_optimizer.param_groups[0]["lr"]))
    # a step: one for ΔW out of 0, 1; one for Θ and one for Φ out of 2, 3, 4; again from the start at the end
    order = [next(n for n, batch in enumerate(batches) if batch is p.batch) for p in passes]
    assert order == [0, 2, 3, 1, 4, 2, 0, 3, 4, 1, 2, 3] and train.epochs == [0, 1] and val.epochs == [0, 1, 2]
    assert close(rates, [0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("space", ["s1", "s2"])
def test_section_4_a_removed_module_is_not_computed_and_a_shut_one_for_its_gate_alone(space):
    search, batches = small_search(space, warmup=99)
    search.smoothed = torch.arange(len(search.space)).float()
    search.select()
    old, gone, passes, calls = moment(search), ~search.kept, watched(search), Counter()
    for n, module in enumerate(search.space.modules):
        module.register_forward_hook(lambda *_, n=n: calls.update([n]))
    for _ in range(2):
        search.step(*batches[:3])
    assert gone.any() and not any(p.gate[gone].any() for p in passes)
    for n in range(len(gone)):
        assert calls[n] == (0 if gone[n] else sum(1 if not p.held[0] else int(p.gate[n]) for p in passes))
    # so a shut gate learns to open again, and a removed one never does
    shut, moved = (passes[1].gate == 0) & search.kept, (passes[2].theta != old.theta).all(1)
    assert shut.any() and moved[shut].all() and not moved[gone].any()


def test_section_4_beta_is_that_of_the_indicators_and_triggers_from_tau_on():
    search, batches = small_search("lora", steps=9, tau=0.6, triggers=9, lr=0.1)
    rows, triggered = [], []

    def after_step(search, line):
        rows.append(search.indicators[-1])
        assert line["beta"] == bipeft.stability(torch.stack(rows), 2)
        triggered.append(line["beta"] >= 0.6)
        assert (line["reduction"] is not None) == triggered[-1] and line["triggers"] == sum(triggered)
        assert (line["kept"], line["fixed"]) == (search.kept.sum(), (search.kept & search.fixed).sum())
        if not triggered[-1]:                                                # else the trigger has changed these
            assert torch.equal(rows[-1], bipeft.importance_indicator(
                search.smoothed, search.expected_sizes(), search.kept, search.budget))

    search.run(batches, batches, after_step=after_step)
    assert 0 < sum(triggered) < 7
    # with γ = 1 every s̄ stays 0, so that the same modules, the first that fit, are important in every step: β = 1 = τ
    search, batches = small_search("bitfit", steps=4, tau=1.0, gamma=1.0, triggers=1)
    assert [(line["beta"], line["triggers"]) for line, _ in followed(search, batches)[1]] == [(0, 0), (0, 0), (1, 1)]


def test_section_4_no_trigger_in_the_warm_up_nor_before_there_are_h_plus_one_indicators():
    for warmup, window in ((3, 1), (1, 3)):
        search, batches = small_search("bitfit", warmup=warmup, window=window, triggers=2)
        passes, states = watched(search), followed(search, batches)[1]
        assert [line["triggers"] for line, _ in states] == [0, 0, 0, 1, 2]
        assert len(passes) == 2 * 5                                          # without a rank Φ has no pass


def trigger_by_hand(search, now, history):
    """3.3 and 3.4 as loops over modules, which move a moment on; history: Φ from the last trigger on.  E_t, R_z."""
    modules, z, z_max = range(len(search.space)), now.triggers_done, search.settings.triggers
    q, dim, ranked = search.space.param_counts.tolist(), search.space.ranks, search.space.ranked.tolist()
    b, d, k_star, s = (x.tolist() for x in (now.kept, now.fixed, now.choice, now.smoothed))
    theta, *phi = (x.double().softmax(1).tolist() for x in (now.theta, *history))

    def v_of(phi):
        best = [max(range(len(dim)), key=lambda k: phi[n][k]) for n in modules]
        return best, [dim[k_star[n] if d[n] else best[n]] * (b[n] and ranked[n]) for n in modules]

    _, v_before = v_of(phi[0])
    p = [b[n] * (1 if 10 * (z_max - z) < z_max + 10 else theta[n][1]) for n in modules]
    size = [q[n][k_star[n]] if d[n] else sum(x * w for x, w in zip(q[n], phi[-1][n])) for n in modules]     # Eq. 8
    expected = sum(x * c for x, c in zip(p, size))                                                          # Eq. 7
    reduction, removed = (expected - search.budget) / (z_max - z), 0.0                                      # Eq. 6
    for n in sorted((n for n in modules if b[n]), key=lambda n: s[n]):
        removed += p[n] * size[n]
        if removed > reduction:
            break
        b[n], d[n] = False, True
    best, v = v_of(phi[-1])
    divergence = [sum(x * math.log(x / y) for x, y in zip(phi[0][n], phi[-1][n])) for n in modules]
    instability = np.std(phi, axis=0).mean(1) * divergence                                                  # Eq. 9
    cosine = np.dot(v_before, v) / (np.linalg.norm(v_before) * np.linalg.norm(v) or 1)
    y = math.floor(d.count(False) * cosine / (z_max - z) + 1e-9) if z < z_max - 1 else len(d)               # Eq. 10
    for n in sorted((n for n in modules if not d[n]), key=lambda n: instability[n])[:y]:
        d[n], k_star[n] = True, best[n]
    now.kept, now.fixed, now.choice, now.potential = flags(*b), flags(*d), tensor(*k_star), tensor(*v).double()
    now.triggers_done += 1
    return expected, reduction


# Steps of Φ as narrow as 1e-5 differ by less than float32 could tell apart in Eq. 9; at 0.1 v moves, for Eq. 10.
@pytest.mark.parametrize("space, arch_lr", [("s1", 0.01), ("s2", 1e-5), ("s2", 0.1)])
def test_section_4_a_trigger_is_the_papers_by_hand(space, arch_lr):
    search, batches = small_search(space, warmup=99, arch_lr=arch_lr)
    history, kept = [moment(search).phi], []
    for z in range(4):
        for _ in range(2):
            line = search.step(*batches[:3])
            history.append(moment(search).phi)
        now = moment(search)
        assert equal(search.rank_history, [phi.double().softmax(1) for phi in history])
        expected, reduction = trigger_by_hand(search, now, history)
        # where p = 1 nothing but C_n, of float64, is in E_t
        assert math.isclose(line["expected"], expected, rel_tol=1e-12 if z == 3 else 1e-6)
        assert math.isclose(search.select(), reduction, rel_tol=1e-5, abs_tol=1e-3)
        assert equal([search.kept, search.fixed, search.choice], [now.kept, now.fixed, now.choice])
        assert torch.equal(search.potential_ranks(search.rank_history[-1]), now.potential)
        history, kept = history[-1:], [*kept, int(search.kept.sum())]
    assert search.triggers_done == 4 and search.fixed.all() and kept[-1] > 0 and len(set(kept)) > 2     # step by step
    passes, _ = watched(search), search.step(*batches[:3])
    assert len(passes) == 2                                                  # Φ has none any more
    assert len(search.indicators) == search.settings.window + 1              # checkpoints do not grow


def test_section_4_triggers_that_the_steps_left_no_room_for_come_one_by_one_at_the_end():
    # from the second on no step has moved Φ, and so no λ is above 0, and ties go to the first
    search, batches = small_search("s2", steps=3, triggers=12, warmup=99)
    start, (structure, states) = moment(search), followed(search, batches)
    now, history = states[-1][1], [start.phi, *(state.phi for _, state in states)]
    for _ in range(12):
        trigger_by_hand(search, now, history)
        history = history[-1:]
    assert search.triggers_done == 12 and search.fixed.all()
    assert equal([search.kept, search.fixed, search.choice], [now.kept, now.fixed, now.choice])
    kept, choice = bipeft.fill_budget(*(x.tolist() for x in (
        now.smoothed, search.space.param_counts, now.kept, now.choice)), search.budget)
    assert structure == search.space.structure(kept, choice, search.budget) and structure.modules


def test_section_4_p_is_certain_in_the_last_tenth_of_the_triggers():
    # Z = 20: triggers 18 and 19 (of 0 .. 19) count a kept module whole. A tenth of 4 or 25 is rounded up, to 1 and 3.
    search, _ = small_search()
    search.kept[0] = False
    for z, first in ((20, 18), (4, 3), (25, 22)):
        search.settings.triggers = z
        for search.triggers_done in range(z):
            p = search.keep_probabilities()
            assert (p[1:] == 1).all() == (search.triggers_done >= first) and p[0] == 0


def test_section_4_what_is_decided_never_moves_again():
    _, states = followed(*small_search("all", triggers=5))
    for (_, before), (_, after) in zip(states, states[1:]):
        gone, fixed = ~before.kept, before.fixed
        assert not (after.kept & gone).any() and not (fixed & ~after.fixed).any()
        assert equal([after.theta[gone], after.phi[fixed], after.choice[fixed], after.smoothed[gone]],
                     [before.theta[gone], before.phi[fixed], before.choice[fixed], before.smoothed[gone]])
    assert any((~state.kept).any() and not state.fixed.all() for _, state in states)        # gradually, not at once
    assert states[-1][1].triggers_done == 5 and states[-1][1].fixed.all()          # the last trigger fixes all


@over(range(7))
def test_section_4_the_found_structure_keeps_the_budget_and_uses_it(seed):
    rng, model = random.Random(seed), small_t5()
    ranks = tuple(sorted(rng.sample(range(1, 10), rng.randint(1, 3))))
    space = bipeft.Space(model, rng.choice(["s1", "s2", "lora", "serial,bitfit", "prefix,lnfit"]), ranks)
    share, q = rng.choice([0.005, 0.1, 0.5, 0.97]), space.param_counts
    budget = max(int(q.min()), int(share * q[:, -1].sum()))
    structure = bipeft.search(model, space, [some_batch()], [some_batch(1)], budget, rng.randint(1, 3), seed=seed,
                              triggers=rng.randint(1, 4), window=rng.randint(1, 2), tau=0.0)
    space.detach()
    peft = bipeft.apply(model, structure)
    total = sum(p.numel() for module in peft.modules for p in module.parameters())      # counted from the tensors
    assert total == structure.parameters <= budget == structure.budget
    left_out = [row[0] for name, row in zip(space.names, q.tolist()) if name not in peft.names]
    assert not left_out or budget - total < min(left_out)


def test_section_4_a_space_searched_again_gives_the_same_unless_the_seed_is_another():
    search, batches = small_search("lora", window=1)
    start, runs = bipeft.copies(search.weights), []
    for seed in (1, 1, 2):
        bipeft.put_back(search.weights, start)
        search = bipeft.Search(search.model, search.space, dataclasses.replace(search.settings, seed=seed), 4)
        runs.append((watched(search), followed(search, batches)[0]))
    (passes, structure), (passes_again, structure_again), (others, _) = runs
    assert structure == structure_again and [p.loss for p in passes] == [p.loss for p in passes_again]
    assert not any(torch.equal(getattr(passes[0], k), getattr(others[0], k)) for k in ("theta", "phi", "gate", "ranks"))
    seeds = [p.seed for p in passes]                 # of dropout: one for the passes of a step, another in each step
    assert seeds[::3] == seeds[1::3] == seeds[2::3] and len({p.seed for p in passes + others}) == 2 * 4


@pytest.mark.parametrize("space", ["s1", "s2"])
def test_section_4_a_search_goes_on_bit_for_bit_from_its_saved_state(space, tmp_path):
    (whole, batches), (resumed, _) = (small_search(space, small_t5(dropout_rate=0.1), window=1) for _ in range(2))
    lines, calls = [], Counter()

    def after_step(search, line):
        lines.append(line)
        if line["step"] == 2:                                                # of four triggers, in steps 2 .. 5
            torch.save(search.state_dict(), tmp_path / "state.pt")

    expected = whole.run(batches, batches[:0:-1], after_step=after_step)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    gone = [n for n, kept in enumerate(state["kept"].tolist()) if not kept]
    resumed.load_state_dict(state)
    assert state["triggers_done"] == 1 and gone and equal(resumed.rank_history, state["rank_history"])
    for n, module in enumerate(resumed.space.modules):
        module.register_forward_hook(lambda *_, n=n: calls.update([n]))
    found, rest = followed(resumed, batches)
    assert found == expected and [line for line, _ in rest] == lines[2:]
    assert equal([*resumed.weights, resumed.theta, resumed.phi, resumed.smoothed],
                 [*whole.weights, whole.theta, whole.phi, whole.smoothed])
    assert calls and not any(calls[n] for n in gone)                         # what is gone costs nothing


def test_section_4_importing_searching_and_training_leave_the_global_random_states_alone():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    exec(compile(Path(bipeft.__file__).read_text(), "bipeft.py", "exec"), {"__name__": "imported"})
    search, batches = small_search("all", small_t5(dropout_rate=0.1), steps=3)
    structure = search.run(batches, batches)
    search.space.detach()
    bipeft.train(search.model, bipeft.apply(search.model, structure), batches[:1], lambda: 0.0, 2, 0.01)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_section_4_any_model_with_a_t5_inside_and_any_form_of_loss_can_be_searched():
    found = []
    for form in (lambda loss: loss, lambda loss: {"loss": loss, "more": 1}, lambda loss: (loss, None)):
        model, batches = Wrapped(small_t5(), form).eval(), iter([some_batch(n) for n in range(3)])
        model.other = gpt2()                                                 # no prefix is for it
        space, copied = bipeft.Space(model, "prefix"), []
        assert model.other.config._attn_implementation == "sdpa" and len(space) == 2
        model.double()                                                       # it may be moved, and copied in a search
        found.append(bipeft.search(model, space, batches, [some_batch(9)], 300, 3, triggers=3, window=1, tau=0.0,
                                   backbone="mine", after_step=lambda *_: copied.append(copy.deepcopy(model))))
        assert copied and not model.training                                 # the mode that it found
    assert found[0] == found[1] == found[2] and found[0].backbone == "mine"


def test_section_4_a_budget_outside_the_space_is_refused():
    # the smallest modules here, LNFit's, hold 32; all of it fits the whole, so that nothing is to choose
    search, batches = small_search()
    model, space = search.model, search.space
    whole, backbone = int(space.param_counts[:, -1].sum()), space.geometry["parameters"]
    for budget in (0, -3, 31, whole, 10**9, 1e-6):
        with pytest.raises(UsageError, match="budget"):
            bipeft.search(model, space, batches, batches, budget, 3)
    for budget, found in ((32, 32), (whole - 1, whole - 1), (0.01, int(0.01 * backbone))):       # below 1: a share
        assert bipeft.Search(model, space, bipeft.Settings(budget=budget), 3).budget == found


def refused(search, train, val=None):
    """The one line with which a search ends before its first step is done."""
    search.model.eval()
    with pytest.raises(UsageError) as error:
        search.run(train, val or train, after_step=lambda *_: pytest.fail("it makes steps"))
    assert "\n" not in str(error.value) and not search.model.training         # and nothing of the search stays on it
    assert all(module.architecture is None for module in search.space.modules)
    return str(error.value)


def test_section_4_no_batches_and_a_loss_that_is_not_a_number_end_the_search():
    search, batches = small_search("lora")
    for train, val in ((iter(()), batches), (batches, iter(())), (batches, iter(batches[:1]))):
        assert "there are no batches" in refused(search, train, val)
    for at, value in ((0, math.nan), (1, math.inf), (2, math.nan)):          # in the pass of ΔW, of Θ or of Φ
        factors = iter([1] * at + [value] + [1] * 9)
        message = refused(*small_search("lora", Wrapped(small_t5(), lambda loss: loss * next(factors)), steps=1))
        assert re.search("at search step 1 is (nan|inf)", message)


def test_section_4_modules_that_are_not_on_the_model_are_refused():
    search, batches = small_search("lora")
    with pytest.raises(UsageError, match="is not on this model"):
        bipeft.search(small_t5(), search.space, batches, batches, 999, 3)
    search.space.detach()                                                    # once the search has begun
    assert "no gradient reaches" in refused(search, batches)
    with pytest.raises(UsageError, match="is not on this model"):
        bipeft.search(search.model, search.space, batches, batches, 999, 3)
    for lost in (torch.Tensor.detach, lambda loss: torch.zeros((), requires_grad=True)):      # a loss of something else
        assert "no gradient reaches" in refused(*small_search("s1", Wrapped(small_t5(), lost)))
# ==================================================================================================
# 5. Tasks and metrics
# ==================================================================================================


PROMPTS = {  # task: (a row in the hub's columns, input, target)
    name: ({**dict.fromkeys(columns.split(), "A b."), "label": 1, "idx": 0},
           " ".join([name, *(f"{column}: A b." for column in columns.split())]), "1")
    for name, columns in {
        "cola": "sentence", "sst2": "sentence", "mrpc": "sentence1 sentence2", "qqp": "question1 question2",
        "mnli": "premise hypothesis", "qnli": "question sentence", "rte": "sentence1 sentence2",
        "boolq": "question passage", "cb": "premise hypothesis", "wic": "word sentence1 sentence2"}.items()}
PROMPTS.update(
    stsb=({"sentence1": "A", "sentence2": "B", "label": 2.6}, "stsb sentence1: A sentence2: B", "2.6"),
    custom=({"source": "say 007 ", "target": " hello"}, "say 007 ", " hello"),           # blanks stay
    multirc=({"paragraph": "<b>Sent 1: </b>3 < 4 ran.<br><b>Sent 2: </b>She sat.<br/>", "question": "Who?",
              "answer": "He", "idx": {"paragraph": 0, "question": 0, "answer": 0}, "label": 1.0},
             "multirc question: Who? answer: He paragraph: Sent 1: 3 < 4 ran. Sent 2: She sat.", "1"),
    record=({"passage": "Rome fell.\n@highlight\nIt rained\n@highlight\n\"Go!\"\n@highlight\nNero sang",
             "query": "@placeholder", "entities": ["Rome", "Nero"], "answers": ["Rome"], "idx": {}},
            "record query: @placeholder entities: Rome, Nero "
            "passage: Rome fell. It rained. \"Go!\" Nero sang", "Rome"))


@pytest.mark.parametrize("name", PROMPTS)
def test_section_5_prompt_and_target(name):
    """A row of each task becomes a prompt and a target, and stays as it is; a missing value is named."""
    row, source, target = PROMPTS[name]
    examples = bipeft.to_examples(name, given := copy.deepcopy(row))
    assert examples == [bipeft.Example(source, target, (target.strip(),))] and given == row
    for key in (*bipeft.TASKS[name].fields, bipeft.TASKS[name].answer):
        with pytest.raises(UsageError, match=f"^(no )?{key}"):
            bipeft.to_examples(name, {**row, key: None})


def test_section_5_the_papers_thirteen_tasks():
    """Epochs, warm-up, metric, input length and batch size of each task are the paper's."""
    paper = """cola 15 2 Matthews 128 32, sst2 5 1 accuracy 128 32, mrpc 20 2 F1 128 32, qqp 3 1 F1 128 32,
    stsb 15 2 Pearson 128 32, mnli 3 1 accuracy 128 32, qnli 4 1 accuracy 128 32, rte 20 3 accuracy 256 32,
    boolq 15 2 accuracy 256 32, cb 40 4 accuracy 256 32, multirc 40 4 F1 256 32, record 1 1 token-F1 512 16,
    wic 15 2 accuracy 256 32"""
    assert len(bipeft.TASKS) == 13 + 2                                         # and "custom" and "toy"
    for line in paper.split(","):
        name, *facts = line.split()
        task = bipeft.TASKS[name]
        found = task.epochs, task.warmup_epochs, task.metric, task.max_length, task.batch_size
        assert facts == [str(fact).replace(" ", "-") for fact in found]
        assert task.carve == (name in ("sst2", "qqp", "qnli", "mnli", "record"))


def test_section_5_labels():
    """A similarity is rounded to the nearest fifth; a label that the task has not is refused by name."""
    # 0.11·5 = 0.55 -> 1 -> 0.2;  2.5·5 = 12.5 is a tie, which goes to the even 12 -> 2.4, as in T5
    for label, target in zip("0.0 5 2.5 0.1 0.11 1".split(), "0.0 5.0 2.4 0.0 0.2 1.0".split()):
        assert bipeft.label_of("stsb", label) == target == f"{np.round(float(label) * 5) / 5:.1f}"
    for name, label in (("rte", "-1"), ("rte", "2"), ("mnli", "3"), ("cola", "yes"), ("stsb", "5.2"), ("stsb", "nan"),
                        ("stsb", "inf"), ("rte", "0.7"), ("cb", "entailment")):
        with pytest.raises(UsageError, match=re.escape(f"label {label!r} is none of {name}'s: give 0")):
            bipeft.label_of(name, label)


def test_section_5_record_has_several_answers():
    """A row is repeated for each answer; lists that a .csv made into texts are refused."""
    row = {"passage": "p", "query": "q", "entities": ["A", "B"], "answers": ["A", "B", "A"]}
    examples = bipeft.to_examples("record", row)
    assert [(e.target, e.answers) for e in examples] == [("A", ("A", "B")), ("B", ("A", "B"))]
    for key in ("answers", "entities"):
        with pytest.raises(UsageError, match=f"{key} that are no list of texts.*parquet"):
            bipeft.to_examples("record", {**row, key: "['A']"})


def rows_of(name, count, start=0):
    """Rows as in PROMPTS, but each with a text of its own and, in turn, the labels."""
    task = bipeft.TASKS[name]
    labels = {"custom": ("no", "yes"), "record": (["Rome", "Nero"],)}.get(name, task.labels)
    return [{**PROMPTS[name][0], task.fields[0]: f"say {i % 2} {i}", task.answer: labels[i % len(labels)]}
            for i in range(start, start + count)]


def write_split(folder, name, split, rows, ending="jsonl"):
    """Writes rows as FOLDER/<task>/<split>.<ending>."""
    path = Path(folder) / name / f"{split}.{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    getattr(datasets.Dataset.from_list(rows), {"jsonl": "to_json"}.get(ending, f"to_{ending}"))(str(path))


def sources(examples):
    return sorted({e.source for e in examples})


@pytest.mark.parametrize("name", PROMPTS)
def test_section_5_splits(tmp_path, name):
    """Small tasks halve the validation set; large ones take it from train: half, at most 2,000 rows."""
    original = "validation_matched" if name == "mnli" else "validation"
    count, taken = (4100, 2000) if name == "sst2" else (13, 6)
    given = {}
    for split, rows in (("train", rows_of(name, count)), (original, rows_of(name, 9, 9000))):
        write_split(tmp_path, name, split, rows)
        given[split] = sources(bipeft.to_examples(name, row)[0] for row in rows)
    first, again, other = [bipeft.load_splits(name, tmp_path, seed) for seed in (0, 0, 1)]
    train, validation, test = [sources(first[key]) for key in ("train", "validation", "test")]
    if bipeft.TASKS[name].carve:
        assert (len(validation), test) == (taken, given[original])
        assert sorted(train + validation) == given["train"]
    else:
        assert (len(validation), train) == (4, given["train"])
        assert sorted(validation + test) == given[original]
    assert len(first["train"]) == len(train) * (2 if name == "record" else 1)      # each row has two answers,
    assert all(len(first[key]) == len(sources(first[key])) for key in ("validation", "test"))   # and one question
    assert first == again and sources(other["validation"]) != validation
    assert bipeft.drawn("abcde", 2, 0) == (["a", "e"], ["b", "d", "c"])       # as always, for this seed


def test_section_5_three_formats_and_files_of_ones_own(tmp_path):
    """The formats hold the same examples; SuperGLUE's columns of rte are taken; a test file is the test."""
    for ending in ("parquet", "jsonl", "csv", "superglue"):
        for split, start in (("train", 0), ("validation", 50)):
            rows = rows_of("rte", 8, start)
            if ending == "superglue":
                rows = [dict(zip(("premise", "hypothesis", "label"), row.values())) for row in rows]
            write_split(tmp_path / ending, "rte", split, rows, ending.replace("superglue", "parquet"))
    first, *others = [bipeft.load_splits("rte", folder, 0) for folder in tmp_path.iterdir()]
    assert others == [first] * 3 and len(first["train"]) == 8
    for split, count in (("train", 8), ("validation", 6), ("test", 4)):
        write_split(tmp_path, "custom", split, rows_of("custom", count))
    splits = bipeft.load_splits("custom", tmp_path, 0)
    assert [len(splits[key]) for key in ("train", "validation", "test")] == [8, 6, 4]
    assert bipeft.load_splits("custom", tmp_path / "custom", 0) == splits     # the folder of the files itself


TEXTS = {  # the end of a name, what the file holds: what its sources or, in quotes, the error say
    ".jsonl": {
        '{"source": 007, "target": "x"}': "'line 1 (Expecting",
        '{"source": 1.10, "target": 2}\n\n{"source": 1e5, "target": 2.5}': ["1.10", "1e5"],
        '{"source": true, "target": "None"}\r\n{"source": "007", "target": "N/A"}': ["true", "007"],
        '\ufeff{"source": "2020-01-31", "target": " a  b "}': ["2020-01-31"],
        '{"source": NaN, "target": "x"}': "'train.jsonl, row 1: no source: fill it in",
        '{"source": -Infinity, "target": "x"}': "'source that is no text: -inf",
        '{"target": "x"}\n{"source": "a", "target": "x"}': "'row 1: no source: fill it in, or leave the row out; it is {'ta",
        '{"source": "a", "target": "x"}\n\n{"source": "b", "target": " "}': "'row 2: no target: fill",
        '{"source": [["a", "b"], ["c"]], "target": "x"}': "'source that is no text: [[...], [...]]; write it as one text",
        '{"source": [{"role": "user", "content": "a"}], "target": "x"}': "'source that is no text",
        '{"source": "a", "target": {"b": 1}}': "'target that is no text",
        '{"source": "\\ud800", "target": "x"}': "'source that is no text",
        '[{"source": "a", "target": "x"}]': "'line 1 (it is no object)",
        '{"source": "a", "target": "x", "target": "y"}': "'line 1 (a key stands twice)",
        '{"source": "a", "targets": "x"}': "'no column 'target'; it has 'source', 'targets'", "\n": "'it has no rows"},
    ".csv": {
        "source,target\n007,1\n1.10,1\ntrue,1\nNone,1\nN/A,1\n1e5,1\n": "007 1.10 true None N/A 1e5".split(),
        "\ufefftarget;source;more\r\n1;a,b;\r\n\r\n1; c ;\r\n": ["a,b", " c "],
        "source\ttarget\na\t1\n": ["a"], "source;target\ra, b, c;1\r": ["a, b, c"],
        'source,target\n"two\nlines, ""quoted""",1\n': ['two\nlines, "quoted"'],
        f"source,target\n{'a' * 131_073},1\n": ["a" * 131_073],
        "source,target\n,1\n": "'no source: fill it in",
        "source,target\na,b,1\n": "'line 2 has 3 cells, the first line 2; a text with a separator in it needs",
        "source,target\na,1\nSource,Target\nb,1\n": "'line 3 names the columns again",
        'source,target\n"a,1\n': "'line 2: unexpected end of data; a text with a quote in it",
        "source,source\na,1\n": "'two columns have one name",
        "source|target\na|1\n": "'no column 'source'; it has 'source|target'", "": "'it has no rows"}}


@pytest.mark.parametrize("suffix", TEXTS)
def test_section_5_text_stays_the_text_that_stands_there(suffix, tmp_path):
    """Numbers, dates and words for nothing are read as they are written; what is no text is one line."""
    for content, expected in TEXTS[suffix].items():
        (tmp_path / f"train{suffix}").write_bytes(content.encode())
        try:
            rows = bipeft.read_split("custom", "train", tmp_path)
            found = [bipeft.to_examples("custom", row)[0].source for row in rows]
        except UsageError as error:
            found = str(error)
        assert found == expected if isinstance(expected, list) else expected[1:] in found, content
    for content in ("source,target\n\u00e4,1\n".encode("latin-1"), "source,target\na,1\n".encode("utf-16")):
        (tmp_path / f"train{suffix}").write_bytes(content)
        with pytest.raises(UsageError, match="can't be read .it is no text in UTF-8: save it as such"):
            bipeft.read_split("custom", "train", tmp_path)
    with pytest.raises(UsageError, match=f"train{suffix} can't be read .*: mend the file, or give another"):
        bipeft.read_split("custom", "train", tmp_path)
    with pytest.raises(UsageError, match="no.such is no folder: give the one that holds the files"):
        bipeft.read_split("custom", "train", tmp_path / "no.such")
    (tmp_path / "train.parquet").write_bytes(b"")
    two = r"of .*train.parquet, .jsonl, .csv, .tsv there must be one, and there is train.*, train.*: have just one"
    with pytest.raises(UsageError, match=two):
        bipeft.read_split("custom", "train", tmp_path)


def test_section_5_which_file_of_a_split_is_read(tmp_path):
    """What is there is named; another format is not passed over where a file is optional; a copy is no matter."""
    for name, words in (("train.xlsx", "there is train.xlsx: have just one"), ("other.csv", "there is no such file")):
        (tmp_path / name).write_text("source,target\na,b\n")
        with pytest.raises(UsageError, match=words):
            bipeft.read_split("custom", "train", tmp_path)
        (tmp_path / name).unlink()
    with pytest.raises(UsageError, match="rte/train.parquet.*--task custom for a file of your own"):
        bipeft.read_split("rte", "train", tmp_path)
    assert bipeft.read_split("custom", "test", tmp_path) is None
    (tmp_path / "Test.CSV").write_text("source,target\na,b\n")
    for copy_of_it in ("test.csv.bak", "test.old.csv"):
        (tmp_path / copy_of_it).write_text("")
    assert bipeft.read_split("custom", "test", tmp_path) == [{"source": "a", "target": "b"}]


def test_section_5_parquet_has_numbers_as_they_are_stored(tmp_path):
    """A truth is written as in jsonl; a time, which no text stands for, is refused."""
    rows = {"source": [True, False], "target": [3.8, 2.0]}
    for width in ("float16", "float32", "float64"):
        columns = datasets.Features(source=datasets.Value("bool"), target=datasets.Value(width))
        datasets.Dataset.from_dict(rows, features=columns).to_parquet(tmp_path / "train.parquet")
        found = [bipeft.to_examples("custom", row)[0] for row in bipeft.read_split("custom", "train", tmp_path)]
        assert [(e.source, e.target) for e in found] == [("true", "3.8"), ("false", "2.0")]
    missing = {**rows, "target": [3.8, None]}
    datasets.Dataset.from_dict(missing, features=columns).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UsageError, match="row 2: no target"):
        bipeft.read_split("custom", "train", tmp_path)
    (tmp_path / "test.xlsx").write_text("source\ttarget\n")
    with pytest.raises(UsageError, match="of .*test.parquet, .* there must be one, and there is test.xlsx"):
        bipeft.read_split("custom", "test", tmp_path)
    with pytest.raises(UsageError, match="source that is no text: datetime"):
        bipeft.to_examples("custom", {"source": datetime.date(2020, 1, 31), "target": "x"})


def test_section_5_the_hub_is_asked_for_the_right_files(monkeypatch):
    """GLUE comes by name, SuperGLUE from its conversion to parquet; a hub out of reach is one line."""
    asked = []

    def out_of_reach(path, **more):
        asked.append((path, more))
        raise ConnectionError("Couldn't reach\nthe hub " + 300 * "x")

    monkeypatch.setattr(datasets, "load_dataset", out_of_reach)
    monkeypatch.setattr(bipeft, "try_hub", lambda: None)
    for name in ("cola", "wic"):
        with pytest.raises(UsageError, match=f"^{name} on the hub .*reach the hub .{{,190}}--data-dir$"):
            bipeft.read_split(name, "train", None)
    assert asked == [("nyu-mll/glue", {"name": "cola", "split": "train"}),
                     ("aps/super_glue", {"split": "train", "revision": "refs/convert/parquet",
                                         "data_files": {"train": "wic/train/*.parquet"}})]


def test_section_5_what_in_a_persons_data_is_likely_a_mistake_is_told():
    """Rows of train in another part, two targets of one input, capitals, targets that train lacks, all alike."""
    def odd(train, validation):
        given = {"train": train, "validation": validation}
        return bipeft.check_examples({part: [bipeft.Example(*pair.split(" ", 1), (pair.split(" ")[1],)) for pair in pairs]
                                      for part, pairs in given.items()})

    assert odd(["a yes", "b no ", "a yes"], ["c yes ", "d no"]) == ["2 targets in train: 'yes' 2, 'no' 1"]
    copies = {"train": "ab", "validation": "cd", "test": "dC"}
    lines = bipeft.check_examples({part: [bipeft.Example(x, x, (x,)) for x in xs] for part, xs in copies.items()})
    assert "2 of 2 inputs of test are in validation, too, first 'd'" in lines
    long = bipeft.Example("a\nb", "yes", ("yes",))
    assert "1 of 2 inputs of train have several lines (a quote left open?)" in bipeft.check_examples(
        {"train": [long, bipeft.Example("a", "no", ("no",))]})[1]
    lines = odd([f"{n} {n % 13}" for n in range(39)] + ["x goood"], ["c 1", "d 2"])
    assert lines == ["14 targets in train: '0' 3, '1' 3, '2' 3, '3' 3, '4' 3, '5' 3, .., '8' 3, '9' 3, '10' 3, '11' 3, "
                     "'12' 3, 'goood' 1"]
    for train, validation, said in (
            (["a yes", "b no"], ["A yes", "c no"], "1 of 2 inputs of validation are in train, too, first 'A'"),
            (["a yes", "a no", "b no"], ["c no", "d yes"], "2 of 3 inputs of train have several targets in train, first 'a'"),
            (["a yes", "b no", "c Yes"], ["c no", "d yes"],
             "1 of 3 targets of train differ from others by capitals alone, first 'Yes'"),
            (["a yes", "b no"], ["c yes", "d 1"], "1 of 2 targets of validation are in no row of train, first '1'"),
            (["a yes", "b no"], ["c no", "d no"], "all targets of validation are alike, 'no'")):
        assert said in odd(train, validation)
    assert len(odd([f"{n} {n}" for n in range(98)], ["a x", "b X"])) == 3
    assert odd([f"{n} {n}" for n in range(99)], ["a x", "b X", "c y"]) == []          # free text, no labels


def made_up(seed, labels, invalid):
    """Predictions, some of them right and some no label at all, and 2 to 40 right labels."""
    rng = random.Random(seed)
    gold = rng.choices(labels, k=rng.choice([2, 3, 5, 40]))
    return [g if rng.random() < 0.5 else rng.choice([*labels, *invalid]) for g in gold], gold


@over(range(60))
def test_section_5_binary_metrics_against_scikit_learns_definitions(seed):
    """Accuracy, F1 and Matthews from counted cases; what is no label counts as the wrong one."""
    said, gold = made_up(seed, ("0", "1"), ("", "2", "01", "1 0", "maybe"))
    tp = sum(s == g == "1" for s, g in zip(said, gold))
    tn = sum(s == g == "0" for s, g in zip(said, gold))
    fn = gold.count("1") - tp
    fp = gold.count("0") - tn
    precision = tp / max(1, tp + fp)                     # 0 without a positive: zero_division=0
    recall = tp / max(1, tp + fn)
    f1 = precision and 2 * precision * recall / (precision + recall)
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    found = [bipeft.METRICS[name](said, list(zip(gold))) for name in ("accuracy", "F1", "Matthews")]
    assert close(found, [100 * (tp + tn) / len(gold), 100 * f1, 100 * (tp * tn - fp * fn) / max(1, below)])


@over(range(40))
def test_section_5_pearson_against_the_standard_librarys(seed):
    """Pearson by the standard library; what is no number of 0 .. 5 counts as the end farther from the answer."""
    said, gold = made_up(seed, bipeft.FIFTHS[::5], ("", "7.0", "nan", "inf", "-1", "two", "2.35", "5."))
    y = [float(g) for g in gold]
    x = [0.0 if g > 2.5 else 5.0 for g in y]
    x = [float(s) if s in (*bipeft.FIFTHS, "2.35", "5.") else farther for s, farther in zip(said, x)]
    score = 0.0                                                             # of a constant
    if len(set(x)) > 1 and len(set(y)) > 1:
        score = 100 * statistics.correlation(x, y)
    assert math.isclose(bipeft.pearson(said, list(zip(gold))), score, abs_tol=1e-8)


def test_section_5_metrics_by_hand_and_at_their_ends():
    """Numbers worked out by hand; all right is 100, all constant 0, as wrong as can be -100."""
    # TP 2, FP 1 (the "x"), FN 1, TN 2: F1 = 4/6, accuracy 4/6; Matthews (2·2 - 1·1) / sqrt(3·3·3·3) = 1/3
    said, gold = ["1", "1", "x", "0", "0", "0"], list(zip("110100"))
    assert close([bipeft.f1(said, gold), bipeft.accuracy(said, gold), bipeft.matthews(said, gold)],
                 [400 / 6, 400 / 6, 100 / 3])
    assert close([metric(list("011"), list(zip("011"))) for metric in bipeft.METRICS.values()], [100.0] * 5)
    for metric in (bipeft.f1, bipeft.matthews, bipeft.pearson):
        assert metric(["0", "0", "0"], list(zip("000"))) == metric(["0", "0", "0"], list(zip("101"))) == 0
    assert bipeft.matthews(["", "no", "11", "1 "], list(zip("1011"))) == -100
    # np.std of three times 0.2 is 2.8e-17, not 0: a constant all the same
    assert bipeft.pearson(["0.2"] * 3, [("0.2",)] * 3) == bipeft.pearson(["0.4"] * 9, [*["0.6"] * 8, "0.8"]) == 0
    # SQuAD's F1 of an example, and the mean over two, of which the other scores nothing.
    for text, answers, score in (
            ("The Rome", ("rome",), 1),                      # case and articles do not count
            ("Rome!", ("Rome",), 1),                         # nor do punctuation marks
            ("New York City", ("New York",), 0.8),           # precision 2/3, recall 1: 2 · 2/3 / (5/3)
            ("York York", ("York",), 2 / 3),                 # a bag: one shared of 2 and of 1: 2·1 / 3
            ("Nero", ("Rome", "nero"), 1),                   # the best of the answers
            ("", ("Rome", "Nero"), 0), ("the", ("a",), 1)):  # of the last two nothing is left
        assert close(bipeft.token_f1([text, "x"], [answers, ("y",)]), 50 * score), text


def verdict(words):
    """The toy's own: an adjective says it, and a "not" turns it round."""
    bad = not {"awful", "dull", "bitter", "broken", "ugly", "boring"}.isdisjoint(words)
    return "bad" if bad != ("not" in words) else "good"


def test_section_5_the_toys_sentences():
    """No sentence is in two parts; "not" and adjective together tell the verdict."""
    splits = bipeft.toy_splits(0)
    every_one = sum(splits.values(), [])
    assert [len(splits[key]) for key in ("train", "validation", "test")] == [4000, 500, 500]
    assert len(sources(every_one)) == 5000 and splits == bipeft.toy_splits(0) != bipeft.toy_splits(1)
    assert all(e.target == verdict(e.source.split()) for e in every_one)


def test_section_5_the_toys_backbone_is_pretrained_to_the_form_and_to_chance():
    """Pretraining shows the prompt with a coin's answers, and elsewhere one masked word."""
    rng, agree = random.Random(0), []
    for example in (bipeft.toy_masked(rng) for _ in range(4000)):
        if example.source.startswith("toy "):
            agree.append(example.target == verdict(example.source.split()))
        assert example.source.count("<mask>") == (not example.source.startswith("toy "))
    assert abs(len(agree) / 4000 - 0.3) < 0.04 and abs(np.mean(agree) - 0.5) < 2.5 / math.sqrt(len(agree))
    # Of one seed it is the same twice; random numbers outside go on as before; it has words for all.
    state = torch.get_rng_state()
    models, (tokenizer, *_) = zip(*[bipeft.toy_backbone(*given) for given in ((0, 2), (0, 2), (0, 0), (1, 0))])
    a, b, c, d = [nn.utils.parameters_to_vector(model.parameters()) for model in models]
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(a, b) and not torch.equal(c, d)
    assert tokenizer.unk_token_id not in tokenizer(" ".join(bipeft.TOY_WORDS.values())).input_ids
# ==================================================================================================
# 6. Training and evaluation
# ==================================================================================================


WORDS = [*"say 0 1 yes no rte sentence1: sentence2: A b.".split(), *map(str, range(2, 26))]


def word_tokenizer(words=WORDS, template="$A </s>"):
    """A tokenizer of whole words that ends a text with </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", *words]))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def test_section_6_tokens_of_both_families():
    """An input is cut, but for what ends it; a causal one has no end token, and its target has one. So it is whether a
    tokenizer ends a text itself or not.
    """
    examples = [bipeft.Example("say 0 1 yes", "yes", ()), bipeft.Example("say", "no 1 0 say 1", ())]
    for template in ("$A", "$A </s>"):
        tokenizer = word_tokenizer(template=template)
        # <pad> 0, </s> 1, <unk> 2, say 3, 0 is 4, 1 is 5, yes 6, no 7
        assert bipeft.tokenize(tokenizer, examples, 4) == [([3, 4, 5, 1], [6, 1]), ([3, 1], [7, 5, 4, 1])]
        tokens = bipeft.tokenize(tokenizer, examples, 3, causal=True)
        assert tokens == [([3, 4, 5], [6, 1]), ([3], [7, 5, 4, 3, 5, 1])]
    (batch,) = bipeft.Batches(tokens, 2, "cpu", causal=True)
    assert batch["input_ids"].tolist() == [[0, 0, 3, 4, 5, 6, 1], [3, 7, 5, 4, 3, 5, 1]]
    assert batch["attention_mask"].tolist() == [[0] * 2 + [1] * 5, [1] * 7]
    # The loss is on the targets alone, and logits are of the longest of them and the position before it.
    assert batch["labels"].tolist() == [[-100] * 5 + [6, 1], [-100, 7, 5, 4, 3, 5, 1]]
    assert batch["logits_to_keep"] == 7
    (batch,) = bipeft.Batches([([3], [6]), ([3, 4, 5, 7, 4, 4], [6, 1])], 2, "cpu", causal=True)
    assert batch["labels"].tolist() == [[-100, -100, 6], [-100, 6, 1]] and batch["logits_to_keep"] == 3
    (batch,) = bipeft.Batches(bipeft.tokenize(tokenizer, examples, 4), 2, "cpu")
    assert batch["input_ids"].tolist() == [[3, 4, 5, 1], [3, 1, 0, 0]]
    assert batch["labels"].tolist() == [[6, 1, -100, -100], [7, 5, 4, 1]]
    assert batch["attention_mask"].tolist() == [[1] * 4, [1, 1, 0, 0]]


def batches_of_a_gpu(tokens, batch_size, causal=False):
    """Batches in the shapes of a GPU, on the CPU."""
    made = torch.tensor
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "tensor", lambda rows: made(rows))
        patched.setattr(torch.Tensor, "to", lambda t, *args, **more: t)
        return list(bipeft.Batches(tokens, batch_size, "cuda", causal=causal))


@pytest.mark.parametrize("kinds", [(), ("lora", "serial"), ("prefix",)])
def test_section_6_a_causal_batch_has_the_loss_of_its_rows_alone(kinds):
    """However a row is filled up, and though logits are of few positions: by a loop over rows without padding."""
    model = family("llama")
    if not kinds:                                        # one whose window is shorter than a row
        model = tiny("Mistral", "CausalLM", num_key_value_heads=2, sliding_window=4)
    peft = randomise(bipeft.Peft(model, [at for kind in kinds for at in every(kind, model)]))
    rows = [([5, 9, 7, 6], [8, 1]), ([4], [9, 9, 6, 1]), ([6, 7, 5, 5, 8, 9, 4], [1]), ([8], [7, 5, 1])]
    losses = []
    for source, target in rows:
        logits = model(torch.tensor([source + target])).logits[0].log_softmax(1)
        ids = source + target
        losses += [-logits[at - 1, ids[at]] for at in range(len(source), len(ids))]
    expected = sum(losses) / len(losses)
    (batch,) = bipeft.Batches(rows, 9, "cpu", causal=True)
    (larger,) = batches_of_a_gpu(rows, 9, causal=True)
    for found, width in ((batch, 8), (larger, 32)):
        assert found["input_ids"].shape[1] == width
        assert close(model(**found).loss.detach(), expected.detach())
    peft.detach()


def test_section_6_every_example_once_an_epoch_in_an_order_of_seed_and_epoch():
    """A seed and an epoch make an order, again and again; without a seed it is the given one. Examples of like length
    share a batch, so that under a tenth is padding, but the order of lengths is random all the same.
    """
    tokens = [([n] * (1 + n % 3), [n]) for n in range(2, 12)]

    def labels(seed, epoch):
        batches = bipeft.Batches(tokens, 4, "cpu", seed)
        batches.set_epoch(epoch)
        made = [batch["labels"].flatten().tolist() for batch in batches]
        assert sorted(map(len, made)) == [2, 4, 4] and len(batches) == 3
        return sum(made, [])

    orders = [labels(0, 0), labels(0, 1), labels(1, 0)]
    assert all(sorted(order) == list(range(2, 12)) for order in orders)
    assert len(set(map(tuple, orders))) == 3 and labels(0, 1) == orders[1]
    assert labels(None, 0) == labels(None, 1) == list(range(2, 12))
    tokens = [([7] * (1 + n % 40), [n]) for n in range(256)]                # 40 lengths, 64 batches of 4
    made = list(bipeft.Batches(tokens, 4, "cpu", seed=0))
    widths = [batch["input_ids"].shape[1] for batch in made]
    real = sum(int(batch["attention_mask"].sum()) for batch in made)
    assert real == sum(len(source) for source, _ in tokens) and 4 * sum(widths) < 1.1 * real
    assert 16 < (np.diff(widths) > 0).sum() < 48


def test_section_6_batches_for_a_gpu_are_of_few_shapes():
    """Lengths are powers of two there and a last batch is filled up with rows that no loss counts."""
    tokens = [([5] * n + [1], [7, 1]) for n in (3, 40, 9)]                  # lengths 4, 41 and 10
    first, last = batches_of_a_gpu(tokens, 2)
    assert first["input_ids"].shape == (2, 64) and first["labels"].shape == (2, 4)
    assert last["input_ids"].shape == (2, 32) and last["labels"].tolist() == [[7, 1, -100, -100], [-100] * 4]
    (whole,) = batches_of_a_gpu(tokens, 99)                                 # no more rows than examples
    assert whole["input_ids"].shape == (3, 64)
    model = tiny_t5()
    for plain, filled in zip(bipeft.Batches(tokens, 2, "cpu"), (first, last), strict=True):
        assert close(model(**plain).loss.detach(), model(**filled).loss.detach())


def lost(tokenizer, targets, sources=("say 0", "say 1", "say"), causal=False, max_length=9, test=()):
    """What `check_texts` tells of three examples of train, and of targets of test."""
    examples = [bipeft.Example(source, target, ()) for source, target in zip(sources, targets)]
    tokens = bipeft.tokenize(tokenizer, examples, max_length, causal)
    splits = {"train": examples, "test": [bipeft.Example("say", text, ()) for text in test]}
    return bipeft.check_texts(tokenizer, splits, {"train": tokens}, max_length, causal, {1, 19})


def test_section_6_what_a_model_can_not_read_or_say_is_told():
    """A count and an example for each way in which text is lost; a refusal where nothing could be learnt."""
    tokenizer, targets = word_tokenizer(), ("yes", "no", "yes no")
    assert lost(tokenizer, targets, test=["yes"]) == []
    assert lost(tokenizer, targets, ("say 0 1 2 3", "  ", "say 1 2 3"), max_length=4) == [
        "2 of 3 inputs are cut at --max-length 4, first 'say 0 1 2 3'", "1 of 3 inputs are empty, first '  '"]
    assert lost(tokenizer, ("yes", "no", "yes no yes"), max_length=3) == [
        "1 of 3 targets are cut at --max-length 3, first 'yes no yes'"]
    assert lost(tokenizer, ("yes", "no", "yes no yes"), max_length=3, causal=True) == []      # its end is the target's
    # a mark that it has no word for; 8, which is 19 and ends a text; two blanks; but not a blank before a text
    assert lost(tokenizer, ("yes", " yes", "yes { no", "0 8 yes", "no  no"), [f"say {n}" for n in range(5)]) == [
        "3 of 5 targets come back from the tokenizer as another text, which accuracy counts as wrong, first 'yes { no' "
        "as 'yes no'"]
    assert lost(tokenizer, targets, ("say 0", "say 猫", "say 1")) == [
        "1 of 3 inputs hold what the tokenizer has no word for, first 'say 猫'"]
    assert lost(tokenizer, targets, ("say 0", "say </s> 1", "say 1")) == [
        "1 of 3 inputs hold a special token of the tokenizer, written out, first 'say </s> 1'"]
    many = [f"yes {10 + n % 15} {10 + n // 15}" for n in range(99)]         # free text, no labels: told, not refused
    assert lost(tokenizer, [*many, "yes {", "yes"], [f"say {n % 26} {n // 26}" for n in range(101)]) == [
        "1 of 101 targets come back from the tokenizer as another text, which accuracy counts as wrong, first 'yes {' "
        "as 'yes'"]
    for words, given in (
            ("targets 'yes {' and 'yes' are one to the model, 'yes'", {"targets": ("yes {", "no", "yes")}),
            ("can say none of the targets, first '{ no' as 'no'", {"targets": ("{ no", "{ no", "{ yes")}),
            ("all targets of train are alike, 'yes'", {"targets": ("yes", "yes", "yes")}),
            ("all inputs of train are alike, 'say'.*--max-length", {"targets": targets, "max_length": 2}),
            ("an input is empty", {"targets": targets, "sources": ("say", "", "say 1"), "causal": True})):
        with pytest.raises(UsageError, match=words):
            lost(tokenizer, **given)


@torch.no_grad()
def greedy(model, tokenizer, source, most, ends):
    """What a model says to one input: the likeliest token, again and again, without a cache or padding."""
    ids, made = torch.tensor([source]), torch.tensor([[0]])
    for _ in range(most):
        if model.config.is_encoder_decoder:
            logits = model(input_ids=ids, decoder_input_ids=made, use_cache=False).logits
        else:
            logits = model(input_ids=torch.cat([ids, made[:, 1:]], 1), use_cache=False).logits
        made = torch.cat([made, logits[:, -1:].argmax(-1)], 1)
        if int(made[0, -1]) in ends:
            made = made[:, :-1]
            break
    return tokenizer.decode(made[0, 1:], skip_special_tokens=True).strip()


FOLDERS = {"repetition_penalty": 9.0, "min_new_tokens": 3, "suppress_tokens": [6, 7], "num_beams": 3, "do_sample": True,
           "bad_words_ids": [[9]], "eos_token_id": [20, 9], "forced_eos_token_id": 1, "no_repeat_ngram_size": 1,
           "decoder_start_token_id": 5}


@pytest.mark.parametrize("folders", [{}, FOLDERS], ids=["plain", "its own"])
@pytest.mark.parametrize("name", ["t5", *CAUSAL])
def test_section_6_predictions_are_those_of_each_input_alone(name, folders):
    """With a cache and modules of all kinds, of inputs of mixed length in one batch, in their order, without dropout.
    Of what a folder says of generation nothing but the tokens that end a text counts. No library warns of anything.
    """
    model = family(name)
    if name == "t5":                                     # its two stacks are of different depth
        model = tiny_t5(seed=3, dropout_rate=0.3, tie_word_embeddings=False, **UNEVEN)
        model.shared.weight.data *= 0.05                 # what is read weighs more than the last word written
    peft = randomise(bipeft.Peft(model, all_kinds(model)), 0.2)
    tokenizer = word_tokenizer()
    inputs = [" ".join(str(2 + n * k % 24) for k in range(1, 2 + 3 * n % 7)) for n in range(9)]
    examples = [bipeft.Example(text, "yes no yes", ()) for text in inputs]
    tokens = bipeft.tokenize(tokenizer, examples, 20, causal=name in CAUSAL)
    model.train()
    model.generation_config.update(**folders)
    given = model.generation_config.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        together = bipeft.predict(model, tokenizer, tokens, 4)
    assert model.training and model.generation_config.to_dict() == given                 # as they were found
    model.eval()
    ends = {1, *folders.get("eos_token_id", [])}
    assert bipeft.greedy(model, tokenizer, 4).eos_token_id == sorted(ends)               # the tokenizer's is one
    alone = [greedy(model, tokenizer, source, 4, ends) for source, _ in tokens]          # 3 words and the end
    assert together == alone and len(set(together)) > 2
    model.generation_config = bipeft.greedy(model, tokenizer, 4)                         # as `load_run` has it
    tokenizer.model_max_length = 20
    assert bipeft.answer(model, tokenizer, inputs) == alone
    peft.detach()


def a_training(dropout=0.1):
    """A model, its modules and three batches an epoch."""
    model = tiny_t5(dropout_rate=dropout)
    peft = bipeft.Peft(model, [("encoder.block.0.layer.1.DenseReluDense", "serial", 4),
                               ("decoder.final_layer_norm", "bitfit", 1)])
    return model, peft, bipeft.Batches([([n, n + 1], [n % 5 + 2, 1]) for n in range(2, 14)], 4, "cpu", seed=0)


def test_section_6_training_leaves_the_best_epochs_weights():
    """Of equal scores the lower loss decides, then the first; the rate falls linearly."""
    model, peft, batches = a_training()
    scores, seen, rates, lines = iter([(3.0, 0.7), (3.0, 0.5), (3.0, 0.5), (2.0, 0.1)]), [], [], []

    def evaluate():
        seen.append(bipeft.copies(peft.tensors))
        model.eval()
        return next(scores)

    def after_step(state, line):
        assert model.training
        rates.append(state["optimizer"]["param_groups"][0]["lr"])
        lines.append(line)

    assert bipeft.train(model, peft, batches, evaluate, 4, 0.12, after_step=after_step) == 3.0
    assert [all(map(torch.equal, peft.tensors, weights)) for weights in seen] == [False, True, False, False]
    assert close(rates, [0.12 - 0.01 * n for n in range(12)]) and not model.training       # 12 steps
    assert [line.get("score") for line in lines] == [x for score in (3, 3, 3, 2) for x in (None, None, score)]
    assert [(line["step"], line["steps"]) for line in lines] == [(n, 12) for n in range(1, 13)]


def test_section_6_a_rate_that_first_rises():
    """By hand: of 12 steps a warm-up of 0.25 has three, at a third, two thirds and all of what falls."""
    model, peft, batches = a_training()
    rates = []
    bipeft.train(model, peft, batches, lambda: 0.0, 4, 0.12, lr_warmup=0.25,
                 after_step=lambda state, line: rates.append(state["optimizer"]["param_groups"][0]["lr"]))
    assert close(rates, [0.04, 0.11 * 2 / 3] + [0.12 - 0.01 * n for n in range(2, 12)])
    assert bipeft.schedule(0, 12, 0.05) == bipeft.schedule(0, 12) == 1         # less than a step changes nothing
    assert close([bipeft.schedule(step, 4, 0.5) for step in range(4)], [0.5, 0.75, 0.5, 0.25])
    for steps in (100, -0.1, math.nan):
        with pytest.raises(UsageError, match="^lr_warmup is a share of the steps, 0 to 0.5, not "):
            bipeft.train(model, peft, batches, lambda: 0.0, 1, 0.1, lr_warmup=steps)
    for warmup, steps in ((0.1, 600), (0.25, 12)):      # PyTorch's own two lines, multiplied
        line = [torch.optim.SGD([torch.zeros(1)], lr=1.0) for _ in range(2)]
        rising = torch.optim.lr_scheduler.LinearLR(line[0], 1 / (warmup * steps), 1, round(warmup * steps) - 1)
        falling = torch.optim.lr_scheduler.LinearLR(line[1], 1, 0, steps)
        for step in range(steps):
            oracle = line[0].param_groups[0]["lr"] * line[1].param_groups[0]["lr"]
            assert bipeft.schedule(step, steps, warmup) == pytest.approx(oracle)
            for optimizer, scheduler in zip(line, (rising, falling)):
                optimizer.step()
                scheduler.step()


def test_section_6_training_goes_on_bit_for_bit_from_any_step():
    """A state saved after whichever step leads to the same weights, those of the best epoch, and score."""
    saved, seen = [None], []

    def train_from(state, after_step=None):
        model, peft, batches = a_training()

        def evaluate():                                                 # the second epoch of the first run is the best
            seen.append(float(sum(p.detach().abs().sum() for p in peft.tensors)))
            return -abs(seen[-1] - seen[min(1, len(seen) - 1)])

        best = bipeft.train(model, peft, batches, evaluate, 3, 0.05, lr_warmup=0.5, state=state,
                            after_step=after_step)
        return best, bipeft.copies(peft.tensors)

    train_from(None)
    best, whole = train_from(None, lambda state, line: saved.append(copy.deepcopy(state)))
    assert best == 0 and len(saved) == 10
    for state in saved[1:]:
        again, weights = train_from(state)
        assert again == best and all(map(torch.equal, weights, whole)), state["step"]


def test_section_6_training_refuses_what_it_cannot_train():
    """A loss that is not finite ends it by name; modules of another model, or detached ones, are one line."""
    model, peft, batches = a_training()
    for value in ("nan", "inf"):
        handle = model.register_forward_hook(lambda *args, value=value: args[2].loss * float(value))
        with pytest.raises(UsageError, match=f"^the loss at training step 1 is {value}: .*--lr.*bfloat16"):
            bipeft.train(model, peft, batches, lambda: 0.0, 1, 0.1)
        handle.remove()
    for name, judged in (("score", (math.nan, 1.0)), ("loss", (1.0, math.nan))):
        with pytest.raises(UsageError, match=f"^the validation {name} is nan"):
            bipeft.train(model, peft, batches, lambda: judged, 1, 0.1)
    for target, detached in ((tiny_t5(), False), (model, True)):
        if detached:
            peft.detach()
        with pytest.raises(UsageError, match="^encoder.block.0.* is not on this model: attach .*afterwards$"):
            bipeft.train(target, peft, batches, lambda: 0.0, 1, 0.1)
# ==================================================================================================
# 7. Machinery
# ==================================================================================================


def raiser(error):
    """A function that raises an error, whatever it is given."""
    def fail(*args, **more):
        raise error
    return fail


NO_ROOM = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))                     # what a full disk says


def test_section_7_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A disk that fills up, at the write or at the exchange, leaves the old file and is one line."""
    path = tmp_path / "file.json"
    bipeft.write_atomically(path, "old")

    for owner, name in ((os, "replace"), (Path, "write_bytes")):
        with monkeypatch.context() as full, pytest.raises(UsageError) as caught:
            full.setattr(owner, name, raiser(NO_ROOM))
            bipeft.write_atomically(path, "new")
        assert str(caught.value).startswith(f"{path} can't be written (No space left on device): ")
        assert path.read_text() == "old"
    bipeft.write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff" and os.listdir(tmp_path) == ["file.json"]


def test_section_7_weights_of_other_modules_or_ranks_or_spoilt_ones_are_refused(tmp_path):
    """And the modules' own stay. (That weights come back bit for bit, section 3 tests on each family.)"""
    model, path = tiny_t5(), tmp_path / "peft.safetensors"
    chosen = [*every("lora", model)[:2], *every("bitfit", model)[:3]]
    peft = bipeft.Peft(model, chosen)
    bipeft.save_weights(peft, path)
    peft.detach()
    (tmp_path / "spoilt").write_bytes(path.read_bytes()[:-1])
    for modules, file, words in ((chosen[:-1], path, "another structure's: .*bitfit.bias"),
                                 ([(*chosen[0][:2], 1), *chosen[1:]], path, "another structure's: .*lora"),
                                 (chosen, tmp_path / "spoilt", "can't be read"),
                                 (chosen, tmp_path / "nowhere", "can't be read")):
        other = bipeft.Peft(model, modules, seed=5)
        initial = bipeft.copies(other.tensors)
        with pytest.raises(UsageError, match=f"^{file}.*{words}.*[^\n]$"):
            bipeft.load_weights(other, file)
        assert all(map(torch.equal, other.tensors, initial))
        other.detach()


def test_section_7_weights_are_of_their_backbone_in_any_format(tmp_path):
    """They load on it in any format, with other words and under another head, but on no other numbers."""
    structure, path = a_structure(), tmp_path / "w"
    peft = randomise(bipeft.apply(family("bert"), structure))
    bipeft.save_weights(peft, path)
    larger, wider, other = family("bert"), family("bert"), family("bert")
    larger.resize_token_embeddings(larger.config.vocab_size + 2)
    wider.classifier = nn.Linear(32, 5)
    for model in (larger, wider, family("bert").bfloat16(), family("bert").half()):
        bipeft.load_weights(again := bipeft.apply(model, structure, 1), path)
        assert all(map(torch.equal, again.tensors, peft.tensors))
    other.bert.encoder.layer[1].output.dense.weight.data.mul_(1.1)
    again = bipeft.apply(other, structure, 1)
    before = bipeft.copies(again.tensors)
    with pytest.raises(UsageError, match="w is of a backbone of other numbers, first in encoder.layer.1.output.dense:"):
        bipeft.load_weights(again, path)
    assert all(map(torch.equal, again.tensors, before))
    other.bert.encoder.layer[0].output.dense.weight.data.fill_(math.nan)
    with pytest.raises(UsageError, match="the backbone is damaged: encoder.layer.0.output.dense holds nan"):
        bipeft.backbone_sample(other)
    swapped = family("bert")
    words = swapped.get_input_embeddings().weight.data
    words[5] = words[6]
    with pytest.raises(UsageError, match="of other numbers, first in word 5"):
        bipeft.require_same_backbone(bipeft.backbone_sample(family("bert")), bipeft.backbone_sample(swapped), "x")


def test_section_7_weights_that_share_memory_or_are_views_are_written_each_by_itself(tmp_path):
    """And a backbone is told by numbers that do not learn, of words that there are."""
    model, attention = family("bert"), "bert.encoder.layer.0.attention.self"
    query, key, value = (model.get_submodule(f"{attention}.{name}").weight for name in ("query", "key", "value"))
    key.data, value.data = query.data, query.data.T
    peft = bipeft.Peft(model, [], also_train=[attention])
    bipeft.save_weights(peft, tmp_path / "w")
    stored = safetensors.torch.load_file(tmp_path / "w")
    assert torch.equal(stored[f"{attention}.key.weight"], query)
    assert torch.equal(stored[f"{attention}.value.weight"], query.T)
    learnt = {"encoder.layer.0.attention.self.query", "encoder.layer.0.attention.self.key",
              "encoder.layer.0.attention.self.value", "encoder.layer.0.attention.self"}
    told = [set(bipeft.backbone_sample(model, learnt=parameters)) for parameters in ((), peft.tensors)]
    assert told[0] - told[1] == learnt
    assert list(bipeft.backbone_sample(nn.Embedding(50, 2), lambda model: [])) == ["word 5"]        # of words 0 to 49


def test_section_8_weights_without_a_place_are_told(tmp_path, capsys):
    """A config.json of fewer layers than the weights have: the model loads, and a line says what it leaves out."""
    tiny_t5().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_layers": config["num_layers"] - 1}))
    bipeft.load_backbone(str(tmp_path), "float32", "cpu", 0)
    assert "no place for 8 of its tensors, first encoder.block." in capsys.readouterr().out


def test_section_7_structures_go_to_a_file_and_back(tmp_path):
    """They come back equal, with totals for people beside; what no search writes is refused by name."""
    structure, path = a_structure(), tmp_path / "structure.json"
    structure.geometry["parameters"] = 70_000
    bipeft.save_structure(structure, path)
    assert bipeft.load_structure(path) == structure
    good = path.read_text()
    stored = json.loads(good)                                               # 288 of 70,000: 41.142857 of 10,000
    assert stored["totals"] == {
        "modules": 2, "parameters": 288, "backbone_parameters": 70_000, "per_ten_thousand": 41.1429}
    spoilt = {json.dumps({**stored, **change}): words for change, words in (
        ({"modules": []}, "it holds 0 parameters"), ({"budget": 10}, "for a budget of 10"),
        ({"budget": math.nan}, "for a budget of nan"), ({"modules": "all"}, "no structure.json"),
        ({"geometry": None}, "no structure.json"), ({"geometry": {"parameters": 0}}, "no structure.json"),
        ({"space": "prefix"}, "is no module of its space prefix"),
        *(({"modules": [{**stored["modules"][0], "rank": rank}]}, "is no module of its space all")
          for rank in ("4", 0, -1, True)),
        ({"modules": [{**stored["modules"][0], "name": ["a"]}]}, "is no module of its space all"))}
    del stored["ranks"]
    for content in ("[1, 2]", good[:99], "\xff", "[" * 100_000, json.dumps(stored)):
        spoilt[content] = "no structure.json"
    for content, words in spoilt.items():
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(UsageError, match=f"^{path} is .*{words}"):
            bipeft.load_structure(path)


@pytest.mark.parametrize("name, norms", [("t5", "T5LayerNorm"), ("llama", "LlamaRMSNorm"), ("gemma", None)])
def test_section_7_fused_norms_are_the_models_own(name, norms):
    """All norms of T5 and Llama are fused, Gemma's are not; the model computes the same within rounding."""
    model, plain = family(name), family(name)
    bipeft.fuse_norms(model)
    assert ([m for m in model.modules() if "forward" in vars(m)]
            == [m for m in model.modules() if type(m).__name__ == norms])
    assert close(logits_of(model, batch_for(name)), logits_of(plain, batch_for(name)), 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("kinds", ["s1", "s2"])
def test_section_7_graphs_compute_what_the_plain_pass_computes(kinds):
    """Losses and gradients of a search's three passes are the same, batch after batch, of two shapes in turns.

    Losses are read at the end: a graph that was recorded before may write over what a later one has computed.
    """
    model = tiny_t5().cuda()
    space = randomise(bipeft.Space(model, kinds), 0.1)
    search = bipeft.Search(model, space, bipeft.Settings(budget=1000), 4)
    graphs, noise, losses = bipeft.CudaGraphs(), search.draw(), []
    for seed, inputs in enumerate(8 * [search.weights, [search.theta, *search.weights], [search.phi]]):
        batch = {key: t.cuda() for key, t in some_batch(seed, 2 + 6 * (seed // 3 % 2)).items()}
        found = []
        for run_pass in (bipeft.forward_backward, graphs):
            gate, ranks = search.sample(noise)
            gate = gate if inputs[0] is search.theta else gate.detach()
            ranks = ranks if inputs[0] is search.phi else ranks.detach()
            losses.append(run_pass(model, space, gate, ranks, batch, inputs))
            found.append(bipeft.copies(p.grad for p in inputs))
        assert all(close(graph.cpu(), plain.cpu(), 1e-4) for plain, graph in zip(*found))
    assert all(close(graph.cpu(), plain.cpu(), 1e-4) for plain, graph in zip(losses[0::2], losses[1::2], strict=True))
# ==================================================================================================
# 8. The command line
# ==================================================================================================


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with tiny models, data, structures and runs, good ones and spoilt ones, that tests only read."""
    root = tmp_path_factory.mktemp("world")
    model = tiny_t5(num_layers=1, tie_word_embeddings=False)
    for name in ("model", "half", "no_tokenizer", "many_words", "bert", "llama"):
        (family(name) if name in FAMILIES else model).save_pretrained(root / name)
        if name != "no_tokenizer":
            word_tokenizer(WORDS + [f"w{n}" for n in range(50)] * (name == "many_words")).save_pretrained(root / name)
    weights = {key: t.clone() for key, t in model.state_dict().items() if not key.startswith("decoder.")}
    safetensors.torch.save_file(weights, root / "half" / "model.safetensors", {"format": "pt"})
    config = json.loads((root / "model" / "config.json").read_text())
    for name, change in (("quantised", {"quantization_config": {"quant_method": "gptq"}}),
                         ("no_start", {"decoder_start_token_id": None}), ("no_weights", {}), ("damaged", {})):
        shutil.copytree(root / "model", root / name)
        (root / name / "config.json").write_text(json.dumps({**config, **change}))
    (root / "no_weights" / "model.safetensors").write_bytes(b"\x00\x01garbage")
    safetensors.torch.save_file({key: t * math.nan for key, t in model.state_dict().items()},
                                root / "damaged" / "model.safetensors", {"format": "pt"})
    for folder, name, count in (("data", "rte", 24), ("data", "custom", 24), ("few", "rte", 6)):
        write_split(root / folder, name, "train", rows_of(name, count))
        write_split(root / folder, name, "validation", rows_of(name, count // 2, 51))
    write_split(root, "train_alone", "train", [{"source": "a", "target": "b"}] * 4)
    bipeft.save_structure(a_structure(), root / "structure.json")
    (root / "runs" / "structure_alone").mkdir(parents=True)
    (root / "runs" / "structure_alone" / "structure.json").write_text("{}")
    for name, file in (("a_run", "metrics.json"), ("an_adapter", "adapter_config.json")):
        (root / name).mkdir()
        (root / name / file).write_text("{}")
    return root


RTE = "--task rte --data-dir {root}/data --model {root}/model "
BAD = [  # arguments, and words that the message must hold
    ("--task sst3", "invalid --task 'sst3' rte --help"),
    ("--space s3", "unknown space 's3' s1 lora"),
    ("--no-such-flag 1", "unrecognized --no-such-flag --help"),
    ("--seed 0 0", "--seed different"),
    ("--dtype int8", "--dtype int8 bfloat16"),
    ("--device nonsense", "--device nonsense cpu"),
    ("--task custom --model {root}/model", "custom --data-dir"),
    ("--task toy --out=", "--out empty give"),
    ("--structure= --task rte", "--structure empty"),
    (RTE + "--out {root}/model", "--out {root}/model model's folder: name another"),
    ("--task toy --data-dir {root}/data", "toy its own data --data-dir --task custom"),
    ("--task cola --data-dir {root}/data", "of {root}/data/cola/train.parquet no such file --data-dir"),
    ("--task custom --data-dir {root}/train_alone", "of {root}/train_alone/validation.parquet there must be one"),
    ("--task rte --data-dir {root}/few", "rte too few rows 4"),
    ("--task rte --model {root}/model", "rte on the hub can't be read network --data-dir"),
    ("--task rte --data-dir {root}/data --model nowhere/t5-large", "nowhere/t5-large can't be loaded network"),
    ("--task rte --data-dir {root}/data --model {root}/half", "half can't be loaded has no decoder."),
    ("--task rte --data-dir {root}/data --model {root}/no_tokenizer", "no_tokenizer no tokenizer.json"),
    ("--task rte --data-dir {root}/data --model {root}/many_words", "can't be loaded tokenizer words weights"),
    ("--task rte --data-dir {root}/data --model {root}/bert", "{root}/bert a bert T5"),
    ("--task rte --data-dir {root}/data --model {root}/quantised", "quantised can't be loaded library command line"),
    ("--task rte --data-dir {root}/data --model {root}/no_weights", "no_weights can't be loaded"),
    ("--task rte --data-dir {root}/data --model {root}/no_start", "can't be loaded decoder_start_token_id"),
    ("--task rte --data-dir {root}/data --model {root}/damaged", "backbone is damaged encoder.block.0 nan"),
    ("--task rte --data-dir {root}/data --model {root}/a_run", "a_run can't be loaded a run's folder"),
    ("--task rte --data-dir {root}/data --model {root}/an_adapter", "an_adapter can't be loaded a peft adapter"),
    ("--task rte --data-dir {root}/data --model ./models/t5", "./models/t5 no such folder"),
    ("--task custom --data-dir {root}/data --model {root}/model --metric F1", "metric F1 target none --metric"),
    ("--task rte --metric F1", "--metric custom"),
    ("--structure {root}/structure.json --budget 20", "--structure without a search --budget"),
    ("--task custom --metric rouge", "--metric rouge accuracy token-F1"),
    (RTE + "--budget 1", "budget of 1 smallest 32 whole space"),
    (RTE + "--structure {root}/nowhere.json", "{root}/nowhere.json no structure.json"),
    (RTE + "--structure {root}/structure.json", "no place 'encoder.layer.0.attention.self.query' bitfit"),
    (RTE + "--out {root}/structure.json", "{root}/structure.json --out"),
    ("--task toy --out {root}/runs/structure_alone", "structure.json can't be read --out --fresh"),
]


def contents(folder):
    """{name: content} of all files in a folder and below."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("line, words", BAD, ids=[line.replace("{root}/", "") for line, _ in BAD])
def test_section_8_a_mistake_is_told_in_one_line(world, tmp_path, monkeypatch, capfd, line, words):
    """One line on standard error that says what is wrong, exit code 2, no traceback; no file is written or lost."""
    monkeypatch.chdir(tmp_path)                                   # where a run without --out would write
    before = contents(world / "runs")
    assert bipeft.main(line.format(root=world).split()) == 2
    error = capfd.readouterr().err
    assert error.startswith("bipeft.py: ") and error.count("\n") == 1 and len(error.replace(str(world), "")) < 420
    for word in words.format(root=world).split():
        assert word in error, error
    assert not any(path.name != "runs" for path in tmp_path.rglob("*")) and contents(world / "runs") == before


@pytest.mark.parametrize("module, content, words", [
    ("filelock", r"raise ModuleNotFoundError('no\nfilelock')", "no filelock: run pip install -r requirements.txt"),
    ("filelock", "raise KeyboardInterrupt", "stopped before it began"),
    ("transformers", "", r"cannot import name 'AttentionInterface' .*: run pip install -r requirements.txt"),
    ("transformers", "__getattr__ = lambda name: exec('raise KeyboardInterrupt')", "stopped before it began")])
def test_section_8_what_fails_while_packages_load_is_one_line(tmp_path, module, content, words):
    """A missing or old package, or Ctrl-C in the first seconds; whoever imports the file gets the error itself."""
    (tmp_path / f"{module}.py").write_text(content)
    ended = []
    for command in (["bipeft.py"], ["-c", "import bipeft"]):
        ended.append(subprocess.run([sys.executable, *command], capture_output=True, text=True,
                                    cwd=Path(bipeft.__file__).parent, env={**os.environ, "PYTHONPATH": str(tmp_path)}))
    assert ended[0].returncode == 2 and re.fullmatch(f"bipeft.py: {words}\n", ended[0].stderr)
    assert ended[1].returncode not in (0, 2) and re.search("KeyboardInterrupt|Error: ", ended[1].stderr)


def test_section_8_settings_of_a_command_line():
    """A flag goes before the task's number, that before the paper's; numbers have bounds, and seeds folders."""
    (toy,), (paper,) = bipeft.parse(["--task", "toy", "--lr", "0.5"]), bipeft.parse([])
    assert (toy.model, toy.lr, toy.budget, toy.triggers, toy.epochs, toy.search_epochs) == ("toy", 0.5, 0.03, 30, 7, 5)
    assert (paper.task, paper.model, paper.space, paper.ranks) == ("rte", "google-t5/t5-large", "s2", (1, 4, 8))
    assert (paper.lr, paper.budget, paper.triggers, paper.gamma, paper.window, paper.tau, paper.clip,
            paper.lr_warmup) == (3e-4, 1.39e-4, 100, 0.85, 5, 0.85, None, 0)
    (own,) = bipeft.parse(["--task", "custom"])
    assert (own.lr, own.clip, own.lr_warmup, own.triggers, own.batch_size) == (1e-3, 1.0, 0, 30, 16)
    for line, folders in (
            ("--seed 3 5", ["runs/rte-s2-3", "runs/rte-s2-5"]), ("--seed 3 5 --out x", ["x/seed-3", "x/seed-5"]),
            ("--out x --epochs 9", ["x"]), ("--space lora,bitfit", ["runs/rte-lora+bitfit-0"]),
            ("--structure a/cola-s2-0/structure.json", ["runs/rte-from-cola-s2-0-0"])):
        several = bipeft.parse(line.split())
        assert [settings.out for settings in several] == folders
        assert several[0].search_epochs == several[0].epochs == (9 if "9" in line else 20)
    above_0 = "max-length budget triggers window search-epochs lr arch-lr batch-size save-every".split()
    for line in (*(f"--{flag} 0" for flag in above_0), "--budget nan", "--tau -1", "--gamma 1.5", "--seed 0 -2",
                 "--lr-warmup 0.6", "--warmup-epochs -1", "--weight-decay -1", "--clip -1", "--clip inf",
                 "--max-length 99999999999999"):
        flag, *_, value = line.split()
        with pytest.raises(UsageError, match=rf"^{flag} {value}(\.0)? must lie in"):
            bipeft.parse(line.split())
    assert bipeft.parse("--tau 0 --gamma 0 --warmup-epochs 0 --weight-decay 0 --clip 0 --lr-warmup 0.5".split())
    for dtype in ("float32", "bfloat16", "float16"):
        assert bipeft.parse(["--dtype", dtype])[0].dtype == dtype
    acting = "space ranks budget triggers tau gamma window search-epochs warmup-epochs clip arch-lr".split()
    assert [flag.replace("-", "_") for flag in acting] == list(bipeft.SEARCH_ALONE)


@dataclasses.dataclass
class MoreSettings(bipeft.Settings):
    """Another program's, which explains a flag in words of its own."""

    device: str = "auto"  # its own words


def test_section_8_help_shows_every_setting_with_its_comment(capsys):
    """`--help` is the fields of Settings, their comments and defaults, and ends with exit code 0."""
    with pytest.raises(SystemExit) as ended:
        bipeft.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(bipeft.Settings), re.MULTILINE))
    assert ended.value.code == 0 and "None" not in said
    assert bipeft.help_texts(MoreSettings) == {**comments, "device": "its own words"}
    for f in dataclasses.fields(bipeft.Settings):
        words = comments[f.name] if f.default is None else f"{comments[f.name]} (default: {f.default})"
        assert re.search(f"--{f.name.replace('_', '-')} .{{,50}}{re.escape(words)}", said), f.name


QUICK = ("--task custom --data-dir {root}/data --model {root}/model --epochs 4 --search-epochs 4 --warmup-epochs 1 "
         "--triggers 4 --window 2 --tau 0.2 --budget 1000 --batch-size 4 --lr 0.1 ")
RUN_FILES = ["metrics.json", "peft.safetensors", "search.jsonl", "structure.json"]


def go(world, out, line=QUICK, more=""):
    """Runs the program in this process.   Returns its exit code."""
    return bipeft.main([*(line + more).format(root=world).split(), "--out", str(out)])


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory):
    """The folder of a whole run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    assert go(world, out) == 0 and before == (True, False) == (
        torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled())
    return out


def copied(run, folder):
    for name, content in contents(run).items():
        (folder / name).write_bytes(content)
    return folder


def metrics_of(run):
    return json.loads((run / "metrics.json").read_text())


def assert_same_end(a, b):
    """Two runs that ended alike: structure, weights, scores and the log but for its clocks."""
    assert sorted(contents(a)) == sorted(contents(b)) == RUN_FILES
    for name in ("structure.json", "peft.safetensors"):
        assert contents(a)[name] == contents(b)[name], name
    found = []
    for folder in (a, b):
        lines = [metrics_of(folder), *map(json.loads, (folder / "search.jsonl").read_text().splitlines())]
        found.append([[item for item in line.items() if not re.search("time|second|ratio", item[0])] for line in lines])
    assert found[0] == found[1]


def assert_answers(run, examples, model=None):
    """A run, loaded from its folder, gives its two test scores again, with its modules and without them."""
    model, tokenizer, peft = bipeft.load_run(run, model=model)
    tokens = bipeft.tokenize(tokenizer, examples, 128, not model.config.is_encoder_decoder)
    said = bipeft.predict(model, tokenizer, tokens, 4)
    peft.detach()
    untouched = bipeft.predict(model, tokenizer, tokens, 4)
    answers, metrics = [e.answers for e in examples], metrics_of(run)
    assert untouched != said and not model.training
    assert bipeft.accuracy(said, answers) == metrics["test"]
    assert bipeft.accuracy(untouched, answers) == metrics["test_untouched"]
    return said


def test_section_8_every_setting_reaches_the_search_and_the_training(world, tmp_path, monkeypatch):
    """Settings arrive where they count, halves are disjoint, and test is looked at last."""
    given, splits = {}, []
    for owner, name in ((bipeft.Search, "__init__"), (bipeft.Search, "run"), (bipeft, "apply"), (bipeft, "train"),
                        (bipeft, "signs_of_guessing"), (bipeft.Work, "score")):
        def note(*args, function=getattr(owner, name), name=name, **more):
            given.setdefault(name, inspect.signature(function).bind(*args, **more).arguments)
            splits.extend(args[1:] if name == "score" else ())
            return function(*args, **more)
        monkeypatch.setattr(owner, name, note)

    line = (RTE + "--epochs 2 --search-epochs 3 --warmup-epochs 1 --triggers 4 --window 2 --tau 0.25 --gamma 0.5 "
            f"--budget 0.1 --batch-size 5 --lr 0.05 --clip 0.3 --arch-lr 0.02 --weight-decay 0.003 --seed 7 --ranks 2 3 "
            f"--lr-warmup 0.2 --out {tmp_path}").format(root=world).split()
    assert bipeft.main(line) == 0
    search, trained = given["__init__"]["self"], given["train"]
    assert (search.steps, search.first_trigger, search.space.ranks) == (9, 4, (2, 3))               # 12 rows, 3 batches
    assert search.budget == int(0.1 * search.space.geometry["parameters"])
    for key, value in {"triggers": 4, "window": 2, "tau": 0.25, "gamma": 0.5, "lr": 0.05, "clip": 0.3, "arch_lr": 0.02,
                       "lr_warmup": 0.2, "weight_decay": 0.003, "seed": 7}.items():
        assert getattr(search.settings, key) == value, key
    assert [trained[key] for key in ("epochs", "lr", "lr_warmup", "weight_decay", "seed")] == [2, 0.05, 0.2, 0.003, 7]
    assert given["apply"]["seed"] == bipeft.derive(7, 14)
    halves = [{tuple(source) for source, _ in given["run"][key].tokens} for key in ("train_batches", "val_batches")]
    assert [len(half) for half in halves] == [12, 12] and not halves[0] & halves[1]
    judged = given["signs_of_guessing"]
    assert judged["log"] == log_of(tmp_path) and len(judged["tokens"]) == 24
    assert splits == ["validation"] * 2 + ["test"] * 2            # one look at test, with the modules and without


def test_section_8_a_search_that_only_guesses_is_told():
    """By hand: two targets as often as each other, of 2 and 3 tokens, are ln 2 nats for 2.5 tokens."""
    targets = [[5, 1], [7, 8, 1]] * 5
    assert bipeft.loss_of_guessing(targets) == pytest.approx(math.log(2) / 2.5)             # 0.277
    assert bipeft.loss_of_guessing([[5, 1]] * 9 + [[7, 1]] * 3) == pytest.approx(
        (0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / 2)
    assert bipeft.loss_of_guessing(targets[:-1]) == math.inf               # nine of two that differ: texts, not labels

    def told(losses, *fired):
        log = [{"step": n, "loss_train": loss, "reduction": 1.0 if n in fired else None}
               for n, loss in enumerate(losses, 1)]
        return "".join(bipeft.signs_of_guessing(log, [([2], target) for target in targets]))
    # 0.95 · 0.277 is 0.263: of steps 2 to 4, from the first trigger on, and of the last ten where there was none
    assert "from step 2 on the training loss is 0.270, that of guessing 0.277" in told([9, 0.30, 0.25, 0.26], 2, 4)
    assert told([9, 0.30, 0.25, 0.23], 2, 4) == told([]) == told([9] + [0.25] * 10) == ""
    assert "from step 2 on" in told([0.0] + [0.27] * 10) and "from step 1 on" in told([0.27])


def log_of(run):
    """The lines of a run's search."""
    return [json.loads(line) for line in (run / "search.jsonl").read_text().splitlines()]


def test_section_8_the_most_frequent_answer_is_that_of_train():
    answers = {"train": "yes yes no", "validation": "no no no yes", "test": "no yes"}
    splits = {split: [bipeft.Example("", target, (target,)) for target in said.split()]
              for split, said in answers.items()}
    work = SimpleNamespace(metric="accuracy", splits=splits, score=lambda split: 7.0)
    scores = bipeft.test_scores(work, SimpleNamespace(detach=lambda: None))
    assert scores == {"metric": "accuracy", "test": 7.0, "test_untouched": 7.0,
                      "validation_most_frequent": 25.0, "test_most_frequent": 50.0}


def test_section_8_what_a_run_leaves(world, finished, tmp_path):
    """Four files: structure, log, scores with what they depend on, and the trained weights, which answer again."""
    assert sorted(contents(finished)) == RUN_FILES                              # and no checkpoint
    structure, metrics = bipeft.load_structure(finished / "structure.json"), metrics_of(finished)
    splits = bipeft.load_splits("custom", world / "data", 0)
    size = tiny_t5(num_layers=1, tie_word_embeddings=False).num_parameters()
    targets = {key: [e.target for e in part] for key, part in splits.items()}
    common = Counter(targets["train"]).most_common(1)[0][0]
    for key, value in {"task": "custom", "metric": "accuracy", "seed": 0, "space": "s2", "budget": 1000,
                       "parameters": structure.parameters, "modules": len(structure.modules),
                       "backbone_parameters": size, "per_ten_thousand": 1e4 * structure.parameters / size,
                       "ratio": metrics["search_seconds"] / metrics["train_seconds"],
                       **{f"{key}_most_frequent": 100 * targets[key].count(common) / len(targets[key])
                          for key in ("validation", "test")}}.items():
        assert metrics[key] == value, key
    # a training that learnt nothing is told; where all is right there is nothing more to learn
    for best, frequent, told in ((50.1, 50, False), (50, 50, True), (49, 100, True), (100, 100, False)):
        said = bipeft.results({**metrics, "validation": best, "validation_most_frequent": frequent})
        assert ("\nno epoch was better on validation than always the most frequent answer: try another --lr or "
                "--lr-warmup, or more --epochs" in said) == told
    said = bipeft.results({**metrics, "validation_most_frequent": 12.0, "test_most_frequent": 34.0})
    assert "  most frequent answer                           12.00   34.00\n" in said
    assert 0 < structure.parameters <= structure.budget == 1000 and structure.backbone == str(world / "model")
    assert 0 < log_of(finished)[-1]["time"] <= metrics["search_seconds"] and metrics["train_seconds"] > 0
    assert metrics["settings"]["lr"] == 0.1 and 0 < metrics["validation"] <= 100 and "torch" in metrics["versions"]
    # half of 24 rows in batches of 4, four times over: at most 12 steps, no trigger in the first 3
    log = log_of(finished)
    assert [line["step"] for line in log] == list(range(1, len(log) + 1)) and 3 < len(log) <= 12
    assert [line["triggers"] for line in log[:3]] == [0] * 3 and log[-1]["triggers"] > 0
    stored = safetensors.torch.load_file(finished / "peft.safetensors")
    assert sum(t.numel() for t in stored.values()) == structure.parameters
    assert len(set(assert_answers(finished, splits["test"]))) > 1
    model, tokenizer, _ = bipeft.load_run(finished)
    said = bipeft.answer(model, tokenizer, [e.source for e in splits["validation"]])
    assert metrics["validation"] == bipeft.accuracy(said, [e.answers for e in splits["validation"]])
    with pytest.raises(UsageError, match="holds no finished run"):
        bipeft.load_run(tmp_path)


def test_section_8_a_run_is_of_one_folder_one_data_set_and_one_backbone(world, tmp_path, monkeypatch, capfd):
    """By content: of two processes in a folder one works, and what changed since a run began is one line."""
    with bipeft.locked(tmp_path):
        assert go(world, tmp_path) == 2 and "another process works in" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
    place, run = shutil.copytree(world, tmp_path / "world", ignore=lambda *_: ["runs"]), tmp_path / "run"
    with monkeypatch.context() as stopped:
        stopped.setattr(bipeft, "run_training", raiser(KeyboardInterrupt()))
        assert go(place, run) == 2
    data, model = place / "data/custom/train.jsonl", place / "model/model.safetensors"
    larger = {name: t * 1.1 for name, t in safetensors.torch.load_file(model).items()}
    for _ in ("stopped", "finished"):
        before = contents(run)
        for file, content, words in ((data, data.read_bytes().replace(b"say 0 4", b"say 0 5"), "other data"),
                                     (model, safetensors.torch.save(larger, {"format": "pt"}), "of other numbers")):
            given = file.read_bytes()
            file.write_bytes(content)
            capfd.readouterr()
            assert go(place, run) == 2 and words in capfd.readouterr().err and contents(run) == before
            file.write_bytes(given)
        digest = bipeft.hashlib.sha256
        with monkeypatch.context() as edited:                           # of bipeft.py by another comment, say
            edited.setattr(bipeft.hashlib, "sha256", lambda content: digest(content.replace(b"# 1. The", b"# 1. the")))
            assert go(place, run) == 2 and "another version of bipeft.py" in capfd.readouterr().err
        assert contents(run) == before
        assert go(place, run) == 0


def test_section_8_a_run_is_loaded_with_its_backbone_wherever_that_is(world, finished, tmp_path, monkeypatch):
    """From another folder by model=; a folder that is not there is one line at once, and no question to the hub."""
    run, elsewhere = copied(finished, tmp_path), tmp_path / "elsewhere"
    shutil.copytree(world / "model", elsewhere)
    metrics = metrics_of(run)
    metrics["settings"]["model"] = "gone"
    (run / "metrics.json").write_text(json.dumps(metrics))
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", None)
    for model, words in ((None, "backbone, the folder gone, is not here: give load_run model="),
                         (str(tmp_path / "x"), "no such folder")):
        with pytest.raises(UsageError, match=words):
            bipeft.load_run(run, model=model)
    with pytest.raises(UsageError, match="load_run takes the backbone's folder or name"):
        bipeft.load_run(run, torch.nn.Linear(2, 2))
    monkeypatch.undo()
    assert_answers(run, bipeft.load_splits("custom", world / "data", 0)["test"], str(elsewhere))
    for name, content, words in (
            ("peft.safetensors", (run / "peft.safetensors").read_bytes()[:-4] + b"\0\0\0\0", "was changed"),
            ("structure.json", (run / "structure.json").read_bytes() + b" ", "structure.json was changed")):
        whole = (run / name).read_bytes()
        (run / name).write_bytes(content)
        with pytest.raises(UsageError, match=f"holds no finished run .*{words}"):
            bipeft.load_run(run, str(elsewhere))
        (run / name).write_bytes(whole)


def test_section_8_a_finished_run_is_left_alone_and_fresh_starts_over(world, finished, tmp_path, monkeypatch, capfd):
    """It is not repeated, no other run takes its folder; --fresh with a mistake or on a full disk destroys nothing."""
    run = copied(finished, tmp_path)
    assert go(world, run) == 0
    said, error = capfd.readouterr()
    assert "holds this run, finished" in said and "--fresh" in said and error == ""
    assert bipeft.results(metrics_of(finished)) in said and go(world, run, more="--gamma 0.5") == 2
    assert "another run: its --gamma is 0.85, now it is 0.5" in capfd.readouterr().err
    whole = (run / "metrics.json").read_text()
    for key in ("test", "validation_most_frequent", "metric"):                       # taken out by hand
        (run / "metrics.json").write_text(json.dumps({k: v for k, v in json.loads(whole).items() if k != key}))
        before = contents(run)
        assert go(world, run) == 2 and contents(run) == before
        assert f"metrics.json can't be read ('{key}'): name another --out" in capfd.readouterr().err
    (run / "metrics.json").write_text(whole)
    for mistake in ("--budget 1", "--ranks 8 4", "--model nowhere", "--structure {root}/structure.json"):
        assert go(world, run, more="--fresh " + mistake) == 2
    with monkeypatch.context() as full:
        full.setattr(Path, "write_bytes", raiser(NO_ROOM))
        assert go(world, run, more="--fresh") == 2 and "No space left" in capfd.readouterr().err
    assert contents(run) == contents(finished)
    assert go(world, run, more="--fresh --epochs 1 --search-epochs 1 --triggers 9") == 0
    assert "before trigger 9: the last " in capfd.readouterr().out                   # the steps ended before
    assert metrics_of(run)["settings"]["epochs"] == 1 and sorted(contents(run)) == RUN_FILES


def test_section_8_a_structure_transfers_with_several_seeds(world, finished, tmp_path, monkeypatch, capfd):
    """It is trained on another task without a search; the last line is mean and deviation over the seeds."""
    monkeypatch.setitem(bipeft.METRICS, "accuracy", lambda *given, scores=iter(range(99)): float(next(scores)))
    structure = bipeft.load_structure(finished / "structure.json")
    structure.geometry["parameters"] += 1
    bipeft.save_structure(structure, tmp_path / "structure.json")
    line = RTE + f"--epochs 1 --max-length 6 --structure {tmp_path}/structure.json --seed 0 1"
    assert go(world, tmp_path, line) == 0
    tests = []
    for folder in (tmp_path / "seed-0", tmp_path / "seed-1"):
        metrics = metrics_of(folder)
        assert (metrics["task"], metrics["search_seconds"], metrics["ratio"]) == ("rte", 0, 0)
        assert contents(folder)["structure.json"] == (tmp_path / "structure.json").read_bytes()
        assert contents(folder)["search.jsonl"] == b""
        tests.append(metrics["test"])
    deviation = abs(tests[0] - tests[1]) / math.sqrt(2)
    last = f"rte: test accuracy {sum(tests) / 2:.2f} ± {deviation:.2f} over 2 seeds"
    said = capfd.readouterr().out.splitlines()
    assert f"found on another backbone, of {structure.geometry['parameters']:,} parameters" in said[4]
    assert said[-1] == last and said[2].startswith("36 of 36 inputs are cut at --max-length 6, first 'rte sentence1:")
    structure.modules.pop()
    bipeft.save_structure(structure, tmp_path / "structure.json")
    assert go(world, tmp_path, line) == 2 and "with another structure.json" in capfd.readouterr().err


DRIVER = """
import os, runpy, signal, sys
from pathlib import Path
import bipeft

bipeft.torch.set_num_threads(1)
write, exchange, written = Path.write_bytes, os.replace, []

def die_at(moment, name, number):
    def die_if(now, path):
        if (now, path.name, written.count(path.name)) == (moment, f".{name}.new", int(number)):
            os.kill(os.getpid(), signal.SIGKILL)

    def write_bytes(path, content):
        written.append(path.name)
        write(path, content[:len(content) // 2])
        die_if("in", path)
        write(path, content)

    def replace(path, target):
        exchange(path, target)
        die_if("after", path)

    Path.write_bytes, os.replace = write_bytes, replace

for kill in sys.argv[1].split(","):
    if os.fork() == 0:
        die_at(*kill.split())
        os._exit(bipeft.main(sys.argv[2:]))
    print("ended:", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
sys.argv = ["bipeft.py", "--tau", "3"]
runpy.run_path(bipeft.__file__, run_name="__main__")
"""


def test_section_8_a_run_killed_at_any_moment_goes_on_to_the_same_end(world, finished, tmp_path):
    """Killed in writing a file and between two, and started again, it ends as the run never killed did. As a script the
    program says a mistake in one line and ends with exit code 2.
    """
    kills = ("in checkpoint.pt 1,after checkpoint.pt 2,in search.jsonl 3,in structure.json 1,in checkpoint.pt 4,"
             "after peft.safetensors 1,after metrics.json 1,after nothing 1")
    line = (QUICK + f"--save-every 2 --out {tmp_path}/run").format(root=world).split()
    ended = subprocess.run([sys.executable, "-c", DRIVER, kills, *line], capture_output=True, text=True,
                           cwd=Path(bipeft.__file__).parent)
    assert re.findall("ended: (.*)", ended.stdout) == 7 * ["-9"] + ["0"], ended.stdout + ended.stderr
    assert ended.stdout.count("going on from") == 6                         # the first was killed before there was any
    assert ended.stderr == "bipeft.py: --tau 3.0 must lie in 0 .. 1 (--help lists the flags)\n"
    assert ended.returncode == 2
    assert_same_end(finished, tmp_path / "run")


ENDS = [  # what ends a run, and words of the line that tells of it
    (NO_ROOM, "No space left .* another --out; then the same command goes on"),
    (KeyboardInterrupt(), "stopped: the same command, without --fresh, goes on"),
    (torch.OutOfMemoryError(), "the GPU's memory is full: use --dtype bfloat16"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "the memory is full: use a smaller --batch-size"),
    (UsageError("the loss is nan"), "the loss is nan")]


def test_section_8_whatever_ends_a_run_is_one_line_and_it_goes_on(world, finished, tmp_path, monkeypatch, capfd):
    """A full disk, Ctrl-C, no memory, a mistake: exit code 2, and at last the files of a whole run."""
    for error, words in ENDS:
        with monkeypatch.context() as broken:
            broken.setattr(bipeft, "train", raiser(error))
            assert go(world, tmp_path) == 2
        told = capfd.readouterr().err
        assert re.fullmatch(f"bipeft.py: .*{words}.*\n", told), told
    assert sorted(contents(tmp_path)) == ["checkpoint.pt", "search.jsonl", "structure.json"]
    assert go(world, tmp_path) == 0
    assert_same_end(finished, tmp_path)


def test_section_8_a_checkpoint_is_written_every_minute_too(tmp_path):
    """Where a hundred steps take longer, no more than a minute of them is lost; a changed number in it is noticed."""
    record = bipeft.Record(bipeft.Settings(task="toy", out=str(tmp_path)), torch.device("cpu"))
    record.begin("search")
    record.started -= 1000                                                        # a phase has a clock of its own
    record.save(None)
    assert 1000 <= record.stored["elapsed"] < 1060
    record.begin("train")
    assert record.elapsed() < 60
    for age, saved in ((0, None), (61, 2)):
        record.saved_at -= age
        record.after_step(2, 1, "text", 2, show=False)
        assert torch.load(tmp_path / "checkpoint.pt")["state"] == saved
    record.save(torch.zeros(1000))
    content = bytearray((tmp_path / "checkpoint.pt").read_bytes())
    content[content.index(bytes(2000)) + 1000] = 1                               # a number of the tensor
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(UsageError, match="can't be read .it is damaged"):
        bipeft.Record(record.settings, torch.device("cpu"))


@pytest.mark.parametrize("name", ["checkpoint.pt", "metrics.json"])
def test_section_8_a_damaged_file_is_refused_and_left_as_it_is(world, finished, tmp_path, monkeypatch, capfd, name):
    """Cut anywhere, or with a changed byte, it is one line; the whole one goes on, and its clocks with it."""
    run = copied(finished, tmp_path)
    if name == "checkpoint.pt":
        with monkeypatch.context() as broken:
            broken.setattr(bipeft, "train", raiser(KeyboardInterrupt()))
            assert go(world, run, more="--fresh") == 2 and capfd.readouterr().err
        assert sorted(contents(run)) == ["checkpoint.pt", *RUN_FILES[1:]]     # the old run's scores are gone
    whole = (run / name).read_bytes()
    middle = whole.index(b"custom")
    changed = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1:]
    for content in (b"", whole[:1], whole[:100], whole[:middle], whole[:-3], changed, b"\0" * len(whole)):
        (run / name).write_bytes(content)
        before = contents(run)
        assert go(world, run) == 2 and contents(run) == before
        error = capfd.readouterr().err
        assert f"{run / name} can't be read (" in error and "--fresh" in error and error.count("\n") == 1, error
    (run / name).write_bytes(whole)
    if name == "checkpoint.pt":
        torch.save({**torch.load(run / name), "search_seconds": 1000.0, "elapsed": 2000.0}, run / name)
    assert go(world, run) == 0
    assert_same_end(finished, run)
    assert name == "metrics.json" or metrics_of(run)["search_seconds"] == 1000 < metrics_of(run)["train_seconds"] / 2


def test_section_8_a_causal_model_twice(world, tmp_path):
    """A tiny Llama is searched and trained, twice to the same bytes, and answers as it did."""
    for out in ("one", "two"):
        assert go(world, tmp_path / out, more="--model {root}/llama --budget 800 --epochs 2") == 0
    assert_same_end(tmp_path / "one", tmp_path / "two")
    examples = bipeft.load_splits("custom", world / "data", 0)["test"]
    said = assert_answers(tmp_path / "one", examples)
    model, tokenizer, _ = bipeft.load_run(tmp_path / "one")
    assert bipeft.answer(model, tokenizer, [e.source for e in examples]) == said
    with pytest.raises(UsageError, match="an input is empty"):
        bipeft.answer(model, tokenizer, ["say", ""])
    table = type("Table", (list,), {"columns": ["source"]})(["source"])          # one that goes through its columns' names
    for wrong in ("say", None, 5, {"source": "say"}, table):
        with pytest.raises(UsageError, match="a list of texts"):
            bipeft.answer(model, tokenizer, wrong)
    for wrong in (["say", None], [["say", "say"]], b"say", ["say \ud800"]):
        with pytest.raises(UsageError, match="answer takes texts, and"):
            bipeft.answer(model, tokenizer, wrong)
    with pytest.warns(UserWarning, match="1 of 2 inputs are cut at 128 tokens"):
        assert len(bipeft.answer(model, tokenizer, np.array(["say", "say " * 200]))) == 2


def test_section_8_the_toy_end_to_end(tmp_path, monkeypatch):
    """By its task's own settings, in the space of all kinds, into the folder that it chooses by itself."""
    splits = {key: part[:n] for (key, part), n in zip(bipeft.toy_splits(0).items(), (128, 20, 20))}
    monkeypatch.setattr(bipeft, "toy_splits", lambda seed: splits)
    monkeypatch.setattr(bipeft.toy_backbone, "__defaults__", (5, 16))
    monkeypatch.chdir(tmp_path)
    line = "--task toy --space all --search-epochs 1 --warmup-epochs 0 --epochs 1 --triggers 5 --seed 3 --lr 0.1"
    assert bipeft.main(line.split()) == 0
    assert sorted(name for name in contents("runs/toy-all-3") if not name.startswith("backbone/")) == RUN_FILES
    metrics = metrics_of(Path("runs/toy-all-3"))
    assert 0 < metrics["parameters"] <= metrics["budget"] == int(0.03 * metrics["backbone_parameters"])
    torch.set_num_threads(2)                        # on which another backbone would be made
    monkeypatch.setattr(bipeft, "toy_backbone", None)
    assert_answers(Path("runs/toy-all-3"), splits["test"])
    torch.set_num_threads(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("more", ["--device cuda", "--device cuda --eager"])
def test_section_8_a_gpu_gives_the_same_bytes_twice(world, tmp_path, more):
    """With CUDA graphs as without a run repeats itself to the bit."""
    for out in ("one", "two"):
        assert go(world, tmp_path / out, more=more) == 0
    assert_same_end(tmp_path / "one", tmp_path / "two")


def test_section_8_the_method_needs_nothing_of_the_program():
    """Sections 0 to 4, compiled by themselves, use no name that 5 to 8 define."""
    import dis
    source = Path(bipeft.__file__).read_text()
    scope = {"__name__": "method"}
    sys.modules["method"] = SimpleNamespace(**scope)                       # dataclasses look for it
    codes = [compile(source[:source.index("# 5. The tasks")], "method", "exec")]
    exec(codes[0], scope)
    del sys.modules["method"]
    used = set()
    for code in codes:
        codes += [constant for constant in code.co_consts if hasattr(constant, "co_code")]
        used |= {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    assert len(used) > 100 and sorted(used & (vars(bipeft).keys() - scope.keys())) == []
