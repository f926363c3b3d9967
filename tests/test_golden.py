"""Golden runs: what is written can be replayed, and what another engine gets wrong is named, first things first."""

import json
from copy import copy
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

import minimtp
from minimtp import PromptLookup, Sampling, accept, gemma4, golden, qwen35
from minimtp.checkpoint import CheckpointError, write_safetensors
from minimtp.drafting import Draft
from minimtp.golden import compare, first_line, make, read_dump, read_golden, record, replay, report_text
from minimtp.layers import rotate

GREEDY, DRAWN = Sampling(temperature=0.0), Sampling(temperature=1.2, top_k=300)
FAMILIES = ("tiny-gemma4", "tiny-qwen35")


@cache
def pair(name, dtype="float32"):
    target = minimtp.load(name, dtype=dtype)
    return target, minimtp.load_drafter("auto", target)


@cache
def made(name, sampling=GREEDY, draft_sampling=None, rule="rejection", lookup=False):
    """(record, float32 replay, float64 replay) of a run."""
    pairs = [(t, PromptLookup()) if lookup else (t, d) for t, d in (pair(name), pair(name, "float64"))]
    prompt = pairs[0][0].tokenizer.encode("ROMEO:\nBut soft, what")
    run = record(*pairs[0], prompt, 3, rule, sampling, draft_sampling, 14, 1)
    return run, *(replay(run, *one) for one in pairs)


def written(folder, name, *options, whole=True):
    """(golden.json, arrays) of a run as read back."""
    run, plain, precise = made(name, *options)
    make(folder, json.loads(json.dumps(run)), plain, precise, whole)
    return read_golden(folder)


def first_of(folder, name, dump, *options):
    report = compare(*written(folder, name, *options), dump, "float32")
    assert report["passed"] == (report["first"] is None)
    return report["first"]


# What is written


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("options, whole", [
    ((), True), ((DRAWN,), False), ((DRAWN, GREEDY), True),
    ((DRAWN, None, "block"), False), ((DRAWN, None, "match"), True),
])  # fmt: skip
def test_a_run_of_ours_is_its_own_reference(tmp_path, name, options, whole):
    run, arrays = written(tmp_path, name, *options, whole=whole)
    report = compare(run, arrays, made(name, *options)[1], "float32")
    assert report["passed"] and first_line(report["first"]) == "no difference beyond what precision explains"
    names = {one["name"] for one in report["compared"]}
    assert {"layer.0.attn", "final_norm", "draft", "decisions", "cache_lengths"} < names
    assert ("p" in names) == whole and ("logits" in names) == whole and ("logits.top" in names) != whole
    assert compare(run, arrays, made(name, *options)[2], "float64")["passed"]
    assert max(one["worst"] for one in report["compared"] if "worst" in one) > 0.01  # it is no comparison with itself


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("options", [(GREEDY,), (DRAWN,), (DRAWN, GREEDY)])
def test_an_engine_can_replay_it_from_the_files_alone(tmp_path, name, options):
    run, arrays = written(tmp_path, name, *options)
    text, cache_ids = list(run["prompt"]), []
    for step in run["steps"]:
        K, drafts, laws = len(step["draft"]), step["draft_row"], step["law_row"]
        assert step["position"] == len(cache_ids) and step["read"] == [*text[len(cache_ids) :], *step["draft"]]
        q_KV = arrays["q"][drafts : drafts + K] if "q" in arrays and K else None
        for token, u, q_V in zip(step["draft"], step["draft_uniforms"], [] if q_KV is None else q_KV):
            assert minimtp.draw(q_V, u) == token
        p_JV = arrays["p"][laws : laws + K + 1]
        verdict = accept(run["rule"], p_JV, Draft(step["draft"], q_KV), step["uniforms"])
        assert (verdict.accepted, verdict.token) == (step["accepted"], step["token"])
        assert step["p"] == [p_V[token] for p_V, token in zip(p_JV, step["draft"])]
        text += [*step["draft"][: step["accepted"]], step["token"]]
        cache_ids = text[: step["cache_length"]]
        assert len(cache_ids) == len(text) - 1
        rows = arrays["logits"][step["row"] + len(step["read"]) - K - 1 :][: K + 1]
        np.testing.assert_allclose(Sampling(**run["sampling"]).law(rows), p_JV, atol=1e-5)
    assert text == run["text"]
    assert arrays["logits"].dtype == arrays["layer.1.mlp"].dtype == np.float32 and arrays["p"].dtype == np.float64


def test_what_is_kept_of_large_vocabularies(tmp_path):
    run, whole = written(tmp_path, "tiny-gemma4", DRAWN)
    _, kept = written(tmp_path, "tiny-gemma4", DRAWN, whole=False)
    assert not {"logits", "draft.logits", "p", "q"} & set(kept)
    for name in ("logits", "draft.logits"):
        logits_TV, ids_TM = whole[name].astype(float), kept[f"{name}.top_ids"]
        assert ids_TM.shape == (len(logits_TV), golden.TOP)
        np.testing.assert_allclose(kept[f"{name}.top"], np.sort(logits_TV)[:, : -golden.TOP - 1 : -1], rtol=1e-6)
        np.testing.assert_allclose(kept[f"{name}.top"], np.take_along_axis(logits_TV, ids_TM, -1), rtol=1e-6)
        np.testing.assert_allclose(kept[f"{name}.logsumexp"][:, 0], np.log(np.exp(logits_TV).sum(-1)), rtol=1e-6)
    assert run["steps"][2]["p"] and run["steps"][2]["q"]


def test_half_a_run_is_none(tmp_path, monkeypatch):
    written(tmp_path, "tiny-gemma4")
    monkeypatch.setattr(golden, "write_safetensors", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        written(tmp_path, "tiny-gemma4")
    with pytest.raises(CheckpointError, match="golden.json: no such file"):
        read_golden(tmp_path)


def test_prompt_lookup_has_drafts_and_no_laws_of_them(tmp_path):
    options = DRAWN, None, "rejection", True
    run, arrays = written(tmp_path, "tiny-gemma4", *options)
    assert any(step["draft"] for step in run["steps"])
    assert "draft.logits" not in arrays and compare(run, arrays, made("tiny-gemma4", *options)[1], "float32")["passed"]


@pytest.mark.parametrize("whole", [True, False])
def test_one_row_for_each_position_will_do(tmp_path, whole):
    run, arrays = written(tmp_path, "tiny-gemma4", DRAWN, whole=whole)
    target, _ = pair("tiny-gemma4")
    ids = run["text"][: run["steps"][-1]["cache_length"]]
    out = target.forward(ids, target.new_cache(), taps=["layer.3.out"])
    assert len(ids) < len(arrays["embed"])
    dump = {"logits": out.logits_TV, **out.taps}
    assert compare(run, arrays, dump, "float32")["passed"]
    dump["layer.3.out"][11, 7] += 0.01
    first = compare(run, arrays, dump, "float32")["first"]
    assert (first["name"], first["position"], first["element"]) == ("layer.3.out", 11, 7)


# What is wrong is named


def with_params(target, **changes):
    """The target with other parameters."""
    return replace(target, params=SimpleNamespace(**{**vars(target.params), **changes}))


def with_layer(target, i, **changes):
    """The target with other parameters in layer i."""
    layers = list(target.params.layers)
    layers[i] = SimpleNamespace(**{**vars(layers[i]), **changes})
    return with_params(target, layers=layers)


def test_a_wrong_soft_cap(tmp_path):
    target, drafter = pair("tiny-gemma4")
    wrong = replace(target, config=replace(target.config, final_logit_softcapping=50.0))
    dump = replay(made("tiny-gemma4")[0], wrong, replace(drafter, target=wrong))
    first = first_of(tmp_path, "tiny-gemma4", dump)
    assert (first["name"], first["position"]) == ("logits", 0) and first["ratio"] > 1e3
    first = compare(*written(tmp_path, "tiny-gemma4", whole=False), dump, "float32")["first"]
    assert (first["name"], first["position"]) == ("logits.top", 0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("i", [0, 3])
def test_another_layers_norm(tmp_path, name, i):
    target, drafter = pair(name)
    wrong = with_layer(target, i, input_layernorm=target.params.layers[i - 1].input_layernorm)
    first = first_of(tmp_path, name, replay(made(name)[0], wrong, replace(drafter, target=wrong)))
    assert (first["name"], first["position"]) == (f"layer.{i}.attn", 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rope_of_another_position(tmp_path, name, monkeypatch):
    module = {"tiny-gemma4": gemma4, "tiny-qwen35": qwen35}[name]
    target, drafter = pair(name)
    real, turn, rotary = module.attention, module.turn_and_keep, 3  # layer 3 attends in both families

    def shifted(x_TD, w, layer, eps, rope, *rest):
        """Queries of layer 3 one place further on than its keys."""
        with monkeypatch.context() as patch:
            if w is target.params.layers[rotary]:
                patch.setattr(module, "turn_and_keep", lambda *args, **options: further(turn(*args, **options)))
            return real(x_TD, w, layer, eps, rope, *rest)

    def further(q_THK):
        """The queries turned by the angles of position 1 as well."""
        if name == "tiny-gemma4":
            kind = target.config.layers[rotary].kind
            return rotate(q_THK, gemma4.rope_tables(target.config, np.array([1]), q_THK.dtype)[kind])
        return rotate(q_THK, qwen35.rope_at(target.config, np.array([1]), q_THK.dtype))

    monkeypatch.setattr(module, "attention", shifted)
    first = first_of(tmp_path, name, replay(made(name)[0], target, drafter))
    assert (first["name"], first["position"]) == ("layer.3.attn", 1)  # alone with itself, a token sees no angle


def test_a_drafter_at_another_position(tmp_path):
    target, drafter = pair("tiny-gemma4")
    dump = replay(made("tiny-gemma4")[0], target, replace(drafter, position="committed"))
    first, prompt = first_of(tmp_path, "tiny-gemma4", dump), made("tiny-gemma4")[0]["prompt"]
    assert (first["name"], first["step"], first["position"]) == ("draft.logits", 1, len(prompt) + 1)


def test_a_drafter_given_hidden_states_before_the_norm(tmp_path):
    target, drafter = pair("tiny-qwen35")
    dump = replay(made("tiny-qwen35")[0], target, replace(drafter, hidden="pre-norm"))
    first = first_of(tmp_path, "tiny-qwen35", dump)
    assert (first["name"], first["step"]) == ("draft.logits", 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_rejected_tokens_that_stay_visible(tmp_path, name):
    """A state or keys that keep a rejected draft: right up to the first rejection, wrong in layer 0 from then on."""
    target, drafter = pair(name)
    run = made(name, DRAWN)[0]
    rejected = next(i for i, step in enumerate(run["steps"]) if step["accepted"] < len(step["draft"]))
    first = first_of(tmp_path, name, replay(run, Forgetful(target), drafter), DRAWN)
    assert (first["name"], first["step"]) == ("layer.0.attn", rejected + 1)
    assert first["position"] == run["steps"][rejected]["cache_length"]


class Forgetful:
    """A target whose first layer un-reads nothing."""

    def __init__(self, target):
        self.target = target

    def __getattr__(self, name):
        return getattr(self.target, name)

    def new_cache(self):
        cache = self.target.new_cache()
        cache.layers[0].rollback = lambda n: None
        return cache


def test_a_defect_in_the_rule(tmp_path):
    run, plain, _ = made("tiny-gemma4", DRAWN)
    assert any(step["accepted"] < len(step["draft"]) for step in run["steps"])
    everything = [[len(step["draft"]), step["token"]] for step in run["steps"]]
    first = first_of(tmp_path, "tiny-gemma4", {**plain, "decisions": np.array(everything)}, DRAWN)
    i = next(i for i, step in enumerate(run["steps"]) if step["accepted"] < len(step["draft"]))
    step, test = run["steps"][i], first["test"]
    assert (first["name"], first["step"], test["draft"]) == ("decisions", i, step["accepted"])
    assert test["u"] >= test["p"] / test["q"] and "u = " in first_line(first)


def test_a_law_whose_filter_comes_before_the_temperature(tmp_path):
    run, plain, _ = made("tiny-gemma4", Sampling(temperature=0.5, top_p=0.8), GREEDY)
    ends = [(step["row"] + len(step["read"]), len(step["draft"])) for step in run["steps"]]
    rows = [plain["logits"][end - K - 1 : end] for end, K in ends]
    kept = Sampling(top_p=0.8).law(np.concatenate(rows)) > 0
    p_JV = np.where(kept, Sampling(0.5).law(np.concatenate(rows)), 0)
    dump = {**plain, "p": p_JV / p_JV.sum(-1, keepdims=True)}
    first = first_of(tmp_path, "tiny-gemma4", dump, Sampling(temperature=0.5, top_p=0.8), GREEDY)
    assert first["name"] == "p"


def test_other_drafts_and_cache_lengths(tmp_path):
    run, plain, _ = made("tiny-gemma4")
    draft, lengths = plain["draft"].copy(), plain["cache_lengths"].copy()
    draft[4] += 1
    lengths[2:] += 1
    first = first_of(tmp_path, "tiny-gemma4", {**plain, "draft": draft})
    assert (first["name"], first["found"]) == ("draft", first["expected"] + 1)
    first = first_of(tmp_path, "tiny-gemma4", {**plain, "cache_lengths": lengths})
    assert (first["name"], first["step"]) == ("cache_lengths", 2)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_what_a_coarser_precision_explains_is_no_difference(tmp_path, precision):
    """An engine that rounds every hidden state, and its logits, errs by some roundings; a bug by more."""
    run, arrays = written(tmp_path, "tiny-gemma4")
    random, epsilon = np.random.default_rng(0), golden.EPSILON[precision]
    dump = {}
    for name in ("layer.2.out", "logits"):
        scale = arrays[f"noise.{name}"][:, None] * (epsilon / golden.EPSILON["float32"])
        dump[name] = arrays[name] + scale * random.uniform(-1, 1, arrays[name].shape)
    assert compare(run, arrays, dump, precision)["passed"]
    assert compare(run, arrays, dump, "float32")["first"]["name"] == "layer.2.out"
    dump["logits"] *= 1 + 300 * epsilon
    assert compare(run, arrays, dump, precision)["first"]["name"] == "logits"


def test_a_dump_says_its_precision_by_how_it_is_stored(tmp_path):
    run, arrays = written(tmp_path, "tiny-gemma4")
    logits = arrays["logits"]
    bits = (logits.view(np.uint32) >> 16).astype(np.uint16)
    write_safetensors(tmp_path / "dump.safetensors", {"logits": ("BF16", bits), "final_norm": arrays["final_norm"]})
    dump, precisions = read_dump(tmp_path / "dump.safetensors")
    assert precisions == {"logits": "bfloat16", "final_norm": "float32"}
    assert compare(run, arrays, dump, precisions)["passed"]
    assert compare(run, arrays, dump, "float32")["first"]["name"] == "logits"


def test_what_is_not_a_number_differs(tmp_path):
    dump = copy(made("tiny-gemma4")[1])
    dump["layer.1.mlp"] = dump["layer.1.mlp"].copy()
    dump["layer.1.mlp"][3, 5] = np.nan
    report = compare(*written(tmp_path, "tiny-gemma4"), dump, "float32")
    assert (report["first"]["name"], report["first"]["element"]) == ("layer.1.mlp", 5)
    assert json.loads(json.dumps(report, allow_nan=False)) == report and "layer.1.mlp" in report_text(report)


# What cannot be


def test_a_dump_that_cannot_be_compared_is_refused(tmp_path):
    run, arrays = written(tmp_path, "tiny-gemma4")
    with pytest.raises(CheckpointError, match="nothing to compare"):
        compare(run, arrays, {"layers.0.out": arrays["layer.0.out"]}, "float32")
    for change in (lambda x: x[:-1], lambda x: x[:, :-1], lambda x: x[0], lambda x: x.astype(int)):
        with pytest.raises(CheckpointError, match="layer.0.out is .*, expected floats"):
            compare(run, arrays, {"layer.0.out": change(arrays["layer.0.out"])}, "float32")
    logits = arrays["logits"]
    run, arrays = written(tmp_path, "tiny-gemma4", whole=False)
    assert compare(run, arrays, {"logits": logits}, "float32")["passed"]
    for change in (lambda x: x[:-1], lambda x: x[:, :-1], lambda x: x[0]):
        with pytest.raises(CheckpointError, match="logits has shape"):
            compare(run, arrays, {"logits": change(logits)}, "float32")
    with pytest.raises(CheckpointError, match="decisions has shape"):
        compare(run, arrays, {"decisions": np.zeros(3, int)}, "float32")


def set_step(i, **changes):
    return lambda run: run["steps"][i].update(changes)


@pytest.mark.parametrize(
    "change",
    [
        lambda run: run.update(format="minimtp-golden 0"),
        lambda run: run.pop("text"),
        lambda run: run.update(steps={}),
        lambda run: run.update(steps=[1]),
        lambda run: run.update(rule="wishful"),
        lambda run: run["sampling"].update(temperature="hot"),
        lambda run: run["sampling"].update(colour=1),
        lambda run: run["model"].update(layers="5"),
        lambda run: run["model"].update(vocab_size=10),
        set_step(1, cache_length=99),
        set_step(1, position=-1),
        set_step(1, row=0),
        set_step(1, read=[1.5, 2, 3, 4]),
        set_step(1, read="abcd"),
        set_step(1, uniforms=[0.5]),
        set_step(1, uniforms=[2.0, 0.5, 0.5, 0.5]),
        set_step(1, p=[]),
        set_step(1, accepted="all"),
        set_step(2, draft=[1, 2]),
        set_step(2, token=5),
        lambda run: run["text"].append(3),
        lambda run: run.update(prompt=[1]),
    ],
)
def test_a_file_that_is_no_golden_run_is_refused_in_one_line(tmp_path, change):
    run, _ = written(tmp_path, "tiny-gemma4")
    change(run)
    (tmp_path / "golden.json").write_text(json.dumps(run))
    with pytest.raises(CheckpointError, match=r"golden\.json: ") as error:
        read_golden(tmp_path)
    assert "\n" not in str(error.value)


def test_arrays_that_do_not_belong_to_it_are_refused(tmp_path):
    _, arrays = written(tmp_path, "tiny-gemma4")
    embed = arrays["embed"]
    for change in (
        {"embed": embed[1:]},
        {"embed": embed[:, 0]},
        {"embed": np.float32(1)},
        {"embed": embed.astype(np.int32)},
        {"noise.embed": None},
        {"embed.top_ids": np.full((len(embed), 3), 1216)},
    ):
        changed = {name: x for name, x in {**arrays, **change}.items() if x is not None}
        write_safetensors(tmp_path / "golden.safetensors", changed)
        with pytest.raises(CheckpointError, match="embed"):
            read_golden(tmp_path)


def test_a_run_on_the_edge_makes_no_reference(tmp_path):
    run, plain, precise = made("tiny-gemma4")
    other = {**precise, "decisions": precise["decisions"] + 1}
    with pytest.raises(ValueError, match="decide differently"):
        make(tmp_path, run, plain, other)
