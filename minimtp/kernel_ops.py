"""The operations of layers.py and backend.py on a device: each has the name and the arguments of its twin in NumPy.

An operation only launches kernels: it looks at shapes, never at numbers, so a pass of them can be captured as a graph.
Narrow kernels take 1 to WIDTH tokens; a wider pass goes through them in groups, but for its products, which
unpack a tile and leave it to the library.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

from .backend import ROWS
from .device import Array
from .device_weights import floats

WIDTH = 8  # tokens that a kernel takes at once
MOST_BLOCKS = 65535  # in a grid's second direction
TILE = 1 << 24  # weights of a tile that is unpacked for the library


def elementwise(expression, a, b=None, s=0.0):
    """EXPRESSION of x (a), y (b) and s -> Array of a's shape; see kernels/elementwise.cu."""
    out = a.device.empty(a.shape, a.dtype)
    if not a.size:
        return out  # of no tokens: a grid is never empty
    rows, columns = a.shape[0], a.size // a.shape[0]
    stride, step = _broadcast(a.shape, b)
    _elementwise(expression, out, a, b, s, rows, columns, (columns, columns, stride, step))
    return out


def columns_of(a_TC, first, last):
    """A copy of the columns first .. last - 1 of a matrix -> [T, last - first]."""
    out = a_TC.device.empty((len(a_TC), last - first), a_TC.dtype)
    _copy_columns(out, 0, a_TC, first, last - first)
    return out


def concatenated(parts):
    """Matrices side by side, [T, A] and [T, B] -> [T, A + B]."""
    out, at = parts[0].device.empty((len(parts[0]), sum(part.shape[1] for part in parts)), parts[0].dtype), 0
    for part in parts:
        _copy_columns(out, at, part, 0, part.shape[1])
        at += part.shape[1]
    return out


def _copy_columns(out_TC, at, a_TC, first, count):
    """Launch a copy of columns of one matrix, from first on, to another's, from `at` on."""
    to, source = out_TC.reshape(-1)[at:], a_TC.reshape(-1)[first:]
    _elementwise("x", to, source, None, 0.0, len(a_TC), count, (out_TC.shape[1], a_TC.shape[1], 0, 0))


def _elementwise(expression, out, a, b, s, rows, columns, strides):
    """Launch elementwise.cu; strides: of out, a and b between rows, and of b between columns."""
    arguments, constants = [out, a, b, s, columns, *strides], (("EXPRESSION", expression),)
    out.device.launch("elementwise", "elementwise", (-(-columns // 256), rows), 256, arguments, constants)


def _broadcast(shape, b):
    """(stride between b's rows, step between its columns) where it meets an array of that shape."""
    if b is None or b.size == 1:
        return 0, 0
    if b.shape == shape:
        return b.size // b.shape[0], 1
    if b.shape == shape[1:]:
        return 0, 1
    if b.size == shape[0]:
        return 1, 0
    raise ValueError(f"arrays of {shape} and {b.shape} do not meet")


def gelu(x):
    return elementwise("gelu(x)", x)


def sigmoid(x):
    return elementwise("sigmoid(x)", x)


def silu(x):
    return elementwise("silu(x)", x)


def softcap(x, cap):
    return x if cap is None else elementwise("tanhf(x / s) * s", x, s=float(cap))


def groups(T):
    """A pass of T tokens in groups of at most WIDTH -> slices."""
    return [slice(start, min(start + WIDTH, T)) for start in range(0, T, WIDTH)]


def rms_norm(x, weight=None, eps=1e-6):
    return _rms_norm(x, weight, None, eps)


def add_normed(residual_TD, x_TD, weight_D, eps):
    return _rms_norm(x_TD, weight_D, residual_TD, eps)


def _rms_norm(x, weight, residual, eps):
    columns = x.shape[-1]
    out = x.device.empty(x.shape, x.dtype)
    arguments = [out, x, weight, residual, columns, float(eps)]
    block = min(1024, max(32, -(-columns // 128) * 32))
    x.device.launch("rms_norm", "rms_norm", x.size // columns, block, arguments, shared=4 * columns)
    return out


# Attention

STORED = {"float32": "F32", "float16": "F16", "bf16": "BF16", "int8": "INT8"}  # kv_storage's names, the kernels'
SPLIT = {False: 1024, True: 128}  # positions that a block attends to: in a full layer, in a window
ALL = 2**31 - 1  # the window of a full layer
MOST_QUERIES = 16  # of one block


def rope_table(positions_T, frequencies_C, dtype):
    """What turns heads at these positions: the kernels make cosines and sines themselves."""
    return positions_T.device.constant(frequencies_C), positions_T, int(np.count_nonzero(frequencies_C))


def seen(positions_T, window=None, appended=1):
    return positions_T, ALL if window is None else window, appended


def turn_and_keep(q_THK, k_TGK, v_TGK, q_norm_K, k_norm_K, eps, rope, kv, norm_values=False):
    (T, H, K), G, device = q_THK.shape, kv.shape[0], q_THK.device
    frequencies_C, positions_T, turning = rope
    out, buffers = device.empty((T, H, K), q_THK.dtype), [kv.buffers.get(name) for name in BUFFERS]
    constants = (("HEAD_DIM", K), ("STORAGE", STORED[kv.storage_name]))
    blocks = H if k_TGK is None else H + G if kv.values_only else H + 2 * G
    k_TGK = None if kv.values_only else k_TGK
    sizes = [H, G, kv.slots, turning, len(frequencies_C), int(norm_values), float(eps)]
    arrays = [q_THK, k_TGK, v_TGK, q_norm_K, k_norm_K, frequencies_C, positions_T]
    device.launch("rope_write", "rope_write", (blocks, T), 32, [out, *buffers, *arrays, *sizes], constants)
    return out


BUFFERS = ("k", "v", "k_scale", "v_scale")


def attend_over(q_THK, kv, span, scale=1.0):
    q_THK = q_THK if scale == 1.0 else q_THK * scale
    out = q_THK.device.empty(q_THK.shape, q_THK.dtype)
    for tokens in groups(len(q_THK)):
        with out.device.temporary():
            _attend(out[tokens], q_THK[tokens], kv, (span[0][tokens.start * span[2] :], *span[1:]))
    return out


def _attend(out_THK, q_THK, kv, span):
    """Attention of at most WIDTH queries, the first of them at the first of the span's positions."""
    (T, H, K), device, (positions_T, window, appended) = q_THK.shape, q_THK.device, span
    G, split = kv.shape[0], SPLIT[kv.keep is not None]
    splits = -(-kv.slots // split) if window == ALL else -(-(window + T - 1) // split) + 1
    heads = max(n for n in range(1, H // G + 1) if H // G % n == 0 and T * n <= MOST_QUERIES)
    sums, weights = device.empty((splits, T, H, K), np.float32), device.empty((splits, T, H, 2), np.float32)
    constants = (
        *(("TOKENS", T), ("HEADS", heads), ("HEAD_DIM", K), ("STORAGE", STORED[kv.storage_name])),
        *(("SPLIT", split), ("VALUES_ONLY", int(kv.values_only))),
    )
    norm_K, frequencies_C, turning = kv.keys_of or (None, None, 0)
    arrays = [sums, weights, q_THK, *(kv.buffers.get(name) for name in BUFFERS), norm_K, frequencies_C, positions_T]
    sizes = [H, G, kv.slots, window, appended, turning]
    device.launch("attention", "attention_split", (H // heads, splits), 256, [*arrays, *sizes], constants)
    arguments = [out_THK, sums, weights, positions_T, window, appended]
    device.launch("attention", "attention_merge", (H, T), K // 4, arguments, constants)


# Products


def matmul(x_TI, w):
    out = x_TI.device.empty((len(x_TI), w.shape[0]), x_TI.dtype)
    w = floats(w) if isinstance(w, Array) else w
    if len(x_TI) > ROWS:
        _wide_product(out, x_TI, w)
    else:
        for tokens in groups(len(x_TI)):
            w.product(out[tokens], x_TI[tokens])
    return out


def _wide_product(out_TO, x_TI, w):
    """A tile of rows is unpacked, then the library multiplies."""
    device, (rows, columns) = x_TI.device, w.shape
    height = min(max(1, TILE // columns), MOST_BLOCKS, rows)
    part_TR, tile_RI = device.empty((len(x_TI), height), x_TI.dtype), device.empty((height, columns), x_TI.dtype)
    for first in range(0, rows, height):
        count = min(height, rows - first)
        part = part_TR.reshape(-1)[: len(x_TI) * count].reshape(len(x_TI), count)
        w.gather(tile_RI[:count], device.constant(_numbers(w.shape[0]))[first : first + count])
        device.product(x_TI, tile_RI[:count], part)
        _copy_columns(out_TO, first, part, 0, count)


@cache
def _numbers(count):
    return np.arange(count, dtype=np.int32)


def gather(w, ids_T, dtype):
    out = ids_T.device.empty((len(ids_T), w.shape[1]), dtype)
    w.gather(out, ids_T)
    return out


def gated_mlp(x_TD, gate_proj, up_proj, down_proj, activation):
    if len(x_TD) > ROWS or not gate_proj.pairs_with(up_proj):
        inner_TF = elementwise(f"{activation.__name__}(x) * y", matmul(x_TD, gate_proj), matmul(x_TD, up_proj))
        return matmul(inner_TF, down_proj)
    inner_TF = x_TD.device.empty((len(x_TD), gate_proj.shape[0]), x_TD.dtype)
    for tokens in groups(len(x_TD)):
        gate_proj.gated_product(inner_TF[tokens], x_TD[tokens], up_proj, activation.__name__)
    return matmul(inner_TF, down_proj)


# Gated DeltaNet

WARPS = 8  # of a block of gated_delta


def halves(x):
    flat, middle = x.reshape(-1, x.shape[-1]), x.shape[-1] // 2
    parts = columns_of(flat, 0, middle), columns_of(flat, middle, 2 * middle)
    return tuple(part.reshape(*x.shape[:-1], middle) for part in parts)


def gated_norm(x_THV, weight_V, gate_THV, eps):
    out, width = x_THV.device.empty(x_THV.shape, x_THV.dtype), x_THV.shape[-1]
    arguments, rows = [out, x_THV, weight_V, gate_THV, x_THV.size // width, width, float(eps)], x_THV.size // width
    x_THV.device.launch("rms_norm", "rms_norm_gated", -(-rows // 4), 128, arguments)
    return out


def delta_rule(conv_TC, a_TH, b_TH, w, layer, memory):
    out = conv_TC.device.empty((len(conv_TC), layer.value_heads, layer.value_dim), conv_TC.dtype)
    for tokens in groups(len(conv_TC)):
        with out.device.temporary():
            _delta_rule(out[tokens], conv_TC[tokens], a_TH[tokens], b_TH[tokens], w, memory, memory.logged[tokens])
    return out


def _delta_rule(out_THV, conv_TC, a_TH, b_TH, w, memory, logged):
    """The same for at most WIDTH tokens."""
    T, device, log = len(conv_TC), conv_TC.device, memory.log
    key_heads, value_heads, key_dim, value_dim, kernel = memory.sizes
    mixed_TC, channels = device.empty(conv_TC.shape, conv_TC.dtype), conv_TC.shape[1]
    arguments = [mixed_TC, log["conv"], conv_TC, w.conv1d, memory.window_WC, logged, channels]
    constants = (("TOKENS", T), ("WIDTH", kernel))
    device.launch("causal_conv", "causal_conv", -(-channels // 128), 128, arguments, constants)
    arrays = [out_THV, None, log["k"], log["u"], log["decay"], mixed_TC, a_TH, b_TH, w.A_log, w.dt_bias]
    arguments = [*arrays, memory.state_HKV, logged, key_heads, value_dim, float(np.float32(key_dim**-0.5))]
    constants, grid = _delta_constants(T, key_dim), (value_heads, -(-value_dim // 32))
    device.launch("gated_delta", "gated_delta", grid, 32 * WARPS, arguments, constants)


def commit_delta(state_HKV, window_WC, memory, count):
    """Write the log's first tokens, so many as count says on the device, to a state and a window."""
    device, log, (key_heads, value_heads, key_dim, value_dim, kernel) = count.device, memory.log, memory.sizes
    arguments, constants = [window_WC, log["conv"], count, memory.channels], (("TOKENS", 1), ("WIDTH", kernel))
    device.launch("causal_conv", "causal_conv_commit", -(-memory.channels // 128), 128, arguments, constants)
    arguments = [state_HKV, log["k"], log["u"], log["decay"], count, key_heads, value_dim]
    grid, constants = (value_heads, -(-value_dim // 32)), _delta_constants(1, key_dim)
    device.launch("gated_delta", "gated_delta_replay", grid, 32 * WARPS, arguments, constants)


def _delta_constants(tokens, key_dim):
    return ("TOKENS", tokens), ("KEY_DIM", key_dim), ("WARPS", WARPS)


# Mixture of experts


class Routes(NamedTuple):
    """Where at most WIDTH tokens go: a slot for each expert that any of them uses, its tokens and their weights."""

    tokens: slice
    slots: object  # int [1], how many are used
    expert_S: object
    tokens_S: object
    weights_ST: object


def best_experts(scores_TE, top_k, scale_E=None):
    """As its twin -> (the chosen, where they are used: a list of Routes)."""
    device, (T, E) = scores_TE.device, scores_TE.shape
    chosen_TX, weights_TX, routes = device.empty((T, top_k), np.int32), device.empty((T, top_k), np.float32), []
    for tokens in groups(T):
        count = len(range(T)[tokens])
        S = min(count * top_k, E)
        shapes = ((1, np.int32), (S, np.int32), (S, np.uint32), ((S, count), np.float32))
        routes.append(Routes(tokens, *(device.empty(*shape) for shape in shapes)))
        arguments = [chosen_TX[tokens], weights_TX[tokens], *routes[-1][1:], scores_TE[tokens], scale_E, E, top_k]
        constants = (("TOKENS", count), ("ACTIVATION", "gelu"), ("SCALE", "f16"), ("GROUP", 32))
        device.launch("experts", "route", 1, 256, arguments, constants)
    return chosen_TX, routes


def mixture(x_TD, chosen_TX, routes, w, activation):
    out = x_TD.device.empty(x_TD.shape, x_TD.dtype)
    for route in routes:
        with out.device.temporary():
            _mixture(out[route.tokens], x_TD[route.tokens], route, w, activation.__name__)
    return out


def _mixture(out_TD, x_TD, route, w, activation):
    """The same for at most WIDTH tokens."""
    device, (T, D), S = x_TD.device, x_TD.shape, len(route.expert_S)
    gate, up, down = w.experts_gate_proj, w.experts_up_proj, w.experts_down_proj
    gated_STF, out_STD = device.empty((S, T, gate.rows), np.float32), device.empty((S, T, D), np.float32)
    constants, used = (("TOKENS", T), ("ACTIVATION", activation), *gate.constants), route[1:4]
    arguments = [gated_STF, x_TD, *gate.arrays, *up.arrays, *used, gate.rows, D]
    device.launch("experts", "experts_gated", (-(-gate.rows // 4), S), 128, arguments, constants)
    constants = (*constants[:2], *down.constants)
    arguments = [out_STD, gated_STF, *down.arrays, *used, D, gate.rows]
    device.launch("experts", "experts_down", (-(-D // 8), S), 128, arguments, constants)
    arguments = [out_TD, out_STD, route.weights_ST, route.slots, route.tokens_S, D]
    device.launch("experts", "experts_sum", (-(-D // 256), T), 256, arguments, constants)
