"""Push a project again and again, with a fault at a random moment each time: faults_push.py FAULTS SEED [full].

The faults: the connection cut after a random number of bytes, the client killed, the rsync there killed, sshd restarted, the helper
program there killed; with `full`, all on a disk of 4 MB that is filled up now and then (needs root, for mount).
After each fault every file there is as it was or as it is to be, and the next push makes it what is here. Prints a JSON object of counts.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from box import Box
from test_push import fill, nothing_aside, tree

import nanogpt_nb.remote.push as push_module
from nanogpt_nb.remote.agent import HostError
from nanogpt_nb.remote.push import push
from nanogpt_nb.remote.ssh import Host
from nanogpt_nb.remote.there_tree import ASIDE


class Env:
    "What Box.use needs of a monkeypatch."

    def setenv(self, name, value):
        os.environ[name] = value

    def delenv(self, name, raising=False):
        os.environ.pop(name, None)


def change(project: Path, r: random.Random):
    "Edit, add and delete a few files; turn one into a folder or back."
    for _ in range(r.randint(1, 6)):
        path = project / r.choice(["a.py", "b/c.py", "b/d e.py", "f/g/h.bin", "big.bin", "n\nl", "thing"])
        made = r.choice(["write", "write", "write", "delete", "turn"])
        if path.is_dir() and made != "turn":
            continue
        if made == "write":
            fill(project, {str(path.relative_to(project)): r.randbytes(r.choice([0, 10, 3_000, 200_000]))})
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
            if made == "turn":
                fill(path, {"x.py": r.randbytes(100)})


def far(place: Path) -> dict:
    return {p: e for p, e in tree(place).items() if not p.startswith(ASIDE)} if place.exists() else {}


def kill(box: Box, word: bytes) -> int:
    "Kill the processes there whose command line has a word in it; how many."
    n = 0
    for pid in box.processes():
        with contextlib.suppress(OSError):
            if word in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
                n += 1
    return n


def attempt(kind: str, box: Box, project: Path, path: str, r: random.Random) -> str:
    "One push with a fault; what came of it."
    push_module.SMALL = r.choice([0, 512_000])  # by rsync, or in one trip
    host, after, box.wire.rate, struck = Host.of("gpu"), r.uniform(0, 0.5), 1_000_000, []
    if kind == "client killed":
        if not (pid := os.fork()):
            with contextlib.suppress(BaseException):
                push(project, "gpu", path=path, quiet=True)
            os._exit(0)
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
        box.wire.rate = None
        return "killed" if os.WIFSIGNALED(os.waitpid(pid, 0)[1]) else "too late"
    if kind == "cut":
        box.wire.bytes, box.wire.cut_after = 0, int(10 ** r.uniform(1, 5.5))
    else:
        doing = {"sshd restarted": lambda: (box.stop(), box.start()), "rsync there killed": lambda: kill(box, b"--server"), "helper killed": lambda: kill(box, b"/there-")}
        timer = threading.Timer(after, lambda: struck.append(doing[kind]()))
        timer.start()
    try:
        push(project, host, path=path, quiet=True)
        struck.append(kind == "cut" and box.wire.cut_after is None)
        return "done" if any(struck) else "too late"
    except HostError as e:
        return "full" if "make room" in str(e) else f"told: {str(e)[:60]}"
    finally:
        if kind != "cut":
            timer.join()
        box.wire.cut_after = box.wire.rate = None


def faults(folder: Path, n: int, seed: int, full: bool = False) -> dict:
    "How often each fault was met, and how it ended; raises when anything is lost."
    r, counts, times = random.Random(seed), Counter(), []
    kinds = ["cut", "cut", "client killed", "rsync there killed", "sshd restarted", "helper killed"]
    with Box(folder) as box:
        box.use(Env())
        project, disk = fill(folder / "project", {"pyproject.toml": "", "a.py": "x"}), box.home / "disk"
        disk.mkdir()
        if full:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
        try:
            push(project, "gpu", path="~/disk/p", quiet=True)
            for _ in range(n):
                before, kind = far(disk / "p"), r.choice(kinds)
                change(project, r)
                if full:
                    (disk / "filler").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - r.choice([2_000, 20_000, 300_000, 2_000_000]))))
                came, after = attempt(kind, box, project, "~/disk/p", r), tree(project)
                now = far(disk / "p")
                mixed = {p for p in {*before, *after, *now} if now.get(p) not in (before.get(p), after.get(p))}
                assert not mixed, (kind, came, mixed)
                whole = "all as it is to be" if now == after else "all as before" if now == before else "some of each"
                counts[f"{kind}: {came}, {whole}"] += 1
                (disk / "filler").unlink(missing_ok=True)
                began = time.monotonic()
                push(project, "gpu", path="~/disk/p", quiet=True)
                times.append(time.monotonic() - began)
                assert far(disk / "p") == after and nothing_aside(disk / "p"), kind
            left = kill(box, b"--server")
        finally:
            Host.of("gpu").close()
            if full:
                subprocess.run(["umount", "-l", disk], check=True)
    return dict(faults=n, seed=seed, full=full, rsyncs_left=left, slowest_push_after=round(max(times), 1), **dict(sorted(counts.items())))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as tmp:
        print(json.dumps(faults(Path(tmp), int(sys.argv[1]), int(sys.argv[2]), "full" in sys.argv[3:]), indent=2))
