"""What bench says of a device: bytes counted by hand, and the whole report on the host in a GPU's place."""

import importlib.util
import json
import re
import shutil
import sys
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
from random_models import layers, rope, write_target
from tiny import complete, pair
from tiny_qwen import write
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import minimtp
from minimtp import bench, device_bench
from minimtp.cli import main
from minimtp.device import Host
from minimtp.device_bytes import CARDS, PARTLY, crossover, flops, launch_bytes, must_read, share_of_experts
from minimtp.device_weights import Weight
from minimtp.kernel_source import FOLDER

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

D, F, V, K, WINDOW = 32, 64, 45, 16, 4
MODEL = dict(
    layer_types=layers("sf"), num_attention_heads=2, num_key_value_heads=1, num_global_key_value_heads=1, head_dim=K,
    global_head_dim=K, sliding_window=WINDOW, attention_k_eq_v=False, vocab_size=V, hidden_size=D, intermediate_size=F,
    rope_parameters=rope(),
)  # fmt: skip
FEW = dict(widths=(1, 2), repeats=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An int4 model with a tokenizer of words w0, w1, …"""
    path = tmp_path_factory.mktemp("bench") / "target"
    write_target(path, 3, **MODEL, int4=True)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    words.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def target(folder):
    return minimtp.load(folder, backend=Host())


def after(target, length):
    """A cache that says it has read so many tokens."""
    cache = target.new_cache(40)
    cache.tokens = [0] * length
    return cache


def four_bits(*weights):
    """Bytes of that many weights, a bf16 scale for each 32."""
    return sum(count // 2 + count // 32 * 2 for count in weights)


# Bytes, by hand

SHARED = dict(layer_types=layers("sfsf"), num_kv_shared_layers=2, use_double_wide_mlp=True)


@pytest.mark.parametrize("width", [1, 2, 8])
def test_an_int4_model_with_a_tied_head(target, width):
    linear = four_bits(2 * K * D, K * D, K * D, D * 2 * K, F * D, F * D, D * F)
    floats = 4 * (4 * D + 2 * K + 1)  # norms of a layer, of its queries and keys, its scale
    remembered = 4 * 2 * K * (WINDOW + width - 1 + 30 + width)
    expected = 2 * (linear + floats) + 4 * (V * D + D) + remembered
    assert must_read(target, after(target, 30), width) == expected
    assert flops(target, width) == 2 * width * (2 * (6 * K * D + 3 * F * D) + V * D)


@pytest.mark.parametrize("width", [1, 2])
def test_lent_keys_and_values_and_a_table_for_each_layer(tmp_path, width):
    P = 8
    write_target(tmp_path / "part", 3, **MODEL | SHARED, hidden_size_per_layer_input=P)
    complete(tmp_path / "part", tmp_path / "whole", 3)
    target = minimtp.load(tmp_path / "whole", backend=Host())
    every = 5 * D + K + 2 * K * D + D * 2 * K + 2 * P * D + 1  # norms, queries and outputs, per-layer input, scale
    own, wide = 2 * K * D + K + 3 * F * D, 3 * 2 * F * D  # keys and values, a feed-forward; one twice as wide
    around = V * D + D + 4 * P * D + P + width * 4 * P  # head, norm, projection, its norm, rows of the table
    remembered = 2 * 2 * K * (WINDOW + width - 1 + 30 + width)
    numbers = 4 * every + 2 * own + 2 * wide + around + remembered
    assert must_read(target, after(target, 30), width) == 4 * numbers


@pytest.mark.parametrize("width", [1, 2])
def test_a_gated_deltanet_reads_its_state(tmp_path, width):
    key, value, D, F = 32, 8, 32, 48
    sizes = dict(head_dim=K, linear_key_head_dim=key, linear_value_head_dim=value)
    target = minimtp.load(write("dense", tmp_path / "qwen", **sizes), backend=Host())
    C = 2 * 2 * key + 4 * value
    linear = 2 * D + C * D + 2 * 4 * value * D + 2 * 4 * D + 4 * C + 8 + value + 3 * F * D
    state = 4 * key * value + 3 * C
    full = 2 * D + 3 * 4 * K * D + 2 * 2 * K * D + 2 * K + 3 * F * D
    remembered = 2 * 2 * K * (30 + width)
    head = 50 * D if target.config.tied else 50 * D + width * D
    assert must_read(target, after(target, 30), width) == 4 * (2 * (linear + state) + full + remembered + head + D)


def test_of_experts_those_that_were_read_or_are_expected():
    config = SimpleNamespace(experts=SimpleNamespace(count=8, top_k=2), layers=[SimpleNamespace()] * 3)
    experts = Mock(nbytes=8 * 1000, arrays=[Mock(size=8 * 100), Mock()])  # codes of two weights a byte, and scales
    params = SimpleNamespace(layers=[SimpleNamespace(experts_up_proj=experts)])
    model, memory = SimpleNamespace(config=config, params=params), SimpleNamespace(keep=None, slots=1, nbytes=0)
    cache = SimpleNamespace(layers=[memory] * 3, length=0)
    assert must_read(model, cache, 1) == 2000  # exactly top_k of 8
    assert must_read(model, cache, 2) == 3500  # 8 * (1 - (6 / 8) ** 2) of them
    assert must_read(model, cache, 2, experts=9) == 3000  # 3 a layer
    assert share_of_experts(config, 1000) == pytest.approx(1)
    assert flops(model, 3) == 2 * 3 * 2 * 200  # each token uses 2, whoever shares them


def test_a_launch_counts_rows_of_tables_and_whole_matrices():
    device = Host()
    table, ids, out = (device.zeros(*made) for made in (((45, 8), np.float32), (1, np.int32), ((1, 8), np.float32)))
    counts = {"token": 1, "position": 11, "expert": 2}
    assert launch_bytes("gather", [out, ids, table, None, None, None, 8, 1], counts) == 32 + 4 + 32
    assert launch_bytes("matvec_float", [out, out, table, 45, 8], counts) == 32 + 45 * 32  # what is there twice, once
    keys = device.zeros((2, 20, 4), np.float32)
    assert launch_bytes("attention_split", [out, out, out, keys, keys, None, None], counts) == 32 + 2 * 11 * 4 * 4
    assert launch_bytes("elementwise", [out, table.reshape(-1)[8:], None, 0.0], counts) == 32 + 32


def test_what_a_kernel_uses_in_part_is_where_it_is_said_to_be():
    """The names of these parameters in the sources: PARTLY counts them by their places."""
    keys_and_values = ["k_GSK", "v_GSK", "k_scales_GS", "v_scales_GS"]
    expected = {
        "gather": ["stored", "scales", "high", "steps"],
        "rope_write": keys_and_values,
        "attention_split": keys_and_values,
        "causal_conv": ["log_LC"],
        "gated_delta": ["k_LGK", "u_LHV", "decay_LH"],
        "experts_gated": ["gate_EFW", "gate_scales_EFG", "up_EFW", "up_scales_EFG"],
        "experts_down": ["down_EDW", "scales_EDG"],
    }
    sources = "".join(path.read_text() for path in FOLDER.glob("*.cu"))
    for kernel, (places, _, _) in PARTLY.items():
        (parameters,) = re.findall(rf"void\s+(?:__launch_bounds__\([^()]*\)\s*)?{kernel}\(([^)]*)\)", sources)
        names = [re.findall(r"\w+", parameter)[-1] for parameter in parameters.split(",")]
        assert names[places] == expected[kernel]


def test_torch_takes_the_shapes_that_its_kernel_can(monkeypatch):
    device, torch, widths = Host(), MagicMock(), (1, 2)
    device.stream = Mock(ptr=0)
    monkeypatch.setitem(sys.modules, "torch", torch)
    codes, scales = (device.zeros((8, size), kind) for size, kind in ((64, np.uint8), (4, np.uint16)))
    weights = {f"w{I}": Weight(device, (8, I), "INT4", "bf16", [codes, scales, None, None], 32) for I in (32, 128)}
    target = SimpleNamespace(device=device, params=SimpleNamespace(**weights))
    rows = device_bench.torch_int4(target, widths, 2, None)
    assert [(row["shape"], row["width"]) for row in rows] == [([8, 128], 1), ([8, 128], 2)]
    assert all(row["seconds"] > 0 and row["torch_seconds"] > 0 for row in rows)
    torch.cuda.is_available.return_value = False
    assert device_bench.torch_int4(target, widths, 2, None) is None


def test_a_card_is_faster_than_its_memory_from_some_width_on(target):
    cache = after(target, 0)
    found = {name: crossover(target, cache, *rates)["width"] for name, rates in CARDS.items()}
    assert found["H200"] < found["RTX 3090"]
    for name, width in found.items():
        operations, bandwidth = CARDS[name]
        for w in range(1, 65):
            bound = flops(target, w) / operations > must_read(target, cache, w) / bandwidth
            assert bound == (width is not None and w >= width)


# Drafts by a script


@pytest.mark.parametrize("acceptance, per_pass", [(1.0, 3), (0.0, 1)])
def test_scripted_drafts_are_right_as_often_as_asked(acceptance, per_pass):
    target, _ = pair("window_4")
    report = bench.rates(target, None, [[3, 1, 4], [1, 5]], 2, 13, acceptance)
    assert report["identical"] and report["scripted"]["tokens_per_pass"] == per_pass
    assert set(report["scripted"]["acceptance"]) == {acceptance} and report["scripted_acceptance"] == acceptance


def test_a_script_is_right_with_that_chance():
    target = SimpleNamespace(config=SimpleNamespace(placeholders={0: "an image"}))
    tokens = np.random.RandomState(0).randint(1, 4, 4000).tolist()
    script = bench.scripted_drafter(target, tokens, 0.75).script
    drafted = script(0, 4000)
    assert 0 not in drafted and np.mean(np.array(drafted) == tokens) == pytest.approx(0.75, abs=0.03)


# The report


def check_report(report, host):
    passes, kernels = report["passes_by_width"], report["kernels"]
    for row in (*passes.values(), *kernels.values()):
        assert row["seconds"] > 0 and row["bytes"] > 0 and ("fraction" in row) is not host
    assert passes[1]["bytes"] < passes[2]["bytes"] and passes[2]["flops"] == 2 * passes[1]["flops"]
    assert report["copy_bytes_per_second"] > 0 and report["torch_int4"] is None
    assert kernels["gather"]["launches"] == 1 and kernels["attention_split"]["launches"] == 2
    assert kernels["matvec_float"]["bytes"] == 4 * (V * D + V + D)  # the head
    assert sum(row["bytes"] for row in kernels.values()) >= passes[1]["bytes"]  # activations come on top
    json.dumps(report)


def test_a_report_of_the_host_claims_nothing(target):
    report = device_bench.measure(target, [5, 7], **FEW)
    assert report["device"] == "host" and report["device_peak_bytes"] is None
    check_report(report, host=True)


def test_a_report_of_a_card_holds_everything_against_the_copy(target, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(Host, "name", "NVIDIA H200")
    monkeypatch.setattr(device_bench, "COPIED", 1 << 16)
    report = device_bench.measure(target, [5, 7], **FEW)
    check_report(report, host=False)
    row = report["passes_by_width"][2]
    assert row["fraction"] == pytest.approx(row["bytes"] / row["seconds"] / report["copy_bytes_per_second"])
    device_bench.plot(report, tmp_path / "roofline.svg")
    assert "float32 of a H200, as published" in (tmp_path / "roofline.svg").read_text()


def test_a_pass_leaves_the_cache_as_it_was(target):
    cache = target.new_cache(20)
    target.forward([5, 7], cache)
    cache.commit()
    before = target.forward([9], cache).logits_TV
    cache.rollback(1)
    device_bench.pass_of_width(target, cache, [1, 2], 2)
    device_bench.kernel_table(target, cache, 3, None)
    assert cache.length == 2 and cache.graphs and "launch" not in vars(target.device)
    assert np.array_equal(target.forward([9], cache).logits_TV, before)


# The command


def test_bench_on_a_device(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("minimtp.device.Gpu", Host)
    monkeypatch.setattr("minimtp.cli.device_bench.measure", partial(device_bench.measure, **FEW))
    monkeypatch.setattr("minimtp.bench.pass_costs", partial(bench.pass_costs, repeats=1))
    (tmp_path / "text.txt").write_text("w5 w7 w5 w7")
    arguments = ["--text", str(tmp_path / "text.txt"), "--prompts", "1", "--prompt-tokens", "2", "-k", "1", "-n", "4"]
    plot = ["--acceptance", "1", "--plot", str(tmp_path / "roofline.png")]
    assert main(["bench", str(folder), "--backend", "cupy", "--draft", "lookup", "--json", *arguments, *plot]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert out.count("\n") == 1 and report["device"] == "host" and report["identical"] is True
    assert report["plain"]["tokens"] == report["drafted"]["tokens"] == report["scripted"]["tokens"] == 3
    assert list(report["passes"]["seconds_by_width"]) == list(report["passes_by_width"]) == ["1", "2"]
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


BAD = {
    "plot": (["--plot", "x.png"], "it needs --backend cupy"),
    "acceptance": (["--acceptance", "1.5", "--prompts", "1", "-n", "2"], "acceptance is 1.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_use_is_one_line_and_status_2(case, capsys):
    arguments, said = BAD[case]
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("minimtp: ") and said in err.splitlines()[-1]


def test_bench_without_a_gpu_is_one_line_and_status_2(capsys):
    if importlib.util.find_spec("cupy") is not None:
        pytest.skip("CuPy is here")
    assert main(["bench", "--backend", "cupy"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "backend 'cupy'" in err
