"""Kill one of two ranks again and again at random moments, and go on each time: faults_ranks.py FOLDER KILLS SEED.

Each rank is a fork of this process, so that torch is imported once; as torchrun does, the one that is left gets a SIGTERM.
Prints a JSON object of what was seen; the run has to end on the bits of one that nobody killed.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from box import free_port
from kill_many import CONFIG, work

from nanogpt_nb.runs import Run

PATIENCE = 60  # seconds in which a rank has to end when another has


def start(folder: Path, config, world: int = 2) -> list[int]:
    "The process ids of ranks that begin the run, or go on with it."
    port, pids = free_port(), []
    for rank in range(world):
        sys.stdout.flush()
        if pid := os.fork():
            pids.append(pid)
            continue
        here = dict(RANK=rank, WORLD_SIZE=world, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ.update({k: str(v) for k, v in here.items()})
        code = 1
        try:
            os.dup2(os.open(folder.parent / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            work(folder, config)
            code = 0
        except BaseException as e:
            print(repr(e), file=sys.stderr, flush=True)
        os._exit(code)
    return pids


def ended(pid: int) -> int:
    "The status of a rank that has to end by itself."
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    sys.exit("a rank goes on when another has ended")


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as warm:  # what is imported late is imported here, once
        work(Path(warm) / "warm", CONFIG.replace(max_iters=2))
    random.seed(seed)
    seen: dict[str, int] = {}
    while sum(seen.values()) < kills:
        pids = start(folder, CONFIG)
        time.sleep(random.uniform(0.1, 3))  # the random moment
        victim, number = random.randrange(2), random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        os.kill(pids[victim], number)
        if number == signal.SIGKILL:
            time.sleep(random.choice([0, 0, random.uniform(0, 0.1)]))
        os.kill(pids[1 - victim], signal.SIGTERM)
        codes = [os.waitstatus_to_exitcode(ended(pid)) for pid in pids]
        run = Run(folder)
        state = run.state if (folder / "config.json").exists() else "not begun"
        if state not in ("not begun", "killed", "failed", "stopped", "running"):
            sys.exit(f"{state} after {codes}")
        if number == signal.SIGTERM and state == "stopped" and codes != [0, 0]:
            sys.exit(f"stopped, with {codes}")
        if state == "failed" and "ended without a word" not in run.status["error"]:
            sys.exit(run.status["error"])
        if state != "not begun" and run.checkpoint_folders():
            run.checkpoint()  # verified
        what = f"rank {victim} {number.name}: {state}"
        seen[what] = seen.get(what, 0) + 1
    last = max((r["step"] for r in Run(folder).metrics()), default=0)
    config = CONFIG.replace(max_iters=last + 10)
    unkilled = folder.with_name(folder.name + "-unkilled")
    both = ((folder, config), (unkilled, config.replace(checkpoint_interval=0)))
    codes = [os.waitpid(pid, 0)[1] for args in both for pid in start(*args)]
    clock = ("seconds", "tokens_per_second", "utilisation")
    rows = [[{k: v for k, v in r.items() if k not in clock} for r in Run(f).metrics()] for f in (folder, unkilled)]
    weights = [[(Run(f).checkpoint(which) / "model.safetensors").read_bytes() for which in ("last", "best")] for f in (folder, unkilled)]
    print(json.dumps({"kills": seen, "codes": codes, "steps": config.max_iters, "rows equal": rows[0] == rows[1],
                      "weights equal": weights[0] == weights[1]}))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
