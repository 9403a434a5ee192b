"""Growth of checkpoints on disk, from shards to shards."""
