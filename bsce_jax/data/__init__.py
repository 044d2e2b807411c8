"""Images in: random-access sources, the batch plan, and compiled augmentation."""
