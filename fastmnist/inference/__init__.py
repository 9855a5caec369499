"""Uses of a finished run: predictions, export, demo."""
