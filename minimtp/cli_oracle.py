"""Commands that settle disputes: audit, acceptance, golden, check."""

import argparse
import json
import sys
from pathlib import Path

from . import expected, golden
from .acceptance import RULES
from .audit import audit, audit_text
from .checkpoint import CheckpointError
from .cli_common import BUNDLED, checked_text, load_pair, loader_options, read_prompt
from .loading import bundled, load, load_drafter, open_model
from .oracle_logits import EPSILON
from .sampling import Sampling
from .text import load_tokenizer


def add_commands(commands):
    """Add them to argparse's table of commands."""
    auditing = commands.add_parser("audit", help="what every acceptance rule really emits, exactly, on named cases")
    auditing.set_defaults(command=audit_command)
    auditing.add_argument(
        "rule", nargs="?", default="all", choices=("all", *RULES), metavar="RULE", help="a rule, or all"
    )
    auditing.add_argument("--json", action="store_true")
    parents = [loader_options(), _law_options()]
    _add_acceptance(commands.add_parser("acceptance", parents=parents, help="expected acceptance over a text"))
    _add_golden(commands.add_parser("golden", parents=parents, help="write a run for other engines to replay"))
    _add_check(
        commands.add_parser("check", help="compare a run, another engine's dump, or a running engine, with ours")
    )


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
    acceptance.add_argument("--cost", type=float, help="cost of a draft token, in target passes (measured here)")
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


def _add_check(check):
    check.set_defaults(command=check_command)
    check.add_argument("model", nargs="?", help="checkpoint folder, or a bundled model (the one that was recorded)")
    what = check.add_mutually_exclusive_group(required=True)
    what.add_argument("--golden", metavar="DIR", help="a run of ours, as `golden` wrote it")
    what.add_argument("--server", metavar="URL", help="an engine that runs, with OpenAI's completions interface")
    what.add_argument("--hf", metavar="MODEL", help="transformers on a checkpoint, layer by layer (needs minimtp[hf])")
    what.add_argument("--self", dest="own", action="store_true", help="whether the bits hold on this machine")
    check.add_argument("--against", metavar="FILE", help="another engine's logits, taps or decisions (safetensors)")
    check.add_argument("--precision", choices=tuple(EPSILON), help="what it computes in (how FILE stores it)")
    check.add_argument("--draft", help="the drafter, as elsewhere (the one that was recorded; auto)")
    check.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    check.add_argument("--json", action="store_true")
    hf = check.add_argument_group("with --hf (MODEL for both, or another for ours)")
    hf.add_argument("--text", help="file to read (the bundled held-out text)")
    hf.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens of it at most (64)")
    served = check.add_argument_group("with --server")
    served.add_argument("--plain-server", metavar="URL", help="the same engine, started without speculation")
    served.add_argument("--served-name", metavar="NAME", help="the model's name there (the first that it lists)")
    served.add_argument("--prompt", help="the text to continue; - reads standard input")
    served.add_argument("-n", "--max-new-tokens", type=int, default=64, metavar="N", help="tokens at most (64)")
    served.add_argument("--top", type=int, default=5, metavar="N", help="log-probabilities of each position (5)")
    served.add_argument("--bits", type=float, help="its precision, instead of --precision (11: float16)")
    served.add_argument("-k", "--num-draft", type=int, default=4, metavar="K", help="tokens it drafts a round (4)")
    served.add_argument("--timeout", type=float, default=120, metavar="SECONDS", help="for each answer (120)")


def audit_command(arguments):
    """Print what rules really emit; 1 where one is not what it claims (lossy rules claim nothing)."""
    report = audit(arguments.rule)
    print(json.dumps(report) if arguments.json else audit_text(report))
    return 0 if report["passed"] else 1


def acceptance_command(arguments):
    """Expected acceptance over a text."""
    target, drafter = load_pair(arguments)
    if drafter is None:
        raise ValueError("no drafter, no acceptance: --draft names one")
    ids = _ids_of_text(arguments, target.tokenizer)[: arguments.prompt_tokens + arguments.tokens]
    sampling, draft_sampling = _both_samplings(arguments)
    options = dict(first=arguments.prompt_tokens, stride=arguments.stride, lossy={rule: {} for rule in arguments.rule})
    report = expected.expected(target, drafter, ids, arguments.num_draft, sampling, draft_sampling, **options)
    if arguments.cost is None:
        costs = expected.measured_costs(target, drafter, ids[:64], arguments.num_draft)
    else:
        costs = expected.given_costs(arguments.cost, arguments.num_draft)
    report = expected.with_costs({"model": str(target.folder), "draft": arguments.draft, **report}, costs)
    if arguments.plot:
        expected.plot(report, arguments.plot)
    print(json.dumps(report) if arguments.json else expected.table(report))


def _ids_of_text(arguments, tokenizer):
    if not arguments.ids:
        path = Path(arguments.text) if arguments.text else bundled("heldout.txt")
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        return tokenizer.encode(checked_text(text, path))
    try:
        ids = json.loads(Path(arguments.ids).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        ids = None
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise ValueError(f"{arguments.ids}: expected a JSON list of token ids")
    return ids


def _both_samplings(arguments):
    """(the target's Sampling, the drafter's, or None where it is the same)."""
    target = {"temperature": arguments.temp, **{name: getattr(arguments, name) for name in ("top_k", "top_p", "min_p")}}
    own = {name: getattr(arguments, f"draft_{name}") for name in ("top_k", "top_p", "min_p")}
    own = {name: value for name, value in {"temperature": arguments.draft_temp, **own}.items() if value is not None}
    return Sampling(**target), Sampling(**{**target, **own}) if own else None


def golden_command(arguments):
    """Write a golden run: in float32, with the same in float64 for reference."""
    text = read_prompt(arguments)
    pairs = [load_pair(argparse.Namespace(**{**vars(arguments), "dtype": dtype})) for dtype in ("float32", "float64")]
    sampling, draft_sampling = _both_samplings(arguments)
    options = arguments.num_draft, arguments.rule, sampling, draft_sampling, arguments.max_new_tokens, arguments.seed
    run = golden.record(*pairs[0], pairs[0][0].tokenizer.encode(text), *options)
    run |= {"drafter": arguments.draft, "prompt_text": text}
    plain, precise = (golden.replay(run, *pair) for pair in pairs)
    golden.make(arguments.output, run, plain, precise, {"whole": True, "top": False}.get(arguments.rows))


def check_command(arguments):
    """Compare a run of ours or another engine's dump with a golden run, or a running engine with ours."""
    run = _check_hf if arguments.hf else _check_server if arguments.server else _check_golden
    run = _check_self if arguments.own else run
    report, text = run(arguments)
    print(json.dumps(report) if arguments.json else text)
    return 0 if report["passed"] else 1


def _check_self(arguments):
    from . import self_check

    checks = self_check.self_check()
    report = {"passed": all(check["passed"] for check in checks), "checks": checks}
    return report, self_check.report_text(checks)


def _check_golden(arguments):
    run, arrays = golden.read_golden(arguments.golden)
    if arguments.against:
        dump, precisions = golden.read_dump(arguments.against)
    else:
        target = load(arguments.model or str(run["model"]["name"]), dtype=arguments.dtype)
        draft = arguments.draft or str(run.get("drafter", "auto"))
        drafter = None if draft == "none" else load_drafter(draft, target)
        dump, precisions = golden.replay(run, target, drafter), arguments.dtype
        if (target.fingerprint == run["model"].get("fingerprint")) < (arguments.dtype == "float32"):
            print("these are not the weights, or not the configuration, of the golden run", file=sys.stderr)
    report = golden.compare(run, arrays, dump, arguments.precision or precisions)
    return report, golden.report_text(report)


def _check_server(arguments):
    from . import server_check  # no other command needs a network

    bits = server_check.BITS[arguments.precision or "float16"] if arguments.bits is None else arguments.bits
    limits = {"--max-new-tokens": (arguments.max_new_tokens, 1, 1 << 20), "--top": (arguments.top, 1, 1000)}
    limits |= {"--bits": (bits, 1, 53), "--timeout": (arguments.timeout, 0.001, 1e6)}
    for name, (value, least, most) in limits.items():
        if not least <= value <= most:
            raise ValueError(f"{name} must be between {least} and {most}, got {value}")
    arguments.model = arguments.model or BUNDLED
    prompt = read_prompt(arguments)
    options = {"draft": arguments.draft or "auto", "backend": "numpy", "dtype": "float32", "keep": "auto"}
    target, drafter = load_pair(argparse.Namespace(**{**vars(arguments), **options}))
    targets, urls = [load(arguments.model, dtype="float64"), target], (arguments.server, arguments.plain_server)
    options = arguments.max_new_tokens, arguments.top, bits, arguments.num_draft, arguments.served_name
    report = server_check.check(targets, drafter, *urls, prompt, *options, arguments.timeout)
    return report, server_check.report_text(report, lambda id: json.dumps(target.tokenizer.decode([id], special=True)))


def _check_hf(arguments):
    from . import hf_check

    checkpoint, _, config = open_model(arguments.hf, "target")
    tokenizer = load_tokenizer(checkpoint, config.vocab_size)
    if tokenizer is None:
        raise CheckpointError(f"{checkpoint.folder} has no tokenizer")
    if arguments.tokens < 1:
        raise ValueError(f"--tokens is {arguments.tokens}, wanted 1 or more")
    path = Path(arguments.text) if arguments.text else bundled("heldout.txt")
    text = checked_text(path.read_text(encoding="utf-8", errors="surrogateescape"), path)
    ids = tokenizer.encode(text)[: arguments.tokens]
    report = hf_check.check(arguments.model or arguments.hf, ids, arguments.hf, arguments.draft or "auto")
    return report, hf_check.report_text(report)
