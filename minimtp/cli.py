"""The commands. Text goes to standard output and nothing else does; progress and statistics go to standard error."""

import argparse
import json
import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from . import __version__, lattice_report, memory, qwen35_mtp
from .acceptance import RULES
from .bench import measure, summarize
from .chat import Conversation
from .checkpoint import CheckpointError
from .convert import FORMATS, convert
from .generate import generate
from .loading import bundled, find_drafter, load, load_drafter, open_model, published_config
from .parameters import notes
from .sampling import Sampling, recommended
from .synth import synthesize
from .text import ChatTemplateError

BUNDLED = "tiny-gemma4"
CHECKPOINT = "checkpoint folder, GGUF file, or a bundled model"
PROMPT = "ROMEO:\n"  # what the bundled model is asked to continue where no prompt is given


def main(argv=None):
    """Run one command -> its exit status.

    0 done, 1 a check found a difference, 2 bad use or input (one line says why), 130 interrupted, 141 the reader left.
    """
    arguments = _parser().parse_args(argv)
    _prepare_streams()
    try:
        status = arguments.command(arguments) or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has left
        return 141
    except (ValueError, OSError) as error:
        with suppress(OSError):
            print(f"minimtp: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        _abandon_dead_streams()


def _prepare_streams():
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark


def _abandon_dead_streams():
    """What can no longer be written must not be tried again at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        print(f"minimtp: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def _parser():
    parser = _Parser(prog="minimtp", description="A readable reference of multi-token prediction.")
    parser.add_argument("--version", action="version", version=f"minimtp {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--draft", default="auto", help="auto, none, lookup (prompt lookup), or a drafter's path")
    model.add_argument("-k", "--num-draft", type=int, default=4, metavar="K", help="tokens drafted a round (4)")
    model.add_argument("-n", "--max-new-tokens", type=int, metavar="N", help="tokens at most (128; chat 1024)")
    model.add_argument("--backend", choices=("numpy", "cupy"), default="numpy")
    model.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    model.add_argument("--keep", choices=("auto", "packed", "dense"), default="auto", help="weights in memory")

    sampler = argparse.ArgumentParser(add_help=False)
    sampler.add_argument("--model", default=BUNDLED, help=f"{CHECKPOINT} ({BUNDLED})")
    sampler.add_argument("--rule", choices=tuple(RULES), default="rejection", help="acceptance rule (rejection)")
    sampler.add_argument(
        "--temp", type=float, help="temperature (run: 0, the most likely token; chat: the model's own)"
    )
    sampler.add_argument("--top-k", type=int)
    sampler.add_argument("--top-p", type=float)
    sampler.add_argument("--min-p", type=float)
    sampler.add_argument("--seed", type=int, default=0)
    sampler.add_argument("--trace", action="store_true", help="show every round: what was drafted, and its fate")
    sampler.add_argument("--json", action="store_true", help="print steps as JSON, one a line, instead of text")

    run = commands.add_parser("run", parents=[model, sampler], help="continue a prompt, with drafts")
    run.set_defaults(command=run_command)
    run.add_argument("prompt", nargs="?", help="the text to continue; - reads standard input")

    chat = commands.add_parser("chat", parents=[model, sampler], help="talk with a model; /reset forgets, /exit ends")
    chat.set_defaults(command=chat_command)
    chat.add_argument("--system", metavar="TEXT", help="system prompt")
    chat.add_argument("--think", action=argparse.BooleanOptionalAction, help="thinking, where the template has it")

    show = commands.add_parser("show", help="a model's layer plan, parameters and memory")
    show.set_defaults(command=show_command)
    show.add_argument("model", nargs="?", default=BUNDLED, help=CHECKPOINT)
    show.add_argument("--config", metavar="NAME", help="a published configuration instead, without weights")
    show.add_argument("--context", type=int, metavar="N", help="tokens of context to count KV bytes for")
    show.add_argument("--json", action="store_true")

    bench = commands.add_parser("bench", parents=[model], help="measure decoding, plain and with drafts")
    bench.set_defaults(command=bench_command)
    bench.add_argument("model", nargs="?", default=BUNDLED)
    bench.add_argument("--text", help="file to take prompts from (the bundled held-out text)")
    bench.add_argument("--prompts", type=int, default=8, metavar="P", help="prompts, evenly spaced in the text (8)")
    bench.add_argument("--prompt-tokens", type=int, default=64, metavar="T", help="tokens of each prompt (64)")
    bench.add_argument("--json", action="store_true", help="one line of JSON")

    lattice = commands.add_parser("lattice", help="are weights int4 QAT weights; which of two checkpoints has them")
    lattice.set_defaults(command=lattice_command)
    lattice.add_argument("model", help=CHECKPOINT)
    lattice.add_argument("--against", metavar="PATH", help="compare with this one, in any of the formats")
    lattice.add_argument("--json", action="store_true")

    convert_ = commands.add_parser("convert", help="write a checkpoint in another format, and say what was rounded")
    convert_.set_defaults(command=convert_command)
    convert_.add_argument("source", help=CHECKPOINT)
    convert_.add_argument("destination", help="a new .gguf file (f32, q8_0, q4_0), else a new folder")
    convert_.add_argument("--to", required=True, choices=FORMATS)
    convert_.add_argument("--json", action="store_true")

    synth = commands.add_parser("synth", help="write a random checkpoint of any size, for memory and speed")
    synth.set_defaults(command=synth_command)
    synth.add_argument("destination", help="a new folder; for f32, q8_0 and q4_0 perhaps a new .gguf file")
    synth.add_argument("--config", required=True, metavar="NAME", help="a published configuration, or a config.json")
    synth.add_argument("--layers", type=int, metavar="N", help="its first N, whole periods of the pattern (all)")
    synth.add_argument("--format", choices=FORMATS, default="bf16")
    synth.add_argument("--seed", type=int, default=0)
    synth.add_argument("--json", action="store_true")
    return parser


def _load(arguments):
    """The target, which must have a tokenizer, and its drafter, or None where there is none."""
    target = load(arguments.model, arguments.backend, arguments.dtype, arguments.keep)
    if target.tokenizer is None:
        raise CheckpointError(f"{target.folder} has no tokenizer")
    if arguments.draft == "none":
        return target, None
    if arguments.draft == "auto" and find_drafter(target) is None:
        print(f"no drafter in or beside {target.folder} (--draft PATH names one): one token a pass", file=sys.stderr)
        return target, None
    return target, load_drafter(arguments.draft, target, arguments.keep)


def _length(arguments, default):
    return default if arguments.max_new_tokens is None else arguments.max_new_tokens


def _generation(arguments, drafter, sampling, target, length):
    """The arguments of generate that run and chat share."""
    return {
        "drafter": drafter,
        "num_draft": arguments.num_draft,
        "rule": arguments.rule,
        "sampling": sampling,
        "max_new_tokens": _length(arguments, length),
        "stop": target.stop_ids,
        "seed": arguments.seed,
    }


# run and chat


def run_command(arguments):
    """Continue a prompt, streaming."""
    prompt = _prompt(arguments)
    target, drafter = _load(arguments)
    never = target.generation_config.get("suppress_tokens", ())
    sampling = Sampling(arguments.temp or 0.0, arguments.top_k, arguments.top_p, arguments.min_p, never)
    options = _generation(arguments, drafter, sampling, target, length=128)
    _show_steps(generate(target, target.tokenizer.encode(prompt), **options), target.tokenizer, arguments)


def _prompt(arguments):
    prompt = arguments.prompt
    if prompt is None and arguments.model != BUNDLED:
        raise ValueError("no prompt: give one, or - to read standard input")
    if prompt == "-":
        prompt = _standard_input().read()
    if prompt == "":
        raise ValueError("the prompt is empty")
    if prompt is None:
        print(f"prompt: {json.dumps(PROMPT)}", file=sys.stderr)
    return PROMPT if prompt is None else _checked_text(prompt, "the prompt")


def _standard_input():
    if sys.stdin is None:
        raise ValueError("there is no standard input")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    return sys.stdin


def _checked_text(text, name):
    """The text, if all of it was UTF-8 (Python smuggles other bytes through as lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is not UTF-8 text") from None
    return text


def chat_command(arguments):
    """Answer what is typed (or piped in), line by line, until the end of input."""
    target, drafter = _load(arguments)
    asked = {
        "temperature": arguments.temp,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "min_p": arguments.min_p,
    }
    sampling, ignored = recommended(target.generation_config, **asked)
    if ignored:
        print(f"generation_config.json: not honoured: {', '.join(ignored)}", file=sys.stderr)
    thinking = {} if arguments.think is None else {"enable_thinking": arguments.think}
    conversation = Conversation(target, arguments.system, **thinking)
    options = _generation(arguments, drafter, sampling, target, length=1024)
    lines, status = _standard_input(), 0
    while (line := _read_line(lines)) not in (None, "/exit"):
        if line == "/reset":
            conversation.reset()
        elif line:
            try:
                _show_steps(conversation.ask(line, **options), target.tokenizer, arguments)
                options["seed"] += 1  # the same numbers again would tie one answer to the next
            except KeyboardInterrupt:  # ends this answer, not the conversation
                print(file=sys.stderr)
            except ChatTemplateError:
                raise
            except ValueError as error:  # nor does a line that cannot be read
                print(f"minimtp: {error}", file=sys.stderr)
                status = 2
    return status


def _read_line(lines):
    """The next line of input, None at its end."""
    if lines.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = lines.readline()
    return _checked_text(line, "standard input").strip() if line else None


def _show_steps(steps, tokenizer, arguments):
    """Show the steps as asked, and what they came to on standard error, also where they are interrupted."""
    seen = []
    try:
        for step in _shown(steps, tokenizer, arguments):
            seen.append(step)
    finally:
        if seen:
            summary = summarize(seen)
            print(json.dumps(summary) if arguments.json else _closing_line(summary), file=sys.stderr)


def _shown(steps, tokenizer, arguments):
    """Pass the steps on, each shown as asked: its text streamed, or its trace line, or its JSON."""
    stream, held, shown = tokenizer.stream(), [], False
    if arguments.trace:
        print(LEGEND, file=sys.stderr)
    hold = arguments.trace and sys.stdout.isatty()  # a terminal shows the trace first, then the text in one piece
    try:
        for number, step in enumerate(steps):
            text, shown = "".join(map(stream, step.tokens)), True
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
        if shown and not arguments.json:
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


LEGEND = "round kept/drafted  + accepted, x rejected, . not looked at, > the target's correction, * the token it adds"


def _colours(stream):
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def trace_line(number, step, tokenizer, colours=False):
    """One round in one line: each draft token with its fate, then the token that the target gave."""
    accepted = step.accepted
    ended = len(step.tokens) == accepted  # by a stop token inside the draft: nothing came after it
    fates = ["accepted"] * accepted + ["unread" if ended else "rejected"] + ["unread"] * step.drafted
    tokens = [*zip(fates, step.draft.tokens)]
    if not ended:
        tokens.append(("correction" if accepted < step.drafted else "bonus", step.verdict.token))
    parts = []
    for fate, token in tokens:
        mark, colour = FATES[fate]
        part = mark + json.dumps(tokenizer.decode([token], special=True), ensure_ascii=False)
        parts.append(f"\033[{colour}m{part}\033[0m" if colours else part)
    return f"{number:4} {step.accepted}/{step.drafted}  " + " ".join(parts)


def _closing_line(summary):
    kept = " ".join(f"{share:.0%}" for share in summary["acceptance"])
    return (
        f"{summary['tokens']} tokens in {summary['passes']} target passes: {summary['tokens_per_pass']:.2f} a pass"
        + (f", accepted by depth {kept}" if kept else "")
        + f"; {summary['seconds']:.2f} s, {summary['tokens'] / summary['seconds']:.0f} tokens/s"
    )


# show


def show_command(arguments):
    """Print what a configuration says, and what that costs."""
    if arguments.context is not None and arguments.context < 1:
        raise ValueError(f"--context must be at least 1, got {arguments.context}")
    if arguments.config:
        family, config = published_config(arguments.config)
        name, stored, told = arguments.config, None, []
    else:
        checkpoint, family, config = open_model(arguments.model)
        name, stored, told = str(checkpoint.folder), checkpoint.stored_bytes(), notes(checkpoint, family, config)
        if hasattr(config, "mtp_layers"):  # tensors say what is there
            config = replace(config, mtp_layers=int(any(map(qwen35_mtp.owns, checkpoint.tensors))))
    has_mtp = getattr(config, "mtp_layers", 0)
    mtp_table = qwen35_mtp.tensors(qwen35_mtp.layer_config(config)) if has_mtp else None
    report = {
        "model": name,
        "family": family.__name__.rpartition(".")[2],
        **memory.describe(
            config, family.tensors(config), arguments.context, formats=family.FORMATS, mtp_table=mtp_table
        ),
    }
    if told:
        report["notes"] = told
    if stored:
        report["stored_bytes"] = {**stored, "total": sum(stored.values())}
    print(json.dumps(report) if arguments.json else memory.report_text(report))


# bench


def bench_command(arguments):
    """Measure decoding on pieces of a text."""
    target, drafter = _load(arguments)
    prompts = _pieces(arguments, target.tokenizer)
    report = measure(target, drafter, prompts, arguments.num_draft, _length(arguments, 128))
    print(json.dumps(report, indent=None if arguments.json else 2))
    return 0 if report.get("identical", True) else 1


def _pieces(arguments, tokenizer):
    """Evenly spaced pieces of a text, each of as many tokens."""
    path, size = Path(arguments.text) if arguments.text else bundled("heldout.txt"), arguments.prompt_tokens
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    ids = tokenizer.encode(_checked_text(text, path), special=False)
    if arguments.prompts < 1 or size < 1 or len(ids) < arguments.prompts * size:
        raise ValueError(f"{path} has {len(ids)} tokens, too few for {arguments.prompts} prompts of {size}")
    stride = len(ids) // arguments.prompts
    return [ids[i * stride : i * stride + size] for i in range(arguments.prompts)]


# checkpoints in other formats


def lattice_command(arguments):
    """Say whether a checkpoint holds int4 QAT weights, or which of two does."""
    with _progress("weights") as bar:
        if arguments.against:
            report = lattice_report.compare(arguments.model, arguments.against, lambda row: bar.update())
        else:
            report = lattice_report.examine(arguments.model, lambda row: bar.update())
    print(json.dumps(report) if arguments.json else lattice_report.report_text(report))
    return 0 if report["same" if arguments.against else "qat"] else 1


def convert_command(arguments):
    """Write a checkpoint in another format."""
    with _progress("B") as bar:
        report = convert(arguments.source, arguments.destination, arguments.to, _counting(bar))
    print(json.dumps(report.as_dict()) if arguments.json else report.text())


def synth_command(arguments):
    """Write a random checkpoint."""
    with _progress("B") as bar:
        options = arguments.format, arguments.layers, arguments.seed
        report = synthesize(arguments.config, arguments.destination, *options, _counting(bar))
    if arguments.json:
        print(json.dumps(report.as_dict()))
    else:
        print(report.text().splitlines()[0], file=sys.stderr)


def _progress(unit):
    """A bar on standard error, if that is a terminal."""
    return tqdm(unit=unit, unit_scale=True, leave=False, disable=not sys.stderr.isatty(), file=sys.stderr)


def _counting(bar):
    def progress(done, total):
        bar.total = total
        bar.update(done - bar.n)

    return progress
