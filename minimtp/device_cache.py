"""The cache of a model on a device: where its passes are run, captured as graphs, and replayed."""

import numpy as np

from .backend import ROWS
from .cache import Cache


class DeviceCache(Cache):
    """A Cache whose memories lie on a device.

    A narrow pass is captured when it comes a second time, and replayed from then on: a graph for each width (and number
    of logits), until a buffer it uses is exchanged. `graphs`, as the device has it, False: kernels are launched one by
    one, with the same numbers. To a pass go token ids and positions, and back come logits and hidden states.
    """

    def __init__(self, device, *arguments, **options):
        super().__init__(*arguments, **options)
        self.device, self.graphs = device, device.graphs
        self._arena, self._inputs, self._captured = device.arena(), {}, {}

    def run(self, read, *inputs, writes=(), key=None):
        """read(*inputs) on the device -> host arrays of what it returns.

        inputs: host arrays, one row a token, integers or floats. writes: memories that get an entry of each token. key:
        whatever else the launches depend on; None: they are not captured.
        """
        T = len(inputs[0])
        for memory in writes:
            memory.make_room(T)
        key = None if key is None or T > ROWS else (key, T)
        logged_T = np.arange(T) + self.length - self.committed
        *placed, logged_T = self._placed(key, (*inputs, logged_T))
        for memory in writes:
            memory.logged = logged_T
        if key is None:  # arrays come and go
            found = [x.get() for x in read(*placed)]
        else:
            found = [x.get() for x in self._narrow(read, placed, writes, key)]
        for memory in writes:
            memory.advance(T)
        return found

    def replay_of(self, key, T):
        """What replays the captured pass of that key and width. Its inputs, and what it writes, are the last one's."""
        return self._captured[key, T][1]

    def _narrow(self, read, inputs, writes, key):
        """Run a pass, or its graph -> Arrays that hold until the next pass."""
        state = *(memory.moves for memory in (*self.layers, *writes)), self._arena.generation
        before, replay, found = self._captured.get(key, (None, None, None))
        if not self.graphs or before != state:
            with self.device.working(self._arena):
                found = read(*inputs)
            self._captured[key] = (state, None, None)
            return found
        if replay is None:
            with self.device.working(self._arena):
                replay, found = self.device.capture(lambda: read(*inputs))
            self._captured[key] = state, replay, found
        replay()
        return found

    def _placed(self, key, inputs):
        """The inputs on the device, in arrays that stay where they are for every pass of that key."""
        inputs = [_as_input(x) for x in inputs]
        if key is None:
            return [self.device.array(x) for x in inputs]
        if key not in self._inputs:
            self._inputs[key] = [self.device.empty(x.shape, x.dtype) for x in inputs]
        for place, x in zip(self._inputs[key], inputs):
            place.set(x)
        return self._inputs[key]


def _as_input(x):
    x = np.asarray(x)
    return np.ascontiguousarray(x, np.float32 if x.dtype.kind == "f" else np.int32)
