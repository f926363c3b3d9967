"""Drafters by themselves: what they propose, what they refuse, and that a draft's law is the one it was drawn from."""

from dataclasses import FrozenInstanceError
from itertools import product

import numpy as np
import pytest
from tiny import pair, random_ids, same_bits

import minimtp
from minimtp import Draft, PromptLookup, Sampling, Scripted, draw
from minimtp.cache import Cache
from minimtp.drafting import GemmaAssistant

GREEDY, PLAIN = Sampling(temperature=0.0), Sampling()
SAMPLINGS = [Sampling(temperature=6.0), Sampling(temperature=6.0, top_k=9), Sampling(temperature=8.0, top_p=0.9)]
MODELS = ("window_4", "window_7", "window_20", "shared_kv")
every_model = pytest.mark.parametrize("name", MODELS)


def having_read(tokens):
    cache = Cache([], 1000)
    cache.tokens = list(tokens)
    return cache


def hidden(count, width=4):
    return np.zeros((count, width), np.float32)


# Prompt lookup

LOOKUPS = [  # the sequence so far, its last token not yet read; how many to draft; the draft
    ("abcab", 4, "cab"),
    ("abcab", 2, "ca"),
    ("abcab", 0, ""),
    ("abc", 4, ""),
    ("aa", 4, "a"),
    ("aaaa", 4, "a"),
    ("aaaa", 1, "a"),
    ("xabcdyabc", 4, "dyab"),
    ("abcXabcYabc", 2, "Ya"),
    ("abcXbcYabc", 3, "Xbc"),
    ("bcXabcYdbc", 2, "Yd"),
    ("cXbcYabc", 2, "Ya"),
    ("abcdeXcde", 1, "X"),
    ("ba", 4, ""),
    ("bab", 4, "ab"),
]


@pytest.mark.parametrize("text, most, expected", LOOKUPS)
def test_prompt_lookup_drafts_what_followed_the_last_longest_match(text, most, expected):
    ids = [ord(letter) for letter in text]
    for count in {1, len(ids) - 1}:
        draft = PromptLookup().propose(ids[-count:], hidden(count), having_read(ids[:-1]), most, PLAIN, ())
        assert "".join(map(chr, draft.tokens)) == expected and draft.q_KV is None


def test_prompt_lookup_prefers_the_longest_match_up_to_its_limit():
    ids = [1, 2, 3, 4, 9, 2, 3, 4, 8, 3, 4, 7, 4, 6, 1, 2, 3, 4]
    for most, expected in ((4, 9), (3, 8), (2, 7), (1, 6)):
        draft = PromptLookup(max_ngram=most).propose(ids[-1:], hidden(1), having_read(ids[:-1]), 1, PLAIN, ())
        assert draft.tokens == (expected,)


def naive_lookup(ids, most, max_ngram=3):
    for n in range(max_ngram, 0, -1):
        for start in range(len(ids) - n - 1, -1, -1):
            if len(ids) > n and ids[start : start + n] == ids[-n:]:
                return ids[start + n :][:most]
    return []


def test_prompt_lookup_equals_a_plain_search():
    random = np.random.default_rng(0)
    for _ in range(300):
        ids = random.integers(random.integers(1, 5), size=random.integers(2, 14), endpoint=True).tolist()
        draft = PromptLookup().propose(ids[-1:], hidden(1), having_read(ids[:-1]), 5, PLAIN, ())
        assert list(draft.tokens) == naive_lookup(ids, 5)


# Scripted


def test_a_script_is_asked_for_the_position_after_the_last_token():
    asked, text = [], list(range(100, 120))

    def script(position, most):
        asked.append((position, most))
        return text[position : position + 9]

    draft = Scripted(script).propose([102, 103], hidden(2), having_read([100, 101, 102]), 3, PLAIN, ())
    assert draft.tokens == (104, 105, 106) and draft.q_KV is None and asked == [(4, 3)]


# News that do not continue what the cache has read


def drafters():
    return [PromptLookup(), Scripted(lambda position, most: []), pair("window_4")[1]]


BAD_NEWS = {
    "nothing": ([], 0),
    "no hidden state": ([5], 0),
    "a hidden state too few": ([4, 5], 1),
    "a hidden state too many": ([4, 5], 3),
    "another token": ([3, 5], 2),
    "a token twice": ([4, 4, 5], 3),
    "a gap": ([3, 5], 2),
    "more than was read": ([1, 2, 3, 4, 5], 5),
}


@pytest.mark.parametrize("case", BAD_NEWS)
def test_news_that_do_not_fit_are_refused(case):
    news, count = BAD_NEWS[case]
    target, _ = pair("window_4")
    for drafter in drafters():
        cache = target.new_cache()
        target.forward([1, 2, 3, 4], cache)
        with pytest.raises(ValueError, match="new tokens"):
            drafter.propose(news, hidden(count, 32), cache, 2, GREEDY, (0.5, 0.5))
        for fitting in ([5], [4, 5], [3, 4, 5], [2, 3, 4, 5]):
            drafter.propose(fitting, hidden(len(fitting), 32), cache, 2, GREEDY, (0.5, 0.5))


def test_news_from_before_a_rollback_are_refused():
    target, _ = pair("window_4")
    for drafter in drafters():
        cache = target.new_cache()
        out = target.forward([1, 2, 3, 4], cache)
        drafter.propose([3, 4, 5], out.hidden_TD[1:], cache, 2, GREEDY, (0.5, 0.5))
        cache.rollback(1)
        with pytest.raises(ValueError, match="3 new tokens do not continue the 3 tokens"):
            drafter.propose([3, 4, 5], out.hidden_TD[1:], cache, 2, GREEDY, (0.5, 0.5))
        drafter.propose([3, 5], out.hidden_TD[1:3], cache, 2, GREEDY, (0.5, 0.5))


def test_nothing_can_be_drafted_before_anything_is_read():
    for drafter in drafters():
        with pytest.raises(ValueError, match="do not continue the 0 tokens"):
            drafter.propose([1], hidden(1, 32), pair("window_4")[0].new_cache(), 2, GREEDY, (0.5, 0.5))


# The assistant


def situation(name):
    """(target, drafter, a cache that has read 50 tokens, the next one, the hidden state it came from)."""
    target, drafter = pair(name)
    ids_T, cache = random_ids(51, target.config.vocab_size), target.new_cache()
    for token in ids_T[:-1]:
        out = target.forward([token], cache)
        cache.commit()
    return target, drafter, cache, ids_T[-1:], out.hidden_TD


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["plain", "top_k", "top_p"])
@every_model
def test_drawn_drafts_carry_the_law_of_each_token(name, sampling):
    target, drafter, cache, news, hidden_ND = situation(name)
    u_K = np.random.default_rng(1).random(7)
    draft = drafter.propose(news, hidden_ND, cache, 7, sampling, u_K)
    assert draft.q_KV.shape == (7, target.config.vocab_size) and draft.q_KV.dtype == np.float64
    token, hidden_D = news[-1], hidden_ND[-1]
    for j in range(7):
        logits_V, hidden_D = drafter.forward(token, hidden_D, cache)
        token = draft.tokens[j]
        assert same_bits(draft.q_KV[j], sampling.law(logits_V)) and token == draw(draft.q_KV[j], u_K[j])
    assert len(set(draft.tokens)) > 1


@every_model
def test_greedy_drafts_are_the_argmax_and_need_no_uniforms(name):
    _, drafter, cache, news, hidden_ND = situation(name)
    draft = drafter.propose(news, hidden_ND, cache, 5, GREEDY, ())
    token, hidden_D = news[-1], hidden_ND[-1]
    for drafted in draft.tokens:
        logits_V, hidden_D = drafter.forward(token, hidden_D, cache)
        token = drafted
        assert drafted == logits_V.argmax()
    assert len(draft.tokens) == 5 and draft.q_KV is None


def test_suppressed_tokens_are_not_drafted():
    _, drafter, cache, news, hidden_ND = situation("window_4")
    plain = drafter.propose(news, hidden_ND, cache, 7, GREEDY, [0.5] * 7)
    other = drafter.propose(news, hidden_ND, cache, 7, Sampling(temperature=0.0, suppress=plain.tokens), [0.5] * 7)
    assert not set(plain.tokens) & set(other.tokens)


@pytest.mark.parametrize("sampling", [GREEDY, PLAIN], ids=["greedy", "plain"])
@every_model
def test_a_shorter_draft_is_the_beginning_of_a_longer_one(name, sampling):
    _, drafter, cache, news, hidden_ND = situation(name)
    u_K = np.random.default_rng(1).random(7)
    whole = drafter.propose(news, hidden_ND, cache, 7, sampling, u_K)
    for k in range(7):
        draft = drafter.propose(news, hidden_ND, cache, k, sampling, u_K[:k])
        assert draft.tokens == whole.tokens[:k]
        assert draft.q_KV is None if sampling is GREEDY or not k else same_bits(draft.q_KV, whole.q_KV[:k])


@every_model
def test_drafting_leaves_the_cache_alone(name):
    _, drafter, cache, news, hidden_ND = situation(name)
    before = [array.copy() for layer in cache.layers for array in layer.state().values()]
    tokens = list(cache.tokens)
    for sampling in (GREEDY, PLAIN):
        drafter.propose(news, hidden_ND, cache, 7, sampling, [0.3] * 7)
    assert all(map(same_bits, before, (array for layer in cache.layers for array in layer.state().values())))
    assert cache.tokens == tokens


@every_model
def test_the_drafter_sees_the_same_in_a_cache_that_frees_as_in_one_that_keeps_all(name):
    target, drafter = pair(name)
    frees, keeps = target.new_cache(), target.new_cache()
    for token in random_ids(70, target.config.vocab_size):
        hidden_D = target.forward([token], frees).hidden_TD[-1]
        frees.commit()
        target.forward([token], keeps)
        for position, edge in product(("bonus", "committed"), ("inclusive", "exclusive")):
            assistant = GemmaAssistant(drafter.params, drafter.config, target, position, edge)
            assert same_bits(*(assistant.forward(3, hidden_D, cache)[0] for cache in (frees, keeps)))


@every_model
def test_rejected_tokens_do_not_reach_the_drafter(name):
    target, drafter, cache, news, hidden_ND = situation(name)
    expected = drafter.propose(news, hidden_ND, cache, 3, PLAIN, [0.1, 0.5, 0.9])
    for k in range(1, 16):
        target.forward(random_ids(k, target.config.vocab_size, seed=k), cache)
        cache.rollback(k)
        draft = drafter.propose(news, hidden_ND, cache, 3, PLAIN, [0.1, 0.5, 0.9])
        assert same_bits(draft.q_KV, expected.q_KV)


def situations(name, count):
    """(length, logits_of) after every token read: logits_of(**options) are the assistant's first logits there."""
    target, drafter = pair(name, "float64")
    cache = target.new_cache()
    for token in random_ids(count, target.config.vocab_size):
        hidden_D = target.forward([token], cache).hidden_TD[-1]
        cache.commit()

        def logits_of(**options):
            return GemmaAssistant(drafter.params, drafter.config, target, **options).forward(3, hidden_D, cache)[0]  # noqa: B023

        yield cache.length, logits_of


@every_model
def test_the_window_edge_matters_only_beyond_the_window(name):
    window = pair(name)[0].config.sliding_window
    for length, logits_of in situations(name, window + 4):
        for position, first in (("bonus", window), ("committed", window + 1)):
            edges = (logits_of(position=position, window_edge=edge) for edge in ("inclusive", "exclusive"))
            assert same_bits(*edges) == (length < first)


@every_model
def test_the_position_always_matters(name):
    for length, logits_of in situations(name, 30):
        same = same_bits(logits_of(position="bonus"), logits_of(position="committed"))
        assert same == (length == 1)  # one key: whatever the scores, the weights are 1


def test_the_defaults_are_those_of_transformers():
    drafter = pair("window_4")[1]
    assert (drafter.position, drafter.window_edge) == ("bonus", "inclusive")


@pytest.mark.parametrize("options, message", [
    (dict(position="middle"), "position is 'middle', expected one of bonus, committed"),
    (dict(window_edge=None), "window_edge is None, expected one of inclusive, exclusive"),
])  # fmt: skip
def test_unknown_options_are_refused(options, message):
    target, drafter = pair("window_4")
    with pytest.raises(ValueError, match=message):
        GemmaAssistant(drafter.params, drafter.config, target, **options)
    with pytest.raises(ValueError, match=message):
        minimtp.load_drafter(target.folder.with_name("assistant"), target, **options)


# Drafts


def test_draft_tokens_are_python_ints_whatever_they_came_as():
    for tokens in ([1, 2], np.array([1, 2]), (np.int32(1), np.int64(2)), iter([1, 2])):
        draft = Draft(tokens)
        assert draft.tokens == (1, 2) and {type(token) for token in draft.tokens} == {int}
        assert draft.q_KV is None and draft.soft_KV is None


def test_a_draft_cannot_be_changed():
    draft = Draft([1])
    for name in ("tokens", "q_KV", "soft_KV"):
        with pytest.raises(FrozenInstanceError):
            setattr(draft, name, None)
    assert isinstance(draft.tokens, tuple)


@pytest.mark.parametrize("tokens", [[1.5], ["1"], [None], "12"])
def test_draft_tokens_that_are_no_integers_are_refused(tokens):
    with pytest.raises((TypeError, ValueError)):
        Draft(tokens)


def test_drafts_with_laws_can_be_compared():
    one, same = (Draft([1], np.full((1, 3), 1 / 3)) for _ in range(2))
    assert one == one and isinstance(one == same, bool)
