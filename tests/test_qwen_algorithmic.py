"""Losslessness of Qwen 3.5 with its MTP layer, level two: as test_algorithmic, with a state that cannot be trimmed.

Greedy output with drafts is greedy output: every token, every bit of every logits row, and every bit of what the layers
then remember. At temperature 1 every verdict follows from laws and uniforms, which are computed and applied afresh.
"""

from dataclasses import replace
from functools import cache
from importlib import import_module

import numpy as np
import pytest
from test_000_rows import qwen, remembered
from tiny import Recorded, emitted, random_ids, random_prompt, same_bits

import minimtp
from minimtp import PromptLookup, Sampling, Scripted, exact_law, generate
from minimtp.delta_state import DeltaState
from minimtp.drafter_kv import DrafterKV
from minimtp.kv import FullKV

MODELS = ("three_to_one", "int4", "moe", "moe_int4")
FEW = ("three_to_one", "moe_int4")
OTHERS = ("dense", "kernel_3", "moe_single", "moe_one_expert")
PROMPTS = (1, 3, 25, 70)  # tokens: one, a narrow pass, a wide one, more than one block of the chunked rule
COUNT = 30
DEPTHS = random_ids(600, 5040)  # for drafts that are wrong at depths that follow no pattern
GREEDY, PLAIN, FILTERED = Sampling(temperature=0.0), Sampling(), Sampling(temperature=0.8, top_k=20, top_p=0.95)
dense_and_experts = pytest.mark.parametrize("name", FEW)


@cache
def mtp(name, dtype="float32", keep="auto"):
    """The MTP layer of a model."""
    return minimtp.load_drafter("auto", qwen(name, dtype, keep), keep)


@cache
def reference(name, length, count=COUNT, dtype="float32"):
    """(prompt, its greedy continuation, the logits rows behind that, what the layers then remember).

    One token a pass; nothing is committed or un-read.
    """
    target = qwen(name, dtype)
    prompt, kv, tokens, rows = random_prompt(target, length, seed=length), target.new_cache(), [], []
    unread = prompt
    for _ in range(count):
        rows.append(target.forward(unread, kv, last=1).logits_TV[0])
        tokens.append(int(rows[-1].argmax()))
        unread = tokens[-1:]
    return prompt, tokens, np.stack(rows), remembered(kv)


def speculate(
    name, drafter, k, length, count=COUNT, dtype="float32", keep="auto", capacity=None, faulty=None, **options
):
    """Generate with drafts; check tokens, rows and memories, all to the bit, against the reference -> (steps, cache).

    faulty: what to do to the new cache first.
    """
    prompt, tokens, rows, expected = reference(name, length, count, dtype)
    target = Recorded(qwen(name, dtype, keep))
    kv = target.new_cache(capacity)
    if faulty:
        faulty(kv)
    steps = list(generate(target, prompt, drafter, num_draft=k, max_new_tokens=count, cache=kv, **options))
    assert emitted(steps) == tokens and kv.tokens == prompt + tokens[:-1]
    assert same_bits([target.rows[length - 1 + i] for i in range(count)], rows)
    assert all(map(same_bits, remembered(kv), expected))
    return steps, kv


def script(name, length, wrong_at, count=COUNT):
    """Drafts the greedy continuation, but for one wrong token at depth wrong_at(position) (None: all right)."""
    prompt, tokens, *_ = reference(name, length, count)
    text, vocab_size = prompt + tokens, qwen(name).config.vocab_size

    def propose(position, most):
        draft, depth = text[position : position + most], wrong_at(position)
        if depth is not None and depth < len(draft):
            draft[depth] = (draft[depth] + 1) % vocab_size
        return draft

    return Scripted(propose)


def changing_depths(name, length, k, count=COUNT):
    return script(name, length, lambda position: DEPTHS[position] % (k + 1), count)


def acceptance(steps):
    """(accepted, drafted) of the rounds that drafted"""
    return [(step.accepted, step.drafted) for step in steps if step.drafted]


def partly_accepted(steps):
    accepted, drafted = np.sum(acceptance(steps), axis=0)
    return 0 < accepted < drafted


# The MTP layer


@pytest.mark.parametrize(
    "name, k", [*((name, k) for name in ("int4", *FEW) for k in range(1, 6)), ("moe", 2), ("moe", 5)]
)
def test_drafts_of_the_mtp_layer(name, k):
    length = PROMPTS[(k + MODELS.index(name)) % len(PROMPTS)]  # of five k all prompts have their turn
    assert partly_accepted(speculate(name, mtp(name), k, length)[0])


@pytest.mark.parametrize("name", OTHERS)
def test_drafts_of_the_mtp_layers_of_other_models(name):
    assert partly_accepted(speculate(name, mtp(name), 4, 70)[0])


@pytest.mark.parametrize("name, length", [("three_to_one", 1), ("int4", 70), ("moe", 3), ("moe_int4", 25)])
def test_in_double(name, length):
    assert partly_accepted(speculate(name, mtp(name, "float64"), 5, length, dtype="float64")[0])


@pytest.mark.parametrize("name, length", [("int4", 25), ("moe_int4", 3), ("dense", 70)])
def test_packed_weights_give_the_bits_of_dense_ones(name, length):
    stored, unpacked = (qwen(name, "float32", keep).params.layers[0].in_proj_qkv for keep in ("packed", "dense"))
    assert not isinstance(stored, np.ndarray) and isinstance(unpacked, np.ndarray)
    packed, _ = speculate(name, mtp(name, "float32", "packed"), 4, length, keep="packed")
    dense, _ = speculate(name, mtp(name, "float32", "dense"), 4, length)
    assert [step.draft.tokens for step in packed] == [step.draft.tokens for step in dense] and partly_accepted(packed)


@cache
def read_along(name, length, count=COUNT):
    """The drafter's entries where it read the prompt and then one token at a time, drafting nothing -> arrays."""
    prompt, tokens, *_ = reference(name, length, count)
    target, kv = qwen(name), qwen(name).new_cache()
    unread = prompt
    for token in tokens:
        out = target.forward(unread, kv, last=0)
        mtp(name).propose([*unread[1:], token], out.hidden_TD, kv, 0, GREEDY, ())
        unread = [token]
    return entries(kv)


def entries(kv):
    state = kv.drafter.state()
    return [state[name] for name in ("k", "v", "made_with")]


@pytest.mark.parametrize("k", [2, 5])
@dense_and_experts
def test_the_drafter_keeps_only_what_it_read(name, k):
    """No entry is left that was made from a drafted hidden state, to the bit."""
    steps, kv = speculate(name, mtp(name), k, 25)
    assert partly_accepted(steps)
    assert all(map(same_bits, entries(kv), read_along(name, 25)))


@pytest.mark.parametrize("width", [1, 7, 16])
def test_prompts_in_narrow_chunks_are_prompts_token_by_token(width, monkeypatch):
    monkeypatch.setattr(import_module("minimtp.generate"), "CHUNK", width)
    target = Recorded(qwen("int4"))
    prompt, kv, single = random_prompt(target, 25), target.new_cache(), target.new_cache()
    tokens = emitted(generate(target, prompt, mtp("int4"), max_new_tokens=20, cache=kv))
    assert [len(out.hidden_TD) for out in target.passes[: 25 // width]] == [width] * (25 // width)
    rows = [qwen("int4").forward([token], single).logits_TV[0] for token in prompt + tokens[:-1]][len(prompt) - 1 :]
    assert same_bits([target.rows[len(prompt) - 1 + i] for i in range(20)], rows)
    assert all(map(same_bits, remembered(kv), remembered(single)))


# Scripted drafts


@pytest.mark.parametrize("wrong_at", [None, *range(5)])
@dense_and_experts
def test_drafts_that_are_wrong_at_each_depth(name, wrong_at):
    steps, _ = speculate(name, script(name, 3, lambda position: wrong_at), 5, 3)
    assert acceptance(steps) == [(n if wrong_at is None else min(wrong_at, n), n) for _, n in acceptance(steps)]


@pytest.mark.parametrize("name, k", [*((name, 4) for name in MODELS), *((name, k) for name in FEW for k in (1, 15))])
def test_drafts_that_are_wrong_at_changing_depths(name, k):
    steps, _ = speculate(name, changing_depths(name, 25, k, 50), k, 25, 50)
    assert partly_accepted(steps) and len({accepted for accepted, _ in acceptance(steps)}) > min(k, 3)


@dense_and_experts
def test_fifteen_drafts_all_right_and_all_wrong(name):
    steps, _ = speculate(name, script(name, 70, lambda position: None), 15, 70)
    assert acceptance(steps) == [(15, 15), (COUNT - 18, COUNT - 18)]
    steps, _ = speculate(name, script(name, 1, lambda position: 0), 15, 1)
    assert {accepted for accepted, _ in acceptance(steps)} == {0}


def test_prompt_lookup():
    assert partly_accepted(speculate("moe_int4", PromptLookup(), 5, 70, 50)[0])


# Other rules and caches


@pytest.mark.parametrize("rule", ["greedy", "match", "rejection"])
@dense_and_experts
def test_every_rule_is_greedy_at_temperature_0(name, rule):
    assert partly_accepted(speculate(name, mtp(name), 4, 3, rule=rule)[0])
    assert partly_accepted(speculate(name, changing_depths(name, 3, 4), 4, 3, rule=rule)[0])


@pytest.mark.parametrize("name, length", [*(("three_to_one", length) for length in PROMPTS), ("moe_int4", 3)])
def test_in_a_cache_of_just_the_size(name, length):
    steps, kv = speculate(name, mtp(name), 5, length, capacity=length + COUNT - 1)
    assert kv.length == kv.capacity and partly_accepted(steps)


@pytest.mark.parametrize("wanted", range(10, 16))
def test_a_stop_token_inside_a_draft_cuts_the_block(wanted):
    """The stop token is the last emitted; what was accepted behind it is un-read like what was rejected."""
    name, length = "three_to_one", 3
    prompt, tokens, *_ = reference(name, length)
    count = tokens.index(tokens[wanted]) + 1
    target, right = qwen(name), script(name, length, lambda position: None)
    kv = target.new_cache()
    steps = list(generate(target, prompt, right, num_draft=5, max_new_tokens=COUNT, stop=[tokens[wanted]], cache=kv))
    assert emitted(steps) == tokens[:count] and kv.tokens == prompt + tokens[: count - 1]
    assert all(map(same_bits, remembered(kv), reference(name, length, count)[3]))


@pytest.mark.parametrize("name, length", [("three_to_one", 3), ("three_to_one", 70), ("moe_int4", 25)])
def test_what_was_never_committed_can_be_generated_again(name, length):
    """From the prompt's end, and from the middle: over more tokens than lie between two states that are kept."""
    count = 70
    prompt, tokens, rows, expected = reference(name, length, count)
    steps, kv = speculate(name, mtp(name), 4, length, count, commit=False)
    assert kv.committed == 0 and partly_accepted(steps)
    for kept in (count // 2, 0):
        kv.rollback(kv.length - length - kept)
        assert kv.tokens == prompt + tokens[:kept]
        target = Recorded(qwen(name))
        options = dict(num_draft=4, max_new_tokens=count - kept - 1, cache=kv, commit=False)
        steps = list(generate(target, [tokens[kept]], mtp(name), **options))
        assert emitted(steps) == tokens[kept + 1 :] and partly_accepted(steps)
        assert same_bits([target.rows[length + i] for i in range(kept, count - 1)], rows[kept + 1 :])
        assert all(map(same_bits, remembered(kv), expected))


@dense_and_experts
def test_a_cache_that_goes_on_is_one_generation(name):
    prompt, tokens, _, expected = reference(name, 25)
    target, kv = qwen(name), qwen(name).new_cache()
    first = emitted(generate(target, prompt, mtp(name), max_new_tokens=17, cache=kv))
    rest = emitted(generate(target, first[-1:], mtp(name), num_draft=2, max_new_tokens=COUNT - 17, cache=kv))
    assert first + rest == tokens and all(map(same_bits, remembered(kv), expected))


# At temperature 1

SAMPLINGS = {  # rule, how the target samples, how the drafter does, drafts a round
    "drawn drafts": ("rejection", PLAIN, PLAIN, 4),
    "drawn at another temperature": ("rejection", PLAIN, Sampling(temperature=0.5), 3),
    "argmax drafts": ("rejection", PLAIN, GREEDY, 4),
    "filtered": ("rejection", FILTERED, FILTERED, 5),
    "match, drawn": ("match", PLAIN, PLAIN, 3),
    "match, argmax": ("match", PLAIN, GREEDY, 3),
}


def pick(law_V, u):
    """By inverse CDF: the first token with u below the sum of the law up to it."""
    total, below = law_V.sum(), 0.0
    for token, p in enumerate(law_V.tolist()):
        below += p
        if p and u < below / total:
            return token
    return int(np.flatnonzero(law_V)[-1])


def rejection(p_JV, draft, u_J):
    """(accepted, token) by the rule as published."""
    for j, token in enumerate(draft.tokens):
        q_V = np.eye(p_JV.shape[1])[token] if draft.q_KV is None else draft.q_KV[j]
        if u_J[j] >= p_JV[j, token] / q_V[token]:
            return j, pick(np.maximum(p_JV[j] - q_V, 0), u_J[-1])
    return len(draft.tokens), pick(p_JV[len(draft.tokens)], u_J[-1])


def match(p_JV, draft, u_J):
    for j, token in enumerate(draft.tokens):
        if pick(p_JV[j], u_J[j]) != token:
            return j, pick(p_JV[j], u_J[j])
    return len(draft.tokens), pick(p_JV[len(draft.tokens)], u_J[-1])


@cache
def sampled(name, case, length=25, seed=0, faulty=None):
    """(steps, prompt, logits rows by position) of a run with the MTP layer."""
    rule, sampling, draft_sampling, k = SAMPLINGS[case]
    target = Recorded(qwen(name))
    prompt, kv = random_prompt(target, length, seed=length), target.new_cache()
    if faulty:
        faulty(kv)
    options = dict(num_draft=k, rule=rule, sampling=sampling, draft_sampling=draft_sampling, max_new_tokens=COUNT)
    return list(generate(target, prompt, mtp(name), seed=seed, cache=kv, **options)), prompt, target.rows


def check_replay(name, case, steps, prompt, recorded, read_as=None):
    """Read the text that came out token by token, the drafter along with it; every draft and verdict must follow.

    read_as: the sampling to compute the target's laws with instead.
    """
    rule, sampling, draft_sampling, _ = SAMPLINGS[case]
    verdict, law = {"rejection": rejection, "match": match}[rule], (read_as or sampling).law
    target, kv = qwen(name), qwen(name).new_cache()
    unread, news, behind_ND = prompt, [], None
    for step in steps:
        if step.drafted:
            check_draft(mtp(name).propose(news, behind_ND, kv, step.drafted, draft_sampling, step.draft_uniforms), step)
        rows = []
        for token in step.tokens:
            if rows:
                mtp(name).propose(news, behind_ND, kv, 0, draft_sampling, ())
            out = target.forward(unread, kv, last=1)
            rows.append(out.logits_TV[0])
            assert same_bits(rows[-1], recorded[kv.length - 1])
            unread, news, behind_ND = [token], [*unread[1:], token], out.hidden_TD
        assert verdict(law(np.stack(rows)), step.draft, step.uniforms) == (step.verdict.accepted, step.verdict.token)
        assert step.tokens == (*step.draft.tokens[: step.verdict.accepted], step.verdict.token)


def check_draft(again, step):
    """The draft is what the drafter makes of the text alone, with its law, and it was drawn from that."""
    assert again.tokens == step.draft.tokens
    if again.q_KV is None or step.draft.q_KV is None:
        assert again.q_KV is step.draft.q_KV
        return
    assert same_bits(again.q_KV, step.draft.q_KV)
    assert [pick(q_V, u) for q_V, u in zip(again.q_KV, step.draft_uniforms, strict=True)] == list(again.tokens)


@pytest.mark.parametrize("case", SAMPLINGS)
@dense_and_experts
def test_sampling_with_drafts_follows_from_laws_and_uniforms(name, case):
    run = sampled(name, case)
    assert partly_accepted(run[0]) and len(emitted(run[0])) == COUNT
    check_replay(name, case, *run)


@pytest.mark.parametrize("name, length", [("int4", 1), ("moe", 3), ("int4", 70)])
def test_sampling_after_other_prompts(name, length):
    run = sampled(name, "drawn drafts", length)
    assert partly_accepted(run[0])
    check_replay(name, "drawn drafts", *run)


@dense_and_experts
def test_the_law_of_what_is_emitted_is_the_targets(name):
    """Summed over all drafts that the recorded laws could have made, and over all their fates."""
    steps, prompt, recorded = sampled(name, "drawn drafts")
    position, far = len(prompt) - 1, 0.0
    for step in steps:
        for j in range(min(step.verdict.accepted + 1, step.drafted)):
            p_V, q_V = PLAIN.law(recorded[position + j]), step.draft.q_KV[j]
            assert np.abs(exact_law("rejection", p_V, q_V) - p_V).max() < 1e-12
            far = max(far, np.abs(p_V - q_V).sum() / 2)
        position += len(step.tokens)
    assert far > 0.3  # or any rule would do


@pytest.mark.parametrize("case", SAMPLINGS)
def test_corrections_and_bonus_tokens_both_come_up(case):
    rounds = [pair for name in FEW for pair in acceptance(sampled(name, case)[0])]
    assert {accepted == drafted for accepted, drafted in rounds} == {True, False}


def test_a_seed_replays_a_run_and_another_does_not():
    first, again, other = (emitted(sampled.__wrapped__("int4", "drawn drafts", seed=seed)[0]) for seed in (1, 1, 2))
    assert first == again != other


# What must not pass


class KeepsState(DeltaState):
    """Un-reads all but the recurrent state."""

    def rollback(self, n):
        state_HKV = self.state_HKV
        super().rollback(n)
        self._readings[-1] = replace(self._readings[-1], after_HKV=state_HKV)


class KeepsWindow(DeltaState):
    """Un-reads all but the inputs of the convolution."""

    def rollback(self, n):
        window_WC = self.window()
        super().rollback(n)
        if n:
            self._readings[-1] = replace(self._readings[-1], conv_TC=window_WC)


class ForgetsWindow(DeltaState):
    """After un-reading the convolution begins afresh."""

    def rollback(self, n):
        super().rollback(n)
        if n:
            self._readings[-1] = replace(self._readings[-1], conv_TC=0 * self.window())


class RightToRounding(DeltaState):
    """Un-reads to a state that is off by a unit in the last place."""

    def rollback(self, n):
        super().rollback(n)
        if n:
            state_HKV = np.nextafter(self.state_HKV, np.float32(np.inf))
            self._readings[-1] = replace(self._readings[-1], after_HKV=state_HKV)


class KeepsKeys(FullKV):
    """Un-reads nothing."""

    def rollback(self, n):
        pass


class Overwritten(FullKV):
    """The first entry un-read has overwritten the last that stands."""

    def rollback(self, n):
        super().rollback(n)
        if n:
            self.buffers["k"][:, self.length - 1] = self.buffers["k"][:, self.length]


FAULTY = (KeepsState, KeepsWindow, ForgetsWindow, RightToRounding, KeepsKeys, Overwritten)


def with_one(kind, name):
    """What puts one memory of that kind into a cache, into the last layer that can have it."""

    def change(kv):
        right = DeltaState if issubclass(kind, DeltaState) else FullKV
        i = max(i for i, memory in enumerate(kv.layers) if isinstance(memory, right))
        layer = qwen(name).config.layers[i]
        kv.layers[i] = kind(*kv.layers[i].sizes) if right is DeltaState else kind(layer.kv_heads, layer.head_dim)

    return change


@pytest.mark.parametrize("kind", [DeltaState, FullKV])
@dense_and_experts
def test_the_memories_themselves_pass(name, kind):
    speculate(name, changing_depths(name, 25, 4), 4, 25, faulty=with_one(kind, name))


@pytest.mark.parametrize("kind", FAULTY)
@dense_and_experts
def test_a_faulty_memory_is_caught(name, kind):
    for drafter in (changing_depths(name, 25, 4), mtp(name)):
        with pytest.raises(AssertionError):
            speculate(name, drafter, 4, 25, 15, faulty=with_one(kind, name))


@pytest.mark.parametrize("kind", [KeepsState, KeepsWindow, KeepsKeys])
def test_a_faulty_memory_is_caught_where_nothing_is_committed(kind):
    with pytest.raises(AssertionError):
        speculate("three_to_one", mtp("three_to_one"), 4, 3, commit=False, faulty=with_one(kind, "three_to_one"))


@pytest.mark.parametrize("kind", FAULTY)
def test_a_faulty_memory_is_caught_by_the_replay(kind):
    run = sampled("three_to_one", "drawn drafts", faulty=with_one(kind, "three_to_one"))
    with pytest.raises(AssertionError):
        check_replay("three_to_one", "drawn drafts", *run)


@pytest.mark.parametrize("case", SAMPLINGS)
def test_other_laws_are_caught_by_the_replay(case):
    """Of a temperature that is a little higher."""

    def replay(name):
        check_replay(name, case, *sampled(name, case), read_as=replace(SAMPLINGS[case][1], temperature=1.2))

    assert any(fails(replay, name) for name in FEW)


def fails(check, *arguments):
    """Whether a replay differs, or goes on to a row that no verdict asked for."""
    try:
        check(*arguments)
    except (AssertionError, IndexError):
        return True
    return False


def test_another_rule_is_caught_by_the_replay():
    """A verdict of `match` is none of `rejection`, and the other way round."""
    for case, other in (("drawn drafts", "match, drawn"), ("match, drawn", "drawn drafts")):
        assert any(fails(check_replay, name, other, *sampled(name, case)) for name in FEW)


@dense_and_experts
def test_the_verdicts_uniforms_are_not_the_drafters(name):
    """Shared ones bend the law, and no replay would show it."""
    for step in sampled(name, "drawn drafts")[0]:
        assert not set(step.draft_uniforms) & set(step.uniforms)


class KeepsDrafts(DrafterKV):
    """Keeps the keys and values of drafts, and goes on behind them."""

    def cut(self, entries):
        del self.made_with[entries:]


class BelievesDrafts(DrafterKV):
    """Takes the entries of drafts that were accepted for entries made from true hidden states."""

    def cut(self, entries):
        if entries < self.length:
            super().cut(entries)


@pytest.mark.parametrize("kind", [KeepsDrafts, BelievesDrafts])
def test_entries_of_drafts_that_stay_are_caught(kind):
    name = "three_to_one"
    config = qwen(name).config

    def change(kv):
        kv.drafter = kind(FullKV(config.attention.kv_heads, config.attention.head_dim), config.hidden_size)

    _, kv = speculate(name, mtp(name), 4, 25, faulty=change)  # lossless all the same
    assert not all(map(same_bits, entries(kv), read_along(name, 25)))


def test_one_bit_of_one_memory_is_enough():
    name, (prompt, tokens, rows, expected) = "three_to_one", reference("three_to_one", 3, 5)
    assert len(expected) == 2 * len(qwen(name).config.layers)
    for i, array in enumerate(expected):
        changed = array.copy()
        changed.flat[array.size // 2] = np.nextafter(changed.flat[array.size // 2], np.float32(np.inf))
        with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
            others = [*expected[:i], changed, *expected[i + 1 :]]
            patch.setitem(globals(), "reference", lambda *_: (prompt, tokens, rows, others))  # noqa: B023
            speculate(name, None, 1, 3, 5)
    speculate(name, None, 1, 3, 5)


def test_the_references_are_worth_comparing_with():
    for name in FEW:
        references = [reference(name, length) for length in PROMPTS]
        assert all(len(np.unique(rows, axis=0)) == len(rows) for _, _, rows, _ in references)
        assert len({token for _, tokens, _, _ in references for token in tokens}) > 30
