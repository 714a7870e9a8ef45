"""README.md, docs/ and RESULTS.md are true: commands parse, links lead somewhere, figures are those of results/."""
import ast
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import bases

ROOT = Path(__file__).parent.parent
README, RESULTS = (ROOT / "README.md").read_text(), (ROOT / "RESULTS.md").read_text()
PAGES = {file: file.read_text() for file in (ROOT / "README.md", ROOT / "RESULTS.md", *ROOT.glob("docs/**/*.md"))}
ALLOWED = {
    "torch", "einops", "safetensors", "open_clip", "transformers", "tqdm", "imageio", "numpy", "PIL",
    "matplotlib", "tensorboard", "huggingface_hub", "sentencepiece", "ftfy",
    "tokenizers", "torchvision", "modelscope", "wandb", "pyiqa", "av", "torchao"}


def commands():
    """Every `python x.py ...` or `torchrun ... x.py ...` of the pages and of the files' docstrings."""
    text = "\n".join(block for page in PAGES.values() for block in re.findall(r"```bash\n(.*?)```", page, re.S))
    files = sorted(ROOT.glob("*.py"))
    text += "\n".join(ast.get_docstring(ast.parse(f.read_text())) or "" for f in files)
    lines = [x.strip().split(" && ")[-1].split("   ")[0].split("  #")[0] for x in text.splitlines()]
    lines = [x for x in lines if re.match(r"(python|torchrun|\./torchrun\.sh) ", x)]
    return [x for x in lines if "..." not in x and ".py" in x]


@pytest.mark.parametrize("command", commands())
def test_command_parses(command):
    words = shlex.split(command)
    script = next(i for i, w in enumerate(words) if w.endswith(".py"))
    assert (ROOT / words[script]).exists()
    module = importlib.import_module(words[script].removesuffix(".py"))
    if words[script + 1:][:1] == ["fit"]:
        options, own = module.fit_args(words[script + 1:])
        if options.method:
            importlib.import_module(options.method).get_args(own)
    elif hasattr(module, "get_args"):
        module.get_args(words[script + 1:])


def test_there_are_commands_to_check():
    assert len(commands()) > 15


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 160
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


def anchors(page):
    """GitHub's names of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere():
    for file, page in PAGES.items():
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page):
            path, _, anchor = link.partition("#")
            target = file.parent / path if path else file
            assert target.exists(), f"{file.name}: {link}"
            assert not anchor or anchor in anchors(target.read_text()), f"{file.name}: {link}"


def test_the_file_tables_are_whole():
    rows = re.findall(r"^\| `([\w.]+\.py)` \|", README, re.M)
    assert len(rows) == len(set(rows)) and set(rows) == {f.name for f in ROOT.glob("*.py")}


def test_imports_stay_within_the_card():
    """Third-party names; test_house.py looks at the arrows between our own files."""
    ours = {f.stem for f in ROOT.glob("*.py")}
    for f in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(f.read_text())):
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            else:
                continue
            tops = {n.split(".")[0] for n in names} - set(sys.stdlib_module_names)
            tops -= {"diffusers"} if f.name == "bench.py" else set()  # a peer, where it is installed
            assert tops <= ALLOWED | ours, f"{f.name}: {tops - ALLOWED - ours}"


def test_figures_are_those_of_the_result_files():
    files = list((ROOT / "results").glob("*.json"))
    assert files
    for file in files:
        for row in json.loads(file.read_text())["table"]:
            assert row in RESULTS, f"{file.name}: RESULTS.md lacks {row}"


def test_bases_and_what_trains_them():
    table = (ROOT / "docs/weights.md").read_text().split("| base | what | trained by | files |")[1].split("\n\n")[0]
    shown = {}
    for line in table.splitlines()[2:]:
        cells = line.strip("| ").split(" | ")
        shown |= dict.fromkeys(re.findall(r"`(.+?)`", cells[0]), sorted(cells[2].replace("-", "").split(", ")))
    assert shown == {name: sorted(row.methods or [""]) for name, row in bases.BASES.items() if row.files}
