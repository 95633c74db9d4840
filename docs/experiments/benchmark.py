"""How long a search step takes, beside a frozen backbone and Hugging Face's LoRA, in one process.

    python docs/experiments/benchmark.py --out benchmark.json              T5-large's shape, on a GPU
    python docs/experiments/benchmark.py --sections d --sweep              linear in N and in the batch?
    python docs/experiments/benchmark.py --model ../shared/t5-tiny --threads 1         on a CPU
    python docs/experiments/benchmark.py --shape tiny --device cpu --sweep --depths 1,2,4 --batches 4,8

Prints a markdown table, a row as soon as it is measured, and writes all of it as JSON to --out.
Times are medians of calls after warm-ups, in ms, the device synchronised before and after each.
Batches are random tokens without padding (e's are `bipeft.Batches`, which pads targets to 4 on a GPU).

    a  The frozen backbone in training mode: forward, loss, and the gradient of both stacks' input
       embeddings, which are leaves here, so that backward goes through every layer and computes no
       weight's gradient. Eager; on a GPU also as a CUDA graph.
    b  A training step of peft's LoRA, r = 8 on every q and v, AdamW, eager. Needs the package peft.
       Measured before and after everything of ours; ratios are to the median of both.
    c  Our three passes apart. "the rest" is a step less these: noise, Eq. 1-5, optimizers; also
       directly, as a step whose passes return what they returned before.
    d  `Search.step` at the start; half-way (half of the modules gone, half of the open ranks fixed);
       at the end (a tenth left, three ranks open). Which ones is drawn at random, gates are open half
       of the time. "first call" is what a step takes that records its graphs, less a later one.
    e  A step of `bipeft.train`, on a structure of --budget parts per ten thousand of the backbone.
    f  Peak memory since the model was built, of a, b, d at the start, and e; on a GPU.
    g  Seconds of `bipeft.predict` (no tokenizer's decoding) and of training on as many examples.

--sweep takes one search step at the start at several depths, and at several batch sizes.
"""

import argparse
import contextlib
import gc
import json
import math
import statistics
import sys
import time
import types
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bipeft

SHAPES = {"large": {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
          "tiny": {"d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 2, "num_heads": 4}}
PASSES = {"ΔW": (("weights",), True), "Θ": (("gate", "weights"), False), "Φ": (("ranks",), True)}
TIMES = {"start": None, "half-way": (0.5, 0.5), "end": (0.1, 3)}         # modules kept, ranks left open


class Bench:
    """The settings, the table so far, and what every section needs."""

    def __init__(self, args):
        self.args, self.device = args, torch.device(args.device)
        self.cuda, self.rows, self.ms, self.gib = self.device.type == "cuda", [], {}, {}
        name = torch.cuda.get_device_name(self.device) if self.cuda else f"CPU, {torch.get_num_threads()} threads"
        self.facts = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__,
                      "fuse_norms": hasattr(bipeft, "fuse_norms") and not args.eager, **vars(args)}
        print(f"{name}; torch {torch.__version__}, transformers {transformers.__version__}; "
              f"{args.model or args.shape}, {args.dtype}, batch {args.batch_size} × {args.input} input and {args.target} "
              f"target tokens, space {args.space}{', ours eager' if args.eager or not self.cuda else ''}"
              f"{', ours with fuse_norms' if self.facts['fuse_norms'] else ''}\n\n"
              "| | what | median, ms | least to most | |\n| --- | --- | ---: | ---: | --- |", flush=True)

    def row(self, section, what, milliseconds=None, note=""):
        """One line of the table, printed and saved at once.   milliseconds: of each call."""
        median = spread = ""
        if milliseconds:
            self.ms.setdefault(f"{section} {what}", []).extend(milliseconds)
            median, spread = f"{statistics.median(milliseconds):.1f}", f"{min(milliseconds):.1f}–{max(milliseconds):.1f}"
        print(f"| {section} | {what} | {median} | {spread} | {note} |", flush=True)
        self.rows.append({"section": section, "what": what, "note": note, "milliseconds": milliseconds})
        self.save()

    def save(self, **more):
        """Writes all that is known to --out."""
        if self.args.out:
            self.args.out.write_text(json.dumps(
                {"facts": self.facts, "rows": self.rows, "peak_gib": self.gib, **more}, indent=1, default=str) + "\n")

    @contextlib.contextmanager
    def attempt(self, section, what):
        """What fails inside becomes a row, and the rest goes on."""
        try:
            yield
        except Exception as error:
            self.row(section, what, note=f"failed: {type(error).__name__}: {bipeft.one_line(error)}")

    def measure(self, function, repeats=None):
        """Milliseconds of each call, after warm-ups; at least three, then no more once 5 s are over."""
        warm, times, started = 2 if self.cuda else 1, [], time.perf_counter()
        for i in range(warm + (repeats or self.args.repeats)):
            if i >= warm + 3 and time.perf_counter() - started > 5:
                break
            times.append(self.once(function))
        return times[warm:]

    def once(self, function):
        """Milliseconds of one call."""
        self.wait()
        started = time.perf_counter()
        function()
        self.wait()
        return 1e3 * (time.perf_counter() - started)

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
        """A row of f: the most memory since `clear`."""
        if self.cuda and "f" in self.args.sections:
            self.gib[what] = [torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30]
            self.row("f", f"peak memory of {what}", note="{:.2f} GiB allocated, {:.2f} reserved".format(*self.gib[what]))

    def build(self, ours=False, depth=None):
        """A new backbone on the device, frozen, in training mode, of random weights but for --model."""
        self.clear()
        if self.args.model and not depth:
            model, _ = bipeft.load_backbone(self.args.model, self.args.dtype, self.device, 0)
        else:
            config = (transformers.AutoConfig.from_pretrained(self.args.model) if self.args.model else
                      transformers.T5Config(vocab_size=32128, decoder_start_token_id=0, **SHAPES[self.args.shape]))
            config.num_layers = depth or config.num_layers
            config.num_decoder_layers = depth or config.num_decoder_layers
            with self.device:
                model = transformers.AutoModelForSeq2SeqLM.from_config(config, dtype=getattr(torch, self.args.dtype))
        if ours and self.facts["fuse_norms"]:
            bipeft.fuse_norms(model)
        self.clear()
        return model.requires_grad_(False).train()

    def batch(self, seed, size=None):
        generator = torch.Generator().manual_seed(seed)
        ids, labels = (torch.randint(3, 32000, (size or self.args.batch_size, length), generator=generator).to(self.device)
                       for length in (self.args.input, self.args.target))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def search(self, model, graphs):
        """A Search that never triggers of its own."""
        space = bipeft.Space(model, self.args.space, (1, 4, 8), 0)
        whole = int(self.args.budget * 1e-4 * sum(p.numel() for p in model.parameters()))
        return bipeft.Search(model, space, whole, 10**6, warmup=10**6, triggers=10**6, graphs=graphs)


def backbone(bench):
    """Section a."""
    model, batch = bench.build(), bench.batch(0)
    embed, ids, labels = model.get_input_embeddings(), batch["input_ids"], batch["labels"]
    leaves = [embed(x).detach().requires_grad_() for x in (ids, model._shift_right(labels))]

    def forward_backward():
        loss = model(inputs_embeds=leaves[0], decoder_inputs_embeds=leaves[1], labels=labels,
                     attention_mask=batch["attention_mask"]).loss
        return torch.autograd.grad(loss, leaves)

    parameters = sum(p.numel() for p in model.parameters())
    bench.row("a", "frozen backbone, eager", bench.measure(forward_backward), f"{parameters:,} parameters")
    bench.peak("a")
    if bench.cuda:
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]      # no gradient of another stream
            forward_backward()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, stream=side):
            kept = forward_backward()                                                 # noqa: F841, its memory
        bench.row("a", "frozen backbone, CUDA graph", bench.measure(graph.replay))


def lora(bench):
    """Section b."""
    import peft
    config = peft.LoraConfig(task_type=peft.TaskType.SEQ_2_SEQ_LM, r=8, target_modules=["q", "v"], lora_dropout=0.0)
    model, batch = peft.get_peft_model(bench.build(), config).train(), bench.batch(0)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=3e-4)

    def step():
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    bench.row("b", "LoRA step of peft, eager", bench.measure(step),
              f"peft {peft.__version__}, {sum(p.numel() for p in weights):,} trainable")
    if "b" not in bench.gib:
        bench.peak("b")


def advance(search, keep, leave_open):
    """Puts a Search into a later state.   keep: share of all modules.   leave_open: of the ranks that
    are open in these, a share or a number."""
    generator = torch.Generator().manual_seed(0)
    kept, fixed = search.kept.cpu(), search.fixed.cpu()
    order = kept.nonzero()[:, 0][torch.randperm(int(kept.sum()), generator=generator)]
    gone = torch.zeros_like(kept)
    gone[order[round(keep * len(kept)):]] = True
    kept, fixed = kept & ~gone, fixed | gone
    still_open = (~fixed).nonzero()[:, 0]
    still_open = still_open[torch.randperm(len(still_open), generator=generator)]
    fixed[still_open[round(leave_open * len(still_open)) if leave_open < 1 else leave_open:]] = True
    choice = torch.randint(0, 3, kept.shape, generator=generator)
    device = search.kept.device
    search.choice = torch.where(search.fixed, search.choice, choice.to(device))
    search.kept, search.fixed = kept.to(device), fixed.to(device)
    search.kept_count, search.fixed_count = int(kept.sum()), int((kept & fixed).sum())
    search.space.remove(gone.tolist())


def search_steps(bench):
    """Sections c and d."""
    model, batches = bench.build(ours=True), [bench.batch(i) for i in range(3)]
    graphs, step = bench.cuda and not bench.args.eager, lambda: search.step(*batches)
    search = bench.search(model, graphs)
    for when, state in TIMES.items():
        with bench.attempt("d", when):
            if state:
                advance(search, *state)
            if when == "half-way" and graphs:
                bench.row("d", "step, half-way, graphs of the start", bench.measure(step))
            search.replay.forget()
            bench.clear()
            first, times = bench.once(step), bench.measure(step)
            note = f"{search.kept_count} modules, {search.kept_count - search.fixed_count} open ranks"
            note += f"; first call {first - statistics.median(times):+.0f} ms" if graphs else ""
            bench.row("d", f"step, {when}", times, note)
            if when == "start":
                bench.peak("d")
        with bench.attempt("d", f"{when}, host synchronisations"):
            if bench.cuda:
                count, where = synchronisations(step)
                bench.gib.setdefault("syncs", {})[when] = count
                bench.row("d", f"host synchronisations, {when}", note=f"{count}: {where}")
        if "c" in bench.args.sections:
            with bench.attempt("c", when):
                passes(bench, search, batches, when)
    search.space.detach()
    with bench.attempt("d", "step, start, graphs off"):
        if graphs:
            search.replay.forget()
            search = bench.search(model, False)
            bench.row("d", "step, start, graphs off", bench.measure(step, 3))


def passes(bench, search, batches, when):
    """Section c at one time; at the start also a step with a trigger in it."""
    generator, found = torch.Generator().manual_seed(0), {}
    noise = [bipeft.gumbel_noise(p.shape, generator).to(p.device) for p in (search.theta, search.phi)]
    gate, rank_weights = search.architecture(noise)
    for (name, (wanted, skip)), batch in zip(PASSES.items(), batches):
        def one():
            found[wanted] = search.model_pass(wanted, gate, rank_weights, skip, batch)
        bench.row("c", f"{name} pass, {when}", bench.measure(one))
    search.model_pass = lambda wanted, *rest, **more: found[wanted]
    try:
        bench.row("c", f"the rest, {when}", bench.measure(lambda: search.step(*batches)))
        if when == "start":       # so many triggers to come that each takes off and fixes next to nothing
            search.warmup, search.tau = 0, -1.0
            bench.row("c", "the rest with a trigger, start", bench.measure(lambda: search.step(*batches)))
    finally:
        search.warmup, search.tau = 10**6, 0.85
        del search.model_pass


def synchronisations(step):
    """How often a call makes the host wait for the GPU, and at which lines."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing" in str(w.message))
    return sum(lines.values()), ", ".join(f"{line} × {count}" for line, count in lines.most_common(6))


def retraining(bench):
    """Sections e and g."""
    args, model, generator = bench.args, bench.build(ours=True), torch.Generator().manual_seed(0)
    search = bench.search(model, False)
    space, budget, n = search.space, search.budget, len(search.space)
    smoothed, choice = torch.rand(n, generator=generator).tolist(), torch.randint(0, 3, (n,), generator=generator).tolist()
    structure = space.structure(*bipeft.fill_budget(smoothed, space.costs.tolist(), [True] * n, choice, budget), budget)
    space.detach()
    del search, space
    peft, together, clock = bipeft.apply(model, structure), 5 if bench.cuda else 1, []
    steps = together * (1 + max(2, args.repeats // 2))

    def tokens(count):
        ids = torch.randint(3, 32000, (count, args.input + args.target), generator=generator).tolist()
        return [(row[:args.input], row[args.input:]) for row in ids]

    def after_step(state, line):                 # a wait at every step would hide what overlaps
        if line["step"] % together == 0:
            bench.wait()
            clock.append(time.perf_counter())

    bench.clear()
    bipeft.train(model, peft, bipeft.Batches(tokens(steps * args.batch_size), args.batch_size, bench.device, 0),
                 lambda: 0.0, 1, 3e-4, graphs=bench.cuda and not args.eager, after_step=after_step)
    times = [1e3 * (b - a) / together for a, b in zip(clock, clock[1:])]
    bench.row("e", "re-training step", times, f"{len(structure.modules)} modules, {structure.parameters:,} parameters")
    bench.peak("e")
    if "g" in args.sections:
        examples, no_text = tokens(args.examples), types.SimpleNamespace(batch_decode=lambda made, **_: [""] * len(made))
        train = statistics.median(times) * len(examples) / args.batch_size
        bipeft.predict(model, no_text, examples[:2 * args.batch_size], 2 * args.batch_size, bench.device)
        predict = bench.once(lambda: bipeft.predict(model, no_text, examples, 2 * args.batch_size, bench.device))
        bench.row("g", f"predicting {len(examples)} examples", [predict])
        bench.row("g", "training on as many", [train])


def sweep(bench):
    """Goal 7: one whole step at the start for each depth and batch; then the growth from end to end."""
    own = (bench.build().config.num_layers, bench.args.batch_size)
    for name, settings in (("N", [(d, own[1]) for d in bench.args.depths]), ("batch", [(own[0], b) for b in bench.args.batches])):
        ends = []
        for depth, size in settings:
            with bench.attempt("sweep", f"depth {depth}, batch {size}"):
                batches = [bench.batch(i, size) for i in range(3)]
                search = bench.search(bench.build(ours=True, depth=depth), bench.cuda and not bench.args.eager)
                times = bench.measure(lambda: search.step(*batches), 3)
                bench.row("sweep", f"step, depth {depth}, batch {size}", times, f"N = {len(search.space)}")
                ends.append((len(search.space) if name == "N" else size, statistics.median(times)))
            search = None
        if len(ends) > 1:
            (x, first), (y, last) = ends[0], ends[-1]
            bench.row("sweep", f"{name} × {y / x:.1f}", note=f"time × {last / first:.2f}")


def ratios(bench):
    """The goals of the issue, each beside what was measured."""
    def ms(key):
        return statistics.median(bench.ms[key]) if key in bench.ms else math.nan

    b, steps = ms("b LoRA step of peft, eager"), {when: ms(f"d step, {when}") for when in TIMES}
    syncs = bench.gib.pop("syncs", {})
    found = [("1", "search step at the start ÷ b", steps["start"] / b, 1.5),
             ("1", "search step, mean of the three times ÷ b", sum(steps.values()) / 3 / b, 1.0)]
    for when, step in steps.items():
        three = sum(ms(f"c {name} pass, {when}") for name in PASSES)
        found += [("2", f"the rest ÷ step, {when}: by difference", (step - three) / step, 0.05),
                  ("2", f"the rest ÷ step, {when}: directly", ms(f"c the rest, {when}") / step, 0.05)]
    found += [("2", f"host synchronisations, {when}", count, 1) for when, count in syncs.items()]
    found.append(("3", "re-training step ÷ b", ms("e re-training step") / b, 0.5))
    if {"b", "d"} <= bench.gib.keys():
        found += [("5", f"peak memory {kind}, d ÷ b", bench.gib["d"][i] / bench.gib["b"][i], 1.3)
                  for i, kind in enumerate(("allocated", "reserved"))]
    predict = ms(f"g predicting {bench.args.examples} examples")
    eager = bench.ms.get("d step, start, graphs off") or ([] if bench.cuda and not bench.args.eager
                                                         else bench.ms.get("d step, start")) or [math.nan]
    found += [("6", "predicting ÷ training on as many", predict / ms("g training on as many"), 1.0),
              ("8", "search step at the start, graphs off ÷ a", statistics.median(eager) / ms("a frozen backbone, eager"), 4.5)]
    print("\n| goal | | measured | at most | |\n| --- | --- | ---: | ---: | --- |")
    for goal, what, value, bound in found:
        if not math.isnan(value):
            print(f"| {goal} | {what} | {value:.3g} | {bound} | {'met' if value <= bound else 'missed'} |")
    bench.save(ratios=[dict(zip(("goal", "what", "value", "at_most"), f)) for f in found if not math.isnan(f[2])])


def main():
    def numbers(text):
        return [int(x) for x in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="large", choices=SHAPES)
    parser.add_argument("--model", help="a folder with a T5, instead of a shape")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="bfloat16 on a GPU, else float32")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--target", type=int, default=2)
    parser.add_argument("--space", default="s2")
    parser.add_argument("--budget", type=float, help="parts per ten thousand: 1.39, or 50 of a smaller model")
    parser.add_argument("--repeats", type=int, help="10 on a GPU, else 3")
    parser.add_argument("--examples", type=int, default=512, help="that g predicts")
    parser.add_argument("--eager", action="store_true", help="ours without CUDA graphs and fused norms")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--sections", default="a,b,c,d,e,f,g", type=lambda text: text.split(","))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--depths", type=numbers, default=[6, 12, 24, 48])
    parser.add_argument("--batches", type=numbers, default=[8, 16, 32, 64, 128])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cuda = torch.device(args.device).type == "cuda"
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.repeats = args.repeats or (10 if cuda else 3)
    args.budget = args.budget or (1.39 if args.shape == "large" and not args.model else 50)
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    bench, started = Bench(args), time.perf_counter()
    for letters, section in (("a", backbone), ("b", lora), ("cd", search_steps), ("eg", retraining), ("b", lora)):
        if set(letters) & set(args.sections):
            with bench.attempt(letters[0], section.__name__):
                section(bench)
    if args.sweep:
        sweep(bench)
    ratios(bench)
    print(f"\n{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
