"""Foundations: console progress, statistics, the environment, and the machine with its devices."""
