"""What telling W&B costs training: steps a second with the follower at work, and with it held still.

One process trains. Its follower is stopped and let go on by turns (SIGSTOP, SIGCONT), so that each stretch of training
is compared with its neighbours in the same process, and other work on the machine falls on both alike. The start is
measured apart: how long the trainer itself is held up, and how many steps are lost until the follower is ready."""

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import psutil
from rich.console import Console
from rich.table import Table
from wandb_server import WandbServer

from nanogpt_nb import track
from nanogpt_nb.config import NanoGPTConfig
from nanogpt_nb.data import load_dataset
from nanogpt_nb.runs import Run
from nanogpt_nb.track import start_tracking
from nanogpt_nb.trainer import Trainer

CASES = ("disabled", "offline", "online", "no answer")


class Training:
    "Steps of a trainer that writes its rows as training does."

    def __init__(self, run: Run, trainer: Trainer, every: int):
        self.run, self.trainer, self.every, self.tracker, self.heard, self.waiting = run, trainer, every, None, time.perf_counter(), 0.0

    def step(self):
        t = self.trainer
        loss = t.train_step().item()
        if t.step % self.every == 0:
            self.run.append(dict(step=t.step, loss=loss, tokens=t.tokens, seconds=t.seconds), durable=False)
        now = time.perf_counter()
        if self.tracker and now - self.heard > 1:
            self.heard = now
            self.tracker.news()
            self.waiting = max(self.waiting, time.perf_counter() - now)

    def speed(self, seconds: float) -> float:
        "Steps a second over some seconds."
        start, steps = time.perf_counter(), 0
        while (now := time.perf_counter()) - start < seconds:
            self.step()
            steps += 1
        return steps / (now - start)


def family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return []


def signal_all(processes, number):
    for p in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            p.send_signal(number)


def measure(case: str, args, folder: Path, trainer: Trainer) -> dict:
    with WandbServer() as server:
        server.fault = (lambda *_: "hang") if case == "no answer" else None
        os.environ.update(server.env())
        run = Run.create(trainer.config, case.replace(" ", "-"), folder)
        training = Training(run, trainer, args.every)
        with run.lock():
            run.set_status("running", step=0)
            usual = training.speed(args.seconds * 3)
            start = time.perf_counter()
            training.tracker = tracker = start_tracking(run, "online" if case == "no answer" else case)
            held = time.perf_counter() - start
            beginning = training.speed(args.start)
            pairs, processor = [], []
            for _ in range(args.pairs):
                follower = family(tracker.process.pid) if tracker.process else []
                signal_all(follower, signal.SIGSTOP)
                still = training.speed(args.seconds)
                signal_all(follower, signal.SIGCONT)
                before = used(follower)
                pairs.append((still, training.speed(args.seconds)))
                processor.append((used(follower) - before) / args.seconds)
            end(tracker, run)
    ratios = [at_work / (0.5 * (still + after)) for (still, at_work), (after, _) in zip(pairs, pairs[1:])]
    lost = (1 - beginning / usual) * args.start * usual if tracker.process else 0.0
    return dict(case=case, held=held, lost=lost, news=training.waiting, ratio=statistics.median(ratios), quarter=quartiles(ratios), processor=statistics.mean(processor))


def used(processes) -> float:
    "Seconds of processor time."
    total = 0.0
    for p in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(p.cpu_times()[:2])
    return total


def quartiles(values) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def end(tracker, run):
    run.set_status("finished")
    if tracker.process:
        followers = family(tracker.process.pid)
        threading.Timer(10, lambda: signal_all(followers, signal.SIGKILL)).start()
        tracker.process.wait()


def main():
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--preset", default="cpu")
    p.add_argument("--pairs", type=int, default=30, help="stretches with the follower at work, each between two without")
    p.add_argument("--seconds", type=float, default=1.0, help="of a stretch")
    p.add_argument("--start", type=float, default=8.0, help="seconds that count as the start")
    p.add_argument("--every", type=int, default=5, help="steps between two rows")
    p.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    args = p.parse_args()
    track.PATIENCE = 5
    config = NanoGPTConfig.preset(args.preset).replace(device="cpu")
    trainer = Trainer(config, load_dataset(config), "cpu")
    table = Table("W&B", "speed, at work / still", "middle half", "its share of a core", "start holds trainer", "steps lost at start", "slowest news()")
    with tempfile.TemporaryDirectory() as folder:
        for case in args.cases:
            m = measure(case, args, Path(folder), trainer)
            table.add_row(case, f"{m['ratio']:.4f}", "{:.3f} to {:.3f}".format(*m["quarter"]), f"{m['processor']:.2%}", f"{m['held'] * 1e3:.0f} ms", f"{m['lost']:.0f}", f"{m['news'] * 1e3:.2f} ms")
    Console().print(table)


if __name__ == "__main__":
    main()
