"""
The turn that the executions inside one transaction take.

A Turn has one holder at a time, which may take it again as often as it gives
it back. Whoever wants it says what must hold, as a function without arguments.
Requests are served in the order of their arrival, leaving out those whose
function returns false:

* take() waits in a thread. It's given the turn while it still waits, so that
  nobody can get in between. A thread that others depend on may wait with an
  object of its own instead of a ThreadWaiter, and do their work meanwhile.
* comes() waits on an event loop and doesn't take the turn: the thread which
  works for the task does, and may find that something has changed.

Whoever changes what those functions look at calls changed(). They are called
with a lock held, in any thread, and must neither wait nor use the turn.

A wait is given up when nothing has got on for `timeout` seconds, as it may be
one for another in turn. A long queue, or a holder that works, isn't given up.

Nothing in here knows of databases.
"""

import asyncio
import threading
import time


class ThreadWaiter:
    """How a thread waits that has nothing else to do."""

    def __init__(self):
        self._event = threading.Event()

    def grant(self):
        """Tell the thread that it has the turn. Return whether it listens."""
        self._event.set()
        return True

    def wait(self, timeout):
        """Return when the turn is granted, to ask for it anew, or too late."""
        self._event.wait(timeout)


class Turn:
    def __init__(self):
        self._lock = threading.Lock()
        self._holder = None
        # How often the holder has taken it.
        self.depth = 0
        # In the order of their arrival.
        self._requests = []
        # How often it was taken by somebody who didn't hold it.
        self.count = 0
        # How often changed() was called.
        self.changes = 0
        # For the use of the callers: the idents of the threads that ever held
        # it, and if what a holder did is being cancelled, the count of that
        # turn and an event that tells when that has ended.
        self.threads = set()
        self.cancelled = None
        # Whether the holder needs a thread, which mustn't wait for the turn.
        self.needs_thread = False
        # What the holder does that ends by itself, and how often it ended.
        self.works = None
        self.finished = 0

    def take(self, holder, ready, timeout, waiter_class=ThreadWaiter, patient=True):
        """
        Take the turn for `holder` once nobody else holds it and `ready()` is
        true. Return False if it was given up, unless `patient` also while the
        holder works.
        """
        patience = None
        while True:
            with self._lock:
                if self._holder == holder:
                    self.depth += 1
                    return True
                if self._holder is None and ready():
                    self._give_to(holder)
                    return True
                # Made under the lock: a change between the look at ready() and
                # the wait would be missed.
                request = _Request(ready, holder, waiter_class())
                self._requests.append(request)
            if patience is None:
                patience = _Patience(self, ready, timeout, patient)
            try:
                while (remaining := patience.remaining()) > 0:
                    request.waiter.wait(remaining)
                    if not patience.is_over():
                        break
            except BaseException:
                # Nobody is there any more to give it back.
                if not self._withdraw(request):
                    self.give()
                raise
            if not self._withdraw(request):
                return True
            if remaining <= 0:
                return False

    def is_held_by(self, holder):
        """Return whether `holder`, who asks, has the turn."""
        return self._holder == holder

    def take_again(self, holder):
        """Take the turn if `holder` has it. Return whether that's so."""
        if not self.is_held_by(holder):
            return False
        with self._lock:
            if self._holder != holder:
                return False
            self.depth += 1
            return True

    def give(self):
        """Give back what one call of take() took."""
        with self._lock:
            self.depth -= 1
            if not self.depth:
                self._holder = None
                if self._requests:
                    self._serve()

    def pass_on(self, holder):
        """Let `holder` be the next one, when the present one gives it back."""
        with self._lock:
            self._requests.insert(0, _Request(lambda: True, holder, ThreadWaiter()))

    def changed(self):
        """Look again whether anybody who waits can go on."""
        with self._lock:
            self.changes += 1
            self._serve()

    def get_on(self, ready):
        """Return what becomes another value when others get on."""
        with self._lock:
            return self.changes, ready() and (self.count, self.finished)

    async def comes(self, ready, timeout):
        """
        Wait on the event loop until `ready()` is true. Return False if that
        was given up.
        """
        with self._lock:
            if ready():
                return True
        patience = _Patience(self, ready, timeout)
        waiter = _LoopWaiter(asyncio.get_running_loop())
        request = _Request(ready, None, waiter)
        with self._lock:
            if ready():
                return True
            self._requests.append(request)
        try:
            while (remaining := patience.remaining()) > 0:
                await asyncio.wait([waiter.future], timeout=remaining)
                if waiter.future.done():
                    return True
            return False
        finally:
            self._withdraw(request)

    def _withdraw(self, request):
        """Return whether a request hadn't been served."""
        with self._lock:
            waits = request in self._requests
            if waits:
                self._requests.remove(request)
            return waits

    def _serve(self):
        for request in self._requests.copy():
            takes = request.holder is not None
            if takes and self._holder is not None:
                continue
            if request.ready() and request.waiter.grant():
                self._requests.remove(request)
                if takes:
                    self._give_to(request.holder)

    def _give_to(self, holder):
        self._holder = holder
        self.depth = 1
        self.count += 1


class _Patience:
    def __init__(self, turn, ready, timeout, patient=True):
        self._turn = turn
        self._ready = ready
        self._timeout = timeout
        self._patient = patient
        self._seen = turn.get_on(ready)
        self._end = time.monotonic() + timeout

    def is_over(self):
        return time.monotonic() >= self._end

    def remaining(self):
        """Return for how many seconds to wait before it's asked again."""
        if self.is_over():
            seen, self._seen = self._seen, self._turn.get_on(self._ready)
            if self._seen != seen or self._patient and self._turn.works:
                self._end = time.monotonic() + self._timeout
        return self._end - time.monotonic()


class _Request:
    def __init__(self, ready, holder, waiter):
        self.ready = ready
        self.holder = holder
        self.waiter = waiter


class _LoopWaiter:
    """How a task waits."""

    def __init__(self, loop):
        self._loop = loop
        self.future = loop.create_future()

    def grant(self):
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:
            # The loop was closed, and with it whoever waited.
            return False
        return True

    def _wake(self):
        if not self.future.done():
            self.future.set_result(None)
