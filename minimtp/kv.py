"""The memories of attention layers: keys and values in a storage of one's choice, and how to un-read them."""

import operator

import numpy as np

from .kv_storage import STORAGES
from .layers import Blocks

SLACK = 16  # free slots beyond what a window must hold, so that not every append moves entries


class CacheError(ValueError):
    """A cache was asked for something it cannot do; it is unchanged."""


class Counted:
    """A memory that un-reads by counting back: `length` tokens read, the first `committed` of them final."""

    def rollback(self, n):
        """Un-read the last n tokens. Raises CacheError past the last commit."""
        check_rollback(n, self.length - self.committed)
        self.length -= n

    def commit(self):
        """Make everything read so far final."""
        self.committed = self.length


class Buffered(Counted):
    """Keys and values, or values alone, in `buffers` [G, slots, ..], by what `names` and `storage` call their parts."""

    @property
    def slots(self):
        """How many tokens the buffers have room for."""
        return self.buffers["v"].shape[1]

    @property
    def nbytes(self):
        """Bytes of the buffers, free slots included."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def new_buffers(self, slots, empty=np.empty):
        """Buffers of so many slots, with nothing in them yet."""
        G, K = self.shape
        return {
            name + suffix: empty((G, slots, width or K), part)
            for name in self.names
            for suffix, (part, width) in self.storage.parts.items()
        }


class FullKV(Buffered):
    """Keys and values of every token read; slot 0 holds position `start`.

    storage: how they are kept, None for floats of `dtype`, in which they come and are read. keys_of(v_GBK, position),
    where given, makes the keys at consecutive positions of their values: then only values are kept.
    """

    def __init__(self, kv_heads, head_dim, dtype=np.float32, slots=0, storage=None, keys_of=None):
        self.shape, self.dtype = (kv_heads, head_dim), np.dtype(dtype)
        plain = STORAGES[self.dtype.name]
        self.storage, self.keys_of = storage or plain, keys_of
        self.names = ("k", "v") if keys_of is None else ("v",)
        self.as_arrays = self.storage is plain and keys_of is None
        self.buffers = self.new_buffers(slots)
        self.start = self.length = self.committed = 0

    def append(self, k_TGK, v_TGK):
        """Take in the keys and values of the next T tokens, both [T, G, K]."""
        self._make_room(len(v_TGK))
        first = self.length - self.start
        for name in self.names:
            for suffix, part_TGK in self.storage.encode(k_TGK if name == "k" else v_TGK).items():
                self.buffers[name + suffix][:, first : first + len(v_TGK)] = part_TGK.swapaxes(0, 1)
        self.length += len(v_TGK)

    def read(self):
        """(k_GSK, v_GSK) of the positions start .. length - 1, in order: views, or Blocks where these must be made."""
        used = self.length - self.start
        if self.as_arrays:
            return self.buffers["k"][:, :used], self.buffers["v"][:, :used]
        shape = self.shape[0], used, self.shape[1]
        return Blocks(shape, self.start, self._keys), Blocks(shape, self.start, self._values)

    def state(self):
        """What `restore` needs, as named host arrays: what is held as it is stored."""
        return {name: buffer[:, : self.length - self.start] for name, buffer in self.buffers.items()}

    def restore(self, state, length):
        """Take over a saved state of `length` tokens. Raises CacheError where its shapes are not this memory's."""
        slots = self._slots_for(length)
        for name, buffer in self.buffers.items():
            check_saved(state[name], (len(buffer), slots, buffer.shape[2]), buffer.dtype)
        self.start = self.length = self.committed = length - slots
        self._make_room(slots)
        for name, buffer in self.buffers.items():
            buffer[:, :slots] = state[name]
        self.length += slots
        self.commit()

    def _values(self, first, last):
        return self._decode("v", first, last)

    def _keys(self, first, last):
        if self.keys_of is None:
            return self._decode("k", first, last)
        return self.keys_of(self._decode("v", first, last), self.start + first)

    def _decode(self, name, first, last):
        parts = {suffix: self.buffers[name + suffix][:, first:last] for suffix in self.storage.parts}
        return self.storage.decode(parts, self.dtype)

    def _slots_for(self, length):
        return length

    def _make_room(self, count):
        needed = self.length - self.start + count
        if needed > self.slots:
            self._move(self.start, max(needed, 2 * self.slots))

    def _move(self, start, slots):
        """Keep the positions from `start` on, in new buffers (an interrupted move leaves the old ones whole)."""
        held, moved = slice(start - self.start, self.length - self.start), self.new_buffers(slots)
        for name, buffer in self.buffers.items():
            moved[name][:, : self.length - start] = buffer[:, held]
        self.buffers, self.start = moved, start


class SlidingKV(FullKV):
    """Keys and values of the last window + 1 committed tokens, and of everything uncommitted.

    A target's layer attends over `window` tokens, itself included; the drafter of the next token sees one more.
    """

    def __init__(self, kv_heads, head_dim, window, dtype=np.float32, storage=None):
        super().__init__(kv_heads, head_dim, dtype, storage=storage)
        self.keep = window + 1

    def commit(self):
        super().commit()
        if self.slots > self.keep + SLACK:
            self._move(self._first_needed(), self.keep + SLACK)

    def state(self):
        unneeded = self.length - self.start - self._slots_for(self.length)
        return {name: array[:, unneeded:] for name, array in super().state().items()}

    def _slots_for(self, length):
        return min(length, self.keep)

    def _first_needed(self):
        return max(self.start, self.committed - self.keep)

    def _make_room(self, count):
        if self.length - self.start + count > self.slots:
            first = self._first_needed()
            uncommitted = self.length + count - self.committed
            self._move(first, self.committed - first + uncommitted + max(SLACK, uncommitted // 2))


def check_rollback(n, uncommitted):
    """Raise CacheError unless n tokens can be un-read, TypeError unless n is an integer."""
    if not 0 <= operator.index(n) <= uncommitted:
        raise CacheError(f"cannot roll back {n} tokens: {uncommitted} were read since the last commit")


def check_saved(array, shape, dtype):
    """Raise CacheError unless a saved array is what the memory holds."""
    if array.shape != shape or array.dtype != dtype:
        raise CacheError(f"a saved tensor is {array.dtype} {array.shape}, expected {dtype} {shape}")


def integers(array, size=None):
    """The array, if it holds ids or lengths. Raises CacheError."""
    if array.ndim != 1 or array.dtype != np.int64 or size not in (None, len(array)) or (array < 0).any():
        raise CacheError(f"a saved tensor of ids or lengths is {array.dtype} {array.shape}")
    return array
