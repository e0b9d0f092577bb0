import asyncio
import threading
import time

from django.db.turns import Turn
from django.test import SimpleTestCase


def always():
    return True


def never():
    return False


class Thread(threading.Thread):
    """A thread that takes a turn as soon as it gets it."""

    def __init__(self, turn, ready, timeout=10, log=None):
        super().__init__(daemon=True)
        self.turn, self.ready, self.timeout, self.log = turn, ready, timeout, log
        self.asked = threading.Event()
        self.taken = None
        self.start()

    def ready_to_take(self):
        self.asked.set()
        return self.ready()

    def run(self):
        self.taken = self.turn.take(self.ident, self.ready_to_take, self.timeout)
        if self.taken and self.log is not None:
            self.log.append(self)
            self.turn.give()


class TurnTests(SimpleTestCase):
    def setUp(self):
        self.turn = Turn()

    def wait_for_requests(self, count):
        while len(self.turn._requests) < count:
            time.sleep(0.001)

    def test_taking(self):
        self.assertIs(self.turn.take("a", always, 0), True)
        self.assertIs(self.turn.take("b", always, 0), False)
        self.turn.give()
        self.assertIs(self.turn.take("b", always, 0), True)

    def test_holder_takes_it_again(self):
        """What must hold for others isn't asked."""
        self.turn.take("a", always, 0)
        self.assertIs(self.turn.take("a", never, 0), True)
        self.assertEqual(self.turn.depth, 2)
        self.turn.give()
        self.assertIs(self.turn.take("b", always, 0), False)
        self.turn.give()
        self.assertIs(self.turn.take("b", always, 0), True)

    def test_passing_it_on(self):
        """Whoever it's passed on to comes before those who wait."""
        self.turn.take("a", always, 0)
        thread = Thread(self.turn, always)
        self.wait_for_requests(1)
        self.turn.pass_on("b")
        self.assertIs(self.turn.take("b", always, 0), False)
        self.turn.give()
        self.assertEqual(self.turn._holder, "b")
        self.assertEqual(self.turn.depth, 1)
        self.turn.give()
        thread.join()
        self.assertIs(thread.taken, True)

    def test_not_ready(self):
        self.assertIs(self.turn.take("a", never, 0.01), False)
        self.assertEqual(self.turn._requests, [])

    def test_waiting_for_the_holder(self):
        self.turn.take("a", always, 0)
        thread = Thread(self.turn, always)
        self.wait_for_requests(1)
        self.turn.give()
        thread.join()
        self.assertIs(thread.taken, True)
        self.assertEqual(self.turn._holder, thread.ident)

    def test_waiting_for_a_holder_that_works(self):
        self.turn.take("a", always, 0)
        self.turn.works = True
        thread = Thread(self.turn, always, 0.05)
        self.wait_for_requests(1)
        thread.join(0.2)
        self.assertIs(thread.is_alive(), True)
        self.assertIs(self.turn.take("leaves", always, 0.05, patient=False), False)
        # It may be done with a statement, but not with the turn.
        begin = time.monotonic()
        self.turn.works = False
        self.turn.finished += 1
        thread.join(10)
        self.assertGreater(time.monotonic() - begin, 0.05)
        self.assertIs(thread.taken, False)

    def test_waiting_for_a_change(self):
        ready = False
        thread = Thread(self.turn, lambda: ready)
        self.wait_for_requests(1)
        self.turn.changed()
        self.assertIs(thread.is_alive(), True)
        ready = True
        self.turn.changed()
        thread.join()
        self.assertIs(thread.taken, True)

    def test_granted_before_anybody_gets_in_between(self):
        """A thread that gives and takes in a loop doesn't keep others out."""
        self.turn.take("a", always, 0)
        Thread(self.turn, always)
        self.wait_for_requests(1)
        self.turn.give()
        self.assertIs(self.turn.take("a", always, 0), False)

    def test_order_of_arrival(self):
        log = []
        self.turn.take("a", always, 0)
        threads = []
        for count in range(1, 6):
            threads.append(Thread(self.turn, always, log=log))
            self.wait_for_requests(count)
        self.turn.give()
        for thread in threads:
            thread.join()
        self.assertEqual(log, threads)

    def test_those_not_ready_are_left_out(self):
        self.turn.take("a", always, 0)
        first = Thread(self.turn, never, timeout=0.2)
        self.wait_for_requests(1)
        second = Thread(self.turn, always)
        self.wait_for_requests(2)
        self.turn.give()
        second.join()
        first.join()
        self.assertIs(first.taken, False)
        self.assertIs(second.taken, True)

    def test_waiter_that_is_busy(self):
        """It isn't given the turn, and asks again by itself."""
        turn = self.turn
        offers = []

        class Busy:
            def grant(self):
                offers.append(self)
                return False

            def wait(self, timeout):
                turn.give()

        turn.take("a", always, 0)
        self.assertIs(turn.take("b", always, 10, Busy), True)
        self.assertEqual(len(offers), 1)


class AsyncTurnTests(SimpleTestCase):
    def setUp(self):
        self.turn = Turn()

    async def test_ready(self):
        self.assertIs(await self.turn.comes(always, 0), True)

    async def test_too_late(self):
        self.assertIs(await self.turn.comes(never, 0.01), False)
        self.assertEqual(self.turn._requests, [])

    async def test_a_change_made_in_a_thread(self):
        ready = False
        task = asyncio.create_task(self.turn.comes(lambda: ready, 10))
        await asyncio.sleep(0.01)
        self.turn.changed()
        await asyncio.sleep(0.01)
        self.assertIs(task.done(), False)
        ready = True
        await asyncio.to_thread(self.turn.changed)
        self.assertIs(await task, True)

    async def test_does_not_take_the_turn(self):
        await self.turn.comes(always, 0)
        self.assertIs(self.turn.take("a", always, 0), True)

    async def test_cancellation_leaves_nothing(self):
        task = asyncio.create_task(self.turn.comes(never, 10))
        await asyncio.sleep(0)
        task.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await task
        self.assertEqual(self.turn._requests, [])

    def test_loop_closed_while_waiting(self):
        loop = asyncio.new_event_loop()
        coroutine = self.turn.comes(always if self.turn._requests else never, 10)
        task = loop.create_task(coroutine)
        loop.run_until_complete(asyncio.sleep(0))
        request = self.turn._requests[0]
        request.ready = always
        task.cancel()
        with self.assertRaises(asyncio.CancelledError):
            loop.run_until_complete(task)
        self.turn._requests.append(request)
        loop.close()
        self.turn.changed()
        self.assertIs(self.turn.take("a", always, 0), True)
