"""Tests of the pages: links, lines, commands, code and names of README.md and docs/.

The code of README.md and copying.md is run. A command is parsed by its program's parser, and none is run but
`./run_glue.sh --dry-run`. What is neither of these, nor what a command above it printed, nor a formula, is a failure.
"""

import argparse
import ast
import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
import tokenize
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlparse

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import bipeft                                                                                          # noqa: E402

PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")
                              if ".pytest_cache" not in p.parts)]
RUN = ("README.md", "docs/copying.md")     # whose code is run below
HOSTS = {"arxiv.org", "github.com"}
EVERY_PAGE = pytest.mark.parametrize("page", PAGES)


def blocks_of(text):
    """(language, code, what stands before it since the last heading) of each fenced block; the text without them."""
    fence = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
    blocks = [(m[1], m[2], re.split(r"^##+ ", text[:m.start()], flags=re.MULTILINE)[-1]) for m in fence.finditer(text)]
    return blocks, fence.sub("", text)


def commands_of(page):
    """The commands of a page, as lists of words: of its blocks of bash, and between backquotes in its text."""
    blocks, prose = blocks_of((ROOT / page).read_text())
    lines = [line for language, code, _ in blocks if language == "bash"
             for line in code.replace("\\\n", " ").splitlines()]
    lines += [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", prose)
              if re.match(r"(\w+=\S+ )*((\S+/)?(python3?|pip|torchrun) |\./\w|\S+\.py --)", found)]
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")         # without what stands behind a #
        lexer.whitespace_split = True
        for last, words in itertools.groupby(lexer, lambda word: word == "&&"):
            if not last:
                yield list(words)


def slugs(text):
    """The anchors of a page: those that GitHub gives its headings, and its own."""
    found = re.findall(r'<a id="(\w+)"></a>', text)
    for heading in re.findall(r"^#+ (.*)", blocks_of(text)[1], re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()).replace(" ", "-")
        again = sum(re.sub(r"-\d+$", "", other) == slug for other in found)
        found.append(f"{slug}-{again}" if again else slug)
    return found


def parsed(script, arguments, monkeypatch):
    """Has a script's own parser take the arguments, and ends it there."""
    def parse_args(self, args=None, namespace=None):
        real(self, args, namespace)
        raise EOFError                                              # of no parser
    real = argparse.ArgumentParser.parse_args
    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patched.setattr(sys, "argv", [script, *arguments])
        patched.syspath_prepend(str((ROOT / script).parent))
        pytest.raises(EOFError, runpy.run_path, str(ROOT / script), run_name="__main__")


def check(words, monkeypatch):
    """Fails unless the command is of a known form, and its files and flags are there."""
    program, rest = Path(words[0]).name, words[1:]
    if program == "torchrun":
        assert re.fullmatch(r"--nproc_per_node=\d+", rest[0])
        program, rest = "python", rest[1:]
    if program == "run_glue.sh":
        done = subprocess.run([words[0], "--dry-run", *rest], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count("bipeft.py") > 1, done.stderr
        return
    assert program in ("python", "python3", "pip"), "a command of no known form"
    if program == "pip" or rest[:2] == ["-m", "pytest"]:
        names = [word for word in rest if not word.startswith("-") and word not in ("install", "pytest")]
        pinned = (ROOT / "docs/examples/requirements.txt").read_text().split()
        assert names and all(name in pinned or (ROOT / name).exists() for name in names)
    elif rest[:2] == ["-m", "venv"]:
        assert rest == ["-m", "venv", ".venv"]
    elif rest[0] != "bipeft.py":
        parsed(rest[0], rest[1:], monkeypatch)
    elif rest[1:] != ["--help"]:
        bipeft.parse(rest[1:])                                    # UsageError: a flag or a value that it refuses


@EVERY_PAGE
def test_lines_and_paragraphs_are_short(page):
    def columns(line):
        return sum(not unicodedata.combining(c) for c in line)

    text = (ROOT / page).read_text()
    rows = "|" if page.endswith("_tables.md") else "| <a id="             # of decisions and tables can't be broken
    assert [line for line in text.splitlines() if columns(line) > 120 and not line.startswith(rows)] == []
    long, paragraph = [], []
    for line in [*blocks_of(text)[1].splitlines(), ""]:
        if not line.strip() or re.match(r"#|\|| *[-*] |\d+\. ", line):             # a point or an item begins anew
            long += [paragraph[0]] if len(paragraph) > 6 else []
            paragraph = []
        if line.strip() and line[0] not in "#|":
            paragraph.append(line)
    assert long == []


@EVERY_PAGE
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    prose = blocks_of(text)[1]
    for target in re.findall(r"\]\(([^)]*)\)", re.sub("`[^`]*`", "", prose)):
        if ":" in target:
            url = urlparse(target)
            assert url.scheme == "https" and url.netloc in HOSTS and re.fullmatch(r"(/[\w.\-]+)+", url.path), target
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists() and there.resolve().is_relative_to(ROOT), target
        assert not anchor or anchor in slugs(there.read_text()), target
    rest = re.sub(r"\]\([^)]*\)", "", prose)
    assert re.findall(r"https?://\S+|\bwww\.\S+|<img|\]\[", rest) == []            # a link has one form alone
    for path in re.findall(r"\b(?:docs/[\w./-]+|\w+)\.(?:md|py|png|sh)\b", re.sub(r"\]\([^)]*\)", "", text)):
        assert (ROOT / path).exists() or list(ROOT.glob(f"docs/**/{path}")), f"{path} is named and not there"


@EVERY_PAGE
def test_every_block_is_a_command_or_code_that_is_run_or_what_a_command_printed(page):
    blocks, prose = blocks_of((ROOT / page).read_text())
    assert not re.search(r"```|~~~|<pre|<code|\n\n(    |\t)\S", prose), "a block of another form"
    for number, (language, code, before) in enumerate(blocks):
        if language == "math":
            assert code.count("{") == code.count("}") > 0
        elif language == "python":
            assert page in RUN, f"block {number} is code of a page whose code no test runs"
        elif language == "text":
            assert "```bash" in before, "what a command of the same section printed"
        else:
            assert language == "bash", f"a block of {language or 'no language'}"


@EVERY_PAGE
def test_every_command_is_one_that_its_program_takes(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
    for words in commands_of(page):
        try:
            check(words, monkeypatch)
        except ModuleNotFoundError as error:                  # flags are checked where the experiments' packages are
            needed = (ROOT / "docs/experiments/requirements.txt").read_text()
            assert re.search(rf"^{error.name}\b", needed, re.MULTILINE), error
        except (AssertionError, SystemExit, OSError, ValueError) as error:
            pytest.fail(f"{' '.join(words)}: {type(error).__name__} {error}")
    programs = "".join(path.read_text() for path in
                       [ROOT / "bipeft.py", ROOT / "run_glue.sh", *ROOT.glob("docs/**/*.py")])
    flags = re.findall(r"(?<![\w-])--([a-z][\w-]*)", " ".join(re.findall(r"`--[^`]*`", (ROOT / page).read_text())))
    assert [flag for flag in flags if not re.search(rf"\b{flag.replace('-', '[-_]')}\b", programs)] == []


def code_of(page):
    """The blocks of Python in a page, compiled."""
    blocks = blocks_of((ROOT / page).read_text())[0]
    return [compile(code, f"{page}, block {number}", "exec") for number, (language, code, _) in enumerate(blocks)
            if language == "python"]


def tiny_bert():
    """A random BERT of two layers with a classification head, and two batches for it."""
    config = transformers.BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=64, num_labels=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, ids = transformers.BertForSequenceClassification(config).eval(), torch.randint(1, 50, (2, 4, 10))
    return model, [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i[:, 0] % 2} for i in ids]


def test_the_code_of_copying_md_runs(monkeypatch):
    monkeypatch.setattr(bipeft, "KINDS", dict(bipeft.KINDS))                                   # it adds a kind
    equations, loop, kind, its_test, *others, _ = code_of("docs/copying.md")      # the last: test_baselines.py
    with torch.random.fork_rng():
        exec(equations, names := {})
        assert (names["smoothed"] != 0).all()
        exec(loop, names := {})                                                # needs nothing of the block before
        assert max(line for *_, line in loop.co_lines()) <= 30                 # a gist
        assert 0 < names["structure"].parameters <= 800 and len(names["trained"]) > 2      # of the head alone: 2
        for block in (kind, its_test):
            exec(block, names)
        assert names["structure"].parameters <= 300 and "ia3" in {m["kind"] for m in names["structure"].modules}
        for block in others:
            exec(block, names)
    assert len(names["space"]) == 42 and names["structure"].parameters <= 1500


def test_equations_and_kinds_of_modules_can_be_lifted_out_by_themselves():
    # what copying.md says that they need: section 1 torch alone; a class its base and a few functions
    source = Path(bipeft.__file__).read_text()
    equations = source[source.index("# 1. The equations"):source.index("# 2. The searchable modules")]
    exec(equations, lifted := {"math": math, "torch": torch, "F": F})
    page, found = blocks_of((ROOT / "docs/copying.md").read_text())[0][0][1], {}
    for name, of in (("bipeft", bipeft), ("lifted", SimpleNamespace(**lifted))):
        with torch.random.fork_rng():
            exec(page.replace("import bipeft\n", ""), names := {"bipeft": of})
        found[name] = names["smoothed"]
    assert torch.equal(found["bipeft"], found["lifted"])
    for kind in bipeft.KINDS.keys() - {"prefix"}:                              # its attention is transformers'
        cls = bipeft.KINDS[kind]
        classes = [c for c in reversed(cls.__mro__) if c.__module__ == "bipeft"]
        parts = [*classes, bipeft.zeros, bipeft.kaiming, bipeft.width, bipeft.first_input]
        names = {"math": math, "torch": torch, "F": F, "nn": nn}
        exec("\n\n".join(map(inspect.getsource, parts)), names)
        place = nn.LayerNorm(32) if kind == "lnfit" else nn.Linear(32, 32)
        module, x = names[cls.__name__](place, 4), torch.randn(5, 32)
        bare = place(x)
        module.attach(place, cls.roles[0])
        nn.init.ones_(list(module.parameters())[-1])
        assert not torch.allclose(place(x), bare)


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A small run where the README's code looks for one, in the folder that is then the current one."""
    monkeypatch.chdir(tmp_path)
    tokenizer = bipeft.toy_tokenizer()
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0))
    for part in (model, tokenizer):
        part.save_pretrained("model")
    for split, examples in bipeft.toy_splits(0).items():
        lines = [json.dumps({"source": e.source, "target": e.target}) for e in examples[:8]]
        Path(f"{split}.jsonl").write_text("\n".join(lines))
    assert bipeft.main("--task custom --data-dir . --model model --space lora,bitfit --budget 400 --triggers 2 "
                       "--epochs 1 --batch-size 4 --device cpu --out runs/custom-s2-0".split()) == 0


def test_the_code_of_the_readme_runs(finished, monkeypatch, capsys):
    rival, load, library = code_of("README.md")
    capsys.readouterr()
    exec(load, names := {})
    assert set(capsys.readouterr().out.split()) <= set(names["tokenizer"].get_vocab()) and len(names["peft"]) > 0

    model, batches = tiny_bert()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    search = functools.partial(bipeft.search, triggers=2, window=1, tau=0.0)
    monkeypatch.setattr(bipeft, "search", lambda *args, **kwargs: search(       # the page's budget is of a larger one
        *args, **{**kwargs, "budget": 1000, "steps": 4, "warmup": 1}))
    exec(library, names := {"model": model, "train_batches": batches, "val_batches": batches, "batches": batches,
                            "evaluate": lambda: 0.0})
    assert 0 < names["structure"].parameters <= 1000 and names["structure"].also_trained > 0
    names["peft"].detach()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(p, after[name]) for name, p in before.items())
    large = transformers.T5ForConditionalGeneration(transformers.AutoConfig.from_pretrained("model", vocab_size=15_000))
    monkeypatch.setattr(bipeft, "load_backbone", lambda *_: (large, None))
    exec(rival, names := {})
    structure = bipeft.load_structure("even.json")
    assert 0.9 * names["budget"] < structure.parameters <= names["budget"] and structure.space == "bitfit"


def names_of_decisions():
    """{number of a decision: the names behind its arrow, or in the last cell of its row}."""
    decisions = (ROOT / "docs/decisions.md").read_text().partition("## Measured")[0]
    points = re.findall(r"^(\d+)\. <a id=\"d(\d+)\"></a>(.*?)(?=\n\d+\. |\n\n|\Z)", decisions, re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^\| <a id=\"d(\d+)\"></a>(\d+) \|(?:[^|]|\\\|)+\|(?:[^|]|\\\|)+\|(.*) \|$", decisions,
                      re.MULTILINE)
    found = [(number, anchor, text.partition("→")[2]) for number, anchor, text in points] + rows
    assert all(number == anchor for number, anchor, _ in found)
    return {int(number): re.findall("`(.+?)`", names) for number, _, names in found}


def test_every_name_that_the_pages_point_to_exists():
    named = sum(names_of_decisions().values(), [])
    for arrow in re.findall("→((?:[\\s,]*`[^`]+`)+)", (ROOT / "docs/performance.md").read_text()):
        named += re.findall("`(.+?)`", arrow)
    tests = (ROOT / "test_bipeft.py").read_text()
    for page, heading in (("README.md", "## Beside the paper"), ("docs/copying.md", "## Where each piece stands")):
        table = (ROOT / page).read_text().partition(heading)[2].partition("\n## ")[0]
        rows = [line.split("|") for line in table.splitlines() if line.startswith("|")]
        for _, _, code, cell, _ in rows[2:]:
            named += re.findall("`(.+?)`", code)
            assert [name for name in re.findall("`(.+?)`", cell) if f"\ndef {name}(" not in tests] == []
    for page in PAGES:                                     # `Space.enter`, `bipeft.search`, `expected_size(..)`
        for first, rest in re.findall(r"`(\w+)((?:\.\w+)*)(?:\([^`]*\))?`", blocks_of((ROOT / page).read_text())[1]):
            if rest and first == "bipeft" and rest not in (".py", ".main"):
                named.append(rest[1:])
            elif rest and inspect.isclass(getattr(bipeft, first, None)):
                named.append(first + rest)
    for name in named:
        functools.reduce(getattr, name.split("."), bipeft)                     # AttributeError: a name to be mended
    assert len(named) > 100


def test_every_decision_cited_in_the_file_names_the_place():
    source, decisions, seen = Path(bipeft.__file__).read_text(), names_of_decisions(), []
    assert list(decisions) == list(range(1, len(decisions) + 1))

    def within(body, name=""):
        """(first line, last line, qualified name) of every class and function."""
        for node in body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                yield node.lineno, node.end_lineno, name + node.name
                yield from within(node.body, f"{name}{node.name}.")

    places = list(within(ast.parse(source).body))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (tokenize.COMMENT, tokenize.STRING):
            continue
        for match in re.finditer(r"\[D\d+(?:, D\d+)*\]", token.string):
            line = token.start[0] + token.string[:match.start()].count("\n")
            here = [name for first, last, name in places if first <= line <= last]
            for number in map(int, re.findall(r"\d+", match[0])):
                # the head of the file explains the form by one of them
                named = any(f"{name}.".startswith(f"{here[-1]}.") for name in decisions[number]) if here else True
                assert named, (line, number)
                seen.append(number)
    assert len(seen) > 30 and {1, 2, 3, 4, 5, 6, 7, 8, 10, 11} <= set(seen)


def test_the_file_keeps_its_measures():
    # no function over 45 lines, no line over 110 columns
    source = Path(bipeft.__file__).read_text()
    assert [line for line in source.splitlines() if len(line) > 110] == []
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno + 1 > 45] == [] and len(functions) > 100
