"""IL-Baseline (Jodelet et al., section 3.1) has no procedure beyond its losses."""

from bsce_jax.methods import About

ABOUT = About(
    title="IL-Baseline",
    head="linear",
    losses="cross-entropy, distillation (Eq. 2)",
    source="Jodelet et al.",
)
