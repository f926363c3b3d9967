"""Laws from logits: against a plain loop over tokens, the order of the filters, ties, draws, and bad input."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimtp.sampling import Sampling, draw

NEVER = -math.inf


def naive_law(z, temperature=1.0, top_k=None, top_p=None, min_p=None, suppress=(), presence_penalty=0.0, history=()):
    """The same law, token by token."""
    def softmax(z):
        e = [math.exp(x - max(z)) for x in z]
        return [x / math.fsum(e) for x in e]
    z = [NEVER if i in suppress else float(x) - presence_penalty * (i in history) for i, x in enumerate(z)]
    if temperature == 0:
        return [float(i == z.index(max(z))) for i in range(len(z))]
    z = [x / temperature for x in z]
    if top_k is not None:
        kth = sorted(z, reverse=True)[min(top_k, len(z)) - 1]
        z = [x if x >= kth else NEVER for x in z]
    if top_p is not None and top_p < 1:
        p, below = softmax(z), 0
        for i in sorted(range(len(z)), key=lambda i: (z[i], i))[:-1]:
            below += p[i]
            if below <= 1 - top_p:
                z[i] = NEVER
    if min_p is not None:
        p = softmax(z)
        z = [x if q >= min_p * max(p) else NEVER for x, q in zip(z, p)]
    return softmax(z)


logits = st.lists(st.integers(-6, 6).map(lambda n: n / 2) | st.floats(-8, 8), min_size=1, max_size=12)
samplings = st.fixed_dictionaries({
    "temperature": st.sampled_from([0.0, .3, 1.0, 1.7]), "top_k": st.none() | st.integers(1, 14),
    "top_p": st.none() | st.floats(.01, 1), "min_p": st.none() | st.sampled_from([0.0, .03, .21, 1.0])})


@settings(max_examples=600, deadline=None)
@given(logits, samplings, st.data())
def test_a_law_equals_the_plain_loop(z, how, data):
    ids = st.lists(st.integers(0, len(z) - 1), max_size=len(z) - 1)
    how |= {"suppress": data.draw(ids), "presence_penalty": data.draw(st.sampled_from([0.0, .5, -1.0]))}
    history = data.draw(ids)
    np.testing.assert_allclose(Sampling(**how).law(z, history), naive_law(z, history=history, **how), atol=1e-14)


@settings(max_examples=200, deadline=None)
@given(logits, samplings)
def test_every_law_is_a_law_that_keeps_the_order_of_the_logits(z, how):
    p = Sampling(**how).law(z)
    assert p.dtype == np.float64 and p.shape == (len(z),) and (p >= 0).all() and abs(p.sum() - 1) < 1e-14
    assert p[np.argmax(z)] == p.max() or how["top_p"] is not None       # top-p may drop the first of equal maxima
    rising = np.argsort(z, kind="stable")
    assert (np.diff(p[rising]) >= 0).all() or how["temperature"] == 0


@settings(max_examples=100, deadline=None)
@given(logits, samplings, st.integers(1, 4))
def test_rows_are_judged_alone(z, how, T):
    rows = np.stack([np.roll(z, n) for n in range(T)])
    np.testing.assert_array_equal(Sampling(**how).law(rows), [Sampling(**how).law(row) for row in rows])


def law(z, **how):
    return Sampling(**how).law(z)


def support(z, **how):
    return np.flatnonzero(law(z, **how)).tolist()


# --- order, thresholds, ties ---


def test_known_laws():
    z = np.log([.5, .25, .125, .125])
    np.testing.assert_allclose(law(z), [.5, .25, .125, .125], atol=1e-16)
    np.testing.assert_allclose(law(z, temperature=.5), np.array([16, 4, 1, 1]) / 22, atol=1e-16)
    np.testing.assert_allclose(law(z, top_k=2), [2 / 3, 1 / 3, 0, 0], atol=1e-16)
    np.testing.assert_allclose(law(z, suppress=(0,)), [0, .5, .25, .25], atol=1e-16)


def test_top_k_keeps_every_tie_with_the_kth():
    assert support([1, 3, 2, 2, 2, 0], top_k=2) == [1, 2, 3, 4]
    assert support([1, 3, 2, 2, 2, 0], top_k=1) == [1]
    assert support([1, 3, 2], top_k=3) == support([1, 3, 2], top_k=99) == [0, 1, 2]


def test_top_p_drops_from_the_lowest_while_their_sum_is_at_most_one_minus_top_p():
    quarter = np.zeros(4)
    assert support(quarter, top_p=.5) == [2, 3]                         # the sum of two is exactly .5: dropped
    assert support(quarter, top_p=.51) == [1, 2, 3]                     # of equal logits the lowest ids go first
    assert support(quarter, top_p=.001) == [3]
    assert support(np.zeros(10), top_p=.9) == list(range(10))           # in doubles 1 - .9 < .1: as in transformers
    assert support([5, 0, 5, 0, 0], top_p=.99) == [0, 2, 4]             # ties on the edge are dropped one by one
    assert support([0, 9], top_p=1e-9) == [1]


def test_min_p_keeps_what_reaches_its_share_of_the_top():
    z = np.array([2., 1, 1, 0, 2])
    assert support(z, min_p=.3) == [0, 1, 2, 4] and support(z, min_p=.4) == [0, 4]
    assert support(z, min_p=1) == [0, 4] and support(z, min_p=0) == [0, 1, 2, 3, 4]


def test_temperature_comes_before_the_filters():
    z = np.log([.6, .3, .1])
    assert support(z, top_p=.7) == [0, 1] and support(z, top_p=.7, temperature=.25) == [0]
    assert support(z, min_p=.3) == [0, 1] and support(z, min_p=.3, temperature=3) == [0, 1, 2]


def test_top_k_comes_before_top_p():
    z = np.log([.4, .3, .2, .1])
    assert support(z, top_p=.55) == [0, 1]
    assert support(z, top_p=.55, top_k=2) == [0]                        # of what top-k leaves, .3 is 3/7 <= .45


def test_top_p_comes_before_min_p():
    z = np.log([.4, .25, .19, .16])
    assert support(z, min_p=.5) == [0, 1]
    assert support(z, min_p=.5, top_p=.6) == [0, 1]                     # after min-p, .25 would be 5/13 <= .4: dropped


def test_temperature_zero_is_the_argmax_law_first_of_equals_whatever_the_filters():
    for filters in ({}, {"top_k": 2, "top_p": .1, "min_p": 1.0}):
        np.testing.assert_array_equal(law([1, 7, 7, 3], temperature=0, **filters), [0, 1, 0, 0])
    np.testing.assert_array_equal(law([[0, 2], [3, 1]], temperature=0), [[0, 1], [1, 0]])
    np.testing.assert_array_equal(law([1, 7, 6], temperature=0, suppress=[1]), [0, 0, 1])


def test_presence_penalty_is_subtracted_once_before_temperature():
    z = np.array([1., 1, 1, 0])
    np.testing.assert_array_equal(Sampling(presence_penalty=1.5).law(z, [2, 0, 2, 2]), law(z - [1.5, 0, 1.5, 0]))
    np.testing.assert_array_equal(Sampling(presence_penalty=1.5).law([z, z], [0])[1], law(z - [1.5, 0, 0, 0]))
    np.testing.assert_array_equal(Sampling(presence_penalty=2, temperature=0).law(z, [0]), [0, 1, 0, 0])
    np.testing.assert_array_equal(Sampling(presence_penalty=1, temperature=.5).law(z, [0]),
                                  law(z - [1, 0, 0, 0], temperature=.5))
    np.testing.assert_array_equal(Sampling().law(z, [0]), law(z))


def test_suppressed_ids_do_not_count_in_the_filters():
    assert support([9, 3, 2, 1], suppress=(0,), top_k=2) == [1, 2]
    assert support([9, 1, 0], suppress=(0,), min_p=.3) == [1, 2]
    assert support([9, 0, 0, 0, 0], suppress=(0,), top_p=.5) == [3, 4]


def test_logits_are_left_alone_and_large_ones_are_no_trouble():
    z = np.array([1e4, 0, -1e4, NEVER])
    np.testing.assert_array_equal(law(z, top_k=2, suppress=(2,), temperature=.5), [1, 0, 0, 0])
    np.testing.assert_array_equal(z, [1e4, 0, -1e4, NEVER])
    with np.errstate(all="raise", under="ignore"):
        np.testing.assert_array_equal(law([1., 2.], temperature=1e-300), [0, 1])
    np.testing.assert_allclose(law([1., 2.], temperature=1e300), [.5, .5])


def test_float32_and_half_logits_are_judged_in_double():
    z = np.random.default_rng(0).normal(size=(2, 50)).astype(np.float32)
    np.testing.assert_array_equal(law(z, temperature=.7, top_p=.8), law(z.astype(np.float64), temperature=.7, top_p=.8))
    assert law(z.astype(np.float16)).dtype == np.float64


def test_a_sampling_is_a_value():
    assert Sampling(suppress=[3, 1]) == Sampling(suppress=(3, 1))
    assert hash(Sampling(suppress=[3])) == hash(Sampling(suppress=(3,)))
    with pytest.raises(AttributeError):
        Sampling().temperature = 2


# --- draws ---


def test_draw_is_the_inverse_cdf():
    p = [.25, 0, .5, .25]
    assert [draw(p, u) for u in (0, .249, .25, .5, .749, .75, np.nextafter(1, 0))] == [0, 0, 2, 2, 2, 3, 3]
    assert draw([0, 0, 1, 0], 0) == draw([0, 0, 1, 0], np.nextafter(1, 0)) == 2
    assert draw([2, 6], .24) == 0 and draw([2, 6], .25) == 1            # divided by the last entry of the cdf
    assert type(draw(np.float32([.5, .5]), .7)) is int


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([0, 1e-300, 1e-17, .1, .3, 1]), min_size=1, max_size=9).filter(any),
       st.floats(0, 1, exclude_max=True))
def test_draw_takes_the_first_token_past_u_and_none_of_probability_zero(p, u):
    cdf = np.cumsum(p) / np.cumsum(p)[-1]
    token = draw(p, u)
    assert p[token] > 0 and u < cdf[token] and (token == 0 or cdf[token - 1] <= u)


def test_a_sum_short_of_one_still_leaves_no_gap():
    assert draw(np.full(10, .1) * (1 - 1e-9), np.nextafter(1, 0)) == 9


# --- bad input ---


@pytest.mark.parametrize("name, values", [
    ("temperature", [-.1, math.nan, math.inf, "1", None]), ("top_k", [0, -1, 1.5, "3", math.nan]),
    ("top_p", [0, -.1, 1.01, math.nan, "x"]), ("min_p", [-.01, 1.01, math.nan, math.inf]),
    ("presence_penalty", [math.nan, math.inf, None]), ("suppress", [[-1], [1.5], ["a"]])])
def test_a_parameter_out_of_range_is_named(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} is .*; wanted ") as error:
            Sampling(**{name: value})
        assert "\n" not in str(error.value)


def test_the_ends_of_the_ranges_are_in():
    Sampling(temperature=0, top_k=1, top_p=1, min_p=0, presence_penalty=-2)
    Sampling(temperature=np.float32(.5), top_k=np.int64(3), top_p=1e-9, min_p=1.0, suppress=np.array([1, 2]))


@pytest.mark.parametrize("z, said", [
    ([0, math.nan, 1], r"logits\[1\] is nan"), ([[0, 1], [math.nan, 1]], r"logits\[1, 0\] is nan"),
    ([[0, math.inf]], r"logits\[0, 1\] is inf"), ([[0, 1], [NEVER, NEVER]], r"logits\[1\] are all -inf"),
    ([NEVER], "logits are all -inf"), ([], r"logits have shape \(0,\)"), (1.0, r"logits have shape \(\)"),
    ([[[1]]], r"logits have shape \(1, 1, 1\)")])
@pytest.mark.parametrize("how", [{}, {"temperature": 0}, {"top_k": 1, "top_p": .5, "min_p": .1}])
def test_logits_that_have_no_law_are_refused_by_position(z, said, how):
    with pytest.raises(ValueError, match=said):
        law(z, **how)


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="suppress holds token 3; the vocabulary has 3"):
        law([1, 2, 3], suppress=(0, 3))
    for token in (-1, 3):
        with pytest.raises(ValueError, match=f"history holds token {token}; the vocabulary has 3"):
            Sampling(presence_penalty=1).law([1, 2, 3], [0, token])
    with pytest.raises(ValueError, match="all -inf: no token is left"):
        law([1, 2], suppress=(0, 1))


def test_a_temperature_that_overflows_is_refused():
    with pytest.raises(ValueError, match="temperature 1e-308 is too small for these logits"):
        law([1., 1e3], temperature=1e-308)


@pytest.mark.parametrize("p, u, said", [
    ([1], 1, "the uniform is 1"), ([1], -.1, "the uniform is -0.1"), ([1], math.nan, "the uniform is nan"),
    ([0, 0], .5, "a law of 2 entries with sum 0"), ([math.nan, 1], .5, "a law of 2 entries with sum nan"),
    ([math.inf, 1], .5, "with sum inf"), ([], .5, "a law of 0 entries")])
def test_draws_that_make_no_sense_are_refused(p, u, said):
    with pytest.raises(ValueError, match=said):
        draw(p, u)
