"""`python -m pipeline`, the same as `ratecluster`."""

from pipeline.cli.main import main

if __name__ == "__main__":
    main()
