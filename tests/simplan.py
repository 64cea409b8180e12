"""Random schedules of what can go wrong with a rented machine, as plain dicts that can be printed, run again, and made smaller."""

import random

from nanogpt_nb.remote.rehearsal_stock import offers

TYPES = {name: offers()[name]["price_cents_per_hour"] for name in ("gpu_1x_a10", "gpu_1x_h100_pcie", "gpu_8x_h100_sxm5")}
OPS = ("launch", "terminate", "list", "get", "rename", "any")


def plan(seed: int) -> dict:
    "A schedule: seconds from the beginning, unless a name says otherwise."
    r = random.Random(seed)
    hours = r.choice([0.25, 0.4, 0.7, 1.0, 2.0])
    type = r.choice(list(TYPES))
    cents = TYPES[type]
    budget = round(cents / 100 * hours * r.choice([0.5, 0.8, 1.5, 3.0]), 2)
    budget = max(budget, round(cents / 100 * 0.15, 2))
    lasts = min(hours, budget * 100 / cents) * 3600
    boot = r.choice([60, 180, 300, 600])
    end = boot + lasts  # about when the money is spent
    some = lambda chance: r.random() < chance
    when = lambda most=1.3: round(r.uniform(0, end * most), 1)
    spans = lambda chance, longest: [(t, t + r.choice([20, 120, 600, longest]) * r.uniform(0.3, 1)) for t in [when() for _ in range(r.randint(1, 2))]] if some(chance) else []
    jumps = lambda: [(when(), r.choice([-86400, -3600, -90, 90, 3600, 86400])) for _ in range(r.randint(1, 2))] if some(0.2) else []
    p: dict = dict(seed=seed, type=type, cents=cents, boot=boot,
             terms=dict(budget=budget, hours=hours, idle=r.choice([0, 5, 20]), grace=r.choice([1, 5, 15]), keep=r.choice([2, 6, 10]), boot=r.choice([12, 20, 30])))
    p["laptop"] = dict(wrong=r.choice([0, 0, 0, -7200, 5000, 40]), jumps=jumps(), asleep=spans(0.25, 2 * end), offline=spans(0.3, 2 * end), counts_sleep=some(0.7))
    p["other"] = dict(wrong=r.choice([0, 0, 0, -7200, 5000, 86400]), jumps=jumps())
    p["outages"] = spans(0.3, end)
    p["used"] = spans(0.2, end)
    p["runs"] = [dict(after=round(r.uniform(5, r.choice([60, 250, lasts * 0.4])), 1), takes=round(r.uniform(10, lasts * 1.2), 1), size=r.choice([1, 10, 60, 200])) for _ in range(r.choice([0, 1, 1, 2]))]
    p["owner"] = dict(leaves=r.choice([None, None, "runs", "runs", when(1.0)]), tries=r.choice([1, 3, 3]), every=r.choice([5, 20, 60]), left=some(0.15))
    p["kills"] = [dict(who=r.choice(["owner", "guardian", "ticker", "gc"]), at=when(), lines=r.choice([0, r.randint(1, 60), r.randint(1, 2000)]), torn=some(0.3)) for _ in range(r.choice([0, 0, 0, 1, 1, 2]))]
    if some(0.15): p["kills"].append(dict(who="owner", at=round(r.uniform(0, r.choice([3, boot * 1.2])), 1), lines=r.randint(1, 400), torn=some(0.2)))
    if some(0.15): p["kills"].append(dict(who=r.choice(["owner", "guardian", "ticker"]), at=when(), lines=r.randint(1, 2000), torn=False, stall=r.choice([3, 60, 1200])))
    p["full"] = spans(0.05, end)
    p["guardian"] = dict(off=some(0.08), back=r.choice([None, None, 5.0, 600.0, 3 * 3600.0]))  # seconds after its death; None: nobody starts it again
    p["restart"] = dict(at=when(), login=r.choice([60, 3600, 12 * 3600]), comes_back=some(0.7)) if some(0.12) else None
    p["extend"] = [dict(at=when(0.95), budget=budget * r.choice([1, 1.5, 2]), hours=hours * r.choice([1, 1.5, 2])) for _ in range(r.choice([0, 0, 0, 1, 2]))]
    p["end"] = when(1.0) if some(0.08) else None  # `end` is asked for from elsewhere
    p["gc"] = sorted(when(2.5) for _ in range(r.randint(1, 3))) if some(0.5) else []
    p["box_guard"] = some(0.15)
    p["wire"] = [dict(op=r.choice(OPS), kind=r.choice(["refused", "lost", "lost after", "502", "502 after", "500", "429", "429 wait", "garbage", "garbage after", "401", "late"]), late=r.uniform(3, 10), at=when(), times=r.choice([1, 1, 2, 5, 20]), lasts=r.choice([60, 600, end])) for _ in range(r.choice([0, 0, 0, 1, 2, 4]))]
    if some(0.15): p["wire"].append(dict(op="launch", kind=r.choice(["refused", "lost", "lost after", "502", "502 after", "garbage after", "429", "late"]), late=r.choice([r.uniform(3, 10), r.uniform(3, 300)]), at=0, times=1, lasts=end))
    if some(0.3): p["wire"].append(dict(op="terminate", kind=r.choice(["refused", "lost", "lost after", "502", "502 after", "garbage after", "429"]), at=0, times=r.choice([1, 3, 10]), lasts=3 * end))
    p["service"] = [dict(kind=k, times=r.choice([1, 1, 2, 4]), at=when(1.0)) for k in r.sample(["no capacity", "no take", "unhealthy", "no boot", "vanish", "late address", "lag", "odd"], r.choice([0, 0, 0, 1, 1, 2]))]
    return p


def quiet(**changes) -> dict:
    "An H100 for five dollars, three hours at most, and a run of an hour on it; nothing goes wrong but what `changes` say."
    p = dict(seed=1, type="gpu_1x_h100_pcie", cents=TYPES["gpu_1x_h100_pcie"], boot=180, terms=dict(budget=5, hours=3, idle=20, grace=5, keep=6, boot=30),
             outages=[], used=[], runs=[dict(after=60, takes=3600, size=20)], owner=dict(leaves=None, tries=3, every=5, left=False), kills=[], extend=[], gc=[], wire=[], service=[], full=[])
    return p | {k: dict(v) if isinstance(v, dict) else v for k, v in BENIGN.items()} | changes


BENIGN = dict(laptop=dict(wrong=0, jumps=[], asleep=[], offline=[], counts_sleep=True), other=dict(wrong=0, jumps=[]), guardian=dict(off=False, back=None), restart=None, end=None, box_guard=False)


def smaller(p: dict):
    "Schedules like `p` in which one thing less goes wrong."
    for name in ("wire", "service", "kills", "outages", "full", "used", "runs", "extend", "gc"):
        for i in range(len(p[name])): yield p | {name: p[name][:i] + p[name][i + 1:]}
    for name, nothing in BENIGN.items():
        if p[name] != nothing: yield p | {name: nothing}
    for name in ("laptop", "other"):
        for k, v in BENIGN[name].items():
            if p[name][k] != v: yield p | {name: p[name] | {k: v}}
    for i, k in enumerate(p["kills"]):
        if k["lines"]: yield p | dict(kills=[*p["kills"][:i], k | dict(lines=0), *p["kills"][i + 1:]])
        if k["torn"]: yield p | dict(kills=[*p["kills"][:i], k | dict(torn=False), *p["kills"][i + 1:]])
    for i, w in enumerate(p["wire"]):
        if w["times"] > 1: yield p | dict(wire=[*p["wire"][:i], w | dict(times=1), *p["wire"][i + 1:]])


def shrink(p: dict, fails, tries: int = 200) -> dict:
    "The smallest schedule found that still fails."
    while tries > 0:
        for q in smaller(p):
            tries -= 1
            if fails(q):
                p = q
                break
            if tries <= 0: return p
        else: return p
    return p
