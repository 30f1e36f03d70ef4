"""The answers of the service: the schemas of its OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, Field

TWO = Field(min_length=2, max_length=2)
Size: TypeAlias = Annotated[list[int], TWO]
Range: TypeAlias = Annotated[list[float], TWO]


class Answer(BaseModel):
    """The result of one image."""

    score: float = Field(description="Anomaly score; larger is more anomalous.")
    label: int | None = Field(
        description="1 if the score exceeds the threshold, else 0; null without a threshold."
    )
    p_value: float | None = Field(
        description="Conformal p-value of the score among normal images, in (0, 1]; null if training held out none."
    )
    threshold: float | None = Field(
        description="Images with a larger score have label 1; null if the run has none."
    )
    pixel_threshold: float | None = Field(
        description="Pixels with a larger map value form the mask; null if the run has none."
    )
    run: str = Field(description="Name of the run.")
    version: str = Field(description="Version of msflow_ext.")
    image_size: Size = Field(description="Width and height of the image, in pixels.")
    map_size: Size = Field(
        description="Width and height of mask, heat_map and image, in pixels. Stretched to image_size, they match "
        "the image."
    )
    colour_range: Range = Field(
        description="Map values at the dark and at the yellow end of the heat map's colors."
    )
    mask: str | None = Field(
        description="PNG in base64, white where anomalous; null without a pixel threshold."
    )
    heat_map: str = Field(
        description="PNG in base64: the map as colors over the image, with the outline of the mask."
    )
    image: str | None = Field(
        default=None, description="PNG in base64 of the model's input, with image=true; else null."
    )


class Refused(BaseModel):
    """The reason of a refusal."""

    error: str = Field(description="One sentence.")


class Health(BaseModel):
    """The health of the service."""

    status: str = Field(description="ok")


#: The body of ``POST /predict``. The service reads it itself, so FastAPI cannot describe it.
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
    400: "The body is not an image, or the image is too small.",
    401: "The token is missing or wrong.",
    403: "Host or Origin is not a name of the service.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    422: "A parameter is invalid.",
    500: "The image could not be scored.",
    503: "Too many images at once.",
    504: "The image was not scored in time.",
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the refusals of a path, for the OpenAPI document."""
    return {
        status: {"model": Refused, "description": _REASONS[status]} for status in sorted(statuses)
    }


def text(kind: str) -> dict[int | str, dict[str, Any]]:
    """Return a text answer for the OpenAPI document; its path needs ``response_class=Response``."""
    content = {f"text/{kind}": {"schema": {"type": "string"}}}
    return {200: {"description": "Answered.", "content": content}}
