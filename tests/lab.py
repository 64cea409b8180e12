"""Drive a real JupyterLab in a headless Chromium.

A `Lab` is a server with a token, settings and a folder of its own, so that neither the checkout nor the user's Jupyter is
touched; a `Tab` is a page of the browser that shows it; a `Notebook` is a notebook that is open in a tab. Nothing leaves this machine.
"""

import contextlib
import functools
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path

from box import free_port

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = re.compile(r"^#\|\s*(slow|gpu|net)\b", re.M)  # flags of cells that take minutes, a GPU or the internet
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MAC = [f"/Applications/{name}.app/Contents/MacOS/{name}" for name in ("Chromium", "Google Chrome")]
MISSING = "no Chromium that starts; install it (Debian: apt-get install chromium; anywhere: playwright install chromium)"


def starts(path: str) -> bool:
    "Whether it is a browser that starts; Ubuntu's chromium-browser may be a script that only asks for a snap."
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run([path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=180).returncode == 0
    return False


@functools.cache
def chromium() -> str | None:
    "The path of a Chromium or Chrome that starts: `$NANOGPT_CHROMIUM`, the system's, or Playwright's own."
    if chosen := os.environ.get("NANOGPT_CHROMIUM"):
        return chosen if starts(chosen) else None
    folders = [os.environ.get("PLAYWRIGHT_BROWSERS_PATH"), "~/.cache/ms-playwright", "~/Library/Caches/ms-playwright", "~/AppData/Local/ms-playwright"]
    inside = ("chromium*/*/chrome", "chromium*/*/*headless*shell", "chromium*/*/*.exe", "chromium*/*/*.app/Contents/MacOS/*")
    own = [str(p) for f in folders if f for pattern in inside for p in sorted(Path(f).expanduser().glob(pattern), reverse=True)]
    return next((path for path in [*filter(None, map(shutil.which, BROWSERS)), *MAC, *own] if starts(path)), None)


def why_not() -> str | None:
    "Why no browser can be driven here, as a reason to skip; None where it can."
    for package in ("playwright", "jupyterlab"):
        try:
            __import__(package)
        except ImportError:
            return f"{package} is not installed; install it: pip install -e '.[lab,dev]' -c constraints.txt"
    return None if chromium() else MISSING


def until(ask: Callable, what: str, seconds: float = 180, every: float = 0.1):
    "The first true answer of `ask()`; an error that says `what` did not happen, if there is none in time."
    end = time.monotonic() + seconds
    while not (answer := ask()):
        if time.monotonic() > end:
            raise TimeoutError(f"In {seconds:.0f} s: not {what}.")
        time.sleep(every)
    return answer


class Lab:
    "A JupyterLab at work in `folder`, with a copy of the notebooks in `folder`/nbs."

    def __init__(self, folder: Path, **env: str):
        self.folder, self.env, self.token = Path(folder), env, secrets.token_hex(16)
        self.home = self.folder / ".jupyter"
        ignored = shutil.ignore_patterns(".*", "_*", "runs", "wandb", "*.md")
        shutil.copytree(ROOT / "nbs", self.folder / "nbs", ignore=ignored, dirs_exist_ok=True)

    def __enter__(self):
        self.home.mkdir(exist_ok=True)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        (self.home / "jupyter_lab_config.json").write_text(json.dumps(self.settings()), encoding="utf-8")
        quiet = self.home / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
        quiet.parent.mkdir(parents=True, exist_ok=True)
        quiet.write_text(json.dumps(dict(checkForUpdates=False, doNotDisturbMode=True, fetchNews="false")), encoding="utf-8")
        self.log = open(self.home / "log.txt", "ab")
        self.process = subprocess.Popen([sys.executable, "-m", "jupyterlab"], cwd=self.folder, env=self.environment(), stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        try:
            until(self.answers, "a JupyterLab that answers", 240)
        except BaseException:
            self.__exit__()
            raise
        return self

    def settings(self) -> dict:
        server = dict(ip="127.0.0.1", port=self.port, port_retries=0, root_dir=str(self.folder), open_browser=False, allow_root=True, terminals_enabled=False)
        return dict(
            ServerApp=server,
            LabApp=dict(expose_app_in_browser=True, news_url=None, check_for_updates_class="jupyterlab.NeverCheckForUpdate", extension_manager="readonly"),
        )

    def environment(self) -> dict:
        "The environment of the server and of its kernels: no account, no proxy, one thread a process."
        theirs = ("JUPYTER", "WANDB", "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        env = {key: value for key, value in os.environ.items() if not key.startswith(theirs)}
        folders = dict.fromkeys(("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"), str(self.home)) | {"JUPYTER_RUNTIME_DIR": str(self.home / "runtime")}
        lab = {"JUPYTERLAB_SETTINGS_DIR": str(self.home / "lab" / "user-settings"), "JUPYTERLAB_WORKSPACES_DIR": str(self.home / "lab" / "workspaces")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        return env | folders | lab | dict(PATH=path, JUPYTER_TOKEN=self.token, WANDB_MODE="disabled", OMP_NUM_THREADS="1") | self.env

    def ask(self, path: str, method: str = "GET"):
        "The server's answer from its REST interface."
        request = urllib.request.Request(f"{self.url}/api/{path}", method=method, headers={"Authorization": f"token {self.token}"})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=120) as answer:
            return json.loads(answer.read() or "null")

    def answers(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"JupyterLab ended at once:\n{(self.home / 'log.txt').read_text(errors='replace')[-3000:]}")
        with contextlib.suppress(OSError, urllib.error.URLError):
            return bool(self.ask("status"))

    def write(self, path: str, cells: Iterable[str]) -> str:
        "A new notebook with these cells of code; its path."
        made = [dict(cell_type="code", id=f"cell-{i}", source=source, metadata={}, outputs=[], execution_count=None) for i, source in enumerate(cells)]
        kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(json.dumps(dict(cells=made, metadata=kernel, nbformat=4, nbformat_minor=5)), encoding="utf-8")
        return path

    def leftovers(self) -> list:
        "Processes that were started from this lab and are still there."
        import psutil

        mine = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and process.environ().get("JUPYTER_TOKEN") == self.token:
                    mine.append(process)
        return mine

    def __exit__(self, *_):
        with contextlib.suppress(OSError, AttributeError):
            self.ask("shutdown", "POST")
            self.process.wait(20)
        for process in self.leftovers():
            with contextlib.suppress(Exception):
                process.kill()
        self.process.wait(20)
        self.log.close()


# What runs in the page: notebooks are found by their path, and cells are run without waiting, so that Python can look on.
SCRIPT = r"""
window.lab = {
  done: {},
  panel: path => [...window.jupyterapp.shell.widgets('main')].find(w => w.context?.path === path),
  kernel: path => lab.panel(path)?.sessionContext?.session?.kernel,
  do: (name, path, more) => jupyterapp.commands.execute(name, {semanticWidget: lab.panel(path).id, activate: false, ...more}),
  open: path => { jupyterapp.commands.execute('docmanager:open', {path, factory: 'Notebook'}); },
  connected: path => {
    const p = lab.panel(path), k = lab.kernel(path);
    return !!(p?.context.isReady && p.content.widgets.length && k?.connectionStatus === 'connected');
  },
  ready: path => lab.connected(path) && lab.panel(path).sessionContext.isReady && lab.kernel(path).status === 'idle',
  sources: path => { const cs = lab.panel(path).content.model.cells; return [...Array(cs.length).keys()].map(i => [cs.get(i).type, cs.get(i).sharedModel.getSource()]); },
  outputs: (path, i) => lab.panel(path).content.model.cells.get(i).outputs.toJSON(),
  count: (path, i) => lab.panel(path).content.model.cells.get(i).executionCount,
  run: (path, chosen) => {
    const nb = lab.panel(path).content;
    nb.deselectAll(); nb.activeCellIndex = chosen[0];
    chosen.forEach(i => nb.select(nb.widgets[i]));
    const mine = lab.done[path] = {over: false, ok: null};
    lab.do('notebook:run-cell', path).then(ok => { mine.ok = ok; }, e => { mine.ok = String(e); }).finally(() => { mine.over = true; nb.deselectAll(); });
  },
  show: (path, i) => { const nb = lab.panel(path).content; jupyterapp.shell.activateById(lab.panel(path).id); nb.deselectAll(); nb.activeCellIndex = i; return nb.scrollToItem(i, 'start'); },
  close: path => [...jupyterapp.shell.widgets('main')].filter(w => !path || w.context?.path === path).forEach(w => w.dispose()),
};
"""


class Browser:
    "A headless Chromium that can reach this machine alone."

    def __enter__(self):
        from playwright.sync_api import sync_playwright

        rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update", rules]
        self.playwright = sync_playwright().start()
        try:
            self.chromium = self.playwright.chromium.launch(executable_path=chromium(), args=flags, timeout=240_000)
        except BaseException:
            self.playwright.stop()
            raise
        return self

    def __exit__(self, *_):
        self.chromium.close()
        self.playwright.stop()

    def tab(self, lab: Lab, width: int = 1200, height: int = 1000, scale: float = 1) -> "Tab":
        return Tab(self, lab, width, height, scale)


class Tab:
    "A page that shows a lab."

    def __init__(self, browser: Browser, lab: Lab, width: int, height: int, scale: float):
        self.lab = lab
        self.context = browser.chromium.new_context(viewport=dict(width=width, height=height), device_scale_factor=scale)
        self.page = self.context.new_page()
        self.page.set_default_timeout(180_000)  # milliseconds
        self.page.add_init_script(SCRIPT)
        self.page.on("dialog", lambda dialog: dialog.accept())
        self.errors = []  # what scripts of the page did not catch
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(f"{lab.url}/lab?token={lab.token}&reset")
        self.loaded()

    def __enter__(self): return self
    def __exit__(self, *_): self.context.close()

    def close(self):
        "Close every notebook without a question, and end every kernel."
        for session in self.lab.ask("sessions"):
            self.lab.ask(f"sessions/{session['id']}", "DELETE")
        self.page.evaluate("lab.close()")

    def loaded(self):
        self.wait("window.jupyterapp?.restored && jupyterapp.restored.then(() => true)", "a JupyterLab in the page")

    def wait(self, expression: str, what: str, seconds: float = 180):
        "The first true value of a JavaScript expression."
        return until(lambda: self.page.evaluate(expression), what, seconds)

    def open(self, path: str) -> "Notebook":
        "Open a notebook and wait for its kernel."
        notebook = self.begin(path)
        notebook.ready()
        return notebook

    def begin(self, path: str) -> "Notebook":
        "Open a notebook; its kernel is still on its way."
        self.page.evaluate("path => lab.open(path)", path)
        return Notebook(self, path)

    def reload(self):
        "Load the page anew, as after closing the tab: kernels go on meanwhile."
        self.page.reload()
        self.loaded()

    def theme(self, name: str):
        "`light` or `dark`."
        self.page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", f"JupyterLab {name.capitalize()}")
        self.page.wait_for_selector(f"body[data-jp-theme-light={str(name == 'light').lower()}]", state="attached")
        self.page.wait_for_selector("#jupyterlab-splash", state="detached")

    def size(self, width: int, height: int = 1000):
        self.page.set_viewport_size(dict(width=width, height=height))

    def plain(self):
        "Nothing but the notebook: one document, no side bars, no status bar."
        self.page.evaluate("""async () => {
            const shell = jupyterapp.shell;
            shell.mode = 'single-document'; shell.collapseLeft(); shell.collapseRight();
            if (document.querySelector('#jp-main-statusbar')?.offsetHeight) await jupyterapp.commands.execute('statusbar:toggle');
        }""")

    def shot(self, name: str, of=None, **how) -> Path:
        "A picture of the page, or of one element, for people to look at: in `$NANOGPT_SCREENSHOTS` or .screenshots/."
        folder = Path(os.environ.get("NANOGPT_SCREENSHOTS") or ROOT / ".screenshots")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.png"
        (of or self.page).screenshot(path=path, **how)
        return path


class Notebook:
    "A notebook that is open in a tab."

    def __init__(self, tab: Tab, path: str): self.tab, self.page, self.path = tab, tab.page, path

    def js(self, call: str, *args):
        "The value of `lab.call(path, ...)` in the page."
        return self.page.evaluate(f"args => lab.{call}(...args)", [self.path, *args])

    def ready(self, seconds: float = 240):
        "Wait for the notebook and its idle kernel: what is run before that is not run at all."
        until(lambda: self.js("ready"), f"a kernel that is ready for {self.path}", seconds)

    def status(self) -> str: return self.page.evaluate("path => lab.kernel(path)?.status", self.path)
    def cells(self) -> list: return self.js("sources")
    def outputs(self, i: int) -> list: return self.js("outputs", i)
    def count(self, i: int) -> int | None: return self.js("count", i)

    def code(self) -> list[int]:
        "The cells to run: those with code, but for the flagged."
        return [i for i, (kind, source) in enumerate(self.cells()) if kind == "code" and source.strip() and not SKIPPED.search(source)]

    def start(self, *chosen: int):
        "Run these cells, or all but the flagged ones; do not wait."
        self.js("run", list(chosen) or self.code())

    def over(self) -> bool:
        "Whether all that was started has run."
        return self.page.evaluate("path => lab.done[path].over", self.path)

    def run(self, *chosen: int, seconds: float = 300) -> "Notebook":
        "Run cells to their end and expect no error."
        self.start(*chosen)
        until(self.over, f"the end of the cells of {self.path}", seconds)
        if wrong := self.failures():
            raise AssertionError(f"{self.path}: {'; '.join(f'cell {i}: {name}: {said}' for i, name, said in wrong)}")
        return self

    def failures(self) -> list:
        "What went wrong: errors in outputs."
        return [(i, o["ename"], o["evalue"]) for i, (kind, _) in enumerate(self.cells()) if kind == "code" for o in self.outputs(i) if o["output_type"] == "error"]

    def text(self, i: int) -> str:
        "What the outputs of a cell say, as the page shows them."
        return "\n".join(self.cell(i).locator(".jp-OutputArea-output").all_inner_texts())

    def cell(self, i: int):
        "The cell as an element of the page, in view."
        self.js("show", i)
        return self.panel().locator(f".jp-Notebook .jp-Cell[data-windowed-list-index='{i}']")

    def panel(self):
        return self.page.locator(f"#{self.page.evaluate('path => lab.panel(path).id', self.path)}")

    def interrupt(self): self.page.evaluate("path => lab.kernel(path).interrupt()", self.path)

    def restart(self):
        "Restart the kernel and wait for the new one."
        self.page.evaluate("path => lab.panel(path).sessionContext.restartKernel()", self.path)
        self.ready()

    def save(self) -> Path:
        "Save, and give the file."
        self.page.evaluate("path => lab.panel(path).context.save()", self.path)
        return self.tab.lab.folder / self.path

    def close(self):
        "Close it without a question, and end its kernel."
        for session in self.tab.lab.ask("sessions"):
            if session["path"] == self.path:
                self.tab.lab.ask(f"sessions/{session['id']}", "DELETE")
        self.js("close")
