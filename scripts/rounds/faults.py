"""
What servers and networks do to transfers that are on their way.

Each fault happens while tasks move money, through a proxy. Whatever they get
is one of Django's exceptions, the accounts are as they have to be, and
afterwards everything works at once, without anything being restarted.

The round has a server of its own, since it stops that.
"""

import asyncio
import atexit
import contextlib
import functools
import os
import pathlib
import signal
import subprocess
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from rounds import proxy
from rounds.base import Observer, Violation
from rounds.money import Money, port_of, request, stacks

from django.db import Error, connections, run_sync, transaction

# How many tasks move money.
TASKS = 16

POOL = {"min_size": 2, "max_size": 6, "timeout": 3}

# Seconds that a fault takes at least, and a half-open connection is silent.
FAULT = 0.7
SILENCE = 0.5

# Seconds in which what goes on must come to an end.
TIMEOUT = 30

# What begins the end of transactions.
ENDS = [b"COMMIT", b"ROLLBACK"]


class Faults(Money):
    name = "faults"
    databases = {"postgres"}

    def settings(self, database):
        """Start the server, and the proxy before it."""
        import postgres

        stack = contextlib.ExitStack()
        atexit.register(stack.close)
        url, self.running = stack.enter_context(postgres.cluster())
        self.servers = stack.enter_context(contextlib.ExitStack())
        # The server stops when the thread ends that has started it.
        self.keeper = stack.enter_context(ThreadPoolExecutor(1))
        self.server = self.keeper.submit(self.start_server).result()
        own = postgres.database_settings(url)
        # A crash must not lose what was committed.
        own["OPTIONS"]["options"] = "-c synchronous_commit=on"
        self.direct = own
        self.proxy = stack.enter_context(proxy.Proxy(own["HOST"], own["PORT"]))
        default = {
            **self.proxy.settings(own),
            "ASYNC_NATIVE": database.get("ASYNC_NATIVE", False),
            # Connections are kept while they can be lost.
            "CONN_HEALTH_CHECKS": True,
        }
        pooled = {**default, "OPTIONS": {**default["OPTIONS"], "pool": POOL}}
        settings = super().settings(default)
        settings["DATABASES"] = {"default": default, "pooled": pooled}
        # Pools report connections that are lost, and Django failed requests.
        settings["LOGGING"] = {
            "version": 1,
            "loggers": {
                name: {"level": "CRITICAL"}
                for name in ("psycopg.pool", "django.request", "django.db.backends")
            },
        }
        return settings

    def start_server(self):
        return self.servers.enter_context(self.running())

    def observer(self):
        return Observer(self.direct)

    def run(self):
        self.counts = Counter()
        deadline = time.monotonic() + self.seconds
        self.run_async(self.serve(lambda server: self.faults(server, deadline)))
        return dict(sorted((self.counts + self.bank.counts).items()))

    async def faults(self, server, deadline):
        faults = [
            name for name in dir(type(self)) if name.startswith(("under_", "alone_"))
        ]
        while True:
            self.random.shuffle(faults)
            for name in faults:
                try:
                    await self.fault(name, server)
                except Violation as violation:
                    violation.message = f"{name}: {violation.message}"
                    raise
                if time.monotonic() > deadline:
                    return

    async def fault(self, name, server):
        if name.startswith("alone_"):
            await getattr(self, name)()
        else:
            await self.during(getattr(self, name), server)
        self.proxy.decide = lambda message: None
        await self.probe(server)
        await asyncio.to_thread(self.settle_and_audit)
        self.counts[name.partition("_")[2].replace("_", " ")] += 1

    async def during(self, fault, server):
        ended = asyncio.Event()

        async def traffic():
            while not ended.is_set():
                await self.one(port_of(server), self.plan(), self.interruption())
                # Failing may take no time.
                await asyncio.sleep(0.005)

        self.slots = contextlib.nullcontext()
        tasks = [asyncio.create_task(traffic()) for _ in range(TASKS)]
        try:
            await fault()
        finally:
            ended.set()
            _, pending = await asyncio.wait(tasks, timeout=TIMEOUT)
        if pending:
            raise Violation(f"{len(pending)} transfers hang.", stacks())
        for task in tasks:
            task.result()

    async def probe(self, server):
        """Raise Violation if anything doesn't work at once."""
        for alias in ("default", "pooled"):
            for way in dict.fromkeys(self.ways()):
                plan = self.plan()._replace(alias=alias, way=way, fails=False)
                # What the account may not have is no fault.
                plan = plan._replace(amount=0, isolation=None)
                try:
                    async with asyncio.timeout(TIMEOUT):
                        key = await self.bank.transfer(plan)
                except TimeoutError:
                    raise Violation(f"It hangs afterwards: {plan}", stacks()) from None
                if key is None:
                    error = self.bank.attempts[-1].error
                    raise Violation(
                        f"It doesn't work afterwards: {error!r}",
                        "".join([f"{plan}\n", *traceback.format_exception(error)]),
                    )
        plan = self.plan()._replace(fails=False, amount=0, isolation=None)
        self.plans[str(plan.key)] = plan
        answer = await request(port_of(server), f"transfer/{plan.key}")
        if not answer.startswith("committed "):
            raise Violation(f"The next request doesn't work: {answer}", str(plan))
        await self.wait_for_requests(server)

    def settle_and_audit(self):
        with self.observer() as observer:
            deadline = time.monotonic() + TIMEOUT
            # The server may not have noticed yet what was cut.
            while busy := observer.rows(
                "SELECT pid, state, query FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND state <> 'idle' "
                "AND backend_type = 'client backend'"
            ):
                if time.monotonic() > deadline:
                    raise Violation("A session is left in a transaction.", str(busy))
                time.sleep(0.02)
            self.bank.audit(observer)

    # ##### Faults #####

    async def under_terminated_sessions(self):
        def terminate():
            with self.observer() as observer:
                for _ in range(10):
                    observer.rows(
                        "SELECT pg_terminate_backend(pid) FROM ("
                        "  SELECT pid FROM pg_stat_activity "
                        "  WHERE backend_type = 'client backend' "
                        "  AND pid <> pg_backend_pid() ORDER BY random() LIMIT 2"
                        ") AS sessions"
                    )
                    time.sleep(FAULT / 10)

        await asyncio.to_thread(terminate)

    async def under_restart(self):
        await self.restart(signal.SIGINT)

    async def under_crash(self):
        await self.restart(signal.SIGQUIT)

    async def restart(self, signum):
        from own_server import stop

        await asyncio.sleep(FAULT / 2)
        await asyncio.to_thread(stop, self.server, [signum])
        await asyncio.sleep(FAULT / 2)
        self.server = await asyncio.wrap_future(self.keeper.submit(self.start_server))
        await asyncio.sleep(FAULT / 2)

    async def under_cut_connections(self):
        await self.break_messages(0.01, proxy.CUTS)

    async def under_cut_ends(self):
        """Cut connections at COMMIT and ROLLBACK, and at their results."""
        await self.break_messages(0.2, proxy.CUTS, is_end)

    async def under_half_open_connections(self):
        await self.break_messages(0.004, [proxy.Silence(SILENCE)])

    async def under_half_open_ends(self):
        await self.break_messages(0.1, [proxy.Silence(SILENCE)], is_end)

    async def under_slow_network(self):
        await self.break_messages(0.2, [proxy.Delay(0.002), proxy.Delay(0.05)])

    async def under_lost_network(self):
        await asyncio.sleep(FAULT / 2)
        self.proxy.decide = lambda message: proxy.CUT_BEFORE
        self.proxy.cut_all()
        await asyncio.sleep(FAULT / 2)
        self.proxy.decide = lambda message: None
        await asyncio.sleep(FAULT / 2)

    async def break_messages(self, probability, actions, matches=lambda message: True):
        chance = self.random.__class__(self.random.random())

        def decide(message):
            if matches(message) and chance.random() < probability:
                self.counts["broken messages"] += 1
                return chance.choice(actions)

        self.proxy.decide = decide
        await asyncio.sleep(2 * FAULT)
        self.proxy.decide = lambda message: None

    async def alone_exhausted_pool(self):
        """Whoever waits for a connection in vain is told why."""
        release = asyncio.Event()
        held = [asyncio.Event() for _ in range(POOL["max_size"])]

        async def hold(event):
            async with transaction.aatomic(using="pooled"):
                event.set()
                await release.wait()

        async with asyncio.TaskGroup() as tasks:
            for event in held:
                tasks.create_task(hold(event))
            try:
                async with asyncio.timeout(TIMEOUT):
                    for event in held:
                        await event.wait()
                    with self.expecting("max_size"):
                        async with transaction.aatomic(using="pooled"):
                            pass
            finally:
                release.set()

    async def alone_statement_timeout(self):
        for block in self.blocks():
            with self.expecting("statement timeout"):
                await block(
                    "SET LOCAL statement_timeout = '50ms'", "SELECT pg_sleep(20)"
                )

    async def alone_idle_timeout(self):
        for alias in ("default", "pooled"):
            with self.expecting("idle-in-transaction timeout"):
                async with transaction.aatomic(using=alias):
                    await self.execute(
                        alias, "SET LOCAL idle_in_transaction_session_timeout = '50ms'"
                    )
                    await asyncio.sleep(0.3)
                    await self.execute(alias, "SELECT 1")

    async def alone_lock_timeout(self):
        with self.observer() as observer:
            observer.rows("BEGIN")
            observer.rows("SELECT 1 FROM rounds_account WHERE id = 1 FOR UPDATE")
            for block in self.blocks():
                with self.expecting("lock timeout"):
                    await block(
                        "SET LOCAL lock_timeout = '50ms'",
                        "UPDATE rounds_account SET balance = 0 WHERE id = 1",
                    )
            observer.rows("ROLLBACK")

    async def alone_full_disk(self):
        """Fill a file system of its own, which only root can have."""
        if os.geteuid():
            self.counts["(full disk: not run, as it needs root)"] = 1
            return
        with contextlib.ExitStack() as stack:
            directory = pathlib.Path(self.direct["HOST"]) / "full"
            directory.mkdir()
            stack.callback(directory.rmdir)
            owner = pathlib.Path(self.direct["HOST"]).stat()
            options = f"size=512k,mode=700,uid={owner.st_uid},gid={owner.st_gid}"
            mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory]
            if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
                self.counts["(full disk: not run, as nothing can be mounted)"] = 1
                return
            stack.callback(subprocess.run, ["umount", directory], check=True)
            observer = stack.enter_context(self.observer())
            observer.rows(f"CREATE TABLESPACE small LOCATION '{directory}'")
            stack.callback(observer.rows, "DROP TABLESPACE small")
            observer.rows("CREATE TABLE filler (text text) TABLESPACE small")
            stack.callback(observer.rows, "DROP TABLE filler")
            for block in self.blocks():
                with self.expecting("No space left on device"):
                    await block(
                        "SET LOCAL synchronous_commit = on",
                        "INSERT INTO filler SELECT repeat(md5(n::text), 50) "
                        "FROM generate_series(1, 5000) AS n",
                    )

    def blocks(self):
        """Return functions that execute SQL in blocks of each kind."""

        async def in_aatomic(alias, *statements):
            async with transaction.aatomic(using=alias):
                for sql in statements:
                    await self.execute(alias, sql)

        def in_atomic(alias, *statements):
            with transaction.atomic(using=alias):
                for sql in statements:
                    with connections[alias].cursor() as cursor:
                        cursor.execute(sql)
            connections[alias].close()

        for alias in ("default", "pooled"):
            yield functools.partial(in_aatomic, alias)
            if alias in connections.native_aliases:
                yield functools.partial(run_sync, in_atomic, alias)

    async def execute(self, alias, sql):
        async with connections[alias].acursor() as cursor:
            await cursor.execute(sql)

    @contextlib.contextmanager
    def expecting(self, text):
        """Raise Violation unless the block fails with an error of Django's."""
        try:
            yield
        except Error as error:
            if text in str(error):
                return
            raise Violation(f"The error doesn't say {text!r}: {error!r}") from error
        raise Violation(f"No error says {text!r}.")


def is_end(message):
    """Return whether a message ends a transaction, or says that it's ended."""
    if message.sender == "server":
        return message.type == b"C" and message.body.startswith(tuple(ENDS))
    return any(map(message.has_query, ENDS))
