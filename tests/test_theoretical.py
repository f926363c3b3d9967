"""Losslessness, level one: a rule's exact output law equals the target's law p to 1e-12, by enumeration, no sampling.

minimtp.audit integrates what a rule decides over its uniforms, which is exact because that changes at finitely many
places.  Rules that are wrong on purpose go through the same checks and must fail them.
"""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from minimtp import acceptance
from minimtp.acceptance import RULES, Rule, Verdict, accept, exact_law
from minimtp.audit import (
    SETTINGS,
    block_law,
    completed,
    continuation,
    emitted,
    integrate,
    tokens_per_round,
    total_variation,
)
from minimtp.sampling import draw

LOSSLESS = ["rejection", "match", "block", "threshold"]
SET = [(rule, setting) for rule in RULES for setting in SETTINGS.get(rule, [{}])]
A_P, A_Q = np.array([0.4, 0.3, 0.15, 0.1, 0.05]), np.array([0.5, 0.2, 0.15, 0.1, 0.05])  # a much used five-token case


def draft_of(tokens, q_KV=None, soft_KV=None):
    return SimpleNamespace(tokens=list(tokens), q_KV=q_KV, soft_KV=soft_KV)


# --- laws to try ---


def one_hot(token, V):
    return np.eye(V)[token]


def random_pairs(count, seed=0, largest=8):
    """(p, q): spread, peaked, one-hot, disjoint, equal, equal to rounding, and with entries down to 1e-300."""
    rng = np.random.default_rng(seed)
    for n in range(count):
        V = int(rng.integers(2, largest + 1))
        p, q = (rng.dirichlet(np.full(V, rng.choice([0.05, 0.3, 1, 10]))) + 1e-300 for _ in "pq")
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
            p, q = (law * 10.0 ** -rng.integers(0, 300, V) for law in (p, q))
        yield p / p.sum(), q / q.sum()


def worst_gap(rule, count=1500):
    """The largest |exact_law - p| over many dense drafters, and over every point mass for each p."""
    gap = 0
    for p, q in random_pairs(count):
        for drafter in (q, int(q.argmax()), int(p.argmin())):
            gap = max(gap, np.abs(exact_law(rule, p, drafter) - p).max())
    return gap


# --- what accept() does, by audit's integration ---


def first_round(rule, p, q, drawn=None, **parameters):
    """{emitted tokens: probability} of one draft token; q: a law, or a token id for a point mass."""
    drawn = q.argmax() if RULES[rule].soft and drawn is None else drawn
    return emitted(rule, lambda x: p, lambda x: q, 1, None if drawn is None else lambda x: drawn, **parameters)


def first_token_law(rule, p, q, drawn=None, **parameters):
    """Law of the first token that accept() emits, with the draft token drawn from `drawn` (q itself if honest)."""
    return completed(first_round(rule, p, q, drawn, **parameters), lambda x: p, 2).sum(1)


def acceptance_rate(rule, p, q):
    return tokens_per_round(first_round(rule, p, q)) - 1


@pytest.mark.parametrize("pieces", [1, 8])
def test_integration_of_known_functions(pieces):
    """Two tests and a draw from four tokens, one of them too rare for any grid; a uniform that is not looked at."""
    p = np.array([0.3, 1e-9, 0.5, 0.2 - 1e-9])
    law = integrate(lambda u: (int(u[0] < 0.25) + int(u[1] < 1e-5), draw(p, u[3])), 4, pieces)
    some = np.convolve([0.75, 0.25], [1 - 1e-5, 1e-5])
    assert law == pytest.approx({(n, t): some[n] * p[t] for n in range(3) for t in range(4)}, abs=1e-14)
    assert sum(law.values()) == pytest.approx(1, abs=1e-15)


def test_integration_of_a_function_whose_answers_come_back_needs_pieces():
    def decide(u):
        return 0, int(0.2 < u[0] < 0.4)

    assert integrate(decide, 1) == {(0, 0): 1}
    assert integrate(decide, 1, pieces=8) == pytest.approx({(0, 0): 0.8, (0, 1): 0.2})


def test_integration_of_what_is_no_function():
    noise = iter(np.random.RandomState(0).random_sample(1_000_000))
    with pytest.raises(ValueError, match="more than 2,000 changes along one uniform"):
        integrate(lambda u: next(noise), 1)


# --- a target and a drafter with memory, for joint laws ---


def conditional_laws(rng, V, depth):
    """{prefix: law of the next token}, one entry in five thinned to almost nothing."""
    return {
        prefix: law / law.sum()
        for n in range(depth)
        for prefix in product(range(V), repeat=n)
        for law in [rng.dirichlet(np.ones(V)) * rng.choice([1, 1, 1, 1, 1e-6], V)]
    }


def target_law(P, n):
    return continuation(P.__getitem__, (), n)


def joint_law(rule, P, Q, K, dense):
    """As audit's, of languages that are tables; point masses: the argmax of Q."""
    return block_law(rule, P.__getitem__, Q.__getitem__ if dense else lambda x: int(Q[x].argmax()), K)


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


WRONG = {
    "accept always": Rule(always, lambda p, q: q),
    "correct from p": Rule(correct_from_p, lambda p, q: np.minimum(p, q) + (q - np.minimum(p, q)).sum() * p),
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


@pytest.mark.parametrize("rule", ["accept always", "correct from p", "hf-gemma4", "typical", "ensemble", "relaxed"])
def test_a_wrong_rule_fails_that_check(rule):
    assert worst_gap(rule, 200) > 0.1


@pytest.mark.parametrize("rule, setting", [*SET, ("accept always", {}), ("correct from p", {})])
def test_exact_law_is_what_accept_does(rule, setting):
    for p, q in random_pairs(16, seed=1, largest=4):
        for drafter in (q,) if RULES.get(rule) and RULES[rule].soft else (q, int(q.argmax())):
            did, law = first_token_law(rule, p, drafter, **setting), exact_law(rule, p, drafter, **setting)
            np.testing.assert_allclose(did, law, rtol=0, atol=2e-12)


def test_an_exact_law_follows_its_rule(monkeypatch):
    """It is not p by decree: where the rule's residual is broken, its law is."""
    monkeypatch.setattr(acceptance, "residual", lambda p, q: p)
    assert worst_gap("rejection", 200) > 0.1
    for p, q in random_pairs(16, seed=6):
        np.testing.assert_allclose(first_token_law("rejection", p, q), exact_law("rejection", p, q), rtol=0, atol=2e-12)


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
    np.testing.assert_array_equal(exact_law("greedy", [0.2, 0.4, 0.4], 2), [0, 1, 0])
    assert accept("greedy", [[0.2, 0.4, 0.4]] * 2, draft_of([2]), [0.9, 0.9]) == Verdict(0, 1)
    assert accept("greedy", [[0.2, 0.4, 0.4], [0.5, 0.5, 0]], draft_of([1]), [0.9, 0.9]) == Verdict(1, 0)


# --- blocks ---


@pytest.mark.parametrize("K, cases", [(0, 5), (1, 10), (2, 3), (3, 1), (4, 1)])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "point mass"])
@pytest.mark.parametrize("rule", LOSSLESS)
def test_a_round_keeps_the_joint_law(rule, dense, K, cases):
    rng = np.random.default_rng(K)
    for _ in range(cases):
        P, Q = conditional_laws(rng, 3 - K // 4, K + 1), conditional_laws(rng, 3 - K // 4, K + 1)
        np.testing.assert_allclose(joint_law(rule, P, Q, K, dense), target_law(P, K + 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["accept always", "correct from p", "one test for all", "bonus from the row before"])
def test_a_wrong_rule_bends_the_joint_law(rule):
    rng = np.random.default_rng(4)
    P, Q = conditional_laws(rng, 3, 3), conditional_laws(rng, 3, 3)
    assert total_variation(joint_law(rule, P, Q, 2, True).ravel(), target_law(P, 3).ravel()) > 0.02


# --- how callers get it wrong, with the rules themselves right ---


@pytest.mark.parametrize(
    "p, q, gap",
    [(A_P, A_Q, 0.4), (A_P, A_P, 0.6), ([0.1, 0.5, 0.2, 0.1, 0.1], [0.6, 0.1, 0.1, 0.1, 0.1], 7 / 30)],
    ids=["A", "q = p", "E"],
)
def test_an_argmax_draft_judged_by_its_soft_law_bends_the_law(p, q, gap):
    """The defect of transformers issue 47932: the better the drafter, the greedier the output."""
    p, q = np.array(p), np.array(q)
    law = first_token_law("rejection", p, q, drawn=one_hot(q.argmax(), 5))
    np.testing.assert_allclose(law, exact_law("hf-gemma4", p, q), rtol=0, atol=1e-12)
    assert total_variation(law, p) == pytest.approx(gap, abs=1e-12)


def test_a_law_reported_before_top_k_bends_the_law():
    """transformers before pull request 48007.  Tokens that top-3 removed from the draft are never emitted: TV .15."""
    drawn = np.where(A_Q >= 0.15, A_Q, 0) / 0.85
    assert total_variation(first_token_law("rejection", A_P, A_Q, drawn), A_P) == pytest.approx(0.15, abs=1e-12)
    np.testing.assert_allclose(first_token_law("rejection", A_P, drawn), A_P, rtol=0, atol=1e-12)


def test_uniforms_shared_by_draft_and_test_bend_the_law():
    """One uniform for both, and here the output is the drafter's law; with separate ones it is the target's."""

    def emit(u):
        d = draw(A_Q, u[0])
        verdict = accept("rejection", [A_P, A_P], draft_of([d], [A_Q]), u)
        return d if verdict.accepted else verdict.token

    found = integrate(emit, 2, pieces=32)
    law = np.array([found[token] for token in range(5)])
    assert total_variation(law, A_P) == pytest.approx(0.10, abs=1e-12)
    np.testing.assert_allclose(law, A_Q, rtol=0, atol=1e-12)
    np.testing.assert_allclose(first_token_law("rejection", A_P, A_Q), A_P, rtol=0, atol=1e-12)


# --- known cases ---


@pytest.mark.parametrize(
    "p, q, dense, point",
    [
        (A_P, A_Q, 0.9, 0.4),
        (np.array([0.6, 0.2, 0.1, 0.1]), np.array([0.7, 0.2, 0.05, 0.05]), 0.9, 0.6),  # SGLang issue 10308
        (np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.2, 0.7]), 0.4, 0.1),
    ],
)
def test_published_acceptance_rates(p, q, dense, point):
    assert acceptance_rate("rejection", p, q) == pytest.approx(dense, abs=1e-12)
    assert acceptance_rate("rejection", p, int(q.argmax())) == pytest.approx(point, abs=1e-12)
    assert acceptance_rate("match", p, q) == pytest.approx(p @ q, abs=1e-12)
    assert acceptance_rate("match", p, int(q.argmax())) == pytest.approx(point, abs=1e-12)


def test_residual():
    np.testing.assert_array_equal(acceptance.residual(np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.3, 0.5])), [1, 0, 0])
    np.testing.assert_array_equal(acceptance.residual(A_P, A_P), A_P)
    half = np.array([0.5, 0.5])
    np.testing.assert_array_equal(acceptance.residual(half, np.nextafter(half, 1)), half)
    np.testing.assert_allclose(acceptance.residual(A_P, one_hot(0, 5)), [0, 0.5, 0.25, 1 / 6, 1 / 12], atol=1e-15)


def test_which_uniform_does_what():
    """u[:K] are the tests, strictly u < ratio; u[K] draws correction or bonus; match draws its j-th token by u[j]."""
    p, q = np.array([0.25, 0.75]), np.array([0.5, 0.5])
    block = draft_of([1, 0], [q, q])
    assert accept("rejection", [p, p, p], block, [0.9, 0.49, 0.1]) == Verdict(2, 0)
    assert accept("rejection", [p, p, p], block, [0.9, 0.49, 0.3]) == Verdict(2, 1)
    assert accept("rejection", [p, p, p], block, [0.9, 0.50, 0.1]) == Verdict(1, 1)
    assert accept("rejection", [p, p], draft_of([0]), [np.nextafter(0.25, 0), 0.9]) == Verdict(1, 1)
    assert accept("rejection", [p, p], draft_of([0]), [0.25, 0]) == Verdict(0, 1)
    assert accept("match", [p, p, p], block, [0.3, 0.2, 0.3]) == Verdict(2, 1)
    assert accept("match", [p, p, p], block, [0.3, 0.3, 0.1]) == Verdict(1, 1)
    assert accept("match", [p, p, p], block, [0.2, 0.2, 0.9]) == Verdict(0, 0)
    for rule in {*RULES} - {"greedy", *WRONG}:
        assert [accept(rule, [p], draft_of([]), [u]).token for u in (0, 0.24, 0.25, 0.99)] == [0, 0, 1, 1]


def test_a_perfect_drafter_is_always_accepted():
    for p, _ in random_pairs(50, seed=5):
        tokens = [int(p.argmax()), int(np.flatnonzero(p)[0])]
        assert accept("rejection", [p] * 3, draft_of(tokens, [p, p]), [np.nextafter(1, 0)] * 3).accepted == 2


def test_a_probability_too_small_to_divide_by_is_no_overflow():
    p, q = np.array([0.5, 0.5]), np.array([5e-324, 1])
    with np.errstate(all="raise"):
        assert accept("rejection", [p, p], draft_of([0], [q]), [0.99, 0]) == Verdict(1, 0)


def test_float32_laws_and_numpy_tokens_are_welcome_and_verdicts_are_plain():
    p = A_P.astype(np.float32)
    verdict = accept("rejection", np.stack([p, p]), draft_of(np.array([0]), np.stack([p])), np.float32([0.5, 0.99]))
    assert verdict == Verdict(1, 4) and type(verdict.accepted) is type(verdict.token) is int
    np.testing.assert_array_equal(exact_law("match", p, np.int64(3)), p.astype(np.float64))
    assert all(exact_law(rule, p, p).dtype == np.float64 for rule in ("greedy", *LOSSLESS))


# --- bad input ---


@pytest.mark.parametrize(
    "said, change",
    [
        ("unknown acceptance rule 'reject'; known: greedy, rejection, match", dict(rule="reject")),
        ("rule 'rejection' has no parameter 'epsilon'; it has none", dict(epsilon=0.1)),
        ("rule 'typical' has no parameter 'w'; it has epsilon, delta", dict(rule="typical", w=0.1)),
        (r"epsilon is 1.5; wanted a number in \[0, 1\]", dict(rule="typical", epsilon=1.5)),
        (r"delta is nan; wanted a number in \[0, inf\]", dict(rule="typical", delta=np.nan)),
        (r"assistant_ensemble_weight is -0.1; wanted", dict(rule="ensemble", assistant_ensemble_weight=-0.1)),
        (r"threshold_acc is '1'; wanted a number in \[0, 1\]", dict(rule="threshold", threshold_acc="1")),
        (r"threshold_single is 2; wanted a number in", dict(rule="threshold", threshold_single=2)),
        (r"relaxed_topk is 1.5; wanted an integer in \[1, inf\]", dict(rule="relaxed", relaxed_topk=1.5)),
        (r"relaxed_topk is 0; wanted an integer", dict(rule="relaxed", relaxed_topk=0)),
        (r"relaxed_delta is -1; wanted a number in \[0, 1\]", dict(rule="relaxed", relaxed_delta=-1)),
        ("rule 'hf-gemma4' judges by draft.soft_KV, .*; this draft has none", dict(rule="hf-gemma4")),
        (r"p_JV has shape \[3, 5\]; wanted \[2, V\]", dict(p=[A_P] * 3)),
        (r"p_JV has shape \[5\]; wanted \[2, V\]", dict(p=A_P)),
        (r"p_JV\[1\] is no law: least entry -0.1, sum 1; ", dict(p=[[0.5, 0.5], [1.1, -0.1]])),
        (r"p_JV\[0\] is no law: least entry 0.2, sum 1.2", dict(p=[[1, 0.2], [0.5, 0.5]])),
        (r"p_JV\[1\] is no law: least entry nan", dict(p=[A_P, A_P * np.nan])),
        (r"p_JV\[0\] is no law: .* sum inf", dict(p=[[np.inf, 0], [0.5, 0.5]])),
        (r"p_JV\[0\] is no law: .* sum 1.000002", dict(p=[A_P * 1.000002, A_P])),
        (r"q_KV has shape \[2, 5\]; wanted \[1, 5\]", dict(q=[A_Q, A_Q])),
        (r"q_KV has shape \[1, 4\]; wanted \[1, 5\]", dict(q=[A_Q[:4]])),
        (r"q_KV\[0\] is no law: least entry 0.1, sum 0.5", dict(q=[[0.1] * 5])),
        (r"draft token 0 is 2, but its law q_KV\[0\] gives it no probability", dict(q=[[0.5, 0.5, 0, 0, 0]])),
        (r"a draft token is 5; wanted a token id in \[0, 5\)", dict(tokens=[5])),
        (r"a draft token is 7; wanted", {"tokens": np.array([7])}),
        (r"a draft token is -1; wanted", dict(tokens=[-1])),
        (r"a draft token is 0.5; wanted", dict(tokens=[0.5])),
        (r"u_J is \[0.5\]; wanted 2 uniforms in \[0, 1\) for 1 draft tokens", dict(u=[0.5])),
        (r"u_J is \[0.5, 1.0\]; wanted 2 uniforms", dict(u=[0.5, 1.0])),
        (r"u_J is \[-0.1, 0.5\]; wanted 2 uniforms", dict(u=[-0.1, 0.5])),
        (r"u_J is \[nan, 0.5\]; wanted 2 uniforms", dict(u=[np.nan, 0.5])),
    ],
)
def test_bad_input_to_accept_says_what_came_and_what_was_wanted(monkeypatch, said, change):
    for name in WRONG:
        monkeypatch.delitem(RULES, name)
    given = dict(rule="rejection", p=[A_P, A_P], tokens=[2], q=[A_Q], u=[0.5, 0.5]) | change
    parameters = {name: given[name] for name in given if name not in ("rule", "p", "tokens", "q", "u")}
    with pytest.raises(ValueError, match=said):
        accept(given["rule"], given["p"], draft_of(given["tokens"], given["q"]), given["u"], **parameters)


@pytest.mark.parametrize(
    "said, p, q",
    [
        (r"q is 5; wanted a token id in \[0, 5\)", A_P, 5),
        (r"q is 0.5; wanted a token id", A_P, 0.5),
        (r"q has shape \[2\]; wanted \[5\]", A_P, [0.5, 0.5]),
        ("q is no law: least entry 0, sum 0", A_P, [0] * 5),
        ("p_V is no law", [0.5, 0.6], 0),
        (r"p_V has shape \[1, 2\]; wanted \[V\]", [[0.5, 0.5]], 0),
        (r"p_V has shape \[0\]; wanted \[V\]", [], 0),
    ],
)
def test_bad_input_to_exact_law(said, p, q):
    with pytest.raises(ValueError, match=said):
        exact_law("match", p, q)


def test_hf_gemma4_looks_at_soft_laws_alone():
    soft = draft_of([0], [[0.1, 0.2, 0.3, 0.2, 0.2]], [A_Q])
    assert accept("hf-gemma4", [A_P, A_P], soft, [0.8, 0.5]).accepted == 1  # u <= .4/.5, of soft_KV
    assert accept("hf-gemma4", [A_P, A_P], soft, [0.81, 0.5]) == Verdict(0, 1)
    assert accept("rejection", [A_P, A_P], soft, [0.81, 0.5]).accepted == 1
    assert accept("hf-gemma4", [A_P], draft_of([]), [0.5]) == Verdict(0, 1)
    with pytest.raises(ValueError, match=r"soft_KV\[0\] is no law"):
        accept("hf-gemma4", [A_P, A_P], draft_of([0], None, [A_Q * 2]), [0.5, 0.5])
    with pytest.raises(ValueError, match=r"draft token 0 is 1, but its law soft_KV\[0\] gives it no probability"):
        accept("hf-gemma4", [A_P, A_P], draft_of([1], None, [one_hot(0, 5)]), [0.5, 0.5])


@pytest.mark.parametrize("rule, setting", SET)
def test_a_vocabulary_of_one_token(rule, setting):
    np.testing.assert_array_equal(exact_law(rule, np.ones(1), 0, **setting), [1])
    draft = draft_of([0, 0], None, np.ones((2, 1)))
    assert accept(rule, np.ones((3, 1)), draft, [0.9] * 3, **setting) == Verdict(2, 0)


def test_block_where_a_ratio_is_tiny_or_nothing_is_left():
    """A prefix that the target would never draw leaves rho = 0, and a tiny q no overflow: the round starts anew."""
    p, q = np.array([0.0, 1]), np.array([0.5, 0.5])
    assert accept("block", [p, p, p], draft_of([0, 1], [q, q]), [0, 0, 0]) == Verdict(0, 1)
    tiny = np.array([5e-324, 1])
    with np.errstate(all="raise"):
        assert accept("block", [q, q, q], draft_of([0, 0], [tiny, tiny]), [0.99, 0.99, 0]) == Verdict(2, 0)
        assert accept("block", [p, q, q], draft_of([0, 0], [tiny, tiny]), [0, 0, 0]) == Verdict(0, 1)


def test_block_looks_ahead():
    """Two drafts that fall one by one may stand together: rho carries over what the first has to spare."""
    p_JV, q_KV = [[0.9, 0.1], [0.2, 0.8], [1, 0]], [[0.3, 0.7], [0.8, 0.2]]
    draft, u_J = draft_of([1, 1], q_KV), [0.5, 0.5, 0.5]
    assert accept("rejection", p_JV, draft, u_J).accepted == 0  # 1/7 and 4
    assert accept("block", p_JV, draft, u_J) == Verdict(2, 0)  # rho: 1/7, then 4/7


def test_unknown_names_to_exact_law():
    with pytest.raises(ValueError, match="unknown acceptance rule 'reject'; known: greedy, rejection, match"):
        exact_law("reject", A_P, 0)
    with pytest.raises(ValueError, match="rule 'greedy' has no parameter 'delta'; it has none"):
        exact_law("greedy", A_P, 0, delta=0.3)


def test_parameters_reach_a_rule_and_its_law_by_name(monkeypatch):
    monkeypatch.setitem(
        RULES,
        "sure",
        Rule(
            lambda p, q, d, u, *, least=0.5: Verdict(0, int(p[0, d[0]] < least)),
            lambda p, q, *, least=0.5: p * (p >= least),
        ),
    )
    assert accept("sure", [A_P, A_P], draft_of([0]), [0, 0], least=0.3).token == 0
    assert accept("sure", [A_P, A_P], draft_of([0]), [0, 0]).token == 1
    np.testing.assert_array_equal(exact_law("sure", A_P, 0, least=0.4), [0.4, 0, 0, 0, 0])
    with pytest.raises(ValueError, match="rule 'sure' has no parameter 'most'; it has least"):
        accept("sure", [A_P, A_P], draft_of([0]), [0, 0], most=1)


def test_a_draft_of_nothing_needs_no_law():
    for q_KV in (None, [], np.zeros((0, 5))):
        assert accept("rejection", [A_P], draft_of([], q_KV), [0.5]) == Verdict(0, 1)
