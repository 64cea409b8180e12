"The doctor: a box looked over, both breakages of W&B in real environments, explained and cured, and what must not be touched."

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from box import Box, argv, until, why_no_box

from nanogpt_nb.remote import there_checks
from nanogpt_nb.remote.doctor import doctor, facts, report
from nanogpt_nb.remote.findings import Finding, Findings
from nanogpt_nb.remote.prepare import prepare
from nanogpt_nb.remote.ssh import Host

pytestmark = pytest.mark.skipif(why_no_box() is not None, reason=why_no_box() or "")
CHEAP = ["system", "python", "disk", "memory", "rsync", "uv"]


@pytest.fixture
def box(tmp_path, monkeypatch):
    with Box(tmp_path) as box:
        yield box.use(monkeypatch)


@pytest.fixture
def host(box):
    with Host("gpu") as host:
        yield host


def packed(name: str, folder: Path):
    "A wheel made of the files of an installed distribution."
    dist = metadata.distribution(name)
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{dist.version}-py3-none-any.whl", "w") as z:
        for f in dist.files:
            if ".." not in f.parts and f.suffix != ".pyc" and f.name not in ("INSTALLER", "REQUESTED", "direct_url.json"):
                z.write(f.locate(), str(f))


def old_copy(name: str, version: str, site: Path, package: str, edit):
    "The installed distribution in another environment, with an older version and an edited file."
    dist = metadata.distribution(name)
    record = []
    for f in dist.files:
        if ".." in f.parts or f.suffix == ".pyc":
            continue
        to = site / str(f).replace(f"-{dist.version}.dist-info", f"-{version}.dist-info")
        to.parent.mkdir(parents=True, exist_ok=True)
        data = f.locate().read_bytes()
        if f.name == "METADATA":
            data = data.replace(f"Version: {dist.version}".encode(), f"Version: {version}".encode())
        if str(f) == package:
            data = edit(data.decode()).encode()
        to.write_bytes(data)
        record.append(f"{to.relative_to(site)},,")
    (site / f"{name}-{version}.dist-info" / "RECORD").write_text("\n".join(record) + "\n")


@pytest.fixture
def env(box, host, tmp_path, monkeypatch):
    "An environment on the box with all that this one has, and a pip that knows a folder of wheels only."
    folder = box.home / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python3*/site-packages"))
    (site / "all.pth").write_text(str(Path(metadata.distribution("click").locate_file(""))) + "\n")
    for name in ("click", "protobuf"):
        packed(name, tmp_path / "shelf")
    (box.home / ".pip").mkdir()
    (box.home / ".pip" / "pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {tmp_path / 'shelf'}\n")
    monkeypatch.setitem(host.settings, "python", str(folder / "bin" / "python"))
    return site


def visit(host, **kwargs) -> Findings:
    return doctor(host, names=kwargs.pop("names", ["system"]), requirements=["wandb"], constraints=[], say=kwargs.pop("say", lambda line: None), **kwargs)


def breakage(host, name: str, said: str, package: str):
    "See a breakage, explained; cure it; see that it is gone."
    sick = visit(host)
    assert sick.exit_code == 1 and [f.name for f in sick if f.state == "bad"] == [name]
    assert said in sick[name].found and package in sick[name].why and package in sick[name].cure and "--python" in sick[name].cure
    healed = visit(host, fix=True)
    assert healed.exit_code == 0 and healed["wandb"].state == healed["wandb CLI"].state == "ok", healed
    assert visit(host).exit_code == 0


def test_an_old_click_is_explained_and_cured(host, env):
    old_copy("click", "7.0", env, "click/core.py", lambda text: text.replace("no_args_is_help", "no_args_is_helpful"))
    breakage(host, "wandb CLI", "unexpected keyword argument 'no_args_is_help'", "click")
    assert not (env / "click-7.0.dist-info").exists()


def test_a_wrong_protobuf_is_explained_and_cured(host, env):
    old_copy("protobuf", "3.20.0", env, "google/protobuf/__init__.py", lambda text: text.replace(metadata.version("protobuf"), "3.20.0"))
    breakage(host, "wandb", "wandb_telemetry_pb2", "protobuf")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "name", "said"),
    [("click==7.0", "wandb CLI", "unexpected keyword argument 'no_args_is_help'"), ("protobuf==3.20.0", "wandb", "wandb_telemetry_pb2")],
)
def test_the_breakages_of_the_write_up_from_pypi(box, host, package, name, said):
    env = prepare(host, ["wandb"], [], quiet=True)
    host.run([f"{box.home}/.nanogpt_nb/uv/bin/uv", "pip", "install", "--python", env.python, "--no-deps", package], env=dict(UV_SYSTEM_CERTS="1"))
    breakage(host, name, said, package.partition("=")[0])


def test_this_machine():
    shown = []
    found = doctor(names=CHEAP, requirements=["tyro"], constraints=[], show=shown.append)
    assert [f.name for f in found] == ["system", "Python", "disk", "memory", "rsync", "uv", "environment", *(["nbdev"] if found["nbdev"] else [])]
    assert shown == list(found) and found["environment"].state == "ok"


def test_torch_computes_here():
    found = doctor(names=["gpu"], requirements=["torch"], constraints=[])
    assert found["torch"].state == "ok" and metadata.version("torch") in found["torch"].found


def test_a_machine_that_is_not_there(box, host, capsys):
    box.stop()
    Host._all.pop("gpu", None)
    assert report("gpu") == 1
    assert "✗ connection" in capsys.readouterr().out


def test_an_environment_that_is_not_made_yet_is_made(host, box, tmp_path):
    (box.home / ".pip").mkdir()
    (box.home / ".pip" / "pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {tmp_path / 'shelf'}\n")
    packed("docstring_parser", tmp_path / "shelf")
    ask = dict(names=["system"], requirements=["docstring_parser"], constraints=[])
    found = doctor(host, **ask)
    assert found["environment"].state == "warn" and found["clock"].state == found["connection"].state == "ok"
    assert not (box.home / ".nanogpt_nb" / "uv").exists()
    assert doctor(host, fix=True, say=lambda line: None, **ask)["environment"].state == "ok"


def test_a_python_of_the_system_is_not_touched(host, monkeypatch):
    said = []
    base = getattr(sys, "_base_executable", sys.executable)
    monkeypatch.setitem(host.settings, "python", base)
    before = subprocess.run([base, "-m", "pip", "list"], capture_output=True, text=True).stdout
    monkeypatch.setattr("nanogpt_nb.remote.doctor.the_python", lambda host, asked: (base, []))
    found = doctor(host, fix=True, names=["system"], requirements=["no-such-package-of-ours"], constraints=[], say=said.append)
    assert found["packages"].state == "bad" and any("nothing is changed there" in line for line in said)
    assert subprocess.run([base, "-m", "pip", "list"], capture_output=True, text=True).stdout == before


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", "driver in the kernel"),
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9", "communicate"),
        ("echo 'No devices were found'; exit 6", "No devices"),
        ("exit 0", "nvidia-smi fails"),
    ],
)
def test_a_driver_that_is_broken(tmp_path, monkeypatch, script, found):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    with Box(tmp_path, path=f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin") as box, Host("gpu") as host:
        box.use(monkeypatch)
        driver = visit(host, names=["gpu"])["driver"]
    assert driver.state == "bad" and found in driver.found and driver.cure


def test_a_driver_that_is_not_on_the_path(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho '0, NVIDIA A100, 570.1, 40960, 3'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setattr("nanogpt_nb.remote.there_gpus.PLACES", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    assert [g["name"] for g in there_checks.gpu()["gpus"]] == ["NVIDIA A100"]


def test_findings_come_one_by_one_and_once_though_the_line_is_cut(box, host, capsys, monkeypatch):
    told, cuts = [], []
    for fact in facts(host, "checks", "look", names=["system", "python", "disk", "memory"]):
        told.append(fact["fact"])
        if not cuts:
            cuts.append(box.wire.cut())
    assert told == ["system", "python", "disk", "memory"] and cuts[0]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    report("gpu", names=["system"], requirements=[], constraints=[])
    assert "\033[" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    report("gpu", names=["system"], requirements=[], constraints=[])
    assert "\033[" not in capsys.readouterr().out


def test_what_cannot_be_read_has_a_cure(monkeypatch):
    def broken():
        raise OSError("no such luck")

    monkeypatch.setitem(there_checks.FACTS, "disk", (broken, 5))
    (found,) = [f for f in doctor(names=["disk"], requirements=["tyro"], constraints=[]) if f.name == "disk"]
    assert found.state == "warn" and "no such luck" in found.found and found.why and "df -h" in found.cure


def test_a_command_that_hangs_is_left_with_its_children(tmp_path):
    (tmp_path / "stuck").write_text(f"#!/bin/sh\nsleep 1000 & echo $! > {tmp_path}/pid; wait\n")
    (tmp_path / "stuck").chmod(0o755)
    code, _, said = there_checks.sh(str(tmp_path / "stuck"), seconds=4)
    assert code == -9 and "did not answer" in said
    child = int((tmp_path / "pid").read_text())
    until(lambda: not argv(child), "the end of the child")


def test_findings_are_escaped_and_counted():
    found = Findings([Finding("a", "bad", "<b>"), Finding("b", "warn", "x", fix=("install", "y")), Finding("c", "ok", "z")])
    assert "&lt;b&gt;" in found._repr_html_() and found.exit_code == 1
    assert found.verdict() == "1 fault and 1 warning. --fix cures: b." and str(found).count("\n") == 3
