"""What a finished run is good for: predictions, export, demo."""
