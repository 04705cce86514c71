"""One `get_config()` per kind of run. All numbers that a run can change are defined here."""
