"""From the bigram model to a full GPT, in notebooks."""

__version__ = "0.1.0"

import os

# How long a thread that waits for another one spins before it sleeps. The default is so long that training becomes
# several times slower as soon as another program uses the cores too. It has to be said before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
