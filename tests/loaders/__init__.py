"""Programs that load a model as users' programs do, each in a process of its own: `python -m tests.loaders.NAME`.

Arguments: a directory of ordinary models, and directories in which mounts show the same. Each program loads in several
ways, from all of them, and says for each way and each mount whether it got what the ordinary directory gave.
"""
