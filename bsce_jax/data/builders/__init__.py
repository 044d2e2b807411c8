"""tfds builders that need neither TensorFlow nor, once they have run, a network."""
