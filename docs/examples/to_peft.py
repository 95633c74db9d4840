"""A structure of LoRA modules alone, found by BIPEFT, as an adapter folder of Hugging Face peft.

    python bipeft.py --task rte --space lora --model DIR
    python docs/examples/to_peft.py runs/rte-lora-0 --model DIR --out adapters/rte

    model = peft.PeftModel.from_pretrained(transformers.AutoModelForSeq2SeqLM.from_pretrained(DIR), "adapters/rte")

Every module keeps its rank r (rank_pattern), and alpha is r (alpha_pattern), since peft scales by alpha/r. What was
trained beside the modules, such as a classifier, goes along whole (modules_to_save).
"""

import argparse
import sys
from pathlib import Path

import safetensors.torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bipeft


def to_peft(structure, weights, folder, model):
    """Writes adapter_config.json and adapter_model.safetensors.   Raises UsageError for what peft can't hold.

    structure, weights: as found and trained, weights by name.   folder: to write, made if it is missing.
    model: what is to wear the adapter, for the full names of its modules.
    """
    try:
        import peft        # here alone, so that whoever has none is told in one line
    except ImportError:
        raise bipeft.UsageError("peft is not installed: run pip install peft==0.19.1") from None

    others = sorted({m["kind"] for m in structure.modules} - {"lora"})
    if others:
        raise bipeft.UsageError(f"peft has no {', '.join(others)} of this form: search with --space lora")
    heads = [name for name in weights if ".lora." not in name]                       # what also_train trained
    check("parameters", heads, dict(model.named_parameters()), type(model).__name__)

    full = {module: name for name, module in model.named_modules()}                  # "bert.encoder..", not "encoder.."
    linear = {name: place for name, role, place in bipeft.places_of(model) if role == "linear"}
    places = {name: full[place] for name, place in linear.items()}
    names = [m["name"] for m in structure.modules]
    check("place", names, places, type(model).__name__)
    check("tensor", [f"{name}.lora.{factor}" for name in names for factor in "AB"], weights, "the file of weights")
    tensors = {name: weights[name] for name in heads}
    for name in names:                                                               # A: [r, in], B: [r, out]
        sizes = weights[f"{name}.lora.A"].shape[1], weights[f"{name}.lora.B"].shape[1]
        if sizes != (linear[name].in_features, linear[name].out_features):
            raise bipeft.UsageError(f"{name} is a layer of other sizes in this {type(model).__name__}, {linear[name]}: "
                                    "the structure is of another backbone")
        tensors[f"{places[name]}.lora_A.weight"] = weights[f"{name}.lora.A"]
        tensors[f"{places[name]}.lora_B.weight"] = weights[f"{name}.lora.B"].T       # peft's: [out, r]
    ranks = {places[m["name"]]: m["rank"] for m in structure.modules}
    highest = max(ranks.values())
    config = peft.LoraConfig(                      # of no task_type: peft then hands every call on as it comes
        r=highest, lora_alpha=highest, rank_pattern=ranks, alpha_pattern=ranks, target_modules=list(ranks),
        modules_to_save=sorted({name.rpartition(".")[0] for name in heads}) or None, lora_dropout=0.0,
        base_model_name_or_path=getattr(model, "name_or_path", "") or structure.backbone, inference_mode=True)
    config.save_pretrained(folder)
    tensors = {f"base_model.model.{name}": t.detach().cpu().contiguous() for name, t in tensors.items()}
    content = safetensors.torch.save(tensors, metadata={"format": "pt"})
    bipeft.write_atomically(Path(folder) / "adapter_model.safetensors", content)
    return config


def check(what, wanted, there, where):
    """Raises UsageError if something is wanted that is not there."""
    for name in wanted:
        if name not in there:
            raise bipeft.UsageError(f"{where} has no {what} '{name}': it is of another structure or model")


def read_weights(path):
    """{name: tensor} of a file that `bipeft.save_weights` wrote."""
    with bipeft.failing(f"{path} can't be read as safetensors"):
        return safetensors.torch.load_file(path)


def main(arguments=None):
    """The program. Returns the exit code: 0, or 2 after a person's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = bipeft.fail
    parser.add_argument("run", help="a run's folder, with structure.json and peft.safetensors")
    parser.add_argument("--model", help="folder or hub name of the backbone (the run's own)")
    parser.add_argument("--out", help="folder to write (RUN/peft)")
    transformers.logging.set_verbosity_error()
    try:
        transformers.logging.disable_progress_bar()
        settings = parser.parse_args(arguments)
        if "" in vars(settings).values():
            bipeft.fail("a flag is empty: give it a value, or leave it out")
        run = Path(settings.run)
        out = Path(settings.out or run / "peft")
        if out.is_file() or (out / "config.json").exists():
            raise bipeft.UsageError(f"--out {out} is a file, or a model's folder: name a folder of the adapter's own")
        with bipeft.failing(f"{run} holds no finished run", ": name the run's --out, of several seeds OUT/seed-N"):
            bipeft.finished(run)
        structure = bipeft.load_structure(run / "structure.json")
        weights = run / "peft.safetensors"
        name = settings.model or (str(run / "backbone") if structure.backbone == "toy" else structure.backbone)
        loader = bipeft.loader_of(name)
        with bipeft.failing(f"the model {name} can't be loaded", bipeft.MODEL_ADVICE):
            model = loader.from_pretrained(name, dtype="auto")
        bipeft.require_same_backbone(bipeft.backbone_of(weights), bipeft.backbone_sample(model), run)
        config = to_peft(structure, read_weights(weights), out, model)
        ranks = list(config.rank_pattern.values())
        print(f"{len(ranks)} modules, {structure.parameters:,} parameters, of rank "
              f"{', '.join(f'{r} ({ranks.count(r)})' for r in sorted(set(ranks)))}: written to {out}")
        return 0
    except (bipeft.UsageError, OSError, KeyboardInterrupt) as error:
        print(f"to_peft.py: {str(error) or 'stopped'}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
