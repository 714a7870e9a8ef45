"""Fixtures shared by the tests. Every test runs on a CPU, with no network and no public weights."""
import os
import sys

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a missing file must be an error at once, not a time-out
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # a worker a core: more threads would only wait for each other
if "effect" not in sys.argv:  # trainings take three times as long in it
    os.environ.setdefault("MKL_CBWR", "COMPATIBLE")  # see tests/oracles.py

import torch  # noqa: E402


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)


@pytest.fixture
def message():
    """call -> the one-line message of the UserError that it must raise."""
    from common import UserError, release_folders

    def run(call, *args, **kw):
        with pytest.raises(UserError) as e:
            call(*args, **kw)
        release_folders()  # as run_command() does
        text = str(e.value)
        assert text and "\n" not in text
        return text
    return run


@pytest.fixture(scope="session")
def shelf():
    """{base: (folder, tensors)} of the small public files that tests have written so far."""
    return {}


@pytest.fixture
def public(monkeypatch, shelf, tmp_path_factory):
    """name -> (folder with the public files of that base at small width, the tensors in them)."""
    import hub

    def get(name):
        hub.small(monkeypatch, name)
        if name not in shelf:
            folder = tmp_path_factory.mktemp(name)
            shelf[name] = str(folder), hub.publish(folder, name)
        return shelf[name]
    return get
