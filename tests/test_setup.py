"The environment on a box: made once, by uv or by pip, whole or not at all, and found again in one question."

import base64
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from box import Box, until, why_no_box

from nanogpt_nb.config import ConfigError
from nanogpt_nb.remote import there_uv
from nanogpt_nb.remote.agent import HostError
from nanogpt_nb.remote.jobs import start
from nanogpt_nb.remote.prepare import lines_of, old, prepare, tidy
from nanogpt_nb.remote.ssh import Host

pytestmark = pytest.mark.skipif(why_no_box() is not None, reason=why_no_box() or "")


def make_wheel(folder: Path, name: str, version: str, files: dict, needs: tuple = ()) -> Path:
    "A wheel of a few small files."
    info = f"{name}-{version}.dist-info"
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + "".join(f"Requires-Dist: {n}\n" for n in needs)
    files = {**files, f"{info}/METADATA": head, f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    record = "".join(f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text)}\n" for path, text in files.items())
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as z:
        for path, text in {**files, f"{info}/RECORD": record + f"{info}/RECORD,,\n"}.items():
            z.writestr(path, text)
    return Path(z.filename)


@pytest.fixture
def shelf(tmp_path):
    "A folder of wheels, which is all that pip on the box knows."
    shelf = tmp_path / "shelf"
    for version in ("1.0", "2.0"):
        make_wheel(shelf, "greet", version, {"greet.py": f"version = '{version}'\n"})
    make_wheel(shelf, "polite", "1.0", {"polite.py": "import greet\n"}, needs=["greet>=1"])
    return shelf


@pytest.fixture
def box(tmp_path, monkeypatch, shelf):
    with Box(tmp_path) as box:
        conf = box.home / ".config" / "pip" / "pip.conf"
        conf.parent.mkdir(parents=True)
        conf.write_text(f"[global]\nno-index = true\nfind-links = {shelf}\n")
        yield box.use(monkeypatch)


@pytest.fixture
def host(box):
    with Host("gpu") as host:
        yield host


def quiet_prepare(host, *words, **kwargs):
    return prepare(host, list(words), kwargs.pop("constraints", []), quiet=True, **kwargs)


def says(host, env, code: str) -> str:
    return host.run([env.python, "-c", code]).out.strip()


def questions(host, monkeypatch) -> list:
    "The questions that are put to the box from now on."
    asked, once = [], type(host.agent).call_once
    monkeypatch.setattr(type(host.agent), "call_once", lambda self, verb, *rest: asked.append(verb) or once(self, verb, *rest))
    return asked


def test_an_environment_is_made_once_and_found_again_in_one_question(host, box, monkeypatch):
    env = quiet_prepare(host, "polite")
    assert env.made and env.python.startswith(f"{box.home}/.nanogpt_nb/envs/{env.key}/")
    assert says(host, env, "import polite, greet; print(greet.version)") == "2.0"
    asked = questions(host, monkeypatch)
    again = quiet_prepare(host, "polite")
    assert not again.made and again.python == env.python and asked == ["env.find"]
    # half of it is made again
    folder = box.home / ".nanogpt_nb" / "envs" / env.key
    (folder / "ready.json").unlink()
    shutil.rmtree(next(folder.glob("lib/python3*/site-packages/greet-*")))
    (folder / "stray").write_text("from before")
    again = quiet_prepare(host, "polite")
    assert again.made and again.python == env.python and not (folder / "stray").exists()
    assert says(host, again, "import greet; print(greet.version)") == "2.0"


def test_the_key_is_of_all_that_it_is_made_from(host, tmp_path):
    (tmp_path / "req.txt").write_text("# mine\ngreet \\\n  >=1.0\n")
    (tmp_path / "con.txt").write_text("greet==1.0 ; python_version >= '3'  # as it was\n")
    old = prepare(host, tmp_path / "req.txt", tmp_path / "con.txt", extra=["polite"], quiet=True)
    assert says(host, old, "import polite, greet; print(greet.version)") == "1.0"
    new = prepare(host, tmp_path / "req.txt", [], extra=["polite"], quiet=True)
    assert says(host, new, "import polite, greet; print(greet.version)") == "2.0" and new.key != old.key
    assert prepare(host, ["greet >=1.0"], tmp_path / "con.txt", extra="polite", quiet=True).key == old.key


def test_what_cannot_be_installed_is_told_and_may_be_there_later(host, shelf):
    with pytest.raises(HostError, match="No matching distribution found for later") as said:
        quiet_prepare(host, "later")
    assert "gpu" in str(said.value) and "\n" not in str(said.value)
    make_wheel(shelf, "later", "1.0", {"later.py": ""})
    assert quiet_prepare(host, "later").made


def test_a_package_that_cannot_be_imported_is_told(host, shelf):
    make_wheel(shelf, "broken", "1.0", {"broken.py": "import nothing_of_this_name\n"})
    with pytest.raises(HostError, match="No module named 'nothing_of_this_name'"):
        quiet_prepare(host, "broken")


def killed_builds(host, box, rng, times: int) -> int:
    "Kill what runs on the box at random moments of a build; how many builds were hit."
    hit = 0
    for _ in range(times):
        shutil.rmtree(box.home / ".nanogpt_nb" / "envs", ignore_errors=True)
        done, failed = threading.Event(), []

        def build(done=done, failed=failed):
            try:
                quiet_prepare(host, "polite")
            except HostError as e:
                failed.append(e)
            done.set()

        threading.Thread(target=build, daemon=True).start()
        until(lambda done=done: list((box.home / ".nanogpt_nb" / "envs").glob("*.lock")) or done.is_set(), "the build")
        done.wait(rng.uniform(0, 3))
        for pid in box.processes():
            argv = Path(f"/proc/{pid}/cmdline")
            try:
                words = argv.read_bytes().split(b"\0")
                if any(w in (b"env.make", b"pip", b"venv", b"ensurepip") for w in words):
                    os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        assert done.wait(480)
        hit += bool(failed)
        env = quiet_prepare(host, "polite")
        assert says(host, env, "import polite, greet; print(greet.version)") == "2.0"
    return hit


def test_a_builder_that_is_killed_leaves_nothing_half(host, box):
    killed_builds(host, box, random.Random(1), 1)
    (env,) = [p for p in (box.home / ".nanogpt_nb" / "envs").iterdir() if p.is_dir()]
    assert (env / "ready.json").exists()


def test_a_cut_connection_does_not_end_the_build(host, box):
    cuts, lines = [], []

    def say(line):
        lines.append(line)
        if len(cuts) < 2:
            cuts.append(box.wire.cut())

    env = prepare(host, ["polite"], [], say=say)
    assert sum(cuts) > 0 and says(host, env, "import polite") == ""
    assert sum("Successfully installed" in x for x in lines) == 1


def test_two_laptops_make_one(host, box):
    other, made = Host("gpu"), []
    with other:
        threads = [threading.Thread(target=lambda h=h: made.append(quiet_prepare(h, "greet"))) for h in (host, other)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(480)
    assert len(made) == 2 and made[0].python == made[1].python
    assert says(host, made[0], "import greet; print(greet.version)") == "2.0"


def test_a_python_that_is_named_is_used_as_it_is(host, box, monkeypatch):
    there = box.home / "mine" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(there.parents[1])], check=True)
    monkeypatch.setitem(host.settings, "python", "~/mine/bin/python")
    with pytest.raises(HostError, match="lacks greet>=1; install it there"):
        quiet_prepare(host, "greet>=1")
    site = next(there.parents[1].glob("lib/python3*/site-packages"))
    (site / "greet-1.5.dist-info").mkdir()
    (site / "greet-1.5.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: greet\nVersion: 1.5\n")
    before = sorted(p.name for p in site.iterdir())
    env = quiet_prepare(host, "greet>=1")
    assert env.python == str(there) and env.key == "given" and sorted(p.name for p in site.iterdir()) == before
    asked = questions(host, monkeypatch)
    assert not quiet_prepare(host, "greet>=1").made and asked == ["env.find"]


def test_a_named_python_that_is_not_there(host, monkeypatch):
    monkeypatch.setitem(host.settings, "python", "/nowhere/python")
    with pytest.raises(HostError, match="/nowhere/python does not work"):
        quiet_prepare(host, "greet")


def test_a_python_that_is_asked_for_and_not_there(host):
    with pytest.raises(HostError, match="no Python 3.99 here"):
        quiet_prepare(host, "greet", python="3.99")
    with pytest.raises(ConfigError, match="neither a version nor a path"):
        quiet_prepare(host, "greet", python="pypy")


TORCH = """
__version__ = "2.13.0+cu128"
class Tensor:
    def __init__(self, x): self.x = x
    def __matmul__(self, o): return Tensor(self.x * o.x)
    def __sub__(self, o): return Tensor(self.x - o.x)
    def to(self, device): return self
    cpu = abs = max = lambda self: self
    item = lambda self: self.x
class Generator:
    def manual_seed(self, n): return n + 1
def randn(*shape, generator): return Tensor(generator)
class cuda:
    is_available, device_count, get_device_name, get_arch_list = (lambda *a: True), (lambda: 1), (lambda d: "GPU"), list
class version: cuda = "12.8"
class backends: pass
"""


@pytest.mark.parametrize(("version", "used"), [("2.13.0+cu128", True), ("2.1.0+cu121", False)])
def test_the_torch_of_the_box_is_used_where_it_computes_and_is_new_enough(tmp_path, monkeypatch, shelf, version, used):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho '0, NVIDIA A100, 570.1, 40960, 3'\n")
    (tools / "nvidia-smi").chmod(0o755)
    make_wheel(shelf, "torch", "2.20.0", {"torch.py": TORCH})
    with Box(tmp_path, path=f"{tools}:{Path(sys.executable).parent}:/usr/bin:/bin") as box:
        box.use(monkeypatch)
        site = box.home / ".local" / "lib" / f"python3.{sys.version_info[1]}" / "site-packages"
        (site / f"torch-{version}.dist-info").mkdir(parents=True)
        (site / f"torch-{version}.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        (site / "torch.py").write_text(TORCH.replace("2.13.0+cu128", version))
        (box.home / ".pip").mkdir()
        (box.home / ".pip" / "pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {shelf}\n")
        before = {p: p.stat().st_mtime_ns for p in site.rglob("*.py")}
        with Host("gpu") as host:
            env = prepare(host, ["torch>=2.9", "greet"], ["torch==2.13.0"])
            place = says(host, env, "import torch, greet; print(torch.__file__)")
        assert place.startswith(str(site)) == used == (env.torch == "the box's")
        assert {p: p.stat().st_mtime_ns for p in site.rglob("*.py")} == before


@pytest.mark.parametrize("line", ["--index-url http://x", "-e .", "greet; rm -rf", "greet ==", "$(x)"])
def test_what_is_no_requirement_is_refused_here(line):
    with pytest.raises(ConfigError, match="no requirement"):
        lines_of([line], "requirements")


def test_a_file_that_is_not_there():
    with pytest.raises(ConfigError, match="No such file"):
        lines_of("/nowhere/constraints.txt", "constraints")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (["error: Failed to install: x", "  Caused by: No space left on device (os error 28)"], "disk is full"),
        (["error: Failed to fetch: `https://pypi.org/simple/tyro/`", "  cause: error sending request for url"], "way to PyPI"),
        (["The virtual environment was not created successfully because ensurepip is not available."], "python3-venv"),
        (["×"], "exit code 1"),
        ([], "exit code 1"),
    ],
)
def test_what_an_installer_says_becomes_a_sentence(said, told):
    assert told in there_uv.telling(said)


def test_the_laptops_side_needs_no_unix():
    names = sorted(f"nanogpt_nb.remote.{p.stem}" for p in Path(there_uv.__file__).parent.glob("*.py") if not p.stem.startswith(("there", "__")))
    code = f"import sys, importlib\nfor n in ('fcntl', 'pwd', 'termios', 'grp', 'resource'): sys.modules[n] = None\nfor n in {[*names, 'box']}: importlib.import_module(n)\nprint('all')"
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])]))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert len(names) > 15 and done.stdout == "all\n", done.stderr


def test_old_environments_are_told_of_and_removed_unless_something_uses_them(host, box):
    said, envs = [], box.home / ".nanogpt_nb" / "envs"
    running, waiting, idle = keys = ["0" * 12, "1" * 12, "2" * 12]
    for key in keys:
        (envs / key / "bin").mkdir(parents=True)
        (envs / key / "bin/python").symlink_to(sys.executable)
        (envs / key / "ready.json").write_text("{}" * 1000)
    first = start(host, [str(envs / running / "bin/python"), "-c", "import time; time.sleep(1000)"])
    after = start(host, [str(envs / waiting / "bin/python"), "-c", ""], after=first.id)
    until(lambda: first.state == "running", "the job that uses one")
    kept = prepare(host, [], [], say=said.append)
    assert set(old(host)) == {idle, kept.key} and "1 other environment there" in said[-1] and "--tidy" in said[-1]
    assert set(old(host, [kept.key])) == {idle} and old(host)[idle]["bytes"] > 1000
    assert set(tidy(host)) == {idle, kept.key}  # the project here has made none there
    assert {p.name for p in envs.iterdir() if p.is_dir()} == {running, waiting}
    first.stop(grace=5)
    after.wait(timeout=240)
    assert set(tidy(host)) == {running, waiting} and not old(host)


@pytest.mark.slow
def test_uv_is_installed_for_the_user_and_makes_the_environment(tmp_path, monkeypatch):
    with Box(tmp_path) as box, Host("gpu") as host:
        box.use(monkeypatch)
        lines = []
        env = prepare(host, ["tyro"], ["tyro==1.0.17"], say=lines.append)
        assert (box.home / ".nanogpt_nb" / "uv" / "bin" / "uv").exists() and any("Installed" in x for x in lines)
        assert says(host, env, "import tyro; print(tyro.__version__)") == "1.0.17"
        with pytest.raises(HostError, match="tyro==99"):
            quiet_prepare(host, "tyro==99")


@pytest.mark.slow
def test_uv_is_fetched_where_there_is_no_pip(tmp_path, monkeypatch):
    monkeypatch.setattr(there_uv, "pip_settings", dict)
    assert there_uv.fetch_uv(str(tmp_path / "uv"))
    assert subprocess.run([tmp_path / "uv" / "bin" / "uv", "--version"], capture_output=True, text=True).stdout.startswith("uv ")
