"""Take orders in several threads, and report each when its COMMIT has returned.

The demo kills this process, which never ends by itself. It runs as
`python -m bottomless_wal.cli.demo_writer`, reads its task as JSON from stdin and writes lines of
JSON:

    {"ready": seconds}                            the tables, customers and products are stored
    {"order": id, "token": text, "items": n}      this order was acknowledged
    {"error": text}                               something failed, and the process ends
"""

from __future__ import annotations

import json
import os
import random
import secrets
import sys
import threading
import time
from typing import Any, Final

from ..core.errors import BottomlessError
from ..runtime import api
from .output import configure_logging

__all__ = ["CUSTOMERS", "PRODUCTS", "main"]

CUSTOMERS: Final = 1200
PRODUCTS: Final = 400
_BUSY_MS: Final = 60_000

_SCHEMA: Final = """
CREATE TABLE customers(id INTEGER PRIMARY KEY, name TEXT NOT NULL, city TEXT NOT NULL);
CREATE TABLE products(id INTEGER PRIMARY KEY, name TEXT NOT NULL, price INTEGER NOT NULL, sold INTEGER NOT NULL DEFAULT 0);
CREATE TABLE orders(id INTEGER PRIMARY KEY, customer INTEGER NOT NULL REFERENCES customers, token TEXT NOT NULL, placed REAL NOT NULL);
CREATE TABLE items(id INTEGER PRIMARY KEY, "order" INTEGER NOT NULL REFERENCES orders, product INTEGER NOT NULL REFERENCES products,
    count INTEGER NOT NULL);
CREATE INDEX items_by_order ON items("order");
"""
_CITIES: Final = ("Lund", "Porto", "Gent", "Graz", "Brno", "Bergen", "Siena", "Leeds")

_said = threading.Lock()


def _say(**message: Any) -> None:
    with _said:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()


def _stock(path: str) -> None:
    connection = api.connect(path)
    with connection:
        connection.execute(_SCHEMA)
        connection.executemany(
            "INSERT INTO customers(name, city) VALUES (?, ?)",
            ((f"customer {n} {secrets.token_hex(6)}", random.choice(_CITIES)) for n in range(CUSTOMERS)),
        )
        connection.executemany(
            "INSERT INTO products(name, price) VALUES (?, ?)",
            ((f"product {n} {secrets.token_hex(8)}", random.randint(1, 9999)) for n in range(PRODUCTS)),
        )
    connection.close()


def _take_orders(path: str) -> None:
    connection = api.connect(path)
    connection.set_busy_timeout(_BUSY_MS)
    while True:
        token, count = secrets.token_hex(16), random.randint(5, 15)
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(
            "INSERT INTO orders(customer, token, placed) VALUES (?, ?, ?)", (random.randint(1, CUSTOMERS), token, time.time())
        )
        order = connection.last_insert_rowid()
        for _ in range(count):
            product = random.randint(1, PRODUCTS)
            connection.execute('INSERT INTO items("order", product, count) VALUES (?, ?, 1)', (order, product))
        connection.execute("UPDATE products SET sold = sold + 1 WHERE id = ?", (random.randint(1, PRODUCTS),))
        connection.execute("COMMIT")
        # Only after COMMIT: an order that is reported here must never be lost.
        _say(order=order, token=token, items=count)


def _work(path: str) -> None:
    try:
        _take_orders(path)
    except BaseException as error:  # noqa: BLE001  (it is reported, and the process ends)
        _say(error=str(error))
        os._exit(1)


def main() -> None:
    """Take orders until the process is killed."""
    task = json.loads(sys.stdin.readline())
    path = task["path"]
    configure_logging("error")  # the demo itself shows everything else
    api.register(**task["options"])
    began = time.monotonic()
    try:
        _stock(path)
    except BottomlessError as error:
        _say(error=str(error))
        sys.exit(1)
    _say(ready=time.monotonic() - began)
    for _ in range(task["threads"]):
        threading.Thread(target=_work, args=(path,), daemon=True).start()
    sys.stdin.read()  # the pipe ends when the parent process does


if __name__ == "__main__":
    main()
