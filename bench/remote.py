"""How long do a push and a start on another machine take, beside `rsync -r project host:` and `ssh host command`?

    python bench/remote.py                  # at 0, 20 and 100 ms of delay each way, 5 times
    python bench/remote.py --times 3 --delays 20 --mb 20

A project of 40 files with a data folder that git ignores (--mb megabytes of noise) goes to an sshd of our own on loopback,
through a proxy that delays every byte. Each figure is a median of seconds; the two sides take turns. Both make a new
connection each time, but for the one scenario that says otherwise. Ours is called from Python, as in a notebook, but for
`command`; theirs are processes.

    first       nothing is there yet
    unchanged   nothing has changed
    notebook    one notebook has changed
    standing    one notebook has changed, and ours has a connection from before, as it has in a notebook
    command     unchanged, by `nanogpt push` as a process
    start       unchanged, and then a command is started: until the first line of its output is here
    launch      unchanged, and then training is started: until the prompt is back; theirs is rsync and a command that ends at once
    train       unchanged, and then training is started: until the first losses are here
"""
import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/"tests"))
import pytest
from box import Box, why_no_box

from nanogpt_nb.corpus import cache_dir

ROOT = Path(__file__).resolve().parent.parent
NANOGPT = Path(sys.executable).parent/"nanogpt"
SCENARIOS = dict(first=False, unchanged=False, notebook=True, standing=True, command=False, start=False, launch=False, train=False) # True: a notebook changes before
LINE = [sys.executable, "-u", "-c", "print('step 0')"]


def make_project(folder, mb):
    "A project in git: sources, notebooks, and data that git ignores."
    folder.mkdir(parents=True)
    for i in range(36): (folder/f"module_{i:02}.py").write_text(f"x = {i}\n" * 200)
    for i in range(4): (folder/f"chapter_{i}.ipynb").write_text('{"cells": []}' + " " * 50_000)
    (folder/".gitignore").write_text("data/\n")
    (folder/"data").mkdir()
    for i in range(10):
        with open(folder/"data"/f"part_{i}.bin", "wb") as f:
            for _ in range(max(1, mb // 10)): f.write(os.urandom(1 << 20))
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]): subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def edit(project, i):
    "Change a notebook."
    (project/"chapter_0.ipynb").write_text('{"cells": []}' + f"{i:>50000}")


class Theirs:
    "rsync -r and ssh, as processes."
    def __init__(self, box, project): self.box, self.project, self.ssh = box, project, ["ssh", "-F", str(box.ssh/"config")]

    def push(self, to): subprocess.run(["rsync", "-r", "-e", " ".join(self.ssh), str(self.project), f"{self.box.name}:{self.box.home/to}"], check=True)

    again = push

    def start(self, to):
        self.push(to)
        with subprocess.Popen([*self.ssh, self.box.name, " ".join([LINE[0], "-u", "-c", '"print(\'step 0\')"'])], stdout=subprocess.PIPE) as p: assert p.stdout.readline() == b"step 0\n"


    def launch(self, to):
        self.push(to)
        subprocess.run([*self.ssh, self.box.name, "true"], check=True)

    def train(self, to):
        self.push(to)
        words = f"cd {self.box.home/to/self.project.name} && PYTHONPATH={ROOT} {sys.executable} -u -m nanogpt_nb.train --preset tiny --device cpu"
        with subprocess.Popen([*self.ssh, "-tt", self.box.name, words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as p:
            while not re.match(rb"\s+0\s+\d", p.stdout.readline()): pass
            p.terminate()

    command = push


class Ours:
    "push and start, over a new connection."
    def __init__(self, box, project): self.box, self.project, self.going = box, project, []

    def push(self, to):
        from nanogpt_nb.remote.push import push
        from nanogpt_nb.remote.ssh import Host
        with Host(self.box.name) as host: push(self.project, host, path=f"~/{to}", quiet=True)

    def again(self, to):
        from nanogpt_nb.remote.push import push
        from nanogpt_nb.remote.ssh import Host
        push(self.project, Host.of(self.box.name), path=f"~/{to}", quiet=True)

    def start(self, to):
        from nanogpt_nb.remote.jobs import start
        from nanogpt_nb.remote.push import push
        from nanogpt_nb.remote.ssh import Host
        with Host(self.box.name) as host:
            push(self.project, host, path=f"~/{to}", quiet=True)
            assert next(iter(start(host, LINE, cwd=to).logs(follow=True))) == "step 0"

    def command(self, to): subprocess.run([NANOGPT, "push", self.box.name, "--path", f"~/{to}"], cwd=self.project, check=True, stdout=subprocess.DEVNULL)

    def launch(self, to, wait=False):
        from nanogpt_nb.config import NanoGPTConfig
        from nanogpt_nb.launch import launch
        from nanogpt_nb.remote.ssh import Host
        with Host(self.box.name) as host:
            run = launch(NanoGPTConfig.preset("tiny").replace(device="cpu"), on=host, project=self.project, runs_dir=self.box.folder/"runs", quiet=True)
            while wait and not run.metrics(): time.sleep(0.005)
        self.going.append(run)

    def train(self, to): self.launch(to, wait=True)


def seconds(do, *args):
    began = time.perf_counter()
    do(*args)
    return time.perf_counter() - began


def quiet(box, ours):
    "Let what was launched come to its end, so that it does not run beside the next."
    from nanogpt_nb.launch import wait
    while ours.going: wait(ours.going.pop())


def measure(box, project, times, only):
    "What was measured: scenario to (ours, theirs), each a list of seconds."
    sides, found = (Ours(box, project), Theirs(box, project)), {s: ([], []) for s in SCENARIOS if s == "first" or s in only}
    for i in range(times):
        for scenario, change in ((s, SCENARIOS[s]) for s in found):
            if change: edit(project, f"{scenario} {i}")
            for k in (0, 1) if i % 2 else (1, 0):
                to = f"{'theirs' if k else 'ours'}-{i}"
                if scenario == "first": (box.home/to).mkdir(parents=True) if k else None
                do = getattr(sides[k], dict(first="push", unchanged="push", notebook="push", standing="again").get(scenario, scenario))
                found[scenario][k].append(seconds(do, to))
                quiet(box, sides[0])
        for side in ("ours", "theirs"): shutil.rmtree(box.home/f"{side}-{i}", ignore_errors=True)
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--times", type=int, default=5)
    p.add_argument("--delays", type=float, nargs="+", default=[0, 20, 100], help="milliseconds each way")
    p.add_argument("--mb", type=int, default=200, help="megabytes of data that git ignores")
    p.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="WHAT", help="of these; first always is")
    p.add_argument("--tmp", default=None)
    args = p.parse_args()
    if why := why_no_box(): sys.exit(why)
    print("| delay each way | what | ours, s | theirs, s | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.tmp) as tmp, pytest.MonkeyPatch.context() as patch, Box(Path(tmp)) as box:
        box.use(patch)
        (box.ssh/"nanogpt_nb.conf").write_text(f"Host {box.name}\n  #nanogpt: python={sys.executable}\n")
        for name, value in dict(WANDB_MODE="disabled", NANOGPT_NB_CACHE=str(cache_dir()), OMP_NUM_THREADS="1").items(): patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(Path(tmp)/"cache"))
        project = make_project(Path(tmp)/"project", args.mb)
        warm = Ours(box, project)
        warm.again("warm"); warm.launch("warm"); quiet(box, warm)                  # what goes there once: the small program, the package, the text
        for delay in args.delays:
            box.wire.delay = delay / 1000
            for scenario, lists in measure(box, project, args.times, args.only).items():
                ours, theirs = map(statistics.median, lists)
                print(f"| {delay:g} ms | {scenario} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f} |", flush=True)


if __name__ == "__main__": main()
