from absl.flags import FlagHolder, FlagValues
from ml_collections import ConfigDict

def DEFINE_config_file(
    name: str,
    default: str | None = None,
    help_string: str = ...,
    flag_values: FlagValues = ...,
    *,
    sys_argv: list[str] | None = None,
    lock_config: bool = True,
) -> FlagHolder[ConfigDict]: ...
