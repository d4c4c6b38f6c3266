"""The offline compile gate: kernels compiled as their host code launches them, on a machine without a GPU.

python -m benchmarks.gate --output FILE.json holds their machine code to what was meant.
"""
