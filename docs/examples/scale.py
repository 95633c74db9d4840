"""bipeft.py for what one pass or one GPU can't hold: the same program, flags and files, and three things more.

    python docs/examples/scale.py --task rte --accumulate 4           a batch in 4 parts, one after another
    python docs/examples/scale.py --task rte --checkpointing          less kept for the backward pass, more computed
    torchrun --nproc_per_node=8 docs/examples/scale.py --task rte     8 processes share each batch, a GPU each

A run that was killed may go on with others of these. But for rounding and dropout it finds what bipeft.py finds. Every
process evaluates in full: sharing makes training faster, not scoring.
"""

import contextlib
import dataclasses
import io
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bipeft


@dataclasses.dataclass
class Settings(bipeft.Settings):
    """Those of bipeft.py, and two more; the comments are the help texts."""

    accumulate: int = 1                 # parts that a process computes its share of a batch in, to save memory
    checkpointing: bool = False         # recompute activations, to save memory; no CUDA graphs


def choose_pass(settings, model, device):
    """Who computes losses and gradients, a function as `bipeft.forward_backward`."""
    if settings.checkpointing:                      # of a layer its input alone is kept
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})            # the first name is transformers' new one
        settings = dataclasses.replace(settings, eager=True)
    run_pass = bipeft.choose_pass(settings, model, device)
    if settings.accumulate == 1 and not dist.is_initialized():
        return run_pass
    return in_parts(run_pass, settings.accumulate)


def in_parts(run_pass, parts):
    """A pass that calls another one for each part of this process's rows, and adds up what all processes got.

    run_pass, and what is returned: functions as `bipeft.forward_backward`.   parts: how many, at most.
    The loss is a mean over labels. So a batch's loss and gradients are those of its parts, weighted by labels of the
    part / labels of the batch. After a pass all processes hold the same numbers, to the last bit.
    """
    process = 0
    processes = 1
    if dist.is_initialized():
        process = dist.get_rank()
        processes = dist.get_world_size()

    def run(model, peft, gate, ranks, batch, inputs):
        # inputs[0] may be Θ or Φ, of which gate or ranks is a sample. The sampling's graph serves one backward pass
        # alone: those of the parts end at a copy of the sample, and a last one leads from there to Θ or Φ.
        leaves = list(inputs)
        sample = None
        if gate is not None and gate.requires_grad:
            sample = gate
            gate = leaves[0] = sample.detach().requires_grad_()
        elif ranks is not None and ranks.requires_grad:
            sample = ranks
            ranks = leaves[0] = sample.detach().requires_grad_()

        if processes > 1:                                       # each draws its own dropout, from the step's seed
            torch.manual_seed(bipeft.derive(torch.initial_seed(), process))
        # The sums over parts, end to end: each gradient's, the loss's, and that of the labels.
        total = torch.zeros_like(bipeft.flatten([*leaves, torch.zeros(2, device=leaves[0].device)]))
        rows = {name: t[process::processes].contiguous() for name, t in batch.items() if torch.is_tensor(t)}
        for pieces in zip(*(t.chunk(parts) for t in rows.values())):
            part = {**batch, **dict(zip(rows, pieces))}
            labels = count_labels(part["labels"], model)
            if labels > 0:                                      # else the part's loss would be 0/0
                loss = run_pass(model, peft, gate, ranks, part, leaves)
                found = [*(p.grad for p in leaves), loss, torch.ones_like(loss)]
                total += labels * bipeft.flatten(found)
        if processes > 1:
            with bipeft.failing("another process of this run is lost", ": the same command goes on"):
                dist.all_reduce(total)

        mean = total / total[-1]
        bipeft.give_gradients(leaves, mean[:-2])
        if sample is not None:
            (inputs[0].grad,) = torch.autograd.grad(sample, inputs[0], leaves[0].grad)
        return mean[-2]

    return run


def count_labels(labels, model):
    """How many labels, [rows, length], a loss is the mean over. A decoder alone has nothing to tell the first by."""
    if not model.config.is_encoder_decoder:
        labels = labels[:, 1:]
    return (labels != -100).sum()


def copy_files(several, folder):
    """Gives each process the files that process 0 has in its folders, or would go on from.   several: [Settings]."""
    box = [[]]
    for settings in several:
        subfolder = f"seed-{settings.seed}" if len(several) > 1 else ""         # as bipeft.parse makes it
        for name in bipeft.Record.FILES:
            path = Path(settings.out, name)
            if dist.get_rank() == 0 and path.is_file():
                box[0].append((Path(subfolder, name), path.read_bytes()))
    dist.broadcast_object_list(box)                 # process 0 goes on only after it has read them
    for name, content in box[0]:
        Path(folder, name).parent.mkdir(exist_ok=True)
        Path(folder, name).write_bytes(content)


def main(arguments=None):
    """The program. Returns the exit code, as bipeft.main: 0, or 2 after a person's mistake."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not dist.is_torchelastic_launched():
        return bipeft.main(arguments, Settings, choose_pass)
    store, process, processes = next(dist.rendezvous("env://"))
    shown = sys.stdout if process == 0 else io.StringIO()                       # process 0 alone shows how it goes
    told = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(told), tempfile.TemporaryDirectory() as folder:
        several = []
        with contextlib.suppress(bipeft.UsageError):                            # bipeft.main meets and tells it
            several = bipeft.parse(arguments, Settings)
        cuda = torch.cuda.is_available()
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=process, world_size=processes)
        copy_files(several, folder)
        if process > 0:                                                         # process 0 alone writes to --out
            arguments += ["--out", folder]
        if cuda and several and several[0].device in ("auto", "cuda"):
            arguments += ["--device", f"cuda:{os.environ['LOCAL_RANK']}"]
        code = bipeft.main(arguments, Settings, choose_pass)
    if code == 0:
        dist.destroy_process_group()
    elif store.add("mistakes", 1) == 1:             # of all processes the first to fail says why
        print(told.getvalue(), end="", file=sys.stderr, flush=True)
        store.set("told", "")
    else:
        store.wait(["told"])                        # torchrun ends all as soon as one has ended
    return code


if __name__ == "__main__":
    sys.exit(main())
