"""Stage 2: train the network that makes clusters visible."""
