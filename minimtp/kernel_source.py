"""The CUDA sources: one kernel's text with its header and its constants, for any compiler."""

import re
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "kernels"
OPTIONS = ("--std=c++17", "--fmad=false")  # fused only where a source says fmaf: else a token's bits depended on TOKENS


@cache
def source(name, constants=()):
    """The text of kernels/NAME.cu after common.cuh; constants: ((name, value), ...), defined before both."""
    defines = "".join(f"#define {key} {value}\n" for key, value in constants)
    texts = [(FOLDER / file).read_text(encoding="utf-8") for file in ("common.cuh", f"{name}.cu")]
    common, kernel = texts
    return f'{defines}{common.replace("#pragma once", "")}\n#line 1 "{name}.cu"\n{kernel}'


def kernels_of(text):
    """The names of the kernels in a source."""
    return tuple(re.findall(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^()]*\)\s*)?(\w+)\(', text))


def three(size):
    """A grid's or a block's size, with all its directions."""
    size = (size,) if isinstance(size, int) else tuple(size)
    return *size, *(1,) * (3 - len(size))
