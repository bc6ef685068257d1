"""One fresh process and one Hub for all methods: what is saved here is loaded there, with this package and without it.

A suite packs each case into a folder (`Parcel`). One process then imports torch and diffusers, and forks twice. The first
child has this package: it loads every parcel from disk, pushes it to a Hub on this machine, and loads it from there. The
second cannot import this package: it loads what the parcels promise to be self-contained, from disk and from the Hub.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from .models import World
    from .suite import Case

SIDES = ("with this package", "without this package")
# Weights that are mapped from a file may be aligned differently in memory. With random weights, that moves the result of a
# few steps by up to 2e-5, of diffusers' own schedulers too.
TOLERANCE = 1e-4


@dataclass
class Parcel:
    """What travels of one case.

    Attributes:
        kind: how it is loaded, a name of `VISITS`.
        folder: where it was saved.
        cls: name of the class that `folder` belongs to; for pipelines, of none.
        calls: keyword arguments of the call whose output is compared.
        expected: output here, by side.
        self_contained: whether it is loaded without this package at all.
        has_code: whether stock diffusers needs `trust_remote_code` for it.
        absent: components to pass as None.
        lora: LoRA file inside `folder` that stock `load_lora_weights` takes.
        code: file inside `folder` with the class of a model.
        classes: component -> class that must be the installed one ("_class_name" is the pipeline).
        on: keys of the methods that must be on.
    """

    kind: str
    folder: Path
    calls: dict[str, Any]
    expected: dict[str, torch.Tensor]
    cls: str = ""
    self_contained: bool = True
    has_code: bool = False
    absent: tuple[str, ...] = ()
    lora: str = ""
    code: str = ""
    classes: dict[str, str] = field(default_factory=dict)
    on: tuple[str, ...] = ()


class Journey:
    """Packs the cases of a world, sends them once, and tells what became of each."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.parcels: dict[str, Parcel] = {}
        self.problems: dict[str, Exception] = {}
        self.reports: dict[str, dict[str, Any]] = {}
        self.travelled = False

    def check(self, case: Case) -> None:
        """Raise where the parcel of `case` could not be packed, or did not arrive as it was sent."""
        from .suite import Broken, require

        if not self.travelled:
            self._travel()
        if case.name in self.problems:
            raise self.problems[case.name]
        if case.name not in self.parcels:
            raise Broken("it is not among the travellers of this world")
        parcel = self.parcels[case.name]
        for side in SIDES:
            report = self.reports[case.name].get(side, {"error": "not visited"})
            if "skipped" in report:
                continue
            require("error" not in report, f"in a fresh process {side}: {report.get('error')}")
            for place, file in report["outputs"].items():
                expected, found = parcel.expected[side], load_file(file)["output"]
                equal = expected.shape == found.shape and torch.allclose(
                    expected.double(), found.double(), rtol=TOLERANCE, atol=TOLERANCE
                )
                require(equal, f"in a fresh process {side}, loaded from the {place}, its output differs")
            for name, cls in parcel.classes.items():
                found = report["classes"].get(name)
                require(side != SIDES[0] or found == cls, f"{side}, `{name}` is loaded as {found}, not as {cls}")
            require(
                side != SIDES[0] or tuple(report["on"]) == parcel.on, f"{side}, on are {report['on']}, not {parcel.on}"
            )

    def _travel(self) -> None:
        from tests.fresh import run_fresh
        from tests.hub_server import HubServer

        self.travelled = True
        for suite, case in self.world.travellers:
            try:
                self.parcels[case.name] = suite.pack(case, self.world, self.world.folder())
            except Exception as error:
                self.problems[case.name] = error
        if not self.parcels:
            return
        root = self.world.folder()
        manifest = []
        for number, (name, parcel) in enumerate(self.parcels.items()):
            plain = {key: value for key, value in parcel.calls.items() if not torch.is_tensor(value)}
            tensors = {key: value.contiguous() for key, value in parcel.calls.items() if torch.is_tensor(value)}
            save_file(tensors, root / f"{number}.safetensors")
            row = {key: value for key, value in asdict(parcel).items() if key not in ("expected", "calls", "folder")}
            manifest.append({**row, "name": name, "number": number, "calls": plain, "folder": str(parcel.folder)})
        (root / "manifest.json").write_text(json.dumps({"install": self.world.install, "parcels": manifest}))
        with HubServer() as hub:
            run_fresh(f"from tests.common import journey; journey.main({str(root)!r})", env=hub.env)
        for side in SIDES:
            for name, report in json.loads((root / f"{side}.json").read_text()).items():
                self.reports.setdefault(name, {})[side] = report


# --- in the fresh process --------------------------------------------------------------------------------------------


def main(root: str) -> None:
    """Visit all parcels of the manifest in `root`, once a side, each side in a process of its own."""
    import diffusers
    import diffusers.pipelines.pipeline_loading_utils
    import transformers  # noqa: F401  # shared by both children

    assert not [name for name in sys.modules if name.startswith("diffusers_ext")]
    for side in SIDES:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _visit_all(Path(root), side)
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"the child {side} ended with {status}")
    assert diffusers


def _visit_all(root: Path, side: str) -> None:
    with_us = side == SIDES[0]
    if not with_us:
        sys.modules["diffusers_ext"] = None  # type: ignore[assignment]  # whoever imports it gets an ImportError
    reports: dict[str, Any] = {}
    manifest = json.loads((root / "manifest.json").read_text())
    if with_us and manifest["install"]:
        module, _, function = manifest["install"].partition(":")
        getattr(importlib.import_module(module), function)()
    for parcel in manifest["parcels"]:
        if not with_us and not parcel["self_contained"]:
            reports[parcel["name"]] = {"skipped": "it does not promise to work without this package"}
            continue
        parcel["calls"] |= load_file(root / f"{parcel['number']}.safetensors")
        try:
            report = VISITS[parcel["kind"]](parcel, f"tester/{parcel['number']}", with_us)
            for place, output in report["outputs"].items():
                file = root / f"{parcel['number']}-{place}-{SIDES.index(side)}.safetensors"
                save_file({"output": output.contiguous()}, file)
                report["outputs"][place] = str(file)
        except Exception:
            report = {"error": traceback.format_exc(limit=-3)}
        reports[parcel["name"]] = {"classes": {}, "on": [], **report}
    (root / f"{side}.json").write_text(json.dumps(reports))


def _visit_pipeline(parcel: dict[str, Any], repo: str, with_us: bool) -> dict[str, Any]:
    """A folder of `save_pretrained`: by `dx.Pipeline`, and by stock diffusers without this package."""
    from diffusers import DiffusionPipeline

    from tests.common.models import draw

    absent = dict.fromkeys(parcel["absent"])

    def load(place: str) -> Any:
        if with_us:
            import diffusers_ext as dx

            return dx.Pipeline.from_pretrained(place, **absent)
        return DiffusionPipeline.from_pretrained(place, trust_remote_code=parcel["has_code"], **absent)

    def output(pipe: Any, place: str) -> torch.Tensor:
        if parcel["lora"]:
            folder, _, file = parcel["lora"].rpartition("/")
            pipe.load_lora_weights(place, subfolder=folder or None, weight_name=file)
        return draw(pipe, parcel["calls"])

    report: dict[str, Any] = {"outputs": {}}
    if with_us:  # without, what comes from the Hub is a folder on disk again
        import diffusers_ext as dx

        pipe = load(parcel["folder"])
        report["outputs"]["disk"] = output(pipe, parcel["folder"])
        report["on"] = [entry.key for entry in dx.status(pipe)]
        if not parcel["lora"]:
            dx.push_to_hub(pipe, repo)
        else:
            from diffusers_ext.hub import upload_folder

            upload_folder(parcel["folder"], repo)
        parts = {"_class_name": pipe, **pipe.components}
        report["classes"] = {name: f"{type(part).__module__}.{type(part).__name__}" for name, part in parts.items()}
    report["outputs"]["Hub"] = output(load(repo), repo)
    return report


def _visit_model(parcel: dict[str, Any], repo: str, with_us: bool) -> dict[str, Any]:
    """A folder of a model: by its class, by `AutoModel`, and by the exported file of its class."""
    from diffusers import AutoModel

    def output(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(**parcel["calls"], return_dict=False)[0]

    if with_us:
        import diffusers_ext as dx

        cls = getattr(dx, parcel["cls"])
        model = cls.from_pretrained(parcel["folder"])
        outputs = {"disk": output(model), "disk by AutoModel": output(AutoModel.from_pretrained(parcel["folder"]))}
        model.push_to_hub(repo.partition("/")[2])
        return {"outputs": {**outputs, "Hub": output(cls.from_pretrained(repo))}}
    file = Path(parcel["folder"], parcel["code"])
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cls = getattr(module, parcel["cls"])
    return {
        "outputs": {"disk": output(cls.from_pretrained(parcel["folder"])), "Hub": output(cls.from_pretrained(repo))}
    }


def _visit_attached(parcel: dict[str, Any], repo: str, with_us: bool) -> dict[str, Any]:
    """An adapter with `attach`, in the folder `adapter` inside that of the pipeline that it belongs to."""
    from diffusers import DiffusionPipeline

    from tests.common.models import draw

    pipe = DiffusionPipeline.from_pretrained(parcel["folder"], **dict.fromkeys(parcel["absent"]))
    if with_us:
        import diffusers_ext as dx

        getattr(dx, parcel["cls"]).from_pretrained(str(Path(parcel["folder"], "adapter"))).attach(pipe)
    return {"outputs": {"disk": draw(pipe, parcel["calls"])}}


VISITS: dict[str, Callable[[dict[str, Any], str, bool], dict[str, Any]]] = {
    "pipeline": _visit_pipeline,
    "model": _visit_model,
    "attached": _visit_attached,
}


def pack_pipeline(
    pipe: Any, folder: Path, stock: Any = None, calls: dict[str, Any] | None = None, **more: Any
) -> Parcel:
    """Save a pipeline with `dx.save_pretrained` and draw what is expected of it on both sides.

    Args:
        stock: the stock pipeline that it was made from; gives the call and the absent components.
        calls: keyword arguments of the call, in place of those of `stock`.
        more: fields of the parcel.
    """
    import diffusers_ext as dx

    from .models import draw

    calls = stock.call(3) if calls is None else calls
    output = draw(pipe, calls)
    dx.save_pretrained(pipe, folder, card=False)
    index = json.loads((folder / "model_index.json").read_text())
    fields = {
        "absent": () if stock is None else stock.absent,
        "has_code": "_dx_classes" in index,
        "on": tuple(entry.key for entry in dx.status(pipe)),
        "expected": dict.fromkeys(SIDES, output),
    }
    return Parcel("pipeline", folder, calls, **{**fields, **more})
