"""What is installed: wheel, sdist and editable install hold the same modules and data, with and without the links."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import diffusers_ext

from .fresh import ROOT

LINKS = ("schedulers", "pipelines", "training", "hub_cards")
# Neither of the project nor of the package.
_LEFT_OUT = (".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "benchmarks", "docs", "tests")
_BUILD = """
import sys
from setuptools import build_meta
out, kinds = sys.argv[1], sys.argv[2:]  # the backend has arguments of its own in `sys.argv`
for kind in kinds:
    getattr(build_meta, f"build_{kind}")(out)
"""


def _files(folder: Path) -> set[str]:
    """Files of a package; left out are compiled and hidden ones, and templates, which only a checkout needs."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    apart = (".", "__pycache__", "templates")
    return {p.as_posix() for p in paths if not any(part.startswith(apart) for part in p.parts)}


SOURCE = _files(ROOT / "diffusers_ext")


def _run(*command: str | Path, cwd: Path, **options) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, **options
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module", params=[True, False], ids=["with links", "without links"])
def built(request, tmp_path_factory) -> dict[str, Path]:
    """A copy of the tree, and what is built from it."""
    copy = tmp_path_factory.mktemp("build") / "tree"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    for link in LINKS if not request.param else ():
        (copy / link).unlink()
    out = copy.parent / "dist"
    out.mkdir()
    _run(sys.executable, "-c", _BUILD, out, "sdist", "wheel", "editable", cwd=copy)
    [sdist], [editable] = out.glob("*.tar.gz"), out.glob("*0.editable*.whl")
    [wheel] = set(out.glob("*.whl")) - {editable}
    return {"tree": copy, "sdist": sdist, "wheel": wheel, "editable": editable}


@pytest.fixture(scope="module")
def install(tmp_path_factory):
    """Install wheels, without dependencies, into an environment of their own that sees the packages of this one."""

    def make(*wheels: Path) -> Path:
        folder = tmp_path_factory.mktemp("env")
        _run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
        python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        site = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet"]
        _run(*pip, *wheels, cwd=folder)
        paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (site / "present_environment.pth").write_text("\n".join(sorted(paths)) + "\n")
        return python

    return make


def test_wheel_and_sdist_hold_every_file(built):
    inside = zipfile.ZipFile(built["wheel"]).namelist()
    assert {name.removeprefix("diffusers_ext/") for name in inside if name.startswith("diffusers_ext/")} == SOURCE
    assert {name.partition("/")[0] for name in inside} == {
        "diffusers_ext",
        f"diffusers_ext-{diffusers_ext.__version__}.dist-info",
    }
    with tarfile.open(built["sdist"]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {name.removeprefix("diffusers_ext/") for name in names if name.startswith("diffusers_ext/")} == SOURCE
    assert {"LICENSE", "NOTICE", "CITATION.cff", "README.md", "constraints.txt", "pyproject.toml"} <= names
    assert not {name for name in names if name.startswith((*(f"{link}/" for link in LINKS), "tests/", "benchmarks/"))}


def test_sdist_builds_the_same_wheel(built, tmp_path):
    with tarfile.open(built["sdist"]) as archive:
        archive.extractall(tmp_path)  # our own; Python 3.11.0 to 3.11.3 have no `filter`
    [tree] = tmp_path.iterdir()
    out = tmp_path / "dist"
    out.mkdir()
    _run(sys.executable, "-c", _BUILD, out, "wheel", cwd=tree)
    [wheel] = out.glob("*.whl")
    assert sorted(zipfile.ZipFile(wheel).namelist()) == sorted(zipfile.ZipFile(built["wheel"]).namelist())


@pytest.mark.parametrize("built", [False], indirect=True, ids=["without links"])
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installed_package_works(built, install, kind, tmp_path):
    python = install(built[kind])
    where = _run(python, "-c", "import diffusers_ext; print(diffusers_ext.__file__)", cwd=tmp_path).strip()
    home = python.parents[1] if kind == "wheel" else built["tree"]
    assert home.resolve() in Path(where).resolve().parents
    assert _files(Path(where).parent) == SOURCE
    listed = _run(python.with_name("diffusers-ext"), "methods", cwd=tmp_path)
    assert f"of {len(diffusers_ext.methods())} methods" in listed
    assert _run(python.with_name("diffusers-ext"), "--version", cwd=tmp_path).strip() == diffusers_ext.__version__
    top_level = _run(python, "-c", _IMPORTABLE, *LINKS, cwd=tmp_path)
    assert top_level.strip() == "[]"


_IMPORTABLE = "import importlib.util as u, sys; print([name for name in sys.argv[1:] if u.find_spec(name)])"


_THIRD_PARTY = {
    "pyproject.toml": """
        [build-system]
        requires = ["setuptools"]
        build-backend = "setuptools.build_meta"

        [project]
        name = "dx_third_party"
        version = "1.0"

        [project.entry-points."diffusers_ext.methods"]
        dx_third_party = "dx_third_party.rows:METHODS"
        dx_third_party_single = "dx_third_party.rows:SINGLE"

        [tool.setuptools]
        packages = ["dx_third_party"]
        """,
    "dx_third_party/__init__.py": "",
    "dx_third_party/rows.py": """
        from diffusers_ext import Method

        def row(key):
            return Method(
                key=key, title="Theirs", area="their_area", form="hook", entry=("dx_third_party.rows.Config",)
            )

        METHODS = (row(key) for key in ("their_first", "their_second"))
        SINGLE = row("their_third")
        """,
}


@pytest.mark.parametrize("built", [False], indirect=True, ids=["without links"])
def test_entry_points_of_other_packages_add_methods(built, install, tmp_path):
    for name, text in _THIRD_PARTY.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(re.sub(r"^ {8}", "", text, flags=re.MULTILINE))
    _run(sys.executable, "-c", _BUILD, ".", "wheel", cwd=tmp_path)
    [third_party] = tmp_path.glob("dx_third_party-1.0-py3*.whl")
    python = install(built["wheel"], third_party)
    listed = _run(
        python.with_name("diffusers-ext"), "methods", "--area", "their_area", "--all", cwd=third_party.parent / "build"
    )
    assert [line.split()[0] for line in listed.splitlines()[1:4]] == ["their_first", "their_second", "their_third"]
    code = "import diffusers_ext as dx; print(len(dx.methods()), dx.get_method('their_third').title)"
    assert _run(python, "-c", code, cwd=tmp_path / "build").split() == [str(len(diffusers_ext.methods()) + 3), "Theirs"]


# --- what is declared ------------------------------------------------------------------------------------------------


def test_version_is_said_once_more_in_the_citation_only():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {diffusers_ext.__version__}\n" in citation


def test_constraints_pin_torch_first_and_everything_exactly():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins[0].startswith("torch==")
    for pin in pins:
        assert re.fullmatch(r"[\w.-]+==[\w.]+", pin), pin


@pytest.mark.parametrize("link", LINKS)
def test_links_lead_into_the_package(link):
    if not (ROOT / link).is_symlink():
        pytest.skip("this checkout has no links")
    assert os.readlink(ROOT / link) == f"diffusers_ext/{link}"
