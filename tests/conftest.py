"""Failures name the notebook to open; `gpu` tests skip without CUDA; kernels meet fresh numbers and poisoned memory."""

import os
import secrets

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


@pytest.fixture(autouse=True)
def kernels_meet_fresh_numbers_and_poisoned_memory(request: pytest.FixtureRequest):
    """In test_kernels_*.py: a new seed for each test, which a failure shows, or that of SEED; NaN in new memory.

    Tests marked `gpu` are not poisoned, since what poisons also changes which of torch's kernels run."""
    if not request.path.name.startswith("test_kernels_"):
        yield
        return
    import torch

    seed = int(os.environ.get("SEED") or secrets.randbits(32))
    print(f"to see these numbers again: SEED={seed}")
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(request.node.get_closest_marker("gpu") is None, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def unwritten(monkeypatch: pytest.MonkeyPatch):
    """New tensors are left as they are: one of more than 2^31 elements takes memory only where it is used."""
    import torch

    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


@pytest.fixture
def only_program(monkeypatch: pytest.MonkeyPatch):
    """Have the interpreter run this program in place of any: the last one of a grid that would take hours."""
    from pithtrain.kernels.lang import INTERPRETED

    if not INTERPRETED:
        pytest.skip("needs Triton's interpreter")
    from triton.runtime.interpreter import interpreter_builder as builder

    return lambda number: monkeypatch.setattr(
        builder, "set_grid_idx", lambda *_: setattr(builder, "grid_idx", (number, 0, 0))
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
