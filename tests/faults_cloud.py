"""Launches under random faults, by hand: python tests/faults_cloud.py ROUNDS SEED. The fast twin is in test_lambda.py.

Each round launches once through up to six faults. There is at most one instance, and the client's word on it is true.
"""

import collections
import random
import sys

from test_lambda import KINDS, ready

from nanogpt_nb.remote.cloud import CloudError
from nanogpt_nb.remote.rehearsal_machine import Fault


def one(seed: int) -> str:
    "The outcome of a launch: its id, unsure, or why not."
    chance = random.Random(seed)
    cloud, service, type, region = ready()
    for _ in range(chance.randint(0, 6)):
        match = chance.choice(["launch", "GET /instances$", "."])
        service.faults.append(
            Fault(match, chance.randint(1, 8), chance.choice(KINDS), status=chance.choice([500, 502, 503]), skip=chance.randint(0, 3))
        )
    try:
        id = cloud.launch(type, region, "laptop", "gpu")
        outcome = "made"
    except CloudError as e:
        id, outcome = None, e.__class__.__name__
    made = list(service.instances)
    assert len(made) <= 1, f"seed {seed}: {len(made)} instances"
    assert outcome == "Unsure" or made == ([id] if id else []), f"seed {seed}: {outcome}, and there is {made}"
    return outcome + (" (there was one)" if outcome == "Unsure" and made else "")


if __name__ == "__main__":
    rounds, seed = int(sys.argv[1]), int(sys.argv[2])
    for outcome, n in collections.Counter(one(seed + i) for i in range(rounds)).most_common():
        print(f"{n:7}  {outcome}")
