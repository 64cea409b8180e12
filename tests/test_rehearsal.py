"The rehearsal: a service that speaks Lambda's API, and machines that are sshds of this machine."

import base64
import contextlib
import http.server
import json
import math
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import psutil
import pytest
from box import free_port, make_key, remove, until, why_no_box
from hypothesis import given, settings
from hypothesis import strategies as st
from openapi import odd

from nanogpt_nb.config import ConfigError
from nanogpt_nb.remote import rehearsal, rehearsal_boxes
from nanogpt_nb.remote.cloud import Unreachable
from nanogpt_nb.remote.guarding import is_of, rehearses
from nanogpt_nb.remote.host_key import user_data
from nanogpt_nb.remote.lambda_cloud import LambdaCloud
from nanogpt_nb.remote.money import Terms
from nanogpt_nb.remote.rehearsal_boxes import Boxes, greets, processes
from nanogpt_nb.remote.rehearsal_machine import MACHINE_FAULTS, Machine, charge
from nanogpt_nb.remote.rehearsal_stock import offers
from nanogpt_nb.remote.rehearsed import Fault, NoAnswer, Service, transport

needs_box = pytest.mark.skipif(why_no_box() is not None, reason=why_no_box() or "")
PUBLIC = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBzyOUnkX8yj1kFtE2IZQbFfNlFJbnCAN5Nn9bXUFvYi"
WISH = dict(instance_type_name="gpu_1x_h100_pcie", region_name="us-east-1", ssh_key_names=["laptop"], name="mine")
LAUNCH, TERMINATE, RESTART = (f"/instance-operations/{verb}" for verb in ("launch", "terminate", "restart"))


class Clock:
    simulated = True

    def __init__(self):
        self.now = 1_800_000_000.0

    def time(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Asked:
    "Asks a service of its own."

    def __init__(self, **o):
        self.clock = Clock()
        self.service = Service(self.clock, **o)
        self("POST", "/ssh-keys", dict(name="laptop", public_key=PUBLIC))

    def __call__(self, method, path, o=None, good=False):
        "Status and answer; with `good`, the request is to be as the description says."
        with contextlib.nullcontext() if good else odd("request", "the service is to refuse it"):
            status, headers, content = self.service.handle(
                method, "/api/v1" + path, {"Authorization": "Bearer rehearsal"}, b"" if o is None else json.dumps(o)
            )
        assert "Date" in headers
        return status, json.loads(content)

    def launch(self, **o):
        return self("POST", LAUNCH, WISH | o, good=True)[1]["data"]["instance_ids"][0]

    def look(self, id):
        status, answer = self("GET", f"/instances/{id}")
        return answer["data"] if status == 200 else None

    def names(self):
        return [m["name"] for m in self("GET", "/instances")[1]["data"]]


# The service


def test_a_machine_boots_is_active_ends_and_is_forgotten():
    ask = Asked(boot=180, ending=30, linger=60)
    id = ask.launch(tags=[dict(key="nanogpt-lease", value="a")])
    assert (ask.look(id)["status"], "ip" in ask.look(id)) == ("booting", False)
    ask.clock.now += 180
    one = ask.look(id)
    assert (one["status"], one["tags"], bool(one["ip"])) == ("active", [dict(key="nanogpt-lease", value="a")], True)
    ask("POST", TERMINATE, dict(instance_ids=[id]), good=True)
    assert ask.look(id)["status"] == "terminating"
    ask.clock.now += 30
    assert ask.look(id)["status"] == "terminated"
    ask.clock.now += 60
    assert ask.look(id) is None and ask.names() == []
    assert ask("POST", TERMINATE, dict(instance_ids=[id]))[0] == 404


@pytest.mark.parametrize("seconds, minutes", [(0, 1), (1, 1), (60, 1), (61, 2), (3600, 60), (3600.5, 61)])
def test_every_minute_that_was_begun_is_billed(seconds, minutes):
    m = Machine("0" * 32, "", offers()["gpu_1x_a10"], "us-west-1", {}, 0.0)
    for moment, status in ((0, "booting"), (100, "active"), (100 + seconds, "terminated")):
        m.become(status, moment)
    assert charge(m, 10**6)["minutes"] == minutes
    assert charge(m, 10**6)["dollars"] == pytest.approx(1.29 * minutes / 60, abs=1e-4)


def test_the_bill_runs_while_nobody_looks_and_booting_costs_nothing():
    ask = Asked(boot=180)
    used, unused = ask.launch(), ask.launch(name="unused")
    ask("POST", TERMINATE, dict(instance_ids=[unused]))
    ask.clock.now += 180 + 8 * 3600
    bill = ask.service.bill()
    assert (bill[used]["minutes"], bill[unused]["minutes"]) == (480, 0)
    assert ask.service.spent() == pytest.approx(3.29 * 8)


@pytest.mark.parametrize(
    "wish, status, code",
    [
        (dict(ssh_key_names=[]), 400, "global/invalid-parameters"),
        (dict(ssh_key_names=["laptop", "laptop"]), 400, "global/invalid-parameters"),
        (dict(ssh_key_names=["nobody's"]), 404, "global/object-does-not-exist"),
        (dict(instance_type_name="gpu_9x_z80"), 404, "global/object-does-not-exist"),
        (dict(region_name="moon"), 404, "global/object-does-not-exist"),
        (dict(region_name="us-west-1"), 400, "instance-operations/launch/insufficient-capacity"),
        (dict(name="x" * 65), 400, "global/invalid-parameters"),
        (dict(hostname="Not A Host"), 400, "global/invalid-parameters"),
        (dict(tags=[dict(key="Upper", value="")]), 400, "global/invalid-parameters"),
        (dict(tags=[dict(key="nanogpt", value="x" * 129)]), 400, "global/invalid-parameters"),
        (dict(user_data="x" * 1_000_001), 400, "global/invalid-parameters"),
        (dict(file_system_names=["nothing"]), 404, "global/object-does-not-exist"),
        (dict(image=dict(family="windows")), 404, "global/object-does-not-exist"),
        (dict(file_system_mounts=7), 400, "global/invalid-parameters"),
    ],
)
def test_a_launch_that_cannot_be_is_refused_and_makes_nothing(wish, status, code):
    ask = Asked()
    said, answer = ask("POST", LAUNCH, WISH | wish)
    assert (said, answer["error"]["code"]) == (status, code)
    assert ask.names() == []


def test_file_systems_rule_the_region_and_are_in_use():
    ask = Asked()
    disk = ask("POST", "/filesystems", dict(name="texts", region="us-east-1"), good=True)[1]["data"]
    assert ask("POST", LAUNCH, WISH | dict(region_name="us-west-3", file_system_names=["texts"]))[1]["error"]["code"].endswith(
        "file-system-in-wrong-region"
    )
    id = ask.launch(file_system_names=["texts"])
    assert ask.look(id)["file_system_mounts"] == [dict(mount_point="/lambda/nfs/texts", file_system_id=disk["id"])]
    assert ask("DELETE", f"/filesystems/{disk['id']}")[1]["error"]["code"] == "filesystems/filesystem-in-use"
    ask("POST", TERMINATE, dict(instance_ids=[id]))
    assert ask("DELETE", f"/filesystems/{disk['id']}")[0] == 200


def test_keys_accounts_quota_and_what_is_not_there():
    ask = Asked()
    handle = ask.service.handle
    basic = {"authorization": "Basic " + base64.b64encode(b"rehearsal:").decode()}
    assert handle("GET", "/instances", basic)[0] == 200
    assert [handle("GET", "/instances", h)[0] for h in ({}, {"Authorization": "Bearer guessed"}, {"Authorization": "Basic !"})] == [401] * 3
    assert (ask("PUT", "/instances")[0], ask("GET", "/no/such/thing")[0], ask("GET", "/tickets/1")[0]) == (405, 404, 404)
    ask.service.quota = 0
    assert ask("POST", LAUNCH, WISH)[1]["error"]["code"] == "global/quota-exceeded"
    ask.service.account = "inactive"
    assert ask("GET", "/instances")[1]["error"]["code"] == "global/account-inactive"


def test_restart_and_rename():
    ask = Asked(boot=10)
    id = ask.launch()
    assert ask("POST", RESTART, dict(instance_ids=[id]))[0] == 409
    ask.clock.now += 10
    assert ask("POST", RESTART, dict(instance_ids=[id]))[1]["data"]["restarted_instances"][0]["status"] == "booting"
    assert ask("POST", f"/instances/{id}", dict(name="other"), good=True)[1]["data"]["name"] == "other"
    ask.clock.now += 60
    assert (ask.names(), ask.service.bill()[id]["minutes"]) == (["other"], 1)


def test_too_fast_is_429_with_the_seconds_to_wait():
    ask = Asked(pace=True)
    status, headers, _ = ask.service.handle("GET", "/instances", {"Authorization": "Bearer rehearsal"})
    assert (status, headers["Retry-After"]) == (429, "1")
    ask.clock.now += 20
    assert ask("POST", LAUNCH, WISH)[0] == 200
    ask.clock.now += 2
    assert ask("POST", LAUNCH, WISH)[0] == 429
    ask.clock.now += 12
    assert ask("GET", "/instances")[0] == 200


# What goes wrong


@pytest.mark.parametrize(
    "kind, made",
    [
        ("before", 0),
        ("after", 1),
        ("garbage", 1),
        ("timeout_before", 0),
        ("timeout_after", 1),
        ("dropped", 1),
        ("dropped_before", 0),
        ("refused", 0),
        ("429", 0),
    ],
)
def test_a_launch_goes_wrong_before_or_after_its_effect(kind, made):
    ask = Asked()
    ask.service.faults.append(Fault("POST .*launch", times=1, kind=kind, status=502, retry_after="7"))
    before, said = ask.clock.now, None
    with httpx.Client(
        transport=transport(ask.service), base_url="http://127.0.0.1/api/v1", headers={"Authorization": "Bearer rehearsal"}, timeout=5
    ) as client:
        try:
            answer = client.post(LAUNCH, json=WISH)
            said = answer.status_code if "html" not in answer.text else "garbage"
        except httpx.TransportError as e:
            said = type(e)
        assert client.post(LAUNCH, json=WISH).status_code == 200
    errors = dict(
        timeout_before=httpx.ReadTimeout,
        timeout_after=httpx.ReadTimeout,
        dropped=httpx.RemoteProtocolError,
        dropped_before=httpx.RemoteProtocolError,
        refused=httpx.ConnectError,
    )
    assert said == errors.get(kind, 429 if kind == "429" else kind if kind == "garbage" else 502)
    assert ask.clock.now - before == (5 if "timeout" in kind else 0)
    assert len(ask.names()) == made + 1


def test_faults_of_the_machine():
    ask, told = Asked(boot=10), {}
    for kind in MACHINE_FAULTS:
        ask.service.faults.append(Fault("launch", times=1, kind=kind, seconds=100))
        told[kind] = ask.launch(name=kind)
    ask.clock.now += 11
    assert {kind: ask.look(id)["status"] for kind, id in told.items()} == dict.fromkeys(MACHINE_FAULTS, "active") | dict(
        unhealthy="unhealthy", stuck="booting"
    )
    assert "ip" not in ask.look(told["late"])
    ask.clock.now += 110
    assert "ip" in ask.look(told["late"]) and ask.look(told["vanishes"]) is None
    assert [ask.look(told[kind])["status"] for kind in ("stuck", "sick", "preempted")] == ["booting", "unhealthy", "preempted"]
    bill = ask.service.bill()
    assert [bill[told[kind]]["minutes"] for kind in ("unhealthy", "stuck", "vanishes", "preempted", "sick")] == [0, 0, 2, 2, 2]


def test_terminate_that_does_not_take_and_lists_that_lag():
    ask = Asked(boot=0, ending=10)
    ask.service.faults += [Fault("terminate", times=1, kind="keeps"), Fault("GET /instances$", times=None, kind="lags", seconds=30)]
    id = ask.launch()
    assert (ask.names(), ask.look(id)["status"]) == ([], "active")
    assert ask("POST", TERMINATE, dict(instance_ids=[id]))[1]["data"]["terminated_instances"][0]["status"] == "terminating"
    assert ask.look(id)["status"] == "active"
    ask("POST", TERMINATE, dict(instance_ids=[id]))
    assert ask.look(id)["status"] == "terminating"
    ask.clock.now += 20
    assert ask.names() == []
    ask.clock.now += 15
    assert [m["status"] for m in ask("GET", "/instances")[1]["data"]] == ["terminating"]


def test_fields_and_a_status_that_no_description_has():
    ask = Asked()
    id = ask.launch()
    ask.service.faults += [Fault("instances", times=1, kind="fields"), Fault("instances", times=1, kind="status", value="migrating")]
    answer = json.loads(ask.service.handle("GET", f"/instances/{id}", {"Authorization": "Bearer rehearsal"})[2])["data"]
    assert answer["status"] == "migrating" and "novelty" in answer
    assert ask.look(id)["status"] == "booting"


KINDS = ("before", "after", "capacity", "keeps", "429", "timeout_before", "timeout_after", "dropped", *MACHINE_FAULTS)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(("launch", "launch", "terminate", "restart", "rename", "list", "look", "wait", "fault", "key", "disk")),
        st.integers(0, 200),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_whatever_is_asked_in_whatever_order_is_answered_as_described(steps):
    ask, ids, spent = Asked(boot=20, ending=5, linger=30), ["0" * 32], 0.0
    for verb, n in steps:
        id = ids[n % len(ids)]
        try:
            if verb == "wait":
                ask.clock.now += n
            if verb == "fault":
                ask.service.faults.append(Fault("", times=n % 3 + 1, kind=KINDS[n % len(KINDS)], seconds=n, skip=n % 2))
            if verb == "launch":
                status, answer = ask("POST", LAUNCH, WISH | (dict(file_system_names=["texts"]) if n % 4 == 0 else {}), good=True)
                ids += answer["data"]["instance_ids"] if status == 200 else []
            if verb in ("terminate", "restart"):
                ask("POST", f"/instance-operations/{verb}", dict(instance_ids=[id]), good=True)
            if verb == "rename":
                ask("POST", f"/instances/{id}", dict(name=f"name {n}"), good=True)
            if verb == "look":
                ask("GET", f"/instances/{id}")
            if verb == "list":
                ask("GET", ("/instances", "/instance-types", "/regions", "/images", "/ssh-keys", "/file-systems")[n % 6])
            if verb == "key":
                ask("POST", "/ssh-keys", dict(name=f"key {n}", public_key=PUBLIC), good=True)
            if verb == "disk":
                ask("POST", "/filesystems", dict(name="texts", region=("us-east-1", "us-west-1")[n % 2]), good=True)
        except NoAnswer as e:
            assert str(e) in ("timeout", "dropped")
        now = ask.service.spent()
        assert now >= spent
        spent = now
    for m in ask.service.machines.values():
        assert [since for since, _ in m.past] == sorted(since for since, _ in m.past)
        assert m.past[0][1] == "booting" and (m.ended is None) == (m.past[-1][1] not in ("terminated", "preempted"))
        if m.began is not None and m.ended is not None:
            assert ask.service.bill()[m.id]["minutes"] == max(1, math.ceil((m.ended - m.began) / 60))


# The boxes


def test_without_an_ssh_server_it_is_said_how_to_get_one(monkeypatch):
    monkeypatch.setattr(rehearsal_boxes.shutil, "which", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="apt-get install openssh-server"):
        rehearsal_boxes.sshd()


class Laptop:
    "A key, a pinned host key, and ssh to a box."

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        make_key(folder / "key")
        make_key(folder / "host")
        self.public = (folder / "key.pub").read_text().strip()
        self.user_data = user_data((folder / "host").read_text(), "")

    def pin(self, port: int):
        self.port = port
        (self.folder / "known").write_text(f"[127.0.0.1]:{port} {(self.folder / 'host.pub').read_text()}")

    def options(self):
        return [
            "-F",
            "none",
            "-i",
            str(self.folder / "key"),
            "-o",
            f"UserKnownHostsFile={self.folder / 'known'}",
            "-o",
            "GlobalKnownHostsFile=/dev/null",
            "-o",
            "BatchMode=yes",
        ]

    def ssh(self, command: str):
        return subprocess.run(
            ["ssh", *self.options(), "-p", str(self.port), "127.0.0.1", command],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=240,
        )


def machine(id, laptop, **o):
    return Machine(
        id * 32,
        "one",
        offers()["gpu_1x_a10"],
        "us-west-1",
        dict(name="laptop", public_key=laptop.public),
        0.0,
        user_data=laptop.user_data,
        **o,
    )


@pytest.fixture
def boxes(tmp_path):
    boxes = Boxes(tmp_path / "a 100%h folder" / "rehearsal", swap=1.0)
    yield boxes
    for id in list(boxes.up):
        boxes.destroy(id)


@needs_box
def test_a_box_shows_another_key_first_and_then_the_one_it_was_given(boxes, tmp_path):
    laptop, boxes.swap = Laptop(tmp_path / "laptop"), 600.0
    laptop.pin(boxes.boot(machine("1", laptop))["ssh_port"])
    first, timer = laptop.ssh("true"), boxes.up["1" * 32]["timer"]
    assert first.returncode == 255 and "REMOTE HOST IDENTIFICATION HAS CHANGED" in first.stderr and timer.is_alive()
    timer.function(*timer.args)  # it is time
    said = until(
        lambda: (done := laptop.ssh("pwd; echo $NANOGPT_NB_REHEARSAL; command -v python; env")).returncode == 0 and done.stdout,
        "the pinned key",
    ).splitlines()
    assert said[:2] == [str(boxes.box("1" * 32) / "home"), "1"]
    assert said[2].startswith(str(Path(sys.executable).parent))
    assert stat.S_IMODE((boxes.box("1" * 32) / "host_key").stat().st_mode) == 0o600


@needs_box
def test_a_box_ends_with_all_that_runs_on_it_and_only_that(boxes, tmp_path):
    laptop, disk = Laptop(tmp_path / "laptop"), dict(name="texts")
    laptop.user_data = ""
    one, other = (boxes.boot(machine(id, laptop, file_systems=[disk])) for id in "12")
    (tmp_path / "laptop" / "host.pub").write_text((boxes.box("1" * 32) / "first_key.pub").read_text())
    laptop.pin(one["ssh_port"])
    done = laptop.ssh("setsid nohup sleep 600 >/dev/null 2>&1 & echo kept > lambda/nfs/texts/result; echo $HOME")
    home = done.stdout.strip()
    until(lambda: [p.name() for p in processes(home)] == ["sleep"], "the program that it runs")
    copied = subprocess.run(
        ["rsync", "-e", " ".join(f"'{o}'" for o in ["ssh", *laptop.options(), "-p", str(laptop.port)]), __file__, "127.0.0.1:relative/"],
        capture_output=True,
        text=True,
    )
    assert copied.returncode == 0, copied.stderr
    assert Path(home, "relative", Path(__file__).name).read_bytes() == Path(__file__).read_bytes()
    boxes.destroy("1" * 32)
    assert processes(home) == [] and not greets(one["ssh_port"]) and not Path(home).exists()
    assert greets(other["ssh_port"])
    assert Path(boxes.disk("texts"), "result").read_text() == "kept\n"


@needs_box
def test_a_restart_ends_what_runs_and_keeps_the_disk(boxes, tmp_path):
    laptop = Laptop(tmp_path / "laptop")
    laptop.pin(boxes.boot(machine("1", laptop))["ssh_port"])
    until(lambda: laptop.ssh("touch here; setsid nohup sleep 600 >/dev/null 2>&1 &").returncode == 0, "the pinned key")
    boxes.restart("1" * 32)
    assert laptop.ssh("ls").stdout == "here\n" and not any(p.name() == "sleep" for p in processes(str(boxes.box("1" * 32) / "home")))


@needs_box
def test_a_taken_port_ends_no_box(boxes, tmp_path, monkeypatch):
    laptop = Laptop(tmp_path / "laptop")
    laptop.user_data = ""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        gone = taken.getsockname()[1]
        ports = iter([gone, free_port()])
        monkeypatch.setattr(rehearsal_boxes, "free_port", lambda: next(ports))
        port = boxes.boot(machine("1", laptop))["ssh_port"]
    up = boxes.up["1" * 32]
    assert port != gone and greets(port)
    up["process"].kill()
    up["process"].wait()
    refused = lambda: (boxes.box("1" * 32) / "sshd.log").read_text().count("Cannot bind any address")
    with socket.create_server(("127.0.0.1", port)) as taken:
        late = threading.Thread(target=lambda: (until(lambda: refused() >= 2, "a second refusal"), taken.close()))
        late.start()
        boxes.start("1" * 32, "first_key")
        late.join()
    assert greets(port) and up["process"].poll() is None and up["port"] == port


# The process


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGPT_NB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path / "laptop"))
    yield tmp_path / "data" / "rehearsal"
    rehearsal.stop_rehearsal()


def launched(cloud, laptop):
    cloud.add_ssh_key("laptop", laptop.public)
    id = cloud.launch("gpu_1x_a10", "us-west-1", "laptop", "mine", user_data=laptop.user_data)
    until(lambda: cloud.instance(id).status == "active", "the machine")
    return id


@needs_box
def test_it_outlives_who_began_it_is_found_again_and_ends(data, tmp_path):
    code = "from nanogpt_nb.remote.rehearsal import start_rehearsal; print(start_rehearsal(boot=0.3).base_url)"
    url = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    cloud = rehearsal.start_rehearsal()
    assert cloud.base_url == url and cloud.is_rehearsal
    id = launched(cloud, Laptop(tmp_path / "mine"))
    assert cloud.instance(id).more["ssh_port"] and "gpu_1x_a10" in rehearsal.rehearsal()
    cloud.terminate(id)
    until(lambda: cloud.instance(id).status == "terminated", "the end of the machine")
    pid = json.loads((data / "service.json").read_text())["pid"]
    assert rehearsal.stop_rehearsal() and not rehearsal.stop_rehearsal()
    until(lambda: not psutil.pid_exists(pid), "the end of the process")
    assert rehearsal.rehearsal() == "No rehearsal runs on this machine."


@needs_box
def test_killed_it_leaves_a_box_that_the_next_one_ends(data, tmp_path):
    cloud = rehearsal.start_rehearsal(boot=0.3)
    id, told = launched(cloud, Laptop(tmp_path / "mine")), json.loads((data / "service.json").read_text()) | dict(key=cloud.key)
    port = cloud.instance(id).more["ssh_port"]
    os.kill(told["pid"], signal.SIGKILL)
    until(lambda: rehearsal.rehearsal().startswith("No"), "its end")
    assert greets(port)
    again = rehearsal.start_rehearsal(boot=0.3)
    assert again.key != told["key"] and not greets(port) and list(again.instances()) == []
    assert (cloud.instances(), cloud.base_url, cloud.key) == ([], again.base_url, again.key), "the client of before meets the new one"
    assert [k.name for k in again.ssh_keys()] == ["laptop"]


@needs_box
def test_idle_it_ends_by_itself_and_its_key_is_nowhere_but_in_its_file(data):
    cloud = rehearsal.start_rehearsal(idle=5.0, control="open sesame")
    pid = json.loads((data / "service.json").read_text())["pid"]
    process = psutil.Process(pid)
    seen = " ".join(process.cmdline()) + repr(process.environ())
    assert cloud.key not in seen and "open sesame" not in seen
    until(lambda: not psutil.pid_exists(pid), "its end")
    holds = [p.name for p in data.rglob("*") if p.is_file() and cloud.key.encode() in p.read_bytes()]
    assert holds == ["key"] and stat.S_IMODE((data / "key").stat().st_mode) == 0o600


@needs_box
def test_faults_are_set_only_with_the_word_it_was_started_with(data):
    cloud = rehearsal.start_rehearsal(control="open sesame")
    url, o = (
        cloud.base_url.removesuffix("/api/v1") + "/control",
        dict(faults=[dict(match="GET /regions", times=1, kind="before", status=503)], ahead=7200),
    )
    before = cloud.time()
    refused = httpx.post(url, json=o, headers={"X-Control": "guessed", "Authorization": f"Bearer {cloud.key}"}, trust_env=False, timeout=120)
    done = httpx.post(url, json=o, headers={"X-Control": "open sesame"}, trust_env=False, timeout=120)
    assert (refused.status_code, done.status_code, done.json()["waiting"]) == (404, 200, ["before"])
    assert [r.name for r in cloud.regions()] and cloud.time() - before >= 7000
    assert httpx.post(url, json={}, headers={"X-Control": "open sesame"}, trust_env=False, timeout=120).json()["waiting"] == []


@needs_box
def test_two_that_begin_at_once_get_one(data):
    code = "from nanogpt_nb.remote.rehearsal import start_rehearsal; print(start_rehearsal().base_url)"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    urls = {p.communicate(timeout=240)[0].strip() for p in both}
    assert len(urls) == 1 and urls == {rehearsal.start_rehearsal().base_url}
    ours = lambda p: str(data) in " ".join(_cmdline(p)) and "nanogpt_nb.remote.rehearsal" in " ".join(_cmdline(p))
    until(lambda: len([p for p in psutil.process_iter() if ours(p)]) == 1, "one alone")


def _cmdline(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


class Squatter(http.server.ThreadingHTTPServer):
    "Listens where a rehearsal listened, and answers everything with a kind word."

    def __init__(self, port=0):
        seen = self.seen = []

        class Door(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                seen.append((self.path, self.headers.get("Authorization")))
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(dict(data=[], proof="0" * 64, pid=1, bill={})).encode())

            do_POST = do_GET

        super().__init__(("127.0.0.1", port), Door)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


def squatting(port):
    try:
        return Squatter(port)
    except OSError:
        return None


@needs_box
def test_whoever_listens_where_it_listened_gets_no_key(data):
    cloud = rehearsal.start_rehearsal()
    told = json.loads((data / "service.json").read_text())
    os.kill(told["pid"], signal.SIGKILL)
    until(lambda: not rehearsal.at_work(data), "its end")
    with until(lambda: squatting(int(told["url"].split(":")[2].split("/")[0])), "a free port") as squatter:
        assert rehearsal.rehearsal().startswith("No rehearsal") and not rehearsal.stop_rehearsal()
        cloud.waits = ()
        with pytest.raises(Unreachable, match="nanogpt cloud rehearsal"):
            cloud.instances()
        again = rehearsal.start_rehearsal()
        assert again.key != cloud.key and list(again.instances()) == []
        assert squatter.seen == []


@needs_box
def test_a_server_that_does_not_know_the_key_is_told_nothing(data):
    cloud = rehearsal.start_rehearsal()
    with Squatter() as squatter:
        told = json.loads((data / "service.json").read_text())
        (data / "service.json").write_text(json.dumps(told | dict(url=f"http://127.0.0.1:{squatter.server_port}/api/v1")))
        cloud.waits = ()
        with pytest.raises(Unreachable):
            cloud.instances()
        assert rehearsal.rehearsal().startswith("No rehearsal")
        assert squatter.seen and {key for _, key in squatter.seen} == {None}
        (data / "service.json").write_text(json.dumps(told))
    assert list(cloud.instances()) == []


@needs_box
def test_a_page_in_a_browser_is_turned_away(data):
    cloud = rehearsal.start_rehearsal()
    good = {"Authorization": f"Bearer {cloud.key}"}
    for more, status in (({}, 200), ({"Host": "evil.example"}, 403), ({"Origin": "http://evil.example"}, 403)):
        assert httpx.get(f"{cloud.base_url}/instances", headers=good | more, trust_env=False, timeout=120).status_code == status


def test_a_folder_that_sshd_cannot_read_is_refused_at_once(monkeypatch, tmp_path):
    for sign in '"', "\n", "\x1b":
        monkeypatch.setenv("NANOGPT_NB_DATA", str(tmp_path / f"d{sign}t"))
        with pytest.raises(ConfigError, match="NANOGPT_NB_DATA"):
            rehearsal.start_rehearsal()
    assert list(tmp_path.iterdir()) == []


def test_only_the_word_is_a_rehearsal():
    told = [Terms("gpu_1x_a10", base_url=url) for url in ("rehearsal", "http://127.0.0.1:8000/api/v1", "http://localhost/api/v1", None)]
    assert [rehearses(t) for t in told] == [True, False, False, False]
    gateway = LambdaCloud("secret", base_url="http://127.0.0.1:8000/api/v1")
    assert not gateway.is_rehearsal and gateway.pace and "127.0.0.1" in gateway.where and not is_of(told[0], gateway) and is_of(told[1], gateway)


@needs_box
def test_it_ends_with_its_folder(data, tmp_path):
    cloud = rehearsal.start_rehearsal(boot=0.1)
    port = cloud.instance(launched(cloud, Laptop(tmp_path / "mine"))).more["ssh_port"]
    pid = json.loads((data / "service.json").read_text())["pid"]
    remove(data)
    until(lambda: not psutil.pid_exists(pid), "its end")
    assert not greets(port)
