"""What all tests share: one small offline world, the marker `proof`, and the avatars pipeline.

- `@pytest.mark.proof("exact")` says which of the five proofs of its method a test belongs to. Each test under
  `tests/methods` has one.
- `--proofs-json FILE` writes the outcomes of these tests by file and proof. `diffusers-ext verify` reads them.
- `avatars_sd` is the shared pipeline, to be left as it is; `pipe` is a copy that belongs to the test.

No test may depend on those before it: each starts from the same seeds and the same torch settings. Nothing here imports
torch by itself, so that tests which do without stay fast.
"""

from __future__ import annotations

import atexit
import copy
import json
import os
import random
import shutil
import sys
import tempfile
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from diffusers_ext.proofs import PROOFS

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

# Read when torch, huggingface_hub and tqdm are first imported, so set before any of them is. One thread: the same
# bits on every machine, and no crowd when tests run side by side. A subprocess that talks to a test server of the Hub
# sets HF_HUB_OFFLINE=0 for itself.
_HF_HOME = tempfile.mkdtemp(prefix="diffusers_ext_tests_")
atexit.register(shutil.rmtree, _HF_HOME, ignore_errors=True)
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.update(
    HF_HOME=_HF_HOME,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TQDM_DISABLE="1",
    TOKENIZERS_PARALLELISM="false",
)


# --- proofs ----------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--proofs-json", metavar="FILE", help="write the outcomes of the tests marked `proof` to FILE")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"proof(name): proof of its method that a test belongs to: {', '.join(PROOFS)}")
    if config.getoption("--proofs-json") and not hasattr(config, "workerinput"):  # under xdist the controller writes
        config.pluginmanager.register(_ProofsJson(Path(config.getoption("--proofs-json"))), "proofs_json")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wrong = []
    for item in items:
        marker = item.get_closest_marker("proof")
        if marker is None:
            if item.path.parent.name == "methods":
                wrong.append(f"{item.nodeid} has no mark `proof`")
        elif len(marker.args) != 1 or marker.args[0] not in PROOFS or marker.kwargs:
            wrong.append(f"{item.nodeid} has the mark proof{marker.args}")
        else:
            item.user_properties.append(("proof", marker.args[0]))  # travels with the test's reports, also under xdist
    if wrong:
        allowed = ", ".join(f"@pytest.mark.proof({name!r})" for name in PROOFS)
        raise pytest.UsageError("\n".join([*wrong, f"Allowed are {allowed}."]))


class _ProofsJson:
    """Gathers the outcomes of tests marked `proof` and writes them when the session ends.

    The file holds `{"files": {file: {proof: [test, ...]}}, "errors": {file: message}}`. A test is `{"name", "outcome",
    "seconds", "message"}`, its outcome `passed`, `failed` or `skipped`. Errors are of files that could not be imported.
    An expected failure counts as failed: a proof holds or it does not.
    """

    def __init__(self, path: Path):
        self.path = path
        self.tests: dict[str, dict[str, Any]] = {}
        self.errors: dict[str, str] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.errors[report.nodeid.partition("::")[0]] = _last_line(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        proof = dict(report.user_properties).get("proof")
        if proof is None:
            return
        file, _, name = report.nodeid.partition("::")
        new = {"file": file, "proof": proof, "name": name, "outcome": None, "seconds": 0.0, "message": ""}
        test = self.tests.setdefault(report.nodeid, new)
        test["seconds"] += report.duration
        if report.failed or hasattr(report, "wasxfail"):
            test.update(outcome="failed", message=_last_line(report))
        elif report.skipped or (report.when == "call" and test["outcome"] is None):
            test.update(outcome=report.outcome, message=_last_line(report))

    def pytest_sessionfinish(self) -> None:
        files: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
        for test in self.tests.values():
            files[test.pop("file")][test.pop("proof")].append(test)
        self.path.write_text(json.dumps({"files": files, "errors": self.errors}, indent=1), encoding="utf-8")


def _last_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    """What went wrong, in one line."""
    if hasattr(report, "wasxfail"):
        return f"expected to fail: {report.wasxfail}" if report.skipped else "passed, but was expected to fail"
    if isinstance(report.longrepr, tuple):  # a skip: file, line, reason
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr or "")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if crash is not None else lines[-1]) if lines else ""


# --- every test starts the same --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Same seeds and torch settings for each test, whatever ran before it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # setting it is slow: it imports the compiler
        torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def avatars_sd() -> Iterator[StableDiffusionPipeline]:
    """The zoo's `avatars-sd` in float32 on the CPU, to be called; a test that changes anything takes `pipe`."""
    import torch
    from diffusers import StableDiffusionPipeline

    import diffusers_ext as dx

    pipe = StableDiffusionPipeline.from_pretrained(dx.zoo_path("avatars-sd"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    before = _fingerprint(pipe)
    yield pipe
    assert _fingerprint(pipe) == before, "a test changed the shared pipeline `avatars_sd`; such tests take `pipe`"


@pytest.fixture
def pipe(avatars_sd: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A copy of `avatars_sd` that shares nothing with it or with another test."""
    return copy.deepcopy(avatars_sd)


def _fingerprint(pipe: StableDiffusionPipeline) -> list[Any]:
    """All that a test might leave behind on a pipeline: configs, weights, hooks, processors."""
    import torch

    marks: list[Any] = [dict(pipe.config)]
    for name, part in pipe.components.items():
        marks.append((name, type(part), dict(part.config) if hasattr(part, "register_to_config") else None))
        if isinstance(part, torch.nn.Module):
            marks += [(key, float(value.double().abs().sum())) for key, value in part.state_dict().items()]
            for key, module in part.named_modules():
                hooks = len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module)
                marks.append((key, type(module), type(getattr(module, "processor", None)), hooks))
    return marks


@pytest.fixture
def tiny(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """The avatars pipeline with a random denoiser of 20,000 weights."""
    import torch
    from diffusers import UNet2DConditionModel

    config = pipe.unet.config
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel(
        sample_size=config.sample_size, in_channels=config.in_channels, out_channels=config.out_channels,
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=config.cross_attention_dim, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    return pipe


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Writes files, given as path -> code, to a folder that Python imports from."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(files: dict[str, str]) -> None:
        for name, code in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(code), encoding="utf-8")

    return write
