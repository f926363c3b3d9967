"""How keys and values are kept: what becomes of a head's row of floats when it is read, and what comes of it again.

A row [.., K] is one token's key or value of one head. It is encoded by itself, so what a cache holds of a token does
not depend on the tokens beside it, nor on how many shared the pass; and decoded number by number.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .checkpoint import bf16_to_float, float_to_bf16

VALUES_ONLY = "-v"  # suffix of a storage's name: where K can be made of V, only V is kept


class Storage(NamedTuple):
    """A row's parts {suffix: (type, how many, None for K)}; encode(x) -> {suffix: array}; decode(those, dtype)."""

    parts: dict
    encode: Callable
    decode: Callable

    def row_bytes(self, head_dim):
        """Bytes of one token's key or value of one head."""
        return sum(np.dtype(dtype).itemsize * (width or head_dim) for dtype, width in self.parts.values())


def _floats(dtype):
    def encode(x):
        return {"": x.astype(dtype, copy=False)}

    return Storage({"": (dtype, None)}, encode, lambda parts, dtype: parts[""].astype(dtype, copy=False))


def half_to_float(x):
    """float16 -> float32: sign, exponent and fraction moved to their places, the exponent's bias made up by a product.

    NumPy's own cast takes four times as long; it is left with what is infinite or no number.
    """
    bits = x.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= -0x70002000
    single = bits.view(np.float32)
    single *= np.float32(2.0**112)
    return single if single.max(initial=0) < 65536 and single.min(initial=0) > -65536 else x.astype(np.float32)


def encode_int8(x):
    """Codes [.., K] from -127 to 127 and one float16 scale [.., 1]: the row's largest magnitude over 127.

    The scale is rounded first, then a number becomes the nearest code times that, ties to even: off by half a scale at
    most. A row of zeros has scale 0. Float16 ends: a row below 0.008 has a coarser scale and loses more, below 4e-6
    all; a row above 8.3 million comes back as no number.
    """
    scale = (np.abs(x).max(-1, keepdims=True) / 127).astype(np.float16)
    step = np.where(scale > 0, scale, 1).astype(x.dtype)
    return {"": np.clip(np.rint(x / step), -127, 127).astype(np.int8), "_scale": scale}


def decode_int8(parts, dtype):
    """codes * scale"""
    x = parts[""].astype(dtype)
    x *= parts["_scale"].astype(dtype)
    return x


STORAGES = {
    "float64": _floats(np.float64),
    "float32": _floats(np.float32),
    "float16": Storage(  # nearest, ties to even; above 65,504 infinite
        {"": (np.float16, None)},
        lambda x: {"": x.astype(np.float16)},
        lambda parts, dtype: half_to_float(parts[""]).astype(dtype, copy=False),
    ),
    "bf16": Storage(  # nearest, ties to even; as its 16 bits
        {"": (np.uint16, None)},
        lambda x: {"": float_to_bf16(x)},
        lambda parts, dtype: bf16_to_float(parts[""], dtype),
    ),
    "int8": Storage({"": (np.int8, None), "_scale": (np.float16, 1)}, encode_int8, decode_int8),
}
NAMES = (*STORAGES, *(name + VALUES_ONLY for name in STORAGES))


def parse(name, dtype):
    """(Storage, whether only values are kept where K can be made of V) of one of NAMES; None: floats of that dtype."""
    name = name or np.dtype(dtype).name
    return STORAGES[name.removesuffix(VALUES_ONLY)], name.endswith(VALUES_ONLY)
