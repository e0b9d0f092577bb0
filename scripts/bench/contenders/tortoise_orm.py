"""Tortoise ORM. It reads all rows of a query at once, so it has no stream."""

from operations import AUTHORS_READ, BULK_SIZE, LIST_SIZE, SLEEP
from tortoise import Tortoise, connections, fields
from tortoise.models import Model
from tortoise.transactions import in_transaction

from .address import parameters


class Item(Model):
    id = fields.BigIntField(primary_key=True, generated=False)
    name = fields.CharField(max_length=100)
    price = fields.IntField()
    created = fields.DatetimeField()
    note = fields.TextField()

    class Meta:
        table = "bench_item"


class SlowItem(Model):
    id = fields.BigIntField(primary_key=True, generated=False)
    name = fields.CharField(max_length=100)
    price = fields.IntField()
    created = fields.DatetimeField()
    note = fields.TextField()

    class Meta:
        table = "bench_slow_item"


class Account(Model):
    id = fields.BigIntField(primary_key=True, generated=False)
    balance = fields.BigIntField()

    class Meta:
        table = "bench_account"


class SlowAccount(Model):
    id = fields.BigIntField(primary_key=True, generated=False)
    balance = fields.BigIntField()

    class Meta:
        table = "bench_slow_account"


class Entry(Model):
    id = fields.BigIntField(primary_key=True)
    account_id = fields.BigIntField()
    amount = fields.IntField()

    class Meta:
        table = "bench_entry"


class Author(Model):
    id = fields.BigIntField(primary_key=True, generated=False)
    name = fields.CharField(max_length=100)

    class Meta:
        table = "bench_author"


class Book(Model):
    id = fields.BigIntField(primary_key=True, generated=False)
    author = fields.ForeignKeyField("bench.Author", related_name="books")
    title = fields.CharField(max_length=100)

    class Meta:
        table = "bench_book"


class Award(Model):
    id = fields.BigIntField(primary_key=True, generated=False)
    author = fields.ForeignKeyField("bench.Author", related_name="awards")
    title = fields.CharField(max_length=100)

    class Meta:
        table = "bench_award"


class Contender:
    def __init__(self, url, driver):
        self.address = parameters(url)
        self.driver = driver

    async def open(self, pool_size):
        address = self.address
        credentials = {
            "host": address.get("host"),
            "port": int(address.get("port", 5432)),
            "user": address.get("user"),
            "password": address.get("password"),
            "database": address["dbname"],
            "minsize": pool_size,
            "maxsize": pool_size,
        }
        if self.driver == "psycopg":
            credentials["timeout"] = 120
        database = {
            "engine": f"tortoise.backends.{self.driver}",
            "credentials": credentials,
        }
        await Tortoise.init(
            {
                "connections": {"default": database},
                "apps": {
                    "bench": {"models": [__name__], "default_connection": "default"}
                },
                "use_tz": True,
            }
        )
        # It opens the pool.
        await connections.get("default").execute_query("SELECT 1")

    async def close(self):
        await Tortoise.close_connections()

    async def get(self, key):
        return await Item.get(id=key)

    async def slow_get(self, key):
        return await SlowItem.get(id=key)

    async def list(self, start):
        return await Item.filter(id__gte=start, id__lt=start + LIST_SIZE).order_by("id")

    async def transaction(self, key):
        await self._transaction(Account, key)

    async def slow_transaction(self, key):
        await self._transaction(SlowAccount, key)

    async def _transaction(self, model, key):
        async with in_transaction():
            account = await model.select_for_update().get(id=key)
            account.balance += 1
            await account.save(update_fields=["balance"])
            await Entry.create(account_id=key, amount=1)

    async def prefetch(self, start):
        authors = Author.filter(id__gte=start, id__lt=start + AUTHORS_READ)
        return [
            (author, list(author.books), list(author.awards))
            for author in await authors.order_by("id").prefetch_related(
                "books", "awards"
            )
        ]

    async def bulk(self, key):
        await Entry.bulk_create(
            [Entry(account_id=key, amount=1) for _ in range(BULK_SIZE)]
        )

    async def sleep(self):
        await connections.get("default").execute_query(f"SELECT pg_sleep({SLEEP})")
