"""What holds for every test: one thread for tensors this small, and no deadlines on a machine that may be busy."""

import torch
from hypothesis import settings

torch.set_num_threads(1)  # two threads on two busy cores wait for each other: seven times slower on these models
settings.register_profile("kvloom", deadline=None)
settings.load_profile("kvloom")
