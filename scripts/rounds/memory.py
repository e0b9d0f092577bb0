"""
Whether a process that goes on for long needs more and more memory.

Waves of transfers, interrupted as those of money.py are, follow one another in
a process whose server and connections stay. After each one, everything that's
noted about it is deleted, and then there's to be as much as after the one
before: objects of each type, and blocks that Python has allocated, of which
each object has at least one.
"""

import asyncio
import time

from rounds.invariants import Count, check_growth
from rounds.money import BALANCE, CONCURRENT, Money

# Transfers before the first count, in which caches fill, and pools grow.
WARM_UP = 600

# Counts that are compared at least, and transfers.
COUNTS = 8
TRANSFERS = 600


class Memory(Money):
    name = "memory"

    def set_up(self):
        super().set_up()
        self.counts = None

    async def waves(self, server, deadline):
        if self.counts is None:
            # It's the warm-up of all rounds.
            await super().waves(server, deadline)
            return
        self.slots = asyncio.Semaphore(CONCURRENT[self.database])
        for _ in range(WARM_UP // self.wave_size):
            await self.forgotten_wave(server)
        least = max(COUNTS, TRANSFERS // self.wave_size)
        while len(self.counts) < least or time.monotonic() < deadline:
            await self.forgotten_wave(server)
            self.counts.append(Count())

    async def forgotten_wave(self, server):
        """Make transfers, audit and forget them."""
        await self.wave(server)
        await asyncio.to_thread(self.close_books)
        # asyncio doesn't drop timers as soon as they are cancelled, and keeps
        # the contexts of requests with them.
        for timer in asyncio.get_running_loop()._scheduled:
            if timer.cancelled():
                timer._context = None
        self.bank.counts["waves"] += 1

    def close_books(self):
        with self.observer() as observer:
            self.bank.audit(observer)
            observer.rows("DELETE FROM rounds_transfer")
            observer.rows("UPDATE rounds_account SET balance = %s", BALANCE)
        self.bank.known.clear()
        self.bank.reported.clear()

    def run(self):
        self.counts = []
        counts = super().run()
        middle = len(self.counts) // 2
        blocks = check_growth(self.counts, middle * self.wave_size)
        return {**counts, "most blocks more": max(blocks, 0)}
