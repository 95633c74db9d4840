"""A search with CUDA graphs gives what one without them gives.   Needs a GPU; the project's packages.

    python docs/experiments/speed/check_graphs.py --model DIR [--space all]

Runs the same search twice on random batches, and prints the largest differences of Theta, Phi and s-bar after every
sixth step, whether the structures agree, and the milliseconds a step takes each way.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
import bipeft

STEPS = 60


def search(model, space_name, batches, run_pass):
    """(modules found, (theta, phi, s-bar) after each step, milliseconds of a step)."""
    space, states, times = bipeft.Space(model, space_name, seed=0), [], []

    def after_step(run, line):
        states.append([x.detach().clone() for x in (run.theta, run.phi, run.smoothed)])
        torch.cuda.synchronize()
        times.append(time.perf_counter())

    budget = int(space.param_counts[:, -1].sum()) // 20
    structure = bipeft.search(model, space, batches[:13], batches[13:], budget, STEPS, STEPS // 3, lr=1e-3,
                              triggers=STEPS // 3, run_pass=run_pass, after_step=after_step)
    space.detach()
    modules = {(m["name"], m["kind"]): m["rank"] for m in structure.modules}
    return modules, states, 1e3 * statistics.median(b - a for a, b in zip(times, times[1:]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--space", default="all")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    model, _ = bipeft.load_backbone(args.model, "float32", torch.device("cuda"), 0)
    generator = torch.Generator().manual_seed(0)
    tokens = [(torch.randint(3, 3000, (int(n),), generator=generator).tolist() + [1],
               torch.randint(3, 3000, (2,), generator=generator).tolist() + [1])
              for n in torch.randint(5, 125, (960,), generator=generator)]
    batches = list(bipeft.Batches(tokens, 32, "cuda", causal=not model.config.is_encoder_decoder))
    graphs, graph_states, graph_time = search(model, args.space, batches, bipeft.CudaGraphs())
    eager, eager_states, eager_time = search(model, args.space, batches, bipeft.forward_backward)
    for step, (here, there) in list(enumerate(zip(graph_states, eager_states), 1))[::6]:
        differences = [f"{float((a - b).abs().max()):.2e}" for a, b in zip(here, there)]
        print(f"step {step}: largest differences of Theta, Phi, s-bar: {' '.join(differences)}")
    different = graphs.items() ^ eager.items()
    print(f"structures of {len(graphs)} and {len(eager)} modules differ in {len(different)} entries")
    print(f"median step: {graph_time:.1f} ms with graphs, {eager_time:.1f} ms without")


if __name__ == "__main__":
    main()
