"""From URLs to batches: storage, formats, shards, order, packing, workers."""
