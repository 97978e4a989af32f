"""In place of pydantic: settings that were checked before they were exported, so here they are only read."""

from collections.abc import Callable
from typing import Any, TypeVar

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

PositiveInt = int


def Field(default: Any = None, **_: Any) -> Any:  # noqa: N802, it is pydantic's name
    """The default alone."""
    return default


def model_validator(**_: Any) -> Callable[[FunctionT], FunctionT]:
    """Leaves the check as a method that nobody calls."""
    return lambda function: function


class BaseModel:
    """Fields from keyword arguments, their defaults from the class; a dict becomes the settings it is the fields of.

    Raises TypeError for a field that the class does not have.
    """

    def __init_subclass__(cls, **_: Any) -> None:
        super().__init_subclass__()

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            if not hasattr(type(self), name):
                raise TypeError(
                    f"{type(self).__name__} has no field {name}; code and config.json differ in age"
                )
            default = getattr(type(self), name)
            is_nested = isinstance(default, BaseModel) and isinstance(value, dict)
            setattr(self, name, type(default)(**value) if is_nested else value)
