"""Images on disk to batches on the device: datasets, beton, order, kernels, loader."""
