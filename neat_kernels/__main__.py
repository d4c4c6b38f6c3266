"""`python -m neat_kernels` is the `neat-kernels` command."""

from neat_kernels.cli import main

if __name__ == "__main__":
    main()
