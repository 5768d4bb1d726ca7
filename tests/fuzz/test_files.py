"""Damaged, forged and absurd files: whatever is in them, they are read or refused in one line."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_plugin.formats.loads import read_trace

from .effort import effort
from .parsers import PARSERS, is_told, odd


@pytest.mark.parametrize("name", PARSERS)
def test_what_the_fuzzing_starts_from_is_accepted(name, tmp_path):
    for index, start in enumerate(PARSERS[name].starts):
        assert not PARSERS[name](start, tmp_path / str(index))


@pytest.mark.parametrize("name", PARSERS)
@effort(120)
@given(seed=st.integers(0, 2**32))
def test_small_changes(name, tmp_path, seed):
    PARSERS[name](odd(PARSERS[name], random.Random(seed)), tmp_path)


@pytest.mark.parametrize("name", PARSERS)
@effort(10)
@given(content=st.binary(max_size=200))
def test_anything(name, tmp_path, content):
    PARSERS[name](content, tmp_path)


KEYS = [
    "load_history",
    "logical_expert_load",
    "physical_to_logical_map",
    "format",
    "num_logical",
    "num_ranks",
    "num_nodes",
    "num_groups",
    "layer_ids",
    "physical_to_logical",
    "num_slots",
    "initial_global_assignments",
    "planner",
    "seed",
    "policies",
    "simulate",
    "eplb_plugin",
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just("eplb-plugin placement 1")
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner, max_size=5)
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("name", ["benchmark", "placement", "location", "config", "settings", "additional"])
@effort(60)
@given(value=VALUES)
def test_well_formed_nonsense(name, tmp_path, value):
    """JSON, which is YAML too."""
    PARSERS[name](json.dumps(value).encode(), tmp_path)


KINDS = ["b1", "i1", "u1", ">i2", "u8", "i8", "f2", "f4", ">f8", "f16", "c8", "U3", "S2", "M8[s]", "V4"]


@effort(60)
@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=5, max_size=5),
    kinds=st.lists(st.sampled_from(KINDS), min_size=5),
    fill=st.sampled_from([0, 1, 2, 250]),
    left_out=st.sets(st.sampled_from(["topk_ids", "request", "category", "num_experts", "load"])),
)
def test_arrays_of_any_kind(tmp_path, shapes, kinds, fill, left_out):
    names = ("topk_ids", "request", "category", "num_experts", "load")
    arrays = {
        name: np.frombuffer(bytes([fill]) * int(np.prod(shape) * np.dtype(kind).itemsize), kind).reshape(
            shape
        )
        for name, shape, kind in zip(names, shapes, kinds, strict=False)
        if name not in left_out
    }
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    is_told(lambda: read_trace(path))
