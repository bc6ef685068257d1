"""Which backend of `PTQConfig` does what with which formats: found by trying, written as a table.

    python -m tests.quantization_table          # writes docs/quantization.md

`tests/test_quantization_table.py` tries again and compares. All packages of the extra `quant` must be installed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file
from torch import nn
from torch.autograd.profiler import profile
from tqdm.auto import tqdm

from diffusers_ext.quantization import PTQConfig, calibrate
from diffusers_ext.quantization.config import QUANT_METHOD

from .common import models

FILE = Path(__file__).parents[1] / "docs" / "quantization.md"
PACKAGES = {"quanto": "optimum-quanto", "torchao": "torchao", "bitsandbytes": "bitsandbytes"}
COLUMNS = ["linear layers", "convolutions", "bytes", "loads again", "computes in, on this CPU"]
CUDA = "on CUDA (documented by the package, not tried here)"
_FLOAT = {"weight_format": "float", "act_format": "float"}


@dataclass
class Row:
    """A backend with formats, and what its package says of CUDA."""

    backend: str
    bits: tuple[int, int | None]
    settings: dict[str, Any] = field(default_factory=dict)
    cuda: str = "float"

    @property
    def config(self) -> PTQConfig:
        weight_bits, act_bits = self.bits
        return PTQConfig(
            method="minmax", backend=self.backend, weight_bits=weight_bits, act_bits=act_bits, **self.settings
        )

    @property
    def name(self) -> str:
        config = self.config
        acts = "float" if config.act_bits is None else f"{config.act_format} {config.act_bits}"
        how = ' `arithmetic="int8"`' if config.arithmetic == "int8" else ""
        return f"{self.backend}, {config.weight_format} {config.weight_bits} / {acts}{how}"

    @property
    def is_here(self) -> bool:
        """Whether its package is installed."""
        module = PACKAGES.get(self.backend, "torch").partition("-")[0]
        return importlib.util.find_spec(module) is not None


_INTEGERS = "integers, compute capability 7.5"
ROWS = [
    Row("native", (8, 8), cuda="float, simulated"),
    Row("native", (8, 8), {"arithmetic": "int8"}, "integers, by `torch._int_mm`"),
    Row("native", (8, None)),
    Row("native", (4, 8), cuda="float, simulated"),
    Row("native", (4, None)),
    Row("native", (8, 8), _FLOAT, "float, simulated"),
    Row("native", (4, 8), _FLOAT, "float, simulated"),
    Row("quanto", (8, 8), cuda="integers, where sizes are multiples of 8"),
    Row("quanto", (8, None)),
    Row("quanto", (4, None), cuda="float; one kernel for it in half precision from 8.0"),
    Row("quanto", (2, None)),
    Row("quanto", (8, 8), _FLOAT, "float, simulated"),
    Row("quanto", (8, None), _FLOAT, "float; one kernel for it in float16 from 8.0"),
    Row("torchao", (8, 8), cuda="integers"),
    Row("torchao", (8, None)),
    Row("torchao", (8, None), _FLOAT),
    Row("bitsandbytes", (8, 8), cuda=_INTEGERS),
    Row("bitsandbytes", (4, None), {"weight_format": "nf"}, "float, compute capability 6.0"),
    Row("bitsandbytes", (4, None), _FLOAT, "float, compute capability 6.0"),
]
_HEAD = """\
# Where quantization works

`PTQConfig(backend=...)` names what quantizes: "native" is this package's own calibrated quantizer, the others are packages
behind the same settings, `pip install diffusers_ext[quant]`. What each does with which formats was found by trying, on a small
DiT in float32: calibrated, run, saved, loaded by stock `from_pretrained`, run again. Written by
`python -m tests.quantization_table`; a test tries it again.

- Formats: of weights / of activations, which are the inputs of layers. Besides those in the table, "native" takes integers of
  2 to 8 and 16 bits and floats of 4 and 8, and "quanto" either 8-bit format of activations with each of its weights.
  `PTQConfig` refuses all others.
- Activations: "native" and "quanto" calibrate their ranges; "torchao" and "bitsandbytes" find them anew in each call.
- Layers: "yes" is quantized, "float" is left as it was.
- Bytes: of the file, for the weights of the linear layers, as a share of float32. Rows here are of 128 and more inputs; each
  has a scale or more, so that wider layers are a little smaller.
- Loads again: with equal outputs, "with this package" after `import diffusers_ext`, "without it" by diffusers' own
  configuration. For the latter give `dtype`; without it, diffusers loads in bfloat16.
- Computes in: "integers" are products of 8-bit integers. "float, simulated" rounds to the same grids, and computes in float:
  the values are those of low precision, the time is not. "float" has weights that are small in memory alone.

Products of integers are fast on CUDA and on CPUs with AVX512-VNNI or AMX. On other CPUs torch has a plain loop for them, many
times slower than float32, which makes every row with "integers" slower there than full precision.

"""
_REFUSED = """
## What the packages refuse

On this CPU, and why it is so; nothing of this is a setting of `PTQConfig`.

"""
_TAIL = """
For weights of 4 and 2 bits on a CPU, optimum-quanto compiles a C++ extension when it first meets them, which takes minutes and
needs a compiler.

bitsandbytes writes a line to its log for each 8-bit layer in each call whose input is no float16;
`logging.getLogger("bitsandbytes.autograd._functions").setLevel("ERROR")` turns that off.
"""


def pipeline() -> DiTPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
            norm_num_groups=4,
        )  # fmt: skip
    return DiTPipeline(model.eval(), models.vae(), DDIMScheduler(clip_sample=False))


@torch.no_grad()
def predict(model: nn.Module) -> torch.Tensor:
    sample = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    return model(sample, timestep=torch.tensor([500, 500]), class_labels=torch.tensor([1, 2])).sample


def _kinds(model: nn.Module) -> dict[str, list[str]]:
    """Names of the linear and of the convolution layers of a float model."""
    kinds = {"linear layers": nn.Linear, "convolutions": nn.Conv2d}
    return {key: [n for n, m in model.named_modules() if isinstance(m, kind)] for key, kind in kinds.items()}


def _is_float(layer: Any) -> bool:
    return type(layer) in (nn.Linear, nn.Conv2d) and type(layer.weight) is nn.Parameter


def _share(folder: Path, model: nn.Module, names: list[str]) -> float:
    """Bytes of the file for the weights of these layers, of those in float32."""
    kept = load_file(folder / "diffusion_pytorch_model.safetensors")
    mine = [v for k, v in kept.items() if any(k.startswith(f"{n}.") for n in names) and not k.endswith(".bias")]
    whole = sum(model.get_submodule(name).weight.numel() * 4 for name in names)  # type: ignore[union-attr,operator]
    return sum(tensor.numel() * tensor.element_size() for tensor in mine) / whole


def _without_compiler() -> None:
    """For 4 and 2 bits on a CPU, quanto compiles a C++ extension, in minutes. It is a few lines in Python as well."""
    from optimum.quanto.library.extensions.cpp import ext

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])

    ext._lib = ext._lib or SimpleNamespace(unpack=unpack)


def attempt(row: Row) -> dict[str, str]:
    """The cells of a row."""
    if row.backend == "quanto" and row.bits[0] < 8:
        _without_compiler()
    bare = pipeline().transformer
    plain, kinds = predict(bare), _kinds(bare)
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=True)
    model = calibrate(pipe, row.config, prompts=[1, 2], num_inference_steps=2).transformer
    with profile() as ran:
        found = predict(model)
    if not found.isfinite().all() or not 0 < (found - plain).norm() < plain.norm():
        return dict.fromkeys(COLUMNS, "fails")
    cells = {}
    for kind, names in kinds.items():
        left = [name for name in names if _is_float(model.get_submodule(name))]
        cells[kind] = "yes" if not left else "float" if left == names else f"{len(names) - len(left)} of {len(names)}"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        cells["bytes"] = f"{_share(Path(folder), bare, kinds['linear layers']):.2f}"
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        ours = config["quantization_config"]["quant_method"] == QUANT_METHOD
        again = type(model).from_pretrained(folder, dtype=torch.float32)
        same = torch.allclose(predict(again), found, atol=1e-5)
    cells["loads again"] = ("with this package" if ours else "without it") if same else "no"
    integers = any("_int_mm" in event.name for event in ran.function_events)
    simulated = "float" if row.config.act_bits is None else "float, simulated"
    cells["computes in, on this CPU"] = "integers" if integers else simulated
    return cells


# --- what the packages refuse ----------------------------------------------------------------------------------------


def _by_torchao(layer: nn.Module, x: torch.Tensor, make: Callable[[Any], Any]) -> None:
    import torchao.quantization as torchao

    whole = nn.Sequential(layer)
    torchao.quantize_(whole, make(torchao), filter_fn=lambda module, name: module is layer)
    whole(x)


def _tiles(torchao: Any) -> Any:
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    return torchao.Int4WeightOnlyConfig(int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D)


def _by_four_axes() -> None:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=0.0).to("cpu").eval()
    layer(torch.zeros(1, 2, 3, 64))


def _by_diffusers() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pipeline().transformer.save_pretrained(folder)
        config = BitsAndBytesConfig(load_in_8bit=True)
        DiTTransformer2DModel.from_pretrained(folder, quantization_config=config)


def _linear() -> tuple[nn.Module, torch.Tensor]:
    return nn.Linear(128, 64), torch.zeros(2, 128)


REFUSED: dict[str, tuple[Callable[[], None], str]] = {
    "torchao, packed 4-bit weights": (
        lambda: _by_torchao(*_linear(), lambda t: t.Int4WeightOnlyConfig()),
        "with the package mslk",
    ),
    "torchao, 4-bit weights in tiles": (
        lambda: _by_torchao(nn.Linear(128, 64).bfloat16(), torch.zeros(2, 128).bfloat16(), _tiles),
        "compute capability 8.0, bfloat16",
    ),
    "torchao, float 8 / float 8": (
        lambda: _by_torchao(*_linear(), lambda t: t.Float8DynamicActivationFloat8WeightConfig()),
        "compute capability 8.9",
    ),
    "torchao, int 8 of a convolution": (
        lambda: _by_torchao(nn.Conv2d(4, 4, 3), torch.zeros(1, 4, 8, 8), lambda t: t.Int8WeightOnlyConfig()),
        "-",
    ),
    "bitsandbytes, int 8 with an input of four axes": (_by_four_axes, "-"),
    "diffusers' own `BitsAndBytesConfig`": (_by_diffusers, "compute capability 6.0, of 8 bits 7.5"),
}


def refusal(name: str) -> str:
    """How a package refuses: the error."""
    try:
        REFUSED[name][0]()
    except Exception as error:
        first = str(error).splitlines()[0].partition(": ")[0].replace("|", "/")
        return f"{type(error).__name__}: {first}"
    return "works"


# --- the page --------------------------------------------------------------------------------------------------------


def tried_with() -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("diffusers", *PACKAGES.values())]
    torch_version = importlib.metadata.version("torch").partition("+")[0]
    return f"Tried with torch {torch_version}, {', '.join(versions)}, on a CPU with {torch.backends.cpu.get_cpu_capability()}."


def text(rows: Mapping[str, Mapping[str, str]], refused: Mapping[str, str], tried: str) -> str:
    """The whole file."""
    lines = [["backend, weights / activations", *COLUMNS, CUDA]]
    lines += [[row.name, *(rows[row.name][column] for column in COLUMNS), row.cuda] for row in ROWS]
    other = [["what", "on this CPU", CUDA], *([name, refused[name], REFUSED[name][1]] for name in REFUSED)]
    return f"{_HEAD}{tried}\n\n{_table(lines)}{_REFUSED}{_table(other)}{_TAIL}"


def _table(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    if missing := [row.backend for row in ROWS if not row.is_here]:
        sys.exit(f"Not installed: {', '.join(sorted({PACKAGES[name] for name in missing}))}")
    cells = {row.name: attempt(row) for row in tqdm(ROWS, desc="Formats", unit="row", file=sys.stderr)}
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(text(cells, {name: refusal(name) for name in REFUSED}, tried_with()), encoding="utf-8")
