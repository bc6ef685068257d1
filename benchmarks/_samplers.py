"""How near a sampler comes to the solution of its equation, against others at equal calls of the denoiser.

    BENCHMARK.add(OracleStudy({"ours": Variant("order 3", scheduler=dx.OurScheduler)}))
    BENCHMARK.add(TrajectoryStudy("avatars-sd", 3.0, {"ours": Variant("order 3", scheduler=dx.OurScheduler)}, minutes=9))

All samplers (`_sampler_peers`) start from the same noise at the same end of the process and go to clean data (`_grounds`), on
the grid that the study gives to all: whole timesteps with "trailing" spacing for pictures, and for oracles log-SNRs evenly
spread, on which an order of convergence shows.
"""

from __future__ import annotations

import functools
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks import _plot
from benchmarks._bench import Selection
from benchmarks._grounds import CACHE, PROBLEMS, Ground, OracleGround, PictureGround, Run
from benchmarks._quality import RMSE_TOLERANCE
from benchmarks._record import Recorder, Samples
from benchmarks._sampler_peers import (
    FLOW_ORACLE_PEERS,
    ORACLE_PEERS,
    Sampler,
    peers_of,
    reference_run,
    settings_of,
    variant_of,
)
from benchmarks._zoo import ZooModel, weights
from diffusers_ext import proofs
from diffusers_ext.metrics import bootstrap_interval
from diffusers_ext.oracles import convergence_order

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEST = "best"  # in `over`: the best peer of a budget
_ORDER_POINTS = 4  # budgets, from the largest down, that the order of convergence is fitted to


class _Study:
    """What the two studies share: runs by sampler and budget, tables, claims, and a drawing."""

    quick = True
    formula: str  # of `Samples`
    tolerance: float
    unit: str
    goal: tuple[str, float]
    statement: str  # how a claim begins

    def __init__(
        self,
        name: str,
        grounds: Sequence[str],
        variants: Mapping[str, Sampler],
        peers: Mapping[str, Sampler] | None,
        calls: Sequence[int],
        claim_calls: Sequence[int],
        over: Sequence[str],
        units: int,
        minutes: float,
    ) -> None:
        if not variants or not calls or not over:
            raise ValueError("`variants`, `calls` or `over` is empty; there is nothing to compare.")
        if not set(claim_calls) <= set(calls):
            raise ValueError(f"`claim_calls` is {list(claim_calls)}; allowed are those of `calls`, {list(calls)}.")
        if peers is not None and (twice := set(peers) & {*variants, BEST}):
            raise ValueError(f"`peers` has {sorted(twice)}; allowed are names that no variant has, and not {BEST!r}.")
        self.name, self.grounds, self.variants = name, tuple(grounds), dict(variants)
        self.peers = None if peers is None else dict(peers)
        self.calls, self.claim_calls, self.over = tuple(calls), tuple(claim_calls), tuple(over)
        self.units, self.minutes = units, minutes
        self._drawn: dict[str, _plot.Panel] = {}

    # --- what a subclass writes

    def _ground(self, key: str, units: list[int] | None) -> Ground:
        raise NotImplementedError

    def _default_peers(self, key: str) -> Mapping[str, Sampler]:
        raise NotImplementedError

    def _title(self, key: str) -> str:
        raise NotImplementedError

    # --- Part

    def _prefix(self, key: str) -> str:
        return self.name if key == self.name else f"{self.name}_{key}"

    def _claim(self, key: str, label: str, calls: int, peer: str) -> str:
        return f"{self._prefix(key)}_{label}_at_{calls}_over_{peer}"

    def _claims_of(self, key: str, label: str, calls: int) -> list[str]:
        return [self._claim(key, label, calls, peer) for peer in self.over]

    @property
    def claims(self) -> list[str]:
        return [
            name
            for key in self.grounds
            for label in self.variants
            for calls in self.claim_calls
            for name in self._claims_of(key, label, calls)
        ]

    @property
    def settings(self) -> dict[str, Any]:
        return {
            self.name: {
                "calls": list(self.calls),
                "over": list(self.over),
                "variants": {label: settings_of(sampler, self.calls) for label, sampler in self.variants.items()},
                "peers": {
                    key: {label: settings_of(sampler, self.calls) for label, sampler in self._peers(key).items()}
                    for key in self.grounds
                },
            }
        }

    @property
    def seeds(self) -> dict[str, Any]:
        return {self.name: list(range(self.units))}

    def _peers(self, key: str) -> Mapping[str, Sampler]:
        return self._default_peers(key) if self.peers is None else self.peers

    def measure(self, recorder: Recorder, selection: Selection | None) -> None:
        """Run the samplers and add claims, and tables of errors by calls and of differences to each peer.

        Raises:
            ValueError: `over` names no peer, or an error is zero or not finite.
        """
        self._drawn = {}
        for key in self.grounds:
            pairs = [
                (label, calls)
                for label in self.variants
                for calls in self.claim_calls
                if selection is None or selection.wants(self._claims_of(key, label, calls))
            ]
            if selection is None:
                self._measure_all(recorder, key, pairs)
            elif pairs:
                self._measure_some(recorder, key, pairs, selection)

    def _measure_all(self, recorder: Recorder, key: str, pairs: Sequence[tuple[str, int]]) -> None:
        ground, peers = self._ground(key, None), self._peers(key)
        everyone = {**self.variants, **peers}
        runs: dict[tuple[str, int], Run] = {}
        with tqdm(total=len(everyone) * len(self.calls), desc=self._title(key), unit="run", leave=False) as bar:
            for label, sampler in everyone.items():
                for calls in self.calls:
                    runs[label, calls] = ground.run(label, sampler, calls)
                    bar.update()
        for label, calls in pairs:
            best = min(peers, key=lambda peer: float(runs[peer, calls].errors.mean()))
            for over in self.over:
                self._add_claim(recorder, key, label, calls, over, best if over == BEST else over, runs, None)
        recorder.table(f"{self._title(key)}: error by calls", *self._error_table(everyone, runs))
        recorder.table(f"{self._title(key)}: against each peer", *self._peer_table(key, runs))
        self._drawn[key] = self._panel(everyone, runs)

    def _measure_some(
        self, recorder: Recorder, key: str, pairs: Sequence[tuple[str, int]], selection: Selection
    ) -> None:
        """Only the claims that are wanted, with only the peers that they are about."""
        units, peers = selection.units(self.units), self._peers(key)
        ground = self._ground(key, units)
        runs: dict[tuple[str, int], Run] = {}

        def run(label: str, sampler: Sampler, calls: int) -> float:
            runs[label, calls] = ground.run(label, sampler, calls)
            return float(runs[label, calls].errors.mean())

        for label, calls in tqdm(pairs, desc=self._title(key), unit="run", leave=False):
            run(label, self.variants[label], calls)
            for over in self.over:
                claim = self._claim(key, label, calls, over)
                if not selection.wants([claim]):
                    continue
                peer: str | None = over
                if over == BEST:  # the best of all pictures may not be that of these few
                    peer = _recorded_peer(recorder.row.key, claim, list(peers))
                    peer = peer or min(peers, key=lambda name: run(name, peers[name], calls))
                if peer in peers:
                    run(str(peer), peers[str(peer)], calls)
                self._add_claim(recorder, key, label, calls, over, str(peer), runs, units)

    def _add_claim(
        self,
        recorder: Recorder,
        key: str,
        label: str,
        calls: int,
        over: str,
        peer: str,
        runs: Mapping[tuple[str, int], Run],
        units: list[int] | None,
    ) -> None:
        peers = self._peers(key)
        if peer not in peers:
            raise ValueError(f"`over` has {peer!r}; allowed are {BEST!r} and the peers, {', '.join(peers)}.")
        ours, theirs = runs[label, calls], runs[peer, calls]
        counts = {"ours": ours.calls, "theirs": theirs.calls}
        if over == BEST:
            counts["best"] = list(peers).index(peer)
        columns = {"ours": ours.errors.tolist(), "theirs": theirs.errors.tolist()}
        title = variant_of(self.variants[label], calls).title or label
        them = variant_of(peers[peer], calls).title or peer
        best = ", the best peer" if over == BEST else ""
        recorder.paired(
            self._claim(key, label, calls, over),
            f"{self._title(key)}: {self.statement} that of {them}{best}, at {calls} calls, {title}",
            Samples(self.formula, columns, self.tolerance, counts=counts, units=units),
            self.unit,
            self.goal,
        )

    # --- tables and drawing

    def _error_table(
        self, everyone: Mapping[str, Sampler], runs: Mapping[tuple[str, int], Run]
    ) -> tuple[list[str], list[list[Any]]]:
        """Mean and median error of each sampler by budget, the calls that it made, and its empirical order."""
        rows = []
        last = sorted(self.calls)[-_ORDER_POINTS:]
        for label, sampler in everyone.items():
            title = variant_of(sampler, self.calls[0]).title or label
            made = [runs[label, calls].calls for calls in self.calls]
            text = "as asked" if made == list(self.calls) else ", ".join(f"{number:g}" for number in made)
            for name, statistic in (("mean", np.mean), ("median", np.median)):
                errors = {calls: float(statistic(runs[label, calls].errors)) for calls in self.calls}
                order = None
                if len(last) > 1 and min(errors.values()) > 0:
                    order = convergence_order([errors[calls] for calls in last], [runs[label, n].calls for n in last])
                rows.append([title, text, name, *errors.values(), order])
        return ["sampler", "calls made", "error", *(f"{calls} calls" for calls in self.calls), "order"], rows

    def _peer_table(self, key: str, runs: Mapping[tuple[str, int], Run]) -> tuple[list[str], list[list[Any]]]:
        """What each variant gains on each peer at each budget, paired over the units."""
        rows = []
        for label, sampler in self.variants.items():
            for peer, other in self._peers(key).items():
                for calls in self.calls:
                    ours, theirs = runs[label, calls].errors, runs[peer, calls].errors
                    titles = [variant_of(one, calls).title or name for one, name in ((sampler, label), (other, peer))]
                    difference = ours - theirs
                    ratio = float(np.median(ours) / np.median(theirs))
                    rows.append([*titles, calls, float(difference.mean()), *bootstrap_interval(difference, np.mean), ratio])  # fmt: skip
        return ["sampler", "peer", "calls", "error less theirs", "low", "high", "median over theirs"], rows

    def _panel(self, everyone: Mapping[str, Sampler], runs: Mapping[tuple[str, int], Run]) -> _plot.Panel:
        series = {}
        for label, sampler in everyone.items():
            points = []
            for calls in self.calls:
                run = runs[label, calls]
                interval = bootstrap_interval(run.errors, np.median)
                points.append(_plot.Point(run.calls, float(np.median(run.errors)), interval))
            series[variant_of(sampler, self.calls[0]).title or label] = points
        return _plot.Panel("median error", series)

    def draw(self, title: str, stem: Path) -> list[Path]:
        """Draw error against calls of what was measured last to `stem-NAME.png`; one budget makes no line."""
        if not self._drawn or len(self.calls) < 2:
            return []
        titles = {self._title(key): panel for key, panel in self._drawn.items()}
        figure = error_against_calls(title, titles, bold=len(self.variants))
        return [_plot.save(figure, stem.with_name(f"{stem.name}-{self.name}.png"))]


def _recorded_peer(key: str, claim: str, peers: Sequence[str]) -> str | None:
    """The peer that a recorded claim over the best one is about, or None where there is no such record."""
    result = proofs.read_result(key)
    for entry in result["claims"] if result else []:
        if entry["name"] == claim:
            number = entry["samples"].get("counts", {}).get("best")
            return None if number is None or number >= len(peers) else peers[int(number)]
    return None


class OracleStudy(_Study):
    """A part of a benchmark: error to the exact solution where the score is exact. It takes seconds.

    A claim is the gain on a peer at a budget in dB, 20 log10 of their error over ours, as the mean over the samples:
    6 dB is half the error, 9.54 dB a third. Claims are named `NAME_PROBLEM_LABEL_at_CALLS_over_PEER`.

    Args:
        variants: label -> sampler.
        peers: label -> sampler; None takes those of diffusers for the process of each problem.
        problems: names among `PROBLEMS`.
        calls: budgets.
        claim_calls: those that claims are about.
        over: the peers that claims are about; "best" is the one with the least mean error of each budget.
        goal: gain in dB that a claim is to reach; 0.01 tells a gain from rounding, where two samplers are the same.
        samples: how many starts there are.
        minutes: that it takes on two idle cores.
        name: begins the names of claims and drawings.

    Raises:
        ValueError: nothing to compare, `claim_calls` are not among `calls`, or a problem is unknown.
    """

    formula = "psnr_gain"
    tolerance = 1e-4  # of errors of 1e-3 to 1: states are float32, and paths near a border multiply what is rounded
    unit = "dB"
    statement = "error below"

    def __init__(
        self,
        variants: Mapping[str, Sampler],
        peers: Mapping[str, Sampler] | None = None,
        *,
        problems: Sequence[str] = ("mixture", "low_rank", "guided"),
        calls: Sequence[int] = (5, 8, 10, 15, 20, 30, 50),
        claim_calls: Sequence[int] = (5, 10, 20),
        over: Sequence[str] = ("dpm_solver_pp_2m",),
        goal: float = 0.01,
        samples: int = 64,
        minutes: float = 1,
        name: str = "oracle",
    ) -> None:
        for problem in problems:
            if problem not in PROBLEMS:
                raise ValueError(f"`problems` has {problem!r}; allowed are {', '.join(PROBLEMS)}.")
        self.goal = (">=", goal)
        super().__init__(name, problems, variants, peers, calls, claim_calls, over, samples, minutes)

    def _ground(self, key: str, units: list[int] | None) -> OracleGround:
        return OracleGround(PROBLEMS[key], self.units, units)

    def _default_peers(self, key: str) -> Mapping[str, Sampler]:
        return FLOW_ORACLE_PEERS if PROBLEMS[key].flow else ORACLE_PEERS

    def _title(self, key: str) -> str:
        return PROBLEMS[key].title


class TrajectoryStudy(_Study):
    """A part of a benchmark: distance of pictures to those of the same seeds and 200 steps.

    A claim is the root mean square error of a picture less that of a peer, as the mean over the pictures. Claims are
    named `NAME_LABEL_at_CALLS_over_PEER`; the differences to all peers are in a table. The runs of the reference and of
    everything that is a scheduler alone are kept on disk, and made once for all papers; a quick run makes its own.

    Args:
        model: checkpoint of the zoo.
        guidance_scale: of classifier-free guidance; 1 for none, None for an unconditional model.
        variants: label -> sampler.
        peers: label -> sampler; None takes those of diffusers that work in the model's pipeline.
        calls: budgets.
        claim_calls: those that claims are about; None for all.
        over: the peers that claims are about; "best" is the one with the least mean error of each budget.
        pictures: how many.
        reference_steps: of the reference run.
        minutes: that it takes on two idle cores.
        name: of claims, settings, tables and drawings; the model with its guidance, unless given.
        zoo: gives the checkpoint by name.
        cache: folder of runs; None keeps none.

    Raises:
        ValueError: nothing to compare, or `claim_calls` are not among `calls`.
    """

    formula = "difference"
    tolerance = RMSE_TOLERANCE
    unit = ""
    goal = ("<=", -RMSE_TOLERANCE)  # more than rounding: some samplers are the same at some numbers of steps
    statement = "RMSE to the reference run less"

    def __init__(
        self,
        model: str,
        guidance_scale: float | None,
        variants: Mapping[str, Sampler],
        peers: Mapping[str, Sampler] | None = None,
        *,
        calls: Sequence[int] = (5, 8, 12, 20),
        claim_calls: Sequence[int] | None = None,
        over: Sequence[str] = (BEST,),
        pictures: int = 64,
        reference_steps: int = 200,
        minutes: float,
        name: str = "",
        zoo: Callable[[str], ZooModel] = ZooModel,
        cache: Path | None = CACHE,
    ) -> None:
        self.model, self.guidance_scale, self.reference_steps = model, guidance_scale, reference_steps
        self.zoo, self.cache = zoo, cache
        self._zoo = functools.cache(zoo)
        name = name or (model if guidance_scale is None else f"{model}_w{guidance_scale:g}")
        claim_calls = calls if claim_calls is None else claim_calls
        super().__init__(name, [name], variants, peers, calls, claim_calls, over, pictures, minutes)

    @property
    def settings(self) -> dict[str, Any]:
        found = super().settings
        found[self.name] |= {
            "model": self.model, "weights": weights(self.model), "guidance_scale": self.guidance_scale,
            "reference": reference_run(self._kind[1], self.reference_steps).settings(),
        }  # fmt: skip
        return found

    @functools.cached_property
    def _kind(self) -> tuple[str, bool]:
        """Class of the pipeline, and whether its process is rectified flow; nothing is loaded for it."""
        index = json.loads((dx.zoo_path(self.model) / "model_index.json").read_text(encoding="utf-8"))
        return index["_class_name"], index["scheduler"][1].startswith("FlowMatch")

    def _ground(self, key: str, units: list[int] | None) -> PictureGround:
        cache = self.cache if units is None else None
        zoo = self._zoo(self.model)
        return PictureGround(zoo, self.guidance_scale, self.units, units, self.reference_steps, cache)

    def _default_peers(self, key: str) -> Mapping[str, Sampler]:
        return peers_of(*self._kind)

    def _title(self, key: str) -> str:
        scale = self.guidance_scale
        return (
            self.model if scale is None else f"{self.model}, {f'guidance {scale:g}' if scale != 1 else 'no guidance'}"
        )


def error_against_calls(title: str, panels: Mapping[str, _plot.Panel], bold: int | Mapping[str, int] = 0) -> Figure:
    """Panels side by side, error against calls of the denoiser, both axes logarithmic.

    Args:
        title: of the whole figure.
        panels: their titles, and what is in them.
        bold: how many of the first series of each panel to draw as solid lines, also by the panel's title; the others are
            dashed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(6 * len(panels), 5), dpi=120, layout="constrained")
    figure.suptitle(textwrap.fill(title, 60 * len(panels)))
    colors, markers = colormaps["tab20"].colors, "osD^vPX*<>"  # type: ignore[attr-defined]
    for axes, (name, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        solid = bold if isinstance(bold, int) else bold[name]
        for i, (label, points) in enumerate(panel.series.items()):
            costs, values = [point.cost for point in points], [point.value for point in points]
            style = "-" if i < solid else "--"
            color, marker = colors[(2 * i + i // 10) % 20], markers[i % len(markers)]
            axes.plot(costs, values, style, color=color, marker=marker, markersize=4, linewidth=1.3, label=label)
            ends = [point.interval for point in points]
            axes.fill_between(costs, [low for low, _ in ends], [high for _, high in ends], color=color, alpha=0.12)
        axes.set(title=name, xlabel="calls of the denoiser", ylabel=panel.measure, xscale="log", yscale="log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        first = next(iter(panel.series.values()))  # others may make a call more, and ticks side by side overlap
        axes.set_xticks([round(point.cost) for point in first])
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    return figure
