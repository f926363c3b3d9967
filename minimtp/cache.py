"""What a model remembers of the tokens it has read, and how to un-read them.

Every kind of memory keeps one contract: append(...) while reading, rollback(n) to un-read the last n tokens, any
number of times, down to the last commit, commit() to make everything read so far final and free what only
un-reading needed. A `Cache` is the memories of all layers, the drafter's own entries, and the ids read.
"""

import operator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from .backend import to_host
from .checkpoint import read_safetensors, write_safetensors

SLACK = 16  # free slots beyond what a window must hold, so that not every append moves entries


class CacheError(ValueError):
    """A cache was asked for something it cannot do; it is unchanged."""


class FullKV:
    """Keys and values of every token read. The buffers are [G, slots, K]; slot 0 holds position `start`."""

    def __init__(self, kv_heads, head_dim, dtype=np.float32, slots=0, xp=np):
        self.k_GSK = xp.empty((kv_heads, slots, head_dim), dtype)
        self.v_GSK = xp.empty((kv_heads, slots, head_dim), dtype)
        self.start = self.length = self.committed = 0

    @property
    def nbytes(self):
        """Bytes of the buffers, free slots included."""
        return self.k_GSK.nbytes + self.v_GSK.nbytes

    def append(self, k_TGK, v_TGK):
        """Take in the keys and values of the next T tokens, both [T, G, K]."""
        self._make_room(len(k_TGK))
        first = self.length - self.start
        slots = slice(first, first + len(k_TGK))
        self.k_GSK[:, slots] = k_TGK.swapaxes(0, 1)
        self.v_GSK[:, slots] = v_TGK.swapaxes(0, 1)
        self.length += len(k_TGK)

    def read(self):
        """(k_GSK, v_GSK) of the positions start .. length - 1, in order, as views."""
        used = self.length - self.start
        return self.k_GSK[:, :used], self.v_GSK[:, :used]

    def rollback(self, n):
        """Un-read the last n tokens. Raises CacheError past the last commit."""
        check_rollback(n, self.length - self.committed)
        self.length -= n

    def commit(self):
        """Make everything read so far final."""
        self.committed = self.length

    def state(self):
        """What `restore` needs, as named host arrays."""
        k_GSK, v_GSK = self.read()
        return {"k": to_host(k_GSK), "v": to_host(v_GSK)}

    def restore(self, state, length):
        """Take over a saved state of `length` tokens. Raises CacheError where its shapes are not this memory's."""
        k_GSK, v_GSK = state["k"], state["v"]
        heads, slots, head_dim = self.k_GSK.shape[0], self._slots_for(length), self.k_GSK.shape[2]
        for saved in (k_GSK, v_GSK):
            if saved.shape != (heads, slots, head_dim) or saved.dtype != self.k_GSK.dtype:
                found, wanted = f"{saved.dtype} {saved.shape}", f"{self.k_GSK.dtype} {(heads, slots, head_dim)}"
                raise CacheError(f"a saved tensor of keys or values is {found}, expected {wanted}")
        self.start = self.length = self.committed = length - slots
        self.append(k_GSK.swapaxes(0, 1), v_GSK.swapaxes(0, 1))
        self.commit()

    def _slots_for(self, length):
        return length

    def _make_room(self, count):
        needed, slots = self.length - self.start + count, self.k_GSK.shape[1]
        if needed > slots:
            self._move(self.start, max(needed, 2 * slots))

    def _move(self, start, slots):
        """Keep the positions from `start` on, in new buffers (an interrupted move leaves the old ones whole)."""
        held = slice(start - self.start, self.length - self.start)
        k_GSK, v_GSK = _moved(self.k_GSK, held, slots), _moved(self.v_GSK, held, slots)
        self.k_GSK, self.v_GSK, self.start = k_GSK, v_GSK, start


class SlidingKV(FullKV):
    """Keys and values of the last window + 1 committed tokens, and of everything uncommitted.

    A target's layer attends over `window` tokens, itself included; the drafter of the next token sees one more.
    """

    def __init__(self, kv_heads, head_dim, window, dtype=np.float32, xp=np):
        super().__init__(kv_heads, head_dim, dtype, xp=xp)
        self.keep = window + 1

    def commit(self):
        super().commit()
        if self.k_GSK.shape[1] > self.keep + SLACK:
            self._move(self._first_needed(), self.keep + SLACK)

    def state(self):
        unneeded = self.length - self.start - self._slots_for(self.length)
        return {name: array[:, unneeded:] for name, array in super().state().items()}

    def _slots_for(self, length):
        return min(length, self.keep)

    def _first_needed(self):
        return max(self.start, self.committed - self.keep)

    def _make_room(self, count):
        if self.length - self.start + count > self.k_GSK.shape[1]:
            first = self._first_needed()
            uncommitted = self.length + count - self.committed
            self._move(first, self.committed - first + uncommitted + max(SLACK, uncommitted // 2))


def _integers(array, size=None):
    if array.ndim != 1 or array.dtype != np.int64 or size not in (None, len(array)) or (array < 0).any():
        raise CacheError(f"a saved tensor of ids or lengths is {array.dtype} {array.shape}")
    return array


def _moved(buffer_GSK, held, slots):
    out_GSK = np.empty_like(buffer_GSK, shape=(buffer_GSK.shape[0], slots, buffer_GSK.shape[2]))
    out_GSK[:, : held.stop - held.start] = buffer_GSK[:, held]
    return out_GSK


def check_rollback(n, uncommitted):
    """Raise CacheError unless n tokens can be un-read, TypeError unless n is an integer."""
    if not 0 <= operator.index(n) <= uncommitted:
        raise CacheError(f"cannot roll back {n} tokens: {uncommitted} were read since the last commit")


@dataclass(eq=False)
class Cache:
    """One sequence's memory: one entry per layer that has its own, the drafter's slot, and the ids read.

    `capacity` is the most tokens it may hold; `fingerprint` names the model, and a saved cache loads into no other.
    """

    layers: list
    capacity: int
    fingerprint: str = ""
    drafter: FullKV | None = None
    tokens: list = field(default_factory=list)
    committed: int = 0

    @property
    def length(self):
        """Number of tokens read."""
        return len(self.tokens)

    @property
    def nbytes(self):
        """Bytes of all buffers."""
        return sum(memory.nbytes for memory in self._memories().values())

    @contextmanager
    def reading(self, ids_T):
        """Around a forward pass over ids_T: they count as read if it succeeds, and leave no trace if it does not.

        Yields the position of the first. Raises CacheError where they do not fit.
        """
        if self.length + len(ids_T) > self.capacity:
            raise CacheError(f"{self.length + len(ids_T)} tokens do not fit a context of {self.capacity}")
        try:
            yield self.length
        except BaseException:
            self._cut(self.length)
            raise
        self.tokens.extend(ids_T)

    def rollback(self, n):
        """Un-read the last n tokens. Raises CacheError, and changes nothing, past the last commit."""
        check_rollback(n, self.length - self.committed)
        self._cut(self.length - n)
        del self.tokens[self.length - n :]

    def commit(self):
        """Make everything read so far final, and free what only un-reading needed."""
        self.committed = self.length
        for memory in self._memories().values():
            memory.commit()

    def save(self, path):
        """Write everything read so far to a safetensors file, atomically; the file's cache counts as committed."""
        arrays = {"tokens": np.array(self.tokens, np.int64)}
        for name, memory in self._memories().items():
            arrays |= {f"{name}.{key}": array for key, array in memory.state().items()}
            arrays[f"{name}.length"] = np.array([memory.length], np.int64)
        write_safetensors(path, arrays, {"format": "minimtp-cache", "fingerprint": self.fingerprint})

    def restore(self, path):
        """Fill this new cache from a file that `save` wrote. Raises CacheError where it is not this model's."""
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") != "minimtp-cache":
            raise CacheError(f"{path} is not a saved cache")
        if metadata.get("fingerprint") != self.fingerprint:
            raise CacheError(f"{path} is the cache of another model, or of other weights or another dtype")
        arrays = {name: tensor.stored() for name, tensor in tensors.items()}
        try:
            tokens = _integers(arrays.pop("tokens")).tolist()
            for name, memory in self._memories().items():
                (length,) = _integers(arrays.pop(f"{name}.length"), size=1)
                memory.restore({key: arrays.pop(f"{name}.{key}") for key in memory.state()}, int(length))
        except KeyError as missing:
            raise CacheError(f"{path} has no tensor {missing}") from None
        if arrays or len(tokens) > self.capacity or any(layer.length != len(tokens) for layer in self.layers):
            raise CacheError(f"{path} does not hold one sequence of at most {self.capacity} tokens")
        self.tokens, self.committed = tokens, len(tokens)

    def _cut(self, length):
        """Cut every memory back to that many tokens; after an interruption it can be done again."""
        for memory in self._memories().values():
            memory.rollback(max(0, memory.length - length))

    def _memories(self):
        named = {f"layers.{i}": layer for i, layer in enumerate(self.layers)}
        return named if self.drafter is None else {**named, "drafter": self.drafter}
