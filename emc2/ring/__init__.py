"""Blocks that travel over the devices while the data stay."""
