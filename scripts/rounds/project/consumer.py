"""
A consumer of a websocket, which uses the database for as long as that's open.

It's no request, so nobody else closes its connections.
"""

from rounds.project import usage
from rounds.project.models import Message

from django.db import aclose_old_connections, transaction


class Disconnected(Exception):
    pass


class Withdrawn(Exception):
    pass


async def consume(scope, receive, send):
    await receive()
    await send({"type": "websocket.accept"})

    async def answer(text):
        await send({"type": "websocket.send", "text": text})

    async def text():
        event = await receive()
        if event["type"] == "websocket.disconnect":
            raise Disconnected
        return event["text"]

    consumer = object()
    usage.active.add(consumer)
    try:
        while True:
            await handle(await text(), text, answer)
            # Whatever it has used isn't needed until the next message.
            await aclose_old_connections()
    except Disconnected:
        pass
    finally:
        await aclose_old_connections()
        usage.active.discard(consumer)


async def handle(message, text, answer):
    """Write a message, and if it's to be held, ask what becomes of it."""
    command, name = message.split()
    try:
        async with transaction.aatomic():
            await Message.objects.acreate(name=name)
            if command == "hold":
                await answer("held")
                if await text() != "commit":
                    raise Withdrawn
    except Withdrawn:
        await answer(f"withdrawn {name}")
    else:
        await answer(f"saved {name} {await Message.objects.filter(name=name).acount()}")
