"""The methods of compare.py, simple ones first: each takes a bench and a budget, and gives its structures by name.

METHODS, at the end, names them all, FINDERS has the function of each, `find` gives a structure; AdaLoRA's training is
its search. Whose a method is, and what was taken where its paper is open, its docstring says; rules are in compare.py.
"""

import contextlib
import copy
import dataclasses
import itertools
import math
import random
import re
import time
from collections import defaultdict

import torch

from harness import Supernet, bipeft, first_fit

# Of trainings within a search, by family, from an earlier run: of random structures, and of BIPEFT's in S1.
INNER_RATES, S1_RATES = {"bert": 6e-3, "llama": 3e-3}, {"bert": 2.5e-3, "llama": 1e-2}


# 1. Fixed and random structures

def everywhere(bench, wanted, rank, budget):
    """A rank at all places that are wanted, outside of the budget."""
    chosen = [(name, kind, rank) for name, kind in bench.keys if wanted(kind, name)]
    return bench.structure(chosen, budget)


def lora(bench, budget):
    """Hu et al. 2022:  y + B A x on q and v of every self-attention; the rank is what fits (`spread`). If not
    even rank 1 does, q and v of as many evenly spaced layers as fit have it.
    """
    if everywhere(bench, is_query_or_value, 1, budget).parameters <= budget:
        return {"LoRA": spread(bench, budget, is_query_or_value)}
    layers = defaultdict(list)
    for name, kind in bench.keys:
        if is_query_or_value(kind, name):
            layers[name.rpartition(".")[0]].append((name, kind))
    return {"LoRA": evenly_spaced(bench, budget, list(layers.values()))}


def is_query_or_value(kind, name):
    return kind == "lora" and name.split(".")[-1] in ("query", "value", "q", "v", "q_proj", "v_proj")


def is_kind(*wanted):
    return lambda kind, name: kind in wanted


def even_norms(bench, budget):
    """y + b on as many evenly spaced norms as fit: a guess from what searches find, without a search."""
    norms = [[(name, kind)] for name, kind in bench.keys if kind == "bitfit" and (name, "lnfit") in bench.where]
    return {"biases on even norms": evenly_spaced(bench, budget, norms)}


def evenly_spaced(bench, budget, groups):
    """Rank 1 in as many evenly spaced groups of places as fit.   groups: lists of (name, kind)."""
    found = bench.structure([], budget)
    for count in range(1, len(groups) + 1):
        taken = [groups[int((i + 0.5) * len(groups) / count)] for i in range(count)]
        structure = bench.structure([(*key, 1) for group in taken for key in group], budget)
        if structure.parameters <= budget:
            found = structure
    return found


def spread(bench, budget, wanted):
    """The largest rank that fits at all of some places, one more at evenly spaced ones; or rank 1 at such alone."""
    places = [key for key in reversed(bench.keys) if wanted(key[1], key[0])]        # so that of q and v, v is first
    ranked, found = bipeft.KINDS[places[0][1]].ranked, []

    def of(rank, count):
        more = {places[int((i + 0.5) * len(places) / count)] for i in range(count)}
        return [(*key, rank + (key in more)) for key in places if rank or key in more]

    def cost(chosen):
        return sum(bench.cost((name, kind), rank) for name, kind, rank in chosen)
    for rank in range(64 if ranked else 1):
        fitting = [chosen for count in range(1, len(places) + 1) if cost(chosen := of(rank, count)) <= budget]
        found = fitting[-1] if fitting else found
        if not fitting or len(fitting[-1]) < len(places) or cost(of(rank, len(places))) > budget:
            break
    return bench.structure(found, budget)


def chance(bench, budget, draw=0):
    """APET (Su et al. 2023): S2's modules in random order, each at a uniform rank of {1, 4, 8} or the largest
    smaller one that still fits, else passed over. A new structure for each seed; no best of several.
    """
    rng, free, chosen = random.Random(bipeft.derive(bench.seed, 24, draw)), budget, []
    keys = [key for key in bench.keys if key[1] in bipeft.SPACES["s2"]]
    for key in rng.sample(keys, len(keys)):
        for rank in (1, 4, 8)[rng.randrange(3)::-1]:
            if bench.cost(key, rank) <= free:
                chosen, free = chosen + [(*key, rank)], free - bench.cost(key, rank)
                break
    return {"random": bench.structure(chosen, budget)}


def best_of_chance(bench, budget, count=3):
    """The best of `count` random structures on validation, each trained in full: what a search has to beat."""
    scored = []
    for draw in range(1, count + 1):
        structure = chance(bench, budget, draw)["random"]
        peft, best, _ = bench.train(structure, INNER_RATES[bench.settings.family])
        peft.detach()
        scored.append((best, -draw, structure))
    return {"random, best of 3": max(scored, key=lambda found: found[:2])[2]}


# 2. BIPEFT, and what its run gives beside

def bipeft_search(bench, budget, kinds="s2", cls=bipeft.Search, name="BIPEFT", warmup_share=None, **settings):
    """Algorithm 1 (the paper), and of the same run, at no more cost: *one look*, s-bar (Eq. 4) when the warm-up
    ends, filled up to B in descending order at the largest rank that fits; and `matched`.
    """
    s = bench.settings
    warmup = s.warmup if warmup_share is None else round(warmup_share * s.search_steps)
    settings = bipeft.Settings(**{"budget": budget, "lr": s.search_lr, "seed": bench.seed, **settings})
    looks, losses, started = {}, [], time.perf_counter()

    def look(run, line):
        if line["step"] == warmup:
            looks["s"], looks["passes"] = run.smoothed.tolist(), bench.passes
            looks["seconds"] = round(time.perf_counter() - started, 2)
        looks["steps"], looks["missing"] = line["step"], settings.triggers - line["triggers"]
        losses.append(line["loss_train"])
    with Supernet(bench, kinds) as net:
        run = cls(bench.model, net.space, settings, s.search_steps, warmup, net.run_pass)
        found = run.run(*net.batches, after_step=look)
        told = {"steps": looks["steps"], "made_up": looks["missing"],
                "losses": [round(sum(part) / len(part), 3) for part in (losses[:warmup], losses[warmup:]) if part]}
        if name not in ("BIPEFT", "BIPEFT, clipped"):
            return {name: (found, told)}
        n, suffix = len(net.space), name.removeprefix("BIPEFT")
        kept, choice = bipeft.fill_budget(looks["s"], net.sizes, [False] * n, [0] * n, budget)
        looked = {"passes": looks["passes"], "seconds": looks["seconds"]}
        return {name: (found, told), f"one look{suffix}": (net.chosen(kept, choice, budget), looked),
                f"matched random{suffix}": matched(bench, found, budget)}


def matched(bench, structure, budget):
    """BIPEFT's structure, each module at a random free place where it has the same kind, rank and parameters."""
    rng, free = random.Random(bipeft.derive(bench.seed, 25)), defaultdict(list)
    for key in bench.keys:
        for rank in {m["rank"] or 1 for m in structure.modules}:
            free[key[1], rank, bench.cost(key, rank)].append(key)
    used, chosen = set(), []
    for m in rng.sample(structure.modules, len(structure.modules)):
        open_places = [key for key in free[m["kind"], m["rank"] or 1, m["parameters"]] if key not in used]
        key = rng.choice(open_places)
        used.add(key)
        chosen.append((*key, m["rank"] or 1))
    return bench.structure(chosen, budget)


# 3. Pruning: PrunePEFT, AdaLoRA

def prunepeft(bench, budget, rounds=1):
    """PrunePEFT (Lawton et al. 2023), as far as it is known: train all of S2 at rank 8, then prune by the first-
    order estimate of the loss, F_g = sum_t sum over w in g of |w_t G_t| in the last epoch, here the last sixth.

    Groups: a ranked module's components 1, 2-4, 5-8, biases inside with the first; any other module is one.
    Greedy by F_g / |g|, a later slice only after the earlier. rounds: train, prune to B_0 (B/B_0)^(r/R), and go
    on, with F of the last quarter of a round. All training data, 1 FTE.
    """
    steps = bench.settings.steps
    with Supernet(bench, "s2", search=False) as net:
        space = net.space
        slices = slice_of_weights(space)
        added = torch.tensor([[q[0], *(b - a for a, b in itertools.pairwise(q))] for q in net.sizes])
        whole, depth = int(added.sum()), torch.full((len(space),), 3)                   # slices kept of each
        for number in range(1, rounds + 1):
            scores = torch.zeros(len(space) * 3, device=slices.device)
            first, last = steps * (number - 1) // rounds, steps * number // rounds
            watched = max(1, steps // 6 if rounds == 1 else (last - first) // 4)
            gate, ranks = (depth > 0).float().to(slices.device), net.one_hot((depth - 1).clamp(min=0))
            for step in range(first, last):
                net.begin()
                gradient = net.gradient(gate, ranks, next(net.train))
                if step >= last - watched:
                    scores.index_add_(0, slices, (net.weights() * gradient)[:space.size].abs())
                net.descend(gradient, 1 - step / steps)
            target = round(whole * (budget / whole) ** (number / rounds))
            depth = prune(scores.view(-1, 3).cpu(), added, depth, target)
        found = net.chosen((depth > 0).tolist(), (depth - 1).clamp(min=0).tolist(), budget)
    return {"PrunePEFT" if rounds == 1 else f"PrunePEFT, {rounds} rounds": found}


def slice_of_weights(space):
    """For each of the P weights of S2 modules 3·n + its slice: rank components 1, 2-4 and 5-8."""
    which = torch.tensor([0, 1, 1, 1, 2, 2, 2, 2])
    parts = []
    for n, module in enumerate(space.modules):
        for key, p in module.named_parameters():
            of = torch.zeros(p.shape, dtype=torch.long)
            if space.kinds[n] in ("lora", "adapter_lr") and p.dim() == 2:
                of = (which[None, :] if key == "down_out" else which[:, None]).expand(p.shape)
            parts.append(3 * n + of.flatten())
    return torch.cat(parts).to(space.tensors[0].device)


def prune(scores, sizes, depth, budget):
    """How many slices to keep of each module: greedy by score per parameter among each module's next slice."""
    kept, free, closed = torch.zeros_like(depth), budget, set()
    density = torch.where(sizes > 0, scores / sizes.clamp(min=1), 0.0)
    while True:
        n = max((i for i in range(len(depth)) if i not in closed and kept[i] < depth[i] and sizes[i, kept[i]] > 0),
                key=lambda i: float(density[i, kept[i]]), default=None)
        if n is None:
            return kept
        cost = int(sizes[n, kept[n]])
        if cost <= free:
            kept[n] += 1
            free -= cost
        else:
            closed.add(n)


def train_adalora(bench, budget, lr):
    """AdaLoRA (Zhang et al. 2023), Hugging Face peft: B diag(E) A on q, k, v, o from rank 2 (or 1.5 times what B
    allows), masked by smoothed sensitivity · uncertainty until B fits; t_i = 0.1 T, t_f = 0.3 T, every T/60 steps.

    Its training is its search, and until t_f holds more than B. An epoch counts only once the number of triplets
    is final, the last 2 of 6; what has E = 0 in the best one is not counted. B is divided by the largest triplet.
    Returns (best, curve, parameters, test or None).
    """
    T, model = bench.settings.steps, copy.deepcopy(bench.model)
    of_triplet = 2 * model.encoder.config.hidden_size + 1               # of q and o
    wrapped, allocator, last = with_adalora(model, budget // of_triplet, T, bipeft.derive(bench.seed, 30))
    learnt = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(learnt.values(), lr=lr, weight_decay=1e-4)
    batches, every = bipeft.stream(bench.batches(bench.splits["train"])), T // bench.settings.evaluations
    best, curve, kept, parameters = -1, [], None, None
    for step in range(1, T + 1):
        torch.manual_seed(bipeft.derive(bench.seed, 10, step - 1))
        wrapped.train()
        loss = wrapped(**next(batches)).loss
        loss.backward()
        optimizer.param_groups[0]["lr"] = lr * (1 - (step - 1) / T)
        optimizer.step()
        wrapped.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        if step % every == 0 or step == T:
            curve.append(round(bench.score("validation", wrapped), 2))
            triplets, size = kept_triplets(learnt)
            if step >= last and curve[-1] > best and triplets <= allocator.target_bgt:
                best, parameters = curve[-1], size
                kept = {name: p.detach().clone() for name, p in learnt.items()}
    bench.passes += T
    if kept is None:
        raise bipeft.UsageError("AdaLoRA never came down to the budget")
    with torch.no_grad():
        for name, p in learnt.items():
            p.copy_(kept[name])
    return best, curve, parameters, lambda: bench.score("test", wrapped)


def kept_triplets(learnt):
    """How many triplets do not have E = 0, and their parameters.   learnt: {name: parameter} of peft's."""
    triplets, parameters = 0, 0
    for name, p in learnt.items():
        if "lora_E" in name:
            kept = int((p != 0).sum())
            d_in = learnt[name.replace("lora_E", "lora_A")].shape[1]
            d_out = learnt[name.replace("lora_E", "lora_B")].shape[0]
            triplets, parameters = triplets + kept, parameters + kept * (d_in + d_out + 1)
    return triplets, parameters


def with_adalora(model, triplets, steps, seed):
    """(model in peft's AdaLoRA, its head learning; the allocator; the step from which on it keeps so many triplets)."""
    import peft
    rank = max(2, math.ceil(1.5 * triplets / (4 * model.encoder.config.num_hidden_layers)))     # 4 matrices a layer
    config = peft.AdaLoraConfig(
        init_r=rank, target_r=1, lora_alpha=rank, tinit=round(0.1 * steps), tfinal=max(1, round(0.3 * steps)),
        deltaT=max(1, steps // 60), total_step=steps, lora_dropout=0.0,
        target_modules=r".*(attention\.(self\.(query|key|value)|output\.dense)|self_attn\.[qkvo]_proj)")
    for p in model.parameters():
        p.requires_grad_(False)
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, config)
    for name in model.head:
        model.get_submodule(name).requires_grad_(True)
    allocator = wrapped.base_model.rankallocator
    allocator.target_bgt = triplets
    return wrapped, allocator, steps - config.tfinal


# 4. Gates by gradient: S3Delta-M

def s3delta(bench, budget, hard=False, name="S3Delta-M", lr=None):
    """S3Delta-M (Hu et al. 2022b), S2 at rank 1:  p = sigmoid(alpha - zeta), sum p q = B;
    z = sigmoid(logit u + logit p), u ~ U(0, 1), times the module's output. Bilevel, second order:
    grad_alpha = dL_val(w')/dalpha - lr [dL_tra(w+)/dalpha - dL_tra(w-)/dalpha] / (2 eps), w+- = w +- eps d.

    Passes are as the re-training's on half of the data: half the steps. hard: gates 1[z >= 0.5], straight through, a
    shut gate without gradient, first order (w' = w). A step's four losses have one u and one dropout. lr: of w.
    """
    steps, best = bench.settings.search_steps // 2, (-1, None)
    with Supernet(bench, "s2", (1,), lr, weight_decay=0.0) as net:
        n, gates = len(net.space), SigmoidGates(net, budget, bench.seed, hard)
        optimizer = torch.optim.AdamW([gates.alpha], lr=0.1, weight_decay=0.0)
        for step in range(steps):
            net.begin()
            left, z, tra, val = 1 - step / steps, gates.sample(), next(net.train), next(net.val)
            gradient = gates.gradients(z, val)[0] if hard else gates.second_order(z, tra, val, left)
            gates.alpha.grad = gradient * (2 / gradient.norm().clamp(min=2))            # clipped
            optimizer.param_groups[0]["lr"] = 0.1 * left
            optimizer.step()
            net.descend(gates.of_weights(gates.sample(), tra), left, clip=2.0)
            if (step + 1) % max(1, steps // bench.settings.evaluations) == 0:           # with z = p
                expected = gates.probabilities().float().detach().to(gates.device)
                net.space.enter(expected, gates.ones)
                score = bench.score("validation")
                best = max(best, (score, gates.alpha.detach().tolist()), key=lambda pair: pair[0])
        order = sorted(range(n), key=lambda i: -best[1][i])
        found = net.chosen(first_fit(order, [q for q, in net.sizes], budget), [0] * n, budget)
    return {"S3Delta-M, hard" if hard else name: found}


class SigmoidGates:
    """S3Delta's gates z of a supernet's modules, and the gradients of a loss by their alpha and by w = Delta W."""

    def __init__(self, net, budget, seed, hard):
        self.net, self.budget, self.hard, self.device = net, budget, hard, net.bench.device
        n = len(net.space)
        self.sizes = net.space.param_counts[:, 0].double().cpu()
        self.ones = torch.ones(n, 1, device=self.device)
        self.alpha = torch.zeros(n, dtype=torch.float64, requires_grad=True)  # so few stay on the CPU
        self.generator = torch.Generator().manual_seed(bipeft.derive(seed, 26))

    def probabilities(self):
        """p = sigmoid(alpha - zeta), sum p q = B."""
        return shifted(self.alpha, self.sizes, self.budget)

    def sample(self):
        """z = sigmoid(logit u + logit p), u ~ U(0, 1)."""
        u = torch.rand(len(self.alpha), generator=self.generator).double().clamp(1e-6, 1 - 1e-6)
        return torch.sigmoid(torch.logit(u) + torch.logit(self.probabilities().clamp(1e-9, 1 - 1e-9))).float()

    def gate(self, z):
        """What the modules' outputs are multiplied by: z or, hard, 1[z >= 0.5]."""
        return ((z >= 0.5).float() if self.hard else z).detach().to(self.device)

    def of_weights(self, z, batch):
        """dL/dw."""
        return self.net.gradient(self.gate(z), self.ones, batch)

    def gradients(self, z, batch):
        """dL/dalpha and dL/dw, at the present weights and the step's dropout."""
        gate = self.gate(z).requires_grad_()
        self.net.begin(again=True)
        of_weights = self.net.gradient(gate, self.ones, batch, gate)
        of_gate = gate.grad * gate.detach() if self.hard else gate.grad
        return torch.autograd.grad(z, self.alpha, of_gate.cpu(), retain_graph=True)[0], of_weights

    def second_order(self, z, tra, val, left):
        """dL_val(w')/dalpha through a virtual step w' = w - lr dL_tra/dw, a step of the optimiser. w stays."""
        net = self.net
        of_weights = self.of_weights(z, tra)
        here, state = net.weights(), copy.deepcopy(net.optimizer.state_dict())
        net.descend(of_weights, left)
        direct, d = self.gradients(z, val)
        eps, sides = 0.01 / max(1e-12, float(d.norm())), []
        for sign in (1, -1):
            net.put(here + sign * eps * d)
            sides.append(self.gradients(z, tra)[0])
        net.put(here)
        net.optimizer.load_state_dict(state)
        return through_the_step(direct, *sides, net.lr * left, eps)


def shifted(alpha, sizes, budget):
    """p = sigmoid(alpha - zeta) with sum p q = B, zeta by bisection and without a gradient; and
    p_hat = p · sg(sum p)/sum p, so that d p_hat_i/d alpha_j = delta_ij g_i - p_i g_j/sum p, g = p (1 - p).
    """
    with torch.no_grad():
        low, high = alpha.min() - 40, alpha.max() + 40
        for _ in range(60):
            zeta = (low + high) / 2
            over = (torch.sigmoid(alpha - zeta) * sizes).sum() > budget
            low, high = torch.where(over, zeta, low), torch.where(over, high, zeta)
    p = torch.sigmoid(alpha - (low + high) / 2)
    return p * (p.sum().detach() / p.sum())


def through_the_step(direct, plus, minus, lr, eps):
    """grad_alpha L_val(w'), w' = w - lr dL_tra/dw, by a finite difference (DARTS, Liu et al. 2019, Eq. 7 and 8).

    direct: dL_val(w')/dalpha at a fixed w'.   plus, minus: dL_tra/dalpha at w +- eps d, d = dL_val(w')/dw'.
    """
    return direct - lr * (plus - minus) / (2 * eps)


# 5. Bayesian optimisation: AutoPEFT

def autopeft(bench, budget):
    """AutoPEFT (Zhou et al. 2024), S1 under one budget: a size of {0, 1, 4, 8} each for serial adapter, parallel
    adapter and prefix, shared by all layers, and a switch a layer; of 0.9 B .. B. Random evaluations, then
    batches of 4 by the expected improvement of a Gaussian process (propose), each training a tenth of the
    steps at INNER_RATES in the entangled space; the best 3 are trained in full at S1_RATES, and the best on validation
    wins. Where the paper walks to neighbours, all configurations are scored, of many layers of 1,500 random sets.
    """
    s = bench.settings
    steps = max(1, round(s.bo_share * s.steps))
    with Supernet(bench, "s1", lr=INNER_RATES[s.family], search=False) as net:
        configurations = Configurations(net)
        admitted = configurations.admitted(budget)
        fresh = net.weights()

        def evaluate(config):
            return short_training(net, *configurations.arrange(config), fresh, steps)
        cheap = optimise(evaluate, admitted, s, bench.seed)
        structures = [net.chosen(*configurations.arrange(config), budget)
                      for config in sorted(cheap, key=cheap.get, reverse=True)[:s.bo_full]]
    scored = []
    for structure in structures:
        peft, best, _ = bench.train(structure, S1_RATES[s.family])
        peft.detach()
        scored.append(best)
    return {"AutoPEFT": structures[scored.index(max(scored))]}


class Configurations:
    """AutoPEFT's space on a supernet of S1: tuples of a size a kind, 0 to 3 for {0, 1, 4, 8}, and a switch a layer."""

    few = 8             # up to so many layers all sets of them are looked at

    def __init__(self, net):
        self.net, self.kinds = net, bipeft.SPACES["s1"]
        self.layers = [re.search(r"layers?\.(\d+)\.", name)[1] for name in net.space.names]  # of each module
        self.ordered = sorted(set(self.layers), key=int)

    def arrange(self, config):
        """b and k* of a configuration."""
        size, on = dict(zip(self.kinds, config)), dict(zip(self.ordered, config[len(self.kinds):]))
        index = [size[kind] if on[layer] else 0 for kind, layer in zip(self.net.space.kinds, self.layers)]
        return [i > 0 for i in index], [max(0, i - 1) for i in index]

    def cost(self, config):
        return sum(q[k] for q, on, k in zip(self.net.sizes, *self.arrange(config)) if on)

    def admitted(self, budget):
        """Those of 0.9 B .. B or, if none comes to 0.9 B, of 0.9 to 1 times the largest."""
        layers, rng = len(self.ordered), random.Random(bipeft.derive(self.net.bench.seed, 29))
        if layers <= self.few:
            sets = list(itertools.product((0, 1), repeat=layers))
        else:
            counts = rng.choices(range(1, layers + 1), k=1500)
            sets = [[int(i < count) for i in rng.sample(range(layers), layers)] for count in counts]
        every = ((*sizes, *on) for sizes in itertools.product(range(4), repeat=len(self.kinds)) for on in sets)
        priced = {config: size for config in every if 0 < (size := self.cost(config)) <= budget}
        highest = max(priced.values())
        low = 0.9 * (budget if highest >= 0.9 * budget else highest)
        return [config for config, size in priced.items() if size >= low]


def short_training(net, kept, choice, fresh, steps):
    """The validation score after a short training from fresh weights, on the same batches each time."""
    batches, net.steps_done = bipeft.stream(net.batches[0]), 0
    net.put(fresh)
    net.optimizer.state.clear()
    gate, ranks = torch.tensor(kept, device=fresh.device).float(), net.one_hot(choice)
    for step in range(steps):
        net.begin()
        net.descend(net.gradient(gate, ranks, next(batches)), 1 - step / steps)
    net.space.enter(gate, ranks)
    return net.bench.score("validation")


def optimise(evaluate, admitted, settings, seed):
    """Bayesian optimisation: {configuration: score} of random ones, and of batches of 4 by expected improvement."""
    s, rng, scores = settings, random.Random(bipeft.derive(seed, 27)), {}
    for config in rng.sample(admitted, min(s.bo_random, len(admitted))):
        scores[config] = evaluate(config)
    wanted = min(s.bo_random + s.bo_guided, len(admitted))
    while len(scores) < wanted:
        left = [c for c in admitted if c not in scores]
        torch.manual_seed(bipeft.derive(seed, 28, len(scores)))
        for config in propose(list(scores), list(scores.values()), left, min(4, wanted - len(scores))):
            scores[config] = evaluate(config)
    return scores


def propose(tried, scores, candidates, count):
    """`count` of the candidates, tuples of integers, by expected improvement.   scores: of tried, higher is better.

    Zhou et al. fit a fully Bayesian SAAS Gaussian process by NUTS; here its hyper-parameters are those of the maximum
    a posteriori under the same sparse prior. Scores go through a Gaussian copula: their ranks' normal quantiles.
    """
    from botorch.acquisition.logei import qLogExpectedImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models.map_saas import AdditiveMapSaasSingleTaskGP
    from botorch.optim import optimize_acqf_discrete
    from gpytorch.mlls import ExactMarginalLogLikelihood
    x, new, scores = (torch.tensor(values).double() for values in (tried, candidates, scores))
    largest = torch.cat([x, new]).amax(0).clamp(min=1)
    below, equal = (scores[:, None] > scores).sum(1), (scores[:, None] == scores).sum(1)
    y = torch.special.ndtri((below.double() + equal / 2) / len(scores))
    model = AdditiveMapSaasSingleTaskGP(x / largest, y[:, None])
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    acquisition = qLogExpectedImprovement(model, best_f=y.max())
    found, _ = optimize_acqf_discrete(acquisition, q=count, choices=new / largest, unique=True)
    return [candidates[int((new / largest - row).abs().sum(1).argmin())] for row in found]


# 6. BIPEFT's ablations and variants

# The ablations of Table 2, first order, T steps in all, the temperature from 5 to 1 in every stage, two steps
# of architecture weights to one of Delta W. Each is cut to the budget: modules by P(keep) descending at the
# chosen rank, first-fit; the size without a cut is told.


def differential(bench, budget, name, stages):
    """Architecture weights by gradient descent alone, in stages of "theta", "phi" or "entangled".

    theta: removal, ranks at their largest or as fixed; an earlier phi's argmax is fixed.   phi: ranks, all gates open
    or, after theta, those of its argmax.   entangled: Psi, [N, 1 + K], over remove and the ranks, one Gumbel vector a
    module: the gate is 1 - psi_0, the rank that of the rest under the same noise, as psi_k / (1 - psi_0).
    """
    T = bench.settings.search_steps
    with Supernet(bench, "s2") as net:
        generator = torch.Generator().manual_seed(bipeft.derive(bench.seed, 31))
        relaxed = Relaxed(net, generator)
        for number, stage in enumerate(stages):
            steps = T // len(stages)
            wanted, weights = relaxed.learnt(stage)
            optimizer = torch.optim.Adam([weights], lr=0.01, betas=(0.5, 0.999), weight_decay=1e-4)
            for step in range(steps):
                net.begin()
                temperature = 5 - 4 * step / max(1, steps - 1)
                noise = bipeft.gumbel_noise(relaxed.psi.shape, generator).to(weights.device)
                drawn = relaxed.sample(stage, noise, temperature)
                gradient = net.gradient(drawn["gate"].detach(), drawn["ranks"].detach(), next(net.train))
                net.descend(gradient, 1 - (number * steps + step) / T)
                for _ in range(2):
                    drawn = relaxed.sample(stage, noise, temperature)
                    # A pass ends at copies: one backward pass leads from them on, where two are of one psi.
                    ends = {key: t.detach().requires_grad_(key in wanted) for key, t in drawn.items()}
                    learnt = [ends[key] for key in wanted]
                    net.run_pass(net.model, net.space, ends["gate"], ends["ranks"], next(net.val), learnt)
                    (weights.grad,) = torch.autograd.grad(
                        [drawn[key] for key in wanted], weights, [end.grad for end in learnt])
                    optimizer.step()
            relaxed.fix(stage)
        among = relaxed.kept if stages == ("theta", "phi") else None
        return {name: cut(net, relaxed.keep(stages), relaxed.choice, budget, relaxed.kept, among)}


class Relaxed:
    """Theta, [N, 2], Phi, [N, K], and Psi, [N, 1 + K], sampled by Gumbel-softmax; what stages fixed: b and k*."""

    def __init__(self, net, generator):
        self.net, self.ranked, device = net, net.space.ranked, net.bench.device
        n, k = len(net.space), len(net.space.ranks)
        self.psi, self.theta, self.phi = (
            (1e-3 * torch.randn(n, classes, generator=generator)).to(device).requires_grad_()
            for classes in (1 + k, 2, k))
        self.kept, self.choice = torch.ones(n, device=device), torch.full((n,), k - 1, device=device)
        self.no_rank = torch.tensor([0.0, 0.0, *[-1e9] * (k - 1)], device=device)       # psi of a bias: two classes

    def learnt(self, stage):
        """What a stage's gradient is of, and its weights."""
        return {"theta": (("gate",), self.theta), "phi": (("ranks",), self.phi),
                "entangled": (("gate", "ranks"), self.psi)}[stage]

    def logits_of_psi(self):
        return torch.where(self.ranked[:, None], self.psi, self.psi + self.no_rank)

    def sample(self, stage, noise, temperature):
        """The gate and the ranks under a noise, [N, 1 + K]; hard, with the gradient of the soft ones."""
        gate, ranks = self.kept, self.net.one_hot(self.choice)
        if stage == "theta":
            gate = bipeft.gumbel_softmax(self.theta, noise[:, :2], temperature)[:, 1] * self.kept
        elif stage == "phi":
            ranks = bipeft.gumbel_softmax(self.phi, noise[:, 1:], temperature)
        else:
            logits = self.logits_of_psi()
            soft = ((logits + noise) / temperature).softmax(1)
            hard = (soft.argmax(1) > 0).float()
            gate = hard + (1 - soft[:, 0]) - (1 - soft[:, 0]).detach()
            ranks = bipeft.gumbel_softmax(logits[:, 1:], noise[:, 1:], temperature)
        return {"gate": gate, "ranks": ranks}

    def fix(self, stage):
        """A stage's result is the argmax of its weights."""
        if stage == "theta":
            self.kept = (self.theta.detach().argmax(1) == 1).float()
        elif stage == "phi":
            self.choice = torch.where(self.ranked, self.phi.detach().argmax(1), self.choice)
        else:
            psi = self.logits_of_psi().detach()
            self.kept, self.choice = (psi.argmax(1) > 0).float(), psi[:, 1:].argmax(1)

    def keep(self, stages):
        """P(keep), [N], after all stages."""
        if stages == ("entangled",):
            return 1 - self.logits_of_psi().detach().softmax(1)[:, 0]
        return self.theta.detach().softmax(1)[:, 1]


def cut(net, keep, choice, budget, kept, among=None):
    """(Structure within the budget, what its plain argmax had).   among: [N], what may be taken, if not all."""
    choice, keep = choice.tolist(), keep.tolist()
    costs = [q[k] for q, k in zip(net.sizes, choice)]
    order = [n for n in sorted(range(len(keep)), key=lambda n: -keep[n]) if among is None or among[n] > 0]
    return (net.chosen(first_fit(order, costs, budget), choice, budget),
            {"uncut": sum(c for c, b in zip(costs, kept.tolist()) if b)})


def without_selection(bench, budget):
    """Algorithm 1 without Eq. 5-10, argmax of Theta and Phi at T; of the same run s-bar alone at T, filled up to B."""
    s = bench.settings
    with Supernet(bench, "s2") as net:
        settings = bipeft.Settings(budget=budget, lr=s.search_lr, seed=bench.seed)
        run = Unselected(bench.model, net.space, settings, s.search_steps, s.search_steps, net.run_pass)
        run.run(*net.batches)
        theta, phi, n = run.theta.detach(), run.phi.detach(), len(net.space)
        choice = torch.where(net.space.ranked, phi.argmax(1), len(net.space.ranks) - 1)
        kept, ranks = bipeft.fill_budget(run.smoothed.tolist(), net.sizes, [False] * n, [0] * n, budget)
        return {"without selection": cut(net, theta.softmax(1)[:, 1], choice, budget, theta.argmax(1)),
                "s-bar at T": net.chosen(kept, ranks, budget)}


class Unselected(bipeft.Search):
    """A search that ends without a selection."""

    def finish(self, backbone=""):
        return None


class SummedSensitivity(bipeft.Search):
    """Eq. 2 as a sum over the module's parameters, not their mean."""

    def magnitude(self, gradients):
        return super().magnitude(gradients) * self.space.param_counts.gather(1, self.choice[:, None]).squeeze(1)


class OpenSensitivity(bipeft.Search):
    """s from passes with all kept gates open, one more each on D_tra and D_val; all else learns as ever."""

    def __init__(self, model, space, settings, steps, warmup, run_pass):
        super().__init__(model, space, settings, steps, warmup, self.noted_pass)
        self.plain = run_pass

    def noted_pass(self, model, space, gate, ranks, batch, inputs):
        self.latest = ranks.detach(), batch
        return self.plain(model, space, gate, ranks, batch, inputs)

    def gradients(self):
        sampled, (ranks, batch) = bipeft.flatten([p.grad for p in self.weights]), self.latest
        self.plain(self.model, self.space, self.kept.float(), ranks, batch, self.weights)
        found = super().gradients()
        bipeft.give_gradients(self.weights, sampled)             # Delta W descends on these
        return found


class OtherTemperature(bipeft.Search):
    """A temperature that falls from 5 to 0.1."""

    def temperature(self):
        return 5 - 4.9 * self.steps_done / max(1, self.steps - 1)


# 7. All of them, by name

# Ladders of learning rates: the second to the fourth are tried, and more as long as the best is at an edge.
RATES = (4e-4, 1e-3, 2.5e-3, 6e-3, 1.5e-2, 4e-2)                                     # of modules
LLAMA_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)                                   # of modules on a Llama
FULL_RATES, HEAD_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), (1e-3, 2.5e-3, 1e-2, 4e-2, 0.15)


@dataclasses.dataclass(frozen=True)
class Method:
    """finder: the function that gives its structure, and perhaps others' (their jobs are shared).   cheap: no
    search.   free: not under the budget.   rate_of, like: whose learning rate, whose structure it takes; None: its
    own.   clip: cap on the gradient's norm in re-training; None: none.   lr_warmup: of re-training, as bipeft.train's.
    """

    finder: str
    cheap: bool = False
    free: bool = False
    rates: tuple = RATES
    rate_of: str = None
    whole: bool = False                        # trains the backbone
    like: str = None
    clip: float = None
    lr_warmup: float = 0.0


FINDERS = {
    # Linear probing, full fine-tuning, and what BIPEFT picks from.
    "head": lambda bench, budget: {"head alone": bench.structure([], budget)},
    "full": lambda bench, budget: {"full": bench.structure([], budget)},
    "whole": lambda bench, budget: {"all of S2": everywhere(bench, is_kind(*bipeft.SPACES["s2"]), 8, budget)},
    # LoRA within the budget, and as it is mostly used; adapters by Houlsby et al. 2019, at Pfeiffer's places.
    "lora": lora, "lora-8": lambda bench, budget: {"LoRA, r = 8": everywhere(bench, is_query_or_value, 8, budget)},
    "serial": lambda bench, budget: {"serial adapter": spread(bench, budget, is_kind("serial"))},
    # Ben Zaken et al. 2022, y + b, within the budget and everywhere; a kind of S2, S3Delta's space.
    "bitfit": lambda bench, budget: {"BitFit": spread(bench, budget, is_kind("bitfit"))},
    "all-biases": lambda bench, budget: {"all biases": everywhere(bench, is_kind("bitfit"), 1, budget)},
    "lnfit": lambda bench, budget: {"LNFit": spread(bench, budget, is_kind("lnfit"))},
    "even-norms": even_norms, "chance": chance, "bipeft": bipeft_search, "s3delta": s3delta, "prunepeft": prunepeft,
    "autopeft": autopeft, "best-random": best_of_chance, "without": without_selection,
    "s3delta-hard": lambda bench, budget: s3delta(bench, budget, hard=True),
    "s3delta-lr": lambda bench, budget: s3delta(bench, budget, name="S3Delta-M, lr 3e-3", lr=3e-3),
    "s3delta-16": lambda bench, budget: s3delta(bench, budget, name="S3Delta-M, scale 16"),
    "prunepeft-4": lambda bench, budget: prunepeft(bench, budget, rounds=4),
    "bipeft-s1": lambda bench, budget: bipeft_search(bench, budget, "s1", name="BIPEFT, S1"),
    "bipeft-all": lambda bench, budget: bipeft_search(bench, budget, "all", name="BIPEFT, all"),
    "bipeft-clipped": lambda bench, budget: bipeft_search(bench, budget, name="BIPEFT, clipped", clip=1.0),
    "entangled": lambda bench, budget: differential(bench, budget, "entangled", ("entangled",)),
    "b-d": lambda bench, budget: differential(bench, budget, "b → d", ("theta", "phi")),
    "d-b": lambda bench, budget: differential(bench, budget, "d → b", ("phi", "theta")),
}
CORE = {"BIPEFT": Method("bipeft"), "one look": Method("bipeft"), "random": Method("chance", cheap=True),
        "matched random": Method("bipeft"), "LoRA": Method("lora", cheap=True),
        "all of S2": Method("whole", cheap=True, free=True), "head alone": Method("head", True, True, HEAD_RATES),
        "full": Method("full", True, True, FULL_RATES, whole=True)}
MORE = {"S3Delta-M": Method("s3delta"), "PrunePEFT": Method("prunepeft"), "BitFit": Method("bitfit", cheap=True),
        "LNFit": Method("lnfit", cheap=True), "biases on even norms": Method("even-norms", cheap=True),
        "LoRA, r = 8": Method("lora-8", cheap=True, free=True),
        "all biases": Method("all-biases", cheap=True, free=True), "serial adapter": Method("serial", cheap=True),
        "BIPEFT, S1": Method("bipeft-s1"), "BIPEFT, all": Method("bipeft-all"),
        "BIPEFT, clipped": Method("bipeft-clipped", rate_of="BIPEFT"),
        "one look, clipped": Method("bipeft-clipped", rate_of="one look"),
        "matched random, clipped": Method("bipeft-clipped", rate_of="matched random"),
        "S3Delta-M, hard": Method("s3delta-hard"), "S3Delta-M, lr 3e-3": Method("s3delta-lr"),
        "S3Delta-M, scale 16": Method("s3delta-16"), "PrunePEFT, 4 rounds": Method("prunepeft-4"),
        "AdaLoRA": Method("adalora", cheap=True), "random, best of 3": Method("best-random"),
        "AutoPEFT": Method("autopeft")}
LLAMA_CORE = ("BIPEFT", "LoRA", "biases on even norms", "matched random", "random", "one look", "BitFit",
              "LNFit", "LoRA, r = 8", "all biases")                                      # first on a Llama
ACROSS = ("BIPEFT", "one look", "random", "LoRA", "S3Delta-M, hard", "matched random", "serial adapter",
          "S3Delta-M, lr 3e-3")                                                            # of --table budgets
ABLATIONS = {name: Method(finder) for name, finder in {
    "entangled": "entangled", "b → d": "b-d", "d → b": "d-b", "without selection": "without",
    "s-bar at T": "without"}.items()}
VARIANTS = {           # Tables 6-10, and readings that are ours; in each one thing differs from BIPEFT
    **{f"Z = {z}": {"triggers": z} for z in (10, 50, 200)},
    **{f"gamma = {g:g}": {"gamma": g} for g in (0.5, 0.75, 1.0)},
    **{f"H = {h}": {"window": h} for h in (3, 10, 20)}, **{f"tau = {t:g}": {"tau": t} for t in (0.1, 0.5, 0.95)},
    **{f"warm-up {share:.0%}": {"warmup_share": share} for share in (0.0, 0.17, 0.75)},
    **{f"search lr {lr:g}": {"lr": lr} for lr in (3e-4, 3e-3, 6e-3)},
    "Eq. 2 as a sum": {"cls": SummedSensitivity}, "temperature to 0.1": {"cls": OtherTemperature},
    "gates open for s": {"cls": OpenSensitivity}, "LoRA scale 16": {}, "rising search lr": {"lr_warmup": 0.1}}
SENSITIVITY = {name: Method(f"variant:{name}", rate_of=None if "scale" in name else "BIPEFT") for name in VARIANTS}
SCALES = {"variant:LoRA scale 16": 16.0, "s3delta-16": 16.0}              # of LoRA, 1 elsewhere
PLAIN, RETRAINING = {}, {}                              # the same structures and rates, re-trained in other ways
for way, how in {"training clipped": {"clip": 1.0}, "rising rate": {"lr_warmup": 0.1}}.items():
    for name in ("BIPEFT", "BIPEFT, clipped", "LoRA", "all biases", "all of S2"):
        method = {**CORE, **MORE}[name]
        PLAIN[f"{name}, {way}"] = name
        RETRAINING[f"{name}, {way}"] = dataclasses.replace(method, like=name, rate_of=method.rate_of or name, **how)
METHODS = {**CORE, **MORE, **ABLATIONS, **SENSITIVITY, **RETRAINING}


def ladder(name, family):
    """The learning rates that a method may be trained at."""
    rates = METHODS[name].rates
    return LLAMA_RATES if family == "llama" and rates is RATES else rates


def find(bench, finder, budget):
    """{method: (structure, what else to tell)} of a finder."""
    if finder.startswith("variant:"):
        name = finder.partition(":")[2]
        found = bipeft_search(bench, budget, name=name, **VARIANTS[name])
    else:
        found = FINDERS[finder](bench, budget)
    return {name: value if isinstance(value, tuple) else (value, {}) for name, value in found.items()}


@contextlib.contextmanager
def scaled_lora(scale):
    """LoRA as y + scale · B A x, in search and re-training."""
    plain = bipeft.LoRA.forward
    if scale is not None:
        bipeft.LoRA.forward = lambda module, x, y: y + scale * (plain(module, x, y) - y)
    try:
        yield
    finally:
        bipeft.LoRA.forward = plain
