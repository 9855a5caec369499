"""Measurements: the doctor, the tuner and the comparison of loaders."""
