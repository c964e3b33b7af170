"""After `register()` nothing is imported, nor read from where the packages are: a process may have given up its privileges."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.cluster import World, child

PREPARE = """
import contextlib, logging, sysconfig
homes = tuple({sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")})
homes += (os.path.dirname(bottomless_wal.__file__),)
logging.basicConfig(level=logging.DEBUG, stream=open(os.devnull, "w"))

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name not in sys.builtin_module_names:
            os.write(2, f"refused: import {name}\\n".encode())
            raise ImportError(f"{name} is out of failpoint")

def audit(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(homes) and not arguments[0].endswith(".py"):
        os.write(2, f"refused: open {arguments[0]}\\n".encode())
        raise PermissionError(13, "out of failpoint", arguments[0])

def give_up():
    sys.meta_path.insert(0, Refuse())
    sys.addaudithook(audit)
"""

WORK = """
here, there = argv[:2]
con = bottomless_wal.connect(here, page_size=65536)
con.execute("CREATE TABLE t(x)")
con.execute("INSERT INTO t VALUES(1)")
con.execute("INSERT INTO t VALUES(randomblob(?))", (9 << 20,))  # its pages go into a body, by a multipart upload
with contextlib.suppress(apsw.Error):
    con.execute("PRAGMA journal_mode=delete")
bottomless_wal.flush(con)
assert bottomless_wal.status(con).txid == 3
con.close()
con = bottomless_wal.connect(there)  # restored
assert con.execute("SELECT count(*) FROM t").get == 2
con.execute("INSERT INTO t VALUES(2)")
con.close()
con = bottomless_wal.connect(here)  # brought forward
con.execute("DELETE FROM t WHERE x = 1")
con.close()
try:
    bottomless_wal.connect(there)
    con = bottomless_wal.connect(there, bucket="missing", create_bucket=False)
except apsw.Error as error:
    assert "hint" in str(error)
if options["endpoint"].startswith("http"):
    try:
        bottomless_wal.connect(there, endpoint="http://127.0.0.1:1", retry_timeout=0.2)
    except bottomless_wal.StoreError as error:
        str(error)
    else:
        raise AssertionError("nothing listens at that port")
last = bottomless_wal.connect(here, ack="local")
last.execute("INSERT INTO t VALUES(3)")  # sent at exit
print("done")
"""


def test_nothing_is_loaded_late(two_worlds: World) -> None:
    here, there = two_worlds.machine(), two_worlds.machine()
    script = f"{PREPARE}\nbottomless_wal.register(**options)\ngive_up()\n{WORK}"
    done = child(script, here.path(), there.path(), options=two_worlds.options)
    assert done.stdout == "done\n"
    assert "refused" not in done.stderr
    con = two_worlds.machine().connect()
    assert con.execute("SELECT count(*) FROM t").get == 3
    con.close()


@pytest.mark.parametrize("late", ["import bottomless_wal.replication.recovery", "open(bottomless_wal.__file__ + 'c', 'rb')"])
def test_the_blocker_refuses_what_is_loaded_late(world: World, late: str) -> None:
    """A harness that could not fail would prove nothing."""
    done = child(f"{PREPARE}\ngive_up()\n{late}", options=world.options, check=False)
    assert done.returncode != 0
    assert "refused: " in done.stderr


def test_an_import_loads_neither_boto3_nor_the_restore() -> None:
    script = "import sys, bottomless_wal; print([name for name in sys.modules if name in " + repr(LATE) + "])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


LATE = [
    "boto3",
    "botocore",
    "urllib3",
    "bottomless_wal.replication.recovery",
    "bottomless_wal.runtime.compactor",
    "bottomless_wal.admin",
    "encodings.idna",
]
