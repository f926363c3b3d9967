"""Numbers that papers and issue reports give, out of the rules themselves and without sampling where that can be."""

import re
import time
from types import SimpleNamespace

import numpy as np
import pytest

from minimtp.acceptance import RULES, Rule, accept, exact_law, residual, typical_threshold
from minimtp.audit import (
    CASES,
    SETTINGS,
    audit,
    audit_text,
    block_law,
    completed,
    continuation,
    coupling_acceptance,
    emitted,
    expected_tokens,
    explanations,
    integrate,
    tokens_per_round,
    total_variation,
)
from minimtp.sampling import draw

A_P, A_Q = CASES["A"]


def always(law):
    """The language that draws every token from one law, or drafts one token."""
    return lambda prefix: law


def rounds(rule, p, q, K=1, **parameters):
    return emitted(rule, always(np.array(p)), always(q), K, **parameters)


# --- Leviathan et al. 2211.17192 ---


@pytest.mark.parametrize(
    "alpha, gamma, operations, speed",
    [(0.6, 2, 1.53, 1.96), (0.7, 3, 1.58, 2.53), (0.8, 2, 1.23, 2.44), (0.8, 5, 1.63, 3.69), (0.9, 2, 1.11, 2.71),
     (0.9, 10, 1.60, 6.86)],
)  # fmt: skip
def test_table_1(alpha, gamma, operations, speed):
    """Speed and operations for a drafter that costs nothing; alpha is 1 - TV, here and by enumeration."""
    tokens = expected_tokens(alpha, gamma)
    assert (round(tokens, 2), round((gamma + 1) / tokens, 2)) == (speed, operations)
    p, q = [0.5, 0.5], np.array([1.5 - alpha, alpha - 0.5])
    assert tokens_per_round(rounds("rejection", p, q)) == pytest.approx(1 + alpha, abs=1e-12)
    if gamma <= 3:
        assert tokens_per_round(rounds("rejection", p, q, gamma)) == pytest.approx(tokens, abs=1e-12)


def test_a_perfect_drafter_gets_all_its_tokens():
    assert expected_tokens(1, 4) == 5 and expected_tokens(0, 4) == 1
    assert tokens_per_round(rounds("rejection", [0.5, 0.5], np.array([0.5, 0.5]), 3)) == pytest.approx(4)


# --- Sun et al. 2403.10444 ---


def test_block_verifications_example():
    """Accepted draft tokens, two drafted: 10/9 one by one, 11/9 as a block, 12/9 if all that comes were known."""
    p, q = np.array([1, 2]) / 3, np.array([2, 1]) / 3
    assert tokens_per_round(rounds("rejection", p, q, 2)) - 1 == pytest.approx(10 / 9, abs=1e-12)
    assert tokens_per_round(rounds("block", p, q, 2)) - 1 == pytest.approx(11 / 9, abs=1e-12)
    both = [np.minimum(continuation(always(p), (), n), continuation(always(q), (), n)).sum() for n in (1, 2)]
    assert sum(both) == pytest.approx(12 / 9, abs=1e-12)


@pytest.mark.parametrize("K", [2, 3])
def test_a_block_is_never_shorter(K):
    """Their theorem: of all lossless tests of one path, none accepts more."""
    rng = np.random.RandomState(K)
    for _ in range(5):
        p, q = rng.dirichlet(np.ones(2)), rng.dirichlet(np.ones(2))
        one, whole = (tokens_per_round(rounds(rule, p, q, K)) for rule in ("rejection", "block"))
        assert whole > one - 1e-12


def test_a_block_of_point_masses_gains_nothing():
    """All of q is on the path, so what is left to accept later is p of it either way."""
    for K in (1, 2, 3):
        one, whole = (tokens_per_round(rounds(rule, [0.3, 0.7], 1, K)) for rule in ("rejection", "block"))
        assert whole == pytest.approx(one, abs=1e-12)


# --- coupled and independent draws ---


def test_gumbel_coupling():
    """Daliri et al. 2408.07978: .8727 on case A, at least (1 - TV) / (1 + TV) = .818."""
    assert round(coupling_acceptance(A_P, A_Q), 4) == 0.8727
    apart = total_variation(A_P, A_Q)
    assert round((1 - apart) / (1 + apart), 3) == 0.818
    rng = np.random.RandomState(0)
    for _ in range(100):
        p, q = rng.dirichlet(np.full(6, 0.4), 2) * (rng.random_sample((2, 6)) < 0.8) + [1e-9, 0, 0, 0, 0, 0]
        p, q = p / p.sum(), q / q.sum()
        both = [x for x in range(6) if p[x] > 0 and q[x] > 0]
        by_hand = sum(1 / sum(max(p[y] / p[x], q[y] / q[x]) for y in range(6)) for x in both)
        apart = total_variation(p, q)
        assert coupling_acceptance(p, q) == pytest.approx(by_hand, abs=1e-12)
        assert (1 - apart) / (1 + apart) - 1e-12 < by_hand < 1 - apart + 1e-12


def test_gumbel_coupling_as_it_is_drawn():
    noise = -np.log(-np.log(np.random.RandomState(1).random_sample((100_000, 5))))
    own, drafted = (np.log(A_P) + noise).argmax(1), (np.log(A_Q) + noise).argmax(1)
    assert (own == drafted).mean() == pytest.approx(0.8727, abs=0.005)
    assert total_variation(np.bincount(own) / 100_000, A_P) < 0.01


def test_independent_match():
    """Accepts sum p q; of a perfect drafter sum p^2, of its argmax max p, which is more (TensorRT-LLM 15775)."""
    assert tokens_per_round(rounds("match", A_P, A_Q)) - 1 == pytest.approx(0.295, abs=1e-12)
    assert tokens_per_round(rounds("match", A_P, A_P)) - 1 == pytest.approx(0.285, abs=1e-12)
    assert tokens_per_round(rounds("match", A_P, 0)) - 1 == pytest.approx(0.4, abs=1e-12)


# --- several drafts at one depth ---


def test_two_siblings_target_only():
    """SGLang's tree_speculative_sampling_target_only, two draft tokens at one depth: lossless, accepts p1 + p2."""

    def judge(siblings, u):
        below, left = 0.0, A_P.copy()
        for token in siblings:
            below += A_P[token]
            if u[0] < below:
                return True, token
            left[token] = 0
        return False, draw(left, u[1])

    law = integrate(lambda u: judge((0, 1), u), 2)
    assert sum(mass for (accepted, _), mass in law.items() if accepted) == pytest.approx(0.70, abs=1e-12)
    emitted_V = np.bincount([token for _, token in law], list(law.values()))
    np.testing.assert_allclose(emitted_V, A_P, rtol=0, atol=1e-12)


# --- lossy on purpose ---


@pytest.mark.parametrize("w", [0.1, 0.5, 0.9])
def test_ensemble(w):
    """DIVERSED 2604.07622: the law is w p + (1 - w) q, accepted 1 - w TV, apart from p by (1 - w) TV."""
    for p, q in CASES.values():
        law, apart = exact_law("ensemble", p, q, assistant_ensemble_weight=w), total_variation(p, q)
        np.testing.assert_allclose(law, w * p + (1 - w) * q, rtol=0, atol=1e-12)
        assert total_variation(law, p) == pytest.approx((1 - w) * apart, abs=1e-12)
        kept = tokens_per_round(rounds("ensemble", p, q, assistant_ensemble_weight=w)) - 1
        assert kept == pytest.approx(1 - w * apart, abs=1e-12)


def test_ensemble_on_case_a():
    law = exact_law("ensemble", A_P, A_Q, assistant_ensemble_weight=0.5)
    assert total_variation(law, A_P) == pytest.approx(0.05, abs=1e-12)
    kept = tokens_per_round(rounds("ensemble", A_P, A_Q, assistant_ensemble_weight=0.5)) - 1
    assert kept == pytest.approx(0.95, abs=1e-12)


def test_typical_acceptance():
    """Medusa 2401.10774: min(epsilon, delta exp(-H)) is .0745 on case A, and the law .13 from p."""
    assert round(typical_threshold(A_P, 0.09, 0.3), 4) == 0.0745
    assert typical_threshold(A_P, 0.05, 0.3) == 0.05
    assert typical_threshold(np.array([1.0, 0]), 0.09, 0.05) == 0.05
    assert round(total_variation(exact_law("typical", A_P, A_Q, epsilon=0.09, delta=0.3), A_P), 2) == 0.13
    draft = SimpleNamespace(tokens=[3, 4], q_KV=None)
    assert accept("typical", [A_P] * 3, draft, [0.99, 0.99, 0.99]).accepted == 1  # p .1 stands, .05 does not
    assert accept("typical", [A_P] * 3, draft, [0.99, 0.99, 0.99], epsilon=0.1).accepted == 1
    assert accept("typical", [[0.5, 0.5]] * 2, SimpleNamespace(tokens=[0], q_KV=None), [0, 0], delta=1.0, epsilon=0.5
                  ).accepted == 0  # the test is strict  # fmt: skip


@pytest.mark.parametrize(
    "rule, parameters, apart",
    [
        ("threshold", {}, 0),
        ("threshold", {"threshold_acc": 0.8}, 0.10),
        ("threshold", {"threshold_acc": 0.5}, 0.40),
        ("threshold", {"threshold_single": 0.4}, 0.60),
        ("relaxed", {"relaxed_topk": 2, "relaxed_delta": 0.2}, 0.60),
    ],
)
def test_thresholds_on_the_argmax_of_case_a(rule, parameters, apart):
    law = exact_law(rule, A_P, 0, **parameters)
    assert total_variation(law, A_P) == pytest.approx(apart, abs=1e-12)
    if rule == "relaxed":
        np.testing.assert_array_equal(law, [1, 0, 0, 0, 0])


def test_a_threshold_of_zero_keeps_all_that_is_possible():
    p = np.array([0.6, 0.4, 0])
    for token, kept in enumerate([1, 1, 0]):
        draft = SimpleNamespace(tokens=[token], q_KV=None)
        for zero in ({"threshold_single": 0.0}, {"threshold_acc": 0.0}):
            assert accept("threshold", [p, p], draft, [0.99, 0.5], **zero).accepted == kept
            np.testing.assert_allclose(exact_law("threshold", p, token, **zero), p if token == 2 else np.eye(3)[token])


@pytest.mark.parametrize(
    "topk, delta, stands",
    [(1, 0, "0"), (1, 1, "0"), (2, 0, "0"), (2, 0.1, "01"), (3, 0.1, "01"), (3, 0.25, "012"), (3, 1, "012"),
     (4, 1, "0123"), (9, 1, "01234"), (9, 0.3, "0123")],
)  # fmt: skip
def test_relaxed_takes_the_top_n_within_delta_of_the_best(topk, delta, stands):
    """Of equals at the edge of the top n (tokens 2 and 3 here) the lower id is in."""
    p = np.array([0.4, 0.3, 0.1, 0.1, 0.1]) if topk == 4 else np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    for token in range(5):
        draft = SimpleNamespace(tokens=[token], q_KV=None)
        kept = accept(
            "relaxed", [p, p], draft, [0.5, 0.5], relaxed_topk=topk, relaxed_delta=delta + 1e-12 * (delta < 1)
        )
        assert kept.accepted == (str(token) in stands)


# --- transformers issue 47932, and what else bends a law ---


@pytest.mark.parametrize(
    "case, apart, accepted, point, drawn",
    [
        ("A", 0.4000, 0.80, 0.40, 0.90),
        ("B", 0.6000, 1.0, 0.40, 1.0),
        ("C", 0.4748, 1.0, 0.53, 0.90),
        ("D", 0.2646, 0.67, 0.43, 0.79),
        ("E", 0.2333, 0.17, 0.10, 0.50),
    ],
)
def test_the_defect_of_transformers_for_gemma_4(case, apart, accepted, point, drawn):
    p, q = CASES[case]
    best = int(q.argmax())
    assert round(total_variation(exact_law("hf-gemma4", p, q), p), 4) == apart
    defect = emitted("hf-gemma4", always(p), always(q), 1, drawn=always(best))
    assert round(tokens_per_round(defect) - 1, 2) == accepted
    assert round(tokens_per_round(rounds("rejection", p, best)) - 1, 2) == point
    assert round(tokens_per_round(rounds("rejection", p, q)) - 1, 2) == drawn
    np.testing.assert_allclose(completed(defect, always(p), 2).sum(1), exact_law("hf-gemma4", p, q), rtol=0, atol=1e-12)


def test_the_defects_law_on_case_a():
    np.testing.assert_allclose(exact_law("hf-gemma4", A_P, A_Q), [0.8, 0.2, 0, 0, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("close, mean, most", [(False, 0.297, 0.735), (True, 0.458, 0.759)])
def test_the_better_the_drafter_the_worse_the_defect(close, mean, most):
    """2,000 random pairs: the published mean to sampling error, and its most is no outlier's."""
    rng, gaps = np.random.RandomState(0), []
    for _ in range(2000):
        p, q = rng.dirichlet(np.ones(5), 2)
        if close:
            q = p * np.exp(0.3 * rng.standard_normal(5))
        gaps.append(total_variation(exact_law("hf-gemma4", p, q / q.sum()), p))
    assert np.mean(gaps) == pytest.approx(mean, abs=0.01)
    assert np.max(gaps) == pytest.approx(most, abs=0.05) and np.min(gaps) > 0.01


@pytest.mark.parametrize("shared", [True, False])
def test_gumbel_noise_shared_by_draft_and_residual(shared):
    """vLLM 47386, V = 16, drafts from minus the target's logits: chi-square far above df + 10 sqrt(2 df) = 69.8."""
    rng, z, N = np.random.RandomState(0), np.linspace(-1, 1, 16), 50_000
    p, q = np.exp(z) / np.exp(z).sum(), np.exp(-z) / np.exp(-z).sum()
    first, second = rng.gumbel(size=(2, N, 16))
    drafted = (-z + first).argmax(1)
    with np.errstate(divide="ignore"):
        instead = (np.log(residual(p, q)) + (first if shared else second)).argmax(1)
    out = np.where(rng.random_sample(N) < p[drafted] / q[drafted], drafted, instead)
    chi_square = ((np.bincount(out, minlength=16) - N * p) ** 2 / (N * p)).sum()
    assert (chi_square > 15 + 10 * np.sqrt(30)) == shared


# --- the audit as a whole, and its price ---


def test_the_audit_of_every_rule():
    start = time.process_time()
    report = audit()
    assert time.process_time() - start < 20
    assert report["passed"] and [entry["rule"] for entry in report["rules"]] == [
        rule for rule in RULES for _ in SETTINGS.get(rule, [{}])
    ]
    lossless = {entry["rule"] for entry in report["rules"] if entry["lossless"]}
    assert lossless == {"rejection", "match", "block", "threshold"}  # threshold: at its defaults
    exhibit = report["rules"][-1]["cases"][0]
    assert exhibit["law"] == pytest.approx([0.8, 0.2, 0, 0, 0]) and exhibit["total_variation"] == pytest.approx(0.4)
    text = audit_text(report)
    assert "\nx hf-gemma4: not lossless, TV up to 0.6000\n  case " in text and "\n+ rejection: lossless\n" in text
    assert re.search(r"\nx hf-gemma4.*\n.*\n  A +argmax  0.4000    0.8000  0.8000 0.2000 0.0000", text)
    assert max(map(len, text.splitlines())) <= 80
    assert "FAULT" not in text


def broken(p_JV, q_KV, tokens_K, u_J):
    """Rejection whose last uniform is the first test's."""
    return RULES["rejection"].accept(p_JV, q_KV, tokens_K, np.append(u_J[:-1], u_J[0]))


def no_block(p_JV, q_KV, tokens_K, u_J):
    """Rejection where one draft token is concerned; of more, the last is never refused."""
    return RULES["rejection"].accept(p_JV, q_KV, tokens_K, u_J * [1, *[0] * (len(u_J) - 2), 1])


@pytest.mark.parametrize(
    "wrong, where", [(broken, "E: drawn drafts: its exact law"), (no_block, "block of 2: its tok")]
)
def test_the_audit_finds_a_rule_that_is_not_what_it_says(monkeypatch, wrong, where):
    monkeypatch.setitem(RULES, "wrong", Rule(wrong, RULES["rejection"].law))
    report = audit("wrong")
    assert not report["passed"] and any(fault.startswith(where) for fault in report["rules"][0]["faults"])
    assert "FAULT: " + where in audit_text(report)


def test_what_would_emit_a_law():
    """The dispute: at temperature 1 the output looks greedy.  [.8004, .1996, 0, 0, 0] came out of transformers."""
    apart, name = explanations(np.array([0.8004, 0.1996, 0, 0, 0]), A_P, A_Q)[0]
    assert name == "hf-gemma4, argmax drafts" and apart == pytest.approx(0.0004)
    assert {name for apart, name in explanations(A_P, A_P, A_Q) if apart < 1e-12} == {
        f"{rule}, {draft} drafts"
        for rule in ("rejection", "match", "block", "threshold (threshold_single 1, threshold_acc 1)")
        for draft in ("drawn", "argmax")
    }
    assert explanations(A_Q, A_P, A_Q)[0] == (0, "the drafter alone")


def test_the_audit_of_an_unknown_rule():
    with pytest.raises(ValueError, match="unknown acceptance rule 'hope'; known: all, greedy, rejection"):
        audit("hope")


def test_block_law_of_a_function_of_ones_own():
    def stubborn(p_JV, tokens_K, q_KV, u_J):
        return 0, draw(p_JV[0], u_J[-1])

    np.testing.assert_allclose(block_law(stubborn, always(A_P), always(0), 1), np.outer(A_P, A_P), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_acceptance_over_a_vocabulary_of_262144_is_quick(rule):
    """K = 8, laws given: under 50 ms, also where every test passes and where none does (the best of five counts).

    On a machine too busy for that: no longer than four logarithms of every probability.
    """
    rng = np.random.RandomState(0)
    z = rng.standard_normal((9, 262_144)) * 3
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    q = p[:8] * (1 + 0.2 * rng.random_sample((8, 262_144)))
    q /= q.sum(1, keepdims=True)
    draft = SimpleNamespace(tokens=q.argmax(1), q_KV=q, soft_KV=q)

    def best(function, *arguments):
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            function(*arguments)
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    for u in (0.0, 1 - 1e-9):
        assert best(accept, rule, p, draft, np.full(9, u)) < max(0.05, 4 * best(np.log, p))
