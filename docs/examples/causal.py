"""BIPEFT on a causal language model, offline: a tiny Llama, pretrained on the spot as the toy's T5 is.

    python docs/examples/causal.py

The toy asks whether a thing was found good or bad, which an adjective and a "not" decide together. The Llama (2
layers, grouped-query attention) first learns to write such sentences and how somebody felt about it, "so smiled"; to
the task's prompt it answers in form, but at chance. Then come the search, re-training and generation, through the
library.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import processors

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bipeft

BATCH, LR, DEVICE = 32, 1e-2, "cpu"


def pretrained(seed, steps):
    """(model, tokenizer): a Llama of some 90,000 parameters that has seen `steps` batches of sentences."""
    _, tokenizer = bipeft.toy_backbone(seed, steps=0)                         # its vocabulary alone
    # A T5's inputs end in </s>; what a causal model is to go on from does not.
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    torch.manual_seed(bipeft.derive(seed, 20))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=1, use_cache=False,
        initializer_range=0.125))                                             # 1/sqrt(64): 0.02 is for wide ones
    rng = random.Random(bipeft.derive(seed, 21))

    def written():
        text, verdict = bipeft.toy_sentence(rng)
        if rng.random() < 0.3:                                                # the prompt, with an answer by chance
            return bipeft.Example(f"toy sentence: {text}", rng.choice(("good", "bad")), ())
        felt = rng.choice(bipeft.TOY_WORDS["glad" if verdict == "good" else "sad"].split())
        if rng.random() < 0.3:                                                # the loss is on all of it, or on its end
            return bipeft.Example("", f"{text} so {felt}", ())
        return bipeft.Example(f"{text} so", felt, ())

    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        tokens = bipeft.tokenize(tokenizer, [written() for _ in range(64)], 32, causal=True)
        for batch in bipeft.Batches(tokens, 64, DEVICE, causal=True):         # prompt and answer as one sequence
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


def main(arguments=None):
    """The program.   Returns the accuracy on test, in per cent, before and after."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for flag, default in {"seed": 0, "rows": 4000, "pretraining": 400, "warmup": 150, "search-steps": 220,
                          "triggers": 30, "epochs": 3}.items():
        parser.add_argument(f"--{flag}", type=int, default=default, help="(%(default)s)")
    parser.add_argument("--space", default="all", help="s1, s2, all or a comma list (%(default)s)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)                                                  # so small a model waits for further ones
    model, tokenizer = pretrained(args.seed, args.pretraining)
    size = sum(p.numel() for p in model.parameters())
    splits = bipeft.toy_splits(args.seed)
    splits["train"] = splits["train"][:args.rows]
    tokens = {key: bipeft.tokenize(tokenizer, examples, 32, causal=True) for key, examples in splits.items()}

    def score(split):
        said = bipeft.predict(model, tokenizer, tokens[split], 8 * BATCH, DEVICE)
        return bipeft.accuracy(said, [e.answers for e in splits[split]])

    def batches(rows, number):
        return bipeft.Batches(rows, BATCH, DEVICE, bipeft.derive(args.seed, number), causal=True)

    before = score("test")
    print(f"a Llama of {size:,} parameters; test accuracy before: {before:.2f}", flush=True)
    space = bipeft.Space(model, args.space, seed=args.seed)
    structure = bipeft.search(
        model, space, batches(tokens["train"][::2], 22), batches(tokens["train"][1::2], 23), 0.03,
        args.search_steps, args.warmup, "a tiny Llama", triggers=args.triggers, lr=LR, seed=args.seed,
        after_step=lambda _, line: line["step"] % 50 or print(
            f"search {line['step']}  loss {line['loss_train']:.3f}  beta {line['beta']:.2f}  kept {line['kept']}",
            flush=True))
    space.detach()
    for m in structure.modules:
        print(f"  {m['kind']:<12}{m['name']:<34}{m['rank'] or 'without a rank'}", flush=True)

    peft = bipeft.apply(model, structure, args.seed)
    bipeft.train(
        model, peft, batches(tokens["train"], 24), lambda: score("validation"), args.epochs, LR, seed=args.seed,
        after_step=lambda _, line: "score" not in line or print(
            f"train {line['step']}/{line['steps']}  loss {line['loss']:.3f}  validation {line['score']:.2f}",
            flush=True))
    after = score("test")
    print(f"test accuracy with {peft.size:,} parameters, {1e4 * peft.size / size:.0f} of 10,000: {after:.2f}")
    for example, (prompt, _) in zip(splits["test"][:4], tokens["test"]):
        made = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False, pad_token_id=0, use_cache=True)
        print(f"  {tokenizer.decode(made[0])}")
    return before, after


if __name__ == "__main__":
    main()
