"""The configuration of a saved run or step, as it was in effect then."""

from typing import Any

from stablelm.config.keys import assemble, keys, values
from stablelm.config.load import loads, typed
from stablelm.config.schema import Config


def in_effect(config_yaml: str, identity: dict[str, Any], name: str) -> Config:
    """What a saved `config.yaml` asked for, with what its derived keys became for the run with this identity.

    Nothing is derived again, because another release or launcher may derive it differently. Keys that are not part of
    an identity, such as `train.micro_batch_size` and `checkpoint.dir`, stay None, and paths are as they were asked.
    `name` stands for the file in messages. Raises ConfigError if the text is no configuration, or the identity does not
    fit its keys.
    """
    asked = values(loads(config_yaml, name))
    became = {
        key: value
        for key, value in identity.items()
        if key in keys() and keys()[key].identity and asked[key] is None and value is not None
    }
    return assemble(asked | typed(became, f"the identity beside {name}"))
