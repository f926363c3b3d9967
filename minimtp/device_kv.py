"""Keys and values on a device, in buffers that a captured pass can write to and read from without moving them."""

import numpy as np

from .backend import BackendError
from .kv import Buffered, Counted, check_saved
from .kv_storage import STORAGES

HEAD_DIMS = (16, 32, 64, 128, 256, 512)
ROOM = 16  # of an empty memory, in tokens: a pass of a draft finds its room, so that a captured one needs no more


class DeviceMemory(Counted):
    """A memory that kernels write: `advance` counts their entries, `moves` how often buffers were exchanged."""

    length = committed = moves = 0

    def advance(self, count):
        """Count the entries of a pass."""
        self.length += count


class DeviceKV(DeviceMemory, Buffered):
    """Keys and values of one attention layer, [G, slots, K], with the contract of kv.FullKV and kv.SlidingKV.

    Position p lies in slot p, or with a window in slot p % slots: a ring, that holds the window, one entry more (see
    SlidingKV) and everything uncommitted. storage: a name of kv_storage.STORAGES. keys_of: what makes a key of its
    value (norm's weight, frequencies, how many turn), where only values are kept.
    """

    def __init__(self, device, kv_heads, head_dim, storage, slots=0, window=None, keys_of=None):
        if head_dim not in HEAD_DIMS:
            raise BackendError(f"heads of width {head_dim} have no kernel: {', '.join(map(str, HEAD_DIMS))} have")
        self.device, self.shape, self.storage_name, self.keys_of = device, (kv_heads, head_dim), storage, keys_of
        self.storage, self.values_only = STORAGES[storage], keys_of is not None
        self.keep = None if window is None else window + 1
        self.names = ("k", "v") if keys_of is None else ("v",)
        self.buffers = self.new_buffers(slots or (self.keep or 0) + ROOM, device.empty)

    def make_room(self, count):
        """Make sure that a pass of so many tokens finds its slots."""
        needed = self.length + count
        if self.keep is not None:
            needed -= max(0, min(self.committed, self.length) - self.keep)
        if needed > self.slots:
            self._move(max(needed + ROOM, self.slots * (2 if self.keep is None else 1)))

    def state(self):
        """What `restore` needs, as named host arrays: the entries that count, in the order of their positions."""
        at = self._slots_of(self._first(), self.length)
        return {name: buffer.get()[:, at] for name, buffer in self.buffers.items()}

    def restore(self, state, length):
        """Take over a saved state of `length` tokens. Raises CacheError where its shapes are not this memory's."""
        count = length if self.keep is None else min(length, self.keep)
        for name, buffer in self.buffers.items():
            check_saved(state[name], (len(buffer), count, buffer.shape[2]), buffer.dtype)
        self.length = self.committed = length - count
        self.make_room(count)
        at = self._slots_of(length - count, length)
        for name, buffer in self.buffers.items():
            whole = buffer.get()
            whole[:, at] = state[name]
            buffer.set(whole)
        self.length = self.committed = length

    def _first(self):
        """The oldest position that may still be read."""
        return 0 if self.keep is None else max(0, self.length - self.keep)

    def _slots_of(self, start, stop):
        return np.arange(start, stop) % max(self.slots, 1)

    def _move(self, slots):
        """Keep what may still be read, in larger buffers."""
        first = max(0, min(self.committed, self.length) - (self.keep or self.length))
        before, runs = self.buffers, list(_runs(first, self.length, self.slots, slots))
        self.buffers = self.new_buffers(slots, self.device.empty)
        for name, buffer in self.buffers.items():
            for old_SK, new_SK in ((before[name][g], buffer[g]) for g in range(len(buffer))):
                for old, new, count in runs:
                    self.device.copy(new_SK[new : new + count], old_SK[old : old + count])
        self.moves += 1


def _runs(start, stop, old, new):
    """Positions from start to stop, in runs that neither ring cuts -> (slot in the old one, in the new one, count)."""
    while start < stop:
        count = min(stop - start, old - start % old, new - start % new)
        yield start % old, start % new, count
        start += count
