"""What stands on disk and who works on it: artefacts, their owners and origins, processes, progress. Knows no model."""
