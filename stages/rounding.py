"""Stochastic rounding of float32 to bfloat16, with bits that are a function of seed, step, element.

# N elements, C elements of a slab

A bfloat16 is the upper half of a float32. Adding a uniform 16-bit number to the lower half before
cutting it off rounds away from zero as often as the value lies towards the next bfloat16, so that the
mean over draws is the value itself (as in Zamirai et al. 2020, "Revisiting BFloat16 Training", arXiv
2010.06192, section 4). Rounding to the nearest leaves a value where it is when a change is below half
a unit in the last place: 0.2 to 0.4 % of it.

Bits are counted, not drawn one after another: element e of a step with key k has

    mix(mix(k + G * (e div 2^16)) + G * (e mod 2^16))     modulo 2^32

with G = 0x9E3779B9 and mix the xor-shift-multiply function `lowbias32` (Wellons 2018, "Prospecting
for Hash Functions", nullprogram.com). So they depend on no earlier step, no thread and no device.
int32 stands for unsigned 32-bit numbers throughout, which torch does not calculate with.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 16
_GOLDEN = 0x9E3779B9
_SHIFTS_AND_FACTORS = ((16, 0x7FEB352D), (15, 0x846CA68B))


def as_int32(number: int) -> int:
    """The low 32 bits of a number, as the int32 of the same bits."""
    low = number & 0xFFFFFFFF
    return low - (1 << 32) if low >> 31 else low


class CountedBits:
    """32 random bits for each of N elements, anew for every key.

    key: 0-dimensional int32 on the device, to be filled before `start`.
    """

    def __init__(self, n_elements: int, device: torch.device) -> None:
        blocks = -(-n_elements // BLOCK)
        self.key = torch.zeros((), dtype=torch.int32, device=device)
        self._of_place = torch.arange(min(BLOCK, n_elements), dtype=torch.int32, device=device)
        self._of_place *= as_int32(_GOLDEN)
        self._of_block = torch.arange(blocks, dtype=torch.int32, device=device)
        self._of_block *= as_int32(_GOLDEN)
        self._block_keys = torch.empty_like(self._of_block)

    def start(self) -> None:
        """Take up the key."""
        torch.add(self._of_block, self.key, out=self._block_keys)
        mix_(self._block_keys, torch.empty_like(self._block_keys))

    def of(self, first: int, out_C: Tensor, scratch_C: Tensor) -> None:
        """Bits of the elements from `first` on; first must be a multiple of BLOCK."""
        assert first % BLOCK == 0
        block, whole = first // BLOCK, len(out_C) // BLOCK * BLOCK
        if whole:
            keys = self._block_keys[block : block + whole // BLOCK, None]
            torch.add(keys, self._of_place, out=out_C[:whole].view(-1, BLOCK))
        if whole < len(out_C):
            key = self._block_keys[block + whole // BLOCK]
            torch.add(self._of_place[: len(out_C) - whole], key, out=out_C[whole:])
        mix_(out_C, scratch_C)


def mix_(bits: Tensor, scratch: Tensor) -> None:
    """lowbias32 of each, in place."""
    for shift, factor in _SHIFTS_AND_FACTORS:
        _xor_shifted_(bits, shift, scratch)
        bits.mul_(as_int32(factor))
    _xor_shifted_(bits, 16, scratch)


def _xor_shifted_(bits: Tensor, shift: int, scratch: Tensor) -> None:
    """bits ^= bits >>> shift. torch's shift of an int32 fills up with the sign, hence the mask."""
    torch.bitwise_right_shift(bits, shift, out=scratch)
    bits.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))


def low_half(bits: Tensor, out: Tensor) -> Tensor:
    """The lower 16 of 32 bits, from 0 to 65535."""
    return torch.bitwise_and(bits, 0xFFFF, out=out)


def high_half(bits: Tensor, out: Tensor) -> Tensor:
    """The upper 16 of 32 bits, from 0 to 65535."""
    return torch.bitwise_right_shift(bits, 16, out=out).bitwise_and_(0xFFFF)


def round_into(target: Tensor, values: Tensor, random16: Tensor) -> None:
    """Write float32 values into a bfloat16 tensor; values and random16 are used up.

    random16: int32 from 0 to 65535. Infinities stay; so do NaNs with a mantissa that is not full, as
    arithmetic makes them.
    """
    bits = values.view(torch.int32)
    bits.add_(random16).bitwise_right_shift_(16)
    target.view(torch.int16).copy_(bits)
