"""Launch runs on a box while plugs are pulled at random moments: faults_journey.py ROUNDS SEED.

A round is `nanogpt launch --on gpu` of a run of seconds, a fault at a random moment of it, and the way back: by waiting, by
watching, by pulling. The connection is cut, between two bytes or at any moment; it is refused, or swallowed; sshd is
restarted; the client is killed or interrupted; the follower, the runner, the guard or the trainer is killed; the run folder
here cannot be written for a while. Afterwards there must be one job for the run or none, no process of it anywhere, and the
run here what it is there. Prints what is wrong as it is found, and at the end a JSON object of what was done and seen.
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
import time
from collections import Counter
from pathlib import Path

from box import Box, until

from nanogpt_nb.checkpoints import damage
from nanogpt_nb.guard import GOING
from nanogpt_nb.runs import Run

SMALL = ("config.json", "tokenizer.json", "metrics.jsonl", "log.txt", "samples.txt", "status.json", "launch.log")
ENDED = ("finished", "failed", "stopped", "killed", "lost")
WAIT = "import sys; from nanogpt_nb.launch import wait; print(wait(sys.argv[1], 200).state)"
PULL = "import sys; from nanogpt_nb.remote.pull import pull; print(pull(sys.argv[1], follow=True).state)"
KINDS = {"nothing": 2, "cut": 14, "cut at a byte": 22, "refused": 10, "swallowed": 3, "sshd restarted": 10, "client killed": 14, "client interrupted": 14,
         "follower killed": 8, "runner killed": 6, "guard killed": 4, "trainer killed": 6, "folder read-only": 6}  # fmt: skip
NANOGPT = [sys.executable, "-m", "nanogpt_nb.cli"]


def words_of(pid) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return []


def state_of(pid) -> str:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "X"


class Round:
    "A run on its way there and back, and what is wrong with it."

    def __init__(self, box: Box, project: Path, name: str, dice: random.Random, span: float, size: int):
        self.box, self.project, self.name, self.dice, self.span, self.size = (
            box,
            project,
            name,
            dice,
            span,
            size,
        )  # seconds of a round, bytes of a launch
        self.here, self.there = Run(project / "runs" / name), Run(box.home / "nanogpt" / project.name / "runs" / name)
        self.kind, self.way, self.step, self.wrong, self.client, self.out = "", "", "", [], None, project.parent / f"{name}.out"
        self.moment = 0.0

    def launch(self, *more: str) -> None:
        new = [] if "--resume" in more else ["--name", self.name, "--preset", "tiny", "--max-iters", str(self.dice.choice((40, 150, 400))), "--eval-interval", "20",
                                              "--eval-iters", "1", "--checkpoint-interval", "20", "--sample-tokens", "8", "--device", "cpu", "--data", str(self.project.parent / "poem.txt")]  # fmt: skip
        with open(self.out, "ab") as out:
            self.client = subprocess.Popen(
                [*NANOGPT, "launch", "--on", "gpu", *new, *more], cwd=self.project, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def said(self) -> str:
        return self.out.read_text(errors="replace")

    def jobs(self) -> list[Path]:
        found = []
        for p in (self.box.home / ".nanogpt_nb/jobs").glob("[!.]*/job.json"):
            with contextlib.suppress(ValueError):
                if json.loads(p.read_text())["name"] == self.name:
                    found.append(p.parent)
        return found

    def processes(self, what: str = "", there: bool = True) -> list[int]:
        "Those that are about this run: on the box, or here."
        far, ids = set(self.box.processes()), [p.name for p in self.jobs()]
        found = []
        for p in Path("/proc").glob("[0-9]*"):
            words = words_of(p.name)
            mine = any(str(r.path) in words for r in (self.here, self.there)) or any(i in words for i in ids)
            if mine and what in " ".join(words) and (int(p.name) in far) == there and state_of(p.name) not in "ZX":
                found.append(int(p.name))
        return found

    def kill(self, what: str, there: bool) -> bool:
        "Kill a process when there is one; whether there was."
        with contextlib.suppress(AssertionError):
            until(lambda: self.processes(what, there) or self.client.poll() not in (None, 0), what, 20)
        time.sleep(self.dice.uniform(0, 2))
        pids = self.processes(what, there)
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        return bool(pids)

    def fault(self, kind: str) -> None:
        box, dice = self.box, self.dice
        if box.wire.strike(kind, dice, refused=dice.choice((dice.uniform(0, 5), dice.uniform(0, 5), 75))):
            return
        if kind == "sshd restarted":
            box.stop(sessions=dice.random() < 0.7)
            time.sleep(dice.uniform(0, 3))
            box.start()
        elif kind.startswith("client"):
            self.client.send_signal(signal.SIGKILL if kind == "client killed" else signal.SIGINT)
        elif kind == "follower killed":
            self.kill("nanogpt_nb.remote.follower", there=False)
        elif kind == "runner killed":
            self.kill("runner.run", there=True)
        elif kind == "guard killed":
            self.kill("nanogpt_nb.guard", there=True)
        elif kind == "trainer killed":
            self.kill("nanogpt_nb.train", there=True)
        elif kind == "folder read-only":
            until(lambda: self.here.path.exists() or self.client.poll() is not None, "the run folder", 60)
            how = (["chattr", "-R", "+i"], ["chattr", "-R", "-i"]) if os.getuid() == 0 else (["chmod", "-R", "a-w"], ["chmod", "-R", "u+w"])
            subprocess.run([*how[0], str(self.here.path)], stderr=subprocess.DEVNULL)
            time.sleep(dice.uniform(0, 6))
            subprocess.run([*how[1], str(self.here.path)], stderr=subprocess.DEVNULL)

    def check(self, good, what: str) -> bool:
        if not good:
            self.wrong.append(what)
        return bool(good)

    def moment_comes(self, early: bool) -> None:
        "Wait for a random moment: of the launch, by what has gone over the wire, or of the whole."
        if not early:
            return time.sleep(self.dice.uniform(0, self.span))
        at = self.box.wire.bytes + self.dice.randrange(self.size)
        with contextlib.suppress(AssertionError):
            until(lambda: self.box.wire.bytes >= at or self.client.poll() is not None, "the byte", 30, every=0.001)
        time.sleep(self.dice.choice((0, self.dice.uniform(0, 0.2))))

    def go(self, kind: str) -> "Round":
        self.kind, began, self.bytes = kind, time.monotonic(), self.box.wire.bytes
        self.launch()
        if "killed" not in kind or kind == "client killed":
            self.moment_comes(early=self.dice.random() < (0.9 if kind.startswith("client") else 0.6))
        self.step, self.moment = (self.said().split("\n")[-2:] or [""])[0][:9].strip(), time.monotonic() - began
        self.before = (self.client.poll() is None, self.here.state if self.here.path.exists() else "none", len(self.jobs()))
        self.fault(kind)
        try:
            self.client.wait(240)
            self.bytes = self.box.wire.bytes - self.bytes
        except subprocess.TimeoutExpired:
            self.check(False, "the client does not end in 240 s")
            self.client.kill()
            self.client.wait()
        self.code = self.client.returncode
        self.check("Traceback" not in self.said() or self.code == -signal.SIGINT, "a traceback")  # Python's own, before we have begun
        here, jobs = (self.here.path / "config.json").exists(), self.jobs()
        self.check(len(jobs) < 2, f"{len(jobs)} jobs")
        self.check(here or not jobs, "a job, and no folder here")
        self.check(here or not self.here.path.exists(), "half a folder here")
        if self.code == 0:
            self.check(here and len(jobs) == 1, f"it was launched, with folder {here} and {len(jobs)} jobs")
        if here and not jobs:
            self.check(
                self.code < 0 or "watch" in self.said() or self.kind == "folder read-only",
                "it failed and left a folder here without a word about it",
            )
            self.nothing_there()
        elif jobs and here:
            self.check(
                self.code <= 0 or "goes on" in self.said() or "watch" in self.said() or self.kind == "client interrupted",
                f"it failed with {self.code}, has begun all the same, and does not say so",
            )
            self.come_home()
        elif not here:
            self.once_more()
        with contextlib.suppress(AssertionError):
            until(lambda: not self.processes() and not self.processes(there=False), "the end of all processes", 12)
        for there in (True, False):
            self.check(
                not (left := self.processes(there=there)),
                f"left {'there' if there else 'here'}: {[' '.join(words_of(p))[-150:] for p in left]}",
            )
        return self

    def call(self, *words: str, timeout: float = 240) -> subprocess.CompletedProcess:
        try:
            return subprocess.run(
                words,
                cwd=self.project,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as e:
            return subprocess.CompletedProcess(words, 999, (e.stdout or b"").decode(errors="replace"))

    def come_home(self) -> None:
        self.way = self.dice.choice(("wait", "wait", "watch", "pull", "pull --follow"))
        if self.way == "watch":
            told = self.call(*NANOGPT, "watch", self.name, timeout=60)
            if not self.check(
                told.returncode == 0 and self.here.remote.get("home"),
                f"watch: {told.returncode}, {told.stdout.strip()[-200:]!r}, home {self.here.remote.get('home')}",
            ):
                self.call(sys.executable, "-c", WAIT, self.name)
        elif self.way == "pull":
            end = time.monotonic() + 120
            while time.monotonic() < end:
                told = self.call(*NANOGPT, "pull", self.name)
                if self.here.remote.get("home") and self.here.state not in GOING:
                    break
                time.sleep(1)
            self.check(told.returncode == 0, f"pull: {told.returncode}, {told.stdout[-600:]}")
        else:
            told = self.call(sys.executable, "-c", WAIT if self.way == "wait" else PULL, self.name)
            self.check(told.returncode == 0, f"{self.way}: {told.returncode}, {told.stdout[-800:]}")
        state, job = self.here.state, json.loads((self.jobs()[0] / "status.json").read_text())
        self.check(
            state in ENDED and self.here.remote.get("home") is True,
            f"{state} at last, home {self.here.remote.get('home')}, error {self.here.remote.get('error')}",
        )
        usual = "killed" if "killed" in self.kind and not self.kind.startswith(("client", "follower")) else "finished"
        self.check(
            state == "finished" or usual == "killed" and state in ("killed", "failed"),
            f"the run is {state} (the job: {job.get('state')} {job.get('code')} {job.get('error')})",
        )
        self.state = state
        self.same()

    def same(self) -> None:
        "The run here is the run there."
        follow = self.here.path / "follow.log"
        self.check(
            not follow.exists() or "Traceback" not in (said := follow.read_text()),
            f"a traceback in follow.log: {said[-500:] if follow.exists() else ''}",
        )
        for name in SMALL:
            a, b = ((r.path / name).read_bytes() if (r.path / name).exists() else b"" for r in (self.here, self.there))
            self.check(a == b, f"{name} differs")
        keys = [(r["step"], "val_loss" in r) for r in self.here.metrics()]
        self.check(len(keys) == len(set(keys)), "a row came twice")
        for which in ("last", "best"):
            a, b = ((r.path / which / "checkpoint.json") for r in (self.here, self.there))
            self.check(a.exists() == b.exists() and (not a.exists() or a.read_bytes() == b.read_bytes()), f"{which} is another")
            self.check(not a.exists() or damage(self.here.path / which) is None, f"{which} is damaged")
        left = [
            str(p.relative_to(r.path))
            for r in (self.here, self.there)
            for g in (".pull", ".frozen/*", ".*.tmp", ".last.*", ".best.*", ".*.pull")
            for p in r.path.glob(g)
        ]
        self.check(not left, f"left over: {left}")

    def nothing_there(self) -> None:
        "There is a folder here, and no job: the state must not lie for ever, and there is a way on."
        self.way = "resume"
        remote = self.here.path / "remote.json"
        if remote.exists():
            was = json.loads(remote.read_text())
            remote.write_text(json.dumps(was | dict(seen=time.time() - 1000)))
            self.check(self.here.state not in GOING, f"{self.here.state} for ever")
        else:
            self.check(self.here.state not in GOING, f"{self.here.state}, with nobody there")
        self.out.write_text(self.said() + "=== resume\n")
        self.launch("--resume", self.name)
        code = self.client.wait(240)
        if self.check(code == 0, f"it cannot be resumed: {self.said().partition('=== resume')[2][-500:]}"):
            self.come_home()
            self.way = "resume, " + self.way

    def once_more(self) -> None:
        "Nothing is here: the same name can be taken again."
        self.way = "again"
        self.out.write_text(self.said() + "=== again\n")
        self.launch()
        code = self.client.wait(240)
        if self.check(code == 0, f"it cannot be launched again: {self.said().partition('=== again')[2][-500:]}"):
            self.come_home()
            self.way = "again, " + self.way


def main(rounds: int, seed: int) -> None:
    dice, done, ways, steps, states, bad, began = random.Random(seed), Counter(), Counter(), Counter(), Counter(), [], time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="faults_journey"))
    project = folder / "poems"
    project.mkdir()
    (project / "pyproject.toml").write_text("[project]\nname = 'poems'\n")
    (folder / "poem.txt").write_text("Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n" * 300)
    with Box(folder) as box:
        (box.ssh / "nanogpt_nb.conf").write_text(f"Host gpu\n  #nanogpt: python={sys.executable}\n")
        os.environ |= dict(HOME=str(box.laptop), OMP_NUM_THREADS="1", WANDB_MODE="disabled", NANOGPT_NB_CACHE=str(folder / "cache"))
        for name in ("SSH_AUTH_SOCK", "WANDB_API_KEY", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
            os.environ.pop(name, None)
        span, size = 12.0, 1
        try:
            for i in range(rounds):
                kind = dice.choices(list(KINDS), list(KINDS.values()))[0]
                if i < 2:
                    kind = "nothing"
                if i % 15 == 14:  # a project that has never been there
                    shutil.rmtree(box.home / "nanogpt", ignore_errors=True)
                    shutil.rmtree(box.home / ".nanogpt_nb", ignore_errors=True)
                at = time.monotonic()
                (project / "notes.txt").write_text(f"{i}" if dice.random() < 0.5 else "the same")
                one = Round(box, project, f"r{seed}-{i}", dice, span, size)
                try:
                    one.go(kind)
                except Exception as e:
                    one.wrong.append(f"{type(e).__name__}: {e}")
                    box.wire.refuse = box.wire.black = False
                if i == 0:
                    span = time.monotonic() - at
                if kind == "nothing":
                    size = one.bytes
                done[kind] += 1
                ways[one.way] += 1
                steps[one.step or "at first"] += 1
                states[getattr(one, "state", "none")] += 1
                line = f"{i} {kind} at {one.moment:.1f} s (client going, state, jobs: {one.before}; after {one.step or 'nothing'!r}), client {getattr(one, 'code', None)}, {one.way}, {time.monotonic() - at:.0f} s"
                print(("WRONG " if one.wrong else "ok    ") + line, *(f"\n      - {w}" for w in one.wrong), flush=True)
                if one.wrong:
                    bad.append(dict(round=i, kind=kind, wrong=one.wrong))
                    print("      | " + one.said().strip()[-700:].replace("\n", "\n      | "), flush=True)
                else:
                    shutil.rmtree(one.here.path, ignore_errors=True)
        except KeyboardInterrupt:
            print("interrupted")
        left = [str(p.relative_to(folder)) for g in ("poems/runs/.new-*", "box-gpu/home/.nanogpt_nb/jobs/.new-*", "box-gpu/home/.nanogpt_nb/there-*.*", "box-gpu/home/nanogpt/*/.*", "laptop/.*") for p in folder.glob(g)]  # fmt: skip
        print(
            json.dumps(
                dict(
                    rounds=sum(done.values()),
                    seed=seed,
                    seconds=round(time.monotonic() - began),
                    faults=done,
                    ways=ways,
                    after=steps,
                    states=states,
                    wrong=len(bad),
                    left=left,
                )
            )
        )
    if bad:
        print(f"what is left of them is in {folder}")
    else:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
