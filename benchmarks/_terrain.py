"""The terrain net of the package `adaptive-terrain-diffusion`, as a stock pipeline of diffusers: one that nobody here trained.

    pip install --no-deps adaptive-terrain-diffusion==0.4.2      # 39 MB; its dependency onnxruntime-gpu is not needed
    pip install onnx onnxruntime                                 # the first reads the file, the second runs it

    pipe = pipeline(weights_file())                              # a ConsistencyModelPipeline
    pictures = pipe(batch_size=2, class_labels=[0, 99], output_type="np").images
    heights(pictures)                                            # the easiest and the hardest terrain

The file is the ONNX graph of a one-step consistency model (MIT licence): the U-Net of Dhariwal and Nichol 2021 (scale-shift
norms, residual blocks that resample, attention at 32, 16 and 8 pixels) inside the parametrisation of Song et al. 2023 with
the sigma_data 0.5 of Karras et al. 2022. diffusers has both: `UNet2DModel` is the net, `CMStochasticIterativeScheduler` what
is around it. One thing differs: the graph takes the difficulty as a number in 0 to 1 through two linear layers, which no class
of diffusers has beside attention without text. The package allows whole difficulties from 1 to 100, so what the two layers
give for these is the table of the net's class embedding: class d is difficulty d + 1.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
from torch.nn import functional as F

PACKAGE, VERSION, LICENSE = "adaptive-terrain-diffusion", "0.4.2", "MIT"
SHA256 = "95be54b4a39d58320e187a7ec533351c957f16a00be58773c86074828ee67887"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION} && pip install onnx onnxruntime"
DIFFICULTIES = 100
_FILE = "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"
_HEIGHT_RANGE, _ASINH_SCALE = 22.16864013671875, 0.1  # of the package's `TerrainGenerator`
_LAYERS = 4  # residual blocks a level
CONFIG: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 32, 64, 96, 128),
    "layers_per_block": _LAYERS,
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2 + ("AttnDownBlock2D",) * 3,
    "up_block_types": ("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 2,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 32,
    "attn_norm_num_groups": 32,
    "num_class_embeds": DIFFICULTIES,
}
_LEVELS = len(CONFIG["block_out_channels"])
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_NORM_OF = {"in_layers.2": "in_layers.0", "out_layers.3": "out_layers.0", "qkv": "norm", "out.2": "out.0"}


def weights_file(given: Path | None = None) -> Path:
    """The ONNX file: `given`, or that of the installed package.

    Raises:
        ImportError: nothing is given, and the package is missing or of another version.
        ValueError: it is not the file that this was written for.
    """
    file = _installed() if given is None else given
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"`weights` is {file} with SHA-256 {digest}; it must be {SHA256}, of {PACKAGE} {VERSION}.")
    return file


def _installed() -> Path:
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"The terrain net is in the package {PACKAGE}, which is missing: {INSTALL}") from error
    if package.version != VERSION:
        raise ImportError(f"{PACKAGE} is of version {package.version}; {VERSION} is needed: {INSTALL}")
    return Path(str(package.locate_file(_FILE)))


def pipeline(file: Path) -> ConsistencyModelPipeline:
    """The stock pipeline with the file's weights, without a progress bar. `num_inference_steps=1`, its default, is meant."""
    unet = UNet2DModel(**CONFIG)
    unet.load_state_dict(state_dict(tensors(file)), strict=True)
    pipe = ConsistencyModelPipeline(unet.eval().requires_grad_(False), CMStochasticIterativeScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def heights(pictures: np.ndarray) -> np.ndarray:
    """Heights above the lowest point, as the package gives them, of a pipeline's pictures `(n, 128, 128, 1)` in [0, 1]."""
    found = _ASINH_SCALE * np.sinh(np.asarray(pictures)[..., 0] * np.arcsinh(_HEIGHT_RANGE / _ASINH_SCALE))
    return found - found.min(axis=(1, 2), keepdims=True)


class OnnxNet:
    """The file itself, run by onnxruntime on one thread.

    Raises:
        ImportError: onnxruntime is not installed.
    """

    def __init__(self, file: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def __call__(self, noisy: torch.Tensor, sigma: float, labels: torch.Tensor) -> torch.Tensor:
        """Denoised samples in [-1, 1] of noisy ones `(n, 1, 128, 128)` at noise level `sigma`, of classes `labels`."""
        count = len(noisy)
        feeds = {
            "noisy": noisy.numpy(),
            "sigma": np.full(count, sigma, dtype=np.float32),
            "difficulty": difficulty(labels).numpy(),
        }
        return torch.from_numpy(self.session.run(["denoised"], feeds)[0])


def difficulty(labels: torch.Tensor) -> torch.Tensor:
    """What the graph takes for classes."""
    return (labels.double() / (DIFFICULTIES - 1)).float()


# --- from the graph's names to those of diffusers --------------------------------------------------------------------


def tensors(file: Path) -> dict[str, torch.Tensor]:
    """Weights by their names in the net that the graph was made from.

    The export gave the weights of norms no names, since it spread them over `(channels, 1, 1)`: a norm is a product and a
    sum behind an instance normalization, and belongs to the next layer of those that have one before them.

    Raises:
        ImportError: the package onnx is not installed.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(file)).graph
    stored = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    found = {name.removeprefix("network."): value for name, value in stored.items() if name.startswith("network.")}
    norm: list[torch.Tensor] = []
    for node in graph.node:
        if node.op_type == "InstanceNormalization":
            norm = []
        elif node.op_type in ("Mul", "Add") and len(norm) < 2:
            norm += [stored[name].flatten() for name in node.input if name in stored and stored[name].ndim == 3]
        elif node.op_type == "Conv":
            layer = node.input[1].removeprefix("network.").removesuffix(".weight")
            for end, norm_end in _NORM_OF.items():
                if layer.endswith(end):
                    name = layer.removesuffix(end) + norm_end
                    found[f"{name}.weight"], found[f"{name}.bias"] = norm
    return found


def state_dict(source: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `tensors` gives, as a `UNet2DModel` of `CONFIG` has it."""
    found = {}
    for name, theirs in names().items():
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in source:
                found[f"{name}.{kind}"] = source[f"{theirs}.{kind}"]
    for name, theirs in attention_names().items():
        for kind in ("weight", "bias"):
            parts = source[f"{theirs}.qkv.{kind}"].flatten(1) if kind == "weight" else source[f"{theirs}.qkv.{kind}"]
            for part, value in zip(("to_q", "to_k", "to_v"), parts.chunk(3), strict=True):
                found[f"{name}.{part}.{kind}"] = value
            found[f"{name}.to_out.0.{kind}"] = source[f"{theirs}.proj_out.{kind}"].squeeze()
            found[f"{name}.group_norm.{kind}"] = source[f"{theirs}.norm.{kind}"]
    each = difficulty(torch.arange(DIFFICULTIES))[:, None]
    inner = F.silu(F.linear(each, source["label_emb.0.weight"], source["label_emb.0.bias"]))
    found["class_embedding.weight"] = F.linear(inner, source["label_emb.2.weight"], source["label_emb.2.bias"])
    return found


def names() -> dict[str, str]:
    """Name in diffusers -> in the graph, of all layers but those of attention. Not every block has a `conv_shortcut`."""
    found = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for name, theirs in _blocks()[0].items():
        found |= {f"{name}.{ours}": f"{theirs}.{part}" for ours, part in _RESNET.items()}
    return found


def attention_names() -> dict[str, str]:
    """As `names`, of the attention modules."""
    return _blocks()[1]


def _blocks() -> tuple[dict[str, str], dict[str, str]]:
    """Names of residual blocks and of attention modules. The graph counts blocks through all levels."""
    resnets = {f"mid_block.resnets.{i}": f"middle_block.{2 * i}" for i in range(2)}
    attentions = {"mid_block.attentions.0": "middle_block.1"}
    for level, (down, up) in enumerate(zip(CONFIG["down_block_types"], CONFIG["up_block_types"], strict=True)):
        first = 1 + level * (_LAYERS + 1)
        for i in range(_LAYERS):
            resnets[f"down_blocks.{level}.resnets.{i}"] = f"input_blocks.{first + i}.0"
            if down.startswith("Attn"):
                attentions[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{first + i}.1"
        for i in range(_LAYERS + 1):
            block = f"output_blocks.{level * (_LAYERS + 1) + i}"
            resnets[f"up_blocks.{level}.resnets.{i}"] = f"{block}.0"
            if up.startswith("Attn"):
                attentions[f"up_blocks.{level}.attentions.{i}"] = f"{block}.1"
        if level < _LEVELS - 1:
            resnets[f"down_blocks.{level}.downsamplers.0"] = f"input_blocks.{first + _LAYERS}.0"
            resnets[f"up_blocks.{level}.upsamplers.0"] = f"{block}.{2 if up.startswith('Attn') else 1}"
    return resnets, attentions
