"""The memory of a Gated DeltaNet layer on a device: the committed state, and a log of the tokens read since."""

import numpy as np

from .device_kv import ROOM, DeviceMemory
from .kernel_ops import commit_delta
from .kv import check_saved


class DeviceState(DeviceMemory):
    """State [H, K, V] and window [W - 1, C] at the commit, and what kernels log of every token since.

    The contract of delta_state.DeltaState. A pass writes the logged tokens again in registers before it reads its own
    (kernels/gated_delta.cu), so un-reading only counts back. logged: how many tokens of the log count before each token
    of a pass, in device memory, where the cache puts it.
    """

    logged = None

    def __init__(self, device, key_heads, value_heads, key_dim, value_dim, kernel):
        self.device, self.sizes = device, (key_heads, value_heads, key_dim, value_dim, kernel)
        self.state_HKV = device.zeros((value_heads, key_dim, value_dim), np.float32)
        self.window_WC = device.zeros((kernel - 1, self.channels), np.float32)
        self.log = self._new_log(ROOM)

    @property
    def channels(self):
        """Of the convolution: of queries, keys and values."""
        key_heads, value_heads, key_dim, value_dim, _ = self.sizes
        return 2 * key_heads * key_dim + value_heads * value_dim

    @property
    def nbytes(self):
        """Bytes of state, window and log."""
        return sum(array.nbytes for array in (self.state_HKV, self.window_WC, *self.log.values()))

    def make_room(self, count):
        """Make sure that the log has room for a pass."""
        logged, room = self.length - self.committed, len(self.log["decay"])
        if logged + count > room:
            before, self.log = self.log, self._new_log(max(logged + count, 2 * room))
            for name, array in before.items():
                self.device.copy(self.log[name][:logged], array[:logged])
            self.moves += 1

    def commit(self):
        """Make everything read so far final."""
        if self.length > self.committed:
            self._write_again(self.state_HKV, self.window_WC)
            super().commit()

    def state(self):
        """What `restore` needs, as named host arrays: the present state."""
        state_HKV, window_WC = (self.device.array(array.get()) for array in (self.state_HKV, self.window_WC))
        self._write_again(state_HKV, window_WC)
        return {"state": state_HKV.get(), "window": window_WC.get()}

    def restore(self, state, length):
        """Take over a saved state after `length` tokens. Raises CacheError where its shapes are not this memory's."""
        for name, array in (("state", self.state_HKV), ("window", self.window_WC)):
            check_saved(state[name], array.shape, array.dtype)
            array.set(state[name])
        self.length = self.committed = length

    def _new_log(self, room):
        key_heads, value_heads, key_dim, value_dim, _ = self.sizes
        rows = {
            "conv": (self.channels,),
            "k": (key_heads, key_dim),
            "u": (value_heads, value_dim),
            "decay": (value_heads,),
        }
        return {name: self.device.zeros((room, *row), np.float32) for name, row in rows.items()}

    def _write_again(self, state_HKV, window_WC):
        """Bring arrays that are as at the commit to where the log ends."""
        commit_delta(state_HKV, window_WC, self, self.device.number(self.length - self.committed))
