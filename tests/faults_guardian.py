"""The guardian's process, killed, stopped and cut off at random moments: python tests/faults_guardian.py ROUNDS SEED

Each round rents an instance of the rehearsed service, sets a real guardian on it, asks for the end at some moment, and meanwhile
kills or stops the guardian, cuts, refuses or swallows its connections, and has the service fail before and after the effect.
Whoever finds no guardian at work starts one, as login and the process that rents do. In the end the instance has to be
terminated, another one untouched, the lease ended, and the key in no file, no command line and no environment.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from test_guardian import KEY, Cloud, files_with_key, lease, pid_of, where_key_shows  # noqa: E402

from nanogpt_nb.remote.guardian import STALE, is_guarded, is_held, start_guardian  # noqa: E402
from nanogpt_nb.remote.rehearsal_machine import Fault  # noqa: E402

LIMIT = 120  # seconds for a round


def strike(rng, cloud, record) -> str:
    "Do something bad, and say what."
    what = rng.choice("kill stop refuse cut black before after silence nothing".split())
    at_work = is_held(record) and (record.path / "guardian.json").exists()
    if what == "kill" and at_work:
        os.kill(pid_of(record), signal.SIGKILL)
    elif what == "stop" and at_work:
        os.kill(pid_of(record), signal.SIGSTOP)
        age(record)
    elif what == "refuse":
        cloud.wire.refuse = True
    elif what == "black":
        cloud.wire.black = True
    elif what == "cut":
        cloud.wire.cut()
    elif what in ("before", "after"):
        cloud.fail(Fault(rng.choice(["terminate", "GET /instances", "."]), rng.randint(1, 3), what, status=rng.choice([500, 502, 503])))
    elif what == "silence":
        cloud.fail(Fault(rng.choice(["terminate", "GET /instances"]), 1, rng.choice(["dropped", "dropped_before", "garbage"])))
    return what


def age(record):
    "Make the beat of a stopped guardian an old one, without waiting for it."
    import json

    file = record.path / "guardian.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | dict(at=said["at"] - STALE - 1)))


def one(rng) -> Counter:
    folder, cloud, done = Path(tempfile.mkdtemp()), Cloud(), Counter()
    os.environ.update(HOME=str(folder), NANOGPT_NB_DATA=str(folder / "data"))
    try:
        record = lease(cloud)
        id = cloud.rent(record)
        other = cloud.client.launch("gpu_1x_a10", cloud.service.capacity["gpu_1x_a10"][0], "k", "somebody-else")
        pids, end, asked, began = set(), time.monotonic() + rng.uniform(0, 4), False, time.monotonic()
        quiet_from = began + rng.uniform(3, 10)  # from then on the network is well
        while record.state.phase != "ended":
            if time.monotonic() - began > LIMIT:
                raise AssertionError(f"not ended after {LIMIT} s: {dict(done)}\n{(record.path / 'guardian.log').read_text()[-3000:]}")
            if not is_guarded(record):
                done["started"] += bool(start_guardian(record, KEY))
                pids.add(pid_of(record))
            if time.monotonic() < quiet_from:
                done[strike(rng, cloud, record)] += 1
            else:
                cloud.wire.refuse = cloud.wire.black = False
            if not asked and time.monotonic() > end:
                asked = bool(record.note("end", why="asked"))
            assert where_key_shows(pids) == []
            time.sleep(rng.uniform(0, 0.6))
            if rng.random() < 0.5:
                if cloud.wire.black:
                    cloud.wire.cut()
                cloud.wire.refuse = cloud.wire.black = False
        assert cloud.status(id) == "terminated" and cloud.status(other) == "active"
        assert files_with_key(folder) == []
        return done
    finally:
        try:
            os.kill(pid_of(record), signal.SIGKILL)
        except OSError:
            pass
        cloud.close()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    rounds, seed = (int(w) for w in (*sys.argv[1:], "10", "0")[:2]) if len(sys.argv) > 1 else (10, 0)
    total = Counter()
    for n in range(rounds):
        total += one(random.Random(f"{seed}-{n}"))
        print(f"round {n + 1} of {rounds}: {dict(total)}", flush=True)
