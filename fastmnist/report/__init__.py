"""What a run shows: progress while it goes on, then pictures and one HTML page."""
