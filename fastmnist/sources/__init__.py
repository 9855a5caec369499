"""Where images come from: IDX files, downloads, embedded digits."""
