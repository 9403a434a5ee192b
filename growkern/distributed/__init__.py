"""Models that several processes hold in parts: boxes, collectives, and what growth needs of ``fully_shard``."""
