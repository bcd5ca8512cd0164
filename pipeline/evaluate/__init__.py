"""Compare a run with ground truth labels. Only this package and the report read labels."""
