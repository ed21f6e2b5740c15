"""What stays on disk: runs, who works on them, where their weights are from."""
