"""This process and the others: joining, watching, folders, signals, settings."""
