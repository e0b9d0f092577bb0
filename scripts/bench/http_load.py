"""
A server of HTTP in the process of a contender, and wrk, which asks it.
"""

import asyncio
import contextlib
import json
import re
import socket
import time
import urllib.request

# In seconds. wrk measures whole ones.
WARM_UP = 1
SHORTEST = 2
START_TIMEOUT = 30

UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1, "m": 60}


class HttpError(Exception):
    """The server can't be measured."""


@contextlib.asynccontextmanager
async def serving(contender, operation):
    """Run uvicorn, and give the address of the view."""
    import uvicorn

    await contender.open(operation.pool)
    application = getattr(contender, operation.name)()
    config = uvicorn.Config(
        application, http="httptools", lifespan="off", log_level="warning"
    )
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with asyncio.timeout(START_TIMEOUT):
                # It has no event for that.
                while not server.started and not task.done():
                    await asyncio.sleep(0.01)
            yield f"http://127.0.0.1:{port}/{operation.name}/"
        finally:
            server.should_exit = True
            await task
            await contender.close()


async def verify(contender, operation, key):
    """Return what the view answers, and the time that takes."""

    def ask(url):
        start = time.perf_counter()
        with urllib.request.urlopen(url) as response:
            return json.load(response), time.perf_counter() - start

    async with serving(contender, operation) as url:
        return await asyncio.to_thread(ask, f"{url}{key}")


async def measure(contender, operation, connections, duration, meter):
    """Let wrk ask for a view. Return what Meter.rates() would."""
    async with serving(contender, operation) as url:
        await wrk(url, connections, WARM_UP)
        meter.start()
        output = await wrk(url, connections, whole(duration))
        meter.stop()
    return parse(output)


def whole(duration):
    return max(SHORTEST, round(duration))


async def wrk(url, connections, duration):
    """Return what wrk prints."""
    process = await asyncio.create_subprocess_exec(
        *["wrk", "--threads", "1", "--connections", str(connections)],
        *["--duration", str(duration), "--latency", f"{url}1"],
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise HttpError(f"wrk: exit status {process.returncode}")
    return output.decode()


def parse(output):
    """Return what wrk has printed as numbers."""
    number = r"([0-9.]+)(us|ms|s|m)"
    summary = re.search(rf"^ *(\d+) requests in {number},", output, re.M)
    p50, p99 = (
        re.search(rf"^ *{percent}% +{number} *$", output, re.M) for percent in (50, 99)
    )
    if "Non-2xx" in output or not (summary and p50 and p99):
        raise HttpError(f"wrk found no server that answers:\n{output}")
    count = int(summary[1])
    elapsed = seconds(*summary.groups()[1:])
    return {
        "count": count,
        "elapsed": elapsed,
        "rate": count / elapsed,
        "p50": seconds(*p50.groups()),
        "p99": seconds(*p99.groups()),
    }


def seconds(number, unit):
    return float(number) * UNITS[unit]
