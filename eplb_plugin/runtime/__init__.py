"""The online loop over `torch.distributed`."""
