"""Qwen 3.5 against vectors that transformers computed in double (make_qwen_vectors.py); needs no torch.

As test_numerical, whose tolerances hold here too. The MTP layer is tested through `propose` alone.
"""

import re
from functools import cache

import numpy as np
import pytest
from random_models import fingerprint
from random_qwen import CONFIGS, FULL, LINEAR, WITH_MTP, layer_types, write_qwen
from safetensors.numpy import load_file, save_file
from test_numerical import GREEDY, TOLERANCE, VECTORS, WAYS, logits_error, odd_chunks, read, worst

import minimtp
from minimtp.checkpoint import CheckpointError

SOFT = minimtp.Sampling(temperature=1.0)
BOUNDARIES = (1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129)

every_config = pytest.mark.parametrize("name", CONFIGS)
every_drafter = pytest.mark.parametrize("name", WITH_MTP)


@cache
def vectors(name):
    return load_file(VECTORS / f"qwen_{name}.safetensors")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """name -> checkpoint folder, written when first asked for."""
    return cache(lambda name: write_qwen(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def models(folders):
    """(name, dtype) -> target, loaded when first asked for."""
    return cache(lambda name, dtype="float64": minimtp.load(folders(name), dtype=dtype))


@every_config
def test_the_checkpoints_are_those_of_the_vectors(name, folders):
    assert fingerprint(folders(name)) == vectors(name)["fingerprint"].tobytes(), "run tests/make_qwen_vectors.py"


@every_config
def test_the_vectors_are_worth_comparing_with(name):
    """Spread, varied logits; heads that remember and heads that forget; drafts that differ with what was read."""
    v = vectors(name)
    assert 3 < v["logits_RV"].std() < 7 and len(set(v["logits_RV"].argmax(-1))) > len(v["rows_R"]) // 2
    for state_HKV in (value for key, value in v.items() if key.startswith("state.")):
        assert state_HKV.std() > 1e-3
    if name in WITH_MTP:
        assert len({tuple(tokens) for tokens in v["draft.tokens_NK"].tolist()}) == len(v["draft.prefix_N"])
        assert 3 < v["draft.logits_NKV"].std() < 8
        assert worst(v["draft.pre_norm_logits_NKV"], v["draft.logits_NKV"][:, :2]) > 0.1


# The target ----------------------------------------------------------------------------------------------------------


def memory_error(v, cache_):
    """Largest difference of linear layers' states and convolution windows from those kept in the vectors."""
    errors = {}
    for key, expected in v.items():
        kind, _, index = key.partition(".")
        if kind == "state":
            found = cache_.layers[int(index)].state_HKV
            grid = np.ix_(range(len(found)), *(some(n, 4) for n in found.shape[1:]))
            errors[key] = worst(found[grid], expected)
        elif kind == "window":
            found = cache_.layers[int(index)].window()
            errors[key] = worst(found[:, some(found.shape[1], 24)], expected)
    return errors


def some(length, count):
    return np.unique(np.linspace(0, length - 1, min(count, length)).astype(int))


@every_config
@pytest.mark.parametrize("way", WAYS)
def test_target_in_double(name, way, models):
    v, target = vectors(name), models(name)
    taps = {key.removeprefix("tap."): value for key, value in v.items() if key.startswith("tap.")}
    ids_T, cache_ = v["ids_T"].tolist(), target.new_cache()
    commit_every = {"whole": 1, "odd": 1, "single": 3}[way]
    logits_TV, hidden_TD, tapped = read(target, cache_, ids_T, WAYS[way](len(ids_T)), commit_every, tuple(taps))
    assert logits_error(v, logits_TV) <= TOLERANCE
    assert worst(hidden_TD[v["rows_R"]], v["hidden_RD"]) <= TOLERANCE
    for tap, expected_FD in taps.items():
        assert worst(tapped[tap][v["tap_rows_F"]], expected_FD) <= TOLERANCE, tap
    assert max(memory_error(v, cache_).values()) <= TOLERANCE


@every_config
@pytest.mark.parametrize("last", (1, None))
def test_prompts_of_every_length(name, last, models):
    """Both sides of every boundary between passes row by row and wide ones, and between chunks."""
    v, target = vectors(name), models(name)
    ids_T = v["ids_T"].tolist()
    for length in (n for n in BOUNDARIES if n <= len(ids_T)):
        logits_TV = target.forward(ids_T[:length], target.new_cache(), last=last).logits_TV
        assert len(logits_TV) == (last or length)
        expected_TC = v["logits_TC"][length - len(logits_TV) : length]
        assert worst(logits_TV[:, v["columns_C"]], expected_TC) <= TOLERANCE, length


@every_config
def test_reading_never_committed_is_the_same(name, models):
    v, target = vectors(name), models(name)
    cache_, ids_T = target.new_cache(), v["ids_T"].tolist()
    logits_TV, *_ = read(target, cache_, ids_T, odd_chunks(len(ids_T)), commit_every=10**9)
    assert logits_error(v, logits_TV) <= TOLERANCE
    assert max(memory_error(v, cache_).values()) <= TOLERANCE


@every_config
def test_reading_on_after_rollback(name, models):
    """Read strangers, un-read them at once or bit by bit, read on: after narrow passes and wide ones."""
    v, target = vectors(name), models(name)
    ids_T, vocab, cache_, parts = v["ids_T"].tolist(), target.config.vocab_size, target.new_cache(), []
    for i, size in enumerate(odd_chunks(len(ids_T))):
        strangers = [(7 * i + j) % vocab for j in range(1 + 6 * (i % 5))]
        target.forward(strangers, cache_)
        some_of_them = len(strangers) // 2
        cache_.rollback(some_of_them)
        target.forward(strangers[:3], cache_)
        cache_.rollback(len(strangers) - some_of_them + len(strangers[:3]))
        done = cache_.length
        parts.append(target.forward(ids_T[done : done + size], cache_).logits_TV)
        if i % 2:
            cache_.commit()
    assert logits_error(v, np.concatenate(parts)) <= TOLERANCE
    assert max(memory_error(v, cache_).values()) <= TOLERANCE


@every_config
def test_un_reading_part_of_a_pass(name, models):
    """Read the prompt's rest again after un-reading 1, 2, ... tokens of a narrow pass and of a wide one."""
    v, target = vectors(name), models(name)
    ids_T = v["ids_T"].tolist()
    for width in (5, 30):
        first = len(ids_T) - width
        for n in range(0, width + 1, width // 3):
            cache_ = target.new_cache()
            target.forward(ids_T[:first], cache_)
            cache_.commit()
            target.forward(ids_T[first:], cache_)
            cache_.rollback(n)
            if n:
                logits_TV = target.forward(ids_T[-n:], cache_).logits_TV
                assert worst(logits_TV[:, v["columns_C"]], v["logits_TC"][-n:]) <= TOLERANCE, (width, n)
            assert max(memory_error(v, cache_).values()) <= TOLERANCE, (width, n)


@every_config
@pytest.mark.parametrize("way", ("whole", "single"))
def test_target_in_float32(name, way, models):
    v, target = vectors(name), models(name, "float32")
    ids_T, cache_ = v["ids_T"].tolist(), target.new_cache()
    logits_TV, hidden_TD, _ = read(target, cache_, ids_T, WAYS[way](len(ids_T)))
    assert logits_TV.dtype == hidden_TD.dtype == np.float32
    assert logits_error(v, logits_TV) <= 2 * v["error.logits"][0]
    assert worst(hidden_TD[v["rows_R"]], v["hidden_RD"]) <= 2 * v["error.hidden"][0]
    for key, error in memory_error(v, cache_).items():
        assert error <= 2 * v[f"error.{key.partition('.')[0]}"][0], key


# The MTP layer -------------------------------------------------------------------------------------------------------


def read_along(target, drafter, ids_T, length, chunks=None):
    """Read `length` tokens, the drafter along with all but the last of the chunks -> (cache, the news, behind them)."""
    cache_, news, behind, done = target.new_cache(), None, None, 0
    for size in chunks or [length - length // 2, *filter(None, [length // 2])]:
        if news:
            drafter.propose(news, behind, cache_, 0, GREEDY, ())
            cache_.commit()
        news, behind = ids_T[done + 1 : done + size + 1], target.forward(ids_T[done : done + size], cache_).hidden_TD
        done += size
    assert cache_.length == length
    return cache_, news, behind


def accept_some(target, drafter, ids_T, length, accepted):
    """Come to `length` tokens through a round that drafted 4 and accepted so many -> as read_along."""
    start = length - 1 - accepted
    cache_, news, behind = read_along(target, drafter, ids_T, start)
    drafter.propose(news, behind, cache_, 4, GREEDY, ())
    cache_.commit()
    wrong = [(ids_T[length] + 1 + j) % target.config.vocab_size for j in range(4 - accepted)]
    out = target.forward(ids_T[start:length] + wrong, cache_)
    cache_.rollback(len(wrong))
    cache_.commit()
    return cache_, ids_T[start + 1 : length + 1], out.hidden_TD[: accepted + 1]


def drafts_of(v):
    """(prefix, tokens [K], logits [K, V]) of every draft in the vectors."""
    keys = ("prefix_N", "tokens_NK", "logits_NKV")
    return zip(*(v[f"draft.{key}"].tolist() for key in keys[:2]), v["draft.logits_NKV"], strict=True)


def laws(logits_KV):
    p_KV = np.exp(logits_KV - logits_KV.max(-1, keepdims=True))
    return p_KV / p_KV.sum(-1, keepdims=True)


def uniforms_of(tokens, p_KV):
    """Uniforms that draw these tokens from the laws: the middle of each token's part of the cdf."""
    cdf_KV = p_KV.cumsum(-1)
    return np.array([cdf_V[token] - p_V[token] / 2 for token, p_V, cdf_V in zip(tokens, p_KV, cdf_KV, strict=True)])


def check_drafts(drafts, drafter, reach):
    """After reach(length) the tokens expected are drafted by argmax, and drawn ones from the laws expected."""
    for length, tokens, logits_KV in drafts:
        cache_, news, behind = reach(length)
        greedy = drafter.propose(news, behind, cache_, len(tokens), GREEDY, ())
        assert list(greedy.tokens) == tokens and greedy.q_KV is None, length
        check_laws(drafter, cache_, news[-1:], behind[-1:], tokens, logits_KV)  # the others are read by now


def check_laws(drafter, cache_, news, behind, tokens, logits_KV):
    """Drawn with the uniforms that call for these tokens, they come from the softmax of these logits."""
    p_KV = laws(logits_KV)
    drawn = drafter.propose(news, behind, cache_, len(tokens), SOFT, uniforms_of(tokens, p_KV))
    assert list(drawn.tokens) == list(tokens) and worst(drawn.q_KV, p_KV) <= TOLERANCE, cache_.length


@every_drafter
@pytest.mark.parametrize("way", WAYS)
def test_drafts(name, way, models):
    v, target = vectors(name), models(name)
    drafter, ids_T = minimtp.load_drafter("auto", target), v["ids_T"].tolist()
    drafts = [d for d in drafts_of(v) if way != "single" or d[0] <= 50]  # one by one takes its time
    check_drafts(drafts, drafter, lambda length: read_along(target, drafter, ids_T, length, WAYS[way](length)))


@every_drafter
@pytest.mark.parametrize("accepted", (0, 2, 4))
def test_drafts_after_partial_acceptance(name, accepted, models):
    """Nothing of the round before stays: entries made from drafted hidden states are made again from true ones."""
    v, target = vectors(name), models(name)
    drafter, ids_T = minimtp.load_drafter("auto", target), v["ids_T"].tolist()
    drafts = [d for d in drafts_of(v) if d[0] > accepted + 1]
    check_drafts(drafts, drafter, lambda length: accept_some(target, drafter, ids_T, length, accepted))


@every_drafter
def test_laws_without_a_draft_by_argmax_before(name, models):
    """And shorter drafts begin like longer ones."""
    v, target = vectors(name), models(name)
    drafter, ids_T = minimtp.load_drafter("auto", target), v["ids_T"].tolist()
    length, tokens, logits_KV = list(drafts_of(v))[1]
    for count in range(1, len(tokens) + 1):
        reached = read_along(target, drafter, ids_T, length)
        check_laws(drafter, *reached, tokens[:count], logits_KV[:count])


@every_drafter
def test_drafting_again_and_another_sequence_between(name, models):
    """A drafter keeps nothing, and what it drafted leaves no trace in the cache."""
    v, target = vectors(name), models(name)
    drafter, ids_T = minimtp.load_drafter("auto", target), v["ids_T"].tolist()
    length, tokens, logits_KV = list(drafts_of(v))[1]
    cache_, news, behind = read_along(target, drafter, ids_T, length)
    before = target.forward(ids_T[length : length + 1], cache_)
    cache_.rollback(1)
    for _ in range(2):
        again = drafter.propose(news, behind, cache_, 4, GREEDY, ())
        assert list(again.tokens) == tokens
        other, *unread = read_along(target, drafter, ids_T[::-1], length)
        drafter.propose(*unread, other, 3, GREEDY, ())
    after = target.forward(ids_T[length : length + 1], cache_)
    assert (after.logits_TV == before.logits_TV).all()


@every_drafter
@pytest.mark.parametrize("shared", (0, 1, 4))
def test_a_drafter_un_reads_with_its_target(name, shared, models):
    """It read along some right tokens and strangers, or was told of a token that was never read; then the truth."""
    v, target = vectors(name), models(name)
    drafter, ids_T, vocab = minimtp.load_drafter("auto", target), v["ids_T"].tolist(), target.config.vocab_size
    length, tokens, logits_KV = list(drafts_of(v))[1]
    first = length - shared - 2
    wrong = [(token + 1) % vocab for token in ids_T[first + shared :]]
    for strangers in (0, 1, 3, 20):
        cache_, *unread = read_along(target, drafter, ids_T, first)
        drafter.propose(*unread, cache_, 2, GREEDY, ())
        cache_.commit()
        read_too = ids_T[first : first + shared] + wrong[:strangers]
        if read_too:
            behind = target.forward(read_too, cache_).hidden_TD
            drafter.propose([*read_too[1:], wrong[strangers]], behind, cache_, 2, GREEDY, ())
            cache_.rollback(strangers)
        else:
            drafter.propose(wrong[:1], unread[1][-1:], cache_, 2, GREEDY, ())
        rest = ids_T[first + shared : length]
        behind = target.forward(rest, cache_).hidden_TD
        check_laws(drafter, cache_, ids_T[first + shared + 1 : length + 1], behind, tokens, logits_KV)


@every_drafter
def test_many_rounds_are_one_reading(name, models):
    """Rounds that accept 0, 1, ... 4 tokens by turns, then the draft at the end."""
    v, target = vectors(name), models(name)
    drafter, ids_T = minimtp.load_drafter("auto", target), v["ids_T"].tolist()
    length, tokens, logits_KV = list(drafts_of(v))[-1]
    cache_, news, behind = read_along(target, drafter, ids_T, length - 40 if length > 50 else 3)
    for accepted in [0, 3, 1, 4, 2] * length:
        drafter.propose(news, behind, cache_, 4, GREEDY, ())
        start, accepted = cache_.length, min(accepted, length - cache_.length - 1)
        wrong = [(token + 1) % target.config.vocab_size for token in ids_T[start + accepted + 1 : start + 5]]
        out = target.forward(ids_T[start : start + accepted + 1] + wrong, cache_)
        cache_.rollback(len(wrong))
        cache_.commit()
        news, behind = ids_T[start + 1 : start + accepted + 2], out.hidden_TD[: accepted + 1]
        if cache_.length == length:
            break
    check_laws(drafter, cache_, news, behind, tokens, logits_KV)


@every_drafter
@pytest.mark.parametrize("accepted", (None, 2))
def test_drafts_from_hidden_states_before_the_norm(name, accepted, models):
    """The named option, also after a partial acceptance."""
    v, target = vectors(name), models(name)
    drafter, ids_T = minimtp.load_drafter("auto", target, hidden="pre-norm"), v["ids_T"].tolist()
    lengths, *rest = (v[f"draft.{key}"] for key in ("prefix_N", "pre_norm_tokens_NK", "pre_norm_logits_NKV"))
    for length, tokens, logits_KV in zip(lengths.tolist(), *rest, strict=True):
        if accepted is None or length < accepted + 2:
            reached = read_along(target, drafter, ids_T, length)
        else:
            reached = accept_some(target, drafter, ids_T, length, accepted)
        check_laws(drafter, *reached, tokens.tolist(), logits_KV)


@every_drafter
def test_drafts_in_float32(name, models):
    """Logarithms of a law are off by at most twice what the logits are off."""
    v, target = vectors(name), models(name, "float32")
    drafter, ids_T = minimtp.load_drafter("auto", target), v["ids_T"].tolist()
    for length, tokens, logits_KV in drafts_of(v):
        cache_, news, behind = read_along(target, drafter, ids_T, length)
        p_KV = laws(logits_KV)
        draft = drafter.propose(news, behind, cache_, len(tokens), SOFT, uniforms_of(tokens, p_KV))
        assert list(draft.tokens) == tokens
        assert worst(np.log(draft.q_KV), np.log(p_KV)) <= 2 * 2 * v["error.draft.logits"][0]


def test_no_mtp_layer_no_drafter(models):
    with pytest.raises(CheckpointError, match="moe_no_mtp"):
        minimtp.load_drafter("auto", models("moe_no_mtp"))


# The vectors notice --------------------------------------------------------------------------------------------------


def changed_rope(name, **change):
    return {"rope_parameters": CONFIGS[name]["model"]["rope_parameters"] | change}


def one_pair(name):
    return 2 / CONFIGS[name]["model"]["head_dim"]


CHANGES = {
    "rms_norm_eps": lambda name: {"rms_norm_eps": 2.5e-6},
    "rope_theta": lambda name: changed_rope(name, rope_theta=12345.0),
    "partial_rotary_factor": lambda name: changed_rope(name, partial_rotary_factor=one_pair(name)),
}


def target_error(v, target):
    logits_TV = target.forward(v["ids_T"].tolist()[:40], target.new_cache()).logits_TV
    return worst(logits_TV[:, v["columns_C"]], v["logits_TC"][:40])


def draft_error(v, target):
    """Largest difference of the laws of a draft, fed with the vectors' tokens."""
    length, tokens, logits_KV = list(drafts_of(v))[1]
    drafter, p_KV = minimtp.load_drafter("auto", target), laws(logits_KV)
    cache_, news, behind = read_along(target, drafter, v["ids_T"].tolist(), length)
    draft = drafter.propose(news, behind, cache_, len(tokens), SOFT, uniforms_of(tokens, p_KV))
    return worst(draft.q_KV, p_KV)


@every_config
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_parameter_is_noticed(name, change, tmp_path):
    """Negative control: with one number of the configuration wrong the comparison fails by far."""
    target = minimtp.load(write_qwen(name, tmp_path / "changed", **CHANGES[change](name)), dtype="float64")
    assert target_error(vectors(name), target) > 100 * TOLERANCE


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("moe")])
def test_one_expert_less_or_more_is_noticed(name, tmp_path):
    model = CONFIGS[name]["model"]
    other = model["num_experts_per_tok"] - 1 or 2
    target = minimtp.load(write_qwen(name, tmp_path / "changed", num_experts_per_tok=other), dtype="float64")
    assert target_error(vectors(name), target) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ("interval", "moe_single"))  # those in plain float32 and one file
def test_every_tensor_counts(name, folders, tmp_path):
    """Negative control: with every other number of a tensor a little larger, the comparison fails by far."""
    v, tensors, changed = vectors(name), load_file(folders(name) / "model.safetensors"), tmp_path / "changed"
    changed.mkdir()
    (changed / "config.json").write_bytes((folders(name) / "config.json").read_bytes())
    first = {f"model.layers.{layer_types(CONFIGS[name]['model']).index(kind)}." for kind in (LINEAR, FULL)}
    for kind in {one_name(key) for key in tensors if ".layers." not in key or key.startswith((*first, "mtp."))}:
        larger = {key: tensors[key].copy() for key in tensors if one_name(key) == kind}
        for value in larger.values():
            value.reshape(-1)[::2] *= 1.05
        save_file(tensors | larger, changed / "model.safetensors")
        error = draft_error if kind.startswith("mtp.") else target_error
        assert error(v, minimtp.load(changed, dtype="float64")) > 100 * TOLERANCE, kind


def one_name(key):
    """One name for all experts, who are not all chosen."""
    return re.sub(r"experts\.\d+", "experts", key)
