"""What is bundled: pico-clip, sample shards, word lists. Each folder says where it is from."""
