"""What a learned table of cached parts is worth: against fewer steps, and against other tables of equal cost.

    diffusers-ext bench harmonica            # records diffusers_ext/results/harmonica.json
    diffusers-ext bench harmonica --quick    # a few of the pictures, compared with the record

The routers are those of `benchmarks._cache_routers`, trained on classes and captions of the training split and on other noise
than that of the pictures here. Their price was fixed before measuring. Other tables: every module at evenly spread steps, as
many as cost about the same, and each module at random steps, as many of them as the router takes. 32 pictures.

The table of a router follows from its threshold: beside that of the training, a higher one, which runs less, is compared with
the caches of other people. Their runs are shared with the benchmarks of the other caches: where they are not on disk yet,
making them takes about 8 minutes a model more.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import OUTPUT, Benchmark
from benchmarks._cache_routers import STEPS, TRAININGS, folder_of, table_of
from benchmarks._frontier import Frontier
from benchmarks._quality import RMSE_TOLERANCE, QualityCost, Variant, denoiser_cost
from benchmarks._record import Recorder, Samples
from benchmarks._zoo import ZooModel
from diffusers_ext.hooks.harmonica import new_router
from diffusers_ext.metrics import rmse

PICTURES, RANDOM = 32, (0, 1, 2)  # seeds of random tables
MODELS = {"dit": ("fashion-dit", 2), "flow": ("avatars-flow", 4)}  # with minutes
THRESHOLD, HIGHER_THRESHOLD = 0.1, 0.5


def _tables() -> dict[str, Any]:
    """What the routers say, for the record."""
    found = {name: table_of(name) for name in TRAININGS}
    return {
        name: None if table is None else ["".join(map(str, row)) for row in table.int().tolist()]
        for name, table in found.items()
    }


BENCHMARK = Benchmark(
    "harmonica",
    settings={
        "trainings": {name: training.arguments() for name, training in TRAININGS.items()},
        "tables": _tables(),
        "random": list(RANDOM),
    },
    peers=["cache-dit"],
)


def routed(model: str, threshold: float = THRESHOLD) -> Variant:
    """The router of a checkpoint."""

    def put(pipe: Any) -> Any:
        return dx.enable(pipe, dx.HarmonicaConfig(str(folder_of(model)), threshold))

    return Variant(f"threshold {threshold:g}", prepare=put)


def uniform(table: torch.Tensor) -> torch.Tensor:
    """All modules at evenly spread steps, as many as come nearest to the number of modules that run in `table`."""
    steps = len(table)
    full = max(1, round(table.float().mean().item() * steps))
    made = torch.zeros_like(table)
    made[[i * steps // full for i in range(full)]] = True
    return made


def shuffled(table: torch.Tensor, seed: int) -> torch.Tensor:
    """Each module at other steps, as many as in `table`; the first step stays full."""
    generator = torch.Generator().manual_seed(seed)
    columns = [column[torch.randperm(len(column), generator=generator)] for column in table[1:].T]
    return torch.cat([table[:1], torch.stack(columns, dim=1)])


for _name, (_model, _minutes) in MODELS.items():
    _scale = TRAININGS[_model].guidance_scale
    BENCHMARK.add(
        QualityCost(
            _model,
            steps=STEPS,
            guidance_scale=_scale,
            variants={"router": routed(_model)},
            minutes=_minutes,
            pictures=PICTURES,
            name=_name,
        )
    )
    _thresholds = {f"t{value:g}": routed(_model, value) for value in (THRESHOLD, HIGHER_THRESHOLD)}
    BENCHMARK.add(Frontier(_model, STEPS, _thresholds, guidance_scale=_scale, minutes=2))


def over_other_tables(recorder: Recorder, name: str, model: str) -> None:
    """Distance to the full run by the learned table less that by another one."""
    table = table_of(model)
    if table is None:
        folder_of(model)  # which says how to make it
        return
    zoo = ZooModel(model)
    scale, conditions = TRAININGS[model].guidance_scale, zoo.conditions(PICTURES)

    def draw(count: int = PICTURES) -> np.ndarray:
        return zoo.generate(zoo.pipe, conditions[:count], range(count), STEPS, scale)

    def made(kind: str, table: torch.Tensor) -> tuple[list[float], float]:
        router = new_router(zoo.pipe.transformer, STEPS)
        with torch.no_grad():
            router.logits.copy_(torch.where(table, 5.0, -5.0))
        folder = OUTPUT / "harmonica" / f"{model}-{kind}".replace(" ", "-")
        router.save_pretrained(folder)
        with dx.enabled(zoo.pipe, dx.HarmonicaConfig(str(folder))):
            cost = denoiser_cost(zoo.pipe.transformer, lambda: draw(1))
            return rmse(draw(), full).tolist(), cost.macs

    full = draw()
    tables = {
        "learned": table,
        "uniform": uniform(table),
        **{f"random {seed}": shuffled(table, seed) for seed in RANDOM},
    }
    found = {kind: made(kind, each) for kind, each in tqdm(tables.items(), desc=f"tables, {model}")}
    ours, macs = found["learned"]
    random = np.mean([found[f"random {seed}"][0] for seed in RANDOM], axis=0).tolist()
    for kind, errors, cost in (
        ("uniform", found["uniform"][0], found["uniform"][1]),
        ("random", random, found["random 0"][1]),
    ):
        recorder.paired(
            f"{name}_over_{kind}",
            f"RMSE to the full run less that of {kind} steps for each module at equal cost, {model}",
            Samples(
                "difference", {"ours": ours, "theirs": errors}, RMSE_TOLERANCE, True, {"ours": macs, "theirs": cost}
            ),
            "",
            ("<=", 0.0),
        )
    rows = [[kind, macs / 1e9, float(np.mean(errors))] for kind, (errors, macs) in found.items()]
    recorder.table(f"{name}: tables", ["table", "GMACs a picture", "mean RMSE"], rows)


for _name, (_model, _minutes) in MODELS.items():
    BENCHMARK.part(*(f"{_name}_over_{kind}" for kind in ("uniform", "random")), minutes=_minutes)(
        functools.partial(over_other_tables, name=_name, model=_model)
    )


if __name__ == "__main__":
    BENCHMARK.main()
