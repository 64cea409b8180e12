"The run folder: half lines, dead processes, copies, damage, and the way runs are found."

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_nb.config import NanoGPTConfig
from nanogpt_nb.runs import Run, RunError, find_run, list_runs

CONFIG = NanoGPTConfig.preset("tiny")


@pytest.fixture
def runs_dir(tmp_path):
    return tmp_path / "runs"


def save(run, text, which="last"):
    run.save_checkpoint(which, lambda folder: (folder / "model.txt").write_text(text), step=1)


def saved(run, which="last"):
    return (run.checkpoint(which) / "model.txt").read_text()


def test_a_new_run_never_takes_the_place_of_another(runs_dir):
    Run.create(CONFIG, "a", runs_dir)
    with pytest.raises(RunError, match="exists already"):
        Run.create(CONFIG, "a", runs_dir)
    assert [p.name for p in runs_dir.iterdir()] == ["a"]
    unnamed = {Run.create(CONFIG, None, runs_dir).name for _ in range(3)}
    assert len(unnamed) == 3 and len(list_runs(runs_dir)) == 4


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "-flag", "a b", "a\nb"])
def test_a_name_that_cannot_be_a_folder(name, runs_dir):
    with pytest.raises(RunError, match="cannot name a run"):
        Run.create(CONFIG, name, runs_dir)
    assert not runs_dir.exists()


@pytest.mark.parametrize("where", ["/dev/null/runs", "/proc/runs"])
def test_a_place_where_no_run_can_be_made(where):
    with pytest.raises(RunError, match="--runs-dir"):
        Run.create(CONFIG, "a", where)


def create(runs_dir, names):
    names.put(Run.create(CONFIG, None, runs_dir).name)


def test_many_begin_in_the_same_second(runs_dir):
    context = multiprocessing.get_context("fork")
    names = context.Queue()
    processes = [context.Process(target=create, args=(runs_dir, names)) for _ in range(8)]
    [p.start() for p in processes]
    found = {names.get(timeout=240) for _ in processes}
    [p.join() for p in processes]
    assert len(found) == 8 and {r.name for r in list_runs(runs_dir)} == found


@settings(deadline=None)
@given(st.data())
def test_metrics_cut_anywhere_keep_their_whole_lines(data):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(CONFIG, "a", folder)
        rows = [dict(step=i, val_loss=4.0 - i / 10) for i in range(5)]
        for r in rows:
            run.append(r)
        whole = (run.path / "metrics.jsonl").read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        (run.path / "metrics.jsonl").write_bytes(whole[:cut])
        kept = run.metrics()
        assert kept == rows[: len(kept)] and len(kept) >= whole[:cut].count(b"\n")
        run.append(dict(step=9))
        assert run.metrics() == [*kept, dict(step=9)]


def test_a_loss_that_is_no_number_is_not_written(runs_dir):
    run = Run.create(CONFIG, "a", runs_dir)
    with pytest.raises(ValueError):
        run.append(dict(step=1, val_loss=float("nan")))
    assert run.metrics() == []


HOLD = "import sys; from nanogpt_nb.runs import Run\nwith Run(sys.argv[1]).lock():\n    Run(sys.argv[1]).set_status('running', step=0); print('held', flush=True); sys.stdin.read()"


def test_a_dead_trainer_is_told_from_a_living_one(runs_dir):
    run = Run.create(CONFIG, "a", runs_dir)
    process = subprocess.Popen([sys.executable, "-c", HOLD, run.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    assert run.state == "running"
    with pytest.raises(RunError, match=f"process {process.pid}"), run.lock(patience=0.05):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run.state == "killed"
    with run.lock():
        assert run.state == "running"


def test_looking_does_not_keep_a_trainer_out(runs_dir):
    "One process asks for the state all the time; the lock is had all the same."
    run = Run.create(CONFIG, "a", runs_dir)
    look = "import sys; from nanogpt_nb.runs import Run; r = Run(sys.argv[1]); print('looking', flush=True)\nwhile True: r.state"
    process = subprocess.Popen([sys.executable, "-c", look, run.path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "looking\n"
        for _ in range(50):
            with run.lock():
                pass
    finally:
        process.kill()
        process.communicate()


def test_a_copy_from_another_machine_goes_by_its_heartbeat(runs_dir):
    run = Run.create(CONFIG, "a", runs_dir)

    def status(ago):
        (run.path / "status.json").write_text(json.dumps(dict(state="running", host="far-away", heartbeat=time.time() - ago)))
        return run.state

    assert status(5) == "running" and status(3600) == "lost"


def test_a_checkpoint_is_found_at_each_stage_of_being_replaced(runs_dir):
    run = Run.create(CONFIG, "a", runs_dir)
    with pytest.raises(RunError, match="no checkpoint 'last' yet"):
        run.checkpoint()
    save(run, "one")
    # Killed while the new one is being written: its list of files is not there yet.
    (run.path / ".last.new").mkdir()
    (run.path / ".last.new" / "model.txt").write_text("tw")
    assert saved(run) == "one"
    # Killed between the two renames: the new one is whole, the old one moved aside.
    shutil.rmtree(run.path / ".last.new")
    shutil.copytree(run.path / "last", run.path / ".last.new")
    (run.path / "last").rename(run.path / ".last.old")
    assert saved(run) == "one"
    # The next one clears up.
    save(run, "two")
    assert saved(run) == "two" and not [p for p in run.path.iterdir() if p.name.startswith(".last")]


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "longer"])
def test_damage_is_noticed(damage, runs_dir):
    run = Run.create(CONFIG, "a", runs_dir)
    save(run, "weights")
    run.link_checkpoint()
    path = run.path / "last" / "model.txt"
    path.unlink()  # what best shares stays
    if damage != "gone":
        path.write_text({"cut": "weigh", "flipped": "weighty", "longer": "weights!"}[damage])
    with pytest.raises(RunError, match="damaged.*--checkpoint best"):
        run.checkpoint()
    assert saved(run, "best") == "weights"


def test_best_is_shared_where_the_file_system_can_and_copied_elsewhere(runs_dir, monkeypatch):
    run = Run.create(CONFIG, "a", runs_dir)
    save(run, "one")
    run.link_checkpoint()
    assert os.path.samefile(run.path / "best" / "model.txt", run.path / "last" / "model.txt")

    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    save(run, "two")
    run.link_checkpoint()
    assert saved(run, "best") == "two" and not os.path.samefile(run.path / "best" / "model.txt", run.path / "last" / "model.txt")


def test_a_failed_write_leaves_no_trace(runs_dir):
    run = Run.create(CONFIG, "a", runs_dir)
    save(run, "one")

    def fail(folder):
        (folder / "model.txt").write_text("tw")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint("last", fail)
    assert saved(run) == "one" and not (run.path / ".last.new").exists()


def test_runs_are_found_by_name_path_and_age(runs_dir, tmp_path):
    with pytest.raises(RunError, match="There are no runs in"):
        find_run(None, runs_dir)
    for i, name in enumerate(["old", "new", "newer"]):
        Run.create(CONFIG, name, runs_dir, created=f"2026-01-0{i + 1}T00:00:00+00:00")
    (runs_dir / "not-a-run").mkdir()
    (runs_dir / ".new-123").mkdir()
    (runs_dir / ".new-123" / "config.json").write_text("{}")
    assert [r.name for r in list_runs(runs_dir)] == ["newer", "new", "old"]
    assert find_run(None, runs_dir).name == "newer"
    assert find_run("old", runs_dir) == find_run(runs_dir / "old", tmp_path) == Run(runs_dir / "old")
    with pytest.raises(RunError, match=r"no run 'nwe'.*new"):
        find_run("nwe", runs_dir)


def test_broken_files_of_one_run_do_not_hide_the_others(runs_dir):
    Run.create(CONFIG, "good", runs_dir)
    bad = Run.create(CONFIG, "bad", runs_dir)
    (bad.path / "config.json").write_text('{"conf')
    (bad.path / "status.json").write_text("")
    rows = {r["name"]: r for r in (run.summary() for run in list_runs(runs_dir))}
    assert set(rows) == {"good", "bad"} and rows["bad"]["state"] == "unknown"
    with pytest.raises(RunError, match="not a run folder"):
        bad.config  # noqa: B018 (reading it is the test)


HUGE = "1" + 400 * "0"
GARBAGE = [f'{{"step": 1, "val_loss": {HUGE}}}', f'{{"step": {HUGE}, "heartbeat": {HUGE}}}', "[1, 2]", "3", '"abc"', "{}", '{"step": "x"}', '{"step": 1, "val_loss": "low", "seconds": [1]}', '{"step": 2, "val_loss": NaN}', "[" * 100000]


@pytest.mark.parametrize("file", ["metrics.jsonl", "status.json", "config.json"])
@pytest.mark.parametrize("garbage", [*GARBAGE, '{"state": ["a"], "heartbeat": "x", "host": 3}', '{"config": {}, "corpus": [], "created": 3}'])
def test_garbage_in_one_run_is_passed_over(file, garbage, runs_dir):
    good, bad = Run.create(CONFIG, "good", runs_dir), Run.create(CONFIG, "bad", runs_dir)
    good.append(dict(step=0, val_loss=4.0))
    (bad.path / file).write_text(garbage)
    rows = {r["name"]: r for r in (run.summary() for run in list_runs(runs_dir))}
    assert rows["good"]["val_loss"] == 4.0 and rows["bad"]["val_loss"] is None
    json.dumps(list(rows.values()), allow_nan=False)
    assert bad.state and bad.samples() == []
    bad.forget_after(0)
    assert "good" in [run.name for run in list_runs(runs_dir)] and all(run.summary()["name"] for run in list_runs(runs_dir))


def test_importing_it_needs_only_the_standard_library():
    words = "import sys, nanogpt_nb.runs; print(sorted({m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)))"
    import ast

    outside = ast.literal_eval(subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {os.getcwd()!r}); {words}"],
                                              capture_output=True, text=True, check=True).stdout)  # fmt: skip
    assert set(outside) <= {"__main__", "nanogpt_nb"}
