"""Time and memory of a search step and of a re-training step, beside a LoRA step of Hugging Face peft.

    python docs/experiments/speed/benchmark.py --shapes t5-large smollm2 llama-1b            on a GPU
    python docs/experiments/speed/benchmark.py --shapes t5-11b --flags --accumulate 4 --checkpointing
    torchrun --nproc_per_node=2 docs/experiments/speed/benchmark.py --shapes t5-large        a batch for all, shared
    python docs/experiments/speed/benchmark.py --shapes t5-tiny llama-tiny --repeats 2       on a CPU

Backbones have published shapes and random weights, bfloat16 on a GPU; batches are random tokens without padding, with
two target tokens for a T5 and labels on the last four of a Llama's. Rows are medians of single calls, the device
synchronised before and after each, with the least and the most; three calls come before, in which CUDA graphs are
recorded. A search step has all modules of S2 there; re-training has a random structure of 1.39 of 10,000. Peaks are
what torch allocated and reserved since the row began. Needs peft for its row alone.

--flags is the last flag: what follows are flags of docs/examples/scale.py, for the search step.
"""

import argparse
import functools
import gc
import importlib.util
import os
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
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
          "t5-3b": t5(1024, 128, 16384, 32, 24), "t5-11b": t5(1024, 128, 65536, 128, 24),
          "llama-tiny": llama(512, 64, 128, 2, 4, 2, 16), "smollm2": llama(49152, 576, 1536, 30, 9, 3, 64),
          "llama-1b": llama(128256, 2048, 8192, 16, 32, 8, 64)}


def build(shape, device):
    """A frozen backbone of random weights on the device."""
    torch.manual_seed(0)
    config = SHAPES[shape]
    auto = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        auto = transformers.AutoModelForSeq2SeqLM
    with device:
        model = auto.from_config(config, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return model.train().requires_grad_(False)


def batch_of(shape, args, seed, device):
    """Random tokens; a Llama's logits are computed where one predicts a label, as by `bipeft.collate`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 500, (args.batch_size, args.length), generator=generator).tolist()
    causal = not SHAPES[shape].is_encoder_decoder
    at = args.length - 4
    rows = [(row[:at], row[at:]) if causal else (row, row[:2]) for row in ids]
    return bipeft.collate(rows, device, causal)


class Rows:
    """Measures and prints."""

    def __init__(self, device):
        self.device = device
        self.cuda = device.type == "cuda"
        print("| backbone | what | median, ms | least to most | GiB allocated | reserved |\n"
              "| --- | --- | ---: | ---: | ---: | ---: |", flush=True)

    def wait(self):
        """For all that the device has been given."""
        if self.cuda:
            torch.cuda.synchronize()

    def begin(self):
        """Frees what nothing holds any more; peaks count from here on."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def timed(self, shape, what, step, repeats):
        """A row of single calls."""
        taken = []
        for _ in range(3 + repeats):
            self.wait()
            started = time.perf_counter()
            step()
            self.wait()
            taken.append(1e3 * (time.perf_counter() - started))
        self.row(shape, what, taken[3:])

    def row(self, shape, what, taken):
        """A row of milliseconds."""
        peak = "| |"
        if self.cuda:
            peak = (f"{torch.cuda.max_memory_allocated() / 2**30:.2f} | "
                    f"{torch.cuda.max_memory_reserved() / 2**30:.2f} |")
        print(f"| {shape} | {what} | {median(taken):.1f} | {min(taken):.1f}–{max(taken):.1f} | {peak}", flush=True)


def lora(rows, shape, batch, args):
    """A step of peft's LoRA, r = 8 on q and v of every attention, eager, as its user would write it."""
    import peft
    names = ["q", "v"] if SHAPES[shape].is_encoder_decoder else ["q_proj", "v_proj"]
    rows.begin()
    model = peft.get_peft_model(build(shape, rows.device), peft.LoraConfig(r=8, target_modules=names))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)

    def step():
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    rows.timed(shape, f"LoRA step of peft, eager, {sum(p.numel() for p in weights):,} parameters", step, args.repeats)


def search(rows, shape, batches, args, settings, title):
    """A search step with all modules there.   Returns the backbone, bare, and a random structure for it."""
    rows.begin()
    model = build(shape, rows.device)
    run_pass = scale.choose_pass(settings, model, rows.device)
    space = bipeft.Space(model, "s2")
    found = bipeft.Search(model, space, settings, 10**6, 10**6, run_pass)
    step = functools.partial(found.step, *batches)
    rows.timed(shape, f"search step{title}, {len(space)} modules", step, args.repeats)
    n = len(space)
    drawn = torch.rand(n, generator=torch.Generator().manual_seed(0)).tolist()
    kept, choice = bipeft.fill_budget(drawn, space.param_counts.tolist(), [True] * n, [1] * n, found.budget)
    space.detach()
    return model, space.structure(kept, choice, found.budget)


def retraining(rows, shape, model, structure, batch, args, settings):
    """A step of re-training, timed between the ends of steps, since `train` has the loop."""
    rows.begin()
    peft = bipeft.apply(model, structure)
    ends = []
    bipeft.train(model, peft, [batch] * (4 + args.repeats), lambda: 0.0, 1, 1e-3,
                 run_pass=scale.choose_pass(settings, model, rows.device),
                 after_step=lambda *_: ends.append(time.perf_counter()))
    taken = [1e3 * (after - before) for before, after in zip(ends[3:], ends[4:])]
    rows.row(shape, f"re-training step, {len(structure.modules)} modules, {structure.parameters:,} parameters", taken)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["t5-large"], choices=SHAPES)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=128, help="tokens of an input (128)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[])
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    device = bipeft.choose_device("auto")
    if dist.is_torchelastic_launched():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = bipeft.choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        sys.stdout = sys.stdout if dist.get_rank() == 0 else open(os.devnull, "w")
    rows = Rows(device)
    for shape in args.shapes:
        budget = 1.39e-4 if "tiny" not in shape else 2e-3
        (settings,) = bipeft.parse(["--budget", str(budget), *args.flags], scale.Settings)
        batches = [batch_of(shape, args, seed, device) for seed in range(3)]
        title = " ".join(["", *args.flags])
        model, structure = search(rows, shape, batches, args, settings, title)
        retraining(rows, shape, model, structure, batches[0], args, settings)
        model = None
        if device.type == "cuda" and not settings.eager:
            (settings,) = bipeft.parse(["--budget", str(budget), "--eager"], scale.Settings)
            search(rows, shape, batches, args, settings, " --eager")
        if importlib.util.find_spec("peft") and not args.flags and not dist.is_initialized():
            lora(rows, shape, batches[0], args)
    if dist.is_initialized():
        dist.destroy_process_group()
        os._exit(0)                                        # graphs and NCCL may wait for each other at the end


if __name__ == "__main__":
    main()
