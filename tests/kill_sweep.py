"""Kill a sweep at the moments that are known to be delicate, then at random ones, then let it end: kill_sweep.py FOLDER KILLS SEED [WORKERS].

Each victim is a fork of this process, so that torch and optuna are imported once. Prints a JSON object of what was seen.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import optuna
import torch

from nanogpt_nb.config import NanoGPTConfig
from nanogpt_nb.runs import Run
from nanogpt_nb.space import Dim
from nanogpt_nb.study import Sweep, hushed
from nanogpt_nb.sweep import sweep

BASE = NanoGPTConfig.preset("tiny").replace(block_size=8, max_iters=24, eval_interval=4, eval_iters=2, sample_tokens=0)
SPACE = {"learning_rate": (1e-4, 1e-1), "n_embd": [8, 12], "num_heads": [2, 3]}  # 8 does not go into 3 heads
TRIALS = 8
TEXT = "\n".join(f"{i} times {i} is {i * i}, and {i} more is {i * i + i}." for i in range(600))
POINTS = {  # a victim dies right before or after its first call of the function
    "a trial is there, nothing drawn": (optuna.study.Study, "ask", "after"),
    "one of three settings drawn": (Dim, "suggest", "after"),
    "drawn, no run": (Sweep, "train_one", "before"),
    "the run has a name, no status": (Run, "lock", "before"),
    "a loss written, not reported": (optuna.trial.Trial, "report", "before"),
    "a loss reported": (optuna.trial.Trial, "report", "after"),
    "the run ended, nobody told": (Sweep, "train_one", "after"),
    "told": (optuna.study.Study, "tell", "after"),
}


def based(folder: Path) -> NanoGPTConfig:
    "The settings, with the text in this folder."
    return BASE.replace(data=(str(folder / "text.txt"),))


def work(folder: Path) -> None:
    "Begin the sweep, or go on with it."
    sweep(SPACE, based(folder.parent), trials=TRIALS, name=folder.name, runs_dir=folder.parent, quiet=True)


def die(owner: type, name: str, when: str) -> None:
    "From now on a call of the method ends this process as kill -9 does."
    was = getattr(owner, name)

    def deadly(*args, **kwargs):
        if when == "after":
            was(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, deadly)


def fork(folder: Path, *point) -> int:
    "The process id of a child that does `work`, up to `point`."
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    try:
        if point:
            die(*point)
        work(folder)
        os._exit(0)
    except BaseException as e:
        print(repr(e), file=sys.stderr, flush=True)
        os._exit(1)


def moment(found: Sweep) -> str:
    "In the middle of what a process was killed."
    if not found.about:
        return "before the sweep was made"
    with hushed():
        trials = Sweep(found.path).study.get_trials()
    open_ = [t for t in trials if t.state.name == "RUNNING"]
    if not open_:
        return "between two trials"
    run = found.run(open_[0].number)
    if not run.path.exists():
        return "before the run was made"
    return "between the run and the account" if run.state in ("finished", "stopped") else "while training"


def outcome(folder: Path) -> list:
    "What the sweep found, trial by trial."
    found = Sweep(folder.parent / f"{folder.name}.sweep")
    rows = sorted(found.rows(), key=lambda r: r["number"])
    return [[r["number"], r["settings"], r["state"], r["val_loss"], [e["step"] for e in found.run(r["number"]).estimates()]] for r in rows]


def main(folder: Path, kills: int, seed: int, workers: int = 1) -> None:
    torch.set_num_threads(1)
    folder.parent.mkdir(parents=True, exist_ok=True)
    (folder.parent / "text.txt").write_text(TEXT)
    with tempfile.TemporaryDirectory() as warm:  # what is imported late is imported here, once
        sweep({"n_layer": [1]}, based(folder.parent).replace(max_iters=2), method="grid", name="warm", runs_dir=warm, quiet=True)
    random.seed(seed)
    found, seen, ended = Sweep(folder.parent / f"{folder.name}.sweep"), {}, False
    points = {name: os.WTERMSIG(os.waitpid(fork(folder, *point), 0)[1]) for name, point in POINTS.items()}
    while sum(seen.values()) < kills and not ended:
        pids = [fork(folder) for _ in range(workers)]
        time.sleep(random.uniform(0.02, 0.5))  # the random moment
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
        if any(os.WIFEXITED(s) and os.WEXITSTATUS(s) for s in statuses):
            sys.exit("a sweep ended by itself, with an error")
        ended = any(map(os.WIFEXITED, statuses))
        where = moment(found)
        seen[where] = seen.get(where, 0) + 1
    codes = [os.waitpid(pid, 0)[1] for pid in [fork(folder) for _ in range(workers)]]
    unkilled = folder.with_name(folder.name + "-unkilled")
    if workers == 1:
        codes.append(os.waitpid(fork(unkilled), 0)[1])
    print(json.dumps({"points": points, "kills": seen, "codes": codes, "outcome": outcome(folder), "unkilled": outcome(unkilled) if workers == 1 else None}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
