"""
What a client of rounds.project does, and knows afterwards.
"""

import asyncio
import random
import re
from collections import defaultdict

import httpx
import websockets

USERS = ["anna", "ben", "clara", "david", "staff"]

PRODUCTS, STOCK, ITEMS = 4, 2000, 600

# Seconds for one answer.
TIMEOUT = 30

BUYING = ["buy", "buy_async", "buy_crossing", "buy_run_sync"]

# What's interrupted has no callback that can be interrupted, too.
INTERRUPTIBLE = ["buy", "buy_run_sync", "slow"]

JOBS = ["plain", "connection", "block", "refused", "on_commit"]


class Client:
    """
    One browser.

    `known` has, for each kind of thing, names of what was asked for, and
    whether it must be there: "yes", "no" or "unknown".
    """

    def __init__(self, round_, number):
        self.round = round_
        self.number = number
        self.random = random.Random(f"{round_.seed} {number}")
        self.known = defaultdict(dict)
        # Of the responses, by the names of what was requested.
        self.statuses = {}
        self.logins = 0
        self.steps = []
        # Who is signed in, and how often the session was counted up.
        self.user = ""
        self.visits = 0

    async def __aenter__(self):
        self.http = httpx.AsyncClient(
            base_url=f"http://{self.round.address}",
            timeout=TIMEOUT,
            # Who leaves doesn't do so with the next request's connection.
            limits=httpx.Limits(max_keepalive_connections=1),
        )
        return self

    async def __aexit__(self, *exc_info):
        await self.http.aclose()

    def actions(self):
        return [
            self.sign_in,
            self.whoami,
            self.buy,
            self.buy,
            self.buy,
            self.leave_while_buying,
            self.browse,
            self.fail,
            self.gather,
            self.download,
            self.leave_download,
            self.start_job,
            self.chat,
            self.use_admin,
            self.sign_out,
        ]

    async def act(self):
        await self.random.choice(self.actions())()

    # ##### Requests #####

    def new_name(self):
        return f"{self.number}-{len(self.steps)}"

    def step(self, *what):
        self.steps.append(" ".join(map(str, what)))

    async def request(self, method, path, name=None, expected=(200,), **kwargs):
        """Request something. Fail if the answer isn't one of the expected."""
        headers = {} if name is None else {"X-Name": name}
        self.step(method, path, name or "", kwargs.get("params", ""))
        response = await self.http.request(method, path, headers=headers, **kwargs)
        self.steps[-1] += f" -> {response.status_code}"
        if response.status_code not in expected:
            raise self.wrong(f"{path} was answered {response.status_code}.")
        if name is not None:
            self.statuses[name] = response.status_code
        return response

    def wrong(self, message):
        return self.round.violation(message, self.steps[-15:])

    async def leave(self, method, path, name, seconds, **kwargs):
        """Disconnect in the middle of a request, unless it's faster."""
        try:
            async with asyncio.timeout(seconds):
                return await self.request(method, path, name, (200, 409), **kwargs)
        except TimeoutError:
            self.steps[-1] += " -> left"
            return None

    # ##### Sessions #####

    async def sign_in(self):
        user = self.random.choice(USERS)
        path = self.random.choice(["/sign_in/", "/sign_in_async/"])
        await self.request("POST", path, data={"user": user})
        self.logins += 1
        if user != self.user:
            # Another user's session is flushed, that of nobody is kept.
            self.visits = 0 if self.user else self.visits
        self.user = user

    async def sign_out(self):
        await self.request("POST", "/sign_out/")
        self.user = ""
        self.visits = 0

    async def whoami(self):
        path = self.random.choice(["/whoami/", "/whoami_async/"])
        response = await self.request("GET", path, self.new_name())
        self.visits += 1
        expected = {
            "user": self.user,
            "token": f"token of {self.user}" if self.user else "",
            "visits": self.visits,
        }
        if response.json() != expected:
            raise self.wrong(f"The session is {response.json()}, not {expected}.")

    # ##### Orders #####

    def wanted(self):
        products = self.random.sample(range(1, PRODUCTS + 1), self.random.randint(1, 3))
        return ",".join(f"{pk}:{self.random.randint(1, 3)}" for pk in products)

    async def buy(self):
        path, name = self.random.choice(BUYING), self.new_name()
        self.known["orders"][name] = "unknown"
        response = await self.request(
            "POST", f"/{path}/", name, (200, 409), params={"wanted": self.wanted()}
        )
        self.known["orders"][name] = "yes" if response.status_code == 200 else "no"

    async def leave_while_buying(self):
        path, name = self.random.choice(INTERRUPTIBLE), self.new_name()
        seconds = self.random.choice([0.001, 0.01, 0.05, 0.1, 0.2])
        params = {"wanted": self.wanted(), "seconds": seconds}
        if self.random.random() < 0.5:
            params["statement"] = 1
        self.known["orders"][name] = "unknown"
        response = await self.leave(
            "POST", f"/{path}/", name, 2 * seconds * self.random.random(), params=params
        )
        if response is not None:
            self.known["orders"][name] = "yes" if response.status_code == 200 else "no"

    async def fail(self):
        path, name = self.random.choice(["/fail/", "/fail_async/"]), self.new_name()
        params = {"wanted": self.wanted()}
        self.known["orders"][name] = "unknown"
        await self.request("POST", path, name, (500,), params=params)
        self.known["orders"][name] = "no"

    # ##### Reading #####

    async def browse(self):
        page = self.random.randint(1, ITEMS // 20)
        response = await self.request("GET", "/browse/", params={"page": page})
        shown = response.json()
        if shown["total"] != PRODUCTS * STOCK:
            raise self.wrong(f"In stock and ordered are {shown['total']} products.")
        if len(shown["items"]) != 20:
            raise self.wrong(f"A page has {len(shown['items'])} items.")

    async def gather(self):
        name = self.new_name()
        response = await self.request("GET", "/gather/", name)
        if response.json()["counts"] != [ITEMS] * 5:
            raise self.wrong(f"The counts are {response.json()}.")
        for number, known in enumerate(["yes", "no", "yes"]):
            self.known["gathered"][f"{name} {number}"] = known

    async def download(self):
        response = await self.request("GET", "/export/")
        numbers = [int(line.split()[1]) for line in response.text.splitlines()]
        if numbers != list(range(ITEMS)):
            raise self.wrong(f"{len(numbers)} items were downloaded.")

    async def leave_download(self):
        self.step("GET /export/ -> left")
        async with self.http.stream("GET", "/export/") as response:
            async for _ in response.aiter_raw():
                if self.random.random() < 0.2:
                    break

    # ##### What goes on #####

    async def start_job(self, kind=None):
        kind, name = kind or self.random.choice(JOBS), self.new_name()
        params = {"kind": kind}
        fails = kind == "on_commit" and self.random.random() < 0.5
        if fails:
            params["fails"] = 1
        status = 500 if fails else 200
        await self.request("POST", "/job/", name, (status,), params=params)
        self.known["jobs"][name] = "no" if fails else "yes"
        if kind == "on_commit":
            self.known["gathered"][f"{name} job"] = "no" if fails else "yes"

    async def chat(self):
        """Send messages, and leave at any point, also without a word."""
        messages = self.known["messages"]
        uri = f"ws://{self.round.address}/chat/"
        async with websockets.connect(uri, open_timeout=TIMEOUT) as socket:
            for number in range(self.random.randint(1, 6)):
                name = f"{self.new_name()}-{number}"
                command = self.random.choice(["save", "save", "hold"])
                self.step("chat", command, name)
                messages[name] = "unknown"
                await socket.send(f"{command} {name}")
                if self.random.random() < 0.1:
                    break
                if command == "hold":
                    await self.receive(socket, "held")
                    end = self.random.choice(["commit", "withdraw", "leave"])
                    self.step("chat", end, name)
                    if end == "leave":
                        messages[name] = "no"
                        break
                    await socket.send(end)
                    if end == "withdraw":
                        await self.receive(socket, f"withdrawn {name}")
                        messages[name] = "no"
                        continue
                await self.receive(socket, f"saved {name} 1")
                messages[name] = "yes"
            if self.random.random() < 0.5:
                self.step("chat aborted")
                socket.transport.abort()

    async def receive(self, socket, expected):
        async with asyncio.timeout(TIMEOUT):
            text = await socket.recv()
        if text != expected:
            raise self.wrong(f"The consumer answered {text!r}, not {expected!r}.")

    # ##### The admin #####

    async def use_admin(self):
        """Sign in as another browser does, add something, and look at it."""
        async with httpx.AsyncClient(
            base_url=self.http.base_url, timeout=TIMEOUT
        ) as browser:
            user, self.http = self.http, browser
            try:
                await self.use_admin_as_staff()
            finally:
                self.http = user

    async def use_admin_as_staff(self):
        login = {"username": "staff", "password": "staff", "next": "/admin/"}
        await self.submit("/admin/login/", login)
        self.logins += 1
        name = self.new_name()
        self.known["notices"][name] = "unknown"
        await self.submit("/admin/shop/notice/add/", {"name": name})
        self.known["notices"][name] = "yes"
        path = "/admin/shop/notice/"
        response = await self.request("GET", path, params={"q": name})
        if f">{name}</a>" not in response.text:
            raise self.wrong(f"The admin doesn't list {name}.")
        await self.request("GET", "/admin/shop/order/")

    async def submit(self, path, fields):
        """Fill in a form, as it comes."""
        page = await self.request("GET", path)
        [token] = re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', page.text)[:1]
        fields = {"csrfmiddlewaretoken": token, **fields}
        await self.request("POST", path, expected=(302,), data=fields)
