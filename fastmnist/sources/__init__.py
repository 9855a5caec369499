"""Sources of images: IDX files, downloads, embedded digits."""
