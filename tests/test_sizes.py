"""Every Gemma 4 size's shape, and shapes that no release has: numbers, losslessness, layouts, experts, refusals.

The vectors come from transformers in double (make_size_vectors.py); needs no torch.
"""

import json
import shutil
from functools import cache
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from random_models import fingerprint, write_safetensors
from random_sizes import E4B, SIZES, first_shared, is_unused, write_pair, write_target
from test_loading import edit_json, edit_tensors, read_encoded, refused
from test_numerical import TOLERANCE, WAYS, accept_some, all_steps, check_steps, logits_error, read, vectors, worst
from tiny import FOLDER, Restless, emitted, greedy, random_ids, same_bits

import minimtp
from minimtp import Scripted, gemma4, generate
from minimtp.bench import pass_costs
from minimtp.memory import kv_bytes

WIDE = 24  # tokens of a pass that is computed by GEMM
PACKED = [name for name in SIZES if SIZES[name]["target"].get("int4")]
MIXED = [name for name in SIZES if SIZES[name]["target"].get("enable_moe_block")]
SHARED = [name for name in SIZES if SIZES[name]["target"].get("num_kv_shared_layers")]
CLUSTERED = [name for name in SIZES if SIZES[name]["assistant"].get("centroids")]

every_size = pytest.mark.parametrize("name", SIZES)


@cache
def folders(name):
    """(target folder, assistant folder), written when first asked for."""
    return write_pair(name, Path(FOLDER.name) / "sizes" / name)


@cache
def load_target(name, dtype="float32", keep="auto"):
    return minimtp.load(folders(name)[0], dtype=dtype, keep=keep)


@cache
def load(name, dtype="float32", keep="auto", **options):
    target = load_target(name, dtype, keep)
    return target, minimtp.load_drafter(folders(name)[1], target, keep, **options)


def copy(name, folder, part=0):
    """A copy of the target's folder (part 1: the assistant's), to be changed."""
    return Path(shutil.copytree(folders(name)[part], folder))


def logits(target, ids_T, chunk=None):
    kv = target.new_cache()
    parts = [ids_T[i : i + (chunk or len(ids_T))] for i in range(0, len(ids_T), chunk or len(ids_T))]
    return np.concatenate([target.forward(part, kv).logits_TV for part in parts])


def ids_for(name, count, seed=0):
    return random_ids(count, SIZES[name]["target"]["vocab_size"], seed)


# Numbers -------------------------------------------------------------------------------------------------------------


@every_size
def test_the_checkpoints_are_those_of_the_vectors(name):
    expected = vectors(f"size_{name}")["fingerprint"].tobytes()
    assert fingerprint(*folders(name)) == expected, "run tests/make_size_vectors.py"


@every_size
def test_the_vectors_are_worth_comparing_with(name):
    v, target = vectors(f"size_{name}"), SIZES[name]["target"]
    assert 2.5 < v["logits_TC"].std() < 8 and len(set(v["logits_RV"].argmax(-1))) > 1
    assert min(v["draft.prefix_N"]) < target["sliding_window"] < 2 * target["sliding_window"] < len(v["ids_T"])


@every_size
@pytest.mark.parametrize("way", WAYS)
def test_target_in_double(name, way):
    v, target = vectors(f"size_{name}"), load_target(name, "float64")
    ids_T = v["ids_T"].tolist()
    logits_TV, hidden_TD, _ = read(target, target.new_cache(), ids_T, WAYS[way](len(ids_T)))
    assert logits_error(v, logits_TV) <= TOLERANCE
    assert worst(hidden_TD[v["rows_R"]], v["hidden_RD"]) <= TOLERANCE


@every_size
@pytest.mark.parametrize("way", ("whole", "single"))
def test_target_in_float32(name, way):
    v, target = vectors(f"size_{name}"), load_target(name)
    ids_T = v["ids_T"].tolist()
    logits_TV, hidden_TD, _ = read(target, target.new_cache(), ids_T, WAYS[way](len(ids_T)))
    assert logits_TV.dtype == hidden_TD.dtype == np.float32
    assert logits_error(v, logits_TV) <= 2 * v["error.logits"][0]
    assert worst(hidden_TD[v["rows_R"]], v["hidden_RD"]) <= 2 * v["error.hidden"][0]


@every_size
def test_reading_on_after_rollback(name):
    """Read strangers, un-read them, read on: un-reading reaches the layers that borrow, too."""
    v, target = vectors(f"size_{name}"), load_target(name, "float64")
    ids_T, kv, parts = v["ids_T"].tolist(), target.new_cache(), []
    for i in range(0, len(ids_T), 5):
        strangers = ids_for(name, 1 + 9 * (i % 3), seed=i)
        target.forward(strangers, kv)
        kv.rollback(len(strangers))
        parts.append(target.forward(ids_T[i : i + 5], kv).logits_TV)
        if i % 2:
            kv.commit()
    assert logits_error(v, np.concatenate(parts)) <= TOLERANCE


@every_size
@pytest.mark.parametrize("rejected", (3, 21))
def test_assistant_in_double(name, rejected):
    """Logits, the fill of a centroid head among them, and fed-back hidden states, after rejected drafts too."""
    v, (target, drafter) = vectors(f"size_{name}"), load(name, "float64")

    def reach(target, ids_T, length):
        return accept_some(target, ids_T, length, min(length - 1, 2), rejected, target.config.vocab_size)

    check_steps(target, drafter, v, reach)


@every_size
def test_assistant_in_float32(name):
    v = vectors(f"size_{name}")
    logits_NKV, hidden_NKD = all_steps(*load(name), v)
    assert worst(logits_NKV, v["draft.logits_KV"]) <= 2 * v["error.draft.logits"][0]
    assert worst(hidden_NKD, v["draft.hidden_KD"]) <= 2 * v["error.draft.hidden"][0]


def rolled(value):
    """The same numbers in other places: no norm that follows can hide it."""
    return np.roll(value, 1) if value.size > 1 else value * 2


def layer_of(tensor):
    """The number of the layer that a tensor belongs to, or None."""
    return int(tensor.split(".layers.")[1].split(".")[0]) if ".layers." in tensor else None


@pytest.mark.parametrize("name", ["26b", "everything"])
def test_every_tensor_counts_but_the_unused(name, tmp_path):
    """Moving the numbers of any one tensor changes the logits; of one that nothing uses, no bit."""
    text, folder = text_of(name), copy(name, tmp_path / "model")
    tensors = read_encoded(folder / "model.safetensors")
    before = logits(load_target(name), ids_for(name, 6))
    for tensor in [t for t in tensors if layer_of(t) in (None, 0, min(4, first_shared(text)))]:
        dtype, value = tensors[tensor]
        (folder / "model.safetensors").unlink()  # a loaded model may still look at it
        write_safetensors(folder / "model.safetensors", tensors | {tensor: (dtype, rolled(value))})
        after = logits(minimtp.load(folder), ids_for(name, 6))
        if is_unused(tensor.removeprefix("model.language_model."), text):
            assert same_bits(after, before), tensor
        else:
            assert worst(after, before) > 1e-2, tensor


def text_of(name):
    config = json.loads((folders(name)[0] / "config.json").read_text())
    return config.get("text_config", config)


# Losslessness --------------------------------------------------------------------------------------------------------


COUNT = 44  # tokens: more than three windows, and just all depths of seven drafts


@cache
def reference(name, length):
    """(prompt, its greedy continuation token by token, the logits rows behind that)."""
    prompt_T = ids_for(name, length, seed=length)
    return prompt_T, *greedy(Restless(load_target(name)), prompt_T, COUNT)


def speculate(name, drafter, k, length, count=COUNT, keep="auto"):
    """Generate with drafts; every token and every bit must be the reference's -> the steps."""
    prompt_T, tokens, rows = reference(name, length)
    target = Restless(load_target(name, keep=keep))
    kv = target.new_cache()
    steps = list(generate(target, prompt_T, drafter, num_draft=k, max_new_tokens=count, cache=kv))
    assert emitted(steps) == tokens[:count] and kv.tokens == prompt_T + tokens[: count - 1]
    assert same_bits([target.rows[length - 1 + i] for i in range(count)], rows[:count])
    return steps


def wrong_at_every_depth(name, k, length):
    """Drafts the greedy continuation, wrong in turn nowhere, at the last token, ..., at the first."""
    prompt_T, tokens, _ = reference(name, length)
    text, depths = prompt_T + tokens, cycle(range(k, -1, -1))

    def script(position, most):
        draft, depth = text[position : position + most], next(depths)
        return [(token + (j == depth)) % SIZES[name]["target"]["vocab_size"] for j, token in enumerate(draft)]

    return Scripted(script)


@pytest.mark.parametrize("name, k", list(zip(SIZES, cycle((7, 4, 1)))))
def test_drafts_that_are_wrong_at_every_depth(name, k):
    length = (2, 20)[k % 2]  # a narrow prompt, and a wide one
    steps = speculate(name, wrong_at_every_depth(name, k, length), k, length)
    accepted = [step.accepted for step in steps if step.drafted == k]
    assert accepted[: k + 1] == list(range(k, -1, -1))


@every_size
@pytest.mark.parametrize("k", (2, 5))
def test_random_assistants(name, k):
    steps = speculate(name, load(name)[1], k, 20, count=14)
    assert max(step.drafted for step in steps) == k


@pytest.mark.parametrize("name", PACKED)
def test_drafts_over_packed_weights(name):
    """The reference is the unpacked model's."""
    speculate(name, wrong_at_every_depth(name, 4, 2), 4, 2, keep="packed")


@every_size
def test_the_references_are_worth_comparing_with(name):
    _, tokens, rows = reference(name, 20)
    assert len(set(tokens)) > 8 and len(np.unique(rows, axis=0)) == len(rows)


def test_experts_that_depend_on_company_are_caught(monkeypatch):
    """Negative control: a mixture a hair off where tokens share a pass."""
    whole = gemma4.mixture

    def nudged(x_TD, *rest):
        out_TD = whole(x_TD, *rest)
        return out_TD * (1 + np.float32(2**-23) * (len(x_TD) > 1))

    drafter = wrong_at_every_depth("26b", 4, 20)  # and with it the reference
    monkeypatch.setattr(gemma4, "mixture", nudged)
    with pytest.raises(AssertionError):
        speculate("26b", drafter, 4, 20)


# Layouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_and_dense_weights_give_the_same_bits(name, dtype):
    packed, dense = (load(name, dtype, keep) for keep in ("packed", "dense"))
    assert not isinstance(packed[0].params.layers[0].q_proj, np.ndarray)
    assert isinstance(dense[0].params.layers[0].q_proj, np.ndarray)
    for width in (1, 5, 16, WIDE):
        ids_T = ids_for(name, width, seed=width)
        assert same_bits(logits(packed[0], ids_T), logits(dense[0], ids_T))
    steps = [list(generate(t, ids_for(name, 9), drafter, max_new_tokens=12)) for t, drafter in (packed, dense)]
    assert [step.draft.tokens for step in steps[0]] == [step.draft.tokens for step in steps[1]]


@pytest.mark.parametrize("name", sorted({*PACKED, "26b_single", "e4b_qat"}))
def test_the_same_numbers_in_plain_tensors_give_the_same_bits(name, tmp_path):
    """Packed or not, experts in one tensor or in one each: the same model as its twin in plain float32."""
    write_target(tmp_path / "twin", SIZES[name]["seed"], **SIZES[name]["target"] | {"shards": 1}, twin=True)
    stored = {tensor.rsplit(".", 1)[1] for tensor in read_tensors(tmp_path / "twin")}
    assert not stored & {"weight_packed", "weight_scale"}
    twin, target = minimtp.load(tmp_path / "twin"), load_target(name)
    for width in (5, WIDE):
        assert same_bits(logits(twin, ids_for(name, width)), logits(target, ids_for(name, width)))


def read_tensors(folder):
    return read_encoded(folder / "model.safetensors")


@pytest.mark.parametrize("name", SHARED)
def test_borrowing_layers_may_carry_keys_and_values_or_not(name, tmp_path):
    """Base checkpoints do, exports after quantization-aware training do not: the same model, bit for bit."""
    size = SIZES[name]
    for unused in (True, False):
        write_target(tmp_path / str(unused), size["seed"], **size["target"] | {"unused": unused, "shards": 1})
    with_, without = (read_tensors(tmp_path / str(unused)) for unused in (True, False))
    extra = {tensor.removeprefix("model.").removeprefix("language_model.") for tensor in with_.keys() - without.keys()}
    assert extra and all(is_unused(tensor, text_of(name)) for tensor in extra)
    models = [minimtp.load(tmp_path / str(unused)) for unused in (True, False)]
    assert models[0].config == models[1].config
    assert same_bits(*(logits(model, ids_for(name, WIDE)) for model in models))


def test_some_of_the_unused_tensors_may_be_there(tmp_path):
    folder = copy("e2b", tmp_path / "model")
    edit_tensors(folder, lambda tensors: tensors.pop("model.language_model.layers.6.self_attn.v_proj.weight"))
    assert same_bits(logits(minimtp.load(folder), [1, 2]), logits(load_target("e2b"), [1, 2]))


# Borrowed KV ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARED)
def test_borrowing_layers_use_the_last_entries_of_their_kind(name):
    config, own = load_target(name).config, first_shared(text_of(name))
    kinds = [layer.kind for layer in config.layers]
    for i, layer in enumerate(config.layers):
        assert layer.owns_kv == (i < own)
        assert layer.kv == (i if i < own else max(j for j in range(own) if kinds[j] == kinds[i]))
        assert layer.intermediate_size == text_of(name)["intermediate_size"] * (
            2 if i >= own and text_of(name)["use_double_wide_mlp"] else 1
        )


@every_size
@pytest.mark.parametrize("length", (3, 30))
def test_a_cache_holds_what_the_plan_says(name, length, tmp_path):
    """Borrowing layers have no entries; saved and loaded, the text goes on as before."""
    target, ids_T = load_target(name), ids_for(name, length + 4)
    kv = target.new_cache()
    target.forward(ids_T[:length], kv)
    kv.commit()
    assert len(kv.layers) == sum(layer.owns_kv for layer in target.config.layers)
    held = sum(array.nbytes for layer in kv.layers for array in layer.state().values())
    assert held == sum(kv_bytes(target.config, length, 4).values())
    kv.save(tmp_path / "cache.safetensors")
    again = target.load_cache(tmp_path / "cache.safetensors")
    assert same_bits(*(target.forward(ids_T[length:], each).logits_TV for each in (kv, again)))


# Experts -------------------------------------------------------------------------------------------------------------


class Counted(list):
    """A list that notes what is taken out of it."""

    def __getitem__(self, index):
        self.taken.append(int(index))
        return super().__getitem__(index)


def counting(name, keep):
    """A target of its own, and a function: read these tokens -> (its Output, for each matrix the experts taken)."""
    target, lists = minimtp.load(folders(name)[0], keep=keep), []
    for w in target.params.layers:
        for matrix in ("experts_gate_proj", "experts_up_proj", "experts_down_proj"):
            lists.append(Counted(getattr(w, matrix)))
            setattr(w, matrix, lists[-1])

    def read_counting(ids_T, kv, **options):
        for each in lists:
            each.taken = []
        out = target.forward(ids_T, kv, **options)
        return out, [each.taken for each in lists]

    return target, read_counting


@pytest.mark.parametrize("keep", ["packed", "dense"])
@pytest.mark.parametrize("name", MIXED)
def test_a_pass_reads_the_union_of_its_tokens_experts(name, keep):
    """Counted three ways: by the pass itself, by what is taken from the weights, by each token's choices alone."""
    target, read_counting = counting(name, keep)
    ids_T, top_k = ids_for(name, WIDE), text_of(name)["top_k_experts"]
    taps = [f"layer.{i}.experts" for i in range(len(target.config.layers))]
    alone, kv = [], target.new_cache()
    for token in ids_T:
        out, _ = read_counting([token], kv, taps=taps)
        assert out.experts_read == top_k * len(taps)
        alone.append([set(out.taps[tap][0].tolist()) for tap in taps])
    for width in (1, 2, 5, 16, WIDE):
        out, taken = read_counting(ids_T[:width], target.new_cache())
        union = [sorted(set.union(*(chosen[i] for chosen in alone[:width]))) for i in range(len(taps))]
        assert taken == [experts for experts in union for _ in range(3)]  # each once, for three matrices
        assert out.experts_read == sum(map(len, union))


def test_wider_passes_read_more_experts_but_less_than_in_proportion():
    target, text = load_target("26b"), text_of("26b")
    most = text["num_experts"] * len(target.config.layers)
    runs = [[target.forward(ids_for("26b", width, seed), target.new_cache()).experts_read for width in range(1, 17)]
            for seed in range(12)]  # fmt: skip
    reads = np.mean(runs, axis=0)
    assert reads[0] == text["top_k_experts"] * len(target.config.layers)
    assert (np.diff(reads) > 0).all() and reads[-1] <= most
    assert all(reads[w - 1] < 0.95 * w * reads[0] for w in range(2, 17))
    assert reads[1] - reads[0] > 2 * (reads[15] - reads[14])


@pytest.mark.parametrize("name", sorted(SIZES.keys() - MIXED))
def test_without_experts_none_are_read(name):
    target = load_target(name)
    assert target.forward([1, 2], target.new_cache()).experts_read == 0


def test_the_benchmark_says_how_many_experts_a_width_reads():
    assert "experts_by_width" not in pass_costs(load_target("e2b"), ids_for("e2b", 9), 2, repeats=1)
    target, ids_T = load_target("26b"), ids_for("26b", 9)
    counted = pass_costs(target, ids_T, 5, repeats=1)["experts_by_width"]
    kv = target.new_cache()
    target.forward(ids_T, kv)
    for width, experts in counted.items():
        assert target.forward(ids_T[-width:], kv).experts_read == experts
        kv.rollback(width)


# Centroid heads ------------------------------------------------------------------------------------------------------


@cache
def first_steps(name, unchosen, dtype="float64"):
    """Logits of the first draft step after each of several prompts -> [N, V]."""
    target, drafter = load(name, dtype, unchosen=unchosen)
    rows = []
    for seed in range(8):
        kv, ids_T = target.new_cache(), ids_for(name, 5, seed)
        hidden_TD = target.forward(ids_T[:-1], kv).hidden_TD
        rows.append(drafter.forward(ids_T[-1], hidden_TD[-1], kv)[0])
    return np.stack(rows)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CLUSTERED)
def test_logits_of_chosen_clusters_are_true_and_the_others_filled(name, dtype):
    count, top_k = SIZES[name]["assistant"]["centroids"]
    none, hf, vllm, sglang = (first_steps(name, each, dtype) for each in ("none", "transformers", "vllm", "sglang"))
    info = np.finfo(dtype)
    clusters_CN = read_tensors(folders(name)[1])["masked_embedding.token_ordering"][1].reshape(count, -1)
    for row in range(len(none)):
        chosen_V = vllm[row] != info.min
        whole = chosen_V[clusters_CN].all(1)
        assert whole.sum() == top_k and not chosen_V[clusters_CN[~whole]].any()
        assert worst(hf[row][chosen_V], none[row][chosen_V]) < (1e-12 if dtype == "float64" else 1e-4)
        assert (hf[row][~chosen_V] == hf[row][chosen_V].min() - 1).all()
        assert (sglang[row][~chosen_V] == info.min / 2).all()
        assert same_bits(vllm[row][chosen_V], hf[row][chosen_V]) and same_bits(sglang[row][chosen_V], hf[row][chosen_V])


@pytest.mark.parametrize("name", CLUSTERED)
def test_the_best_scoring_clusters_are_chosen(name):
    """The chosen ones' centroids, by plain arithmetic, score above the rest: half a step of the assistant by hand."""
    count, top_k = SIZES[name]["assistant"]["centroids"]
    target, drafter = load(name, "float64", unchosen="vllm")
    tensors = read_tensors(folders(name)[1])
    clusters_CN = tensors["masked_embedding.token_ordering"][1].reshape(count, -1)
    embedding_VD, centroids_CD = (
        tensors[key][1].astype(float) for key in ("model.embed_tokens.weight", "masked_embedding.centroids.weight")
    )
    for true_V, vllm_V in zip(first_steps(name, "none"), first_steps(name, "vllm")):
        x_D = np.linalg.lstsq(embedding_VD, true_V)[0]  # the vocabulary is larger than the width
        scores_C = centroids_CD @ x_D
        best = np.sort(np.argsort(-scores_C)[:top_k])
        assert np.array_equal(np.flatnonzero((vllm_V[clusters_CN] > np.finfo(float).min).all(1)), best)


@pytest.mark.parametrize("name", [name for name in CLUSTERED if len(set(SIZES[name]["assistant"]["centroids"])) == 2])
def test_the_fill_moves_the_soft_law_but_not_the_argmax(name):
    law = minimtp.Sampling(temperature=1.0).law
    none, hf, vllm, sglang = (first_steps(name, each) for each in ("none", "transformers", "vllm", "sglang"))
    assert (hf.argmax(-1) == vllm.argmax(-1)).all() and (hf.argmax(-1) == sglang.argmax(-1)).all()
    assert np.array_equal(law(vllm), law(sglang)) and (law(vllm)[vllm == np.finfo(float).min] == 0).all()
    for true_V, hf_V, vllm_V in zip(*map(law, (none, hf, vllm))):
        chosen_V = vllm_V > 0
        for law_V in (true_V, hf_V):  # the same among the chosen; the rest has something
            assert worst(law_V[chosen_V] / law_V[chosen_V].sum(), vllm_V[chosen_V]) < 1e-12
            assert (law_V[~chosen_V] > 0).all()
        assert worst(true_V, hf_V) > 1e-9


def test_without_the_clusters_another_token_may_be_the_most_likely():
    best = [[first_steps(name, each).argmax(-1) for each in ("none", "vllm")] for name in CLUSTERED]
    same = [np.array_equal(*pair) for pair in best]
    assert any(same) and not all(same)


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_fills_have_a_law_at_every_temperature(temperature):
    for dtype in ("float32", "float64"):
        for unchosen in ("transformers", "vllm", "sglang"):
            law_NV = minimtp.Sampling(temperature, top_k=20, top_p=0.9).law(first_steps("e4b", unchosen, dtype))
            assert np.allclose(law_NV.sum(-1), 1) and np.isfinite(law_NV).all()


# Refusals ------------------------------------------------------------------------------------------------------------

LAYER, BORROWER = "model.language_model.layers.0.", "model.language_model.layers.5."


def take_away(name):
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(name))


def add(name, shape=(2,), dtype=np.float32):
    value = ({np.float32: "F32", np.int64: "I64"}[dtype], np.ones(shape, dtype))
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({name: value}))


def set_field(field, value):
    return lambda folder: edit_json(folder, f"text_config.{field}", value)


def transpose(name):
    def swap(tensors):
        dtype, value = tensors[name]
        tensors[name] = dtype, np.ascontiguousarray(value.swapaxes(-1, -2))

    return lambda folder: edit_tensors(folder, swap)


def with_nan(name):
    def spoil(tensors):
        tensors[name][1].ravel()[-1] = np.nan

    return lambda folder: edit_tensors(folder, spoil)


PER_LAYER = ("embed_tokens_per_layer.weight", "per_layer_model_projection.weight", "per_layer_projection_norm.weight",
             "layers.0.per_layer_input_gate.weight", "layers.6.per_layer_projection.weight",
             "layers.6.post_per_layer_input_norm.weight")  # fmt: skip
OF_EXPERTS = ("router.proj.weight", "router.scale", "router.per_expert_scale", "experts.gate_up_proj",
              "experts.down_proj", "post_feedforward_layernorm_1.weight", "pre_feedforward_layernorm_2.weight",
              "post_feedforward_layernorm_2.weight")  # fmt: skip

# name -> (size, what is done to its folder, what the message must say)
WRONG = {
    **{f"no {t}": ("e2b", take_away(f"model.language_model.{t}"), f"{t}' is missing") for t in PER_LAYER},
    **{f"no {t}": ("26b", take_away(LAYER + t), f"{t.split('.')[0]}.*is missing") for t in OF_EXPERTS},
    "no single expert": ("26b_single", take_away(LAYER + "experts.11.up_proj.weight"), "11.up_proj.*is missing"),
    "no packed expert": ("26b_int4", take_away(LAYER + "experts.3.gate_proj.weight_packed"), "3.gate_proj.*missing"),
    "no expert's scale": ("26b_int4", take_away(LAYER + "experts.3.down_proj.weight_scale"), "weight_scale.*missing"),
    "an expert too many": ("26b_single", add(LAYER + "experts.12.up_proj.weight", (24, 64)), "unknown.*12.up_proj"),
    "experts twice": ("26b", add(LAYER + "experts.0.up_proj.weight", (24, 64)), "unknown.*experts.0.up_proj"),
    "experts on their side": ("26b", transpose(LAYER + "experts.gate_up_proj"), r"\[12, 64, 48\], expected \[12, 48"),
    "down on its side": ("26b", transpose(LAYER + "experts.down_proj"), r"is \[12, 24, 64\], expected \[12, 64, 24\]"),
    "integer experts": ("26b", add(LAYER + "experts.down_proj", (12, 64, 24), np.int64), "experts.down_proj.*I64"),
    "NaN in an expert": ("26b", with_nan(LAYER + "experts.down_proj"), "experts.down_proj.*NaN"),
    "NaN in a single expert": ("26b_single", with_nan(LAYER + "experts.7.up_proj.weight"), "experts.7.up_proj.*NaN"),
    "NaN in the table": ("e2b", with_nan("model.language_model.embed_tokens_per_layer.weight"), "per_layer.*NaN"),
    "experts not said": ("26b", set_field("enable_moe_block", False), "unknown tensor.*(router|experts|layernorm_)"),
    "inputs not said": ("e2b", set_field("hidden_size_per_layer_input", 0), "unknown tensor.*per_layer"),
    "inputs of another width": ("e2b", set_field("hidden_size_per_layer_input", 16), "per_layer.*expected"),
    "more experts said": ("26b", set_field("num_experts", 13), r"expected \[13"),
    "wider experts said": ("26b_single", set_field("moe_intermediate_size", 48), r"expected \[48, 64\]"),
    "more chosen than there are": ("26b", set_field("top_k_experts", 13), "top_k_experts 13 of 12"),
    "no number of experts": ("26b", set_field("num_experts", None), "num_experts is missing"),
    "another vocabulary": ("e2b", set_field("vocab_size_per_layer_input", 95), "vocab_size_per_layer_input"),
    "not double-wide": ("e2b", set_field("use_double_wide_mlp", False), r"4.mlp.*\[96, 64\], expected \[48, 64\]"),
    "double-wide": ("e4b", set_field("use_double_wide_mlp", True), r"4.mlp.*\[48, 64\], expected \[96, 64\]"),
    "fewer share": ("e4b_less", set_field("num_kv_shared_layers", 3), "k_proj.* is missing"),
    "more share than there are": ("e2b", set_field("num_kv_shared_layers", 8), "num_kv_shared_layers 8 of 7"),
    "all share": ("e2b", set_field("num_kv_shared_layers", 7), "num_kv_shared_layers|share"),
    "none of the kind to borrow from": ("e2b", set_field("num_kv_shared_layers", 6), "no full layer before"),
    "unused of another shape": ("e2b", add(BORROWER + "self_attn.k_proj.weight"), "k_proj.*expected"),
    "unknown beside the unused": ("e2b", add(BORROWER + "self_attn.k_bias"), "unknown.*k_bias"),
    "no keys where they are needed": ("e2b", take_away(LAYER + "self_attn.k_norm.weight"), "k_norm.* is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_checkpoint_is_refused_by_name(case, tmp_path):
    name, damage, message = WRONG[case]
    if name == "e4b_less":  # a checkpoint without what its layers do not use
        write_target(tmp_path / "model", 1, **E4B, unused=False)
    else:
        copy(name, tmp_path / "model")
    damage(tmp_path / "model")
    refused(message, lambda: minimtp.load(tmp_path / "model"))


def shuffle(tensors):
    tensors["masked_embedding.token_ordering"][1][0] = tensors["masked_embedding.token_ordering"][1][1]


WRONG_HEADS = {
    "no centroids": (take_away("masked_embedding.centroids.weight"), "centroids.weight' is missing"),
    "no ordering": (take_away("masked_embedding.token_ordering"), "token_ordering' is missing"),
    "a token twice": (lambda folder: edit_tensors(folder, shuffle), "permutation"),
    "ordering of floats": (add("masked_embedding.token_ordering", (96,)), "I64 permutation"),
    "ordering too short": (add("masked_embedding.token_ordering", (95,), np.int64), "expected .96"),
    "centroids too few": (add("masked_embedding.centroids.weight", (23, 32)), r"expected \[24, 32\]"),
    "not said": (lambda folder: edit_json(folder, "use_ordered_embeddings", False), "unknown.*masked_embedding"),
    "no divisor": (lambda folder: edit_json(folder, "num_centroids", 25), "25 centroids, 5 chosen, for 96 tokens"),
    "too many": (lambda folder: edit_json(folder, "centroid_intermediate_top_k", 25), "24 centroids, 25 chosen"),
    "keys": (add("model.layers.0.self_attn.k_proj.weight", (16, 32)), "unknown tensor.*k_proj"),
    "inputs": (set_field("hidden_size_per_layer_input", 8), "cannot have hidden_size_per_layer_input"),
    "some own": (set_field("num_kv_shared_layers", 3), "num_kv_shared_layers must be all"),
}


@pytest.mark.parametrize("case", WRONG_HEADS)
def test_a_wrong_assistant_is_refused_by_name(case, tmp_path):
    damage, message = WRONG_HEADS[case]
    damage(copy("e2b", tmp_path / "assistant", part=1))
    refused(message, lambda: minimtp.load_drafter(tmp_path / "assistant", load_target("e2b")))


def test_a_config_that_is_silent_about_shared_layers_means_all(tmp_path):
    """As transformers does for an assistant; 0 says as little."""
    for value in (None, 0):
        folder = copy("e2b", tmp_path / str(value), part=1)
        edit_json(folder, "text_config.num_kv_shared_layers", value)
        minimtp.load_drafter(folder, load_target("e2b"))


def test_a_unified_assistant_need_not_repeat_that_its_text_model_is_unified(tmp_path):
    folder = copy("12b", tmp_path / "assistant", part=1)
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    minimtp.load_drafter(folder, load_target("12b"))


@pytest.mark.parametrize("name, other", [("e2b", "e4b"), ("26b", "e2b"), ("12b", "e4b"), ("e4b", "12b")])
def test_an_assistant_of_another_size_is_refused(name, other):
    refused("does not fit", minimtp.load_drafter, folders(other)[1], load_target(name))


# Media ---------------------------------------------------------------------------------------------------------------

MEDIA = {"image_token_id": "an image", "video_token_id": "a video", "audio_token_id": "a sound"}


@pytest.fixture
def with_media(tmp_path):
    """A target whose placeholders 7, 8 and 9 are tokens of its small vocabulary."""
    folder = copy("e2b", tmp_path / "model")
    for token, field in enumerate(MEDIA, 7):
        edit_json(folder, field, token)
    return minimtp.load(folder)


@pytest.mark.parametrize("token, meaning", list(enumerate(MEDIA.values(), 7)))
def test_placeholders_are_refused_before_anything_is_read(with_media, token, meaning):
    kv = with_media.new_cache()
    refused(f"token {token} stands for {meaning}: only text", with_media.forward, [1, token, 2], kv)
    for prompt_T in ([token], [1] * 520 + [token]):
        refused(f"token {token} stands for {meaning}", lambda: list(generate(with_media, prompt_T, cache=kv)))  # noqa: B023
        assert kv.length == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_placeholder_is_never_drafted(tmp_path, temperature):
    """What an assistant drafts most becomes an image's placeholder: the text goes on without drafts of it."""
    folder, prompt_T = copy("26b", tmp_path / "model"), ids_for("26b", 9)

    def drafted():
        target = minimtp.load(folder)
        drafter = minimtp.load_drafter(folders("26b")[1], target)
        steps = list(generate(target, prompt_T, drafter, sampling=minimtp.Sampling(temperature), max_new_tokens=60))
        assert len(emitted(steps)) == 60
        return [token for step in steps for token in step.draft.tokens if token not in prompt_T]

    most = int(np.bincount(drafted()).argmax())
    edit_json(folder, "image_token_id", most)
    assert most not in drafted()


def test_a_placeholder_is_never_the_answer(with_media):
    """A target that likes one best gives its second best, and goes on."""

    class Fond:
        def __getattr__(self, name):
            return getattr(with_media, name)

        def forward(self, ids_T, cache, taps=(), last=None):
            out = with_media.forward(ids_T, cache, taps, last)
            out.logits_TV[:, 8] = 100
            return out

    tokens = emitted(generate(Fond(), [1, 2, 3], max_new_tokens=9))
    assert len(tokens) == 9 and 8 not in tokens


def test_ids_outside_a_small_vocabulary_stand_for_nothing():
    assert load_target("e2b").config.placeholders == {}


def test_towers_beside_every_layout_are_skipped(tmp_path):
    for name, tower in (("e4b", "model.audio_tower.x.weight"), ("12b", "model.vision_embedder.x.weight"),
                        ("12b", "model.embed_audio.x.weight")):  # fmt: skip
        folder = copy(name, tmp_path / f"{name}{tower}")
        add(tower)(folder)
        assert same_bits(logits(minimtp.load(folder), [1, 2]), logits(load_target(name), [1, 2]))
