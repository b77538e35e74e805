"""Ends every command that writes at many places: ``python -m tests.interrupted --places 30``. Exit code 1 if anything broke."""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

# Read when transformers is imported, below.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
os.environ |= {"TRANSFORMERS_VERBOSITY": "error"}

from tests.interrupted.commands import COMMANDS, make_base
from tests.interrupted.disks import NoDiskError
from tests.interrupted.trying import BrokenError, Trial, imported


def main() -> int:
    """End each command at each place, and show what came of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.interrupted", description=__doc__)
    parser.add_argument("--places", type=int, default=30, help="of each command, by SIGKILL, SIGTERM and SIGINT in turn")
    parser.add_argument("--sizes", type=int, default=5, help="of files that are the largest allowed, for each command")
    parser.add_argument(
        "--disks", type=int, default=5, help="that are full or become full, beside a read-only one (needs root)"
    )
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    given = parser.parse_args()
    imported()
    broken, tried, started = 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="interrupted-") as folder:
        base = make_base(Path(folder, "base"))
        for name in given.only:
            counts: Counter[str] = Counter()
            trial = Trial(COMMANDS[name], base, Path(folder, "disk", "here"))
            for attempt in (*trial.places(given.places), *trial.sizes(given.sizes), *trial.disks(given.disks)):
                tried += 1
                try:
                    counts[trial.end_at(attempt)] += 1
                except NoDiskError:
                    counts["without a disk to try"] += 1
                except BrokenError as error:
                    counts["BROKEN"] += 1
                    print(f"{name}: {error}", flush=True)
            broken += counts["BROKEN"]
            print(
                f"{name} ({trial.reference.steps} steps): " + ", ".join(f"{n} {what}" for what, n in counts.items()), flush=True
            )
    print(f"{tried} endings of {len(given.only)} commands, {broken} broken, {(time.monotonic() - started) / 60:.0f} min")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
