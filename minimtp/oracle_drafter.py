"""For other engines' test suites: a drafter, driven through rounds of made-up acceptances.  Needs NumPy alone.

`factory()` makes a new sequence: an adapter around the engine's target and drafter.

    propose(text, num_draft, u_K)  text: all token ids so far, the last not read by the target yet -> (tokens_K, q_KV):
                                   at most num_draft tokens, and the laws they were drawn from (None: argmax drafts);
                                   num_draft 0: only the target reads what it has not
    verify(tokens_K)               optional: the target reads the last token of the text and these, as it does to verify
                                   them; which of them stand, the next text says
    borrowed()                     optional: arrays of the target's keys and values that a drafter only borrows

u_K: uniforms in [0, 1), one for each draft token; an engine that has random numbers of its own ignores them.

A check that passes returns a sentence: what the engine may claim.  One that fails raises AssertionError and names the
defect.
"""

from collections import defaultdict
from dataclasses import replace

import numpy as np

from .audit import total_variation
from .expected import Watched
from .oracle_rules import assert_same_law

NEAR, NOTHING = 10, 1e-7  # of two expected laws both within rtol, the one so many times nearer is meant
GRID = 256  # uniforms tried where what is drawn is set against its law


def check_drafter(
    factory, text, vocab_size, num_draft=4, rounds=8, uniforms=True, expected=None, options=(), rtol=1e-4, seed=0,
    samples=3000, false_alarm=1e-6,
):  # fmt: skip
    """Raise AssertionError unless a drafter goes by accepted tokens alone, and says by what law -> what it may claim.

    text: the ids of a prompt.  uniforms: tokens are drawn by inverse CDF of u_K; False: with random numbers of the
    engine's own, judged from so many samples with a false alarm in all.  rtol: of a law's largest entry, for what
    depends on the widths of passes.
    expected: {name: function (text, tokens_K) -> laws [K, V] of the drafts}, the right one first (see expectations):
    whose laws the drafts are; of argmax drafts, whose argmax.  Others are known defects, but for options: choices.
    """
    run = _Run(factory, list(text), vocab_size, num_draft, rtol, np.random.RandomState(seed), uniforms)
    found = run.rounds(rounds)
    drawn = any(q_KV is not None for _, _, q_KV, _ in found)
    said = [run.drawn(found[-1][0], samples, false_alarm)] if drawn else ["drafts are point masses"]
    if expected:
        said.append(_whose(found, expected, options, rtol))
    if run.borrows:
        said.append("the keys and values it borrows stay as they were")
    return "; ".join([f"in {rounds} rounds, {run.rejecting} with rejected drafts, it drafts as if afresh", *said])


class _Run:
    def __init__(self, factory, text, vocab_size, num_draft, rtol, random, uniforms):
        self.factory, self.text, self.vocab_size, self.num_draft, self.rtol = factory, text, vocab_size, num_draft, rtol
        self.random, self.uniforms, self.rejecting, self.borrows = random, uniforms, 0, False

    def rounds(self, count):
        """[(text, tokens, laws, uniforms)] of every round; each time a new sequence must draft the same."""
        session, found = self.factory(), []
        for i in range(count):
            u_K = self.random.random_sample(self.num_draft)
            self._checked(session, 0, u_K)
            before = self._borrowed(session)
            tokens, q_KV = self._checked(session, self.num_draft, u_K)
            self._same_borrowed(before, self._borrowed(session))
            found.append((list(self.text), tokens, q_KV, u_K))
            history = "drafts depend on rejected tokens" if self.rejecting else "drafts depend on earlier rounds"
            others = {
                "it drafts otherwise when asked again": session,
                f"{history}: a new sequence drafts otherwise": self.factory(),
            }
            for what, other in others.items():
                self._same(what, (tokens, q_KV), self._checked(other, None, u_K))
            if hasattr(session, "verify"):
                session.verify(tokens)
            accepted = (0, len(tokens), len(tokens) // 2)[i % 3]
            self.rejecting += accepted < len(tokens)
            avoided = tokens[accepted] if accepted < len(tokens) else -1
            correction = (avoided + 1 + self.random.randint(self.vocab_size - 1)) % self.vocab_size
            self.text += [*tokens[:accepted], int(correction)]
        return found

    def _checked(self, session, num_draft, u_K):
        """One call, and what is wrong with what it returns; num_draft None: as many as usual."""
        num_draft = self.num_draft if num_draft is None else num_draft
        tokens, q_KV = session.propose(list(self.text), num_draft, u_K.copy())
        tokens, where = list(map(int, tokens)), f"at {len(self.text)} tokens: "
        if len(tokens) > num_draft or not all(0 <= token < self.vocab_size for token in tokens):
            raise AssertionError(f"{where}drafted {tokens}, at most {num_draft} of {self.vocab_size} were asked for")
        if q_KV is None or not tokens:
            return tokens, None
        q_KV = np.asarray(q_KV, np.float64)
        if q_KV.shape != (len(tokens), self.vocab_size):
            raise AssertionError(f"{where}laws {q_KV.shape}, expected {(len(tokens), self.vocab_size)}")
        if not (q_KV >= 0).all() or not (abs(q_KV.sum(-1) - 1) <= 1e-4).all():
            raise AssertionError(f"{where}a row of q is no law: sums {q_KV.sum(-1).tolist()}")
        for j, token in enumerate(tokens):
            if q_KV[j, token] == 0:
                raise AssertionError(f"{where}draft token {j} is {token}, and its own law gives it no probability")
        return tokens, q_KV

    def _borrowed(self, session):
        if not hasattr(session, "borrowed"):
            return []
        self.borrows = True
        return [np.array(part) for part in session.borrowed()]

    def _same_borrowed(self, before, after):
        for i, (x, y) in enumerate(zip(before, after)):
            if x.shape != y.shape or (x != y).any():
                raise AssertionError(f"KV written by a borrower: array {i} is another after drafting")

    def _same(self, what, one, other):
        if not self.uniforms and one[1] is not None and other[1] is not None:
            one, other = ([], one[1][:1]), ([], other[1][:1])  # what comes after the first draw differs anyway
        if one[0] != other[0]:
            raise AssertionError(f"{what}, {other[0]} instead of {one[0]} (at {len(self.text)} tokens)")
        if one[1] is not None and (off := np.abs(one[1] - other[1]).max() / one[1].max()) > self.rtol:
            raise AssertionError(f"{what}, by laws {off:.3g} apart (at {len(self.text)} tokens)")

    def drawn(self, text, samples, false_alarm):
        """What is drawn has the law it is said to have, every token given those before it."""
        self.text = text
        return self._by_uniforms() if self.uniforms else self._by_samples(samples, false_alarm)

    def _by_uniforms(self):
        session, u_K = self.factory(), np.full(self.num_draft, 0.5)
        depth = len(self._checked(session, None, u_K)[0])
        for j in range(depth):
            counts_V = np.zeros(self.vocab_size)
            for u_K[j] in (np.arange(GRID) + 0.5) / GRID:
                tokens, q_KV = self._checked(session, None, u_K)
                counts_V[tokens[j]] += 1
            u_K[j] = 0.5
            off_V = np.abs(counts_V / GRID - q_KV[j])
            if off_V.max() <= 1.01 / GRID:
                continue
            worst = off_V.argmax()
            size = f"token {worst} at {counts_V[worst] / GRID:.3f} of all uniforms, its law says {q_KV[j, worst]:.3f}"
            if np.count_nonzero(counts_V) == 1:
                like = self._moved_by_another(session, j)
                if like is not None:
                    raise AssertionError(f"shared uniforms: draft token {j} is drawn with u[{like}], not with u[{j}]")
                if all(q_V.argmax() == token for q_V, token in zip(q_KV, tokens)):
                    raise AssertionError(f"soft q on argmax drafts: draft token {j} is always the argmax, {size}")
            raise AssertionError(f"draft token {j} is not drawn from the law it is said to be: {size}")
        return f"draws each of {depth} tokens from the law it says, by {GRID} uniforms each, with a uniform of its own"

    def _moved_by_another(self, session, j):
        """The uniform that draft token j depends on instead of its own, after the same tokens, or None."""
        after = defaultdict(set)
        for i in set(range(self.num_draft)) - {j}:
            for u in (np.arange(GRID) + 0.5) / GRID:
                u_K = np.full(self.num_draft, 0.5)
                u_K[i] = u
                tokens = self._checked(session, None, u_K)[0]
                after[i, tuple(tokens[:j])].add(tokens[j])
        return next((i for (i, _), seen in after.items() if len(seen) > 1), None)

    def _by_samples(self, samples, false_alarm):
        session, laws, rows = self.factory(), {}, []
        for _ in range(samples):
            tokens, q_KV = self._checked(session, None, self.random.random_sample(self.num_draft))
            for j, q_V in enumerate(q_KV):
                laws[tuple(tokens[:j])] = q_V
            rows.append(tuple(tokens))
        if len(set(rows)) == 1 and max(q_V.max() for q_V in laws.values()) < 0.99:
            raise AssertionError(f"soft q on argmax drafts: {list(rows[0])} in each of {samples} samples")
        try:
            return f"what it draws: {assert_same_law(rows, laws.__getitem__, false_alarm)}"
        except AssertionError as error:
            raise AssertionError(f"not drawn from the laws it says: {error}") from None


def _whose(found, expected, options, rtol):
    """Which of the expected drafters this one drafts like in every round: the first, or an option."""
    off = dict.fromkeys(expected, 0.0)
    for text, tokens, q_KV, _ in found:
        laws = {name: np.asarray(expected[name](text, tokens), np.float64) for name in expected}
        off = {name: max(off[name], _distance(tokens, q_KV, laws[name])) for name in expected}
        if min(off.values()) > rtol:
            first = next(iter(laws.values()))
            size = "" if q_KV is None else f", {_apart(q_KV, first):.3g} from the first in total variation"
            raise AssertionError(f"at {len(text)} tokens it drafts like none of {list(expected)}{size}")
    nearest = [name for name in off if off[name] <= NEAR * max(min(off.values()), NOTHING)]
    right = next((name for name in nearest if name == next(iter(expected)) or name in options), None)
    if right is None:
        raise AssertionError(f"it drafts like this known defect: {nearest[0]}")
    return f"its drafts are those of {right!r}"


def _distance(tokens, q_KV, laws_KV):
    """Largest difference of laws, or how far the argmax is from being one, relative to the largest entry."""
    if q_KV is not None:
        return float(np.abs(q_KV - laws_KV).max() / laws_KV.max())
    return max((1 - law_V[token] / law_V.max() for law_V, token in zip(laws_KV, tokens)), default=0.0)


def _apart(q_KV, laws_KV):
    return max(total_variation(*pair) for pair in zip(q_KV, laws_KV))


OPTIONS = ("position P - 1", "window's edge exclusive")  # engines differ; either is a drafter's right


def expectations(target, drafter, sampling):
    """For `expected`: our own drafter of the same checkpoint, its options (OPTIONS), and what it must not be given.

    The laws are those of sampling, at temperature 0 as well: argmax drafts are compared by their argmax.
    """
    last = f"layer.{len(target.config.layers) - 1}.out"

    def laws(which, before_norm=False):
        def of(text, tokens):
            cache, watched = target.new_cache(), Watched(sampling, tokens)
            out = target.forward(text[:-1], cache, taps=(last,), last=0)
            hidden_TD = out.taps[last] if before_norm else out.hidden_TD
            which.propose(text[1:], hidden_TD, cache, len(tokens), watched, np.zeros(len(tokens)))
            return sampling.law(np.stack(watched.logits)) if tokens else np.zeros((0, target.config.vocab_size))

        return of

    known = {"as published": laws(drafter), "hidden state before the final norm": laws(drafter, before_norm=True)}
    if hasattr(drafter, "position"):
        known["position P - 1"] = laws(replace(drafter, position="committed"))
        known["window's edge exclusive"] = laws(replace(drafter, window_edge="exclusive"))
    return known
