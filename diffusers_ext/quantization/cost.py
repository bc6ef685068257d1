"""What a calibration costs: minutes and memory."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import psutil  # a dependency of accelerate
import torch

_EVERY = 0.05  # seconds between two looks at a process's memory


@contextlib.contextmanager
def measured(device: torch.device) -> Iterator[dict[str, float]]:
    """What happens inside is measured; what is given holds the result afterwards.

    Keys are "minutes" and "peak_bytes", above what was held at the beginning: of CUDA what torch allocates there, else the
    resident memory of the process, looked at every 50 ms.
    """
    found: dict[str, float] = {}
    began = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with _ResidentPeak() as resident:
            yield found
        peak = resident.peak - resident.before
    found |= {"minutes": round((time.perf_counter() - began) / 60, 3), "peak_bytes": peak}


class _ResidentPeak:
    """Largest resident memory of this process while it is entered, in bytes.

    Attributes:
        before, peak: at the beginning, and the largest since.
    """

    def __init__(self) -> None:
        self.process, self.done = psutil.Process(), threading.Event()
        self.before = self.peak = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self.done.wait(_EVERY):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, self.process.memory_info().rss)

    def __enter__(self) -> _ResidentPeak:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self._look()
