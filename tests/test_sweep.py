"Spaces, sweeps that are killed, stopped, shared and damaged, their pictures, and the learning-rate finder."

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from nanogpt_nb.checkpoints import RunError
from nanogpt_nb.config import ConfigError, NanoGPTConfig
from nanogpt_nb.runs import Run
from nanogpt_nb.space import Space, dimension, make_space, read_space
from nanogpt_nb.study import Sweep, find_sweep
from nanogpt_nb.sweep import _Face, parse_sweep, sweep, train_command

FOLDER = tempfile.TemporaryDirectory()
TEXT = (str(Path(FOLDER.name, "text.txt")),)
Path(*TEXT).write_text("\n".join(f"{i} times {i} is {i * i}, and {i} more is {i * i + i}." for i in range(600)))
TINY = NanoGPTConfig.preset("tiny").replace(block_size=8, max_iters=12, eval_interval=4, eval_iters=2, sample_tokens=0, data=TEXT)


@pytest.fixture
def runs_dir(tmp_path):
    return tmp_path / "runs"


# The space


@pytest.mark.parametrize(
    "space, words",
    [
        ({"learning_rat": (1e-4, 1e-2)}, ["learning_rat", "did you mean learning_rate"]),
        ({"zzz": [1]}, ["zzz", "not a hyperparameter"]),
        ({"learning_rate": (1e-2, 1e-4)}, ["0.01 to 0.0001", "lower end first"]),
        ({"learning_rate": (0.0, 1e-2)}, ["learning_rate=0.0", "more than 0"]),
        ({"dropout": (0.0, 0.3, "log")}, ["dropout from 0", "log scale"]),
        ({"dropout": (0.0, 0.3, "logg")}, ["'logg'", "log, linear"]),
        ({"dropout": (0.0, 1.0)}, ["dropout=1.0", "below 1"]),
        ({"n_layer": (2, 4, 0.5)}, ["n_layer", "whole"]),
        ({"n_layer": (2.5, 4)}, ["n_layer=2.5", "whole number"]),
        ({"n_layer": [0, 2]}, ["n_layer=0", "at least 1"]),
        ({"n_layer": (2,)}, ["n_layer", "not a range"]),
        ({"n_layer": (2, 4, 6, 8)}, ["n_layer", "not a range"]),
        ({"n_layer": []}, ["n_layer", "no values"]),
        ({"n_layer": 4}, ["n_layer=4", "one value"]),
        ({"optimizer": "adamw"}, ["optimizer='adamw'", "one value"]),
        ({"optimizer": ["sgd"]}, ["'sgd'", "adamw, muon"]),
        ({"bias": [0, 1]}, ["bias=0", "True or False"]),
        ({"tokenizer": ["char", "bpe"]}, ["tokenizer", "cannot be compared"]),
        ({"n_embd": [32, 48], "num_heads": [5, 7]}, ["No combination", "divisible by num_heads=5"]),
        ({}, ["nothing to search"]),
        (None, ["nothing to search"]),
        (["n_layer"], ["nothing to search"]),
    ],
    ids=str,
)
def test_a_space_that_cannot_be_is_refused_in_one_sentence(space, words):
    with pytest.raises(ConfigError) as caught:
        make_space(space, TINY)
    said = str(caught.value)
    assert "\n" not in said and said.endswith((".", "?")) and caught.value.exit_code == 2
    for word in words:
        assert word in said


def test_numbers_of_numpy_are_numbers():
    assert dimension("learning_rate", np.logspace(-4, -2, 3)) == dimension("learning_rate", [float(v) for v in np.logspace(-4, -2, 3)])
    assert dimension("n_layer", np.array([2, 4])).choices == (2, 4)
    assert dimension("learning_rate", (np.float64(1e-4), np.float32(1e-2))).log


@pytest.mark.parametrize("spec, log", [((1e-4, 1e-2), True), ((1e-3, 2e-3), False), ((1e-4, 1e-2, "linear"), False), ((1e-3, 2e-3, "log"), True)])
def test_the_scale_is_logarithmic_over_a_factor_of_ten_or_as_one_says(spec, log):
    assert dimension("learning_rate", spec).log is log


@pytest.mark.parametrize("space", [{"dropout": (0.0, 0.3, 0.1)}, {"n_embd": (32, 64, 16), "bias": [True, False]}, {"n_layer": (2, 5)}])
def test_every_point_of_a_grid_is_in_the_space_and_survives_a_file(space):
    made = make_space(space, TINY)
    points = list(made.points())
    assert len(points) == made.size == len({json.dumps(p) for p in points})
    for p in points:
        assert made.settings(p) == p
        assert all(min(d.choices or (d.low,)) <= p[d.name] <= max(d.choices or (d.high,)) for d in made.dims)
    assert Space.from_dict(json.loads(json.dumps(made.to_dict())), TINY) == made


@pytest.mark.parametrize(
    "words, space",
    [
        (["learning_rate=1e-4:1e-2:log"], {"learning_rate": (1e-4, 1e-2, "log")}),
        (["learning-rate=0.1,1"], {"learning_rate": [0.1, 1]}),
        (["n_embd=32:128:32", "bias=true,False"], {"n_embd": (32, 128, 32), "bias": [True, False]}),
        (["optimizer=adamw,muon"], {"optimizer": ["adamw", "muon"]}),
    ],
)
def test_a_space_is_read_as_it_is_typed(words, space):
    assert read_space(words) == space


@pytest.mark.parametrize("words", [["learning_rate"], ["learning_rate="], ["=1,2"], ["n_layer=2", "n_layer=4"], ["n_layer=a,b"], ["n_layer=2:"], ["bias=maybe,true"]])
def test_words_that_are_no_space_are_refused(words):
    with pytest.raises(ConfigError):
        make_space(read_space(words), TINY)


# A sweep that is killed


def kill_sweep(folder: Path, *numbers) -> dict:
    done = subprocess.run([sys.executable, Path(__file__).with_name("kill_sweep.py"), folder, *map(str, numbers)],
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_again_and_again_a_sweep_ends_as_if_nothing_had_been(kills, tmp_path):
    told = kill_sweep(tmp_path / "runs" / "lr", kills, 1)
    assert set(told["points"].values()) == {signal.SIGKILL}
    assert sum(told["kills"].values()) == kills
    assert told["codes"] == [0, 0]
    assert told["outcome"] == told["unkilled"]
    assert len(told["outcome"]) == 8


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_two_processes_share_a_sweep_and_both_are_killed(kills, tmp_path):
    told = kill_sweep(tmp_path / "runs" / "lr", kills, 2, 2)
    assert told["codes"] == [0, 0]
    assert [r[2] for r in told["outcome"]] == [s for s in (r[2] for r in told["outcome"]) if s in ("finished", "pruned")]
    assert len(told["outcome"]) == 8 == len({json.dumps(r[1]) for r in told["outcome"]})
    for _, _, _, _, steps in told["outcome"]:
        assert steps == sorted(set(steps))


# A sweep that is stopped

CODE = """
import sys
from nanogpt_nb.args import exit_code
from nanogpt_nb.sweep import parse_sweep, sweep_from_args
sys.exit(exit_code(lambda: sweep_from_args(parse_sweep())))
"""
ENDLESS = "--preset tiny --space n_layer=1,2 --max-iters 1000000 --eval-interval 20 --eval-iters 1 --sample-tokens 0 --name n --data".split() + [*TEXT]


def start(*words, cwd) -> subprocess.Popen:
    "The command, with its output in a pipe."
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, "-c", CODE, *words], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(what, process, seconds=300):
    "Wait until `what()` is true, while the process goes on."
    until = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_signal_stops_trial_and_sweep_and_the_same_command_goes_on(tmp_path):
    run = Run(tmp_path / "runs" / "n-000")
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        steps = len(run.estimates()) if run.path.exists() else 0
        process = start(*ENDLESS, cwd=tmp_path)
        wait_for(lambda: run.path.exists() and len(run.estimates()) > steps + 1, process)  # noqa: B023
        process.send_signal(number)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == code, said
        assert "the same command goes on" in said and "1 stopped" in said
        assert run.state == "stopped" and run.checkpoint()
    assert "going on from step" in (run.path / "log.txt").read_text()
    assert [(r["run"], r["state"]) for r in find_sweep("n", run.path.parent).rows()] == [("n-000", "stopped")]
    assert not (tmp_path / "runs" / "n-001").exists()


def test_two_commands_work_on_different_trials(tmp_path):
    runs, both = tmp_path / "runs", []
    try:
        for number in range(2):
            both.append(start(*ENDLESS, cwd=tmp_path))
            wait_for(lambda: Run(runs / f"n-00{number}").path.exists() and Run(runs / f"n-00{number}").estimates(), both[-1])  # noqa: B023
        assert [r["state"] for r in find_sweep("n", runs).rows()] == ["running", "running"]
        third = sweep(None, name="n", trials=2, runs_dir=runs, quiet=True)  # finds nothing to begin, and waits for nobody
        assert [r["state"] for r in third.rows()] == ["running", "running"]
    finally:
        for process in both:
            process.kill()
            process.wait()
            process.stdout.close()
    assert [r["state"] for r in find_sweep("n", runs).rows()] == ["stopped", "stopped"]


# What a sweep meets


def test_trials_are_ordinary_runs_of_a_group(runs_dir):
    found = sweep({"learning_rate": (1e-3, 1e-1)}, TINY, trials=3, method="random", name="lr", runs_dir=runs_dir, quiet=True)
    for row in found.rows():
        run = found.run(row["number"])
        assert run.about["group"] == "lr" and run.config.learning_rate == row["settings"]["learning_rate"]
        assert row["val_loss"] == min(e["val_loss"] for e in run.estimates())
    assert found.best_run.config == found.best_config
    losses = [r["val_loss"] for r in found.rows() if r["state"] == "finished"]
    assert losses == sorted(losses)


def test_hopeless_trials_are_pruned_and_say_so(runs_dir):
    space = {"learning_rate": [1e-2, 2e-2, 1e-8, 1e-7]}
    found = sweep(space, TINY.replace(max_iters=24), method="grid", name="lr", runs_dir=runs_dir, quiet=True)
    state = {r["settings"]["learning_rate"]: r["state"] for r in found.rows()}
    assert state == {1e-2: "finished", 2e-2: "finished", 1e-8: "pruned", 1e-7: "pruned"}
    pruned = found.run(2)
    assert pruned.state == "stopped" and pruned.status["reason"].startswith("pruned at step")
    assert max(e["step"] for e in pruned.estimates()) < 24
    whole = sweep(space, TINY.replace(max_iters=24), method="grid", prune=False, name="all", runs_dir=runs_dir, quiet=True)
    assert {r["state"] for r in whole.rows()} == {"finished"}


def test_a_trial_that_diverges_has_failed_and_the_search_goes_on(runs_dir):
    found = sweep({"learning_rate": [1e6, 1e-2]}, TINY, method="grid", name="wild", runs_dir=runs_dir, quiet=True)
    rows = {r["settings"]["learning_rate"]: r for r in found.rows()}
    assert rows[1e6]["state"] == "failed" and "learning_rate" in rows[1e6]["note"]
    assert rows[1e-2]["state"] == "finished" and found.best_config.learning_rate == 1e-2


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_where_there_is_an_end_of_combinations_each_is_tried_once(method, runs_dir):
    space = {"n_embd": [8, 12], "num_heads": [2, 3]}
    found = sweep(space, TINY.replace(max_iters=4), trials=50, method=method, prune=False, name="few", runs_dir=runs_dir, quiet=True)
    assert sorted(tuple(r["settings"].values()) for r in found.rows()) == [(8, 2), (12, 2), (12, 3)]


def test_a_full_disk_ends_the_search_and_the_trial_waits(runs_dir, monkeypatch):
    def full(self, *args, **about): raise OSError(28, "No space left on device")
    space = {"n_layer": [1, 2]}
    with monkeypatch.context() as m:
        m.setattr(Run, "save_checkpoint", full)
        with pytest.raises(RunError, match="No space left"):
            sweep(space, TINY, method="grid", name="n", runs_dir=runs_dir, quiet=True)
    assert [r["state"] for r in find_sweep("n", runs_dir).rows()] == ["stopped"]
    found = sweep(space, TINY, method="grid", name="n", runs_dir=runs_dir, quiet=True)
    assert [r["state"] for r in found.rows()] == ["finished"] * 2


def test_a_trial_with_a_damaged_checkpoint_is_put_aside_and_done_again(runs_dir, monkeypatch):
    space, tell = {"n_layer": [1]}, "optuna.study.Study.tell"
    with monkeypatch.context() as m:
        m.setattr(tell, lambda *a, **k: (_ for _ in ()).throw(RuntimeError("killed here")))
        with pytest.raises(RuntimeError, match="killed here"):
            sweep(space, TINY, method="grid", name="n", runs_dir=runs_dir, quiet=True)
    run = find_sweep("n", runs_dir).run(0)
    weights = run.checkpoint() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\0")
    found = sweep(space, TINY, method="grid", name="n", runs_dir=runs_dir, quiet=True)
    assert found.run(0).checkpoint() and [r["state"] for r in found.rows()] == ["finished"]
    assert len(list((found.path / "damaged").iterdir())) == 1


@pytest.mark.parametrize("how", ["missing", "empty", "garbage", "of another sweep", "malformed"])
def test_an_account_that_cannot_be_read_is_told_in_a_sentence(how, runs_dir):
    space = {"n_layer": [1, 2]}
    db = sweep(space, TINY, trials=1, method="grid", name="n", runs_dir=runs_dir, quiet=True).path / "study.db"
    if how == "missing":
        db.unlink()
    elif how == "of another sweep":
        shutil.copy(sweep(space, TINY, trials=1, method="grid", name="m", runs_dir=runs_dir, quiet=True).path / "study.db", db)
    elif how == "malformed":
        db.write_bytes(db.read_bytes()[:4096] + b"\xff" * 4096 * 3 + db.read_bytes()[4096 * 4 :])
    else:
        db.write_bytes(b"" if how == "empty" else b"This is no database. " * 1000)
    before = db.read_bytes() if db.exists() else None
    for ask in (lambda: find_sweep("n", runs_dir).rows(), lambda: sweep(None, name="n", runs_dir=runs_dir, quiet=True)):
        with pytest.raises(RunError, match="study.db cannot be used .*the runs are whole") as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert (db.read_bytes() if db.exists() else None) == before
    assert find_sweep("n", runs_dir).run(0).checkpoint()


@pytest.mark.parametrize("what", ["report", "should_prune"])
def test_an_account_on_a_full_disk_is_told_and_the_trial_waits(what, runs_dir, monkeypatch):
    import optuna

    space, real = {"n_layer": [1, 2]}, getattr(optuna.trial.Trial, what)

    def full(self, *args):
        "SQLite's own words, as far as they can be had without a disk to fill."
        with self.study._storage._backend.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA query_only = ON" if what == "report" else "ALTER TABLE trials RENAME TO gone")
        return real(self, *args)

    with monkeypatch.context() as m:
        m.setattr(optuna.trial.Trial, what, full)
        with pytest.raises(RunError, match="study.db cannot be used .*(readonly|no such table).*the runs are whole"):
            sweep(space, TINY, method="grid", name="n", runs_dir=runs_dir, quiet=True)
    assert "study.db cannot be used" in Run(runs_dir / "n-000").status["error"]
    if what == "report":
        found = sweep(space, TINY, method="grid", name="n", runs_dir=runs_dir, quiet=True)
        assert [r["state"] for r in found.rows()] == ["finished"] * 2


def test_a_run_of_somebody_else_is_not_touched(runs_dir):
    mine = Run.create(TINY, "n-000", runs_dir)
    before = sorted(p.name for p in mine.path.iterdir())
    with pytest.raises(RunError, match="not of the sweep"):
        sweep({"n_layer": [1]}, TINY, method="grid", name="n", runs_dir=runs_dir, quiet=True)
    assert sorted(p.name for p in mine.path.iterdir()) == before


@pytest.mark.parametrize(
    "how, words",
    [
        (dict(method="bayes"), "tpe, random, grid"),
        (dict(trials=0), "trials=0"),
        (dict(trials=2.5), "trials=2.5"),
        (dict(name="a/b"), "cannot name a sweep"),
        (dict(base={"n_layer": 2}), "not a NanoGPTConfig"),
        (dict(space=None), "nothing to search"),
        (dict(space=None, name="none"), "There are no sweeps"),
        (dict(method="grid"), "no end of values"),
    ],
)
def test_what_cannot_be_searched_is_said_before_anything_is_made(how, words, runs_dir):
    with pytest.raises((ConfigError, RunError), match=words) as caught:
        sweep(**(dict(space={"learning_rate": (1e-4, 1e-2)}, base=TINY, runs_dir=runs_dir, quiet=True) | how))
    assert caught.value.exit_code == 2
    assert not runs_dir.exists()


def test_another_search_under_the_same_name_is_refused_and_more_trials_are_not(runs_dir):
    space = {"learning_rate": (1e-3, 1e-1)}
    sweep(space, TINY, trials=1, name="lr", runs_dir=runs_dir, quiet=True)
    for other in (dict(space={"learning_rate": (1e-3, 1e-2)}), dict(base=TINY.replace(n_layer=3))):
        with pytest.raises(ConfigError, match="another name"):
            sweep(**(dict(space=space, base=TINY) | other), name="lr", runs_dir=runs_dir, quiet=True)
    assert len(sweep(None, name="lr", trials=2, runs_dir=runs_dir, quiet=True).rows()) == 2


def test_a_sweep_that_was_moved_goes_on(runs_dir, tmp_path):
    space = {"learning_rate": (1e-3, 1e-1)}
    sweep(space, TINY, trials=1, name="lr", runs_dir=runs_dir, quiet=True)
    there = tmp_path / "else where 100%?"
    shutil.move(runs_dir, there)
    assert len(sweep(space, TINY, trials=2, name="lr", runs_dir=there, quiet=True).rows()) == 2


# What it shows


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    space = {"learning_rate": (1e-4, 1e-1), "n_layer": [1, 2], "bias": [True, False], "dropout": (0.0, 0.3), "warmup_iters": (0, 3)}
    return sweep(space, TINY, trials=8, name="show", runs_dir=tmp_path_factory.mktemp("runs"), quiet=True)


@pytest.mark.parametrize("kind", ["parallel", "importance", "slice"])
def test_pictures_are_png_and_a_sentence(kind, searched):
    picture = getattr(searched, f"plot_{kind}")()
    assert picture._repr_png_().startswith(b"\x89PNG")
    assert "learning_rate" in repr(picture) and "\n" not in repr(picture)


def test_the_table_is_text_and_html_of_the_same_rows(searched):
    rows = searched.rows()
    assert repr(searched).count("\n") == len(rows) + 1
    assert searched._repr_html_().count("<tr>") == len(rows) + 1
    for row in rows:
        assert row["run"] in repr(searched) and row["run"] in searched._repr_html_()
    assert set(searched.to_pandas().run) == {r["run"] for r in rows}


def test_pictures_of_too_few_trials_say_what_to_do(runs_dir):
    found = sweep({"n_layer": [1]}, TINY.replace(max_iters=2), method="grid", name="n", runs_dir=runs_dir, quiet=True)
    with pytest.raises(RunError, match="needs 4"):
        found.plot_importance()
    assert "n_layer" in repr(found.plot_parallel()) and "n_layer" in repr(found.plot_slice())


def test_the_command_that_trains_longer_gives_the_same_configuration():
    from nanogpt_nb.args import parse_train

    config = NanoGPTConfig.preset("cpu").replace(learning_rate=0.0123, n_layer=3, qk_norm=False, bias=True, max_iters=77)
    words = train_command(config).split()
    assert words[0] == "train" and parse_train(words[1:]).config == config


def test_the_words_of_the_command():
    args = parse_sweep("--preset tiny --space learning_rate=1e-4:1e-2 --no-prune --max-iters 5".split())
    assert args.given == {"preset", "max_iters", "prune"} and args.prune is False and args.config.n_layer == NanoGPTConfig.preset("tiny").n_layer
    for wrong in (["--method", "bayes"], ["--trials", "many"]):
        with pytest.raises(SystemExit):
            parse_sweep(wrong)


def test_looking_costs_no_torch(tmp_path):
    code = "import nanogpt_nb.study, nanogpt_nb.pictures, nanogpt_nb.space, nanogpt_nb.sweep, sys; print([m for m in ('torch', 'optuna', 'sqlite3', 'matplotlib', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    assert Sweep(tmp_path / "none.sweep").about == {}


# In a notebook


class Handle:
    "Keeps what a notebook would show."

    def __init__(self):
        self.shown = []

    def update(self, data, raw):
        self.shown.append(data["text/plain"])


def test_in_a_notebook_the_news_of_wandb_stay_in_sight(runs_dir, capsys):
    found = sweep({"n_layer": [1]}, TINY, method="grid", name="n", runs_dir=runs_dir, quiet=True)
    (found.run(0).path / "wandb.json").write_text(json.dumps({"news": ["W&B keeps it here.", "Another sentence."]}))
    handle = Handle()
    with _Face(found, False) as face:
        face.handle = handle
        face.ended(0)
        face.step(0, {"step": 4, "val_loss": 2.0})
    assert len(handle.shown) == 3
    for text in handle.shown:
        assert text.splitlines()[1:] == ["W&B keeps it here."]
    with _Face(found, False) as face:
        face.ended(0)
        face.ended(0)
    assert capsys.readouterr().out.count("W&B keeps it here.") == 1


def test_in_a_notebook_one_line_changes_and_an_interrupt_stops_gracefully(tmp_path):
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(cwd=str(tmp_path), env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        told = []
        hear = lambda m: told.append((m["header"]["msg_type"], m["content"]))
        code = f"from nanogpt_nb.config import NanoGPTConfig\nfrom nanogpt_nb.sweep import sweep\nbase = NanoGPTConfig.preset('tiny').replace(max_iters=8, data={TEXT!r})\n"
        client.execute_interactive(code + "sweep({'n_layer': [1, 2]}, base, method='grid', name='short')", output_hook=hear, timeout=300)
        assert [k for k, _ in told if k not in ("status", "execute_input", "update_display_data")] == ["display_data", "execute_result"]
        last = [c["data"]["text/plain"] for k, c in told if k == "update_display_data"][-1]
        assert "2 finished" in last and "<table>" in told[-2][1]["data"]["text/html"]

        client.execute("found = sweep({'n_layer': [1, 2]}, base.replace(max_iters=10**6, eval_interval=20, eval_iters=1), name='long')")
        run = Run(tmp_path / "runs" / "long-000")
        until = time.monotonic() + 300
        while not (run.path.exists() and len(run.estimates()) > 1):
            assert time.monotonic() < until
            time.sleep(0.02)
        manager.interrupt_kernel()
        told.clear()
        client.execute_interactive("[r['state'] for r in found.rows()]", output_hook=hear, timeout=300)
        assert [c["data"]["text/plain"] for k, c in told if k == "execute_result"] == ["['stopped']"]
        assert run.state == "stopped" and run.checkpoint()
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# The learning-rate finder


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_range_test_suggests_a_rate_that_trains_better_than_a_tenth_and_ten_times(optimizer, runs_dir):
    from nanogpt_nb.lr_find import lr_find

    base = NanoGPTConfig.preset("tiny").replace(optimizer=optimizer, max_iters=60, eval_interval=60, eval_iters=5, sample_tokens=0, data=TEXT)
    found = lr_find(base)
    assert found.config == base.replace(learning_rate=found.suggestion, muon_learning_rate=found.config.muon_learning_rate)
    losses = []
    for factor in (0.1, 1, 10):
        c = found.config.replace(learning_rate=found.suggestion * factor, muon_learning_rate=found.config.muon_learning_rate * factor)
        tried = sweep({"seed": [1]}, c, method="grid", prune=False, name=f"x{factor}", runs_dir=runs_dir, quiet=True)
        losses.append(tried.rows()[0]["val_loss"])
    assert min(losses) == losses[1]


def test_the_range_test_leaves_everything_as_it_was():
    import torch

    from nanogpt_nb.gpt import GPT
    from nanogpt_nb.lr_find import lr_find

    model = GPT(TINY, 65)
    before = torch.get_rng_state(), torch.get_num_threads(), [p.clone() for p in model.parameters()]
    one, other = lr_find(TINY, steps=40), lr_find(TINY, steps=40)
    assert one.losses == other.losses
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.get_num_threads() == before[1]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before[2], strict=True))


def test_the_range_test_ends_when_training_breaks_and_says_when_nothing_falls():
    from nanogpt_nb.lr_find import lr_find

    broken = lr_find(TINY, start=1e-4, end=1e4, steps=60)
    assert len(broken.losses) < 60 and all(np.isfinite(broken.losses))
    flat = lr_find(TINY, start=1e-9, end=1e-8, steps=20)
    assert flat.suggestion is None and "no suggestion" in repr(flat) and flat.config == TINY
    assert flat._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", [dict(start=0), dict(start=1.0, end=0.1), dict(steps=3), dict(end=float("nan")), dict(config="tiny")])
def test_a_range_test_that_cannot_be_is_refused(wrong):
    from nanogpt_nb.lr_find import lr_find

    with pytest.raises(ConfigError) as caught:
        lr_find(**({"config": TINY} | wrong))
    assert "\n" not in str(caught.value)
