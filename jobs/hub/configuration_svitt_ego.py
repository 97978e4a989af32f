"""Settings of an exported model, for transformers' AutoConfig."""

from typing import Any

from transformers import PretrainedConfig


class SvittEgoConfig(PretrainedConfig):
    """`config` holds the settings of the model as `model.ModelConfig` writes them."""

    model_type = "svitt_ego"

    def __init__(self, config: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.config = config or {}
        super().__init__(**kwargs)
