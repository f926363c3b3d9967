"""The one matrix product, its threads and buffers, and where an operation finds its twin on a device."""

import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, wraps
from importlib import import_module
from typing import NamedTuple

import numpy as np

ROWS = 16  # a pass of at most this many tokens computes every token by itself ("rows"); a wider one by GEMM
# One tile of a weight, as float32: small enough to stay in the shared cache while all tokens use it, and large enough
# that threads do not meet: between two of NumPy's operations each needs the interpreter's lock.
TILE_BYTES = 4 << 20
POOL_BYTES = 4 << 20  # below this a weight is multiplied by the calling thread alone


class BackendError(ValueError):
    """The backend that was asked for is not there."""


def with_kernel(operation):
    """An operation on NumPy arrays which, where its first argument lies on a device, is kernel_ops' one of its name."""

    @wraps(operation)
    def either(x, *arguments, **options):
        if isinstance(x, np.ndarray):
            return operation(x, *arguments, **options)
        return getattr(twins(), operation.__name__)(x, *arguments, **options)

    return either


def twins():
    """kernel_ops, which only a device needs."""
    return import_module(".kernel_ops", __package__)


def to_host(x):
    """x as a NumPy array (x itself where it is one already)."""
    return x if isinstance(x, np.ndarray) else x.get()


@cache
def _blas():
    from threadpoolctl import ThreadpoolController  # minimtp.oracle needs only NumPy

    return ThreadpoolController()


UNWARNED = dict(over="ignore", invalid="ignore")


@contextmanager
def arithmetic():
    """Around a pass: a BLAS call runs on the thread that makes it, so that the pool below is the only parallelism.

    How BLAS divides a product over its threads depends on the shape, and with it the order of sums. Overflow passes
    without a warning: what comes of it is not a number, and no law is made of that.
    """
    with _blas().limit(limits=1, user_api="blas"), np.errstate(**UNWARNED):
        yield


THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@cache
def _pool():
    return ThreadPoolExecutor(THREADS, initializer=lambda: np.seterr(**UNWARNED))  # a thread does not inherit it


_buffers = threading.local()


def scratch(name, shape, dtype):
    """This thread's array under a name, with what its last use left in it.

    Fresh memory for every tile would be paged in every time, and threads wait for one another where that is done.
    """
    dtype, held = np.dtype(dtype), vars(_buffers).get(name)
    size = math.prod(shape) * dtype.itemsize
    if held is None or len(held) < size:
        held = vars(_buffers)[name] = np.empty(size, np.uint8)
    return held[:size].view(dtype).reshape(shape)


@cache
def tiles(rows, columns):
    """Row ranges that cut a [rows, columns] weight: heights a multiple of 64, never a last range of one row.

    The same for dense and packed weights. A product with one row would take BLAS's dot instead of its
    matrix-vector kernel, and so another order of sums.
    """
    count = -(-rows // max(64, TILE_BYTES // (4 * columns) // 64 * 64))
    height = -(-rows // count // 64) * 64
    starts = list(range(0, rows, height))
    if len(starts) > 1 and rows - starts[-1] == 1:
        starts.pop()
    return tuple(zip(starts, [*starts[1:], rows]))


class Rounded(NamedTuple):
    """A weight whose product rounds what goes in and what comes out to 8 bits, each by a fixed scale, as QAT did."""

    weight: object  # an array, or a weight object
    input_scale: float | None  # None: not rounded
    output_scale: float | None

    @property
    def shape(self):
        return self.weight.shape

    def take(self, ids_T, dtype):
        """Rows of the weight: in a product with them nothing is rounded."""
        return gather(self.weight, ids_T, dtype)


def round_activations(x, scale):
    """The nearest of scale · (-128 … 127), ties to even, in x's dtype; scale None leaves x alone.

    `apply_srq` of transformers (integrations/gemma_quant.py).
    """
    if scale is None:
        return x
    scale = x.dtype.type(scale)
    return np.clip(np.rint(x / scale), -128, 127) * scale


def _tile(w, start, stop, dtype):
    if isinstance(w, np.ndarray):
        return w[start:stop]
    return w.rows(start, stop, dtype, scratch("tile", (stop - start, w.shape[1]), dtype))


@with_kernel
def matmul(x_TI, w_OI):
    """x_TI times the transpose of a weight -> [T, O], in x's dtype.

    w_OI is an array, or anything with `shape` and `rows(start, stop, dtype, out) -> [stop - start, I]`, or one of them
    Rounded. Up to ROWS tokens each is multiplied by itself, so its result does not depend on how many share the pass.
    Of a large weight every thread takes the next tile: one is multiplied while another is unpacked.
    """
    if isinstance(w_OI, Rounded):
        out_TO = matmul(round_activations(x_TI, w_OI.input_scale), w_OI.weight)
        return round_activations(out_TO, w_OI.output_scale)
    if not len(x_TI):
        return np.empty((0, w_OI.shape[0]), x_TI.dtype)  # nothing to unpack the weight for
    parts = tiles(*w_OI.shape)
    if len(parts) == 1:
        return _product(x_TI, _tile(w_OI, *parts[0], x_TI.dtype))
    out_TO, left = np.empty((len(x_TI), w_OI.shape[0]), x_TI.dtype), iter(parts)

    def work():
        for start, stop in left:
            out_TO[:, start:stop] = _product(x_TI, _tile(w_OI, start, stop, x_TI.dtype))

    if w_OI.shape[0] * w_OI.shape[1] * 4 < POOL_BYTES:
        work()
    else:
        for done in [_pool().submit(work) for _ in range(min(THREADS, len(parts)))]:
            done.result()
    return out_TO


def _product(x_TI, tile_OI):
    """x_TI times the tile's transpose; in a narrow pass one matrix-vector product for each token."""
    if len(x_TI) > ROWS:
        return x_TI @ tile_OI.T
    return np.matmul(tile_OI, np.ascontiguousarray(x_TI)[:, :, None])[:, :, 0]


def gather(w_VD, ids_T, dtype):
    """Rows `ids_T` of an embedding (an array or a weight object) -> [T, D]."""
    if hasattr(w_VD, "gather"):  # on a device
        return twins().gather(w_VD, ids_T, dtype)
    return w_VD[ids_T] if isinstance(w_VD, np.ndarray) else w_VD.take(ids_T, dtype)
