"The command `nanogpt`: what it says, what it refuses, how it ends, and how quickly nothing heavy is loaded."

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanogpt_nb import __version__
from nanogpt_nb.args import exit_code, parse_sample, parse_train
from nanogpt_nb.cli import COMMANDS, GROUPS, main
from nanogpt_nb.config import PRESETS, ConfigError, NanoGPTConfig, NanoGPTError
from nanogpt_nb.runs import Run

NANOGPT = Path(sys.executable).parent / "nanogpt"


def nanogpt(*words, command=(str(NANOGPT),), stdin=subprocess.DEVNULL, cwd=None, **env) -> subprocess.CompletedProcess:
    "The installed command, in a terminal 100 wide that is not looked at."
    env = {**os.environ, "COLUMNS": "100", **env}
    return subprocess.run([*command, *map(str, words)], env=env, cwd=cwd, stdin=stdin, capture_output=True, text=True, timeout=300)


@pytest.fixture
def history(tmp_path):
    "Three runs as training leaves them: one finished, one stopped, and one that has only begun."
    made = [("first", {}, "finished"), ("wide", {"n_embd": 64, "dropout": 0.1}, "stopped"), ("new", {}, "running")]
    for i, (name, changes, state) in enumerate(made, 1):
        about = {"device": "cpu", "parameters": 10_000 * i, "created": f"2026-01-0{i}T12:00:00+00:00", "corpus": {"name": "plays"}}
        run = Run.create(NanoGPTConfig.preset("tiny").replace(**changes), name, tmp_path, **about)
        for step in range(0, 0 if name == "new" else 101, 50):
            run.append({"step": step, "val_loss": 4 - step / (50 * i), "tokens_per_second": 1000.0 * i, "seconds": float(step)})
        run.set_status(state)
    return tmp_path


# Help


def test_the_command_alone_shows_what_there_is():
    alone, asked = nanogpt(), nanogpt("--help")
    assert alone.returncode == asked.returncode == 0
    assert alone.stdout == asked.stdout
    for name, command in COMMANDS.items():
        assert re.search(rf"{name}\s+{re.escape((command.about or command.args.__doc__).split()[0])}", asked.stdout) or " " in name


def helped(capsys, monkeypatch, *words) -> str:
    "The help of a command, as a terminal 100 wide has it."
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    told = capsys.readouterr()
    assert not end.value.code and told.err == ""
    return told.out


@pytest.mark.parametrize("first", sorted({name.split()[0] for name in COMMANDS if " " in name}))
def test_the_first_of_two_words_tells_of_the_second(first, capsys, monkeypatch):
    told = helped(capsys, monkeypatch, first)
    assert all(name.split()[1] in told for name in COMMANDS if name.startswith(f"{first} "))
    if first in GROUPS:
        assert GROUPS[first] in told and nanogpt(first).stdout == nanogpt(first, "--help").stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name, capsys, monkeypatch):
    told = helped(capsys, monkeypatch, *name.split())
    assert f"usage: nanogpt {name}" in told
    for line in (COMMANDS[name].about or COMMANDS[name].args.__doc__.splitlines()[0]).split(". "):
        assert line in told


def test_commands_that_are_told_of_are_there():
    package, told = Path(sys.modules[main.__module__].__file__).parent, set()
    for path in [*package.rglob("*.py"), package.parent / "README.md", *package.parent.glob("nbs/*.ipynb")]:
        text = path.read_text(encoding="utf-8")
        told |= {(a, b, path.name) for a, b in re.findall(r"(?:\bnanogpt|\{command\(\)\}) ([a-z]+)(?: ([a-z]+))?\b(?![=:.])", text)}
    firsts = {name.split()[0] for name in COMMANDS}
    known = [(a, b, where) for a, b, where in told if a in firsts]
    assert {a for a, *_ in known} == firsts
    assert [(a, b, where) for a, b, where in known if a in GROUPS and b and f"{a} {b}" not in COMMANDS] == []


def test_train_has_a_flag_for_every_hyperparameter_with_the_default_of_the_preset():
    said = " ".join(re.sub(r"[│\n]", " ", nanogpt("train", "--preset", "ladder", "--help").stdout).split())
    preset = NanoGPTConfig.preset("ladder")
    for field in dataclasses.fields(NanoGPTConfig):
        value = getattr(preset, field.name)
        shown = " ".join(value) if isinstance(value, tuple) else str(value)
        assert re.search(rf"--{field.name.replace('_', '-')}\b[^(]*(?:\([^)]*\)[^(]*)*?\(default: {re.escape(shown)}\)", said), field.name


def test_version():
    assert nanogpt("--version").stdout == f"nanogpt {__version__}\n"


QUICK = ["--help", "train --help", "sample --help", "trian", "completion bash", "runs"]


@pytest.mark.parametrize("words", [words.split() for words in QUICK], ids=QUICK)
def test_nothing_heavy_is_loaded_to_answer(words, tmp_path):
    done = nanogpt(*words, command=(sys.executable, "-X", "importtime", "-m", "nanogpt_nb.cli"), cwd=tmp_path)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "tyro" in loaded
    assert sorted(loaded & {"torch", "numpy", "wandb", "tokenizers", "matplotlib", "safetensors"}) == []


def test_no_colour_where_none_is_wanted_or_nobody_looks():
    pty = pytest.importorskip("pty")
    shown = {}
    for value in ("", "1"):
        above, below = pty.openpty()
        env = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": value}
        with subprocess.Popen([NANOGPT, "train", "--dropuot", "1"], env=env, stdin=below, stdout=below, stderr=below) as process:
            os.close(below)
            shown[value] = b""
            try:
                while piece := os.read(above, 4096):
                    shown[value] += piece
            except OSError:  # how Linux says that the other end is closed
                pass
        os.close(above)
        assert process.returncode == 2 and b"dropout" in shown[value]
    coloured = re.compile(rb"\x1b\[[0-9;]*3[0-7]")
    assert coloured.search(shown[""]) and not coloured.search(shown["1"])
    assert "\x1b" not in nanogpt("train", "--dropuot", "1").stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_terminal_can_show_the_help(encoding):
    done = nanogpt("--help", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "") and "train" in done.stdout


# Mistakes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "did you mean train?"),
        (["smaple", "x"], "did you mean sample?"),
        (["zzz"], "The commands are train, launch, watch, "),
        (["train", "--dropuot", "0.3"], "--dropout FLOAT"),
        (["sample", "--temprature", "1"], "--temperature FLOAT"),
        (["runs", "--srot", "name"], "--sort"),
        (["train", "--max-iters", "many"], "'many'"),
        (["train", "--max-iters"], "--max-iters"),
        (["train", "--tokenizer", "word"], "'word'"),
        (["train", "--dropout", "1.5"], "nanogpt: dropout=1.5"),
        (["train", "--preset", "tiny", "--n-embd", "33"], "nanogpt: n_embd=33"),
        (["train", "--preset", "huge"], "nanogpt: 'huge' is not a preset"),
        (["train", "--device", "gpu"], "nanogpt: device='gpu'"),
        (["train", "--resume", "before", "--preset", "tiny"], "leave --preset out"),
        (["train", "--resume=before", "--name=after"], "leave --name out"),
        (["sample", "--prompt", "a", "--prompt-file", "b"], "two prompts"),
        (["train", "--wandb", "sometimes"], "'sometimes'"),
        (["sample", "run-that-is-not"], "no runs in runs"),
        (["watch", "run-that-is-not"], "no runs in runs"),
        (["watch", "--every", "0"], "--every 0"),
        (["launch", "--dropuot", "1"], "--dropout"),
        (["stop"], "nothing to stop"),
        (["stop", "run-that-is-not"], "no runs in runs"),
        (["runs", "snyc"], "snyc"),
        (["runs", "sync", "run-that-is-not"], "no runs in runs"),
        (["runs", "sync", "--runs-dir", "folder-that-is-not"], "folder-that-is-not"),
        (["runs", "import", "file-that-is-not.wandb"], "file-that-is-not.wandb"),
        (["sweep", "--space", "dropuot=1,2"], "dropout"),
        (["runs", "--compare", "run-that-is-not", "nor-this"], "no runs in runs"),
        (["data", "file-that-is-not.txt"], "file-that-is-not.txt"),
        (["completion", "powershell"], "'powershell'"),
        (["--verbose"], "--verbose"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_said_once_and_ends_with_2(words, said, tmp_path):
    done = nanogpt(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "runs").exists()


def test_the_traceback_is_there_for_those_who_ask():
    asked = nanogpt("train", "--dropout", "2", NANOGPT_TRACEBACK="1")
    assert "Traceback" in asked.stderr and "ConfigError: dropout=2" in asked.stderr


class Failed(NanoGPTError):
    exit_code = 7


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (Failed("It went wrong; try again."), 7, "nanogpt: It went wrong; try again.\n"),
        (NanoGPTError("It went wrong."), 1, "nanogpt: It went wrong.\n"),
        (ConfigError("x=1 is wrong."), 2, "nanogpt: x=1 is wrong.\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_becomes_a_sentence_and_a_code(error, code, said, capsys):
    def command():
        raise error

    assert exit_code(command) == code
    assert capsys.readouterr() == ("", said)


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 / 0)


def test_a_reader_that_goes_away_is_no_error(history):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([NANOGPT, "runs", "--runs-dir", history], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


# From words to arguments

VALUES = {
    "batch_size": st.integers(1, 512),
    "max_iters": st.integers(1, 10**6),
    "n_embd": st.sampled_from([96, 192, 384]),
    "learning_rate": st.floats(1e-6, 1.0),
    "dropout": st.floats(0, 0.99),
    "bias": st.booleans(),
    "compile": st.booleans(),
    "cuda_graph": st.booleans(),
    "tokenizer": st.sampled_from(["char", "bpe"]),
    "norm": st.sampled_from(["layernorm", "rmsnorm"]),
    "data": st.lists(st.sampled_from(["a.txt", "plays/", "-", "tinyshakespeare", "é b.txt"]), min_size=1).map(tuple),
    "device": st.sampled_from(["auto", "cpu", "cuda:1"]),
}


def words_for(name: str, value, underscores: bool, equals: bool) -> list[str]:
    flag = name if underscores else name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, tuple):
        return [f"--{flag}", *value]
    return [f"--{flag}={value}"] if equals else [f"--{flag}", str(value)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    preset=st.sampled_from(sorted(PRESETS)),
    typed=st.fixed_dictionaries({}, optional=VALUES),
    underscores=st.booleans(),
    equals=st.booleans(),
    data=st.data(),
)
def test_what_is_typed_is_what_the_run_gets_and_nothing_else(preset, typed, underscores, equals, data):
    parts = [["--preset", preset], *(words_for(name, value, underscores, equals) for name, value in typed.items())]
    words = list(itertools.chain(*data.draw(st.permutations(parts))))
    args = parse_train(words)
    assert args.config == NanoGPTConfig.preset(preset).replace(**typed)
    assert type(args.config) is NanoGPTConfig
    assert args.given == {"preset", *typed}
    assert args.preset == preset


def test_train_words_about_the_run():
    new = parse_train(["--preset", "tiny", "--name", "n", "--runs-dir", "elsewhere"])
    assert (new.name, new.runs_dir, new.resume, new.given) == ("n", Path("elsewhere"), None, {"preset"})
    again = parse_train(["--resume", "before", "--max-iters", "7"])
    assert (again.name, again.runs_dir, again.resume, again.given) == (None, Path("runs"), "before", {"max_iters"})


def test_without_a_preset_it_is_the_one_for_the_device():
    assert parse_train(["--device", "cpu"]).preset == "cpu"
    assert parse_train(["--device", "cuda"]).config.n_embd == NanoGPTConfig.preset("modern").n_embd


def test_sample_words():
    words = "my-run --tokens 5 --temperature 0 --top-k 3 --top-p 0.5 --seed 0 --num-samples 2 --checkpoint last --no-cache"
    args = parse_sample(words.split())
    assert (args.run, args.max_new_tokens, args.temperature, args.top_k, args.top_p) == ("my-run", 5, 0.0, 3, 0.5)
    assert (args.seed, args.num_samples, args.checkpoint, args.cache) == (0, 2, "last", False)
    assert str(parse_sample(["--prompt-file", "-"]).prompt_file) == "-"
    assert parse_sample(["--prompt=--not-a-flag"]).prompt == "--not-a-flag"


def test_the_module_and_the_command_take_the_same_words():
    module = nanogpt("--preset", "tiny", "--help", command=(sys.executable, "-m", "nanogpt_nb.train"))
    command = nanogpt("train", "--preset", "tiny", "--help")
    assert module.returncode == command.returncode == 0
    flags = [set(re.findall(r"--[a-z][a-z-]*", done.stdout)) for done in (module, command)]
    assert flags[1] - flags[0] == {"--on", "--budget", "--hours", "--idle", "--box-guard", "--wait", "--region", "--queue", "--after", "--send-wandb-key", "--nproc", "--include", "--help"} - flags[0] and flags[0] < flags[1]
    mistakes = [nanogpt("--dropout", "2", command=module.args[:3]), nanogpt("train", "--dropout", "2")]
    assert mistakes[0].stderr == mistakes[1].stderr != ""
    assert mistakes[0].returncode == mistakes[1].returncode == 2


# The history


def test_runs_lists_newest_first_with_what_there_is_to_know(history):
    lines = nanogpt("runs", "--runs-dir", history).stdout.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["new", "wide", "first"]
    assert "val loss" in lines[0] and "tokens/s" in lines[0]
    (wide,) = [line for line in lines if line.startswith("wide")]
    for shown in ("stopped", "cpu", "20,000", "3.0000", "2,000", "2026-01-02"):
        assert shown in wide


@pytest.mark.parametrize(
    ("by", "order"),
    [
        ("val_loss", ["first", "wide", "new"]),
        ("tokens_per_second", ["wide", "first", "new"]),
        ("name", ["first", "new", "wide"]),
        ("parameters", ["new", "wide", "first"]),
    ],
)
def test_runs_are_sorted(history, by, order):
    told = json.loads(nanogpt("runs", "--runs-dir", history, "--json", "--sort", by).stdout)
    assert [row["name"] for row in told] == order


def test_a_narrow_terminal_keeps_names_and_losses_whole(history, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert main(["runs", "--runs-dir", str(history)]) == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 70
    assert any("first" in line and "2.0000" in line for line in lines)
    assert "steps" not in lines[0]


def test_no_runs_is_said_and_not_an_error(tmp_path):
    done = nanogpt("runs", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "no runs in runs yet" in done.stdout
    assert json.loads(nanogpt("runs", "--json", cwd=tmp_path).stdout) == []


def test_compare_shows_what_differs_and_the_curves(history):
    done = nanogpt("runs", "--runs-dir", history, "--compare", "first", "wide")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["setting", "first", "wide"] in rows and ["n_embd", "32", "64"] in rows and ["dropout", "0.0", "0.1"] in rows
    assert not any(row[:1] == ["block_size"] for row in rows)
    assert "A" in done.stdout and "⠤A⠤ first" in done.stdout and "⠤B⠤ wide" in done.stdout


def test_compare_in_a_plain_terminal_is_a_table(history):
    done = nanogpt("runs", "--runs-dir", history, "--compare", "first", "wide", PYTHONIOENCODING="ascii")
    rows = [line.replace("|", " ").split() for line in done.stdout.splitlines()]
    assert ["50", "3.0000", "3.5000"] in rows


def test_compare_as_json(history):
    told = json.loads(nanogpt("runs", "--runs-dir", history, "--compare", "first", "wide", "new", "--json").stdout)
    assert told["settings"]["n_embd"] == [32, 64, 32]
    assert told["curves"]["first"] == [[0, 4.0], [50, 3.0], [100, 2.0]] and told["curves"]["new"] == []


@pytest.mark.parametrize("names", [["first"], ["first", "first"]], ids=" ".join)
def test_one_run_is_too_few_to_compare(history, names):
    done = nanogpt("runs", "--runs-dir", history, "--compare", *names)
    assert done.returncode == 2 and "only first to compare" in done.stderr


# Completion


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_completion_script_is_one_that_the_shell_can_read(shell, tmp_path):
    done = nanogpt("completion", shell)
    assert done.returncode == 0 and all(f"'{name}'" in done.stdout for name in COMMANDS if " " not in name)
    if shutil.which(shell):
        (tmp_path / "script").write_text(done.stdout)
        checked = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("tr", {"train"}),
        ("", {name for name in COMMANDS if " " not in name}),
        ("train --max", {"--max-iters"}),
        ("train --norm ", {"layernorm", "rmsnorm"}),
        ("sample --top-", {"--top-k", "--top-p"}),
    ],
)
def test_bash_completes(typed, offered, tmp_path):
    (tmp_path / "script").write_text(nanogpt("completion", "bash").stdout)
    words = ["nanogpt", *typed.split(" ")]
    (function,) = re.findall(r"^complete .*-F (\S+) nanogpt$", (tmp_path / "script").read_text(), re.M)
    quoted = " ".join(f"'{word}'" for word in words)
    code = f'. "$1"; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; {function}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", code, "bash", tmp_path / "script"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert offered <= set(done.stdout.split())


# The whole way


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A folder with a text and the run that the command made of it, what the command said, and the environment that it had."
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("To be, or not to be, that is the question:\n" * 60)
    words = "--preset tiny --data text.txt --max-iters 6 --eval-interval 3 --device cpu --name run".split()
    env = {"NANOGPT_NB_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = nanogpt("train", *words, cwd=folder, **env)
    assert done.returncode == 0, done.stderr
    return folder, done, env


def test_training_ends_with_a_command_that_works(trained):
    folder, done, env = trained
    (line,) = [line for line in done.stdout.splitlines() if "sample run" in line]
    words = line.partition("sample ")[2].partition(" --prompt")[0].split()
    said = nanogpt("sample", *words, "--prompt", "To ", "--tokens", "20", "--seed", "1", cwd=folder, **env)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("To ") and len(said.stdout) == len("To ") + 20 + 1
    again = nanogpt("sample", *words, "--prompt", "To ", "--tokens", "20", "--seed", "1", "--no-cache", cwd=folder, **env)
    assert again.stdout == said.stdout


def test_a_prompt_may_come_from_standard_input(trained):
    folder, _, env = trained
    (folder / "prompt").write_text("not to be")
    with open(folder / "prompt") as prompt:
        said = nanogpt("sample", "run", "--prompt-file", "-", "--tokens", "5", cwd=folder, stdin=prompt, **env)
    assert said.returncode == 0 and said.stdout.startswith("not to be"), said.stderr


def test_going_on_changes_only_what_is_typed(trained):
    folder, _, env = trained
    shutil.copytree(folder / "runs" / "run", folder / "runs" / "longer")
    refused = nanogpt("train", "--resume", "longer", "--max-iters", "9", "--n-embd", "64", cwd=folder, **env)
    assert refused.returncode == 2 and "n_embd=64" in refused.stderr
    done = nanogpt("train", "--resume", "longer", "--max-iters", "9", cwd=folder, **env)
    assert done.returncode == 0, done.stderr
    was, now = (Run(folder / "runs" / name) for name in ("run", "longer"))
    assert now.summary()["steps"] == 9
    assert was.config.diff(now.config) == {"max_iters": (6, 9)}


def test_data_describes_a_text(trained):
    folder, _, env = trained
    said = nanogpt("data", "text.txt", cwd=folder, **env)
    assert said.returncode == 0, said.stderr
    told = dict(line.split(None, 1) for line in said.stdout.splitlines())
    text = (folder / "text.txt").read_text()
    assert told["characters"] == f"{len(text):,}"
    assert told["vocabulary"] == f"{len(set(text))} characters"
    assert told["tokens"].startswith(f"{len(text):,}: {int(0.9 * len(text)):,} to train on")
    assert told["cache"] == env["NANOGPT_NB_CACHE"]


def test_a_package_that_the_base_install_lacks_is_named(tmp_path):
    (tmp_path / "optuna.py").write_text("raise ImportError('no optuna here')\n")
    done = nanogpt("sweep", "--preset", "tiny", "--space", "dropout=0,0.1", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "optuna" in done.stderr and "make install" in done.stderr and "Traceback" not in done.stderr
