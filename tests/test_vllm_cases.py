"""vLLM's published cases for its rejection sampler (tests/v1/sample/test_rejection_sampler.py), against our functions.

Written anew from what they assert.  -1 there fills a row after its last token.  Batches are rows here, one sequence
each.  Left out: its FLy and synthetic samplers, whose rules are not here, and frequency penalties and bad words, which
change logits before a law is made (minimtp.Sampling has no such penalty; ids that must not come are `suppress`).
"""

from types import SimpleNamespace

import numpy as np
import pytest

from minimtp.acceptance import RULES, accept, residual
from minimtp.audit import block_law
from minimtp.sampling import Sampling, draw

GREEDY_CASES = {
    "perfect match": ([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]),
    "early mismatch": ([1, 2, 3], [1, 5, 3, 4], [1, 5, -1, -1]),
    "multiple sequences 1": ([1, 2], [1, 2, 5], [1, 2, 5]),
    "multiple sequences 2": ([3], [3, 4], [3, 4, -1]),
    "single token": ([1], [1, 2], [1, 2]),
    "empty": ([], [5], [5]),
    "multiple mismatches 1": ([1, 2, 3], [1, 2, 7, 6], [1, 2, 7, -1]),
    "multiple mismatches 2": ([4, 5, 6], [4, 8, 6, 9], [4, 8, -1, -1]),
    "first mismatch": ([1], [2, 3], [2, -1]),
    "mixed 1": ([1, 2], [1, 5, 6], [1, 5, -1]),
    "mixed 2": ([3, 4], [3, 4, 7], [3, 4, 7]),
    "all wrong": ([1, 2, 3], [0, 5, 0, 4], [0, -1, -1, -1]),
    "before FLy rescues it": ([1, 2, 3, 4], [9, 2, 3, 4, 5], [9, -1, -1, -1, -1]),
}


def output(rule, p_JV, tokens_K, q_KV, u_J, width=None):
    """What one row emits, filled with -1."""
    verdict = accept(rule, p_JV, SimpleNamespace(tokens=tokens_K, q_KV=q_KV, soft_KV=q_KV), u_J)
    row = [*tokens_K[: verdict.accepted], verdict.token]
    return row + [-1] * ((width or len(tokens_K) + 1) - len(row))


@pytest.mark.parametrize("name", GREEDY_CASES)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "hf-gemma4"])
def test_where_the_target_is_certain_every_rule_does_the_same(rule, name):
    """Logits of 100 against -100, which is a law of one token at any temperature.  The lossy rules refuse p = 0 too,
    but for the ensemble, which keeps half of all drafts that the target would never draw."""
    tokens, target, wanted = GREEDY_CASES[name]
    logits = np.full((len(target), 100), -100.0)
    logits[np.arange(len(target)), target] = 100
    law = Sampling(temperature=1.0).law(logits)
    for u in (0.6, np.nextafter(1, 0)):
        assert output(rule, law, tokens, None, np.full(len(target), u), len(wanted)) == wanted


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("rule", RULES)
def test_deterministic_when_seeded(rule, k):
    """The same uniforms, the same row, 20 times; others in between change nothing."""
    rng = np.random.RandomState(k)
    law = rng.dirichlet(np.ones(1000), 2 * k + 1)
    p_JV, q_KV = law[: k + 1], law[k + 1 :]
    for seed in range(8):
        tokens = rng.randint(1000, size=k).tolist()
        rows = []
        for _ in range(20):
            rows.append(output(rule, p_JV, tokens, q_KV, np.random.RandomState(seed).random_sample(k + 1)))
            output(rule, p_JV, tokens, q_KV, rng.random_sample(k + 1))
        assert rows == rows[:1] * 20


@pytest.mark.parametrize("rule", ["rejection", "match", "block"])
def test_the_output_has_the_targets_law(rule):
    """V = 10, k = 2.  They sample 100,000 rows and want the distance to p to shrink; here both tokens' law is p."""
    p, q = _softmax(np.random.RandomState(0).random_sample((2, 10)))
    law = block_law(rule, lambda prefix: p, lambda prefix: q, 2)
    np.testing.assert_allclose(law, np.einsum("i,j,k", p, p, p), rtol=0, atol=1e-12)


def _softmax(z):
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


@pytest.mark.parametrize("V", [100, 8192, 10000])
@pytest.mark.parametrize("dense", [True, False])
def test_recovered_tokens_are_drawn_from_the_residual(V, dense):
    """Against the residual written out: p without the draft token, or what p has over q, in float64."""
    rng = np.random.RandomState(V)
    for _ in range(10):
        p, q = _softmax(rng.random_sample((2, V)))
        token = draw(q, rng.random_sample())
        rest = np.maximum(p - q, 0) if dense else np.where(np.arange(V) == token, 0, p)
        u = rng.random_sample()
        wanted = int(np.searchsorted(np.cumsum(rest), u * rest.sum(), side="right"))
        u_J = [np.nextafter(1, 0), u]
        if dense and p[token] >= q[token]:
            assert output("rejection", [p, p], [token], [q], u_J)[0] == token
        else:
            assert output("rejection", [p, p], [token], [q] if dense else None, u_J)[0] == wanted
        assert draw(residual(p, q if dense else np.eye(1, V, token)[0]), u) == wanted


@pytest.mark.parametrize("V", [100, 8193, 10000, 151936])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("rule", ["rejection", "match", "block", "typical", "ensemble", "threshold", "relaxed"])
def test_no_token_beyond_the_vocabulary(rule, V, dense):
    """GHSA-8wr5-jm2h-8r4f: nothing left in the last tile of 8,192, or nothing left at all; uniforms at both ends."""
    rng = np.random.RandomState(V)
    p, last_tile = rng.random_sample(V), V // 8192 * 8192
    if last_tile:
        p[last_tile:] = 0
    else:
        p = np.eye(1, V)[0]
    p, q = p / p.sum(), _softmax(rng.random_sample(V))
    tokens = [rng.randint(V) if last_tile else 0, V - 1, 0]
    for u in (0.0, 0.5, np.nextafter(1, 0)):
        for last in (0.0, np.nextafter(1, 0)):
            row = output(rule, [p] * 4, tokens, [q] * 3 if dense else None, [u, u, u, last])
            emitted = [token for token in row if token >= 0]
            assert all(0 <= token < V for token in emitted)
            if rule != "ensemble":  # which may keep a draft token that the target would never draw
                assert all(p[token] > 0 for token in emitted)


@pytest.mark.parametrize("how", [{"top_k": k} for k in (1, 5, 99)] + [{"top_p": p} for p in (0.5, 0.9, 0.99)])
def test_outputs_stay_inside_the_mask_of_top_k_and_top_p(how):
    rng = np.random.RandomState(0)
    for _ in range(100):
        law = Sampling(**how).law(rng.standard_normal((4, 100)))
        q = _softmax(rng.random_sample((3, 100)))
        tokens = [draw(row, u) for row, u in zip(q, rng.random_sample(3))]
        for rule in ("rejection", "match", "block", "threshold", "typical", "relaxed"):
            row = output(rule, law, tokens, q, rng.random_sample(4))
            assert all(law[j, token] > 0 for j, token in enumerate(row) if token >= 0)


def test_ids_that_are_not_allowed_are_not_emitted():
    """Their cases: the target's first choice is forbidden in some rows, its second is token 15.  Bonuses are ours."""
    cases = [([1, 2, 10], [1, 2, 10, 5], range(0, 5), [15, -1, -1, -1]),
             ([10, 5, 3], [10, 5, 10, 5], (), [10, 5, 10, -1]),
             ([7, 10, 12], [7, 10, 12, 5], range(2, 7), [7, 10, 12, 15])]  # fmt: skip
    for tokens, target, forbidden, wanted in cases:
        logits = np.full((4, 100), -100.0)
        logits[np.arange(4), target] = 100
        logits[:, 15] = 99
        law = Sampling(temperature=0.0, suppress=tuple(forbidden)).law(logits)
        assert output("greedy", law, tokens, None, [0.5] * 4) == wanted


def test_a_presence_penalty_makes_the_second_choice_the_first():
    """Their case with a frequency penalty of 1.5: after one 1 the target says 15.  Ours subtracts once an id."""
    logits = np.full((4, 100), -100.0)
    logits[:, 1], logits[:, 15] = 100, 99
    how = Sampling(temperature=0.0, presence_penalty=1.5)
    law = np.stack([how.law(logits[j], [1] * j) for j in range(4)])
    assert output("greedy", law, [1, 1, 1], None, [0.5] * 4) == [1, 15, -1, -1]


@pytest.mark.parametrize(
    "p, q, u, wanted",
    [
        (0.4, None, 0.5, [0, -1]),  # target only, point mass: .4 of 1
        (0.4, 0.5, 0.9, [0, -1]),  # ratio .8
        (0.4, 0.5, 0.7, [1, 2]),
        (0.6, 0.5, 0.99, [1, 2]),
    ],
)
def test_ratios_of_their_fly_cases_under_the_rule_that_is_not_relaxed(p, q, u, wanted):
    law = np.array([[1 - p, p, 0], [0, 0, 1]])
    assert output("rejection", law, [1], None if q is None else [[1 - q, q, 0]], [u, 0.0]) == wanted
