#!/usr/bin/env python3
"""The measured halves of the benchmarks: each runs in a process of its own, so that memory, imports and threads are nobody else's.

`workloads.py NAME` calls the function `NAME` with the parameters that it reads, a JSON object, from standard input (they may be too many
for a command line); the last line it writes is what was measured, in JSON, with the peak of the process's memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench import commit_workloads as commits
from tools.bench import database_workloads as whole

JOBS: Final = {
    job.__name__: job
    for job in (
        commits.commits_and_puts,
        commits.load,
        commits.threads,
        commits.loopback,
        commits.reads,
        commits.idle,
        commits.paced,
        commits.s3vfs,
        whole.replicate,
        whole.restore,
        whole.download,
        whole.one_put,
        whole.transaction,
        whole.history,
        whole.shorten,
        whole.reopen,
    )
}


def peak() -> int:
    """Bytes of memory that this process had at most (of its own life: `ru_maxrss` would remember the parent's)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    measured = JOBS[sys.argv[1]](**json.loads(sys.argv[2] if len(sys.argv) > 2 else sys.stdin.read()))
    sys.stdout.write(json.dumps({**measured, "peak": peak()}) + "\n")
