"""What a call computes: multiply-accumulates, and calls of each submodule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_macs(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Multiply-accumulates of one call `fn(*args, **kwargs)`, a backward pass inside it included.

    Counted are matrix products, convolutions and attention; element-wise work, norms and biases are not. Half of what
    torch's `FlopCounterMode` reports, with attention run by the math backend: the counter sees fused attention on a
    CPU as nothing. `fn` is really run, so call it once before where a first call does extra work.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        fn(*args, **kwargs)
    return counter.get_total_flops() // 2


class CallCounter:
    """Counts the calls of a module and of everything in it.

        with CallCounter(unet) as counter:
            pipe(prompt)
        counter.calls[""], counter.calls["mid_block"]

    Counted are calls of `module(...)`. A block whose inference hook answers from a cache was called and counts, and
    the layers that were skipped inside it do not. Methods other than `forward`, such as `vae.decode`, do not count
    themselves; the layers that they call do.

    Attributes:
        calls: calls by name of the submodule ("" is the module itself), zero for those that did not run. They stay
            after the block ends; entering again starts from zero.
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise ValueError(f"`module` is {type(module).__name__}; a torch.nn.Module is needed.")
        self.module = module
        self.calls: dict[str, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> CallCounter:
        if self._handles:
            raise RuntimeError("This CallCounter is counting already; use another one for a nested count.")
        self.calls = dict.fromkeys((name for name, _ in self.module.named_modules()), 0)
        for name, submodule in self.module.named_modules():
            self._handles.append(submodule.register_forward_pre_hook(self._count(name)))
        return self

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _count(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.calls[name] += 1

        return hook
