"""A list of prompts, each with a result of its own: worked through here, by several processes, or by a Dask cluster.

A list is a file of JSON lines, {"id": "name of the result", "prompt": "text"} or {"id": ..., "ids": [token ids]}. The
folder of results has worklist.json, which says what they are results of; a result that is there is complete.
"""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
from contextlib import suppress
from multiprocessing import connection
from pathlib import Path

from .checkpoint import CheckpointError, new_file, read_json, show

FORMAT = "minimtp-worklist 1"
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")  # an id is a file's name
_ALONE = threading.Lock()  # bits are promised for one pass at a time in a process


def read_list(path):
    """The prompts of a list, [{"id": text, "prompt": text or "ids": list}]. Raises CheckpointError naming the line."""
    items, seen = [], set()
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            item = json.loads(line.decode())
            ids, text = item.get("ids", []), item.get("prompt", "")
            text.encode()
        except (ValueError, RecursionError, AttributeError):
            raise CheckpointError(f"{where}: expected a JSON object with a text or token ids, in UTF-8") from None
        if set(item) not in ({"id", "prompt"}, {"id", "ids"}):
            raise CheckpointError(f"{where}: has {show(sorted(item))}, expected id, and prompt or ids")
        if not isinstance(item["id"], str) or not NAME.fullmatch(item["id"]) or item["id"].lower() in seen:
            again = "an id that is there already" if str(item["id"]).lower() in seen else "no name for a file"
            raise CheckpointError(f"{where}: id {show(item['id'])} is {again}")
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise CheckpointError(f"{where}: ids are not a list of token ids")
        seen.add(item["id"].lower())  # some file systems take a and A for one name
        items.append(item)
    if not items:
        raise CheckpointError(f"{path}: no prompt in it")
    return items


def claim(folder, items, what):
    """Make a folder the place of this list's results, or see that it is. Raises CheckpointError where it is another's.

    what: a JSON-able dict of everything the results depend on, prompts aside. A list may have grown since.
    """
    folder, digests = Path(folder), {item["id"]: _digest(item) for item in items}
    path, claimed = folder / "worklist.json", {"format": FORMAT, **json.loads(json.dumps(what)), "prompts": {}}
    folder.mkdir(exist_ok=True)
    if path.exists():
        found = read_json(path)
        if other := [name for name in claimed if name != "prompts" and found.get(name) != claimed[name]]:
            raise CheckpointError(f"{path}: results of another list (other {', '.join(other)}): choose another folder")
        claimed["prompts"] = found["prompts"]
    for name, digest in digests.items():
        if claimed["prompts"].setdefault(name, digest) != digest:
            raise CheckpointError(f"{path}: {show(name)} was another prompt: give this one another id")
    with new_file(path) as file:
        file.write(json.dumps(claimed, indent=1).encode())


def _digest(item):
    return hashlib.sha256(json.dumps(item, sort_keys=True).encode()).hexdigest()


def attempt(function, item):
    """function(item) -> None, or what went wrong in one line. One at a time in a process."""
    try:
        with _ALONE:
            function(item)
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def work(function, items, workers=1, dask=None):
    """Call function(item) for each, which writes a result -> generator of (item, None or what went wrong), as they end.

    workers: processes on this machine, which share its cores; function must then be importable. dask: the address of a
    scheduler of Dask distributed instead, whose workers have this package and see the same files.
    """
    if dask is not None:
        return _on_cluster(function, items, dask)
    if workers == 1:
        return ((item, attempt(function, item)) for item in items)
    return _on_processes(function, items, min(workers, len(items)))


def _on_processes(function, items, workers):
    """Each process takes the next prompt when it is free. One that dies fails its prompt, and is replaced."""
    context, waiting, at_work = multiprocessing.get_context("spawn"), list(reversed(items)), {}

    def begin(share):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, function, share, workers), daemon=True)
        process.start()
        theirs.close()
        give(ours, process, share)

    def give(ours, process, share):
        if waiting:
            at_work[ours] = process, share, waiting.pop()
            with suppress(ConnectionError):  # dead already: found out below
                ours.send(at_work[ours][2])
        else:
            ours.close()  # tells it to end

    try:
        for share in range(workers):
            begin(share)
        while at_work:
            for ours in connection.wait(list(at_work)):
                process, share, item = at_work.pop(ours)
                try:
                    error = ours.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    error = f"its process died (status {process.exitcode})"
                    if waiting:
                        begin(share)
                else:
                    give(ours, process, share)
                yield item, error
    finally:
        for process, _, _ in at_work.values():
            process.terminate()


def _serve(theirs, function, share, workers):
    """One of the processes: work until there is no more to do, or nobody to do it for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started it ends it, also by its own end
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if hasattr(os, "sched_setaffinity"):  # its share of the cores, and so as many threads
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[share % len(cores) :: workers])
    with suppress(EOFError, ConnectionError):
        while True:
            theirs.send(attempt(function, theirs.recv()))


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _on_cluster(function, items, address):
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise ValueError("a Dask cluster needs Dask: pip install minimtp[cluster]") from None
    with Client(address) as client:
        futures = {client.submit(attempt, function, item, pure=False): item for item in items}
        try:
            for future in as_completed(futures):
                error = future.exception()  # of a worker that died, again and again
                yield futures[future], future.result() if error is None else f"{type(error).__name__}: {error}"
        finally:
            client.cancel(list(futures))
