"""What `import bottomless_wal` gives, and what it does not load before it is asked for."""

from __future__ import annotations

import subprocess
import sys

import bottomless_wal

HEAVY = ("boto3", "botocore", "rich", "click", "moto", "multiprocessing.util", "bottomless_wal.admin", "bottomless_wal.cli.main")


def test_every_public_name_is_there_and_none_is_a_module() -> None:
    for name in bottomless_wal.__all__:
        value = getattr(bottomless_wal, name)
        assert name == "__version__" or callable(value), name
    assert set(bottomless_wal.__all__) <= set(dir(bottomless_wal))
    assert not hasattr(bottomless_wal, "no_such_name")


def test_an_import_loads_what_a_writer_needs_and_no_more() -> None:
    script = f"import sys, bottomless_wal; print([name for name in {HEAVY!r} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert loaded == "[]\n"
    script = "import bottomless_wal; print(bottomless_wal.snapshot.__module__, bottomless_wal.restore.__module__)"
    told = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert told == "bottomless_wal.admin.compaction bottomless_wal.admin.restoration\n"
