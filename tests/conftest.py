"What every test file shares."

import os
import signal

import openapi
import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # begun in the background of a script: Ctrl-C would be tested on the deaf
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup: a handler, unlike "ignore", is not inherited
    signal.signal(signal.SIGHUP, lambda *_: None)
os.environ["WANDB_MODE"] = "disabled"  # the tests of tracking say otherwise
openapi.watch()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too; SLOW=1 does the same")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow") or os.environ.get("SLOW", "0") not in ("", "0"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run it with --slow or SLOW=1"))


def all_as_described():
    found = openapi.mismatches()
    assert not found, "Lambda's description of its service says otherwise:\n" + "\n".join(found)


@pytest.fixture(autouse=True)
def described():
    "What a test asks of the service, and what it is answered, is as the service describes it."
    yield
    all_as_described()


@pytest.fixture(autouse=True, scope="session")
def described_to_the_end():
    "So is what is asked when the last test is over."
    yield
    all_as_described()


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory, request):
    "A folder with a text, the module's TEXT, and two small runs on it: of characters and of byte pairs."
    import torch

    from nanogpt_nb.config import NanoGPTConfig
    from nanogpt_nb.train import train

    home = tmp_path_factory.mktemp("home")
    (home / "text.txt").write_text(request.module.TEXT, encoding="utf-8")
    config = NanoGPTConfig.preset("tiny").replace(max_iters=30, eval_interval=15, eval_iters=2, data=(str(home / "text.txt"),))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(config, name="chars", runs_dir=home / "runs", quiet=True)
    train(config.replace(tokenizer="bpe", bpe_vocab_size=300), name="pairs", runs_dir=home / "runs", quiet=True)
    torch.set_num_threads(threads)
    return home
