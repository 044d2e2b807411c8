"""Results of runs: the file each run writes, and tables and figures made from it.

`results` documents, reads and writes WORKDIR/results.json, `tables` and `plots` read
nothing else, and `python -m bsce_jax.report WORKDIR...` does it all. Nothing is loaded
here: a command sees to its terminal first, and Matplotlib is slow to load.
"""
