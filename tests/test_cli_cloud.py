"`nanogpt cloud`, as people type it, against the rehearsal on this machine."

import io
import re
import sys

import pytest
from box import until, why_no_box

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
    assert kept.read_text().strip() == cloud.key and kept.stat().st_mode & 0o077 == 0
    assert say("login", "--forget")[0] == 0 and not kept.exists()


def test_mistakes(say, place):
    for words, hint in (
        (["up", "rehearsal:gpu_1x_h10"], "gpu_1x_h100"),
        (["up", "rehearsal", "--budget", "0.01"], "give at least"),
        (["up", "rehearsal", "--budget", "none"], "budget"),
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


def test_a_machine_comes_is_extended_and_goes(say, place):
    code, told = say("up", "rehearsal", "--name", "box", "--budget", "2")
    assert code == 0 and "$2.00 at most" in told and "nanogpt cloud down box" in told and "it is a rehearsal" in told.lower()
    code, told = say("ls")
    assert code == 0 and re.search(r"^box +gpu_1x_h100_pcie +ready", told, re.M)
    pub = next((place / ".ssh").glob("*.pub"))
    code, told = say("keys", "--rehearsal", "--add", pub)  # it is there already
    assert code == 0 and say("keys", "--rehearsal")[1].count("\n") == 2
    code, told = say("extend", "--budget", "1")
    assert code == 0 and "of $3.00 left" in told
    code, told = say("guard")
    assert code == 0 and "its guardian is at work" in told
    code, told = say("gc", "--rehearsal")
    assert code == 0 and "guarded" in told
    code, told = say("down")  # nobody there to ask
    assert code == 2 and "--yes" in told and "ready" in say("ls")[1]
    code, told = say("down", "box", "--yes")
    assert code == 0 and "box is gone" in told and "(nanogpt cloud down)" in told
    assert "nothing runs" in say("ls")[1]
    assert all(o.status == "terminated" for o in start_rehearsal().instances())
    code, told = say("ledger", "--rehearsal")
    assert code == 0 and re.search(r"box +gpu_1x_h100_pcie .* \$0\.\d\d +nanogpt cloud down", told)
    assert "box" not in say("ledger")[1]
    assert say("ledger", "--rehearsal", "--csv")[1].startswith("lease,name,type,")
    assert not (place / ".ssh" / "nanogpt_nb.conf").exists()
    assert say("rehearsal")[0] == 0
    code, told = say("rehearsal", "--stop")
    assert code == 0 and "has ended" in told
    until(lambda: "No rehearsal" in say("rehearsal")[1], "the rehearsal's end")
