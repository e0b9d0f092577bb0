"""
Record the forum's race with the Django that is on the path.

draw.py starts this, once with stock Django and once with the fork. It uses the
server that DATABASE_URL names, creates one table there and drops it. The
output is a JSON object: the events, and what became of the rows.

The race: an import has begun, which uses the database now and then. Ada
registers: in a block, the application looks whether there's an Ada, and
creates her. The import goes on in between. Then the registration fails.

Exit codes: 0 if the race was recorded, 2 if the server does not answer.
"""

import asyncio
import contextlib
import json
import os
import sys

import demo_worker
import postgres
from own_server import ServerError

from django.db import connection

TIMEOUT = 20

IMPORT, REGISTER = "import", "register()"


class Failure(Exception):
    """Why the registration is rolled back."""


async def race():
    """Return whether the import saw Ada before she was committed."""
    # Not on top: Django has to be configured.
    from tracing.base import who

    Entry, block = demo_worker.Entry, demo_worker.offer.block
    begun, checked, wrote, created, read = (asyncio.Event() for _ in range(5))

    async def import_rows():
        who.set(IMPORT)
        await Entry.objects.acount()
        begun.set()
        await checked.wait()
        await Entry.objects.acreate(name="row 1")
        wrote.set()
        await created.wait()
        seen = await Entry.objects.filter(name="Ada").aexists()
        read.set()
        return seen

    async def register():
        who.set(REGISTER)
        await begun.wait()
        with contextlib.suppress(Failure):
            async with block():
                if not await Entry.objects.filter(name="Ada").aexists():
                    checked.set()
                    await wrote.wait()
                    await Entry.objects.acreate(name="Ada")
                    created.set()
                    await read.wait()
                raise Failure

    async with asyncio.timeout(TIMEOUT), asyncio.TaskGroup() as tasks:
        task = tasks.create_task(import_rows())
        tasks.create_task(register())
    return task.result()


def main():
    """Record the race; return the exit code."""
    try:
        database = postgres.database_settings(os.environ["DATABASE_URL"])
    except ServerError as error:
        print(error, file=sys.stderr)
        return 2
    database["ENGINE"] = "tracing"
    demo_worker.configure(database, native=False)
    with connection.schema_editor() as editor:
        editor.create_model(demo_worker.Entry)
    observer = demo_worker.Observer(os.environ["DATABASE_URL"])
    try:
        seen = asyncio.run(race())
        committed = observer.names()
    finally:
        table = demo_worker.Entry._meta.db_table
        observer.connection.execute(f"DROP TABLE {table}")
        observer.connection.close()
    from tracing.base import events

    result = {"events": events, "seen": seen, "committed": sorted(committed)}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
