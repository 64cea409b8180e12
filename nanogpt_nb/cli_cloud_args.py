"""What can be typed after `nanogpt cloud`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nanogpt_nb.args import Budget, Dollars, Hours, Idle
from nanogpt_nb.cli_remote_args import Flag, Positional, text

LEASES = text("NAME ...", "(default: the only one that is open)")
OfRehearsal = Annotated[Flag, tyro.conf.arg(help="of the rehearsal on this machine")]


@dataclass(frozen=True)
class CloudLoginArgs:
    """Keep the account's API key on this machine: in the system's keyring, or else in a file that only you can read.

    It is asked for without being shown, and tried before it is kept. Make one at https://cloud.lambda.ai/api-keys"""

    file: Annotated[Path | None, text("FILE", "(default: ask for it)")] = None
    "file that has the key; - is standard input"
    forget: Flag = False
    "instead, delete the key that is kept here"


@dataclass(frozen=True)
class CloudTypesArgs:
    "List what can be rented, cheapest first: price, GPU, and where there is capacity now."

    gpu: Annotated[str | None, text("WORD", "(default: all)")] = None
    "only types with that word in the name or the GPU, such as h100"
    free: Flag = False
    "only types with capacity somewhere"
    rehearsal: Flag = False
    "of the rehearsal on this machine, which needs no account"


@dataclass(frozen=True)
class CloudUpArgs:
    """Rent a machine, under a lease that gives it back: at its budget, at its hours, when it idles, or with nanogpt cloud down.

    Several types or regions are tried in the order given. `rehearsal` rents one that is only this machine, and costs nothing.
    The guardian that gives it back is a process here, and works while this machine is on: for a laptop that is shut there is --box-guard, or nanogpt cloud gc from cron on a machine that is on."""

    types: Positional[Annotated[tuple[str, ...], text("TYPE ...")]] = ()
    "instance types, as nanogpt cloud types lists them"
    name: Annotated[str | None, text("NAME", "(default: made from the lease)")] = None
    "what ssh and nanogpt are to call the machine"
    budget: Budget = None
    "most it may cost"
    hours: Hours = None
    "most it may run"
    idle: Idle = None
    region: Annotated[tuple[str, ...], text("REGION ...", "(default: any)")] = ()
    "regions to try, in this order"
    wait: Annotated[float, text("MINUTES", "(default: do not wait)")] = 0
    "wait so long for capacity"
    tries: int = 3
    "machines to try when one does not come up well"
    key: Annotated[Path | None, text("FILE", "(default: a key of ~/.ssh)")] = None
    "private key to log in with; its public half is registered"
    file_system: Annotated[tuple[str, ...], text("NAME ...", "(default: none)")] = ()
    "file systems of the account to attach; they rule the region"
    box_guard: Flag = False
    "watch from the box as well, for a laptop that is shut; the account's key is handed to the box for that"


@dataclass(frozen=True)
class CloudLsArgs:
    "List what runs: since when, its cost so far and per hour, and what this machine does not know of."

    rehearsal: Flag = False
    "only of the rehearsal on this machine"


@dataclass(frozen=True)
class CloudDownArgs:
    "Give machines back: what they trained comes home first; then wait until the service confirms, and tell what was spent."

    names: Positional[Annotated[tuple[str, ...], LEASES]] = ()
    "leases, by name or id, or ids of instances"
    all: Flag = False
    "all that this machine has rented"
    now: Flag = False
    "at once, whatever has not come home is lost"
    yes: Flag = False
    "do not ask"


@dataclass(frozen=True)
class CloudExtendArgs:
    "Let a lease cost more, or run longer. It ends at the nearer one of its limits, so often it needs both."

    name: Positional[Annotated[str | None, text("NAME", "(default: the only one that is open)")]] = None
    "lease, by name or id"
    budget: Annotated[Dollars, text("DOLLARS", "(default: as it was)")] = None
    "dollars on top"
    hours: Annotated[float | None, text("HOURS", "(default: as it was)")] = None
    "hours on top"


@dataclass(frozen=True)
class CloudKeysArgs:
    "List the ssh keys of the account; add one, or remove one."

    add: Annotated[Path | None, text("FILE", "(default: none)")] = None
    "public key to register; one that is there already, under whatever name, is used"
    remove: Annotated[str | None, text("NAME", "(default: none)")] = None
    "key to take out of the account, by name or id"
    rehearsal: OfRehearsal = False


@dataclass(frozen=True)
class CloudGcArgs:
    """End every machine of the account that nanogpt has rented, from wherever, and that is past its lease. Others are listed and not touched.

    Run it now and then, or from cron on a machine that is always on; it needs only the account's key.

    What it says of each machine:

    guarded: a lease of this machine, which its guardian gives back

    in time: rented by nanogpt elsewhere, and not past its lease

    renamed: past its lease, and somebody gave it another name to keep it; left alone

    due, ended, not ended: past its lease; what became of that (due: only told, with --dry-run)

    gone: it has ended already

    unknown: not rented by nanogpt, never touched"""

    dry_run: Flag = False
    "only say what would be ended"
    rehearsal: OfRehearsal = False


@dataclass(frozen=True)
class CloudGuardArgs:
    """See to it that every open lease of this machine has a guardian, for instance after a restart.

    A guardian is a process that gives the machine back at its budget, its hours or when it idles, whatever becomes of the notebook."""


@dataclass(frozen=True)
class CloudLedgerArgs:
    "List all leases of this machine: when, what, how long, what they cost and why they ended."

    csv: Flag = False
    "as a table for a spreadsheet"
    rehearsal: Flag = False
    "rehearsals, too"


@dataclass(frozen=True)
class CloudRehearsalArgs:
    "Tell how the rehearsal stands: a service on this machine that speaks Lambda's API and rents out this machine. It starts when it is needed."

    stop: Flag = False
    "end it, and what it rents out"
