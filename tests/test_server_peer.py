"""`check --server` against engines that run. Which, environment variables say; without them these tests are skipped.

MINIMTP_PEER_SERVER: the command that starts one with OpenAI's completions interface on a GGUF file, such as
    python -m llama_cpp.server --host {host} --port {port} --model {model} --n_ctx 512 --logits_all true
    llama-server --host {host} --port {port} -m {model} -c 512
MINIMTP_PEER_SPECULATIVE: the same with speculation; {draft} is the assistant's file:
    python -m llama_cpp.server ... --draft_model prompt-lookup-decoding --draft_model_num_pred_tokens 10
    llama-server ... -md {draft} --spec-type draft-mtp --spec-draft-n-max 4
"""

import os
import shlex
import socket
import struct
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from functools import cache

import pytest

import minimtp
from minimtp.server_check import check, report_text

HOST, MODEL, DRAFT, LENGTH = "127.0.0.1", "tiny-gemma4-float", "tiny-gemma4-assistant", 64
PROMPTS = "ROMEO:\n", "To be, or not to be, that is the question:\nTo be, or not to be, that is"
COMMANDS = {name: os.environ.get(f"MINIMTP_PEER_{name}") for name in ("SERVER", "SPECULATIVE")}
# file -> (key of its metadata that is wrong, GGUF's type of it, its form, what it is, what it becomes)
WRONG = {
    "capped": (b"gemma4.final_logit_softcapping", 6, "<f", 30.0, 25.0),
    "window": (b"gemma4.attention.sliding_window", 4, "<I", 32, 4),
}

pytestmark = pytest.mark.peer
needs_server = pytest.mark.skipif(
    not COMMANDS["SERVER"], reason="MINIMTP_PEER_SERVER names no command that starts another engine's server"
)
needs_speculative = pytest.mark.skipif(
    not all(COMMANDS.values()), reason="MINIMTP_PEER_SPECULATIVE names no command that starts one with speculation"
)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{what: path} of the GGUF files served; the first of them is right."""
    from minimtp.convert import convert

    folder = tmp_path_factory.mktemp("gguf")
    paths = {name: folder / f"{name}.gguf" for name in ("f32", "q4_0", "draft", *WRONG)}
    for name in ("f32", "q4_0"):
        convert(MODEL, paths[name], name)
    convert(DRAFT, paths["draft"], "f32")
    for name, (key, kind, form, is_now, becomes) in WRONG.items():
        data = bytearray(paths["f32"].read_bytes())
        at = data.index(key + struct.pack("<I", kind)) + len(key) + 4
        assert struct.unpack_from(form, data, at) == (is_now,)
        struct.pack_into(form, data, at, becomes)
        paths[name].write_bytes(data)
    return paths


@cache
def targets():
    return [minimtp.load(MODEL, dtype=dtype) for dtype in ("float64", "float32")]


@contextmanager
def running(command, model, draft=None):
    """The address of a server started by a command, once it answers."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    words = [word.format(host=HOST, port=port, model=model, draft=draft) for word in shlex.split(command)]
    url = f"http://{HOST}:{port}"
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(600):
                assert process.poll() is None, f"{words[0]} ended with status {process.returncode}"
                try:
                    with urllib.request.urlopen(f"{url}/v1/models", timeout=5):
                        break
                except OSError:
                    time.sleep(0.1)
            yield url
        finally:
            process.terminate()


def checked(url, plain=None, prompt=PROMPTS[0], **options):
    report = check(targets(), options.pop("drafter", None), url, plain, prompt, LENGTH, **options)
    print(report_text(report))  # pytest -rP shows the figures
    return report


@needs_server
def test_the_same_weights_agree(files):
    with running(COMMANDS["SERVER"], files["f32"]) as url:
        for prompt in PROMPTS:
            report = checked(url, prompt=prompt, bits=15)
            found = report["texts"]["server"]
            assert report["passed"] and found["differing"] == [] and found["logprobs"]["compared"] > 4 * LENGTH


@needs_server
@pytest.mark.parametrize("name", ["q4_0", "capped", "window"])
def test_other_weights_and_wrong_settings_are_found(files, name):
    with running(COMMANDS["SERVER"], files[name]) as url:
        report = checked(url, prompt=PROMPTS[1])
    assert not report["passed"] and report["texts"]["server"]["logprobs"]["bits"] < 10


@needs_speculative
def test_speculation_changes_nothing_and_is_counted_right(files):
    drafter = minimtp.load_drafter(DRAFT, targets()[1])
    with running(COMMANDS["SERVER"], files["f32"]) as plain:
        with running(COMMANDS["SPECULATIVE"], files["f32"], files["draft"]) as url:
            for prompt in PROMPTS:
                report = checked(url, plain, prompt=prompt, drafter=drafter, bits=15)
                assert report["passed"] and report["same"] == {"identical": True}
                if found := report["drafts"]:  # llama.cpp; our drafter is the one that it runs
                    assert abs(found["passes"] - found["expected"]["passes"]) < 1


@needs_speculative
def test_a_wrong_window_writes_another_text_and_that_is_told(files):
    with running(COMMANDS["SERVER"], files["f32"]) as plain:
        with running(COMMANDS["SPECULATIVE"], files["window"], files["draft"]) as url:
            report = checked(url, plain, PROMPTS[1])
    first, same = report["texts"]["server"]["differing"][0], report["same"]
    assert not same["identical"] and not same["tie"] and same["position"] == first["position"]
    assert not report["passed"] and report["texts"]["plain"]["passed"]
