"""Kill the builder of an environment at random moments, many times: `python tests/faults_setup.py [TIMES]`; prints the counts."""

import random
import sys
import tempfile
from pathlib import Path

import pytest
from box import Box
from test_setup import killed_builds, make_wheel

from nanogpt_nb.remote.ssh import Host


def main(times: int):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        shelf = Path(folder) / "shelf"
        make_wheel(shelf, "greet", "2.0", {"greet.py": "version = '2.0'\n"})
        make_wheel(shelf, "polite", "1.0", {"polite.py": "import greet\n"}, needs=["greet>=1"])
        with Box(Path(folder)) as box:
            conf = box.home / ".config" / "pip" / "pip.conf"
            conf.parent.mkdir(parents=True)
            conf.write_text(f"[global]\nno-index = true\nfind-links = {shelf}\n")
            box.use(monkeypatch)
            with Host("gpu") as host:
                hit = killed_builds(host, box, random.Random(), times)
    print(f"{times} builds, {hit} of them killed on the way; each was made whole by the next call")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
