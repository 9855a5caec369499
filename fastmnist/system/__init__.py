"""What everything else stands on: console progress, statistics, the machine and its devices."""
