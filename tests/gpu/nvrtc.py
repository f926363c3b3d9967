"""NVRTC, NVIDIA's run-time compiler, through ctypes: what a GPU would be given, without one.

From the package nvidia-cuda-nvrtc-cu12, whose library needs no driver.
"""

import ctypes
import importlib.metadata
import platform
import re
import sys
from functools import cache
from typing import NamedTuple

from minimtp import kernel_source

PACKAGE = "nvidia-cuda-nvrtc-cu12"
OPTIONS = (*kernel_source.OPTIONS, "--ptxas-options=-v", "--ptxas-options=--warn-on-spills")


class CompileError(RuntimeError):
    """NVRTC refuses a source; says why, with its lines."""


class Usage(NamedTuple):
    """What one kernel needs: registers a thread, bytes spilled, on the stack, and of static shared memory."""

    registers: int
    spilled: int
    stack: int
    shared: int


class Compiled(NamedTuple):
    """A cubin, all that the compiler said, and {kernel: Usage}."""

    cubin: bytes
    log: str
    usage: dict


def missing():
    """Why there is no NVRTC here; None where there is one."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"no NVRTC is packaged for {sys.platform} on {platform.machine()}"
    try:
        importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return f"needs the package {PACKAGE}"
    return None


@cache
def _library():
    files = importlib.metadata.distribution(PACKAGE).files
    paths = {file.name: str(file.locate()) for file in files}
    library = ctypes.CDLL(paths["libnvrtc.so.12"])
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def version():
    """(major, minor) of NVRTC."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def compile(text, architecture, options=()):
    """Compile CUDA C++ for an architecture such as "sm_86" -> Compiled. Raises CompileError."""
    library, program = _library(), ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None))
    try:
        chosen = [option.encode() for option in (f"-arch={architecture}", *OPTIONS, *options)]
        failed = library.nvrtcCompileProgram(program, len(chosen), (ctypes.c_char_p * len(chosen))(*chosen))
        log = _get(program, "ProgramLog").rstrip(b"\0").decode()
        if failed:
            raise CompileError(f"{library.nvrtcGetErrorString(failed).decode()}:\n{log}")
        return Compiled(_get(program, "CUBIN"), log, _usage(log))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _get(program, what):
    size = ctypes.c_size_t()
    _check(getattr(_library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(_library(), f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(result):
    if result:
        raise CompileError(_library().nvrtcGetErrorString(result).decode())


def _usage(log):
    """{kernel: Usage} of what ptxas says with -v."""
    found = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        numbers = [
            sum(int(n) for n in re.findall(pattern, part))
            for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill", r"(\d+) bytes stack", r"(\d+) bytes smem")
        ]
        found[part.split("'")[0]] = Usage(*numbers)
    return found
