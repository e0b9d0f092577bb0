"""
What is measured. run.py and worker.py both import this.
"""

from dataclasses import dataclass

# Rows in the tables, as schema.sql makes them.
ITEMS = 100_000
ACCOUNTS = 10_000
AUTHORS = 1_000

LIST_SIZE = 100
AUTHORS_READ = 20
BULK_SIZE = 1_000

# The account that is written to by who is verified.
VERIFIED_KEY = 4242

# What the sleeping and the slow operations wait for on the server, in seconds.
SLEEP = 0.1
LATENCY = 0.005


@dataclass(frozen=True)
class Operation:
    name: str
    title: str
    # How many tasks there are in each of its measurements.
    tasks: tuple
    # The largest number that its argument may be, or None without one.
    keys: int | None = None
    # What it adds to the balance of an account, to that of a slow account, and
    # to the sum of the account's entries.
    written: tuple = (0, 0, 0)
    pool: int = 10
    # Each task does it once, instead of again and again.
    once: bool = False
    # The shortest time that it can take, in seconds.
    at_least: float = 0
    # How long a measurement lasts besides the seconds asked for, to estimate.
    overhead: float = 0.5
    # What psycopg does instead, if it's a view that wrk asks for.
    view_of: str | None = None

    def arguments(self, number):
        """Return the arguments of one call: calls differ, and runs don't."""
        return () if self.keys is None else (number * 7919 % self.keys + 1,)


OPERATIONS = {
    operation.name: operation
    for operation in [
        Operation("get", "Get by key", (1, 50, 500), ITEMS),
        Operation("list", f"List of {LIST_SIZE}", (1, 50), ITEMS - LIST_SIZE),
        Operation(
            "transaction", "Transaction", (1, 50, 500), ACCOUNTS, written=(1, 0, 1)
        ),
        Operation(
            "prefetch",
            f"{AUTHORS_READ} objects, two relations prefetched",
            (1, 50),
            AUTHORS - AUTHORS_READ,
        ),
        Operation(
            "bulk",
            f"Bulk insert of {BULK_SIZE:,}",
            (1, 10),
            ACCOUNTS,
            written=(0, 0, BULK_SIZE),
        ),
        Operation("stream", f"Stream of {ITEMS:,}", (1,), overhead=3),
        Operation(
            "slow_get",
            f"Get by key, {LATENCY * 1000:.0f} ms on the server",
            (50,),
            ITEMS,
            at_least=LATENCY,
        ),
        Operation(
            "slow_transaction",
            f"Transaction, {LATENCY * 1000:.0f} ms on the server",
            (50,),
            ACCOUNTS,
            written=(0, 1, 1),
            at_least=LATENCY,
        ),
        Operation(
            "sleep",
            f"pg_sleep({SLEEP}), once per task, pool of 50",
            (1000,),
            pool=50,
            once=True,
            at_least=SLEEP,
            overhead=2.5,
        ),
        Operation(
            "http",
            "Get by key in a view under uvicorn, by wrk",
            (50,),
            ITEMS,
            view_of="get",
            overhead=1.5,
        ),
        Operation(
            "http_atomic",
            "The same view with ATOMIC_REQUESTS",
            (50,),
            ITEMS,
            view_of="get",
            overhead=1.5,
        ),
    ]
}
