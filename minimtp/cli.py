"""The commands. Text goes to standard output and nothing else does; progress and statistics go to standard error."""

import argparse
import json
import os
import shlex
import sys
from contextlib import suppress

from . import __version__, cli_check, cli_files, cli_oracle, cli_show, device_bench, page
from .acceptance import RULES
from .bench import measure, summarize
from .chat import Conversation
from .cli_common import (
    BUNDLED,
    CHECKPOINT,
    checked_text,
    columns,
    hang,
    has_colours,
    load_pair,
    loader_options,
    read_prompt,
    standard_input,
    text_in,
)
from .display import FATES, paint
from .generate import generate
from .loading import bundled
from .sampling import Sampling, recommended
from .text import ChatTemplateError
from .watch import fates, watching


def main(argv=None):
    """Run one command -> its exit status.

    0 done, 1 a check found a difference, 2 bad use or input (one line says why), 130 interrupted, 141 the reader left.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not hasattr(arguments, "command"):
        parser.error("no COMMAND; to begin with: minimtp run --trace")
    if getattr(arguments, "html", None):  # the page says what made it
        arguments.typed = shlex.join(["minimtp", *(sys.argv[1:] if argv is None else argv)])
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


GROUPS = {
    "generate text": ("run", "chat"),
    "look at a model": ("show", "bench"),
    "rules and acceptance": ("audit", "acceptance"),
    "other engines": ("golden", "logits", "check"),
    "checkpoint files": ("lattice", "convert", "synth"),
}
EXAMPLES = """\
examples:
  minimtp run "ROMEO:" --trace                      what becomes of draft tokens
  minimtp show --config gemma-4-31b --memory 24GiB  whether a model fits
"""


class _CommandsParser(_Parser):
    """The parser of the command itself: its help shows the commands in groups."""

    def add_subparsers(self, **options):
        self.commands = super().add_subparsers(parser_class=_Parser, **options)
        return self.commands

    def format_help(self):
        told = {one.dest: one.help for one in self.commands._choices_actions}
        lines = [self.format_usage(), self.description]
        for title, names in GROUPS.items():
            lines += ["", f"{title}:", *(f"  {name:12}{told[name]}" for name in names)]
        return "\n".join([*lines, "", "minimtp COMMAND --help has a command's options.", "", EXAMPLES])


def _parser():
    parser = _CommandsParser(prog="minimtp", description="A readable reference of multi-token prediction.")
    parser.add_argument("--version", action="version", version=f"minimtp {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")

    model = argparse.ArgumentParser(add_help=False, parents=[loader_options()])
    model.add_argument("-k", "--num-draft", type=int, default=4, metavar="K", help="tokens drafted a round (4)")
    model.add_argument("-n", "--max-new-tokens", type=int, metavar="N", help="tokens at most (128; chat 1024)")

    sampler = argparse.ArgumentParser(add_help=False)
    sampler.add_argument("--model", default=BUNDLED, help=f"{CHECKPOINT} ({BUNDLED})")
    sampler.add_argument("--rule", choices=tuple(RULES), metavar="RULE", default="rejection",
                         help=f"acceptance rule (rejection): {', '.join(RULES)}")  # fmt: skip
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
    run.add_argument("--html", metavar="FILE", help="also write a page: click a token, and see what decided it")
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
    """Continue a prompt, streaming; with --html also as a page, of the text so far where it is interrupted."""
    if arguments.html:
        page.check_path(arguments.html)
    prompt = read_prompt(arguments)
    target, drafter = load_pair(arguments, RULES[arguments.rule].soft)
    never = target.generation_config.get("suppress_tokens", ())
    sampling = Sampling(arguments.temp or 0.0, arguments.top_k, arguments.top_p, arguments.min_p, never)
    options = _generation(arguments, drafter, sampling, target, length=128)
    ids = target.tokenizer.encode(prompt)
    if not arguments.html:
        return _show_steps(generate(target, ids, **options), target.tokenizer, arguments)
    run, steps = watching(target, ids, **options)
    try:
        _show_steps(steps, target.tokenizer, arguments)
    finally:
        if run.steps:
            page.write_page(arguments.html, run, arguments.typed)


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
    if lines.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  (lines can be edited and called back)
        print(f"{target.folder.name}: /reset forgets, /exit ends, Ctrl-C stops an answer", file=sys.stderr)
    while (line := _read_line(lines)) not in (None, "/exit"):
        if line == "/reset":
            conversation.reset()
        elif line:
            try:
                _show_steps(conversation.ask(line, **options), target.tokenizer, arguments)
                if lines.isatty():
                    print(file=sys.stderr)
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
    line = _typed_line(lines) if lines.isatty() else lines.readline()
    return checked_text(line, "standard input").strip() if line else None


def _typed_line(lines):
    try:
        if sys.stdout.isatty():
            return input("> ") + "\n"
        print("> ", end="", file=sys.stderr, flush=True)  # input() would write to standard output
        line = lines.readline()
    except (EOFError, KeyboardInterrupt) as end:
        print(file=sys.stderr)
        if isinstance(end, KeyboardInterrupt):
            raise
        return ""
    if not line:
        print(file=sys.stderr)
    return line


def _show_steps(steps, tokenizer, arguments):
    """Show the steps as asked, and what they came to on standard error, also where they are interrupted."""
    seen = []
    try:
        for step in _shown(steps, tokenizer, arguments):
            seen.append(step)
    finally:
        if seen:
            summary = summarize(seen)
            width = columns(sys.stderr)
            line = json.dumps(summary) if arguments.json else _closing_line(summary, width)
            print(paint(line, "unread") if has_colours(sys.stderr) else line, file=sys.stderr)


def _shown(steps, tokenizer, arguments):
    """Pass the steps on, each shown as asked: its text streamed, or its trace line, or its JSON."""
    stream, held, shown = tokenizer.stream(), [], False
    if arguments.trace:
        print(legend(has_colours(sys.stderr), columns(sys.stderr)), file=sys.stderr)
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
                line = trace_line(number, step, tokenizer, arguments.rule, has_colours(sys.stderr), columns(sys.stderr))
                print(line, file=sys.stderr)
            yield step
    finally:
        if shown and not arguments.json:
            print("".join(["\n" * hold, *held]))  # a blank line between trace and text


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


WORDS = {
    "accepted": "accepted",
    "rejected": "rejected",
    "unread": "not looked at",
    "correction": "the target's correction",
    "bonus": "the token it adds",
}


def legend(colours=False, width=None):
    """What the marks of a trace mean."""
    said = [(fate, f"{FATES[fate].mark} {words}") for fate, words in WORDS.items()]
    parts = [paint(words, fate) if colours else words for fate, words in said]
    return hang(["round kept/drafted ", *(f"{part}," for part in parts[:-1]), parts[-1]], width, indent=10)


def trace_line(number, step, tokenizer, rule="rejection", colours=False, width=None):
    """One round in one line: each draft token with its fate, then the token that the target gave.

    width: columns of a terminal, for a round too long for one line.
    """
    head = f"{number:4} {step.accepted:{len(str(step.drafted))}}/{step.drafted} "
    parts = []
    for fate, token in fates(step, rule):
        part = FATES[fate].mark + json.dumps(tokenizer.decode([token], special=True), ensure_ascii=False)
        parts.append(paint(part, fate) if colours else part)
    return hang([head, *parts], width, indent=len(head) + 1)


def _closing_line(summary, width=None):
    kept = " ".join(f"{share:.0%}" for share in summary["acceptance"])
    text = (
        f"{summary['tokens']} tokens in {summary['passes']} target passes: {summary['tokens_per_pass']:.2f} a pass"
        + (f", accepted by depth {kept}" if kept else "")
        + f"; {summary['seconds']:.2f} s, {summary['tokens'] / summary['seconds']:.0f} tokens/s"
    )
    return hang(text.split(), width, indent=2)


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
    ids, size = tokenizer.encode(text_in(arguments.text), special=False), arguments.prompt_tokens
    if arguments.prompts < 1 or size < 1 or len(ids) < arguments.prompts * size:
        path = arguments.text or bundled("heldout.txt")
        raise ValueError(f"{path} has {len(ids)} tokens, too few for {arguments.prompts} prompts of {size}")
    stride = len(ids) // arguments.prompts
    return [ids[i * stride : i * stride + size] for i in range(arguments.prompts)]
