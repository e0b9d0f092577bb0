DROP VIEW IF EXISTS bench_slow_item;
DROP TABLE IF EXISTS
    bench_item, bench_entry, bench_account, bench_slow_account, bench_book,
    bench_award, bench_author;
DROP FUNCTION IF EXISTS bench_sleep;
