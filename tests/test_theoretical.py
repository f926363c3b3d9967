"""Losslessness, level one: a rule's exact output law equals the target's law p to 1e-12, by enumeration, no sampling.

`emitted` integrates accept() over its uniforms: accept() is constant on each box between breakpoints (which is checked
inside every box), so a sum over boxes is the exact law.  Rules that are wrong on purpose go through the same checks
and must fail them.
"""

from collections import defaultdict
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from minimtp import acceptance
from minimtp.acceptance import RULES, Rule, Verdict, accept, exact_law
from minimtp.sampling import draw

LOSSLESS = ["rejection", "match"]
A_P, A_Q = np.array([.4, .3, .15, .1, .05]), np.array([.5, .2, .15, .1, .05])     # a much used five-token case


def draft_of(tokens, q_KV=None):
    return SimpleNamespace(tokens=list(tokens), q_KV=q_KV, soft_KV=None)


def total_variation(p, q):
    return np.abs(np.asarray(p) - q).sum() / 2


# --- laws to try ---


def one_hot(token, V):
    return np.eye(V)[token]


def random_pairs(count, seed=0):
    """(p, q): spread, peaked, one-hot, disjoint, equal, equal to rounding, and with entries down to 1e-300."""
    rng = np.random.default_rng(seed)
    for n in range(count):
        V = int(rng.integers(2, 9))
        p, q = (rng.dirichlet(np.full(V, rng.choice([.05, .3, 1, 10]))) + 1e-300 for _ in "pq")
        kind = n % 8
        if kind == 1:
            p = one_hot(rng.integers(V), V)
        elif kind == 2:
            q = one_hot(rng.integers(V), V)
        elif kind == 3:
            half = np.arange(V) < V // 2
            p, q = np.where(half, p, 0), np.where(half, 0, q)
        elif kind == 4:
            q = p.copy()
        elif kind == 5:
            q = p * (1 + rng.choice([1e-15, 1e-12, 1e-8]) * rng.normal(size=V))
        elif kind == 6:
            p, q = (law * 10. ** -rng.integers(0, 300, V) for law in (p, q))
        yield p / p.sum(), q / q.sum()


def worst_gap(rule, count=4000):
    """The largest |exact_law - p| over many dense drafters, and over every point mass for each p."""
    gap = 0
    for p, q in random_pairs(count):
        for drafter in (q, int(q.argmax()), int(p.argmin())):
            gap = max(gap, np.abs(exact_law(rule, p, drafter) - p).max())
    return gap


# --- accept(), integrated over its uniforms ---


def breakpoints(rule, p_JV, q_KV, tokens):
    """For each uniform, the places where accept() may change its mind (more than there are does no harm)."""
    def cdf(r):
        return np.cumsum(r) / max(np.sum(r), 1e-300)
    if rule == "match":
        return [cdf(p) for p in p_JV]
    tests = [float(p[d]) / float(q[d]) for p, q, d in zip(p_JV, q_KV, tokens)]
    return [tests] * len(tokens) + [np.concatenate([cdf(p_JV[-1])] + [cdf(r) for p, q in zip(p_JV, q_KV)
                                                                     for r in (p, np.maximum(p - q, 0))])]


def cells(points):
    """[0, 1) cut at the points; cells that only rounding made are left out."""
    edges = np.unique(np.clip([0, 1, *points], 0, 1))
    return [(a, b) for a, b in zip(edges, edges[1:]) if b - a > 1e-13]


def emitted(rule, p_JV, draft):
    """{verdict: probability}, over all uniforms."""
    q_KV = [one_hot(d, len(p_JV[0])) for d in draft.tokens] if draft.q_KV is None else draft.q_KV
    law = defaultdict(float)
    for box in product(*map(cells, breakpoints(rule, p_JV, q_KV, draft.tokens))):
        low, high = np.array(box).T
        seen = {accept(rule, p_JV, draft, low + part * (high - low)) for part in (.01, .5, .99)}
        assert len(seen) == 1, f"{rule} changes its verdict inside the box {box}: {seen}"
        law[seen.pop()] += (high - low).prod()
    return law


def first_token_law(rule, p, q, drawn=None, dense=True):
    """Law of the first token that accept() emits, with the draft token drawn from `drawn` (q itself if honest)."""
    law, drawn = np.zeros(len(p)), q if drawn is None else drawn
    for d in np.flatnonzero(drawn):
        for verdict, mass in emitted(rule, [p, p], draft_of([d], [q] if dense else None)).items():
            law[d if verdict.accepted else verdict.token] += drawn[d] * mass
    return law


def acceptance_rate(rule, p, q, dense=True):
    drawn = q if dense else one_hot(q.argmax(), len(q))
    return sum(drawn[d] * mass for d in np.flatnonzero(drawn)
               for verdict, mass in emitted(rule, [p, p], draft_of([d], [q] if dense else None)).items()
               if verdict.accepted)


# --- a target and a drafter with memory, for joint laws ---


def conditional_laws(rng, V, depth):
    """{prefix: law of the next token}, one entry in five thinned to almost nothing."""
    return {prefix: law / law.sum() for n in range(depth) for prefix in product(range(V), repeat=n)
            for law in [rng.dirichlet(np.ones(V)) * rng.choice([1, 1, 1, 1, 1e-6], V)]}


def continuation(P, prefix, n):
    """Joint law of the n tokens after a prefix, by the chain rule."""
    if n == 0:
        return np.array(1.)
    return np.stack([p * continuation(P, prefix + (t,), n - 1) for t, p in enumerate(P[prefix])])


def joint_law(rule, P, Q, K, dense):
    """Joint law of K + 1 tokens: one round of `rule`, shorter outputs completed from the target's own laws."""
    V = len(P[()])
    law = np.zeros((V,) * (K + 1))
    for tokens in product(range(V), repeat=K):
        prefixes = [tokens[:j] for j in range(K + 1)]
        p_JV, q_KV = [P[x] for x in prefixes], [Q[x] for x in prefixes[:K]]
        drawn_KV = q_KV if dense else [one_hot(q.argmax(), V) for q in q_KV]
        chance = np.prod([q[t] for q, t in zip(drawn_KV, tokens)])
        if chance == 0:
            continue
        for verdict, mass in emitted(rule, p_JV, draft_of(tokens, q_KV if dense else None)).items():
            out = tokens[:verdict.accepted] + (verdict.token,)
            law[out] += chance * mass * continuation(P, out, K + 1 - len(out))
    return law


# --- wrong on purpose ---


def always(p_JV, q_KV, tokens_K, u_J):
    return Verdict(len(tokens_K), draw(p_JV[-1], u_J[-1]))


def correct_from_p(p_JV, q_KV, tokens_K, u_J):
    for j, d in enumerate(tokens_K):
        if not u_J[j] < p_JV[j, d] / q_KV[j, d]:
            return Verdict(j, draw(p_JV[j], u_J[-1]))
    return always(p_JV, q_KV, tokens_K, u_J)


def one_test_for_all(p_JV, q_KV, tokens_K, u_J):
    return RULES["rejection"].accept(p_JV, q_KV, tokens_K, np.append(np.full(len(tokens_K), u_J[0]), u_J[-1]))


def bonus_from_the_row_before(p_JV, q_KV, tokens_K, u_J):
    return RULES["rejection"].accept(np.stack([*p_JV[:-1], p_JV[-2]]), q_KV, tokens_K, u_J)


def soft(p, q):
    """transformers' rule for Gemma 4 drafts: the argmax of q, tested as if it had been drawn from q."""
    d = q.argmax()
    keep = min(1, p[d] / q[d])
    return keep * one_hot(d, len(p)) + (1 - keep) * acceptance.residual(p, q)


WRONG = {
    "accept always": Rule(always, lambda p, q: q),
    "correct from p": Rule(correct_from_p, lambda p, q: np.minimum(p, q) + (q - np.minimum(p, q)).sum() * p),
    "greedy draft, soft q": Rule(acceptance.rejection, soft),
    "one test for all": Rule(one_test_for_all, acceptance.rejection_law),
    "bonus from the row before": Rule(bonus_from_the_row_before, acceptance.rejection_law),
}


@pytest.fixture(autouse=True)
def wrong_rules(monkeypatch):
    for name, rule in WRONG.items():
        monkeypatch.setitem(RULES, name, rule)


# --- the first token ---


@pytest.mark.parametrize("rule", LOSSLESS)
def test_a_lossless_rule_emits_the_targets_law(rule):
    assert worst_gap(rule) < 1e-12


@pytest.mark.parametrize("rule", ["accept always", "correct from p", "greedy draft, soft q"])
def test_a_wrong_rule_fails_that_check(rule):
    assert worst_gap(rule, 200) > .1


@pytest.mark.parametrize("rule", ["greedy", *LOSSLESS, "accept always", "correct from p"])
def test_exact_law_is_what_accept_does(rule):
    for p, q in random_pairs(80, seed=1):
        np.testing.assert_allclose(first_token_law(rule, p, q), exact_law(rule, p, q), rtol=0, atol=2e-12)
        d = int(q.argmax())
        np.testing.assert_allclose(first_token_law(rule, p, one_hot(d, len(p)), dense=False), exact_law(rule, p, d),
                                   rtol=0, atol=2e-12)


def test_a_point_mass_is_its_one_hot_law():
    rng = np.random.default_rng(2)
    for p, q in random_pairs(200, seed=2):
        d, u = int(q.argmax()), rng.random(2)
        for rule in ("greedy", *LOSSLESS):
            np.testing.assert_array_equal(exact_law(rule, p, d), exact_law(rule, p, one_hot(d, len(p))))
            dense = draft_of([d], [one_hot(d, len(p))])
            assert accept(rule, [p, q], draft_of([d]), u) == accept(rule, [p, q], dense, u)


def test_greedy_emits_the_argmax_first_of_equals():
    for p, q in random_pairs(500, seed=3):
        np.testing.assert_allclose(exact_law("greedy", p, q), one_hot(p.argmax(), len(p)), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(exact_law("greedy", [.2, .4, .4], 2), [0, 1, 0])
    assert accept("greedy", [[.2, .4, .4]] * 2, draft_of([2]), [.9, .9]) == Verdict(0, 1)
    assert accept("greedy", [[.2, .4, .4], [.5, .5, 0]], draft_of([1]), [.9, .9]) == Verdict(1, 0)


# --- blocks ---


@pytest.mark.parametrize("K, cases", [(0, 5), (1, 20), (2, 6), (3, 1)])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "point mass"])
@pytest.mark.parametrize("rule", LOSSLESS)
def test_a_round_keeps_the_joint_law(rule, dense, K, cases):
    rng = np.random.default_rng(K)
    for _ in range(cases):
        P, Q = conditional_laws(rng, 3, K + 1), conditional_laws(rng, 3, K + 1)
        np.testing.assert_allclose(joint_law(rule, P, Q, K, dense), continuation(P, (), K + 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["accept always", "correct from p", "one test for all", "bonus from the row before"])
def test_a_wrong_rule_bends_the_joint_law(rule):
    rng = np.random.default_rng(4)
    P, Q = conditional_laws(rng, 3, 3), conditional_laws(rng, 3, 3)
    assert total_variation(joint_law(rule, P, Q, 2, True).ravel(), continuation(P, (), 3).ravel()) > .02


# --- how callers get it wrong, with the rules themselves right ---


@pytest.mark.parametrize("p, q, gap", [
    (A_P, A_Q, .4), (A_P, A_P, .6),
    ([.1, .5, .2, .1, .1], [.6, .1, .1, .1, .1], 7 / 30)], ids=["A", "q = p", "E"])
def test_an_argmax_draft_judged_by_its_soft_law_bends_the_law(p, q, gap):
    """The defect of transformers issue 47932: the better the drafter, the greedier the output."""
    p, q = np.array(p), np.array(q)
    law = first_token_law("rejection", p, q, drawn=one_hot(q.argmax(), 5))
    np.testing.assert_allclose(law, soft(p, q), rtol=0, atol=1e-12)
    assert total_variation(law, p) == pytest.approx(gap, abs=1e-12)


def test_a_law_reported_before_top_k_bends_the_law():
    """transformers before pull request 48007.  Tokens that top-3 removed from the draft are never emitted: TV .15."""
    drawn = np.where(A_Q >= .15, A_Q, 0) / .85
    assert total_variation(first_token_law("rejection", A_P, A_Q, drawn), A_P) == pytest.approx(.15, abs=1e-12)
    np.testing.assert_allclose(first_token_law("rejection", A_P, drawn), A_P, rtol=0, atol=1e-12)


def test_uniforms_shared_by_draft_and_test_bend_the_law():
    """One uniform for both, and here the output is the drafter's law; with separate ones it is the target's."""
    law = np.zeros(5)
    for (a, b), (c, e) in product(cells([*np.cumsum(A_Q), *A_P / A_Q]), cells(np.cumsum(A_P))):
        u = [(a + b) / 2, (c + e) / 2]
        d = draw(A_Q, u[0])
        verdict = accept("rejection", [A_P, A_P], draft_of([d], [A_Q]), u)
        law[d if verdict.accepted else verdict.token] += (b - a) * (e - c)
    assert total_variation(law, A_P) == pytest.approx(.10, abs=1e-12)
    np.testing.assert_allclose(law, A_Q, rtol=0, atol=1e-12)
    np.testing.assert_allclose(first_token_law("rejection", A_P, A_Q), A_P, rtol=0, atol=1e-12)


# --- known cases ---


@pytest.mark.parametrize("draft, target, output", [
    ([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]), ([1, 2, 3], [1, 5, 3, 4], [1, 5]),
    ([1, 2], [1, 2, 5], [1, 2, 5]), ([3], [3, 4], [3, 4]), ([], [5], [5]), ([1, 2, 3], [0, 5, 0, 4], [0])])
@pytest.mark.parametrize("rule", ["greedy", *LOSSLESS])
def test_greedy_cases_of_vllm(rule, draft, target, output):
    """vLLM, tests/v1/sample/test_rejection_sampler.py.  Where the target is certain, every rule does the same."""
    verdict = accept(rule, np.eye(6)[target], draft_of(draft), np.full(len(target), .5))
    assert verdict == Verdict(len(output) - 1, output[-1])
    assert draft[:verdict.accepted] == output[:-1]


@pytest.mark.parametrize("p, q, dense, point", [
    (A_P, A_Q, .9, .4),
    (np.array([.6, .2, .1, .1]), np.array([.7, .2, .05, .05]), .9, .6),             # SGLang issue 10308
    (np.array([.7, .2, .1]), np.array([.1, .2, .7]), .4, .1)])
def test_published_acceptance_rates(p, q, dense, point):
    assert acceptance_rate("rejection", p, q) == pytest.approx(dense, abs=1e-12)
    assert acceptance_rate("rejection", p, q, dense=False) == pytest.approx(point, abs=1e-12)
    assert acceptance_rate("match", p, q) == pytest.approx(p @ q, abs=1e-12)
    assert acceptance_rate("match", p, q, dense=False) == pytest.approx(point, abs=1e-12)


def test_residual():
    np.testing.assert_array_equal(acceptance.residual(np.array([.6, .3, .1]), np.array([.2, .3, .5])), [1, 0, 0])
    np.testing.assert_array_equal(acceptance.residual(A_P, A_P), A_P)
    half = np.array([.5, .5])
    np.testing.assert_array_equal(acceptance.residual(half, np.nextafter(half, 1)), half)
    np.testing.assert_allclose(acceptance.residual(A_P, one_hot(0, 5)), [0, .5, .25, 1 / 6, 1 / 12], atol=1e-15)


def test_which_uniform_does_what():
    """u[:K] are the tests, strictly u < ratio; u[K] draws correction or bonus; match draws its j-th token by u[j]."""
    p, q = np.array([.25, .75]), np.array([.5, .5])
    block = draft_of([1, 0], [q, q])
    assert accept("rejection", [p, p, p], block, [.9, .49, .1]) == Verdict(2, 0)
    assert accept("rejection", [p, p, p], block, [.9, .49, .3]) == Verdict(2, 1)
    assert accept("rejection", [p, p, p], block, [.9, .50, .1]) == Verdict(1, 1)
    assert accept("rejection", [p, p], draft_of([0]), [np.nextafter(.25, 0), .9]) == Verdict(1, 1)
    assert accept("rejection", [p, p], draft_of([0]), [.25, 0]) == Verdict(0, 1)
    assert accept("match", [p, p, p], block, [.3, .2, .3]) == Verdict(2, 1)
    assert accept("match", [p, p, p], block, [.3, .3, .1]) == Verdict(1, 1)
    assert accept("match", [p, p, p], block, [.2, .2, .9]) == Verdict(0, 0)
    for rule in LOSSLESS:
        assert [accept(rule, [p], draft_of([]), [u]).token for u in (0, .24, .25, .99)] == [0, 0, 1, 1]


def test_a_perfect_drafter_is_always_accepted():
    for p, _ in random_pairs(50, seed=5):
        tokens = [int(p.argmax()), int(np.flatnonzero(p)[0])]
        assert accept("rejection", [p] * 3, draft_of(tokens, [p, p]), [np.nextafter(1, 0)] * 3).accepted == 2


def test_a_probability_too_small_to_divide_by_is_no_overflow():
    p, q = np.array([.5, .5]), np.array([5e-324, 1])
    with np.errstate(all="raise"):
        assert accept("rejection", [p, p], draft_of([0], [q]), [.99, 0]) == Verdict(1, 0)


def test_float32_laws_and_numpy_tokens_are_welcome_and_verdicts_are_plain():
    p = A_P.astype(np.float32)
    verdict = accept("rejection", np.stack([p, p]), draft_of(np.array([0]), np.stack([p])), np.float32([.5, .99]))
    assert verdict == Verdict(1, 4) and type(verdict.accepted) is type(verdict.token) is int
    np.testing.assert_array_equal(exact_law("match", p, np.int64(3)), p.astype(np.float64))


# --- bad input ---


@pytest.mark.parametrize("said, change", [
    ("unknown acceptance rule 'reject'; known: greedy, rejection, match", dict(rule="reject")),
    ("rule 'rejection' has no parameter 'epsilon'; it has none", dict(epsilon=.1)),
    (r"p_JV has shape \[3, 5\]; wanted \[2, V\]", dict(p=[A_P] * 3)),
    (r"p_JV has shape \[5\]; wanted \[2, V\]", dict(p=A_P)),
    (r"p_JV\[1\] is no law: least entry -0.1, sum 1; ", dict(p=[[.5, .5], [1.1, -.1]])),
    (r"p_JV\[0\] is no law: least entry 0.2, sum 1.2", dict(p=[[1, .2], [.5, .5]])),
    (r"p_JV\[1\] is no law: least entry nan", dict(p=[A_P, A_P * np.nan])),
    (r"p_JV\[0\] is no law: .* sum inf", dict(p=[[np.inf, 0], [.5, .5]])),
    (r"p_JV\[0\] is no law: .* sum 1.000002", dict(p=[A_P * 1.000002, A_P])),
    (r"q_KV has shape \[2, 5\]; wanted \[1, 5\]", dict(q=[A_Q, A_Q])),
    (r"q_KV has shape \[1, 4\]; wanted \[1, 5\]", dict(q=[A_Q[:4]])),
    (r"q_KV\[0\] is no law: least entry 0.1, sum 0.5", dict(q=[[.1] * 5])),
    (r"draft token 0 is 2, but its law q_KV\[0\] gives it no probability", dict(q=[[.5, .5, 0, 0, 0]])),
    (r"a draft token is 5; wanted a token id in \[0, 5\)", dict(tokens=[5])),
    (r"a draft token is -1; wanted", dict(tokens=[-1])),
    (r"a draft token is 0.5; wanted", dict(tokens=[.5])),
    (r"u_J is \[0.5\]; wanted 2 uniforms in \[0, 1\) for 1 draft tokens", dict(u=[.5])),
    (r"u_J is \[0.5, 1.0\]; wanted 2 uniforms", dict(u=[.5, 1.])),
    (r"u_J is \[-0.1, 0.5\]; wanted 2 uniforms", dict(u=[-.1, .5])),
    (r"u_J is \[nan, 0.5\]; wanted 2 uniforms", dict(u=[np.nan, .5])),
])
def test_bad_input_to_accept_says_what_came_and_what_was_wanted(monkeypatch, said, change):
    for name in WRONG:
        monkeypatch.delitem(RULES, name)
    given = dict(rule="rejection", p=[A_P, A_P], tokens=[2], q=[A_Q], u=[.5, .5]) | change
    parameters = {name: given[name] for name in given if name not in ("rule", "p", "tokens", "q", "u")}
    with pytest.raises(ValueError, match=said):
        accept(given["rule"], given["p"], draft_of(given["tokens"], given["q"]), given["u"], **parameters)


@pytest.mark.parametrize("said, p, q", [
    (r"q is 5; wanted a token id in \[0, 5\)", A_P, 5), (r"q is 0.5; wanted a token id", A_P, .5),
    (r"q has shape \[2\]; wanted \[5\]", A_P, [.5, .5]), ("q is no law: least entry 0, sum 0", A_P, [0] * 5),
    ("p_V is no law", [.5, .6], 0), (r"p_V has shape \[1, 2\]; wanted \[V\]", [[.5, .5]], 0),
    (r"p_V has shape \[0\]; wanted \[V\]", [], 0)])
def test_bad_input_to_exact_law(said, p, q):
    with pytest.raises(ValueError, match=said):
        exact_law("match", p, q)


def test_unknown_names_to_exact_law():
    with pytest.raises(ValueError, match="unknown acceptance rule 'block'; known: greedy, rejection, match"):
        exact_law("block", A_P, 0)
    with pytest.raises(ValueError, match="rule 'greedy' has no parameter 'delta'; it has none"):
        exact_law("greedy", A_P, 0, delta=.3)


def test_parameters_reach_a_rule_and_its_law_by_name(monkeypatch):
    monkeypatch.setitem(RULES, "sure", Rule(lambda p, q, d, u, *, least=.5: Verdict(0, int(p[0, d[0]] < least)),
                                            lambda p, q, *, least=.5: p * (p >= least)))
    assert accept("sure", [A_P, A_P], draft_of([0]), [0, 0], least=.3).token == 0
    assert accept("sure", [A_P, A_P], draft_of([0]), [0, 0]).token == 1
    np.testing.assert_array_equal(exact_law("sure", A_P, 0, least=.4), [.4, 0, 0, 0, 0])
    with pytest.raises(ValueError, match="rule 'sure' has no parameter 'most'; it has least"):
        accept("sure", [A_P, A_P], draft_of([0]), [0, 0], most=1)


def test_a_draft_of_nothing_needs_no_law():
    for q_KV in (None, [], np.zeros((0, 5))):
        assert accept("rejection", [A_P], draft_of([], q_KV), [.5]) == Verdict(0, 1)
