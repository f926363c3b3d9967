"""`check --hf`: nothing differs on any layout; what is planted in the other's checkpoint is named at its layer."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import random_models
import random_qwen
import random_sizes
import torch
from safetensors.torch import load_file, save_file

import minimtp
from minimtp import hf_check
from minimtp.cli import main

torch.set_num_threads(1)
SEED = 200
CASES = [
    *(("gemma", name) for name in random_models.CONFIGS),
    *(("size", name) for name in random_sizes.SIZES),
    *(("qwen", name) for name in random_qwen.CONFIGS),
]


def written(kind, name, folder):
    """A random checkpoint and a prompt for it."""
    if kind == "qwen":
        return random_qwen.write_qwen(name, folder / "qwen", SEED), random_qwen.prompt(name, SEED)
    module = {"gemma": random_models, "size": random_sizes}[kind]
    return module.write_pair(name, folder, SEED)[0], module.prompt(name, SEED)


@pytest.mark.parametrize("kind, name", CASES)
def test_nothing_differs(kind, name, tmp_path):
    folder, ids_T = written(kind, name, tmp_path)
    report = hf_check.check(folder, ids_T)
    assert report["passed"] and report["first"] is None, hf_check.report_text(report)
    assert bool(report["unpacked"]) == ("int4" in name)
    names = [row["name"] for row in report["rows"]]
    assert names[:3] == ["embed", "layer.0.attn", "layer.0.mlp"] and names[-4:] == [
        "final_norm", "logits", "chained final_norm", "chained logits"
    ]  # fmt: skip
    assert all(row["float32"]["difference"] > 0 for row in report["rows"] if row["name"].startswith("layer"))
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("name", ["tiny-gemma4", "tiny-gemma4-float", "tiny-qwen35"])
def test_nothing_differs_in_the_bundled_models(name):
    folder = minimtp.loading.bundled(name)
    ids_T = minimtp.load(folder).tokenizer.encode(minimtp.loading.bundled("heldout.txt").read_text())[:100]
    report = hf_check.check(folder, ids_T)
    assert report["passed"] and report["past_window"]
    text = hf_check.report_text(report)
    assert text.endswith(f"no difference beyond rounding over 100 tokens and {len(report['kinds'])} layers")


# Planted differences -------------------------------------------------------------------------------------------------


def changed(folder, change, config=None):
    """A copy of a checkpoint, its tensors or its configuration changed in place."""
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    for file in sorted(other.glob("*.safetensors")) if change else ():
        tensors = load_file(file)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    if config:
        text = json.loads((other / "config.json").read_text())
        config(text.get("text_config", text))
        (other / "config.json").write_text(json.dumps(text))
    return other


def named(tensors, part):
    found = [name for name in tensors if part in name]
    assert len(found) <= 1
    return found


def scaled(part, factor):
    def change(tensors):
        for name in named(tensors, part):
            tensors[name] = tensors[name] * factor

    return change


def swapped(one, other):
    def change(tensors):
        for a, b in zip(named(tensors, one), named(tensors, other), strict=True):
            tensors[a], tensors[b] = tensors[b], tensors[a]

    return change


def theta(kind=None):
    def change(text):
        rope = text["rope_parameters"]
        (rope[kind] if kind else rope)["rope_theta"] *= 1.01

    return change


GEMMA, PLE, MOE, QWEN, EXPERTS = (
    ("gemma", "two_kinds"), ("size", "e2b"), ("size", "26b"), ("qwen", "interval"), ("qwen", "moe"),
)  # fmt: skip
PLANTED = {
    "input norm": (GEMMA, scaled("layers.2.input_layernorm", 1.001), None, "layer.2.attn"),
    "query norm": (GEMMA, scaled("layers.1.self_attn.q_norm", 1.001), None, "layer.1.attn"),
    "norm after the feed-forward": (GEMMA, scaled("layers.1.post_feedforward_layernorm", 1.001), None, "layer.1.out"),
    "gate for up": (GEMMA, swapped("layers.3.mlp.gate_proj", "layers.3.mlp.up_proj"), None, "layer.3.mlp"),
    "layer scalar": (GEMMA, scaled("layers.0.layer_scalar", 1.001), None, "layer.0.out"),
    "embedding": (GEMMA, scaled("embed_tokens.weight", 1.001), None, "embed"),
    "final norm": (GEMMA, scaled("language_model.norm.weight", 1.001), None, "final_norm"),
    "sliding theta": (GEMMA, None, theta("sliding_attention"), "layer.0.attn"),
    "full theta": (GEMMA, None, theta("full_attention"), "layer.1.attn"),
    "window": (GEMMA, None, lambda text: text.update(sliding_window=9), "layer.0.attn"),
    "soft cap": (GEMMA, None, lambda text: text.update(final_logit_softcapping=29.0), "logits"),
    "norm's epsilon": (GEMMA, None, lambda text: text.update(rms_norm_eps=1e-5), "layer.0.attn"),
    "per-layer gate": (PLE, scaled("layers.2.per_layer_input_gate", 1.001), None, "layer.2.out"),
    "per-layer embedding": (PLE, scaled("embed_tokens_per_layer", 1.01), None, "layer.0.out"),
    "lent keys": (PLE, scaled("layers.1.self_attn.k_norm", 1.01), None, "layer.1.attn"),
    "router": (MOE, scaled("layers.1.router.per_expert_scale", 1.001), None, "layer.1.mlp"),
    "experts": (MOE, scaled("layers.3.experts.down_proj", 1.001), None, "layer.3.mlp"),
    "zero-centred norm": (QWEN, scaled("layers.4.post_attention_layernorm", 1.001), None, "layer.4.mlp"),
    "b for a": (QWEN, swapped("layers.1.linear_attn.in_proj_a", "layers.1.linear_attn.in_proj_b"), None,
                "layer.1.attn"),
    "convolution": (QWEN, scaled("layers.4.linear_attn.conv1d", 1.001), None, "layer.4.attn"),
    "theta": (QWEN, None, theta(), "layer.2.attn"),
    "head": (("qwen", "three_to_one"), scaled("lm_head.weight", 1.001), None, "logits"),
    "shared expert": (EXPERTS, scaled("layers.2.mlp.shared_expert_gate", 1.01), None, "layer.2.mlp"),
}  # fmt: skip


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_planted_is_named(what, tmp_path):
    (kind, name), change, config, at = PLANTED[what]
    folder, ids_T = written(kind, name, tmp_path)
    report = hf_check.check(folder, ids_T, reference=changed(folder, change, config))
    assert not report["passed"] and report["first"]["name"] == at
    first = report["first"]["float64"]
    assert first["ratio"] > 1e5
    assert hf_check.report_text(report).splitlines()[-1].startswith(f"first difference: {at}, position ")
    layers = [row["name"] for row in report["rows"] if row["name"].endswith(".out") and not row["passed"]]
    if at.startswith("layer") and config is None and "per-layer emb" not in what:  # one layer's error is not another's
        lenders = {"lent keys": len(report["kinds"])}.get(what, 1)
        assert 1 <= len(layers) <= lenders


def test_a_slip_of_float32_alone_is_found(monkeypatch, tmp_path):
    """float64 is right, float32 has lost digits."""
    folder, ids_T = written(*GEMMA, tmp_path)
    ours = hf_check._ours

    def rounded(path, dtype, *rest):
        taps, *draft = ours(path, dtype, *rest)
        if dtype == "float32":
            taps["layer.1.mlp"] = taps["layer.1.mlp"].astype(np.float16).astype(np.float32)
        return taps, *draft

    monkeypatch.setattr(hf_check, "_ours", rounded)
    report = hf_check.check(folder, ids_T)
    assert [row["name"] for row in report["rows"] if not row["passed"]] == ["layer.1.mlp"]
    assert "times what float32 explains" in hf_check.first_line(report)


@pytest.mark.parametrize("case", [("size", "26b"), ("qwen", "moe")])
def test_a_tie_between_experts_is_no_difference_but_another_choice_is(case, monkeypatch, tmp_path):
    folder, ids_T = written(*case, tmp_path)
    ours, theirs, gap = hf_check._ours, hf_check._theirs, 1e-6

    def otherwise(path, dtype, *rest):
        taps, *draft = ours(path, dtype, *rest)
        if dtype == "float32":
            taps["layer.1.experts"][5, 0] = 1 + taps["layer.1.experts"][5].max()
            taps["layer.1.mlp"][5] *= 1.5
        return taps, *draft

    def near(weights, ids_T, runs, dtype, seen):
        def nearer(name, x, gap_N=None):
            if name == "layer.1.experts":
                gap_N = gap_N.copy()
                gap_N[5] = gap
            seen(name, x, gap_N)

        theirs(weights, ids_T, runs, dtype, nearer)

    monkeypatch.setattr(hf_check, "_ours", otherwise)
    monkeypatch.setattr(hf_check, "_theirs", near)
    assert hf_check.check(folder, ids_T)["passed"]
    gap = 1e-2
    assert hf_check.check(folder, ids_T)["first"]["name"] == "layer.1.mlp"


def test_a_short_prompt_says_so(tmp_path):
    folder, ids_T = written(*GEMMA, tmp_path)
    report = hf_check.check(folder, ids_T[:8])
    assert report["passed"] and not report["past_window"]
    assert "8 tokens do not reach past the sliding window of 8" in hf_check.report_text(report)


def test_one_layer_is_held_at_a_time(tmp_path, monkeypatch):
    folder, ids_T = written("size", "everything", tmp_path)
    empty, held, most = hf_check._empty_model, [], []

    def watched(*arguments):
        model = empty(*arguments)
        held.append(model)
        for layer in model.layers:
            layer.register_forward_pre_hook(
                lambda *_: most.append(sum(not next(each.parameters()).is_meta for each in model.layers))
            )
        return model

    monkeypatch.setattr(hf_check, "_empty_model", watched)
    assert hf_check.check(folder, ids_T)["passed"]
    assert max(most) <= 1 and len(most) == 2 * len(held[0].layers)


def test_our_own_slips_are_found(monkeypatch, tmp_path):
    folder, ids_T = written(*GEMMA, tmp_path)
    monkeypatch.setattr(minimtp.gemma4, "softcap", lambda logits_TV, cap: logits_TV)
    assert hf_check.check(folder, ids_T)["first"]["name"] == "logits"
    rotate = minimtp.layers.rotate
    monkeypatch.setattr(minimtp.layers, "rotate", lambda x, rope: rotate(x, (rope[0], 0.99 * rope[1])))
    assert hf_check.check(folder, ids_T)["first"]["name"] == "layer.0.attn"


def test_what_is_missing_is_named():
    code = "import sys; sys.modules['torch'] = None; from minimtp import hf_check; hf_check.check('tiny-gemma4', [1])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1].endswith("BackendError: this check needs torch: pip install 'minimtp[hf]'")


def test_the_pass_leaves_torch_as_it_was(tmp_path):
    before = torch.Tensor.to, torch.Tensor.float, torch.Tensor.__rpow__, torch.nn.functional.softmax
    hf_check.check(*written(*GEMMA, tmp_path))
    assert before == (torch.Tensor.to, torch.Tensor.float, torch.Tensor.__rpow__, torch.nn.functional.softmax)


# Assistants ----------------------------------------------------------------------------------------------------------

PAIRS = [*(("gemma", name) for name in random_models.CONFIGS), *(("size", name) for name in random_sizes.SIZES)]


@pytest.mark.parametrize("kind, name", PAIRS)
def test_the_assistant(kind, name, tmp_path):
    folder, ids_T = written(kind, name, tmp_path)
    report = hf_check.check(folder, ids_T, draft=tmp_path / "assistant")
    assert report["passed"], hf_check.report_text(report)
    rows = report["rows"][-2:]
    assert [row["name"] for row in rows] == ["drafter hidden", "drafter logits"]
    assert all(row["float32"]["difference"] > 0 for row in rows)
    assert f"drafter: {tmp_path / 'assistant'}" in hf_check.report_text(report)


def test_the_assistant_beside_its_target():
    report = hf_check.check(minimtp.loading.bundled("tiny-gemma4"), list(range(9, 40)))
    assert report["passed"] and report["drafter"].endswith("tiny-gemma4-assistant")
    none = hf_check.check(minimtp.loading.bundled("tiny-gemma4"), list(range(9, 40)), draft="none")
    assert none["drafter"] is None and len(none["rows"]) == len(report["rows"]) - 2


def test_an_assistant_at_another_position_is_found(tmp_path, monkeypatch):
    folder, ids_T = written(*GEMMA, tmp_path)

    def elsewhere(*arguments, **named):
        return replace(minimtp.load_drafter(*arguments, **named), position="committed")

    monkeypatch.setattr(hf_check, "load_drafter", elsewhere)
    report = hf_check.check(folder, ids_T, draft=tmp_path / "assistant")
    assert report["first"]["name"] == "drafter hidden" and report["first"]["float64"]["ratio"] > 1e5


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command(capsys):
    assert main(["check", "--hf", "tiny-qwen35", "--tokens", "20"]) == 0
    assert capsys.readouterr().out.endswith("no difference beyond rounding over 20 tokens and 8 layers\n")
    other = ["check", "tiny-gemma4-float", "--hf", "tiny-gemma4", "--tokens", "5", "--draft", "none", "--json"]
    assert main(other) == 1
    assert json.loads(capsys.readouterr().out)["first"]["name"] == "embed"


@pytest.mark.parametrize("arguments, said", [
    (["--hf", "nowhere"], "no such file or folder"),
    (["--hf", "tiny-gemma4-assistant"], "is not a target"),
    (["--hf", "tiny-gemma4", "--tokens", "0"], "--tokens is 0, wanted 1 or more"),
])  # fmt: skip
def test_bad_use_is_one_line(arguments, said, capsys):
    assert main(["check", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
