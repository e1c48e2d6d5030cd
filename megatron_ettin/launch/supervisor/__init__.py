"""What stands in a batch job between SLURM and `srun ettin train`: it checks the nodes, passes SLURM's warnings on,
ends what hangs, starts again what failed, requeues what was saved, and tells at the end whose fault it was.

It runs on the first node, outside of any container, by whatever Python that has: standard library alone, the syntax of
Python 3.6. `ettin launch` copies this folder beside the run (`python3 RUN/slurm/supervisor ...`), so that a job of
weeks does not change under an upgrade; `python -m megatron_ettin.launch.supervisor ...` is the same."""
