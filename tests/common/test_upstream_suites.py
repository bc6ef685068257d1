"""diffusers' own suites over our schedulers, models and pipelines, beside ours; `tests/upstream/suites.py` says how.

`DIFFUSERS_CHECKOUT` names a checkout of diffusers, of a version near to the one that is installed: it is the installed
one that is tested. The counts are printed. A failure counts where the class is ours; of diffusers' own it is reported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFTEST = """
    from difftests.conftest import pytest_configure  # the marks of the suites
"""


def run_suites(checkout: Path, folder: Path, select: str = "") -> tuple[dict[str, Counter], dict[str, str], str]:
    """Outcomes by test class, messages of the failures by test, and the output of the process."""
    (folder / "difftests").symlink_to(checkout / "tests")
    (folder / "conftest.py").write_text(textwrap.dedent(CONFTEST))
    (folder / "pytest.ini").write_text("[pytest]\n")
    shutil.copy(ROOT / "tests" / "upstream" / "suites.py", folder / "test_suites.py")
    path = os.pathsep.join(filter(None, [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [
        sys.executable, "-m", "pytest", "-q", "-c", "pytest.ini", "--rootdir", ".", "-p", "no:cacheprovider", "-W", "ignore",
        "--junitxml", "report.xml", "-k", select, "test_suites.py",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    output = result.stdout + result.stderr
    if not (folder / "report.xml").is_file():
        return {}, {}, output
    counts: dict[str, Counter] = defaultdict(Counter)
    failures: dict[str, str] = {}
    for test in ElementTree.parse(folder / "report.xml").iter("testcase"):
        bad = [child for child in test if child.tag in ("failure", "error")]
        skipped = any(child.tag == "skipped" for child in test)
        group = test.get("classname", "").rpartition(".")[2] or test.get("name", "")
        counts[group]["failed" if bad else "skipped" if skipped else "passed"] += 1
        if bad:
            failures[f"{group}::{test.get('name')}"] = (bad[0].get("message") or "").splitlines()[0][:200]
    return counts, failures, output


def test_upstreams_suites(tmp_path, capsys):
    checkout = os.environ.get("DIFFUSERS_CHECKOUT")
    if not checkout:
        pytest.skip("DIFFUSERS_CHECKOUT names no checkout of diffusers, whose tests are run over our classes")
    wanted = Path(checkout) / "tests" / "schedulers" / "test_schedulers.py"
    assert wanted.is_file(), f"DIFFUSERS_CHECKOUT is {checkout!r}, and there is no {wanted}"
    counts, failures, output = run_suites(Path(checkout), tmp_path)
    assert counts, f"no test of diffusers' suites was run:\n{output[-4000:]}"
    with capsys.disabled():
        print("\n\ndiffusers' own suites         passed failed skipped")
        for group, count in counts.items():
            print(f"{group.removeprefix('Test_')[:60]:60} {count['passed']:4} {count['failed']:4} {count['skipped']:4}")
        for name, message in failures.items():
            print(f"failed: {name}: {message}")
    assert counts["Test_planted_scheduler_PlantedScheduler"]["passed"] >= 8, f"the suites do not run:\n{output[-4000:]}"
    from tests.common import upstream

    theirs = {case.cls.__name__ for case in upstream.SUITE.cases()}
    ours = [name for name in failures if name.partition("::")[0].rpartition("_")[2] not in theirs]
    assert not ours, f"{len(ours)} tests of diffusers fail for our classes; `upstream_skips` of `COMMON` may say why"
