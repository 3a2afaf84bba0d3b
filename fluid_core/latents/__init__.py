"""The encoded data set: plain Parquet files, a ledger of commits, and one manifest (docs/encoding.md)."""
