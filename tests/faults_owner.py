"""Leases of the rehearsal whose owner (and at times the guardian, too) is killed, ended or interrupted at random moments: python tests/faults_owner.py [ROUNDS] [SEED]

Each must be given back all the same, with nothing left running, and cost no more than the ledger says.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from box import until

from nanogpt_nb.remote.guardian import is_held, read
from nanogpt_nb.remote.lease_folder import records
from nanogpt_nb.remote.ledger import gc, ledger
from nanogpt_nb.remote.rehearsal import asks, home, start_rehearsal, stop_rehearsal

OWNER = """
import sys, time
from nanogpt_nb.remote.lease import lease
with lease("rehearsal", name=sys.argv[1], budget=1, quiet=True) as gpu:
    time.sleep(float(sys.argv[2]))
"""


def one(name: str, rng: random.Random, service, done: Counter, bad: list):
    "A lease that is broken off: by what, and when, is drawn."
    how, after, guardian = rng.choice(["KILL", "TERM", "INT", "none"]), rng.uniform(0, 14), rng.random() < 0.3
    with tempfile.TemporaryFile("w+") as out:
        p = subprocess.Popen([sys.executable, "-c", OWNER, name, str(rng.uniform(0, 3))], stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        time.sleep(after)
        mine = [r for r in records() if r.name == name]
        if guardian and mine and is_held(mine[0]):
            with contextlib.suppress(OSError, KeyError):
                os.kill(read(mine[0].path / "guardian.json")["pid"], signal.SIGKILL)
            how += "+guardian"
        if not how.startswith("none"):
            p.send_signal(getattr(signal, "SIG" + how.partition("+")[0]))
        try:
            p.wait(90)
            if "guardian" in how and mine and mine[0].state.phase != "ended":
                gc(service, patience=10)
            until(lambda: all(r.state.phase == "ended" for r in records() if r.name == name), f"{name} to be given back", 300, 0.2)
        except Exception as e:
            out.seek(0)
            bad.append(f"{name} ({how} after {after:.1f} s): {type(e).__name__} {e}\n{out.read()[-800:]}")
        finally:
            p.kill()
            p.wait()
    done[how] += 1


def main(rounds: int, seed: int):
    rng, done, bad = random.Random(seed), Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= dict(HOME=folder, NANOGPT_NB_DATA=f"{folder}/data", XDG_CACHE_HOME=f"{folder}/cache", OMP_NUM_THREADS="1")
        for name in ("SSH_AUTH_SOCK", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "LAMBDA_API_KEY", "LAMBDA_API_URL"):
            os.environ.pop(name, None)
        service = start_rehearsal(boot=0.3)
        try:
            for batch in range(0, rounds, 8):
                threads = [threading.Thread(target=one, args=(f"box{i}", random.Random(rng.random()), service, done, bad)) for i in range(batch, min(rounds, batch + 8))]
                for t in threads:
                    t.start()
                for t in threads:
                    t.join()
                left = [o.name for o in service.instances() if o.status not in ("terminated", "terminating")]
                if left:
                    bad.append(f"left running: {left}")
                print(f"{min(rounds, batch + 8)} of {rounds}: {dict(done)}, {len(bad)} bad", flush=True)
            bill = asks(home(), "/rehearsal/bill")
            told, billed = ledger(rehearsals=True).total(rehearsal=True), sum(b["dollars"] for b in bill["bill"].values())
            two = [r.id for r in records() if len(r.state.instances) > 1]
            print(f"{len(bill['bill'])} instances, billed ${billed:.2f}, the ledger says ${told:.2f}; leases with more than one: {len(two)}")
            if billed > told + 0.01:
                bad.append("the bill is more than the ledger says")
            if two:
                bad.append(f"more than one instance: {two}")
        finally:
            for r in records(open=True):
                with contextlib.suppress(OSError, KeyError):
                    os.kill(read(r.path / "guardian.json")["pid"], signal.SIGKILL)
            stop_rehearsal()
            for i, text in enumerate(bad):
                print(f"--- {i + 1}\n{text}")
                for r in records():
                    if r.name in text.split(" ")[0]:
                        print((r.path / "events.jsonl").read_text(), Path(r.path / "guardian.log").read_text()[-500:])
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 8, int(sys.argv[2]) if sys.argv[2:] else 0))
