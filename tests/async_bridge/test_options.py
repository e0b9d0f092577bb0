"""
Promise 12: what a connection can be told to do, it does in the bridge as in
synchronous code.
"""

import asyncio
import logging
import shutil
import socket
import ssl
import subprocess
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from django.db import DatabaseError, bridge, connection

from .relay import Relay
from .test_waiting import WaitingTestCase, no_blocking_waits, psycopg, uvloop

try:
    from django.db.backends.postgresql.waiting import WaitingConnection
except ImportError:
    WaitingConnection = None


class OptionsTestCase(WaitingTestCase):
    def use(self, func, **options):
        """Call a function with a native connection that has OPTIONS."""
        native = connection.copy()
        settings = native.settings_dict
        settings["ASYNC_NATIVE"] = True
        settings["OPTIONS"].pop("pool", None)
        for name in ("NAME", "USER", "HOST", "PORT"):
            if (value := options.pop(name, None)) is not None:
                settings[name] = value
        settings["OPTIONS"].update(options)
        try:
            native.connect()
            self.assertIsInstance(native.connection, WaitingConnection)
            return func(native)
        finally:
            native.close()

    def check(self, func, blocks=False, **options):
        """Return the result, which has to be the same in the bridge."""
        expected = self.use(func, **options)

        async def main():
            if blocks:
                return await bridge.run(self.use, func, **options)
            with no_blocking_waits():
                return await bridge.run(self.use, func, **options)

        self.assertEqual(self.run_on_loop(main()), expected)
        if uvloop is not None:
            found = self.run_on_loop(main(), loop_factory=uvloop.new_event_loop)
            self.assertEqual(found, expected)
        return expected

    def relay(self, **kwargs):
        params = connection.get_connection_params()
        relay = Relay(params.get("host"), params.get("port"), **kwargs)
        return self.enterContext(relay)


def fetch(native, sql, params=None):
    with native.cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchall()


class OptionsTests(OptionsTestCase):
    def test_isolation_levels(self):

        def use(native):
            native.set_autocommit(False)
            try:
                return fetch(native, "SHOW transaction_isolation")
            finally:
                native.rollback()

        for level in psycopg.IsolationLevel:
            with self.subTest(level=level.name):
                self.assertEqual(
                    self.check(use, isolation_level=level),
                    [(level.name.lower().replace("_", " "),)],
                )

    def test_server_side_binding(self):
        def types(native):
            return fetch(native, "SELECT pg_typeof(%s)", [1])

        for value, expected in ((False, "integer"), (True, "smallint")):
            with self.subTest(server_side_binding=value):
                found = self.check(types, server_side_binding=value)
                self.assertEqual(found, [(expected,)])

    def test_prepare_threshold(self):
        def count(native):
            for number in range(5):
                fetch(native, "SELECT %s::int + 1", [number])
            sql = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE %s"
            return fetch(native, sql, ["SELECT $1::int + 1"])

        for value, expected in ((None, 0), (2, 1), (50, 0)):
            with self.subTest(prepare_threshold=value):
                found = self.check(
                    count, server_side_binding=True, prepare_threshold=value
                )
                self.assertEqual(found, [(expected,)])

    def test_assume_role(self):
        def role(native):
            native.ensure_connection()
            return fetch(native, "SELECT current_user")

        self.assertEqual(
            self.check(role, assume_role="pg_read_all_data"), [("pg_read_all_data",)]
        )

    def test_assume_role_that_does_not_exist(self):
        def use(native):
            self.fail("It was used.")

        for run in (
            lambda: self.use(use, assume_role="nobody"),
            lambda: self.run_in_bridge(lambda: self.use(use, assume_role="nobody")),
        ):
            with self.assertRaises(psycopg.errors.InvalidParameterValue):
                run()

    def test_server_side_cursors(self):
        def use(native):
            with native.chunked_cursor() as cursor:
                cursor.execute("SELECT generate_series(1, %s)", [100])
                found = [cursor.fetchmany(30), cursor.fetchone(), cursor.fetchall()]
                name = cursor.cursor.name
            return found, name is not None, fetch(native, "TABLE pg_cursors")

        for value in (False, True):
            with self.subTest(server_side_binding=value):
                found, named, left = self.check(use, server_side_binding=value)
                self.assertEqual([len(rows) for rows in found], [30, 1, 69])
                self.assertIs(named, True)
                self.assertEqual(left, [])

    def test_executemany(self):
        def use(native):
            with native.cursor() as cursor:
                cursor.execute("CREATE TEMPORARY TABLE numbers (number int)")
                cursor.executemany(
                    "INSERT INTO numbers VALUES (%s)",
                    [(number,) for number in range(1000)],
                )
                count = cursor.rowcount
            return count, fetch(native, "SELECT count(*) FROM numbers")

        self.assertEqual(self.check(use), (1000, [(1000,)]))

    def test_copy(self):
        def use(native):
            with native.cursor() as cursor:
                cursor.execute("CREATE TEMPORARY TABLE numbers (number int)")
                with cursor.copy("COPY numbers FROM STDIN") as copy:
                    for number in range(1000):
                        copy.write_row([number])
                with cursor.copy("COPY numbers TO STDOUT") as copy:
                    rows = len(list(copy.rows()))
                with self.assertRaises(DatabaseError), native.wrap_database_errors:
                    with cursor.copy("COPY nothing TO STDOUT"):
                        self.fail("There's no such table.")
            return rows, fetch(native, "SELECT max(number) FROM numbers")

        self.assertEqual(self.check(use), (1000, [(999,)]))

    def test_notices(self):
        def use(native):
            notices = []
            native.connection.add_notice_handler(
                lambda diag: notices.append(diag.message_primary)
            )
            with native.cursor() as cursor:
                cursor.execute("DO $$ BEGIN RAISE NOTICE 'attention'; END $$")
            return notices

        self.assertEqual(self.check(use), ["attention"])

    def test_pipeline(self):
        def use(native):
            with native.connection.pipeline():
                cursors = [native.cursor() for _ in range(10)]
                for number, cursor in enumerate(cursors):
                    cursor.execute("SELECT %s::int", [number])
                return [cursor.fetchone() for cursor in cursors]

        self.assertEqual(
            self.check(use, server_side_binding=True),
            [(number,) for number in range(10)],
        )


class HostsTests(OptionsTestCase):
    def test_several_hosts(self):
        """The next one is tried if there's no server."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            closed = server.getsockname()[1]
        port = self.relay()

        def use(native):
            return int(native.connection.info.port)

        for host in ("127.0.0.1,127.0.0.1", "127.0.0.1,localhost"):
            with self.subTest(host=host):
                found = self.check(
                    use, HOST=host, PORT=f"{closed},{port}", sslmode="disable"
                )
                self.assertEqual(found, port)

    def test_service_file(self):
        params = connection.get_connection_params()
        names = {"dbname", "host", "port", "user", "password"} & {*params}
        directory = self.enterContext(tempfile.TemporaryDirectory())
        path = Path(directory) / "pg_service.conf"
        lines = ["[tests]", *[f"{name}={params[name]}" for name in names]]
        path.write_text("\n".join([*lines, "application_name=served", ""]))
        self.enterContext(mock.patch.dict("os.environ", PGSERVICEFILE=str(path)))
        settings = dict.fromkeys(["NAME", "USER", "HOST", "PORT"], "")
        found = self.check(
            lambda native: fetch(native, "SHOW application_name"),
            service="tests",
            **settings,
        )
        self.assertEqual(found, [("served",)])


@unittest.skipUnless(shutil.which("openssl"), "It takes openssl to make a certificate.")
class TLSTests(OptionsTestCase):
    """
    Spoken as by poolers in front of PostgreSQL, as the server may have been
    built without it. For libpq there's no difference.
    """

    def setUp(self):
        super().setUp()
        # StreamWriter.start_tls() forgets to tell its protocol.
        logger = logging.getLogger("asyncio")
        self.enterContext(mock.patch.object(logger, "disabled", True))
        directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.certificate, key = directory / "server.crt", directory / "server.key"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
            + ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
            + ["-out", self.certificate, "-keyout", key],
            check=True,
            capture_output=True,
        )
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.certificate, key)
        self.options = {
            "HOST": "localhost",
            "PORT": str(self.relay(ssl_context=context)),
            "gssencmode": "disable",
            "sslmode": "verify-full",
            "sslrootcert": str(self.certificate),
        }

    def test_queries(self):
        value = "x" * 5_000_000

        def use(native):
            rows = fetch(native, "SELECT generate_series(1, 100000)")
            large = fetch(native, "SELECT %s::text", [value])
            return native.connection.pgconn.ssl_in_use, len(rows), large == [(value,)]

        self.assertEqual(self.check(use, **self.options), (True, 100_000, True))

    def test_refused(self):
        """The name isn't that in the certificate."""

        def connect():
            with self.assertRaises(psycopg.OperationalError) as cm:
                self.use(None, **{**self.options, "HOST": "127.0.0.1"})
            return str(cm.exception)

        self.assertIn("certificate", self.run_in_bridge(connect))
        self.assertEqual(self.run_in_bridge(connect), connect())

    def test_cancelled(self):
        if not psycopg.capabilities.has_cancel_safe():
            # It isn't encrypted then, and in C, nothing else runs meanwhile.
            self.skipTest("libpq 17 is required.")

        def use(native):
            with self.assertRaises(asyncio.CancelledError):
                fetch(native, "SELECT pg_sleep(30)")
            return fetch(native, "SELECT 1")

        async def main():
            task = asyncio.create_task(bridge.run(self.use, use, **self.options))
            await asyncio.sleep(1)
            task.cancel()
            return await asyncio.wait_for(task, 10)

        self.assertEqual(self.run_on_loop(main()), [(1,)])
