"""minimtp against transformers, live: random pairs of every configuration, and the bundled pair.

transformers runs in double as the truth (see double.py), and in float32 as the yardstick for our float32.
"""

from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from double import double, load_reference
from make_vectors import FOLDER as VECTORS
from make_vectors import STEPS, assistant_steps, crop, float32_ways, make, prefixes, read
from random_models import CONFIGS, prompt, write_assistant, write_pair, write_target
from safetensors.numpy import load_file

import minimtp

torch.set_num_threads(1)
TOLERANCE = 1e-8
ECHO = 0.3  # of the input in the output: such a target accepts some drafts of an assistant that repeats
WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
WAYS = {"whole": lambda n: [n], "odd": lambda n: odd_chunks(n), "single": lambda n: [1] * n}
CASES = [(name, seed) for name in CONFIGS for seed in (CONFIGS[name]["seed"], 100 + CONFIGS[name]["seed"])]


def odd_chunks(length):
    sizes = ([7, 1, 23, 2, 16, 17] * length)[:length]
    ends = [end for end in np.cumsum(sizes).tolist() if end < length]
    return np.diff([0, *ends, length]).tolist()


class Pair:
    """A target and its assistant in both engines, and what transformers says about one prompt."""

    def __init__(self, target_folder, assistant_folder, ids_T):
        self.folders, self.ids_T = (target_folder, assistant_folder), ids_T
        self.target, self.assistant = load_reference(target_folder), load_reference(assistant_folder)
        self.window = self.target.config.get_text_config().sliding_window

    @cached_property
    def truth(self):
        with double(self.target, self.assistant):
            return read(self.target, self.ids_T)

    def ours(self, dtype="float64"):
        target = minimtp.load(self.folders[0], dtype=dtype)
        return target, minimtp.load_drafter(self.folders[1], target)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def pair(request, tmp_path_factory):
    name, seed = request.param
    return Pair(*write_pair(name, tmp_path_factory.mktemp(name), seed), prompt(name, seed))


@pytest.fixture(scope="module", params=["tiny-gemma4", "tiny-gemma4-float"])
def bundled(request):
    """The trained pairs, on held-out text: the int4 checkpoint comes through compressed-tensors."""
    return bundled_pair(request.param)


def bundled_pair(name):
    ids_T = minimtp.load(WEIGHTS / name).tokenizer.encode((WEIGHTS / "heldout.txt").read_text())
    return Pair(WEIGHTS / name, WEIGHTS / "tiny-gemma4-assistant", ids_T[:150])


def ours_reads(target, ids_T, chunks, cache=None):
    """(logits [T, V], hidden [T, D], cache) of minimtp, committing after each chunk."""
    cache, outs = cache or target.new_cache(), []
    for size in chunks:
        outs.append(target.forward(ids_T[cache.length : cache.length + size], cache))
        cache.commit()
    return np.concatenate([out.logits_TV for out in outs]), np.concatenate([out.hidden_TD for out in outs]), cache


def worst(a, b):
    assert a.shape == b.shape
    return np.abs(a.astype(np.float64) - b).max()


# The reference is sound ----------------------------------------------------------------------------------------------


def test_the_reference_is_double(pair):
    """Its result does not depend on chunks, to rounding of double."""
    with double(pair.target):
        logits_TV, hidden_TD, *_ = read(pair.target, pair.ids_T, odd_chunks(len(pair.ids_T)))
    assert worst(logits_TV, pair.truth[0]) < 1e-11 and worst(hidden_TD, pair.truth[1]) < 1e-11


@pytest.mark.parametrize("name", CONFIGS)
def test_the_vectors_are_what_transformers_computes(name):
    """make_vectors.py, run again on this machine, gives the committed vectors."""
    committed = load_file(VECTORS / f"{name}.safetensors")
    for key, value in make(name).items():
        if not key.startswith("error."):
            assert worst(value, committed[key]) < 1e-10, key


def test_double_leaves_the_model_as_it_was(pair):
    before = read(pair.target, pair.ids_T)[0]
    with double(pair.target):
        inside = read(pair.target, pair.ids_T)[0]
    assert (read(pair.target, pair.ids_T)[0] == before).all() and worst(inside, before) > 1e-6


def test_transformers_shows_its_drafter_one_key_more_than_the_window(pair):
    _, hidden_TD, _, kv = pair.truth
    length, token = len(pair.ids_T) - 1, pair.ids_T[-1]
    with double(pair.target, pair.assistant):
        seen = [
            assistant_steps(pair.target, pair.assistant, crop(kv, length, keys), hidden_TD[-2], [token], length)[0]
            for keys in (None, pair.window + 1, pair.window)
        ]
    assert worst(seen[1], seen[0]) < 1e-12 < 1e-4 < worst(seen[2], seen[0])


# Random pairs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_target_in_double(pair, way):
    check_double(pair, way)


def test_target_in_float32(pair):
    check_float32(pair)


def test_assistant_in_double(pair):
    check_assistant(pair, prefixes(len(pair.ids_T), pair.window))


def check_double(pair, way):
    """Our float64 logits and hidden states, the prompt read this way, are the truth's."""
    target, _ = pair.ours()
    logits_TV, hidden_TD, _ = ours_reads(target, pair.ids_T, WAYS[way](len(pair.ids_T)))
    assert worst(logits_TV, pair.truth[0]) <= TOLERANCE
    assert worst(hidden_TD, pair.truth[1]) <= TOLERANCE


def check_float32(pair):
    """Our float32 error, whole and token by token, is at most twice transformers' own, the worst of its ways."""
    theirs = list(float32_ways(pair.target, pair.ids_T))
    target, length = pair.ours("float32")[0], len(pair.ids_T)
    for chunks in ([length], [1] * length):
        ours = ours_reads(target, pair.ids_T, chunks)
        for i, truth in enumerate(pair.truth[:2]):
            assert worst(ours[i], truth) <= 2 * max(worst(each[i], truth) for each in theirs)


def check_assistant(pair, lengths):
    """Drafting steps after each prefix, reached by plain reading and through a partial acceptance."""
    target, drafter = pair.ours()
    ids_T, (_, hidden_TD, _, kv) = pair.ids_T, pair.truth
    with double(pair.target, pair.assistant):
        expected = [greedy_steps(pair, crop(kv, n), hidden_TD[n - 1], ids_T[n], n) for n in lengths]
    for length, (tokens, logits_KV, hidden_KD) in zip(lengths, expected, strict=True):
        for rejected in (0, 1, 5):
            accepted = min(length, 2) if rejected else 0
            cache = target.new_cache()
            if length > accepted:
                ours_reads(target, ids_T[: length - accepted], odd_chunks(length - accepted), cache)
            if rejected:
                wrong = [(ids_T[length] + 1 + j) % target.config.vocab_size for j in range(rejected)]
                target.forward(ids_T[length - accepted : length] + wrong, cache)
                cache.rollback(rejected)
                cache.commit()
            hidden_D = hidden_TD[length - 1]
            for j, token in enumerate(tokens):
                logits_V, hidden_D = drafter.forward(token, hidden_D, cache)
                assert worst(logits_V, logits_KV[j]) <= TOLERANCE, (length, rejected, j)
                assert worst(hidden_D, hidden_KD[j]) <= TOLERANCE, (length, rejected, j)


def greedy_steps(pair, kv, hidden_D, token, length):
    """(tokens fed, logits, hidden states) of transformers' assistant drafting by argmax."""
    tokens = [token]
    while True:
        logits_KV, hidden_KD = assistant_steps(pair.target, pair.assistant, kv, hidden_D, tokens, length)
        if len(tokens) == STEPS:
            return tokens, logits_KV, hidden_KD
        tokens.append(int(logits_KV[-1].argmax()))


# Generation ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def transformers_generates(pair, ids_T, count, num_draft):
    """transformers' own assisted greedy generation, in double."""
    pair.assistant.generation_config.num_assistant_tokens = num_draft
    pair.target.generation_config.eos_token_id = None
    with double(pair.target, pair.assistant):
        out = pair.target.generate(
            torch.tensor([ids_T]), attention_mask=torch.ones(1, len(ids_T), dtype=torch.long),
            assistant_model=pair.assistant, do_sample=False, max_new_tokens=count,
        )  # fmt: skip
    return out[0, len(ids_T) :].tolist()


def check_generation(pair, ids_T, count, num_draft):
    """The same tokens from both engines, some drafts accepted and some rejected."""
    target, drafter = pair.ours()
    steps = list(minimtp.generate(target, ids_T, drafter, num_draft=num_draft, max_new_tokens=count))
    tokens = list(chain.from_iterable(step.tokens for step in steps))
    assert len(tokens) == count and len(set(tokens)) > 10
    assert 0 < sum(step.accepted for step in steps) < sum(step.drafted for step in steps)
    assert tokens == transformers_generates(pair, ids_T, count, num_draft)


@pytest.mark.parametrize("num_draft", (1, 3, 6))
@pytest.mark.parametrize("name", ("five_to_one", "separate_v", "int4"))
def test_assisted_generation(name, num_draft, tmp_path):
    """A target that likes to repeat itself and an assistant that bets on it."""
    seed, options = 30, CONFIGS[name]["target"]
    config = write_target(tmp_path / "target", seed, echo=ECHO, **options)
    write_assistant(tmp_path / "assistant", config, seed, repeat=2.0, hidden_size=options["hidden_size"])
    pair, window = Pair(tmp_path / "target", tmp_path / "assistant", prompt(name, seed)), options["sliding_window"]
    check_generation(pair, pair.ids_T[: window // 2], min(4 * window, 120), num_draft)


# The bundled weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_bundled_target_in_double(bundled, way):
    check_double(bundled, way)


def test_bundled_target_in_float32(bundled):
    check_float32(bundled)


def test_bundled_assistant_in_double(bundled):
    check_assistant(bundled, [1, bundled.window - 1, bundled.window, bundled.window + 1, 148])


@pytest.mark.parametrize("num_draft", (2, 4, 7))
def test_bundled_assisted_generation(bundled, num_draft):
    check_generation(bundled, bundled.ids_T[:20], 120, num_draft)


@torch.no_grad()
def test_compressed_tensors_runs_the_bundled_checkpoint():
    """As a user loads it, unpacking left to compressed-tensors: the double truth above comes from the same weights."""
    pair = bundled_pair("tiny-gemma4")
    model = transformers.AutoModelForCausalLM.from_pretrained(pair.folders[0], dtype=torch.float32)
    theirs_TV = model(torch.tensor([pair.ids_T])).logits[0].numpy()
    ours_TV, *_ = ours_reads(pair.ours("float32")[0], pair.ids_T, [len(pair.ids_T)])
    assert worst(ours_TV, pair.truth[0]) <= 2 * worst(theirs_TV, pair.truth[0]) < 0.01
