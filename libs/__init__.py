"""DiM: the backbone, its operators, samplers and training, as plain modules."""

import os

# Threads of torch's CPU operators sleep between them: spinning made a training step of the digits
# config 9 times as slow on two busy cores (700 ms). libgomp reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
