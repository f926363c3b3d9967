"""The memory of a drafter with keys and values of its own, and the target's hidden states that they are made from."""

from typing import NamedTuple

import numpy as np

from .kv import CacheError, check_rollback, check_saved, integers

BEHIND = 1024  # committed tokens that a drafter may not have read yet


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

    def __init__(self, kv, hidden_size, dtype=np.float32):
        self.kv, self.made_with, self.maker = kv, [], ""
        self._noted, self.committed = _Noted(0, 0, (np.empty((0, hidden_size), dtype),)), 0

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
        hidden_TD = np.concatenate(self._noted.pieces)
        return {**self.kv.state(), "made_with": made_with, "maker": maker, "hidden": hidden_TD}

    def restore(self, state, length):
        """Take over a saved state after `length` tokens. Raises CacheError where its shapes are not this memory's."""
        made_with, hidden_TD, maker = integers(state["made_with"]).tolist(), state["hidden"], state["maker"]
        rows, (_, width) = len(np.atleast_1d(hidden_TD)), self._noted.pieces[0].shape
        check_saved(hidden_TD, (min(rows, length), width), self._noted.pieces[0].dtype)
        check_saved(maker, (maker.size,), np.dtype(np.uint8))
        if len(made_with) > length:
            raise CacheError(f"a saved drafter has {len(made_with)} entries for {length} tokens")
        self.kv.restore(state, len(made_with))
        self._noted = _Noted(length - rows, length, (hidden_TD.copy(),))
        self.made_with, self.maker, self.committed = made_with, maker.tobytes().decode(errors="replace"), length
