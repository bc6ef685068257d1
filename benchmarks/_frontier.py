"""Quality against cost as curves: a cache beside those of other people, each with a range of settings.

    BENCHMARK.add(Frontier("fashion-dit", 20, {"N2": Variant("N = 2", [config])}, guidance_scale=4.0, minutes=9))

All make the same pictures from the same seeds with the same number of steps. Cost is multiply-accumulates of the denoiser,
counted in the runs that are compared, so that of a cache which decides by the batch it is the cost of that batch. A claim is
how much nearer to the plain run a variant comes than the best peer for the same cost: the error of a peer is that of its best
setting that costs no more, or, picture by picture, that between the two of its settings that cost a little less and a little
more, on a logarithmic scale, where that is smaller; and the peer with the least mean error counts. Runs of peers are kept on
disk and made once for all papers.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm.auto import tqdm

from benchmarks import _cache_peers, _plot, _zoo
from benchmarks._bench import OUTPUT, Selection
from benchmarks._quality import RMSE_TOLERANCE, Variant, called_by
from benchmarks._record import Recorder, Samples
from benchmarks._zoo import ZooModel, weights
from diffusers_ext._sources import canonical_dump
from diffusers_ext.cards import name_of
from diffusers_ext.metrics import bootstrap_interval, rmse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COST = "multiply-accumulates over those of the plain run"
_PACKAGES = ("torch", "diffusers", "cache-dit", "DeepCache")
_TICKS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.5, 2.0)


class MacCounter(TorchDispatchMode):
    """Multiply-accumulates inside, as `count_macs`, also of models whose modules hold each other, as cache-dit's do."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if (flops := flop_registry.get(func._overloadpacket)) is not None:
            self.total += flops(*args, **(kwargs or {}), out_val=output) // 2
        return output


@dataclass(frozen=True)
class Made:
    """What one setting made.

    Attributes:
        macs: multiply-accumulates of the denoiser a picture.
        errors: root mean square error of each picture to the plain run, `(n,)`.
    """

    macs: float
    errors: np.ndarray


def at_cost(curve: Sequence[Made], macs: float) -> np.ndarray | None:
    """Error of each picture by the best that a curve of settings offers for a cost, or None where all of it costs more.

    That is the setting with the least mean error of those that cost no more, or, where its mean is lower still, a setting
    in between: there the logarithm of the error is linear in the cost. A setting that makes a picture of the plain run is
    no end of such a line, as its error has no logarithm.
    """
    found = [made.errors for made in curve if made.macs <= macs]
    points = sorted((made for made in curve if made.errors.all()), key=lambda made: made.macs)
    for low, high in itertools.pairwise(points):
        if low.macs <= macs <= high.macs:
            share = 0.0 if high.macs == low.macs else (macs - low.macs) / (high.macs - low.macs)
            found.append(np.exp((1 - share) * np.log(low.errors) + share * np.log(high.errors)))
    return min(found, key=lambda errors: float(errors.mean()), default=None)


def _version(package: str) -> str | None:
    """None where it is not installed: runs of the other peers need it not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def curves_against_cost(
    title: str, panels: Mapping[str, Mapping[str, Sequence[_plot.Point]]], measure: str, bold: int, log: bool = True
) -> Figure:
    """Many curves, told apart by colour and mark: one panel for each kind of cost, which is its name.

    Args:
        title: of the whole figure.
        panels: label of the axis of cost -> name of a curve -> its points. All panels have the same curves.
        measure: label of the other axis.
        bold: how many of the first curves to draw as solid lines; the others are dashed.
        log: whether the axis of `measure` is logarithmic.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(6.5 * len(panels), 5.5), dpi=120, layout="constrained")
    figure.suptitle(textwrap.fill(title, 60 * len(panels)))
    colors, markers = colormaps["tab20"].colors, "osD^vPX*<>"  # type: ignore[attr-defined]
    for axes, (cost, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for i, (name, points) in enumerate(curves.items()):
            points = sorted(points, key=lambda point: point.cost)
            ends = [
                [abs(point.value - end) for point, end in zip(points, side, strict=True)]
                for side in zip(*(point.interval for point in points), strict=True)
            ]
            axes.errorbar(
                [point.cost for point in points], [point.value for point in points], yerr=ends, label=name,
                linestyle="-" if i < bold else "--", color=colors[(2 * i + i // 10) % 20], capsize=2,
                marker=markers[i % len(markers)], markersize=5, linewidth=1.8 if i < bold else 1.0,
            )  # fmt: skip
        axes.set(xlabel=cost, ylabel=measure, xscale="log", yscale="log" if log else "linear")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        costs = [point.cost for points in curves.values() for point in points]
        low, high = min(costs) / 1.1, max(costs) * 1.1
        axes.set_xlim(low, high)
        axes.set_xticks([tick for tick in _TICKS if low <= tick <= high])
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    return figure


@functools.cache
def _source_of_peers() -> str:
    """Hash of what runs of peers follow from here. Not of all that is imported, which names the whole package."""
    digest = hashlib.sha256()
    for module in (_cache_peers, _zoo):
        digest.update(canonical_dump(ast.parse(inspect.getsource(module))).encode())
    return digest.hexdigest()


class Frontier:
    """A part of a benchmark; see the module. Claims are named `NAME_LABEL_over_best_peer`.

    Args:
        model: checkpoint of the zoo.
        steps: of all runs.
        variants: label -> variant. Each costs more than the cheapest setting of some peer.
        guidance_scale: of classifier-free guidance.
        pictures: how many; papers that name the same number share the runs of peers.
        minutes: that it takes on two idle cores where the runs of peers are on disk. Those take about 8 more a model.
        name: begins the names of claims, settings, tables and drawings; "frontier_MODEL" unless given.
        zoo: gives the checkpoint by name.
        cache: folder of runs of peers.

    Raises:
        ValueError: there is no variant.
    """

    quick = False  # peers decide by the batch, so that a few of the pictures would be others

    def __init__(
        self,
        model: str,
        steps: int,
        variants: Mapping[str, Variant],
        *,
        guidance_scale: float,
        pictures: int = 32,
        minutes: float,
        name: str = "",
        zoo: Callable[[str], ZooModel] = ZooModel,
        cache: Path = OUTPUT / "cache",
    ) -> None:
        if not variants:
            raise ValueError("`variants` is empty; there is nothing to compare.")
        self.model, self.steps, self.variants = model, steps, dict(variants)
        self.guidance_scale, self.pictures, self.minutes = guidance_scale, pictures, minutes
        self.name, self.zoo, self.cache = name or f"frontier_{model}", zoo, cache
        self._curves: dict[str, list[_plot.Point]] = {}

    def _claim(self, label: str) -> str:
        return f"{self.name}_{label}_over_best_peer"

    @property
    def claims(self) -> list[str]:
        return [self._claim(label) for label in self.variants]

    @property
    def settings(self) -> dict[str, Any]:
        return {
            self.name: {
                "model": self.model, "weights": weights(self.model), "steps": self.steps,
                "guidance_scale": self.guidance_scale, "pictures": self.pictures,
                "variants": {label: variant.settings() for label, variant in self.variants.items()},
            }
        }  # fmt: skip

    @property
    def seeds(self) -> dict[str, Any]:
        return {self.name: list(range(self.pictures))}

    def measure(self, recorder: Recorder, selection: Selection | None) -> None:
        """Make the pictures and add the claims and a table of all settings.

        Raises:
            ValueError: a variant is cheaper than all settings of every peer, so that nothing has its cost.
        """
        runs = Runs(self.model, self.steps, self.guidance_scale, self.pictures, self.zoo, self.cache)
        with tqdm(total=len(self.variants), desc=self.name, unit="run", leave=False) as bar:
            ours = {}
            for label, variant in self.variants.items():
                ours[label] = runs.make(variant)
                bar.update()
        curves = runs.of_peers()
        title = name_of(recorder.row)
        rows = []
        for label, made in ours.items():
            found = {peer: at_cost(list(curve.values()), made.macs) for peer, curve in curves.items()}
            there = {peer: errors for peer, errors in found.items() if errors is not None}
            if not there:
                raise ValueError(f"`variants`: {label!r} costs {made.macs:.4g}, and no peer has a setting for that.")
            best = min(there, key=lambda peer: float(there[peer].mean()))
            columns = {"ours": made.errors.tolist(), "theirs": there[best].tolist()}
            recorder.paired(
                self._claim(label),
                f"{self.model}: PSNR to the plain run above that of {best}, the best peer, at equal cost, {title}, "
                f"{self.variants[label].title}",
                Samples("psnr_gain", columns, RMSE_TOLERANCE, counts={"macs": made.macs}),
                "dB",
                (">=", 0.0),
            )
            rows.append(self._row(title, self.variants[label].title, made, runs.full_macs))
        for peer, curve in curves.items():
            rows += [self._row(peer, setting, made, runs.full_macs) for setting, made in curve.items()]
        columns_ = ["cache", "setting", "cost over the plain run", "RMSE", "low", "high"]
        recorder.table(f"{self.name}: all settings", columns_, rows)
        series = {title: ours.values()} | {peer: curve.values() for peer, curve in curves.items()}
        self._curves = {
            name: [
                _plot.Point(made.macs / runs.full_macs, float(made.errors.mean()), bootstrap_interval(made.errors, np.mean))
                for made in curve
            ]
            for name, curve in series.items()
        }  # fmt: skip

    @staticmethod
    def _row(name: str, setting: str, made: Made, full: float) -> list[Any]:
        return [name, setting, made.macs / full, float(made.errors.mean()), *bootstrap_interval(made.errors, np.mean)]

    def draw(self, title: str, stem: Path) -> list[Path]:
        """Draw error against cost of what was measured last to `stem-NAME.png`."""
        if not self._curves:
            return []
        figure = curves_against_cost(
            f"{title.partition(':')[0]}, {self.model}, {self.steps} steps",
            {COST: self._curves},
            "RMSE to the plain run",
            1,
        )
        return [_plot.save(figure, stem.with_name(f"{stem.name}-{self.name}.png"))]


class Runs:
    """Runs of one checkpoint at one number of steps and guidance scale, each with its distance to the plain run.

    Args:
        model: checkpoint of the zoo.
        steps: of all runs.
        guidance_scale: of classifier-free guidance.
        pictures: how many.
        zoo: gives the checkpoint by name.
        cache: folder of runs that are kept.

    Attributes:
        full_macs: multiply-accumulates of the plain run, a picture.
    """

    def __init__(
        self,
        model: str,
        steps: int,
        guidance_scale: float,
        pictures: int,
        zoo: Callable[[str], ZooModel] = ZooModel,
        cache: Path = OUTPUT / "cache",
    ) -> None:
        self.model, self.steps, self.guidance_scale, self.pictures = model, steps, guidance_scale, pictures
        self.zoo, self.cache = zoo(model), cache
        self.conditions = self.zoo.conditions(pictures)
        self._plain, self.full_macs = self._generate(Variant())

    def make(self, variant: Variant) -> Made:
        """Pictures by a variant."""
        pictures, macs = self._generate(variant)
        return Made(macs, rmse(pictures, self._plain).double().numpy())

    def of_peers(self) -> dict[str, dict[str, Made]]:
        """Name -> setting -> what each peer made, from the disk where it is there."""
        source = _source_of_peers()
        curves: dict[str, dict[str, Made]] = {}
        rivals = _cache_peers.peers(self.model, self.steps, self.guidance_scale)
        with tqdm(total=sum(map(len, rivals.values())), desc="Peers", unit="run", leave=False) as bar:
            for peer, curve in rivals.items():
                for setting, variant in curve.items():
                    curves.setdefault(peer, {})[setting] = self.kept(
                        variant, {"peer": peer, "setting": setting, "source": source}
                    )
                    bar.update()
        return curves

    def kept(self, variant: Variant, key: Mapping[str, Any]) -> Made:
        """As `make`, from the disk where it is there.

        Args:
            variant: the way.
            key: plain values that it follows from, besides steps, guidance, pictures, weights and versions.
        """
        whole = {
            **key, "what": [self.steps, self.guidance_scale, self.pictures],
            "weights": weights(self.model), "versions": {name: _version(name) for name in _PACKAGES},
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]
        file = self.cache / f"frontier-{digest}.npz"
        if not file.is_file():
            made = self.make(variant)
            file.parent.mkdir(parents=True, exist_ok=True)
            aside = file.with_name(f".{os.getpid()}.{file.name}")
            np.savez(aside, macs=made.macs, errors=made.errors)
            os.replace(aside, file)
        with np.load(file, allow_pickle=False) as content:
            return Made(float(content["macs"]), content["errors"])

    def _generate(self, variant: Variant) -> tuple[np.ndarray, float]:
        counter = MacCounter()

        def counted(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with counter, sdpa_kernel(SDPBackend.MATH):
                return forward(*args, **kwargs)

        with variant.on(self.zoo.pipe) as pipe, called_by(self.zoo.denoiser(pipe), counted):
            pictures = self.zoo.generate(
                pipe, self.conditions, range(self.pictures), variant.steps or self.steps, self.guidance_scale,
                **variant.options,
            )  # fmt: skip
        return pictures, counter.total / self.pictures
