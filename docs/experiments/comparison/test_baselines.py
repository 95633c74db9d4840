"""Each method of the comparison, and what they stand on, on a tiny random encoder."""

import itertools
import re
from pathlib import Path

import pytest
import torch

import baselines
from harness import SMALL, Bench, Settings, Supernet, bipeft


@pytest.fixture(scope="module")
def bench():
    made = Bench(Settings(**SMALL))
    made.open("toy", 0)
    return made


def test_splits_share_no_row_and_searches_see_two_halves(bench):
    bench.open("toy", 0)
    parts = [[tuple(ids) for ids, _ in rows] for rows in bench.splits.values()]
    assert all(not set(a) & set(b) for a, b in itertools.combinations(parts, 2))
    assert sum(map(len, parts)) == 400
    with Supernet(bench, "s2") as net:
        seen = [{tuple(row[mask.bool()].tolist()) for batch in half for row, mask in zip(
            batch["input_ids"], batch["attention_mask"])} for half in net.batches]
    assert not seen[0] & seen[1] and seen[0] | seen[1] == set(parts[list(bench.splits).index("train")])


@pytest.fixture(scope="module")
def llama():
    """The harness around a tiny Llama: 4 layers, 9 norms of 32, 2 key/value heads for 4 of queries."""
    made = Bench(Settings(**{**SMALL, "family": "llama"}))
    made.open("toy", 0)
    return made


EVERY = [*baselines.FINDERS, *(f"variant:{name}" for name in baselines.VARIANTS)]
SOME = "bipeft", "lora", "chance", "even-norms", "whole", "full", "s3delta", "prunepeft", "b-d", "autopeft"


@pytest.mark.parametrize("family, finder", [*itertools.product(["bench"], EVERY), *itertools.product(["llama"], SOME)])
def test_a_method_keeps_the_budget_and_leaves_the_backbone_as_it_was(family, finder, request, monkeypatch):
    if finder == "autopeft":
        pytest.importorskip("botorch")
        monkeypatch.setattr(baselines.Configurations, "few", 3)                    # the Llama has four
    bench = request.getfixturevalue(family)
    bench.open("toy", 0)
    batch = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.long)
    with torch.no_grad():
        before = bench.model(*batch).logits
    for name, (structure, _) in baselines.find(bench, finder, 600).items():
        method = baselines.METHODS[name]
        assert method.finder == finder
        assert method.free or 0 < structure.parameters <= 600
        assert bench.decode(bench.encode(structure), 600).modules == structure.modules
        assert bench.passes or method.cheap
        if "variant" not in finder:
            peft, best, _ = bench.train(structure, 1e-3, method.whole)
            assert 0 <= best <= 100 and (peft.size == structure.parameters or method.free)
            peft.detach()
    bench.open("toy", 0)                                               # a fresh head of the same seed
    with torch.no_grad():
        assert torch.equal(bench.model(*batch).logits, before)


def test_the_method_of_copying_md_is_one_like_any_other(bench):
    page = (Path(__file__).resolve().parents[3] / "docs" / "copying.md").read_text()
    (code,) = re.findall(r"```python\n(def by_gradient.*?)```", page, re.DOTALL)
    exec(code, names := dict(vars(baselines)))
    bench.open("toy", 0)
    structure = names["by_gradient"](bench, 600)["gradients"]
    assert 400 < structure.parameters <= 600 and bench.passes == 8
    bench.open("toy", 0)
    assert names["by_gradient"](bench, 600)["gradients"] == structure


def test_matched_structures_have_the_same_kinds_ranks_and_sizes(bench, monkeypatch):
    told, log_line = [], bipeft.Search.log_line
    monkeypatch.setattr(bipeft.Search, "log_line", lambda *given: told.append(log_line(*given)) or told[-1])
    for finder, suffix in (("bipeft", ""), ("bipeft-clipped", ", clipped")):
        bench.open("toy", 3)
        told.clear()
        found = baselines.find(bench, finder, 600)
        own, other, one_look = (found[f"{name}{suffix}"] for name in ("BIPEFT", "matched random", "one look"))
        alike = [sorted((m["kind"], m["rank"] or 0, m["parameters"]) for m in structure.modules)
                 for structure, _ in (own, other)]
        assert alike[0] == alike[1] and one_look[1]["passes"] == 18
        assert baselines.METHODS[f"one look{suffix}"].rate_of == ("one look" if suffix else None)
        parts = [[line["loss_train"] for line in part] for part in (told[:6], told[6:])]       # a warm-up of six steps
        assert own[1]["losses"] == pytest.approx([sum(part) / len(part) for part in parts], abs=1e-3)


def test_of_many_layers_autopeft_prices_random_sets(llama, monkeypatch):
    llama.open("toy", 0)
    with Supernet(llama, "s1") as net:
        space = baselines.Configurations(net)
        every = space.admitted(600)
        monkeypatch.setattr(baselines.Configurations, "few", 3)
        assert set(space.admitted(600)) == set(every)                          # 1,500 find all 15 sets of four layers


def test_pruning_takes_a_later_slice_only_after_the_earlier():
    sizes = torch.tensor([[2, 6, 8], [2, 6, 8], [4, 0, 0]])
    scores = torch.tensor([[1.0, 60.0, 8.0], [6.0, 6.0, 0.0], [2.0, 0.0, 0.0]])
    # Densities .5 10 1, 3 1, .5: module 1's first two slices (8), then module 0's first (10), its second does
    # not fit 14 and closes it, module 2 (14).
    assert baselines.prune(scores, sizes, torch.tensor([3, 3, 3]), 14).tolist() == [1, 2, 1]


def test_shifted_gates_expect_the_budget_and_have_the_stated_gradient():
    alpha = torch.randn(5, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([3.0, 5, 8, 2, 9], dtype=torch.float64)
    p = baselines.shifted(alpha, sizes, 11)
    assert float((p.detach() * sizes).sum()) == pytest.approx(11)
    g = (p * (1 - p)).detach()
    stated = torch.diag(g) - p.detach()[:, None] * g / p.sum().detach()
    jacobian = torch.stack([torch.autograd.grad(p[i], alpha, retain_graph=True)[0] for i in range(5)])
    torch.testing.assert_close(jacobian, stated)


def test_the_gradient_through_a_step_by_hand():
    # L_tra = a w^2 / 2 and L_val = w^2 / 2, at w = 3, a = 0.5, lr = 0.2: w' = 3 - 0.2 · 1.5 = 2.7 = d, and
    # dL_val(w')/da = w' · dw'/da = 2.7 · (-0.2 · 3) = -1.62. dL_tra/da is w^2 / 2.
    w, d, lr, eps = 3.0, 2.7, 0.2, 1e-3
    plus, minus = (w + eps * d) ** 2 / 2, (w - eps * d) ** 2 / 2
    assert baselines.through_the_step(0.0, plus, minus, lr, eps) == pytest.approx(-1.62)


def test_the_surrogate_climbs():
    pytest.importorskip("botorch")
    every = [(a, b) for a in range(6) for b in range(6)]
    score = {c: -(c[0] - 4) ** 2 - 0.1 * (c[1] - 1) ** 2 for c in every}
    tried = every[::5]
    for _ in range(2):
        left = [c for c in every if c not in tried]
        tried = tried + baselines.propose(tried, [score[c] for c in tried], left, 4)
    assert len(set(tried)) == len(tried) and max(map(score.get, tried)) >= -0.1


def test_sensitivity_with_open_gates_leaves_the_descent_as_it_was(bench):
    """Of two steps Delta W is that of a plain search: only s comes from other passes."""
    weights, shut = [], []
    for cls in (bipeft.Search, baselines.OpenSensitivity):
        bench.open("toy", 0)
        with Supernet(bench, "s2") as net:
            run = cls(bench.model, net.space, bipeft.Settings(budget=600, lr=1e-2), 9, 9, net.run_pass)
            for _ in range(2):                                             # before the first all act as zero
                before = run.smoothed
                run.step(next(net.train), next(net.val), next(net.val))
            weights.append(net.weights())
            shut.append(int(torch.isclose(run.smoothed, 0.85 * before).sum()))          # s = 0: shut, in a plain one
    torch.testing.assert_close(*weights)
    assert shut[0] > shut[1]


def test_variants_of_a_search_are_what_their_names_say(bench, monkeypatch):
    bench.open("toy", 0)
    with Supernet(bench, "s2") as net:
        other = baselines.OtherTemperature(bench.model, net.space, bipeft.Settings(budget=600), 20, 20, net.run_pass)
    first, other.steps_done = other.temperature(), 19
    assert (first, other.temperature()) == pytest.approx((5, 0.1))
    monkeypatch.setattr(bipeft.Search, "update_weights", lambda search: told.append(search.settings))
    for finder, clip, lr_warmup in (("bipeft-clipped", 1.0, 0), ("variant:rising search lr", None, 0.1)):
        told = []
        baselines.find(bench, finder, 600)
        assert {(settings.clip, settings.lr_warmup) for settings in told} == {(clip, lr_warmup)}
    assert baselines.METHODS["BIPEFT, clipped"].rate_of == "BIPEFT"


def test_a_training_clips_the_norm_of_all_gradients_together(bench, monkeypatch):
    bench.open("toy", 0)
    found, seen = baselines.find(bench, "lora", 600)["LoRA"][0], []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer: seen.append(
        bipeft.flatten([p.grad for p in optimizer.param_groups[0]["params"]])))
    for norm in (None, 1e-3):
        bench.train(found, 1e-3, clip=norm)[0].detach()
    first, clipped = seen[0], seen[12]                                     # the first of 12 steps each
    assert float(clipped.norm()) == pytest.approx(1e-3, rel=1e-3) and float(first.norm()) > 2e-3
    torch.testing.assert_close(clipped, first * (clipped.norm() / first.norm()))
    made = {name: (m.clip, m.lr_warmup, m.like, m.rate_of) for name, m in baselines.RETRAINING.items()}
    assert made["BIPEFT, clipped, training clipped"] == (1.0, 0, "BIPEFT, clipped", "BIPEFT")
    assert made["LoRA, rising rate"] == (None, 0.1, "LoRA", "LoRA")


def test_lora_at_scale_16_adds_sixteen_times_as_much():
    module = bipeft.LoRA(torch.nn.Linear(4, 3), 2)
    torch.nn.init.ones_(module.B)
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    plain = module(x, y) - y
    for name in ("LoRA scale 16", "S3Delta-M, scale 16"):
        with baselines.scaled_lora(baselines.SCALES[baselines.METHODS[name].finder]):
            torch.testing.assert_close(module(x, y) - y, 16 * plain)
    torch.testing.assert_close(module(x, y) - y, plain)


def test_a_llamas_answer_is_the_next_token_of_its_own_head(llama):
    llama.open("toy", 0)
    rows = [[1, 7, 9, 4], [1, 8], [1, 2, 3, 5, 6, 7]]
    labels = [1, 0, 1]
    batch = bipeft.collate([(ids, [y]) for ids, y in zip(rows, labels)], "cpu")
    with torch.no_grad():
        output = llama.model(**batch)
        alone = [llama.encoder(torch.tensor([ids])).logits[0, -1, [3, 4]] for ids in rows]    # none padded
    torch.testing.assert_close(output.logits, torch.stack(alone))
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(
        torch.stack(alone), torch.tensor(labels)))


def test_even_norms_and_lora_on_even_layers_of_a_llama_by_hand(llama):
    # 600 is 18 biases of 32, and there are nine norms; 200 is 6: norms (i + 1/2) · 9/6 = 0, 2, 3, 5, 6, 8.
    norms = [f"layers.{i}.{norm}_layernorm" for i in range(4) for norm in ("input", "post_attention")]
    norms += ["norm"]
    for budget, taken in (600, range(9)), (200, (0, 2, 3, 5, 6, 8)):
        found, _ = baselines.find(llama, "even-norms", budget)["biases on even norms"]
        assert [m["name"] for m in found.modules] == [norms[i] for i in taken]
        assert {m["kind"] for m in found.modules} == {"bitfit"} and found.parameters == 32 * len(taken)
    # q is 32 x 32 and v 16 x 32: 64 + 48 a layer at rank 1. 300 is 2 layers: (i + 1/2) · 4/2 = 1, 3.
    found, _ = baselines.find(llama, "lora", 300)["LoRA"]
    assert [(m["name"], m["rank"]) for m in found.modules] == [
        (f"layers.{i}.self_attn.{of}_proj", 1) for i in (1, 3) for of in "qv"] and found.parameters == 224
    # 448 is rank 1 in all four; and 600 pays for a second rank on some.
    assert baselines.find(llama, "lora", 600)["LoRA"][0].parameters > 448
    assert baselines.find(llama, "lora-8", 1)["LoRA, r = 8"][0].parameters == 8 * 448
    # Of a layer q, o, gate, up, down are 32 + 32 + 64 + 64 + 32, k and v 16 each, two norms 32 each.
    assert baselines.find(llama, "all-biases", 1)["all biases"][0].parameters == 4 * 320 + 32


def test_full_fine_tuning_of_a_16_bit_llama_learns_in_float32_and_leaves_it_as_it_was():
    llama = Bench(Settings(**{**SMALL, "family": "llama", "dtype": "bfloat16"}))
    llama.open("toy", 0)
    before = {name: p.clone() for name, p in llama.model.named_parameters()}
    frequencies = {name: b.clone() for name, b in llama.model.named_buffers()}
    assert {p.dtype for p in before.values()} == {torch.bfloat16}
    peft, _, _ = llama.train(baselines.find(llama, "full", 600)["full"][0], 1e-3, whole=True)
    assert {p.dtype for p in llama.model.parameters()} == {torch.float32}
    peft.detach()
    llama.open("toy", 0)
    assert all(torch.equal(p, before[name]) for name, p in llama.model.named_parameters())
    assert all(torch.equal(b, frequencies[name]) for name, b in llama.model.named_buffers())


def test_adalora_on_a_llama_counts_the_triplets_that_it_keeps(llama):
    pytest.importorskip("peft")
    # B 600 is 9 triplets of q and o, 32 + 32 + 1; those of k and v are 16 + 32 + 1.
    llama.open("toy", 0)
    best, curve, parameters, test = baselines.train_adalora(llama, 600, 1e-2)
    assert 0 <= best <= 100 and len(curve) == 3 and 0 <= test() <= 100
    assert parameters in {65 * qo + 49 * kv for qo in range(10) for kv in range(10) if qo + kv <= 9}
