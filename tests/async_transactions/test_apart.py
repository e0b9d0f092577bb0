"""
Promises 1, 2 and 5: receivers of asend() share a context, but not the blocks
that they open.
"""

import asyncio
import contextvars

from asgiref.sync import async_to_sync, sync_to_async

from django.db import belonging, transaction
from django.dispatch import Signal

from .base import AsyncTransactionTestCase, until

variable = contextvars.ContextVar("variable", default=None)


class ReceiverTests(AsyncTransactionTestCase):
    def setUp(self):
        super().setUp()
        self.signal = Signal()
        self.entered = asyncio.Event()
        self.seen = asyncio.Event()

    def test_blocks_are_kept_apart(self):
        async def opens(**kwargs):
            atomic = transaction.atomic()
            await sync_to_async(atomic.__enter__)()
            try:
                block = belonging.current()
                self.entered.set()
                await until(self.seen)
                return block, belonging.current()
            finally:
                await sync_to_async(atomic.__exit__)(None, None, None)

        async def other(**kwargs):
            await until(self.entered)
            self.seen.set()
            return belonging.current()

        self.signal.connect(other)
        self.signal.connect(opens)
        with transaction.atomic():
            outer = belonging.current()
            responses = dict(async_to_sync(self.signal.asend)(self))
            self.assertIs(belonging.current(), outer)
        before, after = responses[opens]
        self.assertIs(before, after)
        self.assertIsNot(before, outer)
        self.assertIs(responses[other], outer)

    async def test_context_variables_are_shared(self):
        async def sets(**kwargs):
            variable.set("receiver")
            self.entered.set()

        async def gets(**kwargs):
            await until(self.entered)
            return variable.get()

        self.signal.connect(gets)
        self.signal.connect(sets)
        responses = dict(await self.signal.asend(self))
        self.assertEqual(responses[gets], "receiver")
