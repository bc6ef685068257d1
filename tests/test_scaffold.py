"""`diffusers-ext new`: what it writes works at once, what it refuses changes nothing; and `__init__` from the registry."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from diffusers_ext import cli, registry, scaffold

from .fresh import ROOT

OPEN = (
    '[[paper]]\nkey = "walk_open"\ntitle = "Open \\"for\\" all"\narea = "other"\nform = "hook"\nsummary = "Is open."\n'
)
KEYS = {form: "walk_open" if form == "hook" else f"walk_{form}" for form in scaffold.forms()}
PROOFS = {"reference": "skipped", "claim": "skipped", "exact": "passed", "loads": "passed", "card": "passed"}
# Two models and two pipelines that hooks go on, and some that they refuse: each rule goes over all of them.
ONLY = (
    "UNet2DConditionModel", "DiTTransformer2DModel", "BertForMaskedLM", "avatars-sd", "tiny-ddpm", "tiny-flux", "tiny-text",
)  # fmt: skip
_LEFT_OUT = ("__pycache__", "golden", "results", "*.toml", "test_*.py")


def copy_checkout(root: Path, whole: bool) -> Path:
    """A checkout without the other papers, since collecting their rules takes longer than those of eleven methods.

    Args:
        root: a folder that is not there.
        whole: else only what adding a method reads and edits.
    """
    if whole:
        for name in ("diffusers_ext", "tests"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns(*_LEFT_OUT))
        shutil.copytree(
            ROOT / "benchmarks", root / "benchmarks", ignore=lambda *_: {"zoo", "results", "judges", "data"}
        )
        (root / "benchmarks" / "data").mkdir()
        shutil.copy(ROOT / "benchmarks" / "data" / "avatars.npz", root / "benchmarks" / "data")
        shutil.copy(ROOT / "pyproject.toml", root)
        world = root / "tests" / "common" / "conftest.py"
        text = world.read_text(encoding="utf-8")
        assert text.count("travellers)\n") == 1
        world.write_text(text.replace("travellers)\n", f"travellers, only={ONLY})\n"), encoding="utf-8")
        for form in KEYS:
            shutil.copy(ROOT / "tests" / "common" / f"test_{form}.py", root / "tests" / "common")
    for name in ("registry.py", "__init__.py", "quantization/methods.py"):
        file = root / "diffusers_ext" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "diffusers_ext" / name, file)
    for folder in ("tests/methods", "diffusers_ext/catalogue"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "diffusers_ext" / "catalogue" / "other.toml").write_text(OPEN, encoding="utf-8")
    return root


def tree(root: Path) -> dict[str, bytes | None]:
    """All files with what they hold, and all folders."""
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.fixture
def checkout(tmp_path):
    return copy_checkout(tmp_path / "checkout", whole=False)


# --- what it writes --------------------------------------------------------------------------------------------------


def test_what_tests_share_needs_no_test():
    """Helpers are copied without the tests of other papers."""
    files = [*(ROOT / "tests").glob("*.py"), *(ROOT / "tests" / "common").glob("*.py")]
    helpers = [file for file in files if not file.name.startswith("test_")]
    assert len(helpers) > 20
    imports = re.compile(r"^\s*(from|import) (tests\.|\.*)(methods\.)?test_", re.MULTILINE)
    assert not [file.name for file in helpers if imports.search(file.read_text(encoding="utf-8"))]


@pytest.mark.slow
def test_methods_of_all_forms_pass_or_skip_at_once(tmp_path):
    """As a user would: the command for each form, then the proofs and the common rules, in one process."""
    root = copy_checkout(tmp_path / "checkout", whole=True)
    new = [["new", form, key] for form, key in KEYS.items()]
    new = [line if line[2] == "walk_open" else [*line, "--title", f"Of {line[1]}", "--area", "other"] for line in new]
    commands = f"""
from diffusers_ext import cli
for line in {new!r}:
    try:
        cli.main(line)
    except SystemExit as left:
        assert not left.code
"""
    env = os.environ | {"PYTHONPATH": str(root)}
    run = {"cwd": root, "env": env, "capture_output": True, "text": True}
    told = subprocess.run([sys.executable, "-c", commands], **run)
    assert told.returncode == 0, told.stderr
    tests = [f"tests/methods/test_{key}.py" for key in KEYS.values()]
    tests += [f"tests/common/test_{form}.py" for form in KEYS]
    # Compilation takes long, and is DeepCache's to show.
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", "not compiled_eagerly", "--junitxml=report.xml"]
    done = subprocess.run([sys.executable, "-m", "pytest", *tests, *options], **run)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]

    outcomes = {}
    for case in ElementTree.parse(root / "report.xml").iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcomes[f"{case.get('classname')}.{case.get('name')}"] = kinds.pop() if kinds else "passed"
    for form, key in KEYS.items():
        rules = [outcome for name, outcome in outcomes.items() if f"test_{form}.test_{form}[{key}" in name]
        proofs = [outcome for name, outcome in outcomes.items() if f"methods.test_{key}." in name]
        assert "passed" in rules and set(rules) <= {"passed", "skipped"}, form
        wanted = ["passed"] * 2 if form == "metric" else PROOFS.values()
        assert sorted(proofs) == sorted(wanted), form

    written = [line.split()[1] for line in told.stdout.splitlines() if line.startswith("wrote ")]
    assert len(written) >= 4 * len(KEYS) - 1  # a metric needs no benchmark; folders that are new have an `__init__`
    if shutil.which("ruff"):
        python = [name for name in [*written, "diffusers_ext/__init__.py"] if name.endswith(".py")]
        for check in (["check"], ["format", "--check"]):
            linted = subprocess.run(["ruff", *check, "--no-cache", *python], **run)
            assert linted.returncode == 0, linted.stdout


def test_an_open_row_gets_its_entry_and_nothing_else(checkout):
    file = checkout / "diffusers_ext" / "catalogue" / "other.toml"
    file.write_text(f"# A note.\n\n{OPEN}\n{OPEN.replace('walk_open', 'another')}", encoding="utf-8")
    before = tree(checkout)
    scaffold.write(scaffold.plan("hook", "walk_open", root=checkout))
    after = tree(checkout)
    rows = tomllib.loads(file.read_text(encoding="utf-8"))["paper"]
    assert [row["key"] for row in rows] == ["walk_open", "another"] and "entry" not in rows[1]
    assert rows[0]["entry"] == "WalkOpenConfig" and "dx.WalkOpenConfig(interval=2)" in rows[0]["usage"]
    assert file.read_text(encoding="utf-8").startswith("# A note.")
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {f"diffusers_ext/{name}" for name in ("catalogue/other.toml", "registry.py", "__init__.py")}


def test_names_are_registered_in_order(checkout):
    scaffold.write(scaffold.plan("pipeline", "mellow", title="Mellow", area="other", root=checkout))
    text = (checkout / "diffusers_ext" / "registry.py").read_text(encoding="utf-8")
    names = scaffold._names(text)
    assert names == registry.LAZY_NAMES | {"MellowPipeline": "diffusers_ext.pipelines.mellow"}
    assert list(names) == sorted(names)
    assert text.count('"MellowPipeline"') == 2, "among the public names and among those that are loaded by name"
    init = (checkout / "diffusers_ext" / "__init__.py").read_text(encoding="utf-8")
    assert "    from .pipelines.mellow import MellowPipeline\n" in init and '    "MellowPipeline",\n' in init


# --- what it refuses -------------------------------------------------------------------------------------------------


NEW = {"title": "A Title", "area": "other"}


@pytest.mark.parametrize(
    ("form", "key", "given", "said"),
    [
        ("cache", "mine", NEW, "`form` is 'cache'; allowed are adapter, attn_processor"),
        ("none", "mine", NEW, "`form` is 'none'"),
        ("_common", "mine", NEW, "`form` is '_common'"),
        ("hook", "Mine", NEW, "`key` is 'Mine'"),
        ("hook", "../mine", NEW, "`key` is '../mine'"),
        ("hook", "lambda", NEW, "`key` is 'lambda'"),
        ("hook", "", NEW, "`key` is ''"),
        ("hook", "mine", {"title": "A Title"}, "`area` is None; a new method needs one of other"),
        ("hook", "mine", {**NEW, "area": "cooking"}, "`area` is 'cooking'"),
        ("hook", "mine", {"area": "other"}, "`title` is None"),
        ("hook", "mine", {**NEW, "title": "Two\nlines"}, "`title` is"),
        ("hook", "mine", {**NEW, "arxiv": "2312.00858v2"}, "`arxiv` is '2312.00858v2'"),
        ("model", "walk_open", {}, "`form` is 'model'; the row 'walk_open' of other.toml has form 'hook'"),
        ("hook", "walk_open", {"title": "Other"}, "`title` is 'Other'; the row 'walk_open' is in other.toml already"),
        ("hook", "deep_cache", NEW, "the public name 'DeepCacheConfig', and that is taken"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(checkout, form, key, given, said):
    before = tree(checkout)
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        scaffold.plan(form, key, **given, root=checkout)
    assert tree(checkout) == before


def test_a_file_that_is_there_is_never_written_over(checkout):
    card = checkout / "diffusers_ext" / "hub_cards" / "mine.md"
    card.parent.mkdir()
    card.write_text("Mine.")
    before = tree(checkout)
    with pytest.raises(ValueError, match=r"there is diffusers_ext/hub_cards/mine.md already"):
        scaffold.plan("hook", "mine", **NEW, root=checkout)
    card.rename(card.with_name("other.md"))
    files = scaffold.plan("hook", "mine", **NEW, root=checkout)
    card.with_name("other.md").rename(card)  # made by somebody else meanwhile
    with pytest.raises(FileExistsError):
        scaffold.write(files)
    assert tree(checkout) == before


def test_a_method_is_added_once(checkout):
    scaffold.write(scaffold.plan("hook", "walk_open", root=checkout))
    with pytest.raises(ValueError, match=r"`key` is 'walk_open', and its row in other\.toml has the entry"):
        scaffold.plan("hook", "walk_open", root=checkout)


@pytest.mark.parametrize("number", range(4))
def test_where_writing_fails_nothing_is_left(checkout, monkeypatch, number):
    files = scaffold.plan("quantizer", "mine", **NEW, root=checkout)
    assert len(files.edited) == 4
    before, replace, count = tree(checkout), scaffold._replace, iter(range(100))

    def failing(path, text):
        if next(count) == number:
            raise OSError("The disk is full.")
        replace(path, text)

    monkeypatch.setattr(scaffold, "_replace", failing)
    with pytest.raises(OSError, match="The disk is full"):
        scaffold.write(files)
    assert tree(checkout) == before


def test_elsewhere_it_says_that_it_needs_a_checkout(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="needs a source checkout"):
        scaffold.plan("hook", "mine", root=tmp_path)
    monkeypatch.setattr(scaffold, "TEMPLATES", tmp_path / "templates")
    with pytest.raises(SystemExit) as left:
        cli.main(["new", "hook", "mine"])
    assert left.value.code == 2 and "needs a source checkout" in capsys.readouterr().err


# --- __init__ --------------------------------------------------------------------------------------------------------


def test_init_is_what_the_registry_has():
    text = (ROOT / "diffusers_ext" / "__init__.py").read_text(encoding="utf-8")
    assert scaffold.init_text(text, registry.LAZY_NAMES) == text, "write it again: python -m diffusers_ext.scaffold"


def test_init_is_written_again_and_then_stays(checkout):
    init = checkout / "diffusers_ext" / "__init__.py"
    text = init.read_text(encoding="utf-8")
    init.write_text(text.replace("    from .hub import push_to_hub, save_pretrained\n", ""), encoding="utf-8")
    assert scaffold.write_init(checkout) and not scaffold.write_init(checkout)
    assert init.read_text(encoding="utf-8") == scaffold.init_text(text, registry.LAZY_NAMES)


def test_imports_are_wrapped_and_sorted_as_ruff_has_them():
    names = {f"{name}_{'x' * 40}": "diffusers_ext.b2" for name in ("b", "A", "C")} | {"Z": "diffusers_ext.b10"}
    text = "if TYPE_CHECKING:\n\n\ndef __getattr__\n\n__all__ = [\n]\n\nregistry.register()\n"
    x = "x" * 40
    found = scaffold.init_text(text, names)
    assert (
        f"    from .b2 import (\n        A_{x},\n        C_{x},\n        b_{x},\n    )\n    from .b10 import Z\n"
        in found
    )
    with pytest.raises(ValueError, match="has no '__all__"):
        scaffold.init_text("if TYPE_CHECKING:\n\n\ndef __getattr__", names)
