"""The command show: what a configuration says, what it takes, whether that fits, and a picture of it."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

from . import memory, qwen35_mtp
from .cli_common import BUNDLED, CHECKPOINT
from .display import MEMORY
from .kv_storage import NAMES
from .loading import find_drafter, holds_drafter, open_drafter, open_model, published_config, resolve
from .parameters import notes, stored_parts
from .plan import make_plan

UNITS = {"MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "MB": 10**6, "GB": 10**9, "TB": 10**12}
DEVICES = {"3060": 12, "4080": 16, "3090": 24, "4090": 24, "5090": 32, "a6000": 48, "a100": 80, "h100": 80}  # GiB
PLANNED = ("memory", "device", "kv", "format", "draft", "scratch", "plot")  # options that ask for a plan


def add_command(commands):
    show = commands.add_parser("show", help="layer plan, parameters and memory; whether it fits a card")
    show.set_defaults(command=show_command)
    show.add_argument("model", nargs="?", default=BUNDLED, help=CHECKPOINT)
    show.add_argument("--config", metavar="NAME", help="a published configuration instead, without weights")
    show.add_argument("--context", type=int, metavar="N", help="tokens of context to count KV bytes for (the model's)")
    show.add_argument("--memory", metavar="24GiB", help="plan for that much memory, 600 MiB of it the driver's")
    show.add_argument("--device", choices=tuple(DEVICES), metavar="CARD",
                      help=f"plan for the memory of this card: {', '.join(DEVICES)}")  # fmt: skip
    show.add_argument("--kv", choices=NAMES, metavar="STORAGE", help=f"keys and values (bf16): {', '.join(NAMES)}")
    show.add_argument("--format", choices=tuple(memory.FORMATS), metavar="FORMAT",
                      help=f"weights (as stored; of a --config q4_0): {', '.join(memory.FORMATS)}")  # fmt: skip
    show.add_argument("--draft", help="auto, none, or a drafter's path; of a --config also its drafter's format")
    show.add_argument("--scratch", metavar="400MiB", help="memory to leave for a pass, instead of an estimate")
    show.add_argument("--plot", metavar="FILE", help="draw the plan as stacked bars, to a picture")
    show.add_argument("--json", action="store_true")


def show_command(arguments):
    """Print what a configuration says, and what that costs."""
    if arguments.context is not None and arguments.context < 1:
        raise ValueError(f"--context must be at least 1, got {arguments.context}")
    checkpoint, stored, told = None, None, []
    if arguments.config:
        (family, config), name = published_config(arguments.config), arguments.config
    else:
        checkpoint, family, config = open_model(arguments.model)
        name, stored, told = str(checkpoint.folder), checkpoint.stored_bytes(), notes(checkpoint, family, config)
        if hasattr(config, "mtp_layers"):  # tensors say what is there
            config = replace(config, mtp_layers=int(any(map(qwen35_mtp.owns, checkpoint.tensors))))
    table, mtp_table = family.tensors(config), _mtp_table(config)
    report = {
        "model": name,
        "family": family.__name__.rpartition(".")[2],
        **memory.describe(config, table, arguments.context, formats=family.FORMATS, mtp_table=mtp_table),
    }
    if told:
        report["notes"] = told
    if stored:
        report["stored_bytes"] = {**stored, "total": sum(stored.values())}
    plan = None
    if any(getattr(arguments, option) is not None for option in PLANNED):
        plan = plan_of(arguments, name, checkpoint, family, config)
        report["plan"] = plan.as_dict()
    text = "\n\n".join([memory.report_text(report), *([plan.text()] if plan else [])])
    print(json.dumps(report) if arguments.json else text)
    if arguments.plot:
        plot(plan, arguments.plot)


def _mtp_table(config):
    return qwen35_mtp.tensors(qwen35_mtp.layer_config(config)) if getattr(config, "mtp_layers", 0) else None


def plan_of(arguments, name, checkpoint, family, config):
    """The Plan that the options ask for; checkpoint None: of a published configuration."""
    given = parse_memory(arguments.memory) if arguments.memory is not None else None
    if given is None and arguments.device:
        given = DEVICES[arguments.device] << 30
    if arguments.format or checkpoint is None:
        weights = memory.stored_parts(family.tensors(config), arguments.format or "q4_0")
    else:
        weights = stored_parts(checkpoint, family, config)
    drafter, mtp = _drafter_of(arguments, checkpoint, family, config)
    scratch = None if arguments.scratch is None else parse_memory(arguments.scratch)
    options = {"drafter": drafter, "mtp": mtp, "memory": given, "scratch": scratch}
    return make_plan(name, config, weights, arguments.context, arguments.kv or "bf16", **options)


def _drafter_of(arguments, checkpoint, family, config):
    """({(component, type): bytes}, whether it is the target's MTP layer) of the drafter, None where there is none."""
    draft = arguments.draft or "auto"
    if draft in ("none", "lookup"):
        return None, False
    if checkpoint is None and draft in ("auto", *memory.FORMATS):
        return _published_drafter(arguments, config, None if draft == "auto" else draft)
    target = SimpleNamespace(family=family, config=config)
    if draft == "auto":
        target.path, target.folder = resolve(arguments.model), checkpoint.folder
        target.has_mtp = holds_drafter(checkpoint)
        draft = find_drafter(target)
        if draft is None:
            return None, False
    found = open_drafter(draft, target)
    return stored_parts(*found), found[1] is qwen35_mtp


def _published_drafter(arguments, config, format):
    """A published target's own: an assistant, if nothing is said in bf16 as released, or the MTP layer, as the rest."""
    if table := _mtp_table(config):
        kept = "bf16" if (arguments.format or "").startswith(("w4a16", "int4")) else arguments.format or "q4_0"
        return memory.stored_parts(table, format or kept), True
    try:
        family, config = published_config(f"{arguments.config}-assistant")
    except ValueError:
        return None, False
    return memory.stored_parts(family.tensors(config), format or "bf16"), False


def parse_memory(text):
    """An amount such as 24GiB -> bytes. Raises ValueError where the unit is none of UNITS: 24G could be either kind."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([A-Za-z]+)", text.strip(), re.ASCII)
    unit = {name.lower(): size for name, size in UNITS.items()}.get(found[2].lower()) if found else None
    if unit is None or not float(found[1]):
        raise ValueError(f"{text!r} is no amount of memory: a number and one of {', '.join(UNITS)}, such as 24GiB")
    return int(float(found[1]) * unit)


# A picture


def plot(plan, path):
    """Draw a plan as stacked bars, at its context and at others. Raises ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib, which is not installed") from None
    limit = plan.config.max_position_embeddings
    contexts = {plan.context, limit, plan.max_context or limit, *(n for n in (8192, 32768, 131072) if n < limit)}
    figure = Figure(figsize=(9, 2 + 0.4 * len(contexts)), layout="constrained")
    axes = figure.subplots()
    for row, context in enumerate(sorted(contexts)):
        start = 0
        for name, size in plan.at(context).stack().items():
            axes.barh(row, size / 2**30, left=start, color=MEMORY[name], label=None if row else name)
            start += size / 2**30
    if plan.memory is not None:
        axes.axvline(plan.memory / 2**30, color="black", linestyle="--", label="memory")
    axes.set_yticks(range(len(contexts)), [f"{context:,}" for context in sorted(contexts)])
    axes.set(xlabel="GiB", ylabel="tokens", title=f"{plan.model}, keys and values in {plan.storage}")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path)
