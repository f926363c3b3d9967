"""check_cache: our own caches pass, and each planted defect is named."""

import numpy as np
import pytest

from minimtp.delta_state import DeltaState
from minimtp.kv import FullKV, SlidingKV
from minimtp.layers import causal_conv, gated_delta
from minimtp.oracle_cache import check_cache

WINDOW = 6


# --- our own ---


class Ours:
    """Our keys and values as the check drives them; what the next token may see of a sliding memory is its mask's."""

    def __init__(self, memory, window=None):
        self.memory, self.window = memory, window
        self.append, self.rollback, self.commit = memory.append, memory.rollback, memory.commit

    def read(self):
        k_GSK, v_GSK = self.memory.read()
        start = max(0, self.memory.length - self.memory.start - self.window) if self.window else 0
        return k_GSK[:, start:].swapaxes(0, 1), v_GSK[:, start:].swapaxes(0, 1)


SIZES = G, H, K, V, W = 2, 4, 3, 5, 4  # key and value heads, their widths, the convolution's
DELTA_SHAPES = ((2 * G * K + H * V,), (H,), (H,))


class Delta:
    """A Gated DeltaNet layer between its projections, over our DeltaState."""

    def __init__(self):
        self.memory = DeltaState(*SIZES)
        self.rollback, self.commit = self.memory.rollback, self.memory.commit
        self.conv_CW = np.random.RandomState(5).standard_normal((2 * G * K + H * V, W)).astype(np.float32) / 8

    def append(self, x_TC, decay_TH, beta_TH):
        mixed_TC = np.tanh(causal_conv(x_TC, self.conv_CW, self.memory.window()))
        q_TGK, k_TGK = mixed_TC[:, : 2 * G * K].reshape(-1, 2, G, K).swapaxes(0, 1)
        k_TGK = k_TGK / np.linalg.norm(k_TGK, axis=-1, keepdims=True)
        v_THV = mixed_TC[:, 2 * G * K :].reshape(-1, H, V)
        log_decay_TH, beta_TH = -np.abs(np.tanh(decay_TH)) / 8, 1 / (1 + np.exp(-np.tanh(beta_TH)))
        _, u_THV, state_HKV = gated_delta(q_TGK, k_TGK, v_THV, log_decay_TH, beta_TH, self.memory.state_HKV)
        self.memory.append(x_TC.copy(), k_TGK, u_THV, log_decay_TH, state_HKV)

    def read(self):
        return self.memory.state_HKV, self.memory.window()


def test_our_own_caches():
    claim = check_cache(lambda: Ours(FullKV(2, 4)))
    assert claim.startswith("cache: after each of 100 rounds, ") and "had ever been read; refuses to" in claim
    assert "of them after the window had moved on" in check_cache(lambda: Ours(SlidingKV(2, 4, WINDOW), WINDOW), WINDOW)
    claim = check_cache(Delta, state=True, shapes=DELTA_SHAPES, rounds=40)
    assert claim.startswith("recurrent state: after each of 40 rounds")


@pytest.mark.parametrize("window", [1, 2, 13])
def test_windows_and_seeds(window):
    for seed in range(3):
        check_cache(lambda: Ours(SlidingKV(2, 4, window), window), window, rounds=60, seed=seed)


def test_rows_too_small_to_tell_tokens_by():
    with pytest.raises(ValueError, match=r"rows of shape \(1,\) are too small"):
        check_cache(Rows, shapes=((1,), (1,)))


# --- a foreign cache, and what can be wrong with it ---


class Rows:
    """Keys and values in lists: right, unless it has a defect."""

    def __init__(self, defect=None, window=None):
        self.defect, self.window, self.rows, self.final, self.stale = defect, window, [], 0, []

    def append(self, k, v):
        keep = (lambda x: x) if self.defect == "keeps the caller's arrays" else np.copy
        self.stale = []
        self.rows += [(keep(a), keep(b)) for a, b in zip(k, v)]

    def rollback(self, n):
        if not 0 <= n <= len(self.rows) - self.final and self.defect != "un-reads what is final":
            raise ValueError("too far")
        if self.defect == "no rollback":
            return
        n = max(n - (self.defect == "one too few"), 0) + (self.defect == "one too many" and 0 < n < len(self.rows))
        self.stale = self.rows[len(self.rows) - n :] if self.defect == "length unmasked" else []
        self.rows = self.rows[: len(self.rows) - n]

    def commit(self):
        self.final = len(self.rows)

    def read(self):
        rows = self.rows + self.stale
        if self.window:
            shift = {"window one short": -1, "window one long": 1}.get(self.defect, 0)
            rows = rows[max(0, len(rows) - self.window - shift) :]
        k, v = (np.array([row[i] for row in rows]).reshape(-1, 2, 4) for i in (0, 1))
        return (k, k) if self.defect == "keys for values" else (k, v)


class Ring:
    """A ring of exactly the window's rows. A rejected token has overwritten what the window held before it."""

    def __init__(self, clears=False):
        self.slots, self.length, self.final, self.clears = [None] * WINDOW, 0, 0, clears

    def append(self, k, v):
        for row in zip(k.copy(), v.copy()):
            self.slots[self.length % WINDOW] = row
            self.length += 1

    def rollback(self, n):
        if not 0 <= n <= self.length - self.final:
            raise ValueError("too far")
        for position in range(self.length - n, self.length) if self.clears else ():
            self.slots[position % WINDOW] = None
        self.length -= n

    def commit(self):
        self.final = self.length

    def read(self):
        rows = [self.slots[p % WINDOW] for p in range(max(0, self.length - WINDOW), self.length)]
        return tuple(np.array([row[i] for row in rows if row]).reshape(-1, 2, 4) for i in (0, 1))


DEFECTS = {
    "no rollback": (None, "rejected KV still visible: "),
    "length unmasked": (None, "rejected KV still visible: "),
    "one too few": (None, r"rejected KV still visible: 1 of \d rejected tokens"),
    "one too many": (None, "one rollback too many: the last 1 accepted rows are gone"),
    "window one short": (WINDOW, "window off by one: one row too few, 5 rows, should be 6"),
    "window one long": (WINDOW, "window off by one: one row too many, 7 rows, should be 6"),
    "keys for values": (None, "array 1 of read.. does not hold the rows"),
    "keeps the caller's arrays": (None, "row 0 of read.. is no row that was appended"),
    "un-reads what is final": (None, r"rollback\(\d+\) is no error, \d tokens after the last commit"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_of_keys_and_values(defect):
    window, said = DEFECTS[defect]
    with pytest.raises(AssertionError, match=f"^{said}"):
        check_cache(lambda: Rows(defect, window), window)
    check_cache(lambda: Rows(None, window), window)


def test_all_that_was_not_un_read_is_counted():
    """Over two rollbacks in a row, too."""
    for seed in range(12):
        with pytest.raises(AssertionError, match=r"^rejected KV still visible: (\d+) of \1 rejected tokens at the end"):
            check_cache(lambda: Rows("no rollback"), seed=seed)


@pytest.mark.parametrize("clears, said", [(False, "the row of position \\d+ is overwritten"), (True, "rows that reje")])
def test_a_ring_that_forgets(clears, said):
    with pytest.raises(AssertionError, match=f"rollback forgets the ring: {said}.*after append"):
        check_cache(lambda: Ring(clears), WINDOW)


def test_a_buffer_shared_by_two_sequences():
    shared = Rows()
    with pytest.raises(AssertionError, match="rejected KV still visible: row 0 of read"):
        check_cache(lambda: shared)


class State:
    """A decaying sum and the last two inputs, copied at every token: right, unless it has a defect."""

    def __init__(self, defect=None):
        self.defect, self.kept, self.final = defect, [(np.zeros(3, np.float32), np.zeros((2, 3), np.float32))], 0

    def append(self, x_TD):
        for x_D in x_TD:
            sum_D, last_2D = self.kept[-1]
            self.kept.append((sum_D * np.float32(0.9) + x_D, np.stack([last_2D[1], x_D])))

    def rollback(self, n):
        if not 0 <= n < len(self.kept) - self.final:
            raise ValueError("too far")
        now, self.kept = self.kept[-1], self.kept[: len(self.kept) - n]
        then = self.kept[-1]
        if n and self.defect == "state":
            self.kept[-1] = now
        if n and self.defect == "convolution":
            self.kept[-1] = then[0], now[1]
        if n and self.defect == "commit":
            self.kept[self.final + 1 :] = [self.kept[self.final]] * (len(self.kept) - self.final - 1)

    def commit(self):
        self.final = len(self.kept) - 1

    def read(self):
        return self.kept[-1]


@pytest.mark.parametrize(
    "defect, said",
    [
        ("state", "recurrent state not rolled back: as if the rejected tokens had been read .array 0"),
        ("convolution", "recurrent state not rolled back: as if the rejected tokens had been read .array 1"),
        ("commit", "back at the last commit: what was accepted since is lost .array 0"),
    ],
)
def test_defects_of_recurrent_states(defect, said):
    with pytest.raises(AssertionError, match=f"^{said}"):
        check_cache(lambda: State(defect), state=True, shapes=((3,),), rounds=60)
    check_cache(State, state=True, shapes=((3,),), rounds=60)
