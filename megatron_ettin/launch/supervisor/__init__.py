"""Supervise `srun ettin train` in a batch job: check nodes, forward signals, restart, requeue, name the failed rank.

It runs on the first node, outside of any container, with that node's Python. It therefore needs only the standard
library and the syntax of Python 3.6. `ettin launch` copies this folder to RUN/slurm/supervisor, and the job runs the
copy, so that an upgrade does not change a job of weeks. `python -m megatron_ettin.launch.supervisor` also runs it.
"""
