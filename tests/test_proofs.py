"""The machinery behind a method's status, tried on methods planted in a folder: the good and the faulty."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import math
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import diffusers_ext as dx
from diffusers_ext import proofs, registry, verify
from diffusers_ext.registry import Method

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
    return hashlib.sha256(proofs.canonical_dump(ast.parse(code)).encode()).hexdigest()


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
    code = f"import runpy; p = runpy.run_path({proofs.__file__!r}); print([p['source_hash'](m) for m in {modules}])"
    ran = subprocess.run(
        [python, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == str([proofs.source_hash(module) for module in modules])


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


OPERATORS = (
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
)


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


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Writes files, given as path -> code, to a folder that Python imports from."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(files: dict[str, str]) -> None:
        for name, code in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(code), encoding="utf-8")

    return write


def sources(module: str) -> list[str]:
    """Modules behind `planted.<module>`, without the name of the package."""
    found = list(proofs.module_sources(f"planted.{module}"))
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
        proofs.source_hash("planted.method")


def test_a_module_without_source_is_an_error():
    for module in ("planted_nowhere.method", "diffusers_ext.no_such_module", "sys"):
        with pytest.raises(ValueError, match=module):
            proofs.source_hash(module)


def test_a_method_of_another_package_also_rests_on_ours(plant):
    plant(
        {
            "planted/__init__.py": "",
            "planted/method.py": "from diffusers_ext.registry import Method\nfrom diffusers_ext import cards, weight_deltas",
        }
    )
    found = list(proofs.module_sources("planted.method"))
    assert "diffusers_ext.weight_deltas" in found and "planted.method" in found
    assert not {"diffusers_ext.registry", "diffusers_ext.cards", "diffusers_ext.proofs"}.intersection(found)


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
            hashes.append(proofs.source_hash("planted.method"))
    assert (hashes[0] == hashes[1]) == (old == new)


def test_deepcache_rests_on_its_plan_and_not_on_the_table_of_methods():
    found = proofs.module_sources("diffusers_ext.hooks.deepcache")
    assert {"diffusers_ext.hooks.deepcache", "diffusers_ext.hooks._plan", "diffusers_ext._compat"} <= set(found)
    assert not {"diffusers_ext", "diffusers_ext.registry", "diffusers_ext.proofs"} & set(found)


def test_sources_of_every_method_can_be_hashed():
    for row in registry.methods():
        if row.module is not None:
            assert re.fullmatch("[0-9a-f]{64}", proofs.source_hash(row.module)), row.key


def test_neither_proofs_nor_listing_imports_torch():
    code = (
        "import sys, diffusers_ext as dx, diffusers_ext.verify\n"
        "from diffusers_ext import proofs\n"
        "proofs.source_hash('diffusers_ext.hooks.deepcache'); [row.status for row in dx.methods()]\n"
        "assert not {'torch', 'diffusers', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(proofs, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def measure(key: str, source_hash: str = "0" * 64, goal: tuple[str, float] | None = ("<=", 0.6), **other) -> Path:
    claims = [proofs.claim("time", "twice as fast", 0.5, "x", (0.4, 0.55), goal)]
    fields = {"method_version": 1, "machine": {"cores": 2}, "versions": {"python": "3.11"}, "settings": {"steps": 20}}
    fields |= {"seeds": {"pictures": (0, 1)}, "claims": claims, "tables": {}} | other
    return proofs.write_result(key, source_hash=source_hash, **fields)


def test_a_result_is_read_as_it_was_written(results):
    table = {"columns": ["interval", "time"], "rows": [(1, 2.0), (3, None)]}
    path = measure("widget", tables={"times": table}, settings={"by step": {10: 0.1, 9: 1e-30}, "name": "Größe"})
    assert path == results / "widget.json" and sorted(results.iterdir()) == [path]
    result = proofs.read_result("widget")
    assert result["schema"] == proofs.SCHEMA and result["key"] == "widget"
    assert result["settings"] == {"by step": {"10": 0.1, "9": 1e-30}, "name": "Größe"}
    assert result["seeds"] == {"pictures": [0, 1]}
    assert result["tables"]["times"]["rows"] == [[1, 2.0], [3, None]]
    assert result["claims"][0]["holds"] is True
    assert result["proofs"] == {} and result["proofs_hash"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["recorded"])
    assert proofs.read_result("other") is None


@pytest.mark.parametrize(
    "edit",
    [
        lambda result: result["claims"][0].update(value=0.3),
        lambda result: result["claims"][0].update(holds=False),
        lambda result: result["claims"].append(result["claims"][0]),
        lambda result: result["seeds"]["pictures"].reverse(),
        lambda result: result.update(source_hash="1" * 64),
        lambda result: result.update(proofs={"exact": "passed"}),
        lambda result: result.update(more=1),
        lambda result: result.pop("machine"),
        lambda result: result.pop("digest"),
    ],
)
def test_an_edited_result_is_refused_by_name(results, edit):
    path = measure("widget")
    result = json.loads(path.read_text())
    edit(result)
    path.write_text(json.dumps(result))
    with pytest.raises(ValueError, match=r"widget\.json was edited"):
        proofs.read_result("widget")


def test_layout_of_the_file_is_free(results):
    path = measure("widget")
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))
    assert proofs.read_result("widget")["key"] == "widget"


def test_what_is_no_result_of_the_method_is_refused(results):
    path = measure("widget")
    shutil.copy(path, results / "other.json")
    with pytest.raises(ValueError, match=r"other\.json holds schema and key \(1, 'widget'\)"):
        proofs.read_result("other")
    for text in ("{", "[]", "1"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"widget\.json"):
            proofs.read_result("widget")
    for key in ("", "../widget", "Widget", "a.b"):
        with pytest.raises(ValueError, match="`key`"):
            proofs.read_result(key)


def test_recorded_results_are_as_they_were_written():
    for path in proofs.RESULTS.glob("*.json"):
        assert proofs.read_result(path.stem)["method_version"] <= registry.get_method(path.stem).version


@pytest.mark.parametrize(
    "value, interval, goal, holds",
    [
        (0.5, (0.4, 0.6), ("<=", 0.6), True),
        (0.5, (0.4, 0.61), ("<=", 0.6), False),  # the value meets the goal, its interval does not
        (0.5, (0.4, 0.6), ("<", 0.6), False),
        (30.0, (29.0, 31.0), (">=", 29.0), True),
        (30.0, (29.0, 31.0), (">", 29.0), False),
        (7, None, ("==", 7), True),
        (7, None, None, None),
    ],
)
def test_whether_a_claim_holds_is_computed(value, interval, goal, holds):
    entry = proofs.claim("n", "s", value, "x", interval, goal)
    assert entry["holds"] is holds
    assert entry["interval"] == list(interval or (7.0, 7.0))


@pytest.mark.parametrize(
    "arguments, named",
    [
        ((float("nan"), "x"), "`value`"),
        ((1.0, "x", (0.0, float("inf"))), "`interval`"),
        ((1.0, "x", (2.0, 1.0)), "`interval`"),
        ((1.0, "x", None, ("~", 1.0)), "`goal`"),
        ((1.0, "x", None, ("<", float("nan"))), "`goal`"),
    ],
)
def test_a_claim_that_means_nothing_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        proofs.claim("n", "s", *arguments)


def test_a_result_that_cannot_be_recorded_is_refused_and_leaves_the_old_one(results):
    before = measure("widget").read_bytes()
    entry = proofs.claim("n", "s", 1.0, "x")
    for wrong, named in [
        ({"claims": []}, "`claims`"),
        ({"claims": [entry, entry]}, "`claims`"),
        ({"tables": {"t": {"columns": ["a"], "rows": [[1, 2]]}}}, "'t'"),
        ({"settings": {"a": float("inf")}}, "'widget'"),
        ({"settings": {"a": {1, 2}}}, "'widget'"),
    ]:
        with pytest.raises(ValueError, match=named):
            measure("widget", **wrong)
    assert [path.read_bytes() for path in results.iterdir()] == [before]


def test_recorder(results, plant, monkeypatch):
    from benchmarks._record import Recorder, Samples

    plant({"planted/__init__.py": "", "planted/widget.py": "x = 1"})
    row = Method("widget", "Widget", "samplers", "scheduler", entry=("planted.widget.Widget",), version=3)
    monkeypatch.setattr(registry, "_all", lambda: {"widget": row})
    recorder = Recorder("widget", {"steps": 20}, {"pictures": [0]}, peers=["pytest"])
    recorder.claim("time", "twice as fast", 0.7, "x", (0.6, 0.8), ("<=", 0.5))
    recorder.quick = True
    samples = Samples("difference", {"ours": [0.25, 0.5], "theirs": [0.5, 0.5]}, 1e-5, counts={"ours": 3})
    recorder.paired("psnr", "nearer", samples, "dB", (">=", 0.0))
    recorder.table("psnr", ["interval", "dB"], [[1, float("inf")], [2, 30.5]])
    recorder.write()
    result = proofs.read_result("widget")
    assert result["method_version"] == 3 and result["source_hash"] == proofs.source_hash("planted.widget")
    timed, paired = result["claims"]
    assert timed["holds"] is False and "samples" not in timed and "quick" not in timed
    assert paired["value"] == -0.125 and paired["interval"] == [-0.25, 0.0] and paired["holds"] is False
    assert paired["quick"] is True and paired["samples"] == {
        "formula": "difference",
        "ours": [0.25, 0.5],
        "theirs": [0.5, 0.5],
        "counts": {"ours": 3},
    }
    assert '"ours": [0.25, 0.5],' in proofs.result_path("widget").read_text()  # numbers of a picture take no line each
    assert result["tables"]["psnr"]["rows"] == [[1, "inf"], [2, 30.5]]
    assert {"python", "torch", "diffusers", "diffusers_ext", "pytest"} <= set(result["versions"])
    assert {"cpu", "cores", "memory_gib"} <= set(result["machine"])
    assert platform.node() not in result["machine"].values()

    plant({"planted/widget.py": "x = 22"})
    with pytest.raises(ValueError, match="changed while it was measured"):
        recorder.write()
    with pytest.raises(ValueError, match="`settings`"):
        Recorder("widget", {"steps": {1, 2}}, {})


# --- methods planted in a checkout -----------------------------------------------------------------------------------

ALL_FIVE = "".join(f"@pytest.mark.proof('{name}')\ndef test_{name}():\n    pass\n" for name in proofs.PROOFS)
CONFORMANCE = "".join(
    f"@pytest.mark.proof('{name}')\n@pytest.mark.parametrize('n', [1, 2])\ndef test_{name}(n):\n    pass\n"
    for name in ("exact", "card")
)
TESTS = {
    "whole": ALL_FIVE,
    "unfit": ALL_FIVE,  # its claim does not hold
    "gap": ALL_FIVE.replace("proof('loads')", "proof('exact')"),
    "moved": ALL_FIVE,  # measured with other sources
    "older": ALL_FIVE,  # measured in another version
    "edited": ALL_FIVE,
    "unmeasured": ALL_FIVE,
    "broken": ALL_FIVE.replace("def test_exact():\n    pass", "def test_exact():\n    assert 1 + 1 == 3"),
    "skipping": ALL_FIVE.replace(
        "def test_reference():\n    pass", "def test_reference():\n    pytest.skip('no numbers')"
    ),
    "expecting": ALL_FIVE.replace("def test_loads():\n    pass", "def test_loads():\n    pytest.xfail('known')"),
    "cardless": ALL_FIVE,  # its card does not render
    "untested": None,
    "unimportable": ALL_FIVE + "import no_such_module\n",
    "yardstick": CONFORMANCE,  # a metric: exact and card are enough
}


@pytest.fixture
def checkout(tmp_path, plant, results, monkeypatch):
    """A checkout in a folder, with the methods of `TESTS` and this project's `conftest.py`."""
    rows = {}
    plant({"planted/__init__.py": "", "planted/_core.py": "GAIN = 2\n"})
    (tmp_path / "tests" / "methods").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    for key, tests in TESTS.items():
        plant({f"planted/{key}.py": "from ._core import GAIN\n"})
        if tests is not None:
            plant({f"tests/methods/test_{key}.py": "import pytest\n" + tests})
        form = "metric" if key == "yardstick" else "hook"
        rows[key] = Method(key, key, "samplers", form, entry=(f"planted.{key}.Config",))
        current = proofs.source_hash(f"planted.{key}")
        if key == "unfit":
            measure(key, current, goal=("<=", 0.1))
        elif key == "moved":
            measure(key, "0" * 64)
        elif key == "older":
            measure(key, current, method_version=0)
        elif key not in ("unmeasured", "yardstick"):
            measure(key, current)
    edited = results / "edited.json"
    edited.write_text(edited.read_text().replace("0.5,", "0.3,"))

    def method_card(key: str) -> str:
        if key == "cardless":
            raise FileNotFoundError("hub_cards/cardless.md")
        return f"# {key}"

    cards = types.SimpleNamespace(method_card=method_card)
    monkeypatch.setattr(dx, "cards", cards, raising=False)
    monkeypatch.setattr(verify, "ROOT", tmp_path)
    monkeypatch.setattr(registry, "_all", lambda: rows)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # the planted tests need none, and start faster
    return rows


def run(keys, **options) -> tuple[int, dict[str, dict[str, str]], str]:
    """Exit code of `verify`, its lines as key -> proof -> outcome, and all it printed."""
    stream = io.StringIO()
    code = verify.verify(keys, stream, **options)
    found: dict[str, dict[str, str]] = {}
    for line in stream.getvalue().splitlines():
        if match := re.match(r"(\w+) \((\w+), version", line):
            found[match[1]] = {}
        elif match := re.match(rf"  ({'|'.join(proofs.PROOFS)}) +(\w+) +(\d+) tests? ", line):
            found[list(found)[-1]][match[1]] = match[2]
    return code, found, stream.getvalue()


PASSED = dict.fromkeys(proofs.PROOFS, "passed")


def test_verify_and_status_of_planted_methods(checkout, plant):
    assert {row.status for row in checkout.values() if row.key not in ("moved", "older", "edited")} == {"open"}
    assert run(["whole", "unfit", "yardstick"])[0] == 0

    code, found, text = run(verify.verifiable(), record=True)
    assert code == 1
    assert found == {
        "whole": PASSED,
        "unfit": PASSED,
        "gap": PASSED | {"loads": "missing"},
        "moved": PASSED | {"claim": "failed"},
        "older": PASSED | {"claim": "failed"},
        "edited": PASSED | {"claim": "failed"},
        "unmeasured": PASSED | {"claim": "missing"},
        "broken": PASSED | {"exact": "failed"},
        "skipping": PASSED | {"reference": "missing"},
        "expecting": PASSED | {"loads": "failed"},
        "cardless": PASSED | {"card": "failed"},
        "untested": dict.fromkeys(proofs.PROOFS, "missing") | {"claim": "passed"},
        "unimportable": dict.fromkeys(proofs.PROOFS, "failed"),
        "yardstick": {"exact": "passed", "card": "passed"},
    }
    for told in (
        "time: 0.5 [0.4, 0.55] x, goal <= 0.6: holds",
        "time: 0.5 [0.4, 0.55] x, goal <= 0.1: does not hold",
        "test_exact: assert (1 + 1) == 3",
        "test_reference: Skipped: no numbers",
        "stale: other sources were measured",
        "stale: version 0 was measured, this is 1",
        "edited.json was edited",
        "hub_cards/cardless.md",
        "there is no tests/methods/test_untested.py",
        "No module named 'no_such_module'",
    ):
        assert told in text

    edited = checkout.pop("edited")
    with pytest.raises(ValueError, match=r"edited\.json"):
        _ = edited.status
    assert {key: row.status for key, row in checkout.items()} == dict.fromkeys(checkout, "open") | {
        "whole": "works",
        "unfit": "works",
        "yardstick": "works",
        "moved": "stale",
        "older": "stale",
    }

    measured = proofs.read_result("whole")
    assert measured["proofs"] == PASSED and measured["proofs_hash"] == measured["source_hash"]
    plant({"planted/_core.py": "GAIN = 2  # twice\n"})
    assert checkout["whole"].status == "works"
    plant({"planted/_core.py": "GAIN = 33\n"})
    assert {row.status for key, row in checkout.items()} == {"stale"}

    # Proved again, but not measured again: the numbers keep the hash that they were measured with.
    code, found, text = run(["whole", "yardstick"], record=True)
    assert code == 1 and found["whole"] == PASSED | {"claim": "failed"}
    proved = proofs.read_result("whole")
    assert proved["source_hash"] == measured["source_hash"] != proved["proofs_hash"]
    assert proved["claims"] == measured["claims"] and proved["recorded"] == measured["recorded"]
    assert checkout["whole"].status == "stale" and checkout["yardstick"].status == "works"

    # Measured again: the proofs of before are void until they are run again.
    measure("whole", proofs.source_hash("planted.whole"))
    assert checkout["whole"].status == "open"


PLANTED_BENCHMARK = """
from pathlib import Path
from diffusers_ext import proofs, registry
proofs.RESULTS = Path({results!r})
registry._all = lambda: {{"whole": registry.Method("whole", "Whole", "samplers", "hook", entry=("planted.whole.Config",))}}

from benchmarks._bench import Benchmark
from benchmarks._record import Samples
BENCHMARK = Benchmark("whole", settings={{"steps": 20}}, threads=1)

@BENCHMARK.part("gain", minutes=0.1, quick=True)
def gain(recorder):
    errors = {{"ours": [0.01, 0.02, 0.03], "theirs": [0.02, 0.02, 0.04]}}
    recorder.paired("gain", "nearer", Samples("psnr_gain", errors, 1e-5), "dB", (">=", 0.0))

if __name__ == "__main__":
    BENCHMARK.main()
"""


def test_planted_faults_are_all_caught(checkout, plant, results, tmp_path, monkeypatch, capsys):
    """A missing proof, a result from other sources, an exact proof that fails, edited numbers, and a forged claim.

    All but the last are caught by `verify` and by every listing of methods. The last is a record with made-up numbers
    and a digest that fits: only measuring again tells.
    """
    from benchmarks._bench import Selection
    from diffusers_ext import bench, cli

    faulty = ("gap", "moved", "broken", "edited")
    for key in set(checkout) - {"whole", *faulty}:
        del checkout[key]
    code, found, text = run(["whole"], record=True)
    assert code == 0 and found == {"whole": PASSED} and "1 of 1 methods have all their proofs: 5 passed" in text

    code, found, text = run(verify.verifiable(), record=True)
    assert code == 1
    assert found == {
        "whole": PASSED,
        "gap": PASSED | {"loads": "missing"},
        "moved": PASSED | {"claim": "failed"},
        "broken": PASSED | {"exact": "failed"},
        "edited": PASSED | {"claim": "failed"},
    }
    summary = text.partition("1 of 5 methods have all their proofs: 21 passed, 3 failed, 1 missing.")[2]
    for line in ("gap: loads missing", "moved: claim failed", "broken: exact failed", "edited: claim failed"):
        assert line in summary
    for key in faulty:
        assert run([key])[0] == 1

    def command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(list(arguments))
        return left.value.code or 0, *capsys.readouterr()

    wanted = {"whole": "works", "gap": "open", "moved": "stale", "broken": "open", "edited": "invalid"}
    code, out, err = command("methods", "--all", "--json")
    assert {row["key"]: row["status"] for row in json.loads(out)} == wanted
    assert code == 1 and "edited.json was edited" in err
    code, out, err = command("methods")
    assert code == 1 and "edited.json was edited" in err and "2 open" in out
    assert {line.split()[0]: line.split()[1] for line in out.splitlines()[1:4]} == {
        key: status for key, status in wanted.items() if status != "open"
    }
    assert "other sources were measured" in command("show", "moved")[1]
    assert "other sources" not in command("show", "whole")[1]
    code, _, err = command("show", "edited")
    assert code == 2 and "edited.json was edited" in err
    for key, status in wanted.items():
        if status == "invalid":
            with pytest.raises(ValueError, match=r"edited\.json was edited"):
                _ = checkout[key].status
        else:
            assert checkout[key].status == status

    # The claim of a commit, measured again in a process of its own.
    plant({"benchmarks/whole.py": PLANTED_BENCHMARK.format(results=str(results)), "benchmarks/__init__.py": ""})
    for file in ("_record.py", "_bench.py"):
        shutil.copy(ROOT / "benchmarks" / file, tmp_path / "benchmarks")
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(proofs, "RESULTS", proofs.RESULTS)
    benchmark = runpy.run_path(str(tmp_path / "benchmarks" / "whole.py"))["BENCHMARK"]
    monkeypatch.setattr(registry, "_all", lambda: checkout)
    benchmark.run(Console(file=io.StringIO()))
    assert run(["whole"], record=True)[0] == 0
    commit = hashlib.sha1(b"a commit").hexdigest()
    assert command("bench", "--ci", "--commit", commit)[0] == 0

    result = proofs.read_result("whole")
    [entry] = result["claims"]
    entry["samples"]["ours"] = [number / 2 for number in entry["samples"]["ours"]]
    entry["value"] += 20 * math.log10(2)
    entry["interval"] = [end + 20 * math.log10(2) for end in entry["interval"]]
    proofs._save(result)
    assert run(["whole"])[0] == 0 and checkout["whole"].status == "works"  # as if it had been measured
    assert benchmark.check(Console(file=io.StringIO()), Selection()) is False
    assert command("bench", "--ci", "--commit", commit)[0] == 1


def test_verify_tells_where_a_run_broke_off(checkout, plant):
    plant({"tests/methods/test_whole.py": "def test_unmarked():\n    pass\n"})
    code, found, text = run(["whole"], record=True)
    assert code == 1 and not found
    assert "test_unmarked has no mark `proof`" in text
    plant({"tests/methods/test_whole.py": "import pytest\n" + ALL_FIVE.replace("'loads'", "'load'")})
    assert "has the mark proof('load',)" in run(["whole"])[2]
    plant({"tests/methods/test_whole.py": "import os, pytest\n" + ALL_FIVE.replace("pass", "os._exit(0)", 1)})
    code, found, text = run(["whole"], record=True)
    assert code == 1 and not found and "pytest broke off" in text
    assert proofs.read_result("whole")["proofs"] == {}


def test_verify_needs_a_checkout_and_a_method_with_a_system(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "_run_tests", lambda *_: pytest.fail("it ran"))
    checkout["bare"] = Method("bare", "Bare", "samplers", "none", reason="a survey")
    for key, told in (("whol", "Did you mean 'whole'"), ("bare", "a survey")):
        with pytest.raises(ValueError, match=told):
            verify.verify(["whole", key])
    monkeypatch.setattr(verify, "ROOT", tmp_path / "site-packages")
    for call in (lambda: verify.verify(["whole"]), verify.verifiable):
        with pytest.raises(ValueError, match="needs a source checkout"):
            call()


def test_status_without_a_result():
    def status(form: str, **other) -> str:
        return Method("planted_method", "Planted", "samplers", form, **other).status

    assert status("none", reason="a survey") == "none"
    assert status("upstream", entry=("diffusers.DDIMScheduler",)) == "upstream"
    assert status("hook") == status("hook", entry=("DeepCacheConfig",)) == "open"


def test_outcomes_that_are_none_are_refused(results):
    row = Method("widget", "Widget", "samplers", "hook", entry=("DeepCacheConfig",))
    for wrong in ({"exactly": "passed"}, {"exact": "green"}):
        with pytest.raises(ValueError, match="`outcomes`"):
            proofs.record_proofs(row, wrong)
    assert proofs.read_result("widget") is None
