"What every test file shares."

import os

import pytest

os.environ["WANDB_MODE"] = "disabled"  # the tests of tracking say otherwise


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too; SLOW=1 does the same")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow") or os.environ.get("SLOW", "0") not in ("", "0"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run it with --slow or SLOW=1"))
