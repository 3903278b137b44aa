"""The parts of train_segmentation.py: data, static shapes, compiled steps, scores and pictures."""
