import argparse
import contextlib
import io
import pathlib
import sys
import tempfile
import unittest

import chain

BENCH = chain.ROOT / "scripts" / "bench"
sys.path.append(str(BENCH))

import environments  # noqa: E402
import http_load  # noqa: E402
import instructions  # noqa: E402
import operations  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import waiting_memory  # noqa: E402
import worker  # noqa: E402
from contenders import address, contenders  # noqa: E402


def measurement(contender, number, rate, operation="get", tasks=50):
    return {
        "operation": operation,
        "tasks": tasks,
        "round": number,
        "contender": contender,
        "rate": rate,
        "elapsed": 1,
        "p50": 0.001,
        "p99": 0.0025,
        "cpu": 0.0005,
        "memory": 50 * 2**20,
        "threads": 3,
    }


def results(*measurements):
    return {
        "about": {
            "rounds": 3,
            "seconds": 1,
            "cpus": 2,
            "machine": "x86_64",
            "load": "0.1 0.1 0.1",
            "python": "3.13.0",
            "postgresql": "18.6",
        },
        "titles": {"native": "fork", "stock-async": "stock", "stock-sync": "sync"},
        "versions": {"native": "Django 6.1.3"},
        "left_out": [["Someone", "It can't be installed."]],
        "measurements": list(measurements),
    }


class ReportTests(unittest.TestCase):
    def test_spread(self):
        self.assertEqual(report.spread([3, 1, 2]), "2 (1–3)")
        self.assertEqual(report.spread([1234.5], 1), "1,234.5 (1,234.5–1,234.5)")
        self.assertEqual(report.spread([0.001, 0.003], 1, 1000), "2.0 (1.0–3.0)")
        self.assertEqual(report.spread([]), "-")

    def test_ratios_are_those_of_a_round(self):
        # The machine was three times as slow in the second one.
        found = report.figures(
            [
                measurement("native", 0, 300),
                measurement("stock-async", 0, 100),
                measurement("native", 1, 100),
                measurement("stock-async", 1, 50),
                measurement("native", 2, 500),
            ],
            "rate",
        )
        by_contender = found["get", 50]
        self.assertEqual(
            report.ratios(by_contender, "native", "stock-async"), [3.0, 2.0]
        )
        self.assertEqual(report.ratios(by_contender, "native", "raw"), [])

    def test_page(self):
        lines = list(
            report.page(
                results(
                    measurement("native", 0, 600),
                    measurement("stock-async", 0, 100),
                    measurement("native", 1, 1200),
                    measurement("stock-async", 1, 300),
                )
            )
        )
        self.assertIn("- Someone: It can't be installed.", lines)
        self.assertIn("### Get by key, 50 tasks", lines)
        self.assertIn(
            "| fork | 900 (600–1,200) | 1.00 (1.00–1.00) | 2.50 (2.50–2.50) "
            "| 0.500 (0.500–0.500) | 50 (50–50) | 3 (3–3) | 5.00 (4.00–6.00) |",
            lines,
        )

    def goals(self, *measurements, **more):
        """Return the lines of the table, without its head."""
        return list(report.goal_table({**results(*measurements), **more}))[2:]

    def test_faster(self):
        for rate, verdict in ((499, "NOT REACHED"), (500, "reached"), (800, "aim")):
            with self.subTest(rate=rate):
                line, _ = self.goals(
                    measurement("native", 0, rate), measurement("stock-async", 0, 100)
                )
                self.assertTrue(line.endswith(f"| ≥ 5 | ≥ 8 | {verdict} |"), line)

    def test_ahead_of_the_fastest(self):
        others = [
            measurement(name, 0, rate, "list")
            for name, rate in (("stock-async", 90), ("stock-sync", 110), ("raw", 999))
        ]
        for rate, verdict in ((109, "NOT REACHED"), (110, "aim")):
            with self.subTest(rate=rate):
                (line,) = self.goals(measurement("native", 0, rate, "list"), *others)
                self.assertIn("the fastest ORM on psycopg: sync |", line)
                self.assertTrue(line.endswith(f"| {verdict} |"), line)

    def test_time_of_one_task(self):
        """It's the only one to be compared with a single thread's."""
        for rate, verdict in ((79, "NOT REACHED"), (81, "reached"), (90, "aim")):
            with self.subTest(rate=rate):
                (line,) = self.goals(
                    measurement("native", 0, rate, tasks=1),
                    measurement("stock-sync", 0, 100, tasks=1),
                )
                self.assertTrue(line.endswith(f"| ≤ 1.25 | ≤ 1.15 | {verdict} |"), line)

    def test_sleeping_tasks(self):
        for elapsed, verdict in ((2.31, "NOT REACHED"), (2.29, "reached"), (2, "aim")):
            with self.subTest(elapsed=elapsed):
                slept = measurement("native", 0, 1, "sleep", 1000)
                (line,) = self.goals({**slept, "elapsed": elapsed})
                self.assertTrue(line.endswith(f"| {verdict} |"), line)

    def test_waiting_transactions(self):
        def waiting(contender, memory):
            return {
                "contender": contender,
                "kind": "idle",
                "round": 0,
                "memory": memory,
                "connection": 20,
            }

        for memory, verdict in ((71, "NOT REACHED"), (70, "reached"), (40, "aim")):
            with self.subTest(memory=memory):
                (line,) = self.goals(
                    waiting=[waiting("native", memory), waiting("stock-sync", 120)]
                )
                self.assertTrue(line.endswith(f"| ≤ 0.5 | ≤ 0.2 | {verdict} |"), line)

    def test_instructions(self):
        for count, verdict in ((1011, "NOT REACHED"), (1009, "reached"), (1000, "aim")):
            with self.subTest(count=count):
                pieces = {
                    "get()": {"stock": [1000], "fork": [count]},
                    "save()": {"stock": [1000], "fork": [999]},
                }
                (line,) = self.goals(instructions={"sqlite": pieces})
                self.assertIn("the worst: get() |", line)
                self.assertTrue(line.endswith(f"| {verdict} |"), line)

    def test_operations_of_the_goals(self):
        known = contenders("")
        for operation, tasks, against, *_ in report.FASTER:
            self.assertIn(against, known)
            self.assertIn(tasks, operations.OPERATIONS[operation].tasks)
        for name in (*report.ORMS_ON_PSYCOPG, *run.HOLDING, *run.BY_REQUEST):
            self.assertIn(name, known)


class PlanTests(unittest.TestCase):
    """The time that the run takes is known before it starts."""

    def plan(self, **options):
        benchmark = run.Benchmark(
            argparse.Namespace(
                **{
                    "operations": ["get", "sleep"],
                    "tasks": None,
                    "rounds": 5,
                    "seconds": 2,
                    "minutes": None,
                    "no_waiting": False,
                    **options,
                }
            )
        )
        benchmark.results["titles"] = {"native": "fork", "raw": "psycopg"}
        with contextlib.redirect_stdout(io.StringIO()) as output:
            benchmark.plan()
        return benchmark, output.getvalue()

    def test_estimate(self):
        benchmark, _ = self.plan()
        get, sleep = (operations.OPERATIONS[name] for name in ("get", "sleep"))
        self.assertAlmostEqual(
            benchmark.whole,
            5 * 2 * (3 * (2 + get.overhead) + run.PER_TASK * (1 + 50 + 500))
            + 5 * 1 * 2 * sleep.overhead
            + 2 * 2 * run.STARTING
            + 5 * 3 * run.WAITING,
        )
        benchmark.done = benchmark.whole
        self.assertEqual(benchmark.left(), "about 0 minutes left")

    def test_minutes(self):
        benchmark, output = self.plan(minutes=3)
        self.assertAlmostEqual(benchmark.whole, 180)
        self.assertGreater(benchmark.options.seconds, run.SHORTEST)
        self.assertIn("Estimated: 3 minutes, 5 rounds", output)

    def test_too_few_minutes(self):
        with self.assertRaisesRegex(run.Unusable, "1 minutes are too short"):
            self.plan(minutes=1)


class InstructionsTests(unittest.TestCase):
    def test_per_repetition(self):
        with tempfile.TemporaryDirectory() as name:
            directory = pathlib.Path(name)
            # The second piece, done 10 times and 20 times. 500 come besides.
            for number, executed in ((5, 1500), (6, 2500)):
                text = f"events: Ir\nfn=(1)\n1 2\nsummary: {executed}\n"
                (directory / f"out.{number}").write_text(text)
            self.assertEqual(instructions.per_repetition(directory, 1, 10), 100)

    def test_failure(self):
        with self.assertRaisesRegex(run.ChainError, "no summary"):
            instructions.dumped("events: Ir\n")

    def test_page(self):
        found = {"get()": {"stock": [1000, 1000], "fork": [1010, 1030]}}
        lines = list(instructions.page({"rounds": 2, "databases": {"sqlite": found}}))
        self.assertIn("| get() | 1,000 | 1,020 | 2.00 (1.00–3.00) |", lines)


class WaitingMemoryTests(unittest.TestCase):
    def test_own_memory(self):
        before = waiting_memory.own_memory()
        # More than what is free already, and written to.
        block = bytearray(b"x") * 2**24
        grown = waiting_memory.own_memory() - before
        self.assertGreater(grown, 0.9 * len(block))
        self.assertLess(grown, 1.5 * len(block))

    def test_until(self):
        found = iter([1, 2, 3])
        list(waiting_memory._until(lambda: next(found), 3, []))
        with self.assertRaises(ZeroDivisionError):
            list(waiting_memory._until(lambda: 1, 3, [ZeroDivisionError()]))


class OperationTests(unittest.TestCase):
    def test_arguments(self):
        for operation in operations.OPERATIONS.values():
            with self.subTest(operation=operation.name):
                calls = [operation.arguments(number) for number in range(1000)]
                if operation.keys is None:
                    self.assertEqual(set(calls), {()})
                    continue
                keys = [key for (key,) in calls]
                self.assertGreaterEqual(min(keys), 1)
                self.assertLessEqual(max(keys), operation.keys)
                # Tasks that run at once don't wait for each other's rows.
                self.assertGreater(len(set(keys[:50])), 45)

    def test_contenders_have_modules(self):
        for contender in contenders("").values():
            path = BENCH / "contenders" / f"{contender.module}.py"
            self.assertIs(path.exists(), True, path)


class WorkerTests(unittest.TestCase):
    """With a contender that needs no database."""

    class Contender:
        threads = 2

        def open(self):
            self.is_open = True

        close = open

        def get(self, key):
            if key == self.fails:
                raise ValueError("No such row.\nReally.")

        fails = None

    class AsyncContender:
        async def open(self, pool_size):
            self.pool_size = pool_size

        async def close(self):
            self.pool_size = None

        async def get(self, key):
            pass

    def setUp(self):
        warm_up = worker.WARM_UP
        self.addCleanup(setattr, worker, "WARM_UP", warm_up)
        worker.WARM_UP = 0.01

    def test_measure(self):
        for contender in (self.Contender(), self.AsyncContender()):
            with self.subTest(contender=contender):
                measured = worker.measure(contender, "get", 5, 0.05)
                self.assertGreater(measured["count"], 5)
                self.assertLessEqual(measured["p50"], measured["p99"])
                self.assertAlmostEqual(
                    measured["rate"], measured["count"] / measured["elapsed"]
                )
                self.assertGreater(measured["memory"], 2**20)

    def test_failure(self):
        contender = self.Contender()
        contender.fails = 1
        with self.assertRaises(ValueError) as caught:
            worker.measure(contender, "get", 5, 0.05)
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr):
            group = ExceptionGroup("several", [caught.exception])
            self.assertEqual(worker.failure(group), "ValueError: No such row.")
        self.assertIn("Really.", stderr.getvalue())


class WrkTests(unittest.TestCase):
    output = """\
Running 1s test @ http://127.0.0.1:8000/http/1
  1 threads and 50 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   531.49ms  143.03ms 893.30ms   71.15%
    Req/Sec    95.50     36.70   191.00     72.73%
  Latency Distribution
     50%  549.86ms
     75%  614.72ms
     90%  689.17ms
     99%    1.25s
  104 requests in 1.04s, 25.49KB read
Requests/sec:    100.00
Transfer/sec:     24.51KB
"""

    def test_parse(self):
        found = http_load.parse(self.output)
        self.assertEqual(found["count"], 104)
        self.assertAlmostEqual(found["rate"], 100)
        self.assertAlmostEqual(found["p50"], 0.54986)
        self.assertAlmostEqual(found["p99"], 1.25)

    def test_padding(self):
        """wrk pads the units of one letter."""
        found = http_load.parse(self.output.replace("1.25s", "1.25s "))
        self.assertAlmostEqual(found["p99"], 1.25)

    def test_failure(self):
        failed = "  Non-2xx or 3xx responses: 3\n"
        for output in (self.output + failed, ""):
            with self.assertRaisesRegex(http_load.HttpError, "wrk found no server"):
                http_load.parse(output)


class VerifyTests(unittest.TestCase):
    """Nobody measures a contender that does nothing."""

    class Process:
        def __init__(self, **answers):
            self.answers = answers

        def ask(self, command, method=None, **arguments):
            return self.answers[method or command].pop(0)

    def verify(self, operation, done, written=([0, 0, 0], [0, 0, 0])):
        benchmark = run.Benchmark(None)
        benchmark.observer = self.Process(
            written=list(written), verify=[{"read": [1, "item 1"], "elapsed": 1}]
        )
        worker = self.Process(verify=[done])
        benchmark.verify(worker, operations.OPERATIONS[operation])

    def test_read(self):
        done = {"read": [1, "item 1"], "elapsed": 0.001}
        self.verify("get", done)
        with self.assertRaisesRegex(run.WorkerError, r"It has read None\."):
            self.verify("get", {**done, "read": None})

    def test_written(self):
        done = {"read": [1, "item 1"], "elapsed": 0.001}
        self.verify("transaction", done, ([5, 0, 7], [6, 0, 8]))
        with self.assertRaisesRegex(run.WorkerError, r"It has written \[1, 0, 0\]\."):
            self.verify("transaction", done, ([5, 0, 7], [6, 0, 7]))
        with self.assertRaisesRegex(run.WorkerError, r"It has written \[0, 0, 1\]\."):
            self.verify("get", done, ([0, 0, 0], [0, 0, 1]))

    def test_too_fast(self):
        done = {"read": [1, "item 1"], "elapsed": 0.09}
        with self.assertRaisesRegex(run.WorkerError, r"It took only 0\.0900 s\."):
            self.verify("sleep", done)


class EnvironmentTests(unittest.TestCase):
    def test_named_by_its_contents(self):
        name = environments.name_of("environment", "a", "b")
        self.assertEqual(name, environments.name_of("environment", "a", "b"))
        self.assertNotEqual(name, environments.name_of("environment", "a", "c"))

    def test_incomplete(self):
        """What can't be installed isn't there next time."""
        with tempfile.TemporaryDirectory() as name:
            cache = pathlib.Path(name)
            with self.assertRaisesRegex(environments.NotInstalled, "nonexistent"):
                environments.environment(
                    cache, ["--no-index", "nonexistent"], log=lambda line: None
                )
            self.assertEqual(list(cache.iterdir()), [])

    def test_address(self):
        self.assertEqual(
            address.parameters("postgresql://me:p%40ss@/db?host=/sockets&port=5432"),
            {
                "user": "me",
                "password": "p@ss",
                "dbname": "db",
                "host": "/sockets",
                "port": "5432",
            },
        )


if __name__ == "__main__":
    unittest.main()
