"""Tests of scale.py: parts, recomputed activations, many processes."""
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import scale
from scale import bipeft

torch.set_num_threads(1)                            # forked processes can't use the threads of this one
PROCESSES = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")     # CUDA can't be forked
UNEVEN = [3, 1, 2, 0, 3], [2]                       # numbers of labels, of the rows of two batches


def tiny(kind, kinds, dropout=0.0):
    """(a tiny T5 or Llama, a space on it), in float64 but for norms and Llama's loss; no weight is zero."""
    torch.manual_seed(0)
    if kind == "t5":
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(
            vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=dropout,
            decoder_start_token_id=0, use_cache=False)).double()
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)).double()
    space = bipeft.Space(model, kinds)
    for p in space.tensors:
        p.data = torch.randn(p.shape).double() / 10
    space.leading = space.leading.double()
    return model, space


def uneven(lengths):
    """A batch of a row for each number of labels, of which some may be 0."""
    ids = torch.randint(3, 40, (len(lengths), 7), generator=torch.Generator().manual_seed(2))
    labels = ids.where(torch.arange(7) < torch.tensor(lengths)[:, None], -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def three_passes(run_pass, model, space, batch):
    """Loss and gradients of each pass of a step, end to end."""
    generator = torch.Generator().manual_seed(3)
    theta = torch.randn(len(space), 2, generator=generator).double().requires_grad_()
    phi = torch.randn(len(space), 3, generator=generator).double().requires_grad_()
    found = []
    for wanted in (space.tensors, [theta, *space.tensors], [phi]):
        gate = bipeft.gumbel_softmax(theta, torch.zeros(2), 2.0)[:, 1]
        ranks = bipeft.gumbel_softmax(phi, torch.zeros(3), 2.0)
        loss = run_pass(model, space, gate if wanted[0] is theta else gate.detach(),
                        ranks if wanted[0] is phi else ranks.detach(), batch, wanted)
        found.append(torch.cat([loss[None], *(p.grad.flatten() for p in wanted)]))
    return found


@pytest.mark.parametrize("kind, kinds, lengths, parts", [
    ("t5", "s1", UNEVEN[0], 2),                       # 3 rows and 2
    ("t5", "lora,bitfit", UNEVEN[0], 9),              # a row each, one of them without a label
    ("llama", "lora,prefix", [7, 3, 2], 3)])          # of whose labels the first of each row is told from nothing
def test_parts_give_what_the_whole_batch_gives(kind, kinds, lengths, parts):
    """The same losses and gradients, within the rounding of what is float32 in transformers even so."""
    model, space = tiny(kind, kinds)
    batch = uneven(lengths)
    wholes = three_passes(bipeft.forward_backward, model, space, batch)
    founds = three_passes(scale.in_parts(bipeft.forward_backward, parts), model, space, batch)
    for whole, found in zip(wholes, founds):
        assert (found - whole).abs().max() < 1e-6 < 1e-3 < whole[1:].abs().max()


def test_recomputed_activations_give_the_same_gradients():
    """With dropout, too; a module in a layer is computed twice for a pass, so that it was recomputed."""
    found = []
    for checkpointing in (False, True):
        model, space = tiny("t5", "all", 0.1)
        model.train()
        calls = []
        space.modules[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        run_pass = scale.choose_pass(scale.Settings(checkpointing=checkpointing), model, torch.device("cpu"))
        ranks = torch.eye(3).double()[torch.arange(len(space)) % 3]
        torch.manual_seed(5)
        run_pass(model, space, torch.ones(len(space)).double(), ranks, uneven([2, 3]), space.tensors)
        found.append(torch.cat([p.grad.flatten() for p in space.tensors]))
        assert run_pass is bipeft.forward_backward and len(calls) == 1 + checkpointing
    assert torch.allclose(*found, rtol=1e-10, atol=1e-13) and found[0].abs().max() > 0.1


def start(folder, environment, rank, function, *arguments):
    """In a process of its own: a call whose output goes to files."""
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    with open(f"{folder}/out-{rank}", "a") as out, open(f"{folder}/error-{rank}", "a") as error:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            sys.exit(function(folder, rank, *arguments))


def two_processes(folder, *call):
    """Two processes which find what torchrun leaves for its own.   Returns their exit codes, and what they told."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2",
                   "TORCHELASTIC_RUN_ID": "", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    started = [PROCESSES.Process(target=start, args=(folder, environment, rank, *call), daemon=True) for rank in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)                            # of one that hangs the exit code is None
    return [process.exitcode for process in started], *((folder / f"error-{rank}").read_text() for rank in (0, 1))


def shared_passes(folder, rank):
    """Passes over uneven rows, and over a single one, at which process 1 has nothing to do."""
    draws = []

    def run_pass(*arguments):
        draws.append(float(torch.rand(())))         # as dropout draws
        return bipeft.forward_backward(*arguments)
    dist.init_process_group("gloo")
    model, space = tiny("t5", "s1")
    found = [three_passes(scale.in_parts(run_pass, 2), model, space, uneven(lengths)) for lengths in UNEVEN]
    torch.save((found, draws), f"{folder}/{rank}.pt")


def test_two_processes_give_what_one_gives(tmp_path):
    """The same as one, within rounding; as each other, to the last bit; and each draws a dropout of its own."""
    assert two_processes(tmp_path, shared_passes)[0] == [0, 0]
    (first, draws), (second, others) = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    model, space = tiny("t5", "s1")
    for lengths, ours, theirs in zip(UNEVEN, first, second):
        for whole, a, b in zip(three_passes(bipeft.forward_backward, model, space, uneven(lengths)), ours, theirs):
            assert torch.equal(a, b) and (a - whole).abs().max() < 1e-6 < 1e-3 < whole[1:].abs().max()
    # rows 0, 2 and 4 in two parts and the single row; rows 1 and 3, of which one has a label
    assert len(draws) == 3 * 3 and len(others) == 3 * 1 and not set(draws) & set(others)


def small_toy(folder, rank, name, dies=False, *flags):
    """The program on a toy of few examples, pretrained in few steps.   dies: process 1, in step 6."""
    def step(search, *batches, step=bipeft.Search.step):
        assert (rank == 0) == (str(folder) in search.settings.out)
        if rank == 1 and dies and search.steps_done == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(search, *batches)
    splits = {key: rows[:count] for (key, rows), count in zip(bipeft.toy_splits(0).items(), (129, 9, 9))}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bipeft.Search, "step", step)
        patched.setattr(bipeft, "toy_splits", lambda seed: splits)
        patched.setattr(bipeft.toy_backbone, "__defaults__", (5, 64))
        return scale.main([*"--task toy --epochs 1 --search-epochs 1 --warmup-epochs 0 --batch-size 8 --triggers 3"
                           " --tau 0.3 --window 3 --save-every 2 --device cpu --out".split(),
                           f"{folder}/{name}", *flags])


def test_killed_processes_go_on_to_what_one_undisturbed_finds(tmp_path):
    """The same structure, scores and, within rounding, weights, in other parts; process 0 alone writes and prints."""
    assert small_toy(tmp_path, 0, "one") == 0
    codes, line, _ = two_processes(tmp_path, small_toy, "run", True)
    assert codes == [2, -signal.SIGKILL] and line.count("\n") == 1, line
    assert line.startswith("scale.py: another process of this run is lost") and "the same command goes on" in line
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["state"]["steps_done"] == 4
    assert two_processes(tmp_path, small_toy, "run", False, "--accumulate", "3")[0] == [0, 0]
    assert "going on from" in (tmp_path / "out-0").read_text() and (tmp_path / "out-1").read_text() == ""
    found, weights = [], []
    for folder in (tmp_path / "one", tmp_path / "run"):
        metrics = json.loads((folder / "metrics.json").read_text())
        found.append([sorted(path.name for path in folder.iterdir()), (folder / "structure.json").read_text(),
                      *(metrics[key] for key in ("validation", "test", "parameters", "settings"))])
        weights.append(safetensors.torch.load_file(folder / "peft.safetensors"))
    assert found[0] == found[1] and '"kind": "lora"' in found[0][1]
    assert max((t - weights[1][name]).abs().max() for name, t in weights[0].items()) < 1e-4


def test_torchrun_tells_a_mistake_of_all_once(tmp_path):
    """A true torchrun, of which all processes see the same wrong flag."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           HERE / "scale.py", "--task", "toy", "--accumulate", "0", "--out", tmp_path],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.stderr.count("scale.py: --accumulate 0 must lie in") == 1 and "exitcode  : 2" in done.stderr
    assert done.returncode != 0 and done.stdout == "" and list(tmp_path.iterdir()) == []
