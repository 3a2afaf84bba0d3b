"""The HTTP contract: OpenAI's image and batch objects, with Fluid's own settings beside them.

Settings that OpenAI has and this server has not are accepted with the value that it does anyway, and refused with another.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_IMAGES = 10
MAX_SEED = 2**63 - 1
SIZE_PATTERN = r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class GenerationBody(_Strict):
    """`POST /v1/images/generations`."""

    prompt: str = Field(min_length=1, max_length=32_000)
    model: str | None = Field(None, description="must name the served model when given; see GET /v1/models")
    n: int | None = Field(None, ge=1, le=MAX_IMAGES, strict=True)
    size: str | None = Field(None, pattern=SIZE_PATTERN, description="WIDTHxHEIGHT in pixels, or auto")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, strict=True, description="image i of the request has seed + i")
    steps: int | None = Field(None, ge=1, strict=True, description="autoregressive steps")
    guidance: float | None = Field(None, ge=0, le=100)
    temperature: float | None = Field(None, gt=0, le=10)
    negative_prompt: str | None = Field(None, max_length=32_000)
    stream: bool | None = Field(None, strict=True)
    partial_images: int | None = Field(
        None, ge=0, le=64, strict=True, description="previews while the image is made (3 by default); needs stream"
    )
    deadline: float | None = Field(None, gt=0, description="seconds; never more than the server's own")
    user: str | None = Field(None, max_length=512, description="handed to the safety hook")
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    output_compression: Literal[100] | None = None
    input_fidelity: Literal["low"] | None = Field(None, description="of edits")
    background: Literal["auto", "opaque"] | None = None
    quality: Literal["auto"] | None = None
    moderation: Literal["auto"] | None = None


class ImageData(BaseModel):
    b64_json: str
    seed: int


class Usage(BaseModel):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: dict[str, int]


class ImagesResponse(BaseModel):
    created: int
    model: str = Field(description="name:version of the model that made the images")
    data: list[ImageData]
    size: str
    output_format: Literal["png"] = "png"
    background: Literal["opaque"] = "opaque"
    usage: Usage


class ModelInfo(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fluid"
    version: str | None = None
    alias: str | None = None
    image_size: str = Field(description="the size of `auto`")
    size_multiple: int = Field(description="widths and heights are multiples of this many pixels")
    grid: list[int] = Field(description="tokens: rows, columns at the size of `auto`")
    max_prompt_tokens: int
    defaults: dict[str, Any]
    licence: str = ""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelInfo]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class BatchBody(_Strict):
    """`POST /v1/batches`."""

    input_file_id: str = Field(min_length=1, max_length=64)
    endpoint: Literal["/v1/images/generations"]
    completion_window: Literal["24h"]
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )


class RequestCounts(BaseModel):
    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchError(BaseModel):
    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchError]


class CostEstimate(BaseModel):
    """What the rest of a batch will take at the pace so far; null until something is known."""

    seconds_per_image: float | None = None
    remaining_seconds: float | None = None
    cost: float | None = Field(None, description="of the whole batch, with serving.cost_per_replica_hour")


class BatchObject(BaseModel):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    input_file_id: str
    completion_window: str
    status: Literal["validating", "failed", "in_progress", "finalizing", "completed", "cancelling", "cancelled"]
    created_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: BatchErrors | None = None
    request_counts: RequestCounts = RequestCounts()
    metadata: dict[str, str] | None = None
    estimate: CostEstimate = CostEstimate()


class BatchList(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False
