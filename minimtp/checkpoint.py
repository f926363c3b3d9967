"""Folders of safetensors files -> lazy, memory-mapped, named raw tensors. Nothing in a file is believed until checked.

A safetensors file is: 8 bytes, little-endian length N; N bytes of JSON, {name: {dtype, shape, data_offsets}}; the data.
https://github.com/huggingface/safetensors#format
"""

import glob
import json
import math
import mmap
import os
import reprlib
import secrets
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from numpy.lib.array_utils import byte_bounds

try:
    import fcntl
except ImportError:  # Windows, where what killed processes left has to be removed by hand
    fcntl = None

# Stored element types. NumPy has no bfloat16 (kept as its 16 bits) and no 8-bit floats; BOOL stays bytes: 2 is not True
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
    "BOOL": "u1",
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16", "F64")
MAX_JSON = 100_000_000  # bytes; the limit of the safetensors library
MAX_DIMS = 64  # NumPy's
AROUND = 1 << 16  # bytes: where one of a file's pages is read, Linux puts those around it into memory, too

_repr = reprlib.Repr()  # hostile names, numbers and lists in error messages: one line, cut short, escaped
_repr.maxstring = _repr.maxother = 120
show = _repr.repr


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as what it claims to be; the message is one line: which file, which thing."""


@dataclass(frozen=True, eq=False)
class RawTensor:
    """A tensor as its file stores it: little-endian, C order, nothing read from disk until it is looked at."""

    name: str
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    data: np.ndarray = field(repr=False)  # uint8 [bytes], a read-only view of the memory map, at any alignment
    file: Path

    def stored(self):
        """-> read-only array [*shape] in the stored dtype, no copy (bf16 as its uint16 bits; perhaps unaligned)."""
        return self.data.view(DTYPES[self.dtype]).reshape(self.shape)

    def to(self, dtype):
        """-> new float array [*shape]; exact, except when narrowed. CheckpointError if the tensor is not float."""
        if self.dtype not in FLOATS:
            raise CheckpointError(f"{self.file}: {show(self.name)} is {self.dtype}, not a float")
        if self.dtype == "BF16":
            return bf16_to_float(self.stored(), dtype)
        return self.stored().astype(dtype)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened model folder: its config.json and every tensor of its shards by name."""

    folder: Path
    config: dict = field(repr=False)
    tensors: dict[str, RawTensor] = field(repr=False)

    def settings(self, name):
        """What "tokenizer_config" or "generation_config" says -> dict, empty where the folder has no such file."""
        path = self.folder / f"{name}.json"
        return read_json(path) if path.is_file() else {}

    def stored_bytes(self):
        """-> {dtype: bytes} of all its tensors."""
        return bytes_by_type(self.tensors)


def bytes_by_type(tensors):
    """{dtype: bytes} of {name: RawTensor}."""
    stored = Counter()
    for tensor in tensors.values():
        stored[tensor.dtype] += tensor.data.size
    return stored


def open_checkpoint(path):
    """Open a folder with model.safetensors, or model.safetensors.index.json and its shards; or one .safetensors file.

    Either way config.json must be there too. In a folder with both, the index is ignored, as transformers does. A shard
    may be a symlink to anywhere (hub caches are made of them, and who can plant one can plant the file), but the index,
    a text that travels, may name only files below the folder. Raises CheckpointError: which file, which thing.
    """
    path = Path(path)
    if not _is(path, "file") and not _is(path, "dir"):
        raise CheckpointError(f"{path}: no such file or folder")
    folder = path if _is(path, "dir") else path.parent
    config = read_json(folder / "config.json")
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if folder is not path:
        tensors = read_safetensors(path)[0]
    elif _is(single, "file"):
        tensors = read_safetensors(single)[0]
    elif _is(index, "file"):
        tensors = _read_shards(folder, index)
    else:
        raise CheckpointError(f"{folder}: no {single.name} and no {index.name} in it")
    return Checkpoint(folder, config, tensors)


def read_safetensors(path):
    """One safetensors file -> ({name: RawTensor}, {metadata key: text}).

    Raises CheckpointError unless the header is sound and its tensors account for every byte of the file.
    """
    path = Path(path)
    data = map_file(path)
    if len(data) < 8:
        raise CheckpointError(f"{path}: truncated: {len(data)} bytes, no room for the header's length")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > MAX_JSON:
        raise CheckpointError(f"{path}: not a safetensors file: header length {length} is above {MAX_JSON}")
    if 8 + length > len(data):
        raise CheckpointError(f"{path}: truncated: header of {length} bytes in a file of {len(data)}")
    header = parse_json(data[8 : 8 + length].tobytes(), f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not _are_texts(metadata):
        raise CheckpointError(f"{path}: header: __metadata__ is not a table of texts")
    data = data[8 + length :]
    spans = {name: _check_entry(f"{path}: {show(name)}", entry) for name, entry in header.items()}
    _check_cover(path, spans, len(data))
    tensors = {
        name: RawTensor(name, header[name]["dtype"], tuple(header[name]["shape"]), data[begin:end], path)
        for name, (begin, end) in spans.items()
    }
    return tensors, metadata


@dataclass(frozen=True, eq=False)
class Lazy:
    """A tensor to be written, made piece by piece: chunks() gives arrays whose bytes, joined, are its data."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Callable = field(repr=False)


def write_safetensors(path, arrays, metadata=None):
    """Write {name: array, or (dtype name, array of stored bits) as ("BF16", uint16 array), or Lazy} atomically.

    All or nothing: the bytes go to a temporary file in the same folder, which takes the name once they are on the disk.
    CheckpointError for an array that the format cannot hold; OSError if the disk will not have it.
    """
    path, metadata = Path(path), dict(metadata or {})
    if not _are_texts(metadata):
        raise CheckpointError(f"{path}: metadata is not a table of texts")
    tensors = {name: _storable(name, value) for name, value in arrays.items()}
    text, places = safetensors_header(
        {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, metadata
    )
    with new_file(path) as file:
        file.write(text)
        for name, (begin, end) in places.items():
            write_chunks(file, name, tensors[name], end - begin)


def safetensors_header(tensors, metadata):
    """Where {name: (dtype name, shape)} lie in a safetensors file -> (its first bytes, {name: (begin, end) of all}).

    The tensors follow the header without a gap, in the order of the table.
    """
    widths = {name: np.dtype(DTYPES[dtype]).itemsize for name, (dtype, _) in tensors.items()}
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name in sorted(tensors, key=lambda name: (-widths[name], name)):  # widest first: all data is aligned
        dtype, shape = tensors[name]
        begin, end = end, end + math.prod(shape) * widths[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {name: [start + at for at in header[name]["data_offsets"]] for name in header if name != "__metadata__"}
    return len(text).to_bytes(8, "little") + text, places


@contextmanager
def new_file(path):
    """A file to write that takes its name once its bytes are on the disk; after an error nothing of it is left."""
    with temporary(path) as unfinished, open(unfinished, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.replace(unfinished, path)


@contextmanager
def temporary(path, make=Path.touch):
    """A new file (or with Path.mkdir a folder) beside `path`, gone at the end unless it was renamed.

    What processes left that were killed while they wrote the same path goes too. Others that write it stay as they are:
    each holds a lock on its own, which the system takes from it when it ends, however it does.
    """
    sweep(path)
    while True:
        unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        make(unfinished, exist_ok=False)
        held = _lock(unfinished, wait=True)
        if unfinished.exists():
            break  # else another process swept it away before it was locked
        if held is not None:
            os.close(held)
    try:
        yield unfinished
    finally:
        if held is not None:
            os.close(held)
        _remove(unfinished)


def sweep(path):
    """Remove what killed processes left of what they wrote to `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
        held = _lock(left)
        if held is not None:
            _remove(left)
            os.close(held)


def _lock(path, wait=False):
    """A descriptor that holds a file or folder; None if another process does, it is gone, or nothing can be locked."""
    try:
        held = os.open(path, os.O_RDONLY) if fcntl else None
    except OSError:
        return None
    try:
        if held is not None:
            fcntl.flock(held, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return held
    except OSError:
        os.close(held)
        return None


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_chunks(file, name, tensor, size):
    """Write the chunks of a Lazy that must come to `size` bytes."""
    for chunk in tensor.chunks():
        size -= file.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8))
    if size:
        raise CheckpointError(f"{show(name)}: {abs(size)} bytes too {'few' if size > 0 else 'many'} to write")


def bf16_to_float(bits, dtype=np.float32, out=None):
    """bfloat16 bits (uint16, any shape) -> the same values as floats: a bf16 is the upper half of a float32.

    out: a float32 array for them.
    """
    wide = np.empty(bits.shape, np.uint32) if out is None else out.view(np.uint32)
    wide[...] = bits
    wide <<= 16
    return wide.view(np.float32).astype(dtype, copy=False)


def float_to_bf16(x):
    """Floats (any shape) -> nearest bfloat16 bits (uint16), ties to even, NaN stays NaN."""
    x = np.asarray(x)
    with np.errstate(over="ignore"):
        single = x.astype(np.float32)
    bits = single.view(np.uint32)
    if x.dtype == np.float64:  # round to odd first (cut, then mark what was cut in the last bit): no rounding twice
        bits = bits - (np.abs(single) > np.abs(x)) | (single != x)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def _is(path, kind):
    try:
        return path.is_dir() if kind == "dir" else path.is_file()
    except (OSError, ValueError):  # a name too long, a NUL in it, no permission
        return False


def map_file(path):
    """The file's bytes as a read-only uint8 array over a memory map."""
    if not _is(path, "file"):
        raise CheckpointError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return np.empty(0, np.uint8)  # cannot be mapped
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


def release(array):
    """Give back the pages under an array, if it is of a mapped file.

    They are no longer this process's memory but stay in the system's cache, and are there again when they are read.
    """
    root = array.base if isinstance(array.base, np.ndarray) else array
    file = getattr(root.base, "obj", None)
    if isinstance(file, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        start, (low, high) = root.ctypes.data, byte_bounds(array)
        low, high = max(start, low - low % AROUND), min(start + root.nbytes, high + -high % AROUND)
        file.madvise(mmap.MADV_DONTNEED, low - start, high - low)


def read_json(path):
    """A file that holds a JSON object -> dict. CheckpointError if it does not, or holds a key twice."""
    data = map_file(path)
    if len(data) > MAX_JSON:
        raise CheckpointError(f"{path}: {len(data)} bytes of JSON, more than {MAX_JSON}")
    return parse_json(data.tobytes(), path)


def parse_json(data, where):
    """JSON text -> dict; repeated keys are refused, since readers differ in which one they believe."""

    def unique(pairs):
        table = dict(pairs)
        if len(table) < len(pairs):
            seen = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise CheckpointError(f"{where}: key {show(twice)} appears twice")
        return table

    try:
        table = json.loads(data.decode(), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not JSON: {error}") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{where}: a JSON object was expected, not {show(table)}")
    return table


def _read_shards(folder, index):
    """The shards an index names -> {name: RawTensor}; index and shards must tell the same story."""
    names = read_json(index).get("weight_map")
    if not _are_texts(names):
        raise CheckpointError(f"{index}: weight_map is not a table of file names")
    tensors = {}
    for file in sorted(set(names.values())):
        outside = any(p.anchor or ".." in p.parts for p in (PurePosixPath(file), PureWindowsPath(file)))
        if outside or not file.isprintable() or len(file) > 255:
            raise CheckpointError(f"{index}: {show(file)} is not a file inside the folder")
        for name, tensor in read_safetensors(folder / file)[0].items():
            if name in tensors:
                raise CheckpointError(f"{tensor.file}: {show(name)} is also in {tensors[name].file.name}")
            if names.get(name) != file:
                raise CheckpointError(f"{tensor.file}: {show(name)} is not in the index as a tensor of this file")
            tensors[name] = tensor
    for name, file in names.items():
        if name not in tensors:
            raise CheckpointError(f"{folder / file}: no tensor {show(name)}, which {index.name} places there")
    return tensors


def _check_entry(where, entry):
    """One header entry -> (begin, end) of its bytes, after checking everything that can be wrong inside it."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: not a table of dtype, shape and data_offsets: {show(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {show(dtype)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        raise CheckpointError(f"{where}: shape {show(shape)} is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets {show(offsets)} are not two positions")
    itemsize = np.dtype(DTYPES[dtype]).itemsize
    if math.prod(size or 1 for size in shape) * itemsize >= 2**63:  # NumPy refuses these even when one size is 0
        raise CheckpointError(f"{where}: shape {show(shape)} is too large")
    begin, end = offsets
    if end - begin != math.prod(shape) * itemsize:
        raise CheckpointError(f"{where}: {dtype} {show(shape)} does not fill data_offsets {show(offsets)}")
    return begin, end


def _are_texts(table):
    return isinstance(table, dict) and all(isinstance(text, str) for pair in table.items() for text in pair)


def _are_sizes(numbers):
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def _check_cover(path, spans, size):
    """The tensors must cover the data exactly, as the format demands: no overlap, no hole, nothing before or after."""
    position = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin < position:
            raise CheckpointError(f"{path}: {show(name)} overlaps another tensor")
        if end > size:
            raise CheckpointError(f"{path}: {show(name)} ends at byte {end} of {size}: truncated, or wrong offsets")
        if begin > position:
            raise CheckpointError(f"{path}: {begin - position} bytes before {show(name)} belong to no tensor")
        position = end
    if position < size:
        raise CheckpointError(f"{path}: {size - position} bytes after the last tensor belong to none")


def _storable(name, value):
    """What write_safetensors takes -> Lazy, of little-endian arrays."""
    if isinstance(value, Lazy):
        return value
    dtype, array = value if isinstance(value, tuple) else (None, value)
    array = np.asarray(array)
    if dtype is None:
        dtype = {"b": "BOOL", "f": "F", "i": "I", "u": "U"}.get(array.dtype.kind, "?")
        dtype += "" if dtype == "BOOL" else str(8 * array.itemsize)
        array = array.view(np.uint8) if dtype == "BOOL" else array
    if name == "__metadata__" or dtype not in DTYPES or array.dtype.newbyteorder("<") != np.dtype(DTYPES[dtype]):
        raise CheckpointError(f"cannot store {show(name)}, {array.dtype} as {dtype}")
    return Lazy(dtype, array.shape, lambda: [array.astype(DTYPES[dtype], copy=False)])
