"""``megatron-opd doctor``: every check of a config and this machine that can be made before a run, each by itself."""
