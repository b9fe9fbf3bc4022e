"""`python -m tvm_sparse.tune`: searches the schedules of a model's kernels on the machine that will run them."""
