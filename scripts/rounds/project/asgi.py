"""
The application that the server serves: Django's, a consumer of websockets, and
what the round wants to know about the process.
"""

import asyncio
import faulthandler
import gc
import io
import json
import os
import re
import signal
import sys
import threading
from collections import Counter
from contextlib import ExitStack

from asgiref.sync import sync_to_async
from rounds.base import watch_for_stalls
from rounds.invariants import memory

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.db import connections

handle_http = get_asgi_application()

from rounds.project import jobs, usage  # NOQA: E402 isort:skip
from rounds.project.consumer import consume  # NOQA: E402 isort:skip

stalls = None

# The round asks for the stacks of threads by it, if it's not answered.
faulthandler.register(signal.SIGUSR1)


async def application(scope, receive, send):
    if scope["type"] == "lifespan":
        await live(receive, send)
    elif scope["type"] == "websocket":
        await consume(scope, receive, send)
    elif scope["path"] == "/state/":
        await respond(send, state())
    elif scope["path"] == "/tasks/":
        await respond(send, task_stacks())
    else:
        with usage.Usage(scope["path"]):
            await handle_http(scope, receive, send)


async def live(receive, send):
    global stalls

    await receive()
    is_native = settings.DATABASES["default"]["ASYNC_NATIVE"]
    with ExitStack() as stack:
        stalls = stack.enter_context(
            watch_for_stalls(asyncio.get_running_loop(), limited=is_native)
        )
        await send({"type": "lifespan.startup.complete"})
        await receive()
    await asyncio.gather(*jobs.tasks)
    await connections.aclose_all()
    await sync_to_async(close_pools)()
    await send({"type": "lifespan.shutdown.complete"})


def close_pools():
    for connection in connections.all():
        if connection.settings_dict["OPTIONS"].get("pool"):
            connection.close_pool()


async def respond(send, content):
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


def task_stacks():
    text = io.StringIO()
    for task in asyncio.all_tasks():
        task.print_stack(file=text)
    return text.getvalue().splitlines()


def state():
    """Return what the process has, without using a database."""
    gc.collect()
    descriptors = Counter(
        re.sub(r"\d+", "N", os.readlink(f"/proc/self/fd/{number}"))
        for number in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{number}")
    )
    threads = Counter(
        re.sub(r"\d+", "N", thread.name)
        for thread in threading.enumerate()
        # Those are the event loop's, which starts some more when it likes.
        if not thread.name.startswith(("asyncio_", "uvloop_"))
    )
    lent = {}
    for alias in connections:
        if connections.settings[alias]["OPTIONS"].get("pool"):
            stats = connections[alias].pool.get_stats()
            lent[alias] = stats["pool_size"] - stats["pool_available"]
            # A pool grows when it's used.
            descriptors["socket:[N]"] -= stats["pool_size"]
    return {
        "active": len(usage.active),
        "jobs": len(jobs.tasks),
        "held": {
            "threads": threads,
            "descriptors": descriptors,
            "tasks": {"all": len(asyncio.all_tasks())},
            "lent connections": lent,
        },
        "most_opened": usage.most_opened,
        "memory": memory(),
        "stall": stalls.longest,
        "stack": stalls.stack,
        "python": sys.version.split()[0],
    }
