"""Collects what a benchmark measures, with all that is needed to measure it again, and records it.

    recorder = Recorder("deepcache", settings={"steps": 20}, seeds={"pictures": list(range(64))}, peers=["tomesd"])
    recorder.claim("time", "2.3 times faster", 0.52, "x", interval=(0.50, 0.54), goal=("<=", 0.6))
    recorder.paired("psnr", "nearer to the full run", Samples("psnr_gain", {"ours": a, "theirs": b}, 1e-5), "dB")
    recorder.table("by interval", ["interval", "time (s)"], [[1, 2.1], [3, 1.1]])
    recorder.write()

`benchmarks._bench.Benchmark` makes one and hands it to the parts of a benchmark.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import diffusers_ext
from diffusers_ext import proofs
from diffusers_ext.metrics import bootstrap_interval
from diffusers_ext.registry import get_method

if TYPE_CHECKING:
    from rich.console import Console

_PACKAGES = ("torch", "diffusers", "transformers")
# How the numbers of one unit become its share of the claim. `ours` and `theirs` are arrays `(n,)`.
_FORMULAS: dict[str, Callable[..., np.ndarray]] = {
    "psnr_gain": lambda ours, theirs: 20 * np.log10(theirs / ours),  # of root mean square errors to one reference
    "difference": lambda ours, theirs: ours - theirs,
    "value": lambda ours: ours,
}


@dataclass(frozen=True)
class Samples:
    """What a claim follows from: numbers of each unit, be it a picture, a text or a training seed.

    The claim is the mean over the units of a formula of a unit's numbers; its interval is a bootstrap over the units.
    Numbers are kept to 7 digits, and the claim is computed from what is kept, so that a reader finds the same.

    Args:
        formula: `psnr_gain` (columns `ours` and `theirs`, root mean square errors), `difference` (`ours` less
            `theirs`) or `value` (`ours`).
        columns: name -> one number a unit.
        tolerance: how far a number of a column may lie from the same one measured elsewhere.
        each: whether `tolerance` is about each number, or about the mean of a column. The mean is for numbers that
            jump, such as right or wrong.
        counts: what is the same wherever it is measured, such as multiply-accumulates.
        units: which units of the full run these are, in order; None for all of them.

    Raises:
        ValueError: the columns are not those of `formula`, of one length, finite, or make a claim that is not finite.
    """

    formula: str
    columns: Mapping[str, Sequence[float]]
    tolerance: float
    each: bool = True
    counts: Mapping[str, float] = field(default_factory=dict)
    units: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.formula not in _FORMULAS:
            raise ValueError(f"`formula` is {self.formula!r}; allowed are {', '.join(_FORMULAS)}.")
        wanted = list(inspect.signature(_FORMULAS[self.formula]).parameters)
        if set(self.columns) != set(wanted):
            raise ValueError(f"`columns` are {sorted(self.columns)}; {self.formula!r} is of {', '.join(wanted)}.")
        columns = {name: [float(f"{number:.7g}") for number in self.columns[name]] for name in wanted}
        object.__setattr__(self, "columns", columns)
        if len({len(column) for column in columns.values()}) != 1 or not columns["ours"]:
            raise ValueError(f"`columns` have {[len(column) for column in columns.values()]} numbers; they pair up.")
        with np.errstate(divide="ignore", invalid="ignore"):
            per_unit = self.per_unit()
        if not np.isfinite(per_unit).all():
            unit = int(np.argmin(np.isfinite(per_unit)))
            numbers = {name: column[unit] for name, column in columns.items()}
            raise ValueError(f"`columns` give {per_unit[unit]} for unit {unit}, {numbers}; a finite number is needed.")

    def per_unit(self) -> np.ndarray:
        """Share of each unit in the claim, `(n,)`."""
        return _FORMULAS[self.formula](**{name: np.asarray(column) for name, column in self.columns.items()})

    def claim(self) -> tuple[float, tuple[float, float]]:
        """Value and interval of the claim."""
        per_unit = self.per_unit()
        return float(per_unit.mean()), bootstrap_interval(per_unit, np.mean)

    def to_dict(self) -> dict[str, Any]:
        """As a result holds them. Tolerances are the benchmark's, not the result's."""
        counts = {"counts": dict(self.counts)} if self.counts else {}
        return {"formula": self.formula, **self.columns, **counts}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], units: Sequence[int] | None = None) -> Samples:
        """What a result holds, of all units or of some; numbers that are to be compared with, so without tolerance.

        Raises:
            ValueError: see the class.
            IndexError: it holds no such unit.
        """
        columns = {
            name: value if units is None else [value[unit] for unit in units]
            for name, value in content.items()
            if name not in ("formula", "counts")
        }
        return cls(content["formula"], columns, 0.0, counts=content.get("counts", {}), units=units)


class Recorder:
    """The result of one run of a benchmark.

    Make it before measuring: it notes the sources then, and refuses to record numbers of sources that changed since.

    Args:
        key: the method measured.
        settings: all that the numbers depend on besides the seeds, as plain values: model, steps, guidance, batch size.
        seeds: name -> seed or seeds.
        peers: names of the installed packages that the method is compared with; their versions are recorded.

    Raises:
        ValueError: there is no method `key`, it has no module of ours to measure, or `settings` or `seeds` hold what
            JSON cannot.
        importlib.metadata.PackageNotFoundError: a peer is not installed.
    """

    def __init__(
        self, key: str, settings: Mapping[str, Any], seeds: Mapping[str, Any], peers: Sequence[str] = ()
    ) -> None:
        self.row = get_method(key)
        if self.row.module is None:
            raise ValueError(f"`key` is {key!r}; allowed are methods with an entry of this package.")
        self.source_hash = proofs.source_hash(self.row.module)
        self.settings, self.seeds = proofs.as_json("`settings`", settings), proofs.as_json("`seeds`", seeds)
        self.versions = versions(peers)
        self.quick = False  # whether what is claimed next is measured again by `--quick`
        self.claims: list[dict[str, Any]] = []
        self.samples: dict[str, Samples] = {}
        self.tables: dict[str, dict[str, Any]] = {}

    def claim(
        self,
        name: str,
        statement: str,
        value: float,
        unit: str,
        interval: Sequence[float] | None = None,
        goal: tuple[str, float] | None = None,
    ) -> None:
        """Add what was measured for one claim; see `diffusers_ext.proofs.claim`."""
        self.claims.append(proofs.claim(name, statement, value, unit, interval, goal, quick=self.quick))

    def paired(
        self, name: str, statement: str, samples: Samples, unit: str, goal: tuple[str, float] | None = None
    ) -> None:
        """Add a claim that follows from numbers of each unit, which are recorded with it."""
        value, interval = samples.claim()
        self.samples[name] = samples
        self.claims.append(
            proofs.claim(name, statement, value, unit, interval, goal, samples.to_dict(), quick=self.quick)
        )

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Add a table. Cells are strings, numbers (also of numpy and torch), booleans or None.

        Infinities, such as the PSNR of equal pictures, become text, since JSON has none.
        """
        plain = [[_plain(cell) for cell in row] for row in rows]
        self.tables[name] = proofs.as_json(f"Table {name!r}", {"columns": columns, "rows": plain})

    def print_tables(self, console: Console) -> None:
        """Print the tables."""
        for name, content in self.tables.items():
            print_table(console, name, content["columns"], content["rows"])

    def print_claims(self, console: Console) -> None:
        """Print the claims, one a line."""
        for entry in self.claims:
            console.print(proofs.describe_claim(entry), highlight=False, markup=False)

    def write(self) -> Path:
        """Record it all in `diffusers_ext/results/<key>.json`. The proofs recorded there are void: verify again.

        Raises:
            ValueError: the method's sources changed since this recorder was made, or see `proofs.write_result`.
        """
        if proofs.source_hash(self.row.module) != self.source_hash:
            raise ValueError(f"The sources of {self.row.key!r} changed while it was measured; nothing is recorded.")
        return proofs.write_result(
            self.row.key,
            method_version=self.row.version,
            source_hash=self.source_hash,
            machine=machine(),
            versions=self.versions,
            settings=self.settings,
            seeds=self.seeds,
            claims=self.claims,
            tables=self.tables,
        )


def print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table: numbers with four digits and to the right, nothing for None."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        numeric = all(row[i] is None or isinstance(row[i], int | float) for row in rows)
        table.add_column(Text(column), justify="right" if numeric else "left")
    for row in rows:
        texts = ["" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row]
        table.add_row(*map(Text, texts))
    console.print(table)


def _plain(cell: Any) -> Any:
    cell = cell.item() if hasattr(cell, "item") else cell
    return str(cell) if isinstance(cell, float) and not math.isfinite(cell) else cell


def machine() -> dict[str, Any]:
    """What the numbers were measured on: processor, cores, memory, accelerator. No name that tells whose it is."""
    import torch

    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions(peers: Sequence[str] = ()) -> dict[str, str]:
    """Versions of Python, of what every benchmark uses, and of `peers`.

    Raises:
        importlib.metadata.PackageNotFoundError: a peer is not installed.
    """
    found = {name: importlib.metadata.version(name) for name in (*_PACKAGES, *peers)}
    return {"python": platform.python_version(), "diffusers_ext": diffusers_ext.__version__, **found}


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    """Memory of the machine, or None where the system does not say."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
