"""The container GGUF: a header of typed metadata and a table of tensors, then their data. Nothing in it is believed.

Read by hand, since all a model needs of a header with 262,144 tokens is where they stand: the `gguf` library makes
Python objects of each.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import re
from dataclasses import dataclass, field

import numpy as np

from .checkpoint import DTYPES, CheckpointError, RawTensor, map_file, show
from .ggml import TYPES, Blocks
from .quant import Plain, Unpacking, release_rows

MAX_HEADER = 1 << 26  # bytes: four times the header with the largest vocabulary
MAX_KEYS, MAX_TENSORS = 1 << 12, 1 << 17  # the latter after stacked experts are taken apart
MAX_ODD, BLOCK = 1 << 14, 1 << 18  # texts that may be looked at one by one; bytes of others looked at together
NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9
STORED = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    30: "BF16", 39: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class GgufTensor(RawTensor):
    """A tensor under its published name; dtype is a key of checkpoint.DTYPES or of ggml.TYPES, data as in the file.

    The orders say where in the file the published rows are, and the columns, which move in equal runs, one of a head.
    """

    row_order: np.ndarray | None = field(default=None, repr=False)  # int [rows]; None: as published
    head_order: np.ndarray | None = field(default=None, repr=False)  # int [heads]; None: as published
    plus_one: bool = False  # a zero-centred norm that has its 1 already

    def stored(self):
        """-> array [*shape] in the stored dtype; of ggml's types uint8 [*shape[:-1], bytes of a row].

        In the published order, unless heads are not whole blocks: `weight` moves those.
        """
        array = self._in_file()
        if self.row_order is not None:
            array = array.take(self.row_order, 0)
        return array if self.head_order is None or self._cuts_blocks() else _put_in_order(array, self.head_order)

    def weight(self):
        """-> a tensor of ggml's types as a weight [out, in]. CheckpointError where it cannot be one."""
        blocks = Blocks(self._in_file(), self.dtype, self.shape, self.name)
        as_published = self.row_order is None and self.head_order is None
        return blocks if as_published else Reordered(blocks, self.row_order, self.head_order, self._cuts_blocks())

    def _in_file(self):
        return self.data.view(DTYPES.get(self.dtype, "u1")).reshape(*self.shape[:-1], -1)

    def _cuts_blocks(self):
        if self.head_order is None or self.dtype not in TYPES:
            return False
        return self.shape[-1] // len(self.head_order) % TYPES[self.dtype].block != 0


@dataclass(frozen=True, eq=False)
class Reordered(Unpacking):
    """A weight, as those of quant.py, that is left as its file has it: rows are put in order where they are used."""

    blocks: Blocks
    row_order: np.ndarray | None = field(repr=False)  # as in GgufTensor
    head_order: np.ndarray | None = field(repr=False)
    cuts_blocks: bool  # whether columns can only be moved once they are unpacked
    shape = property(lambda self: self.blocks.shape)
    name = property(lambda self: self.blocks.name)

    def part(self, start, stop):
        """Rows start … stop-1 as a weight that holds what they do."""
        if self.cuts_blocks:
            return Plain(self.rows(start, stop, np.float32), "F32", self.name)
        return Blocks(self._packed(slice(start, stop)), self.blocks.type, (stop - start, self.shape[1]), self.name)

    def check_finite(self):
        self.blocks.check_finite()

    def _packed(self, rows):
        rows = rows if self.row_order is None else self.row_order[rows]
        data_RB = self.blocks.data[rows]
        if self.head_order is not None and not self.cuts_blocks:
            data_RB = _put_in_order(data_RB, self.head_order)
        release_rows(self.blocks.data, rows)
        return data_RB

    def _unpack(self, rows, dtype, out=None):
        w_RI = self.blocks.unpack(self._packed(rows), dtype, out)
        return _put_in_order(w_RI, self.head_order) if self.cuts_blocks else w_RI


def _put_in_order(array, head_order):
    """The last axis, in as many equal runs as there are heads, with these in order."""
    return array.reshape(*array.shape[:-1], len(head_order), -1).take(head_order, -2).reshape(array.shape)


@dataclass(frozen=True, eq=False)
class Numbers:
    """An array of numbers, left where the header has it."""

    data: np.ndarray = field(repr=False)

    def list(self):
        return self.data.tolist()


@dataclass(frozen=True, eq=False)
class Texts:
    """An array of texts, likewise."""

    data: np.ndarray = field(repr=False)  # uint8, to the end of the last one
    starts_N: np.ndarray = field(repr=False)  # of the eight bytes of each one's length

    def __len__(self):
        return len(self.starts_N)

    def list(self):
        data, starts = self.data.tobytes(), [*self.starts_N.tolist(), len(self.data)]
        return [_decode(data[a + 8 : b]) for a, b in zip(starts, starts[1:])]

    def index(self, text):
        """The place of a text, or None."""
        wanted = text.encode()
        at_N = np.flatnonzero(np.diff(self.starts_N, append=len(self.data)) == 8 + len(wanted))
        for i, byte in enumerate(wanted):
            at_N = at_N[self.data[self.starts_N[at_N] + 8 + i] == byte]
        return int(at_N[0]) if at_N.size else None


@dataclass
class Header:
    """A file's first bytes, and how far they are read."""

    data: np.ndarray  # uint8
    at: int = 0
    odd: int = 0  # texts looked at one by one

    def take(self, size):
        if size > len(self.data) - self.at:
            raise CheckpointError(f"truncated: the header does not end within {len(self.data)} bytes")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, kind):
        value = self.take(np.dtype(kind).itemsize).view(kind)[0]
        return float(str(value)) if kind == "<f4" else value.item()  # the decimal that was meant, like 1e-06

    def text(self):
        return _decode(self.take(self.number("<u8")).tobytes())

    def texts(self, count):
        """An array of them. Most are found many at a time, and those that are empty or long one by one."""
        starts = [np.empty(0, np.int64)]
        while count:
            found_N, end = _chained(self.data[self.at : self.at + min(BLOCK, 512 * count)], count)
            starts.append(found_N + self.at)
            self.at += end
            odd = 0 if len(found_N) else min(count, 1000)
            for _ in range(odd):
                starts.append([self.at])
                self.take(self.number("<u8"))
            count, self.odd = count - len(found_N) - odd, self.odd + odd
            if self.odd > MAX_ODD:
                raise CheckpointError(f"more than {MAX_ODD} texts that are empty or long")
        return Texts(self.data[: self.at], np.concatenate(starts))

    def value(self):
        kind, count = self.number("<u4"), None
        if kind == ARRAY:
            kind, count = self.number("<u4"), self.number("<u8")
        if kind == STRING:
            return self.text() if count is None else self.texts(count)
        if kind not in NUMBERS:
            raise CheckpointError(f"metadata of unknown type {kind}")
        kind = NUMBERS[kind]
        return self.number(kind) if count is None else Numbers(self.take(count * np.dtype(kind).itemsize).view(kind))

    def entry(self, name):
        """Of the table of tensors -> (dtype, shape, offset, bytes)."""
        dims = self.number("<u4")
        shape = tuple(self.take(8 * min(dims, 5)).view("<u8")[::-1].tolist())  # in the file, innermost first
        type, offset = self.number("<u4"), self.number("<u8")
        if type not in STORED or not 1 <= dims <= 4 or not 0 < math.prod(shape) < 2**60:
            raise CheckpointError(f"{show(name)}: {show(list(shape))} of ggml type {type} is not supported")
        dtype, columns = STORED[type], shape[-1]
        plain = dtype in DTYPES
        row = np.dtype(DTYPES[dtype]).itemsize * columns if plain else TYPES[dtype].row_bytes(columns, name)
        return dtype, shape, offset, math.prod(shape[:-1]) * row

    def table(self, count, limit, read):
        """`count` names, each with what `read` takes after it -> dict. CheckpointError where a name comes twice."""
        found = {}
        if count > limit:
            raise CheckpointError(f"{count} keys or tensors, more than {limit}")
        for _ in range(count):
            name = self.text()
            if name in found:
                raise CheckpointError(f"{show(name)} is there twice")
            found[name] = read(name)
        return found


def _chained(data, count):
    """At most `count` texts that begin with the data and follow one another -> (where each begins, where they end).

    Of 1 to 255 bytes each, and another such behind it. Their lengths are found by a byte that is not 0 before one that
    is: not every such place is a length, but where one text ends and the next begins there, it is.
    """
    at_N = np.flatnonzero((data[:-8] != 0) & (data[1:-7] == 0))
    if not at_N.size or at_N[0]:
        return at_N[:0], 0
    lengths_N = np.ndarray(len(data) - 7, "<u8", data, strides=(1,))[at_N]  # of any bytes, so of any size
    ends_N = at_N + 8 + lengths_N.astype(np.int64)
    count = min(count, int(np.append(at_N[1:] == ends_N[:-1], False).argmin()))
    return at_N[:count], int(ends_N[count - 1]) if count else 0


def named(path, function, *arguments):
    """What the function returns; its CheckpointError with the file's name."""
    try:
        return function(*arguments)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _decode(data):
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"not UTF-8: {show(data)}") from None


def read_header(path):
    """One file -> (metadata, {its name for it: GgufTensor}), none of the tensors' bytes looked at."""
    return named(path, _read_header, map_file(path), path)


def _read_header(data, path):
    header, tensors = Header(data[:MAX_HEADER]), {}
    if header.take(4).tobytes() != b"GGUF" or header.number("<u4") not in (2, 3):
        raise CheckpointError("not a little-endian GGUF file of version 2 or 3")
    count, keys = header.number("<u8"), header.number("<u8")
    metadata = header.table(keys, MAX_KEYS, lambda key: header.value())
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment < MAX_HEADER or alignment & (alignment - 1):
        raise CheckpointError(f"general.alignment is {show(alignment)}, expected a power of 2")
    entries = header.table(count, MAX_TENSORS, header.entry)
    end, at = header.at, header.at + -header.at % alignment
    start = at
    for name, (dtype, shape, offset, size) in entries.items():
        if start + offset != at or size > len(data) - at:
            found = f"{size} bytes at {offset}, expected at {at - start} of {len(data) - start}"
            raise CheckpointError(f"{show(name)}: {found}")
        tensors[name] = GgufTensor(name, dtype, shape, data[at : at + size], path)
        end, at = at + size, at + size + -size % alignment
    if not end <= len(data) <= at:
        raise CheckpointError(f"{len(data) - end} bytes after the last tensor")
    return metadata, tensors


def read_parts(path):
    """As read_header, of a file, or of the first of its parts (`-00001-of-00003.gguf`) and with it the others."""
    metadata, tensors = read_header(path)
    count = metadata.get("split.count", 1)
    if count == 1:
        return metadata, tensors
    name = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", path.name)
    if metadata.get("split.no") != 0 or not name or int(name[2]) != count:
        raise CheckpointError(f"{path}: not the first of {show(count)} parts, NAME-00001-of-{show(count)}.gguf")
    for i in range(1, count):
        part = path.with_name(f"{name[1]}-{i + 1:05}-of-{name[2]}.gguf")
        more, others = read_header(part)
        strange = {key for key in more if not key.startswith(("split.", "general."))} | (tensors.keys() & others.keys())
        if (more.get("split.no"), more.get("split.count")) != (i, count) or strange:
            raise CheckpointError(f"{part}: not part {i + 1} of {count}: {show(min(strange, default='split.no'))}")
        tensors |= others
    if metadata.get("split.tensors.count", len(tensors)) != len(tensors):
        raise CheckpointError(f"{path}: {len(tensors)} tensors, expected {show(metadata['split.tensors.count'])}")
    return metadata, tensors
