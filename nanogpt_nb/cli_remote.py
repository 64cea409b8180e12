"""The commands of `nanogpt` that are about other machines: hosts, files, jobs, what is wrong there."""

import sys

from nanogpt_nb.checkpoints import command
from nanogpt_nb.cli_remote_args import (
    DoctorArgs,
    HostAddArgs,
    HostCodeArgs,
    HostGpusArgs,
    HostLsArgs,
    HostRemoveArgs,
    HostTrustArgs,
    JobLogsArgs,
    JobLsArgs,
    JobPullArgs,
    JobRemoveArgs,
    JobStartArgs,
    JobStopArgs,
    LabArgs,
    PrepareArgs,
    PullArgs,
    PushArgs,
)
from nanogpt_nb.config import ConfigError


def host_of(name: str):
    "The machine called `name`; nothing is connected yet."
    from nanogpt_nb.remote.ssh import Host

    return Host.of(name)


def host_add(args: HostAddArgs) -> None:
    "Write an entry for ssh."
    from nanogpt_nb.remote.address import add_host

    made = add_host(args.name, args.address, key=args.key and str(args.key), jump=args.jump, python=args.python, path=args.path)
    print(f"{args.name} is {made}, for ssh, rsync and VSCode as well\nnext:          {command()} host trust {args.name}")


def host_remove(args: HostRemoveArgs) -> None:
    "Take an entry out."
    from nanogpt_nb.remote.address import remove_host

    remove_host(args.name)
    print(f"{args.name} is forgotten here; on the machine nothing has changed")


def host_ls(args: HostLsArgs) -> None:
    "List the machines that ssh knows by name."
    from nanogpt_nb.remote.address import hosts

    print(hosts() or f"ssh knows no machine by name yet; give one a name: {command()} host add NAME USER@ADDRESS")


def host_trust(args: HostTrustArgs) -> None:
    "Trust a host key."
    from nanogpt_nb.remote.keys import trust

    told = trust(args.host, yes=args.yes or agreed)
    print("\n".join(told) or f"the key of {args.host} is known already, and it is the same")
    print(f"next:          {command()} doctor {args.host}")


def agreed(said: str) -> bool:
    "Whether the user trusts the key; without a terminal there is nobody to ask."
    if not sys.stdin.isatty():
        raise ConfigError(f"{said} Nobody is here to compare it; do that yourself, and give --yes.")
    return input(f"{said}\nIs that its fingerprint? [y/N] ").strip().lower() in ("y", "yes")


def host_code(args: HostCodeArgs) -> None:
    "Open VSCode there."
    print(host_of(args.host).code(path=args.path))


def host_gpus(args: HostGpusArgs) -> None:
    "Show the GPUs."
    told = host_of(args.host).gpus(live=args.live)
    if not args.live:
        print(told)


def push(args: PushArgs) -> None:
    "Send the project."
    print(host_of(args.host).push(args.project, path=args.path, include=args.include, dry_run=args.dry_run, force=args.force))


def pull(args: PullArgs) -> None:
    "Bring a run home."
    from nanogpt_nb.remote.pull import pull

    run = args.run if args.run is not None or args.on is not None else newest(args.runs_dir)
    if run is None:
        raise ConfigError(f"Which run of {args.on}? Give its name, or the folder there; {command()} job ls {args.on} lists what was trained there.")
    show_run(pull(run, args.on, args.runs_dir, follow=args.follow))


def newest(runs_dir):
    "The newest run that another machine trained."
    from nanogpt_nb.runs import list_runs

    for run in list_runs(runs_dir):
        if run.remote:
            return run
    raise ConfigError(f"No run in {runs_dir} is from another machine; say which, and where: {command()} pull RUN --on HOST.")


def show_run(run) -> None:
    "What has come."
    told = run.summary()
    loss = f", best val loss {told['val_loss']:.4f}" if told["val_loss"] is not None else ""
    print(f"run {run.path}: {told['state']} at step {told['steps']}{loss}")


def job_of(args):
    "The job that is meant; without a name, the newest one."
    host = host_of(args.host)
    if args.job is not None:
        return host.job(args.job)
    if not (jobs := host.jobs()):
        raise ConfigError(f"There are no jobs on {args.host}; start one with {command()} job start {args.host} -- COMMAND.")
    return jobs[-1]


def job_start(args: JobStartArgs) -> None:
    "Start a command there."
    if not args.command:
        raise ConfigError(f"There is no command to start; it comes last, after two dashes: {command()} job start {args.host} -- COMMAND.")
    words = list(args.command) if len(args.command) > 1 else args.command[0]
    queue = "gpu" if args.queue else None
    job = host_of(args.host).start(words, name=args.name, cwd=args.cwd, after=args.after, queue=queue)
    print(f"job {job.id} on {args.host} is {job.last['state']}")
    print(f"its output:    {command()} job logs {args.host} {job.id} -f\nend it:        {command()} job stop {args.host} {job.id}")


def job_ls(args: JobLsArgs) -> None:
    "List the jobs."
    print(host_of(args.host).jobs())


def job_logs(args: JobLogsArgs) -> int:
    "Show what a job printed; the exit code is the job's, once it has ended."
    job = job_of(args)
    for line in job.logs(follow=args.follow, lines=args.lines):
        print(line, flush=args.follow)
    return exit_code(job.last) if args.follow else 0


def exit_code(status: dict) -> int:
    "The exit code of a job that has ended, as a shell gives it."
    code = status.get("code")
    return (code if code >= 0 else 128 - code) if isinstance(code, int) else int(status.get("state") not in ("finished", "stopped"))


def job_stop(args: JobStopArgs) -> None:
    "Stop a job."
    job = job_of(args)
    told = job.stop(args.grace)
    print(f"job {job.id} on {args.host} is {told['state']}")


def job_remove(args: JobRemoveArgs) -> None:
    "Delete what is kept of a job."
    job = job_of(args)
    job.remove()
    print(f"job {job.id} on {args.host} is removed")


def job_pull(args: JobPullArgs) -> None:
    "Bring home the run of a job."
    from nanogpt_nb.remote.pull import pull

    job = job_of(args)
    path = (job.last.get("about") or {}).get("run")
    if not path:
        raise ConfigError(f"The job {job.id} on {args.host} trains no run; its output is shown by {command()} job logs {args.host} {job.id}.")
    show_run(pull(path, args.host, args.runs_dir, follow=args.follow))


def prepare(args: PrepareArgs) -> None:
    "Make the environment there, or remove old ones."
    if not args.tidy:
        return print(host_of(args.host).prepare())
    from nanogpt_nb.remote.prepare import tidy

    print("\n".join(f"removed {name}" for name in tidy(args.host)) or f"no environment on {args.host} can be spared")


def doctor(args: DoctorArgs) -> int:
    "Look a machine over; 1 if something is broken."
    from nanogpt_nb.remote.doctor import report

    return report(args.host, args.fix)


def lab(args: LabArgs) -> int:
    "JupyterLab there, here."
    from nanogpt_nb.remote.lab import lab_from_args

    return lab_from_args(args)


COMMANDS = {
    "push": (PushArgs, push),
    "pull": (PullArgs, pull),
    "job start": (JobStartArgs, job_start),
    "job ls": (JobLsArgs, job_ls),
    "job logs": (JobLogsArgs, job_logs),
    "job stop": (JobStopArgs, job_stop),
    "job remove": (JobRemoveArgs, job_remove),
    "job pull": (JobPullArgs, job_pull),
    "host add": (HostAddArgs, host_add),
    "host ls": (HostLsArgs, host_ls),
    "host remove": (HostRemoveArgs, host_remove),
    "host trust": (HostTrustArgs, host_trust),
    "host code": (HostCodeArgs, host_code),
    "host gpus": (HostGpusArgs, host_gpus),
    "prepare": (PrepareArgs, prepare),
    "doctor": (DoctorArgs, doctor),
    "lab": (LabArgs, lab),
}
