"""
Promises 9 and 15, under real servers: what a request has opened is released at
its end, on every path out of it, for every alias.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from importlib.util import find_spec

from django.db import connection

from .base import AsyncTransactionTestCase, is_in_memory, is_native, wait_until
from .models import Entry
from .servers import Server


class ServerTestCase(AsyncTransactionTestCase):
    """Start a server for the class, and look at it from the outside."""

    databases = {"default", "other"}
    program = None
    # Of the server. ATOMIC_REQUESTS and such are for the default database.
    settings = {}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.is_installed = find_spec(cls.program) is not None
        if is_in_memory() or not cls.is_installed:
            return
        cls.start()
        cls.addClassCleanup(lambda: cls.server.stop())
        # The middleware and the database of a request.
        cls.cases = [("plain", alias) for alias in cls.server.databases]
        cls.cases += [(prefix, "default") for prefix in ("sync", "async", "both")]

    @classmethod
    def start(cls):
        cls.server = Server(cls.program, **cls.settings)

    def setUp(self):
        super().setUp()
        if is_in_memory():
            self.skipTest("A database in memory isn't shared with a server.")
        if not self.is_installed:
            self.skipTest(f"{self.program} is not installed.")
        # This is called first.
        self.addCleanup(self.assertReleased)

    def case(self, case):
        """Begin a subtest, with empty tables."""
        Entry.objects.all().delete()
        Entry.objects.using("other").all().delete()
        return self.subTest(middleware=case[0], alias=case[1])

    def counts(self):
        return json.loads(self.get("/plain/counts/"))

    def get(self, path, status=200):
        with closing(self.server.connect()) as client:
            return self.read(client, path, status)

    def get_status(self, path):
        with closing(self.server.connect()) as client:
            client.request("GET", path)
            return client.getresponse().status

    def read(self, client, path, status=200):
        """Return the content of a response. Fail if it's incomplete."""
        client.request("GET", path)
        response = client.getresponse()
        content = response.read().decode()
        self.assertEqual(response.status, status, self.server.log())
        return content

    @contextmanager
    def begin(self, path):
        """Disconnect at the end, in the middle of the response."""
        with closing(self.server.connect()) as client:
            client.request("GET", path)
            with client.getresponse() as response:
                yield response

    def names(self, alias="default"):
        alias = "other" if alias == "other" else "default"
        queryset = Entry.objects.using(alias).order_by("name")
        return list(queryset.values_list("name", flat=True))

    def assertReleased(self):
        """Nothing is open in any database, or will be soon."""
        if wait_until(lambda: not self.server.sessions()):
            if wait_until(lambda: not self.counts()["lent"]):
                return
        left = f"{self.server.sessions()}, {self.counts()}, {self.server.log()}"
        # They would stop the next test.
        self.server.stop()
        self.server.end_sessions()
        self.start()
        self.fail(f"The server still has {left}")

    def disconnect(self, prefix, view, alias):
        """Close the connection as soon as the view has started to wait."""
        with closing(self.server.connect()) as client:
            client.request("GET", f"/{prefix}/{view}/?using={alias}")
            marker = "default" if alias == "other" else "other"
            started = Entry.objects.using(marker).filter(name="started")
            # The server may only be starting.
            is_waiting = wait_until(started.exists, timeout=30)
            self.assertIs(is_waiting, True, self.server.log())
        self.assertReleased()

    def check_many_requests(self, query, count, expected={200}):
        paths = [f"/plain/creates/?{query}&name={number}" for number in range(count)]
        with ThreadPoolExecutor(count) as threads:
            statuses = list(threads.map(self.get_status, paths))
        self.assertLessEqual(set(statuses), expected, self.server.log())
        self.assertReleased()
        self.assertEqual(len(self.names()), statuses.count(200))
        return statuses

    def assertOpens(self, count, alias, path):
        before = self.counts()["opened"].get(alias, 0)
        content = self.get(path)
        opened = self.counts()["opened"].get(alias, 0) - before
        if alias != "pooled":
            # A pool gives the same ones several times.
            self.assertEqual(opened, count)
        return content


class ReleaseTests(ServerTestCase):
    program = "uvicorn"

    def test_blocks(self):
        """Blocks that follow each other use one connection."""
        for alias in self.server.databases:
            with self.case(("plain", alias)):
                content = self.assertOpens(1, alias, f"/plain/blocks/?using={alias}")
                self.check_sessions(content, 1, alias)

    def test_blocks_and_autocommit(self):
        """
        They use two, together with what's outside of them, but for native
        mode, where they take the idle session.
        """
        for prefix, alias in self.cases:
            # Synchronous middleware looks at this one.
            is_used = prefix in ("sync", "both") and alias == "default"
            count = 1 if is_native() and not is_used else 2
            with self.case((prefix, alias)):
                path = f"/{prefix}/blocks/?mixed&using={alias}"
                content = self.assertOpens(count, alias, path)
                self.check_sessions(content, count, alias)

    def check_sessions(self, content, count, alias):
        self.assertEqual(self.names(alias), ["0", "1", "2", "3", "4"])
        if connection.vendor == "postgresql":
            self.assertLessEqual(json.loads(content)["sessions"], count)
        self.assertReleased()

    def test_aliases(self):
        self.get("/plain/aliases/")
        self.assertEqual(self.names(), ["outer", "persistent"])
        self.assertEqual(self.names("other"), ["inner"])

    def test_gather(self):
        for prefix, alias in self.cases:
            with self.case((prefix, alias)):
                self.get(f"/{prefix}/gathers/?using={alias}")
                self.assertEqual(len(self.names(alias)), 6)
                self.assertReleased()

    def test_exception(self):
        for prefix, alias in self.cases:
            with self.case((prefix, alias)):
                self.get(f"/{prefix}/fails/?using={alias}", status=500)
                self.assertEqual(self.names(alias), ["autocommit"])
                self.assertReleased()

    def test_exception_turned_into_a_response(self):
        for alias in self.server.databases:
            with self.case(("handles", alias)):
                self.get(f"/handles/fails/?using={alias}")
                self.assertEqual(self.names(alias), ["autocommit"])
                self.assertReleased()

    def test_streaming(self):
        for prefix, alias in self.cases:
            with self.case((prefix, alias)):
                content = self.get(f"/{prefix}/streams/?using={alias}")
                self.assertEqual(content, "0122")
                self.assertReleased()

    def test_exception_while_streaming(self):
        for prefix, alias in self.cases:
            with self.case((prefix, alias)):
                path = f"/{prefix}/fails_streaming/?using={alias}"
                with self.begin(path) as response:
                    self.assertEqual(response.read(5), b"first")
                    self.assertReleased()
                    self.assertEqual(self.names(alias), [])

    def test_disconnect(self):
        for prefix, alias in self.cases:
            with self.case((prefix, alias)):
                self.disconnect(prefix, "waits", alias)
                self.assertIn("waits", self.names(alias))

    def test_disconnect_in_a_block(self):
        for prefix, alias in self.cases:
            with self.case((prefix, alias)):
                self.disconnect(prefix, "waits_in_block", alias)
                self.assertNotIn("waits", self.names(alias))

    def test_disconnect_during_a_query(self):
        """It's cancelled: otherwise it would take a minute."""
        for prefix, alias in self.cases:
            with self.case((prefix, alias)):
                self.disconnect(prefix, "queries_in_block", alias)
                self.assertNotIn("waits", self.names(alias))

    def test_disconnect_while_streaming(self):
        for prefix, alias in self.cases:
            with self.case((prefix, alias)):
                self.disconnect_while_streaming(prefix, "streams_forever", alias)

    def test_disconnect_while_sending(self):
        """The content waits at a yield, where nobody can cancel it."""
        for prefix, alias in self.cases:
            with self.case((prefix, alias)):
                view = "streams_more_than_is_read"
                self.disconnect_while_streaming(prefix, view, alias)

    def disconnect_while_streaming(self, prefix, view, alias):
        with self.begin(f"/{prefix}/{view}/?using={alias}") as response:
            self.assertEqual(response.read(5), b"chunk")
        self.assertReleased()
        self.assertEqual(self.names(alias), [])

    def test_sync_view(self):
        for prefix, alias in self.cases[:-2]:
            with self.case((prefix, alias)):
                self.assertOpens(1, alias, f"/{prefix}/sync/?using={alias}")
                self.assertEqual(len(self.names(alias)), 5)
                self.assertReleased()

    def test_sync_view_that_calls_async_code(self):
        for prefix, alias in self.cases:
            with self.case((prefix, alias)):
                path = f"/{prefix}/sync_calls_async/?mixed&using={alias}"
                self.assertOpens(2, alias, path)
                self.assertEqual(len(self.names(alias)), 5)
                self.assertReleased()

    def test_keep_alive(self):
        """Several requests on one connection to the server."""
        with closing(self.server.connect()) as client:
            client.connect()
            sock = client.sock
            for number in range(3):
                self.read(client, f"/plain/creates/?mixed&name={number}")
                self.assertIs(client.sock, sock)
                self.assertReleased()

    def test_task_outlives_the_request(self):
        """What it opens is closed when it has finished."""
        for alias in self.server.databases:
            with self.case(("plain", alias)):
                self.get(f"/plain/starts_task/?using={alias}")
                self.assertReleased()
                self.get("/plain/awaits_task/")
                self.assertEqual(self.names(alias), ["0", "1", "2", "autocommit"])
                self.assertReleased()

    def test_many_requests(self):
        self.check_many_requests("mixed&using=default", 20)

    def test_many_requests_with_a_small_pool(self):
        if "pooled" in self.server.databases:
            self.check_many_requests("using=pooled", 50)
        if is_native():
            # Between their operations, they hold none.
            Entry.objects.all().delete()
            self.check_many_requests("mixed&using=pooled", 50)


class HypercornReleaseTests(ReleaseTests):
    program = "hypercorn"


class DaphneReleaseTests(ReleaseTests):
    program = "daphne"


class SmallPoolTests(ServerTestCase):
    program = "uvicorn"
    # The test waits until it's over.
    settings = {"pool_timeout": 5}

    def test_many_requests_that_take_two_connections(self):
        """
        If all that hold one wait for another, they fail in the pool's time.
        What others wrote is there. In native mode, they hold one at a time.
        """
        if is_native() or "pooled" not in self.server.databases:
            self.skipTest("Only a pool of thread mode is used up by that.")
        statuses = self.check_many_requests("mixed&using=pooled", 50, {200, 500})
        self.assertIn(500, statuses)
        self.assertIn("Increase the pool's max_size", self.server.log())


class HypercornSmallPoolTests(SmallPoolTests):
    program = "hypercorn"


class DaphneSmallPoolTests(SmallPoolTests):
    program = "daphne"


class AtomicRequestsTests(ServerTestCase):
    program = "uvicorn"
    settings = {"ATOMIC_REQUESTS": True}

    def test_commit(self):
        self.get("/plain/creates/?mixed&name=view")
        self.assertEqual(self.names(), ["view"])

    def test_exception(self):
        self.get("/plain/fails/", status=500)
        self.assertEqual(self.names(), [])

    def test_exception_turned_into_a_response(self):
        self.assertEqual(self.get("/handles/fails/"), "0")
        self.assertEqual(self.names(), [])

    def test_non_atomic_requests(self):
        self.get("/plain/non_atomic/", status=500)
        self.assertEqual(self.names(), ["non-atomic"])

    def test_streaming(self):
        """The content is produced after the transaction."""
        self.assertEqual(self.get("/plain/says_whether_atomic/"), "True False")
        self.assertEqual(self.names(), ["content", "view"])

    def test_disconnect(self):
        for prefix in "plain", "sync", "async", "both":
            with self.case((prefix, "default")):
                self.disconnect(prefix, "waits", "default")
                self.assertEqual(self.names(), [])

    def test_sync_view(self):
        self.assertOpens(1, "default", "/plain/sync/")
        self.assertEqual(len(self.names()), 5)

    def test_async_view(self):
        """Everything is inside."""
        self.assertOpens(1, "default", "/plain/blocks/?mixed")
        self.assertEqual(len(self.names()), 5)


class HypercornAtomicRequestsTests(AtomicRequestsTests):
    program = "hypercorn"


class DaphneAtomicRequestsTests(AtomicRequestsTests):
    program = "daphne"
