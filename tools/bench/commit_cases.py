"""Benchmarks of a writer's everyday life: what a commit, a read, an import and doing nothing cost."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tools.bench.environment import MB, Line, Litestream, Site, World, median, quantile, run

DISTANCE: Final = 0.02
"""Seconds to the server and back, where a case says so."""


def _against_put(world: World, name: str, what: str, p50: float, p99: float | None, **options: object) -> Iterator[Line]:
    with world.site(latency=DISTANCE) as site:
        found = world.job(
            "commits_and_puts",
            site,
            path=str(world.fresh() / "app.db"),
            options=site.options(**options),
            root=str(site.root),
            blocks=7 if world.quick else 50,
            each=20,
        )
    commits, puts = found["commits"], found["puts"]
    note = f"{len(commits)} commits, segments of {median(found['sizes']):.0f} bytes"
    yield Line(name, f"{what}: p50", median(commits) * 1e3, median(puts) * 1e3, "ms", ("<=", p50), "raw PUT", note=note)
    high = (quantile(commits, 0.99) * 1e3, quantile(puts, 0.99) * 1e3)
    yield Line(name, f"{what}: p99", *high, "ms", ("<=", p99) if p99 else None, "raw PUT")


def commit_log(world: World) -> Iterator[Line]:
    """A commit of 1 to 4 pages with ack=log, 20 ms away."""
    yield from _against_put(world, "commit-log", "ack=log, 20 ms", 1.15, 1.5, ack="log")
    yield from _against_put(world, "commit-log", "ack=log pages=off, 20 ms", 1.15, 1.5, ack="log", pages="off")


def commit_pages(world: World) -> Iterator[Line]:
    """The same with ack=pages."""
    yield from _against_put(world, "commit-pages", "ack=pages, 20 ms", 2.25, None, ack="pages")
    with world.site(latency=DISTANCE) as site:
        peer = world.job("s3vfs", site, url=site.url, count=10 if world.quick else 100)["commits"]
        ours = world.job(
            "commits_and_puts",
            site,
            path=str(world.fresh() / "app.db"),
            options=site.options(ack="pages"),
            root=str(site.root),
            blocks=2,
            each=20,
        )["commits"]
    yield Line("commit-pages", "ack=pages, 20 ms: p50", median(ours) * 1e3, median(peer) * 1e3, "ms", None, "sqlite-s3vfs")


def commit_local(world: World) -> Iterator[Line]:
    """Commits a second with ack=local, and without the library."""
    for level, rounds in (("full", 5), ("normal", 5)):
        ours: list[dict[str, Any]] = []
        theirs: list[dict[str, Any]] = []
        for _ in range(1 if world.quick else rounds):
            seconds, pragmas = 2 if world.quick else 5, [f"PRAGMA synchronous={level}", "PRAGMA wal_autocheckpoint"]
            theirs.append(world.job("load", path=str(world.fresh() / "app.db"), options=None, seconds=seconds, pragmas=pragmas))
            with world.site(latency=DISTANCE) as site:
                options = site.options(ack="local")
                ours.append(world.job("load", site, path=str(world.fresh() / "app.db"), options=options, seconds=seconds, pragmas=pragmas))
        rates = (median([o["rate"] for o in ours]), median([o["rate"] for o in theirs]))
        inside = (median([o["inside"] for o in ours]), median([o["inside"] for o in theirs]))
        note = f"COMMIT p50 {median(ours[0]['times']) * 1e6:.0f} to {median(theirs[0]['times']) * 1e6:.0f} us"
        yield Line("commit-local", f"transactions/s, synchronous={level}", *rates, "/s", (">=", 0.8), "plain APSW", note=note)
        yield Line("commit-local", f"COMMITs/s, synchronous={level}", *inside, "/s", None, "plain APSW")


def threads(world: World) -> Iterator[Line]:
    """16 threads that commit with ack=log, 20 ms away, and one."""
    many = 16
    for what, options in (("", {}), (" pages=off", {"pages": "off"})):
        with world.site(latency=DISTANCE) as site:
            found = world.job(
                "threads",
                site,
                path=str(world.fresh() / "app.db"),
                options=site.options(ack="log", **options),
                many=many,
                seconds=2 if world.quick else 8,
                rounds=2 if world.quick else 5,
            )
        rates = (median(found["many"]), median(found["one"]))
        yield Line("threads", f"{many} threads, ack=log{what}, 20 ms", *rates, "/s", (">=", 10.0), "one thread")


def reads(world: World) -> Iterator[Line]:
    """Reads through the VFS, from the system's page cache and from SQLite's own."""
    size = (20 if world.quick else 100) * MB
    with world.site() as site:
        found = world.job(
            "reads",
            site,
            path=str(world.copy(size)),
            other=str(world.copy(size)),
            options=site.options(ack="local", pages="off"),
            count=2000 if world.quick else 10000,
            rounds=9,
        )
    for name, wanted in (("uncached", 0.85), ("cached", 0.97), ("scan", None)):
        ours, theirs = (median(side) for side in zip(*found[name], strict=True))
        # Each turn is a pair of neighbours in time: the median of their ratios is what other work on the machine disturbs least.
        ratio = median([a / b for a, b in found[name]])
        what = {"scan": "whole scan, uncached"}.get(name, f"point reads, {name}")
        yield Line("reads", what, ours, theirs, "/s", (">=", wanted) if wanted else None, "plain APSW", ratio=ratio)


def imports(world: World) -> Iterator[Line]:
    """What importing the package costs beyond Python and APSW."""

    def seconds(code: str) -> float:
        began = time.perf_counter()
        done = run([sys.executable, "-c", code], None, 60)
        took = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(done.stderr)
        return took

    codes = ("import bottomless_wal", "import apsw", "pass")
    rounds = [[seconds(code) for code in codes] for _ in range(6 if world.quick else 16)][1:]
    ours, apsw, nothing = (min(side) for side in zip(*rounds, strict=True))
    loaded = run([sys.executable, "-c", "import sys, bottomless_wal; sys.stdout.write(str('boto3' in sys.modules))"], None, 60).stdout
    note = f"best of {len(rounds)}; APSW's own {(apsw - nothing) * 1e3:.0f} ms; boto3 imported: {'yes' if loaded == 'True' else 'no'}"
    yield Line("import", "import bottomless_wal", (ours - apsw) * 1e3, 60.0, "ms", ("<=", 1.0), "60 ms", note=note)


def loopback(world: World) -> Iterator[Line]:
    """A commit with nothing between it and the server, and Litestream's commit and sync."""
    for what, latency, pages, limit in (
        ("pages=off, 0 ms", 0.0, "off", 1.2),
        ("0 ms", 0.0, "commit", None),  # (what goes on in the background burdens the peer as well)
        ("pages=off, a server without create-only writes, 0 ms", None, "off", None),
    ):
        with world.site(latency=latency) as site:
            peer = world.fresh() / "app.db"
            with Litestream(site, peer) as litestream:
                found = world.job(
                    "loopback",
                    site,
                    path=str(world.fresh() / "app.db"),
                    options=site.options(ack="log", pages=pages),
                    peer=str(peer),
                    socket=litestream.socket,
                    count=100 if world.quick else 1000,
                )
        ours, theirs = median(found["ours"]) * 1e3, median(found["theirs"]) * 1e3
        target = ("<=", limit) if limit else None
        note = f"p99 {quantile(found['ours'], 0.99) * 1e3:.1f} to {quantile(found['theirs'], 0.99) * 1e3:.1f} ms"
        yield Line("loopback", f"ack=log {what}: p50", ours, theirs, "ms", target, "Litestream, commit and sync -wait", note=note)


def idle(world: World) -> Iterator[Line]:
    """Requests of a database that is open and that nobody uses."""
    seconds = 6 if world.quick else 60

    def during(site: Site, began: float, ended: float) -> int:
        assert site.distance is not None
        return sum(1 for row in site.distance.tell("log") if began < row[2] < ended)

    with world.site(latency=0.0) as site:
        peer = world.fresh() / "app.db"
        found = world.job("idle", site, path=str(world.fresh() / "app.db"), options=site.options(ack="log"), settle=2, seconds=seconds)
        ours = during(site, found["began"], found["ended"])
    with world.site(latency=0.0) as site:
        world.job("load", path=str(peer), options=None, seconds=0.2, pragmas=[])
        with Litestream(site, peer):
            time.sleep(5)
            began = time.time()
            time.sleep(seconds)
            theirs = during(site, began, time.time())
    # (A ratio of nothing to nothing says nothing.)
    yield Line("idle", f"requests in {seconds} s", ours, theirs, "", ("<=", 0.0), "Litestream", ratio=float(ours))


# --- lag and requests ----------------------------------------------------------------------------------------------------------------


def _tokens_of_segments(bodies: Path, log: list[Any]) -> Iterator[tuple[float, set[str]]]:
    """(when it was stored, the tokens in it) of each segment that was put."""
    from bottomless_wal.formats import segment

    for number, (method, path, _, done, _) in enumerate(log, 1):
        name = path.partition("?")[0]
        if method == "PUT" and re.search(r"-wal/[0-9a-f]{16}-[0-9a-f]{16}$", name):
            found = segment.decode((bodies / f"{number:08d}").read_bytes(), name=name)
            pages = b"".join(page.data for block in found.blocks() for page in block) if found.header.body is None else b""
            yield done, {token.decode() for token in re.findall(rb"<\w{20}>", pages)}


def _tokens_of_ltx(bodies: Path, log: list[Any]) -> Iterator[tuple[float, set[str]]]:
    """The same of Litestream's files, whose compression leaves alone what it has not seen before."""
    for number, (method, path, _, done, _) in enumerate(log, 1):
        if method == "PUT" and "/0000/" in path:
            yield done, {token.decode() for token in re.findall(rb"<\w{20}>", (bodies / f"{number:08d}").read_bytes())}


def _lags(made: list[Any], stored: Iterator[tuple[float, set[str]]]) -> list[float]:
    """Seconds from each commit until an object that holds its row was stored."""
    first: dict[str, float] = {}
    for when, tokens in stored:
        for token in tokens:
            first.setdefault(token, when)
    found = [first[token] - when for token, when in made if token in first]
    if len(found) < len(made) * 0.9:
        raise RuntimeError(f"only {len(found)} of {len(made)} commits were found in what was stored")
    return found


def lag(world: World) -> Iterator[Line]:
    """How far what is stored is behind the writer, and what keeping up costs in requests."""
    count, seconds = (250, 5) if world.quick else (1000, 20)
    load = {"count": count, "seconds": seconds, "resolve_in_doubt": 2.0, "tail": 2.0}

    def measure(options: dict[str, Any] | None) -> tuple[list[float], int, str]:
        with world.site(latency=DISTANCE) as site:
            assert site.distance is not None
            bodies = world.fresh("bodies-")
            site.distance.tell("bodies", str(bodies))
            path = world.fresh() / "app.db"
            if options is None:
                with Litestream(site, path):
                    found = world.job("paced", path=str(path), options=None, **load)
                log, tokens = site.distance.tell("log"), _tokens_of_ltx
            else:
                found = world.job("paced", site, path=str(path), options=site.options(**options), **load)
                log, tokens = site.distance.tell("log"), _tokens_of_segments
            lags = _lags(found["made"], tokens(bodies, log))
            # Litestream is stopped, and ours closed, after `ended`: that is no part of keeping up.
            counted = [row[0] for row in log if found["began"] < row[2] < found["ended"]]
            return lags, len(counted), ", ".join(f"{counted.count(kind)} {kind}" for kind in sorted(set(counted)))

    theirs, their_requests, their_kinds = measure(None)
    ours, _, _ = measure({"ack": "local"})
    note = f"p99 {quantile(ours, 0.99) * 1e3:.0f} to {quantile(theirs, 0.99) * 1e3:.0f} ms; {count} commits over {seconds} s"
    yield Line("lag", "ack=local, 20 ms: p50", median(ours) * 1e3, median(theirs) * 1e3, "ms", ("<=", 0.1), "Litestream", note=note)
    # Commits that are gathered for t wait for t/2 on the average: as long as Litestream's do.
    interval = round(max(0.0, median(theirs) * 2 - DISTANCE), 2)
    gathered, our_requests, our_kinds = measure({"ack": "local", "pages": "checkpoint", "interval": interval})
    note = f"interval={interval:g}: lag {median(gathered):.2f} to {median(theirs):.2f} s; {our_kinds} to {their_kinds}"
    what = f"requests for {count} commits over {seconds} s"
    yield Line("lag", what, our_requests, their_requests, "", ("<=", 1.0), "Litestream", note=note)


def full_load(world: World) -> Iterator[Line]:
    """The writer's worst moment, and the WAL's size, under all the load that it can make."""
    seconds = 6 if world.quick else 30
    job = {"seconds": seconds, "pragmas": ["PRAGMA synchronous=normal"], "rows": 60}
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for _ in range(1 if world.quick else 2):
        with world.site(latency=DISTANCE) as site:
            peer = world.fresh() / "app.db"
            with Litestream(site, peer):
                theirs.append(world.job("load", site, path=str(peer), options=None, **job))
        with world.site(latency=DISTANCE) as site:
            options = site.options(ack="local", pages="off")
            ours.append(world.job("load", site, path=str(world.fresh() / "app.db"), options=options, **job))
    worst = [median([run["times"][-1] for run in side]) * 1e3 for side in (ours, theirs)]
    wal = [median([run["wal"] for run in side]) / MB for side in (ours, theirs)]
    rates = [median([run["rate"] for run in side]) for side in (ours, theirs)]
    note = f"{rates[0]:.0f} to {rates[1]:.0f} commits/s"
    yield Line("full-load", f"worst transaction of {seconds} s, ack=local", worst[0], worst[1], "ms", ("<=", 0.25), "Litestream", note=note)
    yield Line("full-load", "the WAL's size", wal[0], wal[1], "MB", ("<=", 0.1), "Litestream")
