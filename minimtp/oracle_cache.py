"""For other engines' test suites: a cache that appends, un-reads and commits, driven at random.  Needs NumPy alone.

`factory()` makes a new, empty cache: an adapter of four methods around the engine's own.

    append(*rows)  take in T tokens, arrays [T, ...] of the given shapes: keys and values, or inputs of a recurrence
    rollback(n)    un-read the last n tokens; any number of times, down to the last commit, past it raising an error
    commit()       make everything read so far final
    read()         arrays of what the next token would use: keys and values that it may see, by position; or states

A check that passes returns a sentence: what the engine may claim.  One that fails raises AssertionError and names the
defect: what rejected tokens left behind, not only that the numbers are off.
"""

import numpy as np

SHAPES = ((2, 4), (2, 4))
POISON = 64  # times as large as an accepted token's rows are a rejected one's: nobody takes them for rounding


def check_cache(factory, window=None, state=False, shapes=SHAPES, most=8, rounds=100, seed=0, rtol=1e-4, refuses=True):
    """Raise AssertionError unless a cache holds what the accepted tokens alone would have left -> what it may claim.

    window: how many rows read() gives at most, the newest ones (None: all; an attention window of W tokens that counts
    the query itself leaves W - 1).  state: read() gives recurrent states, which are compared, to rtol of their largest
    number, with those of a new cache that reads the accepted text; rows are compared exactly (they are small multiples
    of 1/8, exact in any float of 8 bits or more).  shapes: of a token's rows, one for each argument of append.
    most: tokens of a pass, but for prompts.  refuses: whether a rollback past the commit is to raise.
    """
    run = _Run(factory, window, state, shapes, seed, rtol)
    other = factory()
    other.append(*run.arrays(run.new(3, rejected=True)))  # another sequence, which must not show
    for i in range(rounds):
        prompt = (window or 8) * 2 + 3 if i % 50 == 0 else 0
        run.round(most, prompt)
        if refuses and i % 10 == 3:
            run.must_refuse()
    longest, past = run.longest, f", {run.wrapped} of them after the window had moved on" if window else ""
    kind = "recurrent state" if state else f"window of {window} rows" if window else "cache"
    return (
        f"{kind}: after each of {rounds} rounds, {run.rollbacks} with a rollback (of up to {longest} tokens{past}), "
        f"it is as if only the accepted {len(run.text)} tokens had ever been read"
        + ("; refuses to un-read what is final" if refuses else "")
    )


class _Run:
    """One cache under test, and what it should hold: `text`, the accepted tokens by number."""

    def __init__(self, factory, window, state, shapes, seed, rtol):
        self.factory, self.window, self.state, self.shapes, self.rtol = factory, window, state, shapes, rtol
        self.random, self.cache, self.did = np.random.RandomState(seed), factory(), []
        self.text, self.gone, self.committed, self.rows, self.numbers = [], [], 0, [], {}
        self.rollbacks = self.longest = self.wrapped = 0

    def new(self, count, rejected=False):
        """Numbers of so many new tokens."""
        scale = np.float32(POISON / 8 if rejected else 1 / 8)
        for _ in range(count):
            row = [self.random.randint(-15, 16, shape).astype(np.float32) * scale for shape in self.shapes]
            if not self.state and self.numbers.setdefault(row[0].tobytes(), len(self.rows)) < len(self.rows):
                raise ValueError(f"rows of shape {self.shapes[0]} are too small to tell tokens by: give larger shapes")
            self.rows.append(row)
        return list(range(len(self.rows) - count, len(self.rows)))

    def arrays(self, tokens):
        """The tokens' rows, one array [T, ...] for each argument of append."""
        return [np.stack([self.rows[token][i] for token in tokens]) for i in range(len(self.shapes))]

    def round(self, most, prompt):
        """Read some tokens, un-read the last of them or more, see what is left; commit or not."""
        rejected = 0 if prompt else self.random.randint(0, most + 1)
        accepted = prompt or self.random.randint(0 if rejected else 1, most + 1)
        tokens = [*self.new(accepted), *self.new(rejected, rejected=True)]
        self._append(tokens)
        rest = len(self.text) - self.committed - rejected
        count = rejected + (self.random.randint(0, rest + 1) if self.random.rand() < 0.2 else 0)
        parts = (count,) if count < 2 or self.random.rand() < 0.7 else (1, count - 1)
        for n in filter(None, parts):
            self._rollback(n)
        self._look()
        if self.random.rand() < 0.6:
            self.cache.commit()
            self.committed = len(self.text)
            self.did.append("commit")
            self._look()

    def _append(self, tokens):
        arrays = self.arrays(tokens)
        self.cache.append(*arrays)
        for array in arrays:
            array.fill(np.nan)  # the caller's arrays are the caller's
        self.text += tokens
        self.gone = []
        self.did.append(f"append {len(tokens)}")

    def _rollback(self, n):
        self.cache.rollback(n)
        self.rollbacks, self.longest = self.rollbacks + 1, max(self.longest, n)
        self.wrapped += bool(self.window and len(self.text) > self.window)
        self.text, self.gone = self.text[:-n], self.text[-n:] + self.gone
        self.did.append(f"rollback {n}")

    def must_refuse(self):
        """Un-reading what is final raises, and changes nothing."""
        for n in (len(self.text) - self.committed + 1, -1):
            try:
                self.cache.rollback(n)
            except Exception:
                self._look()
                continue
            self._fail(f"rollback({n}) is no error, {len(self.text) - self.committed} tokens after the last commit")

    def _look(self):
        for _ in range(2):  # reading changes nothing
            if fault := (self._state_fault if self.state else self._rows_fault)(_read(self.cache)):
                self._fail(fault)

    def _fail(self, fault):
        raise AssertionError(f"{fault} (after {', '.join(self.did[-4:])}; {len(self.text)} tokens accepted)")

    # keys and values

    def _rows_fault(self, found):
        want = self.text[-self.window :] if self.window else self.text
        held = [self.numbers.get(row.tobytes()) for row in found[0]]
        if held != want:
            return self._misheld(held, want)
        for i, (part, wanted) in enumerate(zip(found, self.arrays(want) if want else found)):
            if part.shape != wanted.shape or (part != wanted).any():
                return f"array {i} of read() does not hold the rows of the tokens that array 0 holds"

    def _misheld(self, held, want):
        text, gone = self.text, self.gone
        size = f"{len(held)} rows, should be {len(want)}"
        if None in held:
            at = held.index(None)
            return f"row {at} of read() is no row that was appended: {size}"
        for n in range(1, len(gone) + 1):
            if held in (text + gone[:n], (text + gone[:n])[-len(want) :]):
                return f"rejected KV still visible: {n} of {len(gone)} rejected tokens at the end, {size}"
        if self.window and held == text[-self.window - 1 :]:
            return f"window off by one: one row too many, {size}"
        if self.window and held == text[-self.window + 1 :][: self.window - 1]:
            return f"window off by one: one row too few, {size}"
        stale = [i for i, token in enumerate(held) if token not in set(text)]
        if stale and stale[0] < len(want) and self.window:
            position = len(text) - len(want) + stale[0]
            return f"rollback forgets the ring: the row of position {position} is overwritten by a rejected token's"
        if stale:
            return f"rejected KV still visible: row {stale[0]} of read() is a rejected token's, {size}"
        if self.window and held == want[len(want) - len(held) :]:
            return f"rollback forgets the ring: rows that rejected tokens had pushed out are gone, {size}"
        if held and held == text[: len(held)]:
            return f"one rollback too many: the last {len(want) - len(held)} accepted rows are gone"
        return f"rows in another order, or of other positions: {size}"

    # recurrent state

    def _state_fault(self, found):
        wanted = self._afresh(self.text)
        for i, (part, want) in enumerate(zip(found, wanted)):
            if self._near(part, want):
                continue
            off = f"array {i} of read() is off by {_distance(part, want):.3g} of its largest number"
            others = {
                "recurrent state not rolled back: as if the rejected tokens had been read": self.text + self.gone,
                "one rejected token is still in it": self.text + self.gone[:1],
                "one accepted token was un-read too": self.text[:-1],
                "back at the last commit: what was accepted since is lost": self.text[: self.committed],
                "empty": [],
            }
            for name, text in others.items():
                if text != self.text and self._near(part, self._afresh(text)[i]):
                    return f"{name} ({off})"
            return f"not the state that the accepted text leaves: {off}"

    def _afresh(self, text):
        cache = self.factory()
        for start in range(0, len(text), 64):
            cache.append(*self.arrays(text[start : start + 64]))
        return _read(cache)

    def _near(self, part, want):
        return part.shape == want.shape and _distance(part, want) <= self.rtol


def _read(cache):
    """What its read() gives, one array or several -> list of float32 arrays."""
    found = cache.read()
    return [np.asarray(part, np.float32) for part in (found if isinstance(found, tuple | list) else [found])]


def _distance(part, want):
    """Largest difference, in units of the largest number."""
    if part.shape != want.shape or not np.isfinite(part).all():
        return np.inf
    return float(np.abs(part - want).max(initial=0) / max(np.abs(want).max(initial=0), np.finfo(np.float32).tiny))
