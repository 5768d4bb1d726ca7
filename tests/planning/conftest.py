"""Run the tests of planning with the compiled kernels and with the tensor version alike."""

from __future__ import annotations

import pytest

from eplb_plugin.planning import planner
from eplb_plugin.planning.tensors import packing


@pytest.fixture(params=["kernels", "tensors"], scope="module", autouse=True)
def backend(request):
    """Loads on the CPU are planned by the kernels; for `tensors` they are treated as those on a GPU are."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "tensors":
            for module in (packing, planner):
                patch.setattr(module, "use_kernels", lambda *_: False)
        yield request.param
