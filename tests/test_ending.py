"What is done where a guardian, the folder of a lease or the service fails: nothing goes on costing without a word."

import contextlib
import os
import signal
import time
from types import SimpleNamespace

import pytest
from box import until, why_no_box

from nanogpt_nb.cli_cloud import guard
from nanogpt_nb.cli_cloud_args import CloudGuardArgs
from nanogpt_nb.config import ConfigError, NanoGPTConfig
from nanogpt_nb.journey import trouble, wait_there
from nanogpt_nb.remote import hold
from nanogpt_nb.remote.ending import Progress, unreadable
from nanogpt_nb.remote.follower import alone, follows_another, main, start_following
from nanogpt_nb.remote.guardian import is_held, read
from nanogpt_nb.remote.landing import note_remote
from nanogpt_nb.remote.lease import Lease
from nanogpt_nb.remote.lease_folder import Record
from nanogpt_nb.remote.ledger import down
from nanogpt_nb.remote.money import Terms, data_dir
from nanogpt_nb.remote.rehearsal import start_rehearsal, stop_rehearsal
from nanogpt_nb.remote.world import this_process
from nanogpt_nb.rented import find_fault
from nanogpt_nb.runs import Run

real = pytest.mark.skipif(why_no_box() is not None, reason=why_no_box() or "")


@pytest.fixture
def desk(tmp_path, monkeypatch):
    "A folder of one's own for leases and runs."
    for name, value in dict(HOME=tmp_path / "home", NANOGPT_NB_DATA=tmp_path / "data").items():
        monkeypatch.setenv(name, str(value))
    for name in ("SSH_AUTH_SOCK", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "LAMBDA_API_KEY", "LAMBDA_API_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    return tmp_path


class Cloud:
    "A service with one instance, which ends when it is told to."

    key, base_url, is_rehearsal = "k", "https://cloud.lambda.ai/api/v1", True

    def __init__(self):
        self.clock = SimpleNamespace(monotonic=time.monotonic, time=time.time, sleep=lambda s: None)
        self.box = SimpleNamespace(id="a", name="n", status="active", tags={})

    def time(self):
        return 2000.0

    def instances(self):
        return [self.box]

    def terminate(self, id):
        self.box.status = "terminated"


def held_of(cloud, guarded=True, **terms) -> Lease:
    "A lease that stands as ready, on a service made by hand."
    one = Lease(Terms("gpu_1x_a10", alias="gpu", **terms), cloud, quiet=True)
    one.record = Record.create(one.terms, clock=cloud.time)
    for kind, facts in dict(asking=dict(name="n", cents=129), launched=dict(id="a"), status=dict(id="a", status="active"), ready={}).items():
        one.record.note(kind, time=1000.0, **facts)
    one._unguarded = lambda: "" if guarded else "it does not start"
    return one


def full(record, monkeypatch):
    "From now on nothing can be written into the folder of a lease."

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "note", refuse)


@pytest.mark.parametrize("how", ["leave", "keep", "ask_to_end"])
def test_what_cannot_be_written_down_is_terminated_directly(desk, monkeypatch, how):
    cloud = Cloud()
    gpu = held_of(cloud)
    full(gpu.record, monkeypatch)
    getattr(gpu, how)(*(["asked for", 0] if how == "ask_to_end" else []))
    assert cloud.box.status == "terminated" and "terminated directly" in gpu.last_words


@pytest.mark.parametrize("how", ["leave", "keep"])
def test_nobody_is_left_to_a_guardian_that_is_not_there(desk, monkeypatch, how):
    gpu, ended = held_of(Cloud(), guarded=False), []
    monkeypatch.setattr(gpu, "end", ended.append)
    getattr(gpu, how)()
    assert ended == ["it has no guardian"] and not gpu.state.left and "no guardian" in gpu.last_words


def test_what_another_process_wants_is_not_taken_from_it(desk):
    gpu, other = held_of(Cloud()), this_process() | dict(pid=1)
    other["started"] = f"{other['started'].partition(' ')[0]} {hold_birth(1)}"
    gpu.record.note("owner", owner=other)
    gpu.__exit__(None, None, None)
    assert gpu.goes_on and not gpu.state.left and "process 1 has asked for it" in gpu.last_words
    gpu.leave()
    assert not gpu.state.left


def hold_birth(pid: int) -> str:
    from nanogpt_nb.remote.there_folder import birth

    return birth(pid)


def test_who_waits_reads_what_the_service_says(desk):
    def refuse():
        raise ConfigError("The service is down.")

    gpu, said = held_of(Cloud()), []
    gpu.cloud.instances, gpu.say = refuse, said.append
    tell = Progress(gpu, every=0.03)
    until(lambda: tell() or any("The service is down." in line for line in said), "a line with the answer")
    assert said[-1].startswith("gpu: ready for")


def test_a_lease_that_cannot_be_read_is_named(desk, capsys):
    (data_dir() / "leases" / "251101-0900-abcd").mkdir(parents=True)
    assert [path.name for path in unreadable()] == ["251101-0900-abcd"]
    assert guard(CloudGuardArgs()) == 1 and "nanogpt cloud down 251101-0900-abcd" in capsys.readouterr().err
    assert down("251101-0900-abcd", quiet=True) is True


def run_away(folder, **remote) -> Run:
    run = Run.create(NanoGPTConfig.preset("tiny"), "away", folder / "runs")
    note_remote(run, host="old", path="/there/away", job="a", **remote)
    return run


def test_a_follower_of_a_machine_that_is_gone_ends(desk):
    run = run_away(desk)
    process = start_following(run)
    try:
        until(lambda: (run.path / ".follow.lock").exists() and (run.path / ".follow.lock").read_text(), "the follower")
        note_remote(run, host="new")
        until(lambda: process.poll() is not None, "its end")
        with alone(run) as ours:
            assert ours and not follows_another(run)
    finally:
        process.kill()
        process.wait()


def test_what_the_lease_has_let_go_of_is_not_followed_or_waited_for(desk, capsys):
    run = run_away(desk, home=True, error="The lease old ended (budget) before all of 'away' had come home; what is here is all there is.", job_state=dict(state="running"))
    assert main([str(run.path)]) == 0
    assert wait_there(run) and not (run.path / "follow.log").exists()
    (run.path / "money.json").write_text('{"dollars_per_hour": 1, "budget": 5, "began": 1, "ended": 2, "lease": "x"}')
    assert trouble(run) == 1 and "job logs" not in capsys.readouterr().out


def test_a_project_that_holds_the_home_folder_is_refused_before_anything_is_rented(desk, monkeypatch):
    monkeypatch.chdir(desk)
    with pytest.raises(ConfigError, match="holds your home folder"):
        find_fault(NanoGPTConfig.preset("tiny"))


@real
def test_a_guardian_that_was_killed_comes_back(desk, monkeypatch):
    monkeypatch.setattr(hold, "EVERY", 0)
    service = start_rehearsal()
    gpu = Lease(Terms("gpu_1x_a10", alias="gpu", base_url="rehearsal", owner=this_process()), service, quiet=True)
    gpu.record = Record.create(gpu.terms, clock=service.time)
    try:
        gpu._guardian()
        first = read(gpu.record.path / "guardian.json")["pid"]
        os.kill(first, signal.SIGKILL)
        until(lambda: not is_held(gpu.record), "its end")
        gpu.look_after()
        until(lambda: is_held(gpu.record) and read(gpu.record.path / "guardian.json")["pid"] != first, "another guardian")
        gpu.ask_to_end("asked for")
        assert gpu.state.phase == "ended"
    finally:
        if gpu.record and is_held(gpu.record):
            with contextlib.suppress(OSError):
                os.kill(read(gpu.record.path / "guardian.json")["pid"], signal.SIGKILL)
        stop_rehearsal()
