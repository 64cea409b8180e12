"""The rehearsal is killed at random moments, and begun again: one runs, and nothing of the earlier ones is left.

python tests/faults_rehearsal.py [ROUNDS] [SEED]
"""

import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from box import make_key, until


def left(folder: Path) -> list[psutil.Process]:
    "The processes that belong to a rehearsal: its own, its sshds, and those on its boxes."
    found = []
    for p in psutil.process_iter():
        try:
            if (
                p.pid != os.getpid()
                and p.status() != psutil.STATUS_ZOMBIE
                and (str(folder) in " ".join(p.cmdline()) or p.environ().get("HOME", "").startswith(str(folder)))
            ):
                found.append(p)
        except (psutil.Error, OSError):
            pass
    return found


def main(rounds: int, seed: int):
    from nanogpt_nb.checkpoints import read_json
    from nanogpt_nb.config import NanoGPTError
    from nanogpt_nb.remote.lambda_cloud import LambdaCloud
    from nanogpt_nb.remote.rehearsal import start_rehearsal, stop_rehearsal

    LambdaCloud.patience, LambdaCloud.waits, LambdaCloud.looks = 1, (0.05,), (0.05, 0.05)  # the service is dead, not busy
    chance, counts = random.Random(seed), dict(killed=0, refused=0, launched=0)
    with tempfile.TemporaryDirectory() as data:
        os.environ |= dict(NANOGPT_NB_DATA=data, HOME=data)
        folder = Path(data, "rehearsal")
        make_key(Path(data, "key"))
        public = Path(data, "key.pub").read_text().strip()
        for _ in range(rounds):
            cloud = start_rehearsal(boot=0.1)
            boxes = [p for p in left(folder / "boxes") if p.is_running()]
            assert not boxes, f"left over: {boxes}"
            pid, keys = read_json(folder / "service.json")["pid"], [k.name for k in cloud.ssh_keys()]
            assert len(keys) == len(set(keys))
            after = chance.random() * 0.6

            def kill(pid=pid, after=after):
                time.sleep(after)
                os.kill(pid, signal.SIGKILL)

            threading.Thread(target=kill).start()
            try:
                if "laptop" not in keys:
                    cloud.add_ssh_key("laptop", public)
                ids = []
                while True:
                    ids.append(cloud.launch("gpu_1x_a10", "us-west-1", "laptop", f"mine {len(ids)}"))
                    counts["launched"] += 1
                    if chance.random() < 0.5:
                        cloud.terminate(ids[-1])
            except NanoGPTError:
                counts["refused"] += 1
            until(
                lambda pid=pid: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE,
                "the end of the killed one",
            )
            counts["killed"] += 1
        start_rehearsal(boot=0.1)
        assert stop_rehearsal()
        until(lambda: not left(folder), f"the end of {left(folder)}")
    print(f"seed {seed}: {counts}, nothing left over")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
