"""Choose samples: near-duplicates, outliers, a balanced subset."""
