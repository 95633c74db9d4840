"""How long a search step takes, beside a frozen backbone and Hugging Face's LoRA, in one process.

    python docs/experiments/benchmark.py --out benchmark.json              T5-large's shape, on a GPU
    python docs/experiments/benchmark.py --sections "" --sweep             linear in N and in the batch?
    python docs/experiments/benchmark.py --model ../shared/t5-tiny --threads 1         on a CPU

Prints a markdown table, each row as soon as it is measured, and writes all of it as JSON to --out.
Times are medians of single calls after warm-ups, the device synchronised before and after each.
Batches are random tokens without padding (e's are `bipeft.Batches`, which pads targets to 4 on a GPU).

    a  The frozen backbone in training mode: forward, loss, and the gradient for both stacks' input
       embeddings, which are leaves here, so that backward goes through every layer and computes no
       weight's gradient. Eager; on a GPU also as a CUDA graph.
    b  A training step of peft's LoRA, r = 8 on every q and v, AdamW, eager. Needs the package peft.
       Measured before and after everything of ours; ratios are to the median of both.
    c  Our three passes apart, in turns with d. "The rest" of a step (noise, Eq. 1-5, optimizers): a
       step less its passes, and directly, as a step whose passes return what they returned before.
    d  `Search.step` at the start; half-way (half of the modules gone, half of the open ranks fixed);
       at the end (a tenth left, three ranks open). Which ones is drawn at random; a gate is open half
       of the time. "Recording" is the time of the first two steps less that of two later ones: a
       CUDA graph is recorded at the second.
    e  A step of `bipeft.train`, on a structure of --budget parts per ten thousand of the backbone.
    f  Peak memory on a GPU, since the model was built, of a, b, d at the start (recording too), and e.
    g  The time of `bipeft.predict` (without a tokenizer's decoding) and of training on as many examples.

--sweep takes a search step at the start at several depths, and at several batch sizes.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import math
import sys
import time
import types
import warnings
from pathlib import Path
from statistics import median

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bipeft

SHAPES = {"large": {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
          "tiny": {"d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 2, "num_heads": 4}}
PASSES = "ΔW", "Θ", "Φ"
TIMES = {"start": None, "half-way": (0.5, 0.5), "end": (0.1, 3)}         # modules kept, ranks left open


class Bench:
    """The settings, what was measured so far, and what every section needs."""

    def __init__(self, args):
        self.args, self.device, self.cuda = args, torch.device(args.device), torch.device(args.device).type == "cuda"
        self.graphs = self.cuda and not args.eager
        self.ms, self.gib, self.syncs = {}, {}, {}
        name = torch.cuda.get_device_name(self.device) if self.cuda else f"CPU, {torch.get_num_threads()} threads"
        told = {key: value for key, value in vars(args).items() if key != "out"}
        facts = {**told, "device": name, "torch": torch.__version__, "transformers": transformers.__version__,
                 "graphs": self.graphs}
        self.stored = {"facts": facts, "rows": [], "peak_gib": self.gib, "host_syncs": self.syncs}
        print(f"{name}; torch {torch.__version__}, transformers {transformers.__version__}; {args.model or args.shape}, "
              f"{args.dtype}, batch {args.batch_size}, {args.input} input and {args.target} target tokens, space "
              f"{args.space}; ours {'as CUDA graphs' if self.graphs else 'eager'}{', norms fused' if self.cuda else ''}\n\n"
              "| | what | median, ms | least to most | |\n| --- | --- | ---: | ---: | --- |", flush=True)

    def row(self, key, times=(), note=""):
        """One row, printed and saved at once.   key: the section's letter, what.   times: ms of each call."""
        section, what = key.split(" ", 1)
        self.ms.setdefault(key, []).extend(times)
        text = f"{median(times):.1f} | {min(times):.1f}–{max(times):.1f}" if times else "|"
        print(f"| {section} | {what} | {text} | {note} |", flush=True)
        self.stored["rows"].append({"section": section, "what": what, "milliseconds": list(times), "note": note})
        self.save()

    def save(self):
        if self.args.out:
            self.args.out.write_text(json.dumps(self.stored, indent=1, default=str, ensure_ascii=False) + "\n")

    @contextlib.contextmanager
    def attempt(self, key):
        """What fails inside becomes a row, and the rest goes on."""
        try:
            yield
        except Exception as error:
            self.row(key, note=f"failed: {type(error).__name__}: {bipeft.one_line(error)}")

    def once(self, function):
        """Milliseconds of one call."""
        self.wait()
        started = time.perf_counter()
        function()
        self.wait()
        return 1e3 * (time.perf_counter() - started)

    def measure(self, functions, note="", repeats=None):
        """A row for each of {key: function}, called in turns; at least 3 times, then no more after 3 s each."""
        warm, started, times = 2 if self.cuda else 1, time.perf_counter(), {key: [] for key in functions}
        for i in range(warm + (repeats or self.args.repeats)):
            if i < warm + 3 or time.perf_counter() - started < 3 * len(functions):
                for key, function in functions.items():
                    times[key].append(self.once(function))
        for key, values in times.items():
            self.row(key, values[warm:], note)
            note = ""

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def clear(self):
        """Gives unused memory back; peaks count from here on."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self, what):
        """A row of f."""
        if self.cuda and "f" in self.args.sections and what not in self.gib:
            self.gib[what] = [torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30]
            self.row(f"f peak memory of {what}", note="{:.2f} GiB allocated, {:.2f} reserved".format(*self.gib[what]))

    def build(self, ours=False, depth=None):
        """A new backbone, frozen, in training mode; of random weights, but for --model at its own depth."""
        self.clear()
        if self.args.model and not depth:
            model, _ = bipeft.load_backbone(self.args.model, self.args.dtype, self.device, 0)
        else:
            config = (transformers.AutoConfig.from_pretrained(self.args.model) if self.args.model else
                      transformers.T5Config(vocab_size=32128, decoder_start_token_id=0, **SHAPES[self.args.shape]))
            config.num_layers = config.num_decoder_layers = depth or config.num_layers
            with self.device:
                model = transformers.AutoModelForSeq2SeqLM.from_config(config, dtype=getattr(torch, self.args.dtype))
        if ours and self.cuda:                                                 # as the program does
            bipeft.fuse_norms(model)
        self.clear()
        return model.requires_grad_(False).train()

    def batch(self, seed, size=None):
        """Random tokens, nothing padded."""
        ids, labels = (torch.tensor(x, device=self.device) for x in zip(*self.tokens(size or self.args.batch_size, seed)))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def tokens(self, count, seed):
        """Random examples, as `bipeft.tokenize` returns them."""
        generator, cut = torch.Generator().manual_seed(seed), self.args.input
        rows = torch.randint(3, 32000, (count, cut + self.args.target), generator=generator).tolist()
        return [(row[:cut], row[cut:]) for row in rows]

    def search(self, model, graphs):
        """A Search that never triggers of its own."""
        settings = bipeft.Settings(budget=self.args.budget * 1e-4, triggers=10**6)
        space = bipeft.Space(model, self.args.space, (1, 4, 8), 0)
        return bipeft.Search(model, space, settings, 10**6, 10**6, new_pass(graphs))


def new_pass(graphs):
    """Who computes losses and gradients from now on."""
    return bipeft.CudaGraphs() if graphs else bipeft.forward_backward


def frozen_pass(bench):
    """What section a measures, a function, and the number of parameters."""
    model, batch = bench.build(), bench.batch(0)
    inputs = batch.pop("input_ids"), model.prepare_decoder_input_ids_from_labels(batch["labels"])
    embedded = [model.get_input_embeddings()(ids).detach() for ids in inputs]

    def forward_backward(leaves=[x.clone().requires_grad_() for x in embedded]):
        loss = model(inputs_embeds=leaves[0], decoder_inputs_embeds=leaves[1], **batch).loss
        return torch.autograd.grad(loss, leaves)
    return forward_backward, embedded, bipeft.geometry(model)["parameters"]


def backbone(bench):
    """Section a."""
    forward_backward, embedded, size = frozen_pass(bench)
    bench.measure({"a frozen backbone, eager": forward_backward}, f"{size:,} parameters")
    bench.peak("a")
    if bench.cuda:
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            leaves = [x.clone().requires_grad_() for x in embedded]   # the others had gradients on another stream
            forward_backward(leaves)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, stream=side):
            forward_backward(leaves)
        bench.measure({"a frozen backbone, CUDA graph": graph.replay})


def lora(bench):
    """Section b."""
    import peft
    config = peft.LoraConfig(r=8, target_modules=["q", "v"], lora_dropout=0.0)
    model, batch = peft.get_peft_model(bench.build(), config).train(), bench.batch(0)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=3e-4)

    def step():
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    bench.measure({"b LoRA step of peft, eager": step},
                  f"peft {peft.__version__}, {sum(p.numel() for p in weights):,} trainable")
    bench.peak("b")


def search_steps(bench):
    """Sections c and d."""
    search, batches = bench.search(bench.build(ours=True), bench.graphs), [bench.batch(i) for i in range(3)]
    for when, state in TIMES.items():
        with bench.attempt(f"d {when}"):
            if state:
                advance(search, *state)
            step = functools.partial(search.step, *batches)
            search.run_pass = new_pass(bench.graphs)
            bench.clear()
            first, also = bench.once(step) + bench.once(step), parts(search, batches, when) if "c" in bench.args.sections else {}
            bench.measure({f"d step, {when}": step, **also},
                          f"{int(search.kept.sum())} modules, {int((search.kept & ~search.fixed).sum())} open ranks")
            if bench.graphs:
                bench.row(f"d recording, {when}", [first - 2 * median(bench.ms[f"d step, {when}"])])
            if when == "start":
                bench.peak("d")
            if bench.cuda:
                lines = synchronisations(step)
                bench.syncs[when] = len(lines)
                bench.row(f"d host synchronisations, {when}", note=f"{len(lines)}: {' '.join(lines[:9])}")
    if bench.graphs:
        with bench.attempt("d step, start, graphs off"):
            search.space.detach()
            search = bench.search(search.model, False)
            bench.measure({"a frozen backbone, eager, in turns with the next": frozen_pass(bench)[0],
                           "d step, start, graphs off": functools.partial(search.step, *batches)}, repeats=5)


def advance(search, keep, leave_open):
    """Puts a Search into a later state.   keep: share of all modules.   leave_open: a share or number of the ranks."""
    generator = torch.Generator().manual_seed(0)

    def shuffled(mask):
        rows = mask.nonzero()[:, 0]
        return rows[torch.randperm(len(rows), generator=generator)]

    device, kept, fixed = search.kept.device, search.kept.cpu(), search.fixed.cpu()
    gone = torch.zeros_like(kept)
    gone[shuffled(kept)[round(keep * len(kept)):]] = True
    kept, fixed = kept & ~gone, fixed | gone
    still_open = shuffled(~fixed)
    fixed[still_open[round(leave_open * len(still_open)) if leave_open < 1 else leave_open:]] = True
    choice = torch.randint(0, 3, kept.shape, generator=generator).to(device)
    search.choice = torch.where(search.fixed, search.choice, choice)
    search.kept, search.fixed = kept.to(device), fixed.to(device)
    search.space.kept = search.kept
    search.open_ranks = bool((~search.fixed).any())


def parts(search, batches, when):
    """What section c measures at one time: {key: function}."""
    model, space, found = search.model, search.space, {}
    gate, ranks = (t.detach() for t in search.sample(search.draw()))
    open_gate, open_ranks = gate.clone().requires_grad_(), ranks.clone().requires_grad_()
    passes = {"ΔW": (gate, ranks, batches[0], search.weights),
              "Θ": (open_gate, ranks, batches[1], [open_gate, *search.weights]),
              "Φ": (gate, open_ranks, batches[2], [open_ranks])}

    def one_pass(name):
        found[name] = search.run_pass(model, space, *passes[name]), [p.grad for p in passes[name][-1]]

    def recorded(model, space, gate, ranks, batch, inputs):
        """A pass that gives what it gave before; the way from a sample to Θ or Φ belongs to the rest."""
        name, sample = ("Θ", gate) if gate.requires_grad else ("Φ", ranks) if ranks.requires_grad else ("ΔW", None)
        loss, gradients = found[name]
        first = int(sample is not None)
        for p, gradient in zip(inputs[first:], gradients[first:]):
            p.grad = gradient
        if sample is not None:
            inputs[0].grad = torch.autograd.grad(sample, inputs[0], gradients[0])[0]
        return loss

    def rest(**changed):
        before = search.run_pass, search.warmup, search.settings
        search.run_pass = recorded
        search.warmup = changed.pop("warmup", search.warmup)
        search.settings = dataclasses.replace(search.settings, **changed)
        try:
            search.step(*batches)
        finally:
            search.run_pass, search.warmup, search.settings = before

    functions = {f"c {name} pass, {when}": functools.partial(one_pass, name) for name in PASSES}
    functions[f"c the rest, {when}"] = rest
    if when == "start":              # with so many triggers to come each removes and fixes next to nothing
        functions["c the rest with a trigger, start"] = functools.partial(rest, warmup=0, tau=-1.0)
    return functions


def synchronisations(step):
    """The lines at which a call makes the host wait for the GPU, in their order."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]


def retraining(bench):
    """Sections e and g."""
    args, model = bench.args, bench.build(ours=True)
    search = bench.search(model, False)
    space, budget, n = search.space, search.budget, len(search.kept)
    torch.manual_seed(0)
    smoothed, choice = torch.rand(n).tolist(), torch.randint(0, 3, (n,)).tolist()
    counts = space.param_counts.tolist()
    structure = space.structure(*bipeft.fill_budget(smoothed, counts, [True] * n, choice, budget), budget)
    space.detach()
    del search, space
    peft, together, clock = bipeft.apply(model, structure), 5 if bench.cuda else 1, []
    count = together * (1 + max(2, args.repeats // 2)) * args.batch_size
    batches = bipeft.Batches(bench.tokens(count, 0), args.batch_size, bench.device, 0)

    def after_step(state, line):                 # a wait at every step would hide what overlaps
        if line["step"] % together == 0:
            bench.wait()
            clock.append(time.perf_counter())

    bench.clear()
    bipeft.train(model, peft, batches, lambda: 0.0, 1, 3e-4, run_pass=new_pass(bench.graphs),
                 after_step=after_step)
    bench.row("e re-training step", [1e3 * (b - a) / together for a, b in zip(clock, clock[1:])],
              f"{len(structure.modules)} modules, {structure.parameters:,} parameters")
    bench.peak("e")
    if "g" in args.sections:
        examples, size = bench.tokens(args.examples, 1), 2 * args.batch_size
        no_text = types.SimpleNamespace(batch_decode=lambda made, **_: [""] * len(made), pad_token_id=0, eos_token_id=1)
        bipeft.predict(model, no_text, examples[:size], size, bench.device)
        bench.row(f"g predicting {len(examples)} examples",
                  [bench.once(lambda: bipeft.predict(model, no_text, examples, size, bench.device))])
        bench.row("g training on as many", [median(bench.ms["e re-training step"]) * len(examples) / args.batch_size])


def sweep(bench):
    """Goal 7: one step at the start for each depth and each batch size, and the growth from end to end."""
    own, size, seen = bench.build().config.num_layers, bench.args.batch_size, {}
    series = {"depth": [(d, size) for d in bench.args.depths], "batch": [(own, b) for b in bench.args.batches]}
    for depth, count in dict.fromkeys(series["depth"] + series["batch"]):
        with bench.attempt(key := f"sweep step, {depth} + {depth} layers, batch {count}"):
            batches = [bench.batch(i, count) for i in range(3)]
            search = bench.search(bench.build(ours=True, depth=depth), bench.graphs)
            bench.measure({key: lambda: search.step(*batches)}, f"N = {len(search.kept)}", repeats=3)
            seen[depth, count] = len(search.kept), count, median(bench.ms[key])
        search = None                                                # its memory, before the next is built
    for what, settings in series.items():
        measured = [seen[setting] for setting in settings if setting in seen]
        if measured:
            n, batch, took = (last / first for first, last in zip(measured[0], measured[-1]))
            bench.row(f"sweep {what}, first to last", note=f"N × {n:.2f}, batch × {batch:.2f}: time × {took:.2f}")


def ratios(bench):
    """The goals, each beside what was measured."""
    def ms(key):
        return median(bench.ms.get(key) or [math.nan])

    b, steps = ms("b LoRA step of peft, eager"), {when: ms(f"d step, {when}") for when in TIMES}
    found = [("1", "search step, start ÷ b", steps["start"] / b, 1.5),
             ("1", "search step, mean of the three times ÷ b", sum(steps.values()) / 3 / b, 1.0)]
    for when, step in steps.items():
        rounds = zip(*(bench.ms.get(key, []) for key in (f"d step, {when}", *(f"c {name} pass, {when}" for name in PASSES))))
        rest = [1 - sum(passes) / whole for whole, *passes in rounds] or [math.nan]
        found += [("2", f"the rest ÷ step, {when}, by difference", median(rest), 0.05),
                  ("2", f"the rest ÷ step, {when}, directly", ms(f"c the rest, {when}") / step, 0.05)]
    found += [("2", f"host synchronisations, {when}", count, 1) for when, count in bench.syncs.items()]
    found.append(("3", "re-training step ÷ b", ms("e re-training step") / b, 0.5))
    if {"b", "d"} <= bench.gib.keys():
        found += [("5", f"peak memory {kind}, d ÷ b", d / b, 1.3)
                  for kind, d, b in zip(("allocated", "reserved"), bench.gib["d"], bench.gib["b"])]
    predict = ms(f"g predicting {bench.args.examples} examples")
    eager, a = (("d step, start, graphs off", "a frozen backbone, eager, in turns with the next") if bench.graphs else
                ("d step, start", "a frozen backbone, eager"))
    found += [("6", "predicting ÷ training on as many", predict / ms("g training on as many"), 1.0),
              ("8", "search step, start, without graphs ÷ a", ms(eager) / ms(a), 4.5)]
    found = [goal for goal in found if not math.isnan(goal[2])]
    print("\n| goal | | measured | at most | |\n| --- | --- | ---: | ---: | --- |")
    for goal, what, value, most in found:
        print(f"| {goal} | {what} | {value:.3f} | {most} | {'met' if value <= most else 'missed'} |", flush=True)
    bench.stored["ratios"] = [dict(zip(("goal", "what", "measured", "at_most"), goal)) for goal in found]
    bench.save()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="large", choices=SHAPES)
    parser.add_argument("--model", help="a folder with a T5, instead of a shape")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, else float32")
    for name, value in {"batch-size": 32, "input": 128, "target": 2, "examples": 512, "threads": 0, "repeats": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--space", default="s2")
    parser.add_argument("--budget", type=float, help="default: 1.39, or 50 of a small model")
    parser.add_argument("--eager", action="store_true", help="ours without CUDA graphs")
    parser.add_argument("--sections", default="a,b,c,d,e,f,g", type=lambda text: text.split(","))
    parser.add_argument("--sweep", action="store_true")
    for name, value in {"depths": "6,12,24,48", "batches": "8,16,32,64,128"}.items():
        parser.add_argument(f"--{name}", default=value, type=lambda text: [int(x) for x in text.split(",")])
    parser.add_argument("--out", type=Path)
    args, started = parser.parse_args(), time.perf_counter()
    cuda = torch.device(args.device).type == "cuda"
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.repeats = args.repeats or (10 if cuda else 3)
    args.budget = args.budget or (1.39 if args.shape == "large" and not args.model else 50)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)                    # of transformers, at what peft asks it
    bench = Bench(args)
    for letters, section in (("a", backbone), ("b", lora), ("cd", search_steps), ("eg", retraining), ("b", lora)):
        if set(letters) & set(args.sections):
            with bench.attempt(f"{letters[0]} {section.__name__}"):
                section(bench)
    if args.sweep:
        sweep(bench)
    ratios(bench)
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
