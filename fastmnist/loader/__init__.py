"""Compiled file to batches on the device."""
