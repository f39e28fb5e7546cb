"""Shared by all tests: one Hypothesis profile, and one thread. SAPO_EXAMPLES=1000 tries harder."""

import os

import torch
from hypothesis import HealthCheck, settings

settings.register_profile("sapo", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True,
                          max_examples=int(os.environ.get("SAPO_EXAMPLES", 50)),
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sapo")

torch.set_num_threads(1)  # tiny matrices gain nothing from a second thread, and lose much on a busy machine
