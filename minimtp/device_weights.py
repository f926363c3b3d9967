"""A model's parameters on a device: every tensor once, in the layout that its kernels read."""

from types import SimpleNamespace

import numpy as np

from . import device_layout
from .backend import Rounded
from .checkpoint import CheckpointError, show
from .device_layout import KINDS
from .ggml import Blocks
from .quant import Plain, Quantized, release_all

WARPS, MANY_ROWS = 4, 4096  # of a block: twice as many where rows are many, which then read x half as often


class Stored:
    """What lies on a device in `arrays`, some of which may be None."""

    @property
    def nbytes(self):
        """Bytes on the device."""
        return sum(array.nbytes for array in self.arrays if array is not None)


class Weight(Stored):
    """A matrix [O, I] on a device; kernel_ops.matmul and gather read it.

    storage and scale are the constants of gather.cu; arrays: what it takes for stored, scales, high and steps.
    """

    def __init__(self, device, shape, storage, scale, arrays, group=1, span=32):
        self.device, self.shape, self.storage, self.scale = device, shape, storage, scale
        self.arrays = [device.array(array) if isinstance(array, np.ndarray) else array for array in arrays]
        self.group, self.span = group, span

    def product(self, out_TO, x_TI):
        """Launch out = x times the transpose, for as many tokens as a kernel takes."""
        (rows, columns), tokens = self.shape, (("TOKENS", len(x_TI)),)
        used = [array for array in self.arrays if array is not None]
        arguments, warps = [out_TO, x_TI, *used, rows, columns], WARPS if rows < MANY_ROWS else 2 * WARPS
        grid = -(-rows // (4 * warps))
        match self.storage:
            case "FLOATS":
                constants = (*tokens, ("WEIGHT", self.scale))
                self.device.launch("matvec_float", "matvec_float", -(-rows // 4), 128, arguments, constants)
            case "INT4":
                constants = (*tokens, ("SCALE", self.scale), ("SPAN", self.span))
                arguments = [*arguments, self.group]
                self.device.launch("matvec_int4", "matvec_int4", grid, 32 * warps, arguments, constants)
            case "CODES8":
                self.device.launch("matvec_int8", "matvec_int8", -(-rows // 16), 128, arguments, tokens)
            case "Q6K":
                self.device.launch("matvec_q6k", "matvec_q6k", -(-rows // 16), 128, arguments, tokens)

    def pairs_with(self, other):
        """Whether one kernel can read both, as a gate and what it opens."""
        kinds = [(w.storage, w.scale, w.group, w.shape) for w in (self, other)]
        return self.storage == "INT4" and kinds[0] == kinds[1]

    def gated_product(self, out_TO, x_TI, up, activation):
        """Launch out = activation(x times its transpose) * (x times up's), where it pairs with up."""
        (rows, columns), grid = self.shape, -(-self.shape[0] // (2 * WARPS))
        constants = ("TOKENS", len(x_TI)), ("SCALE", self.scale), ("SPAN", self.span), ("ACTIVATION", activation)
        arguments = [out_TO, x_TI, *self.arrays[:2], *up.arrays[:2], rows, columns, self.group]
        self.device.launch("matvec_int4", "gated_int4", grid, 32 * WARPS, arguments, constants)

    def gather(self, out_TD, ids_T):
        """Launch out = rows of it, by ids on the device."""
        columns, constants = self.shape[1], (("STORAGE", self.storage), ("SCALE", self.scale))
        arguments = [out_TD, ids_T, *self.arrays, columns, self.group]
        self.device.launch("gather", "gather", (-(-columns // 256), len(ids_T)), 256, arguments, constants)


def floats(w_OI):
    """An Array [O, I] as a Weight."""
    return Weight(w_OI.device, w_OI.shape, "FLOATS", "f32", [w_OI, None, None, None])


class Experts(Stored):
    """The matrices of all experts, [E, rows, I], on a device; kernel_ops.mixture reads them.

    constants: how experts.cu is compiled for them; arrays: codes and scales, or bf16 weights and None.
    """

    def __init__(self, device, weights):
        parts, (self.rows, _) = [_expert(weight) for weight in weights], weights[0].shape
        if len({constants for constants, _ in parts}) > 1:
            raise CheckpointError(f"{show(getattr(weights[0], 'name', ''))}: experts of several types have no kernel")
        self.constants, first = parts[0]
        self.arrays = [None if part is None else device.empty((len(parts), *part.shape), part.dtype) for part in first]
        for e, (_, arrays) in enumerate(parts):
            for place, array in zip(self.arrays, arrays):
                if place is not None:
                    place[e].set(array)
            release_all(weights[e])


def _expert(weight):
    """(constants of its kernels, arrays that they read)"""
    if isinstance(weight, Plain) and weight.dtype == "BF16":
        return (("BF16_EXPERTS", 1),), (weight.stored, None)
    if not isinstance(weight, Quantized) and getattr(weight, "type", None) != "Q4_0":
        raise CheckpointError(f"{show(getattr(weight, 'name', ''))}: experts that are neither int4 nor bf16: no kernel")
    int4 = device_layout.int4(weight)
    return (("SCALE", int4.kind), ("GROUP", int4.group)), int4[:2]


def weight_on(device, weight):
    """A 2-D array, Plain, Quantized or Blocks -> Weight. Raises CheckpointError for what has no kernel."""
    if isinstance(weight, Rounded):
        raise CheckpointError("activations that are rounded to 8 bits have no kernel")
    if isinstance(weight, Quantized) or (isinstance(weight, Blocks) and weight.type == "Q4_0"):
        int4 = device_layout.int4(weight)
        made = Weight(device, weight.shape, "INT4", int4.kind, [*int4[:2], None, None], int4.group, int4.span)
    elif isinstance(weight, Blocks) and weight.type == "Q8_0":
        made = Weight(device, weight.shape, "CODES8", "f16", [*device_layout.int8(weight), None, None], 32)
    elif isinstance(weight, Blocks) and weight.type == "Q6_K":
        low, high, scales, steps = device_layout.q6k(weight)
        made = Weight(device, weight.shape, "Q6K", "f16", [low, scales, high, steps], 256)
    elif isinstance(weight, Plain) and weight.dtype in KINDS:
        made = Weight(device, weight.shape, "FLOATS", KINDS[weight.dtype], [weight.stored, None, None, None])
    elif isinstance(weight, Blocks):  # the types that no published checkpoint has
        made = Weight(device, weight.shape, "FLOATS", "f32", [weight.dequantize(np.float32), None, None, None])
    elif isinstance(weight, np.ndarray) and weight.dtype == np.float32:
        return Weight(device, weight.shape, "FLOATS", "f32", [weight, None, None, None])
    else:
        raise CheckpointError(f"{show(getattr(weight, 'name', ''))}: no kernel for {type(weight).__name__}")
    release_all(weight)
    return made


def parameters_on(device, params):
    """A tree of parameters, moved to a device: matrices as Weight, vectors as arrays; what is there twice, once."""
    moved = {}

    def move(value):
        if isinstance(value, SimpleNamespace):
            return SimpleNamespace(**{name: move(part) for name, part in vars(value).items()})
        if isinstance(value, list) and value and isinstance(value[0], SimpleNamespace):
            return [move(part) for part in value]
        if isinstance(value, list):
            return Experts(device, value)
        if id(value) not in moved:
            moved[id(value)] = _moved(device, value)
        return moved[id(value)]

    return move(params)


def _moved(device, value):
    if isinstance(value, np.ndarray) and value.dtype.kind != "f":
        return value  # a permutation, which the host looks things up in
    if isinstance(value, np.ndarray) and value.ndim != 2:  # vectors, and weights of convolutions
        return device.array(value)
    return weight_on(device, value)
