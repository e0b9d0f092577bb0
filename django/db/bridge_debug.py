"""
Warn of code in the bridge that blocks the event loop, in asyncio's debug mode.

asyncio's own warning comes when the event loop goes on, and names a task. Here
a thread looks at the code (see django.db.bridge) while it still blocks, and
logs where it is. As for asyncio, the threshold is slow_callback_duration.

The thread looks after all event loops of the process. It's started when there
is something to watch, and ends when there's nothing. This module is imported
in debug mode only.
"""

import asyncio
import logging
import math
import os
import sys
import threading
import traceback
from operator import attrgetter
from time import monotonic

logger = logging.getLogger("django.db.bridge")

# The sections that run, by the ident of their thread, the thread that watches
# them, and when it wakes up. The condition guards them.
_sections = {}
_watchdog = None
_wakes_at = math.inf
_condition = threading.Condition()


class Section:
    """Code in the bridge, from where it begins or goes on to its next wait."""

    def __init__(self, task, threshold):
        self.task_name = None if task is None else task.get_name()
        self.thread_ident = threading.get_ident()
        self.started = monotonic()
        # When the watchdog looks at it, once.
        self.due = self.started + threshold
        self.is_over = False
        self.was_seen = False

    def warn(self, where, stack=()):
        logger.warning(
            "The task %r has blocked the event loop for %.3f seconds%s",
            self.task_name,
            monotonic() - self.started,
            "".join([where, *stack]),
        )


def watched(switch, child, loop):
    """
    Return a function like `switch`, a method that runs the greenlet `child`
    until it waits, which warns if that takes long.
    """

    def inner(*args):
        if threading.get_ident() in _sections:
            # It's a part of that section, which has started an eager task.
            return switch(*args)
        threshold = loop.slow_callback_duration
        section = Section(asyncio.current_task(loop), threshold)
        _begin(section)
        try:
            return switch(*args)
        finally:
            section.is_over = True
            with _condition:
                _sections.pop(section.thread_ident, None)
            if not section.was_seen and monotonic() - section.started >= threshold:
                # The watchdog couldn't run, as if the code holds the GIL.
                if child.dead:
                    section.warn(".")
                else:
                    stack = traceback.format_stack(child.gr_frame)
                    section.warn(", before it waited here:\n", stack)

    return inner


def _begin(section):
    global _watchdog
    with _condition:
        _sections[section.thread_ident] = section
        if _watchdog is None:
            _watchdog = threading.Thread(target=_watch, name=__name__, daemon=True)
            _watchdog.start()
        elif section.due < _wakes_at:
            _condition.notify()


def _watch():
    global _watchdog, _wakes_at
    while True:
        with _condition:
            section = min(_sections.values(), key=attrgetter("due"), default=None)
            if section is None or section.due == math.inf:
                _watchdog = None
                return
            if (delay := section.due - monotonic()) > 0:
                _wakes_at = section.due
                _condition.wait(delay)
                continue
            section.due = math.inf
            frame = sys._current_frames()[section.thread_ident]
            # If it's over, the frame may be another one's.
            if not section.is_over:
                section.was_seen = True
                stack = traceback.format_stack(frame)
            del frame
        if section.was_seen:
            section.warn(", and is here:\n", stack)
        del section


def _forget():
    """In a forked process, nobody releases what the watchdog has locked."""
    global _condition, _watchdog
    _condition = threading.Condition()
    _watchdog = None
    _sections.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
