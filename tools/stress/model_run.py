#!/usr/bin/env python3
"""Runs the model of tests/support/model.py for many steps, and prints what was done as one line of JSON.

A failure prints the steps that lead to it, as short as they were found, and the command that repeats the run.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.errors import Flaky, FlakyStrategyDefinition
from hypothesis.stateful import run_state_machine_as_test

from tests.support.model import FAILURES, FIGURES, Model
from tests.support.model_process import nursery

logger = logging.getLogger(__name__)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--length", type=int, default=60, help="steps in one run, at most")
    parser.add_argument("--no-shrink", action="store_true", help="print the first failure as it is")
    parser.add_argument("--log", default="", help="a file for what the processes log")
    parser.add_argument("--directory", default=None, help="where the machines and the store are; a file system in memory is quicker")
    args = parser.parse_args()
    number = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 32)
    phases = (Phase.generate,) if args.no_shrink else (Phase.generate, Phase.shrink)
    began = time.monotonic()
    steps, failed = 0, False

    class Counted(Model):
        """The model, its steps counted."""

        def check_invariants(self, *rest: object, **more: object) -> None:
            nonlocal steps
            steps += 1
            super().check_invariants(*rest, **more)

    with nursery() as source, tempfile.TemporaryDirectory(prefix="model-run-", dir=args.directory) as base:
        Model.nursery, Model.base, Model.log = source, base, args.log
        chunk = 0
        while steps < args.steps and not failed:
            # Chunk by chunk, so that as many steps are made as were asked for.
            how = settings(
                max_examples=25, stateful_step_count=args.length, deadline=None, database=None, phases=phases, print_blob=False,
                suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
            )  # fmt: skip
            try:
                run_state_machine_as_test(seed(number + chunk)(Counted), settings=how)
            except (Flaky, FlakyStrategyDefinition) as error:
                # Real processes need not do the same twice, which hypothesis notices; that alone is no failure.
                failed = bool(FAILURES)
                FIGURES["differed"] += 1
                logger.debug("%s", error)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
                failed = True
                traceback.print_exception(error, file=sys.stdout)
            if failed:
                print(f"FAILED after {steps} steps. First:", *FAILURES, sep="\n")
                print(f"Repeat: tools/stress/model_run.py --seed {number + chunk} --length {args.length} --steps 1")
            chunk += 1
    print(json.dumps({"steps": steps, "seconds": round(time.monotonic() - began, 1), "seed": number, **dict(sorted(FIGURES.items()))}))
    return failed


if __name__ == "__main__":
    sys.exit(main())
