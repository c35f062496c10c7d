"""A recurring billing worker: never charged twice, never lost, unknown never called failed."""
