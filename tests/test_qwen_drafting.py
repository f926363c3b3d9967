"""The MTP layer as a drafter: however it came to a text, it drafts as if it had read that text afresh.

Its entries are in the cache, each made from a true hidden state and the token after it. What may go wrong is a matter
of histories: drafts that stay, tokens replaced after they were read, generations left half-way, failures in between.
"""

import re
from dataclasses import replace
from importlib import import_module
from itertools import cycle, islice

import numpy as np
import pytest
from hypothesis import Phase
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule
from random_qwen import rope
from test_loading import edit_json, edit_tensors
from test_qwen_state import SEEDS, Machine, every_dtype, every_model, reloaded
from tiny import emitted, random_ids, same_bits
from tiny import pair as gemma_pair
from tiny_qwen import GREEDY, MODELS, PLAIN, TOLERANCES, Afresh, contents, copied, failing, off, pair, run, write

import minimtp
from minimtp import generate, qwen35, qwen35_mtp
from minimtp.backend import ROWS
from minimtp.cache import CacheError
from minimtp.checkpoint import CheckpointError
from minimtp.drafter_kv import DrafterKV
from minimtp.kv import FullKV

U = np.random.default_rng(5).random(15)

dense_and_experts = pytest.mark.parametrize("name", ["dense", "experts"])


def entries(cache):
    """The drafter's entries -> keys, values [G, N, K], and the N tokens they were made with."""
    memory = cache.drafter
    assert memory.kv.length == len(memory.made_with) <= memory.length == cache.length
    return *memory.kv.read(), np.array(memory.made_with, np.int64)


def same_entries(a, b):
    return all(map(same_bits, entries(a), entries(b)))


def same_draft(a, b):
    return a.tokens == b.tokens and (a.q_KV is b.q_KV is None or same_bits(a.q_KV, b.q_KV))


# Histories of every kind, by the machine that tests the state


class Drafting(Machine):
    """A drafter reads along when it likes; the model is also the tokens that its entries must be made with."""

    drafter_class = DrafterKV

    def __init__(self):
        super().__init__()
        self.afresh, self.made, self.rough, self.hidden = Afresh(self.target, self.drafter), [], [], []

    def new(self):
        cache = super().new()
        cache.drafter.__class__ = self.drafter_class
        return cache

    def read_these(self, ids):
        out = super().read_these(ids)
        self.hidden += list(out.hidden_TD)

    def cut(self, length):
        super().cut(length)
        del self.hidden[length:], self.made[length:], self.rough[length:]

    @rule(count=st.integers(1, 40), num_draft=st.integers(0, 4), greedy=st.booleans(), seed=SEEDS, other=SEEDS)
    def draft(self, count, num_draft, greedy, seed, other):
        """Draft after one token, and read another one instead."""
        if self.ids:
            self.propose(self.fresh(1, seed)[0], min(count, len(self.ids)), num_draft, (PLAIN, GREEDY)[greedy])
            if other != seed:
                self.read_these(self.fresh(1, other))

    @rule(along=st.integers(0, 4), seed=SEEDS)
    def commit(self, along, seed):
        """Mostly in time: a drafter that fell behind two commits is lost for that text."""
        if along and self.ids:
            self.propose(self.fresh(1, seed)[0], 1, 0, PLAIN)
        super().commit()

    @rule(num_draft=st.integers(1, 15), right=st.integers(0, 15), seed=SEEDS)
    def a_round(self, num_draft, right, seed):
        """Draft after the token that comes next, read both, keep some."""
        if self.ids:
            token = self.fresh(1, seed)[0]
            draft = self.propose(token, 1, num_draft, PLAIN)
            if draft is not None:
                self.read_these([token, *draft.tokens])
                n = len(draft.tokens) - min(right, len(draft.tokens))
                self.cache.rollback(n)
                self.cut(len(self.ids) - n)

    def propose(self, token, count, num_draft, sampling):
        length, text = len(self.ids), [*self.ids, token]
        right = len(self.made) - bool(self.made and self.made[-1] != text[len(self.made)])
        start, given = min(right, length - 1), length - count
        request = text[given + 1 :], np.stack(self.hidden[given:]), self.cache, num_draft, sampling, U
        if start < min(given, self.cache.drafter._noted.start):
            assert start < self.hidden_from
            before = copied(self.cache)
            with pytest.raises(CacheError, match="must read along"):
                self.drafter.propose(*request)
            assert same_entries(self.cache, before)
            return None
        draft = self.drafter.propose(*request)
        self.made, self.rough = text[1:], self.rough[:start] + [length - start > ROWS] * (length - start)
        expected = self.afresh.draft(token, num_draft, sampling, U)
        assert draft.tokens == expected.tokens
        if draft.q_KV is not None:
            self.agree_roughly(draft.q_KV, expected.q_KV, "laws")
        return draft

    def agree_roughly(self, found, expected, what):
        assert same_bits(found, expected) or any(self.wide) or any(self.rough), what
        assert off(found, expected) <= TOLERANCES[self.dtype], what

    @invariant()
    def has_entries_of_true_tokens_only(self):
        k_GNK, v_GNK, made_with = entries(self.cache)
        assert made_with.tolist() == self.made
        if not self.made:
            return
        fresh = entries(self.afresh.with_entries(self.made[-1]))
        count = min(len(self.made), len(self.ids) - 1)  # one more may be made with a token that is not read yet
        if count > 0 and self.made[count - 1] != self.ids[count]:
            count -= 1
        for found, expected in zip((k_GNK, v_GNK, made_with), fresh):
            if count > 0:
                axis = found.ndim // 2
                self.agree_roughly(found.take(range(count), axis), expected.take(range(count), axis), "entries")


def drafting(**options):
    return type("Variant", (Drafting,), options)


@pytest.mark.parametrize("options", [
    dict(name="dense"),
    dict(name="experts", dtype="float64"),
    dict(name="int4", read_wide=None),
    dict(name="dense", read_wide=None, commit=None, save_and_load=None),
], ids=["dense", "experts", "narrow", "never_committed"])  # fmt: skip
def test_a_drafter_is_as_if_it_had_read_the_accepted_text_afresh(options):
    run(drafting(**options), examples=6)


class KeepsEntries(DrafterKV):
    """Un-reads hidden states, but no entry."""

    def rollback(self, n):
        made_with, length = list(self.made_with), self.kv.length
        super().rollback(n)
        self.made_with, self.kv.length = made_with, length


class KeepsDrafts(DrafterKV):
    """Keeps one entry of a draft."""

    def cut(self, entries):
        super().cut(entries + 1)


class TrustsTheLast(DrafterKV):
    """Does not look with which token the last entry was made."""

    def holding(self, next_token, maker):
        return self.entries


class ForgetsTooMany(DrafterKV):
    """Keeps no hidden state that is committed."""

    def commit(self):
        super().commit()
        _, stop, pieces = self._noted
        self._noted = type(self._noted)(stop, stop, (pieces[0][:0],))


class TurnsHidden(DrafterKV):
    """Gives hidden states in the wrong order."""

    def hidden(self, start, stop):
        return super().hidden(start, stop)[::-1]


@pytest.mark.parametrize("wrong", [KeepsEntries, KeepsDrafts, TrustsTheLast, TurnsHidden])
def test_a_wrong_drafters_memory_is_caught_by_the_same_machine(wrong):
    with pytest.raises((AssertionError, CacheError)):
        run(drafting(drafter_class=wrong), examples=40, phases=[Phase.generate])


def test_hidden_states_that_are_forgotten_are_caught_by_the_same_machine():
    machine = drafting(drafter_class=ForgetsTooMany)()
    machine.read_first(width=3)
    machine.commit(along=0, seed=0)
    with pytest.raises(CacheError, match="are gone"):
        machine.keeps_the_hidden_states_that_a_drafter_may_need()


# A text, however it is divided

GROUPINGS = [[16], [1] * 16, [5, 5, 6], [1, 15], [13, 1, 2]]


def text_of(target, count=17, seed=0):
    return random_ids(count, target.config.vocab_size, seed)


def read_and_draft(target, drafter, text, widths, along=True, given="all", num_draft=4, sampling=PLAIN):
    """Read all but the last token in passes of these widths, and draft after it -> (draft, cache).

    along: the drafter reads after every pass, with a commit, or after the last one alone. given: all tokens that are
    new to it and what is behind them, or "last": the last of them, so that it has to look for the others itself.
    """
    cache, behind, draft = target.new_cache(), [], None
    for i, width in enumerate(widths):
        behind += list(target.forward(text[cache.length :][:width], cache).hidden_TD)
        last = i == len(widths) - 1
        if along or last:
            count = len(behind) if given == "all" else 1
            news = text[cache.length + 1 - count : cache.length + 1]
            request = (num_draft, sampling, U) if last else (0, sampling, ())
            draft = drafter.propose(news, np.stack(behind[-count:]), cache, *request)
            if not last:
                cache.commit()
            behind = []
    return draft, cache


@every_model
@pytest.mark.parametrize("given", ["all", "last"])
@pytest.mark.parametrize("along", [True, False], ids=["along", "at_the_end"])
def test_a_draft_does_not_depend_on_how_the_text_was_divided(name, along, given):
    target, drafter = pair(name)
    text = text_of(target)
    expected = Afresh(target, drafter).read(text[:-1])
    for sampling in (GREEDY, PLAIN):
        draft = expected.draft(text[-1], 4, sampling, U)
        for widths in GROUPINGS:
            found, cache = read_and_draft(target, drafter, text, widths, along, given, sampling=sampling)
            assert same_draft(found, draft) and same_entries(cache, expected.with_entries(text[-1]))


@every_dtype
@pytest.mark.parametrize("name", ["dense", "experts"])
def test_a_draft_after_wide_reading_is_the_same_to_rounding(name, dtype):
    target, drafter = pair(name, dtype)
    text = text_of(target, 101)
    expected = Afresh(target, drafter).read(text[:-1]).draft(text[-1], 4, PLAIN, U)
    for widths in ([100], [30, 70], [16, 40, 16, 1, 27], [50, 1, 49], [4] * 25):
        for along, given in ((True, "all"), (False, "all"), (False, "last")):
            draft, _ = read_and_draft(target, drafter, text, widths, along, given)
            assert draft.tokens == expected.tokens and off(draft.q_KV, expected.q_KV) <= TOLERANCES[dtype]


@every_model
def test_a_draft_depends_on_all_that_was_read(name):
    """Negative control: another first token, and the draft is another."""
    target, drafter = pair(name)
    text = text_of(target)
    draft, _ = read_and_draft(target, drafter, text, [16])
    other, _ = read_and_draft(target, drafter, [(text[0] + 1) % 40, *text[1:]], [16])
    assert off(draft.q_KV, other.q_KV) > 1e-3


@every_model
def test_what_was_drafted_does_not_stay(name):
    target, drafter = pair(name)
    text = text_of(target)
    _, plain = read_and_draft(target, drafter, text, [16], num_draft=0)
    hidden_ND, drafts = Afresh(target).read(text[:-1]).hidden[-1][None], []
    for num_draft in (15, 1, 4, 15):
        draft, cache = read_and_draft(target, drafter, text, [16], num_draft=num_draft)
        assert same_entries(cache, plain) and cache.tokens == plain.tokens
        assert all(map(same_bits, contents(cache).values(), contents(plain).values()))
        again = drafter.propose(text[-1:], hidden_ND, cache, num_draft, PLAIN, U)
        assert same_draft(again, draft) and same_entries(cache, plain)
        drafts.append(draft.tokens)
    assert drafts[1] == drafts[0][:1] and drafts[2] == drafts[0][:4]


@dense_and_experts
@pytest.mark.parametrize("num_draft", [1, 4, 15])
def test_after_any_acceptance_the_entries_are_those_of_the_accepted_text(name, num_draft):
    target, drafter = pair(name)
    text = text_of(target, 9)
    for accepted in range(0, num_draft + 1, max(1, num_draft // 4)):
        draft, cache = read_and_draft(target, drafter, text, [8], num_draft=num_draft)
        out = target.forward([text[-1], *draft.tokens], cache)
        cache.rollback(num_draft - accepted)
        cache.commit()
        news = [*draft.tokens[:accepted], 7]
        found = drafter.propose(news, out.hidden_TD[: accepted + 1], cache, 3, PLAIN, U)
        expected = Afresh(target, drafter).read([*text, *news[:-1]])
        assert same_entries(cache, expected.with_entries(7))
        assert same_draft(found, expected.draft(7, 3, PLAIN, U))


def test_drafts_are_sometimes_right_and_sometimes_wrong():
    for name in MODELS:
        target, drafter = pair(name)
        for sampling in (GREEDY, PLAIN):
            steps = list(generate(target, text_of(target), drafter, sampling=sampling, max_new_tokens=60))
            assert len({step.accepted for step in steps if step.drafted == 4}) >= 3


# Generations left half-way, continued, changed by their caller


def follow(afresh, prompt, steps, sampling=PLAIN, same=same_draft):
    """Check every draft of a generation against a drafter that reads the text so far -> (tokens drafted, the last one).

    The prompt is what comes after that drafter's text; what is emitted is read there too, all but the last token.
    """
    afresh.read(prompt)
    drafted, token = 0, None
    for step in steps:
        if token is not None:
            expected = afresh.draft(token, len(step.draft_uniforms), sampling, step.draft_uniforms)
            assert same(step.draft, expected)
        afresh.read([*([] if token is None else [token]), *step.tokens[:-1]])
        drafted, token = drafted + step.drafted, step.tokens[-1]
    return drafted, token


samplings = pytest.mark.parametrize("sampling", [GREEDY, PLAIN], ids=["greedy", "plain"])


def begin(name, sampling, steps=None, count=30, **options):
    """(target, drafter, its cache, a fresh reader of what that read, the last token) after some steps, not closed."""
    target, drafter = pair(name)
    cache, afresh = target.new_cache(), Afresh(target, drafter)
    prompt = text_of(target, 8)
    generation = generate(target, prompt, drafter, sampling=sampling, max_new_tokens=count, cache=cache, **options)
    _, token = follow(afresh, prompt, islice(generation, steps), sampling)
    assert cache.tokens == afresh.tokens
    return target, drafter, cache, afresh, token


def go_on(target, drafter, cache, afresh, token, sampling, count=12):
    """Continue, and check every draft again -> the tokens."""
    steps = list(generate(target, [token], drafter, sampling=sampling, max_new_tokens=count, cache=cache))
    drafted, _ = follow(afresh, [token], steps, sampling)
    assert drafted and cache.tokens == afresh.tokens
    return emitted(steps)


@every_model
@samplings
def test_every_draft_is_that_of_a_drafter_that_read_the_text_afresh(name, sampling):
    begin(name, sampling, count=60)


@dense_and_experts
@samplings
def test_a_finished_generation_can_be_continued(name, sampling):
    for count in (1, 2, 10, 12):
        go_on(*begin(name, sampling, count=count), sampling)


@pytest.mark.parametrize("name, closed", [("dense", True), ("dense", False), ("experts", True), ("int4", False)])
@samplings
def test_a_generation_left_half_way_can_be_continued(name, sampling, closed):
    """Whatever the number of steps; the first alone is what next() gives."""
    target, drafter = pair(name)
    uninterrupted = emitted(generate(target, text_of(target, 8), drafter, sampling=GREEDY, max_new_tokens=60))
    for count in (1, 3, 7):
        cache, afresh = target.new_cache(), Afresh(target, drafter)
        prompt = text_of(target, 8)
        generation = generate(target, prompt, drafter, sampling=sampling, cache=cache)
        steps = list(islice(generation, count))
        if closed:
            generation.close()
        _, token = follow(afresh, prompt, steps, sampling)
        tokens = emitted(steps) + go_on(target, drafter, cache, afresh, token, sampling)
        assert tokens == uninterrupted[: len(tokens)] or sampling is PLAIN


@dense_and_experts
@samplings
@pytest.mark.parametrize("steps", [1, 3, None])
def test_a_caller_may_replace_the_last_token(name, sampling, steps):
    target, drafter, cache, afresh, token = begin(name, sampling, steps)
    go_on(target, drafter, cache, afresh, (token + 1) % 40, sampling)


@dense_and_experts
@samplings
@pytest.mark.parametrize("steps", [1, 3, None])
def test_a_generation_can_be_saved_loaded_and_continued(name, sampling, steps):
    target, drafter, cache, afresh, token = begin(name, sampling, steps)
    go_on(target, drafter, reloaded(cache, target.new_cache()), afresh, token, sampling)


@dense_and_experts
@samplings
@pytest.mark.parametrize("steps", [1, 4])
def test_a_caller_may_roll_back_and_read_something_else(name, sampling, steps):
    """Entries made with the token at the cut, and after it, are made again where another one is read."""
    for n in (1, 2, 6):
        target, drafter, cache, afresh, token = begin(name, sampling, steps, commit=False)
        n = min(n, cache.length - 1)
        token = (cache.tokens[-n] + 1) % 40
        cache.rollback(n)
        afresh.cut(cache.length)
        go_on(target, drafter, cache, afresh, token, sampling)


@pytest.mark.parametrize("name", ["dense", "int4"])
@samplings
def test_a_text_that_ends_within_a_draft_can_be_continued(name, sampling):
    """The rest of the block is cut, and the drafter's entries with it."""
    target, drafter = pair(name)
    prompt = text_of(target, 8)
    steps = list(generate(target, prompt, drafter, sampling=sampling, max_new_tokens=60))
    texts = [emitted(steps[:i]) for i in range(len(steps))]
    stops = [
        (stop, text) for step, text in zip(steps, texts) for stop in step.tokens[: step.accepted] if stop not in text
    ]
    assert stops
    for stop, text in stops[:4]:
        cache, afresh = target.new_cache(), Afresh(target, drafter)
        short = list(generate(target, prompt, drafter, sampling=sampling, max_new_tokens=60, stop=[stop], cache=cache))
        _, token = follow(afresh, prompt, short, sampling)
        assert token == stop and len(emitted(short)) > len(text)
        go_on(target, drafter, cache, afresh, token, sampling)


@pytest.mark.parametrize("count", [1, 2, 16])
@dense_and_experts
def test_prompts_of_any_narrow_length_and_a_cache_that_fills_up(name, count):
    target, drafter = pair(name)
    cache, afresh, prompt = target.new_cache(capacity=count + 20), Afresh(target, drafter), text_of(target, count)
    steps = list(generate(target, prompt, drafter, sampling=PLAIN, max_new_tokens=99, num_draft=7, cache=cache))
    assert follow(afresh, prompt, steps)[0] and cache.length == cache.capacity and len(emitted(steps)) == 21


def test_drafts_after_a_prompt_of_several_chunks_are_the_same_to_rounding():
    target, drafter = pair("dense", "float64")
    prompt, cache, afresh = text_of(target, 600), target.new_cache(), Afresh(target, drafter)

    def same(a, b):
        return a.tokens == b.tokens and (not a.tokens or off(a.q_KV, b.q_KV) <= TOLERANCES["float64"])

    for start in (prompt, [7]):  # read in chunks; and continued
        steps = list(generate(target, start, drafter, sampling=PLAIN, max_new_tokens=15, cache=cache))
        assert follow(afresh, start, steps, same=same)[0] > 5


@samplings
def test_two_generations_that_take_turns_do_not_disturb_each_other(sampling):
    target, drafter = pair("dense")
    prompts = text_of(target, 8), text_of(target, 11, seed=1)
    generations = [generate(target, prompt, drafter, sampling=sampling, max_new_tokens=30) for prompt in prompts]
    steps = [[], []]
    for i in [0, 1, 1, 0, 0, 0, 1] * 3:
        steps[i] += islice(generations[i], 1)
    for prompt, some in zip(prompts, steps):
        assert follow(Afresh(target, drafter), prompt, some, sampling)[0] > 8


# A drafter that did not read along


def without_drafter(target, text, commits):
    """A cache that has read all but the last token, with commits after so many -> (cache, the last hidden state)."""
    cache = target.new_cache()
    for stop in sorted({*commits, len(text) - 1}):
        hidden_ND = target.forward(text[cache.length : stop], cache).hidden_TD[-1:]
        if stop in commits:
            cache.commit()
    return cache, hidden_ND


@every_model
@pytest.mark.parametrize("commits", [[], [9], [16], [1]], ids=str)
def test_a_drafter_catches_up_within_one_commit(name, commits):
    target, drafter = pair(name)
    text = text_of(target)
    cache, hidden_ND = without_drafter(target, text, commits)
    expected = Afresh(target, drafter).read(text[:-1])
    assert same_draft(drafter.propose(text[-1:], hidden_ND, cache, 4, PLAIN, U), expected.draft(text[-1], 4, PLAIN, U))
    assert same_entries(cache, expected.with_entries(text[-1]))


@every_model
@pytest.mark.parametrize("commits", [[9, 16], [4, 9]], ids=str)
def test_a_drafter_that_lags_too_far_is_told_to_read_along_and_changes_nothing(name, commits, monkeypatch):
    monkeypatch.setattr("minimtp.drafter_kv.BEHIND", 2)
    target, drafter = pair(name)
    text = text_of(target)
    cache, hidden_ND = without_drafter(target, text, commits)
    before, was = copied(cache), cache.drafter.state()
    for _ in range(2):
        with pytest.raises(CacheError, match="must read along .* before 2 more are"):
            drafter.propose(text[-1:], hidden_ND, cache, 4, PLAIN, U)
        assert all(map(same_bits, cache.drafter.state().values(), was.values()))
        assert all(map(same_bits, contents(cache).values(), contents(before).values()))
        assert (cache.tokens, cache.committed) == (before.tokens, before.committed)
    everything = np.stack(Afresh(target).read(text[:-1]).hidden)
    draft = drafter.propose(text[1:], everything, cache, 4, PLAIN, U)  # a caller who kept them can give them all
    assert same_draft(draft, Afresh(target, drafter).read(text[:-1]).draft(text[-1], 4, PLAIN, U))


@every_model
def test_a_commit_of_nothing_forgets_nothing(name):
    target, drafter = pair(name)
    text = text_of(target)
    cache, hidden_ND = without_drafter(target, text, [16])
    for _ in range(5):
        cache.commit()
    drafter.propose(text[-1:], hidden_ND, cache, 0, PLAIN, ())


@every_model
def test_what_was_read_by_itself_within_one_commit_can_be_continued_with_drafts(name):
    target, drafter = pair(name)
    text = text_of(target, 9)
    cache, afresh = target.new_cache(), Afresh(target, drafter).read(text[:-1])
    target.forward(text[:-1], cache)
    cache.commit()
    go_on(target, drafter, cache, afresh, text[-1], PLAIN)


# What cannot be, and what goes wrong on the way


def ready(name="dense", dtype="float32", **options):
    """(target, drafter, a cache of 12 tokens that the drafter read 9 of, the news, what is behind them)."""
    target, drafter = pair(name, dtype, **options)
    text = text_of(target, 13)
    _, cache = read_and_draft(target, drafter, text[:10], [9])
    hidden_ND = target.forward(text[9:12], cache).hidden_TD
    return target, drafter, cache, text[10:], hidden_ND


def state_of(cache):
    """Everything in a cache, as bytes."""
    memory = {**contents(cache), **cache.drafter.state()}
    return cache.tokens[:], cache.committed, {name: array.tobytes() for name, array in memory.items()}


def request(**changes):
    """What propose is given after `ready`, with changes: {argument: function of what it would be}."""
    target, drafter, cache, news, hidden_ND = ready()
    arguments = dict(new_tokens_N=news, hidden_ND=hidden_ND, cache=cache, num_draft=4, sampling=PLAIN, u_K=U)
    return drafter, arguments, arguments | {name: change(arguments[name]) for name, change in changes.items()}


BAD = {
    "no news": dict(new_tokens_N=lambda x: []),
    "no news and no hidden states": dict(new_tokens_N=lambda x: [], hidden_ND=lambda x: x[:0]),
    "no hidden states": dict(hidden_ND=lambda x: x[:0]),
    "a hidden state too few": dict(hidden_ND=lambda x: x[1:]),
    "a hidden state too many": dict(hidden_ND=lambda x: np.concatenate([x, x[:1]])),
    "narrower hidden states": dict(hidden_ND=lambda x: x[:, :-1]),
    "wider hidden states": dict(hidden_ND=lambda x: np.concatenate([x, x], axis=1)),
    "one number each": dict(hidden_ND=lambda x: x[:, 0]),
    "one axis more": dict(hidden_ND=lambda x: x[:, None]),
    "an id beyond the vocabulary": dict(new_tokens_N=lambda x: [*x[:-1], 50]),
    "a negative id": dict(new_tokens_N=lambda x: [*x[:-1], -1]),
    "a fraction": dict(new_tokens_N=lambda x: [*x[:-1], 1.5]),
    "another token than was read": dict(new_tokens_N=lambda x: [(x[0] + 1) % 50, *x[1:]]),
    "a token twice": dict(new_tokens_N=lambda x: [x[0], x[0], x[1]]),
    "more news than were read": dict(
        new_tokens_N=lambda x: [1] * 13, hidden_ND=lambda x: np.resize(x, (13, x.shape[1]))
    ),
    "too few uniforms": dict(u_K=lambda x: x[:3]),
    "no uniforms": dict(u_K=lambda x: ()),
    "a negative number of drafts": dict(num_draft=lambda x: -1),
    "half a draft": dict(num_draft=lambda x: 2.5),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_and_change_nothing(case):
    drafter, right, wrong = request(**BAD[case])
    before = state_of(right["cache"])
    with pytest.raises((ValueError, TypeError)):
        drafter.propose(**wrong)
    assert state_of(right["cache"]) == before
    assert same_draft(drafter.propose(**right), ready_draft())


def ready_draft(name="dense"):
    """What is drafted where nothing goes wrong."""
    target, drafter, cache, news, hidden_ND = ready(name)
    text = text_of(target, 13)
    draft = drafter.propose(news, hidden_ND, cache, 4, PLAIN, U)
    assert same_draft(draft, Afresh(target, drafter).read(text[:-1]).draft(text[-1], 4, PLAIN, U))
    return draft


def test_news_from_before_a_rollback_are_refused():
    target, drafter, cache, news, hidden_ND = ready()
    cache.rollback(1)
    before = state_of(cache)
    with pytest.raises(ValueError, match="3 new tokens do not continue the 11 tokens"):
        drafter.propose(news, hidden_ND, cache, 4, PLAIN, U)
    assert state_of(cache) == before
    drafter.propose(news[:-1], hidden_ND[:-1], cache, 4, PLAIN, U)


def test_nothing_can_be_drafted_before_anything_is_read():
    target, drafter = pair("dense")
    with pytest.raises(ValueError, match="do not continue the 0 tokens"):
        drafter.propose([1], np.zeros((1, 32), np.float32), target.new_cache(), 2, PLAIN, U)


def test_a_token_that_stands_for_an_image_is_no_news():
    target, drafter, cache, news, hidden_ND = ready()
    never = {news[-1]: "an image"}
    target, config = (replace(one, config=replace(one.config, placeholders=never)) for one in (target, drafter))
    drafter = replace(config, target=target)
    before = state_of(cache)
    with pytest.raises(ValueError, match=f"token {news[-1]} stands for an image"):
        drafter.propose(news, hidden_ND, cache, 4, PLAIN, U)
    assert state_of(cache) == before


@pytest.mark.parametrize("other", ["other weights", "float64", "gemma"])
def test_the_cache_of_another_model_is_refused(other, tmp_path):
    drafter, right, _ = request()
    if other == "other weights":
        target = minimtp.load(write("dense", tmp_path / "other", gain=0.6))
    else:
        target = gemma_pair("window_4")[0] if other == "gemma" else pair("dense", "float64")[0]
    cache = target.new_cache()
    target.forward(right["cache"].tokens, cache)
    with pytest.raises((CacheError, ValueError), match="model|cache"):
        drafter.propose(**right | {"cache": cache})


@pytest.mark.parametrize("value", ["middle", None, "pre_norm", ""])
def test_an_unknown_option_is_refused(value):
    target, _ = pair("dense")
    with pytest.raises(ValueError, match="hidden is .*, expected one of post-norm, pre-norm"):
        minimtp.load_drafter("auto", target, hidden=value)


FAILURES = {  # what fails, after how many calls; the layer reads along, and then each draft but the last
    "before anything is read": ("minimtp.qwen35_mtp.rms_norm", 0),
    "reading along": ("minimtp.qwen35.feed_forward", 0),
    "after reading along": ("minimtp.qwen35.final_norm", 0),
    "at the first head": ("minimtp.qwen35.head", 0),
    "reading the first draft": ("minimtp.qwen35.feed_forward", 1),
    "reading the third draft": ("minimtp.qwen35.feed_forward", 3),
    "at the last head": ("minimtp.qwen35.head", 3),
    "choosing": ("minimtp.drafting.draw", 2),
}


@dense_and_experts
@pytest.mark.parametrize("failure, error", list(zip(FAILURES, cycle((KeyboardInterrupt, MemoryError)))))
def test_a_draft_that_fails_half_way_leaves_a_cache_that_can_be_used(name, failure, error, monkeypatch):
    target, drafter, cache, news, hidden_ND = ready(name)
    path, after = FAILURES[failure]
    module, function = path.rsplit(".", 1)
    real = getattr(import_module(module), function)
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(path, failing(real, error, after=after))
            drafter.propose(news, hidden_ND, cache, 4, PLAIN, U)
        check_entries(target, drafter, cache)
    for one in (reloaded(cache, target.new_cache()), cache):
        assert same_draft(drafter.propose(news, hidden_ND, one, 4, PLAIN, U), ready_draft(name))


def check_entries(target, drafter, cache):
    """There may be fewer entries than there were: but those there are belong to the text."""
    count, expected = len(entries(cache)[2]), Afresh(target, drafter).read(cache.tokens).caches[-1]
    for axis, found, all_of_them in zip((1, 1, 0), entries(cache), entries(expected)):
        some = min(count, all_of_them.shape[axis])
        assert same_bits(found.take(range(some), axis), all_of_them.take(range(some), axis))


@dense_and_experts
@pytest.mark.parametrize("failure", FAILURES)
def test_a_generation_that_fails_while_drafting_can_be_continued(name, failure, monkeypatch):
    target, drafter = pair(name)
    prompt, cache, afresh = text_of(target, 8), target.new_cache(), Afresh(target, drafter)
    generation = generate(target, prompt, drafter, sampling=PLAIN, cache=cache)
    _, token = follow(afresh, prompt, islice(generation, 3))
    path, after = FAILURES[failure]
    module, function = path.rsplit(".", 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(path, failing(getattr(import_module(module), function), KeyboardInterrupt, after=after))
        next(generation)
    assert cache.tokens == afresh.tokens
    check_entries(target, drafter, cache)
    go_on(target, drafter, cache, afresh, token, PLAIN)


def test_a_generation_that_fails_in_the_target_can_be_continued(monkeypatch):
    target, drafter = pair("dense")
    for steps in (1, 3):
        for w in target.params.layers:
            prompt, cache, afresh = text_of(target, 8), target.new_cache(), Afresh(target, drafter)
            generation = generate(target, prompt, drafter, sampling=PLAIN, cache=cache)
            _, token = follow(afresh, prompt, islice(generation, steps))
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(qwen35, "feed_forward", failing(qwen35.feed_forward, KeyboardInterrupt, w))
                next(generation)
            assert cache.tokens == afresh.tokens
            go_on(target, drafter, cache, afresh, token, PLAIN)


# Hidden states before the norm


def by_hand(target, drafter, text, behind_ND, num_draft):
    """The laws of drafts by argmax, from nothing but these hidden states -> (tokens, laws [K, V])."""
    kv = FullKV(target.config.attention.kv_heads, target.config.attention.head_dim, target.dtype)

    def read(tokens_N, hidden_ND):
        positions_N = np.arange(kv.length, kv.length + len(tokens_N))
        return qwen35_mtp.read(drafter.params, drafter.config, target.embed, kv, tokens_N, hidden_ND, positions_N)[0]

    out_ND, tokens, laws = read(text[1:], behind_ND), [], []
    for _ in range(num_draft):
        if tokens:
            out_ND = read(tokens[-1:], out_ND[-1:])
        laws.append(PLAIN.law(qwen35_mtp.logits(target.params, drafter.config, out_ND[-1:])[0][0]))
        tokens.append(int(laws[-1].argmax()))
    return tokens, np.stack(laws)


def middle_of(tokens, laws):
    """Uniforms that draw these tokens."""
    return [law_V[:token].sum() + law_V[token] / 2 for token, law_V in zip(tokens, laws)]


@dense_and_experts
@pytest.mark.parametrize("widths", GROUPINGS, ids=str)
@pytest.mark.parametrize("hidden", ["post-norm", "pre-norm"])
def test_drafts_are_those_of_the_hidden_states_asked_for(name, widths, hidden):
    target, drafter = pair(name, hidden=hidden)
    text = text_of(target)
    afresh = Afresh(target).read(text[:-1])
    behind_ND = np.stack(afresh.hidden if hidden == "post-norm" else afresh.before)
    tokens, laws = by_hand(target, drafter, text, behind_ND, 4)
    for along, given in ((True, "all"), (False, "all"), (False, "last")):
        options = dict(along=along, given=given)
        draft, _ = read_and_draft(target, drafter, text, widths, sampling=GREEDY, **options)
        assert list(draft.tokens) == tokens
        drafter_u = middle_of(tokens, laws)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("test_qwen_drafting.U", drafter_u)
            draft, _ = read_and_draft(target, drafter, text, widths, **options)
        assert list(draft.tokens) == tokens and same_bits(draft.q_KV, laws)


@every_model
def test_hidden_states_before_the_norm_give_other_drafts(name):
    target, after = pair(name)
    before = pair(name, hidden="pre-norm")[1]
    for seed in range(5):
        text = text_of(target, seed=seed)
        laws = [read_and_draft(target, drafter, text, [16])[0].q_KV for drafter in (after, before)]
        assert off(laws[1][0], laws[0][0]) > 1e-3


@every_model
def test_after_the_norm_is_the_default(name):
    target, drafter = pair(name)
    assert drafter.hidden == "post-norm" and pair(name, hidden="post-norm")[1].hidden == "post-norm"


@samplings
def test_generations_with_hidden_states_before_the_norm_can_be_followed_too(sampling):
    target, drafter = pair("experts", hidden="pre-norm")
    prompt = text_of(target, 8)
    steps = generate(target, prompt, drafter, sampling=sampling, max_new_tokens=40)
    assert follow(Afresh(target, drafter), prompt, steps, sampling)[0] > 10


# Which checkpoints have a drafter


def forward(target):
    return target.forward(list(range(20)), target.new_cache()).logits_TV


MTP = {  # name -> shape, of the dense model
    "fc.weight": (32, 64),
    "norm.weight": (32,),
    "pre_fc_norm_embedding.weight": (32,),
    "pre_fc_norm_hidden.weight": (32,),
    "layers.0.input_layernorm.weight": (32,),
    "layers.0.post_attention_layernorm.weight": (32,),
    "layers.0.self_attn.q_proj.weight": (64, 32),
    "layers.0.self_attn.k_proj.weight": (16, 32),
    "layers.0.self_attn.v_proj.weight": (16, 32),
    "layers.0.self_attn.o_proj.weight": (32, 32),
    "layers.0.self_attn.q_norm.weight": (8,),
    "layers.0.self_attn.k_norm.weight": (8,),
    "layers.0.mlp.gate_proj.weight": (48, 32),
    "layers.0.mlp.up_proj.weight": (48, 32),
    "layers.0.mlp.down_proj.weight": (32, 48),
}
every_mtp_tensor = pytest.mark.parametrize("name", MTP)


@pytest.fixture
def dense(tmp_path):
    return write("dense", tmp_path / "dense")


def check_refused(folder, message):
    """No drafter, and why; the target alone is the same as ever."""
    target = minimtp.load(folder)
    assert same_bits(forward(target), forward(pair("dense")[0]))
    for path in ("auto", folder):
        with pytest.raises(CheckpointError, match=message) as caught:
            minimtp.load_drafter(path, target)
        assert len(str(caught.value).splitlines()) == 1


def test_these_are_the_tensors_of_the_layer(dense):
    shapes = {}
    edit_tensors(dense, lambda tensors: shapes.update((name, bits.shape) for name, (_, bits) in tensors.items()))
    assert {name: shape for name, shape in shapes.items() if name.startswith("mtp.")} == {
        f"mtp.{name}": shape for name, shape in MTP.items()
    }


def test_without_the_tensors_there_is_no_drafter(dense):
    def change(tensors):
        for name in MTP:
            del tensors[f"mtp.{name}"]

    edit_tensors(dense, change)
    check_refused(dense, r"no mtp\.\* tensors")
    assert not minimtp.load(dense).has_mtp


@pytest.mark.parametrize("count", [0, 1])
def test_tensors_and_not_the_configuration_say_whether_there_is_a_drafter(dense, count):
    without = write("dense", dense.parent / "without", mtp=False, mtp_num_hidden_layers=1 - count)
    edit_json(dense, "mtp_num_hidden_layers", count)
    target = minimtp.load(dense)
    text = text_of(target)
    found = read_and_draft(target, minimtp.load_drafter("auto", target), text, [16])[0]
    assert same_draft(found, read_and_draft(*pair("dense"), text, [16])[0])
    with pytest.raises(CheckpointError, match=r"no mtp\.\* tensors"):
        minimtp.load_drafter("auto", minimtp.load(without))


@every_mtp_tensor
def test_a_missing_tensor_is_named(dense, name):
    edit_tensors(dense, lambda tensors: tensors.pop(f"mtp.{name}"))
    check_refused(dense, f"mtp.{name}.* is missing")


@every_mtp_tensor
@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: np.stack([x, x])], ids=["shorter", "one_axis_more"])
def test_a_misshapen_tensor_is_named(dense, name, change):
    def edit(tensors):
        dtype, bits = tensors[f"mtp.{name}"]
        tensors[f"mtp.{name}"] = dtype, change(bits).copy()

    edit_tensors(dense, edit)
    check_refused(dense, f"mtp.{name}.* is .*, expected {re.escape(str(list(MTP[name])))}")


@pytest.mark.parametrize("name", [
    "mtp.more.weight", "mtp.layers.1.norm.weight", "mtp.fc.bias", "mtp.embed_tokens.weight",
    "mtp.layers.0.self_attn.q_proj.bias", "mtp.fc.weight_scale",
])  # fmt: skip
def test_an_unknown_tensor_is_named(dense, name):
    edit_tensors(dense, lambda tensors: tensors.update({name: tensors["mtp.norm.weight"]}))
    check_refused(dense, re.escape(name))


@every_mtp_tensor
def test_a_tensor_of_no_numbers_is_named(dense, name):
    def change(tensors):
        dtype, bits = tensors[f"mtp.{name}"]
        bits = bits.copy()
        bits.flat[0] = np.nan
        tensors[f"mtp.{name}"] = dtype, bits

    edit_tensors(dense, change)
    check_refused(dense, f"mtp.{name}")


@pytest.mark.parametrize("name, value, message", [
    ("mtp_num_hidden_layers", 2, "mtp_num_hidden_layers 2 is not supported"),
    ("mtp_num_hidden_layers", 48, "mtp_num_hidden_layers 48 is not supported"),
    ("mtp_use_dedicated_embeddings", True, "mtp_use_dedicated_embeddings is not supported"),
])  # fmt: skip
@pytest.mark.parametrize("layout", ["bare", "nested"])
def test_a_layer_that_is_not_supported_is_refused_and_the_target_is_not(tmp_path, layout, name, value, message):
    folder = write("dense", tmp_path / "changed", layout=layout, **{name: value})
    check_refused(folder, message)


OTHERS = {
    "another width of the layer": dict(intermediate_size=40),
    "another head": dict(num_attention_heads=2),
    "another position": dict(rope_parameters=rope(1e4, 0.5)),
    "another eps": dict(rms_norm_eps=1e-5),
    "another width": dict(hidden_size=40),
    "another vocabulary": dict(vocab_size=51),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_layer_of_another_configuration_is_refused(tmp_path, case):
    other = write("dense", tmp_path / "other", **OTHERS[case])
    target, _ = pair("dense")
    with pytest.raises(CheckpointError, match="drafter does not fit its target"):
        minimtp.load_drafter(other, target)
    minimtp.load_drafter(other, minimtp.load(other))


def test_a_drafter_of_another_family_is_refused():
    qwen, gemma = pair("dense")[0], gemma_pair("window_4")[0]
    for path, target in ((gemma.folder.with_name("assistant"), qwen), (qwen.folder, gemma), (gemma.folder, qwen)):
        with pytest.raises(CheckpointError, match="does not fit|is not a drafter"):
            minimtp.load_drafter(path, target)


def test_a_layer_of_the_same_configuration_may_come_from_elsewhere(tmp_path):
    target, drafter = pair("dense")
    elsewhere = minimtp.load_drafter(write("dense", tmp_path / "copy"), target)
    text = text_of(target)
    assert same_draft(*(read_and_draft(target, one, text, [16])[0] for one in (drafter, elsewhere)))


@every_model
def test_packed_and_dense_layers_draft_the_same(name):
    text = text_of(pair(name)[0])
    drafts = [read_and_draft(*pair(name, keep=keep), text, [16])[0] for keep in ("packed", "dense")]
    assert same_draft(*drafts)
