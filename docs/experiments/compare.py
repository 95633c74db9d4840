"""BIPEFT and its rivals side by side: one encoder, one budget, one re-training, many ways of choosing.

    python docs/experiments/compare.py --small                                        all of it, tiny, on a CPU
    python docs/experiments/compare.py --prepare --model DIR --data-dir DIR           once: runs/compare, 48 MB
    python docs/experiments/compare.py --table main --workers 14 --minutes 9          the comparison, on a GPU
    python docs/experiments/compare.py --table seeds ablations budgets transfer sensitivity      the other tables
    python docs/experiments/compare.py --table cost --workers 1                       Table 3: nothing beside it
    python docs/experiments/report.py                                                 tables and figures

Needs the project's packages; AdaLoRA also peft, AutoPEFT botorch (or bayes.py's own surrogate). A line of
JSON a search and a training goes to --out; what has a line is not run again.

The rules. Every method gives a structure of at most B parameters, counted from tensors. Each is re-trained
from fresh weights for the same steps, batches, optimiser (AdamW, linear decay) and seed: the seed decides
splits, order, head and weights. The re-training rate is a method's own: of a ladder the one with the best mean
validation score over tasks on --tune-seeds, which are never reported and whose test sets are not read; at
another budget it is chosen anew, on the first of them or, at --tune-budgets, on all. The epoch is the best on validation, the
test is read once. The head is outside of B, and learns at the method's rate. Searches see two halves of the
training set, and learn Delta W at one rate, --search-lr; AutoPEFT and the best of three train on all of it, at
INNER_RATE. B is of parameters: what a search costs is told, not equal. FTE: passes of a search (forward and
backward) over those of one re-training; a search's validations are not counted.
"""

import argparse
import copy
import dataclasses
import gc
import importlib.util
import itertools
import json
import math
import multiprocessing.connection
import random
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import bipeft

HERE = Path(__file__).resolve().parent
INNER_RATE = 6e-3                   # of full trainings within a search: random structures' best in an earlier run
# Ladders of learning rates: the second to the fourth are tried, and more as long as the best is at an edge.
RATES = (4e-4, 1e-3, 2.5e-3, 6e-3, 1.5e-2, 4e-2)                                     # of modules
FULL_RATES, HEAD_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), (1e-3, 2.5e-3, 1e-2, 4e-2, 0.15)


@dataclass
class Settings:
    """What is the same for every method."""

    folder: str = "runs/compare"     # what --prepare made
    family: str = "bert"             # an encoder with a head, or "t5", which answers with a token
    train_rows: int = 8000           # of sst2
    steps: int = 600                 # of re-training
    evaluations: int = 6             # on validation, evenly spaced
    search_steps: int = 600          # T
    warmup: int = 300                # of BIPEFT, and of one look
    search_lr: float = 1e-3          # of Delta W in every search
    batch_size: int = 32
    max_length: int = 128
    device: str = "auto"
    dtype: str = "float32"           # matrix products in TF32 on a GPU
    bo_random: int = 20              # AutoPEFT: random evaluations,
    bo_guided: int = 40              # guided ones,
    bo_share: float = 0.1            # the share of the steps that each trains,
    bo_full: int = 3                 # and how many are then trained in full
    surrogate: str = "auto"          # botorch where installed, or "own"
    workers: int = 0                 # processes on the device, 0: this one
    small: bool = False              # a tiny random encoder and synthetic rows


# ==================================================================================================
# 1. The encoder, the tasks, a training
# ==================================================================================================


class Classifier(nn.Module):
    """An encoder, the mean of its outputs, a linear head. Asks the device for no value: CUDA graphs."""

    def __init__(self, encoder, labels):
        super().__init__()
        self.encoder, self.classifier = encoder, nn.Linear(encoder.config.hidden_size, labels)

    head = ("classifier",)           # learns beside the modules, outside of the budget

    def fresh_head(self, seed):
        """The head's initial weights, of the seed alone."""
        generator = torch.Generator().manual_seed(bipeft.derive(seed, 20))
        weight = torch.empty(self.classifier.weight.shape).normal_(0, 0.02, generator=generator)
        with torch.no_grad():
            self.classifier.weight.copy_(weight)
            self.classifier.bias.zero_()

    def forward(self, input_ids, attention_mask, labels=None):
        """labels: [batch, 1 or more], the first is the class, -100 for a row that only fills a batch."""
        shut = (1 - attention_mask[:, None, None, :]).to(self.classifier.weight.dtype)
        mask = (shut * torch.finfo(shut.dtype).min).expand(-1, 1, input_ids.shape[1], -1)
        hidden = self.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        weight = attention_mask[..., None].to(hidden.dtype)
        logits = self.classifier((hidden * weight).sum(1) / weight.sum(1)).float()
        loss = None if labels is None else F.cross_entropy(logits, labels[:, 0], ignore_index=-100)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class Reader(nn.Module):
    """A T5 that answers with one token, of those that the labels' digits begin with. No head."""

    head = ()

    def __init__(self, t5, answers):
        super().__init__()
        self.encoder, self.start = t5, t5.config.decoder_start_token_id
        self.register_buffer("answers", torch.tensor(answers), persistent=False)

    def fresh_head(self, seed):
        pass

    def forward(self, input_ids, attention_mask, labels=None):
        """As Classifier's; the loss is over the label's tokens alone, not over the vocabulary."""
        begun = torch.full_like(input_ids[:, :1], self.start)
        logits = self.encoder(input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=begun).logits
        logits = logits[:, 0, :].index_select(1, self.answers).float()
        loss = None if labels is None else F.cross_entropy(logits, labels[:, 0], ignore_index=-100)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def prepare(model, data_dir, settings):
    """Tokens of the tasks, and the backbone in half precision: all that another machine needs."""
    import pandas
    from transformers import AutoModel, AutoTokenizer, T5ForConditionalGeneration
    folder, arrays, t5 = Path(settings.folder), {}, settings.family == "t5"
    tokenizer = AutoTokenizer.from_pretrained(model)
    for task, files in {"qnli": ("validation",), "mnli": ("validation_matched",), "sst2": ("train", "validation"),
                        "rte": ("train", "validation"), "cola": ("train", "validation")}.items():
        for number, name in enumerate(files):
            rows = pandas.read_parquet(Path(data_dir) / task / f"{name}.parquet")
            if task == "sst2" and number == 0:                      # 8,000 are trained on, 500 validate
                rows = rows.sample(settings.train_rows + 4000, random_state=0)
            texts = [rows[field].tolist() for field in bipeft.TASKS[task].fields]
            if t5:
                texts = [[bipeft.to_examples(task, row, False)[0].source for row in rows.to_dict("records")]]
            ids = tokenizer(*texts, truncation=True, max_length=128).input_ids
            arrays |= {f"{task}.{number}.ids": np.concatenate([np.array(row, np.uint16) for row in ids]),
                       f"{task}.{number}.lengths": np.array([len(row) for row in ids], np.uint8),
                       f"{task}.{number}.labels": rows["label"].to_numpy(np.int8)}
    folder.mkdir(parents=True, exist_ok=True)
    if t5:
        arrays["answers"] = np.array([tokenizer(digit).input_ids[0] for digit in "012"])
    np.savez_compressed(folder / "tasks.npz", **arrays)
    backbone = T5ForConditionalGeneration.from_pretrained(model, dtype=torch.float16) if t5 else (
        AutoModel.from_pretrained(model, add_pooling_layer=False, dtype=torch.float16))
    backbone.save_pretrained(folder / "model")
    for file in sorted(folder.rglob("*.*")):
        print(f"{file}  {file.stat().st_size / 2**20:.1f} MiB")


def pools_of(task, settings):
    """The rows of a task's files, [(ids, [label])] each."""
    if task == "toy":                                       # is there a word below 20 among the first ten?
        rng = np.random.default_rng(0)
        rows = [(rng.integers(20, 100, rng.integers(8, 20)).tolist(), i % 2) for i in range(400)]
        return [[([1, *(ids if not y else [5 + i % 10, *ids[1:]])], [y]) for i, (ids, y) in enumerate(rows)]]
    stored, pools = np.load(Path(settings.folder) / "tasks.npz"), []
    for number in itertools.count():
        if f"{task}.{number}.ids" not in stored:
            return pools
        ids, lengths, labels = (stored[f"{task}.{number}.{key}"].tolist() for key in ("ids", "lengths", "labels"))
        ends = list(itertools.accumulate(lengths))
        pools.append([(ids[end - n:end][:settings.max_length], [y]) for end, n, y in zip(ends, lengths, labels)])


def splits_of(task, settings, seed):
    """Train, validation and test rows. Without a test file of its own a task's rows are cut by the seed."""
    pool, *other = pools_of(task, settings)
    order = list(range(len(pool)))
    random.Random(bipeft.derive(seed, 21)).shuffle(order)
    rows = [pool[i] for i in order]
    if task == "sst2":                                      # the validation file is the test
        return {"validation": rows[:500], "test": other[0], "train": rows[500:500 + settings.train_rows]}
    if other:                                               # rte, cola: it is halved
        half = list(other[0])
        random.Random(bipeft.derive(seed, 22)).shuffle(half)
        return {"train": rows, "validation": half[:len(half) // 2], "test": half[len(half) // 2:]}
    few = min(500, len(rows) // 5)
    return {"validation": rows[:few], "test": rows[few:few + 3 * few], "train": rows[few + 3 * few:]} if len(
        rows) > 2000 else {"validation": rows[:few], "test": rows[few:2 * few], "train": rows[2 * few:]}


class Stretch:
    """Endless batches cut into stretches of as many steps as lie between two evaluations."""

    def __init__(self, batches, steps):
        self.source, self.steps = bipeft.stream(batches), steps

    def __len__(self):
        return self.steps

    def __iter__(self):
        return itertools.islice(self.source, self.steps)


class Bench:
    """An encoder on a device, and what is cached beside it: models by number of labels, tokens by task and seed."""

    def __init__(self, settings):
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("high")
        self.settings, self.device = settings, bipeft.choose_device(settings.device)
        self.graphs = self.device.type == "cuda"
        self.encoder = self.load().to(self.device).eval()
        self.models, self.cache, self.costs = {}, {}, {}
        self.where = self.find_places()
        self.keys = list(self.where)

    def find_places(self):
        """{(name, kind): the backbone's module there}"""
        return {(name, kind): place for name, role, place, *_ in bipeft.places_of(self.around(2))
                for kind in bipeft.KINDS if role in bipeft.KINDS[kind].roles}

    def around(self, labels):
        """The backbone as a classifier."""
        if self.settings.family == "bert":
            return Classifier(self.encoder, labels)
        answers = [3, 4, 5]
        if not self.settings.small:
            answers = np.load(Path(self.settings.folder) / "tasks.npz")["answers"].tolist()
        return Reader(self.encoder, answers[:labels])

    def load(self):
        """The backbone, of --prepare's folder or, small, random."""
        from transformers import AutoModel, BertConfig, BertModel, T5Config, T5ForConditionalGeneration, utils
        utils.logging.disable_progress_bar()
        path, dtype = Path(self.settings.folder) / "model", getattr(torch, self.settings.dtype)
        if self.settings.family == "t5":
            torch.manual_seed(0)
            return T5ForConditionalGeneration(T5Config(
                vocab_size=100, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0,
            )) if self.settings.small else T5ForConditionalGeneration.from_pretrained(path, dtype=dtype)
        if not self.settings.small:
            return AutoModel.from_pretrained(path, add_pooling_layer=False, dtype=dtype)
        torch.manual_seed(0)
        return BertModel(BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                    intermediate_size=64, max_position_embeddings=32), add_pooling_layer=False)

    def open(self, task, seed):
        """Makes a task at a seed the present one."""
        self.task, self.seed, self.passes = task, seed, 0
        if (task, seed) not in self.cache:
            while len(self.cache) > 8:
                self.cache.pop(next(iter(self.cache)))
            splits = splits_of(task, self.settings, seed)
            self.cache[task, seed] = splits, {}
        self.splits, self.judged = self.cache[task, seed]
        labels = 1 + max(y for _, (y,) in self.splits["train"])
        if labels not in self.models:
            self.models[labels] = self.around(labels).to(self.device, getattr(torch, self.settings.dtype))
        self.model = self.models[labels]
        self.model.fresh_head(seed)

    def batches(self, rows, seed=None):
        return bipeft.Batches(rows, self.settings.batch_size, self.device, self.seed if seed is None else seed)

    @torch.no_grad()
    def score(self, split, model=None):
        """The task's metric, in per cent."""
        model = model or self.model
        if split not in self.judged:
            rows = sorted(self.splits[split], key=lambda row: len(row[0]))
            self.judged[split] = [bipeft.collate(rows[i:i + 256], self.device) for i in range(0, len(rows), 256)]
        was_training = model.training
        model.eval()
        said, gold = [], []
        for batch in self.judged[split]:
            said.append(model(batch["input_ids"], batch["attention_mask"]).logits.argmax(1))
            gold.append(batch["labels"][:, 0])
        model.train(was_training)
        said, gold = (list(map(str, torch.cat(part).tolist())) for part in (said, gold))
        metric = bipeft.TASKS[self.task].metric if self.task != "toy" else "accuracy"
        return bipeft.METRICS[metric](said, [(y,) for y in gold])

    def structure(self, chosen, budget, space="s2", also=None):
        """A Structure of (place, kind, rank) each, its parameters counted from tensors without numbers."""
        modules = []
        for name, kind, rank in chosen:
            modules.append({"name": name, "kind": kind, "rank": rank if bipeft.KINDS[kind].ranked else None,
                            "parameters": self.cost((name, kind), rank or 1)})
        also = self.model.head if also is None else also
        return bipeft.Structure("", bipeft.geometry(self.model, also), space, [], budget, modules)

    def cost(self, key, rank):
        """Parameters of a module, (place, kind), at a rank."""
        if (key, rank) not in self.costs:
            with torch.device("meta"):
                self.costs[key, rank] = sum(p.numel() for p in bipeft.KINDS[key[1]](self.where[key], rank).parameters())
        return self.costs[key, rank]

    def encode(self, structure):
        """A structure as text: "place:rank" each, places by their number in `keys`."""
        number = {key: i for i, key in enumerate(self.keys)}
        return " ".join(f"{number[m['name'], m['kind']]}:{m['rank'] or 1}" for m in structure.modules)

    def decode(self, text, budget):
        """What `encode` wrote."""
        chosen = [(*self.keys[int(i)], int(rank)) for i, rank in (item.split(":") for item in text.split())]
        return self.structure(chosen, budget)

    def train(self, structure, lr, whole=False):
        """Re-trains; returns (peft, best validation score, curve). The model stays as after its best epoch, attached.

        whole: with every weight of the backbone.
        """
        also = (*["encoder"] * whole, *self.model.head)
        structure.geometry = bipeft.geometry(self.model, also)
        peft = bipeft.apply(self.model, structure, self.seed, also_train=also)
        evaluations = self.settings.evaluations
        stretch = Stretch(self.batches(self.splits["train"]), max(1, round(self.settings.steps / evaluations)))
        curve = []
        best = bipeft.train(self.model, peft, stretch, lambda: self.score("validation"), evaluations, lr,
                            seed=self.seed, graphs=self.graphs, after_step=lambda _, line: curve.append(line.get("score")))
        self.passes += evaluations * len(stretch)
        return peft, best, [round(score, 2) for score in curve if score is not None]


class Supernet:
    """A space with all its modules attached, its passes counted, and Delta W's optimiser: what a search stands on."""

    def __init__(self, bench, kinds, ranks=(1, 4, 8), lr=None, search=True, weight_decay=1e-4):
        self.bench, self.lr = bench, lr or bench.settings.search_lr
        self.space = bipeft.Space(bench.model, kinds, ranks, bench.seed, also_train=bench.model.head)
        fast = bipeft.fast_pass(bench.model, self.space, bench.graphs)
        self.weight_decay, rows = weight_decay, bench.splits["train"]
        halves = (rows[::2], rows[1::2]) if search else (rows, rows)
        self.batches = [bench.batches(part) for part in halves]
        self.train, self.val = map(bipeft.stream, self.batches)
        self.sizes, self.steps_done = self.space.sizes.tolist(), 0

        def run(wanted, gate, ranks, batch):
            bench.passes += 1
            return fast(wanted, gate, ranks, batch)
        self.run = run
        self.optimizer = torch.optim.AdamW([self.space.weights], lr=self.lr, weight_decay=weight_decay, fused=True)

    def __enter__(self):
        bench = self.bench
        bench.model.train()
        return self

    def __exit__(self, *_):
        self.space.leave()
        self.space.detach()
        self.bench.model.eval()

    def begin(self, again=False):
        """Dropout of a step follows the seed and the step.   again: that of the present step once more."""
        self.steps_done += not again
        torch.manual_seed(bipeft.derive(self.bench.seed, 23, self.steps_done - 1))

    def descend(self, gradient, left, clip=None):
        """A step of Delta W.   left: the share of the steps still to go, which the rate falls with."""
        if clip is not None:
            gradient = gradient * (clip / gradient.norm().clamp(min=clip))
        self.optimizer.param_groups[0]["lr"] = self.lr * left
        self.space.weights.grad = gradient
        self.optimizer.step()

    def one_hot(self, choice):
        """[N, K] of indices of ranks."""
        index = torch.as_tensor(choice, device=self.space.weights.device)
        return F.one_hot(index, len(self.space.ranks)).float()

    def chosen(self, kept, choice, budget):
        """A Structure; raises if it is over the budget."""
        found = self.space.structure(kept, choice, budget)
        assert found.parameters <= budget, f"{found.parameters} parameters, budget {budget}"
        return found


def first_fit(order, costs, budget):
    """Items in order, each taken if it still fits; what does not is passed over.   Returns [N] bools."""
    taken, free = [False] * len(costs), budget
    for n in order:
        if costs[n] <= free:
            taken[n], free = True, free - costs[n]
    return taken


# ==================================================================================================
# 2. The methods. Each takes a bench and a budget, and gives its structures by name.
# ==================================================================================================


def head_alone(bench, budget):
    """Linear probing: the head on the frozen encoder. No modules."""
    return {"head alone": bench.structure([], budget)}


def full(bench, budget):
    """Full fine-tuning: every weight of the encoder, and the head."""
    return {"full": bench.structure([], budget)}


def whole_space(bench, budget):
    """All of S2 at rank 8 (4.1): what the search picks from, outside of the budget."""
    return {"all of S2": everywhere(bench, lambda kind, name: kind in bipeft.SPACES["s2"], 8, budget)}


def everywhere(bench, wanted, rank, budget):
    chosen = [(name, kind, rank) for name, kind in bench.keys if wanted(kind, name)]
    return bench.structure(chosen, budget)


def spread(bench, budget, wanted):
    """The largest rank that fits at all of some places, and one more at evenly spaced ones; or, if not even
    rank 1 fits, rank 1 at as many evenly spaced places as do.
    """
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


def lora(bench, budget):
    """Hu et al. 2022:  y + B A x on q and v of every self-attention; the rank is what fits (`spread`)."""
    return {"LoRA": spread(bench, budget, lambda kind, name: kind == "lora" and name.split(".")[-1] in (
        "query", "value", "q", "v", "q_proj", "v_proj"))}


def serial(bench, budget):
    """Houlsby et al. 2019, after feed-forward blocks (Pfeiffer's places):  y + U gelu(D y + b) + c."""
    return {"serial adapter": spread(bench, budget, lambda kind, _: kind == "serial")}


def bitfit(bench, budget):
    """Ben Zaken et al. 2022:  y + b, at all of S2's places or, for the budget, at evenly spaced ones."""
    return {"BitFit": spread(bench, budget, lambda kind, _: kind == "bitfit")}


def lnfit(bench, budget):
    """A delta on layer norms' weights, at all of them or, for the budget, at evenly spaced ones."""
    return {"LNFit": spread(bench, budget, lambda kind, _: kind == "lnfit")}


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
    """The best of `count` random structures on validation, each trained in full: what a search of as many FTE has
    to beat.
    """
    scored = []
    for draw in range(1, count + 1):
        structure = chance(bench, budget, draw)["random"]
        peft, best, _ = bench.train(structure, INNER_RATE)
        peft.detach()
        scored.append((best, -draw, structure))
    return {"random, best of 3": max(scored, key=lambda found: found[:2])[2]}


def matched(bench, structure, budget):
    """BIPEFT's structure with each module moved to a random free place of the same kind and the same size: its
    kinds, ranks and parameters, so that only the places differ.
    """
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


def bipeft_search(bench, budget, kinds="s2", cls=bipeft.Search, name="BIPEFT", **settings):
    """Algorithm 1 (the paper), and of the same run, at no more cost: *one look*, s-bar (Eq. 4) when the warm-up
    ends, filled up to B in descending order at the largest rank that fits; and `matched`.
    """
    s = bench.settings
    settings = {"warmup": s.warmup, "lr": s.search_lr, "seed": bench.seed, **settings}
    looks, started = {}, time.perf_counter()

    def look(run, line):
        if line["step"] == settings["warmup"]:
            looks["s"], looks["passes"] = run.smoothed.tolist(), bench.passes
            looks["seconds"] = round(time.perf_counter() - started, 2)
        looks["steps"] = line["step"]
    with Supernet(bench, kinds) as net:
        run = cls(bench.model, net.space, budget, s.search_steps, run_pass=net.run, **settings)
        found = run.run(*net.batches, after_step=look)
        told = {"steps": looks["steps"], "made_up": run.ended_early}
        if name != "BIPEFT":
            return {name: (found, told)}
        n = len(net.space)
        kept, choice = bipeft.fill_budget(looks["s"], net.sizes, [False] * n, [0] * n, budget)
        return {name: (found, told), "one look": (net.chosen(kept, choice, budget), {
            "passes": looks["passes"], "seconds": looks["seconds"]}),
                "matched random": matched(bench, found, budget)}


def s3delta(bench, budget, hard=False, name="S3Delta-M", lr=None):
    """S3Delta-M (Hu et al. 2022b), S2 at rank 1:  p = sigmoid(alpha - zeta), sum p q = B;
    z = sigmoid(logit u + logit p), u ~ U(0, 1), times the module's output. Bilevel, second order:
    grad_alpha = dL_val(w')/dalpha - lr [dL_tra(w+)/dalpha - dL_tra(w-)/dalpha] / (2 eps), w+- = w +- eps d.

    Passes are as the re-training's on half of the data: half the steps. hard: gates 1[z >= 0.5], straight
    through, a shut gate without gradient, and first order (w' = w). The four losses of a step have one u and one
    dropout. lr: of w; its own was that of re-training.
    """
    steps, best = bench.settings.search_steps // 2, (-1, None)
    with Supernet(bench, "s2", (1,), lr, weight_decay=0.0) as net:
        n, device = len(net.space), net.space.weights.device
        sizes, ones = net.space.sizes[:, 0].double().cpu(), torch.ones(n, 1, device=device)
        alpha = torch.zeros(n, dtype=torch.float64, requires_grad=True)       # so few stay on the CPU
        optimizer = torch.optim.AdamW([alpha], lr=0.1, weight_decay=0.0)
        generator = torch.Generator().manual_seed(bipeft.derive(bench.seed, 26))

        def sample(u):
            p = shifted(alpha, sizes, budget)
            if u is None:
                return p.float()
            return torch.sigmoid(torch.logit(u) + torch.logit(p.clamp(1e-9, 1 - 1e-9))).float()

        def gate_of(z):
            return ((z >= 0.5).float() if hard else z).detach().to(device)

        def of_alpha(z, batch):
            """dL/dalpha, and dL/dw, at the present weights."""
            gate = gate_of(z)
            net.begin(again=True)
            _, of_gate, of_weights = net.run(("gate", "weights"), gate, ones, batch)
            of_gate = of_gate * gate if hard else of_gate
            return torch.autograd.grad(z, alpha, of_gate.cpu(), retain_graph=True)[0], of_weights

        def draw():
            return torch.rand(n, generator=generator).double().clamp(1e-6, 1 - 1e-6)
        weights = net.space.weights
        for step in range(steps):
            net.begin()
            left, z, tra, val = 1 - step / steps, sample(draw()), next(net.train), next(net.val)
            if hard:
                gradient, _ = of_alpha(z, val)
            else:
                _, of_weights = net.run(("weights",), gate_of(z), ones, tra)
                here, state = weights.clone(), copy.deepcopy(net.optimizer.state_dict())
                net.descend(of_weights, left)                                           # w', a virtual step
                gradient, d = of_alpha(z, val)
                eps = 0.01 / max(1e-12, float(d.norm()))
                sides = []
                for sign in (1, -1):
                    weights.copy_(here + sign * eps * d)
                    sides.append(of_alpha(z, tra)[0])
                weights.copy_(here)
                net.optimizer.load_state_dict(state)
                gradient = through_the_step(gradient, *sides, net.lr * left, eps)
            alpha.grad = gradient * (2 / gradient.norm().clamp(min=2))                  # clipped
            optimizer.param_groups[0]["lr"] = 0.1 * left
            optimizer.step()
            _, of_weights = net.run(("weights",), gate_of(sample(draw())), ones, tra)
            net.descend(of_weights, left, clip=2.0)
            if (step + 1) % max(1, steps // bench.settings.evaluations) == 0:           # with z = p
                net.space.enter(sample(None).detach().to(device), ones, for_gates=True)
                score = bench.score("validation")
                best = max(best, (score, alpha.detach().tolist()), key=lambda pair: pair[0])
        order = sorted(range(n), key=lambda i: -best[1][i])
        found = net.chosen(first_fit(order, net.space.sizes[:, 0].tolist(), budget), [0] * n, budget)
    return {"S3Delta-M, hard" if hard else name: found}


def through_the_step(direct, plus, minus, lr, eps):
    """grad_alpha L_val(w'), w' = w - lr dL_tra/dw, by a finite difference (DARTS, Liu et al. 2019, Eq. 7 and 8).

    direct: dL_val(w')/dalpha at a fixed w'.   plus, minus: dL_tra/dalpha at w +- eps d, d = dL_val(w')/dw'.
    """
    return direct - lr * (plus - minus) / (2 * eps)


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
                _, gradient = net.run(("weights",), gate, ranks, next(net.train))
                if step >= last - watched:
                    scores.index_add_(0, slices, (space.weights * gradient)[:space.size].abs())
                net.descend(gradient, 1 - step / steps)
            target = round(whole * (budget / whole) ** (number / rounds))
            depth = prune(scores.view(-1, 3).cpu(), added, depth, target)
        found = net.chosen((depth > 0).tolist(), (depth - 1).clamp(min=0).tolist(), budget)
    return {"PrunePEFT" if rounds == 1 else f"PrunePEFT, {rounds} rounds": found}


def slice_of_weights(space):
    """For each of the P weights of S2 modules 3·n + its slice: rank components 1, 2-4 and 5-8."""
    which = torch.tensor([0, 1, 1, 1, 2, 2, 2, 2])
    parts = []
    for n, module in enumerate(space.modules_):
        for key, p in module.named_parameters():
            of = torch.zeros(p.shape, dtype=torch.long)
            if space.kinds[n] in ("lora", "adapter_lr") and p.dim() == 2:
                of = (which[None, :] if key == "down_out" else which[:, None]).expand(p.shape)
            parts.append(3 * n + of.flatten())
    return torch.cat(parts).to(space.weights.device)


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


def autopeft(bench, budget):
    """AutoPEFT (Zhou et al. 2024), S1 under one budget: a size of {0, 1, 4, 8} each for serial adapter, parallel
    adapter and prefix, shared by all layers, and a switch a layer; of 0.9 B .. B. Random evaluations, then
    batches of 4 by the expected improvement of a Gaussian process (bayes.py), each training a tenth of the
    steps in the entangled space; the best 3 are trained in full, and the best on validation wins.

    So few layers have few configurations: every admissible one is scored, where the paper walks to neighbours.
    """
    import bayes
    s = bench.settings
    steps, lr = max(1, round(s.bo_share * s.steps)), INNER_RATE
    with Supernet(bench, "s1", lr=lr, search=False) as net:
        space = net.space
        layers = [name.split(".layer.")[1].split(".")[0] for name in space.names]
        kinds, ordered = bipeft.SPACES["s1"], sorted(set(layers), key=int)

        def arrange(config):
            """b and k* of a configuration: three sizes as indices, and switches."""
            size, on = dict(zip(kinds, config)), dict(zip(ordered, config[len(kinds):]))
            index = [size[kind] if on[layer] else 0 for kind, layer in zip(space.kinds, layers)]
            return [i > 0 for i in index], [max(0, i - 1) for i in index]

        def cost(config):
            return sum(q[k] for q, on, k in zip(net.sizes, *arrange(config)) if on)
        every = itertools.product(*[range(4)] * len(kinds), *[(0, 1)] * len(ordered)) if len(ordered) <= 8 else (
            random_configurations(bench.seed, len(kinds), len(ordered)))
        priced = {c: size for c in every if 0 < (size := cost(c)) <= budget}
        low = 0.9 * (budget if max(priced.values()) >= 0.9 * budget else max(priced.values()))
        admitted = [c for c, size in priced.items() if size >= low]
        fresh = space.weights.clone()
        cheap = {}

        def evaluate(config):
            """The validation score after a short training from fresh weights, on the same batches each time."""
            kept, choice = arrange(config)
            batches, net.steps_done = bipeft.stream(net.batches[0]), 0
            space.weights.copy_(fresh)
            net.optimizer.state.clear()
            gate, ranks = torch.tensor(kept, device=fresh.device).float(), net.one_hot(choice)
            for step in range(steps):
                net.begin()
                _, gradient = net.run(("weights",), gate, ranks, next(batches))
                net.descend(gradient, 1 - step / steps)
            space.enter(gate, ranks)
            return bench.score("validation")
        rng = random.Random(bipeft.derive(bench.seed, 27))
        for config in rng.sample(admitted, min(s.bo_random, len(admitted))):
            cheap[config] = evaluate(config)
        while len(cheap) < min(s.bo_random + s.bo_guided, len(admitted)):
            left = [c for c in admitted if c not in cheap]
            for config in bayes.propose(list(cheap), list(cheap.values()), left, min(4, len(left)),
                                        s.surrogate, bipeft.derive(bench.seed, 28, len(cheap))):
                cheap[config] = evaluate(config)
        structures = [net.chosen(*arrange(config), budget)
                      for config in sorted(cheap, key=cheap.get, reverse=True)[:s.bo_full]]
    scored = []
    for structure in structures:
        peft, best, _ = bench.train(structure, lr)
        peft.detach()
        scored.append(best)
    told = {"surrogate": bayes.name_of(s.surrogate), "evaluations": len(cheap), "admitted": len(admitted)}
    return {"AutoPEFT": (structures[scored.index(max(scored))], told)}


def random_configurations(seed, kinds, layers, count=20000):
    """Configurations of many layers: the density of switches first, then the switches."""
    rng = random.Random(bipeft.derive(seed, 29))
    for _ in range(count):
        density = rng.random()
        yield (*(rng.randrange(4) for _ in range(kinds)), *(int(rng.random() < density) for _ in range(layers)))


def train_adalora(bench, budget, lr):
    """AdaLoRA (Zhang et al. 2023), Hugging Face peft: B diag(E) A on q, k, v, o from rank 2 (or 1.5 times what
    B allows), masked by smoothed sensitivity · uncertainty down to as many as fit B; t_i = 0.1 T, t_f = 0.3 T,
    every T/60 steps.

    Its training is its search, and until t_f holds more than B. An epoch counts only once the number of triplets
    is final, the last 2 of 6; what has E = 0 in the best one is not counted. Returns (best, curve, parameters, test or None).
    """
    import peft
    T, model = bench.settings.steps, copy.deepcopy(bench.model)
    for p in model.parameters():
        p.requires_grad_(False)
    d, layers = model.encoder.config.hidden_size, model.encoder.config.num_hidden_layers
    target = budget // (2 * d + 1)                                     # triplets, of 4 matrices a layer
    rank = max(2, math.ceil(1.5 * target / (4 * layers)))
    config = peft.AdaLoraConfig(
        init_r=rank, target_r=1, lora_alpha=rank, tinit=round(0.1 * T),
        tfinal=max(1, round(0.3 * T)), deltaT=max(1, T // 60), total_step=T, lora_dropout=0.0,
        target_modules=r".*attention\.(self\.(query|key|value)|output\.dense)")
    torch.manual_seed(bipeft.derive(bench.seed, 30))
    wrapped = peft.get_peft_model(model, config)
    for p in model.classifier.parameters():
        p.requires_grad_(True)
    allocator = wrapped.base_model.rankallocator
    allocator.target_bgt = target
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
            triplets = sum(int((p != 0).sum()) for name, p in learnt.items() if "lora_E" in name)
            if step >= T - config.tfinal and curve[-1] > best and triplets <= allocator.target_bgt:
                best, parameters = curve[-1], triplets * (2 * d + 1)
                kept = {name: p.detach().clone() for name, p in learnt.items()}
    bench.passes += T
    if kept is None:
        raise bipeft.UsageError("AdaLoRA never came down to the budget")
    with torch.no_grad():
        for name, p in learnt.items():
            p.copy_(kept[name])
    return best, curve, parameters, lambda: bench.score("test", wrapped)


# The ablations of Table 2, first order, T steps in all, the temperature from 5 to 1 in every stage, two steps
# of architecture weights to one of Delta W. Each is cut to the budget: modules by P(keep) descending at the
# chosen rank, first-fit; the size without a cut is told.


def differential(bench, budget, name, stages):
    """Architecture weights by gradient descent alone, in stages of "theta", "phi" or "entangled".

    theta: removal, ranks at their largest or as fixed; an earlier phi's argmax is fixed.   phi: ranks, all
    gates open or, after theta, those of its argmax.   entangled: Psi, [N, 1 + K], over remove and the ranks, one
    Gumbel vector a module: the gate is 1 - psi_0, and the rank that of the rest given that it is kept, since
    psi_k = (1 - psi_0) · softmax of the rest, under the same noise.
    """
    T = bench.settings.search_steps
    with Supernet(bench, "s2") as net:
        space, device = net.space, net.space.weights.device
        n, k, ranked = len(space), len(space.ranks), net.space.ranked
        generator = torch.Generator().manual_seed(bipeft.derive(bench.seed, 31))
        psi = (1e-3 * torch.randn(n, 1 + k, generator=generator)).to(device).requires_grad_()
        theta = (1e-3 * torch.randn(n, 2, generator=generator)).to(device).requires_grad_()
        phi = (1e-3 * torch.randn(n, k, generator=generator)).to(device).requires_grad_()
        kept, choice = torch.ones(n, device=device), torch.full((n,), k - 1, device=device)
        no_rank = torch.tensor([0.0, 0.0, *[-1e9] * (k - 1)], device=device)            # psi of a bias: two classes

        def logits_of_psi():
            return torch.where(ranked[:, None], psi, psi + no_rank)
        for number, stage in enumerate(stages):
            steps = T // len(stages)
            wanted, weights = {"theta": (("gate",), theta), "phi": (("ranks",), phi),
                               "entangled": (("gate", "ranks"), psi)}[stage]
            optimizer = torch.optim.Adam([weights], lr=0.01, betas=(0.5, 0.999), weight_decay=1e-4)

            def sample(noise, temperature):
                gate, ranks = kept, net.one_hot(choice)
                if stage == "theta":
                    gate = bipeft.gumbel_softmax(theta, noise[:, :2], temperature)[:, 1] * kept
                elif stage == "phi":
                    ranks = bipeft.gumbel_softmax(phi, noise[:, 1:], temperature)
                else:
                    logits = logits_of_psi()
                    soft = ((logits + noise) / temperature).softmax(1)
                    hard = (soft.argmax(1) > 0).float()
                    gate = hard + (1 - soft[:, 0]) - (1 - soft[:, 0]).detach()
                    ranks = bipeft.gumbel_softmax(logits[:, 1:], noise[:, 1:], temperature)
                return {"gate": gate, "ranks": ranks}
            for step in range(steps):
                net.begin()
                temperature = 5 - 4 * step / max(1, steps - 1)
                noise = bipeft.gumbel_noise((n, 1 + k), generator).to(device)
                drawn = sample(noise, temperature)
                _, gradient = net.run(("weights",), drawn["gate"].detach(), drawn["ranks"].detach(), next(net.train))
                net.descend(gradient, 1 - (number * steps + step) / T)
                for _ in range(2):
                    drawn = sample(noise, temperature)
                    _, *found = net.run(wanted, drawn["gate"].detach(), drawn["ranks"].detach(), next(net.val))
                    (weights.grad,) = torch.autograd.grad([drawn[w] for w in wanted], weights, found)
                    optimizer.step()
            if stage == "theta":
                kept = (theta.detach().argmax(1) == 1).float()
            elif stage == "phi":
                choice = torch.where(ranked, phi.detach().argmax(1), choice)
        if stages == ("entangled",):
            found = logits_of_psi().detach()
            keep, choice = 1 - found.softmax(1)[:, 0], found[:, 1:].argmax(1)
            kept = (found.argmax(1) > 0).float()
        else:
            keep = theta.detach().softmax(1)[:, 1]
        return {name: cut(net, keep, choice, budget, kept, among=kept if stages == ("theta", "phi") else None)}


def cut(net, keep, choice, budget, kept, among=None):
    """(Structure within the budget, what its plain argmax had).   among: [N], what may be taken, if not all."""
    choice, keep = choice.tolist(), keep.tolist()
    costs = [q[k] for q, k in zip(net.sizes, choice)]
    order = [n for n in sorted(range(len(keep)), key=lambda n: -keep[n]) if among is None or among[n] > 0]
    return (net.chosen(first_fit(order, costs, budget), choice, budget),
            {"uncut": sum(c for c, b in zip(costs, kept.tolist()) if b)})


def without_selection(bench, budget):
    """Algorithm 1 without Eq. 5-10, argmax of Theta and Phi at T; and of the same run s-bar alone at T, filled
    up to B: what the early selection adds to its own sensitivity.
    """
    s = bench.settings
    with Supernet(bench, "s2") as net:
        run = Unselected(bench.model, net.space, budget, s.search_steps, warmup=s.search_steps, lr=s.search_lr,
                         seed=bench.seed, run_pass=net.run)
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

    def magnitude(self, gradient):
        return super().magnitude(gradient) * self.space.sizes.gather(1, self.choice[:, None]).squeeze(1)


class OpenSensitivity(bipeft.Search):
    """s from passes with all kept gates open, one more each on D_tra and D_val; all else learns as ever."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.plain, self.run_pass = self.run_pass, self.both
        self.weight_optimizer.register_step_pre_hook(self.sampled_gradient)

    def both(self, wanted, gate, ranks, batch):
        found = self.plain(wanted, gate, ranks, batch)
        if "weights" not in wanted:
            return found
        if wanted == ("weights",):
            self.sampled = found[-1]                        # Delta W descends on this one
        return [*found[:-1], self.plain(("weights",), self.kept.to(gate.dtype), ranks, batch)[-1]]

    def sampled_gradient(self, *_):
        self.space.weights.grad = self.sampled


class OtherTemperature(bipeft.Search):
    """A temperature that falls from 5 to `end`."""

    end = 0.1

    def architecture(self, noise, hard=True):
        plain = 5 - 4 * self.steps_done / max(1, self.steps - 1)
        wanted = 5 - (5 - self.end) * self.steps_done / max(1, self.steps - 1)
        # Dividing (logits + noise) by another number is scaling both, which arg-max does not feel.
        theta, phi = self.theta, self.phi
        try:
            self.theta, self.phi = theta * (plain / wanted), phi * (plain / wanted)
            return super().architecture([part * (plain / wanted) for part in noise], hard)
        finally:
            self.theta, self.phi = theta, phi


# ==================================================================================================
# 3. What is run: methods, tables, jobs
# ==================================================================================================


@dataclass(frozen=True)
class Method:
    """finder: the function that gives its structure, and perhaps others' (their jobs are shared).   cheap: no
    search.   free: not under the budget.   rate_of: whose learning rate it takes; None: its own.
    """

    finder: str
    cheap: bool = False
    free: bool = False
    rates: tuple = RATES
    rate_of: str = None
    whole: bool = False                        # trains the backbone
    searched: tuple = ()                       # the search's own name, where the finder gives several


FINDERS = {
    "head": head_alone, "full": full, "whole": whole_space, "lora": lora, "serial": serial, "bitfit": bitfit,
    "lnfit": lnfit, "chance": chance, "bipeft": bipeft_search, "s3delta": s3delta, "prunepeft": prunepeft,
    "autopeft": autopeft, "best-random": best_of_chance, "without": without_selection,
    "s3delta-hard": lambda bench, budget: s3delta(bench, budget, hard=True),
    "s3delta-lr": lambda bench, budget: s3delta(bench, budget, name="S3Delta-M, lr 3e-3", lr=3e-3),
    "s3delta-16": lambda bench, budget: s3delta(bench, budget, name="S3Delta-M, scale 16"),
    "prunepeft-4": lambda bench, budget: prunepeft(bench, budget, rounds=4),
    "bipeft-s1": lambda bench, budget: bipeft_search(bench, budget, "s1", name="BIPEFT, S1"),
    "bipeft-all": lambda bench, budget: bipeft_search(bench, budget, "all", name="BIPEFT, all"),
    "entangled": lambda bench, budget: differential(bench, budget, "entangled", ("entangled",)),
    "b-d": lambda bench, budget: differential(bench, budget, "b → d", ("theta", "phi")),
    "d-b": lambda bench, budget: differential(bench, budget, "d → b", ("phi", "theta")),
}
CORE = {
    "BIPEFT": Method("bipeft"), "one look": Method("bipeft"), "random": Method("chance", cheap=True),
    "matched random": Method("bipeft"), "LoRA": Method("lora", cheap=True),
    "all of S2": Method("whole", cheap=True, free=True), "head alone": Method("head", True, True, HEAD_RATES),
    "full": Method("full", True, True, FULL_RATES, whole=True),
}
MORE = {
    "S3Delta-M": Method("s3delta"), "PrunePEFT": Method("prunepeft"), "BitFit": Method("bitfit", cheap=True),
    "LNFit": Method("lnfit", cheap=True), "serial adapter": Method("serial", cheap=True),
    "BIPEFT, S1": Method("bipeft-s1"), "BIPEFT, all": Method("bipeft-all"),
    "S3Delta-M, hard": Method("s3delta-hard"), "S3Delta-M, lr 3e-3": Method("s3delta-lr"),
    "S3Delta-M, scale 16": Method("s3delta-16"), "PrunePEFT, 4 rounds": Method("prunepeft-4"),
    "AdaLoRA": Method("adalora", cheap=True),
    "random, best of 3": Method("best-random", rate_of="random"),
    "AutoPEFT": Method("autopeft", rate_of="BIPEFT, S1"),                 # the same kinds
}
ACROSS = "BIPEFT", "one look", "random", "LoRA", "S3Delta-M, hard"                         # of --table budgets
ABLATIONS = {name: Method(finder) for name, finder in {
    "entangled": "entangled", "b → d": "b-d", "d → b": "d-b", "without selection": "without",
    "s-bar at T": "without"}.items()}
VARIANTS = {           # Tables 6-10, and readings that are ours; in each one thing differs from BIPEFT
    **{f"Z = {z}": {"triggers": z} for z in (10, 50, 200)},
    **{f"gamma = {g:g}": {"gamma": g} for g in (0.5, 0.75, 1.0)},
    **{f"H = {h}": {"window": h} for h in (3, 10, 20)},
    **{f"tau = {t:g}": {"tau": t} for t in (0.1, 0.5, 0.95)},
    **{f"warm-up {share:.0%}": {"warmup_share": share} for share in (0.0, 0.17, 0.75)},
    **{f"search lr {lr:g}": {"lr": lr} for lr in (3e-4, 3e-3, 6e-3)},
    "Eq. 2 as a sum": {"cls": SummedSensitivity}, "temperature to 0.1": {"cls": OtherTemperature},
    "gates open for s": {"cls": OpenSensitivity}, "LoRA scale 16": {},
}
SENSITIVITY = {name: Method(f"variant:{name}", rate_of=None if "scale" in name else "BIPEFT") for name in VARIANTS}
SCALES = {"variant:LoRA scale 16": 16.0, "s3delta-16": 16.0}              # of LoRA, 1 elsewhere
METHODS = {**CORE, **MORE, **ABLATIONS, **SENSITIVITY}
FTE = {"autopeft": 9, "prunepeft": 1}        # of a search, as expected for --minutes; 3 for all others
TABLES = ("main", "seeds", "ablations", "budgets", "transfer", "sensitivity", "cost")


def find(bench, finder, budget):
    """{method: (structure, what else to tell)} of a finder."""
    if finder.startswith("variant:"):
        name = finder.partition(":")[2]
        settings = dict(VARIANTS[name])
        if "warmup_share" in settings:
            settings["warmup"] = round(settings.pop("warmup_share") * bench.settings.search_steps)
        found = bipeft_search(bench, budget, name=name, **settings)
    else:
        found = FINDERS[finder](bench, budget)
    return {name: value if isinstance(value, tuple) else (value, {}) for name, value in found.items()}


class scaled_lora:
    """LoRA as y + scale · B A x, in search and re-training."""

    def __init__(self, scale):
        self.scale = scale

    def __enter__(self):
        self.plain = bipeft.LoRA.forward
        if self.scale is not None:
            plain, scale = self.plain, self.scale
            bipeft.LoRA.forward = lambda module, x, y: y + scale * (plain(module, x, y) - y)

    def __exit__(self, *_):
        bipeft.LoRA.forward = self.plain


def carry_out(bench, job):
    """A job's lines: of a search one for each structure, of a training one."""
    started = time.perf_counter()
    bench.open(job["task"], job["seed"])
    if bench.graphs:
        torch.cuda.reset_peak_memory_stats(bench.device)
    if job["stage"] == "find":
        lines = []
        with scaled_lora(SCALES.get(job["finder"])):
            found = find(bench, job["finder"], job["budget"])
        for method, (structure, told) in found.items():
            lines.append({**job, "method": method, "structure": bench.encode(structure), "passes": bench.passes,
                          "parameters": structure.parameters, **told})
    else:
        found = train(bench, job)                           # takes the structure out of the job
        lines = [{**job, **found}]
    if bench.graphs:
        memory = torch.cuda.max_memory_allocated(bench.device) / 2**20
        lines = [{**line, "memory": round(memory)} for line in lines]
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()              # 32 MiB for each stream that a job had
        torch.cuda.empty_cache()
    told = {"seconds": round(time.perf_counter() - started, 2), "workers": max(1, bench.settings.workers)}
    return [{**told, **line} for line in lines]                     # a look knows its own seconds


def train(bench, job):
    """Re-trains a job's structure and reads the test, unless the seed is for choosing the rate."""
    method = METHODS[job["method"]]
    if method.finder == "adalora":
        best, curve, parameters, test = train_adalora(bench, job["budget"], job["lr"])
        modules = None
    else:
        structure = (find(bench, method.finder, job["budget"])[job["method"]][0] if method.cheap
                     else bench.decode(job.pop("structure"), job["budget"]))
        with scaled_lora(SCALES.get(method.finder)):
            bench.passes = 0
            peft, best, curve = bench.train(structure, job["lr"], method.whole)
            parameters, modules = peft.size, len(peft)
            held = bench.score("test") if not job["tuning"] else None
            test = lambda: held
            peft.detach()
    assert method.free or parameters <= job["budget"], f"{parameters} parameters, budget {job['budget']}"
    if job["method"] == "full":
        parameters = sum(p.numel() for p in bench.encoder.parameters())
    return {"parameters": parameters, "modules": modules, "validation": best, "curve": curve, "passes": bench.passes,
            "test": None if job["tuning"] else test()}


class Plan:
    """The trainings wanted, in the order of their importance, and what they wait for: a structure, a rate.

    wanted: dicts of method, task, budget, seed, tuning and, perhaps, lr and source, the task whose structure
    it is.   lines: of the results file, from earlier runs, too.
    """

    def __init__(self, wanted, lines, settings, args):
        self.args, self.settings, self.dropped = args, settings, 0
        self.structures, self.trained, self.running, self.failed, self.late = {}, {}, set(), set(), set()
        self.wanted, seen, self.tuned, self.broken = [], set(), {}, Counter()
        for line in lines:
            self.take(line)
        for wish in wanted:
            key = json.dumps(wish, sort_keys=True)
            if key not in seen:
                seen.add(key)
                self.wanted.append(wish)

    def take(self, line):
        """A line of results."""
        self.tuned = {}
        if "error" in line:                                     # chance may have had a part in any but a UsageError
            self.broken[line["key"]] += 1
            if line["error"].startswith("UsageError"):
                self.failed.add(line["key"])
            elif self.broken[line["key"]] > 1:
                self.late.add(line["key"])                      # given up for this time
        elif line["stage"] == "find":
            self.structures[line["method"], line["task"], line["budget"], line["seed"]] = line["structure"]
        elif line["stage"] == "train":
            key = line["method"], line["task"], line["budget"], line["seed"], line["source"]
            self.trained.setdefault(key, {})[line["lr"]] = line["validation"]

    def tuning(self, name, budget, lr):
        """The trainings that a rate is judged by, as wishes."""
        seeds = self.args.tune_seeds[:None if budget in self.args.tune_budgets else 1]
        for task, seed in itertools.product(self.args.tune_tasks, seeds):
            yield {"method": name, "task": task, "budget": budget, "seed": seed, "source": None, "tuning": True,
                   "lr": lr}

    def judge(self, name, budget, lr):
        """A rate's mean validation score; None while a training is missing. One without finite numbers: -100."""
        found = []
        for wish in self.tuning(name, budget, lr):
            if key_of({"stage": "train", **wish}) in self.failed or self.hopeless(wish):
                found.append(-100.0)
            else:
                found.append(self.trained.get(cell_of(wish), {}).get(lr))
        return None if None in found else sum(found) / len(found)

    def rate(self, name, budget):
        """(chosen rate, {rate: score}) of a method; the rate is None while trainings for it are missing."""
        name = METHODS[name].rate_of or name
        if (name, budget) not in self.tuned:
            ladder, first, last = METHODS[name].rates, 1, 4
            while True:
                scores = {lr: self.judge(name, budget, lr) for lr in ladder[first:last]}
                best = None if None in scores.values() else max(scores, key=scores.get)
                if best == ladder[first] and first > 0:
                    first -= 1
                elif best == ladder[last - 1] and last < len(ladder):
                    last += 1
                else:
                    break
            self.tuned[name, budget] = best, scores
        return self.tuned[name, budget]

    def hopeless(self, wish):
        """Whether the search that a training stands on failed."""
        return key_of({"stage": "find", "finder": METHODS[wish["method"]].finder, "budget": wish["budget"],
                       "task": wish["source"] or wish["task"], "seed": wish["seed"]}) in self.failed

    def next(self):
        """A job that can be done now; None if all that is left waits for others, False if nothing is left."""
        waiting = False
        for wish in list(self.wanted):
            job = self.job_of(wish)
            if job == "done":
                self.wanted.remove(wish)
                self.dropped += not self.trained.get(cell_of(wish))
            elif job == "wait":
                waiting = True
            else:
                self.running.add(key_of(job))
                return job
        return None if waiting or self.running else False

    def missing(self):
        """How many are left, those given up for time or for an error included."""
        return sum(self.job_of(wish) != "done" for wish in self.wanted) + self.dropped

    def job_of(self, wish):
        """What is to be done for a wish: a job, "wait" or "done". First comes what its rate is chosen by."""
        method, budget, waits = METHODS[wish["method"]], wish["budget"], False
        if self.hopeless(wish):
            return "done"
        lr = wish.get("lr") or self.args.lr
        if lr is None:
            lr, scores = self.rate(wish["method"], budget)
            if lr is None:
                jobs = [self.job_of(other) for tried in scores
                        for other in self.tuning(method.rate_of or wish["method"], budget, tried)]
                if job := next((job for job in jobs if isinstance(job, dict)), None):
                    return job
                waits = "wait" in jobs                          # else they were given up: no rate, no training
                if not waits:
                    return "done"
        origin = wish["source"] or wish["task"]
        structure = self.structures.get((wish["method"], origin, budget, wish["seed"]))
        if structure is None and not method.cheap:
            job = {"stage": "find", "finder": method.finder, "task": origin, "budget": budget, "seed": wish["seed"]}
            return "done" if key_of(job) in self.late else "wait" if key_of(job) in self.running else job
        if waits:
            return "wait"
        job = {"stage": "train", **{key: wish[key] for key in CELL}, "tuning": wish["tuning"], "lr": lr}
        if lr in self.trained.get(cell_of(wish), {}) or key_of(job) in self.failed | self.late:
            return "done"
        if key_of(job) in self.running:
            return "wait"
        return job if method.cheap else {**job, "structure": structure}


CELL = "method", "task", "budget", "seed", "source"


def cell_of(wish):
    return tuple(wish[key] for key in CELL)


def key_of(job):
    """A job's name."""
    return json.dumps([job.get(key) for key in ("stage", "method", "finder", "task", "budget", "seed", "source", "lr")])


def wanted_of(args):
    """All trainings of the tables asked for, the important ones first; those for rates follow from them."""
    installed = {name: METHODS[name] for name in args.methods or METHODS
                 if METHODS[name].finder != "adalora" or importlib.util.find_spec("peft")}

    def of(names, seeds, budget=args.budget, tasks=args.tasks, **more):
        for seed, name, task in itertools.product(seeds, [n for n in names if n in installed], tasks):
            yield {"method": name, "task": task, "budget": budget, "seed": seed, "source": None, "tuning": False,
                   **more}
    if "AdaLoRA" in (args.methods or METHODS) and "AdaLoRA" not in installed:
        print("AdaLoRA is left out: peft is not installed")
    first, rest = args.seeds[:args.first_seeds], args.seeds[args.first_seeds:]
    for table in args.table:
        if table == "main":
            yield from of(CORE, first)
            for name in MORE:
                yield from of([name], first)
            for seed in rest:
                yield from of({**CORE, **MORE}, [seed])
        elif table == "seeds":
            for seed in args.more_seeds:
                yield from of([name for name, m in CORE.items() if not m.free], [seed])
        elif table in ("ablations", "sensitivity"):
            for seed in args.seeds:
                yield from of(["BIPEFT", *(ABLATIONS if table == "ablations" else SENSITIVITY)], [seed])
        elif table == "budgets":
            for seed, budget in itertools.product(args.seeds, args.budgets):
                yield from of([name for name in ACROSS if name in installed], [seed], budget=budget)
        elif table == "transfer":
            for seed, source in itertools.product(args.seeds, args.tasks):
                yield from of(["BIPEFT"], [seed], tasks=[t for t in args.tasks if t != source], **{"source": source})
        elif table == "cost":
            names = [n for n, m in {**CORE, **MORE}.items() if not m.cheap] + ["entangled", "without selection"]
            yield from of(["random", "LoRA", "AdaLoRA", *names], [900], tasks=args.tasks[:1], lr=2.5e-3)   # the first warms it up


# ==================================================================================================
# 4. Many workers on one device
# ==================================================================================================


def work(settings, number, pipe):
    """A worker: jobs from a pipe, until None comes."""
    if settings.device == "auto" and torch.cuda.is_available():
        settings = dataclasses.replace(settings, device=f"cuda:{number % torch.cuda.device_count()}")
    bench = Bench(settings)
    pipe.send([first_line(bench)])
    broken = 0
    while broken < 2 and (job := pipe.recv()) is not None:
        lines = attempt(bench, job)
        strange = "error" in lines[0] and not lines[0]["error"].startswith("UsageError")
        broken = broken + 1 if strange else 0                       # twice in a row: no job is safe here
        pipe.send(lines)


def first_line(bench):
    """What a file's lines have in common: the places that a structure's numbers stand for, and the settings."""
    own = ("device", "workers", "folder", "surrogate")                      # they may differ between two calls
    settings = {key: value for key, value in dataclasses.asdict(bench.settings).items() if key not in own}
    return {"stage": "places", "places": [f"{name}.{kind}" for name, kind in bench.keys], "settings": settings}


def attempt(bench, job):
    """A job's lines, or that of its error."""
    try:
        return carry_out(bench, dict(job))
    except Exception as error:
        if isinstance(error, torch.AcceleratorError if hasattr(torch, "AcceleratorError") else ()):
            raise
        told = f"{type(error).__name__}: {bipeft.one_line(error)[:300]}"
    reset(bench)                                                    # here nothing holds the job's tensors any more
    return [{**{k: v for k, v in job.items() if k != "structure"}, "key": key_of(job), "error": told}]


def reset(bench):
    """A model on which nothing is left of a job that broke off."""
    bench.models, bench.cache, bench.model = {}, {}, None
    gc.collect()
    if bench.graphs:
        torch.cuda.empty_cache()
    bench.encoder = bench.load().to(bench.device).eval()
    bench.where = bench.find_places()


def carry_out_all(args, settings, out, minutes):
    """Hands the plan's jobs to the workers; stops in time. Returns all lines."""
    lines = read(out)
    plan, started = Plan(list(wanted_of(args)), lines, settings, args), time.time()
    if out.exists() and not out.read_text().endswith("\n"):
        with out.open("a") as file:
            file.write("\n")                                        # of a run that was killed in a line
    print(f"{len(plan.wanted)} trainings asked for, {sum(line.get('stage') == 'train' for line in lines)} lines there")
    longest, budgeted = defaultdict(float), minutes * 60 if minutes else math.inf
    for line in lines:
        if line.get("workers") == max(1, args.workers):
            kind = line["stage"], line.get("finder") or line.get("method")
            longest[kind] = max(longest[kind], line.get("seconds", 0))

    def expected(job):
        """Seconds: the longest of its kind so far or, of a search not seen yet, its FTE in trainings."""
        kind = job["stage"], job.get("finder") or job.get("method")
        trainings = [seconds for (stage, _), seconds in longest.items() if stage == "train"]
        share = FTE.get(kind[1], 3 if kind[0] == "find" else 1)
        return longest.get(kind) or share * (sum(trainings) / len(trainings) if trainings else 0)

    def accept(job, found):
        for line in found:
            if line["stage"] == "places" and (there := [x for x in lines if x["stage"] == "places"]):
                if there[0].get("settings", line["settings"]) != line["settings"]:
                    raise bipeft.UsageError(f"{out} is of other settings, {there[0]['settings']}: give another --out")
                continue
            lines.append(line)
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if line["stage"] != "places":
                plan.take(line)
                kind = line["stage"], line.get("finder") or line.get("method")
                longest[kind] = max(longest[kind], line.get("seconds", 0))
                show(line, time.time() - started)
        if job is not None:
            plan.running.discard(key_of(job))

    def next_job():
        left = budgeted - (time.time() - started)
        while True:
            job = plan.next() if left > 0 else False
            if not job or expected(job) < left:
                return job
            plan.running.discard(key_of(job))                       # it would not be done in time
            plan.late.add(key_of(job))

    if args.workers == 0:
        bench = Bench(settings)
        accept(None, [first_line(bench)])
        while job := next_job():
            accept(job, attempt(bench, job))
        print(f"{time.time() - started:.0f} s; not done: {plan.missing()} trainings")
        return lines
    context, pipes, busy = mp.get_context("spawn"), {}, {}
    for number in range(args.workers):
        ours, theirs = context.Pipe()
        worker = context.Process(target=work, args=(settings, number, theirs), daemon=True)
        worker.start()
        theirs.close()
        pipes[ours], busy[ours] = worker, None                      # until its first message
    idle, waiting = [], dict(busy)
    while waiting or idle:
        left = budgeted - (time.time() - started)
        if left <= 0:
            print(f"stopped after {minutes:g} minutes; {len(waiting)} jobs were under way")
            break
        for pipe in multiprocessing.connection.wait(list(waiting), timeout=min(left, 5)):
            job = waiting.pop(pipe)
            try:
                accept(job, pipe.recv())
                idle.append(pipe)
            except (EOFError, ConnectionResetError):
                print(f"a worker died at {job}")
                if job is not None:
                    accept(job, [{**{k: v for k, v in job.items() if k != "structure"}, "key": key_of(job),
                                  "error": "its worker died"}])
        while idle:
            job = next_job()
            if job is None:
                break
            pipe = idle.pop()
            if job is False:
                if not waiting:
                    idle = []
                    break
                idle.append(pipe)
                break
            try:
                pipe.send(job)
                waiting[pipe] = job
            except (BrokenPipeError, ConnectionResetError):         # it left after two strange errors
                plan.running.discard(key_of(job))
        if not waiting:
            break
    for pipe, worker in pipes.items():
        if pipe not in waiting:
            try:
                pipe.send(None)
            except (BrokenPipeError, OSError):
                pass
    for pipe, worker in pipes.items():
        worker.join(0 if pipe in waiting else 5)
        if worker.is_alive():
            worker.terminate()
    print(f"{time.time() - started:.0f} s; not done: {plan.missing()} trainings")
    return lines


def show(line, seconds):
    """A line for people."""
    keys = ("error",) if "error" in line else ("lr", "parameters", "validation", "test", "passes", "seconds")
    told = "  ".join(f"{key} {line[key]:.6g}" if isinstance(line[key], (int, float)) else f"{key} {line[key]}"
                     for key in keys if line.get(key) is not None)
    print(f"{seconds:6.0f} s  {line['stage']:5}  {line.get('method') or line.get('finder'):20} {line['task']:5} "
          f"B {line['budget']}  seed {line['seed']}  {told}", flush=True)


def read(out):
    """The lines of a results file; a broken one, of a run that was killed, is dropped."""
    lines = []
    for text in out.read_text().splitlines() if out.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            pass
    return [x for x in lines if x.get("error", "UsageError").startswith("UsageError")]    # others are tried again


SMALL = {"steps": 12, "evaluations": 3, "search_steps": 12, "warmup": 6, "batch_size": 8, "bo_random": 3,
         "bo_guided": 2, "bo_share": 0.34, "bo_full": 1, "small": True, "device": "cpu"}


def mistake_in(args, settings):
    """What is wrong with the arguments, in a line, or None."""
    tasks = Path(settings.folder) / "tasks.npz"
    if settings.family not in ("bert", "t5"):
        return f"--family {settings.family}: give bert or t5"
    if args.prepare:
        for flag, folder in (("--model", args.model), ("--data-dir", args.data_dir)):
            if not folder or not Path(folder).is_dir():
                return f"--prepare needs {flag} and a folder that exists, not {folder}"
    elif not args.table:
        return "nothing to do: give --table, --prepare or --small"
    elif not settings.small:
        if not tasks.exists():
            return f"{tasks} does not exist: run --prepare first, or name its --folder"
        stored = set(np.load(tasks).files)
        if (settings.family == "t5") != ("answers" in stored):
            return f"{settings.folder} was not prepared with --family {settings.family}: give another --folder"
        if missing := [task for task in (*args.tasks, *args.tune_tasks) if f"{task}.0.ids" not in stored]:
            return f"{tasks} holds no task {missing[0]}"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--table", nargs="+", choices=TABLES, default=[])
    add("--prepare", action="store_true")
    add("--model", help="for --prepare: the encoder's folder")
    add("--data-dir", help="for --prepare: the folder that holds <task>/<split>.parquet")
    add("--out", default=str(HERE / "results" / "compare.jsonl"))
    add("--tasks", nargs="+", default=["qnli", "mnli", "sst2"])
    add("--methods", nargs="+", choices=list(METHODS), help="of --table's, these alone")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    add("--more-seeds", nargs="+", type=int, default=[5, 6, 7, 8, 9], help="of --table seeds: the core methods alone")
    add("--first-seeds", type=int, default=3, help="how many seeds of the core methods come before the others")
    add("--tune-seeds", nargs="+", type=int, default=[100, 101])
    add("--tune-tasks", nargs="+", help="default: all of --tasks")
    add("--tune-budgets", nargs="+", type=int, default=[], help="where all of --tune-seeds count, as at --budget;"
                                                                 " at others the first")
    add("--lr", type=float, help="one re-training rate for all, instead of choosing")
    add("--budget", type=int, default=10_000)
    add("--budgets", nargs="+", type=int, default=[3_000, 25_000, 45_000], help="of --table budgets")
    add("--workers", type=int, default=0)
    add("--minutes", type=float, help="hand out no job that would not be done by then")
    for field in dataclasses.fields(Settings):
        if field.name not in ("workers",):
            flag = f"--{field.name.replace('_', '-')}"
            if field.type is bool:
                add(flag, action="store_true")
            else:
                add(flag, type=field.type, default=field.default)
    args = parser.parse_args(arguments)
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    if args.small:
        values |= SMALL
        args.tasks, args.budget, args.budgets, args.seeds, args.first_seeds = ["toy"], 600, [300], [0, 1], 1
        args.table = args.table or list(TABLES)
        if args.out == parser.get_default("out"):
            args.out = str(Path("runs") / "compare-small" / "compare.jsonl")
    settings, args.tune_tasks = Settings(**values), args.tune_tasks or args.tasks
    args.tune_budgets = [args.budget, *args.tune_budgets]
    if set(args.seeds + args.more_seeds) & set(args.tune_seeds):
        parser.error("--seeds and --tune-seeds must differ: rates are chosen on seeds that are not reported")
    if mistake := mistake_in(args, settings):
        parser.error(mistake)
    if args.prepare:
        prepare(args.model, args.data_dir, settings)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if args.table:
        try:
            carry_out_all(args, settings, out, args.minutes)
        except bipeft.UsageError as mistake:
            parser.error(str(mistake))


if __name__ == "__main__":
    main()
