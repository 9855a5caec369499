"""Source to compiled file."""
