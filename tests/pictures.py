"""The README's pictures, made from a real JupyterLab: `python tests/pictures.py [FOLDER]` writes them to nbs/images/ in a few minutes.

Two runs are trained for them, one after the other, with the preset `cpu`: live.png shows the first in mid-run, explore.png
its model when it is finished, compare.png the two of them.
"""

import io
import sys
import tempfile
import time
from pathlib import Path

from lab import ROOT, Browser, Lab, Notebook, until, why_not
from PIL import Image

from nanogpt_nb.runs import Run

LIMIT = 150_000  # bytes a picture
LIVE = """from nanogpt_nb.config import NanoGPTConfig
from nanogpt_nb.launch import launch
from nanogpt_nb.watch import watch

config = NanoGPTConfig.preset("cpu").replace(eval_interval=50)
run = launch(config, name="muon")
watch(run)"""
EXPLORE = """from nanogpt_nb.explore import explore

explore("muon", prompt="ROMEO:\\nO, ")"""
COMPARE = """from nanogpt_nb.compare import compare

compare("muon", "adamw")"""


def keep(notebook: Notebook, i: int, path: Path, height: int = 0):
    "Save the toolbar and cell `i` of a notebook, at most `height` pixels of them, as a PNG of few colours."
    panel, page = notebook.panel().bounding_box(), notebook.page
    page.mouse.move(0, 0)
    page.evaluate("() => { document.activeElement?.blur(); }")
    cell = notebook.cell(i).bounding_box()
    tall = cell["y"] + cell["height"] + 12 - panel["y"]
    clip = dict(x=panel["x"], y=panel["y"], width=panel["width"], height=min(tall, height or tall))
    picture = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    for colours in (256, 128, 64, 32):
        picture.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size < LIMIT:
            return print(f"{path.name}: {picture.width}x{picture.height}, {path.stat().st_size / 1000:.0f} kB")
    raise SystemExit(f"{path.name} has {path.stat().st_size:,} bytes; show less of it.")


def ended(run: Run) -> bool:
    if run.state not in ("starting", "running", "finished"):
        raise SystemExit(f"The run {run.name!r} is {run.state}: {run.status.get('error')}")
    return run.state == "finished"


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as here, Lab(Path(here), OMP_NUM_THREADS="2") as lab, Browser() as browser:
        with browser.tab(lab, width=960, height=2400, scale=1.5) as tab:
            tab.plain()
            run = Run(lab.folder / "runs" / "muon")
            notebook = tab.open(lab.write("first.ipynb", [LIVE])).run(0)
            until(lambda: run.status.get("step", 0) > 0.68 * run.config.max_iters, "a run that is well on its way", 900)
            time.sleep(3)  # for a picture of just that
            keep(notebook, 0, folder / "live.png")
            until(lambda: ended(run), "the end of the first run", 900)
            tab.close()

            second = LIVE.replace("eval_interval=50", 'eval_interval=50, optimizer="adamw"').replace('"muon"', '"adamw"')
            notebook = tab.open(lab.write("second.ipynb", [second])).run(0)
            until(lambda: ended(Run(lab.folder / "runs" / "adamw")), "the end of the second run", 900)
            tab.close()

            tab.size(1160, 2400)
            notebook = tab.open(lab.write("explore.ipynb", [EXPLORE])).run(0)
            output = notebook.cell(0).locator(".jp-OutputArea").first
            until(lambda: " a second" in output.inner_text(), "a playground that has written its text")
            output.get_by_role("button", name="1", exact=True).click()
            time.sleep(1)
            keep(notebook, 0, folder / "explore.png")
            tab.close()

            tab.size(960, 2400)
            notebook = tab.open(lab.write("compare.ipynb", [COMPARE])).run(0)
            keep(notebook, 0, folder / "compare.png")


if __name__ == "__main__":
    if reason := why_not():
        raise SystemExit(f"There is {reason}." if reason.startswith("no ") else reason)
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "nbs" / "images")
