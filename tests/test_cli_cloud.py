"`nanogpt cloud`, as people type it, against the rehearsal on this machine."

import contextlib
import io
import re
import sys

import httpx
import psutil
import pytest
from box import contents, until, why_no_box

from nanogpt_nb.checkpoints import command
from nanogpt_nb.cli import main
from nanogpt_nb.remote.rehearsal import start_rehearsal, stop_rehearsal

pytestmark = pytest.mark.skipif(why_no_box() is not None, reason=why_no_box() or "")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A home of its own, with a rehearsal."
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("HOME", str(home))
        m.setenv("NANOGPT_NB_DATA", str(home / "data"))
        m.setenv("PYTHON_KEYRING_BACKEND", "keyring.backends.null.Keyring")
        for name in ("SSH_AUTH_SOCK", "LAMBDA_API_KEY", "LAMBDA_API_KEY_FILE", "LAMBDA_API_URL"):
            m.delenv(name, raising=False)
        (home / "project").mkdir()
        m.chdir(home / "project")
        start_rehearsal(boot=0.3)
        yield home
        stop_rehearsal()


@pytest.fixture
def say(place, capsys):
    "A command, typed: its exit code, and what is seen."

    def say(*words):
        try:
            code = main(["cloud", *map(str, words)])
        except SystemExit as e:
            code = e.code
        told = capsys.readouterr()
        return code, told.out + told.err

    return say


def test_types_by_price_and_where_one_is_free(say):
    code, told = say("types", "--rehearsal")
    prices = [float(p) for p in re.findall(r"^\S+ +\$([\d.]+)", told, re.M)]
    assert code == 0 and len(prices) > 5 and prices == sorted(prices)
    assert "none free" in told and "nanogpt train --on rehearsal:" in told
    code, free = say("types", "--rehearsal", "--free", "--gpu", "H100")
    rows = [line for line in free.splitlines() if line.startswith("gpu_")]
    assert code == 0 and rows and all("h100" in row and "none free" not in row for row in rows)
    code, told = say("types", "--rehearsal", "--gpu", "tpu")
    assert code == 2 and "'tpu'" in told and "nanogpt cloud types" in told


def test_without_a_key_it_is_said_how_to_get_one(say):
    for words in (["types"], ["up", "gpu_1x_a10"], ["gc"], ["keys"]):
        code, told = say(*words)
        assert code == 2 and "nanogpt cloud login" in told and told.count("\n") == 1, told


def test_a_key_is_tried_before_it_is_kept(say, place, monkeypatch):
    cloud = start_rehearsal()
    monkeypatch.setenv("LAMBDA_API_URL", cloud.base_url)
    (place / "wrong").write_text("secret_wrong_key\n")
    code, told = say("login", "--file", place / "wrong")
    assert code == 1 and "wrong" not in told.replace(str(place / "wrong"), "") and not (place / "data" / "lambda_key").exists()
    monkeypatch.setattr(sys, "stdin", io.StringIO(cloud.key + "\n"))
    code, told = say("login", "--file", "-")
    kept = place / "data" / "lambda_key"
    assert code == 0 and str(kept) in told and cloud.key not in told
    assert kept.read_text().split() == [cloud.key, "for", cloud.base_url] and kept.stat().st_mode & 0o077 == 0
    assert say("login", "--forget")[0] == 0 and not kept.exists()
    monkeypatch.setattr("nanogpt_nb.remote.cloud_key.forget_key", lambda: ["the keyring"])
    code, told = say("login", "--forget")
    assert code == 1 and "could not be deleted from the keyring" in told


def test_mistakes(say, place):
    for words, hint in (
        (["up", "rehearsal:gpu_1x_h10"], "gpu_1x_h100"),
        (["up", "rehearsal", "--budget", "0.01"], "give at least"),
        (["up", "rehearsal", "--budget", "5,5"], "--budget takes dollars, such as 5 or 2.50"),
        (["up"], "cloud types lists them"),
        (["up", "rehearsal", "--name", "my box"], "--name 'my box'"),
        (["types"], "types --rehearsal lists them"),
        (["up", "rehearsal", "gpu_1x_a10"], "mixes"),
        (["down"], "No lease is open"),
        (["down", "nothing"], "'nothing'"),
        (["down", "--all", "gpu"], "--all"),
        (["extend"], "No lease is open"),
        (["keys", "--rehearsal", "--remove", "mine"], "'mine'"),
        (["keys", "--rehearsal", "--add", place / "absent.pub"], "absent.pub"),
        (["login"], "--file"),
    ):
        code, told = say(*words)
        assert code == 2 and hint in told and "Traceback" not in told, told
    assert say("down", "--all") == (0, f"No lease is open on this machine; {command()} cloud ls asks the account.\n")


@pytest.fixture(scope="module")
def box(place):
    "A machine that is rented, and what was said."
    told = io.StringIO()
    with contextlib.redirect_stdout(told), pytest.MonkeyPatch.context() as m:
        m.setenv("WANDB_MODE", "offline")
        assert main("cloud up rehearsal --name box --budget $2".split()) == 0
    return told.getvalue()


def test_what_it_costs_is_said_before_it_starts(box):
    assert box.index("$2.00 at most") < box.index("asked for") and "nanogpt cloud down box" in box and "it is a rehearsal" in box.lower()


def everywhere(home, secrets: dict, allowed=()) -> list[str]:
    "Where a secret stands: files below `home`, and command lines and environments of processes that have it as their HOME."
    found = []
    for path, data in ((p, data) for p, data in contents(home) if not p.is_symlink() and p not in allowed):
        found += [f"{name} in {path.relative_to(home)}" for name, secret in secrets.items() if secret in data]
    for process in psutil.process_iter():
        try:
            seen = {"command line": "\0".join(process.cmdline()), "environment": "\0".join(f"{k}={v}" for k, v in process.environ().items())}
        except psutil.Error:
            continue
        if f"HOME={home}" in seen["environment"]:
            found += [f"{name} in the {where} of {seen['command line'][:80]!r}" for name, secret in secrets.items() for where, text in seen.items() if secret.decode() in text]
    return found


def middle(private: str) -> bytes:
    "A line from the middle of a private key."
    return private.splitlines()[3].encode()


def test_no_secret_is_anywhere_on_the_way(box, place, monkeypatch):
    project = place / "project"
    (project / "pyproject.toml").write_text('[project]\nname = "seen"\n')
    (project / "text.txt").write_text("To be, or not to be.\n" * 400)
    monkeypatch.setenv("WANDB_MODE", "offline")
    cloud = start_rehearsal()
    told = httpx.get(f"{cloud.base_url}/instances", headers={"Authorization": f"Bearer {cloud.key}"}, timeout=120).json()["data"]
    tokens = {f"jupyter token {i}": o["jupyter_token"].encode() for i, o in enumerate(told) if o.get("jupyter_token")}
    mine = next(p.with_suffix("") for p in (place / ".ssh").glob("*.pub"))
    service = place / "data" / "rehearsal"
    there = [p for p, data in contents(service) if b"OPENSSH PRIVATE KEY" in data]  # of the box itself
    secrets = {"the account's key": cloud.key.encode(), "my private key": middle(mine.read_text()), **{f"host key {p.name}": middle(p.read_text()) for p in there}, **tokens}
    holders = {mine, *there, *(p for p in service.iterdir() if p.is_file() and cloud.key.encode() in p.read_bytes() and p.stat().st_mode & 0o077 == 0)}
    assert tokens and there and len(holders) >= 3
    assert [w for w in everywhere(place, secrets) if "the account's key" in w], "the search finds what is there"
    words = "train --on box --preset tiny --max-iters 20 --eval-interval 10 --eval-iters 1 --data text.txt --name seen"
    assert main(words.split()) == 0
    assert everywhere(place, secrets, holders) == []  # while the guardian is at work
    assert (project / "runs" / "seen" / "money.json").exists() and list((place / "data" / "leases").glob("*/guardian.log"))


def test_a_machine_is_looked_at_extended_and_goes(box, say, place):
    code, told = say("ls")
    assert code == 0 and re.search(r"^box +gpu_1x_h100_pcie +ready", told, re.M)
    pub = next((place / ".ssh").glob("*.pub"))
    code, told = say("keys", "--rehearsal", "--add", pub)  # it is there already
    assert code == 0 and say("keys", "--rehearsal")[1].count("\n") == 2
    code, told = say("extend")
    assert code == 2 and "cloud extend box" in told
    code, told = say("extend", "--budget", "1")
    assert code == 0 and "of $3.00 left" in told
    code, told = say("guard")
    assert code == 0 and "its guardian is at work" in told
    code, told = say("gc", "--rehearsal")
    assert code == 0 and "guarded" in told
    code, told = say("down")  # nobody there to ask
    assert code == 2 and "--yes" in told and "ready" in say("ls")[1]
    code, told = say("down", "box", "--yes")
    assert code == 0 and "(nanogpt cloud down)" in told and re.search("box is gone|, ended", told)
    assert "No lease of this machine is open." in say("ls")[1]
    assert all(o.status == "terminated" for o in start_rehearsal().instances())
    code, told = say("ledger", "--rehearsal")
    assert code == 0 and re.search(r"box +\(\$0\.\d\d\) +\d+ +gpu_1x_h100_pcie .* nanogpt cloud down", told)
    assert "box" not in say("ledger")[1]
    assert say("ledger", "--rehearsal", "--csv")[1].startswith("name,dollars,minutes,type,")
    assert not (place / ".ssh" / "nanogpt_nb.conf").exists()
    assert say("rehearsal")[0] == 0
    code, told = say("rehearsal", "--stop")
    assert code == 0 and "has ended" in told
    until(lambda: "No rehearsal" in say("rehearsal")[1], "the rehearsal's end")
