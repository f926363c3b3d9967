"""The commands. Text goes to standard output and nothing else does; progress and statistics go to standard error."""

import argparse
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from . import __version__, cli_check, cli_files, cli_oracle, cli_show, device_bench
from .acceptance import RULES
from .bench import measure, summarize
from .chat import Conversation
from .cli_common import BUNDLED, CHECKPOINT, checked_text, load_pair, loader_options, read_prompt, standard_input
from .display import FATES
from .generate import generate
from .loading import bundled
from .sampling import Sampling, recommended
from .text import ChatTemplateError


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

    model = argparse.ArgumentParser(add_help=False, parents=[loader_options()])
    model.add_argument("-k", "--num-draft", type=int, default=4, metavar="K", help="tokens drafted a round (4)")
    model.add_argument("-n", "--max-new-tokens", type=int, metavar="N", help="tokens at most (128; chat 1024)")

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

    bench = commands.add_parser("bench", parents=[model], help="measure decoding, plain and with drafts")
    bench.set_defaults(command=bench_command)
    bench.add_argument("model", nargs="?", default=BUNDLED)
    bench.add_argument("--text", help="file to take prompts from (the bundled held-out text)")
    bench.add_argument("--prompts", type=int, default=8, metavar="P", help="prompts, evenly spaced in the text (8)")
    bench.add_argument("--prompt-tokens", type=int, default=64, metavar="T", help="tokens of each prompt (64)")
    bench.add_argument("--acceptance", type=float, metavar="A", help="with scripted drafts, too, right with chance A")
    bench.add_argument("--plot", metavar="FILE", help="draw a GPU's passes under its roofline (needs matplotlib)")
    bench.add_argument("--json", action="store_true", help="one line of JSON")

    cli_show.add_command(commands)
    cli_files.add_commands(commands)
    cli_oracle.add_commands(commands)
    cli_check.add_commands(commands)
    return parser


def _length(arguments, default):
    return default if arguments.max_new_tokens is None else arguments.max_new_tokens


def _generation(arguments, drafter, sampling, target, length):
    """The arguments of generate that run and chat share."""
    return {
        "drafter": drafter,
        "num_draft": arguments.num_draft,
        "rule": arguments.rule,
        "sampling": sampling,
        "draft_sampling": Sampling(temperature=0.0) if RULES[arguments.rule].soft else None,
        "max_new_tokens": _length(arguments, length),
        "stop": target.stop_ids,
        "seed": arguments.seed,
    }


# run and chat


def run_command(arguments):
    """Continue a prompt, streaming."""
    prompt = read_prompt(arguments)
    target, drafter = load_pair(arguments, RULES[arguments.rule].soft)
    never = target.generation_config.get("suppress_tokens", ())
    sampling = Sampling(arguments.temp or 0.0, arguments.top_k, arguments.top_p, arguments.min_p, never)
    options = _generation(arguments, drafter, sampling, target, length=128)
    _show_steps(generate(target, target.tokenizer.encode(prompt), **options), target.tokenizer, arguments)


def chat_command(arguments):
    """Answer what is typed (or piped in), line by line, until the end of input."""
    target, drafter = load_pair(arguments, RULES[arguments.rule].soft)
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
    lines, status = standard_input(), 0
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
    return checked_text(line, "standard input").strip() if line else None


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
        mark, _, colour = FATES[fate]
        part = mark + json.dumps(tokenizer.decode([token], special=True), ensure_ascii=False)
        parts.append(f"\033[38;5;{colour}m{part}\033[0m" if colours else part)
    return f"{number:4} {step.accepted}/{step.drafted}  " + " ".join(parts)


def _closing_line(summary):
    kept = " ".join(f"{share:.0%}" for share in summary["acceptance"])
    return (
        f"{summary['tokens']} tokens in {summary['passes']} target passes: {summary['tokens_per_pass']:.2f} a pass"
        + (f", accepted by depth {kept}" if kept else "")
        + f"; {summary['seconds']:.2f} s, {summary['tokens'] / summary['seconds']:.0f} tokens/s"
    )


# bench


def bench_command(arguments):
    """Measure decoding on pieces of a text."""
    if arguments.plot and arguments.backend == "numpy":
        raise ValueError("--plot draws what a GPU does: it needs --backend cupy")
    target, drafter = load_pair(arguments)
    prompts = _pieces(arguments, target.tokenizer)
    length = _length(arguments, 128)
    report = measure(target, drafter, prompts, arguments.num_draft, length, arguments.acceptance)
    if target.device is not None:
        report |= device_bench.measure(target, prompts[0])
    print(json.dumps(report, indent=None if arguments.json else 2))
    if arguments.plot:
        device_bench.plot(report, arguments.plot)
    return 0 if report.get("identical", True) else 1


def _pieces(arguments, tokenizer):
    """Evenly spaced pieces of a text, each of as many tokens."""
    path, size = Path(arguments.text) if arguments.text else bundled("heldout.txt"), arguments.prompt_tokens
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    ids = tokenizer.encode(checked_text(text, path), special=False)
    if arguments.prompts < 1 or size < 1 or len(ids) < arguments.prompts * size:
        raise ValueError(f"{path} has {len(ids)} tokens, too few for {arguments.prompts} prompts of {size}")
    stride = len(ids) // arguments.prompts
    return [ids[i * stride : i * stride + size] for i in range(arguments.prompts)]
