from absl.flags import FlagHolder
from ml_collections import ConfigDict

def DEFINE_config_file(
    name: str,
    default: str | None = None,
    help_string: str = ...,
    *,
    lock_config: bool = True,
) -> FlagHolder[ConfigDict]: ...
