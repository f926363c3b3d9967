"""The README's table of proof, row by row (needs minimtp[hf]): python docs/proof.py [ROW ...] [--check README.md]

A row is two commands, which are printed before it runs them: `minimtp bench` (is greedy text with drafts the same? how
many tokens a pass?) and `minimtp check --hf` (the largest difference of any logit from transformers, both in double,
over 64 tokens).
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

HEADER = ("row", "model", "weights", "drafter", "greedy text with drafts", "max \\|Δ\\| of logits", "tokens a pass")


class Row(NamedTuple):
    """model: a bundled one; format: what `minimtp convert` makes of it first, if anything; draft: as on a command."""

    family: str
    weights: str
    drafter: str
    model: str
    format: str | None
    draft: str


GEMMA, ASSISTANT, QWEN = "tiny-gemma4", "tiny-gemma4-assistant", "tiny-qwen35"
ROWS = {
    "gemma": Row("Gemma 4", "compressed-tensors int4", "assistant", GEMMA, None, ASSISTANT),
    "gemma-q4_0": Row("Gemma 4", "GGUF Q4_0", "assistant", GEMMA, "q4_0", ASSISTANT),
    "gemma-q8_0": Row("Gemma 4", "GGUF Q8_0", "assistant", GEMMA, "q8_0", ASSISTANT),
    "gemma-bf16": Row("Gemma 4", "bf16", "assistant", f"{GEMMA}-float", None, ASSISTANT),
    "gemma-lookup": Row("Gemma 4", "compressed-tensors int4", "prompt lookup", GEMMA, None, "lookup"),
    "qwen": Row("Qwen 3.5", "compressed-tensors int4", "MTP layer", QWEN, None, "auto"),
    "qwen-q4_0": Row("Qwen 3.5", "GGUF Q4_0", "MTP layer", QWEN, "q4_0", "auto"),
    "qwen-lookup": Row("Qwen 3.5", "compressed-tensors int4", "prompt lookup", QWEN, None, "lookup"),
}


def minimtp(*words, folder):
    """Run a command -> what it wrote to standard output."""
    print("minimtp", shlex.join(words), file=sys.stderr)
    command = [sys.executable, "-m", "minimtp", *words]
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


@cache
def difference(model, folder):
    """The largest difference of its logits from transformers', in double."""
    compared = json.loads(minimtp("check", "--hf", model, "--draft", "none", "--json", folder=folder))
    return next(part["float64"]["difference"] for part in compared["rows"] if part["name"] == "chained logits")


def measure(name, folder):
    """A row's cells, as text."""
    row, model = ROWS[name], ROWS[name].model
    if row.format:
        model = f"{name}.gguf"
        minimtp("convert", row.model, model, "--to", row.format, folder=folder)
    bench = json.loads(minimtp("bench", model, "--draft", row.draft, "--prompts", "16", "--json", folder=folder))
    off = difference(model, folder)
    same = "bit-identical" if bench["identical"] else "differs"
    return (
        f"`{name}`", row.family, row.weights, row.drafter, same, f"{off:.0e}",
        f"{bench['drafted']['tokens_per_pass']:.2f}",
    )  # fmt: skip


def line(cells):
    return "| " + " | ".join(cells) + " |"


def changed(new, old):
    """Whether a row says something else: another machine's rounding may move Δ, and in a tie a greedy text."""
    new, old = ([cell.strip() for cell in row.strip("| ").split(" | ")] for row in (new, old))
    apart = abs(float(new[-1]) - float(old[-1]))
    return new[:5] != old[:5] or float(new[-2]) > 10 * float(old[-2]) or apart > 0.05


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)} (all)")
    parser.add_argument("--check", metavar="FILE", help="fail unless the rows in FILE say the same")
    arguments = parser.parse_args()
    names = arguments.rows or list(ROWS)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        table = [line(cells) for cells in pool.map(lambda name: measure(name, folder), names)]
    print("\n".join([line(HEADER), line(["---"] * len(HEADER)), *table]))
    if arguments.check is None:
        return 0
    text = Path(arguments.check).read_text(encoding="utf-8")
    shown = {found[1]: found[0] for found in re.finditer(r"^\| `([\w-]+)` \|.*$", text, re.M)}
    wrong = [name for name, row in zip(names, table) if name not in shown or changed(row, shown[name])]
    print(
        f"not what {arguments.check} says: {', '.join(wrong)}" if wrong else f"as in {arguments.check}", file=sys.stderr
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
