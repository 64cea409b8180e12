"""Cut the connection at random moments under a tunnel and under a starting JupyterLab: python tests/faults_reach.py [ROUNDS [SEED]]

Through the tunnel goes a download of known length, whose end is the end of the connection: it must come whole, or end in a reset.
The next one must come whole. A JupyterLab (a stand-in that starts at once) that is asked for while the connection is cut must be one job.
"""

import os
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from box import Box, until
from test_reach import SERVER, Server, everything

from nanogpt_nb.remote.forward import forward
from nanogpt_nb.remote.lab import lab, stop_lab
from nanogpt_nb.remote.ssh import Host

DATA = os.urandom(1 << 20)


def pour(one):
    one.recv(1)
    one.sendall(DATA)


def download(port: int) -> str:
    "whole, reset, or cut: an end that looks like a good one and is none."
    try:
        with socket.create_connection(("127.0.0.1", port)) as s:
            s.settimeout(120)
            s.sendall(b"?")
            got = everything(s)
    except ConnectionError:
        return "reset"
    return "whole" if got == DATA else f"cut at {len(got)}" if DATA.startswith(got) else "garbled"


def tunnels(box, host, rounds: int) -> Counter:
    "What became of downloads during which the connection was cut, and of those after them."
    seen = Counter()
    with Server(pour) as there, forward(host, there.port) as tunnel:
        for _ in range(rounds):
            n = random.choice([1, 1, 3])
            results = []
            threads = [threading.Thread(target=lambda into=results: into.append(download(tunnel.port))) for _ in range(n)]
            if random.random() < 0.5:
                box.wire.cut_after = box.wire.bytes + random.randrange(n * len(DATA))
            [t.start() for t in threads]
            if box.wire.cut_after is None:
                time.sleep(random.uniform(0, 0.08))
                box.wire.cut()
            [t.join() for t in threads]
            box.wire.cut_after = None
            seen.update(f"during: {r}" for r in results)
            seen[f"after: {download(tunnel.port)}"] += 1
    return seen


def labs(box, host, rounds: int) -> Counter:
    "How many jobs came of a JupyterLab that was asked for while the connection was cut."
    seen = Counter()
    (box.home / "nanogpt" / "lecture").mkdir(parents=True, exist_ok=True)
    python = box.folder / "python"
    (box.folder / "server.py").write_text(SERVER)
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\nexec {sys.executable} {box.folder}/server.py\n')
    python.chmod(0o755)
    host.settings["python"] = str(python)
    for _ in range(rounds):
        host.connect()
        box.wire.cut_after = box.wire.bytes + random.randrange(5000)
        made = lab(host, path="nanogpt/lecture", open_browser=False)
        box.wire.cut_after = None
        running = [one["job"] for one in host.call("lab.labs")["labs"]]
        seen[f"{len(running)} running, {'the one' if running == [made.id] else 'another'} that was given"] += 1
        stop_lab(host, grace=5)
        until(lambda: not [p for p in box.processes() if b"server.py" in cmdline(p)], "the end of the servers")
    return seen


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def main(rounds: int = 300, seed: int | None = None):
    seed = seed if seed is not None else random.randrange(1 << 30)
    random.seed(seed)
    print(f"{rounds} rounds, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder, Box(Path(folder)) as box:
        os.environ["HOME"] = str(box.laptop)
        os.environ.pop("SSH_AUTH_SOCK", None)
        with Host(box.name) as host:
            began, before = time.monotonic(), box.wire.connections
            seen = tunnels(box, host, rounds)
            print(
                f"tunnel, {box.wire.connections - before} connections, {time.monotonic() - began:.0f} s: {dict(sorted(seen.items()))}",
                flush=True,
            )
            assert (
                set(seen) <= {"during: whole", "during: reset", "after: whole"} and seen["after: whole"] == rounds and seen["during: reset"]
            )
            began, before = time.monotonic(), box.wire.connections
            seen = labs(box, host, max(1, rounds // 6))
            print(f"JupyterLab, {box.wire.connections - before} connections, {time.monotonic() - began:.0f} s: {dict(seen)}", flush=True)
            assert set(seen) == {"1 running, the one that was given"}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
