"""The plan of what fits: every row of published tables, to the MiB, and what people may type."""

import json
import re
import sys
import tracemalloc
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import minimtp
from minimtp import loading, memory, plan
from minimtp.checkpoint import read_json
from minimtp.cli_show import parse_memory
from minimtp.loading import bundled, published_config
from minimtp.plan import MIB, DoesNotFit, make_plan
from minimtp.synth import synthesize

CARD = 24 << 30
PUBLISHED = read_json(Path(minimtp.__file__).parent / "published.json")
VISION = 23_265_352_448 - 22_113_591_928  # of the 31B's w4a16-ct file


@cache
def tables(name):
    family, config = published_config(name)
    return config, family.tensors(config)


def planned(name, format, kv, context, drafter="bf16", vision=0, **options):
    """A Gemma's plan beside its assistant."""
    config, table = tables(name)
    weights = memory.stored_parts(table, format) | ({("vision", "BF16"): vision} if vision else {})
    drafter = drafter and memory.stored_parts(tables(f"{name}-assistant")[1], drafter)
    return make_plan(name, config, weights, context, kv, drafter=drafter, **{"memory": CARD, **options})


# format, other bytes, weights, then for bf16 and for int8 KV at 40,960 tokens: all of it, what is left, and the longest
# context that leaves 400 MiB. Where something is missing, the table this is from cuts what is left towards 0.
ROWS = [
    ("bf16", 0, 58_551, (63_459, -39_482, None), (61_462, -37_485, None)),
    ("q4_0", 0, 16_818, (21_726, 2_249, 64_636), (19_729, 4_246, 139_049)),
    ("q4_0-all", 0, 16_472, (21_380, 2_596, 69_072), (19_383, 4_593, 147_885)),
    ("w4a16-ct", 0, 18_401, (23_309, 666, 44_375), (21_312, 2_663, 98_683)),
    ("int4-int8-embed", 0, 17_058, (21_966, 2_009, 61_565), (19_969, 4_006, 132_930)),
    ("w4a16-ct-stored", 0, 21_089, (25_997, -2_021, 9_968), (24_000, -24, 30_138)),
    ("w4a16-ct-stored", VISION, 22_188, (27_096, -3_119, None), (25_099, -1_122, 2_128)),
    ("int4-rows", 0, 16_672, (21_580, 2_396, 66_512), (19_583, 4_393, 142_786)),
    ("int4-rows-int8-embed", 0, 15_329, (20_237, 3_739, 83_702), (18_240, 5_736, 177_033)),
]  # fmt: skip


@pytest.mark.parametrize("format, vision, weights, bf16, int8", ROWS)
def test_the_31b_on_24_gib(format, vision, weights, bf16, int8):
    for kv, (total, left, longest) in {"bf16": bf16, "int8": int8}.items():
        found = planned("gemma-4-31b", format, kv, 40_960, vision=vision, scratch=400 * MIB)
        sums = found.sums
        assert round(sums["weights"] / MIB) == weights
        assert round((sums["weights"] + sums["drafter"] + sums["kv"]) / MIB) == total
        assert int(found.left / MIB) == left and found.as_dict()["left_mib"] == left - (left < 0)
        assert found.fits == (left >= 400)
        if longest is None:  # the table reckons with whole windows
            assert found.max_context < 1024
        else:
            assert found.max_context == longest
            assert found.at(longest).fits and not found.at(longest + 1).fits


@pytest.mark.parametrize("kv, sizes", [
    ("bf16", {8_192: 1_452.5, 40_960: 4_012.5, 131_072: 11_052.5, 262_144: 21_292.5}),
    ("int8", {8_192: 730.7, 40_960: 2_015.7, 131_072: 5_549.4, 262_144: 10_689.4}),
    ("bf16-v", {262_144: 10_240 + 812.5, 40_960: 4_012.5 - 1_600}),
    ("int8-v", {262_144: 5_140 + 409.4}),
])  # fmt: skip
def test_kv_of_the_31b(kv, sizes):
    for context, expected in sizes.items():
        held = planned("gemma-4-31b", "q4_0", kv, context).sums["kv"]
        assert held / MIB == pytest.approx(expected, abs=0.06)


KV = {  # bf16 at 8,192, 40,960 and 131,072 tokens, in MiB
    "gemma-4-26b-a4b": (363, 1_003, 2_763),
    "gemma-4-12b": (453, 965, 2_373),
    "gemma-4-e4b": (149, 661, 2_069),
    "gemma-4-e2b": (54, 246, 774),
}


@pytest.mark.parametrize("name", KV)
def test_kv_of_the_others(name):
    found = (planned(name, "q4_0", "bf16", context) for context in (8_192, 40_960, 131_072))
    assert tuple(int(plan.sums["kv"] / MIB + 0.5) for plan in found) == KV[name]


def test_the_whole_context_of_the_31b_on_a_24_gib_card():
    found = planned("gemma-4-31b", "q4_0", "int8-v", 262_144)
    held = found.memory - found.driver - found.left
    assert round(held / MIB) == 23_263 and held <= 23_976 * MIB
    assert found.fits and found.max_context == 262_144
    assert {part.stored for part in found.kv} == {"int8", "int8, V alone"}
    assert not planned("gemma-4-31b", "q4_0", "int8", 262_144).fits


@pytest.mark.parametrize("format, size", [("bf16", 895.5), ("q8_0", 475.8), ("q4_0", 317.9)])
def test_the_assistant_of_the_31b(format, size):
    assert round(planned("gemma-4-31b", "q4_0", "bf16", 1, drafter=format).sums["drafter"] / MIB, 1) == size


QWENS = {  # bytes of KV a token in bf16, of the MTP layer besides; MiB of a state and of a convolution's window
    "qwen3.6-27b": (65_536, 4_096, 144.0, 2.8),
    "qwen3.6-35b-a3b": (20_480, 2_048, 60.0, 1.4),
    "qwen3.5-122b-a10b": (24_576, 2_048, 144.0, 2.5),
    "qwen3.5-397b-a17b": (30_720, 2_048, 180.0, 3.2),
    "qwen3.5-0.8b": (12_288, 2_048, 18.0, 0.6),
}


@pytest.mark.parametrize("name", QWENS)
def test_kv_and_state_of_qwen(name):
    config, _ = tables(name)
    token, mtp, state, window = QWENS[name]
    for kv, share in (("bf16", 1), ("float16", 1), ("float32", 2), ("int8", 258 / 512)):
        held = {part.name: part.bytes for part in plan.kv_parts(config, 1000, kv, mtp=True)}
        assert (held["full"], held["mtp"]) == (1000 * token * share, 1000 * mtp * share)
        assert held["linear"] == held["linear, committed"]
        if share == 1:
            assert held["linear"] / MIB == pytest.approx(state + window, abs=0.06)
    assert "mtp" not in {part.name for part in plan.kv_parts(config, 1000, "bf16")}


@pytest.mark.parametrize("kv", ["float32", "bf16", "int8", "int8-v"])
@pytest.mark.parametrize("name", ["tiny-gemma4", "tiny-qwen35"])
def test_a_cache_takes_what_is_planned(name, kv):
    """A sliding layer has one slot more in NumPy, and a convolution's window is in the run's floats."""
    target = minimtp.load(name, kv=kv)
    cache, config = target.new_cache(200), target.config
    target.forward([3] * 200, cache, last=0)
    cache.commit()
    held = {}
    for layer, memory_ in zip(config.layers, cache.layers):
        share = (config.sliding_window + 16) / (config.sliding_window + 17) if layer.kind == "sliding" else 1
        held[layer.kind] = held.get(layer.kind, 0) + memory_.nbytes * share
    expected = {part.name: part.bytes for part in plan.kv_parts(config, 200, kv)}
    for kind, size in held.items():
        assert size == pytest.approx(expected[kind]) if kind != "linear" or kv == "float32" else size > expected[kind]


def test_scratch_is_of_the_size_that_a_pass_takes(tmp_path):
    """A chunk of a prompt in NumPy, which unpacks no whole matrix, and holds what it computes on the way."""
    raw = json.loads(json.dumps(PUBLISHED["gemma-4-31b"]))
    text = raw.get("text_config", raw)
    text |= {"num_hidden_layers": 6, "layer_types": text["layer_types"][:6], "hidden_size": 256, "vocab_size": 4096,
             "intermediate_size": 8192, "num_attention_heads": 8, "num_key_value_heads": 4}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    synthesize(tmp_path / "config.json", tmp_path / "model", "compressed-tensors")
    target = minimtp.load(tmp_path / "model", keep="packed")
    cache, ids = target.new_cache(1024), np.arange(plan.CHUNK)
    target.forward(ids, cache, last=1)
    cache.commit()
    tracemalloc.start()
    target.forward(ids, cache, last=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    estimate = sum(part.bytes for part in plan.scratch_parts(target.config, packed=True))
    assert 0.5 < peak / estimate < 2


# The command


def show(run, *arguments):
    status, out, err = run("show", *arguments, "--json")
    assert (status, err) == (0, "") and out.count("\n") == 1
    return json.loads(out)["plan"]


ASKED = ["--config", "gemma-4-31b", "--format", "q4_0", "--kv", "bf16", "--context", "40960", "--memory", "24GiB"]


def test_the_plan_as_json(cli):
    found = show(cli, *ASKED)
    assert found["left_mib"] == 2249 and found["fits"] is True and found["left_mib"] >= found["scratch_mib"] > 0
    assert (found["memory_mib"], found["driver_mib"], found["context"]) == (24_576, 600, 40_960)
    for name in ("weights", "drafter", "kv", "scratch"):
        assert found[f"{name}_mib"] == -(-sum(part["bytes"] for part in found[name]) // MIB)
        assert all(part.keys() == {"name", "stored", "bytes"} for part in found[name])
    assert sum(part["bytes"] for part in found["weights"]) == 17_635_166_448
    assert show(cli, *ASKED, "--scratch", "400MiB")["max_context"] == 64_636
    assert show(cli, *ASKED, "--scratch", "2250MiB")["fits"] is False
    assert show(cli, *ASKED[:-2], "--device", "3090") == show(cli, *ASKED[:-2], "--device", "4090") == found
    assert show(cli, *ASKED, "--device", "h100") == found  # an amount that is named counts
    assert show(cli, *ASKED, "--draft", "none")["left_mib"] == 2249 + 896
    assert show(cli, *ASKED, "--draft", "q8_0")["drafter_mib"] == 476
    whole = show(cli, "--config", "gemma-4-31b", "--kv", "int8-v", "--memory", "24GiB")
    assert whole["context"] == whole["max_context"] == 262_144 and whole["fits"] is True


def test_text_says_what_json_says(cli):
    for extra in ([], ["--format", "bf16"], ["--memory", "80GB", "--kv", "int8"]):
        found = show(cli, *ASKED, *extra)
        status, out, _ = cli("show", *ASKED, *extra)
        text = out[out.index("\nMiB at") :]
        rows = re.findall(r"^ {2}(?! )(\w+) +(?:none)? +([\d,.]+)$", text, re.M)
        sums = {name: float(size.replace(",", "")) for name, size in rows}
        assert set(sums) == {"driver", "weights", "drafter", "kv", "scratch"}
        for name, size in sums.items():
            assert 0 <= found[f"{name}_mib"] - size < 1.05
        for name in ("weights", "drafter", "kv", "scratch"):
            for part in found[name]:
                row = rf"^    {part['name']} +{part['stored']} +{part['bytes'] / MIB:,.1f}$"
                assert re.search(row, text, re.M)
        verdict = "fits" if found["fits"] else "does not fit"
        left = f"{found['left_mib']:,} MiB left" if found["left_mib"] >= 0 else f"{-found['left_mib']:,} MiB too much"
        assert f"{verdict}: {left}, and scratch takes {found['scratch_mib']:,}" in text
        assert text.rstrip().endswith(f"longest context that fits: {found['max_context']:,} tokens")


def test_without_an_amount_nothing_is_said_to_fit(cli):
    found = show(cli, "--config", "gemma-4-e2b", "--kv", "int8")
    assert found["fits"] is found["left_mib"] is found["max_context"] is found["memory_mib"] is None
    out = cli("show", "--config", "gemma-4-e2b", "--kv", "int8")[1]
    assert "fit" not in out.partition("MiB at")[2]
    assert "plan" not in json.loads(cli("show", "--json")[1])


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("kv", ["bf16", "int8-v"])
def test_every_published_size_has_a_plan(name, kv, cli):
    found = show(cli, "--config", name, "--kv", kv, "--device", "4090")
    assert found["fits"] == (found["left_mib"] >= found["scratch_mib"])
    assert (found["drafter_mib"] > 0) == (not name.endswith("-assistant"))
    assert ("mtp" in {part["name"] for part in found["kv"]}) == name.startswith("qwen")
    if found["max_context"]:
        assert show(cli, "--config", name, "--kv", kv, "--device", "4090", "--context", found["max_context"])["fits"]


@pytest.mark.parametrize("name", ["tiny-gemma4", "tiny-qwen35"])
def test_a_checkpoint_is_planned_as_it_is_stored(name, cli):
    """All of its bytes, and of its drafter's, which is found as it is for a run."""
    found, alone = (show(cli, name, "--memory", "1GiB", *draft) for draft in ([], ["--draft", "none"]))
    counted = sum(part["bytes"] for part in found["weights"] + found["drafter"])
    files = [bundled(name)] + [bundled("tiny-gemma4-assistant")] * (name == "tiny-gemma4")
    tensors = [tensor for file in files for tensor in loading.open_model(file)[0].tensors.values()]
    assert counted == sum(tensor.data.size for tensor in tensors if not tensor.name.endswith("_shape"))
    assert found["fits"] is True and found["drafter"] and not alone["drafter"]
    assert alone["weights"] == found["weights"]
    assert ("mtp" in {part["name"] for part in found["kv"]}) == (name == "tiny-qwen35")
    assert not {part["name"] for part in alone["kv"]} & {"mtp"}
    elsewhere = show(cli, "tiny-gemma4", "--draft", bundled("tiny-gemma4-assistant"))
    assert name != "tiny-gemma4" or elsewhere["drafter"] == found["drafter"]


@pytest.mark.parametrize("text, size", [
    ("24GiB", 24 << 30), ("24gib", 24 << 30), ("24 GiB", 24 << 30), ("24576MiB", 24 << 30), ("23.5GiB", 47 << 29),
    ("24GB", 24 * 10**9), ("1TB", 10**12), ("500MB", 5 * 10**8),
])  # fmt: skip
def test_amounts_of_memory(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", [
    "0", "0GiB", "24", "24G", "abc", "", "GiB", "1e9GiB", "nanGiB", "infGiB", "24GiB24GiB", "٢٤GiB", "9999999999GiB",
    "-1", "-1GiB", "24 Gi B", "24\nGiB",
])  # fmt: skip
def test_no_amounts_of_memory(text, cli):
    with pytest.raises(ValueError, match="no amount of memory: .* such as 24GiB"):
        parse_memory(text)
    status, out, err = cli("show", f"--memory={text}")
    assert (status, out) == (2, "") and err.count("\n") == 1 and "such as 24GiB" in err


@pytest.mark.parametrize("arguments, message", [
    (["--memory", "-1GiB"], "memory"),
    (["--context", "262145", "--memory", "24GiB"], "context of 262145 tokens: gemma-4-31b takes 1 to 262144"),
    (["--context", "0", "--memory", "24GiB"], "--context"),
    (["--kv", "int4"], "int8-v"),
    (["--format", "q3"], "w4a16-ct"),
    (["--device", "gtx"], "3090"),
    (["--draft", "gemma-4-31b-assistant"], "no such file"),
    (["--draft", "tiny-qwen35"], "another family"),
    (["--draft", "tiny-gemma4-assistant"], "does not fit"),
    (["--scratch", "400"], "no amount"),
])  # fmt: skip
def test_refusals(arguments, message, cli):
    status, out, err = cli("show", "--config", "gemma-4-31b", *arguments)
    assert (status, out) == (2, "") and err.count("\n") == 1 and message in err


def test_a_picture(cli, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "plan.svg"
    status, _, err = cli("show", *ASKED, "--plot", file)
    assert (status, err) == (0, "") and file.read_text(encoding="utf-8").startswith("<?xml")
    for name, options in (("qwen3.6-27b", []), ("gemma-4-e2b-assistant", ["--device", "3090"])):
        assert cli("show", "--config", name, *options, "--plot", tmp_path / f"{name}.png")[0] == 0
    for file in (tmp_path / "x.nonsense", tmp_path / "nowhere" / "x.png"):
        status, out, err = cli("show", *ASKED, "--plot", file)
        assert status == 2 and err.count("\n") == 1


def test_a_picture_needs_matplotlib(cli, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = cli("show", *ASKED, "--plot", tmp_path / "x.png")
    assert status == 2 and err == "minimtp: --plot needs matplotlib, which is not installed\n"


def test_bars_add_up():
    found = planned("gemma-4-31b", "q4_0", "bf16", 40_960)
    assert sum(found.stack().values()) == found.memory - found.left + found.sums["scratch"]


# Before loading


def test_dense_weights_that_cannot_fit_are_refused(monkeypatch):
    size = 4 * loading.parse_model(read_json(bundled("tiny-gemma4") / "config.json"), "x")[1].vocab_size
    monkeypatch.setattr(loading, "available_memory", lambda: size)
    with pytest.raises(DoesNotFit, match=r"tiny-gemma4: weights \d+ \+ kv \d+ MiB at 1 tokens do not fit in 0 MiB"):
        minimtp.load("tiny-gemma4", keep="dense")
    for keep in ("packed", "auto"):
        minimtp.load("tiny-gemma4", keep=keep)
    monkeypatch.setattr(loading, "available_memory", lambda: 1 << 30)
    target = minimtp.load("tiny-gemma4", keep="dense")
    monkeypatch.setattr(loading, "available_memory", lambda: 0)
    with pytest.raises(DoesNotFit, match="tiny-gemma4-assistant"):
        minimtp.load_drafter("auto", target, keep="dense")


def test_run_says_in_one_line_that_it_does_not_fit(cli, monkeypatch):
    monkeypatch.setattr(loading, "available_memory", lambda: 1000)
    status, out, err = cli("run", "x", "--keep", "dense")
    assert (status, out) == (2, "") and err.count("\n") == 1 and "keep packed leaves weights in their file" in err


def test_there_is_some_memory():
    assert 1 << 20 < plan.available_memory() < 1 << 50


def test_a_plan_that_fits_passes_the_check():
    planned("gemma-4-31b", "q4_0", "bf16", 40_960).check()
    parts, there = r"weights 21,090 \+ drafter 896 \+ kv 4,013 \+ scratch 443 MiB", "24,576 MiB less 600 for the driver"
    with pytest.raises(DoesNotFit, match=f"gemma-4-31b: {parts} at 40,960 tokens do not fit in {there}$"):
        planned("gemma-4-31b", "w4a16-ct-stored", "bf16", 40_960).check()
    planned("gemma-4-31b", "bf16", "bf16", 40_960, memory=None).check()
