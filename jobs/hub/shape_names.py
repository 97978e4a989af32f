"""In place of jaxtyping: `Float[Tensor, "B N D"]` is Tensor, the shape is for the reader."""

from typing import Any


class _Shaped:
    def __class_getitem__(cls, parts: tuple[Any, str]) -> Any:
        return parts[0]


Bool = Float = Int = Int32 = Int64 = Shaped = UInt8 = _Shaped
