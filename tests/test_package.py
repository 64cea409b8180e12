"The package as a whole: its settings, its floors, its notebooks, what is built from it, and `make`."

import ast
import email
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import nanogpt_nb

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in (ROOT / "nanogpt_nb").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
MADE = ("__pycache__", "*.egg-info", ".*", "build", "dist", "runs", "wandb", "_proc", "_docs")


def name_of(path: Path) -> str:
    "`remote/ssh.py` is nanogpt_nb.remote.ssh."
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def settings() -> dict:
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(ini["DEFAULT"])


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def copy(tmp_path):
    "The repository without what is built or installed, to do things to."
    return Path(shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(*MADE)))


def run(*words, cwd, **env) -> subprocess.CompletedProcess:
    "A command of this environment, with its output; a `make` that runs these tests does not reach it."
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "ARGS", "SLOW")
    env = {key: value for key, value in os.environ.items() if key not in outer} | env
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def contents(folder: Path) -> dict[str, bytes]:
    "Every file of a folder, but for what running Python leaves behind."
    skip = ("__pycache__", ".ipynb_checkpoints")
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and not set(skip) & set(p.parts)}


# Two files say the same


def test_settings_ini_and_pyproject_agree():
    ini, toml = settings(), pyproject()
    assert toml["project"]["name"] == ini["lib_name"]
    assert toml["project"]["requires-python"] == f">={ini['min_python']}"
    assert {key: ini[key] for key in toml["tool"]["nbdev"]} == toml["tool"]["nbdev"]
    assert {"lib_path", "nbs_path", "tst_flags", "branch"} <= toml["tool"]["nbdev"].keys()


def test_version_is_the_one_in_settings_ini():
    assert nanogpt_nb.__version__ == settings()["version"]


def test_changelog_knows_this_version():
    assert f"## {settings()['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_requirement_is_pinned_to_a_version_that_it_allows():
    ini = settings()
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(r.name): r for r in (Requirement(line) for line in lines if line and not line.startswith("#"))}
    for asked in map(Requirement, shlex.split(" ".join(ini[k] for k in ("requirements", "lab_requirements", "dev_requirements")))):
        (pin,) = pins[canonicalize_name(asked.name)].specifier
        assert pin.operator == "==" and asked.specifier.contains(pin.version), f"{asked} is pinned to {pin.version}"


# Notebooks and what is made from them


@pytest.mark.parametrize("command", ["nbdev_export", "nbdev_clean"])
def test_nothing_is_left_to_export_or_clean(copy, command):
    before = contents(copy)
    done = run(command, cwd=copy)
    assert done.returncode == 0, done.stderr
    after = contents(copy)
    assert [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)] == []


def test_an_edit_in_a_module_is_lost_at_the_next_export(copy):
    module = copy / "nanogpt_nb" / "config.py"
    exported = module.read_text(encoding="utf-8")
    module.write_text(exported + "\nstray = 1\n", encoding="utf-8")
    assert run("nbdev_export", cwd=copy).returncode == 0
    assert module.read_text(encoding="utf-8") == exported


def test_readme_is_what_the_index_makes():
    done = run(sys.executable, "nbs/_readme.py", "--check", cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_readme_that_is_old_is_noticed_and_written(copy):
    readme = (copy / "README.md").read_bytes()
    (copy / "README.md").write_text("# Another\n")
    stale = run(sys.executable, "nbs/_readme.py", "--check", cwd=copy)
    assert stale.returncode == 1 and "make readme" in stale.stderr
    assert run(sys.executable, "nbs/_readme.py", cwd=copy).returncode == 0
    assert (copy / "README.md").read_bytes() == readme


def test_readme_lists_every_notebook_and_its_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = set(re.findall(r"\]\((?![a-z]+:|#)([^)]+)\)", readme))
    assert {f"nbs/{p.name}" for p in NOTEBOOKS if p.stem != "index"} <= links
    assert [link for link in links if not (ROOT / link).exists()] == []


def cells(path: Path, kind: str) -> list[dict]:
    found = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]
    return [{**c, "source": "".join(c["source"])} for c in found]


def directives(source: str) -> set[str]:
    return {line.removeprefix("#|").split()[0] for line in source.splitlines() if line.startswith("#|")}


def code_lines(source: str) -> int:
    return sum(bool(line.strip()) and not line.startswith("#|") for line in source.splitlines())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestNotebook:
    def test_is_small(self, path):
        assert path.stat().st_size <= 200_000
        assert len(cells(path, "code")) + len(cells(path, "markdown")) <= 60

    def test_begins_with_a_title_and_what_it_is_about(self, path):
        first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
        assert first["cell_type"] == "markdown"
        assert re.match(r"# \S.*\n\n> \S", "".join(first["source"]))

    def test_has_no_errors_and_no_paths_of_a_machine_in_its_outputs(self, path):
        outputs = [o for c in cells(path, "code") for o in c["outputs"]]
        assert [o["ename"] for o in outputs if o["output_type"] == "error"] == []
        shown = [[o.get("text"), *(v for k, v in o.get("data", {}).items() if not k.startswith("image/"))] for o in outputs]
        text = json.dumps(shown, ensure_ascii=False)
        assert re.findall(r"(?:/(?:root|home|Users|work|tmp|private|var)/|(?<![A-Za-z])[A-Z]:\\\\)\w+", text) == []

    def test_its_links_lead_somewhere(self, path):
        links = [link for c in cells(path, "markdown") for link in re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", c["source"])]
        assert [link for link in links if not (path.parent / link).exists()] == []

    def test_shows_the_outputs_of_its_cells(self, path):
        for cell in cells(path, "code"):
            last = (ast.parse(re.sub(r"^[%!].*$", "", cell["source"], flags=re.M)).body or [None])[-1]
            shows = isinstance(last, ast.Expr) and not isinstance(last.value, (ast.Call, ast.Constant))
            if shows and not directives(cell["source"]) & {"hide", "export", "eval:"}:
                assert cell["outputs"], cell["source"]

    def test_explains_and_claims(self, path):
        code, prose = cells(path, "code"), cells(path, "markdown")
        code = [c for c in code if not directives(c["source"]) & {"hide", "default_exp"}]
        assert len(prose) >= 0.6 * len(code), f"{len(prose)} cells of prose to {len(code)} of code"
        lengths = sorted(code_lines(c["source"]) for c in code)
        assert statistics.median(lengths) <= 5 and lengths[int(len(lengths) * 0.9)] <= 15
        if path.stem != "index":
            assert sum(c["source"].count("assert ") for c in code) >= 8

    def test_ends_its_cells_on_something_to_see(self, path):
        for cell in cells(path, "code"):
            if not directives(cell["source"]) & {"hide", "export", "exporti"}:
                last = (ast.parse(re.sub(r"^[%!].*$", "", cell["source"], flags=re.M)).body or [None])[-1]
                printed = isinstance(last, ast.Expr) and isinstance(last.value, ast.Call) and getattr(last.value.func, "id", "") == "print"
                plain = printed and len(last.value.args) == 1 and isinstance(last.value.args[0], ast.Name)
                assert not plain, f"a bare {last.value.args[0].id} shows the same: {cell['source']}"


# The floors of the house

LAZY = "wandb paramiko matplotlib tqdm rich pooch tokenizers plotille pandas optuna".split()
NEVER = "fastcore nbdev execnb IPython ipywidgets jupyterlab".split()
HEAVY = ["torch", "numpy", *LAZY]
COMMAND_LINE = tuple(f"nanogpt_nb.{m}" for m in "cli cli_args cli_cloud cli_cloud_args cli_remote cli_remote_args".split())
STDLIB_ONLY = tuple(f"nanogpt_nb.{m}" for m in "config checkpoints runs where history compare track view faces watch guard launch controls".split())


def loaded(statement: str) -> set[str]:
    "The packages that a fresh Python has after `statement`."
    code = f"{statement}\nimport sys; print(*sys.modules)"
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def at_start():
    return loaded("pass")


@pytest.fixture(scope="module")
def with_torch():
    "What torch brings along by itself."
    return {module.partition(".")[0] for module in loaded("import torch, numpy, safetensors.torch")}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_what_its_floor_has(path, at_start, with_torch):
    name = name_of(path)
    new = loaded(f"import {name}") - at_start
    packages = {module.partition(".")[0] for module in new}
    assert name in new
    assert sorted((packages - with_torch) & set(NEVER + LAZY)) == []
    if name in STDLIB_ONLY:
        assert sorted(packages - set(sys.stdlib_module_names) - {"nanogpt_nb"}) == []
    if name in ("nanogpt_nb.args", *COMMAND_LINE) or name.startswith("nanogpt_nb.remote."):
        assert sorted(packages & set(HEAVY)) == []
    if name not in COMMAND_LINE:
        assert not new & set(COMMAND_LINE)


def imported_anywhere(path: Path) -> set[str]:
    "Every module that a file names in an import, in functions too; relative ones in full."
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [*name_of(path).split(".")[: -node.level or None], node.module])) if node.level else node.module
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_is_short_and_needs_no_notebook_tools(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
    found = imported_anywhere(path)
    assert sorted({name.partition(".")[0] for name in found} & {"fastcore", "nbdev", "execnb"}) == []
    if name_of(path) not in COMMAND_LINE:
        assert not found & set(COMMAND_LINE)


@pytest.mark.parametrize("path", [p for p in MODULES if p.name.startswith("there")], ids=name_of)
def test_what_runs_on_the_box_needs_an_old_python_and_nothing_else(path):
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    kin = {name for name in imported_anywhere(path) if name.startswith("nanogpt_nb.")}
    assert all(name.startswith("nanogpt_nb.remote.there") for name in kin - {"nanogpt_nb.remote"})  # from . import there_…
    assert {name.partition(".")[0] for name in imported_anywhere(path)} <= set(sys.stdlib_module_names) | {"nanogpt_nb"}


def test_every_module_but_the_command_line_comes_from_a_notebook():
    made = {name_of(p) for p in MODULES if "AUTOGENERATED" in p.read_text(encoding="utf-8").partition("\n\n")[2][:60]}
    assert {name_of(p) for p in MODULES} - made == set(COMMAND_LINE)


# What is installed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel that is built from the source distribution, so that both are whole."
    folder = tmp_path_factory.mktemp("build")
    copy = shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(*MADE))
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), cwd=copy)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as whl:
        yield whl


def in_dist_info(wheel, name: str) -> str:
    (path,) = [n for n in wheel.namelist() if n.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


def test_wheel_has_the_package_and_nothing_else(wheel):
    files = {n for n in wheel.namelist() if ".dist-info/" not in n}
    assert files == {str(p.relative_to(ROOT)) for p in (ROOT / "nanogpt_nb").rglob("*.py")}


def test_wheel_tells_what_settings_ini_tells(wheel):
    ini, told = settings(), email.message_from_string(in_dist_info(wheel, "METADATA"))
    assert (told["Name"], told["Version"]) == (ini["lib_name"], ini["version"])
    assert told["Summary"] == ini["description"]
    assert told["Requires-Python"] == f">={ini['min_python']}"
    assert "Apache-2.0" in (told["License-Expression"], told["License"])
    assert told.get_payload().startswith("# ")
    assert sorted(told.get_all("Provides-Extra")) == ["dev", "lab"]
    requires = list(map(Requirement, told.get_all("Requires-Dist")))
    for extra, key in {"": "requirements", "lab": "lab_requirements", "dev": "dev_requirements"}.items():
        mine = {r.name for r in requires if (r.marker.evaluate({"extra": extra}) if r.marker else not extra)}
        assert mine - {r.name for r in requires if extra and not r.marker} == {Requirement(r).name for r in shlex.split(ini[key])}


def test_wheel_brings_the_command(wheel):
    points = ConfigParser()
    points.read_string(in_dist_info(wheel, "entry_points.txt"))
    assert points["console_scripts"]["nanogpt"] == "nanogpt_nb.cli:main"


# make


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_targets_that_there_are(name):
    named = set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", (ROOT / name).read_text(encoding="utf-8"), re.M))
    assert named and named <= targets()


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@needs_make
def test_make_alone_lists_every_target():
    done = run("make", cwd=ROOT)
    assert {line.split()[0] for line in done.stdout.splitlines()[1:]} == targets()


@needs_make
def test_make_installs_once_and_again_after_a_change(copy):
    bin = copy / ".venv" / "bin"
    bin.mkdir(parents=True)
    for path in [copy / name for name in ("settings.ini", "setup.py", "pyproject.toml", "constraints.txt")]:
        os.utime(path, (1000, 1000))
    (bin / "python").touch()
    for stamp in (".base", ".full"):
        (copy / ".venv" / stamp).touch()
    plan = lambda target: run("make", "-n", target, cwd=copy).stdout
    assert "pip install" not in plan("train") + plan("test")
    assert "nanogpt train" in plan("train")
    os.utime(copy / "constraints.txt")
    os.utime(copy / ".venv" / ".base", (2000, 2000))
    os.utime(copy / ".venv" / ".full", (2000, 2000))
    assert "pip install" in plan("train") and "[lab,dev]" not in plan("train")
    assert "[lab,dev]" in plan("test")


@needs_make
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('case "$1" in --version) echo Python 3.8.1;; *) exit 1;; esac', "not Python 3.10 or newer: Python 3.8.1"),
        ('case "$1" in -m) mkdir -p .venv/bin; exit 1;; esac', "python3-venv"),
    ],
    ids=["too old", "no venv module"],
)
def test_make_says_what_is_wrong_with_a_python(copy, script, said):
    python = copy / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    done = run("make", "train", f"PYTHON={python}", cwd=copy)
    assert done.returncode != 0 and said in done.stderr
    assert not (copy / ".venv").exists()
