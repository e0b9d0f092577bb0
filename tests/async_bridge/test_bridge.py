"""
Promises 7, 12 and 14: synchronous code runs on the event loop's thread and
waits there.
"""

import asyncio
import contextvars
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import traceback
import unittest
import warnings
import weakref
from pathlib import Path
from unittest import mock

from asgiref.local import Local
from asgiref.sync import async_to_sync, sync_to_async

import django
from django.core.exceptions import SynchronousOnlyOperation
from django.db import bridge
from django.dispatch import Signal
from django.test import SimpleTestCase
from django.utils.asyncio import async_unsafe

try:
    import greenlet
except ImportError:
    greenlet = None

try:
    import uvloop
except ImportError:
    uvloop = None

var = contextvars.ContextVar("var", default="default")


async def value(result, delay=0):
    await asyncio.sleep(delay)
    return result


async def fail(exc):
    await asyncio.sleep(0)
    raise exc


def wait(delay=0):
    return bridge.await_(asyncio.sleep(delay))


def forever():
    return bridge.await_(asyncio.Event().wait())


async def started(task):
    """Let a task run until it waits."""
    while not task.done() and task._fut_waiter is None:
        await asyncio.sleep(0)


class BridgeTestCase(SimpleTestCase):
    def run_on_loop(self, coroutine, **kwargs):
        """Run a coroutine that might wait in vain if something is broken."""
        return asyncio.run(asyncio.wait_for(coroutine, 20), **kwargs)

    def run_python(self, code):
        path = [str(Path(django.__file__).parent.parent), *sys.path]
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.assertEqual(result.returncode, 0, result.stderr)
        return result.stdout.strip()


@unittest.skipUnless(greenlet, "greenlet is required.")
class RunTests(BridgeTestCase):
    def test_result(self):
        def func(*args, **kwargs):
            return args, kwargs

        async def main():
            return await bridge.run(func, 1, 2, func=3)

        self.assertEqual(self.run_on_loop(main()), ((1, 2), {"func": 3}))

    def test_waits(self):
        def func():
            return [bridge.await_(value(number)) for number in range(100)]

        self.assertEqual(self.run_on_loop(bridge.run(func)), list(range(100)))

    def test_any_awaitable(self):
        class Awaitable:
            def __await__(self):
                return (yield from value(3).__await__())

        def func():
            loop = asyncio.get_running_loop()
            future = loop.create_future()
            loop.call_soon(future.set_result, 1)
            return [
                bridge.await_(future),
                bridge.await_(loop.create_task(value(2))),
                bridge.await_(Awaitable()),
            ]

        self.assertEqual(self.run_on_loop(bridge.run(func)), [1, 2, 3])

    def test_not_awaitable(self):
        def func():
            with self.assertRaises(TypeError):
                bridge.await_(1)
            return bridge.await_(value(2))

        self.assertEqual(self.run_on_loop(bridge.run(func)), 2)

    def test_exception(self):
        def func():
            wait()
            raise ValueError("No")

        with self.assertRaisesMessage(ValueError, "No"):
            self.run_on_loop(bridge.run(func))

    def test_exception_of_awaitable(self):
        def func():
            with self.assertRaisesMessage(ValueError, "No") as cm:
                bridge.await_(fail(ValueError("No")))
            self.assertIsNone(cm.exception.__context__)
            return bridge.await_(value(1))

        self.assertEqual(self.run_on_loop(bridge.run(func)), 1)

    def test_exceptions_that_python_uses(self):
        async def empty():
            return
            yield

        def func(exc):
            with self.assertRaises(StopAsyncIteration):
                bridge.await_(anext(empty()))
            raise exc

        for exc in (StopAsyncIteration(), greenlet.GreenletExit(), SystemExit()):
            with self.subTest(exc=exc), self.assertRaises(type(exc)) as cm:
                self.run_on_loop(bridge.run(func, exc))
            self.assertIs(cm.exception, exc)
        # As in any coroutine.
        with self.assertRaisesMessage(RuntimeError, "coroutine raised StopIteration"):
            self.run_on_loop(bridge.run(func, StopIteration()))

    def test_traceback(self):
        """The frames are those of the user's code, from end to end."""

        async def view():
            await bridge.run(service)

        def service():
            async_to_sync(notify)()

        async def notify():
            await bridge.run(query)

        def query():
            bridge.await_(socket())

        async def socket():
            await asyncio.sleep(0)
            raise ValueError("No")

        try:
            self.run_on_loop(view())
        except ValueError as exc:
            names = [frame.name for frame in traceback.extract_tb(exc.__traceback__)]
        users = {"view", "service", "notify", "query", "socket"}
        self.assertEqual(
            [name for name in names if name in users],
            ["view", "service", "notify", "query", "socket"],
        )

    def test_exception_being_handled(self):
        async def info():
            await asyncio.sleep(0)
            return sys.exception()

        def func():
            exc = ValueError("No")
            try:
                raise exc
            except ValueError:
                wait()
                self.assertIs(sys.exception(), exc)
                self.assertIs(async_to_sync(info)(), exc)
            self.assertIsNone(sys.exception())
            self.assertIsNone(async_to_sync(info)())

        self.run_on_loop(bridge.run(func))

    def test_task(self):
        async def main():
            task = asyncio.current_task()
            loop = asyncio.get_running_loop()

            def func():
                for _ in range(2):
                    self.assertIs(asyncio.current_task(), task)
                    self.assertIs(asyncio.get_running_loop(), loop)
                    self.assertEqual(threading.get_ident(), ident)
                    wait()

            ident = threading.get_ident()
            await bridge.run(func)

        self.run_on_loop(main())

    def test_tasks_in_turn(self):
        log = []

        def func(name):
            for number in range(3):
                log.append((number, name))
                wait()
            return name

        async def main():
            return await asyncio.gather(*[bridge.run(func, name) for name in "abc"])

        self.assertEqual(self.run_on_loop(main()), ["a", "b", "c"])
        self.assertEqual(log, sorted(log))

    def test_nested(self):
        def func(depth):
            if not depth:
                return bridge.await_(value(0))
            return bridge.await_(bridge.run(func, depth - 1)) + 1

        self.assertEqual(self.run_on_loop(bridge.run(func, 100)), 100)

    def test_asynchronous_generator(self):
        log = []

        async def generate():
            try:
                while True:
                    yield await bridge.run(bridge.await_, value(1))
            finally:
                log.append(await bridge.run(bridge.await_, value("closed")))

        async def main():
            generator = generate()
            async for _ in generator:
                break
            await generator.aclose()
            # Closed by the loop, in a task of its own.
            async for _ in generate():
                break
            while len(log) < 2:
                await asyncio.sleep(0)

        self.run_on_loop(main())
        self.assertEqual(log, ["closed", "closed"])

    def test_current(self):
        async def main():
            self.assertIsNone(bridge.current())
            found = await bridge.run(func)
            self.assertIsNone(bridge.current())
            return found

        async def coroutine():
            return bridge.current()

        def func():
            found = bridge.current()
            self.assertIsNone(bridge.await_(coroutine()))
            self.assertIsNone(bridge.await_(asyncio.to_thread(bridge.current)))
            self.assertIs(bridge.current(), found)
            return found

        self.assertIsNone(bridge.current())
        self.assertIsNotNone(self.run_on_loop(main()))

    def test_outside(self):
        """A coroutine that can't be awaited is closed."""
        msg = "Synchronous code can wait for an awaitable only where"

        def refuse():
            coroutine = value(1)
            with self.assertRaisesMessage(RuntimeError, msg):
                bridge.await_(coroutine)
            self.assertIsNone(coroutine.cr_frame)

        async def main():
            refuse()
            await asyncio.to_thread(refuse)
            await bridge.run(bridge.await_, asyncio.to_thread(refuse))
            # A greenlet of somebody else.
            await bridge.run(lambda: greenlet.greenlet(refuse).switch())

        with warnings.catch_warnings(action="error"):
            refuse()
            self.run_on_loop(main())

    def test_recursion(self):
        def func(depth=0):
            return func(depth + 1)

        async def main():
            for _ in range(3):
                with self.assertRaises(RecursionError):
                    await bridge.run(func)
            return await bridge.run(bridge.await_, value(1))

        self.assertEqual(self.run_on_loop(main()), 1)

    def test_recursion_limit(self):
        """Waiting doesn't change how deep the code may go."""

        def depth():
            try:
                return depth() + 1
            except RecursionError:
                return 0

        def func():
            before = depth()
            wait()
            return before, depth()

        before, after = self.run_on_loop(bridge.run(func))
        self.assertLess(abs(before - after), 10)

    def test_two_loops(self):
        barrier = threading.Barrier(2, timeout=10)
        results = {}

        def func(name):
            found = []
            for _ in range(50):
                loop = asyncio.get_running_loop()
                wait()
                self.assertIs(asyncio.get_running_loop(), loop)
                barrier.wait()
                found.append(var.get())
            return found

        async def main(name):
            var.set(name)
            return await bridge.run(func, name)

        def thread(name):
            results[name] = asyncio.run(main(name))

        threads = [threading.Thread(target=thread, args=[name]) for name in "ab"]
        for one in threads:
            one.start()
        for one in threads:
            one.join(20)
        self.assertEqual(results, {"a": ["a"] * 50, "b": ["b"] * 50})

    @unittest.skipUnless(uvloop, "uvloop is required.")
    def test_uvloop(self):
        async def main():
            event = asyncio.Event()
            asyncio.get_running_loop().call_later(0.01, event.set)

            def func():
                with bridge.shielded():
                    wait()
                return async_to_sync(event.wait)()

            self.assertIsInstance(asyncio.get_running_loop(), uvloop.Loop)
            return await bridge.run(func)

        result = self.run_on_loop(main(), loop_factory=uvloop.new_event_loop)
        self.assertIs(result, True)

    def test_debug_mode(self):
        def func():
            with bridge.shielded():
                wait()
            async_to_sync(value)(1)
            with self.assertRaises(ValueError):
                bridge.await_(fail(ValueError()))

        async def main():
            await asyncio.gather(*[bridge.run(func) for _ in range(3)])
            task = asyncio.create_task(bridge.run(forever))
            await started(task)
            task.cancel()
            await asyncio.wait([task])

        with (
            warnings.catch_warnings(action="error"),
            self.assertNoLogs("asyncio", logging.ERROR),
        ):
            self.run_on_loop(main(), debug=True)

    def test_eager_task(self):
        """
        A task that begins in the greenlet which creates it isn't in the
        bridge, and goes on without that greenlet.
        """
        log = []

        async def eager():
            log.append(bridge.current())
            with self.assertRaises(SynchronousOnlyOperation):
                unsafe()
            log.append(await bridge.run(two_waits))
            return "task"

        def two_waits():
            wait()
            wait()
            return "bridge"

        def func():
            task = asyncio.get_running_loop().create_task(eager())
            log.append("created")
            return task

        def func_that_waits():
            log.append(bridge.await_(func()))

        async def main():
            asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
            task = await bridge.run(func)
            self.assertIs(task.done(), False)
            log.append(await task)
            self.assertEqual(log, [None, "created", "bridge", "task"])
            log.clear()
            await bridge.run(func_that_waits)
            self.assertEqual(log, [None, "created", "bridge", "task"])

        self.run_on_loop(main())


@unittest.skipUnless(greenlet, "greenlet is required.")
class ContextTests(BridgeTestCase):
    def test_context_is_shared(self):
        local = Local()

        async def coroutine():
            seen.append(var.get())
            var.set("coroutine")

        def func():
            seen.append((var.get(), local.value))
            var.set("bridge")
            local.value = 2
            bridge.await_(coroutine())
            seen.append(var.get())
            async_to_sync(coroutine)()
            token = var.set("temporary")
            wait()
            var.reset(token)

        async def main():
            var.set("task")
            local.value = 1
            await bridge.run(func)
            seen.append((var.get(), local.value))

        seen = []
        self.run_on_loop(main())
        self.assertEqual(
            seen, [("task", 1), "bridge", "coroutine", "coroutine", ("coroutine", 2)]
        )

    def test_context_of_other_tasks(self):
        def func(name):
            var.set(name)
            wait()
            return var.get()

        async def main():
            return await asyncio.gather(*[bridge.run(func, name) for name in "abc"])

        self.assertEqual(self.run_on_loop(main()), ["a", "b", "c"])

    def test_wait_in_copy_of_context(self):
        def inner():
            var.set("copy")
            wait()
            return var.get()

        def func():
            return contextvars.copy_context().run(inner), var.get()

        async def main():
            var.set("task")
            return await bridge.run(func)

        self.assertEqual(self.run_on_loop(main()), ("copy", "task"))


@unittest.skipUnless(greenlet, "greenlet is required.")
class CancellationTests(BridgeTestCase):
    def cancel_when_waiting(self, func):
        """Return the task that ran `func`, and was cancelled."""

        async def main():
            task = asyncio.create_task(bridge.run(func))
            await started(task)
            task.cancel()
            await asyncio.wait([task])
            return task

        return self.run_on_loop(main())

    def test_cancelled(self):
        log = []

        def func():
            try:
                forever()
            except asyncio.CancelledError:
                log.append("cancelled")
                raise
            finally:
                # It may go on waiting, as in a coroutine.
                log.append(bridge.await_(value("cleaned up")))

        task = self.cancel_when_waiting(func)
        self.assertIs(task.cancelled(), True)
        self.assertEqual(log, ["cancelled", "cleaned up"])

    def test_swallowed(self):
        def func():
            try:
                forever()
            except asyncio.CancelledError:
                return bridge.await_(value("swallowed"))

        self.assertEqual(self.cancel_when_waiting(func).result(), "swallowed")

    def test_awaitable_is_cancelled(self):
        log = []

        async def coroutine():
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                log.append("cleaned up")

        def func():
            async_to_sync(coroutine)()

        self.assertIs(self.cancel_when_waiting(func).cancelled(), True)
        self.assertEqual(log, ["cleaned up"])

    def test_timeout(self):
        def func():
            with self.assertRaises(TimeoutError):
                bridge.await_(asyncio.wait_for(asyncio.Event().wait(), 0.01))
            forever()

        async def main():
            async with asyncio.timeout(0.05):
                await bridge.run(func)

        with self.assertRaises(TimeoutError):
            self.run_on_loop(main())

    def test_task_group(self):
        log = []

        def func():
            try:
                forever()
            finally:
                log.append("left")

        async def main():
            async with asyncio.TaskGroup() as group:
                group.create_task(bridge.run(func))
                group.create_task(fail(ValueError("No")))

        with self.assertRaises(ExceptionGroup):
            self.run_on_loop(main())
        self.assertEqual(log, ["left"])

    def test_keyboard_interrupt(self):
        def func():
            wait()
            raise KeyboardInterrupt

        async def main():
            await bridge.run(func)

        with self.assertRaises(KeyboardInterrupt):
            asyncio.run(main())

    def test_keyboard_interrupt_while_waiting(self):
        log = []

        def func():
            asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGINT)
            try:
                wait(20)
            except asyncio.CancelledError:
                log.append("cancelled")
                raise
            finally:
                log.append(bridge.await_(value("cleaned up")))

        # The test runner has another one.
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, handler)
        with self.assertRaises(KeyboardInterrupt):
            asyncio.run(bridge.run(func))
        self.assertEqual(log, ["cancelled", "cleaned up"])


@unittest.skipUnless(greenlet, "greenlet is required.")
class ShieldTests(BridgeTestCase):
    def cancel(self, func, times=1):
        """
        Return the task that ran `func`, which was cancelled while it waited
        for an event that was set afterwards.
        """

        async def main():
            event = asyncio.Event()
            task = asyncio.create_task(bridge.run(func, event))
            await started(task)
            for _ in range(times):
                task.cancel()
                for _ in range(5):
                    await asyncio.sleep(0)
                self.assertIs(task.done(), False)
            event.set()
            await asyncio.wait([task])
            return task

        return self.run_on_loop(main())

    def test_cancelled_at_the_end(self):
        log = []

        def func(event):
            with bridge.shielded():
                log.append(bridge.await_(event.wait()))
                log.append(bridge.await_(value("again")))
            log.append("never")

        for times in (1, 3):
            with self.subTest(times=times):
                log.clear()
                task = self.cancel(func, times)
                self.assertIs(task.cancelled(), True)
                self.assertEqual(log, [True, "again"])

    def test_nested(self):
        log = []

        def func(event):
            with bridge.shielded():
                with bridge.shielded():
                    bridge.await_(event.wait())
                log.append("inner")
                wait()
            log.append("never")

        self.assertIs(self.cancel(func).cancelled(), True)
        self.assertEqual(log, ["inner"])

    def test_swallowed(self):
        def func(event):
            try:
                with bridge.shielded():
                    bridge.await_(event.wait())
            except asyncio.CancelledError:
                pass
            with bridge.shielded():
                return bridge.await_(value("swallowed"))

        self.assertEqual(self.cancel(func).result(), "swallowed")

    def test_exception(self):
        contexts = []

        def func(event):
            try:
                with bridge.shielded():
                    bridge.await_(event.wait())
                    bridge.await_(fail(ValueError("No")))
            except asyncio.CancelledError as exc:
                contexts.append(exc.__context__)
                raise

        self.assertIs(self.cancel(func).cancelled(), True)
        self.assertIsInstance(contexts[0], ValueError)

    def test_not_cancelled(self):
        def func():
            with bridge.shielded():
                self.assertEqual(bridge.await_(value(1)), 1)
                with self.assertRaisesMessage(ValueError, "No"):
                    bridge.await_(fail(ValueError("No")))
            with self.assertRaisesMessage(ValueError, "No"):
                with bridge.shielded():
                    bridge.await_(fail(ValueError("No")))
            return 2

        self.assertEqual(self.run_on_loop(bridge.run(func)), 2)

    def test_timeout_inside(self):
        def func():
            with bridge.shielded(), self.assertRaises(TimeoutError):
                bridge.await_(asyncio.wait_for(asyncio.Event().wait(), 0.01))
            return asyncio.current_task().cancelling()

        self.assertEqual(self.run_on_loop(bridge.run(func)), 0)

    def test_timeout_around(self):
        log = []

        def func():
            with bridge.shielded():
                wait(0.05)
                log.append("done")
            log.append("never")

        async def main():
            async with asyncio.timeout(0.01):
                await bridge.run(func)

        with self.assertRaises(TimeoutError):
            self.run_on_loop(main())
        self.assertEqual(log, ["done"])

    def test_end_of_the_loop(self):
        """asyncio.run() doesn't cancel what's shielded."""
        log = []

        def func():
            with bridge.shielded():
                wait(0.05)
                log.append("done")

        async def main():
            task = asyncio.create_task(bridge.run(func))
            await started(task)

        asyncio.run(main())
        self.assertEqual(log, ["done"])

    def test_context_is_shared(self):
        async def coroutine():
            var.set(var.get() + " coroutine")

        def func():
            var.set("bridge")
            with bridge.shielded():
                bridge.await_(coroutine())
            return var.get()

        self.assertEqual(self.run_on_loop(bridge.run(func)), "bridge coroutine")

    def test_eager_task_factory(self):
        async def main():
            asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
            return await bridge.run(func)

        def func():
            with bridge.shielded():
                return bridge.await_(value(1))

        self.assertEqual(self.run_on_loop(main()), 1)

    def test_outside_of_the_bridge(self):
        with bridge.shielded():
            pass


@unittest.skipUnless(greenlet, "greenlet is required.")
class ClosedTests(BridgeTestCase):
    """A coroutine that is closed, or lost, unwinds the code in the bridge."""

    def setUp(self):
        self.log = []

    def func(self):
        try:
            forever()
        except GeneratorExit:
            self.log.append("closed")
            raise
        finally:
            coroutine = value(1)
            try:
                bridge.await_(coroutine)
            except bridge.BridgeClosed:
                self.log.append("can't wait")
            self.assertIsNone(coroutine.cr_frame)

    def test_closed(self):
        async def main():
            coroutine = bridge.run(self.func)
            coroutine.send(None)
            coroutine.close()

        self.run_on_loop(main())
        self.assertEqual(self.log, ["closed", "can't wait"])

    def test_closed_while_shielded(self):
        def func():
            with bridge.shielded():
                self.func()

        async def main():
            coroutine = bridge.run(func)
            coroutine.send(None)
            coroutine.close()

        self.run_on_loop(main())
        self.assertEqual(self.log, ["closed", "can't wait"])

    def test_swallowed(self):
        def func():
            try:
                forever()
            except GeneratorExit:
                return 1

        async def main():
            coroutine = bridge.run(func)
            coroutine.send(None)
            coroutine.close()

        self.run_on_loop(main())

    def test_another_exception(self):
        def func():
            try:
                forever()
            finally:
                raise ValueError("No")

        async def main():
            coroutine = bridge.run(func)
            coroutine.send(None)
            with self.assertRaisesMessage(ValueError, "No"):
                coroutine.close()

        self.run_on_loop(main())

    def test_lost(self):
        async def main():
            coroutine = bridge.run(self.func)
            coroutine.send(None)
            del coroutine

        self.run_on_loop(main())
        self.assertEqual(self.log, ["closed", "can't wait"])

    def test_loop_closed(self):
        loop = asyncio.new_event_loop()
        task = loop.create_task(bridge.run(self.func))
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        with self.assertLogs("asyncio", logging.ERROR):
            del task
            gc.collect()
        self.assertEqual(self.log, ["closed", "can't wait"])

    def test_loop_closed_after_cancellation(self):
        """What's shielded isn't raised any more."""

        def func():
            with bridge.shielded():
                self.func()

        loop = asyncio.new_event_loop()
        task = loop.create_task(bridge.run(func))
        for _ in range(3):
            loop.run_until_complete(asyncio.sleep(0))
        task.cancel()
        for _ in range(3):
            loop.run_until_complete(asyncio.sleep(0))
        self.assertIs(task.done(), False)
        loop.close()
        with (
            self.assertLogs("asyncio", logging.ERROR),
            mock.patch("sys.unraisablehook") as hook,
        ):
            del task
            gc.collect()
        self.assertEqual(self.log, ["closed", "can't wait"])
        hook.assert_not_called()

    def test_nested(self):
        def outer():
            try:
                async_to_sync(bridge.run)(self.func)
            finally:
                self.log.append("outer")

        async def main():
            coroutine = bridge.run(outer)
            coroutine.send(None)
            coroutine.close()

        self.run_on_loop(main())
        self.assertEqual(self.log, ["closed", "can't wait", "outer"])

    def test_lost_in_another_thread(self):
        """
        The garbage collector may run anywhere. The code is unwound in its own
        thread.
        """
        threads = []

        def func():
            try:
                forever()
            finally:
                with self.assertRaises(bridge.BridgeClosed):
                    wait()
                threads.append(threading.get_ident())

        async def main():
            coroutines = [bridge.run(func)]
            coroutines[0].send(None)
            await asyncio.to_thread(coroutines.clear)
            # greenlet does it when it's used next.
            await bridge.run(int)

        with mock.patch("sys.unraisablehook") as hook:
            self.run_on_loop(main())
        hook.assert_not_called()
        self.assertEqual(threads, [threading.get_ident()])

    def test_no_reference_cycles(self):
        """What the code used is freed at once, whichever way it ends."""

        class Connection:
            pass

        references = []

        def func(end):
            connection = Connection()
            references.append(weakref.ref(connection))
            wait()
            with bridge.shielded():
                async_to_sync(value)(connection)
            end()

        def raise_error():
            raise ValueError

        async def raise_later():
            await asyncio.sleep(0)
            raise ValueError

        def raise_after_waiting():
            bridge.await_(raise_later())

        def raise_while_shielded():
            with bridge.shielded():
                bridge.await_(raise_later())

        async def main():
            await bridge.run(func, int)
            self.assertIsNone(references[-1]())
            for end in (raise_error, raise_after_waiting, raise_while_shielded):
                try:
                    await bridge.run(func, end)
                except ValueError:
                    pass
                self.assertIsNone(references[-1]())
            task = asyncio.create_task(bridge.run(func, forever))
            for _ in range(20):
                await asyncio.sleep(0)
            self.assertEqual(len(references), 5)
            task.cancel()
            await asyncio.wait([task])
            del task
            self.assertIsNone(references[-1]())

        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        self.run_on_loop(main())


@async_unsafe
def unsafe():
    return "safe"


class Service:
    @async_to_sync
    async def method(self, argument):
        await asyncio.sleep(0)
        return self, argument


@unittest.skipUnless(greenlet, "greenlet is required.")
class AsyncToSyncTests(BridgeTestCase):
    """Promise 14: Async safety stays, and the loop isn't stalled."""

    def test_same_loop(self):
        """The coroutine may wait for something only its loop can provide."""

        async def main():
            event = asyncio.Event()

            async def other():
                for _ in range(100):
                    await asyncio.sleep(0)
                event.set()

            async def coroutine():
                self.assertIs(asyncio.current_task(), task)
                await event.wait()
                return asyncio.get_running_loop()

            task = asyncio.current_task()
            other_task = asyncio.create_task(other())
            loop = await bridge.run(lambda: async_to_sync(coroutine)())
            self.assertIs(loop, asyncio.get_running_loop())
            await other_task

        self.run_on_loop(main())

    def test_and_bridge_again(self):
        async def coroutine(depth):
            return await bridge.run(func, depth)

        def func(depth):
            wait()
            return depth and 1 + async_to_sync(coroutine)(depth - 1)

        self.assertEqual(self.run_on_loop(bridge.run(func, 50)), 50)

    def test_and_thread_and_bridge_again(self):
        """bridge -> sync_to_async -> thread -> async_to_sync -> bridge."""
        idents = []

        def innermost():
            idents.append(threading.get_ident())
            wait()
            return bridge.current()

        def in_thread():
            self.assertIsNone(bridge.current())
            idents.append(threading.get_ident())
            return async_to_sync(bridge.run)(innermost)

        def func(thread_sensitive):
            run_in_thread = sync_to_async(in_thread, thread_sensitive=thread_sensitive)
            found = async_to_sync(run_in_thread)()
            self.assertIsNot(found, bridge.current())

        def test(thread_sensitive):
            idents.clear()
            self.run_on_loop(bridge.run(func, thread_sensitive))
            self.assertEqual(len(set(idents)), 2)
            self.assertEqual(idents[1], threading.get_ident())

        for thread_sensitive in (True, False):
            with self.subTest(thread_sensitive=thread_sensitive):
                test(thread_sensitive)

    def test_below_synchronous_code(self):
        """async_to_sync -> bridge -> sync_to_async: in the calling thread."""

        def func():
            return async_to_sync(sync_to_async(threading.get_ident))()

        async def main():
            return await bridge.run(func)

        self.assertEqual(async_to_sync(main)(), threading.get_ident())

    def test_method(self):
        service = Service()
        self.assertEqual(
            self.run_on_loop(bridge.run(lambda: service.method(1))), (service, 1)
        )
        self.assertEqual(service.method(1), (service, 1))

    def test_wrong_arguments(self):
        def func():
            with self.assertRaises(TypeError):
                async_to_sync(value)()
            return async_to_sync(value)(1)

        self.assertEqual(self.run_on_loop(bridge.run(func)), 1)

    def test_still_refused(self):
        msg = "You cannot use AsyncToSync in the same thread as an async event loop"

        def refused(func):
            with self.assertRaisesMessage(RuntimeError, msg):
                func(int)

        async def coroutine():
            refused(async_to_sync(bridge.run))

        def func():
            refused(async_to_sync(bridge.run, force_new_loop=True))
            async_to_sync(coroutine)()

        async def main():
            await coroutine()
            await bridge.run(func)

        self.run_on_loop(main())

    def test_asyncio_run(self):
        """It's refused by Python, as in any coroutine."""

        def func():
            coroutine = value(1)
            msg = "asyncio.run() cannot be called from a running event loop"
            with self.assertRaisesMessage(RuntimeError, msg):
                asyncio.run(coroutine)
            coroutine.close()

        self.run_on_loop(bridge.run(func))

    def test_async_unsafe(self):
        async def coroutine():
            with self.assertRaises(SynchronousOnlyOperation):
                unsafe()

        def callback():
            try:
                unsafe()
            except SynchronousOnlyOperation as exc:
                refused.set_result(exc)

        def func():
            nonlocal refused
            refused = asyncio.get_running_loop().create_future()
            self.assertEqual(unsafe(), "safe")
            async_to_sync(coroutine)()
            self.assertEqual(unsafe(), "safe")
            asyncio.get_running_loop().call_soon(callback)
            bridge.await_(refused)
            return unsafe()

        async def main():
            await coroutine()
            self.assertEqual(await bridge.run(func), "safe")
            await coroutine()

        refused = None
        with mock.patch.dict(os.environ):
            os.environ.pop("DJANGO_ALLOW_ASYNC_UNSAFE", None)
            self.run_on_loop(main())

    def test_signals(self):
        signal = Signal()
        log = []

        def sync_receiver(**kwargs):
            wait()
            log.append(("sync", bridge.current() is not None))

        async def async_receiver(**kwargs):
            await event.wait()
            log.append(("async", await bridge.run(unsafe)))
            return "async"

        async def failing_receiver(**kwargs):
            await fail(ValueError("No"))

        async def main():
            nonlocal event
            event = asyncio.Event()
            asyncio.get_running_loop().call_later(0.01, event.set)
            signal.connect(sync_receiver)
            signal.connect(async_receiver)
            responses = await bridge.run(signal.send, sender=None)
            self.assertIn((async_receiver, "async"), responses)
            signal.connect(failing_receiver)
            responses = await bridge.run(signal.send_robust, sender=None)
            self.assertIsInstance(dict(responses)[failing_receiver], ValueError)

        event = None
        with self.assertLogs("django.dispatch", logging.ERROR):
            self.run_on_loop(main())
        self.assertCountEqual(log, [("sync", True), ("async", "safe")] * 2)


class ImportTests(BridgeTestCase):
    def test_greenlet_is_not_imported(self):
        output = self.run_python(
            "import sys, django\n"
            "from django.conf import settings\n"
            "settings.configure(INSTALLED_APPS=['django.contrib.contenttypes', "
            "'django.contrib.auth'], DATABASES={'default': {'ENGINE': "
            "'django.db.backends.sqlite3', 'NAME': ':memory:'}})\n"
            "django.setup()\n"
            "from django.core.handlers.asgi import ASGIHandler\n"
            "from django.db import bridge, connection\n"
            "connection.ensure_connection()\n"
            "assert bridge.current() is None\n"
            "print('greenlet' in sys.modules)\n"
        )
        self.assertEqual(output, "False")

    def test_greenlet_is_missing(self):
        output = self.run_python(
            "import asyncio, sys\n"
            "sys.modules['greenlet'] = None\n"
            "from asgiref.sync import AsyncToSync\n"
            "from django.core.exceptions import ImproperlyConfigured\n"
            "from django.db import bridge\n"
            "call = AsyncToSync.__call__\n"
            "with bridge.shielded():\n"
            "    pass\n"
            "try:\n"
            "    asyncio.run(bridge.run(int))\n"
            "except ImproperlyConfigured as exc:\n"
            "    print(exc)\n"
            "assert AsyncToSync.__call__ is call\n"
        )
        self.assertEqual(
            output,
            "Running synchronous code on the event loop requires greenlet. Install "
            "it with 'python -m pip install greenlet'.",
        )
