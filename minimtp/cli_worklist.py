"""What the commands share that take a list of prompts: its options, and the way through it."""

import argparse
import json
import sys
from contextlib import closing, contextmanager
from functools import lru_cache, partial
from pathlib import Path

from . import __version__
from .checkpoint import CheckpointError
from .cli_common import loader_options, progress_bar
from .loading import fingerprint, open_model, resolve
from .worklist import claim, read_list, work

APART = {"command", "json", "keep", "model", "output", "prompts", "workers", "dask", "restart"}  # nothing depends on it


def list_options():
    """Options of a command that makes one result, or one for each prompt of a list."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--prompts",
        metavar="FILE",
        help='JSON lines {"id": name, "prompt": text} or {"id": name, "ids": [...]}; results go to the folder -o',
    )
    options.add_argument("--workers", type=int, default=1, metavar="N", help="processes for a list (1)")
    options.add_argument("--dask", metavar="ADDRESS", help="work through the list on this Dask cluster instead")
    return options


def check_list(arguments, *others):
    """Raise ValueError where options for a list and options for one prompt are mixed."""
    if arguments.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {arguments.workers}")
    if not arguments.prompts and (arguments.dask or arguments.workers > 1):
        raise ValueError("--workers and --dask are for a list of prompts: --prompts names one")
    if arguments.prompts and (other := [name for name in others if getattr(arguments, name)]):
        raise ValueError(f"--prompts and --{other[0].replace('_', '-')} do not go together")
    if arguments.prompts and not arguments.output:
        raise ValueError("-o is needed: the folder of the results")
    if arguments.prompts:
        check_place(arguments.output)


def check_place(path):
    """Raise CheckpointError where there is no folder to write to."""
    if not Path(path).absolute().parent.is_dir():
        raise CheckpointError(f"{path}: no such folder to write into")


@contextmanager
def can_go_on():
    """Around work that a second run continues: where it is interrupted, say so."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from there", file=sys.stderr)
        raise


def run_list(arguments, one, suffix):
    """Make the results that are missing -> exit status, 1 where a prompt failed.

    one(arguments, item) makes that of an item under its id and the suffix, which is there only when it is complete.
    """
    items, folder = read_list(arguments.prompts), Path(arguments.output).absolute()
    names = [name for name in ("model", "draft") if getattr(arguments, name, "auto") not in ("auto", "none", "lookup")]
    paths = {name: str(resolve(getattr(arguments, name)).absolute()) for name in names}  # processes may be elsewhere
    models = {name: fingerprint(open_model(path)[0]) for name, path in paths.items()}
    options = {name: value for name, value in vars(arguments).items() if name not in APART}
    claim(folder, items, {"command": one.__name__, "version": __version__, "models": models, "options": options})
    todo = [item for item in items if not (folder / f"{item['id']}{suffix}").exists()]
    job = argparse.Namespace(**{**vars(arguments), **paths, "output": str(folder), "command": None, "models": models})
    failed = 0
    results = work(partial(one, job), todo, arguments.workers, arguments.dask)
    with can_go_on(), progress_bar(" prompts") as bar, closing(results):
        bar.reset(len(todo))
        for item, error in results:
            bar.update()
            if error is not None:
                failed += 1
                bar.write(f"minimtp: {item['id']}: {error}", file=sys.stderr)
    counts = {"done": len(todo) - failed, "failed": failed, "there": len(items) - len(todo)}
    if arguments.json:
        print(json.dumps(counts))
    else:
        done = f"{counts['done']} of {len(items)} prompts done, {failed} failed, {counts['there']} were there"
        print(done, file=sys.stderr)
    return 1 if failed else 0


def loaded(load, job, **changes):
    """load(job), with some of its options changed; once in a process, however many prompts it works through."""
    names = ("model", *vars(loader_options().parse_args([])))
    options = {name: getattr(job, name) for name in names if hasattr(job, name)} | changes
    return _loaded(load, tuple(options.items()), tuple(job.models.values()))


@lru_cache(maxsize=2)
def _loaded(load, options, models):  # models: fingerprints, since a file may change
    return load(argparse.Namespace(**dict(options)))
