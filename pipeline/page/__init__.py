"""The report's page: what it shows, and how that looks."""
