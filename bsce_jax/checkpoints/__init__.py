"""What is kept of a run: numbered checkpoints with checksums."""
