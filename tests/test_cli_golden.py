"""The commands acceptance, golden and check."""

import json
import sys

import numpy as np
import pytest

import minimtp
from minimtp.checkpoint import read_safetensors, write_safetensors
from minimtp.cli import main


def output(capsys, *arguments, status=0):
    assert main(list(arguments)) == status
    return capsys.readouterr().out


def test_acceptance_prints_a_table_or_json_and_draws(capsys, tmp_path):
    options = ["acceptance", "-n", "20", "-k", "2", "--temp", "1", "--cost", "0.1"]
    report = json.loads(output(capsys, *options, "--json", "--rule", "hf-gemma4"))
    assert {"argmax", "rejection", "hf-gemma4", "bound"} < set(report["rules"]) and report["costs"] == [1.1, 1.2]
    assert "drawn drafts, rejection" in output(capsys, *options)
    drawn = json.loads(output(capsys, *options, "--json", "--draft-temp", "0"))
    assert set(drawn["rules"]) == {"argmax"}


def test_acceptance_of_what_an_engine_emitted_is_its_count(capsys, tmp_path):
    target = minimtp.load("tiny-qwen35")
    prompt = target.tokenizer.encode("ROMEO:")
    steps = list(minimtp.generate(target, prompt, minimtp.load_drafter("auto", target), 3, max_new_tokens=30))
    ids = prompt + [token for step in steps for token in step.tokens]
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    options = ["--ids", str(tmp_path / "ids.json"), "--prompt-tokens", str(len(prompt)), "-k", "3", "--cost", "0"]
    report = json.loads(output(capsys, "acceptance", "tiny-qwen35", *options, "--json"))
    assert report["rules"]["argmax"]["run"][2]["passes"] == len(steps) - 1


def test_acceptance_needs_a_drafter_and_ids(capsys, tmp_path):
    output(capsys, "acceptance", "--draft", "none", status=2)
    for text in ('["a"]', "{}", "[true]", "[1"):
        (tmp_path / "ids.json").write_text(text)
        output(capsys, "acceptance", "--ids", str(tmp_path / "ids.json"), status=2)


@pytest.mark.parametrize("model", ["tiny-gemma4", "tiny-qwen35"])
def test_a_golden_run_is_written_checked_and_found_wrong(capsys, tmp_path, model):
    folder = str(tmp_path / "run")
    output(capsys, "golden", model, "-o", folder, "--prompt", "ROMEO:", "-n", "8", "--temp", "1")
    assert "no difference" in output(capsys, "check", "--golden", folder)
    tensors, _ = read_safetensors(tmp_path / "run" / "golden.safetensors")
    out = tensors["layer.2.out"].to(np.float32)
    write_safetensors(tmp_path / "dump.safetensors", {"layer.2.out": out})
    against = "check", "--golden", folder, "--against", str(tmp_path / "dump.safetensors")
    assert json.loads(output(capsys, *against, "--json"))["passed"]
    out[1, 5] += 0.1
    write_safetensors(tmp_path / "dump.safetensors", {"layer.2.out": out})
    assert "layer.2.out, position 1 (step 0): element 5" in output(capsys, *against, status=1)
    (tmp_path / "run" / "golden.json").write_text("[]")
    output(capsys, *against, status=2)


def test_matplotlib_is_loaded_only_for_a_picture(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    output(capsys, "acceptance", "-n", "8", "-k", "1", "--cost", "0", "--plot", str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").read_bytes()[1:4] == b"PNG" and "matplotlib" in sys.modules
