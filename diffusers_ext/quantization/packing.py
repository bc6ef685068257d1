"""Codes as they lie in memory and on disk: two a byte up to 4 bits, one a byte up to 8, else two bytes each."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def packed_shape(shape: Sequence[int], bits: int) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the packed codes of a tensor whose first axis is its rows."""
    if bits > 4:
        return tuple(shape), torch.int8 if bits <= 8 else torch.int16
    columns = 1
    for size in shape[1:]:
        columns *= size
    return (shape[0], (columns + 1) // 2), torch.uint8


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes 0 to 2^bits - 1, `(rows, *)`.

    Up to 4 bits, a row's codes 2 i and 2 i + 1 share byte i, the first in its low half, and an odd row ends with a zero. More
    bits are kept less `2^(bits - 1)`, so that they fit a signed number.
    """
    _, dtype = packed_shape(codes.shape, bits)
    if bits > 4:
        return (codes - 2 ** (bits - 1)).to(dtype)
    rows = codes.flatten(1)
    rows = torch.nn.functional.pad(rows, (0, rows.shape[1] % 2))
    return (rows[:, ::2] | (rows[:, 1::2] << 4)).to(dtype)


def unpack(packed: torch.Tensor, shape: Sequence[int], bits: int) -> torch.Tensor:
    """The codes that `pack` packed, `shape`: int32, or uint8 up to 4 bits."""
    if bits > 4:
        return packed.to(torch.int32) + 2 ** (bits - 1)
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    count = 1
    for size in shape[1:]:
        count *= size
    return codes[:, :count].reshape(shape)
