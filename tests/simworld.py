"""What is on a rented box in a simulation: runs that end, results that take time to come home, outages, people who use it."""

from dataclasses import dataclass, field

from simclock import EPOCH, Machine, Process, Sim, Spans

CHECKPOINT = 20.0  # seconds that a run takes to write a checkpoint when it is asked to end


@dataclass
class Work:
    "A run on the box, as it truly is."

    path: str  # folder at home
    box: str  # id of the instance
    begins: float  # true time
    ends: float  # true time at which it is done, if nobody asks it to end
    size: float  # seconds that its way home takes
    asked: float | None = None  # when it was asked to end
    home_at: float | None = None  # when it was home and verified
    coming: float | None = None  # since when somebody brings it home
    got: float = 0.0  # seconds of its way home that are behind it
    seen: float = 0.0  # until when `got` was reckoned

    @property
    def over(self) -> float:
        "The true time at which it has ended, or will."
        return self.ends if self.asked is None else min(self.ends, self.asked + CHECKPOINT)


@dataclass
class Box:
    "The boxes of a lease, seen from outside: what runs there, and when nobody can reach them."

    sim: Sim
    service: object
    outages: Spans = field(default_factory=Spans)  # when the boxes cannot be reached from anywhere
    used: Spans = field(default_factory=Spans)  # when somebody uses a box by hand
    works: list[Work] = field(default_factory=list)

    def is_up(self, id: str) -> bool:
        one = self.service.instances.get(id)
        return one is not None and status_of(one) == "active"

    def reckon(self, machine: Machine):
        "Move what is on its way home; `machine` is the one that it goes to."
        now = self.sim.t
        deaf = machine.deaf | self.outages
        for w in self.works:
            if w.home_at is None and w.coming is not None and now > w.seen:
                a = max(w.seen, w.coming, w.over)
                if a < now and self.is_up(w.box):
                    w.got += now - a - deaf.inside(a, now)
                    if w.got >= w.size:
                        w.home_at = now
                        self.sim.say(f"{w.path} is home")
                w.seen = now

    def ends(self, id: str, machine: Machine):
        "The box `id` is about to be gone: what came home by now is all that does."
        self.reckon(machine)


def status_of(one) -> str:
    "The status of an instance of the service, however it is kept."
    return one["status"] if isinstance(one, dict) else one.status


class Seen:
    "The world of one guard: what `lease_guard.step` may ask of it."

    def __init__(self, sim: Sim, process_of, machine: Machine, box: Box, owner: "Process | None", own: bool, log: list):
        self.sim, self.process_of, self.machine, self.box, self.owner, self.own, self.log = sim, process_of, machine, box, owner, own, log
        self.since, self.forgotten = sim.t, 0

    def reaches(self, id: str | None) -> bool:
        return bool(id) and self.box.is_up(id) and self.sim.t not in self.machine.deaf and self.sim.t not in self.box.outages

    def _look(self):
        self.sim.pause(self.sim.random.uniform(0.0, 0.5))
        self.box.reckon(self.machine)

    def runs(self, record) -> list[dict]:
        self._look()
        now, noted, found = self.sim.t, set(record.state.runs), []
        for w in self.box.works:
            if w.path not in noted: continue
            reached = self.reaches(w.box)
            known_over = w.home_at is not None or (w.over <= now and (reached or getattr(w, "told", False)))
            if w.over <= now and reached: w.told = True
            found.append(dict(path=w.path, state="ended" if known_over else "going", home=w.home_at is not None, reachable=reached))
        return found

    def stop_runs(self, record):
        self._look()
        for w in self.box.works:
            if w.path in record.state.runs and w.over > self.sim.t and w.asked is None and self.reaches(w.box):
                w.asked = self.sim.t
                self.sim.say(f"{w.path} is asked to end")

    def bring_home(self, record):
        self._look()
        for w in self.box.works:
            if w.path in record.state.runs and w.home_at is None and w.coming is None:
                w.coming = w.seen = self.sim.t
                self.sim.say(f"{w.path} is on its way home")

    def idle(self, record) -> float | None:
        "Seconds for which nobody needed the box, as far as this guard could see."
        now = self.sim.t
        if not self.reaches(record.state.current): return None
        busy = [self.since, *(min(now, w.over) for w in self.box.works if w.begins <= now), *(min(now, b) for a, b in self.box.used.pairs if a <= now)]
        return now - max(busy)

    def owner_alive(self, record) -> bool:
        if self.own: return True
        return self.owner is not None and self.owner.alive

    def say(self, text: str):
        self.log.append((self.sim.t - EPOCH, text))
        self.sim.say(f"said: {text}")

    def forget(self, record):
        self.forgotten += 1
