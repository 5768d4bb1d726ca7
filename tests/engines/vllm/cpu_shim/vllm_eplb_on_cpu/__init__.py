"""Test only: the nine places where vLLM 0.32 keeps expert parallelism and EPLB from running on a CPU.

vLLM calls `register` in each of its processes. What it replaces is what touches an accelerator; planning,
moving weights and switching maps stay vLLM's own.
"""

import functools

from .device import on_cpu_platform, with_cpu_streams
from .experts import map_and_count, with_expert_map
from .groups import with_uneven_collectives
from .runner import with_eplb

__all__ = ["register"]


@functools.cache
def register() -> None:
    """Replace them, once in each process."""
    on_cpu_platform()
    with_cpu_streams()
    map_and_count()
    with_expert_map()
    with_uneven_collectives()
    with_eplb()
