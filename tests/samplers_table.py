"""Which sampler works in which stock pipeline, with which predictions and grids: found by trying, written as a table.

    python -m tests.samplers_table          # writes docs/samplers.md

`tests/test_samplers_table.py` tries again and compares. Grids of beta quantiles need scipy, here as in diffusers.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.utils import is_scipy_available
from tqdm.auto import tqdm

from .common import arguments, models, scheduler, upstream
from .common.scheduler import FLOW, MEAN, STD
from .common.suite import Case

FILE = Path(__file__).parents[1] / "docs" / "samplers.md"
PIPELINES = {
    "Stable Diffusion": "avatars-sd",
    "DiT": "tiny-dit",
    "DDPM": "tiny-ddpm",
    "AnimateDiff": "tiny-animatediff",
    "SD 3": "tiny-sd3",
    "Flux": "tiny-flux",
}
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}
GRIDS = {"Karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}
STEPS = 20
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's
_HEAD = """\
# Samplers

What works where, found by trying: each sampler of this package, and those of diffusers that a paper here stands for, is
made with `from_config(pipe.scheduler.config)` and run. Written by `python -m tests.samplers_table`; a test tries it again.

- Pipelines: the stock class is of a process that the sampler is for, and a few steps give finite pictures.
  "image-to-image" is Stable Diffusion's, from the middle.
- Predictions and grids: {steps} steps with a perfect model of Gaussian data end with the right mean and deviation.
  "flow" is rectified flow, and "-" is what the class has no argument for. With many more steps
  a beta grid repeats timesteps, and diffusers' own fail.

"""


def cases() -> list[Case]:
    """Ours, then diffusers', each class once."""
    found = [*scheduler.SUITE.cases(), *upstream.SUITE.cases()]
    found = [case for case in found if case.cls is not None and issubclass(case.cls, SchedulerMixin)]
    found = [case for case in found if case.row.area == "samplers" and case.cls.__module__.partition(".")[0] != "tests"]
    return list({case.cls: case for case in found}.values())


def works(attempt: Callable[[], bool]) -> str:
    """ "yes" where the attempt succeeds, else "no": what a sampler does not support ends in an exception or in nonsense."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return "yes" if attempt() else "no"
        except Exception:
            return "no"


def in_pipeline(case: Case, name: str) -> bool:
    """A few steps in a stock pipeline."""
    stock = models.STOCKS[name]
    if stock.process not in scheduler.processes(case):
        return False  # finite, and pictures of nothing
    pipe = scheduler.put_into(case, stock, models.World(Path()).pipe(stock))
    return bool(stock.draw(pipe, 4).isfinite().all())


def in_the_middle(case: Case) -> bool:
    """Image-to-image."""
    from diffusers import StableDiffusionImg2ImgPipeline

    stock = models.STOCKS["avatars-sd"]
    if stock.process not in scheduler.processes(case):
        return False
    pipe = scheduler.put_into(case, stock, models.World(Path()).pipe(stock))
    late = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    image = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    return bool(models.draw(late, {**stock.call(4), "image": image, "strength": 0.5}).isfinite().all())


def on_gaussian(case: Case, **settings: Any) -> bool:
    """A run with a perfect model ends with the mean and deviation of its data."""
    schedule = SCHEDULE if arguments.arguments(case.cls).keys() >= SCHEDULE.keys() else {}
    made = scheduler.build(case, **schedule, **settings)
    process = "flow" if settings.get("use_flow_sigmas") or "shift" in arguments.arguments(case.cls) else "diffusion"
    result = scheduler.sample(made, process, STEPS, shape=(4, 3, 16, 16)).double()
    near = abs(float(result.mean()) - MEAN) < 0.3 * STD and abs(float(result.std()) - STD) < 0.3 * STD
    return bool(result.isfinite().all()) and near


def row(case: Case) -> dict[str, str]:
    """Column -> "yes", "no" or "-"."""
    names, processes = arguments.arguments(case.cls), scheduler.processes(case)
    cells = {label: works(lambda name=name: in_pipeline(case, name)) for label, name in PIPELINES.items()}
    cells["image-to-image"] = works(lambda: in_the_middle(case))
    for label, kind in PREDICTIONS.items():
        asked = {"prediction_type": kind} if "prediction_type" in names else {}
        fits = "diffusion" in processes and (asked or kind == "epsilon")
        cells[label] = works(lambda asked=asked: on_gaussian(case, **asked)) if fits else "-"
    flow: Mapping[str, Any] = FLOW if names.keys() >= FLOW.keys() else {}
    cells["flow"] = works(lambda: on_gaussian(case, **flow)) if "flow" in processes else "-"
    for label, name in GRIDS.items():
        base = {} if "diffusion" in processes else flow
        cells[label] = (
            works(lambda name=name, base=base: on_gaussian(case, **base, **{name: True})) if name in names else "-"
        )
    return cells


def text(rows: Mapping[str, Mapping[str, str]]) -> str:
    """The whole file."""
    columns = list(next(iter(rows.values())))
    lines = [["sampler", *columns], ["---"] * (len(columns) + 1)]
    lines += [[f"`{name}`", *cells.values()] for name, cells in rows.items()]
    return _HEAD.format(steps=STEPS) + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def table() -> dict[str, dict[str, str]]:
    """Name of the class -> its cells, by trying."""
    return {case.cls.__name__: row(case) for case in tqdm(cases(), desc="Samplers", unit="class", file=sys.stderr)}


if __name__ == "__main__":
    if not is_scipy_available():
        sys.exit("The column of beta grids needs scipy: pip install scipy")
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(text(table()), encoding="utf-8")
