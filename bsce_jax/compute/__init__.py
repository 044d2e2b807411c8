"""What gets compiled: state, steps, updates, optimisers, devices; no configuration."""
