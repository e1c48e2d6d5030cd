"""Supervise `srun ettin train` in a batch job: check nodes, forward signals, restart, requeue, name the failed rank.

It runs on the first node, outside of any container, with that node's Python. It therefore needs only the standard
library and the syntax of Python 3.6. `ettin launch` copies this folder into the run (`python3 RUN/slurm/supervisor
...`), so that an upgrade does not change a job that runs for weeks. `python -m megatron_ettin.launch.supervisor ...` is
the same program.
"""
