"""
The backend. It works on stock Django and on the fork.

BEGIN is recorded when the transaction begins for Django. The driver sends it
together with the first statement.
"""

import time
from contextlib import contextmanager
from contextvars import ContextVar

from django.db.backends.postgresql import base

# Which task a statement is for, whatever thread sends it.
who = ContextVar("who", default=None)

# What was recorded, in the order in which it ended.
events = []


@contextmanager
def recorded(connection, sql, params=None):
    start = time.monotonic()
    try:
        yield
    finally:
        if who.get() is not None:
            events.append(
                {
                    "task": who.get(),
                    "backend": connection.connection.info.backend_pid,
                    "sql": sql,
                    "params": [str(param) for param in params or ()],
                    "start": start,
                    "end": time.monotonic(),
                }
            )


def record(execute, sql, params, many, context):
    """Record a statement. It's an execute wrapper."""
    with recorded(context["connection"], sql, params):
        return execute(sql, params, many, context)


class DatabaseWrapper(base.DatabaseWrapper):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.execute_wrappers.append(record)

    def _set_autocommit(self, autocommit):
        if autocommit:
            super()._set_autocommit(autocommit)
        else:
            with recorded(self, "BEGIN"):
                super()._set_autocommit(autocommit)

    def _commit(self):
        with recorded(self, "COMMIT"):
            super()._commit()

    def _rollback(self):
        with recorded(self, "ROLLBACK"):
            super()._rollback()
