"""Training and evaluation scripts of EDLM, each run with `python -m training.<name>`."""
