"""About a run: its status, what it will cost, whether its files are sound."""
