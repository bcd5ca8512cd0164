"""Before a run: pack images into shards, write a configuration."""
