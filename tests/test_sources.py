"""Which sources a method rests on, and what changes their hash, tried on packages planted in a folder."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_ext import _sources, registry
from diffusers_ext._sources import source_hash

ROOT = Path(__file__).resolve().parents[1]

# Syntax whose tree, or the text of it, differs between versions of Python. No line ends inside a token or a bracket.
SAMPLE = """
from __future__ import annotations
import math as m, typing
class Scheduler(Base, metaclass=Meta):
    field: int = 3
    empty: list[float]
    def step(self, x, /, t: float = 1e-3, *args, key=None, other, **kwargs) -> None:
        y = {**kwargs, "a": [], "b": ()}
        z = x[1:, ..., ::2] @ y["a"] - -t ** 2j
        return None
    async def run(self):
        async for i in self.rows:
            yield f"{i!r:>{self.width}}" "tail" f"{{literal}}" f"{i:}" f"" u"old" f"{i=}"
        assert not (a := b'\\x00\\xff'), "\\N{SNOWMAN}\\ud800"
@decorate(lambda: (yield))
def f(x): pass
try:
    match x:
        case {"k": [1, *rest], **more} | Point(x=0) if rest is not None:
            del rest
        case None | True | "s" as found:
            global g
except (ValueError, TypeError) as error:
    raise RuntimeError from error
else:
    with open("f") as a, open("g"):
        print(*[i for i in range(10**20) if i % 2 if i], sep=1.0, end=1e400)
""".replace("f[T]", "f")  # type parameters are syntax from 3.12 on
SAMPLE_HASH = "7a68a223e56b5ff5057a23faa21a3fdc7003d61ccf09ca5bf1277960eef927dc"


def hashed(code: str) -> str:
    return hashlib.sha256(_sources.canonical_dump(ast.parse(code)).encode()).hexdigest()


# --- the dump --------------------------------------------------------------------------------------------------------


def test_dump_is_the_same_text_under_every_python():
    assert hashed(SAMPLE) == SAMPLE_HASH


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_other_pythons_hash_the_package_alike(version):
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"there is no Python {version} here")
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "diffusers_ext" / "hooks").glob("[!_]*.py"))
    ]
    code = f"import runpy; p = runpy.run_path({_sources.__file__!r}); print([p['source_hash'](m) for m in {modules}])"
    ran = subprocess.run(
        [python, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == str([source_hash(module) for module in modules])


COMMENTS = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), max_size=20)
LINES = SAMPLE.strip().splitlines()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, len(LINES)), st.none() | COMMENTS, st.integers(0, 8)), max_size=12), st.data())
def test_comments_and_blank_lines_do_not_change_the_hash(insertions, data):
    lines = [line + (f"  # {data.draw(COMMENTS)}" if data.draw(st.booleans()) else "") for line in LINES]
    for place, comment, indent in sorted(insertions, reverse=True, key=lambda insertion: insertion[0]):
        lines.insert(place, " " * indent if comment is None else " " * indent + "#" + comment)
    assert hashed("\n".join(lines)) == SAMPLE_HASH


DOCUMENTED = """{0}
import a
class C:
    {1}
    x: int = 0
    {2}
    def f(self):
        {3}
        return "a string that counts"
async def g():
    {4}
    await h()
"""
BARE = re.sub(r"\n *\{\d\}|\{0\}", "", DOCUMENTED)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(max_size=30), min_size=5, max_size=5))
def test_docstrings_do_not_change_the_hash(texts):
    assert hashed(DOCUMENTED.format(*map(ascii, texts))) == hashed(BARE)


def test_a_string_that_is_a_value_is_no_docstring():
    assert hashed("def f():\n    return 'a'") != hashed("def f():\n    return 'b'")
    assert hashed("x = 'a'") != hashed("x = 'b'")
    assert hashed("def f():\n    f'{x}'") != hashed("def f():\n    f'{y}'")


CONSTANTS = (
    st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.binary()
    | st.booleans()
    | st.none()
)
TEMPLATE = "def f(x, scale={0}):\n    if x:\n        return [x * {1}, {{'k': {2}}}]\n"


@settings(deadline=None)
@given(CONSTANTS, CONSTANTS, st.integers(0, 2))
def test_another_constant_changes_the_hash(old, new, place):
    values = ["0", "1", "2"]
    values[place] = ascii(old)
    before = hashed(TEMPLATE.format(*values))
    values[place] = ascii(new)
    assert (hashed(TEMPLATE.format(*values)) == before) == (ascii(old) == ascii(new))


OPERATORS = [
    "+",
    "-",
    "*",
    "/",
    "//",
    "%",
    "**",
    "@",
    "<<",
    ">>",
    "&",
    "|",
    "^",
    "and",
    "or",
    "<",
    "<=",
    "==",
    "is",
    "in",
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(OPERATORS), min_size=2, max_size=2))
def test_another_operator_changes_the_hash(operators):
    old, new = (hashed(f"y = a {operator} b") for operator in operators)
    assert (old == new) == (operators[0] == operators[1])


@pytest.mark.parametrize(
    "old, new",
    [
        ("f(a, b)", "f(b, a)"),
        ("f(a, b)", "f((a, b))"),
        ("f(a)", "f(*a)"),
        ("f(a=1)", "f(b=1)"),
        ("{**a}", "{None: a}"),
        ("a[b]", "a.b"),
        ("a - (b - c)", "a - b - c"),
        ("not a", "-a"),
        ("f'{a}{b}'", "f'{a} {b}'"),
        ("f'{a}'", "f'{a!r}'"),
        ("f'{a}'", "f'{a:>3}'"),
        ("def f(x): return None", "def f(x): pass"),
        ("def f(*, a=1, b): pass", "def f(*, a, b=1): pass"),
        ("async def f(): pass", "def f(): pass"),
        ("@d\ndef f(): pass", "def f(): pass"),
        ("if a: b()\nelse: c()", "if a: c()\nelse: b()"),
        ("for i in a: b()\nelse: c()", "for i in a: b()\nc()"),
        ("import a", "from a import a"),
        ("from . import a", "from .. import a"),
        ("x: int", "x: int = 0"),
    ],
)  # fmt: skip
def test_other_code_has_another_hash(old, new):
    assert hashed(old) != hashed(new)


# --- which sources ---------------------------------------------------------------------------------------------------


def sources(module: str) -> list[str]:
    """Modules behind `planted.<module>`, without the name of the package."""
    found = list(_sources.module_sources(f"planted.{module}"))
    assert found == sorted(found)
    return [name.removeprefix("planted.") for name in found]


@pytest.mark.parametrize(
    "line, found",
    [
        ("from ._core import x", ["_core"]),
        ("from ._core import *", ["_core"]),
        ("from . import _core", ["_core"]),
        ("from . import _core as other", ["_core"]),
        ("from planted._core import x", ["_core"]),
        ("from planted import _core", ["_core"]),
        ("import planted._core", ["_core"]),
        ("import planted._core as other, math", ["_core"]),
        ("def f():\n    from ._core import x", ["_core"]),
        ("try:\n    from ._core import x\nfinally:\n    pass", ["_core"]),
        ("if TYPE_CHECKING:\n    from ._core import x\nelse:\n    from .sub.deep import y", ["sub.deep"]),
        ("if typing.TYPE_CHECKING:\n    from ._core import x", []),
        ("import os, math, json.decoder\nfrom torch import nn", []),
        ("from .chain import x", ["_core", "chain", "ring"]),
        ("from .sub.deep import y", ["sub.deep"]),
        ("from .sub import deep", ["sub.deep"]),
        ("from .sub import y", ["sub.deep"]),  # taken by `sub/__init__.py` from `sub/deep.py`
        ("from .sub import renamed", ["_core"]),
        ("from .sub import own", ["_core", "sub", "sub.deep"]),  # defined in `sub/__init__.py`
        ("from .sub import *", ["_core", "sub", "sub.deep"]),
        ("from . import sub", ["_core", "sub", "sub.deep"]),
        ("from .lazy import y", ["sub.deep"]),  # named for type checkers only
        ("from . import lazy", ["lazy", "sub.deep"]),
        ("from .bare import z", ["bare.z"]),  # a folder without `__init__.py`
        ("from .bare.z import z", ["bare.z"]),
        ('RUN_BY = ("planted.chain", "planted.sub.deep")', ["_core", "chain", "ring", "sub.deep"]),
    ],
)
def test_imports_are_followed(plant, line, found):
    plant(
        {
            "planted/__init__.py": "from ._unrelated import u",
            "planted/_unrelated.py": "u = 1",
            "planted/_core.py": "x = 1",
            "planted/chain.py": "from .ring import x",
            "planted/ring.py": "from ._core import x\ndef f():\n    from . import chain",
            "planted/sub/__init__.py": "from .deep import y\nfrom .._core import x as renamed\nown = 1",
            "planted/sub/deep.py": "y = 1",
            "planted/lazy/__init__.py": """
                from typing import TYPE_CHECKING
                if TYPE_CHECKING:
                    from ..sub.deep import y
                def __getattr__(name):
                    return None
                """,
            "planted/bare/z.py": "z = 1",
            "planted/method.py": line,
        }
    )
    assert sources("method") == sorted([*found, "method"])
    assert "planted" not in sys.modules


@pytest.mark.parametrize(
    "line, named",
    [
        ("from ._gone import x", "planted._gone"),
        ("import planted.gone", "planted.gone"),
        ("from . import gone", "gone"),
        ("from .sub import gone", "gone"),
    ],
)
def test_an_import_that_cannot_be_followed_is_an_error(plant, line, named):
    plant({"planted/__init__.py": "", "planted/sub/__init__.py": "own = 1", "planted/method.py": line})
    with pytest.raises(ValueError, match=f"'{named}'.*planted.*method|planted.*method.*'{named}'"):
        source_hash("planted.method")


def test_a_module_without_source_is_an_error():
    for module in ("planted_nowhere.method", "diffusers_ext.no_such_module", "sys"):
        with pytest.raises(ValueError, match=module):
            source_hash(module)


def test_a_method_of_another_package_also_rests_on_ours(plant):
    plant(
        {
            "planted/__init__.py": "",
            "planted/method.py": "from diffusers_ext.registry import Method\nfrom diffusers_ext import cards, weight_deltas",
        }
    )
    found = list(_sources.module_sources("planted.method"))
    assert "diffusers_ext.weight_deltas" in found and "planted.method" in found
    assert not {
        "diffusers_ext.registry",
        "diffusers_ext.cards",
        "diffusers_ext.proofs",
        "diffusers_ext._sources",
    }.intersection(found)


@settings(deadline=None, max_examples=25)
@given(st.integers(), st.integers(), st.sampled_from(["planted/method.py", "planted/_core.py", "planted/_far.py"]))
def test_a_change_of_the_method_or_of_what_it_imports_changes_the_hash(tmp_path_factory, old, new, place):
    folder = tmp_path_factory.mktemp("sources")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        (folder / "planted").mkdir()
        files = {
            "planted/__init__.py": "CONSTANT = 0\n",
            "planted/method.py": "from ._core import core\n",
            "planted/_core.py": "def core():\n    from ._far import CONSTANT\n",
            "planted/_far.py": "",
        }
        hashes = []
        for number, value in enumerate((old, new)):
            for name, code in files.items():
                (folder / name).write_text(code + f"CONSTANT = {value}\n" * (name == place))
                os.utime(folder / name, ns=(number, number))
            hashes.append(source_hash("planted.method"))
    assert (hashes[0] == hashes[1]) == (old == new)


def test_deepcache_rests_on_its_plan_and_not_on_the_table_of_methods():
    found = _sources.module_sources("diffusers_ext.hooks.deepcache")
    assert {"diffusers_ext.hooks.deepcache", "diffusers_ext.hooks._plan", "diffusers_ext._compat"} <= set(found)
    assert not {"diffusers_ext", "diffusers_ext.registry", "diffusers_ext.proofs"} & set(found)


def test_sources_of_every_method_can_be_hashed():
    for row in registry.methods():
        if row.module is not None:
            assert re.fullmatch("[0-9a-f]{64}", source_hash(row.module)), row.key


def test_neither_proofs_nor_listing_imports_torch():
    code = (
        "import sys, diffusers_ext as dx, diffusers_ext.verify\n"
        "from diffusers_ext import proofs\n"
        "proofs.source_hash('diffusers_ext.hooks.deepcache'); [row.status for row in dx.methods()]\n"
        "assert not {'torch', 'diffusers', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
