"""Kill it anywhere: does a run killed by SIGKILL, and started again, end as one never killed?

    python docs/experiments/kill.py --workers 2                         the toy, killed in 20 runs
    python docs/experiments/kill.py --times 2 -- --task toy --epochs 1 --search-epochs 1 --triggers 5
    python docs/experiments/kill.py --times 5 -- --task rte --model ../shared/t5-tiny --data-dir ../shared/glue \\
        --budget 5e-3 --search-epochs 1 --warmup-epochs 0 --triggers 5 --epochs 1 --max-length 32 --batch-size 64

Needs no more than bipeft.py does. What follows `--` goes to it (default --task toy). It runs once undisturbed, the
reference; then each run is killed at a random moment: the odd ones anywhere after their start, the even ones after
their first checkpoint, while a file is being written, which is when their folder holds a temporary one (its name
ends in .new). Every third is killed in writing once more. The same command then goes on to the end, where
structure.json and peft.safetensors must be the reference's byte for byte, search.jsonl and metrics.json but for their
clocks, and no other file may be there. With `--then 100` the last process saves as often as by default, and so
overwrites less of what the killed one left. Prints a line a run; exit code 1 if one differs: all is then kept.
"""

import argparse
import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

PROGRAM = Path(__file__).resolve().parents[2] / "bipeft.py"
CLOCKS = ("seconds", "time", "search_seconds", "train_seconds", "ratio")         # these may differ


def start(arguments, folder, save_every):
    """The program as a process of one thread; what it prints is added to <folder>.txt."""
    with open(f"{folder}.txt", "a") as said:
        return subprocess.Popen([sys.executable, str(PROGRAM), *arguments, "--out", str(folder), "--save-every",
                                 str(save_every)], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=said,
                                stderr=subprocess.STDOUT)


def temporary(folder):
    """The name of the temporary file in a run's folder, or None."""
    return next((name for name in os.listdir(folder) if name.endswith(".new")), None)


def has_written(folder, since):
    """Whether a run's folder has a checkpoint of after a moment."""
    checkpoint = folder / "checkpoint.pt"
    return checkpoint.exists() and checkpoint.stat().st_mtime > since


def kill(process, folder, moment, in_writing):
    """SIGKILL, `moment` seconds after the start; in_writing: after the first write, once a file is being written.

    Returns (the exit code, below 0 if it came before the end; the file that was being written or None).
    """
    since = time.time()
    while in_writing and process.poll() is None and not has_written(folder, since):
        time.sleep(0.005)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        while in_writing and process.poll() is None:
            if temporary(folder):                               # under 1 ms: stop the process, then look again
                process.send_signal(signal.SIGSTOP)
                time.sleep(0.01)
                if temporary(folder):
                    break
                process.send_signal(signal.SIGCONT)
    process.kill()
    code, left = process.wait(), temporary(folder) if folder.is_dir() else None
    return code, left if left and (folder / left).stat().st_mtime > since else None        # an older kill's otherwise


def position(folder):
    """Where a run stands: the phase and step of its checkpoint, from which it must go on."""
    if not (folder / "checkpoint.pt").exists():
        return "its end" if (folder / "metrics.json").exists() else "the start"
    try:
        stored = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
    except Exception:
        return "a checkpoint that can't be read"
    state = stored["state"] or {}                               # none: no step of this phase is in it yet
    return f"{stored['phase']} {state.get('step', state.get('steps_done', 0))}"


def content(path):
    """What a file holds, in parts to compare: the whole, or value by value without the clocks."""
    if path.is_dir():
        return [file.read_bytes() for file in sorted(path.iterdir())]
    if path.name not in ("search.jsonl", "metrics.json"):
        return [path.read_bytes()]
    records = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    return [f"{key} {value} of line {number}" for number, record in enumerate(records, 1)
            for key, value in json.loads(record).items() if key not in CLOCKS]


def difference(folder, reference):
    """The first thing in which a finished run differs from the reference, in words, or None."""
    there, due = (sorted(os.listdir(path)) for path in (folder, reference))
    if there != due:
        return f"it holds {', '.join(there)} instead of {', '.join(due)}"
    for name in due:
        for own, other in itertools.zip_longest(content(folder / name), content(reference / name)):
            if own != other:
                return f"{name} has " + ("other bytes" if isinstance(own, bytes) else f"{own} instead of {other}")
    return None


def trial(arguments, folder, reference, kills, save_every, then):
    """One run, killed at each of `kills`, pairs (moment, in_writing), and gone on with to its end.

    save_every, then: --save-every of the killed processes, and of the last.   Returns (where it was killed, how often
    in writing, the difference or None); the first is empty if it ended before it could be killed.
    """
    where, writing, said = [], 0, Path(f"{folder}.txt")
    for moment, in_writing in kills:
        code, name = kill(start(arguments, folder, save_every), folder, moment, in_writing)
        if code < 0:
            where.append(f"{moment:.1f} s after the {'first write' if in_writing else 'start'}, "
                         f"{f'writing {name}, ' if name else ''}goes on from {position(folder)}")
            writing += name is not None
        elif code > 0:
            return where or ["never"], writing, f"exit code {code} with no kill, see {said}"
    if not where:
        return where, writing, None
    due, before = position(folder), len(said.read_text())
    code = start(arguments, folder, then).wait()
    text = said.read_text()[before:]
    if code:
        return where, writing, f"exit code {code}, see {said}"
    if {"the start": "", "its end": "nothing to do"}.get(due, "going on from") not in text:
        return where, writing, f"it did not go on from {due}"
    return where, writing, difference(folder, reference)


def one_run(number, args, out, duration, span):
    """Draws until a kill comes before the end, and prints it.   Returns (kills, in writing, difference)."""
    rng, where, folder = random.Random(f"{args.seed} {number}"), [], out / f"run-{number}"
    while not where:
        shutil.rmtree(folder, ignore_errors=True)
        in_writing = number % 2 == 0
        kills = [(rng.uniform(0, span if in_writing else duration), in_writing)]
        kills += [(rng.uniform(0, span / 2), True)] if number % 3 == 0 else []
        where, writing, differs = trial(args.arguments, folder, out / "reference", kills, args.save_every, args.then)
    print(f"{number:2}  killed " + ", then ".join(where) + f": {differs or 'same'}", flush=True)
    return len(where), writing, differs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20, help="runs to kill (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--save-every", type=int, default=3, help="steps between checkpoints (default 3)")
    parser.add_argument("--then", type=int, help="--save-every of the last process, not killed (default: the same)")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side (default 1)")
    parser.add_argument("--out", type=Path, help="an empty folder (default: a temporary one)")
    parser.add_argument("arguments", nargs="*", help="of bipeft.py, after -- (default --task toy)")
    args = parser.parse_args()
    args.arguments = args.arguments or ["--task", "toy"]
    args.then = args.save_every if args.then is None else args.then
    out = args.out or Path(tempfile.mkdtemp(prefix="kill-"))
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        parser.error(f"--out {out} must be empty")
    started = time.monotonic()
    if start(args.arguments, out / "reference", args.save_every).wait():
        sys.exit((out / "reference.txt").read_text())
    duration = time.monotonic() - started
    metrics = json.loads((out / "reference" / "metrics.json").read_text())
    span = metrics["search_seconds"] + metrics["train_seconds"]
    print(f"{' '.join(args.arguments)}: {duration:.1f} s undisturbed, {span:.1f} s of them the steps; in {out}",
          flush=True)
    with ThreadPoolExecutor(args.workers) as pool:
        work = functools.partial(one_run, args=args, out=out, duration=duration, span=span)
        killed, writing, differs = zip(*pool.map(work, range(1, args.times + 1)))
    print(f"{sum(writing)} of {sum(killed)} kills came while a file was being written")
    print(f"{differs.count(None)} of {args.times} the same")
    if not args.out and not any(differs):
        shutil.rmtree(out)
    sys.exit(any(differs))


if __name__ == "__main__":
    main()
