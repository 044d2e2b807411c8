"""Results of runs: the file each run writes, and tables and figures made from it.

`results` documents, reads and writes WORKDIR/results.json, `tables` and `plots` read
nothing else, and `python -m bsce_jax.report WORKDIR...` does it all. `plots` is not
imported here: Matplotlib is slow to load, and a run needs it only at its end.
"""

from bsce_jax.report import results, tables

__all__ = ["results", "tables"]
