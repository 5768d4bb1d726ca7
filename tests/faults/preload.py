"""What the processes of a cluster have in common, loaded once in the server that they are forked from."""

import eplb_plugin as eplb
from eplb_plugin.integration import torch_moe

__all__ = ["torch_moe"]

eplb.warmup()
