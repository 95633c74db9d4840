"""Time and memory of a search step and of a re-training step, beside a LoRA step of Hugging Face peft.

    python docs/experiments/speed/benchmark.py --shapes t5-large smollm2 llama-1b            on a GPU
    python docs/experiments/speed/benchmark.py --shapes t5-11b --flags --accumulate 4 --checkpointing
    python docs/experiments/speed/benchmark.py --shapes t5-tiny --length 32 --repeats 2      on a CPU

Backbones have published shapes and random weights, bfloat16 on a GPU; batches are 32 rows of random tokens without
padding, with two target tokens for a T5 and labels on the last four of a Llama's. Rows are medians of single calls, the
device synchronised after each, with the least and the most; three calls come before, in which CUDA graphs are recorded.
A search step has all modules of S2 there; re-training has a random structure of 1.39 of 10,000. Peaks are what torch
allocated and reserved for the row.

--flags is the last flag: what follows are flags of docs/examples/scale.py, for the search step.
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


def build(config):
    """A frozen backbone of random weights."""
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        auto = transformers.AutoModelForSeq2SeqLM
    with DEVICE:
        model = auto.from_config(config, dtype=torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)
    return model.train().requires_grad_(False)


def batch_of(config, length, seed):
    """Random tokens; a Llama's logits are computed where one predicts a label, as by `bipeft.collate`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 500, (32, length), generator=generator).tolist()
    if config.is_encoder_decoder:
        return bipeft.collate([(row, row[:2]) for row in ids], DEVICE)
    return bipeft.collate([(row[:-4], row[-4:]) for row in ids], DEVICE, causal=True)


def begin():
    """Frees what nothing holds any more; peaks count from here on."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(what, repeats, step):
    """A row of single calls."""
    ends = []
    for _ in range(4 + repeats):
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
    show(what, ends)


def show(what, ends):
    """A row of the milliseconds between the ends of calls, without the first."""
    taken = [1e3 * (after - before) for before, after in zip(ends[3:], ends[4:])]
    peak = "| |"
    if DEVICE.type == "cuda":
        peak = (f"{torch.cuda.max_memory_allocated() / 2**30:.2f} | "
                f"{torch.cuda.max_memory_reserved() / 2**30:.2f} |")
    print(f"| {what} | {median(taken):.1f} | {min(taken):.1f}–{max(taken):.1f} | {peak}", flush=True)


def search_step(shape, model, settings, batches, repeats, flags):
    """A row of a search step with all modules there.   Returns a random structure."""
    space = bipeft.Space(model, "s2")
    search = bipeft.Search(model, space, settings, 10**6, 10**6, scale.choose_pass(settings, model, DEVICE))
    title = " ".join([f"{shape} | search step", *flags])
    measure(f"{title}, {len(space)} modules", repeats, lambda: search.step(*batches))
    n = len(space)
    drawn = torch.rand(n, generator=torch.Generator().manual_seed(0)).tolist()
    kept, choice = bipeft.fill_budget(drawn, space.param_counts.tolist(), [True] * n, [1] * n, search.budget)
    space.detach()
    return space.structure(kept, choice, search.budget)


def training_step(shape, model, settings, structure, batch, repeats):
    """A row of a re-training step; `train` has the loop."""
    attached = bipeft.apply(model, structure)
    ends = []
    bipeft.train(model, attached, [batch] * (4 + repeats), lambda: 0.0, 1, 1e-3,
                 run_pass=scale.choose_pass(settings, model, DEVICE),
                 after_step=lambda *_: ends.append(time.perf_counter()))
    show(f"{shape} | re-training step, {len(attached)} modules, {attached.size:,} parameters", ends)


def lora_step(shape, batch, repeats):
    """A row of a step of peft's LoRA, r = 8 on q and v of every attention, eager, as its user would write it."""
    names = ["q", "v"] if SHAPES[shape].is_encoder_decoder else ["q_proj", "v_proj"]
    model = peft.get_peft_model(build(SHAPES[shape]), peft.LoraConfig(r=8, target_modules=names))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)

    def step():
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    measure(f"{shape} | LoRA step of peft, eager, {sum(p.numel() for p in weights):,} parameters", repeats, step)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["t5-large"], choices=SHAPES)
    parser.add_argument("--length", type=int, default=128, help="tokens of an input (128)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[])
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print("| backbone | what | median, ms | least to most | GiB allocated | reserved |\n"
          "| --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    for shape in args.shapes:
        batches = [batch_of(SHAPES[shape], args.length, seed) for seed in range(3)]
        budget = "2e-3" if shape == "t5-tiny" else "1.39e-4"
        (settings,) = bipeft.parse(["--budget", budget, *args.flags], scale.Settings)
        begin()
        model = build(SHAPES[shape])
        structure = search_step(shape, model, settings, batches, args.repeats, args.flags)
        begin()
        training_step(shape, model, settings, structure, batches[0], args.repeats)
        model = None
        begin()
        if not args.flags:
            lora_step(shape, batches[0], args.repeats)


if __name__ == "__main__":
    main()
