"""What a run will cost before it runs: memory, FLOPs and hours of each stage, from configurations alone."""
