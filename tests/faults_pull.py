"""Bring a run home while it trains on a box whose connection breaks at random moments: faults_pull.py FOLDER FAULTS SEED.

The run is a real one, on a real sshd. The connection is cut, between two bytes or at any moment; it is refused, or
swallowed; sshd is restarted; the follower is killed and started again; a pull comes between. At each fault the folder here
is looked at, and at the end it must equal the one there. Prints a JSON object of what was done and seen.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from box import Box, until

from nanogpt_nb.checkpoints import damage
from nanogpt_nb.config import NanoGPTConfig
from nanogpt_nb.remote.follower import is_followed, start_following
from nanogpt_nb.remote.landing import checkpoint_id
from nanogpt_nb.remote.pull import pull
from nanogpt_nb.runs import Run

NAMES = ("config.json", "tokenizer.json", "metrics.jsonl", "log.txt", "samples.txt", "status.json")
CONFIG = NanoGPTConfig.preset("tiny").replace(eval_interval=40, eval_iters=1, checkpoint_interval=10, sample_tokens=20, max_iters=1_000_000)


def train(box: Box, far: Run) -> subprocess.Popen:
    "Train in a process of its own, as a machine of that name would."
    env = os.environ | dict(HOME=str(box.home), OMP_NUM_THREADS="1", WANDB_MODE="disabled")
    code = "import socket, sys; socket.gethostname = lambda: 'gpu'; from nanogpt_nb.train import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, "--resume", str(far.path)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def look(near: Run, far: Run) -> int:
    "Check what is here at this moment; how many rows are lacking."
    rows = near.metrics()
    assert all(set(r) >= {"step", "tokens"} for r in rows), "a row is torn"
    keys = [(r["step"], "val_loss" in r) for r in rows]
    assert len(keys) == len(set(keys)), "a row came twice"
    there = far.metrics()
    assert rows == there[: len(rows)], "a row is lost"
    if near.checkpoint_folders("last"):
        near.checkpoint("last")  # verifies its bytes
    return len(there) - len(rows)


def fault(kind: str, box: Box, dice: random.Random, near: Run, followers: list) -> None:
    if box.wire.strike(kind, dice, refused=dice.uniform(0, 2)):
        return
    if kind == "sshd restarted":
        box.stop()
        time.sleep(dice.uniform(0, 1))
        box.start()
    elif kind == "follower killed":
        followers[-1].kill()
        followers[-1].wait()
        followers.append(start_following(near))
    elif kind == "pull meanwhile":
        pull(near, quiet=True)


KINDS = {"cut at a byte": 50, "cut": 20, "refused": 8, "swallowed": 1, "sshd restarted": 6, "follower killed": 10, "pull meanwhile": 5}


def main(folder: Path, faults: int, seed: int) -> None:
    dice, done, lacking = random.Random(seed), dict.fromkeys(KINDS, 0), []
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text("".join(dice.choice("abcdef \n") for _ in range(20_000)))
    with Box(folder) as box:
        os.environ["HOME"] = str(box.laptop)
        os.environ.pop("SSH_AUTH_SOCK", None)
        far = Run.create(CONFIG.replace(data=(str(text),)), "far", box.home / "nanogpt/demo/runs", state="starting")
        trainer = train(box, far)
        until(lambda: far.checkpoint_folders(), "a checkpoint", 120)
        near = pull("far", "gpu", runs_dir=folder / "runs", quiet=True)
        followers = [start_following(near)]
        until(lambda: is_followed(near), "the follower")
        began = time.monotonic()
        while sum(done.values()) < faults:
            assert trainer.poll() is None, "the trainer ended"
            assert followers[-1].poll() is None, (near.path / "follow.log").read_text()[-2000:]
            time.sleep(dice.choice((0, dice.uniform(0, 2))))  # the random moment
            kind = dice.choices(list(KINDS), list(KINDS.values()))[0]
            fault(kind, box, dice, near, followers)
            done[kind] += 1
            lacking.append(look(near, far))
        faults_took = time.monotonic() - began
        trainer.terminate()
        trainer.wait()
        try:
            code = followers[-1].wait(120)
        except subprocess.TimeoutExpired:
            code = None
        look(near, far)
        same = {name: (near.path / name).read_bytes() == (far.path / name).read_bytes() for name in NAMES}
        whole = {w: checkpoint_id(near, w) == checkpoint_id(far, w) is not None and damage(near.path / w) is None for w in ("last", "best")}
        left = [
            str(p.relative_to(folder))
            for run in (near, far)
            for pattern in (".pull", ".frozen/*", ".*.tmp", ".last.*", ".best.*")
            for p in run.path.glob(pattern)
        ]
        print(json.dumps({"faults": done, "seconds": round(faults_took), "rows": len(far.metrics()), "most rows lacking at a look": max(lacking), "steps": far.status.get("step"),
                          "follower": code, "equal": all(same.values()), "checkpoints equal": all(whole.values()), "left over": left, "home": near.remote.get("home")}))  # fmt: skip
        if code is None:
            followers[-1].kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
