"""
The limit: psycopg itself, with the SQL that an ORM would send at best.

It also prepares the tables, and looks at what others have written.
"""

import pathlib

import psycopg
from operations import AUTHORS_READ, BULK_SIZE, ITEMS, LIST_SIZE, SLEEP, VERIFIED_KEY
from psycopg.rows import namedtuple_row
from psycopg_pool import AsyncConnectionPool

SQL = pathlib.Path(__file__).resolve().parent.parent

COLUMNS = "id, name, price, created, note"


class Contender:
    def __init__(self, url):
        self.url = url

    async def open(self, pool_size):
        self.pool = AsyncConnectionPool(
            self.url,
            min_size=pool_size,
            max_size=pool_size,
            kwargs={"autocommit": True, "row_factory": namedtuple_row},
            open=False,
            timeout=120,
        )
        await self.pool.open(wait=True)

    async def close(self):
        await self.pool.close()

    async def get(self, key, table="bench_item"):
        async with self.pool.connection() as connection:
            cursor = await connection.execute(
                f"SELECT {COLUMNS} FROM {table} WHERE id = %s", [key]
            )
            return await cursor.fetchone()

    async def slow_get(self, key):
        return await self.get(key, "bench_slow_item")

    async def list(self, start):
        async with self.pool.connection() as connection:
            cursor = await connection.execute(
                f"SELECT {COLUMNS} FROM bench_item "
                "WHERE id >= %s AND id < %s ORDER BY id",
                [start, start + LIST_SIZE],
            )
            return await cursor.fetchall()

    async def transaction(self, key, table="bench_account"):
        async with self.pool.connection() as connection, connection.transaction():
            cursor = await connection.execute(
                f"SELECT id, balance FROM {table} WHERE id = %s FOR UPDATE", [key]
            )
            account = await cursor.fetchone()
            await connection.execute(
                f"UPDATE {table} SET balance = %s WHERE id = %s",
                [account.balance + 1, key],
            )
            cursor = await connection.execute(
                "INSERT INTO bench_entry (account_id, amount) "
                "VALUES (%s, %s) RETURNING id",
                [key, 1],
            )
            await cursor.fetchone()

    async def slow_transaction(self, key):
        await self.transaction(key, "bench_slow_account")

    async def prefetch(self, start):
        async with self.pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT id, name FROM bench_author "
                "WHERE id >= %s AND id < %s ORDER BY id",
                [start, start + AUTHORS_READ],
            )
            authors = await cursor.fetchall()
            related = []
            for table in ("bench_book", "bench_award"):
                cursor = await connection.execute(
                    f"SELECT id, author_id, title FROM {table} "
                    "WHERE author_id = ANY(%s) ORDER BY id",
                    [[author.id for author in authors]],
                )
                rows = {author.id: [] for author in authors}
                for row in await cursor.fetchall():
                    rows[row.author_id].append(row)
                related.append(rows)
        books, awards = related
        return [(author, books[author.id], awards[author.id]) for author in authors]

    async def bulk(self, key):
        # Not COPY, which no ORM here uses.
        async with self.pool.connection() as connection, connection.transaction():
            cursor = await connection.execute(
                "INSERT INTO bench_entry (account_id, amount) "
                "SELECT * FROM unnest(%s::bigint[], %s::int[]) RETURNING id",
                [[key] * BULK_SIZE, [1] * BULK_SIZE],
            )
            await cursor.fetchall()

    async def stream(self):
        count = total = 0
        async with (
            self.pool.connection() as connection,
            connection.transaction(),
            connection.cursor("stream") as cursor,
        ):
            cursor.itersize = 2000
            await cursor.execute(
                f"SELECT {COLUMNS} FROM bench_item WHERE id <= %s", [ITEMS]
            )
            async for item in cursor:
                count += 1
                total += item.id
        return count, total

    async def sleep(self):
        async with self.pool.connection() as connection:
            await connection.execute("SELECT pg_sleep(%s)", [SLEEP])

    # ##### For everybody #####

    def prepare(self):
        self._run("drop.sql", "schema.sql")

    def clean_up(self):
        self._run("drop.sql")

    def _run(self, *names):
        with psycopg.connect(self.url, autocommit=True) as connection:
            for name in names:
                connection.execute((SQL / name).read_text())

    def empty(self):
        """Drop what was inserted, so that nobody has a larger table."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("TRUNCATE bench_entry")
            connection.execute("VACUUM bench_account, bench_slow_account")
            connection.execute("CHECKPOINT")

    def server(self):
        with psycopg.connect(self.url) as connection:
            return connection.execute("SHOW server_version").fetchone()[0]

    def written(self):
        """Return what Operation.written is about."""
        with psycopg.connect(self.url) as connection:
            return connection.execute(
                "SELECT (SELECT balance FROM bench_account WHERE id = %(key)s), "
                "(SELECT balance FROM bench_slow_account WHERE id = %(key)s), "
                "(SELECT coalesce(sum(amount), 0)::bigint FROM bench_entry "
                "WHERE account_id = %(key)s)",
                {"key": VERIFIED_KEY},
            ).fetchone()
