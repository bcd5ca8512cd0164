"""What a run will cost, estimated from a sample of its shards."""
