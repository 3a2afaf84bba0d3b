"""Source shards: making them, reading them, their integrity, their captions."""
