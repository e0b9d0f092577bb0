"""
Hundreds of tasks move money between accounts, and are interrupted anywhere.

Whatever happens, the total stays the same, and a transfer is there if its
caller was told that it's committed, and isn't if its block failed before the
COMMIT. That is checked after each wave of transfers, through another
connection.
"""

import asyncio
import contextlib
import io
import time
import traceback
import uuid
from collections import Counter
from typing import NamedTuple

from asgiref.sync import sync_to_async
from rounds.base import Round, Violation

from django.db import Error, OperationalError, connections, run_sync, transaction
from django.db.models import F
from django.http import HttpResponse
from django.urls import path

ACCOUNTS = 30
BALANCE = 1000
MAX_AMOUNT = 300

# Of transfers that failed because of others.
MAX_ATTEMPTS = 5

# Transfers in a wave, and how many without a pool are on their way at once.
WAVE = {"postgres": 200, "mariadb": 80, "sqlite": 30}
CONCURRENT = {"postgres": 24, "mariadb": 16, "sqlite": 4}

# Transfers before the round.
WARM_UP = 30

POOL = {"min_size": 2, "max_size": 8, "timeout": 30}

# Seconds after which a wave hangs.
WAVE_TIMEOUT = 60

ISOLATION_LEVELS = {
    "postgres": ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"],
    "mariadb": ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"],
    "sqlite": [],
}

# At which it's safe to write what was read before without a lock.
STRICT_LEVELS = {
    "postgres": {"REPEATABLE READ", "SERIALIZABLE"},
    "mariadb": {"SERIALIZABLE"},
    "sqlite": set(),
}

# Serialization failures, deadlocks, and waits for locks.
REPEATABLE_ERRORS = {
    "40001",
    "40P01",
    # MariaDB's lock wait timeout, deadlock, and "Record has changed".
    1205,
    1213,
    1020,
}

# What the error of a COMMIT says if nobody knows whether it was done.
UNKNOWN = "it's unknown whether the transaction was committed"


# A request isn't, and a disconnect is that of a client in a request.
INTERRUPTIONS = ["timeout", "cancellation", "cancellations", "sibling"]
INTERRUPTIONS += ["disconnect", "disconnect", "request"]

PHASES = ["entering", "inside", "leaving", "rolling back", "committed"]


class Failure(Exception):
    """What blocks and siblings fail with."""


class Plan(NamedTuple):
    """What a transfer does."""

    key: uuid.UUID
    alias: str
    # One of ways().
    way: str
    source: int
    target: int
    amount: int
    isolation: str | None
    locks: bool
    # Of the rows that are locked or read.
    descending: bool
    # Whether it writes what it has read, instead of having it computed.
    overwrites: bool
    # Seconds.
    pause: float
    # What a nested block does: nothing, or it's rolled back.
    nested: str | None
    fails: bool


class Interruption(NamedTuple):
    """When a transfer is interrupted, and how: by one of INTERRUPTIONS."""

    kind: str | None
    # What the transaction does when the time begins to run.
    phase: str | None
    # Seconds, or else iterations of the event loop.
    delay: float
    steps: int | None


class Attempt:
    """A transaction of a transfer, and what its code knows about it."""

    def __init__(self, plan, number, waiting):
        self.plan = plan
        self.key = uuid.uuid5(plan.key, str(number))
        # What's to be called when it reaches a phase.
        self.waiting = waiting
        self.enter("entering")
        # Whether on_commit() has called back.
        self.called_back = False
        self.error = None

    def enter(self, phase):
        """Enter one of PHASES."""
        self.phase = phase
        waiting_for, reach = self.waiting.get(self.plan.key, (None, None))
        if waiting_for == phase:
            del self.waiting[self.plan.key]
            reach()

    def call_back(self):
        self.called_back = True

    def is_expected(self):
        """
        Return whether its row has to be in the database, or None if nobody can
        know.
        """
        if self.error is None and self.may_be_silent():
            return self.called_back
        if self.error is None:
            return self.phase == "committed"
        if self.phase != "leaving":
            return False
        if self.is_unknown():
            return None
        # It can arrive before the COMMIT or during it.
        return isinstance(self.error, asyncio.CancelledError) and self.called_back

    def is_unknown(self):
        """Return whether the outcome of the COMMIT is."""
        if self.is_sync() and isinstance(self.error, OperationalError):
            # Synchronous Django doesn't say so.
            return not is_repeatable(self.error)
        error = self.error
        while error is not None:
            if isinstance(error, OperationalError) and UNKNOWN in str(error):
                return True
            # A cancellation is raised when the COMMIT has failed.
            error = error.__context__
        return False

    def may_be_silent(self):
        """
        Return whether its block may be rolled back without an error. That's
        atomic() if the connection was lost before a nested block's rollback.
        """
        return self.plan.way in ("thread", "bridge") and self.plan.nested is not None

    def is_sync(self):
        plan = self.plan
        return plan.way == "thread" or (
            plan.way == "bridge" and plan.alias not in connections.native_aliases
        )

    def __str__(self):
        return (
            f"transaction {self.key}, {self.phase}, on_commit() "
            f"{'called' if self.called_back else 'did not call'} back, "
            f"error {self.error!r}, of {self.plan}"
        )


class Bank:
    """Make transfers, and compare the database with what they know."""

    def __init__(self, database):
        self.database = database
        # Since the last audit.
        self.attempts = []
        # Functions to call when a plan's attempt reaches a phase, by its key.
        self.waiting = {}
        # The transfers that were reported to clients.
        self.reported = set()
        # The transfers that are in the database.
        self.known = set()
        self.counts = Counter()

    def open(self):
        from rounds.models import Account

        Account.objects.bulk_create(
            Account(id=number, balance=BALANCE) for number in range(1, ACCOUNTS + 1)
        )

    # ##### Transfers #####

    async def transfer(self, plan):
        """Return the key of a committed transaction, or None."""
        for number in range(MAX_ATTEMPTS):
            attempt = Attempt(plan, number, self.waiting)
            self.attempts.append(attempt)
            try:
                await getattr(self, plan.way)(attempt)
            except Error as error:
                if not is_repeatable(error):
                    return None
                self.counts["repeated"] += 1
            except Failure:
                return None
            else:
                return attempt.key if attempt.is_expected() else None
        return None

    async def aatomic(self, attempt):
        plan = attempt.plan
        with self.noting(attempt):
            if plan.alias in connections.native_aliases:
                # In a thread, it would keep a connection of the pool.
                await self.account(plan, plan.source).aexists()
            async with transaction.aatomic(using=plan.alias):
                with self.inside(attempt):
                    await self.move(attempt)

    async def decorated(self, attempt):
        @transaction.aatomic(using=attempt.plan.alias)
        async def block():
            with self.inside(attempt):
                await self.move(attempt)

        with self.noting(attempt):
            await block()

    async def split(self, attempt):
        """Pay in and out in tasks, which have nested blocks."""
        plan = attempt.plan

        async def nested(account, amount):
            async with transaction.aatomic(using=plan.alias):
                await self.pay(plan, account, amount)

        with self.noting(attempt):
            async with transaction.aatomic(using=plan.alias):
                with self.inside(attempt):
                    await self.record(attempt)
                    try:
                        async with asyncio.TaskGroup() as tasks:
                            tasks.create_task(nested(plan.source, -plan.amount))
                            tasks.create_task(nested(plan.target, plan.amount))
                    except ExceptionGroup as group:
                        # The error of one task has canceled the other one.
                        raise group.exceptions[0] from None
                    if plan.fails:
                        raise Failure

    async def crossing(self, attempt):
        """Move the money in a thread, inside a block of asynchronous code."""
        with self.noting(attempt):
            async with transaction.aatomic(using=attempt.plan.alias):
                with self.inside(attempt):
                    await sync_to_async(self.move_in_sync)(attempt)

    async def thread(self, attempt):
        await sync_to_async(self.in_thread)(attempt)

    def in_thread(self, attempt):
        connection = connections[attempt.plan.alias]
        try:
            self.atomic(attempt)
        finally:
            # The pool wants it back.
            connection.close()
            # Django keeps the exception, and what that refers to.
            connection.rollback_exc = None

    async def bridge(self, attempt):
        if attempt.plan.alias in connections.native_aliases:
            await run_sync(self.atomic, attempt)
        else:
            await run_sync(self.in_thread, attempt)

    def atomic(self, attempt):
        with self.noting(attempt):
            with transaction.atomic(using=attempt.plan.alias):
                with self.inside(attempt):
                    self.move_in_sync(attempt)

    @contextlib.contextmanager
    def noting(self, attempt):
        """Note how the block ends."""
        try:
            yield
        except BaseException as error:
            attempt.error = error
            self.counts[f"{type(error).__name__} {attempt.phase}"] += 1
            raise
        attempt.enter("committed")
        self.counts["committed"] += 1

    @contextlib.contextmanager
    def inside(self, attempt):
        """Note how the body of the block ends."""
        attempt.enter("inside")
        try:
            yield
        except BaseException:
            attempt.enter("rolling back")
            raise
        attempt.enter("leaving")

    async def move(self, attempt):
        plan = attempt.plan
        if plan.isolation:
            async with connections[plan.alias].acursor() as cursor:
                await cursor.execute(
                    f"SET TRANSACTION ISOLATION LEVEL {plan.isolation}"
                )
        accounts = {account.pk: account async for account in self.accounts(plan)}
        await asyncio.sleep(plan.pause)
        if plan.overwrites:
            for account, amount in self.payments(plan, accounts):
                account.balance += amount
                await account.asave(update_fields=["balance"])
        else:
            await self.pay(plan, plan.source, -plan.amount)
            await self.pay(plan, plan.target, plan.amount)
        await self.record(attempt)
        if plan.nested:
            with contextlib.suppress(Failure):
                async with transaction.aatomic(using=plan.alias):
                    if plan.nested == "rolled back":
                        await self.pay(plan, plan.target, 1)
                        raise Failure
        if plan.fails:
            raise Failure

    def move_in_sync(self, attempt):
        plan = attempt.plan
        if plan.isolation:
            with connections[plan.alias].cursor() as cursor:
                cursor.execute(f"SET TRANSACTION ISOLATION LEVEL {plan.isolation}")
        accounts = {account.pk: account for account in self.accounts(plan)}
        if plan.overwrites:
            for account, amount in self.payments(plan, accounts):
                account.balance += amount
                account.save(update_fields=["balance"])
        else:
            self.account(plan, plan.source).update(balance=F("balance") - plan.amount)
            self.account(plan, plan.target).update(balance=F("balance") + plan.amount)
        self.make_record(attempt).save(using=plan.alias, force_insert=True)
        transaction.on_commit(attempt.call_back, using=plan.alias)
        if plan.nested:
            with contextlib.suppress(Failure), transaction.atomic(using=plan.alias):
                if plan.nested == "rolled back":
                    self.account(plan, plan.target).update(balance=F("balance") + 1)
                    raise Failure
        if plan.fails:
            raise Failure

    def accounts(self, plan):
        from rounds.models import Account

        accounts = Account.objects.using(plan.alias)
        if plan.locks:
            accounts = accounts.select_for_update()
        return accounts.filter(pk__in=[plan.source, plan.target]).order_by(
            "-pk" if plan.descending else "pk"
        )

    def account(self, plan, number):
        from rounds.models import Account

        return Account.objects.using(plan.alias).filter(pk=number)

    def payments(self, plan, accounts):
        yield accounts[plan.source], -plan.amount
        yield accounts[plan.target], plan.amount

    async def pay(self, plan, account, amount):
        await self.account(plan, account).aupdate(balance=F("balance") + amount)

    async def record(self, attempt):
        alias = attempt.plan.alias
        await self.make_record(attempt).asave(using=alias, force_insert=True)
        transaction.on_commit(attempt.call_back, using=alias)

    def make_record(self, attempt):
        from rounds.models import Transfer

        plan = attempt.plan
        return Transfer(
            id=attempt.key,
            source=plan.source,
            target=plan.target,
            amount=plan.amount,
        )

    # ##### Audit #####

    def audit(self, observer):
        """Raise Violation if the database isn't as it has to be."""
        rows = {
            uuid.UUID(str(key)): row
            for key, *row in observer.rows(
                "SELECT id, source, target, amount FROM rounds_transfer"
            )
        }
        balances = dict(observer.rows("SELECT id, balance FROM rounds_account"))
        self.audit_transfers(rows.keys())
        expected = dict.fromkeys(range(1, ACCOUNTS + 1), BALANCE)
        for source, target, amount in rows.values():
            expected[source] -= amount
            expected[target] += amount
        wrong = {
            account: (balances.get(account), expected[account])
            for account in expected
            if balances.get(account) != expected[account]
        }
        if wrong:
            raise Violation(
                "The balances aren't what the transfers have made them.",
                "\n".join(
                    f"Account {account} has {balance}, not {due}."
                    for account, (balance, due) in wrong.items()
                )
                + f"\nThe total is {sum(balances.values())}, not "
                f"{ACCOUNTS * BALANCE}.\nTransactions since the last audit:\n"
                + "\n".join(map(str, self.attempts)),
            )
        self.known = set(rows)
        self.attempts.clear()

    def audit_transfers(self, keys):
        for attempt in self.attempts:
            is_there, expected = attempt.key in keys, attempt.is_expected()
            if expected is None:
                self.counts["unknown, " + ("done" if is_there else "not done")] += 1
            elif is_there and not expected:
                raise Violation("What had failed was committed.", str(attempt))
            elif expected and not is_there:
                raise Violation("What had been committed is lost.", str(attempt))
            if (
                attempt.phase == "committed"
                and not attempt.called_back
                and not attempt.may_be_silent()
            ):
                raise Violation("on_commit() didn't call back.", str(attempt))
            if attempt.called_back and not is_there:
                raise Violation("on_commit() called back too early.", str(attempt))
            if not is_allowed(attempt.error):
                lines = traceback.format_exception(attempt.error)
                raise Violation(
                    f"A block has raised {attempt.error!r}.",
                    "".join([f"{attempt}\n", *lines]),
                )
        for missing in (self.known - keys, self.reported - keys):
            if missing:
                raise Violation("A committed transfer is gone.", str(missing))
        strange = keys - self.known - {attempt.key for attempt in self.attempts}
        if strange:
            raise Violation("A transfer was committed late.", str(strange))


def is_repeatable(error):
    cause = error.__cause__
    code = getattr(cause, "sqlstate", None) or (cause and cause.args or [None])[0]
    return code in REPEATABLE_ERRORS or code == "database is locked"


def is_allowed(error):
    """Return whether a block may raise it."""
    return error is None or isinstance(error, (Error, Failure, asyncio.CancelledError))


class Money(Round):
    name = "money"

    def settings(self, database):
        databases = {"default": database}
        if self.database == "postgres":
            options = {**database["OPTIONS"], "pool": POOL}
            databases["pooled"] = {**database, "OPTIONS": options}
        return {
            **super().settings(database),
            "DATABASES": databases,
            "ALLOWED_HOSTS": ["127.0.0.1"],
            "ROOT_URLCONF": __name__,
        }

    def set_up(self):
        super().set_up()
        self.bank = Bank(self.database)
        self.bank.open()
        self.plans = {}
        self.wave_size = WARM_UP

    def warm_up(self):
        # Check the pools of all of them.
        list(connections.all())
        self.run_waves(0)
        self.bank.counts.clear()
        # The last, so that what a block leaves to the next one is there: an
        # interrupted transfer doesn't leave it.
        super().warm_up()

    def run(self):
        self.wave_size = WAVE[self.database]
        self.run_waves(self.seconds)
        return dict(sorted(self.bank.counts.items()))

    def run_waves(self, seconds):
        deadline = time.monotonic() + seconds
        self.run_async(self.serve(lambda server: self.waves(server, deadline)))

    def check(self):
        with self.observer() as observer:
            self.bank.audit(observer)

    async def serve(self, use):
        """Await use(server) while an ASGI server is running."""
        import uvicorn

        from django.core.handlers.asgi import ASGIHandler

        global current
        current = self
        config = uvicorn.Config(
            ASGIHandler(), port=0, lifespan="off", log_config=None, access_log=False
        )
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        try:
            async with asyncio.timeout(10):
                while not server.started:
                    await asyncio.sleep(0.01)
            return await use(server)
        finally:
            server.should_exit = True
            await task

    async def waves(self, server, deadline):
        self.slots = asyncio.Semaphore(CONCURRENT[self.database])
        while True:
            await self.wave(server)
            await asyncio.to_thread(self.check)
            self.bank.counts["waves"] += 1
            if time.monotonic() > deadline:
                return

    async def wave(self, server):
        port = port_of(server)
        transfers = [
            asyncio.create_task(self.one(port, self.plan(), self.interruption()))
            for _ in range(self.wave_size)
        ]
        done, pending = await asyncio.wait(transfers, timeout=WAVE_TIMEOUT)
        if pending:
            raise Violation(f"{len(pending)} transfers hang.", stacks())
        for task in done:
            task.result()
        await self.wait_for_requests(server)

    async def wait_for_requests(self, server):
        """Wait for all that goes on though nobody waits for it any more."""
        # Calls of synchronous functions that were abandoned have ended then.
        await sync_to_async(lambda: None)()
        # Requests of clients that have gone come before this one.
        await request(port_of(server), "warm-up")
        async with asyncio.timeout(WAVE_TIMEOUT):
            state = server.server_state
            while state.tasks or state.connections:
                await asyncio.sleep(0.01)
        self.plans.clear()

    def plan(self):
        random = self.random
        source, target = random.sample(range(1, ACCOUNTS + 1), 2)
        isolation = random.choice([None] * 4 + ISOLATION_LEVELS[self.database])
        locks = random.random() < 0.5
        is_safe = isolation in STRICT_LEVELS[self.database] or (
            locks and self.database != "sqlite"
        )
        plan = Plan(
            key=uuid.UUID(int=random.getrandbits(128)),
            alias=random.choice(
                ["default", "pooled"] if self.database == "postgres" else ["default"]
            ),
            way=random.choice(self.ways()),
            source=source,
            target=target,
            amount=random.randint(1, MAX_AMOUNT),
            isolation=isolation,
            locks=locks,
            descending=random.random() < 0.5,
            overwrites=is_safe and random.random() < 0.5,
            pause=random.choice([0, 0, 0.002, 0.01]),
            nested=random.choice([None, None, "kept", "rolled back"]),
            fails=random.random() < 0.1,
        )
        self.plans[str(plan.key)] = plan
        return plan

    def ways(self):
        """Return the names of Bank's methods that make a transfer."""
        ways = ["aatomic"] * 4 + ["decorated", "split", "crossing", "thread"]
        return [*ways, "bridge"]

    def interruption(self):
        random = self.random
        kinds = [None, None, None, *INTERRUPTIONS]
        return Interruption(
            kind=random.choice(kinds),
            phase=random.choice([None, *PHASES]),
            delay=random.random() ** 2 * random.choice([0.002, 0.02, 0.2]),
            # In native mode, a transaction takes some dozens of them.
            steps=random.choice([None, 0, random.randint(1, 20)]),
        )

    async def one(self, port, plan, interruption):
        slot = self.slots if plan.alias == "default" else contextlib.nullcontext()
        make = getattr(self, f"with_{interruption.kind or 'nothing'}")
        async with slot:
            with contextlib.suppress(asyncio.CancelledError, TimeoutError):
                await make(port, plan, interruption)
        self.bank.waiting.pop(plan.key, None)

    def interrupt(self, plan, interruption, act):
        """Call act() at the time for which the interruption is planned."""
        loop = asyncio.get_running_loop()

        def count_down(steps):
            if steps:
                loop.call_soon(count_down, steps - 1)
            else:
                act()

        def start():
            if interruption.steps is None:
                loop.call_later(interruption.delay, act)
            else:
                count_down(interruption.steps)

        def reach():
            if asyncio._get_running_loop() is loop:
                start()
            else:
                loop.call_soon_threadsafe(start)

        if interruption.phase is None:
            start()
        else:
            self.bank.waiting[plan.key] = interruption.phase, reach

    async def with_nothing(self, port, plan, interruption):
        await self.bank.transfer(plan)

    async def with_timeout(self, port, plan, interruption):
        async with asyncio.timeout(None) as timeout:

            def expire():
                # It may have been left.
                with contextlib.suppress(RuntimeError):
                    timeout.reschedule(0)

            self.interrupt(plan, interruption, expire)
            await self.bank.transfer(plan)

    async def with_cancellation(self, port, plan, interruption):
        task = asyncio.create_task(self.bank.transfer(plan))
        self.interrupt(plan, interruption, task.cancel)
        await task

    async def with_cancellations(self, port, plan, interruption):
        def cancel():
            if task.cancel():
                again = interruption._replace(phase="rolling back")
                self.interrupt(plan, again, task.cancel)

        task = asyncio.create_task(self.bank.transfer(plan))
        self.interrupt(plan, interruption, cancel)
        await task

    async def with_sibling(self, port, plan, interruption):
        time_to_fail = asyncio.Event()

        async def fail():
            await time_to_fail.wait()
            raise Failure

        with contextlib.suppress(ExceptionGroup):
            async with asyncio.TaskGroup() as tasks:
                sibling = tasks.create_task(fail())
                self.interrupt(plan, interruption, time_to_fail.set)
                task = tasks.create_task(self.bank.transfer(plan))
                task.add_done_callback(lambda task: sibling.cancel())

    async def with_request(self, port, plan, interruption):
        answer = await request(port, f"transfer/{plan.key}")
        if answer.startswith("committed "):
            self.bank.reported.add(uuid.UUID(answer.removeprefix("committed ")))
            self.bank.counts["reported to a client"] += 1

    async def with_disconnect(self, port, plan, interruption):
        task = asyncio.create_task(self.with_request(port, plan, interruption))
        # That closes the connection.
        self.interrupt(plan, interruption, task.cancel)
        await task


def stacks():
    """Return the stacks of all tasks."""
    text = io.StringIO()
    for task in asyncio.all_tasks():
        task.print_stack(file=text)
    return text.getvalue()


def port_of(server):
    return server.servers[0].sockets[0].getsockname()[1]


# The round that the views belong to.
current = None


async def transfer(request, key):
    key = await current.bank.transfer(current.plans[key])
    return respond("failed" if key is None else f"committed {key}")


async def warm_up(request):
    from rounds.models import Account

    async with transaction.aatomic():
        return respond(str(await Account.objects.acount()))


def respond(text):
    # Otherwise it's sent in chunks.
    return HttpResponse(text, headers={"Content-Length": len(text)})


urlpatterns = [path("transfer/<key>", transfer), path("warm-up", warm_up)]


async def request(port, target):
    """Return the body of the response, or disconnect when it's cancelled."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"POST /{target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: 0\r\n\r\n".encode())
        response = (await reader.read()).decode()
        return response.partition("\r\n\r\n")[2]
    finally:
        writer.transport.abort()
