import contextlib
import io
import os
import tempfile
import unittest

import mariadb
import own_server_cases as cases
from own_server import TEMP_DIR

NOT_INSTALLED = mariadb.missing(mariadb.SERVER_PROGRAMS | mariadb.CLIENT_PROGRAMS)

try:
    import MySQLdb
except ImportError:
    MySQLdb = None


class MariaDBMixin:
    module = mariadb
    variable = "MARIADB_URL"


@unittest.skipIf(NOT_INSTALLED, "MariaDB is not installed.")
class CommandTests(MariaDBMixin, cases.CommandCases):
    SHOW_SERVER = """
import os, pathlib, urllib.parse
url = urllib.parse.urlsplit(os.environ["MARIADB_URL"])
socket = pathlib.Path(urllib.parse.parse_qs(url.query)["unix_socket"][0])
pid = (socket.parent / "pid").read_text().strip()
print(socket.parent, pid, flush=True)
"""
    SHOW_SETTINGS = """
import os, subprocess, urllib.parse
url = urllib.parse.urlsplit(os.environ["MARIADB_URL"])
socket = urllib.parse.parse_qs(url.query)["unix_socket"][0]
command = ["mysql", "--no-defaults", "--user=root", "--socket=" + socket]
query = "SELECT @@skip_networking, @@max_connections"
subprocess.run([*command, "--skip-column-names", "--execute", query])
"""
    SETTINGS = "1\t200\n"

    def test_missing(self):
        """Nothing is missing where the tests can be run."""
        os.environ["PATH"] = str(self.scripts())
        stdout = io.StringIO()
        with contextlib.redirect_stdout(stdout):
            self.assertEqual(mariadb.main(["--missing"]), 0)
        # The server's directory isn't in every user's PATH.
        self.assertEqual(
            stdout.getvalue(),
            "gcc mariadb-client mariadb-client-core mariadb-server-core pkg-config "
            "libmariadb-dev\n",
        )


class ServerTests(MariaDBMixin, cases.ServerCases):
    def fake(self, create, run):
        path = self.scripts(
            mariadb_install_db=create, mariadbd=run, my_print_defaults="exit 0"
        )
        os.environ["PATH"] = f"{path}:{os.environ['PATH']}"
        return []

    def test_not_installed(self):
        os.environ["PATH"] = str(self.scripts(mariadbd="exit 0"))
        self.assertServerError(
            [],
            "MariaDB is not installed",
            "apt-get install mariadb-client-core mariadb-server-core",
        )


class DatabaseSettingsTests(MariaDBMixin, cases.Case):
    def test_url(self):
        self.assertEqual(
            mariadb.parse_url("mysql://user:p%40ss@host:3307/name?charset=utf8mb4"),
            (
                {
                    "NAME": "name",
                    "USER": "user",
                    "PASSWORD": "p@ss",
                    "HOST": "host",
                    "PORT": 3307,
                },
                {"charset": "utf8mb4"},
            ),
        )

    @unittest.skipIf(MySQLdb is None, "mysqlclient is not installed.")
    @unittest.skipIf(NOT_INSTALLED, "MariaDB is not installed.")
    def test_settings(self):
        with mariadb.server() as url:
            settings = mariadb.database_settings(url)
        self.assertEqual(settings["USER"], "root")
        self.assertRegex(settings["HOST"], f"^{TEMP_DIR}/db-.*/socket$")

    @unittest.skipIf(MySQLdb is None, "mysqlclient is not installed.")
    def test_no_answer(self):
        with tempfile.TemporaryDirectory() as empty:
            with self.assertRaises(mariadb.ServerError) as cm:
                mariadb.database_settings(f"mysql://?unix_socket={empty}/socket")
        self.assertIn("does not answer", str(cm.exception))
        self.assertIn("unset MARIADB_URL", str(cm.exception))


if __name__ == "__main__":
    unittest.main()
