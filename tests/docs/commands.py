"""The commands that the documents show, found and run as they stand there.

A name such as MODEL or prompt.txt in a command is a file of that name in the folder where it runs. REPLACED has what is
run otherwise than shown, REFUSED what needs a GPU: without one, the refusal is what is checked.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
PROGRAMS = "minimtp", "python", "pytest", "pip", "huggingface-cli", "jupyter"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
INLINE = re.compile(r"`((?:{}) [^`]+)`".format("|".join(PROGRAMS)))

REPLACED = (
    # 31 billion weights are not written in a test, and a small model stands for them where they are read
    (r"(synth \S+ --config) gemma-4-31b", r"\1 qwen3.5-0.8b --layers 4"),
    (r"(synth \S+ --config) qwen3.6-27b (.*) --layers 8", r"\1 qwen3.5-0.8b \2 --layers 4"),
    (r"(show gemma-31b --context) 40960", r"\1 1024"),
    # what takes minutes: less of the same
    (r"(docs/kv\.py cost)", r"\1 gemma-4-31b 512"),
    (r"(tests/hf/speed\.py \S+)", r"\1 10 1"),
    (r"--prompts 16", "--prompts 2"),
    (r"-n 1024", "-n 64"),
    (r"(weights/train\.py) TEXT --work DIR", r"\1 TEXT --work DIR --help"),
    (r"^jupyter lab notebooks", "jupyter lab --version"),
    # where something listens
    (r"http://HOST:PORT2?|\bURL\b", "{server}"),
    (r"tcp://scheduler:8786", "{scheduler}"),
    # one of the choices
    (r"--config NAME", "--config gemma-4-31b"),
    (r"--kv (KV|NAME)\b", "--kv int8-v"),
    (r" \.\.\.$", ""),
)
ELSEWHERE = "docs/proof.py", "notebooks/build.py"  # .ci/run has the one, tests/notebooks the other
REFUSED = {"--backend cupy": "cupy"}  # the word by which a refusal names its reason


def documents():
    tops = ("README.md", "CONTRIBUTING.md", "notebooks/README.md", "weights/README.md")
    return [*(PROJECT / name for name in tops), *sorted((PROJECT / "docs").glob("*.md"))]


def scripts(text):
    """What a document tells its reader to run: blocks of a shell, and commands with arguments between the lines."""
    for language, code in BLOCK.findall(text):
        if language == "sh":
            yield code
        elif not language:
            yield from (line.removeprefix("$ ") for line in code.splitlines() if re.match(r"\$ |minimtp ", line))
    yield from re.findall(r"^    ((?:{}) .*)$".format("|".join(PROGRAMS)), text, re.M)
    usages = (re.sub(r" \[[\w-]+\]", "", usage) for usage in INLINE.findall(BLOCK.sub("", text)))
    yield from (usage for usage in usages if not re.fullmatch(r"minimtp \S+|python -m minimtp", usage))


def names(text):
    """The commands that it only names."""
    return re.findall(r"`minimtp ([a-z]+)`", text)


def lines(script):
    """Its commands, one a line, without comments; a virtual environment's programs are the ones on the path."""
    joined = re.sub(r"\\\n\s*", "", script).replace(".venv/bin/", "")
    stripped = (re.sub(r"\s+# .*$|^#.*$", "", line).strip() for line in joined.splitlines())
    return [line for line in stripped if line]


def parts(line):
    """The commands that a line joins, each a list of words."""
    return [part.split() for part in re.split(r"&&|\|", line)]


def runnable(line):
    """Whether it is to be run here: not what installs, downloads or tests, which is looked at otherwise."""
    others = ("pip", "pytest", "ruff", "huggingface-cli", "python3")
    return not any(words[0] in others or words[1:2] and words[1] in ELSEWHERE for words in parts(line))


def replaced(line, **addresses):
    for pattern, new in REPLACED:
        line = re.sub(pattern, new, line)
    return line.format(**addresses) if "{server}" in line or "{scheduler}" in line else line


def prepare(folder, line, models):
    """Lay out what a command expects to find; models: the folder of the bundled ones."""
    gemma, assistant = models / "tiny-gemma4", models / "tiny-gemma4-assistant"
    if "lattice" in line:
        for name in ("MODEL", "PATH", "OTHER"):
            run(f"minimtp convert {gemma} {name} --to bf16", folder)
    for name in ("MODEL", "SRC", "PATH", "OURS", "FOLDER", "gemma-31b", "tiny-gemma4-float"):
        if not (folder / name).exists():
            (folder / name).symlink_to(gemma)
    for name in ("ASSISTANT", "D"):
        (folder / name).symlink_to(assistant)
    for name in ("prompt.txt", "F", "FILE", "TEXT"):
        (folder / name).write_text("ROMEO:\nBut soft, what light through yonder window breaks?\n" * 3, encoding="utf-8")
    (folder / "list.jsonl").write_text('{"id": "one", "prompt": "To be"}\n{"id": "two", "prompt": "or not"}\n')
    (folder / "ids.json").write_text(json.dumps(list(range(300, 340))))
    (folder / "emitted.json").write_text(json.dumps([300 + i % 40 for i in range(120)]))
    if re.search(r"\b(docs|notebooks|tests|weights)/", line):
        for name in ("docs", "notebooks"):  # some scripts write beside themselves
            shutil.copytree(PROJECT / name, folder / name)
        for name in ("minimtp", "tests", "weights"):
            (folder / name).symlink_to(PROJECT / name)
    golden = re.search(r"check --golden (\S+)(?: --against (\S+))?", line)
    if golden or "run/golden.json" in line:
        record(folder, golden[1] if golden else "run", golden and golden[2])


def record(folder, name, dump):
    """A golden run, the ids that it read, and as `dump` our own logits for them."""
    run(f"minimtp golden MODEL -o {name} -n 8 --prompt ROMEO:", folder)
    told = json.loads((folder / name / "golden.json").read_text())
    (folder / "ids.json").write_text(json.dumps(told["text"][: told["steps"][-1]["cache_length"]]))
    if dump:
        (folder / dump).unlink(missing_ok=True)
        run(f"minimtp logits MODEL --ids ids.json -o {dump} --taps all", folder)


def run(line, folder, timeout=120):
    """Run a line in a shell, a terminal nobody types at for its input -> (status, standard output, standard error)."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "no_proxy": "*", "MPLBACKEND": "Agg"}
    ends = os.openpty()
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line], cwd=folder, env=environment, timeout=timeout, capture_output=True,
            text=True, stdin=ends[1],
        )  # fmt: skip
    finally:
        for end in ends:
            os.close(end)
    return done.returncode, done.stdout, done.stderr


def main():
    """Run the README's commands and Python with the minimtp that is installed here, wherever that is."""
    from minimtp.loading import bundled

    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    code = [code for language, code in BLOCK.findall(text) if language == "python" and "import minimtp" in code]
    todo = [line for script in scripts(text) for line in lines(script) if runnable(line) and "docs/" not in line]
    for line in [*dict.fromkeys(todo), *(f"python - <<'END'\n{snippet}END" for snippet in code)]:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), line, bundled("tiny-gemma4").parent)
            status, _, told = run(replaced(line), Path(folder))
        print(f"{status}  {line.partition(chr(10))[0]}")
        if status:
            sys.exit(told)


if __name__ == "__main__":
    main()
