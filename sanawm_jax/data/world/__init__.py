"""A procedural world with exact geometry: scenes, camera paths, captions and rendered clips."""
