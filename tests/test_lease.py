"A lease from its first sentence to the ledger, against the rehearsal: a real service, real sshds, a real guardian in a process of its own."

import contextlib
import csv
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from box import contents, until, why_no_box

from nanogpt_nb.config import ConfigError
from nanogpt_nb.remote.address import entries
from nanogpt_nb.remote.agent import HostError
from nanogpt_nb.remote.bill import Money, wishes
from nanogpt_nb.remote.cloud import NoCapacity
from nanogpt_nb.remote.guardian import is_held, read
from nanogpt_nb.remote.hold import Held
from nanogpt_nb.remote.lease import attach, lease
from nanogpt_nb.remote.lease_folder import Record, records
from nanogpt_nb.remote.lease_state import instance_name
from nanogpt_nb.remote.ledger import down, gc, ledger, spent, to_end
from nanogpt_nb.remote.money import Terms, data_dir
from nanogpt_nb.remote.rehearsal import start_rehearsal, stop_rehearsal
from nanogpt_nb.remote.ssh import Host
from nanogpt_nb.remote.standing import running

pytestmark = pytest.mark.skipif(why_no_box() is not None, reason=why_no_box() or "")
WORD = "a-word-for-tests"


def kill_guardians():
    "End the guardians of the leases in the data folder: those that hold their lock now."
    for record in records():
        if is_held(record):
            with contextlib.suppress(OSError, KeyError):
                os.kill(read(record.path / "guardian.json")["pid"], signal.SIGKILL)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    "A rehearsal with a home and a data folder of its own, which tests can give faults."
    folder = tmp_path_factory.mktemp("lease")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder / "laptop"))
        patch.setenv("NANOGPT_NB_DATA", str(folder / "data"))
        for name in ("SSH_AUTH_SOCK", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "LAMBDA_API_KEY", "LAMBDA_API_URL"):
            patch.delenv(name, raising=False)
        (folder / "laptop").mkdir()
        try:
            yield start_rehearsal(boot=0.3, control=WORD)
        finally:
            kill_guardians()
            stop_rehearsal()


def told(service, **o) -> dict:
    "Set what a test wants of the rehearsal; what it says of itself."
    root = service.base_url.removesuffix("/api/v1")
    answer = httpx.post(f"{root}/control", json=o, headers={"X-Control": WORD, "Authorization": f"Bearer {service.key}"}, trust_env=False, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def alive(service) -> list:
    return [o for o in service.instances() if o.status not in ("terminated", "terminating")]


def asked(service, path: str) -> int:
    return sum(path in " ".join(map(str, line)) for line in told(service)["log"])


def test_from_the_first_sentence_to_the_ledger(service, capsys):
    launches = asked(service, "instance-operations/launch")
    with lease("rehearsal", budget=5, hours=1, name="gpu") as gpu:
        said = capsys.readouterr().out
        assert said.index("$3.29 at most") < said.index("asked for") < said.index("ssh gpu works now")
        home = subprocess.run(["ssh", "-F", Path.home() / ".ssh/nanogpt_nb.conf", "-o", "BatchMode=yes", "gpu", "echo $HOME"], capture_output=True, text=True, timeout=120).stdout.strip()
        assert gpu.run("echo $HOME").out.strip() == gpu.host.run("echo $HOME").out.strip() == home and "boxes" in home
        assert Host.of(gpu) is gpu.host
        (one,) = alive(service)
        assert gpu.state.current == one.id and one.name.startswith(f"nanogpt-{gpu.id}-until-")
        before = gpu.money()
        assert 0 < before.so_far <= 0.2 and before.per_hour == 3.29
        assert gpu.extend(budget=2, hours=1).budget == 7 and gpu.state.until > before.until + 1000
        capsys.readouterr()
        gpu.extend(hours=1)
        assert gpu.extend(hours=1).until == gpu.state.until and "its budget is the nearer limit" in capsys.readouterr().out
        again = lease("rehearsal", budget=6, hours=1, name="gpu").open()
        assert again.record == gpu.record and len(alive(service)) == 1
        assert "NOT applied (budget=6)" in capsys.readouterr().out
        assert [o.name for o in running(rehearsal=True)] == ["gpu"] and running(rehearsal=True)[0].known == "rehearsal"
        assert "Lambda Cloud was not asked: there is no key (nanogpt cloud login)." in repr(running())
    assert gpu.state.phase == "ended" and not alive(service) and "gpu" not in entries()
    assert asked(service, "instance-operations/launch") == launches + 1
    assert "its block ended" in capsys.readouterr().out
    bill = sum(told(service)["bill"][id]["dollars"] for id in gpu.state.instances)
    assert bill <= gpu.money().so_far <= bill + 0.06
    assert ledger() == [] and spent() == 0 and repr(running(rehearsal=True)) == "nothing runs"  # it was asked
    row = next(csv.DictReader(io.StringIO(ledger(rehearsals=True).to_csv())))
    assert row["name"] == "gpu" and float(row["dollars"]) == gpu.money().so_far and row["ended"] == "its block ended" and row["rehearsal"] == "True"
    assert round(gpu.money().so_far + gpu.money().left, 9) == gpu.money().budget and ledger(rehearsals=True).total(rehearsal=True) > 0
    until(lambda: not is_held(gpu.record), "the guardian to end by itself")
    with pytest.raises(HostError, match="has ended"):
        attach(gpu.id)


def test_an_exception_in_the_block_gives_it_back_and_is_told(service, capsys):
    with pytest.raises(ZeroDivisionError), lease("rehearsal:gpu_1x_a10", name="fails") as gpu:
        raise ZeroDivisionError
    assert gpu.state.phase == "ended" and gpu.state.reason == "its block ended with ZeroDivisionError" and not alive(service)
    assert "ZeroDivisionError ends the block" in capsys.readouterr().out
    assert [o.type for o in gpu.state.instances.values()] == ["gpu_1x_a10"]


def test_what_cannot_be_is_refused_before_anything_begins(service):
    before = len(records()), asked(service, "instance-operations/launch")
    for type, how, word in [
        ("rehearsal", dict(budget=0.1), "budget=0.1"),
        ("rehearsal", dict(budget=-1), "budget=-1"),
        ("rehearsal", dict(hours=0), "hours=0"),
        ("rehearsal", dict(name="a b"), "a b"),
        ("rehearsal:gpu_1x_h100", {}, "gpu_1x_h100_pcie"),
        (("rehearsal", "gpu_1x_a10"), {}, "mixes"),
        ((), {}, "names nothing"),
        (None, {}, "names nothing"),
    ]:
        with pytest.raises(ConfigError, match=word):
            lease(type, **how).open()
    with pytest.raises(HostError, match="has not begun"):
        lease("rehearsal").money()
    assert (len(records()), asked(service, "instance-operations/launch")) == before
    assert wishes(["rehearsal:gpu_1x_a10", "rehearsal"]) == (("gpu_1x_a10", "gpu_1x_h100_pcie"), True)


def test_where_there_is_none_nothing_is_left_and_only_the_error_is_told(service, capsys):
    told(service, faults=[dict(match="launch", times=50, kind="capacity")])
    try:
        with pytest.raises(NoCapacity, match="gpu_1x_a10.*--wait 60"):
            lease("rehearsal:gpu_1x_a10", name="none").open()
        with pytest.raises(ConfigError, match="no region"):
            lease("rehearsal:gpu_1x_a10", name="nowhere", regions="nowhere").open()
    finally:
        told(service, faults=[])
    said = capsys.readouterr().out
    assert "or by nanogpt cloud down" in said and "gone" not in said and "NoCapacity" not in said
    record = Record.find("none")
    assert record.state.phase == "ended" and record.state.reason == "no capacity" and record.state.spent(1e12) == 0
    assert [e.type for e in ledger(rehearsals=True, all=True) if e.name == "none"] == ["gpu_1x_a10"] and "none" not in {e.name for e in ledger(rehearsals=True)}


def test_ctrl_c_while_it_boots_is_told_in_words(service, capsys, monkeypatch):
    monkeypatch.setattr("nanogpt_nb.remote.order.Order.until_in", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        lease("rehearsal", name="early").open()
    record = Record.find("early")
    until(lambda: record.state.phase == "ended", "it to be given back")
    assert record.state.reason == "you stopped it while it booted" and record.state.instances and not alive(service)
    assert "KeyboardInterrupt" not in capsys.readouterr().out


def test_the_end_waits_for_a_look_at_the_box(service, monkeypatch):
    seen = []
    monkeypatch.setattr("nanogpt_nb.remote.hold.Held.ask_to_end", lambda self, why, *more: seen.append(why))
    held = Held(Terms("gpu_1x_a10", alias="seen"), service, quiet=True)
    held.record = Record.create(held.terms, clock=service.time)
    for kind, facts in dict(asking=dict(name="n", cents=129), launched=dict(id="a"), status=dict(id="a", status="active"), ready={}).items():
        held.record.note(kind, **facts)
    held.look_after = lambda: None
    held.world = SimpleNamespace(idle=lambda record: seen.append("look") or (0.0 if len(seen) > 1 else None))
    held.end()
    assert seen == ["look", "look", "asked for"]
    held.record.note("end", why="over"), held.record.note("gone", id="a"), held.record.note("ended")


def test_a_laptop_that_is_shut_is_told_of(service):
    paid = Held(Terms("gpu_1x_a10", alias="gpu"))
    paid.record = Record.create(paid.terms)
    assert "while this machine is on" in paid.how_to_look() and "nanogpt cloud gc" in paid.how_to_look()
    paid.terms = Terms("gpu_1x_a10", alias="gpu", box_guard=True)
    assert "while this machine is on" not in paid.how_to_look()
    paid.record.note("end", why="over"), paid.record.note("ended")


def test_no_guardian_no_launch(service, monkeypatch):
    launches = asked(service, "instance-operations/launch")
    monkeypatch.setattr("nanogpt_nb.remote.guardian.begin", lambda *_: "")
    with pytest.raises(HostError, match="guardian of the lease"):
        lease("rehearsal", name="unguarded", quiet=True).open()
    assert Record.find("unguarded").state.phase == "ended" and asked(service, "instance-operations/launch") == launches


OPENS = """
import os, sys
from nanogpt_nb.remote.lease import lease
with lease("rehearsal", name=sys.argv[1]) as gpu:
    print("open", flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def another(name: str, code: str = OPENS):
    "A process that has a lease open."
    p = subprocess.Popen([sys.executable, "-c", code, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = []
    reader = threading.Thread(target=lambda: said.extend(iter(p.stdout.readline, "")), daemon=True)
    reader.start()
    try:
        until(lambda: "open\n" in said or p.poll() is not None, "the lease to be open", 240)
        assert p.poll() is None, "".join(said)
        yield p, said
    finally:
        p.kill()
        p.wait()
        reader.join()
        p.stdin.close()
        p.stdout.close()


@pytest.mark.slow
def test_sigterm_leaves_the_rest_to_the_guardian(service):
    with another("ended") as (p, said):
        record = Record.find("ended")
        p.send_signal(signal.SIGTERM)
        assert p.wait(120) == 128 + signal.SIGTERM
        assert record.state.asked_to_end and record.state.reason == "the process that rented it ended"
        until(lambda: record.state.phase == "ended", "the guardian to give it back", 240)
    assert not alive(service)


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_the_rest_to_the_guardian(service):
    with another("killed") as (p, said):
        record = Record.find("killed")
        p.kill()
        until(lambda: record.state.phase == "ended", "the guardian to give it back, after the two minutes for which a box counts as used", 480)
    assert not alive(service) and "gone" in record.state.reason


@pytest.mark.slow
def test_a_process_that_ends_without_a_block_leaves_it(service):
    with another("left", OPENS.replace("with lease", "gpu = lease").replace(" as gpu:", ".open()").replace("\n    ", "\n")) as (p, said):
        record = Record.find("left")
        p.communicate("\n", timeout=240)
        assert p.returncode == 0 and record.state.left
        until(lambda: record.state.phase == "ended", "the guardian to give it back", 240)
    assert not alive(service)


@pytest.mark.slow
def test_one_that_is_kept_is_found_again_and_ended_by_name(service, capsys):
    lease("rehearsal", name="kept", idle=0).open().keep()
    record = Record.find("kept")
    kill = read(record.path / "guardian.json")["pid"]
    os.kill(kill, signal.SIGKILL)
    until(lambda: not is_held(record), "the guardian to be gone")
    assert gc(service).failed == 0 and is_held(record) and record.state.phase == "ready"
    with lease("rehearsal", name="kept") as gpu:
        assert gpu.record == record and len(alive(service)) == 1
        gpu.keep()
        assert to_end()[0].record == record and "kept" in to_end()[0].what()
        assert isinstance(down("kept"), Money)
    assert record.state.phase == "ended" and record.state.reason == "nanogpt cloud down" and not alive(service)


@pytest.mark.slow
def test_one_that_another_machine_forgot_is_swept_up(service):
    key = service.ssh_keys()[0].name
    lost = service.launch("gpu_1x_a10", "us-east-1", key, instance_name("251101-0900-abcd", service.time() - 86400))
    other = service.launch("gpu_1x_a10", "us-east-1", key, "colleague")
    swept = gc(service)
    assert {o.name: o.what for o in swept if o.status != "terminated"}["colleague"] == "unknown" and [o.what for o in swept].count("ended") == 1 and not swept.failed
    assert [o.id for o in alive(service)] == [other] and service.instance(lost).status == "terminated"
    assert [o.known for o in running(cloud=service)] == ["not rented by nanogpt"]
    service.terminate(other)


def test_no_secret_is_in_what_a_lease_leaves(service):
    texts = [data for _, data in contents(data_dir() / "leases")]
    assert texts and not any(service.key.encode() in t or b"PRIVATE KEY" in t for t in texts)
    seen = []
    for p in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            seen.append((p / "cmdline").read_bytes())
            seen.append((p / "environ").read_bytes())
    assert len(seen) > 2 and not any(service.key.encode() in w for w in seen)
