"""
Run one round, for gauntlet.py.

    worker.py KIND --seed N --seconds S --database NAME --mode MODE
    worker.py --list

The tree to test comes first on PYTHONPATH, and the directory of this package
is there, too. GAUNTLET_DATABASE has the entry of DATABASES, in JSON. The last
line of the output is a JSON object: "counts", and "violation", which is null
or has a "message" and a "reproduction". With --list, it has for each kind of
round where it can be run, or why it can't be imported.

Exit codes: 0 if the round was run, whatever it has found out.
"""

import argparse
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import sys
import threading
import traceback


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", nargs="?")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--database")
    parser.add_argument("--mode")
    parser.add_argument("--package", default="rounds")
    return parser.parse_args(arguments)


def find_kind(package, name):
    """Return the Round class of a module, or None."""
    from rounds.base import Round

    module = importlib.import_module(f"{package}.{name}")
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Round) and value.name == name:
            return value
    return None


def describe_kinds(package):
    """Return where the kinds of a package can be run, and what's wrong."""
    kinds, errors = {}, {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        # Models can't be imported without settings.
        if info.ispkg or info.name in ("models", "worker"):
            continue
        try:
            kind = find_kind(package, info.name)
        except Exception as error:
            errors[info.name] = f"{type(error).__name__}: {error}"
            continue
        if kind is not None:
            kinds[info.name] = {
                "databases": sorted(kind.databases),
                "modes": sorted(kind.modes),
            }
    return {"kinds": kinds, "errors": errors}


def show_tasks():
    """Print where tasks are. The stacks of threads are gauntlet.py's."""
    import asyncio

    print("The round hasn't ended. Its tasks are:", flush=True)
    for obj in gc.get_objects():
        if isinstance(obj, asyncio.Task) and not obj.done():
            obj.print_stack(file=sys.stdout)
    sys.stdout.flush()


def give_up(message, reproduction):
    """End the process. May be called by any thread."""
    show_tasks()
    show_result({}, {"message": message, "reproduction": reproduction})
    os._exit(0)


def show_result(counts, violation):
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps({"counts": counts, "violation": violation}), flush=True)


def run_round(this, recorder):
    """Return what the round counted, or raise Violation."""
    from rounds import invariants

    this.set_up()
    for _ in range(2):
        # The second one is there for what the first one's closing creates.
        this.warm_up()
        invariants.close_connections()
    before, memory = invariants.State(), invariants.memory()
    counts = this.run()
    this.check()
    invariants.check(this, recorder, before, memory)
    if stall := round(1000 * this.stall):
        counts["longest stall, ms"] = stall
    if grown := round(this.grown):
        counts["most MiB more"] = grown
    return counts


def main(arguments):
    options = parse(arguments)
    if options.list:
        print(json.dumps(describe_kinds(options.package)))
        return 0

    from rounds.base import Violation
    from rounds.invariants import Recorder

    import django
    from django.conf import settings

    recorder = Recorder()
    recorder.start()
    kind = find_kind(options.package, options.kind)
    this = kind(options.seed, options.seconds, options.database, options.mode)
    database = json.loads(os.environ["GAUNTLET_DATABASE"])
    if options.mode == "native":
        database["ASYNC_NATIVE"] = True
    settings.configure(**this.settings(database))
    django.setup()
    # gauntlet.py waits a bit longer.
    timer = threading.Timer(options.seconds + 100, show_tasks)
    timer.daemon = True
    timer.start()
    counts, violation = {}, None
    try:
        counts = run_round(this, recorder)
    except Violation as error:
        violation = {"message": error.message, "reproduction": error.reproduction}
    except Exception as error:
        violation = {
            "message": f"The round failed. {type(error).__name__}: {error}",
            "reproduction": traceback.format_exc(),
        }
    finally:
        timer.cancel()
    show_result(counts, violation)
    return 0


if __name__ == "__main__":
    # The package is found by its name, and nothing else in its directory.
    sys.path.pop(0)
    sys.exit(main(sys.argv[1:]))
