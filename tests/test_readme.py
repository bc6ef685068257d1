"""The README: its code runs, and what it says of versions and files is so."""

from __future__ import annotations

import re
import tomllib

import pytest

from .fresh import ROOT, run_fresh
from .hub_server import USER, HubServer

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_code_runs(tmp_path):
    assert BLOCKS
    code = ["import os", f"os.chdir({str(tmp_path)!r})"]
    code += [block.replace("you/", f"{USER}/") for block in BLOCKS]
    code += ["assert [entry.key for entry in dx.status(dx.Pipeline.from_pretrained('my-avatars'))] == ['deepcache']"]
    with HubServer() as hub:
        run_fresh("\n".join(code), env=hub.env)
        assert {"model_index.json", "README.md"} <= set(hub.files(f"{USER}/my-avatars"))


def test_supported_versions_are_those_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated = re.search(r"Supported: `(.*?)`", README)
    assert stated is not None and stated[1] in project["dependencies"]
    python = project["requires-python"].removeprefix(">=")
    assert f"Python {python} or newer" in README
    assert f"sys.version_info >= ({python.replace('.', ', ')})" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", re.findall(r"^\| `([\w/]+)` \|", README, re.MULTILINE))
def test_folders_are_there(path):
    assert (ROOT / path).is_dir()


def test_install_lines_are_those_of_the_makefile():
    lines = re.findall(r"^    pip install (.*)$", README, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert lines and all(f"-m pip install {line}\n" in makefile for line in lines)
