"""What a Qwen target remembers: whatever was un-read, the cache is as if it had read the accepted text afresh.

A state machine drives the cache of a real model against token-by-token reading; a DeltaState by itself is driven
against the list of everything ever written.
"""

from contextlib import suppress
from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import Phase
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from test_cache import read, rewrite, stored
from tiny import random_ids, same_bits
from tiny_qwen import BEHIND, GREEDY, MODELS, TOLERANCES, Afresh, contents, failing, off, pair, run

from minimtp import qwen35
from minimtp.backend import ROWS
from minimtp.cache import Cache, CacheError
from minimtp.checkpoint import read_safetensors
from minimtp.delta_state import SNAPSHOT, DeltaState
from minimtp.kv import FullKV
from minimtp.layers import delta_writes

every_model = pytest.mark.parametrize("name", MODELS)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCES)


# A real model's cache against reading afresh

SEEDS = st.integers(0, 2)
BACK = st.lists(st.integers(0, 20) | st.sampled_from([60, 70, 100, 10**9]), max_size=3)  # how many tokens, at a time


class Machine(RuleBasedStateMachine):
    """The cache of a target; the model is the list of ids, and what is final.

    wide: for each token of a wide pass how many of it were left to come, itself included, else 0. Where such a pass was
    un-read in part its last token is torn, and from there on the cache is right only to rounding.
    """

    name, dtype, memory, cache_class = "dense", "float32", DeltaState, Cache

    def __init__(self):
        super().__init__()
        self.target, self.drafter = pair(self.name, self.dtype)
        self.afresh = Afresh(self.target)
        self.cache, self.ids, self.committed, self.hidden_from, self.wide, self.torn = self.new(), [], 0, 0, [], []

    def new(self):
        cache = self.target.new_cache()
        cache.__class__ = self.cache_class
        for layer in cache.layers:
            layer.__class__ = self.memory if isinstance(layer, DeltaState) else FullKV
        return cache

    def fresh(self, count, seed):
        return random_ids(count, self.target.config.vocab_size, seed=1000 * seed + len(self.ids))

    @initialize(width=st.integers(1, ROWS))
    def read_first(self, width):
        self.read_these(self.fresh(width, 0))

    @rule(width=st.integers(1, ROWS), count=st.sampled_from([1, 1, 1, 2, 5]), seed=SEEDS, back=BACK)
    def read(self, width, count, seed, back):
        for _ in range(count):
            self.read_these(self.fresh(width, seed))
        self.roll_back(back)

    @rule(width=st.sampled_from([17, 17, 18, 18, 21, 25, 33, 70]), seed=SEEDS, back=BACK)
    def read_wide(self, width, seed, back):
        self.read(width, 1, seed, back)

    def read_these(self, ids):
        out = self.target.forward(ids, self.cache)
        if len(ids) > ROWS:
            assert self.afresh.read_wide(ids) <= TOLERANCES[self.dtype]
        else:
            self.afresh.read(ids)
        self.ids = self.ids + ids
        self.wide += range(len(ids), 0, -1) if len(ids) > ROWS else [0] * len(ids)
        self.torn += [False] * len(ids)
        self.agree(out.logits_TV, self.afresh.rows[-len(ids) :], "logits")
        return out

    @rule(width=st.integers(1, 40), seed=SEEDS, reached=st.integers(0, 3))
    def read_and_be_interrupted(self, width, seed, reached):
        w = [*self.target.params.layers, None][reached]
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            name = "feed_forward" if w else "head"
            patch.setattr(qwen35, name, failing(getattr(qwen35, name), KeyboardInterrupt, w))
            self.target.forward(self.fresh(width, seed), self.cache)

    @rule(back=BACK)
    def roll_back(self, back):
        for n in back:
            n = min(n, len(self.ids) - self.committed)
            self.cache.rollback(n)
            self.cut(len(self.ids) - n)
        for n in (len(self.ids) - self.committed + 1, 10**9, -1):
            with pytest.raises(CacheError, match="cannot roll back"):
                self.cache.rollback(n)

    def cut(self, length):
        self.ids, self.wide, self.torn = self.ids[:length], self.wide[:length], self.torn[:length]
        if length and self.wide[-1] > 1:
            self.torn[-1] = True
        self.afresh.cut(length)

    @rule()
    def commit(self):
        self.cache.commit()
        self.committed = len(self.ids)
        self.hidden_from = max(self.hidden_from, self.cache.drafter.entries - 1, self.committed - BEHIND)

    @rule()
    def save_and_load(self):
        self.cache = reloaded(self.cache, self.new())
        self.committed = len(self.ids)

    @invariant()
    def is_as_if_read_afresh(self):
        expected = self.afresh.caches[-1]
        assert self.cache.tokens == self.ids == expected.tokens and self.cache.committed == self.committed
        assert {layer.length for layer in self.cache.layers} == {len(self.ids)}
        for name, array in contents(expected).items():
            self.agree(contents(self.cache)[name], array, name)

    @invariant()
    def keeps_the_hidden_states_that_a_drafter_may_need(self):
        kept = self.cache.drafter.hidden(self.hidden_from, len(self.ids))
        self.agree(kept, self.afresh.before[self.hidden_from :], "hidden states")

    def agree(self, found, expected, what):
        if len(expected):
            assert same_bits(found, expected) or any(self.torn), what
            assert off(found, expected) <= TOLERANCES[self.dtype], what

    def teardown(self):
        if self.cache.tokens == self.afresh.tokens:
            rows = [self.target.forward([7], cache).logits_TV for cache in (self.cache, self.afresh.caches[-1])]
            self.agree(*rows, "logits")


def reloaded(cache, new):
    """A new cache, filled from what the other would save."""
    arrays, metadata = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minimtp.cache.write_safetensors", lambda path, a, m: (arrays.update(a), metadata.update(m)))
        patch.setattr("minimtp.cache.read_safetensors", lambda path: (stored(arrays), metadata))
        cache.save("a file")
        new.restore("a file")
    return new


def variant(**options):
    return type("Variant", (Machine,), options)


NEVER_COMMITTED = dict(commit=None, save_and_load=None, read_wide=None)  # long ways back, all of it bit for bit


@pytest.mark.parametrize("options", [
    dict(name="dense"),
    dict(name="experts", dtype="float64"),
    dict(name="int4", **NEVER_COMMITTED),
], ids=["dense", "experts", "never_committed"])  # fmt: skip
def test_a_cache_is_as_if_it_had_read_the_accepted_text_afresh(options):
    run(variant(**options), examples=10)


class KeepsState(DeltaState):
    """Un-reads everything but the state."""

    def rollback(self, n):
        state_HKV = self.state_HKV
        super().rollback(n)
        self._readings[-1] = replace(self._readings[-1], after_HKV=state_HKV)


class KeepsWindow(DeltaState):
    """Un-reads everything but the inputs of the convolution."""

    def rollback(self, n):
        window_TC = self.window()
        super().rollback(n)
        self._readings[-1] = replace(self._readings[-1], conv_TC=window_TC)


class LeavesOneOut(DeltaState):
    """Writes again one token too few."""

    def _until(self, length):
        right, early = super()._until(length), super()._until(max(self.committed, length - 1))
        return [*right[:-1], replace(right[-1], after_HKV=early[-1].after_HKV)]


class OnePassOff(DeltaState):
    """Takes the state before a pass for the one after it."""

    def append(self, conv_TC, k_TGK, u_THV, log_decay_TH, state_HKV):
        before_HKV = self.state_HKV
        super().append(conv_TC, k_TGK, u_THV, log_decay_TH, state_HKV)
        if len(self._readings) > 2 and self._readings[-2].after_HKV is not None:
            self._readings[-2] = replace(self._readings[-2], after_HKV=self.older_HKV)
        self.older_HKV = before_HKV


class ShiftsWindow(DeltaState):
    """Has the right inputs of the convolution in the wrong order, where they come from several passes."""

    def window(self):
        window_TC = super().window()
        return np.roll(window_TC, 1, axis=0) if len(self._readings) > 2 else window_TC


class CutsKeysOnly(Cache):
    """Un-reads keys, values and ids, as a cache without recurrent layers would."""

    def _cut(self, length):
        for memory in self._memories().values():
            if not isinstance(memory, DeltaState):
                memory.rollback(max(0, memory.length - length))


class KeepsHidden(Cache):
    """Forgets that the drafter's slot is to be cut as well."""

    def _cut(self, length):
        for layer in self.layers:
            layer.rollback(max(0, layer.length - length))


@pytest.mark.parametrize("wrong", [KeepsState, KeepsWindow, LeavesOneOut, OnePassOff, ShiftsWindow])
def test_a_wrong_state_is_caught_by_the_same_machine(wrong):
    with pytest.raises(AssertionError):
        run(variant(memory=wrong), examples=80, phases=[Phase.generate])


@pytest.mark.parametrize("wrong", [CutsKeysOnly, KeepsHidden])
def test_a_wrong_cache_is_caught_by_the_same_machine(wrong):
    with pytest.raises(AssertionError):
        run(variant(cache_class=wrong), examples=80, phases=[Phase.generate])


def test_replaying_in_another_order_is_caught_by_the_same_machine(monkeypatch):
    """It would be right to rounding: bits are what tells."""

    def in_double(k_TGK, u_THV, log_decay_TH, state_HKV):
        double = (array.astype(np.float64) for array in (k_TGK, u_THV, log_decay_TH, state_HKV))
        return delta_writes(*double).astype(state_HKV.dtype)

    monkeypatch.setattr("minimtp.delta_state.delta_writes", in_double)
    with pytest.raises(AssertionError, match="state"):
        run(variant(), examples=80, phases=[Phase.generate])


# A DeltaState by itself, against a list of everything written

KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM, KERNEL = SIZES = 2, 4, 3, 2, 4
CHANNELS = 2 * KEY_HEADS * KEY_DIM + VALUE_HEADS * VALUE_DIM


class Written:
    """The convolution inputs, writes and states of every token, one after the other, in lists."""

    def __init__(self, dtype="float32", kernel=KERNEL):
        self.dtype, self.kernel, self.conv, self.count = dtype, kernel, [], 0
        self.states = [np.zeros((VALUE_HEADS, KEY_DIM, VALUE_DIM), dtype)]

    def writes(self, width):
        """What a pass of that width appends, noted here too."""
        self.count += 1
        random = np.random.default_rng(self.count)
        shapes = (width, CHANNELS), (width, KEY_HEADS, KEY_DIM), (width, VALUE_HEADS, VALUE_DIM), (width, VALUE_HEADS)
        conv_TC, k_TGK, u_THV, decay_TH = (random.normal(size=shape).astype(self.dtype) for shape in shapes)
        log_decay_TH = -np.abs(decay_TH) / 4
        for k_GK, u_HV, log_decay_H in zip(k_TGK, u_THV, log_decay_TH):
            k_HK = np.repeat(k_GK, VALUE_HEADS // KEY_HEADS, axis=0)
            faded_HKV = self.states[-1] * np.exp(log_decay_H)[:, None, None]
            self.states.append(faded_HKV + k_HK[:, :, None] * u_HV[:, None])
        self.conv.extend(conv_TC)
        return conv_TC, k_TGK, u_THV, log_decay_TH, self.states[-1]

    def cut(self, length):
        del self.conv[length:], self.states[length + 1 :]

    def window(self):
        conv_TC = np.zeros((self.kernel - 1 + len(self), CHANNELS), self.dtype)
        conv_TC[self.kernel - 1 :] = np.reshape(self.conv, (-1, CHANNELS))
        return conv_TC[len(self) :]

    def __len__(self):
        return len(self.conv)


def new_state(dtype="float32", kernel=KERNEL, kind=DeltaState):
    return kind(*SIZES[:4], kernel, dtype)


def states_kept(memory, uncommitted, dtype="float32"):
    """How many states its bytes have room for, beside the window and so many tokens' writes."""
    state, token = memory.state_HKV.nbytes, CHANNELS + KEY_HEADS * KEY_DIM + VALUE_HEADS * VALUE_DIM + VALUE_HEADS
    rest = memory.nbytes - memory.window().nbytes - uncommitted * token * np.dtype(dtype).itemsize
    assert rest % state == 0
    return rest // state


def replayed(memory, n):
    """Roll back -> how many tokens were written again."""
    counts = []

    def counted(k_TGK, u_THV, *others):
        counts.append(len(u_THV))
        return delta_writes(k_TGK, u_THV, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minimtp.delta_state.delta_writes", counted)
        memory.rollback(n)
    return sum(counts)


class ListMachine(RuleBasedStateMachine):
    """A DeltaState; the model is the lists, and how many tokens are final. wide, torn: as in Machine."""

    kind, dtype, kernel = DeltaState, "float32", KERNEL

    def __init__(self):
        super().__init__()
        self.memory, self.written = new_state(self.dtype, self.kernel, self.kind), Written(self.dtype, self.kernel)
        self.wide, self.torn, self.committed, self.passes = [], [], 0, 0

    @rule(width=st.integers(1, ROWS))
    def append(self, width):
        self.memory.append(*self.written.writes(width))
        self.wide += range(width, 0, -1) if width > ROWS else [0] * width
        self.torn += [False] * width
        self.passes += width > ROWS

    @rule(width=st.integers(1, ROWS), count=st.integers(1, 20))
    def append_many(self, width, count):
        for _ in range(count):
            self.append(width)

    @rule(width=st.sampled_from([17, 20, 33, 50, 64, 65, 150]))
    def append_wide(self, width):
        self.append(width)

    @rule(data=st.data(), interrupted=st.booleans())
    def roll_back(self, data, interrupted):
        length = data.draw(st.integers(self.committed, len(self.wide)))
        if interrupted:
            with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
                patch.setattr("minimtp.delta_state.delta_writes", failing(delta_writes, KeyboardInterrupt, after=1))
                self.memory.rollback(self.memory.length - length)
            assert self.memory.length in (len(self.wide), length)
        count = replayed(self.memory, self.memory.length - length)
        assert count <= SNAPSHOT + ROWS or any(self.wide)  # of a wide pass all but one may be written again
        self.wide, self.torn = self.wide[:length], self.torn[:length]
        if length and self.wide[-1] > 1:
            self.torn[-1] = True
        self.written.cut(length)

    @rule(beyond=st.integers(1, 300), negative=st.booleans())
    def roll_back_too_far(self, beyond, negative):
        with pytest.raises(CacheError, match="roll back"):
            self.memory.rollback(-beyond if negative else len(self.wide) - self.committed + beyond)

    @rule()
    def commit(self):
        self.memory.commit()
        self.committed, self.passes = len(self.wide), 0
        assert self.memory.nbytes == new_state(self.dtype, self.kernel).nbytes

    @rule()
    def save_and_load(self):
        state, length = self.memory.state(), self.memory.length
        self.memory = new_state(self.dtype, self.kernel, self.kind)
        self.memory.restore(state, length)
        self.committed, self.passes = len(self.wide), 0

    @invariant()
    def holds_what_the_lists_say(self):
        assert (self.memory.length, self.memory.committed) == (len(self.wide), self.committed)
        assert same_bits(self.memory.window(), self.written.window())
        found, expected = self.memory.state_HKV, self.written.states[-1]
        assert same_bits(found, expected) or any(self.torn) and off(found, expected) <= TOLERANCES[self.dtype]

    @invariant()
    def keeps_few_states(self):
        uncommitted = len(self.wide) - self.committed
        kept = states_kept(self.memory, uncommitted, self.dtype)
        assert kept <= 2 + uncommitted // (SNAPSHOT - ROWS) + 2 * self.passes


def list_variant(**options):
    return type("Variant", (ListMachine,), options)


NARROW = dict(append_wide=None)


@pytest.mark.parametrize("options", [
    dict(),
    dict(kernel=2, dtype="float64"),
    dict(kernel=7),
    dict(kernel=1),
    dict(**NARROW),
    dict(**NARROW, commit=None, save_and_load=None),
], ids=["mixed", "kernel_2", "kernel_7", "kernel_1", "narrow", "never_committed"])  # fmt: skip
def test_a_state_is_what_the_lists_of_everything_say(options):
    run(list_variant(**options), examples=12)


class NeverForgets(DeltaState):
    """Keeps every state."""

    def append(self, *writes):
        readings = self._readings
        super().append(*writes)
        self._readings = [*readings, self._readings[-1]]


class KeepsNone(DeltaState):
    """Writes everything since the commit again."""

    def append(self, *writes):
        super().append(*writes)
        self._readings[1:-1] = (replace(reading, after_HKV=None) for reading in self._readings[1:-1])


class NeverFrees(DeltaState):
    """Keeps the writes of what is final."""

    @property
    def committed(self):
        return self.final

    final = 0

    def commit(self):
        self.final = self.length


@pytest.mark.parametrize("wrong", [KeepsState, KeepsWindow, LeavesOneOut, OnePassOff, ShiftsWindow, NeverForgets,
                                   NeverFrees])  # fmt: skip
def test_wrong_states_are_caught_by_the_lists(wrong):
    with pytest.raises(AssertionError):
        drive(wrong)


def test_the_right_state_passes_the_same_steps():
    drive(DeltaState)


def drive(kind, steps=400):
    """The list machine through steps that are always the same: what Hypothesis draws depends on what is imported."""
    machine, random = list_variant(kind=kind, **NARROW)(), np.random.RandomState(7)
    for step in range(steps):
        if step % 40 == 39:
            machine.commit() if step % 80 == 39 else machine.save_and_load()
        elif random.random_sample() < 0.6:
            machine.append(width=random.randint(1, ROWS + 1))
        else:
            length = random.randint(machine.committed, len(machine.wide) + 1)
            machine.roll_back(data=SimpleNamespace(draw=lambda _, length=length: length), interrupted=False)
        machine.holds_what_the_lists_say()
        machine.keeps_few_states()


def test_a_state_that_writes_everything_again_is_caught_by_the_count():
    memory, written = new_state(), Written()
    memory.__class__ = KeepsNone
    for _ in range(300):
        memory.append(*written.writes(1))
    assert replayed(copy(memory), 1) > SNAPSHOT + ROWS


def test_300_passes_that_were_never_committed_can_be_unread_to_every_depth():
    memory, written = new_state(), Written()
    for _ in range(300):
        memory.append(*written.writes(1))
    assert states_kept(memory, 300) <= 2 + 300 // SNAPSHOT
    for n in range(301):
        one = copy(memory)
        assert replayed(one, n) <= SNAPSHOT
        assert same_bits(one.state_HKV, written.states[300 - n]) and one.length == 300 - n
        assert same_bits(one.window(), np.stack([*np.zeros((3, CHANNELS), np.float32), *written.conv])[300 - n :][:3])


@pytest.mark.parametrize("width", [1, 5, 16, 100])
def test_memory_between_commits_is_bounded_however_long_the_text(width):
    memory, written, most = new_state(), Written(), 0
    for _ in range(100):
        memory.append(*written.writes(width))
        memory.rollback(width // 2)
        written.cut(len(written) - width // 2)
        memory.append(*written.writes(width))
        most = max(most, states_kept(memory, memory.length - memory.committed))
        memory.commit()
        assert memory.nbytes == new_state().nbytes
    assert most <= 3


@every_model
def test_nbytes_counts_all_that_is_held(name):
    target, _ = pair(name)
    cache = target.new_cache()
    for seed, width in enumerate((30, 1, 16, 100, 7, 3)):
        target.forward(random_ids(width, target.config.vocab_size, seed), cache)
        cache.rollback(width // 3)
        for memory in (layer for layer in cache.layers if isinstance(layer, DeltaState)):
            assert memory.nbytes == sum(owned(memory).values())
        assert cache.nbytes == sum(layer.nbytes for layer in cache.layers) + cache.drafter.nbytes
    assert cache.drafter.nbytes == cache.length * target.config.hidden_size * 4


def owned(thing, seen=None):
    """{id: bytes} of every buffer that something holds on to, through whatever it is made of."""
    seen = {} if seen is None else seen
    if isinstance(thing, np.ndarray):
        while thing.base is not None:
            thing = thing.base
        seen[id(thing)] = thing.nbytes
    elif isinstance(thing, list | tuple):
        for one in thing:
            owned(one, seen)
    elif hasattr(thing, "__dict__"):
        owned(list(vars(thing).values()), seen)
    return seen


@every_model
def test_a_committed_model_keeps_no_more_after_a_long_text_than_after_a_short_one(name, monkeypatch):
    monkeypatch.setattr("minimtp.drafter_kv.BEHIND", 20)
    target, _ = pair(name)
    cache, sizes = target.new_cache(capacity=400), set()
    for start in range(0, 400, 20):
        read(target, cache, random_ids(20, target.config.vocab_size, start), width=10)
        cache.commit()
        if start:
            sizes.add(cache.nbytes - sum(layer.nbytes for layer in cache.layers if isinstance(layer, FullKV)))
    assert len(sizes) == 1


def test_an_append_that_is_interrupted_leaves_no_trace_and_can_be_repeated(monkeypatch):
    memory, written = new_state(), Written()
    for width in (1, 3, 20, 2, 16):
        memory.append(*written.writes(width))
    before, writes = memory.state(), written.writes(4)
    for name in ("replace", "_Reading"):
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(f"minimtp.delta_state.{name}", lambda *args, **fields: (_ for _ in ()).throw(MemoryError))
            memory.append(*writes)
        assert memory.length == 42 and all(map(same_bits, memory.state().values(), before.values()))
    memory.append(*writes)
    for length in range(46, -1, -1):
        assert memory.length == length and off(memory.state_HKV, written.states[length]) < 1e-5
        memory.rollback(min(1, length))


@pytest.mark.parametrize("name, change", [
    ("state", lambda x: x[:-1]),
    ("state", lambda x: x.swapaxes(1, 2)),
    ("state", lambda x: x.astype(np.float64)),
    ("state", lambda x: x[0, 0, 0]),
    ("window", lambda x: x[1:]),
    ("window", lambda x: np.concatenate([x, x])),
    ("window", lambda x: x[:, :-1]),
    ("window", lambda x: x.astype(np.float16)),
    ("window", lambda x: x.astype(np.int32)),
])  # fmt: skip
def test_a_saved_state_of_another_shape_or_dtype_is_refused_and_changes_nothing(name, change):
    memory, written = new_state(), Written()
    memory.append(*written.writes(5))
    state = memory.state()
    with pytest.raises(CacheError, match="a saved tensor is .*, expected float32"):
        memory.restore(state | {name: change(state[name])}, 5)
    assert all(map(same_bits, memory.state().values(), state.values())) and memory.committed == 0
    memory.rollback(5)


@every_model
@pytest.mark.parametrize("what", ["rollback", "commit"])
def test_what_is_interrupted_between_two_layers_can_be_repeated(name, what):
    target, _ = pair(name)
    ids_T = random_ids(30, target.config.vocab_size)
    for at in range(4):
        cache, twin = target.new_cache(), target.new_cache()
        for one in (cache, twin):
            read(target, one, ids_T[:10], width=5)
            one.commit()
            read(target, one, ids_T[10:], width=7)
        memory, arguments = [*cache.layers, cache.drafter][at], (13,) if what == "rollback" else ()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(memory, what, lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
            getattr(cache, what)(*arguments)
        for one in (cache, twin):
            getattr(one, what)(*arguments)
        assert (cache.tokens, cache.committed, cache.nbytes) == (twin.tokens, twin.committed, twin.nbytes)
        assert same_everything(cache, twin)
        for one in (cache, twin):
            one.rollback(one.length - one.committed)
        assert same_everything(cache, twin)


def same_everything(a, b):
    memories = [({**contents(one), **one.drafter.state()}) for one in (a, b)]
    return all(same_bits(memories[0][key], memories[1][key]) for key in memories[0])


# Long prompts


@every_dtype
@pytest.mark.parametrize("name", ["dense", "experts"])
def test_a_long_prompt_in_chunks_is_the_same_as_whole(name, dtype):
    target, _ = pair(name, dtype)
    ids_T = random_ids(1300, target.config.vocab_size)
    whole, chunks, uncommitted = (target.new_cache() for _ in range(3))
    out = target.forward(ids_T, whole)
    for cache in (chunks, uncommitted):
        rows = []
        for start in range(0, 1300, 512):
            rows.append(target.forward(ids_T[start : start + 512], cache).logits_TV)
            if cache is chunks:
                cache.commit()
        assert off(np.concatenate(rows), out.logits_TV) <= 3 * TOLERANCES[dtype]  # nothing of this is un-reading
    uncommitted.rollback(1300 - 1030)
    target.forward(ids_T[1030:], uncommitted)
    for cache in (chunks, uncommitted):
        for key, array in contents(whole).items():
            assert off(contents(cache)[key], array) <= 3 * TOLERANCES[dtype], key


# Saved caches


def saved(tmp_path, name="dense", read_along=35, length=40, uncommitted=3):
    """(target, drafter, the file of a cache that has read so many tokens, the drafter fewer)."""
    target, drafter = pair(name)
    cache, ids_T = target.new_cache(), random_ids(length + 1, target.config.vocab_size)
    out = target.forward(ids_T[:read_along], cache)
    drafter.propose(ids_T[1 : read_along + 1], out.hidden_TD, cache, 0, GREEDY, ())
    cache.commit()
    read(target, cache, ids_T[read_along : length - uncommitted])
    cache.commit()
    read(target, cache, ids_T[length - uncommitted : length])
    cache.save(tmp_path / "cache")
    return target, drafter, tmp_path / "cache"


def check_usable(target, drafter, cache):
    """What was loaded is one sequence, of which the model and its drafter can read on."""
    memory, length = cache.drafter, cache.length
    assert {layer.length for layer in cache.layers} == {memory.length} == {length} == {cache.committed}
    assert memory.kv.length == len(memory.made_with) <= length
    hidden_TD = target.forward([1, 2], cache).hidden_TD
    with suppress(CacheError):
        drafter.propose([2, 3], hidden_TD, cache, 2, GREEDY, ())
    cache.rollback(2)
    cache.commit()


def without(name):
    return lambda arrays: arrays.pop(name)


def changed(name, change):
    return lambda arrays: arrays.update({name: np.array(change(arrays[name]), order="C")})


def more_entries(arrays):
    """Consistent by itself: but there are more entries than tokens."""
    for key in ("k", "v"):
        arrays[f"drafter.{key}"] = np.zeros((2, 41, 8), np.float32)
    arrays["drafter.made_with"] = np.ones(41, np.int64)


DAMAGE = {
    "no state": without("layers.0.state"),
    "no window": without("layers.2.window"),
    "no length of a state": without("layers.0.length"),
    "no hidden states": without("drafter.hidden"),
    "no tokens of the entries": without("drafter.made_with"),
    "no keys of the entries": without("drafter.k"),
    "no length of the drafter": without("drafter.length"),
    "no drafter": lambda arrays: [arrays.pop(f"drafter.{key}") for key in ("k", "v", "made_with", "hidden", "length")],
    "a state of fewer tokens": changed("layers.0.length", lambda x: x - 1),
    "a state of more tokens": changed("layers.2.length", lambda x: x + 1),
    "a drafter of fewer tokens": changed("drafter.length", lambda x: x - 1),
    "a drafter of more tokens": changed("drafter.length", lambda x: x + 1),
    "a drafter of very many tokens": changed("drafter.length", lambda x: x + 2**62),
    "a drafter of no tokens": changed("drafter.length", lambda x: 0 * x),
    "a drafter of negative length": changed("drafter.length", lambda x: -x),
    "more entries than tokens": more_entries,
    "made with more tokens": changed("drafter.made_with", lambda x: np.append(x, 1)),
    "made with fewer tokens": changed("drafter.made_with", lambda x: x[:-1]),
    "made with negative tokens": changed("drafter.made_with", lambda x: -x - 1),
    "more hidden states than tokens": changed("drafter.hidden", lambda x: np.resize(x, (41, x.shape[1]))),
    "hidden states of another width": changed("drafter.hidden", lambda x: x[:, :-1]),
    "negative ids": changed("tokens", lambda x: -x - 1),
    "one id fewer": changed("tokens", lambda x: x[:-1]),
    "one id more": changed("tokens", lambda x: np.append(x, 1)),
    "one tensor more": lambda arrays: arrays.update({"drafter.more": arrays["tokens"]}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_refused(tmp_path, damage):
    target, drafter, path = saved(tmp_path)
    check_usable(target, drafter, target.load_cache(path))
    rewrite(path, lambda arrays, metadata: DAMAGE[damage](arrays))
    with pytest.raises(CacheError, match="cache|saved|tensor|sequence"):
        target.load_cache(path)


RESHAPED = {
    "gone": None,
    "a scalar": lambda x: x.reshape(-1)[0],
    "flat": lambda x: x.reshape(-1),
    "one axis more": lambda x: x[None],
    "one axis more, at the end": lambda x: x[..., None],
    "nothing in it": lambda x: x[:0],
    "nothing along the last axis": lambda x: x[..., :0],
    "one less at the end": lambda x: x[..., :-1],
    "one less at the beginning": lambda x: x[1:],
    "double": lambda x: x.astype(np.float64),
    "half": lambda x: x.astype(np.float16),
    "bytes": lambda x: x.astype(np.uint8),
    "short integers": lambda x: x.astype(np.int32),
}


@pytest.mark.parametrize("change", RESHAPED)
def test_every_tensor_of_another_shape_or_type_is_refused_or_makes_no_difference(tmp_path, change):
    target, drafter, path = saved(tmp_path)
    whole = path.read_bytes()
    for name in read_safetensors(path)[0]:
        damage = without(name) if change == "gone" else changed(name, RESHAPED[change])
        path.write_bytes(whole)
        rewrite(path, lambda arrays, _: damage(arrays))  # noqa: B023
        if path.read_bytes() != whole:
            with suppress(CacheError):
                check_usable(target, drafter, target.load_cache(path))
                assert name in ("drafter.hidden", "drafter.maker"), name  # fewer, or another's: then all is made again


def test_ids_that_the_model_does_not_have_are_refused(tmp_path):
    target, _, path = saved(tmp_path)
    rewrite(path, lambda arrays, _: changed("tokens", lambda x: x + 50)(arrays))
    with pytest.raises(CacheError):
        target.load_cache(path)


@every_model
@pytest.mark.parametrize(
    "read_along, length, uncommitted", [(1, 1, 0), (5, 9, 4), (40, 40, 0), (35, 40, 3), (20, 90, 70)]
)
def test_a_loaded_cache_is_used_like_the_one_that_was_saved(tmp_path, name, read_along, length, uncommitted):
    target, drafter, path = saved(tmp_path, name, read_along, length, uncommitted)
    check_usable(target, drafter, target.load_cache(path))
