"""Kernels without a GPU: their unedited source, compiled for this machine's processor and run by kernels/host.h."""

import ctypes
import hashlib
import mmap
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from .kernel_source import FOLDER, kernels_of, source, three

ORDERS = {"forward": 0, "backward": 1, "shuffled": 12345}  # in which the threads of a block start
KINDS = {"p": np.uint64, "f": np.float32, "i": np.int32, "l": np.int64}  # of arguments, p: a pointer
FLAGS = (
    "-std=c++17 -O1 -fPIC -ffp-contract=off -fno-strict-aliasing -U_FORTIFY_SOURCE -w"
    " -fsanitize=alignment,shift,bounds,integer-divide-by-zero -fsanitize-undefined-trap-on-error"
)


class KernelError(RuntimeError):
    """A kernel did what a GPU would not forgive, or could not be compiled or started."""


@cache
def _folder():
    return tempfile.TemporaryDirectory(prefix="minimtp-kernels-", ignore_cleanup_errors=True)


@cache
def _header(compiler):
    """host.h in a folder of its own, with what the compiler makes of it once for all kernels."""
    header = Path(_folder().name) / "host.h"
    header.write_bytes((FOLDER / "host.h").read_bytes())
    _compile([*compiler, *FLAGS.split(), "-x", "c++-header"], header, header.with_name("host.h.gch"))
    return header


def _compile(command, source, made):
    done = subprocess.run([*command, "-o", str(made), str(source)], capture_output=True, text=True)
    if done.returncode:
        raise KernelError(f"{command[0]} refuses the kernel:\n{done.stderr[-3000:]}")


@cache
def compiled(text):
    """The shared library of a source. Raises KernelError with the compiler's words, or where there is none."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("c++") or "g++"]
    if shutil.which(compiler[0]) is None:
        raise KernelError(f"running kernels on the CPU needs a C++ compiler: {compiler[0]} is not there")
    kernels = kernels_of(text)
    exports = "".join(f"HOST_EXPORT({kernel})\n" for kernel in kernels)
    text = f'#define MINIMTP_HOST\n#include "host.h"\n#line 1 "kernel.cu"\n{text}\n{exports}'
    stem = _header(tuple(compiler)).parent / hashlib.sha256(text.encode()).hexdigest()[:24]
    stem.with_suffix(".cpp").write_text(text, encoding="utf-8")
    _compile([*compiler, *FLAGS.split(), "-shared"], stem.with_suffix(".cpp"), stem.with_suffix(".so"))
    loaded = ctypes.CDLL(str(stem.with_suffix(".so")))
    for kernel in kernels:
        for kind in ("launch", "kinds"):
            getattr(loaded, f"{kind}_{kernel}").restype = ctypes.c_char_p
        getattr(loaded, f"launch_{kernel}").argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_size_t, ctypes.c_uint]
    return loaded


def start(module, kernel, grid, block, values, shared=0, order="forward"):
    """Run a kernel of a library. values: what it takes, as NumPy scalars, an address as uint64.

    Raises KernelError for an access outside what is mapped, a divergent barrier, too many threads or bytes, and for
    arguments that are not as many, or not of the kinds, that the kernel takes.
    """
    if not hasattr(module, f"kinds_{kernel}"):
        raise KernelError(f"there is no kernel {kernel} in the source")
    kinds = getattr(module, f"kinds_{kernel}")().decode()
    if len(kinds) != len(values):
        raise KernelError(f"{kernel} takes {len(kinds)} arguments, not {len(values)}")
    held = [np.array(value) for value in values]
    for i, (kind, value) in enumerate(zip(kinds, held)):
        if value.dtype != KINDS[kind]:
            raise KernelError(f"{kernel}, argument {i}: {value.dtype} where the kernel takes {np.dtype(KINDS[kind])}")
    pointers = (ctypes.c_void_p * len(held))(*(value.ctypes.data for value in held))
    sizes = [(ctypes.c_uint * 3)(*three(size)) for size in (grid, block)]
    said = getattr(module, f"launch_{kernel}")(pointers, *sizes, shared, ORDERS.get(order, order)).decode()
    if said:
        raise KernelError(f"{kernel}: {said}")


def launch(name, kernel, grid, block, arguments, *, constants=(), shared=0, order="forward", text=None):
    """Run a kernel over copies of its arrays between guard pages; what it wrote is then in them.

    arguments: NumPy arrays (pointers; the same array twice is one), ints and floats (32 bits), None (a null pointer).
    text: a source instead of kernels/NAME.cu. Arrays end at a guard page, in backward order they begin after one.
    Raises KernelError as start does, and for what was written beside an array.
    """
    text = source(name, constants) if text is None else text
    module, copies = compiled(text), {}
    for array in arguments:
        if isinstance(array, np.ndarray) and id(array) not in copies:
            copies[id(array)] = Guarded(array.nbytes, at_start=order == "backward")
            copies[id(array)].data[:] = _bytes(array)
    values = [_value(value, copies.get(id(value))) for value in arguments]
    try:
        start(module, kernel, grid, block, values, shared, order)
    except KernelError as error:
        raise KernelError(f"{error}{_nearest(str(error), arguments, copies)}") from None
    for i, array in enumerate(arguments):
        if id(array) in copies:
            _take_back(array, copies[id(array)], f"{kernel}, argument {i}")


def _bytes(array):
    if not array.flags.c_contiguous:
        raise KernelError("a kernel's array is not contiguous")
    return array.reshape(-1).view(np.uint8)


def _value(value, copy):
    if copy is not None or value is None:
        return np.uint64(0 if copy is None else copy.address)
    return np.int32(value) if isinstance(value, (int, np.integer)) else np.float32(value)


def _take_back(array, copy, what):
    """Copy what the kernel left into the array."""
    copy.check(what)
    if array.flags.writeable:
        _bytes(array)[:] = copy.data
    elif (_bytes(array) != copy.data).any():
        raise KernelError(f"{what}: written, and it is read-only")


def _nearest(said, arguments, copies):
    """Which array an access was beside, for the message that gives its address."""
    if not (found := re.search(r"address 0x([0-9a-f]+)$", said)):
        return ""
    offsets = {i: int(found[1], 16) - copies[id(a)].address for i, a in enumerate(arguments) if id(a) in copies}
    beside = {i: at for i, at in offsets.items() if -mmap.PAGESIZE <= at < arguments[i].nbytes + mmap.PAGESIZE}
    return "".join(f": byte {at} of argument {i}, which has {arguments[i].nbytes}" for i, at in beside.items())


class Guarded:
    """Memory that ends where a page begins that nobody may touch, and begins after one: `data`, at `address`.

    What is left of its pages is poison (0xFF: NaN, -1), and so is the memory until it is written. It begins at 16
    bytes, as CUDA's vector loads want it, so up to 15 bytes of poison lie behind it; at_start: all of it does.
    """

    def __init__(self, size, at_start=False):
        page, self.size = mmap.PAGESIZE, size
        room = -(-max(size, 1) // page) * page
        self.map = mmap.mmap(-1, room + 2 * page)
        whole = np.frombuffer(self.map, np.uint8)
        for first in (0, page + room):
            if _mprotect(ctypes.c_void_p(whole.ctypes.data + first), ctypes.c_size_t(page), 0):
                raise KernelError("guard pages cannot be protected")
        self.room, first = whole[page : page + room], 0 if at_start else (room - size) // 16 * 16
        self.before, self.data, self.after = np.split(self.room, [first, first + size])
        self.address = self.room.ctypes.data + first
        self.poison()

    def poison(self):
        self.room[:] = 0xFF

    def check(self, what):
        """Raises KernelError where something was written beside the memory, within the pages."""
        if (self.before != 0xFF).any() or (self.after != 0xFF).any():
            raise KernelError(f"{what}: written out of bounds")


_mprotect = ctypes.CDLL(None, use_errno=True).mprotect
