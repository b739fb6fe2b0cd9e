"""What a run leaves in its folder: checkpoints, metrics, manifest, progress; and weights read from files."""
