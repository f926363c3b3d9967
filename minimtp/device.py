"""A device's memory, what runs on it, and graphs of that: on a GPU through CuPy, or on this machine's processor.

Both keep one contract, so that a pass made of kernels is tested where no GPU is. `Host` runs the same sources by
shim.py; every array of its lies between guard pages, and what a capture may not do is refused.
"""

import ctypes
import math
import time
from contextlib import contextmanager
from functools import cache

import numpy as np

from .backend import BackendError, twins
from .kernel_source import OPTIONS, source, three
from .plan import DRIVER, DoesNotFit

ALIGNMENT = 256  # bytes; what CUDA's own allocations have


class Array:
    """Numbers in a device's memory, C-contiguous. Slices along the first axis, and reshaped ones, are views."""

    def __init__(self, device, owner, address, shape, dtype):
        self.device, self.owner, self.address = device, owner, address
        self.shape, self.dtype = tuple(map(int, shape)), np.dtype(dtype)

    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))
    nbytes = property(lambda self: self.size * self.dtype.itemsize)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        """Rows of the first axis, an integer, or a slice without a step: a view. [:, i] of the second: a copy."""
        if isinstance(rows, tuple):
            width, (_, i) = math.prod(self.shape[2:]), rows
            part = twins().columns_of(self.reshape(len(self), -1), i * width, (i + 1) * width)
            return part.reshape(len(self), *self.shape[2:])
        if not isinstance(rows, slice):
            return self[rows : rows + 1].reshape(*self.shape[1:])
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError("a device's array has no slices with a step")
        shape = (max(0, stop - start), *self.shape[1:])
        address = self.address + start * math.prod(self.shape[1:]) * self.dtype.itemsize
        return Array(self.device, self.owner, address, shape, self.dtype)

    def reshape(self, *shape):
        """The same numbers in another shape; one length may be -1."""
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        known = -math.prod(shape) if -1 in shape else 0
        shape = tuple(self.size // known if length == -1 else length for length in shape)
        if math.prod(shape) != self.size:
            raise ValueError(f"{self.shape} cannot be made {shape}")
        return Array(self.device, self.owner, self.address, shape, self.dtype)

    def __add__(self, other):
        return self._with("+", other)

    def __mul__(self, other):
        return self._with("*", other)

    def _with(self, sign, other):
        if isinstance(other, Array):
            return twins().elementwise(f"x {sign} y", self, other)
        return twins().elementwise(f"x {sign} s", self, s=float(other))

    def copy(self):
        """As get: what watches a pass keeps its numbers on the host."""
        return self.get()

    def get(self):
        """-> the same as a NumPy array; waits until it is there."""
        out = np.empty(self.shape, self.dtype)
        self.device.read(out, self.address)
        return out

    def set(self, x):
        """Take over the numbers of a NumPy array of the same size."""
        x = np.ascontiguousarray(x, self.dtype)
        if x.size != self.size:
            raise ValueError(f"{x.shape} does not fill {self.shape}")
        self.device.write(self.address, x)


class Device:
    """What both devices share. A subclass has allocate, read, write, copy, launch, capture, product, arena,
    and to measure: name, seconds and peak_bytes."""

    memory = None  # bytes that models are planned for; None: nobody counts
    graphs = True  # whether caches capture their passes

    def __init__(self):
        self._arena, self._constants, self._numbers = None, {}, {}

    def constant(self, x):
        """A copy of a NumPy array that never changes, made once."""
        if id(x) not in self._constants:
            self._constants[id(x)] = x, self.array(x)  # x as well, so that its id stays its own
        return self._constants[id(x)][1]

    def empty(self, shape, dtype):
        """A new Array: within `working` of its arena, else in memory of its own."""
        shape = (shape,) if isinstance(shape, int) else shape
        size = math.prod(shape) * np.dtype(dtype).itemsize
        owner, address = (self.allocate if self._arena is None else self._arena.take)(size)
        return Array(self, owner, address, shape, dtype)

    def zeros(self, shape, dtype):
        """The same, all zero, in memory of its own."""
        return self.array(np.zeros(shape, dtype))

    def array(self, x):
        """A copy of a NumPy array, in memory of its own."""
        owner, address = self.allocate(x.nbytes)
        out = Array(self, owner, address, x.shape, x.dtype)
        out.set(x)
        return out

    @contextmanager
    def temporary(self):
        """Around what needs arrays for itself: their memory is given again after it."""
        arena = self._arena
        mark = None if arena is None else arena.mark
        yield
        if arena is not None:
            arena.mark = mark

    def number(self, n):
        """An integer in device memory, [1]; made once."""
        if n not in self._numbers:
            self._numbers[n] = self.array(np.array([n], np.int32))
        return self._numbers[n]

    @contextmanager
    def working(self, arena):
        """Around a pass: arrays come from the arena, and what it gave in the pass before is given again."""
        before, self._arena = self._arena, arena
        arena.begin()
        try:
            yield
        finally:
            self._arena = before


class Gpu(Device):
    """The GPU that CuPy sees first. memory: bytes to plan for, and never to exceed (None: all that the card has).

    Raises BackendError, one line, where there is none.
    """

    def __init__(self, memory=None):
        super().__init__()
        try:
            import cupy
        except ImportError:
            raise BackendError("backend 'cupy' needs CuPy: pip install minimtp[cuda12]") from None
        try:
            found = cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise BackendError(f"backend 'cupy' finds no GPU: {error}") from None
        if not found:
            raise BackendError("backend 'cupy' finds no GPU")
        self.cupy, self.stream = cupy, cupy.cuda.Stream(non_blocking=True)  # the null stream cannot be captured
        self._functions = cache(self._function)
        self.memory = cupy.cuda.runtime.memGetInfo()[1] if memory is None else memory
        cupy.get_default_memory_pool().set_limit(size=max(1, self.memory - DRIVER))

    def allocate(self, size):
        try:
            memory = self.cupy.cuda.alloc(max(size, 1))
        except self.cupy.cuda.memory.OutOfMemoryError:
            held = self.cupy.get_default_memory_pool().used_bytes()
            room = f"{held >> 20:,} MiB of {self.memory - DRIVER >> 20:,} are taken"
            raise DoesNotFit(f"the GPU has no room for {max(size >> 20, 1):,} MiB more: {room}") from None
        return memory, memory.ptr

    def read(self, out, address):
        self._transfer(out.ctypes.data, address, out.nbytes, self.cupy.cuda.runtime.memcpyDeviceToHost)
        self.stream.synchronize()

    def write(self, address, x):
        self._transfer(address, x.ctypes.data, x.nbytes, self.cupy.cuda.runtime.memcpyHostToDevice)
        self.stream.synchronize()

    def copy(self, to, array):
        """Copy an Array's bytes to another of the same size."""
        self._transfer(to.address, array.address, array.nbytes, self.cupy.cuda.runtime.memcpyDeviceToDevice)

    def launch(self, file, kernel, grid, block, arguments, constants=(), shared=0):
        """Start a kernel; it runs after all that was started before."""
        function = self._functions(file, kernel, constants)
        if shared > 48 << 10:
            function.max_dynamic_shared_size_bytes = shared
        with self.stream:
            function(three(grid), three(block), tuple(map(_argument, arguments)), shared_mem=shared)

    def capture(self, start):
        """What start() launches, as one graph -> (a function that replays it, what start() returned).

        start() must have run once before, so that its kernels are compiled and its arena is large enough.
        """
        with self.stream:
            self.stream.begin_capture()
            try:
                found = start()
            finally:
                graph = self.stream.end_capture()
        return lambda: graph.launch(self.stream), found

    def product(self, x_TI, w_OI, out_TO):
        """x times the transpose of w, into out, by the library."""
        with self.stream:
            x, w, out = map(self._wrapped, (x_TI, w_OI, out_TO))
            self.cupy.matmul(x, w.T, out=out)

    def synchronize(self):
        self.stream.synchronize()

    def arena(self):
        return Arena(self)

    @property
    def name(self):
        """The card's name."""
        return self.cupy.cuda.runtime.getDeviceProperties(self.cupy.cuda.runtime.getDevice())["name"].decode()

    def peak_bytes(self):
        """The most that its memory pool has held."""
        return self.cupy.get_default_memory_pool().total_bytes()  # it gives nothing back

    def seconds(self, start, repeats, before=None):
        """How long what start() starts takes, so many times -> a list. before() is started ahead of each."""
        event, pairs = self.cupy.cuda.Event, []
        for _ in range(repeats):
            if before is not None:
                before()
            pairs.append((event(), event()))
            pairs[-1][0].record(self.stream)
            start()
            pairs[-1][1].record(self.stream)
        self.stream.synchronize()
        return [self.cupy.cuda.get_elapsed_time(*pair) / 1000 for pair in pairs]

    def _transfer(self, to, source, size, kind):
        self.cupy.cuda.runtime.memcpyAsync(to, source, size, kind, self.stream.ptr)

    def _function(self, file, kernel, constants):
        module = self.cupy.RawModule(code=source(file, constants), options=OPTIONS)
        return module.get_function(kernel)

    def _wrapped(self, array):
        memory = self.cupy.cuda.UnownedMemory(array.address, array.nbytes, array.owner)
        return self.cupy.ndarray(array.shape, array.dtype, self.cupy.cuda.MemoryPointer(memory, 0))


class Arena:
    """One block of memory that passes share, given out from its beginning in every one.

    What does not fit gets memory of its own, and the next pass a block that is large enough: so a pass that ran once
    can be captured, in which nothing may be allocated. What was taken since a mark can be released and given again in
    the same pass: kernels run one after the other.
    """

    def __init__(self, device):
        self.device, self.block, self.room, self.generation = device, (None, 0), 0, 0
        self.mark = self.most = 0

    def begin(self):
        if self.most > self.room:
            self.room, self.block, self.generation = self.most, self.device.allocate(self.most), self.generation + 1
        self.mark = 0

    def take(self, size):
        start, self.mark = self.mark, self.mark + -(-size // ALIGNMENT) * ALIGNMENT
        self.most = max(self.most, self.mark)
        if self.mark > self.room:
            return self.device.allocate(size)
        owner, address = self.block
        return owner, address + start


class Host(Device):
    """This machine's processor in the place of a GPU, to test and to teach: the sources are the same, the speed is not.

    order: in which the threads of a block run (shim.ORDERS).
    """

    name = "host"

    def __init__(self, order="forward"):
        super().__init__()
        self.order, self._recording = order, None

    def allocate(self, size):
        from .shim import Guarded

        self._refuse_in_capture("memory is allocated")
        memory = Guarded(size)
        return memory, memory.address

    def read(self, out, address):
        self._refuse_in_capture("the host waits for the device")
        ctypes.memmove(out.ctypes.data, address, out.nbytes)

    def write(self, address, x):
        self._refuse_in_capture("the host waits for the device")
        ctypes.memmove(address, x.ctypes.data, x.nbytes)

    def copy(self, to, array):
        """Copy an Array's bytes to another of the same size."""
        self._do(lambda: ctypes.memmove(to.address, array.address, array.nbytes))

    def launch(self, file, kernel, grid, block, arguments, constants=(), shared=0):
        """Run a kernel. Raises shim.KernelError for what a GPU would not forgive."""
        from .shim import compiled, start

        module, values = compiled(source(file, constants)), list(map(_argument, arguments))
        self._do(lambda: start(module, kernel, grid, block, values, shared, self.order))

    def capture(self, start):
        """What start() launches -> (a function that does it, what start() returned); start() must have run before."""
        self._recording = launches = []
        try:
            found = start()
        finally:
            self._recording = None

        def replay():
            for launch in launches:
                launch()

        return replay, found

    def product(self, x_TI, w_OI, out_TO):
        """x times the transpose of w, into out, by the library."""
        self._refuse_in_capture("a library is called")
        out_TO.set(x_TI.get() @ w_OI.get().T)

    def synchronize(self):
        self._refuse_in_capture("the host waits for the device")

    def arena(self):
        return HostArena(self)

    def peak_bytes(self):
        """Not counted."""
        return None

    def seconds(self, start, repeats, before=None):
        """How long what start() starts takes, so many times -> a list. before() is started ahead of each."""
        taken = []
        for _ in range(repeats):
            if before is not None:
                before()
            clock = time.perf_counter()
            start()
            taken.append(time.perf_counter() - clock)
        return taken

    def _do(self, action):
        if self._recording is None:
            action()
        else:
            self._recording.append(action)

    def _refuse_in_capture(self, what):
        if self._recording is not None:
            raise RuntimeError(f"{what} while a graph is captured")


class HostArena:
    """The same contract, but every array lies between guard pages of its own, and is poison when it is given again."""

    generation = 0  # what was given once stays where it is

    def __init__(self, device):
        self.device, self.given, self.mark = device, {}, 0

    def begin(self):
        self.mark = 0

    def take(self, size):
        key, self.mark = (self.mark, size), self.mark + 1
        if key not in self.given:
            self.given[key] = self.device.allocate(size)[0]
        memory = self.given[key]
        self.device._do(memory.poison)
        return memory, memory.address


def _argument(value):
    """A kernel's argument as the bytes it takes: an address, or 32 bits."""
    if value is None or isinstance(value, Array):
        return np.uint64(0 if value is None else value.address)
    return np.float32(value) if isinstance(value, float) else np.int32(value)


def open_device(backend):
    """The device of that name, None for "numpy"; a Device is its own. Raises BackendError where it is not there."""
    if isinstance(backend, Device):
        return backend
    if backend not in ("numpy", "cupy"):
        raise BackendError(f"backend {backend!r} is not available: expected numpy or cupy")
    return None if backend == "numpy" else Gpu()
