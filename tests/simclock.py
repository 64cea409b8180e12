"""A simulated world of machines and processes: one true time, many clocks, and whoever acts next is the one whose time has come.

Every process is a thread that runs only while it holds the baton, so a schedule with the same seed is the same to the last line.
"""

import heapq
import itertools
import random
import sys
import threading
import traceback

EPOCH = 1_800_000_000.0  # seconds; when every schedule begins, in true time
_HERE = threading.local()


class Killed(BaseException):
    "What ends a process at this very line."


class Spans:
    "Times in which something is so, as pairs of seconds from the beginning."

    def __init__(self, pairs=()):
        self.pairs: list[tuple[float, float]] = []
        for a, b in sorted((EPOCH + a, EPOCH + b) for a, b in pairs):
            if self.pairs and a <= self.pairs[-1][1]: self.pairs[-1] = (self.pairs[-1][0], max(b, self.pairs[-1][1]))
            else: self.pairs.append((a, b))

    def __contains__(self, t: float) -> bool:
        return any(a <= t < b for a, b in self.pairs)

    def end(self, t: float) -> float:
        "When the span around `t` ends; `t` itself outside of every span."
        return next((b for a, b in self.pairs if a <= t < b), t)

    def inside(self, a: float, b: float) -> float:
        "How many seconds of a..b lie in a span."
        return sum(max(0.0, min(b, y) - max(a, x)) for x, y in self.pairs)

    def __or__(self, other: "Spans") -> "Spans":
        return Spans((a - EPOCH, b - EPOCH) for a, b in [*self.pairs, *other.pairs])


class Machine:
    "A computer: its wall clock, when it sleeps, and when it has no network."

    def __init__(self, sim: "Sim", name: str, wrong: float = 0.0, jumps=(), asleep=(), offline=(), counts_sleep: bool = True):
        self.sim, self.name, self.wrong, self.counts_sleep = sim, name, wrong, counts_sleep
        self.jumps = [(EPOCH + t, by) for t, by in jumps]  # (when, seconds) that the wall clock leaps
        self.asleep, self.offline = Spans(asleep), Spans(offline)
        self.deaf = self.asleep | self.offline  # when nothing can be reached from it

    def wall(self) -> float:
        return self.sim.t + self.wrong + sum(by for t, by in self.jumps if t <= self.sim.t)

    def uptime(self) -> float:
        return 1000 + self.sim.t - EPOCH - (0 if self.counts_sleep else self.asleep.inside(EPOCH, self.sim.t))

    def after(self, seconds: float) -> float:
        "The true time at which a pause of `seconds` that begins now is over; a machine that sleeps does not notice."
        until = self.sim.t + max(seconds, 0.0)
        if not self.counts_sleep:  # such a machine's timers stand still meanwhile
            for a, b in self.asleep.pairs:
                if a >= self.sim.t and a < until: until += b - a
        return self.asleep.end(until)


class MachineClock:
    "The clock of a process, as the machine under it tells the time."

    simulated = True

    def __init__(self, sim: "Sim", machine: Machine):
        self.sim, self.machine = sim, machine

    def time(self) -> float:
        return self.machine.wall()

    def monotonic(self) -> float:
        return self.machine.uptime()

    def sleep(self, seconds: float):
        self.sim.pause(seconds)


class TrueClock:
    "The clock of the service, which is never wrong."

    simulated = True

    def __init__(self, sim: "Sim"):
        self.sim = sim

    def time(self) -> float:
        return self.sim.t

    def monotonic(self) -> float:
        return self.sim.t - EPOCH

    def sleep(self, seconds: float):
        raise AssertionError("the service waits for nobody")


class Process:
    "Something that runs on a machine until it is done or killed."

    def __init__(self, sim: "Sim", name: str, machine: Machine, work):
        self.sim, self.name, self.machine, self.work = sim, name, machine, work
        self.began, self.died, self.error = sim.t, None, None
        self.doomed = False  # it may do nothing any more
        self.lines_left = None  # lines of the traced modules until it dies
        self.stood = []  # when it stood still, as true times
        self.frozen = 0.0  # until when it stands still
        self.stall = None  # seconds to stand still then, instead of dying
        self.with_it = []  # threads of the same process, which die with it
        self.napping = False  # it may be woken before its time
        self.ticket = 0  # counts its pauses, so that one that was cut short wakes nobody later
        self.baton = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    @property
    def alive(self) -> bool:
        return self.died is None

    def _run(self):
        self.baton.acquire()
        _HERE.process = self
        try:
            self.check()
            self.work()
        except Killed: pass
        except BaseException as e:  # looked at by whoever runs the schedule
            self.error = e
        finally:
            sys.settrace(None)
            self.died = self.sim.t if self.died is None else self.died
            self.sim.main.release()

    def check(self):
        if self.doomed: raise Killed(self.name)

    def kill(self):
        "End it where it stands: it does not do another thing."
        if not self.alive: return
        self.doomed, self.died = True, self.sim.t
        if here() is not self: self.sim.wake(self, self.sim.t)  # what it holds (locks) is free at once
        for other in self.with_it: other.kill()

    def kill_in(self, lines: int):
        "End it when it has run so many more lines of the traced modules."
        self.lines_left = lines

    def stall_in(self, lines: int, seconds: float):
        "Have it stand still for `seconds` when it has run so many more lines of the traced modules."
        self.lines_left, self.stall = lines, seconds

    def arm(self):
        "Watch the lines of this thread, those of calls under way too."
        if self.lines_left is None or sys.gettrace(): return
        sys.settrace(self._call)
        frame = sys._getframe(1)
        while frame:
            if frame.f_code.co_filename in self.sim.traced: frame.f_trace = self._line
            frame = frame.f_back

    def _call(self, frame, event, arg):
        return self._line if frame.f_code.co_filename in self.sim.traced else None

    def _line(self, frame, event, arg):
        if event == "line" and not self.doomed and self.lines_left is not None:
            self.lines_left -= 1
            if self.lines_left <= 0 and self.stall:
                seconds, self.stall, self.lines_left = self.stall, None, None
                sys.settrace(None)
                frame.f_trace = None
                self.sim.say(f"{self.name} stands still at {frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno} for {seconds:.0f} s")
                until = self.machine.asleep.end(self.sim.t + seconds)  # in true time: the world does not wait
                for other in (self, *self.with_it): other.stood.append((self.sim.t, until))  # all its threads
                for other in self.with_it: other.frozen = until + 0.001  # what this one holds, it holds until then
                self.sim.stand(until)
            elif self.lines_left <= 0:
                self.sim.say(f"{self.name} killed at {frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}")
                self.kill()
                raise Killed(self.name)
        return self._line


def here() -> "Process | None":
    "The process that runs now."
    return getattr(_HERE, "process", None)


class Sim:
    "The true time, what is to come, and a log of what was."

    def __init__(self, seed: int, traced=()):
        self.random, self.t, self.traced = random.Random(seed), EPOCH, set(traced)
        self.main, self.queue, self.count = threading.Semaphore(0), [], itertools.count()
        self.processes: list[Process] = []
        self.log: list[str] = []

    def say(self, text: str):
        self.log.append(f"{self.t - EPOCH:9.1f}  {text}")

    def at(self, when: float, act):
        "Call `act` at the true time `when`; of several at one time, any may come first."
        heapq.heappush(self.queue, (max(when, self.t), self.random.random(), next(self.count), act))

    def start(self, name: str, machine: Machine, work) -> Process:
        "A new process on `machine`."
        p = Process(self, name, machine, work)
        self.processes.append(p)
        self.wake(p, machine.asleep.end(self.t))
        return p

    def wake(self, p: Process, when: float):
        "Give `p` the baton at the true time `when`, unless it was woken before."
        p.ticket += 1
        ticket = p.ticket
        self.at(when, lambda: None if p.ticket != ticket else self.give(p) if self.t >= p.frozen or p.doomed else self.wake(p, p.frozen))

    def give(self, p: Process):
        p.ticket += 1
        p.baton.release()
        if not self.main.acquire(timeout=120): raise RuntimeError(f"{p.name} does not pause:\n" + "".join(traceback.format_stack(sys._current_frames()[p.thread.ident])))

    def pause(self, seconds: float):
        "Let the others act for so long, as the machine counts; only inside a process."
        p = here()
        if p is None: raise AssertionError("only a process can pause")
        self._until(p, p.machine.after(seconds))

    def stand(self, until: float):
        "Let the others act until the true time `until`."
        self._until(here(), until)

    def _until(self, p: Process, when: float):
        p.check()
        self.wake(p, when)
        self.main.release()
        p.baton.acquire()
        p.check()
        p.arm()

    def nap(self, seconds: float):
        "Pause, but no longer than until somebody calls `rouse`."
        p = here()
        p.napping = True
        try: self.pause(seconds)
        finally: p.napping = False

    def rouse(self, machine: Machine, after: float = 0.25):
        "Wake who naps on `machine`."
        for p in self.processes:
            if p.napping and p.alive and p.machine is machine and p is not here(): self.wake(p, machine.after(after))

    def run(self, until: float):
        "Let happen what comes until the true time `until`."
        while self.queue and self.queue[0][0] <= until:
            self.t, *_, act = heapq.heappop(self.queue)
            act()
        self.t = max(self.t, until)

    def close(self):
        "End every process that is left, so that no thread stays."
        for p in self.processes: p.kill()
        while any(p.thread.is_alive() for p in self.processes):
            if not self.queue: break
            self.t, *_, act = heapq.heappop(self.queue)
            act()
        for p in self.processes: p.thread.join(5)
