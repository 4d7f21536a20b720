"""What the READMEs promise: short, links that lead somewhere, commands that exist with the flags that are given."""

import argparse
import ast
import functools
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def names_of(*patterns):
    return [str(path.relative_to(ROOT)) for pattern in patterns for path in sorted(ROOT.glob(pattern))]


READMES = names_of("README.md", "*/README.md", "*/VLM.md")
DOCUMENTS = READMES + names_of("docs/results/*.md")
MOST_LINES = {"README.md": 100}  # every other: 150


def test_there_is_a_readme_of_the_whole_of_shared_and_of_each_task():
    assert {"README.md", "shared/README.md", "task1_classification/README.md"} < set(READMES)
    assert {"task3_retrieval/README.md", "vqa_sft_grpo/README.md"} < set(READMES)


@pytest.mark.parametrize("name", READMES)
def test_readmes_are_short(name):
    lines = (ROOT / name).read_text(encoding="utf-8").count("\n")
    assert lines <= MOST_LINES.get(name, 150), f"{name} has {lines} lines: move what was measured to docs/results/"


def test_the_readme_of_shared_names_every_module_and_no_readme_names_one_that_is_gone():
    modules = [name for name in names_of("shared/**/*.py") if not name.endswith("__.py") and "phantom" not in name]
    text = (ROOT / "shared/README.md").read_text(encoding="utf-8")
    assert len(modules) > 20 and not [name for name in modules if f"{Path(name).name}`" not in text]
    known = {Path(name).name for name in names_of("*/*.py", "shared/*/*.py")}
    for name in READMES:
        named = re.findall(r"`[\w/.]*?(\w+\.py)`", (ROOT / name).read_text(encoding="utf-8"))
        assert not set(named) - known, f"{name}: {set(named) - known}"


def test_a_helper_module_run_as_a_script_says_what_it_is():
    folders = ("shared/**", "task*", "vqa_sft_grpo", "attention_viz", "chexquery")
    modules = names_of(*(f"{folder}/*.py" for folder in folders))
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in modules if not name.endswith("__init__.py")}
    silent = [name for name, text in texts.items() if "if __name__ ==" not in text]
    assert len(texts) > 80 and not silent
    for name in ("shared/data/images.py", "vqa_sft_grpo/alarms.py"):
        done = subprocess.run([sys.executable, name], cwd=ROOT, capture_output=True, text=True)
        doc = ast.get_docstring(ast.parse(texts[name]), clean=False)
        assert done.returncode == 1 and done.stderr.strip() == doc.strip()


# ---------------------------------------------------------------------------------------------------------------- links

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def anchors(path):
    """The names that GitHub gives the headings of a file."""
    headings = re.findall(r"^#+ +(.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", LINK.sub("", h)).strip().lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_images_lead_somewhere(name):
    path, dead = ROOT / name, []
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue  # the web
        file, _, anchor = link.partition("#")
        target = path if not file else path.parent / file
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead, f"{name}: {dead}"


# ------------------------------------------------------------------------------------------------------------- commands


def commands_of(text):
    """Every command that starts a script or a module with python or torchrun -> (its name, the words behind it)."""
    blocks = [block.replace("\\\n", " ") for language, block in FENCE.findall(text) if language in ("", "bash", "sh")]
    lines = "\n".join(blocks).split("\n") + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    found = []
    for part in (part for line in lines for part in re.split(r"&&|;|(?<!\S)\|(?!\S)", line)):
        try:
            words = shlex.split(part, comments=True)
        except ValueError:  # an apostrophe: not a command
            continue
        start = next((i for i, word in enumerate(words) if word in ("python", "python3", "torchrun")), len(words))
        words = words[start:]
        if words[1:2] == ["-m"]:
            found.append((words[2], words[3:]))
            continue
        script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if script is not None:
            found.append((words[script], words[script + 1 :]))
    return found


class Found(BaseException):
    """Carries a parser out of a script, past everything that the script would do or catch."""


@functools.cache
def flags_of(module_name):
    """The flags of the parser that `python -m module` or the script of this module makes, those of subcommands too."""
    module = importlib.import_module(module_name)
    entry = module.parse_args if hasattr(module, "parse_args") else module.main

    def caught(parser, *args, **options):
        raise Found(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "print_help", caught)
        with pytest.raises(Found) as found:
            entry(["--help"])
    parsers, flags = [found.value.args[0]], set()
    while parsers:
        for action in parsers.pop()._actions:
            flags.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return flags


def accepted(module_name, flag):
    """As ScriptParser takes it: underscores are dashes, and a few documented names stand for others."""
    from shared.runtime import ALIASES

    known = flags_of(module_name)
    flag = flag.partition("=")[0].replace("_", "-")
    return flag in known or ALIASES.get(flag) in known


def module_of(name):
    """A script's path or a module's name -> the module to import, None for one of another project (pytest, pip)."""
    path = ROOT / (name if name.endswith(".py") else name.replace(".", "/") + ".py")
    if path.with_suffix("").is_dir():
        path = path.with_suffix("") / "__main__.py"
    if not name.endswith(".py") and not (ROOT / name.partition(".")[0]).is_dir():
        return None
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    starts = '__name__ == "__main__"' in text and "raise SystemExit(__doc__)" not in text
    assert starts, f"{name} is nothing that can be started"
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_exist_with_their_flags(name):
    wrong = []
    for command, words in commands_of((ROOT / name).read_text(encoding="utf-8")):
        module = module_of(command)
        flags = [word for word in words if re.match(r"--[a-z]", word)] if module else []
        wrong += [f"{command} {flag}" for flag in flags if not accepted(module, flag)]
    assert not wrong, f"{name}: {wrong}"


def test_these_checks_find_what_they_look_for():
    text = "Run `python a/b.py --x 1 && python -m c.d --y_z`:\n```bash\ntorchrun -n 2 e.py \\\n    --w  # why\n```\n"
    assert commands_of(text) == [("e.py", ["--w"]), ("a/b.py", ["--x", "1"]), ("c.d", ["--y_z"])]
    assert accepted("vqa_sft_grpo.train_sft", "--batch_size") and accepted("vqa_sft_grpo.train_sft", "--cfg")
    assert not accepted("vqa_sft_grpo.train_sft", "--batch-sizes")
    assert accepted("shared.data.__main__", "--hash-images")
    assert module_of("shared.phantom") == "shared.phantom.__main__"
    for name in ("vqa_sft_grpo/zoo.py", "vqa_sft_grpo/rows.py", "shared.data.medmnist", "shared.data.audit"):
        with pytest.raises(AssertionError, match="nothing that can be started"):
            module_of(name)
    assert module_of("pytest") is None
