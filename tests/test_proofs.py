"""The machinery behind a method's status, tried on methods planted in a folder: the good and the faulty."""

from __future__ import annotations

import hashlib
import io
import json
import math
import platform
import re
import runpy
import shutil
import types
from pathlib import Path

import pytest
from rich.console import Console

import diffusers_ext as dx
from diffusers_ext import proofs, registry, verify
from diffusers_ext.registry import Method

ROOT = Path(__file__).resolve().parents[1]

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
