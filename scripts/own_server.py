"""
What is the same for all servers that a command runs with: postgres.py and
mariadb.py say what is different.
"""

import contextlib
import ctypes
import os
import pathlib
import pwd
import signal
import subprocess
import sys
import tempfile
import time

# A unix socket's path has at most 107 bytes, and an unprivileged user must be
# able to reach it. Neither is certain for TMPDIR.
TEMP_DIR = "/tmp"

START_TIMEOUT = 60
STOP_TIMEOUT = 10


class ServerError(Exception):
    """The server cannot be started. The message says what to do."""


class OwnServer:
    """
    A kind of server that lives in a temporary directory.

    `variable` names the environment variable with the URL of a running server.
    Variables that begin with one of `prefixes` would reconfigure the server,
    which ends without a trace on `stop_signal`.
    """

    def __init__(self, variable, prefixes, stop_signal):
        self.variable = variable
        self.prefixes = prefixes
        self.stop_signal = stop_signal

    @contextlib.contextmanager
    def directory(self):
        """Create the directory, and delete it at the end of the block."""
        try:
            temp_dir = tempfile.TemporaryDirectory(prefix="db-", dir=TEMP_DIR)
        except OSError as error:
            raise ServerError(
                f"Cannot create a directory in {TEMP_DIR}: {error}. Make room in it, "
                f"or set {self.variable} to use a running server."
            ) from error
        with temp_dir as name:
            yield pathlib.Path(name)

    def call(self, command, directory, identity):
        """Run a command that prepares the server."""
        with open(directory / "log", "wb") as log:
            try:
                process = subprocess.run(
                    command, **self.arguments(log, directory, identity)
                )
            except OSError as error:
                raise ServerError(
                    f"Cannot run {command[0]}: {error}. Set {self.variable} to use a "
                    "running server."
                ) from error
        if process.returncode:
            name = pathlib.Path(command[0]).name
            raise ServerError(self.failure(f"{name} failed", directory))

    @contextlib.contextmanager
    def running(self, command, directory, identity, is_ready):
        """
        Run the server until the end of the block. is_ready() begins it, and
        the process is its value.
        """
        with open(directory / "log", "ab") as log:
            process = subprocess.Popen(
                command,
                **self.arguments(log, directory, identity),
                # Ctrl-C is for the command, which may need the server to clean
                # up.
                start_new_session=True,
                preexec_fn=(self.stop_with_parent if sys.platform == "linux" else None),
            )
        try:
            self.wait_until_ready(process, directory, is_ready)
            yield process
        finally:
            stop(process, (self.stop_signal, signal.SIGKILL))

    def arguments(self, log, directory, identity):
        """Return the arguments for subprocess with which programs are run."""
        environment = {
            name: value
            for name, value in os.environ.items()
            # They would reconfigure the server.
            if not name.startswith(self.prefixes)
        }
        return {
            "stdin": subprocess.DEVNULL,
            "stdout": log,
            "stderr": log,
            "cwd": directory,
            "env": environment,
            **identity,
        }

    def stop_with_parent(self):
        """Ask Linux to stop the server even if this process is killed."""
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, self.stop_signal)

    def wait_until_ready(self, process, directory, is_ready):
        """Return when the server accepts connections."""
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServerError(self.failure("The server does not start", directory))
            if is_ready():
                return
            time.sleep(0.05)
        raise ServerError(
            self.failure(
                f"The server is not ready after {START_TIMEOUT} seconds", directory
            )
        )

    def failure(self, what, directory):
        """Return an error message with the end of the server's log."""
        log = (directory / "log").read_text(errors="replace").strip()
        tail = "\n".join(f"    {line}" for line in log.splitlines()[-15:])
        return (
            f"{what}. Its log ends with:\n\n{tail}\n\nRemove the cause, or set "
            f"{self.variable} to use a running server."
        )

    def main(self, script, doc, server, arguments):
        """Run the command line of a script; return the exit code."""
        if arguments[:1] in ([], ["-h"], ["--help"]):
            print(doc.strip())
            return 0 if arguments else 2
        command = arguments[1:] if arguments[0] == "--" else arguments
        unwind_on_termination()
        try:
            with server() as url:
                env = {**os.environ, self.variable: url}
                with ending(subprocess.Popen(command, env=env)) as process:
                    return process.wait()
        except ServerError as error:
            print(f"{script}: {error}", file=sys.stderr)
            return 2
        except FileNotFoundError as error:
            print(f"{script}: Cannot run {command[0]}: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 128 + signal.SIGINT


def unprivileged_identity(directory):
    """
    Make a server that root starts run as "nobody", since as root it refuses
    to. Return the arguments for subprocess.
    """
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam("nobody")
    os.chown(directory, user.pw_uid, user.pw_gid)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def stop(process, signals):
    """Send signals, one after the other, until the process has ended."""
    for signum in signals:
        if process.poll() is not None:
            return
        process.send_signal(signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT)


@contextlib.contextmanager
def ending(process):
    """Make sure that a process does not outlive the block."""
    try:
        yield process
    except KeyboardInterrupt:
        # A terminal sends Ctrl-C to the process, too, which may clean up.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT)
        raise
    finally:
        stop(process, (signal.SIGTERM, signal.SIGKILL))


def unwind_on_termination():
    """Make SIGTERM and SIGHUP leave context managers as Ctrl-C does."""

    def leave(signum, frame):
        # The same signal, repeated, must not stop the cleaning up.
        signal.signal(signum, signal.SIG_IGN)
        sys.exit(128 + signum)

    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, leave)
