"""What every method of compare.py stands on: a backbone, the tasks, a training, and a search's supernet."""

import itertools
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
import bipeft


@dataclass
class Settings:
    """What is the same for every method."""

    folder: str = "runs/compare"     # what --prepare made
    family: str = "bert"             # an encoder with a head; "llama" answers with a token
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
    workers: int = 0                 # processes on the device, 0: this one
    small: bool = False              # a tiny random backbone and synthetic rows


SMALL = {"steps": 12, "evaluations": 3, "search_steps": 12, "warmup": 6, "batch_size": 8, "bo_random": 3,
         "bo_guided": 2, "bo_share": 0.34, "bo_full": 1, "small": True, "device": "cpu"}


# 1. The backbone

class Classifier(nn.Module):
    """An encoder, the mean of its outputs, a linear head. Asks the device for no value: CUDA graphs."""

    head = ("classifier",)           # learns beside the modules, outside of the budget

    def __init__(self, encoder, labels):
        super().__init__()
        self.encoder, self.classifier = encoder, nn.Linear(encoder.config.hidden_size, labels)

    def forward(self, input_ids, attention_mask, labels=None):
        """labels: [batch, 1 or more], the first is the class, -100 for a row that only fills a batch."""
        shut = (1 - attention_mask[:, None, None, :]).to(self.classifier.weight.dtype)
        mask = (shut * torch.finfo(shut.dtype).min).expand(-1, 1, input_ids.shape[1], -1)
        hidden = self.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        weight = attention_mask[..., None].to(hidden.dtype)
        return output_of(self.classifier((hidden * weight).sum(1) / weight.sum(1)).float(), labels)


class NextToken(nn.Module):
    """A Llama whose next token after the prompt is the answer, one of the labels' digits. No head."""

    head = ()

    def __init__(self, llama, answers):
        super().__init__()
        self.encoder = llama
        self.register_buffer("answers", torch.tensor(answers), persistent=False)

    def forward(self, input_ids, attention_mask, labels=None):
        """As Classifier's; logits are of the label's tokens alone, at each prompt's last token alone.

        Rows are padded at their ends, where causal attention doesn't look: so its mask is the same for all.
        """
        rows, length = input_ids.shape
        dtype = self.encoder.get_output_embeddings().weight.dtype
        shut = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype, device=input_ids.device)
        mask = shut.triu(1).expand(rows, 1, -1, -1)
        hidden = self.encoder.base_model(input_ids=input_ids, attention_mask=mask).last_hidden_state
        last = (attention_mask.sum(1) - 1)[:, None, None].expand(-1, 1, hidden.shape[2])
        hidden = hidden.gather(1, last)[:, 0]                                               # [rows, d]
        words = self.encoder.get_output_embeddings().weight.index_select(0, self.answers)   # [labels, d]
        return output_of(hidden.float() @ words.float().T, labels)


def output_of(logits, labels):
    """logits: [batch, classes]; with their loss, if there are labels."""
    loss = None if labels is None else F.cross_entropy(logits, labels[:, 0], ignore_index=-100)
    return SequenceClassifierOutput(loss=loss, logits=logits)


# 2. The tasks

FILES = {"qnli": ("validation",), "mnli": ("validation_matched",), "sst2": ("train", "validation"),
         "cola": ("train", "validation"), "boolq": ("validation",), "multirc": ("train", "validation")}


def prepare(model, data_dir, settings, tasks):
    """Tokens of the tasks and the backbone in half precision, for another machine; a Llama's large folder is linked."""
    import pandas
    folder, arrays, family = Path(settings.folder), {}, settings.family
    with bipeft.failing(f"{model} can't be loaded", ": give a folder with a model of --family's kind"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    for task in tasks:
        for number, name in enumerate(FILES[task]):
            rows = pandas.read_parquet(Path(data_dir) / task / f"{name}.parquet")
            if task == "sst2" and number == 0:                      # 8,000 are trained on, 500 validate
                rows = rows.sample(settings.train_rows + 4000, random_state=0)
            ids = token_ids(task, rows, tokenizer, family)
            arrays |= {f"{task}.{number}.ids": np.concatenate([np.array(row, np.uint16) for row in ids]),
                       f"{task}.{number}.lengths": np.array([len(row) for row in ids], np.uint16),
                       f"{task}.{number}.labels": rows["label"].to_numpy(np.int8)}
    if family == "llama":                                           # the first token of each label's digit
        arrays["answers"] = np.array([tokenizer(digit).input_ids[0] for digit in "012"])
        arrays["line_break"] = np.array(tokenizer("\n").input_ids)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "tasks.npz", **arrays)
    if family == "llama":
        (folder / "model").unlink(missing_ok=True)
        (folder / "model").symlink_to(Path(model).resolve())
    else:
        load_backbone(family, model, torch.float16).save_pretrained(folder / "model")


def token_ids(task, rows, tokenizer, family):
    """Tokens of a data frame's rows, cut: an encoder's at 128, a Llama's, of bipeft's prompts, at the task's length."""
    if family == "bert":
        texts = [rows[field].tolist() for field in bipeft.TASKS[task].fields]
        return tokenizer(*texts, truncation=True, max_length=128).input_ids
    prompts = [bipeft.to_examples(task, row)[0].source for row in rows.to_dict("records")]
    return tokenizer(prompts, truncation=True, max_length=bipeft.TASKS[task].max_length - 1).input_ids


def load_backbone(family, path, dtype):
    """A family's model from a folder, without what no method here uses."""
    if family == "llama":
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_cache=False)
    return transformers.AutoModel.from_pretrained(path, add_pooling_layer=False, dtype=dtype)


def pools_of(task, settings):
    """The rows of a task's files, [(ids, [label])] each."""
    if task == "toy":                                       # is there a word below 20 among the first ten?
        rng = np.random.default_rng(0)
        rows = [(rng.integers(20, 100, rng.integers(8, 20)).tolist(), i % 2) for i in range(400)]
        return [[([1, *(ids if not y else [5 + i % 10, *ids[1:]])], [y]) for i, (ids, y) in enumerate(rows)]]
    stored, pools = np.load(Path(settings.folder) / "tasks.npz"), []
    after = stored["line_break"].tolist() if "line_break" in stored else []         # after a Llama's prompt
    for number in itertools.count():
        if f"{task}.{number}.ids" not in stored:
            return pools
        ids, lengths, labels = (stored[f"{task}.{number}.{key}"].tolist() for key in ("ids", "lengths", "labels"))
        ends = list(itertools.accumulate(lengths))
        longest = settings.max_length - len(after)
        pools.append([(ids[end - n:end][:longest] + after, [y]) for end, n, y in zip(ends, lengths, labels)])


def splits_of(task, settings, seed):
    """Train, validation and test rows. Without a test file of its own a task's rows are cut by the seed."""
    pool, *other = pools_of(task, settings)
    order = list(range(len(pool)))
    random.Random(bipeft.derive(seed, 21)).shuffle(order)
    rows = [pool[i] for i in order]
    if task == "sst2":                                      # the validation file is the test
        return {"validation": rows[:500], "test": other[0], "train": rows[500:500 + settings.train_rows]}
    if other:                                               # cola: it is halved
        half = list(other[0])
        random.Random(bipeft.derive(seed, 22)).shuffle(half)
        return {"train": rows, "validation": half[:len(half) // 2], "test": half[len(half) // 2:]}
    few = min(500, len(rows) // 5)
    tested = few if task == "toy" else 3 * few
    return {"validation": rows[:few], "test": rows[few:few + tested], "train": rows[few + tested:]}


# 3. A training

class Stretch:
    """Endless batches cut into stretches of as many steps as lie between two evaluations."""

    def __init__(self, batches, steps):
        self.source, self.steps = bipeft.stream(batches), steps

    def __len__(self):
        return self.steps

    def __iter__(self):
        return itertools.islice(self.source, self.steps)


def small_backbone(family):
    """A tiny one of random weights."""
    if family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, use_cache=False))
    return transformers.BertModel(transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32), add_pooling_layer=False)


class Bench:
    """A backbone on a device, and what is cached: models by number of labels, tokens by task and seed."""

    def __init__(self, settings):
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("high")
        self.settings, self.device = settings, bipeft.choose_device(settings.device)
        self.graphs = self.device.type == "cuda"
        self.dtype = getattr(torch, settings.dtype)
        self.encoder = self.load().to(self.device).eval()
        self.models, self.cache, self.costs = {}, {}, {}
        found = bipeft.places_by_kind(self.around(2), bipeft.KINDS)
        self.where = {key: place for key, (place, role) in found.items()}      # by name and kind
        self.keys = list(self.where)

    def around(self, labels):
        """The backbone as a classifier."""
        if self.settings.family == "bert":
            return Classifier(self.encoder, labels)
        answers = [3, 4, 5]
        if not self.settings.small:
            answers = np.load(Path(self.settings.folder) / "tasks.npz")["answers"].tolist()
        return NextToken(self.encoder, answers[:labels])

    def load(self):
        """The backbone, of --prepare's folder or, small, random."""
        transformers.utils.logging.disable_progress_bar()
        if self.settings.small:
            torch.manual_seed(0)
            return small_backbone(self.settings.family)
        backbone = load_backbone(self.settings.family, Path(self.settings.folder) / "model", self.dtype)
        if self.settings.family == "llama" and self.graphs:
            bipeft.fuse_norms(backbone)
        return backbone

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
            self.models[labels] = self.around(labels).to(self.device)
        self.model = self.models[labels]
        self.set_format(self.dtype)
        for name in self.model.head:                        # its first weights are of the seed alone
            layer = self.model.get_submodule(name)
            generator = torch.Generator().manual_seed(bipeft.derive(seed, 20))
            weight = torch.empty(layer.weight.shape).normal_(0, 0.02, generator=generator)
            layer.load_state_dict({"weight": weight, "bias": torch.zeros(len(weight))})

    def set_format(self, dtype):
        """Of the model's parameters, but not of its buffers: rotary frequencies stay exact."""
        for layer in self.model.modules():
            bipeft.convert(layer, dtype)

    def new_pass(self):
        """Who computes losses and gradients: on a GPU CUDA graphs, new ones for each set of modules."""
        return bipeft.CudaGraphs() if self.graphs else bipeft.forward_backward

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

    def structure(self, chosen, budget):
        """A Structure of (place, kind, rank) each, its parameters counted from tensors without numbers."""
        modules = []
        for name, kind, rank in chosen:
            modules.append({"name": name, "kind": kind, "rank": rank if bipeft.KINDS[kind].ranked else None,
                            "parameters": self.cost((name, kind), rank or 1)})
        return bipeft.Structure("", bipeft.geometry(self.model), "s2", [], budget, modules)

    def cost(self, key, rank):
        """Parameters of a module, (place, kind), at a rank."""
        if (key, rank) not in self.costs:
            with torch.device("meta"):
                self.costs[key, rank] = bipeft.count_of(bipeft.KINDS[key[1]](self.where[key], rank))
        return self.costs[key, rank]

    def encode(self, structure):
        """A structure as text: "place:rank" each, places by their number in `keys`."""
        number = {key: i for i, key in enumerate(self.keys)}
        return " ".join(f"{number[m['name'], m['kind']]}:{m['rank'] or 1}" for m in structure.modules)

    def decode(self, text, budget):
        """What `encode` wrote."""
        chosen = [(*self.keys[int(i)], int(rank)) for i, rank in (item.split(":") for item in text.split())]
        return self.structure(chosen, budget)

    def train(self, structure, lr, whole=False, clip=None, lr_warmup=0.0):
        """Re-trains; returns (peft, best validation score, curve). The model stays as after its best epoch, attached.

        whole: with every weight of the backbone, in float32, so that small steps count.   clip, lr_warmup: Method's.
        """
        if whole:
            self.set_format(torch.float32)
        also = (*["encoder"] * whole, *self.model.head)
        peft = bipeft.apply(self.model, structure, self.seed, also_train=also)
        evaluations, compute = self.settings.evaluations, self.new_pass()

        def run_pass(*given):
            loss = compute(*given)
            if clip is not None:
                nn.utils.clip_grad_norm_(peft.tensors, clip)
            return loss
        stretch = Stretch(self.batches(self.splits["train"]), max(1, round(self.settings.steps / evaluations)))
        curve = []
        best = bipeft.train(self.model, peft, stretch, lambda: self.score("validation"), evaluations, lr,
                            lr_warmup=lr_warmup, seed=self.seed, run_pass=run_pass,
                            after_step=lambda _, line: curve.append(line.get("score")))
        self.passes += evaluations * len(stretch)
        return peft, best, [round(score, 2) for score in curve if score is not None]


# 4. A search's supernet

class Supernet:
    """A space with all its modules attached, its passes counted, and Delta W's optimiser: what a search stands on."""

    def __init__(self, bench, kinds, ranks=(1, 4, 8), lr=None, search=True, weight_decay=1e-4):
        self.bench, self.model, self.lr = bench, bench.model, lr or bench.settings.search_lr
        self.space = bipeft.Space(bench.model, kinds, ranks, bench.seed, also_train=bench.model.head)
        self.compute, rows = bench.new_pass(), bench.splits["train"]
        halves = (rows[::2], rows[1::2]) if search else (rows, rows)
        self.batches = [bench.batches(part) for part in halves]
        self.train, self.val = map(bipeft.stream, self.batches)
        self.sizes, self.steps_done = self.space.param_counts.tolist(), 0
        self.optimizer = torch.optim.AdamW(self.space.tensors, lr=self.lr, weight_decay=weight_decay, fused=True)

    def __enter__(self):
        self.model.train()
        return self

    def __exit__(self, *_):
        self.space.leave()
        self.space.detach()
        self.model.eval()

    def run_pass(self, model, space, gate, ranks, batch, inputs):
        """A pass that is counted, a function as `bipeft.forward_backward`."""
        self.bench.passes += 1
        return self.compute(model, space, gate, ranks, batch, inputs)

    def gradient(self, gate, ranks, batch, *of):
        """A pass.   Returns its gradient by Delta W and the head; those by gate and ranks, `of`, are in their grad."""
        weights = self.space.tensors
        self.run_pass(self.model, self.space, gate, ranks, batch, [*of, *weights])
        return bipeft.flatten([p.grad for p in weights])

    def weights(self):
        """Delta W and the head, end to end."""
        return bipeft.flatten(self.space.tensors)

    def put(self, weights):
        """Gives Delta W and the head other numbers."""
        sizes = [p.numel() for p in self.space.tensors]
        bipeft.put_back(self.space.tensors, [w.view_as(p) for p, w in zip(self.space.tensors, weights.split(sizes))])

    def begin(self, again=False):
        """Dropout of a step follows the seed and the step.   again: that of the present step once more."""
        self.steps_done += not again
        torch.manual_seed(bipeft.derive(self.bench.seed, 23, self.steps_done - 1))

    def descend(self, gradient, left, clip=None):
        """A step of Delta W.   left: the share of the steps still to go, which the rate falls with."""
        if clip is not None:
            gradient = gradient * (clip / gradient.norm().clamp(min=clip))
        self.optimizer.param_groups[0]["lr"] = self.lr * left
        bipeft.give_gradients(self.space.tensors, gradient)
        self.optimizer.step()

    def one_hot(self, choice):
        """[N, K] of indices of ranks."""
        index = torch.as_tensor(choice, device=self.bench.device)
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
