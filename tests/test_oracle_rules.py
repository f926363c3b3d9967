"""The checks that other engines' test suites call: right engines pass, and each planted defect is found by name.

The engines here are written anew, in a dozen lines: nothing of minimtp decides in them.
"""

import ast
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minimtp import oracle_rules
from minimtp.acceptance import RULES, accept
from minimtp.audit import CASES, block_law, continuation, emitted
from minimtp.oracle_rules import DEFECTS, assert_same_law, check_acceptance

A_P, A_Q = CASES["A"]


def pick(weights, u, total=None):
    cdf = np.cumsum(weights)
    return int(np.searchsorted(cdf / (total or cdf[-1]), u, side="right"))


def engine(p_JV, tokens_K, q_KV, u_J, defect=None):
    """Leviathan's algorithm 1, and what can be wrong with it."""
    for laws in (p_JV, p_JV if q_KV is None else q_KV):
        if not (laws.min() >= 0 and abs(laws.sum(1) - 1).max() < 1e-4):
            raise ValueError("not a law")
    K, V = len(tokens_K), p_JV.shape[1]
    for j, d in enumerate(tokens_K):
        q = np.eye(1, V, d)[0] if q_KV is None else q_KV[(j + 1) % K if defect == "rows of q one too late" else j]
        u = {"u is 0": 0.0, "one uniform for all tests": u_J[0]}.get(defect, u_J[j])
        stands = u * q[d] <= p_JV[j, d] if defect == "<= at u = p = 0" else u * q[d] < p_JV[j, d]
        if not (stands or defect == "accepts always"):
            rest = p_JV[j] if defect == "residual from p" else np.maximum(p_JV[j] - q, 0)
            if rest.sum() == 0:
                rest = p_JV[j]
            total = rest.sum() if defect == "a cdf that ends below 1" else None
            return j, pick(rest, u_J[0] if defect == "correction from the test's uniform" else u_J[K], total)
    return K, pick(p_JV[K - 1 if K and defect == "bonus row off by one" else K], u_J[K])


def greedy_engine(p_JV, tokens_K, q_KV, u_J):
    """Right at temperature 0, and used at others."""
    best_J = p_JV.argmax(1).tolist()
    same = [a == b for a, b in zip(tokens_K, best_J)] + [False]
    return same.index(False), best_J[same.index(False)]


# --- acceptance functions: what is right passes ---


def ours(rule, **parameters):
    def fn(p_JV, tokens_K, q_KV, u_J):
        verdict = accept(rule, p_JV, SimpleNamespace(tokens=tokens_K, q_KV=q_KV, soft_KV=q_KV), u_J, **parameters)
        return verdict.accepted, verdict.token

    return fn


@pytest.mark.parametrize(
    "rule, parameters",
    [("rejection", {}), ("block", {}), ("hf-gemma4", {})],
)
def test_our_own_rules_pass(rule, parameters):
    claim = check_acceptance(ours(rule, **parameters), rule, **parameters)
    assert claim.startswith(f"decides as {rule} on ") and claim.endswith("; refuses what is no law")
    assert ("has the target's law" in claim) == (rule in ("rejection", "block"))


def test_another_engine_passes():
    assert "to 1e-06, by integration" in check_acceptance(engine)


def test_its_uniforms_may_be_used_in_another_way():
    """Tests that pass for high uniforms, draws from the last token down."""

    def fn(p_JV, tokens_K, q_KV, u_J):
        accepted, token = engine(p_JV[:, ::-1], [p_JV.shape[1] - 1 - t for t in tokens_K],
                                 None if q_KV is None else q_KV[:, ::-1], np.nextafter(1, 0) - u_J)  # fmt: skip
        return accepted, p_JV.shape[1] - 1 - token

    assert "refuses" not in check_acceptance(fn, refuses=False)


def test_an_engine_in_float32_passes():
    def fn(p_JV, tokens_K, q_KV, u_J):
        assert u_J.dtype == np.float32 and (u_J < 1).all()
        return engine(np.float32(p_JV), tokens_K, None if q_KV is None else np.float32(q_KV), u_J)

    check_acceptance(fn, uniforms="float32")


def test_an_engine_that_lets_bad_laws_through():
    def fn(p_JV, tokens_K, q_KV, u_J):
        if not np.isclose(p_JV.sum(1), 1).all():
            return 0, 0
        return engine(p_JV, tokens_K, q_KV, u_J)

    with pytest.raises(AssertionError, match=r"in 3 of its cases:\n  NaN target law: no error, but \(0, 0\)") as failed:
        check_acceptance(fn)
    assert "negative target law" in str(failed.value) and "unnormalized target law" in str(failed.value)


# --- and what is wrong is found, by name ---

CAUGHT = {  # defect: (cases that must be named, the known defect it is told to be like, if any)
    "accepts always": (["drawn draft, token 0", "disjoint laws"], "accepts always"),
    "u is 0": (["drawn draft, token 0", "far drafter, token 0"], "uniforms of the tests are 0"),
    "residual from p": (["drawn draft, token 0"], "draws the correction from p, not from the residual"),
    "bonus row off by one": (["drawn draft, token 1", "equal laws"], "bonus token from the row before"),
    "<= at u = p = 0": (["an impossible draft token", "disjoint laws", "one-hot laws, different"], None),
    "one uniform for all tests": (["three drawn drafts", "three argmax drafts"], "one uniform for all tests"),
    "correction from the test's uniform": (["argmax draft, token 0"], None),
    "rows of q one too late": (["three drawn drafts"], "rows of q one too late"),
}


def test_a_cdf_that_ends_below_1():
    """NumPy's sum is not the last of its running sums: the greatest uniform falls off the end of the vocabulary."""
    with pytest.raises(AssertionError, match="vocabulary of 32,000, argmax draft: .* token 32000 of 32000"):
        check_acceptance(partial(engine, defect="a cdf that ends below 1"))


@pytest.mark.parametrize("defect", CAUGHT)
def test_check_acceptance_catches(defect):
    names, like = CAUGHT[defect]
    with pytest.raises(AssertionError) as failed:
        check_acceptance(partial(engine, defect=defect))
    said = str(failed.value)
    assert said.startswith("not rejection, in ")
    assert all(f"\n  {name}: " in said for name in names)
    told = [line.rpartition(": ")[2] for line in said.splitlines() if "known defect" in line]
    assert told == ([like] if like else [])
    if defect == "<= at u = p = 0":
        assert "\n  an impossible draft token: u = 0, at last 0: 1 accepted, then token 0, which cannot be" in said


def test_temperature_ignored_is_caught_by_name():
    with pytest.raises(AssertionError, match="known defect: ignores the temperature"):
        check_acceptance(greedy_engine, refuses=False)
    check_acceptance(greedy_engine, "greedy", refuses=False)


def test_another_lossless_rule_is_not_this_one():
    """The same law of the output, but not of what is accepted."""
    with pytest.raises(AssertionError, match="not rejection, in "):
        check_acceptance(ours("match"))


@pytest.mark.parametrize("defect", sorted(set(DEFECTS) - {like for _, like in CAUGHT.values()}))
def test_every_known_defect_is_told_from_the_others(defect):
    with pytest.raises(AssertionError) as failed:
        check_acceptance(DEFECTS[defect], refuses=False)
    assert [line.rpartition("defect: ")[2] for line in str(failed.value).splitlines() if "known" in line] == [defect]


@pytest.mark.parametrize(
    "what, said",
    [
        (lambda p, d, q, u: (len(d) + 1, 0), "ValueError: accepted 2 of 1, token 0 of 5"),
        (lambda p, d, q, u: (0, p.shape[1]), "ValueError: accepted 0 of 1, token 5 of 5"),
        (
            lambda p, d, q, u: (0, int(np.random.randint(1 << 30) % p.shape[1])),
            "the same uniforms gave two verdicts",
        ),
        (
            lambda p, d, q, u: (q.fill(0.2) if q is not None else 0, engine(p, d, q, u))[1],
            "it changed its arg|has prob",
        ),
        (lambda p, d, q, u: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda p, d, q, u: None, "TypeError: "),
    ],
)
def test_what_is_no_verdict(what, said):
    with pytest.raises(AssertionError, match=said):
        check_acceptance(what, refuses=False)


# --- engines with random numbers of their own ---


def test_an_engine_with_its_own_random_numbers_passes():
    rng = np.random.RandomState(0)
    claim = check_acceptance(lambda p, d, q: engine(p, d, q, rng.random_sample(len(d) + 1)), uniforms=None, rows=400)
    assert "as far as 400 rows a case tell" in claim


@pytest.mark.parametrize("defect", ["residual from p", "bonus row off by one"])
def test_and_its_defects_are_found_from_samples(defect):
    rng = np.random.RandomState(0)
    with pytest.raises(AssertionError, match="drawn draft, token|argmax draft, token"):
        check_acceptance(
            lambda p, d, q: engine(p, d, q, rng.random_sample(len(d) + 1), defect), uniforms=None, rows=400
        )


def test_one_impossible_verdict_is_enough():
    rng = np.random.RandomState(0)

    def fn(p_JV, tokens_K, q_KV):
        accepted, token = engine(p_JV, tokens_K, q_KV, rng.random_sample(len(tokens_K) + 1))
        return (1 if tokens_K and rng.random_sample() < 0.02 else accepted), token

    with pytest.raises(
        AssertionError, match="\n  an impossible draft token: 1 accepted, then token [12], which cannot be"
    ):
        check_acceptance(fn, uniforms=None, rows=400)


# --- emitted tokens: exact laws of whole engines ---


TURNED = [(np.roll(A_P, n), np.roll(A_Q, n)) for n in range(5)]


def P(prefix):
    return TURNED[sum(prefix) % 5][0]


def Q(prefix):
    return TURNED[sum(prefix) % 5][1]


def top_3(prefix):
    law = Q(prefix)
    return np.where(law >= 0.15, law, 0) / law[law >= 0.15].sum()


def argmax(prefix):
    return int(Q(prefix).argmax())


def after_the_draw(p_JV, tokens_K, q_KV, u_J):
    """Reports the drafter's law as it is once the token has been read."""
    return engine(p_JV, tokens_K, np.array([Q(tokens_K[: j + 1]) for j in range(len(tokens_K))]), u_J)


WHOLE = {  # what the tokens really come from, who judges
    "soft q on greedy drafts": (argmax, engine),
    "q reported before top-k": (top_3, engine),
    "q after instead of before the draw": (None, after_the_draw),
    "temperature ignored": (None, greedy_engine),
    "accepts always": (None, partial(engine, defect="accepts always")),
    "residual from p": (None, partial(engine, defect="residual from p")),
    "bonus row off by one": (None, partial(engine, defect="bonus row off by one")),
}


@pytest.mark.parametrize("defect", WHOLE)
def test_assert_same_law_catches(defect):
    drawn, judge = WHOLE[defect]
    with pytest.raises(AssertionError, match="position [01]: total variation 0.[0-9]+ from the law it should have"):
        assert_same_law(block_law(judge, P, Q, 1, drawn), P)


def test_assert_same_law_of_an_engine_that_is_right():
    claim = assert_same_law(block_law(engine, P, Q, 1), P)
    assert claim == "the law of 2 tokens is the one it should be, to 1e-09 in total variation at every position"
    assert_same_law(block_law(engine, P, argmax, 1), continuation(P, (), 2))
    assert_same_law(block_law(engine, P, top_3, 1), P)


def test_the_first_position_that_differs_is_named_and_what_follows_it():
    law = continuation(P, (), 3)
    law[2, 1, 0] += 1e-3
    law[2, 1, 4] -= 1e-3
    with pytest.raises(AssertionError, match=r"position 2: total variation 0.001 .* most at token [04] after \(2, 1\)"):
        assert_same_law(law, P)
    with pytest.raises(AssertionError, match=r"position 0: total variation 0.1 "):
        assert_same_law(A_P * 1.2, A_P)
    with pytest.raises(AssertionError, match=r"position 0: .* most at token 0: 0.8, should be 0.4"):
        assert_same_law(np.array([0.8, 0.2, 0, 0, 0]), A_P)


# --- emitted tokens: samples ---


def sampled(rng, rows, judge=engine, drawn=None, shared=False, K=2):
    """Rounds of an engine, each as long as it turned out."""
    for _ in range(rows):
        tokens, u_J = [], rng.random_sample(K + 1)
        for u in u_J[:K] if shared else rng.random_sample(K):
            tokens.append(pick((drawn or Q)(tokens), u))
        laws = [np.array([law(tokens[:j]) for j in range(K + n)]) for n, law in ((1, P), (0, Q))]
        accepted, token = judge(laws[0], tokens, laws[1], u_J)
        yield (*tokens[:accepted], token)


def test_samples_of_an_engine_that_is_right():
    claim = assert_same_law(sampled(np.random.RandomState(0), 3000), P)
    assert claim.startswith(
        "3000 rows have the law they should (false alarm 1e-06): position 0 on 3000 rows, where a t"
    )
    assert "; position 2 on " in claim


@pytest.mark.parametrize(
    "defect, how",
    [
        ("shared random numbers", {"shared": True}),
        ("q reported before top-k", {"drawn": top_3}),
        ("soft q on greedy drafts", {"drawn": lambda prefix: np.eye(5)[argmax(prefix)]}),
        ("accepts always", {"judge": partial(engine, defect="accepts always")}),
        ("u is 0", {"judge": partial(engine, defect="u is 0")}),
        ("q after instead of before the draw", {"judge": after_the_draw}),
    ],
)
def test_defects_of_whole_engines_from_samples(defect, how):
    with pytest.raises(AssertionError, match=r"position \d.*total variation 0\.\d+ over \d+ rows, 0\.\d+ allowed"):
        assert_same_law(sampled(np.random.RandomState(0), 3000, **how), P)


def test_rejected_tokens_that_stay_visible():
    """A target that goes on from the rejected draft token, not from its correction: only later positions are wrong."""
    rng = np.random.RandomState(0)

    def text(stale):
        out, last = [], 0
        while len(out) < 2:
            draft = pick(Q([last]), rng.random_sample())
            laws = np.array([P([last]), P([draft])])
            accepted, token = engine(laws, [draft], np.array([Q([last])]), rng.random_sample(2))
            out += [draft, token] if accepted else [token]
            last = draft if stale and not accepted else token
        return out[:2]

    def law(prefix):
        return P(prefix[-1:])

    assert_same_law([text(False) for _ in range(6000)], law)
    with pytest.raises(AssertionError, match=r"position 1"):
        assert_same_law([text(True) for _ in range(6000)], law)


def test_a_token_that_cannot_come_needs_no_statistics():
    with pytest.raises(AssertionError, match=r"position 0: token 2 after \(\) came 1 times; it never should"):
        assert_same_law([0, 1, 0, 2], np.array([0.5, 0.5, 0]))


def test_false_alarms_are_rarer_than_stated():
    """At a stated 0.2, of 300 right samples (of 5 rows to 500) fewer than 60 fail."""
    rng, alarms = np.random.RandomState(0), 0
    for n in range(300):
        law = rng.dirichlet(np.full(4, 0.5))
        try:
            assert_same_law(rng.choice(4, size=5 + n * 495 // 299, p=law), law, false_alarm=0.2)
        except AssertionError:
            alarms += 1
    assert alarms < 60


def test_a_rare_conditional_is_judged_on_its_own():
    """Wrong only after token 4, one row in twenty: a tenth of what the position as a whole shows."""
    rng = np.random.RandomState(0)
    rows = [(a := pick(A_P, rng.random_sample()), pick(A_P if a != 4 else A_P[::-1], rng.random_sample()))
            for _ in range(3000)]  # fmt: skip
    with pytest.raises(AssertionError, match=r"position 1 after \(4,\): total variation"):
        assert_same_law(rows, lambda prefix: A_P)


def test_no_samples():
    with pytest.raises(ValueError, match="no samples"):
        assert_same_law([], A_P)
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        assert_same_law([0.4, 0.6], A_P)


# --- what it needs ---


@pytest.mark.parametrize("name", ["oracle_rules", "audit", "acceptance", "sampling", "display"])
def test_numpy_is_all_it_needs(name):
    import sys

    tree = ast.parse((Path(oracle_rules.__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.module in ("audit", "acceptance", "sampling", "display")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            assert {part.split(".")[0] for part in names} <= {"numpy", *sys.stdlib_module_names}


def test_ragged_rounds_of_emitted_and_of_samples_agree():
    """The samples above come from the law that emitted() gives."""
    law = emitted(engine, P, Q, 2)
    rows = list(sampled(np.random.RandomState(1), 3000))
    keys = list(law)
    assert_same_law([keys.index(row) for row in rows], np.array(list(law.values())))


def test_the_rules_that_need_no_soft_law_are_told_of_argmax_drafts():
    for rule in RULES:
        names = [name for name, _, _, q_KV in oracle_rules.acceptance_cases(rule) if q_KV is None]
        assert ("three argmax drafts" in names) == (rule != "hf-gemma4") and "no draft" in names
