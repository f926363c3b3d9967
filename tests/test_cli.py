"""The commands as people use them: text on standard output, the rest on standard error, and no traceback, ever."""

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

try:
    import termios
except ImportError:  # no terminals here
    termios = None
from random_models import write_target
from test_loading import SIZES, WRONG, WRONG_DRAFTERS, break_target, edit_json, new_assistant, value
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import minimtp
from minimtp.chat import Conversation
from minimtp.checkpoint import CheckpointError
from minimtp.cli import BUNDLED, GROUPS, legend, main, trace_line
from minimtp.cli_common import hang
from minimtp.loading import bundled

COMMAND = [sys.executable, "-m", "minimtp"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONUNBUFFERED", "NO_COLOR")}
SHORT = ["run", "To be, or", "-n", "24"]
pytestmark = pytest.mark.filterwarnings("error")  # a warning would be a line on standard error


def process(*arguments, **options):
    """Run a command in a process of its own; text is bytes."""
    options = {"stdin": subprocess.DEVNULL, "timeout": 60, "env": ENVIRONMENT} | options
    return subprocess.run([*COMMAND, *arguments], capture_output=True, **options)


@pytest.fixture(scope="module")
def expected():
    """The text that SHORT gives, by the library alone."""
    target = minimtp.load(BUNDLED)
    steps = list(minimtp.generate(target, target.tokenizer.encode(SHORT[1]), max_new_tokens=24, stop=target.stop_ids))
    return target.tokenizer.decode([token for step in steps for token in step.tokens])


CLOSING = re.compile(
    r"(\d+) tokens in (\d+) target passes: [\d.]+ a pass(, accepted by depth( \d+%)+)?; [\d.]+ s, \d+ tokens/s\n"
)


def lines(text):
    assert text.endswith("\n") or not text
    return text.splitlines()


def refusal(result, said):
    """Status 2, nothing on standard output, one line on standard error that matches."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert len(lines(err)) == 1 and err.startswith("minimtp") and "Traceback" not in err
    assert re.search(said, err), err


# run


def test_run_prints_the_text_and_nothing_else(cli, expected):
    status, out, err = cli(*SHORT)
    assert (status, out) == (0, expected + "\n")
    closing = CLOSING.fullmatch(err)
    assert int(closing[1]) == 24 >= int(closing[2]) and closing[3]


@pytest.mark.parametrize("draft", ["auto", "none", "lookup", BUNDLED + "-assistant", "PATH"])
@pytest.mark.parametrize("keep", ["dense", "packed"])
def test_drafts_do_not_change_the_text(cli, expected, draft, keep):
    draft = bundled(BUNDLED + "-assistant") if draft == "PATH" else draft
    status, out, err = cli(*SHORT, "--draft", draft, "--keep", keep)
    assert (status, out) == (0, expected + "\n")
    assert CLOSING.fullmatch(err)
    if draft == "none":
        assert "24 tokens in 24 target passes: 1.00 a pass; " in err


def test_the_bundled_model_needs_no_prompt_and_another_does(cli):
    status, out, err = cli("run", "-n", "3")
    prompt, closing = err.split("\n", 1)
    assert status == 0 and out.strip() and prompt == 'prompt: "ROMEO:\\n"' and CLOSING.fullmatch(closing)
    refusal(cli("run", "--model", bundled(BUNDLED)), "no prompt")


def test_without_a_drafter_beside_the_model_run_says_so(cli, tmp_path, expected):
    shutil.copytree(bundled(BUNDLED), tmp_path / "alone")
    status, out, err = cli(*SHORT, "--model", tmp_path / "alone")
    assert (status, out) == (0, expected + "\n")
    first, closing = lines(err)
    assert "no drafter" in first and CLOSING.fullmatch(closing + "\n")
    refusal(cli(*SHORT, "--model", tmp_path / "alone", "--draft", tmp_path / "none"), "none: no such file or folder")


def test_a_model_in_the_current_folder(cli, tmp_path, monkeypatch, expected):
    for name in (BUNDLED, BUNDLED + "-assistant"):
        shutil.copytree(bundled(name), tmp_path / name)
    monkeypatch.chdir(tmp_path / BUNDLED)
    status, out, err = cli(*SHORT, "--model", ".")
    assert (status, out) == (0, expected + "\n") and "accepted by depth" in err


def test_a_seed_replays_a_run(cli):
    sampled = [*SHORT, "--temp", "1", "--top-k", "40", "--top-p", "0.95", "--min-p", "0.01", "--dtype", "float64"]
    first, again, other = (cli(*sampled, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("rule", ["greedy", "rejection", "match"])
def test_every_rule_runs(cli, rule, expected):
    assert cli(*SHORT, "--rule", rule)[:2] == (0, expected + "\n")
    status, out, _ = cli(*SHORT, "--rule", rule, "--temp", "2")
    assert status == 0 and (out == expected + "\n") == (rule == "greedy")


def test_run_ends_at_a_stop_token(cli, tmp_path):
    def tokens(*arguments):
        return [token for line in lines(cli(*SHORT, "--json", *arguments)[1]) for token in json.loads(line)["tokens"]]

    shutil.copytree(bundled(BUNDLED), tmp_path / "model")
    whole = tokens()
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [whole[2]]}))
    for draft in ("none", "lookup", BUNDLED + "-assistant"):
        assert tokens("--model", tmp_path / "model", "--draft", draft) == whole[: whole.index(whole[2]) + 1]


@pytest.mark.parametrize("how", [[], ["--json"], ["--trace"]])
def test_tokens_that_are_no_text_do_no_harm(cli, monkeypatch, how):
    """At a high temperature the bytes of characters come in any order."""
    tokenizer = minimtp.load(BUNDLED).tokenizer
    tokens = [tokenizer.id(f"<0x{byte:02X}>") for byte in b"A\xf0\x9f"] + tokenizer.encode("bc", special=False)
    verdicts = [minimtp.Verdict(0, token) for token in tokens]
    steps = [minimtp.Step((v.token,), 0, 0, 0.1, minimtp.Draft(()), v, (0.5,), ()) for v in verdicts]
    monkeypatch.setattr("minimtp.cli.generate", lambda *arguments, **options: iter(steps))
    status, out, err = cli("run", "x", *how)
    text = "".join(json.loads(line)["text"] for line in lines(out)) if how == ["--json"] else out
    assert status == 0 and text.rstrip("\n").endswith("bc") and "\ufffd" in text


STEP = {"tokens", "text", "draft", "accepted", "uniforms", "draft_uniforms", "seconds"}
SUMMARY = {"tokens", "passes", "tokens_per_pass", "acceptance", "seconds"}


def test_json_is_one_step_a_line(cli, expected):
    status, out, err = cli(*SHORT, "--json")
    steps, summary = [json.loads(line) for line in lines(out)], json.loads(err)
    assert status == 0 and len(lines(err)) == 1
    assert all(step.keys() >= STEP for step in steps) and summary.keys() >= SUMMARY
    assert "".join(step["text"] for step in steps) == expected
    tokens = [token for step in steps for token in step["tokens"]]
    assert minimtp.load(BUNDLED).tokenizer.decode(tokens) == expected
    assert summary["tokens"] == len(tokens) == 24 and summary["passes"] == len(steps)
    assert summary["tokens_per_pass"] == 24 / len(steps)
    for step in steps:
        assert len(step["uniforms"]) == len(step["draft"]) + 1 == len(step["draft_uniforms"]) + 1
        assert step["tokens"][: step["accepted"]] == step["draft"][: step["accepted"]]
    share = sum(step["accepted"] > 0 for step in steps) / sum(len(step["draft"]) > 0 for step in steps)
    assert summary["acceptance"][0] == pytest.approx(share)


def test_json_shows_what_plain_decoding_does(cli):
    status, out, err = cli("run", "x", "-n", "1", "--json")
    assert status == 0 and len(lines(out)) == 1 and json.loads(out)["draft"] == []
    assert json.loads(err)["acceptance"] == [] and json.loads(err)["tokens"] == 1


# Traces

TRACE = re.compile(r' *(\d+) (\d+)/(\d+)  ((?:[+x.>*]"(?:[^"\\]|\\.)*" ?)+)')


def test_a_trace_can_be_read_without_colour(cli, expected):
    status, out, err = cli(*SHORT, "--trace")
    assert (status, out) == (0, expected + "\n")
    assert "\033" not in err
    first, *rounds, closing = lines(err)
    assert first == legend() and all(f"{mark} " in first for mark in "+x.>*")
    shown = []
    for number, line in enumerate(rounds):
        match = TRACE.fullmatch(line)
        marks = "".join(re.findall(r'(?:^| )([+x.>*])"', match[4]))
        accepted, drafted = int(match[2]), int(match[3])
        assert int(match[1]) == number and len(marks) == drafted + 1
        rest = "*" if accepted == drafted else "x" + "." * (drafted - accepted - 1) + ">"
        assert marks == "+" * accepted + rest
        shown += re.findall(r'[+>*]("(?:[^"\\]|\\.)*")', match[4])
    assert "".join(map(json.loads, shown)).startswith(expected)
    assert CLOSING.fullmatch(closing + "\n")[2] == str(len(rounds))


@pytest.mark.parametrize("kept", [1, 3, 4, 5])
def test_a_trace_ends_where_the_text_does(expected, kept):
    """The stop token may be an accepted draft token: what came after it was not emitted."""
    tokenizer = minimtp.load(BUNDLED).tokenizer
    *draft, bonus = map(tokenizer.id, "abcdz")
    tokens = tuple([*draft, bonus][:kept])
    step = minimtp.Step(tokens, 4, min(kept, 4), 0.1, minimtp.Draft(draft), minimtp.Verdict(4, bonus), (0.5,) * 5, ())
    match = TRACE.fullmatch(trace_line(0, step, tokenizer))
    marks = re.findall(r'([+x.>*])("[^"]*")', match[4])
    assert [json.loads(token) for mark, token in marks if mark in "+>*"] == [tokenizer.decode([id]) for id in tokens]
    assert "".join(mark for mark, _ in marks).rstrip(".") == ("++++*" if kept == 5 else "+" * kept)


def test_colours_say_what_the_marks_say(expected):
    target = minimtp.load(BUNDLED)
    tokenizer, drafter = target.tokenizer, minimtp.load_drafter("auto", target)
    steps = list(minimtp.generate(target, tokenizer.encode(SHORT[1]), drafter, max_new_tokens=24))
    coloured = [trace_line(0, step, tokenizer, colours=True) for step in steps]
    plain = [trace_line(0, step, tokenizer) for step in steps]
    assert [COLOUR.sub("", line) for line in coloured] == plain and COLOUR.sub("", legend(colours=True)) == legend()
    colour_of = dict(re.findall(r"\033\[38;5;(\d+)m([+x.>*])", "".join([legend(colours=True), *coloured])))
    assert len(colour_of) == len(set(colour_of.values())) == 5


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
@pytest.mark.parametrize("environment, coloured", [({}, True), ({"NO_COLOR": "1"}, False)])
def test_a_terminal_sees_colours_unless_it_asks_not_to(environment, coloured, expected):
    done, seen = on_a_terminal(subprocess.PIPE, environment)
    assert (done.returncode, done.stdout.decode()) == (0, expected + "\n")
    assert '"' in seen and ("\033[" in seen) == coloured


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_text_and_trace_on_one_terminal_do_not_mix(expected):
    done, seen = on_a_terminal(None, {})
    trace, text, closing = COLOUR.sub("", seen).partition("\n\n" + expected + "\n")
    assert done.returncode == 0 and trace.startswith(legend() + "\n") and CLOSING.fullmatch(closing)
    assert all(map(TRACE.fullmatch, trace.split("\n")[1:]))


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_a_narrow_terminal_sees_rounds_that_hang(expected):
    done, seen = on_a_terminal(subprocess.PIPE, {}, width=36)
    shown = COLOUR.sub("", seen)
    assert done.returncode == 0 and all(len(line) <= 36 for line in lines(shown))
    assert shown.startswith(legend(width=36) + "\n") and re.search(r'\n {10}[+x.>*]"', shown)


def test_parts_hang_by_the_columns_they_take():
    assert hang(["head", "日本", "語"], 9, 2) == "head 日本\n  語"
    assert hang(["head", "日本", "語"], 12, 2) == hang(["head", "日本", "語"], None, 2) == "head 日本 語"
    assert hang(["a", "\033[38;5;35mbb\033[0m"], 4, 1) == "a \033[38;5;35mbb\033[0m"


COLOUR = re.compile(r"\033\[[\d;]*m")


def on_a_terminal(stdout, environment, width=200):
    """Run SHORT with --trace, standard error (and output, where None) being a terminal -> (process, what it shows)."""
    master, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, width))
    seen = bytearray()
    reader = threading.Thread(target=read_terminal, args=(master, seen))
    reader.start()
    streams = {"stdout": stdout or terminal, "stderr": terminal, "stdin": subprocess.DEVNULL}
    environment = ENVIRONMENT | {"TERM": "xterm"} | environment
    done = subprocess.run([*COMMAND, *SHORT, "--trace"], **streams, env=environment, timeout=60)
    os.close(terminal)
    reader.join(10)
    os.close(master)
    return done, seen.decode().replace("\r\n", "\n")


def read_terminal(master, seen):
    try:
        while data := os.read(master, 4096):
            seen += data
    except OSError:  # the other end is closed
        pass


# Prompts


@pytest.mark.parametrize("prompt", ["To be, or", "x", " ", "\n", "<bos>To be", "a<eos>b", "<|turn>user", "<unk>",
                                    "é🙂 日本語", "\x00", "-5", "a" * 700])  # fmt: skip
def test_prompts_of_all_kinds(cli, prompt):
    status, out, err = cli("run", prompt, "-n", "3")
    assert status == 0 and CLOSING.fullmatch(err)


def stdin(data, encoding="utf-8", errors="strict"):
    return io.TextIOWrapper(io.BytesIO(data), encoding, errors)


def test_a_prompt_from_standard_input(cli, monkeypatch, expected):
    monkeypatch.setattr("sys.stdin", stdin(SHORT[1].encode()))
    assert cli("run", "-", *SHORT[2:])[:2] == (0, expected + "\n")


def test_a_prompt_through_a_pipe(expected):
    done = process("run", "-", *SHORT[2:], input=SHORT[1].encode(), stdin=None)
    assert (done.returncode, done.stdout.decode()) == (0, expected + "\n")
    assert CLOSING.fullmatch(done.stderr.decode())


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_standard_input_that_is_no_text(cli, monkeypatch, errors):
    """Which of the two it is depends on the locale."""
    monkeypatch.setattr("sys.stdin", stdin(b"caf\xe9", errors=errors))
    refusal(cli("run", "-"), "input|text")


def test_an_argument_that_is_no_text(cli):
    refusal(cli("run", os.fsdecode(b"caf\xe9")), "prompt|text")


def test_an_empty_prompt_is_refused(cli, monkeypatch):
    """An unset variable or an empty file, more likely than a wish; <bos> as the prompt says the same on purpose."""
    refusal(cli("run", ""), "empty")
    monkeypatch.setattr("sys.stdin", stdin(b""))
    refusal(cli("run", "-"), "empty")
    assert cli("run", "<bos>", "-n", "2")[0] == 0


def test_a_prompt_longer_than_the_context(cli, monkeypatch):
    long = "word " * minimtp.load(BUNDLED).config.max_position_embeddings
    refusal(cli("run", long), r"prompt of \d+ tokens is \d+ longer than the context")
    monkeypatch.setattr("sys.stdin", stdin(20 * long.encode()))
    refusal(cli("run", "-"), r"prompt of \d+ tokens is \d+ longer than the context")


# Bad use and bad input

BAD_USE = {
    "no command": ([], "COMMAND"),
    "unknown command": (["fly"], "fly"),
    "unknown option": (["run", "x", "--fast"], "--fast"),
    "two prompts": (["run", "x", "y"], "y"),
    "k no number": (["run", "x", "-k", "four"], "four"),
    "k 0": (["run", "x", "-k", "0"], r"num.draft.* 0"),
    "k below 0": (["run", "x", "-k", "-3"], r"num.draft.* -3"),
    "k above 15": (["run", "x", "-k", "16"], r"num.draft.* 16"),
    "n 0": (["run", "x", "-n", "0"], r"max.new.tokens.* 0"),
    "n no number": (["run", "x", "-n", "1.5"], "1.5"),
    "temperature below 0": (["run", "x", "--temp", "-0.5"], "temp.* -0.5"),
    "temperature NaN": (["run", "x", "--temp", "nan"], "temp.* nan"),
    "temperature too small": (["run", "x", "--temp", "1e-320"], "temperature 1e-320 is too small"),
    "top-k 0": (["run", "x", "--top-k", "0"], "top.k.* 0"),
    "top-p above 1": (["run", "x", "--top-p", "1.5"], "top.p.* 1.5"),
    "top-p 0": (["run", "x", "--top-p", "0"], "top.p.* 0"),
    "min-p below 0": (["run", "x", "--min-p", "-1"], "min.p.* -1"),
    "seed below 0": (["run", "x", "--seed", "-1"], "seed.* -1"),
    "unknown rule": (["run", "x", "--rule", "best"], "best"),
    "unknown backend": (["run", "x", "--backend", "torch"], "torch"),
    "unknown dtype": (["run", "x", "--dtype", "int8"], "int8"),
    "no such model": (["run", "x", "--model", "no/such/model"], "no/such/model: no such file or folder"),
    "no such bundled model": (["run", "x", "--model", "tiny"], "tiny: no such file or folder"),
    "no such drafter": (["run", "x", "--draft", "no-such"], "no-such: no such file or folder"),
    "drafter as target": (["run", "x", "--model", BUNDLED + "-assistant"], "not a target"),
    "target as drafter": (["run", "x", "--draft", BUNDLED], "not a drafter"),
    "show nothing": (["show", "no/such/model"], "no/such/model: no such file or folder"),
    "show no context": (["show", "--context", "0"], "context.* 0"),
    "bench nothing": (["bench", "no/such/model"], "no/such/model: no such file or folder"),
    "bench no prompts": (["bench", "--prompts", "0"], "prompts"),
    "bench too much": (["bench", "--prompts", "1000000"], "too few for 1000000 prompts"),
    "bench no text": (["bench", "--text", "no-such.txt"], "no-such.txt"),
    "bench a folder": (["bench", "--text", "."], r"'\.'"),
    "bench k 0": (["bench", "-k", "0", "--prompts", "1"], "num.draft.* 0"),
    "bench one token": (["bench", "-n", "1", "--prompts", "1"], "more tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_USE)
def test_bad_use_is_one_line_and_status_2(cli, case):
    arguments, said = BAD_USE[case]
    refusal(cli(*arguments), said)


def test_bench_of_what_is_no_text(cli, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9" * 1000)
    refusal(cli("bench", "--text", tmp_path / "latin.txt"), "latin.txt")


def test_cupy_where_there_is_none(cli):
    if importlib.util.find_spec("cupy") is None:
        refusal(cli("run", "x", "--backend", "cupy"), "cupy")


def listing(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_checkpoint_is_one_line_and_status_2(cli, tmp_path, case):
    folder, message = break_target(tmp_path, case)
    before = listing(tmp_path)
    refusal(cli("run", "x", "--model", folder), message)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("case", WRONG_DRAFTERS)
def test_a_wrong_drafter_is_one_line_and_status_2(cli, tmp_path, case):
    target = small_model(tmp_path)
    Tokenizer(WordLevel({"x": 0}, unk_token="x")).save(str(target / "tokenizer.json"))
    change, message = WRONG_DRAFTERS[case]
    change(new_assistant(tmp_path))
    before = listing(tmp_path)
    refusal(cli("run", "x", "--model", target, "--draft", tmp_path / "assistant"), message)
    assert listing(tmp_path) == before


def small_model(folder):
    write_target(folder / "target", 1, **SIZES)
    return folder / "target"


def test_a_model_without_a_tokenizer_cannot_run(cli, tmp_path):
    refusal(cli("run", "x", "--model", small_model(tmp_path)), "has no tokenizer")
    refusal(cli("bench", small_model(tmp_path)), "has no tokenizer")


def test_a_bad_checkpoint_in_a_process_of_its_own(tmp_path):
    folder, message = break_target(tmp_path, "NaN linear")
    done = process("run", "x", "--model", str(folder))
    refusal((done.returncode, done.stdout.decode(), done.stderr.decode()), message)


@pytest.mark.parametrize("name", ["embed_tokens.weight", "layers.0.mlp.up_proj.weight"])
def test_weights_that_overflow_are_an_error_without_warnings(cli, tmp_path, name):
    shutil.copy(bundled(BUNDLED) / "tokenizer.json", tmp_path)
    write_target(tmp_path, 1, **SIZES | {"vocab_size": minimtp.load(BUNDLED).config.vocab_size})
    value(name, 3e38)(tmp_path)
    status, _, err = cli("run", "To be, or", "--model", tmp_path)
    assert status == 2 and "Warning" not in err and lines(err)[-1].startswith("minimtp: ")


def test_an_error_half_way_leaves_whole_lines(cli, monkeypatch):
    def failing(*arguments, **options):
        yield from list(minimtp.generate(*arguments, **options))[:2]
        raise CheckpointError("a disk\nwent away")

    monkeypatch.setattr("minimtp.cli.generate", failing)
    status, out, err = cli(*SHORT)
    assert status == 2 and out.endswith("\n")
    assert lines(err)[-1] == "minimtp: a disk went away" and "Traceback" not in err
    status, out, err = cli(*SHORT, "--json")
    assert status == 2 and len([json.loads(line) for line in lines(out)]) == 2


# Interrupts, pipes and streams


def start(*arguments, stderr=subprocess.PIPE):
    command = [*COMMAND, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=ENVIRONMENT, bufsize=0)


@pytest.mark.parametrize("arguments", [["-n", "1900", "--draft", "none"], ["-n", "1900", "--json"]])
def test_interrupt_keeps_the_text_so_far(arguments):
    with start("run", "To be, or", *arguments) as running:
        first = b""
        while len(first) < 200 and (data := running.stdout.read(200)):
            first += data
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=30)
    assert running.returncode == 130
    *before, closing = lines(err.decode())
    assert before == []
    if "--json" in arguments:
        steps = [json.loads(line) for line in lines((first + out).decode())]
        assert len(steps) - 1 <= json.loads(closing)["passes"] <= len(steps) < 1900
    else:
        assert (first + out).endswith(b"\n")
        assert 1 <= int(CLOSING.fullmatch(closing + "\n")[1]) < 1900


@pytest.mark.parametrize("where", ["load_pair", "generate"])
def test_interrupt_before_the_first_token(cli, monkeypatch, where):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"minimtp.cli.{where}", interrupted)
    assert cli(*SHORT) == (130, "", "")


@pytest.mark.parametrize("arguments", [["run", "x", "-n", "1900"], ["run", "x", "-n", "1900", "--json"]])
def test_a_reader_who_leaves_early(arguments):
    with start(*arguments) as running:
        assert running.stdout.read(20)
        running.stdout.close()
        err = running.stderr.read().decode()
        assert running.wait(30) == 141
    assert "Traceback" not in err and "Exception" not in err and len(lines(err)) <= 1


def test_a_reader_of_both_streams_who_leaves_early():
    with start("run", "x", "-n", "1900", "--trace", stderr=subprocess.STDOUT) as running:
        seen = running.stdout.read(20)
        running.stdout.close()
        assert running.wait(30) == 141 and b"Traceback" not in seen


def test_a_reader_who_never_came():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, "show"], stdout=write, stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device here")
@pytest.mark.parametrize("command", [SHORT, ["show"]])
def test_a_full_disk(command):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, *command], stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=60)
    assert done.returncode == 2 and b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    assert lines(done.stderr.decode())[-1].startswith("minimtp: ")


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
@pytest.mark.parametrize("closed, status", [("<&-", 2), (">&-", 0), ("2>&-", 0)])
def test_closed_streams(closed, status, expected):
    prompt = "-" if closed == "<&-" else SHORT[1]
    command = ["/bin/sh", "-c", f'exec "$@" {closed}', "sh", *COMMAND, "run", prompt, "-n", "24"]
    done = subprocess.run(command, capture_output=True, env=ENVIRONMENT, timeout=60)
    assert done.returncode == status and b"Traceback" not in done.stderr
    assert done.stdout.decode() in ("", expected + "\n")


@pytest.mark.skipif(sys.getfilesystemencoding() != "utf-8", reason="file names of ASCII only")
def test_a_terminal_that_knows_ascii_only(tmp_path):
    folder = tmp_path / "modèle-日本"
    write_target(folder, 1, **SIZES)
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    done = process("show", str(folder), env=environment)
    assert done.returncode == 0 and b"mod?le-??" in done.stdout


def test_a_notebook_can_call_main(monkeypatch, expected):
    """Its streams are not files."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    assert main(SHORT) == 0 and out.getvalue() == expected + "\n"


# chat


def say(monkeypatch, *lines_typed, **options):
    monkeypatch.setattr("sys.stdin", stdin("\n".join(lines_typed).encode(), **options))


CHAT = ["chat", "-n", "12"]


def test_chat_answers_every_line(cli, monkeypatch):
    say(monkeypatch, "Hello", "", "  ", "Who are you?")
    status, out, err = cli(*CHAT)
    assert status == 0 and out.endswith("\n") and len(lines(err)) == 2
    assert all(CLOSING.fullmatch(line + "\n") for line in lines(err))


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_chat_on_a_terminal_asks_edits_and_ends():
    master, terminal = os.openpty()
    seen = bytearray()
    reader = threading.Thread(target=read_terminal, args=(master, seen))
    reader.start()

    def wait_for(count):
        end = time.monotonic() + 30
        while seen.count(b"\n> ") < count and time.monotonic() < end:
            time.sleep(0.02)

    environment = ENVIRONMENT | {"TERM": "dumb"}
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    with subprocess.Popen([*COMMAND, *CHAT, "--temp", "0"], **streams, env=environment) as running:
        for number, keys in enumerate((b"Hellp\x7fo\n", b"/reset\n", b"\x10\x10\n", b"\x04"), 1):  # twice back: Hello
            wait_for(number)
            os.write(master, keys)
        try:
            assert running.wait(30) == 0
        finally:
            running.kill()
            os.close(terminal)
            reader.join(10)
            os.close(master)
    shown = seen.decode().replace("\r\n", "\n")
    hint, *_, last = shown.split("\n> ")
    assert hint.startswith(BUNDLED) and "/exit" in hint and last.strip() == "" and last.endswith("\n")
    first, again = re.findall(r"(?:o|Hello \x08)\n((?s:.+?))\n12 tokens", shown)
    assert first == again


def test_chat_of_nothing(cli, monkeypatch):
    for typed in ([], [""], ["/exit", "Hello"], ["/reset"]):
        say(monkeypatch, *typed)
        assert cli(*CHAT) == (0, "", "")


def test_chat_remembers_until_told_to_forget(cli, monkeypatch):
    greedy = [*CHAT, "--temp", "0"]

    def answer_to(*typed):
        say(monkeypatch, *typed)
        return cli(*greedy)[1]

    hello, bye = answer_to("Hello"), answer_to("Good night, good night")
    both = answer_to("Hello", "Good night, good night")
    assert both.startswith(hello) and both != hello + bye
    assert answer_to("Hello", "/reset", "Good night, good night") == hello + bye


def test_a_conversation_keeps_what_was_said():
    target = minimtp.load(BUNDLED)
    conversation = Conversation(target)
    tokens = [token for step in conversation.ask("Hello", max_new_tokens=5) for token in step.tokens]
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": target.tokenizer.decode(tokens)}]
    assert conversation.messages == said and len(tokens) == 5
    with pytest.raises(ValueError, match="longer than the context"):
        list(conversation.ask("word " * target.config.max_position_embeddings))
    assert conversation.messages == said
    steps = conversation.ask("And then?")
    first = next(steps)
    steps.close()
    said += [{"role": "user", "content": "And then?"}]
    said += [{"role": "assistant", "content": target.tokenizer.decode(first.tokens)}]
    assert conversation.messages == said


def test_chat_takes_a_system_prompt_and_a_seed(cli, monkeypatch):
    outs = []
    for options in ([], [], ["--seed", "5"], ["--system", "You are a king."]):
        say(monkeypatch, "Hello")
        outs.append(cli(*CHAT, *options)[1])
    assert outs[0] == outs[1] and outs[2] != outs[0] != outs[3]


def test_chat_drafts_do_not_change_greedy_answers(cli, monkeypatch):
    outs = set()
    for draft in ("auto", "none", "lookup"):
        say(monkeypatch, "Hello", "And then?", "To be, or not to be?")
        outs.add(cli(*CHAT, "--temp", "0", "--draft", draft)[1])
    assert len(outs) == 1


def test_chat_json_and_trace(cli, monkeypatch):
    say(monkeypatch, "Hello", "And then?")
    status, out, err = cli(*CHAT, "--json")
    assert status == 0 and all(json.loads(line).keys() >= STEP for line in lines(out))
    summaries = [json.loads(line) for line in lines(err)]
    assert sum(summary["passes"] for summary in summaries) == len(lines(out)) and len(summaries) == 2
    say(monkeypatch, "Hello")
    status, out, err = cli(*CHAT, "--trace")
    assert status == 0 and all(TRACE.fullmatch(line) for line in lines(err)[1:-1])


def test_an_interrupted_answer_does_not_end_the_chat(cli, monkeypatch):
    calls = []

    def interrupted_once(*arguments, **options):
        steps = list(minimtp.generate(*arguments, **options))
        calls.append(len(steps))
        yield steps[0]
        if len(calls) == 1:
            raise KeyboardInterrupt
        yield from steps[1:]

    monkeypatch.setattr("minimtp.chat.generate", interrupted_once)
    say(monkeypatch, "Hello", "And then?")
    status, out, err = cli(*CHAT, "--draft", "none")
    assert status == 0 and len(calls) == 2 and "1 tokens in 1 target passes" in err and "Traceback" not in err


def test_chat_stops_where_the_context_is_full(cli, monkeypatch, tmp_path):
    shutil.copytree(bundled(BUNDLED), tmp_path / "model")
    edit_json(tmp_path / "model", "text_config.max_position_embeddings", 60)
    say(monkeypatch, *["Hello, hello, hello"] * 20)
    status, out, err = cli("chat", "--model", tmp_path / "model", "--draft", "none", "--temp", "0")
    assert status == 2 and "Traceback" not in err
    assert re.fullmatch(r"minimtp: a prompt of \d+ tokens is \d+ longer than the context has room for", lines(err)[-1])


TEMPLATES = {
    "does not compile": "{% for %}",
    "no such name": "{{ nothing.at.all }}",
    "refuses": "{{ raise_exception('no roles\nplease') }}",
    "divides": "{{ 1 // 0 }}",
    "wrong type": "{{ 'a' + 1 }}",
    "reaches out": "{{ ''.__class__.__mro__[1].__subclasses__()[0].x }}",
    "endless": "{% for i in range(10**12) %}x{% endfor %}",
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_broken_chat_template_is_one_line(cli, monkeypatch, tmp_path, case):
    shutil.copytree(bundled(BUNDLED), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATES[case])
    say(monkeypatch, "Hello")
    refusal(cli(*CHAT, "--model", tmp_path / "model", "--draft", "none"), "chat template")


@pytest.mark.parametrize("settings", [[], {}, {"chat_template": 5}, {"chat_template": ["x"]},
                                      {"chat_template": [{"name": "x"}]},
                                      {"chat_template": "{{ bos_token }}", "bos_token": 5}])  # fmt: skip
def test_other_broken_templates(cli, monkeypatch, tmp_path, settings):
    shutil.copytree(bundled(BUNDLED), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    say(monkeypatch, "Hello")
    status, out, err = cli(*CHAT, "--model", tmp_path / "model", "--draft", "none")
    if "bos_token" not in settings:
        refusal((status, out, err), "template|tokenizer_config.json")
    assert "Traceback" not in err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_chat_with_what_is_no_text(cli, monkeypatch, errors):
    monkeypatch.setattr("sys.stdin", stdin(b"caf\xe9\n", errors=errors))
    refusal(cli(*CHAT), "input|text")


@pytest.mark.parametrize("field", [{"temperature": "hot"}, {"top_k": -1}, {"top_p": [0.5]}, {"suppress_tokens": 5},
                                   {"suppress_tokens": ["a"]}, {"presence_penalty": "x"}])  # fmt: skip
def test_a_broken_recommendation_is_one_line(cli, monkeypatch, tmp_path, field):
    shutil.copytree(bundled(BUNDLED), tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(field))
    say(monkeypatch, "Hello")
    refusal(cli(*CHAT, "--model", tmp_path / "model", "--draft", "none"), next(iter(field)).split("_")[0])


@pytest.mark.parametrize("command", ["run", "chat"])
def test_what_stands_for_an_image_is_never_emitted(cli, monkeypatch, tmp_path, command):
    """It could not be read again."""
    shutil.copytree(bundled(BUNDLED), tmp_path / "model")
    tokens = [token for line in lines(cli(*SHORT, "--json")[1]) for token in json.loads(line)["tokens"]]
    edit_json(tmp_path / "model", "image_token_id", max(tokens))
    arguments = SHORT if command == "run" else ["chat", "-n", "24"]
    for draft in ("none", BUNDLED + "-assistant"):
        say(monkeypatch, SHORT[1])
        more = ["--temp", "3"] if command == "chat" else []
        status, out, err = cli(*arguments, "--model", tmp_path / "model", "--draft", draft, "--json", *more)
        emitted = [token for line in lines(out) for token in json.loads(line)["tokens"]]
        assert status == 0 and max(tokens) not in emitted


# show and bench


def test_show_says_the_same_as_text_and_as_json(cli):
    status, out, err = cli("show", "--json")
    report = json.loads(out)
    assert (status, err) == (0, "") and len(lines(out)) == 1
    target = minimtp.load(BUNDLED)
    assert report["model"] == str(bundled(BUNDLED)) and report["vocab_size"] == target.config.vocab_size
    assert sorted(i for plan in report["layers"] for i in plan["at"]) == list(range(len(target.config.layers)))
    for table in ("parameters", "stored_bytes"):
        parts = {name: count for name, count in report[table].items() if name != "total"}
        assert report[table]["total"] == sum(parts.values()) > 0
    assert report["parameters"]["embedding"] == report["vocab_size"] * report["hidden_size"]
    assert report["parameters"]["norms"] < report["parameters"]["attention"] < report["parameters"]["mlp"]
    assert report["stored_bytes"]["total"] < (bundled(BUNDLED) / "model.safetensors").stat().st_size
    status, out, err = cli("show")
    assert (status, err) == (0, "") and "\033" not in out
    for number in (report["parameters"]["total"], report["stored_bytes"]["total"], *report["kv"]["bytes"].values()):
        assert f"{number:,}" in out
    assert str(report["hidden_size"]) in out and "k = v" in out


def test_show_counts_the_parameters_and_the_cache_there_are(cli):
    report = json.loads(cli("show", "--context", "100", "--json")[1])
    target = minimtp.load(BUNDLED, keep="dense")
    tree = [target.params.embed_tokens, target.params.norm]
    tree += [weight for layer in target.params.layers for weight in vars(layer).values()]
    assert report["parameters"]["total"] == sum(weight.size for weight in tree)
    cache = target.new_cache(100)
    held = {"sliding": 0, "full": 0}
    for token in [3] * 100:
        target.forward([token], cache, last=0)
        cache.commit()
    for layer in target.config.layers:
        k_GSK, _ = cache.layers[layer.kv].read()
        slots = k_GSK[:, -(target.config.sliding_window + 1) :] if layer.kind == "sliding" else k_GSK
        held[layer.kind] += 2 * slots.nbytes
    assert report["kv"]["bytes"] == held and report["kv"]["context"] == 100 and report["kv"]["itemsize"] == 4


def test_show_a_drafter(cli):
    status, out, _ = cli("show", BUNDLED + "-assistant")
    assert status == 0 and "borrowed kv" in out and "projections" in out
    report = json.loads(cli("show", BUNDLED + "-assistant", "--json")[1])
    assert report["kv"]["bytes"] == {} and not any(plan["owns_kv"] for plan in report["layers"])


def test_show_a_published_configuration(cli):
    """Of which the 31B's files are known to hold this many numbers."""
    report = json.loads(cli("show", "--config", "gemma-4-31b", "--context", "1", "--json")[1])
    assert report["parameters"]["total"] == 30_697_345_340 and "stored_bytes" not in report
    assert sum(len(plan["at"]) for plan in report["layers"]) == 60
    assert report["kv"]["bytes"] == {"sliding": 50 * 2 * 16 * 256 * 4, "full": 10 * 2 * 4 * 512 * 4}
    assert "30,697,345,340" in cli("show", "--config", "gemma-4-31b")[1]
    refusal(cli("show", "--config", "gemma-5"), "gemma-5.*gemma-4-31b")


def test_show_every_published_configuration(cli):
    names = json.loads((Path(minimtp.__file__).parent / "published.json").read_text()).keys()
    for name in names:
        status, out, err = cli("show", "--config", name)
        assert (status, err) == (0, "") and out.startswith(name) and max(map(len, lines(out))) <= 80
    assert all(name.removesuffix("-assistant") in names for name in names) and len(names) >= 10


@pytest.mark.parametrize("case", ["unknown model type", "yarn", "half a header", "no config"])
def test_show_refuses_what_run_refuses(cli, tmp_path, case):
    folder, message = break_target(tmp_path, case)
    refusal(cli("show", folder), message)


RATES = SUMMARY | {"tokens_per_second"}
SMALL = ["--prompts", "2", "-n", "12", "--prompt-tokens", "8"]


def test_bench_json(cli):
    status, out, err = cli("bench", "--json", "-k", "3", *SMALL)
    assert status == 0 and len(lines(out)) == 1 and "Traceback" not in err
    report = json.loads(out)
    assert report.keys() >= {"model", "prompts", "k", "plain", "drafted", "identical", "speedup",
                             "passes", "peak_bytes"}  # fmt: skip
    assert report["plain"].keys() >= RATES and report["drafted"].keys() >= RATES
    assert report["prompts"] == 2 and report["k"] == 3 and report["identical"] is True
    assert report["plain"]["tokens_per_pass"] == 1 <= report["drafted"]["tokens_per_pass"] <= 4
    assert report["plain"]["tokens"] == report["drafted"]["tokens"] == 2 * 11  # without the prompt's
    assert len(report["drafted"]["acceptance"]) <= 3
    cost, seconds = report["passes"]["cost_by_width"], report["passes"]["seconds_by_width"]
    assert list(cost) == list(seconds) == ["1", "2", "3", "4"] and cost["1"] == 1
    assert report["passes"]["cost_of_verification"] == cost["4"] == pytest.approx(seconds["4"] / seconds["1"])
    rates = report["drafted"]["tokens_per_second"], report["plain"]["tokens_per_second"]
    assert min(rates) > 0 and report["speedup"] == pytest.approx(rates[0] / rates[1])
    assert report["peak_bytes"] is None or report["peak_bytes"] > 10 << 20


def test_bench_without_drafts_and_with_a_text_of_ones_own(cli, tmp_path):
    (tmp_path / "own.txt").write_text("To be, or not to be, that is the question. " * 20)
    status, out, _ = cli("bench", "--draft", "none", "--text", tmp_path / "own.txt", *SMALL)
    report = json.loads(out)
    assert status == 0 and "drafted" not in report and report["plain"]["tokens"] == 22


# Checkpoints in other formats


def test_convert_says_what_it_rounded_and_lattice_says_what_is_qat(cli, tmp_path):
    file, folder = tmp_path / "x.gguf", tmp_path / "bf16"
    status, out, err = cli("convert", BUNDLED, file, "--to", "q4_0")
    assert (status, err) == (0, "") and "33 Q4_0" in out and "0 rounded" in out and lines(out)[-1] == "not exact"
    status, out, err = cli("convert", file, folder, "--to", "bf16", "--json")
    assert (status, err) == (0, "") and len(lines(out)) == 1 and json.loads(out)["exact"] is False
    status, out, err = cli("lattice", folder)
    assert (status, err) == (0, "") and "QAT weights: all 33 lie on an int4 lattice" in out
    status, out, _ = cli("lattice", BUNDLED + "-float", "--json")
    assert status == 1 and json.loads(out)["qat"] is False
    status, out, _ = cli("lattice", file, "--against", BUNDLED)
    assert status == 0 and lines(out)[-1] == "the same weights"
    status, out, _ = cli("lattice", folder, "--against", BUNDLED + "-float", "--json")
    assert status == 1 and json.loads(out)["nearer"] == "a"
    refusal(cli("lattice", BUNDLED), r"no bf16 weights of layers to examine \(33 int4\)")
    refusal(cli("convert", BUNDLED, file, "--to", "f32"), "is already there")
    refusal(cli("convert", BUNDLED, tmp_path / "y", "--to", "f32"), "f32 is written to a .gguf file")
    refusal(cli("convert", BUNDLED, tmp_path / "y.gguf"), "--to")
    assert {path.name for path in tmp_path.iterdir()} == {"x.gguf", "bf16"}


def test_synth_writes_what_its_configuration_says(cli, tmp_path):
    config = bundled("tiny-qwen35") / "config.json"
    status, out, err = cli("synth", tmp_path / "x", "--config", config, "--format", "q8_0", "--layers", "4")
    assert (status, out) == (0, "") and "Q8_0" in err
    status, out, err = cli("run", "x", "--model", tmp_path / "x", "-n", "4")
    assert status == 0 and err.startswith("4 tokens")
    refusal(cli("synth", tmp_path / "x", "--config", config), "already there")
    refusal(cli("synth", tmp_path / "y", "--config", "gemma-5"), "gemma-5")
    refusal(cli("synth", tmp_path / "y", "--config", config, "--layers", "3"), "3 layers would not keep the pattern")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_show_reports_what_a_file_holds(cli, tmp_path):
    cli("convert", BUNDLED, tmp_path / "x.gguf", "--to", "q4_0")
    report = json.loads(cli("show", tmp_path / "x.gguf", "--json")[1])
    stored = report["stored_bytes"]
    assert stored.keys() == {"F32", "Q4_0", "Q8_0", "total"} and stored["Q4_0"] == 56_832 * 18
    assert 0 < (tmp_path / "x.gguf").stat().st_size - stored["total"] < 100_000


# Help


@pytest.mark.parametrize("command", [[], ["run"], ["chat"], ["show"], ["bench"], ["lattice"], ["convert"], ["synth"]])
def test_help_goes_to_standard_output(cli, command):
    status, out, err = cli(*command, "--help")
    assert (status, err) == (0, "") and "minimtp" in out
    if command == ["run"]:
        documented = ["--model", "--draft", "-k", "-n", "--rule", "--temp", "--top-k", "--top-p", "--min-p", "--seed",
                      "--backend", "--trace", "--json"]  # fmt: skip
        assert all(option in out for option in documented)


def test_help_has_a_line_for_each_command_in_a_group(cli):
    out = cli("--help")[1]
    commands = re.findall(r"^  (\w+) {2,}\w", out, re.M)
    assert commands == [name for names in GROUPS.values() for name in names] and max(map(len, lines(out))) <= 80
    assert all(cli(name, "--help")[0] == 0 for name in commands)
    assert set(cli("fly")[2].split("choose from ")[1].replace("'", "").split(")")[0].split(", ")) == set(commands)


def test_version(cli):
    assert cli("--version") == (0, f"minimtp {minimtp.__version__}\n", "")
