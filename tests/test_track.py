"Weights & Biases: the real client against a stand-in of the server, with everything that goes wrong."

import errno
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from wandb_server import ENTITY, KEY, WandbServer

from nanogpt_nb import track
from nanogpt_nb.backlog import Refused, Rows, cure, server_has
from nanogpt_nb.config import ConfigError, NanoGPTConfig
from nanogpt_nb.runs import Run, RunError
from nanogpt_nb.sync import SyncError, figures, import_offline, records, sync, unsent
from nanogpt_nb.track import BUSY, Tracker, api_key, later, start_follower, start_tracking, tracking_mode
from nanogpt_nb.train import agree

DEADLINE = 240.0  # a follower is nice to others: on a busy machine it gets little
TRANSMIT = {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1", "WANDB__STATS_SAMPLING_INTERVAL": "1"}
RETRY = {f"WANDB__{what}_RETRY_WAIT_{end}_SECONDS": "1" for what in ("FILE_STREAM", "GRAPHQL", "FILE_TRANSFER") for end in ("MIN", "MAX")}


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    "A machine on which nobody has logged in, and no follower left behind."
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    for name, value in {**TRANSMIT, **RETRY, "HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "NETRC": str(tmp_path / ".netrc")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(track, "PATIENCE", 120)
    before = list(track._STARTED)
    yield
    for process in track._STARTED:
        if process not in before and process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture
def server(monkeypatch):
    "A server that this machine is logged in at."
    with WandbServer() as server:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def make(tmp_path):
    return lambda name="first", **about: Run.create(NanoGPTConfig.preset("tiny"), name, tmp_path / "runs", **about)


def train(run: Run, steps, seconds_before: float = 0.0):
    "What a trainer writes: the loss of batches, and at every 20th step an estimate and a text as well."
    for step in steps:
        row = dict(step=step, tokens=step * 512, seconds=step / 10, learning_rate=1e-3, tokens_per_second=5120.0, utilisation=0.5)
        run.append(row | dict(loss=4 - step / 100))
        if step % 20 == 0:
            run.log(f"--- step {step}\ntext of step {step}", "samples.txt")
            run.append(row | dict(train_loss=4 - step / 100, val_loss=4 - step / 120))
        run.log(f"line {step}")


@contextmanager
def training(run: Run, end: str = "finished", **tracking):
    "Around what a trainer does in a run folder; gives its tracker."
    with run.lock():
        run.set_status("running", step=0)
        tracker = start_tracking(run, **tracking)
        yield tracker
        run.set_status(end, step=max((r["step"] for r in run.metrics()), default=0))


def over(tracker: Tracker) -> int:
    "The exit code of the follower, when it has ended."
    return tracker.process.wait(DEADLINE)


def kept(server: WandbServer, run: Run):
    return server.run(run.wandb.get("id"))


def lines(server, run) -> int:
    return len(kept(server, run).history) if kept(server, run) else 0


def numbers(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if isinstance(v, (int, float))} for row in rows]


def assert_all_there(server: WandbServer, run: Run, rows: list[dict] | None = None):
    "W&B has every row, once, in order, and heard nothing that it did not understand."
    assert numbers(kept(server, run).rows) == numbers(run.metrics() if rows is None else rows)
    assert [json.loads(line)["_step"] for line in kept(server, run).history] == list(range(lines(server, run)))
    assert server.wrong == []


def wait_for(what, seconds: float = DEADLINE):
    until = time.monotonic() + seconds
    while not (got := what()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.03)
    return got


def all_news(tracker: Tracker) -> str:
    "News until there is some."
    return " ".join(wait_for(tracker.news))


# Which way


def write_netrc(path: Path, machine: str, key: str = KEY):
    (path / ".netrc").write_text(f"machine {machine}\n  login user\n  password {key}\n")


def test_without_a_key_it_is_offline_and_with_one_online(monkeypatch):
    assert tracking_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert tracking_mode() == "online" and api_key() == KEY


@pytest.mark.parametrize("machine", ["api.wandb.ai", "api.forge.coreweave.com"])
def test_the_key_that_wandb_login_keeps_is_found(tmp_path, machine):
    write_netrc(tmp_path, machine)
    assert api_key() == KEY


def test_the_key_belongs_to_the_server_that_is_set(tmp_path, monkeypatch):
    write_netrc(tmp_path, "wandb.example.com:8443")
    assert api_key() is None
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com:8443/")
    assert api_key() == KEY


def test_settings_of_wandb_are_heeded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_netrc(tmp_path, "wandb.example.com")
    (tmp_path / ".config" / "wandb").mkdir(parents=True)
    (tmp_path / ".config" / "wandb" / "settings").write_text("[default]\nbase_url = https://wandb.example.com\n")
    assert tracking_mode() == "online"
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    assert tracking_mode() == "offline"


@pytest.mark.parametrize("content", [b"machine", b"\xff\xfe\x00", b"machine api.wandb.ai login", b""])
def test_a_broken_netrc_is_no_key(tmp_path, content):
    (tmp_path / ".netrc").write_bytes(content)
    assert api_key() is None


@pytest.mark.parametrize("content", ["mode = offline", "[default", "[default]\nmode = %(x)s\n", "\x00"])
def test_broken_settings_are_no_settings(tmp_path, monkeypatch, content):
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    (tmp_path / "settings").write_text(content)
    assert tracking_mode() == "online"


def test_settings_with_a_section_twice_are_no_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".config" / "wandb").mkdir(parents=True)
    (tmp_path / ".config" / "wandb" / "settings").write_text("[default]\nmode = online\n")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\nbase_url = https://wandb.example.com\n[default]\nmode = offline\n")
    assert tracking_mode() == "online" and track.wandb_host() == track.HOST  # the other file is heeded


ILL = {
    "config": {"WANDB_CONFIG_DIR": "~nosuchuser/x"},
    "netrc": {"NETRC": "~nosuchuser/x"},
    "address": {"WANDB_BASE_URL": "http://[bad"},
    "home": {"HOME": "/" + "x" * 300, "NETRC": ""},
    "long": {"WANDB_CONFIG_DIR": "x" * 5000},
}


@pytest.mark.parametrize("ill", ILL)
def test_ill_settings_are_no_settings(tmp_path, monkeypatch, ill):
    write_netrc(tmp_path, "api.wandb.ai")
    for name, value in ILL[ill].items():
        monkeypatch.setenv(name, value)
    with_key = ill in ("config", "long")
    assert (api_key(), tracking_mode()) == ((KEY, "online") if with_key else (None, "offline"))


@pytest.mark.parametrize("error", [RuntimeError("Could not determine\nhome directory"), PermissionError(13, "Permission denied")])
def test_settings_that_nobody_foresaw_cost_w_and_b_and_not_the_training(make, monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(track, "can_log_in", fail)
    run = make()
    with training(run) as tracker:
        (news,) = tracker.news()
        assert type(error).__name__ in news and "--wandb disabled" in news and later(run) in news and "\n" not in news
    tracker.finish()
    assert tracker.news() == [] and tracker.mode == "disabled" and not (run.path / "wandb").exists()
    with pytest.raises(ConfigError):
        start_tracking(run, "on")


@pytest.mark.parametrize(
    ("env", "mode"),
    [
        ({"WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_MODE": "online"}, "online"),
        ({"WANDB_IDENTITY_TOKEN_FILE": "token"}, "online"),
        ({"WANDB_MODE": "nonsense"}, "offline"),
    ],
)
def test_the_environment_decides(monkeypatch, env, mode):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert tracking_mode() == mode
    assert tracking_mode("online") == "online"


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="choose one of auto, online, offline, disabled"):
        tracking_mode("on")


def test_the_mode_is_decided_without_importing_wandb():
    code = "import sys; from nanogpt_nb.track import tracking_mode; tracking_mode(); print('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_disabled_leaves_no_trace(make):
    run = make()
    with training(run, mode="disabled") as tracker:
        train(run, (0, 10))
    tracker.finish()
    assert tracker.news() == [] and not (run.path / "wandb").exists() and run.wandb == {}


# Online


def test_a_run_online_is_all_there(server, make):
    run = make(group="a sweep", device="cpu, 2 threads", parameters=123, git_commit="a" * 40)
    with training(run) as tracker:
        train(run, range(0, 50, 10))
        server.wait(lambda: lines(server, run) == 8)  # while it trains
        train(run, (50, 60))
    tracker.finish()
    assert over(tracker) == 0
    assert_all_there(server, run)
    told = kept(server, run)
    assert (told.entity, told.project, told.exitcode) == (ENTITY, "nanogpt", 0)
    assert {k: v for k, v in told.config.items() if k in run.about["config"]} == run.about["config"]
    assert (told.config["git_commit"], told.config["parameters"], told.config["device_name"]) == ("a" * 40, 123, "cpu, 2 threads")
    assert (told.bucket["groupName"], told.bucket["displayName"], told.bucket["commit"]) == ("a sweep", "first", "a" * 40)
    assert told.bucket["host"] == run.about["host"] == json.loads(told.files["wandb-metadata.json"])["host"]
    assert told.summary["best_val_loss"] == min(r["val_loss"] for r in run.estimates()) and told.summary["best_step"] == 60
    assert told.console == [f"line {step}" for step in range(0, 70, 10)]
    assert any("system.proc.memory.rssMB" in event for event in told.events)
    (table,) = {a["name"] for a in server.artifacts.values()}
    last = json.loads([a for a in server.artifacts.values() if a["name"] == table][-1]["files"]["samples.table.json"])
    assert last["columns"] == ["step", "text"] and last["data"] == [[s, f"text of step {s}"] for s in (0, 20, 40, 60)]
    assert run.wandb["url"] == f"{server.url}/{ENTITY}/nanogpt/runs/{run.wandb['id']}" and run.wandb["sent"] is True
    assert tracker.news() == [f"W&B shows the run at {run.wandb['url']}"] and tracker.news() == []
    assert sync(run)[0]["state"] == "there" and unsent(run.path.parent) == []


def words_of(process: psutil.Process) -> str:
    "The command line of a process; nothing where it has ended."
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def leaks(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]


def test_the_key_goes_nowhere_but_to_the_server(server, make):
    run = make()
    with training(run, artifact=True) as tracker:
        train(run, (0, 10, 20))
        run.save_checkpoint("last", lambda path: (path / "model.safetensors").write_bytes(b"weights"), step=20)
        server.wait(lambda: lines(server, run) == 5)
        family = [psutil.Process(tracker.process.pid), *psutil.Process(tracker.process.pid).children(recursive=True)]
        told = [words_of(p) for p in family]
        assert any("wandb-core" in words for words in told) and not any(KEY in words for words in told)
    assert over(tracker) == 0
    assert leaks(run.path) == [] and (run.path / "wandb" / "follower.log").exists()
    assert [r[:2] for r in server.requests if KEY in r[1] or KEY in str(r[2]) or KEY.encode() in r[3]] == []
    (model,) = [a for a in server.artifacts.values() if a["type"] == "model"]
    assert model["state"] == "COMMITTED" and set(model["aliases"]) == {"final", "step-20", "latest"}
    assert model["files"]["last/model.safetensors"] == b"weights" and {"config.json", "last/checkpoint.json"} <= set(model["files"])


def test_a_resumed_run_goes_on_in_its_own(server, make):
    run = make()
    with training(run, end="stopped") as tracker:
        train(run, range(0, 50, 10))
    assert over(tracker) == 0 and kept(server, run).exitcode == 255
    before = run.metrics()
    run.forget_after(20)  # from the checkpoint of step 20
    with training(run) as tracker:
        train(run, range(30, 80, 10))
    assert over(tracker) == 0
    assert len(server.runs) == 1 and kept(server, run).exitcode == 0
    assert_all_there(server, run, before + [r for r in run.metrics() if r not in before])
    assert kept(server, run).console == (run.path / "log.txt").read_text().splitlines()


def test_a_follower_that_is_killed_is_replaced(server, make):
    run = make()
    with training(run) as tracker:
        train(run, (0, 10, 20))
        server.wait(lambda: lines(server, run) == 5)
        first = tracker.process
        core = psutil.Process(first.pid).children()
        first.kill()
        first.wait()
        train(run, (30, 40))
        assert tracker.news() == [] and tracker.process is not first
        server.wait(lambda: lines(server, run) == 8)
        assert psutil.wait_procs(core, timeout=DEADLINE)[1] == []
    assert over(tracker) == 0
    assert_all_there(server, run)


def test_a_trainer_that_is_killed_ends_its_follower(server, make):
    run = make()
    run.set_status("running")
    code = "import sys, time; from nanogpt_nb.runs import Run\nwith Run(sys.argv[1]).lock(): print('locked', flush=True); time.sleep(600)"
    trainer = subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert trainer.stdout.readline() == "locked\n"
        tracker = start_tracking(run)
        train(run, (0, 10))
        server.wait(lambda: lines(server, run) == 3)
        assert tracker.process.poll() is None
    finally:
        trainer.kill()
        trainer.communicate()
    assert over(tracker) == 0
    assert kept(server, run).exitcode == 137 and run.state == "killed"
    assert_all_there(server, run)


@pytest.mark.parametrize(("end", "more", "code"), [("failed", {"error": "out of memory"}, 1), ("stopped", {"reason": "pruned"}, 0)])
@pytest.mark.slow
def test_w_and_b_hears_how_it_ended(server, make, end, more, code):
    run = make()
    with run.lock():
        run.set_status("running")
        tracker = start_tracking(run)
        train(run, (0,))
        run.set_status(end, **more)
    assert over(tracker) == 0 and kept(server, run).exitcode == code


# A server that fails


def test_nothing_is_lost_when_the_server_dies_and_comes_back(server, make):
    run = make()
    with training(run) as tracker:
        train(run, (0, 10, 20))
        server.wait(lambda: lines(server, run) == 5)
        server.stop()
        train(run, (30, 40, 50))
        wait_for(lambda: len(Rows(run)) == 9)  # the follower has taken them in
        server.start()
        server.wait(lambda: lines(server, run) == 9)
        train(run, (60,))
    assert over(tracker) == 0
    assert_all_there(server, run)


FAULTS = {
    "refused": (lambda server: server.stop(), "cannot be reached (Connection refused)"),
    "401": (lambda server: server.keys.clear(), "does not know the API key (HTTP 401): correct WANDB_API_KEY"),
    "403": (lambda server: setattr(server, "fault", lambda method, path, operation: 403), "does not let this key write to nanogpt (HTTP 403)"),
    "500": (lambda server: setattr(server, "fault", lambda method, path, operation: 500), "has trouble (HTTP 500)"),
    "dropped": (lambda server: setattr(server, "fault", lambda method, path, operation: "drop"), "cannot be reached"),
}
LATE = {
    "hanging": (lambda server: setattr(server, "fault", lambda method, path, operation: "hang"), "cannot be reached (timed out)"),
    "no new run": (lambda server: setattr(server, "fault", lambda m, p, operation: 500 if operation == "UpsertBucket" else None), "does not take the run"),
}


def mend(server: WandbServer):
    server.fault = None
    server.keys.add(KEY)
    if server.http is None:
        server.start()


@pytest.mark.parametrize("fault", [*list(FAULTS)[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in [*list(FAULTS)[2:], *LATE])])
def test_a_server_that_fails_at_the_start_is_told_once_and_sent_to_later(server, make, monkeypatch, fault):
    monkeypatch.setattr(track, "PATIENCE", 3)
    run = make()
    break_it, said = (FAULTS | LATE)[fault]
    break_it(server)
    with training(run) as tracker:
        train(run, (0, 10, 20))
        news = all_news(tracker)
        assert said in news and "training is not affected" in news and f"nanogpt runs sync first --runs-dir {run.path.parent}" in news
    tracker.finish(0.1)
    assert over(tracker) == 1
    assert [s for s in tracker.news() if "not affected" in s or "does not have all" in s] == []
    assert run.wandb["sent"] is False and lines(server, run) == 0
    mend(server)
    (result,) = sync(runs_dir=run.path.parent)
    assert (result["name"], result["state"], result["rows"]) == ("first", "sent", 5)
    assert_all_there(server, run)
    assert kept(server, run).console == ["line 0", "line 10", "line 20"]


def test_a_run_that_began_without_the_server_goes_online_when_it_is_back(server, make, monkeypatch):
    server.stop()
    run = make()
    with training(run) as tracker:
        train(run, (0, 10))
        assert "cannot be reached" in all_news(tracker)
        server.start()
        train(run, (20, 30))
    assert over(tracker) == 0
    assert_all_there(server, run)
    assert f"W&B shows the run at {run.wandb['url']}" in tracker.news()


RAW = {
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "cut": b'HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{"data"',
    "no JSON": b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n<htm",
    "a list": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
}


@pytest.mark.parametrize("answer", RAW)
def test_an_answer_that_is_none_is_as_good_as_no_server(monkeypatch, answer):
    def give(listening):
        connection, _ = listening.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(RAW[answer])

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=give, args=(listening,), daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        with pytest.raises(Refused, match="cannot be reached") as e:
            server_has("nobody", "nanogpt", None)
    assert e.value.passing


def test_an_address_that_is_none_is_told(make, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://[bad")
    run = make()
    with training(run, mode="online") as tracker:
        assert over(tracker) == 1
        news = " ".join(tracker.news())
    assert "http://[bad, is not one: correct WANDB_BASE_URL" in news and "pip install" not in news and later(run) in news


def test_a_full_disk_is_told_and_is_no_reason_to_install():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "The disk is full" in cure(full) and "pip" not in cure(full)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_what_cannot_be_logged_is_told_all_the_same(make, tmp_path, monkeypatch):
    shadow(tmp_path, monkeypatch, "raise OSError(28, 'No space left on device')")
    run = make()
    (run.path / "wandb").mkdir()
    (run.path / "wandb" / "follower.log").symlink_to("/dev/full")
    with training(run, mode="offline") as tracker:
        train(run, (0, 10))
        assert over(tracker) == 1
        assert "The disk is full" in " ".join(tracker.news())


def test_a_server_that_hangs_does_not_collect_followers(server, make):
    "Those given up leave nothing behind, and their rows are sent later."
    server.fault = lambda method, path, operation: "hang"
    runs, followers = [make(f"trial-{i}") for i in range(4)], []
    for run in runs:
        with training(run) as tracker:
            train(run, (0, 10))
            followers.append(psutil.Process(tracker.process.pid))
            if run is runs[0]:
                assert "cannot be reached" in all_news(tracker)  # it has begun offline
                core = wait_for(lambda: followers[0].children(recursive=True))
    assert any("trial-0" in s and later(runs[0]) in s for s in tracker.news())
    gone, _ = psutil.wait_procs([followers[0], *core], timeout=DEADLINE)
    assert len(gone) == 1 + len(core) > 1
    assert [p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in followers[1:]] == [True] * 3
    mend(server)
    server.released.set()
    assert sync(runs[0])[0]["state"] == "sent"
    assert_all_there(server, runs[0])


def test_online_without_a_key_is_told_in_a_sentence(server, make, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    run = make()
    with training(run, mode="online") as tracker:
        train(run, (0, 10))
        (news,) = wait_for(tracker.news)
        assert "wandb login" in news and "training is not affected" in news and later(run) in news and "Traceback" not in news
    assert over(tracker) == 1 and tracker.news() == [] and run.wandb["mode"] == "offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert sync(run)[0]["state"] == "sent"
    assert_all_there(server, run)


@pytest.mark.slow
@pytest.mark.parametrize("status", [403, 500, "hang", "drop"])
def test_a_server_that_takes_no_more_lines_in_mid_run_is_found_out(server, make, monkeypatch, status):
    monkeypatch.setattr(track, "PATIENCE", 6)
    run = make()
    with training(run) as tracker:
        train(run, (0, 10, 20))
        server.wait(lambda: lines(server, run) == 5)
        server.fault = lambda method, path, operation: status if path.endswith("/file_stream") else None
        train(run, (30, 40))
    assert over(tracker) == 1
    assert "W&B does not have all of the run (W&B has 5 of 8 rows)" in " ".join(tracker.news())
    mend(server)
    assert sync(run)[0]["state"] == "sent"
    assert_all_there(server, run)


@pytest.mark.slow
def test_a_network_that_is_lost_at_the_end_is_waited_for(server, make):
    run = make()
    with training(run) as tracker:
        train(run, (0, 10, 20))
        server.wait(lambda: lines(server, run) == 5)
        server.stop()
        train(run, (30, 40))
    tracker.finish(0.1)
    assert tracker.process.poll() is None and "in the background" in " ".join(tracker.news())
    server.start()
    assert over(tracker) == 0
    assert_all_there(server, run)


@pytest.mark.slow
def test_a_follower_does_not_wait_for_ever(server, make, monkeypatch):
    monkeypatch.setattr(track, "PATIENCE", 3)
    run = make()
    with training(run) as tracker:
        train(run, (0, 10, 20))
        server.wait(lambda: lines(server, run) == 5)
        server.fault = lambda method, path, operation: "hang"
        train(run, (30, 40))
    assert over(tracker) == 1 and run.wandb["sent"] is False


# A wandb that is missing or broken


def shadow(tmp_path, monkeypatch, code: str, name: str = "wandb"):
    "Another package of that name before the real one."
    (tmp_path / "shadow" / name).mkdir(parents=True)
    (tmp_path / "shadow" / name / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "shadow"))


CLICK = "class A: pass\ndef command(*a, **kw): raise TypeError(\"__init__() got an unexpected keyword argument 'no_args_is_help'\")\ncommand()"
BROKEN = {
    "missing": ("wandb", "raise ModuleNotFoundError(\"No module named 'wandb'\", name='wandb')", "W&B is not installed here: pip install wandb"),
    "protobuf": ("google.protobuf", "raise ImportError('cannot import protobuf')", 'with the protobuf that is here (ImportError: cannot import protobuf): pip install --upgrade wandb "protobuf'),
    "click": ("click", CLICK, "with the click that is here"),
    "exits": ("wandb", "raise SystemExit('no')", "wandb does not start here"),
    "syntax": ("wandb", "def", "wandb does not start here"),
}


@pytest.mark.parametrize("how", [*list(BROKEN)[:2], *(pytest.param(how, marks=pytest.mark.slow) for how in list(BROKEN)[2:])])
def test_a_broken_wandb_is_told_once_with_its_cure(server, make, tmp_path, monkeypatch, how):
    package, code, said = BROKEN[how]
    with monkeypatch.context() as broken:
        shadow(tmp_path, broken, code, package.replace(".", "/"))
        run = make()
        with training(run) as tracker:
            train(run, (0, 10))
            (news,) = wait_for(tracker.news)
        assert said in news and "training is not affected" in news and "nanogpt runs sync first" in news
        assert over(tracker) == 1
        tracker.finish(0.1)
        assert tracker.news() == [] and tracker.starts == 1
    assert sync(run)[0]["state"] == "sent"  # after the cure
    assert_all_there(server, run)


@pytest.mark.parametrize("how", ["missing", *(pytest.param(how, marks=pytest.mark.slow) for how in ("not executable", "another system's"))])
def test_a_wandb_without_its_program_is_told_with_its_cure(make, tmp_path, monkeypatch, how):
    import wandb

    copy = shutil.copytree(Path(wandb.__file__).parent, tmp_path / "site" / "wandb", ignore=shutil.ignore_patterns("__pycache__", "wandb-*", "*.so"))
    core = copy / "bin" / "wandb-core"
    core.parent.mkdir(exist_ok=True)
    if how != "missing":
        core.write_bytes(b"\x7fELF, but no more" if how == "another system's" else b"#!/bin/sh\n")
        core.chmod(0o755 if how == "another system's" else 0o644)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    run = make()
    with training(run, mode="offline") as tracker:
        news = wait_for(lambda: [s for s in tracker.news() if "not affected" in s])
    assert "pip install --force-reinstall wandb" in news[0] and over(tracker) == 1


@pytest.mark.parametrize("needs", ["protobuf>=5,<8", "click>=8.2"])
def test_the_cures_ask_for_what_the_real_wandb_needs(needs):
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    ours = Requirement(needs)
    (its,) = [r for r in map(Requirement, requires("wandb")) if r.name == ours.name and not r.marker]
    assert ours.name in cure(ImportError(ours.name)) and str(ours.specifier).split(",")[0] in cure(ImportError(ours.name)).replace(" ", "")
    assert {str(s) for s in ours.specifier} <= {str(s) for s in its.specifier} | {">=8.2"}


def test_a_follower_that_keeps_dying_is_given_up(make, tmp_path, monkeypatch):
    shadow(tmp_path, monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    run = make()
    with training(run) as tracker:
        news = all_news(tracker)
        assert "ended 3 times" in news and "nanogpt runs sync first" in news and tracker.starts == 3
        assert tracker.news() == []


def test_a_folder_that_cannot_be_written_is_told_and_stops_nothing(make, monkeypatch):
    run = make()
    (run.path / "wandb").write_text("in the way")
    tracker = start_tracking(run, "offline")
    assert "could not be started" in tracker.news()[0]
    tracker.finish()


# Offline, then sync


def offline(run: Run, steps, end: str = "finished"):
    with training(run, end=end, mode="offline") as tracker:
        train(run, steps)
    assert over(tracker) == 0
    return tracker


def test_offline_then_sync_each_once(server, make, tmp_path):
    runs = [make(name) for name in ("first", "second")]
    trackers = [offline(run, range(0, 50 + 10 * i, 10)) for i, run in enumerate(runs)]
    assert all("nanogpt runs sync" in t.news()[0] for t in trackers)
    assert [r[1] for r in server.requests] == []
    moved = Path(shutil.move(tmp_path / "runs", tmp_path / "elsewhere"))
    runs = [Run(moved / run.name) for run in runs]
    assert unsent(moved) == runs
    results = sync(runs_dir=moved)
    assert [(r["name"], r["state"]) for r in results] == [("first", "sent"), ("second", "sent")]
    for run in runs:
        assert_all_there(server, run)
        assert kept(server, run).exitcode == 0
        assert kept(server, run).console == (run.path / "log.txt").read_text().splitlines()
        sent = [json.loads(event) for event in kept(server, run).events]
        assert len(sent) == len(figures(run)) > 0 and all("system.proc.memory.rssMB" in f for f in sent)
    before = len(server.requests)
    assert sync(runs_dir=moved) == [] and len(server.requests) == before
    assert [r["state"] for r in sync(["first", "second"], moved)] == ["there", "there"]
    assert {lines(server, run) for run in runs} == {len(run.metrics()) for run in runs}


def test_two_offline_parts_of_a_resumed_run_are_sent_as_one(server, make):
    run = make()
    offline(run, range(0, 50, 10), end="stopped")
    before = run.metrics()
    run.forget_after(20)
    offline(run, range(30, 80, 10))
    assert len(list(run.path.glob("wandb/offline-run-*"))) == 2
    assert sync(run)[0]["state"] == "sent"
    assert_all_there(server, run, before + [r for r in run.metrics() if r not in before])
    stamps = [json.loads(event)["_timestamp"] for event in kept(server, run).events]
    assert len(stamps) == len(figures(run)) and stamps == sorted(stamps)


def test_a_sync_that_is_cut_off_goes_on_where_it_was(server, make):
    run = make()
    offline(run, range(0, 100, 10))
    server.room = 7
    cut = start_follower(run, "online", "--sync", "--patience", "60")
    server.wait(lambda: lines(server, run) == 7)
    cut.kill()
    cut.wait()
    assert run.wandb["sent"] is False and lines(server, run) < len(run.metrics())
    server.room = None
    assert sync(run)[0]["state"] == "sent"
    assert_all_there(server, run)


@pytest.mark.slow
def test_an_online_run_that_goes_on_offline_is_whole_after_a_sync(server, make):
    run = make()
    with training(run, end="stopped") as tracker:
        train(run, range(0, 30, 10))
    assert over(tracker) == 0
    offline(run, range(30, 60, 10))
    assert unsent(run.path.parent) == [run]
    assert sync(run)[0]["state"] == "sent"
    assert_all_there(server, run)


@pytest.mark.slow
def test_a_run_that_w_and_b_was_not_told_of_can_be_sent(server, make):
    run = make()
    train(run, range(0, 30, 10))
    run.set_status("finished")
    assert unsent(run.path.parent) == []
    assert sync("first", run.path.parent)[0]["state"] == "sent"
    assert_all_there(server, run)


def test_sync_without_a_key_says_what_to_do(make, tmp_path):
    run = make()
    with pytest.raises(SyncError, match="wandb login"):
        sync(run)
    with pytest.raises(SyncError, match="no folder"):
        sync(runs_dir=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert sync(runs_dir=tmp_path / "empty") == []


def test_sync_says_which_run_could_not_be_sent_and_why(server, make):
    run = make()
    train(run, (0,))
    run.set_status("finished")
    server.keys.clear()
    (result,) = sync(run)
    assert result["state"] == "failed" and "does not know the API key" in result["said"]
    with run.lock():
        run.set_status("running")
        assert sync(run)[0]["state"] == "training"


@pytest.mark.slow
def test_one_follower_at_a_time(server, make):
    run = make()
    with training(run) as tracker:
        train(run, (0, 10))
        server.wait(lambda: lines(server, run) == 3)
        second = start_follower(run, "online", "--sync")
        assert second.wait(DEADLINE) == BUSY
        assert "another process is telling W&B" in (run.path / "wandb" / "follower.log").read_text()
    assert over(tracker) == 0
    assert_all_there(server, run)


def nanogpt(*words) -> subprocess.Popen:
    "The command, as a process."
    return subprocess.Popen([sys.executable, "-m", "nanogpt_nb.cli", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_syncs_at_once_send_each_row_once(server, make):
    run = make()
    train(run, range(0, 100, 10))  # W&B was never told: the run has no id yet
    run.set_status("finished")
    both = [nanogpt("runs", "sync", "first", "--runs-dir", run.path.parent) for _ in range(2)]
    told = [p.communicate(timeout=2 * DEADLINE) for p in both]
    assert [err for _, err in told] == ["", ""]
    for process, (out, _) in zip(both, told, strict=True):
        assert (process.returncode, out.split(":")[0]) in [(0, "first is sent"), (0, "first is there already"), (1, "first is not sent")]
        assert process.returncode == 0 or "another process is telling W&B of it now" in out
    assert 0 in [p.returncode for p in both] and len(server.runs) == 1
    assert_all_there(server, run)
    assert kept(server, run).console == (run.path / "log.txt").read_text().splitlines()
    offsets = [chunk["offset"] for file, chunk in streamed(server) if file == "wandb-history.jsonl"]
    assert offsets == sorted(set(offsets))


def streamed(server: WandbServer) -> list[tuple[str, dict]]:
    "What came in by the file stream, in order."
    bodies = [body for _, path, _, body in server.requests if path.endswith("/file_stream")]
    return [pair for body in bodies for pair in (json.loads(body or b"{}").get("files") or {}).items()]


def test_looking_for_what_is_unsent_writes_nothing(make):
    run = make()
    track.wandb_id(run)
    train(run, (0, 10))
    look = lambda: sorted((p.name, p.stat().st_mtime_ns) for p in run.path.rglob("*"))
    with run.lock():
        before = look()
        assert unsent(run.path.parent) == [run]
    assert look() == before and not (run.path / "wandb").exists()


AS_ROOT = pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
CLOSED = {"in the way": lambda run: (run.path / "wandb").write_text("a file"), "read-only": lambda run: run.path.chmod(0o555)}


@pytest.mark.parametrize("how", ["in the way", pytest.param("read-only", marks=AS_ROOT)])
def test_a_folder_that_cannot_be_written_keeps_no_other_from_being_sent(server, make, how):
    runs = [make(name, created=f"2026-01-0{i}T12:00:00+00:00") for i, name in enumerate(("first", "second"), 1)]
    for run in runs:
        track.wandb_id(run)
        train(run, (0, 10))
        run.set_status("finished")
    CLOSED[how](runs[0])
    try:
        results = sync(runs_dir=runs[0].path.parent)
    finally:
        runs[0].path.chmod(0o755)
    assert [(r["name"], r["state"]) for r in results] == [("first", "failed"), ("second", "sent")]
    assert "cannot be written" in results[0]["said"] and str(runs[0].path) in results[0]["said"]
    assert_all_there(server, runs[1])


# Reading W&B's file


@pytest.mark.parametrize("how", ["missing", "protobuf", pytest.param("exits", marks=pytest.mark.slow)])
def test_a_file_that_a_broken_wandb_cannot_read_is_told_with_the_cure(tmp_path, monkeypatch, how):
    package, code, said = BROKEN[how]
    shadow(tmp_path, monkeypatch, code, package.replace(".", "/"))
    (tmp_path / "run.wandb").write_bytes(b":W&B\0\0\0")
    process = nanogpt("runs", "import", tmp_path / "run.wandb", "--runs-dir", tmp_path / "runs")
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == SyncError.exit_code and out == ""
    assert said in err and "pip install" in err and "Traceback" not in err and not (tmp_path / "runs").exists()


def test_a_wandb_file_becomes_a_run_again(server, make, tmp_path):
    run = make(group="a sweep", parameters=123)
    offline(run, range(0, 50, 10))
    (part,) = run.path.glob("wandb/offline-run-*")
    again = import_offline(part, tmp_path / "imported")
    assert again.metrics() == run.metrics() and again.config == run.config and again.samples() == run.samples()
    assert (again.path / "log.txt").read_text() == (run.path / "log.txt").read_text()
    for key in ("created", "host", "git_commit", "parameters", "group"):
        assert again.about[key] == run.about[key]
    assert (again.name, again.state, again.summary()["val_loss"]) == ("first", "finished", run.estimates()[-1]["val_loss"])
    assert sync(again)[0]["state"] == "sent"
    assert len(server.runs) == 1
    assert_all_there(server, again, run.metrics())


def test_a_wandb_file_that_is_cut_off_gives_what_is_whole(make, tmp_path):
    run = make()
    offline(run, range(0, 100, 10))
    (file,) = run.path.glob("wandb/offline-run-*/*.wandb")
    data = file.read_bytes()
    torn = tmp_path / "torn.wandb"
    torn.write_bytes(data[: len(data) * 2 // 3])
    whole, left = len(list(records(file))), len(list(records(torn)))
    again = import_offline(torn, tmp_path / "imported", name="torn")
    assert 0 < left < whole and again.state == "failed" and "no end" in again.status["error"]
    with pytest.raises(RunError, match="no checkpoint to go on from"):
        agree(again, None)
    assert again.metrics() == run.metrics()[: len(again.metrics())] and 0 < len(again.metrics()) < len(run.metrics())


@pytest.mark.slow
def test_a_wandb_file_of_another_program_is_read(tmp_path):
    code = """if True:
        import wandb, sys
        run = wandb.init(project="nanogpt", mode="offline", dir=sys.argv[1], config=dict(batch_size=64, n_embd=384, lr=3e-4, device="cuda"))
        for step in (0, 500): run.log({"step": step, "train_loss": 4.2 - step / 1000, "val_loss": 4.3 - step / 1000, "note": "hi"})
        run.finish()"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, timeout=DEADLINE)
    (part,) = tmp_path.glob("wandb/offline-run-*")
    run = import_offline(part, tmp_path / "runs", name="write up")
    assert run.name == "write-up" and run.config.batch_size == 64 and run.state == "finished"
    assert [(r["step"], r["train_loss"], r["val_loss"]) for r in run.metrics()] == [(0, 4.2, 4.3), (500, 3.7, 3.8)]


@pytest.mark.parametrize("content", [None, b"", b"hello", b":W&B", b":W&B\0\0\0" + bytes(100), b":W&B\0\0\0" + b"\x01\x02\x03\x04\x05\x00\x01abcde"])
def test_what_is_no_wandb_file_is_refused(tmp_path, content):
    path = tmp_path / "run.wandb"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SyncError):
        import_offline(path, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


# The rows


def test_rows_are_new_once_whatever_happens_to_the_file(make):
    run, seen = make(), []
    rows = Rows(run)
    rows.read()
    train(run, (0, 10, 20, 30))
    rows.read()
    seen = list(rows)
    with open(run.path / "metrics.jsonl", "a") as f:
        f.write('{"step": 40, "lo')  # half a line
    rows.read()
    assert rows == seen
    run.forget_after(10)
    rows.read()
    train(run, (20, 30, 40))
    rows.read()
    (run.path / "metrics.jsonl").unlink()
    rows.read()
    assert [(r["step"], "val_loss" in r) for r in rows] == [(0, False), (0, True), (10, False), (20, False), (20, True), (30, False), (40, False), (40, True)]
    assert rows == Rows(run)


def test_a_torn_list_of_rows_is_mended(make):
    run = make()
    train(run, (0, 10))
    rows = Rows(run)
    rows.read()
    whole = rows.kept.read_bytes()
    rows.kept.write_bytes(whole[:-20])
    again = Rows(run)
    again.read()
    assert numbers(again) == numbers(rows) and Rows(run) == again


def test_a_row_is_as_old_as_its_training(make):
    run = make()
    train(run, (0, 100))
    os.utime(run.path / "metrics.jsonl", (1000, 1000))
    rows = Rows(run)
    rows.read()
    assert [r["_timestamp"] for r in rows] == [990, 990, 1000, 1000]


def test_the_server_is_asked_as_the_client_asks(server, make):
    assert server_has("nobody", "nanogpt", None) == {}
    server.stop()
    with pytest.raises(Refused, match="Connection refused") as e:
        server_has("nobody", "nanogpt", None)
    assert e.value.passing and KEY not in str(e.value)


# The trainer


class Clock:
    "A clock that goes on only while somebody sleeps."

    def __init__(self):
        self.slept = 0.0

    def time(self) -> float:
        return self.slept

    monotonic = time

    def sleep(self, seconds: float):
        self.slept += seconds


def test_the_end_of_training_is_waited_at_once_and_not_for_long(server, make, monkeypatch):
    "Even when the server hangs; and the follower goes on by itself."
    server.fault = lambda method, path, operation: "hang"
    run = make()
    with training(run) as tracker:
        monkeypatch.setattr(track, "time", clock := Clock())
        assert tracker.process.stdout is tracker.process.stderr is tracker.process.stdin is None
        assert os.getsid(tracker.process.pid) == tracker.process.pid
        tracker.news()
        tracker.finish(patience=3)
        assert clock.slept == 0  # training goes on
    tracker.finish(patience=3)
    assert 3 <= clock.slept < 3.1 and tracker.process.poll() is None
    before = clock.slept
    tracker.finish(patience=3)
    tracker.news()
    assert clock.slept == before


TRAINER = """
import sys
from nanogpt_nb.runs import Run
from nanogpt_nb.track import start_tracking
run = Run(sys.argv[1])
with run.lock():
    run.set_status("running")
    tracker = start_tracking(run, "offline")
    tracker.news()
    run.set_status("finished")
tracker.finish(60)
print(tracker.news())
print(sorted({"wandb", "google.protobuf", "requests"} & set(sys.modules)), tracker.process.wait())
"""


def test_the_trainer_loads_nothing_of_w_and_b(make):
    done = subprocess.run([sys.executable, "-c", TRAINER, str(make().path)], capture_output=True, text=True, timeout=DEADLINE)
    assert "nanogpt runs sync first" in done.stdout and done.stdout.splitlines()[1:] == ["[] 0"], done.stderr


def test_followers_that_have_ended_do_not_stay_as_zombies(make, tmp_path, monkeypatch):
    shadow(tmp_path, monkeypatch, "raise ImportError('no')")
    first = start_tracking(make("first"), "offline").process.pid
    wait_for(lambda: psutil.Process(first).status() == psutil.STATUS_ZOMBIE)
    second = start_tracking(make("second"), "offline").process
    assert not psutil.pid_exists(first)
    assert second in track._STARTED and first not in [p.pid for p in track._STARTED]


def test_the_command_for_later_can_be_copied_into_a_shell(tmp_path):
    for run in (Run(tmp_path / "my runs" / "it's first"), Run(tmp_path / "runs" / "first"), Run("runs/a b")):
        words = shlex.split(later(run).removesuffix(" sends it to W&B later"))
        where = [] if run.path.parent == Path("runs") else ["--runs-dir", str(run.path.parent)]
        assert words == ["nanogpt", "runs", "sync", run.name, *where]


def test_news_of_a_folder_with_spaces_have_its_own_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run.create(NanoGPTConfig.preset("tiny"), "first", "my runs")
    with training(run, mode="offline") as tracker:
        (news,) = wait_for(tracker.news)
    assert news.endswith(f"{later(run)}.") and str(tmp_path) not in news
    assert over(tracker) == 0


def test_a_config_that_is_missing_costs_nothing_else(make):
    run = make()
    with training(run, mode="offline") as tracker:
        train(run, (0,))
        wait_for(lambda: len(Rows(run)) == 2)
        (run.path / "config.json").unlink()
        assert over(tracker) == 1
        assert "config.json is missing" in " ".join(tracker.news()) and tracker.starts == 1
    assert len(run.metrics()) == len(Rows(run)) == 2
    assert list(run.path.glob("wandb/offline-run-*/*.wandb")) != []


@pytest.mark.slow
def test_a_folder_that_is_deleted_ends_its_follower(make):
    run = make()
    with training(run, mode="offline") as tracker:
        train(run, (0,))
        wait_for(lambda: len(Rows(run)) == 2)
        shutil.rmtree(run.path)
        assert over(tracker) == 1 and not run.path.exists()
        run.path.mkdir()  # for the end of the training
