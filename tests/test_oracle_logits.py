"""The helper for other people's test suites: what it lets pass, what it catches, and how it says so."""

import numpy as np
import pytest

import minimtp
from minimtp.oracle_logits import EPSILON, MARGIN, allowance, assert_logits_close


def logits(seed=0, rows=6, size=50):
    return np.random.default_rng(seed).normal(size=(rows, size)) * 5


@pytest.mark.parametrize("dtype", EPSILON)
def test_a_few_roundings_pass_and_many_do_not(dtype):
    expected_TV = logits()
    size_T1 = np.abs(expected_TV).max(-1, keepdims=True)
    sign = np.sign(np.random.default_rng(1).normal(size=expected_TV.shape))
    assert_logits_close(expected_TV + 12 * MARGIN[dtype] * EPSILON[dtype] * size_T1 * sign, expected_TV, dtype)
    with pytest.raises(AssertionError, match=f"at 6 of 6 positions.*{dtype}"):
        assert_logits_close(expected_TV + 20 * MARGIN[dtype] * EPSILON[dtype] * size_T1 * sign, expected_TV, dtype)


def test_measured_noise_is_a_sharper_test():
    expected_TV = logits()
    noise_T = np.full(6, 2e-6)
    assert_logits_close(expected_TV + 1.5e-5, expected_TV, noise_T=noise_T)
    with pytest.raises(AssertionError):
        assert_logits_close(expected_TV + 3e-5, expected_TV, noise_T=noise_T)
    assert_logits_close(expected_TV + 3e-5, expected_TV)


def test_a_row_that_had_luck_is_taken_for_a_middling_one():
    truth_TV = np.ones((5, 4))
    allowed_T = allowance(truth_TV, "float32", np.array([1, 9, 2, 3, 0]) * 1e-6)
    np.testing.assert_allclose(allowed_T, [1.6e-5, 7.2e-5, 1.6e-5, 2.4e-5, 1.6e-5])
    np.testing.assert_allclose(allowance(truth_TV, "bfloat16", np.zeros(5)), 3 * 2.0**-7)


def test_the_report_names_position_token_and_argmax():
    expected_TV = logits()
    found_TV = expected_TV.copy()
    found_TV[4, 17] += 40
    found_TV[5] = np.nan
    with pytest.raises(AssertionError) as error:
        assert_logits_close(found_TV, expected_TV)
    first, _, row, nan = str(error.value).splitlines()
    assert "2 of 6 positions, first at 4" in first
    assert row.split()[:2] == ["4", "40"] and row.split()[3] == "17"
    assert row.endswith(f"17 ({expected_TV[4].argmax()})") and "inf" in nan


def test_never_is_never():
    expected_TV = logits()
    expected_TV[:, 3] = -np.inf
    assert_logits_close(expected_TV, expected_TV)
    found_TV = expected_TV.copy()
    found_TV[2, 3] = -1e4
    with pytest.raises(AssertionError, match="first at 2"):
        assert_logits_close(found_TV, expected_TV)


def test_one_row_and_other_shapes():
    assert_logits_close(logits()[0], logits()[0])
    with pytest.raises(AssertionError, match=r"\(5, 50\), expected \(6, 50\)"):
        assert_logits_close(logits()[1:], logits())
    with pytest.raises(KeyError):
        assert_logits_close(logits(), logits(), "float8")


@pytest.mark.parametrize("name", ["tiny-gemma4", "tiny-qwen35"])
def test_our_own_float32_passes_unmeasured(name):
    rows = []
    for dtype in ("float32", "float64"):
        target = minimtp.load(name, dtype=dtype)
        ids = target.tokenizer.encode("But soft! What light through yonder window breaks?")
        rows.append(target.forward(ids, target.new_cache()).logits_TV)
    assert_logits_close(*rows)
    with pytest.raises(AssertionError):
        assert_logits_close(rows[0], rows[1], "float64")
    rows[0][3] *= 1.0001
    with pytest.raises(AssertionError, match="first at 3"):
        assert_logits_close(*rows)
