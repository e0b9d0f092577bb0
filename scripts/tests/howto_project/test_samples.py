"""
Do the samples of docs/howto.md do what the page says?

What a section's samples define is in one namespace; a later sample of it
replaces names of an earlier one.
"""

import asyncio
import re
import unittest

import samples
from asgiref.sync import async_to_sync
from shop.models import Account, LogEntry, Order

from django.db import connection, sharing
from django.test import TransactionTestCase

SECTIONS = samples.sections()

# Seconds.
TIMEOUT = 10
TURN_TIMEOUT = 0.3


def is_in_memory():
    return connection.vendor == "sqlite" and connection.is_in_memory_db()


def run(function, *args):
    """Run a coroutine function in a task of its own, called "main"."""

    async def main():
        task = asyncio.create_task(function(*args), name="main")
        return await asyncio.wait_for(task, TIMEOUT)

    # Synchronous code runs in this thread, as in an asynchronous test.
    return async_to_sync(main)()


class SampleTestCase(TransactionTestCase):
    def sample(self, title, *names):
        """Execute the section's samples; return what has these names."""
        namespace = SECTIONS[title].execute()
        return [namespace[name] for name in names]

    def names(self, model):
        field = "text" if model is LogEntry else "name"
        return sorted(model.objects.values_list(field, flat=True))


class RecipeTests(SampleTestCase):
    def test_function(self):
        title = "A synchronous function, called by `sync_to_async()`"
        register, sign_up, marry = self.sample(title, "register", "sign_up", "marry")
        run(register, "Ada")
        run(marry, "Ada", "Ada L.")
        self.assertEqual(self.names(Account), ["Ada L."])
        with self.assertRaisesMessage(Exception, ""):
            run(register, "Ada L.")
        self.assertEqual(self.names(LogEntry), ["Ada registered"])
        # The first sample's function, which the second one replaces.
        first = SECTIONS[title].texts("python")[0]
        namespace = {}
        exec(first, namespace)
        run(namespace["sign_up"], "Grace")
        self.assertEqual(self.names(Account), ["Ada L.", "Grace"])

    def test_subclass(self):
        (transfer,) = self.sample(
            "A subclass of `Atomic` with `__aenter__()` and `__aexit__()`", "transfer"
        )
        Account.objects.create(name="a", balance=5)
        Account.objects.create(name="b")
        run(transfer, "a", "b", 2)
        self.assertEqual(
            list(Account.objects.order_by("name").values_list("balance", flat=True)),
            [3, 2],
        )

    def test_functions(self):
        (place_order,) = self.sample(
            "`transaction`'s functions, called by `sync_to_async()`", "place_order"
        )
        run(place_order, "tea")
        self.assertEqual(self.names(LogEntry), ["tea confirmed"])


class PoolTests(SampleTestCase):
    def test_session_state(self):
        (count_slowly,) = self.sample("Pools", "count_slowly")
        if is_in_memory():
            self.skipTest("There's but one connection.")
        Order.objects.create(name="tea")
        self.assertEqual(run(count_slowly, Order), 1)


class TaskTests(SampleTestCase):
    def sample(self, *names):
        return super().sample("Tasks inside blocks", *names)

    def test_group(self):
        (place_orders,) = self.sample("place_orders")
        run(place_orders, ["tea", "coffee"])
        with self.assertRaises(ExceptionGroup):
            run(place_orders, ["milk", "too long " * 100, None])
        self.assertEqual(self.names(Order), ["coffee", "tea"])

    def test_separately(self):
        (place_orders,) = self.sample("place_orders_separately")
        run(place_orders, ["tea", "coffee"])
        with self.assertRaises(ExceptionGroup):
            run(place_orders, [None])
        self.assertEqual(self.names(Order), ["coffee", "tea"])

    @unittest.skipIf(connection.vendor == "sqlite", "It has one writer.")
    def test_new_connection(self):
        (try_order,) = self.sample("try_order")

        async def check(order):
            raise ValueError

        with self.assertRaises(ValueError):
            run(try_order, "tea", check)
        self.assertEqual(self.names(Order), [])
        self.assertEqual(self.names(LogEntry), ["tea tried"])

    def test_timeout(self):
        (order_with_note,) = self.sample("order_with_note")

        async def write_note(order):
            await LogEntry.objects.acreate(text="note")
            await asyncio.Event().wait()

        run(order_with_note, "tea", write_note)
        self.assertEqual(self.names(Order), ["tea"])
        self.assertEqual(self.names(LogEntry), ["tea has no note"])


class ErrorTests(SampleTestCase):
    def setUp(self):
        self.addCleanup(setattr, sharing, "TURN_TIMEOUT", sharing.TURN_TIMEOUT)
        sharing.TURN_TIMEOUT = TURN_TIMEOUT

    def message(self, exc):
        message = str(exc).replace(f"{TURN_TIMEOUT} seconds", "30 seconds")
        name = type(exc).__name__
        if name == "TransactionManagementError":
            return message
        return f"{name}: {message}"

    def test_errors(self):
        """The samples get the message that's above them, or don't."""
        for title, section in ERRORS.items():
            if "other transaction's" in title and is_in_memory():
                continue
            with self.subTest(title=title):
                namespace = section.execute()
                (expected,) = section.texts("text")
                with self.assertRaises(Exception) as raised:
                    run(namespace["wrong"])
                pattern = re.escape(expected.rstrip()).replace("…", ".+")
                self.assertRegex(self.message(raised.exception), f"^{pattern}$")
                run(namespace["right"])


ERRORS = {
    title: section
    for title, section in SECTIONS.items()
    if section.level == 3 and section.texts("text")
}

CASES = SECTIONS["Tests"].execute()


class AccountTests(CASES["AccountTests"]):
    """The page's, as they are."""


class IsolationTests(CASES["IsolationTests"]):
    def setUp(self):
        if is_in_memory():
            self.skipTest("There's but one connection.")
