"Jobs on a box: they are started once, outlive the connection and the runner, wait their turn, and end when asked."

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import faults_jobs as faults
import pytest
from box import Box, until, why_no_box

from nanogpt_nb.config import ConfigError
from nanogpt_nb.remote.agent import HostError
from nanogpt_nb.remote.jobs import Job, job, jobs, new_id, start
from nanogpt_nb.remote.ssh import Host

pytestmark = pytest.mark.skipif(why_no_box() is not None, reason=why_no_box() or "")

FOREVER = ["sleep", "600"]


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, Box(tmp_path_factory.mktemp("jobs")) as box:
        yield box.use(patch)


@pytest.fixture(scope="module")
def host(box):
    with Host(box.name) as host:
        yield host


@pytest.fixture
def own(tmp_path, monkeypatch):
    "A box of its own, whose jobs are this test's alone."
    with Box(tmp_path) as box:
        yield box.use(monkeypatch)


def alive(job: Job) -> list[str]:
    "What runs of a job, by command line, but for the runner."
    found = []
    for pid in faults.marked(job.id):
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
    return sorted(found)


def gone(job: Job) -> bool:
    return until(lambda: not alive(job), f"the end of {job.id}")


def file(job: Job, name: str) -> Path:
    return Path(job.status()["folder"]) / name


def read(job: Job, name: str) -> dict:
    return json.loads(file(job, name).read_text())


def kill_runner(job: Job):
    pid = job.status()["runner"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: job.status()["runner"] is None or job.last["state"] == "lost", "the end of the runner")


def trap(what: str, then: str = "") -> str:
    "A shell command that says ready, and does something at SIGTERM."
    return f"trap {what!r} TERM; echo ready; while :; do sleep 0.02; done{then}"


def ready(job: Job, word: str = "ready") -> Job:
    until(lambda: word in file(job, "log.txt").read_text(), f"{word} in the log of {job.id}")
    return job


# Start


def test_a_job_outlives_the_connection(box, host):
    with Host(box.name) as first:
        one = start(first, "while [ ! -e go ]; do sleep 0.02; done; echo went", cwd=str(box.folder))
        assert one.state == "running"
    box.wire.cut()
    assert job(host, one.id).state == "running"
    (box.folder / "go").touch()
    assert Job(host, one.id).wait()["state"] == "finished" and list(one.logs()) == ["went"]


def test_words_are_passed_as_they_are_and_a_line_goes_to_the_shell(host):
    words = ["two words", "$HOME", "'", '"', "*", "", "-n", "a\nb", "ü", "\\", "`id`"]
    one = start(host, [sys.executable, "-c", "import sys; print(ascii(sys.argv[1:]))", *words])
    two = start(host, "echo $((1 + 1)) | tr 2 3")
    assert one.wait()["code"] == two.wait()["code"] == 0
    assert list(one.logs()) == [ascii(words)] and list(two.logs()) == ["3"]


def test_the_command_has_the_environment_of_a_session_and_its_own(box, host):
    (box.home / "project").mkdir()
    one = start(host, "pwd; env", cwd="project", env={"MINE": "a b\nc", "OMP_NUM_THREADS": "3"})
    one.wait()
    said = list(one.logs())
    assert said[0] == str(box.home / "project") == next(s for s in said if s.startswith("PWD="))[4:]
    assert {"MINE=a b", "c", "OMP_NUM_THREADS=3", f"HOME={box.home}", f"NANOGPT_NB_JOB={one.id}", "PYTHONUNBUFFERED=1"} <= set(said)
    assert not [s for s in said if s.startswith("SSH_")]


def test_it_has_a_session_and_a_group_of_its_own_and_no_input(host):
    one = start(host, [sys.executable, "-c", "import os, sys; print(os.getsid(0) == os.getpgrp() == os.getpid(), sys.stdin.read() == '')"])
    one.wait()
    assert list(one.logs()) == ["True True"]


def test_a_secret_reaches_the_command_and_nothing_else(box, host):
    secret = "sesame-" + os.urandom(8).hex()
    behind = start(host, FOREVER, queue="secret")
    one = start(host, ["sh", "-c", "echo ${#KEY}; exec sleep 600"], secrets={"KEY": secret}, queue="secret")
    seen = lambda: [f for p in Path("/proc").glob("[0-9]*") for f in (p / "cmdline", p / "environ") if secret.encode() in content(f)]
    assert one.state == "queued" and seen() == []
    behind.stop(grace=0)
    ready(one, str(len(secret)))
    assert {p.name for p in seen()} == {"environ"} and {p.parent.name for p in seen()} == {str(one.status()["pid"])}
    assert [p for p in box.home.rglob("*") if p.is_file() and secret.encode() in content(p)] == []
    assert read(one, "job.json")["secrets"] == ["KEY"] and secret not in json.dumps(one.status())
    one.stop(grace=0)


def content(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


def test_nobody_else_may_look(host):
    one = start(host, "umask")
    one.wait()
    assert file(one, "").stat().st_mode & 0o077 == 0
    assert list(one.logs()) != ["0077"]  # the command's own files are not shut


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(command=[]), "not a command"),
        (dict(command="  "), "not a command"),
        (dict(command=["a\0b"]), "not a command"),
        (dict(cwd="no/such/folder"), "push the project first"),
        (dict(env={"A=B": "1"}), "environment variable"),
        (dict(secrets={"A": "x\0y"}), "environment variable"),
        (dict(after="nobody"), "no job 'nobody'"),
        (dict(id="../out"), "cannot be called"),
        (dict(id=".hidden"), "cannot be called"),
    ],
)
def test_what_cannot_be_is_said_before_there_is_a_job(host, given, said):
    before = [j.id for j in jobs(host)]
    with pytest.raises(HostError, match=said) as e:
        start(host, **{"command": "true", **given})
    assert [j.id for j in jobs(host)] == before and "x\0y" not in str(e.value)


@pytest.mark.parametrize("command", [["no-such-program", "x"], ["/etc/passwd"]])
def test_a_command_that_cannot_be_started_has_failed_and_says_so(host, command):
    s = start(host, command).wait()
    assert (s["state"], s["code"]) == ("failed", 127) and command[0] in s["error"]
    assert list(Job(host, s["id"]).logs()) == [s["error"]]


def test_many_who_ask_for_one_job_at_once_get_one(box, host):
    id, got = new_id(), []
    bench = faults.Bench(box)

    def work():
        with Host(box.name) as mine:
            got.append(start(mine, bench.saying(2), id=id).id)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == [id] * 6 and Job(host, id).wait()["state"] == "finished"
    bench.check_once(Job(host, id))


def test_an_id_is_not_taken_over_by_another_command(host):
    one = start(host, "true")
    with pytest.raises(HostError, match="another command"):
        start(host, "false", id=one.id)


def test_a_job_is_found_by_what_can_be_typed(host):
    old, new = (start(host, "true", name="same name") for _ in range(2))
    assert old != new and [one.wait()["state"] for one in (old, new)] == ["finished"] * 2
    for word, found in ((old.id, old), (old.id[-4:], old), (old.id[:-1], old), ("same name", new)):
        assert job(host, word) == found
    with pytest.raises(HostError, match="Several jobs.*say which"):
        job(host, old.id[:4])
    with pytest.raises(HostError, match="no job 'nothing'.*nanogpt job ls"):
        job(host, "nothing")
    with pytest.raises(HostError, match="no job ''"):
        job(host, "")


def test_another_laptop_sees_the_same_jobs(box, host):
    one = start(host, "true", name="seen", about={"run": "mine"})
    with Host(box.name) as other:
        assert one in jobs(other) and job(other, "seen").status()["about"] == {"run": "mine"}


# Its end


def test_the_code_and_the_signal_are_told(host):
    assert start(host, "exit 0").wait()["state"] == "finished"
    failed, killed = start(host, "exit 3").wait(), start(host, "kill -KILL $$").wait()
    assert (failed["state"], failed["code"]) == ("failed", 3)
    assert (killed["state"], killed["code"], killed["signal"]) == ("failed", -9, "SIGKILL") and "memory" in killed["error"]
    assert killed["created"] <= killed["started"] <= killed["ended"]


@pytest.mark.parametrize(
    "what", ["sleep 601 & exit 4", pytest.param("sleep 601 & trap '' TERM; sleep 602 & exit 4", marks=pytest.mark.slow)]
)
def test_what_stays_in_the_group_ends_with_the_command(host, what):
    one = start(host, what)
    assert one.wait()["code"] == 4 and alive(one) == []


def test_what_has_a_session_of_its_own_stays_unless_the_command_is_killed(host):
    daemon = f"setsid {sys.executable} -S -c 'import time; print(\"up\", flush=True); time.sleep(600)' & while ! grep -q up $LOG; do sleep 0.02; done;"
    log = "LOG=$HOME/.nanogpt_nb/jobs/$NANOGPT_NB_JOB/log.txt; "
    stays, killed = start(host, log + daemon + "exit 0"), start(host, log + daemon + "kill -SEGV $$")
    assert stays.wait()["state"] == "finished" and len(alive(stays)) == 1
    assert killed.wait()["signal"] == "SIGSEGV" and alive(killed) == []
    for pid in faults.marked(stays.id):
        os.kill(pid, signal.SIGKILL)


def test_stop_lets_the_command_finish_its_work(host):
    one = ready(start(host, trap("sleep 0.2; echo saved; exit 0")))
    s = one.stop()
    assert (s["state"], s["code"]) == ("stopped", 0) and list(one.logs())[-1] == "saved"


def test_the_grace_is_the_whole_groups(host):
    "The shell in front ends at SIGTERM at once, the trainer behind it after its checkpoint."
    trainer = "import signal, sys, time; signal.signal(15, lambda *_: (time.sleep(0.5), print('saved'), sys.exit(0))); print('ready'); time.sleep(600)"
    one = ready(start(host, f"{shlex.join([sys.executable, '-c', trainer])}; echo after"))
    assert one.stop()["state"] == "stopped"
    assert list(one.logs()) == ["ready", "saved"] and alive(one) == []


def test_what_does_not_listen_is_killed_with_all_below_it(host):
    one = start(host, "trap '' TERM; setsid sleep 603 & sleep 604 & echo ready; while :; do sleep 0.02; done")
    ready(one)
    s = one.stop(grace=0.3)
    assert (s["state"], s["signal"]) == ("stopped", "SIGKILL") and alive(one) == []


def test_the_shorter_grace_counts(host):
    one = ready(start(host, trap("")))
    one.stop(grace=1000, wait=False)
    assert one.state == "running" and "asked to stop" in repr(jobs(host))
    assert one.stop(grace=0.1)["state"] == "stopped"


def test_one_that_has_ended_is_left_alone(host):
    one = start(host, "exit 5")
    one.wait()
    assert one.stop()["state"] == "failed" and not file(one, "stop.json").exists()


def test_a_machine_that_shuts_down_lets_jobs_finish(host):
    one = ready(start(host, trap("echo saved; exit 0")))
    os.kill(one.status()["runner"], signal.SIGTERM)
    assert one.wait()["state"] == "stopped" and list(one.logs())[-1] == "saved"


@pytest.mark.parametrize("grace", [-1, float("nan")])
def test_a_grace_that_is_no_time_is_refused(host, grace):
    with pytest.raises(ConfigError, match="grace"):
        Job(host, "x").stop(grace)


def test_waiting_ends_after_the_time_that_was_given(host):
    one = start(host, FOREVER)
    with pytest.raises(HostError, match=f"goes on after 0.1 s.*nanogpt job stop {host.name} {one.id}"):
        one.wait(0.1)
    assert one.stop(grace=1)["signal"] == "SIGTERM"


def test_only_what_has_ended_is_removed(host):
    one = start(host, FOREVER)
    with pytest.raises(HostError, match="goes on; stop it first"):
        one.remove()
    one.stop(grace=0)
    one.remove()
    assert one not in jobs(host)
    with pytest.raises(HostError, match="no job"):
        list(one.logs())


# The log


def test_lines_come_as_they_are_written(host):
    one = start(host, "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done")
    told = []
    for line in one.logs(follow=True):
        told.append(line)
        if len(told) == 20:
            one.stop(wait=False)
    assert told[:20] == [str(i + 1) for i in range(20)] and one.last["state"] == "stopped"


def test_odd_output(host):
    one = start(
        host,
        [sys.executable, "-c", "import sys; sys.stdout.buffer.write('é\\r50%\\n'.encode() + b'\\xff\\xfe\\n\\n' + 'no end é'.encode())"],
    )
    one.wait()
    assert list(one.logs()) == ["é\r50%", "\ufffd\ufffd", "", "no end é"] == list(one.logs(follow=True))


def test_the_last_lines(host):
    numbers, every = start(host, "seq 12000"), [str(i + 1) for i in range(12000)]
    numbers.wait()
    for n in (0, 1, 3, 5000, 12000, 20000):
        assert list(numbers.logs(lines=n)) == every[max(0, 12000 - n) :]


def test_a_log_that_is_cut_short_is_told_from_its_start(host):
    one = ready(
        start(
            host,
            "seq 1000; echo ready; while [ ! -e ~/cut ]; do sleep 0.02; done; : > ~/.nanogpt_nb/jobs/$NANOGPT_NB_JOB/log.txt; echo anew",
        )
    )
    told = []
    for line in one.logs(follow=True):
        told.append(line)
        if line == "ready":
            Path(one.last.get("folder") or one.status()["folder"]).parents[2].joinpath("cut").touch()
    assert told == [*(str(i + 1) for i in range(1000)), "ready", "anew"]


def test_a_log_that_is_removed_says_so(host):
    one = ready(start(host, "echo ready; exec sleep 600"))
    with pytest.raises(HostError, match="somebody has removed it"):
        for _ in one.logs(follow=True):
            file(one, "log.txt").unlink()
    one.stop(grace=0)


@pytest.mark.slow
def test_a_log_of_a_gigabyte_needs_little_memory(box, host):
    one = start(host, "yes 0123456789012345678901234567890123456789012345678901234567890123456789 | head -c 1000000000")
    one.wait()
    code = (
        "import resource, sys\nfrom nanogpt_nb.remote.jobs import Job\n"
        "n = sum(1 for _ in Job(sys.argv[1], sys.argv[2]).logs())\n"
        "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, box.name, one.id], capture_output=True, text=True, timeout=600)
    lines, megabytes = map(int, done.stdout.split())
    assert lines == -(-1_000_000_000 // 71) and megabytes < 300
    one.remove()


# Its turn


def test_one_at_a_time_and_first_come_first_served(own):
    with Host(own.name) as host:
        every = [start(host, f"while [ ! -e ~/go ]; do sleep 0.02; done; echo {i} >> ~/order; sleep 0.1", queue="gpu") for i in range(4)]
        other = start(host, "true", queue="cpu")
        assert other.wait()["state"] == "finished" and every[-1].state == "queued"
        (own.home / "go").touch()
        times = [(s["started"], s["ended"]) for s in (one.wait() for one in every)]
        assert all(a[1] <= b[0] for a, b in zip(times, times[1:], strict=False))
        assert (own.home / "order").read_text().split() == list("0123")


def test_one_that_does_not_wait_is_waited_for(own):
    with Host(own.name) as host:
        first = start(host, FOREVER, queue="gpu", wait=False)
        second = start(host, "true", queue="gpu")
        assert start(host, "true").last["ahead"] == [] and second.last["ahead"] == [first.id]
        third = start(host, "true", queue="gpu", wait=False)
        assert third.last["ahead"] == [first.id] and third.wait()["state"] == "finished" and second.state == "queued"
        first.stop(grace=0)
        assert second.wait()["started"] >= first.last["ended"]


def test_the_last_one_is_called_so(own):
    with Host(own.name) as host:
        with pytest.raises(HostError, match="no jobs at all"):
            start(host, "true", after="last")
        first = start(host, FOREVER)
        second = start(host, "true", after="last")
        assert second.last["after"] == first.id and job(host, "last") == second and second.state == "queued"
        first.stop(grace=0)
        assert second.wait()["state"] == "finished"


def test_one_that_is_lost_before_its_turn_says_so_and_what_it_lacks(own):
    with Host(own.name) as host:
        first = start(host, FOREVER, queue="gpu")
        plain, secret = start(host, "true", queue="gpu"), start(host, "true", queue="gpu", secrets=dict(KEY="sesame"))
        for one in (plain, secret):
            kill_runner(one)
        assert plain.status()["error"] == "Its runner was killed before its turn came, so it never ran; start it again."
        file(secret, "status.json").write_text(json.dumps(read(secret, "status.json") | dict(boot="an earlier one")))
        assert secret.state == "lost" and re.search("restarted before its turn.*KEY was in memory only", secret.last["error"])
        first.stop(grace=0)


def test_one_that_waits_for_another_lets_others_pass(own):
    with Host(own.name) as host:
        long = start(host, FOREVER)
        waits = start(host, "true", after=long, queue="gpu")
        assert start(host, "true", queue="gpu").wait()["state"] == "finished" and waits.state == "queued"
        long.stop(grace=0)
        assert waits.wait()["started"] >= long.last["ended"]


def test_one_that_is_stopped_before_its_turn_never_runs(own):
    with Host(own.name) as host:
        first = start(host, FOREVER, queue="gpu")
        second, third = start(host, "touch ~/ran", queue="gpu"), start(host, "true", queue="gpu")
        assert second.stop()["state"] == "stopped" and "started" not in second.last and "never ran" in second.last["error"]
        first.stop(grace=0)
        assert third.wait()["state"] == "finished" and not (own.home / "ran").exists()


def test_a_dead_runner_neither_blocks_the_queue_nor_lets_two_run(own):
    with Host(own.name) as host:
        first, second, third = (start(host, c, queue="gpu") for c in (FOREVER, "true", "true"))
        kill_runner(second)
        assert second.state == "lost"
        kill_runner(first)
        assert first.state == "running" and third.state == "queued"  # its command is still at work
        os.kill(first.status()["pid"], signal.SIGKILL)
        assert third.wait()["state"] == "finished" and first.state == "lost"


# Faults


def test_without_its_runner_a_command_is_still_seen_and_stopped(host):
    one = ready(start(host, trap("echo saved; exit 0")))
    kill_runner(one)
    assert one.state == "running" and list(one.logs())[0] == "ready"
    s = one.stop()
    assert s["state"] == "stopped" and "runner" in s["error"] and gone(one)
    assert list(one.logs())[-1] == "saved"


def test_without_its_runner_what_does_not_listen_is_killed(host):
    one = ready(start(host, "trap '' TERM; setsid sleep 605 & echo ready; while :; do sleep 0.02; done"))
    kill_runner(one)
    assert one.stop(grace=0.2)["state"] == "stopped" and gone(one)


def test_a_log_is_followed_to_the_end_without_a_runner(host, box):
    one = start(host, "echo first; while [ ! -e ~/finish ]; do sleep 0.02; done; echo last")
    ready(one, "first")
    kill_runner(one)
    told = []
    for line in one.logs(follow=True):
        told.append(line)
        (box.home / "finish").touch()
    assert told == ["first", "last"] and one.last["state"] == "lost"


def test_after_a_restart_of_the_machine_a_job_is_lost_and_its_number_is_nobodys(host):
    one = start(host, FOREVER)
    pid = one.status()["pid"]
    kill_runner(one)
    file(one, "status.json").write_text(json.dumps(read(one, "status.json") | dict(boot="an earlier one")))
    assert one.state == "lost" and "restarted" in one.last["error"]
    os.kill(pid, signal.SIGKILL)
    assert one.stop()["state"] == "lost"


def test_a_job_of_another_machine_with_the_same_home_is_believed(host):
    one = start(host, "true")
    one.wait()
    file(one, "status.json").write_text(json.dumps(read(one, "status.json") | dict(state="running", host="node7", boot="its own")))
    assert one.state == "running"
    with pytest.raises(HostError, match="runs on node7"):
        one.stop()
    one_here = read(one, "status.json") | dict(host=socket.gethostname())
    file(one, "status.json").write_text(json.dumps(one_here))
    assert one.state == "lost"


TIMES = dict(cut_in_start=2, cut_in_logs=4, client_killed=2, runner_killed=2, sshd_restarted=2, stop_while_queued=1, pid_reused=1)


SLOW = ("stop_while_queued", "pid_reused")  # tests above do these once, without chance


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in TIMES])
def test_a_few_faults(own, name):
    seen = getattr(faults, name)(faults.Bench(own), TIMES[name])
    assert seen


@pytest.mark.slow
def test_readers_that_are_killed_leave_nothing_there(own):
    assert faults.reader_killed(faults.Bench(own), 3)["helpers_left"] <= 1


# The table


def test_the_table_shows_what_is_there_and_escapes_it(own):
    with Host(own.name) as host:
        assert repr(jobs(host)) == jobs(host)._repr_html_() == "no jobs"
        start(host, "echo '<b>'\n\x1b[31m exit 1; exit 2", name="a<b").wait()
        table = jobs(host)
        assert "failed (2)" in repr(table) and "\x1b" not in repr(table) and len(repr(table).splitlines()) == 2
        assert "<b>" not in table._repr_html_() and "a&lt;b" in table._repr_html_()
        assert repr(table[0]) == f"Job('gpu', '{table[0].id}', failed)"
