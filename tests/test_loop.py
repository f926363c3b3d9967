"""The loop: what a step records, where a text ends, what a cache holds afterwards, and the law of what comes out.

Most of it runs over a Markov chain that passes for a target: its laws are known, its hidden states name their tokens.
"""

import gc
from dataclasses import replace
from importlib import import_module
from itertools import islice

import numpy as np
import pytest
from tiny import Chain, ChainDrafter, Recorded, Restless, Witness, emitted, greedy, pair, random_ids, same_bits

from minimtp import Draft, PromptLookup, Sampling, Scripted, accept, generate
from minimtp.cache import CacheError

loop = import_module("minimtp.generate")
GREEDY, PLAIN = Sampling(temperature=0.0), Sampling()


def random_chain(size=12, seed=0, **options):
    return Chain(np.random.default_rng(seed).dirichlet(np.full(size, 0.5), size), **options)


def random_drafter(size=12, seed=0, **options):
    """Drafts from laws near those of random_chain."""
    other = np.random.default_rng(seed + 1).dirichlet(np.full(size, 0.5), size)
    return ChainDrafter(0.7 * random_chain(size, seed).p_VV + 0.3 * other, **options)


def run(target, drafter=None, prompt=(1, 2, 3), **options):
    return list(generate(target, list(prompt), drafter, **{"sampling": PLAIN, "max_new_tokens": 60} | options))


def restless(name):
    target, drafter = pair(name)
    return Restless(target), drafter


def records(steps):
    """Everything in the steps but the time they took, in a form that compares bit for bit."""
    return [
        (s.tokens, s.drafted, s.accepted, s.verdict, s.draft.tokens, s.uniforms, s.draft_uniforms, bits(s.draft.q_KV))
        for s in steps
    ]


def bits(x):
    return None if x is None else x.tobytes()


# Step records


@pytest.mark.parametrize("rule", ["rejection", "match", "greedy"])
@pytest.mark.parametrize("draft_sampling", [None, GREEDY, Sampling(temperature=1.5, top_k=5)])
def test_a_step_holds_all_that_decided_it(rule, draft_sampling):
    sampling = Sampling(temperature=0.9, top_p=0.95)
    target = Recorded(random_chain())
    drafter = Witness(random_drafter(most=[4, 2, 0, 1, 3]))
    steps = run(target, drafter, rule=rule, sampling=sampling, draft_sampling=draft_sampling)
    assert len(emitted(steps)) == 60
    for step, out in zip(steps, target.passes, strict=True):
        assert step.drafted == len(step.draft.tokens) and len(step.uniforms) == step.drafted + 1
        assert accept(rule, sampling.law(out.logits_TV), step.draft, step.uniforms) == step.verdict
        assert step.tokens == (*step.draft.tokens[: step.accepted], step.verdict.token)
        assert step.accepted == step.verdict.accepted and step.seconds >= 0
        assert (step.draft.q_KV is None) == (draft_sampling is GREEDY or not step.drafted)
    assert {0, 1, 4} <= {step.drafted for step in steps} and len({step.accepted for step in steps}) > 1


def test_drafts_can_be_drawn_again_from_their_record():
    drafter, token = random_drafter(), 3
    for step in run(random_chain(), drafter):
        cache = random_chain().new_cache()
        again = drafter.propose([token], None, cache, len(step.draft_uniforms), PLAIN, step.draft_uniforms)
        assert again.tokens == step.draft.tokens and bits(again.q_KV) == bits(step.draft.q_KV)
        token = step.tokens[-1]


def test_no_uniform_is_used_twice():
    steps = run(random_chain(), random_drafter())
    used = [u for step in steps for u in (*step.draft_uniforms, *step.uniforms)]
    assert len(set(used)) == len(used) > 100 and all(0 <= u < 1 for u in used)


@pytest.mark.parametrize("name", ["chain", "window_7"])
def test_one_seed_is_one_run(name):
    target, drafter = (random_chain(), random_drafter()) if name == "chain" else restless(name)
    first, same, other = (records(run(target, drafter, seed=seed, max_new_tokens=30)) for seed in (3, 3, 4))
    assert first == same
    assert [record[0] for record in first] != [record[0] for record in other]


def test_the_seed_does_not_matter_at_temperature_0():
    texts = [emitted(run(random_chain(), random_drafter(), sampling=GREEDY, seed=seed)) for seed in (0, 1)]
    assert texts[0] == texts[1]


def test_without_a_drafter_every_step_emits_one_token():
    for drafter in (None, Scripted(lambda position, most: [])):
        steps = run(random_chain(), drafter)
        assert [len(step.tokens) for step in steps] == [1] * 60
        assert {(step.drafted, step.accepted, step.draft.tokens, step.draft.q_KV) for step in steps} == {
            (0, 0, (), None)
        }


# Where a text ends


def sequence(target, prompt=(1, 2, 3), count=80):
    """The greedy continuation of the prompt, read from the chain's table or by plain decoding."""
    return greedy(target, list(prompt), count)[0]


def cycle(size=12):
    """A chain whose greedy text visits all ids in turn."""
    return Chain(0.9 * np.roll(np.eye(size), 1, axis=1) + 0.1 / size)


def right(target, prompt=(1, 2, 3), **options):
    text = [*prompt, *sequence(target, prompt)]
    return Scripted(lambda position, most: text[position : position + most])


@pytest.mark.parametrize("k", [1, 3, 5, 15])
@pytest.mark.parametrize("max_new_tokens", range(1, 13))
def test_the_budget_is_met_exactly_inside_accepted_blocks(k, max_new_tokens):
    target = cycle()
    for drafter in (right(target), random_drafter(), None):
        cache = target.new_cache()
        options = dict(num_draft=k, max_new_tokens=max_new_tokens, sampling=GREEDY, cache=cache)
        steps = run(target, drafter and Witness(drafter), **options)
        assert emitted(steps) == sequence(target)[:max_new_tokens]
        assert cache.tokens == [1, 2, 3, *emitted(steps)[:-1]] and cache.committed == cache.length
        left = max_new_tokens
        for step in steps:
            assert len(step.draft_uniforms) == (0 if left == max_new_tokens or not drafter else min(k, left - 1))
            left -= len(step.tokens)


@pytest.mark.parametrize("stop", range(12))
@pytest.mark.parametrize("k", [1, 4, 7])
def test_a_stop_token_is_the_last_one_emitted_and_cuts_its_block(stop, k):
    target = cycle()
    text = sequence(target)
    text = text[: text.index(stop) + 1]
    for drafter in (right(target), None):
        cache = target.new_cache()
        options = dict(num_draft=k, stop=(stop, 99), sampling=GREEDY, cache=cache)
        steps = run(target, drafter and Witness(drafter), **options)
        assert emitted(steps) == text
        assert cache.tokens == [1, 2, 3, *text[:-1]] and cache.committed == cache.length
        last = steps[-1]
        assert last.accepted == (min(last.verdict.accepted, len(last.tokens)) if drafter else 0)


def test_a_rejected_stop_token_stops_nothing():
    target = cycle()
    stops = Scripted(lambda position, most: [0] * most)
    assert emitted(run(target, stops, stop=(0,), sampling=GREEDY)) == [4, 5, 6, 7, 8, 9, 10, 11, 0]


@pytest.mark.parametrize("name", ["window_4", "window_7", "window_20"])
def test_after_a_stop_the_cache_is_as_if_the_rest_had_never_been_read(name):
    model, _ = restless(name)
    prompt = random_ids(30, model.config.vocab_size)
    text, rows = greedy(model, prompt, 60)
    script = Scripted(lambda position, most: (prompt + text)[position : position + most])
    for stop in set(text[3:]):
        cache, count = model.new_cache(), text.index(stop) + 1
        options = dict(num_draft=7, stop=[stop], sampling=GREEDY, cache=cache, prompt=prompt)
        assert emitted(run(model, script, **options)) == text[:count]
        assert cache.tokens == prompt + text[: count - 1]
        if count < 60:
            assert same_bits(model.forward([stop], cache).logits_TV[0], rows[count])


@pytest.mark.parametrize("k", [1, 4, 15])
@pytest.mark.parametrize("room", [0, 1, 2, 3, 5, 9])
def test_a_full_context_ends_the_text(room, k):
    for limit in ("cache", "model"):
        target = cycle()
        target.capacity = 3 + room
        cache = target.new_cache(3 + room) if limit == "cache" else None
        steps = run(target, right(cycle()), num_draft=k, sampling=GREEDY, cache=cache)
        assert emitted(steps) == sequence(cycle())[: room + 1]
        assert cache is None or cache.length == cache.capacity


def test_a_full_context_of_a_model():
    target, drafter = pair("window_4")
    cache = target.new_cache(capacity=40)
    steps = run(target, drafter, random_ids(20, 50), cache=cache, num_draft=7)
    assert len(emitted(steps)) == 21 and cache.length == 40


# The prompt, and caches that are continued


@pytest.mark.parametrize("length", [1, 2, 511, 512, 513, 1024, 1025])
def test_the_drafter_reads_along_with_long_prompts(length):
    target, drafter = random_chain(), Witness(random_drafter())
    cache = target.new_cache()
    prompt = random_ids(length, 12)
    steps = run(target, drafter, prompt, cache=cache)
    assert len(emitted(steps)) == 60 and len(drafter.read[cache]) == length + 60


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_the_size_of_prompt_chunks_does_not_matter(chunk, monkeypatch):
    prompt = random_ids(130, 12)
    plain = records(run(random_chain(), random_drafter(), prompt))
    monkeypatch.setattr(loop, "CHUNK", chunk)
    assert records(run(random_chain(), Witness(random_drafter()), prompt)) == plain


def test_narrow_prompt_chunks_give_the_same_bits_and_wide_ones_the_same_to_rounding(monkeypatch):
    target, drafter = pair("window_4", "float64")
    prompt, found = random_ids(600, target.config.vocab_size), {}
    for chunk in (3, 16, 100, 512):
        monkeypatch.setattr(loop, "CHUNK", chunk)
        recorded = Recorded(target)
        steps = run(recorded, drafter, prompt, sampling=GREEDY, max_new_tokens=12)
        found[chunk] = emitted(steps), [recorded.rows[599 + i] for i in range(12)]
    assert same_bits(found[3][1], found[16][1])
    for chunk in (100, 512):
        assert found[chunk][0] == found[3][0]
        np.testing.assert_allclose(found[chunk][1], found[3][1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["chain", "window_4", "window_20"])
@pytest.mark.parametrize("cut", [1, 2, 13, 29])
def test_generating_twice_is_generating_once(name, cut):
    target, inner = (cycle(), random_drafter()) if name == "chain" else restless(name)
    prompt = random_ids(9, target.config.vocab_size)
    text, rows = greedy(target, prompt, 30)
    drafter, cache = Witness(inner) if name == "chain" else inner, target.new_cache()
    first = emitted(run(target, drafter, prompt, cache=cache, max_new_tokens=cut, sampling=GREEDY))
    recorded = Recorded(target)
    second = emitted(run(recorded, drafter, first[-1:], cache=cache, max_new_tokens=30 - cut, sampling=GREEDY))
    assert first + second == text and cache.tokens == prompt + text[:-1]
    assert same_bits([recorded.rows[8 + i] for i in range(cut, 30)], rows[cut:])


def test_a_loaded_cache_is_continued(tmp_path):
    model, drafter = pair("window_7")
    prompt = random_ids(30, model.config.vocab_size)
    whole = emitted(run(model, drafter, prompt, sampling=GREEDY))
    cache = model.new_cache()
    first = emitted(run(model, drafter, prompt, cache=cache, sampling=GREEDY, max_new_tokens=20))
    cache.save(tmp_path / "cache")
    loaded = model.load_cache(tmp_path / "cache")
    assert first + emitted(run(model, drafter, first[-1:], cache=loaded, sampling=GREEDY, max_new_tokens=40)) == whole


@pytest.mark.parametrize("name", ["chain", "window_7"])
def test_generations_can_take_turns_on_one_drafter(name):
    target, drafter = (random_chain(), Witness(random_drafter())) if name == "chain" else restless(name)
    prompts = [random_ids(length, target.config.vocab_size, seed=length) for length in (5, 30, 12)]
    alone = [records(run(target, drafter, prompt, seed=i, max_new_tokens=25)) for i, prompt in enumerate(prompts)]
    options = dict(sampling=PLAIN, max_new_tokens=25)
    caches = [target.new_cache() for _ in prompts]
    turns = [generate(target, p, drafter, seed=i, cache=caches[i], **options) for i, p in enumerate(prompts)]
    together = [[] for _ in prompts]
    while turns_left := [(i, step) for i, turn in enumerate(turns) if (step := next(turn, None))]:
        for i, step in turns_left:
            together[i].append(step)
    assert [records(steps) for steps in together] == alone


# Generations that end early


def test_between_steps_the_cache_holds_all_but_the_last_token():
    target, drafter = pair("window_4")
    prompt, cache, tokens = random_ids(20, 50), target.new_cache(), []
    for step in generate(target, prompt, drafter, cache=cache, sampling=PLAIN, max_new_tokens=40):
        tokens += step.tokens
        assert cache.tokens == prompt + tokens[:-1] and cache.committed == cache.length
    assert len(tokens) == 40


def test_a_generation_that_is_left_leaves_a_cache_that_can_be_used():
    target, drafter = pair("window_4")
    prompt, cache, text = random_ids(20, 50), target.new_cache(), []
    whole = emitted(run(target, drafter, prompt, sampling=GREEDY))
    for step in generate(target, prompt, drafter, cache=cache):
        text += step.tokens
        if len(text) > 10:
            break
    text += emitted(run(target, drafter, text[-1:], cache=cache, sampling=GREEDY, max_new_tokens=60 - len(text)))
    assert text == whole


def test_a_generation_that_is_dropped_late_takes_nothing_back():
    """A generator that nobody finished is closed whenever it is collected; the cache may have moved on by then."""
    target = cycle()
    cache = target.new_cache()
    steps = generate(target, [1, 2, 3], None, cache=cache)
    next(steps)
    target.forward([4, 5], cache)
    del steps
    gc.collect()
    assert cache.tokens == [1, 2, 3, 4, 5]


class Interrupted:
    """A target and a drafter in one, whose method `place` fails once, when called for the `at`-th time."""

    def __init__(self, target, drafter, place, at, error):
        self.parts, self.place, self.left, self.error = {"forward": target, "propose": drafter}, place, at, error
        self.config = target.config

    def forward(self, *arguments, **options):
        return self._call("forward", *arguments, **options)

    def propose(self, *arguments):
        return self._call("propose", *arguments)

    def _call(self, name, *arguments, **options):
        result = getattr(self.parts[name], name)(*arguments, **options)
        self.left -= name == self.place
        if name == self.place and self.left == 0:
            raise self.error
        return result


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize(
    "place, at", [*(("forward", at) for at in range(1, 6)), *(("propose", at) for at in range(1, 6))]
)
def test_an_interrupted_generation_leaves_what_its_steps_said(error, place, at):
    target = cycle()
    both, cache, tokens = Interrupted(target, right(target), place, at, error), target.new_cache(), []
    with pytest.raises(error):
        for step in generate(both, [1, 2, 3], both, cache=cache, max_new_tokens=20):
            tokens += step.tokens
    assert cache.tokens == ([1, 2, 3, *tokens[:-1]] if tokens else []) and cache.committed == cache.length
    rest = emitted(run(target, right(target), tokens[-1:] or [1, 2, 3], sampling=GREEDY, cache=cache, max_new_tokens=9))
    assert (tokens + rest)[:9] == sequence(target)[:9]


def test_logits_that_are_no_numbers_leave_the_cache_as_it_was():
    class Broken(Recorded):
        def forward(self, *arguments, **options):
            out = super().forward(*arguments, **options)
            out.logits_TV[-1] = np.nan
            return out

    target = cycle()
    cache = target.new_cache()
    with pytest.raises(ValueError, match="nan"):
        list(generate(Broken(target), [1, 2, 3], right(target), cache=cache))
    assert cache.tokens == []


def test_a_failing_pass_leaves_the_callers_uncommitted_tokens():
    target = cycle()
    cache = target.new_cache()
    target.forward([1, 2], cache)
    with pytest.raises(MemoryError):
        list(generate(Failing(target), [3], cache=cache))
    assert cache.tokens == [1, 2]


class Failing(Recorded):
    def forward(self, ids_T, cache, taps=(), last=None):
        raise MemoryError


def test_a_draft_of_too_many_tokens_is_an_error():
    class Overeager:
        def propose(self, new_tokens_N, hidden_ND, cache, num_draft, sampling, u_K):
            return Draft(right(cycle()).script(cache.length + 1, num_draft + 1))

    with pytest.raises(ValueError, match="draft"):
        for i, _ in enumerate(generate(cycle(), [1, 2, 3], Overeager(), max_new_tokens=10)):
            assert i < 20


def test_a_draft_token_outside_the_vocabulary_is_an_error_and_leaves_no_trace():
    target = cycle()
    cache = target.new_cache()
    with pytest.raises(ValueError, match="token id 12 is outside the vocabulary of 12"):
        run(target, Scripted(lambda position, most: [4, 12]), sampling=GREEDY, cache=cache)
    assert cache.tokens == [1, 2, 3]


# Bad arguments, refused before anything is read


BAD = {
    "empty prompt": (dict(prompt=[]), "non-empty"),
    "token outside": (dict(prompt=[1, 12]), "token id 12 is outside the vocabulary of 12"),
    "negative token": (dict(prompt=[-1]), "token id -1"),
    "fractions": (dict(prompt=[1.0]), "must be integers"),
    "nested prompt": (dict(prompt=[[1, 2]]), "shape"),
    "long prompt": (dict(prompt=[1] * 23), "a prompt of 23 tokens is 3 longer than the context has room for"),
    "no drafts": (dict(num_draft=0), "num_draft must be between 1 and 15, got 0"),
    "many drafts": (dict(num_draft=16), "num_draft must be between 1 and 15, got 16"),
    "no tokens": (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
    "negative seed": (dict(seed=-1), "seed must be at least 0, got -1"),
    "unknown rule": (dict(rule="hope"), "unknown acceptance rule 'hope'"),
    "unknown parameter": (dict(rule="rejection", epsilon=0.1), "no parameter 'epsilon'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_at_the_call(case):
    options, message = BAD[case]
    target = Recorded(random_chain(capacity=20))
    cache = target.new_cache()
    with pytest.raises(ValueError, match=message):
        generate(target, drafter=random_drafter(), cache=cache, **{"prompt_ids": [1, 2, 3]} | renamed(options))
    assert not target.passes and cache.tokens == []


def renamed(options):
    return {"prompt_ids" if name == "prompt" else name: value for name, value in options.items()}


def test_a_prompt_that_does_not_fit_behind_what_is_read_is_refused():
    target, _ = pair("window_4")
    cache = target.new_cache(capacity=10)
    target.forward([1, 2, 3, 4], cache)
    with pytest.raises(ValueError, match="a prompt of 7 tokens is 1 longer"):
        generate(target, [1] * 7, cache=cache)
    assert cache.length == 4
    with pytest.raises(CacheError):
        target.forward([1] * 7, cache)


def test_ids_that_stand_for_media_are_refused_in_a_prompt_and_end_no_generation():
    target, drafter = pair("window_7")
    media = dict.fromkeys(range(0, 37, 3), "an image")
    target = replace(target, config=replace(target.config, placeholders=media))
    with pytest.raises(ValueError, match="token 3 stands for an image"):
        generate(target, [1, 3])
    steps = run(target, replace(drafter, target=target), [1, 2], sampling=Sampling(temperature=8.0))
    assert len(emitted(steps)) == 60


# Presence penalty


@pytest.mark.parametrize("sampling", [GREEDY, PLAIN], ids=["greedy", "plain"])
def test_a_presence_penalty_counts_emitted_and_drafted_tokens_row_by_row(sampling):
    sampling = Sampling(temperature=sampling.temperature, presence_penalty=0.7)
    target, tokens = Recorded(random_chain()), []
    for step, out in zip(run(target, random_drafter(), sampling=sampling), target.passes):
        histories = [tokens + list(step.draft.tokens[:j]) for j in range(step.drafted + 1)]
        p_JV = np.stack([sampling.law(row, history) for row, history in zip(out.logits_TV, histories)])
        assert accept("rejection", p_JV, step.draft, step.uniforms) == step.verdict
        tokens = emitted([step]) if not tokens else tokens + list(step.tokens)


def test_a_presence_penalty_gives_the_same_greedy_text_with_drafts():
    sampling = Sampling(temperature=0.0, presence_penalty=1.0)
    for target, drafter in ((random_chain(), random_drafter()), restless("window_7")):
        plain, drafted = (emitted(run(target, d, sampling=sampling, max_new_tokens=40)) for d in (None, drafter))
        assert plain == drafted and plain != emitted(run(target, sampling=GREEDY, max_new_tokens=40))


def test_suppressed_tokens_are_never_emitted():
    sampling = Sampling(suppress=(0, 5, 7))
    for drafter in (random_drafter(), PromptLookup(), None):
        assert not {0, 5, 7} & set(emitted(run(random_chain(), drafter, sampling=sampling)))


# The law of what comes out, exactly: uniforms on the midpoints of a grid that holds every breakpoint of every decision

SIXTHS = Chain(np.array([[3, 2, 1], [2, 3, 1], [3, 1, 2]]) / 6)
SIXTHS_Q = np.array([[2, 2, 2], [4, 1, 1], [6, 0, 0]]) / 6
HALVES = Chain(np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]) / 2)
HALVES_Q = np.array([[1, 1, 0], [2, 0, 0], [1, 0, 1]]) / 2


class Grid:
    """Stands for a random generator: its uniforms are the midpoints that `digits` name, beyond those the first."""

    def __init__(self, digits, base):
        self.digits, self.base, self.used = digits, base, 0

    def random(self, count):
        self.used += count
        self.digits += [0] * (self.used - len(self.digits))
        return (np.array(self.digits[self.used - count : self.used]) + 0.5) / self.base


class SharedGrid(Grid):
    """A mistake: the tests get the uniforms that the drafts were drawn with (every other call is for a draft)."""

    calls, drafting = 0, np.empty(0)

    def random(self, count):
        self.calls += 1
        if self.calls % 2:
            return np.concatenate([self.drafting, super().random(count - len(self.drafting))])
        self.drafting = super().random(count)
        return self.drafting


def outcomes(run_once, grid, base):
    """run_once() for every way its uniforms can fall -> pairs of (weight, result)."""
    digits = []
    while True:
        random = grid(digits, base)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np.random, "default_rng", lambda seed: random)  # noqa: B023
            result = run_once()
        yield float(base) ** -random.used, result
        while digits and digits[-1] == base - 1:
            digits.pop()
        if not digits:
            return
        digits[-1] += 1


def chain_law(chain, start, length):
    """The law of the next `length` tokens, by definition -> {tokens: probability}."""
    laws = {(): 1.0}
    for _ in range(length):
        laws = {
            (*text, token): weight * p
            for text, weight in laws.items()
            for token, p in enumerate(chain.p_VV[text[-1] if text else start])
        }
    return laws


def generated_law(chain, drafter, length, steps, base, grid=Grid, **options):
    """The law of what so many steps emit, shorter texts completed from the chain -> {tokens: probability}."""

    def run_once():
        generation = generate(chain, [0], drafter, sampling=PLAIN, max_new_tokens=length, **options)
        return emitted(islice(generation, steps))

    laws = dict.fromkeys(chain_law(chain, 0, length), 0.0)
    for weight, text in outcomes(run_once, grid, base):
        for rest, p in chain_law(chain, text[-1], length - len(text)).items():
            laws[(*text, *rest)] += weight * p
    return laws


def gap(chain, laws):
    """Largest distance from the chain's own law."""
    expected = chain_law(chain, 0, len(next(iter(laws))))
    assert expected.keys() == laws.keys()
    return max(abs(laws[text] - expected[text]) for text in expected)


every_lossless_rule = pytest.mark.parametrize("rule", ["rejection", "match"])


@every_lossless_rule
def test_the_law_of_one_draft_is_the_targets(rule):
    assert gap(SIXTHS, generated_law(SIXTHS, ChainDrafter(SIXTHS_Q), 3, 2, base=6, num_draft=1, rule=rule)) < 1e-12


@every_lossless_rule
@pytest.mark.parametrize("k, most, length, steps", [(1, 15, 4, 4), (2, 15, 4, 3), (4, 15, 5, 2), (3, [1, 2, 0], 4, 3)])
@pytest.mark.parametrize("draft_sampling", [PLAIN, GREEDY], ids=["drawn", "argmax"])
def test_the_law_of_any_number_of_drafts_is_the_targets(rule, k, most, length, steps, draft_sampling):
    options = dict(num_draft=k, rule=rule, draft_sampling=draft_sampling)
    assert gap(HALVES, generated_law(HALVES, ChainDrafter(HALVES_Q, most), length, steps, base=2, **options)) < 1e-12


def test_the_law_without_drafts_is_the_targets():
    assert gap(SIXTHS, generated_law(SIXTHS, None, 3, 3, base=6)) < 1e-12


class Liar(ChainDrafter):
    """Says that its tokens were drawn from the target's law."""

    def propose(self, *arguments):
        draft = super().propose(*arguments)
        before = [arguments[0][-1], *draft.tokens[:-1]]
        return Draft(draft.tokens, HALVES.p_VV[before] if draft.tokens else None)


@pytest.mark.parametrize(
    "chain, drafter, options",
    [
        (SIXTHS, ChainDrafter(SIXTHS_Q), dict(base=6, grid=SharedGrid)),
        (HALVES, Liar([[0, 1, 0], [1, 0, 0], [1, 0, 0]]), dict(base=2)),
        (HALVES, ChainDrafter(HALVES_Q), dict(base=2, rule="greedy")),
    ],
    ids=["shared uniforms", "wrong q", "greedy rule"],
)
def test_a_law_that_is_not_the_targets_is_caught(chain, drafter, options):
    assert gap(chain, generated_law(chain, drafter, 3, 2, num_draft=1, **options)) > 0.01


def test_a_long_run_has_the_targets_law():
    """Over n visits, P(total variation > x) <= 2^V exp(-2 n x^2) (Bretagnolle, Huber, Carol): 1e-6 for all 3 rows."""
    target, visits = Chain(SIXTHS.p_VV, capacity=6_000), 1000
    text = emitted(run(target, ChainDrafter(SIXTHS_Q), [0], max_new_tokens=6_000, seed=1))
    bound = np.sqrt(np.log(3 * 2**3 / 1e-6) / (2 * visits))
    for token, p_V in enumerate(target.p_VV):
        after = [text[i + 1] for i in range(len(text) - 1) if text[i] == token][:visits]
        assert len(after) == visits
        assert np.abs(np.bincount(after, minlength=3) / visits - p_V).sum() / 2 < bound


# The same on a network: its laws are those of plain decoding, and everything else is in the record


@every_lossless_rule
def test_every_decision_follows_from_the_laws_of_plain_decoding(rule):
    target, drafter = pair("window_7")
    sampling, prompt = Sampling(temperature=2.0, top_k=20), random_ids(12, target.config.vocab_size)
    cache, behind, accepted = target.new_cache(), prompt, 0
    for step in run(target, drafter, prompt, rule=rule, sampling=sampling, max_new_tokens=100):
        rows = [target.forward([token], cache).logits_TV[-1] for token in (*behind, *step.draft.tokens)]
        p_JV = sampling.law(np.stack(rows[-step.drafted - 1 :]))
        assert accept(rule, p_JV, step.draft, step.uniforms) == step.verdict
        cache.rollback(step.drafted - step.accepted)
        behind, accepted = step.tokens[-1:], accepted + step.accepted
    assert accepted > 5
