"Watching: what a view knows of a folder that changes under it, and its faces in a kernel, on a terminal and in a pipe."

import base64
import contextlib
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbclient import NotebookClient

from nanogpt_nb import watch as watching
from nanogpt_nb.compare import LINES
from nanogpt_nb.config import NanoGPTConfig
from nanogpt_nb.faces import CURVES, GREY, Picture, head_html, letters, screen, tail_html
from nanogpt_nb.pictures import BLUE, ORANGE, VERMILLION
from nanogpt_nb.runs import SILENCE, Run
from nanogpt_nb.view import Tail, View, in_notebook, span
from nanogpt_nb.watch import Ration, watch, watch_lines

CONFIG = NanoGPTConfig.preset("tiny").replace(max_iters=100, eval_interval=10)


def until(ask, what, seconds=240):
    end = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < end, f"not {what} in {seconds} s"
        time.sleep(0.02)
    return answer


def row(step):
    losses = {"train_loss": 4 - step / 50, "val_loss": 4 - step / 60} if step % 10 == 0 else {"loss": 4 - step / 50}
    return {"step": step, "seconds": step / 2, "tokens_per_second": 1000.0, "utilisation": 0.5} | losses


def write(run, *steps):
    for step in steps:
        run.append(row(step))


@pytest.fixture
def run(tmp_path):
    return Run.create(CONFIG, "a", tmp_path / "runs", device="cpu, 1 thread")


@pytest.fixture
def ended(run):
    write(run, *range(0, 31))
    run.log("--- step 30\nROMEO:\n<script>alert(1)</script>", "samples.txt")
    run.log("finished at step 30")
    run.set_status("finished", step=30, seconds=15.0)
    return run


def seen(run):
    view = View(run)
    view.refresh()
    return view


# Reading only what is new


@given(st.lists(st.tuples(st.sampled_from(["grow", "half", "cut", "replace", "rewrite", "remove"]), st.integers(1, 5)), max_size=12))
@settings(max_examples=60, deadline=None)
def test_a_tail_has_read_what_stands_in_the_file_whatever_was_done_to_it(tmp_path_factory, deeds):
    path = tmp_path_factory.mktemp("tail") / "file"
    tail, kept, count, text = Tail(path), [], 0, b""
    for deed, n in deeds:
        lines = b"".join(b"line %d\n" % (count + i) for i in range(n))
        count += n
        if deed == "grow":
            text += lines
        elif deed == "half":
            text += lines[:-3]
        elif deed == "cut":
            text = text[: len(text) // 2]
        elif deed == "remove":
            path.unlink(missing_ok=True)
            assert tail.read() == (False, [])
            continue
        else:
            text = lines * 3
        if deed == "replace":
            (path.parent / "new").write_bytes(text)
            os.replace(path.parent / "new", path)
        else:
            path.write_bytes(text)
        anew, new = tail.read()
        kept = new if anew else kept + new
        assert kept == text.split(b"\n")[:-1]


def test_a_tail_reads_no_byte_twice(tmp_path):
    path = tmp_path / "file"
    tail = Tail(path)
    got = []
    for i in range(50):
        with open(path, "ab") as f:
            f.write(b"%d\n" % i)
        got += tail.read()[1]
    assert got == [b"%d" % i for i in range(50)] and tail.at == path.stat().st_size


@given(st.lists(st.one_of(st.integers(0, 40), st.sampled_from(["forget", "half", "garbage", "look", "moved"])), max_size=30))
@settings(max_examples=60, deadline=None)
def test_a_view_that_looked_all_along_knows_what_a_new_one_knows(tmp_path_factory, deeds):
    run = Run.create(CONFIG, "a", tmp_path_factory.mktemp("view"))
    view = View(run)
    for deed in deeds:
        if deed == "forget":
            run.forget_after(15)
        elif deed == "half" or deed == "garbage":
            with open(run.path / "metrics.jsonl", "ab") as f:
                f.write({"half": b'{"step": 3, "lo', "garbage": b'\x00\xff[1]\n{"step": "x"}\n{"step": 1e99}\n'}[deed])
        elif deed == "moved":
            aside = run.path.rename(run.path.with_name("aside"))
            view.refresh()
            assert view.missing
            aside.rename(run.path)
        elif deed == "look":
            view.refresh()
        else:
            write(run, deed)
    view.refresh()
    new = seen(run)
    assert not view.missing and view.facts() == new.facts()
    assert [view.curve(which) for which in CURVES] == [new.curve(which) for which in CURVES]
    assert all(a[0] < b[0] for which in CURVES for a, b in zip(new.curve(which), new.curve(which)[1:]))


def test_a_look_at_an_unchanged_folder_finds_nothing_new(ended):
    view = View(ended)
    assert view.refresh() and not view.refresh()
    ended.log("one line more")
    assert view.refresh() and view.log()[-1] == "one line more"


def test_a_folder_that_comes_later(tmp_path):
    view = View(tmp_path / "runs" / "a")
    assert not view.ended and view.text() and view.missing is False
    view.refresh()
    assert view.missing and not view.ended
    write(Run.create(CONFIG, "a", tmp_path / "runs"), 0, 1, 2)
    view.refresh()
    assert not view.missing and len(view.rows) == 3


@pytest.mark.parametrize("damage", ["", "[]", "null", '{"config": 3}', '{"config": {"max_iters": "many", "eval_interval": null}, "device": 7}', "\x00"])
def test_damaged_files_are_a_view_without_the_facts_that_they_held(ended, damage):
    (ended.path / "config.json").write_text(damage)
    (ended.path / "status.json").write_text(damage)
    view = seen(ended)
    assert view.facts()["step"] == "30" and view.best == (30, 3.5)
    assert view.state == "unknown" and not view.ended
    assert head_html(view) and Picture().png(view)


# Whether it has ended


def hold(run):
    "A process that holds the run's lock and says that it runs."
    code = "import sys, time; from nanogpt_nb.runs import Run\nrun = Run(sys.argv[1])\nwith run.lock():\n    run.set_status('running', step=1); print(flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_a_run_goes_on_while_its_process_lives(run):
    process = hold(run)
    try:
        view = seen(run)
        assert view.state == "running" and not view.ended
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    view.refresh()
    assert view.ended and "killed" in view.headline()


@pytest.mark.parametrize("silence,state", [(10, "running"), (SILENCE + 60, "lost")])
def test_silence_of_another_machine_is_not_the_end(run, silence, state):
    write(run, 0, 1)
    status = dict(state="running", pid=1, host="elsewhere", heartbeat=time.time() - silence, step=1, seconds=1.0)
    (run.path / "status.json").write_text(json.dumps(status))
    view = seen(run)
    assert (view.state, view.ended) == (state, False)
    assert ("last sign of life" in view.headline()) is (silence > 30)


def test_a_folder_that_never_says_anything_is_given_up(run):
    (run.path / "status.json").unlink()
    view = seen(run)
    assert not view.ended
    view.since -= SILENCE + 1
    assert view.ended


@pytest.mark.parametrize("state,more,said", [("failed", dict(error="The memory is full."), "failed: The memory is full."), ("stopped", dict(reason="pruned"), "stopped: pruned")])
def test_the_headline_says_why(run, state, more, said):
    run.set_status(state, step=3, **more)
    assert seen(run).headline() == said


# The facts


def test_time_left_is_that_of_the_pace(run):
    write(run, *range(0, 51))
    with run.lock():
        view = seen(run)
    assert view.seconds_left == pytest.approx((100 - 50) / 2)
    assert "about 25 s left" in view.facts()["time"]


def test_time_left_forgets_a_slow_beginning(run):
    for step in range(0, 81):
        run.append({"step": step, "seconds": step * 10 if step < 40 else 400 + (step - 40) / 2, "loss": 1.0})
    with run.lock():
        assert seen(run).seconds_left == pytest.approx(20 / 2)


@given(st.floats(0, 1e7))
def test_spans_keep_their_order_of_size(seconds):
    said = span(seconds)
    unit = {"s": 1, "min": 60, "h": 3600}
    words = said.split()
    back = sum(int(n) * unit[u] for n, u in zip(words[::2], words[1::2]))
    assert abs(back - seconds) <= max(0.51, 0.1 * seconds if seconds < 3600 else 31)


# Faces


def test_what_a_model_writes_is_text(ended):
    html = tail_html(seen(ended))
    assert "<script>" not in html and "&lt;script&gt;" in html


def test_a_value_and_its_unit_stay_on_one_line(ended):
    facts = re.sub("<[^>]*>", "", head_html(seen(ended)))
    assert "15\N{NO-BREAK SPACE}s" in facts and "1,000\N{NO-BREAK SPACE}tokens/s" in facts


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(w * (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4) for w, c in zip((0.2126, 0.7152, 0.0722), channels))


@pytest.mark.parametrize("page", ["#ffffff", "#111111"])
def test_curves_and_letters_stand_out_on_a_light_and_on_a_dark_page(page):
    for colour in (GREY, *LINES, BLUE, ORANGE, VERMILLION, *(CURVES[k]["color"] for k in ("train_loss", "val_loss"))):
        light, dark = sorted((luminance(colour), luminance(page)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 3


def test_nothing_in_the_picture_depends_on_colour_alone():
    looks = [(style.get("ls", "-"), style.get("marker"), style.get("lw")) for style in CURVES.values()]
    assert len(set(looks)) == len(looks)


@pytest.mark.parametrize("scale", [1, 2])
def test_the_picture_is_small_and_has_no_background(ended, scale):
    from PIL import Image

    png = Picture().png(seen(ended), scale)
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    assert image.size == (660 * scale, 363 * scale) and len(png) < 30_000
    assert image.getpixel((1, 1))[3] == 0


def test_a_picture_can_be_drawn_again_after_the_run_went_back(run):
    picture, view = Picture(), View(run)
    write(run, *range(0, 41))
    view.refresh()
    first = picture.png(view)
    run.forget_after(20)
    view.refresh()
    assert picture.png(view) == Picture().png(view) != first


@pytest.mark.parametrize("width,height", [(40, 10), (60, 16), (80, 24), (200, 60)])
def test_the_screen_fits_the_terminal(ended, width, height):
    from rich.console import Console

    for i in range(30):
        ended.log(f"a long line {i} " * 20)
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=True)
    console.print(screen(seen(ended), console))
    lines = console.file.getvalue().splitlines()
    assert "finished" in lines[0] and len(lines) <= height


def test_letters_fit_their_width(ended):
    assert max(map(len, letters(seen(ended), 70, 12, colours=False).splitlines())) <= 70


# What it costs


def test_looking_never_takes_more_than_its_share(monkeypatch):
    now, cpu = [0.0], [0.0]
    monkeypatch.setattr(watching.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watching.time, "thread_time", lambda: cpu[0])
    ration, looks = Ration(0.01, 1, 10), 0
    while now[0] < 2000:
        if ration.due():
            looks += 1
            with ration:
                cpu[0] += 0.05
                now[0] += 0.05
        now[0] += 0.25
    assert 0 < cpu[0] <= 0.01 * now[0] + 0.05 and looks > 300


def test_pauses_grow_with_the_hours(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watching.time, "monotonic", lambda: now[0])
    ration, pauses = Ration(0.01, 1, 10), []
    for now[0] in (0.0, 1800.0, 7200.0, 90_000.0):
        with ration:
            pass
        pauses.append(ration.next - now[0])
    assert pauses[0] == pytest.approx(1, abs=0.1) and pauses == sorted(pauses) and pauses[-1] == pytest.approx(10, abs=0.1)


# As lines, and on a terminal

WATCH = "import sys; from nanogpt_nb.watch import watch; watch(sys.argv[1], sys.argv[2], every=0.05)"


def test_in_a_pipe_each_estimate_is_one_line_and_it_ends_with_the_run(run):
    write(run, 0)
    with run.lock():
        process = subprocess.Popen([sys.executable, "-c", WATCH, "a", str(run.path.parent)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "a: running\n"
        assert process.stdout.readline().startswith("step     0: train 4.0000, val 4.0000")
        write(run, *range(1, 31))
        assert [process.stdout.readline().split(":")[0] for _ in range(3)] == ["step    10", "step    20", "step    30"]
        run.forget_after(10)
        write(run, *range(11, 41))
        run.set_status("finished", step=40)
    rest, _ = process.communicate(timeout=240)
    assert [line.split(":")[0] for line in rest.splitlines()][:2] == ["step    40", "a"]
    assert process.returncode == 0 and "finished" in rest


def test_lines_of_a_run_that_has_ended(ended):
    said = []
    watch_lines(View(ended), show=said.append)
    assert len(said) == 4 + 1 and not in_notebook()
    assert "\n".join(said).count("a: finished") == 1


def test_rows_of_the_log_have_their_head_above_them(run):
    run.log("run a: 1 parameter")
    run.log(head := " step  train loss  val loss  tokens/s     time  it writes")
    for i in range(300):
        run.log(f"{i:5}      4.1000    4.2000     1,000     0:01  a text of some length, so that the head is far away")
    for view in (seen(run), View(run)):  # the second has not looked yet
        view.refresh()
        assert len(view.log()) == 6 and view.log()[0] == head and view.log()[1].startswith("  295 ")
        assert f">{head}\n  295 " in tail_html(view)
    for i in range(6):
        run.log(f"going on {i}")
    assert head not in seen(run).log()


def test_watch_names_the_runs_that_there_are(ended):
    with pytest.raises(Exception, match="there is a"):
        watch("b", ended.path.parent)


@contextlib.contextmanager
def on_a_terminal(*words, rows=30, columns=90):
    "A process on a terminal of its own; gives it and a function that reads what is new."
    leader, follower = pytest.importorskip("pty").openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": str(rows), "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(words, stdin=follower, stdout=follower, stderr=follower, env=env, start_new_session=True)
    os.close(follower)
    shown = [""]

    def look():
        with contextlib.suppress(OSError):
            while select.select([leader], [], [], 0)[0]:
                if not (new := os.read(leader, 65536)):
                    break
                shown[0] += new.decode("utf-8", "replace")
        return shown[0]

    try:
        yield process, look
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(leader)


def test_on_a_terminal_the_curve_grows_and_ctrl_c_ends_only_the_looking(run):
    with run.lock(), on_a_terminal(sys.executable, "-c", WATCH, "a", str(run.path.parent)) as (process, look):
        write(run, *range(0, 21))
        until(lambda: "20 of 100" in look(), "a first screen")
        assert "val loss" in look() and "⠀" in look()
        write(run, *range(21, 31))
        until(lambda: "30 of 100" in look(), "a later screen")
        process.send_signal(signal.SIGINT)
        until(lambda: look() is not None and process.poll() is not None, "the end of the looking")
        assert process.returncode == 0 and "Not watching any more; a is running." in look() and "Traceback" not in look()
        assert run.state == "running"


def test_on_a_terminal_the_last_screen_stays(ended):
    with on_a_terminal(sys.executable, "-c", WATCH, "a", str(ended.path.parent)) as (process, look):
        until(lambda: look() is not None and process.poll() is not None, "the end of the looking")
        assert process.returncode == 0 and "finished at step 30" in look() and "30 of 100 (30%)" in look()


# In a kernel


WIDGET = "application/vnd.jupyter.widget-view+json"


class Kernel:
    "A real kernel, as a notebook has it: cells are run one by one, and their outputs kept as they would be saved."

    def __init__(self, folder):
        self.notebook = nbformat.v4.new_notebook()
        self.client = NotebookClient(self.notebook, timeout=600, startup_timeout=240, iopub_timeout=120, kernel_name="python3", resources={"metadata": {"path": str(folder)}})

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(self.client.setup_kernel())
        return self

    def __exit__(self, *_): self.stack.close()

    def run(self, source):
        "Run a cell; its outputs."
        self.notebook.cells.append(nbformat.v4.new_code_cell(source))
        self.client.execute_cell(self.notebook.cells[-1], len(self.notebook.cells) - 1)
        return self.notebook.cells[-1].outputs


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    before, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS"), "1"
    with Kernel(tmp_path_factory.mktemp("kernel")) as kernel:
        kernel.run("from nanogpt_nb.watch import watch, live, Watching\nfrom nanogpt_nb import watch as w\nfrom nanogpt_nb.runs import Run")
        # what a look cost on a busy machine is not made up for by minutes of silence
        kernel.run("usual = w.Ration\nw.Ration = lambda share, first, later: usual(max(share, 0.5), first, later)")
        yield kernel
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before


def mimes(outputs): return [sorted(o["data"]) for o in outputs]


PLAIN = [["text/html", "text/plain"], ["image/png", "text/plain"], ["text/html", "text/plain"]]


def words(outputs): return "\n".join(o["data"]["text/plain"] for o in outputs)


def test_a_notebook_keeps_words_and_a_small_png_of_a_run_that_has_ended(kernel, ended):
    outputs = kernel.run(f"watch('a', {str(ended.path.parent)!r})")
    assert mimes(outputs) == PLAIN and len(json.dumps(outputs)) < 60_000
    assert base64.b64decode(outputs[1]["data"]["image/png"]).startswith(b"\x89PNG")
    assert "finished" in words(outputs) and "Loss over 30 steps" in words(outputs) and "ROMEO" in words(outputs)
    assert re.search("<details.*>Loss over 30 steps.*</details>", outputs[2]["data"]["text/html"], re.S)  # a PNG has no words for a screen reader


def wait(kernel, name, run, lock, *state, **end):
    "Let a run end while a cell waits for it, since no cell is listened to that is over; what the waiting gives."
    waits = run.path.with_name("waits")

    def finish():
        until(waits.exists, "a cell that waits")
        run.set_status(*state, **end)
        lock.close()

    thread = threading.Thread(target=finish)
    thread.start()
    told = kernel.run(f"open({str(waits)!r}, 'w').close(); {name}.wait(240)")[0]["data"]["text/plain"]
    thread.join()
    return told


@pytest.mark.parametrize("widgets", [True, False])
def test_a_cell_that_watches_is_over_at_once_and_shows_the_end_when_it_comes(kernel, run, widgets):
    write(run, *range(0, 11))
    kernel.run(f"w.widgets_work = lambda: {widgets}")
    with contextlib.ExitStack() as lock:
        lock.enter_context(run.lock())
        outputs = kernel.run(f"v = watch({str(run.path)!r}, every=0.05); v")
        assert len(outputs) == 3 and all((WIDGET in o["data"]) is widgets for o in outputs)
        assert "running" in words(outputs) and kernel.run("v.thread.is_alive()")[0]["data"]["text/plain"] == "True"
        write(run, *range(11, 41))
        run.log("finished at step 40 of 100")
        assert wait(kernel, "v", run, lock, "finished", step=40, seconds=20.0) == "True"
    assert mimes(outputs) == PLAIN and len(json.dumps(outputs)) < 60_000
    assert "finished" in words(outputs) and "40 of 100" in words(outputs)
    assert kernel.run("Watching.live")[0]["data"]["text/plain"] == "{}"


def test_watching_twice_leaves_one_thread_and_the_older_view_as_it_stands(kernel, run):
    write(run, *range(0, 11))
    with contextlib.ExitStack() as lock:
        lock.enter_context(run.lock())
        first = kernel.run(f"v1 = watch({str(run.path)!r}, every=0.05)")
        second = kernel.run(f"v2 = watch({str(run.path)!r}, every=0.05)")
        assert kernel.run("v1.thread.is_alive(), v2.thread.is_alive()")[0]["data"]["text/plain"] == "(False, True)"
        assert mimes(first) == PLAIN and len(second) == 3
        assert wait(kernel, "v2", run, lock, "stopped", step=10) == "True"
    assert "running" in words(first) and "stopped" in words(second)


def test_a_run_whose_folder_is_gone_does_not_end_the_thread(kernel, run):
    write(run, *range(0, 11))
    with contextlib.ExitStack() as lock:
        lock.enter_context(run.lock())
        outputs = kernel.run(f"v = watch({str(run.path)!r}, every=0.05)")
        aside = run.path.rename(run.path.with_name("aside"))
        kernel.run("import time\nend = time.time() + 240\nwhile not v.view.missing and time.time() < end: time.sleep(0.02)")
        assert kernel.run("v.view.missing, v.thread.is_alive()")[0]["data"]["text/plain"] == "(True, True)"
        aside.rename(run.path)
        assert wait(kernel, "v", run, lock, "finished", step=10) == "True"
    assert "finished" in words(outputs)


TRAIN = """
from nanogpt_nb.config import NanoGPTConfig
from nanogpt_nb.train import train
config = NanoGPTConfig.preset("tiny").replace(max_iters={steps}, eval_interval=20, eval_iters=2, data=({text!r},))
run = train(config, name={name!r}, wandb="disabled")
"""


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 200)
    return str(tmp_path / "text.txt")


def test_train_shows_the_view_instead_of_its_lines(kernel, text):
    outputs = kernel.run(TRAIN.format(steps=60, text=text, name="short"))
    assert [o["output_type"] for o in outputs] == ["display_data"] * 3, "and nothing printed beside it"
    assert mimes(outputs) == PLAIN and len(json.dumps(outputs)) < 60_000
    assert "short: finished" in words(outputs) and "60 of 60" in words(outputs)
    assert kernel.run("Watching.live")[0]["data"]["text/plain"] == "{}"


def test_an_error_in_training_leaves_the_view_with_the_reason(kernel, text):
    kernel.run("import contextlib")
    outputs = kernel.run(TRAIN.format(steps=60, text=text, name="bad").replace("eval_iters=2", "eval_iters=2, learning_rate=1e30").replace("run =", "with contextlib.suppress(Exception): run ="))
    assert "bad: failed: The loss became" in words(outputs) and mimes(outputs)[0] == PLAIN[0]
    assert kernel.run("Watching.live")[0]["data"]["text/plain"] == "{}"


def test_a_picture_of_a_sweep_has_words_below_it_and_no_ground(kernel):
    from PIL import Image

    outputs = kernel.run("from nanogpt_nb import pictures\npictures.Picture(pictures.axes()[0], 'what <it> shows')")
    assert mimes(outputs) == [["image/png", "text/plain"], ["text/html"]]
    assert "what &lt;it&gt; shows" in outputs[1]["data"]["text/html"] and outputs[0]["data"]["text/plain"] == "what <it> shows"
    assert Image.open(io.BytesIO(base64.b64decode(outputs[0]["data"]["image/png"]))).convert("RGBA").getpixel((1, 1))[3] == 0


BREAK = """
import time
from nanogpt_nb.faces import Picture
png, count = Picture.png, []
def broken(self, view, scale=1):
    count.append(scale)
    if {when}: raise {error}("no ink")
    return png(self, view, scale)
def wait(row):
    end = time.monotonic() + 240
    while len(count) < {looks}: assert time.monotonic() < end; time.sleep(0.01)
ration, w.Ration = w.Ration, lambda share, first, later: ration(1, 0, 0)
Picture.png = broken
"""
MEND = "Picture.png, w.Ration = png, ration"


@pytest.mark.parametrize("widgets", [True, False])
@pytest.mark.parametrize("when,looks", [("True", 1), ("len(count) == 2", 2), ("scale == 2", 1)], ids=["start", "middle", "end"])
def test_a_picture_that_fails_harms_neither_training_nor_the_words(kernel, text, when, looks, widgets):
    name = f"faint-{looks}-{len(when)}-{widgets}"
    kernel.run(f"w.widgets_work = lambda: {widgets}")
    kernel.run(BREAK.format(when=when, looks=looks, error="RuntimeError"))
    try:
        outputs = kernel.run(TRAIN.format(steps=60, text=text, name=name).replace("wandb=", "on_estimate=wait, wandb="))
        assert kernel.run("run.state, count.count(2), len(Watching.live)")[0]["data"]["text/plain"] == f"('finished', {int(looks == 1 and when != 'True')}, 0)"
    finally:
        kernel.run(MEND)
    assert not any(o["output_type"] == "stream" for o in outputs) and not any(WIDGET in o["data"] for o in outputs)
    assert f"{name}: finished" in words(outputs) and words(outputs).count("RuntimeError: no ink") == 1
    assert "no ink" in outputs[0]["data"]["text/html"] and not any("image/png" in o["data"] for o in outputs)


def test_an_interrupt_during_the_last_picture_comes_too_late(kernel, text):
    kernel.run(BREAK.format(when="count.count(2) == 1 and scale == 2", looks=0, error="KeyboardInterrupt"))
    try:
        outputs = kernel.run(TRAIN.format(steps=60, text=text, name="late"))
        assert kernel.run("run.state, count.count(2), len(Watching.live)")[0]["data"]["text/plain"] == "('finished', 2, 0)"
    finally:
        kernel.run(MEND)
    assert mimes(outputs) == PLAIN and "late: finished" in words(outputs)


def test_where_no_view_can_begin_train_prints_its_lines(kernel, text):
    kernel.run("face, w.head_html = w.head_html, None")
    try:
        outputs = kernel.run(TRAIN.format(steps=60, text=text, name="lines"))
    finally:
        kernel.run("w.head_html = face")
    said = "".join(o["text"] for o in outputs if o["output_type"] == "stream")
    assert "There is no live view (TypeError" in said and "finished at step 60 of 60" in said


def test_without_matplotlib_and_widgets_there_are_words(ended, tmp_path):
    with Kernel(tmp_path) as kernel:
        kernel.run("import sys\nsys.modules |= {'matplotlib': None, 'ipywidgets': None}\nfrom nanogpt_nb.watch import watch, widgets_work")
        outputs = kernel.run(f"watch({str(ended.path)!r})")
        assert mimes(outputs) == [PLAIN[0], PLAIN[2]] and "finished" in words(outputs)


def test_in_vscode_outputs_are_plain_from_the_beginning(kernel):
    kernel.run("import importlib; importlib.reload(w)")
    assert kernel.run("w.widgets_work()")[0]["data"]["text/plain"] == "True"
    kernel.run("__vsc_ipynb_file__ = 'a.ipynb'")
    assert kernel.run("w.widgets_work()")[0]["data"]["text/plain"] == "False"
    kernel.run("del __vsc_ipynb_file__")
