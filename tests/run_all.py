"""Lint, run the notebooks and the tests, and end with a line that counts them: `make test`.

Words that this script does not know go to pytest: `make test ARGS="-k tokenizer"`.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("lint", "notebooks", "tests")


def lint(args, rest) -> tuple[int, int, int]:
    "ruff on what people write by hand: passed, failed, skipped."
    ok = subprocess.run([sys.executable, "-m", "ruff", "check", "--quiet"], cwd=ROOT).returncode == 0
    print("ruff finds nothing." if ok else "ruff finds something.", flush=True)
    return int(ok), int(not ok), 0


def notebooks(args, rest) -> tuple[int, int, int]:
    "Every notebook from top to bottom, without the cells that are flagged slow, gpu or net: passed, failed, skipped."
    inside = [path.relative_to(ROOT / "nbs") for path in (ROOT / "nbs").rglob("*.ipynb")]
    total = sum(not any(part[0] in "._" for part in path.parts) for path in inside)
    threads = max(1, (os.cpu_count() or 2) // 2)  # two notebooks at a time share the cores
    command = ["nbdev_test", "--n_workers", "2", "--do_print", "--timing", *(["--flags", "slow"] if args.slow else [])]
    env = {"OMP_NUM_THREADS": str(threads), "WANDB_MODE": "disabled", **os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        said = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            said += line
    listed = said.partition("Failed On The Following Notebooks")[2]
    failed = len(set(re.findall(r"^\t(.+\.ipynb)$", listed, re.M))) or (total if process.returncode else 0)
    return total - failed, failed, 0


class Count:
    "A pytest plugin that counts: a test that fails anywhere, or a file that cannot be read, is one failure."

    def __init__(self):
        self.passed, self.failed, self.skipped = set(), set(), set()

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)
        elif report.skipped:
            self.skipped.add(report.nodeid)
        elif report.when == "call":
            self.passed.add(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)


def tests(args, rest) -> tuple[int, int, int]:
    "pytest: passed, failed, skipped."
    count = Count()
    together = any(word in ("-s", "--pdb") or word.startswith("-n") for word in rest)
    apart = [] if together else ["-n", str((os.cpu_count() or 2) + 1), "--dist", "loadfile"]  # most tests wait for processes
    code = pytest.main(["-q", *apart, *(["--slow"] if args.slow else []), *rest], plugins=[count])
    failed = len(count.failed) or int(code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED))
    return len(count.passed - count.failed), failed, len(count.skipped - count.failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slow", action="store_true", help="with what is marked or flagged slow")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part alone; may be given again")
    args, rest = parser.parse_known_args()
    os.chdir(ROOT)

    counts = {}
    for part in args.only or PARTS:
        print(f"── {part} ──", flush=True)
        counts[part] = globals()[part](args, rest)
    print("\n" + "; ".join(f"{part}: {p} passed, {f} failed, {s} skipped" for part, (p, f, s) in counts.items()))
    passed, failed, skipped = map(sum, zip(*counts.values(), strict=True))
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return int(failed > 0 or passed == 0)


if __name__ == "__main__":
    sys.exit(main())
