"Training on what is rented, with the rehearsal as the service: the run comes home, the machine is given back, and the money is in every view."

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from box import until, why_no_box

from nanogpt_nb import cli
from nanogpt_nb.args import LaunchArgs, parse_train
from nanogpt_nb.compare import compare
from nanogpt_nb.config import ConfigError, NanoGPTConfig, NanoGPTError
from nanogpt_nb.costs import in_dollars, read_money, rents
from nanogpt_nb.faces import head_html
from nanogpt_nb.history import runs
from nanogpt_nb.launch import launch, on_flag
from nanogpt_nb.remote.books import keep_books, note_run, noted
from nanogpt_nb.remote.lease_folder import Record, records
from nanogpt_nb.remote.money import Terms
from nanogpt_nb.rented import types_of
from nanogpt_nb.runs import Run
from nanogpt_nb.spread import machines
from nanogpt_nb.view import View

boxed = pytest.mark.skipif(why_no_box() is not None, reason=why_no_box() or "")
TINY = NanoGPTConfig.preset("tiny").replace(max_iters=20, eval_interval=10, eval_iters=2, sample_tokens=10)
BILL = dict(lease="250101-1200-abcd", instance_type="gpu_1x_h100_pcie", dollars_per_hour=3.0, budget=5.0, until=9e9)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    "A laptop's home, user data and project; nothing of ours is left running."
    home, project = tmp_path / "home", tmp_path / "poems"
    home.mkdir(), project.mkdir()
    for name, value in dict(HOME=home, XDG_DATA_HOME=tmp_path / "share", NANOGPT_NB_DATA=tmp_path / "data", OMP_NUM_THREADS=1, WANDB_MODE="disabled").items():
        monkeypatch.setenv(name, str(value))
    for name in ("SSH_AUTH_SOCK", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "LAMBDA_API_KEY", "LAMBDA_API_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(project)
    (project / "text.txt").write_text("".join(f"To be or not to be, said number {i}.\n" for i in range(300)))
    yield project
    from nanogpt_nb.remote.rehearsal import stop_rehearsal

    for record in records(open=True):
        with contextlib.suppress(NanoGPTError):
            record.note("end", why="the test is over")
    if (tmp_path / "data" / "rehearsal").exists():
        with contextlib.suppress(NanoGPTError, TimeoutError):
            stop_rehearsal()
        until(lambda: not left_over(tmp_path), "the processes of this test to end", 240)


def left_over(folder) -> list[str]:
    "The processes whose environment names `folder` as the data folder, guardians and the rehearsal; none of this one."
    mark, found = f"NANOGPT_NB_DATA={folder / 'data'}".encode(), []
    for pid in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []):
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/environ", "rb") as f, open(f"/proc/{pid}/cmdline", "rb") as words:
                if int(pid) != os.getpid() and mark in f.read().split(b"\0") and (said := words.read()) and b"rehearsal" in said:
                    found.append(pid)
    return found


def made(name, folder, bill=None, state="finished", price=None):
    run = Run.create(TINY, name, folder, **(dict(price_per_hour=price) if price else {}))
    for step in (0, 10, 20):
        run.append(dict(step=step, train_loss=4 - step / 10, val_loss=4 - step / 10, seconds=step * 36.0, tokens_per_second=100.0))
    run.set_status(state, step=20)
    if bill:
        (run.path / "money.json").write_text(json.dumps(bill))
    return run


# Money in the folder, and in what shows it


def test_a_minute_that_has_begun_is_a_whole_one_and_an_ended_bill_does_not_grow():
    at = lambda **more: read_money(BILL | more, now=2000.0)
    assert [round(at(began=1000, ended=t)["spent"] * 20) for t in (1001, 1060, 1061, 1120)] == [1, 1, 2, 2]
    assert at(began=1000)["spent"] == pytest.approx(17 * 0.05)  # 1000 s are 16 minutes and 40 seconds
    assert at(began=1000, ended=1060) == read_money(BILL | dict(began=1000, ended=1060), now=9e8)
    assert at(began=1000, ahead=60)["spent"] == pytest.approx(18 * 0.05)  # the service's clock is a minute ahead of ours


def test_the_runs_of_a_lease_bear_its_bill_together():
    parts = [[[None, 1130.5], [1800, None]], [[1130.5, 1131]], [[1131, 1800]]]  # the first one came back
    told = [read_money(BILL | dict(began=1000, ended=2345, lost=0.35, parts=p), now=5000) for p in parts]
    assert sum(m["cost"] for m in told) == pytest.approx(told[0]["spent"]) == pytest.approx(23 * 0.05 + 0.35)


@pytest.mark.parametrize("price", [3.29, 1.29])
def test_what_is_shown_adds_up_to_the_cent_at_any_minute(price):
    cents = lambda said: int(said.replace("$", "").replace(".", ""))
    for minute in range(1, 91):
        bill = BILL | dict(dollars_per_hour=price, budget=2.0, began=1000, ended=1000 + 60 * minute)
        m = read_money(bill, now=9e9)
        paid, left = (cents(word.split()[0]) for word in in_dollars(m).split(", "))
        assert left == max(0, 200 - paid) and m["left"] >= 0 and m["spent"] * 60 >= price * minute - 1e-6
        runs = [read_money(bill | dict(parts=p), now=9e9) for p in ([[None, 1100], [2000, 3000]], [[1100, 2000]], [[3000, None]])]
        assert sum(cents(in_dollars(r).split()[0]) for r in runs) == paid
        assert all(" for this run, " in in_dollars(r) and "spent on the machine" in in_dollars(r) for r in runs)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"dollars_per_hour": "3", "budget": 5}', '{"dollars_per_hour": 3}', '{"dollars_per_hour": 1e400, "budget": 5}', "\udcff"])
def test_a_money_file_that_cannot_be_understood_is_none(tmp_path, text):
    run = made("one", tmp_path)
    (run.path / "money.json").write_bytes(text.encode(errors="surrogateescape"))
    assert run.money == {}
    (row,) = runs(tmp_path).rows
    assert row["cost"] is row["left"] is None
    view = View(run)
    view.refresh()
    assert "money" not in view.facts()


def test_the_live_view_tells_what_it_costs_so_far_per_hour_and_what_is_left(tmp_path):
    run = made("one", tmp_path, BILL | dict(began=time.time() - 545), state="running")
    view = View(run)
    with run.lock():
        view.refresh()
        assert view.facts()["money"] == "$0.50 so far, $3.00 an hour, $4.50 of $5.00 left"
        assert "money <b><span>$</span>0.50" in head_html(view) and "$4.50 of $5.00 left" in view.text()
        (run.path / "money.json").write_text(json.dumps(BILL | dict(began=time.time() - 1145)))
        assert view.refresh() and view.facts()["money"].startswith("$1.00 so far")
        assert not view.refresh()
    (run.path / "money.json").write_text(json.dumps(BILL | dict(began=1000, ended=1600, rehearsal=True)))
    view.refresh()
    assert view.facts()["money"] == "$0.50, $4.50 of $5.00 left (a rehearsal: nothing is paid)"


def test_the_list_of_runs_has_columns_for_money_when_there_is_any(tmp_path):
    made("home", tmp_path)
    assert "cost" not in runs(tmp_path).columns and "cost" not in repr(runs(tmp_path))
    made("paid", tmp_path, BILL | dict(began=1000, ended=2200))
    assert "cost" in runs(tmp_path).columns and "left" not in runs(tmp_path).columns
    made("going", tmp_path, BILL | dict(began=time.time() - 545))
    made("rehearsed", tmp_path, BILL | dict(began=1000, ended=2200, rehearsal=True))
    table = runs(tmp_path, sort="cost")
    assert [run.name for run in table] == ["paid", "going", "rehearsed", "home"]
    assert [(row["cost"], row["per_hour"], row["left"]) for row in table.rows] == [(pytest.approx(1), None, None), (pytest.approx(0.5), 3.0, 4.5), (0, None, None), (None, None, None)]
    assert [row["rehearsed"] for row in table.rows] == [None, None, 1.0, None]
    lines = {line.split()[0]: line for line in table.text().splitlines()}
    assert "$1.00" in lines["paid"] and "$0.50     $3.00  $4.50" in lines["going"] and "($1.00)" in lines["rehearsed"] and "rehearsed, nothing is paid" in table.text() and "rehearsed, nothing is paid" in table._repr_html_() and "$" not in lines["home"]
    assert [run.name for run in runs(tmp_path, where="cost>0.75, per hour=none")] == ["paid"]
    assert "data-v=0.5" in table._repr_html_() and ">$0.50" in table._repr_html_()
    assert "cost" in table.to_csv().splitlines()[0].split(",")


def test_a_comparison_takes_the_price_of_the_lease(tmp_path):
    made("rented", tmp_path, BILL | dict(began=1000, ended=2200))
    made("told", tmp_path, price=1.0)
    found = compare("rented", "told", runs_dir=tmp_path, x="dollars")
    assert found.curves["rented"][-1][0] == pytest.approx(0.6) and found.curves["told"][-1][0] == pytest.approx(0.2)  # 720 s
    made("here", tmp_path)
    with pytest.raises(ConfigError, match="'here' cost is not known"):
        compare("rented", "here", runs_dir=tmp_path, x="dollars")


# What is noted for the guards


def lease_of(desk, *events, alias="h100", budget=5):
    clock = [0.0]
    record = Record.create(Terms("gpu_1x_h100_pcie", budget=budget, alias=alias), clock=lambda: clock[0])
    begin = [("asking", 0, dict(name="n", type="gpu_1x_h100_pcie", cents=300)), ("launched", 5, dict(id="a")), ("status", 6, dict(id="a", status="booting"))]
    for kind, t, facts in [*begin, ("status", 1000, dict(id="a", status="booting")), ("status", 1005, dict(id="a", status="active")), ("ready", 1010, {}), *events]:
        record.note(kind, time=t, **facts)
    return record, clock


class Named:
    def __init__(self, name):
        self.name = name


def test_a_run_on_a_machine_of_a_lease_is_noted_by_whatever_name_it_goes(desk):
    record, clock = lease_of(desk)
    run, other = made("one", desk / "runs", state="starting"), made("other", desk / "runs")
    note_run(Named("h100"), run)
    note_run(Named("gpu"), other)
    assert record.state.runs == [str(run.path.resolve())] and other.money == {}
    assert run.money["lease"] == record.id and run.money["per_hour"] == 3.0


def test_a_launch_that_fails_leaves_no_run_in_the_lease_and_no_bill_in_the_run(desk):
    record, _ = lease_of(desk)
    run = made("one", desk / "runs", BILL | dict(began=1000, ended=2200))
    with pytest.raises(ConfigError), noted(Named("h100"), run):
        assert record.state.runs == [str(run.path.resolve())] and run.money["lease"] == record.id
        raise ConfigError("The project cannot be sent.")
    assert record.state.runs == [] and run.money["lease"] == BILL["lease"]
    keep_books(record)
    assert run.money["lease"] == BILL["lease"]
    note_run(Named("h100"), run)
    with pytest.raises(ConfigError), noted(Named("h100"), run):  # it is trained there already
        raise ConfigError("It goes on already.")
    assert record.state.runs == [str(run.path.resolve())]


@pytest.mark.parametrize("bill, flags", [(BILL, "lambda:gpu_1x_h100_pcie --budget 5"), (BILL | dict(rehearsal=True, budget=2.5), "rehearsal:gpu_1x_h100_pcie --budget 2.5")])
def test_a_run_goes_on_with_the_type_and_the_budget_that_it_had(desk, bill, flags):
    run = made("one", desk / "runs", bill | dict(began=1000, ended=2200))
    (run.path / "remote.json").write_text(json.dumps(dict(host="gpu", path="/there", job="j")))
    assert on_flag(run) == f" --on {flags}"


def test_the_books_follow_the_lease_to_its_end_and_past_it(desk):
    record, clock = lease_of(desk)
    first, second = made("first", desk / "runs"), made("second", desk / "runs")
    for clock[0], run in ((1010.0, first), (1600.0, second)):
        record.note("run", path=str(run.path))
    clock[0] = 2195.0
    keep_books(record)
    assert first.money["going"] and first.money["cost"] == pytest.approx(0.5)
    record.extend(budget=3)
    record.note("end", why="asked")
    record.note("gone", id="a", time=2800)
    (second.path / "remote.json").write_text(json.dumps(dict(host="h100", path="/there", job="j")))
    keep_books(record, over=True)
    assert not first.money["going"] and first.money["budget"] == 8
    assert first.money["cost"] + second.money["cost"] == pytest.approx(1.5) == pytest.approx(second.money["spent"])
    assert second.remote["home"] and "what is here is all there is" in second.remote["error"]
    record.note("ended", time=2800)
    shutil.rmtree(first.path)
    keep_books(record)
    assert not first.path.exists()  # nothing is made in the place of a folder that is gone
    assert second.money["cost"] == second.money["spent"]  # and what it bore is borne by the other


def test_a_run_that_comes_back_and_one_whose_launch_failed_leave_nothing_that_nobody_bears(desk):
    record, clock = lease_of(desk)
    first, second = made("first", desk / "runs"), made("second", desk / "runs")
    for clock[0], path in ((1010, desk / "runs/failed"), (1200, first.path), (1600, second.path), (1700, desk / "runs/failed"), (1800, first.path), (1900, first.path)):
        record.note("run", path=str(path))
    record.note("gone", id="a", time=2800)
    clock[0] = 2801.0
    keep_books(record)
    assert first.money["cost"] == pytest.approx(1.5 - second.money["cost"]) and second.money["cost"] == pytest.approx((14 - 10) * 0.05) and second.money["spent"] == 1.5


def test_a_run_that_goes_on_under_another_lease_keeps_what_it_had_cost(desk):
    run = made("one", desk / "runs", BILL | dict(began=1000, ended=2200))
    record, clock = lease_of(desk)
    record.note("run", path=str(run.path), time=1010)
    clock[0] = 1595.0
    for _ in range(3):
        keep_books(record)
    record.note("gone", id="a", time=1600)
    keep_books(record)
    assert run.money["lease"] == record.id and run.money["cost"] == pytest.approx(1 + 0.5) and run.money["spent"] == pytest.approx(0.5)
    (run.path / "money.json").write_text(json.dumps(BILL | dict(began=1000, ended=2200, rehearsal=True)))
    keep_books(record)
    assert run.money["cost"] == pytest.approx(0.5)  # a rehearsal cost nothing


# What is typed


@pytest.mark.parametrize("on, yes", [("rehearsal", True), ("rehearsal:gpu_1x_a10", True), ("lambda:gpu_1x_a10,gpu_1x_h100_pcie", True), ("lambda:", True), ("gpu", False), ("lambda", False),
                                     ("lambda:22", False), ("rehearsal:22", False), ("me@lambda:22", False), (None, False), (Named("lambda:x"), False)])  # fmt: skip
def test_what_is_to_be_rented_is_told_from_machines(on, yes):
    assert rents(on) is yes


def test_types_are_tried_in_the_order_given():
    assert types_of("lambda:gpu_1x_h100_pcie,gpu_1x_a10") == ("gpu_1x_h100_pcie", "gpu_1x_a10")
    assert types_of("rehearsal") == ("rehearsal",) and types_of("rehearsal:a, b") == ("rehearsal:a", "rehearsal:b")
    with pytest.raises(ConfigError, match="nanogpt cloud types"):
        types_of("lambda:")


@pytest.mark.parametrize("words, said", [
    ("--budget 5", "--on lambda:TYPE"), ("--on gpu --hours 3", "--hours is about a machine to rent"), ("--on lambda:22 --idle 3", "--idle is about"), ("--on gpu --box-guard", "--box-guard is about a machine to rent"), ("--wait 5", "--wait is about"), ("--on gpu --region us-east-1", "--region is about"), ("--on rehearsal --after last", "has none"),
])  # fmt: skip
def test_flags_about_money_are_about_what_is_rented(words, said):
    with pytest.raises(ConfigError, match=said):
        parse_train(["--preset", "tiny", *words.split()], kind=LaunchArgs)


def test_a_launch_on_a_machine_takes_no_budget():
    with pytest.raises(ConfigError, match="budget= is about a machine to rent"):
        launch(TINY, on="gpu", budget=5)


def test_a_sweep_does_not_rent_for_every_trial():
    with pytest.raises(ConfigError, match="nanogpt cloud up gpu_1x_a10 gpu_1x_h100_pcie --name gpu"):
        machines(["gpu", "lambda:gpu_1x_a10,gpu_1x_h100_pcie"])
    assert machines("gpu") == ["gpu"] and machines(lease := Named("gpu")) == [lease]


FAULTS = {
    "--name taken": "exists already", "--data no.txt": "no.txt", "--resume taken": "max_iters above that", "--resume nothing": "no run", "--send-wandb-key": "wandb login",
    "--budget 0": "budget=0", "--hours -1": "hours=-1",
}  # fmt: skip


@pytest.mark.parametrize("words", FAULTS)
def test_what_is_wrong_is_found_before_anything_is_rented(desk, words, capsys, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    made("taken", desk / "runs")
    preset = [] if "--resume" in words else ["--preset", "tiny"]
    data = [] if "--resume" in words or "--data" in words else ["--data", "text.txt"]
    assert cli.main(["train", "--on", "rehearsal", *preset, *data, *words.split()]) in (1, 2)
    assert FAULTS[words] in capsys.readouterr().err
    assert records() == [] and not (desk.parent / "data" / "rehearsal").exists() and [r.name for r in runs("runs")] == ["taken"]


# The whole way


def ended(record):
    return record.state.phase == "ended"


def at_home(run):
    assert run.state == "finished" and run.remote["home"] and run.checkpoint() is not None
    assert not run.money["going"] and run.money["rehearsal"] and run.money["per_hour"] > 0 and run.money["spent"] > 0


@boxed
def test_train_on_a_rehearsal_shows_the_run_and_gives_back(desk, capfd):
    from nanogpt_nb.remote.rehearsal import start_rehearsal

    start_rehearsal(boot=0.3)
    code = cli.main(["train", "--on", "rehearsal", "--budget", "5", "--hours", "1", "--preset", "tiny", "--data", "text.txt", "--max-iters", "20", "--eval-interval", "10", "--name", "one"])
    said = capfd.readouterr().out
    (record,) = records()
    assert code == 0 and ended(record) and record.state.reason == "the run is home"
    at_home(Run("runs/one"))
    assert record.terms.budget == 5 and record.terms.hours == 1 and record.state.home == record.state.runs == [str((desk / "runs/one").resolve())]
    assert said.index("at most") < said.index("connect ") < said.index("step    20") < said.index("money $") < max(said.find("is gone: $"), said.find(", ended (the run is home)"))
    assert "of $5.00 left (a rehearsal: nothing is paid)" in said
    assert cli.main(["runs"]) == 0 and "($0." in capfd.readouterr().out


@boxed
@pytest.mark.slow
def test_two_runs_on_one_lease_share_its_bill(desk):
    from nanogpt_nb.remote.lease import lease

    config = TINY.replace(data=("text.txt",))
    with lease("rehearsal", budget=5, quiet=True) as gpu:
        first = launch(config, "first", on=gpu, quiet=True)
        second = launch(config, "second", on=gpu.name, quiet=True)  # the name that ssh knows will do
    at_home(first), at_home(second)
    assert first.money["cost"] + second.money["cost"] == pytest.approx(first.money["spent"])
    assert [os.path.basename(p) for p in gpu.state.runs] == ["first", "second"]


@boxed
@pytest.mark.slow
def test_a_launch_that_fails_gives_back_what_it_rented(desk, monkeypatch):
    monkeypatch.setattr("nanogpt_nb.journey.travel", lambda *_: (_ for _ in ()).throw(ConfigError("The project cannot be sent.")))
    with pytest.raises(ConfigError, match="cannot be sent"):
        launch(TINY.replace(data=("text.txt",)), "one", on="rehearsal", quiet=True)
    (record,) = records()
    assert ended(record) and record.state.reason == "the launch failed" and not (desk / "runs/one").exists()


@boxed
@pytest.mark.slow
def test_a_launch_from_a_notebook_is_ended_by_the_guardian(desk, capsys):
    run = launch(TINY.replace(data=("text.txt",)), "one", on="rehearsal", budget=4)
    assert run.state in ("starting", "running", "finished") and "nanogpt cloud down" in capsys.readouterr().out
    (record,) = records()
    until(lambda: ended(record), "the guardian to give it back", 300, every=0.2)
    at_home(run)
    assert record.state.reason == "its runs have ended" and run.money["budget"] == 4


@boxed
@pytest.mark.slow
def test_ctrl_c_leaves_the_run_and_the_guardian_gives_back(desk):
    words = ["train", "--on", "rehearsal", "--preset", "tiny", "--data", "text.txt", "--max-iters", "3000", "--eval-interval", "100", "--name", "one"]
    program = subprocess.Popen([sys.executable, "-m", "nanogpt_nb.cli", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(cli.__file__))}, start_new_session=True)  # fmt: skip
    run = Run("runs/one")
    until(lambda: run.path.exists() and run.metrics(), "the first numbers at home", 300, every=0.1)
    program.send_signal(signal.SIGINT)
    said, _ = program.communicate(timeout=240)
    (record,) = records()
    assert program.returncode == 130 and not ended(record)
    assert "goes on on rehearsed ($" in said and "nanogpt cloud down rehearsed" in said
    until(lambda: ended(record), "the guardian to give it back", 480, every=0.2)
    at_home(run)
