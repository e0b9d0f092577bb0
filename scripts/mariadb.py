"""
Run a command with a MariaDB server of its own.

    python scripts/mariadb.py -- COMMAND [ARGUMENT ...]
    python scripts/mariadb.py --missing

Start a server in a new temporary directory, reachable through a unix socket in
it only, run COMMAND with its address in MARIADB_URL, stop the server, delete
the directory, and exit with COMMAND's exit code. If MARIADB_URL is already
set, start nothing: COMMAND uses that server. It is not DATABASE_URL, so that
one run of all tests can use a server of each kind.

The programs come from the system's packages. With --missing, print the Debian
packages that have those which are not installed, to start the server, to copy
databases, or to build mysqlclient, and an empty line if they are all there.

Exit codes: COMMAND's, or 2 if the server cannot be started.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.parse

from own_server import OwnServer, ServerError, unprivileged_identity

# What the tests run, and the Debian packages that have it.
SERVER_PROGRAMS = {
    "mariadbd": "mariadb-server-core",
    "mariadb-install-db": "mariadb-server-core",
    # It is called by mariadb-install-db.
    "my_print_defaults": "mariadb-client-core",
}
CLIENT_PROGRAMS = {
    # Django copies databases with them, for tests that run in parallel.
    "mysql": "mariadb-client-core",
    "mysqldump": "mariadb-client",
}
BUILD_PROGRAMS = {
    "cc": "gcc",
    "pkg-config": "pkg-config",
}
# What mysqlclient looks for.
LIBRARIES = ["mysqlclient", "mariadb", "libmariadb", "perconaserverclient"]
LIBRARY_PACKAGE = "libmariadb-dev"

# The data lives as long as the command.
SETTINGS = {
    "skip-networking": "ON",
    "skip-name-resolve": "ON",
    "character-set-server": "utf8mb4",
    "max-connections": "200",
    "innodb-buffer-pool-size": "64M",
    "innodb-doublewrite": "OFF",
    "innodb-fast-shutdown": "3",
    "innodb-flush-log-at-trx-commit": "0",
    "innodb-flush-method": "nosync",
}

SERVER = OwnServer("MARIADB_URL", ("MYSQL", "MARIADB"), signal.SIGTERM)


@contextlib.contextmanager
def server():
    """
    Yield the URL of a server: MARIADB_URL's, or one that lives until the block
    ends.
    """
    if url := os.environ.get("MARIADB_URL"):
        yield url
        return
    if packages := missing(SERVER_PROGRAMS):
        raise ServerError(
            f"MariaDB is not installed. {install_hint(packages)}, or set MARIADB_URL "
            "to use a running server."
        )
    with SERVER.directory() as directory:
        identity = unprivileged_identity(directory)
        address = directory / "socket"
        SERVER.call(install_db(directory), directory, identity)
        command = [
            find("mariadbd"),
            *server_options(directory),
            f"--socket={address}",
            f"--pid-file={directory / 'pid'}",
        ]
        with SERVER.running(command, directory, identity, lambda: greets(address)):
            yield f"mysql://root@/?unix_socket={address}"


def database_settings(url):
    """Return the entry of Django's DATABASES for a server that answers."""
    import MySQLdb

    settings, options = parse_url(url)
    host = "unix_socket" if settings["HOST"].startswith("/") else "host"
    names = {"HOST": host, "PORT": "port", "USER": "user", "PASSWORD": "password"}
    arguments = {name: settings[key] for key, name in names.items() if settings[key]}
    try:
        MySQLdb.connect(**{"connect_timeout": 10, **arguments, **options}).close()
    except MySQLdb.Error as error:
        raise ServerError(
            "The server that MARIADB_URL names does not answer. Start it, or unset "
            f"MARIADB_URL to use one that is started for the tests. {error}"
        ) from error
    return {
        "ENGINE": "django.db.backends.mysql",
        **settings,
        "OPTIONS": options,
    }


def parse_url(url):
    """Return Django's settings and the driver's options that a URL has."""
    parts = urllib.parse.urlsplit(url)
    options = dict(urllib.parse.parse_qsl(parts.query))
    settings = {
        "NAME": urllib.parse.unquote(parts.path.lstrip("/")),
        "USER": urllib.parse.unquote(parts.username or ""),
        "PASSWORD": urllib.parse.unquote(parts.password or ""),
        "HOST": options.pop("unix_socket", parts.hostname or ""),
        "PORT": parts.port or "",
    }
    return settings, options


def find(program):
    """Return the path of a program, or None."""
    # Debian doesn't have the directory of servers in every user's PATH.
    path = os.environ.get("PATH", os.defpath) + os.pathsep + "/usr/sbin"
    return shutil.which(program, path=path)


def missing(programs):
    """Return the packages that have those programs which aren't installed."""
    return sorted({programs[name] for name in programs if find(name) is None})


def missing_for_tests():
    """Return the packages without which the tests on MariaDB cannot be run."""
    programs = CLIENT_PROGRAMS | BUILD_PROGRAMS
    if not os.environ.get("MARIADB_URL"):
        programs |= SERVER_PROGRAMS
    packages = missing(programs)
    if not any(is_library(name) for name in LIBRARIES):
        packages.append(LIBRARY_PACKAGE)
    return packages


def is_library(name):
    """Return whether what is needed to build with a library is installed."""
    try:
        return not subprocess.run(["pkg-config", "--exists", name]).returncode
    except OSError:
        return False


def install_hint(packages):
    """Return the advice to install packages."""
    return f'On Debian, run "apt-get install {" ".join(packages)}"'


def install_db(directory):
    """Return the command that creates the system's databases."""
    return [
        find("mariadb-install-db"),
        *server_options(directory),
        "--auth-root-authentication-method=normal",
        "--skip-test-db",
    ]


def server_options(directory):
    """Return the options of every program that is the server."""
    settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
    # Servers that share a directory delete each other's temporary tables.
    places = [f"--datadir={directory / 'data'}", f"--tmpdir={directory}"]
    return ["--no-defaults", *places, *settings]


def greets(address):
    """Return whether the server at a socket accepts connections."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1)
        try:
            client.connect(os.fspath(address))
            return bool(client.recv(1))
        except OSError:
            return False


def main(arguments):
    """Run the command line; return the exit code."""
    if arguments == ["--missing"]:
        print(*missing_for_tests())
        return 0
    return SERVER.main("mariadb.py", __doc__, server, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
