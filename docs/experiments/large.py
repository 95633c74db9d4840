"""Memory and time of a search step on large backbones, on one GPU or several.   Needs GPUs.

    python docs/experiments/large.py --shapes large 3b 11b                          what fits, with which flags
    torchrun --nproc_per_node=2 docs/experiments/large.py --shapes large --share    against one process

Backbones have T5's published shapes and random weights, built on the GPU in bfloat16; space S2, float32
for Delta W, Theta and Phi; batches of random tokens, 128 in and 2 out. Each row is a search step at
its start (all modules there), the median of --repeats, with flags of docs/examples/scale.py; peaks are of all that torch took from the
GPU for it, the recording of graphs included. With --share a line of how long the all-reduces take,
each timed on its own between two synchronisations; --batch-size is the batch of all processes together.
"""

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import scale
from scale import bipeft

SHAPES = {"tiny": (64, 16, 128, 4, 2), "large": (1024, 64, 4096, 16, 24), "3b": (1024, 128, 16384, 32, 24),
          "11b": (1024, 128, 65536, 128, 24)}            # d_model, d_kv, d_ff, heads, layers of each stack
FLAGS = {"": {}, "--eager": {"eager": True}, "--accumulate 4": {"accumulate": 4},
         "--checkpointing": {"checkpointing": True},
         "--checkpointing --accumulate 4": {"checkpointing": True, "accumulate": 4}}        # of docs/examples/scale.py


def build(shape, device, dtype):
    """A T5 of random weights on the device, as the program has it."""
    d_model, d_kv, d_ff, heads, layers = SHAPES[shape]
    config = transformers.T5Config(vocab_size=32128, d_model=d_model, d_kv=d_kv, d_ff=d_ff, num_heads=heads,
                                   num_layers=layers, decoder_start_token_id=0, use_cache=False)
    with device:
        model = transformers.AutoModelForSeq2SeqLM.from_config(config, dtype=dtype)
    return model.train()


def batch_of(rows, args, device):
    """Random tokens, for all processes together."""
    ids = torch.randint(3, 30000, (rows, args.input), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
            "labels": torch.randint(3, 30000, (rows, 2), device=device)}


def processes():
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


class Clock:
    """Stands in for `dist.all_reduce` and adds up its time."""

    def __init__(self):
        self.function, self.seconds, self.count, self.numbers = dist.all_reduce, 0.0, 0, 0

    def __call__(self, tensor):
        torch.cuda.synchronize()
        started = time.perf_counter()
        self.function(tensor)
        torch.cuda.synchronize()
        self.seconds, self.count, self.numbers = (
            self.seconds + time.perf_counter() - started, self.count + 1, self.numbers + tensor.numel())


def measure(shape, flags, args, device):
    """{what: number} of one shape and one choice of flags."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = build(shape, device, torch.bfloat16)
    space = bipeft.Space(model, "s2")
    settings = scale.Settings(budget=int(space.param_counts[:, -1].sum()) // 20, **FLAGS[flags])
    search = bipeft.Search(model, space, settings, 1000, 500, scale.choose_pass(settings, model, device))
    torch.manual_seed(0)
    batches, times = [batch_of(args.batch_size, args, device) for _ in range(3)], []
    for _ in range(2 + args.repeats):                      # the first runs as it is, the second records
        started = time.perf_counter()
        search.step(*batches)
        times.append(time.perf_counter() - started)
    found = {"shape": shape, "flags": flags, "processes": processes(), "batch": args.batch_size,
             "backbone": bipeft.geometry(model)["parameters"], "modules": len(space), "step": median(times[2:]),
             "least": min(times[2:]), "most": max(times[2:])}
    if cuda:
        found |= {"allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
                  "reserved_gib": torch.cuda.max_memory_reserved() / 2**30}
    if processes() > 1 and cuda:
        dist.all_reduce = clock = Clock()
        for _ in range(args.repeats):
            search.step(*batches)
        dist.all_reduce = clock.function
        found |= {"reduce_ms": 1e3 * clock.seconds / args.repeats, "reduces": clock.count / args.repeats,
                  "reduce_mib": 4 * clock.numbers / args.repeats / 2**20}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["large"], choices=SHAPES)
    parser.add_argument("--flags", nargs="+", default=list(FLAGS), choices=FLAGS)
    parser.add_argument("--share", action="store_true", help="batch as it is and for each process, no other flags")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, first = bipeft.choose_device("cuda:0" if cuda else "cpu"), True
    if dist.is_torchelastic_launched():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        first = dist.get_rank() == 0
        sys.stdout = sys.stdout if first else open(os.devnull, "w")
        device = bipeft.choose_device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
    print("| backbone | flags | processes | batch | step, ms | least to most | GiB allocated | GiB reserved | all-reduce |\n"
          + "| --- " * 9 + "|", flush=True)
    sizes = [args.batch_size, args.batch_size * processes()] if args.share else [args.batch_size]
    for shape in args.shapes:
        for flags in [""] if args.share else args.flags:
            for args.batch_size in dict.fromkeys(sizes):
                try:
                    x = measure(shape, flags, args, device)
                except torch.OutOfMemoryError:
                    print(f"| {shape} | {flags} | does not fit |", flush=True)
                    continue
                finally:
                    gc.collect()
                print(f"| {shape}, {x['backbone'] / 1e9:.2f} G | {flags} | {x['processes']} | {x['batch']} | "
                      f"{1e3 * x['step']:.0f} | {1e3 * x['least']:.0f}–{1e3 * x['most']:.0f} | "
                      f"{x.get('allocated_gib', 0):.1f} | {x.get('reserved_gib', 0):.1f} | "
                      + (f"{x['reduces']:.0f} of {x['reduce_mib']:.0f} MiB, {x['reduce_ms']:.1f} ms |"
                         if "reduce_ms" in x else "|"), flush=True)
                if args.out and first:
                    with args.out.open("a") as file:
                        file.write(json.dumps({**x, "device": str(device), "torch": torch.__version__}) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()
        os._exit(0)                                        # graphs and NCCL may wait for each other at the end


if __name__ == "__main__":
    main()
