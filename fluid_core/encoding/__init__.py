"""Image-text shards to an encoded data set: Ray Data schedules, the shard ledger decides what is done (docs/encoding.md)."""
