"""One `get_config()` a run; every number that a run can change lives here."""
