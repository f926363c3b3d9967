"""minimtp against vectors that transformers computed in double (make_vectors.py); needs no torch.

Float64 must agree to 1e-8. Float32 may be off by twice what transformers' own float32 is
off, at worst, over its ways of computing the same.
"""

import json
import shutil
from functools import cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from random_models import CONFIGS, fingerprint, write_pair
from safetensors.numpy import load_file

import minimtp

VECTORS = Path(__file__).parent / "vectors"
TOLERANCE = 1e-8
GREEDY = minimtp.Sampling(temperature=0.0)
ODD = (3, 1, 17, 2, 5, 19)  # both sides of the widest pass that works row by row
WAYS = {"whole": lambda n: [n], "odd": lambda n: odd_chunks(n), "single": lambda n: [1] * n}

every_config = pytest.mark.parametrize("name", CONFIGS)


def odd_chunks(length):
    ends = [end for end in accumulate((ODD * length)[:length]) if end < length]
    return np.diff([0, *ends, length]).tolist()


@cache
def vectors(name):
    return load_file(VECTORS / f"{name}.safetensors")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """name -> (target folder, assistant folder), written when first asked for."""
    return cache(lambda name: write_pair(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def models(pairs):
    """(name, dtype, drafter options) -> (target, drafter), loaded when first asked for."""

    @cache
    def load_target(name, dtype):
        return minimtp.load(pairs(name)[0], dtype=dtype)

    @cache
    def load(name, dtype="float64", **options):
        target = load_target(name, dtype)
        return target, minimtp.load_drafter(pairs(name)[1], target, **options)

    return load


def read(target, cache, ids_T, chunks, commit_every=1, taps=()):
    """Read ids_T in chunks -> (logits [T, V], hidden [T, D], {tap: [T, D]})."""
    parts, start = [], cache.length
    for i, size in enumerate(chunks):
        done = cache.length - start
        parts.append(target.forward(ids_T[done : done + size], cache, taps=taps))
        if i % commit_every == 0:
            cache.commit()
    assert cache.length == start + len(ids_T)
    tapped = {name: np.concatenate([part.taps[name] for part in parts]) for name in taps}
    return np.concatenate([p.logits_TV for p in parts]), np.concatenate([p.hidden_TD for p in parts]), tapped


def worst(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.abs(a - b).max()


def logits_error(v, logits_TV):
    return max(worst(logits_TV[v["rows_R"]], v["logits_RV"]), worst(logits_TV[:, v["columns_C"]], v["logits_TC"]))


@every_config
def test_the_checkpoints_are_those_of_the_vectors(name, pairs):
    assert fingerprint(*pairs(name)) == vectors(name)["fingerprint"].tobytes(), "run tests/make_vectors.py"


@every_config
def test_the_vectors_are_worth_comparing_with(name):
    """Spread, varied logits; prompts that pass the window; the soft cap in reach; drafts on both sides of it."""
    v, target = vectors(name), CONFIGS[name]["target"]
    window, cap = target["sliding_window"], target["final_logit_softcapping"]
    assert 3 < v["logits_RV"].std() < 7 and len(set(v["logits_RV"].argmax(-1))) > len(v["rows_R"]) // 2
    assert cap is None or np.abs(v["logits_RV"]).max() > 0.3 * cap
    assert len(v["ids_T"]) > window and min(v["draft.prefix_N"]) < window < max(v["draft.prefix_N"])


# The target ----------------------------------------------------------------------------------------------------------


@every_config
@pytest.mark.parametrize("way", WAYS)
def test_target_in_double(name, way, models):
    v, (target, _) = vectors(name), models(name)
    taps = {key.removeprefix("tap."): value for key, value in v.items() if key.startswith("tap.")}
    ids_T = v["ids_T"].tolist()
    commit_every = {"whole": 1, "odd": 1, "single": 3}[way]
    chunks = WAYS[way](len(ids_T))
    logits_TV, hidden_TD, tapped = read(target, target.new_cache(), ids_T, chunks, commit_every, tuple(taps))
    assert logits_error(v, logits_TV) <= TOLERANCE
    assert worst(hidden_TD[v["rows_R"]], v["hidden_RD"]) <= TOLERANCE
    for tap, expected_RD in taps.items():
        assert worst(tapped[tap][v["rows_R"]], expected_RD) <= TOLERANCE, tap


@every_config
def test_reading_never_committed_is_the_same(name, models):
    v, (target, _) = vectors(name), models(name)
    chunks = odd_chunks(len(v["ids_T"]))
    logits_TV, *_ = read(target, target.new_cache(), v["ids_T"].tolist(), chunks, commit_every=10**9)
    assert logits_error(v, logits_TV) <= TOLERANCE


@every_config
def test_reading_on_after_rollback(name, models):
    """Read strangers, un-read them, read on: before, at and beyond the window, by widths on both sides of 16."""
    v, (target, _) = vectors(name), models(name)
    ids_T, vocab, cache, parts = v["ids_T"].tolist(), target.config.vocab_size, target.new_cache(), []
    for i, size in enumerate(odd_chunks(len(ids_T))):
        strangers = [(7 * i + j) % vocab for j in range(1 + 6 * (i % 4))]
        target.forward(strangers, cache)
        cache.rollback(len(strangers))
        done = cache.length
        parts.append(target.forward(ids_T[done : done + size], cache).logits_TV)
        if i % 2:
            cache.commit()
    assert logits_error(v, np.concatenate(parts)) <= TOLERANCE


@every_config
@pytest.mark.parametrize("way", ("whole", "single"))
def test_target_in_float32(name, way, models):
    v, (target, _) = vectors(name), models(name, "float32")
    ids_T = v["ids_T"].tolist()
    logits_TV, hidden_TD, _ = read(target, target.new_cache(), ids_T, WAYS[way](len(ids_T)))
    assert logits_TV.dtype == hidden_TD.dtype == np.float32
    assert logits_error(v, logits_TV) <= 2 * v["error.logits"][0]
    assert worst(hidden_TD[v["rows_R"]], v["hidden_RD"]) <= 2 * v["error.hidden"][0]


# The assistant -------------------------------------------------------------------------------------------------------


def commit_prefix(target, ids_T, length):
    """(cache that has read and committed `length` tokens, hidden state of each)."""
    cache = target.new_cache()
    _, hidden_TD, _ = read(target, cache, ids_T[:length], odd_chunks(length))
    cache.commit()
    return cache, hidden_TD


def accept_some(target, ids_T, length, accepted, rejected, vocab):
    """Reach the same state as commit_prefix by a round that accepts some draft tokens and rejects others."""
    cache, hidden_TD = commit_prefix(target, ids_T, length - accepted)
    wrong = [(ids_T[length] + 1 + j) % vocab for j in range(rejected)]
    out = target.forward(ids_T[length - accepted : length] + wrong, cache)
    cache.rollback(rejected)
    cache.commit()
    return cache, np.concatenate([hidden_TD, out.hidden_TD[:accepted]])


def steps(drafter, cache, hidden_D, tokens):
    """The assistant fed these tokens and its own hidden states -> (logits [K, V], hidden [K, D])."""
    logits, hiddens = [], []
    for token in tokens:
        logits_V, hidden_D = drafter.forward(token, hidden_D, cache)
        logits.append(logits_V)
        hiddens.append(hidden_D)
    return np.stack(logits), np.stack(hiddens)


def all_steps(target, drafter, v, reach=commit_prefix):
    """Steps after every prefix of the vectors -> (logits [N, K, V], hidden [N, K, D])."""
    ids_T, found = v["ids_T"].tolist(), []
    for length, tokens in zip(v["draft.prefix_N"].tolist(), v["draft.tokens_K"].tolist(), strict=True):
        cache, hidden_TD = reach(target, ids_T, length)
        found.append(steps(drafter, cache, hidden_TD[length - 1], tokens))
        assert cache.length == length
    logits, hiddens = zip(*found, strict=True)
    return np.stack(logits), np.stack(hiddens)


def check_steps(target, drafter, v, reach):
    """Logits and fed-back hidden states of every step from every prefix are the vectors'."""
    logits_NKV, hidden_NKD = all_steps(target, drafter, v, reach)
    assert worst(logits_NKV, v["draft.logits_KV"]) <= TOLERANCE
    assert worst(hidden_NKD, v["draft.hidden_KD"]) <= TOLERANCE


@every_config
def test_assistant_in_double(name, models):
    v = vectors(name)
    logits_NKV, hidden_NKD = all_steps(*models(name), v)
    assert worst(logits_NKV, v["draft.logits_KV"]) <= TOLERANCE
    assert worst(hidden_NKD, v["draft.hidden_KD"]) <= TOLERANCE


@every_config
@pytest.mark.parametrize("rejected", (1, 4, 21))
def test_assistant_after_partial_acceptance(name, rejected, models):
    """Rejected drafts leave nothing behind, below and beyond the window, after narrow passes and wide ones."""
    v, (target, drafter) = vectors(name), models(name)

    def reach(target, ids_T, length):
        return accept_some(target, ids_T, length, min(length - 1, 3), rejected, target.config.vocab_size)

    check_steps(target, drafter, v, reach)


@every_config
def test_a_round_of_proposals(name, models):
    """propose drafts the argmax tokens; at temperature 1 its laws are the softmax; again after a partial acceptance."""
    v, (target, drafter) = vectors(name), models(name)
    ids_T, soft = v["ids_T"].tolist(), minimtp.Sampling(temperature=1.0)
    for length, tokens, logits_KV in zip(v["draft.prefix_N"].tolist(), v["draft.tokens_K"].tolist(),
                                         v["draft.logits_KV"], strict=True):  # fmt: skip
        expected = [*tokens[1:], int(logits_KV[-1].argmax())]
        cache, hidden_TD = commit_prefix(target, ids_T, length)
        first_new = max(1, length - 2)  # up to three new tokens, the last of them not yet read by the target
        news, behind = ids_T[first_new : length + 1], hidden_TD[first_new - 1 :]
        first = drafter.propose(news, behind, cache, len(expected), GREEDY, np.zeros(len(expected)))
        assert list(first.tokens) == expected and first.q_KV is None
        target.forward([news[-1], *first.tokens], cache)
        cache.rollback(len(expected) + 1)
        assert list(drafter.propose(news, behind, cache, len(expected), GREEDY, np.zeros(3)).tokens) == expected
        drawn = drafter.propose(news, behind, cache, 1, soft, np.array([0.5]))
        law_V = np.exp(logits_KV[0] - logits_KV[0].max())
        assert worst(drawn.q_KV[0], law_V / law_V.sum()) <= TOLERANCE


@every_config
def test_assistant_in_float32(name, models):
    v = vectors(name)
    logits_NKV, hidden_NKD = all_steps(*models(name, "float32"), v)
    assert worst(logits_NKV, v["draft.logits_KV"]) <= 2 * v["error.draft.logits"][0]
    assert worst(hidden_NKD, v["draft.hidden_KD"]) <= 2 * v["error.draft.hidden"][0]


@every_config
@pytest.mark.parametrize("options, key", [
    (dict(position="committed"), "committed_V"),
    (dict(window_edge="exclusive"), "exclusive_V"),
    (dict(position="committed", window_edge="exclusive"), "committed_exclusive_V"),
])  # fmt: skip
def test_other_readings_of_the_drafter(name, options, key, models):
    """Each switch gives what transformers gives when told so, and differs from the default where it should."""
    v, window = vectors(name), CONFIGS[name]["target"]["sliding_window"]
    target, drafter = models(name, "float64", **options)
    ids_T = v["ids_T"].tolist()
    for i, length in enumerate(v["draft.prefix_N"].tolist()):
        cache, hidden_TD = commit_prefix(target, ids_T, length)
        logits_V, _ = drafter.forward(ids_T[length], hidden_TD[length - 1], cache)
        assert worst(logits_V, v[f"draft.{key}"][i]) <= TOLERANCE
        differs = worst(logits_V, v["draft.logits_KV"][i, 0]) > 1e-4
        moved = "position" in options and length > 1  # a single key takes all attention wherever the query stands
        assert differs == (moved or length >= window), length


# The vectors notice --------------------------------------------------------------------------------------------------

CHANGES = {
    "sliding_window": lambda text: text["sliding_window"] + 1,
    "rms_norm_eps": lambda text: 2 * text["rms_norm_eps"],
    "final_logit_softcapping": lambda text: 29.0,
    "rope_parameters.sliding_attention.rope_theta": lambda text: 12345.0,
    "rope_parameters.full_attention.rope_theta": lambda text: 123456.0,
    "rope_parameters.full_attention.partial_rotary_factor": lambda text: 0.75,
}


def change(config, path):
    """Change one field of a config.json's text model."""
    text = config.get("text_config", config)
    *outer, field = path.split(".")
    value, place = CHANGES[path](text), text
    for key in outer:
        place = place[key]
    place[field] = value


@every_config
@pytest.mark.parametrize("path", CHANGES)
def test_a_changed_parameter_is_noticed(name, path, pairs, tmp_path):
    """Negative control: with one number of the configuration wrong the comparison fails by far."""
    v, folder = vectors(name), tmp_path / "changed"
    shutil.copytree(pairs(name)[0], folder)
    config = json.loads((folder / "config.json").read_text())
    change(config, path)
    (folder / "config.json").write_text(json.dumps(config))
    target = minimtp.load(folder, dtype="float64")
    logits_TV, *_ = read(target, target.new_cache(), v["ids_T"].tolist(), [len(v["ids_T"])])
    assert logits_error(v, logits_TV) > 100 * TOLERANCE
