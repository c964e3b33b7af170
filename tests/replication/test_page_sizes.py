"""Every page size, and a database so large that SQLite's lock-byte page lies in the middle of it."""

from __future__ import annotations

import os
import struct
import tracemalloc

import pytest

import bottomless_wal
from bottomless_wal.formats import keys
from tests.support.cluster import World, rows

SIZES = [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]


@pytest.mark.parametrize("page_size", SIZES)
def test_every_page_size(world: World, page_size: int) -> None:
    here = world.machine()
    con = here.connect(page_size=page_size)
    con.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, x)")
    assert rows(con, "PRAGMA page_size") == page_size
    con.executemany("INSERT INTO t(x) VALUES (randomblob(?))", ((n * 300,) for n in range(30)))
    con.execute("DELETE FROM t WHERE id % 2")
    con.wal_checkpoint(mode=2)
    con.execute("INSERT INTO t(x) VALUES (zeroblob(200000))")
    con.execute("VACUUM")
    world.stored(con)
    con.close()
    world.comes_back(here)


@pytest.mark.parametrize("page_size", SIZES)
def test_every_page_size_as_an_initial_replication(world: World, page_size: int) -> None:
    here = world.machine()
    stock = here.stock()
    stock.execute(f"PRAGMA page_size={page_size}; CREATE TABLE t(id INTEGER PRIMARY KEY, x)")
    stock.executemany("INSERT INTO t(x) VALUES (randomblob(?))", ((n * 300,) for n in range(30)))
    stock.close()
    con = here.connect()
    bottomless_wal.flush(con)
    world.stored(con)
    con.close()
    world.comes_back(here)


def test_a_scan_holds_few_pages_however_large_they_are(world: World) -> None:
    """In all 64 MB: as many pages at once as there are small ones in a few megabytes would be all of them."""
    here = world.machine()
    stock = here.stock()
    stock.execute("PRAGMA page_size=65536; CREATE TABLE t(x); INSERT INTO t VALUES (zeroblob(64 << 20))")
    stock.close()
    here.connect("other.db").close()  # what is imported and made once
    tracemalloc.start()
    try:
        here.connect(pages="off").close()
        os.unlink(here.path() + "-bottomless")
        here.connect(pages="off").close()  # every page is looked at to make the index anew
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def _sparse(path: str) -> int:
    """A database that goes past the lock byte (1 GiB) with pages of 64 KiB, most of them free and never written; its size in pages.

    The free pages are leaves of two trunk pages, so `integrity_check` finds nothing amiss, and new rows go to the highest ones first.
    """
    import apsw

    page_size = 65536
    lock = 0x40000000 // page_size + 1
    con = apsw.Connection(path)
    con.execute("PRAGMA page_size=65536; CREATE TABLE t(id INTEGER PRIMARY KEY, x); INSERT INTO t(x) VALUES ('first')")
    used = con.execute("PRAGMA page_count").get
    con.close()
    size = lock + 20
    free = [pgno for pgno in range(used + 1, size + 1) if pgno != lock]
    low = [pgno for pgno in free if pgno < lock]
    high = [pgno for pgno in free if pgno > lock]
    first, second = high[0], low[0]
    with open(path, "r+b") as file:
        file.truncate(size * page_size)
        for trunk, following, leaves in ((first, second, high[1:]), (second, 0, low[1:])):
            file.seek((trunk - 1) * page_size)
            file.write(struct.pack(">II", following, len(leaves)) + struct.pack(f">{len(leaves)}I", *leaves))
        file.seek(28)
        file.write(struct.pack(">I", size))
        file.seek(32)
        file.write(struct.pack(">II", first, len(free)))
    return size


def test_a_database_beyond_the_lock_byte(world: World) -> None:
    here = world.machine()
    size = _sparse(here.path())
    lock = 0x40000000 // 65536 + 1
    con = here.connect(pages="off")
    assert rows(con, "PRAGMA page_count") == size
    for _ in range(3):
        con.execute("INSERT INTO t(x) VALUES (randomblob(300000))")  # takes pages on the far side of the lock byte
    state = bottomless_wal.status(con).state_hash
    pages = {pgno for pre in range(1, 4) for pgno in world.bucket.segment("app.db", pre, pre + 1).pages}
    assert max(pages) > lock
    assert lock not in pages
    con.close()
    elsewhere = world.machine()
    con = elsewhere.connect(pages="off")
    assert bottomless_wal.status(con).state_hash == state
    assert rows(con) == 4
    assert rows(con, "PRAGMA quick_check(1)") == "ok"
    con.close()
    assert os.path.getsize(elsewhere.path()) == os.path.getsize(here.path())
    with open(here.path(), "rb") as one, open(elsewhere.path(), "rb") as two:
        while block := one.read(1 << 24):
            assert block == two.read(1 << 24)
    assert keys.page_key("app.db", lock) not in world.bucket.listing()
