"""The exporter: one self-contained file from a class and the cores that its module imports."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import sys
import textwrap
import types

import pytest

from diffusers_ext._export import export_class

PACKAGE = "diffusers_ext.toy"

BASE = '''
    """The innermost core."""

    from __future__ import annotations

    import math

    __all__ = ["half"]


    # A comment that stays.
    def half(x: float) -> float:
        return x / 2 * math.sqrt(1.0)
'''
CORE = '''
    # A licence.
    """A core.

    Its docstring goes.
    """

    from __future__ import annotations

    import math
    from dataclasses import dataclass

    from ._base import (
        half,  # both files need it
    )


    @dataclass
    class Step:
        """One step."""

        size: float = half(math.tau)
'''
MAIN = '''
    # Licence of the file.

    """The class.

    What it does: it divides.
    """

    from __future__ import annotations

    import math

    from ._base import half
    from ._core import Step


    class Halver:
        """Divides by two."""

        def __call__(self, x: float) -> float:
            return half(x) + 0 * Step().size * math.pi
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Writes modules into a package of their own, and gives the class that the module `halving` defines."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, PACKAGE, package)

    def write(main=MAIN, **cores):
        for name in [name for name in sys.modules if name.startswith(PACKAGE + ".")]:
            del sys.modules[name]
        for name, text in {"_base": BASE, "_core": CORE, **cores, "halving": main}.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
        importlib.invalidate_caches()
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        try:
            return importlib.import_module(f"{PACKAGE}.halving").Halver
        finally:
            sys.dont_write_bytecode = before

    yield write
    for name in [name for name in sys.modules if name.startswith(PACKAGE + ".")]:
        del sys.modules[name]


def load(exported, folder, monkeypatch):
    """Import an exported file the way diffusers does: by its path."""
    file = folder / f"{exported.stem}.py"
    file.write_text(exported.source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(exported.stem, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, exported.stem, module)
    spec.loader.exec_module(module)
    return module


def test_the_file_stands_alone_and_does_the_same(toy, tmp_path, monkeypatch):
    cls = toy()
    exported = export_class(cls)
    module = load(exported, tmp_path, monkeypatch)
    assert module.Halver()(3.0) == cls()(3.0) == 1.5
    assert exported.class_name == "Halver"
    assert "from ." not in exported.source
    assert exported.source.count("from __future__") == 1
    assert exported.source.count("def half") == 1  # imported twice, written once
    assert exported.source.startswith("# Licence of the file.\n\n" + '"""The class.')
    assert module.__doc__.startswith("The class.")
    assert "# A comment that stays." in exported.source
    assert "Its docstring goes." not in exported.source
    assert "__all__" not in exported.source


def test_name_and_content_depend_on_the_sources_only(toy):
    first, second = export_class(toy()), export_class(toy())
    assert first == second
    digest = hashlib.sha256(first.source.encode()).hexdigest()[:10]
    assert first.stem == f"halving_{digest}"
    changed = export_class(toy(_base=BASE.replace("x / 2", "x * 0.5")))
    assert changed.stem != first.stem


def test_a_file_without_docstring_and_without_cores(toy, tmp_path, monkeypatch):
    exported = export_class(
        toy("from __future__ import annotations\nimport math\n\n\nclass Halver:\n    x = math.pi\n")
    )
    assert load(exported, tmp_path, monkeypatch).Halver.x == math.pi


SIMPLE = "class Halver:\n    pass\n"


@pytest.mark.parametrize(
    ("main", "cores", "message"),
    [
        ("import scipy\n" + SIMPLE, {}, "import scipy"),
        ("def f():\n    from peft import LoraConfig\n" + SIMPLE, {}, "imports 'peft'"),
        ("from ._core import f\n" + SIMPLE, {"_core": "import safetensors\nf = 1\n"}, "_core.*imports 'safetensors'"),
        ("import diffusers_ext\n" + SIMPLE, {}, "imports 'diffusers_ext'"),
        ("from .other import f\n" + SIMPLE, {"other": "f = 1\n"}, "not a core"),
        ("from ._core import f as g\n" + SIMPLE, {"_core": "f = 1\n"}, "renames 'f'"),
        ("from . import _core\n" + SIMPLE, {"_core": "f = 1\n"}, "no equivalent"),
        ("from ._core import *\n" + SIMPLE, {"_core": "f = 1\n"}, "no equivalent"),
        ("try:\n    from ._core import f\nfinally:\n    pass\n" + SIMPLE, {"_core": "f = 1\n"}, "top level"),
        ("from ._core import f\n_x = 2\n" + SIMPLE, {"_core": "_x = 1\nf = 1\n"}, "'_x' is defined in .*core and"),
        ("from ._core import f\nfrom os import sep as x\n" + SIMPLE, {"_core": "import os as x\nf = 1\n"}, "'x'"),
        ("from ._core import f; x = 1\n" + SIMPLE, {"_core": "f = 1\n"}, "another statement in one line"),
        ('"""How to:\n\n    from torch import nn\n"""\n' + SIMPLE, {}, "sees an import: 'from torch import'"),
        ('class Halver:\n    """Say\n    import this\n    """\n', {}, "sees an import"),
        ("HERE = __file__\n" + SIMPLE, {}, "__file__"),
        ("def make():\n    class Halver:\n        pass\n    return Halver\nHalver = make()\n", {}, "top level"),
    ],
)  # fmt: skip
def test_what_cannot_stand_alone_is_refused(toy, monkeypatch, main, cores, message):
    for name in ("scipy", "peft", "safetensors"):  # the test needs their names only
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    cls = toy(main, **cores)
    with pytest.raises(ValueError, match=message):
        export_class(cls)


def test_cores_that_import_each_other_are_refused(toy):
    cls = toy()
    base = sys.modules[f"{PACKAGE}._base"].__file__
    with open(base, "a", encoding="utf-8") as file:
        file.write("\n\nfrom ._core import Step\n")
    with pytest.raises(ValueError, match="import each other"):
        export_class(cls)


def test_equal_imports_in_two_files_are_one_meaning(toy):
    core = "from os import path\nimport os.path\nimport json as j\ny = [i for i in range(2)]\nf = 1\n"
    main = (
        "from os import path\nimport os\nimport json as j\nfrom ._core import f\nz = [i for i in range(3)]\n" + SIMPLE
    )
    assert "class Halver" in export_class(toy(main, _core=core)).source
