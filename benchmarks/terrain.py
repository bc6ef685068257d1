"""Each method of quantization on a net that nobody here trained: the one-step terrain net of another package (`_terrain`).

    python -m benchmarks.terrain                             # measures; writes data/terrain.json, a page and a drawing
    python -m benchmarks.terrain --variant "W4A8 ptq4dm"     # measures one again, and keeps what the record has of others
    python -m benchmarks.terrain --weights FILE.onnx         # where the package is not installed
    python -m benchmarks.terrain --render                    # writes the page and the drawing from the record alone

Settings were fixed before measuring: 16 terrains to calibrate with, 200 iterations of rounding and 100 of scales a block, ten
epochs of each stage of QuEST. Formats of weights and activations: W8A8, W4A8 and W4A16 are integers and float activations,
FP8 is 8-bit floats, FP4 weights in 4-bit and activations in 8-bit floats. With one step there is one timestep: no spread of
steps to calibrate on, and tables and grids by timestep have one row. TFMQ-DM is then Q-Diffusion's rounding beside a table of the
time embedding, and QuEST its finetuning after that rounding; both are measured at W4A8 alone.

A quantized net is saved and loaded by the stock class before its terrains are made. The record is written after each variant, so
that a broken run goes on where `--variant` says. All of it takes about three and a half hours of one idle core; what is not learnt
takes half an hour of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import ConsistencyModelPipeline
from tqdm.auto import tqdm

from benchmarks import _plot, _terrain
from benchmarks._quantized import settings_of
from benchmarks._record import machine, versions
from diffusers_ext.cards import table
from diffusers_ext.metrics import bootstrap_interval, bytes_on_disk, psnr
from diffusers_ext.quantization import PTQConfig, calibrate
from diffusers_ext.quantization.layers import is_quantizable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = Path(__file__).parent / "data" / "terrain.json", Path("docs") / "terrain.md"
DRAWING = PAGE.with_suffix(".png")
TERRAINS, BATCH = 64, 8
OTHER, CALIBRATION = 1_000, 10_000  # first seeds of other terrains of the same difficulties, and of the calibration set
SAMPLES = 16  # of calibration
SIGMAS = (80.0, 20.0, 5.0, 1.0, 0.3, 0.05, 0.01)  # noise levels at which the net is compared with the ONNX file
TOLERANCE = 1e-3  # of that comparison
ROUNDING, SCALES, EPOCHS = (
    {"rounding_iterations": 200},
    {"scale_iterations": 100},
    {"time_epochs": 10, "layer_epochs": 10},
)
FLOAT = {"weight_format": "float", "act_format": "float"}
METHODS = ("minmax", "ptq4dm", "q_diffusion", "fp_quant_diffusion", "tfmq_dm", "quest")
BASELINE = "minmax"


def _variants() -> dict[str, PTQConfig]:
    """Label, its format and its method -> settings; what is learnt comes last."""
    found = {}
    integers = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A16": (4, None)}
    for method, learning in (("minmax", {}), ("ptq4dm", {}), ("q_diffusion", ROUNDING | SCALES)):
        for name, (weight_bits, act_bits) in integers.items():
            found[f"{name} {method}"] = PTQConfig(method=method, weight_bits=weight_bits, act_bits=act_bits, **learning)
    for name, bits in {"FP8": 8, "FP4": 4}.items():
        found[f"{name} minmax"] = PTQConfig(method="minmax", weight_bits=bits, act_bits=8, **FLOAT)
        learning = {"rounding": "nearest"} if bits == 8 else ROUNDING
        found[f"{name} fp_quant_diffusion"] = PTQConfig(method="fp_quant_diffusion", weight_bits=bits, **learning)
    found["W4A8 tfmq_dm"] = PTQConfig(method="tfmq_dm", weight_bits=4, **ROUNDING)
    found["W4A8 quest"] = PTQConfig(method="quest", weight_bits=4, **ROUNDING, **EPOCHS)
    return dict(sorted(found.items(), key=lambda item: item[1].rounding == "adaround"))


VARIANTS = _variants()
FORMATS = tuple(dict.fromkeys(label.partition(" ")[0] for label in VARIANTS))


# --- measuring -------------------------------------------------------------------------------------------------------


def evenly(count: int) -> list[int]:
    """Classes of `count` terrains, of difficulties from the least to the greatest."""
    return np.linspace(0, _terrain.DIFFICULTIES - 1, count).round().astype(int).tolist()


def generate(pipe: ConsistencyModelPipeline, seeds: Sequence[int], labels: Sequence[int]) -> np.ndarray:
    """Pictures `(n, height, width, 1)` in [0, 1], each from a seed of its own."""
    found = []
    for start in tqdm(range(0, len(seeds), BATCH), desc="Terrains", unit="batch", delay=2.0, leave=False):
        some, classes = seeds[start : start + BATCH], list(labels[start : start + BATCH])
        generators = [torch.Generator().manual_seed(seed) for seed in some]
        made = pipe(len(some), class_labels=classes, generator=generators, output_type="np")
        found.append(made.images)
    return np.concatenate(found)


@torch.no_grad()
def onnx_differences(pipe: ConsistencyModelPipeline, file: Path, sigmas: Sequence[float] = SIGMAS) -> dict[str, float]:
    """Noise level -> largest difference of denoised samples in [-1, 1] to those of the ONNX file, of one random input each."""
    found, net, scheduler = {}, _terrain.OnnxNet(file), pipe.scheduler
    for seed, sigma in enumerate(sigmas):
        generator = torch.Generator().manual_seed(seed)
        label = torch.randint(_terrain.DIFFICULTIES, (1,), generator=generator)
        size = pipe.unet.config.sample_size
        noisy = torch.rand(1, 1, 1, 1, generator=generator) - 0.5
        noisy = noisy + sigma * torch.randn(1, 1, size, size, generator=generator)
        level = torch.tensor(sigma)
        scaled = noisy / (level**2 + scheduler.config.sigma_data**2) ** 0.5
        output = pipe.unet(scaled, torch.tensor(scheduler.sigma_to_t(sigma)), class_labels=label).sample
        keep, take = scheduler.get_scalings_for_boundary_condition(level)
        ours = (take * output + keep * noisy).clamp(-1, 1)
        found[f"{sigma:g}"] = float((ours - net(noisy, sigma, label)).abs().max())
    return found


def difference(made: np.ndarray, full: np.ndarray) -> dict[str, list[float]]:
    """PSNR of pictures in dB, and root mean square error of heights, each a number a terrain."""
    apart = _terrain.heights(made) - _terrain.heights(full)
    nearness = psnr(made, full).tolist()
    return {
        "psnr": [round(value, 4) for value in nearness],
        "height_rmse": [float(f"{value:.5g}") for value in np.sqrt((apart**2).mean(axis=(1, 2)))],
    }


def quantized(
    pipe: ConsistencyModelPipeline, config: PTQConfig, labels: Sequence[int], folder: Path
) -> ConsistencyModelPipeline:
    """The pipeline with its net quantized, saved to `folder` and loaded from there. `pipe` stays as it is."""
    small = copy.deepcopy(pipe)
    # One terrain a run, since the pipeline wants a batch size beside its classes.
    calibrate(small, config, prompts=labels, num_inference_steps=1, batch_size=1, seed=CALIBRATION, output_type="np")
    small.unet.save_pretrained(folder)
    small.unet = type(pipe.unet).from_pretrained(folder, dtype=torch.float32)
    return small


def measure(
    pipe: ConsistencyModelPipeline, full: np.ndarray, config: PTQConfig, samples: int = SAMPLES
) -> dict[str, Any]:
    """One variant: bytes on disk, cost of the calibration, and how far its terrains are from `full`, of seeds from 0 on."""
    with tempfile.TemporaryDirectory() as folder:
        small = quantized(pipe, config, evenly(samples), Path(folder))
        size = bytes_on_disk(folder)[""]
    cost = small.unet.config.quantization_config.calibration
    count = len(full)
    made = generate(small, range(count), evenly(count))
    return {
        "settings": {name: value for name, value in settings_of(config).items() if value not in ([], {})},
        "bytes": size, "minutes": cost["minutes"], "peak_bytes": cost["peak_bytes"], **difference(made, full),
    }  # fmt: skip


@torch.no_grad()
def outliers(pipe: ConsistencyModelPipeline, count: int = 5) -> dict[str, list[float]]:
    """Layer -> largest magnitude and standard deviation of what it gets, where the first is the most times the second."""
    found: dict[str, list[float]] = {}

    def see(name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple) -> None:
            found[name] = [float(f"{value:.3g}") for value in (args[0].abs().max(), args[0].std())]

        return hook

    layers = {name: layer for name, layer in pipe.unet.named_modules() if is_quantizable(layer)}
    handles = [layer.register_forward_pre_hook(see(name)) for name, layer in layers.items()]
    try:
        generate(pipe, range(BATCH), evenly(BATCH))
    finally:
        for handle in handles:
            handle.remove()
    return dict(sorted(found.items(), key=lambda item: item[1][1] / item[1][0])[:count])


def measure_full(pipe: ConsistencyModelPipeline, full: np.ndarray) -> dict[str, Any]:
    """What full precision takes, its outliers, and how far its terrains of other seeds are: as far as chance is."""
    with tempfile.TemporaryDirectory() as folder:
        pipe.unet.save_pretrained(folder)
        size = bytes_on_disk(folder)[""]
    count = len(full)
    others = generate(pipe, range(OTHER, OTHER + count), evenly(count))
    return {"bytes": size, "outliers": outliers(pipe), **difference(others, full)}


def about(file_differences: Mapping[str, float]) -> dict[str, Any]:
    """What all variants of a record share."""
    return {
        "machine": machine(),
        "versions": versions(("onnx", "onnxruntime")),
        "weights": {
            "package": _terrain.PACKAGE, "version": _terrain.VERSION, "licence": _terrain.LICENSE,
            "sha256": _terrain.SHA256,
        },
        "onnx_differences": dict(file_differences),
        "seeds": {
            "terrains": [0, TERRAINS - 1], "others": [OTHER, OTHER + TERRAINS - 1],
            "calibration": [CALIBRATION, CALIBRATION + SAMPLES - 1],
        },
    }  # fmt: skip


def write(record: Mapping[str, Any], file: Path) -> None:
    """As JSON, a line for each entry and each variant."""
    head = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in record.items() if name != "variants"]
    rows = [f"  {json.dumps(label)}: {json.dumps(row)}" for label, row in record["variants"].items()]
    variants = '"variants": {\n' + ",\n".join(rows) + "\n }" if rows else '"variants": {}'
    file.write_text("{\n " + ",\n ".join([*head, variants]) + "\n}\n", encoding="utf-8")


# --- the page --------------------------------------------------------------------------------------------------------


def page(record: Mapping[str, Any]) -> str:
    """The record as markdown."""
    where, weights, apart = record["machine"], record["weights"], record["onnx_differences"]
    made = [f"{first} to {last}" for first, last in record["seeds"].values()]
    high, *_, low = apart
    return "\n\n".join([
        "# Quantization of a net from elsewhere",
        f"Written by `python -m benchmarks.terrain`. The net is that of the package `{weights['package']}` "
        f"{weights['version']} ({weights['licence']} licence), a one-step consistency model of terrains: 10.5 M parameters, "
        "128x128 heights, a difficulty from 1 to 100. Nobody here trained it or chose it for quantization. It is a stock "
        "`UNet2DModel` in a stock `ConsistencyModelPipeline`, with the weights of the package's ONNX file:",
        f"```sh\n{_terrain.INSTALL}\npython -m benchmarks.terrain\n```",
        f"On random inputs at {len(apart)} noise levels from {low} to {high} its denoised samples in "
        f"[-1, 1] differ from those of the ONNX file by at most {max(apart.values()):.1e}.",
        f"Recorded on {where['cpu']}, {where['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        + f". Seeds: terrains {made[0]}, terrains of other seeds {made[1]}, calibration {made[2]}.",
        *_missing(record),
        *_measured(record),
    ]) + "\n"  # fmt: skip


def _missing(record: Mapping[str, Any]) -> list[str]:
    names = [f"`{label}`" for label in VARIANTS if label not in record["variants"]]
    return [f"**Not measured yet**: {', '.join(names)}."] if names else []


def _measured(record: Mapping[str, Any]) -> list[str]:
    """The table and the drawing, where anything was measured."""
    if not record["variants"]:
        return []
    full = record["full"]
    return [
        "PSNR is that of the normalised terrain, a picture in [0, 1], to full precision's of the same seed and difficulty, mean "
        f"over {len(full['psnr'])} terrains with a 95 % bootstrap interval. `over minmax` is the difference to plain ranges in the "
        "same format, paired by terrains. Heights are above the lowest point of a terrain, in the package's unit, up to "
        "22.2. All arithmetic is simulated in float. Bytes are those on disk, where norms, biases and the class embedding stay "
        "in float32.",
        _table(record),
        f"![PSNR to full precision by format and method]({DRAWING.name})",
        "Gray is the PSNR between terrains of full precision that have the difficulty in common but not the seed. With one step there "
        "is one timestep: PTQ4DM's and Q-Diffusion's choices of steps have nothing to choose, TFMQ-DM's table has one row, and "
        "QuEST's grids by timestep are plain ones.",
        "## Why it is hard",
        "Some layers get values far beyond most others, for which a grid that spans them all has few steps left. Of full precision, "
        f"where the largest is the most times the standard deviation, over {BATCH} terrains:",
        table(
            ["input of", "largest", "standard deviation"],
            [[f"`{name}`", *row] for name, row in full["outliers"].items()],
        ),
    ]


def _table(record: Mapping[str, Any]) -> str:
    full, lines = record["full"], []
    for label, row in ordered(record).items():
        form, method = label.split(" ")
        gain = ""
        baseline = record["variants"].get(f"{form} {BASELINE}")
        if baseline is not None and method != BASELINE:
            gain = _with_interval(np.subtract(row["psnr"], baseline["psnr"]), "+.2f")
        lines.append([
            form, method, f"{row['bytes'] / full['bytes']:.3f}", _with_interval(row["psnr"], ".2f"), gain,
            f"{np.mean(row['height_rmse']):.4f}", f"{row['minutes']:.1f}", f"{row['peak_bytes'] / 2**20:.0f}",
        ])  # fmt: skip
    lines.append([
        "float32", "another seed", "1", _with_interval(full["psnr"], ".2f"), "", f"{np.mean(full['height_rmse']):.4f}", "", "",
    ])  # fmt: skip
    head = ["format", "method", "bytes / float32", "PSNR (dB)", f"over {BASELINE} (dB)", "RMSE of heights",
            "calibration (min)", "calibration (MiB)"]  # fmt: skip
    return table(head, lines)


def _with_interval(values: Sequence[float] | np.ndarray, form: str) -> str:
    low, high = bootstrap_interval(values, np.mean)
    return f"{np.mean(values):{form}} ({low:{form}} to {high:{form}})"


def ordered(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Variants by format, then by method."""
    labels = [f"{form} {method}" for form in FORMATS for method in METHODS]
    return {label: record["variants"][label] for label in labels if label in record["variants"]}


def draw(record: Mapping[str, Any]) -> Figure:
    """PSNR by format, a mark for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes, rows = figure.subplots(), ordered(record)
    figure.suptitle("Terrain net: PSNR to full precision by format and method")
    for form_place, form in enumerate(FORMATS):
        present = [method for method in METHODS if f"{form} {method}" in rows]
        for i, method in enumerate(present):
            values = rows[f"{form} {method}"]["psnr"]
            mean, ends = float(np.mean(values)), bootstrap_interval(values, np.mean)
            number = METHODS.index(method)
            axes.errorbar(
                form_place + 0.13 * (i - (len(present) - 1) / 2), mean, yerr=[[mean - ends[0]], [ends[1] - mean]],
                color=f"C{number}", marker="osD^vP"[number], markersize=7, capsize=4, linestyle="none", label=method,
            )  # fmt: skip
    axes.axhline(float(np.mean(record["full"]["psnr"])), color="gray", linestyle="--", label="float32, another seed")
    axes.set_xticks(range(len(FORMATS)), FORMATS)
    axes.set(ylabel="PSNR to full precision (dB)", xlim=(-0.6, len(FORMATS) - 0.4))
    axes.grid(alpha=0.3, axis="y")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # a label stands for all its marks
    figure.legend(handles.values(), handles, fontsize=8, loc="outside right upper")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Run as a program.

    Args:
        argv: without the program's name; None takes them from the command line.
    """
    parser = argparse.ArgumentParser(prog="benchmarks.terrain", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--variant", action="append", choices=VARIANTS, help="What to measure; all variants unless given."
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="ONNX file; that of the installed package unless given."
    )
    parser.add_argument("--render", action="store_true", help="Measure nothing.")
    parser.add_argument("--threads", type=int, default=2, help="Of torch.")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if not args.render:
        _measure_all(_terrain.weights_file(args.weights), args.variant or list(VARIANTS))
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    (ROOT / PAGE).write_text(page(record), encoding="utf-8")
    if record["variants"]:
        _plot.save(draw(record), ROOT / DRAWING)
    print(page(record))


def _measure_all(file: Path, labels: Sequence[str]) -> None:
    """Measure variants one after the other; the record is whole after each.

    Raises:
        ValueError: the net is not that of the file.
    """
    pipe = _terrain.pipeline(file)
    apart = onnx_differences(pipe, file)
    if max(apart.values()) > TOLERANCE:
        raise ValueError(
            f"The net differs from the ONNX file by up to {max(apart.values()):.1e}, at noise levels {apart}."
        )
    shared = json.loads(json.dumps(about(apart)))
    old = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    same = {name: old.get(name) for name in shared if name != "onnx_differences"} == {
        name: value for name, value in shared.items() if name != "onnx_differences"
    }
    variants = dict(old["variants"]) if same else {}
    full = generate(pipe, range(TERRAINS), evenly(TERRAINS))
    record = {**shared, "full": measure_full(pipe, full), "variants": variants}
    for label in tqdm(labels, desc="Variants", unit="variant"):
        variants[label] = measure(pipe, full, VARIANTS[label])
        write(record, RECORD)


if __name__ == "__main__":
    main()
