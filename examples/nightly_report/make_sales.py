"""Makes the tables, and makes up two sales a shop on one day. What one till has sent, nobody can read.

python make_sales.py 2026-01-05 10000
"""

from __future__ import annotations

import os
import sys

import psycopg

SCHEMA = """
CREATE SCHEMA IF NOT EXISTS nightly;
CREATE TABLE IF NOT EXISTS nightly.sale (
    sale_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    day     date NOT NULL,
    shop    integer NOT NULL,
    amount  text NOT NULL  -- as the till has sent it
);
CREATE INDEX IF NOT EXISTS sale_of_shop ON nightly.sale (day, shop);
CREATE TABLE IF NOT EXISTS nightly.total (day date, shop integer, total numeric NOT NULL, PRIMARY KEY (day, shop));
CREATE TABLE IF NOT EXISTS nightly.report (day date PRIMARY KEY, total numeric NOT NULL);
"""

SALES = """
INSERT INTO nightly.sale (day, shop, amount)
SELECT %(day)s, shop, unnest(ARRAY['2.50', CASE shop WHEN 7 THEN '1O.00' ELSE '10.00' END])
FROM generate_series(0, %(shops)s - 1) shop
"""


def make(dsn: str, day: str, shops: int) -> None:
    """Make the tables, if they are not there, and the sales of a day."""
    with psycopg.connect(dsn) as connection:
        connection.execute(SCHEMA)
        connection.execute(SALES, {"day": day, "shops": shops})


if __name__ == "__main__":
    make(os.environ["COMMAND_BUS_DSN"], sys.argv[1], int(sys.argv[2]))
