"""For other engines' test suites: checks of acceptance functions and of emitted tokens.  Needs nothing but NumPy.

An acceptance function is fn(p_JV, tokens_K, q_KV, u_J) -> (accepted, token): p_JV the target's laws [K + 1, V], q_KV
the laws [K, V] that the K draft tokens were drawn from or None (drafted by argmax), u_J the K + 1 uniforms in [0, 1)
that it takes instead of its own random numbers, in any use it likes.  accepted: how many draft tokens stand; token:
what follows them.  An engine that cannot do without its own random numbers: fn(p_JV, tokens_K, q_KV).

A check that passes returns a sentence: what the engine may claim.  One that fails raises AssertionError and says where.
"""

import math
import operator
from collections import Counter, defaultdict
from functools import partial

import numpy as np

from .acceptance import RULES, one_hot
from .audit import CASES, deciding, integrate, total_variation
from .sampling import draw

ENDS = (0.0, 2.0**-149, 1 - 2.0**-24, 1 - 2.0**-53)  # of [0, 1): the least and the greatest in float32 and float64
LEAST = 50  # rows after one and the same prefix that are judged on their own


# --- emitted tokens ---


def assert_same_law(got, want, false_alarm=1e-6, atol=1e-9):
    """Raise AssertionError unless what an engine emits has the law it should -> what it may claim.

    got: an exact law [V] or joint law [V, V, ...] (floats), or samples: token ids, or sequences of them, which may
    differ in length, as rounds do.  want: the law [V] of one token, the joint law, or a function prefix -> law [V].
    Every position is judged on the rows that reach it, given the tokens before it: all rows together, and those after
    each prefix that is frequent enough.  Rows must be independent, and reach a position for reasons that do not
    depend on its token: rounds of `block`, which looks ahead, do not; continue them to one length.

    Samples: a correct engine fails with probability at most false_alarm (McDiarmid's inequality, no approximation).
    Exact laws: they may differ by atol in total variation at any position.
    """
    if not callable(want):
        want = _conditional(np.asarray(want, dtype=np.float64))
    if isinstance(got, np.ndarray) and got.dtype.kind == "f":
        return _same_exact_law(got, want, atol)
    rows = [tuple(map(operator.index, np.atleast_1d(row).tolist())) for row in got]
    if not rows:
        raise ValueError("no samples")
    depth, said = max(map(len, rows)), []
    for j in range(depth):
        after = defaultdict(Counter)
        for row in rows:
            if len(row) > j:
                after[row[:j]][row[j]] += 1
        said.append(_same_position(j, after, want, false_alarm / depth))
    return f"{len(rows)} rows have the law they should (false alarm {false_alarm:g}): " + "; ".join(said)


def _conditional(joint):
    """The function prefix -> law of a joint law [V, V, ...]."""

    def law(prefix):
        rest = joint[tuple(prefix)]
        rest = rest.reshape(len(rest), -1).sum(1)
        return rest / rest.sum()

    return law


def _same_exact_law(got, want, atol):
    for j in range(got.ndim):
        first = got.reshape(*got.shape[: j + 1], -1).sum(-1)  # the joint law of the first j + 1 tokens
        should = np.zeros_like(first)
        for prefix in np.ndindex(first.shape[:j]):
            if mass := first[prefix].sum() if j else 1.0:
                should[prefix] = mass * want(prefix)
        apart = total_variation(first, should)
        if not apart <= atol:
            worst = np.unravel_index(np.abs(first - should).argmax(), first.shape)
            where = f"token {worst[-1]}" + (f" after {tuple(map(int, worst[:-1]))}" if j else "")
            raise AssertionError(
                f"position {j}: total variation {apart:.6g} from the law it should have, allowed {atol:g}; most at "
                f"{where}: {first[worst]:.6g}, should be {should[worst]:.6g}"
            )
    return f"the law of {got.ndim} tokens is the one it should be, to {atol:g} in total variation at every position"


def _same_position(j, after, want, false_alarm):
    """One position: {prefix: counts} against the laws, all prefixes together and the frequent ones alone."""
    frequent = [prefix for prefix, counts in after.items() if counts.total() >= LEAST]
    groups = {f"position {j}": list(after)}
    if len(after) > 1:
        groups |= {f"position {j} after {prefix}": [prefix] for prefix in frequent}
    laws = {prefix: np.asarray(want(prefix), dtype=np.float64) for prefix in after}
    for name, prefixes in groups.items():
        N = sum(after[prefix].total() for prefix in prefixes)
        seen_V = np.zeros(len(laws[prefixes[0]]))
        expected_V, variance_V = seen_V.copy(), seen_V.copy()
        for prefix in prefixes:
            for token, count in after[prefix].items():
                if not 0 <= token < len(seen_V) or laws[prefix][token] == 0:
                    raise AssertionError(f"{name}: token {token} after {prefix} came {count} times; it never should")
                seen_V[token] += count
            expected_V += after[prefix].total() * laws[prefix]
            variance_V += after[prefix].total() * laws[prefix] * (1 - laws[prefix])
        spread = math.sqrt(math.log(len(groups) / false_alarm) / (2 * N))
        allowed = np.sqrt(variance_V).sum() / (2 * N) + spread  # mean of the distance at most, and McDiarmid's excess
        apart = total_variation(seen_V, expected_V) / N
        if apart > allowed:
            worst = np.abs(seen_V - expected_V).argmax()
            raise AssertionError(
                f"{name}: total variation {apart:.4f} over {N} rows, {allowed:.4f} allowed; most at token {worst}: "
                f"{seen_V[worst] / N:.4f}, should be {expected_V[worst] / N:.4f}"
            )
        if name == f"position {j}":
            shows = min(1, allowed + math.sqrt(np.count_nonzero(expected_V) / N) / 2 + spread)
    return (
        f"position {j} on {sum(c.total() for c in after.values())} rows, where a total variation of {shows:.3f} shows"
    )


# --- acceptance functions ---


def check_acceptance(
    fn,
    rule="rejection",
    uniforms="float64",
    refuses=True,
    rows=4000,
    false_alarm=1e-6,
    atol=1e-6,
    **parameters,
):
    """Raise AssertionError, naming the cases that fail, unless fn decides with the law of `rule` -> what it may claim.

    With uniforms (the dtype they are given in), the law of (accepted, token) by integrating over them, no sampling:
    exact where along each uniform, within each quarter (all of it where V > 1000), no verdict comes back once it has
    gone (as of tests u < x and draws by inverse CDF), to atol in total variation (1e-6 leaves room for float32).  Then
    verdicts at both ends of [0, 1), which must be possible ones.  uniforms=None: `rows` calls a case (a tenth where
    V > 1000), judged with false_alarm in all.
    refuses: whether fn is to raise where a law is NaN, negative or does not sum to 1 (False: these are not tried).
    parameters: the rule's own.
    """
    cases, failures, laws = list(acceptance_cases(rule)), {}, []
    for name, p_JV, tokens_K, q_KV in cases:
        if failures and p_JV.shape[1] > 1000:
            break  # nothing new to learn, and slow where every place is to be found anew
        case, budget = (p_JV, tokens_K, q_KV), false_alarm / len(cases)
        if fault := _fault(fn, rule, parameters, case, uniforms, rows, budget, atol, laws):
            failures[name] = fault
    for name, given in _bad_laws() if refuses else ():
        try:
            verdict = fn(*given, *([np.array([0.5, 0.5], uniforms)] if uniforms else []))
        except Exception:
            continue
        failures[name] = f"no error, but {verdict}"
    if failures:
        lines = [f"{name}: {fault}" for name, fault in failures.items()]
        lines += [f"it decides like this known defect: {name}" for name in (_alike(laws, atol) if uniforms else ())]
        raise AssertionError("\n  ".join([f"not {rule}, in {len(failures)} of its cases:", *lines]))
    how = f"to {atol:g}, by integration" if uniforms else f"as far as {rows} rows a case tell"
    law = {"p": "the target's law", "argmax p": "the target's argmax", "not p": "not the target's law"}
    return (
        f"decides as {rule} on {len(cases)} cases {how}: given tokens that were drawn from the q it is told, what it "
        f"emits has {law[RULES[rule].emits]}" + ("; refuses what is no law" if refuses else "")
    )


def acceptance_cases(rule="rejection"):
    """(name, p_JV, tokens_K, q_KV or None): the table of `check_acceptance`; without None for a rule of soft laws."""
    soft = RULES[rule].soft
    (p, q), (far_p, far_q) = CASES["A"], CASES["E"]
    for token in range(5):
        yield f"drawn draft, token {token}", np.array([p, far_p]), [token], np.array([q])
        if token in (0, 1):
            yield f"far drafter, token {token}", np.array([far_p, p]), [token], np.array([far_q])
        if token in (0, 4) and not soft:
            yield f"argmax draft, token {token}", np.array([p, far_p]), [token], None
    three, laws = [0, 3, 0], np.array([p, far_p, np.roll(p, 2), np.roll(far_p, 1)])
    drawn = np.array([q, np.roll(q, 1), far_q])
    yield "three drawn drafts", laws, three, drawn
    if not soft:
        yield "three argmax drafts", laws, three, None
    yield "no draft", laws[:1], [], None
    certain, other, none = one_hot(2, 5), one_hot(3, 5), np.array([0, 0.5, 0.5, 0, 0])
    yield "one-hot target, the draft right", np.array([certain, p]), [2], np.array([q])
    yield "one-hot target, the draft wrong", np.array([certain, p]), [0], np.array([q])
    yield "one-hot laws, equal", np.array([certain, other]), [2], np.array([certain])
    yield "one-hot laws, different", np.array([certain, p]), [3], np.array([other])
    yield "disjoint laws", np.array([none, p]), [4], np.array([[0.5, 0, 0, 0, 0.5]])
    yield "an impossible draft token", np.array([none, p]), [0], np.array([[0.25, 0.25, 0.25, 0, 0.25]])
    yield "equal laws", np.array([p, none]), [3], np.array([p])
    for size in (1e-8, 1e-16):
        near = p * (1 + size * np.array([1, -1, 1, -1, 1]))
        yield f"laws equal to {size:g}", np.array([p, far_p]), [0], np.array([near / near.sum()])
    yield "vocabulary of 1", np.ones((2, 1)), [0], np.ones((1, 1))
    for V, drafted in ((1000, "drawn"), (32_000, "argmax"), (262_144, "drawn")):
        at = [0, V // 3, V // 2, V - 2, V - 1]
        wide_JV, wide_KV = np.zeros((2, V)), np.zeros((1, V))
        wide_JV[:, at], wide_KV[:, at] = (far_p, p), far_q
        if drafted == "drawn" or not soft:
            yield f"vocabulary of {V:,}, {drafted} draft", wide_JV, [0], wide_KV if drafted == "drawn" else None


def _bad_laws():
    p, q = CASES["A"]
    for what, factor in (("NaN", np.nan), ("negative", -1.0), ("unnormalized", 2.0)):
        spoiled = q * (factor if what == "unnormalized" else np.array([1, 1, 1, 1, factor]))
        yield f"{what} target law", (np.array([spoiled, p]), [0], np.array([q]))
        yield f"{what} drafter law", (np.array([p, p]), [0], np.array([spoiled]))


def _fault(fn, rule, parameters, case, uniforms, rows, false_alarm, atol, laws):
    """What is wrong with fn in one case, or None; the law found joins `laws`, as (case, law)."""
    p_JV, tokens_K, q_KV = case
    J, known, wide = len(p_JV), {}, p_JV.shape[1] > 1000
    law, decide = _law(rule, parameters, case, known), deciding(rule, p_JV, tokens_K, q_KV, parameters)
    tried = partial(_verdict, fn, uniforms, *(None if part is None else part.copy() for part in case))
    try:
        if not uniforms:
            return _sampled_fault(tried, law, rows // 10 if wide else rows, false_alarm)
        if len({tried(np.full(J, 0.3)) for _ in range(2 if wide else 8)}) > 1:
            return "the same uniforms gave two verdicts"
        did = integrate(tried, J, 1 if wide else 4, known)
        laws.append((case, did))
        for test in ENDS:
            for last in (test,) if wide else ENDS:
                verdict = tried(u_J := np.array([*[test] * (J - 1), last]))
                if not _possible(verdict, law, case, rule) and verdict != decide(u_J):
                    return f"u = {test:g}, at last {last:g}: {_named(verdict)}, which cannot be"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not all(np.array_equal(a, b) for a, b in zip(tried.args[2:], case) if b is not None):
        return "it changed its arguments"
    return _difference(law, did) if _apart(law, did) > atol else None


def _law(rule, parameters, case, known):
    """{verdict: probability} of the rule itself, over the tokens that occur."""
    p_JV, tokens_K, q_KV = case
    occur_V = (p_JV > 0).any(0) | (False if q_KV is None else (q_KV > 0).any(0))
    occur_V[tokens_K] = True
    at = np.flatnonzero(occur_V)
    few = p_JV[:, at], np.searchsorted(at, tokens_K).tolist(), None if q_KV is None else q_KV[:, at]
    law = integrate(deciding(rule, *few, parameters), len(p_JV), known=known)
    return {(accepted, int(at[token])): mass for (accepted, token), mass in law.items()}


def _verdict(fn, uniforms, p_JV, tokens_K, q_KV, *u):
    """fn's verdict as plain numbers, if it is one; its uniforms stay below 1 in their dtype too."""
    u = [np.minimum(u_J.astype(uniforms), np.nextafter(np.ones(1, uniforms), 0)) for u_J in u]
    accepted, token = fn(p_JV, tokens_K, q_KV, *u)
    accepted, token = int(accepted), int(token)
    if not (0 <= accepted <= len(tokens_K) and 0 <= token < p_JV.shape[1]):
        raise ValueError(f"accepted {accepted} of {len(tokens_K)}, token {token} of {p_JV.shape[1]}")
    return accepted, token


def _possible(verdict, law, case, rule):
    """Whether a verdict may be; where rounding decides, any that emits what the target can is good enough."""
    p_JV, tokens_K, _ = case
    emitted = [*tokens_K[: verdict[0]], verdict[1]]
    return verdict in law or (RULES[rule].emits == "p" and all(p_JV[j, token] > 0 for j, token in enumerate(emitted)))


def _sampled_fault(tried, law, rows, false_alarm):
    verdicts = list(law)
    seen = [tried() for _ in range(rows)]
    stray = next((verdict for verdict in seen if verdict not in law), None)
    if stray:
        return f"{_named(stray)}, which cannot be"
    try:
        assert_same_law([verdicts.index(verdict) for verdict in seen], np.array(list(law.values())), false_alarm)
    except AssertionError:
        return _difference(law, {verdict: count / rows for verdict, count in Counter(seen).items()})


def _apart(law, did):
    return sum(abs(law.get(verdict, 0) - did.get(verdict, 0)) for verdict in {*law, *did}) / 2


def _difference(law, did):
    worst = max({*law, *did}, key=lambda verdict: abs(law.get(verdict, 0) - did.get(verdict, 0)))
    return f"{_named(worst)} has probability {did.get(worst, 0):.6g}, should be {law.get(worst, 0):.6g}"


def _named(verdict):
    return f"{verdict[0]} accepted, then token {verdict[1]}"


# --- known defects, by name ---


def _reject(p_JV, tokens_K, q_KV, u_J):
    q_KV = [one_hot(token, p_JV.shape[1]) for token in tokens_K] if q_KV is None else q_KV
    verdict = RULES["rejection"].accept(p_JV, np.array(q_KV), tokens_K, u_J)
    return verdict.accepted, verdict.token


def _residual_from_p(p_JV, tokens_K, q_KV, u_J):
    accepted, token = _reject(p_JV, tokens_K, q_KV, u_J)
    return accepted, draw(p_JV[accepted], u_J[-1])


def _temperature_ignored(p_JV, tokens_K, q_KV, u_J):
    verdict = RULES["greedy"].accept(p_JV, q_KV, tokens_K, u_J)
    return verdict.accepted, verdict.token


DEFECTS = {  # judges that have been seen in engines
    "accepts always": lambda p, d, q, u: (len(d), draw(p[-1], u[-1])),
    "uniforms of the tests are 0": lambda p, d, q, u: _reject(p, d, q, np.append(0 * u[:-1], u[-1])),
    "draws the correction from p, not from the residual": _residual_from_p,
    "bonus token from the row before": lambda p, d, q, u: _reject(np.stack([*p[:-1], p[-2:][0]]), d, q, u),
    "one uniform for all tests": lambda p, d, q, u: _reject(p, d, q, np.append(0 * u[:-1] + u[0], u[-1])),
    "one uniform for a test and the correction": lambda p, d, q, u: _reject(p, d, q, np.append(u[:-1], u[0])),
    "rows of q one too late": lambda p, d, q, u: _reject(p, d, None if q is None else np.roll(q, -1, 0), u),
    "ignores q (judges drawn drafts as point masses)": lambda p, d, q, u: _reject(p, d, None, u),
    "ignores the temperature (argmax at every position)": _temperature_ignored,
}


def _alike(laws, atol):
    """Names of the known defects that decide with these laws, [(case, law)], in every case of a small vocabulary."""
    alike = list(DEFECTS)
    for (p_JV, *draft), law in laws:
        if p_JV.shape[1] == 5:
            known = {}
            alike = [
                name
                for name in alike
                if _apart(law, integrate(partial(DEFECTS[name], p_JV, *draft), len(p_JV), 4, known)) <= atol
            ]
    return alike
