"""Kill one run again and again at random moments, and look at its folder each time: kill_many.py FOLDER KILLS SEED.

Each victim is a fork of this process, so that torch is imported once. Prints a JSON object of what was seen.
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

from nanogpt_nb.config import NanoGPTConfig
from nanogpt_nb.runs import Run
from nanogpt_nb.train import train

CONFIG = NanoGPTConfig.preset("tiny").replace(
    dropout=0.1, optimizer="muon", eval_interval=7, eval_iters=1, checkpoint_interval=1, sample_tokens=4, max_iters=1_000_000
)


def work(folder: Path, config: NanoGPTConfig) -> None:
    "Begin the run, or go on with it."
    if (folder / "config.json").exists():
        train(config, resume=folder, quiet=True)
    else:
        train(config, name=folder.name, runs_dir=folder.parent, quiet=True)


def fork(*args) -> int:
    "The process id of a child that does `work`."
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    try:
        work(*args)
        os._exit(0)
    except BaseException as e:
        print(repr(e), file=sys.stderr, flush=True)
        os._exit(1)


def look(run: Run) -> str:
    "Check that all that the folder holds is whole; say in the middle of what the run was killed."
    assert run.state == "killed", run.state
    run.about, run.metrics()
    if not run.checkpoint_folders():
        return "before the first checkpoint"
    from nanogpt_nb.sample import load_model

    load_model(run, "last")
    torch.load(run.checkpoint() / "trainer.pt", weights_only=True)
    hidden = {p.name for p in run.path.iterdir() if p.name.startswith(".") and p.is_dir()}
    if not (run.path / "last").exists():
        return "between the two renames"
    return "while writing a checkpoint" if ".last.new" in hidden else "while clearing up" if hidden else "between checkpoints"


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as warm:  # what is imported late is imported here, once
        work(Path(warm) / "warm", CONFIG.replace(max_iters=2))
    random.seed(seed)
    seen: dict[str, int] = {}
    while sum(seen.values()) < kills:
        pid = fork(folder, CONFIG)
        time.sleep(random.uniform(0.02, 0.3))  # the random moment
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            sys.exit("a run ended by itself, with an error")
        where = look(Run(folder)) if (folder / "config.json").exists() else "before the run had a name"
        seen[where] = seen.get(where, 0) + 1
    last = max((r["step"] for r in Run(folder).metrics()), default=0)
    config = CONFIG.replace(max_iters=last + 10)  # the schedule is constant: the length changes no step
    unkilled = folder.with_name(folder.name + "-unkilled")
    codes = [os.waitpid(fork(*args), 0)[1] for args in ((folder, config), (unkilled, config.replace(checkpoint_interval=0)))]
    rows = [[{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second", "utilisation")} for r in Run(f).metrics()] for f in (folder, unkilled)]
    weights = [[(Run(f).checkpoint(which) / "model.safetensors").read_bytes() for which in ("last", "best")] for f in (folder, unkilled)]
    print(json.dumps({"kills": seen, "codes": codes, "steps": config.max_iters, "rows equal": rows[0] == rows[1],
                      "weights equal": weights[0] == weights[1]}))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
