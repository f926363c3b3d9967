"""Commands that settle disputes: audit, acceptance, golden, logits."""

import argparse
import json
import sys
from pathlib import Path

from . import expected, golden
from .acceptance import RULES
from .audit import audit, audit_text
from .checkpoint import new_file
from .cli_common import (
    BUNDLED,
    CHECKPOINT,
    coloured_lines,
    counting,
    load_pair,
    load_target,
    loader_options,
    progress_bar,
    read_prompt,
    text_in,
)
from .cli_worklist import can_go_on, check_list, check_place, list_options, loaded, run_list
from .generate import CHUNK
from .golden import tap_names
from .logits import write_logits
from .sampling import Sampling


def add_commands(commands):
    """Add them to argparse's table of commands."""
    auditing = commands.add_parser("audit", help="what every acceptance rule really emits, exactly, on named cases")
    auditing.set_defaults(command=audit_command)
    auditing.add_argument(
        "rule", nargs="?", default="all", choices=("all", *RULES), metavar="RULE", help="a rule, or all"
    )
    auditing.add_argument("--json", action="store_true")
    parents = [loader_options(), _law_options(), list_options()]
    _add_acceptance(commands.add_parser("acceptance", parents=parents, help="expected acceptance over a text"))
    _add_golden(commands.add_parser("golden", parents=parents, help="write a run for other engines to replay"))
    parents = [loader_options(draft=False), list_options()]
    text = "write the logits of a prompt of any length"
    _add_logits(commands.add_parser("logits", parents=parents, help=text))


def _law_options():
    laws = argparse.ArgumentParser(add_help=False)
    laws.add_argument("--temp", type=float, default=0.0, help="the target's temperature (0, the most likely token)")
    laws.add_argument("--draft-temp", type=float, help="the drafter's (the target's; 0: argmax drafts)")
    for name, kind in (("top-k", int), ("top-p", float), ("min-p", float)):
        laws.add_argument(f"--{name}", type=kind)
        laws.add_argument(f"--draft-{name}", type=kind, help="the drafter's (the target's)")
    return laws


def _add_acceptance(acceptance):
    acceptance.set_defaults(command=acceptance_command)
    acceptance.add_argument("model", nargs="?", default=BUNDLED)
    source = acceptance.add_mutually_exclusive_group()
    source.add_argument("--text", help="file to read (the bundled held-out text)")
    source.add_argument("--ids", metavar="FILE", help="a JSON list of token ids instead: what an engine emitted")
    acceptance.add_argument("--prompt-tokens", type=int, default=1, metavar="T", help="tokens of the prompt (1)")
    acceptance.add_argument("-n", "--tokens", type=int, default=256, metavar="N", help="tokens after it at most (256)")
    acceptance.add_argument("-k", "--num-draft", type=int, default=8, metavar="K", help="most tokens a round (8)")
    acceptance.add_argument("--stride", type=int, default=1, metavar="S", help="rounds at every S-th position only (1)")
    lossy = [rule for rule in RULES if RULES[rule].emits == "not p"]
    acceptance.add_argument("--rule", choices=lossy, action="append", default=[], help="a lossy rule as well")
    acceptance.add_argument(
        "--cost", type=float, help="cost of a draft token, in target passes (measured here, but for lists)"
    )
    acceptance.add_argument("-o", "--output", metavar="DIR", help="where the reports of a list go, NAME.json")
    acceptance.add_argument("--plot", metavar="FILE", help="draw a picture (needs matplotlib)")
    acceptance.add_argument("--json", action="store_true")


def _add_golden(golden):
    golden.set_defaults(command=golden_command)
    golden.add_argument("model", nargs="?", default=BUNDLED)
    golden.add_argument("-o", "--output", required=True, metavar="DIR")
    golden.add_argument("--prompt", help="the text to continue; - reads standard input")
    golden.add_argument("-k", "--num-draft", type=int, default=4, metavar="K", help="tokens drafted a round (4)")
    golden.add_argument("-n", "--max-new-tokens", type=int, default=16, metavar="N", help="tokens at most (16)")
    golden.add_argument("--rule", choices=[r for r in RULES if not RULES[r].soft], default="rejection")
    golden.add_argument("--seed", type=int, default=0)
    golden.add_argument("--rows", choices=("auto", "whole", "top"), default="auto", help="logits: all, or the largest")
    golden.add_argument("--json", action="store_true", help="of a list: say in JSON how it went")


def _add_logits(logits):
    logits.set_defaults(command=logits_command)
    logits.add_argument("model", help=CHECKPOINT)
    logits.add_argument("--prompt-file", metavar="FILE", help="the prompt, a UTF-8 text")
    logits.add_argument("--ids", metavar="FILE", help="a JSON list of token ids instead")
    logits.add_argument("-o", "--output", required=True, metavar="FILE", help="safetensors file; of a list, the folder")
    logits.add_argument(
        "--taps", default="", metavar="NAMES", help="with commas between: embed, layer.N.out ...; or all"
    )
    logits.add_argument("--rows", type=_rows, metavar="N", help="logits of the last N positions; last, or all (all)")
    kept = logits.add_mutually_exclusive_group()
    kept.add_argument("--top", type=int, metavar="N", help="keep the N largest of a row (64 of large vocabularies)")
    kept.add_argument("--whole", dest="top", action="store_const", const=0, help="keep whole rows")
    logits.add_argument("--chunk", type=int, default=CHUNK, metavar="N", help=f"tokens read at a time ({CHUNK})")
    logits.add_argument("--restart", action="store_true", help="forget what an interrupted run left")
    logits.add_argument("--json", action="store_true")


def audit_command(arguments):
    """Print what rules really emit; 1 where one is not what it claims (lossy rules claim nothing)."""
    report = audit(arguments.rule)
    print(json.dumps(report) if arguments.json else coloured_lines(audit_text(report), sys.stdout))
    return 0 if report["passed"] else 1


def acceptance_command(arguments):
    """Expected acceptance over a text."""
    check_list(arguments, "text", "ids", "plot")
    if arguments.prompts:
        return run_list(arguments, acceptance_of, ".json")
    target, drafter = load_pair(arguments)
    report = _expected(arguments, target, drafter, _ids_of_text(arguments, target.tokenizer))
    if arguments.plot:
        expected.plot(report, arguments.plot)
    print(json.dumps(report) if arguments.json else expected.table(report))


def acceptance_of(arguments, item):
    """Write the report of one text of a list."""
    target, drafter = loaded(load_pair, arguments)
    report = _expected(arguments, target, drafter, _ids_of(item, target.tokenizer))
    with new_file(Path(arguments.output, f"{item['id']}.json")) as file:
        file.write(json.dumps(report).encode())


def _expected(arguments, target, drafter, ids):
    """Expected acceptance over these tokens -> the report."""
    if drafter is None:
        raise ValueError("no drafter, no acceptance: --draft names one")
    ids = ids[: arguments.prompt_tokens + arguments.tokens]
    sampling, draft_sampling = _both_samplings(arguments)
    options = dict(first=arguments.prompt_tokens, stride=arguments.stride, lossy={rule: {} for rule in arguments.rule})
    report = expected.expected(target, drafter, ids, arguments.num_draft, sampling, draft_sampling, **options)
    report = {"model": str(target.folder), "draft": arguments.draft, **report}
    if arguments.cost is not None:
        return expected.with_costs(report, expected.given_costs(arguments.cost, arguments.num_draft))
    if arguments.prompts:  # what passes cost cannot be measured where others are at work
        return report
    return expected.with_costs(report, expected.measured_costs(target, drafter, ids[:64], arguments.num_draft))


def _ids_of_text(arguments, tokenizer):
    return _ids_in(arguments.ids) if arguments.ids else tokenizer.encode(text_in(arguments.text))


def _ids_in(path):
    """The list of token ids in a JSON file. Raises ValueError."""
    try:
        ids = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        ids = None
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise ValueError(f"{path}: expected a JSON list of token ids")
    return ids


def _ids_of(item, tokenizer):
    """The token ids of an item of a list. Raises ValueError where there are none."""
    ids = item.get("ids", [])
    if text := item.get("prompt"):
        if tokenizer is None:
            raise ValueError("the model has no tokenizer: it takes ids, not a text")
        ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("the prompt is empty")
    return ids


def _rows(text):
    """How many of the last rows: None for all of them."""
    return {"all": None, "last": 1}[text] if text in ("all", "last") else int(text)


def _both_samplings(arguments):
    """(the target's Sampling, the drafter's, or None where it is the same)."""
    target = {"temperature": arguments.temp, **{name: getattr(arguments, name) for name in ("top_k", "top_p", "min_p")}}
    own = {name: getattr(arguments, f"draft_{name}") for name in ("top_k", "top_p", "min_p")}
    own = {name: value for name, value in {"temperature": arguments.draft_temp, **own}.items() if value is not None}
    return Sampling(**target), Sampling(**{**target, **own}) if own else None


def golden_command(arguments):
    """Write a golden run: in float32, with the same in float64 for reference."""
    check_list(arguments, "prompt")
    if arguments.prompts:
        return run_list(arguments, golden_of, "/golden.json")
    item = {"prompt": read_prompt(arguments)}
    pairs = [load_pair(argparse.Namespace(**{**vars(arguments), "dtype": dtype})) for dtype in ("float32", "float64")]
    _write_golden(arguments, pairs, item, arguments.output)


def golden_of(arguments, item):
    """Write the golden run of one prompt of a list."""
    pairs = [loaded(load_pair, arguments, dtype=dtype) for dtype in ("float32", "float64")]
    _write_golden(arguments, pairs, item, Path(arguments.output, item["id"]))


def _write_golden(arguments, pairs, item, folder):
    sampling, draft_sampling = _both_samplings(arguments)
    options = arguments.num_draft, arguments.rule, sampling, draft_sampling, arguments.max_new_tokens, arguments.seed
    run = golden.record(*pairs[0], _ids_of(item, pairs[0][0].tokenizer), *options)
    run |= {"drafter": arguments.draft} | ({"prompt_text": item["prompt"]} if "prompt" in item else {})
    plain, precise = (golden.replay(run, *pair) for pair in pairs)
    golden.make(folder, run, plain, precise, {"whole": True, "top": False}.get(arguments.rows))


def logits_command(arguments):
    """Write the logits of a prompt, or of each prompt of a list."""
    sources = [name for name in ("prompt_file", "ids", "prompts") if getattr(arguments, name)]
    if len(sources) != 1:
        raise ValueError("expected one of --prompt-file, --ids and --prompts")
    check_list(arguments)
    if arguments.prompts:
        return run_list(arguments, logits_of, ".safetensors")
    check_place(arguments.output)
    item = {"ids": _ids_in(arguments.ids)} if arguments.ids else {"prompt": text_in(arguments.prompt_file)}
    target = load_target(arguments)
    with can_go_on(), progress_bar(" layers") as bar:
        report = _write_logits(arguments, target, item, arguments.output, counting(bar))
    print(json.dumps(report) if arguments.json else f"{report['output']}: {report['tokens']} tokens")


def logits_of(arguments, item):
    """Write the logits of one prompt of a list."""
    path = Path(arguments.output, f"{item['id']}.safetensors")
    _write_logits(arguments, loaded(load_target, arguments), item, path)


def _write_logits(arguments, target, item, path, progress=None):
    taps = tap_names(len(target.config.layers)) if arguments.taps == "all" else filter(None, arguments.taps.split(","))
    options = {name: getattr(arguments, name) for name in ("top", "chunk", "restart")}
    ids = _ids_of(item, target.tokenizer)
    return write_logits(target, ids, path, list(taps), arguments.rows, **options, progress=progress)
