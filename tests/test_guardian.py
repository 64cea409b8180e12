"The guardian of a lease as a process of its own, what it sees of a box, and the guardian on the box."

import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from box import Box, Wire, contents, until, why_no_box

from nanogpt_nb.config import NanoGPTConfig
from nanogpt_nb.remote import guardian, login, there_guard
from nanogpt_nb.remote.agent import HostError
from nanogpt_nb.remote.cloud_key import key_file, write_secret
from nanogpt_nb.remote.guardian import guards, is_guarded, start_guardian
from nanogpt_nb.remote.jobs import start
from nanogpt_nb.remote.lambda_cloud import LambdaCloud
from nanogpt_nb.remote.landing import note_remote
from nanogpt_nb.remote.lease_folder import Record
from nanogpt_nb.remote.lease_guard import step
from nanogpt_nb.remote.lease_state import instance_name, tags_of
from nanogpt_nb.remote.money import Terms
from nanogpt_nb.remote.rehearsal_machine import Fault, NoAnswer
from nanogpt_nb.remote.rehearsed import Service
from nanogpt_nb.remote.ssh import Host
from nanogpt_nb.remote.world import Eye, World, is_running, strays, tell_box, this_process
from nanogpt_nb.runs import Run

KEY = "secret_guardian_0123456789abcdef"
PUBLIC = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ8sW8c1zT1nOeB5rjFqXn0Zm8yY5J0aT3oJc0bq3vVd a@b"
needs_box = pytest.mark.skipif(why_no_box() is not None, reason=why_no_box() or "")
needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")


class Cloud:
    "The rehearsed service at an HTTP address of this machine, by the real clock."

    def __init__(self):
        self.service, self.lock, outer = Service(boot=0.05, ending=0.2, key=KEY), threading.RLock(), self

        class Door(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                try:
                    with outer.lock:
                        status, headers, content = outer.service.handle(self.command, self.path, self.headers, body)
                except NoAnswer:
                    return self.connection.close()
                self.send_response_only(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_DELETE = do_GET

        self.web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Door)
        self.web.daemon_threads = True
        threading.Thread(target=self.web.serve_forever, daemon=True).start()
        self.wire = Wire(self.web.server_port)
        self.url = f"http://127.0.0.1:{self.wire.port}/api/v1"
        self.client = LambdaCloud(KEY, self.url)
        self.client.pace = None

    def close(self):
        self.wire.close()
        self.web.shutdown()
        self.web.server_close()

    def fail(self, *faults):
        with self.lock:
            self.service.faults += faults

    def asked(self, pattern: str) -> list:
        with self.lock:
            return [status for _, line, status in self.service.asked if re.search(pattern, line)]

    def rent(self, record: Record, ready: bool = True) -> str:
        "An instance of a lease, as renting would leave it; its id."
        if not self.client.ssh_keys():
            self.client.add_ssh_key("k", PUBLIC)
        end = time.time() + 3600
        name, type_, region = instance_name(record.id, end), "gpu_1x_a10", self.service.capacity["gpu_1x_a10"][0]
        record.note("asking", name=name, type=type_, region=region, cents=129)
        id = self.client.launch(type_, region, "k", name, tags=tags_of(record.id, end))
        record.note("launched", id=id)
        until(lambda: self.client.instance(id).status == "active", "an active instance")
        record.note("status", id=id, status="active")
        if ready:
            record.note("ready", id=id)
        return id

    def status(self, id: str) -> str:
        with self.lock:
            self.service.tick(self.service.clock.time())
            return self.service.machines[id].status


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A user's home and data folder of this test."
    (tmp_path / "laptop").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "laptop"))
    monkeypatch.setenv("NANOGPT_NB_DATA", str(tmp_path / "data"))
    for name in ("LAMBDA_API_KEY", "LAMBDA_API_KEY_FILE", "XDG_CONFIG_HOME", "DBUS_SESSION_BUS_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path
    for said in (tmp_path / "data").rglob("guardian.json"):
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            p = psutil.Process(json.loads(said.read_text())["pid"])
            if str(said.parent) in p.cmdline():
                p.kill()


@pytest.fixture
def cloud():
    cloud = Cloud()
    yield cloud
    cloud.close()


def lease(cloud, **terms) -> Record:
    return Record.create(
        Terms(("gpu_1x_a10",), base_url=cloud.url, **{"alias": "gpu", "owner": this_process(), **terms}), clock=cloud.client.time
    )


def pid_of(record) -> int:
    return json.loads((record.path / "guardian.json").read_text())["pid"]


def log_of(record) -> str:
    return (record.path / "guardian.log").read_text()


def nobody() -> dict:
    "A process that has ended."
    p = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    who = this_process() | dict(pid=p.pid, started=this_process()["started"].split(" ")[0] + " 1")
    p.communicate()
    return who


def where_key_shows(pids) -> list[str]:
    "Every command line and environment among those processes with the key in it."
    files = [Path("/proc", str(pid), name) for pid in pids for name in ("cmdline", "environ")]
    found = []
    for f in files:
        with contextlib.suppress(OSError):
            if KEY.encode() in f.read_bytes():
                found.append(str(f))
    return found


def files_with_key(folder: Path) -> list[str]:
    return [str(p) for p, data in contents(folder) if KEY.encode() in data]


# The process


def test_guardian_is_alone_detached_and_keeps_the_key_to_itself(home, cloud, monkeypatch):
    monkeypatch.setenv("LAMBDA_API_KEY", KEY)
    record = lease(cloud)
    cloud.rent(record)
    assert start_guardian(record, KEY) and not start_guardian(record, KEY)
    assert guards(record) == dict(process=True, guardian=True, box=False)
    until(lambda: len(cloud.asked("GET /instances$")) > 0, "a look at the instances")
    p = psutil.Process(pid_of(record))
    assert os.getsid(p.pid) != os.getsid(0) and os.getpid() not in [q.pid for q in p.parents()]
    if os.path.isdir("/proc/self"):
        assert where_key_shows([p.pid, *(c.pid for c in p.children(recursive=True))]) == []
    assert files_with_key(home) == []
    for s in (signal.SIGHUP, signal.SIGINT):
        p.send_signal(s)
    before = len(cloud.asked("GET /instances$"))
    record.note("end", why="asked")
    until(lambda: record.state.phase == "ended", "the end of the lease")
    assert len(cloud.asked("GET /instances$")) > before
    until(lambda: not is_guarded(record), "the end of the guardian")
    assert "Process" in log_of(record) and "has ended" in log_of(record) and files_with_key(home) == []


def in_this_process(record, cloud, say=lambda text: None, **more) -> guardian.Guardian:
    "A guardian without a process, whose client does not wait between attempts."
    g = guardian.Guardian(
        record,
        guardian.its_cloud(record, KEY),
        World(say=say, every=0.1, **more),
        guardian.Log(open(record.path / "guardian.log", "a"), KEY),
        step,
    )
    g.cloud.waits, g.cloud.pace = (0.01,), None
    return g


def turns(g, what: str, over=lambda: False):
    "Turn after turn, at once, until there are no more or `over`."
    until(lambda: g.turn() is None or over(), what)


def test_owner_gone_the_guardian_gives_back_through_errors_silence_and_a_broken_network(home, cloud):
    record, said = lease(cloud, owner=nobody()), []
    id = cloud.rent(record)
    other = cloud.client.launch("gpu_1x_a10", cloud.service.capacity["gpu_1x_a10"][0], "k", "somebody-else")
    cloud.fail(
        Fault("POST /instance-operations/terminate", 2, "before"),
        Fault("POST /instance-operations/terminate", 1, "dropped"),
        Fault("GET /instances", 5, "before", status=503),
    )
    cloud.wire.refuse = True
    g = in_this_process(record, cloud, said.append)
    turns(g, "a word about the service", lambda: said)
    assert "looked after as soon as the service answers" in said[0] and cloud.status(id) == "active"
    cloud.wire.refuse = False
    turns(g, "the end of the lease")
    assert record.state.phase == "ended" and cloud.status(id) == "terminated" and cloud.status(other) == "active"
    assert len(cloud.asked("terminate")) >= 3 and cloud.asked("terminate").count(200) >= 1


def test_guardian_that_was_killed_or_stopped_is_replaced(home, cloud):
    record = lease(cloud)
    cloud.rent(record)
    start_guardian(record, KEY)
    first = psutil.Process(pid_of(record))
    first.kill()
    until(lambda: not is_guarded(record), "the lock let go")
    assert start_guardian(record, KEY)
    second = psutil.Process(pid_of(record))
    assert second.pid != first.pid
    second.suspend()
    said = json.loads((record.path / "guardian.json").read_text())
    (record.path / "guardian.json").write_text(json.dumps(said | dict(at=said["at"] - guardian.STALE - 1)))
    assert not is_guarded(record) and guardian.is_held(record)
    assert start_guardian(record, KEY) and (not second.is_running() or second.status() == "zombie")
    assert is_guarded(record)


def test_guardian_that_cannot_start_says_why(home, cloud, monkeypatch):
    record = lease(cloud)
    (record.path / "lease.json").write_text("{")
    (record.path / "events.jsonl").unlink()
    with pytest.raises(HostError, match="does not start.*guardian.log") as e:
        start_guardian(Broken(record, cloud.url), KEY)
    assert KEY not in str(e.value) and files_with_key(home) == []


class Broken:
    "A lease whose terms are known here, and cannot be read by the guardian."

    def __init__(self, record, url):
        self.path, self.id, self.name, self.terms = record.path, record.id, "gpu", type("T", (), dict(base_url=url))


def test_owner_is_known_by_number_birth_and_machine():
    me = this_process()
    assert is_running(me) and not is_running(nobody()) and not is_running(dict(me, pid=me["pid"], started=me["started"] + "0"))


def test_the_folder_of_a_lease_is_made_again_while_it_costs(home, cloud):
    record = lease(cloud, owner=nobody())
    id, kinds = cloud.rent(record), [e["kind"] for e in record.events()]
    g = in_this_process(record, cloud)
    shutil.rmtree(record.path)
    assert g.restored()
    again = Record(record.path)
    assert [e["kind"] for e in again.events()] == kinds and again.terms == record.terms
    turns(g, "the end of the lease")
    assert cloud.status(id) == "terminated" and again.state.phase == "ended"
    shutil.rmtree(record.path)
    assert not g.restored() and not record.path.exists()


def test_key_that_was_replaced_is_looked_for_on_this_machine(home, cloud, monkeypatch):
    record = lease(cloud, owner=nobody())
    id = cloud.rent(record)
    monkeypatch.setattr("nanogpt_nb.remote.cloud_key.find_key", lambda key=None, base_url=None: key or KEY)
    out = open(home / "log", "w+")
    g = guardian.Guardian(
        record, guardian.its_cloud(record, "secret_old_key_42"), World(say=lambda text: None), guardian.Log(out, "secret_old_key_42"), step
    )
    turns(g, "another key", lambda: g.cloud.key == KEY)
    turns(g, "the end of the lease")
    out.seek(0)
    said = out.read()
    assert cloud.status(id) == "terminated" and "not accepted" in said and KEY not in said and "secret_old_key_42" not in said


# At login


def test_login_without_systemd_and_launchd_says_so(home):
    assert "does not come back by itself" in login.at_login(True) and login.at_login(False) == ""
    assert list((home / "laptop").rglob("*")) == []


@pytest.fixture
def systemd(home, monkeypatch):
    "A home that is this user's, and a systemctl that writes down what it is asked."
    bin = home / "bin"
    bin.mkdir()
    (bin / "systemctl").write_text(f'#!/bin/sh\necho "$@" >> {home}/asked\n')
    (bin / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: type("P", (), dict(pw_dir=str(home / "laptop"))))
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("LAMBDA_API_KEY", KEY)
    return home


@pytest.mark.skipif(os.name != "posix", reason="systemd")
def test_login_by_a_user_unit(systemd, monkeypatch):
    monkeypatch.setenv("NANOGPT_NB_DATA", str(systemd / "100% of 'it'"))
    assert "in no file and no keyring" in login.at_login(True)
    key_file().parent.mkdir()
    write_secret(key_file(), KEY)
    assert login.at_login(True) == "" and login.unit_file().stat().st_mode & 0o077 == 0
    key_file().unlink()
    text = login.unit_file().read_text()
    assert KEY not in text and "--all" in text and "100%% of 'it'" in text
    assert "--user enable nanogpt-nb-guardian.service" in (systemd / "asked").read_text()
    if verify := shutil.which("systemd-analyze"):
        done = subprocess.run(
            [verify, "verify", "--user", str(login.unit_file())],
            capture_output=True,
            text=True,
            env={**os.environ, "XDG_RUNTIME_DIR": str(systemd)},
        )
        assert login.UNIT not in done.stderr, done.stderr
    assert login.at_login(False) == "" and not login.unit_file().exists()


@pytest.mark.parametrize("kind", ["systemd", "launchd"])
@pytest.mark.parametrize(
    "name, value", [("NANOGPT_NB_DATA", "a\x1bb"), ("NANOGPT_NB_DATA", "a\nb"), ("LAMBDA_API_URL", "https://me:secret_word@cloud.lambda.ai/")]
)
def test_what_cannot_stand_in_a_unit_ends_nothing(systemd, monkeypatch, kind, name, value):
    monkeypatch.setenv(name, value if "http" in value else str(systemd / value))
    monkeypatch.setattr(login, "system", lambda: kind)
    if kind == "launchd" and value == "a\nb":
        return
    said = login.at_login(True)
    assert "does not come back by itself" in said and "secret_word" not in said
    assert not login.unit_file().exists() and not login.agent_file().exists()


def test_watching_all_starts_a_guardian_for_each_open_lease_and_ends_with_them(home, cloud, monkeypatch):
    record, over = lease(cloud), lease(cloud)
    over.note("ended", why="asked")
    monkeypatch.setattr("nanogpt_nb.remote.cloud_key.find_key", lambda key=None, base_url=None: key or KEY)
    thread = threading.Thread(target=guardian.watch_all, args=(0.05,), daemon=True)
    thread.start()
    until(lambda: is_guarded(record), "a guardian")
    os.kill(pid_of(record), signal.SIGKILL)
    before = pid_of(record)
    until(lambda: is_guarded(record) and pid_of(record) != before, "another guardian")
    assert not is_guarded(over)
    record.note("end", why="asked")
    thread.join(120)
    assert not thread.is_alive() and record.state.phase == "ended"


# What is seen of a box


@pytest.fixture
def box(home, monkeypatch):
    with Box(home, config="", laptop=home / "laptop") as box:
        with open(box.folder / "sshd_config") as f:
            text = f.read()
        (box.folder / "sshd_config").write_text(text.replace("SetEnv ", "SetEnv NANOGPT_NB_REHEARSAL=1 "))
        box.stop()
        box.start()
        box.use(monkeypatch)
        yield box


@needs_box
@needs_proc
def test_what_keeps_a_box(box):
    host = Host("gpu")
    look = lambda: host.call("idle.look")
    quiet = dict(stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    terminal = lambda word: subprocess.Popen(["ssh", "-tt", "-F", str(box.ssh / "config"), "gpu", word], **quiet)
    assert look()["busy"] is None
    with subprocess.Popen(["ssh", "-F", str(box.ssh / "config"), "gpu", "sleep 300"], stdin=subprocess.DEVNULL) as theirs:
        until(lambda: "ssh (sleep" in (look()["busy"] or ""), "an ssh session")
        theirs.kill()
    job = start(host, ["sleep", "300"], name="long")
    until(lambda: "job long is" in (look()["busy"] or ""), "a job")
    with terminal("cat") as theirs:
        until(lambda: any("terminal" in w for w in look()["why"]), "somebody at a terminal")
        theirs.kill()
    job.stop(grace=0)
    until(lambda: look()["busy"] is None, "nobody")
    with terminal("sh -i") as theirs:
        until(lambda: "terminal" in (look()["busy"] or ""), "somebody at a terminal")
        until(lambda: forgotten(box) and look()["busy"] is None, "a terminal that nobody has touched for an hour")
        theirs.stdin.write(b"sleep 300\n")
        theirs.stdin.flush()
        until(lambda: forgotten(box) and "terminal" in (look()["busy"] or ""), "a program in a terminal that nobody touches")
        theirs.kill()
    host.close()


def forgotten(box) -> bool:
    "Make the terminals of a box look as if nobody had touched them for an hour; whether there are some."
    found = 0
    for p in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # one that ends meanwhile
            if box_home(p, box) and p.terminal():
                os.utime(os.readlink(f"/proc/{p.pid}/fd/0"), (time.time() - 3600,) * 2)
                found += 1
    return found > 0


def run_there(box, name: str, state: str) -> Run:
    "A run folder on the box."
    far = Run.create(NanoGPTConfig.preset("tiny"), name, box.home / "runs", state=state)
    far.append(dict(step=1, train_loss=2.5))
    far.log("step 1")
    return far


TRAINER = "trap 'sed -i s/running/stopped/ runs/{0}/status.json; exit 0' TERM; while :; do sleep 0.1; done"


@needs_box
@needs_proc
def test_results_come_home_before_the_box_goes(box, cloud, home):
    host, record = Host("gpu"), lease(cloud, owner=nobody())
    id = cloud.rent(record)
    mine, stray = run_there(box, "mine", "running"), run_there(box, "stray", "running")
    jobs = [start(host, TRAINER.format(r.name), name=r.name, about=dict(run=str(r.path))) for r in (mine, stray)]
    here = Run(home / "runs" / "mine")
    here.path.mkdir(parents=True)
    note_remote(here, host="gpu", path=str(mine.path), job=jobs[0].id, seen=time.time())
    record.note("run", path=str(here.path))
    until(lambda: {j.state for j in jobs} == {"running"}, "running jobs")
    g = in_this_process(record, cloud)
    g.turn()
    assert cloud.status(id) == "active" and {j.state for j in jobs} == {"running"} and not record.state.asked_to_end
    record.note("end", why="asked")
    turns(g, "the end of the lease")
    assert cloud.status(id) == "terminated" and {j.state for j in jobs} == {"stopped"}
    there = record.path / "runs" / "stray"
    assert [Run(p).state for p in (here.path, there)] == ["stopped", "stopped"]
    assert Run(there).metrics() == here.metrics() == mine.metrics()
    host.close()


@needs_box
def test_box_that_does_not_answer_holds_nobody_up(box):
    world, record = (
        World(say=lambda text: None, every=0.1),
        type("R", (), dict(id="x", name="gpu", path=box.folder, terms=Terms(), state=type("S", (), dict(runs=[])))),
    )
    assert world.idle(record) is not None
    box.wire.black = True
    eye = world.eye(record)
    began = time.monotonic()
    assert world.runs(record) == [] and time.monotonic() - began < 30
    box.wire.black, box.wire.refuse = False, True
    box.wire.cut()
    until(lambda: eye.failed, "a failed look")
    box.wire.refuse = False
    until(lambda: not eye.failed, "a look")
    world.close()


def test_a_box_out_of_reach_is_not_in_use(home, monkeypatch):
    class Dead:
        def call(self, verb, **o):
            raise OSError("no route")

        def close(self):
            pass

    world = World(every=0.01, host_of=lambda name: Dead())
    record = type("R", (), dict(id="x", name="gpu", path=home, terms=Terms()))
    monkeypatch.setattr("nanogpt_nb.remote.world.IN_USE", 0.2)
    assert world.idle(record) is None
    first = until(lambda: world.idle(record), "a time without use")
    until(lambda: world.idle(record) > first, "a longer one")
    world.close()


def test_a_box_tells_of_any_number_of_runs_and_some_are_noted(home, monkeypatch):
    monkeypatch.setattr("nanogpt_nb.remote.world.MOST", 10)
    record = type("R", (), dict(id="x", name="gpu", path=home / "lease", state=type("S", (), dict(runs=[]))))
    for n in range(2):
        jobs = [dict(id=f"j{n}-{i}", state="running", run=f"/there/{n}/{'x' * 300}{i}") for i in range(20)]
        assert len(strays(record, dict(jobs=jobs))) <= 10
    assert 0 < len(list((home / "lease" / "runs").iterdir())) <= 10


# On the box


class Drips(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.paths.append(self.path)
        with contextlib.suppress(OSError):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            while not self.server.over.wait(0.05):
                self.wfile.write(b"a")


def test_box_guard_is_not_held_up_by_an_answer_that_drips(monkeypatch):
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Drips)
    web.paths, web.over, web.daemon_threads = [], threading.Event(), True
    threading.Thread(target=web.serve_forever, daemon=True).start()
    monkeypatch.setattr(there_guard, "LONGEST", 0.3)
    try:
        with pytest.raises(OSError, match="within"):
            there_guard.is_gone(there_guard.Service(KEY, f"http://127.0.0.1:{web.server_port}"), "a/../b?c")
        assert web.paths == ["/instances/a%2F..%2Fb%3Fc"]
    finally:
        web.over.set()
        web.shutdown()
        web.server_close()


@needs_box
@needs_proc
def test_guardian_on_the_box_ends_its_own_instance_and_shows_the_key_nowhere(box, cloud, home):
    host, record = Host("gpu"), lease(cloud, box_guard=True)
    id = cloud.rent(record)
    cloud.fail(Fault("POST /instance-operations/terminate", 1, "before"))
    for _ in range(2):
        assert (
            host.call("guard.begin", id="guard", key=KEY, instance=id, base_url=cloud.url, until=time.time() + 3600, every=0.2)["job"]
            == "guard"
        )
    ours = lambda: [p.pid for p in psutil.process_iter() if box_home(p, box)]
    log = box.home / ".nanogpt_nb/jobs/guard/log.txt"
    until(lambda: "gives itself back" in log.read_text(), "its first word")
    assert len(ours()) > 0 and where_key_shows(ours()) == [] and files_with_key(box.home) == []
    assert host.call("idle.look")["busy"] is None
    assert guards(record)["box"] is False
    tell_box(record, Eye(host))
    assert (
        guards(record)["box"] is True
        and abs(json.loads((box.home / ".nanogpt_nb/guard.json").read_text())["until"] - record.state.until) < 1
    )
    assert host.call("guard.extend", until=time.time() - 1)["alive"] is True
    until(lambda: cloud.status(id) == "terminated", "termination")
    assert len(cloud.asked("terminate")) >= 2
    until(lambda: host.call("jobs.status", id="guard")["state"] == "finished", "the end of the guardian there")
    assert "asked for (500)" in log.read_text() and KEY not in log.read_text()
    host.close()


def box_home(p, box) -> bool:
    try:
        return f"HOME={box.home}".encode() in Path(f"/proc/{p.pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


@pytest.mark.parametrize(
    "url", ["http://cloud.lambda.ai/api/v1", "ftp://127.0.0.1/", "http://127.0.0.1.evil.example/", "file:///etc/passwd"]
)
def test_box_guard_sends_the_key_to_no_other_place(url):
    with pytest.raises(there_guard.Trouble, match="https"):
        there_guard.checked(url)
