"""Supervise `srun ettin train` in a batch job: check nodes, forward signals, restart, requeue, name the failed rank.

It runs on the first node, outside of any container, on whatever Python that node has: standard library only, the syntax
of Python 3.6. `ettin launch` copies this folder into the run (`python3 RUN/slurm/supervisor ...`), so that an upgrade
does not change a job of weeks; `python -m megatron_ettin.launch.supervisor ...` is the same.
"""
