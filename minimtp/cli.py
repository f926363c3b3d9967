"""The commands. Text goes to standard output and nothing else does; progress and statistics go to standard error."""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import median

from . import __version__, memory
from .acceptance import RULES
from .checkpoint import CheckpointError
from .generate import generate
from .loading import find_drafter, load, load_drafter, open_model, resolve
from .sampling import Sampling

BUNDLED = "tiny-gemma4"
PROMPT = "ROMEO:\n"  # what the bundled model is asked to continue where no prompt is given


def main(argv=None):
    """Run one command -> its exit status: 0 done, 2 bad use or bad input (one line says why), 130 interrupted."""
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    try:
        return arguments.command(arguments) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has left: nothing more to say, at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        print(f"minimtp: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser():
    parser = argparse.ArgumentParser(prog="minimtp", description="A readable reference of multi-token prediction.")
    parser.add_argument("--version", action="version", version=f"minimtp {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--draft", default="auto", help="auto, none, lookup (prompt lookup), or a drafter's folder")
    model.add_argument("-k", "--num-draft", type=int, default=4, metavar="K", help="tokens drafted a round (4)")
    model.add_argument("-n", "--max-new-tokens", type=int, default=128, metavar="N", help="tokens at most (128)")
    model.add_argument("--backend", choices=("numpy", "cupy"), default="numpy")
    model.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    model.add_argument("--keep", choices=("auto", "packed", "dense"), default="auto", help="weights in memory")
    model.add_argument("--json", action="store_true", help="print JSON instead of text")

    run = commands.add_parser("run", parents=[model], help="continue a prompt, with drafts")
    run.set_defaults(command=run_command)
    run.add_argument("prompt", nargs="?", help="the text to continue; - reads standard input")
    run.add_argument("--model", default=BUNDLED, help=f"checkpoint folder, or a bundled model ({BUNDLED})")
    run.add_argument("--rule", choices=tuple(RULES), default="rejection", help="acceptance rule (rejection)")
    run.add_argument("--temp", type=float, default=0.0, help="temperature (0: the most likely token)")
    run.add_argument("--top-k", type=int)
    run.add_argument("--top-p", type=float)
    run.add_argument("--min-p", type=float)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--trace", action="store_true", help="show every round: what was drafted, and its fate")

    show = commands.add_parser("show", help="a model's layer plan, parameters and memory")
    show.set_defaults(command=show_command)
    show.add_argument("model", nargs="?", default=BUNDLED)
    show.add_argument("--context", type=int, metavar="N", help="tokens of context to count KV bytes for")
    show.add_argument("--json", action="store_true")

    bench = commands.add_parser("bench", parents=[model], help="measure decoding, plain and with drafts")
    bench.set_defaults(command=bench_command)
    bench.add_argument("model", nargs="?", default=BUNDLED)
    bench.add_argument("--text", help="file to take prompts from (the bundled held-out text)")
    bench.add_argument("--prompts", type=int, default=8, metavar="P", help="prompts, evenly spaced in the text (8)")
    bench.add_argument("--prompt-tokens", type=int, default=64, metavar="T", help="tokens of each prompt (64)")
    return parser


def _load(arguments):
    """The target and its drafter, or None for the drafter where there is none."""
    target = load(arguments.model, arguments.backend, arguments.dtype, arguments.keep)
    if arguments.draft == "none" or (arguments.draft == "auto" and find_drafter(target) is None):
        return target, None
    return target, load_drafter(arguments.draft, target, arguments.keep)


# run


def run_command(arguments):
    """Continue a prompt, streaming."""
    sampling = Sampling(arguments.temp, arguments.top_k, arguments.top_p, arguments.min_p)
    prompt = _prompt(arguments)
    target, drafter = _load(arguments)
    if target.tokenizer is None:
        raise CheckpointError(f"{target.folder} has no tokenizer.json")
    prompt_ids = target.tokenizer.encode(prompt)
    steps = generate(
        target,
        prompt_ids,
        drafter,
        num_draft=arguments.num_draft,
        rule=arguments.rule,
        sampling=sampling,
        max_new_tokens=arguments.max_new_tokens,
        stop=target.stop_ids,
        seed=arguments.seed,
    )
    if drafter is None and arguments.draft == "auto":
        print("no drafter beside the model: one token a pass", file=sys.stderr)
    seen = []
    try:
        for step in _shown(steps, target.tokenizer, arguments):
            seen.append(step)
    finally:
        if seen:
            summary = summarize(seen)
            print(json.dumps(summary) if arguments.json else _closing_line(summary), file=sys.stderr)


def _prompt(arguments):
    if arguments.prompt == "-":
        return sys.stdin.read()
    if arguments.prompt is None and arguments.model != BUNDLED:
        raise ValueError("no prompt: give one, or - to read standard input")
    return PROMPT if arguments.prompt is None else arguments.prompt


def _shown(steps, tokenizer, arguments):
    """Pass the steps on, each shown as asked: its text streamed, or its trace line, or its JSON."""
    stream, held = tokenizer.stream(), []
    hold = arguments.trace and sys.stdout.isatty()  # a terminal shows the trace first, then the text in one piece
    try:
        for number, step in enumerate(steps):
            text = "".join(map(stream, step.tokens))
            if arguments.json:
                print(json.dumps(_step_record(step, text)), flush=True)
            elif hold:
                held.append(text)
            else:
                print(text, end="", flush=True)
            if arguments.trace:
                print(trace_line(number, step, tokenizer, _colours(sys.stderr)), file=sys.stderr)
            yield step
    finally:
        if not arguments.json:
            print("".join(held))


def _step_record(step, text):
    return {
        "tokens": step.tokens,
        "text": text,
        "draft": step.draft.tokens,
        "accepted": step.accepted,
        "uniforms": step.uniforms,
        "draft_uniforms": step.draft_uniforms,
        "seconds": step.seconds,
    }


# A token's fate: (mark that says it without colour, ANSI colour)
FATES = {
    "accepted": ("+", "32"),
    "rejected": ("x", "31"),
    "unread": (".", "90"),
    "correction": (">", "33"),
    "bonus": ("*", "36"),
}


def _colours(stream):
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def trace_line(number, step, tokenizer, colours=False):
    """One round in one line: each draft token with its fate, then the token that the target gave."""
    accepted = step.verdict.accepted
    fates = ["accepted"] * accepted + ["rejected"] + ["unread"] * step.drafted
    tokens = [
        *zip(fates, step.draft.tokens),
        ("correction" if accepted < step.drafted else "bonus", step.verdict.token),
    ]
    parts = []
    for fate, token in tokens:
        mark, colour = FATES[fate]
        part = mark + json.dumps(tokenizer.decode([token], special=True), ensure_ascii=False)
        parts.append(f"\033[{colour}m{part}\033[0m" if colours else part)
    return f"{number:4} {step.accepted}/{step.drafted}  " + " ".join(parts)


def summarize(steps):
    """What a run came to, as a JSON-able dict. acceptance[i]: the share of rounds that kept i + 1 tokens, of those that
    drafted as many.
    """
    tokens, seconds = sum(len(step.tokens) for step in steps), sum(step.seconds for step in steps)
    depth = max(step.drafted for step in steps)
    rounds = [[step for step in steps if step.drafted > i] for i in range(depth)]
    return {
        "tokens": tokens,
        "passes": len(steps),
        "tokens_per_pass": tokens / len(steps),
        "acceptance": [sum(step.accepted > i for step in some) / len(some) for i, some in enumerate(rounds)],
        "seconds": seconds,
    }


def _closing_line(summary):
    kept = " ".join(f"{share:.0%}" for share in summary["acceptance"])
    return (
        f"{summary['tokens']} tokens in {summary['passes']} target passes: {summary['tokens_per_pass']:.2f} a pass"
        + (f", accepted by depth {kept}" if kept else "")
        + f"; {summary['seconds']:.2f} s, {summary['tokens'] / summary['seconds']:.0f} tokens/s"
    )


# show


def show_command(arguments):
    """Print what a checkpoint's configuration says, and what that costs."""
    checkpoint, family, config = open_model(arguments.model)
    if arguments.context is not None and arguments.context < 1:
        raise ValueError(f"--context must be at least 1, got {arguments.context}")
    report = describe(checkpoint, family, config, arguments.context or config.max_position_embeddings)
    print(json.dumps(report) if arguments.json else _report_text(report))


def describe(checkpoint, family, config, context):
    """Layer plan, parameters, stored bytes, and float32 KV bytes at a context, as a JSON-able dict."""
    plans = {}
    for index, layer in enumerate(config.layers):
        plan = {"kind": layer.kind, "heads": layer.heads, "kv_heads": layer.kv_heads, "head_dim": layer.head_dim}
        plan |= {"k_eq_v": layer.k_eq_v, "intermediate_size": layer.intermediate_size, "own_kv": layer.owns_kv}
        plans.setdefault(tuple(plan.items()), (plan, []))[1].append(index)
    stored = {}
    for tensor in checkpoint.tensors.values():
        stored[tensor.dtype] = stored.get(tensor.dtype, 0) + tensor.data.size
    return {
        "model": str(checkpoint.folder),
        "model_type": checkpoint.config["model_type"],
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "sliding_window": config.sliding_window,
        "layers": [{**plan, "at": at} for plan, at in plans.values()],
        "parameters": memory.parameters(family.tensors(config)),
        "stored_bytes": {**stored, "total": sum(stored.values())},
        "context": context,
        "kv_bytes": memory.kv_bytes(config, context, itemsize=4),
    }


def _report_text(report):
    lines = [
        f"{report['model']}: {report['model_type']}",
        f"hidden size {report['hidden_size']}, vocabulary {report['vocab_size']}, "
        f"context {report['max_position_embeddings']}, sliding window {report['sliding_window']}",
        "",
        "layers",
    ]
    for plan in report["layers"]:
        kv = (
            f"{plan['kv_heads']} kv heads" + (" (k = v)" if plan["k_eq_v"] else "") if plan["own_kv"] else "borrowed kv"
        )
        sizes = f"{plan['heads']} heads, {kv}, of {plan['head_dim']}; feed-forward {plan['intermediate_size']}"
        lines.append(f"  {len(plan['at']):3} {plan['kind']:8} {sizes}; at {' '.join(map(str, plan['at']))}")
    for title, key in (("parameters", "parameters"), ("bytes stored, by type", "stored_bytes")):
        lines += ["", title, *(f"  {name:12} {count:>16,}" for name, count in report[key].items())]
    if report["kv_bytes"]:
        lines += ["", f"bytes of float32 KV at {report['context']} tokens"]
        lines += [f"  {kind:12} {count:>16,}" for kind, count in report["kv_bytes"].items()]
    return "\n".join(lines)


# bench


def bench_command(arguments):
    """Measure greedy decoding plain and with drafts on the same prompts in turn, and passes by width."""
    target, drafter = _load(arguments)
    prompts = _bench_prompts(arguments, target)
    plain, drafted, identical = [], [], True
    for prompt in prompts:
        plain.append(_decode(target, prompt, None, arguments))
        if drafter:
            drafted.append(_decode(target, prompt, drafter, arguments))
            identical &= _tokens(plain[-1]) == _tokens(drafted[-1])
    report = {"model": str(target.folder), "prompts": len(prompts), "plain": _rates(plain)}
    if drafter:
        report |= {"k": arguments.num_draft, "drafted": _rates(drafted), "identical": identical}
        report["speedup"] = report["drafted"]["tokens_per_second"] / report["plain"]["tokens_per_second"]
    report["pass_cost_by_width"] = _pass_costs(target, prompts[0], arguments.num_draft + 1)
    report["peak_bytes"] = _peak_bytes()
    print(json.dumps(report) if arguments.json else json.dumps(report, indent=2))


def _bench_prompts(arguments, target):
    """Evenly spaced pieces of a text, each of as many tokens."""
    path = Path(arguments.text) if arguments.text else resolve("heldout.txt")
    if target.tokenizer is None:
        raise CheckpointError(f"{target.folder} has no tokenizer.json")
    ids, size = target.tokenizer.encode(path.read_text(encoding="utf-8"), special=False), arguments.prompt_tokens
    if arguments.prompts < 1 or size < 1 or len(ids) < arguments.prompts * size:
        raise ValueError(f"{path} has {len(ids)} tokens, too few for {arguments.prompts} prompts of {size}")
    stride = len(ids) // arguments.prompts
    return [ids[i * stride : i * stride + size] for i in range(arguments.prompts)]


def _decode(target, prompt, drafter, arguments):
    options = {"num_draft": arguments.num_draft, "max_new_tokens": arguments.max_new_tokens}
    return list(generate(target, prompt, drafter, **options))


def _tokens(steps):
    return [token for step in steps for token in step.tokens]


def _rates(runs):
    """Over all runs together, without the passes that read the prompt; the rate is the median of the runs'."""
    decoding = [run[1:] for run in runs if len(run) > 1]
    if not decoding:
        raise ValueError("nothing was decoded after the prompt: ask for more tokens")
    summary = summarize([step for run in decoding for step in run])
    rates = [len(_tokens(run)) / sum(step.seconds for step in run) for run in decoding]
    return {**summary, "tokens_per_second": median(rates)}


def _pass_costs(target, prompt, widest, repeats=30):
    """Time of a pass of each width over that of width 1, medians of passes taken in turn after the same prompt."""
    cache = target.new_cache()
    target.forward(prompt, cache, last=0)
    cache.commit()
    seconds = {width: [] for width in range(1, widest + 1)}
    for _ in range(repeats):
        for width, times in seconds.items():
            start = time.perf_counter()
            target.forward(prompt[:1] * width, cache)
            times.append(time.perf_counter() - start)
            cache.rollback(width)
    one = median(seconds[1])
    return {"seconds_of_width_1": one, **{str(width): median(times) / one for width, times in seconds.items()}}


def _peak_bytes():
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
