"""
Who takes part.

A contender is a class Contender in a module of this package, which only
worker.py imports, in the environment with its requirements. Its methods are
the operations of operations.py, as coroutine functions, or as functions if it
has `threads`. It has no method for what its ORM can't do. The others:

open(pool_size), close()
    Connect, and disconnect: before and after each measurement. What open()
    returns is ready, so nobody is measured while connecting.

hold(key, wait)
    Read an account in a transaction, and wait in it, see waiting_memory.py.
    A coroutine function that `blocks` waits in a thread.
"""

from dataclasses import dataclass, field

DRIVER = "psycopg[binary,pool]"
SERVER = ("uvicorn", "httptools")


@dataclass(frozen=True)
class Contender:
    name: str
    title: str
    module: str
    requirements: tuple
    # What its class is called with, besides the address of the server.
    options: dict = field(default_factory=dict)
    # Stock Django is installed; the fork's tree comes first on the path.
    is_fork: bool = False


def contenders(stock):
    """Return all of them, by name. `stock` is stock Django's requirement."""
    django = (stock, DRIVER, *SERVER)
    fork = (*django, "asgiref>=3.13.0", "greenlet>=3.1")
    everybody = [
        Contender(
            "native",
            "fork, native mode",
            "django_async",
            fork,
            {"mode": "native"},
            is_fork=True,
        ),
        Contender(
            "thread",
            "fork, thread mode",
            "django_async",
            fork,
            {"mode": "thread"},
            is_fork=True,
        ),
        Contender("fork-sync", "fork, sync, 10 threads", "django_sync", fork, {}, True),
        Contender(
            "stock-async",
            "stock Django, async",
            "django_async",
            django,
            {"mode": "stock"},
        ),
        Contender(
            "stock-sync", "stock Django, sync, 10 threads", "django_sync", django
        ),
        Contender(
            "async-backend",
            "django-async-backend",
            "async_backend",
            (*django, "django-async-backend"),
        ),
        Contender(
            "sqlalchemy-psycopg",
            "SQLAlchemy, psycopg",
            "sqlalchemy_orm",
            ("SQLAlchemy[asyncio]", DRIVER),
            {"driver": "psycopg"},
        ),
        Contender(
            "sqlalchemy-asyncpg",
            "SQLAlchemy, asyncpg",
            "sqlalchemy_orm",
            ("SQLAlchemy[asyncio]", "asyncpg"),
            {"driver": "asyncpg"},
        ),
        Contender(
            "tortoise-psycopg",
            "Tortoise, psycopg",
            "tortoise_orm",
            ("tortoise-orm[psycopg]", DRIVER),
            {"driver": "psycopg"},
        ),
        Contender(
            "tortoise-asyncpg",
            "Tortoise, asyncpg",
            "tortoise_orm",
            ("tortoise-orm[asyncpg]",),
            {"driver": "asyncpg"},
        ),
        Contender("raw", "psycopg, no ORM", "raw_psycopg", (DRIVER,)),
    ]
    return {contender.name: contender for contender in everybody}
