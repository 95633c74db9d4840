"""Time and memory of a search step and of a re-training step, beside a LoRA step of Hugging Face peft.

    python docs/experiments/speed/benchmark.py --shapes t5-large smollm2 llama-1b            on a GPU
    python docs/experiments/speed/benchmark.py --shapes t5-11b --flags --accumulate 4 --checkpointing
    python docs/experiments/speed/benchmark.py --shapes t5-tiny llama-tiny --repeats 2       on a CPU

Backbones have published shapes and random weights, bfloat16 on a GPU; batches are 32 rows of random tokens without
padding, with two target tokens for a T5 and labels on the last four of a Llama's. Rows are medians of single calls, the
device synchronised before and after each, with the least and the most; three calls come before, in which CUDA graphs
are recorded. A search step has all modules of S2 there; re-training has a random structure of 1.39 of 10,000. Peaks are
what torch allocated and reserved since the row began. Needs peft for its row alone.

--flags is the last flag: what follows are flags of docs/examples/scale.py, for the search step.
"""

import argparse
import gc
import importlib.util
import sys
import time
from pathlib import Path
from statistics import median

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import scale
from scale import bipeft


def t5(d_model, d_kv, d_ff, heads, layers):
    """A T5's config."""
    return transformers.T5Config(vocab_size=32128, d_model=d_model, d_kv=d_kv, d_ff=d_ff, num_heads=heads,
                                 num_layers=layers, decoder_start_token_id=0, use_cache=False)


def llama(words, width, inner, layers, heads, groups, head):
    """A Llama's config."""
    return transformers.LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, head_dim=head,
        num_attention_heads=heads, num_key_value_heads=groups, tie_word_embeddings=True, use_cache=False)


SHAPES = {"t5-tiny": t5(64, 16, 128, 4, 2), "t5-large": t5(1024, 64, 4096, 16, 24),
          "t5-11b": t5(1024, 128, 65536, 128, 24), "llama-tiny": llama(512, 64, 128, 2, 4, 2, 16),
          "smollm2": llama(49152, 576, 1536, 30, 9, 3, 64), "llama-1b": llama(128256, 2048, 8192, 16, 32, 8, 64)}


def build(shape, device):
    """A frozen backbone of random weights on the device."""
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM
    if SHAPES[shape].is_encoder_decoder:
        auto = transformers.AutoModelForSeq2SeqLM
    with device:
        model = auto.from_config(SHAPES[shape], dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return model.train().requires_grad_(False)


def batch_of(shape, length, seed, device):
    """Random tokens; a Llama's logits are computed where one predicts a label, as by `bipeft.collate`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 500, (32, length), generator=generator).tolist()
    if SHAPES[shape].is_encoder_decoder:
        return bipeft.collate([(row, row[:2]) for row in ids], device)
    return bipeft.collate([(row[:-4], row[-4:]) for row in ids], device, causal=True)


def begin(device):
    """Frees what nothing holds any more; peaks count from here on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def timed(device, repeats, step):
    """Milliseconds of single calls."""
    taken = []
    for _ in range(3 + repeats):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - started))
    return taken[3:]


def show(shape, device, what, taken):
    """A row of milliseconds."""
    peak = "| |"
    if device.type == "cuda":
        peak = (f"{torch.cuda.max_memory_allocated() / 2**30:.2f} | "
                f"{torch.cuda.max_memory_reserved() / 2**30:.2f} |")
    print(f"| {shape} | {what} | {median(taken):.1f} | {min(taken):.1f}–{max(taken):.1f} | {peak}", flush=True)


def lora(shape, device, batch, repeats):
    """A step of peft's LoRA, r = 8 on q and v of every attention, eager, as its user would write it."""
    import peft
    names = ["q", "v"] if SHAPES[shape].is_encoder_decoder else ["q_proj", "v_proj"]
    begin(device)
    model = peft.get_peft_model(build(shape, device), peft.LoraConfig(r=8, target_modules=names))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)

    def step():
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    taken = timed(device, repeats, step)
    show(shape, device, f"LoRA step of peft, eager, {sum(p.numel() for p in weights):,} parameters", taken)


def search(shape, device, batches, repeats, flags):
    """A search step with all modules there.   Returns the backbone, bare, and a random structure for it."""
    begin(device)
    budget = "2e-3" if "tiny" in shape else "1.39e-4"
    (settings,) = bipeft.parse(["--budget", budget, *flags], scale.Settings)
    model = build(shape, device)
    space = bipeft.Space(model, "s2")
    found = bipeft.Search(model, space, settings, 10**6, 10**6, scale.choose_pass(settings, model, device))
    taken = timed(device, repeats, lambda: found.step(*batches))
    show(shape, device, " ".join(["search step", *flags]) + f", {len(space)} modules", taken)
    n = len(space)
    drawn = torch.rand(n, generator=torch.Generator().manual_seed(0)).tolist()
    kept, choice = bipeft.fill_budget(drawn, space.param_counts.tolist(), [True] * n, [1] * n, found.budget)
    space.detach()
    return model, space.structure(kept, choice, found.budget)


def retraining(shape, device, model, structure, batch, repeats, flags):
    """A step of re-training, timed between the ends of steps, since `train` has the loop."""
    begin(device)
    (settings,) = bipeft.parse(flags, scale.Settings)
    peft = bipeft.apply(model, structure)
    ends = []
    bipeft.train(model, peft, [batch] * (4 + repeats), lambda: 0.0, 1, 1e-3,
                 run_pass=scale.choose_pass(settings, model, device),
                 after_step=lambda *_: ends.append(time.perf_counter()))
    taken = [1e3 * (after - before) for before, after in zip(ends[3:], ends[4:])]
    what = f"re-training step, {len(structure.modules)} modules, {structure.parameters:,} parameters"
    show(shape, device, what, taken)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["t5-large"], choices=SHAPES)
    parser.add_argument("--length", type=int, default=128, help="tokens of an input (128)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[])
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    device = bipeft.choose_device("auto")
    print("| backbone | what | median, ms | least to most | GiB allocated | reserved |\n"
          "| --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    for shape in args.shapes:
        batches = [batch_of(shape, args.length, seed, device) for seed in range(3)]
        model, structure = search(shape, device, batches, args.repeats, args.flags)
        retraining(shape, device, model, structure, batches[0], args.repeats, args.flags)
        model = None
        if device.type == "cuda" and not args.flags:
            search(shape, device, batches, args.repeats, ["--eager"])
        if importlib.util.find_spec("peft") and not args.flags:
            lora(shape, device, batches[0], args.repeats)


if __name__ == "__main__":
    main()
