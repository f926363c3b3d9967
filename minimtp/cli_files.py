"""Commands that examine and write checkpoints: lattice, convert, synth."""

import json
import sys

from . import lattice_report
from .cli_common import CHECKPOINT, counting, progress_bar
from .convert import FORMATS, convert
from .synth import synthesize


def add_commands(commands):
    """Add them to argparse's table of commands."""
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


def lattice_command(arguments):
    """Say whether a checkpoint holds int4 QAT weights, or which of two does."""
    with progress_bar("weights") as bar:
        if arguments.against:
            report = lattice_report.compare(arguments.model, arguments.against, lambda row: bar.update())
        else:
            report = lattice_report.examine(arguments.model, lambda row: bar.update())
    print(json.dumps(report) if arguments.json else lattice_report.report_text(report))
    return 0 if report["same" if arguments.against else "qat"] else 1


def convert_command(arguments):
    """Write a checkpoint in another format."""
    with progress_bar("B") as bar:
        report = convert(arguments.source, arguments.destination, arguments.to, counting(bar))
    print(json.dumps(report.as_dict()) if arguments.json else report.text())


def synth_command(arguments):
    """Write a random checkpoint."""
    with progress_bar("B") as bar:
        options = arguments.format, arguments.layers, arguments.seed
        report = synthesize(arguments.config, arguments.destination, *options, counting(bar))
    if arguments.json:
        print(json.dumps(report.as_dict()))
    else:
        print(report.text().splitlines()[0], file=sys.stderr)
