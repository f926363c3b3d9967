"""Weights as they are stored, plain or quantized, and their float rows on demand.

A weight has `shape` (out, in), `rows(start, stop, dtype, out)`, `take(ids, dtype)`, `dequantize` and `check_finite`;
nothing that consumes it knows more. Pages of a mapped file that were unpacked, or checked, are given back.
Letters: O output and I input features, R some of the rows O; along I: G groups of K, or B bytes of C codes.
"""

from dataclasses import dataclass, field

import numpy as np

from .backend import scratch
from .checkpoint import DTYPES, FLOATS, CheckpointError, bf16_to_float, float_to_bf16, release, show
from .display import cells, escaped, framed, histogram, pale

EXPONENT = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}  # all ones: infinite or NaN
SHOWN = 4  # rows that a notebook shows something of
BLOCK = 1 << 21  # weights unpacked at a time: in few calls, and what is computed on the way stays in a shared cache


class Unpacking:
    """Ways to ask a weight for rows, which its `_unpack(rows, dtype, out)` makes: of a slice, or of an array of ids."""

    def rows(self, start, stop, dtype, out=None):
        """Rows start … stop-1 -> float [stop - start, in], C-contiguous, in `out` or new; of a Plain perhaps a view.

        IndexError outside it. In float64 the products of codes and scales are exact.
        """
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"{show(self.name)}: rows {start} to {stop} of {self.shape[0]}")
        return self._unpack(slice(start, stop), dtype, out)

    def take(self, ids, dtype):
        """The rows of an embedding -> new float [len(ids), in]. IndexError outside it."""
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not (0 <= ids.min() and ids.max() < self.shape[0]):
            raise IndexError(f"{show(self.name)}: row {ids.min()} or {ids.max()} of {self.shape[0]}")
        return self._unpack(ids, dtype)

    def dequantize(self, dtype):
        """All of it -> float [out, in]"""
        return self.rows(0, self.shape[0], dtype)


@dataclass(frozen=True, eq=False)
class Plain(Unpacking):
    """A float array kept as stored (bf16: its uint16 bits), widened where it is read."""

    stored: np.ndarray = field(repr=False)  # [out, in], or any shape with rows first
    dtype: str  # one of checkpoint.FLOATS
    name: str = ""

    def __post_init__(self):
        if self.dtype not in FLOATS or self.stored.dtype != DTYPES[self.dtype]:
            raise CheckpointError(f"{show(self.name)}: {self.stored.dtype} array as {self.dtype}, expected a float")

    @property
    def shape(self):
        return self.stored.shape

    def _unpack(self, rows, dtype, out=None):
        stored = self.stored[rows]
        if out is None:
            out = self._widen(stored, dtype)
        elif self.dtype == "BF16" and out.dtype == np.float32:
            bf16_to_float(stored, out=out)
        else:
            out[...] = self._widen(stored, dtype)
        release_rows(self.stored, rows)
        return out

    def check_finite(self):
        """Read all of it; CheckpointError, by name, for a NaN or an infinity."""
        unsigned = np.dtype(f"<u{self.stored.itemsize}")
        exponent = unsigned.type(EXPONENT[self.dtype])
        bits_N = self.stored.reshape(-1).view(unsigned)
        for some in row_blocks(len(bits_N), 1, BLOCK):
            if ((bits_N[some] & exponent) == exponent).any():
                raise CheckpointError(f"{show(self.name)}: NaN or infinite values")
            release(bits_N[some])

    def _widen(self, stored, dtype):
        if self.dtype == "BF16":
            return bf16_to_float(stored, dtype)
        return np.require(stored, dtype, "CA")  # a map need not be aligned


@dataclass(frozen=True, eq=False)
class Quantized(Unpacking):
    """w[o, i] = (code[o, i] - zero[o, i // group]) · scale[o, i // group], with signed codes of 2, 4 or 8 bits.

    The one form of every storage: a code is held as the unsigned code + 2^(bits-1), packed along `in`, the first in the
    lowest bits of its byte (at 4 bits: low nibble first). Scales stay as stored; group = in is one scale per channel.
    Symmetric weights have no zeros.
    """

    packed: np.ndarray = field(repr=False)  # uint8 [out, in·bits/8]
    scales: Plain  # [out, in/group]
    group: int = 32
    bits: int = 4
    name: str = ""
    zeros: np.ndarray | None = field(default=None, repr=False)  # int8 [out, in/group], codes

    def __post_init__(self):
        packed_2d = self.packed.dtype == np.uint8 and self.packed.ndim == 2 and self.packed.size
        if not packed_2d or self.bits not in (2, 4, 8):
            raise CheckpointError(f"{show(self.name)}: not packed codes: {self.packed.dtype} {self.packed.shape}")
        rows, columns = self.shape
        if columns % self.group or self.scales.shape != (rows, columns // self.group):
            raise CheckpointError(
                f"{show(self.name)}: scales {self.scales.shape} for weights {self.shape} in groups of {self.group}"
            )
        if self.zeros is not None and (self.zeros.dtype, self.zeros.shape) != (np.int8, self.scales.shape):
            raise CheckpointError(f"{show(self.name)}: zero points are {self.zeros.dtype} {self.zeros.shape}")

    @property
    def shape(self):
        return self.packed.shape[0], self.packed.shape[1] * 8 // self.bits

    def check_finite(self):
        """Read all scales; CheckpointError, by name, for a NaN or an infinity, or what would make one in float32."""
        self.scales.check_finite()
        if self.scales.dtype != "F16" and np.abs(self.scales.dequantize("float32")).max() >= 2.0 ** (128 - self.bits):
            raise CheckpointError(f"{show(self.name)}: scales that make weights beyond float32")
        release(self.scales.stored)

    def codes(self):
        """-> int8 [out, in], the signed codes, for inspection."""
        codes_OI = np.empty(self.shape, np.int8)
        for block in row_blocks(*self.shape, BLOCK):
            codes_OI[block] = _codes(self.packed[block], self.bits)
        return codes_OI

    def _repr_html_(self):
        first_RI = _codes(self.packed[:SHOWN], self.bits).copy()
        scales_RG, rows = self.scales.rows(0, len(first_RI), "float64"), f"of the first {len(first_RI)} rows"
        half, group = 1 << self.bits - 1, first_RI[0, : min(self.group, 32)].tolist()
        values, counts = np.unique(first_RI, return_counts=True)
        found = dict(zip(values.tolist(), counts.tolist()))
        codes = range(-half, half) if self.bits <= 4 else range(int(values[0]), int(values[-1]) + 1)
        size = self.packed.nbytes + self.scales.stored.nbytes + (0 if self.zeros is None else self.zeros.nbytes)
        return framed(
            weight_title(self.name, self.shape, f"int{self.bits}, groups of {self.group}", size),
            f"<div>scales {rows}: {self.scales.dtype}, {scales_RG.min():.3g} to {scales_RG.max():.3g}</div>",
            pale(f"codes of the first group{' (its first 32)' if self.group > 32 else ''}, "
                 f"its scale {scales_RG[0, 0]:.3g}"),
            cells(group, half, group),
            pale(f"how often each code comes, {rows}"),
            histogram([found.get(code, 0) for code in codes], codes if self.bits <= 4 else [""] * len(codes)),
        )  # fmt: skip

    def _unpack(self, rows, dtype, out=None):
        packed_RB, scales_RG = self.packed[rows], self.scales._widen(self.scales.stored[rows], dtype)
        zeros_RG = None if self.zeros is None else self.zeros[rows]
        shape = len(packed_RB), self.shape[1]
        w_RI = np.empty(shape, dtype) if out is None else out
        w_RGK = w_RI.reshape(*scales_RG.shape, self.group)
        for block in row_blocks(*shape, BLOCK):
            w_RI[block] = _codes(packed_RB[block], self.bits)
            if zeros_RG is not None:
                w_RGK[block] -= zeros_RG[block, :, None]  # exact: small integers
            w_RGK[block] *= scales_RG[block, :, None]
        release_rows(self.packed, rows)
        release_rows(self.scales.stored, rows)
        return w_RI


# How the codes of a byte come to lie in as many bytes: unsigned type of these, then (shift, mask), first to last
SPREAD = {2: ("<u4", (12, 0x000F000F), (6, 0x03030303)), 4: ("<u2", (4, 0x0F0F)), 8: ("u1",)}


def _codes(packed_RB, bits):
    """-> int8 [R, I], the signed codes, in this thread's scratch."""
    word, *steps = SPREAD[bits]
    word_RB, moved_RB = (scratch(f"codes {name}", packed_RB.shape, word) for name in ("word", "moved"))
    word_RB[...] = packed_RB
    for shift, mask in steps:
        np.left_shift(word_RB, shift, out=moved_RB)
        word_RB |= moved_RB
        word_RB &= mask
    codes_RI = word_RB.view(np.int8)
    codes_RI -= np.uint8(1 << bits - 1).view(np.int8)
    return codes_RI


def weight_title(name, shape, stored, size):
    """The first line of what a notebook shows of a weight."""
    bits = 8 * size / (shape[0] * shape[1])
    said = f"{shape[0]:,} × {shape[1]:,}, {stored}, {size:,} bytes, {bits:.2f} bits a weight"
    return f"<div><b>{escaped(name or 'a weight')}</b> {escaped(said)}</div>"


def find_tensor(tensors, name, dtypes, shape, said=""):
    """The tensor of that name; CheckpointError unless it is there, has one of these dtypes, and this shape, as said."""
    if name not in tensors:
        raise CheckpointError(f"tensor {show(name)} is missing")
    raw = tensors[name]
    if raw.dtype not in dtypes or raw.shape != shape:
        expected = f"{' or '.join(dtypes)} {list(shape)}{said}"
        raise CheckpointError(f"{raw.file}: {show(name)} is {raw.dtype} {list(raw.shape)}, expected {expected}")
    return raw


def row_blocks(rows, columns, size):
    """Slices that cover so many rows, each of about `size` weights."""
    height = max(1, size // columns)
    return [slice(start, min(start + height, rows)) for start in range(0, rows, height)]


def release_all(weight):
    """Give back the pages of a Plain, Quantized or Blocks."""
    scales = getattr(weight, "scales", None)
    for array in (*(getattr(weight, name, None) for name in ("stored", "packed", "data")), scales and scales.stored):
        if array is not None:
            release(array)


def release_rows(array, rows):
    """Give back the pages of a slice of rows, or between the first and the last of ids."""
    if isinstance(rows, slice):
        release(array[rows])
    elif rows.size:
        release(array[rows.min() : rows.max() + 1])


def pack(w_OI, group=32, name=""):
    """Round float weights to int4, a bf16 scale per group of absmax / 7.5 -> Quantized.

    compressed-tensors' symmetric minmax (llm-compressor's `memoryless_minmax`), which ties to even and gives a group of
    zeros the scale 2^-23. Weights that already lie on an int4 lattice come out with their scales off by 1/15: this is
    for new weights. CheckpointError for weights that are not finite or not [out, k·group].
    """
    w_OI = np.asarray(w_OI, np.float32)
    if w_OI.ndim != 2 or w_OI.size == 0 or w_OI.shape[1] % group or group % 2:
        raise CheckpointError(f"{show(name)}: weights {w_OI.shape} do not divide into groups of {group}")
    if not np.isfinite(w_OI).all():
        raise CheckpointError(f"{show(name)}: NaN or infinite weights")
    w_OGI = w_OI.reshape(len(w_OI), -1, group)
    scales_OG = np.abs(w_OGI).max(-1) / np.float32(7.5)
    scales_OG = float_to_bf16(np.where(scales_OG == 0, np.finfo(np.float32).eps, scales_OG))
    codes_OI = np.rint(w_OGI / bf16_to_float(scales_OG)[..., None]).clip(-8, 7).reshape(w_OI.shape)
    return Quantized(pack_codes(codes_OI), Plain(scales_OG, "BF16", name), group, 4, name)


def pack_codes(codes_OI, bits=4):
    """Signed codes [out, in] -> uint8 [out, in·bits/8] in the order of Quantized."""
    codes_OI, half = np.asarray(codes_OI), 1 << (bits - 1)
    if codes_OI.min() < -half or codes_OI.max() >= half:
        raise ValueError(f"codes {codes_OI.min()} to {codes_OI.max()} do not fit into {bits} bits")
    biased_OI = (codes_OI + half).astype(np.uint8)
    biased_OBC = biased_OI.reshape(len(biased_OI), -1, 8 // bits)
    packed_OB = biased_OBC[..., 0].copy()
    for i in range(1, 8 // bits):
        packed_OB |= biased_OBC[..., i] << bits * i
    return packed_OB
