"""
Promises 7, 8 and 11, through the ORM: with a pool, a connection is held only
while it's needed, and waiting for one is fair, can be cancelled, ends in time,
and blocks neither the event loop nor its executor.
"""

import asyncio
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from asgiref.sync import async_to_sync

from django.contrib.auth.models import Group
from django.db import (
    IntegrityError,
    OperationalError,
    connection,
    connections,
    run_sync,
    transaction,
)
from django.db.backends.signals import connection_created

from .base import NativePoolTestCase
from .cancelling import cancel_everywhere
from .test_waiting import Heartbeat, no_blocking_waits

EXHAUSTED = (
    "If the server can be reached, all connections of the pool are in use: each "
    "transaction and each new_connection() holds one, also while another one is open "
    "inside of it. Increase the pool's max_size, or let fewer of them be open at a "
    "time."
)


def backend_pid():
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return cursor.fetchone()[0]


class PoolTestCase(NativePoolTestCase):
    available_apps = ["django.contrib.auth", "django.contrib.contenttypes"]

    async def hold(self, count):
        """
        Let tasks hold connections in transactions until the Event that's
        returned is set.
        """
        release = asyncio.Event()
        events = [asyncio.Event() for _ in range(count)]

        async def hold(held):
            async with transaction.aatomic():
                held.set()
                await release.wait()

        # Nobody else refers to them.
        self.holders = [asyncio.create_task(hold(held)) for held in events]
        try:
            for held in events:
                await held.wait()
        except BaseException:
            release.set()
            raise
        return release

    def waiting(self):
        return connection.pool.get_stats().get("requests_waiting", 0)

    async def until(self, get, expected):
        async with asyncio.timeout(10):
            while get() != expected:
                await asyncio.sleep(0.001)


class HoldingTests(PoolTestCase):
    """A connection is held only while something needs it."""

    def test_a_task_is_not_held_by_its_failure(self):
        """The traceback of a failed query may refer to the task."""

        async def create_twice():
            await Group.objects.acreate(name="a")
            with suppress(IntegrityError):
                await Group.objects.acreate(name="a")

        @transaction.atomic
        def create():
            async_to_sync(create_twice)()

        async def main():
            task = asyncio.create_task(run_sync(create))
            await task
            return weakref.ref(task)

        task = asyncio.run(main())
        gc.collect()
        self.assertIsNone(task())

    def test_operation(self):
        async def main():
            await Group.objects.acreate(name="a")
            self.assertEqual(self.checked_out(), 0)
            held = await run_sync(
                lambda: [backend_pid(), self.checked_out(), backend_pid()]
            )
            self.assertEqual(held, [held[0], 1, held[0]])
            self.assertEqual(self.checked_out(), 0)

        self.run_on_loop(main())

    def test_failed_operation(self):
        async def main():
            with self.assertRaises(Group.DoesNotExist):
                await Group.objects.aget(name="a")
            self.assertEqual(self.checked_out(), 0)

        self.run_on_loop(main())

    def test_block(self):
        async def main():
            async with transaction.aatomic():
                self.assertEqual(self.checked_out(), 1)
                await Group.objects.acreate(name="a")
                async with transaction.aatomic():
                    self.assertEqual(await Group.objects.acount(), 1)
                self.assertEqual(self.checked_out(), 1)
            self.assertEqual(self.checked_out(), 0)

        self.run_on_loop(main())

    def test_reference(self):
        """The operation has been given the connection, or a method of it."""

        def use(wrapper):
            with wrapper.cursor() as cursor:
                cursor.execute("SELECT 1")

        async def main():
            await run_sync(connection.ensure_connection)
            self.assertEqual(self.checked_out(), 0)
            wrapper = connections["default"]
            await run_sync(use, wrapper)
            self.assertEqual(self.checked_out(), 0)
            await asyncio.create_task(run_sync(use, wrapper))
            self.assertEqual(self.checked_out(), 0)

        self.run_on_loop(main())

    def test_many_tasks(self):
        """10,000 tasks that are mostly idle share a pool of 10."""
        pids = set()
        threads = threading.active_count()

        async def task():
            pids.add(await run_sync(backend_pid))
            done.release()
            await idle.wait()
            return await Group.objects.acount()

        async def main():
            nonlocal done, idle
            done, idle = asyncio.Semaphore(0), asyncio.Event()
            # The workers of the pool.
            await run_sync(backend_pid)
            workers = connection.pool.num_workers
            with no_blocking_waits():
                tasks = [asyncio.create_task(task()) for _ in range(10_000)]
                for _ in tasks:
                    await done.acquire()
                self.assertEqual(self.checked_out(), 0)
                self.assertLessEqual(threading.active_count() - threads, workers + 1)
                idle.set()
                self.assertEqual(set(await asyncio.gather(*tasks)), {0})
            self.assertEqual(self.checked_out(), 0)

        done = idle = None
        self.run_on_loop(main(), timeout=300)
        self.assertLessEqual(len(pids), 10)

    test_many_tasks.pool_options = {"min_size": 0, "max_size": 10, "timeout": 200}


class WaitingTests(PoolTestCase):
    pool_options = {"min_size": 0, "max_size": 1, "timeout": 10}

    def test_fair(self):
        """Tasks, transactions and threads are served as they arrive."""
        served = []

        def use(number):
            backend_pid()
            served.append(number)

        async def in_block(number):
            async with transaction.aatomic():
                served.append(number)
                await asyncio.sleep(0)

        def in_thread(number):
            try:
                use(number)
            finally:
                connections.close_all()

        async def main():
            loop = asyncio.get_running_loop()
            release = await self.hold(1)
            futures = []
            with ThreadPoolExecutor(4) as executor:
                for number in range(12):
                    if number % 3 == 0:
                        futures.append(
                            loop.run_in_executor(executor, in_thread, number)
                        )
                    elif number % 3 == 1:
                        futures.append(asyncio.create_task(run_sync(use, number)))
                    else:
                        futures.append(asyncio.create_task(in_block(number)))
                    await self.until(self.waiting, number + 1)
                release.set()
                await asyncio.gather(*futures)

        self.run_on_loop(main())
        self.assertEqual(served, list(range(12)))

    def test_loop_is_not_blocked(self):
        async def main():
            release = await self.hold(1)
            async with Heartbeat() as heartbeat:
                tasks = [asyncio.create_task(Group.objects.acount()) for _ in range(5)]
                await self.until(self.waiting, 5)
                await asyncio.sleep(0.5)
            release.set()
            self.assertEqual(await asyncio.gather(*tasks), [0] * 5)
            return heartbeat.longest

        self.assertLess(self.run_on_loop(main()), 0.4)

    def test_full_executor(self):
        """
        The holder needs the loop's default executor to go on, which has but
        one thread, while others wait for the connection.
        """
        threads = []

        async def holder():
            async with transaction.aatomic():
                await self.until(self.waiting, 5)
                await asyncio.to_thread(lambda: threads.append(1))

        async def main():
            loop = asyncio.get_running_loop()
            loop.set_default_executor(ThreadPoolExecutor(1))
            tasks = [asyncio.create_task(holder())]
            await self.until(self.checked_out, 1)
            tasks += [asyncio.create_task(Group.objects.acount()) for _ in range(5)]
            await asyncio.gather(*tasks)

        self.run_on_loop(main())
        self.assertEqual(threads, [1])

    def test_cancelled(self):
        """Wherever a task that gets a connection late is cancelled."""

        async def use(operation):
            release = await self.hold(1)
            asyncio.get_running_loop().call_later(0.01, release.set)
            await operation()

        async def block():
            async with transaction.aatomic():
                await Group.objects.acount()

        async def main(operation):
            async for _ in cancel_everywhere(self, lambda: use(operation)):
                await asyncio.wait(self.holders)
                self.assertEqual(await Group.objects.acount(), 0)
                self.assertEqual(self.checked_out(), 0)

        for operation in (Group.objects.acount, block):
            with self.subTest(operation=operation.__name__):
                self.run_on_loop(main(operation))

    def test_some_are_cancelled(self):
        """The others are served."""

        async def main():
            release = await self.hold(1)
            tasks = [asyncio.create_task(Group.objects.acount()) for _ in range(20)]
            await self.until(self.waiting, 20)
            for task in tasks[::2]:
                task.cancel()
            release.set()
            for task in tasks[1::4]:
                # It may have the connection by now.
                await asyncio.sleep(0)
                task.cancel()
            await asyncio.wait(tasks)
            for task in tasks[3::4]:
                self.assertEqual(task.result(), 0)

        self.run_on_loop(main())

    def test_timeout(self):
        async def block():
            async with transaction.aatomic():
                self.fail("There's no connection.")

        async def main():
            release = await self.hold(1)
            for operation in (Group.objects.acount, block):
                before = time.monotonic()
                async with Heartbeat() as heartbeat:
                    msg = f"couldn't get a connection after 0.30 sec. {EXHAUSTED}"
                    with self.assertRaisesMessage(OperationalError, msg):
                        await operation()
                self.assertLess(heartbeat.longest, 0.25)
                self.assertLess(time.monotonic() - before, 3)
            self.assertEqual(self.waiting(), 0)
            release.set()
            self.assertEqual(await Group.objects.acount(), 0)

        self.run_on_loop(main())

    test_timeout.pool_options = {"min_size": 0, "max_size": 1, "timeout": 0.3}

    def test_max_waiting(self):
        async def main():
            release = await self.hold(1)
            tasks = [asyncio.create_task(Group.objects.acount()) for _ in range(2)]
            await self.until(self.waiting, 2)
            msg = f"has already 2 requests waiting. {EXHAUSTED}"
            before = time.monotonic()
            with self.assertRaisesMessage(OperationalError, msg):
                await Group.objects.acount()
            self.assertLess(time.monotonic() - before, 3)
            release.set()
            self.assertEqual(await asyncio.gather(*tasks), [0, 0])

        self.run_on_loop(main())

    test_max_waiting.pool_options = {
        "min_size": 0,
        "max_size": 1,
        "timeout": 20,
        "max_waiting": 2,
    }


class LeaseTests(PoolTestCase):
    """
    A lease is as when a pooled connection is taken at a request's start.
    """

    def receive(self, sender, connection, **kwargs):
        self.created.append(connection)

    def setUp(self):
        super().setUp()
        self.created = []
        connection_created.connect(self.receive)
        self.addCleanup(connection_created.disconnect, self.receive)

    def test_connection_created(self):
        def operation():
            backend_pid()
            backend_pid()

        async def main():
            for _ in range(3):
                await run_sync(operation)
            async with transaction.aatomic():
                await run_sync(operation)
                await run_sync(operation)

        self.run_on_loop(main())
        # One for each operation and each transaction.
        self.assertEqual(len(self.created), 4)
        self.created.clear()
        for _ in range(3):
            operation()
            connection.close()
        self.assertEqual(len(self.created), 3)

    def test_queries_of_receivers(self):
        """What they set is there for each operation."""
        name = "SET application_name = 'lease'"

        def receive(sender, connection, **kwargs):
            with connection.cursor() as cursor:
                cursor.execute(name)

        def operation():
            with connection.cursor() as cursor:
                cursor.execute("SHOW application_name")
                found = cursor.fetchone()
                cursor.execute("RESET application_name")
                return found

        async def main():
            found = await asyncio.gather(*[run_sync(operation) for _ in range(20)])
            self.assertEqual(set(found), {("lease",)})

        connection_created.connect(receive)
        self.addCleanup(connection_created.disconnect, receive)
        self.run_on_loop(main())

    def test_failing_receiver(self):
        def receive(**kwargs):
            raise ValueError

        async def main():
            for _ in range(3):
                with self.assertRaises(ValueError):
                    await Group.objects.acount()
            self.assertEqual(self.checked_out(), 0)

        connection_created.connect(receive)
        try:
            self.run_on_loop(main())
        finally:
            connection_created.disconnect(receive)

    def test_autocommit(self):
        """It's in the mode of the settings, whatever the last one has set."""

        def begin():
            connection.set_autocommit(False)
            backend_pid()

        async def main():
            await run_sync(begin)
            self.assertIs(await run_sync(connection.get_autocommit), True)

        self.run_on_loop(main())
