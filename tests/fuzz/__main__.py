"""The long run: ``python -m tests.fuzz --minutes 30``. Failures go into the corpus, and the exit code is 1."""

import argparse
import itertools
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tests.fuzz.running import Outcome, all_kinds, keep, run_cases, sound_folder

_CASES = 50  # of a child


def main() -> int:
    """Fuzz every kind in turn until the time is over."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--jobs", type=int, default=2, help="cases that run at once")
    parser.add_argument("--kinds", default=",".join(all_kinds()), help="which, separated by commas")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args()
    names = given.kinds.split(",")
    for name in names:
        sound_folder(name)
    end = time.monotonic() + 60 * given.minutes
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    failed = 0
    numbered = zip(itertools.cycle(names), itertools.count(given.seed), strict=False)
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("fork")) as pool:
        waiting = [(name, pool.submit(run_cases, name, seed, _CASES)) for name, seed in itertools.islice(numbered, given.jobs)]
        while waiting:
            name, future = waiting.pop(0)
            outcome: Outcome = future.result()
            counts[name] += outcome.counts
            for words, files in outcome.failures:
                failed += 1
                counts[name]["FAILED"] += 1
                print(f"{name}: {words.strip().splitlines()[-1][:300]}\n  kept as {keep(name, words, files)}", flush=True)
            if time.monotonic() < end:
                following, seed = next(numbered)
                waiting.append((following, pool.submit(run_cases, following, seed, _CASES)))
    for name, found in counts.items():
        print(f"{name}: {found.total():,} cases, " + ", ".join(f"{number:,} {what}" for what, number in sorted(found.items())))
    print(f"{sum(found.total() for found in counts.values()):,} cases of {len(names)} kinds, {failed} failures (seed {given.seed})")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
