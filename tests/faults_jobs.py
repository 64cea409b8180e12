"""Break connections, clients, runners and sshd at random moments, and look at the jobs each time: faults_jobs.py TIMES SEED [FAULT …].

A real sshd on loopback behind a proxy. Prints a JSON object of what was seen; every fault checks that no job was lost, orphaned or
doubled, and that no line of a log was lost or told twice.
"""

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from box import Box, until

from nanogpt_nb.remote.agent import HostError
from nanogpt_nb.remote.jobs import Job, jobs, new_id, start
from nanogpt_nb.remote.ssh import Host


class Bench:
    "A box, a host object for it, and a file there in which every command that runs leaves a word."

    def __init__(self, box: Box):
        self.box, self.host, self.ran = box, Host(box.name), box.home / "ran"
        self.ran.touch()

    def words(self) -> Counter:
        return Counter(self.ran.read_text().split())

    def folder(self, id: str) -> Path:
        return self.box.home / ".nanogpt_nb" / "jobs" / id

    def saying(self, lines: int, pause: float = 0.0) -> list[str]:
        "A command that leaves its word and says numbered lines, some of them long, with letters of several bytes."
        script = (
            "import os, sys, time\n"
            "os.write(os.open(os.path.expanduser('~/ran'), os.O_WRONLY | os.O_APPEND), (os.environ['NANOGPT_NB_JOB'] + '\\n').encode())\n"
            f"for i in range({lines}): print(i, 'ü' * (i * 37 % 400), flush=True); time.sleep({pause})\n"
        )
        return [sys.executable, "-S", "-c", script]

    def lines(self, n: int) -> list[str]:
        return [f"{i} {'ü' * (i * 37 % 400)}" for i in range(n)]

    def check_once(self, job: Job):
        "The command of a job ran exactly once, and nothing of it is left."
        assert self.words()[job.id] == 1, (job.id, self.words()[job.id])
        assert [j.id for j in jobs(self.host)].count(job.id) == 1
        until(lambda: not marked(job.id), f"the end of all processes of {job.id}")
        assert [p.name for p in self.folder(job.id).parent.glob(".new-*")] == []


def marked(id: str, what: str = "NANOGPT_NB_JOB") -> list[int]:
    "The processes that belong to a job."
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{what}={id}".encode() in (p / "environ").read_bytes().split(b"\0"):
                found.append(int(p.name))
    return found


def fork(work) -> int:
    "The process id of a child that does `work`, and knows nothing of our connections."
    if pid := os.fork():
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as e:
        os.write(2, f"{e!r}\n".encode())
        os._exit(1)


def cut_in_start(bench: Bench, times: int) -> dict:
    "The connection is cut, once or twice, while a job is started."
    before, cuts = bench.box.wire.connections, 0
    for _ in range(times):
        for moment in random.choices((None, 0.02, 0.1), k=random.choice((1, 1, 2))):
            if moment is None:
                bench.box.wire.cut_after = bench.box.wire.bytes + random.randrange(1, 6000)
            else:
                threading.Timer(random.uniform(0, moment), bench.box.wire.cut).start()
            cuts += 1
        job = start(bench.host, bench.saying(3))
        bench.box.wire.cut_after = None
        assert job.wait()["state"] == "finished"
        assert list(job.logs()) == bench.lines(3)
        bench.check_once(job)
    return dict(jobs=times, cuts=cuts, connections=bench.box.wire.connections - before)


def cut_in_logs(bench: Bench, times: int) -> dict:
    "The connection is cut again and again while a log is followed."
    before, n = bench.box.wire.connections, 20 * times
    job = start(bench.host, bench.saying(n, 0.01))
    told = []
    for line in job.logs(follow=True):
        told.append(line)
        if random.random() < 0.05:  # the random moment: at once, or in the middle of what comes next
            now, wire = random.random() < 0.5, bench.box.wire
            if now:
                wire.cut()
            else:
                wire.cut_after = wire.bytes + random.randrange(1, 20_000)
    bench.box.wire.cut_after = None
    assert told == bench.lines(n), (len(told), n)
    assert list(job.logs()) == told
    bench.check_once(job)
    return dict(lines=n, connections=bench.box.wire.connections - before)


def client_killed(bench: Bench, times: int) -> dict:
    "The laptop's process is killed while it starts a job; the next one asks for the same job."
    seen = Counter()
    for _ in range(times):
        id = new_id()
        pid = fork(lambda id=id: start(Host(bench.box.name), bench.saying(3), id=id))
        time.sleep(random.uniform(0, 0.5))  # the random moment
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        seen["started already" if (bench.folder(id) / "job.json").exists() else "not there yet"] += 1
        job = start(bench.host, bench.saying(3), id=id)
        assert job.wait()["state"] == "finished"
        bench.check_once(job)
    return dict(seen)


def reader_killed(bench: Bench, times: int) -> dict:
    "The laptop's process is killed while it follows a log; what it had there ends too."
    job = start(bench.host, "exec sleep 600")
    idle = lambda: sum(1 for pid in bench.box.processes() if is_helper(pid))
    until(lambda: idle() <= 1, "quiet")
    for _ in range(times):
        pid = fork(lambda: list(Job(Host(bench.box.name), job.id).logs(follow=True)))
        time.sleep(random.uniform(0, 0.6))  # the random moment
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    left = until(lambda: (n := idle()) <= 1 and n, "the end of the helper programs")
    assert job.state == "running"
    job.stop(grace=0)
    return dict(readers=times, helpers_left=left)


def is_helper(pid: int) -> bool:
    "Whether a process is the helper program at the end of a connection, not a runner."
    return b"-I" in words(pid) and not any(w.startswith(b"runner.") for w in words(pid))


def runner_killed(bench: Bench, times: int) -> dict:
    "The runner is killed at a random moment of its first ones; no second command is started, and what was started can be stopped."
    seen = Counter()
    for _ in range(times):
        id, old = new_id(), set(os.listdir("/proc"))
        thread = threading.Thread(target=try_start, args=(bench, id), daemon=True)
        thread.start()
        until(lambda id=id, old=old: any(is_runner(p, id) for p in new_ones(old)), "a runner", every=0)
        time.sleep(random.uniform(0, 0.25))  # the random moment: it begins, forks, takes the lock, starts the command
        for pid in new_ones(old):
            with contextlib.suppress(ProcessLookupError):
                if is_runner(pid, id):
                    os.kill(pid, signal.SIGKILL)
        thread.join()
        job = try_start(bench, id)
        state = until(
            lambda job=job, id=id: (s := job.state) and (len(commands(id)) == (s == "running")) and s,
            "a command if it runs, and none if it does not",
        )
        runner = next((p for p in bench.box.processes() if is_runner(p, id)), None)
        seen[f"{state}, {'another runner' if runner else 'no runner'}"] += 1
        assert Job(bench.host, id).stop(grace=5)["state"] == ("stopped" if state == "running" else "lost")
        until(lambda id=id: not marked(id), "the end of the command")
    return dict(seen)


def commands(id: str) -> list[int]:
    "What runs of the job that `try_start` asks for."
    return [pid for pid in marked(id) if words(pid)[:1] == [b"sleep"]]


def words(pid: int) -> list[bytes]:
    "The command line of a process."
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return []


def new_ones(old: set[str]) -> list[int]:
    "The processes that were not there before; the youngest first."
    return sorted((int(name) for name in os.listdir("/proc") if name.isdigit() and name not in old), reverse=True)


def try_start(bench: Bench, id: str) -> Job:
    with contextlib.suppress(HostError):
        return start(bench.host, ["sleep", "600"], id=id)
    return Job(bench.host, id)


def is_runner(pid: int, id: str) -> bool:
    return {id.encode(), b"runner.run"} <= set(words(pid))


def sshd_restarted(bench: Bench, times: int) -> dict:
    "sshd and all its connections are ended and come back while a log is followed and jobs are started."
    job, n = start(bench.host, bench.saying(60 * times, 0.01)), 60 * times
    told, others = [], []
    reader = threading.Thread(target=lambda: told.extend(job.logs(follow=True)), daemon=True)
    reader.start()
    for _ in range(times):
        time.sleep(random.uniform(0, 0.3))  # the random moment
        bench.box.stop()
        bench.box.start()
        others.append(start(bench.host, bench.saying(1)))
    reader.join()
    assert told == bench.lines(n), (len(told), n)
    for one in (job, *others):
        assert one.wait()["state"] == "finished"
        bench.check_once(one)
    return dict(restarts=times, lines=n, jobs=1 + len(others))


def stop_while_queued(bench: Bench, times: int) -> dict:
    "Jobs of one queue are stopped around the moment at which their turn comes."
    seen = Counter()
    for _ in range(times):
        first, second = (start(bench.host, f"echo $NANOGPT_NB_JOB >> ~/ran; exec sleep {s}", queue="gpu") for s in (0.3, 600))
        time.sleep(random.uniform(0, 1.2))  # the random moment
        s = second.stop(grace=2)
        ran = bench.words()[second.id]
        assert s["state"] == "stopped" and ran <= ("started" in s), (s, ran)  # SIGTERM may come before its first word
        assert first.wait()["state"] == "finished"
        until(lambda second=second: not marked(second.id), "the end of the command")
        seen["running" if "started" in s else "queued"] += 1
    return dict(seen)


def pid_reused(bench: Bench, times: int) -> dict:
    "The command's number belongs to another process by the time that the job is looked at and stopped."
    seen = Counter()
    for _ in range(times):
        job = start(bench.host, ["sleep", "600"])
        s = until(lambda job=job: (s := job.status()).get("pid") and s, "a pid")
        os.kill(s["runner"], signal.SIGKILL)
        os.kill(s["pid"], signal.SIGKILL)
        until(lambda s=s: not Path(f"/proc/{s['pid']}").exists(), "the number to be free")
        stranger = take_number(s["pid"], bench)
        seen["really reused" if stranger == s["pid"] else "written into the status"] += 1
        assert job.state == "lost"
        job.stop(grace=0)
        assert Path(f"/proc/{stranger}").exists() and os.waitpid(stranger, os.WNOHANG) == (0, 0)
        os.kill(stranger, signal.SIGKILL)
        os.waitpid(stranger, 0)
    return dict(seen)


def take_number(pid: int, bench: Bench) -> int:
    "A process of ours under a number that was another's; where the system gives none, one whose number stands in the status instead."
    for _ in range(50):
        try:
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        except OSError:
            break
        stranger = fork(lambda: time.sleep(600))
        if stranger == pid:
            return pid
        os.kill(stranger, signal.SIGKILL)
        os.waitpid(stranger, 0)
    stranger = fork(lambda: time.sleep(600))
    for path in bench.folder("x").parent.glob("*/status.json"):
        if (s := json.loads(path.read_text())).get("pid") == pid:
            path.write_text(json.dumps(s | dict(pid=stranger)))
    return stranger


FAULTS = [cut_in_start, cut_in_logs, client_killed, reader_killed, runner_killed, sshd_restarted, stop_while_queued, pid_reused]


def main(times: int, seed: int, *names: str) -> None:
    random.seed(seed)
    with tempfile.TemporaryDirectory() as folder, Box(Path(folder)) as box:
        os.environ["HOME"] = str(box.laptop)
        os.environ.pop("SSH_AUTH_SOCK", None)
        for fault in FAULTS:
            if not names or fault.__name__ in names:
                bench, began = Bench(box), time.monotonic()
                print(json.dumps({fault.__name__: fault(bench, times) | dict(seconds=round(time.monotonic() - began, 1))}), flush=True)
                bench.host.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
