"""Quantized models against full precision: pictures of the same seeds, what calibration costs, and what is saved.

    QuantizedQuality(
        "fashion-ddpm", steps=50, minutes=20,
        variants={"W8A8": PTQConfig(method="ptq4dm"), "W8A8_minmax": PTQConfig(method="minmax")},
        comparisons={"over_minmax_W8A8": ("W8A8", "W8A8_minmax", 0.0)},
    )

Every variant is calibrated on the same captions, which are not those of the pictures, or on the same classes, and from other
seeds. Calibrated models are kept in `outputs/bench/cache`, so that a broken run goes on; the minutes that their calibration took are kept with
them. A claim about two variants is the difference of their PSNR to full precision, paired by pictures.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from tqdm.auto import tqdm

from benchmarks._bench import OUTPUT, Selection
from benchmarks._quality import ACCURACY_TOLERANCE, RMSE_TOLERANCE
from benchmarks._record import Recorder, Samples
from benchmarks._speed import denoiser_input, denoiser_run
from benchmarks._zoo import ZooModel, scheduler_name, weights
from benchmarks.zoo import _avatars
from diffusers_ext.metrics import bootstrap_interval, psnr, rmse, time_ratio
from diffusers_ext.quantization import PTQConfig, calibrate
from diffusers_ext.quantization.recording import Call
from diffusers_ext.quantization.session import Session, put

CACHE = OUTPUT / "cache"
SAMPLES, BATCH, SEED = 32, 8, 10_000  # of calibration
_COLUMNS = [
    "variant", "bytes / float32", "calibration (min)", "PSNR to full precision (dB)", "PSNR low", "PSNR high", "RMSE",
    "attribute accuracy",
]  # fmt: skip


def calibration_inputs(model: str, count: int, guidance_scale: float | None) -> dict[str, Any]:
    """Arguments of `calibrate` for a checkpoint: captions of the training split, classes in turn, or a number."""
    guided = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    if model == "avatars-sd":
        return {"prompts": list(dict.fromkeys(_avatars.captions("train")))[:count], **guided}
    if model == "fashion-dit":
        return {"prompts": [i % 10 for i in range(count)], **guided}
    return {"num_samples": count}


def settings_of(config: PTQConfig) -> dict[str, Any]:
    """What a config sets, as plain values."""
    return {k: v for k, v in config.to_dict().items() if k not in ("layers", "attentions", "quant_method")}


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
        pictures: how many.
        samples: to calibrate with.
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
        pictures: int = 64,
        samples: int = SAMPLES,
    ) -> None:
        named = {label for ours, theirs, _ in comparisons.values() for label in (ours, theirs)}
        unknown = sorted({*named, *accuracy, *costs} - set(variants))
        if unknown:
            raise ValueError(f"`comparisons`, `accuracy` or `costs` name {unknown}; variants are {list(variants)}.")
        self.model, self.steps, self.variants, self.comparisons = model, steps, dict(variants), dict(comparisons)
        self.minutes, self.guidance_scale, self.pictures, self.samples = minutes, guidance_scale, pictures, samples
        self.accuracy, self.costs = tuple(accuracy), tuple(costs)

    @property
    def claims(self) -> list[str]:
        names = [*self.comparisons, *(f"accuracy_{label}" for label in self.accuracy)]
        names += [f"calibration_minutes_{label}" for label in self.costs]
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
            }
        }

    @property
    def seeds(self) -> dict[str, Any]:
        return {f"{self.model}_pictures": list(range(self.pictures))}

    def measure(self, recorder: Recorder, selection: Selection | None) -> None:
        """Make the pictures and add claims and a table."""
        zoo = ZooModel(self.model)
        conditions, seeds = zoo.conditions(self.pictures), range(self.pictures)
        full = zoo.generate(zoo.pipe, conditions, seeds, self.steps, self.guidance_scale)
        accuracy = {"full": zoo.accuracy(full, conditions, seeds)}
        errors, minutes, rows = {}, {}, []
        before = _denoiser_bytes(zoo.denoiser(zoo.pipe))
        for label, config in tqdm(self.variants.items(), desc=self.model, unit="variant", leave=False):
            pipe, minutes[label] = self._calibrated(recorder, zoo, config)
            pictures = zoo.generate(pipe, conditions, seeds, self.steps, self.guidance_scale)
            errors[label] = rmse(pictures, full).numpy()
            accuracy[label] = zoo.accuracy(pictures, conditions, seeds)
            nearness = psnr(pictures, full).numpy()
            judged = accuracy[label]
            share = _denoiser_bytes(zoo.denoiser(pipe)) / before
            rows.append([label, share, minutes[label], float(nearness.mean()), *bootstrap_interval(nearness),
                         float(errors[label].mean()), None if judged is None else float(judged.mean())])  # fmt: skip
        judged = accuracy["full"]
        rows.insert(
            0, ["full precision", 1.0, None, None, None, None, None, None if judged is None else float(judged.mean())]
        )
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
                f"{self.model}: minutes of calibration of {label}, {self.samples} samples", minutes[label], "min",
            )  # fmt: skip

    def _calibrated(self, recorder: Recorder, zoo: ZooModel, config: PTQConfig) -> tuple[Any, float]:
        """A pipeline with the quantized denoiser, and how long that took."""
        pipe = copy.deepcopy(zoo.pipe)
        inputs = calibration_inputs(self.model, self.samples, self.guidance_scale)
        known = [settings_of(config), inputs, self.steps, weights(self.model), recorder.versions, recorder.source_hash]
        digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:16]
        folder = CACHE / f"ptq-{self.model}-{digest}"
        name = "unet" if hasattr(pipe, "unet") else "transformer"
        if (folder / "minutes.json").is_file():
            setattr(pipe, name, type(getattr(pipe, name)).from_pretrained(folder, dtype=torch.float32))
            return pipe, json.loads((folder / "minutes.json").read_text(encoding="utf-8"))
        began = time.perf_counter()
        calibrate(pipe, config, num_inference_steps=self.steps, batch_size=BATCH, seed=SEED, **inputs)
        minutes = (time.perf_counter() - began) / 60
        if config.backend == "native":
            getattr(pipe, name).save_pretrained(folder)
            (folder / "minutes.json").write_text(json.dumps(minutes), encoding="utf-8")
        return pipe, minutes

    def draw(self, title: str, stem: Path) -> list[Path]:
        """Nothing: the table says it."""
        return []


def _denoiser_bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


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
