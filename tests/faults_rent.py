"Rent again and again from a service with faults at random, on a clock of its own: python tests/faults_rent.py ROUNDS SEED"

import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from test_rent import at_random

if __name__ == "__main__":
    rounds, seed = int(sys.argv[1]), int(sys.argv[2])
    ends = Counter()
    for n in range(seed, seed + rounds):
        with tempfile.TemporaryDirectory() as folder:
            os.environ.update(HOME=folder, NANOGPT_NB_DATA=f"{folder}/data")
            try:
                ends[at_random(Path(folder), n)] += 1
            except BaseException:
                print(f"seed {n}")
                raise
    print(rounds, "rounds:", dict(ends.most_common()))
