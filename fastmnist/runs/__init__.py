"""Whole runs: train, speedrun, ladder."""
