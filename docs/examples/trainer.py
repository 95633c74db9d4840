"""A found structure in a training loop that is not ours: transformers' Trainer, on one process or on several.

    python docs/examples/trainer.py                                           search, train, save, load, answer
    torchrun --nproc_per_node=2 docs/examples/trainer.py --structure runs/trainer/structure.json

The modules are the only parameters of the model that require gradients: Trainer's optimizer, its clipping and, under
torchrun, its DistributedDataParallel see them and nothing else. What is saved is their weights alone; Trainer's own
checkpoints would hold the backbone, too. The toy's backbone and task run offline; for others the calls are the same.
"""

import argparse
import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bipeft


def found(model, tokens, args):
    """The structure that a search finds for a model."""
    space = bipeft.Space(model, "s2", seed=args.seed)
    halves = [bipeft.Batches(tokens[i::2], 32, "cpu", bipeft.derive(args.seed, 30 + i)) for i in (0, 1)]
    structure = bipeft.search(model, space, *halves, budget=0.03, steps=args.search_steps, warmup=args.warmup,
                              backbone="toy", lr=3e-3, triggers=30, seed=args.seed)
    space.detach()
    return structure


def score(model, tokenizer, examples):
    """Accuracy of what a model answers to examples, in per cent."""
    tokens = bipeft.tokenize(tokenizer, examples, 32)
    said = bipeft.predict(model, tokenizer, tokens, 256)
    return bipeft.accuracy(said, [e.answers for e in examples])


def main(arguments=None):
    """The program.   Returns the accuracies on test: untouched, as trained, and as loaded from the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for flag, default in {"seed": 0, "rows": 4000, "search-steps": 310, "warmup": 250, "epochs": 7,
                          "pretraining": 500}.items():
        parser.add_argument(f"--{flag}", type=int, default=default, help="(%(default)s)")
    parser.add_argument("--structure", help="a structure.json; without it one is searched for")
    parser.add_argument("--out", type=Path, default=Path("runs/trainer"), help="(%(default)s)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)                                    # so small a model waits for further ones
    model, tokenizer = bipeft.toy_backbone(args.seed, args.pretraining)
    splits = bipeft.toy_splits(args.seed)
    tokens = bipeft.tokenize(tokenizer, splits["train"][:args.rows], 32)
    untouched = score(model, tokenizer, splits["test"])

    # The structure: found here, or by a run of bipeft.py, or by anybody else.
    args.out.mkdir(parents=True, exist_ok=True)
    if args.structure is None:
        structure = found(model, tokens, args)
        bipeft.save_structure(structure, args.out / "structure.json")
    else:
        structure = bipeft.load_structure(args.structure)

    # Fresh modules of it on the model, and a training as of any other model.
    peft = bipeft.apply(model, structure, args.seed)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(args.out / "trainer"), num_train_epochs=args.epochs, per_device_train_batch_size=32,
            learning_rate=3e-3, weight_decay=1e-4, seed=args.seed, save_strategy="no", report_to="none",
            logging_steps=250, disable_tqdm=True, use_cpu=not torch.cuda.is_available()),
        train_dataset=[{"input_ids": source, "labels": target} for source, target in tokens],
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, model))
    trainer.train()
    trained = score(model, tokenizer, splits["test"])
    path = args.out / "peft.safetensors"
    if trainer.is_world_process_zero():
        bipeft.save_weights(peft, path)
    trainer.accelerator.wait_for_everyone()

    # Inference elsewhere: the backbone, the structure, the weights.
    model, tokenizer = bipeft.toy_backbone(args.seed, args.pretraining)
    peft = bipeft.apply(model, structure)
    bipeft.load_weights(peft, path)
    loaded = score(model, tokenizer, splits["test"])
    if trainer.is_world_process_zero():
        print(f"{peft.size:,} parameters in {len(peft)} modules; test accuracy untouched {untouched:.2f}, "
              f"trained {trained:.2f}, loaded {loaded:.2f}")
    return untouched, trained, loaded


if __name__ == "__main__":
    try:
        main()
    except bipeft.UsageError as mistake:
        print(f"trainer.py: {mistake}", file=sys.stderr)
        sys.exit(2)
