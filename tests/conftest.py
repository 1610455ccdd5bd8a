"""Failures name the notebook to open; `gpu` tests skip without CUDA; CI draws the same random cases each time."""

import os

import pytest
from hypothesis import settings

from pithtrain.traceback import notebook_of

settings.register_profile("busy", deadline=None)  # no case fails because its machine is busy
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "busy")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.failed and call.excinfo is not None and (found := notebook_of(call.excinfo.tb)):
        report.sections.append((f"notebook: {found}", ""))
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
