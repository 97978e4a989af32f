"""Errors raised by the model. Bad settings raise ValueError from the configuration classes instead."""


class ModelInputError(ValueError):
    """A batch does not fit the model it was given to: shape, frame count, empty caption."""


class WeightsError(ValueError):
    """A state dict does not fit the model it was to be loaded into."""
