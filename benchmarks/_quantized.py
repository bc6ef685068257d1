"""Quantized models against full precision: pictures of the same seeds, what calibration costs, and what is saved.

    add_models(
        BENCHMARK, {"fashion-ddpm": (25, None, 20)},
        {"W8A8": PTQConfig(method="ptq4dm"), "W8A8_minmax": PTQConfig(method="minmax")},
        {"over_minmax_W8A8": ("W8A8", "W8A8_minmax", 0.0)},
    )

Every variant is calibrated on the same captions, of pictures that the checkpoint was trained on and so none of those that are
drawn, or on the same classes, and from other seeds. A claim about two variants is the difference of their PSNR to full
precision, paired by pictures.

Pictures, and what a calibration took, are kept in `outputs/bench/cache` by everything that they follow from, and by nothing
else: a broken run goes on, and benchmarks share the runs that they have in common, such as full precision, and Q-Diffusion
where another method is compared with it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import OUTPUT, Benchmark, Selection
from benchmarks._quality import ACCURACY_TOLERANCE, RMSE_TOLERANCE
from benchmarks._record import Recorder, Samples, versions
from benchmarks._speed import denoiser_input, denoiser_run
from benchmarks._zoo import ZooModel, scheduler_name, weights
from benchmarks.zoo import _avatars, _fashion
from diffusers_ext import proofs
from diffusers_ext.metrics import (
    EfficientNetLite0,
    bootstrap_interval,
    frechet_distance,
    psnr,
    rmse,
    time_ratio,
)
from diffusers_ext.quantization import PTQConfig, calibrate
from diffusers_ext.quantization.backends import MODULES, backend
from diffusers_ext.quantization.methods import method_of
from diffusers_ext.quantization.recording import Call
from diffusers_ext.quantization.session import Session, put

CACHE = OUTPUT / "cache"
SAMPLES, BATCH, SEED = 16, 8, 10_000  # of calibration
DRAWN, RESAMPLES = 128, 100  # pictures of a Fréchet distance, and bootstrap samples of them
PART = 64  # pictures in a file of the cache
_CORE = "diffusers_ext.quantization.calibration"
_PACKAGES = {"quanto": "optimum-quanto", "torchao": "torchao", "bitsandbytes": "bitsandbytes"}  # by backend
_COLUMNS = [
    "variant", "bytes / float32", "calibration (min)", "PSNR to full precision (dB)", "PSNR low",
    "PSNR high", "RMSE", "attribute accuracy",
]  # fmt: skip
NETS = ("judge", "efficientnet")
_DISTANCES = ["features of", "variant", "distance to full precision", "of other seeds", "ratio", "low", "high"]


def calibration_inputs(model: str, count: int, guidance_scale: float | None) -> dict[str, Any]:
    """Arguments of `calibrate` for a checkpoint: captions that it was trained on, classes in turn, or a number.

    Args:
        model: of the zoo.
        count: samples.
        guidance_scale: of classifier-free guidance; None for an unconditional model.

    Raises:
        ValueError: the model is none that is quantized here.
    """
    guided = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    if model == "avatars-sd":
        return {"prompts": list(dict.fromkeys(_avatars.captions("generator")))[:count], **guided}
    if model == "fashion-dit":
        return {"prompts": [i % 10 for i in range(count)], **guided}
    if model == "fashion-ddpm":
        return {"num_samples": count}
    raise ValueError(f"`model` is {model!r}; allowed are avatars-sd, fashion-dit, fashion-ddpm.")


def settings_of(config: PTQConfig) -> dict[str, Any]:
    """What a config sets, as plain values."""
    return {k: v for k, v in config.to_dict().items() if k not in ("layers", "attentions", "quant_method")}


def feature_nets(model: str) -> dict[str, Callable[[np.ndarray], torch.Tensor]]:
    """`NETS` for pictures of a checkpoint: its judge, and a net that was trained on photographs."""
    if model.startswith("fashion"):
        judge: Any = _fashion.judge()
    else:
        judge = dx.AvatarJudge.from_pretrained(dx.zoo_path("avatars-judge"))
    return dict(zip(NETS, (judge.eval().features, EfficientNetLite0.from_package().features), strict=True))


class QuantizedQuality:
    """A part of a benchmark; see the module.

    Args:
        model: checkpoint of the zoo.
        steps: denoising steps, of calibration too.
        variants: label -> settings.
        comparisons: name of a claim -> label, label that it is compared with, and the goal in dB, or None.
        minutes: that the full run takes on two idle cores.
        guidance_scale: of classifier-free guidance; None for an unconditional model.
        accuracy: labels whose attribute accuracy is claimed to lose at most a point.
        costs: labels whose calibration time is claimed.
        frechet: labels whose Fréchet distance to full precision, of `DRAWN` pictures of the same seeds, is claimed to be
            below that of full precision with other seeds, by each of `NETS`.
        pictures: how many.
        samples: to calibrate with.
        zoo: gives the checkpoint by name.

    Raises:
        ValueError: a label is none of `variants`.
    """

    quick = False

    def __init__(
        self,
        model: str,
        steps: int,
        variants: Mapping[str, PTQConfig],
        comparisons: Mapping[str, tuple[str, str, float | None]],
        *,
        minutes: float,
        guidance_scale: float | None = None,
        accuracy: Sequence[str] = (),
        costs: Sequence[str] = (),
        frechet: Sequence[str] = (),
        pictures: int = 64,
        samples: int = SAMPLES,
        zoo: Callable[[str], ZooModel] = ZooModel,
    ) -> None:
        named = {label for ours, theirs, _ in comparisons.values() for label in (ours, theirs)}
        unknown = sorted({*named, *accuracy, *costs, *frechet} - set(variants))
        if unknown:
            raise ValueError(
                f"`comparisons`, `accuracy`, `costs` or `frechet` name {unknown}; variants are {list(variants)}."
            )
        self.model, self.steps, self.variants, self.comparisons = model, steps, dict(variants), dict(comparisons)
        self.minutes, self.guidance_scale, self.pictures, self.samples = minutes, guidance_scale, pictures, samples
        self.accuracy, self.costs, self.frechet, self.zoo = tuple(accuracy), tuple(costs), tuple(frechet), zoo

    @property
    def claims(self) -> list[str]:
        names = [*self.comparisons, *(f"accuracy_{label}" for label in self.accuracy)]
        names += [f"calibration_minutes_{label}" for label in self.costs]
        names += [f"frechet_{label}_{net}" for net in NETS for label in self.frechet]
        return [f"{self.model}_{name}" for name in names]

    @property
    def settings(self) -> dict[str, Any]:
        return {
            self.model: {
                "weights": weights(self.model),
                "scheduler": scheduler_name(self.model),
                "steps": self.steps,
                "guidance_scale": self.guidance_scale,
                "pictures": self.pictures,
                "calibration": {"samples": self.samples, "batch": BATCH, "seed": SEED},
                "variants": {label: settings_of(config) for label, config in self.variants.items()},
                **({"frechet": {"labels": list(self.frechet), "pictures": DRAWN}} if self.frechet else {}),
            }
        }

    @property
    def seeds(self) -> dict[str, Any]:
        count = 2 * DRAWN if self.frechet else self.pictures
        return {f"{self.model}_pictures": list(range(count))}

    def measure(self, recorder: Recorder, selection: Selection | None) -> None:
        """Make the pictures and add claims and tables."""
        zoo = self.zoo(self.model)
        conditions, seeds = zoo.conditions(self.pictures), range(self.pictures)
        reference = _Run(self, zoo, None)
        full = reference.pictures(self.pictures)
        accuracy = {"full": zoo.accuracy(full, conditions, seeds)}
        errors, costs, rows, drawn = {}, {}, [], {}
        for label, config in tqdm(self.variants.items(), desc=self.model, unit="variant", leave=False):
            run = _Run(self, zoo, config)
            pictures = run.pictures(self.pictures)
            if label in self.frechet:
                drawn[label] = run.pictures(DRAWN)
            errors[label] = rmse(pictures, full).numpy()
            accuracy[label] = judged = zoo.accuracy(pictures, conditions, seeds)
            nearness = psnr(pictures, full).numpy()
            costs[label] = cost = run.cost()
            rows.append([label, cost["share"], cost["minutes"],
                         float(nearness.mean()), *bootstrap_interval(nearness), float(errors[label].mean()),
                         None if judged is None else float(judged.mean())])  # fmt: skip
        judged = accuracy["full"]
        rows.insert(0, ["full precision", 1.0, *[None] * 5, None if judged is None else float(judged.mean())])
        recorder.table(f"{self.model}: quality", _COLUMNS, rows)
        for name, (ours, theirs, goal) in self.comparisons.items():
            columns = {"ours": errors[ours].tolist(), "theirs": errors[theirs].tolist()}
            recorder.paired(
                f"{self.model}_{name}", f"{self.model}: PSNR to full precision of {ours} above that of {theirs}",
                Samples("psnr_gain", columns, RMSE_TOLERANCE), "dB", None if goal is None else (">=", goal),
            )  # fmt: skip
        for label in self.accuracy:
            columns = {"ours": accuracy[label].tolist(), "theirs": accuracy["full"].tolist()}
            recorder.paired(
                f"{self.model}_accuracy_{label}", f"{self.model}: attribute accuracy of {label} less that of full precision",
                Samples("difference", columns, ACCURACY_TOLERANCE, False), "", (">=", -0.01),
            )  # fmt: skip
        for label in self.costs:
            recorder.claim(
                f"{self.model}_calibration_minutes_{label}",
                f"{self.model}: minutes of calibration of {label}, {self.samples} samples", costs[label]["minutes"], "min",
            )  # fmt: skip
        if drawn:
            claim_frechet(recorder, self.model, drawn, reference.pictures(DRAWN), reference.pictures(DRAWN, DRAWN))

    def draw(self, title: str, stem: Path) -> list[Path]:
        """Nothing: the table says it."""
        return []


def claim_frechet(
    recorder: Recorder, model: str, drawn: Mapping[str, np.ndarray], full: np.ndarray, others: np.ndarray
) -> None:
    """Claims that quantization moves pictures less than other seeds do, and a table.

    Args:
        recorder: of the benchmark.
        model: that made the pictures.
        drawn: label -> pictures, `(n, height, width, channels)` in [0, 1].
        full: those of full precision, of the same conditions and seeds.
        others: those of full precision, of the same conditions and other seeds.
    """
    rows = []
    for net, features in feature_nets(model).items():
        wanted, apart = features(full), features(others)
        for label, pictures in drawn.items():
            distances, ratio, interval = over_other_seeds(features(pictures), wanted, apart)
            recorder.claim(
                f"{model}_frechet_{label}_{net}",
                f"{model}: Fréchet distance of {label} to full precision of the same seeds over that of full precision of "
                f"other seeds, by the features of {net}, {len(full)} pictures each",
                ratio, "x", interval, ("<", 1.0),
            )  # fmt: skip
            rows.append([net, label, *distances, ratio, *interval])
    recorder.table(f"{model}: Fréchet distances of {len(full)} pictures", _DISTANCES, rows)


def over_other_seeds(
    own: torch.Tensor, wanted: torch.Tensor, apart: torch.Tensor
) -> tuple[tuple[float, float], float, tuple[float, float]]:
    """Fréchet distances of two sets to a third, their ratio, and its interval.

    The rows of all three are resampled together: row i of `own` is nearly that of `wanted`, which resampling them apart,
    as `distance_difference` does, would hide. The interval is that of the logarithm, shifted by the bias that resampling has,
    as in `diffusers_ext.metrics`.

    Args:
        own, wanted: `(n, d)`, features of pictures of the same seeds.
        apart: of other seeds.
    """

    def both(rows: torch.Tensor) -> list[float]:
        return [frechet_distance(some[rows], wanted[rows], resamples=2).value for some in (own, apart)]

    generator, count = torch.Generator().manual_seed(0), len(wanted)
    draws = [torch.arange(count), *torch.randint(count, (RESAMPLES, count), generator=generator)]
    bar = tqdm(draws, desc="Fréchet distance", unit="sample", delay=2.0, leave=False)
    distances = torch.tensor([both(rows) for rows in bar], dtype=torch.float64)
    logs = distances.clamp_min(1e-12).log()
    value, resampled = (logs[:, 0] - logs[:, 1]).tensor_split([1])
    shifted = resampled - (resampled.mean() - value)
    low, high = torch.quantile(shifted, torch.tensor([0.025, 0.975], dtype=torch.float64)).exp().tolist()
    return (float(distances[0, 0]), float(distances[0, 1])), float(value.exp()), (low, high)


def add_models(
    benchmark: Benchmark,
    models: Mapping[str, tuple[int, float | None, float]],
    variants: Mapping[str, PTQConfig],
    comparisons: Mapping[str, tuple[str, str, float | None]],
    *,
    parts: Mapping[str, PTQConfig] | None = None,
    part_comparisons: Mapping[str, tuple[str, str, float | None]] | None = None,
    accuracy: Sequence[str] = (),
    costs: Sequence[str] = (),
    frechet: Sequence[str] = (),
    samples: int = SAMPLES,
) -> None:
    """Add a `QuantizedQuality` for each model.

    Args:
        benchmark: that gets them.
        models: name -> steps, guidance scale or None, minutes; the smallest first.
        variants, comparisons, costs, frechet, samples: of all models.
        parts, part_comparisons: more of them, of the first model alone.
        accuracy: of models with conditions.
    """
    for i, (model, (steps, guidance_scale, minutes)) in enumerate(models.items()):
        benchmark.add(
            QuantizedQuality(
                model,
                steps,
                {**variants, **((parts or {}) if i == 0 else {})},
                {**comparisons, **((part_comparisons or {}) if i == 0 else {})},
                minutes=minutes,
                guidance_scale=guidance_scale,
                accuracy=() if guidance_scale is None else accuracy,
                costs=costs,
                frechet=frechet,
                samples=samples,
            )
        )


# --- runs that are kept ----------------------------------------------------------------------------------------------


class _Run:
    """One way to make pictures with a model, and what it cost; taken from the cache where that has it.

    Args:
        study: says how.
        zoo: the model; left as it is.
        config: of quantization; None for full precision.
    """

    def __init__(self, study: QuantizedQuality, zoo: ZooModel, config: PTQConfig | None) -> None:
        self.study, self.zoo, self.config = study, zoo, config
        self.conditions = zoo.conditions(DRAWN)
        known: dict[str, Any] = {
            "model": study.model, "weights": weights(study.model), "steps": study.steps,
            "guidance_scale": study.guidance_scale, "conditions": self.conditions, "versions": versions(),
        }  # fmt: skip
        sources = ["benchmarks._zoo"]
        if config is not None:
            known["config"] = settings_of(config)
            known["inputs"] = calibration_inputs(study.model, study.samples, study.guidance_scale)
            known |= {"batch": BATCH, "seed": SEED}
            sources += [_CORE, type(method_of(config.method)).__module__]
            if config.backend in MODULES:
                known["versions"] = versions([_PACKAGES[config.backend]])
                sources.append(backend(config.backend).__name__)
        known["sources"] = [proofs.source_hash(name) for name in sources]
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]
        self.stem = CACHE / f"quantized-{study.model}-{digest}"

    def pictures(self, count: int, first: int = 0) -> np.ndarray:
        """Pictures of seeds `first` to `first + count - 1`; picture i has condition `i % DRAWN`.

        Args:
            first: a multiple of `PART`.
        """
        parts = [self._part(number) for number in range(first // PART, math.ceil((first + count) / PART))]
        return np.concatenate(parts)[:count]

    def cost(self) -> dict[str, float]:
        """`share` of the bytes of float32, and the `minutes` of the calibration."""
        file = self.stem.with_suffix(".json")
        if not file.is_file():
            _ = self._pipe
        return json.loads(file.read_text(encoding="utf-8"))

    def _part(self, number: int) -> np.ndarray:
        file = self.stem.with_name(f"{self.stem.name}-{number}.npy")
        if not file.is_file():
            seeds = range(number * PART, (number + 1) * PART)
            conditions = [self.conditions[seed % DRAWN] for seed in seeds]
            pictures = self.zoo.generate(self._pipe, conditions, seeds, self.study.steps, self.study.guidance_scale)
            aside = file.with_name(f".{os.getpid()}.{file.name}")
            aside.parent.mkdir(parents=True, exist_ok=True)
            np.save(aside, pictures)
            os.replace(aside, file)
        return np.load(file, allow_pickle=False)

    @functools.cached_property
    def _pipe(self) -> Any:
        """The pipeline, quantized, which takes minutes."""
        if self.config is None:
            return self.zoo.pipe
        pipe = copy.deepcopy(self.zoo.pipe)
        inputs = calibration_inputs(self.study.model, self.study.samples, self.study.guidance_scale)
        began = time.perf_counter()
        calibrate(pipe, self.config, num_inference_steps=self.study.steps, batch_size=BATCH, seed=SEED, **inputs)
        minutes = (time.perf_counter() - began) / 60
        share = _bytes_of(self.zoo.denoiser(pipe)) / _bytes_of(self.zoo.denoiser(self.zoo.pipe))
        file = self.stem.with_suffix(".json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"minutes": minutes, "share": share}), encoding="utf-8")
        return pipe


def _bytes_of(model: nn.Module) -> int:
    return sum(map(_bytes, model.state_dict().values()))


def _bytes(tensor: torch.Tensor) -> int:
    """Of a tensor, or of those inside one that a package made."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


# --- time ------------------------------------------------------------------------------------------------------------


def wide_unet(channels: Sequence[int]) -> UNet2DConditionModel:
    """A U-Net of few layers with the widths of Stable Diffusion 1.5, random weights: for time only."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=32, block_out_channels=tuple(channels), attention_head_dim=8, layers_per_block=1,
        cross_attention_dim=768, down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
    ).eval()  # fmt: skip


@torch.no_grad()
def quantized_model(model: UNet2DConditionModel, config: PTQConfig) -> UNet2DConditionModel:
    """A copy of a U-Net without a pipeline, quantized by ranges on one input: for time only."""
    found = copy.deepcopy(model)
    config = dataclasses.replace(config, layers={}, attentions=[])
    call = Call({**denoiser_input(found, 1), "timestep": torch.tensor(500)}, "sample", 0, 500.0)
    session = Session(found, config, [call], 0)
    with session.in_place():
        session.place_weights()
        session.place_inputs()
        packed = {name: layer.packed() for name, layer in session.layers.items()}
    for name, layer in packed.items():
        put(found, name, layer)
    return found


def claim_integer_time(recorder: Recorder, channels: Sequence[int], batch: int, rounds: int, threads: int) -> None:
    """Measure the claim `integer_time`: W8A8 by integer products over full precision, on a U-Net of real widths."""
    torch.set_num_threads(threads)
    model = wide_unet(channels)
    config = PTQConfig(method="minmax", attention=False)
    models = {
        "full": model,
        "int8": quantized_model(model, dataclasses.replace(config, arithmetic="int8")),
        "simulated": quantized_model(model, config),
    }
    runs = {name: denoiser_run(found, 1, batch) for name, found in models.items()}
    result = time_ratio(runs, baseline="full", repeats=rounds)
    ratio = result["int8"]
    recorder.claim(
        "integer_time",
        f"time of a forward by 8-bit integers over that in float32, a U-Net of widths {list(channels)}, {threads} threads",
        ratio.median, "x", ratio.interval, ("<=", 0.75),
    )  # fmt: skip
    rows = [[name, seconds, seconds / result.seconds["full"]] for name, seconds in result.seconds.items()]
    recorder.table("time of a forward", ["arithmetic", "seconds", "over full precision"], rows)
