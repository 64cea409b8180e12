"The history: conditions, the table in its three forms, comparisons, and what damage does to them."

import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab import Browser, Lab, until, why_not

from nanogpt_nb.compare import compare, draw_curves, labels
from nanogpt_nb.config import ConfigError, NanoGPTConfig, NanoGPTError
from nanogpt_nb.history import clean, grid, runs, sorted_rows, width_of
from nanogpt_nb.runs import Run, RunError
from nanogpt_nb.where import KEYS, SETTINGS, choose, read_where

NANOGPT = Path(sys.executable).parent / "nanogpt"
TINY = NanoGPTConfig.preset("tiny")


def nanogpt(*words, cwd, **env) -> subprocess.CompletedProcess:
    env = {**os.environ, "COLUMNS": "100", **env}
    return subprocess.run([NANOGPT, *map(str, words)], cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)


def make(runs_dir, name, losses=(4.0, 3.0, 2.0), state="finished", day=1, text="To be.", about=None, **changes) -> Run:
    "A run as training leaves it, an estimate every 50 steps and 10 seconds."
    about = dict(host="laptop", device="cpu, 2 threads", parameters=10_000, created=f"2026-01-{day:02}T12:00:00+00:00", corpus={"name": "plays"}) | (about or {})
    run = Run.create(TINY.replace(**changes), name, runs_dir, **about)
    for i, loss in enumerate(losses):
        run.append(dict(step=50 * i, train_loss=loss - 0.1, val_loss=loss, tokens=6400 * i, seconds=10.0 * i, tokens_per_second=640.0))
        run.log(f"--- step {50 * i}\n{text}", "samples.txt")
    run.set_status(state, step=50 * max(0, len(losses) - 1))
    return run


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    "Five runs that are only read."
    folder = tmp_path_factory.mktemp("history") / "runs"
    make(folder, "base", day=1)
    make(folder, "muon", (4.0, 2.0, 1.5), day=2, optimizer="muon", about=dict(group="rates", price_per_hour=3.6))
    make(folder, "wide-MUON", (4.0, 1.8), "stopped", day=3, optimizer="muon", n_embd=64, bias=False, about=dict(parameters=2_500_000))
    make(folder, "hot", (4.0,), "failed", day=4, learning_rate=0.5)
    make(folder, "new", (), "stopped", day=5)
    return folder


def names(where, history, **how): return sorted(run.name for run in runs(history, where=where, **how))


# Conditions


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("val_loss<2", "muon wide-MUON"),
        ("val_loss <= 2", "base muon wide-MUON"),
        ("val loss>2", "hot"),
        ("val_loss!=2", "hot muon new wide-MUON"),
        ("val_loss=none", "new"),
        ("val_loss!=none", "base hot muon wide-MUON"),
        ("state=finished", "base muon"),
        ("state==Finished", "base muon"),
        ("state=failed|stopped", "hot new wide-MUON"),
        ("state!=failed|stopped", "base muon"),
        ("name~muon", "muon wide-MUON"),
        ("name!~MUON", "base hot new"),
        ("n_embd>=64", "wide-MUON"),
        ("--n-embd>=64", None),  # a column does not begin with a dash
        ("n-embd>=64", "wide-MUON"),
        ("params>1M", "wide-MUON"),
        ("parameters>2500k", ""),
        ("learning_rate=0.5", "hot"),
        ("bias=false", "wide-MUON"),
        ("bias!=False", "base hot muon new"),
        ("group=rates", "muon"),
        ("group!=rates", "base hot new wide-MUON"),
        ("corpus=plays and took<15", "hot wide-MUON"),
        ("took<15", "hot wide-MUON"),
        ("created>=2026-01-04", "hot new"),
        ("created=2026-01-03", "wide-MUON"),
        ("created~2026-01", "base hot muon new wide-MUON"),
        ("created<2026", ""),
        ("name~muon, val_loss<1.6", "muon"),
        ("name~muon and state=finished", "muon"),
        ("name~muon && state=finished", "muon"),
        (["name~muon", "state=finished"], "muon"),
        (("name~muon,", lambda row: row["n_embd"] == 64), "wide-MUON"),
        (lambda row: row["steps"] == 0, "hot new"),
        ("device='cpu, 2 threads'", "base hot muon new wide-MUON"),
        ('device~"2 THREADS", name=hot', "hot"),
        ("", "base hot muon new wide-MUON"),
        (None, "base hot muon new wide-MUON"),
        ([], "base hot muon new wide-MUON"),
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", str(value)),
)
def test_conditions(where, found, history):
    if found is None:
        with pytest.raises(ConfigError):
            names(where, history)
    else:
        assert names(where, history) == found.split()


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("val_los<1", "did you mean val_loss"),
        ("colour=red", "There is no column 'colour'"),
        ("val_loss<low", "'low' is not a number"),
        ("val_loss<1 or val_loss>3", "cannot be read"),
        ("state=failed or state=killed", "cannot be read"),
        ("val_loss<", "cannot be read"),
        ("val_loss", "cannot be read"),
        ("<1", "cannot be read"),
        ("muon", "write it like val_loss<1.7"),
        ("device=cpu, 2 threads", "in quotes"),
        ("state<finished", "ask with =, != or ~"),
        ("bias=maybe", "true or false"),
        ("created>yesterday", "2026-01-31"),
        ("learning_rate=nan", "not a number"),
        ("val_loss<1.7,,", "cannot be read"),
        ("name='half", "cannot be read"),
    ],
)
def test_a_condition_that_means_nothing_is_told(where, said, history):
    with pytest.raises(ConfigError) as e:
        runs(history, where=where)
    assert said in str(e.value) and str(e.value).endswith((".", "?"))


@given(st.text(max_size=40))
def test_any_text_is_a_condition_or_a_sentence(text):
    rows = [dict.fromkeys(KEYS) | dict(name="a", val_loss=1.0, created="2026-01-01")]
    try:
        choose(rows, text)(rows[0])
    except ConfigError as e:
        assert str(e)


@given(st.lists(st.tuples(st.sampled_from(sorted(SETTINGS)), st.sampled_from(["<", "<=", ">", ">=", "=", "!=", "~", "!~"]), st.from_regex(r"[a-z0-9.]{1,8}", fullmatch=True)), min_size=1, max_size=4), st.sampled_from([",", ", ", " and ", " & ", " , "]))  # fmt: skip
def test_what_is_joined_is_taken_apart(conditions, joint):
    assert read_where(joint.join("".join(c) for c in conditions)) == conditions


def test_a_column_that_only_one_run_knows_can_be_asked_for(tmp_path):
    make(tmp_path, "a")
    later = make(tmp_path, "b")
    about = json.loads((later.path / "config.json").read_text())
    about["config"]["window"] = 128
    (later.path / "config.json").write_text(json.dumps(about))
    assert names("window>100", tmp_path) == ["b"] and names("window=none", tmp_path) == ["a"]
    assert [row["window"] for row in runs(tmp_path, columns="window", sort="window").to_dicts()] == [128, None]


# The table


def test_the_newest_come_first_and_equals_stay_so(history):
    assert [run.name for run in runs(history)] == ["new", "hot", "wide-MUON", "muon", "base"]
    assert [run.name for run in runs(history, sort="optimizer")] == ["new", "hot", "base", "wide-MUON", "muon"]
    assert [run.name for run in runs(history, sort="val_loss")] == ["muon", "wide-MUON", "base", "hot", "new"]
    with pytest.raises(ConfigError, match="did you mean name"):
        runs(history, sort="nmae")


def test_what_has_no_value_comes_last():
    rows = [{"name": "a", "val_loss": None}, {"name": "b", "val_loss": 2.0}, {"name": "c"}, {"name": "d", "val_loss": 1.0}]
    assert [row["name"] for row in sorted_rows(rows, "val_loss")] == ["d", "b", "a", "c"]
    assert [row["name"] for row in sorted_rows([{"name": "a"}, {"name": "b", "steps": 1}], "steps")] == ["b", "a"]


def test_it_is_a_list_of_runs(history):
    table = runs(history)
    assert len(table) == 5 and isinstance(table[0], Run) and table[-1].name == "base" and Run(history / "hot") in table
    assert [run.name for run in table[1:3]] == ["hot", "wide-MUON"] and [row["name"] for row in table[1:3].rows] == ["hot", "wide-MUON"]
    assert compare(*table[3:]).labels == compare(table[3:]).labels == ["muon", "base"]


def test_text_is_as_narrow_as_asked_and_keeps_what_was_asked_for(history):
    table = runs(history, columns="n_embd, optimizer")
    for width in (60, 80, 100, 200):
        lines = table.text(width).splitlines()
        assert max(map(len, lines)) <= width
        assert {"name", "state", "n_embd", "optimizer"} <= set(lines[0].split()) and len(lines) == 7
    assert "\x1b" not in table.text() and "\x1b[31mfailed\x1b[0m" in table.text(colours=True)


def test_a_long_table_is_cut_only_where_it_is_glanced_at(tmp_path):
    first = make(tmp_path, "run-000", ())
    for i in range(1, 70):
        (tmp_path / f"run-{i:03}").mkdir()
        for file in ("config.json", "status.json"):
            (tmp_path / f"run-{i:03}" / file).write_bytes((first.path / file).read_bytes())
    table = runs(tmp_path)
    assert repr(table).endswith("… and 10 more") and table.text().count("run-") == table._repr_html_().count("run-") == 70


def test_nothing_found_is_said(tmp_path, history):
    assert repr(runs(tmp_path)) == f"There are no runs in {tmp_path} yet; nanogpt train makes one."
    assert "None of the 5 runs" in runs(history, where="n_layer=99").text() and "n_layer=99" in runs(history, where=("n_layer=99",))._repr_html_()
    assert runs(tmp_path).to_dicts() == [] and len(runs(tmp_path).to_pandas()) == 0 and runs(tmp_path).to_csv().startswith("name,")


@pytest.mark.parametrize("name", ["red\x1b[31m", "日本語", "a\nb", "über", "<i>&\"'", "_$x_{$", "x" * 200])
def test_names_that_files_can_have_break_nothing(name, tmp_path):
    os.rename(make(tmp_path, "a").path, tmp_path / name)
    make(tmp_path, "plain")
    history = runs(tmp_path)
    lines = history.text().splitlines()
    assert len(lines) == 4 and "\x1b" not in history.text() and len({width_of(line.partition("finished")[0]) for line in lines[2:]}) == 1
    assert "<i>" not in history._repr_html_() and name in [row["name"] for row in csv.DictReader(io.StringIO(history.to_csv(), newline=""))]
    c = compare(*history)
    assert clean(name) in c.text() and "<i>" not in c._repr_html_() and "\x1b" not in c.text()
    assert len(c.plot().axes[0].get_legend().texts) == 2 and c.plot()._repr_png_()


def test_a_terminal_without_these_letters_shows_the_others(tmp_path):
    os.rename(make(tmp_path, "a").path, tmp_path / "日本語")
    make(tmp_path, "plain")
    listed = nanogpt("runs", "--runs-dir", tmp_path, cwd=tmp_path, PYTHONIOENCODING="ascii")
    compared = nanogpt("runs", "--runs-dir", tmp_path, "--compare", "plain", "日本語", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert listed.returncode == compared.returncode == 0 and listed.stderr == compared.stderr == ""
    assert "plain" in listed.stdout and "???" in listed.stdout and "-----" in listed.stdout and "best val loss" in compared.stdout


@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), min_size=1, max_size=5))
def test_columns_stand_in_line(rows):
    rows = [tuple(map(clean, row)) for row in rows]
    lines = grid([("name", "x"), *((a, f"{b}|") for a, b in rows)], right=[1]).splitlines()
    assert len({width_of(line) for line in lines[2:]}) == 1


def test_csv_and_pandas_have_every_setting(history, tmp_path):
    table = runs(history, sort="val_loss")
    read = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert [row["name"] for row in read] == [run.name for run in table] and set(KEYS) <= set(read[0])
    assert read[0]["optimizer"] == "muon" and float(read[0]["val_loss"]) == 1.5 and read[-1]["val_loss"] == ""
    table.to_csv(tmp_path / "runs.csv")
    assert (tmp_path / "runs.csv").read_text() == table.to_csv()
    frame = table.to_pandas()
    assert list(frame["name"]) == [run.name for run in table] and frame["val_loss"].min() == 1.5
    assert frame["created"].dt.day.tolist() == [2, 3, 1, 4, 5] and frame["n_embd"].sum() == 4 * 32 + 64


def test_the_command_gives_csv_json_and_chosen_columns(history):
    where = ["--where", "val_loss<3", "name~m", "--columns", "n_embd", "bias", "--sort", "n_embd"]
    told = json.loads(nanogpt("runs", *where, "--json", cwd=history.parent).stdout)
    assert [(row["name"], row["n_embd"], row["bias"]) for row in told] == [("wide-MUON", 64, False), ("muon", 32, True)]
    read = list(csv.DictReader(io.StringIO(nanogpt("runs", *where, "--csv", cwd=history.parent).stdout)))
    assert [row["name"] for row in read] == ["wide-MUON", "muon"] and read[0]["learning_rate"]
    lines = nanogpt("runs", *where, cwd=history.parent).stdout.splitlines()
    assert "n_embd" in lines[0] and [line.split()[0] for line in lines[2:]] == ["wide-MUON", "muon"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--json --csv", "give one of them"),
        ("--where val_los<1", "did you mean val_loss"),
        ("--x dollars", "name its runs with --compare"),
        ("--compare base muon --where val_loss<2", "leave --where"),
        ("--compare base muon --x dollars", "give --price-per-hour"),
        ("--compare base muon --x miles", "miles"),
        ("--compare base muon --x dollars --price-per-hour -1", "not a price"),
        ("--columns colour", "no column 'colour'"),
        ("--sort colour", "no column 'colour'"),
    ],
)
def test_flags_that_do_not_go_together(words, said, history):
    done = nanogpt("runs", *words.split(), cwd=history.parent)
    assert done.returncode == 2 and said in re.sub(r"[\s│]+", " ", done.stderr) and done.stdout == ""


# Garbage

GARBAGE = ["", "[1, 2]", "3", "{}", '{"config": 3}', '{"config": {"n_layer": [1, {}], "learning_rate": NaN, "x": {"y": 1}}, "parameters": "many", "created": 3}',
           '{"step": "x", "val_loss": "low"}', '{"state": ["a"], "heartbeat": "x", "host": 3, "val_loss": Infinity, "seconds": true, "tokens_per_second": [], "step": -1e999}',
           '{"created": "never", "host": {"a": 1}, "device": 5, "config": {}, "group": ["g"], "corpus": "text", "price_per_hour": "1"}',
           '{"step": 1, "val_loss": 1' + "0" * 400 + "}", '{"parameters": 1' + "0" * 400 + ', "config": {"n_layer": 1' + "0" * 400 + "}}", "[" * 100000, "\x00\xff"]  # fmt: skip


@pytest.mark.parametrize("file", ["metrics.jsonl", "status.json", "config.json", "samples.txt"])
@pytest.mark.parametrize("garbage", [*GARBAGE, None], ids=range(len(GARBAGE) + 1))
def test_garbage_in_one_run_hides_no_other(file, garbage, tmp_path):
    good, bad = make(tmp_path, "good"), make(tmp_path, "bad")
    (bad.path / file).unlink()
    (bad.path / file).mkdir() if garbage is None else (bad.path / file).write_text(garbage, encoding="latin-1")
    if file != "status.json":
        (bad.path / "status.json").unlink()
    table = runs(tmp_path)
    assert sorted(run.name for run in table) == ["bad", "good"]
    assert ["good"] == [row["name"] for row in table.rows if row["val_loss"] == 2.0 and row["name"] == "good"]
    json.dumps(table.to_dicts(), allow_nan=False)
    for by in KEYS:
        assert len(runs(tmp_path, sort=by, columns=[by]).text().splitlines()) == 4
    assert "good" in table._repr_html_() and len(table.to_pandas()) == 2 and table.to_csv().count("\n") == 3
    told = compare(good, bad)
    assert told.curves["good"][-1] == (100, 2.0) and "good" in told.text() and "good" in told._repr_html_()
    json.dumps(told.to_dict(), allow_nan=False)
    assert len(told.to_pandas()) >= 3 and told.to_csv()


def test_a_config_that_cannot_be_opened_is_no_end(tmp_path):
    make(tmp_path, "good")
    (tmp_path / "loop").mkdir()
    os.symlink(tmp_path / "loop" / "config.json", tmp_path / "loop" / "config.json")
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / ".new-1").mkdir()
    (tmp_path / ".new-1" / "config.json").write_text("{}")
    assert "good" in [run.name for run in runs(tmp_path)] and ".new-1" not in [run.name for run in runs(tmp_path)]


# Comparisons


def test_settings_results_curves_and_samples(history):
    c = compare("base", "muon", runs_dir=history)
    assert c.settings == {"optimizer": ["adamw", "muon"]}
    assert c.results["val_loss"] == [2.0, 1.5] and c.results["best_step"] == [100, 100] and c.results["seconds"] == [20.0, 20.0]
    assert c.curves == {"base": [(0, 4.0), (50, 3.0), (100, 2.0)], "muon": [(0, 4.0), (50, 2.0), (100, 1.5)]}
    assert c.samples["muon"] == (100, "To be.")
    assert {"optimizer", "best val loss", "base, step 100"} <= set(re.split(r"\s{2,}|\n", c.text()))


def test_the_best_is_not_the_last(tmp_path):
    a, b = make(tmp_path, "a", (4.0, 1.0, 2.0)), make(tmp_path, "b")
    c = compare(a, b)
    assert c.results["val_loss"] == [1.0, 2.0] and c.results["best_step"] == [50, 100] and c.results["steps"] == [100, 100]
    assert "lowest 1.0000 at 50" in c.describe()


@pytest.mark.parametrize("x", ["steps", "tokens", "seconds", "dollars"])
def test_each_axis(x, history):
    c = compare("base", "muon", runs_dir=history, x=x, price_per_hour=7.2)
    per_estimate = dict(steps=(50, 50), tokens=(6400, 6400), seconds=(10, 10), dollars=(0.02, 0.01))[x]  # what config.json tells goes first
    for label, one in zip(("base", "muon"), per_estimate):
        assert [at for at, _ in c.curves[label]] == pytest.approx([0, one, 2 * one])
    assert f"({x})" in c.text() and c.plot().axes[0].get_xlabel() == x and f"over {x}" in c.describe()
    told = json.loads(nanogpt("runs", "--compare", "base", "muon", "--x", x, "--price-per-hour", 7.2, "--json", cwd=history.parent).stdout)
    assert told["x"] == x and told["curves"]["base"] == [list(p) for p in c.curves["base"]]


def test_rows_that_lack_the_axis_are_left_out(tmp_path):
    a, b = make(tmp_path, "a"), make(tmp_path, "b")
    a.append(dict(step=150, val_loss=1.0))
    (b.path / "metrics.jsonl").write_text('{"step": 0, "val_loss": 4.0}\n')
    c = compare(a, b, x="seconds")
    assert len(c.curves["a"]) == 3 and c.curves["b"] == [] and "b has no validation loss" in c.describe()
    assert "alt=" in c._repr_html_() and c.text()


def test_no_price_no_dollars(history):
    with pytest.raises(ConfigError, match="'base' cost.*price_per_hour"):
        compare("muon", "base", runs_dir=history, x="dollars")
    assert compare("muon", "base", runs_dir=history).results["dollars"] == [pytest.approx(0.02), None]
    for price in (-1, float("nan"), "2", True):
        with pytest.raises(ConfigError, match="not a price"):
            compare("muon", "base", runs_dir=history, price_per_hour=price)
    with pytest.raises(ConfigError, match="no axis"):
        compare("muon", "base", runs_dir=history, x="hours")


def test_runs_of_one_name_stay_apart(tmp_path):
    here, there = make(tmp_path / "laptop", "same"), make(tmp_path / "box", "same", (4.0, 1.0))
    c = compare(here, there, runs_dir=tmp_path)
    assert c.labels == ["laptop/same", "box/same"]
    assert c.curves["laptop/same"][-1] == (100, 2.0) and c.curves["box/same"][-1] == (50, 1.0)
    assert labels([Run("/a"), Run("/b/a"), Run("/c/b/a")])[1:] == ["/b/a" if os.sep != "/" else "//b/a", "c/b/a"]


def test_too_few_or_none(history):
    for chosen in (["base"], ["base", history / "base"], [[Run(history / "base")]]):
        with pytest.raises(ConfigError, match="only base to compare"):
            compare(*chosen, runs_dir=history)
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare(runs(history, where="n_layer=99"))
    with pytest.raises(RunError, match="no run 'bsae'"):
        compare("bsae", "muon", runs_dir=history)


def test_many_runs_fit_a_narrow_terminal(tmp_path):
    for i in range(12):
        make(tmp_path, f"a-rather-long-name-{i:02}", (4.0, 3.0 - i / 10), seed=i)
    text = compare(runs(tmp_path)).text(72)
    assert max(map(width_of, text.splitlines())) <= 72 and text.count("best val loss") == 6
    assert all(f"a-rather-long-name-{i:02}" in text for i in range(12))


def test_samples_cannot_command_the_terminal_or_the_page(tmp_path):
    evil = "\x1b]0;title\x07<script>alert(1)</script>\r[bold]no[/bold]"
    c = compare(make(tmp_path, "a", text=evil), make(tmp_path, "b", text="\n".join("line" for _ in range(100))))
    assert "\x1b" not in c.text() and "\r" not in c.text() and "[bold]no[/bold]" in c.text() and "…" in c.text()
    assert "<script>" not in c._repr_html_() and "&lt;script&gt;" in c._repr_html_()


def test_curves_without_colours_are_told_apart_by_letters():
    drawn = draw_curves({"x": [(0, 4.0), (10, 1.0)], "y": [(0, 4.0), (10, 3.0)], "z": []}, colours=False, width=80)
    assert "\x1b" not in drawn and drawn.count("A") >= 2 and drawn.count("B") >= 2
    assert max(map(len, drawn.splitlines())) <= 80


def test_the_picture_is_a_small_png_with_words_and_lines_told_apart_without_colour(tmp_path):
    for i in range(8):
        make(tmp_path, f"run{i}", (4.0, 3.0 - i / 10), seed=i)
    c = compare(runs(tmp_path))
    figure = c.plot()
    assert figure._repr_png_()[:4] == b"\x89PNG" and len(figure._repr_png_()) < 100_000
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len({look[1:] for look in looks}) == 8
    html = c._repr_html_()
    assert "data:image/png;base64," in html and 'alt="Validation loss over steps: run' in html and "<svg" not in html
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    assert c.plot(ax) is ax.figure and len(ax.lines) == 8


def test_without_matplotlib_a_comparison_is_words_and_says_what_to_install(history, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    c = compare("base", "muon", runs_dir=history)
    with pytest.raises(NanoGPTError, match="The picture needs matplotlib.*pip install matplotlib"):
        c.plot()
    html = c._repr_html_()
    assert "<img" not in html and "<p>Validation loss over steps: base" in html and "pip install matplotlib" in html and "<table>" in html


def test_metrics_of_a_comparison_leave_as_csv_and_pandas(history, tmp_path):
    c = compare("base", "muon", runs_dir=history)
    frame = c.to_pandas()
    assert frame.groupby("run")["val_loss"].min().to_dict() == {"base": 2.0, "muon": 1.5} and frame["dollars"].notna().sum() == 3
    c.to_csv(tmp_path / "metrics.csv")
    done = nanogpt("runs", "--compare", "base", "muon", "--csv", cwd=history.parent)
    assert done.stdout == (tmp_path / "metrics.csv").read_text() and done.stdout.splitlines()[0].startswith("run,step,")


# In a browser


@pytest.fixture(scope="module")
def browser():
    "A real browser."
    if why_not():
        pytest.skip(why_not())
    with Browser() as browser:
        yield browser


@pytest.fixture
def page(browser):
    "An empty page."
    with contextlib.closing(browser.chromium.new_page()) as page:
        page.set_default_timeout(180_000)  # milliseconds
        yield page


VISIBLE = "() => [...document.querySelectorAll('.nanogpt-runs tbody tr')].filter(r => r.offsetHeight).map(r => r.cells[0].textContent)"


def show(page, table):
    page.set_content(f"<!doctype html><body>{table._repr_html_()}</body>")


@pytest.mark.parametrize(
    "where",
    ["val_loss<2", "val_loss <= 2", "val_loss!=2", "val_loss=none", "state=finished", "state=failed|stopped", "state!=failed|stopped", "name~muon", "name!~MUON", "params>1M",
     "parameters>2500k", "n_embd>=64", "learning_rate=0.5", "bias=false", "group=rates", "group!=rates", "took<15", "created>=2026-01-04", "created=2026-01-03", "created<2026",
     "name~muon, val_loss<1.6", "name~muon and state=finished", 'device="cpu, 2 threads"', ""],
)  # fmt: skip
def test_the_field_in_the_page_means_what_the_command_line_means(where, page, history):
    show(page, runs(history, columns="n_embd bias learning_rate"))
    page.get_by_label("Filter the runs").fill(where)
    assert sorted(page.evaluate(VISIBLE)) == names(where, history)


def test_words_filter_while_they_are_typed(page, history):
    show(page, runs(history))
    field, count = page.get_by_label("Filter the runs"), page.get_by_role("status")
    assert count.inner_text() == "5 runs"
    field.press_sequentially("muon fin")
    assert page.evaluate(VISIBLE) == ["muon"] and count.inner_text() == "1 of 5 runs"
    for unfinished in ("val_loss<", "colour=red", "(["):
        field.fill(unfinished)
        assert len(page.evaluate(VISIBLE)) == (5 if unfinished == "val_loss<" else 0)
    field.fill("")
    assert len(page.evaluate(VISIBLE)) == 5


def test_heads_sort_by_click_and_by_key(page, history):
    show(page, runs(history))
    head = lambda name: page.locator("th", has_text=name)
    assert head("created").get_attribute("aria-sort") == "descending"
    for name, column in (("val loss", "val_loss"), ("params", "parameters"), ("took", "seconds"), ("name", "name"), ("tokens/s", "tokens_per_second"), ("created", "created")):
        show(page, runs(history))
        if column == "created":
            head("name").get_by_role("button").click()
        head(name).get_by_role("button").click()
        first = page.evaluate(VISIBLE)
        by = {run.name: row[column] for run, row in zip(runs(history), runs(history).rows)}
        wanted = [row[column] for row in runs(history, sort=column).rows]
        assert [by[n].lower() if column == "name" else by[n] for n in first] == (sorted(n.lower() for n in by) if column == "name" else wanted)
        head(name).get_by_role("button").press("Enter")
        known = [by[n] for n in first if by[n] is not None]
        again = [by[n] for n in page.evaluate(VISIBLE)]
        assert again[: len(known)] == known[::-1] and head(name).get_attribute("aria-sort") in ("ascending", "descending")
        assert page.locator("th[aria-sort]").count() == 1


def test_two_tables_in_a_page_do_not_mix_and_showing_again_does_no_harm(page, history):
    html = runs(history)._repr_html_()
    page.set_content(f"<body>{html}<hr>{html}{html[html.index('<script>') :]}</body>")
    assert page.get_by_label("Filter the runs").count() == 2
    page.get_by_label("Filter the runs").nth(1).fill("hot")
    assert len(page.evaluate(VISIBLE)) == 6 and page.get_by_role("status").all_inner_texts() == ["5 runs", "1 of 5 runs"]


def thousand(folder):
    "The runs of the benchmark, with two rows of metrics each."
    import importlib.util

    spec = importlib.util.spec_from_file_location("bench_history", Path(__file__).parent.parent / "bench" / "history.py")
    spec.loader.exec_module(bench := importlib.util.module_from_spec(spec))
    bench.make_runs(folder, 1000, rows=2)


@pytest.mark.slow
def test_a_thousand_runs_in_jupyterlab(tmp_path, browser):
    thousand(tmp_path / "runs")
    server = Lab(tmp_path)
    saved = dict(output_type="execute_result", execution_count=1, metadata={}, data={"text/html": runs(tmp_path / "runs")[:3]._repr_html_(), "text/plain": ""})
    cells = [dict(cell_type="code", id="a", source="runs()", metadata={}, outputs=[saved], execution_count=1)]
    (tmp_path / "stranger.ipynb").write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    with server, browser.tab(server) as tab:
        path = server.write("history.ipynb", ["from nanogpt_nb.history import runs\nfrom nanogpt_nb.compare import compare\nruns()", "compare(runs(sort='val_loss')[:3], x='tokens')"])
        notebook = tab.open(path)
        tab.plain()
        notebook.run()
        table, field = notebook.cell(0), notebook.cell(0).get_by_label("Filter the runs")
        assert table.get_by_role("status").inner_text() == "1,000 runs"
        field.press_sequentially("dd muon val_loss<1.9")  # d d would delete the cell if the notebook heard it
        assert len(notebook.cells()) == 2 and table.get_by_role("status").inner_text() == "0 of 1,000 runs"
        field.fill("name~muon val_loss<1.9")
        n = len(runs(tmp_path / "runs", where="name~muon, val_loss<1.9"))
        assert 0 < n < 1000 and table.get_by_role("status").inner_text() == f"{n} of 1,000 runs"
        table.locator("th", has_text="val loss").get_by_role("button").click()
        best = runs(tmp_path / "runs", where="name~muon", sort="val_loss")[0].name
        assert table.locator("tbody tr:visible td").first.inner_text() == best
        for theme in ("light", "dark"):
            tab.theme(theme)
            for i, what in enumerate(("runs", "compare")):
                notebook.cell(i)
                tab.shot(f"{what}-{theme}")
        assert notebook.cell(1).locator("img").evaluate("e => [e.alt.slice(0, 15), e.naturalWidth > 100]") == ["Validation loss", True]
        stranger = tab.begin("stranger.ipynb")  # its scripts are not trusted: the plain table is left
        rows = tab.page.locator(".jp-Notebook:visible .jp-OutputArea-output table tbody tr")
        until(lambda: rows.count() == 3, "the saved table of an untrusted notebook")
        assert stranger.panel().locator("input").count() == 0
        assert tab.errors == []


# A thousand


def test_the_figures_of_a_listing_come_from_two_small_files(tmp_path, monkeypatch):
    "What makes a thousand runs quick: metrics are not read where the status has the figures."
    run = make(tmp_path, "a")
    run.set_status("finished", step=100, val_loss=2.0, tokens_per_second=640.0, seconds=20.0)
    monkeypatch.setattr(Run, "metrics", lambda self: pytest.fail("metrics.jsonl was read"))
    (row,) = runs(tmp_path).to_dicts()
    assert (row["val_loss"], row["seconds"], row["steps"]) == (2.0, 20.0, 100)


def test_importing_them_needs_only_the_standard_library():
    words = "import sys, nanogpt_nb.history, nanogpt_nb.compare; print(*sorted({m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)))"
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r}); {words}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"__main__", "nanogpt_nb"}
