from django.db import connection

SLOW = {
    "postgresql": "SELECT pg_sleep(20)",
    "sqlite": (
        "WITH RECURSIVE numbers(n) AS "
        "(SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 1000000000) "
        "SELECT max(n) FROM numbers"
    ),
}


def slow_report():
    """Run a query that takes longer than anybody waits."""
    with connection.cursor() as cursor:
        cursor.execute(SLOW[connection.vendor])
        return cursor.fetchall()
