"""IL-Baseline (Jodelet et al., section 3.1) has no procedure beyond its losses."""
