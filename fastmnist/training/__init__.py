"""Batches to a trained model: model, augment, precision, loop, checkpoint, evaluate."""
