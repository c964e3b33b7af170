"""Benchmarks of whole databases: the first replication, restores, what is stored, memory, and how all that grows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tools.bench.environment import BUCKET, MB, Line, Litestream, Site, World, median

LOG: Final = {"ack": "log", "pages": "off"}
"""The log alone, which is what Litestream stores too."""

_MEMORY: Final = 150.0


def _sizes(world: World) -> list[int]:
    return [20 * MB] if world.quick else [100 * MB, 1000 * MB]


def _rounds(world: World, size: int) -> int:
    return 2 if world.quick or size > 500 * MB else 4


def initial(world: World) -> Iterator[Line]:
    """An existing database into an empty bucket: the log part, and Litestream's first snapshot."""
    for size in _sizes(world):
        ours: list[float] = []
        theirs: list[float] = []
        cpu: list[float] = []
        for _ in range(_rounds(world, size)):
            with world.case(), world.site() as site:
                found = world.job("replicate", site, path=str(world.copy(size)), options=site.options(**LOG))
                ours.append(found["seconds"])
                cpu.append(found["cpu"])
            with world.case(), world.site() as site:
                theirs.append(Litestream(site, world.copy(size)).once())
        note = f"{median(cpu):.1f} s of processor time"
        what = f"{size // MB} MB, log part"
        yield Line("initial", what, median(ours), median(theirs), "s", ("<=", 1.0), "Litestream -once", note=note)


def page_view(world: World) -> Iterator[Line]:
    """All page objects of a database: is the machine busy with nothing else than necessary requests?"""
    cores = os.cpu_count() or 1
    for page_size, size in ((4096, 4 * MB), (65536, 20 * MB)) if world.quick else ((4096, 40 * MB), (65536, 400 * MB)):
        with world.case(), world.site() as site:
            path = world.copy(size)
            if page_size != 4096:
                _repaged(path, page_size)
            cost = world.job("one_put", site, url=site.url, path=str(path), page_size=page_size, count=200)
            found = world.job("replicate", site, path=str(path), options=site.options(ack="log"), root=str(site.root))
        puts = found["requests"]["put"]
        took, client, server, machine = found["view"]
        note = f"{puts / took:.0f} objects/s; one alone {cost['seconds'] * 1e3:.2f} ms ({cost['cpu'] * 1e3:.2f} ms of the client's CPU)"
        what = f"page view of {size // MB} MB, pages of {page_size}"
        # What they would take if each cost what it costs alone, and all cores did nothing else.
        yield Line("page-view", what, took, puts * cost["seconds"] / cores, "s", None, "requests x one / cores", note=note)
        # What others use of the machine meanwhile cannot be used here; on a busy one this says little.
        others = max(0.0, machine - client - server)
        left = max(took * cores - others, 1e-3)
        note = f"client {client / took:.2f}, server {server / took:.2f}, other work {others / took:.2f} of {cores} cores"
        share = min(1.0, (client + server) / left)
        yield Line("page-view", what, share * 100, 100.0, "%", (">=", 0.9), "CPU that other work has left", note=note)


def _repaged(path: Path, page_size: int) -> None:
    import apsw

    connection = apsw.Connection(str(path))
    connection.execute(f"PRAGMA journal_mode=delete; PRAGMA page_size={page_size}; VACUUM; PRAGMA journal_mode=wal").fetchall()
    connection.close()


def _objects(site: Site, prefix: str) -> list[str]:
    base = site.root / BUCKET
    return sorted(str(f.relative_to(base)) for f in base.rglob("*") if f.is_file() and str(f.relative_to(base)).startswith(prefix))


def restore(world: World) -> Iterator[Line]:
    """A restore with verification, Litestream's without, and a download of the same bytes."""
    for size in _sizes(world):
        with world.case(), world.site() as site:
            world.job("replicate", site, path=str(world.copy(size)), options=site.options(**LOG))
            litestream = Litestream(site, world.copy(size))
            litestream.once()
            yield from _restores(world, site, litestream, "restore", f"{size // MB} MB", _rounds(world, size))


def _restores(world: World, site: Site, litestream: Litestream, name: str, what: str, rounds: int, *, raw: bool = True) -> Iterator[Line]:
    """`raw`: also beside a download of all objects of the log, one after the other."""
    ours: list[dict[str, Any]] = []
    theirs: list[float] = []
    downloads: list[float] = []
    keys = _objects(site, "app.db-wal/")
    for _ in range(rounds):
        into = world.fresh()
        ours.append(world.job("restore", site, name="app.db", output=str(into / "ours.db"), options=site.options()))
        theirs.append(litestream.restore(into / "theirs.db"))
        if raw:
            downloads.append(world.job("download", site, url=site.url, keys=keys, output=str(into / "raw"))["seconds"])
        shutil.rmtree(into)
    mine = median([run["seconds"] for run in ours])
    note = f"{ours[0]['received'] / MB:.1f} MB in {ours[0]['requests']} requests, {median([run['cpu'] for run in ours]):.2f} s of CPU"
    yield Line(name, what, mine, median(theirs), "s", ("<=", 1.0), "Litestream, not verified", note=note)
    if raw:
        yield Line(name, what, mine, median(downloads), "s", ("<=", 2.0), f"raw GET of {len(keys)} objects in turn")


def restore_commits(world: World) -> Iterator[Line]:
    """A restore after many small commits."""
    count = 300 if world.quick else 10_000
    rounds = 1 if world.quick else 3
    name = "restore-commits"
    with world.case(), world.site() as site:
        # Written into the server's own directory, laid out as the bucket is: commits that need no server are made sooner.
        direct = {"endpoint": site.root.as_uri(), "bucket": BUCKET, **LOG}
        made = world.job("history", path=str(world.fresh() / "app.db"), options=direct, count=count)
        peer = world.fresh() / "app.db"
        with Litestream(site, peer) as litestream:
            # As many in about the same time: it stores what has come together every second.
            pace = {"count": count, "seconds": made["seconds"], "resolve_in_doubt": 1, "tail": 2}
            world.job("paced", path=str(peer), options=None, **pace)
            litestream.sync()
        yield from _restores(world, site, litestream, name, f"{count} small commits in {made['seconds']:.0f} s", rounds)
        short = world.job("shorten", site, name="app.db", options=site.options())
        for line in _restores(world, site, litestream, name, "the same, compacted", rounds, raw=False):
            line.note += f"; compact took {short['seconds']:.1f} s, {short['before']} -> {short['after']} segments"
            yield line


def stored(world: World) -> Iterator[Line]:
    """Bytes in the bucket."""
    size = (20 if world.quick else 100) * MB
    commits = 200 if world.quick else 1000
    with world.case(), world.site() as site:
        path, peer = world.copy(size), world.copy(size)
        world.job("replicate", site, path=str(path), options=site.options(**LOG))
        world.job("replicate", site, path=str(world.copy(size)), options=site.options(ack="log", database_id="both"))
        ours, both = site.stored("app.db-wal/"), site.stored("both~")
        litestream = Litestream(site, peer)
        litestream.once()
        theirs = site.stored("litestream/")
        yield Line("stored", f"{size // MB} MB, the log", ours / MB, theirs / MB, "MB", ("<=", 0.55), "Litestream")
        yield Line("stored", f"{size // MB} MB, log and page view", both / MB, theirs / MB, "MB", None, "Litestream")
        # At the pace at which a database is used: what is stored of Litestream grows with time, too.
        seconds = commits / 50
        with litestream:
            world.job("paced", path=str(peer), options=None, count=commits, seconds=seconds, settle=1, tail=2)
        world.job("paced", site, path=str(path), options=site.options(**LOG), count=commits, seconds=seconds, settle=0, tail=0)
        what = f"the same, and {commits} small commits over {seconds:.0f} s"
        yield Line("stored", what, site.stored("app.db-wal/") / MB, site.stored("litestream/") / MB, "MB", ("<=", 0.25), "Litestream")


def memory(world: World) -> Iterator[Line]:
    """The peak memory of a process that does one large thing."""
    size = (50 if world.quick else 1000) * MB

    def line(what: str, found: dict[str, Any]) -> Line:
        note = f"{found['seconds']:.1f} s"
        return Line("memory", what, found["peak"] / MB, _MEMORY, "MB", ("<=", 1.0), "150 MB", note=note)

    with world.case(), world.site() as site:
        found = world.job("replicate", site, path=str(world.copy(size)), options=site.options(**LOG))
        yield line(f"initial replication of {size // MB} MB", found)
        found = world.job("restore", site, name="app.db", output=str(world.fresh() / "out.db"), options=site.options())
        yield line(f"restore of {size // MB} MB", found)
    with world.case(), world.site() as site:
        found = world.job("transaction", site, path=str(world.fresh() / "app.db"), options=site.options(**LOG), size=size)
        yield line(f"one transaction of {found['wal'] // MB} MB", found)


def reopen(world: World) -> Iterator[Line]:
    """Opening a large database that was cleanly closed."""
    size = (50 if world.quick else 1000) * MB
    with world.case(), world.site() as site:
        path, options = world.copy(size), site.options(ack="log", pages="off")
        world.job("replicate", site, path=str(path), options=options)
        other = world.copy(size)
        pairs = []
        for _ in range(3 if world.quick else 7):
            pairs.append((world.job("reopen", site, path=str(path), options=options), world.job("reopen", path=str(other), options=None)))
    requests = pairs[-1][0]["requests"]
    for turn, what in enumerate(("first open of a process", "second open of a process")):
        ours, theirs = (median([found["seconds"][turn] for found in side]) * 1e3 for side in zip(*pairs, strict=True))
        what = f"{size // MB} MB, {what}, beyond a plain one"
        note = f"{ours:.1f} ms, plainly {theirs:.1f} ms"
        yield Line("reopen", what, ours - theirs, 100.0, "ms", ("<=", 1.0) if turn == 0 else None, "100 ms", note=note)
    asked = ", ".join(f"{count} {kind}" for kind, count in requests.items())
    yield Line("reopen", f"{size // MB} MB, requests", sum(requests.values()), 3, "", ("<=", 1.0), "3 requests", note=asked)


def growth(world: World) -> Iterator[Line]:
    """What a megabyte, and a commit, costs as there are more of them."""
    sizes = [5 * MB, 20 * MB, 50 * MB] if world.quick else [10 * MB, 100 * MB, 1000 * MB]
    best: dict[str, float] = {}
    for size in sizes:
        spent: dict[str, list[float]] = {"initial replication": [], "restore": []}
        for _ in range(_rounds(world, size)):
            with world.case(), world.site() as site:
                path = world.copy(size)
                spent["initial replication"].append(world.job("replicate", site, path=str(path), options=site.options(**LOG))["seconds"])
                output = str(world.fresh() / "out.db")
                spent["restore"].append(world.job("restore", site, name="app.db", output=output, options=site.options())["seconds"])
        for what, seconds in spent.items():
            each = min(seconds) / (size / MB) * 1e3
            note = _bend(each, best, what)
            yield Line("growth", f"{what}, {size // MB} MB", each, best[what], "ms/MB", None, "the least so far", note=note)
    counts = [200, 1000] if world.quick else [1000, 10_000, 100_000]
    for count in counts:
        with world.case():
            options = {"endpoint": world.fresh("s3-").as_uri(), "bucket": BUCKET, "create_bucket": True, **LOG}
            world.job("history", path=str(world.fresh() / "app.db"), options=options, count=count)
            done = [world.job("restore", name="app.db", output=str(world.fresh() / "out.db"), options=options) for _ in range(2)]
        for what, value, unit in (
            ("restore after", min(run["seconds"] for run in done) / count * 1e6, "us/commit"),
            ("memory of a restore after", done[0]["peak"] / MB, "MB"),
        ):
            note = _bend(value, best, what)
            yield Line("growth", f"{what} {count} commits", value, best[what], unit, None, "the least so far", note=note)


def _bend(each: float, best: dict[str, float], what: str) -> str:
    """Says whether a share costs more than it did when there were fewer (what a start costs makes the first ones dear)."""
    least = best[what] = min(best.get(what, each), each)
    return f"not linear any more: {each / least:.1f} times the least" if each > least * 1.3 else "linear"
