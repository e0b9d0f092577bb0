"""
The proxy does to a connection what it's told to, and only then.
"""

import time
import unittest

import postgres
import psycopg
from rounds import proxy


class ProxyTests(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.url = cls.enterClassContext(postgres.server())
        settings = postgres.database_settings(cls.url)
        cls.proxy = cls.enterClassContext(
            proxy.Proxy(settings["HOST"], settings["PORT"])
        )
        # It's that of the session.
        cls.observer = cls.enterClassContext(psycopg.connect(cls.url, autocommit=True))
        cls.observer.execute("DROP TABLE IF EXISTS proxied")
        cls.observer.execute("CREATE TABLE proxied (name text)")
        cls.addClassCleanup(cls.observer.execute, "DROP TABLE proxied")

    def setUp(self):
        self.observer.execute("TRUNCATE proxied")
        self.addCleanup(setattr, self.proxy, "decide", lambda message: None)

    def connect(self):
        conn = psycopg.connect(
            self.url,
            host="127.0.0.1",
            port=self.proxy.port,
            sslmode="disable",
            connect_timeout=10,
        )
        self.addCleanup(conn.close)
        return conn

    def rows_after(self, pid):
        """Return how many rows there are once a backend has ended."""
        deadline = time.monotonic() + 10
        while self.observer.execute(
            "SELECT 1 FROM pg_stat_activity WHERE pid = %s", [pid]
        ).fetchone():
            self.assertLess(time.monotonic(), deadline, "The backend doesn't end.")
            time.sleep(0.01)
        return self.observer.execute("SELECT count(*) FROM proxied").fetchone()[0]

    def fail_in_commit(self, action, matches):
        """Return how many rows were committed, and the seconds it took."""
        conn = self.connect()
        pid = conn.info.backend_pid
        conn.execute("INSERT INTO proxied VALUES ('row')")
        happened = self.proxy.once(action, matches)
        start = time.monotonic()
        with self.assertRaises(psycopg.OperationalError):
            conn.commit()
        seconds = time.monotonic() - start
        self.assertIs(happened.is_set(), True)
        return self.rows_after(pid), seconds

    def test_forward(self):
        with self.connect() as conn:
            pid = conn.info.backend_pid
            conn.execute("INSERT INTO proxied VALUES (%s)", ["x" * 1_000_000])
            [name] = conn.execute("SELECT name FROM proxied").fetchone()
        self.assertEqual(len(name), 1_000_000)
        self.assertEqual(self.rows_after(pid), 1)

    def test_cut_at_commit(self):
        for action, rows in (
            (proxy.CUT_BEFORE, 0),
            (proxy.CUT_INSIDE, 0),
            (proxy.CUT_AFTER, 1),
        ):
            with self.subTest(action):
                self.observer.execute("TRUNCATE proxied")
                committed, _ = self.fail_in_commit(action, is_commit)
                self.assertEqual(committed, rows)

    def test_cut_at_the_result(self):
        for action in proxy.CUTS:
            with self.subTest(action):
                self.observer.execute("TRUNCATE proxied")
                committed, _ = self.fail_in_commit(action, is_result)
                self.assertEqual(committed, 1)

    def test_silence(self):
        committed, seconds = self.fail_in_commit(proxy.Silence(0.3), is_commit)
        self.assertEqual(committed, 0)
        self.assertGreaterEqual(seconds, 0.3)

    def test_delay(self):
        conn = self.connect()
        conn.execute("INSERT INTO proxied VALUES ('row')")
        happened = self.proxy.once(proxy.Delay(0.3), is_commit)
        start = time.monotonic()
        conn.commit()
        self.assertGreaterEqual(time.monotonic() - start, 0.3)
        self.assertIs(happened.is_set(), True)

    def test_once(self):
        """Other connections, and what comes later, aren't touched."""
        conn, other = self.connect(), self.connect()
        self.proxy.once(proxy.CUT_BEFORE, lambda message: message.has_query(b"BEGIN"))
        with self.assertRaises(psycopg.OperationalError):
            conn.execute("SELECT 1")
        self.assertEqual(other.execute("SELECT 1").fetchone(), (1,))

    def test_prepared_statement(self):
        conn = self.connect()
        sql = "SELECT %s::int"
        happened = self.proxy.once(
            proxy.CUT_BEFORE, lambda message: message.has_query(b"SELECT $1::int")
        )
        with self.assertRaises(psycopg.OperationalError):
            conn.execute(sql, [1])
        self.assertIs(happened.is_set(), True)

    def test_cut_all(self):
        conn = self.connect()
        self.proxy.cut_all()
        with self.assertRaises(psycopg.OperationalError):
            conn.execute("SELECT 1")

    def test_connecting(self):
        self.proxy.once(proxy.CUT_BEFORE, lambda message: not message.type)
        with self.assertRaises(psycopg.OperationalError):
            self.connect()
        self.connect().execute("SELECT 1")

    def test_server_that_is_down(self):
        with proxy.Proxy("/nowhere") as nowhere:
            with self.assertRaises(psycopg.OperationalError):
                psycopg.connect("user=postgres", host="127.0.0.1", port=nowhere.port)


def is_commit(message):
    return message.has_query(b"COMMIT")


def is_result(message):
    return message.sender == "server" and message.body == b"COMMIT\0"


if __name__ == "__main__":
    unittest.main()
