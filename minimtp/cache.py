"""What a model remembers of the tokens it has read: the memories of all layers, the drafter's, and the ids.

Every kind of memory keeps one contract: append(...) while reading, rollback(n) to un-read the last n tokens, any
number of times, down to the last commit, commit() to make everything read so far final and free what only
un-reading needed.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from .checkpoint import read_safetensors, write_safetensors
from .drafter_kv import DrafterKV
from .kv import CacheError, check_rollback, integers


@dataclass(eq=False)
class Cache:
    """One sequence's memory: one entry per layer that has its own, the drafter's slot, and the ids read.

    `capacity` is the most tokens it may hold; `fingerprint` names the model, and a saved cache loads into no other.
    """

    layers: list
    capacity: int
    fingerprint: str = ""
    drafter: DrafterKV | None = None
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

    def run(self, read, *inputs, writes=(), key=None):
        """read(*inputs): a pass of the target or its drafter. A device's cache runs it there, see device_cache."""
        return read(*inputs)

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
            raise CacheError(f"{path} is the cache of another model, or of other weights, another dtype or KV storage")
        arrays = {name: tensor.stored() for name, tensor in tensors.items()}
        try:
            tokens = integers(arrays.pop("tokens")).tolist()
            for name, memory in self._memories().items():
                (length,) = integers(arrays.pop(f"{name}.length"), size=1)
                memory.restore({key: arrays.pop(f"{name}.{key}") for key in memory.state()}, int(length))
        except KeyError as missing:
            raise CacheError(f"{path} has no tensor {missing}") from None
        lengths = {memory.length for memory in self._memories().values()}
        if arrays or len(tokens) > self.capacity or not lengths <= {len(tokens)}:
            raise CacheError(f"{path} does not hold one sequence of at most {self.capacity} tokens")
        self.tokens, self.committed = tokens, len(tokens)

    def _cut(self, length):
        """Cut every memory back to that many tokens; after an interruption it can be done again."""
        for memory in self._memories().values():
            memory.rollback(max(0, memory.length - length))

    def _memories(self):
        named = {f"layers.{i}": layer for i, layer in enumerate(self.layers)}
        return named if self.drafter is None else {**named, "drafter": self.drafter}
