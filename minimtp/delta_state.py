"""The memory of a Gated DeltaNet layer: a recurrent state, and how to un-read it."""

from dataclasses import dataclass, replace

import numpy as np

from .backend import ROWS
from .kv import check_rollback, check_saved
from .layers import delta_writes

SNAPSHOT = 64  # tokens that may lie between two states which a DeltaState keeps for un-reading


@dataclass(frozen=True, eq=False)
class _Reading:
    """What one pass left in a DeltaState: its inputs to the convolution, its writes, and perhaps the state after it."""

    stop: int
    conv_TC: np.ndarray
    k_TGK: np.ndarray
    u_THV: np.ndarray
    log_decay_TH: np.ndarray
    after_HKV: np.ndarray | None

    @property
    def arrays(self):
        return self.conv_TC, self.k_TGK, self.u_THV, self.log_decay_TH

    def first(self, count):
        """The pass as if it had read only `count` tokens."""
        rest = len(self.u_THV) - count
        return _Reading(self.stop - rest, *(array[:count].copy() for array in self.arrays), None)


class DeltaState:
    """A Gated DeltaNet layer's memory: the state [H, K, V] and the last W - 1 inputs of its convolution.

    A state cannot be trimmed. So until the commit each pass's writes are kept, and un-reading starts from the last
    state kept before the cut and writes again what came between: after narrow passes with the same operations, so to
    the same bits. Kept are the committed state, the present one, those of wide passes, and one every SNAPSHOT tokens.
    """

    def __init__(self, key_heads, value_heads, key_dim, value_dim, kernel, dtype=np.float32):
        self.sizes = key_heads, value_heads, key_dim, value_dim, kernel
        channels = 2 * key_heads * key_dim + value_heads * value_dim
        conv_TC, state_HKV = np.zeros((kernel - 1, channels), dtype), np.zeros((value_heads, key_dim, value_dim), dtype)
        self._readings = [self._final(0, conv_TC, state_HKV)]

    def _final(self, length, conv_TC, state_HKV):
        """The first reading of the list: no pass, but where everything begins that is not final."""
        key_heads, value_heads, key_dim, value_dim, _ = self.sizes
        nothing = ((0, key_heads, key_dim), (0, value_heads, value_dim), (0, value_heads))
        return _Reading(length, conv_TC, *(np.empty_like(state_HKV, shape=shape) for shape in nothing), state_HKV)

    @property
    def length(self):
        """Number of tokens read."""
        return self._readings[-1].stop

    @property
    def committed(self):
        """Number of tokens that are final."""
        return self._readings[0].stop

    @property
    def nbytes(self):
        """Bytes of the states and of what was written since the commit."""
        arrays = [array for reading in self._readings for array in (*reading.arrays, reading.after_HKV)]
        return sum(array.nbytes for array in arrays if array is not None)

    @property
    def state_HKV(self):
        """The present state."""
        return self._readings[-1].after_HKV

    def window(self):
        """The last W - 1 inputs of the convolution [W - 1, C], zeros where there were fewer."""
        wanted, parts = self.sizes[-1] - 1, []
        for reading in reversed(self._readings):
            parts.insert(0, reading.conv_TC[max(0, len(reading.conv_TC) - wanted) :])
            wanted -= len(parts[0])
            if not wanted:
                break
        return np.concatenate(parts)

    def append(self, conv_TC, k_TGK, u_THV, log_decay_TH, state_HKV):
        """Take in a pass: inputs of the convolution, keys, writes and log decays of its tokens, the state after it."""
        readings = self._readings
        new = _Reading(self.length + len(conv_TC), conv_TC, k_TGK, u_THV, log_decay_TH, state_HKV)
        kept = next(reading.stop for reading in reversed(readings[:-1] or readings) if reading.after_HKV is not None)
        if len(readings) > 1 and len(readings[-1].u_THV) <= ROWS and new.stop - kept <= SNAPSHOT:
            readings = [*readings[:-1], replace(readings[-1], after_HKV=None)]
        self._readings = [*readings, new]

    def rollback(self, n):
        """Un-read the last n tokens. Raises CacheError past the last commit."""
        check_rollback(n, self.length - self.committed)
        if n:
            self._readings = self._until(self.length - n)

    def _until(self, length):
        kept = [reading for reading in self._readings if reading.stop <= length]
        if kept[-1].stop < length:
            kept.append(self._readings[len(kept)].first(length - kept[-1].stop))
        start = max(i for i, reading in enumerate(kept) if reading.after_HKV is not None)
        state_HKV = kept[start].after_HKV
        for reading in kept[start + 1 :]:
            state_HKV = delta_writes(reading.k_TGK, reading.u_THV, reading.log_decay_TH, state_HKV)
        return [*kept[:-1], replace(kept[-1], after_HKV=state_HKV)]

    def commit(self):
        """Make everything read so far final."""
        self._readings = [self._final(self.length, self.window(), self.state_HKV)]

    def state(self):
        """What `restore` needs, as named host arrays."""
        return {"state": self.state_HKV, "window": self.window()}

    def restore(self, state, length):
        """Take over a saved state after `length` tokens. Raises CacheError where its shapes are not this memory's."""
        wanted = self.state()
        for name, saved in state.items():
            check_saved(saved, wanted[name].shape, wanted[name].dtype)
        self._readings = [self._final(length, state["window"].copy(), state["state"].copy())]
