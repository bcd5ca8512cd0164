"""After a run: search it, choose samples from it, export it, label new shards with it."""
