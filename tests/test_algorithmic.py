"""Losslessness, level two: greedy output with drafts is greedy output, every token and every bit of every logits row.

The reference reads one token a pass, and commits and un-reads nothing.
"""

from functools import cache

import numpy as np
import pytest
from tiny import Recorded, Restless, emitted, greedy, pair, random_ids, random_prompt, same_bits

from minimtp import PromptLookup, Scripted, generate
from minimtp.cache import Cache
from minimtp.kv import SlidingKV

MODELS = ("window_4", "window_7", "window_20")
OTHERS = ("experts", "shared_kv")
PROMPTS = (1, 3, 25)  # tokens: less than a window, or more, or a wide pass
DEPTHS = random_ids(600, 5040)  # for drafts that are wrong at depths that follow no pattern
every_model = pytest.mark.parametrize("name", MODELS)


def recorded(name, dtype="float32"):
    target, _ = pair(name, dtype)
    return Recorded(target) if name == "bundled" else Restless(target)


@cache
def reference(name, prompt_length, count, dtype="float32"):
    """(prompt, its greedy continuation, the logits rows behind that)."""
    target = recorded(name, dtype)
    prompt = random_prompt(target, prompt_length, seed=prompt_length)
    return prompt, *greedy(target, prompt, count)


def speculate(name, drafter, k, prompt_length, count, dtype="float32", rule="rejection", new_cache=None, capacity=None):
    """Generate with drafts; check every token and every bit against the reference -> the steps."""
    prompt, tokens, rows = reference(name, prompt_length, count, dtype)
    target = recorded(name, dtype)
    kv = (new_cache or target.new_cache)(capacity)
    steps = list(generate(target, prompt, drafter, num_draft=k, rule=rule, max_new_tokens=count, cache=kv))
    assert emitted(steps) == tokens
    assert same_bits([target.rows[len(prompt) - 1 + i] for i in range(count)], rows)
    assert kv.tokens == prompt + tokens[:-1]
    return steps


def script(name, prompt_length, count, wrong_at):
    """Drafts the greedy continuation, but for one wrong token at depth wrong_at(position) (None: all right)."""
    prompt, tokens, _ = reference(name, prompt_length, count)
    text, vocab_size = prompt + tokens, pair(name)[0].config.vocab_size

    def propose(position, most):
        draft, depth = text[position : position + most], wrong_at(position)
        if depth is not None and depth < len(draft):
            draft[depth] = (draft[depth] + 1) % vocab_size
        return draft

    return Scripted(propose)


def acceptance(steps):
    return [step.accepted for step in steps if step.drafted]


def drafted(steps):
    return [step.drafted for step in steps if step.drafted]


# Drafters that are right or wrong by themselves


@pytest.mark.parametrize("k", range(1, 8))
def test_the_bundled_pair(k):
    steps = speculate("bundled", pair("bundled")[1], k, 40, 210)
    assert 0 < sum(acceptance(steps)) < sum(drafted(steps))


@pytest.mark.parametrize(
    "name, k", [*((name, k) for name in MODELS for k in range(1, 8)), *((name, 5) for name in OTHERS)]
)
def test_random_assistants(name, k):
    steps = speculate(name, pair(name)[1], k, PROMPTS[k % 3], 50)
    assert 0 < sum(acceptance(steps)) < sum(drafted(steps))


@pytest.mark.parametrize("name, k", [("bundled", 4), *((name, k) for name in MODELS for k in (1, 3, 7))])
def test_prompt_lookup(name, k):
    speculate(name, PromptLookup(), k, 40, 210 if name == "bundled" else 50)


# Scripted drafts


@pytest.mark.parametrize("k", range(1, 8))
@every_model
def test_drafts_that_are_all_right(name, k):
    length = PROMPTS[k % 3]
    steps = speculate(name, script(name, length, 90, lambda position: None), k, length, 90)
    assert acceptance(steps) == drafted(steps)


@pytest.mark.parametrize("k", range(1, 8))
@every_model
def test_drafts_that_are_wrong_at_each_depth(name, k):
    for depth in range(k):
        steps = speculate(name, script(name, 25, 40, lambda position: depth), k, 25, 40)  # noqa: B023
        assert acceptance(steps) == [min(depth, n) for n in drafted(steps)]


@pytest.mark.parametrize(
    "name, k", [*((name, k) for name in MODELS for k in range(1, 8)), *((name, 4) for name in OTHERS)]
)
def test_drafts_that_are_wrong_at_changing_depths(name, k):
    steps = speculate(name, script(name, 3, 120, lambda position: DEPTHS[position] % (k + 1)), k, 3, 120)
    assert {0, k} <= set(acceptance(steps))


@pytest.mark.parametrize("k", [4, 15])
def test_the_bundled_target_with_drafts_wrong_at_changing_depths(k):
    speculate("bundled", script("bundled", 40, 210, lambda position: DEPTHS[position] % (k + 1)), k, 40, 210)


@pytest.mark.parametrize("k", [2, 15])
@every_model
def test_drafts_that_are_all_wrong(name, k):
    prompt, tokens, _ = reference(name, 25, 60)
    text, vocab_size = prompt + tokens, pair(name)[0].config.vocab_size
    wrong = Scripted(lambda position, most: [(token + 1) % vocab_size for token in text[position : position + most]])
    assert set(acceptance(speculate(name, wrong, k, 25, 60))) == {0}


@pytest.mark.parametrize("k", [3, 7])
@every_model
def test_drafts_of_changing_length(name, k):
    right = script(name, 25, 80, lambda position: None).script
    for wrong_at in (lambda position: None, lambda position: DEPTHS[position] % 4):
        right = script(name, 25, 80, wrong_at).script
        short = Scripted(lambda position, most: right(position, most)[: position % (most + 1)])  # noqa: B023
        speculate(name, short, k, 25, 80)


# Other rules, precisions, caches


@pytest.mark.parametrize("rule", ["greedy", "match", "rejection"])
@every_model
def test_every_rule_is_greedy_at_temperature_0(name, rule):
    speculate(name, script(name, 3, 60, lambda position: DEPTHS[position] % 5), 4, 3, 60, rule=rule)


@every_model
def test_in_double(name):
    speculate(name, pair(name, "float64")[1], 5, 25, 40, dtype="float64")
    speculate(name, script(name, 25, 40, lambda position: DEPTHS[position] % 5), 5, 25, 40, dtype="float64")


@every_model
def test_in_a_cache_of_just_the_size(name):
    speculate(name, script(name, 3, 90, lambda position: DEPTHS[position] % 5), 4, 3, 90, capacity=92)


# Caches that must not pass


class KeepsOne(Cache):
    """Its layers keep one rejected entry."""

    def rollback(self, n):
        for layer in self.layers:
            layer.rollback(max(0, n - 1))
        del self.tokens[self.length - n :]


class CutsIdsOnly(Cache):
    """Its layers keep all rejected entries."""

    def rollback(self, n):
        del self.tokens[self.length - n :]


class Overwritten(Cache):
    """The first rejected entry of one layer has overwritten the last that stands."""

    def rollback(self, n):
        super().rollback(n)
        k_GSK, last = self.layers[1].buffers["k"], self.layers[1].length - self.layers[1].start - 1
        k_GSK[:, last] = k_GSK[:, last + (n > 0)]


class Starved(Cache):
    """Its sliding layers keep less than the target looks back over."""

    def commit(self):
        super().commit()
        for layer in self.layers:
            if isinstance(layer, SlidingKV):
                layer.keep = 2


def faulty(kind, name):
    """new_cache of a model, but of that kind."""

    def new_cache(capacity=None):
        whole = pair(name)[0].new_cache(capacity)
        return kind(whole.layers, whole.capacity, whole.fingerprint)

    return new_cache


@every_model
@pytest.mark.parametrize("kind", [KeepsOne, CutsIdsOnly, Overwritten, Starved])
def test_a_faulty_cache_is_caught(name, kind):
    with pytest.raises((AssertionError, ValueError)):
        speculate(name, script(name, 25, 60, lambda position: 1), 4, 25, 60, new_cache=faulty(kind, name))


def test_the_references_are_worth_comparing_with():
    for name in MODELS:
        _, tokens, rows = reference(name, 3, 120)
        assert len(set(tokens)) > 12 and len(np.unique(rows, axis=0)) == len(rows)
    _, tokens, _ = reference("bundled", 40, 210)
    assert len(set(tokens)) > 20
