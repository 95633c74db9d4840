"""Time and memory of a search step and of a re-training step, beside a LoRA step of Hugging Face peft.

    python docs/experiments/speed/benchmark.py --shape t5-large
    python docs/experiments/speed/benchmark.py --shape t5-11b --flags --accumulate 4
    python docs/experiments/speed/benchmark.py --shape t5-tiny --flags --budget 2e-3

Backbones have published shapes and random weights, bfloat16 on a GPU; batches are 32 rows of random tokens without
padding, with two target tokens for a T5 and labels on the last four of a Llama's. Rows are medians of single steps, the
device synchronised after each, with the least and the most; the first three, in which CUDA graphs are recorded, do not
count. A search step has all modules of S2 there. Peaks are what torch allocated and reserved for the row. --flags is
the last flag: what follows are flags of docs/examples/scale.py, --eager and --budget among them.
"""

import argparse
import gc
import sys
import time
from pathlib import Path
from statistics import median

import peft
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import scale
from scale import bipeft

DEVICE = bipeft.choose_device("auto")


def t5(d_model, d_kv, d_ff, heads, layers):
    """A T5's config."""
    return transformers.T5Config(vocab_size=32128, d_model=d_model, d_kv=d_kv, d_ff=d_ff, num_heads=heads,
                                 num_layers=layers, decoder_start_token_id=0, use_cache=False)


def llama(words, width, inner, layers, heads, groups):
    """A Llama's config; a head's width is 64."""
    return transformers.LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, head_dim=64,
        num_attention_heads=heads, num_key_value_heads=groups, tie_word_embeddings=True, use_cache=False)


SHAPES = {"t5-tiny": t5(64, 16, 128, 4, 2), "t5-large": t5(1024, 64, 4096, 16, 24),
          "t5-11b": t5(1024, 128, 65536, 128, 24), "smollm2": llama(49152, 576, 1536, 30, 9, 3),
          "llama-1b": llama(128256, 2048, 8192, 16, 32, 8)}


class Row:
    """A row of the table: the ends of steps are noted by `note`, an `after_step` of bipeft's."""

    def __init__(self):
        self.ends = []
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def note(self, *_):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def show(self, what):
        taken = [1e3 * (after - before) for before, after in zip(self.ends[2:], self.ends[3:])]
        peaks = "| |"
        if DEVICE.type == "cuda":
            allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            peaks = f"{allocated / 2**30:.2f} | {reserved / 2**30:.2f} |"
        print(f"| {what} | {median(taken):.1f} | {min(taken):.1f}–{max(taken):.1f} | {peaks}", flush=True)


def build(config):
    """A frozen backbone of random weights."""
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        auto = transformers.AutoModelForSeq2SeqLM
    with DEVICE:
        model = auto.from_config(config, dtype=torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)
    return model.train().requires_grad_(False)


def batch_of(config, length):
    """Random tokens; a Llama's logits are computed where one predicts a label, as by `bipeft.collate`."""
    ids = torch.randint(3, 500, (32, length)).tolist()
    if config.is_encoder_decoder:
        return bipeft.collate([(row, row[:2]) for row in ids], DEVICE)
    return bipeft.collate([(row[:-4], row[-4:]) for row in ids], DEVICE, causal=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="t5-large", choices=SHAPES)
    parser.add_argument("--length", type=int, default=128, help="tokens of an input (128)")
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[])
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    config = SHAPES[args.shape]
    model, batches = build(config), [batch_of(config, args.length) for _ in range(args.steps)]
    (settings,) = bipeft.parse(args.flags, scale.Settings)
    print(f"| {args.shape} | median, ms | least to most | GiB allocated | reserved |")
    print("| --- | ---: | ---: | ---: | ---: |")

    row, space = Row(), bipeft.Space(model, "s2")
    structure = bipeft.search(model, space, batches, batches, settings.budget, args.steps, args.steps,
                              run_pass=scale.choose_pass(settings, model, DEVICE), after_step=row.note)
    row.show(f"search step, {len(space)} modules")
    space.detach()

    row, attached = Row(), bipeft.apply(model, structure)
    bipeft.train(model, attached, batches, lambda: 0.0, 1, 1e-3,
                 run_pass=scale.choose_pass(settings, model, DEVICE), after_step=row.note)
    row.show(f"re-training step, {len(attached)} modules, {attached.size:,} parameters")
    attached.detach()

    row = Row()                            # eager, as its user would write it
    names = ["q", "v"] if config.is_encoder_decoder else ["q_proj", "v_proj"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=names))
    weights = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    for batch in batches:
        optimizer.zero_grad()
        wrapped(**batch).loss.backward()
        optimizer.step()
        row.note()
    row.show(f"LoRA step of peft, r = 8 on q and v, {sum(p.numel() for p in weights):,} parameters")


if __name__ == "__main__":
    main()
