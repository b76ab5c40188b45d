"""What lasts: files, folders and S3 behind one interface, artifacts, shards of records, checkpoints."""
