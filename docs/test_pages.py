"""Tests of the pages: links, lines, commands and code of README.md and docs/.   python -m pytest -q docs/test_pages.py

A command is parsed by the parser of the program that it names, and nothing is run but `./run_glue.sh --dry-run`. What
is neither a checked command, nor code that test_bipeft.py runs, nor what a command above it printed, nor a formula, is
a failure; of the walk-through test_walkthrough.py checks the blocks.
"""

import argparse
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
import unicodedata
from pathlib import Path
from urllib.parse import urlparse

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import bipeft                                                                                          # noqa: E402

PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")
                              if ".pytest_cache" not in p.parts)]
WALK = "docs/walkthrough.md"               # quotes bipeft.py and shows a run: test_walkthrough.py checks either
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
    """The anchors that GitHub gives a page's headings."""
    found = []
    for heading in re.findall(r"^#+ (.*)", blocks_of(text)[1], re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()).replace(" ", "-")
        again = sum(re.sub(r"-\d+$", "", other) == slug for other in found)
        found.append(f"{slug}-{again}" if again else slug)
    return found


def parsed(script, arguments, monkeypatch, partly=False):
    """Has a script's own parser take the arguments, and ends it there.   partly: some that it asks for are left out."""
    class Parsed(Exception):
        pass

    def parse_args(self, args=None, namespace=None):
        for action in self._actions:
            action.required = action.required and not partly
        real(self, args, namespace)
        raise Parsed

    real = argparse.ArgumentParser.parse_args
    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patched.setattr(sys, "argv", [script, *arguments])
        patched.syspath_prepend(str((ROOT / script).parent))
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / script), run_name="__main__")


def check(words, monkeypatch):
    """Fails unless the command is of a known form, and its files and flags are there."""
    while "=" in words[0]:                                        # VARIABLE=value before a command
        words = words[1:]
    program, rest = Path(words[0]).name, words[1:]
    if program == "torchrun":
        assert re.fullmatch(r"--nproc_per_node=\d+", rest[0])
        program, rest = "python", rest[1:] or ["bipeft.py"]       # the flag alone, named in a sentence
    if program == "run_glue.sh":
        done = subprocess.run([words[0], "--dry-run", *rest], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count("bipeft.py") > 1, done.stderr
        return
    if program.endswith(".py"):                                   # a name and flags, in a sentence
        (script,) = ROOT.glob(words[0] if "/" in words[0] or program == "bipeft.py" else f"docs/**/{program}")
        parsed(script, rest, monkeypatch, partly=True)
        return
    assert program in ("python", "python3", "pip"), "a command of no known form"
    if program == "pip" or rest[:2] == ["-m", "pytest"]:
        names = [word for word in rest if not word.startswith("-") and word not in ("install", "pytest")]
        assert names and all((ROOT / name).exists() for name in names)
    elif rest[:2] == ["-m", "venv"]:
        assert rest == ["-m", "venv", ".venv"]
    elif rest[0] != "bipeft.py":
        parsed(rest[0], rest[1:], monkeypatch)
        if "--" in rest:                                          # kill.py: what follows is for bipeft.py
            bipeft.parse(rest[rest.index("--") + 1:])
    elif rest[1:] != ["--help"]:
        bipeft.parse(rest[1:])                                    # UsageError: a flag or a value that it refuses


@EVERY_PAGE
def test_lines_and_paragraphs_are_short(page):
    def columns(line):
        return sum(not unicodedata.combining(c) for c in line)

    text = (ROOT / page).read_text()
    assert [line for line in text.splitlines() if columns(line) > 120] == []
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
    two = re.compile(r'<picture>\n<source media="\(prefers-color-scheme: dark\)" srcset="(.+)">\n'
                     r'<img src="(.+)" alt="[^"]+">\n</picture>')                       # a dark page's, a light one's
    assert all(((ROOT / page).parent / path).exists() for pair in two.findall(prose) for path in pair)
    rest = re.sub(r"\]\([^)]*\)", "", two.sub("", prose))
    assert re.findall(r"https?://\S+|\bwww\.\S+|<img|\]\[", rest) == []            # a link has one form alone
    for path in re.findall(r"\b(?:docs/[\w./-]+|\w+)\.(?:md|py|png|sh)\b", two.sub("", text)):
        assert (ROOT / path).exists() or list(ROOT.glob(f"docs/**/{path}")), f"{path} is named and not there"


@EVERY_PAGE
def test_every_block_is_a_command_or_code_that_is_run_or_what_a_command_printed(page):
    tests = (ROOT / "test_bipeft.py").read_text()
    text = (ROOT / page).read_text()
    blocks, prose = blocks_of(text)
    assert not re.search(r"```|~~~|<pre|<code|\n\n(    |\t)\S", prose), "a block of another form"
    for number, (language, code, before) in enumerate(blocks):
        if language == "math":
            assert all(code.count(a) == code.count(b) > 0 for a, b in [("{", "}")])
        elif page == WALK and language in ("python", "text"):
            pass
        elif language == "python":
            compile(code, f"{page}, block {number}", "exec")
            assert f'code_of("{page}")' in tests, "test_bipeft.py runs the code of this page"
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
    programs = "".join(path.read_text() for path in (ROOT / "bipeft.py", ROOT / "run_glue.sh", *ROOT.glob("docs/*/*.py")))
    flags = re.findall(r"(?<![\w-])--([a-z][\w-]*)", " ".join(re.findall(r"`--[^`]*`", (ROOT / page).read_text())))
    assert [flag for flag in flags if not re.search(rf"\b{flag.replace('-', '[-_]')}\b", programs)] == []


def test_the_checks_refuse_what_they_are_there_for(monkeypatch):
    for line in ("python bipeft.py --no-such-flag", "python bipeft.py --task rte --ranks x", "make all",
                 "python docs/examples/causal.py --nothing 3", "python docs/experiments/kill.py -- --nothing 3",
                 "python docs/no_such.py", "./run_glue.sh --nothing",
                 "python -m pytest no_such.py", "pip install -r no.txt", "python -m http.server", "./other.sh"):
        with pytest.raises((AssertionError, SystemExit, OSError, ValueError)):          # UsageError is a ValueError
            check(line.split(), monkeypatch)
    assert slugs("# A `b`: c, d!\n## The 3 x's\n```text\n# no\n```\n## A b c d\n") == ["a-b-c-d", "the-3-xs", "a-b-c-d-1"]
    assert all(len(list(commands_of(page))) > 2 for page in ("README.md", "docs/performance.md", "docs/examples/README.md"))
