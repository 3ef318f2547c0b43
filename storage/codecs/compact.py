"""Lossy: every value as a whole number of steps, one step for the whole store, entropy-coded.

# R rows, D d_in, K columns of a frame

The step is a share (0.25 by default) of the typical standard deviation of a dimension. Values are
rounded to the nearest multiple, so the error of each is uniform in half a step either way, step²/12
in the mean square, whatever the model; nothing is clipped, and large values only cost bits. Rotations
and per-row or per-dimension scales did worse at equal error (docs/log.md).

A frame holds K columns, shuffled apart as one value of 2K bytes: each plane then is one byte of one
dimension over all rows of the chunk, and has a Huffman table of its own. So a dimension's mean,
which a table for all dimensions together would pay for, is free.

Zarr metadata: numcodecs' FixedScaleOffset (value = code / scale + offset), then bytes, blosc,
crc32c. Codes are steps + 128: then the high byte of nearly every one is zero. The step has 8
significant bits, and among those one is chosen that a reader's division gives back exactly.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from ..errors import InputError
from ..values import Floats, Rows, ValueType
from .base import Codec, Served
from .blosc import BloscFrames

DEFAULT_STEP = 0.25  # of the typical standard deviation: relative error 0.0052, 4.1 bits a value
_CHUNK_ROWS = 8192  # a plane, and so a Huffman table, for as many values of one dimension
_MOST_TYPE_BYTES = 240  # blosc's limit is 255; its fast shuffle wants multiples of 16
_BIAS = 128
_RUN_ROWS = 256
# A calibration that reaches beyond this share of int16 makes the codes int32.
_HEADROOM = 16
# Dimensions and rows beyond this many times the median do not decide about the step.
_OUTLIER = 4.0


@dataclass(frozen=True, kw_only=True)
class Compact(Codec):
    """relative_step: asked for; step: in the rows' unit, 0 before calibration; code: of a value."""

    name = "compact"
    description = (
        "lossy: whole steps of 0.25 (compact:STEP for another) standard deviations, about 3.9 times "
        "smaller than raw bfloat16"
    )
    is_lossy = True

    relative_step: float = DEFAULT_STEP
    step: float = 0.0
    code: str = "int16"

    @classmethod
    def parse(cls, option: str | None, values: ValueType) -> Self:
        try:
            relative_step = DEFAULT_STEP if option is None else float(option)
        except ValueError:
            relative_step = math.nan
        if not 1e-4 <= relative_step <= 4:
            raise InputError(
                f"The step of --codec compact:{option} is a share of the standard deviation of a "
                "dimension, and has to be from 0.0001 to 4. Pass --codec compact:0.25 for example."
            )
        return cls(values=values, relative_step=relative_step)

    @property
    def spelling(self) -> str:
        return f"{self.name}:{self.relative_step:g}"

    @property
    def container(self) -> str:
        return "float32"  # multiples of the step are no float16, whatever the rows were

    @property
    def stored(self) -> np.dtype[Any]:
        return np.dtype(self.code)

    @property
    def served(self) -> Served:
        return Served("steps", self.stored, self.step)

    @property
    def typical_deviation(self) -> float | None:
        return self.step / self.relative_step  # but for the rounding of the step

    @property
    def parameters(self) -> dict[str, Any]:
        return {"step": self.step, "code": self.code}

    def with_parameters(self, parameters: dict[str, Any]) -> Self:
        step, code = float(parameters["step"]), str(parameters["code"])
        if not 0 < step < math.inf or code not in ("int16", "int32"):
            raise ValueError(f"a step of {step} in {code} codes")
        return replace(self, step=step, code=code)

    def calibrated(self, sample_RD: Floats) -> Self:
        step = _divisible(self.relative_step * typical_deviation(sample_RD))
        reach = float(np.abs(sample_RD).max(initial=0.0)) / step
        code = "int16" if reach * _HEADROOM < np.iinfo(np.int16).max else "int32"
        return replace(self, step=step, code=code)

    def columns(self, d_in: int) -> int:
        sizes = [k for k in range(1, d_in + 1) if d_in % k == 0]
        width = self.stored.itemsize
        fast = [k for k in sizes if k * width <= _MOST_TYPE_BYTES and k * width % 16 == 0]
        # Without a width that blosc shuffles fast: one frame, all dimensions with one table.
        return max(fast, default=d_in)

    def chunk_rows(self, d_in: int) -> int | None:
        return _CHUNK_ROWS

    def _frames(self, d_in: int, rows: int = 0) -> BloscFrames:
        columns, width = self.columns(d_in), self.stored.itemsize
        if columns * width > _MOST_TYPE_BYTES:
            return BloscFrames(type_bytes=width, block_bytes=1 << 20)
        return BloscFrames(type_bytes=columns * width, block_bytes=rows * columns * width)

    def zarr_codecs(self, d_in: int) -> list[dict[str, Any]]:
        scaling = {
            "offset": -_BIAS * self.step,
            "scale": 1 / self.step,
            "dtype": "<f4",
            "astype": f"<i{self.stored.itemsize}",
        }
        return [
            {"name": "numcodecs.fixedscaleoffset", "configuration": scaling},
            *self._frames(d_in).zarr_codecs(),
        ]

    def steps(self, values_RD: Floats) -> Rows:
        """Whole steps, at the ends of the codes' range where a value lies beyond it."""
        limits = np.iinfo(self.stored)
        # Ends that float32 holds exactly and that leave room for the bias.
        low, high = np.float32(limits.min), np.float32(limits.max - 2 * _BIAS)
        if self.code == "int32":
            high = np.nextafter(high, np.float32(0))
        out = np.empty(values_RD.shape, self.stored)
        scale = np.float32(1 / self.step)
        for start in range(
            0, len(values_RD), _RUN_ROWS
        ):  # what stays in cache is three times as fast
            part = slice(start, start + _RUN_ROWS)
            steps = values_RD[part] * scale
            np.rint(steps, out=steps)
            np.clip(steps, low + _BIAS, high, out=steps)
            out[part] = steps
        return out

    def kept(self, values_RD: Floats) -> Floats:
        out = np.empty(values_RD.shape, np.float32)
        self.to_floats(self.steps(values_RD), out)
        return out

    def encode(self, values_RD: Floats) -> list[bytes]:
        codes = self.steps(values_RD)
        codes += self.stored.type(_BIAS)
        d_in = codes.shape[1]
        columns, frames = self.columns(d_in), self._frames(d_in, len(codes))
        return [
            frames.encode_planes(np.ascontiguousarray(codes[:, first : first + columns]))
            for first in range(0, d_in, columns)
        ]

    def decode(self, frame: memoryview, stored_RK: Rows) -> None:
        self._frames(stored_RK.shape[1]).decode(frame, stored_RK)

    def serve(self, stored_RK: Rows, out_RK: Rows) -> None:
        np.subtract(stored_RK, self.stored.type(_BIAS), out=out_RK)

    def to_floats(self, served_RD: Rows, out_RD: Floats) -> None:
        if self.code == "int16":  # at most 24 significant bits in the product: float32 is exact
            np.multiply(served_RD, np.float32(self.step), out=out_RD, casting="unsafe")
        else:
            np.multiply(served_RD, self.step, out=out_RD, casting="unsafe", dtype=np.float64)


def typical_deviation(sample_RD: Floats) -> float:
    """Root mean square over dimensions of the standard deviation, outliers set aside.

    Rows whose distance from the median row is beyond 4 times the median distance are left out, and
    a dimension counts with at most 4 times the median deviation: a few massive rows or dimensions
    would otherwise make the step too coarse for all the others.
    """
    centred_RD = sample_RD.astype(np.float64) - np.median(sample_RD, axis=0)
    spread_D = np.median(np.abs(centred_RD), axis=0)
    # Each dimension counts alike here, or a massive one would decide which rows are ordinary.
    scaled_RD = centred_RD / np.where(spread_D > 0, spread_D, 1.0)
    distance_R = np.sqrt((scaled_RD**2).mean(axis=1))
    ordinary_R = distance_R <= _OUTLIER * np.median(distance_R)
    deviation_D = centred_RD[ordinary_R].std(axis=0)
    capped_D = np.minimum(deviation_D, _OUTLIER * np.median(deviation_D))
    typical = float(np.sqrt((capped_D**2).mean()))
    if not 0 < typical < math.inf:
        raise InputError(
            "--codec compact takes its step from the spread of the rows, and the first rows of this "
            f"store have none (found {typical:g}). Pass --codec lossless."
        )
    return typical


def _divisible(step: float) -> float:
    """The nearest step of 8 significant bits for which code / (1 / step) is exact for all codes."""
    mantissa, exponent = math.frexp(step)  # step = mantissa * 2**exponent, mantissa in [0.5, 1)
    wanted = round(mantissa * 256)
    codes = np.arange(-(2**15), 2**15, dtype=np.float64)
    for distance in range(8):
        for candidate in (wanted - distance, wanted + distance):
            found = math.ldexp(candidate / 256, exponent)
            if candidate >= 128 and (codes / (1 / found) == codes * found).all():
                return found
    raise AssertionError("there is no such step near")  # 110 of 128 mantissas qualify
