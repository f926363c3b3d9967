"""A prompt's logits in a file: what is in it, and that nothing which interrupts the writing leaves anything wrong.

MINIMTP_KILLS is how often the run of the last test is killed (2).
"""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import cache

import numpy as np
import pytest

import minimtp
from minimtp import logits
from minimtp.checkpoint import CheckpointError, read_safetensors
from minimtp.cli import main
from minimtp.golden import tap_names
from minimtp.loading import bundled
from minimtp.logits import write_logits

FAMILIES = ("tiny-gemma4", "tiny-qwen35")
TAPS = ["layer.2.attn", "embed", "final_norm"]
CHUNK = 32  # of prompts of 150 tokens: 5 chunks
POSIX = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX system")


@cache
def model(name, dtype="float32", kv=None):
    return minimtp.load(name, dtype=dtype, kv=kv)


@cache
def prompt(name, tokens=150):
    return tuple(model(name).tokenizer.encode(bundled("heldout.txt").read_text(encoding="utf-8"))[:tokens])


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """No test here cuts the power, so none waits for the disk (processes of their own do)."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def arrays(path):
    return {name: raw.stored() for name, raw in read_safetensors(path)[0].items()}


def files(folder):
    return sorted(path.name for path in folder.iterdir())


class Interrupted(Exception):
    pass


def interrupting(tokens):
    """A progress that ends the run in the chunk after so many tokens, two layers in."""

    def progress(done, total):
        if done == tokens // CHUNK * (total // 5) + 2:
            raise Interrupted

    return progress


# What is in the file


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_file_holds_what_passes_over_the_chunks_give(tmp_path, name, dtype):
    target, ids, told = model(name, dtype), prompt(name), []
    report = write_logits(
        target, ids, tmp_path / "out", TAPS, chunk=CHUNK, progress=lambda *counts: told.append(counts)
    )
    memory, outs = target.new_cache(), []
    for start in range(0, len(ids), CHUNK):
        outs.append(target.forward(ids[start : start + CHUNK], memory, TAPS))
    found = arrays(tmp_path / "out")
    assert set(found) == {"ids", "logits", *TAPS} and files(tmp_path) == ["out"]
    assert found["ids"].tolist() == list(ids) and found["logits"].dtype == np.float32
    assert np.array_equal(found["logits"], np.concatenate([out.logits_TV for out in outs]).astype(np.float32))
    for tap in TAPS:
        assert np.array_equal(found[tap], np.concatenate([out.taps[tap] for out in outs]).astype(np.float32))
    metadata = read_safetensors(tmp_path / "out")[1]
    assert metadata["fingerprint"] == target.fingerprint and metadata["dtype"] == dtype
    assert metadata["versions"].startswith(f"minimtp {minimtp.__version__}, numpy ")
    assert report == {"output": str(tmp_path / "out"), "tokens": len(ids), "rows": len(ids), "continued_at": 0}
    layers = 5 * len(target.config.layers)
    assert told == [(n, layers) for n in range(1, layers + 1)]


@pytest.mark.parametrize("rows, top", [(1, 0), (40, 0), (40, 1), (40, 7), (999, 7), (1, 5000)])
def test_some_rows_and_the_largest_of_them(tmp_path, rows, top):
    target, ids = model("tiny-gemma4"), prompt("tiny-gemma4")
    write_logits(target, ids, tmp_path / "some", ["embed"], rows, top, CHUNK)
    memory, pieces = target.new_cache(), []
    for stop in [*range(CHUNK, len(ids), CHUNK), len(ids)]:
        wanted = min(CHUNK, max(0, stop - len(ids) + rows))  # more rows than this chunk has are no more than all
        pieces.append(target.forward(ids[memory.length : stop], memory, last=wanted).logits_TV)
    logits_TV, found = np.concatenate(pieces), arrays(tmp_path / "some")
    assert len(logits_TV) == min(rows, len(ids))
    assert len(found["embed"]) == len(ids)
    if top == 0:
        assert np.array_equal(found["logits"], logits_TV) and "logits.top" not in found
        return
    assert "logits" not in found
    ids_TM = np.argsort(-logits_TV, axis=-1, kind="stable")[:, :top]
    assert np.array_equal(found["logits.top_ids"], ids_TM)
    assert np.array_equal(found["logits.top"], np.take_along_axis(logits_TV, ids_TM, -1))
    truth_T = np.log(np.exp(logits_TV.astype(float)).sum(-1))
    np.testing.assert_allclose(found["logits.logsumexp"][:, 0], truth_T, rtol=1e-6)


def test_of_a_large_vocabulary_the_largest_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(logits, "WHOLE", 1000)
    write_logits(model("tiny-gemma4"), prompt("tiny-gemma4"), tmp_path / "out")
    assert arrays(tmp_path / "out")["logits.top"].shape == (150, 64)


@pytest.mark.parametrize("taps", [["layer.9.out"], ["layer.0.experts"], ["logits"], [""]])
def test_what_cannot_be_tapped(tmp_path, taps):
    with pytest.raises(ValueError, match="unknown tap"):
        write_logits(model("tiny-gemma4"), [2, 5], tmp_path / "out", taps)
    assert files(tmp_path) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_check_takes_the_file(tmp_path, capsys, name):
    assert main(["golden", name, "-o", str(tmp_path / "run"), "--prompt", "ROMEO:", "-n", "9"]) == 0
    run = json.loads((tmp_path / "run" / "golden.json").read_text())
    (tmp_path / "ids.json").write_text(json.dumps(run["text"][: run["steps"][-1]["cache_length"]]))
    arguments = ["--ids", str(tmp_path / "ids.json"), "-o", str(tmp_path / "out"), "--taps", "all"]
    assert main(["logits", name, *arguments]) == 0
    capsys.readouterr()
    check = ["check", "--golden", str(tmp_path / "run"), "--against", str(tmp_path / "out"), "--json"]
    assert main(check) == 0
    report = json.loads(capsys.readouterr().out)
    names = {"logits", *tap_names(len(model(name).config.layers))}
    assert {one["name"] for one in report["compared"]} == names and report["skipped"] == ["ids"]


# What is interrupted goes on


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("options, kv", [({"taps": TAPS}, None), ({"rows": 40, "top": 5}, None), ({}, "int8")])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, name, options, kv):
    target, ids = model(name, kv=kv), prompt(name)
    write_logits(target, ids, tmp_path / "whole", chunk=CHUNK, **options)
    for stop in range(CHUNK, len(ids), CHUNK):
        with pytest.raises(Interrupted):
            write_logits(target, ids, tmp_path / "out", chunk=CHUNK, progress=interrupting(stop), **options)
        assert files(tmp_path) == ["out.partial", "out.partial-cache", "whole"]
        assert target.load_cache(tmp_path / "out.partial-cache").length == stop
    report = write_logits(target, ids, tmp_path / "out", chunk=CHUNK, **options)
    assert report["continued_at"] == len(ids) // CHUNK * CHUNK and files(tmp_path) == ["out", "whole"]
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_pass_that_fails_or_a_full_disk_costs_no_chunk_before(tmp_path, monkeypatch):
    target, ids = model("tiny-gemma4"), prompt("tiny-gemma4")
    write_logits(target, ids, tmp_path / "whole", chunk=CHUNK)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(target.family, "forward", failing(target.family.forward, 3, Interrupted()))
        write_logits(target, ids, tmp_path / "out", chunk=CHUNK)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(os, "fsync", failing(os.fsync, 2, full))  # of the second save
        write_logits(target, ids, tmp_path / "out", chunk=CHUNK)
    assert files(tmp_path) == ["out.partial", "out.partial-cache", "whole"]
    assert write_logits(target, ids, tmp_path / "out", chunk=CHUNK)["continued_at"] == 2 * CHUNK
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


def failing(function, at, error):
    """The function, but its at-th call."""
    calls = []

    def other(*arguments, **options):
        calls.append(1)
        if len(calls) == at:
            raise error
        return function(*arguments, **options)

    return other


@pytest.mark.parametrize("written", [0, 1, 5])
def test_a_file_whose_layout_was_not_finished_begins_anew(tmp_path, written):
    target, ids = model("tiny-gemma4"), prompt("tiny-gemma4")
    (tmp_path / "out.partial").write_bytes(bytes(8 * written) + b"ab" * (written > 1))
    (tmp_path / "out.partial-cache").write_bytes(b"of a file that was deleted")
    assert write_logits(target, ids, tmp_path / "out")["continued_at"] == 0
    assert files(tmp_path) == ["out"] and arrays(tmp_path / "out")["ids"].tolist() == list(ids)


def test_what_killed_saves_left_goes(tmp_path):
    target, ids = model("tiny-gemma4"), prompt("tiny-gemma4")
    with pytest.raises(Interrupted):
        write_logits(target, ids, tmp_path / "out", chunk=CHUNK, progress=interrupting(CHUNK))
    (tmp_path / ".out.partial-cache.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / ".out2.partial-cache.0123abcd.tmp").write_bytes(b"another's")
    write_logits(target, ids, tmp_path / "out", chunk=CHUNK)
    assert files(tmp_path) == [".out2.partial-cache.0123abcd.tmp", "out"]


def test_a_result_that_is_there_is_left_alone(tmp_path):
    target, ids = model("tiny-gemma4"), prompt("tiny-gemma4")
    write_logits(target, ids, tmp_path / "out")
    before = (tmp_path / "out").stat().st_mtime_ns
    (tmp_path / "out.partial-cache").write_bytes(b"killed before it was removed")
    assert write_logits(target, ids, tmp_path / "out")["continued_at"] == len(ids)
    assert (tmp_path / "out").stat().st_mtime_ns == before and files(tmp_path) == ["out"]
    with pytest.raises(CheckpointError, match=r"out: there already, another run's \(other rows\)"):
        write_logits(target, ids, tmp_path / "out", rows=3)


OTHER = {
    "prompt": lambda target, ids: (target, [*ids[:-1], 7], {}),
    "rows": lambda target, ids: (target, ids, {"rows": 5}),
    "top": lambda target, ids: (target, ids, {"top": 5}),
    "taps": lambda target, ids: (target, ids, {"taps": ["embed"]}),
    "chunk": lambda target, ids: (target, ids, {"chunk": 64}),
    "dtype": lambda target, ids: (model("tiny-gemma4", "float64"), ids, {}),
    "model": lambda target, ids: (model("tiny-qwen35"), ids, {}),
}


@pytest.mark.parametrize("what", OTHER)
def test_another_run_is_not_continued_unless_restarted(tmp_path, what):
    target, ids = model("tiny-gemma4"), prompt("tiny-gemma4")
    with pytest.raises(Interrupted):
        write_logits(target, ids, tmp_path / "out", chunk=CHUNK, progress=interrupting(CHUNK))
    before = (tmp_path / "out.partial").read_bytes(), (tmp_path / "out.partial-cache").read_bytes()
    other, others, options = OTHER[what](target, ids)
    with pytest.raises(CheckpointError, match=rf"out.partial: what another run left \(other .*\b{what}\b"):
        write_logits(other, others, tmp_path / "out", **{"chunk": CHUNK, **options})
    assert before == ((tmp_path / "out.partial").read_bytes(), (tmp_path / "out.partial-cache").read_bytes())
    report = write_logits(other, others, tmp_path / "out", **{"chunk": CHUNK, **options}, restart=True)
    assert report["continued_at"] == 0 and arrays(tmp_path / "out")["ids"].tolist() == list(others)


def test_a_cache_that_is_not_the_prompts_is_not_believed(tmp_path):
    target, ids = model("tiny-gemma4"), prompt("tiny-gemma4")
    for tokens, said in (([*ids[: CHUNK - 1], 7], "not what a run"), (ids[:5], "not what a run"), (None, "truncated")):
        with pytest.raises(Interrupted):
            write_logits(target, ids, tmp_path / "out", chunk=CHUNK, restart=True, progress=interrupting(CHUNK))
        if tokens is None:
            (tmp_path / "out.partial-cache").write_bytes(b"half")
        else:
            memory = target.new_cache()
            target.forward(tokens, memory)
            memory.save(tmp_path / "out.partial-cache")
        with pytest.raises(CheckpointError, match=f"out.partial-cache: {said}"):
            write_logits(target, ids, tmp_path / "out", chunk=CHUNK)


def test_a_damaged_partial_file_is_refused(tmp_path):
    target, ids = model("tiny-gemma4"), prompt("tiny-gemma4")
    with pytest.raises(Interrupted):
        write_logits(target, ids, tmp_path / "out", chunk=CHUNK, progress=interrupting(CHUNK))
    os.truncate(tmp_path / "out.partial", 4000)
    with pytest.raises(CheckpointError, match="out.partial.*truncated"):
        write_logits(target, ids, tmp_path / "out", chunk=CHUNK)


@pytest.mark.skipif(logits.fcntl is None, reason="no locks here")
def test_two_runs_of_one_file_do_not_meet(tmp_path):
    target, ids = model("tiny-gemma4"), prompt("tiny-gemma4")

    def another(done, total):
        with pytest.raises(CheckpointError, match="another run is at work"):
            write_logits(target, ids, tmp_path / "out", chunk=CHUNK)

    write_logits(target, ids, tmp_path / "out", chunk=CHUNK, progress=another)
    assert files(tmp_path) == ["out"]


# The command


@pytest.fixture
def cli(tmp_path, capsys, monkeypatch):
    """Run `logits tiny-gemma4` in an empty folder -> (status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("ROMEO:\nBut soft", encoding="utf-8")

    def run(*arguments):
        try:
            status = main(["logits", "tiny-gemma4", *arguments])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_the_command_writes_a_file_and_says_so(cli, tmp_path):
    assert cli("--prompt-file", "p.txt", "-o", "out") == (0, f"out: {len(ROMEO())} tokens\n", "")
    assert arrays(tmp_path / "out")["ids"].tolist() == ROMEO()
    options = ["--rows", "last", "--top", "3", "--dtype", "float64", "--keep", "packed", "--taps", "embed,layer.0.in"]
    status, out, _ = cli("--prompt-file", "p.txt", "-o", "two", *options, "--json")
    assert status == 0 and json.loads(out) == {
        "output": "two",
        "tokens": len(ROMEO()),
        "rows": 1,
        "continued_at": 0,
    }
    found = arrays(tmp_path / "two")
    assert found["logits.top"].shape == (1, 3) and {"embed", "layer.0.in"} < set(found)


def ROMEO():
    return model("tiny-gemma4").tokenizer.encode("ROMEO:\nBut soft")


BAD = {
    "nothing": (b"", [], "the prompt is empty"),
    "bytes": (b"ROMEO\xff", [], "p.txt is not UTF-8"),
    "length": (b"To be, or not to be. " * 700, [], r"a prompt of \d+ tokens does not fit a context of 2048"),
    "folder": (b"x", ["-o", "none/out"], "none/out: no such folder"),
    "file": (b"x", ["-o", "there/out", "--prompt-file", "none"], "none"),
    "tap": (b"x", ["--taps", "layer.77.out"], "unknown tap 'layer.77.out'"),
    "rows": (b"x", ["--rows", "0"], "rows 0"),
    "rows, text": (b"x", ["--rows", "some"], "invalid _rows value: 'some'"),
    "both": (b"x", ["--ids", "p.txt"], "expected one of --prompt-file, --ids and --prompts"),
    "workers": (b"x", ["--workers", "2"], "--workers and --dask are for a list"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_said_in_one_line_and_leaves_nothing(cli, tmp_path, case):
    content, options, said = BAD[case]
    (tmp_path / "p.txt").write_bytes(content)
    (tmp_path / "there").mkdir()
    status, out, err = cli("--prompt-file", "p.txt", "-o", "out", *options)
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("minimtp: ")
    assert re.search(said, err), err
    assert files(tmp_path) == ["p.txt", "there"]


@pytest.mark.parametrize("text, said", [("[2, 99999]", "99999 is outside"), ("[]", "empty"), ("[1.5]", "JSON list")])
def test_bad_ids(cli, tmp_path, text, said):
    (tmp_path / "ids.json").write_text(text)
    status, _, err = cli("--ids", "ids.json", "-o", "out")
    assert status == 2 and said in err


def command(*arguments):
    return [sys.executable, "-m", "minimtp", "logits", "tiny-gemma4", *map(str, arguments)]


@POSIX
def test_a_disk_without_room_says_so_before_anything_is_read(tmp_path):
    (tmp_path / "p.txt").write_text("To be, or not to be. " * 50)
    arguments = command("--prompt-file", tmp_path / "p.txt", "-o", tmp_path / "out")
    done = subprocess.run(["sh", "-c", 'ulimit -f 64; exec "$@"', "sh", *arguments], capture_output=True, timeout=60)
    assert done.returncode == 2 and b"bytes are needed" in done.stderr and done.stderr.count(b"\n") == 1
    assert files(tmp_path) == ["p.txt"]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room cannot be taken here")
def test_all_room_is_taken_before_anything_is_read(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(os, "posix_fallocate", lambda file, start, size: sizes.append((start, size)))
    write_logits(model("tiny-gemma4"), [2, 5], tmp_path / "out")
    assert sizes == [(0, (tmp_path / "out").stat().st_size)]
    monkeypatch.setattr(os, "posix_fallocate", failing(len, 1, OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match=f"No space left on device: {sizes[0][1]} bytes are needed: .*other.partial"):
        write_logits(model("tiny-gemma4"), [2, 5], tmp_path / "other")
    assert files(tmp_path) == ["out"]


@POSIX
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    kills = int(os.environ.get("MINIMTP_KILLS", 2))
    target, ids = model("tiny-gemma4"), prompt("tiny-gemma4", 16 * (8 + 4 * kills))
    write_logits(target, ids, tmp_path / "whole", ["embed"], chunk=16)
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    arguments = command("--ids", tmp_path / "ids.json", "-o", tmp_path / "out", "--taps", "embed", "--chunk", 16)
    saved, chance, places = tmp_path / "out.partial-cache", random.Random(1), []
    for _ in range(kills):
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        run = subprocess.Popen([*arguments, "--json"], stdout=subprocess.PIPE, text=True)
        while run.poll() is None and (not saved.exists() or saved.stat().st_mtime_ns == before):
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)  # anywhere in a chunk or two
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert not (tmp_path / "out").exists()
        places.append(target.load_cache(saved).length)
    assert places == sorted(set(places))  # every time further
    assert write_logits(target, ids, tmp_path / "out", ["embed"], chunk=16)["continued_at"] == places[-1]
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert files(tmp_path) == ["ids.json", "out", "whole"]
