"""Bringing runs home from a real sshd: by pull, by a follower, through cuts, and with nothing of one's own overwritten."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from box import Box, remove, until, why_no_box
from tqdm import tqdm

from nanogpt_nb.checkpoints import damage
from nanogpt_nb.config import NanoGPTConfig
from nanogpt_nb.remote import bring as bringing
from nanogpt_nb.remote.agent import Dropped, HostError
from nanogpt_nb.remote.bring import bring
from nanogpt_nb.remote.follower import Follower, is_followed, start_following
from nanogpt_nb.remote.landing import Elsewhere, Landing, checkpoint_id, note_remote
from nanogpt_nb.remote.pull import pull, send
from nanogpt_nb.remote.ssh import Host
from nanogpt_nb.remote.there_run import look
from nanogpt_nb.remote.there_tail import Tail, news
from nanogpt_nb.runs import Run, RunError

pytestmark = pytest.mark.skipif(why_no_box() is not None, reason=why_no_box() or "")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with Box(tmp_path_factory.mktemp("pull")) as box:
        yield box


@pytest.fixture
def box(shared, monkeypatch, tmp_path):
    "The box, a laptop, and an empty folder here."
    shared.use(monkeypatch)
    monkeypatch.chdir(tmp_path)
    shared.wire.delay, shared.wire.rate, shared.wire.black, shared.wire.refuse = 0, None, False, False
    shutil.rmtree(shared.home / "nanogpt", ignore_errors=True)
    shutil.rmtree(shared.home / "project", ignore_errors=True)
    yield shared
    for host in list(Host._all.values()):
        host.close()
    Host._all.clear()


def far_run(box, name="far", state="finished", weights=b"weights" * 10_000, project="demo") -> Run:
    run = Run.create(NanoGPTConfig.preset("tiny"), name, box.home / "nanogpt" / project / "runs", state=state)
    run.append(dict(step=0, train_loss=4.2, val_loss=4.3))
    run.log("run far: parameters")
    run.log("--- step 0\nO Rømeo", "samples.txt")
    save(run, 1, weights)
    run.link_checkpoint()
    return run


def save(run, step, weights):
    run.save_checkpoint(
        "last", lambda p: ((p / "model.safetensors").write_bytes(weights), (p / "trainer.pt").write_bytes(b"%d" % step)), step=step
    )


def equal(a: Run, b: Run) -> bool:
    "Whether two run folders have the same small files, and the same whole checkpoints."
    names = ("config.json", "metrics.jsonl", "log.txt", "samples.txt", "status.json")
    same = all((a.path / n).read_bytes() == (b.path / n).read_bytes() for n in names)
    return same and all(
        checkpoint_id(a, w) == checkpoint_id(b, w) is not None and damage(b.checkpoint(w)) is None for w in ("last", "best")
    )


WRITER = """
import sys, time, random
from nanogpt_nb.config import NanoGPTConfig
from nanogpt_nb.runs import Run
run, rows, seed = Run(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
dice = random.Random(seed)
with run.lock():
    run.set_status("running")
    for i in range(1, rows + 1):
        run.append(dict(step=i, loss=1 / i), durable=False)
        run.log(f"step {i} é")
        if i % 10 == 0:
            run.save_checkpoint("last", lambda p: [(p / n).write_bytes(dice.randbytes(300_000)) for n in ("model.safetensors", "trainer.pt")], step=i)
            if i % 20 == 0: run.link_checkpoint()
            run.set_status("running", step=i)
        if i % 35 == 0: run.forget_after(i - 5, i)
        time.sleep(0.01)
    run.set_status("finished", step=rows)
"""


def start_writer(run: Run, rows: int, seed: int = 0) -> subprocess.Popen:
    "A process that writes a run as a trainer does: rows, lines, checkpoints that replace each other, and rows that it takes back."
    return subprocess.Popen([sys.executable, "-c", WRITER, str(run.path), str(rows), str(seed)])


def test_pull_brings_all_and_then_nothing(box):
    far = far_run(box)
    (far.path / "wandb" / "offline-run").mkdir(parents=True)
    (far.path / "wandb" / "offline-run" / "run é.wandb").write_bytes(b"\0\1" * 500)
    (far.path / ".lock").touch()
    near = pull("far", "gpu")
    assert near.path == Path("runs/far") and equal(far, near)
    assert (near.path / "wandb/offline-run/run é.wandb").read_bytes() == b"\0\1" * 500
    assert not (near.path / ".lock").exists() and near.state == "finished"
    assert near.remote["home"] is True and near.remote["path"] == str(far.path)
    assert os.path.samefile(near.path / "last/model.safetensors", near.path / "best/model.safetensors")
    (near.path / "notes.md").write_text("mine")
    before = (near.path / "metrics.jsonl").stat()
    box.wire.bytes = 0
    assert equal(far, pull("far", "gpu")) and box.wire.bytes < 8000
    assert (near.path / "metrics.jsonl").stat().st_mtime_ns == before.st_mtime_ns and (near.path / "notes.md").read_text() == "mine"
    assert not list(far.path.glob(".frozen/*"))


def test_pull_takes_what_is_new(box):
    far = far_run(box)
    near = pull("far", "gpu")
    far.append(dict(step=1, loss=3.9))
    far.log("one more")
    save(far, 2, b"other weights" * 1000)
    pull(near)
    assert equal(far, near) and near.checkpoint("last") != near.checkpoint("best")
    assert (near.path / "best/trainer.pt").read_bytes() == b"1"
    far.forget_after(0, 0)
    pull("far")
    assert near.metrics() == far.metrics() and len(near.metrics()) == 1


def test_a_run_that_went_on_here_is_left_alone(box):
    far = far_run(box)
    near = pull("far", "gpu")
    near.log("going on from step 1")
    near.append(dict(step=5, loss=1.0))
    far.append(dict(step=1, loss=3.9))
    was = (near.path / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="gone on here.*--name far-gpu"):
        pull("far", "gpu")
    assert (near.path / "metrics.jsonl").read_bytes() == was
    assert equal(far, pull("far", "gpu", name="far-gpu"))
    with pull("far", "gpu", name="third").lock(), pytest.raises(RunError, match="being trained here"):
        pull("far", "gpu", name="third")


def test_a_run_of_that_name_that_is_another(box):
    far_run(box)
    mine = Run.create(NanoGPTConfig.preset("tiny").replace(seed=7), "far", "runs", state="finished")
    was = mine.about
    with pytest.raises(RunError, match="another run"):
        pull("far", "gpu")
    assert mine.about == was and not mine.remote


def test_which_run(box):
    with pytest.raises(HostError, match="There is no run 'nowhere' on gpu"):
        pull("nowhere", "gpu")
    with pytest.raises(RunError, match="say it with --on HOST"):
        pull("nowhere")
    a, _ = far_run(box, "twin"), far_run(box, "twin", project="other")
    with pytest.raises(HostError, match="2 runs called 'twin'.*give the path"):
        pull("twin", "gpu")
    assert equal(a, pull(str(a.path), "gpu")) and equal(a, pull("~/nanogpt/demo/runs/twin", "gpu", name="again"))
    shutil.rmtree(a.path)
    with pytest.raises(HostError, match="no run folder .* any more"):
        pull("again")


def cut_at(box, near: Run, size: int) -> list[int]:
    "Cut the connection when so many bytes of a checkpoint are here; gets what had come over the wire by then."
    came = []

    def cut():
        until(lambda: sum(p.stat().st_size for p in near.path.glob(".pull/*/*")) >= size, "a part of the checkpoint")
        box.wire.cut()
        box.wire.rate = None
        came.append(box.wire.bytes)

    threading.Thread(target=cut, daemon=True).start()
    return came


def test_a_checkpoint_goes_on_where_the_connection_broke(box):
    far = far_run(box, weights=random.Random(1).randbytes(8_000_000))
    near = Run("runs/far")
    near.path.mkdir(parents=True)
    box.wire.bytes, box.wire.rate = 0, 4_000_000
    host, came = Host.of("gpu"), cut_at(box, near, 2_000_000)
    host.persist(lambda: bring(near, host, str(far.path), "last"))
    assert damage(near.path / "last") is None
    assert box.wire.bytes - came[0] < 7_000_000  # not from the beginning
    assert not (near.path / ".pull").exists() and not list(far.path.glob(".frozen/*"))


def test_without_rsync(box, monkeypatch):
    monkeypatch.setattr(bringing, "rsync_here", lambda path: (None, "rsync is not installed"))
    far = far_run(box, weights=random.Random(2).randbytes(3_000_000))
    (far.path / "wandb").mkdir()
    (far.path / "wandb" / "x").write_text("x")
    box.wire.bytes, box.wire.rate = 0, 2_000_000
    came = cut_at(box, Run("runs/far"), 1_000_000)
    near = pull("far", "gpu")
    assert equal(far, near) and (near.path / "wandb" / "x").read_text() == "x" and box.wire.bytes - came[0] < 2_600_000
    send(near, Host.of("gpu"), str(box.home / "nanogpt/demo/runs/back"))
    assert equal(near, Run(box.home / "nanogpt/demo/runs/back"))


def test_other_bytes_than_were_written_are_not_taken(box):
    far = far_run(box)
    near = pull("far", "gpu")
    save(far, 2, b"new")
    (far.path / "last" / "model.safetensors").write_bytes(b"bad")
    with pytest.raises(HostError, match="other bytes on gpu than training wrote"):
        pull("far", "gpu")
    assert damage(near.path / "last") is None and (near.path / "last/trainer.pt").read_bytes() == b"1"


def test_send_and_come_back(box):
    near = pull(far_run(box).name, "gpu")
    there = box.home / "nanogpt/demo/runs/sent"
    note_remote(near, host=None, path=None)
    (near.path / ".lock").touch()
    send(near, Host.of("gpu"), "~/nanogpt/demo/runs/sent")
    sent = Run(there)
    assert equal(near, sent) and not (there / "remote.json").exists() and not (there / ".lock").exists()
    sent.log("going on from step 1")
    with pytest.raises(RunError, match="bring it home first"):
        send(near, Host.of("gpu"), str(there))
    assert equal(sent, pull(near))
    with sent.lock(), pytest.raises(RunError, match="is being trained on gpu"):
        send(near, Host.of("gpu"), str(there))


def test_metrics_are_here_while_it_trains_and_the_end_comes_last(box):
    far = far_run(box, state="running")
    near, said = Run("runs/far"), []
    pull("far", "gpu")
    with far.lock():
        process = start_following(near)
        far.append(dict(step=1, loss=3.9))
        until(lambda: len(near.metrics()) == 2, "a row")
        save(far, 2, b"w" * 100_000)
        until(lambda: checkpoint_id(near, "last") == checkpoint_id(far, "last"), "a checkpoint")
        assert is_followed(near) and start_following(near) is None and near.status["state"] == "running"
        assert near.remote["home"] is False and time.time() - near.remote["seen"] < 60
        far.set_status("finished", step=2)
        far.log("the end")
    assert process.wait(240) == 0, (near.path / "follow.log").read_text()
    assert equal(far, near) and near.remote["home"] is True and not said
    assert not is_followed(near)


def test_a_follower_ends_with_its_folder(box):
    far = far_run(box, state="running")
    near = pull("far", "gpu")
    with far.lock():
        process = start_following(near)
        until(lambda: "stands" in (near.path / "follow.log").read_text(), "the connection")
        remove(near.path)
        process.wait(240)
    assert not near.path.exists()


def test_the_folder_that_the_hosts_settings_name_is_searched(box, monkeypatch):
    host = Host.of("gpu")
    far = far_run(box)
    (box.home / "project/runs").mkdir(parents=True)
    far.path.rename(box.home / "project/runs/elsewhere")
    with pytest.raises(HostError, match="no run 'elsewhere'"):
        pull("elsewhere", host)
    for path in ("~/project", "project", str(box.home / "project")):
        monkeypatch.setitem(host.settings, "path", path)
        assert pull("elsewhere", host).remote["path"] == str(box.home / "project/runs/elsewhere")
        shutil.rmtree("runs")
    with pytest.raises(HostError, match="ls .*/project/runs nanogpt"):
        pull("nowhere", host)
    far_run(box)
    monkeypatch.setitem(host.settings, "path", "~/nanogpt/demo")
    assert pull("far", host).name == "far"  # found in two ways, and one run


@pytest.mark.parametrize("rsync", [True, False])
def test_a_bar_is_shown_in_a_notebook_too(box, monkeypatch, capsys, rsync):
    monkeypatch.setattr("nanogpt_nb.view.in_notebook", lambda: True)
    monkeypatch.setattr("tqdm.auto.tqdm", lambda **how: tqdm(**(how | dict(delay=0, leave=True, mininterval=0))))
    if not rsync:
        monkeypatch.setattr("nanogpt_nb.remote.pull.rsynced", lambda *args: False)
    far_run(box)
    near = pull("far", "gpu")
    assert "checkpoint of far" in capsys.readouterr().err
    send(near, Host.of("gpu"), "~/nanogpt/demo/runs/sent")
    assert re.search(r"run far: [1-9]", capsys.readouterr().err)
    send(near, Host.of("gpu"), "~/nanogpt/demo/runs/silent", quiet=True)
    assert not capsys.readouterr().err


def test_a_follower_whose_connection_drops_waits_20_s_at_most(box, monkeypatch):
    far_run(box)
    follower, waits = Follower(pull("far", "gpu")), []
    monkeypatch.setattr("nanogpt_nb.remote.follower.time.sleep", waits.append)
    for _ in range(8):
        follower.pause(Dropped("gone"))
    assert waits[0] == 1 and max(waits) == waits[-1] == 20


def test_a_run_that_is_gone_there(box, monkeypatch):
    far = far_run(box)
    near = pull("far", "gpu")
    shutil.rmtree(far.path)
    monkeypatch.setattr("nanogpt_nb.remote.follower.GONE", 0)
    with pytest.raises(HostError, match="no run folder"):
        Follower(near).wait()
    assert "no run folder" in near.remote["error"] and near.metrics()


def test_cuts_while_it_trains(box):
    "The fast twin of faults_pull.py."
    far = far_run(box, state="running")
    near = pull("far", "gpu")
    with start_writer(far, 150) as writer:
        until(lambda: far.is_locked(), "the writer")
        process, dice, cuts = start_following(near), random.Random(3), 0
        while process.poll() is None:
            time.sleep(dice.uniform(0.1, 0.5))  # the random moment
            if writer.poll() is None:
                cuts += box.wire.cut()
    assert process.returncode == 0, (near.path / "follow.log").read_text()
    assert equal(far, near) and cuts >= 1


def test_sshd_is_restarted_while_it_trains(box):
    far = far_run(box, state="running")
    near = pull("far", "gpu")
    with start_writer(far, 100):
        until(lambda: far.is_locked(), "the writer")
        process = start_following(near)
        until(lambda: len(near.metrics()) > 5, "rows")
        box.stop()
        box.start()
        assert process.wait(240) == 0, (near.path / "follow.log").read_text()
    assert equal(far, near)


def test_frames_that_come_twice_or_too_late(tmp_path):
    landing = Landing(Run.create(NanoGPTConfig.preset("tiny"), "a", tmp_path, state="finished"))
    landing.append("log.txt", 0, b"abc")
    landing.append("log.txt", 0, b"ab")
    landing.append("log.txt", 1, b"bcd")
    assert (landing.run.path / "log.txt").read_bytes() == b"abcd"
    for at, data in ((9, b"x"), (2, b"xx")):
        with pytest.raises(Elsewhere):
            landing.append("log.txt", at, data)
    assert (landing.run.path / "log.txt").read_bytes() == b"abcd"


@pytest.mark.parametrize("seed", range(3))
def test_a_tail_gives_the_file_whatever_happens_to_it(tmp_path, seed):
    "Appended, replaced, cut, emptied: after each look the copy is the file."
    dice, file, copy = random.Random(seed), tmp_path / "f", bytearray()
    tail = Tail(file)
    for _ in range(150):
        match dice.randrange(6):
            case 0:
                (tmp_path / "new").write_bytes(dice.randbytes(dice.randrange(600_000)))
                (tmp_path / "new").replace(file)
            case 1 if file.exists():
                (tmp_path / "new").write_bytes(file.read_bytes() + b"more")
                (tmp_path / "new").replace(file)
            case 2 if file.exists():
                os.truncate(file, dice.randrange(file.stat().st_size + 1))
            case _:
                with open(file, "ab") as f:
                    f.write(dice.randbytes(dice.randrange(1000)))
        for frame, data in news(tail):
            if frame["whole"] and frame["at"] == 0:
                copy.clear()
            assert len(copy) == frame["at"]
            copy += data
        assert bytes(copy) == file.read_bytes()


def test_a_look_at_a_run_that_is_not_there(tmp_path):
    assert [list(f) for f in look(str(tmp_path / "x"))] == [["going", "gone"]]


def test_a_status_that_ended_waits_for_the_checkpoints(box):
    far = far_run(box)
    landing = Landing(Run("runs/far"))
    landing.run.path.mkdir(parents=True)
    list(landing.look(Host.of("gpu"), str(far.path)))
    assert landing.run.about == far.about and not landing.run.status
    landing.settle()
    assert landing.run.status["state"] == "finished"


def test_names_that_lead_out_of_the_folder(box):
    far = far_run(box)
    landing = Landing(Run("runs/far"))
    landing.run.path.mkdir(parents=True)
    with pytest.raises(HostError, match="not asked for"):
        landing.take(dict(file="../evil", at=0, whole=True, last=True), b"x")
    note = json.loads((far.path / "last/checkpoint.json").read_text())
    note["files"]["../../evil"] = note["files"]["model.safetensors"]
    shutil.copy(far.path / "last/model.safetensors", far.path.parent / "evil")
    (far.path / "last/checkpoint.json").write_text(json.dumps(note))
    with pytest.raises(HostError, match="outside the run's folder"):
        pull("far", "gpu")
    assert not list(Path.cwd().rglob("evil"))


def test_no_room_here(box):
    "A limit on the size of files stands for a disk that is full."
    far = far_run(box, weights=random.Random(4).randbytes(3_000_000))
    code = "import resource, signal, sys; from nanogpt_nb.remote.pull import pull; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000,) * 2); pull('far', 'gpu', quiet=True)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    assert "cannot be written (File too large;" in said and "what has come is kept" in said, said
    assert Run("runs/far").metrics() == far.metrics() and not (Path("runs/far") / "last").exists()
    assert equal(far, pull("far", "gpu"))


def test_the_follower_of_a_job(box):
    "The job knows best when a run has ended; one that is gone leaves the word to the folder."
    far = far_run(box, state="starting")
    host, near = Host.of("gpu"), pull("far", "gpu")
    job = host.start([sys.executable, "-c", WRITER, str(far.path), "30", "1"], env=dict(PYTHONPATH=str(Path(__file__).parent.parent)))
    note_remote(near, job=job.id)
    assert equal(far, Follower(near).wait()) and far.status["state"] == "finished"
    assert near.remote["job_state"]["state"] == "finished" and near.remote["home"] is True
    note_remote(near, job="no-such-job")
    pull(near)
    assert near.remote["job_state"]["state"] == "gone" and equal(far, near)


def test_a_follower_tells_what_is_damaged_there_and_ends(box):
    far = far_run(box)
    near = pull("far", "gpu")
    save(far, 2, b"new")
    (far.path / "last" / "model.safetensors").write_bytes(b"bad")
    far.append(dict(step=2, loss=1.0))
    with pytest.raises(HostError, match="other bytes on gpu"):
        Follower(near).wait()
    assert near.metrics() == far.metrics() and near.status["state"] == "finished" and "other bytes" in near.remote["error"]


def test_the_follower_has_no_torch(box):
    code = "import sys, nanogpt_nb.remote.follower; print([m for m in ('torch', 'numpy', 'paramiko', 'wandb') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_a_slow_line_brings_what_it_began(box, monkeypatch):
    "Training makes new checkpoints faster than the line, which breaks, brings one: the one that was begun comes first."
    far = far_run(box, weights=random.Random(1).randbytes(4_000_000))
    near, host = Run("runs/far"), Host.of("gpu")
    near.path.mkdir(parents=True)
    host.call("there.hello")  # the line is well before it is cut
    box.wire.rate, box.wire.bytes, came = 2_000_000, 0, cut_at(box, near, 1_000_000)
    steps, move_in = [], bringing.move_in

    def spy(run, still, *args):
        steps.append(still["step"])
        move_in(run, still, *args)

    monkeypatch.setattr(bringing, "move_in", spy)
    with monkeypatch.context() as impatient, pytest.raises(HostError):
        impatient.setattr(host, "persist", lambda once: once())
        bring(near, host, str(far.path), "last")
    assert near.path.joinpath(".pull").exists()
    save(far, 2, random.Random(2).randbytes(4_000_000))
    bring(near, host, str(far.path), "last")
    assert steps == [1, 1, 2] and checkpoint_id(near, "last") == checkpoint_id(far, "last") and box.wire.bytes - came[0] < 7_700_000
    assert not list(far.path.glob(".frozen/*")) and not (near.path / ".pull").exists()
