"""Shared by all tests: one Hypothesis profile. SAPO_EXAMPLES=1000 tries harder; in CI the examples are fixed."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile("sapo", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True,
                          max_examples=int(os.environ.get("SAPO_EXAMPLES", 50)),
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sapo")
