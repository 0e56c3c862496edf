"""The asv suite: one module per operation, parameters always in the order backend, dtype, shape, threads.

`time_*` are for people. `track_*` are for comparing commits: our time over that of a plain pass over the same
memory (or over NumPy's, where the work is small), measured alternately, so that lower is better and a machine
that drifts leaves the series flat. Inputs are made once a process, in `common.py`; `limits.py` is the limit.
"""
