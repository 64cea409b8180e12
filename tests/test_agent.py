"The small program on the box: it gets there by itself, answers, is asked again after a cut, and is noticed when it cannot run."

import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
from box import Box, argv, until, why_no_box

from nanogpt_nb.remote.agent import ABSENT, NO_PYTHON, Agent, Dropped, Frames, HostError, ask, bundle, install_command, start_command
from nanogpt_nb.remote.ssh import Host
from nanogpt_nb.remote.there import MARK

pytestmark = pytest.mark.skipif(why_no_box() is not None, reason=why_no_box() or "")


@pytest.fixture
def box(tmp_path, monkeypatch):
    with Box(tmp_path) as box:
        yield box.use(monkeypatch)


@pytest.fixture
def host(box):
    with Host("gpu") as host:
        yield host


def sh(command: str, home, path: str | None = None, **kwargs) -> subprocess.CompletedProcess:
    env = {"HOME": str(home), "PATH": path or os.environ["PATH"]}
    return subprocess.run(["/bin/sh", "-c", command], env=env, capture_output=True, **kwargs)


def test_it_gets_there_once_and_stays(box, host):
    assert host.call("there.hello")["home"] == str(box.home)
    (folder,) = box.home.glob(".nanogpt_nb/there-*")
    assert folder.name == bundle()[0] and folder.stat().st_mode & 0o077 == 0
    before = folder.stat().st_ctime_ns
    with Host("gpu") as again:
        assert again.call("there.hello") | {"time": 0} == host.call("there.hello") | {"time": 0}
    assert folder.stat().st_ctime_ns == before
    assert not list(folder.rglob("__pycache__"))  # half of one, on a full disk, would break the program for good


def test_two_that_install_at_once_do_not_disturb_each_other(box):
    hosts = [Host("gpu") for _ in range(4)]
    told, threads = [], []
    for host in hosts:
        threads.append(threading.Thread(target=lambda host=host: told.append(host.call("there.hello")["home"])))
        threads[-1].start()
    for thread in threads:
        thread.join(240)
    assert told == [str(box.home)] * 4
    assert [p.name for p in box.home.glob(".nanogpt_nb/*")] == [bundle()[0]]
    for host in hosts:
        host.close()


def test_a_home_in_which_nothing_can_be_written(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / ".nanogpt_nb").write_text("in the way")
    assert sh(install_command(), home, input=bundle()[1]).returncode not in (0, ABSENT, NO_PYTHON)
    assert sh(start_command(), home).returncode == ABSENT


def test_a_cut_while_it_is_copied_leaves_nothing_that_looks_whole(tmp_path):
    packed = bundle()[1]
    assert sh(install_command(), tmp_path, input=packed[:1024]).returncode != 0
    assert sh(start_command(), tmp_path).returncode == ABSENT
    assert sh(install_command(), tmp_path, input=packed).returncode == 0
    assert sh(start_command(), tmp_path, input=b'{"verb": "there.hello"}\n').stdout.startswith(MARK)


def test_no_python_is_said(tmp_path):
    bin = tmp_path / "bin"
    bin.mkdir()
    for tool in ("sh", "tar", "mkdir", "mv", "rm"):
        (bin / tool).symlink_to(shutil.which(tool))
    assert sh(install_command(), tmp_path, str(bin), input=bundle()[1]).returncode == 0
    assert sh(start_command(), tmp_path, str(bin)).returncode == NO_PYTHON


def test_a_shell_that_talks_is_passed_over(box, host):
    (box.home / ".bashrc").write_text("echo Welcome to the box; echo enjoy >&2\n")
    assert host.call("there.hello")["home"] == str(box.home)


def test_what_is_wrong_there_is_a_sentence_here_and_the_channel_goes_on(host):
    host.call("there.hello")
    channel = host.agent.channel
    with pytest.raises(HostError, match="nothing"):
        host.call("there.nothing")
    assert host.call("there.hello")["home"] and host.agent.channel is channel


def test_the_program_ends_with_its_connection(box, host):
    host.call("there.hello")
    until(lambda: len([p for p in box.processes() if b"there-" in argv(p)]) == 1, "the program alone, without what brought it there")
    host.close()
    until(lambda: not box.processes(), "the end of the program")


def test_a_question_is_put_again_after_a_cut_unless_it_must_not(box, host):
    host.call("there.hello")
    assert box.wire.cut() == 1
    assert host.call("there.hello")["home"] == str(box.home)
    box.wire.cut()
    with pytest.raises(Dropped):
        host.call("there.hello", again=False)
    assert host.call("there.hello", again=False)["home"] == str(box.home)


def test_a_program_that_is_killed_is_started_again(box, host):
    host.call("there.hello")
    for pid in box.processes():
        if b"there-" in argv(pid):
            os.kill(pid, 9)
    assert host.call("there.hello")["home"] == str(box.home)


class Local:
    "The program as a process of this machine, for the protocol alone."

    def __init__(self, folder):
        self.process = subprocess.Popen([sys.executable, "-I", "-S", str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.read = self.process.stdout.read1

    def write(self, data):
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def code(self):
        return self.process.wait()


@pytest.fixture
def local(tmp_path):
    "The program with two verbs more: one that is slow, one that counts what it gets."
    assert sh(install_command(), tmp_path, input=bundle()[1]).returncode == 0
    folder = tmp_path / ".nanogpt_nb" / bundle()[0]
    (folder / "box" / "there_try.py").write_text(
        "import hashlib, os, time\n"
        "def slow(flag):\n    while not os.path.exists(flag): time.sleep(0.01)\n    return {'done': True}\n"
        "def count(payload):\n    h, n = hashlib.sha256(), 0\n    for piece in payload: h.update(piece); n += len(piece)\n    return {'n': n, 'sha256': h.hexdigest()}\n"
        "def first(payload):\n    return {'first': len(next(payload))}\n"
        "def many(n):\n    for i in range(n): yield {'i': i}, bytes([i % 256]) * i\n"
        "def die():\n    os._exit(7)\n"
    )
    channel = Local(folder)
    frames = Frames(channel)
    frames.until(MARK)
    yield channel, frames
    channel.process.stdin.close()
    channel.process.stdout.close()
    channel.process.wait(120)


def last(asked) -> dict:
    *_, (frame, _) = asked
    return frame["answer"]


def test_payloads_frames_and_what_is_not_read(local):
    import hashlib

    pieces = [os.urandom(n) for n in (1, 70_000, 0, 3_000_000)]
    assert last(ask(*local, "try.count", {}, pieces)) == {"n": 3_070_001, "sha256": hashlib.sha256(b"".join(pieces)).hexdigest()}
    assert last(ask(*local, "try.first", {}, pieces)) == {"first": 1}  # the rest is passed over
    assert [(f["i"], d) for f, d in ask(*local, "try.many", {"n": 300}) if "i" in f] == [(i, bytes([i % 256]) * i) for i in range(300)]


def test_a_slow_answer_is_kept_alive_by_beats(local, tmp_path):
    channel, frames = local
    channel.write(json.dumps(dict(verb="try.slow", args=dict(flag=str(tmp_path / "flag")))).encode() + b"\n")
    beat, _ = frames.frame()
    assert beat["beat"]
    (tmp_path / "flag").touch()
    while "end" not in (frame := frames.frame()[0]):
        assert frame["beat"]
    assert frame["answer"] == {"done": True}


def test_a_program_that_gives_up_is_not_asked_for_ever(local):
    with pytest.raises(HostError, match="exit code 7") as e:
        last(ask(*local, "try.die", {}))
    assert not isinstance(e.value, Dropped)


def test_an_agent_needs_only_open_and_persist():
    class Nowhere:
        name = "nowhere"

        def open(self, command):
            raise Dropped("no")

        def persist(self, once):
            return once()

    with pytest.raises(Dropped):
        Agent(Nowhere()).call("there.hello")
