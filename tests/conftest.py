"""Shared by all tests: one Hypothesis profile, one thread, and models that are made once.

SAPO_EXAMPLES=1000 tries harder.
"""

import functools
import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "sapo",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
    max_examples=int(os.environ.get("SAPO_EXAMPLES", 50)),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("sapo")

torch.set_num_threads(1)  # tiny matrices gain nothing from a second thread, and lose much if busy


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """One folder of runs for all files, so that all of them share one warm start (ten seconds)."""
    import small_runs  # not above: the algorithm's own tests need neither models nor environments

    import tiny
    import train

    folder = tmp_path_factory.mktemp("runs")
    settings, _ = train.parse([*small_runs.TASK, "--runs", str(folder)])
    tiny.cached_warm_start(train.make_env(settings).unwrapped.task, settings)
    return folder


@pytest.fixture(scope="session")
def sharp_folder(tmp_path_factory):
    """The tiny model with a sharp head, on disk. Not to be changed."""
    from tiny_models import build_sharp

    return build_sharp(tmp_path_factory.mktemp("sharp"))


@pytest.fixture(scope="session")
def sharp(sharp_folder):
    """The same, opened. Not to be changed."""
    import vlm

    return vlm.load(sharp_folder)


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """The tiny model with a sharp head and byte-level BPE, opened. Not to be changed."""
    from tiny_models import build_sharp_bpe

    import vlm

    return vlm.load(build_sharp_bpe(tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory):
    """A function: name of a family -> the folder of its small checkpoint, built once."""
    from families import build

    @functools.cache
    def folder(family):
        return build(family, tmp_path_factory.mktemp(family))

    return folder


@pytest.fixture
def open_family(monkeypatch, family_folder):
    """A function: name of a family -> its checkpoint, as vlm.load opens it.

    Without torchvision a Qwen-VL loses its video half, which nothing here uses, for the whole test.
    """
    import families

    import vlm

    def opened(family, **kwargs):
        if not families.can_open(family):
            if family == "smolvlm2":
                pytest.skip("SmolVLM2's processor needs torchvision and num2words: not installed")
            pictures_only = SimpleNamespace(from_pretrained=families.without_videos)
            monkeypatch.setattr(vlm, "AutoProcessor", pictures_only)
        return vlm.load(family_folder(family), **kwargs)

    return opened


@pytest.fixture(params=range(12), ids=lambda seed: f"batch{seed}")
def batch(request):
    """Random responses of every kind, for the tests that hold sapo.py against plain loops."""
    from plain_loops import random_batch

    return random_batch(request.param)


@pytest.fixture(scope="module")
def dataset_cache(tmp_path_factory):
    """For tests of data sets: nothing goes into the user's cache of them, and no process that
    grades answers outlives the file of tests."""
    datasets = pytest.importorskip("datasets", reason="needs: pip install datasets")
    from tasks import grading

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield
    grading._MATH_VERIFY.close()


@pytest.fixture
def offline(monkeypatch):
    """Whoever tries to reach the network fails, with what was called; also where the error is
    swallowed, as a library may do that reports its use. (Seen is what Python's sockets do, in this
    process.)"""
    tried = []

    def refusal(name):
        def refused(*arguments, **named):
            tried.append(f"{name}{arguments}")
            raise AssertionError(f"the network was reached for: {tried[-1]}")

        return refused

    for name in (
        *("socket.socket.connect", "socket.socket.connect_ex", "socket.create_connection"),
        *("socket.getaddrinfo", "socket.gethostbyname"),
    ):
        monkeypatch.setattr(name, refusal(name))
    yield
    assert not tried, f"the network was reached for: {tried}"
