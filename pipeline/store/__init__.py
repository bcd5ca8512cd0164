"""Bytes, files, shards and tables on any fsspec store."""
