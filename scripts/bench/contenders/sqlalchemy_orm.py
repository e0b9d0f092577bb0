"""
SQLAlchemy's asyncio ORM.

Whatever is one statement is executed in autocommit, as Django does it.
SQLAlchemy's default would send a BEGIN before and a ROLLBACK after it.
"""

from datetime import datetime

from operations import AUTHORS_READ, BULK_SIZE, LIST_SIZE, SLEEP
from sqlalchemy import BigInteger, DateTime, ForeignKey, String, Text, select, text
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    mapped_column,
    relationship,
    selectinload,
)

from .address import parameters


class Base(DeclarativeBase):
    pass


class ItemColumns:
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    price: Mapped[int]
    created: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    note: Mapped[str] = mapped_column(Text)


class Item(ItemColumns, Base):
    __tablename__ = "bench_item"


class SlowItem(ItemColumns, Base):
    __tablename__ = "bench_slow_item"


class AccountColumns:
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    balance: Mapped[int] = mapped_column(BigInteger)


class Account(AccountColumns, Base):
    __tablename__ = "bench_account"


class SlowAccount(AccountColumns, Base):
    __tablename__ = "bench_slow_account"


class Entry(Base):
    __tablename__ = "bench_entry"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    account_id: Mapped[int] = mapped_column(BigInteger)
    amount: Mapped[int]


class Author(Base):
    __tablename__ = "bench_author"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    books: Mapped[list["Book"]] = relationship()
    awards: Mapped[list["Award"]] = relationship()


class Book(Base):
    __tablename__ = "bench_book"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey("bench_author.id"))
    title: Mapped[str] = mapped_column(String(100))


class Award(Base):
    __tablename__ = "bench_award"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey("bench_author.id"))
    title: Mapped[str] = mapped_column(String(100))


class Contender:
    def __init__(self, url, driver):
        address = parameters(url)
        self.url = URL.create(
            f"postgresql+{driver}",
            username=address.pop("user", None),
            password=address.pop("password", None),
            database=address.pop("dbname"),
            query=address,
        )

    async def open(self, pool_size):
        self.engine = create_async_engine(
            self.url, pool_size=pool_size, max_overflow=0, pool_timeout=120
        )
        autocommit = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        self.reading = async_sessionmaker(autocommit)
        self.writing = async_sessionmaker(self.engine, expire_on_commit=False)
        connections = [await self.engine.connect() for _ in range(pool_size)]
        for connection in connections:
            await connection.close()

    async def close(self):
        await self.engine.dispose()

    async def get(self, key):
        async with self.reading() as session:
            return await session.get(Item, key)

    async def slow_get(self, key):
        async with self.reading() as session:
            return await session.get(SlowItem, key)

    async def list(self, start):
        items = select(Item).where(Item.id >= start, Item.id < start + LIST_SIZE)
        async with self.reading() as session:
            return (await session.scalars(items.order_by(Item.id))).all()

    async def transaction(self, key):
        await self._transaction(Account, key)

    async def slow_transaction(self, key):
        await self._transaction(SlowAccount, key)

    async def _transaction(self, model, key):
        async with self.writing() as session, session.begin():
            account = await session.get(model, key, with_for_update=True)
            account.balance += 1
            session.add(Entry(account_id=key, amount=1))

    async def prefetch(self, start):
        authors = (
            select(Author)
            .where(Author.id >= start, Author.id < start + AUTHORS_READ)
            .order_by(Author.id)
            .options(selectinload(Author.books), selectinload(Author.awards))
        )
        async with self.reading() as session:
            return [
                (author, author.books, author.awards)
                for author in await session.scalars(authors)
            ]

    async def bulk(self, key):
        async with self.writing() as session, session.begin():
            session.add_all([Entry(account_id=key, amount=1) for _ in range(BULK_SIZE)])

    async def stream(self):
        count = total = 0
        items = select(Item).execution_options(yield_per=2000)
        # Its cursors end with the transaction.
        async with self.writing() as session:
            result = await session.stream_scalars(items)
            # It takes longer to iterate over single rows.
            async for partition in result.partitions():
                for item in partition:
                    count += 1
                    total += item.id
        return count, total

    async def sleep(self):
        async with self.reading() as session:
            await session.execute(text("SELECT pg_sleep(:time)"), {"time": SLEEP})
