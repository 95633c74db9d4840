"""Tests of bipeft.py, in its order: equations, modules, spaces, Algorithm 1, tasks, command line.

    python -m pytest -q test_bipeft.py            all, on a CPU
    python -m pytest -q -k "eq_ or select_"       the equations alone

An equation has a test against numbers worked out by hand, with the arithmetic in a comment, and one
against an oracle: a loop over modules in the paper's notation, on random inputs.
"""

import ast
import copy
import dataclasses
import errno
import functools
import importlib.util
import inspect
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import tokenize
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
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

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "docs" / "experiments"))            # of two there short forms are run here
SHARED = HERE.parent / "shared"
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
    before = torch.get_num_threads(), datasets.config.HF_DATASETS_CACHE
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    torch.set_num_threads(before[0])
    datasets.config.HF_DATASETS_CACHE = before[1]
    del os.environ["HF_DATASETS_CACHE"]


@pytest.fixture(scope="session", autouse=True)
def ahead(request, quick_and_tidy, tmp_path_factory):
    """What runs in processes of its own starts before all tests, one after the other, for the second core.

    {name: future of its results}, of what the tests that were asked for need.
    """
    asked = {item.name for item in request.session.items}
    folder, pool, started = tmp_path_factory.mktemp("ahead"), ThreadPoolExecutor(1), {}
    if asked & {"test_two_processes_and_batches_in_parts_find_what_one_finds",
                "test_a_process_that_dies_ends_the_others_with_one_line_and_a_signal_stops_all"}:
        started["torchruns"] = pool.submit(run_torchruns, folder)
    if "test_a_mistake_is_told_once_by_all_processes_together" in asked:
        started["mistakes"] = pool.submit(run_mistakes, folder)
    if asked & {"test_a_run_killed_as_it_writes_goes_on_to_the_same_end", "test_the_program_runs_as_a_script"}:
        try:
            started["kills"] = pool.submit(run_kills, request.getfixturevalue("world"), folder)
        except Exception:
            pass                                                     # the tests that need that folder will tell
    yield started
    pool.shutdown(cancel_futures=True)


VERSIONS = {
    "v1.0": dict(),
    "v1.1": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": dict(family="mt5"),
    "uneven": dict(num_layers=1, num_decoder_layers=3, d_ff=40, d_kv=6, num_heads=3),
}


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
FAMILIES = {"t5": lambda: tiny_t5(seed=3, **VERSIONS["v1.1"]), "bert": lambda: tiny("Bert", "SequenceClassification"),
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
    return [(name, kind, rank) for name, role, *_ in bipeft.places_of(model) if role in bipeft.KINDS[kind].roles]


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
    peft.weights.copy_(scale * torch.randn(len(peft.weights), generator=torch.Generator().manual_seed(seed)))
    return peft


def over(seeds):
    """Makes a test of one random case a test of many; where it fails the traceback shows the seed."""
    def decorate(test):
        def of_all_seeds():
            for seed in seeds:
                test(seed)
        of_all_seeds.__name__, of_all_seeds.__doc__ = test.__name__, test.__doc__
        return of_all_seeds
    return decorate


def tensor(*values, **more):
    return torch.tensor(values, **more)


def flags(*values):
    return torch.tensor(values).bool()


def a_search(space="s2", budget=None, steps=12, model=None, **settings):
    """A Search over a tiny T5 whose modules already do something, and four batches."""
    model = model or tiny_t5()
    space = randomise(bipeft.Space(model, space), 0.1)
    budget = budget or int(space.sizes[:, -1].sum()) // 10
    settings = {"triggers": 4, "window": 2, "tau": 0.0, "lr": 1e-2, **settings}
    return bipeft.Search(model, space, budget, steps, **settings), [some_batch(seed) for seed in range(4)]


# ==================================================================================================
# 1. The equations
# ==================================================================================================


def random_case(seed):
    """A random moment of a search: up to 12 modules at up to 4 ranks, some removed, some fixed."""
    rng = random.Random(seed)
    n, k = rng.randint(1, 12), rng.randint(1, 4)
    kept = [rng.random() < 0.7 for _ in range(n)]
    fixed = [not on or rng.random() < 0.3 for on in kept]
    costs = [sorted(rng.sample(range(1, 90), k)) for _ in range(n)]
    generator = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        n=n, k=k, rng=rng, kept=kept, fixed=fixed, costs=costs, choice=[rng.randrange(k) for _ in range(n)],
        smoothed=[s / 7 for s in rng.sample(range(-40, 60), n)],              # no two alike
        dim=sorted(rng.sample(range(1, 17), k)), ranked=[rng.random() < 0.8 for _ in range(n)],
        theta=torch.randn(n, 2, generator=generator), phi=torch.randn(n, k, generator=generator),
        budget=rng.randint(0, sum(row[-1] for row in costs)), generator=generator)


def softmax(row):
    powers = [math.exp(x) for x in row]
    return [p / sum(powers) for p in powers]


def cosine(a, b):
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b)) / norms if norms else 0.0


def close(found, expected, tolerance=1e-5):
    return torch.allclose(torch.as_tensor(found).double(), torch.as_tensor(expected).double(),
                          rtol=tolerance, atol=tolerance)


def random_modules(seed):
    """Weights and gradients of up to 9 modules of 1 to 6 numbers each, and the modules' bounds."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, 6) for _ in range(rng.randint(1, 9))]
    generator = torch.Generator().manual_seed(seed)
    w, g, h = torch.randn(3, sum(lengths), generator=generator).unbind()
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return w, g, h, torch.tensor(lengths), [slice(s, s + n) for s, n in zip(starts, lengths)]


def test_eq_1_sensitivity_by_hand():
    # 1 + 0.5·4 = 3 and 2 + (-1)·3 = -1
    assert bipeft.sensitivity(tensor(1.0, 2.0), tensor(4.0, 3.0), tensor(0.5, -1.0)).tolist() == [3, -1]


@over(SEEDS)
def test_eq_1_to_3_against_a_loop(seed):
    w, g, h, lengths, bounds = random_modules(seed)
    f_tra, f_val, alpha, s = [], [], [], []
    for at in bounds:
        f_tra.append(sum(abs(a * b) for a, b in zip(w[at].tolist(), g[at].tolist())) / len(w[at]))
        f_val.append(sum(abs(a * b) for a, b in zip(w[at].tolist(), h[at].tolist())) / len(w[at]))
        alpha.append(cosine(g[at].tolist(), h[at].tolist()))
        s.append(f_tra[-1] + alpha[-1] * f_val[-1])
    found_tra, found_val = (bipeft.magnitude(w, x, lengths, lengths) for x in (g, h))
    found_alpha = bipeft.alignment(g, h, lengths)
    assert close(found_tra, f_tra) and close(found_val, f_val) and close(found_alpha, alpha)
    assert close(bipeft.sensitivity(found_tra, found_val, found_alpha), s)
    assert found_alpha.abs().max() <= 1


def test_eq_2_magnitude_by_hand():
    # M_1 = (1, -2) with G = (3, 0.5): (|3| + |-1|) / 2 = 2.      M_2 = (4) with G = (-0.25): 1 / 1 = 1
    found = bipeft.magnitude(tensor(1.0, -2.0, 4.0), tensor(3.0, 0.5, -0.25), tensor(2, 1), tensor(2, 1))
    assert found.tolist() == [2, 1]


def test_eq_2_averages_over_the_slice_once_the_rank_is_fixed():
    # (2, 1, 5) with G = (1, -4, 0), of which two are in use: (2 + 4 + 0) / 2 = 3, and not 6 / 3
    assert bipeft.magnitude(tensor(2.0, 1.0, 5.0), tensor(1.0, -4.0, 0.0), tensor(3), tensor(2)).tolist() == [3]


def test_eq_2_refuses_weights_and_gradients_of_different_shapes():
    with pytest.raises(ValueError, match="differ"):
        bipeft.magnitude(torch.ones(3), torch.ones(1), tensor(3), tensor(3))


def test_eq_3_alignment_by_hand():
    # (3, 4)·(4, 3) = 24 over 5·5: 0.96.   (1)·(-2) over 1·2: -1.   (0, 0) against anything: 0, never NaN
    found = bipeft.alignment(tensor(3.0, 4.0, 1.0, 0.0, 0.0, 7.0), tensor(4.0, 3.0, -2.0, 1.0, 2.0, 0.0),
                             tensor(2, 1, 2, 1))
    assert close(found, [0.96, -1, 0, 0], 1e-6)


def test_eq_3_of_tiny_gradients_does_not_underflow():
    # as above, times 1e-18: the product of the two squared norms, 25e-36 · 25e-36, is below float32
    assert close(bipeft.alignment(1e-18 * tensor(3.0, 4.0), 1e-18 * tensor(4.0, 3.0), tensor(2)), [0.96], 1e-5)


def test_eq_3_of_gradients_that_vanish_in_float32_is_not_nan():
    assert bipeft.alignment(tensor(1e-30), tensor(1e-30), tensor(1)).isfinite().all()


def test_eq_4_smooth_by_hand():
    # 0.85·2 + 0.15·4 = 1.7 + 0.6 = 2.3;  gamma = 1 keeps the past, gamma = 0 forgets it
    assert close(bipeft.smooth(tensor(2.0), tensor(4.0), 0.85), [2.3])
    assert bipeft.smooth(tensor(2.0), tensor(4.0), 1).tolist() == [2]
    assert bipeft.smooth(tensor(2.0), tensor(4.0), 0).tolist() == [4]


@over(SEEDS)
def test_eq_4_smooth_against_its_closed_form(seed):
    # unrolled from s-bar_0 = 0:  s-bar_t = (1 - gamma) · sum over j of gamma^(t-j) · s_j
    rng, smoothed = random.Random(seed), torch.zeros(1)
    gamma, s = rng.random(), [rng.uniform(-2, 2) for _ in range(9)]
    for value in s:
        smoothed = bipeft.smooth(smoothed, tensor(value), gamma)
    assert close(smoothed, [(1 - gamma) * sum(gamma ** (8 - j) * s[j] for j in range(9))])


def test_indicator_by_hand_stops_at_the_first_that_would_pass_the_budget():
    # by s-bar: 0 (40), 2 (40 + 30 = 70), 3 (90 > 80, stop); 1 with its 10 would fit but comes later
    s, cost, everything = tensor(5.0, 1.0, 4.0, 3.0), tensor(40.0, 10.0, 30.0, 20.0), flags(1, 1, 1, 1)
    assert bipeft.importance_indicator(s, cost, everything, 80).tolist() == [True, False, True, False]
    assert bipeft.importance_indicator(s, cost, everything, 90).tolist() == [True, False, True, True]    # exactly B
    # without module 0: 30, 50, 60
    assert bipeft.importance_indicator(s, cost, flags(0, 1, 1, 1), 80).tolist() == [False, True, True, True]
    assert not bipeft.importance_indicator(s, cost, everything, 39).any()


@over(SEEDS)
def test_indicator_against_a_loop(seed):
    c = random_case(seed)
    cost = [row[k] for row, k in zip(c.costs, c.choice)]
    indicator, total = [False] * c.n, 0
    for n in sorted(range(c.n), key=lambda n: -c.smoothed[n]):
        if c.kept[n]:
            if total + cost[n] > c.budget:
                break
            indicator[n], total = True, total + cost[n]
    found = bipeft.importance_indicator(torch.tensor(c.smoothed), torch.tensor(cost).double(), flags(*c.kept),
                                        c.budget)
    assert found.tolist() == indicator
    assert sum(x for x, on in zip(cost, found.tolist()) if on) <= c.budget


def test_eq_5_stability_by_hand():
    # cos((1,1,0), (1,0,0)) = 1/sqrt(2), cos((1,0,0), (1,0,1)) = 1/sqrt(2), mean 0.7071; the oldest row is not read
    rows = flags([0, 0, 1], [1, 1, 0], [1, 0, 0], [1, 0, 1])
    assert close(bipeft.stability(rows, 2), 0.5 ** 0.5)
    # cos((0,0,1), (1,1,0)) = 0 comes in with H = 3: 2/sqrt(2) / 3
    assert close(bipeft.stability(rows, 3), 2 * 0.5 ** 0.5 / 3)


def test_eq_5_reaches_one_and_no_more():
    # H = 5 terms of 1 over 5; the sum as printed has 6 terms, and would give 1.2
    assert bipeft.stability(flags(*[[1, 0, 1]] * 9), 5) == 1


def test_eq_5_is_zero_with_fewer_than_h_plus_one_indicators():
    assert bipeft.stability(flags(*[[1, 0, 1]] * 5), 5) == 0
    assert bipeft.stability(flags(*[[1, 0, 1]] * 6), 5) == 1


def test_eq_5_of_empty_indicators():
    # empty and empty count as equal, empty and not empty as different: (1 + 0 + 0) / 3
    assert close(bipeft.stability(flags([0, 0], [0, 0], [0, 1], [0, 0]), 3), 1 / 3)
    assert bipeft.stability(flags([0, 0], [0, 0]), 1) == 1


@over(SEEDS)
def test_eq_5_against_a_loop(seed):
    rng = random.Random(seed)
    n, h, t = rng.randint(1, 6), rng.randint(1, 5), rng.randint(1, 9)
    rows = [[rng.random() < 0.5 for _ in range(n)] for _ in range(t)]
    beta = 0.0
    if t >= h + 1:
        for j in range(t - h, t):
            now, before = rows[j], rows[j - 1]
            beta += 1.0 if not any(now) and not any(before) else cosine(now, before)
        beta /= h
    found = bipeft.stability(torch.tensor(rows), h)
    assert close(found, beta) and 0 <= found <= 1


def test_eq_6_reduction_by_hand():
    assert bipeft.expected_reduction(1000.0, 400, 10, 4) == 100          # (1000 - 400) / (10 - 4)
    assert bipeft.expected_reduction(1000.0, 400, 10, 9) == 600          # the last trigger takes all that is left
    assert bipeft.expected_reduction(300.0, 400, 10, 0) == -10           # below the budget already


def test_eq_6_refuses_a_trigger_that_is_not_left():
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


def test_keep_probability_by_hand():
    # softmax(0, 0)[1] = 1/2, softmax(0, ln 3)[1] = 3/4, and 0 for a removed one; certain: b itself
    theta, kept = tensor([0.0, 0.0], [0.0, math.log(3)], [5.0, 5.0]), flags(1, 1, 0)
    assert close(bipeft.keep_probability(theta, kept, False), [0.5, 0.75, 0])
    assert bipeft.keep_probability(theta, kept, True).tolist() == [1, 1, 0]


def test_eq_8_expected_size_by_hand():
    # softmax(0, ln 2, 0) = (1/4, 1/2, 1/4): 10/4 + 40/2 + 80/4 = 42.5 while open; q[k* = 1] = 40 once fixed
    phi = tensor([0.0, math.log(2), 0.0]).expand(2, 3)
    found = bipeft.expected_size(phi, tensor([10, 40, 80], [10, 40, 80]), flags(0, 1), tensor(2, 1))
    assert close(found, [42.5, 40])


def test_eq_8_is_exact_in_counts_that_float32_can_not_hold():
    # float32 has no 2^24 + 1. Fixed: itself.  Open, softmax(0, 0) = (1/2, 1/2): (2^24 + 1 + 2^24 + 3) / 2 = 2^24 + 2,
    # of which the first half alone, 2^23 + 1/2, would lose its half
    costs = tensor([2 ** 24 + 1, 2 ** 24 + 3], [2 ** 24 + 1, 2 ** 24 + 3], [2 ** 24 + 1, 2 ** 24 + 2])
    found = bipeft.expected_size(torch.zeros(3, 2), costs, flags(1, 0, 0), tensor(0, 0, 0))
    assert found.tolist() == [2 ** 24 + 1, 2 ** 24 + 2, 2 ** 24 + 1.5]


@over(range(24))
def test_eq_7_and_8_against_a_loop(seed):
    c, certain = random_case(seed), seed % 2 == 1
    expected, cost = 0.0, []
    for n in range(c.n):
        weights = softmax(c.phi[n].tolist())
        cost.append(c.costs[n][c.choice[n]] if c.fixed[n] else sum(q * w for q, w in zip(c.costs[n], weights)))
        p = 0.0 if not c.kept[n] else 1.0 if certain else softmax(c.theta[n].tolist())[1]
        expected += p * cost[n]
    found = bipeft.expected_size(c.phi, torch.tensor(c.costs), flags(*c.fixed), torch.tensor(c.choice))
    assert close(found, cost)
    keep = bipeft.keep_probability(c.theta, flags(*c.kept), certain)
    assert close(bipeft.expected_parameters(keep, found), expected)


def test_modules_to_remove_by_hand_stops_at_the_first_that_does_not_fit():
    # from the lowest s-bar: 1 (20), 3 (20 + 25 = 45), 2 (75 > 50, stop); 0 with its 5 would fit but is the best
    s, expected, kept = tensor(5.0, 1.0, 4.0, 3.0), tensor(5.0, 20.0, 30.0, 25.0), flags(1, 1, 1, 1)
    assert bipeft.modules_to_remove(s, torch.ones(4), expected, kept, 50).tolist() == [False, True, False, True]
    assert bipeft.modules_to_remove(s, torch.ones(4), expected, kept, 45).tolist() == [False, True, False, True]      # exactly R_z
    assert bipeft.modules_to_remove(s, torch.ones(4), expected, kept, 44).tolist() == [False, True, False, False]
    assert bipeft.modules_to_remove(s, torch.ones(4), expected, kept, 19).tolist() == [False] * 4      # skips nothing to remove 0
    # module 1 is gone already: 3 (25), 2 (55 > 50)
    assert bipeft.modules_to_remove(s, torch.ones(4), expected, flags(1, 0, 1, 1), 50).tolist() == [False, False, False, True]


def test_modules_to_remove_removes_nothing_below_the_budget():
    for reduction in (0.0, -0.5, -1e9):
        assert not bipeft.modules_to_remove(tensor(1.0, 2.0), torch.ones(2), tensor(3.0, 4.0), flags(1, 1), reduction).any()


@over(SEEDS)
def test_modules_to_remove_against_a_loop(seed):
    c = random_case(seed)
    expected = (torch.rand(c.n, generator=c.generator).double() * 50 * flags(*c.kept)).tolist()
    reduction, total, gone = c.rng.uniform(-20, 200), 0.0, [False] * c.n
    for n in sorted(range(c.n), key=lambda n: c.smoothed[n]):
        if c.kept[n]:
            if total + expected[n] > reduction:
                break
            gone[n], total = True, total + expected[n]
    found = bipeft.modules_to_remove(torch.tensor(c.smoothed), torch.ones(len(expected)),
                                     torch.tensor(expected).double(), flags(*c.kept), reduction)
    assert found.tolist() == gone
    assert not (found & ~flags(*c.kept)).any()
    assert (torch.tensor(expected) * found).sum() <= max(0, reduction)


def instability_of(history):
    """Eq. 9 of softmax(Phi) at every step, [S, N, K], by way of the sums that a search holds of them."""
    off = history.double() - history[0].double()
    return bipeft.rank_instability(history[0].double(), history[-1].double(), off.sum(0), off.square().sum(0),
                                   len(history))


def test_eq_9_instability_by_hand():
    # (1/2, 1/2) -> (1/4, 3/4): population sigma 1/8 of each; KL(first || last) = 1/2 ln 2 + 1/2 ln(2/3) = 1/2 ln(4/3);
    # 1/2 · (1/8 + 1/8) · 1/2 ln(4/3) = 0.01798. (A sample sigma gives 0.02543, the other KL 0.01635.)
    history = tensor([[0.5, 0.5]], [[0.25, 0.75]])
    assert close(instability_of(history), [math.log(4 / 3) / 16], 1e-6)


def test_eq_9_a_weight_of_zero_is_no_nan():
    # (0, 1) -> (1/4, 3/4): KL = 0 · log 0 + 1 · ln(4/3), sigma 1/8 of each; to (1, 0) it is infinite, the least stable
    assert close(instability_of(tensor([[0.0, 1.0]], [[0.25, 0.75]])), [math.log(4 / 3) / 8], 1e-6)
    assert instability_of(tensor([[0.0, 1.0]], [[1.0, 0.0]])).tolist() == [math.inf]


def test_eq_9_middle_steps_count_in_sigma_alone():
    # (1/2, 1/2), (1, 0)-like excursions and back: sigma > 0 but KL(first || last) = 0
    assert instability_of(tensor([[0.5, 0.5]], [[0.9, 0.1]], [[0.5, 0.5]])).tolist() == [0]


@over(SEEDS)
def test_eq_9_against_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    steps, n, k = 1 + seed % 4, 1 + seed % 5, 1 + seed % 3
    history = torch.randn(steps, n, k, generator=generator).softmax(-1)
    expected = []
    for row in history.transpose(0, 1).tolist():                       # [steps][K]
        sigma = []
        for values in zip(*row):
            mean = sum(values) / len(values)
            sigma.append(math.sqrt(sum((x - mean) ** 2 for x in values) / len(values)))
        kl = sum(p * math.log(p / q) for p, q in zip(row[0], row[-1]))
        expected.append(sum(s * kl for s in sigma) / k)
    assert close(instability_of(history), expected, 1e-6)


def test_potential_ranks_by_hand():
    # open: Dim[argmax] = 4; fixed at k* = 0: 1; removed (and fixed at 2): 0; kind without a rank: 0; fixed at 2: 8
    phi = tensor([0.0, 2.0, 1.0]).expand(5, 3)
    found = bipeft.potential_ranks(phi, tensor(1, 4, 8), flags(1, 1, 0, 1, 1), flags(0, 1, 1, 1, 1),
                                   tensor(2, 0, 2, 2, 2), flags(1, 1, 1, 0, 1))
    assert found.tolist() == [4, 1, 0, 0, 8]


def test_eq_10_quota_by_hand():
    # v = (3, 4, 0, 0, 0) and (4, 3, 0, 0, 0): cos 24/25; three open: floor(3 · 0.96 / 2) = floor(1.44) = 1
    before, now = tensor(3.0, 4.0, 0.0, 0.0, 0.0), tensor(4.0, 3.0, 0.0, 0.0, 0.0)
    assert bipeft.rank_quota(before, now, flags(0, 0, 0, 1, 1), 2) == 1
    # unchanged, cos exactly 1: floor(4 / 2) = 2, not the 1 that 0.9999999 would give
    assert bipeft.rank_quota(before, before, flags(0, 0, 0, 0, 1), 2) == 2
    # floor(2 · 0.96 / 2) = 0
    assert bipeft.rank_quota(before, now, flags(0, 0, 1, 1, 1), 2) == 0


def test_eq_10_last_trigger_fixes_every_open_rank():
    # cos 0.96 would leave one of the two open: floor(1.92) = 1
    assert bipeft.rank_quota(tensor(3.0, 4.0), tensor(4.0, 3.0), flags(0, 0), 1) == 2


def test_eq_10_of_all_zero_potentials_fixes_nothing():
    assert bipeft.rank_quota(torch.zeros(2), torch.zeros(2), flags(0, 0), 2) == 0


@over(SEEDS)
def test_eq_10_and_ranks_to_fix_against_a_loop(seed):
    c = random_case(seed)
    phi_before = torch.randn(c.n, c.k, generator=c.generator)
    fixed = [d or not r for d, r in zip(c.fixed, c.ranked)]

    def v_of(phi):
        v = []
        for n in range(c.n):
            best = max(range(c.k), key=lambda k: phi[n, k].item())
            v.append(0 if not c.kept[n] or not c.ranked[n] else c.dim[c.choice[n] if fixed[n] else best])
        return v

    def found_v(phi):
        return bipeft.potential_ranks(phi, torch.tensor(c.dim), flags(*c.kept), flags(*fixed),
                                      torch.tensor(c.choice), flags(*c.ranked))

    before, now, remaining = v_of(phi_before), v_of(c.phi), c.rng.randint(1, 4)
    assert found_v(phi_before).tolist() == before and found_v(c.phi).tolist() == now
    still_open = fixed.count(False)
    y = still_open if remaining == 1 else math.floor(still_open * cosine(before, now) / remaining + 1e-9)
    quota = bipeft.rank_quota(found_v(phi_before), found_v(c.phi), flags(*fixed), remaining)
    assert quota == y

    instability = torch.rand(c.n, generator=c.generator)
    lowest = sorted((n for n in range(c.n) if not fixed[n]), key=lambda n: instability[n].item())[:y]
    found = bipeft.ranks_to_fix(instability, flags(*fixed), quota)
    assert found.nonzero().flatten().tolist() == sorted(lowest)


def test_ranks_to_fix_by_hand():
    # of the open ones 0, 1, 2 with lambda 0.3, 0.1, 0.2 the two lowest; 3 is the lowest but fixed
    instability, fixed = tensor(0.3, 0.1, 0.2, 0.0), flags(0, 0, 0, 1)
    assert bipeft.ranks_to_fix(instability, fixed, tensor(2)).tolist() == [False, True, True, False]
    assert bipeft.ranks_to_fix(instability, fixed, tensor(0)).tolist() == [False] * 4
    assert bipeft.ranks_to_fix(instability, fixed, tensor(9)).tolist() == [True, True, True, False]


@over(SEEDS)
def test_permuting_the_modules_permutes_the_answers(seed):
    c = random_case(seed)
    order = torch.randperm(c.n, generator=c.generator)
    s, kept, fixed, choice = torch.tensor(c.smoothed), flags(*c.kept), flags(*c.fixed), torch.tensor(c.choice)
    costs, instability = torch.tensor(c.costs), torch.rand(c.n, generator=c.generator)
    history = torch.randn(4, c.n, c.k, generator=c.generator).softmax(-1)
    rows = torch.rand(4, c.n, generator=c.generator) < 0.5

    def answers(at):
        cost = bipeft.expected_size(c.phi[at], costs[at], fixed[at], choice[at])
        return (cost, bipeft.importance_indicator(s[at], cost, kept[at], c.budget),
                bipeft.modules_to_remove(s[at], kept[at].double(), cost, kept[at], c.budget),
                instability_of(history[:, at]), bipeft.ranks_to_fix(instability[at], fixed[at], tensor(2)))

    for straight, permuted in zip(answers(torch.arange(c.n)), answers(order)):
        assert close(straight[order], permuted)
    assert close(bipeft.stability(rows, 3), bipeft.stability(rows[:, order], 3))


@over(SEEDS)
def test_removal_only_grows_and_ends_at_the_budget(seed):
    # p = 1 throughout: after Z triggers what is kept costs at most B plus the one module that did not fit R_z
    c = random_case(seed)
    s, cost, kept = torch.tensor(c.smoothed), torch.tensor([row[-1] for row in c.costs]).double(), flags(*[True] * c.n)
    for done in range(5):
        reduction = bipeft.expected_reduction((cost * kept).sum(), c.budget, 5, done)
        gone = bipeft.modules_to_remove(s, kept.double(), cost, kept, reduction)
        assert not (gone & ~kept).any()
        kept &= ~gone
    assert (cost * kept).sum() < c.budget + cost.max()


def test_fill_budget_by_hand():
    # kept: 0 (rank 1: 10), 1 (40), 2 (30) = 80 > 60: the least sensitive kept, 2 (s-bar 1), goes: 50, so 10 are free.
    # These are offered by s-bar: 3 (s-bar 5) takes its largest rank that fits, 8 and not 20; the last 2 fit nothing.
    kept, choice = bipeft.fill_budget([9, 7, 1, 5], [[10, 20], [20, 40], [15, 30], [8, 20]],
                                      [True, True, True, False], [0, 1, 1, 1], 60)
    assert (kept, choice) == ([True, True, False, True], [0, 1, 1, 0])


def test_fill_budget_never_changes_a_kept_rank():
    # 90 are free, but module 0 was fixed at rank index 0 by Eq. 9-10, and stays there
    assert bipeft.fill_budget([1.0], [[10, 20]], [True], [0], 100) == ([True], [0])


@over(range(40))
def test_fill_budget_against_a_loop(seed):
    c = random_case(seed)
    kept, choice = list(c.kept), list(c.choice)

    def total():
        return sum(c.costs[n][choice[n]] for n in range(c.n) if kept[n])

    while total() > c.budget:
        kept[min((n for n in range(c.n) if kept[n]), key=lambda n: c.smoothed[n])] = False
    for n in sorted((n for n in range(c.n) if not kept[n]), key=lambda n: -c.smoothed[n]):
        for k in reversed(range(c.k)):
            if not kept[n] and total() + c.costs[n][k] <= c.budget:
                kept[n], choice[n] = True, k
    given = list(c.kept), list(c.choice)
    found = bipeft.fill_budget(c.smoothed, c.costs, c.kept, c.choice, c.budget)
    assert found == (kept, choice) and (c.kept, c.choice) == given           # the arguments are left alone
    assert total() <= c.budget
    assert all(c.budget - total() < c.costs[n][0] for n in range(c.n) if not kept[n])


# Gumbel-Softmax and the slice mask (3.5)


@over(SEEDS)
def test_gumbel_softmax_is_one_hot_forwards_and_soft_backwards(seed):
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
    assert close(bipeft.gumbel_softmax(logits, noise, temperature, hard=False), soft / soft.sum(1, keepdim=True), 1e-6)


def test_gumbel_samples_are_as_frequent_as_softmax_says():
    # 20,000 draws: five deviations of a share p are at most 5·sqrt(1/4 / 20000) = 0.018
    logits = tensor(0.0, 1.0, -1.0)
    noise = bipeft.gumbel_noise((20_000, 3), torch.Generator().manual_seed(0))
    share = bipeft.gumbel_softmax(logits.expand(20_000, 3), noise, 5.0).mean(0)
    assert (share - logits.softmax(0)).abs().max() < 0.018


def test_gumbel_noise_is_finite_and_of_its_generator_alone():
    before = torch.get_rng_state()
    a, b = (bipeft.gumbel_noise((1000,), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b) and a.isfinite().all() and torch.equal(before, torch.get_rng_state())
    # the distribution's mean is Euler's constant, 0.577, its deviation pi/sqrt(6) = 1.28: 5 · 1.28/sqrt(1000) = 0.2
    assert abs(a.mean() - 0.577) < 0.2


def test_sums_of_sums_are_the_sums():
    # runs of 3, 2, 1 and 4 numbers; two modules of the first two and the last two runs
    values = torch.tensor([1.0, 2, 3, 10, 20, 5, 100, 200, 300, 400])
    rows, of_rows = torch.tensor([3, 2, 1, 4]), torch.tensor([2, 2])
    assert bipeft.segment_sum(values, rows).tolist() == [6, 30, 5, 1000]
    assert bipeft.segment_sum(values, (rows, of_rows)).tolist() == [36, 1005]
    space = bipeft.Space(tiny_t5(), "all")
    values = torch.randn(len(space.weights), generator=torch.Generator().manual_seed(0)).double()
    assert close(bipeft.segment_sum(values, space.segments), bipeft.segment_sum(values, space.sizes[:, -1]), 1e-12)


def test_running_sum_by_hand():
    assert bipeft.running_sum(torch.tensor([3.0, -1, 4, 1])).tolist() == [3, 2, 6, 7]


# ==================================================================================================
# 2. The searchable modules
# ==================================================================================================


def a_module(kind, rank=8, role=None, scale=None):
    """(module, x, y): a module for an uneven T5, and an input and output of its place. scale: of random weights."""
    model = tiny_t5(**VERSIONS["uneven"])
    roles = bipeft.KINDS[kind].roles if role is None else (role,)
    place = next(place for _, r, place in bipeft.places_of(model) if r in roles)
    module = bipeft.KINDS[kind](place, rank, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    if scale is not None:
        for p in module.parameters():
            p.data = scale * torch.randn(p.shape, generator=generator)
    ins, outs = (place.in_features, place.out_features) if isinstance(place, nn.Linear) else (32, 32)
    return module, torch.randn(2, 5, ins, generator=generator), torch.randn(2, 5, outs, generator=generator)


def scaled(module, gate, mask):
    """{name: tensor} of a module under a gate and a rank mask, [R], with gradients to all of them."""
    factors = {None: torch.ones(()), "gate": gate, "mask": mask[:, None], "gate·mask": gate * mask[:, None]}
    return {name: p * factors[module.factors.get(name)] for name, p in module.named_parameters()}


def put(module, gate, mask):
    """The module as a search would have it, as a function of x and y."""
    return lambda x, y: torch.func.functional_call(module, scaled(module, gate, mask), (x, y))


def leading(rank, most=8):
    return (torch.arange(most) < rank).float()


PLACES = [(kind, role) for kind in ADDING for role in bipeft.KINDS[kind].roles]


@pytest.mark.parametrize("kind, role", PLACES)
def test_a_new_module_is_exactly_the_zero_function(kind, role):
    module, x, y = a_module(kind, role=role)
    assert torch.equal(module(x, y), y)


@pytest.mark.parametrize("kind, role", PLACES)
def test_no_tensor_of_a_new_module_has_a_dead_gradient(kind, role):
    module, x, y = a_module(kind, role=role)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    (module(x, y) * towards).sum().backward()
    assert any(p.grad.abs().max() > 0 for p in module.parameters())
    optimizer.step()                                   # moves what started at zero
    optimizer.zero_grad()
    (module(x, y) * towards).sum().backward()
    for name, p in module.named_parameters():
        assert (p.grad != 0).float().mean() > 0.9, f"{name} can't learn"


@pytest.mark.parametrize("kind", sorted(set(RANKED) & set(ADDING)))
def test_a_smaller_rank_is_the_leading_slice(kind):
    big, x, y = a_module(kind, 8, scale=0.5)
    for rank in (1, 3, 8):
        small, _, _ = a_module(kind, rank)
        for p, q in zip(small.parameters(), big.parameters()):
            p.data = q.data[tuple(slice(n) for n in p.shape)].clone()
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in big.parameters()) or rank == 8
        expected = small(x, y)
        assert not torch.allclose(expected, y)
        assert close(put(big, torch.ones(()), leading(rank))(x, y), expected)


def test_lora_adds_b_a_x_without_extra_scaling():
    module, x, y = a_module("lora", 2, scale=0.5)
    assert close(module(x, y), y + x @ module.A.T @ module.B)


def test_low_rank_adapter_is_two_products_of_factors_around_a_gelu():
    module, x, y = a_module("adapter_lr", 2, scale=0.5)
    down, up = module.down_out @ module.down_in, module.up_out.T @ module.up_in
    assert down.shape == (1, 32) and up.shape == (32, 1)                          # d/32 = 1
    assert close(module(x, y), y + F.gelu(y @ down.T + module.down_bias) @ up.T + module.up_bias)


@pytest.mark.parametrize("kind", ["serial", "parallel"])
def test_adapters_read_the_output_or_the_input_of_the_block(kind):
    module, x, y = a_module(kind, 2, scale=0.5)
    read = y if kind == "serial" else x
    assert close(module(x, y), y + F.gelu(read @ module.down.T + module.down_bias) @ module.up + module.up_bias)


def test_lnfit_is_a_delta_on_the_norms_weight():
    norm = tiny_t5().encoder.block[0].layer[0].layer_norm
    norm.weight.data = torch.rand(32) + 0.5
    module = bipeft.LNFit(norm, 1)
    module.delta.data = torch.randn(32)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    expected = (norm.weight + module.delta) * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    assert close(module(x, norm(x)), expected)


def layer_norm(x, w, b, eps):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt() * w + b


def rms_norm(x, w, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w


@torch.no_grad()
@pytest.mark.parametrize("name, at, formula", [
    ("bert", "encoder.layer.0.output.LayerNorm", lambda x, m, delta: layer_norm(x, m.weight + delta, m.bias, 1e-12)),
    ("llama", "layers.0.input_layernorm", lambda x, m, delta: rms_norm(x, m.weight + delta, 1e-6)),
    ("qwen3", "layers.0.self_attn.k_norm", lambda x, m, delta: rms_norm(x, m.weight + delta, 1e-6)),
    ("gemma", "norm", lambda x, m, delta: rms_norm(x, 1 + m.weight + delta, 1e-6))])
def test_lnfit_is_a_delta_on_the_weight_of_every_familys_norm(name, at, formula):
    model = family(name)
    norm = model.base_model.get_submodule(at)
    x = torch.randn(3, norm.weight.numel(), generator=torch.Generator().manual_seed(0)) * tensor([1.0], [1e-3], [30.0])
    assert close(norm(x), formula(x, norm, 0))
    peft = randomise(bipeft.Peft(model, [(at, "lnfit", 1)]))
    assert close(norm(x), formula(x, norm, peft.modules_[0].delta)) and not close(norm(x), formula(x, norm, 0), 1e-2)


@torch.no_grad()
def test_bitfit_beside_an_existing_bias_adds_to_it():
    model, x = family("bert"), torch.randn(3, 32)
    at = "encoder.layer.0.attention.self.query", "encoder.layer.0.attention.output.LayerNorm"
    peft = randomise(bipeft.Peft(model, [(name, "bitfit", 1) for name in at]))
    linear, norm = map(model.base_model.get_submodule, at)
    assert close(linear(x), x @ linear.weight.T + (linear.bias + peft.modules_[0].bias)) and linear.bias.any()
    assert close(norm(x), layer_norm(x, norm.weight, norm.bias + peft.modules_[1].bias, 1e-12))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["serial", "parallel", "adapter_lr"])
def test_adapters_in_a_layer_of_bert_by_hand(kind):
    # the feed-forward block is `intermediate`, then `output.dense`: a parallel adapter reads what the first is given
    model, h = family("bert"), torch.randn(2, 5, 32)
    layer = model.base_model.encoder.layer[1]
    module = randomise(bipeft.Peft(model, [("encoder.layer.1.output.dense", kind, 2)]), 0.5).modules_[0]
    a = layer.attention(h)[0]
    z = F.gelu(a @ layer.intermediate.dense.weight.T + layer.intermediate.dense.bias)             # 48 wide
    z = z @ layer.output.dense.weight.T + layer.output.dense.bias
    if kind == "adapter_lr":
        inside = F.gelu(z @ module.down_in.T @ module.down_out.T + module.down_bias)
        z = z + inside @ module.up_in.T @ module.up_out + module.up_bias
    else:
        read = {"serial": z, "parallel": a}[kind]
        z = z + F.gelu(read @ module.down.T + module.down_bias) @ module.up + module.up_bias
    norm = layer.output.LayerNorm
    assert close(layer(h), layer_norm(z + a, norm.weight, norm.bias, 1e-12), 1e-4)


def test_a_module_keeps_no_input_after_a_pass():
    model = family("bert")
    space = bipeft.Space(model, "parallel")
    for gate in (0.0, 1.0):
        bipeft.run_pass(model, space, ("ranks",), torch.full((2,), gate), ranks_at(1, 2), batch_for("bert"))
        assert all(m.seen is None for m in space.modules_)


def test_bitfit_adds_a_bias():
    module, x, y = a_module("bitfit", scale=0.5)
    assert torch.equal(module(x, y), y + module.bias)


@pytest.mark.parametrize("kind, role", PLACES)
def test_a_shut_gate_adds_exactly_zero(kind, role):
    module, x, y = a_module(kind, role=role, scale=0.5)
    assert not torch.allclose(module(x, y), y)
    assert torch.equal(put(module, torch.zeros(()), leading(4))(x, y), y)


@pytest.mark.parametrize("kind, role", PLACES)
def test_the_gradient_to_a_shut_gate_is_what_the_module_would_add(kind, role):
    # y + gate · f: the derivative by the gate, at 0 as anywhere, is f
    module, x, y = a_module(kind, role=role, scale=0.5)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    added = put(module, torch.ones(()), leading(4))(x, y) - y
    gate = torch.zeros((), requires_grad=True)
    (through,) = torch.autograd.grad((put(module, gate, leading(4))(x, y) * towards).sum(), gate)
    assert close(through, (added * towards).sum(), 1e-4) and through != 0


def test_initial_weights_are_kaiming_uniform_zero_or_for_a_prefix_of_deviation_002():
    # uniform within 1/sqrt(fan in), whose deviation is bound/sqrt(3); five deviations of a deviation: 5/sqrt(2n)
    generator = torch.Generator().manual_seed(0)
    lora = bipeft.LoRA(nn.Linear(400, 30), 8, generator)
    adapter = bipeft.SerialAdapter(nn.Sequential(nn.Linear(1, 400), nn.ReLU()), 8, generator)
    factors = bipeft.LowRankAdapter(nn.Linear(1, 6400), 8, generator)
    for p, fan_in in ((lora.A, 400), (adapter.down, 400), (factors.down_in, 6400), (factors.down_out, 8),
                      (factors.up_in, 200)):
        assert p.abs().max() <= fan_in ** -0.5
        assert abs(p.std() * (3 * fan_in) ** 0.5 - 1) < 5 / (2 * p.numel()) ** 0.5
    for p in (lora.B, adapter.up, adapter.up_bias, adapter.down_bias, factors.up_out, factors.down_bias, factors.up_bias):
        assert not p.any()
    config = SimpleNamespace(num_attention_heads=8, hidden_size=512)
    prefix = bipeft.Prefix(SimpleNamespace(config=config), 8, generator)
    for p in (prefix.keys, prefix.values):
        assert abs(p.std() / 0.02 - 1) < 5 / (2 * p.numel()) ** 0.5 and abs(p.mean()) < 0.1 / p.numel() ** 0.5


def test_a_shut_gate_passes_no_gradient_to_the_modules_weights():
    for kind, role in PLACES:
        module, x, y = a_module(kind, role=role, scale=0.5)
        put(module, torch.zeros(()), leading(4))(x, y).sum().backward()
        assert all(p.grad is None or p.grad.abs().max() == 0 for p in module.parameters()), kind


def test_components_outside_the_slice_get_no_gradient():
    module, x, y = a_module("lora", 8, scale=0.5)
    put(module, torch.ones(()), leading(4))(x, y).sum().backward()
    assert module.A.grad[:4].abs().min() > 0 and module.A.grad[4:].abs().max() == 0
    assert module.B.grad[:4].abs().min() > 0 and module.B.grad[4:].abs().max() == 0


def test_low_rank_adapter_of_rank_one_on_t5_large_holds_3168_parameters():
    # d = 1024, m = 32: 1024 + 32 + 32 (bias) + 32 + 1024 + 1024 (bias) = 3168
    assert sum(p.numel() for p in bipeft.LowRankAdapter(nn.Linear(1, 1024), 1).parameters()) == 3168


# Prefix: against a softmax over the concatenated keys


def attention_case(seed=0, dtype=torch.float32, r=3):
    """query, key, value, mask, bias of 2 rows, 4 heads, 5 queries, 6 keys, width 8; keys and values of r pairs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    mask = torch.zeros(2, 1, 5, 6, dtype=dtype)
    mask[1, :, :, 4:] = torch.finfo(dtype).min
    query, key, value = normal(2, 4, 5, 8), normal(2, 4, 6, 8), normal(2, 4, 6, 8)
    return query, key, value, mask, normal(1, 4, 5, 6), normal(4, r, 8), normal(4, r, 8)


def attend(q, k, v, mask, bias, prefix):
    module = SimpleNamespace(training=False, is_causal=False)
    return bipeft.prefix_attention(module, q, k, v, mask, position_bias=bias, prefix=prefix)[0]


def softmax_over_all(q, k, v, mask, bias, keys, values):
    """One query at a time: softmax over r prefix scores and s own scores, then the mean of the values."""
    out = torch.zeros(2, 5, 4, 8, dtype=q.dtype)
    for b in range(2):
        for h in range(4):
            for i in range(5):
                own = keys[h] @ q[b, h, i]
                rest = k[b, h] @ q[b, h, i] + bias[0, h, i] + mask[b, 0, i]
                out[b, i, h] = torch.cat([own, rest]).softmax(0) @ torch.cat([values[h], v[b, h]])
    return out


@pytest.mark.parametrize("open_pairs", [3, 1])
def test_prefix_attention_is_a_softmax_over_the_concatenation(open_pairs):
    *given, keys, values = attention_case()
    expected = softmax_over_all(*given, keys[:, :open_pairs], values[:, :open_pairs])
    assert close(attend(*given, (keys, values, leading(open_pairs, 3))), expected)


def test_a_shut_prefix_is_no_prefix():
    *given, keys, values = attention_case()
    expected = softmax_over_all(*given, keys[:, :0], values[:, :0])
    assert close(attend(*given, None), expected)
    for size in (1, 1e4):                                   # however large its scores
        assert close(attend(*given, (size * keys, values, torch.zeros(3))), expected)


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_the_gradient_to_a_prefix_gate_is_finite(gate):
    *given, keys, values = attention_case()
    for size in (1.0, 30.0, 1e4, 1e18):
        weight, larger = torch.full((3,), gate, requires_grad=True), (size * keys).requires_grad_()
        out = attend(*given, (larger, values, weight))
        grads = torch.autograd.grad(out.square().sum(), (weight, larger))
        assert all(g.isfinite().all() for g in grads), size
        if size == 1:
            assert grads[0].abs().min() > 0


def test_the_gradient_to_a_shut_prefix_gate_is_the_derivative():
    # (f(1e-4) - f(0)) / 1e-4 of the oracle's own formula: weights on the exponentials
    q, k, v, mask, bias, keys, values = attention_case(dtype=torch.float64)

    def weighed(weight):
        own, rest = (q @ keys.mT).exp() * weight, (q @ k.mT + bias + mask).exp()
        share = torch.cat([own, rest], -1)
        share = share / share.sum(-1, keepdim=True)
        return (share @ torch.cat([values.expand(2, 4, -1, 8), v], 2)).transpose(1, 2).square().sum()

    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(attend(q, k, v, mask, bias, (keys, values, weight)).square().sum(), weight)
    step = 1e-6 * torch.eye(3, dtype=torch.float64)
    expected = [(weighed(row) - weighed(-row)) / 2e-6 for row in step]
    assert close(found, torch.stack(expected), 1e-3)


def test_prefix_attention_scales_all_scores_and_drops_out_in_training():
    query, *given, mask, bias, keys, values = attention_case()

    def found(query, training=False, **more):
        module = SimpleNamespace(training=training, is_causal=False)
        return bipeft.prefix_attention(module, query, *given, mask, position_bias=bias, **more,
                                       prefix=(keys, values, torch.ones(3)))[0]
    assert close(found(query, scaling=0.5), found(0.5 * query))
    assert torch.equal(found(query, dropout=1.0), found(query)) and not found(query, training=True, dropout=1.0).any()


def test_prefix_in_a_self_attention_of_t5():
    model = tiny_t5()
    attention, h = model.encoder.block[0].layer[0].SelfAttention, torch.randn(2, 5, 32)
    peft = randomise(bipeft.Peft(model, [("encoder.block.0.layer.0.SelfAttention", "prefix", 3)]), 1.0)
    found = attention(h)[0]
    q, k, v = (layer(h).view(2, 5, 4, 8).transpose(1, 2) for layer in (attention.q, attention.k, attention.v))
    prefix = peft.modules_[0]
    keys, values = (pairs.detach().view(3, 4, 8).transpose(0, 1) for pairs in (prefix.keys, prefix.values))
    bias = attention.compute_bias(5, 5)
    expected = attention.o(softmax_over_all(q, k, v, torch.zeros(2, 1, 5, 1), bias, keys, values).flatten(2))
    assert close(found, expected, 1e-4)


@torch.no_grad()
def test_prefix_with_grouped_queries_in_a_self_attention_of_llama():
    # 4 heads of queries and 2 of keys and values: heads 0 and 1 read the first, 2 and 3 the second; a prefix's keys
    # are not rotated
    model, h = family("llama"), torch.randn(2, 5, 32)
    attention = model.model.layers[0].self_attn
    cos, sin = (t.expand(2, 5, 8) for t in model.model.rotary_emb(h, torch.arange(5)[None]))
    mask = torch.full((5, 5), -1e30).triu(1).expand(2, 1, 5, 5)
    prefix = randomise(bipeft.Peft(model, [("layers.0.self_attn", "prefix", 3)]), 1.0).modules_[0]
    found = attention(hidden_states=h, position_embeddings=(cos, sin), attention_mask=mask)[0]

    def heads(x, rotate):
        x = x.view(2, 5, -1, 8).transpose(1, 2)
        turned = torch.cat([-x[..., 4:], x[..., :4]], -1)
        return x * cos[:, None] + turned * sin[:, None] if rotate else x

    q, k, v = (heads(layer(h), rotate) for layer, rotate in ((attention.q_proj, True), (attention.k_proj, True),
                                                             (attention.v_proj, False)))
    of_head = [0, 0, 1, 1]
    keys, values = (pairs.view(3, 2, 8).transpose(0, 1)[of_head] for pairs in (prefix.keys, prefix.values))
    expected = softmax_over_all(q / 8 ** 0.5, k[:, of_head], v[:, of_head], mask, torch.zeros(1, 4, 5, 5), keys, values)
    assert close(found, attention.o_proj(expected.flatten(2)), 1e-4)


# ==================================================================================================
# 3. The search spaces
# ==================================================================================================


@pytest.fixture(scope="module")
def t5_large():
    with torch.device("meta"):
        return transformers.T5ForConditionalGeneration(transformers.T5Config(
            d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16))


def test_t5_large_has_916_modules_in_s2(t5_large):
    space = bipeft.Space(t5_large, "s2")
    assert len(space) == 916
    # 48 blocks · (q, k, v, o, wi, wo); 48 · 2; 288 linear layers + 122 norms; 24 · 2 + 24 · 3 + 2 norms
    assert Counter(space.kinds) == {"lora": 288, "adapter_lr": 96, "bitfit": 410, "lnfit": 122}
    sizes = Counter()
    for name, kind, module in zip(space.names, space.kinds, space.modules_):
        place = name.rpartition(".")[0]
        sizes[kind] += sum(p.numel() for p in module.parameters())
        if kind == "lora" and place.endswith(("SelfAttention.q", "SelfAttention.v")):
            sizes["lora on q and v"] += sum(p.numel() for p in module.parameters())
    assert sizes["lnfit"] == 124_928                       # 122 · 1024
    assert sizes["lora on q and v"] == 1_572_864           # 48 · 2 · 8 · (1024 + 1024)
    space.detach()


def test_t5_large_has_144_modules_in_s1(t5_large):
    space = bipeft.Space(t5_large, "s1")
    assert len(space) == 144 and Counter(space.kinds) == {"serial": 48, "parallel": 48, "prefix": 48}
    space.detach()


def test_t5_large_has_the_papers_number_of_parameters(t5_large):
    assert bipeft.geometry(t5_large)["parameters"] == 737_668_096


@pytest.mark.parametrize("version", VERSIONS)
def test_every_member_of_the_family_has_its_places(version):
    model = tiny_t5(**VERSIONS[version])
    config, space = model.config, bipeft.Space(model, "all")
    blocks = config.num_layers + config.num_decoder_layers
    linear = 4 + (3 if config.is_gated_act else 2)                          # q, k, v, o, and wi (or two), wo
    norms = 2 * config.num_layers + 3 * config.num_decoder_layers + 2
    assert Counter(space.kinds) == {
        "lora": blocks * linear, "adapter_lr": 2 * blocks, "bitfit": blocks * linear + norms, "lnfit": norms,
        "serial": blocks, "parallel": blocks, "prefix": blocks}
    assert len(set(space.names)) == len(space)
    assert not any("EncDecAttention" in name for name in space.names)
    decoder = config.num_decoder_layers - 1
    assert f"decoder.block.{decoder}.layer.1.layer_norm.bitfit" in space.names      # cross-attention's norm
    assert "encoder.final_layer_norm.lnfit" in space.names


@pytest.mark.parametrize("version", VERSIONS)
def test_costs_are_the_sizes_of_real_tensors(version):
    model = tiny_t5(**VERSIONS[version])
    space = bipeft.Space(model, "all", RANKS)
    space.detach()
    assert [sum(p.numel() for p in m.parameters()) for m in space.modules_] == space.sizes[:, -1].tolist()
    for k, rank in enumerate(RANKS):
        peft = bipeft.Peft(model, [(name.rpartition(".")[0], kind, rank)
                                   for name, kind in zip(space.names, space.kinds)])
        assert [sum(p.numel() for p in m.parameters()) for m in peft.modules_] == space.sizes[:, k].tolist()
        peft.detach()


def test_a_space_is_a_name_or_a_list_of_kinds():
    for space, kinds in (("s1", {"serial", "parallel", "prefix"}), ("all", set(KINDS)), ("lora", {"lora"}),
                         ("prefix, lnfit,prefix", {"prefix", "lnfit"})):
        assert set(bipeft.Space(tiny_t5(), space).kinds) == kinds


def test_an_unknown_space_is_refused():
    for space in ("s3", "", "lora,", "lora,lroa", "S1"):
        with pytest.raises(UsageError, match="unknown space"):
            bipeft.Space(tiny_t5(), space)


def test_ranks_must_ascend_from_one():
    for ranks in ((), (0, 1), (8, 4), (4, 4), (-1,)):
        with pytest.raises(UsageError, match="ranks"):
            bipeft.Space(tiny_t5(), "lora", ranks)


def gpt2():
    """Of a family that has no function of places."""
    return transformers.GPT2Model(transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, bos_token_id=1,
                                                          eos_token_id=1))


@pytest.mark.parametrize("model", [gpt2, lambda: nn.Linear(2, 2)])
def test_an_unknown_architecture_is_refused_in_one_line_that_says_how_to_write_its_places(model):
    with pytest.raises(UsageError, match="no known backbones: give one of t5, .* or its own function of places") as told:
        bipeft.Space(model(), "s2")
    assert "\n" not in str(told.value)


def test_a_model_with_two_known_backbones_is_refused():
    for second in ("t5", "bert"):
        with pytest.raises(UsageError, match="two known backbones"):
            bipeft.Space(nn.ModuleList([tiny_t5(), family(second)]), "s2")


def test_a_place_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match="no place"):
        bipeft.Peft(tiny_t5(), [("encoder.block.7.layer.0.SelfAttention.q", "lora", 1)])


def test_a_place_that_does_not_take_the_kind_is_refused():
    with pytest.raises(UsageError):
        bipeft.Peft(tiny_t5(), [("encoder.block.0.layer.0.layer_norm", "lora", 1)])


class Wrapped(nn.Module):
    """Somebody's model: a T5 inside, and a forward that returns its loss in a form of their choice."""

    def __init__(self, t5, form=lambda loss: loss):
        super().__init__()
        self.inner, self.form = t5, form

    def forward(self, **batch):
        return self.form(self.inner(**batch).loss)


@pytest.mark.parametrize("space", ["s1", "s2"])
def test_a_model_that_wraps_a_t5_has_the_same_places(space):
    plain, wrapped = tiny_t5(), Wrapped(tiny_t5())
    spaces = [bipeft.Space(model, space) for model in (plain, wrapped)]
    assert spaces[0].names == spaces[1].names and bipeft.geometry(plain) == bipeft.geometry(wrapped)
    for s in spaces:
        randomise(s)
    assert torch.equal(plain(**some_batch()).loss, wrapped(**some_batch()))


def test_a_model_may_hold_other_transformers_beside_its_backbone():
    model = nn.ModuleDict({"first": gpt2(), "second": tiny_t5()})
    before, logits = snapshot(model), logits_of(model["second"])
    space = randomise(bipeft.Space(model, "s1"))
    assert len(space) == 12 and model["first"].config._attn_implementation == "sdpa"
    space.enter(flags(*(kind == "prefix" for kind in space.kinds)).float(), torch.eye(3)[[1] * 12])
    assert not close(logits_of(model["second"]), logits, 1e-3)              # the prefixes reach their own backbone
    space.detach()
    assert same(snapshot(model), before)


def test_an_encoder_alone_and_a_classifier_can_be_adapted():
    config = dict(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
                  num_labels=2, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    encoder = transformers.T5EncoderModel(transformers.T5Config(**config))
    assert Counter(bipeft.Space(encoder, "s1").kinds) == {"serial": 2, "parallel": 2, "prefix": 2}
    model = transformers.T5ForSequenceClassification(transformers.T5Config(**config))
    space = bipeft.Space(model, "s1")
    batch = {"input_ids": torch.tensor([[5, 6, 1], [7, 8, 1]]), "labels": torch.tensor([0, 1])}
    structure = bipeft.search(model, space, [batch], [batch], 1000, 3, triggers=2)
    assert len(space) == 12 and 0 < structure.parameters <= 1000


def snapshot(model):
    """All that attaching might touch: tensors by name, what may learn, attention functions, hooks."""
    return {"values": {name: p.clone() for name, p in model.state_dict().items()},
            "learn": {name: p.requires_grad for name, p in model.named_parameters()},
            "attention": {name: m.config._attn_implementation for name, m in model.named_modules()
                          if hasattr(m, "config")},
            "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}}


def same(a, b):
    before, after = a["values"], b["values"]
    return (before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
            and all(a[key] == b[key] for key in ("learn", "attention", "hooks")))


@pytest.mark.parametrize("version, space", [("v1.0", "s1"), ("v1.1", "s2"), *((version, "all") for version in VERSIONS)])
def test_attaching_and_detaching_leaves_the_backbone_as_it_was(version, space):
    model = tiny_t5(**VERSIONS[version])
    model.encoder.final_layer_norm.weight.requires_grad_(False)
    before, logits = snapshot(model), logits_of(model)
    attached = randomise(bipeft.Space(model, space))
    names = [name for name, _ in model.named_parameters()]
    assert names == list(before["learn"]) and not any(p.requires_grad for p in model.parameters())
    assert not torch.allclose(logits_of(model), logits, atol=1e-3)
    attached.detach()
    assert same(snapshot(model), before) and torch.equal(logits_of(model), logits)
    attached.detach()                                                       # a second time changes nothing
    assert same(snapshot(model), before)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_implementation_comes_back(implementation):
    model = tiny_t5()
    model.set_attn_implementation(implementation)
    before = snapshot(model)
    bipeft.Space(model, "prefix").detach()
    assert same(snapshot(model), before)


@pytest.mark.parametrize("space", ["s1", "s2"])
def test_a_peft_holds_its_own_parameters_and_no_others(space):
    peft = bipeft.Space(tiny_t5(), space)
    assert sum(p.numel() for p in peft.parameters()) == len(peft.weights) == int(peft.sizes[:, -1].sum())


def test_a_new_space_leaves_the_models_answers_alone_without_prefixes():
    model = tiny_t5()
    logits = logits_of(model)
    space = bipeft.Space(model, "lora,adapter_lr,bitfit,lnfit,serial,parallel")
    assert torch.equal(logits_of(model), logits)
    assert len(space) == 88


def test_a_space_with_every_gate_shut_is_the_backbone():
    for kinds, exact in (("lora,adapter_lr,bitfit,lnfit,serial,parallel", True), ("prefix", False)):
        for skip in (True, False):
            model = tiny_t5()
            logits = logits_of(model)
            space = randomise(bipeft.Space(model, kinds))
            space.skips_shut = skip
            space.enter(torch.zeros(len(space)), F.one_hot(torch.zeros(len(space)).long(), 3).float())
            assert torch.equal(logits_of(model), logits) if exact else close(logits_of(model), logits, 1e-4)


# Every kind on every family: `pytest -q -k family` shows the matrix in the tests' names.

COUNTS = {     # by hand, of 2 layers (T5: 2 + 2): linear layers, blocks (two a layer), norms
    "t5": (4 * 7, 8, 12), "bert": (2 * 6, 4, 5), "roberta": (2 * 6, 4, 5),
    "llama": (2 * 7, 4, 5), "qwen3": (2 * 7, 4, 9), "gemma": (2 * 7, 4, 5)}
KEYS = ("SelfAttention.k.bitfit", "self.key.bitfit")         # a bias on all keys alike drops out of the softmax


def matrix(families, kinds=KINDS):
    pairs = [(name, kind) for name in families for kind in kinds]
    return pytest.mark.parametrize("name, kind", pairs, ids=map("-".join, pairs))


@matrix(FAMILIES)
def test_family_shut_gates_are_the_backbone(name, kind):
    model, batch = family(name), batch_for(name)
    logits, space = logits_of(model, batch), randomise(bipeft.Space(model, kind), 1.0)
    for space.skips_shut in (True, False):
        space.enter(torch.zeros(len(space)), ranks_at(1, len(space)))
        off = (logits_of(model, batch) - logits).abs().max() / logits.abs().max()
        space.leave()
        assert off <= (0 if kind != "prefix" else 3e-7 if space.skips_shut else 1e-6)
    space.enter(torch.ones(len(space)), ranks_at(1, len(space)))
    assert not close(logits_of(model, batch), logits, 1e-2)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@matrix(FAMILIES)
def test_family_gradients_are_those_of_finite_differences(name, kind):
    # in float64, along random directions; every second gate is shut. Norms, losses and the softmax beside a prefix
    # compute in float32, so that the steps are wide; a prefix that opens is steep.
    model, batch = family(name).double(), batch_for(name)
    space = randomise(bipeft.Space(model, kind), 0.2).double()
    space.lay_end_to_end()                                                   # views of one vector again
    space.leading = space.leading.double()
    generator = torch.Generator().manual_seed(1)
    gate = (torch.arange(len(space)) % 2).double()
    ranks = torch.randn(len(space), 3, generator=generator).double().softmax(1)
    at, wanted = (gate, ranks, space.weights.clone()), ("gate", "ranks", "weights")
    _, *found = bipeft.run_pass(model, space, wanted, gate, ranks, batch)

    @torch.no_grad()
    def loss_at(gate, ranks, weights):
        space.weights.copy_(weights)
        space.enter(gate, ranks, for_gates=True)
        return model(**batch).loss

    for i, (gradient, step) in enumerate(zip(found, (5e-4 if kind == "prefix" else 0.01, 0.01, 0.002))):
        size = gradient.norm()
        direction = torch.randn(gradient.shape, generator=generator).double() + gradient / size.clamp(min=1e-9)
        up, down = (loss_at(*(p + signed * direction if i == j else p for j, p in enumerate(at)))
                    for signed in (step, -step))
        assert abs((up - down) / (2 * step) - (gradient * direction).sum()) <= 1e-2 * size
        assert size > 0 or wanted[i] == "ranks" and kind not in RANKED
    dead = [full for full, g in zip(space.names, found[0].abs()) if g < 1e-6 and not full.endswith(KEYS)]
    assert not dead


@matrix(FAMILIES)
def test_family_sizes_are_those_of_real_tensors(name, kind):
    model = family(name)
    space = bipeft.Space(model, kind, RANKS)
    space.detach()
    linear, blocks, norms = COUNTS[name]
    assert len(space) == {"lora": linear, "adapter_lr": blocks, "bitfit": linear + norms, "lnfit": norms,
                          "serial": blocks // 2, "parallel": blocks // 2, "prefix": blocks // 2}[kind]
    for k, rank in enumerate(RANKS):
        peft = bipeft.Peft(model, every(kind, model, rank))
        assert [f"{at}.{kind}" for at, *_ in every(kind, model)] == peft.names == space.names
        assert [sum(p.numel() for p in m.parameters()) for m in peft.modules_] == space.sizes[:, k].tolist()
        peft.detach()


@matrix(FAMILIES)
def test_family_detaching_leaves_every_bit_as_it_was(name, kind):
    for implementation in ("sdpa", "eager") if kind == "prefix" else ("sdpa",):
        model, batch = family(name), batch_for(name)
        model.set_attn_implementation(implementation)
        next(model.parameters()).requires_grad_(False)
        before, logits = snapshot(model), logits_of(model, batch)
        space = randomise(bipeft.Space(model, kind), 1.0)
        assert not close(logits_of(model, batch), logits, 1e-2)
        bipeft.run_pass(model, space, ("weights", "gate"), torch.ones(len(space)), ranks_at(0, len(space)), batch)
        space.leave()
        space.detach()
        assert same(snapshot(model), before) and torch.equal(logits_of(model, batch), logits)


@matrix(FAMILIES)
def test_family_a_structure_built_alone_computes_what_the_search_computed(name, kind):
    # the whole chain: gates and masks of the space against modules that were built small
    model, batch = family(name), batch_for(name)
    space = randomise(bipeft.Space(model, kind))
    gate = (torch.arange(len(space)) % 3 != 1).float()
    space.enter(gate, ranks_at(1, len(space)))                                         # rank 4
    found = logits_of(model, batch)
    structure = space.structure(gate.bool().tolist(), [1] * len(space), 10**6)
    space.detach()
    peft = bipeft.apply(model, structure, seed=5)
    assert len(peft.weights) == structure.parameters and not close(logits_of(model, batch), found, 1e-2)
    cut_from([m for m, on in zip(space.modules_, gate) if on], peft.modules_)
    assert close(logits_of(model, batch), found, 1e-4)


@matrix(["t5", *CAUSAL])
def test_family_generation_with_a_cache_is_the_arg_max_of_one_pass(name, kind):
    model = family(name)
    batch = {key: value.flip(1) for key, value in batch_for(name).items() if key != "labels"}       # padded on the left
    plain = model.generate(**batch, **GREEDY)
    peft = randomise(bipeft.Peft(model, every(kind, model)), 0.5)
    calls = [0]
    peft.modules_[-1].register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    found = model.generate(**batch, **GREEDY)
    assert calls == [8] and not close(found.logits[0], plain.logits[0], 1e-2)          # a pass a token
    if name == "t5":
        logits = logits_of(model, {**batch, "decoder_input_ids": found.sequences[:, :-1]})
    else:
        mask = F.pad(batch["attention_mask"], (0, 7), value=1)
        logits = logits_of(model, {"input_ids": found.sequences[:, :-1], **positioned(mask)})
    logits = logits[:, -8:]
    assert close(torch.stack(found.logits, 1), logits, 1e-4)
    logits[:, :, 1] = -math.inf                                                        # no end before 8 tokens
    assert torch.equal(found.sequences[:, -8:], logits.argmax(-1))


def positioned(mask):
    """A mask, and positions that begin after the padding: `generate` gives them, too.

    Keys of a prefix are not rotated, so that what a query sees of them depends on its position.
    """
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


GREEDY = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, num_beams=1, use_cache=True,
              return_dict_in_generate=True, output_logits=True)


@matrix(["t5", *CAUSAL])
def test_family_left_padding_does_not_change_the_last_logits(name, kind):
    model = family(name)
    randomise(bipeft.Peft(model, every(kind, model)), 0.5)
    ids, more = some_batch()["input_ids"][:2], {"decoder_input_ids": tensor([0, 5], [0, 7])} if name == "t5" else {}
    plain = logits_of(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more})
    mask = F.pad(torch.ones_like(ids), (3, 0))
    mask = {"attention_mask": mask} if name == "t5" else positioned(mask)
    padded = logits_of(model, {"input_ids": F.pad(ids, (3, 0)), **mask, **more})
    assert close(padded[:, -1], plain[:, -1], 1e-4)


@matrix(FAMILIES)
def test_family_gradient_checkpointing_gives_the_same_gradients(name, kind):
    found, calls = [], []
    for checkpointing in (False, True):
        model = family(name).train()
        model.config.use_cache = False
        space = randomise(bipeft.Space(model, kind), 0.2)
        if checkpointing:
            bipeft.recompute_activations(model)
        calls.append([0])
        inside = space.modules_["embeddings" in space.names[0]]                        # of a layer
        inside.register_forward_pre_hook(lambda *_, count=calls[-1]: count.__setitem__(0, count[0] + 1))
        gate = (torch.arange(len(space)) % 4 != 3).float()
        found.append(bipeft.run_pass(model, space, ("gate", "ranks", "weights"), gate, ranks_at(1, len(space)),
                                     batch_for(name)))
    assert calls == [[1], [2]]
    for a, b in zip(*found):
        assert close(a, b, 1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_search_ends_within_the_budget(name):
    model, batches = family(name), [batch_for(name, seed) for seed in range(3)]
    before, space = snapshot(model), bipeft.Space(model, "all")
    assert set(space.kinds) == set(KINDS)
    structure = bipeft.search(model, space, batches, batches[::-1], 2000, 5, triggers=3, window=1, tau=0.0)
    space.detach()
    assert same(snapshot(model), before)
    peft = bipeft.apply(model, structure)
    built = sum(p.numel() for m in peft.modules_ for p in m.parameters())
    assert 1000 < built == structure.parameters <= 2000
    assert structure.geometry == {"model_type": name, "parameters": sum(p.numel() for p in model.parameters())}
    assert len(structure.modules) < len(space) and structure.also_trained == 0


# What a search also trains

HEAD = ("classifier",)


def trained(model, peft, batches):
    bipeft.train(model, peft, batches, lambda: 0.0, 2, 0.01)
    return peft


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_is_trained_beside_the_modules_and_counts_nowhere_else(dtype, tmp_path):
    model, batches = family("bert").to(dtype), [batch_for("bert", seed) for seed in range(3)]
    before, head = snapshot(model), [p.detach().clone() for p in model.classifier.parameters()]
    plain = bipeft.Space(model, "all")
    plain.detach()
    space = bipeft.Space(model, "all", also_train=HEAD)
    assert space.names == plain.names and torch.equal(space.sizes, plain.sizes)                     # N, q
    assert len(space.weights) == len(plain.weights) + 66                                            # 32 · 2 + 2
    search = bipeft.Search(model, space, 900, 6, triggers=3, window=1, tau=0.0, lr=0.01)
    structure = search.run(batches, batches)
    assert all(not torch.equal(p, q) and p.dtype == dtype for p, q in zip(model.classifier.parameters(), head))
    assert len(search.theta) == len(search.smoothed) == len(plain) and search.smoothed.isfinite().all()
    assert structure.also_trained == 66 and 400 < structure.parameters <= 900
    space.detach()
    assert same(snapshot(model), before)

    peft = trained(model, bipeft.apply(model, structure, also_train=HEAD), batches)
    assert all(not torch.equal(p, q) for p, q in zip(model.classifier.parameters(), head))
    assert len(peft.weights) == structure.parameters + 66
    logits = logits_of(model, batches[0])
    bipeft.save_weights(peft, tmp_path / "w.safetensors")
    bipeft.save_structure(structure, tmp_path / "structure.json")
    stored = safetensors.torch.load_file(tmp_path / "w.safetensors")
    assert sum(t.numel() for t in stored.values()) == len(peft.weights) and "classifier.bias" in stored
    again = bipeft.load_structure(tmp_path / "structure.json")
    assert again == structure and again.also_trained == 66
    other = family("bert").to(dtype)
    torch.nn.init.normal_(other.classifier.weight)                                     # a fresh head of its own
    other_before = snapshot(other)
    loaded = bipeft.apply(other, again, seed=7, also_train=HEAD)
    bipeft.load_weights(loaded, tmp_path / "w.safetensors")
    loaded.use(loaded.weights)                                                         # the test below says why
    assert torch.equal(logits_of(other, batches[0]), logits)
    for peft, model, whole in ((peft, model, before), (loaded, other, other_before)):
        peft.detach()
        assert same(snapshot(model), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_weights_reach_the_head(dtype, tmp_path):
    model, other = (family("bert").to(dtype) for _ in range(2))
    peft, loaded = (bipeft.Peft(m, [("embeddings.LayerNorm", "bitfit", 1)], also_train=HEAD) for m in (model, other))
    bipeft.train(model, peft, [batch_for("bert")], lambda: 0.0, 1, 0.1)
    bipeft.save_weights(peft, tmp_path / "w.safetensors")
    bipeft.load_weights(loaded, tmp_path / "w.safetensors")
    assert torch.equal(logits_of(other, batch_for("bert")), logits_of(model, batch_for("bert")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_head_in_a_search_is_its_own(dtype):
    # of autograd on a copy that nothing is attached to, all gates being shut: the head has no gate
    model, batch = family("bert").to(dtype), batch_for("bert")
    whole = copy.deepcopy(model)
    space = bipeft.Space(model, "lora", also_train=HEAD)
    _, found = bipeft.run_pass(model, space, ("weights",), torch.zeros(len(space)), ranks_at(0, len(space)), batch)
    expected = torch.autograd.grad(whole(**batch).loss, list(whole.classifier.parameters()))
    assert torch.equal(found[-66:], torch.cat([g.flatten() for g in expected]).float())
    assert not found[:-66].any() and found.dtype == torch.float32


def test_a_wrong_path_of_what_is_also_trained_is_one_line_and_changes_nothing():
    model = family("bert")
    before = snapshot(model)
    for path in ("clasifier", "class", "classifier.weights", ""):
        with pytest.raises(UsageError, match=f"no parameters '{path}'") as told:
            bipeft.Space(model, "s2", also_train=("classifier", path))
        assert "\n" not in str(told.value)
    assert same(snapshot(model), before)


def test_a_structure_applies_to_a_head_of_another_number_of_labels():
    space = bipeft.Space(family("bert"), "lora", also_train=HEAD)
    structure = space.structure([n < 3 for n in range(len(space))], [1] * len(space), 10**6)
    wider = tiny("Bert", "SequenceClassification", num_labels=5)
    peft = bipeft.apply(wider, structure, also_train=HEAD)
    assert len(peft.weights) == structure.parameters + 33 * 5 and logits_of(wider, batch_for("bert")).shape == (3, 5)
    peft.detach()
    with pytest.raises(UsageError, match="another backbone: its parameters"):         # a head that belongs to it
        bipeft.apply(wider, structure)


def test_what_is_also_trained_may_be_named_within_a_model_that_wraps_the_backbone():
    geometries = []
    for labels in (2, 5):
        model = Wrapped(tiny("Bert", "SequenceClassification", num_labels=labels))
        space = bipeft.Space(model, "lora", also_train=("inner.classifier",))
        geometries.append(space.geometry)
        assert len(space.weights) == space.sizes[:, -1].sum() + 33 * labels
    assert geometries[0] == geometries[1]


# An architecture of a person's own


class Block(nn.Module):
    """One head of attention, then a feed-forward block, as somebody writes it: no class of transformers, no config."""

    def __init__(self, d):
        super().__init__()
        self.one, self.two = nn.LayerNorm(d), nn.LayerNorm(d)
        self.queries, self.keys_values, self.mix = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.Tanh(), nn.Linear(2 * d, d))

    def forward(self, x):
        q, (k, v) = self.queries(self.one(x)), self.keys_values(self.one(x)).chunk(2, -1)
        x = x + self.mix((q @ k.mT / 5).softmax(-1) @ v)
        return x + self.mlp(self.two(x))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(40, 32), nn.Sequential(Block(32), Block(32)), nn.Linear(32, 2)

    def forward(self, ids, labels):
        return F.cross_entropy(self.head(self.blocks(self.embed(ids)).mean(1)), labels)


def own_places(model):
    for n, block in enumerate(model.blocks):
        for name, m in block.named_modules():
            if isinstance(m, (nn.Linear, nn.LayerNorm)):
                yield f"blocks.{n}.{name}", "linear" if isinstance(m, nn.Linear) else "norm", m
        yield f"blocks.{n}.mix", "attention", block.mix
        yield f"blocks.{n}.mlp", "ffn", block.mlp


def test_an_architecture_of_ones_own_is_searched_by_a_function_of_places():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Own()
        batches = [{"ids": torch.randint(0, 40, (8, 6)), "labels": torch.randint(0, 2, (8,))} for _ in range(3)]
    before, more = snapshot(model), dict(places=own_places, also_train=("head",))
    space = bipeft.Space(model, "lora,adapter_lr,bitfit,lnfit,serial,parallel", **more)
    assert Counter(space.kinds) == {"lora": 10, "adapter_lr": 4, "bitfit": 14, "lnfit": 4, "serial": 2, "parallel": 2}
    structure = bipeft.search(model, space, batches, batches, 1500, 6, triggers=3, window=1, tau=0.0)
    space.detach()
    assert same(snapshot(model), before) and 700 < structure.parameters <= 1500 and structure.also_trained == 66
    assert structure.geometry == {"model_type": "Own", "parameters": sum(p.numel() for p in model.parameters()) - 66}
    peft, loss = bipeft.apply(model, structure, **more), model(**batches[0]).item()
    assert loss == Own.forward(model, **batches[0]).item()
    bipeft.train(model, peft, batches[:1], lambda: -model(**batches[0]).item(), 30, 0.02)
    assert model(**batches[0]).item() < 0.5 * loss
    peft.detach()
    assert same(snapshot(model), before)


def test_a_model_without_a_place_for_a_kind_is_refused_in_one_line():
    with pytest.raises(UsageError, match="no place .*prefix") as told:
        bipeft.Space(Own(), "prefix", places=own_places)
    assert "\n" not in str(told.value)
    with pytest.raises(UsageError, match="Own holds no known backbones"):
        bipeft.Space(Own(), "lora")


def test_a_saved_structure_and_its_weights_come_back(tmp_path):
    model = tiny_t5()
    space = bipeft.Space(model, "all")
    kept = [n % 5 == 0 for n in range(len(space))]
    structure = space.structure(kept, [n % 3 for n in range(len(space))], 10**6, "tiny")
    space.detach()
    peft = randomise(bipeft.apply(model, structure))
    assert structure.parameters == len(peft.weights) == sum(p.numel() for p in peft.modules_.parameters())
    bipeft.save_structure(structure, tmp_path / "structure.json")
    bipeft.save_weights(peft, tmp_path / "peft.safetensors")
    again, fresh = bipeft.load_structure(tmp_path / "structure.json"), tiny_t5()
    assert again == structure
    loaded = bipeft.apply(fresh, again, seed=5)
    assert not torch.equal(logits_of(fresh), logits_of(model))
    bipeft.load_weights(loaded, tmp_path / "peft.safetensors")
    assert torch.equal(logits_of(fresh), logits_of(model))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["peft.safetensors", "structure.json"]       # no leftovers


def test_weights_of_another_structure_are_refused(tmp_path):
    place = "encoder.block.0.layer.0.SelfAttention."
    bipeft.save_weights(bipeft.Peft(tiny_t5(), [(place + "q", "lora", 4)]), tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="another structure"):
        bipeft.load_weights(bipeft.Peft(tiny_t5(), [(place + "k", "lora", 4)]), tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="shape"):
        bipeft.load_weights(bipeft.Peft(tiny_t5(), [(place + "q", "lora", 8)]), tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="can't be read"):
        bipeft.load_weights(bipeft.Peft(tiny_t5(), [(place + "q", "lora", 8)]), tmp_path / "none.safetensors")


def test_the_seed_decides_the_initial_weights():
    a, b, c = (bipeft.Space(tiny_t5(), "all", seed=seed).weights for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


# ==================================================================================================
# 4. Algorithm 1
# ==================================================================================================


def gates_of(search, monkeypatch):
    """A list to which every pass of the search adds (gate, ranks, skips shut modules)."""
    passes, enter = [], search.space.enter

    def record(gate, ranks, for_gates=False):
        passes.append((gate.detach().clone(), ranks.detach().clone(), not for_gates))
        return enter(gate, ranks, for_gates)

    monkeypatch.setattr(search.space, "enter", record)
    return passes


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("kinds", ["lora,adapter_lr,bitfit,lnfit", "serial,parallel", "prefix"])
def test_gradients_to_theta_and_phi_are_those_of_finite_differences(kinds):
    # A soft architecture (hard = False) in float64. gelu has no kinks for the steps to cross; they are as wide as
    # 0.02 since T5's own norms compute in float32.
    model = tiny_t5(**VERSIONS["v1.1"]).double()
    space = randomise(bipeft.Space(model, kinds), 0.5).double()
    space.lay_end_to_end()                                                   # views of one vector again
    space.leading = space.leading.double()
    search = bipeft.Search(model, space, int(space.sizes.sum()) // 9, steps=10)
    search.steps_done = 9                                                   # temperature 1
    generator, batch = torch.Generator().manual_seed(0), some_batch()
    theta, phi = (torch.randn(len(space), k, generator=generator).double().requires_grad_() for k in (2, 3))
    noise = [bipeft.gumbel_noise(p.shape, generator).double() for p in (theta, phi)]

    def loss_at(theta, phi):
        search.theta, search.phi = theta, phi
        space.enter(*search.architecture(noise, hard=False))
        return model(**batch).loss

    search.theta, search.phi = theta, phi
    sample = search.architecture(noise, hard=False)
    _, *gradients = search.run_pass(("gate", "ranks"), *sample, batch)
    found = torch.autograd.grad(sample, (theta, phi), gradients)
    for which, gradient in enumerate(found):
        for at in gradient.abs().flatten().argsort(descending=True)[:4].tolist():
            step = torch.zeros_like(gradient)
            step.view(-1)[at] = 0.02
            with torch.no_grad():
                up, down = (loss_at(*(p + sign * step if i == which else p for i, p in enumerate((theta, phi))))
                            for sign in (1, -1))
            assert math.isclose(gradient.view(-1)[at], (up - down) / 0.04, rel_tol=2e-3) and up != down


def test_the_temperature_falls_linearly_from_5_to_1():
    # nine steps, t = 0 .. 8: 5 at the first, 5 - 4·4/8 = 3 in the middle, 1 at the last
    search, _ = a_search("lora", steps=9)
    generator = torch.Generator().manual_seed(0)
    search.theta, search.phi = (torch.randn(len(search.space), k, generator=generator) for k in (2, 3))
    noise = [torch.zeros_like(p) for p in (search.theta, search.phi)]
    for search.steps_done, temperature in ((0, 5), (4, 3), (8, 1)):
        gate, ranks = search.architecture(noise, hard=False)
        assert close(gate, (search.theta / temperature).softmax(1)[:, 1])
        assert close(ranks, (search.phi / temperature).softmax(1))


@pytest.mark.parametrize("space", ["s1", "s2"])
def test_a_step_is_algorithm_1_done_by_hand(space, monkeypatch):
    """The three passes with plain autograd and torch's optimisers; then Eq. 1-4, module by module."""
    # the steps of Theta are as wide as 1, so that the third pass has other gates than the second
    search, (train, first, second, _) = a_search(space, warmup=9, gamma=0.85, lr=1e-3, arch_lr=1.0)
    search.fixed[::3], search.choice[::3] = True, 0                          # ranks that were fixed before
    model, modules = search.model, search.space.modules_
    start = search.space.weights.clone()
    theta, phi = (p.detach().clone() for p in (search.theta, search.phi))
    passes, noise, draw = gates_of(search, monkeypatch), [], bipeft.gumbel_noise
    monkeypatch.setattr(bipeft, "gumbel_noise", lambda *args: noise.append(draw(*args)) or noise[-1])
    with torch.random.fork_rng():
        line = search.step(train, first, second)
    assert len(noise) == 1                                                   # one draw for the whole step
    noise = noise[0].split([2, len(search.space.ranks)], 1)                  # of Theta's shape and of Phi's
    (gate, ranks, _), (gate_2, ranks_2, _), (gate_3, ranks_3, _) = passes
    assert torch.equal(gate, gate_2) and torch.equal(ranks, ranks_2)         # the same sample in passes 1 and 2
    assert set(gate.tolist()) == {0.0, 1.0}
    assert torch.equal(ranks[search.fixed], F.one_hot(search.choice[search.fixed], 3).float())
    after = search.space.weights.clone()

    def gradients(batch, weights, gate, ranks):
        # plain autograd from the loss to each weight and to the architecture, by way of scaled copies
        search.space.leave()
        search.space.weights.copy_(weights)
        masks = ranks @ search.space.leading
        leaves = [dict(m.named_parameters()) for m in modules]
        for n, m in enumerate(modules):
            m.openness = gate[n] * masks[n]
            copies, m._parameters = scaled(m, gate[n], masks[n]), {}
            for name, copy in copies.items():
                setattr(m, name, copy)
        flat = [p for own in leaves for p in own.values()]
        for p in flat:
            p.grad = None
        loss = model(**batch).loss
        loss.backward()
        for m, own in zip(modules, leaves):
            for name in own:
                delattr(m, name)
            m._parameters, m.openness = own, None
        return loss.item(), [torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten()
                                        for p in own.values()]) for own in leaves]

    # Delta W: AdamW on the training gradient
    loss, g_tra = gradients(train, start, gate, ranks)
    assert math.isclose(loss, line["loss_train"], rel_tol=1e-5)
    moved = start.clone()
    optimizer = torch.optim.AdamW([moved], lr=1e-3, weight_decay=1e-4)
    moved.grad = torch.cat(g_tra)
    optimizer.step()
    assert close(after, moved, 1e-5)
    # Theta: Adam on the validation gradient; Phi is held
    theta_leaf, phi_leaf = theta.requires_grad_(), phi.requires_grad_()
    soft_gate = ((theta_leaf + noise[0]) / 5).softmax(1)[:, 1]               # temperature 5 at the first step
    loss, g_val = gradients(first, after, gate + soft_gate - soft_gate.detach(), ranks)
    assert math.isclose(loss, line["loss_theta"], rel_tol=1e-5)
    clear = theta_leaf.grad.abs() > 1e-5                     # Adam makes a step of 1 of the last bit of a zero, too
    torch.optim.Adam([theta_leaf], lr=1.0, betas=(0.5, 0.999), weight_decay=1e-4).step()
    assert close(search.theta.detach()[clear], theta_leaf.detach()[clear], 1e-2) and clear.sum() > 4
    # Phi: Adam on the next validation batch; Theta is held, at its new value
    assert torch.equal(gate_3, ((search.theta.detach() + noise[0]).argmax(1) == 1).float())
    assert not torch.equal(gate_3, gate_2) and torch.equal(ranks_3, ranks_2)
    soft_ranks = ((phi_leaf + noise[1]) / 5).softmax(1)
    soft_ranks = torch.where(search.fixed[:, None], ranks_3, ranks_3 + soft_ranks - soft_ranks.detach())
    loss, _ = gradients(second, after, gate_3, soft_ranks)
    assert math.isclose(loss, line["loss_phi"], rel_tol=1e-5)
    before, clear = phi_leaf.detach().clone(), phi_leaf.grad.abs() > 1e-5
    torch.optim.Adam([phi_leaf], lr=1.0, betas=(0.5, 0.999), weight_decay=1e-4).step()
    assert torch.equal(search.phi.detach()[search.fixed], before[search.fixed])
    clear &= ~search.fixed[:, None]
    assert close(search.phi.detach()[clear], phi_leaf.detach()[clear], 1e-2) and clear.sum() > 4
    # Eq. 1-4: weights and gradients of one moment each, s-bar_0 = 0
    bounds = search.space.sizes[:, -1].cumsum(0).tolist()
    for n, end in enumerate(bounds):
        at = slice(bounds[n - 1] if n else 0, end)
        size = search.space.sizes[n, 0] if search.fixed[n] else end - at.start
        f_tra = (start[at] * g_tra[n]).abs().sum() / size
        f_val = (after[at] * g_val[n]).abs().sum() / size
        s = f_tra + cosine(g_tra[n].tolist(), g_val[n].tolist()) * f_val
        assert math.isclose(search.smoothed[n], 0.15 * s, rel_tol=1e-3, abs_tol=1e-9)


def test_the_papers_settings_are_the_defaults():
    model = tiny_t5()
    search = bipeft.Search(model, bipeft.Space(model, "s2"), 2000, 10)
    assert (search.triggers, search.tau, search.gamma, search.window, search.lr) == (100, 0.85, 0.85, 5, 3e-4)
    weights, theta, phi = ((o.param_groups[0], type(o)) for o in search.optimizers)
    assert weights[1] is torch.optim.AdamW and (weights[0]["lr"], weights[0]["weight_decay"]) == (3e-4, 1e-4)
    for group, kind in (theta, phi):
        assert kind is torch.optim.Adam
        assert (group["lr"], group["betas"], group["weight_decay"]) == (0.01, (0.5, 0.999), 1e-4)
    for p in (search.theta, search.phi):                  # 1e-3 · N(0, 1): five deviations of the deviation
        assert abs(p.std() / 1e-3 - 1) < 5 / math.sqrt(2 * p.numel()) and abs(p.mean()) < 5e-3 / math.sqrt(p.numel())


def moment(search):
    """Copies of what a trigger reads and writes."""
    return SimpleNamespace(**{key: getattr(search, key).detach().clone() for key in (
        "theta", "phi", "kept", "fixed", "choice", "smoothed")}, triggers_done=search.triggers_done)


def trigger_by_hand(search, now, v_before, history):
    """3.3 and 3.4 as loops over modules, for the moment `now`; history: Phi of each step since the last trigger.

    Returns b, d, k* after the trigger, v, E_t and R_z.
    """
    n_modules, z, z_max = len(search.space), now.triggers_done, search.triggers
    q, dim, ranked = search.space.sizes.tolist(), search.space.ranks, search.space.ranked.tolist()
    b, d, k_star, s = (x.tolist() for x in (now.kept, now.fixed, now.choice, now.smoothed))
    theta, *phi = (x.double().softmax(1).tolist() for x in (now.theta, *history))
    p = [b[n] * (1 if z >= 0.9 * z_max else theta[n][1]) for n in range(n_modules)]
    cost = [q[n][k_star[n]] if d[n] else sum(x * w for x, w in zip(q[n], phi[-1][n])) for n in range(n_modules)]
    expected = sum(x * c for x, c in zip(p, cost))                                                       # Eq. 7
    reduction, removed = (expected - search.budget) / (z_max - z), 0.0                                   # Eq. 6
    for n in sorted((n for n in range(n_modules) if b[n]), key=lambda n: s[n]):
        removed += p[n] * cost[n]
        if removed > reduction:
            break
        b[n], d[n] = False, True
    best = [max(range(len(dim)), key=lambda k: phi[-1][n][k]) for n in range(n_modules)]
    v = [dim[k_star[n] if d[n] else best[n]] * (b[n] and ranked[n]) for n in range(n_modules)]
    deviation = np.std(phi, axis=0)                                                                # [N, K]
    instability = [sum(deviation[n]) / len(dim) * sum(x * math.log(x / y) for x, y in zip(phi[0][n], phi[-1][n]))
                   for n in range(n_modules)]                                                            # Eq. 9
    still_open = [n for n in range(n_modules) if not d[n]]
    y = math.floor(len(still_open) * cosine(v_before, v) / (z_max - z) + 1e-9)                           # Eq. 10
    for n in sorted(still_open, key=lambda n: instability[n])[:y if z < z_max - 1 else None]:
        d[n], k_star[n] = True, best[n]
    return b, d, k_star, v, expected, reduction


# Steps of Phi as narrow as 1e-5 differ by less than float32 could tell apart in Eq. 9.
@pytest.mark.parametrize("space, arch_lr", [("s1", 0.01), ("s2", 1e-5)])
def test_a_trigger_is_the_papers_by_hand(space, arch_lr):
    search, batches = a_search(space, triggers=10, steps=24, arch_lr=arch_lr)
    ranked, removed = search.space.ranked.tolist(), []
    v = [search.space.ranks[k] * on for k, on in zip(search.phi.argmax(1).tolist(), ranked)]
    history = [search.phi.detach().clone()]
    for step in range(1, 24):
        before = moment(search)
        search.tau = 0.0 if step > 4 and step % 2 else 2.0           # a trigger every second step, and none between
        line = search.step(*batches[:3])
        now = SimpleNamespace(**{**vars(before), "smoothed": search.smoothed, "theta": search.theta.detach(),
                                 "phi": search.phi.detach().clone()})
        history.append(now.phi)
        b, d, k_star, v_then, expected, reduction = trigger_by_hand(search, now, v, history)
        # where p = 1 nothing but C_n, of float64, is in E_t
        assert math.isclose(line["expected"], expected, rel_tol=1e-12 if before.triggers_done == 9 else 1e-6)
        if search.tau:
            assert line["triggers"] == before.triggers_done and line["reduction"] is None
            continue
        assert line["triggers"] == before.triggers_done + 1
        assert math.isclose(line["reduction"], reduction, rel_tol=1e-5, abs_tol=1e-3)
        assert (search.kept.tolist(), search.fixed.tolist()) == (b, d)
        assert (line["kept"], line["fixed"]) == (sum(b), sum(x and y for x, y in zip(b, d)))
        assert [k for k, on in zip(search.choice.tolist(), d) if on] == [k for k, on in zip(k_star, d) if on]
        removed.append(b.count(False))
        v, history = v_then, history[-1:]
    assert len(removed) == 10 and all(d) and removed[-1] < len(b) and len(set(removed)) > 2         # step by step


def test_triggers_that_the_steps_left_no_room_for_come_one_by_one():
    # as by hand, each from what the one before left; from the second on no step has moved Phi, and so no lambda is
    # above 0, and ties go to the first
    search, batches = a_search("s2", steps=3, triggers=12, warmup=99)
    history = [search.phi.detach().clone()]
    v = [search.space.ranks[k] * on for k, on in zip(search.phi.argmax(1).tolist(), search.space.ranked.tolist())]
    for _ in range(3):
        search.step(*batches[:3])
        history.append(search.phi.detach().clone())
    now, select, done = moment(search), search.select, []
    search.select = lambda *args: (done.append(search.triggers_done), select(*args))
    for now.triggers_done in range(12):
        b, d, k_star, v, _, _ = trigger_by_hand(search, now, v, history)
        now.kept, now.fixed, now.choice, history = flags(*b), flags(*d), torch.tensor(k_star), history[-1:]
    structure = search.finish()
    assert done == list(range(12)) and search.ended_early == 12
    assert (search.kept.tolist(), search.fixed.tolist()) == (b, d)
    kept, choice = bipeft.fill_budget(search.smoothed.tolist(), search.space.sizes.tolist(), b, k_star, search.budget)
    assert structure == search.space.structure(kept, choice, search.budget)


class Told(list):
    """Batches that note which epochs they are told of."""

    def set_epoch(self, epoch):
        self.epochs = [*vars(self).get("epochs", []), epoch]


def test_the_weights_learn_on_the_training_batches_and_the_architecture_on_the_others():
    model, train, val, read = tiny_t5(), Told(map(some_batch, (1, 2))), Told(map(some_batch, (3, 4, 5))), []
    numbers = {str(batch["input_ids"].tolist()): n for n, batch in enumerate((*train, *val), 1)}
    model.register_forward_pre_hook(
        lambda _, args, batch: read.append(numbers[str(batch["input_ids"].tolist())]), with_kwargs=True)
    bipeft.search(model, bipeft.Space(model, "lora"), train, val, 2000, 4, triggers=9, warmup=9)
    # a step: one for Delta W out of 1, 2; one for Theta and one for Phi out of 3, 4, 5; again from the start at the end
    assert read == [1, 3, 4, 2, 5, 3, 1, 4, 5, 2, 3, 4]
    assert train.epochs == [0, 1] and val.epochs == [0, 1, 2]


def test_dropout_is_drawn_anew_in_every_step():
    model, seeds, batches = tiny_t5(dropout_rate=0.1), [], [some_batch()]
    model.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
    space = bipeft.Space(model, "lora")
    structure = bipeft.search(model, space, batches, batches, 2000, 3, triggers=9, warmup=9)
    space.detach()
    assert len(seeds) == 9 and seeds[::3] == seeds[1::3] == seeds[2::3]             # one seed for a step's passes
    bipeft.train(model, bipeft.apply(model, structure), batches, lambda: 0.0, 3, 0.01)
    assert len(seeds) == 12 and len(set(seeds)) == 6


def test_a_beta_equal_to_tau_triggers():
    # with gamma = 1 every s-bar stays 0, and so the same modules, the first that fit, are important in every step
    search, batches = a_search("bitfit", steps=4, tau=1.0, gamma=1.0, window=2, triggers=1)
    _, states = followed(search, batches)
    assert [(line["beta"], line["triggers"]) for line, _ in states] == [(0, 0), (0, 0), (1, 1)]


@pytest.mark.parametrize("space", ["s1", "s2"])
def test_every_module_is_computed_as_often_as_its_gate_is_open(space, monkeypatch):
    """A removed module costs nothing; a shut one is computed for the sake of its gate, in the pass of Theta alone."""
    search, batches = a_search(space, warmup=99, steps=20)
    search.smoothed = torch.arange(len(search.space)).float()
    search.select()
    gone = (~search.kept).tolist()
    assert 0 < sum(gone) < len(gone)
    calls = Counter()
    for n, module in enumerate(search.space.modules_):
        module.register_forward_hook(lambda *_, n=n: calls.update([n]))
    passes = gates_of(search, monkeypatch)
    for _ in range(3):
        search.step(*batches[:3])
    assert [skip for _, _, skip in passes] == [True, False, True] * 3
    for n, removed in enumerate(gone):
        assert calls[n] == (0 if removed else sum(1 if not skip else int(gate[n]) for gate, _, skip in passes))
    assert all(gate[n] == 0 for gate, _, _ in passes for n, removed in enumerate(gone) if removed)


@pytest.mark.parametrize("space", ["s1", "s2"])
def test_a_shut_gate_still_learns_and_a_removed_one_does_not(space, monkeypatch):
    search, batches = a_search(space, warmup=99)
    search.smoothed = torch.arange(len(search.space)).float()
    search.select()
    removed, before, passes = ~search.kept, search.theta.detach().clone(), gates_of(search, monkeypatch)
    search.step(*batches[:3])
    shut = (passes[1][0] == 0) & search.kept
    moved = (search.theta.detach() != before).all(1)
    assert removed.any() and shut.any()
    assert moved[shut].all() and not moved[removed].any()


def followed(search, batches):
    """Runs a search; returns the structure and, after each step, (line, copies of the state that may freeze)."""
    states = []
    structure = search.run(batches, batches[:0:-1], after_step=lambda run, line: states.append((line, SimpleNamespace(
        theta=run.theta.detach().clone(), phi=run.phi.detach().clone(), kept=run.kept.clone(), fixed=run.fixed.clone(),
        choice=run.choice.clone(), smoothed=run.smoothed.clone()))))
    return structure, states


@pytest.mark.parametrize("space", ["s1", "s2", "all"])
def test_what_is_decided_never_moves_again(space):
    search, batches = a_search(space, steps=16, triggers=6, warmup=2)
    _, states = followed(search, batches)
    assert states[-1][0]["triggers"] == 6
    for (_, before), (_, after) in zip(states, states[1:]):
        assert not (after.kept & ~before.kept).any() and not (before.fixed & ~after.fixed).any()
        assert torch.equal(after.theta[~before.kept], before.theta[~before.kept])           # bitwise
        assert torch.equal(after.phi[before.fixed], before.phi[before.fixed])
        assert torch.equal(after.choice[before.fixed], before.choice[before.fixed])
        assert torch.equal(after.smoothed[~before.kept], before.smoothed[~before.kept])     # that of its last step
    assert any((~state.kept).any() and not state.fixed.all() for _, state in states)        # gradually, not at once
    assert states[-1][1].fixed.all()                                               # the last trigger fixes all


def test_kinds_without_a_rank_are_fixed_from_the_start():
    search, _ = a_search("s2")
    assert torch.equal(search.fixed, ~search.space.ranked)
    assert {kind for kind, fixed in zip(search.space.kinds, search.fixed) if fixed} == {"bitfit", "lnfit"}
    rows = search.space.sizes[search.fixed]
    assert torch.equal(rows, rows[:, :1].expand(-1, 3))


def test_a_space_without_ranks_can_be_searched():
    search, batches = a_search("bitfit,lnfit", steps=9)
    structure, states = followed(search, batches)
    assert structure.parameters <= search.budget and all(line["loss_phi"] is None for line, _ in states)
    assert all(m["rank"] is None for m in structure.modules)


def test_the_sums_behind_eq_9_are_those_of_all_steps_and_do_not_grow():
    # population deviation and KL over every step's softmax(Phi), the initial one included, held here as a list
    search, batches = a_search("s2", steps=30, warmup=99, arch_lr=0.2)
    seen, shapes = [search.phi.detach().double().softmax(1)], set()
    for step in range(12):
        search.step(*batches[:3])
        seen.append(search.phi.detach().double().softmax(1))
        shapes.add(search.history.shape)
    sigma = torch.stack(seen).std(0, unbiased=False)
    expected = sigma.mean(1) * (seen[0] * (seen[0].log() - seen[-1].log())).sum(1)
    found = bipeft.rank_instability(*search.history, search.since)
    assert len(shapes) == 1 and search.since == 13
    assert (found - expected).abs().max() < 1e-12 and expected.max() > 1e-4


def test_no_trigger_in_the_warm_up():
    search, batches = a_search("lora", steps=12, warmup=6, triggers=3)                 # and window 2
    _, states = followed(search, batches)
    assert [line["triggers"] for line, _ in states] == [0] * 6 + [1, 2, 3]


def test_beta_is_that_of_the_indicators_and_triggers_from_tau_on():
    search, batches = a_search("s2", steps=12, tau=0.8, triggers=9, window=3, lr=0.1)
    indicators, lines, done = [], [], [0]

    def after_step(run, line):
        indicators.append(run.indicators[-1].tolist())
        lines.append(line)

    search.run(batches, batches, after_step=after_step)
    for t, line in enumerate(lines):
        pairs = zip(indicators[t - 3:t], indicators[t - 2:t + 1])
        beta = sum(cosine(before, now) for before, now in pairs) / 3 if t >= 3 else 0.0
        assert math.isclose(line["beta"], beta, abs_tol=1e-9) and 0 <= line["beta"] <= 1
        assert line["triggers"] == done[-1] + (beta >= 0.8)
        done.append(line["triggers"])
    late = [line["beta"] >= 0.8 for line in lines[3:]]
    assert any(late) and not all(late)


def test_the_learning_rate_of_the_search_falls_linearly():
    search, batches = a_search("lora", steps=4, warmup=9, lr=0.4)
    rates = []
    search.run(batches, batches, after_step=lambda run, _: rates.append(run.weight_optimizer.param_groups[0]["lr"]))
    assert close(rates, [0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("tau", [0.0, 0.85])
def test_no_trigger_before_there_are_h_plus_one_indicators(tau):
    search, batches = a_search("lora", steps=9, tau=tau, window=5)
    _, states = followed(search, batches)
    assert [line["triggers"] for line, _ in states][:5] == [0] * 5


def test_steps_that_run_out_still_end_in_a_selection():
    for steps, triggers, left in ((4, 10, 8), (2, 10, 10), (1, 5, 5)):            # triggers at steps 3 and 4
        search, batches = a_search("s2", steps=steps, triggers=triggers, warmup=2)
        structure = search.run(batches, batches)
        assert search.ended_early == left and search.triggers_done == triggers
        assert structure.modules and structure.parameters <= search.budget
        assert search.fixed.all() and search.kept.sum() < len(search.space)


@pytest.mark.parametrize("space, share", [("s1", 0.1), ("s1", 0.97), ("s2", 0.005), ("s2", 0.5), ("all", 0.1),
                                          ("lora", 0.005), ("lora", 0.5)])
def test_the_found_structure_keeps_the_budget_and_uses_it(space, share):
    model = tiny_t5()
    spread = bipeft.Space(model, space)
    budget = max(int(spread.sizes.min()), int(share * int(spread.sizes[:, -1].sum())))
    structure = bipeft.search(model, spread, [some_batch()], [some_batch(1)], budget, 5, triggers=3, window=1, tau=0.0)
    spread.detach()
    peft = bipeft.apply(tiny_t5(), structure)
    total = sum(p.numel() for m in peft.modules_ for p in m.parameters())              # counted from the tensors
    assert total == structure.parameters <= budget == structure.budget
    kept = {f"{m['name']}.{m['kind']}" for m in structure.modules}
    left_out = [row[0] for name, row in zip(spread.names, spread.sizes.tolist()) if name not in kept]
    assert not left_out or budget - total < min(left_out)


def test_p_is_certain_in_the_last_tenth_of_the_triggers():
    # Z = 20: triggers 18 and 19 (of 0 .. 19) count a kept module whole; E is then the plain sum of C_n.
    # A tenth of 4 or of 25 is rounded up, to 1 and to 3.
    search, _ = a_search("s2", triggers=20)
    for z, done, certain in ((20, 0, False), (20, 17, False), (20, 18, True), (20, 19, True), (4, 2, False),
                             (4, 3, True), (25, 21, False), (25, 22, True)):
        search.triggers, search.triggers_done = z, done
        keep, _ = search.expectation()
        assert (keep == 1).all() == certain


def test_one_seed_gives_one_structure_and_the_seed_matters():
    runs = []
    for seed in (1, 1, 2):
        search, batches = a_search("s2", seed=seed, steps=10)
        structure, states = followed(search, batches)
        runs.append((structure, [line["loss_train"] for line, _ in states]))
    assert runs[0] == runs[1] and runs[0][1] != runs[2][1]


def test_the_seed_decides_theta_phi_the_samples_and_the_dropout(monkeypatch):
    (one, batches), (two, _) = (a_search("s2", seed=seed) for seed in (1, 2))
    assert not torch.equal(one.theta, two.theta) and not torch.equal(one.phi, two.phi)
    with torch.no_grad():
        two.theta.copy_(one.theta)
        two.phi.copy_(one.phi)
    passes, seeds = [gates_of(search, monkeypatch) for search in (one, two)], []
    for search in (one, two):
        with torch.random.fork_rng():
            search.step(*batches[:3])
            seeds.append(torch.initial_seed())
    ((gate_1, ranks_1, _), *_), ((gate_2, ranks_2, _), *_) = passes
    assert not torch.equal(gate_1, gate_2) and not torch.equal(ranks_1, ranks_2) and seeds[0] != seeds[1]


@pytest.mark.parametrize("space", ["s1", "s2"])
def test_a_search_goes_on_bit_for_bit_from_its_saved_state(space, tmp_path):
    whole, batches = a_search(space, steps=9, warmup=2, triggers=4, model=tiny_t5(dropout_rate=0.1))
    expected, lines = followed(whole, batches)

    class Stop(Exception):
        pass

    def save_and_stop(run, line):
        if line["step"] == 4:
            torch.save(run.state_dict(), tmp_path / "state.pt")
            raise Stop

    interrupted, _ = a_search(space, steps=9, warmup=2, triggers=4, model=tiny_t5(dropout_rate=0.1))
    with pytest.raises(Stop):
        interrupted.run(batches, batches[:0:-1], after_step=save_and_stop)
    resumed, _ = a_search(space, steps=9, warmup=2, triggers=4, model=tiny_t5(dropout_rate=0.1))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert 0 < state["triggers_done"] < 4 and not state["kept"].all()
    resumed.load_state_dict(state)
    found, rest = followed(resumed, batches)
    assert found == expected
    assert torch.equal(resumed.space.weights, whole.space.weights)
    assert torch.equal(resumed.theta, whole.theta) and torch.equal(resumed.phi, whole.phi)
    assert torch.equal(resumed.smoothed, whole.smoothed)
    strip = [{k: v for k, v in line.items() if k != "seconds"} for line, _ in lines]
    assert [{k: v for k, v in line.items() if k != "seconds"} for line, _ in rest] == strip[4:]


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_importing_and_searching_leave_the_global_random_states_alone():
    before = random_states()
    spec = importlib.util.spec_from_file_location("bipeft_again", bipeft.__file__)
    sys.modules["bipeft_again"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    del sys.modules["bipeft_again"]
    assert random_states() == before
    model = tiny_t5(dropout_rate=0.1)
    space = bipeft.Space(model, "all")
    structure = bipeft.search(model, space, [some_batch()], [some_batch(1)], 2000, 3, triggers=2)
    space.detach()
    bipeft.train(model, bipeft.apply(model, structure), [some_batch()], lambda: 0.0, 2, 0.01)
    assert random_states() == before


def test_a_search_leaves_no_gradients_and_the_mode_it_found():
    model = tiny_t5()
    assert not model.training
    bipeft.search(model, bipeft.Space(model, "s2"), [some_batch()], [some_batch(1)], 2000, 2, triggers=2)
    assert not model.training and all(p.grad is None for p in model.parameters())


FORMS = {"tensor": lambda loss: loss, "dict": lambda loss: {"loss": loss, "more": 1},
         "tuple": lambda loss: (loss, None), "attribute": lambda loss: SimpleNamespace(loss=loss)}


def test_any_model_with_a_t5_inside_and_any_form_of_loss_can_be_searched():
    found = []
    for form in FORMS.values():
        model = Wrapped(tiny_t5(), form)
        space = bipeft.Space(model, "s1")
        found.append(bipeft.search(model, space, iter([some_batch(n) for n in range(9)]), [some_batch(9)], 2000, 6,
                                   triggers=3, window=1, tau=0.0))
    assert all(structure == found[0] for structure in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_search_on_a_backbone_of_another_precision(dtype):
    search, batches = a_search("all", steps=3, triggers=2, window=1, model=tiny_t5().to(dtype))
    structure, states = followed(search, batches)
    assert structure.parameters <= search.budget and all(math.isfinite(line["loss_train"]) for line, _ in states)
    assert search.space.weights.dtype == torch.float32


def test_a_budget_outside_the_space_is_refused():
    # the smallest modules of S2 here, BitFit and LNFit, hold 32; all of it fits the whole, so that nothing is to choose
    model = tiny_t5()
    space = bipeft.Space(model, "s2")
    whole = int(space.sizes[:, -1].sum())
    for budget in (0, -3, 31, whole, 10**9):
        with pytest.raises(UsageError, match="budget"):
            bipeft.search(model, space, [some_batch()], [some_batch()], budget, 3)
    for budget in (32, whole - 1):
        assert bipeft.Search(model, space, budget, 3).budget == budget


def test_a_search_without_batches_is_refused():
    model = tiny_t5()
    with pytest.raises(UsageError, match="no batches"):
        bipeft.search(model, bipeft.Space(model, "lora"), [], [some_batch()], 999, 3)


def test_a_loss_that_is_not_a_number_ends_the_search():
    model = Wrapped(tiny_t5(), lambda loss: loss * math.nan)
    with pytest.raises(UsageError, match="loss_train is nan at search step 1"):
        bipeft.search(model, bipeft.Space(model, "lora"), [some_batch()], [some_batch()], 999, 3)


def test_a_structure_of_other_sizes_is_refused():
    model = tiny_t5()
    space = bipeft.Space(model, "lora")
    structure = space.structure([True] * 24, [0] * 24, 10**6)
    with pytest.raises(UsageError, match="another backbone: its parameters is 38784"):
        bipeft.apply(tiny_t5(d_ff=40), structure)
    with pytest.raises(UsageError, match="its model_type is t5, this model's is mt5"):
        bipeft.apply(tiny_t5("mt5"), structure)


LIFTED = """
import contextlib, dataclasses, functools, itertools, math, re, time
from dataclasses import dataclass
import numpy as np, torch, transformers
import torch.nn.functional as F
from torch import nn
{method}
torch.manual_seed(0)
model = transformers.T5ForConditionalGeneration(transformers.T5Config(
    vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0))
batches = [dict(input_ids=torch.randint(2, 40, (3, 7)), labels=torch.randint(2, 40, (3, 2))) for _ in range(4)]
space = Space(model, "all")
structure = search(model, space, batches[:2], batches[2:], 1500, 8, triggers=3, window=1, tau=0.0)
space.detach()
peft = apply(model, structure)
optimizer, losses = torch.optim.AdamW(peft.parameters(), lr=0.02), []
for step in range(40):
    losses.append(model(**batches[0]).loss)
    losses[-1].backward()
    optimizer.step()
    optimizer.zero_grad()
peft.detach()
print(structure.parameters, float(losses[0]), float(losses[-1]))
"""


def test_the_method_can_be_lifted_out_of_the_file():
    # sections 1 - 4, with the three definitions before them, in a process that has nothing else of the file
    source = Path(bipeft.__file__).read_text()
    method = source[source.index("class UsageError"):source.index("# 5. The tasks")]
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", LIFTED.replace("{method}", method)],
                           capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd="/")
    assert ended.returncode == 0, ended.stderr
    parameters, first, last = map(float, ended.stdout.split())
    assert 0 < parameters <= 1500 and last < 0.9 * first


def code_of(page):
    """The blocks of Python in a page, compiled."""
    text = (HERE / page).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [compile(block, f"{page}, block {number}", "exec") for number, block in enumerate(blocks)]


def test_the_code_of_copying_md_runs(monkeypatch):
    monkeypatch.setattr(bipeft, "KINDS", dict(bipeft.KINDS))                   # it adds a kind
    equations, loop, kind, its_test, *others = code_of("docs/copying.md")
    with torch.random.fork_rng():
        exec(equations, names := {})
        assert (names["smoothed"] != 0).all()
        exec(loop, names := {})                                                # needs nothing of the block before
        assert max(line for *_, line in loop.co_lines()) <= 30                 # a gist
        assert 0 < names["structure"].parameters <= 800 and len(names["trained"]) > 2      # of the head alone: 2
        for block in (kind, its_test):
            exec(block, names)
        assert names["structure"].parameters <= 300 and "ia3" in {m["kind"] for m in names["structure"].modules}
        for block in others:
            exec(block, names)
    assert len(names["space"]) == 42 and names["structure"].parameters <= 1500


def test_the_kind_of_module_in_copying_md_is_one_like_any_other(monkeypatch):
    monkeypatch.setattr(bipeft, "KINDS", dict(bipeft.KINDS))
    exec(code_of("docs/copying.md")[2], {"bipeft": bipeft})                    # the class, and the line
    model = tiny_t5()

    def logits():
        with torch.no_grad():
            return model(**some_batch()).logits

    untouched, space = logits(), bipeft.Space(model, "ia3", ranks=RANKS)
    # q_n is d_out at every rank: in each of four layers q, k, v, o and wo have 32, wi has 48
    assert Counter(map(tuple, space.sizes.tolist())) == {(32,) * 3: 20, (48,) * 3: 4}
    assert not space.ranked.any() and space.sizes[:, 0].sum() == space.size == sum(p.numel() for p in space.parameters())
    space.weights.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    space.skips_shut = False
    some, whole = torch.zeros(len(space)), torch.eye(3)[2:].expand(len(space), 3)
    space.enter(some, whole)
    assert torch.equal(logits(), untouched)                                   # shut, and computed: exactly y
    some[3] = 1
    space.enter(some, whole)
    assert not torch.equal(logits(), untouched)
    space.detach()
    assert torch.equal(logits(), untouched)


def test_equations_and_kinds_of_modules_can_be_lifted_out_by_themselves():
    # what copying.md says that they need: section 1 torch alone; a class its base and two functions
    source = Path(bipeft.__file__).read_text()
    equations = source[source.index("# 1. The equations"):source.index("# 2. The searchable modules")]
    exec(equations, lifted := {"math": math, "torch": torch, "F": F})
    page = (HERE / "docs" / "copying.md").read_text().partition("```python\n")[2].partition("```")[0]
    found = {}
    for name, of in (("bipeft", bipeft), ("lifted", SimpleNamespace(**lifted))):
        with torch.random.fork_rng():
            exec(page.replace("import bipeft\n", ""), names := {"bipeft": of})
        found[name] = names["smoothed"]
    assert torch.equal(found["bipeft"], found["lifted"])
    for kind, cls in bipeft.KINDS.items():
        if kind != "prefix":                                                   # its attention is transformers'
            parts = [bipeft.Searchable, bipeft.width, bipeft.input_of, *(c for c in reversed(cls.__mro__) if c.__module__ == "bipeft")]
            names = {"math": math, "torch": torch, "F": F, "nn": nn}
            exec("\n\n".join(map(inspect.getsource, dict.fromkeys(parts))), names)
            place = nn.LayerNorm(32) if kind == "lnfit" else nn.Linear(32, 32)
            module, x = names[cls.__name__](place, 4), torch.randn(5, 32)
            bare, handles = place(x), module.attach(place)
            assert torch.equal(place(x), bare)                                 # at first the zero function
            nn.init.ones_(list(module.parameters())[-1])
            assert not torch.allclose(place(x), bare)
            for handle in handles:
                handle.remove()
            assert torch.equal(place(x), bare)


def names_of_points():
    """{number of a point of decisions.md: the names behind its arrow}."""
    points = (HERE / "docs" / "decisions.md").read_text().partition("## The paper, the authors' code")[0]
    found = re.findall(r"^(\d+)\. (.*?)(?=\n\d+\. |\n\n|\Z)", points, re.DOTALL | re.MULTILINE)
    return {int(number): re.findall("`(.+?)`", text.partition("→")[2]) for number, text in found}


def test_every_name_that_the_pages_point_to_exists():
    def resolve(name):
        return functools.reduce(getattr, name.split("."), bipeft)             # AttributeError: a name to be mended
    named = sum(names_of_points().values(), [])
    for arrow in re.findall("→((?:[\\s,]*`[^`]+`)+)", (HERE / "docs" / "performance.md").read_text()):
        named += re.findall("`(.+?)`", arrow)
    table = (HERE / "README.md").read_text().partition("## Beside the paper")[2].partition("\n## ")[0]
    for _, _, code, tests, _ in (row.split("|") for row in table.strip().splitlines()[2:]):
        named += re.findall("`(.+?)`", code)
        assert all(name in globals() for name in re.findall("`(.+?)`", tests)), tests
    assert len([resolve(name) for name in named]) > 100


def test_every_reading_in_the_file_is_a_point_that_names_the_place():
    source, points, seen = Path(bipeft.__file__).read_text(), names_of_points(), []
    assert list(points) == list(range(1, len(points) + 1))

    def within(body, name=""):
        """(first line, last line, qualified name) of every class and function."""
        for node in body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                yield node.lineno, node.end_lineno, name + node.name
                yield from within(node.body, f"{name}{node.name}.")

    places = list(within(ast.parse(source).body))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT or token.string.startswith('"""'):
            for match in re.finditer(r"[Rr]eading (\d+)|(?<!Eq. )(?<!\))(?<!-)\(((?:\d\d|[2-9])(?:, \d+)*)\)", token.string):
                line = token.start[0] + token.string[:match.start()].count("\n")
                here = [name for first, last, name in places if first <= line <= last][-1]      # the innermost
                for number in map(int, (match[1] or match[2]).split(", ")):
                    assert any(f"{name}.".startswith(f"{here}.") for name in points[number]), (line, here, number)
                    seen.append(number)
    assert len(seen) > 40 and set(range(1, 13)) <= set(seen)          # each of the twelve stands beside its code


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    bipeft.write_atomically(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UsageError, match="No space left"):
        bipeft.write_atomically(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


# ==================================================================================================
# 5. Tasks and metrics
# ==================================================================================================


PROMPTS = [
    ("cola", {"sentence": "He ran.", "label": 1, "idx": 0}, "cola sentence: He ran.", "1"),
    ("sst2", {"sentence": "fine ", "label": 0, "idx": 0}, "sst2 sentence: fine ", "0"),
    ("mrpc", {"sentence1": "A b.", "sentence2": "C d.", "label": 1, "idx": 0},
     "mrpc sentence1: A b. sentence2: C d.", "1"),
    ("qqp", {"question1": "Who?", "question2": "What?", "label": 0, "idx": 0},
     "qqp question1: Who? question2: What?", "0"),
    ("stsb", {"sentence1": "A", "sentence2": "B", "label": 2.6, "idx": 0}, "stsb sentence1: A sentence2: B", "2.6"),
    ("mnli", {"premise": "A", "hypothesis": "B", "label": 2, "idx": 0}, "mnli premise: A hypothesis: B", "2"),
    ("qnli", {"question": "Who?", "sentence": "He.", "label": 1, "idx": 0}, "qnli question: Who? sentence: He.", "1"),
    ("rte", {"sentence1": "A", "sentence2": "B", "label": 0, "idx": 0}, "rte sentence1: A sentence2: B", "0"),
    ("boolq", {"question": "is it", "passage": "It is.", "idx": 0, "label": 1},
     "boolq question: is it passage: It is.", "1"),
    ("cb", {"premise": "A", "hypothesis": "B", "idx": 0, "label": 2}, "cb premise: A hypothesis: B", "2"),
    ("multirc", {"paragraph": "<b>Sent 1: </b>He ran.<br><b>Sent 2: </b>She sat.<br>", "question": "Who ran?",
                 "answer": "He", "idx": {"paragraph": 0, "question": 0, "answer": 0}, "label": 1},
     "multirc question: Who ran? answer: He paragraph: Sent 1: He ran. Sent 2: She sat.", "1"),
    ("record", {"passage": "Rome fell.\n@highlight\nIt rained\n@highlight\nNero sang", "query": "@placeholder fell",
                "entities": ["Rome", "Nero"], "entity_spans": {}, "answers": ["Rome"], "idx": {}},
     "record query: @placeholder fell entities: Rome, Nero passage: Rome fell. It rained. Nero sang", "Rome"),
    ("wic", {"word": "bank", "sentence1": "A bank.", "sentence2": "Banks.", "start1": 2, "start2": 0, "end1": 6,
             "end2": 5, "idx": 0, "label": 0}, "wic word: bank sentence1: A bank. sentence2: Banks.", "0"),
    ("custom", {"source": "say hello", "target": "hello"}, "say hello", "hello"),
]


@pytest.mark.parametrize("name, row, source, target", PROMPTS, ids=[row[0] for row in PROMPTS])
def test_prompt_and_target(name, row, source, target):
    given = copy.deepcopy(row)
    for training in (True, False):
        assert bipeft.to_examples(name, row, training) == [bipeft.Example(source, target, (target,))]
    assert row == given


def test_all_thirteen_tasks_of_the_paper_are_there():
    paper = {  # epochs, warm-up epochs, metric: design of the experiments, as in the paper's appendices
        "cola": (15, 2, "Matthews"), "sst2": (5, 1, "accuracy"), "mrpc": (20, 2, "F1"), "qqp": (3, 1, "F1"),
        "stsb": (15, 2, "Pearson"), "mnli": (3, 1, "accuracy"), "qnli": (4, 1, "accuracy"), "rte": (20, 3, "accuracy"),
        "boolq": (15, 2, "accuracy"), "cb": (40, 4, "accuracy"), "multirc": (40, 4, "F1"),
        "record": (1, 1, "token F1"), "wic": (15, 2, "accuracy")}
    for name, facts in paper.items():
        task = bipeft.TASKS[name]
        assert (task.epochs, task.warmup_epochs, task.metric) == facts
    carved = {name for name in paper if bipeft.TASKS[name].carve}
    assert carved == {"sst2", "qqp", "qnli", "mnli", "record"}
    lengths = {name: (s.max_length, s.batch_size) for name in paper for s in [bipeft.parse(["--task", name])]}
    for name, found in lengths.items():
        glue = name in ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli")        # the paper's RTE is SuperGLUE's
        assert found == ((512, 16) if name == "record" else (128, 32) if glue else (256, 32))


def test_stsb_is_rounded_to_the_nearest_fifth():
    # 0.11·5 = 0.55 -> 1 -> 0.2;  2.5·5 = 12.5 is a tie, which goes to the even 12, as in T5 (np.round)
    for label, target in ((0.0, "0.0"), (5.0, "5.0"), (2.5, "2.4"), (0.1, "0.0"), (0.11, "0.2"), (3.8, "3.8"),
                          (4.91, "5.0"), ("1.25", "1.2"), (4, "4.0")):
        (example,) = bipeft.to_examples("stsb", {"sentence1": "", "sentence2": "", "label": label}, True)
        assert example.target == target == f"{np.round(float(label) * 5) / 5:.1f}"


def test_record_repeats_an_example_for_each_answer_in_training_alone():
    row = {"passage": "p", "query": "q", "entities": ["A", "B"], "answers": ["A", "B", "A"]}
    training = bipeft.to_examples("record", row, True)
    assert [(e.target, e.answers) for e in training] == [("A", ("A", "B")), ("B", ("A", "B"))]
    assert [e.answers for e in bipeft.to_examples("record", row, False)] == [("A", "B")]


@pytest.mark.parametrize("change", [{"answers": "['A']"}, {"entities": "A, B"}, {"answers": [3]}, {"entities": [None]}])
def test_record_without_lists_of_texts_is_refused(change):
    """As it comes out of a .csv."""
    with pytest.raises(UsageError, match=f"{next(iter(change))} that are no list of texts"):
        bipeft.to_examples("record", {"passage": "p", "query": "q", "entities": ["A"], "answers": ["A"], **change}, True)


def test_record_takes_a_number_for_a_passage():
    row = {"passage": 7, "query": "q", "entities": ["A"], "answers": ["A"]}
    assert bipeft.to_examples("record", row, True)[0].source.endswith("passage: 7")


@pytest.mark.parametrize("before, after", [
    ("ran.\n@highlight\nThen", "ran. Then"), ("ran?\n@highlight\nThen", "ran? Then"),
    ("ran\n@highlight\nThen", "ran. Then"), ("\"Go\"\n@highlight\nHe", "\"Go\" He")])
def test_record_highlights_become_sentences(before, after):
    row = {"passage": before, "query": "q", "entities": ["A"], "answers": ["A"]}
    assert bipeft.to_examples("record", row, True)[0].source.endswith(f"passage: {after}")


def test_a_label_outside_the_task_is_refused():
    for name, label in (("rte", -1), ("rte", 2), ("mnli", 3), ("cola", "yes"), ("stsb", 5.2), ("stsb", -1),
                        ("boolq", None), ("stsb", math.nan), ("rte", 0.7)):
        row = {**{key: "x" for key in bipeft.TASKS[name].fields}, "label": label}
        with pytest.raises(UsageError, match="label"):
            bipeft.to_examples(name, row, True)


# Splits


def rows_of(name, count, start=0):
    """Made-up rows in the hub's columns; every text is its own."""
    numbers, task = range(start, start + count), bipeft.TASKS[name]
    if name == "custom":
        return [{"source": f"say {i % 2} {i}", "target": "yes" if i % 2 else "no"} for i in numbers]
    return [{**{key: f"{key} {i}" for key in task.fields}, "label": i % len(task.labels), "idx": i} for i in numbers]


def write_split(folder, name, split, rows, ending="parquet"):
    """Writes rows as DIR/<task>/<split>.<ending>."""
    path = Path(folder) / name / f"{split}.{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = datasets.Dataset.from_list(rows)
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        getattr(data, {"parquet": "to_parquet", "csv": "to_csv"}[ending])(str(path))


def texts(split):
    return sorted(e.source for e in split)


def sizes(name, folder):
    return {key: len(value) for key, value in bipeft.load_splits(name, folder, 0).items()}


def test_small_tasks_halve_the_validation_set(tmp_path):
    write_split(tmp_path, "cola", "train", rows_of("cola", 20))
    write_split(tmp_path, "cola", "validation", rows_of("cola", 11, 100))
    splits = [bipeft.load_splits("cola", tmp_path, seed) for seed in (0, 0, 1)]
    train, validation, test = (texts(splits[0][key]) for key in ("train", "validation", "test"))
    assert train == sorted(f"cola sentence: sentence {i}" for i in range(20))
    assert (len(validation), len(test)) == (5, 6) and not set(validation) & set(test)
    assert sorted(validation + test) == sorted(f"cola sentence: sentence {i}" for i in range(100, 111))
    assert splits[0] == splits[1] and texts(splits[2]["validation"]) != validation


@pytest.mark.parametrize("name, original", [("sst2", "validation"), ("mnli", "validation_matched")])
def test_large_tasks_take_2000_validation_rows_from_training(tmp_path, name, original):
    write_split(tmp_path, name, "train", rows_of(name, 4100))
    write_split(tmp_path, name, original, rows_of(name, 30, 9000))
    first, other = (bipeft.load_splits(name, tmp_path, seed) for seed in (0, 1))
    assert {key: len(value) for key, value in first.items()} == {"train": 2100, "validation": 2000, "test": 30}
    train, validation, test = (texts(first[key]) for key in ("train", "validation", "test"))
    assert not set(train) & set(validation) and len(set(train + validation)) == 4100
    assert texts(other["validation"]) != validation and texts(other["test"]) == test


def test_a_small_training_set_gives_half_of_itself_at_most(tmp_path):
    write_split(tmp_path, "sst2", "train", rows_of("sst2", 30))
    write_split(tmp_path, "sst2", "validation", rows_of("sst2", 4, 50))
    assert sizes("sst2", tmp_path) == {"train": 15, "validation": 15, "test": 4}


def test_the_three_file_formats_hold_the_same_examples(tmp_path):
    for ending in ("parquet", "jsonl", "csv"):
        for split, start in (("train", 0), ("validation", 50)):
            write_split(tmp_path / ending, "rte", split, rows_of("rte", 8, start), ending)
    a, b, c = (bipeft.load_splits("rte", tmp_path / ending, 0) for ending in ("parquet", "jsonl", "csv"))
    assert a == b == c and len(a["train"]) == 8


def test_custom_reads_its_test_split_if_there_is_one(tmp_path):
    for split, start in (("train", 0), ("validation", 50)):
        write_split(tmp_path, "custom", split, rows_of("custom", 8, start), "jsonl")
    assert sizes("custom", tmp_path) == {"train": 8, "validation": 4, "test": 4}
    # the folder itself may hold the files too
    assert bipeft.load_splits("custom", tmp_path / "custom", 0) == bipeft.load_splits("custom", tmp_path, 0)
    write_split(tmp_path, "custom", "test", rows_of("custom", 6, 90), "jsonl")
    assert sizes("custom", tmp_path) == {"train": 8, "validation": 8, "test": 6}


def test_superglues_columns_of_rte_are_read(tmp_path):
    for split, start in (("train", 0), ("validation", 50)):
        rows = [{"premise": r["sentence1"], "hypothesis": r["sentence2"], "label": r["label"]}
                for r in rows_of("rte", 8, start)]
        write_split(tmp_path, "rte", split, rows)
    train = bipeft.load_splits("rte", tmp_path, 0)["train"]
    assert "rte sentence1: sentence1 3 sentence2: sentence2 3" in texts(train)


def test_the_hub_is_asked_for_the_right_files(monkeypatch):
    asked = []

    def stand_in(*args, **kwargs):
        asked.append((args, kwargs))
        name = "cola" if args[0] == "nyu-mll/glue" else "wic"
        return datasets.Dataset.from_list(rows_of(name, 8, 100 * len(asked)))

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    bipeft.load_splits("cola", None, 0)
    bipeft.load_splits("wic", None, 0)
    assert asked[:2] == [(("nyu-mll/glue", "cola"), {"split": split}) for split in ("train", "validation")]
    # SuperGLUE's own repository is a script, which is not run: its conversion to parquet is a branch of it
    assert asked[2:] == [(("aps/super_glue",), {"revision": "refs/convert/parquet", "split": split,
                                                "data_files": {split: f"wic/{split}/*.parquet"}})
                         for split in ("train", "validation")]


@pytest.mark.parametrize("name", ["cola", "wic"])
def test_a_hub_out_of_reach_is_one_line(monkeypatch, name):
    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach\nthe hub " + 300 * "x")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UsageError, match="Couldn't reach the hub .*--data-dir") as caught:
        bipeft.load_splits(name, None, 0)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 320


# Metrics


def answers_of(labels):
    return [(label,) for label in labels]


def random_answers(seed, labels=("0", "1"), invalid=("", "2 1", "maybe")):
    rng = random.Random(seed)
    gold = [rng.choice(labels) for _ in range(40)]
    said = [g if rng.random() < 0.6 else rng.choice([*labels, *invalid]) for g in gold]
    return said, gold


@over(SEEDS)
def test_binary_metrics_against_their_textbook_definitions(seed):
    said, gold = random_answers(seed)
    # what is no label is wrong: the other one
    valid = [p if p in ("0", "1") else {"0": "1", "1": "0"}[g] for p, g in zip(said, gold)]
    p, g = (np.array([int(x) for x in xs]) for xs in (valid, gold))
    right = answers_of(gold)
    precision, recall = (p * g).sum() / p.sum(), (p * g).sum() / g.sum()
    assert math.isclose(bipeft.accuracy(said, right), 100 * np.mean(p == g))
    assert math.isclose(bipeft.f1(said, right), 100 / ((1 / precision + 1 / recall) / 2))         # harmonic mean
    assert math.isclose(bipeft.matthews(said, right), 100 * np.corrcoef(p, g)[0, 1])              # of 0/1 vectors


def test_binary_metrics_by_hand():
    # TP 2, FP 1, FN 1, TN 2 (an invalid answer to "0" counts as "1"): F1 = 4/6; MCC = (4 - 1) / sqrt(3·3·3·3) = 1/3
    said, gold = ["1", "1", "x", "0", "0", "0"], answers_of("110100")
    assert bipeft.numbers(said, gold, "[01]", 1)[0].tolist() == [1, 1, 1, 0, 0, 0]
    assert math.isclose(bipeft.f1(said, gold), 400 / 6) and math.isclose(bipeft.matthews(said, gold), 100 / 3)
    assert math.isclose(bipeft.accuracy(said, gold), 400 / 6)


def test_invalid_predictions_score_nothing():
    said = ["maybe", "", "01", "11"]
    for metric in ("accuracy", "F1"):
        assert bipeft.METRICS[metric](said, answers_of("1011")) == 0
    assert bipeft.matthews(said, answers_of("1011")) == -100                     # as wrong as can be
    assert bipeft.pearson(["nan", "inf", "-1", "9"], answers_of(["0.0", "5.0", "0.2", "4.8"])) < -99


@pytest.mark.parametrize("metric", ["F1", "Matthews", "Pearson"])
def test_metrics_of_constant_answers_are_zero(metric):
    assert bipeft.METRICS[metric](["0", "0", "0"], answers_of("000")) == 0
    assert bipeft.METRICS[metric](["0", "0", "0"], answers_of("101")) == 0


@pytest.mark.parametrize("metric", ["accuracy", "F1", "Matthews", "Pearson", "token F1"])
def test_a_perfect_prediction_is_100(metric):
    assert math.isclose(bipeft.METRICS[metric](["0", "1", "1"], answers_of("011")), 100)


def test_pearson_of_constants_is_zero():
    # np.std of three times 0.2 is 2.8e-17, not 0
    answers = [("0.2",), ("0.2",), ("0.2",)]
    assert bipeft.pearson(["0.2"] * 3, answers) == bipeft.pearson(["0.2", "0.4", "0.6"], answers) == 0
    assert bipeft.pearson(["0.4"] * 50, [("0.6",)] * 49 + [("0.8",)]) == 0


@over(SEEDS)
def test_pearson_against_its_sums(seed):
    said, gold = random_answers(seed, bipeft.FIFTHS, ("", "7.0", "nan", "two"))
    x = [float(p) if p in bipeft.FIFTHS else (0.0 if float(g) > 2.5 else 5.0) for p, g in zip(said, gold)]
    y, n = [float(g) for g in gold], len(gold)
    top = n * sum(a * b for a, b in zip(x, y)) - sum(x) * sum(y)
    below = math.sqrt(n * sum(a * a for a in x) - sum(x) ** 2) * math.sqrt(n * sum(b * b for b in y) - sum(y) ** 2)
    assert math.isclose(bipeft.pearson(said, answers_of(gold)), 100 * top / below, rel_tol=1e-9)


@pytest.mark.parametrize("said, answers, score", [
    ("The Rome", ("rome",), 1),                      # case and articles do not count
    ("Rome!", ("Rome",), 1),                         # nor do punctuation marks
    ("New York City", ("New York",), 0.8),           # 2 shared: precision 2/3, recall 1: 2 · 2/3 / (5/3)
    ("York York", ("York",), 2 / 3),                 # a bag: one shared of 2 and of 1: 2·1 / 3
    ("Nero", ("Rome", "nero"), 1),                   # the best of the answers
    ("Paris", ("Rome", "Nero"), 0),
    ("", ("Rome",), 0),
])
def test_token_f1_by_hand(said, answers, score):
    assert math.isclose(bipeft.token_f1([said], [answers]), 100 * score, abs_tol=1e-9)
    assert math.isclose(bipeft.token_f1([said, "x"], [answers, ("y",)]), 50 * score, abs_tol=1e-9)      # the mean


# The toy


def test_the_toys_splits_are_disjoint_and_its_verdicts_balanced():
    splits = bipeft.toy_splits(0)
    assert {key: len(value) for key, value in splits.items()} == {"train": 4000, "validation": 500, "test": 500}
    sources = [e.source for part in splits.values() for e in part]
    assert len(set(sources)) == 5000
    for part in splits.values():
        good = sum(e.target == "good" for e in part) / len(part)
        assert abs(good - 0.5) < 2.5 / math.sqrt(len(part))                       # five deviations of a share
        assert all(e.target in ("good", "bad") and e.answers == (e.target,) for e in part)
    assert splits == bipeft.toy_splits(0) != bipeft.toy_splits(1)


def test_no_single_word_of_the_toy_tells_the_verdict():
    seen, good = Counter(), Counter()
    for example in bipeft.toy_splits(0)["train"]:
        for word in set(example.source.split()):
            seen[word] += 1
            good[word] += example.target == "good"
    assert len(seen) > 40
    for word, count in seen.items():
        assert abs(good[word] / count - 0.5) < 2.5 / math.sqrt(count), word


def test_a_not_and_an_adjective_together_tell_the_toys_verdict():
    bad = set(bipeft.TOY_WORDS["bad"].split())
    for example in bipeft.toy_splits(2)["train"]:
        words = example.source.split()
        is_bad = bool(bad & set(words)) != ("not" in words)
        assert example.target == ("bad" if is_bad else "good")


# ==================================================================================================
# 6. Training and evaluation
# ==================================================================================================


def test_batches_pad_and_cover_every_example_once_an_epoch():
    tokens = [([n] * (1 + n % 3), [n]) for n in range(2, 12)]
    batches = bipeft.Batches(tokens, 4, "cpu", seed=0)
    orders = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        made = list(batches)
        assert sorted(len(b["labels"]) for b in made) == [2, 4, 4] and len(batches) == 3
        orders.append([label for b in made for label in b["labels"].flatten().tolist()])
        for b in made:
            for ids, mask, label in zip(b["input_ids"], b["attention_mask"], b["labels"].flatten().tolist()):
                count = 1 + label % 3
                assert mask.tolist() == [1] * count + [0] * (len(mask) - count)
                assert ids.tolist() == [label] * count + [0] * (len(mask) - count)
    assert sorted(orders[0]) == list(range(2, 12)) and orders[0] == orders[2] != orders[1]


def test_examples_of_like_length_share_a_batch_in_an_order_that_is_still_random():
    tokens = [([7] * (1 + n % 40), [n]) for n in range(256)]                # 40 lengths, 64 batches of 4
    made = list(bipeft.Batches(tokens, 4, "cpu", seed=0))
    widths = [b["input_ids"].shape[1] for b in made]
    real = sum(int(b["attention_mask"].sum()) for b in made)
    assert real == sum(len(source) for source, _ in tokens)
    assert sum(4 * w for w in widths) < 1.1 * real                          # under a tenth is padding
    assert widths != sorted(widths)
    # of every 16 batches' worth, not of all: the shortest are spread over several batches
    assert sum(w <= 3 for w in widths) >= 3 and sum(widths[:16]) != sum(sorted(widths)[:16])


def test_lengths_rounded_for_graphs_are_powers_of_two_and_change_no_loss():
    rows = [([5] * 33, [6, 1]), ([7] * 3, [8, 9, 1])]
    plain, rounded = bipeft.collate(rows, "cpu"), bipeft.collate(rows, "cpu", True)
    assert [tuple(t.shape) for t in plain.values()] == [(2, 33), (2, 33), (2, 3)]
    assert [tuple(t.shape) for t in rounded.values()] == [(2, 64), (2, 64), (2, 4)]
    model = tiny_t5()
    assert close(model(**plain).loss.detach(), model(**rounded).loss.detach(), 1e-5)
    filled = bipeft.collate(rows + [([1], [-100])] * 3, "cpu", True)        # as the last batch is
    assert close(model(**plain).loss.detach(), model(**filled).loss.detach(), 1e-5)


def test_fused_norms_are_t5s_norms():
    model, plain = tiny_t5(), tiny_t5()
    bipeft.fuse_norms(model)
    assert sum("forward" in vars(m) for m in model.modules()) == sum(
        type(m).__name__ == "T5LayerNorm" for m in model.modules()) > 4
    assert close(logits_of(model), logits_of(plain), 1e-6)
    half, plain = model.bfloat16(), plain.bfloat16()
    assert close(logits_of(half).float(), logits_of(plain).float(), 0.05)
    norm, x = model.encoder.final_layer_norm, torch.randn(3, 32)            # another dtype: T5's own way
    assert torch.equal(norm(x), plain.encoder.final_layer_norm(x))


def test_labels_are_padded_with_what_the_loss_ignores():
    (batch,) = bipeft.Batches([([5], [6, 7, 1]), ([5, 5], [8])], 2, "cpu")
    assert batch["labels"].tolist() == [[6, 7, 1], [8, -100, -100]]
    assert batch["input_ids"].tolist() == [[5, 0], [5, 5]] and batch["attention_mask"].tolist() == [[1, 0], [1, 1]]


def word_tokenizer(words):
    """A tokenizer of whole words that ends a text with </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                                                unk_token="<unk>")


WORDS = "say 0 1 yes no rte sentence1: sentence2: sentence1 sentence2".split() + [str(n) for n in range(2, 26)]


def test_inputs_are_cut_to_the_maximum_length():
    example = bipeft.Example("say 0 1 yes no", "yes", ("yes",))
    ((source, target),) = bipeft.tokenize(word_tokenizer(WORDS), [example], 4)
    assert len(source) == 4 and source[-1] == 1 and target == [6, 1]


def test_batches_for_a_gpu_are_of_few_shapes(monkeypatch):
    # lengths 4, 41 and 10: the first two are padded to 64, the third to 32 and with a row that no loss counts
    made = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda data, pin_memory=False: made(data))
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *args, **more: t)
    tokens = [([5] * n + [1], [7, 1]) for n in (3, 40, 9)]
    first, last = bipeft.Batches(tokens, 2, "cuda")
    assert first["input_ids"].shape == (2, 64) and first["labels"].shape == (2, 4)
    assert last["input_ids"].shape == (2, 32) and last["labels"].tolist() == [[7, 1, -100, -100], [-100] * 4]
    (whole,) = bipeft.Batches(tokens, 10**9, "cuda")                   # no more rows than there are examples
    assert whole["input_ids"].shape == (3, 64)


def test_predictions_come_in_the_order_of_the_examples_and_without_dropout():
    model, tokenizer = tiny_t5(seed=1, tie_word_embeddings=False, dropout_rate=0.3), word_tokenizer(WORDS)
    model.shared.weight.data *= 0.05                     # what is read weighs more than the last word written
    sources = [" ".join(str(2 + (n * k) % 24) for k in range(1, 2 + n % 5)) for n in range(11)]
    examples = [bipeft.Example(source, "yes no", ()) for source in sources]
    tokens = bipeft.tokenize(tokenizer, examples, 20)
    model.train()
    together = bipeft.predict(model, tokenizer, tokens, 4, "cpu")
    assert model.training                                # as it was found
    alone = [bipeft.predict(model, tokenizer, [row], 1, "cpu")[0] for row in tokens]
    assert together == alone and len(set(alone)) > 2


def test_training_leaves_the_best_epochs_weights():
    model, batches = tiny_t5(), bipeft.Batches([([n, n + 1], [n % 5 + 2, 1]) for n in range(2, 14)], 4, "cpu", seed=0)
    peft = bipeft.Peft(model, [("encoder.block.0.layer.1.DenseReluDense", "serial", 4)])
    scores, seen, backbone = iter([1.0, 3.0, 3.0, 2.0]), [], snapshot(model)

    def evaluate():
        seen.append(peft.weights.clone())
        return next(scores)

    assert bipeft.train(model, peft, batches, evaluate, 4, 0.01) == 3.0
    assert [torch.equal(peft.weights, weights) for weights in seen] == [False, True, False, False]
    assert same(snapshot(model), backbone)


def test_the_learning_rate_of_training_falls_linearly():
    model, rates = tiny_t5(), []
    peft = bipeft.Peft(model, [("encoder.final_layer_norm", "bitfit", 1)])
    batches = bipeft.Batches([([5, 6], [7, 1])] * 4, 1, "cpu")
    bipeft.train(model, peft, batches, lambda: 0.0, 1, 0.4,
                 after_step=lambda state, line: rates.append(state["optimizer"]["param_groups"][0]["lr"]))
    assert close(rates, [0.4, 0.3, 0.2, 0.1])


def test_training_goes_on_bit_for_bit_from_its_saved_state(tmp_path):
    batches = bipeft.Batches([([n, n + 1], [n % 5 + 2, 1]) for n in range(2, 14)], 4, "cpu", seed=0)

    def start():
        model = tiny_t5(dropout_rate=0.1)
        peft = bipeft.Peft(model, [("encoder.block.0.layer.1.DenseReluDense", "serial", 4)])
        return model, peft, batches, lambda: float(peft.weights.abs().sum())        # the last epoch is the best

    class Stop(Exception):
        pass

    def save_and_stop(state, line):
        if line["step"] == 5:
            torch.save(state, tmp_path / "state.pt")
            raise Stop

    whole = start()
    bipeft.train(*whole, 3, 0.01)
    with pytest.raises(Stop):
        bipeft.train(*start(), 3, 0.01, after_step=save_and_stop)
    resumed = start()
    bipeft.train(*resumed, 3, 0.01, state=torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(resumed[1].weights, whole[1].weights)


# Many processes, and batches in parts


def shared_search(path, parts=1):
    """24 steps of a search in float64 on this process's share of the batches; what it came to goes to a file."""
    rng = random.Random(0)
    tokens = [([rng.randrange(3, 40) for _ in range(rng.randrange(2, 9))], [rng.randrange(3, 40)] * rng.randrange(1, 4))
              for _ in range(13)]           # batches of 4, 4, 4 and 1, at which one process has nothing to do
    model = tiny_t5().double()
    space = randomise(bipeft.Space(model, "all"), 0.1)
    space.modules_.double()
    space.lay_end_to_end()
    batches = [bipeft.Batches(tokens, 4, "cpu", seed) for seed in (1, 2)]
    lines = []
    search = bipeft.Search(model, space, int(space.sizes[:, -1].sum()) // 5, 24, warmup=9, triggers=10, tau=0.5,
                           lr=1e-2,
                           dropout_seed=bipeft.rank(), run_pass=bipeft.fast_pass(model, space, parts=parts))
    structure = search.run(*batches, after_step=lambda _, line: lines.append(line))
    texts = bipeft.predict(model, tiny_tokenizer(), tokens, 3, "cpu")
    torch.save({"theta": search.theta.detach(), "phi": search.phi.detach(), "smoothed": search.smoothed,
                "weights": space.weights, "modules": structure.modules, "texts": texts,
                "triggers": search.triggers_done, "losses": [line["loss_train"] for line in lines]}, f"{path}-{bipeft.rank()}")


def tiny_tokenizer():
    return word_tokenizer([str(n) for n in range(40)])


def small_toy(out, die_at=None, by=None):
    """The program on a small toy; after so many steps its second process signals itself.   Returns the exit code."""
    def step(self, *batches, step=bipeft.Search.step):
        if bipeft.rank() == 1 and self.steps_done == die_at:
            os.kill(os.getpid(), by)
        return step(self, *batches)

    splits = {key: value[:count] for (key, value), count in zip(bipeft.toy_splits(0).items(), (400, 30, 30))}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bipeft.Search, "step", step)
        patched.setattr(bipeft, "toy_splits", lambda seed: splits)
        patched.setattr(bipeft.toy_backbone, "__defaults__", (5, 64))
        try:
            return bipeft.main(["--task", "toy", "--epochs", "1", "--search-epochs", "1", "--warmup-epochs", "0",
                                "--triggers", "5", "--batch-size", "8", "--save-every", "5", "--out", str(out)])
        except SystemExit as ended:
            return ended.code


def first_torchrun(folder):
    """Process 1 of two is killed."""
    sys.exit(small_toy(f"{folder}/run", 12, signal.SIGKILL))


def second_torchrun(folder):
    """The same run goes on in new processes, of which one is told to stop; then to its end. Then `shared_search`."""
    torch.set_num_threads(1)
    assert small_toy(f"{folder}/run", 17, signal.SIGTERM) == 128 + signal.SIGTERM
    assert small_toy(f"{folder}/run") == 0
    shared_search(f"{folder}/two")


def torchrun(code):
    """Two processes that know of each other run `code`.   Returns (exit code, output, error, seconds)."""
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python",
         "--monitor-interval=3",                  # else it may stop the other process before that has told its line
         sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=150)
    return ended.returncode, ended.stdout, ended.stderr, time.monotonic() - started


def run_torchruns(folder):
    """Both of them.   Returns (folder, [what `torchrun` returns of each])."""
    return folder, [torchrun(f"import test_bipeft; test_bipeft.{which}(r'{folder}')")
                    for which in ("first_torchrun", "second_torchrun")]


def run_mistakes(folder):
    """A mistake that both processes see, and one that only the second sees.   Returns {seen by: as `torchrun`}."""
    code = ("import sys, bipeft\n"
            "load = bipeft.load_backbone\n"
            "def fail(*args):\n"
            "    if bipeft.rank() == 1 or {both}:\n"
            "        raise bipeft.UsageError('a mistake')\n"
            "    return load(*args)\n"
            "bipeft.load_backbone = fail\n"
            "sys.exit(bipeft.main(['--task', 'toy', '--out', r'{folder}/told']))")
    return {seen_by: torchrun(code.format(both=seen_by == "both", folder=folder)) for seen_by in ("both", "one")}


def test_the_mean_over_parts_is_weighed_by_labels_and_passes_over_empty_parts():
    # losses 2 and 5 with 3 and 1 labels: (3·2 + 1·5) / 4 = 2.75; a part without a label has a loss of nan
    labels = torch.tensor([[1, 1], [1, -100], [-100, -100], [-100, -100], [9, -100], [-100, -100]])
    losses = iter([(2.0, [1.0, 0.0]), (math.nan, [math.nan, 7.0]), (5.0, [5.0, 4.0])])

    def one(part):
        loss, gradient = next(losses)
        assert len(part["labels"]) == 2
        return torch.tensor(loss), torch.tensor(gradient)
    loss, gradient = bipeft.mean_over_parts(one, {"labels": labels}, 3)
    assert loss == 2.75 and loss.shape == () and gradient.tolist() == [2.0, 1.0]
    rows = bipeft.mean_over_parts(lambda part: [part["x"].mean()], {"x": torch.tensor([1.0, 2, 6])}, 2)
    assert rows[0] == 3                                    # (2 · 1.5 + 1 · 6) / 3: without labels rows count


def test_deterministic_algorithms_are_for_the_run_alone():
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), bipeft.deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


def test_two_processes_and_batches_in_parts_find_what_one_finds(ahead, tmp_path):
    shared_search(tmp_path / "one")
    shared_search(tmp_path / "parts", parts=3)
    folder, (_, (code, _, error, _)) = ahead["torchruns"].result()
    assert code == 0, error
    files = {"two-0": folder, "two-1": folder, "parts-0": tmp_path}
    one = torch.load(tmp_path / "one-0", weights_only=True)
    assert one["triggers"] == 10 and 0 < len(one["modules"]) and len(one["losses"]) >= 19
    for other in files:
        found = torch.load(files[other] / other, weights_only=True)
        assert found["modules"] == one["modules"] and found["texts"] == one["texts"], other
        for key in ("theta", "phi", "smoothed", "weights"):
            assert (found[key] - one[key]).abs().max() < 1e-5, (other, key)
        assert np.allclose(found["losses"], one["losses"], atol=1e-6), other
    a, b = (torch.load(folder / f"two-{n}", weights_only=True) for n in (0, 1))
    assert all(torch.equal(a[key], b[key]) for key in ("theta", "phi", "smoothed", "weights"))     # to the last bit


def test_parts_keep_their_types():
    found = bipeft.mean_over_parts(lambda part: [part["x"].mean(), part["x"].mean().double()],
                                   {"x": torch.tensor([1.0, 2.0])}, 2)
    assert [t.dtype for t in found] == [torch.float32, torch.float64] and [float(t) for t in found] == [1.5, 1.5]


def test_training_in_parts_is_training_as_a_whole():
    found = []
    for parts in (1, 2, 5):
        model = tiny_t5().double()
        peft = bipeft.Peft(model, [("encoder.block.0.layer.0.SelfAttention.q", "lora", 4),
                                   ("decoder.final_layer_norm", "bitfit", 1)])
        tokens = [([n, n + 1], [n] * (1 + n % 3)) for n in range(3, 16)]
        peft.double().lay_end_to_end()
        bipeft.train(model, peft, bipeft.Batches(tokens, 5, "cpu", 0), lambda: 0.0, 3, 0.01, parts=parts)
        found.append(peft.weights)
    assert close(found[0], found[1], 1e-6) and close(found[0], found[2], 1e-6)
    assert found[0].abs().max() > 0.01


@pytest.mark.parametrize("space", ["s1", "s2"])
def test_recomputed_activations_change_nothing(space):
    found, calls = [], []
    for checkpointing in (False, True):
        model = tiny_t5(dropout_rate=0.1)
        model.config.use_cache = False
        if checkpointing:
            bipeft.recompute_activations(model)
        search, batches = a_search(space, steps=6, model=model)
        calls.append([0])
        search.space.modules_[0].register_forward_hook(lambda *_, count=calls[-1]: count.__setitem__(0, count[0] + 1))
        noise = torch.zeros(len(search.space), 5).split([2, 3], 1)
        model.train()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found.append(search.run_pass(("gate", "ranks", "weights"), *search.architecture(noise), batches[0]))
    assert calls == [[1], [2]]
    for a, b in zip(*found):
        assert close(a, b, 1e-5) and a.abs().max() > 0


def test_an_exception_in_a_callback_leaves_the_space_whole():
    class Stop(Exception):
        pass

    def stop(run, line):
        if line["step"] == 3:
            raise Stop
    search, batches = a_search("all", steps=9)
    space = search.space
    with pytest.raises(Stop):
        search.run(batches, batches, after_step=stop)
    assert not search.model.training and all(p.requires_grad for p in space.tensors)
    assert all(m.active for m in space.modules_) and space.in_use is space.weights
    assert all(torch.equal(p.flatten(), part) for p, part in zip(space.tensors, space.weights.split(space.numels)))


def test_a_callback_of_training_sees_the_weights_of_its_step():
    model = tiny_t5()
    peft = randomise(bipeft.Peft(model, [("encoder.block.0.layer.0.SelfAttention.q", "lora", 4)]))
    seen = []

    def after_step(state, line):
        seen.append(torch.cat([p.detach().flatten() for p in peft.tensors]).equal(state["weights"]))
    bipeft.train(model, peft, [some_batch(0), some_batch(1)], lambda: 0.0, 2, 0.01, after_step=after_step)
    assert seen == [True] * 4 and peft.in_use is peft.weights


def test_a_search_runs_in_training_mode():
    model, modes = tiny_t5(dropout_rate=0.1), []
    search, batches = a_search(steps=3, model=model)
    model.register_forward_pre_hook(lambda *_: modes.append(model.training))
    search.run(batches, batches)
    assert modes == [True] * 9 and not model.training                              # as it was found


def test_every_process_draws_the_same_architecture_and_a_dropout_of_its_own():
    sampled, losses, trained = [], [], []
    for number in (0, 0, 1):
        search, batches = a_search(model=tiny_t5(dropout_rate=0.3).train(), dropout_seed=number)
        architecture = search.architecture
        search.architecture = lambda *noise, found=architecture: sampled.append(found(*noise)) or sampled[-1]
        losses.append(search.step(*batches[:3])["loss_train"])
        model, lines = tiny_t5(dropout_rate=0.3), []
        bipeft.train(model, bipeft.Peft(model, [("encoder.final_layer_norm", "bitfit", 1)]), batches[:1], lambda: 0.0, 1,
                     0.01, dropout_seed=number, after_step=lambda _, line, lines=lines: lines.append(line["loss"]))
        trained += lines
    assert losses[0] == losses[1] != losses[2] and trained[0] == trained[1] != trained[2]
    for a, b in zip(sampled[0], sampled[4]):                                       # the first of each process
        assert torch.equal(a, b)


def test_every_process_pretrains_the_same_toy(monkeypatch):
    alone = bipeft.toy_backbone(0, steps=3)[0].state_dict()
    monkeypatch.setattr(bipeft, "rank", lambda: 1)
    monkeypatch.setattr(bipeft, "world", lambda: 2)
    other = bipeft.toy_backbone(0, steps=3)[0].state_dict()
    assert all(torch.equal(alone[key], other[key]) for key in alone)


def test_a_process_that_dies_ends_the_others_with_one_line_and_a_signal_stops_all(ahead):
    folder, ((code, _, error, seconds), (code_2, out_2, error_2, _)) = ahead["torchruns"].result()
    assert code != 0 and seconds < 60
    lines = [line for line in error.splitlines() if line.startswith("bipeft.py: ")]
    assert len(lines) == 1 and "lost another one of this run" in lines[0] and "the same command" in lines[0], error
    assert code_2 == 0, error_2
    stopped = out_2.index("stopped by signal 15 after step 18")                    # one of them alone was told
    assert "going on from" in out_2[:stopped] and "lost another" not in error_2, (out_2, error_2)
    assert "going on from" in out_2[stopped:] and out_2.count("written to") == 1   # one process prints
    assert (folder / "run" / "metrics.json").exists() and not (folder / "run" / "checkpoint.pt").exists()


def test_a_mistake_is_told_once_by_all_processes_together(ahead):
    for code, _, error, _ in ahead["mistakes"].result().values():
        assert code != 0 and error.splitlines().count("bipeft.py: a mistake") == 1, error


# ==================================================================================================
# 7. The command line
# ==================================================================================================


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a tiny model, tasks, structures and runs, whole ones and spoilt ones, that tests only read."""
    root = tmp_path_factory.mktemp("world")
    model = tiny_t5(tie_word_embeddings=False)
    for name in ("model", "no_weights", "no_tokenizer", "corrupt_config", "corrupt_weights", "half_the_weights",
                 "no_start", "many_words"):
        model.save_pretrained(root / name)
        if name != "no_tokenizer":
            word_tokenizer(WORDS).save_pretrained(root / name)
    (root / "no_weights" / "model.safetensors").unlink()
    (root / "corrupt_weights" / "model.safetensors").write_bytes(b"\x00\x01garbage")
    (root / "corrupt_config" / "config.json").write_text('{"model_type": "t5", ')
    weights = {key: t.clone() for key, t in model.state_dict().items() if not key.startswith("decoder.")}
    safetensors.torch.save_file(weights, root / "half_the_weights" / "model.safetensors", {"format": "pt"})
    config = json.loads((root / "no_start" / "config.json").read_text())
    (root / "no_start" / "config.json").write_text(json.dumps({**config, "decoder_start_token_id": None}))
    word_tokenizer([*WORDS, *(f"w{n}" for n in range(50))]).save_pretrained(root / "many_words")
    family("bert").save_pretrained(root / "bert")
    word_tokenizer(WORDS).save_pretrained(root / "bert")
    (root / "empty").mkdir()
    (root / "a_file").write_text("x")
    write_data(root)
    write_structures(root, model)
    return root


def write_data(root):
    """data/: good splits. bad/<what is wrong>/: one spoilt file each."""
    for name in ("rte", "custom"):
        for split, count, start in (("train", 24, 0), ("validation", 12, 50)):
            write_split(root / "data", name, split, rows_of(name, count, start))
    good = rows_of("rte", 8)
    write_split(root / "bad" / "one_split", "rte", "train", good)
    changes = {
        "no_column": [{k: v for k, v in row.items() if k != "sentence2"} for row in good],
        "no_label": [{k: v for k, v in row.items() if k != "label"} for row in good],
        "unlabelled": [{**row, "label": -1} for row in good],
        "few": good[:3],
    }
    for what, rows in changes.items():
        write_split(root / "bad" / what, "rte", "train", good)
        write_split(root / "bad" / what, "rte", "validation", rows)
    for what, ending, content in (("empty", "jsonl", ""), ("header", "csv", "sentence1,sentence2,label\n"),
                                  ("corrupt", "parquet", "PAR1 no"),
                                  ("uneven", "csv", "sentence1,sentence2,label\na,b,0\na,b,c,d,e\n")):
        write_split(root / "bad" / what, "rte", "validation", good)
        (root / "bad" / what / "rte" / f"train.{ending}").write_text(content)
    rows = [{"paragraph": None, "question": "q", "answer": "a", "label": 1}] + [
        {"paragraph": "p", "question": "q", "answer": "a", "label": 1}] * 4
    for split in ("train", "validation"):
        write_split(root / "bad" / "null", "multirc", split, rows, "jsonl")


def write_structures(root, model):
    """structures/: good.json, of the tiny model, and spoilt ones. runs/: folders that can't be gone on with."""
    space = bipeft.Space(model, "s2")
    good = space.structure([n % 9 == 0 for n in range(len(space))], [1] * len(space), 10_000, "tiny")
    space.detach()
    folder = root / "structures"
    folder.mkdir()
    bipeft.save_structure(good, folder / "good.json")

    def spoil(file, /, **changes):
        content = json.loads((folder / "good.json").read_text())
        first = content["modules"][0]
        for key, value in changes.items():
            (first if key in first else content)[key] = value
        (folder / f"{file}.json").write_text(json.dumps(content))

    first = good.modules[0]
    spoil("over_budget", budget=10)
    spoil("wrong_rank", kind="lora", rank=5)
    spoil("wrong_name", name="encoder.block.77.layer.0.SelfAttention")
    spoil("wrong_kind", kind="prompt")
    spoil("wrong_place", name="encoder.block.0.layer.0.layer_norm", kind="lora", rank=4)
    spoil("wrong_count", parameters=first["parameters"] + 1)
    spoil("other_backbone", geometry={**good.geometry, "parameters": 2048})
    spoil("no_modules", modules=[])
    spoil("no_space", space="s9")
    spoil("modules_of_text", modules="all")
    spoil("twice", modules=[first, first])
    spoil("rank_of_a_bias", name="encoder.block.0.layer.0.SelfAttention.q", kind="bitfit", rank=4)
    spoil("other_space", space="s1")
    spoil("budget_nan", budget=math.nan)
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "corrupt.json").write_text('{"backbone": ')
    (folder / "list.json").write_text("[1, 2]")
    (folder / "no_text.json").write_bytes(b"\xff\xfe\x00")
    for name, file, content in (("structure_alone", "structure.json", b"{}"),
                                ("corrupt_metrics", "metrics.json", b"{"),
                                ("corrupt_checkpoint", "checkpoint.pt", b"PK\x03"),
                                ("strange_metrics", "metrics.json", b"[1]"),
                                ("other_run", "metrics.json", b'{"settings": {"task": "rte", "seed": 7}}')):
        (root / "runs" / name).mkdir(parents=True)
        (root / "runs" / name / file).write_bytes(content)


QUICK = "--task custom --data-dir {root}/data --model {root}/model --epochs 6 --search-epochs 4 --warmup-epochs 1 " \
        "--triggers 4 --window 2 --tau 0.2 --budget 2000 --batch-size 4 --lr 0.05"
RTE = "--task rte --data-dir {root}/data --model {root}/model"

BAD = [
    # arguments, and words that the message must hold
    ("--task sst3", "--task sst3 rte"),
    ("--space s3", "unknown space s3 s1 s2 lora"),
    ("--no-such-flag 1", "--no-such-flag --help"),
    ("--bud 100", "--bud"),
    ("stray", "stray"),
    ("--budget", "--budget"),
    ("--budget ten", "--budget ten"),
    ("--triggers 1.5", "--triggers 1.5"),
    ("--budget 0", "--budget must lie in"),
    ("--budget nan", "--budget nan"),
    (RTE + " --budget 1", "budget smallest module 32"),
    (RTE + " --budget 1e9", "budget whole space"),
    (RTE + " --budget 1e-9", "budget smallest"),
    ("--triggers 1000000", "--triggers 1000000 must lie in"),
    ("--gamma 2", "--gamma 2 0 .. 1"),
    ("--tau nan", "--tau nan"),
    ("--lr inf", "--lr inf must lie in"),
    ("--seed -1", "--seed -1 must lie in"),
    ("--dtype int8", "--dtype int8 bfloat16"),
    ("--device nonsense", "--device nonsense cpu"),
    (RTE + " --ranks 8 4", "ranks 8 4"),
    ("--task custom --model {root}/model", "custom --data-dir"),
    ("--task rte --data-dir {root}/nowhere", "no {root}/nowhere/rte --data-dir"),
    ("--task cola --data-dir {root}/data", "no {root}/data/cola/train"),
    ("--task rte --data-dir {root}/bad/one_split", "no /rte/validation"),
    ("--task rte --data-dir {root}/bad/no_column", "validation.parquet no column sentence2 sentence1"),
    ("--task rte --data-dir {root}/bad/no_label", "validation.parquet no column label"),
    ("--task rte --data-dir {root}/bad/empty", "train.jsonl"),
    ("--task rte --data-dir {root}/bad/header", "train.csv"),
    ("--task rte --data-dir {root}/bad/unlabelled", "label -1 rte 0 .. 1"),
    ("--task rte --data-dir {root}/bad/few", "rte too few rows"),
    ("--task rte --data-dir {root}/bad/corrupt", "train.parquet can't be read"),
    ("--task rte --data-dir {root}/bad/uneven", "train.csv can't be read"),
    ("--task multirc --data-dir {root}/bad/null --model {root}/model", "paragraph"),
    ("--task rte --model {root}/model", "rte hub --data-dir"),
    ("--task rte --data-dir {root}/data", "google-t5/t5-large can't be loaded network"),
    ("--task rte --data-dir {root}/data --model {root}/nowhere", "{root}/nowhere can't be loaded"),
    ("--task rte --data-dir {root}/data --model {root}/empty", "{root}/empty can't be loaded"),
    ("--task rte --data-dir {root}/data --model {root}/no_weights", "{root}/no_weights can't be loaded"),
    ("--task rte --data-dir {root}/data --model {root}/corrupt_weights", "{root}/corrupt_weights can't be loaded"),
    ("--task rte --data-dir {root}/data --model {root}/corrupt_config", "{root}/corrupt_config can't be loaded"),
    ("--task rte --data-dir {root}/data --model {root}/no_tokenizer", "{root}/no_tokenizer can't be loaded"),
    ("--task rte --data-dir {root}/data --model {root}/no_start", "can't be loaded no decoder_start_token_id"),
    ("--task rte --data-dir {root}/data --model {root}/many_words", "can't be loaded tokenizer words weights"),
    ("--seed 0 0", "--seed different"),
    ("--batch-size 2 --accumulate 3", "--accumulate at most --batch-size"),
    ("--task rte --data-dir {root}/data --model {root}/half_the_weights", "can't be loaded it has no decoder."),
    ("--task rte --data-dir {root}/data --model {root}/bert", "{root}/bert bert T5"),
    (RTE + " --structure {root}/nowhere.json", "no structure file {root}/nowhere.json"),
    (RTE + " --structure {root}/structures/corrupt.json", "corrupt.json no structure"),
    (RTE + " --structure {root}/structures/list.json", "list.json no structure"),
    (RTE + " --structure {root}/structures/no_text.json", "no_text.json no structure"),
    (RTE + " --structure {root}/structures/modules_of_text.json", "modules_of_text.json no structure"),
    (RTE + " --structure {root}/structures/over_budget.json", "over_budget.json budget of 10"),
    (RTE + " --structure {root}/structures/wrong_rank.json", "wrong_rank.json rank 5 ranks"),
    (RTE + " --structure {root}/structures/wrong_kind.json", "wrong_kind.json kind"),
    (RTE + " --structure {root}/structures/wrong_name.json", "no place encoder.block.77.layer.0.SelfAttention"),
    (RTE + " --structure {root}/structures/wrong_place.json", "encoder.block.0.layer.0.layer_norm lora"),
    (RTE + " --structure {root}/structures/wrong_count.json", "parameters tensors hold"),
    (RTE + " --structure {root}/structures/other_backbone.json", "another backbone parameters 2048"),
    (RTE + " --structure {root}/structures/no_modules.json", "modules"),
    (RTE + " --structure {root}/structures/no_space.json", "s9"),
    (RTE + " --structure {root}/structures/twice.json", "encoder.block.0"),
    (RTE + " --structure {root}/structures/rank_of_a_bias.json", "rank_of_a_bias.json rank"),
    (RTE + " --structure {root}/structures/other_space.json", "other_space.json bitfit space"),
    (RTE + " --structure {root}/structures/budget_nan.json", "budget_nan.json budget of nan"),
    (RTE + " --structure {root}/structures/deep.json", "deep.json no structure"),
    (RTE + " --structure {root}/structures", "structures no structure.json directory"),
    ("--max-length 99999999999999999999", "--max-length must lie in"),
    ("--ranks 1 2000000000", "ranks (1, 2000000000) from 1 to 4096"),
    ("--device meta", "--device meta cpu"),
    ("--checkpointing 1", "unrecognized 1 --help"),
    (RTE + " --budget 600 --out /proc/nowhere", "--out /proc/nowhere another"),
    (RTE + " --budget 600 --out {root}/" + 300 * "x", "--out too long"),
    (RTE + " --budget 600 --out {root}/a_file", "--out {root}/a_file"),
    (RTE + " --budget 600 --out {root}/a_file/below", "--out {root}/a_file/below"),
    ("--task toy --out {root}/runs/other_run", "other_run another run --out --fresh"),
    ("--task toy --out {root}/runs/structure_alone", "structure_alone --out --fresh"),
    ("--task toy --out {root}/runs/corrupt_checkpoint", "checkpoint.pt can't be read --fresh"),
    ("--task toy --out {root}/runs/corrupt_metrics", "metrics.json can't be read --fresh"),
    ("--task toy --out {root}/runs/strange_metrics", "strange_metrics --fresh"),
]


@pytest.mark.parametrize("line, words", BAD, ids=[line.replace("{root}/", "") or "empty" for line, _ in BAD])
def test_a_mistake_is_told_in_one_line(world, tmp_path, monkeypatch, capfd, line, words):
    monkeypatch.chdir(tmp_path)                                   # where a run without --out would write
    if "--data-dir" in line and "--model" not in line and "t5-large" not in words:
        line += " --model {root}/model"
    assert bipeft.main(line.format(root=world).split()) == 2
    _, error = capfd.readouterr()
    assert error.startswith("bipeft.py: ") and error.count("\n") == 1 and "Traceback" not in error
    for word in words.format(root=world).split():
        assert word in error, error
    assert len(error.replace(str(world), "").replace(300 * "x", "")) < 420
    assert not list(tmp_path.rglob("checkpoint.pt")) and not list(tmp_path.rglob("metrics.json"))


def test_every_number_has_its_bounds():
    above_0 = "max-length budget triggers window epochs search-epochs lr arch-lr batch-size accumulate".split()
    for line in (*(f"--{flag} 0" for flag in above_0), "--budget inf", "--seed 0 -2", "--tau -1", "--gamma 1.5",
                 *(f"--{flag} -1" for flag in ("warmup-epochs", "weight-decay", "save-every"))):
        flag, *_, value = line.split()
        with pytest.raises(UsageError, match=f"{flag}.* {value} must lie in"):
            bipeft.parse(line.split())


def test_after_a_mistake_the_corrected_command_runs(world, tmp_path, capfd):
    line = RTE + " --epochs 1 --search-epochs 1 --batch-size 12"
    for mistake in ("--budget 1", "--ranks 8 4", "--structure {root}/structures/wrong_name.json"):
        assert go(world, tmp_path / "run", line, mistake.format(root=world)) == 2
    assert go(world, tmp_path / "run", line, "--budget 600") == 0, capfd.readouterr().err


def test_a_mistake_with_fresh_destroys_nothing(world, finished, tmp_path):
    for name, content in contents(finished[0]).items():
        (tmp_path / name).write_bytes(content)
    for mistake in ("--budget 1", "--ranks 8 4", "--model nowhere", "--structure {root}/structures/wrong_name.json"):
        assert go(world, tmp_path, more="--fresh " + mistake.format(root=world)) == 2
    assert contents(tmp_path) == contents(finished[0])


def go(world, out, line=QUICK, more=""):
    """Runs the program in this process. Returns its exit code."""
    return bipeft.main([*line.format(root=world).split(), "--out", str(out), *more.split()])


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory):
    """(folder, predictions of each evaluation) of a whole run."""
    out, predict, made = tmp_path_factory.mktemp("finished") / "run", bipeft.predict, []

    def record(*args, **kwargs):
        made.append(predict(*args, **kwargs))
        return made[-1]

    bipeft.predict = record
    try:
        assert go(world, out) == 0
    finally:
        bipeft.predict = predict
    return out, made


def test_the_code_of_the_readme_runs(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/rte-s2-0").symlink_to(finished[0])
    load, library = code_of("README.md")
    exec(load, names := {})
    assert set(capsys.readouterr().out.split()) <= set(WORDS) and len(names["peft"]) > 0

    model, batches = family("bert"), [batch_for("bert", seed) for seed in (0, 1)]
    before = snapshot(model)
    search = functools.partial(bipeft.search, triggers=2, window=1, tau=0.0)
    monkeypatch.setattr(bipeft, "search", lambda *args, **kwargs: search(       # the page's budget is of a larger one
        *args, **{**kwargs, "budget": 1000, "steps": 4, "warmup": 1}))
    exec(library, names := {"model": model, "train_batches": batches, "val_batches": batches, "batches": batches,
                            "evaluate": lambda: 0.0})
    assert 0 < names["structure"].parameters <= 1000 and names["structure"].also_trained > 0
    names["peft"].detach()
    assert same(snapshot(model), before)


RUN_FILES = ["metrics.json", "peft.safetensors", "search.jsonl", "structure.json"]


def test_a_run_leaves_its_four_files(finished):
    out, _ = finished
    assert sorted(contents(out)) == RUN_FILES                              # and no checkpoint
    structure = bipeft.load_structure(out / "structure.json")
    metrics = json.loads((out / "metrics.json").read_text())
    stored = json.loads((out / "structure.json").read_text())
    assert 0 < structure.parameters == metrics["parameters"] == stored["totals"]["parameters"]
    assert structure.parameters <= structure.budget == 2000
    # half of 24 rows in batches of 4, four times over: at most 12 steps, no trigger in the first 3
    lines = [json.loads(line) for line in (out / "search.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)) and len(lines) <= 12
    assert [line["triggers"] for line in lines[:3]] == [0] * 3
    assert {"loss_train", "beta", "expected", "kept", "fixed", "triggers", "seconds"} <= lines[0].keys()
    assert all(0 <= metrics[key] <= 100 for key in ("validation", "test", "test_untouched", "test_most_frequent"))
    assert math.isclose(metrics["per_ten_thousand"], 1e4 * structure.parameters / metrics["backbone_parameters"])
    assert metrics["search_seconds"] > 0 and metrics["train_seconds"] > 0 and metrics["seed"] == 0
    assert metrics["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("encoder, decoder", [(1, 3), (3, 1)])
def test_encoder_and_decoder_of_different_depths(world, tmp_path, monkeypatch, encoder, decoder):
    model, found = tiny_t5(num_layers=encoder, num_decoder_layers=decoder, tie_word_embeddings=False), []
    for part in (model, word_tokenizer(WORDS)):
        part.save_pretrained(tmp_path / "model")
    generate = transformers.T5ForConditionalGeneration.generate

    def check(model, ids, **more):
        found.append(generate(model, ids, **more))
        assert torch.equal(found[-1], generate(model, ids, **{**more, "use_cache": False, "past_key_values": None}))
        return found[-1]

    monkeypatch.setattr(transformers.T5ForConditionalGeneration, "generate", check)
    more = f"--model {tmp_path}/model --space prefix --budget 0.01 --epochs 1 --search-epochs 1"
    assert go(world, tmp_path / "run", more=more) == 0 and found


def test_training_data_is_halved_between_weights_and_architecture(world, tmp_path, monkeypatch):
    halves = []

    def look(search, train_batches, val_batches, *rest):
        halves.extend((train_batches.tokens, val_batches.tokens))
        raise RuntimeError("seen")

    monkeypatch.setattr(bipeft.Search, "run", look)
    with pytest.raises(RuntimeError, match="seen"):
        go(world, tmp_path)
    sources = [{tuple(source) for source, _ in half} for half in halves]
    assert [len(part) for part in sources] == [12, 12] and not sources[0] & sources[1]


def test_the_weights_file_holds_the_modules_alone(finished):
    out, _ = finished
    structure = bipeft.load_structure(out / "structure.json")
    stored = safetensors.torch.load_file(out / "peft.safetensors")
    assert sum(t.numel() for t in stored.values()) == structure.parameters
    assert {key.rpartition(".")[0] for key in stored} == {f"{m['name']}.{m['kind']}" for m in structure.modules}


def test_structure_and_weights_rebuild_the_predictions(world, finished):
    out, made = finished
    model, tokenizer = bipeft.load_backbone(str(world / "model"), "float32", torch.device("cpu"), 0)
    splits = bipeft.load_splits("custom", world / "data", 0)
    tokens = bipeft.tokenize(tokenizer, splits["test"], 128)
    untouched = bipeft.predict(model, tokenizer, tokens, 8, "cpu")
    peft = bipeft.apply(model, bipeft.load_structure(out / "structure.json"))
    bipeft.load_weights(peft, out / "peft.safetensors")
    predictions = bipeft.predict(model, tokenizer, tokens, 8, "cpu")
    assert predictions in made and len(set(predictions)) > 1 and predictions != untouched
    score = json.loads((out / "metrics.json").read_text())["test"]
    assert score == bipeft.accuracy(predictions, [e.answers for e in splits["test"]])
    peft.detach()
    assert bipeft.predict(model, tokenizer, tokens, 8, "cpu") == untouched in made


def test_a_finished_run_is_left_alone(world, finished, capfd):
    out, _ = finished
    before = contents(out)
    assert go(world, out) == 0
    said, error = capfd.readouterr()
    assert "finished" in said and "--fresh" in said and error == ""
    assert contents(out) == before


def test_another_run_is_not_overwritten(world, finished, capfd):
    out, _ = finished
    before = contents(out)
    assert go(world, out, more="--gamma 0.5") == 2
    assert "another run" in capfd.readouterr().err and contents(out) == before


def test_fresh_starts_over(world, finished, tmp_path):
    out, _ = finished
    for name, content in contents(out).items():
        (tmp_path / name).write_bytes(content)
    assert go(world, tmp_path, more="--fresh --epochs 1") == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["settings"]["epochs"] == 1 and sorted(contents(tmp_path)) == RUN_FILES


def test_a_structure_transfers_to_another_task_without_a_search(world, finished, tmp_path):
    out, _ = finished
    line = RTE + f" --epochs 1 --structure {out}/structure.json"
    assert go(world, tmp_path / "new", line) == 0
    found = [bipeft.load_structure(folder / "structure.json") for folder in (out, tmp_path / "new")]
    assert found[0] == found[1] and (tmp_path / "new" / "search.jsonl").read_text() == ""
    metrics = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert metrics["task"] == "rte" and metrics["search_seconds"] == 0 and metrics["ratio"] is None


def test_several_seeds_get_a_folder_each(world, tmp_path, capfd):
    line = RTE + " --epochs 1 --structure {root}/structures/good.json --seed 0 1"
    assert go(world, tmp_path, line) == 0
    tests = [json.loads((tmp_path / f"seed-{seed}" / "metrics.json").read_text())["test"] for seed in (0, 1)]
    assert f"{np.mean(tests):.2f} ± {np.std(tests, ddof=1):.2f} over 2 seeds" in capfd.readouterr().out


SCORES = ("validation", "test", "test_untouched", "test_most_frequent", "parameters", "modules")


def assert_same_end(a, b):
    """Two runs that ended alike: structure, weights, scores and the log but for its clocks."""
    assert sorted(contents(a)) == sorted(contents(b)) == RUN_FILES
    for name in ("structure.json", "peft.safetensors"):
        assert contents(a)[name] == contents(b)[name], name
    metrics, logs = [], []
    for folder in (a, b):
        metrics.append({key: json.loads((folder / "metrics.json").read_text())[key] for key in SCORES})
        lines = [json.loads(line) for line in (folder / "search.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in line.items() if k not in ("seconds", "time")} for line in lines])
    assert metrics[0] == metrics[1] and logs[0] == logs[1]


def test_the_same_command_gives_the_same_run(world, finished, tmp_path):
    assert go(world, tmp_path / "again") == 0
    assert_same_end(finished[0], tmp_path / "again")


def test_a_run_stopped_by_signals_goes_on_to_the_same_end(world, finished, tmp_path, monkeypatch, capfd):
    """A signal comes after step 2, the second time after step 6, and then in the training after step 5."""
    after_step, stops = bipeft.Run.after_step, iter([("search", 2), ("search", 6), ("train", 5), None])
    stop, phase = next(stops), ["search"]

    def with_signal(run, step, *args, **more):
        phase[0] = run.stored["phase"]
        if (phase[0], step) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return after_step(run, step, *args, **more)

    monkeypatch.setattr(bipeft.Run, "after_step", with_signal)
    handler = signal.getsignal(signal.SIGTERM)
    while stop is not None:
        with pytest.raises(SystemExit) as ended:
            go(world, tmp_path / "run")
        assert ended.value.code == 128 + signal.SIGTERM and phase[0] == stop[0]
        assert "goes on from here" in capfd.readouterr().out and (tmp_path / "run" / "checkpoint.pt").exists()
        assert signal.getsignal(signal.SIGTERM) == handler
        stop = next(stops)
    assert go(world, tmp_path / "run") == 0
    assert "going on from" in capfd.readouterr().out
    assert_same_end(finished[0], tmp_path / "run")


def test_a_run_that_crashed_goes_on_from_its_last_checkpoint(world, finished, tmp_path, monkeypatch):
    after_step = bipeft.Run.after_step

    def crash(run, step, *args, **more):
        after_step(run, step, *args, **more)
        if step == 5:
            raise RuntimeError("power cut")

    with monkeypatch.context() as broken:
        broken.setattr(bipeft.Run, "after_step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            go(world, tmp_path / "run", more="--save-every 2")              # saved after step 4, one step is lost
    assert go(world, tmp_path / "run") == 0
    assert_same_end(finished[0], tmp_path / "run")


def test_a_causal_models_batches_hold_prompt_and_target_with_a_loss_on_the_target_alone():
    tokens = bipeft.tokenize(word_tokenizer(WORDS), [bipeft.Example("say 0 1", "yes", ("yes",)),
                                                     bipeft.Example("say", "no", ("no",))], 9, causal=True)
    assert tokens == [([3, 4, 5, 1], [6, 1]), ([3, 1], [7, 1])]                   # the tokenizer's own </s>, then ours
    (batch,) = bipeft.Batches(tokens, 2, "cpu", causal=True)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 1, 6, 1], [3, 1, 7, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100] * 4 + [6, 1], [-100, -100, 7, 1, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 4 + [0, 0]]


def test_a_causal_models_predictions_are_those_of_each_prompt_alone():
    model, tokenizer = family("llama"), word_tokenizer(WORDS)
    peft = randomise(bipeft.Peft(model, every("prefix", model) + every("lora", model)), 0.5)
    examples = [bipeft.Example(" ".join(WORDS[:n]), "yes no yes", ()) for n in (3, 9, 1, 6)]
    tokens = bipeft.tokenize(tokenizer, examples, 20, causal=True)
    together = bipeft.predict(model, tokenizer, tokens, 4, "cpu")
    for (source, target), text in zip(tokens, together):
        ids = torch.tensor([source])
        for _ in target:                                                       # greedy, without a cache or padding
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[0, len(source):], skip_special_tokens=True).strip()
    assert len(set(together)) > 1
    peft.detach()


def test_a_causal_model_from_the_command_line(world, tmp_path, monkeypatch):
    family("llama").save_pretrained(tmp_path / "model")
    word_tokenizer(WORDS).save_pretrained(tmp_path / "model")
    more, after_step = f"--model {tmp_path}/model --budget 800", bipeft.Run.after_step
    assert go(world, tmp_path / "whole", more=more) == 0

    def crash(run, step, *args, **others):
        after_step(run, step, *args, **others)
        if step == 5:
            raise RuntimeError("power cut")

    with monkeypatch.context() as broken:
        broken.setattr(bipeft.Run, "after_step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            go(world, tmp_path / "run", more=f"{more} --save-every 2")
    assert go(world, tmp_path / "run", more=more) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "run")
    model, tokenizer, peft = bipeft.load_run(tmp_path / "run")
    stored = safetensors.torch.load_file(tmp_path / "run" / "peft.safetensors")
    assert all(torch.equal(t, stored[name]) for name, t in peft.named_weights().items())
    ids = tokenizer("say 0 1", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=2, pad_token_id=0).shape[1] > ids.shape[1]
    with pytest.raises(UsageError, match="no finished run"):
        bipeft.load_run(tmp_path)


def test_the_clocks_of_a_run_go_on_when_it_is_resumed(world, tmp_path, monkeypatch):
    crash_after_first_step(world, tmp_path, monkeypatch)
    stored = torch.load(tmp_path / "checkpoint.pt")
    torch.save({**stored, "elapsed": stored["elapsed"] + 1000}, tmp_path / "checkpoint.pt")
    training = bipeft.train
    monkeypatch.setattr(bipeft, "train", lambda *args, **more: crash_in_training())

    def crash_in_training():
        raise RuntimeError("power cut")
    with pytest.raises(RuntimeError, match="power cut"):
        go(world, tmp_path)
    monkeypatch.setattr(bipeft, "train", training)
    stored = torch.load(tmp_path / "checkpoint.pt")
    assert stored["phase"] == "train" and 1000 < stored["search_seconds"] < 1100
    torch.save({**stored, "elapsed": 2000.0}, tmp_path / "checkpoint.pt")
    assert go(world, tmp_path) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert 1000 < metrics["search_seconds"] < 1100 and 2000 < metrics["train_seconds"] < 2100


def test_every_setting_reaches_the_search_and_the_training(world, tmp_path, monkeypatch):
    given, splits = {}, []
    for owner, name in ((bipeft.Search, "__init__"), (bipeft, "apply"), (bipeft, "train"), (bipeft, "fast_pass"),
                        (bipeft.Run, "score")):
        def note(*args, function=getattr(owner, name), name=name, **more):
            bound = inspect.signature(function).bind(*args, **more)
            bound.apply_defaults()
            given.setdefault(name, bound.arguments)
            if name == "score":
                splits.append(bound.arguments["split"])
            return function(*args, **more)
        monkeypatch.setattr(owner, name, note)
    line = ("--task custom --data-dir {root}/data --model {root}/model --epochs 2 --search-epochs 3 --warmup-epochs 1 "
            "--triggers 4 --window 2 --tau 0.25 --gamma 0.5 --budget 0.1 --batch-size 4 --lr 0.05 --arch-lr 0.02 "
            "--weight-decay 0.003 --accumulate 2 --seed 7 --ranks 2 3")
    assert go(world, tmp_path, line) == 0
    searched, trained = given["__init__"], given["train"]
    size = bipeft.load_structure(tmp_path / "structure.json").geometry["parameters"]
    half = math.ceil(len(bipeft.load_splits("custom", world / "data", 7)["train"]) / 2 / 4)
    for key, value in {"budget": int(0.1 * size), "steps": 3 * half, "warmup": half, "triggers": 4, "tau": 0.25,
                       "gamma": 0.5, "window": 2, "lr": 0.05, "arch_lr": 0.02, "weight_decay": 0.003,
                       "seed": 7}.items():
        assert searched[key] == value, key
    assert given["fast_pass"]["parts"] == 2
    assert searched["space"].ranks == (2, 3) and given["apply"]["seed"] == bipeft.derive(7, 14)
    for key, value in {"epochs": 2, "lr": 0.05, "weight_decay": 0.003, "seed": 7, "parts": 2}.items():
        assert trained[key] == value, key
    assert splits == ["validation"] * 2 + ["test"] * 2            # one look at test, with the modules and without


def test_the_most_frequent_answer_is_that_of_train():
    # "no" is two of three in train and one of four in test: always saying it scores 25
    splits = {key: [bipeft.Example("x", text, (text,)) for text in texts.split()]
              for key, texts in (("train", "no yes no"), ("test", "yes yes no yes"))}
    model = tiny_t5()
    space = bipeft.Space(model, "bitfit")
    structure = space.structure([True] * len(space), [0] * len(space), 10**6)
    run = SimpleNamespace(settings=SimpleNamespace(task="custom"), task=bipeft.TASKS["custom"], seed=0, splits=splits,
                          score=lambda split: 0.0, device=torch.device("cpu"), size=1, identity={}, started=0.0,
                          stored={"search_seconds": 0.0})
    assert bipeft.Run.measure(run, space, structure, 0.0)["test_most_frequent"] == 25


def test_a_structure_changed_in_its_file_is_another_run(world, tmp_path, capfd):
    line = RTE + f" --epochs 1 --structure {tmp_path}/given.json"
    good = json.loads((world / "structures" / "good.json").read_text())
    (tmp_path / "given.json").write_text(json.dumps(good))
    assert go(world, tmp_path / "run", line) == 0 and go(world, tmp_path / "run", line) == 0
    (tmp_path / "given.json").write_text(json.dumps({**good, "modules": good["modules"][1:]}))
    capfd.readouterr()
    assert go(world, tmp_path / "run", line) == 2
    assert "another run: its --structure is" in capfd.readouterr().err


def crash_after_first_step(world, out, monkeypatch):
    """A run whose first step is saved, and which a power cut ends then."""
    def crash(run, step, left, text, state, **more):
        run.save(search=state())
        raise RuntimeError("power cut")

    with monkeypatch.context() as broken:
        broken.setattr(bipeft.Run, "after_step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            go(world, out)


def stopped(world, out, capfd, *words, more="--save-every 1"):
    """A run that must end with one line that holds some words, exit code 2, and a whole checkpoint, returned."""
    capfd.readouterr()
    assert go(world, out, more=more) == 2
    error = capfd.readouterr().err
    assert error.startswith("bipeft.py: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error
    assert not list(out.glob(".*.new"))
    return torch.load(out / "checkpoint.pt")


# The first twelve steps take three passes each: pass 10 is the first of search step 4, pass 12 its last.
@pytest.mark.parametrize("passes, step, spoil", [
    (10, "search step 4", "nan"), (12, "search step 4", "gradient"),
    (-4, "training step 4", "inf"), (-4, "training step 4", "gradient")])
def test_numbers_that_go_wrong_end_the_run_and_leave_the_checkpoint(world, finished, tmp_path, monkeypatch, capfd,
                                                                  passes, step, spoil):
    done, phase, loss_of, train = [0], ["search"], bipeft.loss_of, bipeft.train

    def spoilt(output):
        loss, wanted = loss_of(output), "search" if passes > 0 else "train"
        done[0] += phase[0] == wanted
        if phase[0] != wanted or done[0] != abs(passes):
            return loss
        if spoil == "gradient":                        # as of float16: a finite loss with an infinite gradient
            loss = loss * 1.0
            loss.register_hook(lambda gradient: gradient * math.inf)
            return loss
        return loss * float(spoil)

    with monkeypatch.context() as broken:
        broken.setattr(bipeft, "loss_of", spoilt)
        broken.setattr(bipeft, "train", lambda *args, **more: phase.__setitem__(0, "train") or train(*args, **more))
        left = stopped(world, tmp_path / "run", capfd, f"at {step}:", "bfloat16", "float32", "smaller --lr")
    state = left[phase[0]]
    assert state["steps_done" if phase[0] == "search" else "step"] == 3 and all(torch.isfinite(t).all() for t in state.get("learned", [state.get("weights")]) if t is not None)
    if spoil == "gradient":
        assert go(world, tmp_path / "run") == 0
        assert_same_end(finished[0], tmp_path / "run")


def cut_short(write, name, from_write, error):
    """Path.write_bytes on a disk that is full from the nth write of a file on: half of it goes out, then an error."""
    count = [0]

    def cut(path, content):
        count[0] += path.name == f".{name}.new"
        if path.name == f".{name}.new" and count[0] >= from_write:
            write(path, content[:len(content) // 2])
            raise OSError(error, os.strerror(error))
        return write(path, content)
    return cut


@pytest.mark.parametrize("name, write, error", [
    ("checkpoint.pt", 20, errno.ENOSPC), ("structure.json", 1, errno.EROFS), ("metrics.json", 1, errno.ENOSPC)])
def test_a_disk_that_fills_up_loses_nothing(world, finished, tmp_path, monkeypatch, capfd, name, write, error):
    with monkeypatch.context() as full:
        full.setattr(Path, "write_bytes", cut_short(Path.write_bytes, name, write, error))
        stopped(world, tmp_path / "run", capfd, name, "can't be written", os.strerror(error), "--out")
    assert go(world, tmp_path / "run") == 0
    assert_same_end(finished[0], tmp_path / "run")


def test_a_file_too_large_for_the_disk_loses_nothing(world, finished, tmp_path, monkeypatch, capfd):
    """With a limit on the size of files the kernel itself ends a write midway: the fourth checkpoint's."""
    resource = pytest.importorskip("resource")
    write, before, saved = bipeft.write_atomically, resource.getrlimit(resource.RLIMIT_FSIZE), []

    def limited(path, content):
        saved.append(path.name)
        if saved.count("checkpoint.pt") < 4:
            return write(path, content)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            write(path, content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as small:
        small.setattr(bipeft, "write_atomically", limited)
        left = stopped(world, tmp_path / "run", capfd, "checkpoint.pt can't be written (File too large)")
    assert left["search"]["steps_done"] == 2
    assert sorted(contents(tmp_path / "run")) == ["checkpoint.pt", "search.jsonl"]
    assert go(world, tmp_path / "run") == 0
    assert_same_end(finished[0], tmp_path / "run")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
def test_standard_output_on_a_full_disk_is_one_line(world, tmp_path, monkeypatch, capfd):
    with open("/dev/full", "w") as full, monkeypatch.context() as told:
        told.setattr(sys, "stdout", full)
        assert go(world, tmp_path / "run") == 2
        error = capfd.readouterr().err
        with pytest.raises(OSError):
            full.close()
    assert error.startswith("bipeft.py: [Errno 28]") and error.count("\n") == 1


def test_a_folder_that_can_not_be_emptied_is_one_line(world, finished, tmp_path, monkeypatch, capfd):
    for name, content in contents(finished[0]).items():
        (tmp_path / name).write_bytes(content)

    def refuse(path, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as locked:
        locked.setattr(Path, "unlink", refuse)
        assert go(world, tmp_path, more="--fresh") == 2
    error = capfd.readouterr().err
    assert "Read-only file system" in error and error.count("\n") == 1
    assert contents(tmp_path) == contents(finished[0])


def test_a_damaged_checkpoint_is_refused_and_left_as_it_is(world, tmp_path, monkeypatch, capfd):
    crash_after_first_step(world, tmp_path, monkeypatch)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    middle = bytes([whole[len(whole) // 2] ^ 1])
    spoilt = [whole[:size] for size in (0, 1, 100, len(whole) // 2, len(whole) - 1)] + [
        whole[:len(whole) // 2] + middle + whole[len(whole) // 2 + 1:], whole[::-1], b"\0" * len(whole)]
    for content in spoilt:
        path.write_bytes(content)
        capfd.readouterr()
        assert go(world, tmp_path) == 2
        error = capfd.readouterr().err
        assert f"{path} can't be read (" in error and "--fresh" in error and error.count("\n") == 1, error
        assert path.read_bytes() == content
    for content in (torch.ones(3), [1], None):
        torch.save(content, path)
        assert go(world, tmp_path) == 2 and f"{path} can't be read (" in capfd.readouterr().err
    path.write_bytes(whole)
    assert go(world, tmp_path) == 0


def test_spoilt_metrics_are_refused_and_left_as_they_are(world, finished, tmp_path, capfd):
    for name, content in contents(finished[0]).items():
        (tmp_path / name).write_bytes(content)
    path = tmp_path / "metrics.json"
    whole = path.read_bytes()
    for content in (b"", whole[:1], whole[:len(whole) // 2], whole[:-3], b"\xff" + whole):
        path.write_bytes(content)
        capfd.readouterr()
        assert go(world, tmp_path) == 2
        error = capfd.readouterr().err
        assert f"{path} can't be read (" in error and "--fresh" in error and error.count("\n") == 1, error
        assert path.read_bytes() == content and len(contents(tmp_path)) == 4


def test_a_run_in_parts_with_recomputed_activations(world, tmp_path):
    assert go(world, tmp_path / "run", more="--checkpointing --accumulate 3 --search-epochs 2 --epochs 1") == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert sorted(contents(tmp_path / "run")) == RUN_FILES and 0 < metrics["parameters"] <= metrics["budget"]


def download_errors():
    """What transformers, datasets and the hub's client raise when a download breaks off."""
    from huggingface_hub import errors

    class RemoteProtocolError(Exception):                      # those of httpx and requests are of many classes
        pass

    return [ConnectionError("reset by peer\nmid-file"), ConnectionResetError(104, "Connection reset by peer"),
            TimeoutError("timed out"), RemoteProtocolError("peer closed connection\n(received 5 bytes, expected 9)"),
            errors.LocalEntryNotFoundError("not in the cache\nand no network"), errors.OfflineModeIsEnabled("offline"),
            OSError("Consistency check failed: file should be of size 9 but has size 5"),
            OSError(errno.ENOSPC, "No space left on device"), EOFError()]


@pytest.mark.parametrize("where", ["config", "weights", "tokenizer", "data"])
def test_an_interrupted_download_is_one_line(world, finished, tmp_path, monkeypatch, capfd, where):
    for name, content in contents(finished[0]).items():
        (tmp_path / name).write_bytes(content)
    owner, name, words = {
        "config": (transformers.AutoConfig, "from_pretrained", "model"),
        "weights": (transformers.AutoModelForSeq2SeqLM, "from_pretrained", "model"),
        "tokenizer": (transformers.AutoTokenizer, "from_pretrained", "model"),
        "data": (datasets, "load_dataset", "rte on the hub can't be read")}[where]
    line = "--task rte --fresh --model {root}/model" + (" --data-dir {root}/data" if where != "data" else "")
    for error in download_errors():
        monkeypatch.setattr(owner, name, lambda *args, error=error, **more: (_ for _ in ()).throw(error))
        assert go(world, tmp_path, line) == 2
        said = capfd.readouterr().err
        assert words in said and "network" in said and said.count("\n") == 1, said
    assert contents(tmp_path) == contents(finished[0])


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_half_a_downloaded_file_is_one_line(world, tmp_path, capfd, file):
    for left in (0.0, 0.5, 0.99):
        for path in (world / "model").iterdir():
            content = path.read_bytes()
            (tmp_path / path.name).write_bytes(content[:int(left * len(content))] if path.name == file else content)
        assert go(world, tmp_path / "run", f"--task rte --data-dir {{root}}/data --model {tmp_path}") == 2
        error = capfd.readouterr().err
        assert f"{tmp_path} can't be loaded (" in error and error.count("\n") == 1, error


def run_kills(root, folder):
    """A run as a script: SIGKILL twice, 0.1 s after a process's first write, and to its end; then a mistake.

    Returns (its folder, what `trial` says, what the mistake says and its exit code).
    """
    from kill import trial
    line, out = QUICK.format(root=root).split(), folder / "killed"
    told = trial(line, out, out, [(0.1, True)] * 2, 1, 0)                  # the test itself compares, with `finished`
    bad = subprocess.run([sys.executable, str(Path(bipeft.__file__).resolve()), *line, "--tau", "3"],
                         capture_output=True, text=True, cwd=folder)
    return out, told, (bad.stdout, bad.stderr, bad.returncode)


def test_a_run_killed_as_it_writes_goes_on_to_the_same_end(ahead, finished):
    """The short form of docs/experiments/kill.py."""
    out, (where, _, differs), _ = ahead["kills"].result()
    from kill import difference
    assert where and differs is None, (where, differs)
    assert difference(out, finished[0]) is None


def test_a_checkpoint_of_other_settings_is_not_gone_on_with(world, tmp_path, monkeypatch, capfd):
    crash_after_first_step(world, tmp_path, monkeypatch)
    assert go(world, tmp_path, more="--triggers 3") == 2
    assert "another run: its --triggers is 4, now it is 3" in capfd.readouterr().err


def test_the_program_runs_as_a_script(ahead, finished):
    out, _, bad = ahead["kills"].result()
    said = Path(f"{out}.txt").read_text()                                    # standard output and error
    for words in ("budget 2,000", "parameters", "validation", "most frequent answer", f"written to {out}"):
        assert words in said
    assert "arning" not in said and "Traceback" not in said
    assert_same_end(finished[0], out)
    assert bad == ("", "bipeft.py: argument --tau: 3 must lie in 0 .. 1 (--help lists the flags)\n", 2)


def test_help_names_every_flag(capfd):
    with pytest.raises(SystemExit) as ended:
        bipeft.main(["--help"])
    said = capfd.readouterr().out
    assert ended.value.code == 0
    for name in vars(bipeft.parse([])):
        assert f"\n  --{name.replace('_', '-')}" in said
    assert "per cent" not in said and "ten thousand" in said


@pytest.fixture(scope="session")
def toy():
    """The toy's backbone, pretrained a little."""
    return bipeft.toy_backbone(0, steps=25)


@pytest.mark.parametrize("space", ["s1", "s2"])
def test_the_toy_end_to_end(tmp_path, monkeypatch, toy, space):
    splits = {key: value[:count] for (key, value), count in zip(bipeft.toy_splits(0).items(), (256, 40, 40))}
    monkeypatch.setattr(bipeft, "toy_splits", lambda seed: splits)
    monkeypatch.setattr(bipeft, "toy_backbone", lambda seed: copy.deepcopy(toy))
    line = f"--task toy --space {space} --search-epochs 2 --warmup-epochs 1 --epochs 1 --triggers 5 --seed 3"
    monkeypatch.chdir(tmp_path)
    assert bipeft.main(line.split()) == 0
    out = tmp_path / "runs" / f"toy-{space}-3"                             # the default --out
    metrics = json.loads((out / "metrics.json").read_text())
    assert sorted(contents(out)) == RUN_FILES and 0 < metrics["parameters"] <= metrics["budget"]
    # the toy's default budget is a fraction of its backbone
    assert metrics["budget"] == int(0.03 * metrics["backbone_parameters"])
    assert abs(metrics["test_untouched"] - 50) <= 30 and metrics["test_most_frequent"] >= 40


@pytest.mark.skipif(not ((SHARED / "t5-tiny").is_dir() and (SHARED / "glue").is_dir()), reason="no such folders here")
def test_a_pretrained_model_on_real_rows(tmp_path):
    for split, count in (("train", 24), ("validation", 12)):
        file = str(SHARED / "glue" / "rte" / f"{split}.parquet")
        rows = datasets.load_dataset("parquet", data_files=file, split="train")
        write_split(tmp_path, "rte", split, rows.select(range(count)).to_list())
    line = f"--task rte --data-dir {tmp_path} --model {SHARED / 't5-tiny'} --max-length 32 --batch-size 6 " \
           "--epochs 1 --search-epochs 2 --warmup-epochs 0 --window 1 --triggers 2 --tau 0.1"
    assert bipeft.main([*line.split(), "--out", str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["backbone_parameters"] == 15_570_688                    # as the model's own page says
    assert 0 < metrics["parameters"] <= metrics["budget"] == int(1.39e-4 * 15_570_688)


def test_the_search_finds_better_than_random_structures():
    """The short form of docs/experiments/teacher_student.py: a teacher's labels, under half its size."""
    from teacher_student import compare
    losses = compare(seed=3, warmup=40, triggers=15, search_steps=80, train_steps=60)
    assert losses["bipeft"] < sorted(losses["random"])[2] < losses["bare"]          # the median of five


# What a run's folder and the space look like when something has ended


def test_after_a_search_no_sampled_architecture_is_left_in_the_modules():
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0))
    batches = list(bipeft.Batches([([5, 6, 1], [7, 1]), ([8, 9, 1], [7, 1])], 1, "cpu"))
    space = bipeft.Space(model, "s2")
    bipeft.search(model, space, batches, batches, 300, 4, triggers=2)
    assert all(m.openness is None and m.active for m in space.modules_)
    space.detach()


def test_a_checkpoint_beside_metrics_is_gone_on_from(tmp_path):
    """Both are there if a run was killed while it tidied up, or while --fresh started over."""
    first = bipeft.Run(bipeft.parse(["--task", "toy"]), 0, tmp_path)
    first.begin("search")
    (tmp_path / "metrics.json").write_text(json.dumps({"settings": first.identity}))
    again = bipeft.Run(first.settings, 0, tmp_path)
    assert again.stored["phase"] == "search"


def test_fresh_takes_old_scores_away_before_it_writes_anything(tmp_path, monkeypatch):
    (tmp_path / "metrics.json").write_text(json.dumps({"settings": {"seed": 1}}))
    run = bipeft.Run(bipeft.parse(["--task", "toy", "--fresh"]), 0, tmp_path)
    assert (tmp_path / "metrics.json").exists()                     # not before there is something to save
    monkeypatch.setattr(bipeft, "write_atomically", lambda path, content: contents_at_write.append(contents(tmp_path)))
    contents_at_write = []
    run.begin("search")
    assert "metrics.json" not in contents_at_write[0]


def test_a_signal_during_the_end_of_a_run_ends_the_program_after_it(tmp_path):
    with pytest.raises(SystemExit) as stopped, bipeft.Run(bipeft.parse(["--task", "toy"]), 0, tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)                        # no step follows that could notice it
    assert stopped.value.code == 128 + signal.SIGTERM


def test_a_checkpoint_of_another_version_is_one_line(world, tmp_path, monkeypatch, capfd):
    crash_after_first_step(world, tmp_path, monkeypatch)
    stored = torch.load(tmp_path / "checkpoint.pt")
    missing = {key: value for key, value in stored["search"].items() if key != "smoothed"}
    for spoilt in ({**stored, "search": missing}, {**stored, "search": {**stored["search"], "learned": [torch.ones(2)]}},
                   {key: value for key, value in stored.items() if key != "elapsed"}):
        torch.save(spoilt, tmp_path / "checkpoint.pt")
        capfd.readouterr()
        assert go(world, tmp_path) == 2
        error = capfd.readouterr().err
        assert "checkpoint.pt can't be read (" in error and "--fresh" in error and error.count("\n") == 1, error


def test_triggers_that_a_search_has_no_room_for(world, tmp_path, capfd):
    assert go(world, tmp_path / "run", more="--triggers 9999") == 2
    error = capfd.readouterr().err
    assert "--triggers 9999" in error and " steps" in error and " modules" in error and error.count("\n") == 1
    (tmp_path / "run" / ".checkpoint.pt.new").write_text("of a killed write")
    assert go(world, tmp_path / "run", more="--triggers 100 --fresh --epochs 1 --search-epochs 2") == 0
    assert "before trigger 100: the last " in capfd.readouterr().out
    assert sorted(contents(tmp_path / "run")) == RUN_FILES
