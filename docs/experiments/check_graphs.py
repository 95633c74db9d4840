"""A search with CUDA graphs gives what one without them gives.   Needs a GPU; the project's packages.

    python docs/experiments/check_graphs.py --model DIR [--space all]

Runs the same search twice on random batches, prints the largest differences of Theta, Phi and s-bar
after every step, whether the structures agree, and the seconds a step takes each way.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bipeft


def search(model, space_name, batches, graphs, steps):
    """(structure, [(theta, phi, s-bar) after each step], seconds of each step)."""
    space, states, times = bipeft.Space(model, space_name, seed=0), [], [time.perf_counter()]

    def after_step(run, line):
        states.append([x.detach().clone() for x in (run.theta, run.phi, run.smoothed)])
        torch.cuda.synchronize()
        times.append(time.perf_counter())
    budget = int(space.param_counts[:, -1].sum()) // 20
    run_pass = bipeft.CudaGraphs() if graphs else bipeft.forward_backward
    structure = bipeft.search(model, space, batches[:13], batches[13:], budget, steps, steps // 3, after_step=after_step,
                              run_pass=run_pass, triggers=steps // 3, lr=1e-3)
    space.detach()
    return structure, states, [b - a for a, b in zip(times, times[1:])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--space", default="all")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    model, _ = bipeft.load_backbone(args.model, args.dtype, torch.device("cuda"), 0)
    generator = torch.Generator().manual_seed(0)
    tokens = [(torch.randint(3, 3000, (int(n),), generator=generator).tolist() + [1],
               torch.randint(3, 3000, (2,), generator=generator).tolist() + [1])
              for n in torch.randint(5, 125, (960,), generator=generator)]
    batches = list(bipeft.Batches(tokens, 32, "cuda"))
    with_graphs, without = (search(model, args.space, batches, graphs, args.steps) for graphs in (True, False))
    for step in range(0, args.steps, max(1, args.steps // 10)):
        if step < min(len(with_graphs[1]), len(without[1])):
            print(f"step {step + 1}: largest differences of Theta, Phi, s-bar:",
                  *(f"{float((a - b).abs().max()):.2e}" for a, b in zip(with_graphs[1][step], without[1][step])))
    same = with_graphs[0].modules == without[0].modules
    a, b = ({(m["name"], m["kind"]): m["rank"] for m in s[0].modules} for s in (with_graphs, without))
    print(f"structures {'agree' if same else f'differ in {len(a.items() ^ b.items())} entries'}: "
          f"{len(a)} and {len(b)} modules, steps {len(with_graphs[1])} and {len(without[1])}")
    for name, seconds in (("graphs", with_graphs[2]), ("eager", without[2])):
        print(f"{name}: median step {1e3 * sorted(seconds)[len(seconds) // 2]:.1f} ms, whole search {sum(seconds):.1f} s")


if __name__ == "__main__":
    main()
