"""What the service answers, field by field: the schemas of its OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, Field

TWO = Field(min_length=2, max_length=2)
Size: TypeAlias = Annotated[list[int], TWO]
Range: TypeAlias = Annotated[list[float], TWO]


class Answer(BaseModel):
    """What the run says of an image."""

    score: float = Field(description="The larger the more anomalous.")
    label: int | None = Field(
        description="1 if the score exceeds the threshold, else 0; null without a threshold."
    )
    p_value: float | None = Field(
        description="How rare such a score is among normal images, in (0, 1]; null if training held none out."
    )
    threshold: float | None = Field(
        description="Scores above it are labelled 1; null if the run has none."
    )
    pixel_threshold: float | None = Field(
        description="Values of the anomaly map above it make the mask; null if the run has none."
    )
    run: str = Field(description="Name of the run.")
    version: str = Field(description="Version of msflow_ext.")
    image_size: Size = Field(description="Width and height of the image, in pixels.")
    map_size: Size = Field(
        description="Width and height of mask, heat_map and image, in pixels. Stretched to image_size they lie over "
        "the image."
    )
    colour_range: Range = Field(
        description="Values of the anomaly map at the dark and at the yellow end of heat_map's colours."
    )
    mask: str | None = Field(
        description="PNG in base64, white where anomalous; null without a pixel threshold."
    )
    heat_map: str = Field(
        description="PNG in base64: the map as colour over the image, the mask outlined."
    )
    image: str | None = Field(
        default=None, description="PNG in base64 of what the model saw, if asked for, else null."
    )


class Refused(BaseModel):
    """Why there is no answer."""

    error: str = Field(description="One sentence.")


class Health(BaseModel):
    """A sign of life."""

    status: str = Field(description="ok")


#: The body of ``POST /predict``, which FastAPI does not read.
IMAGE: dict[str, Any] = {
    "required": True,
    "description": "One image file: PNG, JPEG, BMP, TIFF or WEBP.",
    "content": {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"image": {"type": "string", "format": "binary"}},
                "required": ["image"],
            }
        },
    },
}

_REASONS = {
    400: "The body is no image, or too small a one.",
    401: "The token is missing or wrong.",
    403: "Host or Origin is not a name of the service.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    422: "A parameter is wrong.",
    500: "The image could not be scored.",
    503: "Too many images at once.",
    504: "The image was not scored in time.",
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a path, for the document."""
    return {
        status: {"model": Refused, "description": _REASONS[status]} for status in sorted(statuses)
    }


def text(kind: str) -> dict[int | str, dict[str, Any]]:
    """An answer that is a text of some kind, for the document; its path has ``response_class=Response``."""
    content = {f"text/{kind}": {"schema": {"type": "string"}}}
    return {200: {"description": "Answered.", "content": content}}
