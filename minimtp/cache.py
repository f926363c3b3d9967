"""What a model remembers of the tokens it has read, and how to un-read them.

Every kind of memory keeps one contract: append(...) while reading, rollback(n) to un-read the last n tokens, any
number of times, down to the last commit, commit() to make everything read so far final and free what only
un-reading needed. A `Cache` is the memories of all layers, the drafter's own entries, and the ids read.
"""

import operator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from .backend import ROWS, to_host
from .checkpoint import read_safetensors, write_safetensors
from .layers import delta_writes

SLACK = 16  # free slots beyond what a window must hold, so that not every append moves entries
SNAPSHOT = 64  # tokens that may lie between two states which a DeltaState keeps for un-reading
BEHIND = 1024  # committed tokens that a drafter may not have read yet


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
            check_saved(saved, (heads, slots, head_dim), self.k_GSK.dtype)
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

    def __init__(self, key_heads, value_heads, key_dim, value_dim, kernel, dtype=np.float32, xp=np):
        self.sizes = key_heads, value_heads, key_dim, value_dim, kernel
        channels = 2 * key_heads * key_dim + value_heads * value_dim
        conv_TC, state_HKV = xp.zeros((kernel - 1, channels), dtype), xp.zeros((value_heads, key_dim, value_dim), dtype)
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
        return {"state": to_host(self.state_HKV), "window": to_host(self.window())}

    def restore(self, state, length):
        """Take over a saved state after `length` tokens. Raises CacheError where its shapes are not this memory's."""
        wanted = self.state()
        for name, saved in state.items():
            check_saved(saved, wanted[name].shape, wanted[name].dtype)
        self._readings = [self._final(length, state["window"].copy(), state["state"].copy())]


class _Noted(NamedTuple):
    """Hidden states of the positions start .. stop - 1, in the pieces [T, D] they came in."""

    start: int
    stop: int
    pieces: tuple

    def within(self, start, stop):
        """Those of start .. stop - 1; what came as one piece is dropped as one at the start, so perhaps some more."""
        first, at, pieces = self
        while len(pieces) > 1 and at - len(pieces[-1]) >= stop:
            at, pieces = at - len(pieces[-1]), pieces[:-1]
        if at > stop:
            pieces = *pieces[:-1], pieces[-1][: len(pieces[-1]) - (at - stop)].copy()
        while len(pieces) > 1 and first + len(pieces[0]) <= start:
            first, pieces = first + len(pieces[0]), pieces[1:]
        return _Noted(first, stop, pieces)


class DrafterKV:
    """The entries of a drafter that attends over keys and values of its own, one for each token that the target read.

    Entry p is made from the target's hidden state at p and the token after it. That token may be one which the target
    has not read yet, and which a caller may still replace: so each entry knows its token, and the hidden states behind
    the newest entry and those that are missing are kept, as far as they are uncommitted or among the last BEHIND.
    `maker` names the drafter whose entries they are: another cannot go on from them.
    """

    def __init__(self, kv_heads, head_dim, hidden_size, dtype=np.float32, xp=np):
        self.kv, self.made_with, self.maker = FullKV(kv_heads, head_dim, dtype, xp=xp), [], ""
        self._noted, self.committed = _Noted(0, 0, (xp.empty((0, hidden_size), dtype),)), 0

    @property
    def length(self):
        """Number of tokens the target has read."""
        return self._noted.stop

    @property
    def entries(self):
        """Number of entries: of tokens the drafter has read."""
        return min(self.kv.length, len(self.made_with))

    @property
    def nbytes(self):
        """Bytes of the buffers."""
        return self.kv.nbytes + sum(piece_TD.nbytes for piece_TD in self._noted.pieces)

    def note(self, hidden_TD):
        """Take in the target's hidden states of the next T tokens, before its final norm."""
        start, stop, pieces = self._noted
        self._noted = _Noted(start, stop + len(hidden_TD), (*pieces, hidden_TD))

    def hidden(self, start, stop):
        """The hidden states noted at start .. stop - 1 -> [stop - start, D]. Raises CacheError where they are gone."""
        if start < self._noted.start:
            raise CacheError(
                f"the drafter has read {self.entries} tokens of {self.length}, and the hidden states behind the next "
                f"are gone: it must read along (propose with num_draft 0) before {BEHIND} more are committed"
            )
        noted = self._noted.within(start, stop)
        return np.concatenate(noted.pieces)[start - noted.start :]

    def holding(self, next_token, maker):
        """How many entries hold for this maker; next_token(n): the token after the first n that the target read."""
        count = self.entries if maker == self.maker else 0
        return count - bool(count and self.made_with[count - 1] != next_token(count))

    def append(self, tokens, maker):
        """Note which tokens the newest entries of `kv` were made with, and by whom."""
        self.made_with.extend(tokens)
        self.maker = maker

    def cut(self, entries):
        """Drop all entries but the first so many."""
        self.kv.length = min(self.entries, entries)
        del self.made_with[self.kv.length :]

    def rollback(self, n):
        """Un-read the last n tokens. Raises CacheError past the last commit."""
        check_rollback(n, self.length - self.committed)
        self.cut(self.length - n)
        self._noted = self._noted.within(self._noted.start, self.length - n)

    def commit(self):
        """Make everything read so far final."""
        self._noted = self._noted.within(max(self.entries - 1, self.length - BEHIND), self.length)
        self.committed = self.length

    def state(self):
        """What `restore` needs, as named host arrays."""
        made_with, maker = np.array(self.made_with, np.int64), np.frombuffer(self.maker.encode(), np.uint8)
        hidden_TD = to_host(np.concatenate(self._noted.pieces))
        return {**self.kv.state(), "made_with": made_with, "maker": maker, "hidden": hidden_TD}

    def restore(self, state, length):
        """Take over a saved state after `length` tokens. Raises CacheError where its shapes are not this memory's."""
        made_with, hidden_TD, maker = integers(state["made_with"]).tolist(), state["hidden"], state["maker"]
        rows, (_, width) = len(np.atleast_1d(hidden_TD)), self._noted.pieces[0].shape
        check_saved(hidden_TD, (min(rows, length), width), self._noted.pieces[0].dtype)
        check_saved(maker, (maker.size,), np.dtype(np.uint8))
        if len(made_with) > length:
            raise CacheError(f"a saved drafter has {len(made_with)} entries for {length} tokens")
        self.kv.restore({name: state[name] for name in ("k", "v")}, len(made_with))
        self._noted = _Noted(length - rows, length, (hidden_TD.copy(),))
        self.made_with, self.maker, self.committed = made_with, maker.tobytes().decode(errors="replace"), length


def check_saved(array, shape, dtype):
    """Raise CacheError unless a saved array is what the memory holds."""
    if array.shape != shape or array.dtype != dtype:
        raise CacheError(f"a saved tensor is {array.dtype} {array.shape}, expected {dtype} {shape}")


def integers(array, size=None):
    """The array, if it holds ids or lengths. Raises CacheError."""
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
