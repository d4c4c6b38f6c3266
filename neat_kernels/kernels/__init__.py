"""Triton kernels, one stage of the equations a file; they know no autograd, no module and no environment variable."""
