"""The images of a run: what lies on disk, transforms, order, samples."""
