"""The command check: runs, dumps, servers, checkpoints and this machine, each against a reference."""

import argparse
import json
import sys

from . import golden
from .checkpoint import CheckpointError
from .cli_common import BUNDLED, load_pair, read_prompt, text_in
from .loading import load, load_drafter, open_model
from .oracle_logits import EPSILON
from .text import load_tokenizer


def add_commands(commands):
    """Add it to argparse's table of commands."""
    check = commands.add_parser("check", help="compare a run, a dump or a running engine with ours")
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
        target = load(arguments.model or str(run["model"]["name"]), dtype=arguments.dtype, kv=run["model"].get("kv"))
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
    options = {"draft": arguments.draft or "auto", "backend": "numpy", "dtype": "float32", "keep": "auto", "kv": None}
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
    ids = tokenizer.encode(text_in(arguments.text))[: arguments.tokens]
    report = hf_check.check(arguments.model or arguments.hf, ids, arguments.hf, arguments.draft or "auto")
    return report, hf_check.report_text(report)
