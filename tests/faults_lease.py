"""Play random schedules of faults against a lease, and look what was billed and lost: faults_lease.py ROUNDS SEED [PROCESSES].

A simulated clock, so an evening takes milliseconds. With $NANOGPT_NB_DESCRIBED=1 all that is asked and answered is held against
Lambda's own description of its service too (see openapi.py). Prints each schedule that should not have been, made as small as it gets, with
what happened in it, and at the end a JSON object of counts.
"""

import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import openapi
import sim
from simplan import plan, shrink

if os.environ.get("NANOGPT_NB_DESCRIBED", "0") not in ("", "0"):
    openapi.watch()


def play(plan: dict) -> sim.Story:
    "Run one schedule; what is not as described is wrong as well."
    story = sim.play(plan)
    story.wrong += openapi.mismatches()
    return story


def one(seed: int) -> dict:
    "What came of one schedule."
    began = time.perf_counter()
    openapi.SEEN.clear()
    try: s = play(plan(seed))
    except RuntimeError as e: raise RuntimeError(f"seed {seed}: {e}") from e
    return dict(checked=openapi.SEEN.total(), seed=seed, wrong=s.wrong, billed=s.billed, over=s.over, runs=s.runs, home=s.home, killed=s.killed, launched=s.launched, places=[line.split(" at ")[-1].split(" for ")[0] for line in s.log if " killed at " in line or " stands still at " in line], seconds=time.perf_counter() - began)


def kind(wrong: str) -> str:
    return "".join(c for c in wrong if not c.isdigit())[:60]


def main(rounds: int, seed: int, processes: int = 1, shown: int = 3) -> dict:
    "Play `rounds` schedules from `seed` on."
    counts, told, over, places = Counter(), Counter(), 0.0, set()
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=500) as pool:
        for r in pool.imap_unordered(one, range(seed, seed + rounds), chunksize=10):
            counts.update(schedules=1, checked=r["checked"], wrong=bool(r["wrong"]), runs=r["runs"], home=r["home"], killed=r["killed"], launched=r["launched"], over_budget=r["over"] > 0)
            over = max(over, r["over"])
            places.update(r["places"])
            for w in dict.fromkeys(map(kind, r["wrong"])):
                told[w] += 1
                if told[w] > shown: continue
                print(f"seed {r['seed']}: {r['wrong']}", flush=True)
                if told[w] == 1: explain(r["seed"], w)
            counts["milliseconds"] += round(1000 * r["seconds"])
            if counts["schedules"] % 500 == 0: print(json.dumps(dict(counts)), flush=True)
    return dict(counts) | dict(most_over_budget=over, lines_killed_at=len(places), kinds=dict(told))


def explain(seed: int, what: str):
    "Print the smallest schedule found that does the same, and its story."
    fails = lambda p: any(kind(w) == what for w in play(p).wrong)
    small = shrink(plan(seed), fails)
    story = play(small)
    print(json.dumps(small), *story.log[-60:], story.wrong, sep="\n", flush=True)


if __name__ == "__main__":
    began = time.time()
    print(json.dumps(main(*map(int, sys.argv[1:])) | dict(took=round(time.time() - began))))
