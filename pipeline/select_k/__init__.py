"""Stage 3: choose the number of clusters, assign every sample."""
