"""Collects what a benchmark measures, with all that is needed to measure it again, and records it.

A benchmark uses it so:

    recorder = Recorder("deepcache", settings={"steps": 20}, seeds={"pictures": list(range(64))}, peers=["tomesd"])
    recorder.claim("time", "2.3 times faster", 0.52, "x", interval=(0.50, 0.54), goal=("<=", 0.6))
    recorder.table("by interval", ["interval", "time (s)"], [[1, 2.1], [3, 1.1]])
    recorder.write()
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers_ext
from diffusers_ext import proofs
from diffusers_ext.registry import get_method

_PACKAGES = ("torch", "diffusers", "transformers")


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
        self.claims: list[dict[str, Any]] = []
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
        self.claims.append(proofs.claim(name, statement, value, unit, interval, goal))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Add a table. Cells are strings, numbers (also of numpy and torch), booleans or None.

        Infinities, such as the PSNR of equal pictures, become text, since JSON has none.
        """
        plain = [[_plain(cell) for cell in row] for row in rows]
        self.tables[name] = proofs.as_json(f"Table {name!r}", {"columns": columns, "rows": plain})

    def print(self) -> None:
        """Print the tables and claims."""
        from rich.console import Console
        from rich.table import Table

        console = Console()
        for name, content in self.tables.items():
            table = Table(title=name)
            for column in content["columns"]:
                table.add_column(column)
            for row in content["rows"]:
                table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
            console.print(table)
        for entry in self.claims:
            console.print(proofs.describe_claim(entry), highlight=False)

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
