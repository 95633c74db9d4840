"""Time and memory of a search step and a re-training step on a Llama's shape, beside peft's LoRA.   Needs peft.

    python docs/experiments/causal_benchmark.py                       about a billion parameters: needs a GPU
    python docs/experiments/causal_benchmark.py --shape tiny --device cpu --batch-size 4 --length 16 --repeats 2

The backbone has random weights (bfloat16 on a GPU), batches are random tokens with labels on the last four. Three
steps come before each median, in which graphs are recorded; LoRA is eager, as a user would write it. On a GPU a row has
the peak of what torch allocated and reserved; on a CPU there are neither graphs nor peaks.
"""

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bipeft

SHAPES = {"1b": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                     num_attention_heads=32, num_key_value_heads=8, head_dim=64),       # 1,235,814,400 parameters
          "tiny": dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, head_dim=16)}


def build(shape, device):
    """A frozen Llama of random weights on the device."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, use_cache=False)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return model.train().requires_grad_(False)


def batch_of(args, seed, vocabulary, device):
    """Random tokens; the last four of each row are what the loss is on."""
    ids = torch.randint(3, vocabulary, (args.batch_size, args.length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :-4] = -100
    return {key: t.to(device) for key, t in
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}.items()}


def wait(device):
    """For all that the device has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def forget(device):
    """Frees what nothing holds any more, and the peaks."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def timed(step, args, device):
    """Milliseconds of single calls, after three that don't count."""
    taken = []
    for _ in range(3 + args.repeats):
        wait(device)
        started = time.perf_counter()
        step()
        wait(device)
        taken.append(1e3 * (time.perf_counter() - started))
    return taken[3:]


def row(title, taken, device):
    """Prints a measurement."""
    peak = ""
    if device.type == "cuda":
        peak = "  {:.1f} GiB allocated, {:.1f} reserved".format(
            torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30)
    print(f"{title:<64}{statistics.median(taken):9.1f} ms ({min(taken):.1f}-{max(taken):.1f}){peak}", flush=True)


def lora(model, batches, args, device):
    """A step of peft's LoRA, r = 8 on q and v."""
    import peft
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    weights = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)

    def step():
        adapted(**batches[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    forget(device)
    row(f"peft's LoRA, eager, {sum(p.numel() for p in weights):,} parameters", timed(step, args, device), device)


def new_pass(device):
    """Who computes losses and gradients from now on."""
    return bipeft.CudaGraphs() if device.type == "cuda" else bipeft.forward_backward


def search(model, space_name, batches, args, device):
    """A search step with all modules there.   Returns a structure of --budget parameters, of random modules."""
    forget(device)
    space = bipeft.Space(model, space_name)
    found = bipeft.Search(model, space, bipeft.Settings(budget=args.budget), 1000, 900, new_pass(device))
    title = f"search step, {space_name}: {len(space)} modules, {int(space.param_counts[:, -1].sum()):,} parameters"
    row(title, timed(lambda: found.step(*batches), args, device), device)
    n, counts = len(space), space.param_counts.tolist()
    kept, choice = bipeft.fill_budget(torch.rand(n).tolist(), counts, [True] * n, [1] * n, args.budget)
    space.detach()
    return space.structure(kept, choice, args.budget)


def retraining(model, structure, batches, args, device):
    """A step of re-training, timed between the ends of steps, since `train` has the loop."""
    forget(device)
    peft, ends = bipeft.apply(model, structure), []
    bipeft.train(model, peft, [batches[0]] * (4 + args.repeats), lambda: 0.0, 1, 1e-3, run_pass=new_pass(device),
                 after_step=lambda *_: ends.append(time.perf_counter()))
    taken = [1e3 * (after - before) for before, after in zip(ends[3:], ends[4:])]
    row(f"re-training step, {len(structure.modules)} modules, {structure.parameters:,} parameters", taken, device)
    peft.detach()


def main():
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="1b", choices=SHAPES)
    parser.add_argument("--device", default="cuda")
    for flag, default in {"batch-size": 32, "length": 128, "repeats": 20, "budget": 200_000}.items():
        parser.add_argument(f"--{flag}", type=int, default=default, help="(%(default)s)")
    args = parser.parse_args()
    if args.shape == "tiny":
        args.budget = min(args.budget, 5000)
    transformers.logging.set_verbosity_error()
    device = bipeft.choose_device(args.device)
    batches = [batch_of(args, seed, SHAPES[args.shape]["vocab_size"], device) for seed in range(3)]
    model = build(args.shape, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    print(f"{name}; {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    lora(model, batches, args, device)
    for space_name in ("s2", "s1"):                  # peft leaves its layers in a model: a new one for each
        model = None
        forget(device)
        model = build(args.shape, device)
        bipeft.fuse_norms(model)
        structure = search(model, space_name, batches, args, device)
        if space_name == "s2":
            retraining(model, structure, batches, args, device)


if __name__ == "__main__":
    main()
