"""A list of prompts: each has its result, whoever works it through, whatever fails, whenever it is interrupted."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import minimtp
from minimtp.checkpoint import CheckpointError, read_safetensors
from minimtp.cli import main
from minimtp.golden import read_golden
from minimtp.loading import bundled
from minimtp.worklist import attempt, claim, read_list, work

LINES = [
    {"id": "one", "prompt": "ROMEO:\nBut soft"},
    {"id": "two", "ids": [2, 5, 6, 9, 11]},
    {"id": "late", "ids": [2, 5, 60000]},
    {"id": "empty", "prompt": ""},
    {"id": "three", "prompt": "JULIET:\nWhat now, my lord?"},
]
GOOD = ["one", "three", "two"]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """No test here cuts the power, so none waits for the disk (processes of their own do)."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def write_list(folder, items):
    path = folder / "list.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# The list


def test_a_list_is_json_lines(tmp_path):
    path = write_list(tmp_path, LINES)
    path.write_bytes(b"\n" + path.read_bytes().replace(b"\n", b"\r\n") + b"  \n")
    assert read_list(path) == LINES


BAD = {
    "not JSON": b"hello",
    "no object": b'["id", "prompt"]',
    "not UTF-8": b'{"id": "a", "prompt": "\xff"}',
    "half a character": b'{"id": "a", "prompt": "\\ud800"}',
    "no text": b'{"id": "a", "prompt": 7}',
    "nothing to read": b'{"id": "a"}',
    "both": b'{"id": "a", "prompt": "x", "ids": [2]}',
    "something else": b'{"id": "a", "prompt": "x", "seed": 1}',
    "no ids": b'{"id": "a", "ids": [true]}',
    "negative": b'{"id": "a", "ids": [-1]}',
    "text for ids": b'{"id": "a", "ids": "abc"}',
    "a number": b'{"id": 1, "prompt": "x"}',
    "a path": b'{"id": "../a", "prompt": "x"}',
    "a hidden file": b'{"id": ".a", "prompt": "x"}',
    "no name": b'{"id": "", "prompt": "x"}',
    "a long name": b'{"id": "%s", "prompt": "x"}' % (b"a" * 101),
    "a line in a name": b'{"id": "a\\n", "prompt": "x"}',
    "twice": b'{"id": "First", "prompt": "x"}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named(tmp_path, case):
    path = tmp_path / "list.jsonl"
    path.write_bytes(b'{"id": "first", "prompt": "x"}\n' + BAD[case])
    with pytest.raises(CheckpointError, match=r"list.jsonl, line 2: ") as error:
        read_list(path)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_an_empty_list(tmp_path):
    (tmp_path / "list.jsonl").write_bytes(b"\n \n")
    with pytest.raises(CheckpointError, match="no prompt"):
        read_list(tmp_path / "list.jsonl")


def test_results_of_another_list_are_not_taken_for_these(tmp_path):
    folder, what = tmp_path / "out", {"command": "logits", "options": {"rows": None, "taps": ("a",)}}
    claim(folder, LINES[:2], what)
    claim(folder, LINES, what)  # it has grown
    claim(folder, LINES[1:2], what)
    before = (folder / "worklist.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"results of another list \(other options\)"):
        claim(folder, LINES, {**what, "options": {"rows": 3, "taps": ("a",)}})
    with pytest.raises(CheckpointError, match="'two' was another prompt"):
        claim(folder, [{"id": "two", "ids": [2, 5]}], what)
    assert (folder / "worklist.json").read_bytes() == before
    assert set(json.loads(before)["prompts"]) == {item["id"] for item in LINES}


# The work


def note(folder, item):
    """Write which process did it, and on how many cores; or fail, or die."""
    if item["id"] == "late":
        raise ValueError("too\nlate")
    if item["id"] == "bug":
        raise KeyError("bug")
    if item["id"] == "naps":
        time.sleep(60)
    if item["id"].startswith("dies"):
        os._exit(3)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    Path(folder, item["id"]).write_text(json.dumps([os.getpid(), cores]))


def results(ended):
    return {item["id"]: error for item, error in ended}


FAILED = {"late": "too late", "bug": "KeyError: 'bug'"}


def test_what_fails_is_told_and_stops_nothing_else(tmp_path):
    items = [{"id": name} for name in ("late", "a", "bug", "b")]
    assert results(work(partial(note, tmp_path), items)) == FAILED | {"a": None, "b": None}
    assert files(tmp_path) == ["a", "b"]


def test_processes_share_the_work_and_the_cores_and_one_that_dies_is_replaced(tmp_path):
    names = ["late", "dies", "bug", "dies too", *"abcdef"]
    ended = results(work(partial(note, tmp_path), [{"id": name} for name in names], workers=2))
    assert set(ended) == set(names) and all(ended[name] is None for name in "abcdef")
    assert FAILED.items() <= ended.items()
    assert ended["dies"] == ended["dies too"] == "its process died (status 3)"
    told = [json.loads((tmp_path / name).read_text()) for name in "abcdef"]
    assert os.getpid() not in {process for process, _ in told}
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
        assert {share for _, share in told} <= {max(1, cores // 2), (cores + 1) // 2}


class Fatal:
    """A function that ends the process which is given it."""

    def __reduce__(self):
        return os._exit, (4,)


def test_processes_that_cannot_even_begin_are_told_too():
    items = [{"id": "long", "ids": [1] * 200_000}, {"id": "short"}]  # the first one does not fit into a pipe
    assert set(results(work(Fatal(), items, workers=2)).values()) == {"its process died (status 4)"}


def test_who_stops_looking_ends_the_processes(tmp_path):
    ended = work(partial(note, tmp_path), [{"id": name} for name in ("naps", "a")], workers=2)
    assert next(ended) == ({"id": "a"}, None)
    ended.close()
    for process in multiprocessing.active_children():
        process.join(20)
        assert not process.is_alive()


def test_threads_of_one_process_take_turns():
    at_work = []

    def alone(item):
        at_work.append(item)
        time.sleep(0.05)
        assert at_work.pop() == item and not at_work

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(partial(attempt, alone), range(3))) == [None] * 3


def test_a_dask_cluster_does_the_same(tmp_path):
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 2, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster:
        items = [{"id": name} for name in ("late", "a", "bug", "b")]
        ended = results(work(partial(note, tmp_path), items, dask=cluster.scheduler_address))
        assert ended == FAILED | {"a": None, "b": None} and files(tmp_path) == ["a", "b"]
        path, folder = write_list(tmp_path, LINES), tmp_path / "out"
        assert main(["logits", "tiny-gemma4", "--prompts", str(path), "-o", str(folder), "--dask",
                     cluster.scheduler_address]) == 1  # fmt: skip
    assert files(folder) == sorted([*(f"{name}.safetensors" for name in GOOD), "worklist.json"])


# The commands


@pytest.fixture
def cli(tmp_path, capsys):
    """Run a command on the list -> (exit status, what it said of prompts, counts)."""

    def run(command, *options, model="tiny-gemma4", items=LINES):
        path = write_list(tmp_path, items)
        status = main([command, model, "--prompts", str(path), "-o", str(tmp_path / "out"), "--json", *options])
        out, err = capsys.readouterr()
        said = [line.removeprefix("minimtp: ").partition(": ") for line in err.splitlines()]
        return status, {name: error for name, _, error in said}, json.loads(out) if out else None

    return run


WRONG = {"late": "token id 60000 is outside the vocabulary of 1216", "empty": "the prompt is empty"}


def test_logits_of_a_list_are_those_of_each_alone_by_any_number_of_processes(cli, tmp_path):
    assert cli("logits", "--taps", "embed") == (1, WRONG, {"done": 3, "failed": 2, "there": 0})
    assert files(tmp_path / "out") == sorted([*(f"{name}.safetensors" for name in GOOD), "worklist.json"])
    alone = {name: (tmp_path / "out" / f"{name}.safetensors").read_bytes() for name in GOOD}
    target = minimtp.load("tiny-gemma4")
    tensors, _ = read_safetensors(tmp_path / "out" / "two.safetensors")
    assert np.array_equal(tensors["logits"].stored(), target.forward(LINES[1]["ids"], target.new_cache()).logits_TV)
    (tmp_path / "out").rename(tmp_path / "first")
    assert cli("logits", "--taps", "embed", "--workers", "2")[:2] == (1, WRONG)
    assert alone == {name: (tmp_path / "out" / f"{name}.safetensors").read_bytes() for name in GOOD}


def test_a_list_goes_on_where_it_stopped(cli, tmp_path):
    assert cli("logits", items=LINES[:2])[0] == 0
    times = {name: (tmp_path / "out" / f"{name}.safetensors").stat().st_mtime_ns for name in ("one", "two")}
    (tmp_path / "out" / "three.safetensors.partial").write_bytes(b"")  # killed as it began
    items = [item for item in LINES if item["id"] in GOOD]
    assert cli("logits", items=items) == (0, {}, {"done": 1, "failed": 0, "there": 2})
    assert files(tmp_path / "out") == sorted([*(f"{name}.safetensors" for name in GOOD), "worklist.json"])
    assert times == {name: (tmp_path / "out" / f"{name}.safetensors").stat().st_mtime_ns for name in times}
    assert cli("logits", items=items) == (0, {}, {"done": 0, "failed": 0, "there": 3})
    status, said, _ = cli("logits", "--rows", "1", items=items)
    assert status == 2 and "results of another list (other options)" in str(said)
    status, said, _ = cli("logits", model="tiny-qwen35", items=items)
    assert status == 2 and "results of another list (other models)" in str(said)


def test_golden_runs_of_a_list(cli, tmp_path):
    options = "-n", "4", "-k", "2"
    assert cli("golden", *options) == (1, WRONG, {"done": 3, "failed": 2, "there": 0})
    for name in GOOD:
        run, _ = read_golden(tmp_path / "out" / name)
        assert ("prompt_text" in run) == (name != "two") and len(run["text"]) == len(run["prompt"]) + 4
    assert run["prompt"] == LINES[1]["ids"]
    (tmp_path / "out" / "one" / "golden.json").unlink()
    assert cli("golden", *options)[2] == {"done": 1, "failed": 2, "there": 2}


def test_acceptance_over_a_list_of_texts(cli, tmp_path, capsys):
    options = "-n", "6", "-k", "2", "--temp", "1"
    assert cli("acceptance", *options)[::2] == (1, {"done": 3, "failed": 2, "there": 0})
    report = json.loads((tmp_path / "out" / "one.json").read_text())
    assert "costs" not in report and "speedup" not in report["rules"]["argmax"]
    (tmp_path / "ids.json").write_text(json.dumps(minimtp.load("tiny-gemma4").tokenizer.encode(LINES[0]["prompt"])))
    assert main(["acceptance", *options, "--ids", str(tmp_path / "ids.json"), "--json", "--cost", "0"]) == 0
    alone = json.loads(capsys.readouterr().out)["rules"]
    assert report["rules"]["rejection"]["kept"] == alone["rejection"]["kept"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["acceptance", "--text", "x"], "--prompts and --text do not go together"),
        (["acceptance", "--plot", "x.png"], "--prompts and --plot"),
        (["golden", "--prompt", "x"], "--prompts and --prompt do not"),
        (["logits", "--ids", "x"], "expected one of"),
        (["logits", "--workers", "0"], "--workers must be at least 1"),
    ],
)
def test_what_does_not_go_with_a_list(cli, tmp_path, arguments, said):
    command, *options = arguments
    status, told, _ = cli(command, *options)
    assert status == 2 and said in str(told)
    assert not (tmp_path / "out").exists()


def test_a_list_needs_a_place_for_its_results(tmp_path, capsys):
    path = write_list(tmp_path, LINES)
    for options, said in ([], "-o is needed"), (["-o", str(tmp_path / "none" / "out")], "no such folder"):
        assert main(["acceptance", "--prompts", str(path), *options]) == 2
        assert said in capsys.readouterr().err


def test_an_interrupted_list_says_that_it_can_go_on(cli, monkeypatch):
    ended = iter([(LINES[0], None)])
    monkeypatch.setattr("minimtp.cli_worklist.work", lambda *arguments: interrupted(ended))
    status, said, counts = cli("logits")
    assert (status, counts) == (130, None) and said == {"interrupted": "the same command goes on from there"}


def interrupted(ended):
    yield from ended
    raise KeyboardInterrupt


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX system")
def test_a_list_whose_process_is_killed_leaves_nobody_at_work_and_can_be_finished(tmp_path):
    ids = minimtp.load("tiny-gemma4").tokenizer.encode(bundled("heldout.txt").read_text(encoding="utf-8"))[:1200]
    path, folder = write_list(tmp_path, [{"id": name, "ids": ids} for name in "ab"]), tmp_path / "out"
    arguments = ["logits", "tiny-gemma4", "--prompts", str(path), "-o", str(folder), "--chunk", "30", "--rows", "16"]
    command = [sys.executable, "-m", "minimtp", *arguments, "--workers", "2"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not list(folder.glob("*.partial-cache")):
        time.sleep(0.002)
    run.kill()
    run.communicate()  # returns when all that have its standard error have ended
    assert not list(folder.glob("*.safetensors"))
    assert main(arguments) == 0
    assert len({each.read_bytes() for each in folder.glob("*.safetensors")}) == 1
    assert files(folder) == [*(f"{name}.safetensors" for name in "ab"), "worklist.json"]
