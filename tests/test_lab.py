"In the real thing: JupyterLab in a headless Chromium, as a reader sees it. Its pictures lie in .screenshots/ afterwards."

import contextlib
import json
import re
import time

import pytest
from lab import ROOT, Browser, Lab, until, why_not

from nanogpt_nb.checkpoints import read_json
from nanogpt_nb.config import NanoGPTConfig
from nanogpt_nb.launch import launch, stop
from nanogpt_nb.runs import Run, RunError, list_runs
from nanogpt_nb.train import train

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

NOTEBOOKS = sorted(p.stem for p in (ROOT / "nbs").glob("*.ipynb"))
# Those that show something of their own to the browser. nbdev_test runs all of them from top to bottom, and so does --slow, here.
SEEN = {"index", "02_bigram", "06d_history", "06e_compare", "07c_train", "10c_controls", "10d_watch", "11d_explore", "30b_launch", "40_first_gpt"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with Lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def tab(lab, browser):
    with browser.tab(lab) as tab:
        tab.plain()
        yield tab


@pytest.fixture
def page(request, lab, tab):
    "The tab, for one test: what is open is closed afterwards; a test that fails leaves a picture."
    failed = request.session.testsfailed
    yield tab
    if request.session.testsfailed > failed:
        tab.shot(f"failed-{request.node.name}")
    tab.close()
    for run in list_runs(lab.folder / "runs"):
        with contextlib.suppress(RunError):
            stop(run)


# Every notebook, from top to bottom


def run_all(tab, names: list[str], at_once: int = 2, seconds: float = 300) -> dict:
    "Run notebooks to their end, some at a time: name to what went wrong and which cells did not run."
    waiting, open_, told = list(names), {}, {}
    while waiting or open_:
        while waiting and len(open_) < at_once:
            notebook = tab.begin(f"nbs/{waiting[0]}.ipynb")
            open_[waiting.pop(0)] = [notebook, False, time.monotonic() + seconds]
        for name, (notebook, started, end) in list(open_.items()):
            late = time.monotonic() > end
            if not started and notebook.js("ready"):
                notebook.start()
                open_[name][1] = True
            elif late or (started and notebook.over()):
                told[name] = dict(late=late, failures=notebook.failures(), left=[i for i in notebook.code() if notebook.count(i) is None])
                notebook.close()
                del open_[name]
        time.sleep(0.05)
    return told


@pytest.fixture(scope="module")
def ran(request, tab):
    "What came of those notebooks that this session asks for."
    mine = [i for i in request.session.items if getattr(i, "originalname", "") == "test_a_notebook_runs_from_top_to_bottom"]
    return run_all(tab, [i.callspec.params["name"] for i in mine if not any(m.name == "skip" for m in i.iter_markers())])


@pytest.mark.parametrize("name", [n if n in SEEN else pytest.param(n, marks=pytest.mark.slow) for n in NOTEBOOKS])
def test_a_notebook_runs_from_top_to_bottom(ran, name):
    assert ran[name] == dict(late=False, failures=[], left=[])


# Training, seen from a notebook

CONFIG = NanoGPTConfig.preset("tiny").replace(max_iters=100_000, eval_interval=100, eval_iters=2, sample_tokens=60)
SETUP = """from nanogpt_nb.config import NanoGPTConfig
from nanogpt_nb.launch import launch
from nanogpt_nb.train import train
from nanogpt_nb.watch import watch

config = NanoGPTConfig.preset("tiny").replace(
    data="text.txt", max_iters=100_000, eval_interval=100, eval_iters=2, sample_tokens=60)"""


@pytest.fixture(scope="module", autouse=True)
def text(lab):
    "Something to learn from that needs no internet."
    words = "the sea gave back a ship of light and the king said nothing to the men who came by night".split()
    lines = [" ".join(words[(i * k) % len(words)] for k in range(1, 9)).capitalize() + "." for i in range(1, 600)]
    (lab.folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")


def run_of(lab, name: str) -> Run:
    return Run(lab.folder / "runs" / name)


def checkpoint_step(run: Run) -> int:
    return read_json(run.checkpoint() / "checkpoint.json")["step"]


def step(notebook, i: int) -> int:
    "The step that the view in the output of cell `i` shows, -1 while it shows none."
    found = re.search(r"step\s+([\d,]+)", notebook.text(i))
    return int(found[1].replace(",", "")) if found else -1


def picture(notebook, i: int) -> str | None:
    "Where the picture in the output of cell `i` comes from: another address is another picture."
    images = notebook.cell(i).locator(".jp-OutputArea-output img")
    return images.first.get_attribute("src") if images.count() else None


def look(notebook, i: int, name: str):
    "Pictures of a cell's output in the light and the dark theme, wide and narrow; it must fit its place."
    output = notebook.cell(i).locator(".jp-OutputArea").first
    for theme in ("light", "dark"):
        notebook.tab.theme(theme)
        for shape, width in (("wide", 1200), ("narrow", 640)):
            notebook.tab.size(width)
            notebook.tab.size(width, int(min(2500, max(700, output.bounding_box()["height"] + 350))))
            notebook.cell(i)
            notebook.tab.shot(f"{name}-{theme}-{shape}")
            assert output.evaluate("e => e.scrollWidth <= e.clientWidth + 1"), f"{name} is too wide for {width} pixels"
    notebook.tab.theme("light")
    notebook.tab.size(1200)


# The history


DOLLARS = """from IPython.display import HTML, display
from nanogpt_nb.remote.bill import Money
money = Money.__new__(Money)
vars(money).update(name="gpu", phase="ready", budget=5, so_far=0.06, left=4.94, minutes=1, per_hour=3.29, until=None, rehearsal=False)
display(money, HTML("<i>$x$</i>"))"""


def test_the_table_of_runs_sorts_by_a_click_and_filters_by_typing(lab, page):
    for name, loss, layers in (("middle", 2.0, 2), ("worst", 2.5, 1), ("best", 1.5, 3), ("none-yet", None, 3)):
        run = Run.create(NanoGPTConfig.preset("tiny").replace(n_layer=layers), name, lab.folder / "history", parameters=10_000 * layers, device="cpu")
        if loss:
            run.append(dict(step=50, val_loss=loss, tokens=100, seconds=1.0))
        run.set_status("finished", step=50)
    notebook = page.open(lab.write("history.ipynb", ["from nanogpt_nb.history import runs\nruns('history')", DOLLARS])).run()
    until(notebook.cell(1).locator("i mjx-container").count, "mathematics where it is meant")
    assert "$4.94 of $5.00" in notebook.text(1) and not notebook.cell(1).locator("table mjx-container").count()
    output = notebook.cell(0).locator(".jp-OutputArea").first
    names = lambda: [n for n in output.locator("tbody tr:visible td:first-child").all_inner_texts()]
    assert sorted(names()) == ["best", "middle", "none-yet", "worst"]

    head = output.get_by_role("columnheader", name="val loss").get_by_role("button")
    head.click()
    assert names() == ["best", "middle", "worst", "none-yet"]
    head.press("Enter")
    assert names() == ["worst", "middle", "best", "none-yet"]
    look(notebook, 0, "runs")

    search = output.get_by_role("searchbox")
    search.press_sequentially("val_loss<2.2")
    assert names() == ["middle", "best"]
    assert "2 of 4 runs" in output.get_by_role("status").inner_text()
    search.fill("ORST")
    assert names() == ["worst"]
    search.fill("")
    assert len(names()) == 4


# The live view


@pytest.fixture
def away(lab):
    "A run that a process of its own trains."
    return launch(CONFIG.replace(data=str(lab.folder / "text.txt")), runs_dir=lab.folder / "runs")


def grows(notebook, i: int):
    "Wait until the view in the output of cell `i` has gone on: a later step, another picture."
    then = until(lambda: (step(notebook, i), picture(notebook, i)) if step(notebook, i) > 0 and picture(notebook, i) else None, "a view with curves")
    until(lambda: step(notebook, i) > then[0], "a later step")
    until(lambda: picture(notebook, i) not in (None, then[1]), "another picture")


def test_the_curve_grows_while_train_runs_and_an_interrupt_stops_it_well(lab, page):
    notebook = page.open(lab.write("train.ipynb", [SETUP, "run = train(config, name='here')", "run.state, run.checkpoint().name"])).run(0)
    notebook.start(1)
    grows(notebook, 1)
    assert not notebook.over()
    look(notebook, 1, "train-running")
    notebook.interrupt()
    until(notebook.over, "the end of the cell")
    notebook.run(2)
    assert notebook.text(2) == "('stopped', 'last')"
    run = run_of(lab, "here")
    assert run.status["step"] == checkpoint_step(run) > 0
    assert step(notebook, 1) == run.status["step"] and "here: stopped" in notebook.text(1)
    look(notebook, 1, "train-stopped")
    saved = json.loads(notebook.save().read_text(encoding="utf-8"))
    assert len(json.dumps(saved["cells"][1]["outputs"])) < 60_000


def test_stop_is_heard_while_the_kernel_is_free_and_while_it_is_busy(lab, page):
    busy = "while run.state in ('starting', 'running'): sum(range(10_000))"
    cells = [SETUP, "run = launch(config, name='away')\nwatch(run)", "run = launch(resume='away')\nwatch(run)\n" + busy]
    notebook = page.open(lab.write("launch.ipynb", cells)).run(0)
    notebook.run(1)
    grows(notebook, 1)
    look(notebook, 1, "launch-running")
    run = run_of(lab, "away")
    assert run.state == "running"
    notebook.cell(1).get_by_role("button", name="Stop").click()
    until(lambda: run.state == "stopped", "a run that is stopped")
    stopped = checkpoint_step(run)
    assert stopped == run.status["step"] > 0
    until(lambda: "away: stopped" in notebook.text(1) and step(notebook, 1) == stopped, "a view that says so")
    look(notebook, 1, "launch-stopped")

    notebook.start(2)
    grows(notebook, 2)
    assert step(notebook, 2) > stopped and not notebook.over()
    notebook.cell(2).get_by_role("button", name="Stop").click()
    until(notebook.over, "the end of a cell that waits for the run's")
    assert run.state == "stopped" and checkpoint_step(run) > stopped and notebook.failures() == []


def test_a_tab_that_is_loaded_again_in_mid_run_shows_the_view(lab, page, away):
    notebook = page.open(lab.write("reload.ipynb", [f"from nanogpt_nb.watch import watch\nwatch({away.name!r})"])).run(0)
    grows(notebook, 0)
    notebook.save()  # as JupyterLab does by itself every two minutes
    page.reload()
    notebook = page.open("reload.ipynb")
    assert notebook.count(0)
    grows(notebook, 0)
    page.shot("reloaded")


def test_a_tab_that_is_loaded_again_while_train_keeps_the_kernel_busy_shows_the_view_at_the_end(lab, page):
    notebook = page.open(lab.write("busy.ipynb", [SETUP, "run = train(config, name='busy')"])).run(0)
    notebook.start(1)
    grows(notebook, 1)
    notebook.save()
    page.reload()
    other = page.open(lab.write("other.ipynb", ["from nanogpt_nb.watch import watch\nwatch('busy')"])).run(0)
    grows(other, 0)
    notebook = page.begin("busy.ipynb")
    until(lambda: notebook.js("connected"), "a connection to the kernel")
    notebook.interrupt()
    notebook.ready()
    until(lambda: step(notebook, 1) > 0 and picture(notebook, 1), "the view as it is at the end")
    assert step(notebook, 1) == checkpoint_step(run_of(lab, "busy")) and "busy: stopped" in notebook.text(1)


def test_a_kernel_that_was_restarted_in_mid_run_watches_again(lab, page, away):
    notebook = page.open(lab.write("restart.ipynb", ["from nanogpt_nb.watch import watch\nwatch()", "from nanogpt_nb.watch import watch\nwatch()"])).run(0)
    grows(notebook, 0)
    notebook.restart()
    assert away.state == "running"
    notebook.run(1)
    grows(notebook, 1)
    page.shot("restarted")


# The playground


@pytest.fixture(scope="module")
def trained(lab):
    config = CONFIG.replace(data=str(lab.folder / "text.txt"), max_iters=100)
    return train(config, name="trained", runs_dir=lab.folder / "trained", quiet=True)


def test_one_plays_with_a_model_in_explore(lab, page, trained):
    notebook = page.open(lab.write("explore.ipynb", ["from nanogpt_nb.explore import explore\nexplore(runs_dir='trained')"])).run(0)
    output = notebook.cell(0).locator(".jp-OutputArea").first
    written = lambda: output.locator("pre:visible").first.inner_text()
    prompt = output.get_by_label("Prompt")
    until(lambda: output.get_by_role("button", name="Write").is_enabled(), "a playground")

    prompt.fill("The king said")
    output.get_by_role("button", name="Write").click()
    until(lambda: written().startswith("The king said") and len(written()) > 200, "text")
    look(notebook, 0, "explore")

    before = output.get_by_label("Prompt").input_value()
    prompt.fill("The king said ¿")
    until(lambda: output.get_by_role("alert").count(), "what is wrong with a letter that the text does not have")
    prompt.fill(before)
    until(lambda: not output.get_by_role("alert").count(), "that it is well again")
    output.get_by_role("tab", name="Embedding").click()
    output.get_by_role("img", name="The token embeddings").wait_for()
    look(notebook, 0, "explore-embedding")
