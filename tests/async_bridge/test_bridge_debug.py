"""
Promise 11: what blocks the event loop in the bridge is named in asyncio's
debug mode.
"""

import asyncio
import logging
import os
import sys
import threading
import time
import unittest
from contextlib import contextmanager

from asgiref.sync import async_to_sync

from django.db import bridge

from .test_bridge import BridgeTestCase, fail, greenlet, uvloop, wait

LOGGER = "django.db.bridge"
THREAD = "django.db.bridge_debug"


class Blocker(logging.Handler):
    """Block a thread until a warning is logged."""

    def __init__(self):
        super().__init__()
        self._logged = threading.Event()

    def emit(self, record):
        self._logged.set()

    def block(self):
        if not self._logged.wait(10):
            raise AssertionError("There was no warning.")
        self._logged.clear()


def position(func, line):
    """Return how tracebacks name a line of a function, counted from def."""
    code = func.__code__
    number = code.co_firstlineno + line
    return f'  File "{code.co_filename}", line {number}, in {code.co_name}\n'


def watchdogs():
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


# Fork while code in the bridge runs, in this thread and in another one, and
# while the watchdog might hold its lock.
FORK = """
import asyncio, logging, os, signal, threading, time
from django.db import bridge, bridge_debug

warnings = []
logging.getLogger("django.db.bridge").addFilter(warnings.append)

async def main(func):
    asyncio.get_running_loop().slow_callback_duration = 0.2
    return await bridge.run(func)

def run(func):
    return asyncio.run(main(func), debug=True)

def blocking(reached, end):
    reached.set()
    end.wait(10)

def fork():
    end = threading.Event()
    for target in (other_loop, lock_holder):
        reached = threading.Event()
        threading.Thread(target=target, args=[reached, end]).start()
        reached.wait(10)
    pid = os.fork()
    if not pid:
        signal.alarm(20)
    end.set()
    return pid

def other_loop(reached, end):
    run(lambda: blocking(reached, end))

def lock_holder(reached, end):
    with bridge_debug._condition:
        blocking(reached, end)

def block():
    end = time.monotonic() + 10
    while not warnings and time.monotonic() < end:
        time.sleep(0.01)
    return bool(warnings)

pid = run(fork)
if pid:
    os.waitpid(pid, 0)
elif run(block):
    print("There was a warning.")
"""


class DebugMixin:
    def setUp(self):
        super().setUp()
        self.blocker = Blocker()

    def run_in_debug_mode(self, func, threshold=0.05, **kwargs):
        async def main():
            asyncio.get_running_loop().slow_callback_duration = threshold
            return await bridge.run(func)

        return self.run_on_loop(main(), debug=True, **kwargs)

    @contextmanager
    def assertWarnings(self, *messages):
        """Fail unless there are as many warnings, which contain these."""
        with (
            self.assertLogs(LOGGER, logging.WARNING) as cm,
            # asyncio warns, too.
            self.assertLogs("asyncio", logging.WARNING),
        ):
            # assertLogs() removes it.
            logging.getLogger(LOGGER).addHandler(self.blocker)
            yield cm
        self.assertEqual(len(cm.output), len(messages), cm.output)
        for output, message in zip(cm.output, messages):
            self.assertIn(message, output)


@unittest.skipUnless(greenlet, "greenlet is required.")
class BridgeDebugTests(DebugMixin, BridgeTestCase):
    def test_frame(self):
        """The code that blocks is named while it does."""

        def helper():
            self.blocker.block()

        def service():
            helper()

        with self.assertWarnings(
            f"{position(service, 1)}    helper()\n"
            f"{position(helper, 1)}    self.blocker.block()\n"
        ) as cm:
            self.run_in_debug_mode(service)
        self.assertRegex(
            cm.output[0],
            r"The task 'Task-\d+' has blocked the event loop for \d+\.\d{3} seconds, "
            r"and is here:\n",
        )

    def test_each_section(self):
        """Code that goes on after a wait is watched again."""

        def func():
            self.blocker.block()
            wait()
            self.blocker.block()
            try:
                bridge.await_(fail(ValueError()))
            except ValueError:
                self.blocker.block()

        lines = [position(func, line) for line in (1, 3, 7)]
        with self.assertWarnings(*lines):
            self.run_in_debug_mode(func)

    def test_code_that_waits(self):
        """What counts is the time from one wait to the next."""

        def func():
            wait(0.5)
            for _ in range(4):
                time.sleep(0.15)
                wait()

        with self.assertNoLogs(LOGGER, logging.WARNING):
            self.run_in_debug_mode(func, threshold=0.4)

    def test_threshold(self):
        for threshold in (0.01, 0.3):
            with self.subTest(threshold=threshold):
                with self.assertWarnings("") as cm:
                    self.run_in_debug_mode(self.blocker.block, threshold)
                _, seconds, _ = cm.records[0].args
                self.assertGreaterEqual(seconds, threshold)

    def test_nested(self):
        """Code that waits for what blocks isn't warned of."""

        def inner():
            self.blocker.block()

        async def coroutine():
            await bridge.run(inner)

        def outer():
            async_to_sync(coroutine)()

        with self.assertWarnings(position(inner, 1)) as cm:
            self.run_in_debug_mode(outer)
        self.assertNotIn("outer", cm.output[0])

    def test_eager_task(self):
        """Code of a task that begins in the bridge is warned of once."""
        tasks = []

        def inner():
            self.blocker.block()
            time.sleep(0.1)

        def outer():
            loop = asyncio.get_running_loop()
            task = asyncio.eager_task_factory(loop, bridge.run(inner))
            tasks.append(task)
            time.sleep(0.1)

        with self.assertWarnings(position(inner, 1)):
            self.run_in_debug_mode(outer)
        self.assertIs(tasks[0].done(), True)

    def test_two_loops(self):
        """The watchdog wakes up for the one with the lower threshold."""
        other_blocks = threading.Event()
        warned = threading.Event()

        def other():
            other_blocks.set()
            warned.wait(10)

        def func():
            other_blocks.wait(10)
            self.blocker.block()
            warned.set()

        thread = threading.Thread(
            target=self.run_in_debug_mode, args=[other], kwargs={"threshold": 20}
        )
        thread.start()
        try:
            with self.assertWarnings(position(func, 2)):
                self.run_in_debug_mode(func)
        finally:
            warned.set()
            thread.join()

    def test_watchdog_cannot_run(self):
        """What isn't seen in time is told afterwards."""

        def hold_the_gil():
            end = time.monotonic() + 0.2
            while time.monotonic() < end:
                pass

        def func():
            hold_the_gil()
            wait()
            hold_the_gil()

        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(60)
        with self.assertWarnings(
            f" seconds, before it waited here:\n{position(func, 2)}    wait()\n",
            " seconds.",
        ):
            self.run_in_debug_mode(func, threshold=0.1)

    def test_watchdog_ends(self):
        def func():
            found.extend(watchdogs())

        found = []
        self.run_in_debug_mode(func)
        self.assertEqual(len(found), 1)
        found[0].join(10)
        self.assertEqual(watchdogs(), [])
        # It's started again.
        with self.assertWarnings(position(self.blocker.block, 1)):
            self.run_in_debug_mode(self.blocker.block)

    @unittest.skipUnless(hasattr(os, "fork"), "os.fork() is required.")
    def test_fork(self):
        """In the new process, there's neither the watchdog nor its work."""
        output = self.run_python(FORK)
        self.assertEqual(output, "There was a warning.")

    @unittest.skipUnless(uvloop, "uvloop is required.")
    def test_uvloop(self):
        with self.assertWarnings(position(self.blocker.block, 1)):
            self.run_in_debug_mode(
                self.blocker.block, loop_factory=uvloop.new_event_loop
            )

    def test_other_modes(self):
        """Outside of asyncio's debug mode, there's no watchdog."""
        output = self.run_python(
            "import asyncio, sys, threading\n"
            "from django.db import bridge\n"
            "print(asyncio.run(bridge.run(threading.active_count)))\n"
            "print('django.db.bridge_debug' in sys.modules)\n"
        )
        self.assertEqual(output, "1\nFalse")
