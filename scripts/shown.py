"""
Run a command whose output is shown and kept: runtests.py, for run_tests.py and
run_upstream.py.

The command is a process group of its own, since the processes that it starts
can outlive it, and keep its output open. A command that writes nothing for a
while hangs: its processes are aborted, which makes Python print the stacks of
all threads if PYTHONFAULTHANDLER is set.
"""

import contextlib
import os
import pathlib
import select
import signal
import subprocess
import sys

from own_server import STOP_TIMEOUT

# Seconds. The longest silence seen is while upstream's tables are created.
STALL_TIMEOUT = 600


def python_path(*directories):
    """Return PYTHONPATH with directories before what it has."""
    return os.pathsep.join(
        str(path) for path in (*directories, os.environ.get("PYTHONPATH", "")) if path
    )


def run_shown(command, cwd, env, stall_timeout):
    """
    Run a command and show its output. Return its exit code and the output.

    `stall_timeout` is in seconds. The exit code of a command that hangs is
    that of its end by SIGABRT, -6.
    """
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**env, "PYTHONFAULTHANDLER": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    name = pathlib.Path(command[1]).name
    output = b""
    try:
        with process.stdout:
            while True:
                if not select.select([process.stdout], [], [], stall_timeout)[0]:
                    print(
                        f"\n{name} has written nothing for {stall_timeout} seconds. "
                        "It's aborted.",
                        flush=True,
                    )
                    end_group(process, signal.SIGABRT)
                # Dots are progress, whether or not their line is complete.
                chunk = process.stdout.read1()
                if not chunk:
                    break
                output += chunk
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
        return process.wait(), output.decode(errors="replace")
    except KeyboardInterrupt:
        # A terminal's Ctrl-C is for its foreground process group only, and
        # runtests.py cleans up.
        end_group(process, signal.SIGINT)
        raise
    finally:
        end_group(process, signal.SIGTERM)


def end_group(process, signum):
    """End a command and the processes it has started, which outlive it."""
    for signum in (signum, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT)
