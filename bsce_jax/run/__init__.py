"""A run: the only modules that know its configuration and its devices."""
