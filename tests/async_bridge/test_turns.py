"""
Promises 3, 7 and 11: code in the bridge takes turns with threads, and its
event loop isn't blocked while it waits.
"""

import asyncio
import gc
import logging
import threading
import unittest
import weakref

from django.db import bridge
from django.db.turns import ThreadWaiter, Turn

from .test_bridge import BridgeTestCase, greenlet, started, value


def always():
    return True


@unittest.skipUnless(greenlet, "greenlet is required.")
class TurnWaiterTests(BridgeTestCase):
    def setUp(self):
        self.turn = Turn()
        self.log = []

    def take(self, holder=None, timeout=10, ready=always):
        # Suspended code must not refer to its task strongly.
        holder = holder or weakref.ref(asyncio.current_task())
        return self.turn.take(holder, ready, timeout, bridge.TurnWaiter)

    def use(self, name):
        self.assertIs(self.take(), True)
        try:
            self.log.append(name)
            for _ in range(3):
                bridge.await_(value(None))
            self.log.append(name)
        finally:
            self.turn.give()

    def test_tasks(self):
        async def main():
            await asyncio.gather(*[bridge.run(self.use, name) for name in "abc"])

        self.run_on_loop(main())
        self.assertEqual(self.log, list("aabbcc"))

    def test_taken_again(self):
        def nested():
            self.take()
            self.use("a")
            self.turn.give()

        self.run_on_loop(bridge.run(nested))
        self.assertEqual(self.turn.depth, 0)

    def test_thread_and_tasks(self):
        """They are served in the order of their arrival."""
        proceed = threading.Event()
        taken = threading.Event()

        def thread(name, wait):
            self.turn.take(name, always, 10, ThreadWaiter)
            taken.set()
            self.log.append(name)
            wait()
            self.turn.give()

        async def arrived(count):
            while len(self.turn._requests) < count:
                await asyncio.sleep(0)

        async def main():
            futures = [asyncio.to_thread(thread, "first", lambda: proceed.wait(10))]
            futures = [asyncio.ensure_future(future) for future in futures]
            await asyncio.to_thread(taken.wait, 10)
            futures.append(asyncio.create_task(bridge.run(self.use, "task")))
            await arrived(1)
            future = asyncio.to_thread(thread, "thread", lambda: None)
            futures.append(asyncio.ensure_future(future))
            await arrived(2)
            futures.append(asyncio.create_task(bridge.run(self.use, "last")))
            await arrived(3)
            self.assertEqual(self.log, ["first"])
            proceed.set()
            await asyncio.gather(*futures)

        self.run_on_loop(main())
        self.assertEqual(self.log, ["first", "task", "task", "thread", "last", "last"])

    def test_timeout(self):
        async def main():
            await bridge.run(self.take, "another")
            self.assertIs(await bridge.run(self.take, timeout=0.01), False)
            self.assertEqual(self.turn._requests, [])

        self.run_on_loop(main())

    def test_not_ready(self):
        ready = False

        async def main():
            nonlocal ready
            take = bridge.run(self.take, ready=lambda: ready)
            task = asyncio.create_task(take)
            await started(task)
            await bridge.run(self.use, "other")
            self.assertIs(task.done(), False)
            ready = True
            self.turn.changed()
            self.assertIs(await task, True)

        self.run_on_loop(main())

    def test_cancelled(self):
        async def main():
            await bridge.run(self.take, "another")
            task = asyncio.create_task(bridge.run(self.use, "task"))
            await started(task)
            task.cancel()
            await asyncio.wait([task])
            self.assertIs(task.cancelled(), True)
            self.assertEqual(self.turn._requests, [])
            self.turn.give()
            await bridge.run(self.use, "other")

        self.run_on_loop(main())
        self.assertEqual(self.log, ["other", "other"])

    def test_cancelled_when_it_comes(self):
        async def main():
            await bridge.run(self.take, "another")
            first = asyncio.create_task(bridge.run(self.use, "first"))
            await started(first)
            second = asyncio.create_task(bridge.run(self.use, "second"))
            await started(second)
            # It's given to the first task, which doesn't know yet.
            self.turn.give()
            first.cancel()
            await asyncio.wait([first, second])
            self.assertIs(first.cancelled(), True)

        self.run_on_loop(main())
        self.assertEqual(self.log, ["second", "second"])

    def test_loop_closed(self):
        self.turn.take("another", always, 0)
        loop = asyncio.new_event_loop()
        tasks = [loop.create_task(bridge.run(self.use, name)) for name in "ab"]
        for _ in range(3):
            loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        self.turn.give()
        self.assertIs(self.turn.take("thread", always, 0), True)
        self.turn.give()
        with self.assertLogs("asyncio", logging.ERROR):
            tasks.clear()
            gc.collect()
        self.assertEqual(self.turn._requests, [])
        self.assertIs(self.turn.take("thread", always, 0), True)
