"""What can be typed after the commands of `nanogpt` that are about other machines."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

Positional = tyro.conf.Positional
Flag = tyro.conf.FlagCreatePairsOff[bool]


def text(metavar: str, hint: str | None = None):
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


HOST = text("HOST")
JOB = text("JOB", "(default: the newest)")
RUNS_DIR = text("DIR")
PROJECT = text("DIR", "(default: the one around this folder)")
PATH = text("PATH", "(default: ~/nanogpt/PROJECT)")


@dataclass(frozen=True)
class HostAddArgs:
    """Give a machine a short name, for ssh, rsync, VSCode and nanogpt alike.

    The entry goes into ~/.ssh/nanogpt_nb.conf, which ~/.ssh/config includes; the rest of that file stays as it is."""

    name: Positional[Annotated[str, text("NAME")]]
    "short name, such as gpu"
    address: Positional[Annotated[str, text("USER@ADDRESS[:PORT]")]]
    "where it is"
    key: Annotated[Path | None, text("FILE", "(default: the agent's keys, and ssh's usual ones)")] = None
    "private key to log in with"
    jump: Annotated[str | None, text("HOST[,HOST]", "(default: none)")] = None
    "machines to go through"
    python: Annotated[str | None, text("PATH", "(default: an environment made there)")] = None
    "a Python there that has all that training needs"
    path: Annotated[str | None, PATH] = None
    "folder there for the project"


@dataclass(frozen=True)
class HostRemoveArgs:
    "Take a machine's name out of the ssh configuration again. Nothing on the machine changes."

    name: Positional[Annotated[str, text("NAME")]]
    "the name"


@dataclass(frozen=True)
class HostLsArgs:
    "List the machines that ssh knows by name, and where they are."


@dataclass(frozen=True)
class HostTrustArgs:
    """Fetch a machine's host key, show its fingerprint, and trust it from now on.

    Compare the fingerprint with the one that the provider, or the machine's console, shows: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub"""

    host: Positional[Annotated[str, HOST]]
    "a name that ssh knows, or user@address[:port]"
    yes: Flag = False
    "do not ask"


@dataclass(frozen=True)
class HostCodeArgs:
    "Open VSCode on the project there, over Remote-SSH."

    host: Positional[Annotated[str, HOST]]
    "a name that ssh knows"
    path: Annotated[str | None, PATH] = None
    "folder there"


@dataclass(frozen=True)
class HostGpusArgs:
    "Show what the GPUs of a machine do, as nvidia-smi sees it."

    host: Positional[Annotated[str, HOST]]
    "a name that ssh knows, or user@address[:port]"
    live: Flag = False
    "go on showing, until Ctrl-C"


@dataclass(frozen=True)
class PushArgs:
    """Send the project to a machine: what git would take, and only what differs.

    Changed notebooks are exported first. What was sent before and is gone here is deleted there; runs, data and environments there are never touched."""

    host: Positional[Annotated[str, HOST]]
    "a name that ssh knows, or user@address[:port]"
    project: Annotated[Path | None, PROJECT] = None
    "folder to send"
    path: Annotated[str | None, PATH] = None
    "folder there"
    include: Annotated[tuple[str, ...], text("PATTERN ...", "(default: none)")] = ()
    "ignored files to send all the same"
    dry_run: Flag = False
    "only say what would happen"
    force: Flag = False
    "send into a folder that another machine has sent, and replace files there that no push has put there"


@dataclass(frozen=True)
class PullArgs:
    "Bring a run home, or what is new of it. Nothing here is ever deleted."

    run: Positional[Annotated[str | None, text("RUN", "(default: the newest from elsewhere)")]] = None
    "run, by its name here, or by name or folder there"
    on: Annotated[str | None, text("HOST", "(default: where it was launched)")] = None
    "machine that has it"
    follow: Flag = False
    "go on until it has ended"
    runs_dir: Annotated[Path, RUNS_DIR] = Path("runs")
    "folder that holds the runs"


@dataclass(frozen=True)
class JobStartArgs:
    """Start a command on a machine. It goes on when the connection ends.

    For instance: nanogpt job start gpu --queue -- python bench.py --steps 100"""

    host: Positional[Annotated[str, HOST]]
    "a name that ssh knows, or user@address[:port]"
    command: Positional[Annotated[tuple[str, ...], text("-- COMMAND ...")]]
    "the command and its words; one word alone is for the shell there"
    name: Annotated[str | None, text("NAME", "(default: the command's)")] = None
    "what to call it"
    after: Annotated[str | None, text("JOB", "(default: at once)")] = None
    "wait until that job has ended; last: the newest"
    queue: Flag = False
    "wait for the GPU: one such job at a time, first come first served"
    cwd: Annotated[str | None, text("PATH", "(default: the home folder there)")] = None
    "folder there to start in"


@dataclass(frozen=True)
class JobLsArgs:
    "List the jobs of a machine, newest last, whoever started them."

    host: Positional[Annotated[str, HOST]]
    "a name that ssh knows, or user@address[:port]"


@dataclass(frozen=True)
class JobLogsArgs:
    "Show what a job printed."

    host: Positional[Annotated[str, HOST]]
    "a name that ssh knows, or user@address[:port]"
    job: Positional[Annotated[str | None, JOB]] = None
    "job, by its id, its beginning or its name"
    follow: Annotated[Flag, tyro.conf.arg(aliases=["-f"])] = False
    "go on until it has ended; Ctrl-C ends the looking, not the job"
    lines: Annotated[int | None, text("INT", "(default: all)")] = None
    "only the last lines"


@dataclass(frozen=True)
class JobStopArgs:
    "Stop a job: ask it, wait, and end what is left of it. Training writes a checkpoint first."

    host: Positional[Annotated[str, HOST]]
    "a name that ssh knows, or user@address[:port]"
    job: Positional[Annotated[str | None, JOB]] = None
    "job, by its id, its beginning or its name"
    grace: float = 30.0
    "seconds to wait before it is ended"


@dataclass(frozen=True)
class JobRemoveArgs:
    "Delete what is kept of a job that has ended: its output and its place in the list. A run that it trained stays."

    host: Positional[Annotated[str, HOST]]
    "a name that ssh knows, or user@address[:port]"
    job: Positional[Annotated[str, text("JOB")]]
    "job, by its id, its beginning or its name"


@dataclass(frozen=True)
class JobPullArgs:
    "Bring home the run that a job trains, whoever launched it."

    host: Positional[Annotated[str, HOST]]
    "a name that ssh knows, or user@address[:port]"
    job: Positional[Annotated[str | None, JOB]] = None
    "job, by its id, its beginning or its name"
    follow: Flag = False
    "go on until it has ended"
    runs_dir: Annotated[Path, RUNS_DIR] = Path("runs")
    "folder that holds the runs"


@dataclass(frozen=True)
class PrepareArgs:
    "Make the Python environment that training needs on a machine. What is there already is left alone."

    host: Positional[Annotated[str, HOST]]
    "a name that ssh knows, or user@address[:port]"
    tidy: Flag = False
    "instead, remove the environments there that nothing needs any more"


@dataclass(frozen=True)
class DoctorArgs:
    """Look for what would keep training from working, here or on another machine: what was found, why it matters, what to do.

    The exit code is 1 where something is broken."""

    host: Positional[Annotated[str | None, text("HOST", "(default: this machine)")]] = None
    "a name that ssh knows, or user@address[:port]"
    fix: Flag = False
    "apply the cures that change nothing but the project's own environment"


@dataclass(frozen=True)
class LabArgs:
    "Open JupyterLab on another machine in the browser here. It goes on there when this ends; the same command finds it again."

    on: Annotated[str, HOST]
    "a name that ssh knows, or user@address[:port]"
    path: Annotated[str | None, PATH] = None
    "folder there to open; it has been pushed there before"
    stop: Flag = False
    "end the JupyterLab there"
    browser: bool = True
    "open the browser"
